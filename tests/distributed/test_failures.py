"""A rank that dies or stalls in the middle of a step: every other one gets an exception, in time."""

import contextlib
import itertools
import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from sslkern.functional import nt_xent

from .pool import NoAnswer, Pool

TIMEOUT = 2  # of the group
# For each strategy 6 in CI and 50 by `make test-distributed`, half of them of each kind.
MOMENTS = [pytest.param(i, marks=pytest.mark.slow if i < 3 else pytest.mark.long) for i in range(25)]


def steps(group, strategy, victim, delay, how):
    """Forwards and backwards until one fails, which says how long it took. Rank `victim` goes `delay` s after its first
    one."""
    z0, z1 = torch.randn(2, 40, 16, requires_grad=True)
    for step in itertools.count():
        start = time.monotonic()
        try:
            nt_xent(z0, z1, group=group, strategy=strategy).backward()
        except RuntimeError as error:
            raise RuntimeError(f"after {time.monotonic() - start:.3f} s: {error}") from error
        if step == 0 and dist.get_rank(group) == victim:
            threading.Timer(delay, os.kill, (os.getpid(), how)).start()


@pytest.fixture(scope="module")
def three():
    pool = Pool(size=3, groups=(3,), timeout=TIMEOUT)
    with contextlib.closing(pool):
        yield pool


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stalled"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_others_raise(three, strategy, how, moment):
    draw = random.Random(f"{strategy} {how} {moment}")
    victim, delay = draw.randrange(3), draw.uniform(0, 0.1)
    print(f"rank {victim}, {delay:.6f} s after the first step")
    pids = three.pids(3)
    outcomes = three.outcomes(steps, strategy, victim, delay, how, ranks=3, within=10 * TIMEOUT, lost=victim)
    gone = outcomes.pop(victim)
    assert isinstance(gone, NoAnswer)
    for error in outcomes:
        assert type(error) is RuntimeError and "one of them died, stalled" in str(error)
        assert float(str(error).split()[1]) < 2 * TIMEOUT
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
