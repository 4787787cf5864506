"""Imports point down only: a room may use the rooms below it, and nothing but train.py and eval.py knows rl/."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"data": set(), "losses": set(), "model": {"data", "losses"}, "rl": {"data", "losses", "model"}}
ABOVE = {"train", "eval", "tests"}


def imported(path):
    """The first part of every module that a file imports, wherever in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_uses_only_the_rooms_below_it(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        foreign = imported(path) & (set(BELOW) | ABOVE) - {room} - BELOW[room]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_the_run_time_needs_five_packages():
    allowed = {"torch", "sentencepiece", "numpy", "safetensors", "tqdm"} | set(BELOW) | ABOVE
    for path in [*ROOT.glob("*.py"), *(path for room in BELOW for path in (ROOT / room).rglob("*.py"))]:
        plots = {"matplotlib"} if path == ROOT / "data" / "pictures.py" else set()  # inside the function that draws; see below
        foreign = imported(path) - allowed - plots - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_nothing_but_drawing_needs_matplotlib():
    top = ast.parse((ROOT / "data" / "pictures.py").read_text(encoding="utf-8")).body
    assert not any("matplotlib" in ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom))
