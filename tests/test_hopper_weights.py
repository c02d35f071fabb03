"""The kernels for Hopper that write weights, emulated, and the gradients that products of the library make of them:
with the log-sum-exps of dense float64, by the bounds of tests/ops."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sslkern.backends import strips
from sslkern.backends.cuda import similarity_lse_weights as weights
from sslkern.backends.cuda.pairs import Pairs
from sslkern.backends.problem import Problem

from .conftest import GPU, emulate_cuda
from .ops import dense
from .ops.test_similarity_lse import compare, features

pytestmark = pytest.mark.skipif(GPU, reason="for the CPU")
DTYPES = [torch.bfloat16, torch.float16]
SIZES = [  # N, M, D
    (1, 1, 136),
    (70, 200, 64),  # one chunk of features
    (300, 1, 129),  # features that are no multiple of 8
    (130, 257, 200),
    (513, 300, 512),  # the most that stay in shared memory
    (1, 300, 513),  # the fewest that stream
    (300, 530, 776),
]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    return emulate_cuda(monkeypatch)


@pytest.fixture
def short_strips(monkeypatch):
    monkeypatch.setattr(strips, "LEAST", 1)
    monkeypatch.setattr(weights, "ROWS", 2)


class Lse(torch.autograd.Function):
    """`similarity_lse` of dense float64 with the gradients of the kernels."""

    @staticmethod
    def forward(ctx, q, k, scale, k_bias, columns, options):
        exact = [None if x is None else x.detach().double() for x in (q, k, k_bias)]
        row = dense.similarity_lse(*exact[:2], float(scale), k_bias=exact[2], columns=columns, **options)
        ctx.row, ctx.col = (x.float() for x in row) if columns else (row.float(), None)
        scales = (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, scale)
        q_ids, k_ids, same = options.get("q_ids"), options.get("k_ids"), options.get("pairs") == "same"
        ctx.problem = Problem(q, k, *scales, q_ids, k_ids, same, k_bias)
        return (ctx.row, ctx.col) if columns else ctx.row

    @staticmethod
    def backward(ctx, g, h=None):
        needs, dtype = ctx.needs_input_grad[:4], ctx.problem.q.dtype
        with torch.no_grad():
            grads = weights.gradients_of(Pairs.of(ctx.problem), ctx.row, ctx.col, g, h, *needs)
        dq, dk, dscale, dbias = grads
        assert all(x is None or needed or x is dq for x, needed in zip(grads, needs, strict=True))
        return *(None if x is None else x.to(dtype) for x in (dq, dk)), dscale, dbias, None, None


def lse(q, k=None, scale=1.0, k_bias=None, columns=False, **options):
    return Lse.apply(q, k, scale, k_bias, columns, options)


def check(tensors, **options):
    compare(tensors, function=lse, **options)


def problem(N, M, D, dtype, scale=8.0, length=1.0):
    q, k = ((length * features(size, D)).to(dtype).requires_grad_() for size in (N, M))
    return {"q": q, "k": k, "scale": torch.tensor(scale, requires_grad=True)}


def itself(N, D, dtype, scale=8.0):
    return {"q": features(N, D, dtype=dtype).requires_grad_(), "scale": torch.tensor(scale, requires_grad=True)}


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, D", SIZES)
@pytest.mark.parametrize("columns", [False, True])
def test_rows_and_columns(N, M, D, dtype, columns):
    check(problem(N, M, D, dtype), columns=columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, D", [(1, 136), (130, 200), (300, 520)])
def test_of_itself(N, D, dtype):
    check(itself(N, D, dtype))
    check(itself(N, D, dtype) | {"q_ids": torch.arange(N) % ((N + 1) // 2)})


@pytest.mark.parametrize("D", [200, 520])
@pytest.mark.parametrize("pairs", ["different", "same"])
@pytest.mark.parametrize("far", [1, 2**33])  # apart, as a tile looks at all 64 bits or at half of them
def test_ids(D, pairs, far):
    tensors = problem(300, 270, D, torch.bfloat16) | {"q_ids": torch.randint(-3, 3, (300,)) * far}
    tensors["k_ids"] = torch.randint(-3, 3, (270,)) * far
    check(tensors, columns=True, pairs=pairs)
    tensors["q_ids"], tensors["k_ids"] = (
        torch.arange(300) // 30 * far,
        torch.arange(270) // 27 * far,
    )  # classes in order
    check(tensors, columns=True, pairs=pairs)


@pytest.mark.parametrize("D", [200, 520])
def test_bias(D):
    bias = torch.randn(200).masked_fill(torch.arange(200) % 7 == 0, -math.inf).requires_grad_()
    for columns in (False, True):
        check(problem(70, 200, D, torch.bfloat16) | {"k_bias": bias}, columns=columns)
    check(itself(200, D, torch.bfloat16) | {"k_bias": bias, "q_ids": torch.arange(200) // 2})
    tensors = problem(70, 200, D, torch.float16) | {"k_bias": bias, "q_ids": torch.arange(70) % 9}
    check(tensors | {"k_ids": torch.arange(200) % 5}, columns=True)


@pytest.mark.parametrize("D", [200, 520])
def test_columns_alone(D):
    q, k = features(130, D).bfloat16(), features(270, D).bfloat16()
    k[200:] *= 20  # so that their log-sum-exps are far from those of others
    col, h, needs = torch.logsumexp(8 * q.float() @ k.float().T, 0), torch.rand(270), (True, True, True, False)
    pairs, turned = Pairs.of(Problem(q, k, None, 8.0)), Pairs.of(Problem(k, q, None, 8.0))
    dq, dk, dscale, _ = weights.gradients_of(pairs, None, col, None, h, *needs)
    dk_turned, dq_turned, dscale_turned, _ = weights.gradients_of(turned, col, None, h, None, *needs)
    for a, b in ((dq, dq_turned), (dk, dk_turned), (dscale, dscale_turned)):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("D", [200, 520])
def test_only_what_is_needed(D):
    tensors, ids = problem(130, 270, D, torch.bfloat16), {"q_ids": torch.arange(130), "k_ids": torch.arange(270)}
    for needed in ("q", "k", "scale"):
        some = {name: x.detach().requires_grad_(name == needed) for name, x in tensors.items()}
        check(some | ids, columns=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [200, 520])
def test_strips(short_strips, dtype, D):
    """That begin where others end, and in the triangle of q with itself at their own first row."""
    check(problem(400, 270, D, dtype) | {"q_ids": torch.arange(400), "k_ids": torch.arange(270)}, columns=True)
    check(itself(530, D, dtype) | {"q_ids": torch.arange(530) % 265})
    bias = torch.randn(300).requires_grad_()
    check(itself(300, D, dtype) | {"k_bias": bias})
    check(problem(300, 300, D, dtype) | {"k_bias": bias}, columns=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [264, 520])
def test_means(short_strips, dtype, D):
    q, k, ids = features(300, D, dtype=dtype), features(270, D, dtype=dtype), torch.arange(300) // 30
    ids[:9] = 100  # of all keys
    for k_ids in (torch.arange(270) // 27, torch.full((270,), 100)):
        s = dense.scores(q.double(), k.double(), 9.0, ids, k_ids)
        row = dense.lse(s, 1)
        mean = weights.means_of(Pairs.of(Problem(q, k, None, 9.0, ids, k_ids)), row.float())
        exact = torch.exp(s - row.masked_fill(row == -math.inf, 0)[:, None])
        dense.within(mean, exact @ k.double(), exact.to(dtype).double() @ k.double(), "mean")


def test_tiles_beyond_the_32nd_of_a_block_of_keys(monkeypatch):
    """Whose pairs are looked at for 32 tiles together."""
    monkeypatch.setattr(weights, "plan_of", lambda N, M, D, processors, plan=weights.plan_of: plan(N, M, D, 2))
    ids = {"q_ids": torch.arange(4300), "k_ids": torch.arange(4100, 4230)}
    check(problem(4300, 130, 64, torch.bfloat16) | ids, columns=True)


# ---- Numbers that are large or far apart ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [200, 768])
def test_duplicates_at_a_small_temperature(dtype, D):
    """One shift for a tile would lose all rows but the duplicates."""
    z = features(200, D).to(dtype)
    z[1] = z[0]
    check({"q": z.requires_grad_()}, scale=100.0)
    check({"q": z, "k": z.detach().flip(0).requires_grad_()}, scale=100.0, columns=True)


@pytest.mark.parametrize("D", [200, 520])
@pytest.mark.parametrize("scale", [100.0, -20.0, 0.0])
def test_scales(D, scale):
    check(problem(70, 270, D, torch.bfloat16, scale), columns=True)
    check(problem(70, 270, D, torch.bfloat16, scale) | {"q_ids": torch.arange(70), "k_ids": torch.arange(270)})
    check(itself(130, D, torch.bfloat16, scale))


@pytest.mark.parametrize("D", [200, 520])
def test_log_sum_exps_far_apart(D):
    """Of columns within a tile; of rows from columns; of some tiles and not of others."""
    tensors = problem(270, 270, D, torch.bfloat16, 2.0)
    with torch.no_grad():
        tensors["k"][:200:3] *= 40
        tensors["q"][65:70] *= 60
    check(tensors, columns=True, arbitrary=True)


@pytest.mark.parametrize("D", [200, 520])
@pytest.mark.parametrize("spread", [0, 98, 102, 140])
@pytest.mark.parametrize("above", [0, 40, 75, 140])
def test_bounds_within_which_one_exponential_serves(D, spread, above):
    """In base 2: log-sum-exps of columns between 0 and `spread`, and those of rows `above` them, or `above` below 0."""
    q, k, c = torch.eye(64, D), torch.zeros(128, D), torch.linspace(0, spread, 128).round()
    q[:, 64] = 1  # dk[j, i] is w_ij for i < 64, and the score k[j, 64]
    g, h, ln2 = torch.linspace(-1, 1, 64), torch.linspace(1, -1, 128).roll(40), math.log(2)
    for score, r in ((c, spread + above), (c - spread - above, -above)):
        k[:, 64], row = score, torch.full((64,), float(r))
        pairs = Pairs.of(Problem(q.bfloat16(), k.bfloat16(), None, ln2))
        _, dk, _, _ = weights.gradients_of(pairs, row * ln2, c * ln2, g, h, False, True, False, False)
        terms = g[:, None] * torch.exp2(score - row[:, None]), h * torch.exp2(score - c)
        within = 2**-8 * (terms[0] + terms[1]).abs() + 2**-18 * (terms[0].abs() + terms[1].abs()) + 2**-60
        assert ((dk[:, :64].T / ln2 - terms[0] - terms[1]).abs() <= within).all()


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
@pytest.mark.parametrize("D", [200, 520])
def test_nothing_left_has_exactly_zero_gradient(upstream, D):
    ids = torch.zeros(70, dtype=torch.long).index_fill(0, torch.tensor([3, 69]), 1)
    given = problem(70, 130, D, torch.bfloat16)
    row, col = lse(**given, q_ids=ids, k_ids=torch.ones(130, dtype=torch.long), columns=True)
    assert torch.equal(row == -math.inf, ids == 1)
    row.backward(torch.where(ids == 1, upstream, 0.0))
    assert all((x.grad == 0).all() for x in given.values())


@pytest.mark.parametrize("D", [200, 520])
def test_an_infinite_product_that_is_left_out_has_no_part_in_the_gradient_of_the_scale(D):
    z = torch.eye(6, D).bfloat16()
    z[:, 6] = 0.5
    z[2, 7] = 1e20  # its square is beyond fp32
    scale = torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(lse(z, scale=scale).sum(), scale)
    assert grad.item() == pytest.approx(6 * 0.25)


@pytest.mark.parametrize("D", [200, 520])
def test_a_column_taken_out_by_its_bias_may_hold_anything(D):
    given, kept = problem(70, 130, D, torch.bfloat16), torch.arange(130) % 64 != 3
    bias = torch.zeros(130).masked_fill(~kept, -math.inf).requires_grad_()

    def gradients(k, bias):
        row, _ = lse(given["q"], k, given["scale"], bias, columns=True)
        return torch.autograd.grad(row.sum(), (k, given["scale"], bias))

    k = given["k"].detach().masked_fill(~kept[:, None], math.nan).requires_grad_()
    got = gradients(k, bias)
    want = gradients(given["k"].detach()[kept].requires_grad_(), bias.detach()[kept].requires_grad_())
    for a, b in ((got[0][kept], want[0]), (got[1], want[1]), (got[2][kept], want[2])):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())
    assert (got[2][~kept] == 0).all()


@pytest.mark.parametrize("D", [200, 520])
def test_nan_and_inf_stay_in_their_rows(D):
    q, k = features(130, D).bfloat16(), features(70, D).bfloat16()
    q[5, 3], q[41, 0] = math.nan, math.inf
    dq = torch.autograd.grad(lse(q.requires_grad_(), k).sum(), q)[0]
    assert torch.equal(dq.isfinite().all(1), torch.arange(130).ne(5) & torch.arange(130).ne(41))


# ---- Launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [200, 520])
def test_same_bits_whatever_comes_first(emulated, D):
    given, results = problem(300, 270, D, torch.bfloat16), []
    for seed in (1, 2, 3):
        emulated.emulated_seed(seed)
        row, col = lse(**given, columns=True)
        grads = torch.autograd.grad(row.sum() + (col * col).sum(), list(given.values()))
        results.append(torch.cat([x.float().flatten() for x in grads]))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("D", [8, 64, 136, 256, 448, 512, 520, 768, 4096])
def test_a_plan_fits_a_processor(D):
    for N, M in ((1, 1), (256, 65536), (8192, 8192), (8192, 65536)):
        plan = weights.plan_of(N, M, D, 132)
        assert plan.shared <= weights.SHARED and 4 <= plan.stages <= 8
        assert plan.blocks <= 132 and plan.blocks % plan.cluster == 0 and 1 <= plan.slots <= -(-N // 128)
    assert D > 512 or plan.slots == 1  # 512 blocks of keys, four rounds
    assert D > 512 or weights.plan_of(8192, 8192, D, 132).slots == 2


def test_strips_are_shorter_where_rows_are_long():
    rows = [weights.rows_of_strip(2**bits, True) for bits in (0, 10, 17, 18, 19, 20, 24)]
    assert rows == [8192, 8192, 8192, 4096, 2048, 2048, 2048] and weights.rows_of_strip(2**16, False) == 4096


def test_memory_of_strips():
    """Of CLIP of 65,536 x 512 some 1.1 GB, of a small problem a number for each pair."""
    like = torch.empty(0, device="meta")

    def numbers(N: int, symmetric: bool) -> int:
        return strips.room(strips.cut(N, N, weights.ROWS, symmetric), N, like).numel()

    assert numbers(65536, False) == numbers(65536, True) == 8192 * 65536 and numbers(1000, False) == 1024 * 1024


@pytest.mark.parametrize("version", [(2, 7), (2, 8), (2, 11)])
def test_products_by_blas_take_no_option_that_torch_has_not(monkeypatch, version):
    """`out_dtype` is there from 2.8 on, and adds to fp32 from 2.11 on."""
    monkeypatch.setattr(strips, "VERSION", version)
    options = []
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, lambda *_, out, name=name, **given: options.append((name, *given)) or out)
    with FakeTensorMode():
        w, x, out = (
            torch.empty(64, 64, device="cuda", dtype=dtype) for dtype in (*2 * [torch.bfloat16], torch.float32)
        )
        for add in (False, True):
            strips.multiply(w, x, out, add)
    has = () if version < (2, 8) else ("out_dtype",)
    assert options == [("mm", *has), ("mm" if (2, 8) <= version < (2, 11) else "addmm", *has)]
