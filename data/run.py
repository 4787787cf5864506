"""A run's folder: one folder per stage, each with a manifest that is written last.

A stage folder counts only once `manifest.json` stands in it: stage, flags, parents by digest, what was measured, and the digest of every
file. So a stage that stopped half-way is never picked up by a later one; with `--resume` it goes on from its checkpoints
(model/resume.py). One process at a time works in a folder. `metrics.jsonl` has one JSON object per step; numbers that differ between two
equal runs (seconds) stand under the key "time" alone.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from data.errors import CheckpointError, ResourceError, UsageError
from data.files import digest, model_digest, read_json, weight_files, write_json
from data.flags import typed

MANIFEST = "manifest.json"  # the last file of a stage's folder
FLAGS = "flags.json"  # its first: flags and parents, which are its key
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"  # what a training loop goes on from; removed once the stage is finished


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the file `.NAME.lock` beside `folder`, so that two processes never write there. The kernel takes the lock from a process that
    dies, however it dies, so a file that one left behind is no obstacle.

    Raises UsageError where a living process holds it, ResourceError where the place cannot be written.
    """
    path = lock_of(folder)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, "a+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    break  # else its holder ended and removed it in between
            except BlockingIOError as error:
                file.seek(0)
                raise UsageError(f"{folder}: {file.read() or 'another process'} is at work here; wait for it, or choose another --out") from error
            except OSError as error:
                raise ResourceError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        file.seek(0)
        if left := file.read():
            print(f"note: {path} was left by {left}, which is dead; it is taken over")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def lock_of(folder: Path) -> Path:
    return Path(folder).with_name(f".{Path(folder).name}.lock")


def begin_stage(folder: Path, flags: dict, parents: dict[str, Path], resume: bool = False, untyped: Collection[str] = ()) -> bool:
    """Makes a stage's folder and writes its key: flags, and parents by the digest of their manifests. False where the stage is finished
    with the same key, and so need not run.

    resume: an unfinished run with the same key is gone on with. untyped: flags that stand at their defaults; one that is newer than what lies
    there makes no other key. Raises UsageError where the folder holds an unfinished run otherwise, or a
    finished one with another key, or anything that no stage wrote; CheckpointError where the run to resume has another key; ResourceError
    where it cannot be written.
    """
    folder = Path(folder)
    key = {"flags": flags, "parents": {name: parent_key(path) for name, path in parents.items()}}
    key = json.loads(json.dumps(key))  # as it will be read back: a tuple is a list there
    way_out = "choose another --out, or remove the folder to make it anew (to keep both, do so in a copy of the run)"
    if (folder / MANIFEST).exists():
        if differences := key_differences(read_json(folder / MANIFEST), key, untyped):
            raise (CheckpointError if resume else UsageError)(f"{folder}: finished with other settings ({differences}); {way_out}")
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # of a run that died just after its last word
        return False
    if is_foreign(folder):
        raise UsageError(f"{folder}: has files, but no {FLAGS}, so no stage of this program made them; choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not resume:
            raise UsageError(f"{folder}: holds an unfinished run; add --resume to go on with it, {way_out}")
        if (folder / FLAGS).exists() and (differences := key_differences(read_json(folder / FLAGS), key, untyped)):
            raise CheckpointError(f"{folder}: was begun with other settings ({differences}); resume it with those, or choose another --out")
        clear_unfinished(folder)
    if not (folder / FLAGS).exists():
        write_json(folder / FLAGS, key)
    return True


CHANGE_NO_RESULT = {  # another value of these flags is no other stage
    "micro_batch",  # so one that ran out of memory can go on with less
    "init", "ref", "reward_model", "prompts", "file",  # places: what lies there is known by its digest, as a parent or a flag
}  # fmt: skip


def key_differences(made: dict, key: dict, untyped: Collection[str] = ()) -> str:
    """How a stage's key differs from the one that it was made with; nothing where it does not. untyped: as in `begin_stage`."""

    def difference(name: str, old, new) -> str:
        places = [entry.get("path") if isinstance(entry, dict) else entry for entry in (old, new)]
        return f"{name} {places[1]} was made anew since" if places[0] == places[1] else f"{name} was {places[0]}, is {places[1]}"

    ignored = {"flags": CHANGE_NO_RESULT | (set(untyped) - set(made["flags"])), "parents": set()}
    return "; ".join(
        difference(name, made[group].get(name), key[group].get(name))
        for group in key
        for name in sorted({*made[group], *key[group]} - ignored[group])
        if identity(made[group].get(name)) != identity(key[group].get(name))
    )


def is_foreign(folder: Path) -> bool:
    """Whether a folder has files and none of them is this program's: a stage's first is its flags, of which a kill leaves at most a half."""
    return not (folder / FLAGS).exists() and folder.is_dir() and any(not path.name.endswith(".tmp") for path in folder.iterdir())


def clear_unfinished(folder: Path) -> None:
    """Removes from an unfinished stage what cannot be gone on with: half-written files; without any checkpoint, everything."""
    if not any(any(path.glob("step-*")) for path in folder.rglob(CHECKPOINTS)):
        print(f"warning: {folder}: there is no checkpoint yet; the stage begins anew")
        shutil.rmtree(folder)
        return
    for path in [*folder.rglob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def identity(entry):
    """An entry of a key without the place where it was found: a run that was moved is still the same run."""
    return {name: value for name, value in entry.items() if name != "path"} if isinstance(entry, dict) else entry


def parent_key(folder: Path) -> dict[str, str]:
    """What identifies a parent: the digest of its manifest, or of its weights where it comes from elsewhere; and its path, to be shown.
    Raises CheckpointError where there is neither."""
    if (Path(folder) / MANIFEST).exists():
        return {"path": str(folder), "manifest": digest(Path(folder) / MANIFEST)}
    if weight_files(folder):
        return {"path": str(folder), "weights": model_digest(folder)}
    raise CheckpointError(f"{folder}: holds neither a finished stage nor model.safetensors")


def code_version() -> str:
    """A digest of this program's source files: recorded, so that one can tell; no part of a stage's key."""
    root = Path(__file__).parent.parent
    files = sorted(p for room in ("data", "losses", "model", "rl", ".") for p in (root / room).glob("*.py"))
    return hashlib.sha256("".join(digest(p) for p in files).encode()).hexdigest()[:16]


def finish_stage(folder: Path, stage: str, results: dict) -> None:
    """Writes the manifest, which makes the folder count, and removes the checkpoints. `results`: numbers worth keeping."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and CHECKPOINTS not in p.relative_to(folder).parts)
    manifest = {
        "stage": stage,
        **read_json(folder / FLAGS),
        "results": results,
        "files": {str(p.relative_to(folder)): digest(p) for p in files},
        "versions": {"code": code_version(), "python": platform.python_version()},
    }
    write_json(folder / MANIFEST, manifest)
    for path in [*folder.rglob(CHECKPOINTS)]:
        shutil.rmtree(path, ignore_errors=True)


def check_run_folder(folder: Path, flag_name: str) -> None:
    """Raises UsageError where a run's folder is wanted and the folder is that of a stage."""
    if (Path(folder) / MANIFEST).exists():
        raise UsageError(f"{flag_name} {folder}: is a stage of a run; give the run's folder, {Path(folder).parent}")


def open_stage(folder: Path, make_it: str, stages: tuple[str, ...] = ()) -> dict:
    """The manifest of a finished stage, its files checked against their digests.

    make_it: the command that makes this folder. Raises UsageError where the stage is missing or unfinished, or what it was made from has been
    made anew since, CheckpointError where a file is missing or changed, or where the folder holds none of the expected stages.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        if is_foreign(folder):
            raise UsageError(f"{folder}: holds files, but no stage of a run; give the folder of a run")
        what = f"is unfinished; go on with it: {make_it} --resume" if folder.exists() else f"does not exist; make it with: {make_it}"
        raise UsageError(f"{folder}: {what}")
    manifest = read_json(folder / MANIFEST)
    if stages and manifest["stage"] not in stages:
        raise CheckpointError(f"{folder}: holds the stage {manifest['stage']!r} where one of {', '.join(stages)} is needed")
    again = f"put it back, or remove {folder} and make the stage again: {make_it}"
    for name, expected in manifest["files"].items():
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: missing, though the manifest lists it; {again}")
        if digest(folder / name) != expected:
            raise CheckpointError(f"{folder / name}: changed since it was written (digest differs); {again}")
    check_ancestors(folder, manifest)
    return manifest


def check_ancestors(folder: Path, manifest: dict) -> None:
    """Raises UsageError where data or tokenizer that lie beside a stage are not those that it was made from, nor, for a split, the reward model;
    and so on up. With other data than a model's its training prompts would be others' test prompts. What is gone cannot be compared."""
    for name in ("rm",) if manifest["stage"] == "split" else ("tokenizer", "data"):
        made, place = manifest["parents"].get(name), folder.parent / name
        if not made or not (place / MANIFEST).exists():
            continue
        if made.get("manifest") != digest(place / MANIFEST):
            raise UsageError(
                f"{folder}: was made from another {name} than {place}, which was made anew since; remove {folder}, and what was made from it, and make"
                f" it again: {command_for(manifest['stage'], folder.parent)}"
            )
        check_ancestors(place, read_json(place / MANIFEST))


def command_for(stage: str, folder: Path, about_data: dict[str, object] | None = None) -> str:
    """What makes a stage of a run, as a shell takes it, with the flags that were typed about the run's data; --quick comes by itself where that
    was made under it."""
    made, flags = folder / "data" / MANIFEST, {"--stage": stage, "--out": folder} | (about_data or {})
    if made.exists() and read_json(made)["flags"].get("quick"):
        flags |= {"--quick": True}
    return shlex.join(["python", "train.py", *typed(flags)])


class Metrics:
    """Appends one JSON object per call to a file; `None` for a path writes nothing (the other processes of a run)."""

    def __init__(self, path: Path | None):
        self.path, self.file = path, None
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self.file = open(path, "a", buffering=1, encoding="utf-8")
            except OSError as error:
                raise ResourceError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()

    def log(self, **numbers) -> None:
        """Writes one line; raises ResourceError where the disk refuses it. Floats that JSON cannot hold become null."""
        if self.file:
            clean = {k: None if isinstance(v, float) and (v != v or abs(v) == float("inf")) else v for k, v in numbers.items()}
            try:
                self.file.write(json.dumps(clean) + "\n")
            except OSError as error:
                raise ResourceError(f"{self.path}: cannot be written ({error.strerror}); free space there, then go on with --resume") from error

    def written(self) -> bytes:
        """All lines so far."""
        return Path(self.path).read_bytes() if self.file else b""

    def go_back(self, content: bytes) -> None:
        """Makes these all the lines so far: what a checkpoint had, without the steps that are about to be taken again."""
        if self.file:
            self.file.truncate(0)
            self.file.write(content.decode())


def as_flags(*groups) -> dict:
    """One dict of all flags of some dataclasses, for manifests."""
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
