"""Small worlds for the tests of rl/, built on the small models of tests/model/small.py.

`bigram` is a language model whose next token depends on the last one alone, by a table that a test writes down: what it samples, its
log-probabilities and its values can be worked out by hand. `Count` is a reward model that counts a token and remembers what it was shown.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "model"))
from small import ALONE, BOS, EOS, PAD, loud, ragged_rows  # noqa: E402, F401
from small import CONFIG as LARGER  # noqa: E402

from model.heads import LanguageModel, PolicyWithCritic, ScalarModel  # noqa: E402
from model.transformer import ModelConfig  # noqa: E402
from rl.ppo import PpoFlags  # noqa: E402
from rl.rollout import Sampling, roll_out  # noqa: E402

V = 12
CONFIG = replace(LARGER, vocab_size=V)  # one token in twelve ends a response: of ten tokens some do and some do not
SAMPLING = Sampling(max_new_tokens=8, temperature=1.0, end_penalty=1.5, eos_id=EOS, pad_id=PAD, score_mean=0.25, score_std=2.0)
FLAGS = PpoFlags(
    lr=1e-3, iterations=3, prompts_per_iteration=8, passes=2, minibatch=8, micro_batch=8, end_penalty=1.5, warmup=0.0, clip=1e9, validations=1
)
SURE = 60.0  # exp(-60) is nothing: a logit of 60 among zeros is a certainty


class LastToken(nn.Module):
    """A trunk whose hidden state is the last token read, one-hot."""

    def forward(self, tokens, cache=None, packing=None, read=None):
        return F.one_hot(tokens, V).float()


@torch.no_grad()
def bigram(table):
    """The LanguageModel with logits table[i] (V, V) after token i."""
    model = LanguageModel(ModelConfig(vocab_size=V, width=V, layers=0, heads=2, kv_heads=2))
    model.trunk = LastToken()
    model.lm_head.weight.copy_(table.T)
    return model


def chain(steps):
    """The table of a bigram that is certain: after token i comes steps[i]; after any other token, the end."""
    table = torch.zeros(V, V)
    for token in range(V):
        table[token, steps.get(token, EOS)] = SURE
    return table


@torch.no_grad()
def with_values(policy, values=None, seed=5):
    """A PolicyWithCritic with a value head that says something: given numbers per input of the head, or noise."""
    model = PolicyWithCritic(policy, None)
    width = policy.config.width
    noise = torch.empty(width).normal_(generator=torch.Generator().manual_seed(seed)) / width**0.5
    model.value_head.weight.copy_((noise if values is None else torch.tensor(values))[None])
    return model


class Count(nn.Module):
    """raw score = how often `token` stands in the first `lengths` columns; `seen` keeps every (tokens, lengths)."""

    def __init__(self, token=5):
        super().__init__()
        self.token, self.seen = token, []

    def forward(self, tokens, lengths):
        self.seen.append((tokens.clone(), lengths.clone()))
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        return ((tokens == self.token) & inside).sum(dim=1).float()


def prompts_of(count, seed=0):
    """BOS and 1 to 9 tokens, `count` times."""
    return [list(row.prompt) for row in ragged_rows(count, seed, V)]


def models(seed=0):
    """(policy with critic, another model as reference, reward model), all loud."""
    return with_values(loud(LanguageModel, CONFIG, seed)), loud(LanguageModel, CONFIG, seed + 1), loud(ScalarModel, CONFIG, seed + 2)


def rollout_of(policy, ref, reward_model, prompts, keys=None, *, seed=3, step=0, micro_batch=8, world=ALONE, **sampling):
    """roll_out with the settings above; keys default to the prompts' positions."""
    return roll_out(
        policy, ref, reward_model, prompts, list(range(len(prompts))) if keys is None else keys,
        seed=seed, step=step, sampling=replace(SAMPLING, **sampling), micro_batch=micro_batch, world=world,
    )[0]  # fmt: skip


def responses_of(rollout):
    """The response tokens of each row, as lists."""
    return [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.response_mask, strict=True)]


def weights(model):
    """A copy of everything in a model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(model, before):
    """Whether the state is bit for bit that of `before`."""
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
