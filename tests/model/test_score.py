"""Frozen models read rows: in order, whatever the batch; and a cache of reference log-probabilities that is never stale."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small import ALONE, PAD, loud, ragged_pairs, ragged_rows

from data.errors import CheckpointError, NumericalError
from model.heads import LanguageModel, ScalarModel
from model.score import cached_logps, reference_logps, reward_scores, reward_scores_of_pairs

KEY = {"weights": "ab12", "tokenizer": "cd34", "max_prompt": 64, "max_response": 32, "dtype": "fp32"}


def one_by_one(read, rows):
    return [float(read(torch.tensor([row.prompt + row.response]), len(row.prompt))) for row in rows]


def both(read, pairs):
    """(N, 2): chosen and rejected, each in a row of its own."""
    return np.array([one_by_one(read, [pair.chosen, pair.rejected]) for pair in pairs])


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_reward_scores_come_back_in_order(batch):
    model, rows = loud(ScalarModel).train(), ragged_rows(23)
    found = reward_scores(model, rows, PAD, ALONE, batch)
    expected = one_by_one(lambda tokens, start: model(tokens)[0, -1], rows)
    assert found.dtype == np.float64 and found == pytest.approx(np.array(expected), abs=1e-5)
    assert np.std(expected) > 0.3 and not model.training


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_scores_of_pairs_are_those_of_rows_of_their_own(batch):
    model, pairs = loud(ScalarModel).train(), ragged_pairs(23)
    found = reward_scores_of_pairs(model, pairs, PAD, ALONE, batch)
    assert found == pytest.approx(both(lambda tokens, start: model(tokens)[0, -1], pairs), abs=1e-5) and not model.training


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_reference_logps_are_sums_over_response_tokens(batch):
    model, pairs = loud(LanguageModel), ragged_pairs(23)

    def plain(tokens, start):
        logps = model(tokens)[0, :-1].log_softmax(-1)
        return sum(logps[column - 1, tokens[0, column]] for column in range(start, tokens.shape[1]))

    assert reference_logps(model, pairs, PAD, ALONE, batch) == pytest.approx(both(plain, pairs), abs=1e-4)


def test_no_rows_give_no_scores():
    assert reward_scores(loud(ScalarModel), [], PAD, ALONE).shape == (0,)


# ---- the cache


def fill(folder, key=KEY, ids=("a", "b", "c"), values=((1.5, -2.25), (0.1, 1 / 3), (-4.0, 1e-9)), is_main=True):
    """cached_logps, and whether it had to compute."""
    computed = []

    def compute():
        computed.append(True)
        return np.array(values)

    return cached_logps(folder, key, ids, compute, dataclasses.replace(ALONE, rank=0 if is_main else 1)), bool(computed)


def test_the_same_key_and_rows_are_read_back_bit_for_bit(tmp_path):
    first, computed = fill(tmp_path)
    assert computed
    again, computed = fill(tmp_path, values=((9, 9),) * 3)
    assert not computed and again.dtype == np.float64 and (again == first).all()
    assert fill(tmp_path, key=dict(reversed(KEY.items())))[1] is False  # the order of the key's fields is nothing


def test_a_key_of_tuples_is_found_again(tmp_path):
    key = KEY | {"limits": (64, 32)}
    assert [fill(tmp_path, key)[1], fill(tmp_path, key)[1]] == [True, False]


@pytest.mark.parametrize("field", KEY)
def test_whatever_changes_in_the_key_is_a_miss(field, tmp_path):
    fill(tmp_path)
    assert fill(tmp_path, KEY | {field: "other"})[1]
    assert fill(tmp_path, {name: value for name, value in KEY.items() if name != field})[1]
    assert not fill(tmp_path)[1]


@pytest.mark.parametrize("ids", [("a", "c", "b"), ("a", "b"), ("a", "b", "d")])
def test_other_rows_are_a_miss(ids, tmp_path):
    fill(tmp_path)
    assert fill(tmp_path, ids=ids, values=((1, 2),) * len(ids))[1]


def test_a_missing_row_is_named(tmp_path):
    fill(tmp_path)
    (path,) = tmp_path.glob("reference-*.json")
    kept = json.loads(path.read_text())
    del kept["logps"]["b"]
    path.write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=r"reference-.*missing rows: \['b'\].*remove it"):
        fill(tmp_path)


def test_a_cut_or_foreign_cache_is_refused(tmp_path):
    fill(tmp_path)
    (path,) = tmp_path.glob("reference-*.json")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        fill(tmp_path)
    first = json.loads(whole)["logps"]["a"][0]
    for old, new in (("ab12", "ab13"), (str(first), str(first + 0.5))):  # another key; one number changed
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(CheckpointError, match="not the cache its name says"):
            fill(tmp_path)


def test_other_processes_compute_but_do_not_write(tmp_path):
    assert fill(tmp_path, is_main=False)[1] and not list(tmp_path.iterdir())


def test_cached_equals_live(tmp_path):
    model, pairs = loud(LanguageModel), ragged_pairs(9)

    def compute():
        return reference_logps(model, pairs, PAD, ALONE)

    ids = [pair.id for pair in pairs]
    with pytest.raises(NumericalError, match=f"rows {ids[2]} .1 such. are not finite"):
        cached_logps(tmp_path, KEY, ids, lambda: np.where(np.arange(9)[:, None] == 2, np.nan, compute()), ALONE)
    live = cached_logps(tmp_path, KEY, ids, compute, ALONE)
    assert live.shape == (9, 2) and (cached_logps(tmp_path, KEY, ids, compute, ALONE) == live).all()
    assert (compute() == live).all()
