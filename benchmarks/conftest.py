"""The fixtures `race`, `timed` and `goal`, and the tables at the end of a run."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import CPU, OURS, Step, checked_steps, medians, peak_memory, run_in_turn, times_faster


@dataclass
class Result:
    times_faster: dict[str, float]  # median over paired rounds of a rival's time by ours
    peak_bytes: dict[str, int]

    def over_dense(self) -> float:
        """How many times faster than the fastest dense form we are."""
        return min(ratio for name, ratio in self.times_faster.items() if "dense" in name)


def time_steps(
    benchmark, steps: dict[str, Step], *, seconds: float, floor_flops: float = 0, **case
) -> dict[str, float]:
    """Times the steps in turn, ours first, and keeps the figures and the case for the JSON."""
    times = run_in_turn(steps, seconds, rounds=benchmark.pedantic)
    figures = {"seconds": medians(times), "times_faster": times_faster(times)}
    benchmark.extra_info |= case | figures
    benchmark.extra_info |= {"rounds": len(times[OURS]), "load_average": round(os.getloadavg()[0], 2)}
    if floor_flops:
        rates = {name: floor_flops / t / 1e9 for name, t in figures["seconds"].items()}
        benchmark.extra_info["gflops_on_floor"] = rates
    return figures["times_faster"]


def race_contenders(
    benchmark,
    build: Callable,
    n: int,
    d: int,
    names: Sequence[str],
    dtype: str = "fp32",
    phase: str = "both",
    *,
    seconds: float,
    beside: dict[str, Step] | None = None,
    memory: bool = False,
    floor_flops: float | None = None,
    **case,
) -> Result:
    """Checks the named contenders of a problem, then times them in turn, and what is given `beside` them; with `memory`
    the peak of each is measured, too. What else is named describes the case in the JSON."""
    problem, steps = checked_steps(build, n, d, dtype, names, phase)
    floor = problem.floor_flops(phase) if floor_flops is None else floor_flops
    case = dict(problem=build.__name__, n=n, d=d, dtype=dtype, phase=phase) | case
    faster = time_steps(benchmark, steps | (beside or {}), seconds=seconds, floor_flops=floor, **case)
    if not memory:
        return Result(faster, {})
    peaks = {name: peak_memory(build, name, n, d, dtype) for name in steps}
    benchmark.extra_info["peak_bytes"] = peaks
    return Result(faster, peaks)


def set_beside_goal(
    benchmark, what: str, figure: float, *, at_most: float | None = None, at_least: float | None = None
) -> None:
    met = figure <= at_most if at_least is None else figure >= at_least
    bound = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
    goals = benchmark.extra_info.setdefault("goals", [])
    goals.append({"what": what, "figure": round(figure, 3), "goal": bound, "met": met})


@pytest.fixture
def timed(benchmark):
    """timed(steps, seconds=...) times steps in turn."""
    return partial(time_steps, benchmark)


@pytest.fixture
def race(benchmark):
    """race(problem, n, d, names, seconds=...) checks contenders and times them in turn."""
    return partial(race_contenders, benchmark)


@pytest.fixture
def goal(benchmark):
    """goal(what, figure, at_most=... or at_least=...) sets a measured figure beside the one to reach."""
    return partial(set_beside_goal, benchmark)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile gives up on a function that has met too many shapes: each case starts anew."""
    torch.compiler.reset()


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table knows one contender, ours below knows all


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(CPU.machine())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:
        benchmark.pop("options")
        benchmark["stats"].pop("data")  # a round may hold many calls: the times per call are in extra_info


def pytest_terminal_summary(terminalreporter, config):
    measured = [b for b in config._benchmarksession.benchmarks if b.extra_info]
    say = terminalreporter.write_line
    if measured:
        terminalreporter.section("medians of paired runs; x: how many times faster sslkern is")
    for b in measured:
        say(b.name)
        info = b.extra_info
        for name, seconds in info.get("seconds", {}).items():
            parts = [f"  {name:<26}{seconds * 1e3:12.3f} ms"]
            parts += [f"{info['gflops_on_floor'][name]:7.0f} Gflop/s"] if "gflops_on_floor" in info else []
            parts += [f"{info['peak_bytes'][name] / 2**20:9.1f} MiB"] if name in info.get("peak_bytes", {}) else []
            parts += [f"x {info['times_faster'][name]:.2f}"] if name != OURS else []
            say("  ".join(parts))
    goals = [goal for b in measured for goal in b.extra_info.get("goals", [])]
    if goals:
        terminalreporter.section(f"{sum(g['met'] for g in goals)} of {len(goals)} goals met")
    for g in goals:
        say(f"{'met' if g['met'] else 'MISSED':<7}{g['figure']:9.2f}  {g['goal']:<14} {g['what']}")
