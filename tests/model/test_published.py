"""Folders that transformers writes are read, and ours are read by transformers: logits, loss, greedy tokens, bits, one file or several."""

import json
from dataclasses import replace

import pytest
import torch
from small import EOS, PAD, SPECIAL
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from data.errors import CheckpointError
from losses.sft import sft_loss
from model.checkpoint import load_model, save_model
from model.generate import generate
from model.heads import LanguageModel, ScalarModel

SHAPE = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "8 of 8 heads": {"num_key_value_heads": 8},
    "8 to 2 heads": {"num_key_value_heads": 2},
    "8 to 1 heads, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True},
    "base 1e6": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "tie_word_embeddings": True},
    "odd sizes": {"vocab_size": 97, "hidden_size": 42, "intermediate_size": 53, "num_hidden_layers": 3, "num_attention_heads": 7,
                  "num_key_value_heads": 7, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "explicit head size": {"head_dim": 8, "num_key_value_heads": 4},
}  # fmt: skip


def made(kind=LlamaForCausalLM, config=LlamaConfig, seed=0, **fields):
    """A random model of transformers, loud enough that a wrong angle or norm shows."""
    torch.manual_seed(seed)
    common = {"max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
    model = kind(config(**{**SHAPE, **common, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def tokens_for(model, rows=3, length=150):
    return torch.randint(4, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_same(ours, theirs):
    """Logits, loss, and 64 greedy tokens with and without a cache."""
    tokens = tokens_for(theirs)
    expected, found = theirs(tokens, labels=tokens), ours(tokens)
    assert expected.logits.std() > 0.5
    assert (found - expected.logits).abs().max() < 1e-4
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    loss = sft_loss(ours(tokens, mask).logp, mask[:, 1:]).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    prompt = tokens[:1, :9]
    continued = theirs.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None)[0].tolist()
    cached = generate(ours, prompt.tolist(), max_new_tokens=64, eos_id=-1, pad_id=PAD).tokens[0].tolist()
    plain = prompt
    for _ in range(64):
        plain = torch.cat([plain, ours(plain)[:, -1:].argmax(dim=-1)], dim=1)
    assert cached == plain[0].tolist() == continued
    assert len(set(cached[9:])) > 5


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_a_model_of_transformers_goes_in_and_out_unchanged(fields, tmp_path):
    theirs = made(**fields)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "several", max_shard_size="60KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    for source in ("one", "several"):
        ours = load_model(tmp_path / source, LanguageModel).eval()
        if source == "one":
            check_same(ours, theirs)
        save_model(ours, tmp_path / f"{source} again", special_ids=SPECIAL, is_main=True)
        back, report = AutoModelForCausalLM.from_pretrained(tmp_path / f"{source} again", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert {name: value.tolist() for name, value in back.state_dict().items()} == {
            name: value.tolist() for name, value in theirs.state_dict().items()
        }
        assert back.config.rope_parameters == theirs.config.rope_parameters
        check_same(ours, back.eval())


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, LLAMA3, None], ids=str)
def test_the_older_spelling_of_the_rotary_fields_means_the_same(scaling, tmp_path):
    rope = {"rope_type": "default", **(scaling or {})}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    theirs = made(rope_parameters={**rope, "rope_theta": 5e5})
    theirs.save_pretrained(tmp_path)
    new = load_model(tmp_path, LanguageModel)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    described.pop("rope_parameters")
    path.write_text(json.dumps(described | {"rope_theta": 5e5, "rope_scaling": scaling}))
    old = load_model(tmp_path, LanguageModel)
    assert old.config == new.config and old.config.rope_base == 5e5
    check_same(old.eval(), theirs)
    check_same(old.eval(), AutoModelForCausalLM.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk_is_read_exactly(dtype, tmp_path):
    made().to(dtype).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = load_model(tmp_path, LanguageModel).eval()
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    check_same(ours, theirs)


def test_a_mistral_is_a_llama_up_to_its_window(tmp_path):
    theirs = made(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=200)
    theirs.save_pretrained(tmp_path / "in")
    ours = load_model(tmp_path / "in", LanguageModel).eval()
    assert ours.config.context == 200  # and not the 256 of its config.json: longer texts are refused by every stage
    check_same(ours, theirs)
    save_model(ours, tmp_path / "out", special_ids=SPECIAL, is_main=True)
    check_same(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    endless = made(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=None)
    endless.save_pretrained(tmp_path / "endless")
    assert load_model(tmp_path / "endless", LanguageModel).config.context == 256


@pytest.mark.parametrize("name", ["8 to 2 heads", "llama3", "odd sizes"])
@torch.no_grad()
def test_a_reward_model_of_transformers_goes_in_and_out_unchanged(name, tmp_path):
    theirs = made(LlamaForSequenceClassification, num_labels=1, **MODELS[name])
    theirs.save_pretrained(tmp_path / "in", max_shard_size="60KB")
    ours = load_model(tmp_path / "in", ScalarModel).eval()
    tokens = tokens_for(theirs)
    tokens[0, 70:] = PAD
    lengths = torch.tensor([70, 150, 150])
    expected = theirs(tokens, attention_mask=(tokens != PAD).long()).logits[:, 0]
    assert (ours(tokens, lengths) - expected).abs().max() < 1e-4 and expected.std() > 0.1
    save_model(ours, tmp_path / "out", special_ids=SPECIAL, is_main=True)
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    made(LlamaForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score.weight has shape \(3, 64\), \(1, 64\) expected"):
        load_model(tmp_path, ScalarModel)


def test_ours_with_every_field_goes_out_and_back(tmp_path):
    ours = load_model_of(tmp_path / "in", rope_parameters={**LLAMA3, "rope_theta": 5e5}, num_key_value_heads=2)
    save_model(ours, tmp_path / "out", special_ids=SPECIAL, is_main=True)
    again = load_model(tmp_path / "out", LanguageModel)
    assert again.config == ours.config and again.config != replace(ours.config, rope_scaling=None)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def load_model_of(folder, **fields):
    made(**fields).save_pretrained(folder)
    return load_model(folder, LanguageModel)
