"""What every stage shares: its run, its folder, its tokenizer, and rows of ids made with that tokenizer.

A stage asks its `Run` for flags and parents, does its work inside `with run.stage(...)`, and leaves a manifest when that ends well.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from data.batches import PairRow, Row, encode_pairs, encode_prompt, encode_response
from data.errors import CheckpointError, DataError, UsageError
from data.files import atomic_write, digest
from data.flags import flag, take_flags
from data.prepare import load_demonstrations, load_pairs
from data.run import Metrics, begin_stage, finish_stage, open_stage
from data.tokenizer import Tokenizer
from model.checkpoint import load_model, save_model
from model.parallel import World


@dataclass(frozen=True)
class RunFlags:
    out: str = flag("runs/mpo", "folder of the run")
    seed: int = flag(0, "of everything random")
    quick: bool = flag(False, "smallest budgets that still go through everything: under a minute")


@dataclass(frozen=True)
class Run:
    """One call of this program: where, with which seed, on what, and the flags that were typed."""

    folder: Path
    flags: RunFlags
    world: World
    given: dict
    chain: bool
    budgets: dict[str, dict]  # stage -> defaults that replace the flags' own

    def take(self, stage: str, group):
        """A stage's flags, from what was typed and the stage's defaults."""
        known = {field.name for field in dataclasses.fields(group)}
        budget = {name: value for name, value in self.budgets.get(stage, {}).items() if name in known}
        return take_flags(group, self.given, f"{stage}_" if self.chain else "", **budget)

    def parent(self, stage: str) -> Path:
        """Folder of a finished stage of this run; raises UsageError with the command that makes it."""
        folder = self.folder / stage
        open_stage(folder, f"python train.py --stage {stage} --out {self.folder}", (stage,))
        return folder

    @contextlib.contextmanager
    def stage(self, name: str, flags: dict, parents: dict[str, Path]) -> Iterator[tuple[Path, Metrics, dict]]:
        """A stage's folder, metrics and dict of results, which make the manifest when the block ends well."""
        folder, results, began = self.folder / name, {}, time.perf_counter()
        flags = flags | {"seed": self.flags.seed}
        if self.world.is_main:
            begin_stage(folder, flags)
            shown = " ".join(f"{key}={value}" for key, value in flags.items() if value is not None)
            print(f"\n[{name}] {shown}")
        self.world.barrier()
        yield folder, Metrics(folder / "metrics.jsonl" if self.world.is_main else None), results
        self.world.barrier()
        if self.world.is_main:
            finish_stage(folder, name, flags, parents, results)
            print(f"[{name}] made {folder} in {time.perf_counter() - began:.0f} s")
        self.world.barrier()

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text)


@dataclass(frozen=True)
class Text:
    """The run's tokenizer, its limits, and how models are saved with them."""

    tokenizer: Tokenizer
    path: Path
    max_prompt: int
    max_response: int

    def save(self, model, folder: Path, world: World, **extra) -> None:
        """Weights, config and tokenizer of a model into a stage's folder."""
        ids = {"bos_id": self.tokenizer.bos_id, "eos_id": self.tokenizer.eos_id, "pad_id": self.tokenizer.pad_id}
        save_model(model, folder, special_ids=ids, is_main=world.is_main, **extra)
        if world.is_main:
            atomic_write(Path(folder) / "tokenizer.model", self.path.read_bytes())

    def load(self, folder: Path, kind, **options):
        """A model from a folder; raises CheckpointError where it was made with another tokenizer."""
        theirs = Path(folder) / "tokenizer.model"
        if theirs.exists() and digest(theirs) != self.tokenizer.digest:
            raise CheckpointError(f"{theirs}: is not the tokenizer of this run, {self.path}; ids would mean other words")
        model = load_model(folder, kind, **options)
        if model.config.context < self.max_prompt + self.max_response:
            raise UsageError(
                f"{folder}: a context of {model.config.context} tokens is less than --max-prompt {self.max_prompt} + --max-response"
                f" {self.max_response}; make the run's data with smaller ones"
            )
        return model


def open_text(run: Run) -> Text:
    """The tokenizer of the run, and the limits that its data was made with."""
    limits = open_stage(run.folder / "data", f"python train.py --stage tokenizer --out {run.folder}")["flags"]
    path = run.parent("tokenizer") / "tokenizer.model"
    return Text(Tokenizer(path), path, limits["max_prompt"], limits["max_response"])


def encoded(run: Run, text: Text, part: str) -> list[PairRow]:
    """The pairs of a part of DIR/data as ids; says what was shortened, cut or dropped."""
    rows, counts = encode_pairs(load_pairs(run.folder / "data", part), text.tokenizer, text.max_prompt, text.max_response)
    if counts:
        run.say(f"  {part}: {len(rows)} pairs; " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))
    if not rows:
        raise DataError(f"{run.folder / 'data'}: no {part} pair fits --max-prompt {text.max_prompt}; raise it")
    return rows


def demonstration_rows(run: Run, text: Text, part: str) -> list[Row]:
    """What SFT imitates, as ids; rows whose prompt does not fit are left out."""
    rows = []
    for index, shown in enumerate(load_demonstrations(run.folder / "data", part)):
        prompt, _ = encode_prompt(shown.prompt, shown.style, text.tokenizer, text.max_prompt)
        response, _ = encode_response(shown.response, text.tokenizer, text.max_response)
        if prompt:
            rows.append(Row(f"{part}-{index}", prompt, response))
    if not rows:
        raise DataError(f"{run.folder / 'data'}: no {part} demonstration fits --max-prompt {text.max_prompt}; raise it")
    return rows


def validation_prompts(run: Run, text: Text, count: int) -> list[tuple[int, ...]]:
    """Ids of the first `count` different prompts of the validation part."""
    pairs = load_pairs(run.folder / "data", "validation")
    prompts = dict.fromkeys((pair.prompt, pair.style) for pair in pairs)
    return [ids for prompt in prompts if (ids := encode_prompt(*prompt, text.tokenizer, text.max_prompt)[0])][:count]


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())
