"""A run's folder: one folder per stage, each with a manifest that is written last.

A stage folder counts only once `manifest.json` stands in it: stage, flags, parents by digest, what was measured, and the digest of every
file. So a stage that stopped half-way is never picked up by a later one. `metrics.jsonl` has one JSON object per step; numbers that
differ between two equal runs (seconds) stand under the key "time" alone.
"""

import dataclasses
import hashlib
import json
import platform
from pathlib import Path

from data.errors import CheckpointError, ResourceError, UsageError
from data.files import digest, read_json, weight_files, weights_digest, write_json

MANIFEST = "manifest.json"  # the last file of a stage's folder
FLAGS = "flags.json"  # its first: flags and parents, which are its key


def begin_stage(folder: Path, flags: dict, parents: dict[str, Path]) -> bool:
    """Makes a stage's folder and writes its key: flags, and parents by the digest of their manifests. False where the stage is finished
    with the same key, and so need not run.

    Raises UsageError where the folder holds a finished run with another key, or an unfinished one; ResourceError where it cannot be written.
    """
    folder = Path(folder)
    key = {"flags": flags, "parents": {name: parent_key(path) for name, path in parents.items()}}
    key = json.loads(json.dumps(key))  # as it will be read back: a tuple is a list there
    way_out = "choose another --out, or remove the folder to make it anew"
    if (folder / MANIFEST).exists():
        made = read_json(folder / MANIFEST)
        differences = [
            f"{name} was {made[group].get(name)}, is {key[group].get(name)}"
            for group in key
            for name in sorted({*made[group], *key[group]})
            if identity(made[group].get(name)) != identity(key[group].get(name))
        ]
        if differences:
            raise UsageError(f"{folder}: finished with other settings ({'; '.join(differences)}); {way_out}")
        return False
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder}: holds an unfinished run; {way_out}")
    write_json(folder / FLAGS, key)
    return True


def identity(entry):
    """An entry of a key without the place where it was found: a run that was moved is still the same run."""
    return {name: value for name, value in entry.items() if name != "path"} if isinstance(entry, dict) else entry


def parent_key(folder: Path) -> dict[str, str]:
    """What identifies a parent: the digest of its manifest, or of its weights where it comes from elsewhere; and its path, to be shown.
    Raises CheckpointError where there is neither."""
    if (Path(folder) / MANIFEST).exists():
        return {"path": str(folder), "manifest": digest(Path(folder) / MANIFEST)}
    if weight_files(folder):
        return {"path": str(folder), "weights": weights_digest(folder)}
    raise CheckpointError(f"{folder}: holds neither a finished stage nor model.safetensors")


def code_version() -> str:
    """A digest of this program's source files: recorded, so that one can tell; no part of a stage's key."""
    root = Path(__file__).parent.parent
    files = sorted(p for room in ("data", "losses", "model", "rl", ".") for p in (root / room).glob("*.py"))
    return hashlib.sha256("".join(digest(p) for p in files).encode()).hexdigest()[:16]


def finish_stage(folder: Path, stage: str, results: dict) -> None:
    """Writes the manifest, which makes the folder count. `results`: numbers worth keeping."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "stage": stage,
        **read_json(folder / FLAGS),
        "results": results,
        "files": {str(p.relative_to(folder)): digest(p) for p in files},
        "versions": {"code": code_version(), "python": platform.python_version()},
    }
    write_json(folder / MANIFEST, manifest)


def open_stage(folder: Path, make_it: str, stages: tuple[str, ...] = ()) -> dict:
    """The manifest of a finished stage, its files checked against their digests.

    make_it: the command that makes this folder. Raises UsageError where the stage is missing or unfinished, CheckpointError where a file
    is missing or changed, or where the folder holds none of the expected stages.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        state = "is unfinished" if folder.exists() else "does not exist"
        raise UsageError(f"{folder}: {state}; make it with: {make_it}")
    manifest = read_json(folder / MANIFEST)
    if stages and manifest["stage"] not in stages:
        raise CheckpointError(f"{folder}: holds the stage {manifest['stage']!r} where one of {', '.join(stages)} is needed")
    for name, expected in manifest["files"].items():
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: missing, though the manifest lists it; make the stage again: {make_it}")
        if digest(folder / name) != expected:
            raise CheckpointError(f"{folder / name}: changed since it was written (digest differs); make the stage again: {make_it}")
    return manifest


class Metrics:
    """Appends one JSON object per call to a file; `None` for a path writes nothing (the other processes of a run)."""

    def __init__(self, path: Path | None):
        self.file = None
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
        """Writes one line. Floats that JSON cannot hold become null."""
        if self.file:
            clean = {k: None if isinstance(v, float) and (v != v or abs(v) == float("inf")) else v for k, v in numbers.items()}
            self.file.write(json.dumps(clean) + "\n")


def as_flags(*groups) -> dict:
    """One dict of all flags of some dataclasses, for manifests."""
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
