"""What a grid's lines show: tables over seeds with t intervals, differences paired by seed, one CSV. No picture, no torch.

A row has several points, one per kept weights. Four are told apart: the best by its own validation, the last, and the best on validation
prompts by the judge (a reward model trained on other pairs) and by true reward, which no user of the method could see.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from data.ablations import CLAIMS, MATTERS, ROWS, base_flags
from data.errors import DataError
from data.report import format_interval, markdown_table, paired_difference, t_interval

PICKS = {"best": "best by own validation", "last": "last", "judge": "best by the judge", "true": "best by true reward"}
TRIALS = ("dpo-beta-", "dpo-lr-", "ppo-kl-coef-", "ppo-lr-")  # rows that differ from another in one of these flags alone are trials of that row
COURSE = {  # what is kept of metrics.jsonl, and shown
    "DPO, on validation pairs": {"valid_chosen_logp": "chosen log-probability", "valid_rejected_logp": "rejected log-probability",
                                 "valid_accuracy": "accuracy of the implicit reward", "valid_kl_ref_seq": "KL to reference"},
    "PPO, on its own samples": {"explained_variance": "critic's explained variance", "clip_share": "clip share", "entropy": "entropy per token",
                                "kl_old_tok": "KL old/new per token", "kl_ref_seq": "KL to reference", "ended": "ended"},
}  # fmt: skip
COLUMNS = {
    "true_reward": "true reward", "score": "score, standard deviations", "wins_against_chosen": "wins against chosen",
    "wins_against_sft": "wins against SFT", "well_formed": "well-formed", "kl_sft": "KL to SFT", "kl_ref": "KL to reference",
    "chosen_shift": "shift of chosen log-probability", "rejected_shift": "of rejected", "ranking_accuracy": "ranking accuracy",
    "idealised_ranking_accuracy": "that of DPO's optimum on all pairs", "tokens": "tokens", "ended": "ended", "dpo_pairs": "DPO pairs seen",
    "online_samples": "samples online",
}  # fmt: skip


def by_setting(lines: Sequence[dict]) -> dict[str, list[dict]]:
    """The lines parted by the flags that all rows of a grid share and by their judge, which are the names.

    Raises DataError where a row is there twice for a seed: one was made before a default changed."""
    parts: dict[str, list[dict]] = {}
    for line in lines:
        judge = line["made_with"]["judge"]
        shared = line["setting"] | ({"--judge-data": judge} if judge not in (None, line["world"]) else {})
        parts.setdefault(" ".join(f"{flag} {value}" for flag, value in sorted(shared.items())), []).append(line)
    for part in parts.values():
        (task, count), *_ = Counter((line["row"], line["seed"]) for line in part).most_common(1)
        if count > 1:
            raise DataError(f"row {task[0]}, seed {task[1]}: there are {count} lines of it in one setting; remove all but one")
    return parts


def of_row(lines: Sequence[dict], name: str) -> dict[int, dict]:
    """Seed -> line of one row."""
    return {line["seed"]: line for line in sorted(lines, key=lambda line: line["seed"]) if line["row"] == name}


def one_per_seed(lines: Sequence[dict]) -> list[dict]:
    """A line of each seed, of no sweep where any line is: all such rows of a seed share its reward model and the marks, and a seed that was run in
    other settings alone has others."""
    return list({line["seed"]: line for line in [line for line in lines if "@" not in line["row"]] or lines}.values())


def names_of(lines: Sequence[dict]) -> list[str]:
    """Rows that have lines, in the order of the table."""
    there = {line["row"] for line in lines}
    return [name for name in ROWS if name in there] + sorted(there - set(ROWS))


def at(pick: str, key: str) -> Callable[[dict], float | None]:
    """line -> a number of one of its points, None where it has no such point or number."""
    return lambda line: line["points"][line["picked"][pick]].get(key) if pick in line["picked"] else None


def on_kind(kind: str) -> Callable[[dict], float | None]:
    """line -> the true reward on prompts of one kind, at the best weights by own validation; None where there were no such prompts."""
    return lambda line: line["points"][line["picked"]["best"]]["true_reward_by_kind"].get(kind)


def over_seeds(lines: Sequence[dict], value: Callable[[dict], float | None]) -> str | None:
    """Mean and t interval of a number over lines, as text, counts without decimals; None where any lacks it."""
    values = [value(line) for line in lines]
    return None if None in values else format_interval(*t_interval(values), digits=0 if all(isinstance(value, int) for value in values) else 2)


def passed(lines: Sequence[dict], line: dict) -> list[dict]:
    """The weights that a row started from, and those that they started from: points on its way from SFT. None for a row that began as SFT."""
    row = ROWS.get(line["row"])
    start = row and row.start and "--ppo-init" not in row.flags and of_row(lines, row.start).get(line["seed"])
    return [*passed(lines, start), start["points"][start["picked"]["best"]]] if start else []


def frontier(line: dict, key: str, before: Sequence[dict] = ()) -> list[tuple[float, float]]:
    """(KL to SFT, number) of SFT, of the points `before` a row's own, and of those of its own points that one would pick when asked to stay so
    near: on validation prompts the judge scores each above all that are nearer. Nearest first. What went astray on its way is not among them."""
    found = [(0.0, line["marks"]["sft"][key]), *((point["kl_sft"], point[key]) for point in before)]
    highest = -math.inf
    for name, point in sorted(line["points"].items(), key=lambda item: item[1]["kl_sft"]):
        if (score := line["validation"][name]["score_raw"]) > highest:
            found.append((point["kl_sft"], point[key]))
            highest = score
    return sorted(found)


def at_equal_kl(a: dict, b: dict, key: str, lines: Sequence[dict] = ()) -> tuple[float, float, float] | None:
    """The numbers of two of the lines at the KL of the nearer one's best point, and that KL; None where the farther one was never about so near:
    all of its weights are over twice as far, or it started from a model as far. Nor is there one without a judge: the reward model that a row
    was trained against would say how far it goes.

    The farther one is read on its frontier, straight between its points in the square root of the KL: a reward grows about so (Gao et al.,
    arXiv 2210.10760)."""
    near, far = sorted((a, b), key=at("best", "kl_sft"))
    kl, before = at("best", "kl_sft")(near), passed(lines, far)
    nearest = min(point["kl_sft"] for point in far["points"].values())
    if None in (a["made_with"]["judge"], b["made_with"]["judge"]) or kl <= 0 or nearest > 2 * kl or any(point["kl_sft"] >= kl for point in before):
        return None
    places, numbers = zip(*frontier(far, key, before), strict=True)
    nears, fars = at("best", key)(near), float(np.interp(math.sqrt(kl), np.sqrt(places), numbers))
    return (nears, fars, kl) if near is a else (fars, nears, kl)


def at_equal_pairs(a: dict, b: dict, key: str) -> tuple[float, float] | None:
    """The numbers of two lines of DPO after as many pairs as the shorter one saw, on straight lines between kept weights; None for others."""
    pairs = min(at("last", "dpo_pairs")(line) for line in (a, b))
    if not pairs or any(point["online_samples"] for line in (a, b) for point in line["points"].values()):
        return None
    ways = [sorted([(0, line["marks"]["sft"][key]), *((point["dpo_pairs"], point[key]) for point in line["points"].values())]) for line in (a, b)]
    return tuple(float(np.interp(pairs, *zip(*way, strict=True))) for way in ways)


def by_seed(lines: Sequence[dict], a: str, b: str) -> list[tuple[dict, dict]]:
    """The lines of two rows, of each seed that has both."""
    first, second = of_row(lines, a), of_row(lines, b)
    return [(first[seed], second[seed]) for seed in first if seed in second]


def on_two_sfts(x: dict, y: dict, key: str) -> bool:
    """Whether two lines of a seed, with the same flags up to SFT, stand on SFT models that were made twice and came out differently, as on other
    machines: a difference of the lines then has theirs in it."""
    of_others = ("--rm-", "--split-", "--dpo-", "--ppo-", "--best-of")
    mine, theirs = ({flag: value for flag, value in line["made_with"]["flags"].items() if not flag.startswith(of_others)} for line in (x, y))
    return mine == theirs and abs(x["marks"]["sft"][key] - y["marks"]["sft"][key]) > 1e-4  # more than rounding, less than one other answer


def differences(lines: Sequence[dict], a: str, b: str, key: str = "true_reward") -> dict:
    """a - b paired by seed: {"seeds": n, "on_two_sfts": of how many seeds, PICK: (mean, low, high), "equal_pairs" and "equal_kl" likewise,
    "kl": mean}, less what the rows lack."""
    both = by_seed(lines, a, b)
    found: dict = {"seeds": len(both), "on_two_sfts": sum(on_two_sfts(x, y, key) for x, y in both)}
    for pick in PICKS:
        values = [(at(pick, key)(x), at(pick, key)(y)) for x, y in both]
        if both and not any(None in pair for pair in values):
            found[pick] = paired_difference(*zip(*values, strict=True))
    if both and None not in (matched := [at_equal_pairs(x, y, key) for x, y in both]):
        found["equal_pairs"] = paired_difference(*zip(*matched, strict=True))
    if both and None not in (matched := [at_equal_kl(x, y, key, lines) for x, y in both]):
        mine, theirs, kl = zip(*matched, strict=True)
        found |= {"equal_kl": paired_difference(mine, theirs), "kl": float(np.mean(kl))}
    return found


def verdict(difference: tuple[float, float | None, float | None] | None) -> str:
    """What a paired difference a - b shows of a, in a few words."""
    if difference is None:
        return "not comparable"
    _, low, high = difference
    if low is None:
        return "too few seeds"
    if low > 0 or high < 0:
        return ("better" if low > 0 else "worse") + ("" if min(abs(low), abs(high)) >= MATTERS else ", perhaps by too little to matter")
    if -MATTERS < low:
        return f"no difference of {MATTERS:g}" if high < MATTERS else "at least as good"
    return f"not better by {MATTERS:g}" if high < MATTERS else "not shown"


def compared(lines: Sequence[dict]) -> str:
    """All tables of one setting, as Markdown."""
    names, world = names_of(lines), any(line["world"] for line in lines)
    key = "true_reward" if world else "score"  # raw scores have no zero: over seeds their means say nothing
    count = {name: len(of_row(lines, name)) for name in names}

    def table(columns: dict[str, Callable[[dict], float | None]]) -> str:
        rows = [[name, count[name], *(over_seeds(list(of_row(lines, name).values()), value) for value in columns.values())] for name in names]
        return markdown_table(["", "seeds", *columns], rows)

    marks = {mark: over_seeds(one_per_seed(lines), lambda line, mark=mark: line["marks"].get(mark, {}).get(key)) for mark in ("sft", "chosen", "best")}
    shown = ({"true_reward": "true reward"} if world else {}) | {"score": "score", "kl_sft": "KL"}
    versions = {line["code"] for line in lines}
    kinds = list(lines[0]["marks"]["sft"].get("true_reward_by_kind", {}))
    parts = [
        f"Mean over seeds with 95 % t interval; {lines[0]['prompts']} test prompts; {COLUMNS[key]}: "
        + ", ".join(f"{mark} {value}" for mark, value in marks.items() if value)
        + f". Made by {len(versions)} version{'s' * (len(versions) > 1)} of the code.\n",
        gaps_text(one_per_seed(lines)), reward_models_text(lines),
        differences_text(lines, key), settings_text(lines, key), samples_text(lines, key),
        f"At the weights that are {PICKS['best']}"
        + ("; best-of-n is not trained: the best of 16 answers, which is at most so far from SFT and costs 16 samples a prompt" if "best-of-n" in names else "") + ":\n",
        table({title: at("best", column) for column, title in COLUMNS.items()} | {"minutes of its own stage": lambda line: line["time"]["train"] / 60}),
        "At the last weights:\n",
        table({title: at("last", column) for column, title in COLUMNS.items()}),
        "At each of the weights that one could pick (a score that rises while the true reward falls is over-optimisation):\n",
        table({f"{text}, {what}": at(pick, column) for pick, text in PICKS.items() for column, what in shown.items()}),
        trials_text(lines, key), course_text(lines),
    ]  # fmt: skip
    if kinds:
        parts += ["True reward by kind of prompt, best by own validation:\n",
                  table({kind: on_kind(kind) for kind in kinds}),
                  kinds_text(lines, kinds)]  # fmt: skip
    return "\n".join(parts)


def gaps_text(lines: Sequence[dict]) -> str:
    """The reward model by the size of its gap, one line per seed: the first claim."""
    buckets = lines[0]["reward_model"]["buckets"]
    rows = [[bucket, *(over_seeds(lines, lambda line, b=bucket, what=what: line["reward_model"]["buckets"][b][what]) for what in ("share", "accuracy"))] for bucket in buckets]
    return "Claim: accuracy rises with the gap, and most gaps are small. The reward model on test pairs:\n\n" + markdown_table(["gap", "share of pairs", "right on labels"], rows)


def pairs_of(line: dict) -> int:
    """How many pairs were split; under the rule none both halves hold them all."""
    easy, difficult, dropped = (line["split"][part] for part in ("easy", "difficult", "dropped"))
    return dropped + (easy if line["made_with"]["flags"].get("--split-rule") == "none" else easy + difficult)


def reward_models_text(lines: Sequence[dict]) -> str:
    """The reward model of the defaults and of every setting that has one of its own. Rows that left the table are left out."""
    of_setting: dict[str, list[dict]] = {}
    for line in lines:
        if line["row"] in ROWS:
            of_setting.setdefault(", ".join(f"{flag} {value}" for flag, value in base_flags(line["row"]).items()), []).append(line)
    columns = {
        "right on labels": lambda line: line["reward_model"]["accuracy"],
        "gaps below 1": lambda line: line["reward_model"]["share_of_gaps_below_1"],
        "training pairs disputed": lambda line: line["split"]["disputed"] / pairs_of(line),
    }
    models = {flags or "none": one_per_seed(found) for flags, found in of_setting.items()}
    rows = [[flags, len(found), *(over_seeds(found, value) for value in columns.values())] for flags, found in models.items()]
    return "Reward models by the flags that rows share:\n\n" + markdown_table(["flags", "seeds", *columns], rows)


def differences_text(lines: Sequence[dict], key: str) -> str:
    """The claims' comparisons that these lines allow, with defaults and in every setting that both rows have, and what settings change."""
    names, settings = names_of(lines), ["", *settings_of(lines)]
    asked = {claim: [(a + setting, b + setting) for a, b in pairs for setting in settings] for claim, pairs in CLAIMS.items()}
    asked["a setting changes something"] = [(name, name.partition("@")[0]) for name in names if "@" in name]
    parts = [
        f"Differences of {COLUMNS[key]}, first row minus second, paired by seed. Intervals are of the noise between seeds, one comparison at a time: of twenty"
        f" differences that are none, one is called better or worse. Words: better and worse, where 0 is outside the interval; at least as good, where -{MATTERS:g} is."
        f" Smaller than {MATTERS:g} does not matter. Equal pairs: after as many as the one that saw fewer. Equal KL: at the best weights of the row that is nearer to SFT;"
        f" the other where one would have stopped there, by the judge's scores on validation prompts, between kept weights and those that it started from; not comparable where it was never about so near."
        " *: the two stand on SFT models of the same flags that were made twice and came out differently; what those differ by is in the difference.\n"
    ]
    header = ["", "seeds", *PICKS.values(), "at equal pairs", "at equal KL", "that KL", "shown at the best", "shown at equal KL"]
    for claim, pairs in asked.items():
        rows = []
        for a, b in pairs:
            found = differences(lines, a, b, key)
            if found["seeds"]:
                cells = [format_interval(*found[pick]) if pick in found else None for pick in (*PICKS, "equal_pairs", "equal_kl")]
                words = [verdict(found.get(which)) for which in ("best", "equal_kl")]
                rows.append([f"{a} - {b}" + "*" * (found["on_two_sfts"] > 0), found["seeds"], *cells, found.get("kl") and f"{found['kl']:.2f}", *words])
        if rows:
            parts += [f"Claim: {claim}.\n", markdown_table(header, rows)]
    return "\n".join(parts) if len(parts) > 1 else ""


def claimed_pairs() -> list[tuple[str, str]]:
    """The claims' pairs of rows, each once, but for those that are of one setting."""
    return list(dict.fromkeys(pair for pairs in CLAIMS.values() for pair in pairs if "@" not in "".join(pair)))


def settings_of(lines: Sequence[dict]) -> list[str]:
    """What follows a row's name where it is run in other settings, such as "@flip-rate-0.2"."""
    return list(dict.fromkeys("@" + name.partition("@")[2] for name in names_of(lines) if "@" in name))


def settings_text(lines: Sequence[dict], key: str) -> str:
    """What each setting changes of the claims' differences: whether selection pays the more, the noisier the labels. "" where none has both."""
    rows = []
    for a, b in claimed_pairs():
        for setting in settings_of(lines):
            four = [of_row(lines, name) for name in (a + setting, b + setting, a, b)]
            seeds = sorted(set.intersection(*map(set, four)))
            if seeds:
                here, there = ([at("best", key)(x[seed]) - at("best", key)(y[seed]) for seed in seeds] for x, y in (four[:2], four[2:]))
                changed = paired_difference(here, there)
                star = "*" * any(on_two_sfts(x[seed], y[seed], key) for x, y in zip(four[:2], four[2:], strict=True) for seed in seeds)
                rows.append([f"{a} - {b}{star}", setting[1:], len(seeds), format_interval(*t_interval(here)), format_interval(*t_interval(there)), format_interval(*changed), verdict(changed)])
    header = ["", "setting", "seeds", "there", "with defaults", "change", "shown"]
    return f"What a setting changes of a difference of {COLUMNS[key]}, best by own validation, on the seeds that have both:\n\n" + markdown_table(header, rows) if rows else ""


def samples_text(lines: Sequence[dict], key: str) -> str:
    """The claims' differences after equally many responses sampled online, at kept weights of one schedule; "" where no rows of PPO have any."""

    def on_the_way(line: dict) -> dict[int, float]:
        return {point["online_samples"]: point[key] for name, point in line["points"].items() if "/" in name and point["online_samples"]}

    found = {}
    for a, b in claimed_pairs():
        both = [(on_the_way(x), on_the_way(y)) for x, y in by_seed(lines, a, b)]
        counts = set.intersection(*(set(way) for ways in both for way in ways)) if both else ()
        if counts:
            found[f"{a} - {b}"] = len(both), {n: paired_difference(*zip(*((x[n], y[n]) for x, y in both), strict=True)) for n in counts}
    every = sorted({n for _, differences in found.values() for n in differences})
    rows = [[name, seeds, *(format_interval(*there[n]) if n in there else None for n in every)] for name, (seeds, there) in found.items()]
    header = ["", "seeds", *(f"{n:,}" for n in every)]
    return f"Differences of {COLUMNS[key]} after equally many responses sampled online:\n\n" + markdown_table(header, rows) if rows else ""


def trials_of(lines: Sequence[dict], name: str, key: str) -> dict[str, dict[int, dict]]:
    """Setting -> seed -> line: a row ("") and those that differ from it in one of TRIALS alone, but for what stands on another SFT model: its judge
    was made again, too, and the scores of two judges have no common zero."""
    settings = {row: row.removeprefix(name).removeprefix("@") for row in names_of(lines) if row.partition("@")[0] == name}
    found = {setting: of_row(lines, row) for row, setting in settings.items() if not setting or setting.startswith(TRIALS)}
    plain = found.get("", {})
    return {setting: of for setting, of in found.items() if not any(seed in plain and on_two_sfts(of[seed], plain[seed], key) for seed in of)}


def tuned(trials: Sequence[dict], by: str, key: str) -> float:
    """A number at the best of all kept weights of some lines; `by`: what decides on validation prompts, score_raw (the judge's) or true_reward."""
    kept = [(line["validation"][point][by], numbers[key]) for line in trials for point, numbers in line["points"].items()]
    return max(kept, key=lambda found: found[0])[1]


def trials_text(lines: Sequence[dict], key: str) -> str:
    """The claims' comparisons with the best of several trials on each side, of the same settings where both have been tried in the same; "" where
    no row was tried in more than one."""
    rows = []
    for a, b in claimed_pairs():
        mine, theirs = trials_of(lines, a, key), trials_of(lines, b, key)
        shared = [setting for setting in mine if setting in theirs]
        sides = [[found[setting] for setting in (shared if len(shared) > 1 else found)] for found in (mine, theirs)]
        if min(map(len, sides)) < 2:
            continue
        seeds = sorted(set.intersection(*(set(of_seeds) for side in sides for of_seeds in side)))
        arms = [[[of_seeds[seed] for of_seeds in side] for seed in seeds] for side in sides]
        cells = []
        for pick, by in (("judge", "score_raw"), ("true", "true_reward")):
            known = seeds and all(pick in line["picked"] for arm in arms for trials in arm for line in trials)
            both = [[tuned(trials, by, key) for trials in arm] for arm in arms] if known else []
            cells.append(format_interval(*paired_difference(*both)) if known else None)
        rows.append([f"{a} - {b}", len(seeds), ", ".join(str(len(side)) for side in sides), *cells])
    header = ["", "seeds", "trials of the two", "best by the judge", "best by true reward"]
    return f"Differences of {COLUMNS[key]} with the best of several trials on each side:\n\n" + markdown_table(header, rows) if rows else ""


def kinds_text(lines: Sequence[dict], kinds: Sequence[str]) -> str:
    """The claims' differences by kind of prompt, for splits whose parts have other shares of the kinds."""
    rows = []
    for a, b in claimed_pairs():
        if both := by_seed(lines, a, b):
            values = [[(on_kind(kind)(x), on_kind(kind)(y)) for x, y in both] for kind in kinds]
            cells = [None if None in sum(pairs, ()) else format_interval(*paired_difference(*zip(*pairs, strict=True))) for pairs in values]
            rows.append([f"{a} - {b}", len(both), *cells])
    return "Differences of true reward by kind of prompt, best by own validation:\n\n" + markdown_table(["", "seeds", *kinds], rows) if rows else ""


def course_text(lines: Sequence[dict]) -> str:
    """How training went: each number at the beginning, half-way and at the end, as means over seeds."""
    parts = []
    for title, columns in COURSE.items():
        rows = []
        for name in names_of(lines):
            cells = []
            for key in columns:
                found = [[at[key] for at in line.get("course", ()) if key in at] for line in of_row(lines, name).values()]
                means = np.mean([[numbers[0], numbers[len(numbers) // 2], numbers[-1]] for numbers in found], axis=0) if all(found) else []
                cells.append(", ".join(f"{value:.3g}" for value in means) or None)
            if cells.count(None) < len(cells) / 2:  # a stage of this kind, if perhaps a changed one
                rows.append([name, *cells])
        if rows:
            parts += [f"How training went: {title}, at the beginning, half-way, at the end:\n", markdown_table(["", *columns.values()], rows)]
    return "\n".join(parts)


def as_csv(lines: Sequence[dict]) -> str:
    """Every point of every line as one row of CSV; columns of validation have the judge's score."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    kinds = sorted({kind for line in lines for kind in line["marks"]["sft"].get("true_reward_by_kind", {})})
    on_validation = ("score_raw", "true_reward")
    writer.writerow(["setting", "row", "seed", "point", "picked", *COLUMNS, *(f"validation_{what}" for what in on_validation), "minutes", *kinds])
    for setting, part in by_setting(lines).items():
        for line in part:
            for point, numbers in line["points"].items():
                picks = " ".join(pick for pick, name in line["picked"].items() if name == point)
                measured = [*(numbers.get(column) for column in COLUMNS), *(line["validation"][point].get(what) for what in on_validation)]
                by_kind = [numbers.get("true_reward_by_kind", {}).get(kind) for kind in kinds]
                writer.writerow([setting, line["row"], line["seed"], point, picks, *measured, line["time"]["train"] / 60, *by_kind])
    return file.getvalue()
