"""What the losses share: argument checks, normalisation, and the few formulas that need care."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import resolve
from ..backends.reference.join import autocast_active, cat, stack
from ..backends.reference.sums import mean, softplus, times, total
from ..ops import similarity_lse
from ..ops._arguments import FLOATS, check_choice, check_dense, check_device, check_flags, describe
from ..ops._library import transformed
from ..ops._numbers import FLOAT32_MAX, check_finite
from ..ops._tensors import plain
from ..ops.pair_contrast import pair_contrast
from ..ops.similarity_lse import small
from ..ops.unit_pairs import UnitPairs

EPS = 1e-12  # rows shorter than this are divided by it


def check_features(name: str, x: Tensor) -> None:
    """x: [N, D] with N > 0, floating point."""
    check_dense(name, x)
    if not isinstance(x, Tensor) or x.ndim != 2:
        raise ValueError(f"{name} must be a tensor [N, D], not {describe(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, not {x.dtype}; convert it with .float()")
    if x.shape[0] == 0:
        raise ValueError(f"{name} is empty; the loss needs at least one row, so skip empty batches")


def promoted(*features):
    """Inside autocast, features of several types in the widest of them, as torch does with what it does not round: an
    encoder's output in bf16 meets a queue in fp32. Elsewhere, and what is no such tensor, as it is: the checks say so.
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
    fits = isinstance(x, Tensor) and (x.shape == other.shape if shape is None else x.shape[-1:] == other.shape[-1:])
    if not fits:
        wanted = list(other.shape) if shape is None else shape
        raise ValueError(
            f"{name} must be a tensor {wanted} to go with {other_name} {list(other.shape)}, not {describe(x)}"
            + _hint(x, shape is not None and other.shape[-1])
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


def check_options(reduction: str, group=None, strategy: str = "all_gather", **flags: bool) -> None:
    """flags: the options that are True or False."""
    check_flags(**flags)
    check_choice("reduction", reduction, "mean", "sum", "none")
    check_choice("strategy", strategy, "all_gather", "ring")
    if group is not None:
        raise NotImplementedError("group must be None: losses across processes are not available yet")


def scale_of(
    temperature: float | Tensor, logit_scale: float | Tensor | None, like: Tensor | None = None
) -> float | Tensor:
    """What the dot products are multiplied by: logit_scale, or else 1 / temperature. Tensors are never read."""
    if logit_scale is not None:
        return scalar("logit_scale", logit_scale, like)
    value = scalar("temperature", temperature, like)
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
    return value.double() if like.dtype == torch.float64 else wide(value)


def _hint(x, D: int | bool = False) -> str:
    """What x, which does not fit, may have been meant as. D: features of each row of a queue, if it could be one."""
    if not isinstance(x, Tensor):
        return ""
    if x.ndim == 1 and not x.dtype.is_floating_point:
        return "; if these are labels, pass them as ids=, or to sup_con"
    return "; a queue (D, K) is passed as .queue.t()" if D and x.ndim == 2 and x.shape[0] == D else ""


def unit(x: Tensor) -> Tensor:
    """Rows of x [.., D] divided by their norm, which is computed in fp32; rounded back to the type of x.

    A row of zeros gets a gradient divided by EPS, as torch has it, which in fp16 would be infinite and is 0.
    """
    if x.dtype == torch.float16:
        norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
        return (x.float() / norm.masked_fill(norm < EPS, math.inf)).to(x.dtype)
    if x.dtype == torch.bfloat16:
        return F.normalize(x.float(), dim=-1, eps=EPS).to(x.dtype)
    return F.normalize(x, dim=-1, eps=EPS)


def unit_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x and y [N, D] divided by their norms, and their cosine [N], in fp32 (fp64)."""
    # The compiler fuses the formula with its surroundings.
    if torch.compiler.is_compiling() or transformed() or not plain(x, y):
        x, y = unit(x), unit(y)
        return x, y, dots(x, y)
    return UnitPairs.apply(x, y, resolve("unit_pairs", x))


def dots(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> [N] of rows a, b [N, D], in fp32 (fp64)."""
    return (wide(a) * wide(b)).sum(-1)


def wide(x: Tensor) -> Tensor:
    """x in the type that sums run in: fp32 of 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def pair_loss(negative: Tensor, positive: Tensor) -> Tensor:
    """softplus(negative - positive), the loss of a row from the log-sum-exp of its negatives and its positive.

    NaN where one of them is +inf, as in cross-entropy: an overflow must not pass for a loss of 0.
    """
    gap = torch.add(negative - positive, torch.maximum(negative.detach(), positive.detach()), alpha=0)
    return softplus(gap)


def contrast(x, y, scale, ids, mode, normalize, best, bank=None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, positives and best negatives of `pair_contrast`, whose arguments these are; where the compiler does
    better, or torch.func is at work, from its formulas."""
    rows = 2 * x.shape[0] if mode == "views" else x.shape[0]
    frozen = mode == "one_way" and (bank is not None or not y.requires_grad)  # what may be overwritten is not kept
    traced = torch.compiler.is_compiling() and not frozen and small(x, rows, rows)
    if not transformed() and not traced:
        return pair_contrast(x, y, scale, ids, mode, normalize, best, bank)
    N = x.shape[0]
    if traced and ids is None and N > 1:
        return _few_pairs(*((unit(x), unit(y)) if normalize else (x, y)), scale, mode, best)
    if ids is None and bank is None:
        ids = torch.arange(N, device=x.device)
    x, y = (unit(x), unit(y)) if normalize else (x, y)
    positive = times(dots(x, y), scale)
    # Equal ids leave the positive out of its row: softplus(negatives - positive) keeps its relative accuracy when the
    # loss is tiny, where the logsumexp over both minus the positive would cancel.
    if bank is not None:
        out = similarity_lse(x, bank, scale, best=best)
    elif mode == "views":
        out = similarity_lse(cat((x, y)), scale=scale, q_ids=ids.repeat(2), best=best)
    else:
        out = similarity_lse(x, y, scale, q_ids=ids, k_ids=ids, columns=mode == "two_way", best=best)
    *negatives, top = out if best else (*(out if isinstance(out, tuple) else (out,)), None)
    negatives = negatives[0].view(2, N) if mode == "views" else negatives
    return _each_side(negatives, positive), positive.detach(), None if top is None else top.view(-1, N)


def _each_side(negatives: Sequence[Tensor], positive: Tensor) -> Tensor:
    """softplus(negatives - positive) [sides, N]; stacked before that, the inductor of torch 2.13 computes gradients
    that are wrong (where the scale is a tensor)."""
    return stack([pair_loss(side, positive) for side in negatives])


def _few_pairs(x, y, scale, mode, best):
    """`contrast` of at least two rows that all differ, for the compiler: every row has a negative, so nothing is
    guarded."""
    N = x.shape[0]
    q, k = (cat((x, y)),) * 2 if mode == "views" else (x, y)
    s = wide(q @ k.mT) * scale
    positive = times(dots(x, y), scale)
    row = torch.arange(s.shape[0], device=s.device)
    apart = row.unsqueeze(1) - row
    s = s.masked_fill((apart == 0) | (apart.abs() == N), -math.inf)
    sides = (1, 0) if mode == "two_way" else (1,)
    negatives = [half for side in sides for half in s.logsumexp(side).view(-1, N)]
    top = stack([s.amax(side) for side in sides]).view(-1, N).detach() if best else None
    return _each_side(negatives, positive), positive.detach(), top


def beaten(best: Tensor, positive: Tensor) -> Tensor:
    """The share of rows whose positive beats every negative, 0-d."""
    return (best < positive.detach()).float().mean()


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), with zero gradient instead of NaN where both are -inf."""
    empty = (a == -math.inf) & (b == -math.inf)
    return torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)).masked_fill(empty, -math.inf)


def reduce(losses: Tensor, reduction: str, weights: Tensor | None = None) -> Tensor:
    """losses [.., N] and weights [N]: sum w l / sum w for "mean" (0 where all weights are 0), sum w l, or w l."""
    if weights is None:
        return mean(losses) if reduction == "mean" else total(losses) if reduction == "sum" else losses
    weights = weights.to(losses.dtype).expand_as(losses)
    losses = weights * losses
    if reduction == "none":
        return losses
    share = total(weights)
    return total(losses) / share.masked_fill(share == 0, 1) if reduction == "mean" else total(losses)
