"""What a stage would need: bytes per process by component, floating-point operations per step, whether they fit, and what would make them fit.

Nothing is allocated: it is arithmetic on the model's sizes, for rows of full length (--max-prompt and --max-response), shown line by line.
Some bytes are there always, the others while an update runs, while samples are drawn and looked at, or while rows are read by a model that
does not learn; the greatest of these three sums counts. tests/test_plan.py holds it against the bytes of all tensors that live in real
runs of every stage.

Letters: P parameters, L layers, D width, F feed-forward width, K E key-value heads times head size, V vocabulary, N processes, n tokens of
a micro-batch, R of them scored, a bytes of a number in products (4, or 2 in bf16).
"""

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from data.files import read_json
from data.flags import flag
from data.report import markdown_table
from model.checkpoint import CONFIG, config_from_json
from model.heads import CHUNK, LanguageModel
from model.score import READ_AT_ONCE
from model.transformer import SIZES, ModelConfig
from model.watch import WATCHED

USABLE = 0.92  # of a GPU's memory: the rest is CUDA's own, and lost between blocks
ON_CPU = "on the CPU"  # a line's `when`: these bytes are not the GPU's


@dataclass(frozen=True)
class PlanFlags:
    plan: bool = flag(False, "print what this would need in memory and operations, and run nothing")
    world: int = flag(1, "with --plan: so many processes, one per GPU", positive=True)
    gpu_memory: float = flag(80.0, "with --plan: of each GPU, in GB of 10^9 bytes", positive=True)
    size: str | None = flag(None, "with --plan: of the model", choices=tuple(SIZES))


@dataclass(frozen=True)
class Job:
    """A stage with all that decides what it needs."""

    stage: str
    config: ModelConfig
    prompt: int  # tokens
    response: int
    batch: int  # rows per optimiser step, over all processes
    micro_batch: int
    samples: int = 0  # responses drawn at a time, over all processes
    passes: int = 1  # over the samples
    own_critic: bool = False
    entropy_bonus: bool = False
    world: int = 1
    bf16: bool = False
    on_cpu: bool = False  # whose attention is in fp32, under bf16, too
    fsdp: bool = False
    checkpoint: bool = False
    offload: bool = False

    @property
    def accumulates(self) -> bool:
        """Whether a step takes several micro-batches."""
        return self.batch > self.micro_batch * self.world

    @property
    def row(self) -> int:
        """Tokens of a training row: a pair has both responses."""
        return self.prompt + self.response * (2 if self.stage in ("rm", "dpo") else 1)

    @property
    def read(self) -> int:
        """Tokens of a training row whose last states are read: those that predict, with a critic also the last, or the ends of both responses."""
        return {"sft": self.response, "rm": 2, "dpo": 2 * self.response, "ppo": self.response + 1}[self.stage]


@dataclass(frozen=True)
class Line:
    """Bytes per process; `why` is the arithmetic. `when`: always, training (but not while rows are read), update, sampling, reading, or
    on the CPU."""

    component: str
    what: str
    bytes: float
    why: str
    when: str = "always"


def planned_config(size: str | None, init: str | None, out: str) -> ModelConfig:
    """Of the named size, else of the model in the folder `init`, else of the run's SFT model, else the smallest size."""
    folder = Path(init or f"{out}/sft")
    if size is None and (init or (folder / CONFIG).exists()):
        return config_from_json(read_json(folder / CONFIG), folder / CONFIG)
    return SIZES[size or "tiny"]


def plan_job(stage: str, config: ModelConfig, flags, device, limits, world: int) -> Job:
    """The job that a stage's flags, the device's and the data's describe."""
    sampled = getattr(flags, "prompts_per_iteration", WATCHED if stage == "dpo" else 0)
    return Job(
        stage, config, limits.max_prompt, limits.max_response,
        batch=getattr(flags, "minibatch", None) or flags.batch_size, micro_batch=flags.micro_batch, samples=sampled,
        passes=getattr(flags, "passes", 1), own_critic=getattr(flags, "critic", "") == "separate",
        entropy_bonus=getattr(flags, "entropy_coef", 0) > 0, world=world,
        bf16=device.dtype == "bf16", on_cpu=device.device == "cpu", fsdp=device.parallel == "fsdp" and world > 1, checkpoint=device.checkpoint_activations,
        offload=device.offload and stage != "sft",
    )  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Parameters of a language model: all of it, one layer, what lies outside the layers, and matrices of products."""

    model: int
    layer: int
    root: int
    products: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Counts":
        with torch.device("meta"):
            model = LanguageModel(config)
        total, layers = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.trunk.layers.parameters())
        norms = 2 * config.width * config.layers
        head = 0 if config.tied else config.vocab_size * config.width
        return cls(total, layers // config.layers, total - layers, layers - norms + head)


# ---- bytes


def memory(job: Job) -> list[Line]:
    """Every component's bytes on one process."""
    counts, config = Counts.of(job.config), job.config
    scalar = counts.model + config.width - (0 if config.tied else config.vocab_size * config.width)
    trained = {"policy" if job.stage == "ppo" else "model": scalar if job.stage == "rm" else counts.model}
    if job.own_critic:
        trained["critic"] = scalar
    lines = []
    for name, parameters in trained.items():
        lines += of_trained(name, parameters, job, counts)
    if job.fsdp:
        lines.append(of_gathered(job, counts))
    frozen = {"dpo": {"reference": counts.model}, "ppo": {"reference": counts.model, "reward model": scalar}}
    for name, parameters in frozen.get(job.stage, {}).items():
        lines += of_frozen(name, parameters, job, counts)
    return lines + of_update(job) + of_sampling(job, counts) + of_reading(job, scalar, counts)


def of_trained(name: str, parameters: int, job: Job, counts: Counts) -> list[Line]:
    """Weights, gradients and optimiser state of something that learns."""
    shards, over = (job.world, " / N") if job.fsdp else (1, "")
    lines = [
        Line(name, "weights, fp32", 4 * parameters / shards, f"4 P{over}"),
        Line(name, "optimiser state", 8 * parameters / shards, f"8 P{over}: Adam's two moments", "training"),
    ]
    if job.world > 1 and not job.fsdp:
        lines.append(Line(name, "gradients", 4 * parameters, "4 P: DDP's buckets, which are never given back", "training"))
    if job.accumulates and (job.fsdp or job.world == 1):
        why = "4 P: whole until the step's last micro-batch is exchanged" if job.fsdp else "4 P"
        lines.append(Line(name, "gradients", 4 * parameters, why, "update"))
    elif job.accumulates:
        lines.append(Line(name, "gradients that wait", 4 * parameters, "4 P: outside the buckets until the step's last micro-batch", "update"))
    elif job.fsdp or job.world == 1:
        kept = sum(line.bytes for line in of_update(job))
        why = f"4 P{over} less activations and logits, which go as they come"
        lines.append(Line(name, "gradients", max(0, 4 * parameters / shards - kept), why, "update"))
    if job.bf16 and not job.fsdp:
        copies = min(counts.products, parameters) - (counts.root if job.stage == "rm" and not job.config.tied else 0)
        now = counts.layer if job.checkpoint else copies
        lines.append(Line(name, "copies in bf16", 2 * now, "2 P of the matrices (of one layer, where activations are computed again)", "update"))
        lines += [Line(name, "copies in bf16", 2 * copies, "2 P of the matrices", "sampling")] if job.samples else []
    return lines


def of_gathered(job: Job, counts: Counts) -> Line:
    """What FSDP2 has gathered at a time: embedding and output, the layer at work and the next one."""
    a = 2 if job.bf16 else 4
    models = 2 if job.own_critic else 1
    why = f"{a} x (parameters outside the layers x {models} + 3 layers)"
    return Line("all", "gathered weights", a * (models * counts.root + 3 * counts.layer), why)


def of_frozen(name: str, parameters: int, job: Job, counts: Counts) -> list[Line]:
    """Weights of something that is only asked: where it stays, and, where that is the CPU's memory, the copy while it is asked. PPO asks its
    reward model after the reference, so the larger of the two counts."""
    line = Line(name, "weights, fp32", 4 * parameters / (job.world if job.fsdp else 1), "4 P / N" if job.fsdp else "4 P")
    if job.bf16 and job.fsdp:
        line = Line(name, "weights, bf16", 2 * parameters / job.world, "2 P / N")
    elif job.bf16:
        products = min(counts.products, parameters)
        line = Line(name, "weights", 2 * products + 4 * (parameters - products), "2 P of the matrices, 4 P of embedding and norms")
    if not job.offload:
        return [line]
    asked = {"reference": ("sampling", "reading") if job.stage == "dpo" else ("sampling",), "read back": ("reading",)}.get(name, ())
    copies = [replace(line, what=f"{line.what}, a copy", when=phase) for phase in asked if not job.fsdp]  # FSDP2 gathers layers from there
    return [replace(line, when=ON_CPU), *copies]


def layer_bytes(job: Job) -> tuple[float, float]:
    """What one layer keeps of one token for the backward pass: up to attention, and after it, which the last layer does for the tokens
    that are read alone."""
    c, a = job.config, 2 if job.bf16 else 4
    keys = c.kv_heads * c.head_size
    mask = a * job.row if job.stage in ("rm", "dpo") else 0  # a packed pair's, as numbers
    twice = 2 * (2 * c.width + 2 * keys) + mask if job.bf16 and job.on_cpu else 0  # attention's part in fp32, and its result in bf16, too
    return 8 * c.width + a * (2 * c.width + 2 * keys) + 4 * c.heads + 4 + mask + twice, 8 * c.width + a * (2 * c.width + 4 * c.feed_forward) + 4


def of_update(job: Job) -> list[Line]:
    """Activations and logits of one micro-batch."""
    c, a = job.config, 2 if job.bf16 else 4
    rows = min(job.micro_batch, -(-job.batch // job.world))
    tokens, trunks = rows * job.row, 2 if job.own_critic else 1
    before, after = layer_bytes(job)
    n = f"n = {rows} x {job.row}"
    if job.checkpoint:
        why, kept = f"n (4 L D) + one layer's n (16 D + a (4 D + 2 K E + 4 F) + ...), {n}", tokens * c.layers * 4 * c.width
    else:
        why = f"n L (16 D + a (4 D + 2 K E + 4 F) + ...) - (n - m) (8 D + a (2 D + 4 F)) of the last layer, {n}, m = {rows} x {job.read}"
        kept = tokens * c.layers * (before + after) - rows * (job.row - job.read) * after
    saved = trunks * (kept + tokens * 12 * c.width)
    backward = tokens * (a * c.feed_forward + (before + after if job.checkpoint else 0))
    scored = rows * job.response * (2 if job.stage == "dpo" else 1)
    copies = 0 if job.stage == "rm" else 6 if job.entropy_bonus else 3
    logits = 4 * min(scored, CHUNK) * c.vocab_size * copies
    return [  # the backward pass goes through the logits first, and then through the layers
        Line("all", "activations", saved + max(backward - logits, 0), why, "update"),
        Line("all", "logits", logits, f"4 R V x {copies} copies, R = min({scored}, {CHUNK})", "update"),
    ]


def of_sampling(job: Job, counts: Counts) -> list[Line]:
    """Keys and values, and the largest of: prompts read at once, logits of one step, samples looked at in micro-batches."""
    if not job.samples:
        return []
    c, a = job.config, 2 if job.bf16 else 4
    rows, slots, per_token = -(-job.samples // job.world), job.prompt + job.response, passing(job)
    looked = rows if job.stage == "dpo" else min(rows, job.micro_batch)  # DPO looks at its samples all at once
    read = {
        "prompts read at once": rows * job.prompt * per_token,
        "logits of one token each": 20 * rows * c.vocab_size,
        "samples looked at": looked * slots * per_token,
        "their logits": 8 * min(looked * job.response, CHUNK) * c.vocab_size,
    }
    what = max(read, key=read.get)
    whole = [Line("policy", "gathered whole", a * counts.model, f"{a} P, in place of a gathering per token", "sampling")] if job.fsdp else []
    cache = 2 * a * c.layers * c.kv_heads * c.head_size * slots * rows
    return [
        Line("all", "cache", cache, f"2 a L K E S rows, S = {slots}, rows = {rows}", "sampling"),
        Line("all", what, read[what], f"the largest of {', '.join(read)}", "sampling"),
        *whole,
    ]


def passing(job: Job) -> float:
    """What one token takes in a forward pass that keeps nothing."""
    return 4 * (2 if job.bf16 else 4) * job.config.feed_forward + 12 * job.config.width


def of_reading(job: Job, scalar: int, counts: Counts) -> list[Line]:
    """Pairs read by the reward model that was just trained, or by DPO's reference."""
    if job.stage not in ("rm", "dpo"):
        return []
    scored = min(2 * READ_AT_ONCE * job.response, CHUNK) if job.stage == "dpo" else 0
    size = max(READ_AT_ONCE * job.row * passing(job), 8 * scored * job.config.vocab_size)
    lines = [Line("all", "pairs read", size, f"{READ_AT_ONCE} pairs x {job.row} x (4 a F + 12 D), or 8 R V", "reading")]
    back = of_frozen("read back", scalar, job, counts) if job.stage == "rm" else []
    return lines + [line if job.offload else replace(line, when="reading") for line in back]


def need(lines: list[Line]) -> dict[str, float]:
    """Bytes while an update runs, while samples are drawn, while rows are read."""
    parts = {"update": ("always", "training", "update"), "sampling": ("always", "training", "sampling"), "reading": ("always", "reading")}
    return {phase: sum(line.bytes for line in lines if line.when in whens) for phase, whens in parts.items()}


# ---- operations


def flops(job: Job) -> dict[str, float]:
    """Floating-point operations of one optimiser step (PPO: of one round), over all processes: two per multiplication and addition."""
    c, counts = job.config, Counts.of(job.config)
    matrices = counts.layer * c.layers - 2 * c.width * c.layers
    last = c.width**2 + 3 * c.width * c.feed_forward  # of the last layer, after its attention

    def forward(rows: int, length: int, read: int, scored: int) -> float:
        attention = 4 * c.layers * c.width * length**2 / 2  # causal: half of the pairs
        return rows * (2 * (matrices * length - last * (length - read)) + attention + 2 * scored * c.vocab_size * c.width)

    again = 1 if job.checkpoint else 0
    scored = {"sft": job.response, "rm": 0, "dpo": 2 * job.response, "ppo": job.response}[job.stage]
    if job.stage != "ppo":
        seen = job.row - (job.stage != "rm")  # a row's last token predicts nothing
        return {"update": (3 + again) * forward(job.batch, seen, job.read, scored)}
    look, judge = forward(job.samples, job.row, job.read, scored), forward(job.samples, job.row, 1, 0)
    own = forward(job.samples, job.row, job.read, 0) if job.own_critic else 0.0
    return {"sampling": look, "policy, reference and reward model look": 2 * look + judge + own, "updates": job.passes * (3 + again) * (look + own)}


# ---- what would make it fit


def fits(job: Job, gpu_memory: float) -> bool:
    return max(need(memory(job)).values()) <= USABLE * gpu_memory * 1e9


def remedies(job: Job, gpu_memory: float, prefix: str = "") -> str:
    """The fewest flags that make the job fit; else how many GPUs would, and what this many could hold."""
    trunk = f"--{prefix}critic trunk --{prefix}value-coef 0.1"
    steps = {
        "--dtype bf16": {"bf16": True},
        "--parallel fsdp": {"fsdp": job.world > 1},
        "--checkpoint-activations": {"checkpoint": True},
        f"--{prefix}micro-batch 1": {"micro_batch": 1},
        "--offload": {"offload": job.stage != "sft"},
        trunk: {"own_critic": False},
    }
    steps = {name: change for name, change in steps.items() if replace(job, **change) != job}
    for count in range(1, len(steps) + 1):
        for chosen in combinations(steps, count):
            changed = {field: value for name in chosen for field, value in steps[name].items()}
            if fits(replace(job, **changed), gpu_memory):
                return f"it fits with {' '.join(chosen)}"
    smallest = replace(job, bf16=True, fsdp=True, checkpoint=True, micro_batch=1, offload=job.stage != "sft", own_critic=False)
    enough = next((world for world in (2**k for k in range(1, 13)) if fits(replace(smallest, world=world), gpu_memory)), None)
    alone = replace(smallest, fsdp=job.world > 1)
    sizes = [name for name, config in SIZES.items() if fits(replace(alone, config=config), gpu_memory)]
    frugal = "--dtype bf16 --parallel fsdp --checkpoint-activations" + (" --offload" if smallest.offload else "") + (f" {trunk}" if job.own_critic else "")
    more = f"with {frugal} and --{prefix}micro-batch 1 it fits on {enough} such GPUs" if enough else "no number of such GPUs holds it"
    return f"no flag makes it fit; {more}; of the named sizes, {job.world} of them hold {', '.join(sizes) or 'none'}"


def plan_text(job: Job, gpu_memory: float, prefix: str = "") -> str:
    """The plan as Markdown."""
    lines, counts = memory(job), Counts.of(job.config)
    sums = {phase: size for phase, size in need(lines).items() if any(line.when == phase for line in lines)}
    rows = [(line.component, line.what, f"{line.bytes / 1e9:.2f}", line.when, line.why) for line in lines]
    rows += [("sum", phase, f"{size / 1e9:.2f}", "", "") for phase, size in sums.items()]
    how = f"{'bf16' if job.bf16 else 'fp32'}, {'fsdp' if job.fsdp else 'ddp' if job.world > 1 else 'one process'}"
    verdict = "fits" if fits(job, gpu_memory) else f"does not fit: {remedies(job, gpu_memory, prefix)}"
    work = flops(job)
    unit = "round" if job.stage == "ppo" else "step"
    return (
        f"\n[{job.stage}] {counts.model:,} parameters on {job.world} x {gpu_memory:g} GB ({how}), GB of 10^9 bytes per process\n\n"
        + markdown_table(["component", "what", "GB", "when", "arithmetic"], rows)
        + f"\n\n{sum(work.values()):.2e} floating-point operations per {unit} in all: "
        + ", ".join(f"{name} {value:.2e}" for name, value in work.items())
        + f"\n{max(sums.values()) / 1e9:.1f} of {USABLE * gpu_memory:.1f} usable GB: {verdict}\n"
    )
