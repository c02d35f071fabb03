"""The kernels of `similarity_softplus` for Hopper, emulated: owners of rows of few features, weights of more. Values
against float64, by the bounds of tests/ops."""

import math

import pytest
import torch

import sslkern
from sslkern.backends import strips
from sslkern.backends.cuda import similarity_lse_weights
from sslkern.ops import similarity_softplus

from .conftest import GPU, emulate_cuda
from .ops.test_similarity_softplus import compare, dense_softplus, everything, features

pytestmark = pytest.mark.skipif(GPU, reason="for the CPU")
DTYPES = [torch.bfloat16, torch.float16]
KINDS = [64, 200, 520]  # features for each kind of kernel
SIZES = [  # N, M, D
    (1, 1, 1),
    (130, 70, 33),  # features that are no multiple of 8
    (65, 300, 128),  # the most for owners of rows
    (300, 1, 129),  # the fewest that do not stay there
    (130, 257, 200),
    (300, 270, 512),  # the most of keys that stay in shared memory
    (1, 300, 513),  # the fewest that stream
    (300, 530, 776),
]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    library = emulate_cuda(monkeypatch)
    with sslkern.use_backend("cuda"):
        yield library


@pytest.fixture
def short_strips(monkeypatch):
    monkeypatch.setattr(strips, "LEAST", 1)
    monkeypatch.setattr(similarity_lse_weights, "ROWS", 2)


def learned(x) -> torch.Tensor:
    return torch.as_tensor(x).requires_grad_()


def problem(N, M, D, dtype=torch.bfloat16, scale=8.0, bias=-3.0):
    q, k = (learned(features(size, D, dtype=dtype)) for size in (N, M))
    return {"q": q, "k": k, "scale": learned(scale), "bias": learned(bias)}


def itself(N, D, dtype=torch.bfloat16):
    return {"q": learned(features(N, D, dtype=dtype)), "scale": learned(8.0), "bias": learned(-3.0)}


def ids(N, M):
    return {"q_ids": torch.arange(N), "k_ids": torch.arange(M)}


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, D", SIZES)
def test_value_and_gradient(N, M, D, dtype):
    compare(problem(N, M, D, dtype))
    compare(problem(N, M, D, dtype) | ids(N, M))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", KINDS)
def test_rows(D, dtype):
    compare(problem(130, 200, D, dtype) | ids(130, 200), rows=True)
    compare({name: x.detach() for name, x in problem(130, 200, D, dtype).items()}, rows=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", KINDS)
def test_terms_of_rows(D, dtype):
    """A bias and a weight of each row, which may be negative, and nothing but these."""
    compare(problem(130, 200, D, dtype) | {"bias": learned(torch.randn(130)), "weights": learned(torch.randn(130))})
    compare(problem(130, 200, D, dtype) | {"weights": learned(torch.randn(130))})
    compare(problem(130, 200, D, dtype) | {"bias": learned(torch.randn(130))}, sign=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", KINDS)
def test_of_itself(D, dtype):
    compare(itself(150, D, dtype))
    compare(itself(150, D, dtype) | {"q_ids": torch.arange(150) % 75}, rows=True)
    terms = {
        "bias": learned(torch.randn(150)),
        "weights": learned(torch.randn(150)),
        "k_bias": learned(torch.randn(150)),
    }
    compare(itself(150, D, dtype) | terms, sign=-1)


@pytest.mark.parametrize("D", KINDS)
@pytest.mark.parametrize("pairs", ["different", "same"])
@pytest.mark.parametrize("far", [1, 2**33])  # apart, as a tile looks at all 64 bits or at half of them
def test_ids(D, pairs, far):
    tensors = problem(200, 270, D) | {"q_ids": torch.randint(-3, 3, (200,)) * far}
    tensors["k_ids"] = torch.randint(-3, 3, (270,)) * far
    compare(tensors, pairs=pairs)
    tensors |= {"q_ids": torch.arange(200) // 30 * far, "k_ids": torch.arange(270) // 27 * far}  # classes in order
    compare(tensors, pairs=pairs, sign=-1)


@pytest.mark.parametrize("D", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_bias_of_columns(D, sign):
    bias = learned(torch.randn(200).masked_fill(torch.arange(200) % 7 == 0, -math.inf))
    compare(problem(70, 200, D) | {"k_bias": bias}, sign=sign)
    compare(problem(70, 200, D, torch.float16) | {"k_bias": bias} | ids(70, 200), sign=sign)
    terms = {"bias": learned(torch.randn(70)), "weights": learned(torch.randn(70))}
    compare(problem(70, 200, D) | {"k_bias": bias} | terms, sign=sign)


@pytest.mark.parametrize("D", KINDS)
@pytest.mark.parametrize("needed", ["q", "k", "scale", "bias", "k_bias"])
def test_only_what_is_needed(D, needed):
    tensors = problem(130, 270, D) | ids(130, 270) | {"k_bias": torch.randn(270)}
    floats = {name: x.detach().requires_grad_(name == needed) for name, x in tensors.items() if x.is_floating_point()}
    compare(tensors | floats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", KINDS[1:])
def test_strips(short_strips, dtype, D):
    compare(problem(400, 270, D, dtype) | ids(400, 270) | {"bias": learned(torch.randn(400))})
    compare(problem(300, 300, D, dtype) | {"k_bias": learned(torch.randn(300)), "weights": learned(torch.rand(300))})
    compare(itself(300, D, dtype), rows=True)


def test_more_tiles_than_a_warp_has_lanes(monkeypatch):
    compare(problem(70, 4300, 8) | {"q_ids": torch.arange(70), "k_ids": torch.arange(4300) - 4200})
    plan = similarity_lse_weights.plan_of
    kernels = "sslkern.backends.cuda.similarity_softplus_weights.plan_of"
    monkeypatch.setattr(kernels, lambda N, M, D, processors: plan(N, M, D, 2))
    compare(problem(4300, 130, 136) | {"q_ids": torch.arange(4300), "k_ids": torch.arange(4100, 4230)})


# ---- Numbers that are large, small or not finite --------------------------------------------------------------------


@pytest.mark.parametrize("D", KINDS)
@pytest.mark.parametrize("scale", [100.0, -20.0, 0.0])
def test_scales(D, scale):
    """Without a shift or a maximum nothing overflows."""
    tensors = problem(70, 270, D, scale=scale, bias=-scale / 4)
    with torch.no_grad():
        tensors["k"][:70] = tensors["q"]
        tensors["k"][70] *= 40
    compare(tensors)
    compare(tensors | ids(70, 270), rows=True)


@pytest.mark.parametrize("D", KINDS)
@pytest.mark.parametrize("t", [-80.0, -30.0, -20.0, -5.0, -(2.0**-10), 0.0, 2.0**-10, 5.0, 19.0, 25.0, 80.0, 1e4])
def test_tiny_and_large_terms(D, t):
    """Of equal pairs the sum is a term times their number: what rounds it would show. In fp32 1 + e^-20 is 1."""
    q, k = learned(torch.eye(1, D).expand(3, D).bfloat16()), learned(torch.eye(1, D).expand(150, D).bfloat16())
    bias, scale = learned(t / 2), learned(t / 2)
    total = similarity_softplus(q, k, scale, bias)
    grads = torch.autograd.grad(total, (scale, bias))
    one = 2**-23 * max(8, abs(t))  # what rounding t makes of a term
    e = math.exp(-abs(t))
    assert total.item() == pytest.approx(450 * (math.log1p(e) + max(t, 0)), rel=one)
    for grad in grads:
        assert grad.item() == pytest.approx(450 * (1 if t > 0 else e) / (1 + e), rel=one)


@pytest.mark.parametrize("D", KINDS)
def test_a_sum_of_tiny_terms_keeps_its_digits(D):
    """Features that are exact in 16 bits, so that only sums round."""
    q, k = (torch.randint(-2, 3, (size, D)).bfloat16() for size in (130, 270))
    total = similarity_softplus(q, k, 2.0**-4, -20.0).item()
    exact = dense_softplus(q.double(), k.double(), 2.0**-4, -20.0).item()
    assert abs(total / exact - 1) < 1e-5


@pytest.mark.parametrize("D", KINDS)
def test_a_product_of_many_terms_does_not_overflow(D):
    q, k = torch.zeros(3, D).bfloat16(), torch.zeros(4300, D).bfloat16()
    assert similarity_softplus(q, k).item() == pytest.approx(3 * 4300 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("upstream", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("D", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_left_has_exactly_zero_gradient(upstream, D, sign):
    q_ids = torch.zeros(70, dtype=torch.long).index_fill(0, torch.tensor([3, 69]), 1)
    given = problem(70, 130, D) | {"bias": learned(torch.zeros(70))}
    out = similarity_softplus(**given, q_ids=q_ids, k_ids=torch.ones(130, dtype=torch.long), sign=sign, rows=True)
    assert torch.equal(out == 0, q_ids == 1)
    out.backward(torch.where(q_ids == 1, upstream, 0.0))
    assert all((x.grad == 0).all() for x in given.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("D", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_left_out_has_no_part_in_a_bias_that_is_not_finite(value, D, sign):
    given, q_ids = problem(70, 130, D), (torch.arange(70) == 9).long()
    given["bias"] = learned(torch.zeros(70).index_fill(0, torch.tensor([9]), value))
    found = everything(similarity_softplus, given | {"q_ids": q_ids, "k_ids": torch.ones(130).long()}, {"sign": sign})
    assert all(x.isfinite().all() for x in found.values())
    assert (found["dq"][9] == 0).all() and found["dbias"][9] == 0


@pytest.mark.parametrize("D", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_left_out_may_be_infinite(D, sign):
    """By its id, by its bias; and a score of -inf counts as left out."""
    z = torch.eye(6, D).bfloat16()
    z[:, 6] = 0.5
    scale, out = learned(2.0), learned(torch.tensor([0.0, 0, -math.inf, 0, 0, 0]))
    z[2, 7] = 1e20  # its square is beyond fp32
    for given in ({}, {"k": z.clone(), "q_ids": torch.arange(6), "k_ids": torch.arange(6)}, {"k": z, "k_bias": out}):
        total = similarity_softplus(z, scale=scale, sign=sign, **given)
        (grad,) = torch.autograd.grad(total, scale)
        assert grad.isfinite() and grad != 0
    total = similarity_softplus(z[2:3], -z[2:3], scale, sign=sign)
    assert total == 0


@pytest.mark.parametrize("D", KINDS)
def test_nan_and_infinity_stay_in_their_rows(D):
    q, k = features(130, D).bfloat16(), features(66, D).bfloat16()
    q[5, 3], q[41, 0] = math.nan, math.inf
    row = similarity_softplus(q, k, rows=True)
    assert torch.equal(row.isfinite(), dense_softplus(q, k, rows=True).isfinite()) and row.isfinite().sum() == 128
    (dq,) = torch.autograd.grad(similarity_softplus(learned(q), k), q)
    assert torch.equal(dq.isfinite().all(1), torch.arange(130).ne(5))


# ---- Launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", KINDS)
def test_same_bits_whatever_comes_first(emulated, D):
    given, results = problem(200, 270, D) | ids(200, 270), []
    for seed in (1, 2, 3):
        emulated.emulated_seed(seed)
        results.append(torch.cat([x.float().flatten() for x in everything(similarity_softplus, given, {}).values()]))
    assert all(torch.equal(results[0], other) for other in results[1:])
