"""Matryoshka: Kusupati et al., "Matryoshka Representation Learning", 2022."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ._common import unit


def matryoshka(
    loss_fn: Callable[..., Tensor], dims: Sequence[int], weights: Sequence[float] | None = None, normalize: bool = True
) -> Callable[..., Tensor]:
    """Makes of a loss one that also holds for prefixes of the features (eq. 1 of https://arxiv.org/abs/2205.13147).

        loss(z, ...) = sum_m weights_m loss_fn(first dims_m features of z, normalised again, ...)

    Which pairs are positives and negatives is up to `loss_fn`.

    Args:
        loss_fn: any loss of this package or one like it, function or module, that returns a tensor. Of its arguments,
            by position or name, all floating-point tensors [.., D] with two or more dimensions are cut; others, such as
            labels, weights of samples and scales, go on as they are. Not a loss with features of its own (`MoCoLoss`).
        dims: the prefix lengths, each from 1 to D.
        weights: a number for each of dims. Default: all 1.
        normalize: divide the rows of each prefix by their norm.

    Returns:
        A function of the arguments of `loss_fn`.

    Raises:
        ValueError: dims or weights do not fit, at once; or, when called, an argument has fewer features.

    Example:
        >>> loss_fn = sslkern.functional.matryoshka(sslkern.functional.nt_xent, dims=[16, 32, 64])
        >>> loss = loss_fn(torch.randn(32, 64), torch.randn(32, 64), temperature=0.1)
    """
    dims = tuple(dims)
    if not dims or not all(isinstance(d, int) and d > 0 for d in dims):
        raise ValueError(f"dims must be positive integers, at least one, not {list(dims)}")
    weights = (1.0,) * len(dims) if weights is None else tuple(weights)
    if len(weights) != len(dims):
        raise ValueError(f"weights must have a number for each of the {len(dims)} dims, not {len(weights)}")

    def prefix(x, d: int):
        if not isinstance(x, Tensor) or x.ndim < 2 or not x.dtype.is_floating_point:
            return x
        if x.shape[-1] < d:
            raise ValueError(f"dims must not exceed the number of features, {x.shape[-1]}, but has {d}")
        return unit(x[..., :d]) if normalize else x[..., :d]

    def loss_of_prefixes(*features, **options) -> Tensor:
        total = 0
        for d, weight in zip(dims, weights, strict=True):
            cut = {name: prefix(x, d) for name, x in options.items()}
            total = total + weight * loss_fn(*(prefix(x, d) for x in features), **cut)
        return total

    return loss_of_prefixes
