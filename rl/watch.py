"""What must hold in every round of PPO, and signs of a collapse that are told of once.

What makes no sense to learn from ends the run before any weight moves: numbers that are not finite, a first ratio that is not 1, a first
KL that is not 0 between models of the same weights. Each says where; rows with numbers that are not finite go to failures/.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from data.batches import Row
from data.errors import NumericalError
from model.fit import broken_names
from model.parallel import World
from model.resume import Saving
from rl.rollout import Rollout

EXPLODED = 1.0  # nats of KL per token above which PPO warns: every token e times likelier than under the reference; the worlds' runs end near 0.1
SETTLED = 10  # rounds after which a critic should tell something of the returns


def check_rollout(numbers: dict[str, float], rollout: Rollout, where: str, same_weights: bool, world: World, saving: Saving) -> None:
    """Raises NumericalError where a number is not finite, or where there is a KL between a policy and a reference of the same weights."""
    # Values: before each response token, and after it, where a bootstrap may read.
    per_token = (rollout.kl, rollout.logp, rollout.ref_logp, rollout.values[:, :-1], rollout.values)
    good = torch.stack([x.where(m, 0.0).isfinite().all(dim=1) for x in per_token for m in [rollout.response_mask[:, -x.shape[1] :]]]).all(dim=0)
    good &= rollout.scores.isfinite()
    if world.any(not bool(good.all())) or not all(map(math.isfinite, numbers.values())):
        suspects = as_rows(rollout, (~good).nonzero().flatten().tolist(), world)
        raise saving.not_finite(where, broken_names(numbers) or "a log-probability or value", suspects, world)
    if same_weights and abs(numbers["kl_ref_tok"]) > (2e-2 if world.dtype == torch.bfloat16 else 1e-5):
        raise NumericalError(f"{where}: the first KL to the reference is {numbers['kl_ref_tok']:.2e} per token, though both start from the same weights")


def check_first_ratio(world: World, mean: float, largest: float, where: str) -> float:
    """Before any weight of a round has moved, policy and sampling policy are one, and so is every ratio. mean: of |log ratio| over the tokens
    of all processes; largest: of this one's. Returns the largest of all; raises NumericalError where they are not 0 up to rounding, of which an
    unlikely token of a large model has more than the mean; in bf16, where a logit near 30 moves in steps of 1/8, only the mean can tell."""
    everyone = np.zeros(world.size)
    everyone[world.rank] = largest
    largest = float(world.total(everyone).max())
    most_mean, most = (0.05, math.inf) if world.dtype == torch.bfloat16 else (1e-5, 1e-3)
    if mean > most_mean or largest > most:
        raise NumericalError(
            f"{where}: the first ratio is not 1: |log ratio| is {mean:.2e} in the mean (bound {most_mean}) and {largest:.2e} for the worst token"
            f" (bound {most}); old log-probabilities and update do not see the same model, tokens or temperature"
        )
    return largest


def warn_of_collapse(numbers: dict[str, float], rounds: int, warned: list[str], world: World) -> list[str]:
    """Says what to look at when all responses are empty, none ends, the KL explodes, or the critic is worse than none after ten of the rounds that
    were taken; each once. Returns what was said so far."""
    signs = {
        "empty": (numbers["empty"] == 1,
            "collapsed: 100 % of the responses are empty; look at the reward model's scores of empty text, and at kl_ref_seq"),
        "ended": (numbers["ended"] == 0,
            "eos_rate=0: no response ended; was the end token learnt in SFT (is `ended` of the SFT model near 1)? is --max-response too short?"),
        "kl": (numbers["kl_ref_tok"] > EXPLODED,
            f"the KL to the reference has grown to {numbers['kl_ref_tok']:.2f} nats per token, {numbers['kl_ref_seq']:.1f} per response; read some"
            " responses: a score that rises here is mostly the reward model deceived; take a larger KL coefficient, a target for the KL, or a smaller learning rate"),
        "critic": (rounds >= SETTLED and numbers["explained_variance"] < 0,
            f"explained_variance is {numbers['explained_variance']:.2f} after {rounds} rounds: the critic tells less of the returns than their mean would, and adds"
            " noise to the advantages; take a smaller --lr or a --critic-lr of its own, and with --critic trunk a small --value-coef"),
    }  # fmt: skip
    new = [name for name, (seen, _) in signs.items() if seen and name not in warned]
    for name in new if world.is_main else ():
        tqdm.write(f"warning: ppo: {signs[name][1]}")
    return warned + new


def as_rows(rollout: Rollout, rows: Sequence[int], world: World) -> list[Row]:
    """Some of this process's responses as rows, whose ids are their numbers among those of all processes."""
    made = []
    for row in rows:
        prompt = rollout.lengths[row] - rollout.response_mask[row].sum()
        ids = rollout.tokens[row, : rollout.lengths[row]].tolist()
        made.append(Row(f"response {row * world.size + world.rank}", tuple(ids[:prompt]), tuple(ids[prompt:])))
    return made
