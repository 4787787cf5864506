"""Runs several train.py commands one after another in the processes that torchrun started: one start-up for all of them.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/commands_on_ranks.py FILE     (a JSON list of argument lists)
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from model.parallel import stop

for arguments in json.loads(Path(sys.argv[1]).read_text()):
    train.main(arguments)
stop()
