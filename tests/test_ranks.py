"""One process and two, DDP and FSDP2: the same losses and weights after three optimiser steps of every stage, by the real commands.

Batches of 7 rows in micro-batches of 2 share out unevenly over two processes, PPO's last minibatch of 2 leaves a process with one row, and
all rows are ragged. All runs start from copies of the same chain.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import ONE_THREAD, ROOT, STAGES, TINY, TRAINED, WORLD, command, copy_of, here, manifest, metrics, put_on_record, sha256, steps
from safetensors.numpy import load_file
from test_interruptions import lines, started, when

from data.prepare import load_demonstrations, load_pairs
from model.resume import faults

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
WAYS = ("one", "ddp", "fsdp")


def three_steps(run, stage):
    """Flags with which a stage takes exactly three optimiser steps, and its last snapshot's name."""
    if stage == "ppo":
        return ["--iterations", 1, "--prompts-per-iteration", 10, "--minibatch", 4, "--micro-batch", 2, "--passes", 1, "--lr", 1e-4], "snapshot-00001"
    rows = len(load_demonstrations(run / "data", "train") if stage == "sft" else load_pairs(run / "data", "train"))
    flags = ["--batch-size", 7, "--micro-batch", 2, "--epochs", 3 / -(-rows // 7), "--lr", 1e-4, "--validations", 3, "--patience", 9]
    extra = {"sft": [], "rm": ["--folds", 1, "--snapshots"], "dpo": ["--part", "all"]}[stage]
    return flags + extra, "snapshot-00003"


def make_validation_odd(run):
    """Takes a prompt out of the validation part where their number is even."""
    path = run / "data" / "validation.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))
    path.write_text("".join(line for line in lines if len(prompts) % 2 or json.loads(line)["prompt"] != prompts[0]))
    put_on_record(run)


@pytest.fixture(scope="module")
def folders(chain, tmp_path_factory):
    """way -> stage -> the folder of that stage made that way."""
    base, made, commands = tmp_path_factory.mktemp("ranks"), {}, []
    for way in WAYS:
        for stage in TRAINED:
            run = copy_of(chain, base / way / stage, *STAGES[STAGES.index(stage) :])
            make_validation_odd(run)
            flags = ["--stage", stage, "--out", run, *three_steps(run, stage)[0]]
            if way == "one":
                here(*flags)
            else:
                commands.append([str(flag) for flag in (*flags, "--parallel", way)])
            made[way, stage] = run / stage
    (base / "commands.json").write_text(json.dumps(commands))
    command(*TORCHRUN, "tests/commands_on_ranks.py", base / "commands.json", program="-m")
    return made


def close(one, other, where):
    """Numbers within 1e-5, absolute or relative, whichever is larger."""
    assert one.keys() == other.keys(), where
    for name in one:
        assert other[name] == pytest.approx(one[name], abs=1e-5, rel=1e-5), (where, name)


def unsampled(stage, numbers):
    """A validation without what depends on samples of weights that have moved: one draw that lies within 1e-7 of the border between two
    tokens makes another response."""
    return {} if stage == "ppo" else {name: value for name, value in numbers.items() if name.removeprefix("valid_") not in ("kl_ref_seq", "ended")}


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_train_as_one_does(folders, chain, stage, way):
    one, two = folders["one", stage], folders[way, stage]
    expected, others = metrics(one), metrics(two)
    assert sum(line.get("updates", 1) for line in steps(one)) == 3 and len(expected) == len(others)
    for index, (line, other) in enumerate(zip(expected, others, strict=True)):
        step, trained = line["step"], "grad_norm" in line
        if step >= 0 and not trained:
            line, other = unsampled(stage, line), unsampled(stage, other)
        if stage == "dpo" and step <= 0:  # margins are 0 there, and their signs are rounding
            line, other = ({name: value for name, value in numbers.items() if "accuracy" not in name} for numbers in (line, other))
        close(line, other, (stage, way, index))
    snapshot = three_steps(chain, stage)[1]
    for part in (snapshot, f"{snapshot}/critic" if stage == "ppo" else "."):  # which of PPO's is best depends on samples
        weights, found = (load_file(folder / part / "model.safetensors") for folder in (one, two))
        assert weights.keys() == found.keys()
        for name in weights:
            np.testing.assert_allclose(found[name], weights[name], rtol=0, atol=1e-5, err_msg=f"{stage} {way} {part} {name}")
    parent = {"sft": None, "rm": "sft", "dpo": "sft", "ppo": "dpo"}[stage]
    if parent:  # and the weights did move
        start, last = load_file(chain / parent / "model.safetensors"), load_file(one / snapshot / "model.safetensors")
        assert max(np.abs(start[name] - last[name]).max() for name in start.keys() & last.keys()) > 1e-4
    results = [unsampled(stage, flat(manifest(folder)["results"])) for folder in (one, two)]
    if stage == "dpo" and results[0]["step"] <= 0:
        results = [{name: value for name, value in numbers.items() if name != "accuracy"} for numbers in results]
    close(*results, (stage, way, "results"))


@pytest.mark.parametrize("way", WAYS)
def test_every_validation_prompt_is_answered_once(folders, way):
    """Their number n is odd, so two processes cannot share them evenly; means over n prompts are whole numbers of nths."""
    prompts = len({pair.prompt for pair in load_pairs(folders[way, "ppo"].parent / "data", "validation")})
    assert prompts % 2 == 1
    answered = [line for line in metrics(folders[way, "ppo"]) if "valid_length" in line]
    for name in ("valid_length", "valid_ended"):
        assert answered and all(line[name] * prompts == pytest.approx(round(line[name] * prompts), abs=1e-4) for line in answered)


def flat(results, prefix=""):
    """The numbers of nested results under one name each."""
    numbers = {}
    for name, value in results.items() if isinstance(results, dict) else enumerate(results):
        if isinstance(value, dict | list):
            numbers |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{name}"] = value
    return numbers


@pytest.mark.parametrize("way", WAYS[1:])
def test_two_processes_score_every_pair_as_one_does(folders, way):
    """Rows that do not divide: each is scored once, and stands where it stood."""
    one, two = ([json.loads(line) for line in (folders[w, "rm"] / "scores.jsonl").read_text().splitlines()] for w in ("one", way))
    assert [row["id"] for row in one] == [row["id"] for row in two]
    for row, other in zip(one, two, strict=True):
        close({name: row[name] for name in ("chosen", "rejected")}, {name: other[name] for name in ("chosen", "rejected")}, row["id"])


def test_the_command_itself_under_torchrun(folders, chain, tmp_path):
    """`torchrun train.py --stage rm --parallel fsdp`, as a user types it."""
    run = copy_of(chain, tmp_path / "run", "rm", "split", "dpo", "ppo")
    make_validation_odd(run)
    flags = three_steps(run, "rm")[0]
    output = command(*TORCHRUN, "train.py", "--stage", "rm", "--out", run, *flags, "--parallel", "fsdp", program="-m")
    assert output.count("[rm] made") == 1  # one process speaks
    close(metrics(folders["one", "rm"])[-1], metrics(run / "rm")[-1], "rm")


# ---- several nodes: an agent of torchrun on each of them


def on_two_nodes(rendezvous, *args, program="train.py", **environment):
    """The command under two agents with one process each, as on two machines that see one folder; what both print."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    how = {
        "static": ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port),
        "elastic": ("--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--max_restarts", 1),
    }[rendezvous]
    ranks = [("--node_rank", node) if rendezvous == "static" else () for node in (0, 1)]
    environment = os.environ | ONE_THREAD | environment
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", TORCHRUN[0], *map(str, (*how, *rank, program, *args))],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for rank in ranks
    ]  # fmt: skip
    outputs = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    return "".join(outputs)


@pytest.mark.parametrize("rendezvous", ["static", pytest.param("elastic", marks=pytest.mark.slow)])
def test_two_nodes_train_as_one_with_two_processes_does(folders, chain, tmp_path, rendezvous):
    run = copy_of(chain, tmp_path / "run", *STAGES[1:])
    make_validation_odd(run)
    output = on_two_nodes(rendezvous, "--stage", "sft", "--out", run, *three_steps(run, "sft")[0], "--parallel", "fsdp")
    assert output.count("[sft] made") == 1
    assert metrics(run / "sft") == metrics(folders["fsdp", "sft"])
    assert sha256(run / "sft" / "model.safetensors") == sha256(folders["fsdp", "sft"] / "model.safetensors")


@pytest.mark.slow
def test_agents_that_restart_go_on_from_the_last_checkpoint(chain, tmp_path, ten_steps):
    """`--max-restarts`: a process of one node is killed, all are started again by their agents, and the run ends as one that was not.

    The agents' own store stays out of it: its keys hold an agent's count of failures, and here one has failed and the other has not."""
    run = copy_of(chain, tmp_path / "run", *STAGES[1:])
    words = ("--stage", "sft", "--out", run, *LONG, "--parallel", "fsdp")
    trouble = {"BROKEN": "exit:75", "ONCE": str(tmp_path / "once"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    output = on_two_nodes("elastic", *words, program="tests/broken_rank.py", **trouble)
    assert output.count("resumed from") == 1
    assert [line["step"] for line in steps(run / "sft")] == list(range(10))
    for line, other in zip(metrics(ten_steps), metrics(run / "sft"), strict=True):
        close(line, other, line["step"])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:])
def test_the_whole_chain_under_torchrun(tmp_path, way):
    output = command(*TORCHRUN, "train.py", "--stage", "mpo", "--out", tmp_path / "run", *WORLD, *TINY, "--parallel", way, program="-m")
    assert output.count("next: python eval.py") == 1
    assert all(manifest(tmp_path / "run" / stage)["stage"] == stage for stage in STAGES)


@pytest.mark.slow
def test_a_refusal_under_torchrun_ends_all_processes(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "ppo")
    flags = ("--prompts-per-iteration", 7)
    output = command(*TORCHRUN, "train.py", "--stage", "ppo", "--out", run, *flags, program="-m", expect=1, timeout=60)  # torchrun's own code
    assert "--prompts-per-iteration 7: must be a multiple of the 2 processes" in output and not (run / "ppo").exists()


# ---- stopping and going on with another number of processes, and one process in trouble


def under_torchrun(*args, broken=None, ranks=2, expect=0):
    """A command on several processes; with `broken` (tests/broken_rank.py) the last of them gets into trouble."""
    launch = (*TORCHRUN[:-1], ranks, "tests/broken_rank.py" if broken else "train.py")
    return command(*launch, *args, program="-m", expect=expect, timeout=180, env={"BROKEN": broken or ""})


LONG = ("--epochs", 1, "--batch-size", 20, "--micro-batch", 4, "--validations", 2, "--lr", 2e-4, "--save-every", 2)  # ten steps


@pytest.fixture(scope="module")
def ten_steps(chain, tmp_path_factory):
    """SFT in one process, from start to end."""
    run = copy_of(chain, tmp_path_factory.mktemp("ten") / "run", *STAGES[1:])
    here("--stage", "sft", "--out", run, *LONG)
    assert [line["step"] for line in steps(run / "sft")] == list(range(10))
    return run / "sft"


@pytest.mark.parametrize(
    "first, then",
    [
        ((2, "fsdp"), (1, "ddp")),
        pytest.param((2, "ddp"), (1, "ddp"), marks=pytest.mark.slow),
        pytest.param((2, "ddp"), (2, "fsdp"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp"), (2, "ddp"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp"), (4, "fsdp"), marks=pytest.mark.slow),
        pytest.param((1, "ddp"), (4, "ddp"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_with_another_number_of_processes(chain, tmp_path, ten_steps, first, then):
    """One of the processes is killed on its way; the others end, and what is left goes on in the same order, shards and all."""
    run = copy_of(chain, tmp_path / "run", *STAGES[1:])
    stage = ("--stage", "sft", "--out", run, *LONG)
    if first[0] == 1:
        command(*stage, program="tests/killed.py", env={"KILL": "work:130"}, expect=-9)
    else:
        output = under_torchrun(*stage, "--parallel", first[1], ranks=first[0], broken="exit:75", expect=1)
        assert "SIGKILL" in output.partition("Root Cause")[2] and "the last checkpoint is" in output, output
    begun = sorted((run / "sft" / "checkpoints").glob("step-*"))
    assert begun and len(steps(run / "sft")) < 10
    if then[0] == 1:
        output = here(*stage, "--resume")
    else:
        output = under_torchrun(*stage, "--resume", "--parallel", then[1], ranks=then[0])
    assert f"resumed from {begun[-1]}" in output
    expected, found = metrics(ten_steps), metrics(run / "sft")
    assert len(expected) == len(found)
    for line, other in zip(expected, found, strict=True):
        close(line, other, (first, then, line["step"]))
    weights, others = (load_file(folder / "snapshot-00010" / "model.safetensors") for folder in (ten_steps, run / "sft"))
    for name in weights:
        np.testing.assert_allclose(others[name], weights[name], rtol=0, atol=1e-5, err_msg=name)


TROUBLE = {
    "nan": ("nan:61", r"sft, step \d+: loss is not finite on rank 1; ", 60),
    "raise": ("raise:61", r"ValueError: broken on purpose", 60),
    "hang": ("hang:61", r"Timed out waiting|timed out", 100),  # --rank-timeout, and half a minute until torchrun ends the one that hangs
}


@pytest.mark.parametrize("how", ["nan", pytest.param("raise", marks=pytest.mark.slow), pytest.param("hang", marks=pytest.mark.slow)])
def test_trouble_of_one_process_ends_all_with_the_first_cause_last(chain, tmp_path, how):
    run = copy_of(chain, tmp_path / "run", *STAGES[1:])
    broken, cause, seconds = TROUBLE[how]
    before = time.monotonic()
    output = under_torchrun("--stage", "sft", "--out", run, *LONG, "--rank-timeout", 10, broken=broken, expect=1)
    assert time.monotonic() - before < seconds
    assert re.search(cause, output.partition("Root Cause (first observed failure)")[2]), output[-3000:]
    last = sorted((run / "sft" / "checkpoints").glob("step-*"))[-1]
    assert f"the last checkpoint is {last}" in output and faults(last) == [] and not (run / "sft" / "manifest.json").exists()
    if how == "nan":
        (dumped,) = (run / "failures").iterdir()
        assert dumped.name.endswith("rank-1.jsonl")
        rows = [json.loads(line) for line in dumped.read_text().splitlines()]
        assert rows and all(set(row) == {"id", "prompt", "response"} for row in rows) and rows[0]["id"] in output


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_on_all_processes(chain, tmp_path, ten_steps):
    """torchrun passes SIGTERM on to its processes, which finish their step; it kills what is still there after half a minute."""
    run = copy_of(chain, tmp_path / "run", *STAGES[1:])
    words = [*TORCHRUN, "train.py", "--stage", "sft", "--out", run, *LONG, "--save-every", 0, "--parallel", "fsdp"]
    process = started(*words, program="-m")
    when(lambda: lines(run / "sft" / "metrics.jsonl") > 3, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    stopped = re.search(r"SIGTERM: stopped after (\d+) steps, which are saved in (\S+);", output)
    assert process.returncode and stopped and faults(Path(stopped[2])) == [], output[-3000:]
    here("--stage", "sft", "--out", run, *LONG, "--save-every", 0, "--resume")
    assert [line["step"] for line in steps(run / "sft")] == list(range(10))
    assert metrics(run / "sft")[-1]["valid_loss"] == pytest.approx(metrics(ten_steps)[-1]["valid_loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_a_sharded_stage_goes_on_bit_for_bit_with_as_many_processes(chain, tmp_path, stage):
    """Both processes die at the same moment; shards of weights and moments come back as they were, critic and folds included."""
    flags = {
        "rm": ("--epochs", 0.5),
        "ppo": ("--iterations", 4, "--prompts-per-iteration", 6, "--minibatch", 4, "--lr", 1e-3, "--critic", "separate"),
    }
    ends = {}
    for name in ("whole", "killed"):
        run = copy_of(chain, tmp_path / name, *STAGES[STAGES.index(stage) :])
        words = ("--stage", stage, "--out", run, *flags[stage], "--validations", 2, "--save-every", 1, "--parallel", "fsdp")
        if name == "killed":
            launch = (*TORCHRUN[:-1], 2, "tests/killed.py")
            command(*launch, *words, program="-m", expect=1, timeout=180, env={"KILL": {"rm": "work:150", "ppo": "work:450"}[stage]})
            assert list((run / stage).rglob("step-*"))
            words = (*words, "--resume")
        under_torchrun(*words)
        folders = [run / stage, *sorted((run / stage).glob("fold-*"))]
        weights = {str(path.relative_to(run)): sha256(path) for path in sorted((run / stage).rglob("model.safetensors"))}
        ends[name] = [metrics(folder) for folder in folders], weights
    assert ends["killed"] == ends["whole"]
