"""Peaks of tensor bytes of a few SFT steps on each of several processes, and what the plan says; for test_plan.py, which starts it under torchrun.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/plan_on_ranks.py FILE      FILE: the list of results, as JSON
"""

import itertools
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent / "model")]

from peak import Peak
from small import CPU, PAD, Row, loud

from model.fit import train_step
from model.heads import LanguageModel
from model.objectives import sft_objective
from model.optim import clipped_step, make_optimiser
from model.parallel import DeviceFlags, distribute, start, stop
from model.plan import Job, memory, need
from model.transformer import SIZES

ROWS = [Row(str(row), tuple(range(4, 44)), tuple(range(4, 24))) for row in range(16)]


def measured(parallel: str, dtype: str, batch: int) -> tuple[int, float]:
    """Bytes at most in two steps of an optimiser that has its state, in micro-batches of 4; and the plan's."""
    flags = DeviceFlags(device="cpu", dtype=dtype, parallel=parallel, checkpoint_activations=batch > 8)
    world = start(flags)
    with Peak() as peak:
        model = distribute(loud(LanguageModel, SIZES["tiny"]), world).train()
        optimiser = make_optimiser(model, 1e-3, 0.0)
        for step in range(3):
            peak.most = peak.most if step else 0
            train_step(model, sft_objective(PAD, CPU, False), ROWS[:batch], 4, world)
            clipped_step(model, optimiser, 1e-3, 1.0, "")
            peak.most = 0 if not step else peak.most
    job = Job("sft", SIZES["tiny"], 40, 20, batch, 4, world=2, bf16=dtype == "bf16", on_cpu=True, fsdp=parallel == "fsdp", checkpoint=batch > 8)
    return peak.most, need(memory(job))["update"]


found = {" ".join(map(str, case)): measured(*case) for case in itertools.product(("fsdp", "ddp"), ("fp32", "bf16"), (8, 16))}
if start(DeviceFlags(device="cpu")).is_main:
    Path(sys.argv[1]).write_text(json.dumps(found))
stop()
