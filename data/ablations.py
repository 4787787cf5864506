"""The ablation grid as data: named rows, each a set of flags that differ from the defaults and the row whose model it starts from.

A row with --best-of trains nothing: it is SFT's answers, the best of so many as the reward model picks them. Another row without a start
and without a flag of PPO is one of DPO, from SFT. Any other is one of PPO: policy and reference are the model of the row that it starts
from, where its flags do not say otherwise; `sft` is the SFT model of its seed, `start` that row's model, `strong` a reward model that learnt
from other pairs of the world, more of them and hardly noisy. A row has its starting row's flags of data, tokenizer, SFT and reward model.
data/grid.py runs rows, data/compare.py compares them.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.errors import UsageError


@dataclass(frozen=True)
class Row:
    flags: dict[str, object] = field(default_factory=dict)  # in the chain's names
    start: str | None = None  # another row


FROM_SFT = {"--ppo-init": "sft", "--ppo-ref": "sft"}
CORE = {
    "dpo-all": Row({"--dpo-part": "all"}),
    "dpo-easy": Row(),
    "dpo-difficult": Row({"--dpo-part": "difficult"}),
    "dpo-random": Row({"--split-rule": "random"}),  # of the undisputed pairs, which the reward model has thus selected, too
    "dpo-blind": Row({"--split-rule": "blind"}),
    "ppo-all": Row(FROM_SFT | {"--ppo-part": "all"}),
    "ppo-difficult": Row(FROM_SFT),
    "mpo": Row(start="dpo-easy"),
    "mpo-sft-ref": Row({"--ppo-ref": "sft"}, "dpo-easy"),
    "mpo-sft-start": Row({"--ppo-init": "sft"}, "dpo-easy"),
    "mpo-random-split": Row({"--split-rule": "random"}, "dpo-random"),
    "mpo-random-dpo": Row(start="dpo-random"),  # difficult prompts, after DPO on a random half
    "mpo-reverse": Row({"--ppo-part": "easy"}, "dpo-difficult"),
    "mpo-all-prompts": Row({"--ppo-part": "all"}, "dpo-easy"),
    "ppo-again": Row({"--ppo-part": "all"}, "ppo-all"),  # is it DPO, or any reference that has moved?
    "chosen-easy": Row({"--dpo-beta": 1e-6, "--dpo-chosen-weight": 1.0}),  # the likelihood of the easy chosen responses, and nothing else
    "ppo-chosen-easy": Row(start="chosen-easy"),
}
LABELS = {  # is it the selection that helps, or the reward model's opinion, which all pairs could have?
    "relabelled-all": Row({"--dpo-part": "all", "--dpo-loss": "soft", "--dpo-sharpness": 1000.0}),
    "soft-all": Row({"--dpo-part": "all", "--dpo-loss": "soft"}),
}


def levels(flag: str, values: Sequence, rows: Sequence[str]) -> dict[str, Row]:
    """The rows at each value of a flag."""
    made = {}
    for value in values:
        made |= together({flag: value}, flag.removeprefix("--") + f"-{value}", rows)
    return made


def together(flags: dict[str, object], at: str, rows: Sequence[str]) -> dict[str, Row]:
    """The rows with all these flags; where a starting row is among them, it has them too."""
    made = {}
    for name in rows:
        row = (CORE | LABELS)[name]
        made[f"{name}@{at}"] = Row(row.flags | flags, f"{row.start}@{at}" if row.start in rows else row.start)
    return made


DPO = ("dpo-all", "dpo-easy", "dpo-blind")
ARMS = (*DPO, "ppo-all", "mpo")
STRONG = {"--pairs": 40_000, "--label-temperature": 0.1, "--flip-rate": 0.0, "--annotator-bias": 0.0}  # what the reward model `strong` learns from
STRONGLY = {"--rm-reward-model": "strong"}  # splits and rewards by that one, whose folder the grid knows
FEW_BIASED = {"--annotator-bias": 1.0, "--pairs": 2_000} | STRONGLY
GROUPS: dict[str, dict[str, Row]] = {
    "core": CORE,
    "threshold": levels("--split-quantile", (0.1, 0.25, 0.75, 0.9), ("dpo-easy", "mpo")),  # the fifth, 0.5, is the default
    "disputed": levels("--split-disputed", ("easy", "drop"), ("dpo-easy", "mpo")),
    "folds": levels("--rm-folds", (1,), ("dpo-easy", "mpo")),  # pairs scored by the model that was trained on them
    # what noisy labels change of DPO's rows, at some levels each, and of the arms with PPO at one
    "temperature": levels("--label-temperature", (2.0,), ("dpo-all", "dpo-easy", "ppo-all", "mpo"))
    | levels("--label-temperature", (4.0,), ("dpo-all", "dpo-easy")),
    "flips": levels("--flip-rate", (0.2,), ARMS) | levels("--flip-rate", (0.3,), DPO),
    "bias": levels("--annotator-bias", (2.0,), (*ARMS, "dpo-random")) | levels("--annotator-bias", (1.0,), DPO),
    "labels": LABELS,
    "losses": {  # at a known flip rate: is it the selection that helps, or would a loss that knows of flips do?
        "cdpo-all@flip-rate-0.2": Row({"--dpo-part": "all", "--dpo-label-smoothing": 0.2, "--flip-rate": 0.2}),
        "robust-all@flip-rate-0.2": Row({"--dpo-part": "all", "--dpo-loss": "robust", "--dpo-assumed-flips": 0.2, "--flip-rate": 0.2}),
    },
    "strong": together(STRONGLY, "strong", ("dpo-all", "dpo-easy", "ppo-all", "mpo", "mpo-sft-ref"))
    | {"best-of-n@strong": Row({"--best-of": "2,4,8,16"} | STRONGLY)},
    "best-of-n": {"best-of-n": Row({"--best-of": "2,4,8,16"})},  # what the reward model is worth without any training
    "beta": levels("--dpo-beta", (0.1, 0.5, 2.0), ("dpo-easy", "dpo-all", "dpo-random")),
    "dpo-lr": levels("--dpo-lr", (2e-5, 2e-4), ("dpo-easy", "dpo-all", "dpo-random")),
    "ppo-lr": levels("--ppo-lr", (1e-4, 6e-4), ("ppo-all", "mpo")),
    "kl": levels("--ppo-kl-coef", (0.03, 0.05, 0.2, 0.4), ("ppo-all", "mpo", "mpo-sft-ref")),
    "budget": levels("--ppo-iterations", (5, 10), ("ppo-all", "ppo-difficult", "mpo", "mpo-sft-ref")),  # 40 is the default
    "orders": {
        "mpo-mixed": Row({"--ppo-part": "all"}, "dpo-all"),  # all pairs, then all prompts: no curriculum
        "mpo-blind-split": Row({"--split-rule": "blind"}, "dpo-blind"),  # halves that no reward model has had a say in
    },
    "critic": together({"--ppo-critic": "trunk", "--ppo-value-coef": 0.1}, "trunk", ("ppo-all", "mpo")),
    "regimes": together({"--flip-rate": 0.2, "--pairs": 20_000}, "plenty-flipped", ARMS)
    | together(FEW_BIASED, "few-biased", ARMS)
    | together(FEW_BIASED | {"--dpo-epochs": 4}, "few-biased-4-epochs", (*DPO, *LABELS, "mpo")),  # one pass of so few is 41 to 113 steps
}
ROWS: dict[str, Row] = {name: row for group in GROUPS.values() for name, row in group.items()}
CLAIMS: dict[str, tuple[tuple[str, str], ...]] = {  # which rows each claim compares: the first is said to be better
    "DPO on easy pairs is at least as good as on all, and better than on others": (
        ("dpo-easy", "dpo-all"), ("dpo-easy", "dpo-random"), ("dpo-easy", "dpo-blind"), ("dpo-easy", "dpo-difficult"), ("dpo-random", "dpo-blind"),
        *((f"dpo-easy@split-quantile-{level}", "dpo-all") for level in (0.1, 0.25, 0.75, 0.9)), ("dpo-easy@split-disputed-easy", "dpo-all"),
        ("dpo-easy@rm-folds-1", "dpo-all"),
    ),
    "the DPO model as reference beats the SFT model": (
        ("mpo", "mpo-sft-ref"), ("mpo-sft-start", "ppo-difficult"), ("mpo", "ppo-difficult"), ("mpo", "ppo-again"), ("mpo", "ppo-chosen-easy"),
    ),
    "MPO beats DPO alone and PPO alone": (
        ("mpo", "dpo-easy"), ("mpo", "dpo-all"), ("mpo", "ppo-all"), ("mpo", "mpo-all-prompts"),
        ("mpo@ppo-kl-coef-0.4", "dpo-easy@dpo-lr-0.0002"), ("mpo@ppo-kl-coef-0.4", "dpo-all@dpo-beta-0.1"),  # DPO that goes as far as MPO
        ("mpo@few-biased-4-epochs", "ppo-all@few-biased"),  # PPO from SFT has no epochs of DPO
    ),
    "easy before difficult beats other orders and splits": (
        ("mpo", "mpo-reverse"), ("mpo", "mpo-random-split"), ("mpo", "mpo-random-dpo"), ("mpo", "mpo-mixed"), ("mpo", "mpo-blind-split"),
    ),
    "it is the selection that helps, not the reward model's opinion or a loss that knows of flips": (
        ("dpo-easy", "relabelled-all"), ("dpo-easy", "soft-all"),
        ("dpo-easy@flip-rate-0.2", "cdpo-all@flip-rate-0.2"), ("dpo-easy@flip-rate-0.2", "robust-all@flip-rate-0.2"),
    ),
    "training beats choosing among SFT's answers": (("mpo", "best-of-n"), ("ppo-all", "best-of-n")),
}  # fmt: skip
MATTERS = 0.1  # true reward: the smallest difference that would change anyone's choice; the worlds' best responses are about 3 above SFT


def chosen_rows(asked: str) -> list[str]:
    """The rows that are asked for by their own or their groups' names, with commas between, and those that they start from, which come
    first. Raises UsageError for a name that is not known."""
    found: list[str] = []

    def add(name: str) -> None:
        if ROWS[name].start:
            add(ROWS[name].start)
        found.append(name)

    for word in asked.split(","):
        names = GROUPS.get(word, [word] if word in ROWS else None)
        if names is None:
            like = difflib.get_close_matches(word, [*GROUPS, *ROWS], n=3, cutoff=0.8)
            hint = f"did you mean {' or '.join(like)}?" if like else f"groups are {', '.join(GROUPS)}; rows of core are {', '.join(CORE)}"
            raise UsageError(f"--only {word}: no such row or group; {hint}")
        for name in names:
            add(name)
    return list(dict.fromkeys(found))


def is_ppo(name: str) -> bool:
    """Whether a row ends with PPO; the others end with DPO."""
    return bool(ROWS[name].start) or any(flag.startswith("--ppo-") for flag in ROWS[name].flags)


def base_flags(name: str) -> dict[str, object]:
    """Those flags of a row that change data, tokenizer, SFT or reward model: what rows share. Raises ValueError where it has others than the row
    that it starts from: the policy would be of one run, its SFT and reward model of another."""
    row = ROWS[name]
    own = {flag: value for flag, value in row.flags.items() if not flag.startswith(("--split-", "--dpo-", "--ppo-", "--best-of"))}
    shared = base_flags(row.start) if row.start else own
    if not own.items() <= shared.items():
        raise ValueError(f"data/ablations.py: row {name}: {', '.join(own)}: the row that it starts from, {row.start}, must have the same")
    return shared


def stage_flags(flags: dict[str, object], stage: str) -> dict[str, object]:
    """A stage's flags under the names that they have when the stage is run alone: --dpo-lr becomes --lr."""
    prefix = f"--{stage}-"
    return {"--" + flag.removeprefix(prefix): value for flag, value in flags.items() if flag.startswith(prefix)}
