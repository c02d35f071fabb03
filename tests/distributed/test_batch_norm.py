"""Batch normalisation over ranks, of the trainers."""

import pytest
import torch
import torch.distributed as dist
from ssltrain.ranks import SyncBatchNorm
from torch import nn


def normalised(group, kind, x, upstream):
    """Output, gradients and statistics of this rank's rows of x, uneven, of a batch normalisation of all."""
    torch.manual_seed(0)
    norm = kind(x.shape[1], dtype=x.dtype)
    nn.init.normal_(norm.weight)
    norm = SyncBatchNorm.of(norm)
    norm.group = group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = slice(rank**2 * len(x) // size**2, (rank + 1) ** 2 * len(x) // size**2)
    own = x[rows].clone().requires_grad_()
    out = norm(own)
    out.backward(upstream[rows])
    return out.detach(), own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


@pytest.mark.parametrize("shape", [(31, 7), (31, 5, 3), (31, 5, 2, 3), (31, 5, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_batch_normalisation_is_that_of_the_whole_batch(pool, shape, size):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    draw = torch.Generator().manual_seed(0)
    x, upstream = 3 + torch.randn(2, *shape, dtype=torch.float64, generator=draw)
    torch.manual_seed(0)
    norm = kind(shape[1], dtype=x.dtype)
    nn.init.normal_(norm.weight)
    whole = x.clone().requires_grad_()
    out = norm(whole)
    out.backward(upstream)
    rows = list(zip(*pool.run(normalised, kind, x, upstream, ranks=size), strict=True))
    assert torch.allclose(torch.cat(rows[0]), out, rtol=0, atol=1e-12)
    assert torch.allclose(torch.cat(rows[1]), whole.grad, rtol=0, atol=1e-12)
    assert torch.allclose(sum(rows[2]), norm.weight.grad, rtol=1e-12) and torch.allclose(sum(rows[3]), norm.bias.grad)
    for own, statistic in zip(rows[4:], (norm.running_mean, norm.running_var), strict=True):
        assert all(torch.equal(own[0], other) and torch.allclose(other, statistic, rtol=1e-12) for other in own)
