"""On one CUDA device: the same numbers as on the CPU, every stage in bf16, and FSDP2 over nccl. Run with -m gpu; without a device all are skipped."""

import pytest
import torch
from runs import TINY, WORLD, command, copy_of, here, manifest, steps

from data.batches import encode_pairs
from data.prepare import load_pairs
from data.tokenizer import Tokenizer
from model.checkpoint import load_model
from model.generate import generate
from model.heads import LanguageModel
from model.parallel import World
from model.score import reference_logps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_log_probabilities_and_greedy_answers_are_those_of_the_cpu(chain):
    tokenizer = Tokenizer(chain / "tokenizer" / "tokenizer.model")
    rows, _ = encode_pairs(load_pairs(chain / "data", "test"), tokenizer, 160, 24)
    logps, answers = [], []
    for device in map(torch.device, ("cpu", "cuda")):
        model = load_model(chain / "dpo", LanguageModel).to(device).eval()
        logps.append(reference_logps(model, rows, tokenizer.pad_id, World(0, 1, device, torch.float32, "ddp")))
        prompts = [row.chosen.prompt for row in rows]
        answers.append(generate(model, prompts, max_new_tokens=12, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id).tokens.cpu())
    assert logps[1] == pytest.approx(logps[0], abs=1e-3)
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_chain_goes_through(tmp_path, dtype):
    """With its always-on checks: DPO's first loss, PPO's first ratio and KL, rewards that add up."""
    output = command("--stage", "mpo", "--out", tmp_path / "run", *WORLD, *TINY, "--device", "cuda", "--dtype", dtype)
    assert "wins against SFT" in output
    assert steps(tmp_path / "run" / "dpo")[0]["loss"] == pytest.approx(0.6931, abs=1e-3 if dtype == "fp32" else 0.1)


def test_fsdp_over_nccl_learns_what_one_process_does(chain, tmp_path):
    launch = ("torch.distributed.run", "--standalone", "--nproc_per_node", "1", "train.py")
    flags = ("--stage", "sft", "--epochs", 0.2, "--validations", 1, "--device", "cuda", "--out")
    one, sharded = (copy_of(chain, tmp_path / name, "sft", "rm", "split", "dpo", "ppo") for name in ("one", "sharded"))
    here(*flags, one)
    command(*launch, *flags, sharded, "--parallel", "fsdp", program="-m")
    for line, other in zip(steps(one / "sft"), steps(sharded / "sft"), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)
    assert manifest(sharded / "sft")["results"]["loss"] == pytest.approx(manifest(one / "sft")["results"]["loss"], rel=1e-2)
