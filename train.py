"""Mixed Preference Optimization, stage by stage or in one go: which stage, from which checkpoint, with which numbers.

    python train.py --stage mpo                       everything on the built-in world `advice`, on a CPU
    python train.py --stage dpo --out runs/a --lr 1e-5      one stage of a run whose earlier stages are there
    torchrun --nproc_per_node 8 train.py --stage ppo ...    any stage on several GPUs

    stage      reads                          writes
    tokenizer  DIR/data                       DIR/tokenizer    (DIR/data is made from --data by whichever of this and mpo comes first)
    sft        tokenizer                      DIR/sft          next-token loss on the chosen responses
    rm         sft                            DIR/rm           Bradley-Terry reward model, fold models, the score of every training pair
    split      rm's scores                    DIR/split        easy and difficult pairs by reward gap
    dpo        sft, split, rm                 DIR/dpo          DPO on the easy pairs, reference = SFT
    ppo        dpo, rm, split                 DIR/ppo          PPO on the difficult prompts, start and reference = DPO: the MPO model
    mpo        all of these in order, then the comparison that eval.py makes
    ablations  the rows of data/ablations.py over seeds, each in processes of its own, and one line for each in OUT/rows.jsonl

In a chain a stage's flag takes the stage's name: --dpo-lr. `--stage X --help` lists what X reads. data/errors.py lists exit codes.
"""

import argparse
import dataclasses
import math
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

from data.errors import UsageError
from data.examples import paths_of
from data.files import read_json
from data.flags import Parser, add_flags, take_flags, typed_names
from data.grid import GridFlags, run_grid
from data.prepare import DataFlags, WorldFlags, check_data_flags, prepare_data
from data.run import CHANGE_NO_RESULT, FLAGS, MANIFEST, check_run_folder
from data.split import SplitFlags, check_split_flags
from data.synthetic import WORLDS
from data.tokenizer import Tokenizer, tokenizer_file
from eval import QUICK_PROMPTS, compare_run
from losses.dpo import PREFERENCE_LOSSES, loss_flags
from model.answers import EvalFlags
from model.checkpoint import CONFIG, count_parameters, open_model
from model.heads import LanguageModel, ScalarModel
from model.offline import (
    DpoFlags, LossFlags, ModelFlags, RmFlags, SftFlags, TokenizerFlags, check_given_gaps, check_rm, check_tokenizer, chosen_loss, dpo_stage, rm_stage,
    sft_stage, split_stage, tokenizer_stage, tokenizers_place,
)  # fmt: skip
from model.optim import BY_SIZE, for_size
from model.parallel import ALONE, FEWER, DeviceFlags, exit_code, start
from model.plan import Counts, PlanFlags, plan_job, plan_text, planned_config
from model.resume import LoopFlags
from model.stage import Run, RunFlags, Text, check_context, check_vocabularies
from rl.online import PpoStageFlags, check_ppo, ppo_stage

CHAIN = ("tokenizer", "sft", "rm", "split", "dpo", "ppo")
STAGE_FLAGS = {
    "tokenizer": (TokenizerFlags,),
    "sft": (SftFlags,),
    "rm": (RmFlags,),
    "split": (SplitFlags,),
    "dpo": (DpoFlags, LossFlags),
    "ppo": (PpoStageFlags,),
}
QUICK = {
    "data": {"pairs": 400, "test_prompts": 32},
    "sft": {"epochs": 3.0, "validations": 2},
    "rm": {"validations": 1},
    "dpo": {"validations": 2},
    "ppo": {"iterations": 3, "prompts_per_iteration": 32, "validations": 1},
    "ablations": {"only": "dpo-all,ppo-all,mpo", "seeds": "1,2"},
}


def check_loss_names() -> None:
    """Raises ValueError where an argument of a loss, which becomes a flag, has the name of one that --stage dpo has already, or another type elsewhere."""
    taken = {field.name for group in (DpoFlags, RunFlags, LoopFlags, PlanFlags, DeviceFlags, DataFlags, WorldFlags) for field in dataclasses.fields(group)}
    kinds: dict[str, type] = {}
    for loss, function in PREFERENCE_LOSSES.items():
        if clash := sorted(taken & set(loss_flags(function))):
            raise ValueError(f"losses/dpo.py: {loss}: its argument {clash[0]} has the name of a flag of --stage dpo; choose another")
        for name, (kind, *_) in loss_flags(function).items():
            if kinds.setdefault(name, kind) is not kind:
                raise ValueError(f"losses/dpo.py: {loss}: its argument {name} is of type {kind.__name__}, and another loss's {kinds[name].__name__}; choose another name")


def mpo(run: Run) -> None:
    """The whole chain, then the comparison of its models."""
    if run.take("split", SplitFlags).gaps == "given":
        with typed_names((SplitFlags,), "split-"):
            check_given_gaps(run)
    for stage in CHAIN:
        with typed_names(STAGE_FLAGS[stage], f"{stage}-"):
            STAGES[stage](run)
    if run.world.is_main:
        flags = EvalFlags(prompts=QUICK_PROMPTS) if run.flags.quick else EvalFlags()
        compare_run(run.folder, dataclasses.replace(run.world, size=1, rank=0), dataclasses.replace(flags, seed=run.flags.seed))
        out = shlex.quote(str(run.folder))
        print(
            f"\nnext: python eval.py --model {out}/ppo --prompt \"...\"      talk to the MPO model\n"
            f"      python eval.py --run {out} --greedy            compare again, decoding greedily\n"
            f"      python train.py --stage dpo --help                    what a stage can be told"
        )


STAGES = {
    "tokenizer": tokenizer_stage,
    "sft": sft_stage,
    "rm": rm_stage,
    "split": split_stage,
    "dpo": dpo_stage,
    "ppo": ppo_stage,
    "mpo": mpo,
}


def plan(run: Run, stage: str) -> None:
    """Prints what the stage, or every stage of the chain, would need; reads no more than a model's config.json."""
    asked, model, device = (take_flags(group, run.given) for group in (PlanFlags, ModelFlags, DeviceFlags))
    for name in CHAIN if run.chain else (stage,):
        if name not in BY_SIZE:
            continue
        flags, prefix = run.take(name, STAGE_FLAGS[name][0]), f"{name}-" if run.chain else ""
        if name == "rm" and flags.reward_model:
            print(f"\n[rm] trains nothing: it takes {flags.reward_model} as it is")
            continue
        init, limits = model.init or getattr(flags, "init", None), take_flags(DataFlags, run.given)
        config = planned_config(asked.size, init, run.flags.out)
        if init:
            check_context(Path(init), config, limits.max_prompt, limits.max_response)
        flags = for_size(name, flags, Counts.of(config).model)
        print(plan_text(plan_job(name, config, flags, device, limits, asked.world), asked.gpu_memory, prefix))
        if name != "ppo" or not (judge := flags.reward_model or (run.chain and run.take("rm", RmFlags).reward_model)):
            continue
        if (there := count_parameters(Path(judge))) != (here := Counts.of(config).model):
            print(f"careful: reward model and critic are counted above as if they had the policy's {here:,} parameters; those of {judge} have {there:,}")


def build_parser(stage: str) -> argparse.ArgumentParser:
    """A parser of exactly the flags that the stage reads, its own before those that it shares with others."""
    help_format = partial(argparse.HelpFormatter, max_help_position=36, width=130)
    parser = Parser(prog=f"train.py --stage {stage}", usage="%(prog)s [flags]", allow_abbrev=False, formatter_class=help_format)
    parser.add_argument("--stage", choices=(*STAGES, "ablations"), help="what to run")
    whole, trains = stage in ("mpo", "ablations"), stage not in ("tokenizer", "split", "ablations")
    if stage == "ablations":
        add_flags(parser.add_argument_group("the grid"), GridFlags)
    for name in CHAIN if whole else (stage,):  # in a chain all stages' flags, by their names there
        title = parser.add_argument_group(f"stage {name}")
        for group in (*STAGE_FLAGS[name], *((ModelFlags,) if name == "sft" else ())):
            add_flags(title, group, f"{name}_" if whole and group is not ModelFlags else "")
    if stage != "ablations":
        add_flags(parser.add_argument_group("this run"), RunFlags)
    if trains:
        add_flags(parser.add_argument_group("checkpoints, profile"), LoopFlags)
        add_flags(parser.add_argument_group("what it would need"), PlanFlags)
    add_flags(parser.add_argument_group("processes and devices"), FEWER.get(stage, DeviceFlags))
    makes_data = stage in ("tokenizer", "mpo", "ablations")
    data = parser.add_argument_group("data", None if makes_data else "those of --stage tokenizer (see its --help), which makes the data: the same, or left out")
    add_flags(data, DataFlags)
    add_flags(data, WorldFlags)
    for action in () if makes_data else data._group_actions:
        action.help = argparse.SUPPRESS
    return parser


def check_flags(run: Run, stage: str) -> None:
    """Builds every flag group of the stage or chain once, so that an impossible value stops the run before any work."""
    if (take_flags(LoopFlags, run.given).save_every or 0) < 0:
        raise UsageError("--save-every: must be 0 or more")
    places = {name: Path(place) for name, place in run.given.items() if re.fullmatch(r"((rm|dpo|ppo)_)?(init|ref|reward_model)", name)}
    for name, place in places.items():
        if not place.is_dir() and not (run.chain and made_before(run, name, place)):
            raise UsageError(f"--{name.replace('_', '-')} {place}: no such folder")
    for name in CHAIN if run.chain else (stage,):
        with typed_names(STAGE_FLAGS[name], f"{name}-" if run.chain else ""):
            flags = run.take(name, STAGE_FLAGS[name][0])
            for field, most in (("warmup", 1), ("weight_decay", math.inf)):
                if not 0 <= getattr(flags, field, 0) <= most:
                    raise UsageError(f"--{field.replace('_', '-')} {getattr(flags, field)}: must lie within 0 and {most}")
            if name in CHECKS:
                CHECKS[name](run, flags)
    for name, place in places.items():
        stopped = (place / FLAGS).exists() and not (place / MANIFEST).exists()  # of which its stage says more
        if place.is_dir() and not stopped and not (place / CONFIG).exists():
            raise UsageError(f"--{name.replace('_', '-')} {place}: no model is there; give a model's own folder, such as runs/mpo/sft or runs/mpo/rm")
    if run.chain:
        check_models(run)


def made_before(run: Run, name: str, place: Path) -> bool:
    """Whether the chain will have made a model of the kind that the flag `name` asks for in `place`, as far as can be known: a snapshot's number cannot."""
    if not inside(run.folder, place):
        return False
    makers = {"rm_init": ("sft",), "dpo_init": ("sft",), "dpo_ref": ("sft",), "ppo_init": ("sft", "dpo"), "ppo_ref": ("sft", "dpo"), "ppo_reward_model": ("rm",)}
    first, *below = place.resolve().relative_to(run.folder.resolve()).parts
    return first in makers.get(name, ()) and not (first == "rm" and below)  # a fold's model has no scale for its scores


def inside(folder: Path, place: Path) -> bool:
    return folder.resolve() in place.resolve().parents


def check_models(run: Run) -> None:
    """Opens every model that a flag of the chain names, as its stage will when hours have gone by, and raises what that would raise then. Those of
    the run itself its stages look at."""
    file, made = tokenizers_place(run, run.take("tokenizer", TokenizerFlags)), run.folder / "data" / MANIFEST
    limits = take_flags(DataFlags, run.given | (read_json(made)["flags"] if made.exists() else {}))
    named = {name: Path(run.given[name]) for name in MODELS if name in run.given and not inside(run.folder, Path(run.given[name]))}
    for name, folder in named.items():
        kind, options = MODELS[name]
        if file:
            path = tokenizer_file(file) if Path(file).is_dir() else Path(file)
            Text(Tokenizer(path), path, limits.max_prompt, limits.max_response).load(folder, kind, **options)
        else:
            open_model(folder, kind, **options)
        if kind is ScalarModel and "init" in named:
            check_vocabularies(named["init"], reward_model=folder)


MODELS = {  # flags of the chain that name a model's folder, and as what it is opened
    "init": (LanguageModel, {}), "rm_init": (ScalarModel, {"new_head": True}), "rm_reward_model": (ScalarModel, {}),
    "dpo_init": (LanguageModel, {}), "dpo_ref": (LanguageModel, {}),
    "ppo_init": (LanguageModel, {}), "ppo_ref": (LanguageModel, {}), "ppo_reward_model": (ScalarModel, {}),
}  # fmt: skip
CHECKS = {  # of flags that do not go together, besides those of any one
    "tokenizer": check_tokenizer,
    "rm": check_rm,
    "split": lambda run, flags: check_split_flags(flags),
    "dpo": lambda run, flags: chosen_loss(run, flags.loss),
    "ppo": check_ppo,
}


def grid(given: dict) -> None:
    """The ablation grid: what is said of the grid itself, and the flags that every row is run with."""
    flags = take_flags(GridFlags, given, **(QUICK["ablations"] if given.get("quick") else {}))
    about_grid = {field.name for field in dataclasses.fields(GridFlags)} - {"quick"}
    common = {name: value for name, value in given.items() if name not in about_grid}
    for spec in filter(None, (common.get("data") or "advice", flags.judge_data)):
        check_data_flags(take_flags(DataFlags, common | {"data": spec}), common)
        if spec not in WORLDS:
            paths_of(spec)
    check_flags(Run(Path(flags.out), take_flags(RunFlags, given), ALONE, common, True, {}), "mpo")
    rows = run_grid(flags, common, defaults())
    print(f"\nnext: python eval.py --compare {shlex.quote(str(rows))}")


def defaults() -> dict[str, object]:
    """The default of every flag that changes a model, in the chain's names, with what a default of None stands for."""
    groups = {**STAGE_FLAGS, "": (DataFlags, WorldFlags, ModelFlags)}
    fields = [(f"{stage}-".lstrip("-"), field) for stage, some in groups.items() for group in some for field in dataclasses.fields(group)]
    # without flags that change no model: a row need not be made again because such a default has changed
    found = {prefix + field.name: field.default for prefix, field in fields if field.name not in CHANGE_NO_RESULT and prefix + field.name != "rm-snapshots"}
    found |= {f"{stage}-{name}": list(by_size) for stage, table in BY_SIZE.items() for name, by_size in table.items()}
    for loss, function in PREFERENCE_LOSSES.items():
        found |= {f"dpo-{name} of {loss}": default for name, (_, default, _) in loss_flags(function).items()}
    return {"--" + name.replace("_", "-"): value for name, value in found.items()}


def given_again(given: dict, stage: str) -> bool:
    """Whether torchrun starts this command again when a process fails (--max-restarts), and there is something to go on with."""
    folder = Path(given.get("out", RunFlags.out)) / ("" if stage == "mpo" else stage)
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and folder.is_dir() and any(folder.iterdir())


def main(arguments: list[str]) -> None:
    """Parses flags, joins the process group, prepares the data, runs the stage."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=(*STAGES, "ablations"))
    stage = first.parse_known_args(arguments)[0].stage
    if stage is None:
        print(__doc__)
        if {"-h", "--help"} & set(arguments):
            return
        raise UsageError(f"--stage is missing; choose one of {', '.join(STAGES)}, ablations")
    check_loss_names()
    given = vars(build_parser(stage).parse_args(arguments))
    given.pop("stage")
    if {"size", "init"} <= set(given):
        raise UsageError(f"--size {given['size']}: the model of --init has its own; leave one of the two out")
    if stage == "ablations":
        grid(given)
        return
    if given_again(given, stage):
        given["resume"] = True
    flags = take_flags(RunFlags, given)
    check_run_folder(flags.out, "--out")
    made = Path(flags.out) / "data" / MANIFEST
    if "seed" not in given and made.exists():  # one run, one seed
        flags = dataclasses.replace(flags, seed=read_json(made)["flags"]["seed"])
    if flags.seed < 0:
        raise UsageError(f"--seed {flags.seed}: must be 0 or more")
    data_flags = take_flags(DataFlags, given, data=given.get("data") or "advice", max_pairs=QUICK["data"]["pairs"] if flags.quick and "pairs" not in given else None)
    world_flags = take_flags(WorldFlags, given, **(QUICK["data"] if flags.quick else {}))
    if given.get("plan"):
        plan(Run(Path(flags.out), flags, ALONE, given, stage == "mpo", QUICK if flags.quick else {}), stage)
        return
    for name in {"world", "gpu_memory", *(("size",) if stage not in ("sft", "mpo") else ())} & set(given):
        raise UsageError(f"--{name.replace('_', '-')}: is read with --plan alone, here; leave it out")
    makes_data = stage in ("tokenizer", "mpo")  # every other stage needs the tokenizer first, and must not choose the data by accident
    if makes_data:
        check_data_flags(data_flags, given)
    world = start(take_flags(DeviceFlags, given))
    run = Run(Path(flags.out), flags, world, given, stage == "mpo", QUICK if flags.quick else {})
    check_flags(run, stage)
    if flags.resume and not any(run.folder.glob("*/")):
        raise UsageError(f"--resume: there is nothing in {run.folder} to go on with; leave the flag out")
    if world.is_main and (makes_data or (run.folder / "data" / MANIFEST).exists()):
        prepare_data(run.folder / "data", data_flags, world_flags, tuple(given), flags.seed, flags.resume, flags.quick)
    world.barrier()
    STAGES[stage](run)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
