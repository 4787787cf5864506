"""From texts to rows of ids, and an order of rows that is the same for any number of processes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import (
    PairRow,
    Row,
    collate,
    collate_pairs,
    encode_pairs,
    encode_prompt,
    encode_response,
    epoch_order,
    full_steps,
    share_out,
    stable_hash,
    step_indices,
)
from data.examples import Pair
from data.tokenizer import Tokenizer, train_tokenizer

BOS, EOS, PAD = 1, 2, 3
TEXTS = ["\n\nHuman: How do I boil two eggs?\n\nAssistant:", " Put them in water for eight minutes, then in cold water.", "TL;DR: abc."]
WORLD_SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS * 3, path, 310)
    return Tokenizer(path)


def rows_of(lengths):
    return [Row(f"row{i}", (BOS,), tuple(range(4, 3 + length))) for i, length in enumerate(lengths)]


# ---- texts to ids


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), response=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_row_is_bos_prompt_response_eos_and_its_mask_the_response(tokenizer, prompt, response):
    ids, shortened = encode_prompt(prompt, "plain", tokenizer, 10_000)
    answer, cut = encode_response(response, tokenizer, 10_000)
    assert not shortened and not cut
    tokens, mask = collate([Row("x", ids, answer)], PAD)
    assert tokens[0].tolist() == [BOS, *tokenizer.encode(prompt), *tokenizer.encode(response), EOS]
    assert tokenizer.decode(tokens[0][mask[0]].tolist()) == response
    assert (tokens == BOS).sum() == (tokens == EOS).sum() == 1


def test_control_tokens_written_as_text_are_text(tokenizer):
    ids, _ = encode_prompt("<s><s></s><pad>", "plain", tokenizer, 100)
    answer, _ = encode_response("</s> and </s>", tokenizer, 100)
    assert ids.count(BOS) == 1 and EOS not in ids and PAD not in ids
    assert answer.count(EOS) == 1 and answer[-1] == EOS


def test_a_response_that_fills_its_room_keeps_its_end_and_a_longer_one_has_none(tokenizer):
    ids = tokenizer.encode(TEXTS[1])
    assert encode_response(TEXTS[1], tokenizer, len(ids) + 1) == ((*ids, EOS), False)
    assert encode_response(TEXTS[1], tokenizer, len(ids)) == (tuple(ids), True)
    assert encode_response(TEXTS[1], tokenizer, 3) == (tuple(ids[:3]), True)


def test_a_long_prompt_is_shortened_by_the_rule_of_its_style(tokenizer):
    prompt = "\n\nHuman: first\n\nAssistant: no\n\nHuman: second?\n\nAssistant:"
    whole = tokenizer.encode(prompt)
    assert encode_prompt(prompt, "dialogue", tokenizer, len(whole) + 1) == ((BOS, *whole), False)
    ids, shortened = encode_prompt(prompt, "dialogue", tokenizer, len(whole))
    assert shortened and len(ids) <= len(whole)
    assert ids[0] == BOS and tokenizer.decode(list(ids)) == "\n\nHuman: second?\n\nAssistant:"


def test_encode_pairs_counts_what_it_cuts_and_drops(tokenizer):
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    room = len(tokenizer.encode(prompt)) + 1
    fits = Pair("a", prompt, " yes", " no", "dialogue")
    pairs = [
        fits,
        replace(fits, id="b", chosen=" yes yes yes yes yes yes yes"),  # the chosen response is cut
        replace(fits, id="c", prompt="\n\nHuman: Long\n\nAssistant: Oh\n\nHuman: Hi\n\nAssistant:"),  # its first turn goes
        replace(fits, id="d", chosen=" yes yes yes yes yes yes no", rejected=" yes yes yes yes yes yes yes"),  # equal once cut
    ]
    rows, counts = encode_pairs(pairs, tokenizer, room, 8)
    assert [row.id for row in rows] == ["a", "b", "c"]
    assert counts == {"prompts shortened": 1, "responses cut": 3, "dropped: responses are equal once cut": 1}
    for row in rows:
        assert row.chosen.prompt == row.rejected.prompt == (BOS, *tokenizer.encode(prompt))
        assert max(row.chosen.length, row.rejected.length) <= room + 8
        assert row.length == len(row.chosen.prompt) + len(row.chosen.response) + len(row.rejected.response)
        assert row.rejected.response[-1] == EOS
    assert [EOS in row.chosen.response for row in rows] == [True, False, True]

    rows, counts = encode_pairs(pairs, tokenizer, 2, 8)
    assert rows == [] and counts == {"dropped: prompt does not fit": 4}


# ---- rows to rectangles


def test_collate_by_hand():
    rows = [Row("a", (BOS, 7, 8), (9, EOS)), Row("b", (BOS,), (5,))]
    tokens, mask = collate(rows, PAD)
    assert tokens.dtype == np.int64 and mask.dtype == bool
    assert tokens.tolist() == [[BOS, 7, 8, 9, EOS], [BOS, 5, PAD, PAD, PAD]]
    assert mask.astype(int).tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    _, with_prompt = collate(rows, PAD, include_prompt=True)
    assert with_prompt.astype(int).tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize("include_prompt", [False, True])
def test_masks_do_not_know_what_padding_looks_like(include_prompt):
    rows = [Row("a", (BOS, EOS, 8), (9, EOS)), Row("b", (BOS, PAD), (PAD,)), Row("c", (BOS,), (EOS,))]
    masks = [collate(rows, pad, include_prompt)[1].tolist() for pad in (PAD, EOS, BOS, 0)]
    assert masks[0] == masks[1] == masks[2] == masks[3]
    assert [sum(row) for row in masks[0]] == ([4, 2, 1] if include_prompt else [2, 1, 1])


IDS = st.lists(st.integers(0, 9), max_size=7)  # control ids too: no mask may be guessed from them
TEXT_ROWS = st.lists(st.tuples(IDS.filter(len), IDS), min_size=1, max_size=6)


@settings(max_examples=200)
@given(TEXT_ROWS, st.integers(0, 9), st.booleans())
def test_every_cell_of_a_batch_is_a_rows_token_or_padding(rows, pad, include_prompt):
    tokens, mask = collate([Row(str(i), tuple(p), tuple(r)) for i, (p, r) in enumerate(rows)], pad, include_prompt)
    assert tokens.shape == mask.shape == (len(rows), max(len(p) + len(r) for p, r in rows))
    for found, inside, (prompt, response) in zip(tokens.tolist(), mask.tolist(), rows, strict=True):
        for column, (token, counts) in enumerate(zip(found, inside, strict=True)):
            assert token == (prompt + response)[column] if column < len(prompt + response) else token == pad
            begins = 1 if include_prompt else len(prompt)
            assert counts == (begins <= column < len(prompt + response))


@settings(max_examples=200)
@given(st.lists(st.tuples(IDS.filter(len), IDS, IDS), min_size=1, max_size=6), st.integers(0, 9))
def test_a_packed_batch_comes_apart_into_its_pairs(pairs, pad):
    rows = [PairRow(str(i), Row("", tuple(p), tuple(c)), Row("", tuple(p), tuple(r))) for i, (p, c, r) in enumerate(pairs)]
    tokens, parts = collate_pairs(rows, pad)
    assert tokens.shape == parts.shape == (len(pairs), max(map(len, (p + c + r for p, c, r in pairs))))
    for found, part, pair in zip(tokens, parts, pairs, strict=True):
        assert [found[part == number].tolist() for number in range(3)] == list(pair)
        assert part.tolist() == sorted(part) and (found[part == 3] == pad).all()


@settings(max_examples=200)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 9))
def test_any_step_is_shared_out_whole(lengths, world_size, micro_batch):
    rows = rows_of(lengths)
    shares = [share_out(rows, rank, world_size, micro_batch) for rank in range(world_size)]
    assert Counter(row.id for share in shares for part in share for row in part) == Counter(row.id for row in rows)
    assert len({len(share) for share in shares}) == 1 and all(len(part) <= micro_batch for share in shares for part in share)


# ---- order


def test_stable_hash_is_sha256_of_the_parts():
    assert stable_hash("a", 1) == 0x839e11a421d370be >> 1  # printf 'a\\x1f1' | sha256sum
    assert len({stable_hash(*parts) for parts in [("a", "b"), ("ab",), ("b", "a"), ("a", "b", "")]}) == 4
    assert all(0 <= stable_hash(number) < 2**63 for number in range(100))


def test_an_epochs_order_is_a_permutation_that_depends_on_seed_stage_and_epoch():
    order = epoch_order(100, 1, "sft", 0)
    assert sorted(order) == list(range(100))
    assert (order == epoch_order(100, 1, "sft", 0)).all()
    others = [epoch_order(100, 2, "sft", 0), epoch_order(100, 1, "dpo", 0), epoch_order(100, 1, "sft", 1), np.arange(100)]
    assert not any((order == other).all() for other in others)


@pytest.mark.parametrize(("epochs", "sizes"), [(1, [4, 4, 2]), (2, [4, 4, 2] * 2), (0.5, [4, 4]), (1.34, [4, 4, 2, 4]), (0.01, [4])])
def test_steps_go_through_whole_and_part_epochs(epochs, sizes):
    steps = list(step_indices(10, 4, epochs, 0, "sft"))
    assert [len(step) for step in steps] == sizes
    for epoch in range(len(sizes) // 3):
        assert sorted(np.concatenate(steps[3 * epoch : 3 * epoch + 3])) == list(range(10))
    if epochs == 2:
        assert not (np.concatenate(steps[:3]) == np.concatenate(steps[3:])).all()
    longer = list(step_indices(10, 4, 3, 0, "sft"))  # a run that is to go further starts the same way
    assert all((step == other).all() for step, other in zip(steps, longer, strict=False))


def test_full_steps_are_all_full_and_use_every_row_equally():
    steps = full_steps(10, 4, 7, 0, "ppo")
    assert [step.shape for step in steps] == [(4,)] * 7
    stream = np.concatenate(steps)
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert set(Counter(stream.tolist()).values()) <= {2, 3}
    longer = full_steps(10, 4, 20, 0, "ppo")
    assert all((step == other).all() for step, other in zip(steps, longer, strict=False))
    assert [sorted(step) for step in full_steps(3, 6, 2, 0, "ppo")] == [[0, 0, 1, 1, 2, 2]] * 2  # fewer rows than a step


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_processes_share_a_step_without_overlap_and_in_equally_many_parts(world_size, count, micro_batch):
    rows = rows_of(np.random.default_rng(0).integers(2, 40, count))
    shares = [share_out(rows, rank, world_size, micro_batch) for rank in range(world_size)]
    assert sorted(row.id for share in shares for part in share for row in part) == sorted(row.id for row in rows)
    assert len({len(share) for share in shares}) == 1
    assert max(len(part) for share in shares for part in share) <= micro_batch
    sizes = [sum(len(part) for part in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_share_is_sorted_by_length_and_does_not_depend_on_the_order_given():
    rows = rows_of([30, 2, 17, 5, 9, 23, 11, 3])
    for rank in range(2):
        share = share_out(rows, rank, 2, 2)
        lengths = [row.length for part in share for row in part]
        assert lengths == sorted(lengths)
        assert share == share_out(rows[::-1], rank, 2, 2)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_epoch_over_all_processes_is_the_data_in_an_order_that_ignores_their_number(world_size):
    rows = rows_of(np.random.default_rng(1).integers(2, 40, 23))
    steps = list(step_indices(23, 8, 1, 5, "rm"))
    seen = [
        {row.id for rank in range(world_size) for part in share_out([rows[i] for i in step], rank, world_size, 2) for row in part}
        for step in steps
    ]
    assert seen == [{rows[i].id for i in epoch_order(23, 5, "rm", 0)[start : start + 8]} for start in (0, 8, 16)]
