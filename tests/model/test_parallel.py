"""Two processes, under DDP and under FSDP2, do what one does: losses, norms, weights, scores, samples, and stopping."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file
from small import ALONE, CONFIG, CPU, loud

from data.errors import NumericalError, UsageError
from model.checkpoint import load_model
from model.heads import LanguageModel
from model.parallel import DTYPES, DeviceFlags, World, at_hand, bare, distribute, exit_code, gradient_sync, start, whole

ROOT = Path(__file__).resolve().parents[2]
MODES = ("ddp", "fsdp")
STAGES = ("sft", "rm", "dpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """results.json, metrics and weights of one process in alone/, of two processes in ddp/ and fsdp/."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "model" / "ranks.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks.everything(ALONE, folder / "alone")
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"the processes waited for one another:\n{output[-3000:]}")
    assert process.returncode == 0, output[-3000:]
    return folder


def results(folder, mode):
    return json.loads((folder / mode / "results.json").read_text())


def steps(folder, mode, stage):
    """The metric lines without time."""
    lines = (folder / mode / stage / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in lines]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_norms_and_validation_are_those_of_one_process(mode, stage, folder):
    expected, found = steps(folder, "alone", stage), steps(folder, mode, stage)
    assert len(expected) == 7  # three steps, each with a validation of 7 rows, and one before them
    if stage == "dpo":  # policy and reference are equal then, and the last bit decides which of two equal rewards is the greater
        for line, name in ((0, "valid_accuracy"), (1, "accuracy")):
            assert {expected[line].pop(name), found[line].pop(name)} < {k / 14 for k in range(15)}
    for line, other in zip(expected, found, strict=True):
        assert other == pytest.approx(line, abs=1e-5, rel=1e-5)
    assert expected[1]["loss"] != pytest.approx(expected[3]["loss"], abs=1e-3)
    alone, here = (results(folder, which)[stage] for which in ("alone", mode))
    assert here["best"] == pytest.approx(alone["best"], abs=1e-5, rel=1e-5) and here["keeps"] == alone["keeps"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_weights_after_three_steps_are_those_of_one_process(mode, stage, folder):
    for which in ("last", "best"):
        expected, found = (load_file(folder / m / stage / which / "model.safetensors") for m in ("alone", mode))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert (tensor - found[name]).abs().max() < 1e-5, name
    start_weights = loud(ranks.task(stage, 1)[0], seed=4).trunk.norm.weight
    assert (expected["model.norm.weight"] - start_weights).abs().mean() > 1e-4  # three steps of 1e-4 each; they were taken
    load_model(folder / mode / stage / "last", ranks.task(stage, 1)[0])


@pytest.mark.parametrize("mode", MODES)
def test_all_processes_hold_the_same_weights(mode, folder):
    assert all(results(folder, mode)[stage]["ranks_agree"] for stage in STAGES)


@pytest.mark.parametrize("mode", MODES)
def test_dpo_starts_at_ln_2(mode, folder):
    assert steps(folder, mode, "dpo")[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_every_row_is_scored_once(mode, folder):
    expected, found = (results(folder, which)["score"] for which in ("alone", mode))
    assert len(found) == 7 and found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_sampling_completes_where_one_process_has_ended_at_the_first_token(mode, folder):
    expected, found = (results(folder, which)["sample"] for which in ("alone", mode))
    lengths = [sum(token != 0 for token in row) for row in expected["greedy"]]
    assert lengths == [1, ranks.RESPONSE]
    assert found["greedy"] == expected["greedy"] and found["sampled"] == expected["sampled"]
    assert np.abs(np.subtract(found["logp"], expected["logp"])).max() < 1e-5
    assert found["head_gradient"] == pytest.approx(expected["head_gradient"], abs=1e-3, rel=1e-4)


def test_sampling_gathers_sharded_weights_once_and_shares_them_out_again(folder):
    """Two layers and the rest: three gatherings, whatever the number of tokens."""
    found = results(folder, "fsdp")["sample"]
    assert found["gathers"] == 3 and found["shared_out"]
    assert results(folder, "ddp")["sample"]["gathers"] == 0


@pytest.mark.parametrize("mode", ("alone", *MODES))
@pytest.mark.parametrize("what", ("loss", "gradient"))
def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_the_weights_change(mode, what, folder):
    outcome = results(folder, mode)["nan"][what]
    assert outcome["stopped"] == (1 if mode == "alone" else 2)
    assert outcome["same_weights"] and "rm, step 0" in outcome["message"]


@pytest.mark.parametrize("mode", MODES)
def test_logits_in_pieces_and_bf16(mode, folder):
    expected, found = (results(folder, which) for which in ("alone", mode))
    assert found["chunked"] == pytest.approx(expected["chunked"], abs=1e-5)
    assert found["bf16"]["logp"] == "torch.float32" and found["bf16"]["weights"] == ["torch.float32"]
    assert found["bf16"]["loss"] == pytest.approx(expected["bf16"]["loss"], abs=2e-2)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_from_disk_is_whole_and_shared_out(mode, folder):
    """And activations that are computed again change no number."""
    expected, found = (results(folder, which)["imported"] for which in ("alone", mode))
    assert found["names"] == expected["names"] and "lm_head.weight" in found["names"]
    assert np.abs(np.subtract(found["logp"], expected["logp"])).max() < 1e-5
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, values in expected["gradients"].items():  # every process has the same rows, and DDP and FSDP2 average
        assert found["gradients"][name] == pytest.approx(values, abs=1e-4, rel=1e-4), name
    share = found["local"] / expected["local"]
    assert share == 1 if mode == "ddp" else share == pytest.approx(0.5, abs=0.02)
    assert found["types"] == (["torch.bfloat16"] if mode == "fsdp" else ["torch.bfloat16", "torch.float32"])
    assert np.abs(np.subtract(found["in_bf16"], expected["logp"])).max() < 0.3


@pytest.mark.parametrize("mode", ("alone", *MODES))
def test_a_model_that_rests_in_the_cpus_memory_says_the_same(mode, folder):
    found = results(folder, mode)["resting"]
    assert found["resting"] == found["present"]
    assert found["told"] == (["CPUOffloadPolicy"] * 3 if mode == "fsdp" else [])  # two layers and the rest


@pytest.mark.parametrize("mode", ("alone", *MODES))
def test_a_full_disk_leaves_no_process_waiting(mode, folder):
    found = results(folder, mode)["full"]
    assert "cannot be written; this checkpoint takes" in found["told"] and found["left"] == []
    assert found["together"] == (1 if mode == "alone" else 2)


# ---- without torchrun


def test_one_process_needs_no_process_group():
    world = start(DeviceFlags(device="cpu"))
    assert world == World(0, 1, CPU, torch.float32, "ddp") and world.is_main
    assert world.total([1.5, 2]).tolist() == [1.5, 2.0] and world.any(True) and not world.any(False)
    model = loud(LanguageModel)
    assert distribute(model, world) is model and bare(model) is model
    assert all(parameter.requires_grad for parameter in model.parameters())
    distribute(model, world, frozen=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
    with gradient_sync(model, last=False):
        world.barrier()


@pytest.mark.parametrize(("dtype", "products"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_changes_products_where_asked_for(dtype, products):
    with replace(ALONE, dtype=DTYPES[dtype]).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == products


def test_products_in_fp32_are_left_to_no_faster_unit():
    """AMX and tensor cores would make them in bf16 or TF32, if told that this may be: defaults would give other results on machines that have them."""
    ask = "import torch, train, eval; train.start(train.DeviceFlags(device='cpu')); print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)"
    assert subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() == ["highest", "False"]


@pytest.mark.parametrize(("capability", "dtype", "told"), [("AVX2", "bf16", True), ("AVX2", "fp32", False), ("AVX512", "bf16", False)])
def test_bf16_on_a_processor_without_it_is_warned_of(capability, dtype, told, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    start(DeviceFlags(device="cpu", dtype=dtype))
    assert ("warning: --dtype bf16: this processor" in capsys.readouterr().err) == told


def test_impossible_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: no CUDA device"):
        start(DeviceFlags(device="cuda"))
    with pytest.raises(UsageError, match="--parallel fsdp: needs torchrun"):
        start(DeviceFlags(device="cpu", parallel="fsdp"))


def test_a_resting_model_has_its_weights_on_the_device_only_while_it_is_asked():
    world = replace(ALONE, offload=True)
    model = distribute(loud(LanguageModel, replace(CONFIG, tied=True)), world, frozen=True)
    resting = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), at_hand(model, world):
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() != resting[name] and torch.equal(parameter, loud(LanguageModel, replace(CONFIG, tied=True)).get_parameter(name))
        raise KeyError
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == resting
    with at_hand(model, ALONE):
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == resting


# ---- how a program ends


@pytest.mark.parametrize(
    "error, code, words",
    [
        (NumericalError("wrong"), 5, "error: wrong\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; a stage that was begun goes on with --resume, a grid with the same command\n"),
        (MemoryError("std::bad_alloc"), 6, "error: memory ran out (std::bad_alloc)\nheld by this process:"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 6, "a smaller --micro-batch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 6, "less of it: "),
    ],
)
def test_the_exit_code_is_that_of_the_error(error, code, words, capsys):
    def program(arguments):
        assert arguments == ["--stage"]
        raise error

    assert exit_code(program, ["--stage"]) == code and words in capsys.readouterr().err


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda arguments: 1 / 0, [])
    assert exit_code(lambda arguments: None, []) == 0
