"""Who shares a batch, in which order it is exchanged, and what compiled code makes of it."""

import os
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

import sslkern
from sslkern.distributed import preflight, recorded
from sslkern.functional import clip, nt_xent

from .agreement import COUNTS, result
from .problems import CASES, of_loss, of_pairs

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
    module, said = sys.modules["sslkern.distributed.ranks"], []
    made = sslkern.CLIPLoss()
    for call in (nt_xent, lambda *z: clip(*z, 3.0), made, lambda *z: sslkern.NTXentLoss()(*z)):
        module._warned = False  # another test may have been the first
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = [call(*z) for _ in range(2)][0]
        said += [w.filename for w in caught if "group=None is the loss of this process's rows alone" in str(w.message)]
    module._warned = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(nt_xent(*z, group="self"), loss) and torch.equal(sslkern.NTXentLoss(group="self")(*z), loss)
    other = dist.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(ValueError, match="group does not hold this process"):
        nt_xent(*z, 0.1, group=other)
    return loss.item(), said, nt_xent(*z, group=group).item()


def test_no_group_is_this_process_and_says_so_once(pool):
    answers = pool.run(alone, ranks=1)
    assert answers[0][0] == answers[0][2]  # one rank has the bits of no group
    assert answers[0][1] == [__file__] * 4
    assert len({loss for loss, _, _ in pool.run(alone, ranks=W)}) == W


def of_one(group):
    """Which losses warn of a group that is this process by itself, or have other bits than without a group."""
    different = []
    for name in [*CASES, "nt_xent", "info_nce", "clip"]:
        problem = of_loss(4, name, "") if name in CASES else of_pairs(4, name, "ids", "stats")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sys.modules["sslkern.distributed.ranks"]._warned = False
            loss, _, grads = result(problem, slice(None), torch.float32, group=group)
        plain, _, plain_grads = result(problem, slice(None), torch.float32)
        same = all(a is b or torch.equal(a, b) for a, b in zip(grads.values(), plain_grads.values(), strict=True))
        if caught or not same or not torch.equal(loss, plain):
            different.append((name, [str(w.message) for w in caught]))
    return different


def test_a_group_of_one_rank_is_none(pool):
    assert pool.run(of_one, ranks=1) == [[]]


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


def in_several(group):
    """Of all ranks, of every other one, and of no others, in one step; then the gradients, as shares."""
    halves = [dist.new_group(range(start, 8, 2)) for start in (0, 1)]
    z = views(group, 2, dtype=torch.float64)
    options = dict(grad_reduce="sum", strategy=("ring", "all_gather")[group.rank() % 2])
    loss = nt_xent(*z, 0.1, group=halves[group.rank() % 2], **options) + clip(*z, 3.0, group=None)
    loss = loss + nt_xent(*z, 0.2, group="world", grad_reduce="sum")
    loss.backward()
    return loss.item(), *(x.grad for x in z)


@pytest.mark.filterwarnings("ignore:group=None")
def test_several_groups_at_once(pool):
    ranks = pool.run(in_several, ranks=8)
    z = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    of = z.view(2, 8, 2, 6)  # by rank
    whole = nt_xent(*z, 0.2)
    halves = [nt_xent(*of[:, start::2].flatten(1, 2), 0.1) for start in (0, 1)]
    own = [clip(*of[:, rank], 3.0) for rank in range(8)]
    (whole + sum(halves) + sum(own)).backward()
    for rank, (loss, *grads) in enumerate(ranks):
        assert abs(loss - (whole + halves[rank % 2] + own[rank]).item()) < 1e-12
        assert torch.allclose(torch.stack(grads), z.grad.view(2, 8, 2, 6)[:, rank], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "group, said",
    [
        ("all", "group must be None, 'world', 'self', a process group or a device mesh of one dimension, not 'all'"),
        (3, "group must be None, .*, not a int"),
        (types.SimpleNamespace(ndim=2, get_group=None), "device mesh of one dimension, not 2; pass mesh"),
    ],
    ids=["name", "number", "mesh"],
)
def test_what_is_no_group(group, said):
    z = torch.randn(2, 4, 3)
    for call in (lambda: nt_xent(*z, group=group), lambda: sslkern.NTXentLoss(group=group)):
        with pytest.raises((TypeError, ValueError), match=said):
            call()
    with pytest.raises((TypeError, ValueError), match=said):
        sslkern.FeatureQueue(3, 9, group=group)


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


@pytest.mark.slow
def test_comparing_can_be_left_out_by_the_environment():
    code = "from sslkern.distributed import preflight; import sys; print(sys.modules[preflight.__module__]._ON)"
    for value, on in (("0", "False"), ("1", "True")):
        env = os.environ | dict(SSLKERN_PREFLIGHT=value)
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == on


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


@pytest.mark.parametrize(
    "strategy, grad_reduce",
    [("all_gather", "mean"), ("ring", "sum"), pytest.param("auto", "mean", marks=pytest.mark.long)],
)
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
