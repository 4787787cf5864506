"""--compile changes roundings alone: the same losses, gradients and tokens, in a number of forms that does not grow with the shapes."""

import shutil
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from small import PAD, loud, ragged_rows, task
from torch import nn

from data.errors import UsageError
from model.fit import train_step
from model.generate import generate, row_uniforms
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel
from model.parallel import ALONE, DeviceFlags, distribute, start
from model.score import to_tensors
from model.transformer import Layer

needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
WORLD = replace(ALONE, compiled=True)


@pytest.fixture(autouse=True)
def strict():
    """Code that is run as it is, past the limit of forms, fails; and nothing compiled is left to other tests."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def twins(kind, **world):
    """One model as it is and one compiled, of the same weights."""
    return distribute(loud(kind), replace(ALONE, **world)), distribute(loud(kind), replace(WORLD, **world))


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world", "bound"),
    [("sft", {}, 1e-5), ("rm", {}, 1e-5), ("dpo", {}, 1e-5), ("dpo", {"checkpoint_activations": True}, 1e-5), ("dpo", {"dtype": torch.bfloat16}, 3e-2)],
)
def test_losses_and_gradients_are_the_same(name, world, bound):
    plain, compiled = twins(task(name, 1)[0], **world)
    for seed, count in enumerate((8, 6, 7)):  # lengths differ, too
        _, rows, objective = task(name, count, seed)
        for model in (plain, compiled):
            model.zero_grad()
        expected, found = (train_step(model, objective, rows, 4, replace(ALONE, **world))["loss"] for model in (plain, compiled))
        assert found == pytest.approx(expected, abs=bound)
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, atol=bound * max(1, float(one.grad.abs().max())))
    assert list(plain.state_dict()) == list(compiled.state_dict())


@needs_a_compiler
@pytest.mark.slow
def test_ppos_scores_and_gradients_are_the_same():
    """Policy, values and entropy of both kinds of critic, as the update reads them."""
    for critic in (None, ScalarModel):
        tokens, mask = to_tensors(ragged_rows(6), PAD, torch.device("cpu"))
        outcomes = []
        for world in (ALONE, WORLD):
            model = distribute(PolicyWithCritic(loud(LanguageModel), critic and loud(critic)), world)
            scored = model(tokens, mask, temperature=0.7, with_entropy="gradient")
            (scored.logp.sum() + scored.entropy.sum() + (scored.values**2).sum()).backward()
            outcomes.append([*scored, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(outcomes[0]) == len(outcomes[1])
        for one, other in zip(*outcomes, strict=True):
            assert torch.allclose(one, other, atol=1e-5 * max(1, float(one.abs().max())))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_a_compiler])])
def test_responses_are_the_same(backend, monkeypatch):
    """After prompts of any length, with rows that end early, greedily and drawn; what is made of the first serves the others. The eager backend
    compiles nothing, but is given the same graphs."""
    monkeypatch.setattr(Layer, "compile", partialmethod(nn.Module.compile, backend=backend))
    plain, compiled = (model.eval() for model in twins(LanguageModel))
    forms = []
    for count, seed in ((5, 0), (3, 1), (9, 2)):
        prompts = [list(row.prompt) for row in ragged_rows(count, seed)]
        for uniforms in (None, row_uniforms(seed, range(count), 12)):
            made = [generate(model, prompts, max_new_tokens=12, eos_id=7, pad_id=PAD, uniforms=uniforms) for model in (plain, compiled)]
            assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
        forms.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < forms[0] and forms[1] == forms[2]


def test_without_a_compiler_it_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="--compile: there is no no-such-compiler"):
        start(DeviceFlags(device="cpu", compile=True))
