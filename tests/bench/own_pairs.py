"""Pairs of SFT's own answers, labelled by the world's annotator: what does a reward model lack that learnt from a writer's?

    python tests/bench/own_pairs.py --run runs/mpo --out own.jsonl [--temperature 1] [--seed 0]
    python train.py --stage tokenizer --data jsonl:own.jsonl --file runs/mpo/tokenizer/tokenizer.model --out runs/own
    python train.py --stage rm --folds 1 --init runs/mpo/sft --out runs/own
    python tests/bench/testbed.py --run runs/mpo --reward-model runs/own/rm

Two samples for the prompt of every training and validation pair; where both say the same there is no pair. --temperature is the label
noise, as in train.py's --label-temperature.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data import synthetic  # noqa: E402
from data.batches import encode_prompt  # noqa: E402
from data.files import atomic_write, read_json  # noqa: E402
from data.prepare import load_pairs  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model.checkpoint import load_model  # noqa: E402
from model.generate import generate, row_uniforms  # noqa: E402
from model.heads import LanguageModel  # noqa: E402

BATCH = 256  # responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    described = read_json(flags.run / "data" / "manifest.json")["flags"]
    tokenizer, model = Tokenizer(flags.run / "tokenizer" / "tokenizer.model"), load_model(flags.run / "sft", LanguageModel).eval()
    pairs = [pair for part in ("train", "validation") for pair in load_pairs(flags.run / "data", part)]  # parted again, by the same hashes
    ids = [encode_prompt(pair.prompt, pair.style, tokenizer, described["max_prompt"])[0] for pair in pairs for _ in range(2)]
    texts = []
    for begin in tqdm(range(0, len(ids), BATCH), unit="batch"):
        of_batch = range(begin, min(begin + BATCH, len(ids)))
        numbers = row_uniforms(flags.seed, of_batch, described["max_response"])
        drawn = generate(
            model, [ids[row] for row in of_batch], max_new_tokens=described["max_response"],
            eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, uniforms=numbers,
        )  # fmt: skip
        texts += [tokenizer.decode(row[mask].tolist()) for row, mask in zip(drawn.tokens, drawn.response_mask, strict=True)]
    rng, lines = random.Random(flags.seed), []
    for pair, first, second in zip(pairs, texts[::2], texts[1::2], strict=True):
        if rng.random() >= synthetic.choice_probability(described["data"], pair.prompt, first, second, flags.temperature, bias=0.0):
            first, second = second, first
        if first != second:
            lines.append(json.dumps({"prompt": pair.prompt, "chosen": first, "rejected": second}) + "\n")
    atomic_write(flags.out, "".join(lines))
    print(f"{len(lines)} pairs of {len(pairs)} prompts in {flags.out}")


if __name__ == "__main__":
    main()
