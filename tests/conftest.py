import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import sslkern
from sslkern import backends
from sslkern.backends import BACKENDS
from sslkern.backends.cuda import compile, driver, launch

from .elsewhere import Elsewhere

ROOT = Path(__file__).resolve().parent.parent
_native = BACKENDS["cpu"]._cpu
_ISAS = list(_native.isas()) if _native else []
GPU = torch.cuda.is_available()


def _runnable() -> list[str]:
    """What can run here: the name of a backend, after a dash the variant of it."""
    if BACKENDS["triton"].INTERPRETED:
        return ["triton"]  # in a process of its own: the others do not change with it
    names = ["reference", *(f"cpu-{isa}" for isa in _ISAS)]
    if not GPU:
        return [*names, "cuda-emulated"]
    return names + [name for name in ("cuda", "triton") if BACKENDS[name].MISSING is None]


EVERY = _runnable()
if EVERY == ["triton"]:
    from . import interpreter

    interpreter.mend()
    interpreter.hurry()


def pytest_generate_tests(metafunc):
    """`backend`: each backend in turn; in the test of a primitive those that have it.

    What is traced hardly depends on the backend: all but the fastest of the CPU and those of a GPU are long tests.
    """
    if "backend" not in metafunc.fixturenames:
        return
    primitive = metafunc.module.__name__.rpartition("test_")[2]
    known = primitive in BACKENDS["reference"].PRIMITIVES
    needed = primitive if known else "similarity_lse"
    names = [name for name in EVERY if needed in BACKENDS[name.partition("-")[0]].PRIMITIVES]
    if not known:  # the CUDA kernels are a part of what losses take; the rest of it `auto` finds
        names = [name for name in names if not name.startswith("cuda")]
        if "cuda" in EVERY and ".functional." in metafunc.module.__name__:
            names.append("auto")
    for mark in metafunc.definition.iter_markers("without"):  # of backends that it is not for
        names = [name for name in names if name.partition("-")[0] not in mark.args]
    if any(word in metafunc.function.__name__ for word in ("compile", "opcheck")):
        quick = f"cpu-{_native.isa()}" if _native else "reference", "auto", "cuda", "triton"
        names = [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]
    metafunc.parametrize("backend", names, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Large problems take the interpreter seconds: there they are long tests in fp16, which runs the lines of bf16."""
    for item in items if EVERY == ["triton"] else ():
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(x is torch.float16 for x in values) and any(isinstance(x, int) and x > 100 for x in values):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """The current folder is one where nothing lies, for whatever a test starts too."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(autouse=True)
def nothing_left_behind(elsewhere):
    yield
    left = list(elsewhere.iterdir())
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not left, "a test writes into its tmp_path and nowhere else"


@pytest.fixture(autouse=True)
def nan_poisoned_memory():
    """Fresh `torch.empty` is filled with NaN, so that an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch):
    """No test sees which backend was found while another one had changed what they lack."""
    monkeypatch.setattr(backends, "_found", {})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@functools.cache
def native_build():
    """csrc/native_build.py, where it has a compiler."""
    if importlib.util.find_spec("ninja") is None:
        pytest.skip("ninja is not installed; it is needed to build the emulated CUDA kernels")
    sys.path.insert(0, str(ROOT / "csrc"))
    import native_build

    try:
        native_build.find_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    return native_build


@functools.cache
def emulated_cuda() -> ctypes.CDLL:
    """A driver whose kernels run on the CPU: tests/cuda_emulation takes the place of the GPU."""
    kernels = {"trials": []}  # of tests/test_hopper_emulation.py
    for unit in compile.UNITS:
        source = compile.PROGRAMS[unit.program].source.removesuffix(".cu")
        kernels.setdefault(source, {}).update(dict.fromkeys(unit.expressions().values()))
    path = ROOT / "build/emulated/libcuda.so"
    native_build().build_emulated_cuda(path, {name: list(found) for name, found in kernels.items()})
    return ctypes.CDLL(str(path))


_emulated_kernels: dict = {}


def emulate_cuda(monkeypatch) -> ctypes.CDLL:
    """The backend "cuda" takes tensors of the CPU, and all but its compiler is at work. In which order things happen
    in a kernel is drawn for each test anew, the same each time that it runs."""
    library = emulated_cuda()
    library.emulated_seed(zlib.crc32(os.environ.get("PYTEST_CURRENT_TEST", "").encode()))
    for where, name, value in (
        (backends, "_found", {}),
        (driver, "library", lambda: library),
        (compile, "target", lambda capability: "emulated"),
        (compile, "image", lambda unit, target: compile.Image(b"emulated", unit.expressions())),
        (launch, "_loaded", _emulated_kernels),
        (BACKENDS["cuda"], "MISSING", None),
        (BACKENDS["cuda"], "DEVICES", ("cpu",)),
    ):
        monkeypatch.setattr(where, name, value)
    return library


@pytest.fixture
def backend(request, monkeypatch):
    """The native one with each instruction set that this machine runs; those of a GPU with tensors that are born there,
    or emulated on the CPU; the reference on a device that is not there, so that nothing stays on the CPU unseen."""
    name, _, variant = request.param.partition("-")
    if variant == "emulated":
        emulate_cuda(monkeypatch)
    before = _native.isa() if name == "cpu" else None
    if name == "cpu":
        _native.set_isa(variant)
    with _device(name, request.node.nodeid), sslkern.use_backend(name):
        yield request.param
    if name == "cpu":
        _native.set_isa(before)


@contextlib.contextmanager
def _device(backend: str, test: str):
    """The default device of a test."""
    if GPU and backend in ("auto", "cuda", "triton"):
        torch.set_default_device("cuda")
        yield
        torch.set_default_device(None)
    elif backend == "reference" and not any(word in test for word in ("compile", "opcheck", "autocast")):
        # the compiler would trace it, and autocast is of the CPU
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        with Elsewhere(), pytest.MonkeyPatch.context() as patch:
            # what is computed anew in a backward does not know where it is
            patch.setitem(checks, "default", lambda x: (x.shape, x.dtype))
            yield
    else:
        yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Tensors that were there before the test, those of its module and its parameters, move to its default device. A
    test of what the CUDA kernels lack is skipped, with the reason."""
    try:
        return (yield from _on_its_device(pyfuncitem))
    except RuntimeError as error:
        found = re.match(
            "backend 'cuda' cannot run similarity_(?:lse|softplus): (it takes no|it has torch|it needs a GPU)",
            str(error),
        )
        if found is None:
            raise
        pytest.skip(str(error))


def _on_its_device(pyfuncitem):
    device = torch.empty(0).device  # torch.get_default_device of 2.6 sees no mode
    if device.type == "cpu":
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        for names in (vars(pyfuncitem.module), pyfuncitem.funcargs):
            for name, x in list(names.items()):
                if any(isinstance(leaf, Tensor) for leaf in tree_leaves(x)):
                    patch.setitem(names, name, tree_map_only(Tensor, lambda y: y.to(device), x))
        return (yield)
