"""The paper's data step: pairs split by reward gap into an easy half (for DPO) and a difficult half (whose prompts PPO uses).

The signed gap of a pair is score(chosen) - score(rejected), in raw log-odds of the reward model. A pair with a gap below 0 is *disputed*:
the reward model disagrees with its label. (A gap of exactly 0 is not disputed, and any positive threshold makes it difficult.)

A prompt with several pairs goes whole, by its largest gap:
  1. the rule looks at each prompt that has an undisputed pair and calls it easy or difficult; its undisputed pairs go there together:
       threshold  easy when the largest gap >= --threshold
       quantile   the same, the threshold being that quantile of those largest gaps; ties with it are easy
       random     as many easy prompts as `quantile` gives, drawn by the seed
       blind      the same, drawn from all prompts, whose disputed pairs go with them: nothing but the number is the reward model's
       none       no selection: both halves hold all pairs (`--disputed drop` still drops)
  2. a disputed pair goes to the half that --disputed names, unless its prompt already lives in the other half; then it is dropped, because
     no prompt may be in both halves and the flag's choice of half is not overruled:
       its prompt, by step 1        easy         difficult    neither (all its pairs are disputed)
       --disputed difficult         dropped      difficult    difficult
       --disputed easy              easy         dropped      easy
       --disputed drop              dropped      dropped      dropped
With --per-pair each pair is treated like the only pair of its prompt: the rule judges undisputed pairs one by one, disputed ones always go
where the flag says, and a prompt may be in both halves, knowingly (the summary counts such prompts).

Six pairs (E easy, D difficult, B both, - dropped):

    pair                                          0     1     2     3     4     5
    prompt                                        a     a     a     b     b     c
    signed gap                                 +2.0  +0.1  -0.5   0.0  -1.2  -0.7
    (defaults: median of 2.0 and 0.0)             E     E     -     D     D     D
    --disputed easy                               E     E     E     D     -     E
    --disputed drop                               E     E     -     D     -     -
    --rule threshold --threshold 2                E     E     -     D     D     D
    --rule threshold --threshold 0                E     E     -     E     -     D
    --per-pair (median of 2.0, 0.1, 0.0)          E     E     D     D     D     D
    --per-pair --disputed easy                    E     E     E     D     E     E
    --per-pair --rule threshold --threshold 1     E     D     D     D     D     D
    --rule blind (seed 0 draws c)                 D     D     D     D     D     E
    --rule none                                   B     B     B     B     B     B
    --rule none --disputed drop                   B     B     -     B     -     -

Source: the abstract of arXiv 2403.19443 for "large gap: easy, small gap: difficult"; signed gaps and the routes above are this program's.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import CheckpointError, NumericalError, UsageError
from data.files import atomic_write, digest, read_json, write_json
from data.flags import flag

PARTS = ("easy", "difficult", "dropped")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
HISTOGRAM_EDGES = np.arange(-5.0, 5.5, 0.5)  # fixed, so that runs compare; 0 is an edge, so disputed pairs fill the bins left of it


@dataclass(frozen=True)
class SplitFlags:
    gaps: str = flag("reward-model", "scores of the reward model, or what the rows of jsonl:PATH state as `gap`", ("reward-model", "given"))
    rule: str = flag("quantile", "how the pairs that are not disputed are split", ("threshold", "quantile", "random", "blind", "none"))
    threshold: float | None = flag(None, "rule threshold: the smallest easy gap, in raw log-odds")
    quantile: float = flag(0.5, "rules quantile, random, blind: of the prompts' largest undisputed gaps, the threshold")
    disputed: str = flag("difficult", "where pairs go that the reward model ranks the other way round", ("difficult", "easy", "drop"))
    per_pair: bool = flag(False, "judge every pair by its own gap, even if its prompt then is in both halves")


READ_BY_RULE = {
    "threshold": ("threshold", "per_pair", "disputed"), "quantile": ("quantile", "per_pair", "disputed"),
    "random": ("quantile", "per_pair", "disputed"), "blind": ("quantile", "per_pair"), "none": ("disputed",),
}  # fmt: skip


def check_split_flags(flags: SplitFlags) -> None:
    """Raises UsageError on a value out of range, or on a flag that was set although the rule does not read it."""
    for field in dataclasses.fields(flags):
        value, choices = getattr(flags, field.name), field.metadata["choices"]
        if choices and value not in choices:
            raise UsageError(f"--{field.name} {value}: choose from {', '.join(choices)}")
    for name in ("threshold", "quantile", "per_pair", "disputed"):
        if name not in READ_BY_RULE[flags.rule] and getattr(flags, name) != getattr(SplitFlags, name):
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --rule {flags.rule}: leave one of them out")
    if flags.rule == "threshold" and flags.threshold is None:
        raise UsageError("--rule threshold needs --threshold GAP (in raw log-odds, for example 1.0); --rule quantile finds one itself")
    if flags.threshold is not None and not flags.threshold >= 0:
        raise UsageError(f"--threshold {flags.threshold}: must be 0 or more; pairs with a gap below 0 are routed by --disputed")
    if not 0 < flags.quantile < 1:
        raise UsageError(f"--quantile {flags.quantile}: must lie between 0 and 1")


@dataclass(frozen=True)
class Split:
    easy: np.ndarray  # (n,) int row numbers, ascending; likewise the next two. Disjoint, together all rows, except under rule none
    difficult: np.ndarray
    dropped: np.ndarray  # disputed pairs only
    threshold: float | None  # the smallest gap that counts as easy; None for the rules random, blind and none
    disputed: np.ndarray  # (N,) bool


def split_pairs(prompts: Sequence[str], gaps: np.ndarray, flags: SplitFlags, seed: int, *, may_be_empty: bool = False) -> Split:
    """Sends each of N pairs to easy, difficult or dropped, by the tables above; the same input gives the same split.

    prompts: the N pairs' prompts; gaps (N,): signed gaps in raw log-odds. Only the rules random and blind read `seed`.
    Raises UsageError on bad flags, and where a half would be empty unless it may be; NumericalError on a gap that is not finite.
    """
    check_split_flags(flags)
    gaps = np.asarray(gaps, dtype=np.float64)
    if gaps.shape != (len(prompts),):
        raise ValueError(f"{len(prompts)} prompts but gaps of shape {gaps.shape}")
    bad = np.flatnonzero(~np.isfinite(gaps))
    if bad.size:
        raise NumericalError(f"the reward gap of row {bad[0]} is {gaps[bad[0]]} ({bad.size} such rows): look at the scores of that pair")
    disputed = gaps < 0
    if not may_be_empty and disputed.all() and (flags.rule != "none" or flags.disputed == "drop"):
        raise UsageError(f"the reward model disputes all {len(gaps)} pairs, so none is easy: was it trained? are the labels swapped?")
    if flags.rule == "none":
        kept = ~(disputed & (flags.disputed == "drop"))
        return Split(np.flatnonzero(kept), np.flatnonzero(kept), np.flatnonzero(~kept), None, disputed)

    # A group is what is judged as one: a prompt, or with per_pair a pair. It is judged by its largest gap, if that is not below 0.
    numbers: dict[str, int] = {}
    group = np.arange(len(gaps)) if flags.per_pair else np.array([numbers.setdefault(p, len(numbers)) for p in prompts], dtype=int)
    largest = np.full(len(gaps), -np.inf)
    np.maximum.at(largest, group, gaps)
    judged = np.flatnonzero(largest >= 0)
    threshold = flags.threshold if flags.rule == "threshold" else float(np.quantile(largest[judged], flags.quantile)) if judged.size else np.inf
    easy_groups = judged[largest[judged] >= threshold]
    drawn_from = np.unique(group) if flags.rule == "blind" else judged
    if flags.rule in ("random", "blind"):
        easy_groups = np.random.default_rng([seed, *b"split"]).permutation(drawn_from)[:len(easy_groups)]
    with_easy = np.isin(group, easy_groups)  # rows whose group went to the easy half, then to the difficult half; a row can be in neither
    with_difficult = np.isin(group, np.setdiff1d(drawn_from, easy_groups))

    # A disputed pair goes where the flag says, unless the rest of its prompt went to the other half.
    routed = disputed & (flags.rule != "blind")
    easy = np.where(routed, (flags.disputed == "easy") & ~with_difficult, with_easy)
    difficult = np.where(routed, (flags.disputed == "difficult") & ~with_easy, with_difficult)
    # DPO on disputed labels alone is nobody's intention, so the easy half must hold an undisputed pair; disputed prompts suffice for PPO.
    if not may_be_empty and (not easy_groups.size or not difficult.any()):
        empty = "difficult" if easy_groups.size else "easy"
        raise UsageError(_empty_half(empty, threshold, gaps[~disputed], largest[judged], flags))
    return Split(np.flatnonzero(easy), np.flatnonzero(difficult), np.flatnonzero(~(easy | difficult)),
                 None if flags.rule in ("random", "blind") else threshold, disputed)


def _empty_half(half: str, threshold: float, undisputed: np.ndarray, largest: np.ndarray, flags: SplitFlags) -> str:
    """The message for an empty half: the quantiles of the undisputed gaps and a threshold that would fill both halves, if there is one."""
    quantiles = ", ".join(f"{q:.0%} {value:.4g}" for q, value in zip(QUANTILES, np.quantile(undisputed, QUANTILES)))
    message = (f"the {half} half is empty at a threshold of {threshold:.6g} (--rule {flags.rule}); "
               f"quantiles of the undisputed gaps: {quantiles}; ")
    above = largest[largest > largest.min()]
    if not above.size:
        return message + f"the largest gaps of all {'pairs' if flags.per_pair else 'prompts'} are equal, so no threshold separates them"
    return message + f"try --rule threshold --threshold {max(float(np.median(largest)), float(above.min()))!r}"


def write_split(folder: Path, split: Split, pairs: Sequence, gaps: np.ndarray, flags: SplitFlags, extra: Mapping) -> None:
    """Writes easy.jsonl, difficult.jsonl, dropped.jsonl and, last, summary.json.

    pairs: the N records that were split (`id` and `prompt` are used); gaps (N,) as given to `split_pairs`. `extra` is added to the summary
    (seed, digest of the scores). Gaps are signed; the histogram's first and last bin hold everything beyond the edges too.
    """
    folder, gaps = Path(folder), np.asarray(gaps, dtype=np.float64)
    rows = {part: getattr(split, part) for part in PARTS}
    prompts = {part: {pairs[i].prompt for i in rows[part]} for part in PARTS}
    for part in PARTS:
        lines = [{"id": pairs[i].id, "prompt_hash": hashlib.sha256(pairs[i].prompt.encode()).hexdigest()[:16], "gap": float(gaps[i])}
                 for i in rows[part]]
        atomic_write(folder / f"{part}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "summary.json", {
        **dataclasses.asdict(flags),
        "threshold": split.threshold,
        "pairs": {"all": len(pairs)} | {part: len(rows[part]) for part in PARTS},
        "prompts": {"all": len({pair.prompt for pair in pairs})} | {part: len(prompts[part]) for part in PARTS}
        | {"in_both_halves": len(prompts["easy"] & prompts["difficult"])},
        "disputed_pairs": {"all": int(split.disputed.sum()), "share": float(split.disputed.mean())}
        | {part: int(split.disputed[rows[part]].sum()) for part in PARTS},
        "gap_quantiles": {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(gaps, QUANTILES))},
        "gap_histogram": {"edges": HISTOGRAM_EDGES.tolist(),
                          "counts": np.histogram(np.clip(gaps, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)[0].tolist()},
        "sha256": {f"{part}.jsonl": digest(folder / f"{part}.jsonl") for part in PARTS},
        **extra,
    })


def read_split(folder: Path) -> dict[str, list[str]]:
    """Part name -> ids of its pairs, in row order. Raises CheckpointError when a file is missing or differs from its digest."""
    folder = Path(folder)
    ids = {}
    digests = read_json(folder / "summary.json")["sha256"]
    for part in PARTS:
        path = folder / f"{part}.jsonl"
        if not path.exists() or digest(path) != digests[path.name]:
            raise CheckpointError(f"{path}: missing, or not the file that summary.json describes; split again into a new folder")
        ids[part] = [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]
    return ids
