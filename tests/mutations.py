"""Defects that the tests must notice: each is one small change of the program, applied to a copy, on which the named tests must fail.

    python tests/mutations.py            all of them; prints a table in Markdown
    python tests/mutations.py gae seed   those whose description contains a word

test_mutations.py checks in the default run that every entry still applies, and under `-m slow` that every one is noticed.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands exactly once in the file, becomes `new`; `tests` (pytest's words) must then fail."""

    what: str
    file: str
    old: str
    new: str
    tests: str


LOSS, KL, PPO = "tests/losses/test_dpo.py", "tests/losses/test_kl.py", "tests/losses/test_ppo.py"
FIT, UPDATE, LOOP, ROLLOUT = "tests/model/test_fit.py", "tests/rl/test_ppo_update.py", "tests/rl/test_ppo_loop.py", "tests/rl/test_rollout.py"
GENERATE, RESUME, RANKS = "tests/model/test_generate.py", "tests/model/test_resume.py", "tests/model/test_parallel.py"
READERS, INVARIANCE = "tests/data/test_readers.py", "tests/test_invariance.py -k"

MUTATIONS = [
    Mutation(*entry)
    for entry in [
        # ---- losses
        ("DPO: chosen and rejected swapped", "losses/dpo.py", "    h = chosen - rejected\n    loss", "    h = rejected - chosen\n    loss", LOSS),
        ("DPO: beta twice in the rewards", "losses/dpo.py",
         "return beta * chosen.detach(), beta", "return beta * beta * chosen.detach(), beta", LOSS),
        ("DPO: the reference left out of one half", "losses/dpo.py", "pairs.rejected_logp - pairs.ref_rejected_logp", "pairs.rejected_logp", LOSS),
        ("DPO: label smoothing on the wrong side", "losses/dpo.py",
         "loss - label_smoothing * F.logsigmoid(-beta * h)", "loss - label_smoothing * F.logsigmoid(beta * h)", LOSS),
        ("robust DPO: not divided", "losses/dpo.py", "/ (1 - 2 * assumed_flips)", "/ 1", LOSS),
        ("IPO: sums in place of means", "losses/dpo.py", "difference = chosen / pairs.chosen_length.clamp(min=1)", "difference = chosen", LOSS),
        ("reward loss: log(1 + exp), which overflows", "losses/reward.py",
         "return -F.logsigmoid(gap)", "return (1 + (-gap).exp()).log()", "tests/losses/test_reward.py"),
        ("reward loss: sign", "losses/reward.py",
         "chosen_score.float() - rejected", "rejected_score.float() - chosen_score.float() + 0 * rejected", "tests/losses/test_reward.py"),
        ("k1: sign", "losses/kl.py", "d = logp.float() - ref_logp.float().detach()", "d = ref_logp.float().detach() - logp.float()", KL),
        ("k3: direction", "losses/kl.py", "return torch.expm1(-d) + d", "return torch.expm1(d) - d", KL),
        ("k3: exp - 1 in place of expm1", "losses/kl.py", "return torch.expm1(-d) + d", "return torch.exp(-d) - 1 + d", KL),
        ("k2: not halved", "losses/kl.py", "return 0.5 * _log_ratio", "return 1.0 * _log_ratio", KL),
        ("k3 allowed in the reward", "losses/kl.py",
         '    ("k1", "reward"): "KL(policy || reference)",\n', '    ("k1", "reward"): "KL(policy || reference)",\n    ("k3", "reward"): "",\n', KL),
        ("k1 allowed in the loss", "losses/kl.py",
         '    ("k1", "reward"): "KL(policy || reference)",\n', '    ("k1", "reward"): "KL(policy || reference)",\n    ("k1", "loss"): "",\n', KL),
        ("log-probabilities in the logits' own dtype", "losses/logprobs.py", "    logits = logits.float()\n", "", "tests/losses/test_logprobs.py"),
        ("temperature multiplied", "losses/logprobs.py", "else logits / temperature", "else logits * temperature", "tests/losses/test_logprobs.py"),
        ("entropy: sign", "losses/logprobs.py", "return -(logps.exp() * logps)", "return (logps.exp() * logps)", "tests/losses/test_logprobs.py"),
        ("padding multiplied by 0, so NaN stays", "losses/masked.py",
         "return torch.where(mask, x, 0)", "return x * mask", "tests/losses/test_masked.py"),
        ("mean over columns, padding included", "losses/masked.py",
         "mean = x.sum() / count.clamp(min=1)", "mean = x.mean()", "tests/losses/test_masked.py"),
        ("equal weights answer once, whatever their reference", "model/answers.py",
         "first.setdefault((weights, ref), name)", "first.setdefault(weights, name)", "tests/test_eval.py"),
        ("the contents of --prompts are not in the key", "rl/online.py",
         'as_flags(flags) | unread | {"prompts_digest": sha256_of(prompts)}', "as_flags(flags) | unread", "tests/test_train.py"),
        ("DPO on a part is validated on pairs of all kinds", "model/offline.py",
         "            validation = validation_part(", "            validation_part(", "tests/test_train.py -k validated_on"),
        ("the reward model is saved again after it was cast for reading", "model/offline.py",
         "            write_json(folder / CONFIG, read_json(folder / CONFIG) | stats)",
         "            text.save(model, folder, world)\n            write_json(folder / CONFIG, read_json(folder / CONFIG) | stats)", "tests/test_train.py -k kept_in_fp32"),
        ("DPO's optimum is that of labels without noise", "model/answers.py",
         "chance = (chance + made[\"flip_rate\"] * (1 - 2 * chance))", "chance = chance", "tests/test_eval.py -k aims_at"),
        ("the contents of --file are not in the key", "model/offline.py",
         "as_flags(flags) | file,", "as_flags(flags),", "tests/test_train.py"),
        ("variance in one pass", "losses/masked.py",
         "zero_padding(x - mean, mask).square().sum() / count.clamp(min=1)",
         "x.square().sum() / count.clamp(min=1) - mean.square()", "tests/losses/test_masked.py"),
        ("moments joined without the spread of the means", "losses/masked.py",
         "(weights * (variances + (means - mean).square()))", "(weights * variances)", "tests/losses/test_masked.py"),
        ("PPO: the better surrogate in place of the worse", "losses/ppo.py",
         "return torch.maximum(unclipped, clipped), stats", "return torch.minimum(unclipped, clipped), stats", PPO),
        ("PPO: the advantage not detached", "losses/ppo.py", "advantages.float().detach(), mask)", "advantages.float(), mask)", PPO),
        ("PPO: no guard against overflow", "losses/ppo.py", "log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()", "log_ratio.exp()", PPO),
        ("value loss: clipped around the returns", "losses/ppo.py",
         "near_old = old_values + (values - old_values)", "near_old = returns + (values - old_values)", PPO),
        ("value loss: the smaller error", "losses/ppo.py", "0.5 * torch.maximum(error", "0.5 * torch.minimum(error", PPO),
        ("SFT: padding counted", "losses/sft.py", "return -zero_padding(logp, mask)", "return -logp", "tests/losses/test_sft.py"),
        # ---- reinforcement learning
        ("gae: a value after the end token", "rl/gae.py",
         "goes_on = mask & (has_next | bootstrap[:, None])", "goes_on = mask", "tests/rl/test_gae.py"),
        ("gae: no lambda", "rl/gae.py", "discount * gae_lambda * following", "discount * following", "tests/rl/test_gae.py"),
        ("gae: returns from values of the next state", "rl/gae.py",
         "return advantages, advantages + value", "return advantages, advantages + next_value", "tests/rl/test_gae.py"),
        ("whitening adds the mean back", "rl/gae.py",
         "return zero_padding((advantages - mean) *", "return zero_padding(mean + (advantages - mean) *", "tests/rl/test_gae.py"),
        ("whitening within one process alone", "rl/ppo.py",
         "everyone = torch.from_numpy(world.total(mine))", "everyone = torch.from_numpy(mine)", "tests/rl/test_ppo_ranks.py"),
        ("the score one action early", "rl/rewards.py",
         "rewards[rows, last] += scores", "rewards[rows, last - 1] += scores", "tests/rl/test_rewards.py"),
        ("the end penalty added", "rl/rewards.py", "- end_penalty * (~ended)", "+ end_penalty * (~ended)", "tests/rl/test_rewards.py"),
        ("the end penalty on responses that ended", "rl/rewards.py", "(~ended).float()", "ended.float()", "tests/rl/test_rewards.py"),
        ("the KL controller turned round", "rl/rewards.py",
         "error = min(max(kl / target - 1", "error = min(max(1 - kl / target", "tests/rl/test_rewards.py"),
        ("k3 in the reward", "rl/rollout.py",
         "kl = k1(logp, ref_logp, response_mask[:, 1:])", "kl = (ref_logp - logp).expm1() + logp - ref_logp", ROLLOUT),
        ("the reward model reads the padding", "rl/rollout.py",
         "(reward_model(x, real),)", "(reward_model(x, torch.full_like(real, x.shape[1])),)", ROLLOUT),
        ("the reference at another temperature", "rl/rollout.py",
         "(ref(x, mask, temperature=sampling.temperature).logp,)", "(ref(x, mask).logp,)", ROLLOUT),
        ("the same random numbers every round", "rl/rollout.py",
         'stable_hash(seed, "ppo", "sampling", step)', 'stable_hash(seed, "ppo", "sampling")', LOOP),
        ("divided by the rows, not the tokens", "rl/ppo.py", "count = int(response_tokens[chosen].sum())", "count = len(chosen)", UPDATE),
        ("the same order in every round", "rl/ppo.py", 'seed, f"ppo {iteration}")', 'seed, "ppo")', UPDATE),
        ("the step beyond the target KL is taken", "rl/ppo.py", "if index and flags.target_kl", "if index > 1 and flags.target_kl", UPDATE),
        ("the entropy bonus turned round", "rl/ppo.py", "- flags.entropy_coef * entropy", "+ flags.entropy_coef * entropy", UPDATE),
        ("the entropy bonus without a gradient", "rl/ppo.py", 'with_entropy="gradient" if flags.entropy_coef else "value"', 'with_entropy="value"', UPDATE),
        ("the KL in the loss has no coefficient", "rl/ppo.py", "total = total + kl_coef * penalty", "total = total + penalty", UPDATE),
        ("values of the state after the action", "rl/ppo.py", "value_loss(scored.values[:, :-1]", "value_loss(scored.values[:, 1:]", UPDATE),
        ("bootstrapped where it ended", "rl/ppo.py", "bootstrap = ~rollout.ended if", "bootstrap = rollout.ended if", UPDATE),
        ("bootstrapped and scored as well", "rl/ppo.py", "rollout.scores.where(~bootstrap, 0.0)", "rollout.scores", UPDATE),
        ("the first ratio not checked", "rl/watch.py", "    if mean > most_mean or largest > most:", "    if False:", UPDATE),
        ("lengths left on the CPU", "model/generate.py", "lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)",
         "lengths = torch.tensor([len(prompt) for prompt in prompts])", "tests/test_elsewhere.py"),
        ("the cache's slots left on the CPU", "model/cache.py", "slots = torch.arange(self.filled + 1, device=self.lengths.device)",
         "slots = torch.arange(self.filled + 1)", "tests/test_elsewhere.py"),
        ("one token's first ratio may be anything", "rl/watch.py", "(1e-5, 1e-3)", "(1e-5, math.inf)", UPDATE),
        ("in bf16 the largest first ratio decides", "rl/watch.py", '(0.05, math.inf) if', '(0.05, 0.1) if', UPDATE),
        ("the last weights kept, not the best", "rl/ppo.py", 'if checked["objective"] > best["objective"]:', "if True:", LOOP),
        ("a broken score passes", "rl/watch.py",
         "    good &= rollout.scores.isfinite()\n    if world.any(not bool(good.all())) or not all(map(math.isfinite, numbers.values())):",
         "    if False:", LOOP),
        # ---- the loop, the model
        ("micro-batches averaged", "model/fit.py",
         "(total * (world.size / count if part else 0.0)).backward()", "(total / len(part) / len(micro_batches)).backward()", FIT),
        ("validation keeps the last batch", "model/fit.py",
         '        add_up(sums, {"loss": total, **metrics}, bool(part))',
         '        sums = {"loss": float(total), **{n: float(v) for n, v in metrics.items()}}', FIT),
        ("a loss that is not finite passes", "model/fit.py",
         "        if not all(map(math.isfinite, numbers.values())):\n            raise saving", "        if False:\n            raise saving", FIT),
        ("patience forgotten", "model/fit.py", "finished = finished or stop or since_best >= flags.patience", "finished = finished or stop", FIT),
        ("a gradient that is not finite passes", "model/optim.py", "    if not math.isfinite(norm):", "    if False:", FIT),
        ("the schedule reaches one group alone", "model/optim.py",
         "for group in optimiser.param_groups:", "for group in optimiser.param_groups[:1]:", FIT),
        ("decay on vectors too", "model/optim.py", 'if parameter.dim() >= 2 and ".layers."', 'if ".layers."', FIT),
        ("the critic's own learning rate not taken", "model/optim.py", 'lr * group.get("times", 1.0)', "lr", f"{LOOP} -k learning_rate_of_its_own"),
        ("losses not multiplied by the number of processes", "model/fit.py", "world.size / count if part", "1 / count if part", RANKS),
        ("gradients not exchanged", "model/parallel.py",
         "if isinstance(model, DistributedDataParallel) and not last:", "if isinstance(model, DistributedDataParallel):", RANKS),
        ("sampling: argmax whatever the numbers", "model/generate.py", "    if uniforms is None:\n", "    if True:\n", GENERATE),
        ("sampling: all rows the same numbers", "model/generate.py", "Philox(key=[seed, key])", "Philox(key=[seed, 0])", GENERATE),
        ("sampling: the end token not part of the response", "model/generate.py",
         "response_lengths[rows] += 1", "response_lengths[rows] += (chosen[going] != eos_id).long()", GENERATE),
        ("cache: rows that ended stay at another's place", "model/cache.py",
         "= self.lengths[rows], self.prompt_lengths[rows], self.visible[rows]",
         "= (x[: len(rows)] for x in (self.lengths, self.prompt_lengths, self.visible))", GENERATE),
        ("cache: every slot is visible", "model/transformer.py", ".masked_fill(~held.visible[:, None, None], -math.inf)", "", GENERATE),
        ("cache: scores are not scaled", "model/transformer.py", "(grouped @ held.keys).float() * query.shape[3] ** -0.5", "(grouped @ held.keys).float()", GENERATE),
        ("cache: new tokens lie where the first ones were", "model/transformer.py", "held.keys[..., -key.shape[2] :]", "held.keys[..., : key.shape[2]]", GENERATE),
        ("--compile compiles nothing", "model/parallel.py", "    if world.compiled:", "    if False:", "tests/model/test_compiled.py"),
        ("cache: one column too few", "model/cache.py", "slots >= self.width", "slots > self.width", GENERATE),
        ("cache: a column of padding", "model/cache.py", "slots < self.prompt_lengths", "slots <= self.prompt_lengths", GENERATE),
        ("rotary: halves swapped", "model/transformer.py",
         "torch.cat([-second, first], dim=-1)", "torch.cat([second, -first], dim=-1)", "tests/model/test_transformer.py"),
        ("rotary: positions of padded decoding", "model/transformer.py",
         "start = 0 if cache is None else cache.lengths[:, None]", "start = 0 if cache is None else cache.filled", GENERATE),
        ("padding left out: states come back in other rows", "model/transformer.py",
         "whole[self.numbers] = x", "whole[self.numbers.flip(0)] = x", "tests/model/test_transformer.py"),
        ("padding left out: what is spread is kept", "model/transformer.py",
         "        whole[self.numbers] = x  #", "        whole = whole.index_copy(0, self.numbers, x)  #", "tests/model/test_transformer.py -k before_rotation"),
        ("attention: all of qkv kept for the values", "model/transformer.py",
         "value = value.contiguous()", "pass", "tests/model/test_transformer.py -k before_rotation"),
        ("padding left out: the prompt, too", "model/transformer.py", "return mask.flip(1).cumsum(1).flip(1) > 0", "return mask", "tests/model/test_heads.py"),
        ("the last layer: the residual of other tokens", "model/transformer.py",
         "torch.searchsorted(others.numbers, self.numbers)", "torch.arange(len(self.numbers), device=x.device)", "tests/model/test_transformer.py"),
        ("the last layer: no value after the last token", "model/heads.py", "read = response_mask | predicting(", "read = predicting(", "tests/model/test_heads.py"),
        ("attention: not causal", "model/transformer.py", "is_causal=mask is None", "is_causal=False", "tests/model/test_transformer.py"),
        ("packing: responses see each other", "model/packing.py",
         "((parts == PROMPT)[:, None] | (parts[:, None] == parts[:, :, None]))", "(parts[:, None] >= 0)", "tests/model/test_packing.py"),
        ("packing: the rejected response after the chosen one", "model/packing.py",
         "positions = columns - rejected *", "positions = columns - 0 * rejected *", "tests/model/test_packing.py"),
        ("a score read one token early", "model/heads.py",
         "ends = lengths[:, None] - 1", "ends = lengths[:, None] - 2", "tests/model/test_heads.py"),
        ("a gradient through every entropy", "model/heads.py", 'with_entropy == "gradient"', 'with_entropy != ""', "tests/model/test_heads.py"),
        ("log-probabilities one token late", "model/heads.py",
         "states = hidden[:, :-1][mask]", "states = hidden[:, 1:][mask]", "tests/model/test_heads.py"),
        ("the value head starts with noise", "model/heads.py",
         "            nn.init.zeros_(self.value_head.weight)\n", "", "tests/model/test_heads.py"),
        ("pickles are loaded", "model/checkpoint.py",
         "file = safe_open(path, \"pt\")", "file = __import__(\"pickle\").loads(path.read_bytes())", "tests/model/test_checkpoint.py -k pickle"),
        ("missing tensors pass", "model/checkpoint.py",
         "    if problems:\n        raise", "    if False:\n        raise", "tests/model/test_checkpoint.py"),
        ("the cache's key does not count", "model/score.py",
         "json.dumps([key, list(ids)], sort_keys=True)", "json.dumps(list(ids))", "tests/model/test_score.py"),
        # ---- data
        ("a cut response keeps its end token", "data/batches.py",
         "return ids[:max_response], len(ids)", "return (*ids[: max_response - 1], ids[-1]), len(ids)", "tests/data/test_batches.py"),
        ("no end token at all", "data/batches.py",
         "ids = (*tokenizer.encode_response(response), tokenizer.eos_id)", "ids = (*tokenizer.encode_response(response),)", "tests/data/test_batches.py"),
        ("the prompt's last token counted", "data/batches.py",
         "len(row.prompt) : row.length]", "len(row.prompt) - 1 : row.length]", "tests/data/test_batches.py"),
        ("every epoch in the same order", "data/batches.py",
         'stable_hash(seed, stage, "order", epoch)', 'stable_hash(seed, stage, "order")', "tests/data/test_batches.py"),
        ("processes share rows twice", "data/batches.py",
         "mine = by_length[rank::world_size]", "mine = by_length[::world_size]", "tests/data/test_batches.py"),
        ("the last, smaller batch left out", "data/batches.py",
         "per_epoch = math.ceil(count / batch_size)", "per_epoch = count // batch_size", "tests/data/test_batches.py"),
        ("hh: split at the first turn of the assistant", "data/examples.py",
         "prompt, found, better = chosen.rpartition(ASSISTANT)",
         "prompt, found, better = chosen.partition(ASSISTANT)", "tests/data/test_examples.py"),
        ("hh: rejected cut with the chosen one's prompt", "data/examples.py",
         "    if prompt != other_prompt:", "    if False:", "tests/data/test_examples.py"),
        ("identical responses kept", "data/examples.py", "example.responses[0] == example.responses[1]:", "False:", "tests/data/test_examples.py"),
        ("splitter: ties are difficult", "data/split.py", "largest[judged] >= threshold", "largest[judged] > threshold", "tests/data/test_split.py"),
        ("splitter: absolute gaps", "data/split.py",
         "gaps = np.asarray(gaps, dtype=np.float64)\n    if gaps.shape",
         "gaps = np.abs(np.asarray(gaps, dtype=np.float64))\n    if gaps.shape", "tests/data/test_split.py"),
        ("splitter: blind routes disputed pairs", "data/split.py", 'disputed & (flags.rule != "blind")', "disputed", "tests/data/test_split.py"),
        ("equal KL: weights that went astray count", "data/compare.py",
         'if (score := line["validation"][name]["score_raw"]) > highest:', 'if score := line["validation"][name]["score_raw"] or 1:', "tests/data/test_compare.py"),
        ("pairs that are in both halves count twice", "data/compare.py", '(easy if line["made_with"]["flags"].get("--split-rule") == "none" else easy + difficult)',
         "easy + difficult", "tests/data/test_compare.py"),
        ("equal KL: however far apart", "data/compare.py", "nearest > 2 * kl or ", "", "tests/data/test_compare.py -k nearer"),
        ("a row twice for one seed", "data/compare.py", "if count > 1:", "if False:", "tests/data/test_compare.py"),
        ("verdicts read by the first key that has one of them", "data/judge.py",
         "key = keys[overlap.index(max(overlap))]", "key = keys[[known > 0 for known, _ in overlap].index(True)]", "tests/data/test_judge.py"),
        ("verdicts read by a key that asked more", "data/judge.py", "& set(found)), -len(key))", "& set(found)), 0)", "tests/data/test_judge.py"),
        ("data made anew goes unsaid", "data/run.py", 'made.get("manifest") != digest(place / MANIFEST):', "False:", "tests/data/test_run.py"),
        ("data made anew goes unsaid two stages further", "data/run.py", "        check_ancestors(place, read_json(place / MANIFEST))\n", "", "tests/data/test_run.py"),
        ("a reward model judges its own row on the frontier", "data/compare.py", 'if None in (a["made_with"]["judge"], b["made_with"]["judge"]) or kl', "if kl", "tests/data/test_compare.py -k nearer"),
        ("a folder of another default is measured as today's", "data/grid.py", "    check_defaults(grid, read_json(folder / MADE), ", "    (lambda *_: None)(grid, read_json(folder / MADE), ",
         "tests/test_grid.py -k another_default"),
        ("--target-kl: the KL that ended the round goes unsaid", "rl/ppo.py",
         '        kl_old_most = max(kl_old_most, kl_old := totals["kl_old_tok"] / count)\n        if index and flags.target_kl is not None and kl_old > flags.target_kl:',
         '        kl_old = totals["kl_old_tok"] / count\n        kl_old_most = max(kl_old_most, 0.0 if index else kl_old)\n        if index and flags.target_kl is not None and kl_old > flags.target_kl:',
         "tests/rl/test_ppo_update.py -k target_kl"),
        ("a broken reference's log-probabilities are kept", "model/score.py", "if not np.isfinite(value).all()]:", "if False]:", "tests/model/test_score.py -k cached_equals"),
        ("a reward model against which the policy learns", "losses/dpo.py", "    if not sharpness > 0:", "    if False:", "tests/losses/test_dpo.py -k sharpness"),
        ("a loss with a defect leaves an unfinished run", "model/stage.py", "            except Exception:", "            except UsageError:", "tests/test_train.py -k with_a_defect"),
        ("a place that the chain never makes is waited for", "train.py", "first in makers.get(name, ())", "first", "tests/test_train.py -k only_a_chain_could"),
        ("a row of another default is taken for finished", "data/grid.py", "grid.defaults[flag] != then:", "False:", "tests/test_grid.py -k another_default"),
        ("splitter: halves swapped", "data/split.py",
         "return Split(np.flatnonzero(easy), np.flatnonzero(difficult)",
         "return Split(np.flatnonzero(difficult), np.flatnonzero(easy)", "tests/data/test_split.py"),
        ("a changed file passes", "data/run.py", "if digest(folder / name) != expected:", "if False:", "tests/data/test_run.py"),
        ("a file written in place", "data/files.py",
         '    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")', "    beside = path", "tests/data/test_run.py"),
        # ---- resuming
        ("resume: moments not restored", "model/resume.py", "        if state:\n", "        if False:\n", RESUME),
        ("resume: weights not restored", "model/resume.py", "        parameter.copy_(sharded_like(parameter, weights[name].get_tensor(name)))\n", "", RESUME),
        ("resume: patience forgotten", "model/fit.py",
         "best=best, since_best=since_best, finished=finished)", "best=best, since_best=0, finished=finished)", RESUME),
        ("resume: metrics not taken back", "model/resume.py", "metrics.go_back((place / METRICS).read_bytes() if place else b\"\")", "pass", RESUME),
        ("resume: the best weights not taken back", "model/resume.py",
         'for path in (place / "best").rglob("*") if place else ():', "for path in ():", "tests/model/test_resume.py"),
        ("resume: later snapshots stay", "model/resume.py",
         "                shutil.rmtree(path)\n        metrics", "                pass\n        metrics", RESUME),
        ("resume: the KL coefficient not kept", "rl/ppo.py", "best=best, kl_coef=kl_coef, warned", "best=best, kl_coef=flags.kl_coef, warned", LOOP),
        ("every round the first one's prompts", "rl/ppo.py", "chosen = steps[iteration]", "chosen = steps[0]", LOOP),
        ("save: the old one goes first", "model/resume.py",
         "    try:\n        for name, content in files:",
         "    for old in checkpoints(home):\n        discard(old)\n    try:\n        for name, content in files:", RESUME),
        ("save: written in place", "model/resume.py",
         'beside, place = home / f".step-{step:08d}.tmp", home', 'beside, place = home / f"step-{step:08d}", home', RESUME),
        ("save: the newest goes", "model/resume.py", "if path <= place][-most:]", "if path <= place][:most]", RESUME),
        ("save: half a checkpoint stays", "model/resume.py",
         "        shutil.rmtree(beside, ignore_errors=True)\n        if isinstance", "        if isinstance", RESUME),
        ("save: no look at the digests", "model/resume.py",
         "        if actual == sha256:\n            continue\n", "        continue\n", "tests/test_interruptions.py -k damaged"),
        ("resume: other flags pass", "data/run.py",
         "if (folder / FLAGS).exists() and (differences", "if False and (differences", "tests/test_interruptions.py -k other_flags"),
        ("a stage in another dtype is taken for finished", "model/stage.py",
         "        if name in BY_SIZE:  #", "        if False:  #", "tests/test_train.py -k another_dtype"),
        ("a run of several seeds", "train.py", 'if "seed" not in given and made.exists():', "if False:", "tests/test_train.py -k one_seed"),
        ("a given reward model's moments taken as they come", "model/offline.py",
         "write_json(folder / CONFIG, read_json(folder / CONFIG) | stats)", "write_json(folder / CONFIG, stats | read_json(folder / CONFIG))", "tests/test_train.py -k taken_as_it_is"),
        ("training goes on where the first validation ends it", "model/fit.py", '"since_best": 0, "finished": stop}', '"since_best": 0, "finished": False}', FIT),
        ("a stale split is trained on", "data/run.py", '("rm",) if manifest["stage"] == "split" else', "", "tests/test_train.py -k taken_as_it_is"),
        ("places are part of a key", "data/run.py", '    "init", "ref", "reward_model", "prompts", "file",', "    #", "tests/test_train.py -k places_are_no"),
        ("a parent in another place is the same parent", "data/run.py",
         '"parents": set()}', '"parents": CHANGE_NO_RESULT}', "tests/test_train.py -k places_are_no"),
        ("a newer flag is ignored though typed", "model/stage.py", "if flag not in typed and not", "if not", "tests/test_train.py -k other_code"),
        ("a given tokenizer is a newer flag", "model/stage.py", ' and not flag.endswith("_digest")}', "}", "tests/test_train.py -k taken_for_one_that_is_given"),
        ("a default that has changed is a newer flag", "data/run.py", '(set(untyped) - set(made["flags"]))', "set(untyped)", "tests/data/test_run.py"),
        ("other code goes unsaid", "model/stage.py", '["versions"]["code"] != code_version()', '["versions"]["code"] != code_version() and False', "tests/test_train.py -k other_code"),
        ("a metric that is missing drops the row", "data/compare.py", "if cells.count(None) < len(cells) / 2:", "if None not in cells:", "tests/data/test_compare.py -k course"),
        ("a chain's reward model may read with another tokenizer", "train.py",
         "        if file:\n            path = ", "        if False:\n            path = ", "tests/test_train.py -k tokenizer_of_a_given"),
        ("a chain opens the models of later stages late", "train.py",
         "    if run.chain:\n        check_models(run)", "    if run.chain:\n        pass", "tests/test_train.py -k later_stages"),
        ("a model is known by its weights alone", "data/files.py",
         "for path in [*described, *files])", "for path in files)", "tests/model/test_checkpoint.py -k is_its_weights"),
        ("a reward model that was read before its end token is read at it", "model/checkpoint.py",
         'if "score_std" not in described and pad is not None', 'if False and pad is not None', "tests/model/test_checkpoint.py -k before_its_end"),
        ("a start beyond --max-kl is trained from", "model/offline.py",
         "if passed and step < 0:", "if passed and step < -1:", "tests/test_train.py -k failed_its_check"),
        ("given texts are judged whole", "model/answers.py",
         "list(texts) if self.world_name else", "list(texts) if True else", "tests/test_eval.py -k given_text"),
        ("a row may start from a row of other data", "data/ablations.py",
         "if not own.items() <= shared.items():", "if False:", "tests/data/test_ablations.py"),
        ("a given reward model needs SFT", "model/offline.py",
         '(run.parent("rm", given), 1) if given else', '(run.parent("rm", given), 1) if given and run.parent("sft") else', "tests/test_train.py -k taken_as_it_is"),
        ("the strong reward model learns from the grid's noise", "data/grid.py",
         'if flag != "--max-pairs"} | STRONG)', "})", "tests/test_grid.py -k strong"),
        ("a grid's reward model known by its name", "data/grid.py",
         "        if (flag, value) in STRONGLY.items():\n            return STRONG\n", "", "tests/test_grid.py -k strong"),
        ("a given reward model's head drawn anew", "model/checkpoint.py",
         "    new_head = new_head and not is_scalar\n", "", "tests/model/test_checkpoint.py -k keeps_its_head"),
        ("a survivor says nothing of its last checkpoint", "model/resume.py",
         "            if self.folder and (there := checkpoints(", "            if False and (there := checkpoints(", "tests/model/test_resume.py -k meanwhile"),
        ("other prompts keep their own form", "rl/online.py",
         "template=form_of(made_with)", "template=None", "tests/test_train.py -k form_of_the_runs"),
        ("quick data at full budgets", "data/prepare.py", "if made_with.get(\"quick\") and not quick:", "if False:", "tests/test_train.py -k quick_runs"),
        ("somebody's files cleared away", "data/run.py", "    if is_foreign(folder):\n        raise UsageError(f\"{folder}: has files", "    if False:\n        raise UsageError(f\"{folder}: has files", "tests/test_train.py -k no_stage_made"),
        ("a dialogue of the test file in training", "data/prepare.py", "for pair in pairs if held_together(pair.prompt, flags.data) not in tested]", "for pair in pairs if pair.prompt not in tested]", "tests/test_faults.py -k nor_from_a_file"),
        ("a dialogue of the test file in demonstrations", "data/prepare.py", "for row in read if held_together(row.prompt, flags.data) not in tested]", "for row in read if row.prompt not in tested]", "tests/test_faults.py -k nor_from_a_file"),
        ("a dialogue in validation and training", "data/prepare.py", "return prompt if data in WORLDS else opening(prompt)", "return prompt", "tests/test_faults.py -k does_not_go_on"),
        ("a dialogue in test and training", "data/examples.py", "return first + found", "return prompt", "tests/test_faults.py -k does_not_go_on"),
        ("plain demonstrations keep their form", "data/prepare.py", 'if spec.startswith("jsonl:") else', 'if spec == "" else', "tests/test_faults.py -k form_of_the_data"),
        ("models of other vocabularies go unsaid", "model/stage.py", "if rows[folder] < rows[policy] or", "if False and rows[folder] < rows[policy] or False and", "tests/test_train.py -k vocabularies"),
        ("an added end token goes unsaid", "model/stage.py", "if ends is not None and", "if False and", "tests/test_train.py -k end_token_that_was_added"),
        ("trials that another judge scored count", "data/compare.py",
         " if not any(seed in plain and on_two_sfts(of[seed], plain[seed], key) for seed in of)}", "}", "tests/data/test_compare.py -k several_trials"),
        ("sides with trials of their own are not compared", "data/compare.py",
         "(shared if len(shared) > 1 else found)", "shared", "tests/data/test_compare.py -k several_trials"),
        ("a tie on validation prompts is broken by the test", "data/compare.py",
         "max(kept, key=lambda found: found[0])", "max(kept)", "tests/data/test_compare.py -k tie_on"),
        ("a reference from outside the run goes unsaid", "eval.py", "and folder.resolve() not in ref.parents:", "and False:", "tests/test_eval.py -k another_reference"),
        ("no lock", "data/run.py", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "tests/test_interruptions.py -k two_processes"),
        ("signals not heeded", "model/resume.py", "        came = int(self.world.total(signals).max())", "        came = 0", RESUME),
        ("a vanished folder made again", "model/resume.py", "if self.world.is_main and not metrics.path.exists():", "if False:", RESUME),
        ("save: a full disk leaves the other processes gathering", "model/resume.py", "                content()  # other", "                pass  # other",
         f"{RANKS} -k full_disk"),
        ("a resting reference asked where it lies", "rl/rollout.py",
         "    with at_hand(ref, world):\n        (ref_logp,)", "    if True:\n        (ref_logp,)", "tests/test_train.py -k rest_in"),
        ("a resting model not put back", "model/parallel.py",
         "            parameter.data = values\n\n\ndef bar", "            pass\n\n\ndef bar", f"{RANKS} -k resting"),
        # ---- strangers' files, warnings, what must not change a result
        ("a line of any length is read", "data/examples.py", "file.readline(MAX_LINE + 1)", "file.readline()", READERS),
        ("a pipe is waited for", "data/examples.py", "if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):", "if False:", f"{READERS} -k pipes"),
        ("half a character in a message", "data/examples.py",
         'name[:40].encode(errors="backslashreplace").decode()', "name[:40]", READERS),
        ("verdicts end wherever a line may end", "data/judge.py",
         "Path(path).read_bytes().splitlines()", 'Path(path).read_text(encoding="utf-8").splitlines()', "tests/data/test_judge.py"),
        ("the KL may explode unheard", "rl/watch.py", "EXPLODED = 1.0", "EXPLODED = 10.0", LOOP),
        ("collapse told in every round", "rl/watch.py", "if seen and name not in warned]", "if seen]", LOOP),
        ("a critic worse than none is not told", "rl/watch.py", "rounds >= SETTLED and", "False and", LOOP),
        ("a folder's name not as a shell takes it", "data/run.py", "return shlex.join([", 'return " ".join([', "tests/test_train.py -k made_with_the_data_that_was_typed"),
        ("prompts that cannot be cut left out of the warning", "model/offline.py",
         '(counts["prompts shortened"] + dropped) / len(pairs)', 'counts["prompts shortened"] / len(pairs)', "tests/test_train.py -k limits_that_cut_much"),
        ("a model's control characters printed", "data/report.py", "printable(response[\"text\"].strip())", 'response["text"].strip()', "tests/test_eval.py -k control_characters"),
        ("collapse told again after a stop", "rl/ppo.py", "kl_coef=kl_coef, warned=warned,", "kl_coef=kl_coef, warned=[],", LOOP),
        ("a manifest with numpy's numbers", "model/watch.py", "float(kl / rows)", "kl / rows", "tests/model/test_watch.py"),
        ("prompts held out by their place in the file", "data/prepare.py",
         "is_held_out(held_together(p.prompt, flags.data), flags.test_share)], 0, {}\n        pairs = [p for p in pairs if not is_held_out(held_together(p.prompt, flags.data), flags.test_share)]",
         "is_held_out(p.where, flags.test_share)], 0, {}\n        pairs = [p for p in pairs if not is_held_out(p.where, flags.test_share)]",
         f"{INVARIANCE} order_of_rows"),
        ("folds by prompt, through dialogues", "model/offline.py", "pair.id: held_together(pair.prompt, data) for", "pair.id: pair.prompt for", "tests/test_faults.py -k part_or_fold"),
        ("the file's first prompts are asked", "model/answers.py",
         "ordered = sorted(first, key=lambda pair: stable_hash(pair.prompt))", "ordered = list(first)", f"{INVARIANCE} order_of_rows"),
        ("an answer by its place in the batch", "model/answers.py",
         "keys = [stable_hash(questions[index].prompt) for index in part]", "keys = list(range(len(part)))", f"{INVARIANCE} who_else"),
        ("PPO: micro-batches averaged", "rl/ppo.py", "(total * (world.size / count if real else 0.0)).backward()",
         "(total * (world.size / float(batch.rollout.mask[rows].sum()) / turns if real else 0.0)).backward()", f"{INVARIANCE} ppo"),
        ("the sampler at another temperature", "rl/rollout.py",
         "    temperature=sampling.temperature,\n            any_rank", "    temperature=1.0,\n            any_rank", f"{INVARIANCE} temperature"),
        ("padding found by its id", "rl/rollout.py",
         "lengths = torch.where(response_mask, columns + 1, 0).amax(dim=1)", "lengths = (tokens != sampling.pad_id).sum(dim=1)",
         f"{INVARIANCE} padding_that"),
    ]
]  # fmt: skip


def applied(mutation: Mutation, root: Path) -> str:
    """The file of a copy of the program, changed; raises ValueError where the old text does not stand there exactly once."""
    text = (root / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.what}: the text stands {text.count(mutation.old)} times in {mutation.file}")
    return text.replace(mutation.old, mutation.new)


def noticed(mutation: Mutation, copy: Path) -> tuple[bool, str]:
    """Whether the named tests fail on a copy with that defect; and pytest's last line."""
    whole = (copy / mutation.file).read_text()
    (copy / mutation.file).write_text(applied(mutation, copy))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-n0", "--durations=0", "-p", "no:cacheprovider", *mutation.tests.split()],
            cwd=copy, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    finally:
        (copy / mutation.file).write_text(whole)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1 and bool(failed), (failed or done.stdout.splitlines() or ["no output"])[-1]


def copied() -> Path:
    """A copy of the repository, to be broken."""
    copy = Path(tempfile.mkdtemp(prefix="mutations-")) / "repository"
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".hypothesis", ".*_cache")))


def main(words: list[str]) -> Iterator[str]:
    """The table's lines, as they come."""
    copy = copied()
    yield "| defect | file | noticed by |\n|:--|:--|:--|"
    for mutation in MUTATIONS:
        if not words or any(word in mutation.what for word in words):
            found, line = noticed(mutation, copy)
            by = line.partition(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ").partition("[")[0]
            yield f"| {mutation.what} | `{mutation.file}` | {f'`{by}`' if found else f'**NOT NOTICED** ({line})'} |"
    shutil.rmtree(copy.parent)


if __name__ == "__main__":
    for line in main(sys.argv[1:]):
        print(line, flush=True)
