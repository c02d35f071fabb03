"""The fixtures `race` and `goal`, and the tables at the end of a run."""

import os
import statistics
from dataclasses import dataclass

import pytest
import torch
from harness import OURS, Step, machine, paired_ratio, run_in_turn


@dataclass
class Result:
    seconds: dict[str, float]  # median per call of each contender
    times_faster: dict[str, float]  # median over paired rounds of a rival's time by ours

    def over_dense(self) -> float:
        """How many times faster than the fastest dense form we are."""
        return min(ratio for name, ratio in self.times_faster.items() if "dense" in name)


@pytest.fixture
def race(benchmark):
    """race(steps, ...) times the steps in turn, ours first, and keeps the figures and the case for the JSON."""

    def run(steps: dict[str, Step], *, seconds: float = 5.0, floor_flops: float | None = None, **case) -> Result:
        times = run_in_turn(steps, seconds, benchmark.pedantic)
        medians = {name: statistics.median(t) for name, t in times.items()}
        result = Result(medians, {name: paired_ratio(times, name) for name in times if name != OURS})
        benchmark.extra_info |= case
        benchmark.extra_info |= {"seconds": medians, "times_faster": result.times_faster}
        benchmark.extra_info |= {"rounds": len(times[OURS]), "load_average": round(os.getloadavg()[0], 2)}
        if floor_flops:
            benchmark.extra_info["gflops_on_floor"] = {name: floor_flops / t / 1e9 for name, t in medians.items()}
        return result

    return run


@pytest.fixture
def goal(benchmark):
    """goal(what, figure, at_most=... or at_least=...) sets a measured figure beside the one to reach."""

    def record(what: str, figure: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        met = figure <= at_most if at_least is None else figure >= at_least
        bound = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
        goals = benchmark.extra_info.setdefault("goals", [])
        goals.append({"what": what, "figure": round(figure, 3), "goal": bound, "met": met})

    return record


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile gives up on a function that has met too many shapes: each case starts anew."""
    torch.compiler.reset()


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table knows one contender, ours below knows all


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(machine())


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
