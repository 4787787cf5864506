"""Runs that are killed, stopped or damaged, and gone on with: the end is bit for bit that of a run that nothing happened to.

Processes die by SIGKILL at moments that tests/killed.py counts: layers and optimiser steps ("work": rollouts, updates, validations), and
writes, flushes, renames and removals of files ("disk": before, in and after a save). Everything is compared: weights, snapshots, the
optimiser's moments in the last checkpoint, metrics apart from `time`, results.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from runs import ONE_THREAD, ROOT, STAGES, TINY, TRAINED, WORLD, copy_of, here, in_chain, manifest, metrics, sha256, snapshot
from safetensors.torch import load_file, save_file
from test_faults import Intruder

SEED = 4
FLAGS = {
    "sft": ("--epochs", 0.4, "--validations", 3, "--save-every", 2),
    "rm": ("--epochs", 0.3, "--validations", 2, "--save-every", 2),
    "split": (),
    "dpo": ("--part", "all", "--epochs", 0.4, "--validations", 2, "--save-every", 1),
    "ppo": (
        "--iterations", 4, "--prompts-per-iteration", 6, "--minibatch", 4, "--validations", 2, "--kl-target", 0.01, "--kl-horizon", 30,
        "--lr", 2e-3, "--save-every", 1,
    ),
}  # fmt: skip


def dying(*args, kill="after:0", expect=0, keep_checkpoints="1"):
    """The command in a process that ends itself at this moment; its output, and the moments there were where it did not."""
    environment = {**os.environ, **ONE_THREAD, "KILL": kill, "KEEP_CHECKPOINTS": keep_checkpoints}
    done = subprocess.run(
        [sys.executable, "tests/killed.py", *map(str, args)], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, f"{kill} {args}: exit code {done.returncode}, not {expect}:\n{done.stdout[-3000:]}"
    return done.stdout, {kind: int(count) for kind, count in re.findall(r"(disk|work) (\d+)", done.stdout.splitlines()[-1] if done.stdout else "")}


def before(chain, folder, stage):
    """A copy of the chain as it was before this stage."""
    return copy_of(chain, folder, *STAGES[STAGES.index(stage) :])


@pytest.fixture(scope="session")
def whole(chain, tmp_path_factory):
    """stage -> the run in which that stage was not interrupted, and its moments; made when first asked for."""
    made = {}

    def get(stage):
        if stage not in made:
            run = before(chain, tmp_path_factory.mktemp("whole") / stage, stage)
            made[stage] = run, dying("--stage", stage, "--out", run, *FLAGS[stage])[1]
        return made[stage]

    return get


def contents(folder):
    """Everything that must be the same: bytes of files, metrics without times, results."""
    found = {}
    for name, digest in snapshot(folder).items():
        if name.endswith("metrics.jsonl"):
            found[name] = metrics((folder / name).parent)
        elif name == "manifest.json":
            found[name] = manifest(folder)["results"]
        elif not name.endswith(("flags.json", "checkpoint.json")):  # a path, and a digest of times
            found[name] = digest
    return found


def same(folder, expected):
    """Equal contents, and steps without gap or repetition."""
    found, wanted = contents(folder), contents(expected)
    assert set(found) == set(wanted)
    assert not [name for name in wanted if found[name] != wanted[name]]
    for name, lines in found.items():
        if name.endswith("metrics.jsonl"):
            trained = [line["step"] for line in lines if "grad_norm" in line]
            assert trained == list(range(len(trained)))
    assert not list(folder.parent.glob(".*.lock")) and not list(folder.rglob("*.tmp"))


def resumed(stage, run, flags=None, **how):
    """The stage gone on with; or begun, where it had died before there was anything."""
    args = ("--stage", stage, "--out", run, *(FLAGS[stage] if flags is None else flags))
    begun = (run / stage).is_dir() and any((run / stage).iterdir())
    return dying(*args, *(["--resume"] if begun else []), **how)[0]


def survives(chain, tmp_path, whole, stage, *moments):
    """Dies at each of the moments in turn, at the later ones while going on, then ends like the run that nothing happened to."""
    expected, _ = whole(stage)
    run = before(chain, tmp_path / "run", stage)
    dying("--stage", stage, "--out", run, *FLAGS[stage], kill=moments[0], expect=-signal.SIGKILL)
    for moment in moments[1:]:
        resumed(stage, run, kill=moment, expect=-signal.SIGKILL)
    output = resumed(stage, run)
    same(run / stage, expected / stage)
    return output


@pytest.mark.parametrize("stage, kind, share", [("ppo", "work", 0.55), ("sft", "disk", 0.6)])
def test_a_killed_stage_goes_on_as_if_nothing_had_been(chain, tmp_path, whole, stage, kind, share):
    """PPO amid its work, SFT amid a save."""
    moment = int(share * whole(stage)[1][kind])
    assert "resumed from" in survives(chain, tmp_path, whole, stage, f"{kind}:{moment}")


def draws(stage, count):
    """Random moments, half of them of files, as shares of a run's."""
    rng = random.Random(f"{SEED} {stage}")
    return [(stage, ("disk", "work")[i % 2], rng.random(), rng.random()) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("stage, kind, share, again", [draw for stage in STAGES[1:] for draw in draws(stage, 20 if stage == "ppo" else 5)])
def test_random_moments_of_death(chain, tmp_path, whole, stage, kind, share, again):
    """Every third draw of PPO's dies once more while it goes on."""
    counts = whole(stage)[1]
    kind = kind if counts[kind] else "disk"
    moments = [f"{kind}:{1 + int(share * counts[kind])}"]
    if stage == "ppo" and again < 0.33:
        moments.append(f"work:{1 + int(again * (1 - share) * counts['work'])}")
    survives(chain, tmp_path, whole, stage, *moments)


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(5))
def test_a_killed_chain_goes_on(chain, tmp_path, draw):
    """From the raw data on; the chain of conftest.py is the run that nothing happened to."""
    rng = random.Random(f"{SEED} chain {draw}")
    args = ("--stage", "mpo", "--out", tmp_path / "run", *WORLD, *TINY, "--save-every", 3)
    kind, at = ("disk", int(rng.random() * 1000)) if draw % 2 else ("work", int(rng.random() * 1300))
    dying(*args, kill=f"{kind}:{at + 1}", expect=-signal.SIGKILL, keep_checkpoints="")
    command = [*args, "--resume"] if any((tmp_path / "run").glob("*/")) else args
    here(*command)
    for stage in STAGES:
        same(tmp_path / "run" / stage, chain / stage)


# ---- signals (case 20)


def started(*args, program="train.py"):
    """The command as a process of its own, whose output goes to a pipe."""
    return subprocess.Popen(
        [sys.executable, program, *map(str, args)],
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def when(condition, process, seconds=60):
    """Waits for the condition while the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_and_saves(chain, tmp_path, whole, number, code):
    run = before(chain, tmp_path / "run", "sft")
    flags = (*FLAGS["sft"], "--save-every", 0)
    process = started("--stage", "sft", "--out", run, *flags)
    when(lambda: lines(run / "sft" / "metrics.jsonl") > 3, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    found = re.search(r"stopped after (\d+) steps, which are saved in (\S+); go on with --resume", output)
    taken = [line["step"] for line in metrics(run / "sft") if "grad_norm" in line]
    assert taken == list(range(int(found[1]))) and os.path.exists(found[2])
    here("--stage", "sft", "--out", run, *flags, "--resume")
    assert not goes_on(run, whole)


def test_a_second_signal_ends_at_once(chain, tmp_path):
    """PPO's rounds of 512 responses take longer than the test waits."""
    run = before(chain, tmp_path / "run", "ppo")
    process = started("--stage", "ppo", "--out", run, "--prompts-per-iteration", 512, "--validations", 1)
    when(lambda: lines(run / "ppo" / "metrics.jsonl") > 0, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == -signal.SIGTERM and "a second one ends at once" in output
    assert not (run / "ppo" / "checkpoints").exists()


# ---- what --resume refuses (cases 26 and 27)


@pytest.fixture(scope="session")
def stopped(chain, tmp_path_factory):
    """A run whose SFT was killed after its third checkpoint of two. Only to be copied."""
    run = before(chain, tmp_path_factory.mktemp("stopped") / "run", "sft")
    dying("--stage", "sft", "--out", run, *FLAGS["sft"], kill="disk:160", expect=-signal.SIGKILL)
    assert [path.name for path in steps_of(run)] == ["step-00000004", "step-00000006"], sorted(snapshot(run / "sft"))
    return run


def goes_on(run, whole):
    """Asserts that SFT ended as if nothing had been, but for files that are missing: their names."""
    found, wanted = contents(run / "sft"), contents(whole("sft")[0] / "sft")
    missing = {name for name in wanted if name not in found and not name.startswith("checkpoints")}
    assert found == {name: what for name, what in wanted.items() if not name.startswith("checkpoints") and name not in missing}
    return missing


def files(run):
    """Digests of all files but what a dead process leaves: its lock and half a file."""
    return {name: digest for name, digest in snapshot(run).items() if not name.endswith((".lock", ".tmp"))}


def steps_of(run, stage="sft"):
    return sorted((run / stage / "checkpoints").glob("step-*"))


def test_other_flags_are_refused_with_the_difference(stopped, chain):
    state = files(stopped)
    message = here("--stage", "sft", "--out", stopped, *FLAGS["sft"], "--resume", "--lr", 0.5, expect=4)
    assert re.search(r"\(lr was 0\.\d+, is 0\.5\); resume it with those", message)
    assert "--seed 7" in here("--stage", "sft", "--out", stopped, *FLAGS["sft"], "--resume", "--seed", 7, expect=2)  # another seed, other data
    message = here("--stage", "sft", "--out", stopped, *FLAGS["sft"], "--resume", "--dtype", "bf16", expect=4)
    assert "(dtype was fp32, is bf16); resume it with those" in message
    assert "other settings (epochs was 1.0, is 0.4" in here("--stage", "sft", "--out", chain, *FLAGS["sft"], "--resume", expect=4)
    assert files(stopped) == state


def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_micro_batches(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    assert "resumed from" in here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume", "--micro-batch", 1)
    assert (run / "sft" / "manifest.json").exists()


def test_an_unfinished_folder_needs_resume_and_resume_needs_one(stopped, chain, tmp_path):
    state = files(stopped)
    message = here("--stage", "sft", "--out", stopped, *FLAGS["sft"], expect=2)
    assert "holds an unfinished run; add --resume" in message
    assert "unfinished" in here("--stage", "rm", "--out", stopped, expect=2)
    assert files(stopped) == state
    for stage in ("sft", "mpo"):
        assert "--resume: there is nothing in" in here("--stage", stage, "--out", tmp_path / "new", "--resume", expect=2)
    assert not (tmp_path / "new").exists()
    run = before(chain, tmp_path / "run", "ppo")
    state = files(run)
    assert f"--resume: there is nothing in {run / 'ppo'}" in here("--stage", "ppo", "--out", run, "--resume", expect=2)
    assert files(run) == state


def test_another_tokenizer_under_a_stopped_run_is_refused(stopped, tmp_path):
    """A parent that was changed, or made anew, since the run was stopped."""
    run = shutil.copytree(stopped, tmp_path / "run")
    weights = run / "tokenizer" / "tokenizer.model"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert "tokenizer.model: changed since" in here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume", expect=4)
    here_again = json.loads((run / "tokenizer" / "manifest.json").read_text())
    (run / "tokenizer" / "tokenizer.model").write_bytes(weights.read_bytes()[:-1])
    (run / "tokenizer" / "manifest.json").write_text(json.dumps(here_again | {"results": {}}))
    assert "(tokenizer was " in here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume", expect=4)


# ---- damaged checkpoints (case 23)


def edit(change, name):
    def damage(place):
        (place / name).write_bytes(change((place / name).read_bytes()))

    return damage


def swap(place):
    (place / "weights.safetensors").rename(place / "x")
    (place / "optimiser.safetensors").rename(place / "weights.safetensors")
    (place / "x").rename(place / "optimiser.safetensors")


def flip(raw, at=0.5):
    at = int(at * len(raw))
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


DAMAGE = {
    "truncated": (edit(lambda raw: raw[:-9], "weights.safetensors"), "weights.safetensors: truncated to"),
    "a flipped bit": (edit(flip, "optimiser.safetensors"), "optimiser.safetensors: changed since it was written"),
    "a flipped bit in the state": (edit(partial(flip, at=0.1), "state.json"), "state.json: changed since it was written"),
    "extra bytes": (edit(lambda raw: raw + b"\0", "weights.safetensors"), "weights.safetensors: grown to"),
    "a missing file": (lambda place: (place / "state.json").unlink(), "state.json: missing"),
    "swapped files": (swap, "weights.safetensors: holds what belongs into optimiser.safetensors"),
    "the best weights": (edit(flip, "best/model.safetensors"), "best/model.safetensors: changed since"),
    "no listing": (lambda place: (place / "checkpoint.json").unlink(), "checkpoint.json: missing"),
    "a cut listing": (edit(lambda raw: raw[:30], "checkpoint.json"), "checkpoint.json: damaged"),
    "a foreign listing": (edit(lambda raw: b"[1, 2]", "checkpoint.json"), "checkpoint.json: damaged"),
    "a file beside": (edit(lambda raw: raw, "metrics.jsonl"), None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, tmp_path, whole, name):
    run = shutil.copytree(stopped, tmp_path / "run")
    damage, words = DAMAGE[name]
    if words is None:
        (steps_of(run)[-1] / "optimiser.pt").write_bytes(b"anything")
        words = "optimiser.pt: not part of the checkpoint"
    damage(steps_of(run)[-1])
    output = here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume")
    assert words in output and "step-00000006 IS DAMAGED AND NOT USED" in output and "resumed from" in output and "step-00000004" in output
    assert not goes_on(run, whole)


def test_a_damaged_snapshot_is_named_and_left_out(stopped, tmp_path, whole):
    """Nothing that follows needs it, and no manifest may say that it is whole."""
    run = shutil.copytree(stopped, tmp_path / "run")
    path = run / "sft" / "snapshot-00004" / "model.safetensors"
    path.write_bytes(flip(path.read_bytes()))
    output = here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume")
    assert f"MISSING OR CHANGED, AND LEFT OUT: {path}" in output and not path.exists()
    assert goes_on(run, whole) == {f"snapshot-00004/{name}" for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")}


def test_where_no_checkpoint_is_whole_nothing_is_touched(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    for place in steps_of(run):
        (place / "state.json").unlink()
    state = files(run)
    message = here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume", expect=4)
    assert message.count("state.json: missing") == 2 and "no checkpoint is whole" in message
    assert files(run) == state


def relist(place):
    """Puts the digests of a checkpoint's files as they are on record, as someone would who wants them to be believed."""
    names = json.loads((place / "checkpoint.json").read_text())
    files = {name: {"bytes": (place / name).stat().st_size, "sha256": sha256(place / name)} for name in names}
    (place / "checkpoint.json").write_text(json.dumps(files))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimiser.safetensors", "state.json", "checkpoint.json"])
def test_a_pickle_in_a_checkpoint_is_never_opened(stopped, tmp_path, name):
    """Even where the digests say that it belongs there (case 25)."""
    run, intruded = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "intruded"
    for place in steps_of(run):
        (place / name).write_bytes(pickle.dumps(Intruder(intruded)))
        if name != "checkpoint.json":
            relist(place)
    state = files(run)
    message = here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume", expect=4)
    assert ("not a whole safetensors file" if name.endswith("safetensors") else f"{name}: damaged") in message
    assert not intruded.exists() and files(run) == state


def test_a_checkpoint_of_another_model_is_refused(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    place = steps_of(run)[-1]
    weights = load_file(place / "weights.safetensors")
    weights["trunk.other.weight"] = weights.pop("trunk.norm.weight")
    save_file(weights, place / "weights.safetensors")
    relist(place)
    state = files(run)
    message = here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume", expect=4)
    assert "do not fit: trunk.norm.weight is in one of them alone; trunk.other.weight is in one of them alone" in message and files(run) == state


def test_a_checkpoint_of_other_versions_is_used_with_a_warning(stopped, tmp_path, whole):
    run = shutil.copytree(stopped, tmp_path / "run")
    place = steps_of(run)[-1]
    state = json.loads((place / "state.json").read_text())
    state["versions"]["torch"] = "1.0"
    (place / "state.json").write_text(json.dumps(state))
    relist(place)
    output = here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume")
    assert f"warning: {place}: made by " in output and "'torch': '1.0'" in output
    assert not goes_on(run, whole)


def test_an_unwritten_checkpoint_takes_no_part(stopped, tmp_path, whole):
    """What a death in the middle of a save leaves."""
    run = shutil.copytree(stopped, tmp_path / "run")
    half = run / "sft" / "checkpoints" / ".step-00000008.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    here("--stage", "sft", "--out", run, *FLAGS["sft"], "--resume")
    assert not goes_on(run, whole)


# ---- two processes on one folder


def test_two_processes_on_one_folder(chain, tmp_path):
    run = before(chain, tmp_path / "run", "ppo")
    process = started("--stage", "ppo", "--out", run, "--iterations", 500, "--prompts-per-iteration", 8)
    when(lambda: lines(run / "ppo" / "metrics.jsonl") > 1, process)
    for resume in ([], ["--resume"]):
        message = here("--stage", "ppo", "--out", run, "--iterations", 500, "--prompts-per-iteration", 8, *resume, expect=2)
        assert f"{run / 'ppo'}: process {process.pid} on " in message and "is at work here" in message
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert (run / ".ppo.lock").exists()
    output = here("--stage", "ppo", "--out", run, "--iterations", 500, "--prompts-per-iteration", 8, "--lr", 1, "--resume", expect=4)
    assert f".ppo.lock was left by process {process.pid} on " in output and "is dead" in output  # and is no obstacle
    assert not (run / ".ppo.lock").exists()


def test_every_trained_stage_takes_the_flags_of_saving():
    for stage in TRAINED:
        assert "--save-every" in here("--stage", stage, "--help")
    assert "--save-every" not in here("--stage", "split", "--help")
    assert in_chain("sft", ["--lr"]) == ["--sft-lr"]
