"""train.py under torchrun with something wrong on the last rank alone, for tests of how all ranks end.

BROKEN=raise:40 torchrun ... tests/broken_rank.py ARGS      the 40th layer's forward pass raises
BROKEN=hang:40                                              it never returns
BROKEN=nan:40                                               from there on all hidden states are NaN
BROKEN=exit:40                                              the process is gone, as by a kill; where ONCE names a file, only while there is none
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from model.parallel import exit_code
from model.transformer import Layer

HOW, AT = os.environ["BROKEN"].split(":")
LAST = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
ONCE = Path(os.environ.get("ONCE", os.devnull))
plain, calls = Layer.forward, 0


def forward(self, *args, **kwargs):
    global calls
    calls += 1
    states = plain(self, *args, **kwargs)
    if not LAST or calls < int(AT) or ONCE.is_file():
        return states
    if HOW == "nan":
        return states * math.nan
    if HOW == "raise":
        raise ValueError("broken on purpose")
    if HOW == "exit":
        if ONCE != Path(os.devnull):
            ONCE.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


torch.set_num_threads(1)
Layer.forward = forward
sys.exit(exit_code(train.main, sys.argv[1:]))
