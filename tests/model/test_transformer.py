"""The trunk against transformers' LLaMA, and what right padding and the causal mask promise."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small import BOS, CONFIG, EOS, PAD, SPECIAL, loud, ragged_rows

from data.errors import UsageError
from model.checkpoint import load_model, save_model
from model.heads import LanguageModel, ScalarModel
from model.packing import packing
from model.parallel import fill
from model.score import row_lengths, to_tensors
from model.transformer import SIZES, ModelConfig, Places, Transformer, first_values, initialise, places_of, sized

CONFIGS = {
    "4 heads, 4 key-value heads": replace(CONFIG, kv_heads=4),
    "4 heads, 2 key-value heads, tied": replace(CONFIG, tied=True),
    "4 heads, 1 key-value head": replace(CONFIG, kv_heads=1),
    "odd sizes": ModelConfig(97, width=42, layers=3, heads=7, kv_heads=7, feed_forward=53, context=80, rope_base=500.0, norm_epsilon=1e-3),
}


def random_tokens(config, rows=3, length=19, seed=0):
    return torch.randint(4, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_those_of_transformers_on_the_saved_folder(config, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = loud(LanguageModel, config).eval()
    save_model(ours, tmp_path, special_ids=SPECIAL, is_main=True)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (BOS, EOS, PAD)
    tokens = random_tokens(config)
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_folder_written_by_transformers_loads_with_the_same_logits(config, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.feed_forward, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, max_position_embeddings=config.context,
            rms_norm_eps=config.norm_epsilon, rope_theta=config.rope_base, tie_word_embeddings=config.tied, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path, LanguageModel).eval(), random_tokens(config)
    assert ours.config.tied == config.tied
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_raw_scores_equal_those_of_transformers_on_a_padded_batch(config, tmp_path):
    from transformers import AutoModelForSequenceClassification

    ours = loud(ScalarModel, config).eval()
    save_model(ours, tmp_path, special_ids=SPECIAL, is_main=True)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    rows = ragged_rows(9, vocab=config.vocab_size)  # some end in EOS, some do not
    tokens, _ = to_tensors(rows, PAD, torch.device("cpu"))
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=(tokens != PAD).long()).logits[:, 0]
        found = ours(tokens, row_lengths(rows, torch.device("cpu")))
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_padding_and_batch_mates_do_not_change_a_real_token(config):
    model, tokens = loud(LanguageModel, config).eval(), random_tokens(config, rows=1, length=11)
    alone = model(tokens)[0]
    for pad in (PAD, EOS):
        padded = torch.cat([tokens, torch.full((1, 7), pad)], dim=1)
        mates = torch.cat([padded, random_tokens(config, rows=3, length=18, seed=1)])
        assert (model(padded)[0, :11] - alone).abs().max() < 1e-5
        assert (model(mates)[0, :11] - alone).abs().max() < 1e-5


@torch.no_grad()
def test_a_later_token_changes_only_what_comes_after_it():
    model, tokens = loud(LanguageModel).eval(), random_tokens(CONFIG, rows=1)
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % CONFIG.vocab_size
    difference = (model(changed) - model(tokens))[0].abs().amax(dim=-1)
    assert (difference[:10] == 0).all()
    assert (difference[10:] > 1e-3).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("asked", ["all", "some", "one"])
def test_leaving_out_what_is_not_read_changes_neither_states_nor_gradients(asked, packed, recompute):
    """Ragged rows, packed: each with a prompt and two responses. Read are all real tokens, some (of one row none), or each row's last."""
    lengths, width = torch.tensor([12, 5, 9, 1 + 2 * packed]), 14
    columns = torch.arange(width)
    real = columns < lengths[:, None]
    parts = torch.where(real, torch.where(columns == 0, 0, torch.where(columns <= lengths[:, None] // 2, 1, 2)), 3)
    tokens = random_tokens(CONFIG, 4, width)
    read = {"all": real, "some": real & (columns % 3 == 1) & (lengths != 9)[:, None], "one": columns == lengths[:, None] - 1}[asked]
    outcomes = []
    for given in (None, read):
        model = loud(LanguageModel)
        model.trunk.checkpoint_activations = recompute
        states = model.trunk(tokens, packing=packing(parts) if packed else None, read=given)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        (states * weights)[read].sum().backward()
        outcomes.append((states.detach(), torch.cat([p.grad.flatten() for p in model.trunk.parameters()])))
    (plain, gradient), (bare, own_gradient) = outcomes
    assert torch.allclose(bare[read], plain[read], atol=1e-5) and (bare[~read] == 0).all()
    assert torch.allclose(own_gradient, gradient, atol=1e-4 * float(gradient.abs().max()))


def test_without_padding_nothing_is_spread_or_gathered():
    assert places_of(torch.ones(3, 4, dtype=torch.bool)) is None
    places = places_of(torch.tensor([[True, False], [True, True]]))
    assert places.numbers.tolist() == [0, 2, 3]
    x = torch.arange(6.0).view(3, 2)
    assert places.spread(x).tolist() == [[[0, 1], [0, 0]], [[2, 3], [4, 5]]] and torch.equal(places.gather(places.spread(x)), x)
    some = places_of(torch.tensor([[True, False], [False, True]]))
    assert some.among(places, x).tolist() == [[0, 1], [4, 5]] == some.among(None, places.spread(x)).tolist()


@pytest.mark.parametrize("padding, gathers", [(0, False), (20, True)])
def test_rows_that_leave_out_next_to_nothing_are_not_gathered_in_every_layer(padding, gathers, monkeypatch):
    """Of 4 rows of 33 tokens, the state of whose last one a language model never reads; in one of them some are padding."""
    plain, calls = Places.spread, []
    monkeypatch.setattr(Places, "spread", lambda places, x: calls.append(len(x)) or plain(places, x))
    model, mask = loud(LanguageModel), torch.ones(4, 33, dtype=torch.bool)
    mask[0, 33 - padding :] = False
    tokens = torch.randint(4, CONFIG.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
    whole = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert torch.allclose(model(tokens, mask).logp, whole.where(mask[:, 1:], 0.0), atol=1e-5)
    assert len(calls) == 1 + CONFIG.layers * gathers  # the states that were asked for, and in every layer query, key and value


def test_a_row_with_one_real_token_gives_finite_numbers_and_gradients():
    model = loud(LanguageModel)
    tokens = torch.full((2, 20), PAD)
    tokens[0, 0] = BOS
    logits = model(tokens)
    logits.square().mean().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = loud(LanguageModel).train()
        model.trunk.checkpoint_activations = recompute
        model(random_tokens(CONFIG)).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)


# ---- initialisation


def test_initialise_draws_normal_numbers_of_the_documented_size():
    config = replace(SIZES["tiny"], layers=8, tied=False)
    model = LanguageModel(config)
    initialise(model, seed=1)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        std = 128**-0.5 / (4 if residual else 1)  # sqrt(2 * 8 layers) = 4
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(parameter.mean().item()) < 0.05 * std, name


def test_a_fresh_model_is_no_surer_than_chance():
    config = replace(SIZES["tiny"], tied=False)
    model, tokens = LanguageModel(config), random_tokens(config, rows=16, length=64)
    initialise(model, seed=1)
    loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(6.93 + 0.5, abs=0.15)  # ln 1024, and half the variance of 1 that the logits have


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_is_filled_gets_the_values_of_one_that_is_initialised(tied):
    config, model = replace(CONFIG, tied=tied), LanguageModel(replace(CONFIG, tied=tied))
    initialise(model, seed=3)
    with torch.device("meta"):
        filled = LanguageModel(config)
    filled.read = first_values(filled, seed=3)
    fill(filled, torch.device("cpu"))
    assert filled.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in filled.state_dict().items())
    assert (filled.lm_head.weight is filled.trunk.embedding.weight) == tied


def test_initialise_depends_on_its_seed_alone_and_leaves_the_global_generator():
    models = [LanguageModel(CONFIG) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(len(models) + seed)
        before = torch.get_rng_state()
        initialise(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    same, again, other = (torch.cat([parameter.flatten() for parameter in model.parameters()]) for model in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_imports_leave_every_global_generator_alone():
    code = """
import random, numpy, torch
states = lambda: (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist())
before = states()
import model.checkpoint, model.fit, model.generate, model.objectives, model.score
assert states() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- configurations


@pytest.mark.parametrize("fields", [{"width": 30}, {"kv_heads": 3}, {"width": 36}], ids=str)  # 36 / 4 = 9: an odd head size
def test_sizes_that_do_not_fit_are_refused(fields):
    with pytest.raises(UsageError, match="do not fit"):
        replace(CONFIG, **fields)


def test_sized_takes_the_vocabulary_of_the_tokenizer():
    config = sized("mini", 777, context=96)
    assert (config.vocab_size, config.context, config.width, config.layers) == (777, 96, 256, 6)
    with pytest.raises(UsageError, match=r"--size huge: .*tiny, mini, small"):
        sized("huge", 777)


def test_named_sizes_have_the_parameters_that_their_names_say():
    counts = {}
    for name, config in SIZES.items():
        with torch.device("meta"):
            counts[name] = sum(parameter.numel() for parameter in LanguageModel(config).parameters())
    expected = {"tiny": 0.94e6, "mini": 5.07e6, "small": 34e6, "base": 134e6, "1b": 1.1e9, "7b": 6.74e9}
    assert counts == pytest.approx(expected, rel=0.03)
    assert isinstance(LanguageModel(CONFIG).trunk, Transformer)


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_keeps_no_query_key_and_value_before_rotation(padded):
    """For its backward pass it needs the rotated ones and the values alone, with padding left out or not."""
    config, kept = replace(CONFIG, kv_heads=CONFIG.heads), {}
    model, tokens = loud(LanguageModel, config), random_tokens(config, rows=4, length=20)
    lengths = torch.tensor([20, 6, 9, 20] if padded else [20] * 4)
    mask = torch.arange(20) < lengths[:, None]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.trunk(tokens, read=mask)
    sizes = {size for place, size in kept.items() if place not in own}
    assert 4 * 80 * config.width in sizes and not sizes & {4 * count * 3 * config.width for count in (int(mask.sum()), 80)}
