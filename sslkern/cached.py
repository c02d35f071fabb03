"""`CachedLoss`: one exact loss over a large batch with the memory of a small one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .functional._common import describe
from .ops._numbers import check_size

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

    Each chunk is embedded again in the same random state (dropout), of the CPU and the devices that hold the encoder
    and its inputs, and under the same autocast. Random numbers from elsewhere (`random`, NumPy) in an encoder are not
    repeated. Buffers keep what step 1 left in them, so that running statistics are updated once. Batch normalisation
    normalises with the statistics of a chunk, not of the batch: there the chunk size is part of the model.

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

        >>> cached = sslkern.CachedLoss((model.encode_image, model.encode_text), sslkern.InfoNCELoss(two_way=True), 64)
        >>> loss = cached(images, texts, logit_scale=model.logit_scale.exp())
    """

    def __init__(self, encoder: Encoder | Sequence[Encoder], loss: Callable[..., Any], chunk_size: int):
        each = isinstance(encoder, (tuple, list))
        for one in encoder if each else (encoder,):
            if not isinstance(one if isinstance(one, nn.Module) else getattr(one, "__self__", None), nn.Module):
                raise TypeError(
                    f"encoder must be a module or a method of one, whose parameters are known, not {describe(one)}; "
                    "write what it does as a module"
                )
        self.encoder, self.loss = tuple(encoder) if each else encoder, loss
        self.chunk_size = check_size("chunk_size", chunk_size)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The loss of the features of inputs, each a tensor [N, ...], or a tuple, list or mapping of them (a tokenised
        text) with the same N; what else these hold goes to the encoder as it is. `options` go to the loss."""
        encoders = self.encoder if isinstance(self.encoder, tuple) else (self.encoder,) * len(inputs)
        if len(encoders) != len(inputs) or not inputs:
            raise ValueError(f"inputs must be {len(encoders) or 'at least 1'}, one for each encoder, not {len(inputs)}")
        return self.loss(*(_embed(*pair, self.chunk_size) for pair in zip(encoders, inputs, strict=True)), **options)


def _embed(encoder: Encoder, x: Any, chunk_size: int) -> Any:
    cache = _Cache(encoder, x, chunk_size)
    features = _Replayed.apply(cache, *cache.inputs, *cache.parameters)
    return _with_tensors(cache.structure, iter(features))


class _Replayed(torch.autograd.Function):
    """The features of a cache as a function of its inputs and parameters."""

    @staticmethod
    def forward(ctx, cache: "_Cache", *_):
        ctx.cache = cache
        ctx.set_materialize_grads(False)
        features = cache.embed()
        ctx.mark_non_differentiable(*(x for x in features if not x.is_floating_point()))
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return None, *ctx.cache.replay(grads, ctx.needs_input_grad[1:])


class _Cache:
    """An encoder and its input, and what it takes to embed each chunk once more as it was."""

    def __init__(self, encoder: Encoder, x: Any, chunk_size: int):
        module = encoder if isinstance(encoder, nn.Module) else encoder.__self__
        self.encoder, self.x, self.inputs = encoder, x, list(_tensors(x))
        self.parameters, self.buffers = list(module.parameters()), list(module.buffers())
        sizes = {t.shape[0] if t.ndim else 0 for t in self.inputs}
        if len(sizes) != 1 or 0 in sizes:
            shapes = [list(t.shape) for t in self.inputs]
            raise ValueError(f"inputs must hold tensors [N, ...] with one and the same N > 0, not {shapes}")
        (N,) = sizes
        self.chunks = [slice(i, min(i + chunk_size, N)) for i in range(0, N, chunk_size)]
        self.devices = {t.device for t in (*self.inputs, *self.parameters) if t.device.type != "cpu"}
        self.autocast = [
            dict(device_type=kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
            for kind in ("cpu", *{device.type for device in self.devices})
        ]
        self.versions = self._versions()
        self.random: list[list[Tensor]] = []  # the state before each chunk
        self.structure: Any = None  # how the tensors are nested in what the encoder returns

    def embed(self) -> tuple[Tensor, ...]:
        """The features of all chunks."""
        parts = []
        for rows in self.chunks:
            self.random.append(self._random_state())
            self.structure = self._encode(t[rows] for t in self.inputs)
            parts.append(list(_tensors(self.structure)))
            if any(t.shape[:1] != self.inputs[0][rows].shape[:1] for t in parts[-1]):
                wanted, shapes = rows.stop - rows.start, [list(t.shape) for t in parts[-1]]
                raise ValueError(
                    f"encoder must return tensors [{wanted}, ...] for {wanted} rows of input, not {shapes}"
                )
        torch.clear_autocast_cache()  # older torch keeps casts of weights made here, which have no graph
        return tuple(torch.cat(of_chunks) for of_chunks in zip(*parts, strict=True))

    def replay(self, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of inputs and parameters, where needed, given those of the features."""
        if self._versions() != self.versions:
            raise RuntimeError(
                "encoder or inputs were changed in place between the loss and its backward; do that after"
            )
        count = len(self.inputs)
        of_inputs = [torch.zeros_like(t) if need else None for t, need in zip(self.inputs, needed[:count], strict=True)]
        of_parameters: list[Tensor | None] = [None] * len(self.parameters)
        buffers, random = [b.clone() for b in self.buffers], self._random_state()
        for rows, state in zip(self.chunks, self.random, strict=True):
            self._set_random_state(state)
            parts = self._replay_chunk(rows, [None if g is None else g[rows] for g in grads], needed)
            for total, part in zip(of_inputs, parts[:count], strict=True):
                if part is not None:
                    total[rows] = part
            for i, part in enumerate(parts[count:]):
                if part is not None:
                    of_parameters[i] = part if of_parameters[i] is None else of_parameters[i] + part
        self._set_random_state(random)
        for buffer, value in zip(self.buffers, buffers, strict=True):
            buffer.data.copy_(value)  # unseen by other graphs, as batch normalisation's own write is
        return [*of_inputs, *of_parameters]

    def _replay_chunk(self, rows: slice, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        leaves = [*(t[rows].detach() for t in self.inputs), *self.parameters]
        wanted = [x.requires_grad_() for x, need in zip(leaves, needed, strict=True) if need]
        with torch.enable_grad(), ExitStack() as stack:
            for options in self.autocast:
                stack.enter_context(torch.autocast(**options))
            features = _tensors(self._encode(leaves[: len(self.inputs)]))
        ends = [(x, g) for x, g in zip(features, grads, strict=True) if g is not None and x.requires_grad]
        if not ends:
            return [None] * len(needed)
        found = iter(torch.autograd.grad([x for x, _ in ends], wanted, [g for _, g in ends], allow_unused=True))
        return [next(found) if need else None for need in needed]

    def _encode(self, inputs: Iterable[Tensor]) -> Any:
        return self.encoder(_with_tensors(self.x, (t.clone() for t in inputs)))  # it may write into what it gets

    def _versions(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in (*self.inputs, *self.parameters)]

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.devices)]

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for device, of_device in zip(self.devices, state[1:], strict=True):
            torch.get_device_module(device).set_rng_state(of_device, device)


def _tensors(x: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list, Mapping)):
        for one in x.values() if isinstance(x, Mapping) else x:
            yield from _tensors(one)


def _with_tensors(x: Any, tensors: Iterator[Tensor]) -> Any:
    """x with other tensors; named tuples become tuples, mappings dicts."""
    if isinstance(x, Tensor):
        return next(tensors)
    if isinstance(x, Mapping):
        return {name: _with_tensors(one, tensors) for name, one in x.items()}
    if isinstance(x, (tuple, list)):
        return (tuple if isinstance(x, tuple) else list)(_with_tensors(one, tensors) for one in x)
    return x
