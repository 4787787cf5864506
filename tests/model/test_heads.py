"""What stands on the trunk: token scores against a plain log-softmax, the scalar model's place, PPO's policy with critic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peak import Peak
from small import ALONE, BOS, CONFIG, CPU, EOS, PAD, loud, ragged_pairs, ragged_rows

from data.batches import PairRow, Row
from losses.reward import reward_loss
from model import heads
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel, predicting, score_tokens
from model.packing import packing
from model.score import pair_tensors, row_lengths, to_tensors
from model.transformer import up_to_last


def plain_logps(model, tokens, mask, temperature=1.0):
    """The same numbers from all logits at once: (B, T-1), 0 off the mask."""
    logits = model(tokens)[:, :-1] / temperature
    logps = F.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.where(mask[:, 1:], logps, 0.0)


def value_and_gradient(model, logps):
    """The value and the flat gradient of a sum in which every token has another weight."""
    model.zero_grad()
    (logps * torch.linspace(0.5, 1.5, logps.numel()).view_as(logps)).sum().backward()
    return logps.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masked_scores_are_the_log_softmax_of_all_logits(temperature, tied):
    model = loud(LanguageModel, replace(CONFIG, tied=tied))
    tokens, mask = to_tensors(ragged_rows(6), PAD, CPU)
    found, gradient = value_and_gradient(model, model(tokens, mask, temperature=temperature).logp)
    expected, expected_gradient = value_and_gradient(model, plain_logps(model, tokens, mask, temperature))
    assert found.dtype == torch.float32 and found.shape == (6, tokens.shape[1] - 1)
    assert (found - expected).abs().max() < 1e-5
    assert (gradient - expected_gradient).abs().max() < 1e-5 * expected_gradient.abs().max()
    assert (found[~mask[:, 1:]] == 0).all() and (found[mask[:, 1:]] < 0).all()


def test_chunks_give_the_same_and_never_more_logits_than_a_chunk(monkeypatch):
    model = loud(LanguageModel)
    tokens, mask = to_tensors(ragged_rows(6), PAD, CPU)
    asked = []
    model.lm_head.register_forward_hook(lambda module, args, out: asked.append(out.shape[0]))
    whole, whole_gradient = value_and_gradient(model, model(tokens, mask).logp)
    assert asked == [int(mask.sum())]  # response tokens alone

    asked.clear()
    monkeypatch.setattr(heads, "CHUNK", 5)
    chunked, gradient = value_and_gradient(model, model(tokens, mask).logp)
    assert max(asked) == 5 and sum(asked) == 2 * int(mask.sum())  # forward, and once more on the way back
    assert (chunked - whole).abs().max() < 1e-5
    assert (gradient - whole_gradient).abs().max() < 1e-5 * whole_gradient.abs().max()


@pytest.mark.parametrize("chunk", [4096, 5])
def test_entropy_is_that_of_the_scaled_distribution(chunk, monkeypatch):
    monkeypatch.setattr(heads, "CHUNK", chunk)
    model = loud(LanguageModel)
    tokens, mask = to_tensors(ragged_rows(4), PAD, CPU)
    scores = score_tokens(model.trunk(tokens), tokens, mask, model.lm_head, 0.7, with_entropy="gradient")
    probabilities = (model(tokens)[:, :-1] / 0.7).softmax(dim=-1)
    plain = torch.where(mask[:, 1:], -(probabilities * probabilities.log()).sum(dim=-1), 0.0)
    found, gradient = value_and_gradient(model, scores.entropy)
    expected, expected_gradient = value_and_gradient(model, plain)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5
    assert (gradient - expected_gradient).abs().max() < 1e-5 * expected_gradient.abs().max()
    alone = score_tokens(model.trunk(tokens), tokens, mask, model.lm_head, 0.7, with_entropy="value")
    assert torch.equal(alone.entropy, scores.entropy) and not alone.entropy.requires_grad and alone.logp.requires_grad
    assert model(tokens, mask).entropy is None


def test_an_entropy_without_gradient_keeps_no_logits_for_the_backward_pass():
    """In numbers of all logits, R V: log-probabilities, the gradient at them and at the logits; with a bonus the entropy's products, too."""
    tokens, mask = torch.randint(4, 8000, (4, 40)), torch.ones(4, 40, dtype=torch.bool)
    model, most = PolicyWithCritic(LanguageModel(replace(CONFIG, vocab_size=8000)), None), {}
    for way in ("", "value", "gradient"):
        with Peak() as peak:
            scores = model(tokens, mask, with_entropy=way)
            (scores.logp.sum() + (scores.entropy.sum() if way == "gradient" else 0)).backward()
        model.zero_grad()
        most[way] = peak.most / (4 * 39 * 4 * 8000)
    assert most == pytest.approx({"": 3, "value": 3, "gradient": 6}, rel=0.15)


def test_rows_with_an_empty_mask_score_0_and_change_nothing():
    model = loud(LanguageModel)
    tokens, mask = to_tensors(ragged_rows(5), PAD, CPU)
    full = model(tokens, mask).logp
    mask[[0, 3]] = False
    some = model(tokens, mask).logp
    assert (some[[0, 3]] == 0).all() and torch.allclose(some[[1, 2, 4]], full[[1, 2, 4]], atol=1e-6)
    none = model(tokens, torch.zeros_like(mask)).logp
    assert (none == 0).all()
    none.sum().backward()  # a process whose rows are all empty still takes part in the step
    assert all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in model.parameters())


def test_masks_and_scores_are_the_same_where_padding_is_the_end_token():
    model, rows = loud(LanguageModel), ragged_rows(6)
    (tokens, mask), (other_tokens, other_mask) = (to_tensors(rows, pad, CPU) for pad in (PAD, EOS))
    assert torch.equal(mask, other_mask) and not torch.equal(tokens, other_tokens)
    assert torch.equal(model(tokens, mask).logp, model(other_tokens, other_mask).logp)


@torch.no_grad()
def test_bf16_autocast_gives_float32_numbers_near_those_of_fp32():
    world = replace(ALONE, dtype=torch.bfloat16)
    model, scalar, rows = loud(LanguageModel), loud(ScalarModel), ragged_rows(40)
    tokens, mask = to_tensors(rows, PAD, CPU)
    exact, exact_scores = plain_logps(model, tokens, mask), scalar(tokens, row_lengths(rows, CPU))
    with world.autocast():
        logp, scores = model(tokens, mask).logp, scalar(tokens, row_lengths(rows, CPU))
    assert logp.dtype == scores.dtype == torch.float32
    for found, expected in ((logp[mask[:, 1:]], exact[mask[:, 1:]]), (scores, exact_scores)):
        assert 0 < (found - expected).abs().max() < 0.1
        assert (found - expected).mean().abs() < 0.01
    steps_of_bf16 = scores.bfloat16().float()  # 1/64 between 2 and 4: gaps between scores would come in such steps
    assert (scores != steps_of_bf16).any()


# ---- the scalar model


@torch.no_grad()
def test_a_score_is_read_at_the_last_real_token():
    model = loud(ScalarModel)
    rows = [Row("a", (BOS, 7, EOS, 9), (8, PAD, 11)), Row("b", (BOS, 5), (6, EOS)), Row("c", (BOS, PAD, EOS, PAD), (PAD,))]
    tokens, _ = to_tensors(rows, PAD, CPU)
    everywhere = model(tokens)
    assert everywhere.shape == tokens.shape and everywhere.dtype == torch.float32
    found = model(tokens, row_lengths(rows, CPU))
    assert torch.allclose(found, everywhere[[0, 1, 2], [6, 3, 4]], atol=1e-6)
    by_hand = (model.trunk(tokens) * model.score.weight[0]).sum(-1)[[0, 1, 2], [6, 3, 4]]
    assert torch.allclose(found, by_hand, atol=1e-5)
    longer = torch.cat([tokens, torch.full((3, 100), PAD)], dim=1)
    assert torch.allclose(model(longer, row_lengths(rows, CPU)), found, atol=1e-5)


@torch.no_grad()
def test_swapping_the_halves_of_a_pair_negates_the_gap():
    model, pairs = loud(ScalarModel), ragged_pairs(5)
    gaps = []
    for rows in (pairs, [PairRow(pair.id, pair.rejected, pair.chosen) for pair in pairs]):
        tokens, parts = pair_tensors(rows, PAD, CPU)
        first, second = model(tokens, parts=parts).unbind(dim=1)
        gaps.append(first - second)
    assert gaps[0].abs().min() > 1e-3
    assert torch.allclose(gaps[0], -gaps[1], atol=1e-5, rtol=0)  # the order of the sums differs
    assert torch.allclose(reward_loss(gaps[0], torch.zeros(5)) - reward_loss(gaps[1], torch.zeros(5)), -gaps[0], atol=1e-5)


def test_a_mask_up_to_its_last_true():
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert up_to_last(mask).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]


def test_the_states_that_predict_the_response():
    """Those before its tokens; of a packed pair the prompt's end predicts the first of both."""
    assert predicting(torch.tensor([[False, False, True, True, False], [False] * 5])).int().tolist() == [[0, 1, 1, 0, 0], [0] * 5]
    parts = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 3]])
    assert predicting((parts == 1) | (parts == 2), packing(parts).previous).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]


# ---- policy with critic


def test_a_value_head_stands_on_the_trunk_and_starts_at_0():
    policy = loud(LanguageModel)
    model = PolicyWithCritic(policy, None)
    tokens, mask = to_tensors(ragged_rows(4), PAD, CPU)
    scores = model(tokens, mask, temperature=0.7)
    assert scores.values.shape == tokens.shape and scores.values.dtype == torch.float32
    assert (scores.values == 0).all()
    assert torch.equal(scores.logp, policy(tokens, mask, temperature=0.7).logp)
    assert scores.entropy is None
    assert model(tokens, mask, with_entropy="value").entropy.shape == scores.logp.shape
    torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
    values, read = model(tokens, mask).values, mask | predicting(mask)
    assert torch.allclose(values[read], (policy.trunk(tokens) @ model.value_head.weight[0])[read], atol=1e-5) and (values[~read] == 0).all()
    values.sum().backward()
    assert policy.trunk.embedding.weight.grad.abs().sum() > 0 and policy.lm_head.weight.grad is None


def test_a_separate_critic_shares_nothing_with_the_policy():
    policy, critic = loud(LanguageModel), loud(ScalarModel, seed=1)
    model = PolicyWithCritic(policy, critic)
    tokens, mask = to_tensors(ragged_rows(4), PAD, CPU)
    scores = model(tokens, mask)
    read = mask | predicting(mask)
    assert torch.allclose(scores.values[read], critic(tokens)[read], atol=1e-5) and torch.equal(scores.logp, policy(tokens, mask).logp)
    assert not any(name.startswith("value_head") for name, _ in model.named_parameters())
    scores.values.sum().backward(retain_graph=True)
    assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in policy.parameters())
    model.zero_grad()
    scores.logp.sum().backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
