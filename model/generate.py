"""Batched sampling with a cache. It knows token ids, not text.

Which token a row draws depends on the model, the row's prompt and the row's own random numbers only: one uniform number per token,
drawn from (seed, key of the row) and put through the inverse of the cumulative distribution. So a response does not change with the
batch it is in, with the number of processes, or after a resume, but where rounding moves the border of two tokens across its number (one in
hundreds). There is no top-k and no top-p: what is sampled from is exactly the distribution whose log-probabilities PPO uses.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.cache import Cache


class Responses(NamedTuple):
    """Rows in the training layout: tokens (B, T) right-padded prompts and responses, response_mask (B, T) True on response tokens
    including the end token, ended (B,) whether the end token came before the length limit."""

    tokens: Tensor
    response_mask: Tensor
    ended: Tensor


def row_uniforms(seed: int, keys: Sequence[int], count: int) -> np.ndarray:
    """(len(keys), count) float64 numbers in [0, 1); row i is a function of (seed, keys[i]) alone, longer rows extend shorter ones."""
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, key])).random(count) for key in keys])


def draw(logits: Tensor, uniforms: Tensor | None, temperature: float) -> Tensor:
    """Token ids (B,) from logits (B, V): the largest one without uniforms, else the first whose cumulative probability exceeds
    uniforms (B,). Probabilities of zero are never drawn: cumulative sums are in float64 and scaled by their own total."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    cumulative = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    uniforms: np.ndarray | None = None,
    temperature: float = 1.0,
    any_rank: Callable[[bool], bool] = bool,
) -> Responses:
    """Continues each prompt until the end token or for max_new_tokens.

    prompts: B lists of ids, none empty; uniforms (B, max_new_tokens) from `row_uniforms`, None for greedy decoding.
    any_rank says whether a statement holds on any process; under FSDP all must make the same number of forwards, so a process whose
    rows have all ended goes on with one of them, and drops what it yields.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    tokens = torch.full((len(prompts), width + max_new_tokens), pad_id, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    numbers = None if uniforms is None else torch.from_numpy(uniforms).to(device)
    response_lengths = torch.zeros_like(lengths)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    cache = Cache(lengths, width + max_new_tokens)
    logits = model(tokens[:, :width], cache=cache)
    live = torch.arange(len(prompts), device=device)  # batch row -> row of `tokens`
    for step in range(max_new_tokens):
        chosen = draw(logits, None if numbers is None else numbers[live, step], temperature)
        going = ~ended[live]
        rows = live[going]
        tokens[rows, lengths[rows] + step] = chosen[going]
        response_lengths[rows] += 1
        ended[rows] = chosen[going] == eos_id
        going = ~ended[live]
        alive = int(going.sum())
        if step + 1 == max_new_tokens or not any_rank(alive > 0):
            break
        if alive <= len(live) // 2:  # copying the cache pays once half of its rows have ended
            kept = going.nonzero().squeeze(-1) if alive else torch.zeros(1, dtype=torch.long, device=device)
            cache.keep(kept)
            live, chosen = live[kept], chosen[kept]
        logits = model(chosen[:, None], cache=cache)

    columns = torch.arange(tokens.shape[1], device=device)
    response_mask = (columns >= lengths[:, None]) & (columns < (lengths + response_lengths)[:, None])
    longest = int((lengths + response_lengths).max())
    return Responses(tokens[:, :longest], response_mask[:, :longest], ended)
