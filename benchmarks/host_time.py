"""What a step of a small batch costs the host: the calls of sslkern for a GPU beside those of the dense formula.

    python benchmarks/host_time.py [--seconds 3] > host_time.md

No GPU is needed. The CUDA backend launches its kernels, forward and backward, through an emulated driver that does
nothing; the dense formula calls torch's operators for two rows of eight features on the CPU, where nearly all of their
time is the calls themselves. All outputs come from torch's allocator of the CPU. What the driver itself takes for a
launch is missing on both sides: the last columns count what would launch a kernel (operators that compute something and
our kernels), and add an assumed time for each. All in turn in one process, so that nobody finds the processor's
caches as it left them, as in a training step; one thread, 16-bit features; medians in microseconds of the processor.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import problems
from harness import OURS, Cpu, Step, medians, run_in_turn, step_of
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern.backends.cuda import driver
from tests.conftest import emulate_cuda

PROBLEMS = {
    "NT-Xent": problems.nt_xent,
    "InfoNCE": problems.one_way,
    "CLIP, learned scale": problems.two_way,
    "MoCo": problems.moco,
    "SigLIP, learned scale and bias": problems.siglip,
    "SupCon": problems.sup_con,
}
LAUNCH = 0, 2, 4  # microseconds, assumed: what a driver takes has not been measured


HOST = Cpu(time.process_time)


def warm_step(problem: problems.Problem, contender: Callable) -> Step:
    step = step_of(contender, problem.inputs)
    for _ in range(50):
        step()
    return step


class Launches(TorchDispatchMode):
    """Counts the operators that compute something."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or "empty" in func.name() or func.namespace == "sslkern")
        return func(*args, **(kwargs or {}))


def launches_of(step, library) -> int:
    """By torch and by the driver."""
    last = (ctypes.c_int64 * 7)()
    library.emulated_last(last)
    before = last[4]
    with torch.autograd.set_multithreading_enabled(False), Launches() as mode:
        step()
    library.emulated_last(last)
    return mode.count + last[4] - before


def heading(each: int) -> str:
    return f"ratio, {each} us a launch" if each else "ratio without launches"


def row(name: str, problem: problems.Problem, seconds: float, library) -> str:
    steps = {form: warm_step(problem, loss) for form, loss in {OURS: problem.ours, **problem.dense}.items()}
    times = medians(run_in_turn(steps, seconds, HOST, calls=1, most=10**6))
    us = [1e6 * times[form] for form in steps]
    launches = [launches_of(step, library) for step in steps.values()]
    ratios = []
    for each in LAUNCH:
        ours, *others = (host + count * each for host, count in zip(us, launches, strict=True))
        ratios.append(f"{ours / min(others):.2f}")
    dense = ", ".join(f"{form} {host:.0f}" for form, host in zip(problem.dense, us[1:], strict=True))
    cells = [name, f"{us[0]:.0f}", dense, ", ".join(map(str, launches)), *ratios]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="for each loss")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        library = emulate_cuda(patch)
        library.emulated_idle(1)
        with driver.Context(0):  # as torch leaves it
            print(f"| us a step | {OURS} | dense | launches | {' | '.join(map(heading, LAUNCH))} |")
            print(f"| --- | {(3 + len(LAUNCH)) * '---: | '}".rstrip())
            for name, build in PROBLEMS.items():
                print(row(name, build(2, 8, torch.bfloat16), seconds, library), flush=True)
        library.emulated_idle(0)


if __name__ == "__main__":
    main()
