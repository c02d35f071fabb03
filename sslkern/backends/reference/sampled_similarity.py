"""`sampled_similarity` in plain torch, some queries at a time; products write into tensors that exist, which autocast
leaves alone."""

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.tensors import wide

_GATHERED = 2**22  # numbers of the bank gathered at a time


def sampled_similarity_fwd(q: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Returns [G, N, K] in fp32 (fp64)."""
    check_index(index, bank)
    rows, keys, flat = _one_group(q, bank, index)
    out = rows.new_empty(flat.shape)
    for part in _parts(flat, keys):
        torch.bmm(keys[flat[part]], rows[part].unsqueeze(2), out=out[part].unsqueeze(2))
    return out.view(index.shape)


def sampled_similarity_bwd(
    q: Tensor, bank: Tensor, index: Tensor, g: Tensor, need_q: bool, need_bank: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns dq [G, N, D] and dbank [G, M, D] in fp32 (fp64), None where not needed."""
    check_index(index, bank)
    rows, keys, flat = _one_group(q, bank, index)
    dq = dbank = None
    if need_q:
        dq = torch.zeros_like(rows)
        for part in _parts(flat, keys):
            torch.bmm(g.reshape(flat.shape)[part].unsqueeze(1), keys[flat[part]], out=dq[part].unsqueeze(1))
        dq = dq.view(q.shape)
    if need_bank:
        dbank = sum_by_key(q, bank, index, g)
    return dq, dbank


def sum_by_key(q: Tensor, bank: Tensor, index: Tensor, g: Tensor) -> Tensor:
    """sum_it g_it q_i over the i, t with index_it = j [G, M, D]; the terms of a sum in the order of i and t."""
    rows, keys, flat = _one_group(q, bank, index)
    if flat.numel() == 0 or keys.numel() == 0:
        return torch.zeros_like(keys).view(bank.shape)
    key, order = flat.reshape(-1).sort(stable=True)
    starts = torch.searchsorted(key, torch.arange(keys.shape[0], device=key.device))
    weights = g.reshape(-1).to(rows.dtype)[order]
    sums = F.embedding_bag(order // flat.shape[1], rows, starts, per_sample_weights=weights, mode="sum")
    return sums.view(bank.shape)


def _one_group(q: Tensor, bank: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [G N, D], keys [G M, D] and index [G N, K] into all of them, features in the type of the sums."""
    if q.ndim == 3:
        index = index + bank.shape[1] * torch.arange(q.shape[0], device=q.device).view(-1, 1, 1)
    return wide(q.flatten(0, -2)), wide(bank.flatten(0, -2)), index.flatten(0, -2)


def _parts(index: Tensor, keys: Tensor) -> list[slice]:
    """Slices of the rows of index."""
    step = max(1, _GATHERED // max(1, index.shape[1] * keys.shape[1]))
    return [slice(i, i + step) for i in range(0, index.shape[0], step)]


def check_index(index: Tensor, bank: Tensor) -> None:
    if index.device.type == "cpu" and index.numel() and not 0 <= index.amin() <= index.amax() < bank.shape[-2]:
        outside(index, bank)  # elsewhere torch's own indexing stops, without making the host wait


def outside(index: Tensor, bank: Tensor, name: str = "index") -> NoReturn:
    M = bank.shape[-2]
    bad = index[(index < 0) | (index >= M)][0].item()
    raise IndexError(f"{name} must be 0 ... {M - 1}, the rows of bank {list(bank.shape)}, but one is {bad}")
