import copy
import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import nearest_neighbors, nnclr, nt_xent
from tests.ops.dense import within

from .agreement import peer


def dense(z0, z1, p0, p1, support, temperature=0.1, two_way=False, ids=None):
    """[N], with the similarities stored."""
    support, losses = F.normalize(support, dim=1), []
    labels = torch.arange(len(z0))
    for z, p in ((z0, p1), (z1, p0)):
        near = support[(F.normalize(z, dim=1) @ support.T).argmax(1)]
        logits = near @ F.normalize(p, dim=1).T / temperature
        if ids is not None:
            logits = logits.masked_fill((ids[:, None] == ids) & ~torch.eye(len(z), dtype=torch.bool), -math.inf)
        sides = [F.cross_entropy(s, labels, reduction="none") for s in ((logits, logits.T) if two_way else (logits,))]
        losses.append(sum(sides) / len(sides))
    return (losses[0] + losses[1]) / 2


def problem(N=12, D=6, K=40, dtype=torch.float32):
    z = torch.randn(2, N, D).to(dtype)
    p0, p1 = (torch.randn(N, D).to(dtype).requires_grad_() for _ in range(2))
    return (*z, p0, p1, torch.randn(K, D).to(dtype))


@pytest.mark.parametrize("ids", [None, torch.arange(12) // 2])
@pytest.mark.parametrize("two_way", [False, True])
def test_equals_the_dense_formula(two_way, ids):
    inputs, T = problem(dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    options = dict(two_way=two_way, ids=ids)
    losses, want = nnclr(*inputs, T, reduction="none", **options), dense(*inputs, T, **options)
    assert torch.allclose(losses, want, rtol=1e-10)
    wanted = [*inputs[2:4], T]
    grads = torch.autograd.grad(losses.mean(), wanted, retain_graph=True)
    for got, expected in zip(grads, torch.autograd.grad(want.mean(), wanted), strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(nnclr(*inputs, T, reduction="sum", **options), want.sum())
    assert torch.autograd.gradcheck(lambda *x: nnclr(*inputs[:2], *x[:2], inputs[4], x[2], **options), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [0.01, 0.5])
def test_bound(backend, dtype, T):
    z0, z1, p0, p1, support = problem(N=65, D=48, K=130, dtype=dtype)
    support = F.normalize(support.float(), dim=1).to(dtype)
    z0, z1 = support[:65], support[65:]  # whose neighbours no rounding changes

    def everything(loss, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = loss(*inputs)
        return (out.detach(), *torch.autograd.grad(out.mean(), inputs))

    got = everything(lambda a, b: nnclr(z0, z1, a, b, support, T, reduction="none"), p0, p1)
    plain = everything(lambda a, b: dense(z0, z1, a, b, support, T).float(), p0, p1)
    wide = [x.double() for x in (z0, z1, p0, p1, support)]
    exact = everything(lambda a, b: dense(*wide[:2], a, b, wide[4], T), *wide[2:4])
    for what, *results in zip(("loss", "p0", "p1"), got, exact, plain, strict=True):
        within(*results, what, scale=1 / T)


def test_nearest_neighbors(backend):
    z, support = torch.randn(20, 5), torch.randn(50, 5) * torch.rand(50, 1)
    cosine = F.normalize(z, dim=1) @ F.normalize(support, dim=1).T
    assert torch.equal(nearest_neighbors(z.requires_grad_(), support.requires_grad_()), support[cosine.argmax(1)])
    assert torch.equal(nearest_neighbors(z, support, normalize=False), support[(z @ support.T).argmax(1)])
    assert not nearest_neighbors(z, support).requires_grad
    assert torch.equal(nearest_neighbors(z, support[:1].expand(9, 5)), support[:1].expand(20, 5))


def test_no_negatives_left(backend):
    z0, z1, p0, p1, support = problem()
    for options in (dict(ids=torch.zeros(12, dtype=torch.long)), dict(ids=torch.zeros(12).long(), two_way=True)):
        loss, share = nnclr(z0, z1, p0, p1, support, stats=True, **options)
        assert loss == 0 and share == 1
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (p0, p1)))


def test_share_of_rows_that_win(backend):
    z0, z1, p0, p1, support = problem(40)
    near = [F.normalize(nearest_neighbors(z, support), dim=1) for z in (z0, z1)]
    wins = [(n @ F.normalize(p, dim=1).T).argmax(1) == torch.arange(40) for n, p in ((near[0], p1), (near[1], p0))]
    assert torch.allclose(nnclr(z0, z1, p0, p1, support, stats=True)[1], torch.cat(wins).float().mean())


def test_compiles_without_a_break(backend):
    torch.compiler.reset()
    inputs = problem()
    compiled = torch.compile(nnclr, fullgraph=True, backend="aot_eager")
    got, want = compiled(*inputs), nnclr(*inputs)
    assert torch.allclose(got, want)
    for a, b in zip(*(torch.autograd.grad(x, inputs[2:4]) for x in (got, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_module_keeps_its_support(backend):
    z0, z1, p0, p1, _ = problem()
    criterion = sslkern.NNCLRLoss(dim=6, size=20, temperature=0.2)
    before = criterion.support.queue.t().clone()
    loss = criterion(z0, z1, p0, p1)
    assert torch.allclose(loss, nnclr(z0, z1, p0, p1, before, 0.2))
    loss.backward()  # after the push
    assert torch.allclose(criterion.support.queue.t()[:12], F.normalize(z0, dim=1), atol=1e-6)
    assert criterion.state_dict().keys() == {"support.queue", "support.queue_ptr"}
    other = sslkern.NNCLRLoss(dim=6, size=20, temperature=0.2).eval()
    other.load_state_dict(copy.deepcopy(criterion.state_dict()))
    assert torch.equal(other(z0, z1, p0, p1, logit_scale=3.0), criterion(z0, z1, p0, p1, logit_scale=3.0))
    assert other.support.queue_ptr == 12 and criterion.support.queue_ptr == 4  # evaluation leaves it alone
    assert criterion(*(x.bfloat16() for x in (z0, z1, p0, p1))).isfinite()


def test_lightlys_recipe():
    """Theirs contrasts the neighbours with NT-Xent, whose negatives come from both sides."""
    losses, modules = peer("lightly.loss"), peer("lightly.models.modules")
    z0, z1, p0, p1, _ = problem(16)
    bank, criterion = modules.NNMemoryBankModule(size=(40, 6)), losses.NTXentLoss(temperature=0.3)
    bank(torch.randn(40, 6), update=True)
    near0, near1 = bank(z0), bank(z1)
    support = bank.bank
    for near, z in ((near0, z0), (near1, z1)):
        assert torch.equal(nearest_neighbors(z, support), near)
    theirs = 0.5 * (criterion(near0, p1) + criterion(near1, p0))
    ours = 0.5 * (nt_xent(nearest_neighbors(z0, support), p1, 0.3) + nt_xent(nearest_neighbors(z1, support), p0, 0.3))
    assert torch.allclose(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x, (p0, p1)) for x in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_bad_arguments_are_named():
    z0, z1, p0, p1, support = problem()
    cases = [
        ("z0 must", (z0[0], z1, p0, p1, support), {}),
        ("z0 is empty", (z0[:0], z1[:0], p0[:0], p1[:0], support), {}),
        ("z1 must", (z0, z1[:3], p0, p1, support), {}),
        ("p0 must", (z0, z1, p0[:, :2], p1, support), {}),
        ("p1 must have the dtype", (z0, z1, p0, p1.half(), support), {}),
        ("support must", (z0, z1, p0, p1, support.t()), {}),
        ("support is empty", (z0, z1, p0, p1, support[:0]), {}),
        ("temperature must not be 0", (z0, z1, p0, p1, support, 0.0), {}),
        ("reduction must", (z0, z1, p0, p1, support), {"reduction": "max"}),
        ("ids must", (z0, z1, p0, p1, support), {"ids": torch.arange(3)}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            nnclr(*args, **options)
        assert "\n" not in str(error.value)
