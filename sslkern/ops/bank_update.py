"""`bank_update_`: move rows of a memory bank towards new features (Wu et al. 2018, https://arxiv.org/abs/1805.01978)."""

import torch
from torch import Tensor

from ..backends import load, resolve
from ..common.arguments import FLOATS, check_dense, check_devices, check_written, describe
from ..common.node import Operator
from ..common.numbers import check_number
from ..common.tensors import apart


def bank_update_(bank: Tensor, index: Tensor, x: Tensor, momentum: float = 0.5) -> None:
    """bank[index_i] = unit(momentum * bank[index_i] + (1 - momentum) * x_i), in place. No host synchronisation.

    Where an index comes more than once the last one counts, for any number of threads: it starts from the old row,
    and the others leave no trace. A row of length 0 stays 0.

    Args:
        bank: [M, D], fp32, bf16, fp16 or fp64, overwritten; computed in fp32 (fp64) and rounded to its type.
        index: int64 [B], rows of bank.
        x: [B, D], floating point, detached.
        momentum: how much of the old row stays, 0 <= momentum <= 1.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        IndexError: an index is no row of bank; then nothing was written (on the CPU; elsewhere as torch's indexing).

    Example:
        >>> bank = torch.eye(3)
        >>> sslkern.ops.bank_update_(bank, torch.tensor([0]), torch.tensor([[0.0, 2.0, 0.0]]), momentum=0.0)
        >>> bank[0]
        tensor([0., 1., 0.])
    """
    for name, tensor in (("bank", bank), ("x", x), ("index", index)):
        check_dense(name, tensor)
    if not isinstance(bank, Tensor) or bank.ndim != 2 or bank.dtype not in FLOATS:
        raise ValueError(f"bank must be a tensor [M, D] of fp32, bf16, fp16 or fp64, not {describe(bank)}")
    check_written("bank", bank)
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != bank.shape[1]:
        raise ValueError(
            f"x must be a tensor [B, {bank.shape[1]}] to go with bank {list(bank.shape)}, not {describe(x)}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be floating point, not {x.dtype}; convert it with .float()")
    if not isinstance(index, Tensor) or index.shape != x.shape[:1]:
        raise ValueError(
            f"index must be an int64 tensor {list(x.shape[:1])}, a row of bank for each of x, not {describe(index)}"
        )
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, not {index.dtype}; convert it with .long()")
    momentum = check_number("momentum", momentum, 0, 1, closed=True)
    check_devices("bank", bank, index=index, x=x)
    backend = resolve("bank_update", bank, other=x.dtype)
    _write.registered(bank, index, x.detach(), momentum, backend)


def _written(bank: Tensor, index: Tensor, x: Tensor, momentum: float, backend: str) -> None:
    load(backend, "bank_update").bank_update_(bank, index, apart(x, bank), momentum)


def _fake(bank: Tensor, index: Tensor, x: Tensor, momentum: float, backend: str) -> None:
    return None


_write = Operator(
    "bank_update_(Tensor(a!) bank, Tensor index, Tensor x, float momentum, str backend) -> ()",
    _written,
    _fake,
)
