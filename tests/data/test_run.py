"""Stage folders that count only when they are whole, and files that are written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass

import pytest

from data.errors import CheckpointError, ResourceError, UsageError
from data.files import atomic_write, digest, read_json, write_json
from data.run import Metrics, as_flags, begin_stage, finish_stage, open_stage

MAKE_IT = "python train.py --stage sft --out run"


def finished(folder, stage="sft", parents=None, **files):
    assert begin_stage(folder, {"lr": 0.1}, parents or {}) is True
    for name, text in files.items():
        atomic_write(folder / name.replace("__", "/"), text)
    finish_stage(folder, stage, {"loss": 1.5})
    return folder


# ---- stages


def test_a_finished_stage_opens_with_what_it_was_made_of(tmp_path):
    parent = finished(tmp_path / "tokenizer", "tokenizer", model="abc")
    folder = finished(tmp_path / "sft", parents={"tokenizer": parent}, weights="xyz", best__weights="uvw", fold__manifest="{}")
    manifest = open_stage(folder, MAKE_IT, ("sft", "dpo"))
    assert manifest["stage"] == "sft" and manifest["flags"] == {"lr": 0.1} and manifest["results"] == {"loss": 1.5}
    assert manifest["parents"] == {"tokenizer": {"path": str(parent), "manifest": digest(parent / "manifest.json")}}
    assert set(manifest["files"]) == {"flags.json", "weights", os.path.join("best", "weights"), os.path.join("fold", "manifest")}
    assert manifest["files"]["weights"] == hashlib.sha256(b"xyz").hexdigest()


def test_a_manifest_inside_a_stage_is_one_of_its_files(tmp_path):
    begin_stage(tmp_path / "rm", {}, {})
    finished(tmp_path / "rm" / "fold-0", "rm", weights="x")
    finish_stage(tmp_path / "rm", "rm", {})
    assert {"flags.json", "fold-0/manifest.json", "fold-0/weights", "fold-0/flags.json"} == set(open_stage(tmp_path / "rm", "")["files"])


def test_a_missing_or_unfinished_stage_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UsageError, match=f"sft: does not exist; make it with: {MAKE_IT}"):
        open_stage(tmp_path / "sft", MAKE_IT)
    begin_stage(tmp_path / "sft", {}, {})
    atomic_write(tmp_path / "sft" / "model.safetensors", b"half")
    with pytest.raises(UsageError, match=f"sft: is unfinished; go on with it: {MAKE_IT} --resume") as stopped:
        open_stage(tmp_path / "sft", MAKE_IT)
    assert stopped.value.code == 2


def test_a_stage_that_is_finished_with_the_same_key_need_not_run(tmp_path):
    parent = finished(tmp_path / "sft", weights="x")
    folder = tmp_path / "dpo"
    flags = {"lr": 1e-4, "layers": (1, 2), "data": None, "name": "é"}
    assert begin_stage(folder, flags, {"init": parent}) is True
    finish_stage(folder, "dpo", {})
    before = (folder / "manifest.json").read_bytes()
    assert begin_stage(folder, flags, {"init": parent}) is False
    assert (folder / "manifest.json").read_bytes() == before


def test_a_flag_that_is_newer_than_the_folder_makes_another_key_only_where_it_is_typed(tmp_path):
    folder = tmp_path / "dpo"
    begin_stage(folder, {"lr": 1e-4}, {})
    finish_stage(folder, "dpo", {})
    assert begin_stage(folder, {"lr": 1e-4, "group": 1}, {}, untyped={"lr", "group"}) is False
    with pytest.raises(UsageError, match=r"\(group was None, is 4\)"):
        begin_stage(folder, {"lr": 1e-4, "group": 4}, {}, untyped={"lr"})
    with pytest.raises(UsageError, match=r"\(lr was 0.0001, is 0.001\)"):
        begin_stage(folder, {"lr": 1e-3}, {}, untyped={"lr"})  # a default that has changed


def test_a_stage_that_is_finished_with_another_key_shows_the_difference_and_the_ways_out(tmp_path):
    parent, folder = finished(tmp_path / "sft", weights="x"), tmp_path / "dpo"
    begin_stage(folder, {"lr": 1e-4, "beta": 0.1}, {"init": parent})
    finish_stage(folder, "dpo", {})
    with pytest.raises(UsageError, match=r"dpo: .*\(lr was 0.0001, is 0.001\); choose another --out, or remove the folder") as stopped:
        begin_stage(folder, {"lr": 1e-3, "beta": 0.1}, {"init": parent})
    assert stopped.value.code == 2
    with pytest.raises(UsageError, match="beta was 0.1, is None; epochs was None, is 3"):
        begin_stage(folder, {"lr": 1e-4, "epochs": 3}, {"init": parent})
    with pytest.raises(UsageError, match="init was .*, is None"):
        begin_stage(folder, {"lr": 1e-4, "beta": 0.1}, {})
    atomic_write(parent / "manifest.json", (parent / "manifest.json").read_text().replace("1.5", "1.25"))  # the parent was made anew
    with pytest.raises(UsageError, match="init .*sft was made anew since"):
        begin_stage(folder, {"lr": 1e-4, "beta": 0.1}, {"init": parent})


def test_an_unfinished_stage_is_not_begun_again(tmp_path):
    assert begin_stage(tmp_path / "dpo", {"beta": 0.1}, {})
    assert read_json(tmp_path / "dpo" / "flags.json") == {"flags": {"beta": 0.1}, "parents": {}}
    with pytest.raises(UsageError, match="dpo: holds an unfinished run; .*remove the folder"):
        begin_stage(tmp_path / "dpo", {"beta": 0.1}, {})
    (tmp_path / "empty").mkdir()
    assert begin_stage(tmp_path / "empty", {}, {})


def test_a_parent_from_elsewhere_is_known_by_its_weights_and_their_description(tmp_path):
    for name, text in (("model.safetensors", "abc"), ("config.json", "{}")):
        atomic_write(tmp_path / "llama" / name, text)
    begin_stage(tmp_path / "sft", {}, {"init": tmp_path / "llama"})
    parents = read_json(tmp_path / "sft" / "flags.json")["parents"]
    files = "".join(f"{name} {hashlib.sha256(text).hexdigest()}\n" for name, text in (("config.json", b"{}"), ("model.safetensors", b"abc")))
    assert parents == {"init": {"path": str(tmp_path / "llama"), "weights": hashlib.sha256(files.encode()).hexdigest()}}
    finish_stage(tmp_path / "sft", "sft", {})
    assert not begin_stage(tmp_path / "sft", {}, {"init": tmp_path / "llama"})
    atomic_write(tmp_path / "llama" / "config.json", '{"rope_theta": 100.0}')
    with pytest.raises(UsageError, match="init .*llama was made anew since"):
        begin_stage(tmp_path / "sft", {}, {"init": tmp_path / "llama"})


def test_a_parent_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing: .*model.safetensors"):
        begin_stage(tmp_path / "sft", {}, {"init": tmp_path / "nothing"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["file", "file/sft"])
def test_a_stage_cannot_begin_in_a_file(where, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ResourceError, match="cannot be written") as stopped:
        begin_stage(tmp_path / where, {}, {})
    assert stopped.value.code == 6 and (tmp_path / "file").read_text() == "kept"


def test_what_a_stage_was_made_from_must_not_have_been_made_anew_since(tmp_path):
    """Up to the data, through parents that are still the same; what is gone is not missed."""
    data = finished(tmp_path / "data", "data", rows="abc")
    tokenizer = finished(tmp_path / "tokenizer", "tokenizer", {"data": data}, model="abc")
    sft = finished(tmp_path / "sft", "sft", {"tokenizer": tokenizer}, weights="abc")
    rm = finished(tmp_path / "rm", "rm", {"init": sft, "data": data}, weights="abc")
    split = finished(tmp_path / "split", "split", {"rm": rm}, easy="abc")
    ppo = finished(tmp_path / "ppo", "ppo", {"rm": rm, "data": data}, weights="abc")
    for folder in (sft, rm, split, ppo):
        open_stage(folder, MAKE_IT)

    def make_anew(folder, parents=None):
        shutil.rmtree(folder)
        finished(folder, folder.name, parents, rows="another")

    make_anew(rm, {"init": sft, "data": data})
    with pytest.raises(UsageError, match="split: was made from another rm than .*rm, which was made anew since; remove .*: python train.py --stage split --out") as stopped:
        open_stage(split, MAKE_IT)
    assert stopped.value.code == 2
    open_stage(ppo, MAKE_IT)  # whose reward model may be from elsewhere
    make_anew(split, {"rm": rm})
    open_stage(split, MAKE_IT)
    make_anew(data)
    for folder, stale in ((sft, tokenizer), (rm, rm), (split, rm), (ppo, ppo)):
        with pytest.raises(UsageError, match=f"{stale}: was made from another data than {data}, which was .* --stage {stale.name} --out {tmp_path}"):
            open_stage(folder, MAKE_IT)
    shutil.rmtree(data)
    for folder in (sft, rm, split, ppo):
        open_stage(folder, MAKE_IT)


def test_a_changed_or_missing_file_is_named(tmp_path):
    folder = finished(tmp_path / "sft", weights="xyz", deep__weights="uvw")
    for name, text in (("weights", "xyZ"), ("weights", "xyz "), ("deep/weights", "")):
        old = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError, match=rf"sft/{name}: changed since .*{MAKE_IT}") as stopped:
            open_stage(folder, MAKE_IT)
        assert stopped.value.code == 4
        (folder / name).write_text(old)
    open_stage(folder, MAKE_IT)
    (folder / "weights").unlink()
    with pytest.raises(CheckpointError, match=rf"sft/weights: missing, .*{MAKE_IT}"):
        open_stage(folder, MAKE_IT)


def test_another_stage_or_a_damaged_manifest_is_refused(tmp_path):
    folder = finished(tmp_path / "rm", "rm")
    with pytest.raises(CheckpointError, match="rm: holds the stage 'rm' where one of sft, dpo is needed"):
        open_stage(folder, MAKE_IT, ("sft", "dpo"))
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(CheckpointError, match="manifest.json: damaged"):
        open_stage(folder, MAKE_IT)


def test_a_parent_that_is_made_anew_has_another_digest(tmp_path):
    manifests = []
    for text in ("one", "two"):
        parent = finished(tmp_path / text / "sft", weights=text)
        manifests.append(open_stage(finished(tmp_path / text / "dpo", "dpo", {"sft": parent}), "")["parents"]["sft"]["manifest"])
    assert manifests[0] != manifests[1]


def test_a_run_that_was_moved_is_still_the_same(tmp_path):
    """Parents count by what they hold, wherever they lie."""
    run = tmp_path / "here"
    finished(run / "dpo", "dpo", {"sft": finished(run / "sft")})
    moved = run.rename(tmp_path / "there")
    assert not begin_stage(moved / "dpo", {"lr": 0.1}, {"sft": moved / "sft"})


# ---- metrics


def test_metrics_are_one_object_per_line_and_survive_numbers_that_json_cannot_hold(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.log(step=0, loss=0.5, name="x")
    assert path.read_text() == '{"step": 0, "loss": 0.5, "name": "x"}\n'  # on disk at once
    metrics.log(step=1, loss=float("nan"), norm=float("inf"), other=float("-inf"))
    assert json.loads(path.read_text().splitlines()[1]) == {"step": 1, "loss": None, "norm": None, "other": None}
    Metrics(None).log(step=0)  # another process: nothing
    assert [p.name for p in tmp_path.rglob("*.jsonl")] == ["metrics.jsonl"]


def test_metrics_that_cannot_be_written_say_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="metrics.jsonl: cannot be written"):
        Metrics(tmp_path / "file" / "metrics.jsonl")


def test_as_flags_joins_groups():
    @dataclass
    class One:
        a: int = 1

    @dataclass
    class Two:
        b: str = "x"

    assert as_flags(One(), Two(b="y")) == {"a": 1, "b": "y"}


# ---- files


def test_a_file_is_written_as_it_is_and_folders_are_made(tmp_path):
    atomic_write(tmp_path / "a" / "b" / "text", "é\r\n\0")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == b"\xc3\xa9\r\n\0"
    atomic_write(tmp_path / "a" / "b" / "text", b"\xff\xfe")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == b"\xff\xfe"
    assert digest(tmp_path / "a" / "b" / "text") == hashlib.sha256(b"\xff\xfe").hexdigest()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["text"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "expected"), [(OSError(errno.ENOSPC, "No space left on device"), ResourceError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(broken, error, expected, tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    atomic_write(path, "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(expected) as stopped:
        atomic_write(path, "new " * 10_000)
    if expected is ResourceError:
        assert "manifest.json: cannot be written (No space left on device)" in str(stopped.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "x", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_word_for_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "x.json", {"text": "é", "number": 1 / 3})
    assert read_json(tmp_path / "x.json") == {"text": "é", "number": 1 / 3}


def test_missing_and_damaged_json_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="x.json: missing"):
        read_json(tmp_path / "x.json")
    for content in (b"", b'{"a": ', b"\xff\xff"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(CheckpointError, match="x.json: damaged"):
            read_json(tmp_path / "x.json")
