"""What one process and several must agree on in PPO, run by each and written to a folder for test_ppo_ranks.py to compare.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/rl/ppo_ranks.py FOLDER

Every process runs everything, under DDP and under FSDP2; rank 0 writes.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from toy import CONFIG, FLAGS, SAMPLING, loud, prompts_of, with_values

from data.errors import NumericalError
from data.files import write_json
from data.run import Metrics
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel
from model.optim import make_optimiser
from model.parallel import DeviceFlags, bare, distribute, start, stop, whole
from rl.ppo import make_batch, moments_over_ranks, summary, train_ppo, update
from rl.rollout import roll_out

# Six ragged rows in minibatches of four and two: a process gets from none to three rows of one.
BASE = replace(
    FLAGS, lr=3e-4, critic="trunk", prompts_per_iteration=6, minibatch=4, micro_batch=1, value_coef=0.5, clip=0.5, warmup=0.4, validations=3, snapshots=False
)
CASES = {
    # The second round's KL is 0.26: near its target, so that the controller's error is not cut.
    "trunk": replace(BASE, kl_target=0.25, kl_horizon=60.0),
    "separate": replace(
        BASE, critic="separate", kl_placement="loss", kl_estimator="k2", bootstrap=True, entropy_coef=0.01, temperature=0.8, micro_batch=2
    ),
}
ROUNDS, SEED = 3, 6


def made(world, critic="trunk"):
    """Policy with critic, reference with the same weights, reward model; all on this world's processes."""
    policy, scorer = loud(LanguageModel, CONFIG), loud(ScalarModel, CONFIG, 2)
    model = PolicyWithCritic(policy, loud(ScalarModel, CONFIG, 2)) if critic == "separate" else with_values(policy)
    frozen = (distribute(m, world, frozen=True) for m in (loud(LanguageModel, CONFIG), scorer))
    return distribute(model, world), *frozen


def whole_weights(model):
    """Every weight, gathered, by name."""
    return {name: whole(parameter.detach()).clone() for name, parameter in bare(model).named_parameters()}


def train(world, folder, name):
    """Three rounds: metrics.jsonl, the last weights, the best validation."""
    flags = CASES[name]
    model, ref, reward_model = made(world, flags.critic)
    sampling, checks, kept = replace(SAMPLING, temperature=flags.temperature), prompts_of(4, seed=8), []

    def validate(step):
        keys = list(range(world.rank, len(checks), world.size))
        rollout, _ = roll_out(
            model, ref, reward_model, [checks[k] for k in keys], keys,
            seed=1, step=-1, sampling=sampling, micro_batch=2, world=world,
        )  # fmt: skip
        numbers = summary(rollout, world)
        return numbers | {"objective": numbers["score"]}

    best = train_ppo(
        model, ref, reward_model, prompts_of(10, seed=7), flags, sampling, same_start=True, seed=SEED, world=world,
        metrics=Metrics(folder / "metrics.jsonl" if world.is_main else None), validate=validate, keep=kept.append,
    )  # fmt: skip
    weights = whole_weights(model)
    checksum = sum(float(tensor.double().abs().sum()) for tensor in weights.values())
    if world.is_main:
        save_file(weights, folder / "weights.safetensors")
    agree = abs(float(world.total([checksum])[0]) - world.size * checksum) < 1e-9 * checksum
    return {"best": best, "kept": kept, "ranks_agree": agree}


def one_rollout(world):
    """Six rows with their advantages, put together from all processes; and how white each process's share is by itself."""
    model, ref, reward_model = made(world)
    prompts = prompts_of(6)
    keys = list(range(world.rank, 6, world.size))
    rollout, _ = roll_out(
        model, ref, reward_model, [prompts[k] for k in keys], keys, seed=3, step=0, sampling=SAMPLING, micro_batch=2, world=world
    )
    batch = make_batch(rollout, 0.05, BASE, world)
    table = np.zeros((2, 6, 32))
    for key, tokens, response_mask, advantages in zip(keys, rollout.tokens, rollout.response_mask, batch.advantages, strict=True):
        response = tokens[response_mask]
        table[0, key, : len(response)], table[1, key, : len(response)] = response, advantages[response_mask[1:]]
    tokens, advantages = world.total(table.ravel()).reshape(table.shape).tolist()
    _, mean, variance = moments_over_ranks(batch.advantages, rollout.mask, world)
    local = float(batch.advantages[rollout.mask].mean())
    return {"tokens": tokens, "advantages": advantages, "mean": float(mean), "variance": float(variance), "local_mean": local}


class BrokenOn(torch.nn.Module):
    """A reward model whose first score is nan on one process."""

    def __init__(self, model, here):
        super().__init__()
        self.model, self.here = model, here

    def forward(self, tokens, lengths):
        scores = self.model(tokens, lengths)
        return torch.where(torch.arange(len(scores)) == 0, math.nan, scores) if self.here else scores


def stop_on_nan(world):
    """A score, an advantage and a first ratio that are wrong on the last process alone stop all, with the weights as they were."""
    last, outcome = world.rank == world.size - 1, {}
    for what in ("score", "returns", "ratio"):
        model, ref, reward_model = made(world)
        before = whole_weights(model)
        keys = list(range(world.rank, 6, world.size))
        try:
            if what == "score":
                train_ppo(
                    model, ref, BrokenOn(reward_model, last), prompts_of(6), BASE, SAMPLING, same_start=True, seed=SEED, world=world,
                    metrics=Metrics(None), validate=lambda step: {"objective": 0.0}, keep=lambda name: None,
                )  # fmt: skip
            rollout, _ = roll_out(
                model, ref, reward_model, [prompts_of(6)[k] for k in keys], keys, seed=3, step=0, sampling=SAMPLING, micro_batch=2, world=world
            )
            batch = make_batch(rollout, 0.05, BASE, world)
            if last and what == "returns":
                batch.returns[batch.rollout.mask] = math.nan
            if last and what == "ratio":
                batch.rollout.logp[batch.rollout.mask] -= 0.01
            lengths = np.zeros(6)
            lengths[keys] = rollout.mask.sum(dim=1)
            update(
                model, make_optimiser(model, 1e-3, 0.0), batch,
                response_tokens=world.total(lengths), iteration=0, lr=1e-3, kl_coef=0.05, flags=replace(BASE, minibatch=6), seed=3, world=world,
            )  # fmt: skip
        except NumericalError as error:
            same = all(torch.equal(tensor, before[name]) for name, tensor in whole_weights(model).items())
            outcome[what] = {"stopped": float(world.total([1.0])[0]), "same_weights": same, "message": str(error)}
    return outcome


def everything(world, folder):
    """All of the above under one world; the results as one JSON file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in CASES:
        (folder / name).mkdir(exist_ok=True)
        results[name] = train(world, folder / name, name)
    results |= {"rollout": one_rollout(world), "nan": stop_on_nan(world)}
    if world.is_main:
        write_json(folder / "results.json", results)


def main():
    torch.set_num_threads(1)
    for parallel in ("ddp", "fsdp"):
        everything(start(DeviceFlags(device="cpu", parallel=parallel)), Path(sys.argv[1]) / parallel)
    dist.barrier()
    stop()


if __name__ == "__main__":
    main()
