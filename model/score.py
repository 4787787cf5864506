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

from data.batches import CHOSEN, REJECTED, PairRow, Row, collate, collate_pairs
from data.errors import CheckpointError, NumericalError
from data.files import read_json, write_json
from losses.kl import exact_kl
from losses.masked import masked_sum
from model.heads import LanguageModel, predicting
from model.parallel import World, at_hand

READ_AT_ONCE = 32  # pairs
LOGITS = 2**22  # numbers in one of the (positions, V) tensors that exist at a time while a KL is computed


def to_tensors(rows: Sequence[Row], pad_id: int, device: torch.device, include_prompt: bool = False) -> tuple[Tensor, Tensor]:
    """tokens (B, T) and response_mask (B, T) of some rows on the device."""
    tokens, mask = collate(rows, pad_id, include_prompt)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def row_lengths(rows: Sequence[Row], device: torch.device) -> Tensor:
    """Real tokens of each row (B,)."""
    return torch.tensor([row.length for row in rows], device=device)


def pair_tensors(pairs: Sequence[PairRow], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens and parts (B, T) of some packed pairs on the device."""
    tokens, parts = collate_pairs(pairs, pad_id)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(parts).to(device)


def pair_logps(model: nn.Module, pairs: Sequence[PairRow], pad_id: int, device: torch.device) -> Tensor:
    """(B, 2): sums of the log-probabilities of the chosen and of the rejected response, EOS included."""
    tokens, parts = pair_tensors(pairs, pad_id, device)
    logp = model(tokens, (parts == CHOSEN) | (parts == REJECTED), parts=parts).logp
    return torch.stack([masked_sum(logp, parts[:, 1:] == part) for part in (CHOSEN, REJECTED)], dim=1)


@torch.no_grad()
def for_each_row(read: Callable[[Sequence], Tensor], rows: Sequence, batch: int, world: World, title: str, columns: int = 1) -> np.ndarray:
    """read(rows) -> (B,) or (B, columns) over all rows, in order, as (len(rows), columns) float64; every process gets the whole."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].length)
    mine = order[world.rank :: world.size]
    results = np.zeros((len(rows), columns))
    rounds = math.ceil(math.ceil(len(rows) / world.size) / batch)  # the same on every process, as FSDP needs
    for turn in tqdm(range(rounds), desc=title, disable=not world.is_main or rounds < 20, mininterval=1.0):
        indices = mine[turn * batch : (turn + 1) * batch]
        with world.autocast():
            values = read([rows[i] for i in indices] or [rows[order[0]]])
        results[indices] = values.double().cpu().numpy().reshape(-1, columns)[: len(indices)]
    return world.total(results)


def reward_scores(model: nn.Module, rows: Sequence[Row], pad_id: int, world: World, batch: int = 64) -> np.ndarray:
    """Raw scores (N,) of a reward model, in log-odds, read at each row's last real token."""
    model.eval()

    def read(part: Sequence[Row]) -> Tensor:
        tokens, _ = to_tensors(part, pad_id, world.device)
        return model(tokens, row_lengths(part, world.device))

    with at_hand(model, world):
        return for_each_row(read, rows, batch, world, "reward scores").squeeze(1)


def reward_scores_of_pairs(model: nn.Module, pairs: Sequence[PairRow], pad_id: int, world: World, batch: int = READ_AT_ONCE) -> np.ndarray:
    """Raw scores (N, 2) of chosen and rejected responses, in log-odds."""
    model.eval()

    def read(part: Sequence[PairRow]) -> Tensor:
        tokens, parts = pair_tensors(part, pad_id, world.device)
        return model(tokens, parts=parts)

    with at_hand(model, world):
        return for_each_row(read, pairs, batch, world, "reward scores", columns=2)


def reference_logps(model: nn.Module, pairs: Sequence[PairRow], pad_id: int, world: World, batch: int = READ_AT_ONCE) -> np.ndarray:
    """(N, 2): what `pair_logps` says of many pairs."""
    model.eval()

    def read(part: Sequence[PairRow]) -> Tensor:
        return pair_logps(model, part, pad_id, world.device)

    with at_hand(model, world):
        return for_each_row(read, pairs, batch, world, "reference log-probabilities", columns=2)


@torch.no_grad()
def sequence_kls(
    model: LanguageModel, refs: Sequence[LanguageModel], rows: Sequence[Row], pad_id: int, world: World, batch: int = 64
) -> np.ndarray:
    """KL(model || ref) over the whole vocabulary, in nats, summed over each row's response tokens, for each of refs: (N, len(refs)).

    Hidden states of response positions alone go through the output projections, in pieces of at most LOGITS numbers: the (B, T, V)
    tensors never exist.
    """
    positions = max(1, LOGITS // model.config.vocab_size)

    def read(part: Sequence[Row]) -> Tensor:
        tokens, mask = to_tensors(part, pad_id, world.device)
        read, mask = predicting(mask), mask[:, 1:]  # column t is about token t+1
        pieces = zip(*(m.trunk(tokens, read=read)[:, :-1][mask].split(positions) for m in (model, *refs)), strict=True)
        kl = torch.cat([per_token(own, others) for own, *others in pieces])
        return torch.stack([kl.new_zeros(mask.shape).masked_scatter(mask, column).sum(dim=1) for column in kl.T], dim=1)

    def per_token(states: Tensor, ref_states: Sequence[Tensor]) -> Tensor:
        logits = model.lm_head(states)
        return torch.stack([exact_kl(logits, ref.lm_head(other)) for ref, other in zip(refs, ref_states, strict=True)], dim=1)

    return for_each_row(read, rows, batch, world, "KL", columns=len(refs))


def cached_logps(folder: Path, key: dict, ids: Sequence[str], compute: Callable[[], np.ndarray], world: World) -> np.ndarray:
    """compute() -> (N, columns), kept in `folder` under a name made of `key` and the row ids; read back when both are the same.

    key: everything that changes the numbers (digest of the weights, tokenizer, limits, dtype). Raises CheckpointError where a kept file
    does not have exactly these rows, or was changed; NumericalError where a number is not finite.
    """
    name = hashlib.sha256(json.dumps([key, list(ids)], sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"reference-{name}.json"
    if world.any(path.exists()):  # or some would wait in compute() for those that read
        kept = read_json(path)
        missing = sorted(set(ids) - set(kept["logps"]))
        if missing or kept["key"] != json.loads(json.dumps(key)) or kept.get("sha256") != sha256_of(kept["logps"]):
            raise CheckpointError(f"{path}: not the cache its name says (missing rows: {missing[:5]}); remove it, it will be made anew")
        return np.array([kept["logps"][row] for row in ids])
    values = compute()
    if broken := [row for row, value in zip(ids, values, strict=True) if not np.isfinite(value).all()]:
        raise NumericalError(f"the reference's log-probabilities of rows {', '.join(broken[:5])} ({len(broken)} such) are not finite: its weights are broken")
    if world.is_main:
        logps = {row: list(map(float, value)) for row, value in zip(ids, values, strict=True)}
        write_json(path, {"key": key, "sha256": sha256_of(logps), "logps": logps})
    return values


def sha256_of(value) -> str:
    """Digest of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
