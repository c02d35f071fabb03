"""The row owners' gradient of `similarity_lse` for Hopper, on the emulated machine: values against float64."""

import ctypes
import math

import pytest
import torch

from sslkern.backends.cuda.pairs import Pairs
from sslkern.backends.cuda.similarity_lse_gradient import gradient_of, split_of
from sslkern.backends.problem import Problem

from .conftest import emulate_cuda
from .ops import dense

TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    return emulate_cuda(monkeypatch)


def features(*shape, dtype=torch.bfloat16):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).to(dtype)


def weights(s, lse, grad, dim):
    """grad exp(s - lse), and 0 of what has nothing left."""
    if grad is None:
        return torch.zeros_like(s)
    empty = lse == -math.inf
    lse, grad = lse.masked_fill(empty, math.inf), grad.to(s.dtype).masked_fill(empty, 0)
    return grad.unsqueeze(dim) * (s - lse.unsqueeze(dim)).exp()


def stored(q, k, scale, g, h, rounded=None, **options):
    """With S stored: row, col, dq (of q with itself dz), dk, dscale, dbias. rounded: the weights on their way into
    products of features."""
    s, keys = dense.scores(q, k, scale, **options), q if k is None else k
    row, col = dense.lse(s, 1), dense.lse(s, 0)
    w = weights(s, row, g, 1) + (0 if k is None else weights(s, col, h, 0))
    dots = (q @ keys.T).where(w != 0, 0)
    both = w + w.T if k is None else w
    rows = both if rounded is None else rounded(both)
    return row, col, scale * rows @ keys, scale * rows.T @ q, (w * dots).sum(), w.sum(0)


def check(q, k=None, scale=8.0, g=None, h=None, **options):
    """gradient_of for both sides and all that it can give, against float64. The yardstick is fp32 with weights rounded
    to the type of q."""
    N = len(q)
    largest = sum(x.abs().max().item() for x in (g, g if k is None else h) if x is not None)
    fold = 2.0 ** (14 - math.floor(math.log2(largest)))
    rounded = lambda w: (w * fold).to(q.dtype).float() / fold  # noqa: E731
    wide = {name: x.double() if name == "k_bias" else x for name, x in options.items()}
    exact = stored(q.double(), None if k is None else k.double(), scale, g, h, **wide)
    plain = stored(q.float(), None if k is None else k.float(), scale, g, h, rounded, **options)
    row, col = (x.float() for x in exact[:2])
    scale_tensor, number = (scale, 2.0) if isinstance(scale, torch.Tensor) else (None, scale)
    ids = options.get("q_ids"), options.get("k_ids")
    bias, same = options.get("k_bias"), options.get("pairs") == "same"
    problem = Problem(q, k, None if scale_tensor is None else scale_tensor / 2, number, *ids, same, bias)
    pairs, results = Pairs.of(problem), {}
    given = (None if g is None else row), g, (None if h is None else col), h
    sides = ["dq", "dscale", "dbias"], ["dk", "dscale of keys", "dbias"]
    for transposed, names in enumerate(sides if k is not None else sides[:1]):
        need_bias = bias is not None and (transposed or k is None)
        results |= zip(names, gradient_of(pairs, *given, bool(transposed), True, True, need_bias), strict=True)
    norm = max(x.float().norm(dim=1).max().item() for x in (q, q if k is None else k)) ** 2
    # A weight exp(s - row) carries the rounding of s, which grows with it; upstream gradients may cancel.
    terms = 4 * max(1, abs(float(scale)) * norm) * largest
    for name, at, scale_of in (("dq", 2, 0), ("dk", 3, 0), ("dscale", 4, N * norm * terms),
                               ("dscale of keys", 4, N * norm * terms), ("dbias", 5, terms)):  # fmt: skip
        if results.get(name) is not None:
            found = results[name]
            assert found.dtype == torch.float32 and found.is_contiguous()
            dense.within(found, exact[at], plain[at], name, scale_of)
    return results


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("N, M, D", [(1, 1, 1), (130, 70, 33), (65, 300, 64), (200, 129, 72), (300, 513, 128),
                                     (129, 200, 200), (200, 140, 256)])  # fmt: skip
def test_rows_and_columns(N, M, D, dtype):
    q, k = features(N, D, dtype=dtype), features(M, D, dtype=dtype)
    check(q, k, 8.0, torch.randn(N), torch.randn(M))
    check(q, k, torch.tensor(8.0), torch.randn(N))
    check(q, k, -8.0, None, torch.randn(M))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("N, D", [(2, 3), (129, 64), (300, 128), (200, 200)])
def test_of_itself(N, D, dtype):
    z, ids = features(N, D, dtype=dtype), torch.arange(N) % ((N + 1) // 2)
    check(z, None, torch.tensor(8.0), torch.randn(N))
    check(z, None, 8.0, torch.randn(N), q_ids=ids)
    check(z, None, -3.0, torch.randn(N), q_ids=ids, k_bias=torch.randn(N))


@pytest.mark.parametrize("D", [64, 128, 200])
@pytest.mark.parametrize("pairs", ["different", "same"])
@pytest.mark.parametrize("apart", [1, 2**31, 2**40])  # ids that differ in their lower halves only, or upper
def test_ids(D, pairs, apart):
    N, M = 200, 300
    q, k, g, h = features(N, D), features(M, D), torch.randn(N), torch.randn(M)
    check(q, k, 8.0, g, h, q_ids=torch.arange(N) * apart, k_ids=torch.arange(M) * apart, pairs=pairs)
    ids = torch.randint(-3, 4, (N,)) * apart, torch.randint(-3, 4, (M,)) * apart
    check(q, k, 0.0, g, h, q_ids=ids[0], k_ids=ids[1], pairs=pairs)
    check(q, k, -8.0, g, q_ids=ids[0].sort().values, k_ids=ids[1].sort().values, pairs=pairs)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128, 200])
def test_bias(D, dtype):
    N, M = 200, 300
    q, k, g, h = features(N, D, dtype=dtype), features(M, D, dtype=dtype), torch.randn(N), torch.randn(M)
    bias = torch.randn(M).masked_fill(torch.rand(M) < 0.2, -math.inf)
    check(q, k, 8.0, g, h, k_bias=bias)
    check(q, k, 8.0, g, k_bias=bias, q_ids=torch.arange(N), k_ids=torch.arange(M))
    check(q, k, 8.0, None, h, k_bias=bias)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("itself", [False, True])
def test_duplicates_at_a_small_temperature(dtype, itself):
    """Log-sum-exps between some 20 and 144 in base 2: tiles with one exponential beside those with two."""
    N, M, D = 400, 400, 128
    z, other = features(N, D, dtype=dtype), features(M, D, dtype=dtype)
    z[1] = z[0]
    z[200:264] = z[136:200]
    other[130:200] = z[130:200]
    other[300] = z[20]
    k = None if itself else other
    check(z, k, 100.0, torch.randn(N), torch.randn(M))
    check(z, k, torch.tensor(100.0), torch.rand(N), None if itself else torch.rand(M), q_ids=torch.arange(N) // 2,
          k_ids=None if itself else torch.arange(M) // 2)  # fmt: skip


@pytest.mark.parametrize("scale", [10.0, 40.0, 69.0, 70.0, 90.0, 200.0, -90.0, -200.0])
@pytest.mark.parametrize("rows, columns", [(True, True), (False, True), (True, False)])
def test_log_sum_exps_far_apart(scale, rows, columns):
    """Of the columns of a tile, so that they just reach what one exponential serves or do not; of rows below them."""
    g, h = torch.randn(80) if rows else None, torch.randn(140) if columns else None
    q, k = torch.zeros(80, 64, dtype=torch.bfloat16), torch.zeros(140, 64, dtype=torch.bfloat16)
    q[:, 0], k[:, 0], k[:64, 1], q[:32, 1] = 1, 1, 1, 1
    check(q, k, scale, g, h)
    q[16:, :2] *= -1
    check(q, k, scale, g, h)
    q[:, :2] = 1
    check(q, k, scale, g, h)


def test_unnormalised_features():
    q, k = (8 * torch.randn(130, 64)).bfloat16(), (8 * torch.randn(140, 64)).bfloat16()
    results = check(q, k, 1.0, torch.randn(130), torch.randn(140))
    assert all(x is None or x.isfinite().all() for x in results.values())


@pytest.mark.parametrize("upstream", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_left_has_exactly_zero_gradient(upstream, bias):
    q, k = features(70, 64), features(150, 64)
    ids, k_ids = torch.zeros(70, dtype=torch.long).index_fill(0, torch.tensor([3, 69]), 1), torch.ones(150).long()
    k_bias = torch.zeros(150).index_fill(0, torch.tensor([9, 149]), -math.inf) if bias else None
    row = dense.lse(dense.scores(q.float(), k.float(), 3.0, ids, k_ids, k_bias=k_bias), 1)
    assert torch.equal(row.isinf(), ids == 1)
    g = torch.where(row == -math.inf, upstream, 1.0)
    pairs = Pairs.of(Problem(q, k, None, 3.0, ids, k_ids, False, k_bias))
    dq, dscale, _ = gradient_of(pairs, row, g, None, None, False, True, True)
    assert dq.isfinite().all() and dscale.isfinite() and (dq[row == -math.inf] == 0).all()
    dk, _, dbias = gradient_of(pairs, row, g, None, None, True, True, False, bias)
    assert dk.isfinite().all() and (not bias or (dbias[[9, 149]] == 0).all() and dbias.isfinite().all())


def test_fp16_gradients_do_not_vanish():
    q, k = features(70, 32, dtype=torch.float16), features(150, 32, dtype=torch.float16)
    check(q, k, 5.0, torch.full((70,), 2.0**-30), torch.full((150,), 2.0**-31))
    check(q, None, 5.0, torch.full((70,), 2.0**20))


def test_nan_and_infinity_stay_in_their_rows():
    q, k, g = features(70, 64), features(150, 64), torch.randn(70)
    clean = q.clone()
    q[5, 3], q[41, 0] = math.nan, math.inf
    ids, k_ids = torch.zeros(70).long().index_fill(0, torch.tensor([5, 41]), 1), torch.ones(150).long()
    found = []
    for queries in (q, clean):  # the ids leave these rows nothing
        row = dense.lse(dense.scores(clean.float(), k.float(), 2.0, ids, k_ids), 1)
        pairs = Pairs.of(Problem(queries, k, None, 2.0, ids, k_ids))
        found.append(gradient_of(pairs, row, g, None, None, False, True, True))
    assert all(torch.equal(*both) for both in list(zip(*found, strict=True))[:2])
    row, col = (dense.lse(dense.scores(q.float(), k.float(), 2.0), dim) for dim in (1, 0))
    pairs = Pairs.of(Problem(q, k, None, 2.0))
    dq, _, _ = gradient_of(pairs, row, g, None, None, False)
    assert torch.equal(dq.isnan().any(1), torch.arange(70).eq(5) | torch.arange(70).eq(41))
    assert gradient_of(pairs, row, g, None, None, True)[0].isnan().all()
    assert gradient_of(pairs, row, g, col, torch.randn(150), False)[0].isnan().all()


def test_an_infinite_product_that_is_left_out_has_no_part_in_the_gradient_of_the_scale():
    z = torch.eye(6, 8).bfloat16()
    z[:, 6] = 0.5
    z[2, 7] = 1e20  # its square is beyond fp32
    for k, ids in ((None, None), (z.clone(), torch.arange(6))):
        pairs = Pairs.of(Problem(z, k, None, 2.0, ids, ids))
        row = dense.lse(dense.scores(z.float(), None if k is None else k.float(), 2.0, ids, ids), 1)
        _, dscale, _ = gradient_of(pairs, row, torch.ones(6), None, None, False, False, True)
        assert dscale.item() == pytest.approx(6 * 0.25)


def test_a_column_taken_out_by_its_bias_may_hold_anything():
    q, k, bias = features(70, 64), features(150, 64), torch.zeros(150)
    k[3], k[140], bias[[3, 140]] = math.nan, math.inf, -math.inf
    clean = k.masked_fill((bias != 0).unsqueeze(1), 0)
    row, col = (dense.lse(dense.scores(q.float(), clean.float(), 2.0, k_bias=bias), dim) for dim in (1, 0))
    g, h = torch.randn(70), torch.randn(150)
    found = [
        gradient_of(Pairs.of(Problem(q, keys, None, 2.0, k_bias=bias)), row, g, col, h, True, True, True, True)
        for keys in (k, clean)
    ]
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_splits():
    """Few rows and many columns: parts that are added, of more tiles than a warp has lanes."""
    assert split_of(1, 20, 132) == (1, 20) and split_of(2, 512, 132) == (8, 64)
    assert split_of(64, 64, 132) == (32, 2) and split_of(512, 512, 132) == (512, 1)
    q, k, g, h = features(70, 64), features(1300, 64), torch.randn(70), torch.randn(1300)
    check(q, k, 8.0, g, h, k_bias=torch.randn(1300))
    q, k, h = features(70, 200), features(2300, 200), torch.randn(2300)
    check(q, k, 8.0, g, h, q_ids=torch.arange(70), k_ids=torch.arange(2300) - 2200)


def test_same_bits_at_any_timing(emulated):
    q, k, g, h = features(200, 128), features(900, 128), torch.randn(200), torch.randn(900)
    pairs, row, col = Pairs.of(Problem(q, k, None, 8.0)), torch.full((200,), 10.0), torch.full((900,), 9.0)
    first = gradient_of(pairs, row, g, col, h, False, True, True)
    for seed in range(3):
        emulated.emulated_seed(ctypes.c_uint64(seed))
        again = gradient_of(pairs, row, g, col, h, False, True, True)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
