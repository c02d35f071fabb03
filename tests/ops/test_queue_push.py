import pytest
import torch
import torch.nn.functional as F

from sslkern.ops import queue_push_

from . import dense


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_as_torch_does(backend, keys_dtype, dtype):
    """Every number of 16 bits; of 32, those around the numbers of 16 and halfway between."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    keys = bits.view(keys_dtype if keys_dtype != torch.float32 else torch.float16)
    if keys_dtype == torch.float32:
        near = torch.cat((keys.float(), bits.view(torch.bfloat16).float())).view(torch.int32)
        keys = (near.unsqueeze(1) + torch.tensor([0, 2**12, 2**12 + 1, 2**15, 2**15 - 1])).to(torch.int32)
        keys = keys.view(torch.float32)
    keys = keys.reshape(-1, 64)
    queue, ptr = torch.empty(keys.shape, dtype=dtype), torch.zeros(1, dtype=torch.long)
    queue_push_(queue, ptr, keys)
    expected = keys.to(dtype)
    assert torch.equal(queue.isnan(), expected.isnan())
    signs = queue.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf)
    expected = expected.nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf)
    assert torch.equal(signs, expected) and torch.equal(signs.signbit(), expected.signbit())


@pytest.mark.parametrize("keys_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalizes_and_rounds_once(backend, dtype, keys_dtype):
    for size, D, batch in ((40, 1, 5), (40, 33, 17), (9, 136, 21), (2, 5000, 3)):
        queue, ptr = torch.zeros(size, D, dtype=dtype), torch.tensor([size - 1])
        keys = (3 * torch.randn(batch, D)).to(keys_dtype)
        keys[0] = 0
        queue_push_(queue, ptr, keys, normalize=True)
        assert ptr.item() == (size - 1 + batch) % size
        last = keys[-size:]
        rows = (size - 1 + torch.arange(batch)[-size:]) % size
        dense.within(queue[rows], F.normalize(last.double(), dim=1), F.normalize(last.float(), dim=1).to(dtype))
        untouched = torch.ones(size, dtype=torch.bool).index_fill(0, rows, False)
        assert (queue[untouched] == 0).all()


def test_the_longest_rows_and_a_wild_pointer(backend):
    """Rows that no block holds at once; a pointer outside the ring, which the write never leaves."""
    queue, keys = torch.zeros(5, 9001), torch.randn(3, 9001)
    for start in (0, 4, 5, 8, -1, -12, 2**40 + 3, 2**63 - 1, -(2**63)):
        ptr = torch.tensor([start])
        queue_push_(queue, ptr, keys, normalize=True)
        if abs(start) < 2**39 or backend.startswith(("reference", "cpu")):  # those of a GPU keep tickets in the pointer
            rows = (start % 5 + torch.arange(3)) % 5
            assert torch.allclose(queue[rows], F.normalize(keys, dim=1), atol=1e-7) and ptr.item() == (start + 3) % 5


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
    args = torch.zeros(4, 2), torch.zeros(1, dtype=torch.long), torch.ones(3, 2), True, backend.partition("-")[0]
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
        ("normalize must", (queue, ptr, keys, 1)),
    ]
    for message, args in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            queue_push_(*args)


def test_keys_that_are_rows_of_the_queue(backend):
    """They are written as they were, also where they are written over before their turn."""
    for normalize in (False, True):
        queue, ptr = torch.randn(40, 8), torch.tensor([20])
        for keys in (slice(16, 32), slice(0, None), slice(5, None)):
            ours, plain, at = queue.clone(), queue.clone(), ptr.clone()
            queue_push_(ours, ptr.clone(), ours[keys], normalize)
            queue_push_(plain, at, queue[keys].clone(), normalize)
            assert torch.equal(ours, plain)


def test_keys_that_are_rows_of_the_queue_by_another_name():
    """The same memory as another storage, as from NumPy."""
    queue, ptr = torch.randn(40, 8), torch.tensor([20])
    ours, plain = queue.clone(), queue.clone()
    queue_push_(ours, ptr.clone(), torch.from_dlpack(ours)[16:32])
    queue_push_(plain, ptr.clone(), queue[16:32].clone())
    assert torch.equal(ours, plain)


def test_types_that_have_no_kernel():
    queue, ptr, keys = torch.zeros(4, 2), torch.zeros(1, dtype=torch.long), torch.ones(3, 2)
    for args in ((queue.to(torch.float8_e4m3fn), ptr, keys), (queue, ptr, keys.to(torch.float8_e5m2))):
        with pytest.raises((TypeError, ValueError), match="must be .*(fp64|floating point, not torch.float8)"):
            queue_push_(*args)
