"""A preference pair in one row: the prompt once, then both responses, neither of which sees the other.

    tokens     BOS how are you ? | fine . EOS | go away EOS | pad
    parts       0   0   0   0  0 |  1   1  1  |  2   2   2  |  3
    positions   0   1   2   3  4 |  5   6  7  |  5   6   7  |  8

Both responses continue the prompt, at the same positions and with the same context as in rows of their own, so scores and
log-probabilities are those of separate rows up to rounding; the prompt, most of many a pair, is read once in place of twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data.batches import CHOSEN, PROMPT, REJECTED


class Packing(NamedTuple):
    """What `parts` (B, T) means for a decoder: positions (B, T); mask (B, 1, T, T), whether a query (row) may see a key (column);
    previous (B, T), the column whose state predicts this token."""

    positions: Tensor
    mask: Tensor
    previous: Tensor


def packing(parts: Tensor) -> Packing:
    """The layout of packed rows; parts (B, T) as `collate_pairs` makes them."""
    columns = torch.arange(parts.shape[1], device=parts.device)
    rejected = parts >= REJECTED  # with the padding after it
    positions = columns - rejected * (parts == CHOSEN).sum(dim=1, keepdim=True)
    mask = (columns[:, None] >= columns) & ((parts == PROMPT)[:, None] | (parts[:, None] == parts[:, :, None]))
    prompt_end = (parts == PROMPT).sum(dim=1, keepdim=True) - 1
    first_rejected = (parts < REJECTED).sum(dim=1, keepdim=True)
    previous = torch.where(columns == first_rejected, prompt_end, (columns - 1).clamp(min=0))
    return Packing(positions, mask[:, None], previous)


def last_column(parts: Tensor, part: int) -> Tensor:
    """Where a part of each row ends: (B,)."""
    return (parts <= part).sum(dim=1) - 1
