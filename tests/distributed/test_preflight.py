"""Ranks that mean something else: all of them say so, with what each was given, before they wait for each other."""

import pytest
import torch
import torch.distributed as dist

import sslkern
from sslkern.functional import info_nce, mnrl, nt_xent

GIVEN = dict(rows=4, features=3, dtype=torch.float32)


def different(group, mine: dict):
    """`nt_xent`, to which rank 1 gives something else."""
    given = GIVEN | (mine if dist.get_rank(group) == 1 else {})
    rows, features, dtype = (given.pop(name) for name in GIVEN)
    loss = given.pop("loss", nt_xent)
    z0 = torch.randn(rows, features, dtype=dtype, requires_grad=given.pop("learns", True))
    z1 = torch.randn(given.pop("rows_of_z1", rows), features, dtype=dtype)
    cast = given.pop("autocast", False)
    if given.pop("sparse", False):
        z0 = z0.to_sparse()
    if given.pop("nested", False):
        z0 = torch.nested.nested_tensor([*z0.detach()], requires_grad=True)
    with torch.set_grad_enabled(given.pop("grad", True)), torch.autocast("cpu", enabled=cast):
        return loss(z0, z1, group=group, **given)


CASES = {
    "features": (
        dict(features=5),
        r"z0 is Tensor \[4, 3\] float32 on cpu, requires_grad on ranks 0, 2, Tensor \[4, 5\] .* on rank 1",
    ),
    "type": (dict(dtype=torch.float64), r"z0 is .* float32 .* on ranks 0, 2, .* float64 .* on rank 1; z1 is"),
    "rows of one view": (
        dict(rows_of_z1=2),
        r"z1 is Tensor \[4, 3\] float32 on cpu on ranks 0, 2, Tensor \[2, 3\] .* on rank 1",
    ),
    "temperature": (dict(temperature=0.25), r"temperature is 0.5 on ranks 0, 2, 0.25 on rank 1"),
    "a tensor": (
        dict(temperature=torch.tensor(0.5)),
        r"temperature is 0.5 on ranks 0, 2, Tensor \[\] float32 on cpu on rank 1",
    ),
    "reduction": (dict(reduction="sum"), r"reduction is 'mean' on ranks 0, 2, 'sum' on rank 1"),
    "strategy": (dict(strategy="ring"), r"strategy is '.*' on ranks 0, 2, 'ring' on rank 1"),
    "gradients": (dict(grad_reduce="sum"), r"grad_reduce is 'mean' on ranks 0, 2, 'sum' on rank 1"),
    "ids": (dict(ids=torch.arange(4)), r"ids is None on ranks 0, 2, Tensor \[4\] int64 on cpu on rank 1"),
    "weights": (dict(weights=torch.ones(4)), r"weights is None on ranks 0, 2, Tensor \[4\] float32 on cpu on rank 1"),
    "what learns": (
        dict(learns=False),
        r"z0 is .* requires_grad on ranks 0, 2, Tensor \[4, 3\] float32 on cpu on rank 1",
    ),
    "no_grad": (dict(grad=False), "must record a gradient on all ranks"),
    "autocast": (dict(autocast=True), "must be inside autocast on all ranks"),
    "loss": (dict(loss=info_nce), "must call the same loss, not nt_xent on ranks 0, 2, info_nce on rank 1"),
    "layout": (
        dict(sparse=True),
        r"z0 is Tensor \[4, 3\] float32 on cpu, requires_grad on ranks 0, 2, Tensor \[4, 3\] sparse_coo .* on rank 1",
    ),
    "nested": (dict(nested=True), r"z0 is .* on ranks 0, 2, Tensor nested float32 on cpu, requires_grad on rank 1"),
    "a wrong value": (dict(temperature=-0.0), "temperature is 0.5 on ranks 0, 2, -0.0 on rank 1"),
    "no tensor": (dict(ids=[1]), r"ids is None on ranks 0, 2, \(1\) on rank 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_difference_is_said_on_all_ranks(pool, case):
    mine, said = CASES[case]
    pids = pool.pids(3)
    outcomes = pool.outcomes(different, mine, ranks=3)
    assert {(type(error), str(error)) for error in outcomes} == {(ValueError, str(outcomes[0]))}
    assert "\n" not in str(outcomes[0])
    with pytest.raises(ValueError, match=said):
        raise outcomes[0]
    assert pool.pids(3) == pids and len({loss.item() for loss in pool.run(different, {}, ranks=3)}) == 1


Z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
INDEX = torch.zeros(4, 3, dtype=torch.int64)
# Of a group; `odd` on one of its ranks.
CALLS = {
    "features, as many as rows": (
        lambda group, odd: nt_xent(*torch.randn(2, 3 + odd, 3 + odd), group=group),
        r"z0 is Tensor \[3, 3\] .* on ranks 0, 2, Tensor \[4, 4\] .* on rank 1",
    ),
    "a list in a list": (
        lambda group, odd: mnrl(Z, Z, [Z], guide=[Z, Z, [Z[:, : 3 - odd]]], group=group),
        r"guide is .* on ranks 0, 2, .*\(Tensor \[4, 2\] float32 on cpu\)\) on rank 1",
    ),
    "a set": (
        lambda group, odd: mnrl(Z, Z, directions={"query_to_doc", "query_to_query", "doc_to_query"[odd:]}, group=group),
        r"directions is \[\"'doc_to_query'\", .* on ranks 0, 2, \[\"'oc_to_query'\", .* on rank 1",
    ),
    "an option of a module": (
        lambda group, odd: sslkern.MoCoLoss(3, 9, reduction="none" if odd else "mean", group=group)(Z, Z),
        r"reduction is 'mean' on ranks 0, 2, 'none' on rank 1",
    ),
    "temperature of a module": (
        lambda group, odd: sslkern.MoCoLoss(3, 9, 0.1 + odd, group=group)(Z, Z),
        r"temperature is 0.1 on ranks 0, 2, 1.1 on rank 1",
    ),
    "size of a queue": (
        lambda group, odd: sslkern.MoCoLoss(3, 9 - odd, group=group)(Z, Z),
        r"queue is Tensor \[9, 3\] .* on ranks 0, 2, Tensor \[8, 3\] .* on rank 1",
    ),
    "support": (
        lambda group, odd: sslkern.NNCLRLoss(3 - odd, 9, group=group)(Z, Z, Z, Z),
        r"support is Tensor \[3, 9\] .* on ranks 0, 2, Tensor \[2, 9\] .* on rank 1",
    ),
    "statistics": (
        lambda group, odd: sslkern.NNCLRLoss(3, 9, stats=bool(odd), group=group)(Z, Z, Z, Z),
        r"stats is False on ranks 0, 2, True on rank 1",
    ),
    "form": (
        lambda group, odd: sslkern.NCELoss(9, 3, 2, form=("nce", "softmax")[odd], group=group)(Z, INDEX[:, 0]),
        r"form is 'nce' on ranks 0, 2, 'softmax' on rank 1",
    ),
    "bank": (
        lambda group, odd: sslkern.NCELoss(9, 3 - odd, 2, group=group)(Z, INDEX[:, 0], index=INDEX),
        r"bank is Tensor \[9, 3\] .* on ranks 0, 2, Tensor \[9, 2\] .* on rank 1",
    ),
    "graph": (
        lambda group, odd: sslkern.CMCLoss(
            3, 9, 3, 2, graph=("full", "core")[odd], reduction="sum", form="softmax", group=group
        )([Z, Z, Z], INDEX[:, 0], index=INDEX),
        r"graph is 'full' on ranks 0, 2, 'core' on rank 1",
    ),
    "what is pushed onto": (
        lambda group, odd: sslkern.FeatureQueue(3 - odd, 9, group=group).push(Z),
        r"queue is Tensor \[3, 9\] .* on ranks 0, 2, Tensor \[2, 9\] .* on rank 1",
    ),
    "what is updated": (
        lambda group, odd: sslkern.MemoryBank(9, 3 - odd, group=group).update(INDEX[:, 0], Z),
        r"bank is Tensor \[9, 3\] .* on ranks 0, 2, Tensor \[9, 2\] .* on rank 1",
    ),
}


def called(group, case, odd):
    return CALLS[case][0](group, int(odd and dist.get_rank(group) == 1))


@pytest.mark.parametrize("case", CALLS)
def test_a_difference_is_said_wherever_it_is(pool, case):
    pids = pool.pids(3)
    outcomes = pool.outcomes(called, case, True, ranks=3)
    assert {(type(error), str(error)) for error in outcomes} == {(ValueError, str(outcomes[0]))}
    with pytest.raises(ValueError, match=CALLS[case][1]):
        raise outcomes[0]
    assert pool.pids(3) == pids
    pool.run(called, case, False, ranks=3)


def test_ranks_may_differ_in_their_number_of_rows(pool):
    assert len({loss.item() for loss in pool.run(different, dict(rows=7), ranks=3)}) == 1


def wrong_everywhere(group):
    return nt_xent(torch.randn(4, 3), torch.randn(4, 3), temperature=0.0, group=group)


def test_what_all_ranks_do_wrong_is_said_as_on_one_process(pool):
    with pytest.raises(ValueError, match="temperature must"):
        raise pool.outcomes(wrong_everywhere, ranks=3)[2]
