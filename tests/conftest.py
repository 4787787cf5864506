"""What all tests share: the repository on the import path, the way to the real data, and property tests that repeat.

Property tests draw the same examples in every run, as a function of the test. `--hypothesis-profile=anew --hypothesis-seed=N` draws others.
"""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a process that aborts says where it was
settings.register_profile("anew", deadline=None)
settings.register_profile("repeating", derandomize=True, deadline=None)
settings.load_profile("repeating")


def real_data() -> Path:
    """The folder with the real data files; skips the test where MPO_TEST_DATA does not name it, but fails it in CI."""
    folder = os.environ.get("MPO_TEST_DATA")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = "set MPO_TEST_DATA to the folder that holds hh-rlhf/ and tldr/"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    """A run of `--stage mpo` on the world advice with the smallest budgets, made once. Only to be read: tests copy it before they go on."""
    import runs

    folder = tmp_path_factory.mktemp("chain") / "run"
    output = runs.command("--stage", "mpo", "--out", folder, *runs.WORLD, *runs.TINY)
    (folder.parent / "output.txt").write_text(output)
    return folder
