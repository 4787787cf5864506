"""Largest sum of the bytes of all tensors that live at one time, as seen by every operation: what a device's memory must hold."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """`with Peak() as peak: ...`; peak.most is in bytes, of tensors made inside. Storages are asked for their size after every operation, for
    FSDP2 empties some without giving them back; of a sharded tensor the process's own part counts."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                key = storage._cdata
                if key not in self.storages:
                    self.storages[key] = weakref.ref(storage, lambda _, key=key: self.storages.pop(key))
        living = (storage() for storage in list(self.storages.values()))
        self.most = max(self.most, sum(storage.nbytes() for storage in living if storage is not None))
        return made
