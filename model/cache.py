"""Keys and values of the tokens that generation has read: a plain object handed to `forward`, never part of a model's weights.

The first call prefills right-padded prompts. Each later call adds one token per row in a slot that all rows share, behind the longest
prompt; what lies between a row's prompt and there is never looked at. Keys are held with their tokens last, so that the product with a
single query reads them in order.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Held(NamedTuple):
    """What one layer has to do with in a call: keys (B, K, E, S') and values (B, K, S', E) so far, with the slots of the call's tokens, the last ones,
    for the layer to fill; visible (B, S'): which slots each row's token may see, None for prompts, whose tokens attend to one another."""

    keys: Tensor
    values: Tensor
    visible: Tensor | None


class Cache:
    """keys: one (B, K, E, S) tensor per layer; values: one (B, K, S, E); lengths (B,): how many tokens of each row are held;
    filled: slots in use; visible (B, filled + 1): which slots the next token of each row may see, its own among them."""

    def __init__(self, prompt_lengths: Tensor, slots: int):
        """prompt_lengths (B,): real tokens in the prompts that the first call will bring; slots: S, prompt and response together."""
        self.prompt_lengths = prompt_lengths
        self.slots = slots
        self.lengths = torch.zeros_like(prompt_lengths)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.visible: Tensor | None = None
        self.filled = self.width = 0  # width: of the prompts, padding included

    def make_room(self, layers: int, kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
        """For prompts and responses of a model of this shape, whose keys and values have this type."""
        rows, device = len(self.lengths), self.lengths.device
        self.keys = [torch.zeros(rows, kv_heads, head_size, self.slots, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(rows, kv_heads, self.slots, head_size, dtype=dtype, device=device) for _ in range(layers)]

    def held(self, layer: int, new: int) -> Held:
        """One layer's, with slots for the `new` tokens of this call."""
        now = self.filled + new
        return Held(self.keys[layer][..., :now], self.values[layer][:, :, :now], self.visible)

    def advance(self) -> None:
        """Counts the tokens of the call that just went through all layers, and says what the next one may see."""
        if self.filled == 0:
            self.lengths = self.prompt_lengths.clone()
            self.filled = self.width = int(self.prompt_lengths.max())
        else:
            self.lengths += 1
            self.filled += 1
        slots = torch.arange(self.filled + 1, device=self.lengths.device)
        self.visible = (slots < self.prompt_lengths[:, None]) | (slots >= self.width)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but those listed (n,): finished rows leave the batch."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
        self.lengths, self.prompt_lengths, self.visible = self.lengths[rows], self.prompt_lengths[rows], self.visible[rows]
