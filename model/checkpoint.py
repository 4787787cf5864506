"""Models on disk: safetensors and config.json in Hugging Face's LLaMA layout, so that a stage's folder loads in transformers too.

A policy is a LlamaForCausalLM, with PPO's value head as one extra tensor; a reward model or critic is a LlamaForSequenceClassification
with one label, whose raw score is what `ScalarModel` returns. Our fused matrices are split into their published names. Weights are one
file, or several with an index once they pass SHARD bytes. Only safetensors are read: no file that could run code (a pickle) is ever opened.

A published model of that layout is read as well, in any of fp32, fp16 and bf16 (Llama 1 to 3 as far as weights go, TinyLlama, OpenLLaMA,
CodeLlama, Mistral within its sliding window). What config.json says and this code cannot do is refused by name.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data.errors import CheckpointError, UsageError
from data.files import CONFIG, INDEX, WEIGHTS, atomic_write, read_json, weight_files, write_json
from model.heads import LanguageModel, ScalarModel
from model.parallel import bare, fill, whole
from model.transformer import ModelConfig, RopeScaling

SHARD = 4 * 2**30  # bytes in one file of weights, and so in memory while a model is written
FLOATS = ("F64", "F32", "F16", "BF16")
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


def rope_to_json(config: ModelConfig) -> dict:
    """The rotary fields of config.json, in the spelling of transformers 4 and in that of 5."""
    scaling, described = config.rope_scaling, {"rope_type": "default"}
    if scaling is not None:
        described = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            described |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
            described["original_max_position_embeddings"] = scaling.original_context
    return {
        "rope_theta": config.rope_base,
        "rope_scaling": described if scaling is not None else None,
        "rope_parameters": described | {"rope_theta": config.rope_base},
    }


def rope_from_json(described: dict, path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either spelling; raises CheckpointError on one that changes with the text's length."""
    rope = described.get("rope_scaling") or described.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: the rotary scaling {rope!r} is no object; take the field from the model's publisher")
    base = rope.get("rope_theta", described.get("rope_theta", 10_000.0))
    if described.get("rope_theta", base) != base:
        raise CheckpointError(f"{path}: rope_theta is {described['rope_theta']} and, inside rope_parameters, {base}; correct one of them")
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        if kind == "default":
            return float(base), None
        if kind == "linear":
            return float(base), RopeScaling(kind, float(rope["factor"]))
        if kind == "llama3":
            bounds = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
            return float(base), RopeScaling(kind, *bounds, int(rope["original_max_position_embeddings"]))
    except KeyError as error:
        raise CheckpointError(f"{path}: the rotary scaling {kind!r} lacks {error}; take the field from the model's publisher") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the rotary fields {rope | {'rope_theta': base}} are not all numbers ({error}); take them from the model's publisher") from error
    raise CheckpointError(
        f"{path}: rope_type = {kind!r} is not supported; only 'default', 'linear' and 'llama3' are, which do not change with a text's length"
    )


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
        **rope_to_json(config),
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


REFUSED = {  # field of config.json -> the values under which the result is that of this code; a field that is missing has the first
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "auto_map": (None,),  # code of its own beside the weights
}


COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")


def config_from_json(described: dict, path: Path) -> ModelConfig:
    """ModelConfig from a LLaMA or Mistral config.json; raises CheckpointError naming a field that would change the result and is not
    supported. A Mistral's context ends at its sliding window: up to there it is a LLaMA."""
    for field, allowed in REFUSED.items():
        if described.get(field, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{path}: {field} = {described[field]!r} is not supported; only {' or '.join(map(repr, allowed))} is: start from another model"
            )
    for field in COUNTS:
        if field not in described:
            raise CheckpointError(f"{path}: the field {field!r} is missing; is this a LLaMA checkpoint?")
        if type(described[field]) is not int or described[field] < 1:
            raise CheckpointError(f"{path}: {field} = {described[field]!r} is no positive whole number; take the field from the model's publisher")
    rope_base, rope_scaling = rope_from_json(described, path)
    window = described.get("sliding_window", 4096) if described.get("model_type") == "mistral" else None
    try:
        config = ModelConfig(
            vocab_size=described["vocab_size"],
            width=described["hidden_size"],
            layers=described["num_hidden_layers"],
            heads=described["num_attention_heads"],
            kv_heads=described.get("num_key_value_heads") or described["num_attention_heads"],
            feed_forward=described["intermediate_size"],
            context=min(described["max_position_embeddings"], window or described["max_position_embeddings"]),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            norm_epsilon=float(described["rms_norm_eps"]),
            tied=described.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: the field {error} is missing; is this a LLaMA checkpoint?") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a field is not of the kind that it should be ({error}); fetch the file again") from error
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if (described.get("head_dim") or config.head_size) != config.head_size:
        raise CheckpointError(f"{path}: head_dim = {described['head_dim']} is not width / heads = {config.head_size}; not supported")
    return config


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    special_ids: dict[str, int],
    is_main: bool,
    extra: dict[str, Tensor] | None = None,
) -> None:
    """Writes weights and config of a LanguageModel or ScalarModel; a collective call where the model is sharded, rank 0 writes.

    special_ids: bos_id, eos_id, pad_id; extra: tensors beside the layout (the value head).
    """
    folder, inner = Path(folder), bare(model)
    state = inner.state_dict() | (extra or {})
    if inner.config.tied:
        state.pop("lm_head.weight", None)
    files = in_files("model", state, SHARD)
    weight_map = {}
    for file, group in files.items():  # so no process ever holds more of the gathered weights than one file's
        tensors = {}
        for name in group:
            tensor = whole(state[name]).detach()
            if is_main:
                tensors |= to_hugging_face({name: tensor.cpu()}, inner.config)
        if is_main:
            atomic_write(folder / file, save(tensors, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, file)
    if is_main:
        if len(files) > 1:
            total = 4 * sum(tensor.numel() for tensor in state.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        described = config_to_json(inner.config, scalar=isinstance(inner, ScalarModel), **special_ids)
        write_json(folder / CONFIG, described)


def in_files(stem: str, tensors: dict[str, Tensor], most: int) -> dict[str, list[str]]:
    """File -> names of the tensors that it is to hold, in order: STEM.safetensors, or several with numbers; each of at most so many bytes in
    fp32, or of one tensor that is larger."""
    groups, room = [[]], most
    for name, tensor in tensors.items():
        size = 4 * tensor.numel()
        if groups[-1] and size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{index + 1:05d}-of-{len(groups):05d}.safetensors": group for index, group in enumerate(groups)}


def count_parameters(folder: Path) -> int:
    """Parameters of the model in a folder, from its config.json alone."""
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(config_from_json(read_json(Path(folder) / CONFIG), Path(folder) / CONFIG)).parameters())


def load_model(folder: Path, kind: type[LanguageModel] | type[ScalarModel], *, new_head: bool = False, seed: int = 0) -> nn.Module:
    """What `open_model` opens, in fp32 on the CPU."""
    return fill(open_model(folder, kind, new_head=new_head, seed=seed), torch.device("cpu"))


def open_model(folder: Path, kind: type[LanguageModel] | type[ScalarModel], *, new_head: bool = False, seed: int = 0) -> nn.Module:
    """A LanguageModel or ScalarModel in the published layout, checked whole but not yet read: its parameters are on the meta device, until
    `distribute` or `fill` has put them where they are to live.

    new_head: a language model's trunk makes a ScalarModel, too, its head drawn small from `seed`: N(0, 1e-2 / sqrt(D)) starts a reward
    model's loss at ln 2; a reward model keeps its own. Raises CheckpointError naming the folder and up to five mismatches; nothing is ever loaded in part.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder / CONFIG}: missing; give a model's own folder, such as runs/mpo/sft or runs/mpo/rm")
    described = read_json(folder / CONFIG)
    is_scalar = any(name.endswith("ForSequenceClassification") for name in described.get("architectures") or [])
    if is_scalar != (kind is ScalarModel) and not new_head:
        wanted, found = ("reward model", "language model") if kind is ScalarModel else ("language model", "reward model")
        raise CheckpointError(f"{folder}: holds a {found} where a {wanted} is needed")
    new_head = new_head and not is_scalar
    config = config_from_json(described, folder / CONFIG)
    with torch.device("meta"):
        model = kind(config)
    stored = stored_tensors(folder)
    problems = mismatches(stored, model, new_head)
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {'; '.join(problems[:5])}")

    def read(name: str) -> Tensor:
        """One of the model's tensors, in the type it has on disk; parts of a fused one are joined."""
        if name == "score.weight" and new_head:
            generator = torch.Generator().manual_seed(seed)
            return torch.empty(1, config.width).normal_(0.0, 1e-2 / config.width**0.5, generator=generator)
        parts = [stored[part].get_tensor(part) for part, _ in hugging_face_parts(name, config)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    model.read = read
    return model


def check_read_at_end(folder: Path) -> None:
    """Raises CheckpointError for a reward model from elsewhere that was trained to be read before its end token, as it is where padding is the end
    token: transformers reads the last token that is no padding. One that the rm stage has scaled was trained, or refused, here."""
    described = read_json(folder / CONFIG)
    pad, ends = described.get("pad_token_id"), described.get("eos_token_id")
    if "score_std" not in described and pad is not None and pad in (ends if isinstance(ends, list) else [ends]):
        raise CheckpointError(
            f"{folder / CONFIG}: pad_token_id is the end token, {pad}, so this reward model was trained to be read one token before it, and here all are"
            " read at it; train it on (--stage rm --init), or take another"
        )


def stored_tensors(folder: Path) -> dict[str, safe_open]:
    """Name on disk -> the file of a model's folder that holds it, as `mapped` gives it. Raises CheckpointError."""
    files = weight_files(folder)
    if not files:
        pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        hint = (
            f"; {pickles[0]} is a pickle, which can run code, and is not opened: convert it where you trust it, with transformers'"
            " AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
            if pickles
            else ""
        )
        raise CheckpointError(f"{folder / WEIGHTS}: missing{hint}")
    return mapped(files)


def mapped(files: Sequence[Path]) -> dict[str, safe_open]:
    """Name of a tensor -> the safetensors file that holds it, open: nothing is in memory before it is asked for. Raises CheckpointError."""
    stored = {}
    for path in files:
        try:
            file = safe_open(path, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}); make or fetch it again") from error
        stored |= dict.fromkeys(file.keys(), file)
    return stored


def mismatches(stored: dict[str, safe_open], model: nn.Module, new_head: bool) -> list[str]:
    """Where tensors on disk differ from what the model needs: missing, misshapen, not floating-point, unknown; one line each."""
    config, problems, used = model.config, [], {"value_head.weight"} | ({"lm_head.weight"} if new_head else set())
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tied:
        wanted.pop("lm_head.weight", None)
    if new_head:
        wanted.pop("score.weight")
    for name, shape in wanted.items():
        for part, rows in hugging_face_parts(name, config):
            used.add(part)
            if part not in stored:
                problems.append(f"{part} is missing")
                continue
            found, expected = stored[part].get_slice(part), (rows or shape[0], *shape[1:])
            if tuple(found.get_shape()) != expected:
                problems.append(f"{part} has shape {tuple(found.get_shape())}, {expected} expected")
            elif found.get_dtype() not in FLOATS:
                problems.append(f"{part} holds {found.get_dtype()}, one of {', '.join(FLOATS)} expected (quantised weights are not supported)")
    if config.tied and "lm_head.weight" in stored and not new_head and not problems:
        used.add("lm_head.weight")
        if not torch.equal(*(stored[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))):
            problems.append("lm_head.weight differs from model.embed_tokens.weight, though tie_word_embeddings says they are one")
    return problems + [f"{part} is not part of this architecture" for part in stored if part not in used and "rotary_emb.inv_freq" not in part]
