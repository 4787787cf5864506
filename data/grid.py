"""Runs the rows of data/ablations.py, each in processes of its own, and keeps what each shows as one line of JSON.

Folders, all under OUT/runs and named by what they were made with, so that other flags never meet old folders:

    base-SEED-KEY      data, tokenizer, SFT, reward model and split, which rows share: one per seed and setting of those stages
      judge              a reward model on pairs that no row trains on, with the base's tokenizer and SFT model
      strong             another, where rows ask for it, on many pairs with hardly any noise
    ROW-SEED-KEY       the row's own stage; the base's stages and `start`, the model that it starts from, are links

Every process has one thread, so that numbers do not depend on how many run at once. A finished row is a line of the rows file, keyed by its
flags, seed and inputs, never by a folder: a grid goes on where it stopped, on any machine that is given the file. Training has no true
reward; a line has it because eval.py measures it.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from data.ablations import ROWS, STRONG, STRONGLY, base_flags, chosen_rows, is_ppo, stage_flags
from data.compare import COURSE
from data.errors import CheckpointError, Stop, UsageError
from data.examples import FORMATS
from data.files import atomic_write, digest, model_digest, read_json, write_json
from data.flags import flag, typed
from data.prepare import DataFlags, WorldFlags
from data.run import MANIFEST, code_version, locked
from data.synthetic import WORLDS
from data.tokenizer import tokenizer_file

ROOT = Path(__file__).resolve().parent.parent
BASE, STAGES = ("tokenizer", "sft", "rm", "split"), ("dpo", "ppo")
MADE = "made.json"  # the last file of a base or a row: what made it, from what, and in how many seconds
TEST_PROMPTS, VALIDATION_PROMPTS = 2000, 500
JUDGE_SEED, STRONG_SEED = 100_000, 200_000  # added to a seed for pairs that no row trains on: far from every seed that anyone types
OF_DATA = {"--" + field.name.replace("_", "-") for group in (DataFlags, WorldFlags) for field in dataclasses.fields(group)}
OF_MODEL = {"--size", "--init"}  # of SFT
FOLDERS = {"--init", "--rm-init", "--rm-reward-model"}  # flags that name a model's folder
OF_NETWORKS = {"--dtype", "--parallel", "--checkpoint-activations", "--compile", "--offload"}
UNREAD = {"tokenizer": OF_NETWORKS, "split": OF_NETWORKS, "sft": {"--offload"}}  # by stages without a network, and without a frozen one


@dataclass(frozen=True)
class GridFlags:
    out: str = flag("runs/ablations", "folder of the grid; it goes on by itself where it stopped")
    only: str = flag("core", "rows and groups of data/ablations.py, with commas between; the rows that they start from are run too")
    seeds: str = flag("1,2,3,4,5", "with commas between; each draws data, labels, weights and samples anew")
    jobs: int = flag(1, "processes at once, one thread each; changes no number", positive=True)
    rows: str | None = flag(None, "file of finished rows, which are not run again (default: OUT/rows.jsonl)")
    judge_data: str | None = flag(None, "pairs of the judging reward model, like --data (default: in worlds other draws, else no judge)")
    quick: bool = flag(False, "four rows, two seeds, smallest budgets")


@dataclass(frozen=True)
class Grid:
    """One call: where, which flags were typed for all rows (in the chain's names), and where the judge's pairs come from."""

    out: Path
    rows: Path
    common: dict[str, object]
    judge_data: str | None
    defaults: dict[str, object]


def run_grid(flags: GridFlags, given: dict, defaults: dict[str, object]) -> Path:
    """Runs every row that has no line yet and returns the rows file. `given`: the flags that were typed for all rows, by name; `defaults`:
    those of all flags, in the chain's names.

    Raises UsageError for names and seeds that are none, for flags that rows decide, or where a finished row was made with other defaults; at
    the end the failure of the first row that failed.
    """
    common = {"--" + name.replace("_", "-"): value for name, value in given.items()}
    if decided := sorted(flag for flag in common if re.fullmatch(r"--(dpo|ppo)-(init|ref|part|prompts|reward-model)", flag)):
        raise UsageError(f"{decided[0]}: is what the rows differ in; leave it out")
    if STRONGLY.items() <= common.items():
        raise UsageError("--rm-reward-model strong: is the grid's own word; give a folder of that name as ./strong")
    data = common.setdefault("--data", "advice")
    if data in WORLDS and not common.get("--quick") and "--test-data" not in common:
        common.setdefault("--test-prompts", TEST_PROMPTS)
    out = Path(flags.out)
    grid = Grid(out.resolve(), Path(flags.rows or out / "rows.jsonl"), common, flags.judge_data or (data if data in WORLDS else None), defaults)
    if not re.fullmatch(r"\d+(,\d+)*", flags.seeds):
        raise UsageError(f"--seeds {flags.seeds}: give whole numbers with commas between")
    wanted = [(name, int(seed)) for name in chosen_rows(flags.only) for seed in flags.seeds.split(",")]
    if asks := [name for name, _ in wanted if data not in WORLDS and STRONGLY.items() <= base_flags(name).items()]:
        raise UsageError(f"--only {asks[0]}: its reward model needs pairs without noise, which only a built-in world has; leave the row out")
    if "--rm-reward-model" in common and (trains := [name for name, _ in wanted if any(flag.startswith("--rm-") for flag in base_flags(name))]):
        raise UsageError(f"--only {trains[0]}: has a reward model of its own, and --rm-reward-model gives one to all rows; leave one of them out")
    known = {line["key"]: line for line in read_rows(grid.rows)}
    keys = {task: row_key(grid, *task) for task in wanted}
    pending = [task for task in wanted if keys[task] not in known]
    for line in (known[key] for key in keys.values() if key in known):
        advice = "remove its line and its folder to make it again, or give another --rows"
        check_defaults(grid, line, f"{grid.rows}: row {line['row']}, seed {line['seed']}", advice)
    others = sum(known[key]["code"] != code_version() for key in keys.values() if key in known)
    of_others = f" ({others} by other versions of this code)" if others else ""
    print(f"[ablations] {len(wanted)} rows, {len(wanted) - len(pending)} of them finished already{of_others}, in {grid.rows}")
    if not pending:
        return grid.rows
    with locked(grid.rows):  # two grids would write over each other's lines
        failed = run_tasks(grid, pending, flags.jobs)
    if defects := [error for error in failed if not isinstance(error, Stop)]:
        raise defects[0]
    if failed:
        raise type(failed[0])("; ".join(dict.fromkeys(map(str, failed)))) from failed[0]
    return grid.rows


def run_tasks(grid: Grid, pending: list[tuple[str, int]], jobs: int) -> list[BaseException]:
    """Makes what the pending rows need and measures them; returns failures. A task begins when those that it needs have ended."""
    rows = dict.fromkeys((name, seed) for name, seed in pending for name in chosen_rows(name))
    base_of, lock = {row: base_folder(grid, *row) for row in rows}, threading.Lock()
    needs: dict = {base: [] for base in base_of.values()}  # task, a base's folder or a row with its seed -> tasks
    needs |= {(name, seed): [base, *([(start, seed)] if (start := ROWS[name].start) else [])] for (name, seed), base in base_of.items()}
    makers = {base: partial(make_base, grid, *row) for row, base in base_of.items()}
    tasks: dict[object, Future] = {}

    def begin(task) -> None:
        """Makes a base, or a row whose base and start are made; raises the failure of those."""
        for need in needs[task]:
            tasks[need].result()
        makers[task]() if task in makers else make(*task)

    def make(name: str, seed: int) -> None:
        """Makes one row, and measures it where its line is pending."""
        if (name, seed) in pending or not (row_folder(grid, name, seed) / MADE).exists():
            print(f"[ablations] {name}, seed {seed}: started\n", end="", flush=True)
        make_row(grid, name, seed)
        if (name, seed) in pending:
            line = measured(grid, name, seed)
            with lock:
                atomic_write(grid.rows, "".join(json.dumps(row) + "\n" for row in [*read_rows(grid.rows), line]))
            print(f"[ablations] {name}, seed {seed}: finished in {line['time']['train'] + line['time']['eval']:.0f} s\n", end="", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting := [task for task in needs if task not in tasks]:
                for task in waiting:
                    if all(need in tasks and tasks[need].done() for need in needs[task]):
                        tasks[task] = pool.submit(begin, task)
                wait([task for task in tasks.values() if not task.done()], return_when=FIRST_COMPLETED)
            failures = [task.exception() for task in tasks.values()]
        except BaseException:  # Ctrl-C: what runs has had it too, and what waits must not begin
            pool.shutdown(cancel_futures=True)
            raise
    return [error for error in failures if error]


# What a row is known by

def row_defaults(grid: Grid, name: str | None) -> dict[str, object]:
    """The defaults of all flags that a row's stages, and those of the rows that it starts from, could have read; None: the stages that rows share."""
    stages = set(BASE)
    while name:
        stages, name = stages | {last_stage(name)}, ROWS[name].start
    others = {*BASE, *STAGES} - stages
    return {flag: value for flag, value in grid.defaults.items() if flag.split("-")[2] not in others}


def check_defaults(grid: Grid, made: dict, what: str, advice: str) -> None:
    """Raises UsageError where a row or a folder was made with a default that has changed since: its key has only what was typed."""
    typed, row = set(), made["made_with"]
    while row:
        typed, row = typed | set(row["flags"]), row["start"]
    for flag, then in made["defaults"].items():
        if flag in grid.defaults and flag.partition(" ")[0] not in typed and grid.defaults[flag] != then:
            raise UsageError(f"{what} was made when {flag} was {then} by default, and now it is {grid.defaults[flag]}; {advice}")


def is_made(grid: Grid, folder: Path) -> bool:
    """Whether a base or a row is there; raises UsageError where it was made with other defaults."""
    if not (folder / MADE).exists():
        return False
    check_defaults(grid, read_json(folder / MADE), str(folder), "remove this folder, and those of the rows that start from it, to make it again, or give another --out")
    return True


def row_key(grid: Grid, name: str, seed: int) -> str:
    """A digest of everything that a row's numbers follow from, the code apart."""
    return short_digest(described(grid, name, seed))


def described(grid: Grid, name: str, seed: int) -> dict:
    """A row's flags, seed and inputs, and those of the row that it starts from. Files are known by their contents."""
    row = ROWS[name]
    flags = keyed(grid.common | base_flags(name) | row.flags)
    start = row.start and described(grid, row.start, seed)
    return {"flags": flags, "seed": seed, "judge": grid.judge_data and content(grid.judge_data), "start": start}


def keyed(flags: dict[str, object]) -> dict[str, object]:
    """Flags as they enter a key: a model to start from by its weights, files by their contents, a reward model of the grid by its pairs."""

    def entry(flag: str, value):
        if (flag, value) in STRONGLY.items():
            return STRONG
        if flag == "--tokenizer-file":
            return short_file(value, f"{flag} {value}")
        return of_folder(Path(value)) if flag in FOLDERS else content(value)

    return {flag: entry(flag, value) for flag, value in flags.items()}


@cache  # a large model enters the keys of many rows
def of_folder(folder: Path) -> str:
    """What identifies a model from elsewhere together with its tokenizer, which a base takes as well."""
    return model_digest(folder) + digest(tokenizer_file(folder))


def content(value):
    """A flag's value; for a spec of files their kind and digests in place of their paths."""
    kind, colon, paths = str(value).partition(":")
    if not colon or kind not in FORMATS:  # --template hh names a format, and no file
        return value
    return f"{kind}:" + ",".join(short_file(path, value) for path in paths.split(","))


def short_file(path: str, asked: str) -> str:
    """The beginning of a file's digest; raises UsageError, with what was asked for, where there is no such file."""
    if not Path(path).is_file():
        raise UsageError(f"{asked}: no file {path}")
    return digest(Path(path))[:16]


def short_digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def shared_flags(grid: Grid, name: str) -> dict[str, object]:
    """Flags of the stages that a row shares with others."""
    return {flag: value for flag, value in (grid.common | base_flags(name)).items() if not flag.startswith(("--dpo-", "--ppo-"))}


def base_folder(grid: Grid, name: str, seed: int) -> Path:
    flags = keyed(shared_flags(grid, name))
    return grid.out / "runs" / f"base-{seed}-{short_digest([flags, grid.judge_data and content(grid.judge_data)])}"


def row_folder(grid: Grid, name: str, seed: int) -> Path:
    return grid.out / "runs" / f"{name}-{seed}-{row_key(grid, name, seed)}"


def read_rows(path: Path) -> list[dict]:
    """The lines of a rows file; none where there is no file. Raises CheckpointError with file:line for one that is damaged, UsageError for a folder."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file for rows, such as {path / 'rows.jsonl'}")
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            lines.append(json.loads(line))
            if not isinstance(lines[-1], dict) or not {"key", "row", "seed", "made_with", "points"} <= set(lines[-1]):
                raise ValueError("it has not what a row has")
        except ValueError as error:
            raise CheckpointError(f"{path}:{number}: is no line of a grid ({error}); remove it, and that row is run again") from error
    return lines


# Making and measuring

def program(folder: Path, log: Path, *arguments) -> None:
    """`python ARGUMENTS` in a folder, on one thread, its output added to the log; raises the failure that its exit code stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as output:
        script, *rest = map(str, arguments)
        print("\n$", script, *rest, file=output, flush=True)
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        code = subprocess.run(
            [sys.executable, str(ROOT / script), *rest], cwd=folder, env=os.environ | threads, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ).returncode
    if code:
        kind = {kind.code: kind for kind in Stop.__subclasses__()}.get(code, Stop)
        raise kind(f"{script} {' '.join(rest[:2])} stopped with exit code {code}; read {log}")


def stage(folder: Path, name: str, seed: int, flags: dict[str, object], *more, cwd: Path | None = None) -> None:
    """One stage of a run with those of the flags that it reads."""
    others = OF_DATA | OF_MODEL | UNREAD.get(name, set())
    # of no stage in particular: device, dtype, --quick
    everywhere = {flag: v for flag, v in flags.items() if not re.match(r"--(tokenizer|sft|rm|split|dpo|ppo)-", flag) and flag not in others}
    own = stage_flags(flags, name)
    if name in ("tokenizer", "sft"):
        own |= {flag: value for flag, value in flags.items() if flag in (OF_DATA if name == "tokenizer" else OF_MODEL)}
    for unfinished in (folder / part for part in {"tokenizer": ("data", name)}.get(name, (name,))):
        if unfinished.exists() and not (unfinished / MANIFEST).exists():
            with locked(unfinished):  # unless another is at work
                shutil.rmtree(unfinished)  # a grid was stopped here
    where = "." if cwd == folder else folder
    program(cwd or Path.cwd(), folder / "log.txt", "train.py", "--stage", name, "--out", where, "--seed", seed, *typed(everywhere | own), *more)


def make_base(grid: Grid, name: str, seed: int) -> None:
    """The stages that rows share, and the judge; what is there already is not made again."""
    folder, flags, began = base_folder(grid, name, seed), shared_flags(grid, name), time.perf_counter()
    if is_made(grid, folder):
        return
    print(f"[ablations] what rows share, seed {seed}: {folder.name}\n", end="", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if init := flags.get("--init") or grid.common.get("--rm-reward-model"):  # as in a chain
        flags = {"--tokenizer-file": tokenizer_file(Path(init))} | flags

    def other_reward_model(name: str, seed: int, flags: dict[str, object]) -> Path:
        """A reward model on other pairs, with the base's tokenizer and SFT model."""
        apart, own = folder / name, {flag: value for flag, value in flags.items() if not flag.startswith(("--tokenizer-", "--rm-reward-model"))}
        apart.mkdir(exist_ok=True)
        stage(apart, "tokenizer", seed, own, "--file", folder / "tokenizer" / "tokenizer.model")
        stage(apart, "rm", seed, own | {"--rm-folds": 1}, "--init", folder / "sft")
        return apart / "rm"

    for part in BASE:
        own = flags
        if part == "rm" and STRONGLY.items() <= flags.items():
            strong = other_reward_model("strong", seed + STRONG_SEED, {flag: value for flag, value in flags.items() if flag != "--max-pairs"} | STRONG)
            own = {flag: value for flag, value in flags.items() if not flag.startswith("--rm-")} | {"--rm-reward-model": strong}
        stage(folder, part, seed, own)
    if grid.judge_data:
        other_reward_model("judge", seed + JUDGE_SEED, flags | {"--data": grid.judge_data})
    (folder / "cache").mkdir(exist_ok=True)
    of_base = {"flags": keyed(shared_flags(grid, name)), "start": None}
    write_json(folder / MADE, {"seconds": time.perf_counter() - began, "code": code_version(), "made_with": of_base, "defaults": row_defaults(grid, None)})


def make_row(grid: Grid, name: str, seed: int) -> None:
    """A row's own stages, beside links to everything else."""
    row, base, folder = ROWS[name], base_folder(grid, name, seed), row_folder(grid, name, seed)
    began, flags = time.perf_counter(), grid.common | row.flags
    folder.mkdir(parents=True, exist_ok=True)
    own_split = any(flag.startswith("--split-") for flag in row.flags)
    shared = ("data", "tokenizer", "sft", "rm", "cache", *(() if own_split else ("split",)))
    links = {part: base / part for part in shared}
    if row.start:
        links["start"] = row_folder(grid, row.start, seed) / last_stage(row.start)
    for link, target in links.items():
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(os.path.relpath(target, folder))
    if own_split:
        stage(folder, "split", seed, flags, cwd=folder)
    if is_ppo(name):
        from_start = {} if "--ppo-init" in row.flags else {"--ppo-init": "start"}
        flags = from_start | ({} if "--ppo-ref" in row.flags else {"--ppo-ref": "start"}) | flags
    if not is_made(grid, folder):
        if last_stage(name) in STAGES:
            stage(folder, last_stage(name), seed, flags, cwd=folder)
        made = {"made_with": described(grid, name, seed), "defaults": row_defaults(grid, name)}
        write_json(folder / MADE, {"seconds": time.perf_counter() - began, "code": code_version()} | made)


def last_stage(name: str) -> str:
    """What a row's points are named by: its stage, or best-of."""
    return "best-of" if "--best-of" in ROWS[name].flags else "ppo" if is_ppo(name) else "dpo"


def measured(grid: Grid, name: str, seed: int) -> dict:
    """A finished row's line: what eval.py says of its best, its last and all other kept weights, how training went, and what they cost."""
    folder, base, last = row_folder(grid, name, seed), base_folder(grid, name, seed), last_stage(name)
    began = time.perf_counter()

    def prompts(count: int) -> list:
        return ["--quick"] if grid.common.get("--quick") else ["--prompts", count]

    models = ["--models", f"sft,{last},{last}/snapshot-*"] if last in STAGES else ["--models", "sft", "--best-of", ROWS[name].flags["--best-of"]]
    asked = ["--run", ".", *models, "--seed", seed]
    asked += [word for flag in ("--device", "--dtype") if flag in grid.common for word in (flag, grid.common[flag])]
    judge = ["--reward-model", os.path.relpath(base / "judge" / "rm", folder)] if grid.judge_data else []
    program(folder, folder / "log.txt", "eval.py", *asked, *prompts(VALIDATION_PROMPTS), "--part", "validation", "--no-distances", *judge)
    validation = read_json(folder / "eval" / "report-validation.json")
    program(folder, folder / "log.txt", "eval.py", *asked, *prompts(TEST_PROMPTS), *([] if validation["world"] else judge))
    test = read_json(folder / "eval" / "report.json")
    points = {point: plain(test["rows"][point]) | cost(grid, name, seed, point) for point in test["rows"] if point.startswith(last)}
    kept = [point for point in points if point != last] or [last]  # in the order of training, or of n
    picked = {"best": last if last in points else kept[-1], "last": kept[-1]}
    for by, what in (("judge", "score_raw"), ("true", "true_reward")):
        if validation["world"] or by == "judge" and grid.judge_data:
            picked[by] = max(points, key=lambda point: validation["rows"][point][what]["mean"])
    results, made = read_json(folder / last / MANIFEST)["results"] if last in STAGES else {}, read_json(folder / MADE)
    return {
        "row": name, "seed": seed, "key": row_key(grid, name, seed), "made_with": made["made_with"], "code": made["code"], "defaults": made["defaults"],
        "setting": keyed(grid.common),
        "prompts": test["prompts"], "world": test["world"], "reward_model": read_json(base / "rm" / MANIFEST)["results"]["test"],
        "split": read_json(folder / "split" / MANIFEST)["results"], "marks": {mark: plain(test["rows"][mark]) for mark in ("sft", "chosen", "best") if mark in test["rows"]},
        "stage": {key: value for key, value in results.items() if isinstance(value, int | float)}, "course": course(folder / last / "metrics.jsonl"),
        "points": points, "picked": picked,
        "validation": {point: {key: value for key, value in plain(validation["rows"][point]).items() if key in ("score_raw", "true_reward")} for point in points},
        "time": {"shared": read_json(base / MADE)["seconds"], "train": made["seconds"], "eval": time.perf_counter() - began},
    }  # fmt: skip


def course(path: Path) -> list[dict[str, float]]:
    """How training went, from one validation to the next: those numbers of COURSE that each found, and those that are means over the steps
    before it; [] where there was no training."""
    names = [name for columns in COURSE.values() for name in columns]
    stretches, steps = [], []
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        if any(name.startswith("valid_") for name in line):
            means = {name: float(np.mean([step[name] for step in steps])) for name in names if steps and name in steps[0]}
            stretches.append({"step": line["step"]} | means | {name: line[name] for name in names if name in line})
            steps = []
        else:
            steps.append(line)
    return stretches


def plain(numbers: dict) -> dict:
    """A row of eval.py's report without intervals, which here are over seeds."""
    return {key: plain(value) if key.endswith("_by_kind") else value["mean"] if isinstance(value, dict) else value for key, value in numbers.items()}


def cost(grid: Grid, name: str, seed: int, point: str) -> dict[str, int]:
    """Pairs seen by DPO and responses sampled by PPO until this point, those of the rows that it starts from included."""
    if last_stage(name) not in STAGES:
        return {"dpo_pairs": 0, "online_samples": 0}
    made = read_json(row_folder(grid, name, seed) / last_stage(name) / MANIFEST)
    steps = int(point.rpartition("-")[2]) if "/" in point else made["results"]["step"] + 1
    start = ROWS[name].start
    before = cost(grid, start, seed, last_stage(start)) if start else {"dpo_pairs": 0, "online_samples": 0}
    mine = {"online_samples": made["flags"]["prompts_per_iteration"]} if is_ppo(name) else {"dpo_pairs": made["flags"]["batch_size"]}
    return {what: before[what] + steps * mine.get(what, 0) for what in before}
