"""The README says what is true: its flags exist, its commands parse, its tree is the tree, its example loss trains."""

import re
import shlex
import shutil

import pytest
from runs import BUDGETS, ROOT, TRAINED, command, copy_of, here, manifest, metrics, steps

README = (ROOT / "README.md").read_text()
ROOMS = ("model", "losses", "rl", "data")
FOREIGN = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
FOREIGN |= {"--max-restarts"}


def flags_of(program, *args):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", here("--help", *args, program=program)))


@pytest.fixture(scope="module")
def known():
    """Flags by command: train.py's by stage, eval.py's under its name."""
    stages = ("tokenizer", "sft", "rm", "split", "dpo", "ppo", "mpo", "ablations")
    return {stage: flags_of("train.py", "--stage", stage) for stage in stages} | {"eval.py": flags_of("eval.py")}


def test_every_flag_exists(known):
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", README)) - FOREIGN
    in_example = set(re.findall(r"--loss slope (--\w+)", README))  # flags of the example's loss, which exists once it is pasted
    assert len(mentioned) > 20
    assert mentioned - in_example <= set().union(*known.values())


def test_every_command_takes_its_flags(known):
    """Each `... train.py ...`, `--stage X ...` or `eval.py ...` in code: all its flags are flags of that very stage or program."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", README)
    commands = [line for line in lines if "train.py --" in line or "eval.py --" in line or line.startswith("--stage ")]
    assert len(commands) >= 10
    for line in commands:
        words = shlex.split(line.replace("...", ""))
        own = words[words.index("eval.py") + 1 :] if "eval.py" in words else words[words.index("--stage") :]
        kind = "eval.py" if "eval.py" in words else words[words.index("--stage") + 1]
        if kind == "X":
            continue
        flags = {word for word in own if word.startswith("--")} - ({"--floor"} if "slope" in words else set())
        assert flags <= known[kind], line


def test_the_tree_lists_every_file():
    """Names in a room's part of the tree are exactly the Python files of that room."""
    tree = re.search(r"```\n(train\.py .*?)```", README, re.DOTALL)[1]
    room, listed = None, {name: set() for name in ROOMS}
    for line in tree.splitlines():
        if heading := re.match(r"(\w+)/ ", line):
            room = heading[1]
        elif line.startswith(" "):
            listed[room] |= set(re.findall(r"\b\w+\.py\b", line))
        else:
            assert all((ROOT / name).exists() for name in re.findall(r"\b\w+\.py\b", line))
    assert listed == {name: {path.name for path in (ROOT / name).glob("*.py")} for name in ROOMS}
    in_text = set(re.findall(r"`((?:losses|data|model|rl|tests)/[\w./]*)`", README)) | set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    missing = {name for name in in_text if not (ROOT / name).exists()}
    assert len(in_text) > 5 and not missing


def test_the_glossary_names_every_metric(chain):
    """Each under the stages that log it."""
    table = README.partition("## Metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    for stage in TRAINED:
        folder = chain / stage if (chain / stage / "metrics.jsonl").stat().st_size else chain / stage / "fold-0"
        logged = {name.removeprefix("valid_") for line in metrics(folder, timeless=False) for name in line}
        of_all = {"all"} | ({"all but ppo"} if stage != "ppo" else set())
        named = {name for names, stages in rows for name in re.findall(r"`(\w+)`", names) if stage in stages.split("but")[0] or stages.strip() in of_all}
        assert logged <= named, (stage, logged - named)


def test_the_exit_codes_are_those_of_the_program():
    from data import errors

    said = re.search(r"Exit codes: (.*?)\.\n", README, re.DOTALL)[1]
    codes = {kind.code for kind in errors.Stop.__subclasses__()} | {143, 141}  # Interrupted's other one; a closed pipe
    assert {int(number) for number in re.findall(r"\b(\d+)\b", said)} == codes


def test_the_example_loss_trains_as_the_readme_says(chain, tmp_path):
    """The text itself: pasted at the end of losses/dpo.py of a copy of this repository, then the README's command."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    line = re.search(r"`python train\.py (--stage dpo --loss slope [^`]*)`", README)[1]
    copy = tmp_path / "repository"
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for program in ("train.py", "eval.py"):
        shutil.copy(ROOT / program, copy)
    with open(copy / "losses" / "dpo.py", "a") as file:
        file.write("\n\n" + example)
    run = copy_of(chain, tmp_path / "run", "dpo", "ppo")
    command(*shlex.split(line), "--out", run, "--beta", 0.5, *BUDGETS["dpo"], cwd=copy)
    flags = manifest(run / "dpo")["flags"]
    assert flags["loss"] == "slope" and flags["floor"] == -1.0 and flags["beta"] == 0.5
    first = steps(run / "dpo")[0]
    assert first["loss"] == pytest.approx(0, abs=1e-5)  # minus beta times a difference that is 0 at the start


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"PLACEHOLDER|TODO|FIXME|XXX", README)
