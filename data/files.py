"""Files written whole or not at all, and their digests.

Every file that a later stage reads is written beside its place, flushed to the disk and renamed: a reader sees the old file or the new
one, never half of one.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from data.errors import CheckpointError, ResourceError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"  # of a model's folder; its weights are one file, or a list of several


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path` (folders are made); raises ResourceError where the disk refuses, and leaves no partial file."""
    raw = content.encode() if isinstance(content, str) else content
    written_whole(path, lambda file: file.write(raw))


def copy_whole(source: Path, path: Path) -> None:
    """Copies a file, however large, byte for byte; raises as above."""
    with open(source, "rb") as original:
        written_whole(path, lambda file: shutil.copyfileobj(original, file))


def written_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Has `write` fill a file beside `path` and renames that. Raises ResourceError."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise ResourceError(f"{path}: cannot be written ({error.strerror}); free space there, or write elsewhere") from error
        raise


def write_json(path: Path, value) -> None:
    """Writes `value` as indented JSON; NaN and infinity are refused, since JSON has no word for them."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises CheckpointError naming the file when it is missing, damaged, or no object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); make it again with the stage that wrote it") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged (a {type(value).__name__} where a dict should be); make or fetch it again")
    return value


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold a model's weights: one, or those that its index lists; none where there is neither."""
    folder = Path(folder)
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map from tensors to files; fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).exists():
            raise CheckpointError(f"{folder / INDEX}: lists {name!r}, which is no safetensors file of this folder; fetch the whole folder again")
    return [folder / name for name in names]


def model_digest(folder: Path) -> str:
    """What identifies a model: SHA-256 of the names and digests of its config.json, which says how the weights are used, and its weights."""
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: holds no {WEIGHTS}")
    described = [path for path in [Path(folder) / CONFIG] if path.exists()]
    return hashlib.sha256("".join(f"{path.name} {digest(path)}\n" for path in [*described, *files]).encode()).hexdigest()
