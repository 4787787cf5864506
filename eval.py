"""What a run's models are worth, side by side; or one model's answer to one prompt.

    python eval.py --run runs/mpo                           the comparison: printed, and written to DIR/eval/report.md and report.json
    python eval.py --run runs/mpo --models dpo,ppo --greedy
    python eval.py --run runs/mpo --best-of 4,16            and the reward model's pick of so many of SFT's answers
    python eval.py --model runs/mpo/ppo --prompt "Name three fruits."
    python eval.py --run runs/mpo --models ppo,dpo --judge-out pairs.jsonl      blind pairs for an outside judge; --judge-in reads its verdicts
    python eval.py --compare runs/ablations                 tables and pictures of a grid

Every model answers the same test prompts with the same random numbers per prompt: answers are paired, and the same seed gives the same
report. An answer is judged in up to three ways, a model also by how far it has gone:

  reward model   the log-odds of DIR/rm (raw), and in standard deviations of its scores on chosen responses (normalised), which PPO raises
  true reward    only in the built-in worlds: what the text is really worth, and whether it is well-formed at all
  wins           against the data's chosen response and against SFT's answer to the same prompt, by the true reward in worlds and by the
                 reward model elsewhere; a tie is half a win
  KL             to SFT and to the model's own reference: over the whole vocabulary, summed over the response's tokens, on the model's
                 own samples at temperature 1 (drawn apart where the answers are decoded in another way)

Two rows are no models but marks: the data's chosen responses and, in worlds, the best response. Everything runs in one process. How models
answer and are judged stands in model/answers.py, how a grid is compared in data/compare.py.
"""

import argparse
import dataclasses
import functools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import compare, pictures
from data.batches import encode_prompt
from data.errors import UsageError
from data.examples import in_form
from data.files import atomic_write, model_digest, read_json, write_json
from data.flags import Parser, add_flags, flag, take_flags
from data.grid import read_rows
from data.judge import judged, judged_text, read_verdicts, write_questions
from data.prepare import form_of, load_pairs
from data.report import printable, report_text
from data.run import MANIFEST, check_run_folder, command_for, identity, open_stage, parent_key
from data.synthetic import WORLDS, best_response
from data.tokenizer import Tokenizer
from model.answers import (
    Answers, EvalFlags, Question, Setting, best_of, judge, measure, model_answers, numbers_of, open_reward_model, pair_preferences,
    pick_questions, reference_folder, sample,
)  # fmt: skip
from model.checkpoint import CONFIG, config_from_json
from model.parallel import DeviceFlags, World, exit_code, start
from model.stage import Text, check_vocabularies

STAGES = ("sft", "dpo", "ppo")  # whose models are compared, in this order
SHOWN, QUICK_PROMPTS = 3, 64  # prompts whose answers are printed; prompts under --quick


@dataclass(frozen=True)
class CommandFlags:
    run: str | None = flag(None, "folder of the run whose models are compared")
    model: str | None = flag(None, "folder of one model, to answer --prompt")
    compare: str | None = flag(None, "folder of a grid made by train.py --stage ablations, or its file of rows: tables and pictures")
    prompt: str | None = flag(None, "what --model answers; made a dialogue's human turn where the model's run is about dialogues")
    raw: bool = flag(False, "take --prompt as it is")
    judge_out: str | None = flag(None, "with --run and --models A,B (or A, against the data's chosen): write blind pairs of their answers here")
    judge_in: str | None = flag(None, "with --run: read verdicts on such pairs from here, and report")
    quick: bool = flag(False, f"{QUICK_PROMPTS} prompts")
    device: str = flag("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("fp32", "what matrix products run in", choices=("fp32", "bf16"))


# ---------------------------------------------------------------- a run's comparison


def compare_run(folder: Path, world: World, flags: EvalFlags, judge_out: Path | None = None) -> str:
    """Compares the models of a run; prints the report, writes it to DIR/eval/report.md and report.json (report-validation of that part), and
    returns it. With judge_out, writes blind pairs of two models' answers there instead, their key into DIR/eval/keys, and returns what to
    do with them.

    Only the calling process works, whatever `world` says of others. Raises UsageError for what is missing, CheckpointError for what does
    not fit together or has broken weights, NumericalError where what a model says is not finite all the same.
    """
    # 1. what is there, and whether it fits together
    folder, world = Path(folder), dataclasses.replace(world, rank=0, size=1, parallel="ddp", offload=False)
    if judge_out:
        flags = dataclasses.replace(flags, distances=False)
    check_run_folder(folder, "--run")
    made_with = open_stage(folder / "data", command_for("mpo", folder))["flags"]
    names = model_names(folder, flags.models)
    asked_about = names if len(names) == 2 else [*names, "chosen"]
    if judge_out and len(asked_about) != 2:
        raise UsageError(f"--judge-out: compares two models, or one with the data's chosen responses; --models gives {', '.join(names)}")
    path = folder / "tokenizer" / "tokenizer.model"
    limits = Text(Tokenizer(path), path, made_with["max_prompt"], made_with["max_response"])
    # a test file from elsewhere need not hold prompts that the world can judge
    world_name = made_with["data"] if made_with["data"] in WORLDS and not made_with["test_data"] else None
    if made_with["data"] in WORLDS and not world_name:
        print(f"no true reward: prompts of --test-data need not be ones that {made_with['data']} can judge")
    setting = Setting(limits, world, flags, world_name)
    reward_model, stats, reward_folder = open_reward_model(folder, setting)
    judging = identity(parent_key(reward_folder))
    for name in names:
        if flags.distances:
            check_vocabularies(folder / name, ref=folder / "sft")
        of_training = read_json(folder / name.split("/")[0] / MANIFEST)["parents"].get("rm")
        if of_training and identity(of_training) != judging:
            print(f"careful: {name} was trained with another reward model, {of_training['path']}, than {reward_folder}, which judges here")
        if flags.distances and (ref := reference_folder(folder, name)) and folder.resolve() not in ref.parents:
            print(f"careful: {name} was trained with a reference that is not of this run, {ref}")
    questions, left_out = pick_questions(load_pairs(folder / "data", flags.part), setting)
    # 2. everybody answers, everything is judged
    answers = {"chosen": setting.written([q.chosen for q in questions], questions)}
    if world_name:
        answers["best"] = setting.written([best_response(world_name, q.prompt) for q in questions], questions)
    digests = {name: model_digest(folder / name) for name in dict.fromkeys(["sft", *names])}
    found, distances = model_answers(folder, digests, questions, setting)
    if flags.best_of:
        picked, bounds = best_of(folder, found["sft"], questions, setting)
        found, distances = found | picked, distances | bounds
    answers = judge(answers | found, questions, reward_model, setting)
    if judge_out:
        return ask_judge(judge_out, folder, asked_about, answers, questions, setting)
    # 3. the report
    shown = [name for name in answers if name != "sft" or name in names]
    preferences = pair_preferences(folder, digests, questions, setting) if flags.distances else {}
    rows = {name: measure(name, answers, questions, stats, setting) | distances.get(name, {}) | preferences.get(name, {}) for name in shown}
    samples = [sample(i, question.prompt, {name: answers[name] for name in shown}) for i, question in enumerate(questions[:SHOWN])]
    report = {
        "run": str(folder), "data": made_with["data"], "world": world_name, "reward_model": str(reward_folder),
        "wins_judged_by": "true reward" if world_name else "reward model",
        "decoding": "greedy" if flags.greedy else f"sampled at temperature {flags.temperature:g}",
        "seed": flags.seed, "part": flags.part, "prompts": len(questions), "left_out": left_out, "max_response": limits.max_response,
        "rows": rows, "samples": samples,
    }  # fmt: skip
    text, name = report_text(report), "report" if flags.part == "test" else f"report-{flags.part}"
    write_json(folder / "eval" / f"{name}.json", report)
    atomic_write(folder / "eval" / f"{name}.md", text)
    print(text)
    return text


def ask_judge(path: Path, folder: Path, names: list[str], answers: dict[str, Answers], questions: Sequence[Question], setting: Setting) -> str:
    """Writes the answers of two models as blind pairs for an outside judge."""
    first, second = (answers[name] for name in names)
    pairs = [
        {"prompt": question.prompt.strip(), "first": first.texts[i].strip(), "second": second.texts[i].strip(),
         "raw": [float(first.raw[i]), float(second.raw[i])], "true": None if first.true is None else [float(first.true[i]), float(second.true[i])]}
        for i, question in enumerate(questions)
    ]  # fmt: skip
    style = load_pairs(folder / "data", setting.flags.part)[0].style
    count = write_questions(path, folder / "eval" / "keys", (names[0], names[1]), pairs, style, setting.flags.seed)
    text = f"{count} pairs for a judge in {path}; report its verdicts with: python eval.py --run {shlex.quote(str(folder))} --judge-in FILE"
    print(text)
    return text


def model_names(folder: Path, asked: str | None) -> list[str]:
    """The models to compare, as paths inside the run. Raises UsageError where one, or SFT, is not there or not finished."""
    names = []
    for pattern in asked.split(",") if asked else [name for name in STAGES if (folder / name / MANIFEST).exists()]:
        stage = pattern.split("/")[0]
        if stage in STAGES:
            open_stage(folder / stage, command_for(stage, folder), (stage,))
        found = models_in(folder, pattern) if stage in STAGES else []
        if not found:
            there = [name for stage in STAGES for name in models_in(folder, f"{stage}/**")]
            raise UsageError(f"--models {asked}: no model {pattern!r} in {folder}; there are {', '.join(there) or 'none'}")
        names += found
    open_stage(folder / "sft", command_for("sft", folder), ("sft",))  # all are compared with it
    return list(dict.fromkeys(names))


def models_in(folder: Path, pattern: str) -> list[str]:
    """The models of a run whose folders fit a pattern, in order. A critic answers nothing."""
    return sorted(str(path.parent.relative_to(folder)) for path in folder.glob(f"{pattern}/{CONFIG}") if path.parent.name != "critic")


# ---------------------------------------------------------------- a grid's comparison


def compare_rows(path: Path) -> None:
    """Prints a grid's tables and writes them beside its rows: report.md, rows.csv, and pictures where matplotlib is installed.
    Raises UsageError where there are no rows."""
    file = path if path.suffix == ".jsonl" else path / "rows.jsonl"
    lines = read_rows(file)
    if not lines:
        raise UsageError(f"--compare {path}: no rows in {file}; make some with: {command_for('ablations', file.parent)}")
    parts = []
    for index, (setting, part) in enumerate(compare.by_setting(lines).items()):
        parts += [f"## {setting}\n", compare.compared(part)]
        folder = file.parent / (f"pictures-{index + 1}" if index else "pictures")
        try:
            parts.append("\n".join(f"![{picture.stem}]({picture.relative_to(file.parent)})" for picture in pictures.draw(part, folder)) + "\n")
        except ImportError:
            parts.append(f"No pictures: matplotlib is missing; install it with: {pictures.INSTALL}\n")
    text = "\n".join(parts)
    atomic_write(file.parent / "report.md", text)
    atomic_write(file.parent / "rows.csv", compare.as_csv(lines))
    print(text)


# ---------------------------------------------------------------- one answer, and the command line


def answer_prompt(folder: Path, prompt: str, raw: bool, world: World, flags: EvalFlags) -> str:
    """One model's answer to one prompt. The limits are those of the run that the folder is part of, else half of the model's context."""
    if not (folder / CONFIG).exists():
        raise UsageError(f"--model {folder}: no model is there; give a model's folder, such as runs/mpo/ppo")
    beside = [place / "data" / MANIFEST for place in folder.resolve().parents[:2]]  # of a stage, or of a stage's snapshot
    described = next((read_json(path)["flags"] for path in beside if path.exists()), {})
    half = config_from_json(read_json(folder / CONFIG), folder / CONFIG).context // 2
    path = folder / "tokenizer.model"
    text = Text(Tokenizer(path), path, described.get("max_prompt", half), described.get("max_response", half))
    setting = Setting(text, world, flags)
    if not prompt.strip():
        raise UsageError("--prompt: is empty; give some text")
    prompt, style = in_form(prompt, form_of(described) if described else None, raw)
    ids, shortened = encode_prompt(prompt, style, text.tokenizer, text.max_prompt)
    if not ids:
        raise UsageError(f"--prompt: does not fit into the {text.max_prompt} tokens of this model's prompts; shorten it")
    if shortened:
        print(f"warning: the prompt was shortened to {text.max_prompt} tokens", file=sys.stderr)
    question = Question(prompt, "", ids)
    answers = setting.answer(setting.load(folder), [question], "answer", greedy=flags.greedy, temperature=flags.temperature)
    return answers.texts[0].strip()


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and does what it says."""
    help_format = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=140)
    parser = Parser(description=__doc__, formatter_class=help_format, allow_abbrev=False)
    add_flags(parser, CommandFlags)
    add_flags(parser, EvalFlags)
    given = vars(parser.parse_args(arguments))
    check_flags(given)
    if "compare" in given:
        compare_rows(Path(given["compare"]))
        return
    quick = {"prompts": QUICK_PROMPTS} if given.get("quick") else {}
    command, flags = take_flags(CommandFlags, given), take_flags(EvalFlags, given, **quick)
    world = start(DeviceFlags(device=command.device, dtype=command.dtype))
    if command.judge_in:
        text = judged_text(judged(*read_verdicts(Path(command.judge_in), Path(command.run) / "eval" / "keys")))
        atomic_write(Path(command.run) / "eval" / "judged.md", text)
        print(text)
    elif command.run is not None:
        compare_run(Path(command.run), world, flags, Path(command.judge_out) if command.judge_out else None)
    else:
        print(printable(answer_prompt(Path(command.model), command.prompt, command.raw, world, flags)))


def check_flags(given: dict) -> None:
    """Raises UsageError for flags that do not go together."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("eval.py runs in one process; start it as: python eval.py ... , not by torchrun")
    if sum(mode in given for mode in ("run", "model", "compare")) != 1:
        raise UsageError('give either --run DIR, to compare its models, --model DIR --prompt "...", to have one answer, or --compare DIR, for a grid')
    if "compare" in given and len(given) > 1:
        raise UsageError(f"--{next(name for name in given if name != 'compare').replace('_', '-')}: is not read with --compare; leave it out")
    if "compare" in given:
        return
    if "judge_in" in given and len(given) > 2:
        raise UsageError("--judge-in: needs --run alone; the pairs were made when --judge-out wrote them")
    if "judge_out" in given and "models" not in given:
        raise UsageError("--judge-out: say with --models whose answers are judged: two models, or one, against the data's chosen responses")
    if "best_of" in given:
        numbers_of(given["best_of"])
        for name in sorted({"greedy", "temperature", "judge_out"} & set(given)):
            raise UsageError(f"--{name.replace('_', '-')}: the answers of --best-of are sampled at temperature 1 and judged here; leave one of the two out")
    mode, unread = ("--run", {"prompt", "raw"}) if "run" in given else ("--model", {"best_of", "distances", "models", "prompts", "part", "reward_model", "batch", "quick", "judge_out", "judge_in"})
    for name in sorted(unread & set(given)):
        raise UsageError(f"--{name.replace('_', '-')}: is not read with {mode}; leave it out")
    if mode == "--model" and "prompt" not in given:
        raise UsageError('--model: give what it shall answer, too: --prompt "..."')
    if given.get("greedy") and "temperature" in given:
        raise UsageError(f"--greedy, --temperature {given['temperature']}: greedy decoding has no temperature; leave one of them out")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
