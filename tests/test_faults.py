"""Bad input through the real command: what the user is told, the exit code, and that nothing half-made is left for a later stage.

The table below is what the program promises. Cases with several forms have several tests.

    bad data                                     exit 3, file:line          missing or unusable flag, folder, split    exit 2
    wrong weights, tokenizer or cache, a pickle  exit 4                     blank, identical, two-prompt rows          dropped and counted
    empty or never-ending responses in PPO       a warning; training goes on
"""

import gzip
import json
import math
import os
import pickle
import re
import shutil

import pytest
import torch
from runs import BUDGETS, ROOT, command, copy_of, here, manifest, metrics, sha256, snapshot, steps, write_rows

from data.prepare import load_pairs
from data.tokenizer import Tokenizer
from model.checkpoint import load_model, save_model
from model.heads import LanguageModel
from model.transformer import ModelConfig, initialise

WORDS = (ROOT / "data" / "errors.py").read_text().split()  # plain English enough
GOOD = [
    {"prompt": f"Say the number {n}.", "chosen": f"It is {n}. {WORDS[n]} {WORDS[n + 1]}", "rejected": f"I would say {n * 7} {WORDS[-n - 1]}."}
    for n in range(60)
]
SHORT = ("--epochs", 0.2, "--validations", 1)


def with_row(index, row):
    return [*GOOD[:index], row, *GOOD[index:]]


def tokenizer_stage(folder, rows, *flags, expect=0, name="rows.jsonl", kind="jsonl"):
    """`--stage tokenizer` on these rows (a list, or bytes as they are); its output and the run's folder."""
    path = folder / name
    path.write_bytes(rows) if isinstance(rows, bytes) else write_rows(path, rows)
    run = folder / "run"
    return here("--stage", "tokenizer", "--out", run, "--data", f"{kind}:{path}", *flags, expect=expect), run


def encoded(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def left_out(run):
    return manifest(run / "data")["results"]["left_out"]


# ---- rows that stop the run (cases 1 to 5)


BAD_ROWS = {
    "1 not JSON": (with_row(16, "{not json"), "rows.jsonl:17: invalid JSON", "--skip-bad-rows"),
    "2 last line cut": (encoded(GOOD) + b'{"prompt": "half', "rows.jsonl:61: invalid JSON", "the file may be truncated"),
    "3 Latin-1": (encoded(GOOD[:4]) + b'{"prompt": "caf\xe9"}\n', "rows.jsonl:5: not UTF-8: byte 0xe9 at offset", "--skip-bad-rows"),
    "3 half a character": (with_row(3, '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}'), "rows.jsonl:4:", "lone surrogate"),
    "4 missing key": (with_row(9, {"prompt": "a", "chosen": "b"}), 'rows.jsonl:10: key "rejected" is missing', "hh:PATH"),
    "4 null": (with_row(9, {"prompt": "a", "chosen": None, "rejected": "b"}), 'rows.jsonl:10: key "chosen" is null', "must be text"),
    "4 list": (with_row(0, {"prompt": "a", "chosen": ["b"], "rejected": "c"}), 'rows.jsonl:1: key "chosen" is a list', "must be text"),
    "4 number": (with_row(0, {"prompt": 3, "chosen": "b", "rejected": "c"}), 'rows.jsonl:1: key "prompt" is a whole number', "must be text"),
    "4 not an object": (with_row(2, "[1, 2]"), "rows.jsonl:3: the row is a list", "must be an object"),
    "5 empty file": (b"", "rows.jsonl: empty file", "download"),
    "5 nothing usable": ([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 9, "none of the 9 rows is usable", "9  chosen equals rejected"),
    "5 too few for three parts": (GOOD[:3], "too few rows for three parts", "give more prompts"),
    "9 a line without end": (encoded(GOOD) + b" " * (2**24 + 1), "rows.jsonl:61: the line is longer than 16,777,216 bytes", "one JSON object"),
    "6 blank everywhere": ([row | {"rejected": " "} if n % 3 else row for n, row in enumerate(GOOD)], "40 of 60 rows", "5%"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_stop_the_run_with_file_and_line(tmp_path, name):
    rows, *parts = BAD_ROWS[name]
    message, run = tokenizer_stage(tmp_path, rows, expect=3)
    assert all(part in message for part in parts), message
    assert not snapshot(run)
    here("--stage", "sft", "--out", run, expect=2)  # nothing there that it would take
    if name != "5 too few for three parts":
        tokenizer_stage(tmp_path, GOOD)  # and nothing in the way of the corrected file


def test_bad_rows_can_be_skipped_up_to_a_number(tmp_path):
    rows = with_row(16, "{not json") + ["[]"]
    message, run = tokenizer_stage(tmp_path, rows, "--skip-bad-rows", 1, expect=3)
    assert "rows.jsonl:62" in message and "1 bad rows before it were skipped" in message
    output, run = tokenizer_stage(tmp_path, rows, "--skip-bad-rows", 2)
    assert "2 left out: bad row, skipped" in output
    rejects = [json.loads(line) for line in (run / "data" / "rejects.jsonl").read_text().splitlines()]
    assert [row["where"].rpartition(":")[2] for row in rejects] == ["17", "62"] and rejects[0]["row"] == "{not json\n"
    assert sum(manifest(run / "data")["results"]["pairs"].values()) == 60


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = command("--stage", "tokenizer", "--out", tmp_path / "run", "--data", f"jsonl:{tmp_path / 'pipe'}", expect=2, timeout=60)
    assert f"cannot read {tmp_path / 'pipe'} (a pipe, socket or device" in message and not snapshot(tmp_path / "run")


def test_byte_order_mark_crlf_and_gzip_are_read(tmp_path):
    plain, run = tokenizer_stage(tmp_path, GOOD)
    for name, content in {"marked": b"\xef\xbb\xbf" + encoded(GOOD).replace(b"\n", b"\r\n"), "packed": gzip.compress(encoded(GOOD))}.items():
        (tmp_path / name).mkdir()
        tokenizer_stage(tmp_path / name, content)
        for part in ("train", "validation", "test"):
            pairs = [[pair.id for pair in load_pairs(folder / "data", part)] for folder in (run, tmp_path / name / "run")]
            assert pairs[0] == pairs[1]


# ---- rows that are left out and counted (cases 6, 7, 11)


def test_rows_that_teach_nothing_are_dropped_counted_and_told(tmp_path):
    odd = [GOOD[0] | {"chosen": " \n"}, GOOD[1] | {"prompt": ""}, GOOD[2] | {"chosen": "same", "rejected": "same"}, GOOD[3]]
    output, run = tokenizer_stage(tmp_path, GOOD + odd)
    assert left_out(run) == {"blank response": 1, "blank prompt": 1, "chosen equals rejected": 1, "duplicate": 1}
    assert all(f"1 left out: {reason}" in output for reason in left_out(run))
    assert sum(manifest(run / "data")["results"]["pairs"].values()) == 60


def test_what_is_left_out_of_the_other_files_is_told_too(tmp_path):
    write_rows(tmp_path / "test.jsonl", [*GOOD[:5], GOOD[0], GOOD[1] | {"chosen": " "}])
    shown = [{"prompt": row["prompt"], "response": row["chosen"]} for row in GOOD]
    write_rows(tmp_path / "shown.jsonl", [*shown, {"prompt": "Hi.", "response": " "}, shown[6], {"prompt": 3}])
    flags = ("--test-data", f"jsonl:{tmp_path / 'test.jsonl'}", "--demonstrations", f"jsonl:{tmp_path / 'shown.jsonl'}", "--skip-bad-rows", 1)
    output, run = tokenizer_stage(tmp_path, GOOD, *flags)
    results = manifest(run / "data")["results"]
    assert results["left_out_of_test_data"] == {"duplicate": 1, "blank response": 1}
    assert results["left_out_of_demonstrations"] == {"blank response": 1, "duplicate": 1, "bad row, skipped": 1, "test prompt": 5}
    assert "1 of --test-data left out: duplicate" in output and "5 of --demonstrations left out: test prompt" in output
    assert json.loads((run / "data" / "demonstration-rejects.jsonl").read_text())["where"].endswith("shown.jsonl:63")


def test_plain_rows_of_other_files_get_the_form_of_the_data(tmp_path):
    """Demonstrations and test rows of plain JSONL beside a world in HH's form; a test prompt is found among them."""
    write_rows(tmp_path / "test.jsonl", GOOD[:5])
    write_rows(tmp_path / "shown.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in GOOD])
    flags = ("--data", "advice", "--pairs", 60, "--test-data", f"jsonl:{tmp_path / 'test.jsonl'}", "--demonstrations", f"jsonl:{tmp_path / 'shown.jsonl'}")
    here("--stage", "tokenizer", "--out", tmp_path / "run", *flags)
    for name, response in (("test", "chosen"), ("demonstrations-train", "response")):
        for row in map(json.loads, (tmp_path / "run" / "data" / f"{name}.jsonl").read_text().splitlines()):
            assert row["prompt"].startswith("\n\nHuman: ") and row["prompt"].endswith("\n\nAssistant:") and row["style"] == "dialogue"
            assert row[response].startswith(" ")
    assert manifest(tmp_path / "run" / "data")["results"]["left_out_of_demonstrations"] == {"test prompt": 5}


def test_a_dialogue_does_not_go_on_from_one_part_or_fold_into_another(tmp_path):
    """Rows of HH that are one dialogue, longer and longer, go to a part together or not at all, and no fold model scores what goes on from, or
    into, what it learnt from."""
    rows = []
    for n in range(60):
        turns = f"\n\nHuman: Name {n} fruits.\n\nAssistant: Figs.\n\nHuman: And more?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant:".split(" Figs.")
        for prompt in (turns[0], " Figs.".join(turns).rpartition("\n\nHuman: Why")[0].rpartition(" No.")[0], " Figs.".join(turns)):
            rows.append({"chosen": f"{prompt} Yes {n}.", "rejected": f"{prompt} No."})
    write_rows(tmp_path / "rows.jsonl", rows)
    here("--stage", "tokenizer", "--out", tmp_path / "run", "--data", f"hh:{tmp_path / 'rows.jsonl'}", "--test-share", 0.3, "--validation-share", 0.3)
    first = {part: {pair.prompt.split(" Figs.")[0] for pair in load_pairs(tmp_path / "run" / "data", part)} for part in ("train", "validation", "test")}
    assert 5 < len(first["test"]) < 30 and 5 < len(first["validation"]) < 30 and sum(map(len, first.values())) == 60
    assert all(len(load_pairs(tmp_path / "run" / "data", part)) == 3 * len(found) for part, found in first.items())
    for stage in ("sft", "rm"):
        here("--stage", stage, "--out", tmp_path / "run", *BUDGETS[stage])
    fold_of = {line["id"]: line["fold"] for line in map(json.loads, (tmp_path / "run" / "rm" / "scores.jsonl").read_text().splitlines())}
    folds = {dialogue: {fold_of[p.id] for p in load_pairs(tmp_path / "run" / "data", "train") if p.prompt.startswith(dialogue)} for dialogue in first["train"]}
    assert {frozenset(of) for of in folds.values()} == {frozenset({0}), frozenset({1})}


def test_nor_from_a_file_of_test_data_into_training_or_demonstrations(tmp_path):
    """Where a file of test pairs goes on from, or into, the dialogues of training, the latter are left out."""

    def rows(numbers, turns):
        prompts = [f"\n\nHuman: Name {n} fruits.\n\nAssistant: Figs." + "\n\nHuman: More?\n\nAssistant:" * turns for n in numbers]
        return [{"chosen": f"{prompt} Yes.", "rejected": f"{prompt} No."} for prompt in prompts]

    train, test = (write_rows(tmp_path / f"{name}.jsonl", rows(numbers, turns)) for name, numbers, turns in (("train", range(60), 1), ("test", range(40, 70), 2)))
    shown = [{"prompt": f"\n\nHuman: Name {n} fruits.\n\nAssistant: Figs.\n\nHuman: So?\n\nAssistant:", "response": " Figs."} for n in range(10, 50)]
    shown = write_rows(tmp_path / "shown.jsonl", shown)
    flags = ("--data", f"hh:{train}", "--test-data", f"hh:{test}", "--demonstrations", f"jsonl:{shown}", "--validation-share", 0.2)
    assert "20 training pairs in all" in here("--stage", "tokenizer", "--out", tmp_path / "run", *flags, "--strict", expect=3)
    assert "20 such training pairs are left out" in here("--stage", "tokenizer", "--out", tmp_path / "run", *flags)
    results = manifest(tmp_path / "run" / "data")["results"]
    assert results["shared_with_test"] == 20 and results["pairs"]["test"] == 30 and sum(results["pairs"].values()) == 70
    assert results["left_out_of_demonstrations"] == {"test prompt": 10}


def test_dialogues_with_two_prompts_are_dropped(tmp_path):
    rows = [{key: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[key]}" for key in ("chosen", "rejected")} for row in GOOD]
    rows.insert(5, {"chosen": "\n\nHuman: Hi.\n\nAssistant: a", "rejected": "\n\nHuman: Hello.\n\nAssistant: b"})
    output, run = tokenizer_stage(tmp_path, rows, kind="hh")
    assert left_out(run) == {"chosen and rejected have different prompts": 1} and "different prompts" in output


# ---- long rows, odd characters, small data (cases 8, 9, 12)


def test_long_prompts_and_responses_are_cut_and_counted(tmp_path):
    rows = [*GOOD, *(row | {"prompt": row["prompt"] * 40, "chosen": row["chosen"] * 30} for row in GOOD[:20])]
    _, run = tokenizer_stage(tmp_path, rows, "--max-prompt", 40, "--max-response", 16)
    here("--stage", "sft", "--out", run, *SHORT)
    output = here("--stage", "rm", "--out", run, "--folds", 1, *SHORT)
    found = re.search(r"train: (\d+) pairs; (\d+) prompts shortened, (\d+) responses cut", output)
    longest = [pair for pair in load_pairs(run / "data", "train") if len(pair.prompt) > 100]
    assert len(longest) > 10 and int(found[2]) == len(longest)
    assert int(found[3]) >= len(longest)


def test_prompts_that_never_fit_stop_the_stage_and_leave_no_folder(tmp_path):
    _, run = tokenizer_stage(tmp_path, GOOD, "--max-prompt", 1)
    message = here("--stage", "sft", "--out", run, *SHORT, expect=3)
    assert "fits --max-prompt 1; raise it" in message and not (run / "sft").exists()


def test_special_looking_text_is_text(tmp_path):
    """Names of control pieces, NUL, sentencepiece's own signs and a line of a megabyte."""
    odd = "</s><s><pad><unk> [INST] <|endoftext|> \0 \u2581 \u2585 <0x0A> \U0001f600"
    rows = [*GOOD, {"prompt": odd, "chosen": odd + "a", "rejected": odd}, {"prompt": "ab " * 350_000, "chosen": "x", "rejected": "y" * 1_000_000}]
    _, run = tokenizer_stage(tmp_path, rows, "--vocab-size", 384)
    tokenizer = Tokenizer(run / "tokenizer" / "tokenizer.model")
    assert not set(tokenizer.encode(odd)) & {0, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert tokenizer.decode(tokenizer.encode(odd)) == odd
    here("--stage", "sft", "--out", run, *SHORT)
    assert all(math.isfinite(line["loss"]) for line in steps(run / "sft"))


def test_fewer_rows_than_a_batch_make_a_smaller_batch(tmp_path):
    """A better end than an error: 12 rows train in steps of all rows, and PPO goes round few prompts."""
    _, run = tokenizer_stage(tmp_path, GOOD[:14], "--test-share", 0.2, "--validation-share", 0.2)
    rows = len(load_pairs(run / "data", "train"))
    assert rows < 32
    here("--stage", "sft", "--out", run, "--epochs", 3, "--validations", 1, "--batch-size", 16)
    assert [line["step"] for line in steps(run / "sft")] == [0, 1, 2]
    here("--stage", "rm", "--out", run, "--epochs", 1, "--validations", 1)
    here("--stage", "split", "--out", run, "--rule", "none")
    here("--stage", "dpo", "--out", run, "--epochs", 1, "--validations", 1)
    here("--stage", "ppo", "--out", run, "--iterations", 1, "--prompts-per-iteration", 20, "--validations", 1)
    assert math.isfinite(steps(run / "ppo")[0]["policy_loss"])


# ---- one prompt in two parts (case 10)


def test_a_test_prompt_in_training_is_removed_with_a_warning_or_refused(tmp_path):
    test = write_rows(tmp_path / "test.jsonl", [row | {"chosen": "another"} for row in GOOD[:7]])
    flags = ("--test-data", f"jsonl:{test}")
    message, run = tokenizer_stage(tmp_path, GOOD, *flags, "--strict", expect=3)
    assert "rows.jsonl:1" in message and "7 training pairs" in message and not snapshot(run)
    output, run = tokenizer_stage(tmp_path, GOOD, *flags)
    assert "is also in the test data; 7 such training pairs are left out" in output
    results = manifest(run / "data")["results"]
    assert results["shared_with_test"] == 7 and results["pairs"]["test"] == 7 and sum(results["pairs"].values()) == 60


# ---- a threshold that leaves one half empty (case 14)


def test_a_threshold_beyond_all_gaps_is_refused_with_one_that_works(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "split", "dpo", "ppo")
    for flags in (("--threshold", 1000), ("--threshold", 0, "--disputed", "drop")):
        message = here("--stage", "split", "--out", run, "--rule", "threshold", *flags, expect=2)
        assert "half is empty" in message and "quantiles of the undisputed gaps: " in message and not (run / "split").exists()
    here("--stage", "split", "--out", run, *re.search(r"try (--rule threshold --threshold \S+)", message)[1].split())
    assert manifest(run / "split")["results"]["easy"] > 0 and manifest(run / "split")["results"]["difficult"] > 0


# ---- policies that say nothing, or never stop (cases 17 and 18)


def one_token_policy(folder, tokenizer_file, logit):
    """A model whose end token has this logit whatever was read, all others 0."""
    tokenizer = Tokenizer(tokenizer_file)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=2, feed_forward=16, context=200, tied=False
    )
    model = LanguageModel(config)
    initialise(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "output" in name or "down" in name:
                parameter.zero_()  # the layers add nothing, so the last state is the embedding
        model.trunk.embedding.weight.zero_()[:, 0] = 1.0  # which after the norm is 4 = sqrt(16) in one place
        model.lm_head.weight.zero_()[tokenizer.eos_id, 0] = logit / 4
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    save_model(model, folder, special_ids=ids, is_main=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.mark.parametrize("logit, warning, empty", [(30.0, "collapsed: 100 % of the responses are empty", 1.0), (-30.0, "eos_rate=0", 0.0)])
def test_empty_and_endless_responses_warn_and_stay_finite(chain, tmp_path, logit, warning, empty):
    run = copy_of(chain, tmp_path / "run", "ppo")
    policy = one_token_policy(tmp_path / "policy", run / "tokenizer" / "tokenizer.model", logit)
    output = here("--stage", "ppo", "--out", run, "--init", policy, "--ref", policy, "--end-penalty", 2.5, *BUDGETS["ppo"])
    assert f"warning: ppo: {warning}" in output
    lines = steps(run / "ppo")
    assert all(math.isfinite(value) for line in metrics(run / "ppo") for value in line.values())
    stats = json.loads((run / "rm" / "config.json").read_text())
    penalty = 0.0 if empty else 2.5  # subtracted in units of score, from responses without end token alone
    assert lines[0]["empty"] == empty and lines[0]["ended"] == empty
    assert lines[0]["length"] == (1 if empty else 24)
    assert lines[0]["score"] == pytest.approx((lines[0]["raw_score"] - stats["score_mean"]) / stats["score_std"] - penalty, abs=1e-3)


# ---- weights that do not fit (cases 24 and 25)


def test_models_of_another_kind_are_refused(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    before = snapshot(run)
    assert "holds a reward model where a language model is needed" in here("--stage", "dpo", "--out", run, "--init", run / "rm", expect=4)
    assert "holds a reward model" in here("--stage", "dpo", "--out", run, "--ref", run / "rm", expect=4)
    flags = ("--init", run / "sft", "--ref", run / "sft")
    assert "holds a language model" in here("--stage", "ppo", "--out", run, *flags, "--reward-model", run / "sft", expect=4)
    assert "score_mean" in here("--stage", "ppo", "--out", run, *flags, "--reward-model", run / "rm" / "fold-0", expect=4)
    assert "no model is there" in here("--stage", "dpo", "--out", run, "--init", run / "tokenizer", expect=2)
    assert "nowhere" in here("--stage", "dpo", "--out", run, "--init", tmp_path / "nowhere", expect=2)
    assert not {name for name in snapshot(run) if name.startswith(("dpo", "ppo"))}
    assert {name: digest for name, digest in snapshot(run).items() if name in before} == before


def foreign_copy(chain, folder, **config):
    """The SFT model without our manifest, and with some fields of its config.json changed."""
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).write_bytes((chain / "sft" / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((chain / "sft" / "config.json").read_text()) | config))
    return folder


def test_another_architecture_is_refused_with_its_first_mismatches(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    layers = json.loads((chain / "sft" / "config.json").read_text())["num_hidden_layers"]
    deeper = foreign_copy(chain, tmp_path / "deeper", num_hidden_layers=layers + 1)
    message = here("--stage", "dpo", "--out", run, "--init", deeper, expect=4)
    assert message.count("is missing") == 5 and f"model.layers.{layers}." in message
    wider = foreign_copy(chain, tmp_path / "wider", vocab_size=999)
    message = here("--stage", "dpo", "--out", run, "--init", wider, expect=4)
    assert "model.embed_tokens.weight has shape" in message and "(999, " in message
    biased = foreign_copy(chain, tmp_path / "biased", attention_bias=True)
    assert "attention_bias = True is not supported" in here("--stage", "dpo", "--out", run, "--init", biased, expect=4)
    assert not (run / "dpo").exists()


def test_another_tokenizer_is_refused(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    other = foreign_copy(chain, tmp_path / "other")
    (tmp_path / "plain").mkdir()
    _, small = tokenizer_stage(tmp_path / "plain", GOOD)
    (other / "tokenizer.model").write_bytes((small / "tokenizer" / "tokenizer.model").read_bytes())
    assert "is not the tokenizer of this run" in here("--stage", "dpo", "--out", run, "--init", other, expect=4)
    assert not (run / "dpo").exists()


def test_damaged_weights_are_refused(chain, tmp_path):
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    changes = {"cut": lambda raw: raw[:-100], "longer": lambda raw: raw + bytes(8), "nothing": lambda raw: b"", "noise": lambda raw: b"\xff" * 100}
    for name, change in changes.items():
        broken = foreign_copy(chain, tmp_path / name)
        (broken / "model.safetensors").write_bytes(change((broken / "model.safetensors").read_bytes()))
        assert "not a whole safetensors file" in here("--stage", "dpo", "--out", run, "--init", broken, expect=4)
    parted = foreign_copy(chain, tmp_path / "parted")
    (parted / "model.safetensors").rename(parted / "model-00001-of-00002.safetensors")
    listed = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (parted / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    message = here("--stage", "dpo", "--out", run, "--init", parted, expect=4)
    assert "lists 'model-00002-of-00002.safetensors', which is no safetensors file of this folder" in message
    assert not (run / "dpo").exists()


# ---- a stale cache (case 30)


def test_a_reference_cache_is_used_whole_or_not_at_all(chain, tmp_path):
    """Cut, without a row, or with another number: refused by name. Of another reference: not looked at. Removed: made again."""
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    (cache,) = (run / "cache").iterdir()
    whole = cache.read_text()
    kept = json.loads(whole)
    row, numbers = next(iter(kept["logps"].items()))
    others = {name: value for name, value in kept["logps"].items() if name != row}
    changed = {**others, row: [numbers[0] + 1, numbers[1]]}
    for damage in (whole[: len(whole) // 2], *(json.dumps(kept | {"logps": logps}) for logps in (others, changed))):
        cache.write_text(damage)
        before = snapshot(run)
        message = here("--stage", "dpo", "--out", run, *BUDGETS["dpo"], expect=4)
        assert str(cache) in message and re.search("make it again|made anew", message)
        assert snapshot(run) == before
    (snapshot_of_sft, *_) = sorted((run / "sft").glob("snapshot-*"))
    here("--stage", "dpo", "--out", run, "--ref", snapshot_of_sft, *BUDGETS["dpo"], "--max-kl", 1000)
    assert len(list((run / "cache").iterdir())) == 2 and cache.read_text() == damage
    assert manifest(run / "dpo")["results"]["kl_ref_seq"] > 3  # SFT as it began is far from SFT as it ended
    shutil.rmtree(run / "dpo")
    cache.unlink()
    here("--stage", "dpo", "--out", run, *BUDGETS["dpo"])
    assert cache.read_text() == whole and sha256(run / "dpo" / "model.safetensors") == sha256(chain / "dpo" / "model.safetensors")


class Intruder:
    """A pickle whose loading writes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "tokenizer.model", "config.json"])
def test_a_pickle_is_never_opened(chain, tmp_path, name):
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    folder, intruded = foreign_copy(chain, tmp_path / "evil"), tmp_path / "intruded"
    if name not in ("config.json", "tokenizer.model"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Intruder(intruded)))
    message = here("--stage", "dpo", "--out", run, "--init", folder, expect=4)
    assert name in message and not intruded.exists() and not (run / "dpo").exists()
    if name == "tokenizer.model":
        out = tmp_path / "new"
        assert name in here("--stage", "tokenizer", "--out", out, "--pairs", 60, "--test-prompts", 5, "--file", folder / name, expect=4)
        assert not intruded.exists() and not (out / "tokenizer").exists()
    pickle.loads(pickle.dumps(Intruder(intruded))).close()
    assert intruded.exists()  # the trap works


def test_no_file_of_the_program_can_open_a_pickle():
    for path in [*ROOT.glob("*.py"), *(path for room in ("data", "losses", "model", "rl") for path in (ROOT / room).glob("*.py"))]:
        assert not re.search(r"\bpickle\.|\btorch\.load\(|weights_only", path.read_text()), path


def test_a_tokenizer_file_that_is_not_there(tmp_path):
    message = here("--stage", "tokenizer", "--out", tmp_path / "run", "--pairs", 60, "--file", tmp_path / "nowhere.model", expect=2)
    assert "nowhere.model" in message


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = here("--stage", "tokenizer", "--out", tmp_path / "file", "--pairs", 60, expect=6)
    assert "cannot be written" in message and (tmp_path / "file").read_text() == "in the way"


def test_the_models_of_the_chain_can_be_read_after_all(chain):
    """The refusals above are no proof if nothing at all can be loaded."""
    assert load_model(chain / "dpo", LanguageModel).config.vocab_size > 256
