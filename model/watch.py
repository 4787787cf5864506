"""Does a preference-tuned policy still speak its reference's language?

A preference loss looks at differences of log-probabilities; it can go on falling while both of a pair's responses become unlikely and
samples fall apart. So each validation also samples, and training ends where the policy has gone too far.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from data.errors import NumericalError
from model.generate import generate, row_uniforms
from model.parallel import World, at_hand, bare, gathered
from model.stage import Text

WATCHED = 64  # validation prompts that are answered at each validation


@torch.no_grad()
def sampled_kl(model: nn.Module, ref: nn.Module, prompts: Sequence[Sequence[int]], text: Text, seed: int, world: World) -> dict[str, float]:
    """Samples at temperature 1: mean over responses of sum over tokens of log pi - log ref, an estimate of KL(pi || ref) per sequence in
    nats, and the share that ended. The same seed draws with the same random numbers every time."""
    model.eval()
    mine = range(world.rank, len(prompts), world.size)
    with world.autocast(), gathered(model):
        responses = generate(
            bare(model),
            [prompts[i] for i in mine],
            max_new_tokens=text.max_response,
            eos_id=text.tokenizer.eos_id,
            pad_id=text.tokenizer.pad_id,
            uniforms=row_uniforms(seed, mine, text.max_response),
            any_rank=world.any if world.parallel == "fsdp" else bool,
        )
        policy = bare(model)(responses.tokens, responses.response_mask).logp
        with at_hand(ref, world):
            reference = ref(responses.tokens, responses.response_mask).logp
    kl, ended, rows = world.total([float((policy - reference).sum()), float(responses.ended.sum()), len(mine)])
    return {"kl_ref_seq": float(kl / rows), "ended": float(ended / rows)}  # plain numbers, for JSON


def limit_passed(numbers: dict[str, float], max_kl: float, max_fall: float) -> str | None:
    """Which of a validation's sampled KL and the fall of its chosen responses passes its limit, in nats per response; None where neither does."""
    for name, limit, flag in (("kl_ref_seq", max_kl, "max-kl"), ("chosen_fall", max_fall, "max-fall")):
        if numbers[name] > limit:
            return f"{name} is {numbers[name]:.1f}, above {flag} {limit}"
    return None


def check_first_preference_step(loss: str, arguments: dict, world: World, longest: int, numbers: dict[str, float]) -> None:
    """Before the first step policy and reference are one: implicit rewards are 0, and DPO's loss is ln 2. Raises NumericalError else.

    longest: tokens of the longest response. In bf16 rows in other company may come out otherwise; with a twentieth of a nat per token, either way
    (the bound of PPO's first ratio), a response of n tokens is off by 0.05 sqrt(n), twice which is let pass."""
    bound = arguments["beta"] * (0.1 * longest**0.5 if world.dtype == torch.bfloat16 else 1e-3)
    if max(abs(numbers["chosen_reward"]), abs(numbers["rejected_reward"])) > bound:
        raise NumericalError(f"dpo: the first implicit rewards are not 0 ({numbers}), though policy and reference are the same model")
    if loss == "dpo" and not arguments["chosen_weight"] and abs(numbers["loss"] - math.log(2)) > max(bound, 1e-3):
        raise NumericalError(f"dpo: the first loss is {numbers['loss']:.6f}, not ln 2 = 0.693147")
