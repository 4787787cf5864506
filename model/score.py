"""Frozen models read rows: log-probabilities under a reference, scores under a reward model.

Rows are shared out over processes, sorted by length so that little of a batch is padding, and come back in the order they were given.
A reference's log-probabilities are computed once and kept in a file named by everything that changes them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import Row, collate
from data.errors import CheckpointError
from data.files import read_json, write_json
from losses.kl import exact_kl
from model.heads import LanguageModel
from model.parallel import World

LOGITS = 2**22  # numbers in one of the (positions, V) tensors that exist at a time while a KL is computed


def to_tensors(rows: Sequence[Row], pad_id: int, device: torch.device, include_prompt: bool = False) -> tuple[Tensor, Tensor]:
    """tokens (B, T) and response_mask (B, T) of some rows on the device."""
    tokens, mask = collate(rows, pad_id, include_prompt)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def row_lengths(rows: Sequence[Row], device: torch.device) -> Tensor:
    """Real tokens of each row (B,)."""
    return torch.tensor([row.length for row in rows], device=device)


@torch.no_grad()
def for_each_row(
    read: Callable[[Sequence[Row]], Tensor], rows: Sequence[Row], batch: int, world: World, title: str
) -> np.ndarray:
    """read(rows) -> (B,) over all rows, in order, as (len(rows),) float64; every process gets the whole."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].length)
    mine = order[world.rank :: world.size]
    results = np.zeros(len(rows))
    rounds = math.ceil(math.ceil(len(rows) / world.size) / batch)  # the same on every process, as FSDP needs
    for turn in tqdm(range(rounds), desc=title, disable=not world.is_main or rounds < 20, mininterval=1.0):
        indices = mine[turn * batch : (turn + 1) * batch]
        with world.autocast():
            values = read([rows[i] for i in indices] or [rows[order[0]]])
        results[indices] = values.double().cpu().numpy()[: len(indices)]
    return world.total(results)


def reward_scores(model: nn.Module, rows: Sequence[Row], pad_id: int, world: World, batch: int = 64) -> np.ndarray:
    """Raw scores (N,) of a reward model, in log-odds, read at each row's last real token."""
    model.eval()

    def read(part: Sequence[Row]) -> Tensor:
        tokens, _ = to_tensors(part, pad_id, world.device)
        return model(tokens, row_lengths(part, world.device))

    return for_each_row(read, rows, batch, world, "reward scores")


def sequence_logps(model: nn.Module, rows: Sequence[Row], pad_id: int, world: World, batch: int = 64) -> np.ndarray:
    """Sums (N,) of the log-probabilities of each row's response tokens."""
    model.eval()
    return for_each_row(
        lambda part: model(*to_tensors(part, pad_id, world.device)).logp.sum(dim=-1), rows, batch, world, "reference log-probabilities"
    )


@torch.no_grad()
def sequence_kls(model: LanguageModel, ref: LanguageModel, rows: Sequence[Row], pad_id: int, world: World, batch: int = 64) -> np.ndarray:
    """KL(model || ref) over the whole vocabulary, in nats, summed over each row's response tokens: (N,).

    Hidden states of response positions alone go through the two output projections, in pieces of at most LOGITS numbers: the (B, T, V)
    tensors never exist.
    """
    positions = max(1, LOGITS // model.config.vocab_size)

    def read(part: Sequence[Row]) -> Tensor:
        tokens, mask = to_tensors(part, pad_id, world.device)
        mask = mask[:, 1:]  # column t is about token t+1
        states, ref_states = (m.trunk(tokens)[:, :-1][mask].split(positions) for m in (model, ref))
        kl = torch.cat([exact_kl(model.lm_head(own), ref.lm_head(other)) for own, other in zip(states, ref_states, strict=True)])
        return kl.new_zeros(mask.shape).masked_scatter(mask, kl).sum(dim=1)

    return for_each_row(read, rows, batch, world, "KL")


def cached_logps(folder: Path, key: dict, ids: Sequence[str], compute: Callable[[], np.ndarray], is_main: bool) -> np.ndarray:
    """compute() -> (N, columns), kept in `folder` under a name made of `key` and the row ids; read back when both are the same.

    key: everything that changes the numbers (digest of the weights, tokenizer, limits, dtype). Raises CheckpointError where a kept file
    does not have exactly these rows.
    """
    name = hashlib.sha256(json.dumps([key, list(ids)], sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"reference-{name}.json"
    if path.exists():
        kept = read_json(path)
        missing = sorted(set(ids) - set(kept["logps"]))
        if missing or kept["key"] != json.loads(json.dumps(key)):
            raise CheckpointError(f"{path}: not the cache its name says (missing rows: {missing[:5]}); remove it, it will be made anew")
        return np.array([kept["logps"][row] for row in ids])
    values = compute()
    if is_main:
        write_json(path, {"key": key, "logps": {row: list(map(float, value)) for row, value in zip(ids, values, strict=True)}})
    return values
