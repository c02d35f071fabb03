"""The kernels for Hopper that have a running maximum, on an emulated GPU, against the formula in float64."""

import math

import pytest
import torch

from sslkern.backends.cuda import similarity_lse_rows as kernels
from sslkern.backends.cuda.pairs import Pairs
from sslkern.backends.problem import Problem
from sslkern.backends.reference import similarity_lse as reference

from .conftest import emulate_cuda
from .ops import dense

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    return emulate_cuda(monkeypatch)


def problem(N, M, D, dtype=torch.bfloat16, scale=8.0, size=1.0, ids=None, same=False, bias=False, scale_tensor=False):
    """Unit rows times `size`. ids: how many different ones; M = None: of q with itself."""

    def features(n):
        return (size * torch.nn.functional.normalize(torch.randn(n, D), dim=-1)).to(dtype)

    def names(n):
        return None if ids is None or n is None else torch.randint(0, ids, (n,)) * 2 ** (33 * (ids % 2))

    k_bias = torch.randn(M or N).masked_fill(torch.rand(M or N) < 0.1, -math.inf) if bias else None
    scales = (torch.tensor(scale), 1.0) if scale_tensor else (None, scale)
    k = None if M is None else features(M)
    return Problem(features(N), k, *scales, names(N), names(M), same, k_bias)


def options(problem):
    scale = float(problem.full_scale)
    pairs = "same" if problem.same else "different"
    return dict(scale=scale, q_ids=problem.q_ids, k_ids=problem.k_ids, pairs=pairs, k_bias=problem.k_bias)


def expected(problem, dtype, columns=False):
    q, k = problem.q.to(dtype), None if problem.k is None else problem.k.to(dtype)
    return dense.similarity_lse(q, k, columns=columns, best=True, **options(problem))


def size_of_scores(problem):
    q, k = problem.q.double(), problem.keys.double()
    return abs(float(problem.full_scale)) * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()


def within(problem, results, columns=False):
    """The first of row, col where asked for, and best; by the error of the formula in fp32, and some for its products,
    which a GPU sums in long chains."""
    exact, plain = (expected(problem, dtype, columns) for dtype in (torch.float64, torch.float32))
    names = ("row", "col", "best") if columns else ("row", "best")
    for name, *three in zip(names, results, exact, plain, strict=False):
        dense.within(*three, name, 4 * size_of_scores(problem))


def mean_within(problem, mean):
    """By the error of the same product of weights in 16 bits with the keys; weights carry the rounding of scores."""
    q, k, scale = problem.q.double(), problem.k.double(), float(problem.full_scale)
    chosen = options(problem) | {"scale": scale}
    weights = dense.scores(q, k, **chosen).softmax(-1).nan_to_num(0.0)
    exact = weights @ k
    s = dense.scores(problem.q, problem.k, **chosen)
    top = s.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    terms = (s - top).exp()
    plain = (terms.to(problem.q.dtype) @ problem.k).float() / terms.sum(-1, keepdim=True).clamp(min=1e-30)
    dense.within(mean, exact, plain, "mean", 4 * max(1, size_of_scores(problem)) * k.abs().max().item())
    assert (mean[exact.eq(0).all(-1)] == 0).all()


OPTIONS = [
    dict(),
    dict(ids=5),
    dict(ids=4, same=True),
    dict(bias=True, scale=-3.0),
    dict(bias=True, ids=7, scale_tensor=True),
    dict(scale=0.0),
    dict(scale=100.0),
    dict(scale=30.0, size=20.0),  # scores of +-12,000
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, M, D", [(1, 1, 1), (70, 300, 64), (130, 200, 128), (3, 1000, 77), (150, 129, 256), (64, 400, 200)]
)
def test_frozen(N, M, D, dtype):
    given = problem(N, M, D, dtype)
    row, mean, best = kernels.frozen(Pairs.of(given), True)
    within(given, (row, best))
    mean_within(given, mean)
    again, mean_again, none = kernels.frozen(Pairs.of(given), False)
    assert none is None and torch.equal(again, row) and torch.equal(mean_again, mean)


@pytest.mark.parametrize("chosen", OPTIONS, ids=str)
def test_options_of_frozen(chosen):
    given = problem(100, 330, 40, **chosen)
    row, mean, best = kernels.frozen(Pairs.of(given), True)
    within(given, (row, best))
    mean_within(given, mean)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_frozen_in_parts(parts, monkeypatch):
    monkeypatch.setattr(kernels, "_balanced", lambda blocks, tiles, processors: -(-tiles // parts))
    given = problem(130, 700, 128, bias=True, ids=3)
    row, mean, best = kernels.frozen(Pairs.of(given), True)
    within(given, (row, best))
    mean_within(given, mean)


@pytest.mark.parametrize("last", [False, True])
def test_more_tiles_than_are_looked_at_together(last, monkeypatch):
    """Of which one has pairs that do not count."""
    monkeypatch.setattr(kernels, "_balanced", lambda blocks, tiles, processors: tiles)
    monkeypatch.setattr(kernels, "UNITS", 0)
    for D, M in ((136, 2560), (8, 5120)):  # 40 tiles of 64 and of 128 columns
        given = problem(5, M, D)
        ids = torch.arange(M - 5, M) if last else torch.arange(5)
        given = given._replace(q_ids=ids, k_ids=torch.arange(M))
        row, mean, best = kernels.frozen(Pairs.of(given), True)
        within(given, (row, best))
        mean_within(given, mean)
        within(given, kernels.with_best(Pairs.of(given), True), True)


def test_a_bias_from_anywhere():
    given = problem(70, 300, 16, bias=True)
    moved = given._replace(k_bias=torch.cat((torch.zeros(1), given.k_bias))[1:])
    for function in (kernels.frozen, kernels.with_best):
        for got, want in zip(function(Pairs.of(moved), True), function(Pairs.of(given), True), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("seed", range(8))
def test_whenever_copies_and_products_happen(seed, emulated, monkeypatch):
    emulated.emulated_seed(seed)
    monkeypatch.setattr(kernels, "_balanced", lambda blocks, tiles, processors: tiles)
    monkeypatch.setattr(kernels.Call, "processors", 2)
    for D in (40, 120, 200):
        given = problem(70, 1100, D, bias=True)
        row, mean, best = kernels.frozen(Pairs.of(given), True)
        within(given, (row, best))
        mean_within(given, mean)
    for D in (72, 600):
        given = problem(200, 300, D, bias=True)
        within(given, kernels.with_best(Pairs.of(given), True), True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, M, D", [(1, 1, 1), (70, 300, 64), (130, 200, 135), (200, 129, 576), (140, 150, 584), (3, 130, 768)]
)
def test_best_of_rows_and_columns(N, M, D, dtype):
    given = problem(N, M, D, dtype)
    row, col, best = kernels.with_best(Pairs.of(given), True)
    within(given, (row, col, best), True)
    row_alone, none, best_alone = kernels.with_best(Pairs.of(given), False)
    assert none is None and torch.equal(row_alone, row) and torch.equal(best_alone, best[:N])


@pytest.mark.parametrize("chosen", OPTIONS, ids=str)
def test_options_of_best(chosen):
    given = problem(150, 200, 40, **chosen)
    within(given, kernels.with_best(Pairs.of(given), True), True)
    itself = problem(150, None, 40, **chosen)
    row, _, best = kernels.with_best(Pairs.of(itself), False)
    within(itself, (row, best))


@pytest.mark.parametrize("processors", [1, 3])
def test_best_in_parts(processors, monkeypatch):
    """Few processors have several units each, one after the other; parts are merged."""
    monkeypatch.setattr(kernels, "LEAST_TILES", 1)
    monkeypatch.setattr(kernels.Call, "processors", processors)
    given = problem(300, 500, 72, bias=True, ids=9)
    within(given, kernels.with_best(Pairs.of(given), True), True)


@pytest.mark.parametrize("parts", [False, True])
def test_only_what_has_a_flag_is_done_again(parts, monkeypatch):
    if parts:
        monkeypatch.setattr(kernels, "LEAST_TILES", 1)
    given = problem(400, 300, 24, bias=True, ids=50)
    pairs = Pairs.of(given)
    row_flags, col_flags = torch.zeros(400, dtype=torch.uint8), torch.zeros(300, dtype=torch.uint8)
    row_flags[[0, 5, 127, 399]], col_flags[[256, 299]] = 1, 1
    row, col = torch.full((400,), 7.0), torch.full((300,), 7.0)
    kernels.redo(pairs, row, row_flags, col, col_flags)
    exact = expected(given, torch.float64, True)
    for got, flags, want in ((row, row_flags, exact[0]), (col, col_flags, exact[1])):
        assert (got[flags == 0] == 7).all()
        assert torch.allclose(got[flags == 1].double(), want[flags == 1], rtol=0, atol=1e-5)
    before = row.clone()
    kernels.redo(pairs, row, torch.zeros_like(row_flags))
    assert torch.equal(row, before)


def redone(given, columns=True):
    """What `redo` makes of everything, from rubbish."""
    pairs = Pairs.of(given)
    N, M, _ = pairs.sizes
    row, col = torch.full((N,), math.nan), torch.full((M,), 3e38)
    flags = torch.ones(N, dtype=torch.uint8), torch.ones(M, dtype=torch.uint8)
    kernels.redo(pairs, row, flags[0], *((col, flags[1]) if columns else ()))
    return (row, col) if columns else (row,)


def test_redone_duplicates_at_a_small_temperature():
    given = problem(150, None, 200, scale=100.0)
    given.q[[1, 149]] = given.q[0].clone()
    within(given, redone(given, False))
    given = problem(150, 170, 64, scale=100.0)
    given.k[160] = given.q[7]
    within(given, redone(given), True)


@pytest.mark.parametrize("D", [64, 768])
def test_redone_scores_of_any_size(D):
    given = problem(130, 140, D, size=200.0, bias=True)  # +-40,000
    within(given, redone(given), True)


def test_redone_with_nothing_left():
    ids = torch.zeros(130, dtype=torch.long).index_fill(0, torch.tensor([3, 129]), 1)
    q, k = torch.randn(130, 16).bfloat16(), torch.randn(140, 16).bfloat16()
    given = Problem(q, k, None, 1.0, ids, torch.ones(140, dtype=torch.long))
    row, col = redone(given)
    assert torch.equal(row == -math.inf, ids == 1) and col.isfinite().all()
    row, mean, best = kernels.frozen(Pairs.of(given), True)
    assert torch.equal(row == -math.inf, ids == 1) and torch.equal(best == -math.inf, ids == 1)
    assert (mean[ids == 1] == 0).all() and mean.isfinite().all()
    assert (kernels.with_best(Pairs.of(Problem(q[:1])), False)[0] == -math.inf).all()  # of itself alone


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "k_bias", "taken out"])
def test_what_is_not_finite_comes_out_as_in_the_reference(where, value):
    given = problem(70, 300, 16, bias=True)
    given.k_bias.nan_to_num_(neginf=0.0)
    at = {"q": given.q, "k": given.k, "k_bias": given.k_bias[:, None], "taken out": given.k}[where]
    at[5, 0], at[64, -1] = value, value
    if where == "taken out":
        given.k_bias[[5, 64]] = -math.inf
    row, col, best, _ = reference.similarity_lse_fwd(given, True, True, 0)

    def same(got, want):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-5, equal_nan=True)

    for got, want in zip(kernels.with_best(Pairs.of(given), True), (row, col, best), strict=True):
        same(got, want)
    for got, want in zip(redone(given), (row, col), strict=True):
        same(got, want)
    for columns_of_a_part in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_balanced", lambda *_, each=columns_of_a_part: each)
            row, mean, best = kernels.frozen(Pairs.of(given), True)
        want = reference.similarity_lse_frozen_fwd(given, True)
        same(row, want[0]), same(best, want[2])
        assert torch.equal(mean.isnan().any(1), want[1].isnan().any(1))


def test_how_work_is_shared():
    for blocks, tiles, each in [(2, 512, 8), (512, 512, 512), (128, 512, 512), (1, 1, 1), (64, 512, 256)]:
        assert kernels._balanced(blocks, tiles, 132) == each
