"""Outside judges: what goes out is blind, what comes in is checked, and a judge of known taste is read right."""

import json
import random

import numpy as np
import pytest

from data.errors import DataError, UsageError
from data.judge import judged, judged_text, length_controlled, read_verdicts, write_questions

NAMES = ("ppo", "dpo")


def made_up(count=60):
    """Pairs whose first answer has the true reward 1 in two of three pairs, and 0 otherwise; the second has 0.5. Two pairs are equal."""
    rows = []
    for index in range(count):
        true = [float(index % 3 > 0), 0.5]
        rows.append({"prompt": f"prompt {index}", "first": f"answer {index}" + "!" * (index % 5), "second": f"other {index}", "true": true, "raw": [-t for t in true]})
    for index in range(2):
        rows.append({"prompt": f"same {index}", "first": "equal", "second": "equal", "true": [1.0, 1.0], "raw": [0.0, 0.0]})
    return rows


@pytest.fixture
def asked(tmp_path):
    """(file for the judge, folder of keys, its rows)."""
    path, keys = tmp_path / "out" / "pairs.jsonl", tmp_path / "keys"
    assert write_questions(path, keys, NAMES, made_up(), "dialogue", 0) == 60
    return path, keys, [json.loads(line) for line in path.read_text().splitlines()]


def by_true_reward(rows):
    """The verdicts of a judge who sees nothing but true rewards: which text is better, whatever its place."""
    worth = {(row["prompt"], row[place]): row["true"][place == "second"] for row in made_up() for place in ("first", "second")}
    gap = [worth[row["prompt"], row["A"]] - worth[row["prompt"], row["B"]] for row in rows]
    return [{"id": row["id"], "verdict": "A" if g > 0 else "B" if g < 0 else "tie"} for row, g in zip(rows, gap, strict=True)]


def write(path, verdicts):
    path.write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    return path


def test_what_goes_out_is_blind(asked):
    path, keys, rows = asked
    assert {frozenset(row) for row in rows} == {frozenset({"id", "task", "prompt", "A", "B"})}
    assert not any(word in path.read_text() for word in ("ppo", "dpo", "true", "first", "second"))
    assert len(list(keys.iterdir())) == 1 and list(path.parent.iterdir()) == [path]
    first_is_a = sum(row["A"].startswith("answer") for row in rows)
    assert 18 <= first_is_a <= 42  # a fair coin of 60 throws, to 3 standard deviations
    assert [row["prompt"] for row in rows] != [row["prompt"] for row in made_up()[:60]]  # the order of prompts tells nothing either


def test_the_same_arguments_give_the_same_files(asked, tmp_path):
    path, keys, _ = asked
    write_questions(tmp_path / "again" / "pairs.jsonl", tmp_path / "keys2", NAMES, made_up(), "dialogue", 0)
    assert (tmp_path / "again" / "pairs.jsonl").read_bytes() == path.read_bytes()
    assert next((tmp_path / "keys2").iterdir()).read_bytes() == next(keys.iterdir()).read_bytes()


def test_the_key_must_be_kept_apart(tmp_path):
    with pytest.raises(UsageError, match="beside the key"):
        write_questions(tmp_path / "keys" / "pairs.jsonl", tmp_path / "keys", NAMES, made_up(), "dialogue", 0)


def test_verdicts_by_true_reward(asked, tmp_path):
    _, keys, rows = asked
    verdicts = by_true_reward(rows)
    random.Random(0).shuffle(verdicts)  # any order
    numbers = judged(*read_verdicts(write(tmp_path / "in.jsonl", verdicts), keys))
    assert numbers["win_rate"]["n"] == 62 and numbers["win_rate"]["ties"] == numbers["same"] == 2
    assert numbers["win_rate"]["mean"] == pytest.approx((40 + 1) / 62)  # the first is better in 40 of 60, and two ties
    assert numbers["agreement_true"]["mean"] == 1 and numbers["agreement_true"]["n"] == 60
    assert numbers["agreement_raw"]["mean"] == 0  # made up as the true reward turned round
    low, high = numbers["position"]["interval"]
    assert low < 0.5 < high
    assert "ppo wins against dpo" in judged_text(numbers)


def test_a_judge_who_likes_the_first_place_is_found_out(asked, tmp_path):
    _, keys, rows = asked
    numbers = judged(*read_verdicts(write(tmp_path / "in.jsonl", [{"id": row["id"], "verdict": "A"} for row in rows]), keys))
    assert numbers["position"]["mean"] == 1
    low, high = numbers["win_rate"]["interval"]
    assert low < 0.5 < high  # the order was drawn, so such a judge helps neither


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "1 of 60 pairs have no verdict"),
        (lambda rows: [*rows, rows[0]], r"in.jsonl:61: pair \w+ was judged on line 1 already"),
        (lambda rows: [*rows[:3], rows[3] | {"verdict": "both"}, *rows[4:]], "in.jsonl:4: the verdict is 'both'"),
        (lambda rows: [*rows, {"id": "0000", "verdict": "A"}], "in.jsonl:61: pair 0000 was not asked about"),
        (lambda rows: [{"id": "0000", "verdict": "A"}], "no pair of it was written"),
        (lambda rows: [{"pair": 1}], "in.jsonl:1: is not"),
        (lambda rows: [], "no pair of it was written"),
    ],
)
def test_each_pair_must_be_judged_once(asked, tmp_path, change, message):
    _, keys, rows = asked
    with pytest.raises(DataError, match=message):
        read_verdicts(write(tmp_path / "in.jsonl", change(by_true_reward(rows))), keys)


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b'"id"', b'{"id": ["a"], "verdict": "A"}', b'{"id": "a", "verdict": {}}', b'{"id": "\xff", "verdict": "A"}', b"[" * 10**5, b"9" * 5000],
)
def test_lines_that_are_no_verdict_are_named(asked, tmp_path, line):
    _, keys, rows = asked
    (tmp_path / "in.jsonl").write_bytes(json.dumps(by_true_reward(rows)[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match="in.jsonl:2: is not"):
        read_verdicts(tmp_path / "in.jsonl", keys)


@pytest.mark.parametrize("count", [20, 40, 60])
@pytest.mark.parametrize("seed", range(4))
def test_verdicts_belong_to_the_questions_that_they_have_most_of(tmp_path, count, seed):
    """Pairs were written three times, the fewer among the more; keys lie in any order."""
    for written in (20, 40, 60):
        write_questions(tmp_path / f"{written}.jsonl", tmp_path / "keys", NAMES, made_up(written), "dialogue", seed)
    rows = [json.loads(line) for line in (tmp_path / f"{count}.jsonl").read_text().splitlines()]
    key, first_won = read_verdicts(write(tmp_path / "in.jsonl", by_true_reward(rows)), tmp_path / "keys")
    assert len(key) == len(first_won) == count + 2


def test_signs_that_end_a_line_elsewhere_end_none_here(tmp_path):
    """Texts may hold U+2028, U+0085 and their like, and a judge may write them down as they are."""
    odd = "\u2028 \u2029 \x85 \x1c \x0b"
    rows = [row | {"prompt": row["prompt"] + odd, "first": row["first"] + odd} for row in made_up(9)[:9]]
    path, keys = tmp_path / "out" / "pairs.jsonl", tmp_path / "keys"
    write_questions(path, keys, NAMES, rows, "plain", 0)
    asked = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    verdicts = "".join(json.dumps({"id": row["id"], "verdict": "A", "why": row["prompt"]}, ensure_ascii=False) + "\r\n" for row in asked)
    (tmp_path / "in.jsonl").write_bytes(verdicts.encode())
    key, _ = read_verdicts(tmp_path / "in.jsonl", keys)
    assert len(key) == 9 and {entry["prompt"] for entry in key} == {row["prompt"] for row in asked} == {row["prompt"] for row in rows}


def test_length_is_controlled_for():
    """Verdicts drawn from the regression itself: the plain rate is off, the controlled one is sigmoid(a)."""
    rng = np.random.default_rng(0)
    longer_by = rng.normal(30, 40, 20_000)
    p = 1 / (1 + np.exp(-(-0.5 + 1.5 * np.tanh(longer_by / longer_by.std()))))
    outcome = (rng.random(20_000) < p).astype(float)
    assert outcome.mean() > 0.52
    assert length_controlled(outcome, longer_by, ridge=0.0) == pytest.approx(1 / (1 + np.exp(0.5)), abs=0.015)


def test_length_control_without_lengths_or_without_losses():
    assert length_controlled(np.array([1, 0, 1, 1.0]), np.zeros(4)) == pytest.approx(0.75, abs=1e-4)
    assert 0.95 < length_controlled(np.ones(30), np.arange(30.0)) <= 1
