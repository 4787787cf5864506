"""The stage that learns from its own samples: PPO's flags, its prompts, and the models it needs. The loop itself is rl/ppo.py."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from data.batches import encode_prompt
from data.errors import CheckpointError, DataError, UsageError
from data.examples import read_prompts
from data.files import model_digest, read_json
from data.flags import flag
from data.prepare import form_of, held_together, load_pairs
from data.run import MANIFEST, METRICS, as_flags
from model.checkpoint import CONFIG, count_parameters, open_model
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel
from model.optim import for_size
from model.parallel import bare, distribute
from model.score import sha256_of
from model.stage import Run, Text, check_vocabularies, open_text, part_ids, validation_prompts
from model.watch import limit_passed
from rl.ppo import PpoFlags, check_ppo_flags, summary, train_ppo
from rl.rollout import Rollout, Sampling, roll_out
from rl.watch import check_rollout


@dataclass(frozen=True)
class PpoStageFlags(PpoFlags):
    part: str = flag("difficult", "pairs whose prompts are trained on", choices=("easy", "difficult", "all"))
    prompts: str | None = flag(None, "train on the prompts of this spec instead, like --data; jsonl needs only `prompt`")
    init: str | None = flag(None, "start from this folder (default: DIR/dpo)")
    ref: str | None = flag(None, "reference (default: DIR/dpo, whatever --init is)")
    reward_model: str | None = flag(None, "folder of the reward model (default: DIR/rm)")


def check_ppo(run: Run, flags: PpoStageFlags) -> None:
    """Raises UsageError for what `check_ppo_flags` refuses, for prompts that cannot be read, and for as many as processes cannot share;
    CheckpointError for a reward model that is none, or without its scores' scale."""
    check_ppo_flags(flags)
    if flags.prompts and ("ppo_part" if run.chain else "part") in run.given:
        raise UsageError(f"--part {flags.part}: is not read with --prompts; leave one of them out")
    if flags.prompts:
        read_prompts(flags.prompts)
    if flags.reward_model and (Path(flags.reward_model) / CONFIG).exists():
        open_model(Path(flags.reward_model), ScalarModel)
        score_scale(Path(flags.reward_model))
    if flags.prompts_per_iteration % run.world.size:
        raise UsageError(f"--prompts-per-iteration {flags.prompts_per_iteration}: must be a multiple of the {run.world.size} processes")


def ppo_stage(run: Run) -> None:
    """PPO on a part's prompts; in MPO start and reference are the DPO model."""
    flags, text, world = run.take("ppo", PpoStageFlags), open_text(run), run.world
    init = run.parent("dpo", flags.init)
    ref_path = run.parent("dpo", flags.ref)
    rm_path = run.parent("rm", flags.reward_model)
    prompts = training_prompts(run, text, flags)
    policy, ref, reward_model = text.load(init, LanguageModel), text.load(ref_path, LanguageModel), text.load(rm_path, ScalarModel)
    check_vocabularies(init, ref_path, rm_path)
    scale = score_scale(rm_path)
    critic = text.load(rm_path, ScalarModel) if flags.critic == "separate" else None
    flags = for_size("ppo", flags, count_parameters(init))
    warn_of_unhealthy(run, ref_path)
    same_start = model_digest(init) == model_digest(ref_path)
    parents = {"init": init, "ref": ref_path, "rm": rm_path, "data": run.folder / "data"}
    if not flags.prompts and flags.part != "all":
        parents["split"] = run.folder / "split"
    unread = {"part": None} if flags.prompts else {}
    if not run.begins("ppo", as_flags(flags) | unread | {"prompts_digest": sha256_of(prompts)}, parents):
        return
    with run.stage("ppo") as (folder, metrics, results):
        run.say(f"  {len(prompts)} prompts; policy from {init}, reference {ref_path}, reward model {rm_path}")
        model = distribute(PolicyWithCritic(policy, critic, *scale), world)
        ref, reward_model = (distribute(m, world, frozen=True) for m in (ref, reward_model))
        how = Sampling(
            text.max_response, flags.temperature, flags.end_penalty, eos_id=text.tokenizer.eos_id, pad_id=text.tokenizer.pad_id,
            score_mean=scale[0], score_std=scale[1],
        )  # fmt: skip
        checks = validation_prompts(run, text, 32 if run.flags.quick else 128)
        saving = run.saving(folder, text, every=10)

        def validate(iteration: int) -> dict[str, float]:
            """Means over the validation prompts' responses, and the objective that decides which weights are kept."""
            keys = list(range(world.rank, len(checks), world.size))
            same_for_all = keys + [0] * (-(-len(checks) // world.size) - len(keys))  # FSDP needs as many rows of every process
            rollout, _ = roll_out(
                model, ref, reward_model, [checks[k] for k in same_for_all], same_for_all,
                seed=run.flags.seed, step=-1, sampling=how, micro_batch=flags.micro_batch, world=world,
            )  # fmt: skip
            rollout = Rollout(*(getattr(rollout, field.name)[: len(keys)] for field in dataclasses.fields(Rollout)))
            numbers = summary(rollout, world)
            check_rollout(numbers, rollout, f"ppo, validation after iteration {iteration}", False, world, saving)
            return numbers | {"objective": numbers["score"] - flags.kl_coef * numbers["kl_ref_seq"]}

        def keep(snapshot: str) -> None:
            inner = bare(model)
            extra = {"value_head.weight": inner.value_head.weight} if inner.critic is None else {}
            text.save(inner.policy, folder, world, snapshot, extra=extra)
            if inner.critic is not None:
                text.save(inner.critic, folder / snapshot / "critic", world)

        results |= train_ppo(
            model, ref, reward_model, prompts, flags, how,
            same_start=same_start, seed=run.flags.seed, world=world, metrics=metrics, validate=validate, keep=keep,
            saving=saving,
        )  # fmt: skip
        run.say(f"  best at iteration {results['step']}: score {results['score']:.2f}, KL to the reference {results['kl_ref_seq']:.2f}")


def score_scale(rm: Path) -> tuple[float, float]:
    """Mean and standard deviation of a reward model's scores, in log-odds; raises CheckpointError where they were never fitted."""
    described = read_json(rm / CONFIG)
    if "score_std" not in described:
        raise CheckpointError(
            f"{rm / CONFIG}: score_mean and score_std are missing, which the rm stage fits and stores; let it take this model: --stage rm --reward-model"
            f" {rm}, in a chain --rm-reward-model {rm}"
        )
    return described["score_mean"], described["score_std"]


def training_prompts(run: Run, text: Text, flags: PpoStageFlags) -> list[tuple[int, ...]]:
    """Ids of the prompts that PPO trains on: --prompts, or those of the chosen part of the split; never one of validation or test."""
    made_with = read_json(run.folder / "data" / MANIFEST)["flags"]
    if flags.prompts:
        prompts = read_prompts(flags.prompts, template=form_of(made_with))
    else:
        ids = part_ids(run, flags.part)
        prompts = [(p.prompt, p.style) for p in load_pairs(run.folder / "data", "train") if ids is None or p.id in ids]
    held_out = {held_together(pair.prompt, made_with["data"]) for part in ("validation", "test") for pair in load_pairs(run.folder / "data", part)}
    different = dict.fromkeys(prompts)
    apart = [prompt for prompt in different if held_together(prompt[0], made_with["data"]) not in held_out]
    fitting = [ids for prompt in apart if (ids := encode_prompt(*prompt, text.tokenizer, text.max_prompt)[0])]
    if len(fitting) < len(different):
        run.say(f"  {len(different) - len(apart)} prompts of validation or test left out, {len(apart) - len(fitting)} above --max-prompt")
    if not fitting:
        raise DataError(f"no prompt is left to train on after those of validation and test, and those above --max-prompt {text.max_prompt}")
    return fitting


def warn_of_unhealthy(run: Run, ref: Path) -> None:
    """PPO is only as good as its reference: says so where DPO's own watch found these weights, or this snapshot of them, broken."""
    stage = ref.parent if ref.name.startswith("snapshot-") else ref
    if not (stage / MANIFEST).exists() or (made := read_json(stage / MANIFEST))["stage"] != "dpo":
        return
    step = made["results"]["step"] if stage == ref else int(ref.name.rpartition("-")[2]) - 1
    lines = map(json.loads, (stage / METRICS).read_text().splitlines())
    seen = next(line for line in lines if line["step"] == step and "valid_kl_ref_seq" in line)
    numbers = {name: seen[f"valid_{name}"] for name in ("kl_ref_seq", "chosen_fall")}
    if passed := limit_passed(numbers, made["flags"]["max_kl"], made["flags"]["max_fall"]):
        run.say(f"warning: ppo: the reference {ref} failed DPO's check: {passed}; a larger beta or a smaller learning rate of DPO makes a better one")
