"""Largest sum of the bytes of all tensors that live at one time, as seen by every operation: what a device's memory must hold."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """`with Peak() as peak: ...`; peak.most is in bytes, of tensors made inside."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.see(getattr(tensor, "_local_tensor", tensor).untyped_storage())
        return made

    def see(self, storage):
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = weakref.ref(storage, lambda _, key=key: self.forget(key)), storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)

    def forget(self, key):
        self.now -= self.sizes.pop(key)[1]
