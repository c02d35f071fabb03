"""`pair_contrast` against the formula that compiled code traces: similarity_lse, dots and softplus under autograd."""

import math
import sys
import types

import pytest
import torch

import sslkern
from sslkern import backends
from sslkern.backends import load
from sslkern.functional import info_nce, nt_xent
from sslkern.ops import _dense
from sslkern.ops.pair_contrast import pair_contrast

ops_pair_contrast = sys.modules[pair_contrast.__module__]

MODES = ["views", "one_way", "two_way"]


def traced(monkeypatch, *args):
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return _dense.dense_contrast(*args)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, normalize):
    x, y = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 0, 1])

    def losses(x, y, scale):
        return pair_contrast(x, y, scale, ids, mode, normalize, False)[0]

    assert torch.autograd.gradcheck(losses, (x, y, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("N, D", [(1, 1), (2, 3), (33, 64), (130, 129)])  # 64 and more features keep their scores
def test_equals_the_traced_formula(backend, monkeypatch, mode, N, D, dtype):
    x, y = torch.randn(N, D), torch.randn(N, D)
    results = []
    for call in (pair_contrast, lambda *args: traced(monkeypatch, *args)):
        a, b = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        scale = torch.tensor(5.0, requires_grad=True)
        losses, positive, best = call(a, b, scale, None, mode, True, True)
        (losses * torch.arange(1, 1 + losses.numel()).view_as(losses)).sum().backward()
        results.append((losses.detach(), positive, best, a.grad.float(), b.grad.float(), scale.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, formula in zip(*results, strict=True):
        assert torch.allclose(ours, formula, rtol=tolerance, atol=tolerance * (1 + formula.abs().max().item()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [100.0, 1e6, 1e9])
def test_scores_of_any_size_in_compiled_code(mode, scale):
    """The formula for the compiler loses no more to the rounding of scores than the kernels do."""
    x, y = torch.randn(2, 8, 4)
    x[3], y[3] = x[2], y[2]  # scores that are equal

    def gradients(call, dtype):
        leaves = [side.to(dtype).requires_grad_() for side in (x, y)]
        losses = call(*leaves, torch.tensor(scale, dtype=dtype), None, mode, True, False)[0]
        return torch.cat(torch.autograd.grad(losses.sum(), leaves)).double()

    exact = gradients(pair_contrast, torch.float64)
    ours, compiled = (
        (gradients(call, torch.float32) - exact).norm() / exact.norm()
        for call in (pair_contrast, _dense.dense_contrast)
    )
    assert compiled <= 4 * ours + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.0, -5.0])
def test_scales_of_any_sign_in_compiled_code(mode, scale, dtype):
    """What is left out is infinite before it is scaled."""
    x, y = (side.to(dtype) for side in torch.randn(2, 8, 4))
    results = []
    for call in (pair_contrast, _dense.dense_contrast):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)]
        losses, _, best = call(*leaves, None, mode, True, True)
        results.append((losses, best, *torch.autograd.grad(losses.sum(), leaves)))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, formula in zip(*results, strict=True):
        atol = tolerance * (1 + ours.abs().max().item())
        assert torch.allclose(ours.float(), formula.float(), rtol=tolerance, atol=atol)


@pytest.mark.parametrize("mode", MODES)
def test_row_without_negatives_gets_zero_whatever_arrives(backend, mode):
    x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    losses, _, _ = pair_contrast(x, y, 2.0, torch.zeros(3, dtype=torch.int64), mode, True, False)
    assert (losses == 0).all()
    losses.backward(torch.full_like(losses, math.nan))
    assert (x.grad == 0).all() and (y.grad == 0).all()


def test_after_inference_mode(backend):
    x = torch.randn(7, 4)
    with torch.inference_mode():
        expected = nt_xent(x, x + 1)
    x.requires_grad_()
    loss = nt_xent(x, x + 1)  # meets the row numbers that inference mode made
    loss.backward()
    assert torch.equal(loss.detach(), expected) and x.grad.isfinite().all()


@pytest.mark.parametrize("loss", [nt_xent, lambda x, y: info_nce(x, y, two_way=True)])
def test_second_derivative_says_so(backend, loss):
    x, y = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(x, y), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key_learns", [True, False])
@pytest.mark.parametrize("N, M, D", [(1, 0, 3), (2, 1, 1), (33, 150, 64)])
def test_a_bank_equals_the_formula(backend, N, M, D, key_learns, dtype):
    query, key, bank = (torch.nn.functional.normalize(torch.randn(rows, D), dim=1) for rows in (N, N, M))
    results = []
    for ours in (True, False):
        x, y, negatives = query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_(key_learns), bank.to(dtype)
        scale = torch.tensor(5.0, requires_grad=True)
        if ours:
            losses, positive, best = pair_contrast(x, y, scale, None, "one_way", True, True, negatives)
            losses, best = losses[0], best[0]
        else:
            a, b = (torch.nn.functional.normalize(side.float(), dim=1) for side in (x, y))
            s = scale * a @ negatives.float().T
            positive = scale * (a * b).sum(1)
            losses = torch.cat((positive.unsqueeze(1), s), 1).logsumexp(1) - positive
            best = s.amax(1) if M else torch.full((N,), -math.inf)
        (losses * torch.arange(1, 1 + N)).sum().backward()
        grads = x.grad.float(), scale.grad, *([y.grad.float()] if key_learns else [])
        results.append((losses.detach(), positive.detach(), best.detach(), *grads))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, formula in zip(*results, strict=True):
        assert torch.allclose(ours, formula, rtol=tolerance, atol=tolerance * 5)


def test_a_bank_may_change_before_the_backward(backend):
    x, y, bank = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8), torch.randn(9, 8)
    losses, _, _ = pair_contrast(x, y, 0.5, None, "one_way", True, False, bank)
    (expected,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    bank.zero_()
    losses.sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_scale_of_another_type(backend, mode):
    x, y = torch.randn(2, 9, 4)
    expected, _, _ = pair_contrast(x, y, torch.tensor(2.5), None, mode, True, False)
    for dtype in (torch.float64, torch.float16):
        scale = torch.tensor(2.5, dtype=dtype, requires_grad=True)
        losses, _, _ = pair_contrast(x, y, scale, None, mode, True, False)
        losses.sum().backward()
        assert torch.equal(losses.detach(), expected) and scale.grad.dtype == dtype


def test_features_may_change_before_the_backward(backend):
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    for mode in MODES:
        query = x.clone().requires_grad_()
        key = y.clone()
        losses, _, _ = pair_contrast(query, key, 2.0, None, mode, True, False)
        (expected,) = torch.autograd.grad(losses.sum(), query, retain_graph=True)
        key.zero_()
        losses.sum().backward()
        assert torch.equal(query.grad, expected)


def test_only_the_key_learns(backend):
    x, y, bank = torch.randn(5, 8), torch.randn(5, 8, requires_grad=True), torch.randn(9, 8)
    losses, _, _ = pair_contrast(x, y, 2.0, None, "one_way", False, False, bank)
    losses.sum().backward()
    s = torch.cat(((x * y.detach()).sum(1, keepdim=True), x @ bank.T), 1) * 2
    assert torch.allclose(y.grad, 2 * (s.softmax(1)[:, :1] - 1) * x, atol=1e-5)


@pytest.mark.parametrize("sides", [1, 2])
def test_losses_of_both_backends(backend, sides):
    name = backend.partition("-")[0]
    if name != "triton":
        pytest.skip("the others share the plain one")
    N = 300
    row, cosine = 40 * torch.randn(sides * N), torch.randn(N)
    row[:4] = torch.tensor([-math.inf, math.inf, math.nan, 200])
    scale = torch.tensor(3.0)
    columns = ((row, None), (row[:N], row[N:]))[: 1 + (sides == 2)]
    for g in (torch.randn(sides, N), torch.tensor(0.5).expand(sides, N), torch.randn(N, sides).T):
        for first, second in columns:
            ours, plain = [], []
            for results, module in ((ours, load(name, "pair_losses")), (plain, load("reference", "pair_losses"))):
                results += module.pair_losses_fwd(first, second, cosine, scale, 1.0, False)
                results += module.pair_losses_bwd(results[-1], g, None, 2.0)
            for a, b in zip(ours, plain, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("mode", ["views", "one_way", "two_way", "frozen", "bank"])
def test_opcheck(backend, mode):
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 5)
    scale = torch.tensor(2.0, requires_grad=True)
    ids, bank, frozen = torch.arange(6).repeat(2 if mode == "views" else 1), None, mode in ("frozen", "bank")
    name = backend.partition("-")[0]
    keep = len(ids) if name == "cpu" and not frozen else 0
    if mode == "bank":
        bank, ids = torch.randn(7, 5), None
    mode = "one_way" if frozen else mode
    x, y = x.requires_grad_(), y.requires_grad_(not frozen)
    backends = ",".join([name] * 3)
    args = (x, y, bank, scale, 1.0, ids, mode, True, False, frozen, keep, backends)
    torch.library.opcheck(torch.ops.sslkern.pair_contrast.default, args)
    losses, _, _, *saved = torch.ops.sslkern.pair_contrast.default(*(a if a is not x else x.detach() for a in args))
    z, norm, cosine, gap, row, col, kept = (x.detach() for x in saved)
    saved = z, norm, cosine, gap, row, col if mode == "two_way" else None, kept, scale.detach()
    for needs in ((True, True), (True, False)):
        args = (torch.ones_like(losses).detach(), *saved, 1.0, ids, mode, True, frozen, *needs, True, backends)
        torch.library.opcheck(torch.ops.sslkern.pair_contrast_bwd.default, args)


# ---- how far it is from a loss to its kernel -------------------------------------------------------------------------

# The functions of Python on the stack, and in C++: the binding, the entry of an instruction set, the kernel of a type.
WAYS = {
    "cpu": (
        ["nt_xent", "pair_contrast", "_forward", "similarity_lse_fwd"],
        ["_backward", "similarity_lse_bwd"],
    ),
    "triton": (
        ["nt_xent", "pair_contrast", "_forward", "similarity_lse_fwd", "_sums"],
        ["_backward", "similarity_lse_bwd", "_gradient"],
    ),
}
IN_CPP = {"cpu": 3, "triton": 0}
MOST = {"cpu": (7, 5), "triton": (7, 4)}


def stack_at_the_kernel(call, kernel: str, above: str) -> list[str]:
    """The names of the functions between that called `above` and the launch of a kernel of similarity_lse."""
    found = []

    def watch(frame, event, arg):
        native = event == "c_call" and getattr(arg, "__module__", "") == "sslkern._cpu" and kernel in arg.__name__
        launched = frame.f_locals.get("self") if event == "call" and frame.f_code.co_name == "__getitem__" else None
        module = getattr(getattr(launched, "__dict__", {}).get("fn"), "__module__", "")
        if found or not (native or module == "sslkern.backends.triton.similarity_lse"):
            return
        frame = frame if native else frame.f_back
        while frame is not None and frame.f_code.co_name != above:
            found.insert(0, frame.f_code.co_name)
            frame = frame.f_back

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_few_functions_between_a_loss_and_its_kernel(backend):
    name = backend.partition("-")[0]
    if name not in WAYS:
        pytest.skip("has no kernels of its own for similarity_lse")
    x, y = torch.randn(2, 8, 16, requires_grad=True)
    nt_xent(x, y).backward()

    def user():
        return nt_xent(x, y)

    ways = (
        stack_at_the_kernel(user, "similarity_lse_fwd", "user"),
        stack_at_the_kernel(nt_xent(x, y).backward, "similarity_lse_bwd", "_engine_run_backward"),
    )
    assert ways == WAYS[name]
    for way, most in zip(ways, MOST[name], strict=True):
        assert len(way) + IN_CPP[name] <= most


# ---- a backend that has the whole loss, and its gradient in the forward ----------------------------------------------


class Whole(types.ModuleType):
    """A backend with a loss of pairs of its own: that of the reference, which it does not compose of three."""

    DEVICES, DTYPES, PRIMITIVES, KEEPS, MISSING = ("cpu",), (torch.float32,), ("pair_contrast",), (0, 0), None
    PARTS = "reference,reference,reference"

    def __init__(self, largest: int):
        super().__init__("whole")
        lacks = lambda x, sizes, bank, mode: f"takes {largest} rows" if bank or sizes[1] > largest else None  # noqa: E731
        self.LACKS = {"pair_contrast": lacks}
        self.calls = []

    def pair_contrast_fwd(self, x, y, bank, scale_tensor, scale, bias_tensor, bias, ids, ptr, mode, *rest):
        normalize, _, need_best, reduction, *_ = rest
        self.calls.append("forward")
        ids = (torch.arange(len(x)) if ids is None else ids).repeat(1 + (mode == "views"))
        by = torch.tensor(1.0) if scale_tensor is None else scale_tensor
        of_scale = by, scale, ids, mode, normalize
        inputs = *of_scale, need_best, False, 0, self.PARTS
        losses, positive, best, *kept = ops_pair_contrast._forward(x, y, None, *inputs)
        g = torch.full_like(losses, 1 / (losses.numel() if reduction == "mean" else 1 + (mode == "two_way")))
        dx, dy, dscale = ops_pair_contrast._gradients_of(g, *kept, *of_scale, False, True, True, True, self.PARTS)
        return (losses * g).sum(), positive, best, torch.cat((dx.flatten(), dy.flatten(), dscale.view(1)))

    def pair_contrast_fake(self, x, y, bank, scale_tensor, scale, bias_tensor, bias, ids, ptr, mode, *rest):
        best = rest[2]
        N, D = x.shape
        shapes = (), N if best else 0, (1 if mode == "one_way" else 2, N) if best else 0, 2 * N * D + 1
        return tuple(x.new_empty(shape) for shape in shapes)

    def pair_contrast_bwd(self, g, x, y, scale_tensor, bias_tensor, kept, dtype):
        self.calls.append("backward")
        dx, dy = kept[:-1].chunk(2)
        pairs = zip((x, y, scale_tensor), (dx, dy, kept[-1]), strict=True)
        return *(None if of is None else (grad * g).view_as(of) for of, grad in pairs), None


@pytest.fixture
def whole(monkeypatch):
    """A backend of the highest rank that has the whole loss of up to 40 rows."""
    backend = Whole(40)
    monkeypatch.setitem(backends.BACKENDS, "whole", backend)
    monkeypatch.setitem(backends._OFFERED, "pair_contrast", ["whole"])
    monkeypatch.setitem(sys.modules, "sslkern.backends.whole", backend)
    monkeypatch.setitem(sys.modules, "sslkern.backends.whole.pair_contrast", backend)
    yield backend
    load.cache_clear()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", MODES)
def test_a_backend_may_have_the_whole_loss(whole, monkeypatch, mode, reduction):
    x, y, scale = torch.randn(9, 4), torch.randn(9, 4), torch.tensor(3.0)

    def step(call):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, scale)]
        loss, positive, best = call(*leaves, None, mode, True, True, reduction=reduction)
        return [loss.detach(), positive, best, *torch.autograd.grad(loss.square(), leaves)]

    got = step(pair_contrast)
    assert whole.calls == ["forward", "backward"]
    with sslkern.use_backend("reference"):  # which has not the whole, and composes it
        want = step(pair_contrast)
    assert whole.calls == ["forward", "backward"]
    for ours, composed in zip(got, want, strict=True):
        assert torch.allclose(ours, composed, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(ops_pair_contrast, "few_pairs", lambda *_: False)  # on a CPU a formula comes before it
    torch.compiler.reset()
    for ours, composed in zip(step(torch.compile(pair_contrast, backend="aot_eager")), want, strict=True):
        assert torch.allclose(ours, composed, rtol=1e-4, atol=1e-5)
    assert whole.calls == ["forward", "backward"] * 2


def test_it_is_asked_for_the_whole_problem(whole):
    z = torch.randn(21, 4, requires_grad=True)
    info_nce(z, z + 1).backward()
    assert whole.calls == ["forward", "backward"]
    nt_xent(z, z + 1).backward()  # 42 rows: composed
    info_nce(z.double(), z.double() + 1).backward()
    info_nce(z, z + 1, reduction="none").sum().backward()  # what comes next is not known
    info_nce(z, z + 1, weights=torch.ones(21)).backward()
    info_nce(z, z + 1, torch.randn(5, 4)).backward()
    assert whole.calls == ["forward", "backward"]


def test_what_was_found_is_not_asked_for_again(whole):
    asked, lacks = [], whole.LACKS["pair_contrast"]
    whole.LACKS["pair_contrast"] = lambda x, **options: asked.append(options["sizes"]) or lacks(x, **options)
    x, y = torch.randn(2, 21, 4)
    for _ in range(2):
        info_nce(x, y)
        nt_xent(x, y)  # 42 rows: composed
        with sslkern.use_backend("reference"):
            info_nce(x, y)
    assert asked == [(1, 21, 21, 4), (1, 42, 42, 4)] and whole.calls == ["forward"] * 2


def test_only_what_learns_is_asked_of_it(whole):
    x, y, seen = torch.randn(6, 4), torch.randn(6, 4), []
    forward = whole.pair_contrast_fwd
    whole.pair_contrast_fwd = lambda *inputs: seen.append(inputs[-4:-1]) or forward(*inputs)
    info_nce(x, y)
    info_nce(x.requires_grad_(), y).backward()
    info_nce(x, y, logit_scale=torch.tensor(2.0, requires_grad=True)).backward()
    with torch.no_grad():
        info_nce(x, y)
    assert seen == [(False, False, False), (True, False, False), (True, False, True), (False, False, False)]
    assert whole.calls == ["forward", "forward", "backward", "forward", "backward", "forward"] and y.grad is None


def test_it_has_no_second_derivative(whole):
    x, y = torch.randn(2, 4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(nt_xent(x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
