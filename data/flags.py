"""Command-line flags from dataclasses: each flag is declared once, beside the code that reads it.

A field `kl_coef: float = flag(0.05, "...")` becomes `--kl-coef`; with a prefix (in a chain of stages) `--ppo-kl-coef`. Booleans become
`--name` and `--no-name`. A parser knows only the flags of its stage, so an unknown one is an error.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import get_args, get_type_hints

from data.errors import Stop, UsageError


STAGE_NAMES = ". A stage alone takes its flags by their own names (--lr), a chain by the stage's (--dpo-lr)"


def flag(default, help: str, choices: tuple | None = None, positive: bool = False):
    """A dataclass field that is a flag; positive ones must be above 0."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "positive": positive})


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, as a UsageError, and which names are close to one that is not known."""

    def error(self, message: str):
        known, hint = self._option_string_actions, ""
        if "unrecognized" in message:
            like = [name for word in re.findall(r"--[\w-]+", message) for name in difflib.get_close_matches(word, known, n=2, cutoff=0.75)]
            hint = STAGE_NAMES * ("--stage" in known) + (f". Did you mean {' or '.join(like)}?" if like else "")
        raise UsageError(f"{message}; see --help{hint}")


def add_flags(parser: argparse.ArgumentParser, group, prefix: str = "") -> None:
    """Adds every field of the dataclass to the parser; one that it knows already is left as it is."""
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        name = "--" + (prefix + field.name).replace("_", "-")
        if name in parser._option_string_actions:
            continue
        kind = hints[field.name]
        if isinstance(kind, UnionType):
            kind = next(option for option in get_args(kind) if option is not type(None))
        shown = "" if field.default is None or kind is bool else f" ({field.default})"
        options = {"dest": prefix + field.name, "default": argparse.SUPPRESS, "help": (field.metadata["help"] + shown).replace("%", "%%")}
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        else:
            choices = field.metadata.get("choices")
            parser.add_argument(name, type=kind, metavar=None if choices else kind.__name__.upper(), choices=choices, **options)


def take_flags(group, given: dict, prefix: str = "", **defaults):
    """The dataclass filled from `given` (parsed flags by name), then `defaults`, then its own; raises UsageError on impossible numbers."""
    values = {}
    for field in dataclasses.fields(group):
        name = prefix + field.name
        value = given.get(name, defaults.get(field.name, field.default))
        if isinstance(value, float) and not math.isfinite(value) or field.metadata.get("positive") and value is not None and value <= 0:
            wanted = "positive finite" if field.metadata.get("positive") else "finite"
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be a {wanted} number")
        values[field.name] = value
    return group(**values)


def typed(flags: dict[str, object]) -> list[str]:
    """Flags as they are typed."""
    words = []
    for name, value in flags.items():
        words += [name if value else name.replace("--", "--no-", 1)] if isinstance(value, bool) else [name, str(value)]
    return words


@contextlib.contextmanager
def typed_names(groups: Sequence, prefix: str) -> Iterator[None]:
    """Puts the chain's prefix ("split-") before the names of these dataclasses' flags in whatever message ends the block."""
    try:
        yield
    except Stop as error:
        names = (field.name.replace("_", "-") for group in groups for field in dataclasses.fields(group))
        error.args = (re.sub(rf"--({'|'.join(sorted(names, key=len, reverse=True))})(?![\w-])", rf"--{prefix}\1", str(error)),)
        raise  # the same: a signal's has an exit code of its own
