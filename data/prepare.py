"""The run's data: from a spec to training, validation and test pairs in `DIR/data`, made once and read by every stage.

A built-in world is first written to disk in its real file format and then read like any other file. The test part is given by
--test-data (worlds bring one) or held out by the hash of how the prompt's dialogue begins, as is the validation part; so a prompt is always in one
part, and of files so is all of its dialogue.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, UsageError
from data.examples import FORMATS, TEMPLATES, Demonstration, Pair, is_held_out, opening, paths_of, read_demonstrations, read_pairs
from data.files import atomic_write
from data.flags import flag
from data.run import begin_stage, command_for, finish_stage, locked, open_stage
from data.synthetic import WORLDS, write_world

FORMAT_OF = {"advice": "hh", "digest": "tldr"}  # whose format a built-in world's files have


@dataclass(frozen=True)
class DataFlags:
    data: str | None = flag(None, "advice, digest, hh:PATH[,PATH], tldr:PATH or jsonl:PATH (default: advice)")
    test_data: str | None = flag(None, "pairs to test on, a spec like --data (default: a share of --data by hash of the prompt)")
    demonstrations: str | None = flag(None, "what SFT imitates, jsonl:PATH with prompt and response (default: the chosen responses)")
    template: str | None = flag(None, "put prompts of jsonl:PATH into this form (default: as they are)", choices=tuple(TEMPLATES))
    test_share: float = flag(0.1, "of the prompts, whole dialogues at a time, where --test-data is not given")
    validation_share: float = flag(0.1, "of the remaining prompts, of files whole dialogues at a time")
    max_prompt: int = flag(160, "tokens; longer prompts are shortened (dialogues keep their end, posts lose theirs)", positive=True)
    max_response: int = flag(64, "tokens; longer responses are cut, and then have no end token", positive=True)
    max_pairs: int | None = flag(None, "read only the first so many usable pairs of --data", positive=True)
    skip_bad_rows: int = flag(0, "so many unreadable rows are left out before the run stops")
    strict: bool = flag(False, "stop where a test prompt, or its dialogue, is also in training, in place of removing it there")


@dataclass(frozen=True)
class WorldFlags:
    pairs: int = flag(11_000, "training pairs of a built-in world", positive=True)
    test_prompts: int = flag(500, "test prompts of a built-in world", positive=True)
    label_temperature: float = flag(1.0, "of the Bradley-Terry labels of a built-in world: higher is noisier", positive=True)
    flip_rate: float = flag(0.0, "share of a built-in world's labels that is turned round")
    annotator_bias: float = flag(0.0, "how much a built-in world's annotator cares for what the true reward does not")


def check_data_flags(flags: DataFlags, given: dict) -> None:
    """Raises UsageError for flags about a world's making beside files, and the other way round."""
    if flags.data in WORLDS:
        unread, reason = {"template", "test_share"}, "a built-in world brings its own prompts and test part"
        unread |= {"test_prompts"} if flags.test_data else set() if flags.demonstrations else {"skip_bad_rows"}
    else:
        unread = {field.name for field in dataclasses.fields(WorldFlags)} | ({"test_share"} if flags.test_data else set())
        reason = "is about the built-in worlds, or --test-data takes its place"
    for name in sorted(unread & set(given)):
        raise UsageError(f"--{name.replace('_', '-')} {given[name]}: has no effect with --data {flags.data}: {reason}; leave it out")


def prepare_data(
    folder: Path, flags: DataFlags, world_flags: WorldFlags, given: Sequence[str], seed: int, resume: bool = False, quick: bool = False
) -> None:
    """Makes `folder` (DIR/data), or checks that it was made with the same flags; `given`: names of the flags that the user typed;
    resume: data that a stopped run left half-made is made anew; quick: the flags' defaults are those of --quick.

    Raises UsageError where a flag differs from the one the data was made with, DataError for rows (data/examples.py) and empty parts.
    """
    described = dataclasses.asdict(flags) | dataclasses.asdict(world_flags) | {"seed": seed}
    if (folder / "manifest.json").exists():
        made_with = open_stage(folder, command_for("tokenizer", folder.parent))["flags"]
        if made_with.get("quick") and not quick:
            raise UsageError(f"{folder}: was made under --quick, which leaves most rows out; choose another --out, or add --quick")
        for name in given:
            if name in described and made_with[name] != described[name]:
                raise UsageError(
                    f"--{name.replace('_', '-')} {described[name]}: {folder} was made with {made_with[name]}; leave the flag out, or"
                    " choose another --out"
                )
        return
    if not (0 < flags.test_share < 1 and 0 < flags.validation_share < 1):
        raise UsageError(f"--test-share {flags.test_share}, --validation-share {flags.validation_share}: both must lie between 0 and 1")
    if not 0 <= world_flags.flip_rate <= 1:
        raise UsageError(f"--flip-rate {world_flags.flip_rate}: must lie within 0 and 1")
    if flags.skip_bad_rows < 0:
        raise UsageError(f"--skip-bad-rows {flags.skip_bad_rows}: must be 0 or more")
    for spec in (flags.data, flags.test_data, flags.demonstrations):
        if spec and spec not in WORLDS:
            paths_of(spec)  # what cannot be read stops the run before a world is made
    with locked(folder):
        begin_stage(folder, described | {"quick": quick}, {}, resume)
        try:
            make_data(folder, flags, world_flags, seed)
        except (UsageError, DataError):
            shutil.rmtree(folder)  # nothing of value is in it, and the corrected command can simply be run
            raise


def make_data(folder: Path, flags: DataFlags, world_flags: WorldFlags, seed: int) -> None:
    """Fills `folder`, in which nothing stands yet; says how many rows there are and why others were left out."""
    spec, test_spec = flags.data, flags.test_data
    if spec in WORLDS:
        options = dataclasses.asdict(world_flags)
        write_world(spec, folder / "world", seed=seed, **options)
        form = FORMAT_OF[spec]
        spec, test_spec = f"{form}:{folder / 'world' / 'train.jsonl'}", test_spec or f"{form}:{folder / 'world' / 'test.jsonl'}"
    pairs, left_out = read_pairs(spec, skip_bad_rows=flags.skip_bad_rows, rejects=folder / "rejects.jsonl", template=template_of(spec, flags))
    pairs = pairs[: flags.max_pairs]
    if test_spec:
        test, of_test = read_pairs(test_spec, skip_bad_rows=flags.skip_bad_rows, rejects=folder / "test-rejects.jsonl", template=template_of(test_spec, flags))
        pairs, shared = without_shared_prompts(pairs, test, flags)
    else:
        test, shared, of_test = [p for p in pairs if is_held_out(held_together(p.prompt, flags.data), flags.test_share)], 0, {}
        pairs = [p for p in pairs if not is_held_out(held_together(p.prompt, flags.data), flags.test_share)]
    parts = {
        "train": [p for p in pairs if not for_validation(p.prompt, flags)],
        "validation": [p for p in pairs if for_validation(p.prompt, flags)],
        "test": test,
    }
    counts = {part: len(rows) for part, rows in parts.items()}
    if not all(counts.values()):
        raise DataError(
            f"{flags.data}: too few rows for three parts ({counts}), to which whole prompts go by their hash; left out:"
            f" {left_out | ({'prompt is in the test data': shared} if shared else {})}; give more prompts (a run's data/train.jsonl is one part, by the"
            " same hashes, and has no others)"
        )
    for part, rows in parts.items():
        atomic_write(folder / f"{part}.jsonl", "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    of_demonstrations = write_demonstrations(folder, flags, {held_together(pair.prompt, flags.data) for pair in test}) if flags.demonstrations else {}
    sources = {"": left_out, " of --test-data": of_test, " of --demonstrations": of_demonstrations}
    reasons = "".join(f"; {count}{source} left out: {reason}" for source, found in sources.items() for reason, count in found.items())
    print(f"[data] {', '.join(f'{count} {part}' for part, count in counts.items())} pairs{reasons}")
    results = {"pairs": counts, "left_out": left_out, "left_out_of_test_data": of_test, "left_out_of_demonstrations": of_demonstrations}
    finish_stage(folder, "data", results | {"shared_with_test": shared})


def without_shared_prompts(pairs: list[Pair], test: list[Pair], flags: DataFlags) -> tuple[list[Pair], int]:
    """The training pairs whose prompt, or dialogue, is none of the test pairs', and how many were; raises DataError about them under --strict."""
    tested = {held_together(pair.prompt, flags.data) for pair in test}
    shared = [pair for pair in pairs if held_together(pair.prompt, flags.data) in tested]
    if shared:
        found = f"{shared[0].where}: this prompt, or one that begins its dialogue or goes on from it, is also in the test data"
        if flags.strict:
            raise DataError(f"{found}, as are those of {len(shared)} training pairs in all; remove them, or leave out --strict")
        print(f"warning: {found}; {len(shared)} such training pairs are left out")
    return [pair for pair in pairs if held_together(pair.prompt, flags.data) not in tested], len(shared)


def held_together(prompt: str, data: str) -> str:
    """What decides on the part that a prompt belongs to: how its dialogue begins, so that none goes on from one part into another; in a
    built-in world, where dialogues that begin alike have nothing else in common, the prompt itself. data: the run's --data."""
    return prompt if data in WORLDS else opening(prompt)


def for_validation(prompt: str, flags: DataFlags) -> bool:
    """Whether a prompt of training is held out to validate on."""
    return is_held_out(held_together(prompt, flags.data), flags.validation_share, "validation")


def write_demonstrations(folder: Path, flags: DataFlags, tested: set[str]) -> dict[str, int]:
    """Reads --demonstrations, leaves out those of `tested` prompts or dialogues (`held_together`), and writes training and validation part; reason -> number of rows left out."""
    rejects = folder / "demonstration-rejects.jsonl"
    template = template_of(flags.demonstrations, flags)
    read, left_out = read_demonstrations(flags.demonstrations, skip_bad_rows=flags.skip_bad_rows, rejects=rejects, template=template)
    rows = [row for row in read if held_together(row.prompt, flags.data) not in tested]
    if len(rows) < len(read):
        left_out["test prompt"] = len(read) - len(rows)
    for part, wanted in (("train", False), ("validation", True)):
        chosen = [row for row in rows if for_validation(row.prompt, flags) == wanted]
        if not chosen:
            raise DataError(f"{flags.demonstrations}: no row for the {part} part; give more demonstrations")
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in chosen)
        atomic_write(folder / f"demonstrations-{part}.jsonl", lines)
    return left_out


def form_of(flags: dict) -> str | None:
    """The one of TEMPLATES that all prompts of a run have: that of its world or format, or its --template. flags: of its data's manifest."""
    style = FORMATS[FORMAT_OF.get(flags["data"], flags["data"].partition(":")[0])]["style"]
    return next((name for name, (_, made) in TEMPLATES.items() if made == style != "plain"), flags["template"])


def template_of(spec: str, flags: DataFlags) -> str | None:
    """What the rows of a spec are put into: plain ones get the run's form, others have one."""
    return form_of(dataclasses.asdict(flags)) if spec.startswith("jsonl:") else flags.template


def load_pairs(folder: Path, part: str) -> list[Pair]:
    """The pairs of a part ("train", "validation" or "test") of DIR/data."""
    return [Pair(**json.loads(line)) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def load_demonstrations(folder: Path, part: str) -> list[Demonstration]:
    """What SFT imitates: the demonstrations' part where a file of them was given, else prompt and chosen response of each pair, once."""
    path = folder / f"demonstrations-{part}.jsonl"
    if path.exists():
        return [Demonstration(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [Demonstration(p.prompt, p.chosen, p.style, p.where) for p in load_pairs(folder, part)]
    return list({(row.prompt, row.response): row for row in rows}.values())
