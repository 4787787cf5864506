"""Pairs of SFT's own answers, labelled by the world's annotator: what does a reward model lack that learnt from a writer's?

    python tests/bench/own_pairs.py --run runs/mpo --out own.jsonl [--temperature 1] [--seed 0]
    python train.py --stage tokenizer --data jsonl:own.jsonl --file runs/mpo/tokenizer/tokenizer.model --out runs/own
    python train.py --stage rm --folds 1 --init runs/mpo/sft --out runs/own
    python tests/bench/testbed.py --run runs/mpo --reward-model runs/own/rm

Two samples for every prompt of the training and validation pairs; where both say the same there is no pair. --temperature is the label
noise, as in train.py's --label-temperature.
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.files import atomic_write, read_json  # noqa: E402
from data.prepare import load_pairs  # noqa: E402
from data.synthetic import choice_probability  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model.answers import EvalFlags, Setting, pick_questions  # noqa: E402
from model.parallel import ALONE  # noqa: E402
from model.stage import Text  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    described, path = read_json(flags.run / "data" / "manifest.json")["flags"], flags.run / "tokenizer" / "tokenizer.model"
    pairs = [pair for part in ("train", "validation") for pair in load_pairs(flags.run / "data", part)]  # parted again, by the same hashes
    text = Text(Tokenizer(path), path, described["max_prompt"], described["max_response"])
    setting = Setting(text, ALONE, EvalFlags(prompts=len(pairs), seed=flags.seed))
    model, (questions, _) = setting.load(flags.run / "sft"), pick_questions(pairs, setting)
    draws = [setting.answer(model, questions, f"draw {draw}", greedy=False, temperature=1.0, draw=draw).texts for draw in (0, 1)]
    rng, lines = random.Random(flags.seed), []
    for question, first, second in zip(questions, *draws, strict=True):
        if rng.random() >= choice_probability(described["data"], question.prompt, first, second, flags.temperature, bias=0.0):
            first, second = second, first
        if first != second:
            lines.append(json.dumps({"prompt": question.prompt, "chosen": first, "rejected": second}) + "\n")
    atomic_write(flags.out, "".join(lines))
    print(f"{len(lines)} pairs of {len(questions)} prompts in {flags.out}")


if __name__ == "__main__":
    main()
