"""Generalised advantage estimation: how much better than expected was each token of a response?

    delta_t = r_t + discount * V(s_{t+1}) - V(s_t)                                  (a)
    A_t     = delta_t + discount * lambda * A_{t+1}                                 (b)
    R_t     = A_t + V(s_t)                                                          (c)   what the critic is trained on

lambda 0 trusts the critic (A is the one-step surprise), lambda 1 trusts the rewards (R is the discounted reward-to-go).

Where a state's value lives. `values` is (B, T): column t is V after reading tokens 0..t. An action is a token; the one at column t of a scored
tensor (B, T-1) is token t+1, so it is chosen in the state of value values[:, t] and leads to the state of value values[:, t+1]:

    tokens     x0   x1   y0   y1   y2  pad      prompt x, response y
    values     V0   V1   V2   V3   V4    .
    actions         .    y0   y1   y2    .      columns 0 .. T-2, mask True on the y's
    V(s_t)               V1   V2   V3
    V(s_t+1)             V2   V3   end          end: 0, or V4 for a row that bootstraps

Where a response ends. After an end token nothing more can be earned: the value is 0. A response cut at the length cap would have gone
on, so a caller who neither scores it nor charges it for that sets `bootstrap`, and its last action leads to V4 instead.

Source: Schulman et al., arXiv 1506.02438, equation 16, as the backward recursion that is in the code of openai/lm-human-preferences;
the bootstrap is ours (there every response has the same length).
"""

import torch
from torch import Tensor

from losses.masked import zero_padding


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, discount: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (B, T-1) float32 each, 0 off the mask and before any whitening.

    rewards (B, T-1) per token; values (B, T); mask (B, T-1) bool, True on one unbroken run of actions per row (it may be empty), wherever
    that run begins and ends; bootstrap (B,) bool, True for rows that were cut and whose value after the last token counts.
    """
    has_next = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)  # is the next column an action of the same response?
    goes_on = mask & (has_next | bootstrap[:, None])  # does the state after this action have a value?
    value = zero_padding(values[:, :-1].float(), mask)
    next_value = zero_padding(values[:, 1:].float(), goes_on)
    delta = rewards.float() + discount * next_value - value  # (a); off the mask it may be anything, and is dropped below
    advantages = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])  # A_{t+1}; off the mask it is kept at 0, so it is 0 after a row's last action
    for t in reversed(range(delta.shape[1])):
        following = zero_padding(delta[:, t] + discount * gae_lambda * following, mask[:, t])  # (b)
        advantages[:, t] = following
    return advantages, advantages + value  # (c)


@torch.no_grad()
def whiten(advantages: Tensor, mask: Tensor, moments: tuple[Tensor, Tensor, Tensor], floor: float = 1e-8) -> Tensor:
    """Advantages (B, T-1) shifted to mean 0 and scaled to variance 1, 0 off the mask.

    `moments` (count, mean, variance) are those of the *whole* batch, over all micro-batches and ranks (`masked_moments`, joined by
    `merge_moments`): with local ones the effective learning rate would depend on how the batch was cut. `floor` is the least variance divided
    by, so that advantages that are all the same become 0 and not noise blown up to 1.
    """
    _, mean, variance = moments
    return zero_padding((advantages - mean) * variance.clamp(min=floor).rsqrt(), mask)
