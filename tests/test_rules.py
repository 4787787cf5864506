"""The tables of rules and of faults name tests that exist, and no rule goes without a test or a reason, no case without a test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RULES, FAULTS = ((ROOT / "tests" / "results" / f"{name}.md").read_text(encoding="utf-8") for name in ("rules", "faults"))
NAMED = r"`(tests/[\w/]+\.py)::(test_\w+)`"
REASON = r"no test yet: \w|does not apply: \w"


def functions_of(path):
    """Names of the functions of a file; none where there is no such file."""
    if not path.exists():
        return set()
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("text", [RULES, FAULTS], ids=["rules", "faults"])
def test_every_named_test_exists(text):
    named = set(re.findall(NAMED, text))
    assert len(named) > 100 and text.count("::") == len(re.findall(NAMED, text))  # no name is written in a way that is not checked
    missing = [f"{path}::{name}" for path, name in sorted(named) if name not in functions_of(ROOT / path)]
    assert not missing


def test_every_rule_has_a_test_or_a_reason():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in RULES.splitlines() if re.match(r"\| [A-Z]\d", line)]
    assert all(len(row) == 3 and row[1].endswith(".") for row in rows)
    numbers = {}
    for name, *_ in rows:
        numbers.setdefault(name[0], []).append(int(name[1:]))
    assert "".join(numbers) == "ABCDEFGHIJKL" and all(found == list(range(1, len(found) + 1)) for found in numbers.values())
    assert not [row[0] for row in rows if not re.search(f"{NAMED}|{REASON}", row[2])]


def test_every_fault_has_a_code_and_a_test():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in FAULTS.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 31)) and all(len(row) == 5 for row in rows)
    assert all(re.search(r"\d|killed", row[2]) and re.search(NAMED, row[4]) for row in rows)
