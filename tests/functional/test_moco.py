import copy

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import info_nce, moco, moco_v3

from .agreement import agrees_exactly, agrees_on_kernels, compiles, none, product, refuses, unit

QUEUE = torch.nn.functional.normalize(torch.randn(50, 33, generator=torch.Generator().manual_seed(1)))


def dense(query, temperature, key, queue):
    """[N] losses of the published code: cross-entropy of [positive, queue]."""
    key, queue = key.to(query.dtype), queue.to(query.dtype)
    query, key = unit(query), unit(key)
    positive = product(query.unsqueeze(1), key.unsqueeze(1)).view(-1, 1)
    s = torch.cat((positive, product(query, queue)), 1) / temperature
    return F.cross_entropy(s, torch.zeros(len(query), dtype=torch.long), reduction="none")


def loss(query, temperature, key, queue):
    return moco(query, key.to(query.dtype), queue.to(query.dtype), temperature, reduction="none")


def dense_v3(query0, query1, temperature, keys, times_2t=True):
    total = 0
    for query, key in ((query0, keys[1]), (query1, keys[0])):
        s = product(unit(query), unit(key.to(query.dtype))) / temperature
        total = total + F.cross_entropy(s, torch.arange(len(s)), reduction="none")
    return total * 2 * temperature if times_2t else total


def loss_v3(query0, query1, temperature, keys, **options):
    return moco_v3(query0, query1, *keys.to(query0.dtype), temperature, reduction="none", **options)


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_dense(temperature):
    key, queue = torch.randn(9, 33).bfloat16(), QUEUE.bfloat16()  # numbers that every dtype holds
    agrees_exactly(loss, dense, [torch.randn(9, 33)], temperature, key=key, queue=queue)
    keys = torch.randn(2, 9, 33).bfloat16()
    for times_2t in (True, False):
        queries = [torch.randn(9, 33), torch.randn(9, 33)]
        agrees_exactly(loss_v3, dense_v3, queries, temperature, keys=keys, times_2t=times_2t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature, N", [(0.2, 17), (0.07, 65), (0.01, 130)])
def test_kernels(backend, dtype, temperature, N):
    key, queue = torch.randn(N, 33).bfloat16(), QUEUE.bfloat16()
    agrees_on_kernels(loss, dense, [torch.randn(N, 33)], temperature, dtype, key=key, queue=queue)
    keys = torch.randn(2, N, 33).bfloat16()
    agrees_on_kernels(loss_v3, dense_v3, [torch.randn(N, 33), torch.randn(N, 33)], temperature, dtype, keys=keys)


def test_no_negatives(backend):
    q = torch.randn(1, 33, requires_grad=True)
    for loss in (moco(q, q + 1, QUEUE[:0]), moco_v3(q, q + 1, q + 2, q)):
        (grad,) = torch.autograd.grad(loss, q)
        assert loss == 0 and (grad == 0).all()


def test_keys_get_no_gradient_and_the_queue_may_change():
    q, k, queue = torch.randn(9, 33, requires_grad=True), torch.randn(9, 33, requires_grad=True), QUEUE.clone()
    loss = moco(q, k, queue)
    expected = torch.autograd.grad(moco(q, k, QUEUE), q)[0]
    queue.zero_()
    loss.backward()
    assert torch.equal(q.grad, expected) and k.grad is None
    assert moco(q, k, QUEUE, reduction="sum", stats=True)[1] <= 1


def test_a_key_that_learns_is_detached():
    """As by the no_grad of the published code; `info_nce` is the loss without it."""
    query, key, other = torch.randn(3, 9, 33, requires_grad=True).unbind()
    for loss, same in (
        (moco(query, key, QUEUE), info_nce(query, key, QUEUE, 0.07)),
        (moco_v3(query, query, other, key, times_2t=False), info_nce(query, key, None, 0.2)),
    ):
        assert torch.autograd.grad(loss, key, allow_unused=True)[0] is None
        assert torch.autograd.grad(same, key)[0].abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(moco(query, key, QUEUE), moco(query, key.detach(), QUEUE))
        assert torch.allclose(moco(query, key, QUEUE), info_nce(query, key, QUEUE, 0.07))


def test_gradcheck():
    q, r, k, s = (torch.randn(4, 3).double().requires_grad_() for _ in range(4))
    T = torch.tensor(0.3).double().requires_grad_()
    k, s, queue = k.detach(), s.detach(), torch.randn(6, 3).double()
    assert torch.autograd.gradcheck(lambda q, t: moco(q, k, queue, t, label_smoothing=0.2), (q, T))
    assert torch.autograd.gradcheck(lambda q, r, t: moco_v3(q, r, k, s, t, label_smoothing=0.2), (q, r, T))


def test_compiles_without_a_break(backend):
    compiles(moco, torch.randn(9, 33), torch.randn(9, 33), QUEUE)
    compiles(moco_v3, *torch.randn(4, 9, 8), temperature=torch.tensor(0.2))


def test_module(backend):
    criterion = sslkern.MoCoLoss(dim=33, size=20, temperature=0.2)
    before, q, k = copy.deepcopy(criterion.memory), torch.randn(8, 33), torch.randn(8, 33)
    expected = moco(q, k, before.queue.t(), 0.2)
    assert torch.allclose(criterion(q, k), expected)
    before.push(k)
    assert torch.equal(criterion.memory.queue, before.queue) and criterion.memory.queue_ptr == 8
    criterion.eval()(q, k)
    assert torch.equal(criterion.memory.queue, before.queue)
    assert criterion(q.half(), k.half()).isfinite()  # in the type of the queue
    assert criterion.to(torch.bfloat16)(q, k).isfinite()
    v3 = sslkern.MoCoV3Loss(0.2, times_2t=False)
    assert torch.equal(v3(q, q, k, k), moco_v3(q, q, k, k, 0.2, times_2t=False))


def test_bad_arguments_are_named():
    q, queue = torch.randn(4, 33), QUEUE
    refuses(
        moco,
        [
            ("query must", (q[0], q, queue), {}),
            ("key must", (q, q[:3], queue), {}),
            ("queue must", (q, q, queue.t()), {}),
            ("queue must", (q, q, queue[None]), {}),
            ("queue must", (q, q, queue.double()), {}),
            ("temperature must not be 0", (q, q, queue, 0.0), {}),
        ],
    )
    refuses(
        none(moco_v3),
        [
            ("query0 must", (q[0], q, q, q), {}),
            ("query1 must", (q, q[:3], q, q), {}),
            ("key0 must", (q, q, q[:3], q), {}),
            ("weights must", (q, q, q, q), {"weights": torch.ones(3)}),
        ],
    )
