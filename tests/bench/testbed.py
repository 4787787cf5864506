"""Is a built-in world a meaningful test bed? What its labels, its writer and a run's SFT model are worth by the true reward.

    python tests/bench/testbed.py --run runs/mpo [--prompts 100] [--draws 64] [--reward-model FOLDER]

The best of n samples of SFT is at most log n - (n - 1) / n nats from SFT, and nearly the best policy at that distance: so the table says
how far a policy can come at which KL, judged by the true reward, and how far by the run's reward model, or another, and the one below it
where, by kind of prompt; --draws 0 leaves both out. Then: how often labels and reward model agree with the truth on test pairs, how gaps
are spread, the kinds of prompts in the easy half, in all training pairs and in the test part, and on what the two err: by the term of the true
reward in which a pair's responses differ most, by which of them is the longer one, and, where requests are for things, by how rare these are.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data import synthetic  # noqa: E402
from data.batches import encode_pairs, encode_prompt, stable_hash  # noqa: E402
from data.examples import Pair  # noqa: E402
from data.files import read_json  # noqa: E402
from data.prepare import load_pairs  # noqa: E402
from data.report import format_interval, markdown_table, mean_interval, wilson_interval  # noqa: E402
from data.split import read_split  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model.checkpoint import load_model  # noqa: E402
from model.generate import generate, row_uniforms  # noqa: E402
from model.heads import LanguageModel, ScalarModel  # noqa: E402
from model.parallel import ALONE  # noqa: E402
from model.score import reward_scores_of_pairs  # noqa: E402


def sampled_rewards(name: str, run: Path, reward_model: Path, prompts: list[str], style: str, draws: int, limits: dict) -> tuple[np.ndarray, np.ndarray, float]:
    """True rewards and the reward model's scores (prompts, draws) of SFT's samples, and the share that is well-formed."""
    tokenizer = Tokenizer(run / "tokenizer" / "tokenizer.model")
    model, judge = load_model(run / "sft", LanguageModel).eval(), load_model(reward_model, ScalarModel).eval()
    rewards, scores, well = [], [], 0
    for prompt in prompts:
        ids, _ = encode_prompt(prompt, style, tokenizer, limits["max_prompt"])
        numbers = row_uniforms(stable_hash("testbed", prompt), range(draws), limits["max_response"])
        drawn = generate(model, [ids] * draws, max_new_tokens=limits["max_response"], eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, uniforms=numbers)
        texts = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(drawn.tokens, drawn.response_mask, strict=True)]
        scores.append(judge(drawn.tokens, len(ids) + drawn.response_mask.sum(dim=1)).numpy())
        rewards.append([synthetic.true_reward(name, prompt, text) for text in texts])
        well += sum(synthetic.well_formed(name, prompt, text) for text in texts)
    return np.array(rewards), np.array(scores), well / (len(prompts) * draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--reward-model", type=Path, help="default: that of the run")
    flags = parser.parse_args()
    flags.reward_model = flags.reward_model or flags.run / "rm"
    described = read_json(flags.run / "data" / "manifest.json")["flags"]
    name, test = described["data"], load_pairs(flags.run / "data", "test")
    if flags.draws:
        print_best_of_n(flags, name, test, described)
    gaps = np.array([synthetic.true_reward(name, p.prompt, p.chosen) - synthetic.true_reward(name, p.prompt, p.rejected) for p in test])
    tokenizer = Tokenizer(flags.run / "tokenizer" / "tokenizer.model")
    rows, _ = encode_pairs(test, tokenizer, described["max_prompt"], described["max_response"])
    with torch.no_grad():
        chosen, rejected = reward_scores_of_pairs(load_model(flags.reward_model, ScalarModel), rows, tokenizer.pad_id, ALONE).T
    known = {pair.id: (gap, synthetic.kind(name, pair.prompt), pair) for pair, gap in zip(test, gaps, strict=True)}
    truth, kinds, read = (np.array(of_rows) for of_rows in zip(*(known[row.id] for row in rows), strict=True))
    told = truth != 0
    right = {"labels": truth[told] > 0, "reward model": (chosen - rejected)[told] * truth[told] > 0}
    for who, hits in right.items():
        low, high = wilson_interval(hits.sum(), told.sum())
        print(f"{who}: {hits.mean():.3f} [{low:.3f}, {high:.3f}] of the true orders of {told.sum()} test pairs")
    print(f"true gaps below 1: {np.mean(abs(gaps) < 1):.2f}\n")
    pairs, easy = load_pairs(flags.run / "data", "train"), set(read_split(flags.run / "split")["easy"])
    parts = {"all": pairs, "easy": [pair for pair in pairs if pair.id in easy], "test": test}
    shares = {part: Counter(synthetic.kind(name, p.prompt) for p in chosen) for part, chosen in parts.items()}
    rows = [
        (kind, *(f"{found[kind] / found.total():.2f}" for found in shares.values()), *(f"{hits[kinds[told] == kind].mean():.2f}" for hits in right.values()))
        for kind in sorted(shares["all"])
    ]
    print(markdown_table(["kind", "all pairs", "easy", "test", *(f"{who} right" for who in right)], rows))
    sides = [traits(name, pair) for pair in read[told]]
    rows = []
    for title in sides[0]:
        for value in sorted({str(side[title]) for side in sides}):
            here = np.array([str(side[title]) == value for side in sides])
            rows.append((title, value, f"{here.mean():.2f}", f"{abs(truth[told][here]).mean():.2f}", *(f"{hits[here].mean():.2f}" for hits in right.values())))
    print(markdown_table(["test pairs by", "", "share", "true gap", *(f"{who} right" for who in right)], rows))


def traits(name: str, pair: Pair) -> dict[str, str]:
    """What of a pair may mislead a reader."""
    chosen, rejected = (synthetic.reward_terms(name, pair.prompt, text) for text in (pair.chosen, pair.rejected))
    apart = {term: abs(chosen.get(term, 0.0) - rejected.get(term, 0.0)) for term in chosen | rejected}
    words = len(pair.chosen.split()) - len(pair.rejected.split())
    better = math.copysign(1, sum(chosen.values()) - sum(rejected.values()))
    found = {"what they differ in most": max(apart, key=apart.get), "the better one is": "as long" if not words else "longer" if words * better > 0 else "shorter"}
    rarity = getattr(synthetic.WORLDS[name].read_prompt(pair.prompt), "rarity", None)
    return found if rarity is None else found | {"things asked for are of": "common kinds" if rarity < 0.5 else "rare kinds"}


def print_best_of_n(flags: argparse.Namespace, name: str, test: list, described: dict) -> None:
    """The table of the best of n, picked by the true reward and by the reward model."""
    prompts, style = [pair.prompt for pair in test[: flags.prompts]], test[0].style
    with torch.no_grad():
        rewards, scores, well_formed = sampled_rewards(name, flags.run, flags.reward_model, prompts, style, flags.draws, described)
    best = np.array([synthetic.true_reward(name, prompt, synthetic.best_response(name, prompt)) for prompt in prompts])
    rows = []
    for n in sorted({n for n in (1, 4, 16, 32) if n < flags.draws} | {flags.draws}):
        groups, judged = (x[:, : flags.draws // n * n].reshape(len(prompts), -1, n) for x in (rewards, scores))
        by_truth = groups.max(axis=2).mean(axis=1)
        by_score = np.take_along_axis(groups, judged.argmax(axis=2)[..., None], axis=2).mean(axis=(1, 2))
        cells = []
        for picked in (by_truth, by_score):
            share = (picked.mean() - rewards.mean()) / (best.mean() - rewards.mean())
            cells += [format_interval(*mean_interval(picked)), f"{share:.2f}"]
        rows.append((f"best of {n}", f"{math.log(n) - (n - 1) / n:.2f}", *cells))
    rows.append(("best response", "-", format_interval(*mean_interval(best)), "1.00", "-", "-"))
    print(f"**{name}**, SFT of {flags.run}, {len(prompts)} test prompts, {flags.draws} samples each; well-formed {well_formed:.3f}\n")
    print(markdown_table(["", "KL to SFT, nats, at most", "true reward", "way to best", "picked by the reward model", "way to best"], rows))
    kinds = np.array([synthetic.kind(name, prompt) for prompt in prompts])
    picked = np.take_along_axis(rewards, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    shown = (rewards.mean(axis=1), rewards.max(axis=1), picked, best)
    by_kind = [(kind, (of := kinds == kind).sum(), *(format_interval(*mean_interval(x[of])) for x in shown)) for kind in sorted(set(kinds))]
    print(markdown_table(["kind", "prompts", "SFT", f"best of {flags.draws}", "picked by the reward model", "best response"], by_kind))


if __name__ == "__main__":
    main()
