"""A DPO step beside TRL's DPOTrainer: same weights, same tokens, same optimiser, in turn.

    pip install -r tests/bench/requirements.txt
    python tests/bench/dpo.py [--repeats 5] [--pairs 16] [--prompt 96] [--response 64] [--dtype fp32] [--threads N]
    python tests/bench/dpo.py --compile ours|TRL|both                    # layers, and TRL's models; asks for a C++ compiler
    python tests/bench/dpo.py --micro-batch 16                           # pairs in a forward pass, on both sides; 8 by default
    python tests/bench/dpo.py --device cuda --dtype bf16 --size 1b       # needs 55 GB: both sides train a model of 1.1B parameters

A LLaMA of 8.4M parameters, or one of the program's sizes, random ids, prompts of a third of --prompt to all of it tokens, responses
likewise. Measured twice: the reference read at every step on both sides, and its log-probabilities known beforehand on both. bf16 is
autocast on both sides, with fp32 weights, which is checked. The losses of the first two steps must agree before anything is timed. Prints medians, tokens
per second with the prompt counted twice on all sides, the median of the paired ratios, and what two steps of each side, in a process of its own,
add to the memory that it had with everything imported. Ours is there a second time with two rows for a pair, so that what reading the prompt once is
worth stands beside the rest. TRL compiled is measured with the reference read at every step alone: it cannot know it beforehand there.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
import trl
from datasets import Dataset
from packing import CONFIG, random_pairs, separate
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from machine import machine  # noqa: E402

from data.batches import PairRow  # noqa: E402
from data.report import markdown_table  # noqa: E402
from losses.dpo import dpo  # noqa: E402
from model.checkpoint import load_model, save_model  # noqa: E402
from model.fit import train_step  # noqa: E402
from model.heads import LanguageModel  # noqa: E402
from model.objectives import preference_objective  # noqa: E402
from model.optim import clipped_step, make_optimiser  # noqa: E402
from model.parallel import ALONE, World, compile_layers, distribute  # noqa: E402
from model.score import reference_logps  # noqa: E402
from model.transformer import SIZES, ModelConfig, initialise  # noqa: E402

IDS = {"bos_id": 1, "eos_id": 2, "pad_id": 3}
BETA, LR = 0.1, 1e-5


class Ours:
    """Our step on some pairs; known: the reference's log-probabilities are there already."""

    def __init__(self, policy: LanguageModel, ref: LanguageModel, known: bool, world: World, micro_batch: int):
        self.model, self.ref, self.known, self.logps, self.world, self.micro_batch = policy, ref, known, None, world, micro_batch
        self.optimiser = make_optimiser(policy, LR, 0.0)

    def step(self, pairs: list[PairRow]) -> float:
        if self.logps is None or not self.known:
            self.logps = {pair.id: tuple(row) for pair, row in zip(pairs, reference_logps(self.ref, pairs, 3, self.world).tolist(), strict=True)}
        self.model.train()
        objective = preference_objective(lambda p: dpo(p, beta=BETA), BETA, self.logps, 3, self.world.device)
        loss = train_step(self.model, objective, pairs, self.micro_batch, self.world)["loss"]
        clipped_step(self.model, self.optimiser, LR, 1.0, "here")
        return loss


class TwoRows(Ours):
    """Ours without the pair in one row: the prompt is read for each of its responses."""

    def step(self, pairs: list[PairRow]) -> float:
        def apart(model, pairs, pad_id, device):
            return separate(model, pairs, device)

        with patch("model.objectives.pair_logps", apart), patch("model.score.pair_logps", apart):
            return super().step(pairs)


class Prepared(DPOTrainer):
    """TRL's trainer on rows of ids."""

    def _prepare_dataset(self, dataset, *arguments, **options):
        return dataset


class Theirs:
    """TRL's training step, clipping and optimiser on the same pairs."""

    def __init__(self, policy: Path, ref: Path, pairs: list[PairRow], known: bool, world: World, folder: str, compiled: bool, micro_batch: int):
        rows = [{"prompt_ids": list(p.chosen.prompt), "chosen_ids": list(p.chosen.response), "rejected_ids": list(p.rejected.response)} for p in pairs]
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(CONFIG.vocab_size)}, unk_token="w0"))
        settings = DPOConfig(
            folder, per_device_train_batch_size=micro_batch, learning_rate=LR, beta=BETA, weight_decay=0.0, adam_beta2=0.99, bf16=world.dtype == torch.bfloat16,
            report_to=[], optim="adamw_torch_fused", precompute_ref_log_probs=known, gradient_checkpointing=False, use_cpu=world.device.type == "cpu", torch_compile=compiled,
        )  # fmt: skip
        self.trainer = Prepared(
            LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32), LlamaForCausalLM.from_pretrained(ref, dtype=torch.float32),
            args=settings, train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w3"),
        )  # fmt: skip
        self.trainer.model = self.trainer.accelerator.prepare_model(self.trainer.model)  # as `train()` does: autocast comes with it
        self.trainer.create_optimizer()
        self.batches = list(self.trainer.get_train_dataloader())
        self.trainer.current_gradient_accumulation_steps = len(self.batches)

    def step(self, pairs: list[PairRow]) -> float:
        loss = sum(float(self.trainer.training_step(self.trainer.model, dict(batch))) for batch in self.batches)
        torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()
        return loss


def dtype_of_products(side, pairs: list[PairRow]) -> torch.dtype:
    """In which the policy's layers compute during a step."""
    model, seen = side.model if isinstance(side, Ours) else side.trainer.model, []
    linear = next(module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}")
    hook = linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    side.step(pairs)
    hook.remove()
    return seen[0]


def timed(side, pairs: list[PairRow]) -> float:
    began = time.perf_counter()
    side.step(pairs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def make_models(folder: Path, config: ModelConfig) -> None:
    """Policy and reference, in folders 0 and 1."""
    for seed in range(2):
        model = LanguageModel(config)
        initialise(model, seed)
        save_model(model, folder / str(seed), special_ids=IDS, is_main=True)


def make_side(name: str, folder: Path, pairs: list[PairRow], known: bool, world: World, flags: argparse.Namespace):
    """One of SIDES; flags.compile says which of them are compiled."""
    if name == "TRL":
        return Theirs(folder / "0", folder / "1", pairs, known, world, str(folder), flags.compile in ("TRL", "both"), flags.micro_batch)
    policy, ref = (load_model(folder / seed, LanguageModel) for seed in "01")
    if flags.compile in ("ours", "both"):
        compile_layers(policy)
        compile_layers(ref)
    return SIDES[name](distribute(policy, world), distribute(ref, world, frozen=True), known, world, flags.micro_batch)


SIDES = {"ours": Ours, "ours, two rows": TwoRows, "TRL": Theirs}


def compare(pairs: list[PairRow], known: bool, config: ModelConfig, world: World, flags: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Of each side the median seconds of a step, and the median ratio to ours of the same turn."""
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), config)
        sides = {name: make_side(name, Path(folder), pairs, known, world, flags) for name in SIDES}
        for _ in range(2):
            losses = [side.step(pairs) for side in sides.values()]
            assert all(abs(loss - losses[-1]) < (1e-4 if world.dtype == torch.float32 else 0.05) * abs(losses[-1]) for loss in losses), losses
        if not flags.compile:  # hooks do not see into compiled code
            dtypes = [dtype_of_products(side, pairs) for side in sides.values()]
            assert set(dtypes) == {world.dtype}, dtypes
        times = [{name: timed(side, pairs) for name, side in sides.items()} for _ in range(flags.repeats)]
    return {name: (statistics.median(turn[name] for turn in times), statistics.median(turn[name] / turn["ours"] for turn in times)) for name in SIDES}


def memory_of(name: str, folder: Path, pairs: list[PairRow], world: World, flags: argparse.Namespace) -> float:
    """GiB that two steps of one side add to this process; meant for a process that does nothing else."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest so far begins again at what there is now
    before = kib("VmRSS")
    side = make_side(name, folder, pairs, False, world, flags)
    for _ in range(2):
        side.step(pairs)
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (kib("VmHWM") - before) / 2**20


def kib(what: str) -> int:
    """A line of /proc/self/status."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("small", "base", "1b"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", choices=("ours", "TRL", "both"))
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # a side, and where the models lie: this script's own children
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    pairs, rows, config = random_pairs(flags.pairs, flags.prompt, flags.response), [], SIZES[flags.size] if flags.size else CONFIG
    world = replace(ALONE, device=torch.device(flags.device), dtype=torch.bfloat16 if flags.dtype == "bf16" else torch.float32)
    if flags.memory_of:
        print(memory_of(flags.memory_of[0], Path(flags.memory_of[1]), pairs, world, flags))
        return
    with tempfile.TemporaryDirectory() as folder:  # before this process takes any of the device's memory
        make_models(Path(folder), config)
        asked = ["--pairs", str(flags.pairs), "--prompt", str(flags.prompt), "--response", str(flags.response), "--dtype", flags.dtype, "--device", flags.device,
                 "--threads", str(torch.get_num_threads()), "--micro-batch", str(flags.micro_batch)]  # fmt: skip
        gib = [
            float(subprocess.run([sys.executable, __file__, *asked, "--memory-of", name, folder], check=True, capture_output=True).stdout.split()[-1])
            for name in ("ours", "TRL")
        ]
    tokens = sum(pair.chosen.length + pair.rejected.length for pair in pairs)
    for known in (False,) if flags.compile in ("TRL", "both") else (False, True):
        for name, (seconds, ratio) in compare(pairs, known, config, world, flags).items():
            rows.append(("known beforehand" if known else "read at every step", name, f"{tokens / seconds:.0f}", f"{ratio:.2f}"))
    print(f"{machine(flags.device, trl, transformers)}\n{flags.pairs} pairs, {tokens} tokens with the prompt counted twice, {flags.size or '8.4M parameters'}, {flags.dtype}\n")
    print(markdown_table(["reference", "side", "tokens/s", "times as long as ours"], rows))
    print(f"\nmemory of two steps, reference read at every step: ours {gib[0]:.2f} GiB, TRL {gib[1]:.2f} GiB, ratio {gib[1] / gib[0]:.2f}")


if __name__ == "__main__":
    main()
