"""New tokens per second: ours and transformers' `generate`, same weights, same prompts, greedy, in turn.

    pip install -r tests/bench/requirements.txt
    python tests/bench/generation.py [--rows 64] [--prompt 64] [--new 64] [--repeats 5] [--dtype fp32] [--threads N] [--static [--compile]]
    python tests/bench/generation.py --device cuda --dtype bf16 --size 1b       # needs 12 GB

The model is a LLaMA of 8.4M parameters, or one of the program's sizes, with random weights. Both must give the same tokens (in fp32) before anything is timed; neither may
end early. --static: transformers holds keys and values in slots that wait, as ours does, in place of its default;
--compile: both sides' are compiled. Prints medians and the median of the
paired ratios.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from packing import CONFIG

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from machine import machine  # noqa: E402

from data.report import markdown_table  # noqa: E402
from model.checkpoint import save_model  # noqa: E402
from model.generate import generate  # noqa: E402
from model.heads import LanguageModel  # noqa: E402
from model.parallel import compile_layers  # noqa: E402
from model.transformer import SIZES, ModelConfig, initialise  # noqa: E402

NEVER = -1  # an end token that no row draws


def models(config: ModelConfig, device: str) -> tuple[LanguageModel, transformers.LlamaForCausalLM]:
    """The same weights in both."""
    ours = LanguageModel(config)
    initialise(ours, 0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder), special_ids={"bos_id": 1, "eos_id": 2, "pad_id": 3}, is_main=True)
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    theirs.generation_config.eos_token_id = None
    return ours.to(device).eval(), theirs.to(device).eval()


def seconds(work: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    work().cpu()  # waits for a GPU
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("small", "base", "1b"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--compile", action="store_true")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    config = SIZES[flags.size] if flags.size else CONFIG
    ours, theirs = models(config, flags.device)
    if flags.dtype == "bf16":
        theirs = theirs.bfloat16()  # its fastest way; ours keeps float32 weights and computes under autocast
    if flags.compile:
        compile_layers(ours)
        theirs.forward = torch.compile(theirs.forward)
    prompts = torch.randint(4, config.vocab_size, (flags.rows, flags.prompt), generator=torch.Generator().manual_seed(0))

    there = prompts.to(flags.device)

    def one() -> torch.Tensor:
        with torch.autocast(flags.device, torch.bfloat16, enabled=flags.dtype == "bf16"):
            return generate(ours, prompts.tolist(), max_new_tokens=flags.new, eos_id=NEVER, pad_id=3).tokens

    def other() -> torch.Tensor:
        return theirs.generate(there, attention_mask=torch.ones_like(there), max_new_tokens=flags.new, do_sample=False, pad_token_id=3, **({"cache_implementation": "static"} if flags.static else {}))

    with torch.no_grad():
        first, second = one(), other()
        assert first.shape == second.shape and (flags.dtype == "bf16" or torch.equal(first, second)), "the tokens differ"
        times = []
        for _ in range(flags.repeats):
            times.append((seconds(one), seconds(other)))
    tokens = flags.rows * flags.new
    mine, peer = (tokens / statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"{machine(flags.device, transformers)}\n{flags.rows} prompts of {flags.prompt} tokens, {flags.new} new, {flags.size or '8.4M parameters'}, {flags.dtype}\n")
    print(markdown_table(["", "new tokens per second"], [("ours", f"{mine:.0f}"), ("transformers", f"{peer:.0f}"), ("ratio", f"{ratio:.2f}")]))


if __name__ == "__main__":
    main()
