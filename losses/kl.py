"""How far the policy has gone from the reference, KL(pi || ref), and where in PPO such a number may stand.

Three estimators from one sampled token y ~ pi, with d = log pi(y) - log ref(y):

    k1 = d                          unbiased, often negative, the most spread
    k2 = d^2 / 2                    biased, little when pi is near ref; never negative
    k3 = exp(-d) - 1 + d            unbiased, never negative, far less spread than k1 when pi is near ref

A good estimate of the *value* does not have to have a good *gradient*, and there are two places to put it. "In the reward" it is a number
without gradient that the policy gradient multiplies with grad log pi: the expected gradient is E[k grad log pi]. "In the loss"
autograd differentiates it, but not the distribution that y was drawn from: the expected gradient is E[grad k]. On samples of the current policy:

    estimator   in the reward                        in the loss
    k1          grad KL(pi || ref)    use this       0: E[grad log pi] = 0, a penalty without effect
    k2          not the gradient of KL(pi || ref)    grad KL(pi || ref)    use this
    k3          not the gradient of KL(pi || ref)    grad KL(ref || pi): the forward KL, only under its own name, forward_k3

tests/losses/test_kl.py computes this table exactly on four tokens, for one token drawn. In a response the KL of each token is that of the
prefixes as they were drawn: k1 in the reward also teaches the policy to avoid prefixes that lead to a large KL later, a KL in the loss
does not, and is the gradient of the sum of per-token KLs with prefixes held fixed. In PPO's second and later epochs the samples are no longer the current
policy's, and a KL in the loss is then an approximation, as good as the ratio is near 1.

Source: estimators from Schulman, "Approximating KL divergence" (2020); the table of gradients derived.
"""

import torch
from torch import Tensor

from losses.logprobs import log_probs
from losses.masked import zero_padding

# (estimator, placement) -> what its gradient follows. All other combinations are refused, with the reason. What stands in the reward is
# made in step 5 of rl/rollout.py, what stands in the loss in `minibatch_loss` of rl/ppo.py.
KL_PLACEMENTS = {
    ("k1", "reward"): "KL(policy || reference)",
    ("k2", "loss"): "KL(policy || reference)",
    ("forward_k3", "loss"): "KL(reference || policy), the forward KL",
}
REFUSED_PLACEMENTS = {
    ("k1", "loss"): "its expected gradient is 0, so it would be a penalty without effect",
    ("k2", "reward"): "its policy gradient is not that of the KL",
    ("k3", "reward"): "its policy gradient is not that of the KL",
    ("k3", "loss"): "it follows the forward KL, KL(reference || policy); if you want that, call it by its name, forward_k3",
    ("forward_k3", "reward"): "its policy gradient is not that of any KL; the forward KL can only stand in the loss",
}


def check_kl_placement(estimator: str, placement: str) -> None:
    """Raise ValueError, with the reason, unless `estimator` in the `placement` ("reward" or "loss") has the gradient that its name promises."""
    if (estimator, placement) in KL_PLACEMENTS:
        return
    reason = REFUSED_PLACEMENTS.get((estimator, placement), "there is no such combination")
    allowed = ", ".join(f"{name} in the {place}" for name, place in KL_PLACEMENTS)
    raise ValueError(f"{estimator} in the {placement}: {reason}. Use one of: {allowed}")


def _log_ratio(logp: Tensor, ref_logp: Tensor, mask: Tensor | None) -> Tensor:
    d = logp.float() - ref_logp.float().detach()
    return d if mask is None else zero_padding(d, mask)


def k1(logp: Tensor, ref_logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """log pi - log ref per sampled token; any shape -> the same, float32. With a mask 0 off it, in the gradient too; so also k2 and k3."""
    return _log_ratio(logp, ref_logp, mask)


def k2(logp: Tensor, ref_logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """(log pi - log ref)^2 / 2 per sampled token; any shape -> the same, float32."""
    return 0.5 * _log_ratio(logp, ref_logp, mask).square()


def k3(logp: Tensor, ref_logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """exp(-d) - 1 + d per sampled token; any shape -> the same, float32.

    expm1, because exp(-d) - 1 in float32 keeps no digit of a small d, and the "never negative" estimate comes out below 0.
    """
    d = _log_ratio(logp, ref_logp, mask)
    return torch.expm1(-d) + d


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || ref) of each row over the whole vocabulary, in nats, no sampling error: logits (N, V) twice -> (N,) float32."""
    logps, ref_logps = log_probs(logits), log_probs(ref_logits)
    return (logps.exp() * (logps - ref_logps)).sum(-1)
