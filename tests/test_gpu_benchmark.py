"""The GPU benchmark where there is no GPU: all of it at tiny sizes on the CPU, and what it does when kernels fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.mark.parametrize("script", ["gpu.sh", "gpu_wheels.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", BENCHMARKS / script], check=True)


BRIEF = "clip-65536-512-bf16|moco-65536-128-bf16|cpc"


@pytest.mark.parametrize(
    "selected",
    [
        pytest.param(f"^({BRIEF})", marks=pytest.mark.slow),
        pytest.param(f"^({BRIEF}|nt_xent-65536-128-fp16|queue_push|nce|clip-8192-512-fp32)", marks=pytest.mark.long),
    ],
    ids=["brief", "more"],
)
def test_dry_run_measures_checks_and_reports(tmp_path, selected):
    command = [sys.executable, BENCHMARKS / "gpu.py", tmp_path, "--dry-run", "--seconds", "300", "--select", selected]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] and not results["crashes"]
    cases = results["cases"]
    raced = {key: case for key, case in cases.items() if case["part"] in ("headlines", "small")}
    assert {"clip-65536-512-bf16", "clip-65536-512-bf16-scale-100", "cpc-64-128-tf32"} <= raced.keys()
    for key, case in raced.items():
        ours = case["contenders"]["sslkern"]
        assert ours["seconds"] > 0 and ours["graph_seconds"] > 0, key
        assert ours["error"] < 0.05 and ours["error_of_96_rows"] < 0.01, key
    clip = raced["clip-65536-512-bf16"]["contenders"]
    assert {"sslkern", "sslkern, cpu", "product", "product of 8,192^3"} < clip.keys()
    assert sum(name.startswith("compiled dense") and "graph_seconds" in f for name, f in clip.items()) == 1
    rivals = cases["clip-65536-512-bf16-rivals"]["contenders"]
    assert {
        "sslkern",
        "compiled chunks",
        "open_clip's formula",
        "dense cross_entropy",
        "chunked torch",
    } <= rivals.keys()
    kernels = cases["clip-65536-512-bf16-profile"]["contenders"]["sslkern"]["kernels"]
    assert kernels[0]["seconds"] >= kernels[-1]["seconds"] > 0
    states = {goal["what"]: goal["state"] for goal in results["goals"]}
    assert states["moco-65536-128-bf16, ms in a CUDA graph"] == states["clip-65536-512-bf16, ms"] == "dry run"
    assert states["siglip-65536-768-bf16, ms"] == "not measured"
    assert "not measured: siglip-65536-768-bf16" in results["missing"]
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Dry run") and "met |" not in page
    assert "- not measured: siglip-65536-768-bf16\n" in page


@pytest.mark.long
def test_the_script_runs_its_steps_in_order_and_times_nothing_that_is_wrong(tmp_path):
    environment = os.environ | {"GPU_DRY_RUN": "1", "SELECT": "^queue_push", "PYTHON": sys.executable}
    environment |= {"STEPS": "first headlines"}
    for name, python in ("right", sys.executable), ("wrong", tmp_path / "python"):
        if name == "wrong":  # a Python whose tests fail
            python.write_text(f'#!/bin/sh\n[ "$2" = pytest ] && exit 1\nexec {sys.executable} "$@"\n')
            python.chmod(0o755)
        command = ["bash", BENCHMARKS / "gpu.sh", tmp_path / name]
        run = subprocess.run(command, env=environment | {"PYTHON": str(python)}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        results = json.loads((tmp_path / name / "results.json").read_text())
        states = {step: state for step, state, _ in results["steps"]}
        if name == "right":
            assert list(states)[:3] == ["info", "first", "headlines"] and states["headlines"] == "ok"
            assert results["cases"]["queue_push-524288-256-bf16"]["contenders"]["copy of 2 GiB"]["seconds"] > 0
        else:
            assert states["first"] == "FAILED" and states["headlines"] == "not run" and not results["cases"]
        assert states["memcheck"] == "not run" and "==== first" in (tmp_path / name / "log.txt").read_text()


@pytest.mark.slow
def test_what_sanitizers_watch_runs():
    command = [sys.executable, BENCHMARKS / "gpu.py", "--exercise", "--dry-run"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("clip, 776 features, sslkern: ran", "unit_pairs_bwd, 72 features, sslkern, cpu: ran"):
        assert name in run.stdout


def test_compiling_ahead_calls_each_racer(gpu, monkeypatch):
    import problems

    called = []
    monkeypatch.setattr(problems, "COMPILER", "inductor")  # what a dry run changes, and puts back here
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(gpu, "step_of", lambda function, inputs, **_: lambda: called.append(function))
    gpu.warm(0, 1, True, "^nt_xent-256-128-bf16")
    case = gpu.Case("nt_xent", 256, 128, part="small")
    assert len(called) == len(case.contenders(case.build("cpu"))) >= 4


RESULT = {"part": "headlines", "flops": 0, "bytes": 0, "contenders": {"sslkern": {"seconds": 1.0}}, "failed": {}}


def test_a_contender_that_kills_its_process_is_left_out_and_the_others_are_measured(gpu, tmp_path, monkeypatch):
    starts = []

    def talk(part, done, skip, *_):
        starts.append((set(done), set(skip)))
        yield {"event": "case", "key": "a"}
        if not skip:
            yield {"event": "contender", "name": "rival"}
            yield {"event": "fatal", "reason": "CUDA error: an illegal memory access was encountered"}
            yield {"event": "gone", "reason": "exit status 3"}
            return
        yield {"event": "result", "key": "a", **RESULT}
        yield {"event": "end"}

    monkeypatch.setattr(gpu, "talk", talk)
    results = gpu.supervise(tmp_path, "", 60, False)
    assert starts == [(set(), set()), (set(), {("a", "rival")})]
    assert results["complete"] and "a" in results["cases"]
    assert results["crashes"] == [
        {"case": "a", "contender": "rival", "reason": "CUDA error: an illegal memory access was encountered"}
    ]


def test_a_run_that_is_killed_leaves_what_it_measured_and_the_next_one_adds_to_it(gpu, tmp_path, monkeypatch):
    def killed(key):
        yield {"event": "case", "key": key}
        yield {"event": "result", "key": key, **RESULT}
        yield {"event": "case", "key": "under way"}
        raise KeyboardInterrupt

    for key in ("a", "b"):
        monkeypatch.setattr(gpu, "talk", lambda *_, key=key: killed(key))
        with pytest.raises(KeyboardInterrupt):
            gpu.supervise(tmp_path, "headlines", 60, False)
        assert f"<summary>{key}</summary>" in (tmp_path / "README.md").read_text()
    assert list(json.loads((tmp_path / "results.json").read_text())["cases"]) == ["a", "b"]


def test_results_of_an_earlier_form_are_left_alone(gpu):
    with pytest.raises(SystemExit, match="is of an earlier form of this benchmark; name another folder"):
        gpu.supervise(BENCHMARKS / "results/nvidia-h100-80gb-hbm3", "", 60, False)


def test_a_worker_that_never_speaks_ends_the_run(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "talk", lambda *_: iter([{"event": "gone", "reason": "exit status 1"}]))
    results = gpu.supervise(tmp_path, "", 60, False)
    assert not results["complete"] and len(results["crashes"]) == 1


def test_wrong_results_are_refused(gpu):
    right = (torch.ones(3), torch.full((3,), 2.0))
    assert gpu.checked((right[0], None), right, 1e-6) == 0  # a gradient that a rival does not compute
    for wrong in (torch.full((3,), 2.1), torch.full((3,), torch.nan)):
        with pytest.raises(AssertionError, match="result 1 differs"):
            gpu.checked((right[0], wrong), right, 1e-2)


def test_ways_that_the_package_does_not_choose_are_taken_within_their_context_only(gpu):
    from gpu_cases import ways_of_cuda

    from sslkern.backends import BACKENDS, load

    cuda = load("cuda", "similarity_lse")

    def state():
        return cuda.BOTH_SIDES, cuda.gradient.MOST_FEATURES, BACKENDS["cuda"].LACKS["pair_contrast"]

    chosen, ways = state(), ways_of_cuda(256, 256, 128)
    for name, widest in ("owners of rows", 256), ("weights", 0):
        with ways[name]():
            assert state()[:2] == (widest, widest)
    with ways["in parts"]():
        assert state()[2](torch.ones(1)) is not None
    assert state() == chosen and ways_of_cuda(65536, 65536, 512) == {}


def test_kernels_are_told_what_they_execute(gpu):
    from gpu_cases import Case

    problem = Case("clip", 64, 32).build("cpu")
    kernels = [
        {"name": "void sslkern::cuda::forward<bf16>(...)", "seconds": 1.0},
        {"name": "similarity_lse_bwd_kernel", "seconds": 1.0},
        {"name": "nvjet_tst_128x256", "seconds": 3.0},
        {"name": "sm90_xmma_gemm_bf16", "seconds": 1.0},
        {"name": "void sslkern::cuda::pair_forward<bf16>(...)", "seconds": 1.0},
    ]
    one = 2 * 64 * 64 * 32
    rates = [kernel.get("flops_per_second") for kernel in gpu.add_rates(kernels, problem)]
    assert rates == [one, one, one / 2, one / 2, None]  # weights for BLAS, which multiplies twice
    alone = {"name": "similarity_lse_bwd_kernel", "seconds": 1.0}
    assert gpu.add_rates([alone], problem)[0]["flops_per_second"] == 4 * one


def test_goals_are_judged_at_the_rate_of_the_moment(gpu):
    import gpu_report
    from gpu_cases import CUBE, RATE, goals, plan

    keys = [case.key for case in plan()]
    assert len(keys) == len(set(keys))

    class Asked(dict):  # what the goals want to know
        def __missing__(self, key):
            assert key in keys
            raise KeyError(key)

    for goal in goals():
        with pytest.raises(KeyError):
            goal.figure(Asked())
    slow = {"seconds": 2 * 8192**3 / (RATE / 2)}  # BLAS has half of its rate
    case = RESULT | {"contenders": {"sslkern": {"seconds": 0.05}, CUBE: slow}}
    results = gpu_report.EMPTY | {"cases": {"clip-65536-512-bf16": case}}
    met = next(goal for goal in gpu_report.judged(results) if goal["what"] == "clip-65536-512-bf16, ms")
    assert met["state"] == "met" and met["figure"] == pytest.approx(25)
