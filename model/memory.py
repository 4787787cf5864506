"""When memory runs out: a table of what holds how much, and which flags make it less."""

import gc
import mmap
import resource
import sys

import torch
from torch import nn

from data.errors import ResourceError

SAYINGS = ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")
RESERVE = mmap.mmap(-1, 2**25)  # addresses without memory behind them, given back when there is no more: telling of it takes some


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in the machine."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError | OSError) and any(saying in str(error) for saying in SAYINGS)


def shortage(error: BaseException) -> ResourceError:
    """What to tell of it: to be called while the failed call's objects still exist."""
    RESERVE.close()
    rows = [(part, size) for part, size in holdings() if size]
    table = "".join(f"\n  {size / 2**20:10,.1f} MiB  {part}" for part, size in rows)
    return ResourceError(
        f"memory ran out ({str(error).splitlines()[0][:200]})\nheld by this process:{table or ' nothing of ours'}\n"
        "less of it: a smaller --micro-batch (activations; results stay the same), --dtype bf16, --max-response or --max-prompt when the data is"
        " made, --offload (models that do not learn), --parallel fsdp with torchrun (weights, gradients, moments)"
    )


def holdings() -> list[tuple[str, int]]:
    """(what, bytes) of all models and optimisers there are, and of everything besides; the largest first."""
    things = gc.get_objects()
    modules = [thing for thing in things if issubclass(type(thing), nn.Module)]  # isinstance would wake lazy objects
    inner = {id(child) for module in modules for child in module.modules() if child is not module}
    parts: dict[str, int] = {}

    def add(part: str, tensors) -> None:
        parts[part] = parts.get(part, 0) + sum(held(tensor) for tensor in tensors)

    for module in modules:
        if id(module) not in inner:
            parameters = list(module.parameters())
            kind = "trained" if any(p.requires_grad for p in parameters) else "frozen"
            add(f"weights, {kind} {type(module).__name__}", parameters)
            add("gradients", [p.grad for p in parameters if p.grad is not None])
    for optimiser in [thing for thing in things if issubclass(type(thing), torch.optim.Optimizer)]:
        add("AdamW's moments", [value for state in optimiser.state.values() for value in state.values()])
    if torch.cuda.is_available():
        everything = torch.cuda.max_memory_allocated()
    else:
        everything = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parts["activations, caches and the program itself, at their peak"] = max(0, everything - sum(parts.values()))
    return sorted(parts.items(), key=lambda part: -part[1])


def held(tensor: torch.Tensor) -> int:
    """Bytes on this process."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.numel() * tensor.element_size()
