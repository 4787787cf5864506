"""PPO's loop on a toy: it learns, twice the same; the best is kept; what it logs, warns of, and refuses to go on with."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
from toy import (
    ALONE, CONFIG, FLAGS, SAMPLING, V,
    Count, bigram, chain, loud, models, prompts_of, rollout_of, same_weights, weights, with_values,
)  # fmt: skip
from torch import nn

from data.errors import NumericalError
from data.run import Metrics
from model.heads import LanguageModel, PolicyWithCritic, ScalarModel
from model.resume import Saving
from model.transformer import ModelConfig, initialise
from rl import ppo
from rl.ppo import train_ppo
from rl.rollout import roll_out

NAN = float("nan")


def train(model, ref, reward_model, flags, *, prompts=None, folder=None, objectives=None, same_start=True, world=ALONE, **sampling):
    """(best, kept, metric lines) of train_ppo; validation's objectives are given, or all 0."""
    kept, given = [], iter(objectives or [0.0] * 1000)
    path = folder / "metrics.jsonl" if folder else None
    best = train_ppo(
        model, ref, reward_model, prompts or prompts_of(12), flags, replace(SAMPLING, **sampling),
        same_start=same_start, seed=0, world=world, metrics=Metrics(path),
        validate=lambda step: {"objective": next(given)}, keep=lambda name: kept.append((name, weights(model))),
    )  # fmt: skip
    return best, kept, [json.loads(line) for line in path.read_text().splitlines()] if folder else []


SMALL = ModelConfig(vocab_size=V, width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, context=32, tied=False)
LEARN = replace(FLAGS, lr=1e-2, iterations=20, prompts_per_iteration=32, passes=2, minibatch=16, micro_batch=32, clip=1.0, kl_coef=0.05)


def learner(critic=None):
    """A fresh small policy that says every token with probability 1/V, and its reference, with the same weights."""
    pair = [LanguageModel(SMALL) for _ in range(2)]
    for model in pair:
        initialise(model, 1)
        nn.init.zeros_(model.lm_head.weight)
    return PolicyWithCritic(pair[0], critic), pair[1]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Twenty rounds for a reward that counts 5s: the model, what it was kept as, its metrics, reference before and after."""
    (model, ref), folder = learner(), tmp_path_factory.mktemp("learnt")
    before = weights(ref)
    best, kept, lines = train(model, ref, Count(5), LEARN, folder=folder, score_mean=0.0, score_std=1.0, end_penalty=0.0)
    return model, best, kept, lines, same_weights(ref, before)


def test_ppo_raises_the_score(learnt):
    """At first one token in twelve is a 5: half a one in a response, and half a one in its prompt. Afterwards most of the 8 are."""
    *_, lines, ref_is_as_it_was = learnt
    rounds = [line for line in lines if "score" in line]
    assert len(rounds) == 20 and 0.5 < rounds[0]["score"] < 1.5 < 6.0 < rounds[-1]["score"]
    assert rounds[-1]["kl_ref_seq"] > 1 and rounds[-1]["explained_variance"] > rounds[0]["explained_variance"]
    assert ref_is_as_it_was


def test_every_round_logs_what_the_readme_promises(learnt):
    rounds = [line for line in learnt[3] if "score" in line]
    assert rounds[0].keys() == {
        "step", "time", "score", "raw_score", "kl_ref_seq", "kl_ref_tok", "ended", "length", "empty", "explained_variance", "policy_loss",
        "value_loss", "clip_share", "overflow", "kl_old_tok", "kl_old_most", "entropy", "grad_norm", "updates", "first_ratio", "kl_coef", "lr",
    }  # fmt: skip
    assert rounds[0]["kl_ref_seq"] == 0 and rounds[0]["entropy"] == pytest.approx(math.log(V), abs=0.05)
    for line in rounds:
        assert line["first_ratio"] == pytest.approx(1, abs=1e-4) and line["updates"] == 4 and line["raw_score"] == pytest.approx(line["score"])
        assert line["kl_ref_tok"] * line["length"] == pytest.approx(line["kl_ref_seq"], rel=1e-6, abs=1e-9)
    assert rounds[0]["lr"] == pytest.approx(1e-2) and rounds[-1]["lr"] < 2e-3


def test_two_runs_are_the_same_bit_for_bit(learnt, tmp_path):
    first, _, kept, lines, _ = learnt
    model, ref = learner()
    torch.rand(7)  # nothing reads the global generator
    _, again, others = train(model, ref, Count(5), LEARN, folder=tmp_path, score_mean=0.0, score_std=1.0, end_penalty=0.0)
    assert same_weights(model, weights(first))
    assert [{k: v for k, v in line.items() if k != "time"} for line in others] == [{k: v for k, v in line.items() if k != "time"} for line in lines]
    assert [name for name, _ in again] == [name for name, _ in kept]


def test_the_best_is_kept_and_the_start_counts(tmp_path):
    flags = replace(LEARN, iterations=4, validations=4, prompts_per_iteration=8, minibatch=8)
    model, ref = learner()
    start = weights(model)
    best, kept, lines = train(model, ref, Count(5), flags, folder=tmp_path, objectives=[1.0, 0.5, 3.0, 3.0, 2.0])
    assert best == {"objective": 3.0, "step": 1}
    named = [snapshot for name, snapshot in kept if name == ""]
    series = {name: snapshot for name, snapshot in kept if name}
    assert len(named) == 2 and named[0].keys() == start.keys() and all(torch.equal(named[0][k], start[k]) for k in start)
    assert list(series) == [f"snapshot-{i:05d}" for i in (1, 2, 3, 4)]
    assert all(torch.equal(named[1][k], series["snapshot-00002"][k]) for k in start) and same_weights(model, series["snapshot-00004"])
    assert [line["valid_objective"] for line in lines if "valid_objective" in line] == [1.0, 0.5, 3.0, 3.0, 2.0]
    model, ref = learner()
    best, kept, _ = train(model, ref, Count(5), replace(flags, snapshots=False), objectives=[5.0, 0.5, 3.0, 3.0, 2.0])
    assert best == {"objective": 5.0, "step": -1} and [name for name, _ in kept] == [""]


@pytest.mark.parametrize("place", [0, 1])
def test_a_validation_that_is_not_finite_stops(place):
    """Else NaN would compare false for ever, and the first weights would pass for the best."""
    objectives = [1.0, 2.0, 3.0]
    objectives[place] = NAN
    with pytest.raises(NumericalError, match="validation's objective is nan"):
        train(*learner(), Count(5), replace(LEARN, iterations=2, validations=2, prompts_per_iteration=8, minibatch=8), objectives=objectives)


def test_validations_are_as_many_as_asked_for(tmp_path):
    flags = replace(LEARN, iterations=5, validations=3, prompts_per_iteration=8, minibatch=8)
    _, kept, lines = train(*learner(), Count(5), flags, folder=tmp_path)
    assert [line["step"] for line in lines if "valid_objective" in line] == [-1, 1, 3, 4] and len(kept) == 1 + 3


def test_the_first_kl_must_be_0_where_both_start_from_one_model():
    policy, other, reward_model = models()
    before = weights(policy)
    with pytest.raises(NumericalError, match="first KL to the reference"):
        train(policy, other, reward_model, FLAGS)
    assert same_weights(policy, before)
    train(policy, other, reward_model, replace(FLAGS, iterations=1), same_start=False)


@pytest.mark.parametrize("score", [NAN, math.inf])
def test_a_score_that_is_not_finite_stops_before_the_weights_change(score):
    class Broken(Count):
        def forward(self, tokens, lengths):
            return torch.cat([super().forward(tokens, lengths)[1:], torch.tensor([score])])

    model, ref = learner()
    before = weights(model)
    with pytest.raises(NumericalError, match="ppo, iteration 0: .*not finite"):
        train(model, ref, Broken(), FLAGS)
    assert same_weights(model, before)


@pytest.mark.parametrize(
    ("table", "word"), [(chain({}), "100 % of the responses are empty"), (chain({i: 6 for i in range(V)}), "eos_rate=0: no response ended")]
)
def test_collapse_is_told_once(table, word, capsys, tmp_path):
    model = with_values(bigram(table))
    _, _, lines = train(model, bigram(table), Count(), replace(FLAGS, iterations=3), folder=tmp_path)
    output = "".join(capsys.readouterr())
    assert output.count("warning: ppo:") == 1 and output.count(word) == 1
    share = "empty" if "empty" in word else "ended"
    assert [line[share] for line in lines if "score" in line] == [1.0 if share == "empty" else 0.0] * 3


def test_a_kl_that_explodes_is_told_once(capsys, tmp_path):
    """By hand: the policy always says 5, to which the reference gives 1/12, so the KL is log(12) = 2.48 nats at each of 8 tokens; nothing ends
    either, and both are told. Where the reference gives it 1/3, log(3) = 1.10 is told; log(2.7) = 0.99 is not."""
    flags = replace(FLAGS, iterations=3, lr=1e-9)
    table = chain({i: 5 for i in range(V)})
    _, _, lines = train(with_values(bigram(table)), bigram(torch.zeros(V, V)), Count(), flags, folder=tmp_path, same_start=False)
    rounds = [line for line in lines if "score" in line]
    assert [line["kl_ref_tok"] for line in rounds] == pytest.approx([math.log(12)] * 3, abs=1e-4)
    output = "".join(capsys.readouterr())
    assert output.count("warning: ppo:") == 2 and output.count("eos_rate=0") == 1
    assert output.count("the KL to the reference has grown to 2.48 nats per token, 19.9 per response; read some responses") == 1
    assert "a larger KL coefficient" in output
    for ratio, told in ((3.0, 1), (2.7, 0)):  # the reference gives 5 the probability 1/ratio
        ref = torch.zeros(V, V)
        ref[:, 5] = math.log((V - 1) / (ratio - 1))
        train(with_values(bigram(table)), bigram(ref), Count(), replace(flags, iterations=1), same_start=False)
        assert "".join(capsys.readouterr()).count("the KL to the reference has grown") == told


@pytest.mark.parametrize(("explained", "told"), [(-0.5, 1), (0.0, 0)])
def test_a_critic_worse_than_none_is_told_once_after_ten_rounds(explained, told, monkeypatch, capsys):
    monkeypatch.setattr(ppo, "explained_variance", lambda *arguments: explained)
    train(*learner(), Count(), replace(LEARN, lr=1e-9, iterations=12, prompts_per_iteration=16))
    output = "".join(capsys.readouterr())
    assert output.count("warning: ppo:") == output.count("explained_variance is -0.50 after 10 rounds") == told


def test_responses_that_end_are_no_collapse(learnt, capsys):
    train(*learner(), Count(), replace(LEARN, iterations=1))
    assert "warning" not in "".join(capsys.readouterr())


def test_the_coefficient_follows_its_target(tmp_path):
    """kl_coef of each round from KL and coefficient of the one before: 32 of 320 responses, so at most 2 % a round."""
    flags = replace(LEARN, iterations=6, kl_target=0.5, kl_horizon=320.0, kl_coef=0.1)
    _, _, lines = train(*learner(), Count(5), flags, folder=tmp_path)
    rounds = [line for line in lines if "score" in line]
    assert rounds[0]["kl_coef"] == 0.1
    for line, following in zip(rounds, rounds[1:]):
        error = max(-0.2, min(0.2, line["kl_ref_seq"] / 0.5 - 1))
        assert following["kl_coef"] == pytest.approx(line["kl_coef"] * (1 + error / 10), rel=1e-9)
    assert rounds[1]["kl_coef"] == pytest.approx(0.098) and len({line["kl_coef"] for line in rounds}) > 3


def test_every_round_draws_anew(tmp_path):
    """One prompt, a policy that hardly moves: with the same random numbers every round would be the first again."""
    flags = replace(LEARN, lr=1e-9, iterations=3, prompts_per_iteration=32)
    _, _, lines = train(*learner(), Count(5), flags, prompts=prompts_of(1), folder=tmp_path)
    assert len({(line["raw_score"], line["length"]) for line in lines if "score" in line}) == 3


def test_a_separate_critic_learns_and_the_reward_model_does_not(tmp_path):
    reward_model = loud(ScalarModel, CONFIG, 2)
    policy, ref = (loud(LanguageModel, CONFIG) for _ in range(2))
    model = PolicyWithCritic(policy, loud(ScalarModel, CONFIG, 2))
    before, critic = weights(reward_model), weights(model.critic)
    train(model, ref, reward_model, FLAGS, folder=tmp_path)
    assert same_weights(reward_model, before) and not same_weights(model.critic, critic)


@pytest.mark.parametrize("critic_lr", [None, 4e-3])
def test_a_separate_critic_may_have_a_learning_rate_of_its_own(critic_lr, tmp_path):
    """Adam's first step moves a weight by its learning rate, whatever the gradient."""
    model, ref = PolicyWithCritic(loud(LanguageModel, CONFIG), loud(ScalarModel, CONFIG, 2)), loud(LanguageModel, CONFIG)
    before = weights(model)
    flags = replace(FLAGS, lr=1e-3, critic_lr=critic_lr, critic="separate", iterations=1, prompts_per_iteration=8, minibatch=8, passes=1, warmup=0.0, clip=1e6)
    train(model, ref, loud(ScalarModel, CONFIG, 2), flags, folder=tmp_path)
    for part, lr in (("policy", 1e-3), ("critic", critic_lr or 1e-3)):
        moved = [(tensor - before[name]).abs().max().item() for name, tensor in weights(model).items() if name.startswith(part)]
        assert max(moved) == pytest.approx(lr, rel=1e-3)


def test_ppo_under_bf16_products_passes_its_own_checks(tmp_path):
    """First ratio and first KL are held to wider bounds than in float32, and stay within them; weights stay float32."""
    model, ref = with_values(loud(LanguageModel, CONFIG)), loud(LanguageModel, CONFIG)
    world = replace(ALONE, dtype=torch.bfloat16)
    _, _, lines = train(model, ref, loud(ScalarModel, CONFIG, 2), FLAGS, folder=tmp_path, world=world)
    rounds = [line for line in lines if "score" in line]
    assert rounds and all(abs(math.log(line["first_ratio"])) < 0.1 for line in rounds)
    assert abs(rounds[0]["kl_ref_tok"]) < 2e-2 and all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_kl_cost_holds_the_policy_back():
    """The same rounds with a coefficient of 5: the policy stays near its reference, so the cost has the right sign."""
    free, held = (kl_after(replace(LEARN, iterations=8, kl_coef=kl_coef)) for kl_coef in (0.0, 5.0))
    in_loss = kl_after(replace(LEARN, iterations=8, kl_coef=5.0, kl_placement="loss", kl_estimator="k2"))
    assert free > 1.0 and held < free / 5 and in_loss < free / 5


def kl_after(flags):
    """KL per sequence of a learner after training, on other random numbers."""
    model, ref = learner()
    train(model, ref, Count(5), flags, score_mean=0.0, score_std=1.0, end_penalty=0.0)
    return float(rollout_of(model, ref, Count(5), prompts_of(64), seed=9).kl.sum()) / 64


class Stopped(Exception):
    """An interruption."""


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_stopped_loop_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, stop_at):
    """With its adaptive coefficient and its best objective."""
    flags = replace(LEARN, iterations=4, validations=2, prompts_per_iteration=8, minibatch=8, kl_target=0.01, kl_horizon=40.0)
    outcomes, shown = {}, []
    for name, stops in (("whole", [None]), ("stopped", [stop_at, None])):
        folder, objectives = tmp_path / name, {-1: 1.0, 1: 3.0, 3: 2.0}
        folder.mkdir()
        for stop in stops:
            (model, ref), path = learner(), folder / "metrics.jsonl"
            done = len(path.read_text().splitlines()) if path.exists() else 0
            rounds = iter(range(99))

            def sampling(*args, rounds=rounds, stop=stop, **more):
                if next(rounds) == stop:
                    raise Stopped
                shown.append(str(args[3]))
                return roll_out(*args, **more)

            monkeypatch.setattr(ppo, "roll_out", sampling)
            given = iter([objective for step, objective in objectives.items() if not done or stop_at == 0 or step >= stop_at])
            try:
                best = train_ppo(
                    model, ref, Count(5), prompts_of(12), flags, SAMPLING, same_start=True, seed=0, world=ALONE, metrics=Metrics(path),
                    validate=lambda step, given=given: {"objective": next(given)}, keep=lambda name: None,
                    saving=Saving(folder, ALONE, every=1),
                )  # fmt: skip
            except Stopped:
                continue
            lines = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in path.read_text().splitlines()]
            outcomes[name] = best, lines, weights(model)
    assert len(set(shown[:4])) == 4 and shown[-1] == shown[3]  # every round its own prompts, also after a stop
    assert outcomes["stopped"][:2] == outcomes["whole"][:2]
    assert all(torch.equal(tensor, outcomes["whole"][2][name]) for name, tensor in outcomes["stopped"][2].items())
    assert len({line["kl_coef"] for line in outcomes["whole"][1] if "kl_coef" in line}) == 4 and outcomes["whole"][0] == {"objective": 3.0, "step": 1}


def test_a_collapse_is_not_told_again_after_a_stop(tmp_path, monkeypatch, capsys):
    for stop in (1, None):
        rounds = iter(range(99))

        def sampling(*args, rounds=rounds, stop=stop, **more):
            if next(rounds) == stop:
                raise Stopped
            return roll_out(*args, **more)

        monkeypatch.setattr(ppo, "roll_out", sampling)
        with contextlib.suppress(Stopped):
            train_ppo(
                with_values(bigram(chain({}))), bigram(chain({})), Count(), prompts_of(12), replace(FLAGS, iterations=3), SAMPLING,
                same_start=True, seed=0, world=ALONE, metrics=Metrics(tmp_path / "metrics.jsonl"), validate=lambda step: {"objective": 0.0},
                keep=lambda name: None, saving=Saving(tmp_path, ALONE, every=1),
            )  # fmt: skip
    assert "".join(capsys.readouterr()).count("100 % of the responses are empty") == 1
    assert len([line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"score"' in line]) == 3
