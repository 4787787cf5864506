"""Where a step's time goes, operation by operation: the profile behind every aim of speed.md that is not met.

    python tests/bench/operations.py [--repeats 5] [--dtype fp32] [--threads N] [--device cpu] [--size 1b] [--only WORD]

A DPO step on 16 pairs whose reference is known, what PPO's update does with 16 responses of 64+64 tokens and a critic of its own, decoding 64 rows of
64+64 tokens, all at 8.4M parameters or a --size of the program's; and steps of the default chain, a million parameters: of SFT, which takes 2,488 (8 rows
of 45 tokens), of a reward model (8 pairs), of PPO (16 responses). torch's profiler tells operations apart; shares are of the time of all, and what no
operation accounts for is Python's and autograd's (on a GPU: what it waits for them). Peak: see limits.py.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from limits import autocast, peak_rate
from machine import machine
from packing import CONFIG, PAD, VOCAB, random_pairs
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.report import markdown_table  # noqa: E402
from losses.reward import reward_loss  # noqa: E402
from model.generate import generate  # noqa: E402
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel  # noqa: E402
from model.optim import clipped_step, make_optimiser  # noqa: E402
from model.score import pair_logps, pair_tensors  # noqa: E402
from model.transformer import SIZES, initialise, sized  # noqa: E402

KINDS = {  # the first that has a word of an operation's name
    "attention's kernel": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "products with weights": ("aten::mm", "aten::addmm", "mkldnn", "onednn", "gemm", "cutlass"),
    "products with the cache": ("aten::bmm", "aten::baddbmm"),
    "optimiser, clipping": ("adamw", "_foreach_", "linalg_vector_norm"),
    "copies, indices": ("copy_", "cat", "index", "gather", "scatter", "fill", "zero", "clone", "where", "embedding", "nonzero", "slice_backward"),
    "element by element": ("aten::", "elementwise", "reduce", "softmax"),
}


def kind_of(operation: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), "Python, autograd")


def training(model: torch.nn.Module, loss: Callable[[], torch.Tensor], flags: argparse.Namespace) -> Callable[[], None]:
    """A step with its backward pass and optimiser."""
    optimiser = make_optimiser(model.to(flags.device).train(), 1e-5, 0.0)

    def step() -> None:
        with autocast(flags):
            value = loss()
        value.backward()
        clipped_step(model, optimiser, 1e-5, 1.0, "here")

    return step


def steps(flags: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What is profiled, by name."""
    config, tiny = SIZES[flags.size] if flags.size else CONFIG, sized("tiny", 1024)
    policy, writer, both = LanguageModel(config), LanguageModel(config), PolicyWithCritic(LanguageModel(config), ScalarModel(config))
    small, judge, pair = LanguageModel(tiny), ScalarModel(tiny), PolicyWithCritic(LanguageModel(tiny), ScalarModel(tiny))
    for model in (policy, writer, both.policy, both.critic, small, judge, pair.policy, pair.critic):
        initialise(model, 0)
    pairs, few, device = random_pairs(16, 96, 64), random_pairs(8, 40, 24, vocab=1024), torch.device(flags.device)
    writer.to(device).eval()
    prompts = torch.randint(4, VOCAB, (64, 64), generator=torch.Generator().manual_seed(0)).tolist()

    def rows(count: int, prompt: int, response: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(4, 1024, (count, prompt + response), device=device)
        return tokens, (torch.arange(prompt + response, device=device) >= prompt).expand(tokens.shape)

    def preference() -> torch.Tensor:  # in two micro-batches, as dpo.py
        return sum(reward_loss(*pair_logps(policy, part, PAD, device).unbind(dim=1)).sum() for part in (pairs[:8], pairs[8:])) / 16

    def reward() -> torch.Tensor:
        tokens, parts = pair_tensors(few, PAD, device)
        return reward_loss(*judge(tokens, parts=parts).unbind(dim=1)).mean()

    def update(model: PolicyWithCritic, response: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        scores = model(*response, with_entropy="value")
        return (scores.values[:, :-1] - scores.logp).mean()

    def decode() -> None:
        with torch.no_grad(), autocast(flags):
            generate(writer, prompts, max_new_tokens=64, eos_id=-1, pad_id=PAD)

    demonstrations = rows(8, 29, 16)
    made = {
        "DPO": training(policy, preference, flags),
        "PPO's update": training(both, partial(update, both, rows(16, 64, 64)), flags),
        "decoding": decode,
        "SFT of a million parameters": training(small, lambda: -small(*demonstrations).logp.mean(), flags),
        "reward model of a million": training(judge, reward, flags),
        "PPO's update of a million": training(pair, partial(update, pair, rows(16, 29, 16)), flags),
    }
    return {name: step for name, step in made.items() if flags.only in name}


def shares(step: Callable[[], None], flags: argparse.Namespace) -> tuple[float, int, int, int, dict[str, float]]:
    """Of a step: seconds without the profiler, multiplications and additions, those of them in products, calls, and kind -> share of the
    profiled time."""

    def took() -> float:
        began = time.perf_counter()
        for _ in range(flags.repeats):
            step()
        if flags.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / flags.repeats

    with FlopCounterMode(display=False) as counter:
        step()
    plain = took()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if flags.device == "cuda" else [])]) as found:
        profiled = took()
    times = dict.fromkeys((*KINDS, "Python, autograd"), 0.0)
    calls = 0
    for event in found.key_averages():
        if event.device_type != DeviceType.CPU:  # a GPU's kernel, whose time the operation that started it has as well
            continue
        calls += event.count if event.key.startswith("aten::") else 0
        times[kind_of(event.key)] += (event.self_device_time_total if flags.device == "cuda" else event.self_cpu_time_total) / 1e6 / flags.repeats
    times["Python, autograd"] += max(0.0, profiled - sum(times.values()))
    in_products = sum(count for operation, count in counter.get_flop_counts()["Global"].items() if "mm" in str(operation))
    return plain, counter.get_total_flops(), in_products, calls // flags.repeats, {kind: value / sum(times.values()) for kind, value in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--only", default="", help="steps with this in their name")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    peak, table = peak_rate(flags), []
    for name, step in steps(flags).items():
        step()
        took, operations, in_products, calls, found = shares(step, flags)
        products = took * sum(share for kind, share in found.items() if kind.startswith("products"))
        rates = (f"{operations / took / peak:.0%}", f"{in_products / products / peak:.0%}")
        table.append([name, f"{1000 * took:.1f}", f"{calls:,}", *rates, *(f"{share:.0%}" for share in found.values())])
    print(f"{machine(flags.device)}, {flags.dtype}, peak {peak / 1e9:.0f} GFLOP/s\n")
    print(markdown_table(["a step", "ms", "operations called", "of peak", "products, of peak", *KINDS, "Python, autograd"], table))


if __name__ == "__main__":
    main()
