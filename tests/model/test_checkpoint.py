"""Models on disk: whole or refused, and nothing but safetensors is opened."""

import json
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import CONFIG, SPECIAL, loud, ragged_rows

from data.errors import CheckpointError
from data.files import model_digest
from model.checkpoint import check_read_at_end, load_model, save_model
from model.heads import LanguageModel, ScalarModel
from model.score import to_tensors


def stored(folder, kind=LanguageModel, config=CONFIG, **more):
    model = loud(kind, config)
    save_model(model, folder, special_ids=SPECIAL, is_main=True, **more)
    return model


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder, kind=LanguageModel, **more):
    with pytest.raises(CheckpointError) as stopped:
        load_model(folder, kind, **more)
    assert stopped.value.code == 4 and str(folder) in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_keeps_every_bit(kind, tied, tmp_path):
    config = replace(CONFIG, tied=tied, rope_base=500.0, norm_epsilon=1e-6, kv_heads=1)
    model = stored(tmp_path, kind, config)
    again = load_model(tmp_path, kind)
    assert again.config == config and type(again) is kind
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    if kind is LanguageModel:
        assert (again.lm_head.weight is again.trunk.embedding.weight) == tied


def test_names_and_shapes_on_disk_are_those_of_hugging_face(tmp_path):
    stored(tmp_path / "policy", extra={"value_head.weight": torch.ones(1, 32)})
    stored(tmp_path / "tied", config=replace(CONFIG, tied=True))
    stored(tmp_path / "reward", ScalarModel)
    layer = {
        "input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,),
        "self_attn.q_proj.weight": (32, 32), "self_attn.k_proj.weight": (16, 32), "self_attn.v_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 32),
        "mlp.gate_proj.weight": (40, 32), "mlp.up_proj.weight": (40, 32), "mlp.down_proj.weight": (32, 40),
    }  # fmt: skip
    trunk = {f"model.layers.{index}.{name}": shape for index in (0, 1) for name, shape in layer.items()}
    trunk |= {"model.embed_tokens.weight": (61, 32), "model.norm.weight": (32,)}
    tops = {"policy": {"lm_head.weight": (61, 32), "value_head.weight": (1, 32)}, "tied": {}, "reward": {"score.weight": (1, 32)}}
    for name, top in tops.items():
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == trunk | top  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
    described = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert described["architectures"] == ["LlamaForSequenceClassification"] and described["num_labels"] == 1
    assert described["pad_token_id"] != described["eos_token_id"]
    load_model(tmp_path / "policy", LanguageModel)  # the value head is no obstacle


def test_other_processes_write_nothing(tmp_path):
    save_model(loud(LanguageModel), tmp_path / "x", special_ids=SPECIAL, is_main=False)
    assert not (tmp_path / "x").exists()


def test_a_reward_model_starts_from_a_language_models_trunk(tmp_path):
    policy = stored(tmp_path, config=replace(CONFIG, width=128, heads=8))
    first, again, other = (load_model(tmp_path, ScalarModel, new_head=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.score.weight, again.score.weight) and not torch.equal(first.score.weight, other.score.weight)
    for name, value in policy.trunk.state_dict().items():
        assert torch.equal(value, first.trunk.state_dict()[name])
    assert first.score.weight.std().item() == pytest.approx(0.01 / 128**0.5, rel=0.2)
    tokens, _ = to_tensors(ragged_rows(64), 3, torch.device("cpu"))
    with torch.no_grad():
        assert first(tokens)[:, -1].std() < 0.05  # margins start near 0, the loss near ln 2


@pytest.mark.parametrize("new_head", [False, True])
def test_loading_draws_no_random_numbers_that_others_draw_from(new_head, tmp_path):
    stored(tmp_path)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    load_model(tmp_path, ScalarModel if new_head else LanguageModel, new_head=new_head)
    assert torch.equal(torch.get_rng_state(), before[0]) and (random.getstate(), repr(np.random.get_state())) == before[1:]


def test_a_reward_model_that_starts_another_keeps_its_head(tmp_path):
    first = stored(tmp_path, kind=ScalarModel)
    again = load_model(tmp_path, ScalarModel, new_head=True, seed=5)
    assert torch.equal(first.score.weight, again.score.weight)


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [
        (LanguageModel, ScalarModel, "holds a reward model where a language model is needed"),
        (ScalarModel, LanguageModel, "holds a language model where a reward model is needed"),
    ],
)
def test_the_wrong_kind_is_refused(kind, other, words, tmp_path):
    stored(tmp_path, other)
    assert words in refusal(tmp_path, kind)


def test_every_mismatch_is_listed_up_to_five(tmp_path):
    stored(tmp_path)

    def change(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["lm_head.weight"]
        tensors["model.norm.weight"] = torch.ones(31)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)

    edit_tensors(tmp_path, change)
    message = refusal(tmp_path)
    assert "model.layers.1.self_attn.k_proj.weight is missing" in message and "lm_head.weight is missing" in message
    assert "model.norm.weight has shape (31,), (32,) expected" in message
    assert "model.layers.0.self_attn.q_proj.bias is not part of this architecture" in message

    edit_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name])
    assert refusal(tmp_path).count("is missing") == 5


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("self_attn.k_proj.weight", (16, 31)),  # narrower than its neighbours in our fused matrix
        ("self_attn.v_proj.weight", (32,)),
        ("mlp.gate_proj.weight", (39, 32)),
    ],
)
def test_a_misshapen_part_of_a_fused_matrix_is_named(tensor, shape, tmp_path):
    stored(tmp_path)
    name = f"model.layers.1.{tensor}"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    assert f"{name} has shape {shape}" in refusal(tmp_path)


def test_parts_that_only_together_have_the_right_size_are_refused(tmp_path):
    stored(tmp_path)
    gate, up = (f"model.layers.0.mlp.{half}_proj.weight" for half in ("gate", "up"))
    edit_tensors(tmp_path, lambda tensors: tensors.update({gate: torch.zeros(39, 32), up: torch.zeros(41, 32)}))
    message = refusal(tmp_path)
    assert f"{gate} has shape (39, 32), (40, 32) expected" in message and up in message


def test_another_vocabulary_or_size_in_the_config_is_a_mismatch(tmp_path):
    stored(tmp_path)
    edit_config(tmp_path, vocab_size=62)
    assert "(61, 32), (62, 32) expected" in refusal(tmp_path)
    edit_config(tmp_path, vocab_size=61, num_hidden_layers=3)
    assert "model.layers.2" in refusal(tmp_path)
    edit_config(tmp_path, num_hidden_layers=1)
    assert "model.layers.1.input_layernorm.weight is not part" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "qwen2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("rope_theta", 77.0),  # and another one inside rope_parameters
        ("num_attention_heads", 5),
        ("head_dim", 16),
    ],
)
def test_a_field_that_would_change_the_result_is_named(field, value, tmp_path):
    stored(tmp_path)
    edit_config(tmp_path, **{field: value})
    message = refusal(tmp_path)
    assert field in message or (field == "num_attention_heads" and "5 heads" in message)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "32"}, "hidden_size = '32' is no positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 is no positive whole number"),
        ({"num_key_value_heads": "2"}, "a field is not of the kind that it should be"),
        ({"rms_norm_eps": None}, "a field is not of the kind that it should be"),
        ({"rope_scaling": 2.0}, "the rotary scaling 2.0 is no object"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "are not all numbers"),
        ({"rope_parameters": None, "rope_theta": "many"}, "are not all numbers"),
    ],
)
def test_a_field_of_another_kind_is_refused(fields, words, tmp_path):
    stored(tmp_path)
    edit_config(tmp_path, **fields)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[]", "3", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_file_that_describes_nothing_is_refused(name, content, tmp_path):
    stored(tmp_path)
    (tmp_path / name).write_text(content)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    assert f"{tmp_path / name}: " in refusal(tmp_path)


def test_a_reward_model_that_was_read_before_its_end_token_is_refused(tmp_path):
    """transformers reads the last token that is no padding: where padding is the end token, that is the one before it."""
    stored(tmp_path, ScalarModel)
    for ends in (SPECIAL["eos_id"], [9, SPECIAL["eos_id"]]):
        edit_config(tmp_path, eos_token_id=ends, pad_token_id=SPECIAL["eos_id"])
        with pytest.raises(CheckpointError, match=f"pad_token_id is the end token, {SPECIAL['eos_id']}"):
            check_read_at_end(tmp_path)
    edit_config(tmp_path, score_std=1.0)  # of the rm stage, which reads it at the end token
    check_read_at_end(tmp_path)
    stored(tmp_path, ScalarModel)
    check_read_at_end(tmp_path)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "nonsense"])
def test_a_rotary_scaling_that_changes_with_the_length_is_refused(field, spelling, kind, tmp_path):
    stored(tmp_path)
    edit_config(tmp_path, **{field: {spelling: kind, "factor": 2.0}})
    assert f"rope_type = '{kind}' is not supported" in refusal(tmp_path)


def test_a_rotary_scaling_without_its_numbers_is_refused(tmp_path):
    stored(tmp_path)
    edit_config(tmp_path, rope_scaling={"type": "linear"})
    assert "'linear' lacks 'factor'" in refusal(tmp_path)
    edit_config(tmp_path, rope_scaling={"rope_type": "llama3", "factor": 8.0})
    assert "'llama3' lacks 'low_freq_factor'" in refusal(tmp_path)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    stored(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    assert "model.norm.weight holds I8" in refusal(tmp_path)


def test_a_tied_output_that_is_another_matrix_is_refused(tmp_path):
    stored(tmp_path, config=replace(CONFIG, tied=True))
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    load_model(tmp_path, LanguageModel)  # a copy is no harm
    edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path)


# ---- several files


def test_a_model_is_its_weights_and_what_config_json_says_of_them(tmp_path):
    """Another rotary base makes another model of the same weights; a tokenizer or a manifest beside it does not."""
    stored(tmp_path)
    edit_config(tmp_path)  # the bytes as they will be written below
    before = model_digest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert model_digest(tmp_path) == before
    edit_config(tmp_path, rope_theta=100.0)
    assert model_digest(tmp_path) != before


@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
def test_weights_in_several_files_are_the_same_weights(kind, tmp_path, monkeypatch):
    whole = stored(tmp_path / "one", kind)
    monkeypatch.setattr("model.checkpoint.SHARD", 20_000)  # bytes; the feed-forward's two inputs alone have 10,240
    stored(tmp_path / "many", kind)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert 2 < len(names) < 9 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    again = load_model(tmp_path / "many", kind)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    listing = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(listing["weight_map"]) == set(load_file(tmp_path / "one" / "model.safetensors"))
    before = model_digest(tmp_path / "many")
    edit_shard = tmp_path / "many" / names[1]
    save_file({name: value + 1 for name, value in load_file(edit_shard).items()}, edit_shard)
    assert model_digest(tmp_path / "many") != before != model_digest(tmp_path / "one")
    edit_shard.unlink()
    assert f"lists '{names[1]}'" in refusal(tmp_path / "many", kind)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    stored(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "two" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../one/model.safetensors"}}')
    assert "no safetensors file of this folder" in refusal(tmp_path / "two")


def test_a_missing_field_and_a_damaged_config_are_named(tmp_path):
    stored(tmp_path)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in described.items() if name != "hidden_size"}))
    assert "hidden_size" in refusal(tmp_path)
    path.write_text('{"vocab_size": 61, ')
    assert "damaged" in refusal(tmp_path)
    path.unlink()
    assert "config.json: missing" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_cut_weights_file_is_refused(kept, tmp_path):
    stored(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a whole safetensors file" in refusal(tmp_path)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.safetensors"])
def test_a_pickle_is_refused_and_never_run(name, tmp_path):
    stored(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "it ran")))
    message = refusal(tmp_path)
    assert ("not a whole safetensors file" if name == "model.safetensors" else f"{name} is a pickle, which can run code") in message
    assert not (tmp_path / "it ran").exists()
