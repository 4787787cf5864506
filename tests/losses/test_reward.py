"""Bradley-Terry loss: closed form, extremes, gradients."""

import math

import pytest
import torch

from losses.reward import reward_loss


def test_closed_form():
    loss = reward_loss(torch.tensor([0.0, 3.0, 1.0]), torch.tensor([0.0, 2.0, 2.0]))
    assert loss.tolist() == pytest.approx([math.log(2), 0.3132617, 1.3132617])  # ln(1 + e^0), ln(1 + e^-1), ln(1 + e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absurd_scores_give_finite_losses_and_gradients(dtype):
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = reward_loss(chosen, torch.zeros(2, dtype=dtype))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx([0, 1e4], rel=2e-3)  # bfloat16 has no 10,000
    assert chosen.grad.tolist() == [0, -1]


def test_gradient_is_minus_the_probability_of_being_wrong():
    chosen, rejected = torch.tensor([0.0, 1.0], requires_grad=True), torch.tensor([0.0, 0.0], requires_grad=True)
    reward_loss(chosen, rejected).sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.5, -1 / (1 + math.e)])
    assert torch.equal(rejected.grad, -chosen.grad)


def test_scores_are_known_only_up_to_a_constant_and_pairs_do_not_mix():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(reward_loss(chosen + 8, rejected + 8), reward_loss(chosen, rejected))
    assert torch.equal(reward_loss(chosen, rejected)[1:], reward_loss(chosen[1:], rejected[1:]))
