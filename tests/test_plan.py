"""`--plan` against what really lives: the largest sum of tensor bytes in real runs of every stage, within 15 %."""

import json
import random
from dataclasses import replace

import pytest
from peak import Peak
from runs import STAGES, copy_of, here

from data.batches import encode_pairs
from data.prepare import DataFlags, load_pairs
from data.tokenizer import Tokenizer
from model.parallel import DeviceFlags
from model.plan import memory, need, plan_job, planned_config
from train import STAGE_FLAGS

LIMITS = {"max_prompt": 96, "max_response": 48}
STEPS = {
    "sft": {"epochs": 0.3, "validations": 1, "batch_size": 16, "micro_batch": 8, "lr": 1e-4},
    "rm": {"epochs": 0.3, "validations": 1, "batch_size": 16, "micro_batch": 8, "lr": 1e-5, "folds": 1},
    "dpo": {"epochs": 0.3, "validations": 1, "batch_size": 16, "micro_batch": 8, "lr": 1e-5, "part": "all"},
    "ppo": {"iterations": 1, "validations": 1, "prompts_per_iteration": 32, "minibatch": 16, "micro_batch": 8, "lr": 1e-5, "part": "all"},
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


CASES = [("sft", {}), ("sft", {"dtype": "bf16"}), ("rm", {"checkpoint_activations": True}), ("dpo", {"dtype": "bf16"}), ("ppo", {})]
CASES += [("ppo", {"critic": "separate"})]
SLOW = [(stage, extra) for stage in STEPS for extra in ({}, {"dtype": "bf16"}, {"checkpoint_activations": True}) if (stage, extra) not in CASES]
SLOW += [("sft", {"micro_batch": 16}), ("ppo", {"prompts_per_iteration": 64, "micro_batch": 4, "dtype": "bf16"})]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


def as_typed(flags):
    return [part for name, value in flags.items() for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [value]))]


@pytest.mark.parametrize(("stage", "extra"), CASES, ids=lambda value: str(value))
def test_the_plan_is_what_a_real_run_holds(run, tmp_path, stage, extra):
    copy, given = copy_of(run, tmp_path / "run", *STAGES[STAGES.index(stage) :]), STEPS[stage] | extra
    own = {name: given.pop(name) for name in list(given) if name in ("dtype", "checkpoint_activations")}
    with Peak() as peak:
        here("--stage", stage, "--out", copy, *as_typed(given | own))
    flags = STAGE_FLAGS[stage][0](**given)
    config, pairs = planned_config(None, str(run / "sft"), ""), load_pairs(run / "data", "validation")
    job = plan_job(stage, config, flags, DeviceFlags(**own), DataFlags(**longest(run)), 1)
    if stage == "dpo":
        job = replace(job, samples=len(pairs))
    expected = need(memory(job))
    assert max(expected.values()) == pytest.approx(peak.most, rel=0.15), (expected, memory(job))
