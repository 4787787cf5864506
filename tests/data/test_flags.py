"""Flags from dataclasses: known ones alone, with a prefix in a chain, and no impossible numbers."""

import argparse
from dataclasses import dataclass, field

import pytest

from data.errors import NumericalError, UsageError
from data.flags import Parser, add_flags, flag, take_flags, typed_names


@dataclass(frozen=True)
class Flags:
    lr: float | None = flag(None, "learning rate", positive=True)
    steps: int = flag(10, "how many", positive=True)
    penalty: float = flag(0.5, "100% of it")
    keep_all: bool = flag(False, "whether to keep")
    mode: str = flag("a", "which", choices=("a", "b"))
    plain: float = field(default=1.0, metadata={"help": "declared without flag()"})


@dataclass(frozen=True)
class OtherFlags:
    steps: int = flag(99, "the same name in another group")
    seed: int = flag(0, "of everything")


def parse(*words, prefix="", groups=(Flags,)):
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False)
    for group in groups:
        add_flags(parser, group, prefix)
    return vars(parser.parse_args(words))


def test_only_what_was_typed_is_given():
    assert parse() == {}
    assert parse("--lr", "1e-3", "--steps", "7", "--keep-all") == {"lr": 1e-3, "steps": 7, "keep_all": True}


def test_typed_beats_the_stages_default_beats_the_declared_one():
    flags = take_flags(Flags, parse("--steps", "7"), steps=20, penalty=2.0)
    assert flags == Flags(steps=7, penalty=2.0)
    assert take_flags(Flags, {}) == Flags()


def test_a_prefix_names_the_stage():
    given = parse("--ppo-steps", "7", "--no-ppo-keep-all", prefix="ppo_")
    assert given == {"ppo_steps": 7, "ppo_keep_all": False}
    assert take_flags(Flags, given, "ppo_", keep_all=True) == Flags(steps=7)
    assert take_flags(Flags, given, "dpo_") == Flags()
    with pytest.raises(UsageError, match="--ppo-steps 0: "):
        take_flags(Flags, {"ppo_steps": 0}, "ppo_")


@pytest.mark.parametrize("words", [["--unknown", "1"], ["--step", "1"], ["--ppo-steps", "1"], ["7"]])
def test_an_unknown_flag_is_an_error(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2 and f"unrecognized arguments: {words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--steps", "ten"], ["--steps", "1.5"], ["--lr", "fast"], ["--mode", "c"], ["--steps"]])
def test_a_value_of_the_wrong_kind_is_an_error_that_names_the_flag(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2 and f"argument {words[0]}: " in capsys.readouterr().err


def test_the_programs_parser_says_it_in_one_line():
    parser = Parser(prog="train.py")
    parser.add_argument("--stage")
    add_flags(parser, Flags)
    with pytest.raises(UsageError, match=r"^unrecognized arguments: --dpo-steps 1; see --help.* Did you mean --steps\?$"):
        parser.parse_args(["--dpo-steps", "1"])
    with pytest.raises(UsageError, match=r"^unrecognized arguments: --dpo-lr 1; see --help. A stage alone takes its flags by their own names"):
        parser.parse_args(["--dpo-lr", "1"])
    with pytest.raises(UsageError, match="^argument --steps: .*; see --help$"):
        parser.parse_args(["--steps", "ten"])


def test_booleans_have_two_forms():
    assert parse("--keep-all")["keep_all"] is True
    assert parse("--no-keep-all")["keep_all"] is False
    with pytest.raises(SystemExit):
        parse("--keep-all", "yes")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["lr", "penalty", "plain"])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(UsageError, match=rf"^--{name} {value}: must be a .*finite number"):
        take_flags(Flags, parse(f"--{name}={value}"))


@pytest.mark.parametrize(("name", "value"), [("lr", "0"), ("lr", "-1e-3"), ("steps", "0"), ("steps", "-5")])
def test_what_must_be_positive_is(name, value):
    with pytest.raises(UsageError, match=rf"^--{name} -?[\d.]+: must be a positive finite number") as stopped:
        take_flags(Flags, parse(f"--{name}={value}"))
    assert stopped.value.code == 2


def test_other_numbers_may_be_negative_or_zero():
    assert take_flags(Flags, parse("--penalty", "-1")).penalty == -1
    assert take_flags(Flags, parse("--penalty", "0")).penalty == 0


def test_a_flag_that_two_groups_share_is_declared_once():
    given = parse("--steps", "7", "--seed", "3", groups=(Flags, OtherFlags))
    assert (take_flags(Flags, given).steps, take_flags(OtherFlags, given)) == (7, OtherFlags(7, 3))


def test_help_has_a_line_and_the_default_of_every_flag():
    parser = argparse.ArgumentParser(prog="train.py")
    add_flags(parser, Flags)
    text = " ".join(parser.format_help().split())
    assert "--steps INT how many (10)" in text and "100% of it (0.5)" in text
    assert "--keep-all, --no-keep-all" in text and "SUPPRESS" not in text


@pytest.mark.parametrize("kind", [UsageError, NumericalError])
def test_a_message_has_the_names_that_were_typed(kind):
    """Those of the given groups, whole, and not twice; whatever sort of failure it is."""
    error = kind("--lr 3: try --keep-all, --no-keep-all or a larger --seed; not --lrs, --lr-peak, --dpo-lr; python train.py --stage dpo --out x")
    error.code = 143
    with pytest.raises(kind) as stopped, typed_names((Flags, OtherFlags), "dpo-"):
        raise error
    assert stopped.value.code == 143
    assert str(stopped.value) == (
        "--dpo-lr 3: try --dpo-keep-all, --no-keep-all or a larger --dpo-seed; not --lrs, --lr-peak, --dpo-lr; python train.py --stage dpo --out x"
    )
