"""`train.py --stage ablations` on tiny budgets: what is shared, what a line says, going on after a stop, and rows that fail."""

import json
import math
import shutil
import sys
import threading
from pathlib import Path

import pytest
from runs import TINY, WORLD, command, here

from data import grid
from data.ablations import Row
from data.errors import CheckpointError, UsageError
from data.run import locked
from data.synthetic import true_reward
from train import build_parser, defaults

ROWS = ("dpo-easy", "best-of-n", "mpo")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(line):
    return {key: value for key, value in line.items() if key != "time"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, output) of a grid of two rows, one of which starts from the other, and one without training."""
    folder = tmp_path_factory.mktemp("grid") / "grid"
    return folder, command("--stage", "ablations", "--out", folder, "--only", "mpo,best-of-n", "--seeds", 1, *WORLD, *TINY)


def test_a_line_per_row_with_all_that_is_reported(made):
    folder, _ = made
    found = {line["row"]: line for line in lines(folder / "rows.jsonl")}
    assert tuple(found) == ROWS
    best_of = found.pop("best-of-n")
    assert [point["kl_sft"] for point in best_of["points"].values()] == pytest.approx([math.log(n) - (n - 1) / n for n in (2, 4, 8, 16)])
    scores = [best_of["marks"]["sft"]["score_raw"], *(point["score_raw"] for point in best_of["points"].values())]
    assert scores == sorted(scores) and scores[0] < scores[-1]  # of more answers the best is better
    assert best_of["picked"]["best"] == best_of["picked"]["last"] == "best-of-16" and best_of["course"] == []
    for name, line in found.items():
        stage = "ppo" if name == "mpo" else "dpo"
        assert line["picked"]["best"] == stage and line["picked"]["last"] == max(line["points"])
        assert set(line["picked"]) == {"best", "last", "judge", "true"} and len(line["points"]) > 1
        for point in line["points"].values():
            assert {"true_reward", "score_raw", "wins_against_chosen", "wins_against_sft", "kl_sft", "kl_ref", "well_formed", "chosen_shift",
                    "true_reward_by_kind", "tokens", "ended", "online_samples", "dpo_pairs"} <= set(point)  # fmt: skip
        assert line["course"][0]["step"] == -1 and "valid_kl_ref_seq" in line["course"][-1]
        assert {"sft", "chosen", "best"} == set(line["marks"]) and line["prompts"] == 20
        assert str(folder) not in json.dumps(line)  # a line means the same on any machine
    last = found["mpo"]["points"][found["mpo"]["picked"]["last"]]
    assert last["online_samples"] == 2 * 8
    assert last["dpo_pairs"] == found["dpo-easy"]["points"]["dpo"]["dpo_pairs"]  # where its start was trained on


def test_rows_share_all_stages_but_their_own(made):
    folder, _ = made
    base, dpo, mpo = (next((folder / "runs").glob(f"{name}-1-*")) for name in ("base", "dpo-easy", "mpo"))
    assert {path.name for path in dpo.iterdir() if path.is_symlink()} == {"data", "tokenizer", "sft", "rm", "split", "cache"}
    assert (mpo / "start").resolve() == (dpo / "dpo").resolve() and (mpo / "sft").resolve() == (base / "sft").resolve()
    parents = json.loads((mpo / "ppo" / "manifest.json").read_text())["parents"]
    assert {parents["init"]["path"], parents["ref"]["path"]} == {"start"}
    judge = json.loads((base / "judge" / "data" / "manifest.json").read_text())
    assert judge["flags"]["seed"] != json.loads((base / "data" / "manifest.json").read_text())["flags"]["seed"]
    pairs = [{(row["prompt"], row["chosen"], row["rejected"]) for row in lines(run / "data" / "train.jsonl")} for run in (base, base / "judge")]
    assert len(pairs[0] & pairs[1]) <= 0.02 * len(pairs[0])  # other draws of the same world


def test_only_the_missing_row_is_run_again_and_says_the_same(made, tmp_path):
    """Killed within the second row's PPO, and gone on with other --jobs."""
    folder = shutil.copytree(made[0], tmp_path / "grid", symlinks=True)
    before = lines(folder / "rows.jsonl")
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before[:2]))
    killed = next((folder / "runs").glob("mpo-1-*"))
    for gone in (killed / "ppo" / "manifest.json", killed / "made.json"):
        gone.unlink()
    output = command("--stage", "ablations", "--out", folder, "--only", "mpo,best-of-n", "--seeds", 1, "--jobs", 2, *WORLD, *TINY)
    assert "3 rows, 2 of them finished already, in" in output
    assert "mpo, seed 1: started" in output and "dpo-easy, seed 1: started" not in output and "what rows share" not in output
    after = lines(folder / "rows.jsonl")
    assert list(map(timeless, after)) == list(map(timeless, before))


@pytest.mark.slow
def test_a_row_made_again_from_its_data_on_is_the_same(made, tmp_path):
    command("--stage", "ablations", "--out", tmp_path / "again", "--only", "dpo-easy", "--seeds", 1, *WORLD, *TINY)
    assert timeless(*lines(tmp_path / "again" / "rows.jsonl")) == timeless(lines(made[0] / "rows.jsonl")[0])


def test_no_process_waits_for_what_it_does_not_need(tmp_path, monkeypatch):
    """Two at once: while the second seed's base is made, the first seed's rows are."""
    order, first_seed_is_made = [], threading.Event()

    def make_base(asked, name, seed):
        assert seed == 1 or first_seed_is_made.wait(30)
        order.append(("base", seed))

    def make_row(asked, name, seed):
        order.append((name, seed))
        if (name, seed) == ("mpo", 1):
            first_seed_is_made.set()

    described = dict.fromkeys(("key", "row", "seed", "made_with", "points"))
    for name, function in (("make_base", make_base), ("make_row", make_row), ("measured", lambda *row: described | {"time": {"train": 0, "eval": 0}})):
        monkeypatch.setattr(grid, name, function)
    asked = grid.Grid(tmp_path, tmp_path / "rows.jsonl", {"--data": "advice"}, None, {})
    assert grid.run_tasks(asked, [("mpo", 1), ("mpo", 2)], 2) == []
    assert order == [(name, seed) for seed in (1, 2) for name in ("base", "dpo-easy", "mpo")]
    assert len(lines(tmp_path / "rows.jsonl")) == 2


def test_a_finished_grid_runs_nothing_and_needs_no_folders(made, tmp_path):
    rows, (first, *rest) = tmp_path / "committed.jsonl", lines(made[0] / "rows.jsonl")
    rows.write_text("".join(json.dumps(line) + "\n" for line in (first | {"code": "0123"}, *rest)))
    output = here("--stage", "ablations", "--out", tmp_path / "elsewhere", "--rows", rows, "--only", "mpo", "--seeds", 1, *WORLD, *TINY)
    assert "2 rows, 2 of them finished already (1 by other versions of this code)" in output and not (tmp_path / "elsewhere").exists()


def test_a_row_made_with_another_default_is_not_taken_for_todays(made, tmp_path):
    rows = tmp_path / "rows.jsonl"
    found = {line["row"]: line for line in lines(made[0] / "rows.jsonl")}
    assert found["mpo"]["defaults"]["--ppo-critic"] == "separate" and not any(flag.startswith("--ppo") for flag in found["dpo-easy"]["defaults"])
    assert found["mpo"]["defaults"]["--dpo-beta of dpo"] == 1.0 and found["mpo"]["defaults"]["--sft-lr"][0] == 4e-3
    found["mpo"]["defaults"] |= {"--ppo-critic": "trunk", "--ppo-of-old": 1}  # a flag that is gone says nothing
    found["dpo-easy"]["defaults"] |= {"--pairs": 1}  # nor does one that was typed
    rows.write_text("".join(json.dumps(line) + "\n" for line in found.values()))
    output = here("--stage", "ablations", "--out", tmp_path, "--rows", rows, "--only", "mpo", "--seeds", 1, *WORLD, *TINY, expect=2)
    assert "row mpo, seed 1 was made when --ppo-critic was trunk by default, and now it is separate" in output
    here("--stage", "ablations", "--out", tmp_path, "--rows", rows, "--only", "dpo-easy", "--seeds", 1, *WORLD, *TINY)


def test_a_folder_made_with_another_default_is_not_measured_as_todays(made, tmp_path):
    """Its line is removed, as the message above says, its folder is not."""
    folder = shutil.copytree(made[0], tmp_path / "grid", symlinks=True)
    for name, flag in (("mpo", "--ppo-critic"), ("base", "--sft-lr")):
        (folder / "rows.jsonl").write_text("")
        place = next((folder / "runs").glob(f"{name}-1-*")) / "made.json"
        as_it_was, described = place.read_text(), json.loads(place.read_text())
        described["defaults"][flag] = "another"
        place.write_text(json.dumps(described))
        output = here("--stage", "ablations", "--out", folder, "--only", "mpo", "--seeds", 1, *WORLD, *TINY, expect=2)
        assert f"{place.parent} was made when {flag} was another by default, and now it is " in output
        place.write_text(as_it_was)


def test_other_flags_are_another_row(made):
    given = {"data": "advice", "pairs": 200}
    keys = set()
    for change, judge in (({}, "advice"), ({"dpo_lr": 1e-3}, "advice"), ({"pairs": 100}, "advice"), ({}, None)):
        common = {"--" + name.replace("_", "-"): value for name, value in (given | change).items()}
        keys.add(grid.row_key(grid.Grid(made[0], made[0], common, judge, {}), "mpo", 1))
    assert len(keys) == 4


def test_a_model_is_known_by_its_tokenizer_as_well(made, tmp_path):
    """A base takes it from the model's folder."""
    folder = shutil.copytree(next((made[0] / "runs").glob("base-1-*")) / "sft", tmp_path / "model")
    before = grid.keyed({"--init": str(folder)})
    (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes() + b"\0")
    grid.of_folder.cache_clear()
    assert grid.keyed({"--init": str(folder)}) != before


def test_every_stage_takes_what_is_typed_for_all_rows(tmp_path, monkeypatch):
    words = []
    monkeypatch.setattr(grid, "program", lambda folder, log, script, *arguments: words.append(list(map(str, arguments))))
    for name in (*grid.BASE, *grid.STAGES):
        grid.stage(tmp_path / "row", name, 1, {"--dtype": "bf16", "--device": "cpu", "--offload": True, "--data": "advice", "--size": "tiny", "--dpo-lr": 1e-4})
    taken = {line[1]: vars(build_parser(line[1]).parse_args(line)) for line in words}  # which refuses a flag that the stage does not read
    assert [name for name, flags in taken.items() if "dtype" in flags] == ["sft", "rm", "dpo", "ppo"]
    assert [name for name, flags in taken.items() if "offload" in flags] == ["rm", "dpo", "ppo"]
    assert all(flags["device"] == "cpu" for flags in taken.values()) and taken["dpo"]["lr"] == 1e-4
    assert ["data" in flags for flags in taken.values()] == [True] + [False] * 5 and ["size" in flags for flags in taken.values()] == [False, True] + [False] * 4


def test_a_given_model_and_a_given_vocabulary_reach_every_base(made, tmp_path, monkeypatch):
    """The tokenizer of --init is the run's, the judge has the run's whatever is said of tokenizers; a model is known by its weights."""
    model = next((made[0] / "runs").glob("base-1-*")) / "sft"
    copy = shutil.copytree(model, tmp_path / "copy")
    words, keys = [], []
    monkeypatch.setattr(grid, "program", lambda folder, log, script, *arguments: words.append(list(map(str, arguments))))
    for given in ({"--init": str(model)}, {"--init": str(copy)}, {"--tokenizer-vocab-size": 300}):
        asked = grid.Grid(tmp_path / str(len(keys)), tmp_path / "rows.jsonl", {"--data": "advice"} | given, "advice", {})
        keys.append(grid.row_key(asked, "dpo-easy", 1))
        grid.make_base(asked, "dpo-easy", 1)
    taken = [(line[1], vars(build_parser(line[1]).parse_args(line))) for line in words]
    assert len(taken) == 18 and keys[0] == keys[1] != keys[2]
    tokenizers = [flags for name, flags in taken if name == "tokenizer"]
    assert [flags.get("file", "").startswith(str(model)) for flags in tokenizers] == [True, False, False, False, False, False]
    assert [flags.get("vocab_size") for flags in tokenizers] == [None, None, None, None, 300, None]
    assert all(flags["file"].endswith("tokenizer/tokenizer.model") for flags in tokenizers[1::2])
    assert [flags["init"] for name, flags in taken if name == "sft" and "init" in flags] == [str(model), str(copy)]


def test_a_given_tokenizer_is_known_by_its_contents(tmp_path):
    file, keys = tmp_path / "tokenizer.model", []
    for content in (b"one", b"two", b"one"):
        file.write_bytes(content)
        keys.append(grid.row_key(grid.Grid(tmp_path, tmp_path / "rows.jsonl", {"--data": "advice", "--tokenizer-file": str(file)}, None, {}), "dpo-easy", 1))
    assert keys[0] == keys[2] != keys[1]
    file.unlink()
    with pytest.raises(UsageError, match="--tokenizer-file .*tokenizer.model: no file"):
        grid.row_key(grid.Grid(tmp_path, tmp_path / "rows.jsonl", {"--data": "advice", "--tokenizer-file": str(file)}, None, {}), "dpo-easy", 1)


def test_a_strong_reward_model_is_made_on_other_pairs_and_given_to_all_rows(tmp_path, monkeypatch):
    """Its pairs have another seed, and none of the grid's noise; its training has the typed flags, which the stage that takes it has not."""
    words = []
    monkeypatch.setattr(grid, "program", lambda folder, log, script, *arguments: words.append(list(map(str, arguments))))
    typed = {"--data": "advice", "--pairs": 300, "--max-pairs": 250, "--flip-rate": 0.3, "--rm-lr": 0.5}
    asked = grid.Grid(tmp_path, tmp_path / "rows.jsonl", typed, "advice", {})
    grid.make_base(asked, "dpo-easy@strong", 1)
    taken = [(line[1], vars(build_parser(line[1]).parse_args(line))) for line in words]
    assert [name for name, _ in taken] == ["tokenizer", "sft", "tokenizer", "rm", "rm", "split", "tokenizer", "rm"]
    own, strong, judge = (flags for name, flags in taken if name == "tokenizer")
    assert (own["pairs"], strong["pairs"], judge["pairs"]) == (300, 40_000, 300)
    assert own["max_pairs"] == judge["max_pairs"] == 250 and "max_pairs" not in strong
    assert (own["flip_rate"], strong["flip_rate"], judge["flip_rate"]) == (0.3, 0.0, 0.3) and strong["label_temperature"] == 0.1
    assert len({own["seed"], strong["seed"], judge["seed"]}) == 3
    trained, given, judging = (flags for name, flags in taken if name == "rm")
    assert given["reward_model"] == str(Path(trained["out"]) / "rm") and "lr" not in given and "folds" not in given
    assert trained["lr"] == judging["lr"] == 0.5 and trained["folds"] == 1
    keys = {grid.row_key(asked, name, 1) for name in ("dpo-easy", "dpo-easy@strong")}
    monkeypatch.setitem(grid.STRONG, "--pairs", 100)
    assert len(keys | {grid.row_key(asked, name, 1) for name in ("dpo-easy", "dpo-easy@strong")}) == 3
    (tmp_path / "rows").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    message = here("--stage", "ablations", "--only", "strong", "--data", f"jsonl:{tmp_path}/rows", "--out", tmp_path / "x", expect=2)
    assert "--only dpo-all@strong: its reward model needs pairs without noise" in message
    common = {"rm_reward_model": str(next(tmp_path.glob("runs/base-*"))), "data": "advice"}
    with pytest.raises(UsageError, match="--only dpo-easy@rm-folds-1: has a reward model of its own"):
        grid.run_grid(grid.GridFlags(str(tmp_path), only="folds", seeds="1"), common, {})


def test_a_stage_that_another_grid_is_at_work_on_is_left_alone(tmp_path):
    (tmp_path / "row" / "dpo").mkdir(parents=True)
    with locked(tmp_path / "row" / "dpo"), pytest.raises(UsageError, match="is at work here"):
        grid.stage(tmp_path / "row", "dpo", 1, {})
    assert (tmp_path / "row" / "dpo").exists()
    (tmp_path / "rows.jsonl").touch()
    with locked(tmp_path / "rows.jsonl"):
        assert "is at work here" in here("--stage", "ablations", "--out", tmp_path, "--only", "dpo-easy", "--seeds", 1, *WORLD, *TINY, expect=2)


def test_files_are_known_by_their_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("same")
    assert grid.content(f"jsonl:{tmp_path}/a") == grid.content(f"jsonl:{tmp_path}/b") != grid.content(f"hh:{tmp_path}/a")
    (tmp_path / "b").write_text("other")
    assert grid.content(f"jsonl:{tmp_path}/a") != grid.content(f"jsonl:{tmp_path}/b")
    with pytest.raises(UsageError, match="no file"):
        grid.content(f"jsonl:{tmp_path}/c")
    assert grid.content("hh") == "hh"  # of --template


@pytest.mark.parametrize("damage", [b'{"a": 1}\n', b"[1]\n", b"\xff\n", b'{"row": \n'])
def test_a_damaged_rows_file_is_named_with_its_line(made, tmp_path, damage):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((made[0] / "rows.jsonl").read_bytes() + damage)
    with pytest.raises(CheckpointError, match=f"rows.jsonl:{len(ROWS) + 1}: is no line of a grid"):
        grid.read_rows(rows)
    with pytest.raises(UsageError, match="is a folder; name a file for rows"):
        grid.read_rows(tmp_path)


def test_a_row_that_fails_is_named_with_its_log_and_the_others_go_on(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made[0], tmp_path / "grid", symlinks=True)
    for name in ("broken", "after-broken", "fine"):
        monkeypatch.setitem(grid.ROWS, name, Row({"--dpo-lr": -1.0} if name == "broken" else {"--dpo-lr": 1e-4}, "broken" if "after" in name else None))
    given = vars(build_parser("ablations").parse_args([str(word) for word in (*WORLD, *TINY)]))
    del given["stage"]
    with pytest.raises(UsageError, match=r"train.py --stage dpo stopped with exit code 2; read .*broken-1-\w+/log.txt"):
        grid.run_grid(grid.GridFlags(str(folder), only="broken,after-broken,fine", seeds="1"), given, defaults())
    assert [line["row"] for line in lines(folder / "rows.jsonl")] == [*ROWS, "fine"]
    assert "--lr -1.0: must be a positive" in next((folder / "runs").glob("broken-1-*/log.txt")).read_text()


def test_flags_that_rows_decide_and_seeds_that_are_none(tmp_path):
    for words, message in (
        (("--ppo-part", "all"), "--ppo-part: is what the rows differ in"),
        (("--seed", "3"), "unrecognized arguments: --seed 3; see --help. A stage alone takes its flags by their own names (--lr), a chain by the stage's (--dpo-lr). Did you mean --seeds?"),
        (("--seeds", "1,x"), "--seeds 1,x: give whole numbers"),
        (("--only", "no-such"), "--only no-such: no such row"),
        (("--ppo-lr", "-1"), "--ppo-lr -1.0: must be a positive"),
        (("--flip-rate", "0.1", "--data", "jsonl:x"), "--flip-rate 0.1"),
        (("--rm-reward-model", "nowhere"), "--rm-reward-model nowhere: no such folder"),
        (("--rm-reward-model", "strong"), "--rm-reward-model strong: "),
        (("--judge-data", "advise"), "'advise' names no data"),
        (("--judge-data", "jsonl:nowhere.jsonl"), "cannot read nowhere.jsonl"),
    ):
        assert message in here("--stage", "ablations", "--out", tmp_path / "grid", *words, expect=2)
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("drawn", [True, False])
def test_compare_prints_tables_and_writes_them(made, tmp_path, monkeypatch, drawn):
    if drawn:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    rows = shutil.copy(made[0] / "rows.jsonl", tmp_path)
    output = here("--compare", rows, program="eval.py")
    assert "| mpo - dpo-easy | 1 |" in output and ("pictures/rows.png" in output) == drawn == ("pip install" not in output)
    assert (tmp_path / "pictures" / "rows.png").exists() == drawn
    assert (tmp_path / "report.md").read_text().strip() in output.strip() and (tmp_path / "rows.csv").exists()
    assert "no rows in" in here("--compare", tmp_path / "none", program="eval.py", expect=2)


def test_judges_by_the_commands(made, tmp_path):
    run = shutil.copytree(next((made[0] / "runs").glob("mpo-1-*")), tmp_path / "run", symlinks=False)
    here("--run", run, "--models", "ppo", "--judge-out", tmp_path / "pairs.jsonl", program="eval.py")  # against the chosen responses
    asked = lines(tmp_path / "pairs.jsonl")
    worth = [[true_reward("advice", f"\n\n{row['prompt']}", f" {row[place]}") for place in "AB"] for row in asked]  # judges see no outer blanks
    gaps = [a - b for a, b in worth]
    verdicts = [{"id": row["id"], "verdict": "A" if gap > 0 else "B" if gap < 0 else "tie"} for row, gap in zip(asked, gaps, strict=True)]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    output = here("--run", run, "--judge-in", tmp_path / "verdicts.jsonl", program="eval.py")
    decided = sum(gap != 0 for gap in gaps)
    assert decided > 10 and f"| agreement with the true reward | {decided} | 0 | 1.00 [" in output
    assert f"| ppo wins against chosen, ties half | 20 | {20 - decided} | " in output and (run / "eval" / "judged.md").exists()
    said = here("--run", run, "--models", "ppo,sft,ppo/snapshot-*", "--judge-out", tmp_path / "pairs.jsonl", program="eval.py", expect=2)
    assert "compares two models, or one" in said and "chosen;" not in said
    assert "say with --models" in here("--run", run, "--judge-out", tmp_path / "pairs.jsonl", program="eval.py", expect=2)
