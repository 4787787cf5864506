"""`--plan` against what really lives: the largest sum of tensor bytes in real runs of every stage, within 15 %."""

import json
import random
import sys
from dataclasses import replace

import pytest
from peak import Peak
from runs import ROOT, STAGES, command, copy_of, here
from torch.utils.flop_counter import FlopCounterMode

from data.batches import PairRow, Row, encode_pairs
from data.files import write_json
from data.prepare import DataFlags, load_pairs
from data.tokenizer import Tokenizer
from model.checkpoint import config_to_json
from model.fit import train_step
from model.parallel import ALONE, DeviceFlags
from model.plan import ON_CPU, Counts, Job, flops, memory, need, plan_job, planned_config
from model.transformer import SIZES
from train import STAGE_FLAGS

sys.path.append(str(ROOT / "tests" / "model"))
from small import loud, task  # noqa: E402

LIMITS = {"max_prompt": 96, "max_response": 48}
STEPS = {
    "sft": {"epochs": 0.3, "validations": 1, "batch_size": 16, "micro_batch": 8, "lr": 1e-4},
    "rm": {"epochs": 0.3, "validations": 1, "batch_size": 16, "micro_batch": 8, "lr": 1e-5, "folds": 1},
    "dpo": {"epochs": 0.3, "validations": 1, "batch_size": 16, "micro_batch": 8, "lr": 1e-5, "part": "all"},
    "ppo": {"iterations": 2, "validations": 1, "prompts_per_iteration": 32, "minibatch": 16, "micro_batch": 8, "lr": 1e-5, "part": "all"},  # the second samples beside Adam's moments
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A chain on texts that fill --max-prompt and --max-response."""
    folder, numbers = tmp_path_factory.mktemp("plan"), random.Random(0)
    words = ["".join(numbers.choices("aeioubcdfgklmnprst", k=5)) for _ in range(400)]

    def text():
        return " ".join(numbers.choices(words, k=90))

    rows = [{"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}"} for _ in range(120)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = as_typed(LIMITS)
    here("--stage", "tokenizer", "--out", folder / "run", "--data", f"jsonl:{folder / 'rows.jsonl'}", *limits, "--vocab-size", 512)
    for stage in ("sft", "rm", "dpo"):
        here("--stage", stage, "--out", folder / "run", *as_typed(STEPS[stage] | {"epochs": 0.1}))
    return folder / "run"


def longest(run):
    """Tokens of the longest prompt and response: a little less than the limits."""
    tokenizer = Tokenizer(run / "tokenizer" / "tokenizer.model")
    rows, _ = encode_pairs(load_pairs(run / "data", "train"), tokenizer, *LIMITS.values())
    return {"max_prompt": max(len(row.chosen.prompt) for row in rows), "max_response": LIMITS["max_response"]}


CASES = [("sft", {}), ("sft", {"dtype": "bf16"}), ("rm", {"checkpoint_activations": True}), ("dpo", {"offload": True}), ("ppo", {"critic": "trunk"})]
SLOW = [(stage, extra) for stage in STEPS for extra in ({}, {"dtype": "bf16"}, {"checkpoint_activations": True}) if (stage, extra) not in CASES]
SLOW += [("ppo", {"offload": True}), ("ppo", {"entropy_coef": 0.01, "critic": "trunk"}), ("dpo", {"offload": True, "dtype": "bf16"}), ("rm", {"offload": True})]
SLOW += [("sft", {"micro_batch": 16}), ("ppo", {"prompts_per_iteration": 64, "micro_batch": 4, "dtype": "bf16"})]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


def as_typed(flags):
    return [part for name, value in flags.items() for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [value]))]


@pytest.mark.parametrize(("stage", "extra"), CASES, ids=lambda value: str(value))
def test_the_plan_is_what_a_real_run_holds(run, tmp_path, stage, extra):
    copy, given = copy_of(run, tmp_path / "run", *STAGES[STAGES.index(stage) :], "cache"), STEPS[stage] | extra  # DPO's reference reads anew
    own = {name: given.pop(name) for name in list(given) if name in ("dtype", "checkpoint_activations", "offload")}
    with Peak() as peak:
        here("--stage", stage, "--out", copy, *as_typed(given | own))
    flags = STAGE_FLAGS[stage][0](**given)
    config, pairs = planned_config(None, str(run / "sft"), ""), load_pairs(run / "data", "validation")
    job = plan_job(stage, config, flags, DeviceFlags(device="cpu", **own), DataFlags(**longest(run)), 1)
    if stage == "dpo":
        job = replace(job, samples=len(pairs))
    expected = need(memory(job))
    resting = sum(line.bytes for line in memory(job) if line.when == ON_CPU)  # here they are in the same memory
    assert max(expected.values()) + resting == pytest.approx(peak.most, rel=0.15), (expected, memory(job))
    assert bool(resting) == ("offload" in own)


@pytest.mark.slow
def test_the_plan_is_what_each_of_two_processes_holds(tmp_path):
    """Weights, gradients and optimiser state shared out or not, gathered weights, and gradients that wait for the last micro-batch."""
    command("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "tests/plan_on_ranks.py", tmp_path / "found.json", program="-m")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 8
    for case, (measured, planned) in found.items():
        assert planned == pytest.approx(measured, rel=0.15), case


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_operations_are_those_that_run(stage):
    kind, rows, objective = task(stage, 8)
    row = Row("", tuple(range(4, 24)), tuple(range(4, 16)))
    rows = [replace(row, id=r.id) if stage == "sft" else PairRow(r.id, replace(row, id=r.id), replace(row, id=r.id)) for r in rows]
    config = replace(SIZES["tiny"], vocab_size=61)
    with FlopCounterMode(display=False) as counter:
        train_step(loud(kind, config), objective, rows, 4, ALONE)
    job = Job(stage, config, 20, 12, batch=8, micro_batch=4)
    assert sum(flops(job).values()) == pytest.approx(counter.get_total_flops(), rel=0.05)


# ---- what it says


def plan(*args):
    return here("--stage", *args[:1], "--plan", "--size", "7b", *args[1:])


def test_7b_ppo_fits_on_eight_gpus_sharded_and_the_plan_says_so():
    assert "does not fit: it fits with --parallel fsdp\n" in plan("ppo", "--world", 8)
    trunk = "--critic trunk --value-coef 0.1"
    assert f"does not fit: it fits with --parallel fsdp {trunk}\n" in plan("ppo", "--world", 2, "--dtype", "bf16", "--offload", "--checkpoint-activations", "--micro-batch", 1)
    assert "usable GB: fits" in plan("ppo", "--world", 8, "--parallel", "fsdp", "--dtype", "bf16", "--checkpoint-activations")
    alone = plan("ppo", "--world", 1)
    assert "no flag makes it fit" in alone and "of the named sizes, 1 of them hold tiny, mini, small, base, 1b" in alone
    assert "--ppo-micro-batch 1" in plan("mpo", "--world", 1)


def test_the_arithmetic_of_the_large_items():
    """By hand: P = 6,738,415,616; 4 P = 26.95e9; 8 P = 53.91e9; their eighths 3.37e9 and 6.74e9; 2 P / 8 = 1.68e9."""
    lines = [line for line in plan("ppo", "--world", 8, "--parallel", "fsdp", "--dtype", "bf16").splitlines() if line.startswith("|")]
    said = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[3].strip() for line in lines}
    assert said["policy", "weights, fp32"] == "3.37" and said["policy", "optimiser state"] == "6.74"
    assert said["reference", "weights, bf16"] == "1.68"
    assert said["all", "cache"] == "1.88"  # 2 x 2 x 32 layers x 4096 x 224 slots x 16 rows


def test_frozen_models_on_the_cpu_leave_the_gpu_to_the_others():
    """By hand, 1 GPU, fp32: the update has neither reference nor reward model; PPO's samples are looked at by one of them at a time."""
    base = Job("ppo", SIZES["1b"], 128, 64, batch=16, micro_batch=16, samples=16)
    counts = Counts.of(SIZES["1b"])
    scalar = counts.model - 31_999 * 2048  # one row in place of the vocabulary's 32,000
    present, resting = need(memory(base)), need(memory(replace(base, offload=True)))
    assert present["update"] - resting["update"] == pytest.approx(4 * (counts.model + scalar))
    assert present["sampling"] - resting["sampling"] == pytest.approx(4 * scalar)
    sharded = replace(base, fsdp=True, world=8)
    present, resting = need(memory(sharded)), need(memory(replace(sharded, offload=True)))
    assert present["sampling"] - resting["sampling"] == pytest.approx(4 * (counts.model + scalar) / 8)
    assert "| on the CPU |" in plan("ppo", "--offload")


def test_planning_allocates_and_writes_nothing(tmp_path):
    with Peak() as peak:
        here("--stage", "mpo", "--plan", "--size", "7b", "--world", 64, "--parallel", "fsdp", "--out", tmp_path / "run")
    assert peak.most < 2**20 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "named"), [(["--world", 8], "--world"), (["--gpu-memory", 40], "--gpu-memory"), (["--size", "7b"], "--size")])
def test_flags_of_the_plan_are_refused_without_it(flags, named, tmp_path):
    assert f"{named}: is read with --plan alone" in here("--stage", "dpo", *flags, "--out", tmp_path / "run", expect=2)


def test_the_plan_of_a_model_from_elsewhere(tmp_path):
    write_json(tmp_path / "config.json", config_to_json(SIZES["1b"], scalar=False, bos_id=1, eos_id=2, pad_id=0))
    assert "1,100,048,384 parameters" in here("--stage", "mpo", "--plan", "--init", tmp_path)
    assert "1,100,048,384 parameters" in here("--stage", "dpo", "--plan", "--init", tmp_path)
    assert "[rm] trains nothing" in here("--stage", "rm", "--plan", "--reward-model", tmp_path)
    assert f"those of {tmp_path} have 1,100,048,384" in here("--stage", "ppo", "--plan", "--size", "tiny", "--reward-model", tmp_path)
