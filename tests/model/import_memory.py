"""Makes a synthetic checkpoint in bf16 or imports it as a frozen model; prints anonymous memory. For test_import.py, each in a process of its own.

    python tests/model/import_memory.py make FOLDER SIZE        writes files of about 256 MB
    python tests/model/import_memory.py import FOLDER           bytes: of the weights, before, at most, after
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from safetensors.torch import save_file

from data.files import weight_files, write_json
from model.checkpoint import config_to_json, open_model, to_hugging_face
from model.heads import LanguageModel
from model.parallel import World, distribute
from model.transformer import SIZES

BF16 = World(0, 1, torch.device("cpu"), torch.bfloat16, "ddp")


def make(folder: Path, size: str) -> None:
    config = SIZES[size]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LanguageModel(config).state_dict().items()}
    weight_map, group, names = {}, {}, list(shapes)
    folder.mkdir(parents=True)
    for name in names:
        group |= to_hugging_face({name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02}, config)
        if name == names[-1] or sum(tensor.nbytes for tensor in group.values()) > 2**28:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(group, folder / file)
            weight_map |= dict.fromkeys(group, file)
            group = {}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config_to_json(config, scalar=False, bos_id=1, eos_id=2, pad_id=0))


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Two numbers, of anonymous bytes: before, and the most until the block ends."""
    numbers, done = [anonymous()] * 2, threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            numbers[1] = max(numbers[1], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield numbers
    finally:
        done.set()
        watcher.join()
        numbers[1] = max(numbers[1], anonymous())


def read(folder: Path) -> None:
    opened = open_model(folder, LanguageModel)  # reads nothing, but its meta tensors make torch import more of itself
    with watched() as numbers:
        model = distribute(opened, BF16, frozen=True)
    held = sum(parameter.nbytes for parameter in model.parameters())
    print(sum(path.stat().st_size for path in weight_files(folder)), *numbers, anonymous(), held)


if __name__ == "__main__":
    make(Path(sys.argv[2]), sys.argv[3]) if sys.argv[1] == "make" else read(Path(sys.argv[2]))
