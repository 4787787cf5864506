"""The estimators' values and the table of gradients, exactly, on a vocabulary of four tokens.

Expected numbers: worked out outside this code for pi = softmax(1, .2, -.5, 0) and ref = softmax(0, .5, .3, -.8).
"""

import math

import pytest
import torch

from losses.kl import KL_PLACEMENTS, REFUSED_PLACEMENTS, check_kl_placement, exact_kl, k1, k2, k3
from losses.logprobs import log_probs, token_logps

POLICY, REFERENCE = [1.0, 0.2, -0.5, 0.0], [0.0, 0.5, 0.3, -0.8]
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "forward_k3": k3}
REVERSE_KL_GRADIENT = [0.25447, -0.17195, -0.14007, 0.05755]  # of KL(pi || ref) by pi's logits
FORWARD_KL_GRADIENT = [0.26529, -0.15045, -0.19412, 0.07928]  # of KL(ref || pi)
GRADIENTS = {
    ("k1", "reward"): REVERSE_KL_GRADIENT,
    ("k2", "loss"): REVERSE_KL_GRADIENT,
    ("k1", "loss"): [0, 0, 0, 0],
    ("k3", "loss"): FORWARD_KL_GRADIENT,
    ("forward_k3", "loss"): FORWARD_KL_GRADIENT,
    ("k3", "reward"): [-0.01082, -0.02150, 0.05405, -0.02173],
}


def four_tokens():
    """The policy's logits, its probabilities as weights, and both log-probabilities of each of the four tokens."""
    logits = torch.tensor(POLICY, requires_grad=True)
    every_token = torch.arange(4)
    logp = token_logps(log_probs(logits.expand(4, 4)), every_token)
    ref_logp = token_logps(log_probs(torch.tensor(REFERENCE).expand(4, 4)), every_token)
    return logits, logp.detach().exp(), logp, ref_logp


def expected_gradient(estimator, placement):
    logits, probability, logp, ref_logp = four_tokens()
    k = ESTIMATORS[estimator](logp, ref_logp)
    per_token = k if placement == "loss" else k.detach() * logp
    (probability * per_token).sum().backward()
    return logits.grad


def test_expected_values():
    _, probability, logp, ref_logp = four_tokens()
    mean = {name: (probability * k(logp, ref_logp)).sum().item() for name, k in ESTIMATORS.items()}
    std = {name: (probability * (k(logp, ref_logp) - mean[name]).square()).sum().sqrt().item() for name, k in ESTIMATORS.items()}
    assert [mean["k1"], mean["k2"], mean["k3"]] == pytest.approx([0.260121, 0.26591, 0.260121], abs=1e-5)
    assert [std["k1"], std["k2"], std["k3"]] == pytest.approx([0.681, 0.115, 0.178], abs=1e-3)


def test_exact_kl_and_its_direction():
    policy, reference = torch.tensor([POLICY]), torch.tensor([REFERENCE])
    assert exact_kl(policy, reference).item() == pytest.approx(0.260121, abs=1e-6)
    assert exact_kl(reference, policy).item() == pytest.approx(0.269028, abs=1e-6)
    assert exact_kl(policy, policy.clone()).item() == 0


@pytest.mark.parametrize(("estimator", "placement"), GRADIENTS)
def test_expected_gradients(estimator, placement):
    assert expected_gradient(estimator, placement).tolist() == pytest.approx(GRADIENTS[estimator, placement], abs=1e-5)


def test_golden_gradients_are_those_of_the_two_divergences():
    logits, reference = torch.tensor([POLICY], requires_grad=True), torch.tensor([REFERENCE])
    reverse = torch.autograd.grad(exact_kl(logits, reference).sum(), logits)[0]
    forward = torch.autograd.grad(exact_kl(reference, logits).sum(), logits)[0]
    assert reverse[0].tolist() == pytest.approx(REVERSE_KL_GRADIENT, abs=1e-5)
    assert forward[0].tolist() == pytest.approx(FORWARD_KL_GRADIENT, abs=1e-5)


def test_in_a_sequence_k1_in_the_reward_follows_the_whole_kl_and_k2_in_the_loss_that_of_fixed_prefixes():
    """Two binary tokens, of which the second depends on the first, and every sequence weighted by its probability."""
    logits = torch.tensor([0.8, -0.5, 1.2], requires_grad=True)  # of a first 1; of a second 1 after 0, after 1
    ref_logits = torch.tensor([-0.3, 0.4, -1.0])
    prefixes, tokens = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]]), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).bool()

    def logps(x):
        return torch.where(tokens, x[prefixes], -x[prefixes]).sigmoid().log()

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0].tolist()

    logp, ref_logp = logps(logits), logps(ref_logits)
    probability = logp.sum(dim=1).exp()
    drawn = probability.detach()[:, None]
    whole = gradient((probability * (logp - ref_logp).sum(dim=1)).sum())
    to_go = k1(logp, ref_logp).detach().flip(1).cumsum(1).flip(1)
    assert gradient((drawn * to_go * logp).sum()) == pytest.approx(whole, abs=1e-6)
    visits = torch.stack([torch.tensor(1.0), 1 - logits[0].sigmoid(), logits[0].sigmoid()]).detach()
    two = [torch.stack([-x, x], dim=1).sigmoid().log() for x in (logits, ref_logits)]
    fixed = gradient((visits * (two[0].exp() * (two[0] - two[1])).sum(dim=1)).sum())
    assert gradient((drawn * k2(logp, ref_logp)).sum()) == pytest.approx(fixed, abs=1e-6)
    assert abs(whole[0] - fixed[0]) > 0.05 and whole[1:] == pytest.approx(fixed[1:], abs=1e-6)


@pytest.mark.parametrize(("estimator", "placement"), KL_PLACEMENTS)
def test_allowed_placements_follow_what_they_promise(estimator, placement):
    check_kl_placement(estimator, placement)
    promised = FORWARD_KL_GRADIENT if "forward" in KL_PLACEMENTS[estimator, placement] else REVERSE_KL_GRADIENT
    assert expected_gradient(estimator, placement).tolist() == pytest.approx(promised, abs=1e-5)


@pytest.mark.parametrize(("estimator", "placement"), REFUSED_PLACEMENTS)
def test_refused_placements_do_not_follow_the_kl_and_say_why(estimator, placement):
    assert (expected_gradient(estimator, placement) - torch.tensor(REVERSE_KL_GRADIENT)).abs().max() > 0.01
    with pytest.raises(ValueError) as refusal:
        check_kl_placement(estimator, placement)
    assert REFUSED_PLACEMENTS[estimator, placement] in str(refusal.value) and "k1 in the reward" in str(refusal.value)


def test_every_combination_is_decided_and_unknown_ones_are_refused():
    combinations = {(estimator, placement) for estimator in ESTIMATORS for placement in ("reward", "loss")}
    assert set(KL_PLACEMENTS) | set(REFUSED_PLACEMENTS) == combinations and not set(KL_PLACEMENTS) & set(REFUSED_PLACEMENTS)
    with pytest.raises(ValueError, match="no such combination"):
        check_kl_placement("k4", "loss")


def test_k3_of_a_tiny_difference_is_tiny_and_not_negative():
    d = torch.tensor([1e-4, -1e-4])
    assert k3(d, torch.zeros(2)).tolist() == pytest.approx([5e-9, 5e-9], rel=0.1, abs=0)  # exp(-d) - 1 + d in float32: -1.66e-8
    assert (k3(torch.linspace(-0.01, 0.01, 2001), torch.zeros(2001)) >= 0).all()


def test_bfloat16_inputs_are_raised_to_float32_and_the_reference_gets_no_gradient():
    logp, ref_logp = torch.tensor([-3.0], dtype=torch.bfloat16), torch.tensor([-2.0], requires_grad=True)
    for k, value in ((k1, -1), (k2, 0.5), (k3, math.e - 2)):
        result = k(logp, ref_logp)
        assert result.dtype == torch.float32 and not result.requires_grad and result.item() == pytest.approx(value)


@pytest.mark.parametrize("rubbish", [float("nan"), float("-inf"), 1e9, -1e9])
@pytest.mark.parametrize("k", [k1, k2, k3])
def test_padding_leaks_neither_into_values_nor_into_gradients(k, rubbish):
    mask, ref_logp = torch.tensor([[True, True, False]]), torch.tensor([[-1.5, -1.5, 0.0]])
    clean, dirty = (torch.tensor([[-1.0, -2.0, filler]], requires_grad=True) for filler in (0.0, rubbish))
    for logp in (clean, dirty):
        k(logp, ref_logp, mask).sum().backward()
    assert torch.equal(k(dirty, ref_logp, mask), k(clean, ref_logp, mask)) and k(dirty, ref_logp, mask)[0, 2] == 0
    assert torch.equal(dirty.grad, clean.grad) and dirty.grad[0, 2] == 0
