"""Log-probabilities of tokens, and the entropy of what they were drawn from.

Logits may arrive in bfloat16; from here on everything is float32: between -8 and -16 a bfloat16 log-probability is rounded to steps of 1/16
nat, and PPO exponentiates differences of such numbers.

The temperature is the one that responses are *sampled* with. It belongs to the distribution, so the same value is used for the policy, the old
policy, the reference and the entropy; with different values, two identical models would show a KL. Temperature 0 is greedy
decoding: that is the sampler's business, there is no distribution left to score.

Alignment is the caller's: row n of `logits` must be what the model says about `targets[n]`, that is, the logits *before* that token.
"""

import torch
from torch import Tensor


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, in float32; (..., V) -> (..., V)."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0 where log-probabilities are asked for (0 is greedy decoding)")
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_logps(logps: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each row: log-probabilities (N, V), targets (N,) ids -> (N,)."""
    return logps.gather(-1, targets[:, None]).squeeze(-1)


def entropy(logps: Tensor) -> Tensor:
    """-sum_v p_v log p_v of each row, in nats: log-probabilities (N, V) -> (N,)."""
    return -(logps.exp() * logps).sum(-1)
