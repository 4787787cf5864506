"""From texts to rows of ids, and from rows to batches in an order that can be computed again.

Prompt and response are encoded separately and joined: BOS + prompt + response + EOS. A response that had to be cut loses its EOS, since
it did not end there. The order of an epoch is a function of (seed, stage, epoch), the same on every process; processes then share out
each step's rows.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.examples import Pair, shorten_prompt
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Row:
    """One prompt with one response, as ids: prompt begins with BOS; response ends with EOS unless it was cut."""

    id: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class PairRow:
    """One preference pair as ids; both rows have the same prompt ids. Its length is that of the prompt and both responses."""

    id: str
    chosen: Row
    rejected: Row

    @property
    def length(self) -> int:
        return self.chosen.length + len(self.rejected.response)


def encode_prompt(prompt: str, style: str, tokenizer: Tokenizer, max_prompt: int) -> tuple[tuple[int, ...], bool]:
    """BOS and the prompt's ids, at most max_prompt together, and whether the style's rule shortened it; () where nothing is left."""
    ids = tokenizer.encode(prompt)
    shortened = len(ids) + 1 > max_prompt
    if shortened:
        ids = tokenizer.encode(shorten_prompt(prompt, style, tokenizer.encode, max_prompt - 1))
    return ((tokenizer.bos_id, *ids) if ids else ()), shortened


def encode_response(response: str, tokenizer: Tokenizer, max_response: int) -> tuple[tuple[int, ...], bool]:
    """The response's ids with EOS, or its first max_response ids without one; and whether it was cut."""
    ids = (*tokenizer.encode_response(response), tokenizer.eos_id)
    return ids[:max_response], len(ids) > max_response


def encode_pairs(pairs: Iterable[Pair], tokenizer: Tokenizer, max_prompt: int, max_response: int) -> tuple[list[PairRow], Counter]:
    """Rows for all pairs that fit, and counts of what was cut, dropped, or became equal by cutting."""
    rows, counts = [], Counter()
    for pair in pairs:
        prompt, shortened = encode_prompt(pair.prompt, pair.style, tokenizer, max_prompt)
        if not prompt:
            counts["dropped: prompt does not fit"] += 1
            continue
        (chosen, chosen_cut), (rejected, rejected_cut) = (encode_response(t, tokenizer, max_response) for t in (pair.chosen, pair.rejected))
        counts["prompts shortened"] += shortened
        counts["responses cut"] += chosen_cut + rejected_cut
        if chosen == rejected:
            counts["dropped: responses are equal once cut"] += 1
            continue
        rows.append(PairRow(pair.id, Row(pair.id, prompt, chosen), Row(pair.id, prompt, rejected)))
    return rows, +counts


def collate(rows: Sequence[Row], pad_id: int, include_prompt: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """tokens (B, T) int64, right-padded, and response_mask (B, T) bool (True on the prompt after BOS too, if included)."""
    longest = max(row.length for row in rows)
    tokens = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for index, row in enumerate(rows):
        tokens[index, : row.length] = row.prompt + row.response
        mask[index, 1 if include_prompt else len(row.prompt) : row.length] = True
    return tokens, mask


PROMPT, CHOSEN, REJECTED, PADDING = range(4)  # parts of a packed row


def collate_pairs(pairs: Sequence[PairRow], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens (B, T) int64: prompt, chosen and rejected response one after the other, right-padded; and which part each token is of."""
    longest = max(pair.length for pair in pairs)
    tokens = np.full((len(pairs), longest), pad_id, dtype=np.int64)
    parts = np.full((len(pairs), longest), PADDING, dtype=np.int64)
    for index, pair in enumerate(pairs):
        prompt, chosen, rejected = pair.chosen.prompt, pair.chosen.response, pair.rejected.response
        tokens[index, : pair.length] = prompt + chosen + rejected
        parts[index, : pair.length] = np.repeat([PROMPT, CHOSEN, REJECTED], [len(prompt), len(chosen), len(rejected)])
    return tokens, parts


def stable_hash(*parts: object) -> int:
    """A 63-bit number that depends on the parts alone, on any machine: seeds and keys are made of it."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def epoch_order(count: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    """A permutation of range(count), a function of (seed, stage, epoch)."""
    return np.random.Generator(np.random.Philox(key=stable_hash(seed, stage, "order", epoch))).permutation(count)


def step_indices(count: int, batch_size: int, epochs: float, seed: int, stage: str) -> Iterator[np.ndarray]:
    """The row indices of each optimiser step, over whole or part epochs; an epoch's last batch may be smaller."""
    per_epoch = math.ceil(count / batch_size)
    for step in range(max(1, round(epochs * per_epoch))):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = epoch_order(count, seed, stage, epoch)
        yield order[position * batch_size : (position + 1) * batch_size]


def full_steps(count: int, size: int, steps: int, seed: int, stage: str) -> list[np.ndarray]:
    """(size,) row indices for each of `steps` steps, all full: epoch after epoch of the shuffled rows, cut without regard to epochs."""
    epochs = range(math.ceil(steps * size / count))
    stream = np.concatenate([epoch_order(count, seed, stage, epoch) for epoch in epochs])
    return list(stream[: steps * size].reshape(steps, size))


def share_out(rows: Sequence, rank: int, world_size: int, micro_batch: int) -> list[list]:
    """This process's micro-batches of one step's rows: sorted by length so that little is padding, dealt out in turn.

    Every process gets the same number of micro-batches, as FSDP needs; where rows run out, a micro-batch is empty.
    """
    by_length = sorted(rows, key=lambda row: row.length)
    mine = by_length[rank::world_size]
    rounds = math.ceil(math.ceil(len(rows) / world_size) / micro_batch)
    return [mine[i * micro_batch : (i + 1) * micro_batch] for i in range(rounds)]
