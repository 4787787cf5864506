"""AdamW, the learning rate's course and its default by model size, and the clipped step that refuses to be taken on numbers that are not finite."""

import dataclasses
import math

import torch
from torch import nn

from data.errors import NumericalError
from model.parallel import whole

SIZE_LIMITS = (3e6, 3e7, 3e8, 3e9, float("inf"))  # parameters below; what suits a small model from scratch would wreck a large one
FINAL = 0.02  # of the peak learning rate, after the end
BY_SIZE = {
    "sft": {"lr": (4e-3, 1e-3, 3e-4, 2e-5, 1e-5), "batch_size": (8, 16, 32, 64, 64)},
    "rm": {"lr": (5e-4, 2e-4, 5e-5, 1e-5, 5e-6), "batch_size": (8, 16, 32, 64, 64)},
    "dpo": {"lr": (5e-5, 2e-5, 5e-6, 1e-6, 5e-7), "batch_size": (16, 16, 32, 64, 64)},
    "ppo": {"lr": (3e-4, 1e-4, 2e-5, 3e-6, 1e-6)},
}


def make_optimiser(model: nn.Module, lr: float, weight_decay: float, critic_lr: float | None = None) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with betas (0.9, 0.99), eps 1e-8, one fused kernel per step. Only the matrices inside
    the layers decay: small embeddings and output rows would leave some probability to every token of the vocabulary. critic_lr: of PPO's
    separate critic, whose rate keeps this proportion to lr in every step (None: as lr)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.dim() >= 2 and ".layers." in f".{name}" else 0.0
            times = critic_lr / lr if critic_lr and ".critic." in f".{name}" else 1.0
            groups.setdefault((decay, times), []).append(parameter)
    made = [{"params": parameters, "weight_decay": decay, "times": times} for (decay, times), parameters in groups.items()]
    return torch.optim.AdamW(made, lr=lr, betas=(0.9, 0.99), fused=True)


def for_size(stage: str, flags, parameters: int):
    """The flags with the stage's learning rate and batch size for a model of that size, where none was given."""
    column = next(index for index, limit in enumerate(SIZE_LIMITS) if parameters < limit)
    missing = {name: values[column] for name, values in BY_SIZE[stage].items() if getattr(flags, name) is None}
    return dataclasses.replace(flags, **missing)


def lr_at(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of `total` steps, then a cosine (Loshchilov and Hutter, arXiv 1608.03983) towards FINAL
    times the peak, which the step after the last would have. step counts from 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    return peak * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress)))


def clipped_step(model: nn.Module, optimiser: torch.optim.Optimizer, lr: float, clip: float, where: str) -> float:
    """Clips the global gradient norm, steps, clears gradients; returns the norm before clipping. A group of the optimiser with `times` steps at
    so many times lr.

    Raises NumericalError, weights untouched, when the norm is not finite; `where` names stage and step.
    """
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = float(whole(total))
    if not math.isfinite(norm):
        broken = [name for name, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(whole(p.grad)).all())]
        raise NumericalError(f"{where}: the gradient is not finite in {', '.join(broken[:3]) or 'its norm'}; try a smaller learning rate")
    if norm > clip:  # below it the product would be with 1
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, total)
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("times", 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm
