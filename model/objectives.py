"""What SFT, the reward model and DPO minimise, as `Objective`s for the one loop in fit.py.

Each turns rows of ids into tensors, asks the model once, and hands the result to its loss in losses/. A pair is one row, whose prompt is
read once (packing.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from data.batches import PairRow, Row
from losses.dpo import Pairs, implicit_rewards
from losses.reward import reward_loss
from losses.sft import sft_loss
from model.fit import Objective
from model.score import pair_logps, pair_tensors, to_tensors

TIE = 1e-4  # nats: log-probabilities of a response that differ by less do so by rounding


def sft_objective(pad_id: int, device: torch.device, include_prompt: bool) -> Objective:
    """Next-token loss on the response, or on all after BOS; divided by tokens."""

    def loss(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, mask = to_tensors(rows, pad_id, device, include_prompt)
        return sft_loss(model(tokens, mask).logp, mask[:, 1:]).sum(), {}

    return Objective(loss, weight=lambda row: row.length - 1 if include_prompt else len(row.response))


def reward_objective(pad_id: int, device: torch.device) -> Objective:
    """Bradley-Terry loss on the two scores of each pair; divided by pairs."""

    def loss(model: nn.Module, rows: Sequence[PairRow]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, parts = pair_tensors(rows, pad_id, device)
        chosen, rejected = model(tokens, parts=parts).unbind(dim=1)
        gap = (chosen - rejected).detach()
        return reward_loss(chosen, rejected).sum(), {"accuracy": (gap > 0).float().sum() + 0.5 * (gap == 0).sum(), "gap": gap.sum()}

    return Objective(loss)


def preference_objective(
    preference_loss: Callable[[Pairs], Tensor],
    beta: float,
    ref_logps: dict[str, tuple[float, float]],
    pad_id: int,
    device: torch.device,
    gaps: dict[str, float] | None = None,
) -> Objective:
    """A loss of losses/dpo.py; ref_logps: row id -> the reference's (chosen, rejected) sums, gaps: -> the reward model's gap; divided by pairs.

    Metrics per pair: accuracy and margin of the implicit rewards, the two rewards, the two log-probabilities, and chosen_fall, by how
    many nats the chosen response has become less likely than under the reference.
    """

    def loss(model: nn.Module, rows: Sequence[PairRow]) -> tuple[Tensor, dict[str, Tensor]]:
        """Of some pairs: the summed loss, and the summed metrics."""
        chosen_logp, rejected_logp = pair_logps(model, rows, pad_id, device).unbind(dim=1)
        ref = torch.tensor([ref_logps[row.id] for row in rows], dtype=torch.float32, device=device)
        lengths = torch.tensor([[len(row.chosen.response), len(row.rejected.response)] for row in rows], device=device)
        gap = None if gaps is None else torch.tensor([gaps[row.id] for row in rows], dtype=torch.float32, device=device)
        pairs = Pairs(chosen_logp, rejected_logp, ref[:, 0], ref[:, 1], lengths[:, 0], lengths[:, 1], gap)
        chosen_reward, rejected_reward = implicit_rewards(pairs, beta)
        margin = chosen_reward - rejected_reward
        metrics = {
            "accuracy": torch.where(margin.abs() <= TIE * beta, 0.5, (margin > 0).float()),
            "margin": margin,
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "chosen_logp": chosen_logp.detach(),
            "rejected_logp": rejected_logp.detach(),
            "chosen_fall": ref[:, 0] - chosen_logp.detach(),
        }
        return preference_loss(pairs).sum(), {name: value.sum() for name, value in metrics.items()}

    return Objective(loss)
