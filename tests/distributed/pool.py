"""Gloo processes that live as long as the tests: a function runs on some of them, and what each rank returned or raised
comes back.

    pool.run(function, *args, ranks=3)       # function(group, *args) on each of 3 ranks: the results, in their order
    pool.outcomes(function, *args, ranks=3)  # the same, with an exception in the place of a result where there was one

The function is found by its name, so it stands in a module, which every rank imports (tests/conftest.py takes a second
of that); arguments and results are pickled. The ranks of a group of W are the last W of the world: a rank has another
number there than in the world, and who confuses them fails.

A server of multiprocessing's, which has imported torch, forks the ranks, so that a new pool takes 0.2 s. It is made
when it is first needed, and again after a call that did not end on all ranks alike.
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# The last is what torch.use_deterministic_algorithms imports.
_preloaded = ["pytest", "torch.distributed", "sslkern", "torch._inductor.config"]
_context.set_forkserver_preload(_preloaded)


def preload(module: str) -> None:
    """Ranks have it imported when they are made, once for all of them, if none were made before."""
    _preloaded.append(module)
    _context.set_forkserver_preload(_preloaded)


class RankError(RuntimeError):
    """What ranks raised, each with its traceback."""


class NoAnswer(RuntimeError):
    """A rank died, or did not return in time."""


class _Rank(NamedTuple):
    process: multiprocessing.Process
    channel: Connection


class Pool:
    """`size` processes, and groups of them of the sizes in `groups`, whose exchanges fail after `timeout` seconds."""

    def __init__(self, size: int = 8, groups: tuple[int, ...] = (1, 2, 3, 5, 8), timeout: float = 30):
        self.size, self.groups, self.timeout = size, groups, timeout
        self._ranks: list[_Rank] = []

    def run(self, function: Callable, *args, ranks: int, within: float = 60) -> list:
        """What each rank returned, in their order; raises RankError if one did not."""
        answers = self._call(function, args, ranks, within)
        failed = [f"rank {i} of {ranks}: {trace or error}" for i, (_, error, trace) in enumerate(answers) if error]
        if failed:
            raise RankError("\n".join(failed))
        return [result for result, _, _ in answers]

    def outcomes(self, function: Callable, *args, ranks: int, within: float = 60, lost: int | None = None) -> list:
        """What each rank returned, or the exception it raised: NoAnswer where it died or took more than `within` s.
        Rank `lost` is not waited for when all others have answered."""
        return [error or result for result, error, _ in self._call(function, args, ranks, within, lost)]

    def pids(self, ranks: int) -> list[int]:
        """The processes of a group of so many ranks."""
        if not self._ranks:
            self._start()
        return [rank.process.pid for rank in self._ranks[-ranks:]]

    def close(self) -> None:
        """Ends all processes, whatever they are at; stopped ones too."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.channel.close()
        self._ranks = []

    def _start(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a free port
        for number in range(self.size):
            ours, theirs = _context.Pipe()
            place = number, self.size, self._store.port, self.groups, self.timeout
            process = _context.Process(target=_serve, args=(*place, theirs), daemon=True)
            with pytest.MonkeyPatch.context() as patch:  # the server finds the same packages as this process
                patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
                process.start()
            theirs.close()  # or the end of the process would not be seen
            self._ranks.append(_Rank(process, ours))

    def _call(self, function: Callable, args: tuple, ranks: int, within: float, lost: int | None = None) -> list[tuple]:
        """(result, exception, traceback) of each rank."""
        if not self._ranks:
            self._start()
        try:
            ended = self._ended(function, args, ranks, within, lost)
        except BaseException:  # answers that nobody has read are no answers to the next call
            self.close()
            raise
        _, error, _ = ended[0]
        alike = len({(type(error), str(error)) for _, error, _ in ended}) == 1
        if isinstance(error, (RuntimeError, ImportError)) or not alike:
            self.close()  # some may still wait for others, in this collective or the next
        return ended

    def _ended(self, function: Callable, args: tuple, ranks: int, within: float, lost: int | None) -> list[tuple]:
        until = time.monotonic() + within
        called = self._ranks[-ranks:]
        answers: dict[int, tuple] = {}
        for rank in called:
            with contextlib.suppress(BrokenPipeError):  # a dead one is found below
                rank.channel.send_bytes(pickle.dumps((function, ranks, args)))
        while awaited := {rank.channel: i for i, rank in enumerate(called) if i not in answers and i != lost}:
            ready = wait(list(awaited), max(0, until - time.monotonic()))
            answers |= {awaited[channel]: self._answer(called[awaited[channel]]) for channel in ready}
            if not ready:
                break
        missing = None, NoAnswer(f"it did not return within {within} s"), ""
        return [answers.get(i, missing) for i in range(ranks)]

    def _answer(self, rank: _Rank) -> tuple:
        try:
            return pickle.loads(rank.channel.recv_bytes())
        except (EOFError, ConnectionError):
            rank.process.join()
            return None, NoAnswer(f"it died, exit code {rank.process.exitcode}"), ""


def _serve(number: int, size: int, port: int, groups: tuple[int, ...], timeout: float, channel: Connection) -> None:
    """The life of a rank."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN, as in all tests
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=number, world_size=size)
    limit = datetime.timedelta(seconds=timeout)
    of = {n: dist.new_group(range(size - n, size), limit) for n in groups}
    while True:
        try:
            job = channel.recv_bytes()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            function, ranks, args = pickle.loads(job)
            answer = function(of[ranks], *args), None, ""
        except Exception as error:
            answer = None, error, traceback.format_exc()
        channel.send_bytes(_pickled(*answer))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _pickled(result, error: Exception | None, trace: str) -> bytes:
    try:
        answer = pickle.dumps((result, error, trace))
        pickle.loads(answer)  # exceptions with arguments of their own may fail only here
        return answer
    except Exception:
        said = RuntimeError(f"this cannot be pickled: {result if error is None else error!r}")
        return pickle.dumps((None, said, trace))
