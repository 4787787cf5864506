"""Proximal policy optimisation on prompts: sample, score, estimate advantages, update; and again.

One iteration, in the order of `train_ppo`:
  1. responses of the current policy with everything known about them (rollout.py)
  2. per-token rewards: score at the end, KL cost on the way (rewards.py)
  3. advantages and returns (gae.py), whitened with the moments of the whole batch
  4. minibatches, in one pass or a few: clipped policy loss, clipped value loss (losses/ppo.py), KL in the loss where chosen
  5. the KL coefficient's next value; every so often a look at validation prompts

What must hold in every round is watch.py's business; which models and prompts come in, online.py's: in Mixed Preference Optimization the policy starts
as the DPO model, which stays its reference, and the prompts are those of the difficult pairs.

Source: Schulman et al., arXiv 1707.06347; Ziegler et al., arXiv 1909.08593.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import full_steps, step_indices
from data.errors import NumericalError, UsageError
from data.flags import flag
from data.run import Metrics
from losses.kl import check_kl_placement, k2, k3
from losses.masked import masked_moments, masked_sum, merge_moments
from losses.ppo import policy_loss, value_loss
from model.fit import add_up, broken_names
from model.optim import clipped_step, lr_at, make_optimiser
from model.parallel import World, gradient_sync
from model.resume import Saving
from rl.gae import gae, whiten
from rl.rewards import next_kl_coef, token_rewards
from rl.rollout import Rollout, Sampling, roll_out
from rl.watch import as_rows, check_first_ratio, check_rollout, warn_of_collapse


@dataclass(frozen=True)
class PpoFlags:
    lr: float | None = flag(None, "peak learning rate (default: by model size, printed at the start)", positive=True)
    iterations: int = flag(40, "rounds of sampling and updating", positive=True)
    prompts_per_iteration: int = flag(128, "prompts per round, over all processes; each is answered once", positive=True)
    passes: int = flag(1, "passes over each round's responses", positive=True)
    minibatch: int = flag(32, "responses per optimiser step, over all processes", positive=True)
    micro_batch: int = flag(16, "responses per forward pass on one process; changes memory and speed, not results", positive=True)
    temperature: float = flag(1.0, "of sampling and of all log-probabilities alike", positive=True)
    kl_coef: float = flag(0.1, "cost of one nat of KL to the reference: in the reward in units of score, in the loss of whitened advantages")
    kl_target: float | None = flag(None, "adapt the coefficient towards this KL per sequence (default: coefficient stays)", positive=True)
    kl_horizon: float = flag(1000.0, "responses over which the adaptive coefficient moves", positive=True)
    kl_estimator: str = flag("k1", "k1 in the reward; in the loss k2, or forward_k3, which follows the forward KL", choices=("k1", "k2", "k3", "forward_k3"))
    kl_placement: str = flag("reward", "where the KL stands", choices=("reward", "loss"))
    end_penalty: float = flag(1.0, "subtracted from the score of a response without end token, in units of score; with --bootstrap it only counts for what is kept")
    ratio_clip: float = flag(0.2, "the ratio counts within 1 - clip and 1 + clip", positive=True)
    value_clip: float = flag(0.2, "values count at most so far from the old ones in one round; 0: however far")
    value_coef: float = flag(0.5, "weight of the value loss; on a shared trunk so much harms the policy: take 0.1 there")
    entropy_coef: float = flag(0.0, "weight of the entropy bonus")
    critic: str = flag("separate", "a model of its own from the reward model, or a value head on the policy's trunk: faster, but noisier", choices=("separate", "trunk"))
    critic_lr: float | None = flag(None, "peak learning rate of a separate critic (default: as --lr)", positive=True)
    discount: float = flag(1.0, "of later rewards", positive=True)
    gae_lambda: float = flag(0.95, "0 trusts the critic, 1 the rewards")
    bootstrap: bool = flag(False, "a response that was cut at the length limit is paid the critic's value of going on, in place of score and penalty")
    target_kl: float | None = flag(None, "end a round's updates before the first at which KL(old, new) per token passes this", positive=True)
    warmup: float = flag(0.1, "share of the rounds in which the learning rate rises")
    weight_decay: float = flag(0.0, "AdamW's decay of the layers' matrices")
    clip: float = flag(1.0, "greatest norm of the whole gradient", positive=True)
    validations: int = flag(5, "how often at most, evenly, the validation prompts are answered, besides the start", positive=True)
    snapshots: bool = flag(True, "also keep the weights of every validation, in snapshot-ROUND, for eval.py to look at")


def check_ppo_flags(flags: PpoFlags) -> None:
    """Raises UsageError on combinations that cannot mean what they say."""
    try:
        check_kl_placement(flags.kl_estimator, flags.kl_placement)
    except ValueError as error:
        raise UsageError(f"--kl-estimator, --kl-placement: {error}") from error
    if not 0 <= flags.gae_lambda <= 1 or flags.discount > 1:
        raise UsageError(f"--gae-lambda {flags.gae_lambda}, --discount {flags.discount}: both must lie within 0 and 1")
    if flags.kl_coef < 0:
        raise UsageError(f"--kl-coef {flags.kl_coef}: negative, which would reward leaving the reference")
    if flags.kl_target and flags.kl_coef == 0:
        raise UsageError("--kl-coef 0, --kl-target: a coefficient of 0 cannot be adapted, it is only ever multiplied; start from a positive one")
    if not 0 < flags.ratio_clip < 1:
        raise UsageError(f"--ratio-clip {flags.ratio_clip}: must lie between 0 and 1, so that the ratio counts within 1 - clip and 1 + clip")
    for name in ("value_coef", "entropy_coef", "end_penalty", "value_clip"):
        if getattr(flags, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be 0 or more")
    if flags.kl_target and flags.prompts_per_iteration > flags.kl_horizon:
        raise UsageError(
            f"--kl-horizon {flags.kl_horizon:g}: is less than --prompts-per-iteration {flags.prompts_per_iteration}; one round would move the coefficient"
            " by more than a fifth, and from five horizons on below 0; take a longer one"
        )
    if flags.critic_lr and flags.critic != "separate":
        raise UsageError(f"--critic-lr {flags.critic_lr:g}: is read with --critic separate alone; a value head on the trunk learns at --lr, weighed by --value-coef")
    if flags.kl_target is None and flags.kl_horizon != PpoFlags.kl_horizon:
        raise UsageError(f"--kl-horizon {flags.kl_horizon}: is read with --kl-target alone; give that, or leave it out")


@dataclass(frozen=True)
class Batch:
    """A rollout with what the update learns from it; all (B, T-1)."""

    rollout: Rollout
    advantages: Tensor
    returns: Tensor


def make_batch(rollout: Rollout, kl_coef: float, flags: PpoFlags, world: World) -> Batch:
    """Rewards, advantages and returns of a rollout; advantages whitened over all processes.

    A response that bootstraps is not scored: its last value already says what score its whole would get."""
    in_reward = kl_coef if flags.kl_placement == "reward" else 0.0
    bootstrap = ~rollout.ended if flags.bootstrap else torch.zeros_like(rollout.ended)
    rewards = token_rewards(rollout.scores.where(~bootstrap, 0.0), rollout.kl, rollout.mask, in_reward)
    advantages, returns = gae(rewards, rollout.values, rollout.mask, bootstrap, flags.discount, flags.gae_lambda)
    return Batch(rollout, whiten(advantages, rollout.mask, moments_over_ranks(advantages, rollout.mask, world)), returns)


def moments_over_ranks(x: Tensor, mask: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance over the masked entries of all processes."""
    mine = np.zeros((world.size, 3))
    mine[world.rank] = [float(moment) for moment in masked_moments(x, mask)]
    everyone = torch.from_numpy(world.total(mine)).float().to(x.device)
    return merge_moments(everyone[:, 0], everyone[:, 1], everyone[:, 2])


def minibatch_loss(model: nn.Module, batch: Batch, rows: Tensor, kl_coef: float, flags: PpoFlags) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss over the response tokens of some rows (n,), and summed metrics.

        L = sum_t [ L_policy + value_coef L_value - entropy_coef H ] + kl_coef KL        (a)    the last where the KL stands in the loss

    Source: Schulman et al., arXiv 1707.06347, equation 9, with the sign of a loss."""
    rollout = batch.rollout
    width = int(rollout.lengths[rows].max())  # columns that are padding in all of these rows are left out
    scored = model(
        rollout.tokens[rows, :width], rollout.response_mask[rows, :width],
        temperature=flags.temperature, with_entropy="gradient" if flags.entropy_coef else "value",
    )  # fmt: skip
    mask, old_logp, ref_logp, old_values, advantages, returns = (
        x[rows, : width - 1] for x in (rollout.mask, rollout.logp, rollout.ref_logp, rollout.values, batch.advantages, batch.returns)
    )
    policy_losses, stats = policy_loss(scored.logp, old_logp, advantages, mask, flags.ratio_clip)
    value_losses = value_loss(scored.values[:, :-1], old_values, returns, mask, flags.value_clip or None)
    entropy = masked_sum(scored.entropy, mask).sum()
    total = policy_losses.sum() + flags.value_coef * value_losses.sum() - flags.entropy_coef * entropy  # (a)
    if flags.kl_placement == "loss":
        penalty = {"k2": k2, "forward_k3": k3}[flags.kl_estimator]
        total = total + kl_coef * penalty(scored.logp, ref_logp, mask).sum()
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_losses.sum(),
            "value_loss": value_losses.sum(),
            "clip_share": stats.clipped.sum(),
            "overflow": stats.overflow.sum(),
            "kl_old_tok": k3(old_logp, scored.logp, mask).sum(),
            "entropy": entropy.detach(),
        }
        drift = torch.where(mask, (scored.logp - old_logp).abs(), 0.0)
    return total, metrics | {"log_ratio": drift.sum(), "largest_log_ratio": drift.max()}


def accumulate(
    model: nn.Module, batch: Batch, mine: Tensor, turns: int, count: int, kl_coef: float, flags: PpoFlags, world: World
) -> tuple[dict[str, float], float, list[int]]:
    """Adds up the gradient of the mean loss over `count` tokens of all processes, from `turns` micro-batches of this one's rows `mine`.

    Returns summed metrics, the largest |log ratio|, and the rows whose micro-batch has a number that is not finite: all of this process."""
    sums: dict[str, float] = {}
    suspects, largest = [], 0.0
    for turn in range(turns):
        rows = mine[turn * flags.micro_batch : (turn + 1) * flags.micro_batch]
        real = len(rows) > 0  # a process without rows goes through the motions: FSDP's collectives need all of them
        with gradient_sync(model, last=turn + 1 == turns):
            with world.autocast():
                total, metrics = minibatch_loss(model, batch, rows if real else mine.new_zeros(1), kl_coef, flags)
            (total * (world.size / count if real else 0.0)).backward()
        if real and not all(map(math.isfinite, metrics.values())):
            suspects += rows.tolist()
        own = float(metrics.pop("largest_log_ratio"))
        largest = max(largest, own if real else 0.0)
        add_up(sums, metrics, real)
    return sums, largest, suspects


def update(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    *,
    response_tokens: np.ndarray,
    iteration: int,
    lr: float,
    kl_coef: float,
    flags: PpoFlags,
    seed: int,
    world: World,
    saving: Saving | None = None,
) -> dict[str, float]:
    """All passes over one batch. response_tokens (N,): of every row of every process; row i lives on process i % size.

    Raises NumericalError when the very first ratio is not 1, or a number is not finite; weights are then as before that step.
    """
    saving = saving or Saving()
    sums: dict[str, float] = {}
    tokens_seen, updates, kl_old_most = 0, 0, 0.0
    order = step_indices(len(response_tokens), flags.minibatch, flags.passes, seed, f"ppo {iteration}")
    for index, chosen in enumerate(order):
        model.train()
        mine = torch.from_numpy(chosen[chosen % world.size == world.rank] // world.size).to(batch.returns.device)
        mine = mine[batch.rollout.lengths[mine].argsort()]  # micro-batches of like lengths have little padding
        most = max(int((chosen % world.size == rank).sum()) for rank in range(world.size))
        count = int(response_tokens[chosen].sum())
        numbers, largest, suspects = accumulate(model, batch, mine, math.ceil(most / flags.micro_batch), count, kl_coef, flags, world)
        totals = dict(zip(numbers, world.total(list(numbers.values())), strict=True))
        where = f"ppo, iteration {iteration}, update {index}"
        if not all(map(math.isfinite, totals.values())):
            raise saving.not_finite(where, broken_names(totals), as_rows(batch.rollout, suspects, world), world)
        mean_log_ratio = totals.pop("log_ratio") / count
        if index == 0:
            first_log_ratio = check_first_ratio(world, mean_log_ratio, largest, where)
        kl_old_most = max(kl_old_most, kl_old := totals["kl_old_tok"] / count)
        if index and flags.target_kl is not None and kl_old > flags.target_kl:
            optimiser.zero_grad(set_to_none=True)  # this step, too, would go further
            break
        try:
            norm = clipped_step(model, optimiser, lr, flags.clip, where)
        except NumericalError as error:
            raise NumericalError(
                f"{error}; responses {chosen[:5].tolist()}, ...{saving.dump(where, as_rows(batch.rollout, mine.tolist(), world), world)}"
            ) from error
        totals["grad_norm"] = norm * count
        add_up(sums, totals, True)
        tokens_seen, updates = tokens_seen + count, updates + 1
    means = {name: value / tokens_seen for name, value in sums.items()}
    return means | {"kl_old_most": kl_old_most, "updates": updates, "first_ratio": math.exp(first_log_ratio)}


def summary(rollout: Rollout, world: World) -> dict[str, float]:
    """Means over the responses of all processes."""
    mask = rollout.mask
    rows, tokens = len(mask), float(mask.sum())
    columns = {
        "score": rollout.scores.sum(),
        "raw_score": rollout.raw_scores.sum(),
        "kl_ref_seq": rollout.kl.sum(),
        "ended": rollout.ended.float().sum(),
        "length": mask.sum(),
        "empty": ((mask.sum(dim=1) <= 1) & rollout.ended).float().sum(),
    }
    totals = world.total([rows, tokens, *(float(value) for value in columns.values())])
    out = {name: float(total) / totals[0] for name, total in zip(columns, totals[2:], strict=True)}
    return out | {"kl_ref_tok": out["kl_ref_seq"] * totals[0] / totals[1]}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, world: World) -> float:
    """1 - var(returns - values) / var(returns) over response tokens: 1 is a perfect critic, 0 one that knows only the mean."""
    residual, total = (float(moments_over_ranks(x, mask, world)[2]) for x in (returns - values, returns))
    return 1 - residual / total if total > 0 else 0.0


def train_ppo(
    model: nn.Module,
    ref: nn.Module,
    reward_model: nn.Module,
    prompts: Sequence[Sequence[int]],
    flags: PpoFlags,
    sampling: Sampling,
    *,
    same_start: bool,
    seed: int,
    world: World,
    metrics: Metrics,
    validate: Callable[[int], dict[str, float]],
    keep: Callable[[str], None],
    saving: Saving | None = None,
) -> dict[str, float]:
    """Trains a PolicyWithCritic on prompts (lists of ids) and keep("") saves the best so far by validation's "objective",
    keep("snapshot-...") one of a series that ends with the last. The model as it came in counts as step -1.

    same_start: policy and reference have the same weights, so the first KL must be 0. validate(iteration) -> numbers with "objective", on
    prompts of its own. Returns the best validation's numbers. Raises NumericalError where a number is not finite or an invariant fails,
    Interrupted after a signal.
    """
    saving = saving or Saving()
    optimiser = make_optimiser(model, flags.lr, flags.weight_decay, flags.critic_lr)
    began = time.perf_counter()

    def look(step: int) -> dict[str, float]:
        """Validation's numbers after an iteration."""
        checked = validate(step)
        if not math.isfinite(checked["objective"]):
            raise NumericalError(f"ppo, iteration {step}: validation's objective is {checked['objective']}")
        metrics.log(step=step, **{f"valid_{name}": value for name, value in checked.items()}, time=time.perf_counter() - began)
        return {**checked, "step": step}

    def one_round(iteration: int, kl_coef: float) -> dict[str, float]:
        """Steps 1 to 4 and the line of one iteration."""
        chosen = steps[iteration]
        keys = np.arange(len(chosen))[world.rank :: world.size]
        # 1. responses
        rollout, seconds = roll_out(
            model, ref, reward_model, [prompts[chosen[k]] for k in keys], [int(k) for k in keys],
            seed=seed, step=iteration, sampling=sampling, micro_batch=flags.micro_batch, world=world,
        )  # fmt: skip
        numbers = summary(rollout, world)
        check_rollout(numbers, rollout, f"ppo, iteration {iteration}", same_start and iteration == 0, world, saving)
        # 2. and 3. rewards and advantages
        batch = make_batch(rollout, kl_coef, flags, world)
        numbers["explained_variance"] = explained_variance(rollout.values[:, :-1], batch.returns, rollout.mask, world)
        # 4. the update
        start = time.perf_counter()
        response_tokens = np.zeros(len(chosen))
        response_tokens[keys] = rollout.mask.sum(dim=1).cpu().numpy()
        lr = lr_at(iteration, len(steps), flags.lr, flags.warmup)
        numbers |= update(
            model, optimiser, batch,
            response_tokens=world.total(response_tokens), iteration=iteration, lr=lr, kl_coef=kl_coef, flags=flags, seed=seed, world=world, saving=saving,
        )  # fmt: skip
        seconds["update"] = time.perf_counter() - start
        seconds["total"] = time.perf_counter() - began
        metrics.log(step=iteration, **numbers, kl_coef=kl_coef, lr=lr, time=seconds)
        return numbers

    steps = full_steps(len(prompts), flags.prompts_per_iteration, flags.iterations, seed, "ppo prompts")
    every = math.ceil(len(steps) / flags.validations)
    state = saving.restore(model, optimiser, metrics)
    if not state:
        state = {"step": 0, "best": look(-1), "kl_coef": flags.kl_coef, "warned": [], "finished": False}
        keep("")
    taken, best, kl_coef, warned, finished = (state[name] for name in ("step", "best", "kl_coef", "warned", "finished"))
    bar = tqdm(total=len(steps), initial=taken, desc="ppo", disable=not world.is_main, mininterval=1.0)
    with bar, saving.heeding_signals():
        while not finished:
            numbers = one_round(taken, kl_coef)
            warned = warn_of_collapse(numbers, taken + 1, warned, world)
            # 5. the coefficient, validation, a checkpoint
            kl_coef = next_kl_coef(kl_coef, numbers["kl_ref_seq"], flags.kl_target, flags.kl_horizon, len(steps[taken]))
            taken, finished = taken + 1, taken + 1 == len(steps)
            bar.update()
            bar.set_postfix(score=f"{numbers['score']:.2f}", kl=f"{numbers['kl_ref_seq']:.2f}", refresh=False)
            if taken % every == 0 or finished:
                checked = look(taken - 1)
                if flags.snapshots:
                    keep(f"snapshot-{taken:05d}")
                if checked["objective"] > best["objective"]:
                    best = checked
                    keep("")
            saving.after(taken, model, optimiser, metrics, best=best, kl_coef=kl_coef, warned=warned, finished=finished)
    return best
