import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import cmc, cmc_pairs, nce

from . import agreement
from .agreement import agrees_exactly, agrees_on_kernels, product, refuses, unit

M, LOG_Z = 50, 4.5
FORMS = ["nce", "softmax"]


def problem(N=9, D=6, K=20, sign=1):
    query = torch.randn(N, D).double()
    bank = F.normalize(torch.randn(M, D).double(), dim=1)
    index = torch.randint(M, (N, 1 + K))
    return query, bank, index


def textbook(query, temperature, *, bank, index, form="nce", log_z=LOG_Z):
    """[N], with all scores stored."""
    logits = product(unit(query), bank.to(query.dtype)).gather(1, index) / temperature
    if form == "softmax":
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long), reduction="none")
    log_p, log_noise = logits - log_z, math.log((index.shape[1] - 1) / M)
    h = log_p - torch.logaddexp(log_p, torch.full_like(log_p, log_noise))
    rest = log_noise - torch.logaddexp(log_p, torch.full_like(log_p, log_noise))
    return -h[:, 0] - rest[:, 1:].sum(1)


def ours(form, bank, index):
    def loss(query, temperature, reduction="none"):
        log_z = LOG_Z if form == "nce" else None
        return nce(query, bank.to(query.dtype), index, temperature, form=form, log_z=log_z, reduction=reduction)

    return loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [0.05, 0.5])
def test_equals_the_textbook(form, T):
    query, bank, index = problem()
    agrees_exactly(ours(form, bank, index), functools.partial(textbook, bank=bank, index=index, form=form), [query], T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bound(backend, form, dtype):
    query, bank, index = problem(N=65, D=48, K=33)
    bank = bank.to(dtype).double()
    dense = functools.partial(textbook, bank=bank, index=index, form=form)
    agrees_on_kernels(ours(form, bank, index), dense, [query], 0.1, dtype, scores=40)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_bank(backend, form):
    query, bank, index = (x.float() if x.is_floating_point() else x for x in problem())
    query, bank, T = query.requires_grad_(), bank.requires_grad_(), torch.tensor(0.3, requires_grad=True)
    got = torch.autograd.grad(ours(form, bank, index)(query, T).sum(), (query, bank, T))
    want = torch.autograd.grad(textbook(query, T, bank=bank, index=index, form=form).sum(), (query, bank, T))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    wide = [x.detach().double().requires_grad_() for x in (query, bank, T)]
    with sslkern.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda q, b, T: ours(form, b, index)(q, T), wide)
        assert torch.autograd.gradcheck(lambda q, T: ours(form, wide[1].detach(), index)(q, T), (wide[0], wide[2]))


@pytest.mark.parametrize("form", FORMS)
def test_the_bank_may_change_before_the_backward(backend, form):
    query, bank, index = problem()
    query, memory = query.float().requires_grad_(), bank.float()
    want = torch.autograd.grad(ours(form, memory.clone(), index)(query, 0.2).mean(), query)[0]
    loss = ours(form, memory, index)(query, 0.2).mean()
    sslkern.ops.bank_update_(memory, index[:, 0], query)
    assert torch.equal(torch.autograd.grad(loss, query)[0], want)


def test_a_tiny_loss_keeps_its_digits(backend):
    """With a true loss of 1e-7, cross-entropy in fp32 loses most of it."""
    T, K, D = 0.05, 50, 8
    bank = torch.zeros(1 + K, D)
    bank[0, 0], bank[1:, 0] = 1.0, 1 - T * (math.log(K) - math.log(1e-7))
    query, index = torch.eye(1, D), torch.arange(1 + K).unsqueeze(0)
    exact = F.cross_entropy((bank.double() @ query[0].double() / T).unsqueeze(0), torch.zeros(1, dtype=torch.long))
    dense = F.cross_entropy((bank @ query[0] / T).unsqueeze(0), torch.zeros(1, dtype=torch.long))
    got = nce(query, bank, index, T, form="softmax")
    assert exact < 2e-7 and abs(got / exact - 1) < 0.01 < abs(dense / exact - 1)


def test_huge_scores_have_weights_of_at_most_one(backend):
    """Their log-sum-exp, rounded, may lie below them by more than an exponential holds."""
    query, bank = torch.eye(2, 8).requires_grad_(), 1e20 * (1 + torch.rand(6, 8) / 16)
    index = torch.tensor([[0, 1, 1, 2], [3, 4, 4, 5]])
    loss = nce(query, bank, index, 0.3, form="softmax", normalize=False, reduction="sum")
    (grad,) = torch.autograd.grad(loss, query)
    assert grad.isfinite().all() and (grad.abs() <= 4 * 1.1e20 / 0.3).all()


def test_z_is_estimated_from_the_batch(backend):
    query, bank, index = (x.float() if x.is_floating_point() else x for x in problem())
    scores = (unit(query) @ bank.T).gather(1, index) / 0.2
    log_z = math.log(scores.exp().mean() * M)
    assert torch.allclose(nce(query, bank, index, 0.2), nce(query, bank, index, 0.2, log_z=log_z))


def test_share_weights_reductions_and_no_negatives(backend):
    query, bank, index = (x.float() if x.is_floating_point() else x for x in problem())
    query.requires_grad_()
    scores = (unit(query) @ bank.T).gather(1, index)
    losses, share = nce(query, bank, index, log_z=LOG_Z, reduction="none", stats=True)
    assert torch.allclose(share, (scores[:, 1:] < scores[:, :1]).all(1).float().mean())
    weights = torch.rand(9)
    weighted = nce(query, bank, index, log_z=LOG_Z, weights=weights)
    assert torch.allclose(weighted, (weights * losses).sum() / weights.sum())
    assert torch.allclose(nce(query, bank, index, log_z=LOG_Z, reduction="sum"), losses.sum())
    for form in FORMS:
        loss, share = nce(query, bank, index[:, :1], form=form, stats=True)
        assert loss == 0 and share == 1 and (torch.autograd.grad(loss, query)[0] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_break(backend, form):
    query, bank, index = (x.float() if x.is_floating_point() else x for x in problem())
    agreement.compiles(lambda q: ours(form, bank, index)(q, 0.2), query)
    agreement.compiles(lambda q, b: ours(form, b, index)(q, 0.2), query, bank)


def test_transforms():
    query, bank, index = problem()
    loss = lambda q: ours("nce", bank, index)(q, 0.2).sum()  # noqa: E731
    want = torch.autograd.grad(loss(query.requires_grad_()), query)[0]
    assert torch.allclose(torch.func.grad(loss)(query.detach()), want)
    (once,) = torch.autograd.grad(loss(query), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        once.sum().backward()


@pytest.mark.parametrize("graph", ["core", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_cmc(backend, graph, form):
    views = [torch.randn(9, 6, requires_grad=True) for _ in range(3)]
    banks, index = F.normalize(torch.randn(3, M, 6), dim=2), torch.randint(M, (9, 21))
    pairs = cmc_pairs(3, graph)
    core = [(0, 1), (1, 0), (0, 2), (2, 0)]
    assert pairs == (core if graph == "core" else [*core, (1, 2), (2, 1)])
    log_z = torch.linspace(4, 5, len(pairs)) if form == "nce" else None
    got = cmc(views, banks, index, 0.2, graph=graph, form=form, log_z=log_z)
    want = sum(
        textbook(views[a], 0.2, bank=banks[b], index=index, form=form, log_z=0 if log_z is None else log_z[p])
        for p, (a, b) in enumerate(pairs)
    ).mean()
    assert torch.allclose(got, want, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, views) for x in (got, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_modules_keep_their_memory(backend):
    query, sample = torch.randn(9, 6, requires_grad=True), torch.randint(M, (9,))
    criterion = sslkern.NCELoss(M, 6, negatives=20, temperature=0.2, stats=True)
    before, index = criterion.memory.bank.clone(), criterion.memory.sample(sample, 20)
    loss, _ = criterion(query, sample, index=index)
    assert torch.allclose(loss, nce(query, before, index, 0.2))
    loss.backward()  # after the update
    expected = before.clone()
    sslkern.ops.bank_update_(expected, sample, F.normalize(query, dim=1))
    assert torch.allclose(criterion.memory.bank, expected)
    log_z = criterion.log_z.item()
    criterion(query + 1, sample, index=index)
    assert criterion.log_z.item() == log_z  # the first estimate is kept
    assert criterion.state_dict().keys() == {"log_z", "memory.bank"}
    other = sslkern.NCELoss(M, 6, negatives=20, temperature=0.2, stats=True).eval()
    other.load_state_dict(copy.deepcopy(criterion.state_dict()))
    criterion.eval()
    assert torch.equal(other(query, sample, index=index)[0], criterion(query, sample, index=index)[0])
    assert torch.equal(other.memory.bank, criterion.memory.bank)  # evaluation leaves it alone
    multi = sslkern.CMCLoss(3, M, 6, negatives=20, graph="core")
    multi((query, query + 1, query - 1), sample).backward()
    assert multi.log_z.isfinite().all() and multi.log_z.shape == (4,)
    again = copy.deepcopy(multi)
    assert torch.equal(again((query, query, query), sample, index=index), multi((query,) * 3, sample, index=index))


def test_bad_arguments_are_named():
    query, bank, index = problem()
    cases = [
        ("query must", (query[0], bank, index), {}),
        ("query is empty", (query[:0], bank, index[:0]), {}),
        ("bank must", (query, bank[:, :2], index), {}),
        ("bank is empty", (query, bank[:0], index), {}),
        ("index must", (query, bank, index[:3]), {}),
        ("index must", (query, bank, index[:, :0]), {}),
        ("index must be int64", (query, bank, index.int()), {}),
        ("form must", (query, bank, index), {"form": "max"}),
        ("log_z belongs", (query, bank, index), {"form": "softmax", "log_z": 1.0}),
        ("log_z must", (query, bank, index), {"log_z": math.inf}),
        ("temperature must not be 0", (query, bank, index, 0.0), {}),
        ("reduction must", (query, bank, index), {"reduction": "max"}),
        ("weights must", (query, bank, index), {"weights": torch.ones(2)}),
    ]
    refuses(nce, cases)
    with pytest.raises(IndexError, match="index must be 0 ... 49"):
        nce(query, bank, index + M)
    refuses(
        cmc,
        [
            ("views must", ([query], [bank], index), {}),
            ("views must", (None, [bank] * 2, index), {}),
            (r"views\[0\] must", ([None, None], [bank] * 2, index), {}),
            ("banks must", ([query] * 2, None, index), {}),
            (r"banks\[0\] must", ([query] * 2, [None, None], index), {}),
            (r"banks\[1\] must", ([query] * 2, [bank, bank[:3]], index), {}),
            ("banks must", ([query] * 2, [bank], index), {}),
            (r"views\[1\] must", ([query, query[:2]], [bank] * 2, index), {}),
            ("graph must", ([query] * 2, [bank] * 2, index), {"graph": "ring"}),
            ("log_z must", ([query] * 2, [bank] * 2, index), {"log_z": torch.ones(3)}),
        ],
    )
    one, two, sample = sslkern.NCELoss(M, 6, 3), sslkern.CMCLoss(2, M, 6, 3), index[:, 0]
    for bad in (None, "x", [None], query[0]):
        refuses(one, [("query must", (bad, sample), {}), ("sample must", (query, bad), {})])
        refuses(two, [("views", (bad, sample), {}), ("sample must", ([query] * 2, bad), {})])
    refuses(two, [("views must be 2", ([query] * 3, sample), {})])
    for make in (
        lambda: sslkern.NCELoss(0, 6),
        lambda: sslkern.NCELoss(9, 6, negatives=-1),
        lambda: sslkern.NCELoss(9, 6, momentum=2),
        lambda: sslkern.NCELoss(9, 6, form="x"),
        lambda: sslkern.CMCLoss(1, 9, 6),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
