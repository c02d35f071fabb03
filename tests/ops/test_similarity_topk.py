import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslkern.backends import BACKENDS
from sslkern.ops import similarity_topk

from . import dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def most(backend):
    return getattr(BACKENDS[backend.partition("-")[0]], "MOST", 2**31)


def whole(*shape, dtype=torch.float32):
    """Small whole numbers: their scores are exact in every dtype, and many are equal."""
    return torch.randint(-3, 4, shape).to(dtype)


def dense_topk(q, k, n, *, scale=1.0, **options):
    """By sorting the stored matrix; a stable sort leaves the lower of equal ones first."""
    s = dense.scores(q, k, scale, **options)
    s = s.masked_fill(s.isnan(), -math.inf)
    index = s.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    values = s.gather(-1, index)
    missing = n - index.shape[-1]
    index = index.masked_fill(values == -math.inf, -1)
    pad = torch.nn.functional.pad
    return pad(values, (0, missing), value=-math.inf), pad(index, (0, missing), value=-1)


def gradients(out, weights, wanted):
    kept = out[0].where(out[1] >= 0, 0)  # else weight times -inf
    return torch.autograd.grad((kept * weights).sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, M, D, n",
    [
        (1, 1, 1, 1),
        (2, 3, 3, 2),
        (17, 17, 33, 17),  # all of them, sorted
        (17, 2, 33, 5),  # fewer than asked for
        (97, 191, 3, 20),
        (193, 600, 33, 150),  # the rows of a block drop candidates several times
        (3, 5000, 8, 30),  # few rows: their columns are split and merged
        (400, 193, 600, 1),  # deeper than a packed block
    ],
)
def test_equal_scores_and_all(backend, N, M, D, n, dtype):
    n = min(n, most(backend))
    q, k = whole(N, D, dtype=dtype).requires_grad_(), whole(M, D, dtype=dtype).requires_grad_()
    scale = torch.tensor(-0.5, requires_grad=True)
    inputs = (q, k, scale)
    out = similarity_topk(q, k, n, scale=scale)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense_topk(wide[0], wide[1], n, scale=wide[2])
    assert out[0].dtype == torch.float32 and torch.equal(out[0].double(), expected[0])
    assert torch.equal(out[1], expected[1])
    weights = torch.randint(-2, 3, (N, n)).double()
    for x, got, want in zip(inputs, gradients(out, weights, inputs), gradients(expected, weights, wide), strict=True):
        assert got.dtype == x.dtype and torch.equal(got, want.to(x.dtype))


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_combination(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6), label="seed"))
    N, M, D = (draw(st.sampled_from(choice)) for choice in ((0, 1, 2, 17, 70), (0, 1, 3, 65, 300), (1, 3, 33)))
    groups = draw(st.sampled_from([(), (3,)]), label="groups")
    itself, dtype = draw(st.booleans(), label="itself"), draw(st.sampled_from(DTYPES), label="dtype")
    dtype = torch.float64 if backend == "reference" and draw(st.booleans()) else dtype
    M = N if itself else M
    options = {"scale": draw(st.sampled_from([0.0, -2.0, 1.0]), label="scale")}
    q = whole(*groups, N, D, dtype=dtype).requires_grad_(draw(st.booleans()))
    # strided: every second column of a wider tensor
    k = None if itself else whole(*groups, M, 2 * D, dtype=dtype)[..., ::2].requires_grad_(draw(st.booleans()))
    if draw(st.booleans(), label="ids"):
        options["q_ids"] = torch.randint(-2, 3, (*groups, N)) * 2**40
        options["k_ids"] = None if itself else torch.randint(-2, 3, (*groups, M)) * 2**40
        options["pairs"] = draw(st.sampled_from(["different", "same"]))
    if draw(st.booleans(), label="limit"):
        options["q_limit"] = torch.randint(-9, 9, (*groups, N)).double()
    n = min(draw(st.sampled_from([1, 3, 40, 200]), label="n"), most(backend))
    out = similarity_topk(q, k, n, **options)
    wide = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in (q, k)]
    expected = dense_topk(*wide, n, **options)
    assert torch.equal(out[0].double(), expected[0]) and torch.equal(out[1], expected[1])
    wanted = [(x, y) for x, y in zip((q, k), wide, strict=True) if x is not None and x.requires_grad]
    if wanted:
        weights = torch.randint(-2, 3, out[0].shape).double()
        got = gradients(out, weights, [x for x, _ in wanted])
        for x, y in zip(got, gradients(expected, weights, [y for _, y in wanted]), strict=True):
            assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, D", [(63, 500, 128), (129, 127, 768), (255, 257, 64)])
def test_values_and_gradients_are_as_exact_as_the_product(backend, N, M, D, dtype):
    q, k = (torch.nn.functional.normalize(torch.randn(rows, D), dim=1).to(dtype).requires_grad_() for rows in (N, M))
    scale, n = torch.tensor(100.0, requires_grad=True), 20
    values, index = similarity_topk(q, k, n, scale=scale)
    weights = torch.randn(N, n)
    got = torch.autograd.grad((values * weights).sum(), (q, k, scale))

    def at_those_places(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
        s = scale.to(max(dtype, torch.float32, key=lambda t: t.itemsize))
        s = s.detach().requires_grad_()
        values = dense.scores(*inputs, s).gather(1, index)
        return values, torch.autograd.grad((values * weights).sum(), (*inputs, s))

    (exact, exact_grads), (plain, plain_grads) = at_those_places(torch.float64), at_those_places(dtype)
    dense.within(values, exact, plain, "values", scale=100.0)
    best = dense.scores(q.double(), k.double(), 100.0).topk(n).values  # another place only where rounding decides
    assert (values - best).abs().max() <= 2 * (plain - exact).abs().max() + 100 * 2**-23
    for name, *grads in zip("qk", got, exact_grads, plain_grads, strict=False):
        dense.within(*grads, name, scale=100.0)
    dense.within(got[2], exact_grads[2], plain_grads[2], "scale", scale=values.numel() ** 0.5)


def test_order_of_the_columns_does_not_matter_to_the_values(backend):
    """Ascending scores pass the threshold every time, descending ones never."""
    q, steps = torch.ones(2, 1), torch.arange(1000.0)
    for k in (steps, steps.flip(0), steps // 100, steps * 0, -steps * 1e30, steps * 1e-42):
        for n in (1, 70, min(999, most(backend))):
            out, expected = similarity_topk(q, k[:, None], n), dense_topk(q.double(), k[:, None].double(), n)
            assert torch.equal(out[0].double(), expected[0]) and torch.equal(out[1], expected[1])


def test_not_a_number_is_left_out_and_infinity_wins(backend):
    q, k = torch.ones(40, 1), torch.arange(300.0)[:, None] / 7
    q[3], k[5], k[7], k[8], k[9] = math.nan, math.nan, math.inf, math.inf, -math.inf
    values, index = similarity_topk(q.requires_grad_(), k.requires_grad_(), 4)
    assert (index[3] == -1).all() and (values[3] == -math.inf).all()
    keep = torch.arange(40) != 3
    assert (index[keep] == torch.tensor([7, 8, 299, 298])).all() and (values[keep, :2] == math.inf).all()
    dq, dk = torch.autograd.grad(values[:, 2:].where(index[:, 2:] >= 0, 0).sum(), (q, k))
    assert dq[3] == 0 and (dk[[0, 5]] == 0).all() and (dk[298:] == 39).all()
    values, index = similarity_topk(-q, k, min(300, most(backend)))
    assert (index == 5).sum() == 0 and (index == 9).sum() == 39


def test_same_bits_for_any_number_of_threads(backend):
    if backend == "triton":
        pytest.skip("the threads of a GPU are not set")
    q, k = whole(700, 48).requires_grad_(), torch.randn(5000, 48, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs = [similarity_topk(q, k, 60), similarity_topk(q[:5], k, 60), similarity_topk(k[:500], None, 9)]
            grads = torch.autograd.grad(sum(values.sum() for values, _ in outs), (q, k))
            results.append(torch.cat([x.detach().double().flatten() for out in outs for x in out]))
            results[-1] = torch.cat([results[-1], *(x.flatten().double() for x in grads)])
    finally:
        torch.set_num_threads(before)
    if backend == "reference":
        assert torch.equal(results[0].isfinite(), results[1].isfinite())  # torch's matrix product decides on the bits
    else:
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_gradcheck():
    q, k = torch.randn(5, 3).double().requires_grad_(), torch.randn(7, 3).double().requires_grad_()
    scale = torch.tensor(-0.7).double().requires_grad_()
    grouped, ids = torch.randn(2, 6, 3).double().requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 2])
    check = torch.autograd.gradcheck
    assert check(lambda q, k, s: similarity_topk(q, k, 3, scale=s)[0], (q, k, scale))
    assert check(lambda q, s: similarity_topk(q, None, 2, scale=s)[0], (q, scale))
    assert check(lambda q: similarity_topk(q, None, 4, q_ids=ids)[0], (grouped,))
    assert torch.autograd.gradgradcheck(lambda q, k, s: similarity_topk(q, k, 3, scale=s)[0], (q, k, scale))


def test_opcheck(backend):
    name = backend.partition("-")[0]
    q, k = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    scale, ids = torch.tensor(2.0, requires_grad=True), torch.arange(6)
    op = torch.ops.sslkern.similarity_topk.default
    torch.library.opcheck(op, (q, k, scale, 1.0, ids, ids[:5], False, None, torch.full((6,), 3.0), 3, name))
    torch.library.opcheck(
        op, (torch.randn(2, 6, 8, requires_grad=True), None, None, -1.0, None, None, False, None, None, 3, name)
    )


def test_compiles_without_a_break_for_any_size(backend):
    torch.compiler.reset()

    def similarity(q, k):
        values, index = similarity_topk(q, k, 4, scale=2.0)
        return values.sum() + (values * index).mean()

    compiled = torch.compile(similarity, fullgraph=True, backend="aot_eager", dynamic=True)
    for N, M in ((9, 30), (11, 40)):
        q, k = torch.randn(N, 8, requires_grad=True), torch.randn(M, 8, requires_grad=True)
        got, want = compiled(q, k), similarity(q, k)
        assert torch.allclose(got, want)
        for a, b in zip(torch.autograd.grad(got, (q, k)), torch.autograd.grad(want, (q, k)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_bad_arguments_are_named():
    q, k, ids = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    cases = [
        ("n must", (q, k, 0), {}),
        ("n must be below", (q, k, 2**63), {}),
        ("n must", (q, k, 1.5), {}),
        ("n must", (q, k, True), {}),
        ("q must", (q[0], k, 1), {}),
        ("k must", (q, k[:, :2], 1), {}),
        ("k must", (q, k.half(), 1), {}),
        ("scale must", (q, k, 1), {"scale": torch.ones(2)}),
        ("q_ids and k_ids", (q, k, 1), {"q_ids": ids}),
        ("pairs must", (q, None, 1), {"pairs": "equal"}),
        ("q_limit must", (q, k, 1), {"q_limit": torch.zeros(5)}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            similarity_topk(*args, **options)
        assert "\n" not in str(error.value)
