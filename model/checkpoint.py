"""Models on disk: safetensors and config.json in Hugging Face's LLaMA layout, so that a stage's folder loads in transformers too.

A policy is a LlamaForCausalLM, with PPO's value head as one extra tensor; a reward model or critic is a LlamaForSequenceClassification
with one label, whose raw score is what `ScalarModel` returns. Our fused matrices are split into their published names. Only safetensors
are read: no file that could run code (a pickle) is ever opened.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data.errors import CheckpointError
from data.files import atomic_write, read_json, write_json
from model.heads import LanguageModel, ScalarModel
from model.parallel import bare, whole
from model.transformer import ModelConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"
RENAMED = {  # ours -> Hugging Face's, inside a layer
    "attention_norm.weight": "input_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}


def hugging_face_parts(name: str, config: ModelConfig) -> list[tuple[str, int]]:
    """Our tensor's name -> [(name on disk, rows)] in the order in which the parts are stacked in ours; rows 0 means all of it."""
    head_size, width = config.head_size, config.feed_forward
    top = {"trunk.embedding.weight": "model.embed_tokens.weight", "trunk.norm.weight": "model.norm.weight"}
    if not name.startswith("trunk.layers."):
        return [(top.get(name, name), 0)]
    index, rest = name.removeprefix("trunk.layers.").split(".", 1)
    prefix = f"model.layers.{index}."
    if rest == "attention.qkv.weight":
        rows = (config.heads * head_size, config.kv_heads * head_size, config.kv_heads * head_size)
        return [(f"{prefix}self_attn.{letter}_proj.weight", count) for letter, count in zip("qkv", rows, strict=True)]
    if rest == "feed_forward.gate_up.weight":
        return [(f"{prefix}mlp.{half}_proj.weight", width) for half in ("gate", "up")]
    return [(prefix + RENAMED[rest], 0)]


def to_hugging_face(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict -> names and shapes on disk; a tied output projection is left out, as is usual there."""
    out = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tied:
            continue
        parts = hugging_face_parts(name, config)
        pieces = [tensor] if parts[0][1] == 0 else tensor.split([rows for _, rows in parts])
        out.update({part: piece.contiguous() for (part, _), piece in zip(parts, pieces, strict=True)})
    return out


def config_to_json(config: ModelConfig, *, scalar: bool, bos_id: int, eos_id: int, pad_id: int) -> dict:
    """config.json as transformers 4 and 5 read it."""
    described = {
        "architectures": ["LlamaForSequenceClassification" if scalar else "LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": "float32",
    }
    return described | ({"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}} if scalar else {})


def config_from_json(described: dict, path: Path) -> ModelConfig:
    """ModelConfig from a LLaMA config.json; raises CheckpointError naming a field that would change the result and is not supported."""
    fixed = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "rope_scaling": (None,)}
    for field, allowed in fixed.items():
        if described.get(field, allowed[0]) not in allowed:
            raise CheckpointError(f"{path}: {field} = {described[field]!r} is not supported; only {allowed[0]!r} is")
    rope = described.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{path}: rope_parameters.rope_type = {rope['rope_type']!r} is not supported; only 'default' is")
    try:
        config = ModelConfig(
            vocab_size=described["vocab_size"],
            width=described["hidden_size"],
            layers=described["num_hidden_layers"],
            heads=described["num_attention_heads"],
            kv_heads=described.get("num_key_value_heads", described["num_attention_heads"]),
            feed_forward=described["intermediate_size"],
            context=described["max_position_embeddings"],
            rope_base=float(rope.get("rope_theta", described.get("rope_theta", 10_000.0))),
            norm_epsilon=described["rms_norm_eps"],
            tied=described.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: the field {error} is missing; is this a LLaMA checkpoint?") from error
    if described.get("head_dim", config.head_size) != config.head_size:
        raise CheckpointError(f"{path}: head_dim = {described['head_dim']} is not width / heads = {config.head_size}; not supported")
    return config


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    special_ids: dict[str, int],
    is_main: bool,
    extra: dict[str, Tensor] | None = None,
    extra_config: dict[str, float] | None = None,
) -> None:
    """Writes weights and config of a LanguageModel or ScalarModel; a collective call where the model is sharded, rank 0 writes.

    special_ids: bos_id, eos_id, pad_id; extra: tensors beside the layout (the value head); extra_config: numbers that belong to the
    weights (mean and standard deviation of a reward model's scores).
    """
    inner = bare(model)
    state = {name: whole(tensor).detach().cpu() for name, tensor in inner.state_dict().items()}
    extra = {name: whole(tensor).detach().cpu() for name, tensor in (extra or {}).items()}
    if is_main:
        tensors = to_hugging_face(state, inner.config) | extra
        atomic_write(Path(folder) / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        described = config_to_json(inner.config, scalar=isinstance(inner, ScalarModel), **special_ids)
        write_json(Path(folder) / CONFIG, described | (extra_config or {}))


def count_parameters(folder: Path) -> int:
    """Parameters of the model in a folder, from its config.json alone."""
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config_from_json(read_json(Path(folder) / CONFIG), Path(folder) / CONFIG)).parameters())


def load_model(folder: Path, kind: type[LanguageModel] | type[ScalarModel], *, new_head: bool = False, seed: int = 0) -> nn.Module:
    """A LanguageModel or ScalarModel from a folder in the published layout, in fp32 on the CPU.

    new_head: make a ScalarModel from a language model's trunk, its head drawn small from `seed`: N(0, 1e-2 / sqrt(D)) starts a reward
    model's loss at ln 2. Raises CheckpointError naming the folder and up to five mismatches; nothing is ever loaded in part.
    """
    folder = Path(folder)
    described = read_json(folder / CONFIG)
    is_scalar = "LlamaForSequenceClassification" in described.get("architectures", [])
    if is_scalar != (kind is ScalarModel) and not new_head:
        wanted, found = ("reward model", "language model") if kind is ScalarModel else ("language model", "reward model")
        raise CheckpointError(f"{folder}: holds a {found} where a {wanted} is needed")
    config = config_from_json(described, folder / CONFIG)
    with torch.device("meta"):
        model = kind(config)  # shapes only: what is read takes the place of every tensor
    if not (folder / WEIGHTS).exists():
        pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = f"; {pickles[0]} is a pickle, which can run code: convert it to safetensors first" if pickles else ""
        raise CheckpointError(f"{folder / WEIGHTS}: missing{hint}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: not a whole safetensors file ({error}); make or fetch it again") from error
    state = from_hugging_face(tensors, model, config, folder, skip=("score.weight",) if new_head else ())
    if new_head:
        generator = torch.Generator().manual_seed(seed)
        state["score.weight"] = torch.empty(1, config.width).normal_(0.0, 1e-2 / config.width**0.5, generator=generator)
    model.load_state_dict(state, assign=True)
    if config.tied and kind is LanguageModel:
        model.lm_head.weight = model.trunk.embedding.weight
    return model


def from_hugging_face(
    tensors: dict[str, Tensor], model: nn.Module, config: ModelConfig, folder: Path, skip: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Tensors on disk -> our whole state dict in fp32; raises CheckpointError on any missing, misshapen or unknown tensor."""
    state, problems, used = {}, [], {"value_head.weight"}
    if "score.weight" in skip:
        used.add("lm_head.weight")
    for name, wanted in model.state_dict().items():
        if name in skip:
            continue
        source = "trunk.embedding.weight" if name == "lm_head.weight" and config.tied else name
        shapes = {part: (rows or wanted.shape[0], *wanted.shape[1:]) for part, rows in hugging_face_parts(source, config)}
        used.update(shapes)
        for part, shape in shapes.items():
            if part not in tensors:
                problems.append(f"{part} is missing")
            elif tensors[part].shape != shape:
                problems.append(f"{part} has shape {tuple(tensors[part].shape)}, {shape} expected")
        if not problems:
            state[name] = torch.cat([tensors[part] for part in shapes]).float()
    ignored = used | {"lm_head.weight"} if config.tied else used
    problems += [f"{part} is not part of this architecture" for part in tensors if part not in ignored and "rotary_emb.inv_freq" not in part]
    if problems:
        raise CheckpointError(f"{folder / WEIGHTS}: does not fit its config.json: {'; '.join(problems[:5])}")
    return state
