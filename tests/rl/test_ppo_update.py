"""PPO's update: gradients against a second implementation, what must not matter to them, and what must stop a run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import ALONE, BOS, CONFIG, FLAGS, PAD, V, Count, bigram, loud, models, prompts_of, rollout_of, same_weights, weights, with_values

from data.batches import step_indices
from data.errors import NumericalError, UsageError
from losses.logprobs import log_probs
from model.heads import PolicyWithCritic, ScalarModel
from rl import ppo
from rl.ppo import Batch, check_ppo_flags, explained_variance, make_batch, minibatch_loss, update
from rl.watch import check_first_ratio

NAN = float("nan")
LENGTHY = ("kl", "logp", "ref_logp", "values")


class Recorder(torch.optim.SGD):
    """Plain descent that remembers every step's gradients."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.gradients, self.parameters = [], list(model.parameters())

    def step(self, closure=None):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters]))
        super().step(closure)


def made(flags=FLAGS, rows=8, kl_coef=0.05, **changes):
    """(policy, batch, its rollout) of a loud policy that is not its reference."""
    policy, ref, reward_model = models()
    rollout = rollout_of(policy, ref, reward_model, prompts_of(rows), **changes)
    return policy, make_batch(rollout, kl_coef, flags, ALONE), rollout


def run_update(policy, batch, flags=FLAGS, *, lr=0.0, kl_coef=0.05, iteration=0, optimiser=None):
    """(gradients of all steps, numbers) of one call of update."""
    optimiser = optimiser or Recorder(policy)
    lengths = batch.rollout.mask.sum(dim=1).numpy()
    numbers = update(
        policy, optimiser, batch, response_tokens=lengths, iteration=iteration, lr=lr, kl_coef=kl_coef, flags=flags, seed=0, world=ALONE
    )
    return getattr(optimiser, "gradients", None), numbers


def gradient_of(policy, batch, flags, kl_coef=0.05):
    """Gradient of the whole batch's summed loss, and its metrics; without update's check of the first ratio."""
    policy.zero_grad()
    total, metrics = minibatch_loss(policy, batch, torch.arange(len(batch.returns)), kl_coef, flags)
    total.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), metrics


def close(found, expected, tolerance=1e-5):
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# ---- rewards, advantages, returns of a rollout


def row_of_numbers(ended=False):
    """One response of four tokens after two of prompt, whose rewards are -.1 -.1 -.1 1 at kl_coef 0.1; values .2 .3 .4 .5, then .6."""
    _, _, rollout = made(rows=1)
    mask = torch.tensor([[False, False, True, True, True, True, False]])
    values = torch.tensor([[9.0, 0.2, 0.3, 0.4, 0.5, 0.6, 9.0]])
    kl = torch.where(mask[:, 1:], 1.0, 0.0)
    return replace(rollout, response_mask=mask, values=values, kl=kl, scores=torch.tensor([1.1]), ended=torch.tensor([ended]))


@pytest.mark.parametrize(
    ("bootstrap", "ended", "returns"),
    [
        (False, False, [0.62869, 0.75125, 0.875, 1.0]),
        (True, False, [0.2, 0.3, 0.4, 0.5]),  # rewards -.1 -.1 -.1 -.1, then .6: each value is already that of the next less .1
        (True, True, [0.62869, 0.75125, 0.875, 1.0]),
    ],
)
def test_returns_by_hand_and_only_cut_responses_bootstrap(bootstrap, ended, returns):
    rollout = row_of_numbers(ended)
    batch = make_batch(rollout, 0.1, replace(FLAGS, bootstrap=bootstrap), ALONE)
    assert batch.returns[rollout.mask].tolist() == pytest.approx(returns, abs=1e-5)


def test_discount_and_lambda_reach_the_returns():
    rollout = row_of_numbers()
    batch = make_batch(rollout, 0.1, replace(FLAGS, gae_lambda=1.0, discount=0.5), ALONE)
    assert batch.returns[rollout.mask].tolist() == pytest.approx([-0.1 - 0.05 - 0.025 + 0.125, -0.1 - 0.05 + 0.25, -0.1 + 0.5, 1.0])


def test_a_kl_in_the_loss_is_not_in_the_reward_as_well():
    rollout = row_of_numbers()
    flags = replace(FLAGS, gae_lambda=1.0, kl_placement="loss", kl_estimator="k2")
    assert make_batch(rollout, 0.1, flags, ALONE).returns[rollout.mask].tolist() == pytest.approx([1.1] * 4)


def test_advantages_are_white_over_response_tokens():
    _, batch, rollout = made()
    white = batch.advantages[rollout.mask]
    assert abs(float(white.mean())) < 1e-6 and float(white.var(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert not batch.advantages[~rollout.mask].any()


@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        ([1, 2, 3, 3], [1, 2, 3, 4], 0.85),  # residuals 0 0 0 1: variance 0.1875, of 1.25
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([3, 4, 5, 6], [1, 2, 3, 4], 1.0),  # off by a constant, which no variance sees
        ([7, 7, 7, 7], [1, 2, 3, 4], 0.0),
        ([4, 3, 2, 1], [1, 2, 3, 4], -3.0),
        ([1, 2, 3, 4], [2, 2, 2, 2], 0.0),  # nothing to explain
    ],
)
def test_explained_variance(values, returns, expected):
    mask = torch.tensor([[True, True, False], [False, True, True]])
    padded = [torch.full((2, 3), NAN).masked_scatter(mask, torch.tensor(x, dtype=torch.float32)) for x in (values, returns)]
    assert explained_variance(*padded, mask, ALONE) == pytest.approx(expected, abs=1e-6)


# ---- the gradient


def second_opinion(policy, batch, rows, flags, kl_coef):
    """PPO's loss of some rows written once more: a loop over tokens in float64, from full logits. Returns the sum over tokens."""
    rollout, total = batch.rollout, 0.0
    for row in rows:
        logits = policy.policy(rollout.tokens[row : row + 1])[0].double() / flags.temperature
        values = policy(rollout.tokens[row : row + 1], rollout.response_mask[row : row + 1]).values[0].double()
        for t in rollout.mask[row].nonzero()[:, 0].tolist():
            logps = logits[t] - logits[t].logsumexp(0)
            logp, advantage, target = logps[rollout.tokens[row, t + 1]], float(batch.advantages[row, t]), float(batch.returns[row, t])
            ratio = (logp - float(rollout.logp[row, t])).exp()
            surrogates = [advantage * ratio, advantage * ratio.clamp(1 - flags.ratio_clip, 1 + flags.ratio_clip)]
            old = float(rollout.values[row, t])
            errors = [(values[t] - target) ** 2]
            if flags.value_clip:
                errors.append((values[t].clamp(old - flags.value_clip, old + flags.value_clip) - target) ** 2)
            total = total - min(surrogates) + flags.value_coef * max(errors) / 2
            total = total + flags.entropy_coef * (logps.exp() * logps).sum()
            d = logp - float(rollout.ref_logp[row, t])
            if flags.kl_placement == "loss":
                total = total + kl_coef * (d**2 / 2 if flags.kl_estimator == "k2" else (-d).exp() - 1 + d)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7},
        {"value_clip": 0.0, "value_coef": 2.0},
        {"entropy_coef": 0.3},
        {"kl_placement": "loss", "kl_estimator": "k2"},
        {"kl_placement": "loss", "kl_estimator": "forward_k3"},
    ],
    ids=str,
)
def test_gradients_are_those_of_a_second_implementation(changes):
    """After some drift, so that ratios are not 1 and some tokens and values are clipped."""
    flags = replace(FLAGS, **changes)
    policy, batch, rollout = made(flags, temperature=flags.temperature)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    found, metrics = gradient_of(policy, batch, flags, kl_coef=0.4)
    if not changes:
        scored = policy(rollout.tokens, rollout.response_mask)
        assert 0.05 < metrics["clip_share"] / rollout.mask.sum() < 0.6
        assert ((scored.values - rollout.values)[:, :-1][rollout.mask].abs() > flags.value_clip).any()
    policy.zero_grad()
    second_opinion(policy, batch, range(8), flags, kl_coef=0.4).backward()
    assert close(found, torch.cat([p.grad.flatten() for p in policy.parameters()]), 1e-5)


def test_every_minibatch_is_divided_by_its_own_tokens():
    """Eight ragged responses in minibatches of 3, 3 and 2, weights held still."""
    flags = replace(FLAGS, minibatch=3, passes=1, micro_batch=2)
    policy, batch, rollout = made()
    found, numbers = run_update(policy, batch, flags)
    order = list(step_indices(8, 3, 1, 0, "ppo 0"))
    lengths = rollout.mask.sum(dim=1)
    assert [len(rows) for rows in order] == [3, 3, 2] and numbers["updates"] == 3 and len(set(lengths.tolist())) > 3
    norms = []
    for rows, gradient in zip(order, found, strict=True):
        policy.zero_grad()
        (second_opinion(policy, batch, rows, flags, 0.05) / int(lengths[rows].sum())).backward()
        expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
        assert close(gradient, expected)
        norms.append((int(lengths[rows].sum()), float(expected.norm())))
    assert numbers["grad_norm"] == pytest.approx(sum(n * norm for n, norm in norms) / sum(n for n, _ in norms), rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("critic", [False, True])
def test_gradients_do_not_depend_on_the_micro_batch(micro_batch, critic):
    """Two passes with steps in between: the second pass has ratios other than 1."""

    def run(size):
        policy, _, rollout = made()
        if critic:
            policy = PolicyWithCritic(policy.policy, loud(ScalarModel, CONFIG, 9))
            rollout = rollout_of(policy, *models()[1:], prompts_of(8))
        return run_update(policy, make_batch(rollout, 0.05, FLAGS, ALONE), replace(FLAGS, micro_batch=size, minibatch=5), lr=0.02)

    (together, numbers), (apart, others) = run(8), run(micro_batch)
    assert len(together) == len(apart) == 4
    assert all(close(a, b, 2e-5) for a, b in zip(apart, together, strict=True))
    assert others == pytest.approx(numbers, rel=1e-4, abs=1e-6) and numbers["kl_old_tok"] > 1e-5


@pytest.mark.parametrize("rubbish", [0.0, NAN, 1e9, -1e9, math.inf])
def test_padding_changes_nothing_whatever_stands_in_it(rubbish):
    """Five more columns, and rubbish off the mask of every tensor of the batch."""
    policy, batch, rollout = made()
    expected, numbers = run_update(policy, batch, lr=0.02)

    def wider(x, fill):
        return torch.cat([x, torch.full((len(x), 5), fill, dtype=x.dtype)], dim=1)

    response_mask = wider(rollout.response_mask, False)
    spoilt = {}
    for name in LENGTHY:
        mask = response_mask if name == "values" else response_mask[:, 1:]
        if name == "values":  # those of the states in which tokens are chosen, and after the last one
            mask = mask | torch.cat([mask[:, 1:], mask[:, :1]], dim=1)
        spoilt[name] = torch.where(mask, wider(getattr(rollout, name), rubbish), rubbish)
    wide = replace(rollout, tokens=wider(rollout.tokens, PAD), response_mask=response_mask, **spoilt)
    policy, again = models()[0], make_batch(wide, 0.05, FLAGS, ALONE)
    again = Batch(wide, *(torch.where(wide.mask, x, rubbish) for x in (again.advantages, again.returns)))
    found, others = run_update(policy, again, lr=0.02)
    assert all(close(a, b, 1e-5) for a, b in zip(found, expected, strict=True))
    assert others == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def test_old_log_probabilities_stay_those_of_the_sampling():
    """The second pass finds the drift of the first: KL(old, new) is that of the model after one step, worked out here, and 0 before."""
    policy, batch, rollout = made()
    _, once = run_update(policy, batch, replace(FLAGS, passes=1), lr=0.05)
    logp = policy(rollout.tokens, rollout.response_mask).logp.detach()
    d = (logp - rollout.logp)[rollout.mask].double()
    drift, cut = float((d.exp() - 1 - d).mean()), float((d.exp() - 1).abs().gt(FLAGS.ratio_clip).double().mean())
    _, twice = run_update(models()[0], batch, replace(FLAGS, passes=2), lr=0.05)
    assert abs(once["kl_old_tok"]) < 1e-9 and once["clip_share"] == 0 and once["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert drift > 1e-3 and cut > 0
    assert 2 * twice["kl_old_tok"] == pytest.approx(drift, rel=1e-4)
    assert 0 < 2 * twice["clip_share"] < cut  # cut only where the advantage asks for more
    assert twice["updates"] == 2 and twice["first_ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("ratio", "advantage", "cut"), [(1.5, 1, True), (0.5, -1, True), (0.5, 1, False), (1.5, -1, False)])
def test_no_gradient_where_the_policy_has_gone_far_enough(ratio, advantage, cut):
    policy, batch, rollout = made()
    moved = replace(rollout, logp=rollout.logp - math.log(ratio))
    advantages = torch.where(rollout.mask, float(advantage), 0.0)
    gradient, metrics = gradient_of(policy, Batch(moved, advantages, batch.returns), replace(FLAGS, value_coef=0.0))
    assert (float(gradient.abs().max()) == 0) == cut
    assert int(metrics["clip_share"]) == (int(rollout.mask.sum()) if cut else 0) and int(metrics["overflow"]) == 0


@pytest.mark.parametrize("value_clip", [0.0, 0.2])
def test_values_count_at_most_a_clip_from_the_old_ones(value_clip):
    """Values 1 above the old ones, returns 3 above: clipped, the error is (0.2 - 3)^2 and has no gradient."""
    policy, batch, rollout = made()
    old = replace(rollout, values=rollout.values - 1)
    aims = Batch(old, torch.zeros_like(batch.advantages), old.values[:, :-1] + 3)
    gradient, metrics = gradient_of(policy, aims, replace(FLAGS, value_clip=value_clip))
    tokens = int(rollout.mask.sum())
    assert float(metrics["value_loss"]) == pytest.approx(tokens * (3.92 if value_clip else 2.0), rel=1e-5)
    assert (float(gradient.abs().max()) == 0) == (value_clip > 0)


def test_a_round_ends_at_the_target_kl():
    flags = replace(FLAGS, passes=5)
    for target, updates in ((None, 5), (1e9, 5), (1e-7, 1)):  # the second minibatch is the first to see a drift, and takes no step
        policy, batch, _ = made()
        _, numbers = run_update(policy, batch, replace(flags, target_kl=target), lr=0.02)
        assert numbers["updates"] == updates and numbers["kl_old_most"] > 1e-5  # with that of the minibatch that ended the round
    once, batch, _ = made()
    run_update(once, batch, replace(flags, passes=1), lr=0.02)
    assert same_weights(policy, weights(once)) and all(parameter.grad is None for parameter in policy.parameters())


# ---- KL in the loss


def exact_kl_of(policy, ref, rollout):
    """KL(policy || ref) per token over the whole vocabulary, in the states of a rollout."""
    p, q = (log_probs(model(rollout.tokens))[:, :-1][rollout.mask].detach() for model in (policy.policy, ref))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("estimator", ["k2", "forward_k3"])
def test_kl_in_the_loss_pulls_towards_the_reference(estimator):
    """No advantages, no values: the KL alone. A bigram with many samples, so that the estimate has its expectation's direction."""
    table, other = torch.randn(2, V, V, generator=torch.Generator().manual_seed(0))
    policy, ref = with_values(bigram(table)), bigram(other)
    rollout = rollout_of(policy, ref, Count(), [[BOS, 4]] * 300)
    batch = Batch(rollout, *torch.zeros(2, *rollout.mask.shape))
    flags = replace(FLAGS, kl_placement="loss", kl_estimator=estimator, value_coef=0.0, minibatch=300, micro_batch=100, passes=1)
    before = exact_kl_of(policy, ref, rollout)
    still, _ = run_update(policy, batch, flags, kl_coef=0.0)
    assert not still[0].any()
    (found,), _ = run_update(policy, batch, flags, kl_coef=0.4, lr=8.0)
    after = exact_kl_of(policy, ref, rollout)
    assert 0.3 < before and 0.5 * before < after < 0.9 * before
    # by hand: kl_coef / tokens * sum of k' (onehot(token) - pi) into the row of the last token; k' is d for k2, 1 - exp(-d) for k3
    last, said = rollout.tokens[:, :-1][rollout.mask], rollout.tokens[:, 1:][rollout.mask]
    logp, ref_logp = table.log_softmax(-1), other.log_softmax(-1)
    d = (logp - ref_logp)[last, said]
    slope = d if estimator == "k2" else 1 - (-d).exp()
    expected = torch.zeros(V, V).index_put((last,), slope[:, None] * (torch.eye(V)[said] - logp.exp()[last]), accumulate=True)
    assert close(found[: V * V].reshape(V, V).T, 0.4 * expected / len(d), 1e-4)


def test_kl_in_the_reward_has_no_gradient_of_its_own():
    policy, batch, rollout = made()
    elsewhere = Batch(replace(rollout, ref_logp=rollout.ref_logp - 3), batch.advantages, batch.returns)
    assert torch.equal(gradient_of(policy, batch, FLAGS, 0.05)[0], gradient_of(policy, elsewhere, FLAGS, 5.0)[0])


# ---- the order of a round


def test_order_and_shares_of_a_round():
    """Every row once per pass, in another order each time and each iteration."""
    seen = [np.concatenate(list(step_indices(8, 3, 2, 0, f"ppo {iteration}"))) for iteration in range(2)]
    for order in seen:
        assert sorted(order[:8]) == sorted(order[8:]) == list(range(8)) and list(order[:8]) != list(order[8:])
    assert list(seen[0]) != list(seen[1])


# ---- what stops a run


def test_check_of_the_first_ratio_fires_when_temperatures_differ():
    policy, batch, _ = made(temperature=0.9)
    before = weights(policy)
    with pytest.raises(NumericalError, match=r"ppo, iteration 7, update 0: the first ratio is not 1"):
        run_update(policy, batch, replace(FLAGS, temperature=1.0), lr=0.1, iteration=7)
    assert same_weights(policy, before)
    run_update(policy, batch, replace(FLAGS, temperature=0.9), lr=0.1)


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_the_first_ratio_is_the_largest_and_not_a_sum(micro_batch):
    """Eight micro-batches of which each is off by a little are off by that little."""
    policy, batch, rollout = made()
    flags = replace(FLAGS, micro_batch=micro_batch)
    _, numbers = run_update(policy, replace(batch, rollout=replace(rollout, logp=rollout.logp - 6e-6)), flags)
    assert numbers["first_ratio"] == pytest.approx(math.exp(6e-6), abs=1e-6)
    with pytest.raises(NumericalError, match="first ratio"):
        run_update(policy, replace(batch, rollout=replace(rollout, logp=rollout.logp - 2e-5)), flags)


def test_one_token_may_be_off_by_more_than_all_tokens_in_the_mean():
    """Rounding at one unlikely token stops nothing; what a wrong token or mask does there, does."""
    assert check_first_ratio(ALONE, 5e-7, 5e-4, "here") == 5e-4
    with pytest.raises(NumericalError, match="first ratio"):
        check_first_ratio(ALONE, 5e-7, 2e-3, "here")


def test_in_bf16_the_mean_of_the_first_ratios_is_checked():
    """One token of a whole batch may be off by an eighth, which is a step of a bf16 logit near 30; all tokens by 0.06 are another model."""
    half = replace(ALONE, dtype=torch.bfloat16)
    assert check_first_ratio(half, 0.01, 0.125, "here") == 0.125
    with pytest.raises(NumericalError, match="first ratio"):
        check_first_ratio(half, 0.06, 0.06, "here")
    policy, batch, rollout = made()
    with pytest.raises(NumericalError, match=r"is 6\.5\de-02 in the mean"):  # the mean over tokens, not over rows or their sum
        update(
            policy, Recorder(policy), replace(batch, rollout=replace(rollout, logp=rollout.logp - 0.065)), response_tokens=rollout.mask.sum(dim=1).numpy(),
            iteration=0, lr=0.0, kl_coef=0.05, flags=FLAGS, seed=0, world=half,
        )  # fmt: skip


@pytest.mark.parametrize("field", ["advantages", "returns", "logp", "values"])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_number_that_is_not_finite_stops_before_the_weights_change(field, bad):
    policy, batch, rollout = made()
    row, column = rollout.mask.nonzero()[-1].tolist()
    spoilt = getattr(batch if field in ("advantages", "returns") else rollout, field).clone()
    spoilt[row, column] = bad
    batch = replace(batch, **{field: spoilt}) if field in ("advantages", "returns") else replace(batch, rollout=replace(rollout, **{field: spoilt}))
    before = weights(policy)
    with pytest.raises(NumericalError, match="ppo, iteration 7, update 0: .*not finite"):
        run_update(policy, batch, replace(FLAGS, value_clip=0.0 if field != "values" else 0.2), lr=0.1, iteration=7)
    assert same_weights(policy, before)


class Infinite(torch.autograd.Function):
    """x, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(monkeypatch):
    policy, batch, _ = made()
    before, loss = weights(policy), ppo.minibatch_loss

    def broken(*arguments):
        total, metrics = loss(*arguments)
        return Infinite.apply(total), metrics

    monkeypatch.setattr(ppo, "minibatch_loss", broken)
    with pytest.raises(NumericalError, match="ppo, iteration 7, update 0: the gradient is not finite"):
        run_update(policy, batch, lr=0.1, iteration=7)
    assert same_weights(policy, before)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kl_placement": "loss"}, "k1 in the loss: its expected gradient is 0"),
        ({"kl_estimator": "k2"}, "k2 in the reward"),
        ({"kl_estimator": "k3"}, "k3 in the reward"),
        ({"kl_estimator": "k3", "kl_placement": "loss"}, "forward_k3"),
        ({"kl_estimator": "forward_k3"}, "forward_k3 in the reward"),
        ({"gae_lambda": 1.1}, "--gae-lambda 1.1"),
        ({"gae_lambda": -0.1}, "--gae-lambda -0.1"),
        ({"discount": 1.01}, "--discount 1.01"),
        ({"kl_coef": -0.1}, "--kl-coef -0.1"),
    ],
)
def test_flags_that_cannot_mean_what_they_say(changes, word):
    with pytest.raises(UsageError, match=word):
        check_ppo_flags(replace(FLAGS, **changes))


@pytest.mark.parametrize("changes", [{}, {"kl_placement": "loss", "kl_estimator": "k2"}, {"kl_placement": "loss", "kl_estimator": "forward_k3"}])
def test_flags_that_do(changes):
    check_ppo_flags(replace(FLAGS, **changes))
