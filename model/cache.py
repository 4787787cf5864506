"""Keys and values of the tokens that generation has read: a plain object handed to `forward`, never part of a model's weights.

The first call prefills right-padded prompts. Each later call adds one token per row in a slot that all rows share, behind the longest
prompt; what lies between a row's prompt and there is never looked at. Keys are held with their tokens last, so that the product with a
single query reads them in order.
"""

import torch
from torch import Tensor


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
        self.filled = self.width = 0  # width: of the prompts, padding included

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Stores one layer's new key and value (B, K, T, E). Returns what a decoded token attends to, keys (B, K, E, S), values (B, K, S, E) and
        which of them each row may see (B, S); None for prompts, whose tokens attend to one another."""
        if layer == len(self.keys):
            rows, kv_heads, length, head_size = key.shape
            self.keys.append(key.new_zeros(rows, kv_heads, head_size, self.slots))
            self.values.append(value.new_zeros(rows, kv_heads, self.slots, head_size))
            self.keys[layer][..., :length] = key.transpose(2, 3)
            self.values[layer][:, :, :length] = value
            return None
        now = self.filled + 1
        self.keys[layer][..., self.filled] = key[:, :, 0]
        self.values[layer][:, :, self.filled] = value[:, :, 0]
        return self.keys[layer][..., :now], self.values[layer][:, :, :now], self.visible

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
