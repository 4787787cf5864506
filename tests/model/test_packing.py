"""A pair in one row says what two rows say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import BOS, CPU, EOS, PAD, loud, ragged_pairs

from data.batches import PairRow, Row, collate_pairs
from losses.masked import masked_sum
from model.heads import LanguageModel, ScalarModel
from model.packing import last_column, packing
from model.score import pair_logps, pair_tensors, row_lengths, to_tensors

PARTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 3], [0, 1, 2, 2, 2, 2, 2, 2, 2]])


def test_layout_by_hand():
    layout = packing(PARTS)
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6], [0, 1, 1, 2, 3, 4, 5, 6, 7]]
    assert layout.previous.tolist() == [[0, 0, 1, 2, 3, 2, 5, 6, 7], [0, 0, 0, 2, 3, 4, 5, 6, 7]]
    sees = layout.mask[0, 0]
    assert sees[4].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert sees[5].nonzero().flatten().tolist() == [0, 1, 2, 5] and sees[7].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7]


LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)


@settings(max_examples=100)
@given(LENGTHS)
def test_every_token_sees_what_it_would_see_in_a_row_of_its_own(lengths):
    """Tokens are numbered, so what a token sees, in the order of positions, must be the beginning of its own row up to itself."""
    pairs = []
    for prompt, chosen, rejected in lengths:
        numbers = iter(range(prompt + chosen + rejected))
        p, c, r = ([next(numbers) for _ in range(count)] for count in (prompt, chosen, rejected))
        pairs.append((p, c, r))
    tokens, parts = collate_pairs([PairRow("", Row("", tuple(p), tuple(c)), Row("", tuple(p), tuple(r))) for p, c, r in pairs], -1)
    layout = packing(torch.from_numpy(parts))
    for row, (p, c, r) in enumerate(pairs):
        for own in (p + c, p + r):
            for place, token in enumerate(own):  # a token's number is its column here
                seen = layout.mask[row, 0, token].nonzero().flatten().tolist()
                assert sorted(seen, key=lambda column: layout.positions[row, column]) == own[: place + 1]
                assert layout.positions[row, token] == place
                assert place == 0 or layout.previous[row, token] == own[place - 1]
        assert layout.mask[row, 0].any(dim=-1).all()  # no row of padding sees nothing, which would make NaN
        if c and r:
            assert [int(last_column(torch.from_numpy(parts), part)[row]) for part in range(3)] == [p[-1], c[-1], r[-1]]


def separate(pairs):
    """All chosen rows, then all rejected ones."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def with_gradients(model, values):
    """Values, and the gradient of their sum weighted by 1, 2, 3, ... (so that no two rows may be exchanged)."""
    model.zero_grad()
    (values * torch.arange(1, values.numel() + 1).view_as(values)).sum().backward()
    return values.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
def test_packed_equals_separate_with_gradients(kind):
    model, pairs = loud(kind), ragged_pairs(9)
    rows = separate(pairs)
    tokens, mask = to_tensors(rows, PAD, CPU)
    if kind is ScalarModel:
        packed, parts = pair_tensors(pairs, PAD, CPU)
        one, two = model(packed, parts=parts), model(tokens, row_lengths(rows, CPU))
    else:
        one, two = pair_logps(model, pairs, PAD, CPU), masked_sum(model(tokens, mask).logp, mask[:, 1:])
    (one, one_grads), (two, two_grads) = with_gradients(model, one), with_gradients(model, two.view(2, -1).T)
    assert torch.allclose(one, two, atol=1e-5, rtol=1e-5) and one.std() > 0.3
    for a, b in zip(one_grads, two_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-4)


IDS = st.lists(st.integers(4, 60), max_size=6)
PAIRS = st.lists(st.tuples(IDS, IDS, IDS, st.booleans()), min_size=1, max_size=5)
MODELS = {kind: loud(kind) for kind in (LanguageModel, ScalarModel)}


@torch.no_grad()
@settings(max_examples=40)
@given(PAIRS)
def test_any_packed_batch_scores_each_response_as_alone(drawn):
    """Prompts of BOS alone, empty and endless responses among them; each compared with a batch of one row without padding."""
    pairs = []
    for prompt, chosen, rejected, ends in drawn:
        prompt, ends = (BOS, *prompt), (EOS,) if ends else ()
        pairs.append(PairRow("", Row("", prompt, (*chosen, 5, *ends)), Row("", prompt, (*rejected, EOS))))
    logps, (tokens, parts) = pair_logps(MODELS[LanguageModel], pairs, PAD, CPU), pair_tensors(pairs, PAD, CPU)
    scores = MODELS[ScalarModel](tokens, parts=parts)
    for row, pair in enumerate(pairs):
        for place, alone in enumerate((pair.chosen, pair.rejected)):
            ids = torch.tensor([alone.prompt + alone.response])
            logits = MODELS[LanguageModel](ids)[0].double().log_softmax(-1)
            expected = sum(float(logits[len(alone.prompt) + i - 1, token]) for i, token in enumerate(alone.response))
            assert abs(float(logps[row, place]) - expected) < 1e-4
            assert abs(float(scores[row, place] - MODELS[ScalarModel](ids, torch.tensor([alone.length]))[0])) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
def test_responses_do_not_see_each_other(kind):
    """Another rejected response leaves the chosen one's number alone, and the other way round."""
    model, pair = loud(kind), ragged_pairs(1)[0]
    other = Row(pair.id, pair.chosen.prompt, (7, 8, 9, 2))

    def numbers(chosen, rejected):
        pairs = [type(pair)(pair.id, chosen, rejected)]
        tokens, parts = pair_tensors(pairs, PAD, CPU)
        return (model(tokens, parts=parts) if kind is ScalarModel else pair_logps(model, pairs, PAD, CPU))[0]

    both = numbers(pair.chosen, pair.rejected)
    for place, changed in enumerate((numbers(pair.chosen, other), numbers(other, pair.rejected))):
        assert abs(float(changed[place] - both[place])) < 1e-5 and abs(float(changed[1 - place] - both[1 - place])) > 1e-2
