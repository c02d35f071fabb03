import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslkern.ops import similarity_lse, similarity_lse_bwd

from . import dense

SIZES = [  # N, M, D
    (1, 1, 1),  # the smallest; of itself a row has nothing left
    (2, 3, 3),
    (17, 17, 33),  # odd everywhere: remainders of every vector width
    (63, 65, 128),  # one under and one over a tile of 64
    (129, 127, 768),
    (255, 257, 64),  # several tiles and a remainder
    (16, 250, 1152),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def features(*shape, dtype=torch.float32):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).to(dtype)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def of(backend) -> torch.dtype:
    """That of features of which kind it does not matter: fp32, where the backend has it."""
    return torch.bfloat16 if backend.startswith("cuda") else torch.float32


def everything(function, tensors, options):
    """Outputs and the gradients of a weighted sum of those that are finite, for the tensors that need one."""
    tensors = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    out = function(**tensors, **options)
    out = out if isinstance(out, tuple) else (out,)
    weights = [torch.linspace(-1, 2, x.numel()).view(x.shape) for x in out]
    total = sum(
        (x.where(x.isfinite(), torch.zeros_like(x)) * w.to(x.dtype)).sum() for x, w in zip(out, weights, strict=True)
    )
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True) if wanted else ()
    return dict(zip(["row", "second", "third"], (x.detach() for x in out), strict=False)) | {
        f"d{name}": torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(wanted.items(), grads, strict=True)
    }


def compare(tensors, arbitrary=False, function=similarity_lse, **options):
    """sslkern against dense float64, with dense in the same dtype as the yardstick."""
    result = everything(function, tensors, options)
    plain = everything(dense.similarity_lse, tensors, options)
    as_double = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    as_double = {n: x.detach().requires_grad_(tensors[n].requires_grad) for n, x in as_double.items()}
    exact = everything(dense.similarity_lse, as_double, options)
    q, k = as_double["q"].detach(), as_double.get("k", as_double["q"]).detach()
    largest = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()  # the scale of the terms of <q, k>
    scale = abs(float(tensors.get("scale", options.get("scale", 1))))
    scales = dict.fromkeys(("row", "second", "third"), scale * largest)
    if arbitrary:  # sums over up to N rows that cancel, of weights exp(s - row) that carry the rounding of s
        scales["dq"] = scales["dk"] = max(1, scale * largest) * scale * largest**0.5 * q[..., 0].numel()
    scales["dk_bias"] = 4 * max(1, scale * largest)  # upstream gradients, which may cancel
    # a weight exp(s - row) carries the rounding of s, which grows with it
    scales["dscale"] = max(1, scale * largest) * 4 * q[..., 0].numel() * largest
    for name in exact:
        assert result[name].dtype == tensors[name[1:]].dtype if name[0] == "d" else torch.float32, name
        dense.within(result[name], exact[name], plain[name], name, scales.get(name, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, D", SIZES)
@pytest.mark.parametrize("columns", [False, True])
def test_rows_and_columns(backend, N, M, D, dtype, columns):
    q, k = features(N, D, dtype=dtype).requires_grad_(), features(M, D, dtype=dtype).requires_grad_()
    compare({"q": q, "k": k, "scale": torch.tensor(8.0, requires_grad=True)}, columns=columns, best=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, D", SIZES)
def test_of_itself(backend, N, M, D, dtype):
    q, ids = features(N, D, dtype=dtype).requires_grad_(), torch.arange(N) % ((N + 1) // 2)
    compare({"q": q, "scale": torch.tensor(8.0, requires_grad=True), "q_ids": ids}, best=True)
    compare({"q": q, "scale": torch.tensor(8.0, requires_grad=True)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, D", SIZES)
def test_frozen_keys(backend, N, M, D, dtype):
    q, k = features(N, D, dtype=dtype).requires_grad_(), features(M, D, dtype=dtype)
    compare({"q": q, "k": k, "scale": torch.tensor(8.0, requires_grad=True)}, best=True)


def test_one_frozen_side(backend):
    q, k = features(40, 16, dtype=of(backend)).requires_grad_(), features(70, 16, dtype=of(backend))
    compare({"q": q, "k": k}, columns=True)
    compare({"q": q.detach(), "k": k.clone().requires_grad_()}, columns=True)
    compare({"q": q.detach(), "k": k, "scale": torch.tensor(3.0, requires_grad=True)}, columns=True)
    compare({"q": q.detach(), "k": k, "scale": torch.tensor(3.0, requires_grad=True)})


@pytest.mark.without("cuda")
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_combination(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6), label="seed"))
    N, M, D = (draw(st.sampled_from(choice)) for choice in ((1, 2, 17, 70), (1, 3, 65), (1, 3, 20)))
    groups = draw(st.sampled_from([(), (3,)]), label="groups")
    itself, columns = draw(st.booleans(), label="itself"), draw(st.booleans(), label="columns")
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    M = N if itself else M
    tensors = {"q": features(*groups, N, D, dtype=dtype).requires_grad_(draw(st.booleans()))}
    if not itself:
        # strided: every second column of a wider tensor
        wide = features(*groups, M, 2 * D, dtype=dtype)[..., ::2]
        tensors["k"] = wide.requires_grad_(draw(st.booleans()))
    scale = draw(st.sampled_from([0.0, -3.0, 1.0, 20.0]), label="scale")
    tensors["scale"] = torch.tensor(scale, requires_grad=draw(st.booleans()))
    if draw(st.booleans(), label="ids"):
        tensors["q_ids"] = torch.randint(-2, 3, (*groups, N)) * 2**40
        if not itself:
            tensors["k_ids"] = torch.randint(-2, 3, (*groups, M)) * 2**40
    pairs = draw(st.sampled_from(["different", "same"])) if "q_ids" in tensors else "different"
    if draw(st.booleans(), label="bias"):
        bias = torch.randn(*groups, M)
        tensors["k_bias"] = bias.masked_fill(torch.rand_like(bias) < 0.2, -math.inf).requires_grad_(draw(st.booleans()))
    if draw(st.booleans(), label="limit"):
        # halfway between scores, so that rounding cannot decide
        s = dense.scores(tensors["q"].double(), tensors["k"].double() if not itself else None, scale,
                         k_bias=tensors.get("k_bias")).detach()  # fmt: skip
        s = s[..., :2].sort(-1).values
        limit = torch.where(s.isfinite().all(-1), s.mean(-1), torch.tensor(math.inf, dtype=s.dtype))
        near = (dense.scores(tensors["q"].double(), tensors["k"].double() if not itself else None, scale,
                             k_bias=tensors.get("k_bias")) - limit[..., None]).abs().amin(-1) < 0.5  # fmt: skip
        tensors["q_limit"] = limit.masked_fill(near, 100.0).float()
    compare(tensors, arbitrary=True, pairs=pairs, columns=columns and not itself, best=draw(st.booleans()))


@pytest.mark.without("cpu", "reference", "triton")  # which take more, that test_any_combination draws
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_combination_of_what_cuda_kernels_take(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6), label="seed"))
    N, M, D = (draw(st.sampled_from(choice)) for choice in ((1, 17, 130), (1, 65, 150), (3, 70, 200, 320)))
    itself, dtype = draw(st.booleans(), label="itself"), draw(st.sampled_from(DTYPES[1:]), label="dtype")
    tensors = {"q": features(N, D, dtype=dtype).requires_grad_(draw(st.booleans()))}
    if not itself:
        tensors["k"] = features(M, 2 * D, dtype=dtype)[..., ::2].requires_grad_(draw(st.booleans()))
    scale = draw(st.sampled_from([0.0, -3.0, 20.0]), label="scale")
    columns = not itself and draw(st.booleans(), label="columns")
    # That of frozen keys comes from weights of 16 bits, which test_frozen_keys has.
    tensors["scale"] = torch.tensor(scale, requires_grad=(itself or columns) and draw(st.booleans()))
    if draw(st.booleans(), label="ids"):
        few, step = draw(st.sampled_from([3, 1000])), draw(st.sampled_from([1, 2**40]))
        for name in ("q_ids",) if itself else ("q_ids", "k_ids"):
            tensors[name] = torch.randint(-few, few, (len(tensors[name[0]]),)) * step
    pairs = draw(st.sampled_from(["different", "same"])) if "q_ids" in tensors else "different"
    if draw(st.booleans(), label="bias"):
        bias = torch.randn(N if itself else M)
        tensors["k_bias"] = bias.masked_fill(torch.rand_like(bias) < 0.2, -math.inf).requires_grad_(draw(st.booleans()))
    compare(tensors, arbitrary=True, pairs=pairs, columns=columns, best=draw(st.booleans()))


@pytest.mark.parametrize("N, M", [(0, 0), (0, 5), (5, 0)])
def test_empty(backend, N, M):
    q, k = (normal(size, 4, dtype=of(backend)).requires_grad_() for size in (N, M))
    row, col, best = similarity_lse(q, k, columns=True, best=True)
    assert (row.shape, col.shape, best.shape) == ((N,), (M,), (N + M,))
    assert (torch.cat((row, col, best)) == -math.inf).all()
    (row.sum() + col.sum()).backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()
    row = similarity_lse(q, k.detach())
    row.sum().backward()
    assert (row == -math.inf).all() and (q.grad == 0).all()
    assert similarity_lse(q[:0]).shape == (0,)


@pytest.mark.parametrize("upstream", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_left_has_exactly_zero_gradient(backend, upstream, frozen):
    q, k = normal(20, 8, dtype=of(backend)).requires_grad_(), normal(30, 8, dtype=of(backend))
    k.requires_grad_(not frozen)
    scale = torch.tensor(1.0, requires_grad=True)
    ids = torch.zeros(20, dtype=torch.long).index_fill(0, torch.tensor([3, 19]), 1)
    row = similarity_lse(q, k, scale, q_ids=ids, k_ids=torch.ones(30, dtype=torch.long))
    assert torch.equal(row == -math.inf, ids == 1)
    row.backward(torch.where(ids == 1, upstream, 0.0))
    assert (q.grad == 0).all() and scale.grad == 0 and (frozen or (k.grad == 0).all())


@pytest.mark.parametrize("D, dtype", [(33, torch.float32), (300, torch.bfloat16)])
def test_limits_that_equal_a_score_leave_it_in_forward_and_backward(backend, D, dtype):
    q, k = features(70, D, dtype=dtype).requires_grad_(), features(90, D, dtype=dtype).requires_grad_()
    results = []
    for keys in (k, k.detach()):
        none = torch.full((70,), math.inf)
        row, best = similarity_lse(q, keys, 30.0, q_limit=none, best=True)
        results.append((row, best, *torch.autograd.grad(row.sum(), q)))
        row, same = similarity_lse(q, keys, 30.0, q_limit=best, best=True)  # nothing is above the largest
        results.append((row, same, *torch.autograd.grad(row.sum(), q)))
    for a, b in (results[:2], results[2:]):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def test_duplicates_at_a_small_temperature(backend):
    """One shift for a tile of S would lose all rows but the duplicates; one of 1 / temperature too."""
    z = features(64, 768, dtype=of(backend))
    z[1] = z[0]
    compare({"q": z.requires_grad_()}, scale=100.0)
    compare({"q": z, "k": z.detach().flip(0).requires_grad_()}, scale=100.0, columns=True)


def test_nothing_left_beside_sums_beyond_the_largest_exponential(backend):
    """e^100 is no fp32 number: neither the padding of a tile nor a row with nothing left may be multiplied by it."""
    q = features(1, 3, dtype=of(backend)).repeat(9, 1).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    k, ids = q.detach().clone().requires_grad_(), torch.arange(9) // 2  # the last row is alone
    compare({"q": q, "scale": scale, "q_ids": ids}, pairs="same")
    compare({"q": q, "k": k, "scale": scale, "q_ids": ids, "k_ids": torch.ones_like(ids)}, columns=True)


def test_unnormalised_features(backend):
    q, k = ((60 * torch.randn(size, 32)).to(of(backend)).requires_grad_() for size in (130, 70))
    result = everything(similarity_lse, {"q": q, "k": k}, {"columns": True})
    assert all(x.isfinite().all() for x in result.values())
    exact = everything(dense.similarity_lse, {"q": q.double(), "k": k.double()}, {"columns": True})
    for name in ("row", "second"):
        assert torch.allclose(result[name].double(), exact[name], rtol=1e-6)


def test_nan_and_inf_stay_in_their_rows(backend):
    q, k = features(70, 16, dtype=of(backend)), features(66, 16, dtype=of(backend))
    q[5, 3], q[41, 0] = math.nan, math.inf
    row = similarity_lse(q, k)
    expected = dense.similarity_lse(q, k)
    assert torch.equal(row.isfinite(), expected.isfinite()) and not row[5].isfinite() and not row[41].isfinite()
    row, col = similarity_lse(q, k, columns=True)
    assert not col.isfinite().any() and torch.equal(row.isfinite(), expected.isfinite())
    assert torch.equal(similarity_lse(q[:40]).isfinite(), dense.similarity_lse(q[:40]).isfinite())


@pytest.mark.parametrize("learns", ["both", "one", "none"])
@pytest.mark.parametrize("columns", [False, True])
def test_best_keeps_nan(backend, learns, columns):
    q, k = features(9, 8, dtype=of(backend)), features(70, 8, dtype=of(backend))
    q.requires_grad_(learns != "none"), k.requires_grad_(learns == "both")
    for j in (0, 66):  # also of a value that other scores would be above
        k_bias = torch.zeros(70)
        k_bias[j] = math.nan
        for limit in (None,) if backend.startswith("cuda") else (None, torch.full((9,), 5.0)):
            row, *col, best = similarity_lse(q, k, k_bias=k_bias, q_limit=limit, columns=columns, best=True)
            assert torch.equal(best.isnan(), torch.cat((row, *col)).isnan()) and best[:9].isnan().all()
            assert best.isnan().sum() == 9 + columns


def test_best_keeps_nan_of_itself(backend):
    z = features(70, 8, dtype=of(backend))
    z[66, 3] = math.nan
    row, best = similarity_lse(z, best=True)
    assert row.isnan().all() and best.isnan().all()


@pytest.mark.parametrize("pairs", ["itself", "different", "same"])
def test_an_infinite_product_that_is_left_out_has_no_part_in_the_gradient_of_the_scale(backend, pairs):
    z = torch.eye(6, 8, dtype=of(backend))
    z[:, 6] = 0.5
    z[2, 7] = 1e20  # its square is beyond fp32
    scale = torch.tensor(2.0, requires_grad=True)
    if pairs == "itself":
        row = similarity_lse(z.requires_grad_(), scale=scale)
    else:
        ids = torch.arange(6)
        k_ids = ids if pairs == "different" else (ids + 1) % 6
        k = z.clone().requires_grad_()
        row = similarity_lse(z.requires_grad_(), k, scale, q_ids=ids, k_ids=k_ids, pairs=pairs)
    (grad,) = torch.autograd.grad(row.sum(), scale)
    assert grad.item() == pytest.approx(6 * 0.25)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_column_taken_out_by_its_bias_may_hold_anything(backend, value):
    q, k, bias = normal(5, 4, dtype=of(backend)), normal(70, 4, dtype=of(backend)), torch.zeros(70)
    k[[3, 40]], bias[[3, 40]] = value, -math.inf
    row, col = similarity_lse(q, k, 2.0, k_bias=bias, columns=True)
    kept = bias == 0
    want = similarity_lse(q, k[kept], 2.0, columns=True)
    assert torch.allclose(row, want[0], atol=1e-5) and torch.allclose(col[kept], want[1], atol=1e-5)
    assert (col[~kept] == -math.inf).all()


@pytest.mark.parametrize("k_learns", [False, True])
def test_an_infinite_key_that_is_left_out_has_no_part_in_the_gradient_of_the_scale(backend, k_learns):
    q, k = torch.ones(1, 1), torch.tensor([[math.inf], [1.0], [1.0]]).requires_grad_(k_learns)
    scale = torch.tensor(2.0, requires_grad=True)
    row = similarity_lse(q.requires_grad_(not k_learns), k, scale, q_limit=torch.full((1,), 9.0), columns=True)[0]
    (grad,) = torch.autograd.grad(row.sum(), scale)
    assert grad.item() == pytest.approx(1.0)


def test_fp16_gradients_do_not_vanish(backend):
    """With a mean over many rows W is far below the smallest fp16 number; row factors must not be rounded with it."""
    q, k = (
        features(64, 32, dtype=torch.float16).requires_grad_(),
        features(64, 32, dtype=torch.float16).requires_grad_(),
    )
    row = similarity_lse(q, k, 5.0)
    (dq,) = torch.autograd.grad(row.sum(), q, retain_graph=True)
    got = similarity_lse_bwd(q, k, row.detach(), None, torch.full((64,), 2.0**-30), None, 5.0)[0]
    assert torch.allclose(got * 2**30, dq.float(), rtol=2e-2, atol=1e-3 * dq.abs().max().item())


def test_itself_is_not_found_by_pointer(backend):
    z = features(20, 8, dtype=of(backend)).requires_grad_()
    wide, near = z.float(), 1e-6 if z.dtype == torch.float32 else 0.02
    row = similarity_lse(z, z.detach())
    assert torch.allclose(row, (wide @ wide.T).logsumexp(1))  # self pairs count
    (grad,) = torch.autograd.grad(row.sum(), z)
    (expected,) = torch.autograd.grad((wide @ wide.detach().T).logsumexp(1).sum(), z, retain_graph=True)
    assert torch.allclose(grad, expected, atol=near)
    (grad,) = torch.autograd.grad(similarity_lse(z, z).sum(), z)
    (expected,) = torch.autograd.grad((wide @ wide.T).logsumexp(1).sum(), z)
    assert torch.allclose(grad, expected, atol=near)


def test_a_queue_may_change_before_backward(backend):
    q, queue = features(10, 8, dtype=of(backend)).requires_grad_(), features(40, 8, dtype=of(backend))
    (expected,) = torch.autograd.grad(similarity_lse(q, queue).sum(), q)
    row = similarity_lse(q, queue)
    queue.zero_()
    (grad,) = torch.autograd.grad(row.sum(), q)
    assert torch.equal(grad, expected)


def test_backward_of_blocks_sums_to_the_whole(backend):
    q, k = (features(size, 8, dtype=of(backend)).requires_grad_() for size in (30, 50))
    scale, bias = torch.tensor(4.0, requires_grad=True), torch.randn(50, requires_grad=True)
    row, col = similarity_lse(q, k, scale, k_bias=bias, columns=True)
    g, h = torch.rand(30), torch.rand(50)
    whole = torch.autograd.grad((row * g).sum() + (col * h).sum(), (q, k, scale, bias))
    sums = torch.zeros(30, 8), torch.zeros(50, 8), torch.zeros(()), torch.zeros(50)
    for i, j in ((slice(0, 11), slice(0, 50)), (slice(11, 30), slice(0, 20)), (slice(11, 30), slice(20, 50))):
        dq, dk, dscale, dbias = similarity_lse_bwd(
            q[i], k[j], row[i], col[j], g[i], h[j], scale, k_bias=bias[j], need_scale=True, need_bias=True
        )
        sums[0][i] += dq
        sums[1][j] += dk
        sums[2].add_(dscale)
        sums[3][j] += dbias
    near = 1e-5 if q.dtype == torch.float32 else 2**-6  # weights of 16 bits, of a part and of the whole
    for got, expected in zip(sums, whole, strict=True):
        assert torch.allclose(got, expected.float(), rtol=near, atol=near)


def test_same_bits_for_any_number_of_threads(backend):
    if not backend.startswith("cpu"):
        pytest.skip("only the native kernels share their work among threads themselves")
    z = features(700, 48).requires_grad_()
    k = features(500, 48).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            row, (other, col) = similarity_lse(z, scale=9.0), similarity_lse(z, k, 9.0, columns=True)
            grads = torch.autograd.grad(row.sum() + other.sum() + col.sum(), (z, k))
            results.append(torch.cat([x.detach().flatten() for x in (row, other, col, *grads)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gradcheck():
    q, k = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3).double().requires_grad_()
    scale, bias = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.randn(4).double().requires_grad_()
    ids = {"q_ids": torch.tensor([0, 1, 2, 3, 3]), "k_ids": torch.tensor([3, 0, 0, 9])}
    check = torch.autograd.gradcheck
    assert check(lambda q, k, s, b: similarity_lse(q, k, s, k_bias=b, columns=True, **ids), (q, k, scale, bias))
    assert check(lambda q, s: similarity_lse(q, k.detach(), s, **ids), (q, scale))
    assert check(lambda q, s: similarity_lse(q, None, s, q_ids=ids["q_ids"]), (q, scale))
    limit, bias = torch.full((5,), 0.5).double(), torch.randn(5).double().requires_grad_()
    assert check(lambda q, s, b: similarity_lse(q, None, s, k_bias=b, q_limit=limit), (q, scale, bias))
    grouped = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert check(lambda q, b: similarity_lse(q, k_bias=b), (grouped, bias))


@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivative_says_so(frozen):
    q, k = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=not frozen)
    (grad,) = torch.autograd.grad(similarity_lse(q, k).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(backend):
    name = backend.partition("-")[0]
    q, k = (features(size, 8, dtype=of(backend)).requires_grad_() for size in (6, 5))
    scale, bias = torch.tensor(2.0, requires_grad=True), torch.randn(5, requires_grad=True)
    ids, limit, none = torch.arange(6), torch.full((6,), 1.5), None
    groups = features(2, 6, 8).requires_grad_(), features(2, 5, 8)
    ops = torch.ops.sslkern
    cases = [
        (q, k, scale, 1.0, ids, ids[:5], False, bias, none, True, True, 6 if name == "cpu" else 0, name),
        (q, none, none, 2.0, ids, none, False, none, none if name == "cuda" else limit, False, False, 0, name),
        (*groups, none, 2.0, none, none, False, none, none, True, False, False, name),
    ]
    for args in cases[:2] if name == "cuda" else cases:
        torch.library.opcheck(ops.similarity_lse.default, args)
    args = (q, k.detach(), scale, 1.0, none, none, False, none, none, True, name)
    torch.library.opcheck(ops.similarity_lse_frozen.default, args)
    q, k, row, col = q.detach(), k.detach(), torch.randn(6), torch.randn(5)
    problem = q, k, none, 1.0, none, none, False, none, none
    args = (*problem, row, col, row, col, none, True, True, True, False, name)
    torch.library.opcheck(ops.similarity_lse_bwd.default, args)


def test_bad_arguments_are_named():
    q, k, ids = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    cases = [
        ("q must", (q[0],), {}),
        ("q must", (q.long(),), {}),
        ("k must", (q, k[:, :2]), {}),
        ("k must", (q, k[None]), {}),
        ("k must", (q, k.half()), {}),
        ("k is on meta", (q, k.to("meta")), {}),
        ("scale must", (q, k, math.nan), {}),
        ("scale must", (q, k, torch.ones(2)), {}),
        ("q_ids and k_ids", (q, k), {"q_ids": ids}),
        ("k_ids must be None", (q,), {"k_ids": ids}),
        ("q_ids must be int64", (q,), {"q_ids": ids.int()}),
        ("q_ids must", (q,), {"q_ids": ids[:3]}),
        ("pairs must", (q,), {"pairs": "equal"}),
        ("pairs='same' needs", (q,), {"pairs": "same"}),
        ("k_bias must", (q, k), {"k_bias": torch.zeros(4)}),
        ("q_limit must", (q, k), {"q_limit": torch.zeros(5)}),
        ("q_limit gets no gradient", (q, k), {"q_limit": torch.zeros(4, requires_grad=True)}),
        ("columns=True needs k", (q,), {"columns": True}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            similarity_lse(*args, **options)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_more_scores_than_32_bits_can_count():
    """The last key is the only one that scores; places beyond 2^31 are looked at, those of equal ids left out."""
    N = 46_400
    assert N * N > 2**31
    q, k, ids = torch.ones(N, 1), torch.zeros(N, 1), torch.arange(N)
    k[-1] = 12.0
    row, col, best = similarity_lse(q, k, 1.0, q_ids=ids, k_ids=ids, columns=True, best=True)
    others = torch.full((N,), math.log(N - 2 + math.exp(12.0)))
    others[-1] = math.log(N - 1)
    assert torch.allclose(row, others, rtol=1e-5)
    assert torch.allclose(col, k[:, 0] + math.log(N - 1), rtol=1e-5)
    assert (best[: N - 1] == 12).all() and best[N - 1] == 0 and torch.equal(best[N:], k[:, 0])
    g = torch.zeros(N)
    g[-2:] = 1
    dq, dk, _, _ = similarity_lse_bwd(q, k, row, None, g, None, 1.0, q_ids=ids, k_ids=ids)
    share = math.exp(12.0) / (N - 2 + math.exp(12.0))
    assert torch.allclose(dq[-2:, 0], torch.tensor([12 * share, 0.0]), rtol=1e-4) and (dq[:-2] == 0).all()
    assert abs(dk[-1].item() - share) < 1e-4
