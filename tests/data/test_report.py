"""Intervals against scipy and by simulated coverage; the reward model's report against pairs counted by hand."""

import json
import math

import numpy as np
import pytest

from data.errors import NumericalError
from data.report import (calibration_error, distinct_n, format_interval, incomplete_beta, markdown_table, mean, mean_interval, paired_difference,
                         pearson, preference_numbers, profile_text, reward_model_report, t_interval, t_quantile, wilson_interval)


# Intervals

@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 199, 10_000])
def test_t_quantile_against_scipy(degrees):
    stats = pytest.importorskip("scipy.stats")
    for p in (0.5, 0.51, 0.75, 0.975, 0.995, 0.9999):
        assert t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9, abs=1e-12)


def test_t_quantile_against_the_printed_table():
    for degrees, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-4)
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)  # one degree is Cauchy's distribution


def test_incomplete_beta_against_scipy():
    special = pytest.importorskip("scipy.special")
    for a, b in ((0.5, 0.5), (1, 0.5), (2.5, 0.5), (50, 0.5), (3, 7), (0.5, 50)):
        for x in (0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
            assert incomplete_beta(x, a, b) == pytest.approx(special.betainc(a, b, x), rel=1e-11, abs=1e-14)


def test_wilson_against_scipy_and_by_hand():
    stats = pytest.importorskip("scipy.stats")
    for successes, n in ((0, 1), (0, 20), (1, 20), (10, 20), (20, 20), (730, 1000)):
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    # By hand, no success in n: the interval is [0, z^2 / (n + z^2)] with z^2 = 3.8415.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(2.5, 5)
    assert low + high == pytest.approx(1.0)  # half of the successes: symmetric


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


def test_coverage_of_wilson():
    """Exact coverage wobbles around 95 % with n and p; its mean over a spread of p must be within a point. (Wald's is 89 % here.)"""
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.02, 0.98, size=4000)
    assert abs(np.mean([coverage([wilson_interval(rng.binomial(25, p), 25)], p) for p in rates]) - 0.95) < 0.012
    assert abs(coverage([wilson_interval(k, 500) for k in rng.binomial(500, 0.73, size=4000)], 0.73) - 0.95) < 0.012


def test_coverage_of_wilson_with_ties():
    """Half successes: never below 95 %."""
    rng = np.random.default_rng(1)
    draws = rng.choice([0, 0.5, 1], p=[0.3, 0.3, 0.4], size=(2000, 100)).sum(1)
    assert coverage([wilson_interval(s, 100) for s in draws], 0.55) > 0.95


@pytest.mark.parametrize("n", [3, 5])
def test_coverage_of_t_and_of_paired_differences(n):
    """2,000 draws have a standard error of 0.5 points. With z instead of t it is 81 % for n = 3; without pairing, far above 99 %."""
    rng = np.random.default_rng(n)
    seeds, noise = rng.normal(0, 5, size=(2000, n)), rng.normal(0, 1, size=(2, 2000, n))
    assert abs(coverage([t_interval(row)[1:] for row in 7 + noise[0]], 7) - 0.95) < 0.016
    pairs = zip(seeds + noise[0] + 0.3, seeds + noise[1])
    assert abs(coverage([paired_difference(a, b)[1:] for a, b in pairs], 0.3) - 0.95) < 0.016


def test_coverage_of_the_mean():
    """Skewed values, n = 400."""
    rng = np.random.default_rng(0)
    assert abs(coverage([mean_interval(row)[1:] for row in rng.exponential(size=(2000, 400))], 1) - 0.95) < 0.016


def test_intervals_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, standard error 1/sqrt 3; t with two degrees is 4.30265."""
    half = 4.302652729911275 / math.sqrt(3)
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2 - half, 2 + half), rel=1e-9)
    assert paired_difference([11, 22, 33], [10, 20, 30]) == pytest.approx((2, 2 - half, 2 + half), rel=1e-9)
    half = 1.959963984540054 / math.sqrt(3)
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - half, 2 + half), rel=1e-9)


def test_intervals_of_too_few():
    assert t_interval([4.0]) == mean_interval([4.0]) == (4.0, None, None)
    for wrong in (lambda: t_interval([]), lambda: mean_interval([]), lambda: paired_difference([1, 2], [1])):
        with pytest.raises(ValueError):
            wrong()


# The reward model

def test_report_by_hand():
    """Six pairs: gaps 0.25, -0.5, 0, 1, -1.5, 3; chosen is longer in rows 0, 3 and 4, equal in row 5."""
    chosen, rejected = np.array([1.25, 0.5, 2.0, 1.0, -0.5, 3.0]), np.array([1.0, 1.0, 2.0, 0.0, 1.0, 0.0])
    lengths = np.array([[20, 10, 9, 11, 30, 8], [10, 20, 10, 10, 10, 8]])
    report = reward_model_report(chosen, rejected, *lengths)
    assert (report["n"], report["accuracy"], report["ties"]) == (6, 3.5 / 6, 1)  # right: rows 0, 3, 5; half: row 2
    assert report["interval"] == list(wilson_interval(3.5, 6))
    assert report["share_of_gaps_below_1"] == 0.5
    assert {name: (b["n"], b["share"], b["accuracy"], b["ties"]) for name, b in report["buckets"].items()} == {
        "[0, 0.5)": (2, 2 / 6, 0.75, 1), "[0.5, 1)": (1, 1 / 6, 0.0, 0), "[1, 2)": (2, 2 / 6, 0.5, 0), "[2, inf)": (1, 1 / 6, 1.0, 0)}
    assert report["buckets"]["[1, 2)"]["interval"] == list(wilson_interval(1, 2))
    # Bins of width 0.05: confidences 0.500 and none other in the first bin; 0.562 -> [.55, .6); 0.622 -> [.6, .65); 0.731 -> [.7, .75);
    # 0.818 -> [.8, .85); 0.953 -> the last. Every bin holds one pair, so the error is the mean of |confidence - outcome|.
    sigmoid = [1 / (1 + math.exp(-size)) for size in (0.25, 0.5, 0.0, 1.0, 1.5, 3.0)]
    expected = np.mean([abs(c - o) for c, o in zip(sigmoid, (1, 0, 0.5, 1, 0, 1))])
    assert report["calibration_error"] == pytest.approx(expected, rel=1e-12)
    length = report["length"]
    assert (length["longer_wins"]["accuracy"], length["longer_wins"]["ties"]) == (3.5 / 6, 1)
    assert (length["length_matched"]["n"], length["length_matched"]["accuracy"]) == (3, 2.5 / 3)  # rows 2 (9, 10), 3 (11, 10), 5 (8, 8)
    stats = pytest.importorskip("scipy.stats")
    assert length["correlation"] == pytest.approx(stats.pearsonr([*chosen, *rejected], lengths.ravel())[0], rel=1e-12)
    assert length["correlation_of_differences"] == pytest.approx(stats.pearsonr(chosen - rejected, lengths[0] - lengths[1])[0], rel=1e-12)
    json.dumps(report, allow_nan=False)


def test_calibration_of_known_models():
    """Labels drawn from the model's own sigmoid: no error but sampling's. Gaps three times too large: the error that the integral gives."""
    rng = np.random.default_rng(0)
    true_gaps = rng.normal(0, 1.5, size=200_000)
    labels = rng.random(200_000) < 1 / (1 + np.exp(-true_gaps))
    signed = np.where(labels, true_gaps, -true_gaps)
    honest = reward_model_report(signed, np.zeros_like(signed), np.ones_like(signed), np.ones_like(signed))
    assert honest["calibration_error"] < 0.01
    bold = reward_model_report(3 * signed, np.zeros_like(signed), np.ones_like(signed), np.ones_like(signed))
    gap = np.linspace(0, 15, 20_001)
    density = np.exp(-gap**2 / 4.5)
    expected = np.sum((1 / (1 + np.exp(-3 * gap)) - 1 / (1 + np.exp(-gap))) * density) / density.sum()
    assert bold["calibration_error"] == pytest.approx(expected, abs=0.01)
    assert calibration_error(np.array([0.5, 1.0]), np.array([0.5, 1.0])) == 0


def test_swapping_the_sides_mirrors_the_report():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 300)).round(1)
    lengths = rng.integers(5, 40, size=(2, 300))
    there, back = reward_model_report(chosen, rejected, *lengths), reward_model_report(rejected, chosen, *lengths[::-1])
    assert there["ties"] == back["ties"] > 0
    assert there["accuracy"] + back["accuracy"] == pytest.approx(1)
    assert there["length"]["longer_wins"]["accuracy"] + back["length"]["longer_wins"]["accuracy"] == pytest.approx(1)


def test_report_without_enough_to_say():
    report = reward_model_report([0.2], [0.1], [10], [20])
    assert report["length"]["length_matched"]["accuracy"] is None and report["length"]["correlation_of_differences"] is None
    assert report["buckets"]["[2, inf)"] == {"share": 0.0, "n": 0, "accuracy": None, "interval": [0.0, 1.0], "ties": 0}
    assert pearson(np.full(7, 0.1), np.arange(7.0)) is None
    with pytest.raises(NumericalError, match="row 1 has the scores nan"):
        reward_model_report([0.2, float("nan")], [0.1, 0.1], [1, 1], [1, 1])
    with pytest.raises(ValueError):
        reward_model_report([], [], [], [])


def test_a_mean_of_what_is_not_finite_is_refused():
    assert mean([1.0, 2.0, 3.0], "KL of dpo")["mean"] == 2.0
    with pytest.raises(NumericalError, match="KL of dpo: not finite for 1 of 3 answers"):
        mean([1.0, float("nan"), 3.0], "KL of dpo")


# Text

def test_distinct_n_by_hand():
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # (1,2) (2,1) (1,2) | (1,2); none across responses
    assert distinct_n([[1], []], 2) == 0.0


def test_tables_and_intervals_as_text():
    assert format_interval(0.6149, 0.55, 0.67) == "0.61 [0.55, 0.67]"
    assert format_interval(1.5, None, None, digits=1) == "1.5"
    assert format_interval(None) == "-"
    assert markdown_table(["model", "score"], [["a|b\nc", 1], [None, "2"]]) == (
        "| model | score |\n| :--- | ---: |\n| a\\|b<br>c | 1 |\n| - | 2 |\n")
    with pytest.raises(ValueError, match="2 cells under a header of 1"):
        markdown_table(["model"], [[1, 2]])


def test_where_the_time_went():
    """Two loops: one of PPO, one that was resumed after its second step."""
    ppo = [
        {"valid_score": 0.0, "time": 2.0},
        {"score": 0.0, "time": {"generate": 1.0, "update": 3.0, "total": 7.0}},
        {"score": 0.0, "time": {"generate": 1.5, "update": 2.5, "total": 11.0}},
        {"valid_score": 0.0, "time": 13.0},
    ]
    other = [{"valid_loss": 1.0, "time": 1.0}, {"loss": 1.0, "time": 3.0}, {"loss": 1.0, "time": 2.5}]
    lines = profile_text([ppo, other]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [["validation", "5.0", "27%"], ["other", "1.0", "5%"], ["generate", "2.5", "14%"], ["update", "5.5", "30%"],
                     ["steps", "4.5", "24%"], ["all", "18.5", "100%"]]  # fmt: skip
    assert profile_text([[]]) == ""


def test_how_a_policy_ranks_pairs():
    """Three pairs by hand: log-probabilities of (chosen, rejected) under the policy and under SFT."""
    logps, ref = np.array([[-3.0, -4.0], [-6.0, -5.0], [-2.0, -2.0]]), np.array([[-2.0, -1.0], [-5.0, -4.0], [-2.0, -1.0]])
    found = preference_numbers(logps, ref, np.array([2.0, 0.5, 1.0]))
    assert found["chosen_shift"]["mean"] == pytest.approx(-2 / 3) and found["rejected_shift"]["mean"] == pytest.approx(-5 / 3)
    assert found["ranking_accuracy"]["mean"] == pytest.approx(0.5) and found["ranking_accuracy"]["ties"] == 1
    assert found["idealised_ranking_accuracy"]["mean"] == pytest.approx(0.5)  # -1 + 2 > 0, -1 + 0.5 < 0, -1 + 1 = 0
    assert "idealised_ranking_accuracy" not in preference_numbers(logps, ref, None)
