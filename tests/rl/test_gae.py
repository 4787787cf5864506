"""Advantages: worked numbers, the definition as a double sum, row ends, padding, whitening."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.masked import masked_moments, merge_moments
from rl.gae import gae, whiten

REWARDS, VALUES = [-0.1, -0.1, -0.1, 1.0], [0.2, 0.3, 0.4, 0.5]
NAN = float("nan")


def laid_out(responses, width, rubbish=NAN):
    """(prompt length, rewards, values, value after the end) per row -> rewards, values and mask in the common layout, rubbish elsewhere."""
    rewards, values = torch.full((len(responses), width - 1), rubbish), torch.full((len(responses), width), rubbish)
    mask = torch.zeros(len(responses), width - 1, dtype=torch.bool)
    for row, (prompt, of_row, values_of_row, after) in enumerate(responses):
        first, last = prompt - 1, prompt - 1 + len(of_row)  # token `prompt` is chosen in column prompt - 1
        rewards[row, first:last] = torch.tensor(of_row)
        values[row, first : last + 1] = torch.tensor([*values_of_row, after])
        mask[row, first:last] = True
    return rewards, values, mask


def by_definition(rewards, values, after, discount, gae_lambda):
    """A_t = sum_k (discount lambda)^k delta_{t+k}, on lists: equation 16 as it stands."""
    values = [*values, after]
    deltas = [reward + discount * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((discount * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(
    ("bootstrap", "expected"), [(False, [0.42869, 0.45125, 0.475, 0.5]), (True, [0.94311, 0.99275, 1.045, 1.1])]
)
def test_worked_numbers_wherever_the_response_lies(bootstrap, expected, prompt, padding):
    width = prompt + 4 + padding
    rewards, values, mask = laid_out([(prompt, REWARDS, VALUES, 0.6)], width)
    advantages, returns = gae(rewards, values, mask, torch.tensor([bootstrap]), discount=1.0, gae_lambda=0.95)
    assert advantages.shape == returns.shape == (1, width - 1)
    assert advantages[mask].tolist() == pytest.approx(expected, abs=1e-5)
    assert returns[mask].tolist() == pytest.approx([a + v for a, v in zip(expected, VALUES)], abs=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


number = st.floats(-2, 2, width=32)
responses = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.tuples(number, number), min_size=0, max_size=6), number, st.booleans()), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(responses, st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_recursion_equals_the_definition(rows, discount, gae_lambda, padding):
    """Against the double sum: prompts of different lengths, ragged (also empty) responses, NaN wherever nothing should be read."""
    rows = [(prompt, [r for r, _ in steps], [v for _, v in steps], after, cut) for prompt, steps, after, cut in rows]
    width = max(prompt + len(rewards) for prompt, rewards, *_ in rows) + padding + 1
    # The value after the last token exists, but is read only for a cut response.
    rewards, values, mask = laid_out([(*row[:3], row[3] if row[4] else NAN) for row in rows], width)
    advantages, returns = gae(rewards, values, mask, torch.tensor([row[4] for row in rows]), discount, gae_lambda)
    for row, (_, of_row, values_of_row, after, cut) in enumerate(rows):
        expected = by_definition(of_row, values_of_row, after if cut else 0.0, discount, gae_lambda)
        assert advantages[row, mask[row]].tolist() == pytest.approx(expected, abs=1e-4)
        assert returns[row, mask[row]].tolist() == pytest.approx([a + v for a, v in zip(expected, values_of_row)], abs=1e-4)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_lambda_one_gives_the_reward_to_go_and_lambda_zero_the_surprise():
    rewards, values, mask = laid_out([(2, REWARDS, VALUES, NAN)], width=6)
    ended = torch.tensor([False])
    _, returns = gae(rewards, values, mask, ended, discount=1.0, gae_lambda=1.0)
    assert returns[mask].tolist() == pytest.approx([0.7, 0.8, 0.9, 1.0])
    advantages, _ = gae(rewards, values, mask, ended, discount=0.9, gae_lambda=0.0)
    assert advantages[mask].tolist() == pytest.approx([-0.1 + 0.27 - 0.2, -0.1 + 0.36 - 0.3, -0.1 + 0.45 - 0.4, 1.0 - 0.5])


def test_the_score_reaches_the_first_return_undiminished():
    """Discount and lambda 1: one more point of score is one more point of return at every token of its row, and of no other row."""
    rewards, values, mask = laid_out([(1, REWARDS, VALUES, NAN), (3, REWARDS[:2], VALUES[:2], NAN)], width=6)
    raised = rewards.clone()
    raised[0, 3] += 1
    ended = torch.tensor([False, False])
    change = gae(raised, values, mask, ended, 1.0, 1.0)[1] - gae(rewards, values, mask, ended, 1.0, 1.0)[1]
    assert change[0, :4].tolist() == pytest.approx([1, 1, 1, 1]) and not change[1].any()


def test_rewards_outside_the_response_are_not_earned_and_nothing_carries_gradient():
    rewards, values, mask = laid_out([(2, REWARDS, VALUES, 0.0), (1, [], [], 0.0)], width=8, rubbish=1e9)
    advantages, returns = gae(rewards, values.requires_grad_(), mask, torch.tensor([False, True]))
    assert advantages[0, mask[0]].tolist() == pytest.approx([0.42869, 0.45125, 0.475, 0.5], abs=1e-5)
    assert not advantages[1].any() and not returns[1].any()
    assert not advantages.requires_grad and not returns.requires_grad


# Whitening


def test_whitened_advantages_have_mean_0_and_variance_1_on_the_mask_and_are_0_off_it():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 20, generator=generator) < 0.5
    advantages = torch.where(mask, 3 + 2 * torch.randn(8, 20, generator=generator), NAN)
    white = whiten(advantages, mask, masked_moments(advantages, mask))
    assert abs(white[mask].mean()) < 1e-6 and white[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert not white[~mask].any()


def test_whitening_uses_the_moments_of_the_whole_batch_however_it_is_cut():
    """Two ranks, one with the good responses and one with the bad: by its own moments each would call half of its tokens bad."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    ranks = [torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[-1.0, -2.0, -3.0, -4.0]])]
    moments = merge_moments(*(torch.stack(m) for m in zip(*(masked_moments(rank, mask) for rank in ranks))))
    white = [whiten(rank, mask, moments) for rank in ranks]
    assert white[0][0].tolist() == pytest.approx([x / math.sqrt(7.5) for x in (1, 2, 3, 4)])
    assert torch.equal(white[1], -white[0])


def test_equal_advantages_become_zeros_and_an_outlier_does_not_blow_up():
    mask = torch.ones(1, 8, dtype=torch.bool)
    constant = torch.full((1, 8), 0.95)
    assert whiten(constant, mask, masked_moments(constant, mask)).abs().max() < 1e-2
    noise = 0.95 + 1e-7 * torch.arange(8)[None]
    assert whiten(noise, mask, masked_moments(noise, mask)).abs().max() < 1e-2
    outlier = torch.tensor([[0.0] + 7 * [0.95]])
    assert whiten(outlier, mask, masked_moments(outlier, mask))[0].tolist() == pytest.approx([-math.sqrt(7)] + 7 * [1 / math.sqrt(7)], abs=1e-5)
