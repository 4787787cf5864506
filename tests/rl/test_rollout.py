"""What a rollout record says, by hand for a bigram model; whose randomness it is; and that old log-probabilities are the update's."""

import math
from dataclasses import fields, replace

import pytest
import torch
from toy import ALONE, BOS, CONFIG, EOS, PAD, V, Count, bigram, chain, loud, models, prompts_of, responses_of, rollout_of, with_values

from model.heads import LanguageModel, PolicyWithCritic, ScalarModel
from rl.ppo import summary
from rl.rewards import token_rewards

PROMPTS = [[BOS, 4], [BOS, 4, 4, 8], [BOS, 9], [BOS, 4, 10]]
CERTAIN = chain({4: 5, 5: 6, 6: EOS, 8: EOS, 9: 9, 10: 5})
# responses of at most 3:  5 6 end (end in the last slot) | end (first) | 9 9 9 (cut) | 5 6 end


@pytest.fixture
def told():
    """The rollout of a bigram that is certain, at most three tokens, and its reward model: twice the count of 5s, minus 1."""
    reward_model = Count(5)
    values = [float(token) for token in range(V)]
    model = with_values(bigram(CERTAIN), values)
    return rollout_of(model, bigram(CERTAIN), reward_model, PROMPTS, max_new_tokens=3, score_mean=0.5, score_std=0.5), reward_model


def test_tokens_masks_lengths_and_ends(told):
    rollout, _ = told
    assert rollout.lengths.tolist() == [5, 5, 5, 6]
    assert rollout.tokens.tolist() == [
        [BOS, 4, 5, 6, EOS, PAD],
        [BOS, 4, 4, 8, EOS, PAD],
        [BOS, 9, 9, 9, 9, PAD],
        [BOS, 4, 10, 5, 6, EOS],
    ]
    assert rollout.response_mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert rollout.ended.tolist() == [True, True, False, True]
    assert torch.equal(rollout.mask, rollout.response_mask[:, 1:])


def test_the_penalty_meets_the_cut_response_alone(told):
    """An end token in the last slot allowed is an end, and so is one in the first."""
    rollout, _ = told
    assert rollout.raw_scores.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert rollout.scores.tolist() == [1.0, -1.0, -2.5, 1.0]
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.mask, 0.3)
    assert rewards.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, -1, 0], [0, 0, 0, -2.5, 0], [0, 0, 0, 0, 1]]


def test_the_reward_model_sees_the_text_up_to_the_end_token(told):
    _, reward_model = told
    ((tokens, lengths),) = reward_model.seen
    assert sorted(lengths.tolist()) == [5, 5, 5, 6]
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[length:] == PAD).all() and (row[:length] != PAD).all() and EOS not in row[: length - 1]


def test_values_are_those_of_the_state_after_each_token(told):
    rollout, _ = told
    real = torch.arange(6) < rollout.lengths[:, None]
    assert torch.equal(rollout.values[real], rollout.tokens[real].float())  # the value head reads off the id of the last token


def test_the_summary_is_per_response_and_per_token(told):
    rollout, _ = told
    kl = torch.where(rollout.mask, 0.5, 0.0)
    numbers = summary(replace(rollout, kl=kl), ALONE)
    assert numbers == pytest.approx(
        {"score": -0.375, "raw_score": 0.5, "kl_ref_seq": 1.25, "kl_ref_tok": 0.5, "ended": 0.75, "length": 2.5, "empty": 0.25}
    )


def test_empty_is_an_end_token_alone_and_not_one_token_that_was_cut():
    rollout = rollout_of(with_values(bigram(CERTAIN)), bigram(CERTAIN), Count(), PROMPTS, max_new_tokens=1)
    assert responses_of(rollout) == [[5], [EOS], [9], [5]]
    numbers = summary(rollout, ALONE)
    assert (numbers["empty"], numbers["ended"], numbers["length"]) == (0.25, 0.25, 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_entropy_and_kl_by_table(temperature):
    generator = torch.Generator().manual_seed(0)
    table, other = torch.randn(2, V, V, generator=generator)
    policy = with_values(bigram(table))
    rollout = rollout_of(policy, bigram(other), Count(), prompts_of(6), temperature=temperature, max_new_tokens=5)
    read, said = rollout.tokens[:, :-1], rollout.tokens[:, 1:]
    mask = rollout.mask
    logp, ref_logp = ((t / temperature).log_softmax(-1)[read, said] for t in (table, other))
    assert mask.any(dim=1).all() and not mask.all()
    for found, expected in ((rollout.logp, logp), (rollout.ref_logp, ref_logp), (rollout.kl, logp - ref_logp)):
        assert (found - expected)[mask].abs().max() < 1e-5 and not found[~mask].any()
    p = (table / temperature).softmax(-1)
    entropy = policy(rollout.tokens, rollout.response_mask, temperature=temperature, with_entropy="value").entropy
    assert (entropy - (-(p * p.log()).sum(-1))[read])[mask].abs().max() < 1e-5


def test_temperature_is_that_of_the_sampling_too():
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    cold = rollout_of(with_values(bigram(table)), bigram(table), Count(), [[BOS, 4]] * 20, temperature=1e-3)
    warm = rollout_of(with_values(bigram(table)), bigram(table), Count(), [[BOS, 4]] * 20)
    expected, token = [], 4
    while len(expected) < 8 and token != EOS:
        token = int(table[token].argmax())
        expected.append(token)
    assert all(response == expected for response in responses_of(cold))
    assert len({tuple(response) for response in responses_of(warm)}) > 10


def test_mean_kl_of_samples_is_the_kl_of_the_models():
    """2,000 first tokens: the mean of k1 lies within four standard errors of sum p log(p / q), and so has its sign and its size."""
    table, other = 0.7 * torch.randn(2, V, V, generator=torch.Generator().manual_seed(2))
    rollout = rollout_of(with_values(bigram(table)), bigram(other), Count(), [[BOS, 4]] * 2000, max_new_tokens=1, micro_batch=500)
    logp, ref_logp = table[4].log_softmax(-1), other[4].log_softmax(-1)
    exact = float((logp.exp() * (logp - ref_logp)).sum())
    sampled = rollout.kl.sum(dim=1)
    assert exact > 0.2 and abs(float(sampled.mean()) - exact) < 4 * float(sampled.std()) / math.sqrt(2000)


# ---- old, new and reference are one forward


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_1_in_any_company(temperature):
    policy, ref, reward_model = models()
    rollout = rollout_of(policy, ref, reward_model, prompts_of(12), temperature=temperature)
    for rows in ([5], [11, 0, 3], list(range(12))):
        logp = policy.train()(rollout.tokens[rows], rollout.response_mask[rows], temperature=temperature).logp
        ratio = (logp - rollout.logp[rows]).exp()[rollout.mask[rows]]
        assert (ratio - 1).abs().max() < 1e-5


def test_old_log_probabilities_are_those_of_full_logits():
    policy, ref, reward_model = models()
    rollout = rollout_of(policy, ref, reward_model, prompts_of(6), temperature=0.7)
    for model, found in ((policy.policy, rollout.logp), (ref, rollout.ref_logp)):
        for row in range(6):
            length = int(rollout.response_mask[row].nonzero().max()) + 1
            alone = rollout.tokens[row, :length]
            logps = (model(alone[None])[0, :-1].double() / 0.7).log_softmax(-1).gather(-1, alone[1:, None])[:, 0]
            mask = rollout.mask[row, : length - 1]
            assert (logps[mask] - found[row, : length - 1][mask]).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("critic", [False, True])
def test_kl_is_exactly_0_when_policy_and_reference_are_the_same(temperature, critic):
    same = [loud(LanguageModel, CONFIG) for _ in range(2)]
    reward_model = loud(ScalarModel, CONFIG, 2)
    policy = PolicyWithCritic(same[0], loud(ScalarModel, CONFIG, 2)) if critic else with_values(same[0])
    rollout = rollout_of(policy, same[1], reward_model, prompts_of(8), temperature=temperature, micro_batch=3)
    assert rollout.mask.sum() > 20 and not rollout.kl.any()
    assert torch.equal(rollout.logp, rollout.ref_logp)


def test_raw_scores_are_those_of_each_text_alone():
    policy, ref, reward_model = models()
    rollout = rollout_of(policy, ref, reward_model, prompts_of(12), micro_batch=5)
    assert 0 < rollout.ended.sum() < 12
    for row in range(12):
        length = int(rollout.response_mask[row].nonzero().max()) + 1
        alone = rollout.tokens[row : row + 1, :length]
        assert bool(rollout.ended[row]) == (alone[0, -1] == EOS)
        score = reward_model(alone, torch.tensor([length])).item()
        assert float(rollout.raw_scores[row]) == pytest.approx(score, abs=1e-5)
        expected = (score - 0.25) / 2.0 - (0.0 if rollout.ended[row] else 1.5)
        assert float(rollout.scores[row]) == pytest.approx(expected, abs=1e-5)


def test_a_critic_from_the_reward_model_starts_with_its_scores():
    policy, ref, reward_model = models()
    critic = loud(ScalarModel, CONFIG, 2)
    rollout = rollout_of(PolicyWithCritic(policy.policy, critic, score_mean=0.25, score_std=2.0), ref, reward_model, prompts_of(12))
    last = [int(row.nonzero().max()) for row in rollout.response_mask]
    expected = [(raw - 0.25) / 2.0 for raw in rollout.raw_scores.tolist()]  # the rewards' unit, before any end penalty
    assert rollout.values[range(12), last].tolist() == pytest.approx(expected, abs=1e-6)


# ---- whose randomness it is


def assert_same_rows(found, expected, rows):
    """Rows of two rollouts, whose padding may differ in width: tokens equal, numbers within 1e-5."""
    for field in fields(expected):
        for row, other in enumerate(rows):
            a, b = getattr(found, field.name)[row], getattr(expected, field.name)[other]
            mask = expected.response_mask[other] if field.name in ("tokens", "values", "response_mask") else expected.mask[other]
            if a.dim():
                width = min(len(a), len(b))
                assert not mask[width:].any()
                a, b = a[:width][mask[:width]], b[:width][mask[:width]]
            assert torch.equal(a, b) if a.dtype != torch.float32 else (a - b).abs().max() < 1e-5, field.name


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_rollouts_do_not_depend_on_the_micro_batch(micro_batch):
    together, apart = (rollout_of(*models(), prompts_of(8), micro_batch=size) for size in (8, micro_batch))
    assert torch.equal(together.tokens, apart.tokens) and torch.equal(together.response_mask, apart.response_mask)
    assert_same_rows(apart, together, range(8))


def test_rollouts_do_not_depend_on_batch_mates():
    prompts = prompts_of(8)
    together = rollout_of(*models(), prompts)
    for rows in ([3], [6, 1], [7, 5, 2, 0]):
        assert_same_rows(rollout_of(*models(), [prompts[r] for r in rows], keys=rows), together, rows)


def test_two_ranks_sample_what_one_does():
    prompts = prompts_of(9)
    together = rollout_of(*models(), prompts)
    for rank in range(2):
        rows = list(range(rank, 9, 2))
        world = replace(ALONE, rank=rank, size=2)
        assert_same_rows(rollout_of(*models(), prompts[rank::2], keys=rows, world=world), together, rows)


def test_randomness_follows_key_step_and_seed():
    prompt = [prompts_of(1)[0]] * 6
    first = responses_of(rollout_of(*models(), prompt))
    assert len({tuple(response) for response in first}) == 6  # one prompt, six keys
    assert responses_of(rollout_of(*models(), prompt)) == first
    assert responses_of(rollout_of(*models(), prompt, keys=[5, 4, 3, 2, 1, 0])) == first[::-1]
    for changed in ({"step": 1}, {"seed": 4}):
        assert responses_of(rollout_of(*models(), prompt, **changed)) != first


def test_a_rollout_is_data():
    those = models()
    state = torch.get_rng_state()
    rollout = rollout_of(*those, prompts_of(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(getattr(rollout, field.name).requires_grad for field in fields(rollout))
    assert all(getattr(rollout, name).dtype == torch.float32 for name in ("scores", "logp", "ref_logp", "kl", "values"))
    assert max(map(len, responses_of(rollout))) <= 8
