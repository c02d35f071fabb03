"""Matryoshka: Kusupati et al., "Matryoshka Representation Learning", 2022."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.arguments import FLOATS, check_dense, check_flags, describe
from ..common.numbers import check_finite, check_size, shown
from ..common.rows import unit
from ..common.tensors import TensorOrTuple


def matryoshka(
    loss_fn: Callable[..., Tensor], dims: Sequence[int], weights: Sequence[float] | None = None, normalize: bool = True
) -> Callable[..., Tensor]:
    """Makes of a loss one that also holds for prefixes of the features (eq. 1 of https://arxiv.org/abs/2205.13147).

        loss(z, ...) = sum_m weights_m loss_fn(first dims_m features of z, normalised again, ...)

    Which pairs are positives and negatives is up to `loss_fn`.

    Args:
        loss_fn: any loss of this package or one like it, function or module. Of its arguments, by position or name, all
            floating-point tensors [.., D] with two or more dimensions are cut, also those in tuples, lists and
            mappings; D is that of the first. Others, such as labels, weights of samples, scales and the features of a
            `guide`, go on as they are. Not a loss with features of its own (`MoCoLoss`).
        dims: the prefix lengths, each from 1 to D.
        weights: a number for each of dims. Default: all 1.
        normalize: divide the rows of each prefix by their norm.

    Returns:
        A function of the arguments of `loss_fn`, which can be pickled and copied if `loss_fn` can. Where `loss_fn`
        returns more than the loss (`stats=True`), the rest is stacked: a share [M] for the M prefixes.

    Raises:
        ValueError, TypeError: an argument does not fit, at once; or, when called, there are fewer features.

    Example:
        >>> loss_fn = sslkern.functional.matryoshka(sslkern.functional.nt_xent, dims=[16, 32, 64])
        >>> loss = loss_fn(torch.randn(32, 64), torch.randn(32, 64), temperature=0.1)
    """
    dims, weights = checked_prefixes(loss_fn, dims, weights, normalize)
    return functools.partial(loss_of_prefixes, loss_fn, dims, weights, normalize)


def checked_prefixes(
    loss_fn: Callable[..., Any], dims: Sequence[int], weights: Sequence[float] | None, normalize: bool
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a loss, a function or a module, not {describe(loss_fn)}")
    check_flags(normalize=normalize)
    given = _listed(dims)
    if not given:
        raise ValueError(f"dims must be positive integers, at least one, not {shown(dims)}")
    given = tuple(check_size("each of dims", d) for d in given)
    if weights is None:
        return given, (1.0,) * len(given)
    factors = _listed(weights)
    if isinstance(weights, Tensor) and weights.ndim == 1 and weights.layout == torch.strided and not weights.is_meta:
        factors = tuple(w.item() for w in weights)  # subclasses have no tolist()
    if len(factors) != len(given):
        raise ValueError(f"weights must have a number for each of the {len(given)} dims, not {shown(weights)}")
    return given, tuple(check_finite("each of weights", w) for w in factors)


def _listed(x: object) -> tuple[Any, ...]:
    """What is in x, which is to be a list or the like; nothing where it is something else."""
    if isinstance(x, Iterable) and not isinstance(x, (str, Tensor)):
        return tuple(x)
    return ()


def loss_of_prefixes(
    loss_fn: Callable[..., Any],
    dims: Sequence[int],
    weights: Sequence[float],
    normalize: bool,
    /,
    *features: Any,
    **options: Any,
) -> TensorOrTuple:
    arguments = {"features": features, "options": options}
    D = _width(arguments)
    if D is not None and max(dims) > D:
        raise ValueError(f"dims must not exceed the number of features, {D}, but has {max(dims)}")
    parts = []
    for d in dims:
        cut = _prefix(arguments, d, D, normalize)
        parts.append(loss_fn(*cut["features"], **cut["options"]))
    if not isinstance(parts[0], tuple):
        return _weighted_sum(weights, parts)
    losses, *others = zip(*parts, strict=True)
    return _weighted_sum(weights, losses), *map(torch.stack, others)


def _weighted_sum(weights: Sequence[float], losses: Sequence[Tensor]) -> Tensor:
    weighted = (weight * loss for weight, loss in zip(weights, losses, strict=True))
    return sum(weighted)  # type: ignore[return-value]  # of one at least


def _is_features(x: Any) -> bool:
    # nested ones have no width: the loss refuses them
    return isinstance(x, Tensor) and x.ndim >= 2 and x.dtype in FLOATS and not x.is_nested


def _width(x: Any) -> int | None:
    """The number of features of the first tensor that has any."""
    if _is_features(x):
        return x.shape[-1]
    for one in _items(x):
        if (width := _width(one)) is not None:
            return width
    return None


def _items(x: object) -> Sequence[Any]:
    if isinstance(x, Mapping):
        return [one for name, one in x.items() if name != "guide"]
    if isinstance(x, (tuple, list)):
        return x
    return ()


def _prefix(x: Any, d: int, D: int | None, normalize: bool) -> Any:
    """x with the first d of D features of each tensor; of another model's, the guide's, all."""
    if _is_features(x) and x.shape[-1] == D:
        check_dense("features", x)
        x = x[..., :d]
        return unit(x) if normalize else x
    if isinstance(x, Mapping):
        return {name: one if name == "guide" else _prefix(one, d, D, normalize) for name, one in x.items()}
    if isinstance(x, (tuple, list)):
        return getattr(x, "_make", list)(_prefix(one, d, D, normalize) for one in x)  # of a named tuple
    return x
