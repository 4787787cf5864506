"""train.py as a user calls it: the chain, each stage alone, the method's ablations, repeatability, and commands that are refused."""

import dataclasses
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from runs import BUDGETS, STAGES, TINY, TRAINED, WORLD, copy_of, here, manifest, metrics, sha256, snapshot, steps
from safetensors.torch import load_file, save_file

import data.advice
import data.digest
import data.synthetic
import eval as evaluation
import model.answers
from data.batches import encode_pairs, encode_prompt, stable_hash
from data.errors import DataError, UsageError
from data.grid import GridFlags
from data.prepare import DataFlags, WorldFlags, load_pairs
from data.split import read_split
from data.tokenizer import Tokenizer, train_tokenizer
from losses.dpo import PREFERENCE_LOSSES
from model import parallel
from model.answers import EvalFlags
from model.checkpoint import load_model
from model.heads import LanguageModel, ScalarModel
from model.offline import TokenizerFlags, dpo_stage, tokenizers_place
from model.parallel import DeviceFlags, World
from model.plan import PlanFlags
from model.resume import LoopFlags
from model.score import reference_logps
from model.stage import Run, RunFlags, Text, validation_prompts
from train import STAGE_FLAGS, check_loss_names

ALONE = World(0, 1, torch.device("cpu"), torch.float32, "ddp")


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


# ---- the chain


def test_the_chain_makes_every_stage_and_the_comparison(chain):
    for stage in STAGES:
        made = manifest(chain / stage)
        assert made["stage"] == stage
        listed = {name: digest for name, digest in snapshot(chain / stage).items() if name != "manifest.json"}
        assert made["files"] == listed
    assert not list(chain.rglob("*.tmp"))
    report = json.loads((chain / "eval" / "report.json").read_text())
    assert {"sft", "dpo", "ppo"} <= set(json.dumps(report).replace('"', " ").split())
    output = (chain.parent / "output.txt").read_text()
    assert output.index("[sft]") < output.index("[rm]") < output.index("[ppo]") < output.index("wins against SFT") < output.index("next: python eval.py")


def test_metrics_have_one_line_per_step_without_gaps(chain):
    rows = {"sft": len(load_pairs(chain / "data", "train")), "dpo": len(ids(chain / "split" / "easy.jsonl"))}
    expected = {"sft": -(-rows["sft"] // 8), "dpo": max(1, round(0.5 * -(-rows["dpo"] // 16))), "ppo": 2}
    for stage in TRAINED:
        folders = [chain / stage, *sorted((chain / stage).glob("fold-*"))]
        assert len(folders) == (3 if stage == "rm" else 1)
        for folder in folders:
            lines = metrics(folder)
            training = [line for line in lines if not any(name.startswith("valid_") for name in line)]
            assert training == steps(folder) and [line["step"] for line in training] == list(range(len(training)))
            assert all(set(line) == set(training[0]) for line in training)
            validation = [line["step"] for line in lines if line not in training]
            assert validation and validation == sorted(set(validation)) and validation[-1] == len(training) - 1
            assert all(math.isfinite(value) for line in lines for value in line.values())
            assert len(training) == expected.get(stage, len(training))
            assert all("time" in line for line in metrics(folder, timeless=False))


def test_first_numbers_are_the_ones_that_theory_demands(chain):
    assert steps(chain / "rm")[0]["loss"] == pytest.approx(math.log(2), rel=0.05)
    assert steps(chain / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps(chain / "ppo")[0]["kl_ref_seq"] == pytest.approx(0, abs=1e-5)


def test_the_parts_share_no_prompt(chain):
    parts = [{pair.prompt for pair in load_pairs(chain / "data", part)} for part in ("train", "validation", "test")]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    prompt_of = {pair.id: pair.prompt for pair in load_pairs(chain / "data", "train")}
    easy, difficult = ({prompt_of[row] for row in ids(chain / "split" / f"{half}.jsonl")} for half in ("easy", "difficult"))
    assert easy and difficult and not easy & difficult


def test_the_reference_of_ppo_is_the_dpo_model(chain):
    """By digests that do not come from the program: ppo -> manifest of dpo -> weights of dpo."""
    parents = manifest(chain / "ppo")["parents"]
    assert list(parents["ref"].values()) == list(parents["init"].values())
    assert sha256(chain / "dpo" / "manifest.json") in parents["ref"].values()
    assert manifest(chain / "dpo")["files"]["model.safetensors"] == sha256(chain / "dpo" / "model.safetensors")
    assert sha256(chain / "sft" / "manifest.json") in manifest(chain / "dpo")["parents"]["ref"].values()
    assert sha256(chain / "rm" / "manifest.json") in parents["rm"].values()


def test_sft_loss_measured_by_the_dpo_loader_is_the_sft_validation_loss(chain):
    """One BOS, one EOS, one boundary in both loaders: else the loss would jump where the stages meet."""
    tokenizer = Tokenizer(chain / "tokenizer" / "tokenizer.model")
    pairs = list({(pair.prompt, pair.chosen): pair for pair in load_pairs(chain / "data", "validation")}.values())
    rows, counts = encode_pairs(pairs, tokenizer, 160, 24)
    assert len(rows) == len(pairs), counts
    logps = reference_logps(load_model(chain / "sft", LanguageModel), rows, tokenizer.pad_id, ALONE)[:, 0]
    loss = -logps.sum() / sum(len(row.chosen.response) for row in rows)
    assert loss == pytest.approx(manifest(chain / "sft")["results"]["loss"], abs=1e-5)
    assert all(row.chosen.prompt.count(tokenizer.bos_id) == 1 and tokenizer.bos_id not in row.chosen.response for row in rows)


# ---- repeatability


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The chain's command once more, in another folder and in this process."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    here("--stage", "mpo", "--out", folder, *WORLD, *TINY)
    return folder


def test_the_same_seed_gives_the_same_files(chain, twin):
    """Bytes of every file, but for the run's own path, times, and what is a digest of these."""

    def contents(run):
        return {name: (run / name).read_bytes().replace(str(run).encode(), b"RUN") for name in snapshot(run)}

    first, second = contents(chain), contents(twin)
    assert set(first) == set(second)
    differing = {name for name in first if first[name] != second[name]}
    assert not {name for name in differing if not name.endswith(("manifest.json", "flags.json", "metrics.jsonl", "report.json"))}
    for folder in ("sft", "rm", "rm/fold-0", "rm/fold-1", "dpo", "ppo"):
        assert f"{folder}/model.safetensors" in first
        if folder != "rm":
            assert metrics(chain / folder) == metrics(twin / folder), folder
    for stage in TRAINED:
        assert manifest(chain / stage)["results"] == manifest(twin / stage)["results"]


def test_another_seed_gives_other_data_and_weights(chain, tmp_path):
    run = tmp_path / "run"
    here("--stage", "tokenizer", "--out", run, *WORLD, "--seed", 1)
    here("--stage", "sft", "--out", run, *BUDGETS["sft"], "--seed", 1)
    for name in ("data/train.jsonl", "sft/model.safetensors"):
        assert sha256(run / name) != sha256(chain / name), name
    assert sha256(run / "data/world/test.jsonl") == sha256(chain / "data/world/test.jsonl")  # every run is measured on the same prompts


def test_a_finished_chain_is_skipped_and_another_setting_refused(twin):
    """Finished with the same key: nothing is made again. With another one: the difference is shown, and nothing is touched."""
    before = {name: digest for name, digest in snapshot(twin).items() if not name.startswith("eval/")}
    output = here("--stage", "mpo", "--out", twin, *WORLD, *TINY)
    assert output.count("finished already") == len(STAGES)
    other = here("--stage", "mpo", "--out", twin, *WORLD, *TINY, "--dpo-beta", 0.7, expect=2)
    assert "beta" in other and "0.7" in other and "--out" in other
    assert {name: digest for name, digest in snapshot(twin).items() if not name.startswith("eval/")} == before


def test_quick_runs_the_other_world_as_well(tmp_path):
    flags = ["--pairs", 150, "--test-prompts", 8, "--max-prompt", 100, "--max-response", 24, *TINY, "--sft-epochs", 0.5]
    output = here("--stage", "mpo", "--quick", "--data", "digest", "--out", tmp_path / "run", *flags)
    assert "wins against SFT" in output and "TL;DR:" in output
    assert manifest(tmp_path / "run" / "ppo")["stage"] == "ppo"
    assert "was made under --quick" in here("--stage", "mpo", "--out", tmp_path / "run", expect=2)


def test_quick_makes_as_many_pairs_as_are_typed(tmp_path):
    for typed, count in (([], 400), (["--pairs", 450], 450)):
        here("--stage", "tokenizer", "--quick", "--out", tmp_path / str(count), *typed, "--vocab-size", 400)
        assert sum(len(load_pairs(tmp_path / str(count) / "data", part)) for part in ("train", "validation")) == count


# ---- the true reward is out of reach


def test_no_stage_touches_the_true_reward(chain, tmp_path, monkeypatch):
    """The chain on the written files, with everything that knows the true reward raising."""

    def out_of_reach(*_, **__):
        raise AssertionError("a stage asked for the true reward")

    for module in (data.synthetic, data.advice, data.digest, model.answers, evaluation):
        for name in ("true_reward", "reward_terms", "well_formed", "best_response", "draw_rows", "write_response"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, out_of_reach)
    with pytest.raises(AssertionError):
        data.synthetic.true_reward("advice", "a", "b")
    world = chain / "data" / "world"
    specs = ["--data", f"hh:{world}/train.jsonl", "--test-data", f"hh:{world}/test.jsonl", "--max-response", 24, "--validation-share", 0.05]
    here("--stage", "tokenizer", "--out", tmp_path / "files", *specs)
    run = copy_of(chain, tmp_path / "run", *STAGES)  # with its data: of files, other prompts are held out than of the world
    for stage in STAGES:
        here("--stage", stage, "--out", run, *BUDGETS.get(stage, ()))
    assert sha256(run / "ppo/model.safetensors") == sha256(chain / "ppo/model.safetensors")  # and nothing else is different


# ---- one stage at a time, and the ablations that the method's claim rests on


@pytest.mark.parametrize("part", ["all", "difficult"])
def test_dpo_on_another_part(chain, tmp_path, part):
    """And all pairs need neither a split nor a reward model."""
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo", *(("rm", "split") if part == "all" else ()))
    output = here("--stage", "dpo", "--out", run, "--part", part, *BUDGETS["dpo"])
    expected = len(ids(run / "split" / "difficult.jsonl") if part == "difficult" else load_pairs(run / "data", "train"))
    assert f" {expected} pairs" in output
    assert manifest(run / "dpo")["flags"]["part"] == part
    assert sha256(run / "dpo" / "model.safetensors") != sha256(chain / "dpo" / "model.safetensors")


def test_the_split_by_other_rules(chain, tmp_path):
    everything = sorted(ids(chain / "rm" / "scores.jsonl"))
    default = {half: ids(chain / "split" / f"{half}.jsonl") for half in ("easy", "difficult")}
    gaps = {line["id"]: line["chosen"] - line["rejected"] for line in map(json.loads, (chain / "rm/scores.jsonl").read_text().splitlines())}
    made = {}
    for name, flags in {
        "random": ("--rule", "random"), "none": ("--rule", "none"), "threshold": ("--rule", "threshold", "--threshold", "1e-4", "--per-pair"),
    }.items():  # fmt: skip
        run = copy_of(chain, tmp_path / name, "split", "dpo", "ppo")
        here("--stage", "split", "--out", run, *flags)
        made[name] = {half: ids(run / "split" / f"{half}.jsonl") for half in ("easy", "difficult")}
    prompt_of = {pair.id: pair.prompt for pair in load_pairs(chain / "data", "train")}
    prompts = {name: {prompt_of[row] for row in halves["easy"]} for name, halves in (made | {"default": default}).items()}
    assert made["random"] != default and len(prompts["random"]) == len(prompts["default"])  # as many prompts, other ones
    assert sorted(made["none"]["easy"]) == sorted(made["none"]["difficult"]) == everything
    assert sorted(made["threshold"]["easy"]) == sorted(row for row in everything if gaps[row] >= 1e-4)


PPO = {
    "reference = SFT": (["--ref", "RUN/sft"], {"ref": "sft", "init": "dpo"}),
    "all from SFT": (["--init", "RUN/sft", "--ref", "RUN/sft"], {"ref": "sft", "init": "sft"}),
    "a critic on the trunk": (["--critic", "trunk", "--value-coef", "0.1"], {"ref": "dpo", "init": "dpo"}),
    "all prompts": (["--part", "all"], {"ref": "dpo", "init": "dpo"}),
    "other prompts": (["--prompts", "jsonl:RUN/prompts.jsonl"], {"ref": "dpo", "init": "dpo"}),
    "k2 in the loss": (["--kl-estimator", "k2", "--kl-placement", "loss"], {"ref": "dpo", "init": "dpo"}),
}


@pytest.mark.parametrize("name", PPO)
def test_ppo_ablations(chain, tmp_path, name):
    run = copy_of(chain, tmp_path / "run", "ppo")
    runs.write_rows(run / "prompts.jsonl", [{"prompt": f"Name {n} fruits."} for n in range(5)])  # fewer than one round samples
    flags, parents = PPO[name]
    output = here("--stage", "ppo", "--out", run, *BUDGETS["ppo"], *(flag.replace("RUN", str(run)) for flag in flags))
    made = manifest(run / "ppo")
    for parent, stage in parents.items():
        assert sha256(run / stage / "manifest.json") in made["parents"][parent].values()
    first = steps(run / "ppo")[0]
    if parents["ref"] != parents["init"]:
        assert abs(first["kl_ref_seq"]) > 1e-4
    else:
        assert abs(first["kl_ref_seq"]) < 1e-5
    assert (run / "ppo" / "critic" / "model.safetensors").exists() == (name != "a critic on the trunk")
    if name in ("all prompts", "other prompts"):
        train = {pair.prompt for pair in load_pairs(run / "data", "train")}
        assert f"  {5 if name == 'other prompts' else len(train)} prompts;" in output
        assert (" part=" in output) == (name == "all prompts")  # what is not read is not said
    if name != "a critic on the trunk":
        assert abs(first["explained_variance"]) > 0  # the reward model's values, where a new head begins with nothing but zeros
    # whatever the ablation, an explicit --init never moves the reference
    assert sha256(run / "dpo" / "model.safetensors") == sha256(chain / "dpo" / "model.safetensors")


def test_the_contents_of_given_files_are_part_of_the_key(chain, tmp_path):
    run, prompts, file = copy_of(chain, tmp_path / "run", *TRAINED, "split", "tokenizer"), tmp_path / "prompts.jsonl", tmp_path / "given.model"
    shutil.copy(chain / "tokenizer" / "tokenizer.model", file)
    of_file = ("--stage", "tokenizer", "--out", run, "--file", file)
    assert "made" in here(*of_file) and "is finished already" in here(*of_file)
    train_tokenizer(["some other words, and more of them"] * 9, file)
    assert "file_digest was" in here(*of_file, expect=2)
    run = copy_of(chain, tmp_path / "other", "ppo")
    runs.write_rows(prompts, [{"prompt": "Name one fruit."}])
    of_prompts = ("--stage", "ppo", "--out", run, *BUDGETS["ppo"], "--prompts", f"jsonl:{prompts}")
    assert "made" in here(*of_prompts) and "is finished already" in here(*of_prompts)
    runs.write_rows(prompts, [{"prompt": "Name two fruits."}])
    assert "prompts_digest was" in here(*of_prompts, expect=2)
    prompts.write_text('{"prompt": 1}\n')
    assert "prompts.jsonl:1" in (said := here(*of_prompts, expect=3)) and "--skip-bad-rows" not in said


def test_other_prompts_get_the_form_of_the_runs_own(chain, tmp_path, monkeypatch):
    """A plain question becomes a dialogue in `advice`, and is answered as in eval.py; what is one already stays."""
    asked = []
    monkeypatch.setattr("rl.online.encode_prompt", lambda prompt, style, *rest: (asked.append((prompt, style)), encode_prompt(prompt, style, *rest))[1])
    run, prompts = copy_of(chain, tmp_path / "run", "ppo"), tmp_path / "prompts.jsonl"
    runs.write_rows(prompts, [{"prompt": "Name one fruit."}, {"prompt": "\n\nHuman: Hi\n\nAssistant:"}])
    here("--stage", "ppo", "--out", run, *BUDGETS["ppo"], "--prompts", f"jsonl:{prompts}")
    assert asked[:2] == [("\n\nHuman: Name one fruit.\n\nAssistant:", "dialogue"), ("\n\nHuman: Hi\n\nAssistant:", "dialogue")]


def test_a_fold_without_pairs_trains_no_model(chain, tmp_path, monkeypatch):
    run = copy_of(chain, tmp_path / "run", *TRAINED[1:], "split")
    monkeypatch.setattr("model.offline.stable_hash", lambda *what: stable_hash(*what) % 2 * 2 if what[0] == "fold" else stable_hash(*what))
    here("--stage", "rm", "--out", run, *BUDGETS["rm"], "--folds", 3)
    assert sorted(path.name for path in (run / "rm").glob("fold-*")) == ["fold-0", "fold-2"]
    assert {json.loads(line)["fold"] for line in (run / "rm" / "scores.jsonl").read_text().splitlines()} == {0, 2}


def test_a_missing_stage_is_made_with_the_data_that_was_typed(chain, tmp_path):
    said = here("--stage", "sft", "--out", tmp_path / "new", "--data", "jsonl:own.jsonl", "--quick", expect=2)
    assert f"make it with: python train.py --stage tokenizer --out {tmp_path / 'new'} --data jsonl:own.jsonl --quick\n" in said
    said = here("--stage", "rm", "--out", tmp_path / "a new one", expect=2)
    assert f"make it with: python train.py --stage tokenizer --out '{tmp_path / 'a new one'}'\n" in said  # as a shell takes it
    assert f"--out {chain / 'sft'}: is a stage of a run; give the run's folder, {chain}\n" in here("--stage", "rm", "--out", chain / "sft", expect=2)


def test_limits_that_cut_much_are_told_before_anything_is_trained(tmp_path):
    said = here("--stage", "tokenizer", "--out", tmp_path / "run", *WORLD[:-4], "--max-prompt", 500, "--max-response", 5)
    assert re.search(r"warning: tokenizer: \d\d+% of responses are longer than --max-response 5 tokens .* a larger --max-response or --vocab-size\n", said)
    assert "--max-prompt" not in said
    said = here("--stage", "tokenizer", "--out", tmp_path / "short", *WORLD[:-4], "--max-prompt", 4)
    assert "warning: tokenizer: 100% of prompts are longer than --max-prompt 4 tokens and will be cut (100% cannot be and are left out with their pairs)" in said


def test_a_folder_without_a_model_is_refused_by_name(chain, tmp_path):
    """A run's folder in place of a model's, and a stage without a model: before anything begins, with a folder that would do."""
    for stage, flag in (("dpo", "--init"), ("rm", "--init"), ("ppo", "--ref"), ("sft", "--init"), ("mpo", "--init"), ("mpo", "--ppo-ref")):
        for place in (chain, chain / "data"):
            data = WORLD if stage == "mpo" else ()
            said = here("--stage", stage, "--out", tmp_path / "new", flag, place, *data, expect=2)
            assert f"{flag} {place}: no model is there; give a model's own folder, such as runs/mpo/sft" in said and not (tmp_path / "new").exists()


def test_gaps_that_are_missing_stop_a_chain_before_anything_is_trained(tmp_path):
    message = here("--stage", "mpo", "--out", tmp_path / "run", *WORLD, *TINY, "--split-gaps", "given", expect=3)
    assert 'has no "gap"' in message and [path.name for path in (tmp_path / "run").iterdir()] == ["data"]


def test_sft_can_learn_the_prompt_too(chain, tmp_path):
    """More tokens to learn: the first loss, of a model that knows nothing, is the mean over others."""
    run = copy_of(chain, tmp_path / "run", *TRAINED, "split")
    here("--stage", "sft", "--out", run, "--include-prompt", *BUDGETS["sft"])
    assert manifest(run / "sft")["flags"]["include_prompt"] and steps(run / "sft")[0]["loss"] != steps(chain / "sft")[0]["loss"]


def test_ppo_warns_of_a_reference_that_failed_its_check(chain, tmp_path):
    """DPO is stopped by its watch: the weights that it keeps are from before, its last snapshot is what failed."""
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    said = here("--stage", "dpo", "--out", run, "--epochs", 2, "--validations", 2, "--lr", 1e-2, "--max-kl", 0.5)
    assert "kl_ref_seq is " in said and "above max-kl 0.5: the policy has left the reference's language; stopped" in said
    (*_, far) = sorted((copy_of(run, tmp_path / "far", "ppo") / "dpo").glob("snapshot-*"))
    shutil.rmtree(run / "dpo")
    said = here("--stage", "dpo", "--out", run, "--init", far, *BUDGETS["dpo"], "--max-kl", 0.5, expect=2)
    assert "above max-kl 0.5, before the first step: " in said and not (run / "dpo").exists()
    here("--stage", "dpo", "--out", run, "--epochs", 2, "--validations", 2, "--lr", 1e-2, "--max-kl", 0.5)
    (*_, broken) = sorted((run / "dpo").glob("snapshot-*"))
    for ref, warned in ((run / "dpo", False), (broken, True), (run / "sft", False)):
        shutil.rmtree(run / "ppo", ignore_errors=True)
        said = here("--stage", "ppo", "--out", run, "--ref", ref, *BUDGETS["ppo"])
        assert (f"warning: ppo: the reference {ref} failed DPO's check: " in said) == warned


def test_a_split_by_gaps_that_the_data_states(chain, tmp_path, monkeypatch):
    """The same pairs, each with a gap of its own that has nothing to do with the reward model's."""
    run = copy_of(chain, tmp_path / "run", "split", "dpo", "ppo")
    gap_of = {}
    for part in ("train", "validation"):
        message = here("--stage", "split", "--out", run, "--gaps", "given", expect=3)
        assert 'has no "gap"' in message and not (run / "split").exists()
        rows = [json.loads(line) for line in (run / "data" / f"{part}.jsonl").read_text().splitlines()]
        prompts = sorted({row["prompt"] for row in rows})
        gap_of[part] = {row["id"]: (1.0 + prompts.index(row["prompt"])) / len(prompts) for row in rows}
        runs.write_rows(run / "data" / f"{part}.jsonl", [row | {"gap": gap_of[part][row["id"]]} for row in rows])
        runs.put_on_record(run)
    here("--stage", "split", "--out", run, "--gaps", "given")
    made, threshold = read_split(run / "split"), manifest(run / "split")["results"]["threshold"]
    assert min(gap_of["train"][row] for row in made["easy"]) >= max(gap_of["train"][row] for row in made["difficult"]) and not made["dropped"]
    looked_at = []
    monkeypatch.setattr("model.offline.fit", lambda model, objective, rows, validation, *more, **others: looked_at.extend(validation) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here("--stage", "dpo", "--out", run)
    assert {row.id for row in looked_at} == {row for row, gap in gap_of["validation"].items() if gap >= threshold} != set(gap_of["validation"])


def test_a_reward_model_made_in_bf16_is_kept_in_fp32(chain, tmp_path):
    """Frozen models compute with rounded copies; what is on disk is what was trained."""
    run = copy_of(chain, tmp_path / "run", *STAGES[2:])
    here("--stage", "rm", "--out", run, *BUDGETS["rm"], "--dtype", "bf16")
    assert not [*(run / "rm").rglob("snapshot-*")]  # nothing reads them, unless they are asked for
    for folder in (run / "rm", run / "rm" / "fold-0"):
        tensors = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert any((tensor != tensor.bfloat16()).any() for tensor in tensors.values())
    assert {"score_mean", "score_std"} <= json.loads((run / "rm" / "config.json").read_text()).keys()


def test_a_given_reward_model_is_taken_as_it_is(chain, tmp_path):
    """Byte for byte, with the scores that it gives to every pair, and their mean and std; another stage can go on from it."""
    run, given = copy_of(chain, tmp_path / "run", *STAGES[1:]), copy_of(chain, tmp_path / "other") / "rm" / "fold-0"
    (given / "config.json").write_text(json.dumps(json.loads((given / "config.json").read_text()) | {"score_mean": 9.0, "score_std": 9.0}))  # of other data
    here("--stage", "rm", "--out", run, "--reward-model", given)  # there is no SFT model, and none is needed
    assert sha256(run / "rm" / "model.safetensors") == sha256(given / "model.safetensors")
    assert list(manifest(run / "rm")["parents"]) == ["reward_model", "data"] and not metrics(run / "rm")
    model, text = load_model(given, ScalarModel).eval(), Tokenizer(chain / "tokenizer" / "tokenizer.model")
    rows = {row.id: row for row in encode_pairs(load_pairs(chain / "data", "train"), text, 160, 24)[0]}
    written = [json.loads(line) for line in (run / "rm" / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in written] == list(rows)
    for line in written[:3]:
        for one, score in ((rows[line["id"]].chosen, line["chosen"]), (rows[line["id"]].rejected, line["rejected"])):
            assert model(torch.tensor([one.prompt + one.response]), torch.tensor([one.length])).item() == pytest.approx(score, abs=1e-5)
    stored, chosen = json.loads((run / "rm" / "config.json").read_text()), [line["chosen"] for line in written]
    assert (stored["score_mean"], stored["score_std"]) == pytest.approx((np.mean(chosen), np.std(chosen)))
    here("--stage", "split", "--out", run)
    assert "is finished already" in here("--stage", "rm", "--out", run, "--reward-model", given)
    assert "reward_model was" in here("--stage", "rm", "--out", run, "--reward-model", chain / "rm", expect=2)
    assert "is finished already" in here("--stage", "rm", "--out", run, "--reward-model", shutil.copytree(given, tmp_path / "moved"))
    shutil.rmtree(run / "rm")
    assert "holds a language model where a reward model is needed" in here("--stage", "rm", "--out", run, "--reward-model", chain / "sft", expect=4)
    assert not (run / "rm").exists()
    here("--stage", "rm", "--out", run, "--reward-model", chain / "rm")
    shutil.copytree(chain / "sft", run / "sft")
    message = here("--stage", "dpo", "--out", run, *BUDGETS["dpo"], expect=2)
    assert "split: was made from another rm than" in message and not (run / "dpo").exists()


def test_a_chain_reads_with_the_tokenizer_of_a_given_reward_model(chain, tmp_path):
    other = copy_of(chain, tmp_path / "other") / "rm"
    (other / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes() + b"\0")
    for words, code, message in (
        (["--rm-reward-model", chain / "sft"], 4, "holds a language model where a reward model is needed"),
        (["--rm-reward-model", chain / "rm", "--tokenizer-vocab-size", 400], 2, "has its own; leave the flag out"),
        (["--rm-reward-model", other, "--init", chain / "sft", "--max-response", 24], 4, "is not the tokenizer of this run, "),
    ):
        assert message in here("--stage", "mpo", "--out", tmp_path / "run", *words, expect=code) and not (tmp_path / "run").exists()
    run = Run(tmp_path, RunFlags(), ALONE, {"rm_reward_model": str(chain / "rm")}, True, {})
    assert tokenizers_place(run, TokenizerFlags()) == str(chain / "rm")


def test_models_of_later_stages_are_looked_at_before_a_chain_begins(chain, tmp_path):
    """What dpo and ppo would refuse hours later."""
    published, long = shutil.copytree(chain / "rm", tmp_path / "published"), ("--max-prompt", 600)
    described = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({name: value for name, value in described.items() if "score_" not in name}))
    other = shutil.copytree(chain / "sft", tmp_path / "other")
    (other / "config.json").write_text(json.dumps(json.loads((other / "config.json").read_text()) | {"hidden_act": "gelu"}))
    wide = shutil.copytree(chain / "sft", tmp_path / "wide")
    (wide / "tokenizer.model").write_bytes((wide / "tokenizer.model").read_bytes() + b"\0")
    for words, code, message in (
        (["--ppo-reward-model", published], 4, "score_mean and score_std are missing, which the rm stage fits and stores; let it take this model: "),
        (["--dpo-ref", other], 4, "hidden_act = 'gelu' is not supported"),
        (["--ppo-init", chain / "rm"], 4, "holds a reward model where a language model is needed"),
        (["--init", chain / "sft", "--ppo-ref", wide, "--max-response", 24], 4, "is not the tokenizer of this run"),
        (["--init", chain / "sft", *long], 2, "a context of 184 tokens is less than --max-prompt 600 + --max-response 64"),
        (["--init", chain / "sft", *long, "--plan"], 2, "a context of 184 tokens is less than --max-prompt 600 + --max-response 64"),
    ):
        assert message in here("--stage", "mpo", "--out", tmp_path / "run", *words, expect=code) and not (tmp_path / "run").exists()


def test_a_comparison_says_that_another_reward_model_judges(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "rm")
    here("--stage", "rm", "--out", run, "--reward-model", chain / "rm")
    said = here("--run", run, "--quick", "--models", "ppo,dpo", "--no-distances", program="eval.py")
    assert said.count("careful: ") == 2 and f"careful: ppo was trained with another reward model, {chain / 'rm'}, than {run / 'rm'}" in said
    assert "careful: " not in here("--run", copy_of(chain, tmp_path / "same"), "--quick", "--models", "ppo", "--no-distances", program="eval.py")


def test_places_are_no_part_of_a_stages_key(chain):
    """The reference spelled out is the reference; another one is another stage."""
    flags = BUDGETS["dpo"]
    assert "is finished already" in here("--stage", "dpo", "--out", chain, *flags, "--ref", chain / "sft", "--init", f"{chain}/dpo/../sft")
    assert "ref was" in here("--stage", "dpo", "--out", chain, *flags, "--ref", chain / "ppo", expect=2)


def test_dpo_on_the_opinion_of_the_reward_model(chain, tmp_path):
    """All pairs with sharp labels of the reward model's own: the first loss is ln 2, and the rm is among what the model was made from."""
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    here("--stage", "dpo", "--out", run, *BUDGETS["dpo"], "--part", "all", "--loss", "soft", "--sharpness", 1000)
    assert sha256(run / "rm" / "manifest.json") in manifest(run / "dpo")["parents"]["rm"].values()
    assert steps(run / "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-3)
    (run / "dpo").rename(run / "soft")
    message = here("--stage", "dpo", "--out", run, "--sharpness", 2, expect=2)
    assert "--sharpness: the loss dpo does not read it" in message


def test_frozen_models_that_rest_in_the_cpus_memory_change_no_bit(chain, tmp_path, monkeypatch):
    """Whenever one is asked its weights are a copy on the device, here the CPU as well: on a GPU, one that still rests could not be asked."""
    asked = []

    def watched(model, world, *, frozen=False, distribute=parallel.distribute):
        model = distribute(model, world, frozen=frozen)
        if frozen:
            home = next(model.parameters()).data_ptr()
            model.register_forward_pre_hook(lambda model, _: asked.append(next(model.parameters()).data_ptr() != home))
        return model

    for module in ("model.offline", "rl.online"):
        monkeypatch.setattr(f"{module}.distribute", watched)
    run = copy_of(chain, tmp_path / "run", *STAGES[2:], "cache")
    for stage in STAGES[2:]:
        before = len(asked)
        here("--stage", stage, "--out", run, *(("--offload",) if stage in TRAINED else ()), *BUDGETS.get(stage, ()))
        assert stage == "split" or len(asked) > before
    assert all(asked)
    for stage in ("rm", "dpo", "ppo"):
        assert sha256(run / stage / "model.safetensors") == sha256(chain / stage / "model.safetensors"), stage
        assert metrics(run / stage) == metrics(chain / stage)


def test_init_does_not_move_the_reference(chain, tmp_path):
    """DPO from another start keeps the SFT reference: its first implicit rewards are not 0."""
    run = copy_of(chain, tmp_path / "run", "ppo")
    (run / "dpo").rename(run / "start")
    here("--stage", "dpo", "--out", run, "--init", run / "start", *BUDGETS["dpo"])
    assert sha256(run / "sft" / "manifest.json") in manifest(run / "dpo")["parents"]["ref"].values()
    assert abs(steps(run / "dpo")[0]["chosen_reward"]) > 1e-4


def test_a_model_from_elsewhere_can_be_the_start(chain, tmp_path):
    """A folder with weights, config and tokenizer, and no manifest of ours."""
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        (foreign / name).write_bytes((chain / "dpo" / name).read_bytes())
    here("--stage", "dpo", "--out", run, "--init", foreign, "--ref", foreign, *BUDGETS["dpo"])
    assert sha256(foreign / "model.safetensors") in json.dumps(manifest(run / "dpo"))  # it is on record which weights they were


# ---- commands that are refused


def test_missing_parents_name_the_command_that_makes_them(chain, tmp_path):
    out = tmp_path / "new"
    message = here("--stage", "sft", "--out", out, expect=2)
    assert f"train.py --stage tokenizer --out {out}" in message and not out.exists()
    for stage, missing in {"rm": "sft", "split": "rm", "dpo": "split", "ppo": "dpo"}.items():
        run = copy_of(chain, tmp_path / stage, *STAGES[STAGES.index(missing) :])
        before = snapshot(run)
        assert f"train.py --stage {missing} --out {run}" in here("--stage", stage, "--out", run, expect=2)
        assert snapshot(run) == before


def test_a_finished_stage_is_not_overwritten(chain):
    before = snapshot(chain)
    message = here("--stage", "sft", "--out", chain, "--epochs", 2, expect=2)
    assert str(chain / "sft") in message and "epochs" in message and "--out" in message
    assert snapshot(chain) == before


def test_an_unfinished_stage_is_neither_overwritten_nor_read(chain, tmp_path):
    """What a killed run leaves: all files but the manifest."""
    run = copy_of(chain, tmp_path / "run")
    (run / "dpo" / "manifest.json").unlink()
    before = snapshot(run)
    assert "unfinished" in here("--stage", "dpo", "--out", run, *BUDGETS["dpo"], expect=2)
    message = here("--stage", "ppo", "--out", run, *BUDGETS["ppo"], expect=2)
    assert "unfinished" in message and f"--stage dpo --out {run}" in message
    assert "unfinished" in here("--stage", "ppo", "--out", run, "--init", run / "dpo", "--ref", run / "sft", expect=2)
    assert snapshot(run) == before


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_what_no_stage_made_is_never_removed(chain, tmp_path, resume):
    """Somebody's own files where a stage would stand: refused, and never cleared away for a fresh start."""
    run = copy_of(chain, tmp_path / "run", "split", "dpo", "ppo")
    (run / "split").mkdir()
    (run / "split" / "thesis.txt").write_text("years of work")
    for stage in ("tokenizer", "mpo"):
        (tmp_path / stage / "data").mkdir(parents=True)
        (tmp_path / stage / "data" / "mine.jsonl").write_text("rows of mine")
    before = snapshot(tmp_path)
    assert "no stage of this program made them" in here("--stage", "split", "--out", run, *resume, expect=2)
    for stage in ("tokenizer", "mpo"):
        assert "no stage of this program made them" in here("--stage", stage, "--out", tmp_path / stage, *WORLD, *resume, expect=2)
    message = here("--run", tmp_path / "mpo", program="eval.py", expect=2)
    assert "no stage of a run" in message and "--resume" not in message
    assert snapshot(tmp_path) == before


def test_a_place_in_the_run_that_only_a_chain_could_make_is_no_place_for_a_stage(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "ppo")
    assert "nothing: no such folder" in here("--stage", "ppo", "--out", run, "--ref", run / "nothing", *BUDGETS["ppo"], expect=2)
    of_no_stage = (("--ppo-ref", "sftt"), ("--dpo-ref", "ppo"), ("--rm-init", "dpo/snapshot-00001"), ("--dpo-ref", "split"))
    of_another_kind = (("--ppo-ref", "rm"), ("--ppo-reward-model", "rm/fold-0"))
    for flag, place in of_no_stage + of_another_kind:
        said = here("--stage", "mpo", "--out", tmp_path / "new", flag, tmp_path / "new" / place, *WORLD, *TINY, expect=2)
        assert f"{place}: no such folder" in said and not (tmp_path / "new").exists()


def test_a_finished_or_refused_stage_draws_no_weights(chain, monkeypatch):
    def read(name):
        raise AssertionError("drawn")

    monkeypatch.setattr("model.offline.first_values", lambda model, seed: read)
    assert "is finished already" in here("--stage", "sft", "--out", chain, *BUDGETS["sft"])
    assert "size was tiny, is 7b" in here("--stage", "sft", "--out", chain, *BUDGETS["sft"], "--size", "7b", expect=2)


def test_changed_weights_are_refused(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "ppo")
    weights = bytearray((run / "dpo" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "dpo" / "model.safetensors").write_bytes(weights)
    assert "model.safetensors: changed" in here("--stage", "ppo", "--out", run, expect=4)
    assert not (run / "ppo").exists()


def test_the_data_of_a_run_stays(chain):
    before = snapshot(chain)
    for flags in (["--pairs", 300], ["--max-prompt", 50], ["--data", "digest"], ["--seed", 5]):
        message = here("--stage", "sft", "--out", chain, *flags, expect=2)
        assert flags[0] in message and "was made with" in message
    assert snapshot(chain) == before


REFUSED = [
    ("", "--stage"),
    ("--stage everything", "everything"),
    ("--stage ppo --top-p 0.9", "--top-p"),
    ("--stage mpo --lr 1e-4", "--lr"),
    ("--stage sft --kl-coef 0.1", "--kl-coef"),
    ("--stage dpo --size tiny", "--size"),
    ("--stage dpo --lear 1e-4", "--lear"),
    ("--stage sft --size gigantic", "gigantic"),
    ("--stage sft --epochs many", "many"),
    ("--stage dpo --lr -1", "--lr -1.0"),
    ("--stage mpo --ppo-lr nan", "--ppo-lr nan"),
    ("--stage mpo --dpo-beta inf", "--dpo-beta"),
    ("--stage sft --batch-size 0", "--batch-size 0"),
    ("--stage sft --weight-decay -0.1", "--weight-decay -0.1"),
    ("--stage rm --warmup 1.5", "--warmup 1.5"),
    ("--stage rm --folds 0", "--folds 0"),
    ("--stage rm --reward-model tests --lr 1e-4", "--lr: nothing is trained"),
    ("--stage mpo --rm-reward-model tests --rm-folds 1", "--rm-folds: nothing is trained"),
    ("--stage rm --reward-model nowhere", "--reward-model nowhere: no such folder"),
    ("--stage ppo --kl-estimator k3", "k3"),
    ("--stage ppo --kl-estimator k2", "k2"),
    ("--stage mpo --ppo-kl-placement loss", "--ppo-kl-placement"),
    ("--stage ppo --kl-coef -0.1", "--kl-coef -0.1"),
    ("--stage ppo --gae-lambda 1.5", "--gae-lambda 1.5"),
    ("--stage ppo --discount 1.1", "--discount 1.1"),
    ("--stage ppo --value-coef -1", "--value-coef -1"),
    ("--stage ppo --temperature 0", "--temperature 0"),
    ("--stage ppo --entropy-coef -1", "--entropy-coef -1"),
    ("--stage mpo --ppo-end-penalty -3", "--ppo-end-penalty -3"),
    ("--stage ppo --kl-horizon 5", "--kl-target"),
    ("--stage ppo --critic trunk --critic-lr 1e-3", "--critic-lr 0.001: is read with --critic separate alone"),
    ("--stage ppo --kl-target 2 --kl-horizon 100", "--kl-horizon 100: is less than --prompts-per-iteration 128"),
    ("--stage ppo --part all --prompts jsonl:prompts.jsonl", "--part all"),
    ("--stage ppo --kl-target 2 --kl-coef 0", "--kl-coef 0, --kl-target"),
    ("--stage ppo --ratio-clip 5", "--ratio-clip 5"),
    ("--stage mpo --ppo-value-clip -1", "--ppo-value-clip -1"),
    ("--stage mpo --ppo-prompts jsonl:nowhere.jsonl", "nowhere.jsonl"),
    ("--stage mpo --ppo-reward-model nowhere", "--ppo-reward-model nowhere: no such folder"),
    ("--stage dpo --ref nowhere", "--ref nowhere: no such folder"),
    ("--stage mpo --init tests --size tiny", "--size tiny"),
    ("--stage sft --init tests --size tiny --plan", "--size tiny"),
    ("--stage mpo --init tests --tokenizer-vocab-size 400", "--tokenizer-vocab-size 400"),
    ("--stage mpo --tokenizer-file x --tokenizer-vocab-size 400", "--tokenizer-vocab-size 400"),
    ("--stage mpo --test-data hh:nowhere.jsonl", "nowhere.jsonl"),
    ("--stage mpo --demonstrations jsonl:nowhere.jsonl", "nowhere.jsonl"),
    ("--stage mpo --dpo-loss ipo --dpo-label-smoothing 0.1", "--dpo-label-smoothing"),
    ("--stage dpo --beta 0", "--beta 0"),
    ("--stage mpo --dpo-loss ipo --dpo-beta -1", "--dpo-beta -1"),
    ("--stage mpo --test-share 0.2", "--test-share 0.2"),
    ("--stage tokenizer --data hh:rows.jsonl --pairs 100", "--pairs 100"),
    ("--stage mpo --data jsonl:rows.jsonl --flip-rate 0.1", "--flip-rate 0.1"),
    ("--stage split --rule threshold", "--threshold"),
    ("--stage mpo --split-quantile 1.5", "--split-quantile 1.5"),
    ("--stage mpo --test-data hh:rows.jsonl --test-prompts 10", "--test-prompts 10"),
    ("--stage mpo --skip-bad-rows 1", "--skip-bad-rows 1"),
    ("--stage split --threshold 1", "--rule"),
    ("--stage dpo --loss ipo --label-smoothing 0.1", "ipo"),
    ("--stage dpo --label-smoothing 0.5", "label_smoothing"),
    ("--stage tokenizer --data nonsense", "nonsense"),
    ("--stage tokenizer --data hh:nowhere.jsonl", "nowhere.jsonl"),
    ("--stage tokenizer --test-share 1", "--test-share 1"),
    ("--stage tokenizer --flip-rate 2", "--flip-rate 2"),
    ("--stage tokenizer --pairs 0", "--pairs 0"),
    ("--stage tokenizer --skip-bad-rows -1", "--skip-bad-rows -1"),
    ("--stage tokenizer --label-temperature -1", "--label-temperature -1"),
    ("--stage sft --parallel fsdp", "torchrun"),
    ("--stage sft --dtype fp64", "fp64"),
    pytest.param("--stage sft --device cuda", "--device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
]


@pytest.mark.parametrize("line, part", REFUSED)
def test_impossible_flags_are_refused_before_anything_is_written(tmp_path, line, part):
    message = here(*line.split(), "--out", tmp_path / "run", expect=2)
    assert part in message
    assert not snapshot(tmp_path)


def test_what_a_stage_of_a_chain_refuses_has_its_name_there(tmp_path):
    assert "error: --tokenizer-vocab-size 10 is too small" in here("--stage", "mpo", "--pairs", 60, "--tokenizer-vocab-size", 10, "--out", tmp_path / "run", expect=2)


@pytest.mark.parametrize("stage, flag", [("ppo", "--prompts-per-iteration"), ("mpo", "--ppo-prompts-per-iteration")])
def test_prompts_that_processes_cannot_share_are_refused_at_once(tmp_path, monkeypatch, stage, flag):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = here("--stage", stage, flag, 7, "--out", tmp_path / "run", expect=2)
    assert f"{flag} 7" in message and "multiple of the 2 processes" in message and not (tmp_path / "run").exists()


def test_a_run_has_one_seed(tmp_path, monkeypatch):
    """That of its data, where none is typed; another one is refused."""
    run = tmp_path / "run"
    here("--stage", "tokenizer", "--out", run, *WORLD, "--seed", 7)

    def enough(*args, **more):
        raise UsageError("enough")

    monkeypatch.setattr("model.offline.fit", enough)
    assert " seed=7 " in here("--stage", "sft", "--out", run, expect=2)
    assert f"--seed 3: {run / 'data'} was made with 7" in here("--stage", "sft", "--out", run, "--seed", 3, expect=2)
    assert "--seed -1: must be 0 or more" in here("--stage", "tokenizer", "--out", tmp_path / "other", "--seed", -1, expect=2)


def test_a_finished_stage_is_not_taken_for_one_in_another_dtype_but_for_one_in_other_micro_batches(chain):
    message = here("--stage", "sft", "--out", chain, *BUDGETS["sft"], "--dtype", "bf16", expect=2)
    assert "finished with other settings (dtype was fp32, is bf16)" in message
    assert "[sft] is finished already" in here("--stage", "sft", "--out", chain, *BUDGETS["sft"], "--micro-batch", 3)


def test_a_stage_that_other_code_has_finished_is_said_to_be_and_its_newer_flags_count_where_they_are_typed(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", *STAGES[3:])
    again = ("--stage", "rm", "--out", run, *BUDGETS["rm"])
    assert "by another version" not in here(*again)
    made = manifest(run / "rm")
    del made["flags"]["folds"]
    (run / "rm" / "manifest.json").write_text(json.dumps(made | {"versions": made["versions"] | {"code": "0123"}}))
    assert f"[rm] is finished already, in {run / 'rm'}, by another version of this code; to make it with this one, remove it" in here(*again)
    assert "finished with other settings (folds was None, is 2)" in here(*again, "--folds", 2, expect=2)


def test_models_of_a_run_whose_data_was_made_anew_are_neither_built_on_nor_compared(chain, tmp_path):
    """The new parts are others: what was trained on would be tested on."""
    run = copy_of(chain, tmp_path / "run", "ppo")
    shutil.rmtree(run / "data")
    here("--stage", "tokenizer", "--out", run, *WORLD, "--flip-rate", 0.3, expect=2)
    message = f"{run / 'tokenizer'}: was made from another data than {run / 'data'}, which was made anew since; remove"
    assert message in here("--stage", "ppo", "--out", run, *BUDGETS["ppo"], expect=2) and not (run / "ppo").exists()
    assert message in here("--run", run, program="eval.py", expect=2) and not (run / "eval").exists()


def test_a_tokenizer_that_was_trained_is_not_taken_for_one_that_is_given(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", *STAGES[1:])
    message = here("--stage", "tokenizer", "--out", run, "--file", chain / "tokenizer" / "tokenizer.model", expect=2)
    assert "finished with other settings (file_digest was None, is " in message


def test_folds_that_all_prompts_fall_into_one_of_are_refused(chain, tmp_path, monkeypatch):
    run = copy_of(chain, tmp_path / "run", *STAGES[2:])
    monkeypatch.setattr("model.offline.stable_hash", lambda *parts: 0 if parts[0] == "fold" else stable_hash(*parts))
    assert "training prompts or dialogues fall into one of 2 folds; give more, or --folds 1" in here("--stage", "rm", "--out", run, *BUDGETS["rm"], expect=3)
    assert not (run / "rm").exists()


def test_a_reward_model_that_tells_nothing_apart_is_refused(chain, tmp_path, monkeypatch):
    run = copy_of(chain, tmp_path / "run", *STAGES[2:])
    monkeypatch.setattr("model.offline.reward_scores_of_pairs", lambda model, rows, *more: torch.full((len(rows), 2), 0.3).double().numpy())
    message = here("--stage", "rm", "--out", run, *BUDGETS["rm"], "--folds", 1, expect=5)
    assert "all chosen responses have the same score" in message and not (run / "rm" / "manifest.json").exists()


@pytest.mark.parametrize("spread, warned", [(0.04, True), (0.2, False)])
def test_a_reward_model_that_hardly_tells_anything_apart_is_told(chain, tmp_path, monkeypatch, spread, warned):
    run = copy_of(chain, tmp_path / "run", *STAGES[2:])
    monkeypatch.setattr("model.offline.reward_scores_of_pairs", lambda model, rows, *more: spread * np.random.default_rng(0).normal(size=(len(rows), 2)))
    message = here("--stage", "rm", "--out", run, *BUDGETS["rm"], "--folds", 1)
    said = re.search(r"the standard deviation of chosen responses' scores is 0\.0\d+ log-odds, and PPO divides by it", message)
    assert bool(said) == warned


def downloaded(source, folder):
    """A stage's model without what makes its folder a stage's."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copy(source / name, folder / name)
    return folder


def widened(source, folder):
    """The same with 64 more rows than its tokenizer has pieces, as published models may have."""
    downloaded(source, folder)
    described = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"model.embed_tokens.weight": torch.cat([rows, rows[:64]])}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described | {"vocab_size": len(rows) + 64}))
    return folder


def test_models_of_other_vocabularies_are_refused_before_anything_is_trained(chain, tmp_path):
    run, wide = copy_of(chain, tmp_path / "run", *STAGES[4:]), widened(chain / "sft", tmp_path / "wide")
    for line in (("dpo", "--ref", wide), ("dpo", "--init", wide), ("ppo", "--init", wide, "--ref", run / "sft"), ("ppo", "--init", wide, "--ref", wide)):
        assert "take models of one vocab_size" in here("--stage", line[0], "--out", run, *line[1:], *BUDGETS[line[0]], expect=4), line
    assert not (run / "dpo").exists() and not (run / "ppo").exists()


def test_an_end_token_that_was_added_to_the_tokenizer_is_refused(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", *STAGES[4:])
    other = downloaded(chain / "sft", tmp_path / "other")
    described = json.loads((other / "config.json").read_text())
    for ends, code in ((described["vocab_size"], 4), ([7, described["eos_token_id"]], 0)):
        (other / "config.json").write_text(json.dumps(described | {"eos_token_id": ends}))
        message = here("--stage", "dpo", "--out", run, "--init", other, "--part", "all", *BUDGETS["dpo"], expect=code)
        assert (f"eos_token_id is {ends}" in message) == (code == 4)


def test_an_argument_of_a_loss_cannot_take_the_name_of_another_flag(monkeypatch):
    def cut(pairs, *, beta: float = 0.1, clip: float = 1.0):
        """A loss.

        Args:
            beta: strength
            clip: not the gradient's
        """

    monkeypatch.setitem(PREFERENCE_LOSSES, "cut", cut)
    with pytest.raises(ValueError, match="cut: its argument clip has the name of a flag"):
        check_loss_names()


def test_a_split_that_is_older_than_a_flag_of_its_rule_stays_valid(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    made = manifest(run / "split")
    del made["flags"]["per_pair"]
    (run / "split" / "manifest.json").write_text(json.dumps(made))
    here("--stage", "dpo", "--out", run, *BUDGETS["dpo"])
    assert sha256(run / "dpo" / "model.safetensors") == sha256(chain / "dpo" / "model.safetensors")


def test_an_argument_of_two_losses_has_one_type(monkeypatch):
    def cut(pairs, *, beta: float = 0.1, sharpness: int = 3):
        """A loss.

        Args:
            beta: strength
            sharpness: of another kind than that of `soft`
        """

    monkeypatch.setitem(PREFERENCE_LOSSES, "cut", cut)
    with pytest.raises(ValueError, match="cut: its argument sharpness is of type int, and another loss's float"):
        check_loss_names()


def test_a_loss_with_a_defect_leaves_nothing_in_the_way(chain, tmp_path, monkeypatch):
    """Neither one that fails on the first batch, nor one that reads the gap and is not named in READS_GAP, which fails before any work."""
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")

    def late(pairs, *, beta: float = 0.1):
        return pairs.chosen_logp * torch.ones(1 if len(pairs.chosen_logp) == 1 else 99)

    def gap(pairs, *, beta: float = 0.1):
        return pairs.chosen_logp * pairs.gap

    late.__doc__ = gap.__doc__ = "A loss.\n\nArgs:\n    beta: strength"
    for loss, failure in ((late, RuntimeError), (gap, TypeError)):
        monkeypatch.setitem(PREFERENCE_LOSSES, "new", loss)
        with pytest.raises(failure):
            dpo_stage(Run(run, RunFlags(), ALONE, {"loss": "new"}, False, {}))
        assert not (run / "dpo").exists()


def test_many_processes_have_a_validation_prompt_each(chain, monkeypatch):
    pairs = [SimpleNamespace(prompt=f"Name {n}.", style="plain") for n in range(80)]
    monkeypatch.setattr("model.stage.load_pairs", lambda folder, part: pairs)
    path = chain / "tokenizer" / "tokenizer.model"
    text = Text(Tokenizer(path), path, 100, 24)
    for size, count in ((1, 64), (70, 70)):
        assert len(validation_prompts(Run(chain, RunFlags(), dataclasses.replace(ALONE, size=size), {}, False, {}), text, 64)) == count
    with pytest.raises(DataError, match="80 validation prompts for 90 processes"):
        validation_prompts(Run(chain, RunFlags(), dataclasses.replace(ALONE, size=90), {}, False, {}), text, 64)


def test_help_lists_exactly_the_flags_of_the_stage():
    assert "which stage, from which checkpoint" in here("--help") and "--stage is missing" in here(expect=2)
    described = here("--stage", "dpo", "--help")
    assert re.search(r"--beta ", described) and re.search(r"--lr ", described)
    assert "--kl-coef" not in described and "--folds" not in described and "--dpo-lr" not in described
    assert "--dpo-lr" in here("--stage", "mpo", "--help")
    for stage in ("tokenizer", "split"):  # which have no network
        described = here("--stage", stage, "--help")
        assert "--device" in described and not any(flag in described for flag in ("--dtype", "--parallel", "--offload", "--checkpoint-activations"))
    described = here("--stage", "sft", "--help")  # which has no frozen model
    assert "--dtype" in described and "--offload" not in described


def test_every_declared_flag_is_read():
    """Somewhere in the program its name stands as an attribute, or as the text by which it is looked up, outside its declaration."""
    groups = [DataFlags, WorldFlags, EvalFlags, GridFlags, RunFlags, LoopFlags, PlanFlags, DeviceFlags, *(group for some in STAGE_FLAGS.values() for group in some)]
    files = [path for path in runs.ROOT.rglob("*.py") if path.relative_to(runs.ROOT).parts[0] != "tests"]
    program = "\n".join(path.read_text() for path in files)
    names = {field.name for group in groups if group.__name__ != "LossFlags" for field in dataclasses.fields(group)}  # those are arguments of their loss
    assert len(names) > 80 and not [name for name in sorted(names) if not re.search(rf"\.{name}\b|\"{name}\"|\b{name}=", program)]


def cpu_seconds(*args):
    """Output, and user and system time, of a command; that time depends less than the clock on how busy the machine is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *args], cwd=runs.ROOT, env={**os.environ, **runs.ONE_THREAD}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_bad_flag_is_refused_within_a_second_beyond_importing_torch():
    for _ in range(3):  # a disturbance? once more
        message, seconds = cpu_seconds("train.py", "--stage", "mpo", "--ppo-lr", "-1")
        assert message == "error: --ppo-lr -1.0: must be a positive finite number\n"
        if seconds < 1 + cpu_seconds("-c", "import torch")[1]:
            return
    pytest.fail(f"{seconds:.1f} s")


@pytest.mark.parametrize("rule", [("--quantile", 0.1), ("--rule", "threshold", "--threshold", 0.002), ("--disputed", "easy", "--per-pair"), ("--rule", "none", "--disputed", "drop")])
def test_dpo_on_a_part_is_validated_on_the_pairs_that_the_split_would_put_there(chain, tmp_path, monkeypatch, rule):
    """Said again from the rules: the reward model that has not seen them scores the pairs one row at a time, in the chain's tokenizer."""
    seen = []

    def looked_at(model, objective, rows, validation, flags, **more):
        seen.append(sorted(row.id for row in validation))
        raise UsageError("enough")

    base = copy_of(chain, tmp_path / "run", "split", "dpo", "ppo")
    here("--stage", "split", "--out", base, *rule)
    monkeypatch.setattr("model.offline.fit", looked_at)
    for part in ("easy", "difficult", "all"):
        here("--stage", "dpo", "--part", part, "--out", copy_of(base, tmp_path / part), expect=2)

    pairs = load_pairs(base / "data", "validation")
    tokenizer = Tokenizer(base / "tokenizer" / "tokenizer.model")
    rows, _ = encode_pairs(pairs, tokenizer, 10_000, 24)
    model = load_model(base / "rm", ScalarModel).eval()
    gap = {}
    for row in rows:
        scores = [model(torch.tensor([one.prompt + one.response]), torch.tensor([one.length])).item() for one in (row.chosen, row.rejected)]
        gap[row.id] = scores[0] - scores[1]
    prompt = {pair.id: pair.prompt for pair in pairs}
    threshold = manifest(base / "split")["results"]["threshold"]
    expected = {"all": sorted(gap), "easy": [], "difficult": []}
    for row, own in gap.items():
        of_prompt = [gap[other] for other in gap if prompt[other] == prompt[row]]
        if "none" in rule:
            parts = ["easy", "difficult"] if own >= 0 else []
        elif "--per-pair" in rule:
            parts = ["easy" if own < 0 or own >= threshold else "difficult"]
        elif max(of_prompt) >= threshold:
            parts = ["easy"] if own >= 0 else []
        else:
            parts = ["difficult"]
        for part in parts:
            expected[part].append(row)
    assert 0 < len(expected["easy"]) < len(expected["all"]), (threshold, sorted(gap.values()))
    assert seen == [sorted(expected[part]) or expected["all"] for part in ("easy", "difficult", "all")]


def test_stored_moments_are_those_of_the_demonstrations_and_folds_score_what_they_never_saw(chain):
    """The mean and std that PPO uses come from the final reward model's scores of the chosen responses; a pair's fold is its prompt's."""
    rm = manifest(chain / "rm")["results"]
    stored = json.loads((chain / "rm" / "config.json").read_text())
    assert (stored["score_mean"], stored["score_std"]) == (rm["score_mean"], rm["score_std"]) and rm["score_std"] > 0
    rows = [json.loads(line) for line in (chain / "rm" / "scores.jsonl").read_text().splitlines()]
    prompts = {pair.id: pair.prompt for pair in load_pairs(chain / "data", "train")}
    fold_of = {prompts[row["id"]]: row["fold"] for row in rows}
    assert set(fold_of.values()) == {0, 1} and all(fold_of[prompts[row["id"]]] == row["fold"] for row in rows)
    for fold in (0, 1):  # a fold model's steps cover the other fold's pairs and no more
        others = sum(row["fold"] != fold for row in rows)
        expected = max(1, round(0.3 * -(-others // 8)))
        assert len(steps(chain / "rm" / f"fold-{fold}")) == expected
        model, text = load_model(chain / "rm" / f"fold-{fold}", ScalarModel).eval(), Tokenizer(chain / "tokenizer" / "tokenizer.model")
        written = {row["id"]: row for row in rows if row["fold"] == fold}
        for row in encode_pairs([pair for pair in load_pairs(chain / "data", "train") if pair.id in written], text, 160, 24)[0][:3]:
            for one, score in ((row.chosen, written[row.id]["chosen"]), (row.rejected, written[row.id]["rejected"])):
                assert model(torch.tensor([one.prompt + one.response]), torch.tensor([one.length])).item() == pytest.approx(score, abs=1e-5)


def test_ppos_four_models_share_no_memory(chain, tmp_path, monkeypatch):
    def train_ppo(model, ref, reward_model, *args, **more):
        places = [{tensor.untyped_storage().data_ptr() for tensor in part.parameters()} for part in (model.policy, model.critic, ref, reward_model)]
        assert len(set.union(*places)) == sum(map(len, places)) > 40
        assert all(map(torch.equal, model.critic.parameters(), reward_model.parameters()))  # which it starts as
        raise UsageError("enough")

    monkeypatch.setattr("rl.online.train_ppo", train_ppo)
    assert "enough" in here("--stage", "ppo", "--out", copy_of(chain, tmp_path / "run", "ppo"), *BUDGETS["ppo"], expect=2)
