import importlib.util
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import sslkern
from sslkern import backends, use_backend

native = backends.BACKENDS["cpu"]._cpu
needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")


def run(code, **environment):
    """The last line that a fresh interpreter prints."""
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.strip().splitlines()[-1]


def test_choice_is_local_to_the_context():
    before, seen = backends.current(), []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.current()))
        thread.start()
        thread.join()
        with use_backend("auto"):
            assert backends.current() == "auto"
        assert backends.current() == "reference"
    assert backends.current() == before == seen[0]


def test_called_alone_it_sets_the_process():
    code = """
import threading, sslkern
sslkern.use_backend("reference")
thread = threading.Thread(target=lambda: print(sslkern.backends.current()))
thread.start(); thread.join()"""
    assert run(code) == "reference"
    assert run("import sslkern; print(sslkern.backends.current())", SSLKERN_BACKEND="reference") == "reference"


def test_unknown_names():
    with pytest.raises(ValueError, match="cpu, cuda, triton, reference"):
        use_backend("tpu")


def test_by_name_never_falls_back(monkeypatch):
    monkeypatch.setattr(backends.cpu, "MISSING", None)
    double = torch.randn(3, 2, dtype=torch.float64)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="float64"):
        sslkern.ops.similarity_lse(double)
    with use_backend("auto"):
        assert sslkern.ops.similarity_lse(double).dtype == torch.float64
    monkeypatch.setattr(backends.cpu, "MISSING", "no compiler")
    with pytest.raises(RuntimeError, match="no compiler"):
        use_backend("cpu")


@needs_native
def test_a_backend_is_asked_about_the_whole_problem(monkeypatch):
    monkeypatch.setattr(backends.cpu, "COLUMNS", 8)
    small, large = torch.randn(7, 4), torch.randn(8, 4)
    asked = dict(bias=False, limit=False, n=2)
    assert backends.resolve("similarity_topk", small, sizes=(1, 7, 7, 4), **asked) == "cpu"
    assert backends.resolve("similarity_topk", large, sizes=(1, 8, 8, 4), **asked) == "reference"
    values, _ = sslkern.ops.similarity_topk(large, None, 2)
    with use_backend("cpu"):
        sslkern.ops.similarity_topk(small, None, 2)
        with pytest.raises(RuntimeError, match="^backend 'cpu' cannot run similarity_topk: it counts fewer than 8"):
            sslkern.ops.similarity_topk(large, None, 2)
    with use_backend("reference"):
        assert torch.allclose(values, sslkern.ops.similarity_topk(large, None, 2)[0])


@needs_native
def test_backward_uses_the_backend_of_the_forward(monkeypatch):
    z = torch.randn(5, 3, requires_grad=True)
    with use_backend("cpu"):
        row = sslkern.ops.similarity_lse(z)
    monkeypatch.setattr(backends.load("reference", "similarity_lse"), "similarity_lse_bwd", None)
    with use_backend("reference"):
        row.sum().backward()


def test_works_without_the_native_module():
    code = """
import sys
sys.modules["sslkern._cpu"] = None
import torch, sslkern
from sslkern.info import collect
sslkern.functional.nt_xent(torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)).backward()
print("make setup" in collect()["backends"]["cpu"]["missing"])"""
    assert run(code) == "True"


def test_cuda_kernels_are_switched_by_the_environment(monkeypatch):
    def missing(wanted):
        monkeypatch.setenv("SSLKERN_CUDA", wanted)
        name, file = backends.cuda.__name__, backends.cuda.__file__
        spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=backends.cuda.__path__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.MISSING

    assert missing("0") == "SSLKERN_CUDA=0 switches it off"
    reason = missing("auto")
    if reason is None:
        assert missing("1") is None
    else:
        with pytest.raises(ImportError, match=f"^SSLKERN_CUDA=1, but .*{re.escape(reason)}$"):
            missing("1")
    code = """
try:
    import sslkern
except ImportError as error:
    print(error)"""
    assert run(code, SSLKERN_CUDA="yes") == "SSLKERN_CUDA must be 0, 1 or auto, not 'yes'"


def test_import_brings_nothing_but_torch():
    code = """
import sys, torch
before = set(sys.modules)
import sslkern
late = "sslkern.backends.cuda.compile", "sslkern.backends.cuda.launch", "sslkern.backends.triton.launch"
print([name for name in set(sys.modules) - before if name in late or not name.startswith("sslkern")])"""
    assert run(code) == "[]"


def test_info():
    out = subprocess.run([sys.executable, "-m", "sslkern.info", "--json"], capture_output=True, text=True, timeout=120)
    info = json.loads(out.stdout)
    assert info["torch"] == torch.__version__ and info["backends"]["reference"]["available"]
    lines = subprocess.run([sys.executable, "-m", "sslkern.info"], capture_output=True, text=True, timeout=120).stdout
    assert "similarity_lse" in lines
    # a value for each name, "none" where there is none
    assert all(len(line.split()) > 1 for line in lines.splitlines())


STEP = """
import os, sys, threading, torch, sslkern
sslkern.use_backend("cpu")
torch.manual_seed(0)
z = torch.randn(600, 32)
def step():
    x = z.clone().requires_grad_()
    sslkern.functional.nt_xent(x[:300], x[300:], 0.1).backward()
    return x.grad
expected = step()
"""


@needs_native
def test_forked_child():
    code = (
        STEP
        + """
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(sslkern.ops.similarity_lse(z, scale=0.1), row) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
    )
    assert (
        run(code.replace("expected = step()", "expected = step()\nrow = sslkern.ops.similarity_lse(z, scale=0.1)"))
        == "0"
    )


@needs_native
def test_many_python_threads():
    code = (
        STEP
        + """
results = []
def work():
    for _ in range(5): results.append(torch.equal(step(), expected))
threads = [threading.Thread(target=work) for _ in range(6)]
for t in threads: t.start()
for t in threads: t.join()
print(len(results), all(results))"""
    )
    assert run(code) == "30 True"


@needs_native
def test_releases_the_gil():
    code = """
import threading, time, torch, sslkern
sslkern.use_backend("cpu")
torch.set_num_threads(1)
z, ticks = torch.randn(6000, 64), 0
thread = threading.Thread(target=sslkern.ops.similarity_lse, args=(z,))
thread.start()
while thread.is_alive():
    time.sleep(0.001)
    ticks += 1
print(ticks > 5)"""
    assert run(code) == "True"
