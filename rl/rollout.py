"""From prompts to everything that a PPO update needs to know about the responses: one record, made in five numbered steps.

Log-probabilities, old and reference, come from the full forward pass that the update uses too, not from the cached decode, so the first
ratio is 1. They are all taken at the sampling temperature.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import stable_hash
from losses.kl import k1
from model.generate import Responses, generate, row_uniforms
from model.parallel import World, at_hand, gathered
from rl.rewards import normalise_scores


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn and judged."""

    max_new_tokens: int
    temperature: float
    end_penalty: float
    eos_id: int
    pad_id: int
    score_mean: float
    score_std: float


@dataclass(frozen=True)
class Rollout:
    """B responses of one process with all that was computed at sampling time. Data: no gradient flows into any field."""

    tokens: Tensor  # (B, T) right-padded prompt and response
    response_mask: Tensor  # (B, T) bool
    ended: Tensor  # (B,) bool
    lengths: Tensor  # (B,) real tokens, prompt and response
    scores: Tensor  # (B,) in standard deviations of the reward model, end penalty subtracted
    raw_scores: Tensor  # (B,) in log-odds
    logp: Tensor  # (B, T-1) of the policy that sampled
    ref_logp: Tensor  # (B, T-1)
    kl: Tensor  # (B, T-1) k1 = logp - ref_logp, 0 off the mask
    values: Tensor  # (B, T)

    @property
    def mask(self) -> Tensor:
        """(B, T-1): True on the columns of scored tensors that are about response tokens."""
        return self.response_mask[:, 1:]


def sample(
    policy: nn.Module, prompts: Sequence[Sequence[int]], keys: Sequence[int], seed: int, sampling: Sampling, world: World
) -> Responses:
    """Responses at the sampling temperature; row i's random numbers are a function of (seed, keys[i])."""
    with world.autocast(), gathered(policy):
        return generate(
            policy,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            eos_id=sampling.eos_id,
            pad_id=sampling.pad_id,
            uniforms=row_uniforms(seed, keys, sampling.max_new_tokens),
            temperature=sampling.temperature,
            any_rank=world.any if world.parallel == "fsdp" else bool,
        )


@torch.no_grad()
def roll_out(
    policy: nn.Module,
    ref: nn.Module,
    reward_model: nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    *,
    seed: int,
    step: int,
    sampling: Sampling,
    micro_batch: int,
    world: World,
) -> tuple[Rollout, dict[str, float]]:
    """Samples one response per prompt and looks at it with all models; also returns the seconds each phase took.

    policy: a PolicyWithCritic; prompts: this process's share, lists of ids; keys: the prompts' positions in the whole step.
    """
    policy.eval()
    clock, seconds = [time.perf_counter()], {}

    def lap(name: str) -> None:
        if tokens.is_cuda:
            torch.cuda.synchronize()  # kernels are only queued: without waiting, a phase would be charged to a later one
        seconds[name] = time.perf_counter() - clock[-1]
        clock.append(time.perf_counter())

    # 1. one response per prompt
    responses = sample(policy, prompts, keys, stable_hash(seed, "ppo", "sampling", step), sampling, world)
    tokens, response_mask, ended = responses
    lap("generate")

    columns = torch.arange(tokens.shape[1], device=tokens.device)
    lengths = torch.where(response_mask, columns + 1, 0).amax(dim=1)

    def in_parts(read) -> list[Tensor]:
        """read(tokens, response_mask, lengths) on micro-batches of rows of like length; its results joined in row order, 0 on padding."""
        order, parts = lengths.argsort(), []
        for rows in order.split(micro_batch):
            width = int(lengths[rows].max())
            with world.autocast():
                results = read(tokens[rows, :width], response_mask[rows, :width], lengths[rows])
            parts.append([F.pad(x, (0, tokens.shape[1] - width)) if x.dim() == 2 else x for x in results])
        return [torch.cat(column)[order.argsort()] for column in zip(*parts, strict=True)]

    # 2. what the policy and its critic say of it
    def of_policy(x: Tensor, mask: Tensor, _) -> tuple[Tensor, Tensor]:
        said = policy(x, mask, temperature=sampling.temperature)
        return said.logp, said.values

    logp, values = in_parts(of_policy)
    lap("policy")
    # 3. what the reference says of it
    with at_hand(ref, world):
        (ref_logp,) = in_parts(lambda x, mask, _: (ref(x, mask, temperature=sampling.temperature).logp,))
    lap("reference")
    # 4. what the reward model says of it: the text up to the end token, nothing after
    with at_hand(reward_model, world):
        (raw_scores,) = in_parts(lambda x, _, real: (reward_model(x, real),))
    scores = normalise_scores(raw_scores, ended, sampling.score_mean, sampling.score_std, sampling.end_penalty)
    lap("score")
    # 5. how far the policy has gone from the reference
    kl = k1(logp, ref_logp, response_mask[:, 1:])
    return Rollout(tokens, response_mask, ended, lengths, scores, raw_scores, logp, ref_logp, kl, values), seconds
