"""Disks that are full, unwritable or gone, memory that runs out, and numbers that go wrong: the exit code, the message, and what is left.

The faults are real: a small tmpfs that is filled or made read-only (which holds for root, too, but needs the right to mount), a folder
moved away under a running process, RLIMIT_AS in a process of its own (tests/starved.py), weights with a NaN in one token's row.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import BUDGETS, ROOT, STAGES, command, copy_of, here, manifest, metrics, snapshot
from safetensors.torch import load_file, save_file
from test_interruptions import FLAGS, before, lines, started, steps_of, when

from data.errors import NumericalError, ResourceError
from data.prepare import load_pairs
from data.tokenizer import Tokenizer
from model.parallel import World
from model.resume import Saving, checkpoints, faults, write_checkpoint

STAGE = ("--stage", "sft")


@pytest.fixture
def disk(tmp_path):
    """disk(MiB) -> a file system of that size."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"NOT TESTED HERE: mounting a tmpfs is refused ({done.stderr.strip()}); run this test as root on Linux")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place, leave=0):
    """Writes a file that leaves so many bytes."""
    (place / "ballast").write_bytes(b"\0" * (shutil.disk_usage(place).free - leave))


# ---- disks (cases 21 and 22)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_leaves_the_old_checkpoint_and_says_how_much_is_missing(disk, keep):
    place = disk(8)
    home, contents = place / "checkpoints", {"weights.safetensors": b"w" * 2**20, "best/model.safetensors": b"b" * 2**20}
    write_checkpoint(home, 1, contents, keep)
    state = snapshot(home)
    fill(place, leave=3 * 2**19)  # the first file fits, the second does not
    with pytest.raises(ResourceError, match=r"No space left on device.* takes 2,097,152 bytes, 1,[45]\d\d,\d\d\d are free") as stopped:
        write_checkpoint(home, 2, contents, keep)
    assert stopped.value.code == 6 and snapshot(home) == state and faults(home / "step-00000001") == []
    (place / "ballast").unlink()
    write_checkpoint(home, 2, contents, keep)
    write_checkpoint(home, 3, contents, keep)
    assert sorted(path.name for path in home.iterdir() if not faults(path)) == [path.name for path in checkpoints(home)]
    assert [path.name for path in checkpoints(home)] == ["step-00000002", "step-00000003"][-keep:]


def test_a_disk_that_fills_up_stops_the_run_which_goes_on_when_there_is_space(chain, disk):
    """Twelve snapshots and a growing metrics file meet a disk with room for the checkpoints alone."""
    place = disk(70)
    run = before(chain, place / "run", "sft")
    flags = (*STAGE, "--out", run, "--epochs", 1, "--validations", 12, "--patience", 99, "--save-every", 1)
    message = here(*flags, expect=6)
    assert re.search(r"error: .*No space left on device", message) and "the last checkpoint is" in message
    whole = [path for path in steps_of(run) if not faults(path)]
    assert whole and not list(run.rglob("*.tmp")) and not (run / "sft" / "manifest.json").exists()
    assert "is unfinished" in here("--stage", "rm", "--out", run, expect=2)
    subprocess.run(["mount", "-o", "remount,size=200m", place], check=True)
    here(*flags, "--resume")
    assert [line["step"] for line in metrics(run / "sft") if "grad_norm" in line] == list(range(24))


def test_too_little_space_is_seen_before_the_work(chain, disk):
    place = disk(40)
    run = before(chain, place / "run", "sft")
    state = snapshot(run)
    message = here(*STAGE, "--out", run, *FLAGS["sft"], expect=6)
    assert re.search(r"[\d,]+ bytes are free, 52,362,240 are needed for 935,040 parameters", message) and "--keep 1" in message
    assert snapshot(run) == state
    here(*STAGE, "--out", run, *FLAGS["sft"], "--save-every", 0)


def test_an_unwritable_place_is_seen_before_the_work(chain, disk):
    """By a real read-only file system, since root may write anywhere else."""
    place = disk(40)
    run = before(chain, place / "run", "sft")
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    message = here(*STAGE, "--out", run, *FLAGS["sft"], expect=6)
    assert "cannot be written (Read-only file system)" in message and "--out" in message and not (run / "sft").exists()
    assert "finished already" in here("--stage", "tokenizer", "--out", run)  # what is finished needs no writing


def test_a_folder_that_vanishes_stops_the_run(chain, tmp_path):
    run = before(chain, tmp_path / "run", "sft")
    process = started(*STAGE, "--out", run, "--epochs", 40, "--validations", 1)
    when(lambda: lines(run / "sft" / "metrics.jsonl") > 2, process)
    (run / "sft").rename(tmp_path / "away")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 6 and f"{run / 'sft'}: has vanished" in output
    assert not (run / "sft").exists()


# ---- memory (case 29)

STARVED = {"MORE": "4", "MALLOC_MMAP_THRESHOLD_": "65536"}  # MiB; and a tensor that is freed leaves no room that the next could take


@pytest.mark.parametrize(
    "stage, where, flags",
    [
        ("sft", "backward", ["--epochs", 2, "--batch-size", 64, "--micro-batch", 64, "--save-every", 1]),
        pytest.param("ppo", "rollout", ["--prompts-per-iteration", 64, "--micro-batch", 64, "--save-every", 1], marks=pytest.mark.slow),
    ],
)
def test_memory_that_runs_out_is_told_with_a_table(chain, tmp_path, stage, where, flags):
    run = before(chain, tmp_path / "run", stage)
    output = command("--stage", stage, "--out", run, *flags, program="tests/starved.py", env=STARVED | {"STARVED": where}, expect=6)
    assert "error: memory ran out" in output and "a smaller --micro-batch" in output
    table = re.findall(r"^ +([\d,.]+) MiB  (.+)$", output, re.MULTILINE)
    sizes = {part: float(size.replace(",", "")) for size, part in table}
    trained = next(size for part, size in sizes.items() if part.startswith("weights, trained"))
    assert trained == pytest.approx({"sft": 3.6, "ppo": 7.1}[stage], abs=0.1) and sizes["AdamW's moments"] == pytest.approx(2 * trained, abs=0.2)
    assert sum(sizes.values()) > 100
    last = steps_of(run, stage)[-1]
    assert faults(last) == [] and f"the last checkpoint is {last}" in output and not (run / stage / "manifest.json").exists()


# ---- numbers (case 15)


def test_a_reward_that_is_not_finite_is_told_with_its_rows(chain, tmp_path):
    """The reward model has a NaN in the row of one token, so only texts with that token are hit."""
    run = copy_of(chain, tmp_path / "run", "ppo")
    broken = Path(shutil.copytree(run / "rm", tmp_path / "broken"))
    (broken / "manifest.json").unlink()
    (broken / "flags.json").unlink()
    weights = load_file(broken / "model.safetensors")
    prompt = Tokenizer(run / "tokenizer" / "tokenizer.model").encode(load_pairs(run / "data", "validation")[0].prompt)
    weights["model.embed_tokens.weight"][prompt[len(prompt) // 2]] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    before_it = snapshot(run)
    message = here("--stage", "ppo", "--out", run, *BUDGETS["ppo"], "--reward-model", broken, expect=5)
    assert re.search(r"ppo, (validation after )?iteration -?\d+: .*score.* is not finite on rank 0; rows response \d+", message)
    dumped = Path(re.search(r"in (\S+failures\S+\.jsonl)", message)[1])
    rows = [json.loads(line) for line in dumped.read_text().splitlines()]
    assert rows and all(set(row) == {"id", "prompt", "response"} and "Human:" in row["prompt"] for row in rows)
    after = {name: digest for name, digest in snapshot(run).items() if not name.startswith(("failures", "ppo"))}
    assert after == before_it and not (run / "ppo" / "manifest.json").exists()


class Rows:
    def __init__(self, id):
        self.id = id


def test_rows_of_a_broken_number_are_written_with_what_describes_them(tmp_path):
    saving = Saving(failures=tmp_path / "failures", describe=lambda row: {"id": row.id, "prompt": "é"})
    error = saving.not_finite("sft, step 3", "loss", [Rows(f"row{i}") for i in range(7)], World(0, 1, torch.device("cpu"), torch.float32, "ddp"))
    assert isinstance(error, NumericalError) and "sft, step 3: loss is not finite on rank 0; rows row0, row1, row2, row3, row4, ..." in str(error)
    (path,) = (tmp_path / "failures").iterdir()
    assert str(path) in str(error) and [json.loads(line)["id"] for line in path.read_text().splitlines()] == [f"row{i}" for i in range(7)]


def test_a_pipe_that_is_closed_ends_the_program_with_one_line():
    program = "import sys; from model.parallel import exit_code; sys.exit(exit_code(lambda _: print('line\\n' * 100_000), []))"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()  # as `| head -1` does
        message = process.stderr.read()
    assert process.returncode == 141 and message.count("\n") == 1 and "nothing reads what is printed any more" in message


def test_every_stage_of_the_chain_is_still_whole(chain):
    """None of the tests above may have touched what they share."""
    for stage in STAGES:
        files = manifest(chain / stage)["files"]
        assert {name: digest for name, digest in snapshot(chain / stage).items() if name != "manifest.json"} == files
