"""Sampling: the cache against full forwards, one uniform number per token, and what happens at the end token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from small import BOS, CONFIG, EOS, PAD, loud, ragged_rows
from torch import nn

from model.cache import Cache
from model.generate import draw, generate, row_uniforms
from model.heads import LanguageModel, PolicyWithCritic

BELOW_1 = 1 - 2**-53  # the greatest number that a generator of uniforms gives


def ragged_prompts(count, seed=0):
    return [list(row.prompt) for row in ragged_rows(count, seed)]


@torch.no_grad()
def greedy_without_cache(model, prompt, count, eos_id):
    """The same text in the slowest way: the whole row anew for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == eos_id:
            break
    return tokens[len(prompt) :]


def an_end_token(model, prompts, count, **how):
    """The id that decoding reaches at the most different places: with it as end token, rows end at different times."""
    free = responses(generate(model, prompts, max_new_tokens=count, eos_id=-1, pad_id=PAD, **how))
    return max(range(4, CONFIG.vocab_size), key=lambda token: len({row.index(token) for row in free if token in row}))


def responses(made):
    return [row[mask].tolist() for row, mask in zip(made.tokens, made.response_mask, strict=True)]


# ---- the cache


@torch.no_grad()
@pytest.mark.parametrize(("drop", "bf16", "bound"), [(False, False, 1e-5), (True, False, 1e-5), (True, True, 0.1)])
def test_cached_logits_equal_those_of_full_forwards(drop, bf16, bound):
    """In bf16 they stay near those of fp32, which go up to 3."""
    model, prompts = loud(LanguageModel).eval(), ragged_prompts(5)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_value=PAD)
    forced = torch.randint(4, CONFIG.vocab_size, (5, 8), generator=torch.Generator().manual_seed(1))
    cache, rows = Cache(lengths, tokens.shape[1] + 8), torch.arange(5)

    def decoded(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(tokens, cache=cache)

    logits = decoded(tokens)
    assert cache.keys[0].dtype == (torch.bfloat16 if bf16 else torch.float32)
    for step in range(8):
        for found, row in zip(logits, rows.tolist(), strict=True):
            whole = torch.tensor([prompts[row] + forced[row, :step].tolist()])
            assert (found - model(whole)[0, -1]).abs().max() < bound, (step, row)
        if drop and step == 3:
            rows = torch.tensor([0, 3, 4])
            cache.keep(rows)
        logits = decoded(forced[rows, step, None])
    assert not any("cache" in name for name in model.state_dict())


@pytest.mark.parametrize("critic", [False, True])
def test_greedy_with_cache_equals_greedy_without(critic):
    model, prompts = loud(LanguageModel).eval(), ragged_prompts(12)
    eos_id = an_end_token(model, prompts, 20)
    expected = [greedy_without_cache(model, prompt, 20, eos_id) for prompt in prompts]
    lengths = [len(row) for row in expected]
    assert len(set(lengths)) >= 4 and max(lengths) == 20  # ended at different times, some never
    decoder = PolicyWithCritic(model, None) if critic else model
    made = generate(decoder, prompts, max_new_tokens=20, eos_id=eos_id, pad_id=PAD)
    assert responses(made) == expected
    assert made.ended.tolist() == [row[-1] == eos_id for row in expected]


def test_prompts_of_one_token():
    model = loud(LanguageModel).eval()
    prompts = [[BOS], [7]]
    expected = [greedy_without_cache(model, prompt, 6, eos_id=-1) for prompt in prompts]
    assert responses(generate(model, prompts, max_new_tokens=6, eos_id=-1, pad_id=PAD)) == expected


def test_rows_come_out_in_the_layout_of_training():
    model, prompts = loud(LanguageModel).eval(), ragged_prompts(8)
    uniforms = row_uniforms(3, range(8), 10)
    eos_id = an_end_token(model, prompts, 10)
    made = generate(model, prompts, max_new_tokens=10, eos_id=eos_id, pad_id=PAD, uniforms=uniforms)
    assert made.tokens.shape == made.response_mask.shape
    for row, (prompt, response) in enumerate(zip(prompts, responses(made), strict=True)):
        padding = [PAD] * (made.tokens.shape[1] - len(prompt) - len(response))
        assert made.tokens[row].tolist() == prompt + response + padding
        assert made.response_mask[row].nonzero().squeeze(-1).tolist() == list(range(len(prompt), len(prompt) + len(response)))
    assert made.response_mask[:, -1].any()  # no wider than the longest row


@torch.no_grad()
def test_a_drawn_token_is_the_inverse_of_the_cumulative_distribution_that_training_scores():
    model, prompts, temperature = loud(LanguageModel).eval(), ragged_prompts(6), 0.8
    uniforms = row_uniforms(5, range(6), 12)
    made = generate(model, prompts, max_new_tokens=12, eos_id=EOS, pad_id=PAD, uniforms=uniforms, temperature=temperature)
    logp = model(made.tokens, made.response_mask, temperature=temperature).logp
    for row, response in enumerate(responses(made)):
        for step, token in enumerate(response):
            column = len(prompts[row]) + step
            probabilities = (model(made.tokens[row : row + 1, :column])[0, -1].double() / temperature).softmax(-1)
            cumulative = probabilities.cumsum(-1)
            assert cumulative[token] - probabilities[token] - 1e-6 <= uniforms[row, step] <= cumulative[token] + 1e-6
            assert logp[row, column - 1].item() == pytest.approx(probabilities[token].log().item(), abs=1e-5)


LOUD = loud(LanguageModel).eval()
PROMPTS = st.lists(st.lists(st.integers(1, CONFIG.vocab_size - 1), min_size=1, max_size=9), min_size=1, max_size=9)


@torch.no_grad()
@settings(max_examples=100)
@given(PROMPTS, st.integers(0, 99), st.integers(1, 12), st.sampled_from([0.7, 1.0, 1.5, None]), st.booleans())
def test_any_batch_says_what_full_forwards_of_each_row_say(prompts, seed, most, temperature, early_end):
    """Whatever the company: every token is the one that a forward without cache and padding gives for the row's own number, or the likeliest."""
    uniforms = None if temperature is None else row_uniforms(seed, range(len(prompts)), most)
    how = {"uniforms": uniforms, "temperature": temperature or 1.0}
    eos_id = an_end_token(LOUD, prompts, most, **how) if early_end else EOS
    made = generate(LOUD, prompts, max_new_tokens=most, eos_id=eos_id, pad_id=PAD, **how)
    for row, (prompt, response) in enumerate(zip(prompts, responses(made), strict=True)):
        assert response and eos_id not in response[:-1]
        assert made.ended[row].item() == (response[-1] == eos_id) and (made.ended[row] or len(response) == most)
        for step, token in enumerate(response):
            logits = LOUD(torch.tensor([prompt + response[:step]]))[0, -1].double().numpy() / (temperature or 1.0)
            weights = np.exp(logits - logits.max())
            below = weights[:token].sum() / weights.sum()
            if uniforms is None:
                assert logits[token] > logits.max() - 1e-5
            else:
                assert below - 1e-6 <= uniforms[row, step] <= below + weights[token] / weights.sum() + 1e-6


# ---- random numbers


def test_a_response_depends_neither_on_batch_mates_nor_on_order_nor_on_batch_size():
    model, prompts, keys = loud(LanguageModel).eval(), ragged_prompts(12), [1000 + 7 * row for row in range(12)]
    eos_id = an_end_token(model, prompts, 16)

    def sample(order):
        made = generate(
            model, [prompts[row] for row in order], max_new_tokens=16, eos_id=eos_id, pad_id=PAD,
            uniforms=row_uniforms(11, [keys[row] for row in order], 16),
        )  # fmt: skip
        return dict(zip(order, responses(made), strict=True))

    together = sample(range(12))
    assert len({len(response) for response in together.values()}) >= 4
    assert together == sample(range(11, -1, -1))
    for size in (1, 5):
        apart = {row: response for first in range(0, 12, size) for row, response in sample(range(first, min(first + size, 12))).items()}
        assert together == apart


def test_the_same_prompt_under_another_key_gets_another_response():
    model = loud(LanguageModel).eval()
    made = generate(model, [[BOS, 9]] * 4, max_new_tokens=12, eos_id=-1, pad_id=PAD, uniforms=row_uniforms(0, [1, 2, 3, 1], 12))
    first, second, third, again = responses(made)
    assert first == again and len({tuple(first), tuple(second), tuple(third)}) == 3


def test_row_uniforms_are_a_function_of_seed_and_key():
    numbers = row_uniforms(4, [9, 2**62 + 1, 9], 50)
    assert numbers.shape == (3, 50) and numbers.dtype == np.float64
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert (numbers[0] == numbers[2]).all() and not (numbers[0] == numbers[1]).any()
    assert (row_uniforms(4, [2**62 + 1], 80)[0, :50] == numbers[1]).all()
    assert not (row_uniforms(5, [9], 50)[0] == numbers[0]).any()


# ---- one draw


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    logits, count = torch.tensor([1.2, -0.3, 0.0, 2.0, -1.0, 0.5, -2.0, 0.1]), 40_000
    uniforms = torch.from_numpy(row_uniforms(1, [0], count)[0])
    found = torch.bincount(draw(logits.expand(count, 8), uniforms, temperature), minlength=8).double()
    expected = count * (logits.double() / temperature).softmax(-1)
    assert ((found - expected).square() / expected).sum() < chi2.ppf(0.999, df=7)


def test_draw_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(7, 3)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.99, BELOW_1], dtype=torch.float64)
    assert draw(logits, uniforms, 1.0).tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_a_token_of_probability_0_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -200.0, -torch.inf]])  # exp(-200) is 0 in float32
    uniforms = torch.cat([torch.tensor([0.0, 0.5, BELOW_1], dtype=torch.float64), torch.linspace(0, BELOW_1, 997, dtype=torch.float64)])
    drawn = draw(logits.expand(1000, 6), uniforms, 1.0)
    assert set(drawn.tolist()) == {1, 3}
    assert drawn[:3].tolist() == [1, 3, 3]  # a uniform number of 0.5 is where the second one begins


@pytest.mark.parametrize("vocab", [1000, 50_000])
def test_uniforms_at_both_ends_stay_within_a_large_vocabulary(vocab):
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = logits[:, -1] = -torch.inf
    assert (draw(logits, torch.zeros(64, dtype=torch.float64), 1.0) == 1).all()
    last = draw(logits, torch.full((64,), BELOW_1, dtype=torch.float64), 1.0)
    assert (last == vocab - 2).all()


def test_without_uniforms_the_most_likely_token_is_drawn():
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, None, 1.0), logits.argmax(-1))


# ---- the end token


class Chain(nn.Module):
    """A model whose next token is a function of the last one: what it will say is known by hand."""

    def __init__(self, following):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.following = torch.tensor([following.get(token, 0) for token in range(50)])
        self.batches = []

    def forward(self, tokens, cache):
        self.batches.append(len(tokens))
        prefill = cache.filled == 0
        cache.advance()
        last = tokens[torch.arange(len(tokens)), cache.lengths - 1] if prefill else tokens[:, 0]
        return 100.0 * nn.functional.one_hot(self.following[last], 50)


CHAIN = {10: EOS, 20: 21, 21: 22, 22: EOS, 30: 31, 31: 32, 32: 33, 33: 34, 40: 41, 41: EOS, EOS: EOS, 5: 6, 6: 7, 7: 8}
CASES = [  # prompt, response of at most 3 tokens, ended
    ([BOS, 10], [EOS], True),  # at once
    ([BOS, 4, 21], [22, EOS], True),
    ([20], [21, 22, EOS], True),  # in the last slot: ended all the same
    ([BOS, 4, 4, 30], [31, 32, 33], False),  # absent
    ([BOS, EOS, 40], [41, EOS], True),  # in the prompt: means nothing there
    ([BOS, 5], [6, 7, 8], False),
]


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("after_end", [EOS, 33])  # what the model would say after the end token: it again, or something else
def test_the_end_token(pad, after_end):
    made = generate(Chain(CHAIN | {EOS: after_end}), [case[0] for case in CASES], max_new_tokens=3, eos_id=EOS, pad_id=pad)
    for row, (prompt, response, ended) in enumerate(CASES):
        width = made.tokens.shape[1]
        assert made.tokens[row].tolist() == prompt + response + [pad] * (width - len(prompt) - len(response))
        assert made.response_mask[row].int().tolist() == [0] * len(prompt) + [1] * len(response) + [0] * (width - len(prompt + response))
        assert made.ended[row].item() is ended
    assert made.tokens.shape[1] == 7  # the prompt of 4 with its 3 tokens


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 7), min_size=8, max_size=8), st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=8),
    st.integers(1, 6), st.integers(0, 7), st.integers(0, 7),
)  # fmt: skip
def test_any_chain_ends_where_a_loop_over_its_table_ends(table, prompts, most, eos_id, pad_id):
    """The next token is table[last]: responses are known without a model, whatever stands for end and padding, be it the same id."""
    made = generate(Chain(dict(enumerate(table))), prompts, max_new_tokens=most, eos_id=eos_id, pad_id=pad_id)
    for row, prompt in enumerate(prompts):
        said = [table[prompt[-1]]]
        while said[-1] != eos_id and len(said) < most:
            said.append(table[said[-1]])
        width = made.tokens.shape[1]
        assert made.tokens[row].tolist() == prompt + said + [pad_id] * (width - len(prompt + said))
        assert made.response_mask[row].tolist() == [len(prompt) <= column < len(prompt + said) for column in range(width)]
        assert made.ended[row].item() == (said[-1] == eos_id)


def test_another_end_token_than_the_usual_one():
    made = generate(Chain(CHAIN), [[BOS, 20], [BOS, 10]], max_new_tokens=4, eos_id=22, pad_id=PAD)
    assert responses(made) == [[21, 22], [EOS] * 4] and made.ended.tolist() == [True, False]


def test_finished_rows_leave_the_batch_once_they_are_half_of_it():
    starts = [10, 10, 41, 22, 21, 30, 20, 31]  # responses of 1, 1, 1, 1, 2, 4, 3 and 4 tokens
    model = Chain(CHAIN)
    made = generate(model, [[BOS, start] for start in starts], max_new_tokens=4, eos_id=EOS, pad_id=PAD)
    assert made.response_mask.sum(dim=1).tolist() == [1, 1, 1, 1, 2, 4, 3, 4]
    assert model.batches == [8, 4, 4, 2]  # 4 of 8 are left after the first token, 3 of 4 after the second, 2 of 4 after the third


def test_a_process_whose_rows_have_ended_goes_on_as_long_as_another_has_some():
    model, calls = Chain(CHAIN), []
    made = generate(
        model, [[BOS, 10], [BOS, 21]], max_new_tokens=5, eos_id=EOS, pad_id=PAD, any_rank=lambda alive: calls.append(alive) or True
    )
    assert responses(made) == [[EOS], [22, EOS]] and made.ended.all()
    assert len(model.batches) == 5 and calls == [True, False, False, False]
    assert made.tokens.shape == (2, 4)
