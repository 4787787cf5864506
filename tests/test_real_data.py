"""The chain on the real files: HH-RLHF's harmless-base test split and about a thousand TL;DR comparisons."""

import gzip
import itertools
import json
import re

import pytest
from runs import STAGES, TINY, command, here, manifest

from data.prepare import load_pairs
from tests.conftest import real_data

FILES = {"hh": "hh-rlhf/harmless-base-test.jsonl.gz", "tldr": "tldr/judged-comparisons.jsonl.gz"}
SHORT = ("--max-prompt", 64, "--max-response", 24)


@pytest.mark.parametrize("kind", FILES)
def test_the_chain_on_some_real_rows(tmp_path, kind):
    """150 rows of each: all stages, and a comparison that knows no true reward."""
    with gzip.open(real_data() / FILES[kind], "rt", encoding="utf-8") as file:
        (tmp_path / "some.jsonl").write_text("".join(itertools.islice(file, 150)), encoding="utf-8")
    run = tmp_path / "run"
    output = here("--stage", "mpo", "--out", run, "--data", f"{kind}:{tmp_path / 'some.jsonl'}", *SHORT, *TINY)
    assert all(manifest(run / stage)["stage"] == stage for stage in STAGES)
    results = manifest(run / "data")["results"]
    assert sum(results["pairs"].values()) + sum(results["left_out"].values()) == 150
    shown = (run / "eval" / "report.md").read_text()
    assert "wins against SFT" in shown and shown in output.replace("\r", "") and "true reward" not in shown
    longest = max(len(pair.prompt) for pair in load_pairs(run / "data", "train"))
    assert longest > 1000 and re.search(r"\d+ prompts shortened", output)  # real prompts do not fit 64 tokens, and that is said


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_the_quick_chain_on_a_whole_file(tmp_path, kind):
    """All rows are read, and counted where they are left out; --quick goes on with the first 400."""
    run = tmp_path / "run"
    output = command("--stage", "mpo", "--quick", "--out", run, "--data", f"{kind}:{real_data() / FILES[kind]}", timeout=900)
    report = json.loads((run / "eval" / "report.json").read_text())
    assert "next: python eval.py" in output and report
    results = manifest(run / "data")["results"]
    assert sum(results["pairs"].values()) == 400 and sum(results["left_out"].values()) == {"hh": 5 + 4, "tldr": 0}[kind]
