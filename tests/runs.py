"""The user's own commands, for tests: in a process of their own, or in this one, which saves the seconds that importing torch takes.

TINY are the smallest budgets that still go through every stage; the fixture `chain` in conftest.py is one run with them.
"""

import contextlib
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tokenizer", "sft", "rm", "split", "dpo", "ppo")
TRAINED = ("sft", "rm", "dpo", "ppo")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
BUDGETS = {
    "sft": ("--epochs", 1, "--validations", 2),
    "rm": ("--epochs", 0.3, "--validations", 1),
    "dpo": ("--epochs", 0.5, "--validations", 1, "--lr", 3e-5),  # nine validation pairs see it get better
    "ppo": ("--iterations", 2, "--prompts-per-iteration", 8, "--validations", 1),
}
WORLD = ("--pairs", 200, "--test-prompts", 20, "--max-response", 24, "--validation-share", 0.05)


def in_chain(stage, flags):
    """A stage's flags under their names in the chain: --lr becomes --dpo-lr."""
    return [flag.replace("--", f"--{stage}-", 1) if str(flag).startswith("--") else flag for flag in flags]


TINY = [flag for stage, flags in BUDGETS.items() for flag in in_chain(stage, flags)]


def command(*args, cwd=ROOT, expect=0, program="train.py", env=None, timeout=300):
    """`python train.py ARGS` in a process of its own, on one thread; its output, errors included. Fails unless the exit code is `expect`."""
    done = subprocess.run(
        [sys.executable, program, *map(str, args)], cwd=cwd, env={**os.environ, **ONE_THREAD, **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == expect, f"{program} {' '.join(map(str, args))}: exit code {done.returncode}, not {expect}:\n{done.stdout[-3000:]}"
    return done.stdout


def here(*args, expect=0, program="train.py"):
    """The same command run in this process, by executing train.py as the main program; output and exit code as above."""
    output, argv, threads = io.StringIO(), sys.argv, torch.get_num_threads()
    sys.argv = [program, *map(str, args)]
    torch.set_num_threads(1)
    code = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    assert code == expect, f"{program} {' '.join(map(str, args))}: exit code {code}, not {expect}:\n{output.getvalue()[-3000:]}"
    return output.getvalue()


def copy_of(run, to, *without):
    """A run copied without some of its stages and without its comparison."""
    return Path(shutil.copytree(run, to, ignore=lambda folder, names: {"eval", *without} if Path(folder) == Path(run) else ()))


def manifest(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())


def metrics(folder, *, timeless=True):
    """The lines of a stage's metrics.jsonl, without their times."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time" or not timeless} for line in lines]


def steps(folder):
    """The lines of training steps alone, without those of validations."""
    return [line for line in metrics(folder) if "grad_norm" in line]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def put_on_record(run):
    """Makes a run in which a test has changed files one that could have been made so: digests of files, and of parents that are stages of it."""
    for path in [run / stage / "manifest.json" for stage in ("data", *STAGES) if (run / stage).exists()]:
        made = manifest(path.parent)
        made["files"] = {name: sha256(path.parent / name) for name in made["files"]}
        for parent in made["parents"].values():
            place = run / Path(parent["path"]).name / "manifest.json"
            parent |= {"manifest": sha256(place)} if "manifest" in parent and place.exists() else {}
        path.write_text(json.dumps(made))


def snapshot(folder):
    """Relative path -> digest of every file: what must not change when a command is refused."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def write_rows(path, rows):
    """JSON lines; strings are written as they are."""
    path = Path(path)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
