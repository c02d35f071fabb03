"""How the benchmarks measure: results checked first, contenders in turn in one process, memory in a child process.

Run as a script it prints the name of this CPU, which is the folder of its results.
"""

import functools
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]

OURS = "sslkern"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 2e-6, "bf16": 1e-2}  # against float64, relative to the norm of the result
RIVAL_TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}  # rivals add their own error, larger than ours


def cpu_name() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def has_amx() -> bool:
    return sys.platform == "linux" and "amx_bf16" in Path("/proc/cpuinfo").read_text()


def machine() -> dict:
    """What a reader must know to judge a figure."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def phase_step(loss_fn: Callable[..., Tensor], inputs: Sequence[Tensor], phase: str = "both") -> Step:
    """The step to time: "forward", "backward" (of one forward done here) or "both"; returns the loss and the
    gradients that are wanted."""
    wanted = [x for x in inputs if x.requires_grad]
    if phase == "forward" or not wanted:
        return lambda: (loss_fn(*inputs),)
    if phase == "backward":
        loss = loss_fn(*inputs)
        return lambda: torch.autograd.grad(loss, wanted, retain_graph=True)

    def both():
        loss = loss_fn(*inputs)
        return (loss.detach(), *torch.autograd.grad(loss, wanted))

    return both


def checked_steps(problem: Callable, n: int, d: int, dtype: str, names: Sequence[str] = (), phase="both"):
    """The steps of the named contenders (all of them if none is named), ours first, once our result is found right:
    against float64 at a small size, against each rival at the size itself.

    Raises:
        AssertionError: a loss or a gradient is wrong.
    """
    _check_exact(problem, d, dtype)
    built = problem(n, d, DTYPES[dtype])
    contenders = {name: built.contenders[name] for name in names or built.contenders if name in built.contenders}
    got = phase_step(contenders[OURS], built.inputs)()
    for name in contenders.keys() - {OURS}:
        want = phase_step(contenders[name], built.inputs)()
        _check(f"{OURS} and {name} at n={n}, d={d}, {dtype}", got, want, RIVAL_TOLERANCE[dtype])
    return {name: phase_step(loss_fn, built.inputs, phase) for name, loss_fn in contenders.items()}


@functools.cache
def _check_exact(problem: Callable, d: int, dtype: str, n: int = 96) -> None:
    ours, exact = problem(n, d, DTYPES[dtype]), problem(n, d, torch.float64)
    got = phase_step(ours.contenders[OURS], ours.inputs)()
    inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in ours.inputs]
    want = phase_step(exact.contenders[exact.textbook], inputs)()
    _check(f"{OURS} at n={n}, d={d}, {dtype}", got, want, TOLERANCE[dtype])


def _check(what: str, got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error <= tolerance, f"{what}: {f'gradient {i}' if i else 'the loss'} differs by {error:.1e} of its norm"


def run_in_turn(steps: dict[str, Step], seconds: float, pedantic: Callable) -> dict[str, list[float]]:
    """Times the steps in paired rounds, a, b, c, a, b, c, ..., for about `seconds`; returns seconds per call.

    The first step is timed under pytest-benchmark (its `pedantic`), the others in the setup of each of its rounds.
    """
    (first, first_step), *others = steps.items()
    estimates = {name: seconds_per_call(step) for name, step in steps.items()}
    if max(estimates.values()) < 0.01:  # a first call is slower than the others, which matters to small ones only
        estimates = {name: seconds_per_call(step, 3) for name, step in steps.items()}
    calls = max(1, round(2e-3 / estimates[first]))  # rounds well above the grain of clock and scheduler
    one_round = calls * sum(estimates.values())
    rounds = min(100, max(3 if one_round < 5 else 2, int(seconds / one_round)))
    times: dict[str, list[float]] = {name: [] for name in steps}

    def time_others():
        for name, step in others:
            times[name].append(seconds_per_call(step, calls))

    pedantic(lambda: times[first].append(seconds_per_call(first_step, calls)), setup=time_others, rounds=rounds)
    return times


def seconds_per_call(step: Step, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def add_peak_memory(benchmark, problem: Callable, n: int, d: int, dtype: str, names: Sequence[str]) -> None:
    """Measures the named contenders and keeps the figures for the JSON."""
    benchmark.extra_info["peak_bytes"] = {name: peak_memory(problem, name, n, d, dtype) for name in names}


def paired_ratio(times: dict[str, list[float]], rival: str) -> float:
    """How many times faster than `rival` we are: the median over rounds of its time by ours."""
    return statistics.median(a / b for a, b in zip(times[rival], times[OURS], strict=True))


def peak_memory(problem: Callable, contender: str, n: int, d: int, dtype: str, threads: int | None = None) -> int:
    """Peak extra bytes of one forward and backward, gradients included, measured in a child process."""
    script = str(Path(__file__).with_name("peak_memory.py"))
    arguments = [problem.__name__, contender, n, d, dtype, threads or torch.get_num_threads()]
    # Without this glibc keeps freed blocks of up to 32 MiB and hides their reuse.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, script, *map(str, arguments)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(child.stdout)


if __name__ == "__main__":
    print(re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-"))
