"""What every stage shares: its run, its folder, its tokenizer, and rows of ids made with that tokenizer.

A stage asks its `Run` for flags and parents and whether it has to run, works inside `with run.stage(...)`, and leaves a manifest when that
ends well.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from data.batches import PairRow, Row, encode_pairs, encode_prompt, encode_response
from data.errors import CheckpointError, DataError, UsageError
from data.files import INDEX, atomic_write, copy_whole, digest, read_json, weight_files, write_json
from data.flags import flag, take_flags
from data.prepare import DataFlags, WorldFlags, load_demonstrations, load_pairs
from data.report import profile_text
from data.run import FLAGS, MANIFEST, METRICS, Metrics, begin_stage, code_version, command_for, finish_stage, lock_of, locked, open_stage
from data.split import read_split
from data.tokenizer import Tokenizer, tokenizer_file
from model.checkpoint import CONFIG, open_model, save_model
from model.optim import BY_SIZE
from model.parallel import DeviceFlags, World, bar_if_slow
from model.resume import LoopFlags, Saving
from model.transformer import ModelConfig

ABOUT_DATA = {"quick", *(field.name for group in (DataFlags, WorldFlags) for field in dataclasses.fields(group))}


@dataclass(frozen=True)
class RunFlags:
    out: str = flag("runs/mpo", "folder of the run")
    seed: int = flag(0, "of everything random; where the data is there already, the run has its seed")
    quick: bool = flag(False, "smallest budgets that still go through everything")
    resume: bool = flag(False, "go on with the run that was stopped in --out, as if it had not been")


@dataclass(frozen=True)
class Run:
    """One call of this program: where, with which seed, on what, and the flags that were typed."""

    folder: Path
    flags: RunFlags
    world: World
    given: dict
    chain: bool
    budgets: dict[str, dict]  # stage -> defaults that replace the flags' own
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)  # the lock on the stage at work

    def take(self, stage: str, group):
        """A stage's flags, from what was typed and the stage's defaults."""
        known = {field.name for field in dataclasses.fields(group)}
        budget = {name: value for name, value in self.budgets.get(stage, {}).items() if name in known}
        return take_flags(group, self.given, f"{stage}_" if self.chain else "", **budget)

    def parent(self, stage: str, given: str | None = None) -> Path:
        """Folder of a finished stage of this run; raises UsageError with the command that makes it.

        given: a folder that a flag names in its place. It may come from elsewhere, but must not be a stage of ours that stopped half-way.
        """
        if not given:
            folder = self.folder / stage
            open_stage(folder, self.command(stage), (stage,))
        elif (folder := Path(given)) and ((folder / MANIFEST).exists() or (folder / FLAGS).exists()):
            open_stage(folder, command_for(folder.name, folder.parent))
        return folder

    def command(self, stage: str) -> str:
        """What makes a stage of this run, with what was typed about data."""
        return command_for(stage, self.folder, {"--" + name.replace("_", "-"): value for name, value in self.given.items() if name in ABOUT_DATA and value is not False})

    def begins(self, name: str, flags: dict, parents: dict[str, Path]) -> bool:
        """Whether a stage has to run: its folder is made, or gone on with, and locked, and its flags are shown; or it is finished with the
        same key, and that is said."""
        typed = {flag.removeprefix(f"{name}_") if self.chain else flag for flag in self.given}
        untyped = {flag for flag in flags if flag not in typed and not flag.endswith("_digest")}
        folder, flags = self.folder / name, flags | {"seed": self.flags.seed}
        if name in BY_SIZE:  # its network computes in this
            flags |= {"dtype": take_flags(DeviceFlags, self.given).dtype}
        finished = False
        with contextlib.ExitStack() as lock:
            if self.world.is_main:
                if self.flags.resume and not self.chain and not (folder.is_dir() and any(folder.iterdir())):
                    raise UsageError(f"--resume: there is nothing in {folder} to go on with; leave the flag out")
                if not (folder / MANIFEST).exists() or lock_of(folder).exists():  # a finished run may lie where nothing can be written
                    lock.enter_context(locked(folder))
                finished = not begin_stage(folder, flags, parents, self.flags.resume, untyped)
            self.held.push(lock.pop_all())
        finished = self.world.any(finished)
        if finished:
            other = read_json(folder / MANIFEST)["versions"]["code"] != code_version()
            by_other = ", by another version of this code; to make it with this one, remove it" if other else ""
            self.say(f"\n[{name}] is finished already, in {folder}{by_other}")
        else:
            self.say(f"\n[{name}] " + " ".join(f"{key}={value}" for key, value in flags.items() if value is not None))
        return not finished

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[tuple[Path, Metrics, dict]]:
        """A stage's folder, metrics and dict of results, which make the manifest when the block ends well."""
        folder, results, began = self.folder / name, {}, time.perf_counter()
        with self.held:
            try:
                with Metrics(folder / METRICS if self.world.is_main else None) as metrics:
                    yield folder, metrics, results
            except Exception:  # of a loss that is being written, too
                if self.world.is_main:
                    leave_no_trace(folder)
                raise
            self.world.barrier()
            if results.get("step") == -1:
                self.say(f"warning: {name}: no validation was better than the first, so these are the weights that it started from")
            if self.world.is_main:
                finish_stage(folder, name, results)
                if take_flags(LoopFlags, self.given).profile and (logs := sorted(folder.rglob(METRICS))):
                    print(profile_text([[json.loads(line) for line in log.read_text().splitlines()] for log in logs]), end="")
        self.say(f"[{name}] made {folder} in {time.perf_counter() - began:.0f} s")
        self.world.barrier()

    def saving(self, folder: Path, text: "Text", every: int = 100) -> Saving:
        """How a training loop in `folder` saves itself; every: steps between checkpoints where the flag does not say."""
        flags = take_flags(LoopFlags, self.given)
        every = every if flags.save_every is None else flags.save_every
        return Saving(folder, self.world, every, flags.keep, self.folder / "failures", text.describe)

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text)


def leave_no_trace(folder: Path) -> None:
    """Removes a stage's folder in which nothing was made yet, so that the corrected command can simply be run."""
    if folder.exists() and not any(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != FLAGS):
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Text:
    """The run's tokenizer, its limits, and how models are saved with them."""

    tokenizer: Tokenizer
    path: Path
    max_prompt: int
    max_response: int

    def save(self, model: nn.Module, folder: Path, world: World, snapshot: str = "", **extra) -> None:
        """Weights, config and tokenizer of a model into a stage's folder, or into a snapshot's folder there."""
        folder = Path(folder) / snapshot
        ids = {"bos_id": self.tokenizer.bos_id, "eos_id": self.tokenizer.eos_id, "pad_id": self.tokenizer.pad_id}
        save_model(model, folder, special_ids=ids, is_main=world.is_main, **extra)
        if world.is_main:
            self.save_tokenizer(folder)

    def save_tokenizer(self, folder: Path) -> None:
        """The run's tokenizer beside a model, as this program and transformers read it."""
        atomic_write(folder / "tokenizer.model", self.path.read_bytes())
        write_json(folder / "tokenizer_config.json", self.tokenizer.transformers_config())

    def copy_model(self, source: Path, folder: Path) -> None:
        """The files of a model, byte for byte, into a stage's folder; the tokenizer's are written as for every other stage."""
        weights = weight_files(source)
        for path in [source / CONFIG, *weights, *([source / INDEX] if len(weights) > 1 else [])]:
            copy_whole(path, folder / path.name)
        self.save_tokenizer(folder)

    def describe(self, row: Row | PairRow) -> dict[str, str]:
        """A row's id and texts, for people."""
        if isinstance(row, PairRow):
            texts = {"prompt": row.chosen.prompt, "chosen": row.chosen.response, "rejected": row.rejected.response}
        else:
            texts = {"prompt": row.prompt, "response": row.response}
        return {"id": row.id} | {name: self.tokenizer.decode(list(ids)) for name, ids in texts.items()}

    def load(self, folder: Path, kind, **options):
        """A model from a folder, opened but not read (`distribute` does that); raises CheckpointError where its tokenizer is another."""
        theirs = tokenizer_file(folder)
        if digest(theirs) != self.tokenizer.digest:
            raise CheckpointError(f"{theirs}: is not the tokenizer of this run, {self.path}; ids would mean other words")
        ends = read_json(Path(folder) / CONFIG).get("eos_token_id")
        if ends is not None and self.tokenizer.eos_id not in (ends if isinstance(ends, list) else [ends]):
            raise CheckpointError(
                f"{Path(folder) / CONFIG}: eos_token_id is {ends}, and this tokenizer's end token {self.tokenizer.eos_id}; an end token that was"
                " added to a tokenizer is not supported, start from a model without one"
            )
        model = open_model(folder, kind, **options)
        if model.config.vocab_size < self.tokenizer.vocab_size:
            raise CheckpointError(f"{folder}: vocab_size {model.config.vocab_size} is less than the {self.tokenizer.vocab_size} pieces of {theirs}")
        check_context(folder, model.config, self.max_prompt, self.max_response)
        return model


def check_context(folder: Path, config: ModelConfig, max_prompt: int, max_response: int) -> None:
    """Raises UsageError where a model cannot read as many tokens as the limits allow."""
    if config.context < max_prompt + max_response:
        raise UsageError(
            f"{folder}: a context of {config.context} tokens is less than --max-prompt {max_prompt} + --max-response {max_response}; make the run's"
            " data with smaller ones"
        )


def check_vocabularies(policy: Path, ref: Path | None = None, reward_model: Path | None = None) -> None:
    """Raises CheckpointError where a reference's distribution is over more or fewer ids than the policy's, or the policy has ids that the
    reward model cannot read. Published models with one tokenizer differ in rows that stand for no piece of it."""
    rows = {folder: read_json(folder / CONFIG)["vocab_size"] for folder in (policy, ref, reward_model) if folder}
    for folder in filter(None, (ref, reward_model)):
        if rows[folder] < rows[policy] or folder == ref and rows[folder] > rows[policy]:
            raise CheckpointError(f"{folder}: vocab_size is {rows[folder]}, that of {policy} {rows[policy]}; take models of one vocab_size")


def open_text(run: Run) -> Text:
    """The tokenizer of the run, and the limits that its data was made with."""
    limits = open_stage(run.folder / "data", run.command("tokenizer"))["flags"]
    path = run.parent("tokenizer") / "tokenizer.model"
    return Text(Tokenizer(path), path, limits["max_prompt"], limits["max_response"])


def encoded(run: Run, text: Text, part: str) -> list[PairRow]:
    """The pairs of a part of DIR/data as ids; says what was shortened, cut or dropped."""
    pairs = bar_if_slow(load_pairs(run.folder / "data", part), f"{part} pairs to ids", run.world)
    rows, counts = encode_pairs(pairs, text.tokenizer, text.max_prompt, text.max_response)
    say_counts(run, f"{part}: {len(rows)} pairs", counts)
    if not rows:
        raise DataError(f"{run.folder / 'data'}: no {part} pair fits --max-prompt {text.max_prompt}; raise it")
    return rows


def say_counts(run: Run, what: str, counts: Counter) -> None:
    """Says how many rows were shortened, cut or dropped, where any were."""
    if counts:
        run.say(f"  {what}; " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))


def demonstration_rows(run: Run, text: Text, part: str) -> list[Row]:
    """What SFT imitates, as ids; rows whose prompt does not fit are left out. Says what was shortened, cut or dropped."""
    rows, counts = [], Counter()
    for index, shown in enumerate(bar_if_slow(load_demonstrations(run.folder / "data", part), f"{part} texts to ids", run.world)):
        prompt, shortened = encode_prompt(shown.prompt, shown.style, text.tokenizer, text.max_prompt)
        response, cut = encode_response(shown.response, text.tokenizer, text.max_response)
        if not prompt:
            counts["dropped: prompt does not fit"] += 1
            continue
        counts["prompts shortened"] += shortened
        counts["responses cut"] += cut
        rows.append(Row(f"{part}-{index}", prompt, response))
    say_counts(run, f"{part}: {len(rows)} demonstrations", +counts)
    if not rows:
        raise DataError(f"{run.folder / 'data'}: no {part} demonstration fits --max-prompt {text.max_prompt}; raise it")
    return rows


def validation_prompts(run: Run, text: Text, count: int) -> list[tuple[int, ...]]:
    """Ids of the first `count` different prompts of the validation part, or one for each process; raises DataError where some would go without."""
    pairs = load_pairs(run.folder / "data", "validation")
    prompts = dict.fromkeys((pair.prompt, pair.style) for pair in pairs)
    fitting = [ids for prompt in prompts if (ids := encode_prompt(*prompt, text.tokenizer, text.max_prompt)[0])]
    if len(fitting) < run.world.size:
        raise DataError(f"{run.folder / 'data'}: {len(fitting)} validation prompts for {run.world.size} processes; raise --validation-share")
    return fitting[: max(count, run.world.size)]


def part_ids(run: Run, part: str) -> set[str] | None:
    """Ids of the split's part; None for all pairs, which need no split."""
    return None if part == "all" else set(read_split(run.parent("split"))[part])
