"""The loss of few pairs as a whole, by the CUDA kernels: on a GPU where there is one, else emulated."""

import ctypes
import math
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sslkern
from sslkern.backends import BACKENDS, find, load
from sslkern.backends.cuda import driver, pair_contrast
from sslkern.functional import clip, info_nce, nt_xent

from .conftest import GPU, emulate_cuda
from .functional.agreement import agrees_on_kernels, product, unit

HALF = [torch.bfloat16, torch.float16]
MODES = "views", "one_way", "two_way"


@pytest.fixture(params=["cuda"] if GPU else ["emulated"])
def whole(request, monkeypatch):
    """The calls of the backend: "forward" and "backward"."""
    if request.param == "emulated":
        emulate_cuda(monkeypatch)
    module, calls = load("cuda", "pair_contrast"), []
    for function, name in ((module.pair_contrast_fwd, "forward"), (module.pair_contrast_bwd, "backward")):
        monkeypatch.setattr(module, function.__name__, counted(function, name, calls))
    torch.set_default_device("cuda" if GPU else None)
    yield calls
    torch.set_default_device(None)


def counted(function, name, calls):
    return lambda *inputs: calls.append(name) or function(*inputs)


def loss_of(mode):
    def loss(x, y, temperature, **options):
        if mode == "views":
            return nt_xent(x, y, temperature, **options)
        return info_nce(x, y, temperature=temperature, two_way=mode == "two_way", **options)

    return loss


def dense_of(mode):
    def loss(x, y, temperature, ids=None, normalize=True, reduction="mean"):
        N = len(x)
        x, y = (unit(x), unit(y)) if normalize else (x, y)
        q, k = (torch.cat((x, y)),) * 2 if mode == "views" else (x, y)
        positive = torch.arange(len(q)).roll(N) if mode == "views" else torch.arange(N)
        s = product(q, k) / temperature
        ids = (torch.arange(N) if ids is None else ids).repeat(len(q) // N)
        out = ids[:, None] == ids
        out[torch.arange(len(q)), positive] = False
        s = s.masked_fill(out, -math.inf)
        ways = [s, s.T] if mode == "two_way" else [s]
        losses = torch.stack([torch.nn.functional.cross_entropy(way, positive, reduction="none") for way in ways])
        return losses.mean() if reduction == "mean" else losses.mean(0).sum()

    return loss


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "N, D", [(17, 9), (33, 64), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((70, 129), (40, 520)))]
)
def test_value_and_gradients(whole, mode, N, D, dtype):
    x, y = torch.randn(2, N, D)
    y = x + y
    for temperature, options in (
        (0.5, {}),
        (0.05, {"reduction": "sum"}),
        (0.3, {"ids": torch.arange(N) // 3}),
        (-0.7, {"normalize": False}),
    ):
        features = (x, y) if options.get("normalize", True) else (x / D**0.5, y / D**0.5)
        agrees_on_kernels(loss_of(mode), dense_of(mode), features, temperature, dtype, **options)
    assert whole == ["forward", "backward"] * 4


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_do_not_begin_on_16_bytes(whole, mode):
    x, y = torch.randn(2, 19, 41).bfloat16()[:, :, 1:]
    want = loss_of(mode)(x.contiguous(), y.contiguous(), 0.1)
    assert torch.equal(loss_of(mode)(x, y, 0.1), want) and whole == ["forward"] * 2


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits(whole, mode):
    x, y = torch.randn(2, 50, 48).half()

    def step():
        leaves = [side.clone().requires_grad_() for side in (x, y)]
        scale = torch.tensor(20.0, requires_grad=True)
        loss = loss_of(mode)(*leaves, temperature=1.0, logit_scale=scale)
        return [loss.detach(), *torch.autograd.grad(loss, (*leaves, scale))]

    for one, other in zip(step(), step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_duplicates_zeros_and_single_rows(whole, mode, dtype):
    x, y = torch.randn(2, 21, 24).to(dtype)
    x[5], y[5] = x[4], x[4]
    x[7], y[9] = 0, 0
    leaves = [side.requires_grad_() for side in (x, y)]
    loss = loss_of(mode)(*leaves, temperature=0.01)
    grads = torch.autograd.grad(loss, leaves)
    with sslkern.use_backend("reference"):
        other = loss_of(mode)(*leaves, temperature=0.01)
        others = torch.autograd.grad(other, leaves)
    assert torch.allclose(loss, other, rtol=1e-4)
    for ours, theirs in zip(grads, others, strict=True):
        for i in (4, 5, 7, 9):
            assert (ours[i].float() - theirs[i].float()).norm() <= 0.02 * theirs.float().norm()
            ours[i], theirs[i] = 0, 0  # some are divided by 1e-12
        assert (ours.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()
    one = x[:1].detach().requires_grad_()
    loss = loss_of(mode)(one, y[:1].detach(), temperature=0.1)
    loss.backward()
    assert loss == 0 and (one.grad == 0).all()


def test_what_is_not_a_number_stays_so(whole):
    x, y = torch.randn(2, 20, 16).bfloat16()
    x[3, 2] = math.nan
    for mode in MODES:
        loss, share = loss_of(mode)(x, x, 0.1, stats=True)
        with sslkern.use_backend("reference"):
            _, expected = loss_of(mode)(x, x, 0.1, stats=True)
        assert loss.isnan() and torch.allclose(share, expected) and share < 0.6


@pytest.mark.parametrize("mode", MODES)
def test_a_positive_of_minus_infinity(whole, mode):
    x = torch.tensor([[1e20, 0.0], [0.0, 1.0], [0.0, 1.0]]).bfloat16()
    assert loss_of(mode)(x, -x, 1.0, normalize=False) == math.inf


@pytest.mark.parametrize("arriving", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_rows_without_negatives_get_zero_whatever_arrives(whole, mode, arriving):
    x, y = torch.randn(2, 3, 8).bfloat16()
    leaves = [leaf.requires_grad_() for leaf in (x, y, torch.tensor(2.0))]
    loss = loss_of(mode)(x, y, 1.0, logit_scale=leaves[2], ids=torch.zeros(3, dtype=torch.int64))
    assert loss == 0 and all((grad == 0).all() for grad in torch.autograd.grad(loss, leaves, torch.tensor(arriving)))


@pytest.mark.parametrize("temperature", [0.05, 0.03, 0.01])
@pytest.mark.parametrize("mode", MODES)
def test_losses_near_zero(whole, mode, temperature):
    x, noise = torch.randn(2, 32, 64)
    leaves = [side.half().requires_grad_() for side in (x, x + 0.1 * noise)]

    def gradients():
        loss = loss_of(mode)(*leaves, temperature=temperature)
        return torch.autograd.grad(loss / loss.detach(), leaves)

    ours = gradients()
    with sslkern.use_backend("reference"):
        theirs = gradients()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 0.005 * other.float().norm()


def test_statistics(whole):
    x, y = torch.randn(2, 30, 16).bfloat16()
    y = x + 2 * y
    for mode in MODES:
        loss, share = loss_of(mode)(x, y, 0.2, stats=True)
        with sslkern.use_backend("reference"):
            other, others = loss_of(mode)(x, y, 0.2, stats=True)
        assert torch.allclose(loss, other, rtol=1e-4) and torch.allclose(share, others) and 0 < share < 1


@pytest.mark.parametrize("mode", MODES)
def test_compiled(whole, monkeypatch, mode):
    # On a CPU, where it is emulated, compiled code has a formula for so few rows.
    monkeypatch.setattr(sys.modules["sslkern.ops.pair_contrast"], "few_pairs", lambda *_: False)
    x, y = torch.randn(2, 20, 16).bfloat16()
    scale = torch.tensor(3.0)

    def step(loss):
        leaves = [side.clone().requires_grad_() for side in (x, y, scale)]
        value = loss(*leaves[:2], temperature=1.0, logit_scale=leaves[2])
        return [value.detach(), *torch.autograd.grad(2 * value, leaves)]

    torch.compiler.reset()
    compiled = torch.compile(loss_of(mode), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled), step(loss_of(mode)), strict=True):
        assert torch.equal(ours, eager)
    assert whole == ["forward", "backward"] * 2


def test_compiled_once_for_batches_of_any_size(whole, monkeypatch):
    monkeypatch.setattr(sys.modules["sslkern.ops.pair_contrast"], "few_pairs", lambda *_: False)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nt_xent, fullgraph=True, backend=counter)
    for N in (5, 6, 7, 20):
        x, y = torch.randn(2, N, 8).bfloat16()
        assert torch.equal(compiled(x.requires_grad_(), y), nt_xent(x, y))
    assert counter.frame_count == 2 and whole == ["forward"] * 8  # the first is for its size alone


def test_opcheck(whole):
    x, y = torch.randn(2, 6, 8).bfloat16()
    scale = torch.tensor(2.0, requires_grad=True)
    args = (x.requires_grad_(), y, scale, 1.0, None, "two_way", True, True, "mean", True, False, True, "cuda")
    torch.library.opcheck(torch.ops.sslkern.small_pair_contrast.default, args)
    *_, kept = torch.ops.sslkern.small_pair_contrast.default(*(a.detach() if a is x else a for a in args))
    args = (torch.tensor(1.0), x.detach(), None, scale.detach(), kept.detach(), x.dtype, "cuda")
    torch.library.opcheck(torch.ops.sslkern.small_pair_contrast_bwd.default, args)


def test_which_it_takes(whole):
    def found(N, D, dtype=torch.bfloat16, views=False, **options):
        options = dict(mode="views" if views else "one_way", bank=False) | options
        rows = 2 * N if views else N
        return find("pair_contrast", torch.zeros(N, D, dtype=dtype), sizes=(1, rows, rows, D), **options)

    assert found(1024, 1024) == found(512, 7, views=True) == "cuda"
    assert found(1025, 8) is found(513, 8, views=True) is found(8, 1025) is found(8, 8, torch.float32) is None
    assert found(8, 8, bank=True) is None


def test_a_gpu_with_little_shared_memory_takes_fewer_features(whole, monkeypatch):
    monkeypatch.setattr(driver, "shared_memory", lambda index: 99 << 10)
    z = torch.zeros(8, 600, dtype=torch.bfloat16)
    assert "shared memory" in pair_contrast.lacks(z, (1, 8, 8, 600), "one_way", False)
    assert pair_contrast.lacks(z[:, :512], (1, 8, 8, 512), "one_way", False) is None


@pytest.mark.skipif(GPU, reason="counted by the emulated driver")
@pytest.mark.parametrize("loss", ["nt_xent", "info_nce", "clip"])
def test_three_launches_in_a_step(whole, monkeypatch, loss):
    library = driver.library()
    count = lambda: (numbers := (ctypes.c_int64 * 7)(), library.emulated_last(numbers))[0][4]  # noqa: E731
    x, y = (torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    call = {
        "nt_xent": lambda: nt_xent(x, y, 0.1),
        "info_nce": lambda: info_nce(x, y, temperature=0.1),
        "clip": lambda: clip(x, y, scale),
    }[loss]
    before = count()
    call()
    assert count() - before == 2
    step = call()
    step.backward()
    assert count() - before == 2 + 3
    assert BACKENDS["cuda"].MISSING is None and whole == ["forward", "forward", "backward"]
