"""Rows that are encoded by ranks that are drawn: whose they are, whose statistics they get, and what travels."""

import doctest

import pytest
import torch
from torch import nn

import sslkern
from sslkern.distributed import preflight, recorded, shuffled
from sslkern.distributed.shuffled import order_of, route

from .agreement import COUNTS
from .combinations import combinations

W, UNEVEN = 3, (7, 2, 4)


def batch(counts, *shape, dtype=torch.float32):
    """Rows of all ranks, and which are whose."""
    x = torch.randn(sum(counts), *shape, generator=torch.Generator().manual_seed(0)).mul(40).abs().to(dtype)
    ends = torch.tensor(counts).cumsum(0).tolist()
    return x, [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def by_row(x):
    """An encoder that sees each row by itself, to features of another shape and type."""
    return (x.flatten(1)[:, :3].double() * 3 + 1).half()


def encoded(group, x, rows, seed):
    own = x[rows[group.rank()]]
    features = shuffled(by_row, own, seed, group)
    return torch.equal(features, by_row(own)), features.dtype


@combinations(
    ranks=[1, 2, 3, 5, 8],
    rows=list(COUNTS),
    dtype=[torch.float64, torch.bfloat16, torch.uint8],
    shape=[(4,), (3, 2, 2)],
)
def test_features_come_home_to_their_rows(pool, ranks, rows, dtype, shape):
    for exact, kind in pool.run(encoded, *batch(COUNTS[rows][ranks], *shape, dtype=dtype), 5, ranks=ranks):
        assert exact and kind == torch.float16


def test_in_one_process_rows_are_shuffled_among_themselves():
    x, seen = torch.arange(60.0).view(20, 3), []
    for group in (None, "world"):
        assert torch.equal(shuffled(lambda rows: seen.append(rows) or by_row(rows), x, 4, group), by_row(x))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    assert all(torch.equal(rows, x[order]) for rows in seen)


def normalised(group, x, rows, seed):
    """What of a batch this rank normalises, and its running mean, which is that of this batch."""
    norm, seen = nn.BatchNorm1d(x.shape[1], momentum=1.0, dtype=x.dtype), []
    own = x[rows[group.rank()]].requires_grad_()
    features = shuffled(nn.Sequential(Seen(seen), norm), own, seed, group)
    return seen[0], norm.running_mean, features


class Seen(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x)
        return x


@pytest.mark.parametrize("counts", [(4, 4, 4), UNEVEN], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_statistics_are_those_of_rows_that_are_drawn(pool, counts, seed):
    x, rows = batch(counts, 5, dtype=torch.float64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    want, all_features = torch.empty_like(x), []
    for own, (seen, mean, features) in zip(rows, pool.run(normalised, x, rows, seed, ranks=W), strict=True):
        drawn = x[order[own]]
        assert torch.equal(seen, drawn) and not features.requires_grad
        assert torch.allclose(mean, drawn.mean(0)) and not torch.allclose(mean, x[own].mean(0), atol=1.0)
        want[order[own]] = nn.BatchNorm1d(5, dtype=x.dtype)(drawn).detach()
        all_features.append(features)
    assert torch.equal(torch.cat(all_features), want)


def exchanged(group, x, rows, seed, compare):
    preflight(compare)
    try:
        with recorded() as record:
            shuffled(by_row, x[rows[group.rank()]], seed, group)
        return record.sent, record.received
    finally:
        preflight(True)


@pytest.mark.parametrize("counts, compare", [((6, 6, 6), False), (UNEVEN, True)], ids=str)
def test_a_row_and_its_features_travel_if_others_encode_it(pool, counts, compare):
    x, rows = batch(counts, 4, 2)
    of = [r for r, count in enumerate(counts) for _ in range(count)]  # whose each row is, and each place
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3)).tolist()
    for rank, moved in enumerate(pool.run(exchanged, x, rows, 3, compare, ranks=W)):
        leaving = sum(of[row] == rank != of[place] for place, row in enumerate(order))
        assert leaving == sum(of[place] == rank != of[row] for place, row in enumerate(order)) > 0
        assert moved == (leaving * (8 * 4 + 3 * 2) + (W - 1) * 512 * compare,) * 2


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_routes_fit_together(size):
    """Of all ranks, one after another: rows go where their places are, there and back."""
    counts = torch.randint(4, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    x, rows = batch(counts, 2)
    for back in (False, True):
        order = order_of(len(x), 9, back)
        routes = [route(order, counts, rank) for rank in range(size)]
        sent = [list(x[own][way.rows].split(way.to)) for own, way in zip(rows, routes, strict=True)]
        for rank, (own, way) in enumerate(zip(rows, routes, strict=True)):
            parcels = [of[rank] for of in sent]
            assert [len(parcel) for parcel in parcels] == way.of
            assert torch.equal(torch.empty_like(x[own]).index_copy_(0, way.places, torch.cat(parcels)), x[order[own]])


def laid_out(group):
    seen = []
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    for g in (group, None):
        shuffled(nn.Sequential(Seen(seen), nn.Flatten()), x, 0, g)
    return [x.is_contiguous(memory_format=torch.channels_last) for x in seen]


def test_images_stay_channels_last(pool):
    assert pool.run(laid_out, ranks=2) == [[True, True]] * 2


def wrong(group, given):
    x, seed, encoder = torch.randn(4, 2), 1, by_row
    if given == "seed of one" and group.rank() == 1:
        seed = 2
    elif given == "seed":
        seed = torch.tensor(3)
    elif given == "rows":
        x = torch.tensor(1.0)
    elif given == "features":
        encoder = torch.mean
    return shuffled(encoder, x, seed, group)


@pytest.mark.parametrize(
    "given, said",
    [
        ("seed of one", "seed is 1 on ranks 0, 2, 2 on rank 1"),
        ("seed", "seed must be an integer, 0 or more, not a tensor"),
        ("rows", r"x must be a tensor \[N, ...\] of this rank's rows, not a tensor \[\]"),
        ("features", r"encoder must return a row for each of 4, not a tensor \[\]"),
    ],
)
def test_mistakes(pool, given, said):
    for error in pool.outcomes(wrong, given, ranks=W):
        assert "\n" not in str(error)
        with pytest.raises(ValueError, match=said):
            raise error


def example(group):
    (test,) = doctest.DocTestFinder(recurse=False).find(shuffled, globs=dict(sslkern=sslkern, torch=torch))
    return doctest.DocTestRunner().run(test)


def test_the_example_runs(pool):
    assert all(failed == 0 and tried == 5 for failed, tried in pool.run(example, ranks=8))  # which are the world


def compiled(group, seeds):
    torch.compiler.reset()
    x = torch.randn(5, 4)
    function = torch.compile(lambda x, seed: shuffled(by_row, x, seed, group), fullgraph=True, backend="aot_eager")
    return all(torch.equal(function(x, seed), by_row(x)) for seed in seeds)


@pytest.mark.slow
def test_compiles(pool):
    assert pool.run(compiled, [3, 4, 5], ranks=2) == [True, True]
