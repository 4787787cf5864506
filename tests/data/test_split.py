"""The splitter against its own worked table, against a second implementation written pair by pair, and on its files."""

import hashlib
import json
import re
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.split
from data.errors import CheckpointError, NumericalError, UsageError
from data.split import PARTS, SplitFlags, check_split_flags, read_split, split_pairs, write_split


def table():
    """The worked table in the docstring: prompts, gaps, and (flags, expected letters) per line."""
    lines = data.split.__doc__.split("- dropped):")[1].split("Source:")[0].strip().splitlines()
    rows = [(line[:-34].strip(), line.split()[-6:]) for line in lines]
    (_, prompts), (_, gaps), *examples = rows[1:]
    return prompts, [float(gap) for gap in gaps], examples


def parse(words):
    """SplitFlags from a command line as the table writes it; a remark in brackets is left out."""
    words, given = re.sub(r"\(.*\)", "", words).split(), {}
    kinds = {"threshold": float, "quantile": float, "rule": str, "disputed": str}
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        given[name] = True if name == "per_pair" else kinds[name](words.pop(0))
    return SplitFlags(**given)


def letters(split):
    """E, D, B (both) or - for each row."""
    def letter(row):
        if row in split.dropped:
            assert row not in split.easy and row not in split.difficult
            return "-"
        return "B" if row in split.easy and row in split.difficult else "E" if row in split.easy else "D"
    return [letter(row) for row in range(len(split.disputed))]


@pytest.mark.parametrize("line", range(len(table()[2])))
def test_worked_table(line):
    prompts, gaps, examples = table()
    words, expected = examples[line]
    assert letters(split_pairs(prompts, gaps, parse(words), seed=0)) == expected


def test_worked_table_is_complete():
    prompts, gaps, examples = table()
    assert len(prompts) == len(gaps) == 6 and len(examples) == 11
    assert {flags.disputed for flags in map(parse, (words for words, _ in examples))} == {"difficult", "easy", "drop"}


def test_thresholds_of_the_worked_table():
    """Medians by hand: prompts' largest undisputed gaps are 2.0 and 0.0; undisputed pairs have 2.0, 0.1, 0.0."""
    prompts, gaps, _ = table()
    assert split_pairs(prompts, gaps, SplitFlags(), 0).threshold == 1.0
    assert split_pairs(prompts, gaps, SplitFlags(per_pair=True), 0).threshold == 0.1
    assert split_pairs(prompts, gaps, SplitFlags(rule="none"), 0).threshold is None
    assert split_pairs(prompts, gaps, SplitFlags(), 0).disputed.tolist() == [False, False, True, False, True, True]


def by_hand(prompts, gaps, flags, threshold):
    """The docstring's rules, one pair at a time, for the rules threshold and quantile."""
    out = []
    for prompt, gap in zip(prompts, gaps):
        mates = [gap] if flags.per_pair else [g for p, g in zip(prompts, gaps) if p == prompt]
        lives_in = None if max(mates) < 0 else "easy" if max(mates) >= threshold else "difficult"
        if gap >= 0:
            out.append(lives_in)
        elif flags.disputed == "drop" or lives_in not in (None, flags.disputed):
            out.append("dropped")
        else:
            out.append(flags.disputed)
    return out


GAPS = st.sampled_from([-3.0, -1.0, -0.5, -1e-9, 0.0, 1e-9, 0.1, 0.5, 0.5, 1.0, 2.5])  # few values: ties are common
ROWS = st.lists(st.tuples(st.sampled_from("abcdefgh"), GAPS), min_size=1, max_size=16)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.sampled_from(["threshold", "quantile", "random"]), st.sampled_from(["difficult", "easy", "drop"]), st.booleans(),
       st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 3))
def test_against_pair_by_pair(rows, rule, disputed, per_pair, quantile, seed):
    prompts, gaps = [p for p, _ in rows], [g for _, g in rows]
    flags = SplitFlags(rule=rule, disputed=disputed, per_pair=per_pair, **({"threshold": quantile} if rule == "threshold" else
                                                                          {"quantile": quantile}))
    try:
        split = split_pairs(prompts, gaps, flags, seed)
    except UsageError:
        assert impossible(prompts, gaps, flags)
        return
    assert not impossible(prompts, gaps, flags)
    # Easy, difficult and dropped cover all rows once; only disputed pairs are dropped; no prompt in both halves unless asked for.
    assert sorted([*split.easy, *split.difficult, *split.dropped]) == list(range(len(gaps)))
    assert split.disputed.tolist() == [g < 0 for g in gaps] and all(gaps[row] < 0 for row in split.dropped)
    if not per_pair:
        assert not {prompts[row] for row in split.easy} & {prompts[row] for row in split.difficult}
    if disputed != "easy":
        assert all(gaps[row] >= 0 for row in split.easy)
    if rule != "random":
        expected = by_hand(prompts, gaps, flags, split.threshold)
        assert {part: [row for row, where in enumerate(expected) if where == part] for part in PARTS} == {
            part: getattr(split, part).tolist() for part in PARTS}


def test_blind_draws_prompts_whatever_the_reward_model_thinks_of_their_pairs():
    prompts, gaps = many()
    easy, other = (split_pairs(prompts, gaps, SplitFlags(rule="blind"), seed) for seed in (0, 1))
    quantile = split_pairs(prompts, gaps, SplitFlags(), 0)
    assert len({prompts[row] for row in easy.easy}) == len({prompts[row] for row in quantile.easy}) and easy.easy.tolist() != other.easy.tolist()
    assert sorted([*easy.easy, *easy.difficult]) == list(range(len(gaps))) and not len(easy.dropped)
    assert not {prompts[row] for row in easy.easy} & {prompts[row] for row in easy.difficult}
    assert easy.disputed[easy.easy].mean() == pytest.approx(easy.disputed.mean(), abs=0.03)  # as many as anywhere
    turned = split_pairs(prompts, [-gap for gap in gaps], SplitFlags(rule="blind", quantile=0.5), 0)
    drawn = np.random.default_rng([0, *b"split"]).permutation(len(set(prompts)))  # the same order, whatever the gaps; only the number differs
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    for split in (easy, turned):
        there = {number[prompts[row]] for row in split.easy}
        assert there == set(drawn[: len(there)])


def impossible(prompts, gaps, flags):
    """Whether a half is empty: no undisputed pair is easy, or nothing at all is difficult."""
    units = [[g] for g in gaps]
    if not flags.per_pair:
        units = [[g for p, g in zip(prompts, gaps) if p == prompt] for prompt in dict.fromkeys(prompts)]
    largest = [max(unit) for unit in units if max(unit) >= 0]
    if not largest:
        return True
    where = by_hand(prompts, gaps, flags, flags.threshold if flags.rule == "threshold" else np.quantile(largest, flags.quantile))
    return not any(w == "easy" and g >= 0 for w, g in zip(where, gaps)) or "difficult" not in where


def many(n=4000, seed=5, prompts=1500):
    rng = np.random.default_rng(seed)
    return [f"prompt {i}" for i in rng.integers(prompts, size=n)], rng.normal(0.7, 1.2, size=n)


def test_median_halves_the_prompts_and_ties_are_easy():
    prompts, gaps = many()
    split = split_pairs(prompts, gaps, SplitFlags(disputed="drop"), seed=0)
    easy, difficult = ({prompts[row] for row in rows} for rows in (split.easy, split.difficult))
    assert abs(len(easy) - len(difficult)) <= 1
    # Gaps 1, 2, 2, 2, 3 with median 2: everything tied with the threshold is easy, whatever the order of the rows.
    for gaps in ([1, 2, 2, 2, 3], [2, 3, 2, 1, 2]):
        split = split_pairs(list("abcde"), gaps, SplitFlags(), seed=0)
        assert split.threshold == 2.0 and [gaps[row] for row in split.difficult] == [1]


def test_order_of_rows_does_not_matter():
    prompts, gaps = many()
    order = np.random.default_rng(0).permutation(len(gaps))
    straight = split_pairs(prompts, gaps, SplitFlags(), seed=0)
    shuffled = split_pairs([prompts[i] for i in order], gaps[order], SplitFlags(), seed=0)
    assert straight.threshold == shuffled.threshold
    assert sorted(order[shuffled.easy]) == straight.easy.tolist()


@pytest.mark.parametrize("per_pair", [False, True])
def test_random_is_as_large_and_blind_to_gaps(per_pair):
    prompts, gaps = many()
    flags = SplitFlags(quantile=0.7, per_pair=per_pair)
    quantile, random, again, other = (split_pairs(prompts, gaps, f, seed) for f, seed in (
        (flags, 0), (replace(flags, rule="random"), 0), (replace(flags, rule="random"), 0), (replace(flags, rule="random"), 1)))

    def size(rows):
        return len(rows) if per_pair else len({prompts[row] for row in rows})
    assert size(random.easy) == size(quantile.easy) == size(other.easy)
    assert random.easy.tolist() == again.easy.tolist() != other.easy.tolist()
    undisputed = [row for row in random.difficult if gaps[row] >= 0]
    # Means of about 900 and 2,100 gaps, standard deviation 0.85: their difference has a standard error of 0.034.
    assert abs(gaps[random.easy].mean() - gaps[undisputed].mean()) < 0.17
    assert gaps[quantile.easy].mean() > gaps[undisputed].mean() + 0.3


def test_flipped_labels_are_found():
    """K2: a tenth of the labels flipped, scores with little noise: the disputed pairs are the flipped ones, and none of them is easy."""
    rng = np.random.default_rng(0)
    true_gaps = rng.uniform(0.5, 3, size=1000)
    flipped = np.arange(1000) % 10 == 0
    gaps = np.where(flipped, -true_gaps, true_gaps) + rng.normal(0, 0.1, size=1000)
    split = split_pairs([str(i) for i in range(1000)], gaps, SplitFlags(), seed=0)
    assert split.disputed.tolist() == flipped.tolist()
    assert not flipped[split.easy].any() and flipped[split.difficult].sum() == 100


@pytest.mark.parametrize("gaps, flags", [
    ([0.5, 1.0, 2.0], SplitFlags(rule="threshold", threshold=float("inf"))),
    ([0.5, 1.0, 2.0], SplitFlags(rule="threshold", threshold=2.5)),
    ([0.5, 1.0, 2.0], SplitFlags(rule="threshold", threshold=0.0)),
    ([0.5, 0.5, 0.5, 2.0], SplitFlags()),  # the median ties with the smallest
    ([0.5, 1.0, -2.0], SplitFlags(rule="threshold", threshold=2.5, disputed="easy")),  # an easy half of disputed labels alone
])
def test_an_empty_half_suggests_a_threshold_that_works(gaps, flags):
    prompts = [str(i) for i in range(len(gaps))]
    with pytest.raises(UsageError, match=r"half is empty .*0% 0\.5, .*50% .*100% ") as error:
        split_pairs(prompts, gaps, flags, seed=0)
    suggested = re.search(r"try (--rule threshold --threshold \S+)$", str(error.value))[1]
    split = split_pairs(prompts, gaps, replace(parse(suggested), disputed=flags.disputed), seed=0)
    assert split.easy.size and split.difficult.size


def test_an_empty_half_that_no_threshold_mends():
    with pytest.raises(UsageError, match="no threshold separates"):
        split_pairs(list("abc"), [1.0, 1.0, 1.0], SplitFlags(), seed=0)
    with pytest.raises(UsageError, match="disputes all 2 pairs"):
        split_pairs(list("ab"), [-1.0, -2.0], SplitFlags(), seed=0)
    with pytest.raises(UsageError, match="disputes all 2 pairs"):
        split_pairs(list("ab"), [-1.0, -2.0], SplitFlags(rule="none", disputed="drop"), seed=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gap_that_is_not_finite_stops(bad):
    with pytest.raises(NumericalError, match="row 2 is"):
        split_pairs(list("abcd"), [0.1, 0.2, bad, 0.3], SplitFlags(), seed=0)


@pytest.mark.parametrize("flags, message", [
    (dict(rule="threshold"), "needs --threshold"),
    (dict(threshold=1.0), "--threshold has no effect"),
    (dict(rule="random", threshold=1.0), "--threshold has no effect"),
    (dict(rule="threshold", threshold=1.0, quantile=0.3), "--quantile has no effect"),
    (dict(rule="none", per_pair=True), "--per-pair has no effect"), (dict(rule="blind", disputed="easy"), "--disputed has no effect"),
    (dict(quantile=0.0), "between 0 and 1"), (dict(quantile=1.0), "between 0 and 1"), (dict(quantile=float("nan")), "between 0 and 1"),
    (dict(rule="threshold", threshold=-1.0), "0 or more"), (dict(rule="threshold", threshold=float("nan")), "0 or more"),
    (dict(rule="threshold", threshold=float("-inf")), "0 or more"),
    (dict(rule="best"), "choose from"), (dict(disputed="hard"), "choose from"),
])
def test_bad_flags(flags, message):
    with pytest.raises(UsageError, match=message):
        check_split_flags(SplitFlags(**flags))
    with pytest.raises(UsageError, match=message):
        split_pairs(list("ab"), [0.1, 0.2], SplitFlags(**flags), seed=0)


def test_every_flag_has_a_line_of_help():
    assert all(0 < len(flag.metadata["help"]) < 100 for flag in fields(SplitFlags))


# Files

@dataclass(frozen=True)
class Row:
    id: str
    prompt: str


def written(folder, flags=SplitFlags()):
    prompts, gaps, _ = table()
    pairs = [Row(f"{i:016x}", f"{prompt} \u2028ü\n") for i, prompt in enumerate(prompts)]
    write_split(folder, split_pairs([p.prompt for p in pairs], gaps, flags, 0), pairs, gaps, flags, {"seed": 0})
    return pairs


def test_files_of_the_worked_table(tmp_path):
    pairs = written(tmp_path)
    assert read_split(tmp_path) == {"easy": [p.id for p in pairs[:2]], "difficult": [p.id for p in pairs[3:]], "dropped": [pairs[2].id]}
    assert json.loads((tmp_path / "dropped.jsonl").read_text()) == {
        "id": pairs[2].id, "prompt_hash": hashlib.sha256("a \u2028ü\n".encode()).hexdigest()[:16], "gap": -0.5}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rule"] == "quantile" and summary["threshold"] == 1.0 and summary["seed"] == 0
    assert summary["pairs"] == {"all": 6, "easy": 2, "difficult": 3, "dropped": 1}
    assert summary["prompts"] == {"all": 3, "easy": 1, "difficult": 2, "dropped": 1, "in_both_halves": 0}
    assert summary["disputed_pairs"] == {"all": 3, "share": 0.5, "easy": 0, "difficult": 2, "dropped": 1}
    assert summary["gap_quantiles"]["0.0"] == -1.2 and summary["gap_quantiles"]["0.5"] == -0.25  # of -1.2 -.7 -.5 0 .1 2, signed
    bins = dict(zip(summary["gap_histogram"]["edges"], summary["gap_histogram"]["counts"]))
    assert {edge: count for edge, count in bins.items() if count} == {-1.5: 1, -1.0: 1, -0.5: 1, 0.0: 2, 2.0: 1}
    assert summary["sha256"]["easy.jsonl"] == hashlib.sha256((tmp_path / "easy.jsonl").read_bytes()).hexdigest()


def test_a_prompt_in_both_halves_is_counted(tmp_path):
    written(tmp_path, SplitFlags(per_pair=True))
    assert json.loads((tmp_path / "summary.json").read_text())["prompts"]["in_both_halves"] == 1


def test_histogram_keeps_what_lies_beyond_its_edges(tmp_path):
    pairs, gaps = [Row(str(i), str(i)) for i in range(4)], [-99.0, 0.25, 5.0, 99.0]
    write_split(tmp_path, split_pairs([p.prompt for p in pairs], gaps, SplitFlags(), 0), pairs, gaps, SplitFlags(), {})
    counts = json.loads((tmp_path / "summary.json").read_text())["gap_histogram"]["counts"]
    assert counts[0] == 1 and counts[-1] == 2 and sum(counts) == 4


def test_same_input_same_bytes_and_another_threshold_another_summary(tmp_path):
    flags = SplitFlags(rule="threshold", threshold=1.0)
    for name, f in (("one", flags), ("two", flags), ("other", replace(flags, threshold=1.5))):
        written(tmp_path / name, f)
    names = [*(f"{part}.jsonl" for part in PARTS), "summary.json"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "summary.json").read_bytes() != (tmp_path / "other" / "summary.json").read_bytes()


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_file_is_named(tmp_path, part):
    path = tmp_path / f"{part}.jsonl"
    text = ""
    for harm in (lambda: path.write_text(text.replace("0", "1")), lambda: path.write_text(text + "\n"), path.unlink):
        written(tmp_path)
        text = path.read_text()
        harm()
        with pytest.raises(CheckpointError, match=f"{part}.jsonl"):
            read_split(tmp_path)


def test_an_unfinished_folder_is_not_a_split(tmp_path):
    written(tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="summary.json"):
        read_split(tmp_path)
