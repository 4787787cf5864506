"""The reward model's loss: Bradley and Terry's model of a choice between two responses.

A judge prefers y_w to y_l with probability sigmoid(r(x, y_w) - r(x, y_l)); the loss is the negative log-likelihood of the label:

    L = - log sigmoid( r(x, y_w) - r(x, y_l) )                                      (a)

so the difference of two scores, the *gap*, is in log-odds, and adding a constant to all scores of a prompt changes nothing. Scores equal:
L = ln 2 = 0.6931.

Source: Ouyang et al., arXiv 2203.02155, equation 1, with two responses per prompt.
"""

import torch.nn.functional as F
from torch import Tensor


def reward_loss(chosen_score: Tensor, rejected_score: Tensor) -> Tensor:
    """Bradley-Terry loss per pair: raw scores (B,) and (B,) -> (B,) float32.

    logsigmoid and not log(1 + exp(-gap)), which overflows at a gap of -89: one absurd pair must cost much, not infinitely much.
    """
    gap = chosen_score.float() - rejected_score.float()
    return -F.logsigmoid(gap)  # (a)
