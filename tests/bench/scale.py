"""PPO with sharded models on up to thousands of simulated processes: what each would hold and exchange, counted on one CPU.

    python tests/bench/scale.py > tests/results/scale.md

The program itself runs, as the first process of a group whose collectives do nothing (torch's fake process group), on numbers that are not
there (fake tensors: shapes alone). Ids, masks and lengths are real, so that everything that depends on them goes the way it goes in a run.
"""

import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401: says which shapes collectives return
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.report import markdown_table  # noqa: E402
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel  # noqa: E402
from model.optim import make_optimiser  # noqa: E402
from model.parallel import World, distribute, stop  # noqa: E402
from model.plan import Counts, Job, flops  # noqa: E402
from model.transformer import SIZES, ModelConfig  # noqa: E402
from rl.ppo import Batch, PpoFlags, update  # noqa: E402
from rl.rollout import Rollout, Sampling, roll_out, sample  # noqa: E402

aten = torch.ops.aten
COLLECTIVES = {  # operation -> what it is, and which of its arguments is all that is exchanged
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
}


class Simulated(TorchDispatchMode):
    """Inside, tensors of floating-point numbers that are made have shapes and no numbers. `count` and `bytes` of collectives by kind; the bytes
    are those of the whole tensor that is gathered or reduced."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.count, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operations on this process's share, collectives among them
        kwargs, name = kwargs or {}, function._schema.name
        if detect_fake_mode():
            return function(*args, **kwargs)  # DTensor asks what shapes come of it
        if name in COLLECTIVES:
            kind, place = COLLECTIVES[name]
            self.count[kind] += 1
            self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tree_iter(args[place]))
        if function is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.0 if args[0].is_floating_point() else 0  # every loss, norm and log ratio is 0
        if function is aten.index.Tensor:  # a mask is real, so what it picks has a known number of rows
            args = (args[0], [part for index in args[1] for part in as_integers(index)])
        if not any(isinstance(value, Tensor) for value in tree_iter((args, kwargs))) and makes_floats(name, kwargs):
            with self.fake:
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def as_integers(index: Tensor | None) -> list[Tensor | None]:
    """An index by a mask, as the indices of what it picks."""
    return list(index.nonzero().unbind(1)) if index is not None and index.dtype == torch.bool else [index]


def makes_floats(name: str, kwargs: dict) -> bool:
    """Whether an operation without tensors among its arguments makes floating-point numbers."""
    usual = torch.float32 if name in ("aten::empty", "aten::zeros", "aten::ones") else torch.int64
    return (kwargs.get("dtype") or usual).is_floating_point


@dataclass(frozen=True)
class Found:
    """What the first process holds, in bytes by component, and what it exchanges: phase -> kind of collective -> (how many, bytes)."""

    held: dict[str, int]
    exchanged: dict[str, dict[str, tuple[int, int]]]


def simulate(config: ModelConfig, size: int, prompt: int, response: int, samples: int, minibatch: int, micro_batch: int) -> Found:
    """The PPO stage with `size` processes under FSDP2 in bf16, with activations computed again: one round's sampling, with two tokens per response,
    its looks, and one optimiser step on rows of full length. samples and minibatch are over all processes, of which each has as many."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # returns a view, which nothing writes to
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    world, rows = World(0, size, torch.device("cpu"), torch.bfloat16, "fsdp", checkpoint_activations=True), samples // size
    try:
        with Simulated() as simulated:
            policy = distribute(PolicyWithCritic(opened(LanguageModel, config), None), world)
            frozen = {"reference": LanguageModel, "reward model": ScalarModel}
            frozen = {name: distribute(opened(kind, config), world, frozen=True) for name, kind in frozen.items()}
            optimiser = make_optimiser(policy, 1e-6, 0.0)
            prompts, keys, seen = [[1] * prompt] * rows, list(range(rows)), {}

            def counted(phase: str, run) -> None:
                before = simulated.count.copy(), simulated.bytes.copy()
                run()
                count, size = simulated.count - before[0], simulated.bytes - before[1]
                seen[phase] = {kind: (count[kind], size[kind]) for kind in count}

            for tokens in (1, 2):
                how = Sampling(tokens, 1.0, 1.0, eos_id=2, pad_id=0, score_mean=0.0, score_std=1.0)
                counted(f"{tokens} tokens", lambda how=how: sample(policy, prompts, keys, 0, how, world))
            both = {"seed": 0, "step": 0, "sampling": how, "micro_batch": micro_batch, "world": world}
            counted("round", lambda: roll_out(policy, *frozen.values(), prompts, keys, **both))
            batch, lengths = full_batch(minibatch // size, prompt, response), np.full(minibatch, response)
            flags = PpoFlags(lr=1e-6, passes=1, minibatch=minibatch, micro_batch=micro_batch, target_kl=None)
            step = {"response_tokens": lengths, "iteration": 0, "lr": 1e-6, "kl_coef": 0.1, "flags": flags, "seed": 0, "world": world}
            counted("optimiser step", lambda: update(policy, optimiser, batch, **step))
        exchanged = {
            "first token": seen["1 tokens"],
            "each further token": less(seen["2 tokens"], seen["1 tokens"]),
            "looks": less(seen["round"], seen["2 tokens"]),
            "optimiser step": seen["optimiser step"],
        }
        moments = [value for state in optimiser.state.values() for value in state.values() if value.dim()]
        held = {"policy": bytes_of(policy.parameters()), "optimiser state": bytes_of(moments)}
        return Found(held | {name: bytes_of(model.parameters()) for name, model in frozen.items()}, exchanged)
    finally:
        stop()


def opened(kind, config: ModelConfig):
    """What `open_model` gives, with no file behind it."""
    with torch.device("meta"):
        model = kind(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.read = lambda name: torch.empty(shapes[name])
    return model


def full_batch(rows: int, prompt: int, response: int) -> Batch:
    """Rows of full length, for an update that has nothing to learn."""
    width, tokens = prompt + response, torch.ones(rows, prompt + response, dtype=torch.long)
    mask, ones, zeros = (torch.arange(width) >= prompt).expand(rows, -1), torch.ones(rows, dtype=torch.bool), torch.zeros(rows, width - 1)
    rollout = Rollout(tokens, mask, ones, torch.full((rows,), width), zeros[:, 0], zeros[:, 0], zeros, zeros, zeros, torch.zeros(rows, width))
    return Batch(rollout, zeros, zeros)


def less(more: dict, fewer: dict) -> dict:
    """The collectives of one count that are not those of the other."""
    left = {kind: tuple(a - b for a, b in zip(more[kind], fewer.get(kind, (0, 0)), strict=True)) for kind in more}
    return {kind: pair for kind, pair in left.items() if pair[0]}


def bytes_of(tensors) -> int:
    """Of this process's shares."""
    return sum(share.numel() * share.element_size() for share in (tensor.to_local() for tensor in tensors))


# ---- the page

PROMPT, RESPONSE, MICRO_BATCH = 160, 64, 16  # the data's limits by default
COMPUTE, MEMORY, LINK, HOP = 400e12, 3e12, 200e9, 5e-6  # assumed: operations, bytes read and bytes exchanged per second; seconds per step of a ring
PAGE = """# PPO with 7B models on 8, 64 and 1,024 processes, simulated

Printed by `python tests/bench/scale.py` on one CPU in {minutes:.0f} minutes. The program's own sampling, looks and update ran as the first process of each
group, with collectives that do nothing and tensors that have a shape and no numbers; what it held and what it exchanged was counted
(`tests/test_scale.py` derives the same counts of a small model by hand). No GPU was involved: **seconds on this page are arithmetic on assumed
speeds, bytes and counts are not**. The value head is on
the policy's trunk (`--critic trunk`). FSDP2, bf16, activations computed again; prompts of {prompt} and responses of {response} tokens, {micro} rows in a micro-batch.

## What a process holds

{held}

The last column is what `--plan` takes for the policy, 4 P / N. The first process holds a little more, because FSDP2 gives out whole rows of a
matrix: 2 x 11,008 rows are 21.5 for each of 1,024 processes, so the first has 22, and all are padded to that before an exchange.

## What it exchanges

{exchanged}

One gathering for each of 32 layers and one for embedding, output and heads, for each time that the weights are read: once when prompts are read, never
for a further token (the policy stays gathered while samples are drawn), three times for the looks of policy, reference and reward model, twice in an
optimiser step, forward and backward; there gradients are reduced once, in fp32. Bytes are of the whole tensor, of which a process receives the share
(N - 1) / N. They do not depend on the batch while one micro-batch holds a process's rows; each further micro-batch gathers again, and gradients wait
for the last. The sums are: whether any response goes on, a step's metrics, its first ratios and its gradient's norms.

## What to expect

Assumed, not measured: 400 TFLOP/s, 3 TB/s from a GPU's memory, 200 GB/s in a collective (eight network cards of 400 Gb/s per node), 5 microseconds
per step of a ring. Exchange and computing overlap, so the longer one counts. One pass over the samples.

{expected}

- **Batch.** A step of 64 rows is one row for each of 64 processes; with more, some would have none, and `--prompts-per-iteration` must be a multiple
  of their number. Beyond 64 processes the batch has to grow, and learning rate and number of rounds with it: no such run was made.
- **All-gather.** A process receives the same bytes however many there are, while its computing shrinks with its rows. Exchange takes as long as
  computing at {even} rows per process
  in an optimiser step. With fewer, more processes do not make a step faster; from a thousand on the steps of the ring weigh more than its bytes.
  Sharding within groups of processes, with copies between them (hybrid sharding), would be the remedy; it is not here.
- **Generation.** Each process reads all {weights:.1f} GB of its gathered weights per token, {token:.1f} milliseconds, whether it has 16 rows or one. More processes
  draw more responses in the same time, not the same responses in less. Those {weights:.1f} GB beside the shards are also what bounds the cache. Tensor
  parallelism or an engine of its own for sampling would be the remedies; neither is here.
"""


def expected(config: ModelConfig, size: int, samples: int, minibatch: int, found: Found) -> dict[str, float]:
    """Seconds of one round by its parts, and of computing and exchange in one optimiser step."""
    job = Job("ppo", config, PROMPT, RESPONSE, minibatch, MICRO_BATCH, samples=samples, world=size, bf16=True, fsdp=True, checkpoint=True)
    work = {name: operations / size / COMPUTE for name, operations in flops(job).items()}
    sampling, looks, updates = work.values()
    ring = {name: sum(b * (size - 1) / size / LINK + n * (size - 1) * HOP for n, b in kinds.values()) for name, kinds in found.exchanged.items()}
    per_token = gathered_bytes(found) / MEMORY + 2 * np.log2(size) * HOP  # a small sum goes through a tree
    step, steps = updates * minibatch / samples, samples // minibatch
    return {
        "generation": max(sampling, ring["first token"]) + (RESPONSE - 1) * per_token,
        "looks": max(looks, ring["looks"]),
        "updates": steps * max(step, ring["optimiser step"]),
        "computing": step,
        "exchange": ring["optimiser step"],
        "token": per_token,
    }


def gathered_bytes(found: Found) -> int:
    return found.exchanged["first token"]["all-gather"][1]


def gb(size: float) -> str:
    return f"{size / 1e9:.3f}"


def main() -> None:
    began, config, worlds = time.perf_counter(), SIZES["7b"], (8, 64, 1024)
    found = {n: simulate(config, n, PROMPT, RESPONSE, max(128, n), max(64, n), MICRO_BATCH) for n in worlds}
    parameters = Counts.of(config).model
    held = [(n, *map(gb, found[n].held.values()), gb(4 * parameters / n)) for n in worlds]
    kinds = ("all-gather", "reduce-scatter", "all-reduce")
    exchanged = [
        (f"{phase}, N = {n}", *(f"{count} of {gb(size)} GB" if size > 1e6 else f"{count} of {size} bytes" if count else "" for count, size in pairs))
        for phase in found[8].exchanged
        for n in worlds
        for pairs in [[found[n].exchanged[phase].get(kind, (0, 0)) for kind in kinds]]
    ]
    times, rate = [], {}
    for n, samples, minibatch in ((8, 128, 64), (64, 128, 64), (64, 1024, 512), (1024, 1024, 1024), (1024, 16_384, 8192)):
        seconds = expected(config, n, samples, minibatch, found[n])
        rate[n, samples] = samples / n / sum(seconds[part] for part in ("generation", "looks", "updates"))
        shown = (f"{seconds[part]:.2f}" for part in ("generation", "looks", "updates", "computing", "exchange"))
        times.append((n, samples, minibatch, *shown, f"{rate[n, samples]:.2f}", f"{rate[n, samples] / rate[8, 128]:.0%}"))
    one_row = {n: expected(config, n, n, n, found[n]) for n in worlds}
    print(
        PAGE.format(
            minutes=(time.perf_counter() - began) / 60, prompt=PROMPT, response=RESPONSE, micro=MICRO_BATCH,
            held=markdown_table(["N", "policy, fp32, GB", "Adam's moments, GB", "reference, bf16, GB", "reward model, bf16, GB", "4 P / N, GB"], held),
            exchanged=markdown_table(["what, all together", *kinds], exchanged),
            expected=markdown_table(
                ["N", "samples", "rows per step", "generation, s", "looks, s", "updates, s", "a step: computing, s", "exchange, s",
                 "samples per second and GPU", "of N = 8"], times),
            even=", ".join(f"{one_row[n]['exchange'] / one_row[n]['computing']:.0f} (N = {n})" for n in worlds),
            weights=gathered_bytes(found[8]) / 1e9, token=1000 * gathered_bytes(found[8]) / MEMORY,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
