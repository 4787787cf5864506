"""Numbers for people: intervals, the reward model's report, distinct-n, Markdown tables. No file, no flag, no torch.

Every rate comes with its n and a 95 % interval, ties count half and are counted, and everything about scores is in raw log-odds.
An accuracy of nothing (n = 0) is None, as are the ends of an interval from a single value.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from data.errors import NumericalError

GAP_BUCKETS = (0.0, 0.5, 1.0, 2.0, math.inf)
CALIBRATION_BINS = np.linspace(0.5, 1.0, 11)


# Intervals

def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a rate of `successes` out of n; (0, 1) for n = 0.

    Ties may count half: outcomes in {0, 1/2, 1} vary less than a coin of the same mean, so the interval then errs on the wide side.
    Source: Wilson 1927; Brown, Cai and DasGupta 2001, equation 4.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of a few independent, roughly normal values, such as one per seed. Raises ValueError on no values."""
    return _interval(values, lambda degrees: t_quantile(0.5 + confidence / 2, degrees))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of many independent values of any distribution, from 100 or so; for few use `t_interval`. Raises likewise."""
    return _interval(values, lambda degrees: NormalDist().inv_cdf(0.5 + confidence / 2))


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of a - b where a[i] and b[i] belong together (same seed); what they share cancels out of the interval."""
    if len(a) != len(b):
        raise ValueError(f"pairs need equal numbers of values, got {len(a)} and {len(b)}")
    return t_interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), confidence)


def _interval(values: Sequence[float], quantile) -> tuple[float, float | None, float | None]:
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError("no values to average")
    mean = float(values.mean())
    if values.size == 1:
        return mean, None, None
    half = quantile(values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean, mean - half, mean + half


def t_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t with `degrees` of freedom, 1/2 <= p < 1.

    P(|t| > x) is the regularised incomplete beta function I_c(degrees/2, 1/2) at c = degrees / (degrees + x^2). With x =
    sqrt(degrees) tan(angle) that is c = cos^2(angle), which falls from 1 to 0 on [0, pi/2]: bisect for the angle. Source: DLMF 8.17.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if incomplete_beta(math.cos(angle) ** 2, degrees / 2, 0.5) > 2 * (1 - p):
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan(low)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 <= x <= 1, by its continued fraction (DLMF 8.17.22).

    I_x(a, b) = x^a (1-x)^b / (a B(a, b)) * 1/(1 + d_1/(1 + d_2/(1 + ...))), evaluated from the front (Lentz's method).
    """
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this point; above it, take the other tail
        return 1 - incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    fraction, numerator, denominator = 1.0, 1.0, 0.0
    for k in range(1, 10_000):
        m = k // 2
        if k % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1 / (1 + term * denominator)
        numerator = 1 + term / numerator
        fraction *= numerator * denominator
        if abs(numerator * denominator - 1) < 1e-15:
            return front / fraction
    raise NumericalError(f"the incomplete beta function did not converge at x {x}, a {a}, b {b}")


# The reward model

def accuracy(outcomes: np.ndarray) -> dict:
    """n, accuracy (None for n = 0), its 95 % interval and the number of ties, from outcomes (n,) in {0, 1/2, 1}."""
    n = len(outcomes)
    return {"n": n, "accuracy": float(np.mean(outcomes)) if n else None, "interval": list(wilson_interval(float(np.sum(outcomes)), n)),
            "ties": int(np.sum(outcomes == 0.5))}


def reward_model_report(chosen_scores: np.ndarray, rejected_scores: np.ndarray, chosen_lengths: np.ndarray,
                        rejected_lengths: np.ndarray) -> dict:
    """What a reward model is worth on N labelled pairs, as plain numbers; every argument (N,), scores in raw log-odds, lengths in tokens.

    n, accuracy, interval, ties: how often the chosen response scores higher.
    buckets: the same by |gap|, with each bucket's share of the pairs; share_of_gaps_below_1 is the share of |gap| in [0, 1).
    calibration_error: the model says that the higher-scored response is preferred with probability sigmoid(|gap|); expected calibration
      error over ten bins of that confidence (Guo et al. 2017, equation 3).
    length: Pearson correlation of score and length over all 2N responses, and of score and length differences (chosen - rejected) over
      the pairs (None where one of the two is constant); accuracy of "the longer one wins", which any reward model should beat; and the
      model's accuracy on pairs whose lengths differ by at most 10 % of the longer one.
    Raises ValueError on no pairs, NumericalError on a score that is not finite.
    """
    chosen_scores, rejected_scores = np.asarray(chosen_scores, dtype=np.float64), np.asarray(rejected_scores, dtype=np.float64)
    chosen_lengths, rejected_lengths = np.asarray(chosen_lengths, dtype=np.float64), np.asarray(rejected_lengths, dtype=np.float64)
    if not len(chosen_scores):
        raise ValueError("no pairs to report on")
    gaps, longer_by = chosen_scores - rejected_scores, chosen_lengths - rejected_lengths
    bad = np.flatnonzero(~np.isfinite(gaps))
    if bad.size:
        raise NumericalError(f"row {bad[0]} has the scores {chosen_scores[bad[0]]} and {rejected_scores[bad[0]]} ({bad.size} such rows)")
    wins, size = _in_order(gaps), np.abs(gaps)
    matched = np.abs(longer_by) <= 0.1 * np.maximum(chosen_lengths, rejected_lengths)
    buckets = {}
    for low, high in zip(GAP_BUCKETS, GAP_BUCKETS[1:]):
        inside = (size >= low) & (size < high)
        buckets[f"[{low:g}, {high:g})"] = {"share": float(inside.mean())} | accuracy(wins[inside])
    return accuracy(wins) | {
        "buckets": buckets,
        "share_of_gaps_below_1": float((size < 1).mean()),
        "calibration_error": calibration_error(1 / (1 + np.exp(-size)), wins),
        "length": {
            "correlation": pearson(np.concatenate([chosen_scores, rejected_scores]), np.concatenate([chosen_lengths, rejected_lengths])),
            "correlation_of_differences": pearson(gaps, longer_by),
            "longer_wins": accuracy(_in_order(longer_by)),
            "length_matched": accuracy(wins[matched]),
        },
    }


def pair_accuracy(scores: np.ndarray) -> float:
    """Share of pairs, rows of (chosen, rejected) scores (N, 2), whose chosen response scores higher; ties half."""
    return float(_in_order(scores[:, 0] - scores[:, 1]).mean())


def reward_model_text(test: dict, scored_accuracy: float) -> str:
    """A `reward_model_report` on test pairs in a few lines; scored_accuracy: that on the training pairs as scored for the split."""
    cells = [f"{name} {bucket['share']:.0%}: {format_interval(bucket['accuracy'])} (n = {bucket['n']})" for name, bucket in test["buckets"].items()]
    return (
        f"  accuracy on test pairs {format_interval(test['accuracy'], *test['interval'])} (n = {test['n']}); the longer one wins"
        f" {test['length']['longer_wins']['accuracy']:.2f}; on pairs as scored for the split {scored_accuracy:.2f}\n"
        f"  share and accuracy by gap: {'; '.join(cells)}; calibration error {test['calibration_error']:.3f};"
        f" correlation of score and length {format_interval(test['length']['correlation'])}"
    )


def _in_order(difference: np.ndarray) -> np.ndarray:
    """1 where the chosen one is ahead, 1/2 for a tie, 0 where it is behind: outcomes, from differences of scores."""
    return (np.sign(difference) + 1) / 2


def calibration_error(confidence: np.ndarray, outcomes: np.ndarray) -> float:
    """Mean over bins of |mean confidence - mean outcome|, weighted by each bin's share; confidence (n,) in [0.5, 1], outcomes (n,)."""
    bins = np.digitize(confidence, CALIBRATION_BINS[1:-1])
    return sum(abs(float(np.sum(confidence[bins == b] - outcomes[bins == b]))) for b in np.unique(bins)) / len(confidence)


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation of x (n,) and y (n,), or None where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


# Text

def distinct_n(token_lists: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams divided by all n-grams, over all responses together (Li et al. 2016); 0 where there are none.

    It falls as the text grows: compare only sets of about the same size.
    """
    grams = [tuple(tokens[i:i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def format_interval(mean: float | None, low: float | None = None, high: float | None = None, digits: int = 2) -> str:
    """"0.61 [0.55, 0.67]"; "0.61" without ends; "-" without a mean."""
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" if low is None or high is None else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table; the first column is left-aligned, the others right. Bars and line breaks in cells are made safe, None is "-"."""
    def line(cells):
        return "| " + " | ".join("-" if c is None else str(c).replace("|", "\\|").replace("\n", "<br>") for c in cells) + " |\n"
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under a header of {len(header)}: {row}")
    return line(header) + line([":---"] + ["---:"] * (len(header) - 1)) + "".join(map(line, rows))


# The comparison of a run's models

def mean(values: Sequence[float], what: str) -> dict:
    """Mean of per-prompt values with n and its 95 % interval; raises NumericalError where a value is not finite."""
    if not np.isfinite(values).all():
        raise NumericalError(f"{what}: not finite for {np.sum(~np.isfinite(values))} of {len(values)} answers; a model's weights are broken")
    middle, *interval = t_interval(values)
    return {"n": len(values), "mean": middle, "interval": interval}


def share(outcomes: Sequence[float]) -> dict:
    """Share of wins (or of True), from outcomes in {0, 1/2, 1}, with n and its 95 % interval; ties are counted."""
    counted = accuracy(np.asarray(outcomes, dtype=np.float64))
    return {"n": counted["n"], "mean": counted["accuracy"], "interval": counted["interval"], "ties": counted["ties"]}


def wins(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where mine (N,) is greater than theirs (N,), 1/2 where they are equal (up to the rounding of a sum of terms), else 0."""
    return np.where(np.abs(mine - theirs) <= 1e-9, 0.5, mine > theirs)


def preference_numbers(logps: np.ndarray, ref_logps: np.ndarray, ideal_shift: np.ndarray | None) -> dict:
    """How a policy ranks N labelled pairs; logps and ref_logps (N, 2): log-probabilities of chosen and rejected, under policy and SFT.

    chosen_shift, rejected_shift: nats gained since SFT, summed over a response's tokens; both falling is common under DPO.
    ranking_accuracy: how often the chosen response is the likelier one, lengths and all, ties half; idealised_ranking_accuracy: the same of the
      policy that DPO would end at, log pi(chosen) / pi(rejected) = ref_logps' difference + ideal_shift (N,), where that is log odds / beta.
    Source: Chen et al., arXiv 2405.19534, definition 2.1 and theorem 3.1.
    """
    shift = logps - ref_logps
    numbers = {
        "chosen_shift": mean(shift[:, 0], "shift of the chosen log-probability"),
        "rejected_shift": mean(shift[:, 1], "shift of the rejected log-probability"),
        "ranking_accuracy": share(_in_order(logps[:, 0] - logps[:, 1])),
    }
    if ideal_shift is not None:
        numbers["idealised_ranking_accuracy"] = share(_in_order(ref_logps[:, 0] - ref_logps[:, 1] + ideal_shift))
    return numbers


def profile_text(logs: Sequence[Sequence[dict]]) -> str:
    """Where the time of training went: a table of phases from the lines of metrics files, each file one loop's; "" where they have none.

    A line's `time` is the seconds since its loop began (which begins again where a run was resumed), or with PPO the seconds of each
    phase and their `total`, which is that. What no phase accounts for is `other`: saving, and what lies between the phases.
    """
    seconds: dict[str, float] = {}
    for lines in logs:
        last = 0.0
        for line in lines:
            phases = dict(line["time"]) if isinstance(line["time"], dict) else {"total": line["time"]}
            now = phases.pop("total")
            spent, last = now - (last if now >= last else 0.0), now
            if any(name.startswith("valid_") for name in line):
                phases = {"validation": spent}
            elif not phases:
                phases = {"steps": spent}
            for name, value in (phases | {"other": spent - sum(phases.values())}).items():
                seconds[name] = seconds.get(name, 0.0) + value
    whole = sum(seconds.values())
    rows = [[name, f"{value:.1f}", f"{value / whole:.0%}"] for name, value in seconds.items() if value >= 0.0005 * whole]
    return markdown_table(["phase", "seconds", "share"], [*rows, ["all", f"{whole:.1f}", "100%"]]) if whole else ""


def report_text(report: dict) -> str:
    """The report as Markdown."""
    rows, n = report["rows"], report["prompts"]
    world = {"true_reward": "true reward", "way_to_best": "way from SFT to best", "well_formed": "well-formed"} if report["world"] else {}
    worth = {"score_raw": "reward model, raw", "score": "normalised"}
    won = {"wins_against_chosen": "wins against chosen", "wins_against_sft": "wins against SFT"}
    far = {"kl_sft": "KL to SFT", "kl_ref": "KL to reference"}
    form = {"tokens": "tokens", "ended": "ended", "distinct_2": "distinct-2"}
    own = {"chosen_shift": "shift of chosen", "rejected_shift": "shift of rejected", "ranking_accuracy": "ranking accuracy"}
    own |= {"idealised_ranking_accuracy": "ideal"} if report["world"] else {}
    left_out = f" ({report['left_out']} others are longer than --max-prompt and cannot be shortened)" if report["left_out"] else ""
    references = ", ".join(f"{name}: {numbers['reference']}" for name, numbers in rows.items() if numbers.get("reference"))

    def table(columns: dict[str, str]) -> str:
        lines = [[name, *(cell(numbers.get(key)) for key in columns)] for name, numbers in rows.items()]
        return markdown_table(["", *columns.values()], lines)

    parts = [
        f"# The models of {report['run']}\n",
        f"{n} {report['part']} prompts of {report['data']}{left_out}, answers {report['decoding']}, seed {report['seed']}; n = {n}, 95 % intervals in brackets. Reward"
        f" model: {report['reward_model']}. Wins are judged by the {report['wins_judged_by']}, ties count half.\n",
        table(world | worth | won),
        f"KL in nats per response, exact over the vocabulary, on samples at temperature 1 (references: {references or 'none'}). Tokens count"
        f" the end token; answers that ended have one, those that were cut reached {report['max_response']} tokens without.\n",
        table(far | form),
        f"On the {report['part']} pairs' own responses: nats that their log-probabilities gained on SFT's, and how often the chosen one is the likelier"
        + ("; ideal is what DPO's optimum on all pairs would reach at this beta.\n" if world else ".\n"),
        table(own),
    ]
    if world:
        by_kind = [numbers["true_reward_by_kind"] for numbers in rows.values()]
        lines = [[f"{k} (n = {value['n']})", *(cell(numbers[k]) for numbers in by_kind)] for k, value in by_kind[0].items()]
        parts += ["True reward by kind of prompt:\n", markdown_table(["", *rows], lines)]
    return "\n".join([*parts, f"The first {len(report['samples'])} prompts:\n", *map(sample_text, report["samples"])])


def cell(value: dict | float | None) -> str:
    """A mean or share with its interval, a bare number, or "-"; a mean without interval is a bound."""
    if isinstance(value, dict) and value["interval"] is None:
        return f"at most {value['mean']:.2f}"
    return format_interval(value["mean"], *value["interval"]) if isinstance(value, dict) else format_interval(value)


def printable(text: str) -> str:
    """A model's text with control characters other than tabs and line breaks as \\xNN: a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def sample_text(shown: dict) -> str:
    """One prompt with the responses below it, each with the true reward (where there is one) and the reward model's raw score."""
    lines = [textwrap.indent(shown["prompt"].strip(), "    "), ""]
    for name, response in shown["responses"].items():
        true = f"true reward {response['true_reward']:.2f}, " if "true_reward" in response else ""
        lines.append(f"- **{name}** ({true}reward model {response['score_raw']:.2f}): " + printable(response["text"].strip()).replace("\n", "\n  "))
    return "\n".join(lines) + "\n"
