"""How near training and decoding come to what this machine can do, and what each dimension costs.

    python tests/bench/limits.py [--repeats 5] [--threads N] [--dtype fp32] [--device cpu] [--size 1b] [--rows 16]

Peak is the best rate of a product of two large square matrices, bandwidth that of adding up 1 GiB. Operations of a training step (language-model
loss on responses, backward, AdamW) are counted by torch's FlopCounterMode, which on CPUs leaves attention out and on GPUs does not, those of
decoding as 2 per weight and token; decoding reads all weights and the cache once per step. Memory is the largest sum of bytes of tensors made in
a step, weights not among them. Each row changes one thing of the first; decoding has four times --rows. --size measures one of the program's
sizes alone.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from machine import machine  # noqa: E402
from peak import Peak  # noqa: E402

from data.report import markdown_table  # noqa: E402
from model.generate import generate  # noqa: E402
from model.heads import LanguageModel  # noqa: E402
from model.optim import clipped_step, make_optimiser  # noqa: E402
from model.transformer import SIZES, ModelConfig, initialise  # noqa: E402

BASE = ModelConfig(vocab_size=4096, width=256, layers=8, heads=8, kv_heads=8, feed_forward=704, context=2048)
PROMPT, RESPONSE = 64, 64
CHANGES = {
    "16 layers": {"layers": 16},
    "width 512": {"width": 512, "feed_forward": 1408},
    "width 1024": {"width": 1024, "feed_forward": 2816, "heads": 16, "kv_heads": 16},
    "twice the rows": {"times rows": 2},
    "four times the rows": {"times rows": 4},
    "prompts of 256": {"prompt": 256},
    "responses of 256": {"response": 256},
}


def seconds(work, repeats: int, device: str) -> float:
    """Median seconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def mib(work) -> float:
    """Of the tensors that a call makes, as many as live at a time."""
    with Peak() as peak:
        work()
    return peak.most / 2**20


def autocast(flags: argparse.Namespace):
    return torch.autocast(flags.device, torch.bfloat16, enabled=flags.dtype == "bf16")


def peak_rate(flags: argparse.Namespace) -> float:
    """Operations per second of a product of two large square matrices."""
    side, dtype = 2048 if flags.device == "cpu" else 8192, torch.bfloat16 if flags.dtype == "bf16" else torch.float32
    square = torch.randn(side, side, dtype=dtype, device=flags.device)
    return 2 * side**3 / min(seconds(lambda: square @ square, 1, flags.device) for _ in range(5))


def training(config: ModelConfig, rows: int, prompt: int, response: int, flags: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds, MiB and operations of one step."""
    model = LanguageModel(config)
    initialise(model, 0)
    model.to(flags.device)
    optimiser = make_optimiser(model, 1e-4, 0.0)
    tokens = torch.randint(4, config.vocab_size, (rows, prompt + response), generator=torch.Generator().manual_seed(0)).to(flags.device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, prompt:] = True

    def step() -> None:
        with autocast(flags):
            loss = -model(tokens, mask).logp.sum() / (rows * response)
        loss.backward()
        clipped_step(model, optimiser, 1e-4, 1.0, "here")

    with FlopCounterMode(display=False) as counter:
        step()
    return seconds(step, flags.repeats, flags.device), mib(step), counter.get_total_flops()


def decoding(config: ModelConfig, rows: int, prompt: int, response: int, flags: argparse.Namespace) -> tuple[float, float, float, float]:
    """Seconds, MiB, operations and bytes read of drawing `response` tokens for each of `rows` prompts, which are read first."""
    model = LanguageModel(config).eval()
    initialise(model, 0)
    model.to(flags.device)
    prompts = torch.randint(4, config.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0)).tolist()

    def draw() -> None:
        with torch.no_grad(), autocast(flags):
            generate(model, prompts, max_new_tokens=response, eos_id=-1, pad_id=3)

    layers, head = sum(p.numel() for p in model.trunk.layers.parameters()), config.width * config.vocab_size
    size = 2 if flags.dtype == "bf16" else 4
    cached = rows * sum(range(prompt, prompt + response)) * 2 * config.layers * config.kv_heads * config.head_size
    operations = 2 * rows * ((prompt + response) * layers + response * head)
    return seconds(draw, flags.repeats, flags.device), mib(draw), operations, size * (response * (layers + head) + cached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--rows", type=int, default=16)
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    peak, gib = peak_rate(flags), torch.ones(2**28, device=flags.device)  # touched: new pages would be counted as slow memory
    bandwidth = 2**30 / min(seconds(gib.sum, 1, flags.device) for _ in range(5))
    del gib
    print(f"{machine(flags.device)}, {flags.dtype}: {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    base = SIZES[flags.size] if flags.size else BASE
    changes = {} if flags.size else CHANGES
    for name, measure, rows in (("A training step", training, flags.rows), ("Decoding", decoding, 4 * flags.rows)):
        table, first = [], None
        for what, change in {"": {}, **changes}.items():
            shape = {"rows": rows * change.get("times rows", 1), "prompt": change.get("prompt", PROMPT), "response": change.get("response", RESPONSE)}
            config = replace(base, **{key: value for key, value in change.items() if hasattr(base, key)})
            took, memory, operations, *read = measure(config, **shape, flags=flags)
            first = first or (took, operations)
            new = shape["rows"] * (shape["response"] + (shape["prompt"] if measure is training else 0))
            table.append([what or "{rows} rows of {prompt}+{response} tokens".format(**shape), f"{took * 1000:.0f}", f"{new / took:.0f}",
                          f"{operations / took / peak:.0%}", *(f"{bytes_read / took / bandwidth:.0%}" for bytes_read in read),
                          f"{memory:.0f}", f"{took / first[0]:.2f}", f"{operations / first[1]:.2f}"])  # fmt: skip
        columns = ["tokens/s", "of peak"] if measure is training else ["new tokens/s", "of peak", "of bandwidth"]
        print(f"\n{name}: {base.layers} layers of width {base.width}, vocabulary {base.vocab_size}\n")
        print(markdown_table(["", "ms", *columns, "MiB", "time against the first", "operations"], table))


if __name__ == "__main__":
    main()
