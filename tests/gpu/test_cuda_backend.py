"""What of the CUDA kernels only a GPU shows: the driver, CUDA graphs, streams, the same bits every run, an index
outside."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import normalize

import sslkern
from sslkern.backends import BACKENDS, load
from sslkern.backends.cuda import launch
from sslkern.ops import bank_update_, queue_push_, sampled_similarity, sampled_similarity_bwd

from ..test_cuda_similarity import Similarities

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or BACKENDS["cuda"].MISSING is not None,
    reason="needs a GPU, and what the CUDA backend needs",
)


class Work:
    """All primitives once, on buffers that stay where they are."""

    def __init__(self, B: int, dtype: torch.dtype):
        with torch.device("cuda"):
            self.queue, self.ptr = torch.zeros(700, 128, dtype=dtype), torch.zeros(1, dtype=torch.long)
            self.bank = normalize(torch.randn(5000, 128), dim=1).to(dtype)
            self.x, self.y = (torch.randn(B, 128).to(dtype) for _ in range(2))
            self.index, self.names = torch.randint(5000, (B,)), torch.randint(5000, (B, 300))
            self.g = torch.randn(B, 300)
        self.start = self.bank.clone()

    def reset(self) -> None:
        self.queue.zero_(), self.ptr.zero_(), self.bank.copy_(self.start)

    def run(self) -> list[torch.Tensor]:
        queue_push_(self.queue, self.ptr, self.x, normalize=True)
        bank_update_(self.bank, self.index, self.x, 0.5)
        scores = sampled_similarity(self.x, self.bank, self.names)
        grads = sampled_similarity_bwd(self.x, self.bank, self.names, self.g)
        pairs = load("cuda", "unit_pairs")
        z, norm, cosine = pairs.unit_pairs_fwd(self.x, self.y, True)
        dx, dy = pairs.unit_pairs_bwd(z, norm, cosine, self.x.float(), self.y.float(), True, True)
        return [self.queue, self.ptr, self.bank, scores, *grads, z, norm, cosine, dx, dy]

    def results(self) -> list[torch.Tensor]:
        self.reset()
        return [x.clone() for x in self.run()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("B", [256, 3000])
def test_in_a_graph_and_again(B, dtype):
    work = Work(B, dtype)
    with sslkern.use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = work.results()
            again = work.results()
        torch.cuda.current_stream().wait_stream(side)
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work.run()
    for _ in range(2):
        work.reset()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, out, strict=True))


def test_first_used_while_a_graph_is_captured(monkeypatch):
    work = Work(256, torch.bfloat16)
    with sslkern.use_backend("cuda"):
        expected = work.results()
        monkeypatch.setattr(launch, "_loaded", {})  # modules are loaded anew
        work.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work.run()
    work.reset()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, out, strict=True))


def test_in_a_thread_where_torch_was_not_at_work():
    work, results = Work(256, torch.float32), []
    queue = torch.zeros_like(work.queue)

    def push():
        load("cuda", "queue_push").queue_push_(queue, work.ptr, work.x, True)
        load("cuda", "queue_push").queue_push_(queue, work.ptr, work.x, True)
        results.append(True)

    torch.cuda.synchronize()
    thread = threading.Thread(target=push)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert results and torch.allclose(queue[:512], normalize(work.x, dim=1).repeat(2, 1)) and work.ptr.item() == 512


def test_on_the_stream_that_is_current():
    work, queue = Work(256, torch.float32), torch.zeros(700, 128, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), sslkern.use_backend("cuda"):
        torch.cuda._sleep(10**8)  # what is on another stream runs before
        keys = work.x * 2
        queue_push_(queue, work.ptr, keys)
    torch.cuda.synchronize()
    assert torch.equal(queue[:256], work.x * 2)


def test_an_index_outside_stops():
    code = """
import torch, sslkern
sslkern.use_backend("cuda")
bank = torch.ones(4, 8, device="cuda")
sslkern.ops.bank_update_(bank, torch.tensor([4], device="cuda"), torch.ones(1, 8, device="cuda"))
torch.cuda.synchronize()"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode != 0 and "index must be a row of the bank" in out.stdout + out.stderr


# ---- similarity_lse, on Hopper --------------------------------------------------------------------------------------

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [33, 64, 128, 200, 384, 1024])
def test_similarities_in_a_graph_and_again(D, dtype):
    """The same bits, also in a thread where torch was not at work, and the host never waits."""
    with torch.device("cuda"):
        work = Similarities(D, dtype)
    expected = work.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = work.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(work.run).result()
    for results in (again, elsewhere):
        assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work.run()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, out, strict=True))
