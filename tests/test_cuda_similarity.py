"""What the kernels of the similarity family for Hopper have around them on the host, with the emulated driver."""

import struct

import pytest
import torch

from sslkern.backends.cuda import launch
from sslkern.backends.cuda.pairs import EXTENT, Pairs
from sslkern.backends.problem import Problem

from .conftest import emulate_cuda


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    return emulate_cuda(monkeypatch)


def extents(ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack((part.min(), part.max())) for part in ids.split(EXTENT)])


@pytest.mark.parametrize("N, M", [(1, 1), (64, 65), (130, 700), (257, 3)])
def test_extents_of_ids(N, M):
    q, k = torch.randn(N, 16).bfloat16(), torch.randn(M, 16).bfloat16()
    q_ids, k_ids = (torch.randint(-(2**62), 2**62, (size,)) for size in (N, M))
    pairs = Pairs.of(Problem(q, k, q_ids=q_ids, k_ids=k_ids))
    assert torch.equal(pairs.q_extents, extents(q_ids)) and torch.equal(pairs.k_extents, extents(k_ids))
    pairs = Pairs.of(Problem(q, q_ids=q_ids[:1].expand(N)))
    assert torch.equal(pairs.q_extents, extents(q_ids[:1].expand(N))) and pairs.k_extents is pairs.q_extents


def test_words_of_a_problem():
    q, ids, bias = torch.randn(70, 8).half(), torch.arange(70), torch.randn(70)
    pairs = Pairs.of(Problem(q, q.flip(0), None, 3.0, ids, ids, True, bias))
    packed = struct.pack(*launch.layout_of("problem"), *pairs.words())
    assert struct.unpack_from("6Qf4i2?", packed) == (
        *(x.data_ptr() for x in (ids, ids, pairs.q_extents, pairs.k_extents, bias)), 0, 3.0, 70, 70, 8, 0, False, True
    )  # fmt: skip
    assert Pairs.of(Problem(q)).words() == (*[0] * 6, 1.0, 70, 70, 8, 0, True, False)


@pytest.mark.parametrize("itself", [False, True])
def test_a_part_of_a_problem(itself):
    q, k, ids = torch.randn(200, 9).half(), None if itself else torch.randn(300, 9).half(), torch.arange(300)
    bias = torch.randn(200 if itself else 300)
    pairs = Pairs.of(Problem(q, k, q_ids=ids[:200], k_ids=None if itself else ids, k_bias=bias))
    part = pairs.cut(64, 192, 64)
    assert part.sizes == (128, 136 if itself else 236, 9) and torch.equal(part.q, q[64:192])
    assert torch.equal(part.k, (q if itself else k)[64:]) and torch.equal(part.bias, bias[64:])
    assert torch.equal(part.q_extents, extents(ids[64:192]))
    assert torch.equal(part.k_extents, extents(ids[64 : 200 if itself else 300]))
    assert torch.equal(pairs.cut(128, 200, 128).q_extents, extents(ids[128:200]))
    assert (part.diagonal, pairs.cut(128, 200).diagonal) == (0, 128)
