"""Supervised fine-tuning: make the demonstrated tokens likely.

    L_t = - log pi(y_t | x, y_<t)                                                   (a)

Which tokens count is the caller's mask: the response with its end token, or prompt and response. The loop divides the sum of these
values by the number of tokens of the whole optimiser step. Averaging per row or per micro-batch first would weigh short responses up:
rows of 10 and 2 tokens with losses of 1 and 3 nats per token make 16 / 12 = 1.33 per token, but 2.00 as a mean of the rows.
"""

from torch import Tensor

from losses.masked import zero_padding


def sft_loss(logp: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood per token: logp (B, T-1), mask (B, T-1) bool -> (B, T-1), 0 off the mask."""
    return -zero_padding(logp, mask)  # (a)
