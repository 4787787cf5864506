"""One process or many: start-up under torchrun, DDP or FSDP2 around a model, and sums over processes.

`torchrun --nproc_per_node N train.py ...` sets RANK and WORLD_SIZE; without them there is one process and nothing here communicates.
Losses are divided by counts of the whole optimiser step before `backward`. DDP and FSDP2 average gradients over processes, so a loss is
multiplied by their number first: the sum over processes comes out.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.errors import ResourceError, Stop, UsageError
from data.flags import flag
from model.memory import is_shortage, shortage
from model.transformer import Layer, Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GO_ON = "a stage that was begun goes on with --resume, a grid with the same command"


@dataclass(frozen=True)
class ProcessFlags:
    device: str = flag("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    rank_timeout: int = flag(600, "seconds that processes wait for one of them before all end", positive=True)


@dataclass(frozen=True)
class TrainingFlags(ProcessFlags):
    dtype: str = flag("fp32", "what matrix products run in; weights and optimiser stay fp32", choices=("fp32", "bf16"))
    parallel: str = flag("ddp", "how several processes share a model", choices=("ddp", "fsdp"))
    checkpoint_activations: bool = flag(False, "keep one tensor per layer for the backward pass and compute the others again")
    compile: bool = flag(False, "compile layers, which takes a C++ compiler and a minute or two per stage; changes roundings alone")


@dataclass(frozen=True)
class DeviceFlags(TrainingFlags):
    offload: bool = flag(False, "keep models that do not learn (reference, reward model) in the CPU's memory between uses")


FEWER = {"tokenizer": ProcessFlags, "split": ProcessFlags, "sft": TrainingFlags}  # of stages without a network, and without a frozen one


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    parallel: str
    checkpoint_activations: bool = False
    offload: bool = False
    compiled: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, values) -> np.ndarray:
        """Element-wise sum over processes of a flat list or array of numbers, in float64."""
        values = np.asarray(values, dtype=np.float64)
        if self.size == 1:
            return values
        tensor = torch.from_numpy(values.copy()).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def any(self, statement: bool) -> bool:
        """Whether the statement holds on some process."""
        return bool(self.total([statement])[0])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def autocast(self):
        """Matrix products in bf16 where asked for; fp32 weights stay as they are."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


ALONE = World(0, 1, torch.device("cpu"), torch.float32, "ddp")  # one process on the CPU


def start(flags: DeviceFlags) -> World:
    """Joins the process group that torchrun announces, if any; raises UsageError where the device is not there."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible; use --device cpu")
    if flags.parallel == "fsdp" and size == 1 and "RANK" not in os.environ:
        raise UsageError("--parallel fsdp: needs torchrun, as in: torchrun --nproc_per_node 2 train.py ...")
    if flags.compile and not shutil.which(compiler := os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        raise UsageError(f"--compile: there is no {compiler}, with which torch compiles; install it, name another by CXX, or leave the flag out")
    kind = "cuda" if flags.device != "cpu" and torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    elif flags.dtype == "bf16" and rank == 0 and torch.backends.cpu.get_cpu_capability() == "AVX2":  # the processor's newest
        print("warning: --dtype bf16: this processor has no products in bf16 and can take 20 times as long as in fp32 (tests/results/speed.md)", file=sys.stderr)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=flags.rank_timeout))
    return World(rank, size, device, DTYPES[flags.dtype], flags.parallel, flags.checkpoint_activations, flags.offload, flags.compile)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def fill(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, with values for all parameters that have none yet (meta): one after the other each is read from disk by
    the `read` that `open_model` left on its part, cut to this process's share where it is sharded, and cast. So memory holds the
    parameters and one tensor more. Tied ones stay one."""
    for part in [module for module in model.modules() if hasattr(module, "read")]:
        placed = {}
        for name, empty in list(part.named_parameters(remove_duplicate=False)):
            if id(empty) not in placed:
                values = part.read(name)
                if hasattr(empty, "placements"):
                    from torch.distributed.tensor import distribute_tensor  # here, as below

                    values = distribute_tensor(values, empty.device_mesh, empty.placements, src_data_rank=None)
                values = values.to(device, empty.dtype, copy=True, memory_format=torch.contiguous_format)
                placed[id(empty)] = empty, nn.Parameter(values, requires_grad=empty.requires_grad)
            owner, _, leaf = name.rpartition(".")
            setattr(part.get_submodule(owner), leaf, placed[id(empty)][1])
        del part.read  # and with it the mapped files
    return model.to(device)


def exit_code(program: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Runs a program to its end: 0, or the code of the `Stop` whose message it prints; what is neither that nor a shortage of memory nor the
    end of another process is a defect, and is raised.

    torchrun notes which process failed first, and prints that one's error last, after it has ended the others.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record  # here, since it takes time that most runs need not spend

        program = record(partial(patient, program))
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    try:
        program(arguments)
        sys.stdout.flush()  # where a pipe was closed, the error comes here and not after the end
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds to print
        print(f"error: {rank}nothing reads what is printed any more (a closed pipe); {GO_ON}", file=sys.stderr)
        return 141  # as shells have it
    except KeyboardInterrupt:
        print(f"error: {rank}interrupted; {GO_ON}", file=sys.stderr)
        return 130
    except Exception as error:
        stopped = error if isinstance(error, Stop) else shortage(error) if is_shortage(error) else lost_contact(error)
        if stopped is None:
            raise
        print(f"error: {rank}{stopped}", file=sys.stderr)
        return stopped.code
    finally:
        stop()


def patient(program: Callable[[list[str]], None], arguments: list[str]) -> None:
    """The program; where it stops because another process did, torchrun is given time to see that one's end first."""
    try:
        program(arguments)
    except Exception as error:
        if lost_contact(error):
            time.sleep(5)
        raise


def lost_contact(error: Exception) -> ResourceError | None:
    """What to say of an error that comes from another process's end or silence; None for any other."""
    if not dist.is_initialized() or not any(word in str(error) for word in ("gloo", "NCCL", "Connection", "timed out", "Timed out", "Timeout")):
        return None
    return ResourceError(
        f"another process has ended, or was silent for --rank-timeout ({str(error).splitlines()[0][:200]}); its own error is the cause"
    )


def distribute(model: nn.Module, world: World, *, frozen: bool = False) -> nn.Module:
    """The model on this process's device, under DDP or FSDP2 where torchrun started us. A frozen one takes no gradients, and where products
    run in bf16 holds what they read in bf16: the same numbers in half the memory; with --offload it rests in the CPU's memory (`at_hand`)."""
    model.requires_grad_(not frozen)
    half, sharded = world.dtype == torch.bfloat16, dist.is_initialized() and world.parallel == "fsdp"
    for trunk in [module for module in model.modules() if isinstance(module, Transformer)]:
        trunk.checkpoint_activations = world.checkpoint_activations and not frozen
    if world.compiled:
        compile_layers(model)
    if frozen and half:
        hold_in_bf16(model, everything=sharded)
    resting = frozen and world.offload
    home, pinned = torch.device("cpu") if resting else world.device, world.device.type == "cuda"  # a GPU reads pinned memory several times as fast
    if not sharded:
        model = fill(model, home)
        for parameter in model.parameters() if resting and pinned else ():
            parameter.data = parameter.data.pin_memory()
        if frozen or not dist.is_initialized():
            return model
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)  # without a second copy of the gradients
    # Here, since this takes a second that most runs need not spend.
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # What comes into a layer is not cast: its states are bf16 as it is, and its rotary angles must stay fp32.
    precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False) if half else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy(pin_memory=pinned) if resting else OffloadPolicy()
    for layer in [module for module in model.modules() if isinstance(module, Layer)]:
        fully_shard(layer, mp_policy=precision, offload_policy=offload)
    # By default the outermost part stays gathered after a forward without backward (validation, sampling), and `parameters()` would then
    # show copies that no optimiser should be given.
    return fill(fully_shard(model, mp_policy=precision, offload_policy=offload, reshard_after_forward=True), home)


def compile_layers(model: nn.Module) -> None:
    """All layers run the same code, in some ten forms (with a gradient and without, of prompts, of one token ...) at any lengths. Past the limit
    torch would go on uncompiled."""
    torch._dynamo.config.recompile_limit = 64
    for layer in [module for module in model.modules() if isinstance(module, Layer)]:
        layer.compile(dynamic=True)


def hold_in_bf16(model: nn.Module, everything: bool) -> None:
    """Casts a model that will not be trained: everything, as FSDP2 computes with bf16 parameters alone; else the matrices of products, as
    autocast would at each use. What autocast leaves in fp32 stays: norms, embeddings (a tied output with them), and heads of one number."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        product = isinstance(module, nn.Linear) and module.out_features > 1 and id(module.weight) not in embeddings
        if everything or product:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()


def bare(model: nn.Module) -> nn.Module:
    """The model inside DDP's wrapper. FSDP2 has no wrapper, so its models stay as they are."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool):
    """Gradients travel between processes only in the last micro-batch of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


@contextlib.contextmanager
def gathered(model: nn.Module):
    """Inside, a sharded model's weights stay gathered once they are: sampling goes through them once per token, and would otherwise gather
    them as often. Changes nothing of any other model."""
    sharded = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@contextlib.contextmanager
def at_hand(model: nn.Module, world: World):
    """Inside, a frozen model that rests in the CPU's memory has a copy of its weights on the device (on a CPU as well, where tests see it).
    FSDP2 brings them by itself, layer by layer."""
    by_itself = hasattr(model, "set_reshard_after_forward")
    resting = {p: p.data for p in model.parameters()} if world.offload and not by_itself else {}
    try:
        for parameter, values in resting.items():
            parameter.data = values.to(world.device, copy=True, non_blocking=True)
        yield
    finally:
        for parameter, values in resting.items():
            parameter.data = values


def bar_if_slow(rows: Sequence, what: str, world: World) -> tqdm:
    """The rows with a bar that the main process shows once they have taken two seconds, and takes away after them."""
    return tqdm(rows, desc=what, leave=False, delay=2, disable=not world.is_main, mininterval=1.0)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective call), any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
