"""The simulated processes of tests/bench/scale.py hold and exchange what arithmetic says of a small model."""

import sys

import pytest
import torch.distributed as dist
from runs import ROOT

sys.path += [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "model")]
from scale import simulate  # noqa: E402
from small import CONFIG  # noqa: E402


@pytest.fixture(scope="module")
def found():
    """8 processes with 2 samples each, in one micro-batch, and 1 row each in a step; and with 8 samples and 4 rows, in several."""
    made = [simulate(CONFIG, 8, prompt=5, response=4, samples=16 * rows, minibatch=8 * rows, micro_batch=2) for rows in (1, 4)]
    assert not dist.is_initialized()
    return made


def test_what_a_process_holds(found):
    """Rows of each matrix over 8 processes, rounded up, times its columns. A layer: qkv 64/8 x 32, output 32/8 x 32, gate and up 80/8 x 32, down
    32/8 x 40, two norms 32/8: 872. Outside: embedding and output ceil(61/8) = 8 x 32 each, norm 4, value head or score 32."""
    layers, table, norm, head = 2 * 872, 8 * 32, 4, 32
    policy, reference, reward_model = layers + 2 * table + norm + head, layers + 2 * table + norm, layers + table + norm + head
    held = {"policy": 4 * policy, "optimiser state": 8 * policy, "reference": 2 * reference, "reward model": 2 * reward_model}
    assert held == found[0].held == found[1].held


def test_what_it_exchanges(found):
    """Two layers and the rest are three gatherings, of 8 padded shares in bf16, whenever weights are read; none for a further token."""
    layers, table, norm, head = 2 * 872, 8 * 32, 4, 32
    numbers = {"policy": layers + 2 * table + norm + head, "reference": layers + 2 * table + norm, "reward model": layers + table + norm + head}
    gathered = {name: 8 * 2 * count for name, count in numbers.items()}
    sums = 8 * 7 + 8 * 8 + 4 * 16  # six metrics, the log ratio and eight first ratios in float64, the norms of 16 parameters in float32
    for one, micro_batches in zip(found, (1, 4), strict=True):
        assert one.exchanged["first token"] == {"all-gather": (3, gathered["policy"])}
        assert one.exchanged["each further token"] == {"all-reduce": (1, 8)}
        assert one.exchanged["looks"] == {"all-gather": (9 * micro_batches, sum(gathered.values()) * micro_batches)}
    assert found[0].exchanged["optimiser step"] == {
        "all-gather": (6, 2 * gathered["policy"]),  # forward and backward
        "reduce-scatter": (3, 8 * 4 * numbers["policy"]),  # fp32
        "all-reduce": (3, sums),
    }
    assert found[1].exchanged["optimiser step"] == {
        "all-gather": (12, 4 * gathered["policy"]),  # four rows in two micro-batches
        "reduce-scatter": (3, 8 * 4 * numbers["policy"]),  # once, with the last
        "all-reduce": (3, sums),
    }
