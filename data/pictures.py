"""A grid's pictures. The one file that needs matplotlib, and only when a picture is drawn.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers differ too, for print in grey. Small dots are single seeds.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.compare import PICKS, at, names_of, of_row, one_per_seed
from data.report import t_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS, DASHES = "os^Dvp*X", ("-", "--", "-.", ":")
SCORE = "reward model's score (standard deviations)"
INSTALL = 'pip install "matplotlib>=3.8,<4"'
SWEEPS = {  # file -> (flag, default, what it is) of each panel
    "threshold": (("split-quantile", 0.5, "quantile of the gaps from which prompts are easy"),),
    "budget": (("ppo-iterations", 40, "rounds of PPO, 128 responses each"),),
    "noise": (
        ("label-temperature", 1.0, "label temperature"), ("flip-rate", 0.0, "share of flipped labels"), ("annotator-bias", 0.0, "annotator's bias (true reward per ten words more)"),
    ),
}  # fmt: skip


def draw(lines: Sequence[dict], folder: Path) -> list[Path]:
    """Writes the pictures that the lines of one setting allow as PNG; returns their paths. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"gaps": gaps, "frontier": frontier, "coefficients": coefficients, "rows": bars}
    drawn |= {name: lambda plt, lines, sweeps=sweeps: effects(plt, lines, sweeps) for name, sweeps in SWEEPS.items()}
    paths = []
    for name, picture in drawn.items():
        figure = picture(plt, lines)
        if figure:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
            plt.close(figure)
    return paths


def worth(lines: Sequence[dict]) -> tuple[str, str]:
    """What a row is judged by, and its name on an axis."""
    return ("true_reward", "true reward") if all(line["world"] for line in lines) else ("score", SCORE)


def interval_of(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the t interval, which is 0 for a single seed."""
    middle, low, _ = t_interval(values)
    return middle, 0.0 if low is None else middle - low


def mean_mark(lines: Sequence[dict], mark: str, key: str) -> float:
    """A number of SFT, the chosen or the best responses, as a mean over seeds."""
    found = one_per_seed(lines)
    return sum(line["marks"][mark][key] for line in found) / len(found)


def gaps(plt, lines: Sequence[dict]):
    """Share of test pairs and accuracy of the reward model by the size of the gap."""
    models = [line["reward_model"]["buckets"] for line in one_per_seed([line for line in lines if "@" not in line["row"]])]
    if not models:
        return None
    figure, (upper, lower) = plt.subplots(2, 1, layout="constrained", figsize=(6, 5), sharex=True)
    for axes, key, label in ((upper, "share", "share of test pairs"), (lower, "accuracy", "accuracy on labels")):
        for place, bucket in enumerate(models[0]):
            values = [model[bucket][key] for model in models if model[bucket][key] is not None]
            if values:
                middle, half = interval_of(values)
                axes.bar(place, middle, yerr=half, color=COLOURS[5], edgecolor="black", capsize=4)
                axes.scatter([place] * len(values), values, color="black", s=9, zorder=3)
        axes.set_ylabel(label)
    lower.axhline(0.5, color="black", linestyle=":", linewidth=1)
    lower.set_xticks(range(len(models[0])), list(models[0]))
    lower.set_xlabel("size of the reward gap (log-odds; bins differ in width)")
    upper.set_title(f"The reward model by gap ({len(models)} seed{'s' * (len(models) > 1)})")
    return figure


def family(name: str) -> str:
    """Which of the three pictures a row is in."""
    return "MPO" if name.startswith("mpo") else "PPO" if name.startswith("ppo") else "DPO"


def frontier(plt, lines: Sequence[dict]):
    """True reward and score of every kept point against KL to SFT and against samples drawn online; rows in three families, and best of n in each."""
    names = [name for name in names_of(lines) if "@" not in name]
    families = {of: [name for name in names if family(name) == of and name != "best-of-n"] for of in ("DPO", "PPO", "MPO")}
    families = {of: some for of, some in families.items() if some}
    if not families:
        return None
    key, label = worth(lines)
    worths = [(key, label)] if key == "score" else [(key, label), ("score", SCORE)]
    ways = (("kl_sft", "KL to SFT (nats per response)"), ("online_samples", "responses sampled online"))
    panels = [(x, y, x_label, y_label) for x, x_label in ways for y, y_label in worths]
    figure, grid = plt.subplots(
        len(families), len(panels), layout="constrained", figsize=(4.4 * len(panels), 4 * len(families)), squeeze=False, sharex="col", sharey="col"
    )
    sft = {y: mean_mark(lines, "sft", y) for y in (key, "score")}
    for axes_of_family, (title, rows) in zip(grid, families.items(), strict=True):
        for axes, (x, y, x_label, y_label) in zip(axes_of_family, panels, strict=True):
            if x == "online_samples" and title == "DPO":
                axes.axis("off")  # it samples nothing online
                continue
            for place, name in enumerate(rows):
                curve(axes, list(of_row(lines, name).values()), x, y, name, COLOURS[place % 8], MARKERS[place % 8], DASHES[(place + place // 8) % 4])
            if x == "kl_sft":
                axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))  # a reward grows about as the root
                axes.plot(0, sft[y], color="black", marker="X", markersize=7, linestyle="", label="SFT", clip_on=False, zorder=5)
                if "best-of-n" in names:
                    curve(axes, list(of_row(lines, "best-of-n").values()), x, y, "best of n (KL at most)", "0.4", "+", ":")
            axes.set(xlabel=x_label, ylabel=y_label, title=title)
            axes.tick_params(labelbottom=True, labelleft=True)
            axes.grid(alpha=0.3)
        axes_of_family[0].legend(fontsize=7)
    for axes in grid[0]:
        axes.set_xlim(left=0)  # columns share it
    return figure


def coefficients(plt, lines: Sequence[dict]):
    """Reward against KL to SFT at each KL coefficient, best by own validation: a mark per coefficient, which stands beside it, and dots for seeds."""
    swept = {name.partition("@ppo-kl-coef-")[0] for name in names_of(lines) if "@ppo-kl-coef-" in name}
    if not swept:
        return None
    key, label = worth(lines)
    figure, axes = plt.subplots(layout="constrained", figsize=(6.5, 4.5))
    for place, row in enumerate(sorted(swept)):
        levels = {float(name.partition("coef-")[2]): of_row(lines, name) for name in names_of(lines) if name.startswith(f"{row}@ppo-kl-coef-")}
        levels |= {0.1: of_row(lines, row)} if row in names_of(lines) else {}
        seeds = sorted(set.intersection(*map(set, levels.values())))
        if not seeds:
            continue
        means, colour = [], COLOURS[place % 8]
        for level, found in sorted(levels.items()):
            points = [[at("best", of)(found[seed]) for of in ("kl_sft", key)] for seed in seeds]
            axes.scatter(*zip(*points, strict=True), color=colour, s=5, alpha=0.5)
            means.append(np.mean(points, axis=0))
            axes.annotate(f"{level:g}", means[-1], xytext=((-4, 8), (8, -3), (-4, -14))[place % 3], textcoords="offset points", fontsize=7, color=colour)
        axes.plot(*np.transpose(means), color=colour, marker=MARKERS[place % 8], linestyle=DASHES[place % 4], label=f"{row}, {len(seeds)} seeds")
    axes.set(xlabel="KL to SFT (nats per response)", ylabel=label, title="Reward at each KL coefficient")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def curve(axes, found: Sequence[dict], x: str, y: str, name: str, colour: str, marker: str, dash: str) -> None:
    """One row's kept points in the order of training: single seeds as dots, their means as a line."""
    series: dict[int, list[tuple[float, float]]] = {}
    for line in found:
        snapshots = sorted(point for point in line["points"] if "/" in point) or list(line["points"])
        for turn, point in enumerate(snapshots):
            series.setdefault(turn, []).append((line["points"][point][x], line["points"][point][y]))
    whole = [points for _, points in sorted(series.items()) if len(points) == len(found)]  # an early stop has fewer
    axes.scatter(*zip(*sum(series.values(), []), strict=True), color=colour, s=5, alpha=0.5)
    means = [[sum(column) / len(points) for column in zip(*points, strict=True)] for points in whole]
    axes.plot(*zip(*means, strict=True), label=name, linestyle=dash, color=colour, marker=marker, markersize=5, linewidth=1.2)


def bars(plt, lines: Sequence[dict]):
    """One bar per row with its t interval, best by own validation; an open mark at the last point."""
    names = [name for name in names_of(lines) if "@" not in name] or names_of(lines)
    key, label = worth(lines)
    sft = mean_mark(lines, "sft", key)  # where bars begin: what a row adds
    figure, axes = plt.subplots(layout="constrained", figsize=(7, 0.3 * len(names) + 1.6))
    for place, name in enumerate(names):
        found = list(of_row(lines, name).values())
        values, last = ([at(pick, key)(line) for line in found] for pick in ("best", "last"))
        middle, half = interval_of(values)
        axes.barh(place, middle - sft, left=sft, xerr=half, color=COLOURS[5], edgecolor="black", capsize=3, label=f"{PICKS['best']}, 95 % interval" if not place else None)
        axes.scatter(values, [place] * len(values), color="black", s=9, zorder=3, label="one seed" if not place else None)
        if not name.startswith("best-of"):  # which nothing was trained for
            axes.scatter([sum(last) / len(last)], [place], facecolors="none", edgecolors=COLOURS[1], marker="D", s=40, zorder=4, label="last" if not place else None)
    for mark, dash in (("sft", ":"), ("chosen", "--")):
        axes.axvline(mean_mark(lines, mark, key), color="black", linestyle=dash, linewidth=1, label=mark)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.05)
    axes.use_sticky_edges = False  # or SFT's line, where bars begin, would be the frame
    axes.set_xlabel(label)
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")
    return figure


def effects(plt, lines: Sequence[dict], sweeps: Sequence[tuple[str, float, str]]):
    """True reward above that of the same seed's SFT against a flag's value, one line per row over the seeds that all its values have; a panel
    per flag that has more than its default."""
    there, (key, label) = names_of(lines), worth(lines)
    panels = []
    for flag, default, x_label in sweeps:
        values: dict[str, dict[float, str]] = {}
        for name in there:
            row, _, suffix = name.partition(f"@{flag}-")
            if suffix and not row.startswith(("cdpo", "robust")):
                values.setdefault(row, {default: row} if row in there else {})[float(suffix)] = name
        if values:
            panels.append((values, x_label))
    if not panels:
        return None
    figure, every = plt.subplots(1, len(panels), layout="constrained", figsize=(5.2 * len(panels), 4), squeeze=False)
    for axes, (values, x_label) in zip(every[0], panels, strict=True):
        step = 0.012 * (max(x for at_value in values.values() for x in at_value) - min(x for at_value in values.values() for x in at_value))
        for place, (row, at_value) in enumerate(values.items()):
            aside = step * (place - len(values) / 2)  # so that intervals do not hide each other
            found = {x: of_row(lines, name) for x, name in sorted(at_value.items())}
            seeds = sorted(set.intersection(*map(set, found.values())))
            if not seeds:
                continue
            gained = {x: [at("best", key)(of[seed]) - of[seed]["marks"]["sft"][key] for seed in seeds] for x, of in found.items()}
            points = [(x + aside, values) for x, values in gained.items()]
            middles, halves = zip(*(interval_of(found) for _, found in points), strict=True)
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            axes.errorbar([x for x, _ in points], middles, yerr=halves, label=f"{row}, {len(seeds)} seeds", capsize=3, linestyle=DASHES[place % len(DASHES)], **style)
            for x, found in points:
                axes.scatter([x] * len(found), found, s=7, color=style["color"], alpha=0.6)
        axes.set(xlabel=x_label, ylabel=f"{label}, above SFT's")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
