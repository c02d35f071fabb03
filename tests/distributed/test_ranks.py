"""Who shares a batch, what is compared before, what is exchanged, and in which order."""

import pickle
import warnings

import pytest
import torch
import torch.distributed as dist

import sslkern
from sslkern.distributed import preflight, recorded
from sslkern.distributed.cost import DEVICES, Problem, cost
from sslkern.functional import clip, info_nce, nt_xent

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


# ---- what is compared ------------------------------------------------------------------------------------------------


def differently(group, how):
    z0, z1 = views(group)
    rank = group.rank()
    odd = rank == 1
    if how == "shape":
        return nt_xent(*(x[:, :5] if odd else x for x in (z0, z1)), group=group)
    if how == "dtype":
        return nt_xent(*(x.double() if odd else x for x in (z0, z1)), group=group)
    if how == "option":
        return nt_xent(z0, z1, 0.1 if odd else 0.2, group=group)
    if how == "optional":
        return nt_xent(z0, z1, ids=torch.arange(4) if odd else None, group=group)
    if how == "loss":
        return info_nce(z0, z1, group=group) if odd else nt_xent(z0, z1, group=group)
    if how == "gradient":
        return nt_xent(z0.detach() if odd else z0, z1, group=group)
    if how == "no_grad":
        with torch.set_grad_enabled(odd):
            return nt_xent(z0, z1, group=group)
    if how == "no tensor":
        return nt_xent([] if odd else z0, z1, group=group)
    if how == "strategy":
        return nt_xent(z0, z1, group=group, strategy="ring" if odd else "all_gather")
    if how == "views":
        return nt_xent(z0, z1[:2] if odd else z1, group=group)
    if how == "bank":
        return info_nce(z0, z1, torch.ones(5 + odd, 6), group=group)
    if how == "everywhere":
        return nt_xent(z0, z1[:2], group=group)


@pytest.mark.parametrize(
    "how, said",
    [
        ("shape", r"z0 is Tensor \[4, 6\] .* on ranks 0, 2, Tensor \[4, 5\] .* on rank 1; z1"),
        ("dtype", "z0 is .*float32.* on ranks 0, 2, .*float64"),
        ("option", "temperature is 0.2 on ranks 0, 2, 0.1 on rank 1$"),
        ("optional", "ids is None on ranks 0, 2, Tensor"),
        ("loss", "must call the same loss, not nt_xent on ranks 0, 2, info_nce on rank 1"),
        ("gradient", "z0 is .*requires_grad on ranks 0, 2, "),
        ("no_grad", "record a gradient on all ranks"),
        ("no tensor", "z0 is Tensor .* on ranks 0, 2, "),
        ("strategy", "strategy is 'all_gather' on ranks 0, 2, 'ring' on rank 1"),
        ("views", r"z1 is Tensor \[4, 6\] .* on ranks 0, 2, Tensor \[2, 6\]"),
        ("bank", r"negatives is Tensor \[5, 6\] .*Tensor \[6, 6\]"),
        ("everywhere", "z1 must be a tensor"),
    ],
)
def test_what_differs_is_said_on_every_rank(pool, how, said):
    before = pool.pids(8)
    errors = pool.outcomes(differently, how, ranks=W)
    assert all(type(error) in (ValueError, TypeError) for error in errors)
    assert len({str(error) for error in errors}) == 1 and "\n" not in str(errors[0])
    with pytest.raises(type(errors[0]), match=said):
        raise errors[0]
    assert pool.pids(8) == before  # nobody waits for anybody


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


def traffic(group, loss, strategy, rows, features):
    z = views(group, rows, features)
    preflight(False)
    try:
        with recorded() as forward:
            value = (nt_xent if loss == "nt_xent" else clip)(*z, 3.0, group=group, strategy=strategy)
        with recorded() as backward:
            value.backward()
    finally:
        preflight(True)
    return [(max(x.sent, x.received), x.events) for x in (forward, backward)]


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("loss", ["nt_xent", "clip"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_bytes_are_those_of_the_model(pool, loss, strategy, ranks):
    rows, itself = 96, loss == "nt_xent"
    n = rows * (1 + itself)
    expected = cost(strategy, Problem(n, 256, ranks, itself, 4), DEVICES["cpu"])
    answers = pool.run(traffic, loss, strategy, rows, 256, ranks=ranks)
    for phase, wanted in enumerate((expected.forward.moved, expected.backward.moved)):
        most = max(answer[phase][0] for answer in answers)
        assert abs(most - wanted) <= 0.02 * wanted


def test_the_next_keys_are_on_their_way_while_the_ring_computes(pool):
    for forward, backward in pool.run(traffic, "clip", "ring", 8, 8, ranks=5):
        for _, events in (forward, backward):
            steps = [event for event in events if event[0] != "wait"]
            assert steps == [(what, step) for step in range(5) for what in ("post", "compute")] + [("post", 5)]
            for step in range(5):
                at = [events.index((what, step)) for what in ("post", "compute", "wait")]
                assert at == sorted(at)


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
