"""Why do both log-probabilities fall under DPO? The inner product of a pair's two gradients, and what it predicts.

    python tests/bench/gradients.py --run runs/mpo [--models sft,dpo] [--pairs 200]

With g_w and g_l the gradients of the summed log-probabilities of the chosen and the rejected response, over all parameters, a small step on
one pair's DPO loss changes them, up to a factor C = lr beta sigmoid(-beta h) > 0, by

    chosen:    C ( |g_w|^2 - <g_w, g_l> )        rejected:    C ( <g_w, g_l> - |g_l|^2 )

so the chosen one falls where the inner product is above |g_w|^2, the rejected one rises where it is above |g_l|^2, and their difference never
shrinks. Printed: how many pairs are of which case, norms, inner products and cosines, and the correlation of predicted and real changes when
the step is taken. Source: Yuan et al., arXiv 2410.13828, section 3.

A step on all pairs at once also moves a pair along the gradients of the others, sum_j sigmoid(-beta h_j) (g_w - g_l)_j with j not the pair
itself. The second table has how far that moves both log-probabilities, beside what the pair's own part does: means over pairs, in units of what
the own part adds to the chosen one. This has no source that we know of; it is the chain rule.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.batches import encode_pairs  # noqa: E402
from data.files import read_json  # noqa: E402
from data.prepare import load_pairs  # noqa: E402
from data.report import format_interval, markdown_table, t_interval, wilson_interval  # noqa: E402
from data.split import read_split  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from losses.dpo import Pairs, dpo  # noqa: E402
from model.checkpoint import load_model  # noqa: E402
from model.heads import LanguageModel  # noqa: E402
from model.score import pair_logps  # noqa: E402


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def look(model: LanguageModel, pair, ref: torch.Tensor, beta: float, pad_id: int, step: float) -> tuple[tuple[float, ...], torch.Tensor, torch.Tensor]:
    """|g_w|^2, |g_l|^2, <g_w, g_l>, and of a step of plain gradient descent on the pair's DPO loss the predicted and the real changes of both
    log-probabilities, and sigmoid(-beta h); then g_w and g_l. The weights are left as they were."""
    parameters = list(model.parameters())
    logps = pair_logps(model, [pair], pad_id, torch.device("cpu"))[0]
    g_w, g_l = (flat(torch.autograd.grad(logp, parameters, retain_graph=True)).double() for logp in logps)
    length = torch.ones(1)  # of no matter without a term on the chosen response
    loss = dpo(Pairs(logps[None, 0], logps[None, 1], ref[None, 0], ref[None, 1], length, length), beta=beta).sum()
    gradients = torch.autograd.grad(loss, parameters)
    h = float(((logps[0] - ref[0]) - (logps[1] - ref[1])).detach())
    inner, norm_w, norm_l = float(g_w @ g_l), float(g_w @ g_w), float(g_l @ g_l)
    move = step / float(flat(gradients).norm())
    factor = move * beta / (1 + np.exp(beta * h))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(move * gradient)
        change = (pair_logps(model, [pair], pad_id, torch.device("cpu"))[0] - logps).tolist()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(move * gradient)
    return (norm_w, norm_l, inner, factor * (norm_w - inner), factor * (inner - norm_l), *change, 1 / (1 + np.exp(beta * h))), g_w.float(), g_l.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--models", default="sft,dpo")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--step", type=float, default=1e-3, help="length of the step in weight space")
    flags = parser.parse_args()
    described, beta = read_json(flags.run / "data" / "manifest.json")["flags"], read_json(flags.run / "dpo" / "manifest.json")["flags"]["beta"]
    tokenizer, easy = Tokenizer(flags.run / "tokenizer" / "tokenizer.model"), set(read_split(flags.run / "split")["easy"])
    pairs = [pair for pair in load_pairs(flags.run / "data", "train") if pair.id in easy][: flags.pairs]
    rows, _ = encode_pairs(pairs, tokenizer, described["max_prompt"], described["max_response"])
    sft = load_model(flags.run / "sft", LanguageModel)
    with torch.no_grad():
        refs = [pair_logps(sft, [row], tokenizer.pad_id, torch.device("cpu"))[0] for row in rows]
    table, together = [], []
    for name in flags.models.split(","):
        model = load_model(flags.run / name, LanguageModel)
        looks = [look(model, row, ref, beta, tokenizer.pad_id, flags.step) for row, ref in zip(rows, refs, strict=True)]
        norm_w, norm_l, inner, predicted_w, predicted_l, real_w, real_l, weight = np.array([numbers for numbers, _, _ in looks]).T
        cosine = inner / np.sqrt(norm_w * norm_l)
        cases = [(inner < norm_w) & (inner < norm_l), (inner >= norm_w) & (inner < norm_l), (inner < norm_w) & (inner >= norm_l)]
        shares = [format_interval(case.mean(), *wilson_interval(case.sum(), len(case))) for case in cases]
        agree = [f"{np.corrcoef(predicted, real)[0, 1]:.3f}" for predicted, real in ((predicted_w, real_w), (predicted_l, real_l))]
        sizes = [f"{value.mean():.3g}" for value in (norm_w, norm_l, inner)]
        table.append([name, len(rows), *shares, *sizes, format_interval(*t_interval(cosine.tolist())), *agree])
        g_w, g_l = (torch.stack([gradients[which] for gradients in looks]) for which in (1, 2))
        joint = torch.from_numpy(weight).float() @ (g_w - g_l)
        own = {"chosen": weight * (norm_w - inner), "rejected": weight * (inner - norm_l)}
        others = {"chosen": (g_w @ joint).numpy() - own["chosen"], "rejected": (g_l @ joint).numpy() - own["rejected"]}
        unit = own["chosen"].mean()
        moved = [f"{side[which].mean() / unit:.2f}" for which in ("chosen", "rejected") for side in (own, others)]
        falls = own["chosen"] + others["chosen"] < 0
        together.append([name, *moved, format_interval(falls.mean(), *wilson_interval(falls.sum(), len(falls)))])
    header = ["", "pairs", "chosen up, rejected down", "both down", "both up", "|g_w|^2", "|g_l|^2", "inner product", "cosine", "predicted and real change, chosen", "rejected"]
    print(markdown_table(header, table))
    print(markdown_table(["", "chosen: own part", "all others", "rejected: own part", "all others", "pairs whose chosen falls"], together))


if __name__ == "__main__":
    main()
