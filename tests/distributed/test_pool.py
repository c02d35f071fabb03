import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from .pool import NoAnswer, Pool, RankError

ROOT = Path(__file__).parents[2]
SIZES = [1, 2, 3, 5, 8]


def total(group, x):
    x = x + dist.get_rank(group)
    dist.all_reduce(x, group=group)
    return x


def ring(group):
    """What the rank before has, sent by its number in the world."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine, got = torch.tensor([rank]), torch.empty(1, dtype=torch.long)
    world = [dist.get_global_rank(group, r % size) for r in (rank + 1, rank - 1)]
    for work in [dist.isend(mine, world[0], group), dist.irecv(got, world[1], group)]:
        work.wait()
    return got.item(), dist.get_rank()


def fail(group, ranks, error):
    if dist.get_rank(group) in ranks:
        raise error
    return dist.get_rank(group)


def fail_while_others_wait(group):
    if dist.get_rank(group) == 1:
        raise KeyError("mine")
    dist.barrier(group)


def end(group, rank):
    if dist.get_rank(group) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(group)


def stop(group, rank):
    if dist.get_rank(group) == rank:
        os.kill(os.getpid(), signal.SIGSTOP)


def state(group):
    return torch.get_num_threads(), torch.empty(3).isnan().all().item(), torch.rand(1).item()


def unpicklable(group):
    return lambda: None


@pytest.mark.parametrize("ranks", SIZES)
def test_a_function_runs_on_each_rank(pool, ranks):
    x = torch.arange(3.0)
    results = pool.run(total, x, ranks=ranks)
    assert len(results) == ranks
    assert all(torch.equal(y, ranks * x + sum(range(ranks))) for y in results)


@pytest.mark.parametrize("ranks", SIZES[1:])
def test_ranks_have_another_number_in_the_world(pool, ranks):
    assert pool.run(ring, ranks=ranks) == [((rank - 1) % ranks, 8 - ranks + rank) for rank in range(ranks)]


def test_each_call_starts_alike(pool):
    first, again = (pool.run(state, ranks=3) for _ in range(2))
    assert first == again and len(set(first)) == 1 and first[0][:2] == (1, True)


def test_exceptions_come_back_with_rank_and_traceback(pool):
    before = pool.pids(8)
    everywhere = pool.outcomes(fail, range(3), ValueError("x must be y"), ranks=3)
    assert [(type(error), str(error)) for error in everywhere] == 3 * [(ValueError, "x must be y")]
    assert pool.pids(8) == before  # all ranks went the same way, so the groups are whole
    one, error, three = pool.outcomes(fail, [1], ValueError("x"), ranks=3)
    assert one == 0 and isinstance(error, ValueError) and three == 2
    with pytest.raises(RankError, match=r"(?s)^rank 2 of 5: Traceback.*in fail\n.*x must be y\n$"):
        pool.run(fail, [2], ValueError("x must be y"), ranks=5)
    with pytest.raises(RankError, match="cannot be pickled"):
        pool.run(unpicklable, ranks=2)
    assert pool.run(fail, [], None, ranks=8) == list(range(8))


@pytest.mark.slow
def test_a_rank_that_dies_or_stops_breaks_the_pool_for_one_call():
    pool = Pool(size=3, groups=(2, 3), timeout=1)
    with contextlib.closing(pool):
        one, dead, three = pool.outcomes(end, 1, ranks=3, within=20)
        assert isinstance(dead, NoAnswer) and str(dead) == "it died, exit code -9"
        assert all(isinstance(error, RuntimeError) and not isinstance(error, NoAnswer) for error in (one, three))
        assert all(isinstance(x, (KeyError, RuntimeError)) for x in pool.outcomes(fail_while_others_wait, ranks=2))
        one, stopped, three = pool.outcomes(stop, 1, ranks=3, within=2)
        assert one is None and three is None and str(stopped) == "it did not return within 2 s"
        before = pool.pids(3)
        assert pool.run(fail, [], None, ranks=3) == [0, 1, 2] and pool.pids(3) == before
    assert not any(alive(pid) for pid in before)


@pytest.mark.slow
@pytest.mark.slow
def test_what_an_interrupted_call_leaves_is_not_the_answer_to_the_next(monkeypatch):
    def interrupted(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    with contextlib.closing(Pool(size=2, groups=(2,))) as pool:
        monkeypatch.setattr("tests.distributed.pool.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.run(fail, [], None, ranks=2)
        assert pool.run(total, torch.zeros(1), ranks=2) == [torch.ones(1)] * 2


def test_no_process_outlives_the_tests(tmp_path):
    """Killed, so that nothing is tidied up, while one rank sleeps and the other waits for it."""
    script = """
from tests.distributed import pool, test_pool
ranks = pool.Pool(size=2, groups=(2,))
print(*ranks.pids(2), flush=True)
ranks.run(test_pool.wait_long, ranks=2)
"""
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in child.stdout.readline().split()]
    time.sleep(1)
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    child.kill()
    child.wait()
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def wait_long(group):
    if dist.get_rank(group) == 0:
        time.sleep(60)
    dist.barrier(group)


def alive(pid: int) -> bool:
    """A process that has ended and that nobody asked about is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
