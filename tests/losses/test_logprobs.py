"""Log-probabilities against float64, the temperature, the entropy against brute force."""

import math

import pytest
import torch

from losses import logprobs
from losses.logprobs import entropy, log_probs


def token_logps(logits, targets, temperature=1.0):
    return logprobs.token_logps(log_probs(logits, temperature), targets)


def sharp_bfloat16_logits(rows=256, vocabulary=500):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).bfloat16()
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_logits_give_float32_log_probabilities_close_to_float64(temperature):
    logits, targets = sharp_bfloat16_logits()
    logp = token_logps(logits, targets, temperature)
    exact = torch.log_softmax(logits.double() / temperature, -1)[torch.arange(len(targets)), targets]
    assert logp.dtype == torch.float32 and logp.shape == targets.shape
    assert (logp - exact).abs().max() < 2e-5  # arithmetic in bfloat16 is off by 0.06
    assert abs((logp - exact).mean()) < 2e-6


def test_log_probabilities_of_a_vocabulary_worked_by_hand():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]]).repeat(3, 1)  # probabilities 1/8, 2/8, 5/8
    logp = token_logps(logits, torch.arange(3))
    assert logp.exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_a_constant_added_to_all_logits_changes_nothing():
    logits, targets = sharp_bfloat16_logits(rows=8)
    assert torch.allclose(token_logps(logits.float() + 1024, targets), token_logps(logits, targets), atol=2e-3)


def test_identical_models_have_no_kl_at_any_temperature():
    logits, targets = sharp_bfloat16_logits(rows=8)
    assert torch.equal(token_logps(logits, targets, 0.7), token_logps(logits.clone(), targets, 0.7))
    assert not torch.equal(token_logps(logits, targets, 0.7), token_logps(logits, targets, 1.0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_entropy_is_that_of_the_scaled_distribution(temperature):
    rows = [[0.3, -1.2, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [200.0, 0.0, -200.0, 0.0]]

    def brute_force(row):
        weights = [math.exp((value - max(row)) / temperature) for value in row]
        probabilities = [weight / sum(weights) for weight in weights]
        return -sum(p * math.log(p) for p in probabilities if p > 0)

    result = entropy(log_probs(torch.tensor(rows), temperature))
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx([brute_force(row) for row in rows], abs=1e-6)
    assert result[1].item() == pytest.approx(math.log(4))


def test_entropy_has_a_finite_gradient_where_it_is_zero():
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    entropy(log_probs(logits)).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_zero_is_for_the_sampler(temperature):
    with pytest.raises(ValueError, match="greedy"):
        token_logps(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), temperature)
