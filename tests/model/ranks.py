"""What one process and several must agree on, run by each and written to a folder for test_parallel.py to compare.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/model/ranks.py FOLDER

Every process runs everything, under DDP and under FSDP2; rank 0 writes.
"""

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from small import CONFIG, PAD, SPECIAL, loud, ragged_rows, reference_sums, task
from torch.utils._python_dispatch import TorchDispatchMode

from data.errors import NumericalError, ResourceError
from data.files import write_json
from data.run import Metrics
from losses.dpo import dpo
from model import heads, resume
from model.checkpoint import open_model, save_model
from model.fit import FitFlags, evaluate, fit
from model.generate import generate, row_uniforms
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel
from model.objectives import preference_objective
from model.optim import make_optimiser
from model.parallel import DeviceFlags, bare, distribute, gathered, start, stop, whole
from model.resume import Saving
from model.score import reward_scores, to_tensors

FLAGS = FitFlags(lr=1e-4, epochs=1, batch_size=7, micro_batch=2, warmup=0.0, clip=0.5, validations=3, patience=9, snapshots=False)
STEPS = 3  # 19 rows: 7, 7 and 5
RESPONSE = 9


def train(world, folder, name):
    """Three steps of one stage on ragged rows, validated on 7: metrics.jsonl, the best validation and the last weights."""
    kind, rows, objective = task(name, 19)
    model = loud(kind, dataclasses.replace(CONFIG, tied=name == "sft"), seed=4)
    model = distribute(model, world)
    validation = [dataclasses.replace(row, id=f"validation {row.id}") for row in task(name, 7, seed=5)[1]]
    if name == "dpo":  # the reference is this very model, read just before, as when a stage begins
        ref = reference_sums(model, rows + validation, world)
        objective = preference_objective(partial(dpo, beta=0.3), 0.3, ref, PAD, world.device)
    metrics = Metrics(folder / "metrics.jsonl" if world.is_main else None)
    saved = []
    best = fit(
        model, objective, rows, validation, FLAGS, stage=name, seed=1, world=world, metrics=metrics,
        keep=lambda snapshot: saved.append(save_model(model, folder / "best", special_ids=SPECIAL, is_main=world.is_main)),
    )  # fmt: skip
    save_model(model, folder / "last", special_ids=SPECIAL, is_main=world.is_main)
    checksum = sum(float(whole(parameter.detach()).double().abs().sum()) for parameter in model.parameters())
    ranks_agree = abs(float(world.total([checksum])[0]) - world.size * checksum) < 1e-9 * checksum
    return {"best": best, "keeps": len(saved), "ranks_agree": ranks_agree}


def score(world):
    """Raw scores of 7 rows, which do not divide by two."""
    model = distribute(loud(ScalarModel), world, frozen=True)
    return reward_scores(model, ragged_rows(7), PAD, world, batch=2).tolist()


def prompts_and_end():
    """Two prompts and an end token: the first prompt's greedy response is that token alone, the second's never has it."""
    model, prompts = loud(LanguageModel).eval(), [list(row.prompt) for row in ragged_rows(20)]
    free = generate(model, prompts, max_new_tokens=RESPONSE, eos_id=-1, pad_id=PAD)
    spoken = [row[mask].tolist() for row, mask in zip(free.tokens, free.response_mask, strict=True)]
    return next(
        ([prompts[i], prompts[j]], spoken[i][0]) for i in range(20) for j in range(20) if spoken[i][0] not in spoken[j]
    )


class Gatherings(TorchDispatchMode):
    """Counts the operations that gather weights."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def sample(world):
    """Each process its share of two prompts, of which one ends at once and one never; greedy, and sampled; then a training forward."""
    model = distribute(PolicyWithCritic(loud(LanguageModel), None), world)
    prompts, end = prompts_and_end()
    made = {}
    for way in ("greedy", "sampled"):
        mine = list(range(2))[world.rank :: world.size]
        uniforms = None if way == "greedy" else row_uniforms(3, mine, RESPONSE)
        with gathered(model), Gatherings() as counted:
            found = generate(
                model, [prompts[i] for i in mine], max_new_tokens=RESPONSE, eos_id=end, pad_id=PAD, uniforms=uniforms, any_rank=world.any
            )
        made["gathers"] = counted.count
        table = [[0] * RESPONSE for _ in prompts]
        for i, row, mask in zip(mine, found.tokens, found.response_mask, strict=True):
            response = row[mask].tolist()
            table[i][: len(response)] = response
        made[way] = world.total([number for row in table for number in row]).reshape(2, RESPONSE).astype(int).tolist()
    made["shared_out"] = all(hasattr(p, "to_local") for p in model.parameters())
    tokens, mask = to_tensors(ragged_rows(3), PAD, world.device)
    scores = model(tokens, mask)
    (scores.logp.sum() + scores.values.sum()).backward()
    made["logp"] = scores.logp.detach().tolist()
    made["head_gradient"] = whole(bare(model).value_head.weight.grad).flatten().tolist()
    return made


def stop_on_nan(world):
    """A loss that is not finite on the last rank alone stops all, with the weights as they were; then the same for a gradient."""
    kind, rows, objective = task("rm", 7)
    last = world.rank == world.size - 1

    def broken_loss(model, part):
        total, metrics = objective.loss(model, part)
        return total * (math.nan if last and model.training else 1.0), metrics

    def broken_gradient(model, part):
        total, metrics = objective.loss(model, part)
        return total + total.sub(total.detach()).abs().pow(0.5 if last else 1.0), metrics  # adds 0, whose slope is infinite

    outcome = {}
    for name, loss in (("loss", broken_loss), ("gradient", broken_gradient)):
        model = distribute(loud(kind), world)
        before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
        try:
            broken = dataclasses.replace(objective, loss=loss)
            fit(model, broken, rows, rows, FLAGS, stage="rm", seed=0, world=world, metrics=Metrics(None), keep=lambda snapshot: None)
        except NumericalError as error:
            same = all(torch.equal(whole(p.detach()), old) for p, old in zip(model.parameters(), before, strict=True))
            outcome[name] = {"stopped": float(world.total([1.0])[0]), "same_weights": same, "message": str(error)}
    return outcome


def chunked(world):
    """Validation of 7 rows one by one, of which the second of two processes has 3, with logits in pieces."""
    heads.CHUNK, kept = 5, heads.CHUNK
    _, rows, objective = task("sft", 7)
    model = distribute(loud(LanguageModel), world)
    found = evaluate(model, objective, rows, 1, world)["loss"]
    heads.CHUNK = kept
    return found


def in_bf16(world):
    """One step with bf16 products; the scores stay float32."""
    world = dataclasses.replace(world, dtype=torch.bfloat16)
    kind, rows, objective = task("sft", 7)
    model = distribute(loud(kind), world)
    tokens, mask = to_tensors(rows, PAD, world.device)
    with world.autocast():
        logp = model(tokens, mask).logp
    flags = dataclasses.replace(FLAGS, validations=1)
    best = fit(model, objective, rows, rows, flags, stage="sft", seed=0, world=world, metrics=Metrics(None), keep=lambda snapshot: None)
    types = sorted({str(parameter.dtype) for parameter in model.parameters()})
    return {"logp": str(logp.dtype), "weights": types, "loss": best["loss"]}


def imported(world, folder):
    """A model read from disk to where it is to live, with activations computed again: scores, gradients, and the share of each process;
    then the same weights frozen, with bf16 products."""
    if world.is_main:
        save_model(loud(LanguageModel, dataclasses.replace(CONFIG, tied=True)), folder / "stored", special_ids=SPECIAL, is_main=True)
    world.barrier()
    model = distribute(open_model(folder / "stored", LanguageModel), dataclasses.replace(world, checkpoint_activations=True)).train()
    local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    tokens, mask = to_tensors(ragged_rows(5), PAD, world.device)
    model(tokens, mask).logp.sum().backward()
    gradients = {name: whole(p.grad).flatten()[:5].tolist() for name, p in bare(model).named_parameters()}
    half = dataclasses.replace(world, dtype=torch.bfloat16)
    frozen = distribute(open_model(folder / "stored", LanguageModel), half, frozen=True)
    with torch.no_grad(), half.autocast():
        in_bf16 = frozen(tokens, mask).logp.tolist()
    with torch.no_grad():
        logp = model(tokens, mask).logp.tolist()
    names = sorted(bare(model).state_dict())
    types = sorted({str(p.dtype) for p in frozen.parameters()})
    return {"local": local, "logp": logp, "gradients": gradients, "in_bf16": in_bf16, "names": names, "types": types}


def resting(world):
    """Scores of a frozen model that rests in the CPU's memory, and of one that does not; and whether FSDP2 was told."""
    made = []
    for offload in (False, True):
        world = dataclasses.replace(world, offload=offload)
        model = distribute(loud(ScalarModel), world, frozen=True)
        made.append(reward_scores(model, ragged_rows(7), PAD, world, batch=2).tolist())
    states = [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    told = [type(state._fsdp_param_group.offload_policy).__name__ for state in states]
    return {"present": made[0], "resting": made[1], "told": told}


def full_disk(world, folder):
    """A disk that refuses the second file of a checkpoint: the main process says so, and the others, which gather along, do not wait for it."""
    model, written, (plain, piece) = distribute(loud(LanguageModel), world), [], (resume.atomic_write, resume.PIECE)
    optimiser = make_optimiser(model, 1e-3, 0.0)

    def refusing(path, content):
        written.append(path)
        if len(written) == 2:
            raise ResourceError(f"{path}: cannot be written")
        plain(path, content)

    resume.atomic_write, resume.PIECE = refusing, 5000
    try:
        with Metrics(folder / "full" / "metrics.jsonl" if world.is_main else None) as metrics:
            Saving(folder / "full", world, every=1).after(1, model, optimiser, metrics, finished=False)
        told = ""
    except ResourceError as error:
        told = str(error)
    finally:
        resume.atomic_write, resume.PIECE = plain, piece
    together = int(world.total([1])[0])
    return {"told": told, "together": together, "left": [str(path) for path in (folder / "full" / "checkpoints").glob("*")]}


def everything(world, folder):
    """All of the above under one world; the results as one JSON file in `folder`."""
    results = {name: train(world, folder / name, name) for name in ("sft", "rm", "dpo")}
    results |= {"score": score(world), "sample": sample(world), "nan": stop_on_nan(world), "chunked": chunked(world)}
    results |= {"bf16": in_bf16(world), "imported": imported(world, folder), "resting": resting(world), "full": full_disk(world, folder)}
    if world.is_main:
        write_json(folder / "results.json", results)


def main():
    for parallel in ("ddp", "fsdp"):
        everything(start(DeviceFlags(device="cpu", parallel=parallel)), Path(sys.argv[1]) / parallel)
    dist.barrier()
    stop()


if __name__ == "__main__":
    main()
