"""`sum_of_equal`: sums of the keys that share an id, over the keys of all ranks.

sum_i = sum_j [q_id_i = k_id_j] k_j      dk_j = sum_i [q_id_i = k_id_j] g_i
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import equal
from ..common.node import Node, Operator
from ..common.tensors import accumulator
from .blocks import PLACE, Place, blocks, place_of, shared, strategy_of
from .ranks import Ranks
from .schedule import ring


def sum_of_equal(k: Tensor, q_ids: Tensor, k_ids: Tensor, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """The sum [N, D] of the rows of k [M, D] whose ids equal each of q_ids [N], and how many they are [N]. ranks: how
    the rows of k are spread, of which this rank has M."""
    if ranks is None:
        return equal.sum_of_equal(k, q_ids, k_ids)
    place = place_of(ranks, strategy_of(ranks, k, itself=False))
    return _sum.way(k.requires_grad, k, q_ids, k_ids)(k, q_ids, k_ids, *place)


def _forward(
    k: Tensor, q_ids: Tensor, k_ids: Tensor, group: str, counts: Sequence[int], strategy: str
) -> tuple[Tensor, Tensor]:
    place = Place.of(k, group, counts, strategy)
    sums, count = k.new_zeros(len(q_ids), k.shape[1], dtype=accumulator(k)), torch.zeros_like(q_ids)
    for block in blocks(place, ring(place.rank, place.size), shared([k, k_ids], place), False):
        of_keys, their_ids = block.tensors
        of_block, number = equal.sum_of_equal(of_keys, q_ids, their_ids)
        sums, count = sums + of_block, count + number
    return sums, count


def _fake(k: Tensor, q_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return k.new_empty(len(q_ids), k.shape[1], dtype=accumulator(k)), torch.empty_like(q_ids)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    k, q_ids, k_ids, ctx.group, ctx.counts, ctx.strategy = inputs
    ctx.dtype = k.dtype
    ctx.save_for_backward(q_ids, k_ids)


def _backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 6
    dk = _gradient.way_back(ctx, g)(g, *ctx.saved_tensors, ctx.group, ctx.counts, ctx.strategy)
    return dk.to(ctx.dtype), *(None,) * 5


def _gradient_of(g: Tensor, q_ids: Tensor, k_ids: Tensor, group: str, counts: Sequence[int], strategy: str) -> Tensor:
    dk = g.new_zeros(len(k_ids), g.shape[1])
    place = Place.of(dk, group, counts, strategy, backward=True)
    order = ring(place.rank, place.size, results=True)
    for block in blocks(place, order, shared([k_ids], place), False, [dk], lambda _, theirs: dk.add_(theirs[0])):
        block.results = [equal.sum_of_equal(g, block.tensors[0], q_ids)[0]]
    return dk


_sum = Node(
    Operator(
        f"sum_of_equal_over_ranks(Tensor k, Tensor q_ids, Tensor k_ids, {PLACE}) -> (Tensor sum, Tensor count)",
        _forward,
        _fake,
    ),
    _save,
    _backward,
    outputs=1,
)
_gradient = Operator(
    f"sum_of_equal_over_ranks_bwd(Tensor g, Tensor q_ids, Tensor k_ids, {PLACE}) -> Tensor",
    _gradient_of,
    lambda g, _, k_ids, *__: g.new_empty(len(k_ids), g.shape[1]),
)
