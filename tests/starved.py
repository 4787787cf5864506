"""train.py in a process whose memory is limited (RLIMIT_AS) once a moment has come, for tests of how it ends.

STARVED=rollout python tests/starved.py ARGS        some MiB more than it has when the first round of PPO begins
STARVED=backward python tests/starved.py ARGS       when the first backward pass of SFT's third step begins
"""

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import rl.ppo
import train
from model.parallel import exit_code

WHERE, MORE, calls = os.environ["STARVED"], int(os.environ.get("MORE", 8)) * 2**20, 0


def starve():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE, resource.RLIM_INFINITY))


def starving(function, at):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            starve()
        return function(*args, **kwargs)

    return call


torch.set_num_threads(1)
if WHERE == "rollout":
    rl.ppo.roll_out = starving(rl.ppo.roll_out, 2)
else:
    torch.Tensor.backward = starving(torch.Tensor.backward, 3)
sys.exit(exit_code(train.main, sys.argv[1:]))
