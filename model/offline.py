"""The stages that sample nothing to learn from: their flags, what each reads, does and writes.

tokenizer, sft and rm prepare; split is the paper's data step, dpo the method's first stage (its second, ppo, is in rl/online.py). Each asks
the run whether it has to work at all, works in `with run.stage(...)`, and says what it found.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.batches import PairRow, encode_pairs, epoch_order, stable_hash
from data.errors import DataError, NumericalError, UsageError
from data.examples import Pair
from data.files import atomic_write, digest, model_digest, read_json, write_json
from data.flags import flag, take_flags
from data.prepare import held_together, load_pairs
from data.report import pair_accuracy, reward_model_report, reward_model_text
from data.run import MANIFEST, METRICS, Metrics, as_flags
from data.split import SplitFlags, split_pairs, write_split
from data.tokenizer import DEFAULT_SIZE, Tokenizer, tokenizer_file, train_tokenizer
from losses.dpo import PREFERENCE_LOSSES, READS_GAP, Pairs, loss_flags
from model.checkpoint import CONFIG, check_read_at_end, count_parameters, open_model
from model.fit import FitFlags, fit
from model.heads import LanguageModel, ScalarModel
from model.objectives import preference_objective, reward_objective, sft_objective
from model.optim import for_size
from model.parallel import World, distribute
from model.score import cached_logps, reference_logps, reward_scores_of_pairs
from model.stage import Run, Text, check_vocabularies, demonstration_rows, encoded, open_text, part_ids, validation_prompts
from model.transformer import SIZES, first_values, sized
from model.watch import WATCHED, check_first_preference_step, limit_passed, sampled_kl

SCALED_ON = 2000  # training pairs that the mean and std of a reward model's scores, and its accuracy in training, are taken from
FLAT = 0.05  # log-odds: a reward model whose scores spread less has hardly learnt; those of the built-in worlds, noisy labels included, spread by 0.4 and more


@dataclass(frozen=True)
class TokenizerFlags:
    vocab_size: int | None = flag(None, f"pieces of the tokenizer (default: {DEFAULT_SIZE}, or as many as the texts can fill)", positive=True)
    file: str | None = flag(None, "use this sentencepiece model, nothing is trained (default: that of --init or --rm-reward-model, in a chain that has one)")


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
    folds: int = flag(
        2, "every pair is scored by one of so many models, one that was not trained on it, nor on its prompt or dialogue, though it starts from SFT; 1: by the"
        " model trained on all", positive=True,
    )  # fmt: skip
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


def loss_fields() -> list[tuple]:
    """Every keyword argument of the preference losses as a flag, with the help and the default that it has in each."""
    fields: dict[str, tuple[type, dict[str, list[str]]]] = {}  # name -> type, and help -> losses with their defaults
    for loss, function in PREFERENCE_LOSSES.items():
        for name, (kind, default, text) in loss_flags(function).items():
            fields.setdefault(name, (kind, {}))[1].setdefault(text, []).append(f"{loss} {default}")
    return [
        (name, kind | None, flag(None, "; ".join(f"{text} (default: {', '.join(defaults)})" for text, defaults in texts.items())))
        for name, (kind, texts) in fields.items()
    ]


LossFlags = dataclasses.make_dataclass("LossFlags", loss_fields(), frozen=True)


def tokenizers_place(run: Run, flags: TokenizerFlags) -> str | None:
    """The tokenizer's file that is typed, or, in a chain, the folder of the model or the reward model that it starts from."""
    return flags.file or take_flags(ModelFlags, run.given).init or (run.take("rm", RmFlags).reward_model if run.chain else None)


def check_tokenizer(run: Run, flags: TokenizerFlags) -> None:
    """Raises UsageError for a size of a tokenizer that is given."""
    if flags.vocab_size and (place := tokenizers_place(run, flags)):
        raise UsageError(f"--vocab-size {flags.vocab_size}: {place} has its own; leave the flag out")


def check_rm(run: Run, flags: RmFlags) -> None:
    """Raises UsageError for a flag of training beside a reward model that is given, CheckpointError for one that is none, or is read elsewhere."""
    given, names = flags.reward_model, {("rm_" if run.chain else "") + field.name for field in dataclasses.fields(RmFlags)}
    if not given:
        return
    if typed := sorted(names & set(run.given) - {"reward_model", "rm_reward_model"}):
        raise UsageError(f"--{typed[0].replace('_', '-')}: nothing is trained beside --reward-model {given}; leave one of them out")
    open_model(Path(given), ScalarModel)
    check_read_at_end(Path(given))


def tokenizer_stage(run: Run) -> None:
    """Trains a tokenizer on the training part, or takes the given one."""
    flags = run.take("tokenizer", TokenizerFlags)
    if (place := tokenizers_place(run, flags)) and place != flags.file:
        flags = dataclasses.replace(flags, file=str(tokenizer_file(place)))
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
            run.say(f"  learning from {len(texts):,} texts")
            train_tokenizer(texts, path, flags.vocab_size)
        run.world.barrier()
        tokenizer = Tokenizer(path)
        results["vocab_size"] = tokenizer.vocab_size
        warn_of_limits(run, tokenizer)


def warn_of_limits(run: Run, tokenizer: Tokenizer) -> None:
    """Says so where the data's limits cut more than a tenth of its texts: they are part of a run's data, so this is the time to choose others."""
    limits, pairs = read_json(run.folder / "data" / MANIFEST)["flags"], load_pairs(run.folder / "data", "train")[:1000]
    _, counts = encode_pairs(pairs, tokenizer, limits["max_prompt"], limits["max_response"])
    dropped = counts["dropped: prompt does not fit"]
    of_all = {"prompt": (counts["prompts shortened"] + dropped) / len(pairs), "response": counts["responses cut"] / (2 * max(1, len(pairs) - dropped))}
    for what, share in of_all.items():
        if share > 0.1:
            lost = f" ({dropped / len(pairs):.0%} cannot be and are left out with their pairs)" if what == "prompt" and dropped else ""
            run.say(
                f"warning: tokenizer: {share:.0%} of {what}s are longer than --max-{what} {limits[f'max_{what}']} tokens and will be cut{lost}; for others,"
                f" choose another --out with a larger --max-{what} or --{'tokenizer-' if run.chain else ''}vocab-size"
            )


def sft_stage(run: Run) -> None:
    """Next-token loss on the demonstrations, from scratch or from --init."""
    flags, model_flags, text = run.take("sft", SftFlags), take_flags(ModelFlags, run.given), open_text(run)
    tokenizer, parents = text.tokenizer, {"tokenizer": run.folder / "tokenizer"}
    if model_flags.init:
        parents["init"] = run.parent("sft", model_flags.init)
        model = text.load(parents["init"], LanguageModel)
    else:
        with torch.device("meta"):  # `distribute` gives it its values, each process its share, as it does to models from disk
            model = LanguageModel(sized(model_flags.size, tokenizer.vocab_size, text.max_prompt + text.max_response))
        model.read = first_values(model, stable_hash(run.flags.seed, "sft", "weights"))
    size = sum(p.numel() for p in model.parameters())
    flags = for_size("sft", flags, size)
    unread = {"size": None} if model_flags.init else {}
    if not run.begins("sft", as_flags(flags, model_flags) | unread, parents):
        return
    with run.stage("sft") as (folder, metrics, results):
        rows = {part: demonstration_rows(run, text, part) for part in ("train", "validation")}
        results["parameters"] = size
        run.say(f"  {size:,} parameters, {len(rows['train'])} demonstrations")
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
    if given and (run.folder / "sft" / CONFIG).exists():
        check_vocabularies(run.folder / "sft", reward_model=init)
    key = {"reward_model": given} if given else as_flags(flags)
    if not run.begins("rm", key, {"reward_model" if given else "init": init, "data": run.folder / "data"}):
        return
    with run.stage("rm") as (folder, _, results):
        other = "take another reward model" if given else "try another --lr, or more data"
        train, validation, test = (encoded(run, text, part) for part in ("train", "validation", "test"))
        data = read_json(run.folder / "data" / MANIFEST)["flags"]["data"]
        together = {pair.id: held_together(pair.prompt, data) for pair in load_pairs(run.folder / "data", "train")}
        fold_of = np.array([stable_hash("fold", together[row.id]) % folds for row in train])
        if folds > 1 and len(set(fold_of)) == 1:
            raise DataError(f"{run.folder / 'data'}: {len(set(together.values()))} training prompts or dialogues fall into one of {folds} folds; give more, or --folds 1")
        train_on = partial(train_reward_model, run, text, flags, init, validation)
        scores = np.zeros((len(train), 2))
        for fold in sorted(set(fold_of.tolist())) if folds > 1 else ():  # of few prompts or many folds some have none
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
        if not np.isfinite(in_fold).all():
            raise NumericalError(f"rm: of {len(in_fold)} pairs {(~np.isfinite(in_fold)).any(axis=1).sum()} have a score that is not finite; " + other)
        scores = in_fold if folds == 1 else scores
        on_test = reward_scores_of_pairs(model, test, pad_id, world)
        stats = {"score_mean": float(in_fold[:, 0].mean()), "score_std": float(in_fold[:, 0].std())}
        if not stats["score_std"] > 0:
            raise NumericalError("rm: all chosen responses have the same score, so the reward model has learnt nothing; " + other)
        if stats["score_std"] < FLAT:
            run.say(f"warning: rm: the standard deviation of chosen responses' scores is {stats['score_std']:.2g} log-odds, and PPO divides by it; " + other)
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
    """Easy, difficult and dropped pairs by the gap of the rm stage's scores, or by the one that each row states."""
    flags = run.take("split", SplitFlags)
    rm = run.parent("rm")
    if flags.gaps == "given":
        check_given_gaps(run)
    if not run.begins("split", as_flags(flags), {"rm": rm}):
        return
    with run.stage("split") as (folder, _, results):
        scored = [json.loads(line) for line in (rm / "scores.jsonl").read_text().splitlines()]
        pair_of = {pair.id: pair for pair in load_pairs(run.folder / "data", "train")}
        pairs = [pair_of[row["id"]] for row in scored]
        gaps = gaps_of(pairs, {row["id"]: row["chosen"] - row["rejected"] for row in scored}, flags.gaps)
        split = split_pairs([pair.prompt for pair in pairs], gaps, flags, run.flags.seed)
        if run.world.is_main:
            write_split(folder, split, pairs, gaps, flags, {"seed": run.flags.seed, "scores": digest(rm / "scores.jsonl")})
        counts = {name: len(getattr(split, name)) for name in ("easy", "difficult", "dropped")}
        results |= counts | {"disputed": int(split.disputed.sum()), "threshold": split.threshold}
        run.say("  " + ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in results.items()))


def gaps_of(pairs: Sequence[Pair], by_reward_model: dict[str, float], source: str) -> np.ndarray:
    """What pairs of training, or of validation, are split by, by the source that --gaps names; (N,)."""
    return np.array([{"reward-model": by_reward_model[pair.id], "given": pair.gap}[source] for pair in pairs])


def check_given_gaps(run: Run) -> None:
    """Raises DataError where a pair of training or validation states no gap of its own."""
    pairs = (pair for part in ("train", "validation") for pair in load_pairs(run.folder / "data", part))
    without = next((pair.where for pair in pairs if pair.gap is None), None)
    if without:
        raise DataError(f'{without}: has no "gap", which --gaps given needs in every pair; give it, or split by the reward model\'s')


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
    one = dict.fromkeys((field.name for field in dataclasses.fields(Pairs)), torch.ones(1))
    try:
        PREFERENCE_LOSSES[name](Pairs(**one if name in READS_GAP else one | {"gap": None}), **arguments)
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
    check_vocabularies(init, ref_path)
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
            "weights": model_digest(ref_path),
            "tokenizer": text.tokenizer.digest,
            "max_prompt": text.max_prompt,
            "max_response": text.max_response,
            "dtype": str(world.dtype),
            "how": f"{world.device.type} {world.parallel}",  # in bf16 FSDP computes all in it, DDP products alone
        }
        logps = cached_logps(
            run.folder / "cache", key, [row.id for row in both],
            lambda: reference_logps(ref, both, pad_id, world), world,
        )  # fmt: skip
        ref_logps = {row.id: tuple(values) for row, values in zip(both, logps.tolist(), strict=True)}
        same_start = model_digest(init) == key["weights"]
        model = distribute(model, world)
        prompts, seed = validation_prompts(run, text, WATCHED), stable_hash(run.flags.seed, "dpo", "watch")

        def watch(numbers: dict[str, float], step: int) -> bool:
            numbers |= sampled_kl(model, ref, prompts, text, seed, world)
            passed = limit_passed(numbers, flags.max_kl, flags.max_fall)
            if passed and step < 0:
                raise UsageError(f"dpo: {passed}, before the first step: the model that it starts from is so far from the reference; raise the limit, or start nearer")
            if passed:
                run.say(f"warning: dpo: {passed}: the policy has left the reference's language; stopped. Try a larger beta or a smaller learning rate")
            return bool(passed)

        longest = max(len(row.response) for pair in train for row in (pair.chosen, pair.rejected))
        at_first = partial(check_first_preference_step, flags.loss, arguments, world, longest) if same_start else lambda numbers: None
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
    flags = SplitFlags(**{field.name: made["flags"].get(field.name, field.default) for field in dataclasses.fields(SplitFlags)})
    if flags.rule == "quantile":  # that of the training pairs
        flags = dataclasses.replace(flags, rule="threshold", threshold=made["results"]["threshold"], quantile=SplitFlags.quantile)
    pair_of = {pair.id: pair for pair in load_pairs(run.folder / "data", "validation")}
    pairs = [pair_of[row.id] for row in rows]
    split = split_pairs([pair.prompt for pair in pairs], gaps_of(pairs, gaps, flags.gaps), flags, made["flags"]["seed"], may_be_empty=True)
    found = [rows[i] for i in getattr(split, part)]
    if not found:
        run.say(f"  no validation pair is {part}; validation looks at all of them")
    return found or rows
