"""Keys and values of the tokens that generation has read: a plain object handed to `forward`, never part of a model's weights.

The first call prefills right-padded prompts. Each later call adds one token per row at that row's own next slot, which overwrites the
row's padding: rows of different lengths stay in one rectangle and come out in the layout that training uses.
"""

import torch
from torch import Tensor


class Cache:
    """keys and values: one (B, K, S, E) tensor per layer; lengths (B,): how many tokens of each row are held."""

    def __init__(self, prompt_lengths: Tensor, slots: int):
        """prompt_lengths (B,): real tokens in the prompts that the first call will bring; slots: S, prompt and response together."""
        self.prompt_lengths = prompt_lengths
        self.slots = slots
        self.lengths = torch.zeros_like(prompt_lengths)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.longest = 0  # max(lengths), known without asking the device

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores one layer's new key and value (B, K, T, E); returns what to attend to and the mask (None: causal within the call)."""
        if layer == len(self.keys):  # prefill: rows start at 0, causal attention within the call
            rows, kv_heads, length, head_size = key.shape
            for store, new in ((self.keys, key), (self.values, value)):
                store.append(new.new_zeros(rows, kv_heads, self.slots, head_size))
                store[layer][:, :, :length] = new
            return key, value, None
        rows = torch.arange(len(key), device=key.device)
        self.keys[layer][rows, :, self.lengths] = key[:, :, 0]
        self.values[layer][rows, :, self.lengths] = value[:, :, 0]
        visible = torch.arange(self.longest + 1, device=key.device) <= self.lengths[:, None]
        return self.keys[layer][:, :, : self.longest + 1], self.values[layer][:, :, : self.longest + 1], visible[:, None, None]

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
