"""What each shortcut is worth: the same work with it and without it, in turn.

    python tests/bench/shortcuts.py [--repeats 5] [--threads N] [--only WORD]

A model of 8 layers of width 256, vocabulary 4096, 16 rows of 64+64 random tokens where nothing else is said; training is forward and backward
of the responses' log-probability. Both ways must give the same number before anything is timed. Prints medians, the median of the paired
ratios, and the largest sum of bytes of tensors that live at one time, those of the weights not among them. packing.py measures sharing the
prompt and leaving out padding, dpo.py what knowing the reference beforehand saves, ppo.py the rest of an iteration.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from machine import machine  # noqa: E402
from packing import CONFIG  # noqa: E402
from peak import Peak  # noqa: E402

from data.report import markdown_table  # noqa: E402
from losses.logprobs import log_probs  # noqa: E402
from model.cache import Cache, Held  # noqa: E402
from model.generate import generate  # noqa: E402
from model.heads import CHUNK, LanguageModel, PolicyWithCritic, ScalarModel  # noqa: E402
from model.optim import make_optimiser  # noqa: E402
from model.parallel import compile_layers  # noqa: E402
from model.transformer import ModelConfig, initialise  # noqa: E402

NARROW, WIDE = replace(CONFIG, width=128, layers=4, heads=4, kv_heads=4, feed_forward=352), replace(CONFIG, width=512, feed_forward=1408)
ROWS, PROMPT, RESPONSE, END = 16, 64, 64, 2
BATCHES = 4  # of different lengths, where lengths vary

Work = Callable[[], float]


@dataclass(frozen=True)
class Shortcut:
    """Both ways of doing something; each returns a number that must be the other's within `tolerance`, relatively."""

    name: str
    taken: Work
    left: Work
    tolerance: float = 1e-4
    memory: bool = True  # counted; not inside compiled code, which runs no operations that could be seen


def fresh(kind: type[nn.Module], config: ModelConfig = CONFIG) -> nn.Module:
    model = kind(config)
    initialise(model, 0)
    return model


def batch(seed: int = 0, varied: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and the mask of responses (B, T), of one length, or responses of a third of it to all of it."""
    numbers = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, CONFIG.vocab_size, (ROWS, PROMPT + RESPONSE), generator=numbers)
    lengths = torch.randint(RESPONSE // 3, RESPONSE + 1, (ROWS,), generator=numbers) if varied else torch.full((ROWS,), RESPONSE)
    columns = torch.arange(tokens.shape[1])
    return tokens, (columns >= PROMPT) & (columns < PROMPT + lengths[:, None])


def of_responses(model: LanguageModel, tokens: Tensor, mask: Tensor) -> Tensor:
    return model(tokens, mask).logp.sum()


def of_everything(model: LanguageModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """The same by the logits of all tokens."""
    logps = log_probs(model(tokens)[:, :-1]).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (logps * mask[:, 1:]).sum()


def training(
    config: ModelConfig = CONFIG, *, read=of_responses, chunk: int = CHUNK, compiled=False, varied=False, again=False, bf16=False
) -> Work:
    """Forward and backward of the responses' log-probability, which it returns."""
    model = fresh(LanguageModel, config)
    model.trunk.checkpoint_activations = again
    if compiled:
        compile_layers(model)
    batches = [batch(seed, varied) for seed in range(BATCHES if varied else 1)]

    def work() -> float:
        total = 0.0
        for tokens, mask in batches:
            with patch("model.heads.CHUNK", chunk), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logp = read(model, tokens, mask)
            logp.backward()
            total += float(logp.detach())
        model.zero_grad()
        return total

    return work


def with_values(separate: bool) -> Work:
    """The same with a value of every token, from a second trunk or from the policy's."""
    model = PolicyWithCritic(fresh(LanguageModel), fresh(ScalarModel) if separate else None)
    tokens, mask = batch()

    def work() -> float:
        scores = model(tokens, mask)
        (scores.logp.sum() + scores.values.sum()).backward()
        model.zero_grad()
        return float(scores.logp.detach().sum())

    return work


def with_entropy(way: str) -> Work:
    """The same with the entropy of every token, as a number alone or through its gradient, as PPO's update has it without and with a bonus."""
    model = PolicyWithCritic(fresh(LanguageModel), None)
    tokens, mask = batch()

    def work() -> float:
        scores = model(tokens, mask, with_entropy=way)
        (scores.logp.sum() - (0.0 * scores.entropy.sum() if way == "gradient" else 0.0)).backward()
        model.zero_grad()
        return float(scores.entropy.detach().sum())

    return work


def optimising(fused: bool) -> Work:
    """AdamW's step on gradients that are always the same; returns the sum of the weights."""
    model = fresh(LanguageModel)
    optimiser = make_optimiser(model, 1e-4, 0.0)
    for group in optimiser.param_groups:
        group.update(fused=fused, foreach=not fused)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)

    def work() -> float:
        optimiser.step()
        return float(sum(parameter.detach().sum() for parameter in model.parameters()))

    return work


class GrowingCache(Cache):
    """One that is copied for every token, in place of slots that wait."""

    def held(self, layer: int, new: int) -> Held:
        keys, values = self.keys[layer][..., : self.filled], self.values[layer][:, :, : self.filled]
        self.keys[layer] = torch.cat([keys, keys.new_empty(*keys.shape[:3], new)], dim=3)
        self.values[layer] = torch.cat([values, values.new_empty(*values.shape[:2], new, values.shape[3])], dim=2)
        return Held(self.keys[layer], self.values[layer], self.visible)


def decoding(rows: int = 64, *, cached=True, cache: type[Cache] = Cache, ends=False, compiled=False) -> Work:
    """Greedy responses; ends: in mean after a quarter of the limit, where a uniform number of 0 says so in place of the model."""
    model = fresh(LanguageModel).eval()
    if compiled:
        compile_layers(model)
    prompts = batch()[0][:, :PROMPT].repeat(rows // ROWS, 1)
    lengths = np.random.default_rng(0).geometric(4 / RESPONSE, rows)
    going = (np.arange(RESPONSE) + 1 < lengths[:, None]).astype(np.float64)

    def pick(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
        return torch.where(uniforms > 0, logits.argmax(dim=-1), END) if ends else logits.argmax(dim=-1)

    def work() -> float:
        with torch.no_grad(), patch("model.generate.draw", pick), patch("model.generate.Cache", cache):
            if cached:
                tokens = generate(model, prompts.tolist(), max_new_tokens=RESPONSE, eos_id=END if ends else -1, pad_id=3, uniforms=going).tokens
            else:
                tokens = prompts
                for _ in range(RESPONSE):
                    tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
        answers = tokens[:, PROMPT:].numpy()
        return float((answers * going[:, : answers.shape[1]]).sum())  # up to where a row ends, or would

    return work


def shortcuts() -> list[Callable[[], Shortcut]]:
    return [
        lambda: Shortcut("logits of response tokens alone", training(), training(read=of_everything)),
        lambda: Shortcut(f"those in chunks of 256 tokens (default: {CHUNK:,})", training(chunk=256), training()),
        lambda: Shortcut("policy and value on one trunk", with_values(separate=False), with_values(separate=True)),
        lambda: Shortcut("entropy without a gradient where there is no bonus", with_entropy("value"), with_entropy("gradient")),
        lambda: Shortcut("layers computed again in the backward pass", training(again=True), training()),
        lambda: Shortcut("fused AdamW, against one kernel per operation", optimising(fused=True), optimising(fused=False)),
        lambda: Shortcut("decoding with a cache, 16 rows", decoding(ROWS), decoding(ROWS, cached=False)),
        lambda: Shortcut("a cache of slots, against one that grows, 64 rows", decoding(), decoding(cache=GrowingCache)),
        lambda: Shortcut("finished rows leave the batch, 64 rows", decoding(ends=True), decoding()),
        lambda: Shortcut("bf16, width 128, 4 layers", training(NARROW, bf16=True), training(NARROW), 0.02),
        lambda: Shortcut("bf16, width 256", training(bf16=True), training(), 0.02),
        lambda: Shortcut("bf16, width 512", training(WIDE, bf16=True), training(WIDE), 0.02),
        lambda: Shortcut("layers compiled, one shape, width 128, 4 layers", training(NARROW, compiled=True), training(NARROW), memory=False),
        lambda: Shortcut("layers compiled, one shape", training(compiled=True), training(), memory=False),
        lambda: Shortcut("layers compiled, decoding 64 rows", decoding(compiled=True), decoding(), memory=False),
        lambda: Shortcut(f"layers compiled, {BATCHES} shapes", training(compiled=True, varied=True), training(varied=True), memory=False),
    ]


def timed(work: Work) -> tuple[float, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def mib(work: Work) -> str:
    """The largest sum of bytes of the tensors that it makes."""
    with Peak() as peak:
        work()
    return f"{peak.most / 2**20:.0f}"


def measured(shortcut: Shortcut, repeats: int) -> list[str]:
    """The shortcut's line of the table; raises AssertionError where both ways do not come to the same."""
    torch._dynamo.reset()  # so that no row is left as it is for what rows before it have compiled
    (mine, first), (other, _) = timed(shortcut.taken), timed(shortcut.left)
    assert abs(mine - other) <= shortcut.tolerance * abs(other), (shortcut.name, mine, other)
    times = [(timed(shortcut.taken)[1], timed(shortcut.left)[1]) for _ in range(repeats)]
    medians = [f"{1000 * statistics.median(column):.1f}" for column in zip(*times, strict=True)]
    ratio = f"{statistics.median(left / taken for taken, left in times):.2f}"
    memory = [mib(shortcut.taken), mib(shortcut.left)] if shortcut.memory else ["", ""]
    return [shortcut.name, *medians, ratio, f"{first:.1f}", *memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", default="", help="shortcuts with this in their name")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # past the limit code would run as it is, unsaid
    rows = [measured(shortcut, flags.repeats) for make in shortcuts() if flags.only in (shortcut := make()).name]
    print(f"{machine()}\n")
    print(markdown_table(["shortcut", "with, ms", "without, ms", "ratio", "first call with, s", "MiB with", "MiB without"], rows))


if __name__ == "__main__":
    main()
