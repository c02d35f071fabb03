"""The GPU benchmark where there is no GPU: all of it at tiny sizes on the CPU, and what it does when kernels fail."""

import json
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


@pytest.mark.slow
def test_dry_run_measures_checks_and_reports(tmp_path):
    select = "^(moco-65536-128-bf16|nt_xent-8192-128-bf16|clip-8192-512-fp32|siglip-8192-128-bf16|queue_push-.*)$"
    command = [sys.executable, BENCHMARKS / "gpu.py", tmp_path, "--dry-run", "--seconds", "300", "--select", select]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] and results["rates"] and not results["crashes"]
    assert len(results["cases"]) == 5
    for key, case in results["cases"].items():
        ours = case["contenders"]["sslkern"]
        assert ours["seconds"] > 0 and ours["error"] < 0.05 and ours["error_of_96_rows"] < 0.01, key
    assert {"chunked products", "lightly's formula"} <= results["cases"]["nt_xent-8192-128-bf16"]["contenders"].keys()
    moco = results["cases"]["moco-65536-128-bf16"]["contenders"]
    assert moco["compiled dense cross_entropy"]["error"] < 0.05 and moco["sslkern"]["graph_seconds"] > 0
    states = {goal["what"]: goal["state"] for goal in results["goals"]}
    assert states["MoCo, 256 x 65,536 x 128, CUDA graph, ms"] == "dry run"
    assert states["CLIP, 65,536 x 512, ms"] == "not measured"
    assert "not measured: clip-65536-512-bf16" in results["missing"]
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Dry run") and "met |" not in page
    assert "- not measured: clip-65536-512-bf16\n" in page
    assert (tmp_path / "time.png").exists() or "plots | not run" in page


def test_a_contender_that_kills_its_process_is_left_out_and_the_others_are_measured(gpu, tmp_path, monkeypatch):
    starts = []

    def talk(first, skip, *_):
        starts.append((first, set(skip)))
        yield {"event": "case", "number": first, "key": "a"}
        if not skip:
            yield {"event": "contender", "key": "a", "name": "rival"}
            yield {"event": "fatal", "reason": "CUDA error: an illegal memory access was encountered"}
            yield {"event": "gone", "reason": "exit status 3"}
            return
        yield {"event": "result", "key": "a", "contenders": {}, "failed": {}}
        yield {"event": "end"}

    monkeypatch.setattr(gpu, "talk", talk)
    results = gpu.supervise(tmp_path, 60, False)
    assert starts == [(0, set()), (0, {("a", "rival")})]
    assert results["complete"] and "a" in results["cases"]
    assert results["crashes"] == [
        {"case": 0, "contender": "rival", "reason": "CUDA error: an illegal memory access was encountered"}
    ]


def test_a_worker_that_never_speaks_ends_the_run(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "talk", lambda *_: iter([{"event": "gone", "reason": "exit status 1"}]))
    results = gpu.supervise(tmp_path, 60, False)
    assert not results["complete"] and len(results["crashes"]) == 1


def test_wrong_results_are_refused(gpu):
    right = (torch.ones(3), torch.full((3,), 2.0))
    assert gpu.checked((right[0], None), right, 1e-6) == 0  # a gradient that a rival does not compute
    for wrong in (torch.full((3,), 2.1), torch.full((3,), torch.nan)):
        with pytest.raises(AssertionError, match="result 1 differs"):
            gpu.checked((right[0], wrong), right, 1e-2)


def test_goals_name_cases_of_the_plan(gpu):
    from gpu_cases import goals, plan

    keys = [case.key for case in plan()]
    assert len(keys) == len(set(keys))
    assert {goal.case for goal in goals()} <= set(keys)
