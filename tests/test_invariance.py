"""What must not change a result changes none, through the commands that a user types.

    how rows are grouped        --micro-batch 1, 2, 8 at one batch size: losses and weights of sft, rm, dpo and ppo
    who else is in the batch    eval.py --batch, --prompts, and one prompt alone: answers and scores
    what padding looks like     a tokenizer, and a model's config.json, whose padding is the end token: the whole chain
    the cache of decoding       answers of eval.py against full forwards without cache or padding
    the temperature             first ratio 1 and first KL 0 at 0.7, so it is on both sides
    the order of a file's rows  which prompts are held out, and which of them are answered
"""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from runs import STAGES, TINY, TRAINED, WORLD, copy_of, here, metrics, put_on_record, sha256, steps
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2
from test_ranks import close, unsampled

from data.batches import stable_hash
from data.prepare import load_demonstrations, load_pairs
from data.tokenizer import Tokenizer
from model.checkpoint import load_model
from model.generate import row_uniforms
from model.heads import LanguageModel

# ---- how rows are grouped

BRIEF = {"dpo": ("--epochs", 0.3, "--validations", 1, "--part", "all"), "ppo": ("--prompts-per-iteration", 8, "--iterations", 2, "--validations", 1)}


def three_steps(run, stage):
    """Flags with which a stage takes three optimiser steps of 8 rows; at this learning rate the sign of a gradient that is nothing but rounding,
    which Adam makes a whole step of, stays below what is compared."""
    if stage == "ppo":
        return ["--iterations", 1, "--prompts-per-iteration", 24, "--minibatch", 8, "--passes", 1, "--lr", 1e-4]
    rows = len(load_demonstrations(run / "data", "train") if stage == "sft" else load_pairs(run / "data", "train"))
    extra = {"sft": [], "rm": ["--folds", 1, "--snapshots"], "dpo": ["--part", "all"]}[stage]
    return ["--batch-size", 8, "--epochs", 3 / -(-rows // 8), "--validations", 1, "--lr", 1e-4, *extra]


@pytest.mark.parametrize("stage, parent", [("sft", None), ("rm", "sft"), ("dpo", "sft"), ("ppo", "dpo")])
def test_micro_batches_change_neither_losses_nor_weights(chain, tmp_path, stage, parent):
    """Rows of ragged lengths: a mean of means, or padding that counts, would show in the first step."""
    lines, weights = {}, {}
    for micro_batch in (1, 2, 8):
        run = copy_of(chain, tmp_path / str(micro_batch), *STAGES[STAGES.index(stage) :])
        here("--stage", stage, "--out", run, *three_steps(run, stage), "--micro-batch", micro_batch)
        (last,) = (run / stage).glob("snapshot-*")
        lines[micro_batch], weights[micro_batch] = metrics(run / stage), load_file(last / "model.safetensors")
    for micro_batch in (1, 2):
        for line, whole in zip(lines[micro_batch], lines[8], strict=True):
            trained, step = "grad_norm" in whole, whole["step"]
            if step >= 0 and not trained:
                line, whole = unsampled(stage, line), unsampled(stage, whole)
            if stage == "dpo" and step <= 0:  # margins are 0 there, and their signs are rounding
                line, whole = ({name: value for name, value in numbers.items() if "accuracy" not in name} for numbers in (line, whole))
            close(whole, line, (stage, micro_batch, step))
        for name, tensor in weights[8].items():
            assert (weights[micro_batch][name] - tensor).abs().max() < 1e-5, name
    assert sum(line.get("updates", 1) for line in lines[8] if "grad_norm" in line) == 3
    if parent:  # and the weights did move
        start = load_file(chain / parent / "model.safetensors")
        assert max(float((weights[8][name] - start[name]).abs().max()) for name in start.keys() & weights[8].keys()) > 1e-4


# ---- who else is in the batch


def answered(run, folder, *flags):
    """prompt -> (answers of ppo and dpo, their raw scores), from what eval.py writes for a judge and keeps as its key."""
    shutil.rmtree(run / "eval", ignore_errors=True)
    here("--run", run, "--models", "ppo,dpo", "--judge-out", folder / "pairs.jsonl", *flags, program="eval.py")
    (key,) = (run / "eval" / "keys").iterdir()
    entries = [json.loads(line) for line in key.read_text().split("\n") if line]
    return {entry["prompt"]: ((entry["first"], entry["second"]), entry["raw"]) for entry in entries}


def test_answers_and_scores_do_not_depend_on_who_else_is_asked(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run")
    together = answered(run, tmp_path, "--batch", 128)
    assert len(together) == 20 and len({len(answers[0]) for answers, _ in together.values()}) > 5
    for flags, count in ((("--batch", 1), 20), (("--prompts", 7, "--batch", 3), 7)):
        apart = answered(run, tmp_path, *flags)
        assert len(apart) == count
        for prompt, (answers, raw) in apart.items():
            assert answers == together[prompt][0] and raw == pytest.approx(together[prompt][1], abs=1e-5)
    prompt = list(together)[2]
    assert here("--model", run / "ppo", "--prompt", f"\n\n{prompt}", program="eval.py").strip() == together[prompt][0][0]


# ---- what padding looks like


def with_padding_that_ends(path):
    """A tokenizer file whose padding is its end piece, as many a published model has it."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.trainer_spec.pad_piece = "</s>"
    return proto.SerializeToString()


def test_padding_that_is_the_end_token_changes_no_stage(chain, tmp_path):
    """The chain once more with such a tokenizer: not a bit of any weights or metrics is different."""
    (tmp_path / "tokenizer.model").write_bytes(with_padding_that_ends(chain / "tokenizer" / "tokenizer.model"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.pad_id == tokenizer.eos_id != Tokenizer(chain / "tokenizer" / "tokenizer.model").pad_id
    run = tmp_path / "run"
    here("--stage", "mpo", "--out", run, *WORLD, *TINY, "--tokenizer-file", tmp_path / "tokenizer.model")
    for stage in TRAINED:
        assert metrics(run / stage) == metrics(chain / stage), stage
        assert sha256(run / stage / "model.safetensors") == sha256(chain / stage / "model.safetensors")
    reports = [json.loads((folder / "eval" / "report.json").read_text()) for folder in (run, chain)]
    assert reports[0]["rows"] == reports[1]["rows"] and reports[0]["samples"] == reports[1]["samples"]
    config = json.loads((run / "ppo" / "config.json").read_text())
    assert config["pad_token_id"] == config["eos_token_id"]


def test_a_model_whose_config_pads_with_the_end_token_is_the_same_start(chain, tmp_path):
    made = []
    for name, change in (("as it was", {}), ("padded by the end", {"pad_token_id": tokenizer_of(chain).eos_id})):
        folder, run = tmp_path / name, copy_of(chain, tmp_path / f"run {name}", "dpo", "ppo")
        folder.mkdir()
        for file in ("model.safetensors", "tokenizer.model"):
            (folder / file).write_bytes((chain / "sft" / file).read_bytes())
        (folder / "config.json").write_text(json.dumps(json.loads((chain / "sft" / "config.json").read_text()) | change))
        here("--stage", "dpo", "--out", run, "--init", folder, "--ref", folder, *BRIEF["dpo"])
        made.append((metrics(run / "dpo"), sha256(run / "dpo" / "model.safetensors")))
    assert made[0] == made[1]


# ---- the cache of decoding


def tokenizer_of(run):
    return Tokenizer(run / "tokenizer" / "tokenizer.model")


@torch.no_grad()
@pytest.mark.parametrize("greedy", [True, False])
def test_answers_are_those_of_full_forwards_without_a_cache(chain, greedy):
    """Sampled ones by the inverse of the cumulative distribution at the row's own uniform numbers, in float64."""
    model, tokenizer = load_model(chain / "ppo", LanguageModel).eval(), tokenizer_of(chain)
    for prompt in [pair.prompt for pair in load_pairs(chain / "data", "test")[:2]]:
        uniforms = row_uniforms(stable_hash(0, "eval"), [stable_hash(prompt)], 24)[0]
        ids = prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        for uniform in uniforms:
            logits = model(torch.tensor([ids]))[0, -1].double().numpy()
            weights = np.exp(logits - logits.max()).cumsum()
            ids = [*ids, int(logits.argmax() if greedy else np.searchsorted(weights, uniform * weights[-1], side="right"))]
            if ids[-1] == tokenizer.eos_id:
                break
        said = here("--model", chain / "ppo", "--prompt", prompt, *(["--greedy"] if greedy else []), program="eval.py")
        assert said.strip() == tokenizer.decode(ids[len(prompt_ids) :]).strip() != ""


# ---- the temperature


def test_the_temperature_is_that_of_policy_and_reference(chain, tmp_path):
    first = []
    for temperature in (0.7, 1.0):
        run = copy_of(chain, tmp_path / str(temperature), "ppo")
        here("--stage", "ppo", "--out", run, *BRIEF["ppo"], "--temperature", temperature)
        rounds = steps(run / "ppo")
        assert rounds[0]["kl_ref_seq"] == pytest.approx(0, abs=1e-5) and [line["first_ratio"] for line in rounds] == pytest.approx([1, 1], abs=1e-5)
        first.append(rounds[0])
    assert first[0]["entropy"] < 0.8 * first[1]["entropy"] and first[0]["raw_score"] != first[1]["raw_score"]  # in use, when sampling too


# ---- the order of a file's rows


def test_the_order_of_rows_decides_neither_who_is_held_out_nor_who_is_asked(chain, tmp_path):
    parts, asked = [], []
    for name in ("as it was", "shuffled"):
        files = {part: (chain / "data" / "world" / f"{part}.jsonl").read_text().splitlines(keepends=True) for part in ("train", "test")}
        (tmp_path / name).mkdir()
        for part, lines in files.items():
            if name == "shuffled":
                random.Random(0).shuffle(lines)
            (tmp_path / name / f"{part}.jsonl").write_text("".join(lines))
        run = tmp_path / name / "run"
        spec = f"hh:{tmp_path / name / 'train.jsonl'},{tmp_path / name / 'test.jsonl'}"
        here("--stage", "tokenizer", "--out", run, "--data", spec, "--file", chain / "tokenizer" / "tokenizer.model", "--max-response", 24)
        parts.append({part: {pair.id for pair in load_pairs(run / "data", part)} for part in ("train", "validation", "test")})
        for stage in ("sft", "rm", "dpo"):
            shutil.copytree(chain / stage, run / stage)
        put_on_record(run)
        here("--run", run, "--models", "sft", "--prompts", 5, "--judge-out", tmp_path / name / "pairs.jsonl", program="eval.py")
        asked.append((tmp_path / name / "pairs.jsonl").read_text())
    assert parts[0] == parts[1] and min(map(len, parts[0].values())) > 5
    assert asked[0] == asked[1] and len(asked[0].splitlines()) > 2
