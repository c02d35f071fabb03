"""Who shares a batch, in which order it is exchanged, and what compiled code makes of it."""

import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

import sslkern
from sslkern.distributed import preflight, recorded
from sslkern.functional import clip, nt_xent

from .agreement import COUNTS

W = 3


def views(group, rows=4, features=6, dtype=torch.float32, learn=True):
    """Two views of this rank's rows of a batch that is the same in every call."""
    z = torch.randn(2, rows * group.size(), features, generator=torch.Generator().manual_seed(0)).to(dtype)
    start = rows * group.rank()
    return [x[start : start + rows].clone().requires_grad_(learn) for x in z]


# ---- groups ----------------------------------------------------------------------------------------------------------


def by_each_name(group):
    z = views(group)
    mesh = dist.DeviceMesh.from_group(group, "cpu")
    loss = sslkern.NTXentLoss(0.1, group="world")
    # Only the whole world can be named so.
    world = [pickle.loads(pickle.dumps(loss))(*z), nt_xent(*z, 0.1, group="world")] if group.size() == 8 else []
    return [x.item() for x in [nt_xent(*z, 0.1, group=group), nt_xent(*z, 0.1, group=mesh), *world]]


@pytest.mark.parametrize("ranks", [3, 8])
def test_a_group_has_several_names(pool, ranks):
    for losses in pool.run(by_each_name, ranks=ranks):
        assert len(set(losses)) == 1


def alone(group):
    z = views(group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = [nt_xent(*z, 0.1) for _ in range(2)][0]
    said = [str(w.message) for w in caught if "group=None" in str(w.message)]
    other = dist.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(ValueError, match="group does not hold this process"):
        nt_xent(*z, 0.1, group=other)
    return loss.item(), said, nt_xent(*z, 0.1, group=group).item()


def test_no_group_is_this_process_and_says_so_once(pool):
    answers = pool.run(alone, ranks=1)
    assert answers[0][0] == answers[0][2]  # one rank has the bits of no group
    assert len(answers[0][1]) <= 1  # at most: another test may have been the first
    assert len({loss for loss, _, _ in pool.run(alone, ranks=W)}) == W


def test_without_processes_the_world_is_this_one():
    z0, z1 = torch.randn(2, 4, 3)
    assert torch.equal(nt_xent(z0, z1, group="world"), nt_xent(z0, z1))


def of_dtensors(group):
    mesh = dist.DeviceMesh.from_group(group, "cpu")
    z0, z1 = (DTensor.from_local(x, mesh, [Shard(0)]) for x in views(group, learn=False))
    return nt_xent(z0, z1, group=mesh)


def test_a_dtensor_is_to_be_made_local(pool):
    errors = pool.outcomes(of_dtensors, ranks=2)
    assert all(isinstance(error, TypeError) and "pass z0.to_local()" in str(error) for error in errors)


# ---- rows ------------------------------------------------------------------------------------------------------------


def as_many_rows_as_features(group):
    """Sizes that are the same by chance."""
    rows = [6, 4, 5][group.rank()]
    z0, z1 = (x[:rows] for x in views(group, rows=6))
    return nt_xent(z0, z1, group=group).item()


def test_rows_may_differ_whatever_else_has_their_number(pool):
    assert len(set(pool.run(as_many_rows_as_features, ranks=W))) == 1


def without_preflight(group, rows):
    preflight(False)
    try:
        with recorded() as record:
            loss = nt_xent(*views(group)[:2], group=group)
        return loss.item(), record.received
    finally:
        preflight(True)


def with_preflight(group):
    with recorded() as record:
        loss = nt_xent(*views(group)[:2], group=group)
    return loss.item(), record.received


def test_comparing_can_be_left_out(pool):
    with_it, without = pool.run(with_preflight, ranks=W), pool.run(without_preflight, 4, ranks=W)
    assert {loss for loss, _ in with_it} == {loss for loss, _ in without}
    assert all(a - b == (W - 1) * 512 for (_, a), (_, b) in zip(with_it, without, strict=True))


# ---- what is exchanged -----------------------------------------------------------------------------------------------


def events(group):
    with recorded() as forward:
        value = clip(*views(group, 8, 8), 3.0, group=group, strategy="ring")
    with recorded() as backward:
        value.backward()
    return forward.events, backward.events


def test_the_next_keys_are_on_their_way_while_the_ring_computes(pool):
    for phases in pool.run(events, ranks=5):
        for happened in phases:
            steps = [(what, step) for step in range(5) for what in ("post", "compute", "wait")]
            assert happened == [*steps, ("post", 5), ("wait", 5)]  # the last results go home


def twice(group, strategy):
    out = []
    for _ in range(2):
        z = views(group, 5, 16)
        loss = nt_xent(*z, 0.1, group=group, strategy=strategy)
        loss.backward()
        out += [loss.detach(), *(x.grad for x in z)]
    return out


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_the_same_bits_on_every_rank_and_in_every_run(pool, strategy):
    results = pool.run(twice, strategy, ranks=5)
    assert all(torch.equal(x[0], results[0][0]) for x in results)
    assert all(torch.equal(a, b) for x in results for a, b in zip(x[:3], x[3:], strict=True))


def in_autocast(group, dtype):
    results = []
    for enabled in (False, True):
        leaves = [x.detach().requires_grad_() for x in views(group, [5, 0, 3][group.rank()], 16, dtype)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, share = clip(*leaves, 5.0, group=group, stats=True, ids=torch.arange(len(leaves[0])))
            other = nt_xent(*leaves, group=group, stats=True, label_smoothing=0.1, strategy="ring")[0]
            (loss + other).backward()
        results.append([loss.detach(), other.detach(), share, *(x.grad for x in leaves)])
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(pool, dtype):
    for plain, cast in pool.run(in_autocast, dtype, ranks=W):
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def second_derivative(group):
    z0, z1 = views(group)
    (grad,) = torch.autograd.grad(nt_xent(z0, z1, group=group), z0, create_graph=True)
    grad.sum().backward()


def test_no_second_derivative(pool):
    assert all(isinstance(error, NotImplementedError) for error in pool.outcomes(second_derivative, ranks=2))


# ---- compiled --------------------------------------------------------------------------------------------------------


def compiled(group, loss, strategy, grad_reduce):
    torch.compiler.reset()
    options = dict(group=group, strategy=strategy, grad_reduce=grad_reduce)

    def eager(x, y, scale):
        value, share = loss(x, y, logit_scale=scale, **options, stats=True, label_smoothing=0.1)
        return value * 2, share

    results = []
    for f in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        leaves = [*views(group, 5, 16), torch.tensor(3.0, requires_grad=True)]
        value, share = f(*leaves)
        value.backward()
        results.append([value.detach(), share, *(x.grad for x in leaves)])
    return results


@pytest.mark.parametrize("strategy, grad_reduce", [("all_gather", "mean"), ("ring", "sum"), ("auto", "mean")])
@pytest.mark.parametrize("loss", [nt_xent, clip], ids=["nt_xent", "clip"])
@pytest.mark.slow
def test_compiles(pool, loss, strategy, grad_reduce):
    for eager, traced in pool.run(compiled, loss, strategy, grad_reduce, ranks=W):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, traced, strict=True))


def compiled_uneven(group):
    torch.compiler.reset()
    rows = COUNTS["uneven"][3][group.rank()]
    z0, z1 = (x[:rows] for x in views(group, 4))
    torch.compile(lambda x, y: nt_xent(x, y, group=group), fullgraph=True, backend="aot_eager")(z0, z1)


def test_compiled_code_takes_as_many_rows_everywhere(pool):
    errors = pool.outcomes(compiled_uneven, ranks=W)
    assert all("as many rows on every rank, not [2, 8, 4]" in str(error) for error in errors)
