"""The watch over DPO: the sampled KL, the limits that end training, and the first step's numbers."""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent))
from small import ALONE, EOS, PAD, loud  # noqa: E402

from data.errors import NumericalError  # noqa: E402
from model.generate import generate, row_uniforms  # noqa: E402
from model.heads import LanguageModel  # noqa: E402
from model.watch import check_first_preference_step, limit_passed, sampled_kl  # noqa: E402

PROMPTS = [(1, 7), (1, 9, 11, 5), (1, 30, 8)] * 20
NUMBERS = {"chosen_reward": 0.0, "rejected_reward": 0.0, "loss": math.log(2)}
DPO = {"beta": 0.1, "chosen_weight": 0.0}


TEXT = SimpleNamespace(max_response=8, tokenizer=SimpleNamespace(eos_id=EOS, pad_id=PAD))


def test_a_model_is_at_no_distance_from_itself_and_the_same_seed_measures_the_same():
    model, other = loud(LanguageModel), loud(LanguageModel, seed=1)
    assert sampled_kl(model, model, PROMPTS, TEXT, 3, ALONE)["kl_ref_seq"] == 0
    assert sampled_kl(model, other, PROMPTS, TEXT, 3, ALONE) == sampled_kl(model, other, PROMPTS, TEXT, 3, ALONE)


def test_sampled_kl_is_the_mean_over_responses_of_the_sum_over_their_tokens():
    model, other = loud(LanguageModel), loud(LanguageModel, seed=1)
    found = sampled_kl(model, other, PROMPTS, TEXT, 3, ALONE)
    tokens, mask, ended = generate(model, PROMPTS, max_new_tokens=8, eos_id=EOS, pad_id=PAD, uniforms=row_uniforms(3, range(60), 8))
    total = 0.0
    for row, inside in zip(tokens, mask, strict=True):
        ids = row[: int(inside.nonzero().max()) + 1][None]  # this response alone, without padding, position by position
        with torch.no_grad():
            own, ref = (m(ids).log_softmax(-1)[0] for m in (model, other))
        total += sum(float(own[t - 1, ids[0, t]] - ref[t - 1, ids[0, t]]) for t in range(ids.shape[1]) if inside[t])
    assert found["kl_ref_seq"] == pytest.approx(total / 60, rel=1e-4) and found["kl_ref_seq"] > 1
    assert found["ended"] == pytest.approx(float(ended.float().mean()))
    assert {type(value) for value in found.values()} == {float}  # a comparison of them goes into a manifest


@pytest.mark.parametrize(("kl", "fall", "said"), [(10.1, 0.0, "max-kl 10"), (0.0, 20.1, "max-fall 20"), (10.0, 20.0, None)])
def test_either_limit_is_named(kl, fall, said):
    found = limit_passed({"kl_ref_seq": kl, "chosen_fall": fall}, 10, 20)
    assert found is None if said is None else said in found


def test_the_first_step_of_equal_models_passes():
    check_first_preference_step("dpo", DPO, ALONE, 16, NUMBERS)
    check_first_preference_step("ipo", {"beta": 1.0}, ALONE, 16, NUMBERS | {"loss": 0.25})  # whose loss is another one
    check_first_preference_step("dpo", DPO | {"chosen_weight": 1.0}, ALONE, 16, NUMBERS | {"loss": 3.0})


@pytest.mark.parametrize("wrong", [{"loss": math.log(2) + 0.01}, {"chosen_reward": 0.001}, {"rejected_reward": -0.001}])
def test_a_first_step_that_cannot_be_stops_the_run(wrong):
    with pytest.raises(NumericalError, match="dpo: the first"):
        check_first_preference_step("dpo", DPO, ALONE, 16, NUMBERS | wrong)


@pytest.mark.parametrize("beta", [1e-6, 0.1, 10.0])
def test_in_bf16_the_bound_grows_with_the_root_of_the_longest_response(beta):
    """0.1 sqrt(64) = 0.8 nats, in implicit rewards times beta."""
    half, arguments = dataclasses.replace(ALONE, dtype=torch.bfloat16), {"beta": beta, "chosen_weight": 0.0}
    check_first_preference_step("dpo", arguments, half, 64, NUMBERS | {"chosen_reward": -0.79 * beta})
    with pytest.raises(NumericalError, match="rewards are not 0"):
        check_first_preference_step("dpo", arguments, half, 64, NUMBERS | {"chosen_reward": 0.81 * beta})
    with pytest.raises(NumericalError, match="the first loss"):
        check_first_preference_step("dpo", arguments, half, 64, NUMBERS | {"loss": math.log(2) + max(0.81 * beta, 2e-3)})
