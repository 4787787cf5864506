"""Sums, means and moments over the real tokens of a padded batch.

Every tensor that the losses see is padded, and what stands in the padding is anybody's guess: a fill value, a stale score, -inf, NaN. Two
habits keep it out. First, padding is *replaced* by 0 before any arithmetic: multiplying by a mask would keep `0 * nan = nan`, and
replacing only the result would still send `0 * inf = nan` back through the chain rule. Second, we divide by the number of real tokens,
never by the number of columns.

Here `mask` is bool, True on the real entries, and has the shape of `x`. The losses return unreduced values, so the training loop needs only
`masked_sum` and the count of its whole optimiser step (over micro-batches and ranks).
"""

import torch
from torch import Tensor


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """x on the mask and 0 off it, in the value and in the gradient; same shape and dtype as x."""
    return torch.where(mask, x, 0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of each row's real entries: (B, T) -> (B,). An empty row gives 0.

    With `x` the token log-probabilities of a response this is its sequence log-probability, `seq_logp`.
    """
    return zero_padding(x, mask).sum(-1)


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and (population) variance of all real entries: three float32 scalars, all 0 where there are none.

    Two passes, because E[x^2] - E[x]^2 loses every digit when the mean is large beside the spread.
    """
    x = zero_padding(x, mask).float()
    count = mask.sum().float()
    mean = x.sum() / count.clamp(min=1)
    variance = zero_padding(x - mean, mask).square().sum() / count.clamp(min=1)
    return count, mean, variance


def merge_moments(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of a whole from those of its parts: three (R,) tensors, one entry per rank or micro-batch -> three scalars.

    Exactly what `masked_moments` of the concatenation gives: the variance inside the parts plus that of their means. Empty parts count 0.
    """
    count = counts.sum()
    weights = counts / count.clamp(min=1)
    mean = (weights * means).sum()
    variance = (weights * (variances + (means - mean).square())).sum()
    return count, mean, variance
