"""Every loss under autocast, torch.func and torch.compile with changing sizes, and differentiated twice."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sslkern
from sslkern.functional import cpc, info_nce, mnrl, nt_xent

D = 16
LOSSES = {  # loss(a, b [N, D], temperature)
    "nt_xent": nt_xent,
    "info_nce, one way": lambda a, b, T: info_nce(a, b, temperature=T),
    "info_nce, two way": lambda a, b, T: info_nce(a, b, temperature=T, two_way=True),
    "info_nce, negatives": lambda a, b, T: info_nce(a, b, a.flip(1), T, in_batch=True),
    "info_nce, frozen": lambda a, b, T: info_nce(a, b.detach(), b.detach().flip(1), T) + 0 * b.sum(),
    "mnrl": lambda a, b, T: mnrl(a, b, b.flip(1).unsqueeze(1), T, directions=("query_to_doc", "query_to_query")),
    "mnrl, margin": lambda a, b, T: mnrl(a, b, None, T, margin=0.1),
    "cpc": lambda a, b, T: cpc(a.view(-1, 4, D), b.view(-1, 4, D), torch.eye(D).expand(2, D, D), T),
}
GUIDED = {"mnrl, guide": lambda a, b, T: mnrl(a, b, None, T, guide=(a.detach().roll(1), b.detach()))}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
with_guided = pytest.mark.parametrize("loss", (LOSSES | GUIDED).values(), ids=(LOSSES | GUIDED).keys())
COMPILED = ["nt_xent", "info_nce, negatives", "mnrl", "cpc"]
compiled_losses = pytest.mark.parametrize("loss", [LOSSES[name] for name in COMPILED], ids=COMPILED)


def inputs(N=8, dtype=torch.float32):
    a, b = torch.randn(N, D), torch.randn(N, D)
    return [x.to(dtype).requires_grad_() for x in (a, b + a)] + [torch.tensor(0.2, requires_grad=True)]


def value_and_gradients(loss, tensors):
    value = loss(*tensors)
    return value.detach(), *torch.autograd.grad(value, tensors)


@with_guided
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, loss, dtype):
    tensors, autocast = inputs(dtype=dtype), torch.float16 if dtype == torch.float16 else torch.bfloat16
    want = value_and_gradients(loss, tensors)
    with torch.autocast("cpu", dtype=autocast):
        value = loss(*tensors)
        inside = torch.autograd.grad(value, tensors, retain_graph=True)
    outside = torch.autograd.grad(value, tensors)
    assert value.dtype == torch.float32
    assert all(x.dtype == g.dtype == h.dtype for x, g, h in zip(tensors, inside, outside, strict=True))
    tolerance = 1e-5
    for grads in (inside, outside):
        for ours, plain in zip((value, *grads), want, strict=True):
            assert torch.allclose(ours, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


@compiled_losses
def test_autocast_changes_nothing_in_compiled_code(loss):
    torch.compiler.reset()
    tensors = inputs()
    want = value_and_gradients(loss, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors)
    assert value.dtype == torch.float32
    tolerance = 1e-5
    for ours, plain in zip((value, *torch.autograd.grad(value, tensors)), want, strict=True):
        assert torch.allclose(ours, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["nt_xent", *(pytest.param(name, marks=pytest.mark.long) for name in ("info_nce, two way", "mnrl"))]
)
def test_what_the_compiler_fuses_stays_right(name):
    torch.compiler.reset()
    loss, tensors = LOSSES[name], inputs(64)
    got = value_and_gradients(torch.compile(loss, fullgraph=True), tensors)
    for ours, plain in zip(got, value_and_gradients(loss, tensors), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.long  # tests/test_compile.py has other sizes of every loss
@compiled_losses
def test_compiled_code_does_not_depend_on_the_batch_size(loss):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for N in (8, 64, 12, 256):
        tensors = inputs(N)
        for ours, plain in zip(value_and_gradients(compiled, tensors), value_and_gradients(loss, tensors), strict=True):
            assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    # Once for small problems, which compile as a formula, and once for the rest. Once may count twice: the compiler
    # starts anew where it finds that a Python number (an option's default) need not be symbolic.
    assert counts[0] == counts[1] == counts[2] and counts[3] <= 2 * counts[0]


@pytest.mark.parametrize("N", [9, 200])  # a formula, and the kernels
def test_compiled_code_keeps_a_detached_twin_apart(N):
    torch.compiler.reset()
    z = torch.randn(N, D, requires_grad=True)
    for loss in (
        lambda z: nt_xent(z, z.detach()),
        lambda z: info_nce(z, z.detach()),
        lambda z: mnrl(z, z.detach(), directions=("query_to_doc", "doc_to_query")),
        lambda z: sslkern.ops.similarity_lse(z, z.detach(), 0.1).sum(),
        lambda z: sslkern.ops.similarity_lse(z, z, 0.1).sum(),
    ):
        (want,) = torch.autograd.grad(loss(z), z)
        (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(z), z)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@every_loss
def test_torch_func(backend, loss):
    tensors = inputs()
    want = torch.autograd.grad(loss(*tensors), tensors)
    detached = [x.detach() for x in tensors]
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*detached)
    value, pull = torch.func.vjp(loss, *detached)
    for ours, twice, plain in zip(got, pull(torch.full_like(value, 2.0)), want, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)
        assert torch.allclose(twice, 2 * plain, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the kernels one by one
def test_vmap(backend):
    batches, b, T = torch.randn(3, 8, D), torch.randn(8, D), torch.tensor(0.2)
    for name, loss in LOSSES.items():
        got = torch.func.vmap(torch.func.grad(lambda a, loss=loss: loss(a, b, T)))(batches)
        for batch, ours in zip(batches, got, strict=True):
            a = batch.requires_grad_()
            assert torch.allclose(ours, torch.autograd.grad(loss(a, b, T), a)[0], rtol=1e-4, atol=1e-5), name


@every_loss
def test_a_second_derivative_says_so(backend, loss):
    tensors = inputs()
    grads = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative") as error:
        sum(g.sum() for g in grads).backward()
    assert "\n" not in str(error.value)
    a, b, T = (x.detach() for x in tensors)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda a: torch.func.grad(loss)(a, b, T).square().sum())(a)


def test_fp16_gradients_of_a_large_batch_do_not_vanish():
    """As with a gradient scaler: what fp16 can hold arrives as in fp32."""
    a, b = torch.randn(4096, 32).half(), torch.randn(4096, 32).half()
    for loss in (nt_xent, lambda a, b, T: mnrl(a, b, temperature=T)):
        grads = []
        for dtype in (torch.float16, torch.float32):
            z0, z1 = (x.to(dtype).detach().requires_grad_() for x in (a, b))
            (2**16 * loss(z0, z1, 0.5)).backward()
            grads.append(torch.cat((z0.grad, z1.grad)).double())
        half, single = grads
        assert (half - single).norm() < 2e-3 * single.norm()
        large = single.abs() > 1e-3 * single.abs().max()
        assert (half[large] != 0).all()
