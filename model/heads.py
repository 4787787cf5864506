"""What stands on the trunk: a language model, a scalar model (reward model or critic), and PPO's policy with its critic.

All computing goes through `forward`, because DDP and FSDP2 hang their communication on it. Log-probabilities are computed from the
hidden states of response tokens alone, in chunks whose logits are recomputed in the backward pass: the (B, T, V) tensor, the largest
one of a language model's training step, never exists.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batches import CHOSEN, REJECTED
from losses.logprobs import entropy, log_probs, token_logps
from model.cache import Cache
from model.packing import last_column, packing
from model.transformer import ModelConfig, Transformer

CHUNK = 4096  # response tokens whose logits exist at a time


class TokenScores(NamedTuple):
    """What a policy says of given tokens. Column t of `logp` and `entropy` (B, T-1) is about token t+1, 0 off the mask; entropy only
    where asked for. `values` (B, T), where there is a critic: column t is V after reading tokens 0..t, from before the
    response's first token to after its last; anything elsewhere."""

    logp: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


class LanguageModel(nn.Module):
    """A trunk and the projection to the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.trunk = Transformer(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.trunk.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        response_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        cache: Cache | None = None,
        parts: Tensor | None = None,
    ):
        """Three uses, one entrance.

        tokens (B, T) alone: logits (B, T, V).
        With response_mask (B, T) bool: `TokenScores` of the masked tokens, all of them at one `temperature`; with parts (B, T), of packed pairs.
        With a cache: logits (B, V) for the token that follows each row's last real one.
        """
        if cache is not None:
            prompts = cache.filled == 0
            last = states_at(self.trunk, tokens, cache.prompt_lengths[:, None] - 1, cache=cache) if prompts else self.trunk(tokens, cache)
            cache.advance()
            return self.lm_head(last[:, 0])
        if response_mask is None:
            return self.lm_head(self.trunk(tokens))
        layout = None if parts is None else packing(parts)
        previous = None if layout is None else layout.previous
        hidden = self.trunk(tokens, packing=layout, read=predicting(response_mask, previous))
        return score_tokens(hidden, tokens, response_mask, self.lm_head, temperature, previous=previous)


def states_at(trunk: Transformer, tokens: Tensor, columns: Tensor, **more) -> Tensor:
    """The trunk's states at some columns (B, n) of tokens (B, T), for which alone it works where it can: (B, n, D)."""
    hidden = trunk(tokens, read=torch.zeros_like(tokens, dtype=torch.bool).scatter(1, columns, True), **more)
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], columns]


def predicting(response_mask: Tensor, previous: Tensor | None = None) -> Tensor:
    """(B, T) bool: the columns whose states predict the masked tokens; previous as in `score_tokens`."""
    if previous is None:
        return F.pad(response_mask[:, 1:], (0, 1))
    read, mask = torch.zeros_like(response_mask), response_mask[:, 1:]
    read[mask.nonzero()[:, 0], previous[:, 1:][mask]] = True
    return read


def score_tokens(
    hidden: Tensor, tokens: Tensor, response_mask: Tensor, lm_head: nn.Module, temperature: float, *,
    with_entropy: str = "", previous: Tensor | None = None,
) -> TokenScores:  # fmt: skip
    """Log-probability, and entropy where asked for, (B, T-1) of the masked tokens, from hidden states (B, T, D) and ids (B, T).

    with_entropy: "value", through which no gradient flows, so that the backward pass has no further (N, V) tensors, or "gradient".
    previous (B, T): the column whose state predicts each token, where that is not the one before it."""
    mask = response_mask[:, 1:]
    targets = tokens[:, 1:][mask]
    states = hidden[:, :-1][mask] if previous is None else hidden[mask.nonzero()[:, 0], previous[:, 1:][mask]]

    def chunk_scores(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logps = log_probs(lm_head(states), temperature)
        with torch.set_grad_enabled(torch.is_grad_enabled() and with_entropy == "gradient"):
            spread = entropy(logps) if with_entropy else torch.zeros_like(targets, dtype=torch.float32)
        return token_logps(logps, targets), spread

    if len(states) <= CHUNK:
        parts = [chunk_scores(states, targets)]
    else:
        pieces = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        parts = [checkpoint(chunk_scores, *piece, use_reentrant=False) for piece in pieces]
    logp, spread = (torch.cat(column) for column in zip(*parts, strict=True))
    zeros = logp.new_zeros(mask.shape)
    return TokenScores(zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, spread) if with_entropy else None)


def read_scalar(hidden: Tensor, head: nn.Linear) -> Tensor:
    """One float32 number per hidden state, (..., D) -> (...). Always in float32: in bf16 a score between 2 and 4 moves in steps of 1/64,
    and scores are there to be subtracted from one another."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.weight.float()).sum(dim=-1)  # of one number; FSDP2 warns of the view that squeeze makes


class ScalarModel(nn.Module):
    """A trunk and one number per token: the reward model reads the last real token's, a critic those of the response."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.trunk = Transformer(config)
        self.score = nn.Linear(config.width, 1, bias=False)

    def forward(
        self, tokens: Tensor, lengths: Tensor | None = None, parts: Tensor | None = None, *, read: Tensor | None = None
    ) -> Tensor:
        """tokens (B, T) -> one number per token (B, T), of those to read (B, T) alone where given; or with lengths (B,) the one at each row's
        last real token (B,), or with parts (B, T) those at the ends of both responses of packed pairs (B, 2), chosen first; float32."""
        if lengths is None and parts is None:
            return read_scalar(self.trunk(tokens, read=read), self.score)
        ends = lengths[:, None] - 1 if parts is None else torch.stack([last_column(parts, part) for part in (CHOSEN, REJECTED)], dim=1)
        scores = read_scalar(states_at(self.trunk, tokens, ends, packing=None if parts is None else packing(parts)), self.score)
        return scores.squeeze(1) if parts is None else scores


class PolicyWithCritic(nn.Module):
    """PPO's trainable whole: a language model and its critic, which is a value head on the same trunk or a scalar model of its own.

    A critic that starts as the reward model speaks in raw log-odds, PPO's rewards in (raw - score_mean) / score_std; so do its values.
    """

    def __init__(self, policy: LanguageModel, critic: ScalarModel | None, score_mean: float = 0.0, score_std: float = 1.0):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.score_mean, self.score_std = score_mean, score_std
        self.value_head = None
        if critic is None:
            self.value_head = nn.Linear(policy.config.width, 1, bias=False)
            nn.init.zeros_(self.value_head.weight)

    def forward(
        self, tokens: Tensor, response_mask: Tensor | None = None, *, temperature: float = 1.0, with_entropy: str = "", cache: Cache | None = None
    ):
        """tokens and response_mask (B, T) -> `TokenScores` with values, and with entropy as `score_tokens` is asked for it; with a cache it
        decodes as the policy alone does."""
        if cache is not None:
            return self.policy(tokens, cache=cache)
        read = response_mask | predicting(response_mask)  # a value before each token of the response, and after it
        hidden = self.policy.trunk(tokens, read=read)
        scores = score_tokens(hidden, tokens, response_mask, self.policy.lm_head, temperature, with_entropy=with_entropy)
        if self.critic is None:
            values = read_scalar(hidden, self.value_head)
        else:
            values = (self.critic(tokens, read=read) - self.score_mean) / self.score_std
        return scores._replace(values=values)
