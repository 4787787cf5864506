"""Direct preference optimisation and its relatives: learn from pairs without a reward model and without sampling.

Nearly all look at one number per pair (`ipo` at its like per token): how much further the policy has moved from the reference towards the chosen response than
towards the rejected one,

    h = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]         (h)

and differ in the curve they put on it. A log-probability of a response is the *sum* over its tokens, end token included, prompt not.
`beta * (log pi - log ref)` is the policy's implicit reward of a response, and beta * h the pair's *margin*. At the start policy and reference
are the same model, so h = 0 whatever the loss.

**To add a loss**, write one function `name(pairs, *, beta: float = 0.1, ...) -> (B,)` below and enter it in PREFERENCE_LOSSES. Its keyword
arguments become its flags: each needs a type, a default and one line `name: help` under `Args:`; beta is always one. Raise ValueError for values without a meaning.
tests/losses/test_dpo.py tests every entry of the table. What else a loss must know about a pair becomes a field of `Pairs`; one that reads
the reward model's gap is also named in READS_GAP: for the others it is None.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_type_hints

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """What a preference loss may know about a batch of pairs. Sums and counts are over response tokens; every field is (B,)."""

    chosen_logp: Tensor  # log pi(y_w | x), float32, with gradient
    rejected_logp: Tensor  # log pi(y_l | x), float32, with gradient
    ref_chosen_logp: Tensor  # log ref(y_w | x), without gradient
    ref_rejected_logp: Tensor  # log ref(y_l | x), without gradient
    chosen_length: Tensor  # |y_w|, response tokens with the end token
    rejected_length: Tensor  # |y_l|
    gap: Tensor | None = None  # reward model's r(x, y_w) - r(x, y_l) in log-odds; there for the losses named in READS_GAP


def log_ratios(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """log pi - log ref of the chosen and of the rejected responses, (B,) and (B,)."""
    return pairs.chosen_logp - pairs.ref_chosen_logp, pairs.rejected_logp - pairs.ref_rejected_logp


def implicit_rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """beta * log(pi / ref) of the chosen and of the rejected responses, (B,) each, detached: for metrics. Their difference is the margin."""
    chosen, rejected = log_ratios(pairs)
    return beta * chosen.detach(), beta * rejected.detach()


def dpo(pairs: Pairs, *, beta: float = 1.0, label_smoothing: float = 0.0, chosen_weight: float = 0.0) -> Tensor:
    """DPO, with two optional terms (e = label_smoothing, w = chosen_weight); (B,).

        L = - (1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) - w log pi(y_w|x) / |y_w|      (a), (b), (c)

    (a) alone is DPO. Its gradient is -beta sigmoid(-beta h) per nat of h: -beta / 2 at the start, and fading where a pair is learnt.
    (b) is conservative DPO: a share e of the labels is taken to be wrong, and the loss is least at sigmoid(beta h) = 1 - e, not at infinity.
    (c) keeps the chosen response likely. h says nothing about the level of its two halves, and they usually fall together.

    Args:
        beta: strength of the pull to the reference; smaller lets the policy move further (a larger KL)
        label_smoothing: share of the labels believed to be wrong, in [0, 0.5) (conservative DPO)
        chosen_weight: weight of the chosen response's negative log-likelihood per token; above 0 keeps its probability from falling

    Source: (a) Rafailov et al., arXiv 2305.18290, equation 7, and (b) Mitchell's note on cDPO, equation 3, both read in the authors' code;
    (c) derived: their sum, in the form of Liu et al., arXiv 2405.16436, with the mean over tokens in place of the sum.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be in [0, 0.5), at a half the labels would say nothing")
    if chosen_weight < 0:
        raise ValueError(f"chosen_weight is {chosen_weight}: it must not be negative, that would make the chosen responses unlikely")
    chosen, rejected = log_ratios(pairs)
    h = chosen - rejected
    loss = -(1 - label_smoothing) * F.logsigmoid(beta * h)  # (a)
    loss = loss - label_smoothing * F.logsigmoid(-beta * h)  # (b)
    return loss - chosen_weight * pairs.chosen_logp / pairs.chosen_length.clamp(min=1)  # (c)


def robust(pairs: Pairs, *, beta: float = 1.0, assumed_flips: float = 0.1) -> Tensor:
    """Provably robust DPO: DPO's loss on clean labels, estimated from labels of which a share e = assumed_flips is flipped; (B,).

        L = [ - (1 - e) log sigmoid(beta h) + e log sigmoid(-beta h) ] / (1 - 2e)

    Unbiased: averaged over the flips it *is* the clean loss. Conservative DPO has the other sign, and no division. For e > 0 it has no
    minimum and falls below 0 as h grows, so watch the KL.

    Args:
        beta: strength of the pull to the reference; smaller lets the policy move further (a larger KL)
        assumed_flips: share of the labels known to be flipped, in [0, 0.5)

    Source: Chowdhury et al., arXiv 2403.00409; form read in TRL's code; unbiasedness derived (a test has the two lines).
    """
    if not 0 <= assumed_flips < 0.5:
        raise ValueError(f"assumed_flips is {assumed_flips}: it must be in [0, 0.5), at a half the labels would say nothing")
    chosen, rejected = log_ratios(pairs)
    h = chosen - rejected
    return (-(1 - assumed_flips) * F.logsigmoid(beta * h) + assumed_flips * F.logsigmoid(-beta * h)) / (1 - 2 * assumed_flips)


def ipo(pairs: Pairs, *, beta: float = 1.0) -> Tensor:
    """Identity preference optimisation, per token: a parabola with its minimum at a finite difference; (B,).

        D = [log pi - log ref](y_w) / |y_w| - [log pi - log ref](y_l) / |y_l|,     L = ( D - 1 / (2 beta) )^2

    beta (tau in the paper) sets the target in nats *per token*: half a nat at 1.0, five nats at the usual 0.1 of the summed form.

    Args:
        beta: pull to the reference; the chosen response is to gain 1 / (2 beta) nats per token on the rejected one

    Source: Azar et al., arXiv 2310.12036, equation 17, read in the DPO authors' code with sums over tokens; the mean over each response's own
    tokens follows TRL, which quotes the IPO authors for it.
    """
    chosen, rejected = log_ratios(pairs)
    difference = chosen / pairs.chosen_length.clamp(min=1) - rejected / pairs.rejected_length.clamp(min=1)
    return (difference - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Hinge loss on the margin: pairs that are right by a margin of 1 stop counting; (B,).

        L = max(0, 1 - beta h)

    Args:
        beta: strength of the pull to the reference; a pair is done when the chosen gained 1 / beta nats on the rejected

    Source: "hinge-norm" of Liu et al., arXiv 2309.06657, which puts SLiC's hinge (arXiv 2305.10425) on DPO's h; form read in TRL's code.
    """
    chosen, rejected = log_ratios(pairs)
    return F.relu(1 - beta * (chosen - rejected))


def soft(pairs: Pairs, *, beta: float = 1.0, sharpness: float = 1.0) -> Tensor:
    """DPO on what the reward model thinks of a pair, in place of its label; (B,).

        p = sigmoid(sharpness gap),     L = - p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h)

    Least where beta h = sharpness * gap: the policy is to be as sure as the reward model, and against the label where that is. A large
    sharpness gives DPO on pairs that the reward model has labelled anew.

    Args:
        beta: strength of the pull to the reference; smaller lets the policy move further (a larger KL)
        sharpness: what the reward model's gap is multiplied by; 1 takes it at its word, 1000 makes hard labels of it

    Source: derived, the cross-entropy to Bradley-Terry's probability; kin to OSP's soft-preference cross-entropy (arXiv 2405.14103, whose
    exact form was not seen).
    """
    if not sharpness > 0:
        raise ValueError(f"sharpness is {sharpness}: it must be positive; below 0 the policy would learn against the reward model")
    chosen, rejected = log_ratios(pairs)
    h, p = chosen - rejected, (sharpness * pairs.gap).sigmoid()
    return -p * F.logsigmoid(beta * h) - (1 - p) * F.logsigmoid(-beta * h)


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "robust": robust, "ipo": ipo, "hinge": hinge, "soft": soft}
READS_GAP = {"soft"}


def loss_flags(loss: Callable[..., Tensor]) -> dict[str, tuple[type, object, str]]:
    """The keyword arguments of a preference loss, as flags: name -> (type, default, help), in the order of the signature.

    Raises ValueError where a keyword argument lacks its type, its default or its line under `Args:`, or where there is no beta, by which
    implicit rewards are measured.
    """
    block = re.search(r"^Args:\n((?: {4}.+\n?)+)", inspect.cleandoc(loss.__doc__ or ""), re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", block[1], re.MULTILINE) if block else []  # lines that are indented further go on
    help_of = {name: " ".join(text.split()) for name, text in found}
    type_of = get_type_hints(loss)
    flags = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if name not in type_of or parameter.default is parameter.empty or name not in help_of:
            raise ValueError(f"{loss.__name__}: keyword argument {name!r} needs a type, a default and a line '{name}: help' under 'Args:'")
        flags[name] = (type_of[name], parameter.default, help_of[name])
    if "beta" not in flags:
        raise ValueError(f"{loss.__name__}: needs the keyword argument beta, by which implicit rewards are measured")
    return flags
