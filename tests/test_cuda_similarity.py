"""What the kernels of the similarity family for Hopper have around them on the host, with the emulated driver."""

import ctypes
import functools
import struct

import pytest
import torch

import sslkern
from sslkern import backends
from sslkern.backends import BACKENDS, load
from sslkern.backends.cuda import compile, driver, launch
from sslkern.backends.cuda.pairs import EXTENT, Pairs
from sslkern.backends.problem import Problem

from .conftest import emulate_cuda


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    return emulate_cuda(monkeypatch)


def extents(ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack((part.min(), part.max())) for part in ids.split(EXTENT)])


@pytest.mark.parametrize("N, M", [(1, 1), (64, 65), (130, 700), (257, 3)])
def test_extents_of_ids(N, M):
    q, k = torch.randn(N, 16).bfloat16(), torch.randn(M, 16).bfloat16()
    q_ids, k_ids = (torch.randint(-(2**62), 2**62, (size,)) for size in (N, M))
    pairs = Pairs.of(Problem(q, k, q_ids=q_ids, k_ids=k_ids))
    assert torch.equal(pairs.q_extents, extents(q_ids)) and torch.equal(pairs.k_extents, extents(k_ids))
    pairs = Pairs.of(Problem(q, q_ids=q_ids[:1].expand(N)))
    assert torch.equal(pairs.q_extents, extents(q_ids[:1].expand(N))) and pairs.k_extents is pairs.q_extents


def test_words_of_a_problem():
    q, ids, bias = torch.randn(70, 8).half(), torch.arange(70), torch.randn(70)
    pairs = Pairs.of(Problem(q, q.flip(0), None, 3.0, ids, ids, True, bias))
    packed = struct.pack(*launch.layout_of("problem"), *pairs.words())
    assert struct.unpack_from("6Qf4i2?", packed) == (
        *(x.data_ptr() for x in (ids, ids, pairs.q_extents, pairs.k_extents, bias)), 0, 3.0, 70, 70, 8, 0, False, True
    )  # fmt: skip
    assert Pairs.of(Problem(q)).words() == (*[0] * 6, 1.0, 70, 70, 8, 0, True, False)


@pytest.mark.parametrize("itself", [False, True])
def test_a_part_of_a_problem(itself):
    q, k, ids = torch.randn(200, 9).half(), None if itself else torch.randn(300, 9).half(), torch.arange(300)
    bias = torch.randn(200 if itself else 300)
    pairs = Pairs.of(Problem(q, k, q_ids=ids[:200], k_ids=None if itself else ids, k_bias=bias))
    part = pairs.cut(64, 192, 64)
    assert part.sizes == (128, 136 if itself else 236, 9) and torch.equal(part.q, q[64:192])
    assert torch.equal(part.k, (q if itself else k)[64:]) and torch.equal(part.bias, bias[64:])
    assert torch.equal(part.q_extents, extents(ids[64:192]))
    assert torch.equal(part.k_extents, extents(ids[64 : 200 if itself else 300]))
    assert torch.equal(pairs.cut(128, 200, 128).q_extents, extents(ids[128:200]))
    assert (part.diagonal, pairs.cut(128, 200).diagonal) == (0, 128)


# ---- what it can, and who has the rest ------------------------------------------------------------------------------


@pytest.fixture
def others(monkeypatch):
    """`auto` finds the CUDA kernels, or the reference: the other backends are left out."""
    for name in ("cpu", "triton"):
        monkeypatch.setattr(BACKENDS[name], "MISSING", "left out")
    with sslkern.use_backend("auto"):
        yield


def served(x: torch.Tensor, D: int = 64, primitive: str = "similarity_lse", **options) -> str:
    options = dict(sizes=(1, len(x), len(x), D), bias=False, limit=False) | options
    return backends.resolve(primitive, x, **options)


@pytest.mark.parametrize("primitive", ["similarity_lse", "similarity_softplus"])
def test_what_it_can(others, monkeypatch, primitive):
    ask = functools.partial(served, primitive=primitive)
    x = torch.randn(9, 64).bfloat16()
    for D in (1, 64, 129, 300, 2000):
        assert ask(x, D) == ask(x.half(), D, bias=True) == "cuda"
        assert primitive == "similarity_softplus" or ask(x, D, frozen=True) == "cuda"
    cases = {
        "it has torch.float32 kernels for other primitives only": (x.float(), {}),
        "it takes no q_limit": (x, dict(limit=True)),
        "it takes no groups": (x[None], {}),
        f"it counts fewer than {2**28} rows": (x, dict(sizes=(1, 9, 2**28, 64))),
    }
    for says, (features, options) in cases.items():
        assert ask(features, **options) == "reference"
        with sslkern.use_backend("cuda"), pytest.raises(RuntimeError, match=f"cannot run {primitive}: {says}"):
            ask(features, **options)
    monkeypatch.setattr(launch, "_loaded", {})
    for capability in (80, 100, 120):
        monkeypatch.setattr(driver, "capability", lambda index, capability=capability: capability)
        assert ask(x) == "reference"
        says = f"it needs a GPU of compute capability 9.0, and this one has {capability / 10}"
        with sslkern.use_backend("cuda"), pytest.raises(RuntimeError, match=says):
            ask(x)
        assert backends.resolve("unit_pairs", x) == "cuda"
        launch._loaded.clear()


def test_only_what_is_needed_is_compiled(others, monkeypatch):
    made = []

    def image(unit, target):
        made.append(unit.program.removeprefix("similarity_"))
        return compile.Image(b"emulated", unit.expressions())

    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(compile, "image", image)
    x = torch.randn(9, 64).bfloat16()
    served(x, frozen=True)
    assert sorted(made) == ["extents", "lse_frozen"]
    for D, program in ((128, "softplus_gradient"), (129, "softplus_weights"), (600, "softplus_weights")):
        served(x, D, "similarity_softplus")
        assert made.pop() == program and sorted(made) == ["extents", "lse_frozen"]


class Similarities:
    """Every way that it takes, forward and backward."""

    def __init__(self, D: int, dtype: torch.dtype, N: int = 700, M: int = 900):
        q, k = (torch.nn.functional.normalize(torch.randn(n, D), dim=1).to(dtype) for n in (N, M))
        ids, scale, bias, self.g = torch.arange(M) // 3, torch.full((), 5.0), torch.randn(M), torch.rand(M)
        self.problems = (
            (Problem(q, k, scale, 1.0, ids[:N], ids, False, bias), True),
            (Problem(q, k, scale, 1.0, ids[:N], ids, True), False),
            (Problem(k, None, scale, 1.0, ids), False),
        )

    def run(self) -> list[torch.Tensor]:
        primitive, results = load("cuda", "similarity_lse"), []
        for problem, columns in self.problems:
            _, N, M, _ = problem.sizes
            row, col, _, _ = primitive.similarity_lse_fwd(problem, columns, False, 0)
            given = row, col, self.g[:N], self.g[:M] if columns else None, None
            needs = True, problem.k is not None, True, problem.k_bias is not None
            results += row, col, *primitive.similarity_lse_bwd(problem, *given, *needs)
            results += primitive.similarity_lse_fwd(problem, columns, True, 0)
            if problem.k is not None:
                results += primitive.similarity_lse_frozen_fwd(problem, True)
        return [x for x in results if x is not None]


@pytest.mark.parametrize("D", [40, 200, 600])
def test_same_bits_every_run(D):
    work = Similarities(D, torch.bfloat16, 100, 150)
    assert all(torch.equal(a, b) for a, b in zip(work.run(), work.run(), strict=True))


@pytest.mark.parametrize(
    "D, clip, views, frozen", [(64, (4, 6), (4, 3), 2), (200, (4, 3), (4, 3), 2), (600, (4, 3), (4, 3), 7)]
)
def test_few_launches(emulated, D, clip, views, frozen):
    """What a small problem waits for: the extents of ids, sums, their merge, and what has to be done again."""
    q, k = (torch.randn(256, D).bfloat16() for _ in range(2))
    ids, scale, g = torch.arange(256), torch.full((), 5.0), torch.rand(256)
    primitive = load("cuda", "similarity_lse")

    def launches(work, *arguments) -> int:
        before = launched(emulated)
        found.append(work(*arguments))
        return launched(emulated) - before

    for problem, columns, expected in (
        (Problem(q, k, scale, 1.0, ids, ids), True, clip),
        (Problem(q, None, None, 5.0, ids // 2), False, views),
    ):
        found: list = []
        forward = launches(primitive.similarity_lse_fwd, problem, columns, False, 0)
        row, col, *_ = found[0]
        given = row, col, g, g if columns else None, None
        backward = launches(primitive.similarity_lse_bwd, problem, *given, True, columns, columns, False)
        assert (forward, backward) == expected
    assert launches(primitive.similarity_lse_frozen_fwd, Problem(q, k, None, 5.0, ids, ids), False) == frozen


@pytest.mark.parametrize("D, expected", [(64, 3), (200, 2), (600, 2)])
def test_few_launches_of_softplus(emulated, D, expected):
    """The extents of ids, and an owner of rows for each side, or weights."""
    q, k = (torch.randn(256, D).bfloat16() for _ in range(2))
    before, ids, bias = launched(emulated), torch.arange(256), torch.full((), -9.0).expand(256)
    problem, needs = Problem(q, k, torch.full((), 5.0), 1.0, ids, ids), (True,) * 4
    load("cuda", "similarity_softplus").similarity_softplus_fwd(problem, bias, None, 1.0, *needs, False)
    assert launched(emulated) == before + expected


def launched(library) -> int:
    """Kernels so far."""
    numbers = (ctypes.c_int64 * 7)()
    library.emulated_last(numbers)
    return numbers[4]


LOSSES = {
    "clip": lambda x, y: sslkern.functional.clip(x, y, 10.0),
    "nt_xent": lambda x, y: sslkern.functional.nt_xent(x, y, 0.1),
    "info_nce": lambda x, y: sslkern.functional.info_nce(x, y, temperature=0.1),
    "moco": lambda x, y: sslkern.functional.moco(x, y, torch.nn.functional.normalize(y.detach().flip(0), dim=1), 0.1),
    "siglip": lambda x, y: sslkern.functional.siglip(x, y, 10.0, -5.0),
    "sup_con": lambda x, y: sslkern.functional.sup_con(torch.stack((x, y), 1), torch.arange(150) % 20, 0.1),
}


@pytest.mark.parametrize("D", [48, 200, 320])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(others, emulated, monkeypatch, name, D):
    """The whole way of a loss in 16 bits, with the other parts of it from the reference."""
    monkeypatch.setattr(load("cuda", "pair_contrast"), "MOST_ROWS", 0)  # which has few pairs for itself
    x, y = (torch.randn(150, D).bfloat16() for _ in range(2))
    found, before = {}, launched(emulated)
    for backend in ("auto", "reference"):
        sides = [side.clone().requires_grad_() for side in (x, y)]
        with sslkern.use_backend(backend):
            loss = LOSSES[name](*sides)
            loss.backward()
        found[backend] = loss.detach(), *(side.grad for side in sides if side.grad is not None)
    assert launched(emulated) > before + 1
    for got, expected in zip(*found.values(), strict=True):
        assert torch.allclose(got, expected, rtol=2**-6, atol=2**-7 * expected.abs().max().item()), name
