"""Checkpoints of a training loop: what it takes to go on after any interruption as if there had been none.

Randomness is a function of (seed, stage, step, row), so a loop's whole state is its weights, the optimiser's moments, the number of steps
taken, and a few numbers (the best validation, patience, the adaptive KL coefficient). A checkpoint is a folder:

    checkpoints/step-00000100/
        weights.safetensors optimiser.safetensors    whole tensors by parameter name, whatever the number of processes (large: several files)
        state.json                                   step, the loop's numbers, digests of the snapshots so far, versions
        metrics.jsonl best/                          the lines so far, and the weights that were kept as best
        checkpoint.json                              size and SHA-256 of every other file; written last

It is written beside its place, flushed, and renamed as a whole; older ones go only after that. Its name says how many steps were taken.
While one is written or read, no process holds more of its tensors than one file's.
Nothing in it is a pickle, and no file that checkpoint.json does not list is ever opened.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from data.errors import CheckpointError, Interrupted, NumericalError, ResourceError
from data.files import atomic_write, digest, read_json, write_json
from data.flags import flag
from data.run import CHECKPOINTS, METRICS, Metrics, code_version
from model.checkpoint import in_files, mapped
from model.parallel import World, bare, whole

LISTING, STATE, TENSORS = "checkpoint.json", "state.json", ("weights", "optimiser")
PIECE = 2**30  # bytes of tensors in one file, and so in memory while a checkpoint is written
BEST = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*")  # what keep("") writes, and beside it in critic/


@dataclass(frozen=True)
class LoopFlags:
    """Flags of a training loop that change none of its numbers."""

    save_every: int | None = flag(None, "steps (ppo: rounds) from checkpoint to checkpoint; 0: none but on a signal (default: 100; ppo: 10)")
    keep: int = flag(2, "checkpoints that are kept, the newest; with 2 there is one to fall back to", positive=True)
    profile: bool = flag(False, "say at the end where the time went, phase by phase")


# ---- a checkpoint on disk


def write_checkpoint(home: Path, step: int, contents: dict[str, bytes | Path | Callable[[], bytes]], most: int, size: int | None = None) -> Path:
    """Writes the files of `contents` (name -> bytes, a file that has them, or what gathers them when it is their turn) as `home`/step-STEP;
    then removes all but the newest `most`, and any of later steps. size: of all, to be told where the disk refuses; needed where not all are bytes.

    Raises ResourceError there, with the older checkpoints as they were and nothing half-written left.
    """
    beside, place = home / f".step-{step:08d}.tmp", home / f"step-{step:08d}"
    listing, files = {}, iter(contents.items())
    try:
        for name, content in files:
            listing[name] = write_listed(beside / name, content)
        write_json(beside / LISTING, listing)
        for folder in [beside, *(path for path in beside.rglob("*") if path.is_dir())]:
            flush_folder(folder)
        if place.exists():  # a damaged one of the same step, which this run fell back from
            discard(place)
        os.rename(beside, place)
        flush_folder(home)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError | ResourceError):
            for content in [content for _, content in files if callable(content)]:
                content()  # other processes gather these tensors with this one, and would wait for it
            size = sum(map(len, contents.values())) if size is None else size
            raise ResourceError(f"{error}; this checkpoint takes {size:,} bytes, {free_bytes(home):,} are free") from error
        raise
    there = checkpoints(home)
    for other in there:
        if other > place or other not in [path for path in there if path <= place][-most:]:
            discard(other)
    return place


def write_listed(path: Path, content: bytes | Path | Callable[[], bytes]) -> dict:
    """Writes a file of a checkpoint; its line in the listing."""
    raw = content() if callable(content) else content.read_bytes() if isinstance(content, Path) else content
    atomic_write(path, raw)
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def flush_folder(folder: Path) -> None:
    """Makes names that were made in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(place: Path) -> None:
    """Removes a checkpoint, under another name, so that half of it never passes for one; what cannot be removed stays, and does no harm."""
    going = place.with_name(f".{place.name}.old.tmp")
    with contextlib.suppress(OSError):
        os.rename(place, going)
    shutil.rmtree(going, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Space that is left where `folder` lies or will lie."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def checkpoints(home: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted(path for path in home.glob("step-*") if path.is_dir())


def faults(place: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; nothing where it is whole."""
    try:
        listing = read_json(place / LISTING)
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listing.items()}
    except CheckpointError as error:
        return [str(error)]
    except (AttributeError, KeyError, TypeError):
        return [f"{place / LISTING}: damaged"]
    found = {str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir()} - {LISTING}
    wrong = [f"{place / name}: not part of the checkpoint" for name in sorted(found - set(expected))]
    for name, (size, sha256) in expected.items():
        if name not in found:
            wrong.append(f"{place / name}: missing")
            continue
        actual, there = digest(place / name), (place / name).stat().st_size
        others = [other for other, (_, known) in expected.items() if known == actual and other != name]
        if actual == sha256:
            continue
        if others:
            wrong.append(f"{place / name}: holds what belongs into {others[0]}")
        elif there != size:
            wrong.append(f"{place / name}: {f'truncated to {there}' if there < size else f'grown to {there}'} bytes, should have {size}")
        else:
            wrong.append(f"{place / name}: changed since it was written (digest {actual[:12]}, should be {sha256[:12]})")
    return wrong


# ---- weights and moments, to bytes and back


def training_files(model: nn.Module, optimiser: torch.optim.Optimizer, is_main: bool) -> dict[str, Callable[[], bytes]]:
    """File -> what gathers its tensors, weights or optimiser state, and gives them as safetensors on the main process: a collective call where
    they are sharded, which every process must make, file after file."""
    named = dict(bare(model).named_parameters())
    moments = {f"{name}.{what}": value for name, p in named.items() for what, value in optimiser.state.get(p, {}).items()}

    def gather(tensors: dict[str, Tensor], names: list[str]) -> bytes:
        gathered = {}
        for name in names:
            tensor = whole(tensors[name].detach())
            gathered |= {name: tensor.cpu()} if is_main else {}
        return save(gathered) if is_main else b""

    both = zip(TENSORS, (named, moments), strict=True)
    return {file: partial(gather, tensors, names) for stem, tensors in both for file, names in in_files(stem, tensors, PIECE).items()}


@torch.no_grad()
def put_training_state(model: nn.Module, optimiser: torch.optim.Optimizer, place: Path) -> None:
    """Fills model and optimiser from a checkpoint, tensor by tensor, each process its shard. Raises CheckpointError, nothing changed, where
    names or shapes do not fit."""
    weights, moments = (mapped(sorted(place.glob(f"{stem}*.safetensors"))) for stem in TENSORS)
    named = dict(bare(model).named_parameters())
    problems = [f"{name} is in one of them alone" for name in sorted(set(named) ^ set(weights))]
    shapes = {name: tuple(weights[name].get_slice(name).get_shape()) for name in named if name in weights}
    problems += [f"{name} has shape {shape}" for name, shape in shapes.items() if shape != tuple(named[name].shape)]
    if problems:
        raise CheckpointError(f"{place}: checkpoint and model do not fit: {'; '.join(problems[:5])}")
    for name, parameter in named.items():
        parameter.copy_(sharded_like(parameter, weights[name].get_tensor(name)))
        keys = {what: f"{name}.{what}" for what in ("step", "exp_avg", "exp_avg_sq")}
        state = {what: moments[key].get_tensor(key) for what, key in keys.items() if key in moments}
        if state:
            optimiser.state[parameter] = {
                what: value.to(parameter.device) if value.dim() == 0 and what == "step" else sharded_like(parameter, value)
                for what, value in state.items()
            }


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor on the parameter's device, cut as the parameter is."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor  # here, since it takes a second that most runs need not spend

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


# ---- what a training loop calls


@dataclass
class Saving:
    """How one training loop saves itself, goes on, heeds signals, and tells of numbers gone wrong. Without a folder it does none of it.

    folder: of the loop, a stage's or a fold's in it; most: checkpoints to keep; describe: row -> what to show of it, with its texts.
    """

    folder: Path | None = None
    world: World | None = None
    every: int = 0
    most: int = 2
    failures: Path | None = None
    describe: Callable[[object], dict] = lambda row: {"id": row.id}
    signal: int = 0  # the first that came
    snapshots: dict[str, str] = field(default_factory=dict)  # file -> digest, of the snapshots so far

    def restore(self, model: nn.Module, optimiser: torch.optim.Optimizer, metrics: Metrics) -> dict:
        """The loop's state as `save` was given it, with model, optimiser, metrics and kept files as they were then; {} at the start.

        There are checkpoints only where `begin_stage` lets a run go on. Falls back to an older one where the newest is damaged, and says
        so; raises CheckpointError where none is whole, ResourceError where the disk has too little room for what is to come.
        """
        if self.folder is None:
            return {}
        step, broken = self.newest_whole() if self.world.is_main else (0, 0)
        step, broken = map(int, self.world.total([step, broken]))
        if broken:
            raise CheckpointError(f"{self.folder / CHECKPOINTS}: no checkpoint is whole; remove {self.folder} to make the stage anew")
        if step < 0:
            self.check_space(sum(p.numel() for p in model.parameters()))
            self.go_back_to(None, metrics, {})
            return {}
        place = self.folder / CHECKPOINTS / f"step-{step:08d}"
        state = read_json(place / STATE)
        if not state["finished"]:
            put_training_state(model, optimiser, place)
        self.go_back_to(place, metrics, state["snapshots"])
        if self.world.is_main:
            if state["versions"] != versions():
                print(f"warning: {place}: made by {state['versions']}, this is {versions()}; the result may differ, in its last bits or by what was changed")
            print(f"  resumed from {place}" + (", the end of this training" if state["finished"] else ""))
        return state

    def newest_whole(self) -> tuple[int, int]:
        """Steps of the newest checkpoint without faults, -1 where there is none at all; and whether there are some, but all damaged."""
        there = checkpoints(self.folder / CHECKPOINTS)
        for place in reversed(there):
            wrong = faults(place)
            if not wrong:
                return int(place.name.removeprefix("step-")), 0
            print(f"WARNING: {place} IS DAMAGED AND NOT USED, steps since the one before it are taken again: {'; '.join(wrong)}", file=sys.stderr)
        return -1, int(bool(there))

    def go_back_to(self, place: Path | None, metrics: Metrics, snapshots: dict[str, str]) -> None:
        """The loop's folder as it was when the checkpoint was made, or at the start: later snapshots and lines are made again."""
        if not self.world.is_main:
            return
        lost = {name for name, sha256 in snapshots.items() if not same_file(self.folder / name, sha256)}
        if lost:
            print(f"WARNING: MISSING OR CHANGED, AND LEFT OUT: {', '.join(str(self.folder / name) for name in sorted(lost))}", file=sys.stderr)
        gone = {name.split("/")[0] for name in lost}
        self.snapshots = {name: sha256 for name, sha256 in snapshots.items() if name.split("/")[0] not in gone}
        for path in self.folder.glob("snapshot-*"):
            if path.name not in {name.split("/")[0] for name in self.snapshots}:
                shutil.rmtree(path)
        metrics.go_back((place / METRICS).read_bytes() if place else b"")
        for path in (place / "best").rglob("*") if place else ():
            if path.is_file():
                atomic_write(self.folder / path.relative_to(place / "best"), path.read_bytes())

    def check_space(self, parameters: int) -> None:
        """Raises ResourceError where the disk is sure to be full before the loop ends."""
        held = (self.most + 1) * 16 * parameters if self.every else 0  # weights, two moments and the best weights, in fp32
        needed, free = held + 8 * parameters, free_bytes(self.folder)
        if free < needed:
            raise ResourceError(
                f"{self.folder}: {free:,} bytes are free, {needed:,} are needed for {parameters:,} parameters, {self.most} checkpoints and"
                " one being written; free space, choose another --out, or ask for less: --keep 1, --save-every 0, --no-snapshots"
            )

    def after(self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, metrics: Metrics, *, finished: bool, **state) -> None:
        """To be called when `step` steps are taken: saves where it is time to, or a signal came; raises Interrupted in the latter case.

        state: the loop's own numbers, as `restore` gives them back. finished: the loop ends here.
        """
        if self.folder is None:
            return
        if self.world.is_main and not metrics.path.exists():
            raise ResourceError(f"{self.folder}: has vanished; the weights of step {step} cannot be kept there")
        signals = np.zeros(self.world.size)
        signals[self.world.rank] = self.signal
        came = int(self.world.total(signals).max())
        if came or self.every and (finished or step % self.every == 0):
            files = {} if finished else training_files(model, optimiser, self.world.is_main)  # what is finished will take no further step
            size = 0 if finished else 16 * sum(p.numel() for p in model.parameters())
            self.save(step, files, size, metrics, state | {"finished": finished})
        if came:
            name, place = signal.Signals(came).name, self.folder / CHECKPOINTS / f"step-{step:08d}"
            error = Interrupted(f"{name}: stopped after {step} steps, which are saved in {place}; go on with --resume")
            error.code = 128 + came
            raise error

    def save(self, step: int, files: dict[str, Callable[[], bytes]], size: int, metrics: Metrics, state: dict) -> None:
        """Writes a checkpoint on the main process, for which all of them gather."""
        if not self.world.is_main:
            for gather in files.values():
                gather()
            return
        for path in sorted(self.folder.glob("snapshot-*/**/*")):
            name = str(path.relative_to(self.folder))
            if path.is_file() and name not in self.snapshots:
                self.snapshots[name] = digest(path)
        described = {"step": step, **state, "snapshots": self.snapshots, "versions": versions()}
        contents = files | {STATE: json.dumps(described, indent=2, allow_nan=False).encode(), METRICS: metrics.written()}
        best = sorted(path for pattern in BEST for where in ("", "critic/") for path in self.folder.glob(where + pattern))
        contents |= {f"best/{path.relative_to(self.folder)}": path for path in best}
        write_checkpoint(self.folder / CHECKPOINTS, step, contents, self.most, size)

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C are noted, for `after` to act on; a second one, more than a second later, ends the process at once. (torchrun
        passes on a Ctrl-C that its processes have had already.) An error inside is followed by where the last checkpoint is: in here, since
        the SIGTERM that torchrun sends to those whose peer has died may come before they have told of it."""
        came = 0.0

        def note(number: int, _) -> None:
            nonlocal came
            if self.signal and time.monotonic() - came > 1.0:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            if not self.signal:
                self.signal, came = number, time.monotonic()
                print(f"\n{signal.Signals(number).name}: this step is finished and saved first; a second one ends at once", file=sys.stderr)

        before = {} if self.folder is None else {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except BaseException:
            if self.folder and (there := checkpoints(self.folder / CHECKPOINTS)):
                print(f"the last checkpoint is {there[-1]}; --resume goes on from the last good one", file=sys.stderr)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def not_finite(self, where: str, what: str, rows: Sequence, world: World) -> NumericalError:
        """An error that names stage and step, the numbers, the processes with suspects among their rows, and those rows, whose texts go to
        a file. Every process calls it, with the suspects among its own rows."""
        everyone = np.zeros(world.size)
        everyone[world.rank] = len(rows)
        ranks = ", ".join(map(str, np.flatnonzero(world.total(everyone))))
        shown = ", ".join(str(row.id) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
        rows_and_texts = f"rows {shown}{self.dump(where, rows, world)}" if rows else "this process has other rows"
        return NumericalError(f"{where}: {what} is not finite on rank {ranks or 'unknown'}; {rows_and_texts}; the weights are as they were")

    def dump(self, where: str, rows: Sequence, world: World) -> str:
        """Writes rows with their texts to DIR/failures; what to say of it."""
        if self.failures is None:
            return ""
        name = "-".join("".join(c if c.isalnum() else " " for c in where).split())
        path = self.failures / f"{name}-rank-{world.rank}.jsonl"
        atomic_write(path, "".join(json.dumps(self.describe(row), ensure_ascii=False) + "\n" for row in rows))
        return f", with their texts in {path}"


def same_file(path: Path, sha256: str) -> bool:
    return path.is_file() and digest(path) == sha256


def versions() -> dict[str, str]:
    return {"code": code_version(), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
