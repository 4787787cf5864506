"""A PPO iteration beside the last TRL that had a PPO trainer: same weights, same prompts, same settings, in turn.

    pip install -r tests/bench/requirements-ppo.txt        # in an environment of its own: dpo.py wants a later TRL
    python tests/bench/ppo.py [--repeats 5] [--episodes 64] [--prompt 64] [--response 64] [--passes 4] [--micro-batch 16] [--dtype fp32] [--threads N]
    python tests/bench/ppo.py --device cuda --dtype bf16 --size 1b --no-trunk       # needs 100 GB

A LLaMA of 8.4M parameters, or one of the program's sizes, as policy, reference, reward model and critic; responses never end early. Each pass
is one optimiser step on all responses, so that their order plays no part: on the responses of TRL's first iteration our scores, KL and losses
must be TRL's before anything is timed (in bf16 they are printed only: our log-probabilities are taken in fp32). bf16 is autocast in the updates
of both sides, which is checked, and in our other passes, too; TRL's own trainer has no autocast where it samples and scores. Prints medians,
episodes per second, the median of the paired ratios, and where our time goes.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
import trl.experimental.ppo.ppo_trainer as theirs
from datasets import Dataset
from packing import CONFIG, VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from machine import machine  # noqa: E402

import rl.rollout  # noqa: E402
from data.report import markdown_table  # noqa: E402
from model.checkpoint import load_model, save_model  # noqa: E402
from model.generate import Responses  # noqa: E402
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel  # noqa: E402
from model.optim import make_optimiser  # noqa: E402
from model.parallel import ALONE, World, distribute  # noqa: E402
from model.transformer import SIZES, initialise  # noqa: E402
from rl.ppo import PpoFlags, make_batch, update  # noqa: E402
from rl.rollout import Sampling, roll_out  # noqa: E402

IDS = {"bos_id": 1, "eos_id": 2, "pad_id": 3}
NEVER, LR = -1, 1e-5  # an end token that no row draws


class Ours:
    """Our iterations on one batch of prompts; separate: with a critic of its own, as TRL has."""

    def __init__(self, folder: Path, prompts: list[list[int]], flags: PpoFlags, response: int, world: World):
        self.prompts, self.flags, self.count, self.world = prompts, flags, 0, world
        self.critic = load_model(folder / "reward", ScalarModel) if flags.critic == "separate" else None
        self.model = distribute(PolicyWithCritic(load_model(folder / "policy", LanguageModel), self.critic), world)
        frozen = load_model(folder / "reference", LanguageModel), load_model(folder / "reward", ScalarModel)
        self.ref, self.reward_model = (distribute(model, world, frozen=True).eval() for model in frozen)
        self.optimiser = make_optimiser(self.model, LR, 0.0)
        self.sampling = Sampling(response, 1.0, 0.0, NEVER, IDS["pad_id"], 0.0, 1.0)
        self.seconds: dict[str, float] = {}

    def iteration(self) -> dict[str, float]:
        """Samples, looks, updates; the numbers that TRL reports, too."""
        rollout, seconds = roll_out(
            self.model, self.ref, self.reward_model, self.prompts, range(len(self.prompts)),
            seed=0, step=self.count, sampling=self.sampling, micro_batch=self.flags.micro_batch, world=self.world,
        )  # fmt: skip
        batch, began = make_batch(rollout, self.flags.kl_coef, self.flags, self.world), time.perf_counter()
        lengths = rollout.mask.sum(dim=1).cpu().numpy()
        numbers = update(
            self.model, self.optimiser, batch,
            response_tokens=lengths, iteration=self.count, lr=LR, kl_coef=self.flags.kl_coef, flags=self.flags, seed=0, world=self.world,
        )  # fmt: skip
        self.count += 1
        for name, value in (seconds | {"update": time.perf_counter() - began}).items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        numbers = {name: numbers[name] for name in ("policy_loss", "value_loss")}
        return numbers | {"score": float(rollout.scores.mean()), "kl": float(rollout.kl.sum(dim=1).mean())}


def wait(world: World) -> None:
    """Until a GPU has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


class InTurn(TrainerCallback):
    """After each of TRL's iterations one of each of ours; the first is compared and not timed."""

    def __init__(self, ours: dict[str, Ours], drawn: list[torch.Tensor], world: World):
        self.ours, self.drawn, self.world, self.times, self.reported = ours, drawn, world, [], {}
        self.began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **rest):
        self.reported = logs

    def on_step_end(self, args, state, control, **rest):
        wait(self.world)
        seconds = {"TRL": time.perf_counter() - self.began}
        if not self.times:
            self.compare()
        for name, side in self.ours.items():
            began = time.perf_counter()
            side.iteration()
            wait(side.world)
            seconds[name] = time.perf_counter() - began
        self.times.append(seconds)
        self.began = time.perf_counter()

    def compare(self) -> None:
        """Our first iteration on TRL's responses against TRL's report of it."""
        side, sample = self.ours["separate critic"], rl.rollout.sample
        prompts, side.prompts = side.prompts, self.drawn[0][:, : len(side.prompts[0])].tolist()
        mask = torch.zeros_like(self.drawn[0], dtype=torch.bool)
        mask[:, len(prompts[0]) :] = True
        rl.rollout.sample = lambda *arguments: Responses(self.drawn[0], mask, torch.zeros_like(mask[:, 0]))
        mine = side.iteration()
        rl.rollout.sample, side.prompts, side.seconds = sample, prompts, {}
        names = {"score": "objective/scores", "kl": "objective/kl", "policy_loss": "loss/policy_avg", "value_loss": "loss/value_avg"}
        pairs = {name: (mine[name], float(self.reported[their])) for name, their in names.items()}
        print(", ".join(f"{name} {a:.5f} ({b:.5f})" for name, (a, b) in pairs.items()))
        checked = list(pairs.values()) if side.world.dtype == torch.float32 else []
        tolerance = 3e-3 + 1 / int(mask.sum())  # TRL's variance of advantages divides by n - 1
        assert all(abs(a - b) < 1e-4 + tolerance * abs(b) for a, b in checked), pairs


def trainer(folder: Path, prompts: list[list[int]], flags: argparse.Namespace, in_turn: InTurn) -> PPOTrainer:
    """TRL's, with the same models and settings."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB + 1)}, unk_token="w0"))
    settings = PPOConfig(
        str(folder / "out"), per_device_train_batch_size=flags.micro_batch, gradient_accumulation_steps=flags.episodes // flags.micro_batch,
        local_rollout_forward_batch_size=flags.episodes, num_mini_batches=1, num_ppo_epochs=flags.passes, response_length=flags.response,
        total_episodes=flags.episodes * (flags.repeats + 1), num_sample_generations=0, kl_coef=0.1, vf_coef=0.1, cliprange=0.2,
        cliprange_value=0.2, gamma=1.0, lam=0.95, temperature=1.0, missing_eos_penalty=None, stop_token=None, learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.99, optim="adamw_torch_fused", report_to=[], bf16=flags.dtype == "bf16", use_cpu=flags.device == "cpu",
        logging_steps=1, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    if flags.dtype == "bf16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # its trainer makes an Accelerator without being told of args.bf16
    rows = [{"input_ids": prompt} for prompt in prompts] * (flags.repeats + 2)  # on the last batch of a data set it would step at every micro-batch
    language = [LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("policy", "reference")]
    scalar = [LlamaForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32) for _ in range(2)]
    made = PPOTrainer(
        settings, PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token=f"w{VOCAB}"),
        *language, scalar[0], Dataset.from_list(rows), scalar[1], callbacks=[in_turn],
    )  # fmt: skip
    assert made.accelerator.mixed_precision == ("bf16" if flags.dtype == "bf16" else "no"), made.accelerator.mixed_precision
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 5), ("episodes", 64), ("prompt", 64), ("response", 64), ("passes", 4), ("micro-batch", 16), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("small", "base", "1b"))
    parser.add_argument("--no-trunk", action="store_true", help="leave out ours with the critic on the trunk")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    prompts = torch.randint(4, VOCAB, (flags.episodes, flags.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    world = dataclasses.replace(ALONE, device=torch.device(flags.device), dtype=torch.bfloat16 if flags.dtype == "bf16" else torch.float32)
    own = PpoFlags(lr=LR, passes=flags.passes, minibatch=flags.episodes, micro_batch=flags.micro_batch, value_coef=0.1, clip=1e9)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for seed, (name, kind) in enumerate({"policy": LanguageModel, "reference": LanguageModel, "reward": ScalarModel}.items()):
            model = kind(SIZES[flags.size] if flags.size else CONFIG)
            initialise(model, seed)
            save_model(model, folder / name, special_ids=IDS, is_main=True)
        critics = {"separate critic": "separate"} | ({} if flags.no_trunk else {"critic on the trunk": "trunk"})
        ours = {name: Ours(folder, prompts, dataclasses.replace(own, critic=critic), flags.response, world) for name, critic in critics.items()}
        drawn, plain = [], theirs.batch_generation
        theirs.batch_generation = lambda *arguments: drawn.append((made := plain(*arguments))[0].clone()) or made
        in_turn = InTurn(ours, drawn, world)
        trainer(folder, prompts, flags, in_turn).train()
    times, rows = in_turn.times[1:], []
    for name in ("TRL", *ours):
        median = statistics.median(seconds[name] for seconds in times)
        rows.append((name, f"{median:.2f}", f"{flags.episodes / median:.2f}", f"{statistics.median(s['TRL'] / s[name] for s in times):.2f}"))
    print(f"{machine(flags.device, trl, transformers)}\n{flags.episodes} episodes of {flags.prompt}+{flags.response} tokens, {flags.passes} passes, {flags.size or '8.4M parameters'}, {flags.dtype}\n")
    print(markdown_table(["", "seconds", "episodes/s", "ratio"], rows))
    for name, side in ours.items():
        whole = sum(side.seconds.values())
        print(f"{name}: " + ", ".join(f"{phase} {value / whole:.0%}" for phase, value in side.seconds.items()))


if __name__ == "__main__":
    main()
