"""A pair in one row says what two rows say."""

import pytest
import torch
from small import CPU, PAD, loud, ragged_pairs

from data.batches import Row
from losses.masked import masked_sum
from model.heads import LanguageModel, ScalarModel
from model.packing import packing
from model.score import pair_logps, pair_tensors, row_lengths, to_tensors

PARTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 3], [0, 1, 2, 2, 2, 2, 2, 2, 2]])


def test_layout_by_hand():
    layout = packing(PARTS)
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6], [0, 1, 1, 2, 3, 4, 5, 6, 7]]
    assert layout.previous.tolist() == [[0, 0, 1, 2, 3, 2, 5, 6, 7], [0, 0, 0, 2, 3, 4, 5, 6, 7]]
    sees = layout.mask[0, 0]
    assert sees[4].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert sees[5].nonzero().flatten().tolist() == [0, 1, 2, 5] and sees[7].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7]


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
