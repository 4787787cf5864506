"""The built-in preference worlds: comparisons with a known true reward, written in the formats of the two real data sets.

    advice   requests for things of a kind, and requests to decline    HH-RLHF's format    data/advice.py
    digest   posts and their summaries                                 TL;DR's format      data/digest.py

A world draws prompts, lets a simulated writer answer each twice, and knows the true reward of any text. This file turns that into
labelled rows: the label is drawn from Bradley and Terry's model of the true rewards,

    P(first is chosen) = sigmoid((r(first) - r(second) + bias * (words(first) - words(second)) / 10) / temperature)

and then turned round with probability `flip_rate`. `bias` is for the study of biased annotators, who like length for its own sake.

Prompts are parted by their hash: one region is for testing and no training prompt comes from it, whatever the seed. The rows of test.jsonl
depend on nothing but the world: constant seed, temperature 1, no flips, no bias, so that every run is measured on the same ones. In
training, row i of seed s is a function of (s, i), and its label is drawn apart from its texts: more pairs extend a file, and another
temperature or flip rate relabels the same texts.

Some of a writer's mistakes show in the words alone (nonsense, rudeness, absurd deeds), others only beside the prompt (the wrong kind, a wrong
property, a wrong person), which is harder for a reward model.

The true reward is for measuring only. No stage of training calls `true_reward`; a test runs them all with it raising.
The worlds' constants were chosen for language quality after SFT, labels and reward models, but not blindly: runs of DPO and PPO on earlier
versions had been seen by then, and one change of `digest` was taken back because of PPO.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from data import advice, digest
from data.errors import UsageError
from data.files import atomic_write

WORLDS: dict[str, ModuleType] = {"advice": advice, "digest": digest}
TEST_SHARE = 0.1  # of all prompts, by hash


def true_reward(name: str, prompt: str, response: str) -> float:
    """The true reward of any text as a response to any text: finite, and the same at every call."""
    return math.fsum(reward_terms(name, prompt, response).values())


def reward_terms(name: str, prompt: str, response: str) -> dict[str, float]:
    """The terms that sum to the true reward, by name; {"broken": ...} where prompt or response is outside the world's language."""
    return WORLDS[name].reward_terms(prompt, response)


def well_formed(name: str, prompt: str, response: str) -> bool:
    """Whether the response is in the world's language, good or bad (and the prompt too)."""
    return "broken" not in reward_terms(name, prompt, response)


def best_response(name: str, prompt: str) -> str:
    """A response than which the world allows none of greater true reward; ValueError for a prompt of another world."""
    return WORLDS[name].best_response(prompt)


def kind(name: str, prompt: str) -> str:
    """What kind of prompt this is: one of the world's KINDS, or "foreign"."""
    return WORLDS[name].kind(prompt)


def is_test_prompt(name: str, prompt: str) -> bool:
    """Whether a prompt belongs to the region of test prompts; a function of its text alone."""
    return int.from_bytes(hashlib.sha256(f"{name} test {prompt}".encode()).digest()[:8], "big") < TEST_SHARE * 2**64


def draw_prompt(name: str, rng: random.Random, *, test: bool = False) -> str:
    """One prompt of the training or of the test region."""
    while True:
        prompt = WORLDS[name].draw_prompt(rng)
        if is_test_prompt(name, prompt) == test:
            return prompt


def draw_pair(name: str, seed: int, index: int, *, test: bool = False) -> tuple[str, str, str]:
    """(prompt, first, second): row `index` of this seed, before it is labelled. The two responses differ."""
    rng = random.Random(f"{name} {'test' if test else 'train'} texts {seed} {index}")
    prompt = draw_prompt(name, rng, test=test)
    first = WORLDS[name].write_response(rng, prompt)
    while True:
        second = WORLDS[name].write_response(rng, prompt)
        if second != first:
            return prompt, first, second


def choice_probability(name: str, prompt: str, first: str, second: str, temperature: float, bias: float) -> float:
    """The probability that an annotator chooses `first`, before flips; at temperature 0 the better one, and either of two equals."""
    drive = true_reward(name, prompt, first) - true_reward(name, prompt, second)
    drive += bias * (len(first.split()) - len(second.split())) / 10
    if temperature == 0:
        return 0.5 + 0.5 * ((drive > 1e-9) - (drive < -1e-9))
    return 0.5 * (1 + math.tanh(drive / temperature / 2))


def draw_rows(name: str, *, pairs: int, seed: int = 0, label_temperature: float = 1.0, flip_rate: float = 0.0,
              annotator_bias: float = 0.0, test: bool = False) -> Iterator[tuple[str, str, str]]:
    """Yields (prompt, chosen, rejected). Test rows have different prompts each; training prompts may come again, as they fall."""
    seen = set()
    index = 0
    while pairs > 0:
        prompt, first, second = draw_pair(name, seed, index, test=test)
        rng = random.Random(f"{name} {'test' if test else 'train'} label {seed} {index}")
        index += 1
        if test and prompt in seen:
            continue
        seen.add(prompt)
        pairs -= 1
        first_chosen = rng.random() < choice_probability(name, prompt, first, second, label_temperature, annotator_bias)
        if rng.random() < flip_rate:
            first_chosen = not first_chosen
        yield (prompt, first, second) if first_chosen else (prompt, second, first)


def write_world(name: str, folder: Path, *, pairs: int, test_prompts: int, seed: int = 0, label_temperature: float = 1.0,
                flip_rate: float = 0.0, annotator_bias: float = 0.0) -> None:
    """Writes `folder`/train.jsonl and `folder`/test.jsonl in the format of the data set that the world stands for.

    The file test.jsonl has one comparison for each of `test_prompts` prompts and depends on no other argument.
    Raises UsageError on impossible numbers."""
    if name not in WORLDS:
        raise UsageError(f"world {name!r} is not known; known are {', '.join(WORLDS)}")
    if pairs < 1 or test_prompts < 1:
        raise UsageError(f"a world needs at least one pair and one test prompt, not {pairs} and {test_prompts}")
    if not (0 <= label_temperature < math.inf) or not (0 <= flip_rate <= 1) or not math.isfinite(annotator_bias):
        raise UsageError(f"label temperature {label_temperature}, flip rate {flip_rate}, annotator bias {annotator_bias}: "
                         "give a temperature of 0 or more, a rate from 0 to 1, a finite bias")
    train = draw_rows(name, pairs=pairs, seed=seed, label_temperature=label_temperature, flip_rate=flip_rate, annotator_bias=annotator_bias)
    for part, rows in (("train", train), ("test", draw_rows(name, pairs=test_prompts, test=True))):
        lines = (json.dumps(_FORMATS[name](part, index, *row)) for index, row in enumerate(rows))
        atomic_write(Path(folder) / f"{part}.jsonl", "".join(line + "\n" for line in lines))


def _dialogue_row(part, index, prompt, chosen, rejected):
    """HH-RLHF: two whole dialogues."""
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def _summary_row(part, index, prompt, chosen, rejected):
    """OpenAI's TL;DR comparisons: a post, two summaries, and which of them was chosen (here either place, by the prompt's hash)."""
    subreddit, title, post = prompt.removesuffix("\n\nTL;DR:").split("\n\n")
    choice = hashlib.sha256(prompt.encode()).digest()[0] % 2
    texts = (chosen, rejected) if choice == 0 else (rejected, chosen)
    return {"info": {"id": f"digest-{part}-{index:06d}", "subreddit": subreddit.removeprefix("SUBREDDIT: r/"),
                     "title": title.removeprefix("TITLE: "), "post": post.removeprefix("POST: ")},
            "summaries": [{"text": text, "policy": "writer"} for text in texts],
            "choice": choice, "worker": "world", "split": part, "extra": {}}


_FORMATS = {"advice": _dialogue_row, "digest": _summary_row}
