"""Small models, ragged rows and a world of one process, for the tests of model/ and for the script ranks.py.

`loud` weights make logits of size 1: under the usual initialisation logits are nearly 0, and a difference of 1e-5 would say nothing.
"""

from functools import partial

import numpy as np
import torch

from data.batches import PairRow, Row
from losses.dpo import dpo
from model.heads import LanguageModel, ScalarModel
from model.objectives import preference_objective, reward_objective, sft_objective
from model.parallel import World
from model.score import reference_logps
from model.transformer import ModelConfig

torch.set_num_threads(1)  # models this small gain nothing from a second thread, and lose much where a core is busy

BOS, EOS, PAD = 1, 2, 3
SPECIAL = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, torch.float32, "ddp")
CONFIG = ModelConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, feed_forward=40, context=64)


@torch.no_grad()
def loud(kind, config=CONFIG, seed=0):
    """A LanguageModel or ScalarModel whose matrices are N(0, 1/sqrt(inputs)) and whose norms are not all 1."""
    model, generator = kind(config), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        parameter.copy_(noise / config.width**0.5 if parameter.dim() > 1 else 1 + 0.2 * noise)
    return model


def ragged_rows(count, seed=0, vocab=CONFIG.vocab_size):
    """Rows of 1 to 9 prompt tokens after BOS and 1 to 12 response tokens, most of them with EOS at the end, ids in 4..vocab-1."""
    numbers = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        prompt = (BOS, *numbers.integers(4, vocab, numbers.integers(1, 10)).tolist())
        response = (*numbers.integers(4, vocab, numbers.integers(0, 12)).tolist(), EOS if index % 4 else 5)
        rows.append(Row(f"row{index}", prompt, response))
    return rows


def ragged_pairs(count, seed=0):
    """Pairs of two such rows with one prompt."""
    rows = ragged_rows(2 * count, seed)
    return [
        PairRow(row.id, row, Row(row.id, row.prompt, other.response))
        for row, other in zip(rows[:count], rows[count:], strict=True)
    ]


def reference_sums(model, pairs, world=ALONE):
    """row id -> log-probability sums of the chosen and the rejected response under `model`."""
    return {pair.id: (chosen, rejected) for pair, (chosen, rejected) in zip(pairs, reference_logps(model, pairs, PAD, world).tolist(), strict=True)}


def task(name, count, seed=0, beta=0.3):
    """(kind of model, rows, objective) of one supervised stage; DPO's reference is another random model."""
    if name == "sft":
        return LanguageModel, ragged_rows(count, seed), sft_objective(PAD, CPU, include_prompt=False)
    pairs = ragged_pairs(count, seed)
    if name == "rm":
        return ScalarModel, pairs, reward_objective(PAD, CPU)
    ref = reference_sums(loud(LanguageModel, seed=99), pairs)
    return LanguageModel, pairs, preference_objective(partial(dpo, beta=beta), beta, ref, PAD, CPU)
