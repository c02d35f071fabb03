import pytest
import torch

from sslkern.ops import queue_push_


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("keys_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_writing_one_by_one(backend, dtype, keys_dtype, strided):
    size, D = 7, 5
    queue, ptr = (
        torch.zeros(D, size, dtype=dtype).t() if strided else torch.zeros(size, D, dtype=dtype),
        torch.tensor([3]),
    )
    expected, at = queue.clone(), 3
    for batch in (2, 0, 7, 5, 1, 30):  # under, over and equal to the size; wrapping
        keys = torch.randn(batch, D, dtype=keys_dtype)
        queue_push_(queue, ptr, keys)
        for key in keys:
            expected[at % size] = key.to(dtype)
            at += 1
        assert torch.equal(queue, expected) and ptr.item() == at % size


def test_autograd_sees_the_write(backend):
    queue, ptr, keys = torch.zeros(4, 2), torch.zeros(1, dtype=torch.long), torch.ones(3, 2, requires_grad=True)
    w = torch.ones(2, requires_grad=True)
    out = (queue @ w).sum()
    before = queue._version, ptr._version
    queue_push_(queue, ptr, keys)
    assert not queue.requires_grad and queue._version > before[0] and ptr._version > before[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_opcheck(backend):
    args = torch.zeros(4, 2), torch.zeros(1, dtype=torch.long), torch.ones(3, 2), backend.partition("-")[0]
    torch.library.opcheck(torch.ops.sslkern.queue_push_.default, args)


def test_bad_arguments_are_named():
    queue, ptr, keys = torch.zeros(4, 2), torch.zeros(1, dtype=torch.long), torch.ones(3, 2)
    cases = [
        ("queue must", (queue[:0], ptr, keys)),
        ("queue must", (queue.long(), ptr, keys)),
        ("queue gets no gradient", (queue.clone().requires_grad_(), ptr, keys)),
        ("ptr must", (queue, ptr[0], keys)),
        ("ptr must", (queue, ptr.int(), keys)),
        ("keys must", (queue, ptr, keys[:, :1])),
        ("keys must", (queue, ptr, keys.long())),
        ("keys is on meta", (queue, ptr, keys.to("meta"))),
    ]
    for message, args in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            queue_push_(*args)
