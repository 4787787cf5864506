"""Every tensor is where its model is: the chain on a device that is not the CPU (tests/elsewhere.py) learns what it does on the CPU.

On a GPU a tensor that was left on the CPU ends the run, at the first minibatch of a stage or the first checkpoint; this finds it without one.
"""

import pytest
from runs import TINY, TRAINED, WORLD, command, copy_of, here, steps

ELSEWHERE = "tests/elsewhere.py"


def expected(run, stage):
    """Every number of every step, near enough: attention is another there, as on a GPU. Of DPO's first implicit rewards, all 0, rounding alone
    says which is the greater."""
    chance = {(0, "accuracy")} if stage == "dpo" else set()
    return [
        {name: pytest.approx(value, rel=1e-3, abs=1 if (line["step"], name) in chance else 1e-4) for name, value in line.items()} for line in steps(run / stage)
    ]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere") / "run"
    assert "wins against SFT" in command("--stage", "mpo", "--out", folder, *WORLD, *TINY, program=ELSEWHERE)
    return folder


def test_the_chain_learns_there_what_it_does_here(chain, elsewhere):
    for stage in TRAINED:
        assert steps(elsewhere / stage) == expected(chain, stage)


@pytest.mark.slow
def test_the_chain_goes_through_in_bf16(chain, tmp_path):
    """By CUDA's lists of what autocast casts, which are not the CPU's; its always-on checks hold."""
    output = command("--stage", "mpo", "--out", tmp_path / "run", *WORLD, *TINY, "--dtype", "bf16", program=ELSEWHERE)
    assert "wins against SFT" in output
    for line, other in zip(steps(tmp_path / "run" / "sft"), steps(chain / "sft"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.03)


def test_ppo_with_everything_switched_on_learns_the_same(chain, elsewhere, tmp_path):
    flags = [
        "--iterations", 2, "--prompts-per-iteration", 8, "--minibatch", 4, "--passes", 2, "--validations", 1, "--critic", "trunk", "--value-coef", 0.1,
        "--bootstrap", "--entropy-coef", 0.01, "--kl-placement", "loss", "--kl-estimator", "k2", "--kl-target", 1.0, "--target-kl", 0.5,
        "--temperature", 0.8, "--checkpoint-activations", "--save-every", 1, "--profile",
    ]  # fmt: skip
    one, other = copy_of(chain, tmp_path / "here", "ppo"), copy_of(elsewhere, tmp_path / "there", "ppo")
    here("--stage", "ppo", "--out", one, "--ref", one / "sft", "--init", one / "sft", *flags)
    command("--stage", "ppo", "--out", other, "--ref", one / "sft", "--init", one / "sft", *flags, "--reward-model", one / "rm", program=ELSEWHERE)
    assert steps(other / "ppo") == expected(one, "ppo")


def test_tensors_of_two_devices_do_not_mix():
    """Or the tests above would show nothing."""
    program = (
        "import sys; sys.path.insert(0, 'tests'); import elsewhere, torch; there = torch.ones(3).to(elsewhere.DEVICE); print((there + 1).sum().item())\n"
        "for wrong in (lambda: there + torch.ones(3), lambda: there[torch.tensor([0])], lambda: torch.cat([there, torch.ones(3)])):\n"
        "    try: wrong()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    output = command(program, program="-c")
    assert "6.0" in output and output.count("tensors on elsewhere and on cpu") == 3
