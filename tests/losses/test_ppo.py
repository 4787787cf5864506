"""The clipped losses as tables of values, gradients and flags; padding; overflow."""

import math

import pytest
import torch

from losses.ppo import policy_loss, value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


def scalar(x):
    return torch.tensor([[float(x)]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "cut"),
    [
        (0.7, 1, -0.7, -0.7, False),  # fell although good: bring it back
        (1.3, 1, -1.2, 0, True),  # good, and risen enough
        (0.7, -1, 0.8, 0, True),  # bad, and fallen enough
        (1.3, -1, 1.3, 1.3, False),  # rose although bad: bring it back
        (1.1, 1, -1.1, -1.1, False),
        (1.1, -1, 1.1, 1.1, False),
        (1.0, 2, -2, -2, False),
        (1.3, 0, 0, 0, False),
    ],
)
def test_policy_loss_cuts_the_gradient_only_where_the_policy_has_gone_far_enough(ratio, advantage, loss, gradient, cut):
    logp = scalar(math.log(ratio) - 2).requires_grad_()
    value, stats = policy_loss(logp, scalar(-2), scalar(advantage), ONE, clip=0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert logp.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert (stats.clipped.item(), stats.overflow.item()) == (cut, False)


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0, 25.0, float("inf")])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_an_absurd_ratio_is_finite_and_counted(log_ratio, advantage):
    logp = scalar(log_ratio).requires_grad_()
    value, stats = policy_loss(logp, scalar(0), scalar(advantage), ONE)
    value.sum().backward()
    assert torch.isfinite(value).all() and abs(value.item()) <= math.exp(20) * (1 + 1e-6)
    assert logp.grad.item() == 0 and stats.overflow.sum() == 1


def test_max_log_ratio_itself_is_not_an_overflow():
    assert not policy_loss(scalar(20), scalar(0), scalar(1), ONE)[1].overflow.item()
    assert policy_loss(scalar(20.1), scalar(0), scalar(1), ONE)[1].overflow.item()


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logp, old_logp, advantages = torch.randn(3, 4, 9, generator=generator)
    mask = (torch.arange(9) >= torch.tensor([[2], [0], [5], [9]])) & (torch.arange(9) < torch.tensor([[6], [9], [8], [9]]))
    return logp, old_logp, advantages, mask  # the last row is empty


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), float("-inf"), 1e9, -1e9])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_padding_leaks_neither_into_policy_loss_nor_into_gradients(rubbish, where):
    *clean, mask = random_batch()
    dirty = list(clean)
    dirty[where] = torch.where(mask, clean[where], rubbish)
    results = []
    for inputs in (clean, dirty):
        logp = inputs[0].clone().requires_grad_()
        loss, stats = policy_loss(logp, *inputs[1:], mask)
        loss.sum().backward()
        results.append((loss.detach(), logp.grad, stats.clipped, stats.overflow))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs) and not ours[~mask].any()


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("clip", [0.2, None])
def test_padding_leaks_neither_into_value_loss_nor_into_gradients(rubbish, where, clip):
    *clean, mask = random_batch()
    dirty = list(clean)
    dirty[where] = torch.where(mask, clean[where], rubbish)
    results = []
    for inputs in (clean, dirty):
        values = inputs[0].clone().requires_grad_()
        loss = value_loss(values, *inputs[1:], mask, clip)
        loss.sum().backward()
        results.append((loss.detach(), values.grad))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs) and not ours[~mask].any()


def test_what_was_sampled_is_data():
    """No gradient into old log-probabilities, advantages, old values or returns, even where the caller forgot to detach them."""
    logp, old_logp, advantages, mask = random_batch()
    inputs = [tensor.requires_grad_() for tensor in (logp, old_logp, advantages)]
    (policy_loss(*inputs, mask)[0].sum() + value_loss(*inputs, mask).sum()).backward()
    assert old_logp.grad is None and advantages.grad is None and logp.grad is not None


def test_micro_batches_add_up_to_the_minibatch():
    *inputs, mask = random_batch()
    whole = policy_loss(*inputs, mask)[0].sum()
    rows = sum(policy_loss(*(tensor[[row]] for tensor in inputs), mask[[row]])[0].sum() for row in range(4))
    assert torch.allclose(whole, rows)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (0.1, 1, 0.405, -0.9),  # within the clip range: 0.5 * 0.9^2
        (0.5, 1, 0.32, 0),  # went towards the target far enough: 0.5 * (0.2 - 1)^2, cut
        (-0.5, 1, 1.125, -1.5),  # went the wrong way: 0.5 * 1.5^2, comes back
        (-0.5, -1, 0.32, 0),
        (0.5, 0.3, 0.02, 0.2),  # overshot: 0.5 * 0.2^2, worse than the clipped 0.5 * 0.1^2
    ],
)
def test_value_loss_is_clipped_around_the_old_value(value, target, loss, gradient):
    values = scalar(value).requires_grad_()
    result = value_loss(values, scalar(0), scalar(target), ONE, clip=0.2)
    result.sum().backward()
    assert result.item() == pytest.approx(loss, rel=1e-5) and values.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_value_loss_without_clipping_is_half_the_squared_error():
    values = torch.tensor([[0.5, -3.0]], requires_grad=True)
    result = value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), clip=None)
    result.sum().backward()
    assert result.tolist() == [[0.125, 8.0]] and values.grad.tolist() == [[-0.5, -4.0]]
