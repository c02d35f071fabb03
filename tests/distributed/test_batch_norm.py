"""Batch normalisation over ranks, of the trainers."""

import pytest
import torch
import torch.distributed as dist
from ssltrain import UsageError
from ssltrain.ranks import SplitBatchNorm, SyncBatchNorm, normalise
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


def split(group, kind, x, upstream, parts, options):
    """The same of a batch that is normalised in parts, by all processes or by this one."""
    norm = SplitBatchNorm.of(kind(x.shape[1], dtype=x.dtype, **options), parts=parts)
    each = len(x) // group.size() if group else len(x)
    rows = slice(group.rank() * each, (group.rank() + 1) * each) if group else slice(None)
    outs = []
    for _ in range(2):
        own = x[rows].clone().requires_grad_()
        outs.append(norm(own))
    outs[-1].backward(upstream[rows])
    return outs[-1].detach(), own.grad, norm.state_dict(), norm.eval()(x[rows]).detach()


@pytest.mark.parametrize("options", [{}, dict(momentum=None, affine=False), dict(track_running_stats=False)], ids=str)
@pytest.mark.parametrize("shape", [(48, 7), (48, 5, 2, 3)], ids=str)
def test_parts_are_normalised_each_by_itself_wherever_they_are(pool, shape, options):
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    draw = torch.Generator().manual_seed(0)
    x, upstream = 3 + torch.randn(2, *shape, dtype=torch.float64, generator=draw)
    whole = x.clone().requires_grad_()
    norms = [kind(shape[1], dtype=x.dtype, **options) for _ in range(16)]
    for _ in range(2):
        out = torch.cat([norm(part) for norm, part in zip(norms, whole.chunk(16), strict=True)])
    out.backward(upstream)
    ends = [norm.state_dict() for norm in norms]
    means = {name: torch.stack([end[name].double() for end in ends]).mean(0) for name in ends[0]}
    ranks = pool.run(split, kind, x, upstream, 16, options, ranks=8)
    for outs, grads, states, evaluated in (zip(*ranks, strict=True), zip(split(None, kind, x, upstream, 16, options))):
        assert torch.allclose(torch.cat(outs), out, rtol=0, atol=1e-12)
        assert torch.allclose(torch.cat(grads), whole.grad, rtol=0, atol=1e-12)
        for state in states:
            assert state.keys() == means.keys() and all(torch.equal(state[name], states[0][name]) for name in state)
            assert all(torch.allclose(state[name].double(), means[name], rtol=0, atol=1e-12) for name in state)
        if norms[0].track_running_stats:
            norm = kind(shape[1], dtype=x.dtype, **options).eval()
            norm.load_state_dict(states[0])
            assert torch.allclose(torch.cat(evaluated), norm(x), rtol=0, atol=1e-12)


class Another(nn.BatchNorm1d):
    """Of a library, with a forward of its own."""


def test_every_batch_normalisation_is_replaced_or_refused():
    encoder = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    names = list(encoder.state_dict())
    normalise(encoder, torch.device("cpu"), 2)
    assert type(encoder[1][0]) is SplitBatchNorm and list(encoder.state_dict()) == names
    normalise(encoder.append(nn.BatchNorm1d(3)), torch.device("cpu"), None)  # of one process, as it is
    assert type(encoder[2]) is nn.BatchNorm1d
    with pytest.raises(UsageError, match="^--encoder: Another has no form .* or leave --shuffle-bn out.$"):
        normalise(encoder.append(Another(3)), torch.device("cpu"), 2)
