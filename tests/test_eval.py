"""eval.py on hand-made run folders: small random models, a real world, real manifests; no training."""

import json
import math
import shutil
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import copy_of

from data.batches import Row, encode_pairs
from data.errors import CheckpointError, UsageError
from data.files import model_digest, read_json, write_json
from data.prepare import DataFlags, WorldFlags, load_pairs, prepare_data
from data.report import preference_numbers, report_text, wins
from data.run import begin_stage, finish_stage
from data.synthetic import best_response, kind, true_reward
from data.tokenizer import Tokenizer, train_tokenizer
from eval import answer_prompt, compare_run, main
from model import answers
from model.answers import EvalFlags, Question, Setting, pick_questions
from model.checkpoint import save_model
from model.heads import LanguageModel, ScalarModel
from model.parallel import World, exit_code
from model.score import sequence_kls
from model.stage import Text
from model.transformer import ModelConfig, initialise

ALONE = World(0, 1, torch.device("cpu"), torch.float32, "ddp")
CONFIG = ModelConfig(vocab_size=340, width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, context=200)
TEXTS = [string.ascii_letters, "Human: Name three hot drinks, please. Assistant: Try tea, cocoa and coffee."]
LIMITS = {"max_prompt": 150, "max_response": 10}


def tiny(seed: int, kind=LanguageModel, loudness: float = 8.0):
    """A model whose random logits are large enough for models to differ."""
    model = kind(CONFIG)
    initialise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(loudness if parameter.dim() > 1 else 1.0)
    return model.eval()


def save_stage(run: Path, name: str, model, parents: dict, **config) -> None:
    begin_stage(run / name, {}, parents)
    save_model(model, run / name, special_ids={"bos_id": 1, "eos_id": 2, "pad_id": 3}, is_main=True)
    write_json(run / name / "config.json", read_json(run / name / "config.json") | config)
    shutil.copy(run / "tokenizer" / "tokenizer.model", run / name)
    finish_stage(run / name, name, {})


def make_run(run: Path, data: str) -> Path:
    prepare_data(run / "data", DataFlags(data=data, **LIMITS), WorldFlags(pairs=60, test_prompts=24), [], 0)
    begin_stage(run / "tokenizer", {}, {"data": run / "data"})
    train_tokenizer(TEXTS, run / "tokenizer" / "tokenizer.model", CONFIG.vocab_size)
    finish_stage(run / "tokenizer", "tokenizer", {})
    save_stage(run, "sft", tiny(1), {"tokenizer": run / "tokenizer"})
    save_stage(run, "rm", tiny(2, ScalarModel), {"init": run / "sft"}, score_mean=0.5, score_std=2.0)
    save_stage(run, "dpo", tiny(3), {"init": run / "sft", "ref": run / "sft"})
    save_stage(run, "ppo", tiny(4), {"init": run / "dpo", "ref": run / "dpo", "rm": run / "rm"})
    return run


@pytest.fixture(scope="module")
def world_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("world"), "advice")


@pytest.fixture(scope="module")
def report(world_run) -> dict:
    compare_run(world_run, ALONE, EvalFlags())
    return read_json(world_run / "eval" / "report.json")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    """Pairs from a file: no world, nothing but the reward model can judge."""
    folder = tmp_path_factory.mktemp("plain")
    rows = [{"prompt": f"Say {n} words.", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(80)]
    rows += [row | {"chosen": "oh " + row["chosen"]} for row in rows]  # two comparisons of each prompt
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_run(folder / "run", f"jsonl:{folder / 'rows.jsonl'}")


def setting(run: Path, **flags) -> Setting:
    path = run / "tokenizer" / "tokenizer.model"
    return Setting(Text(Tokenizer(path), path, **LIMITS), ALONE, EvalFlags(**flags))


# ---- the numbers


def test_a_given_text_is_judged_as_far_as_a_model_could_write(plain_run, world_run):
    """By people and by the reward model alike; a true reward reads it whole."""
    text, question = " " + "word " * 200, Question("Say 3 words.", "", (1, 5))
    cut = setting(plain_run).written([text], [question])
    assert len(cut.rows[0].response) == LIMITS["max_response"] and text.startswith(cut.texts[0]) and len(cut.texts[0]) < len(text)
    assert setting(plain_run).written([" short"], [question]).texts == [" short"]
    assert replace(setting(world_run), world_name="advice").written([text], [question]).texts == [text]


def test_wins_and_ties_by_hand():
    mine, theirs = np.array([1.0, 0.3, -2.0, 0.1 + 0.2]), np.array([0.5, 0.3, -1.0, 0.3])
    assert wins(mine, theirs).tolist() == [1.0, 0.5, 0.0, 0.5]
    assert wins(theirs, mine).tolist() == [0.0, 0.5, 1.0, 0.5]


def test_exact_kl_is_the_sum_over_response_positions_and_vocabulary(monkeypatch):
    """Against one forward pass per row without padding, and sums written out in float64; also in pieces of a few positions."""
    model, ref = tiny(1), tiny(2)
    rows = [Row("", (1, 7, 9, 11), (20, 21, 2)), Row("", (1, 5), (30, 31, 32, 33, 34)), Row("", (1, 8, 8, 8, 8, 8), (2,))]
    expected = []
    for row in rows:
        ids = torch.tensor([row.prompt + row.response])
        own, other = (m(ids)[0].double() for m in (model, ref))
        total = 0.0
        for position in range(len(row.prompt) - 1, row.length - 1):  # the logits there are about the next token
            p, q = ([math.exp(x) for x in logits[position].tolist()] for logits in (own, other))
            total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        expected.append(total)
    assert min(expected) > 0.1
    assert sequence_kls(model, [ref], rows, 3, ALONE)[:, 0] == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("model.score.LOGITS", 2 * CONFIG.vocab_size)
    assert sequence_kls(model, [model, ref], rows, 3, ALONE, batch=2)[:, 1] == pytest.approx(expected, rel=1e-4)


def test_kl_of_a_model_to_itself_is_zero():
    rows = [Row("", (1, 7, 9), (20, 21, 2)), Row("", (1, 5), (30, 31))]
    assert sequence_kls(tiny(1), [tiny(1)], rows, 3, ALONE).tolist() == [[0.0], [0.0]]


def test_which_prompts_are_answered_does_not_depend_on_the_order_of_the_file(plain_run):
    pairs, three = load_pairs(plain_run / "data", "test"), setting(plain_run, prompts=3)
    picked = [question.prompt for question in pick_questions(pairs, three)[0]]
    assert picked == [question.prompt for question in pick_questions(pairs[::-1], three)[0]]
    assert len(set(picked)) == 3 and picked != [pair.prompt for pair in pairs[:3]]


def test_prompts_that_do_not_fit_are_counted(world_run, report, monkeypatch):
    """Once each, though a prompt may have several pairs."""
    pairs, here = load_pairs(world_run / "data", "test"), setting(world_run, prompts=5)
    prompts, plain = sorted({pair.prompt for pair in pairs}), answers.encode_prompt
    monkeypatch.setattr(answers, "encode_prompt", lambda prompt, *rest: ((), True) if prompt in prompts[:7] else plain(prompt, *rest))
    asked, left_out = pick_questions([*pairs, *pairs], here)
    assert len(asked) == 5 and left_out == 7 and not {question.prompt for question in asked} & set(prompts[:7])
    assert report["left_out"] == 0 and "cannot be shortened" not in report_text(report)
    assert "prompts of advice (7 others are longer than --max-prompt and cannot be shortened), answers" in report_text(report | {"left_out": 7})


def test_a_models_control_characters_do_not_reach_the_terminal(report):
    shown = report["samples"][0]
    broken = shown | {"responses": {"sft": shown["responses"]["sft"] | {"text": "a\x1b[2Jb\x00\tc\nd\r\x9bé"}}}
    assert "a\\x1b[2Jb\\x00\tc\n  d\\x0d\\x9bé" in report_text(report | {"samples": [broken]})


def test_an_answer_depends_on_seed_and_prompt_alone(world_run):
    """Not on the batch, nor on which other prompts are asked."""
    asked, _ = pick_questions(load_pairs(world_run / "data", "test"), setting(world_run, prompts=8))

    def answer(questions, **flags):
        return setting(world_run, **flags).answer(tiny(1), questions, "", greedy=False, temperature=1.0)

    all_at_once, in_parts, turned = answer(asked), answer(asked, batch=3), answer(asked[4:][::-1], batch=1)
    assert all_at_once.texts == in_parts.texts
    assert turned.texts == all_at_once.texts[4:][::-1]
    assert [row.prompt for row in turned.rows] == [question.ids for question in asked[4:][::-1]]
    assert answer(asked, seed=1).texts != all_at_once.texts


# ---- the report


def test_report_in_a_world(report, world_run):
    """True rewards, normalised scores, and what the rows of reference points must show."""
    rows = report["rows"]
    assert list(rows) == ["chosen", "best", "sft", "dpo", "ppo"] and report["wins_judged_by"] == "true reward" and report["prompts"] == 24
    pairs = load_pairs(world_run / "data", "test")
    chosen = [true_reward("advice", pair.prompt, pair.chosen) for pair in pairs]
    best = [true_reward("advice", pair.prompt, best_response("advice", pair.prompt)) for pair in pairs]
    assert rows["chosen"]["true_reward"]["mean"] == pytest.approx(np.mean(chosen))
    assert rows["best"]["true_reward"]["mean"] == pytest.approx(np.mean(best))
    won = sum(1.0 if b > c + 1e-9 else 0.5 for b, c in zip(best, chosen, strict=True)) / len(pairs)  # nothing beats the best
    assert rows["best"]["wins_against_chosen"]["mean"] == pytest.approx(won)
    assert rows["best"]["wins_against_sft"]["mean"] == 1.0 and rows["best"]["way_to_best"] == 1.0 and rows["sft"]["way_to_best"] == 0.0
    assert rows["best"]["well_formed"]["mean"] == rows["chosen"]["well_formed"]["mean"] == 1.0
    assert rows["sft"]["well_formed"]["mean"] == 0.0  # random models write no English
    assert rows["sft"]["wins_against_sft"] is None and rows["chosen"]["wins_against_chosen"] is None
    for numbers in rows.values():
        assert numbers["score"]["mean"] == pytest.approx((numbers["score_raw"]["mean"] - 0.5) / 2.0)
        assert 1 <= numbers["tokens"]["mean"] <= 10
    assert (rows["dpo"]["reference"], rows["ppo"]["reference"], rows["sft"]["reference"]) == ("sft", "dpo", None)
    assert rows["dpo"]["kl_ref"] == rows["dpo"]["kl_sft"] and rows["ppo"]["kl_ref"] != rows["ppo"]["kl_sft"]
    assert rows["sft"]["kl_sft"]["mean"] == 0.0 and rows["dpo"]["kl_sft"]["mean"] > 0.5
    assert len(report["samples"]) == 3 and list(report["samples"][0]["responses"]) == list(rows)


def test_true_reward_by_kind_of_prompt(report, world_run):
    pairs = load_pairs(world_run / "data", "test")
    table = report["rows"]["chosen"]["true_reward_by_kind"]
    assert len(table) >= 4 and sum(value["n"] for value in table.values()) == 24
    for name, value in table.items():
        rewards = [true_reward("advice", pair.prompt, pair.chosen) for pair in pairs if kind("advice", pair.prompt) == name]
        assert value["n"] == len(rewards) and value["mean"] == pytest.approx(np.mean(rewards))
    assert f"| {name} (n = {value['n']}) | {value['mean']:.2f}" in report_text(report)


def test_same_seed_same_report_whatever_the_batch(report, world_run):
    before = (world_run / "eval" / "report.json").read_bytes()
    text = compare_run(world_run, ALONE, EvalFlags())
    assert (world_run / "eval" / "report.json").read_bytes() == before
    assert (world_run / "eval" / "report.md").read_text() == text == report_text(report)
    compare_run(world_run, ALONE, EvalFlags(seed=1, models="ppo,sft", prompts=5))
    other = read_json(world_run / "eval" / "report.json")
    assert list(other["rows"]) == ["chosen", "best", "sft", "ppo"] and other["rows"]["ppo"]["tokens"]["n"] == 5
    assert [sample["prompt"] for sample in other["samples"]] == [sample["prompt"] for sample in report["samples"]]
    first, second = (found["samples"][0]["responses"]["ppo"]["text"] for found in (report, other))
    assert first != second


def test_kl_is_on_samples_at_temperature_one_however_answers_are_decoded(report, world_run):
    for flags in (EvalFlags(greedy=True), EvalFlags(temperature=0.1)):
        compare_run(world_run, ALONE, flags)
        other = read_json(world_run / "eval" / "report.json")["rows"]
        for name in ("dpo", "ppo"):
            assert other[name]["kl_ref"]["mean"] == pytest.approx(report["rows"][name]["kl_ref"]["mean"], rel=1e-5)
        assert other["dpo"]["score_raw"]["mean"] != pytest.approx(report["rows"]["dpo"]["score_raw"]["mean"], rel=1e-3)


def test_validation_has_a_report_of_its_own(report, world_run):
    text = compare_run(world_run, ALONE, EvalFlags(part="validation", distances=False))
    assert (world_run / "eval" / "report-validation.md").read_text() == text and " validation prompts of advice" in text and "On the validation pairs'" in text
    assert read_json(world_run / "eval" / "report-validation.json")["part"] == "validation"


def test_the_pairs_that_are_looked_at_are_those_of_the_answered_prompts(plain_run):
    compare_run(plain_run, ALONE, EvalFlags(models="dpo", prompts=3))
    row = read_json(plain_run / "eval" / "report.json")["rows"]["dpo"]
    assert row["tokens"]["n"] == 3 and row["ranking_accuracy"]["n"] == 6  # two pairs of each prompt


def test_models_are_at_hand_whatever_training_did_with_its_own(plain_run, monkeypatch):
    worlds, load = [], Setting.load
    monkeypatch.setattr(Setting, "load", lambda self, *args: worlds.append(self.world) or load(self, *args))
    compare_run(plain_run, replace(ALONE, rank=1, size=2, parallel="fsdp", offload=True), EvalFlags(models="dpo"))
    assert set(worlds) == {ALONE}


def test_without_distances_answers_are_worth_the_same(report, world_run):
    compare_run(world_run, ALONE, EvalFlags(distances=False))
    rows = read_json(world_run / "eval" / "report.json")["rows"]
    for name in ("sft", "dpo", "ppo"):
        measured = {"kl_sft", "kl_ref", "reference", "chosen_shift", "rejected_shift", "ranking_accuracy", "idealised_ranking_accuracy"}
        assert rows[name] == {key: value for key, value in report["rows"][name].items() if key not in measured}


def test_the_policy_that_dpo_aims_at_follows_the_labels_that_it_learns_from(world_run, tmp_path, monkeypatch):
    """Noisier labels ask for smaller differences: log-odds of a label as drawn, temperature, bias and flips included, over beta."""
    run, aims = copy_of(world_run, tmp_path / "run"), []
    noise = {"label_temperature": 2.0, "annotator_bias": 0.5, "flip_rate": 0.2}
    for stage, flags in (("data", noise), ("dpo", {"loss": "dpo", "beta": 0.25, "chosen_weight": 0.0, "label_smoothing": 0.0})):
        path = run / stage / "manifest.json"
        described = read_json(path)
        write_json(path, described | {"flags": described["flags"] | flags})
    monkeypatch.setattr(answers, "preference_numbers", lambda logps, ref_logps, ideal: aims.append(ideal) or preference_numbers(logps, ref_logps, ideal))
    digests, pairs = {name: model_digest(run / name) for name in ("sft", "dpo")}, load_pairs(run / "data", "test")
    found = answers.pair_preferences(run, digests, [Question(pair.prompt, "", ()) for pair in pairs], replace(setting(run), world_name="advice"))
    odds = []
    kept = {row.id for row in encode_pairs(pairs, setting(run).text.tokenizer, *LIMITS.values())[0]}  # others are equal once cut
    for pair in (pair for pair in pairs if pair.id in kept):
        drive = true_reward("advice", pair.prompt, pair.chosen) - true_reward("advice", pair.prompt, pair.rejected)
        p = 1 / (1 + math.exp(-(drive + 0.05 * (len(pair.chosen.split()) - len(pair.rejected.split()))) / 2))
        odds.append(math.log((0.8 * p + 0.2 * (1 - p)) / (0.2 * p + 0.8 * (1 - p))) / 0.25)
    assert aims[0] is None and aims[1].tolist() == pytest.approx(odds) and "idealised_ranking_accuracy" in found["dpo"]


def test_without_a_world_the_reward_model_judges(plain_run):
    compare_run(plain_run, ALONE, EvalFlags(models="dpo"))
    found = read_json(plain_run / "eval" / "report.json")
    assert list(found["rows"]) == ["chosen", "dpo"] and found["wins_judged_by"] == "reward model" and found["world"] is None
    assert not {"true_reward", "well_formed", "idealised_ranking_accuracy"} & set(found["rows"]["dpo"])  # an optimum needs to know how likely labels are
    assert "ideal" not in (plain_run / "eval" / "report.md").read_text()
    prompts = {pair.prompt for pair in load_pairs(plain_run / "data", "test")}
    assert found["prompts"] == len(prompts) == len(load_pairs(plain_run / "data", "test")) / 2  # each prompt is answered once
    assert found["rows"]["dpo"]["wins_against_sft"]["n"] == len(prompts)


def test_a_copy_of_sft_ties_with_it_everywhere(plain_run, tmp_path):
    """The same weights give the same answers, to be scored alike: half of each win, and no KL."""
    run = copy_of(plain_run, tmp_path / "run", "dpo", "ppo")
    save_stage(run, "dpo", tiny(1), {"ref": run / "sft"})
    compare_run(run, ALONE, EvalFlags(batch=2))
    row = read_json(run / "eval" / "report.json")["rows"]["dpo"]
    assert row["wins_against_sft"]["mean"] == 0.5 and row["wins_against_sft"]["ties"] == row["wins_against_sft"]["n"]
    assert row["kl_sft"]["mean"] == row["kl_ref"]["mean"] == 0.0


def test_a_run_that_was_moved_finds_its_references(plain_run, tmp_path):
    run = copy_of(plain_run, tmp_path / "run")
    for name in ("dpo", "ppo"):
        manifest = read_json(run / name / "manifest.json")
        manifest["parents"]["ref"]["path"] = str(tmp_path / "where-it-was" / manifest["parents"]["ref"]["path"].rsplit("/", 1)[1])
        write_json(run / name / "manifest.json", manifest)
    compare_run(run, ALONE, EvalFlags(models="dpo"))
    assert read_json(run / "eval" / "report.json")["rows"]["dpo"]["reference"] == "sft"
    with pytest.raises(CheckpointError, match="is gone or was made anew"):  # dpo's manifest has changed since ppo was trained
        compare_run(run, ALONE, EvalFlags())


def test_a_model_of_another_reference_is_named(plain_run, tmp_path, capsys):
    """As in a copy of a run where DPO was trained anew and PPO was not."""
    run = copy_of(plain_run, tmp_path / "run", "dpo")
    compare_run(copy_of(plain_run, tmp_path / "same"), ALONE, EvalFlags())
    assert "careful" not in capsys.readouterr().out
    save_stage(run, "dpo", tiny(5), {"init": run / "sft", "ref": run / "sft"})
    compare_run(run, ALONE, EvalFlags())
    assert capsys.readouterr().out.count(f"careful: ppo was trained with a reference that is not of this run, {plain_run / 'dpo'}\n") == 1


def test_a_snapshot_as_reference_is_found_in_a_run_that_was_moved(plain_run, tmp_path):
    before = copy_of(plain_run, tmp_path / "before", "ppo")
    snapshot = shutil.copytree(before / "dpo", before / "dpo" / "snapshot-00004", ignore=shutil.ignore_patterns("manifest.json"))
    save_stage(before, "ppo", tiny(5), {"ref": snapshot})
    run = before.rename(tmp_path / "run")
    compare_run(run, ALONE, EvalFlags(models="ppo"))
    row = read_json(run / "eval" / "report.json")["rows"]["ppo"]
    assert row["reference"] == "snapshot-00004" and row["kl_ref"]["mean"] > 0


def test_snapshots_are_compared_like_models(plain_run, tmp_path):
    """A snapshot has the reference of its stage; its name may be a pattern."""
    run = copy_of(plain_run, tmp_path / "run", "ppo")
    begin_stage(run / "ppo", {}, {"ref": run / "dpo"})
    for step, seed in (("00002", 1), ("00001", 3)):
        shutil.copytree(run / {1: "sft", 3: "dpo"}[seed], run / "ppo" / f"snapshot-{step}", ignore=shutil.ignore_patterns("manifest.json"))
    save_model(tiny(4), run / "ppo", special_ids={"bos_id": 1, "eos_id": 2, "pad_id": 3}, is_main=True)
    shutil.copy(run / "tokenizer" / "tokenizer.model", run / "ppo")
    finish_stage(run / "ppo", "ppo", {})
    compare_run(run, ALONE, EvalFlags(models="ppo/snapshot-*,ppo"))
    rows = read_json(run / "eval" / "report.json")["rows"]
    assert list(rows) == ["chosen", "ppo/snapshot-00001", "ppo/snapshot-00002", "ppo"]
    assert rows["ppo/snapshot-00002"]["kl_sft"]["mean"] == 0.0 and rows["ppo/snapshot-00002"]["wins_against_sft"]["mean"] == 0.5
    assert rows["ppo/snapshot-00001"]["kl_ref"]["mean"] == 0.0 and rows["ppo"]["reference"] == "dpo" and rows["ppo"]["kl_ref"]["mean"] > 0


def test_the_same_weights_answer_once(plain_run, tmp_path, monkeypatch):
    """A stage's best weights are those of one of its snapshots; with another reference they are another row."""
    run, asked, answer = copy_of(plain_run, tmp_path / "run"), [], Setting.answer
    shutil.copytree(run / "ppo", run / "ppo" / "snapshot-00001", ignore=shutil.ignore_patterns("manifest.json"))
    monkeypatch.setattr(Setting, "answer", lambda self, model, questions, title, **how: (asked.append(title), answer(self, model, questions, title, **how))[1])
    compare_run(run, ALONE, EvalFlags(models="dpo,ppo,ppo/snapshot-*"))
    rows = read_json(run / "eval" / "report.json")["rows"]
    assert asked == ["sft", "dpo", "ppo"] and rows["ppo/snapshot-00001"] == rows["ppo"]
    run = copy_of(plain_run, tmp_path / "unmoved", "dpo", "ppo")
    save_stage(run, "dpo", tiny(1), {"init": run / "sft", "ref": run / "sft"})
    compare_run(run, ALONE, EvalFlags(models="dpo"))
    assert asked[3:] == ["sft", "dpo"] and read_json(run / "eval" / "report.json")["rows"]["dpo"]["reference"] == "sft"


# ---- refusals


def test_refusals_say_what_to_do(world_run, tmp_path, capsys, monkeypatch):
    def refused(*arguments: str) -> str:
        assert exit_code(main, arguments) == 2
        output = capsys.readouterr()
        assert output.out == "" and "Traceback" not in output.err
        return output.err

    run = str(world_run)
    assert "python train.py --stage mpo" in refused("--run", str(tmp_path / "nowhere"))
    assert "no model 'grpo' in" in (error := refused("--run", run, "--models", "sft,grpo")) and "there are sft, dpo, ppo" in error
    assert "no model 'rm' in" in refused("--run", run, "--models", "rm")
    assert f"no model '{run}/sft' in" in refused("--run", run, "--models", f"{run}/sft")
    critic = shutil.copytree(world_run / "rm", copy_of(world_run, tmp_path / "run") / "ppo" / "critic")
    for pattern in ("ppo/critic", "ppo/*"):  # a critic answers nothing
        assert "there are sft, dpo, ppo\n" in refused("--run", str(critic.parent.parent), "--models", pattern)
    assert f"make some with: python train.py --stage ablations --out {tmp_path}/grid\n" in refused("--compare", f"{tmp_path}/grid")
    assert "give either --run" in refused() and "give either --run" in refused("--run", run, "--model", run)
    assert "--prompt: is not read with --run" in refused("--run", run, "--prompt", "Hi")
    assert "--best-of 4,x: give whole numbers" in refused("--run", run, "--best-of", "4,x")
    assert "--best-of 1: give whole numbers of at least 2" in refused("--run", run, "--best-of", "1")
    assert "--greedy: the answers of --best-of are sampled" in refused("--run", run, "--best-of", "4", "--greedy")
    assert "--models: is not read with --model" in refused("--model", run + "/sft", "--prompt", "Hi", "--models", "sft")
    assert "no temperature" in refused("--run", run, "--greedy", "--temperature", "0.5")
    assert "--temperature 0.0: must be a positive" in refused("--run", run, "--temperature", "0")
    assert '--prompt "..."' in refused("--model", run + "/sft")
    assert "no model is there" in refused("--model", run + "/grpo", "--prompt", "Hi")
    assert f"--run {run}/ppo: is a stage of a run; give the run's folder, {run}\n" in refused("--run", run + "/ppo")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused("--run", run)


def test_a_missing_stage_names_the_command_that_makes_it(plain_run, tmp_path):
    run = copy_of(plain_run, tmp_path / "run", "ppo")
    with pytest.raises(UsageError, match="train.py --stage ppo --out"):
        compare_run(run, ALONE, EvalFlags(models="ppo"))
    shutil.rmtree(run / "rm")
    with pytest.raises(UsageError, match="train.py --stage rm --out"):
        compare_run(run, ALONE, EvalFlags())


def test_what_does_not_fit_together_is_refused(plain_run, tmp_path):
    run = copy_of(plain_run, tmp_path / "run")
    other = shutil.copytree(run / "rm", tmp_path / "other")
    described = read_json(other / "config.json")
    write_json(other / "config.json", {key: value for key, value in described.items() if key != "score_std"})
    with pytest.raises(CheckpointError, match="score_std"):
        compare_run(run, ALONE, EvalFlags(reward_model=str(other)))
    (other / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(CheckpointError, match="not the tokenizer of this run"):
        compare_run(run, ALONE, EvalFlags(reward_model=str(other)))
    with pytest.raises(CheckpointError, match="language model where a reward model"):
        compare_run(run, ALONE, EvalFlags(reward_model=str(run / "sft")))
    path = run / "tokenizer" / "tokenizer.model"
    with pytest.raises(UsageError, match=r"a context of \d+ tokens is less than --max-prompt 4000"):
        Text(Tokenizer(path), path, 4000, 48).load(run / "sft", LanguageModel)
    # a reference made anew after its model was trained, both in the recorded place and in the run
    manifest = read_json(run / "ppo" / "manifest.json")
    manifest["parents"]["ref"]["manifest"] = "0" * 64
    write_json(run / "ppo" / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="is gone or was made anew"):
        compare_run(run, ALONE, EvalFlags())


def test_broken_weights_stop_the_report(plain_run, tmp_path):
    run = copy_of(plain_run, tmp_path / "run", "dpo", "ppo")
    broken = tiny(1)
    with torch.no_grad():
        broken.trunk.norm.weight[0] = math.nan
    save_stage(run, "dpo", broken, {"ref": run / "sft"})
    with pytest.raises(CheckpointError, match="dpo: trunk.norm.weight holds numbers that are not finite"):
        compare_run(run, ALONE, EvalFlags())
    assert not (run / "eval" / "report.json").exists()
    with pytest.raises(CheckpointError, match="dpo: trunk.norm.weight holds numbers that are not finite"):
        answer_prompt(run / "dpo", "How?", False, ALONE, EvalFlags())


# ---- one answer


def test_a_prompt_is_wrapped_as_a_dialogue_where_the_run_is_about_dialogues(world_run, plain_run, tmp_path, monkeypatch):
    asked, greedy = [], EvalFlags(greedy=True)
    answer = Setting.answer

    def listen(self, model, questions, *arguments, **options):
        asked.append(questions[0].prompt)
        return answer(self, model, questions, *arguments, **options)

    monkeypatch.setattr(Setting, "answer", listen)
    answer_prompt(world_run / "sft", " Name a fruit.\n", False, ALONE, greedy)
    answer_prompt(world_run / "sft", "\n\nHuman: Hi\n\nAssistant:", False, ALONE, greedy)
    answer_prompt(world_run / "sft", "Name a fruit.", True, ALONE, greedy)
    answer_prompt(plain_run / "sft", "Name a fruit.", False, ALONE, greedy)
    run = copy_of(world_run, tmp_path / "run")
    shutil.copytree(run / "sft", run / "sft" / "snapshot-00001")
    answer_prompt(run / "sft" / "snapshot-00001", "Name a fruit.", False, ALONE, greedy)
    wrapped = "\n\nHuman: Name a fruit.\n\nAssistant:"
    assert asked == [wrapped, "\n\nHuman: Hi\n\nAssistant:", "Name a fruit.", "Name a fruit.", wrapped]
    with pytest.raises(UsageError, match="no model is there; give a model's folder"):
        answer_prompt(run, "Name a fruit.", False, ALONE, greedy)


def test_a_model_alone_has_half_of_its_context_for_the_prompt(world_run, tmp_path, capsys):
    """A Mistral's context ends at its sliding window, whatever its config says beside."""
    folder = shutil.copytree(world_run / "sft", tmp_path / "mistral")
    config = read_json(folder / "config.json")
    described = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32, "max_position_embeddings": 4096}
    write_json(folder / "config.json", config | described)
    answer_prompt(folder, "fruits " * 99, True, ALONE, EvalFlags(greedy=True))
    assert "the prompt was shortened to 16 tokens" in capsys.readouterr().err


def test_one_answer_from_the_command_line(world_run, capsys):
    command = ["--model", str(world_run / "sft"), "--prompt", "Name three fruits.", "--seed", "3"]
    assert exit_code(main, command) == 0
    first = capsys.readouterr().out
    assert exit_code(main, command) == 0
    assert first == capsys.readouterr().out and first.strip()
    with pytest.raises(UsageError, match="unrecognized arguments: --beta 1"):
        main(["--run", str(world_run), "--beta", "1"])
