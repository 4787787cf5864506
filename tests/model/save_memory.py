"""A sharded model with its optimiser's state is saved and read back; prints what each process needed in memory. For test_resume.py.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/model/save_memory.py FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from import_memory import watched

from data.run import Metrics
from model import resume
from model.heads import LanguageModel
from model.optim import make_optimiser
from model.parallel import DeviceFlags, distribute, start, stop
from model.resume import Saving
from model.transformer import SIZES

folder = Path(sys.argv[1])
resume.PIECE = 2**24
world = start(DeviceFlags(device="cpu", parallel="fsdp"))
model = distribute(LanguageModel(replace(SIZES["small"], layers=3)), world)
optimiser = make_optimiser(model, 1e-3, 0.0)
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimiser.step()
optimiser.zero_grad()
before = [parameter.to_local().clone() for parameter in model.parameters()]
with Metrics(folder / "metrics.jsonl" if world.is_main else None) as metrics:
    for again in (False, True):  # the first time, torch imports more of itself
        with watched() as saving:
            Saving(folder, world, every=1).after(1, model, optimiser, metrics, finished=False)
        world.barrier()
        for parameter in model.parameters():
            parameter.data.to_local().zero_()
        with watched() as reading:
            Saving(folder, world, every=1).restore(model, optimiser, metrics)
assert all(torch.equal(parameter.to_local(), old) for parameter, old in zip(model.parameters(), before, strict=True))
print(f"needed: {saving[1] - saving[0]} {reading[1] - reading[0]}")
stop()
