"""The decoder: LLaMA's architecture in plain PyTorch, and the sizes it comes in.

RMSNorm before each block, rotary positions, grouped-query attention, a SwiGLU feed-forward, no biases, no dropout. Rows are padded on
the right, so under the causal mask no real token ever sees padding: training needs neither an attention mask nor position ids. Told whose
states are read, everything but attention leaves out padding, and the last layer after its attention all but those tokens. With a `Cache`
(model/cache.py) the same code prefills prompts and decodes one token per row. Query, key and value share one matrix, as do the feed-forward's
two inputs: fewer, larger products. model/checkpoint.py splits them into Hugging Face's names on disk.

Source: Touvron et al., arXiv 2302.13971; RMSNorm is Zhang and Sennrich, arXiv 1910.07467, grouped queries Ainslie et al., arXiv 2305.13245.

Letters: B rows, T length, D width, L layers, H query heads, K key-value heads, E head size, F feed-forward width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.errors import UsageError
from model.cache import Cache, Held
from model.packing import Packing


@dataclass(frozen=True)
class RopeScaling:
    """How a published model stretched its rotary positions to a longer context; the two ways that do not depend on a text's length.

    linear: every frequency is divided by `factor`. llama3 (Llama 3.1): wavelengths above original_context / low are divided, those below
    original_context / high are left, those between are blended.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network's shape and function."""

    vocab_size: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    feed_forward: int = 352
    context: int = 512
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tied: bool = False

    def __post_init__(self):
        if self.width % self.heads or self.heads % self.kv_heads or (self.width // self.heads) % 2:
            raise UsageError(
                f"width {self.width}, {self.heads} heads and {self.kv_heads} key-value heads do not fit: width must be a multiple of"
                " the heads with an even head size, and the heads a multiple of the key-value heads"
            )

    @property
    def head_size(self) -> int:
        return self.width // self.heads


FEW = 1 / 16  # of a batch's tokens: leaving out so few costs more, as every layer then copies all others, than it saves

SIZES = {
    "tiny": ModelConfig(tied=True),  # about 1M parameters: minutes on two CPU cores
    "mini": ModelConfig(width=256, layers=6, heads=8, kv_heads=8, feed_forward=704, tied=True),  # 5M
    "small": ModelConfig(vocab_size=8192, width=512, layers=8, heads=8, kv_heads=8, feed_forward=1408, context=1024),  # 34M
    "base": ModelConfig(vocab_size=32_000, width=768, layers=12, heads=12, kv_heads=12, feed_forward=2048, context=2048),  # 134M
    "1b": ModelConfig(vocab_size=32_000, width=2048, layers=22, heads=32, kv_heads=4, feed_forward=5632, context=2048),
    "7b": ModelConfig(vocab_size=32_000, width=4096, layers=32, heads=32, kv_heads=32, feed_forward=11_008, context=4096),
}


def rotary(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (*positions.shape, E) of the rotary embedding [Su et al. 2021, eq. 15], in Hugging Face's half-split order."""
    exponents = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32) / config.head_size
    frequencies, scaling = config.rope_base**-exponents, config.rope_scaling
    if scaling is not None:
        slow = frequencies / scaling.factor
        if scaling.kind == "llama3":
            turns = scaling.original_context * frequencies / (2 * math.pi)  # within the context that the model was first trained on
            kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
            slow = kept * frequencies + (1 - kept) * slow
        frequencies = slow
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i+E/2}) of x (B, H, T, E) by its position's angle; cos and sin broadcast against x."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend_to_cache(query: Tensor, held: Held) -> Tensor:
    """One query per row: softmax(q k / sqrt(E)) v over what is visible of keys and values; query and result (B, H, 1, E). On CPUs two
    products are faster than torch's kernel, which is made for many queries (tests/results/speed.md)."""
    grouped = query.reshape(*held.values.shape[:2], -1, query.shape[3])  # (B, K, H / K, E): the queries that share a key-value head
    scores = (grouped @ held.keys).float() * query.shape[3] ** -0.5
    weights = scores.masked_fill(~held.visible[:, None, None], -math.inf).softmax(dim=-1)
    return (weights.to(held.values.dtype) @ held.values).reshape(query.shape)


@dataclass(frozen=True)
class Places:
    """Where N tokens of a batch (B, T) are: their numbers in the flattened batch (N,), and its shape."""

    numbers: Tensor
    shape: torch.Size

    def spread(self, x: Tensor) -> Tensor:
        """(N, D) -> (B, T, D), with zeros for all others."""
        whole = x.new_zeros(self.shape.numel(), x.shape[-1])
        whole[self.numbers] = x  # index_copy would keep x for its backward pass
        return whole.unflatten(0, self.shape)

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (N, D)."""
        return x.flatten(0, 1).index_select(0, self.numbers)

    def among(self, others: "Places | None", x: Tensor) -> Tensor:
        """The (N, D) of these tokens out of the x (M, D) of others, of which they are some; or of all, (B, T, D)."""
        return self.gather(x) if others is None else x.index_select(0, torch.searchsorted(others.numbers, self.numbers))


def places_of(mask: Tensor, few: float = 0.0) -> Places | None:
    """Those of a mask (B, T), or None where it leaves out no more than this share."""
    numbers = mask.flatten().nonzero().squeeze(1)
    return Places(numbers, mask.shape) if len(numbers) < (1 - few) * mask.numel() else None


def up_to_last(mask: Tensor) -> Tensor:
    """(B, T) bool -> True up to each row's last True."""
    return mask.flip(1).cumsum(1).flip(1) > 0


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_size, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, places: Places | None, read: Places | None, held: Held | None
    ) -> Tensor:
        """x (B, T, D), or with places (N, D), to the same, or with read to the (M, D) of those tokens. Causal without a mask; mask
        (B, 1, T, T) says which keys (last) a query may see. Where something is visible in what is held, T is 1 and each row attends to that."""
        heads, kv_heads, head_size = self.config.heads, self.config.kv_heads, self.config.head_size
        qkv = self.qkv(x) if places is None else places.spread(self.qkv(x))
        if held is None and qkv.device.type == "cpu":
            qkv = qkv.float()  # under bf16, too: torch's attention on CPUs can take twice as long in it (tests/results/speed.md)
        qkv = qkv.unflatten(-1, (heads + 2 * kv_heads, head_size)).transpose(1, 2)
        query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
        query, key = rotate(query, *rope), rotate(key, *rope)
        if value.requires_grad:
            value = value.contiguous()  # a view would keep all of qkv for the backward pass
        if held is not None:
            held.keys[..., -key.shape[2] :], held.values[:, :, -key.shape[2] :] = key.transpose(2, 3), value
        if mask is not None and heads != kv_heads:  # torch's fast kernels on GPUs take a mask or fewer keys than queries, not both
            key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        with torch.autocast(qkv.device.type, enabled=False):
            if held is None or held.visible is None:
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=key.shape[1] != heads)
            else:
                mixed = attend_to_cache(query, held)
        mixed = mixed.transpose(1, 2).flatten(2)
        kept = read or places
        return self.output(mixed if kept is None else kept.gather(mixed))


class FeedForward(nn.Module):
    """SwiGLU [Shazeer 2020]: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, places: Places | None, read: Places | None, held: Held | None
    ) -> Tensor:
        mixed = self.attention(self.attention_norm(x), rope, mask, places, read, held)
        x = (x if read is None else read.among(places, x)) + mixed
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """The trunk that every model here stands on: token ids in, hidden states out. heads.py puts something on top."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # trades a second forward for the memory of the activations; set by --checkpoint-activations
        weight = torch.zeros(config.vocab_size, config.width)  # for `initialise`, or a file, to fill: torch's own draw would take a second on "meta"
        self.embedding = nn.Embedding(config.vocab_size, config.width, _weight=weight)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)

    def forward(
        self, tokens: Tensor, cache: Cache | None = None, packing: Packing | None = None, read: Tensor | None = None
    ) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D) after the last norm; with a cache, tokens continue each row where it stands. read
        (B, T) bool marks the tokens whose states are asked for, and those of the others are 0: what comes after a row's last one cannot be
        seen from there, and is left out; to what the last layer makes nobody attends, so it makes only theirs."""
        start = 0 if cache is None else cache.lengths[:, None]
        positions = start + torch.arange(tokens.shape[1], device=tokens.device) if packing is None else packing.positions  # (T,) or (B, T)
        mask = None if packing is None else packing.mask
        cos, sin = rotary(positions, self.config)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, E): one set of angles for all heads
        places, asked = (None, None) if read is None else (places_of(up_to_last(read), FEW), places_of(read))
        x = self.embedding(tokens if places is None else tokens.flatten()[places.numbers])
        if cache is not None and not cache.keys:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            cache.make_room(self.config.layers, self.config.kv_heads, self.config.head_size, dtype)
        for index, layer in enumerate(self.layers):
            own = asked if index + 1 == len(self.layers) else None
            if self.checkpoint_activations and self.training and cache is None:
                x = checkpoint(layer, x, (cos, sin), mask, places, own, None, use_reentrant=False)
            else:
                x = layer(x, (cos, sin), mask, places, own, None if cache is None else cache.held(index, tokens.shape[1]))
        made = asked or places
        return self.norm(x) if made is None else made.spread(self.norm(x))


def first_values(model: nn.Module, seed: int) -> Callable[[str], Tensor]:
    """What gives a model's parameters by their names, one after the other in the order of `named_parameters`, their first values: N(0, 1/D)
    from a generator of its own; the two matrices that write to the residual stream smaller by sqrt(2 L); ones for norms.

    At D = 2500 this is GPT-2's std of 0.02.
    """
    generator = torch.Generator().manual_seed(seed)
    config = next(module for module in model.modules() if isinstance(module, Transformer)).config
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(name: str) -> Tensor:
        if len(shapes[name]) < 2:
            return torch.ones(shapes[name])
        residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        std = config.width**-0.5 / ((2 * config.layers) ** 0.5 if residual else 1.0)
        return torch.empty(shapes[name]).normal_(0.0, std, generator=generator)

    return read


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Gives a model on the CPU all its first values, where no stage does so as it brings it to its device."""
    read = first_values(model, seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))


def sized(size: str, vocab_size: int, context: int | None = None) -> ModelConfig:
    """The named size with the tokenizer's vocabulary; raises UsageError on an unknown name."""
    if size not in SIZES:
        raise UsageError(f"--size {size}: unknown; the sizes are {', '.join(SIZES)}")
    return replace(SIZES[size], vocab_size=vocab_size, context=context or SIZES[size].context)
