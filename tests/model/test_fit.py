"""The supervised loop: the same step whatever the micro-batch, its own denominator, a stop before bad numbers, the best weights kept."""

import dataclasses
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small import ALONE, CONFIG, CPU, EOS, PAD, loud, ragged_pairs, ragged_rows, reference_sums, task

from data.batches import CHOSEN, REJECTED, step_indices
from data.errors import NumericalError
from data.run import Metrics
from losses.dpo import dpo
from model import fit as fit_module
from model.fit import FitFlags, Objective, evaluate, fit, train_step
from model.generate import generate
from model.heads import LanguageModel
from model.objectives import preference_objective, sft_objective
from model.optim import clipped_step, lr_at, make_optimiser

TASKS = ("sft", "rm", "dpo")
FLAGS = FitFlags(lr=1e-3, epochs=1, batch_size=4, micro_batch=2, validations=2, patience=9, snapshots=False)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def weights(model):
    return flat(model.parameters())


def gradient(model, objective, rows, micro_batch):
    model.zero_grad()
    numbers = train_step(model, objective, rows, micro_batch, ALONE)
    return numbers, flat(parameter.grad for parameter in model.parameters())


def run_fit(model, objective, rows, path=None, flags=FLAGS, validation=None, **more):
    options = {"stage": "test", "seed": 7, "world": ALONE, "keep": lambda snapshot: None} | more
    return fit(model, objective, rows, validation or rows[:3], flags, metrics=Metrics(path), **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def summed_nll(model, rows):
    """Sum over response tokens of -log p, row by row without padding, and their number."""
    total = 0.0
    for row in rows:
        tokens = torch.tensor([row.prompt + row.response])
        start = len(row.prompt)
        total = total + F.cross_entropy(model(tokens)[0, start - 1 : -1], tokens[0, start:], reduction="sum")
    return total, sum(len(row.response) for row in rows)


# ---- one step


@pytest.mark.parametrize("name", TASKS)
def test_gradients_do_not_depend_on_the_micro_batch(name):
    kind, rows, objective = task(name, 8)
    model = loud(kind)
    numbers, expected = gradient(model, objective, rows, 8)
    for micro_batch in (4, 3, 1):
        again, found = gradient(model, objective, rows, micro_batch)
        assert (found - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
        assert again == pytest.approx(numbers, abs=1e-5)


def test_the_step_is_the_sum_over_tokens_by_their_number():
    _, rows, objective = task("sft", 8)
    model = loud(LanguageModel)
    numbers, found = gradient(model, objective, rows, 3)
    model.zero_grad()
    total, count = summed_nll(model, rows)
    (total / count).backward()
    expected = flat(parameter.grad for parameter in model.parameters())
    assert numbers["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert (found - expected).abs().max() < 1e-6 * max(1, expected.abs().max())

    # what the rows are ragged for: a mean of the micro-batches' means is another gradient
    model.zero_grad()
    for first in (0, 4):
        total, count = summed_nll(model, rows[first : first + 4])
        (total / count / 2).backward()
    wrong = flat(parameter.grad for parameter in model.parameters())
    assert (wrong - expected).abs().max() > 0.01 * expected.abs().max()


def test_sft_may_include_the_prompt():
    rows, model = ragged_rows(6), loud(LanguageModel)
    whole = [replace(row, prompt=row.prompt[:1], response=row.prompt[1:] + row.response) for row in rows]  # all after BOS
    total, count = summed_nll(model, whole)
    numbers, _ = gradient(model, sft_objective(PAD, CPU, include_prompt=True), rows, 4)
    assert numbers["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)


def test_the_loss_of_known_transitions_is_exact():
    """Three tokens whose next one is a function of the last: -log p of a row can be read off the table (a shift by 0 or 2 would not)."""
    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]])
    model = LanguageModel(replace(CONFIG, vocab_size=3, width=4, heads=1, kv_heads=1, feed_forward=2, layers=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.trunk.norm.weight.fill_(1)
        model.trunk.embedding.weight[:, :3] = torch.eye(3)  # after the norm: 2 in the token's place
        model.lm_head.weight[:, :3] = table.log().T / 2
    row = ragged_rows(1)[0]
    rows = [replace(row, prompt=(0, 1), response=(2, 1, 0))]  # 1 -> 2 -> 1 -> 0
    numbers, _ = gradient(model, sft_objective(PAD, CPU, include_prompt=False), rows, 1)
    assert numbers["loss"] == pytest.approx(-(math.log(0.8) + math.log(0.6) + math.log(0.1)) / 3, abs=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_is_the_mean_over_rows_and_leaves_no_gradient(name):
    kind, rows, objective = task(name, 7)
    model = loud(kind)
    expected = train_step(model, objective, rows, 7, ALONE)
    model.zero_grad()
    for micro_batch in (1, 3, 16):
        assert evaluate(model, objective, rows, micro_batch, ALONE) == pytest.approx(expected, abs=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dpo_starts_at_ln_2_with_rewards_of_0_whatever_the_batch(tmp_path):
    pairs, model, seen = ragged_pairs(9), loud(LanguageModel), []
    objective = preference_objective(dpo, 0.1, reference_sums(model, pairs), PAD, CPU)
    before = weights(model)

    def at_first(numbers):
        assert torch.equal(weights(model), before)
        seen.append(numbers)

    run_fit(model, objective, pairs, at_first=at_first)
    (numbers,) = seen
    assert numbers["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(numbers["chosen_reward"]) < 1e-5 and abs(numbers["rejected_reward"]) < 1e-5 and abs(numbers["chosen_fall"]) < 1e-4
    assert not torch.equal(weights(model), before)


def test_the_dpo_objective_equals_the_formula_on_sums_over_response_tokens():
    pairs, model, ref = ragged_pairs(5), loud(LanguageModel), loud(LanguageModel, seed=1)
    objective = preference_objective(lambda pairs: dpo(pairs, beta=0.3), 0.3, reference_sums(ref, pairs), PAD, CPU)
    losses, margins = [], []
    for pair in pairs:
        with torch.no_grad():
            chosen, rejected = (summed_nll(ref, [half])[0] - summed_nll(model, [half])[0] for half in (pair.chosen, pair.rejected))
        margins.append(0.3 * float(chosen - rejected))
        losses.append(math.log1p(math.exp(-margins[-1])))
    numbers = evaluate(model, objective, pairs, 2, ALONE)
    assert numbers["loss"] == pytest.approx(sum(losses) / 5, abs=1e-4)
    assert numbers["margin"] == pytest.approx(sum(margins) / 5, abs=1e-4)
    with torch.no_grad():
        fall = sum(float(summed_nll(model, [pair.chosen])[0] - summed_nll(ref, [pair.chosen])[0]) for pair in pairs) / 5
    assert abs(fall) > 0.1 and numbers["chosen_fall"] == pytest.approx(fall, abs=1e-4)
    assert numbers["accuracy"] == sum(margin > 0 for margin in margins) / 5
    nearly = {row: (chosen + 1e-5, rejected) for row, (chosen, rejected) in reference_sums(model, pairs).items()}  # as rounding leaves them
    assert evaluate(model, preference_objective(lambda pairs: dpo(pairs, beta=0.3), 0.3, nearly, PAD, CPU), pairs, 2, ALONE)["accuracy"] == 0.5


@pytest.mark.parametrize("name", ["rm", "dpo"])
def test_both_halves_of_all_pairs_go_through_the_model_in_one_forward(name):
    kind, rows, objective = task(name, 4)
    model, calls = loud(kind), []
    model.register_forward_hook(lambda *call: calls.append(call))
    objective.loss(model, rows)
    assert len(rows) > 1 and len(calls) == 1


def test_reward_accuracy_counts_a_tie_as_a_half():
    _, pairs, objective = task("rm", 2)
    tied = replace(pairs[0], rejected=pairs[0].chosen)

    def length_model(tokens, parts):
        return torch.stack([(parts == CHOSEN).sum(dim=1), (parts == REJECTED).sum(dim=1)], dim=1).float()

    longer = len(pairs[1].chosen.response) > len(pairs[1].rejected.response)
    _, numbers = objective.loss(length_model, [tied, pairs[1]])
    assert float(numbers["accuracy"]) == 0.5 + longer
    assert float(numbers["gap"]) == len(pairs[1].chosen.response) - len(pairs[1].rejected.response)


# ---- the loop


def test_a_smaller_last_batch_has_its_own_denominator(tmp_path):
    _, rows, objective = task("sft", 10)
    model = loud(LanguageModel)
    run_fit(model, objective, rows, tmp_path / "metrics.jsonl", replace(FLAGS, lr=1e-12))  # weights as good as fixed
    steps = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    batches = list(step_indices(10, 4, 1, 7, "test"))
    assert [len(batch) for batch in batches] == [4, 4, 2] and len(steps) == 3
    for line, batch in zip(steps, batches, strict=True):
        model.zero_grad()
        total, count = summed_nll(model, [rows[i] for i in batch])
        (total / count).backward()
        assert line["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(flat(parameter.grad for parameter in model.parameters()).norm().item(), rel=1e-4)


def breaks_at(objective, broken_step, how):
    """The objective, whose `broken_step`-th training loss is `how`(loss); micro-batches as large as the batch."""
    calls = itertools.count()

    def loss(model, rows):
        total, metrics = objective.loss(model, rows)
        return (how(model, total) if model.training and next(calls) == broken_step else total), metrics

    return dataclasses.replace(objective, loss=loss)


def infinite_gradient(model, total):
    """A finite loss with an infinite gradient in one matrix."""
    return total + model.lm_head.weight[0, 0].mul(0).sqrt()


@pytest.mark.parametrize("how", [lambda model, total: total * math.nan, lambda model, total: total * math.inf], ids=["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(how, monkeypatch):
    _, rows, objective = task("sft", 12)
    model, after = loud(LanguageModel), []
    real = fit_module.clipped_step
    monkeypatch.setattr(fit_module, "clipped_step", lambda *args: (real(*args), after.append(weights(model)))[0])
    with pytest.raises(NumericalError) as stopped:
        run_fit(model, breaks_at(objective, 2, how), rows, flags=replace(FLAGS, micro_batch=4, validations=1))
    assert len(after) == 2 and torch.equal(weights(model), after[-1])
    third = list(step_indices(12, 4, 1, 7, "test"))[2]
    assert "test, step 2: loss is not finite" in str(stopped.value) and all(f"row{i}" in str(stopped.value) for i in third)


def test_a_gradient_that_is_not_finite_stops_and_names_its_tensor():
    _, rows, objective = task("sft", 12)
    model = loud(LanguageModel)
    before = weights(model)
    with pytest.raises(NumericalError, match=r"test, step 0: the gradient is not finite in lm_head.weight; "):
        run_fit(model, breaks_at(objective, 0, infinite_gradient), rows, flags=replace(FLAGS, micro_batch=4))
    assert torch.equal(weights(model), before)


def scripted(losses):
    """An objective whose validation losses are given; training has an ordinary loss."""
    _, rows, objective = task("rm", 40)
    left = iter(losses)

    def loss(model, part):
        return objective.loss(model, part) if model.training else (torch.tensor(next(left)), {})

    return rows, Objective(loss)


def test_weights_are_kept_where_validation_is_best_and_patience_ends_training(tmp_path):
    rows, objective = scripted([6.0, 5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 1.0])  # the first is that of the weights as they came
    path, kept = tmp_path / "metrics.jsonl", []
    best = run_fit(
        loud(task("rm", 1)[0]), objective, rows, path, replace(FLAGS, validations=10, patience=2), validation=rows[:1],
        keep=lambda snapshot: kept.append((snapshot, len(lines(path)))),
    )  # fmt: skip
    assert best == {"loss": 3.0, "step": 3}
    assert kept == [("", 1), ("", 3), ("", 5), ("", 9)]  # after the validations at the start and of steps 0, 1 and 3; a step adds two lines
    assert [line["valid_loss"] for line in lines(path) if "valid_loss" in line] == [6.0, 5.0, 4.0, 4.5, 3.0, 3.0, 3.5]


def test_every_validation_leaves_a_snapshot_and_the_last_is_of_the_last_weights():
    kind, rows, objective = task("rm", 10)
    model, kept = loud(kind), {}
    run_fit(
        model, objective, rows, flags=replace(FLAGS, snapshots=True, validations=3), keep=lambda name: kept.update({name: weights(model)})
    )
    assert sorted(kept) == ["", "snapshot-00001", "snapshot-00002", "snapshot-00003"]
    assert torch.equal(kept["snapshot-00003"], weights(model)) and not torch.equal(kept["snapshot-00002"], weights(model))


def test_weights_that_training_only_makes_worse_are_kept_as_they_came():
    rows, objective = scripted([1.0, 2.0, 3.0, 0.5])
    kept = []
    flags = replace(FLAGS, validations=10, patience=2)
    best = run_fit(loud(task("rm", 1)[0]), objective, rows, flags=flags, validation=rows[:1], keep=lambda snapshot: kept.append(1))
    assert best == {"loss": 1.0, "step": -1} and len(kept) == 1


def test_a_validation_may_end_training_before_its_weights_are_kept():
    rows, objective = scripted([6.0, 5.0, 4.0, 3.0])
    kept = []
    best = run_fit(
        loud(task("rm", 1)[0]), objective, rows, flags=replace(FLAGS, validations=10), validation=rows[:1],
        keep=lambda snapshot: kept.append(1), at_validation=lambda numbers, step: numbers["loss"] < 4.5,
    )  # fmt: skip
    assert best == {"loss": 5.0, "step": 0} and len(kept) == 2


def test_a_first_validation_that_ends_training_leaves_the_weights_as_they_came(tmp_path):
    rows, objective = scripted([6.0, 5.0])
    best = run_fit(loud(task("rm", 1)[0]), objective, rows, tmp_path / "metrics.jsonl", validation=rows[:1], at_validation=lambda numbers, step: True)
    assert best == {"loss": 6.0, "step": -1} and [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [-1]


def test_a_validation_loss_that_is_not_finite_stops():
    rows, objective = scripted([6.0, 5.0, math.nan])
    with pytest.raises(NumericalError, match="test, step 1: .*validation"):
        run_fit(loud(task("rm", 1)[0]), objective, rows, flags=replace(FLAGS, validations=10), validation=rows[:1])


@pytest.mark.parametrize(("validations", "steps_looked_at"), [(1, [9]), (3, [3, 7, 9]), (4, [2, 5, 8, 9]), (8, [1, 3, 5, 7, 9])])
def test_validations_are_at_most_as_many_as_asked_for(validations, steps_looked_at, tmp_path):
    _, rows, objective = task("rm", 10)
    flags = replace(FLAGS, batch_size=1, validations=validations, lr=1e-6)
    run_fit(loud(task("rm", 1)[0]), objective, rows, tmp_path / "metrics.jsonl", flags)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl") if "valid_loss" in line] == [-1, *steps_looked_at]


def test_metrics_have_one_line_per_step_and_validation(tmp_path):
    kind, pairs, objective = task("dpo", 8)
    run_fit(loud(kind), objective, pairs, tmp_path / "metrics.jsonl")
    at_start, first, valid, *_ = lines(tmp_path / "metrics.jsonl")
    assert at_start["step"] == -1 and set(at_start) == set(valid)
    names = {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "chosen_fall"}
    assert set(first) == {"step", "lr", "grad_norm", "time"} | names
    assert set(valid) == {"step", "time"} | {f"valid_{name}" for name in names}


@pytest.mark.parametrize("name", TASKS)
def test_equal_runs_are_equal_bit_for_bit(name, tmp_path):
    results = []
    for run in ("a", "b", "c"):
        kind, rows, objective = task(name, 11)
        model = loud(kind)
        torch.manual_seed(len(results))  # the global generator plays no part
        run_fit(model, objective, rows, tmp_path / run, replace(FLAGS, epochs=2), seed=8 if run == "c" else 7)
        results.append((weights(model), [{k: v for k, v in line.items() if k != "time"} for line in lines(tmp_path / run)]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not torch.equal(results[0][0], results[2][0])


def test_training_learns():
    _, rows, objective = task("sft", 12)
    model = loud(LanguageModel)
    before = evaluate(model, objective, rows, 12, ALONE)["loss"]
    run_fit(model, objective, rows, flags=replace(FLAGS, lr=1e-2, epochs=15))
    assert evaluate(model, objective, rows, 12, ALONE)["loss"] < 0.3 * before


# ---- optimiser and schedule


def test_lr_at_by_hand():
    trace = [lr_at(step, 10, 2.0, 0.2) for step in range(10)]
    cosine = [2.0 * (0.02 + 0.98 * (1 + math.cos(math.pi * k / 8)) / 2) for k in range(8)]
    assert trace == pytest.approx([1.0, 2.0, *cosine])
    assert trace[2] == 2.0 and trace[6] == pytest.approx(1.02)  # half-way: the mean of peak and 0.02 peak
    assert lr_at(0, 1, 2.0, 0.0) == 2.0  # a single step


def test_the_schedule_reaches_every_group_of_parameters(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(fit_module, "make_optimiser", lambda *args: made.append(make_optimiser(*args)) or made[0])
    kind, rows, objective = task("rm", 12)
    run_fit(loud(kind), objective, rows, tmp_path / "m", replace(FLAGS, warmup=0.34, weight_decay=0.1))
    trace = [line["lr"] for line in lines(tmp_path / "m") if "lr" in line]
    assert trace == pytest.approx([1e-3, 1e-3, 1e-3 * (0.02 + 0.98 / 2)])
    assert [group["lr"] for group in made[0].param_groups] == [trace[-1]] * 2


@pytest.mark.parametrize("tied", [False, True])
def test_adam_is_the_one_that_optim_states_and_only_the_layers_matrices_decay(tied):
    model = loud(LanguageModel, replace(CONFIG, tied=tied))
    groups = make_optimiser(model, 1e-3, 0.3).param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.9, 0.99), 1e-8)}
    inside = {id(p) for p in model.trunk.layers.parameters()}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {id(p): 0.3 if p.dim() > 1 and id(p) in inside else 0.0 for p in model.parameters()}


def test_the_whole_gradient_is_clipped_and_its_norm_before_that_returned():
    model = torch.nn.ParameterList([torch.zeros(2), torch.zeros(3, 1)])
    optimiser = torch.optim.SGD(model.parameters(), lr=9.0)
    model[0].grad, model[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([[0.0], [4.0], [12.0]])
    assert clipped_step(model, optimiser, 0.5, 6.5, "here") == pytest.approx(13)
    assert model[0].tolist() == pytest.approx([-0.75, 0]) and model[1].flatten().tolist() == pytest.approx([0, -1, -3])
    assert model[0].grad is None
    model[0].grad, model[1].grad = torch.tensor([0.3, 0.0]), torch.zeros(3, 1)
    assert clipped_step(model, optimiser, 1.0, 6.5, "here") == pytest.approx(0.3)
    assert model[0].tolist() == pytest.approx([-1.05, 0])  # below the limit: untouched


def test_bf16_products_leave_weights_in_fp32_that_small_steps_still_move():
    world = replace(ALONE, dtype=torch.bfloat16)
    kind, rows, objective = task("sft", 8)
    model = loud(kind)
    before = model.trunk.norm.weight.detach().clone()
    run_fit(model, objective, rows, flags=replace(FLAGS, lr=1e-6, epochs=4, warmup=0), world=world)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert (model.trunk.norm.weight != before).float().mean() > 0.9


@pytest.mark.parametrize("name", ["sft", "rm", "dpo"])
def test_a_gradient_in_bf16_points_where_that_in_fp32_does(name):
    kind, rows, objective = task(name, 8)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = loud(kind)
        train_step(model, objective, rows, 4, replace(ALONE, dtype=dtype))
        gradients.append(flat(parameter.grad for parameter in model.parameters()))
    exact, found = gradients
    assert not torch.equal(exact, found) and torch.nn.functional.cosine_similarity(exact, found, dim=0) > 0.99
    assert float((found - exact).norm() / exact.norm()) < 0.1


def test_sft_learns_its_demonstrations_by_heart_and_where_they_end():
    """Masks, shift, end token, cache: a mistake in any of them, and greedy decoding does not give the very rows back."""
    rows = [row for row in ragged_rows(12) if row.response[-1] == EOS]
    objective = sft_objective(PAD, CPU, include_prompt=False)
    model = loud(LanguageModel)
    run_fit(model, objective, rows, flags=replace(FLAGS, lr=1e-2, epochs=40, batch_size=9, validations=1))
    found = generate(model, [row.prompt for row in rows], max_new_tokens=20, eos_id=EOS, pad_id=PAD)
    assert found.ended.all()
    assert [tuple(tokens[mask].tolist()) for tokens, mask in zip(found.tokens, found.response_mask, strict=True)] == [row.response for row in rows]
