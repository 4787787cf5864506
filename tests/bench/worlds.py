"""SFT, DPO and MPO on the built-in worlds, over seeds: is MPO above DPO, and how much of the way to the best response is it?

    python tests/bench/worlds.py [--data advice] [--seeds 1,2,3] [--runs FOLDER] [--results tests/results/worlds.jsonl] [flags of train.py]

Each seed redraws training data, labels, initialisation and sampling; test prompts are fixed. A finished seed is one JSON line, keyed by
data, seed and flags, and is not run again (remove its line to do so: a changed default does not show in the flags; `code` tells). Ends with a table of means over seeds with t intervals, and differences paired by seed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.report import format_interval, markdown_table, paired_difference, t_interval  # noqa: E402

MODELS = ("chosen", "sft", "dpo", "ppo", "best")
COLUMNS = {"true_reward": "true reward", "way_to_best": "way from SFT to best", "well_formed": "well-formed", "score": "score",
           "kl_sft": "KL to SFT", "wins_against_sft": "wins against SFT", "tokens": "tokens", "ended": "ended"}  # fmt: skip


def run_seed(data: str, seed: int, runs: Path, flags: list[str]) -> dict:
    """One chain and its report, as one line."""
    out = runs / f"{data}-{seed}"
    command = [sys.executable, "train.py", "--stage", "mpo", "--data", data, "--seed", str(seed), "--out", str(out), *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    report = json.loads((out / "eval" / "report.json").read_text())
    rows = {
        name: {key: value["mean"] if isinstance(value, dict) else value for key, value in report["rows"][name].items() if key in COLUMNS}
        for name in MODELS
    }
    rm = json.loads((out / "rm" / "manifest.json").read_text())["results"]["test"]
    split = json.loads((out / "split" / "manifest.json").read_text())["results"]
    reward_model = {key: rm[key] for key in ("n", "accuracy", "share_of_gaps_below_1", "calibration_error")}
    reward_model["buckets"] = {name: [b["share"], b["accuracy"]] for name, b in rm["buckets"].items()}
    code = json.loads((out / "ppo" / "manifest.json").read_text())["versions"]["code"]
    return {"data": data, "seed": seed, "flags": flags, "code": code, "prompts": report["prompts"], "rows": rows, "rm": reward_model, "split": split}


def table(lines: list[dict]) -> str:
    """Means over seeds with t intervals, and the paired differences that the method claims."""
    seeds = [line["seed"] for line in lines]
    rows = []
    for name in MODELS:
        cells = []
        for key in COLUMNS:
            values = [line["rows"][name].get(key) for line in lines]
            cells.append(None if None in values else format_interval(*t_interval(values)))
        rows.append([{"ppo": "MPO"}.get(name, name.upper() if name in ("sft", "dpo") else name), *cells])
    of = {name: [line["rows"][name]["true_reward"] for line in lines] for name in MODELS}
    closed = [(m - s) / (b - s) for m, s, b in zip(of["ppo"], of["sft"], of["best"], strict=True)]
    return (
        f"**{lines[0]['data']}**, seeds {', '.join(map(str, seeds))}, {lines[0]['prompts']} test prompts; mean over seeds and 95 % t interval\n\n"
        + markdown_table(["", *COLUMNS.values()], rows)
        + f"\nMPO above DPO, true reward paired by seed: {format_interval(*paired_difference(of['ppo'], of['dpo']))}; MPO above SFT:"
        f" {format_interval(*paired_difference(of['ppo'], of['sft']))}; share of the way from SFT to the best response:"
        f" {format_interval(*t_interval(closed))}. Reward model's accuracy on test labels:"
        f" {format_interval(*t_interval([line['rm']['accuracy'] for line in lines]))}; share of gaps below 1:"
        f" {format_interval(*t_interval([line['rm']['share_of_gaps_below_1'] for line in lines]))}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="advice", choices=("advice", "digest"))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "worlds")
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "results" / "worlds.jsonl")
    options, flags = parser.parse_known_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    lines = []
    for seed in map(int, options.seeds.split(",")):
        known = [line for line in done if (line["data"], line["seed"], line["flags"]) == (options.data, seed, flags)]
        line = known[0] if known else run_seed(options.data, seed, options.runs, flags)
        if not known:
            with open(options.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        lines.append(line)
    print(table(lines))


if __name__ == "__main__":
    main()
