"""What SFT, the reward model and DPO minimise, as `Objective`s for the one loop in fit.py.

Each turns rows of ids into tensors, asks the model once, and hands the result to its loss in losses/. A pair's two responses go through
the model in one forward pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from data.batches import PairRow, Row
from losses.dpo import Pairs, implicit_rewards
from losses.masked import masked_sum
from losses.reward import reward_loss
from losses.sft import sft_loss
from model.fit import Objective
from model.score import row_lengths, to_tensors


def both_halves(rows: Sequence[PairRow]) -> list[Row]:
    """All chosen rows, then all rejected ones: one batch whose outputs split in the middle."""
    return [row.chosen for row in rows] + [row.rejected for row in rows]


def sft_objective(pad_id: int, device: torch.device, include_prompt: bool) -> Objective:
    """Next-token loss on the response, or on all after BOS; divided by tokens."""

    def loss(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, mask = to_tensors(rows, pad_id, device, include_prompt)
        return sft_loss(model(tokens, mask).logp, mask[:, 1:]).sum(), {}

    return Objective(loss, weight=lambda row: row.length - 1 if include_prompt else len(row.response))


def reward_objective(pad_id: int, device: torch.device) -> Objective:
    """Bradley-Terry loss on the two scores of each pair; divided by pairs."""

    def loss(model: nn.Module, rows: Sequence[PairRow]) -> tuple[Tensor, dict[str, Tensor]]:
        halves = both_halves(rows)
        tokens, _ = to_tensors(halves, pad_id, device)
        chosen, rejected = model(tokens, row_lengths(halves, device)).chunk(2)
        gap = (chosen - rejected).detach()
        return reward_loss(chosen, rejected).sum(), {"accuracy": (gap > 0).float().sum() + 0.5 * (gap == 0).sum(), "gap": gap.sum()}

    return Objective(loss)


def preference_objective(
    preference_loss: Callable[[Pairs], Tensor], beta: float, ref_logps: dict[str, tuple[float, float]], pad_id: int, device: torch.device
) -> Objective:
    """A loss of losses/dpo.py; ref_logps: row id -> the reference's (chosen, rejected) sums; divided by pairs.

    Metrics per pair: accuracy and margin of the implicit rewards, the two rewards, the two log-probabilities, and chosen_fall, by how
    many nats the chosen response has become less likely than under the reference.
    """

    def loss(model: nn.Module, rows: Sequence[PairRow]) -> tuple[Tensor, dict[str, Tensor]]:
        halves = both_halves(rows)
        tokens, mask = to_tensors(halves, pad_id, device)
        chosen_logp, rejected_logp = masked_sum(model(tokens, mask).logp, mask[:, 1:]).chunk(2)
        ref = torch.tensor([ref_logps[row.id] for row in rows], dtype=torch.float32, device=device)
        lengths = torch.tensor([len(row.response) for row in halves], device=device)
        pairs = Pairs(chosen_logp, rejected_logp, ref[:, 0], ref[:, 1], *lengths.chunk(2))
        chosen_reward, rejected_reward = implicit_rewards(pairs, beta)
        margin = chosen_reward - rejected_reward
        metrics = {
            "accuracy": (margin > 0).float() + 0.5 * (margin == 0),
            "margin": margin,
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "chosen_logp": chosen_logp.detach(),
            "rejected_logp": rejected_logp.detach(),
            "chosen_fall": ref[:, 0] - chosen_logp.detach(),
        }
        return preference_loss(pairs).sum(), {name: value.sum() for name, value in metrics.items()}

    return Objective(loss)
