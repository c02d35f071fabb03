"""The benchmarks of the CPU at tiny sizes: what their files ask for is there, is right and is timed."""

import importlib
import importlib.util
import inspect
import json
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FILES = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))
LONG = "bench_losses", "bench_sampled_similarity"
ROWS, FEATURES = 64, 16


class Benchmark:
    """In place of the fixture of pytest-benchmark, which tests do not need."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, run, args=(), setup=lambda: None, rounds=1):
        for _ in range(rounds):
            setup()
            result = run(*args)
        return result


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    return harness


@pytest.fixture
def conftest(monkeypatch, harness):
    import problems

    monkeypatch.setattr(problems, "COMPILER", "eager")
    # Of packages that tests do not need the formulas.
    monkeypatch.setattr(problems, "lightly", lambda: problems.nt_xent_lightly)
    monkeypatch.setattr(problems, "open_clip", lambda: problems.two_way_open_clip)
    monkeypatch.setattr(problems, "siglip_open_clip", lambda: problems.siglip_softplus)
    spec = importlib.util.spec_from_file_location("conftest_of_benchmarks", BENCHMARKS / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "peak_memory", lambda *case: 1)
    return module


def first_of_each(function) -> dict:
    """The first value of each parameter, by the marks."""
    chosen = {}
    for mark in getattr(function, "pytestmark", []):
        names, values = mark.args
        several = "," in names
        first = list(values)[0]
        chosen |= zip(map(str.strip, names.split(",")), first if several else [first], strict=True)
    return chosen


def run_benchmark(conftest, monkeypatch, module, function, **parameters) -> dict:
    """What it leaves for the JSON."""
    from harness import checked_steps
    from problems import bare_products

    def race(benchmark, build, n, d, names, *rest, **options):
        options["seconds"] = 0
        result = conftest.race_contenders(benchmark, build, ROWS, FEATURES, names, *rest, **options)
        not_compiled = {"compiled dense"} if build.__name__ in ("moco", "instance_discrimination") else set()
        assert set(names) - benchmark.extra_info["seconds"].keys() == not_compiled
        return result

    small = {
        "peak_memory": lambda *case: 1,
        "bare_products": lambda n, d, dtype: bare_products(ROWS, FEATURES, dtype),
        "checked_steps": lambda build, n, d, *rest: checked_steps(build, ROWS, FEATURES, *rest),
    }
    for name, replacement in small.items():
        monkeypatch.setattr(module, name, replacement, raising=False)
    benchmark = Benchmark()
    fixtures = {
        "benchmark": benchmark,
        "race": partial(race, benchmark),
        "timed": lambda steps, **options: conftest.time_steps(benchmark, steps, **options | {"seconds": 0}),
        "goal": partial(conftest.set_beside_goal, benchmark),
    }
    wanted = inspect.signature(function).parameters
    function(**{name: fixtures[name] for name in fixtures if name in wanted}, **parameters)
    return benchmark.extra_info


@pytest.mark.parametrize("file", [pytest.param(x, marks=[pytest.mark.long] if x in LONG else []) for x in FILES])
def test_each_benchmark_checks_and_times_what_it_names(conftest, monkeypatch, file):
    module = importlib.import_module(file)
    functions = [f for name, f in inspect.getmembers(module, inspect.isfunction) if name.startswith("bench_")]
    assert functions
    for function in functions:
        cases = [first_of_each(function)]
        if file == "bench_losses":
            cases = [{"name": name} for name in module.LOSSES]
        if file == "bench_similarity_lse":
            cases = [cases[0] | {"problem": problem, "phase": "both"} for problem in module.LSE_PROBLEMS]
        for case in cases:
            torch.compiler.reset()
            info = run_benchmark(conftest, monkeypatch, module, function, **case)
            json.dumps(info)
            if "seconds" not in info:
                assert info["goals"][0]["what"].startswith("NT-Xent, 131072 views x 128")
                continue
            assert info["seconds"].keys() == info["times_faster"].keys() | {"sslkern"}
            assert len(info["seconds"]) >= 2 and all(seconds > 0 for seconds in info["seconds"].values())


def test_a_contender_that_fails_leaves_and_the_others_are_timed(harness):
    def fails():
        raise RuntimeError("no memory")

    lost = {}
    steps = {"sslkern": lambda: (), "a": fails, "b": lambda: ()}
    times = harness.run_in_turn(steps, 0, calls=2, lost=lambda name, error: lost.update({name: str(error)}))
    assert lost == {"a": "no memory"} and times.keys() == {"sslkern", "b"}
    assert len(times["sslkern"]) == len(times["b"]) == 3
    with pytest.raises(RuntimeError, match="no memory"):
        harness.run_in_turn(steps, 0)


def test_times_faster_are_medians_of_paired_rounds(harness):
    times = {"sslkern": [1.0, 2.0, 3.0], "a": [2.0, 2.0, 9.0]}
    assert harness.times_faster(times) == {"a": 2.0} and harness.medians(times) == {"sslkern": 2.0, "a": 2.0}


def test_a_gpu_is_timed_by_events_and_a_graph_must_give_the_same_result(harness, monkeypatch):
    """With a stand-in for torch.cuda: what is asked of it, not what it does."""
    cuda = mock.MagicMock()
    cuda.Event.return_value.elapsed_time.return_value = 3.0  # ms
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 5, 12
    monkeypatch.setattr(torch, "cuda", cuda)
    calls = []

    def step():
        calls.append(1)
        return (torch.ones(2),)

    assert harness.GPU.seconds_per_call(step, 2) == 1.5e-3 and len(calls) == 2
    assert harness.GPU.seconds_and_peak(step) == {"seconds": 3e-3, "peak_bytes": 7}
    graph = harness.GPU.captured(step)
    assert torch.equal(graph()[0], torch.ones(2)) and cuda.CUDAGraph.return_value.replay.call_count == 2
    times = harness.run_in_turn({"sslkern": step}, 0, harness.GPU, calls=1)
    assert times == {"sslkern": [3e-3] * 3}
    with pytest.raises(AssertionError, match="the loss differs"):
        harness.GPU.captured(lambda: (torch.full((2,), float(len(calls.append(1) or calls))),))
    harness.GPU.release()
    cuda.empty_cache.assert_called()


@pytest.fixture
def compat(monkeypatch, harness):
    import compat

    # In the place of other packages our own, which are there.
    case = compat.Case("a peer's InfoNCE", "sslkern.compat.info_nce", "info_nce", 8, compat.two, lambda x: x.InfoNCE())
    absent = compat.Case("absent", "no_such_package", "info_nce", 8, compat.two, lambda x: x.InfoNCE())
    monkeypatch.setattr(compat, "CASES", [case, absent])
    return compat


@pytest.mark.slow
def test_a_stand_in_is_measured_beside_its_peer(compat, monkeypatch, tmp_path, capsys):
    """But for the process in which memory is measured."""

    def climbed(case, whose, options):
        return list(compat.climb(case, whose, options.sizes, 2**20, options.longest, options.device))

    monkeypatch.setattr(compat, "climbed", climbed)
    monkeypatch.setattr(compat, "extra_bytes", lambda step: len(step()[1]) * 2**14)
    given = ["--seconds", "0.01", "--limit", str(2**-10), "--out", str(tmp_path)]
    compat.main(["--sizes", "8", "32", "128", *given])
    (result,) = json.loads((tmp_path / "compat.json").read_text())["results"]
    assert list(result["times"]) == ["8", "32"] and result["times"]["8"]["times_faster"] > 0  # 128 needs 2 MiB
    assert {of["n"] for of in result["largest"].values()} <= set(range(56, 65))
    page = (tmp_path / "README.md").read_text()
    assert "- absent: No module named 'no_such_package'" in page and (tmp_path / "time.png").exists()
    compat.main(["--only", "InfoNCE", "--sizes", "8", "--longest", "0", *given])
    (result,) = json.loads((tmp_path / "compat.json").read_text())["results"]
    assert result["largest"]["sslkern"] == {"n": 8, "or_more": True}
    assert "not run" in capsys.readouterr().out


def test_sizes_at_which_a_stand_in_is_slower_are_named(compat):
    def at(ours, peer):
        seconds = {"sslkern": ours, "peer": peer}
        return {"seconds": seconds, "times_faster": peer / ours}

    times = {"8": at(2e-4, 1e-4), "64": at(1.02, 1.0), "512": at(1.0, 3.0)}
    fits = {"n": 512, "or_more": False}
    result = {"name": "a loss", "d": 8, "times": times, "largest": dict(sslkern=fits, peer=fits)}
    result["memory"] = {"sslkern": {"8": 2**20}, "peer": {"8": 2**21}}
    page = compat.page({"cpu": "some", "limit_gib": 2.0}, [result], {})
    assert "- a loss: 8 (2.00 times the peer's time, more than it may), 64 (1.02 times the peer's time)\n" in page
    assert "| a loss | **0.50** | **0.98** | 3.00 |" in page and "| a loss | 512 | 512 |" in page
