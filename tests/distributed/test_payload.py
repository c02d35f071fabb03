"""What ranks exchange, beside what the model says of it (sslkern/distributed/cost.py)."""

import pytest
import torch

from sslkern.distributed import recorded
from sslkern.distributed.cost import DEVICES, Problem, cost
from sslkern.functional import clip, nt_xent

STRATEGIES = "all_gather", "ring"
ITSELF = {"nt_xent": True, "clip": False}


def loss_of(name: str, rows: int, features: int, group, strategy: str):
    """The loss of so many rows of this rank, whose gradients are wanted."""
    if ITSELF[name]:
        z0, z1 = (torch.randn(rows // 2, features, requires_grad=True) for _ in range(2))
        return nt_xent(z0, z1, normalize=False, group=group, strategy=strategy)
    x, y = (torch.randn(rows, features, requires_grad=True) for _ in range(2))
    return clip(x, y, 1.0, normalize=False, group=group, strategy=strategy)


def exchanged(group, name, strategy, rows, features):
    """The bytes of the forward and of the backward, sent or received, whichever are more."""
    with recorded() as forward:
        loss = loss_of(name, rows, features, group, strategy)
    with recorded() as backward:
        loss.backward()
    return [max(record.sent, record.received) for record in (forward, backward)]


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ITSELF)
def test_what_is_exchanged_is_what_the_model_counts(pool, name, strategy, ranks):
    rows, features = 256, 128
    of = cost(strategy, Problem(rows, features, ranks, ITSELF[name], 4), DEVICES["cpu"])
    everyones = pool.run(exchanged, name, strategy, rows, features, ranks=ranks)
    for phase, counted in zip((of.forward, of.backward), zip(*everyones, strict=True), strict=True):
        assert max(counted) == pytest.approx(phase.moved, rel=0.02)
