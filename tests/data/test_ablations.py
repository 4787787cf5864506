"""The grid's table: every row can be reached, and says what it differs in."""

import pytest

from data.ablations import CLAIMS, CORE, ROWS, Row, base_flags, chosen_rows, is_ppo, stage_flags
from data.errors import UsageError
from train import build_parser


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_flags_of_the_chain_and_a_start_that_exists(name, capsys):
    row = ROWS[name]
    words = [str(word) for flag, value in row.flags.items() if flag != "--best-of" for word in (flag, value)]  # that one is eval.py's
    build_parser("mpo").parse_args(words)  # ends the program where a flag or a choice is not known
    assert chosen_rows(name)[-1] == name  # and the ways to it end
    assert not any(flag in row.flags for flag in ("--out", "--seed"))
    if not is_ppo(name):
        assert not any(flag.startswith("--ppo-") for flag in row.flags)


def test_no_two_rows_are_the_same():
    described = {name: (tuple(sorted((base_flags(name) | row.flags).items())), row.start) for name, row in ROWS.items()}
    assert len(set(described.values())) == len(described)


def test_starts_come_first_and_once():
    assert chosen_rows("mpo,dpo-easy,mpo-sft-ref") == ["dpo-easy", "mpo", "mpo-sft-ref"]
    assert chosen_rows("core") == list(dict.fromkeys(chosen_rows(",".join(CORE))))
    assert set(CORE) == set(chosen_rows("core"))
    assert chosen_rows("ppo-again") == ["ppo-all", "ppo-again"]


def test_an_unknown_row_is_named():
    with pytest.raises(UsageError, match="--only mpo2: no such row or group; did you mean mpo"):
        chosen_rows("mpo,mpo2")
    with pytest.raises(UsageError, match="did you mean mpo@split-quantile-0.25 or"):
        chosen_rows("mpo@quantile-0.25")
    with pytest.raises(UsageError, match="groups are core, threshold"):
        chosen_rows("nothing-like-it")


def test_what_a_row_shares_follows_from_the_row_it_starts_from():
    assert base_flags("mpo@flip-rate-0.2") == {"--flip-rate": 0.2} == base_flags("dpo-easy@flip-rate-0.2")
    assert base_flags("mpo@rm-folds-1") == {"--rm-folds": 1}
    assert base_flags("mpo@split-quantile-0.25") == {} and ROWS["mpo@split-quantile-0.25"].start == "dpo-easy@split-quantile-0.25"
    assert base_flags("mpo@plenty-flipped") == {"--flip-rate": 0.2, "--pairs": 20_000}


def test_a_row_of_other_data_than_its_start_is_refused(monkeypatch):
    monkeypatch.setitem(ROWS, "mpo@mixed", Row({"--flip-rate": 0.2}, "dpo-easy"))
    with pytest.raises(ValueError, match="row mpo@mixed: --flip-rate: the row that it starts from, dpo-easy, must have the same"):
        base_flags("mpo@mixed")
    assert [base_flags(name) for name in ROWS if name != "mpo@mixed"]  # and no row is such a one


def test_rows_end_with_dpo_or_ppo():
    assert [name for name in CORE if not is_ppo(name)] == ["dpo-all", "dpo-easy", "dpo-difficult", "dpo-random", "dpo-blind", "chosen-easy"]


def test_a_stage_run_alone_has_its_own_names():
    assert stage_flags({"--dpo-lr": 1, "--ppo-lr": 2, "--pairs": 3}, "dpo") == {"--lr": 1}


def test_claims_compare_rows_that_there_are():
    assert {name for pairs in CLAIMS.values() for pair in pairs for name in pair} <= set(ROWS)
