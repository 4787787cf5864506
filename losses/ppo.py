"""PPO's two losses: improve the policy without leaving the neighbourhood in which its samples tell the truth, and fit the critic.

With the ratio rho_t = pi(y_t) / pi_old(y_t) of the policy being updated to the policy that sampled, and the advantage A_t:

    L_policy = max( -A_t rho_t,  -A_t clip(rho_t, 1 - c, 1 + c) )                   (a)
    L_value  = 1/2 max( (V_t - R_t)^2,  (V_old + clip(V_t - V_old, -c', c') - R_t)^2 )    (b)

(a) is pessimistic: of the two surrogates the worse one counts. So the gradient is cut only where the policy has *already* gone further than c
in the direction that A_t asks for, and never where it has to come back:

                 rho < 1 - c         inside          rho > 1 + c
    A > 0        gradient            gradient        cut
    A < 0        cut                 gradient        gradient

(b) does the same for the critic, around the values at the time of sampling.

Everything is per token and unreduced; the loop divides the sum by the number of response tokens in the minibatch, over micro-batches and ranks.
Old log-probabilities, old values, advantages and returns are data: no gradient flows into them.

Source: (a) Schulman et al., arXiv 1707.06347, equation 7 (with the sign of a loss); (a) and (b) read in the code of openai/lm-human-preferences.
The guard against overflow is ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.masked import zero_padding

MAX_LOG_RATIO = 20.0  # only keeps exp() finite: a log ratio of 1000 must show up as a count, not as inf * 0 = nan


@dataclass(frozen=True)
class PpoStats:
    """Where the policy loss did something special: (B, T-1) bool each, False off the mask. Shares are sums over the count of the mask."""

    clipped: Tensor  # the clipped surrogate was the worse one: no gradient from this token
    overflow: Tensor  # |log ratio| was beyond MAX_LOG_RATIO and was cut to it: no gradient either, and something is wrong


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> tuple[Tensor, PpoStats]:
    """Clipped surrogate per token; logp, old_logp, advantages, mask (B, T-1) -> loss (B, T-1) float32, 0 off the mask, and PpoStats."""
    log_ratio = zero_padding(logp.float() - old_logp.float().detach(), mask)
    advantages = zero_padding(advantages.float().detach(), mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    stats = PpoStats(clipped=clipped > unclipped, overflow=log_ratio.detach().abs() > MAX_LOG_RATIO)
    return torch.maximum(unclipped, clipped), stats  # (a)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2) -> Tensor:
    """Squared error of the critic per token, clipped around the old values (None: not clipped).

    values (B, T-1) are those of the states in which the scored tokens were chosen, `values[:, :-1]` of a critic's (B, T); old_values, returns
    and mask (B, T-1) -> (B, T-1) float32, 0 off the mask.
    """
    values = zero_padding(values.float(), mask)
    old_values = zero_padding(old_values.float().detach(), mask)
    returns = zero_padding(returns.float().detach(), mask)
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error
    near_old = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (near_old - returns).square())  # (b)
