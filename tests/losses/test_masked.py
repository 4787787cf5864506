"""Padding never leaks, empty means are 0, and moments of parts merge into those of the whole."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.masked import masked_moments, masked_sum, merge_moments, zero_padding

MASK = torch.tensor([[False, True, True, False], [False, False, False, False], [True, True, True, True]])
CLEAN = torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 5.0, 6.0]])
RUBBISH = [float("nan"), float("inf"), float("-inf"), 1e9, -1e9]


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_padding_leaks_neither_into_values_nor_into_gradients(rubbish):
    x = torch.where(MASK, CLEAN, rubbish).requires_grad_()
    assert masked_sum(x, MASK).tolist() == [3.0, 0.0, 18.0]
    count, mean, variance = masked_moments(x.detach(), MASK)
    assert (count.item(), mean.item()) == (6.0, 3.5)
    assert variance.item() == pytest.approx(17.5 / 6)  # 2 (2.5^2 + 1.5^2 + 0.5^2) / 6
    masked_sum(x, MASK).sum().backward()
    assert torch.equal(x.grad, MASK.float())


def test_nothing_real_gives_zero_and_not_nan():
    x, mask = torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)
    assert [moment.item() for moment in masked_moments(x, mask)] == [0, 0, 0]
    assert [moment.item() for moment in merge_moments(*torch.zeros(3, 2))] == [0, 0, 0]


def test_more_padding_changes_no_mean():
    wide, wide_mask = torch.nn.functional.pad(CLEAN, (0, 100), value=7.0), torch.nn.functional.pad(MASK, (0, 100))
    assert masked_moments(wide, wide_mask)[1].item() == masked_moments(CLEAN, MASK)[1].item()
    assert masked_moments(wide, wide_mask)[2].item() == pytest.approx(masked_moments(CLEAN, MASK)[2].item(), rel=1e-6)


def test_variance_survives_a_large_mean():
    """E[x^2] - E[x]^2 in float32 is off by whole units here."""
    x = 1e4 + torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert masked_moments(x, torch.ones(4, dtype=torch.bool))[2].item() == pytest.approx(1.25, rel=1e-6)


def test_moments_of_ragged_parts_merge_into_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(9, 7, generator=generator) * 3 + 5, torch.rand(9, 7, generator=generator) < 0.4
    mask[7:] = False  # the last part, a rank without a single real token
    parts = [masked_moments(x[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 7), slice(7, 9))]
    merged = merge_moments(*(torch.stack(moment) for moment in zip(*parts)))
    real = x[mask].double()
    expected = (len(real), real.mean().item(), real.var(unbiased=False).item())
    assert [moment.item() for moment in merged] == pytest.approx(expected, rel=1e-5)


CELLS = st.lists(st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=5, max_size=5), min_size=1, max_size=6)


@settings(max_examples=200)
@given(CELLS, st.sampled_from(RUBBISH), st.integers(0, 6))
def test_any_mask_counts_what_is_on_it_and_nothing_else(rows, rubbish, cut):
    """Against sums over lists; and in two parts, wherever they are cut."""
    x = torch.tensor([[value if real else rubbish for value, real in row] for row in rows])
    mask = torch.tensor([[real for _, real in row] for row in rows])
    sums = [math.fsum(value for value, real in row if real) for row in rows]
    everything = [value for row in rows for value, real in row if real]
    mean = statistics.fmean(everything) if everything else 0.0
    variance = statistics.pvariance(everything) if everything else 0.0
    assert masked_sum(x, mask).tolist() == pytest.approx(sums, abs=1e-3)
    parts = [masked_moments(x[some], mask[some]) for some in (slice(None, cut), slice(cut, None))]
    for moments in (masked_moments(x, mask), merge_moments(*(torch.stack(moment) for moment in zip(*parts)))):
        assert [moment.item() for moment in moments] == pytest.approx([len(everything), mean, variance], rel=1e-4, abs=1e-3)


def test_dtype_is_kept():
    assert zero_padding(CLEAN.bfloat16(), MASK).dtype == torch.bfloat16
