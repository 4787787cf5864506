"""Is a built-in world a meaningful test bed? What its labels, its writer and a run's SFT model are worth by the true reward.

    python tests/bench/testbed.py --run runs/mpo [--prompts 100] [--draws 64]

The best of n samples of SFT is at most log n - (n - 1) / n nats from SFT, and nearly the best policy at that distance: so the table says
how far a policy can come at which KL. Below it: how often labels agree with the truth, how gaps are spread, and the kinds of prompts in
the easy half and in all.
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
from data.batches import encode_prompt, stable_hash  # noqa: E402
from data.files import read_json  # noqa: E402
from data.prepare import load_pairs  # noqa: E402
from data.report import format_interval, markdown_table, mean_interval  # noqa: E402
from data.split import read_split  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model.checkpoint import load_model  # noqa: E402
from model.generate import generate, row_uniforms  # noqa: E402
from model.heads import LanguageModel  # noqa: E402


def sampled_rewards(name: str, run: Path, prompts: list[str], style: str, draws: int, limits: dict) -> tuple[np.ndarray, float]:
    """True rewards (prompts, draws) of SFT's samples, and the share that is well-formed."""
    tokenizer = Tokenizer(run / "tokenizer" / "tokenizer.model")
    model, rewards, well = load_model(run / "sft", LanguageModel).eval(), [], 0
    for prompt in prompts:
        ids, _ = encode_prompt(prompt, style, tokenizer, limits["max_prompt"])
        numbers = row_uniforms(stable_hash("testbed", prompt), range(draws), limits["max_response"])
        drawn = generate(model, [ids] * draws, max_new_tokens=limits["max_response"], eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, uniforms=numbers)
        texts = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(drawn.tokens, drawn.response_mask, strict=True)]
        rewards.append([synthetic.true_reward(name, prompt, text) for text in texts])
        well += sum(synthetic.well_formed(name, prompt, text) for text in texts)
    return np.array(rewards), well / (len(prompts) * draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--draws", type=int, default=64)
    flags = parser.parse_args()
    described = read_json(flags.run / "data" / "manifest.json")["flags"]
    name, test = described["data"], load_pairs(flags.run / "data", "test")
    prompts, style = [pair.prompt for pair in test[: flags.prompts]], test[0].style
    with torch.no_grad():
        rewards, well_formed = sampled_rewards(name, flags.run, prompts, style, flags.draws, described)
    best = np.array([synthetic.true_reward(name, prompt, synthetic.best_response(name, prompt)) for prompt in prompts])
    rows = []
    for n in (1, 4, 16, 32, flags.draws):
        groups = rewards[:, : flags.draws // n * n].reshape(len(prompts), -1, n).max(axis=2).mean(axis=1)
        share = (groups.mean() - rewards.mean()) / (best.mean() - rewards.mean())
        rows.append((f"best of {n}", f"{math.log(n) - (n - 1) / n:.2f}", format_interval(*mean_interval(groups)), f"{share:.2f}"))
    rows.append(("best response", "-", format_interval(*mean_interval(best)), "1.00"))
    print(f"**{name}**, SFT of {flags.run}, {len(prompts)} test prompts, {flags.draws} samples each; well-formed {well_formed:.3f}\n")
    print(markdown_table(["", "KL to SFT, nats, at most", "true reward", "way from SFT to best"], rows))

    gaps = np.array([synthetic.true_reward(name, p.prompt, p.chosen) - synthetic.true_reward(name, p.prompt, p.rejected) for p in test])
    print(f"\nlabels agree with the truth on {np.mean(gaps[gaps != 0] > 0):.3f} of the test pairs; true gaps below 1: {np.mean(abs(gaps) < 1):.2f}")
    pairs, easy = load_pairs(flags.run / "data", "train"), set(read_split(flags.run / "split")["easy"])
    kinds = {part: Counter(synthetic.kind(name, p.prompt) for p in pairs if part == "all" or p.id in easy) for part in ("all", "easy")}
    shares = {part: {kind: count / sum(found.values()) for kind, count in found.items()} for part, found in kinds.items()}
    print(markdown_table(["kind", "all pairs", "easy"], [(kind, f"{shares['all'][kind]:.2f}", f"{shares['easy'].get(kind, 0):.2f}") for kind in sorted(shares["all"])]))


if __name__ == "__main__":
    main()
