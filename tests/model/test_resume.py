"""A loop that is interrupted anywhere and goes on ends bit for bit like one that was not; and what a checkpoint's folder goes through.

Here an interruption is an exception at a chosen step or file, in this process; tests/test_interruptions.py kills real ones.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import ALONE, SPECIAL, loud, task

from data.errors import CheckpointError, Interrupted, NumericalError, ResourceError
from data.run import Metrics
from model import fit as fit_module
from model import resume
from model.checkpoint import save_model
from model.fit import FitFlags, fit
from model.optim import make_optimiser
from model.resume import Saving, checkpoints, faults, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FLAGS = FitFlags(lr=1e-2, epochs=2, batch_size=4, micro_batch=4, validations=3, patience=9)
STEPS = 6  # 12 rows in steps of 4, twice


class Stopped(Exception):
    """An interruption."""


def run(place, name="sft", stop_at=None, **saving):
    """One stage of six steps in `place`, stopped before the optimiser's step `stop_at`; its last weights, moments and result."""
    place.mkdir(exist_ok=True)
    kind, rows, objective = task(name, 12)
    model, made, taken = loud(kind), [], 0
    plain_step, plain_make = fit_module.clipped_step, fit_module.make_optimiser

    def step(*args):
        nonlocal taken
        taken += 1
        if taken - 1 == stop_at:
            raise Stopped
        return plain_step(*args)

    fit_module.clipped_step, fit_module.make_optimiser = step, lambda *args: made.append(make_optimiser(*args)) or made[0]
    try:
        with Metrics(place / "metrics.jsonl") as metrics:
            best = fit(
                model, objective, rows, rows[:5], FLAGS, stage=name, seed=3, world=ALONE, metrics=metrics,
                keep=lambda snapshot: save_model(model, place / snapshot, special_ids=SPECIAL, is_main=True),
                saving=Saving(**{"folder": place, "world": ALONE, "every": 2} | saving),
            )  # fmt: skip
    except Stopped:
        return None
    finally:
        fit_module.clipped_step, fit_module.make_optimiser = plain_step, plain_make
    moments = [made[0].state[p][what] for p in model.parameters() for what in ("step", "exp_avg", "exp_avg_sq") if made[0].state]
    return [*model.parameters(), *moments], best, lines(place), kept(place)


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("model.safetensors") if "checkpoints" not in str(path)}


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and one[1:] == other[1:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """stage -> what it ends with where nothing happens; without any saving, which changes nothing."""
    return {name: run(tmp_path_factory.mktemp(name), name, folder=None) for name in ("sft", "rm", "dpo")}


@pytest.mark.parametrize("name, stop_at", [("sft", at) for at in range(STEPS)] + [("rm", 3), ("dpo", 5)])
def test_a_loop_goes_on_as_if_nothing_had_been(tmp_path, whole, name, stop_at):
    assert run(tmp_path, name, stop_at) is None
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [f"step-{step:08d}" for step in (2, 4) if step <= stop_at]
    assert equal(run(tmp_path, name), whole[name])


def test_saving_changes_nothing_and_a_finished_loop_is_not_run_again(tmp_path, whole):
    assert equal(run(tmp_path), whole["sft"])
    _, best, logged, files = run(tmp_path, stop_at=0)
    assert (best, logged, files) == whole["sft"][1:]


def test_patience_and_the_best_survive(tmp_path, monkeypatch):
    """After a validation that is not the best, one more ends training, also where a stop lies between the two."""
    losses = {True: iter([3.0, 1.0, 2.0, 2.5]), False: iter([2.5])}
    for resumed in (True, False):  # uninterrupted, then the part after a stop between second and third validation
        monkeypatch.setattr(fit_module, "evaluate", lambda *args, which=resumed: {"loss": next(losses[which])})
        flags = replace(FLAGS, patience=2)
        monkeypatch.setattr(f"{__name__}.FLAGS", flags)
        if resumed:
            run(tmp_path, stop_at=5, most=9)
            assert json.loads((tmp_path / "checkpoints/step-00000004/state.json").read_text())["since_best"] == 1
            best_weights = (tmp_path / "model.safetensors").read_bytes()
            (tmp_path / "model.safetensors").write_bytes(b"of a step that is taken again")
        else:
            _, best, logged, _ = run(tmp_path)
            assert best == {"loss": 1.0, "step": 1} and logged[-1] == {"step": 5, "valid_loss": 2.5}
            assert (tmp_path / "model.safetensors").read_bytes() == best_weights


def test_the_best_weights_are_those_of_the_checkpoint(tmp_path, whole):
    """Weights that were kept after the checkpoint belong to steps that are about to be taken again."""
    run(tmp_path, stop_at=5)
    (tmp_path / "model.safetensors").write_bytes(b"later")
    (tmp_path / "snapshot-00099").mkdir()
    assert equal(run(tmp_path), whole["sft"]) and not (tmp_path / "snapshot-00099").exists()


def test_best_weights_in_several_files_are_kept_whole(tmp_path, monkeypatch):
    """A large model's weights lie in files with an index beside them: a checkpoint holds all of them and gives them back."""
    monkeypatch.setattr("model.checkpoint.SHARD", 20_000)
    run(tmp_path, stop_at=5)
    in_checkpoint = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints/step-00000004/best").iterdir()}
    assert "model.safetensors.index.json" in in_checkpoint and len(in_checkpoint) > 3
    for path in tmp_path.glob("model*"):
        path.write_bytes(b"later")
    monkeypatch.setattr(fit_module, "evaluate", lambda *args: {"loss": 1e9})  # nothing better comes: the best is the checkpoint's
    run(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in in_checkpoint} == in_checkpoint


def test_a_signal_saves_and_stops_and_the_rest_is_the_same(tmp_path, whole, monkeypatch):
    plain = fit_module.train_step
    calls = []

    def step(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(fit_module, "train_step", step)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGTERM: stopped after 3 steps, .*step-00000003; go on with --resume") as stopped:
        run(tmp_path, every=0)
    assert stopped.value.code == 143 and (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    monkeypatch.undo()
    assert equal(run(tmp_path, every=0), whole["sft"])


def test_an_error_tells_of_the_last_checkpoint_though_a_signal_comes_meanwhile(tmp_path, monkeypatch, capsys):
    """torchrun ends the process whose peer has died by SIGTERM, at about the moment when that one sees that it is alone."""
    plain_step, plain_checkpoints, calls = fit_module.train_step, resume.checkpoints, []

    def step(*args):
        calls.append(1)
        if len(calls) == 6:
            monkeypatch.setattr(resume, "checkpoints", lambda home: os.kill(os.getpid(), signal.SIGTERM) or plain_checkpoints(home))
            raise RuntimeError("Connection closed by peer")
        return plain_step(*args)

    monkeypatch.setattr(fit_module, "train_step", step)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process would have ended here"))
    try:
        with pytest.raises(RuntimeError, match="closed by peer"):
            run(tmp_path, every=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"the last checkpoint is {tmp_path / 'checkpoints/step-00000004'}; --resume goes on" in capsys.readouterr().err


def test_a_checkpoint_in_pieces_is_the_same_checkpoint(tmp_path, whole, monkeypatch):
    """Each file has 20,000 bytes of tensors at most, or one tensor; together they have every tensor once."""
    monkeypatch.setattr(resume, "PIECE", 20_000)
    assert run(tmp_path, "rm", stop_at=3) is None
    files = {path.name: load_file(path) for path in (tmp_path / "checkpoints/step-00000002").glob("*.safetensors")}
    assert len(files) > 6 and all(len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000 for tensors in files.values())
    for stem, per_parameter in (("weights", 1), ("optimiser", 3)):
        names = [name for file, tensors in files.items() if file.startswith(stem) for name in tensors]
        assert len(names) == len(set(names)) == per_parameter * len(list(loud(task("rm", 1)[0]).parameters()))
    assert equal(run(tmp_path, "rm"), whole["rm"])


@pytest.mark.slow
def test_saving_and_reading_a_sharded_model_needs_little_memory(tmp_path):
    """Weights and moments of 18M parameters are 212 MB. A piece is 17 MB, gathered and once more as bytes; all in one piece, saving needed 173 MB."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "model" / "save_memory.py"), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    needed = [list(map(int, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("needed:")]
    assert len(needed) == 2 and all(size < 100e6 for sizes in needed for size in sizes), needed
    assert len(list(tmp_path.glob("checkpoints/step-00000001/*.safetensors"))) == 16


@pytest.mark.parametrize("function", ["replace", "rename", "fsync"])
def test_a_save_that_fails_anywhere_leaves_the_older_ones_and_nothing_else(tmp_path, monkeypatch, function):
    """At every single call of the three that change the disk, as if it were full."""
    home, contents = tmp_path / "checkpoints", {"weights.safetensors": b"w" * 100, "state.json": b"{}", "best/model.safetensors": b"b" * 50}
    plain, failed = getattr(os, function), 0
    for at in range(1, 30):
        shutil.rmtree(home, ignore_errors=True)
        write_checkpoint(home, 1, contents, 1)
        calls = 0

        def fails(*args, at=at):
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(28, "No space left on device")
            return plain(*args)

        monkeypatch.setattr(os, function, fails)
        try:
            write_checkpoint(home, 2, contents, 1)
        except ResourceError as error:
            failed += 1
            assert "this checkpoint takes 152 bytes" in str(error)
        monkeypatch.undo()
        good = [path.name for path in checkpoints(home) if not faults(path)]
        assert good and good == [path.name for path in checkpoints(home)], at
        assert not [path for path in home.glob(".*") if not path.name.endswith(".old.tmp")]
        if calls < at:
            break
    assert failed >= 1


def test_the_newest_are_kept_and_an_abandoned_future_is_not(tmp_path):
    for step in (2, 4, 9, 6):
        write_checkpoint(tmp_path, step, {"state.json": b"{}"}, 2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000006"]
    write_checkpoint(tmp_path, 8, {"state.json": b"[]"}, 1)
    write_checkpoint(tmp_path, 8, {"state.json": b"{}"}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"] and (tmp_path / "step-00000008/state.json").read_bytes() == b"{}"


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    run(tmp_path, stop_at=3)
    kind, _, _ = task("rm", 1)
    model = loud(kind)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError, match="do not fit: .*score.weight is in one of them alone"):
        resume.put_training_state(model, make_optimiser(model, 1e-3, 0.0), tmp_path / "checkpoints" / "step-00000002")
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_too_little_space_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match=r"1,000 bytes are free, [\d,]+ are needed .*--keep 1"):
        run(tmp_path)


def test_a_folder_that_vanished_stops_the_loop(tmp_path, monkeypatch):
    plain = fit_module.train_step
    monkeypatch.setattr(fit_module, "train_step", lambda *args: (plain(*args), (tmp_path / "metrics.jsonl").unlink(missing_ok=True))[0])
    with pytest.raises(ResourceError, match="has vanished; the weights of step 1"):
        run(tmp_path)


class Named:
    def __init__(self, id):
        self.id = id


def test_what_is_told_of_a_number_that_is_not_finite(tmp_path):
    saving = Saving(failures=tmp_path, describe=lambda row: {"id": row.id, "prompt": "é"})
    error = saving.not_finite("sft, step 3", "loss", [Named(f"row{i}") for i in range(7)], ALONE)
    assert isinstance(error, NumericalError) and "sft, step 3: loss is not finite on rank 0; rows row0, row1, row2, row3, row4, ..." in str(error)
    (path,) = tmp_path.iterdir()
    assert str(path) in str(error) and [json.loads(line)["id"] for line in path.read_text().splitlines()] == [f"row{i}" for i in range(7)]
    assert "this process has other rows" in str(saving.not_finite("x", "loss", [], ALONE))
