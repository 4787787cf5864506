"""What the default chain costs: seconds and peak memory of each stage, in one table.

    python tests/bench/stages.py [--out FOLDER] [flags of train.py common to all stages, such as --data digest or --quick]

Each stage runs as a process of its own; seconds are of the whole process, start-up (importing torch) included; memory is the largest
resident set that the operating system counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from machine import machine  # noqa: E402

from data.report import markdown_table  # noqa: E402


def timed(*command: str) -> tuple[float, float]:
    """Runs a command; seconds, and peak resident memory in GiB. Raises SystemExit where it fails."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder of the run, which is kept (default: a temporary one)")
    flags, common = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = flags.out or temporary
        rows = []
        for stage in ("tokenizer", "sft", "rm", "split", "dpo", "ppo"):
            rows.append((stage, *timed("train.py", "--stage", stage, "--out", out, *common)))
        rows.append(("eval.py", *timed("eval.py", "--run", out, *(["--quick"] if "--quick" in common else []))))
    rows.append(("sum, and largest", sum(row[1] for row in rows), max(row[2] for row in rows)))
    print(f"{machine()}: train.py {' '.join(common) or 'with defaults'}\n")
    print(markdown_table(["stage", "seconds", "peak memory, GiB"], [(name, f"{s:.0f}", f"{gib:.2f}") for name, s, gib in rows]))


if __name__ == "__main__":
    main()
