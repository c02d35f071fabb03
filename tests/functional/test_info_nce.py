import math

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import info_nce


def dense(query, key, negatives=None, temperature=0.1, *, in_batch=None, ids=None, negative_ids=None):
    """[N] losses query -> key as cross-entropy over [positive, other keys, negatives]."""
    N, query, key = len(query), F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    in_batch = negatives is None if in_batch is None else in_batch
    logits = [(query * key).sum(1, keepdim=True) / temperature]
    if in_batch:
        row_ids = torch.arange(N) if ids is None else ids
        logits.append((query @ key.T / temperature).masked_fill(row_ids[:, None] == row_ids, -math.inf))
    if negatives is not None:
        each = "nmd" if negatives.ndim == 3 else "md"
        s = torch.einsum(f"nd,{each}->nm", query, F.normalize(negatives, dim=-1)) / temperature
        if negative_ids is not None:
            s = s.masked_fill(ids[:, None] == negative_ids, -math.inf)
        logits.append(s)
    return F.cross_entropy(torch.cat(logits, 1), torch.zeros(N, dtype=torch.long), reduction="none")


IDS = torch.arange(10) // 2
CASES = {
    "in batch": dict(),
    "in batch, ids": dict(ids=IDS),
    "shared": dict(negatives=(21, 6)),
    "shared, ids": dict(negatives=(21, 6), ids=IDS, negative_ids=torch.arange(21) // 3),
    "own": dict(negatives=(10, 7, 6)),
    "own, ids": dict(negatives=(10, 7, 6), ids=IDS, negative_ids=torch.arange(70).view(10, 7) % 6),
    "both": dict(negatives=(21, 6), in_batch=True),
    "both, own, ids": dict(negatives=(10, 7, 6), in_batch=True, ids=IDS),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_value_and_gradient(backend, case, frozen):
    options = dict(CASES[case])
    tensors = [torch.randn(10, 6, requires_grad=True), torch.randn(10, 6, requires_grad=not frozen)]
    if "negatives" in options:
        tensors.append(torch.randn(options.pop("negatives"), requires_grad=not frozen))
        options["negatives"] = tensors[-1]
    T = torch.tensor(0.2, requires_grad=True)
    losses = info_nce(*tensors[:2], temperature=T, reduction="none", **options)
    expected = dense(*tensors[:2], temperature=T, **options)
    assert losses.shape == (10,) and torch.allclose(losses, expected, rtol=1e-4, atol=1e-5)
    wanted = [x for x in (*tensors, T) if x.requires_grad]
    for got, want in zip(
        torch.autograd.grad(losses.mean(), wanted), torch.autograd.grad(expected.mean(), wanted), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ids", [None, IDS])
def test_two_way(backend, ids):
    a, b = torch.randn(10, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    scale = torch.tensor(5.0, requires_grad=True)
    loss = info_nce(a, b, two_way=True, logit_scale=scale, ids=ids)
    expected = (dense(a, b, temperature=1 / scale, ids=ids) + dense(b, a, temperature=1 / scale, ids=ids)).mean() / 2
    assert torch.allclose(loss, expected)
    for got, want in zip(
        torch.autograd.grad(loss, (a, b, scale)), torch.autograd.grad(expected, (a, b, scale)), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_no_negatives_left(backend):
    a, b = torch.randn(10, 6, requires_grad=True), torch.randn(10, 6)
    same = torch.zeros(10, dtype=torch.long)
    for options in (
        dict(ids=same),
        dict(ids=same, two_way=True),
        dict(negatives=torch.randn(0, 6)),
        dict(negatives=torch.randn(10, 0, 6), in_batch=True, ids=same),
        dict(negatives=torch.randn(3, 6), ids=same, negative_ids=same[:3], in_batch=True),
    ):
        loss, share = info_nce(a, b, stats=True, **options)
        (grad,) = torch.autograd.grad(loss, a)
        assert loss == 0 and share == 1 and (grad == 0).all(), options


def test_share_of_rows_that_win(backend):
    a = F.normalize(torch.randn(40, 8), dim=1)
    b, queue = F.normalize(a + 0.6 * torch.randn(40, 8), dim=1), F.normalize(torch.randn(50, 8), dim=1)
    here, labels = (a @ b.T).argmax(1), torch.arange(40)
    back = (b @ a.T).argmax(1)
    assert torch.allclose(info_nce(a, b, stats=True)[1], (here == labels).float().mean())
    both = ((here == labels).float().mean() + (back == labels).float().mean()) / 2
    assert torch.allclose(info_nce(a, b, two_way=True, stats=True)[1], both)
    expected = (torch.cat(((a * b).sum(1, keepdim=True), a @ queue.T), 1).argmax(1) == 0).float().mean()
    assert torch.allclose(info_nce(a, b, queue, stats=True)[1], expected)


def test_gradcheck():
    a, b, n = (torch.randn(4, 3).double().requires_grad_() for _ in range(3))
    T = torch.tensor(0.3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, t: info_nce(a, b, None, t, two_way=True), (a, b, T))
    assert torch.autograd.gradcheck(lambda a, b, n, t: info_nce(a, b, n, t, in_batch=True), (a, b, n, T))


def test_compiles_without_a_break(backend):
    torch.compiler.reset()
    a, b, queue = torch.randn(9, 8, requires_grad=True), torch.randn(9, 8), torch.randn(30, 8)
    compiled = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    for options in (dict(two_way=True), dict(negatives=queue), dict(negatives=queue, in_batch=True, stats=True)):
        got, want = compiled(a, b, **options), info_nce(a, b, **options)
        got, want = (x[0] if isinstance(x, tuple) else x for x in (got, want))
        assert torch.allclose(got, want)
        assert torch.allclose(*(torch.autograd.grad(x, a)[0] for x in (got, want)), atol=1e-6)


def test_module():
    a, b, queue = torch.randn(5, 3), torch.randn(5, 3), torch.randn(7, 3)
    assert torch.equal(sslkern.InfoNCELoss(0.2)(a, b, queue), info_nce(a, b, queue, 0.2))
    criterion = sslkern.InfoNCELoss(two_way=True)
    assert torch.equal(criterion(a, b, logit_scale=3.0), info_nce(a, b, two_way=True, logit_scale=3.0))


def test_bad_arguments_are_named():
    a, b, queue, ids = torch.randn(4, 3), torch.randn(4, 3), torch.randn(7, 3), torch.arange(4)
    cases = [
        ("query must", (a[0], b), {}),
        ("query is empty", (a[:0], b[:0]), {}),
        ("key must", (a, b[:3]), {}),
        ("negatives must", (a, b, queue[:, :2]), {}),
        ("negatives must", (a, b, queue.t()), {}),  # (D, K) is never guessed
        ("negatives must", (a, b, queue[None]), {}),
        ("negatives must", (a, b, queue.half()), {}),
        ("two_way=True", (a, b, queue), {"two_way": True}),
        ("in_batch=False", (a, b), {"in_batch": False}),
        ("negative_ids needs", (a, b, queue), {"negative_ids": torch.arange(7)}),
        ("negative_ids needs", (a, b), {"ids": ids, "negative_ids": torch.arange(7)}),
        ("negative_ids must", (a, b, queue), {"ids": ids, "negative_ids": torch.arange(6)}),
        ("temperature must not be 0", (a, b, queue, 0.0), {}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            info_nce(*args, **options)
        assert "\n" not in str(error.value)
