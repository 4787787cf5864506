"""What a benchmark was run on: the line that stands above its tables."""

import datetime
import platform
from pathlib import Path
from types import ModuleType

import torch


def machine(device: str = "cpu", *peers: ModuleType) -> str:
    """Date, processor and what its products can use, threads, or the GPU; versions, of the peers too."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
        flags = next((line.split() for line in info.read_text().splitlines() if line.startswith("flags")), []) if info.exists() else []
        bf16 = "AMX" if "amx_bf16" in flags else "AVX-512 with bf16" if "avx512_bf16" in flags else "no bf16"
        hardware = f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {bf16}, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__} | {peer.__name__: peer.__version__ for peer in peers} | {"Python": platform.python_version()}
    return f"{datetime.date.today()}, {hardware}, " + ", ".join(f"{name} {version}" for name, version in versions.items())
