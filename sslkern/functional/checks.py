"""The checks of the arguments that losses share."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..common.arguments import FLOATS, check_choice, check_dense, check_device, check_flags, describe
from ..common.autocast import autocast_active
from ..common.numbers import FLOAT32_MAX, check_finite
from ..common.tensors import wide
from ..distributed import GRAD_REDUCES, STRATEGIES, Group, Ranks, all_rows, alone, check_group, replicated


def check_features(name: str, x: Tensor, ranks: Ranks | None = None) -> None:
    """x: [N, D] with N > 0, on this rank or another, floating point."""
    check_dense(name, x)
    if not isinstance(x, Tensor) or x.ndim != 2:
        raise ValueError(f"{name} must be a tensor [N, D], not {describe(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, not {x.dtype}; convert it with .float()")
    if x.shape[0] == 0 and all_rows(0, ranks) == 0:
        raise ValueError(f"{name} is empty; the loss needs at least one row, so skip empty batches")


def check_pair(
    name: str, x: Tensor, other_name: str, other: Tensor, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """x and other, `promoted`: [N, D] with N > 0, on this rank or another, of one shape, type and device.

    Arguments that fit pass one test: a small batch feels each function, and compiled code is guarded for each.
    """
    if (
        isinstance(x, Tensor)
        and isinstance(other, Tensor)
        and x.layout is other.layout is torch.strided
        and not (x.is_nested or other.is_nested)
        and x.ndim == 2
        and x.shape == other.shape
        and x.shape[0] > 0
        and x.dtype == other.dtype
        and x.dtype.is_floating_point
        and x.dtype.itemsize > 1  # FLOATS, which would be guarded
        and x.device == other.device
    ):
        return x, other
    x, other = promoted(x, other)
    check_features(name, x, ranks)
    check_alike(other_name, other, name, x)
    return x, other


def promoted(*features: Tensor | None) -> tuple[Any, ...]:
    """Inside autocast, features of several types in the widest of them, as torch does with what it does not round: an
    encoder's output in bf16 meets a queue in fp32. Elsewhere all stay as they are: the checks refuse what does not fit.
    """
    dtypes = {x.dtype for x in features if isinstance(x, Tensor)}
    if len(dtypes) < 2 or not dtypes.issubset(FLOATS):
        return features
    devices = {x.device.type for x in features if isinstance(x, Tensor)}
    if not any(map(autocast_active, devices)):
        return features
    widest = functools.reduce(torch.promote_types, dtypes)
    return tuple(x.to(widest) if isinstance(x, Tensor) else x for x in features)


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor, shape: str | None = None) -> None:
    """x has the type and device of other, and its shape, or its D where `shape` describes another layout.

    `shape` names the sizes: a number from x would tie compiled code to it.
    """
    check_dense(name, x)
    if shape is None:
        fits = isinstance(x, Tensor) and x.shape == other.shape
    else:
        fits = isinstance(x, Tensor) and x.shape[-1:] == other.shape[-1:]
    if not fits:
        raise ValueError(
            f"{name} must be a tensor {shape or list(other.shape)} to go with {other_name} {list(other.shape)}, not"
            f" {describe(x)}" + _hint(x, 0 if shape is None else other.shape[-1])
        )
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, not {x.dtype}; convert one")
    if x.device != other.device:
        check_device(name, x, other, f"{other_name} is")


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    check_dense(name, ids)
    if not isinstance(ids, Tensor) or ids.shape != shape:
        raise ValueError(f"{name} must be an int64 tensor {list(shape)}, not {describe(ids)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {ids.dtype}; convert it with .long()")
    check_device(name, ids, like)


def check_weights(weights: Tensor | None, N: int, like: Tensor) -> None:
    if weights is None:
        return
    check_dense("weights", weights)
    if not isinstance(weights, Tensor) or weights.shape != (N,):
        raise ValueError(f"weights must be a tensor [{N}], one for each sample, not {describe(weights)}")
    if weights.dtype not in FLOATS:
        raise TypeError(f"weights must be floating point, not {weights.dtype}; convert it with .float()")
    check_device("weights", weights, like)


def check_options(
    reduction: str, group: Group = None, strategy: str = "auto", grad_reduce: str = "mean", **flags: bool
) -> None:
    """group, strategy, grad_reduce: who shares the batch, see `ranks_of`. flags: the options that are True or False."""
    for flag in flags.values():
        if flag is not True and flag is not False:
            check_flags(**flags)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        check_choice("reduction", reduction, "mean", "sum", "none")
    if group is None and is_dynamo_compiling():
        return  # compiled code is guarded for each option that it looks at
    if not isinstance(strategy, str) or strategy != "auto":
        check_choice("strategy", strategy, *STRATEGIES)
    if not isinstance(grad_reduce, str) or grad_reduce != "mean":
        check_choice("grad_reduce", grad_reduce, *GRAD_REDUCES)
    if group is None:
        alone()
    elif not torch.compiler.is_compiling():
        check_group(group)


def scale_of(
    temperature: float | Tensor,
    logit_scale: float | Tensor | None,
    like: Tensor | None = None,
    ranks: Ranks | None = None,
) -> float | Tensor:
    """What the dot products are multiplied by: logit_scale, or else 1 / temperature; `replicated`. Tensors are never
    read."""
    if logit_scale is None and type(temperature) is float and 2.0**-100 < temperature < 2.0**100:
        return 1.0 / temperature
    if logit_scale is not None:
        value = scalar("logit_scale", logit_scale, like)
    else:
        value = scalar("temperature", temperature, like)
    if ranks is not None:
        value = replicated(value, ranks)
    if logit_scale is not None:
        return value
    if isinstance(value, Tensor):
        return value.reciprocal()
    if value == 0:
        raise ValueError("temperature must not be 0: similarities are divided by it")
    if not -FLOAT32_MAX <= 1.0 / value <= FLOAT32_MAX:
        raise ValueError(f"temperature must not be so near to 0 that fp32 cannot hold its inverse, not {value!r}")
    return 1.0 / value


def scalar(name: str, value: float | Tensor, like: Tensor | None = None) -> float | Tensor:
    """A float that fp32 can hold, or a 0-d tensor on the device of the features `like`, of at least 32 bits, and of 64
    beside features of 64: in fewer, what is computed from it would lose digits."""
    if not isinstance(value, Tensor):
        return check_finite(name, value, " or a tensor with one element")
    if (
        value.layout is torch.strided
        and not value.is_nested
        and value.ndim == 0
        and value.dtype == torch.float32
        and isinstance(like, Tensor)
        and like.dtype != torch.float64
        and like.device == value.device
    ):
        return value
    if value.numel() != 1:
        wanted = "a number or a tensor with one element"
        raise ValueError(f"{name} must be {wanted}, not {describe(value)}" + _hint(value))
    check_dense(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, not {value.dtype}; convert it with .float()")
    value = value.reshape(())
    if not isinstance(like, Tensor):
        return wide(value)
    check_device(name, value, like)
    if like.dtype == torch.float64:
        return value.double()
    return wide(value)


def _hint(x: object, D: int = 0) -> str:
    """What x, which does not fit, may have been meant as. D: features of a queue, if it could be one."""
    if not isinstance(x, Tensor):
        return ""
    if x.ndim == 1 and not x.dtype.is_floating_point:
        return "; if these are labels, pass them as ids=, or to sup_con"
    if D and x.ndim == 2 and x.shape[0] == D:
        return "; a queue (D, K) is passed as .queue.t()"
    return ""
