"""What a grid's lines show, on lines made by hand."""

import csv
import io
import re
import sys
from pathlib import Path

import pytest

from data import pictures
from data.ablations import CORE, ROWS, is_ppo
from data.compare import (
    as_csv, at_equal_kl, at_equal_pairs, by_setting, compared, course_text, differences, frontier, names_of, one_per_seed, over_seeds, passed, reward_models_text,
    kinds_text, samples_text, settings_text, trials_text, tuned, verdict,
)  # fmt: skip
from data.errors import DataError
from data.grid import read_rows


def line(row, seed, rewards, kls=(0.5, 1.0, 2.0), setting=None):
    """A row's line with three snapshots; the second is the best."""
    stage = "ppo" if is_ppo(row) else "dpo"
    numbers = {"score": 1.0, "true_reward_by_kind": {"list": 1.5}, "online_samples": 0, "dpo_pairs": 16, "ended": 1.0}
    points = {f"{stage}/snapshot-{i}": numbers | {"true_reward": r, "kl_sft": kl} for i, (r, kl) in enumerate(zip(rewards, kls, strict=True))}
    points[stage] = points[f"{stage}/snapshot-1"]
    marks = {"sft": {"true_reward": 0.0, "score": 0.0, "true_reward_by_kind": {"list": 1.0}}, "chosen": {"true_reward": 1.0, "score": 1.0}}
    buckets = {"[0, 1)": {"share": 0.6, "accuracy": 0.5}, "[1, inf)": {"share": 0.4, "accuracy": 0.8}}
    return {
        "row": row, "seed": seed, "key": f"{row}{seed}", "setting": setting or {"--data": "advice"}, "prompts": 20, "world": "advice",
        "marks": marks, "points": points, "picked": {"best": stage, "last": f"{stage}/snapshot-2"},
        "reward_model": {"buckets": buckets, "accuracy": 0.7, "share_of_gaps_below_1": 0.6}, "split": {"easy": 3, "difficult": 4, "dropped": 1, "disputed": 2},
        "time": {"train": 60.0, "eval": 1.0}, "code": "1", "made_with": {"judge": "advice", "flags": {}},
        "validation": {point: {"score_raw": numbers["kl_sft"], "true_reward": 0.0} for point, numbers in points.items()},
    }  # fmt: skip


LINES = [
    line("mpo", 1, (1.0, 2.0, 1.5)), line("mpo", 2, (1.0, 3.0, 1.5)), line("mpo", 3, (1.0, 4.0, 1.5)),
    line("dpo-easy", 2, (0.5, 2.0, 1.0)), line("dpo-easy", 1, (0.5, 1.5, 1.0)),
]  # fmt: skip


def test_a_seed_that_was_run_in_other_settings_alone_is_not_among_the_plain_ones():
    plain, elsewhere = line("dpo-all", 1, (1.0, 2.0, 3.0)), line("dpo-all@flip-rate-0.2", 2, (1.0, 2.0, 3.0))
    assert one_per_seed([elsewhere, plain]) == [plain] and one_per_seed([elsewhere]) == [elsewhere]


def test_differences_are_paired_by_seed():
    found = differences(LINES, "mpo", "dpo-easy")
    assert found["seeds"] == 2  # seed 3 has no partner
    middle, low, high = found["best"]
    assert middle == pytest.approx(0.75)  # of 2 - 1.5 and 3 - 2
    assert high - middle == pytest.approx(12.706 * 0.25, rel=1e-3)  # t for one degree of freedom, times 0.3536 / sqrt 2
    assert found["last"] == pytest.approx((0.5, 0.5, 0.5))
    assert differences(LINES, "mpo", "ppo-all") == {"seeds": 0, "on_two_sfts": 0}


def test_rows_of_one_seed_on_two_sft_models_are_marked():
    """Of the same flags up to SFT; where rows have other data their SFT models are other ones."""

    def on(sft, found, **flags):
        return found | {"marks": found["marks"] | {"sft": found["marks"]["sft"] | {"true_reward": sft}}, "made_with": {"judge": "advice", "flags": flags}}

    mpo, dpo = line("mpo", 1, (1.0, 2.0, 1.5)), line("dpo-easy", 1, (0.5, 1.5, 1.0))
    assert differences([mpo, on(1e-6, dpo)], "mpo", "dpo-easy")["on_two_sfts"] == 0  # rounding
    two = [mpo, on(0.1, dpo, **{"--rm-folds": 1, "--dpo-beta": 2.0})]
    assert differences(two, "mpo", "dpo-easy")["on_two_sfts"] == 1 and "| mpo - dpo-easy* |" in compared(two)
    assert differences([mpo, on(0.1, dpo, **{"--flip-rate": 0.2})], "mpo", "dpo-easy")["on_two_sfts"] == 0


def test_rows_are_compared_at_the_kl_of_the_nearer_ones_best_weights():
    near = line("ppo-all", 1, (1.0, 1.8, 2.0), kls=(0.2, 0.6, 0.8))
    mine, theirs, kl = at_equal_kl(line("ppo-again", 1, (1.0, 2.0, 1.5)), near, "true_reward")
    part = (0.6**0.5 - 0.5**0.5) / (1 - 0.5**0.5)  # of the way from the root of 0.5, where it is 1, to that of 1, where it is 2
    assert (mine, theirs, kl) == pytest.approx((1 + part, 1.8, 0.6))
    early = line("ppo-all", 1, (1, 2, 2), kls=(0.2, 0.26, 0.8))
    assert at_equal_kl(line("ppo-again", 1, (1.0, 2.0, 1.5)), early, "true_reward") == pytest.approx(((0.26 / 0.5) ** 0.5, 2, 0.26))  # 0.5 has 1
    early["points"]["ppo"]["kl_sft"] = early["points"]["ppo/snapshot-1"]["kl_sft"] = 0.24
    assert at_equal_kl(line("ppo-again", 1, (1.0, 2.0, 1.5)), early, "true_reward") is None  # its nearest are over twice as far
    early["points"]["ppo"]["kl_sft"] = 0.0
    assert at_equal_kl(early, early, "true_reward") is None and verdict(None) == "not comparable"
    unjudged = line("ppo-again", 1, (1.0, 2.0, 1.5)) | {"made_with": {"judge": None, "flags": {}}}
    assert at_equal_kl(unjudged, near, "true_reward") is None  # only the reward model that it was trained against scored its validation


def test_what_validation_thinks_worse_than_something_nearer_is_not_on_the_frontier():
    """The second weights went astray to a KL of 3, the third came back to 2."""
    found = line("ppo-all", 1, (1.0, 9.0, 2.0), kls=(0.5, 3.0, 2.0))
    for point, score in zip(found["points"], (0.1, 0.2, 0.3, 0.2), strict=True):
        found["validation"][point]["score_raw"] = score
    assert frontier(found, "true_reward") == [(0.0, 0.0), (0.5, 1.0), (2.0, 2.0)]


def test_a_row_has_been_where_it_started_from():
    """MPO's first weights are at a KL of 0.5; before, it was DPO at 0.3 with 1.2."""
    dpo, mpo = line("dpo-easy", 1, (0.5, 1.2, 1.0), kls=(0.2, 0.3, 0.4)), line("mpo", 1, (1.6, 2.0, 1.5))
    lines = [dpo, mpo]
    assert passed(lines, mpo) == [dpo["points"]["dpo"]] and passed(lines, dpo) == [] and passed([mpo], mpo) == []
    assert frontier(mpo, "true_reward", passed(lines, mpo))[:3] == [(0.0, 0.0), (0.3, 1.2), (0.5, 1.6)]
    assert "equal_kl" not in differences(lines, "mpo", "dpo-easy")  # where DPO ends MPO begins
    assert passed([line("dpo-easy", 1, (1, 1, 1)), mpo], line("mpo-sft-start", 1, (1, 1, 1))) == []


def test_dpo_is_compared_after_equally_many_pairs():
    few, many = line("dpo-easy", 1, (1.0, 2.0, 3.0)), line("dpo-all", 1, (1.0, 2.0, 4.0))
    for found, step in ((few, 10), (many, 20)):
        for turn, point in enumerate((*[name for name in found["points"] if "/" in name], "dpo"), 1):
            found["points"][point] = found["points"][point] | {"dpo_pairs": step * (2 if point == "dpo" else turn)}
    assert at_equal_pairs(few, many, "true_reward") == pytest.approx((3.0, 1.5))  # after 30: the last of one, half-way from 20 to 40 of the other
    few["points"]["dpo/snapshot-0"]["dpo_pairs"] = 0  # a row whose best weights are SFT's
    assert at_equal_pairs(few, many, "true_reward") == pytest.approx((3.0, 1.5))
    online = line("mpo", 1, (1, 2, 3))
    online["points"]["ppo"]["online_samples"] = 8
    assert at_equal_pairs(few, online, "true_reward") is None
    assert differences([few, many], "dpo-easy", "dpo-all")["equal_pairs"][0] == pytest.approx(1.5)


def judged(found, scores):
    """The line with what the judge says of its three snapshots on validation prompts; by true reward the first is best there."""
    points = [point for point in found["points"] if "/" in point]
    return found | {"picked": found["picked"] | {"judge": points[0], "true": points[0]}, "validation": {
        point: {"score_raw": score, "true_reward": -index} for index, (point, score) in enumerate(zip(points, scores, strict=True))
    } | {points[0].split("/")[0]: {"score_raw": scores[1], "true_reward": -1}}}  # fmt: skip


def test_the_best_of_several_trials_is_picked_by_the_judge():
    lines = [
        judged(line("mpo", 1, (1.0, 2.0, 1.5)), (0.1, 0.2, 0.3)), judged(line("mpo@ppo-kl-coef-0.2", 1, (3.0, 4.0, 5.0)), (0.1, 0.2, 0.9)),
        judged(line("ppo-all", 1, (0.0, 0.5, 0.0)), (0.1, 0.2, 0.3)), judged(line("ppo-all@ppo-kl-coef-0.2", 1, (0.0, 0.0, 0.2)), (0.1, 0.2, 0.25)),
        judged(line("mpo@ppo-kl-coef-0.4", 1, (9.0, 9.0, 9.0)), (9, 9, 9)),  # a trial that the other has not had
        judged(line("mpo@flip-rate-0.2", 1, (9.0, 9.0, 9.0)), (9, 9, 9)),  # other data, no trial
    ]  # fmt: skip
    text = trials_text(lines, "true_reward")
    assert "| mpo - ppo-all | 1 | 2, 2 | 5.00 | 1.00 |" in text  # judge: 5 at 0.9 against 0 at 0.3; true reward: 1 against 0, the first of those that tie
    assert text.count("\n| mpo") == 1
    assert trials_text(LINES, "true_reward") == ""
    other = [judged(line("dpo-easy", 1, (0.0, 1.0, 0.0)), (0.1, 0.2, 0.3)), judged(line("dpo-easy@dpo-beta-0.5", 1, (0.0, 2.0, 0.0)), (0.1, 0.4, 0.3))]
    text = trials_text([*lines, *other], "true_reward")
    assert "| mpo - dpo-easy | 1 | 3, 2 | 7.00 |" in text  # settings of its own each: 9 at 9, 2 at 0.4
    lines[4]["marks"] = lines[4]["marks"] | {"sft": lines[4]["marks"]["sft"] | {"true_reward": 0.7}}  # made again elsewhere, with another judge
    assert "| mpo - dpo-easy | 1 | 2, 2 | 3.00 |" in trials_text([*lines, *other], "true_reward")
    without = [found | {"picked": {"best": found["picked"]["best"]}} for found in lines]  # files, and no judge
    assert "| mpo - ppo-all | 1 | 2, 2 | - | - |" in trials_text(without, "score")


def test_differences_by_kind_of_prompt():
    lines = [line(row, seed, (1.0, 2.0, 3.0)) for row in ("mpo", "ppo-all") for seed in (1, 2)]
    for found in lines:
        best = found["picked"]["best"]
        more = found["seed"] * (found["row"] == "mpo")
        found["points"][best] = found["points"][best] | {"true_reward_by_kind": {"list": 1.0 + more} | ({"decline": 0.5} if found["seed"] == 1 else {})}
    assert "| mpo - ppo-all | 2 | 1.50 [-4.85, 7.85] | - |" in kinds_text(lines, ("list", "decline"))  # 1 and 2; no prompt of that kind on one seed
    assert kinds_text(lines[:2], ("list",)) == ""


def test_what_a_setting_changes_of_a_difference():
    noisy = [line("dpo-easy@flip-rate-0.2", 1, (0, 2.0, 0)), line("dpo-easy@flip-rate-0.2", 2, (0, 1.0, 0)), line("dpo-all@flip-rate-0.2", 1, (0, 1.0, 0)), line("dpo-all@flip-rate-0.2", 2, (0, 0.5, 0))]
    clean = [line("dpo-easy", 1, (0, 3.0, 0)), line("dpo-easy", 2, (0, 3.0, 0)), line("dpo-all", 1, (0, 2.5, 0)), line("dpo-all", 2, (0, 3.5, 0)), line("dpo-all", 3, (0, 9.0, 0))]
    text = settings_text([*noisy, *clean], "true_reward")
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    # 1 and 0.5 with noise, 0.5 and -0.5 without: 0.5 and 1 more
    assert cells[:3] == ["dpo-easy - dpo-all", "flip-rate-0.2", "2"] and [cell.split()[0] for cell in cells[3:6]] == ["0.75", "0.00", "0.75"]
    assert settings_text(clean, "true_reward") == "" == settings_text(noisy, "true_reward")


def test_differences_after_equally_many_responses():
    def sampled(found):
        for index, name in enumerate(name for name in found["points"] if "/" in name):
            found["points"][name] = found["points"][name] | {"online_samples": 1000 * (index + 1)}
        return found

    lines = [sampled(line("mpo", seed, (1.0, 2.0, 3.0))) for seed in (1, 2)] + [sampled(line("ppo-all", seed, (0.5, 1.0 + seed, 3.5))) for seed in (1, 2)]
    del lines[-1]["points"]["ppo/snapshot-2"]  # one stopped early
    text = samples_text(lines, "true_reward")
    assert [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]] == ["", "seeds", "1,000", "2,000"]
    assert [cell.strip().split()[0] for cell in text.splitlines()[-1].split("|")[1:-1]] == ["mpo", "2", "0.50", "-0.50"]
    assert samples_text(LINES, "true_reward") == ""  # no responses are counted there


def test_a_tie_on_validation_prompts_is_not_broken_by_the_test():
    points = {"a": {"true_reward": 0.1}, "b": {"true_reward": 0.9}}
    assert tuned([{"points": points, "validation": dict.fromkeys(points, {"score_raw": 1.0})}], "score_raw", "true_reward") == 0.1


def test_the_course_of_training_is_its_beginning_middle_and_end():
    lines = [
        line("dpo-easy", seed, (1, 1, 1)) | {"course": [
            {"step": step, "valid_chosen_logp": -10.0 - step - seed, "valid_rejected_logp": -11.0, "valid_accuracy": 0.5, "valid_kl_ref_seq": step}
            for step in (0, 1, 2, 4)]}
        for seed in (1, 3)
    ]  # fmt: skip
    text = course_text([*lines, line("mpo", 1, (1, 1, 1))])
    assert "| dpo-easy | -12, -14, -16 | -11, -11, -11 | 0.5, 0.5, 0.5 | 0, 2, 4 |" in text and "PPO" not in text
    for at in lines[0]["course"]:
        del at["valid_accuracy"]  # what one seed lacks is not shown of any; the rest is
    assert "| dpo-easy | -12, -14, -16 | -11, -11, -11 | - | 0, 2, 4 |" in course_text(lines)


def test_verdicts():
    assert verdict((1.0, None, None)) == "too few seeds"
    assert verdict((0.5, 0.2, 0.8)) == "better" and verdict((-0.5, -0.8, -0.2)) == "worse"
    assert verdict((0.1, 0.02, 0.2)) == "better, perhaps by too little to matter"
    assert verdict((0.0, -0.05, 0.05)) == "no difference of 0.1"
    assert verdict((0.1, -0.05, 0.3)) == "at least as good" and verdict((-0.1, -0.3, 0.05)) == "not better by 0.1"
    assert verdict((0.3, -0.1, 0.7)) == "not shown"


def test_means_need_every_seed():
    assert over_seeds(LINES[:3], lambda found: found["points"]["ppo"]["dpo_pairs"]) == "16 [16, 16]"
    assert over_seeds(LINES[:1], lambda found: found["points"]["ppo"]["true_reward"]) == "2.00"
    assert over_seeds(LINES[:3], lambda found: None if found["seed"] == 2 else 1.0) is None


def test_the_report_has_every_row_and_the_claims_it_can_judge():
    text = compared(LINES)
    assert text.count("| mpo | 3 |") == 4 and text.count("| dpo-easy | 2 |") == 4
    assert "| mpo - dpo-easy | 2 | 0.75 [" in text and "mpo - ppo-all" not in text
    assert names_of(LINES) == ["dpo-easy", "mpo"]


def test_settings_are_not_mixed():
    parts = by_setting([*LINES, line("mpo", 1, (1, 2, 3), setting={"--data": "digest"})])
    assert list(parts) == ["--data advice", "--data digest"] and [len(part) for part in parts.values()] == [5, 1]
    other_judge = line("mpo", 1, (1, 2, 3)) | {"made_with": {"judge": "hh:1234"}}
    assert list(by_setting([*LINES, other_judge])) == ["--data advice", "--data advice --judge-data hh:1234"]


def test_a_row_that_is_there_twice_is_an_error():
    with pytest.raises(DataError, match="row mpo, seed 2: there are 2 lines"):
        by_setting([*LINES, line("mpo", 2, (1, 2, 3))])


def test_settings_are_compared_with_the_default_and_with_each_other():
    lines = [*LINES, line("mpo@flip-rate-0.2", 1, (1, 1.5, 1)), line("dpo-easy@flip-rate-0.2", 1, (1, 1, 1))]
    text = compared(lines)
    assert "| mpo@flip-rate-0.2 - dpo-easy@flip-rate-0.2 | 1 | 0.50 |" in text and "| mpo@flip-rate-0.2 - mpo | 1 | -0.50 |" in text


def test_reward_models_are_shown_by_what_they_learnt_from():
    """Rows of one base count once; a strong reward model is a base of its own; pairs count once where both halves hold them."""
    lines = [*LINES, line("mpo@split-quantile-0.25", 1, (1, 1, 1)), line("mpo@strong", 1, (1, 1, 1)), line("dpo-all@flip-rate-0.2", 3, (1, 1, 1))]
    lines[-2]["reward_model"] = lines[-2]["reward_model"] | {"accuracy": 0.8}
    lines[-2] |= {"made_with": {"flags": {"--split-rule": "none"}}, "split": {"easy": 7, "difficult": 7, "dropped": 1, "disputed": 2}}
    table = [row.split("|")[1:-1] for row in reward_models_text(lines).splitlines()[4:]]
    assert [[cell.strip() for cell in row] for row in table] == [
        ["none", "3", "0.70 [0.70, 0.70]", "0.60 [0.60, 0.60]", "0.25 [0.25, 0.25]"],
        ["--rm-reward-model strong", "1", "0.80", "0.60", "0.25"],
        ["--flip-rate 0.2", "1", "0.70", "0.60", "0.25"],
    ]
    assert reward_models_text(LINES) == reward_models_text([*LINES, LINES[0] | {"row": "of-an-older-table"}])


def test_marks_count_seeds_once():
    """Two seeds, whatever the number of rows: SFT at 0 and 1."""
    lines = [line(row, seed, (1, 2, 1.5)) for row in ("mpo", "dpo-easy", "ppo-all") for seed in (1, 2)]
    for found in lines:
        found["marks"] = found["marks"] | {"sft": found["marks"]["sft"] | {"true_reward": float(found["seed"] - 1)}}
    assert "sft 0.50 [-5.85, 6.85]" in compared(lines)


def test_csv_has_a_row_per_point():
    rows = list(csv.DictReader(io.StringIO(as_csv(LINES))))
    assert len(rows) == 5 * 4
    best = next(row for row in rows if row["row"] == "mpo" and row["seed"] == "2" and row["point"] == "ppo")
    assert best["picked"] == "best" and float(best["true_reward"]) == 3.0 and best["kl_ref"] == ""
    assert (float(best["validation_score_raw"]), float(best["minutes"]), float(best["list"])) == (1.0, 1.0, 1.5)


@pytest.mark.parametrize("of", ["ablations", "ablations/orders"])
def test_the_committed_tables_are_those_of_the_committed_rows(of):
    """`eval.py --compare tests/results/ablations` was run after the last row came."""
    folder = Path(__file__).resolve().parents[1] / "results" / of
    rows, report = read_rows(folder / "rows.jsonl"), (folder / "report.md").read_text(encoding="utf-8")
    for title, part in by_setting(rows).items():
        assert f"## {title}\n" in report and compared(part) in report
    assert as_csv(rows) == (folder / "rows.csv").read_text(encoding="utf-8")


def test_numbers_of_the_page_are_those_of_the_tables():
    """Every interval that ablations.md states stands in a table of report.md, but for a few that the page says are of no table."""
    results = Path(__file__).resolve().parents[1] / "results"
    interval = re.compile(r"-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]")
    page, *tables = (set(interval.findall((results / name).read_text(encoding="utf-8"))) for name in ("ablations.md", "ablations/report.md", "ablations/orders/report.md"))
    rows = [row for row in read_rows(results / "ablations" / "rows.jsonl") if 6 <= row["seed"] <= 10]  # five seeds that the page reads alone
    later = [differences(rows, "dpo-easy@few-biased-4-epochs", f"{other}@few-biased-4-epochs", "true_reward")["equal_kl"] for other in ("dpo-all", "dpo-blind")]
    assert len(page) > 250 and page - set.union(*tables) <= {
        *(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in later),
        "0.10 [0.05, 0.15]",  # three betas alone, before there were six trials
        "-0.10 [-0.14, -0.05]", "-0.03 [-0.09, 0.04]",  # MPO's score less that of the best of 16, and of 8
        "0.02 [-0.07, 0.10]", "-0.15 [-0.30, 0.01]", "0.03 [0.03, 0.04]", "-0.03 [-0.65, 0.58]",  # rows that stand on another SFT, each less its own
        "0.60 [-0.56, 1.76]", "0.73 [0.17, 1.28]", "0.15 [-1.56, 1.86]",  # of the chain, worlds.jsonl
        "0.08 [0.00, 0.16]", "-0.04 [-0.08, -0.00]", "-0.11 [-0.22, 0.00]", "-0.14 [-0.23, -0.04]",  # another rule for equal KL
    }  # fmt: skip


def test_pictures_of_whatever_rows_there_are(tmp_path):
    pytest.importorskip("matplotlib")
    assert {path.stem for path in pictures.draw(LINES, tmp_path / "few")} == {"gaps", "frontier", "rows"}
    every = [line(name, seed, (1.0, 2.0, 3.0)) for name in ROWS for seed in (1, 2)]
    assert {path.stem for path in pictures.draw(every, tmp_path / "all")} == {"gaps", "frontier", "coefficients", "rows", "threshold", "budget", "noise"}
    assert all(path.stat().st_size > 10_000 for path in (tmp_path / "all").iterdir())
    sweeps = [line(name, 1, (1.0, 2.0, 3.0)) for name in ROWS if name not in CORE]
    assert "threshold" in {path.stem for path in pictures.draw(sweeps, tmp_path / "sweeps")}


def test_without_matplotlib_an_import_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        pictures.draw(LINES, tmp_path)
