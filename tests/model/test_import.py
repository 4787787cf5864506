"""A checkpoint is read tensor by tensor to where it is to live: no second copy, the same numbers, the same model in half the memory."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import ALONE, CONFIG, PAD, SPECIAL, loud, ragged_pairs, ragged_rows

from model.checkpoint import load_model, open_model, save_model
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel
from model.parallel import distribute
from model.score import reference_logps, reward_scores

HERE = Path(__file__).resolve().parent
BF16 = replace(ALONE, dtype=torch.bfloat16)


def run(*args):
    command = [sys.executable, HERE / "import_memory.py", *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}, timeout=600).stdout


@pytest.mark.parametrize("size", ["base", pytest.param("1b", marks=pytest.mark.slow)])
def test_importing_needs_no_second_copy(size, tmp_path):
    """134M parameters are 268 MB, 1B are 2.2 GB in bf16; at most 30 % more in anonymous memory, of which the fp32 embedding is a part."""
    run("make", tmp_path / "model", size)
    weights, before, most, after, held = map(int, run("import", tmp_path / "model").split())
    assert weights == pytest.approx({"base": 2.7e8, "1b": 2.2e9}[size], rel=0.05)
    assert most - before < 1.3 * weights + 2**25
    assert most < 1.3 * weights + 2**30  # the process as a whole
    assert after - before == pytest.approx(held, rel=0.1)


def test_an_opened_model_is_not_read_and_filling_gives_every_bit(tmp_path):
    for kind, tied in ((LanguageModel, False), (LanguageModel, True), (ScalarModel, False)):
        made = loud(kind, replace(CONFIG, tied=tied))
        save_model(made, tmp_path, special_ids=SPECIAL, is_main=True)
        opened = open_model(tmp_path, kind)
        assert all(parameter.is_meta for parameter in opened.parameters())
        placed = distribute(opened, ALONE)
        assert not any(parameter.is_meta for parameter in placed.parameters()) and not hasattr(placed, "read")
        assert all(torch.equal(value, placed.state_dict()[name]) for name, value in made.state_dict().items())
        assert len(list(placed.parameters())) == len(list(made.parameters()))  # tied ones are still one


def test_a_whole_of_several_parts_is_filled_from_several_folders(tmp_path):
    for name, kind, seed in (("policy", LanguageModel, 1), ("reward", ScalarModel, 2)):
        save_model(loud(kind, seed=seed), tmp_path / name, special_ids=SPECIAL, is_main=True)
    whole = PolicyWithCritic(open_model(tmp_path / "policy", LanguageModel), open_model(tmp_path / "reward", ScalarModel))
    whole = distribute(whole, ALONE)
    for part, kind, seed in ((whole.policy, LanguageModel, 1), (whole.critic, ScalarModel, 2)):
        assert all(torch.equal(value, part.state_dict()[name]) for name, value in loud(kind, seed=seed).state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_model_in_bf16_says_the_same_in_half_the_memory(tied, tmp_path):
    """Bit for bit what autocast says over fp32 weights, so a policy and its reference start as one."""
    config = replace(CONFIG, tied=tied)
    for kind in (LanguageModel, ScalarModel):
        save_model(loud(kind, config), tmp_path, special_ids=SPECIAL, is_main=True)
        whole, half = distribute(load_model(tmp_path, kind), BF16), distribute(open_model(tmp_path, kind), BF16, frozen=True)
        types = {name: value.dtype for name, value in half.state_dict().items()}
        assert types["trunk.layers.0.attention.qkv.weight"] == torch.bfloat16
        assert types["trunk.embedding.weight"] == types["trunk.norm.weight"] == torch.float32
        if kind is LanguageModel:
            assert types["lm_head.weight"] == (torch.float32 if tied else torch.bfloat16)
            one, other = (reference_logps(model, ragged_pairs(9), PAD, BF16) for model in (whole, half))
        else:
            assert types["score.weight"] == torch.float32
            one, other = (reward_scores(model, ragged_rows(9), PAD, BF16) for model in (whole, half))
        assert (one == other).all()
