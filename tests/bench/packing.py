"""What sharing the prompt, leaving out padding, and a last layer that makes only the states that are read save: a training step of the reward
model and of DPO, as it is, and without one of the three, in turn.

    python tests/bench/packing.py [--repeats 7] [--prompt 96] [--response 48] [--pairs 16] [--size mini] [--threads N]

Prompts have a third of --prompt to all of it tokens, responses likewise, random ids. All ways must give the same loss before anything
is timed. Prints medians and the median of the paired ratios.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from machine import machine  # noqa: E402

from data.batches import PairRow, Row  # noqa: E402
from data.report import markdown_table  # noqa: E402
from losses.masked import masked_sum  # noqa: E402
from losses.reward import reward_loss  # noqa: E402
from model.heads import LanguageModel, ScalarModel  # noqa: E402
from model.score import pair_logps, pair_tensors, row_lengths, to_tensors  # noqa: E402
from model.transformer import ModelConfig, initialise, places_of, sized, up_to_last  # noqa: E402

VOCAB, PAD, CPU = 4096, 3, torch.device("cpu")
CONFIG = ModelConfig(vocab_size=VOCAB, width=256, layers=8, heads=8, kv_heads=8, feed_forward=704, context=1024)  # of other scripts: 8.4M parameters


def random_pairs(count: int, prompt: int, response: int, vocab: int = VOCAB) -> list[PairRow]:
    numbers = np.random.default_rng(0)
    pairs = []
    for index in range(count):
        start = tuple(numbers.integers(4, vocab, numbers.integers(prompt // 3, prompt + 1)).tolist())
        chosen, rejected = (tuple(numbers.integers(4, vocab, numbers.integers(response // 3, response + 1)).tolist()) for _ in range(2))
        pairs.append(PairRow(str(index), Row(str(index), start, chosen), Row(str(index), start, rejected)))
    return sorted(pairs, key=lambda pair: pair.length)


def packed(model, pairs: list[PairRow]) -> torch.Tensor:
    """(B, 2): scores, or log-probabilities summed over responses."""
    if isinstance(model, LanguageModel):
        return pair_logps(model, pairs, PAD, CPU)
    tokens, parts = pair_tensors(pairs, PAD, CPU)
    return model(tokens, parts=parts)


def separate(model, pairs: list[PairRow], device: torch.device = CPU) -> torch.Tensor:
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    tokens, mask = to_tensors(rows, PAD, device)
    if isinstance(model, LanguageModel):
        return masked_sum(model(tokens, mask).logp, mask[:, 1:]).view(2, -1).T
    return model(tokens, row_lengths(rows, device)).view(2, -1).T


def with_padding(model, pairs: list[PairRow]) -> torch.Tensor:
    with patch("model.transformer.places_of", lambda mask, few=0.0: None if torch.equal(mask, up_to_last(mask)) else places_of(mask)):
        return packed(model, pairs)


def whole_last_layer(model, pairs: list[PairRow]) -> torch.Tensor:
    with patch("model.transformer.places_of", lambda mask, few=0.0: places_of(mask, few) if torch.equal(mask, up_to_last(mask)) else None):
        return packed(model, pairs)


def step(model, read, pairs: list[PairRow], micro_batch: int = 8) -> tuple[float, float]:
    """Loss and seconds of forward and backward over all pairs."""
    began, total = time.perf_counter(), 0.0
    for first in range(0, len(pairs), micro_batch):
        part = pairs[first : first + micro_batch]
        loss = reward_loss(*read(model, part).unbind(dim=1)).sum() / len(pairs)  # DPO's with beta 1 and an even reference
        loss.backward()
        total += float(loss.detach())
    model.zero_grad()
    return total, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--response", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--threads", type=int)
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    pairs, rows = random_pairs(flags.pairs, flags.prompt, flags.response), []
    for name, kind in (("reward model", ScalarModel), ("DPO", LanguageModel)):
        model = kind(sized(flags.size, VOCAB))
        initialise(model, 0)
        ways = (packed, whole_last_layer, with_padding, separate)
        losses = [step(model, read, pairs)[0] for read in ways]
        assert max(losses) - min(losses) < 1e-4 * abs(losses[0]), losses
        times = [[step(model, read, pairs)[1] for read in ways] for _ in range(flags.repeats)]
        medians = [f"{1e3 * statistics.median(column):.0f}" for column in zip(*times, strict=True)]
        ratios = [f"{statistics.median(row[i] / row[0] for row in times):.2f}" for i in (1, 2, 3)]
        rows.append((name, *medians, *ratios))
    print(f"{machine()}\n{flags.pairs} pairs, prompts to {flags.prompt}, responses to {flags.response} tokens, size {flags.size}\n")
    print(markdown_table(["step", "as it is, ms", "whole last layer, ms", "with padding, ms", "two rows, ms", "whole last layer", "with padding", "two rows"], rows))


if __name__ == "__main__":
    main()
