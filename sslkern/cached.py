"""`CachedLoss`: one exact loss over a large batch with the memory of a small one."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.utils import parametrize

from .common.arguments import check_dense, describe
from .common.numbers import check_size
from .common.tensors import map_given, transformed

Encoder = nn.Module | MethodType


class CachedLoss:
    """Gradient caching: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.

    Section 3.2 of https://arxiv.org/abs/2101.06983. Every sample of a batch is a negative of the others, so the loss
    needs the features of all, but the encoder does not: (1) embed the batch in chunks, without a graph; (2) one loss
    over all features; in the backward (3) its gradient for each feature, and (4) embed each chunk again, now with a
    graph, and send the gradient of its features on. Activations exist for one chunk at a time; the price is a second
    forward. Loss and gradients are those of the whole batch:

        images ─ chunk by chunk ─> features ─┐                 step 1: no graph
                                             ├─> loss          step 2
        texts  ─ chunk by chunk ─> features ─┘
        parameters <─ chunk by chunk ─ gradient of features    steps 3, 4: in loss.backward()

    What the call returns is what `loss` returns, an ordinary node of the graph: scale it (`GradScaler`), add to it,
    give it to `torch.autograd.grad`. Parameters of the loss, such as a temperature, get their gradients as ever.

    Each chunk is embedded again as it was: in the same random state (dropout), of the CPU and the devices that hold the
    encoder and its inputs, under the same autocast, in the same mode (`train`, `eval`), and from the buffers that it
    started from (spectral normalisation). Random numbers from elsewhere (`random`, NumPy) and what an encoder keeps
    outside its buffers are not repeated. Buffers keep what step 1 left in them, so that running statistics are updated
    once. Batch normalisation normalises with the statistics of a chunk, not of the batch: there the chunk size is part
    of the model.

    Hooks on parameters, and the reduction of a `DistributedDataParallel`, which is to be the encoder itself, run once,
    with the gradient of all chunks; those on modules, and the reductions of `fully_shard`, for each chunk. An encoder
    may be compiled, and hold checkpoints of either kind.

    Args:
        encoder: a module, or a method of one (`model.encode_image`), for all inputs; or a tuple or list of them, one
            for each input. It takes one argument and returns a tensor, or a tuple, list or mapping of tensors, with one
            row for each row of its input.
        loss: called with the features of each input, in order.
        chunk_size: rows that are embedded at a time; the last chunk may be shorter.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> encoder = torch.nn.Linear(32, 16)
        >>> cached = sslkern.CachedLoss(encoder, sslkern.NTXentLoss(0.1), chunk_size=64)
        >>> cached(torch.randn(256, 32), torch.randn(256, 32)).backward()  # two views, SimCLR

        CLIP, whose temperature is a parameter of the model: keyword arguments go to the loss.

        >>> encode_image, encode_text = torch.nn.Linear(32, 16), torch.nn.Linear(24, 16)
        >>> log_scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())
        >>> cached = sslkern.CachedLoss((encode_image, encode_text), sslkern.InfoNCELoss(two_way=True), chunk_size=64)
        >>> cached(torch.randn(256, 32), torch.randn(256, 24), logit_scale=log_scale.exp()).backward()
    """

    def __init__(
        self, encoder: Encoder | tuple[Encoder, ...] | list[Encoder], loss: Callable[..., Any], chunk_size: int
    ):
        self.encoder = tuple(encoder) if isinstance(encoder, (tuple, list)) else encoder
        for one in _listed(self.encoder):
            if not isinstance(one, nn.Module) and not isinstance(getattr(one, "__self__", None), nn.Module):
                raise TypeError(
                    f"encoder must be a module or a method of one, whose parameters are known, not {describe(one)}; "
                    "write what it does as a module"
                )
        if not callable(loss):
            raise TypeError(f"loss must be a function or module of features, not {describe(loss)}")
        self.loss = loss
        self.chunk_size = check_size("chunk_size", chunk_size)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The loss of the features of inputs, each a tensor [N, ...], or a tuple, list or mapping of them (a tokenised
        text) with the same N; what else these hold goes to the encoder as it is. `options` go to the loss."""
        if transformed():
            raise NotImplementedError(
                "CachedLoss runs neither under torch.func nor in forward mode; call the loss itself"
            )
        encoders = _listed(self.encoder)
        if not isinstance(self.encoder, tuple):
            encoders *= len(inputs)
        if len(encoders) != len(inputs) or not inputs:
            raise ValueError(f"inputs must be {len(encoders) or 'at least 1'}, one for each encoder, not {len(inputs)}")
        features = [_embed(encoder, x, self.chunk_size) for encoder, x in zip(encoders, inputs, strict=True)]
        return self.loss(*features, **options)


def _listed(encoder: Encoder | tuple[Encoder, ...]) -> tuple[Encoder, ...]:
    return encoder if isinstance(encoder, tuple) else (encoder,)


def _embed(encoder: Encoder, x: Any, chunk_size: int) -> Any:
    if isinstance(encoder, nn.parallel.DistributedDataParallel):
        # Its forward runs once around all chunks, as around a batch: one broadcast of buffers, one reduction.
        inner, x = encoder.module, _with_tensors(x, _tensors(x))
        encoder.module = _Chunked(inner, chunk_size)
        try:
            return encoder(x)
        finally:
            encoder.module = inner
    cache = _Cache(encoder, x, chunk_size)
    features = _Replayed.apply(cache, *cache.inputs, *cache.learning.values())
    return _with_tensors(cache.structure, iter(features))


class _Chunked(nn.Module):
    """A module that takes a batch in chunks."""

    def __init__(self, module: nn.Module, chunk_size: int):
        super().__init__()
        self.module, self.chunk_size = module, chunk_size

    def forward(self, x: Any) -> Any:
        return _embed(self.module, x, self.chunk_size)


class _Called(nn.Module):
    """An encoder as the forward of a module: where others can stand in for its parameters and buffers."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.method = getattr(encoder, "__func__", None)
        self.module = getattr(encoder, "__self__", encoder)

    def forward(self, x: Any) -> Any:
        # Weights that `parametrize.cached()` keeps have no graph here, or that of the chunk before.
        enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
        try:
            if self.method is None:
                return self.module(x)
            return self.method(self.module, x)
        finally:
            parametrize._cache_enabled = enabled


class _Replayed(torch.autograd.Function):
    """The features of a cache as a function of its inputs and parameters."""

    @staticmethod
    def forward(ctx: Any, cache: "_Cache", *_: Tensor) -> tuple[Tensor, ...]:
        ctx.cache = cache
        ctx.set_materialize_grads(False)
        features = cache.embed()
        ctx.mark_non_differentiable(*(x for x in features if not (x.is_floating_point() or x.is_complex())))
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.cache.replay(grads, ctx.needs_input_grad[1:])


class _Cache:
    """An encoder and its input, and what it takes to embed each chunk once more as it was."""

    def __init__(self, encoder: Encoder, x: Any, chunk_size: int):
        self.encoder = _Called(encoder)
        self._reshard()
        self.x, self.inputs = x, list(_tensors(x))
        self.parameters = dict(self.encoder.named_parameters())
        self.learning = {name: p for name, p in self.parameters.items() if p.requires_grad}
        sizes = {tuple(t.shape[:1]) for t in self.inputs}
        if len(sizes) != 1 or () in sizes:
            shapes = [list(t.shape) for t in self.inputs]
            raise ValueError(f"inputs must hold tensors [N, ...] with one and the same N, not {shapes}")
        for t in self.inputs:
            check_dense("inputs", t)
        ((N,),) = sizes
        # Of no rows, which a rank among others may have, one chunk.
        self.chunks = [slice(i, min(i + chunk_size, N)) for i in range(0, max(1, N), chunk_size)]
        tensors = (*self.inputs, *self.parameters.values())
        self.devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}  # with a random state
        self.autocast: list[dict[str, Any]] = [
            dict(device_type=kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
            for kind in ("cpu", *{device.type for device in self.devices})
            if torch.amp.is_autocast_available(kind)
        ]
        if any(nn.parameter.is_lazy(p) for p in self.parameters.values()):
            raise ValueError(
                "encoder must know the shapes of its parameters; call it once before, as parts of it are lazy"
            )
        self.versions = self._versions()
        self.names = self._names()
        self.modes = self._modes()
        self.replayed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if self.replayed:
            self._check_parallel()
        self.random: list[list[Tensor]] = []  # the state before each chunk
        self.buffers: list[dict[str, Tensor | None]] = []  # likewise; equal ones are one tensor
        self.changing: set[str] = set()  # names of buffers
        self.structure: Any = None  # how the tensors are nested in what the encoder returns

    def _check_parallel(self) -> None:
        for module in self.encoder.modules():
            parallel = isinstance(module, nn.parallel.DistributedDataParallel)
            if parallel and (module.find_unused_parameters or module.static_graph):
                raise TypeError(
                    "encoder must be the DistributedDataParallel itself, not hold one, where it has "
                    "find_unused_parameters or static_graph"
                )

    def embed(self) -> tuple[Tensor, ...]:
        """The features of all chunks."""
        parts = []
        for rows in self.chunks:
            if self.replayed:
                self.random.append(self._random_state())
                self._keep_buffers()
            self.structure = self.encoder(self._copied(t[rows] for t in self.inputs))
            parts.append(list(_tensors(self.structure)))
            if not parts[-1] or any(t.shape[:1] != self.inputs[0][rows].shape[:1] for t in parts[-1]):
                wanted, shapes = rows.stop - rows.start, [list(t.shape) for t in parts[-1]]
                raise ValueError(
                    f"encoder must return tensors [{wanted}, ...] for {wanted} rows of input, not {shapes}"
                )
        self._reshard()
        if self.replayed:
            self._keep_buffers()  # for what the last chunk changes
            self.buffers.pop()
            if self._versions() != self.versions:
                raise RuntimeError("encoder must not change its parameters in place while it embeds; do that before")
            if self._names() != self.names:
                raise RuntimeError("encoder must not make parameters or buffers while it embeds; call it once before")
        torch.clear_autocast_cache()  # older torch keeps casts of weights made here, which have no graph
        with ExitStack() as stack:  # autocast on the CPU joins neither fp64 nor the other 16 bits
            for options in self.autocast:
                stack.enter_context(torch.autocast(options["device_type"], enabled=False))
            return tuple(torch.cat(of_chunks) for of_chunks in zip(*parts, strict=True))

    def replay(self, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of inputs and parameters, where needed, given those of the features.

        The encoder computes with stand-ins of its parameters, leaves on the same memory that add up the gradients of
        all chunks: so hooks on the parameters run once, when these are returned. Of buffers it has those that the
        chunk started from, and those of the module stay as they are.
        """
        if self._versions() != self.versions:
            raise RuntimeError(
                "encoder or inputs were changed in place between the loss and its backward; do that after"
            )
        count = len(self.inputs)
        of_inputs = [torch.zeros_like(t) if need else None for t, need in zip(self.inputs, needed[:count], strict=True)]
        stand_ins = {name: nn.Parameter(p.detach()) for name, p in self.learning.items()}
        random, modes = self._random_state(), self._modes()
        try:
            _set_modes(self.modes)
            for rows, state, buffers in zip(self.chunks, self.random, self.buffers, strict=True):
                self._set_random_state(state)
                changing = {name: x.clone() for name in self.changing if (x := buffers.get(name)) is not None}
                buffers = buffers | changing
                leaves = [x[rows].detach() for x in self.inputs]
                for leaf, total in zip(leaves, of_inputs, strict=True):
                    leaf.requires_grad_(total is not None)
                self._replay_chunk(leaves, stand_ins | buffers, _rows_of(rows, grads))
                for total, leaf in zip(of_inputs, leaves, strict=True):
                    if total is not None and leaf.grad is not None:
                        total[rows] = leaf.grad
        finally:
            self._set_random_state(random)
            _set_modes(modes)
            torch.clear_autocast_cache()
        return [*of_inputs, *(leaf.grad for leaf in stand_ins.values())]

    def _replay_chunk(self, leaves: list[Tensor], state: dict[str, Any], grads: Sequence[Tensor | None]) -> None:
        with torch.enable_grad(), ExitStack() as stack:
            for options in self.autocast:
                stack.enter_context(torch.autocast(**options))
            features = _tensors(functional_call(self.encoder, state, (self._copied(leaves),)))
        ends = [(x, g) for x, g in zip(features, grads, strict=True) if g is not None and x.requires_grad]
        if ends:  # backward, not grad, which checkpoints with use_reentrant=True refuse
            outputs, of_outputs = zip(*ends, strict=True)
            torch.autograd.backward(outputs, of_outputs)

    def _copied(self, inputs: Iterable[Tensor]) -> Any:
        return _with_tensors(self.x, (t.clone() for t in inputs))  # the encoder may write into what it gets

    def _keep_buffers(self) -> None:
        """The buffers as they are now, copies of those that are not known to be equal to the last ones."""
        last: dict[str, Tensor | None] = {}
        if self.buffers:
            last = self.buffers[-1]
        now: dict[str, Tensor | None] = {name: None for name, x in self._held("_buffers") if x is None}
        for name, x in self.encoder.named_buffers():
            old = last.get(name)
            if old is None or name in self.changing or not _equal(old, x):
                now[name] = x.detach().clone()
                if old is not None:
                    self.changing.add(name)
            else:
                now[name] = old
        self.buffers.append(now)

    def _reshard(self) -> None:
        """Parameters of `fully_shard` as what they are between steps: those of its outermost module stay whole after a
        forward, and then another forward would not gather them from what stands in their place."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is None:
            return
        sharded: Any = getattr(fsdp, "FSDPModule", ())
        for module in self.encoder.modules():
            if isinstance(module, sharded):
                module.reshard()

    def _versions(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in (*self.inputs, *self.parameters.values())]

    def _held(self, kind: str) -> Iterator[tuple[str, Tensor | None]]:
        """All buffers, or parameters, with those that are None."""
        for prefix, module in self.encoder.named_modules():
            for name, x in getattr(module, kind).items():
                yield f"{prefix}.{name}" if prefix else name, x

    def _names(self) -> list[set[str]]:
        return [{name for name, _ in self._held(kind)} for kind in ("_parameters", "_buffers")]

    def _modes(self) -> list[tuple[nn.Module, bool]]:
        return [(module, module.training) for module in self.encoder.modules()]

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.devices)]

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for device, of_device in zip(self.devices, state[1:], strict=True):
            torch.get_device_module(device).set_rng_state(of_device, device)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _rows_of(rows: slice, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    return map_given(lambda g: g[rows], *grads)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _tensors(x: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list, Mapping)):
        if isinstance(x, Mapping):
            x = x.values()
        for one in x:
            yield from _tensors(one)


def _with_tensors(x: Any, tensors: Iterator[Tensor]) -> Any:
    """x with other tensors; mappings become dicts."""
    if isinstance(x, Tensor):
        return next(tensors)
    if isinstance(x, Mapping):
        return {name: _with_tensors(one, tensors) for name, one in x.items()}
    if isinstance(x, (tuple, list)):
        make = getattr(x, "_make", tuple if isinstance(x, tuple) else list)  # of a named tuple
        return make(_with_tensors(one, tensors) for one in x)
    return x
