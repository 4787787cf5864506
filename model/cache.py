"""Keys and values of the tokens that generation has read: a plain object handed to `forward`, never part of a model's weights.

The first call prefills right-padded prompts. Each later call adds one token per row at that row's own next slot, which overwrites the
row's padding: rows of different lengths stay in one rectangle and come out in the layout that training uses. Keys are held with their
tokens last, so that the product with a single query reads them in order.
"""

import torch
from torch import Tensor


class Cache:
    """keys: one (B, K, E, S) tensor per layer; values: one (B, K, S, E); lengths (B,): how many tokens of each row are held."""

    def __init__(self, prompt_lengths: Tensor, slots: int):
        """prompt_lengths (B,): real tokens in the prompts that the first call will bring; slots: S, prompt and response together."""
        self.prompt_lengths = prompt_lengths
        self.slots = slots
        self.lengths = torch.zeros_like(prompt_lengths)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.longest = 0  # max(lengths), known without asking the device

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
        rows, held = torch.arange(len(key), device=key.device), self.longest + 1
        self.keys[layer][rows, :, :, self.lengths] = key[:, :, 0]
        self.values[layer][rows, :, self.lengths] = value[:, :, 0]
        visible = torch.arange(held, device=key.device) <= self.lengths[:, None]
        return self.keys[layer][..., :held], self.values[layer][:, :, :held], visible

    def advance(self) -> None:
        """Counts the tokens of the call that just went through all layers."""
        if self.longest == 0:
            self.lengths = self.prompt_lengths.clone()
            self.longest = int(self.prompt_lengths.max())
        else:
            self.lengths += 1
            self.longest += 1

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but those listed (n,): finished rows leave the batch."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
        self.lengths = self.lengths[rows]
