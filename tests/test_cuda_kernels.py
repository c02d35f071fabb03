"""How CUDA kernels are compiled, kept and launched: with a compiler and a driver that stand in for NVIDIA's."""

import ctypes
import errno
import os
import re
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import sslkern
from sslkern.backends import BACKENDS, cuda, load
from sslkern.backends.cuda import compile, driver, launch, nvrtc, pairs

from .conftest import emulate_cuda

UNIT = compile.Unit("queue_push", ("bf16", "float"))


class Compiler:
    """Instead of Nvrtc: its code says what was asked for, its log when it compiled."""

    path, version, architectures = Path("/nowhere/libnvrtc.so.13"), (13, 0), (75, 80, 90, 100)

    def __init__(self, log: Path, seconds: float = 0.0):
        self.log, self.seconds = log, seconds

    def compile(self, name, source, headers, options, expressions):
        with open(self.log, "a") as log:  # by all processes
            log.write(f"{name}\n")
        time.sleep(self.seconds)
        assert "rows.h" in headers and "__global__" in source
        code = b"\n\0 of " + " ".join(options).encode()
        return code, [f"_{expression}" for expression in expressions], "a warning"

    def times(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    found = Compiler(tmp_path / "log")
    monkeypatch.setattr(nvrtc, "load", lambda: found)
    monkeypatch.setenv("SSLKERN_CACHE", str(tmp_path / "cache"))
    return found


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_kept(compiler, tmp_path):
    first = compile.image(UNIT, "sm_90a")
    assert first.code == b"\n\0 of --gpu-architecture=sm_90a --std=c++17 --ptxas-options=--warn-on-spills"
    assert first.names == {"push<{0}, {1}>": "_sslkern::cuda::push<sslkern::cuda::bf16, float>"}
    assert first.log == "a warning"
    assert compile.image(UNIT, "sm_90a") == first and compiler.times() == 1
    assert len(files(tmp_path / "cache")) == 1


def test_anything_else_is_compiled_anew(compiler, monkeypatch):
    compile.image(UNIT, "sm_90a")
    compile.image(UNIT, "sm_80")
    compile.image(compile.Unit("queue_push", ("float", "bf16")), "sm_90a")
    assert compiler.times() == 3
    compiler.version = 13, 1
    compile.image(UNIT, "sm_90a")
    monkeypatch.setattr(compile, "_sources", lambda: {"queue_push.cu": "__global__", "rows.h": "changed"})
    compile.image(UNIT, "sm_90a")
    assert compiler.times() == 5
    compile.image(UNIT, "sm_90a")
    assert compiler.times() == 5


@pytest.mark.parametrize("damage", ["empty", "short", "a bit", "a folder", "rubbish"])
def test_what_is_damaged_is_made_anew(compiler, tmp_path, damage):
    expected = compile.image(UNIT, "sm_90a")
    (file,) = files(tmp_path / "cache")
    whole = file.read_bytes()
    if damage == "a folder":
        file.unlink(), file.mkdir()
    else:
        flipped = bytes([*whole[:-1], whole[-1] ^ 1])
        file.write_bytes({"empty": b"", "short": whole[:-3], "a bit": flipped, "rubbish": b"\xff\n\xff\n"}[damage])
    assert compile.image(UNIT, "sm_90a") == expected and compiler.times() == 2
    if damage != "a folder":
        assert files(tmp_path / "cache") == [file] and file.read_bytes() == whole
        assert compile.image(UNIT, "sm_90a") == expected and compiler.times() == 2


def test_a_folder_that_takes_nothing(compiler, monkeypatch, tmp_path):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:  # after the file was made, and before
        patch.setattr(compile, "_check", full)
        assert compile.image(UNIT, "sm_90a").code and not files(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "NamedTemporaryFile", full)
        assert compile.image(UNIT, "sm_90a").code and not files(tmp_path / "cache")
    monkeypatch.setenv("SSLKERN_CACHE", "/proc/sslkern")  # read-only, for root too
    assert compile.image(UNIT, "sm_90a").code
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSLKERN_CACHE", str(tmp_path / "file"))
    assert compile.image(UNIT, "sm_90a").code

    def homeless():
        raise RuntimeError

    monkeypatch.delenv("SSLKERN_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert compile.image(UNIT, "sm_90a").code and compiler.times() == 5


def test_a_folder_that_was_filled_and_is_read_only(compiler, monkeypatch, tmp_path):
    compile.image(UNIT, "sm_90a")

    def refuse(*args, **options):
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)  # of the lock
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    compile.image(UNIT, "sm_90a")
    monkeypatch.undo()
    assert compiler.times() == 1


def test_processes_that_start_together_compile_once(compiler):
    compiler.seconds = 0.3
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if compile.image(UNIT, "sm_90a").code else 1
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert compiler.times() == 1


def test_a_process_that_died_holds_nobody_up(compiler):
    child = os.fork()
    if child == 0:
        compiler.seconds = 60
        try:
            compile.image(UNIT, "sm_90a")
        finally:
            os._exit(1)
    while compiler.times() == 0:
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert compile.image(UNIT, "sm_90a").code and compiler.times() == 2


def test_what_a_chip_gets(compiler):
    wanted = {80: "sm_80", 90: "sm_90a", 100: "sm_100", 86: "compute_80", 121: "compute_100"}
    assert {capability: compile.target(capability) for capability in wanted} == wanted
    with pytest.raises(nvrtc.CompileError, match="compute capability 7.0"):
        compile.target(70)
    compiler.version = 11, 8
    assert compile.target(90) == "sm_90"


def test_the_command(compiler, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compile.main(["--help"])
    said = capsys.readouterr().out
    assert "--arch" in said and "--out" in said and "SSLKERN_CACHE" in said
    compile.main(["--arch", "90a", "sm_80", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    count = len(compile.units("sm_90a")) + len(compile.units("sm_80"))
    assert len(lines) == 1 + 2 * count and lines.count("a warning") == count == compiler.times()
    assert len(files(tmp_path / "out")) == count
    code = (tmp_path / "out/queue_push-bf16-float.sm_80.cubin").read_bytes()
    assert code == compile.image(UNIT, "sm_80").code
    with pytest.raises(SystemExit):
        compile.main(["--arch", "90a", "12"])
    assert "knows no sm_12, but 75, 80, 90, 100" in capsys.readouterr().err
    compile.main(["--arch", "90a"])
    assert compiler.times() == count
    monkeypatch.setattr(driver, "library", lambda: None)
    with pytest.raises(SystemExit, match="there is no GPU here; say with --arch"):
        compile.main([])


def test_the_command_for_the_gpus_here(compiler, monkeypatch, tmp_path, capsys):
    library = emulate_cuda(monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(nvrtc, "load", lambda: compiler)
    monkeypatch.setattr(driver, "library", lambda: library)
    monkeypatch.setenv("SSLKERN_CACHE", str(tmp_path / "cache"))
    compile.main([])
    assert "sm_90a" in capsys.readouterr().out
    assert compiler.times() == len(compile.units("sm_90a"))  # two GPUs of one kind
    monkeypatch.setenv("SSLKERN_CACHE", "/proc/sslkern")
    with pytest.raises(SystemExit, match="nothing can be kept in /proc/sslkern/cuda; name a folder with SSLKERN_CACHE"):
        compile.main([])


@pytest.mark.skipif(nvrtc.find() is None, reason="libnvrtc is not installed; `pip install nvidia-cuda-nvrtc` brings it")
def test_with_the_real_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("SSLKERN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")  # no nvcc
    code, names, log = compile.image(UNIT, "sm_90a")
    assert code.startswith(b"\x7fELF") and names["push<{0}, {1}>"].encode() in code and log == ""
    text, names, _ = compile.image(UNIT, f"compute_{max(nvrtc.load().architectures)}")
    assert b".version" in text and names["push<{0}, {1}>"].encode() in text
    assert compile.target(90) == "sm_90a" and compile.target(999) == f"compute_{max(nvrtc.load().architectures)}"
    with pytest.raises(nvrtc.CompileError) as error:
        compile.image(UNIT, "sm_12")
    assert "\n" not in str(error.value)
    broken = compile._sources() | {"queue_push.cu": "__global__ void push() { nothing; }"}
    monkeypatch.setattr(compile, "_sources", lambda: broken)
    with pytest.raises(nvrtc.CompileError, match='error: identifier "nothing" is undefined') as error:
        compile.image(UNIT, "sm_90a")
    assert "\n" not in str(error.value) and len(files(tmp_path)) == 2


# ---- Where it does not work -----------------------------------------------------------------------------------------


def test_why_it_is_missing(monkeypatch):
    monkeypatch.delenv("SSLKERN_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in cuda._missing()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(driver, "library", lambda: None)
    assert cuda._missing() == "there is no NVIDIA driver"
    monkeypatch.setattr(driver, "library", lambda: ctypes.CDLL(None))
    monkeypatch.setattr(nvrtc, "find", lambda: None)
    assert "`pip install nvidia-cuda-nvrtc-cu12`" in cuda._missing()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "`pip install nvidia-cuda-nvrtc`" in cuda._missing()
    monkeypatch.setattr(nvrtc, "find", lambda: Path("libnvrtc.so.13"))
    assert cuda._missing() is None


def test_which_compiler_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("sys.prefix", str(tmp_path / "nothing"))
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    real = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, what: [] if "/usr/local" in str(path) else real(path, what))
    names = [
        "torch/lib/libnvrtc-builtins-0123.so.12.4",
        "nvidia/cuda_nvrtc/lib/libnvrtc.alt.so.12",
        "torch/lib/libnvrtc-672ee683.so.11.2",
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "nvidia/cu13/lib/libnvrtc.so.13",
    ]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name, expected in zip(names, [None, None, names[2], names[3], names[3]], strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        assert nvrtc.find() == (expected and tmp_path / expected)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert nvrtc.find() == tmp_path / names[4]
    (tmp_path / names[4]).write_bytes(b"rubbish")
    with pytest.raises(nvrtc.CompileError, match="^libnvrtc cannot be loaded"):
        nvrtc.Nvrtc(nvrtc.find())


def push(B: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    queue, ptr = torch.zeros(8, 4, dtype=dtype), torch.zeros(1, dtype=torch.long)
    sslkern.ops.queue_push_(queue, ptr, torch.ones(B, 4))
    return queue


@pytest.fixture
def emulated(monkeypatch):
    library = emulate_cuda(monkeypatch)
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(launch, "_told", set())
    return library


def cannot_compile(*args):
    raise nvrtc.CompileError("a sentence of NVRTC")


def of_an_odd_driver(unit, target):
    return compile.Image(b"odd", unit.expressions())


@pytest.mark.parametrize(
    "image, says", [(cannot_compile, "a sentence of NVRTC"), (of_an_odd_driver, "image is invalid")]
)
def test_where_it_does_not_compile_or_load_the_next_backend_runs(emulated, monkeypatch, image, says):
    monkeypatch.setattr(compile, "image", image)
    for name in ("cpu", "triton"):
        monkeypatch.setattr(BACKENDS[name], "MISSING", "left out")
    with sslkern.use_backend("auto"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert push()[:3].eq(1).all() and push()[:3].eq(1).all()
        assert push(dtype=torch.bfloat16)[:3].eq(1).all()
    (said,) = (str(one.message) for one in told)  # once for all types
    assert said.startswith("sslkern: queue_push goes on without CUDA kernels") and says in said and "\n" not in said
    with (
        sslkern.use_backend("cuda"),
        pytest.raises(RuntimeError, match=f"^backend 'cuda' cannot run queue_push: .*{says}"),
    ):
        push()


def test_an_old_gpu_has_other_backends_in_silence(emulated, monkeypatch):
    monkeypatch.setattr(driver, "capability", lambda index: 75)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert push()[:3].eq(1).all()
        with (
            sslkern.use_backend("cuda"),
            pytest.raises(RuntimeError, match="capability 8.0 or newer, and this one has 7.5"),
        ):
            push()


def test_only_what_is_needed_is_compiled_and_when(emulated, monkeypatch):
    made = []

    def image(unit, target):
        made.append(str(unit))
        return compile.Image(b"emulated", unit.expressions())

    monkeypatch.setattr(compile, "image", image)
    with sslkern.use_backend("cuda"):
        for _ in range(2):
            push(), push(2000)
        push(dtype=torch.bfloat16)
        queue, ptr = torch.zeros(8, 4), torch.zeros(1, dtype=torch.long)
        sslkern.ops.queue_push_(queue, ptr, torch.ones(3, 4, dtype=torch.float64))  # the reference has it
    assert made == ["queue_push<float, float>", "queue_push<bf16, float>"]


# ---- Launches -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=dict.fromkeys((driver.Launcher, driver.ByCtypes)), ids=lambda way: way.__name__)
def launching(request, emulated, monkeypatch):
    """The driver, reached in each way."""
    monkeypatch.setattr(driver, "Launcher", request.param)
    return emulated


def last(library) -> dict:
    numbers = (ctypes.c_int64 * 7)()
    library.emulated_last(numbers)
    return dict(zip(("device", "blocks", "threads", "stream", "count", "shared", "cluster"), numbers, strict=True))


def test_launched_on_the_gpu_and_the_stream_of_torch(launching, monkeypatch):
    context = ctypes.c_void_p()
    with sslkern.use_backend("cuda"):
        for where in ((0, 0), (1, 0x7F0012345678)):
            monkeypatch.setattr(launch, "place", lambda device, where=where: where)
            before = last(launching)["count"]
            assert push(9).eq(1).all()
            index, stream = where
            where = dict(device=index, stream=stream, count=before + 1)
            assert last(launching) == where | dict(blocks=1, threads=256, shared=0, cluster=1)
            launching.cuCtxGetCurrent(ctypes.byref(context))
            assert context.value is None  # as before the call


def test_where_a_kernel_runs(monkeypatch):
    streams = {0: 0, 1: 0x7F0012345678}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.get, raising=False)
    assert launch.place(torch.device("cuda", 0)) == (0, 0)
    assert launch.place(torch.device("cuda", 1)) == (1, 0x7F0012345678)


def test_the_context_of_the_thread_comes_back(launching):
    ours, other, now = driver.Context(0), driver.Context(1), ctypes.c_void_p()
    with sslkern.use_backend("cuda"):
        for context in (ours, other):
            with context:
                push()
                launching.cuCtxGetCurrent(ctypes.byref(now))
                assert now.value == context.handle


def test_launched_from_many_threads(launching):
    """Each has its own arguments: rows that it alone writes."""
    wrong = []

    def work(number: int) -> None:
        queue, keys = torch.zeros(5, 4), torch.full((5, 4), float(number))
        for _ in range(20):
            load("cuda", "queue_push").queue_push_(queue, torch.zeros(1, dtype=torch.long), keys, False)
            if not torch.equal(queue, keys):
                wrong.append(number)
            queue.zero_()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_blocks(emulated):
    """As many as the rows need, up to a bound, from where on each takes further rows."""
    for rows, D, blocks in [(1, 4, 1), (257, 4, 2), (300, 64, 300 * 8 // 256 + 1)]:
        queue, keys = torch.zeros(rows, D), torch.ones(rows, D)
        load("cuda", "queue_push").queue_push_(queue, torch.zeros(1, dtype=torch.long), keys, False)
        assert last(emulated)["blocks"] == blocks and queue.eq(1).all()
    assert launch.teams(4096, 8, 256).blocks(5000) == 5000
    assert launch.teams(4096, 8, 256).blocks(2**40) == launch.MOST_BLOCKS


def test_what_the_driver_refuses_is_a_sentence(launching):
    call = launch.Call("queue_push", torch.device("cpu"), torch.float32, torch.float32)
    with pytest.raises(
        driver.DriverError, match=r"^the CUDA driver refused to launch queue_push<float, float>: .* 1\)$"
    ):
        call.launch("push<{0}, {1}>", 0, *launch.teams(4, 4, 32), 1, 0, 1, 0, 0, 0, False)
    with pytest.raises(driver.DriverError, match="to find another"):
        driver.Module(driver.Context(0), b"emulated").kernel("another", ["q"], "another")


def test_shared_memory_and_clusters(launching):
    call = launch.Call("queue_push", torch.device("cpu"), torch.float32, torch.float32)
    ptr = torch.zeros(1, dtype=torch.long)
    nothing = *launch.teams(4, 4, 32), 1, 0, 0, 0, ptr.data_ptr(), 0, False
    for shared, cluster in [(0, 1), (100 << 10, 1), (227 << 10, 2), (1 << 10, 4)]:
        call.launch("push<{0}, {1}>", 4, *nothing, shared=shared, cluster=cluster)
        found = last(launching)
        assert (found["blocks"], found["shared"], found["cluster"]) == (4, shared, cluster)
    for refused in (dict(shared=228 << 10), dict(cluster=3), dict(cluster=16), dict(threads=2048)):
        with pytest.raises(driver.DriverError, match="refused to launch"):
            call.launch("push<{0}, {1}>", 4, *nothing, **refused)
    assert call.processors == 3


def test_what_is_for_hopper_alone(emulated, monkeypatch):
    program = compile.PROGRAMS["queue_push"]._replace(hopper=True)
    monkeypatch.setitem(compile.PROGRAMS, "queue_push", program)
    assert any(unit.program == "queue_push" for unit in compile.units("sm_90a"))
    assert all(unit.program != "queue_push" for unit in compile.units("sm_100"))
    types = torch.float32, torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(driver, "capability", lambda index: 100)
        assert (
            launch.missing("queue_push", types, 0) == "it needs a GPU of compute capability 9.0, and this one has 10.0"
        )
    with monkeypatch.context() as patch:
        patch.setattr(compile, "target", lambda capability: "sm_90")
        assert launch.missing("queue_push", types, 1) == "it needs NVRTC of CUDA 12 or newer"
    monkeypatch.setattr(launch, "_loaded", {})
    assert launch.missing("queue_push", types, 0) is None


def test_tensor_maps(emulated):
    call = launch.Call("queue_push", torch.device("cpu"), torch.float32, torch.float32)
    x = torch.randn(70, 40).bfloat16()
    assert launch.padded(x) is x and len(call.matrix("x", x, 64)) == driver.MAP_BYTES
    assert call.matrix("x", x, 64) == call.matrix("x", x, 64) != call.matrix("x", x, 128)
    for odd in (torch.randn(70, 37).half(), x[:, 1:33], x.t(), torch.randn(5, 1).bfloat16(), x[:, :1].expand(70, 40)):
        with pytest.raises(ValueError, match="^x must have rows without gaps that begin on 16 bytes"):
            call.matrix("x", odd, 64)
        rows = launch.padded(odd)
        assert torch.equal(rows, odd) and rows.stride(0) % 8 == 0 and call.matrix("x", rows, 64)
    assert call.vector("x", torch.randn(9), 9, 128)
    with pytest.raises(ValueError, match="x must be 9 numbers"):
        call.vector("x", torch.randn(8), 9, 128)
    for refused in ((x, 0), (x, 257), (x[:0], 64)):
        with pytest.raises(driver.DriverError, match=r"refused a tensor map of \d+x40 numbers in boxes of \[\d+, 64\]"):
            call.matrix("x", *refused)


def test_numbers_that_stand_in_two_languages():
    text = "".join(path.read_text() for path in compile.SOURCES.iterdir())
    sampled = load("cuda", "sampled_similarity")
    for name, value in dict(
        THREADS=launch.THREADS, WARP=launch.WARP, PIECES=launch.PIECES, SHARE=sampled.SHARE, EXTENT=pairs.EXTENT
    ).items():
        assert re.findall(rf"constexpr int {name} = (\d+);", text) == [str(value)]
