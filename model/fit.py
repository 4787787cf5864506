"""The one supervised loop: SFT, the reward model and DPO hand it what to minimise.

A step takes its rows in an order that is a function of (seed, stage, epoch), shares them out over processes and micro-batches, and
divides the summed loss by the count of the whole step, so the result depends on neither. Weights are kept where validation is best.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import share_out, step_indices
from data.errors import NumericalError
from data.flags import flag
from data.run import Metrics
from model.optim import clipped_step, lr_at, make_optimiser
from model.parallel import World, bar_if_slow, gradient_sync
from model.resume import Saving


@dataclass(frozen=True)
class FitFlags:
    lr: float | None = flag(None, "peak learning rate (default: by stage and model size, printed at the start)", positive=True)
    epochs: float = flag(1.0, "passes over the training rows; parts of one are possible", positive=True)
    batch_size: int | None = flag(None, "rows per optimiser step, over all processes (default: by stage and model size)", positive=True)
    micro_batch: int = flag(8, "rows per forward pass on one process; changes memory and speed, not results", positive=True)
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "AdamW's decay of the layers' matrices")
    clip: float = flag(1.0, "greatest norm of the whole gradient", positive=True)
    validations: int = flag(4, "how often at most, evenly, the validation rows are looked at, besides the start", positive=True)
    patience: int = flag(2, "stop after so many validations without a better one", positive=True)
    snapshots: bool = flag(True, "also keep the weights of every validation, in snapshot-STEP, for eval.py to look at")


@dataclass(frozen=True)
class Objective:
    """What the loop minimises.

    loss(model, rows) -> (sum of losses over the rows, {metric: sum over the rows}); weight(row): how much a row counts in the
    denominator of both (tokens for SFT, 1 for a pair).
    """

    loss: Callable[[nn.Module, Sequence], tuple[Tensor, dict[str, Tensor]]]
    weight: Callable[[object], int] = lambda row: 1


def train_step(
    model: nn.Module, objective: Objective, rows: Sequence, micro_batch: int, world: World, suspects: list | None = None
) -> dict[str, float]:
    """Gradients of the step's mean loss over all rows, processes and micro-batches; returns the mean loss and metrics.

    suspects: takes this process's rows whose micro-batch has a number that is not finite.
    """
    count = sum(objective.weight(row) for row in rows)
    sums: dict[str, float] = {}
    micro_batches = share_out(rows, world.rank, world.size, micro_batch)
    for index, part in enumerate(micro_batches):
        with gradient_sync(model, last=index + 1 == len(micro_batches)):
            with world.autocast():
                total, metrics = objective.loss(model, part or rows[:1])
            (total * (world.size / count if part else 0.0)).backward()
        add_up(sums, {"loss": total.detach(), **metrics}, bool(part))
        if suspects is not None and not all(math.isfinite(value) for value in (total.detach(), *metrics.values())):
            suspects += part
    return mean_over_ranks(sums, count, world)


@torch.no_grad()
def evaluate(model: nn.Module, objective: Objective, rows: Sequence, micro_batch: int, world: World) -> dict[str, float]:
    """Mean loss and metrics over rows, each counted once whatever the number of processes."""
    model.eval()
    sums: dict[str, float] = {}
    for part in bar_if_slow(share_out(rows, world.rank, world.size, micro_batch), "validation", world):
        with world.autocast():
            total, metrics = objective.loss(model, part or rows[:1])
        add_up(sums, {"loss": total, **metrics}, bool(part))
    return mean_over_ranks(sums, sum(objective.weight(row) for row in rows), world)


def add_up(sums: dict[str, float], values: dict[str, Tensor], real: bool) -> None:
    """Adds values to sums; a stand-in for an empty micro-batch, which is not real, adds its names with 0."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + (float(value) if real else 0.0)


def mean_over_ranks(sums: dict[str, float], count: int, world: World) -> dict[str, float]:
    """Sums of this process -> means over all processes."""
    totals = world.total(list(sums.values()))
    return {name: float(total) / count for name, total in zip(sums, totals, strict=True)}


def fit(
    model: nn.Module,
    objective: Objective,
    rows: Sequence,
    validation: Sequence,
    flags: FitFlags,
    *,
    stage: str,
    seed: int,
    world: World,
    metrics: Metrics,
    keep: Callable[[str], None],
    saving: Saving | None = None,
    at_first: Callable[[dict], None] = lambda numbers: None,
    at_validation: Callable[[dict, int], bool] = lambda numbers, step: False,
) -> dict[str, float]:
    """Trains `model`; keep("") saves it as the best so far by validation loss, keep("snapshot-...") as one of a series that ends with the
    last. The model as it came in counts as step -1.

    at_first(numbers) sees the first step's metrics before any weight moves; at_validation(numbers, step) may add to a validation's numbers and
    ends training by returning True, before keep(). Returns the best validation's numbers with its step. Raises NumericalError as soon as
    a loss or gradient is not finite, Interrupted after a signal.
    """
    saving = saving or Saving()
    optimiser = make_optimiser(model, flags.lr, flags.weight_decay)
    steps = list(step_indices(len(rows), flags.batch_size, flags.epochs, seed, stage))
    every = math.ceil(len(steps) / flags.validations)
    began = time.perf_counter()

    def look(step: int) -> tuple[dict[str, float], bool]:
        """Validation's numbers after `step`, and whether to stop."""
        checked = evaluate(model, objective, validation, flags.micro_batch, world)
        if not math.isfinite(checked["loss"]):
            advice = "those kept are good; try a smaller --lr" if step >= 0 else "the weights that it starts from are broken, or its rows; start from another model"
            raise NumericalError(f"{stage}, step {step}: the validation loss is {checked['loss']}; {advice}")
        stop = at_validation(checked, step)
        metrics.log(step=step, **{f"valid_{name}": value for name, value in checked.items()}, time=time.perf_counter() - began)
        return {**checked, "step": step}, stop

    def take(step: int, part: list) -> float:
        """One optimiser step on these rows, and its line; their mean loss."""
        where, suspects = f"{stage}, step {step}", []
        numbers = train_step(model, objective, part, flags.micro_batch, world, suspects)
        if not all(map(math.isfinite, numbers.values())):
            raise saving.not_finite(where, broken_names(numbers), suspects, world)
        if step == 0:
            at_first(numbers)
        lr = lr_at(step, len(steps), flags.lr, flags.warmup)
        try:
            norm = clipped_step(model, optimiser, lr, flags.clip, where)
        except NumericalError as error:
            raise NumericalError(f"{error}; rows {', '.join(row.id for row in part[:5])}, ...{saving.dump(where, part, world)}") from error
        metrics.log(step=step, **numbers, lr=lr, grad_norm=norm, time=time.perf_counter() - began)
        return numbers["loss"]

    state = saving.restore(model, optimiser, metrics)
    if not state:
        best, stop = look(-1)
        keep("")
        state = {"step": 0, "best": best, "since_best": 0, "finished": stop}
    taken, best, since_best, finished = (state[name] for name in ("step", "best", "since_best", "finished"))
    bar = tqdm(total=len(steps), initial=taken, desc=stage, disable=not world.is_main, mininterval=1.0)
    with bar, saving.heeding_signals():
        while not finished:
            model.train()
            bar.set_postfix(loss=f"{take(taken, [rows[i] for i in steps[taken]]):.4f}", refresh=False)
            taken, finished = taken + 1, taken + 1 == len(steps)
            bar.update()
            if taken % every == 0 or finished:
                checked, stop = look(taken - 1)
                if flags.snapshots:
                    keep(f"snapshot-{taken:05d}")
                since_best += 1
                if not stop and checked["loss"] < best["loss"]:
                    best, since_best = checked, 0
                    keep("")
                finished = finished or stop or since_best >= flags.patience
            saving.after(taken, model, optimiser, metrics, best=best, since_best=since_best, finished=finished)
    return best


def broken_names(numbers: dict[str, float]) -> str:
    """The names of those numbers that are not finite."""
    return ", ".join(name for name, value in numbers.items() if not math.isfinite(value))
