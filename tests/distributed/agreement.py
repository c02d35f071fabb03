"""What every loss over ranks is asked: the value and the gradients of one process that has all rows."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import sslkern
from sslkern.distributed import cost

# Rows of each rank.
COUNTS = {
    "even": {1: [6], 2: [4, 4], 3: [3, 3, 3], 5: [2] * 5, 8: [2] * 8},
    "uneven": {1: [7], 2: [5, 2], 3: [1, 4, 2], 5: [1, 3, 2, 2, 1], 8: [1, 3, 2, 2, 1, 1, 4, 2]},
    "empty": {1: [7], 2: [0, 5], 3: [4, 0, 3], 5: [2, 0, 3, 0, 1], 8: [0, 3, 0, 2, 1, 0, 4, 0]},
}


class Problem(NamedTuple):
    """A loss and its tensors. Of the floating-point ones those that `learn` get a gradient."""

    loss: Callable
    sharded: dict[str, Tensor]  # with a row for each sample
    replicated: dict[str, Tensor]  # the same on all ranks
    options: dict
    views: int = 1  # in the rows of reduction="none", which are [views, N] flat
    by_row: bool = True  # or losses that are not reduced are of something else, and the same on all ranks

    def learning(self) -> list[str]:
        both = self.sharded | self.replicated
        return [
            name for name, x in both.items() if x.is_floating_point() and name not in self.options.get("frozen", ())
        ]


def result(problem: Problem, rows: slice, dtype: torch.dtype, **sharing) -> tuple[Tensor, Tensor | None, dict]:
    """The loss, the share of winners or None, and the gradients by name, of these rows."""
    given = {name: x[rows] for name, x in problem.sharded.items()} | problem.replicated
    wide = torch.promote_types(dtype, torch.float32)  # of a temperature
    given = {name: x.to(dtype if x.ndim else wide) if x.is_floating_point() else x for name, x in given.items()}
    leaves = {name: given[name].clone().requires_grad_() for name in problem.learning()}
    options = {name: value for name, value in problem.options.items() if name != "frozen"}
    out = problem.loss(**given | leaves, **options, **sharing)
    loss, share = out if options.get("stats") else (out, None)
    grads = torch.autograd.grad(weighed(problem, loss, rows), list(leaves.values()), allow_unused=True)
    return loss.detach(), share, dict(zip(leaves, grads, strict=True))


def weighed(problem: Problem, loss: Tensor, rows: slice) -> Tensor:
    """The sum of what a loss returned, each element times a number: of both signs and many sizes, and the same for the
    same row in any split."""
    if loss.ndim == 0:
        return loss * 1.5
    N = next(iter(problem.sharded.values())).shape[0]
    upstream = torch.linspace(-1, 2, problem.views * N, dtype=loss.dtype).view(problem.views, N)[:, rows]
    if not problem.by_row:
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype)
    return (loss * upstream.reshape(loss.shape)).sum()


@contextlib.contextmanager
def by_triangle(triangular: bool) -> Iterator[None]:
    """Whether a ring's backward of q with itself visits each pair of ranks once, whatever it costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "by_triangle", lambda problem, device: triangular)
        yield


def of_rank(group, make: Callable, args: tuple, counts: list[int], dtype: torch.dtype, backend: str, sharing: dict):
    """The same of this rank's rows."""
    rank = group.rank()
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    with sslkern.use_backend(backend):
        return result(make(sum(counts), *args), rows, dtype, group=group, **sharing)


def of_rank_by(triangular: bool, *args):
    with by_triangle(triangular):
        return of_rank(*args)


def agrees(
    pool, make: Callable, *args, counts: list[int], strategy: str, grad_reduce: str, of_rank: Callable = of_rank
) -> None:
    """`make(N, *args)`, a function of a module, returns the Problem: over ranks with `counts` rows it has the value and
    the gradients, by the contract, of one process, to 1e-10 in float64, and the same bits on every rank."""
    sharing = dict(strategy=strategy, grad_reduce=grad_reduce)
    problem, W, N = make(sum(counts), *args), len(counts), sum(counts)
    ranks = pool.run(of_rank, make, args, counts, torch.float64, "reference", sharing, ranks=W)
    with sslkern.use_backend("reference"):
        loss, share, grads = result(problem, slice(None), torch.float64)
    losses, shares, of_ranks = zip(*ranks, strict=True)
    if loss.ndim == 0 or not problem.by_row:
        assert all(torch.equal(x, losses[0]) for x in losses)
        close(losses[0], loss)
    else:
        close(torch.cat([x.view(problem.views, -1) for x in losses], 1), loss.view(problem.views, N))
    if share is not None:
        assert all(torch.equal(x, shares[0]) for x in shares)
        assert (shares[0] - share).abs().max() < 1e-6
    factor = W if grad_reduce == "mean" else 1
    for name, grad in grads.items():
        parts = [of_rank[name] for of_rank in of_ranks]
        if grad is None:
            assert parts == [None] * W
        elif name in problem.sharded:
            close(torch.cat(parts), factor * grad)
        elif grad_reduce == "mean":
            assert all(torch.equal(x, parts[0]) for x in parts)
            close(parts[0], grad)
        else:
            close(sum(parts), grad)


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-10 * max(1, b.abs().max())
