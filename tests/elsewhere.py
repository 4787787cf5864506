"""train.py on a device that is not the CPU, where no such device is: a stand-in whose tensors compute on the CPU but say that they are elsewhere.

    python tests/elsewhere.py ARGS        as train.py ARGS, on the device "elsewhere"

An operation whose tensors are on both devices raises, as on a GPU; only copies and single numbers of the CPU may take part. (A GPU would also
take indices from the CPU, and wait for them.) What a GPU's own kernels compute, and how fast, this cannot show; tests/test_gpu.py can.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
MOVES = ("aten._to_copy", "aten.copy_")


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
torch.__future__.set_swap_module_params_on_conversion(True)  # else Module.to would make two parameters of a tied one
DEVICE = torch.device(NAME, 0)


class Elsewhere(torch.Tensor):
    """A tensor whose values are those of `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    """The operation on the inner tensors; what comes out is elsewhere, unless it was moved to the CPU."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    if not str(operation).startswith(MOVES) and any(isinstance(x, Elsewhere) for x in tensors):
        strangers = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
        if strangers:
            raise RuntimeError(f"{operation}: tensors on {NAME} and on {strangers[0].device}")
    asked = kwargs.get("device")
    to = asked.type if isinstance(asked, torch.device) else NAME
    outer = {id(x.inner): x for x in tensors if isinstance(x, Elsewhere)}

    def inside(x):
        return x.inner if isinstance(x, Elsewhere) else torch.device("cpu") if isinstance(x, torch.device) else x

    def outside(x):
        return outer[id(x)] if id(x) in outer else Elsewhere(x) if isinstance(x, torch.Tensor) and to == NAME else x

    return tree_map(outside, operation(*tree_map(inside, args), **tree_map(inside, kwargs)))


# Factories, and the copy within torch.tensor(..., device=...), do not ask any tensor's class.
everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
everything.fallback(lambda operation, *args, **kwargs: run(operation, args, kwargs), "PrivateUse1")
some.impl("_to_copy", lambda *args, **kwargs: run(torch.ops.aten._to_copy.default, args, kwargs), "PrivateUse1")

# Autocast by CUDA's lists (docs.pytorch.org/docs/stable/amp.html), as far as this program has their operations: products in bf16, sums and
# exponentials in fp32, all others as their inputs are.
IN_BF16 = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
IN_FP32 = (
    "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "prod", "exp", "expm1", "log", "log1p", "logsumexp", "rsqrt", "reciprocal",
    "pow.Tensor_Scalar", "softplus",
)  # fmt: skip
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def casting(operation, dtype):
    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    def call(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


for names, dtype in ((IN_BF16, torch.bfloat16), (IN_FP32, torch.float32)):
    for name in names:
        packet, _, overload = name.partition(".")
        some.impl(name, casting(getattr(getattr(torch.ops.aten, packet), overload or "default"), dtype), "AutocastPrivateUse1")
everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

if __name__ == "__main__":
    import train
    from model.parallel import exit_code, start

    train.start = lambda flags: dataclasses.replace(start(flags), device=DEVICE)
    torch.set_num_threads(1)
    sys.exit(exit_code(train.main, sys.argv[1:]))
