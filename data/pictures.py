"""A grid's pictures. The one file that needs matplotlib, and only when a picture is drawn.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers differ too, for print in grey. Small dots are single seeds.
"""

from collections.abc import Sequence
from pathlib import Path

from data.compare import PICKS, at, names_of, of_row
from data.report import t_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS, DASHES = "os^Dvp*X", ("-", "--", "-.", ":")
INSTALL = 'pip install "matplotlib>=3.8,<4"'
SWEEPS = {  # file -> (flag, default, what it is, title)
    "threshold": (("split-quantile", 0.5, "quantile of the gaps from which a pair is easy"),),
    "noise": (
        ("label-temperature", 1.0, "label temperature"), ("flip-rate", 0.0, "share of flipped labels"), ("annotator-bias", 0.0, "annotator's liking of length"),
    ),
}  # fmt: skip


def draw(lines: Sequence[dict], folder: Path) -> list[Path]:
    """Writes the pictures that the lines of one setting allow as PNG; returns their paths. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"gaps": gaps, "frontier": frontier, "rows": bars}
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
    return ("true_reward", "true reward") if all(line["world"] for line in lines) else ("score_raw", "reward model's score (log-odds)")


def interval_of(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the t interval, which is 0 for a single seed."""
    middle, low, _ = t_interval(values)
    return middle, 0.0 if low is None else middle - low


def gaps(plt, lines: Sequence[dict]):
    """Share of test pairs and accuracy of the reward model by the size of the gap."""
    models = list({line["seed"]: line["reward_model"]["buckets"] for line in lines if "@" not in line["row"]}.values())
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
    lower.set_xlabel("size of the reward gap (log-odds)")
    upper.set_title(f"The reward model by gap ({len(models)} seeds)")
    return figure


def frontier(plt, lines: Sequence[dict]):
    """True reward and score of every kept point against KL to SFT and against samples drawn online."""
    names = [name for name in names_of(lines) if "@" not in name][:16]
    if not names:
        return None
    key, label = worth(lines)
    panels = [("kl_sft", key, "KL to SFT (nats per response)", label), ("online_samples", key, "responses sampled online", label)]
    if key != "score_raw":
        panels.insert(1, ("kl_sft", "score_raw", "KL to SFT (nats per response)", "reward model's score (log-odds)"))
    figure, every = plt.subplots(1, len(panels), layout="constrained", figsize=(5.2 * len(panels), 5.2))
    for axes, (x, y, x_label, y_label) in zip(every, panels, strict=True):
        for place, name in enumerate(names):
            found = of_row(lines, name).values()
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            series = {}
            for line in found:
                snapshots = sorted(point for point in line["points"] if "/" in point) or list(line["points"])
                for turn, point in enumerate(snapshots):
                    series.setdefault(turn, []).append((line["points"][point][x], line["points"][point][y]))
            whole = [points for _, points in sorted(series.items()) if len(points) == len(found)]  # an early stop has fewer
            axes.scatter(*zip(*sum(series.values(), []), strict=True), color=style["color"], s=5, alpha=0.5)
            means = [[sum(column) / len(points) for column in zip(*points, strict=True)] for points in whole]
            axes.plot(*zip(*means, strict=True), label=name, linestyle=DASHES[place // len(COLOURS) % len(DASHES)], markersize=5, linewidth=1.2, **style)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
    every[0].legend(fontsize=7, ncols=2)
    return figure


def bars(plt, lines: Sequence[dict]):
    """One bar per row with its t interval, best by own validation; an open mark at the last point."""
    names = [name for name in names_of(lines) if "@" not in name] or names_of(lines)
    key, label = worth(lines)
    sft = sum(line["marks"]["sft"][key] for line in lines) / len(lines)  # where bars begin: what a row adds
    figure, axes = plt.subplots(layout="constrained", figsize=(7, 0.3 * len(names) + 1.6))
    for place, name in enumerate(names):
        found = list(of_row(lines, name).values())
        values, last = ([at(pick, key)(line) for line in found] for pick in ("best", "last"))
        middle, half = interval_of(values)
        axes.barh(place, middle - sft, left=sft, xerr=half, color=COLOURS[5], edgecolor="black", capsize=3, label=f"{PICKS['best']}, 95 % interval" if not place else None)
        axes.scatter(values, [place] * len(values), color="black", s=9, zorder=3, label="one seed" if not place else None)
        axes.scatter([sum(last) / len(last)], [place], facecolors="none", edgecolors=COLOURS[1], marker="D", s=40, zorder=4, label="last" if not place else None)
    for mark, dash in (("sft", ":"), ("chosen", "--")):
        axes.axvline(sum(line["marks"][mark][key] for line in lines) / len(lines), color="black", linestyle=dash, linewidth=1, label=mark)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")
    return figure


def effects(plt, lines: Sequence[dict], sweeps: Sequence[tuple[str, float, str]]):
    """True reward against a flag's value, one line per row; a panel per flag that has more than its default."""
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
            points = [(x + aside, [at("best", key)(line) for line in of_row(lines, name).values()]) for x, name in sorted(at_value.items())]
            middles, halves = zip(*(interval_of(found) for _, found in points), strict=True)
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            axes.errorbar([x for x, _ in points], middles, yerr=halves, label=row, capsize=3, linestyle=DASHES[place % len(DASHES)], **style)
            for x, found in points:
                axes.scatter([x] * len(found), found, s=7, color=style["color"], alpha=0.6)
        axes.set(xlabel=x_label, ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
