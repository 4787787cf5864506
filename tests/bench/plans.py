"""What 7B and 1B runs would need by `--plan`, as the page tests/results/plan.md.

    python tests/bench/plans.py > tests/results/plan.md
"""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = "--parallel fsdp --dtype bf16"
PAGE = f"""# What a run would need, before it is paid for

Printed by `python tests/bench/plans.py`, which runs the commands below; no GPU was involved. The arithmetic is held against the bytes of all
tensors in real runs on CPUs of one and two processes, within 15 % (`tests/test_plan.py`): fp32 and bf16, DDP and FSDP2, with activations
kept and computed again. What a GPU's own kernels take beside tensors is not in it; 8 % of the memory is left for that.

## PPO with 7B models on 8 x 80 GB

As it is, with DDP in fp32, every process would hold everything:

$ --stage ppo --plan --size 7b --world 8

Shared out with FSDP2 and in bf16 it fits, with room for longer rows where activations are computed again:

$ --stage ppo --plan --size 7b --world 8 {SHARED}

$ --stage ppo --plan --size 7b --world 8 {SHARED} --checkpoint-activations --max-prompt 1024 --max-response 512 --micro-batch 4

## On 1 x 80 GB

16 bytes for each of 6.7 billion parameters that learn are 108 GB before anything else: PPO with 7B models is not possible there, and SFT is not, either:

$ --stage ppo --plan --size 7b --world 1 --dtype bf16 --checkpoint-activations --micro-batch 1 --offload

With reference and reward model in the CPU's memory between uses, and the value head on the policy's trunk, two such GPUs hold it:

$ --stage ppo --plan --size 7b --world 2 {SHARED} --checkpoint-activations --micro-batch 1 --offload --critic trunk --value-coef 0.1

$ --stage sft --plan --size 7b --world 1 --dtype bf16 --checkpoint-activations --micro-batch 1

The whole chain with 1B models is:

$ --stage mpo --plan --size 1b --world 1 --dtype bf16

## The other stages with 7B models on 8 x 80 GB

$ --stage mpo --plan --size 7b --world 8 {SHARED} --checkpoint-activations"""

for line in PAGE.splitlines():
    if not line.startswith("$ "):
        print(line)
        continue
    print(f"`python train.py {line[2:]}`", flush=True)
    subprocess.run([sys.executable, "train.py", *shlex.split(line[2:])], cwd=ROOT, check=True, stdout=sys.stdout)
