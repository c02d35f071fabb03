"""Ranks that mean something else: all of them say so, with what each was given, before they wait for each other."""

import pytest
import torch
import torch.distributed as dist

from sslkern.functional import info_nce, nt_xent

GIVEN = dict(rows=4, features=3, dtype=torch.float32)


def different(group, mine: dict):
    """`nt_xent`, to which rank 1 gives something else."""
    given = GIVEN | (mine if dist.get_rank(group) == 1 else {})
    rows, features, dtype = (given.pop(name) for name in GIVEN)
    loss = given.pop("loss", nt_xent)
    z0 = torch.randn(rows, features, dtype=dtype, requires_grad=given.pop("learns", True))
    z1 = torch.randn(given.pop("rows_of_z1", rows), features, dtype=dtype)
    cast = given.pop("autocast", False)
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


def test_ranks_may_differ_in_their_number_of_rows(pool):
    assert len({loss.item() for loss in pool.run(different, dict(rows=7), ranks=3)}) == 1


def wrong_everywhere(group):
    return nt_xent(torch.randn(4, 3), torch.randn(4, 3), temperature=0.0, group=group)


def test_what_all_ranks_do_wrong_is_said_as_on_one_process(pool):
    with pytest.raises(ValueError, match="temperature must"):
        raise pool.outcomes(wrong_everywhere, ranks=3)[2]
