"""Next-token loss: exact on a known Markov chain, normalised by tokens, deaf to padding."""

import math

import pytest
import torch

from losses.logprobs import log_probs, token_logps
from losses.masked import masked_sum
from losses.sft import sft_loss


def test_exact_on_a_markov_chain_with_known_transitions():
    """Column t is about token t+1. Scoring token t instead would give 1/8 and 1/2 here."""
    transitions = torch.tensor([[1 / 8, 3 / 8, 1 / 2], [1 / 4, 1 / 2, 1 / 4], [5 / 8, 1 / 8, 1 / 4]])
    tokens, response_mask = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[False, False, True, True]])
    logits = transitions.log()[tokens][:, :-1]  # a model that says: given x_t, x_{t+1} is distributed like row x_t
    logp = token_logps(log_probs(logits.flatten(0, 1)), tokens[:, 1:].flatten()).view(1, 3)
    loss = sft_loss(logp, response_mask[:, 1:])
    assert loss[0].tolist() == pytest.approx([0, math.log(4), math.log(8 / 5)])  # 1 -> 2, 2 -> 0; the prompt counts nothing


def ragged():
    """Responses of 10 and 2 tokens, 1 and 3 nats per token."""
    mask = torch.arange(10) < torch.tensor([[10], [2]])
    logp = torch.where(mask, torch.tensor([[-1.0], [-3.0]]), float("nan"))
    return logp, mask


def test_normalised_by_tokens_and_independent_of_micro_batches():
    logp, mask = ragged()
    together = sft_loss(logp, mask).sum() / mask.sum()
    row_by_row = sum(sft_loss(logp[[row]], mask[[row]]).sum() for row in (0, 1)) / mask.sum()
    assert together.item() == row_by_row.item() == pytest.approx(16 / 12)  # a mean of the rows' means would be 2.00
    assert masked_sum(logp, mask).tolist() == [-10, -6]


@pytest.mark.parametrize("rubbish", [float("nan"), float("-inf"), 1e9])
def test_padding_leaks_neither_into_values_nor_into_gradients(rubbish):
    mask = torch.tensor([[True, True, False]])
    logp = torch.tensor([[-1.0, -2.0, rubbish]], requires_grad=True)
    loss = sft_loss(logp, mask)
    loss.sum().backward()
    assert loss.tolist() == [[1, 2, 0]] and logp.grad.tolist() == [[-1, -1, 0]]
