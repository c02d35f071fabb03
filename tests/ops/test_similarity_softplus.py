import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslkern.ops import similarity_softplus

from . import dense

SIZES = [  # N, M, D
    (1, 1, 1),  # the smallest; of itself a row has nothing left
    (2, 3, 3),
    (17, 17, 33),  # odd everywhere: remainders of every vector width
    (95, 97, 64),  # one under and one over the length that is cut into blocks
    (191, 193, 3),  # one under and one over a full block
    (16, 250, 600),  # deeper than what is packed at a time
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def features(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def of(backend) -> torch.dtype:
    """That of features of which kind it does not matter: fp32, where the backend has it."""
    return torch.bfloat16 if backend.startswith("cuda") else torch.float32


def dense_softplus(q, k=None, scale=1.0, bias=0.0, weights=None, *, sign=1, rows=False, **options):
    s = dense.scores(q, k, scale, **options)
    bias = torch.as_tensor(bias, dtype=s.dtype)
    t = sign * (s + (bias.unsqueeze(-1) if bias.ndim else bias))
    left_out = s == -math.inf
    row = torch.logaddexp(t.masked_fill(left_out, 0), torch.zeros_like(t)).masked_fill(left_out, 0).sum(-1)
    if rows:
        return row
    return (row if weights is None else row * weights).sum(-1)


def everything(function, tensors, options):
    """The result and the gradients of its weighted sum for the tensors that need one."""
    tensors = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    out = function(**tensors, **options)
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    total = (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    grads = torch.autograd.grad(total, list(wanted.values())) if wanted else ()
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def compare(tensors, **options):
    """sslkern against dense float64, with dense in the same dtype as the yardstick."""
    result, plain = everything(similarity_softplus, tensors, options), everything(dense_softplus, tensors, options)
    as_double = {name: x.detach().double() if x.is_floating_point() else x for name, x in tensors.items()}
    as_double = {name: x.requires_grad_(tensors[name].requires_grad) for name, x in as_double.items()}
    exact = everything(dense_softplus, as_double, options)
    # Where terms cancel, they set the scale of an error, and a weight of a pair carries the rounding of its s.
    q, k = as_double["q"].detach(), as_double.get("k", as_double["q"]).detach()
    largest = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    scale = abs(as_double["scale"].item()) if "scale" in tensors else 1.0
    positive, weight = dict(as_double), 2.0  # upstream gradients go up to 2
    if "weights" in tensors:
        positive["weights"] = as_double["weights"].detach().abs()
        weight *= positive["weights"].max().item()
    rows, columns = q[..., 0].numel(), k.shape[-2]
    scales = {"out": 4 * dense_softplus(**positive, **options).max().item()}  # a softplus may be off by 3 ulps itself
    scales["dscale"] = weight * largest * (rows * columns) ** 0.5 * max(1, scale * largest)
    scales |= {"dbias": weight * columns, "dk_bias": weight * rows}
    for name in exact:
        assert result[name].dtype == (tensors[name[1:]].dtype if name[0] == "d" else torch.float32), name
        dense.within(result[name], exact[name], plain[name], name, scales.get(name, 0.0))


def learned(*shape):
    return torch.randn(*shape).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, D", SIZES)
@pytest.mark.parametrize("sign", [1, -1])
def test_value_and_gradient(backend, N, M, D, dtype, sign):
    q, k = features(N, D, dtype=dtype).requires_grad_(), features(M, D, dtype=dtype).requires_grad_()
    scale, bias = torch.tensor(8.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    compare({"q": q, "k": k, "scale": scale, "bias": bias}, sign=sign)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, D", SIZES)
def test_of_itself(backend, N, M, D, dtype):
    q, ids = features(N, D, dtype=dtype).requires_grad_(), torch.arange(N) % ((N + 1) // 2)
    tensors = {"q": q, "scale": torch.tensor(8.0, requires_grad=True), "bias": learned(N), "weights": learned(N)}
    compare(tensors, q_ids=ids)
    compare(tensors, q_ids=ids, pairs="same", sign=-1)


@pytest.mark.parametrize("needs", range(8))
def test_one_side_learns(backend, needs):
    q, k, scale = features(40, 16), features(70, 16), torch.tensor(3.0)
    tensors = {"q": q.requires_grad_(bool(needs & 1)), "k": k.requires_grad_(bool(needs & 2))}
    compare(tensors | {"scale": scale.requires_grad_(bool(needs & 4))})
    compare({"q": q, "scale": scale, "weights": learned(40)})


@pytest.mark.without("cuda")
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_combination(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6), label="seed"))
    N, M, D = (draw(st.sampled_from(choice)) for choice in ((1, 2, 17, 130), (1, 3, 65), (1, 3, 20)))
    groups, itself = draw(st.sampled_from([(), (3,)]), label="groups"), draw(st.booleans(), label="itself")
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    M = N if itself else M
    tensors = {"q": features(*groups, N, D, dtype=dtype).requires_grad_(draw(st.booleans()))}
    if not itself:  # strided: every second column of a wider tensor
        tensors["k"] = features(*groups, M, 2 * D, dtype=dtype)[..., ::2].requires_grad_(draw(st.booleans()))
    scale = draw(st.sampled_from([0.0, -3.0, 1.0, 20.0]), label="scale")
    tensors["scale"] = torch.tensor(scale, requires_grad=draw(st.booleans()))
    rows = draw(st.booleans(), label="rows")
    if draw(st.booleans(), label="bias"):
        tensors["bias"] = torch.randn(*groups, N).requires_grad_(draw(st.booleans()))
    if not rows and draw(st.booleans(), label="weights"):
        tensors["weights"] = torch.randn(*groups, N).requires_grad_(draw(st.booleans()))
    if draw(st.booleans(), label="ids"):
        tensors["q_ids"] = torch.randint(-2, 3, (*groups, N)) * 2**40
        if not itself:
            tensors["k_ids"] = torch.randint(-2, 3, (*groups, M)) * 2**40
    pairs = draw(st.sampled_from(["different", "same"])) if "q_ids" in tensors else "different"
    if draw(st.booleans(), label="k_bias"):
        k_bias = torch.randn(*groups, M)
        k_bias = k_bias.masked_fill(torch.rand_like(k_bias) < 0.2, -math.inf)
        tensors["k_bias"] = k_bias.requires_grad_(draw(st.booleans()))
    if draw(st.booleans(), label="limit"):  # far from every score, so that rounding cannot decide
        s = dense.scores(
            tensors["q"].double(),
            None if itself else tensors["k"].double(),
            scale,
            k_bias=tensors.get("k_bias"),
        ).detach()
        limit = s[..., :1].masked_fill(s[..., :1] == -math.inf, 0) + 0.5
        near = (s - limit).abs().amin(-1, keepdim=True) < 0.1
        tensors["q_limit"] = limit.masked_fill(near, 100.0).squeeze(-1).float()
    compare(tensors, pairs=pairs, sign=draw(st.sampled_from([1, -1])), rows=rows)


@pytest.mark.without("cpu", "reference", "triton")  # which take more, that test_any_combination draws
@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_combination_of_what_cuda_kernels_take(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6), label="seed"))
    N, M, D = (draw(st.sampled_from(choice)) for choice in ((1, 17, 130), (1, 65, 150), (3, 70, 200, 520)))
    itself, dtype = draw(st.booleans(), label="itself"), draw(st.sampled_from(DTYPES[1:]), label="dtype")
    M = N if itself else M
    tensors = {"q": features(N, D, dtype=dtype).requires_grad_(draw(st.booleans()))}
    if not itself:
        tensors["k"] = features(M, 2 * D, dtype=dtype)[..., ::2].requires_grad_(draw(st.booleans()))
    scale = draw(st.sampled_from([0.0, -3.0, 1.0, 20.0]), label="scale")
    tensors["scale"] = torch.tensor(scale, requires_grad=draw(st.booleans()))
    rows = draw(st.booleans(), label="rows")
    bias = draw(st.sampled_from([None, (), (N,)]), label="bias")
    if bias is not None:
        tensors["bias"] = torch.randn(bias).requires_grad_(draw(st.booleans()))
    if not rows and draw(st.booleans(), label="weights"):
        tensors["weights"] = torch.randn(N).requires_grad_(draw(st.booleans()))
    if draw(st.booleans(), label="ids"):
        few, step = draw(st.sampled_from([3, 1000])), draw(st.sampled_from([1, 2**40]))
        for name in ("q_ids",) if itself else ("q_ids", "k_ids"):
            tensors[name] = torch.randint(-few, few, (len(tensors[name[0]]),)) * step
    pairs = draw(st.sampled_from(["different", "same"])) if "q_ids" in tensors else "different"
    if draw(st.booleans(), label="k_bias"):
        k_bias = torch.randn(M).masked_fill(torch.rand(M) < 0.2, -math.inf)
        tensors["k_bias"] = k_bias.requires_grad_(draw(st.booleans()))
    compare(tensors, pairs=pairs, sign=draw(st.sampled_from([1, -1])), rows=rows)


def test_tiny_and_large_terms(backend):
    """One pair each: the sum is the term. In fp32 1 + e^-20 is 1, and torch's softplus(25) is 25."""
    for dtype, tolerance in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        if dtype == torch.float64 and backend != "reference":
            continue
        for t in (-80.0, -30.0, -20.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 19.0, 25.0, 80.0, 1e4):
            q = torch.ones(1, 1, dtype=dtype, requires_grad=True)
            total = similarity_softplus(q, torch.ones(1, 1, dtype=dtype), t)
            (grad,) = torch.autograd.grad(total, q)
            assert total.item() == pytest.approx(math.log1p(math.exp(-abs(t))) + max(t, 0), rel=tolerance)
            e = math.exp(-abs(t))
            assert grad.item() == pytest.approx(t * (1 if t > 0 else e) / (1 + e), rel=3 * tolerance, abs=1e-300)


@pytest.mark.parametrize("N, M", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("rows", [False, True])
def test_empty(backend, N, M, rows):
    q, k = (torch.randn(size, 4, dtype=of(backend), requires_grad=True) for size in (N, M))
    out = similarity_softplus(q, k, rows=rows)
    assert out.shape == ((N,) if rows else ()) and (out == 0).all()
    out.sum().backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()


@pytest.mark.parametrize("upstream", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_left_has_exactly_zero_gradient(backend, upstream, sign):
    q, k = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    scale, bias = torch.tensor(1.0, requires_grad=True), torch.zeros(20, requires_grad=True)
    ids = torch.zeros(20, dtype=torch.long).index_fill(0, torch.tensor([3, 19]), 1)
    out = similarity_softplus(
        q, k, scale, bias, q_ids=ids, k_ids=torch.ones(30, dtype=torch.long), sign=sign, rows=True
    )
    assert torch.equal(out == 0, ids == 1)
    out.backward(torch.where(ids == 1, upstream, 0.0))
    assert all((x.grad == 0).all() for x in (q, k, scale, bias))
    q.grad = None
    similarity_softplus(q, k, q_ids=ids, k_ids=torch.ones(30, dtype=torch.long), sign=sign).backward()
    assert torch.equal((q.grad == 0).all(1), ids == 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_left_out_has_no_part_in_a_bias_that_is_not_finite(backend, value, sign):
    tensors = dict(q=learned(2, 3), k=learned(5, 3), bias=torch.tensor([0.5, value], requires_grad=True))
    tensors |= dict(q_ids=torch.tensor([1, 0]), k_ids=torch.tensor([0, 0, 0, 0, 0]))
    result = everything(similarity_softplus, tensors, {"sign": sign})  # of the second row nothing is left
    alone = {name: x[:1].detach().requires_grad_(x.requires_grad) for name, x in tensors.items() if name[0] != "k"}
    want = everything(similarity_softplus, alone | {name: tensors[name] for name in ("k", "k_ids")}, {"sign": sign})
    for name in ("dq", "dbias"):
        assert torch.equal(result[name][:1], want[name]) and not result[name][1].any(), name
    assert result["out"] == want["out"] and torch.equal(result["dk"], want["dk"])


def test_an_infinite_product_that_is_left_out_has_no_part_in_the_gradient_of_the_scale(backend):
    z = torch.zeros(6, 8)
    z[2, 7] = 1e20  # its square is beyond fp32
    scale, ids = torch.tensor(2.0, requires_grad=True), torch.arange(6)
    for k in (None, z.clone().requires_grad_()):
        total = similarity_softplus(z.requires_grad_(), k, scale, q_ids=ids, k_ids=None if k is None else ids)
        (grad,) = torch.autograd.grad(total, scale)
        assert grad.item() == 0


@pytest.mark.parametrize("k_learns", [False, True])
@pytest.mark.parametrize("side", ["q", "k"])
def test_an_infinite_feature_that_is_left_out_has_no_part_in_the_gradient_of_the_scale(backend, side, k_learns):
    """The limits leave out its scores, or those of its row."""
    q, k = torch.ones(2, 1), torch.ones(3, 1)
    (q if side == "q" else k)[0] = math.inf
    scale = torch.tensor(2.0, requires_grad=True)
    q, k = q.requires_grad_(not k_learns), k.requires_grad_(k_learns)
    total = similarity_softplus(q, k, scale, q_limit=torch.full((2,), 9.0))
    (grad,) = torch.autograd.grad(total, scale)
    assert grad.item() == pytest.approx((3 if side == "q" else 4) * torch.sigmoid(torch.tensor(2.0)).item())


def test_nan_stays_in_its_row(backend):
    q, k = features(130, 16, dtype=of(backend)), features(66, 16, dtype=of(backend))
    q[5, 3], q[41, 0] = math.nan, math.inf
    row = similarity_softplus(q, k, rows=True)
    assert torch.equal(row.isfinite(), dense_softplus(q, k, rows=True).isfinite())
    assert not row[5].isfinite() and not row[41].isfinite() and row.isfinite().sum() == 128


def test_itself_is_not_found_by_pointer(backend):
    z = features(20, 8).requires_grad_()
    for k in (z, z.detach()):
        out, expected = similarity_softplus(z, k), F.softplus(z @ k.T).sum()  # self pairs count
        assert torch.allclose(out, expected)
        got, want = (torch.autograd.grad(x, z)[0] for x in (out, expected))
        assert torch.allclose(got, want, atol=1e-5)


def test_features_may_change_before_backward(backend):
    q, queue = features(10, 8, dtype=of(backend)).requires_grad_(), features(40, 8, dtype=of(backend))
    (expected,) = torch.autograd.grad(similarity_softplus(q, queue), q)
    out = similarity_softplus(q, queue)
    queue.zero_()
    assert torch.equal(torch.autograd.grad(out, q)[0], expected)


def test_same_bits_for_any_number_of_threads(backend):
    if not backend.startswith("cpu"):
        pytest.skip("only the native kernels share their work among threads themselves")
    z, k, weights = features(700, 48).requires_grad_(), features(500, 48).requires_grad_(), torch.rand(700)
    scale = torch.tensor(9.0, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = similarity_softplus(z, None, scale), similarity_softplus(z, k, scale, -2.0, weights)
            grads = torch.autograd.grad(out[0] + out[1], (z, k, scale))
            results.append(torch.cat([x.detach().flatten() for x in (*out, *grads)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("sign", [1, -1])
def test_gradcheck(sign):
    q, k, bias, weights, k_bias = (learned(*shape) for shape in ((5, 3), (4, 3), (5,), (5,), (4,)))
    inputs = [x.detach().double().requires_grad_() for x in (q, k, torch.tensor(0.7), bias, weights, k_bias)]
    ids = {"q_ids": torch.tensor([0, 1, 2, 3, 3]), "k_ids": torch.tensor([3, 0, 0, 9]), "sign": sign}
    check, f = torch.autograd.gradcheck, similarity_softplus
    assert check(lambda q, k, s, b, w, c: f(q, k, s, b, w, k_bias=c, **ids), inputs)
    assert check(lambda q, k, s, b, c: f(q, k, s, b, k_bias=c, rows=True, **ids), [*inputs[:4], inputs[5]])
    assert check(lambda q, s, b, w: f(q, None, s, b, w, sign=sign), [inputs[0], *inputs[2:5]])
    grouped = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert check(lambda q, s, b: f(q, None, s, b, sign=sign), (grouped, *inputs[2:4]))


@pytest.mark.parametrize("rows", [False, True])
def test_second_derivative_says_so(rows):
    q, k = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(similarity_softplus(q, k, rows=rows).sum(), k, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(backend):
    name = backend.partition("-")[0]
    q, k = (features(size, 8, dtype=of(backend)).requires_grad_() for size in (6, 5))
    scale, ids, none = torch.tensor(2.0, requires_grad=True), torch.arange(6), None
    ops, every = torch.ops.sslkern, (True,) * 5
    problem = (q, k, scale, 1.0, ids, ids[:5], False, learned(5), none, learned(6))
    torch.library.opcheck(ops.similarity_softplus.default, (*problem, learned(6), -1.0, *every, name))
    torch.library.opcheck(ops.similarity_softplus_rows.default, (*problem, 1.0, name))
    if name == "cuda":
        problem = (q, none, none, 2.0, none, none, False, none, none, none)
    else:
        problem = (features(2, 6, 8).requires_grad_(), none, none, 2.0, none, none, False, none, torch.ones(2, 6), none)
    needs = (True, *(False,) * 4)
    torch.library.opcheck(ops.similarity_softplus.default, (*problem, none, 1.0, *needs, name))
    torch.library.opcheck(ops.similarity_softplus_rows.default, (*problem, 1.0, name))


@pytest.mark.parametrize("rows", [False, True])
def test_compiles_without_a_break(backend, rows):
    torch.compiler.reset()
    q, k = (features(size, 8, dtype=of(backend)).requires_grad_() for size in (9, 7))
    bias = torch.tensor(1.0, requires_grad=True)
    compiled = torch.compile(similarity_softplus, fullgraph=True, backend="aot_eager")
    got, want = (f(q, k, 2.0, bias, rows=rows).sum() for f in (compiled, similarity_softplus))
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, (q, k, bias)), torch.autograd.grad(want, (q, k, bias)), strict=True):
        assert torch.equal(a, b)


def test_bad_arguments_are_named():
    q, k = torch.randn(4, 3), torch.randn(5, 3)
    cases = [
        ("k must", (q, k[:, :2]), {}),
        ("scale must", (q, k, math.nan), {}),
        ("bias must", (q, k, 1.0, math.nan), {}),
        ("bias must", (q, k, 1.0, torch.zeros(5)), {}),
        ("bias must", (q, k, 1.0, torch.arange(4)), {}),
        ("bias is on meta", (q, k, 1.0, torch.zeros(4, device="meta")), {}),
        ("weights must", (q, k, 1.0, 0.0, 2.0), {}),
        ("weights must", (q, k, 1.0, 0.0, torch.tensor(1.0)), {}),
        ("weights must be None", (q, k, 1.0, 0.0, torch.ones(4)), {"rows": True}),
        ("sign must", (q, k), {"sign": 0}),
        ("sign must", (q, k), {"sign": torch.tensor([1, 1])}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            similarity_softplus(*args, **options)
        assert "\n" not in str(error.value)
