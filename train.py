"""Mixed Preference Optimization, stage by stage or in one go: which stage, from which checkpoint, with which numbers.

    python train.py --stage mpo                       everything on the built-in world `advice`, on a CPU
    python train.py --stage dpo --out runs/a --lr 1e-5      one stage of a run whose earlier stages are there
    torchrun --nproc_per_node 8 train.py --stage ppo ...    any stage on several GPUs

    stage      reads                          writes
    tokenizer  DIR/data                       DIR/tokenizer    (DIR/data is made from --data by whichever of this and mpo comes first)
    sft        tokenizer                      DIR/sft          next-token loss on the chosen responses
    rm         sft                            DIR/rm           Bradley-Terry reward model, fold models, the score of every training pair
    split      rm's scores                    DIR/split        easy and difficult pairs by reward gap
    dpo        sft, split, rm                 DIR/dpo          DPO on the easy pairs, reference = SFT
    ppo        dpo, rm, split                 DIR/ppo          PPO on the difficult prompts, start and reference = DPO: the MPO model
    mpo        all of these in order, then the comparison that eval.py makes
    ablations  the rows of data/ablations.py over seeds, each in processes of its own, and one line for each in OUT/rows.jsonl

In a chain a stage's flag takes the stage's name: --dpo-lr. `--stage X --help` lists what X reads. data/errors.py lists exit codes.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.batches import PairRow, encode_prompt, epoch_order, stable_hash
from data.errors import CheckpointError, DataError, NumericalError, UsageError
from data.examples import paths_of, read_prompts
from data.files import atomic_write, digest, read_json, weights_digest, write_json
from data.flags import Parser, add_flags, flag, take_flags, typed_names
from data.grid import GridFlags, run_grid
from data.prepare import DataFlags, WorldFlags, check_data_flags, load_pairs, prepare_data
from data.report import pair_accuracy, reward_model_report, reward_model_text
from data.run import CHANGE_NO_RESULT, MANIFEST, METRICS, Metrics, as_flags
from data.split import SplitFlags, check_split_flags, read_split, split_pairs, write_split
from data.tokenizer import DEFAULT_SIZE, Tokenizer, tokenizer_file, train_tokenizer
from eval import QUICK_PROMPTS, EvalFlags, compare_run
from losses.dpo import PREFERENCE_LOSSES, READS_GAP, Pairs, loss_flags
from model.checkpoint import CONFIG, count_parameters
from model.fit import FitFlags, fit
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel
from model.objectives import preference_objective, reward_objective, sft_objective
from model.optim import BY_SIZE, for_size
from model.parallel import ALONE, DeviceFlags, ProcessFlags, World, bare, distribute, exit_code, start
from model.plan import Counts, PlanFlags, plan_job, plan_text, planned_config
from model.resume import LoopFlags
from model.score import cached_logps, reference_logps, reward_scores_of_pairs, sha256_of
from model.stage import Run, RunFlags, Text, demonstration_rows, encoded, open_text, parameters, validation_prompts
from model.transformer import SIZES, initialise, sized
from model.watch import WATCHED, check_first_preference_step, has_left_reference, sampled_kl
from rl.ppo import PpoFlags, check_ppo_flags, check_rollout, summary, train_ppo
from rl.rollout import Rollout, Sampling, roll_out

SCALED_ON = 2000  # training pairs that the mean and std of a reward model's scores, and its accuracy in training, are taken from
CHAIN = ("tokenizer", "sft", "rm", "split", "dpo", "ppo")


@dataclass(frozen=True)
class TokenizerFlags:
    vocab_size: int | None = flag(None, f"pieces of the tokenizer (default: {DEFAULT_SIZE}, or as many as the texts can fill)", positive=True)
    file: str | None = flag(None, "use this sentencepiece model, nothing is trained (default: that of --init, in a chain that has it)")


@dataclass(frozen=True)
class ModelFlags:
    size: str = flag("tiny", "of a model from scratch", choices=tuple(SIZES))
    init: str | None = flag(None, "folder of a model to start from, ours or a published LLaMA, in place of one from scratch")


@dataclass(frozen=True)
class SftFlags(FitFlags):
    epochs: float = flag(2.0, "passes over the training rows; parts of one are possible", positive=True)
    weight_decay: float = flag(0.3, "AdamW's decay of the layers' matrices; a reward model that starts from SFT learns more with it")
    include_prompt: bool = flag(False, "learn the prompt's tokens too")


@dataclass(frozen=True)
class RmFlags(FitFlags):
    weight_decay: float = flag(0.3, "AdamW's decay of the layers' matrices")
    validations: int = flag(2, "how often the validation rows are looked at", positive=True)
    folds: int = flag(2, "every pair is scored by one of so many models, one that never saw it; 1: by the model trained on all", positive=True)
    snapshots: bool = flag(False, "also keep the weights of every validation, in snapshot-STEP")
    init: str | None = flag(None, "start from this folder's trunk (default: DIR/sft)")
    reward_model: str | None = flag(None, "take this folder's reward model as it is and train none: no other flag of this stage is read then")


@dataclass(frozen=True)
class DpoFlags(FitFlags):
    part: str = flag("easy", "pairs to train on", choices=("easy", "difficult", "all"))
    loss: str = flag("dpo", "of losses/dpo.py", choices=tuple(PREFERENCE_LOSSES))
    init: str | None = flag(None, "start from this folder (default: DIR/sft)")
    ref: str | None = flag(None, "reference (default: DIR/sft, whatever --init is)")
    max_kl: float = flag(3.0, "stop when the KL to the reference passes this, in nats per sampled response", positive=True)
    max_fall: float = flag(20.0, "stop when validation's chosen responses have lost so many nats of log-probability", positive=True)


@dataclass(frozen=True)
class PpoStageFlags(PpoFlags):
    part: str = flag("difficult", "pairs whose prompts are trained on", choices=("easy", "difficult", "all"))
    prompts: str | None = flag(None, "train on the prompts of this spec instead, like --data; jsonl needs only `prompt`")
    init: str | None = flag(None, "start from this folder (default: DIR/dpo)")
    ref: str | None = flag(None, "reference (default: DIR/dpo, whatever --init is)")
    reward_model: str | None = flag(None, "folder of the reward model (default: DIR/rm)")


def loss_fields() -> list[tuple]:
    """Every keyword argument of the preference losses as a flag: its help in the first that has it, its default in each. Raises ValueError
    for a name that is taken."""
    fields: dict[str, tuple[type, str, list[str]]] = {}
    taken = {field.name for group in (DpoFlags, RunFlags, LoopFlags, PlanFlags, DeviceFlags, DataFlags, WorldFlags) for field in dataclasses.fields(group)}
    for loss, function in PREFERENCE_LOSSES.items():
        for name, (kind, default, text) in loss_flags(function).items():
            if name in taken:
                raise ValueError(f"losses/dpo.py: {loss}: its argument {name} has the name of a flag of --stage dpo; choose another")
            fields.setdefault(name, (kind, text, []))[2].append(f"{loss} {default}")
    return [(name, kind | None, flag(None, f"{text} (default: {', '.join(defaults)})")) for name, (kind, text, defaults) in fields.items()]


LossFlags = dataclasses.make_dataclass("LossFlags", loss_fields(), frozen=True)
STAGE_FLAGS = {
    "tokenizer": (TokenizerFlags,),
    "sft": (SftFlags,),
    "rm": (RmFlags,),
    "split": (SplitFlags,),
    "dpo": (DpoFlags, LossFlags),
    "ppo": (PpoStageFlags,),
}
QUICK = {
    "data": {"pairs": 400, "test_prompts": 32},
    "sft": {"epochs": 3.0, "validations": 2},
    "rm": {"validations": 1},
    "dpo": {"validations": 2},
    "ppo": {"iterations": 3, "prompts_per_iteration": 32, "validations": 1},
    "ablations": {"only": "dpo-all,ppo-all,mpo", "seeds": "1,2"},
}


def tokenizer_stage(run: Run) -> None:
    """Trains a tokenizer on the training part, or takes the given one."""
    flags, init = run.take("tokenizer", TokenizerFlags), take_flags(ModelFlags, run.given).init
    if init and not flags.file:  # a chain from a model starts from its tokenizer
        flags = dataclasses.replace(flags, file=str(tokenizer_file(init)))
    if flags.file:
        Tokenizer(Path(flags.file))  # one that cannot be used stops the run before anything is written
    file = {"file_digest": digest(Path(flags.file))} if flags.file else {}
    if not run.begins("tokenizer", as_flags(flags) | file, {"data": run.folder / "data"}):
        return
    with run.stage("tokenizer") as (folder, _, results):
        path = folder / "tokenizer.model"
        if run.world.is_main and flags.file:
            atomic_write(path, Path(flags.file).read_bytes())
        elif run.world.is_main:
            texts = [text for pair in load_pairs(run.folder / "data", "train") for text in (pair.prompt, pair.chosen, pair.rejected)]
            train_tokenizer(texts, path, flags.vocab_size)
        run.world.barrier()
        results["vocab_size"] = Tokenizer(path).vocab_size


def sft_stage(run: Run) -> None:
    """Next-token loss on the demonstrations, from scratch or from --init."""
    flags, model_flags, text = run.take("sft", SftFlags), take_flags(ModelFlags, run.given), open_text(run)
    tokenizer, parents = text.tokenizer, {"tokenizer": run.folder / "tokenizer"}
    if model_flags.init:
        parents["init"] = run.parent("sft", model_flags.init)
        model = text.load(parents["init"], LanguageModel)
    else:
        model = LanguageModel(sized(model_flags.size, tokenizer.vocab_size, text.max_prompt + text.max_response))
        initialise(model, stable_hash(run.flags.seed, "sft", "weights"))
    flags = for_size("sft", flags, parameters(model))
    if not run.begins("sft", as_flags(flags, model_flags), parents):
        return
    with run.stage("sft") as (folder, metrics, results):
        rows = {part: demonstration_rows(run, text, part) for part in ("train", "validation")}
        results["parameters"] = parameters(model)
        run.say(f"  {results['parameters']:,} parameters, {len(rows['train'])} demonstrations")
        model = distribute(model, run.world)
        objective = sft_objective(tokenizer.pad_id, run.world.device, flags.include_prompt)
        results |= fit(
            model, objective, rows["train"], rows["validation"], flags,
            stage="sft", seed=run.flags.seed, world=run.world, metrics=metrics, keep=partial(text.save, model, folder, run.world),
            saving=run.saving(folder, text),
        )  # fmt: skip
        run.say(f"  best validation loss {results['loss']:.3f} nats per token, at step {results['step']}")


def rm_stage(run: Run) -> None:
    """Reward models: one per fold, whose pairs it never saw, then the one on all pairs, or a given one alone; scores, their mean and std, and a
    report on test pairs."""
    flags, text = run.take("rm", RmFlags), open_text(run)
    given, pad_id, world = flags.reward_model, text.tokenizer.pad_id, run.world
    init, folds = (run.parent("rm", given), 1) if given else (run.parent("sft", flags.init), flags.folds)
    flags = for_size("rm", flags, count_parameters(init))
    text.load(init, ScalarModel, new_head=not given)  # what does not fit stops the run before a folder is made
    key = {"reward_model": given} if given else as_flags(flags)
    if not run.begins("rm", key, {"reward_model" if given else "init": init, "data": run.folder / "data"}):
        return
    with run.stage("rm") as (folder, _, results):
        train, validation, test = (encoded(run, text, part) for part in ("train", "validation", "test"))
        prompt_of = {pair.id: pair.prompt for pair in load_pairs(run.folder / "data", "train")}
        fold_of = np.array([stable_hash("fold", prompt_of[row.id]) % folds for row in train])
        if folds > 1 and len(set(fold_of)) == 1:
            raise DataError(f"{run.folder / 'data'}: {len(set(prompt_of.values()))} training prompts fall into one of {folds} folds; give more, or --folds 1")
        train_on = partial(train_reward_model, run, text, flags, init, validation)
        scores = np.zeros((len(train), 2))
        for fold in range(folds if folds > 1 else 0):
            train_on([row for row, f in zip(train, fold_of, strict=True) if f != fold], folder / f"fold-{fold}", f"rm fold {fold}")
            mine, model = np.flatnonzero(fold_of == fold), distribute(text.load(folder / f"fold-{fold}", ScalarModel), world, frozen=True)
            scores[mine] = reward_scores_of_pairs(model, [train[i] for i in mine], pad_id, world)
        if not given:
            results |= train_on(train, folder, "rm")
        elif world.is_main:
            text.copy_model(init, folder)
        world.barrier()
        model = distribute(text.load(folder, ScalarModel), world, frozen=True)
        sample = range(len(train)) if folds == 1 else epoch_order(len(train), run.flags.seed, "rm scale", 0)[:SCALED_ON]
        in_fold = reward_scores_of_pairs(model, [train[i] for i in sample], pad_id, world)
        scores = in_fold if folds == 1 else scores
        on_test = reward_scores_of_pairs(model, test, pad_id, world)
        stats = {"score_mean": float(in_fold[:, 0].mean()), "score_std": float(in_fold[:, 0].std())}
        if not stats["score_std"] > 0:
            raise NumericalError("rm: all chosen responses have the same score, so the reward model has learnt nothing; try another --lr, or more data")
        if world.is_main:
            write_json(folder / CONFIG, read_json(folder / CONFIG) | stats)
        lengths = [[len(row.chosen.response) for row in test], [len(row.rejected.response) for row in test]]
        results |= stats | {"test": reward_model_report(*on_test.T, *np.array(lengths)), "train_accuracy": pair_accuracy(in_fold)}
        results["scored_pairs_accuracy"] = pair_accuracy(scores)
        if world.is_main:
            lines = [{"id": row.id, "chosen": s[0], "rejected": s[1], "fold": int(f)} for row, s, f in zip(train, scores.tolist(), fold_of, strict=True)]
            atomic_write(folder / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        run.say(reward_model_text(results["test"], results["scored_pairs_accuracy"]))


def train_reward_model(run: Run, text: Text, flags: RmFlags, init: Path, validation: list[PairRow], rows: list[PairRow], where: Path, name: str) -> dict:
    """Trains a reward model on rows, keeps its best weights in `where`, and returns the best validation."""
    world = run.world
    model = distribute(text.load(init, ScalarModel, new_head=True, seed=stable_hash(run.flags.seed, name)), world)
    with Metrics(where / METRICS if world.is_main else None) as numbers:
        best = fit(
            model, reward_objective(text.tokenizer.pad_id, world.device), rows, validation, flags,
            stage=name, seed=run.flags.seed, world=world, metrics=numbers, keep=partial(text.save, model, where, world),
            saving=run.saving(where, text),
        )  # fmt: skip
    world.barrier()
    return best


def split_stage(run: Run) -> None:
    """Easy, difficult and dropped pairs by the gap of their out-of-fold scores."""
    flags = run.take("split", SplitFlags)
    rm = run.parent("rm")
    if flags.gaps == "given":
        check_given_gaps(run)
    if not run.begins("split", as_flags(flags), {"rm": rm}):
        return
    with run.stage("split") as (folder, _, results):
        scored = [json.loads(line) for line in (rm / "scores.jsonl").read_text().splitlines()]
        pair_of = {pair.id: pair for pair in load_pairs(run.folder / "data", "train")}
        pairs, gaps = [pair_of[row["id"]] for row in scored], np.array([row["chosen"] - row["rejected"] for row in scored])
        if flags.gaps == "given":
            gaps = np.array([pair.gap for pair in pairs])
        split = split_pairs([pair.prompt for pair in pairs], gaps, flags, run.flags.seed)
        if run.world.is_main:
            write_split(folder, split, pairs, gaps, flags, {"seed": run.flags.seed, "scores": digest(rm / "scores.jsonl")})
        counts = {name: len(getattr(split, name)) for name in ("easy", "difficult", "dropped")}
        results |= counts | {"disputed": int(split.disputed.sum()), "threshold": split.threshold}
        run.say("  " + ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in results.items()))


def check_given_gaps(run: Run) -> None:
    """Raises DataError where a pair of training or validation states no gap of its own."""
    pairs = (pair for part in ("train", "validation") for pair in load_pairs(run.folder / "data", part))
    without = next((pair.where for pair in pairs if pair.gap is None), None)
    if without:
        raise DataError(f'{without}: has no "gap", which --gaps given needs in every pair; give it, or split by the reward model\'s')


def part_ids(run: Run, part: str) -> set[str] | None:
    """Ids of the split's part; None for all pairs, which need no split."""
    return None if part == "all" else set(read_split(run.parent("split"))[part])


def chosen_loss(run: Run, name: str):
    """The preference loss with the flags that were typed; raises UsageError for a flag that it does not read. Also its arguments."""
    typed = {key: value for key, value in as_flags(run.take("dpo", LossFlags)).items() if value is not None}
    known = loss_flags(PREFERENCE_LOSSES[name])
    foreign = sorted(set(typed) - set(known))
    if foreign:
        raise UsageError(f"--{foreign[0].replace('_', '-')}: the loss {name} does not read it; it reads {', '.join(known)}")
    arguments = {key: default for key, (_, default, _) in known.items()} | typed
    if not arguments["beta"] > 0:
        raise UsageError(f"--beta {arguments['beta']}: must be positive; at 0 no pair teaches anything")
    try:
        PREFERENCE_LOSSES[name](Pairs(*[torch.zeros(1)] * 4, *[torch.ones(1)] * 3), **arguments)
    except ValueError as error:
        raise UsageError(f"--loss {name}: {error}") from error
    return partial(PREFERENCE_LOSSES[name], **arguments), arguments


def dpo_stage(run: Run) -> None:
    """A preference loss on a part of the pairs; the reference's log-probabilities are computed once."""
    flags, text, world = run.take("dpo", DpoFlags), open_text(run), run.world
    loss, arguments = chosen_loss(run, flags.loss)
    init = run.parent("sft", flags.init)
    ref_path = run.parent("sft", flags.ref)
    ids, pad_id = part_ids(run, flags.part), text.tokenizer.pad_id
    flags = for_size("dpo", flags, count_parameters(init))
    parents = {"init": init, "ref": ref_path, "data": run.folder / "data"}
    if ids is not None:
        parents["split"] = run.folder / "split"
    if ids is not None or flags.loss in READS_GAP:
        parents["rm"] = run.parent("rm")
    model, ref = text.load(init, LanguageModel), text.load(ref_path, LanguageModel)  # what does not fit stops the run before a folder is made
    if not run.begins("dpo", as_flags(flags) | arguments, parents):
        return
    with run.stage("dpo") as (folder, metrics, results):
        ref = distribute(ref, world, frozen=True)
        train = [row for row in encoded(run, text, "train") if ids is None or row.id in ids]
        validation = encoded(run, text, "validation")
        gaps = reward_gaps(parents["rm"], text, validation, world) if "rm" in parents else None
        if ids is not None:
            validation = validation_part(run, validation, gaps, flags.part)
        both = train + validation
        key = {
            "weights": weights_digest(ref_path),
            "tokenizer": text.tokenizer.digest,
            "max_prompt": text.max_prompt,
            "max_response": text.max_response,
            "dtype": str(world.dtype),
            "how": f"{world.device.type} {world.parallel}",  # in bf16 FSDP computes all in it, DDP products alone
        }
        logps = cached_logps(
            run.folder / "cache", key, [row.id for row in both],
            lambda: reference_logps(ref, both, pad_id, world), world.is_main,
        )  # fmt: skip
        ref_logps = {row.id: tuple(values) for row, values in zip(both, logps.tolist(), strict=True)}
        same_start = weights_digest(init) == key["weights"]
        model = distribute(model, world)
        prompts, seed = validation_prompts(run, text, WATCHED), stable_hash(run.flags.seed, "dpo", "watch")

        def watch(numbers: dict[str, float]) -> bool:
            numbers |= sampled_kl(model, ref, prompts, text, seed, world)
            return has_left_reference(numbers, flags.max_kl, flags.max_fall, run.say)

        at_first = partial(check_first_preference_step, flags.loss, arguments, world) if same_start else lambda numbers: None
        objective = preference_objective(loss, arguments["beta"], ref_logps, pad_id, world.device, gaps if flags.loss in READS_GAP else None)
        results |= fit(
            model, objective, train, validation, flags,
            stage="dpo", seed=run.flags.seed, world=world, metrics=metrics, keep=partial(text.save, model, folder, world),
            saving=run.saving(folder, text), at_first=at_first, at_validation=watch,
        )  # fmt: skip
        run.say(
            f"  {len(train)} pairs; best at step {results['step']}: validation loss {results['loss']:.4f}, accuracy {results['accuracy']:.3f},"
            f" KL {results['kl_ref_seq']:.2f}, chosen log-probability {-results['chosen_fall']:+.2f}"
        )


def reward_gaps(rm: Path, text: Text, validation: list[PairRow], world: World) -> dict[str, float]:
    """Row id -> gap: of training pairs as they were scored for the split, of validation pairs by the model trained on all."""
    lines = [json.loads(line) for line in (rm / "scores.jsonl").read_text().splitlines()]
    scores = reward_scores_of_pairs(distribute(text.load(rm, ScalarModel), world, frozen=True), validation, text.tokenizer.pad_id, world)
    of_validation = {row.id: chosen - rejected for row, (chosen, rejected) in zip(validation, scores.tolist(), strict=True)}
    return {line["id"]: line["chosen"] - line["rejected"] for line in lines} | of_validation


def validation_part(run: Run, rows: list[PairRow], gaps: dict[str, float], part: str) -> list[PairRow]:
    """Those of the validation rows that the split would have put into this part; all, which is said, where there are none.

    A model that learns from pairs with a large gap is surer than labels of all pairs allow: their loss rises, and would end its training,
    while it still gets better (tests/results/ablations.md)."""
    made = read_json(run.folder / "split" / MANIFEST)
    flags = SplitFlags(**{field.name: made["flags"][field.name] for field in dataclasses.fields(SplitFlags)})
    if flags.rule == "quantile":  # that of the training pairs
        flags = dataclasses.replace(flags, rule="threshold", threshold=made["results"]["threshold"], quantile=SplitFlags.quantile)
    pair_of = {pair.id: pair for pair in load_pairs(run.folder / "data", "validation")}
    own = [pair_of[row.id].gap if flags.gaps == "given" else gaps[row.id] for row in rows]
    split = split_pairs([pair_of[row.id].prompt for row in rows], np.array(own), flags, made["flags"]["seed"], may_be_empty=True)
    found = [rows[i] for i in getattr(split, part)]
    if not found:
        run.say(f"  no validation pair is {part}; validation looks at all of them")
    return found or rows


def sampling(text: Text, flags: PpoFlags, mean: float, std: float) -> Sampling:
    """How this run draws and judges responses."""
    return Sampling(text.max_response, flags.temperature, flags.end_penalty, text.tokenizer.eos_id, text.tokenizer.pad_id, mean, std)


def training_prompts(run: Run, text: Text, flags: PpoStageFlags) -> list[tuple[int, ...]]:
    """Ids of the prompts that PPO trains on: --prompts, or those of the chosen part of the split; never a test prompt."""
    if flags.prompts:
        prompts = read_prompts(flags.prompts, template=read_json(run.folder / "data" / MANIFEST)["flags"].get("template"))
    else:
        ids = part_ids(run, flags.part)
        prompts = [(p.prompt, p.style) for p in load_pairs(run.folder / "data", "train") if ids is None or p.id in ids]
    held_out = {pair.prompt for part in ("validation", "test") for pair in load_pairs(run.folder / "data", part)}
    different = dict.fromkeys(prompts)
    encoded_ones = [encode_prompt(*prompt, text.tokenizer, text.max_prompt)[0] for prompt in different if prompt[0] not in held_out]
    fitting = [ids for ids in encoded_ones if ids]
    if len(fitting) < len(different):
        run.say(f"  {len(different) - len(encoded_ones)} prompts of validation or test left out, {len(encoded_ones) - len(fitting)} above --max-prompt")
    if not fitting:
        raise DataError(f"no prompt is left to train on after those of validation and test, and those above --max-prompt {text.max_prompt}")
    return fitting


def ppo_stage(run: Run) -> None:
    """PPO on a part's prompts; in MPO start and reference are the DPO model."""
    flags, text, world = run.take("ppo", PpoStageFlags), open_text(run), run.world
    check_ppo_flags(flags)
    init = run.parent("dpo", flags.init)
    ref_path = run.parent("dpo", flags.ref)
    rm_path = run.parent("rm", flags.reward_model)
    prompts = training_prompts(run, text, flags)
    policy, reward_model = text.load(init, LanguageModel), text.load(rm_path, ScalarModel)
    described = read_json(rm_path / CONFIG)
    if "score_std" not in described:
        raise CheckpointError(f"{rm_path / CONFIG}: score_mean and score_std are missing; the rm stage fits and stores them")
    critic = text.load(rm_path, ScalarModel) if flags.critic == "separate" else None
    flags = for_size("ppo", flags, count_parameters(init))
    warn_of_unhealthy(run, ref_path)
    same_start = weights_digest(init) == weights_digest(ref_path)
    parents = {"init": init, "ref": ref_path, "rm": rm_path, "data": run.folder / "data"}
    if not flags.prompts and flags.part != "all":
        parents["split"] = run.folder / "split"
    if not run.begins("ppo", as_flags(flags) | {"prompts_digest": sha256_of(prompts)}, parents):
        return
    with run.stage("ppo") as (folder, metrics, results):
        run.say(f"  {len(prompts)} prompts; policy from {init}, reference {ref_path}, reward model {rm_path}")
        scale = (described["score_mean"], described["score_std"])
        model = distribute(PolicyWithCritic(policy, critic, *scale), world)
        ref, reward_model = (distribute(m, world, frozen=True) for m in (text.load(ref_path, LanguageModel), reward_model))
        how = sampling(text, flags, *scale)
        checks = validation_prompts(run, text, 32 if run.flags.quick else 128)
        saving = run.saving(folder, text, every=10)

        def validate() -> dict[str, float]:
            """Means over the validation prompts' responses, and the objective that decides which weights are kept."""
            keys = list(range(world.rank, len(checks), world.size))
            same_for_all = keys + [0] * (-(-len(checks) // world.size) - len(keys))  # FSDP needs as many rows of every process
            rollout, _ = roll_out(
                model, ref, reward_model, [checks[k] for k in same_for_all], same_for_all,
                seed=run.flags.seed, step=-1, sampling=how, micro_batch=flags.micro_batch, world=world,
            )  # fmt: skip
            rollout = Rollout(*(getattr(rollout, field.name)[: len(keys)] for field in dataclasses.fields(Rollout)))
            numbers = summary(rollout, world)
            check_rollout(numbers, rollout, "ppo, validation", False, world, saving)
            return numbers | {"objective": numbers["score"] - flags.kl_coef * numbers["kl_ref_seq"]}

        def keep(snapshot: str) -> None:
            inner = bare(model)
            extra = {"value_head.weight": inner.value_head.weight} if inner.critic is None else {}
            text.save(inner.policy, folder, world, snapshot, extra=extra)
            if inner.critic is not None:
                text.save(inner.critic, folder / snapshot / "critic", world)

        results |= train_ppo(
            model, ref, reward_model, prompts, flags, how,
            same_start=same_start, seed=run.flags.seed, world=world, metrics=metrics, validate=validate, keep=keep,
            saving=saving,
        )  # fmt: skip
        run.say(f"  best at iteration {results['step']}: score {results['score']:.2f}, KL to the reference {results['kl_ref_seq']:.2f}")


def warn_of_unhealthy(run: Run, ref: Path) -> None:
    """PPO is only as good as its reference: says so where DPO's own watch found these weights, or this snapshot of them, broken."""
    stage = ref.parent if ref.name.startswith("snapshot-") else ref
    if not (stage / MANIFEST).exists() or (made := read_json(stage / MANIFEST))["stage"] != "dpo":
        return
    step = made["results"]["step"] if stage == ref else int(ref.name.rpartition("-")[2]) - 1
    lines = map(json.loads, (stage / METRICS).read_text().splitlines())
    seen = next(line for line in lines if line["step"] == step and "valid_kl_ref_seq" in line)
    numbers = {name: seen[f"valid_{name}"] for name in ("kl_ref_seq", "chosen_fall")}
    if has_left_reference(numbers, made["flags"]["max_kl"], made["flags"]["max_fall"], lambda text: None):
        run.say(
            f"warning: ppo: the reference {ref} failed DPO's check: {numbers['kl_ref_seq']:.1f} nats of KL, and {numbers['chosen_fall']:.1f} of"
            " fall of the chosen responses; a larger beta or a smaller learning rate of DPO makes a better one"
        )


def mpo(run: Run) -> None:
    """The whole chain, then the comparison of its models."""
    if run.take("split", SplitFlags).gaps == "given":
        with typed_names((SplitFlags,), "split-"):
            check_given_gaps(run)
    for stage in CHAIN:
        with typed_names(STAGE_FLAGS[stage], f"{stage}-"):
            STAGES[stage](run)
    if run.world.is_main:
        flags = EvalFlags(prompts=QUICK_PROMPTS) if run.flags.quick else EvalFlags()
        compare_run(run.folder, dataclasses.replace(run.world, size=1, rank=0), dataclasses.replace(flags, seed=run.flags.seed))
        print(
            f"\nnext: python eval.py --model {run.folder}/ppo --prompt \"...\"      talk to the MPO model\n"
            f"      python eval.py --run {run.folder} --greedy            compare again, decoding greedily\n"
            f"      python train.py --stage dpo --help                    what a stage can be told"
        )


STAGES = {
    "tokenizer": tokenizer_stage,
    "sft": sft_stage,
    "rm": rm_stage,
    "split": split_stage,
    "dpo": dpo_stage,
    "ppo": ppo_stage,
    "mpo": mpo,
}


def plan(run: Run, stage: str) -> None:
    """Prints what the stage, or every stage of the chain, would need; reads no more than a model's config.json."""
    asked, model, device = (take_flags(group, run.given) for group in (PlanFlags, ModelFlags, DeviceFlags))
    for name in CHAIN if run.chain else (stage,):
        if name not in BY_SIZE:
            continue
        flags, prefix = run.take(name, STAGE_FLAGS[name][0]), f"{name}-" if run.chain else ""
        if name == "rm" and flags.reward_model:
            continue  # trains nothing
        config = planned_config(asked.size, model.init or getattr(flags, "init", None), run.flags.out)
        flags = for_size(name, flags, Counts.of(config).model)
        print(plan_text(plan_job(name, config, flags, device, take_flags(DataFlags, run.given), asked.world), asked.gpu_memory, prefix))


def build_parser(stage: str) -> argparse.ArgumentParser:
    """A parser of exactly the flags that the stage reads, its own before those that it shares with others."""
    help_format = partial(argparse.HelpFormatter, max_help_position=36, width=130)
    parser = Parser(prog=f"train.py --stage {stage}", usage="%(prog)s [flags]", allow_abbrev=False, formatter_class=help_format)
    parser.add_argument("--stage", choices=(*STAGES, "ablations"), help="what to run")
    whole, trains = stage in ("mpo", "ablations"), stage not in ("tokenizer", "split", "ablations")
    if stage == "ablations":
        add_flags(parser.add_argument_group("the grid"), GridFlags)
    for name in CHAIN if whole else (stage,):  # in a chain all stages' flags, by their names there
        title = parser.add_argument_group(f"stage {name}")
        for group in (*STAGE_FLAGS[name], *((ModelFlags,) if name == "sft" else ())):
            add_flags(title, group, f"{name}_" if whole and group is not ModelFlags else "")
    add_flags(parser.add_argument_group("this run"), RunFlags)
    if trains:
        add_flags(parser.add_argument_group("checkpoints, profile"), LoopFlags)
        add_flags(parser.add_argument_group("what it would need"), PlanFlags)
    add_flags(parser.add_argument_group("processes and devices"), ProcessFlags if stage in ("tokenizer", "split") else DeviceFlags)
    data = parser.add_argument_group("data", "in place when tokenizer or mpo make it; later stages take what it was made with, and refuse another")
    add_flags(data, DataFlags)
    add_flags(data, WorldFlags)
    return parser


def check_flags(run: Run, stage: str) -> None:
    """Builds every flag group of the stage or chain once, so that an impossible value stops the run before any work."""
    if (take_flags(LoopFlags, run.given).save_every or 0) < 0:
        raise UsageError("--save-every: must be 0 or more")
    if {"size", "init"} <= set(run.given):
        raise UsageError(f"--size {run.given['size']}: the model of --init has its own; leave one of the two out")
    for name, place in run.given.items():
        if name.endswith(("init", "ref", "reward_model")) and not Path(place).is_dir() and run.folder not in Path(place).parents:
            raise UsageError(f"--{name.replace('_', '-')} {place}: no such folder")
    for name in CHAIN if run.chain else (stage,):
        with typed_names(STAGE_FLAGS[name], f"{name}-" if run.chain else ""):
            flags = run.take(name, STAGE_FLAGS[name][0])
            for field, most in (("warmup", 1), ("weight_decay", math.inf), ("value_coef", math.inf)):
                if not 0 <= getattr(flags, field, 0) <= most:
                    raise UsageError(f"--{field.replace('_', '-')} {getattr(flags, field)}: must lie within 0 and {most}")
            if name in CHECKS:
                CHECKS[name](run, flags)


def check_tokenizer(run: Run, flags: TokenizerFlags) -> None:
    """Raises UsageError for a size of a tokenizer that is given."""
    if flags.vocab_size and (given_one := flags.file or run.given.get("init")):
        raise UsageError(f"--vocab-size {flags.vocab_size}: {given_one} has its own; leave the flag out")


def check_rm(run: Run, flags: RmFlags) -> None:
    """Raises UsageError for a flag of training beside a reward model that is given."""
    names = {("rm_" if run.chain else "") + field.name for field in dataclasses.fields(RmFlags)}
    if flags.reward_model and (typed := sorted(names & set(run.given) - {"reward_model", "rm_reward_model"})):
        raise UsageError(f"--{typed[0].replace('_', '-')}: nothing is trained beside --reward-model {flags.reward_model}; leave one of them out")


def check_ppo(run: Run, flags: PpoStageFlags) -> None:
    """Raises UsageError for what `check_ppo_flags` refuses, for prompts that cannot be read, and for as many as processes cannot share."""
    check_ppo_flags(flags)
    if flags.prompts and ("ppo_part" if run.chain else "part") in run.given:
        raise UsageError(f"--part {flags.part}: is not read with --prompts; leave one of them out")
    if flags.prompts:
        paths_of(flags.prompts)
    if flags.prompts_per_iteration % run.world.size:
        raise UsageError(f"--prompts-per-iteration {flags.prompts_per_iteration}: must be a multiple of the {run.world.size} processes")


CHECKS = {  # of flags that do not go together, besides those of any one
    "tokenizer": check_tokenizer,
    "rm": check_rm,
    "split": lambda run, flags: check_split_flags(flags),
    "dpo": lambda run, flags: chosen_loss(run, flags.loss),
    "ppo": check_ppo,
}


def grid(given: dict) -> None:
    """The ablation grid: what is said of the grid itself, and the flags that every row is run with."""
    about_grid = {field.name for field in dataclasses.fields(GridFlags)} | {"out", "seed"}
    if "seed" in given:
        raise UsageError("--seed: a grid has --seeds, with commas between")
    if "resume" in given:
        raise UsageError("--resume: a grid goes on by itself where it stopped; leave the flag out")
    folder = Path(given.get("out", "runs/ablations"))
    flags = take_flags(GridFlags, given, **(QUICK["ablations"] if given.get("quick") else {}))
    rows = run_grid(folder, flags, {name: value for name, value in given.items() if name not in about_grid}, defaults())
    print(f"\nnext: python eval.py --compare {rows}")


def defaults() -> dict[str, object]:
    """The default of every flag that changes a model, in the chain's names, with what a default of None stands for."""
    groups = {**STAGE_FLAGS, "": (DataFlags, WorldFlags, ModelFlags)}
    fields = [(f"{stage}-".lstrip("-"), field) for stage, some in groups.items() for group in some for field in dataclasses.fields(group)]
    found = {prefix + field.name: field.default for prefix, field in fields if field.name not in CHANGE_NO_RESULT and prefix + field.name != "rm-snapshots"}
    found |= {f"{stage}-{name}": list(by_size) for stage, table in BY_SIZE.items() for name, by_size in table.items()}
    for loss, function in PREFERENCE_LOSSES.items():
        found |= {f"dpo-{name} of {loss}": default for name, (_, default, _) in loss_flags(function).items()}
    return {"--" + name.replace("_", "-"): value for name, value in found.items()}


def given_again(given: dict, stage: str) -> bool:
    """Whether torchrun starts this command again when a process fails (--max-restarts), and there is something to go on with."""
    folder = Path(given.get("out", RunFlags.out)) / ("" if stage == "mpo" else stage)
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and folder.is_dir() and any(folder.iterdir())


def main(arguments: list[str]) -> None:
    """Parses flags, joins the process group, prepares the data, runs the stage."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=(*STAGES, "ablations"))
    stage = first.parse_known_args(arguments)[0].stage
    if stage is None:
        print(__doc__)
        if {"-h", "--help"} & set(arguments):
            return
        raise UsageError(f"--stage is missing; choose one of {', '.join(STAGES)}, ablations")
    given = vars(build_parser(stage).parse_args(arguments))
    given.pop("stage")
    if stage == "ablations":
        grid(given)
        return
    if given_again(given, stage):
        given["resume"] = True
    flags = take_flags(RunFlags, given)
    made = Path(flags.out) / "data" / MANIFEST
    if "seed" not in given and made.exists():  # one run, one seed
        flags = dataclasses.replace(flags, seed=read_json(made)["flags"]["seed"])
    if flags.seed < 0:
        raise UsageError(f"--seed {flags.seed}: must be 0 or more")
    data_flags = take_flags(DataFlags, given, data=given.get("data") or "advice", max_pairs=QUICK["data"]["pairs"] if flags.quick else None)
    world_flags = take_flags(WorldFlags, given, **(QUICK["data"] if flags.quick else {}))
    if given.get("plan"):
        plan(Run(Path(flags.out), flags, ALONE, given, stage == "mpo", QUICK if flags.quick else {}), stage)
        return
    for name in {"world", "gpu_memory", *(("size",) if stage not in ("sft", "mpo") else ())} & set(given):
        raise UsageError(f"--{name.replace('_', '-')}: is read with --plan alone, here; leave it out")
    makes_data = stage in ("tokenizer", "mpo")  # every other stage needs the tokenizer first, and must not choose the data by accident
    if makes_data:
        check_data_flags(data_flags, given)
    world = start(take_flags(DeviceFlags, given))
    run = Run(Path(flags.out), flags, world, given, stage == "mpo", QUICK if flags.quick else {})
    check_flags(run, stage)
    if flags.resume and not any(run.folder.glob("*/")):
        raise UsageError(f"--resume: there is nothing in {run.folder} to go on with; leave the flag out")
    if world.is_main and (makes_data or (run.folder / "data" / MANIFEST).exists()):
        prepare_data(run.folder / "data", data_flags, world_flags, tuple(given), flags.seed, flags.resume)
    world.barrier()
    STAGES[stage](run)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
