"""Preference losses: closed forms one by one, then the same questions to every entry of PREFERENCE_LOSSES."""

import math
from dataclasses import replace

import pytest
import torch

from losses.dpo import PREFERENCE_LOSSES, Pairs, dpo, hinge, implicit_rewards, ipo, loss_flags, robust, soft
from losses.masked import masked_sum

LN2 = math.log(2)


def pairs_with(h, length=5):
    """Pairs whose h are the given numbers: the chosen response gained 0.75 h on the reference, the rejected one lost 0.25 h."""
    h = torch.tensor(h)
    ref_chosen, ref_rejected = torch.full_like(h, -20.0), torch.full_like(h, -24.0)
    lengths = torch.full(h.shape, length)
    return Pairs(ref_chosen + 0.75 * h, ref_rejected - 0.25 * h, ref_chosen, ref_rejected, lengths, lengths, torch.full_like(h, 2.0))


def gradients(loss, pairs, **flags):
    """d loss / d chosen_logp and d loss / d rejected_logp, (B,) each."""
    chosen, rejected = pairs.chosen_logp.clone().requires_grad_(), pairs.rejected_logp.clone().requires_grad_()
    loss(replace(pairs, chosen_logp=chosen, rejected_logp=rejected), **flags).sum().backward()
    return chosen.grad, rejected.grad


# DPO


def test_dpo_closed_form():
    loss = dpo(pairs_with([0.0, 10.0, -10.0, 20.0]), beta=0.1)
    assert loss.tolist() == pytest.approx([0.693147, 0.313262, 1.313262, 0.126928], abs=2e-6)  # ln(1 + e^-x) at 0, 1, -1, 2


def test_dpo_starts_at_exactly_ln_2_with_rewards_0():
    pairs = pairs_with([0.0, 0.0])
    assert dpo(pairs).tolist() == [torch.tensor(2.0).log().item()] * 2
    assert [reward.tolist() for reward in implicit_rewards(pairs, beta=0.1)] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_gradient_at_the_start_is_half_beta(beta):
    chosen, rejected = gradients(dpo, pairs_with([0.0]), beta=beta)
    assert chosen.item() == pytest.approx(-beta / 2) and rejected.item() == pytest.approx(beta / 2)


def test_dpo_gradient_fades_where_a_pair_is_learnt():
    chosen, _ = gradients(dpo, pairs_with([-10.0, 0.0, 10.0]), beta=0.1)
    assert chosen.tolist() == pytest.approx([-0.1 / (1 + math.exp(x)) for x in (-1, 0, 1)])


def test_implicit_rewards_have_the_scale_of_beta_and_no_gradient():
    pairs = pairs_with([8.0])
    chosen, rejected = implicit_rewards(replace(pairs, chosen_logp=pairs.chosen_logp.requires_grad_()), beta=0.5)
    assert (chosen.item(), rejected.item()) == (3.0, -1.0) and not chosen.requires_grad


def test_conservative_dpo_closed_form_and_its_finite_minimum():
    pairs = pairs_with([10.0, math.log(0.8 / 0.2) / 0.1])
    assert dpo(pairs, beta=0.1, label_smoothing=0.2)[0].item() == pytest.approx(0.8 * 0.313262 + 0.2 * 1.313262, abs=2e-6)
    assert gradients(dpo, pairs, beta=0.1, label_smoothing=0.2)[0][1].item() == pytest.approx(0, abs=1e-7)
    assert torch.equal(dpo(pairs, label_smoothing=0.0), dpo(pairs))


def test_chosen_weight_adds_the_likelihood_per_token_of_the_chosen_response_only():
    pairs = pairs_with([0.0], length=5)  # chosen at -20 nats, 4 per token
    assert dpo(pairs, chosen_weight=0.5).item() == pytest.approx(LN2 + 0.5 * 4)
    (chosen, rejected), (plain_chosen, plain_rejected) = gradients(dpo, pairs, chosen_weight=0.5), gradients(dpo, pairs)
    assert (chosen - plain_chosen).item() == pytest.approx(-0.5 / 5) and torch.equal(rejected, plain_rejected)


# The relatives


def test_robust_closed_form_and_dpo_at_no_flips():
    pairs = pairs_with([10.0, -3.0])
    assert robust(pairs, beta=0.1, assumed_flips=0.1)[0].item() == pytest.approx((0.9 * 0.313262 - 0.1 * 1.313262) / 0.8, abs=2e-6)
    assert torch.allclose(robust(pairs, assumed_flips=0.0), dpo(pairs), atol=1e-6)


@pytest.mark.parametrize("flip_rate", [0.05, 0.1, 0.3, 0.45])
def test_robust_is_unbiased_and_conservative_dpo_is_not(flip_rate):
    """Averaged over labels of which a share is flipped, the loss is that of the clean labels."""
    pairs = pairs_with([-30.0, -2.0, 0.0, 4.0, 15.0])
    flipped = Pairs(
        pairs.rejected_logp, pairs.chosen_logp, pairs.ref_rejected_logp, pairs.ref_chosen_logp, pairs.rejected_length, pairs.chosen_length
    )

    def averaged(loss, **flags):
        return (1 - flip_rate) * loss(pairs, **flags) + flip_rate * loss(flipped, **flags)

    assert torch.allclose(averaged(robust, assumed_flips=flip_rate), dpo(pairs), atol=2e-5)
    assert not torch.allclose(averaged(dpo, label_smoothing=flip_rate), dpo(pairs), atol=2e-3)


def test_ipo_closed_form_with_each_responses_own_length():
    pairs = replace(pairs_with([8.0]), chosen_length=torch.tensor([3]), rejected_length=torch.tensor([4]))  # ratios 6 and -2
    assert ipo(pairs, beta=1.0).item() == pytest.approx((6 / 3 + 2 / 4 - 0.5) ** 2)
    assert ipo(pairs, beta=0.2).item() == pytest.approx(0, abs=1e-10)  # the target, 1 / (2 * 0.2) = 2.5 nats per token


def test_ipo_target_does_not_run_away():
    chosen, _ = gradients(ipo, pairs_with([0.0, 2.5, 10.0], length=5), beta=1.0)  # differences of 0, 0.5 and 2 nats per token
    assert chosen[0] < 0 and chosen[1].item() == 0 and chosen[2] > 0


def test_hinge_closed_form():
    pairs = pairs_with([4.0, 10.0, 30.0, -10.0])
    assert hinge(pairs, beta=0.1).tolist() == pytest.approx([0.6, 0, 0, 2])
    assert gradients(hinge, pairs, beta=0.1)[0].tolist() == pytest.approx([-0.1, 0, 0, -0.1])


def test_doubling_a_response_doubles_the_sum_and_not_the_mean():
    """From token log-probabilities: the same tokens twice over move DPO's margin, and leave IPO's difference alone. Padding moves neither."""
    token_logp, ref_token_logp = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, -1.0]]), torch.full((2, 3), -2.0)

    def pairs(times, padding):
        def pad(x):
            return torch.nn.functional.pad(x.repeat(1, times), (0, padding), value=float("nan"))

        mask = ~pad(token_logp).isnan()
        logp, ref_logp, length = masked_sum(pad(token_logp), mask), masked_sum(pad(ref_token_logp), mask), mask.sum(-1)
        return Pairs(logp[:1], logp[1:], ref_logp[:1], ref_logp[1:], length[:1], length[1:], torch.ones(1))

    margins = [implicit_rewards(pairs(times, 0), beta=1.0)[0].item() for times in (1, 2)]
    assert margins == pytest.approx([2.5, 5.0])
    assert dpo(pairs(2, 0), beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-0.5 * 3.0))) != dpo(pairs(1, 0), beta=0.5).item()
    assert ipo(pairs(1, 0)).item() == pytest.approx(ipo(pairs(2, 0)).item()) == pytest.approx(0.0, abs=1e-12)
    for loss in PREFERENCE_LOSSES.values():
        assert torch.equal(loss(pairs(1, 100)), loss(pairs(1, 0)))


@pytest.mark.parametrize(("loss", "flag"), [(dpo, "label_smoothing"), (robust, "assumed_flips")])
@pytest.mark.parametrize("share", [0.5, 0.9, -0.1])
def test_shares_of_wrong_labels_are_below_a_half(loss, flag, share):
    with pytest.raises(ValueError, match=flag):
        loss(pairs_with([0.0]), **{flag: share})


def test_a_negative_chosen_weight_and_a_sharpness_that_is_not_positive_are_refused():
    with pytest.raises(ValueError, match="chosen_weight"):
        dpo(pairs_with([0.0]), chosen_weight=-1.0)
    for sharpness in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sharpness"):
            soft(pairs_with([0.0]), sharpness=sharpness)


# Soft labels

def test_soft_labels_by_hand():
    """gap 2: p = sigmoid(2) = 0.880797; at beta h = 1: 0.880797 x 0.313262 + 0.119203 x 1.313262."""
    assert soft(pairs_with([2.0]), beta=0.5).item() == pytest.approx(0.880797 * 0.313262 + 0.119203 * 1.313262, abs=1e-5)


def test_soft_labels_are_learnt_as_far_as_the_reward_model_is_sure():
    """The gradient is 0 at beta h = gap, and pulls back beyond."""
    below, at, beyond = gradients(soft, pairs_with([3.9, 4.0, 4.1]), beta=0.5)[0].tolist()
    assert below < -1e-3 and abs(at) < 1e-7 and beyond > 1e-3


def test_sharp_soft_labels_are_dpo_on_relabelled_pairs():
    pairs = pairs_with([-3.0, 0.5, 2.0])
    disputed = replace(pairs, gap=-pairs.gap)
    exchanged = replace(
        pairs, chosen_logp=pairs.rejected_logp, rejected_logp=pairs.chosen_logp, ref_chosen_logp=pairs.ref_rejected_logp,
        ref_rejected_logp=pairs.ref_chosen_logp,
    )  # fmt: skip
    assert torch.allclose(soft(pairs, beta=0.3, sharpness=1000.0), dpo(pairs, beta=0.3))
    assert torch.allclose(soft(disputed, beta=0.3, sharpness=1000.0), dpo(exchanged, beta=0.3))


# Every entry of the table, a new one included


@pytest.fixture(params=PREFERENCE_LOSSES)
def loss(request):
    return PREFERENCE_LOSSES[request.param]


def test_generic_one_finite_value_per_pair(loss):
    values = loss(pairs_with([-1e4, -3.0, 0.0, 3.0, 1e4]))
    assert values.shape == (5,) and values.dtype == torch.float32 and torch.isfinite(values).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, pairs_with([-1e4, 0.0, 1e4])))


def test_generic_pairs_do_not_mix(loss):
    three = loss(pairs_with([-3.0, 1.0, 3.0]))
    assert torch.allclose(three, torch.cat([loss(pairs_with([h])) for h in (-3.0, 1.0, 3.0)]))


def test_generic_starts_by_pushing_chosen_up_and_rejected_down(loss):
    chosen, rejected = gradients(loss, pairs_with([0.0, 0.0]))
    assert (chosen < 0).all() and (rejected > 0).all()


def test_generic_an_empty_response_is_finite(loss):
    assert torch.isfinite(loss(pairs_with([0.0], length=0))).all()


def test_generic_keywords_are_flags_with_type_default_and_help(loss):
    flags = loss_flags(loss)
    assert flags["beta"][0] is float
    for of_type, default, text in flags.values():
        assert isinstance(default, of_type) and len(text) > 10
    pairs = pairs_with([2.0])
    assert torch.equal(loss(pairs, **{name: default for name, (_, default, _) in flags.items()}), loss(pairs))


def test_flags_of_dpo():
    flags = loss_flags(dpo)
    assert list(flags) == ["beta", "label_smoothing", "chosen_weight"]
    assert flags["label_smoothing"] == (float, 0.0, "share of the labels believed to be wrong, in [0, 0.5) (conservative DPO)")


def test_help_goes_on_in_lines_that_are_indented_further():
    def long(pairs, *, beta: float = 0.1, gamma: float = 0.5):
        """A loss.

        Args:
            beta: strength of the pull
                to the reference
            gamma: how much more likely the chosen response is to be,
                in nats
                per token

        Source: none.
        """

    assert [text for _, _, text in loss_flags(long).values()] == [
        "strength of the pull to the reference", "how much more likely the chosen response is to be, in nats per token"
    ]  # fmt: skip


def test_a_loss_without_a_line_of_help_says_what_it_needs():
    def silent(pairs, *, beta: float = 0.1, temper: float = 1.0):
        """A loss.

        Args:
            beta: strength of the pull to the reference
        """

    def undocumented(pairs, *, beta: float = 0.1): ...

    for loss, name in ((silent, "temper"), (undocumented, "beta")):
        with pytest.raises(ValueError, match=f"{name}: help"):
            loss_flags(loss)
