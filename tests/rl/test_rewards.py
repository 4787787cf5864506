"""Score on the last action, sums that must hold, penalty, normalisation, the adaptive coefficient: numbers by hand."""

import math

import pytest
import torch

from data.errors import NumericalError
from rl.rewards import next_kl_coef, normalise_scores, token_rewards

NAN = float("nan")


def test_scores_are_standard_deviations_and_the_penalty_is_subtracted():
    raw, ended = torch.tensor([3.0, 3.0, 1.0, -4.0]), torch.tensor([True, False, True, False])
    assert normalise_scores(raw, ended, mean=1.0, std=2.0, end_penalty=1.5).tolist() == [1.0, -0.5, 0.0, -4.0]
    assert normalise_scores(raw, ended, mean=1.0, std=2.0, end_penalty=0.0).tolist() == [1.0, 1.0, 0.0, -2.5]


# tokens   x0  x1  y0  y1  y2  .   |  x0  y0  y1  y2  y3  y4   |  x0  x1  x2  y0  .  .
MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()
KL = torch.tensor([[NAN, 1.0, -2.0, 0.5, NAN], [0.0, 0.0, 0.0, 0.0, 1.0], [1e9, NAN, 3.0, NAN, math.inf]])


def test_the_score_lies_on_the_last_action():
    """A response before padding, one that fills the row to its last slot, and one of a single token."""
    rewards = token_rewards(torch.tensor([2.0, -1.0, 0.5]), KL, MASK, kl_coef=0.1)
    expected = torch.tensor([[0, -0.1, 0.2, 1.95, 0], [0, 0, 0, 0, -1.1], [0, 0, 0.2, 0, 0]])
    assert torch.allclose(rewards, expected, atol=1e-6)


def test_rewards_sum_to_score_minus_kl_cost():
    generator = torch.Generator().manual_seed(0)
    start, length = torch.randint(0, 6, (50, 1), generator=generator), torch.randint(1, 9, (50, 1), generator=generator)
    columns = torch.arange(14)
    mask = (columns >= start) & (columns < start + length)
    kl, scores = torch.randn(50, 14, generator=generator), 3 * torch.randn(50, generator=generator)
    rewards = token_rewards(scores, kl, mask, kl_coef=0.7)
    expected = [float(score) - 0.7 * sum(float(k) for k, m in zip(row, on) if m) for score, row, on in zip(scores, kl, mask)]
    assert rewards.sum(dim=1).tolist() == pytest.approx(expected, abs=1e-5)
    assert not rewards[~mask].any()
    change = token_rewards(scores + 1, kl, mask, kl_coef=0.7) - rewards
    assert change.sum(dim=1).tolist() == pytest.approx([1] * 50, abs=1e-5)
    assert ((change.abs() > 0.5).nonzero()[:, 1] == (start + length - 1)[:, 0]).all()


def test_without_a_coefficient_only_the_score_is_left():
    assert torch.equal(token_rewards(torch.tensor([2.0]), torch.tensor([[5.0, 5.0]]), torch.tensor([[True, True]]), 0.0), torch.tensor([[0.0, 2.0]]))


@pytest.mark.parametrize(
    ("score", "kl", "mask"),
    [
        (NAN, [1.0, 1.0], [True, True]),
        (math.inf, [1.0, 1.0], [True, True]),
        (1.0, [math.inf, 1.0], [True, True]),
        (1.0, [NAN, 1.0], [True, True]),
        (1.0, [1.0, 1.0], [False, False]),  # no action: the score has no place, and must not land on padding
    ],
)
def test_rewards_that_do_not_sum_to_score_minus_kl_cost_stop_the_run(score, kl, mask):
    good = [torch.tensor([2.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([[True, True]])]
    bad = [torch.tensor([score]), torch.tensor([kl]), torch.tensor([mask])]
    token_rewards(*good, 0.1)
    with pytest.raises(NumericalError, match="score minus KL cost"):
        token_rewards(*(torch.cat(pair) for pair in zip(good, bad, strict=True)), 0.1)


@pytest.mark.parametrize(
    ("kl", "target", "responses", "expected"),
    [
        (6.0, 6.0, 100, 0.05),
        (6.6, 6.0, 100, 0.05 * 1.001),  # 10 % above its target, 100 of 10,000 responses: up by 0.1 %
        (5.4, 6.0, 100, 0.05 * 0.999),
        (60.0, 6.0, 100, 0.05 * 1.002),  # the error is cut at 20 %
        (0.0, 6.0, 100, 0.05 * 0.998),
        (-1.0, 6.0, 100, 0.05 * 0.998),
        (60.0, 6.0, 1000, 0.05 * 1.02),
        (60.0, None, 1000, 0.05),
    ],
)
def test_the_adaptive_coefficient(kl, target, responses, expected):
    assert next_kl_coef(0.05, kl, target, 10_000.0, responses) == pytest.approx(expected, rel=1e-9)
