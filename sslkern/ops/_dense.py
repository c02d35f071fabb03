"""Small problems in compiled code: the formula itself, which the compiler fuses with its surroundings."""

import math

import torch
from torch import Tensor

from ..backends.problem import Problem, full_scale_of, sizes_of
from ..common.autocast import autocast_active, cat, stack
from ..common.rows import dots, unit
from ..common.sums import pair_loss, times
from ..common.tensors import wide
from .logsumexp import logsumexp


def is_small(problem: Problem) -> bool:
    """Whether so few scores are better left to the compiler, on the device of q."""
    G, N, M, _ = sizes_of(problem)
    return few(problem.q, G * N, M)


def few(x: Tensor, rows: int, columns: int) -> bool:
    if autocast_active(x.device.type):
        return False  # it would round the products to 16 bits, forward and backward
    return rows * columns <= 2**16


def dense(problem: Problem, columns: bool, best: bool) -> Tensor | tuple[Tensor, ...]:
    """What `similarity_lse` returns."""
    q, k, _, _, q_ids, k_ids, same, k_bias, q_limit = problem
    keys, k_ids = (q, q_ids) if k is None else (k, k_ids)
    s = wide(q @ keys.mT) * full_scale_of(problem)
    if k_bias is not None:
        s = s + k_bias.unsqueeze(-2)
    left_out = None
    if k is None:
        left_out = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    if q_ids is not None:
        equal = q_ids.unsqueeze(-1) == k_ids.unsqueeze(-2)
        equal = ~equal if same else equal
        left_out = equal if left_out is None else left_out | equal
    if k_bias is not None:
        out = (k_bias == -math.inf).unsqueeze(-2)
        left_out = out if left_out is None else left_out | out
    if q_limit is not None:
        out = s > q_limit.unsqueeze(-1)
        left_out = out if left_out is None else left_out | out
    if left_out is not None:
        s = s.masked_fill(left_out, -math.inf)
    sides = (-1, -2) if columns else (-1,)
    out = [logsumexp(s, dim) for dim in sides]
    if best:
        out.append(cat([s.amax(dim) for dim in sides], -1).detach())
    return out[0] if len(out) == 1 else tuple(out)


def dense_contrast(
    x: Tensor, y: Tensor, scale: float | Tensor, ids: Tensor | None, mode: str, normalize: bool, best: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `pair_contrast` returns."""
    N, views = x.shape[0], mode == "views"
    x, y = (unit(x), unit(y)) if normalize else (x, y)
    q, k = (cat((x, y)),) * 2 if views else (x, y)
    positive = times(dots(x, y), scale)
    if ids is None:
        row = torch.arange(q.shape[0], device=q.device)
        apart = row.unsqueeze(1) - row
        left_out = (apart == 0) | (apart.abs() == N)
    else:
        ids = ids.repeat(2) if views else ids
        left_out = ids.unsqueeze(1) == ids
    s = (wide(q @ k.mT) * scale).masked_fill(left_out, -math.inf)
    over = torch.logsumexp if ids is None and N > 1 else logsumexp  # then every row has a negative
    sides = (1, 0) if mode == "two_way" else (1,)
    negatives = [half for side in sides for half in over(s, side).view(-1, N)]
    top = stack([s.amax(side) for side in sides]).view(-1, N).detach() if best else None
    # Stacked before the softplus, the inductor of torch 2.13 computes gradients that are wrong (with a scale tensor).
    return stack([pair_loss(side, positive) for side in negatives]), positive.detach(), top
