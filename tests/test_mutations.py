"""The list of defects (mutations.py) fits the program as it is now; under `-m slow`, every one of them is noticed."""

import ast
import shutil

import pytest
from mutations import MUTATIONS, ROOT, applied, copied, noticed


def test_every_defect_applies_once_and_leaves_a_program():
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS) > 80
    for mutation in MUTATIONS:
        ast.parse(applied(mutation, ROOT))
        assert all((ROOT / word).exists() for word in mutation.tests.split() if word.endswith(".py"))


@pytest.fixture(scope="module")
def copy():
    folder = copied()
    yield folder
    shutil.rmtree(folder.parent)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_every_defect_is_noticed(mutation, copy):
    found, line = noticed(mutation, copy)
    assert found, line
