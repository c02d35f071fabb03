"""GradCache (https://github.com/luyug/GradCache): `gradcache` 0.0.1 of PyPI, which is the repository as it stands.

    from sslkern.compat.grad_cache import GradCache, SimpleContrastiveLoss, cached

It is grad_cache with its modules loss, functional and context_managers, and does not import it.
docs/migrate_grad_cache.md has the differences.
"""

from collections import UserDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..common.arguments import FLOATS
from ..common.autocast import autocast_active
from ..common.rows import dots
from ..common.sums import pair_loss, total
from ..functional import info_nce, mnrl
from ..functional.checks import check_alike, check_features, promoted
from ..functional.formulas import reduce
from ..ops import similarity_lse
from ._dense import few, warn_once
from ._types import typed_as

FEW_SCORES = 2**20  # N x M up to which, on a CPU, storing them is quicker; measured from 32 to 768 features
IGNORED = -100  # the target of a row that does not count, as cross-entropy has it


# ---- the step --------------------------------------------------------------------------------------------------------


class GradCache:
    """A step over a large batch with the memory of a small one: `cache_step`, or a call, leaves in the parameters of
    the models the gradient of a loss of the whole batch. The optimizer's step, unscaling included, is the caller's.

    `sslkern.CachedLoss` is the same method as a loss with a graph of its own, whose buffers and hooks see one forward
    and one backward. Here each chunk goes through its model twice, and each time as any batch does: running statistics
    are updated by both forwards, hooks and reductions over processes run for each chunk, and every method may be
    replaced in a class that inherits.

    Args:
        models: one for each input; the same one may be named several times.
        chunk_sizes: rows that go through a model at a time: a number, or one for each model.
        loss_fn: called with the representations of each model, as one tensor, and the keyword arguments of the step.
        split_input_fn: cuts an input into chunks of a size; None: see `split_inputs`.
        get_rep_fn: the representations from what a model returned; None: it returned them.
        fp16: run models and loss under CUDA's autocast, and scale the loss.
        scaler: what scales it, a `GradScaler`.

    Example:
        >>> from sslkern.compat.grad_cache import GradCache, SimpleContrastiveLoss
        >>> models = torch.nn.Linear(32, 16), torch.nn.Linear(24, 16)
        >>> step = GradCache(models, chunk_sizes=[16, 64], loss_fn=SimpleContrastiveLoss())
        >>> loss = step(torch.randn(64, 32), torch.randn(64, 24), reduction="mean")
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        chunk_sizes: int | Sequence[int],
        loss_fn: Callable[..., Tensor],
        split_input_fn: Callable[[Any, int], Any] | None = None,
        get_rep_fn: Callable[..., Tensor] | None = None,
        fp16: bool = False,
        scaler: Any = None,
    ):
        self.models = models
        self.chunk_sizes = [chunk_sizes] * len(models) if isinstance(chunk_sizes, int) else chunk_sizes
        self.loss_fn = loss_fn
        self.split_input_fn = split_input_fn
        self.get_rep_fn = get_rep_fn
        assert scaler is not None or not fp16, "scaler must be a GradScaler where fp16 is True"
        self.fp16 = fp16
        self.scaler = scaler
        self._get_input_tensors_strict = False  # whether `get_input_tensors` refuses what it does not know

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.cache_step(*args, **kwargs)

    def cache_step(self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any) -> Tensor:
        """The loss, without a graph, after its backward.

        model_inputs: one for each model; others are not looked at.
        no_sync_except_last: models, which are `DistributedDataParallel` then, reduce gradients with their last chunk.
        """
        if no_sync_except_last:
            parallel = (isinstance(model, nn.parallel.DistributedDataParallel) for model in self.models)
            assert all(parallel), "models must all be DistributedDataParallel where no_sync_except_last is True"
        sizes = self.chunk_sizes
        inputs = [self.split_inputs(x, size) for x, size in zip(model_inputs, sizes, strict=False)]
        embedded = [self.forward_no_grad(model, x) for model, x in zip(self.models, inputs, strict=False)]
        gradients, loss = self.build_cache(*(reps for reps, _ in embedded), **loss_kwargs)
        for model, x, (_, states), gradient, size in zip(self.models, inputs, embedded, gradients, sizes, strict=False):
            self.forward_backward(model, x, gradient.split(size), states, no_sync_except_last=no_sync_except_last)
        return loss

    def split_inputs(self, model_input: Any, chunk_size: int) -> list:
        """Chunks of a tensor, of a list or dict of tensors, or of a tuple of a list and a dict."""
        if self.split_input_fn is not None:
            return self.split_input_fn(model_input, chunk_size)
        if isinstance(model_input, Tensor):
            return list(model_input.split(chunk_size))
        if isinstance(model_input, list) and _are_tensors(model_input):
            return [list(chunk) for chunk in zip(*(x.split(chunk_size) for x in model_input), strict=False)]
        if isinstance(model_input, (dict, UserDict)) and _are_tensors(model_input.values()):
            chunks = zip(*(x.split(chunk_size) for x in model_input.values()), strict=False)
            return [dict(zip(model_input, chunk, strict=True)) for chunk in chunks]
        if _is_call(model_input):
            return list(zip(*(self.split_inputs(part, chunk_size) for part in model_input), strict=False))
        raise NotImplementedError(
            f"split_inputs cannot cut a {type(model_input).__name__} into chunks; pass a split_input_fn that does"
        )

    def get_input_tensors(self, model_input: Any) -> list[Tensor]:
        """The tensors in an input, on whose devices the random state is kept."""
        if isinstance(model_input, Tensor):
            return [model_input]
        if isinstance(model_input, (dict, UserDict)):
            model_input = list(model_input.values())
        if isinstance(model_input, (list, tuple)):
            return [x for part in model_input for x in self.get_input_tensors(part)]
        if self._get_input_tensors_strict:
            raise NotImplementedError(f"get_input_tensors does not know a {type(model_input).__name__}; override it")
        return []

    def model_call(self, model: nn.Module, model_input: Any) -> Any:
        """What the model returns for a chunk: of a list called with its elements, of a dict with keyword arguments."""
        with self._autocast():
            if isinstance(model_input, Tensor):
                return model(model_input)
            if isinstance(model_input, list):
                return model(*model_input)
            if isinstance(model_input, (dict, UserDict)):
                return model(**model_input)
            if _is_call(model_input):
                args, kwargs = model_input
                return model(*args, **kwargs)
            raise NotImplementedError(f"model_call cannot call with a {type(model_input).__name__}; override it")

    def get_reps(self, model_out: Any) -> Tensor:
        return model_out if self.get_rep_fn is None else self.get_rep_fn(model_out)

    def compute_loss(self, *reps: Tensor, **loss_kwargs: Any) -> Tensor:
        return self.loss_fn(*reps, **loss_kwargs)

    def forward_no_grad(self, model: nn.Module, model_inputs: Any) -> tuple[Tensor, list["RandContext"]]:
        """The representations of all chunks, and the random state before each."""
        reps, states = [], []
        with torch.no_grad():
            for x in model_inputs:
                states.append(RandContext(*self.get_input_tensors(x)))
                reps.append(self.get_reps(self.model_call(model, x)))
        return torch.cat(reps), states

    def build_cache(self, *reps: Tensor, **loss_kwargs: Any) -> tuple[list[Tensor], Tensor]:
        """The gradient of the loss for each of the representations, and the loss."""
        leaves = [x.detach().requires_grad_() for x in reps]
        with self._autocast():
            loss = self.compute_loss(*leaves, **loss_kwargs)
        (self.scaler.scale(loss) if self.fp16 else loss).backward()
        return [_gradient_of(x) for x in leaves], loss.detach()

    def forward_backward(
        self,
        model: nn.Module,
        model_inputs: Any,
        cached_gradients: Sequence[Tensor],
        random_states: Sequence["RandContext"],
        no_sync_except_last: bool = False,
    ) -> None:
        """The second forward of each chunk, in the random state of the first, and its backward."""
        last = len(model_inputs) - 1
        for i, (x, gradient, state) in enumerate(zip(model_inputs, cached_gradients, random_states, strict=False)):
            with model.no_sync() if no_sync_except_last and i < last else nullcontext():  # type: ignore[operator]
                with state:
                    out = self.model_call(model, x)
                _send_on([self.get_reps(out)], [gradient])

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast("cuda", torch.float16) if self.fp16 else nullcontext()


def _are_tensors(given: Iterable[Any]) -> bool:
    return all(isinstance(x, Tensor) for x in given)


def _is_call(model_input: Any) -> bool:
    """Whether it is a tuple of arguments and keyword arguments."""
    return isinstance(model_input, tuple) and [*map(type, model_input)] == [list, dict]


def _gradient_of(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise AttributeError(
            "the loss must depend on all representations, for one has no gradient; leave out its model"
        )
    return leaf.grad


def _send_on(reps: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """The backward of all that came before the representations: their products with the gradients have those."""
    products = [torch.dot(x.flatten(), g.flatten()) for x, g in zip(reps, gradients, strict=True)]
    sum(products[1:], products[0]).backward()


class RandContext:
    """The random state as it is now, of the CPU and of the GPUs that hold the tensors. Within `with` it is so again,
    and afterwards as if nothing had been drawn there."""

    def __init__(self, *tensors: Tensor):
        self.fwd_cpu_state = torch.get_rng_state()
        self.fwd_gpu_devices, self.fwd_gpu_states = get_device_states(*tensors)

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(self.fwd_gpu_devices)
        self._fork.__enter__()
        torch.set_rng_state(self.fwd_cpu_state)
        set_device_states(self.fwd_gpu_devices, self.fwd_gpu_states)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


# ---- losses ----------------------------------------------------------------------------------------------------------


class SimpleContrastiveLoss:
    """The cross-entropy of each query with the passages of all. Formula: `sslkern.functional.info_nce` with the
    temperature 1, of features as they are.

    Args:
        n_hard_negatives: passages that follow the positive of each query and are its hard negatives.

    Example:
        >>> from sslkern.compat.grad_cache import SimpleContrastiveLoss
        >>> queries, passages = torch.randn(32, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
        >>> SimpleContrastiveLoss(n_hard_negatives=1)(queries, passages).backward()
    """

    def __init__(self, n_hard_negatives: int = 0):
        self.target_per_qry = n_hard_negatives + 1

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Of queries x [N, D] and passages y [M, D]. target: int64 [N], the passage of each query; one of -100 does not
        count. reduction: "mean" or "sum" over the queries, or "none"."""
        if target is None:
            self._check_sizes(x, y)
        why = _why_dense(x, y, target)
        if why:
            warn_once(self, why)
        # The mean over nothing is NaN.
        if why or len(x) == 0 or few(x, len(x) * len(y), FEW_SCORES):
            if target is None:
                target = self._targets(x)
            return F.cross_entropy(x @ y.T, target, reduction=reduction)
        if target is None and self.target_per_qry == 1:
            loss = info_nce(x, y, temperature=1.0, normalize=False, reduction=reduction, group="self")
        else:
            loss = _over_targets(x, y, self._targets(x) if target is None else target, reduction)
        return typed_as(loss, x)

    def _targets(self, x: Tensor) -> Tensor:
        return torch.arange(0, x.shape[0] * self.target_per_qry, self.target_per_qry, device=x.device)

    def _check_sizes(self, x: Tensor, y: Tensor) -> None:
        each = self.target_per_qry
        assert x.shape[0] * each == y.shape[0], f"y must have {each} rows for each of the {len(x)} of x, not {len(y)}"


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    """The same over the queries and passages of all ranks. Each has their loss, and of its gradient what belongs to
    its own rows: what `DistributedDataParallel` averages is the gradient of the whole batch over the number of ranks.

    Args:
        n_hard_negatives: as in `SimpleContrastiveLoss`.
    """

    def __init__(self, n_hard_negatives: int = 0):
        assert dist.is_initialized(), "torch.distributed must be initialized; call init_process_group before"
        super().__init__(n_hard_negatives)
        self.word_size = dist.get_world_size()
        self.rank = dist.get_rank()

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        as_made = type(self).gather_tensor is DistributedContrastiveLoss.gather_tensor
        if not as_made or target is not None or reduction == "none" or _why_dense(x, y, target):
            return super().__call__(self.gather_tensor(x), self.gather_tensor(y), target, reduction)
        self._check_sizes(x, y)
        options: dict[str, Any] = dict(temperature=1.0, normalize=False, reduction=reduction, grad_reduce="sum")
        if self.target_per_qry == 1:
            return typed_as(info_nce(x, y, group="world", **options), x)
        positive, *negatives = y.view(len(x), self.target_per_qry, -1).unbind(1)
        return typed_as(mnrl(x, positive, negatives, group="world", **options), x)

    def gather_tensor(self, t: Tensor) -> Tensor:
        """The rows of all ranks, of which those of this one have a gradient."""
        return _gathered(t, 0)


class ContrastiveLossWithQueryClosure(SimpleContrastiveLoss):
    """The same of queries and passages, or of passages alone and a function that returns the queries."""

    def __call__(  # type: ignore[override]  # as there
        self,
        *reps: Tensor,
        query_closure: Callable[[], Tensor] | None = None,
        target: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        if len(reps) not in (1, 2):
            raise ValueError(f"reps must be 1 or 2 tensors, not {len(reps)}")
        wanted = "None beside two tensors" if len(reps) == 2 else "a function beside one tensor"
        assert (query_closure is None) == (len(reps) == 2), f"query_closure must be {wanted}"
        y = reps[-1]
        x = reps[0] if query_closure is None else query_closure()
        return super().__call__(x, y, target, reduction)


def _why_dense(x: Tensor, y: Tensor, target: Tensor | None) -> str | None:
    """What the fused loss cannot do, if anything, and what to change."""
    if x.ndim != 2 or y.ndim != 2 or x.dtype not in FLOATS:
        return "x and y are no floating-point tensors [N, D]; make them such"
    if x.dtype != y.dtype and not autocast_active(x.device.type):
        return "x and y have several types; convert one"
    if target is not None and (target.dtype != torch.int64 or target.ndim != 1):
        return "target does not name one passage for each query; pass int64 [N]"
    return None


def _over_targets(x: Tensor, y: Tensor, target: Tensor, reduction: str) -> Tensor:
    x, y = promoted(x, y)
    check_features("x", x)
    check_alike("y", y, "x", x, "[M, D]")
    ignored = target == IGNORED
    target = target.masked_fill(ignored, 0)
    positive = dots(x, y.index_select(0, target))
    negative = similarity_lse(x, y, q_ids=target, k_ids=torch.arange(len(y), device=y.device))
    losses = pair_loss(negative, positive).masked_fill(ignored, 0)
    if reduction == "mean":
        return total(losses) / (~ignored).sum()
    return reduce(losses, reduction)


# ---- decorators ------------------------------------------------------------------------------------------------------


def cached(func: Callable[..., Any], *, devices_of: Iterable[Tensor] = ()) -> Callable[..., tuple]:
    """A function that embeds, as one that does so without a graph: it returns the representations, leaves of a graph
    to come, and another function. That one, called with those leaves after the backward of a loss, embeds once more,
    with a graph, and sends their gradients on.

    devices_of: tensors on whose GPUs the random state is repeated too. GradCache repeats that of the CPU alone, so that
        dropout on a GPU drops others the second time; `devices_of=model.parameters()` corrects that.
    """
    tensors = tuple(devices_of)

    @wraps(func)
    def embed(*args: Any, **kwargs: Any) -> tuple:
        state = RandContext(*tensors)
        with torch.no_grad():
            reps = _as_tuple(func(*args, **kwargs))
        assert _are_tensors(reps), "the function must return a tensor, or several"

        @wraps(func)
        def embed_again(cache_reps: Tensor | Sequence[Tensor]) -> None:
            with state:
                reps = _as_tuple(func(*args, **kwargs))
            leaves = _as_tuple(cache_reps)
            assert len(reps) == len(leaves), (
                f"cache_reps must be {len(reps)}, as the function returned, not {len(leaves)}"
            )
            _send_on(reps, [_gradient_of(x) for x in leaves])

        return *(x.detach().requires_grad_() for x in reps), embed_again

    return embed


def cat_input_tensor(func: Callable[..., Any]) -> Callable[..., Any]:
    """A loss that is given lists of tensors, of chunks, and takes each as one tensor."""
    return _with_arguments(func, lambda x: torch.cat(x) if isinstance(x, list) and x and _are_tensors(x) else x)


def gather_input_tensor(func: Callable[..., Any], axis: int = 0) -> Callable[..., Any]:
    """A loss that takes the tensors of all ranks, joined along an axis; those of this rank have a gradient."""
    return _with_arguments(func, lambda x: _gathered(x, axis) if isinstance(x, Tensor) else x)


def _with_arguments(func: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    @wraps(func)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return func(*map(change, args), **{name: change(x) for name, x in kwargs.items()})

    return changed


def _as_tuple(x: Any) -> tuple:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def _gathered(x: Tensor, axis: int) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    parts[dist.get_rank()] = x
    return torch.cat(parts, axis)
