"""What a run's models say to the same prompts, what it is worth, and how far they have gone from SFT.

Every model answers the same prompts with the same random numbers per prompt. An answer is worth what the reward model says of it (`judge`)
and, in the built-in worlds, its true reward: this is the one place where a world's true reward meets a model, and only eval.py calls it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.batches import Row, encode_pairs, encode_prompt, encode_response, stable_hash
from data.errors import CheckpointError, DataError, UsageError
from data.examples import Pair
from data.files import read_json, weight_files
from data.flags import flag
from data.prepare import load_pairs
from data.report import distinct_n, mean, preference_numbers, share, wins
from data.run import MANIFEST, command_for, identity, open_stage, parent_key
from data.synthetic import WORLDS, choice_probability, kind, true_reward, well_formed
from model.checkpoint import CONFIG
from model.generate import generate, row_uniforms
from model.heads import LanguageModel, ScalarModel
from model.parallel import World, distribute
from model.score import reference_logps, reward_scores, sequence_kls
from model.stage import Text


@dataclass(frozen=True)
class EvalFlags:
    models: str | None = flag(None, "of the run, with commas between; also sft/snapshot-* (default: the models of all finished stages)")
    prompts: int = flag(500, "how many test prompts are answered, the first in the order of their hashes", positive=True)
    part: str = flag("test", "of the run's data, whose prompts are answered", choices=("test", "validation"))
    greedy: bool = flag(False, "answer with the likeliest token, in place of sampling")
    temperature: float = flag(1.0, "of sampled answers", positive=True)
    seed: int = flag(0, "of sampled answers")
    best_of: str | None = flag(None, "also the best of so many of SFT's answers, as DIR/rm picks them; several numbers with commas between")
    distances: bool = flag(True, "measure KL, and log-probabilities of the pairs; without, what answers are worth alone")
    reward_model: str | None = flag(None, "folder of the reward model that judges (default: DIR/rm)")
    batch: int = flag(128, "prompts answered at a time; changes memory and speed, and results by rounding alone", positive=True)


@dataclass(frozen=True)
class Question:
    """A test prompt: its text, the data's chosen response, and the ids that the models see."""

    prompt: str
    chosen: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Answers:
    """N responses, one per question, as ids and as texts; once judged, with the reward model's log-odds (N,) and true rewards (N,)."""

    rows: list[Row]
    texts: list[str]
    raw: np.ndarray | None = None
    true: np.ndarray | None = None

    @property
    def worth(self) -> np.ndarray:
        """What decides who wins: the true reward where there is one."""
        return self.raw if self.true is None else self.true


@dataclass(frozen=True)
class Setting:
    """What all models of one comparison share; world_name: the built-in world whose true reward judges, if one does."""

    text: Text
    world: World
    flags: EvalFlags
    world_name: str | None = None

    def load(self, folder: Path, architecture=LanguageModel) -> torch.nn.Module:
        """A model ready to answer or to judge; raises CheckpointError or UsageError where it does not fit the run, or its weights are broken."""
        model = distribute(self.text.load(folder, architecture), self.world, frozen=True).eval()
        if broken := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:  # a draw would make tokens of them
            raise CheckpointError(f"{folder}: {broken[0]} holds numbers that are not finite; make or fetch it again")
        return model

    def written(self, texts: Sequence[str], questions: Sequence[Question]) -> Answers:
        """Given texts as answers: cut where a model's would be, for the reward model and for whoever judges beside it; a true reward reads them whole."""
        ids = [encode_response(text, self.text.tokenizer, self.text.max_response)[0] for text in texts]
        rows = [Row("", question.ids, response) for question, response in zip(questions, ids, strict=True)]
        return Answers(rows, list(texts) if self.world_name else [self.text.tokenizer.decode(row.response) for row in rows])

    def answer(
        self, model: LanguageModel, questions: Sequence[Question], title: str, *, greedy: bool, temperature: float, draw: int = 0
    ) -> Answers:
        """The model's answers; the random numbers of each are a function of the seed, of its prompt, and of which draw this is."""
        tokenizer, most = self.text.tokenizer, self.text.max_response
        order = sorted(range(len(questions)), key=lambda index: len(questions[index].ids))  # little of a batch is padding
        rows: list[Row | None] = [None] * len(questions)
        seed = stable_hash(self.flags.seed, "eval", *([draw] if draw else []))
        starts = range(0, len(order), self.flags.batch)
        for begin in tqdm(starts, desc=f"{title}: answers", leave=False, mininterval=1.0, disable=len(starts) < 2):
            part = order[begin : begin + self.flags.batch]
            prompts = [questions[index].ids for index in part]
            keys = [stable_hash(questions[index].prompt) for index in part]
            with self.world.autocast():
                tokens, mask, _ = generate(
                    model, prompts, max_new_tokens=most, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, temperature=temperature,
                    uniforms=None if greedy else row_uniforms(seed, keys, most),
                )  # fmt: skip
            for index, prompt, ids, inside in zip(part, prompts, tokens.cpu(), mask.cpu(), strict=True):
                rows[index] = Row("", prompt, tuple(ids[inside].tolist()))
        return Answers(rows, [tokenizer.decode(row.response) for row in rows])


# ---- who answers what


def pick_questions(pairs: Sequence[Pair], setting: Setting) -> tuple[list[Question], int]:
    """The test prompts to answer, each once, and how many are left out since they do not fit. Raises DataError where none fits."""
    first = {pair.prompt: pair for pair in reversed(pairs)}.values()
    ordered = sorted(first, key=lambda pair: stable_hash(pair.prompt))  # a file's order must not decide what is tested
    ids = (encode_prompt(pair.prompt, pair.style, setting.text.tokenizer, setting.text.max_prompt)[0] for pair in ordered)
    fitting = [Question(p.prompt, p.chosen, own) for p, own in zip(ordered, ids, strict=True) if own]
    if not fitting:
        raise DataError(f"no test prompt fits --max-prompt {setting.text.max_prompt}; make the run's data with a larger one")
    return fitting[: setting.flags.prompts], len(ordered) - len(fitting)


def model_answers(folder: Path, digests: dict[str, str], questions: Sequence[Question], setting: Setting) -> tuple[dict, dict]:
    """Name -> `Answers` of SFT and of each model; name -> its KLs, on samples at temperature 1 (the answers, where they are that).

    digests: name -> digest of the weights, SFT's first."""
    flags, sft = setting.flags, (folder / "sft").resolve()
    load = functools.lru_cache(maxsize=3)(setting.load)  # SFT, the model and its reference
    answers, distances, first = {}, {}, {}
    for name, weights in digests.items():
        own, ref = (folder / name).resolve(), reference_folder(folder, name)
        same = first.setdefault((weights, ref), name)
        if same != name:  # a stage's best weights are those of one of its snapshots
            answers[name], distances[name] = answers[same], distances.get(same, {})
            continue
        samples = answers[name] = setting.answer(load(own), questions, name, greedy=flags.greedy, temperature=flags.temperature)
        if not flags.distances:
            continue
        if flags.greedy or flags.temperature != 1:
            samples = setting.answer(load(own), questions, name, greedy=False, temperature=1.0)
        kls, others = {own: np.zeros(len(questions))}, list({sft, ref or sft} - {own})
        if others:
            columns = sequence_kls(load(own), [load(other) for other in others], samples.rows, setting.text.tokenizer.pad_id, setting.world)
            kls |= zip(others, columns.T, strict=True)
        far = {path: mean(kl, f"KL of {name}") for path, kl in kls.items()}
        distances[name] = {"kl_sft": far[sft], "kl_ref": ref and far[ref], "reference": ref and ref.name}
    return answers, distances


def reference_folder(folder: Path, name: str) -> Path | None:
    """The folder of a model's own reference, None for SFT; raises CheckpointError where it is not the one that it was trained with."""
    stage = name.split("/")[0]
    recorded = read_json(folder / stage / MANIFEST)["parents"].get("ref")
    if recorded is None:
        return None
    path = Path(recorded["path"])
    for place in (folder / path.name, folder / path.parent.name / path.name, path):  # the run, and a snapshot in it, may have been moved or copied
        if weight_files(place) and identity(parent_key(place)) == identity(recorded):
            return place.resolve()
    raise CheckpointError(f"{path}: the reference of {folder / stage} is gone or was made anew; put it back, or make {stage} again")


def best_of(folder: Path, first: Answers, questions: Sequence[Question], setting: Setting) -> tuple[dict, dict]:
    """Name -> of n of SFT's answers to each prompt, `first` among them, the one that the run's own reward model scores highest; name -> its KL.

    That is not measured: it is at most log n - (n - 1) / n, and about as much (Beirami et al., arXiv 2401.01879)."""
    numbers, model, picker = numbers_of(setting.flags.best_of), setting.load(folder / "sft"), setting.load(folder / "rm", ScalarModel)
    more = (setting.answer(model, questions, f"draw {draw}", greedy=False, temperature=1.0, draw=draw) for draw in range(1, numbers[-1]))
    draws = [first, *more]
    scores = np.stack([reward_scores(picker, drawn.rows, setting.text.tokenizer.pad_id, setting.world) for drawn in draws])
    answers, distances = {}, {}
    for n in numbers:
        best = scores[:n].argmax(axis=0)
        answers[f"best-of-{n}"] = Answers([draws[k].rows[i] for i, k in enumerate(best)], [draws[k].texts[i] for i, k in enumerate(best)])
        distances[f"best-of-{n}"] = {"kl_sft": {"n": len(questions), "mean": math.log(n) - (n - 1) / n, "interval": None}}
    return answers, distances


def numbers_of(best_of: str) -> list[int]:
    """The numbers of --best-of, smallest first; raises UsageError for others than 2 and more."""
    if not re.fullmatch(r"\d+(,\d+)*", best_of) or min(map(int, best_of.split(","))) < 2:
        raise UsageError(f"--best-of {best_of}: give whole numbers of at least 2, with commas between")
    return sorted(set(map(int, best_of.split(","))))


# ---- what it is worth


def open_reward_model(folder: Path, setting: Setting) -> tuple[ScalarModel, dict, Path]:
    """The judging reward model, its config with the mean and std of its scores, and its folder."""
    where = Path(setting.flags.reward_model or folder / "rm")
    if setting.flags.best_of or not setting.flags.reward_model:  # DIR/rm picks, whoever judges
        open_stage(folder / "rm", command_for("rm", folder), ("rm",))
    model, stats = setting.load(where, ScalarModel), read_json(where / CONFIG)
    if not {"score_mean", "score_std"} <= set(stats):
        raise CheckpointError(f"{where / CONFIG}: has no score_mean and score_std; those that --stage rm makes have")
    return model, stats, where


def judge(answers: dict[str, Answers], questions: Sequence[Question], model: ScalarModel, setting: Setting) -> dict[str, Answers]:
    """The answers with the reward model's scores and, in worlds, true rewards. Equal responses are scored once, so they tie exactly."""
    world_name = setting.world_name
    different = list(dict.fromkeys((row.prompt, row.response) for found in answers.values() for row in found.rows))
    scores = reward_scores(model, [Row("", *key) for key in different], setting.text.tokenizer.pad_id, setting.world)
    score_of = dict(zip(different, scores, strict=True))

    def with_worth(found: Answers) -> Answers:
        raw = np.array([score_of[row.prompt, row.response] for row in found.rows])
        true = [true_reward(world_name, q.prompt, text) for q, text in zip(questions, found.texts, strict=True)] if world_name else None
        return dataclasses.replace(found, raw=raw, true=true and np.array(true))

    return {name: with_worth(found) for name, found in answers.items()}


def measure(name: str, answers: dict[str, Answers], questions: Sequence[Question], stats: dict, setting: Setting) -> dict:
    """What is reported of one row: what its answers are worth, and their form. stats: mean and std of the reward model's scores."""
    found, chosen, sft = answers[name], answers["chosen"], answers["sft"]
    eos_id, world_name = setting.text.tokenizer.eos_id, setting.world_name
    numbers = {
        "score_raw": mean(found.raw, f"reward model's score of {name}"),
        "score": mean((found.raw - stats["score_mean"]) / stats["score_std"], "normalised score"),
        "wins_against_chosen": share(wins(found.worth, chosen.worth)) if name != "chosen" else None,
        "wins_against_sft": share(wins(found.worth, sft.worth)) if name != "sft" else None,
        "tokens": mean([len(row.response) for row in found.rows], "length"),
        "ended": share([row.response[-1] == eos_id for row in found.rows]),
        "distinct_2": distinct_n([[token for token in row.response if token != eos_id] for row in found.rows], 2),
    }
    if world_name:
        kinds = np.array([kind(world_name, question.prompt) for question in questions])
        way, whole_way = (float((answer.true - sft.true).mean()) for answer in (found, answers["best"]))
        numbers |= {
            "true_reward": mean(found.true, "true reward"),
            "way_to_best": way / whole_way if whole_way else None,
            "well_formed": share([well_formed(world_name, q.prompt, text) for q, text in zip(questions, found.texts, strict=True)]),
            "true_reward_by_kind": {k: mean(found.true[kinds == k], k) for k in WORLDS[world_name].KINDS if (kinds == k).any()},
        }
    return numbers


def pair_preferences(folder: Path, digests: dict[str, str], questions: Sequence[Question], setting: Setting) -> dict[str, dict]:
    """Name -> what each model makes of the labelled pairs whose prompts are answered. digests: name -> digest of the weights."""
    tokenizer, asked = setting.text.tokenizer, {question.prompt for question in questions}
    pairs = [pair for pair in load_pairs(folder / "data", setting.flags.part) if pair.prompt in asked]
    rows, _ = encode_pairs(pairs, tokenizer, setting.text.max_prompt, setting.text.max_response)
    different = {weights: name for name, weights in digests.items()}
    logps = {weights: reference_logps(setting.load(folder / name), rows, tokenizer.pad_id, setting.world) for weights, name in different.items()}
    pair_of = {pair.id: pair for pair in pairs}
    texts = [(pair.prompt, pair.chosen, pair.rejected) for pair in (pair_of[row.id] for row in rows)]
    odds = label_odds(folder, texts, setting.world_name) if setting.world_name else None
    found = {}
    for name in digests:
        made = read_json(folder / name.split("/")[0] / MANIFEST)
        flags = made["flags"]
        plain_dpo = odds is not None and flags.get("loss") == "dpo" and not flags["chosen_weight"] and not flags["label_smoothing"]
        plain_dpo = plain_dpo and identity(made["parents"]["ref"]) == identity(parent_key(folder / "sft"))  # not --ref of another model
        found[name] = preference_numbers(logps[digests[name]], logps[digests["sft"]], odds / flags["beta"] if plain_dpo else None)
    return found


def label_odds(folder: Path, texts: Sequence[tuple[str, str, str]], world_name: str) -> np.ndarray:
    """Log-odds (N,) that a label of the run's data prefers the first response, of (prompt, chosen, rejected): what DPO on all pairs learns from are
    draws of that chance. Only a world knows it; of other data there is the label alone."""
    made = read_json(folder / "data" / MANIFEST)["flags"]
    chance = np.array([choice_probability(world_name, *text, made["label_temperature"], made["annotator_bias"]) for text in texts])
    chance = (chance + made["flip_rate"] * (1 - 2 * chance)).clip(0.001, 0.999)
    return np.log(chance / (1 - chance))


def sample(index: int, prompt: str, answers: dict[str, Answers]) -> dict:
    """One prompt with every row's response and what it is worth."""
    responses = {name: {"text": found.texts[index], "score_raw": float(found.raw[index])} for name, found in answers.items()}
    for name, found in answers.items():
        responses[name] |= {} if found.true is None else {"true_reward": float(found.true[index])}
    return {"prompt": prompt, "responses": responses}
