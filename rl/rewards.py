"""What a response earns, token by token, and what the KL to the reference costs.

    score    = (raw - mean) / std of the reward model, minus a penalty where the end token is missing          (1)
    reward_t = -kl_coef * k1_t on every response token, + score on the action that ends the response           (2)
    sum over t of reward_t = score - kl_coef * sum of k1_t                                                     (3)

raw is the reward model's log-odds; mean and std are those of its scores on chosen responses, fitted once and stored with its weights, so
that one unit of score means the same whatever the reward model. The penalty is *subtracted*, in units of score. Where the KL stands in
the loss instead (k2), reward_t has no KL term; losses/kl.py says which placement has which gradient.

Source: Ziegler et al., arXiv 1909.08593, equation 2 and section 2.2 (adaptive coefficient); the subtraction is a choice of ours.
"""

import torch
from torch import Tensor

from data.errors import NumericalError
from losses.masked import masked_sum


def normalise_scores(raw: Tensor, ended: Tensor, mean: float, std: float, end_penalty: float) -> Tensor:
    """raw scores (B,) in log-odds, ended (B,) bool -> scores (B,) in standard deviations, less end_penalty where not ended (1)."""
    return (raw - mean) / std - end_penalty * (~ended).float()


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """scores (B,), kl (B, T-1), mask (B, T-1) -> rewards (B, T-1), 0 off the mask (2).

    The last action is the end token, or the last token of a response that was cut. Raises NumericalError unless (3) holds row by row.
    """
    kl = torch.where(mask, kl, 0.0)
    rewards = -kl_coef * kl
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(dim=1)
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last] += scores
    excess = masked_sum(rewards, mask) - (scores - kl_coef * kl.sum(dim=1))  # (3), over real actions: a row without any has no place for its score
    if not bool((excess.abs() <= 1e-3 * (1 + scores.abs() + kl_coef * kl.abs().sum(dim=1))).all()):
        raise NumericalError(f"rewards do not sum to score minus KL cost: largest difference {float(excess.abs().max()):.3g}")
    return rewards


def next_kl_coef(kl_coef: float, kl: float, target: float | None, horizon: float, responses: int) -> float:
    """The adaptive controller: raises the coefficient when the KL per sequence is above its target, lowers it when below.

        coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon)

    Without a target the coefficient stays. kl: mean over all ranks' responses of the per-sequence sum.
    """
    if target is None:
        return kl_coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)
