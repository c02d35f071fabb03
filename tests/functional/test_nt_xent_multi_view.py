import math

import pytest
import torch

import sslkern
from sslkern.functional import nt_xent, nt_xent_multi_view, sup_con

from .agreement import agrees_exactly, agrees_on_kernels, compiles, none, product, refuses, unit


def dense(views, temperature, positives="separate", ids=None):
    """[V, N] losses: cross-entropy against each positive, the others masked ("separate") or not ("joint")."""
    V, N, _ = views.shape
    z, ids = unit(views.flatten(0, 1)), torch.arange(N) if ids is None else ids
    s, sample = product(z, z) / temperature, torch.arange(V * N) % N
    own = sample[:, None] == sample
    others = (ids.repeat(V)[:, None] == ids.repeat(V)) & ~own
    itself = torch.eye(V * N, dtype=torch.bool)
    losses = 0
    for step in range(1, V):  # the positive `step` views further
        positive = torch.arange(V * N).add(step * N) % (V * N)
        chosen = torch.zeros_like(own).scatter(1, positive[:, None], True)
        left_out = others | itself | (own & ~chosen if positives == "separate" else itself)
        losses = losses + torch.nn.functional.cross_entropy(
            s.masked_fill(left_out, -math.inf), positive, reduction="none"
        )
    return losses.view(V, N) / (V - 1)


@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("positives", ["separate", "joint"])
def test_dense(positives, temperature):
    for V, ids in ((2, None), (4, None), (3, torch.arange(7) // 2)):
        options = dict(positives=positives, ids=ids)
        agrees_exactly(none(nt_xent_multi_view), dense, [torch.randn(V, 7, 5)], temperature, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, V, N, D", [(0.2, 3, 17, 33), (0.07, 4, 20, 64), (0.01, 3, 50, 64)])
@pytest.mark.parametrize("positives", ["separate", "joint"])
def test_kernels(backend, positives, temperature, V, N, D, dtype):
    views = torch.randn(1, N, D) + torch.randn(V, N, D)
    agrees_on_kernels(none(nt_xent_multi_view), dense, [views], temperature, dtype, positives=positives)


@pytest.mark.parametrize("positives", ["separate", "joint"])
def test_two_views_are_nt_xent(backend, positives):
    z0, z1, w = torch.randn(9, 4), torch.randn(9, 4), torch.rand(9)
    multi = nt_xent_multi_view([z0, z1], 0.2, positives=positives, reduction="none")
    assert torch.allclose(multi.view(-1), nt_xent(z0, z1, 0.2, reduction="none"), atol=1e-5)
    weighted = nt_xent_multi_view([z0, z1], 0.2, positives=positives, weights=w)
    assert torch.allclose(weighted, nt_xent(z0, z1, 0.2, weights=w))


def test_joint_is_sup_con(backend):
    views = torch.randn(3, 9, 4)
    joint = nt_xent_multi_view(views, 0.2, positives="joint")
    assert torch.allclose(joint, sup_con(views.transpose(0, 1), temperature=0.2))


def test_rows_without_negatives(backend):
    views = torch.randn(3, 5, 4, requires_grad=True)
    same = nt_xent_multi_view(views, ids=torch.zeros(5, dtype=torch.long))
    pair = nt_xent_multi_view(views[:2, :1], positives="joint")
    for loss in (same, nt_xent_multi_view(views[:, :1]), pair):
        (grad,) = torch.autograd.grad(loss, views)
        assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("positives", ["separate", "joint"])
def test_gradcheck(positives):
    views, T = torch.randn(3, 3, 2).double().requires_grad_(), torch.tensor(0.4).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, t: nt_xent_multi_view(v, t, positives=positives, reduction="none"), (views, T)
    )


@pytest.mark.parametrize("positives", ["separate", "joint"])
def test_compiles_without_a_break(backend, positives):
    compiles(nt_xent_multi_view, torch.randn(3, 6, 8), positives=positives)


def test_module():
    views = torch.randn(3, 6, 8)
    criterion = sslkern.NTXentMultiViewLoss(0.2, positives="joint")
    assert torch.equal(criterion(views), nt_xent_multi_view(views, 0.2, positives="joint"))
    assert torch.equal(criterion(list(views)), criterion(views))


def test_bad_arguments_are_named():
    z = torch.randn(4, 3)
    refuses(
        nt_xent_multi_view,
        [
            ("views must", (z,), {}),
            ("views must", (z[None],), {}),
            ("views must", ([z],), {}),
            (r"views\[1\] must", ([z, z[:3]],), {}),
            (r"views\[0\] must", ([z[0], z[0]],), {}),
            (r"views\[0\] is empty", ([z[:0], z[:0]],), {}),
            ("positives must", ([z, z],), {"positives": "all"}),
            ("ids must", ([z, z],), {"ids": torch.arange(3)}),
            ("weights must", ([z, z],), {"weights": torch.ones(8)}),
        ],
    )
