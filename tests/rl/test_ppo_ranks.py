"""Two processes, under DDP and under FSDP2, do PPO as one does: rollouts, whitening, losses, norms, weights, and stopping."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ppo_ranks
import pytest
from safetensors.torch import load_file
from toy import ALONE

ROOT = Path(__file__).resolve().parents[2]
MODES = ("ddp", "fsdp")
CASES = tuple(ppo_ranks.CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """results.json, metrics and weights of one process in alone/, of two processes in ddp/ and fsdp/."""
    folder = tmp_path_factory.mktemp("ppo_ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "rl" / "ppo_ranks.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        ppo_ranks.everything(ALONE, folder / "alone")
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"the processes waited for one another:\n{output[-3000:]}")
    finally:
        process.terminate()
    assert process.returncode == 0, output[-3000:]
    return folder


def results(folder, mode):
    return json.loads((folder / mode / "results.json").read_text())


def lines(folder, mode, case):
    """The metric lines without time."""
    written = (folder / mode / case / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in written]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_three_rounds_have_the_losses_norms_and_metrics_of_one_process(mode, case, folder):
    expected, found = lines(folder, "alone", case), lines(folder, mode, case)
    assert len(expected) == 1 + 2 * ppo_ranks.ROUNDS  # each with a validation, and one before
    for line, other in zip(expected, found, strict=True):
        assert other == pytest.approx(line, abs=1e-5, rel=1e-5)
    rounds = [line for line in expected if "score" in line]
    assert all(line["updates"] == 4 and line["grad_norm"] > ppo_ranks.BASE.clip for line in rounds)
    assert len({line["length"] for line in rounds}) > 1 and rounds[0]["kl_ref_seq"] == 0 != rounds[2]["kl_ref_seq"]
    if case == "trunk":  # six of sixty responses: the coefficient follows the error cut at 20 %, then the error itself
        error = rounds[1]["kl_ref_seq"] / 0.25 - 1
        assert 0.01 < error < 0.2 and [line["kl_coef"] for line in rounds] == pytest.approx([0.1, 0.098, 0.098 * (1 + error / 10)], rel=1e-9)
    alone, here = (results(folder, which)[case] for which in ("alone", mode))
    assert here["best"] == pytest.approx(alone["best"], abs=1e-5, rel=1e-5) and here["kept"] == alone["kept"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_three_rounds_make_the_weights_of_one_process(mode, case, folder):
    expected, found = (load_file(folder / which / case / "weights.safetensors") for which in ("alone", mode))
    start = ppo_ranks.whole_weights(ppo_ranks.made(ALONE, ppo_ranks.CASES[case].critic)[0])
    assert expected.keys() == found.keys() == start.keys()
    for name, tensor in expected.items():
        assert (tensor - found[name]).abs().max() < 1e-5, name
        assert (tensor - start[name]).abs().max() > 1e-3, name  # twelve steps of 3e-4 at most: they were taken
    assert results(folder, mode)[case]["ranks_agree"]


@pytest.mark.parametrize("mode", MODES)
def test_every_process_samples_its_share_of_the_same_rows(mode, folder):
    expected, found = (results(folder, which)["rollout"]["tokens"] for which in ("alone", mode))
    assert found == expected and len({sum(token > 0 for token in row) for row in expected}) > 2


@pytest.mark.parametrize("mode", MODES)
def test_advantages_are_white_over_all_processes(mode, folder):
    expected, found = (results(folder, which)["rollout"] for which in ("alone", mode))
    for row, other in zip(expected["advantages"], found["advantages"], strict=True):
        assert other == pytest.approx(row, abs=1e-5)
    for each in (expected, found):
        assert each["mean"] == pytest.approx(0, abs=1e-6) and each["variance"] == pytest.approx(1, abs=1e-5)
    assert abs(found["local_mean"]) > 0.05  # one process's rows by themselves are better or worse than the whole


@pytest.mark.parametrize("mode", ("alone", *MODES))
@pytest.mark.parametrize(("what", "word"), [("score", "iteration 0: "), ("returns", "iteration 0, update 0: "), ("ratio", "first ratio is not 1")])
def test_what_is_wrong_on_one_process_stops_all_before_the_weights_change(mode, what, word, folder):
    outcome = results(folder, mode)["nan"][what]
    assert outcome["stopped"] == (1 if mode == "alone" else 2)
    assert outcome["same_weights"] and word in outcome["message"]
