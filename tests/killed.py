"""train.py in a process that ends itself with SIGKILL at a chosen moment, for tests of --resume.

    KILL=disk:17 python tests/killed.py ARGS        dies just before the 17th write, rename, flush or removal of a file
    KILL=work:230 python tests/killed.py ARGS       dies just before the 230th layer's forward pass, or optimiser step
    KILL=after:0 python tests/killed.py ARGS        is not killed; its last line tells how many such moments there were

KEEP_CHECKPOINTS=1 leaves the checkpoints of finished stages, so that optimiser states can be compared.
"""

import builtins
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from data.run import Metrics
from model.parallel import exit_code
from model.transformer import Layer

KIND, AT = os.environ.get("KILL", "after:0").split(":")
COUNTS = {"disk": 0, "work": 0}


def counted(kind, function):
    """The function, counted as a moment of this kind; the process dies where it is the chosen one."""

    def call(*args, **kwargs):
        COUNTS[kind] += 1
        if kind == KIND and COUNTS[kind] == int(AT):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def keeps_checkpoints(function):
    return lambda path, *args, **kwargs: None if Path(path).name == "checkpoints" else function(path, *args, **kwargs)


torch.set_num_threads(1)
for module, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "unlink"), (Metrics, "log"), (Metrics, "go_back")):
    setattr(module, name, counted("disk", getattr(module, name)))
shutil.rmtree = counted("disk", keeps_checkpoints(shutil.rmtree) if os.environ.get("KEEP_CHECKPOINTS") else shutil.rmtree)
plain_open = builtins.open
builtins.open = lambda *args, **kwargs: (counted("disk", plain_open) if set("wax") & set("".join(map(str, args[1:2]))) else plain_open)(
    *args, **kwargs
)
Layer.forward = counted("work", Layer.forward)
torch.optim.AdamW.step = counted("work", torch.optim.AdamW.step)

code = exit_code(train.main, sys.argv[1:])
print(f"moments: disk {COUNTS['disk']}, work {COUNTS['work']}")
sys.exit(code)
