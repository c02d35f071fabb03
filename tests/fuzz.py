"""Random bad inputs over everything that is exported: right, or refused in one sentence.

    python tests/fuzz.py --count 100000 --seed 0      # prints progress, refusals by type, and each failure made small
    python tests/fuzz.py --seed 0 --case 123          # one case, with its traceback

A case is a call of tests/examples.py, some of whose arguments, options and surroundings are then changed: wrong types,
sizes, devices and dtypes, numbers that are NaN, infinite, huge or tiny, odd strides, layouts and subclasses, empty
tensors, ids. It may end in one of two ways:

- A refusal: ValueError, TypeError, NotImplementedError, IndexError or a RuntimeError about the backend, raised by a
  `raise` of ours, of one line, that names an argument.
- A result that agrees, with the gradients and with what the module keeps, with the same call in float64 on the
  reference backend. What may differ is what a rounding of the arguments to the type of the features changes, MARGIN
  times, or, of numbers that overflow or vanish in that type, what the reference gives in it.

Nothing else: no other exception, no crash or hang (cases run in a process of their own, whose memory glibc fills with
rubbish), no write to an argument that the documentation does not name, nor beside one.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import functools
import importlib
import inspect
import json
import linecache
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))
    __package__ = "tests"
    import tests  # noqa: F401

import sslkern  # noqa: E402
from sslkern.backends import BACKENDS  # noqa: E402

from .examples import LOSSES, OPS, PUSHES  # noqa: E402

try:
    import numpy
except ImportError:
    numpy = None

CHUNK = 2500  # cases that one process runs
SECONDS = 60  # for one case; most take milliseconds
MARGIN = 24  # how many times the effect of a rounding of the arguments a result may be off
ROUNDINGS = 6  # tried to find that effect
PICKS = {"nearest_neighbors", "nnclr", "NNCLRLoss"}  # in which it is rarely anything, and then all
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ---- calls that are right --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """target(**init) where init is given, then of it `method` (None: the call itself), with these arguments."""

    name: str
    target: Callable
    init: dict[str, Any] | None
    method: str | None
    args: dict[str, Any]

    def positional(self) -> str | None:
        """The name of *args."""
        parameters = inspect.signature(self._function()).parameters.values()
        return next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)

    def slots(self) -> list[tuple]:
        """The paths of all arguments, those of the signature that are not given among them."""
        paths = [("args", name) for name in self._names(self._function())]
        return paths + ([] if self.init is None else [("init", name) for name in self._names(self.target.__init__)])

    def _function(self):
        if self.init is None:
            return self.target
        return getattr(self.target, self.method or ("forward" if issubclass(self.target, nn.Module) else "__call__"))

    @staticmethod
    def _names(function) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.name != "self" and p.kind != p.VAR_KEYWORD]

    def default(self, path: tuple) -> Any:
        function = self._function() if path[0] == "args" else self.target.__init__
        default = inspect.signature(function).parameters[path[1]].default
        return None if default is inspect.Parameter.empty else default

    def names(self) -> set[str]:
        """What a refusal may name: the parameters, and those of a loss that is an argument."""
        names = {path[1] for path in self.slots()} | {"backend"}
        for inner in tree_flatten((self.init or {}, self.args))[0]:
            if callable(inner) and not isinstance(inner, Tensor):
                with contextlib.suppress(ValueError):
                    names |= set(self._names(inner.forward if isinstance(inner, nn.Module) else inner))
        if isinstance(self.target, functools.partial):  # matryoshka of a loss
            names |= set(self._names(self.target.args[0]))
        if self.init is not None and issubclass(self.target, nn.Module):  # what a module keeps: its queue, its bank
            with contextlib.suppress(Exception):
                names |= set(".".join(self.target(**self.init).state_dict()).split("."))
        return names | ({"z0", "z1", "inputs"} if {"features", "inputs"} & names else set())

    def build(self, dtype: torch.dtype, double: bool) -> Any:
        """The module, or the function itself."""
        torch.manual_seed(1)
        thing = self.target
        if self.init is not None:
            thing = self.target(**self.init)
            if isinstance(thing, nn.Module):
                thing = thing.to(dtype)
                thing = thing.double() if double else thing
        return thing

    def run(self, thing: Any) -> Any:
        function = thing if self.init is None else getattr(thing, self.method or "__call__")
        torch.manual_seed(2)
        args = dict(self.args)
        positional = args.pop(self.positional(), ())
        return function(*positional, **args)


INITS: dict[str, Callable[[int], dict[str, Any]]] = {
    "AlignmentUniformityLoss": lambda D: {},
    "CLIPLoss": lambda D: {},
    "CMCLoss": lambda D: dict(views=2, size=20, dim=D, negatives=5),
    "CPCLoss": lambda D: dict(context_dim=D, target_dim=D, steps=2),
    "CachedLoss": lambda D: dict(encoder=_encoder(D), loss=sslkern.NTXentLoss(0.3), chunk_size=3),
    "CrossBatchMemory": lambda D: dict(dim=D, size=12),
    "DCLLoss": lambda D: {},
    "DCLWLoss": lambda D: {},
    "DebiasedLoss": lambda D: {},
    "DeepInfoMaxLoss": lambda D: {},
    "FeatureQueue": lambda D: dict(dim=D, size=12),
    "HardNegativeLoss": lambda D: {},
    "InfoNCELoss": lambda D: dict(temperature=nn.Parameter(torch.tensor(0.3))),
    "MILNCELoss": lambda D: {},
    "MatryoshkaLoss": lambda D: dict(loss=sslkern.NTXentLoss(), dims=[max(1, D // 2), D]),
    "MemoryBank": lambda D: dict(size=12, dim=D),
    "MoCoLoss": lambda D: dict(dim=D, size=12),
    "MoCoV3Loss": lambda D: {},
    "MultipleNegativesRankingLoss": lambda D: {},
    "NCELoss": lambda D: dict(size=20, dim=D, negatives=5),
    "NNCLRLoss": lambda D: dict(dim=D, size=12),
    "NTXentLoss": lambda D: {},
    "NTXentMultiViewLoss": lambda D: {},
    "SigLIPLoss": lambda D: {},
    "SupConLoss": lambda D: {},
}


def _encoder(D: int) -> nn.Module:
    """Takes any floating-point type, so that what is refused is the argument and not this."""
    torch.manual_seed(3)
    encoder = nn.Linear(D, D)
    encoder.forward = functools.partial(_linear, encoder)
    return encoder


def _linear(encoder, x):
    return x @ encoder.weight.to(x.dtype).T + encoder.bias.to(x.dtype)


def _rows(*shape, dtype, learns=False):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(learns)


# Calls without a place in examples.py: (function, or method of a class above, arguments of N, D and dtype).
EXTRA: dict[str, Callable[[int, int, torch.dtype], dict[str, Any]]] = {
    "clamp_logit_scale_": lambda N, D, t: dict(log_scale=torch.tensor(5.0)),
    "cmc_pairs": lambda N, D, t: dict(views=3, graph="full"),
    "nearest_neighbors": lambda N, D, t: dict(z=_rows(N, D, dtype=t, learns=True), support=_rows(9, D, dtype=t)),
    "use_backend": lambda N, D, t: dict(name="reference"),
    "FeatureQueue.push": lambda N, D, t: dict(keys=_rows(N, D, dtype=t)),
    "CrossBatchMemory.push": lambda N, D, t: dict(keys=_rows(N, D, dtype=t), labels=torch.arange(N)),
    "CrossBatchMemory.contents": lambda N, D, t: {},
    "MemoryBank.update": lambda N, D, t: dict(index=torch.arange(N), features=_rows(N, D, dtype=t)),
    "MemoryBank.sample": lambda N, D, t: dict(index=torch.arange(N), negatives=4),
}

NAMES = [*LOSSES, *OPS, *PUSHES, *EXTRA]

# What a call writes, as its documentation says.
WRITES = {"queue_push_": {"queue", "ptr"}, "bank_update_": {"bank"}, "clamp_logit_scale_": {"log_scale"}}


def missing() -> set[str]:
    """What is exported, methods of memories included, and has no call here."""
    known = {name.partition(":")[0] for name in NAMES}
    exported = set()
    for module in (sslkern, sslkern.functional, sslkern.ops):
        for name in set(module.__all__) - {"distributed", "functional", "ops"}:
            thing = getattr(module, name)
            if not inspect.isclass(thing) or name == "use_backend":
                exported.add(name)
            elif (
                not issubclass(thing, nn.Module)
                or "forward" in vars(thing)
                or any("forward" in vars(base) for base in thing.__mro__ if base.__module__.startswith("sslkern"))
            ):
                exported.add(name)
            if inspect.isclass(thing) and name not in INITS and name != "use_backend":
                exported.add(f"{name}.__init__")
            if inspect.isclass(thing) and issubclass(thing, nn.Module):
                methods = {m for m in vars(thing) if not m.startswith("_") and callable(getattr(thing, m))}
                exported |= {f"{name}.{m}" for m in methods - {"forward", "extra_repr", "loss_fn"}}
    return exported - known


def valid_call(name: str, N: int, D: int, dtype: torch.dtype, seed: int) -> Call:
    base, _, method = name.partition(":")[0].partition(".")
    torch.manual_seed(seed)
    if name in EXTRA:
        thing = getattr(sslkern, base, None) or getattr(sslkern.functional, base)
        init = INITS[base](D) if base in INITS else None
        return Call(name, thing, init, method or None, EXTRA[name](N, D, dtype))
    example = (LOSSES | OPS | PUSHES)[name](N=N, D=D, dtype=dtype, seed=seed)
    init = INITS[base](D) if base in INITS else None
    target = type(example.target) if init is not None else example.target
    call = Call(name, target, init, None, {})
    function = call._function()
    bound = inspect.signature(function).bind(*((None,) if init is not None else ()), *example.args, **example.options)
    call.args = {k: v for k, v in bound.arguments.items() if k != "self"}
    for parameter in inspect.signature(function).parameters.values():  # **options given one by one
        if parameter.kind == parameter.VAR_KEYWORD:
            call.args |= call.args.pop(parameter.name, {})
    return call


# ---- changes ---------------------------------------------------------------------------------------------------------


class Plain(Tensor):
    """A subclass that changes nothing."""


class Wrapper(Tensor):
    """A tensor without memory of its own. It says of its inner tensor all but a sign bit, which that must not have:
    torch resolves the bit of the tensor that it is called with, and within a dispatch no other."""

    @staticmethod
    def __new__(cls, inner):
        inner = inner.resolve_neg()
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=inner.device, requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner.detach().resolve_neg()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapper, function(*args, **kwargs))


NAN, INF = math.nan, math.inf


def _anything(rng) -> Any:
    """No argument of ours."""
    choices = [
        None, "text", "", b"mean", True, False, 0, 1, -1, 3, 0.5, NAN, INF, 1j, 10**400, 2**63, -(2**63) - 1, object(),
        [], (), {}, [1.0], ["mean"], {"a": 1}, [None, None], int, lambda *a, **k: None, Fraction(1, 3), Decimal("0.3"),
        torch.float32, torch.device("cpu"), torch.tensor(0.3), torch.tensor(2), torch.randn(2, 3), torch.randn(3),
        torch.zeros(0), torch.zeros(2, 2, 2, 2), torch.tensor(1j), torch.randn(2, 3, device="meta"), slice(None),
        range(3), set(), nn.Linear(2, 2),
    ]  # fmt: skip
    if numpy is not None:
        choices += [numpy.float32(0.3), numpy.int64(2), numpy.ones((2, 3), numpy.float32), numpy.bool_(True)]
    return rng.choice(choices)


def _number(rng, x) -> Any:
    choices = [
        0.0, -0.0, -0.7, 1e-40, 5e-324, 1e39, -1e39, 1e300, 10**400, NAN, INF, -INF, 0.3, 2, 1, -1, True, "0.1", None,
        1j, Fraction(1, 3), Decimal("0.3"), 2**63, [0.3], torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.0),
        torch.tensor([0.3, 0.4]), torch.tensor(2), torch.tensor(0.3 + 0.1j), torch.tensor(True), torch.tensor(NAN),
        torch.tensor(INF), torch.tensor(0.3, dtype=torch.bfloat16), torch.tensor(0.3, dtype=torch.float16),
        torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.3, device="meta"), torch.tensor(0.3, requires_grad=True),
        torch.tensor([[0.3]]), torch.zeros(0), torch.tensor(-0.5), torch.tensor(1e-40), torch.tensor(1e30),
        torch.tensor(0.3).to(torch.float8_e4m3fn), torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
    ]  # fmt: skip
    if numpy is not None:
        choices += [numpy.float32(0.3), numpy.float64(0.3), numpy.int64(2), numpy.array(0.3), numpy.float16(0.5)]
    return rng.choice(choices)


def _integer(rng, x) -> Any:
    choices = [0, 1, 2, 3, -1, 1.5, 2.0, True, "3", None, 2**63, 2**70, NAN, INF, torch.tensor(2), [2], 1j, -(2**63)]
    if numpy is not None:
        choices += [numpy.int64(2), numpy.int32(3), numpy.uint8(1), numpy.float32(2)]
    return rng.choice(choices)


def _string(rng, x) -> Any:
    known = ["mean", "sum", "none", "in", "out", "core", "full", "nce", "softmax", "jsd", "dv", "joint", "same", "all"]
    return rng.choice([*known, "", x.upper(), x + " ", x.encode(), None, 0, 1.0, True, [x], (x,), {x}, object()])


def _flag(rng, x) -> Any:
    more = [numpy.bool_(True), numpy.array([True, False])] if numpy is not None else []
    odd = [None, 0, 1, "yes", "", [], [1], torch.tensor(True), torch.tensor([True, False]), NAN, object()]
    return rng.choice([not x, *odd, *more])


SPECIALS = (NAN, INF, -INF, 3e38, -3e38, 1e39, 1e-40, 1e-20, 1e20, 0.0, 6e4)


def _one_value(rng, x: Tensor) -> Tensor:
    x = x.detach().clone()
    if x.numel():
        flat = x.view(-1)
        value = rng.choice(SPECIALS)
        with contextlib.suppress(RuntimeError):  # no place in this type
            flat[rng.randrange(flat.numel())] = value
    return x


def _one_row(rng, x: Tensor) -> Tensor:
    x = x.detach().clone()
    if x.numel() and x.ndim:
        x[rng.randrange(x.shape[0])] = rng.choice((0.0, 1e-40, NAN, INF, 1e20))
    return x


def _every_value(rng, x: Tensor) -> Tensor:
    how = rng.choice(("zero", "equal", "huge", "tiny", "large", "signs"))
    with torch.no_grad():
        if how == "zero":
            return torch.zeros_like(x)
        if how == "equal":
            return torch.ones_like(x)
        if how == "signs":
            return x.sign()
        return x * {"huge": 1e20, "tiny": 1e-20, "large": 100.0}[how]


def _ids(rng, x: Tensor) -> Tensor:
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    how = rng.choice(("equal", "negative", "ends", "distinct", "shuffled", "one out"))
    if how == "equal":
        return torch.zeros_like(x)
    if how == "negative":
        return -x - 1
    if how == "ends":
        return torch.where(x % 2 == 0, torch.full_like(x, low), torch.full_like(x, high))
    if how == "distinct":
        return torch.arange(x.numel()).view(x.shape)
    if how == "one out":
        return _one_id(rng, x)
    return x.flatten()[torch.randperm(x.numel())].view(x.shape)


def _one_id(rng, x: Tensor) -> Tensor:
    x = x.clone()
    if x.numel():
        x.view(-1)[rng.randrange(x.numel())] = rng.choice((-1, 2**62, 1000, torch.iinfo(torch.int64).min, 12, 20))
    return x


def _shape(rng, x: Tensor) -> Tensor:
    x = x.detach()
    ways = [
        lambda: x.unsqueeze(0),
        lambda: x.unsqueeze(-1),
        lambda: x.flatten(),
        lambda: x.reshape(-1)[:1].squeeze() if x.numel() else x.sum(),
        lambda: x.expand(2, *x.shape),
        lambda: x.new_zeros((0,) * max(1, x.ndim)),
    ]
    if x.ndim:
        ways += [
            lambda: x[:0],
            lambda: x[:1],
            lambda: x[:-1],
            lambda: torch.cat((x, x[:1])),
            lambda: x[..., :0],
            lambda: x[..., :1],
            lambda: torch.cat((x, x[..., :1]), -1),
            lambda: x[0] if len(x) else x.sum(0),
        ]
    return rng.choice(ways)()


TYPES = (
    torch.int64, torch.int32, torch.bool, torch.uint8, torch.complex64, torch.complex128, torch.float8_e4m3fn,
    torch.float8_e5m2, *FLOATS,
)  # fmt: skip


def _layout(rng, x: Tensor) -> Any:
    x = x.detach()
    ways = [lambda: x.to_sparse(), lambda: x.to("meta"), lambda: x.to("meta")]
    if x.ndim == 2:
        ways.append(lambda: x.to_sparse_csr())
    if x.dtype == torch.float32:
        ways.append(lambda: x.to_mkldnn())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rng.choice(ways)()


def _strides(rng, x: Tensor) -> Tensor:
    y = x.detach()
    if y.ndim == 0:
        return y
    ways = [lambda: y.repeat_interleave(2, -1)[..., ::2], lambda: torch.cat((y, y))[: len(y)]]
    if y.ndim >= 2:
        ways += [lambda: y.mT.contiguous().mT] * 2
        ways.append(lambda: torch.cat((y, y), -1)[..., : y.shape[-1]])
        ways.append(lambda: torch.cat((y[..., :1], y), -1)[..., 1:])
    if y.dtype.is_floating_point:
        ways.append(lambda: torch._neg_view(-y))
    return rng.choice(ways)()


def _expanded(rng, x: Tensor) -> Tensor:
    y = x.detach()
    if y.ndim == 0 or y.numel() == 0:
        return y
    return y[:1].expand_as(y) if y.ndim == 1 or rng.random() < 0.5 else y[..., :1].expand_as(y)


# Name: (change of a tensor, whether the call must still be accepted).
TENSOR_CHANGES: dict[str, tuple[Callable, bool]] = {
    "anything": (lambda rng, x: _anything(rng), False),
    "list": (lambda rng, x: x.detach().tolist(), False),
    "numpy": (lambda rng, x: x.detach().float().numpy() if numpy is not None else None, False),
    "shape": (_shape, False),
    "dtype": (lambda rng, x: x.detach().to(rng.choice(TYPES)), False),
    "one value": (_one_value, False),
    "one row": (_one_row, False),
    "every value": (_every_value, False),
    "layout": (_layout, False),
    "strides": (_strides, True),
    "expanded": (_expanded, False),
    "subclass": (lambda rng, x: x.detach().as_subclass(Plain), True),
    "wrapper": (lambda rng, x: Wrapper(x), False),
    "frozen": (lambda rng, x: x.detach(), True),
    "learns": (lambda rng, x: x.detach().clone().requires_grad_(), False),
    "no leaf": (lambda rng, x: x * 1 if x.is_floating_point() else x, True),
    "ids": (_ids, False),
}


def change(call: Call, path: tuple, rng: random.Random) -> tuple[str, Any, bool]:
    """A change of the argument at path: its name, the new value, and whether the call must still be accepted."""
    given = getattr(call, path[0])
    old = given[path[1]] if path[1] in given else call.default(path)
    if path[1] in ("loss", "loss_fn", "encoder"):  # what another function says is its own business
        new = _anything(rng)
        return "anything", None if callable(new) else new, False
    if old is None:
        if path[1].endswith("ids") and rng.random() < 0.5:
            return "ids", torch.randint(-2, 3, (rng.choice((1, 2, 3, 5, 8)),)), False
        if path[1] == "weights" and rng.random() < 0.5:
            return "weights", torch.rand(rng.choice((1, 2, 3, 5, 8))), False
        if "scale" in path[1] or path[1] in ("log_z", "margin"):
            return "number", _number(rng, None), False
        return "anything", _anything(rng), False
    if isinstance(old, Tensor):
        if old.ndim == 0 and rng.random() < 0.5:
            return "number", _number(rng, old), False
        names = [n for n in TENSOR_CHANGES if (n == "ids") <= (old.dtype == torch.int64)]
        others = {type(x) for x in _tensors((call.args, call.init))}
        names = [n for n in names if n not in ("subclass", "wrapper") or not others & {Plain, Wrapper}]
        if old.dtype == torch.int64:
            names = [n for n in names if n not in ("one value", "one row", "every value", "learns")] + ["ids"] * 3
        name = rng.choice(names)
        function, fits = TENSOR_CHANGES[name]
        if type(old) is Wrapper or old.is_meta or old.layout != torch.strided:  # changed enough
            return "nothing", old, True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                new = function(rng, old)
            except RuntimeError:  # torch has no such tensor
                return "nothing", old, True
        if isinstance(new, Tensor) and new.dtype.is_floating_point and old.requires_grad and name != "frozen":
            if new.is_leaf and not new.requires_grad and type(new) is not Wrapper:
                new.requires_grad_()
        return name, new, fits
    if isinstance(old, bool):
        return "flag", _flag(rng, old), False
    if isinstance(old, int):
        return "integer", _integer(rng, old), False
    if isinstance(old, float):
        return "number", _number(rng, old), False
    if isinstance(old, str):
        return "string", _string(rng, old), False
    listed = path == ("args", call.positional())  # Python itself asks how many they are
    if isinstance(old, (list, tuple)) and len(old) and (listed or rng.random() < 0.7):
        how = "element" if listed else rng.choice(("element", "element", "fewer", "more", "other sequence"))
        if how == "fewer":
            return how, type(old)(old[:-1]), False
        if how == "more":
            return how, type(old)([*old, old[0]]), False
        if how == "other sequence":
            return how, rng.choice((tuple(old), list(old), dict(enumerate(old)))), False
        i = rng.randrange(len(old))
        inner = Call(call.name, call.target, call.init, call.method, {path[1]: old[i], "": call.args})
        name, new, fits = change(inner, ("args", path[1]), rng)
        return f"[{i}] {name}", type(old)([*old[:i], new, *old[i + 1 :]]), fits
    return ("nothing", old, True) if listed else ("anything", _anything(rng), False)


SURROUNDINGS = (
    *[""] * 12, "no_grad", "inference", "autocast bfloat16", "autocast float16", "default float64", "default bfloat16",
    "default float16", "deterministic", "default meta",
)  # fmt: skip


@contextlib.contextmanager
def surroundings(name: str):
    kind, _, what = name.partition(" ")
    if kind == "autocast":
        with torch.autocast("cpu", dtype=getattr(torch, what)):
            yield
    elif kind == "no_grad":
        with torch.no_grad():
            yield
    elif kind == "inference":
        with torch.inference_mode():
            yield
    elif kind == "deterministic":
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
    elif what == "meta":
        # Checkpoints import it; that of torch 2.6 cannot be imported where this is the default.
        importlib.import_module("torch._dynamo")
        torch.set_default_device("meta")
        try:
            yield
        finally:
            torch.set_default_device(None)
    elif kind == "default":
        torch.set_default_dtype(getattr(torch, what))
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        yield


def _isas() -> list[str]:
    native = BACKENDS["cpu"]._cpu
    return list(native.isas()) if native else []


# ---- one case --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    call: Call
    dtype: torch.dtype
    around: str
    backend: str
    changes: list[str]
    fits: bool

    def __str__(self):
        init = "" if self.call.init is None else f"({_show(self.call.init)})"
        method = f".{self.call.method}" if self.call.method else ""
        where = f" [{self.backend}{', ' + self.around if self.around else ''}]"
        name = self.call.name.partition(".")[0]
        return f"{name}{init}{method}({_show(self.call.args)}){where} changed: {'; '.join(self.changes) or 'nothing'}"


def _show(args: dict) -> str:
    return ", ".join(f"{k}={_show_one(v)}" for k, v in args.items())


def _show_one(x) -> str:
    if isinstance(x, Tensor):
        kind = "" if type(x) is Tensor else type(x).__name__ + " "
        more = "" if x.layout == torch.strided else f" {x.layout}"
        more += " meta" if x.is_meta else ""
        more += " learns" if x.requires_grad else ""
        if x.layout == torch.strided and not x.is_meta and x.numel() == 1 and type(x) is not Wrapper:
            more += f" {x.tolist()}"
        return f"{kind}{str(x.dtype)[6:]}{list(x.shape)}{more}"
    if isinstance(x, (tuple, list)):
        return "[" + ", ".join(map(_show_one, x)) + "]"
    text = repr(x)
    return text if len(text) < 60 else text[:57] + "..."


def make(seed: int, number: int, keep: set[int] | None = None, around: bool = True) -> Case:
    """Case `number`; of its changes only those in `keep`, without its surroundings unless `around`."""
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice(NAMES)
    N, D = rng.choice((1, 2, 3, 5, 8)), rng.choice((2, 4, 5, 8))
    dtype = rng.choice((torch.float32, *FLOATS))
    call = valid_call(name, N, D, dtype, rng.randrange(2**31))
    where = rng.choice(SURROUNDINGS)
    backend = rng.choice(["auto", "auto", "reference", *_isas()])
    slots, changes, fits = call.slots(), [], True
    for i in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 3)) if slots else 0):
        path, inner = rng.choice(slots), random.Random(rng.random())
        torch.manual_seed(inner.randrange(2**31))
        if keep is not None and i not in keep:
            continue
        what, new, still_fits = change(call, path, inner)
        getattr(call, path[0])[path[1]] = new
        fits = fits and still_fits and path[1] not in WRITES.get(name, ())
        changes.append(f"{path[0]}.{path[1]} {what}" if path[0] == "init" else f"{path[1]} {what}")
    return Case(call, dtype, where if around else "", backend, changes, fits)


class Failure(Exception):
    """What a case must not do."""


def _tensors(x) -> list[Tensor]:
    return [t for t in tree_flatten(x)[0] if isinstance(t, Tensor)]


def _plain(t: Tensor) -> bool:
    return type(t) in (Tensor, Plain, nn.Parameter) and t.layout == torch.strided and t.device.type == "cpu"


def _guarded(t: Tensor, guards: list) -> Tensor:
    """t in the middle of memory that is compared later; a leaf as it was."""
    if not _plain(t) or t.is_neg() or t.is_conj() or not t.is_leaf or t.is_inference():
        return t
    size, span = t.element_size(), t.untyped_storage().nbytes()
    if span % size or span == 0:
        return t
    lead = 16 + len(guards) % 16
    memory = torch.full((span + (lead + 16) * size,), 0x5B, dtype=torch.uint8)
    memory[lead * size : lead * size + span] = torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage())
    whole = memory.view(t.dtype)
    new = whole.as_strided(t.shape, t.stride(), lead + t.storage_offset())
    guards.append((memory, memory.clone(), new))
    if type(t) is nn.Parameter:
        return nn.Parameter(new, t.requires_grad)
    new = new.as_subclass(type(t)) if type(t) is Plain else new
    return new.detach().requires_grad_() if t.requires_grad else new


def _double(x: Tensor) -> Tensor:
    if type(x) is Wrapper:
        x = x.inner.requires_grad_(x.requires_grad)
    if type(x) is Plain:
        x = x.as_subclass(Tensor)
    if x.layout != torch.strided or x.is_meta:
        return x
    if x.dtype not in FLOATS:
        return x.clone()
    return x.detach().resolve_neg().to(torch.float64).clone().contiguous().requires_grad_(x.requires_grad)


@dataclasses.dataclass
class Outcome:
    """Flat and in order: what came back, the gradients of a random sum of it, what the module or the call keeps."""

    values: list
    grads: list
    kept: list


def _outcome(call: Call, dtype: torch.dtype, double: bool = False, around: str = "", eps: float = 0.0) -> Outcome:
    """eps: how far off the memory of a module is taken to be."""
    thing = call.build(dtype, double)
    if eps and isinstance(thing, nn.Module):
        for x in thing.buffers():
            if x.is_floating_point():
                x.copy_(_rounded(x, eps, torch.Generator().manual_seed(x.numel())))
    with surroundings(around):
        return _outcome_of(call, thing)


def _outcome_of(call: Call, thing: Any) -> Outcome:
    out = call.run(thing)
    if isinstance(out, sslkern.use_backend):
        out._token = None
        return Outcome([out.name], [], [])
    values = [None if x is None else x for x in tree_flatten(out)[0]]
    kept = list(thing.buffers()) if isinstance(thing, nn.Module) else []
    leaves = [t for t in _tensors(call.args) + _tensors(call.init or {}) if t.requires_grad and not t.is_meta]
    leaves += [p for p in thing.parameters()] if isinstance(thing, nn.Module) else []
    leaves = list({id(x): x for x in leaves}.values())
    learning = [x for x in values if isinstance(x, Tensor) and x.requires_grad and not x.is_meta]
    grads = []
    if learning and leaves:
        with torch.inference_mode(False), torch.enable_grad():
            generator = torch.Generator().manual_seed(4)
            upstream = [
                torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu").add_(0.5).to(x.dtype)
                for x in learning
            ]
            grads = list(torch.autograd.grad(learning, leaves, upstream, allow_unused=True))
    written = WRITES.get(call.name, set())
    kept += [t for name, t in call.args.items() if name in written and isinstance(t, Tensor)]
    detach = [x.detach().resolve_neg() if isinstance(x, Tensor) else x for x in values]
    return Outcome(detach, grads, [x.detach() for x in kept])


def _rounded(x: Tensor, eps: float, generator) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype != torch.float64 or x.is_meta or x.layout != torch.strided:
        return x
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
    return (x.detach() * (1 + eps * noise)).requires_grad_(x.requires_grad)


def _in_double(call: Call, eps: float = 0.0, number: int = 0) -> Call:
    generator = torch.Generator().manual_seed(number)

    seen: dict[int, Tensor] = {}  # what is one tensor stays one

    def convert(x):
        if isinstance(x, Tensor):
            if id(x) not in seen:
                seen[id(x)] = _rounded(_double(x), eps, generator) if eps else _double(x)
            return seen[id(x)]
        if eps and isinstance(x, float):
            return x * (1 + min(eps, 2**-23) * (torch.rand((), generator=generator, device="cpu").item() * 2 - 1))
        return x

    def over(args):
        return None if args is None else {k: _tree_map(convert, v) for k, v in args.items()}

    return Call(call.name, call.target, over(call.init), call.method, over(call.args))


def _tree_map(function, x):
    if isinstance(x, (list, tuple)):
        return type(x)(_tree_map(function, y) for y in x)
    return function(x)


def _compare(
    got, want, spread, what: str, beyond: bool = False, vanishes: bool = False, overflows: bool = False
) -> None:
    """Raises Failure where got is not want, but for `spread`; `beyond`: what is not finite may be either, or, with
    `vanishes`, 0; `overflows`: anything may have become infinite or NaN."""
    if got is None or want is None or not isinstance(got, Tensor) or not isinstance(want, Tensor):
        if got is None and isinstance(want, Tensor) and not want.any():
            return
        if want is None and isinstance(got, Tensor) and not got.any():
            return
        if not isinstance(got, Tensor) and not isinstance(want, Tensor) and (got == want or got is want):
            return
        raise Failure(f"{what} is {got!r}, not {want!r}")
    if got.shape != want.shape:
        raise Failure(f"{what} has shape {list(got.shape)}, not {list(want.shape)}")
    got, want = got.detach(), want.detach()
    if got.dtype in FLOATS:  # what is beyond the type of a result is infinite in it, or the most that it holds
        want = torch.where(
            want.abs() > torch.finfo(got.dtype).max * (1 - torch.finfo(got.dtype).eps), want.sign() * INF, want.double()
        )
        got = torch.where(want.isinf() & (got.abs() == torch.finfo(got.dtype).max), got.sign() * INF, got.double())
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    close = (got - want).abs() <= spread
    close |= beyond & (~got.isfinite() | (vanishes & (got == 0))) & ~want.isfinite()
    bad = ~(same | close | (overflows & ~got.isfinite()))
    if bad.any():
        i = tuple(bad.nonzero()[0].tolist())
        bound = spread[i] if isinstance(spread, Tensor) and spread.ndim else spread
        raise Failure(
            f"{what}{list(i) if i else ''} is {got[i].item():.6g}, not {want[i].item():.6g} +- {float(bound):.2g}"
        )


def _spread(exact, trials, eps: float, tiny: float):
    """How far from exact a result may lie: MARGIN times what a rounding of the arguments changes, and its own."""
    if not isinstance(exact, Tensor) or not exact.dtype.is_floating_point:
        return 0.0
    exact = exact.detach()
    effect = torch.zeros_like(exact)
    for trial in trials:
        if isinstance(trial, Tensor) and trial.shape == exact.shape:
            effect = torch.maximum(effect, (trial.detach() - exact).abs().nan_to_num(nan=INF, posinf=INF))
    finite = exact.abs().masked_fill(~exact.isfinite(), 0)
    most = finite.max() if finite.numel() else 0.0
    # MARGIN times the worst of its neighbours as well: an effect may vanish in one place by chance
    effect = torch.maximum(effect, effect.masked_fill(effect.isinf(), 0).max() / 8 if effect.numel() else effect)
    return MARGIN * (effect + eps * (finite + most)) + tiny


def check(case: Case) -> str:
    """Runs a case; the name of the refusal's type, or "returned". Raises Failure."""
    call, guards = case.call, []
    if case.fits and any(isinstance(x, Tensor) and x.is_meta for x in _tensors((call.args, call.init))):
        case.fits = False
    references = {"exact": _in_double(call)}
    seen: dict[int, Tensor] = {}

    def guard(x):
        return seen.setdefault(id(x), _guarded(x, guards)) if isinstance(x, Tensor) else x

    call = Call(
        call.name, call.target, None if call.init is None else {k: _tree_map(guard, v) for k, v in call.init.items()},
        call.method, {k: _tree_map(guard, v) for k, v in call.args.items()},
    )  # fmt: skip
    if case.around == "inference" and any(type(x) is Wrapper for x in _tensors((call.args, call.init))):
        case.around = "no_grad"  # torch's own wrappers do not work there
    native = BACKENDS["cpu"]._cpu
    before = native.isa() if native else None
    if case.backend in _isas():
        native.set_isa(case.backend)
    backend = sslkern.use_backend("reference") if case.backend == "reference" else contextlib.nullcontext()
    try:
        with warnings.catch_warnings(), backend:
            warnings.simplefilter("ignore")
            got = _outcome(call, case.dtype, around=case.around)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        _check_refusal(error, call)
        if case.fits and not isinstance(error, (NotImplementedError, IndexError)):
            raise Failure(f"refused what is right: {type(error).__name__}: {error}") from error
        _check_memory(call, guards)
        return type(error).__name__
    finally:
        if native:
            native.set_isa(before)
    _check_memory(call, guards)

    everything = _tensors((call.args, call.init))
    unused = [args.get("temperature") for args in (call.args, call.init or {})]  # where there is a logit_scale
    unused += [(call.init or {}).get("logit_scale")] if call.args.get("logit_scale") is not None else []
    metas = [t for t in everything if t.is_meta and not any(t is x for x in unused)]
    results = [x for x in (*got.values, *got.kept, *got.grads) if isinstance(x, Tensor)]
    if metas:
        if any(not x.is_meta for x in got.values if isinstance(x, Tensor)):
            raise Failure("an argument on meta made a result on the CPU")
        return "returned"
    if case.around == "default meta":
        if any(x.is_meta for x in got.values if isinstance(x, Tensor)):
            raise Failure("the default device is where the result is, not the device of the features")
    if any(type(x) is Wrapper for x in results):
        unwrap = lambda x: x.inner if type(x) is Wrapper else x  # noqa: E731
        got = Outcome(*(list(map(unwrap, part)) for part in (got.values, got.grads, got.kept)))
    with warnings.catch_warnings(), sslkern.use_backend("reference"):
        warnings.simplefilter("ignore")
        exact = _guess(references["exact"], case, double=True)
        if isinstance(exact, BaseException):
            raise Failure(f"returned, where float64 raises {type(exact).__name__}: {exact}")
        _agree(case, call, got, exact)
    return "returned"


def _guess(call: Call, case: Case, double: bool, eps: float = 0.0):
    try:
        kept = ("no_grad", "inference") if double else ("no_grad", "inference", "autocast bfloat16", "autocast float16")
        return _outcome(call, case.dtype, double, case.around if case.around in kept else "", eps)
    except Exception as error:
        return error


def _agree(case: Case, call: Call, got: Outcome, exact: Outcome) -> None:
    floats = [t.dtype for t in _tensors((call.args, call.init)) if t.dtype in FLOATS]
    if call.init is not None and issubclass(call.target, nn.Module):
        floats.append(case.dtype)
    types = floats + [x.dtype for x in got.values if isinstance(x, Tensor) and x.dtype in FLOATS]
    outs = [x.dtype for x in got.values if isinstance(x, Tensor) and x.dtype in FLOATS]
    half = [t for t in floats if t in (torch.float16, torch.bfloat16)]
    if call.name == "CachedLoss" and "autocast" in case.around:  # which rounds what the encoder does
        half.append(torch.bfloat16)
    worst = max(half, key=lambda t: torch.finfo(t).eps) if half else torch.float32
    if not half and all(t == torch.float64 for t in floats + outs) and floats:
        worst = torch.float64
    eps = torch.finfo(worst).eps
    tiny = max((64 * torch.finfo(t).tiny * torch.finfo(t).eps for t in types), default=0.0)
    terms, scale = _terms_of_temperatures(call), _huge_scale(call)
    parts = [(f"{kind} {i}", kind, i) for kind in ("values", "grads", "kept") for i in range(len(getattr(got, kind)))]
    for kind in ("values", "grads", "kept"):
        if len(getattr(got, kind)) != len(getattr(exact, kind)):
            raise Failure(f"{len(getattr(got, kind))} {kind}, not {len(getattr(exact, kind))}")

    def compare(want: Outcome, trials: list[Outcome], beyond: bool = False):
        # Where a product overflows, the order of its terms says whether it is NaN or -inf: of a row of -inf nothing
        # is left, and its gradient is 0.
        vanishes = beyond and any(
            ((a == -INF) & b.isnan()).any() for a, b in zip(got.values, want.values, strict=True)
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
        )  # fmt: skip
        for what, kind, i in parts:
            a, b = getattr(got, kind)[i], getattr(want, kind)[i]
            b_double = b.double() if isinstance(b, Tensor) and b.dtype in FLOATS else b
            least = tiny + 16 * eps * (terms.get(i, 1.0) * scale if kind == "grads" else 1.0)
            own = eps  # a memory may have fewer digits than what comes in
            if kind == "kept" and a.dtype in FLOATS:
                own = max(eps, torch.finfo(a.dtype).eps)
            spread = _spread(b_double, [getattr(t, kind)[i] for t in trials], own, least)
            # What is left of terms that cancel may be more than the type of a gradient holds.
            overflows = kind == "grads" and isinstance(a, Tensor) and eps * scale > torch.finfo(a.dtype).max
            _compare(a, b, spread, what, beyond, vanishes and kind == "grads", overflows)

    try:
        compare(exact, [])
    except Failure:
        trials = []
        for n in range(20 * ROUNDINGS if case.call.name in PICKS else ROUNDINGS):
            trial = _guess(_in_double(case.call, eps, n), case, double=True, eps=eps)
            same_size = isinstance(trial, Outcome) and all(
                len(getattr(trial, kind)) == len(getattr(got, kind)) for kind in ("values", "grads", "kept")
            )
            trials += [trial] if same_size else []
        try:
            compare(exact, trials)
        except Failure:
            if not _extreme(case.call):
                raise
            again = Call(
                case.call.name, case.call.target, case.call.init, case.call.method,
                tree_map_only(Tensor, lambda x: _leaf(x), case.call.args),
            )  # fmt: skip
            plain = _guess(again, case, double=False)
            if not isinstance(plain, Outcome):
                raise
            compare(plain, trials, beyond=True)


def _huge_scale(call: Call) -> float:
    """Of which gradients of features are sums that may cancel, if it is large; else 1."""
    scale = (call.args | (call.init or {})).get("logit_scale", call.args.get("scale"))
    try:
        scale = abs(float(scale))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return 1.0
    return scale if 1e4 < scale < INF else 1.0


def _terms_of_temperatures(call: Call) -> dict[int, float]:
    """The size of the terms of the gradient of each learned temperature T, by its place among the gradients: a cosine
    divided by T^2. Where all rows are equal they cancel, and no rounding of the arguments moves a cosine from its
    maximum of 1: of what the products round nothing would be seen."""
    leaves = [x for x in _tensors(call.args) + _tensors(call.init or {}) if x.requires_grad and not x.is_meta]
    leaves = list({id(x): x for x in leaves}.values())
    named = [given.get("temperature") for given in (call.args, call.init or {})]
    matryoshka = isinstance(call.target, functools.partial)  # of nt_xent(z0, z1, temperature)
    return {
        i: max(1.0, x.item() ** -2)
        for i, x in enumerate(leaves)
        if x.ndim == 0 and (matryoshka or any(x is t for t in named)) and abs(x.item()) > 1e-15
    }


def _leaf(x: Tensor) -> Tensor:
    if type(x) is Wrapper:
        x = x.inner.requires_grad_(x.requires_grad)
    return x.detach().clone().requires_grad_(x.requires_grad) if x.dtype.is_floating_point else x.clone()


def _shortest_prefix(call: Call) -> int | None:
    """How many features of a row a Matryoshka loss divides by their length; None: all, as other losses do."""
    if isinstance(call.target, functools.partial):
        return min(call.target.args[1])
    return min(call.init["dims"]) if call.name.startswith("MatryoshkaLoss") else None


def _extreme(call: Call) -> bool:
    """Whether a number is so large or small that fp32 cannot square it, or that 16 bits cannot hold it."""
    prefix = _shortest_prefix(call)
    for x in tree_flatten((call.args, call.init))[0]:
        if isinstance(x, Tensor) and x.dtype in FLOATS and not x.is_meta and x.layout == torch.strided:
            x = (x.inner if type(x) is Wrapper else x).detach().double().abs()
            if x.ndim > 1 and (x[..., :prefix].sum(-1) == 0).any():  # the gradient of a row is divided by its length
                return True
            x = x[(x != 0) & ~x.isnan()]
            if x.numel() and (x.max() > 1e4 or x.min() < 1e-15):
                return True
        if isinstance(x, (int, float)) and x and not 1e-15 < abs(x) < 1e15:
            return True
    return False


ALLOWED = (ValueError, TypeError, NotImplementedError, IndexError, RuntimeError)
PACKAGE = str(Path(sslkern.__file__).parent)


def _check_refusal(error: BaseException, call: Call) -> None:
    """A sentence of ours that names an argument."""
    kind, text = type(error), str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    said = f"{kind.__name__} at {place}: {text[:300]!r}"
    if any(frame.name == "_linear" for frame in frames):
        return  # of the encoder
    if kind not in ALLOWED or (kind is RuntimeError and not text.startswith("backend ")):
        raise Failure(f"raised {said}") from error
    if "\n" in text or len(text) < 10:
        raise Failure(f"more or less than a sentence: {said}") from error
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno)
    ours = last.filename.startswith(PACKAGE) and ("raise" in line or "/backends/" in last.filename)
    if not ours:
        raise Failure(f"not a sentence of ours: {said}") from error
    if kind not in (NotImplementedError, RuntimeError) and not any(
        re.search(rf"\b{re.escape(name)}\b", text) for name in call.names()
    ):
        raise Failure(f"names no argument: {said}") from error


def _check_memory(call: Call, guards: list) -> None:
    written = WRITES.get(call.name, set())
    ours = [t.data_ptr() for name, t in call.args.items() if name in written and isinstance(t, Tensor) and _plain(t)]
    for memory, before, view in guards:
        after = memory
        if view.data_ptr() in ours:
            after, place = memory.clone(), (view.shape, view.stride(), view.storage_offset())
            inside = after.view(view.dtype).as_strided(*place)
            if not any(step == 0 and size > 1 for step, size in zip(view.stride(), view.shape, strict=True)):
                inside.copy_(before.view(view.dtype).as_strided(*place))
        if not torch.equal(after, before):
            raise Failure("wrote into an argument, or beside it")


# ---- many cases ------------------------------------------------------------------------------------------------------


def run_case(seed: int, number: int, keep=None, around: bool = True) -> tuple[str | None, str | None, str]:
    """How it ended, or what failed, and the case in words."""
    case = make(seed, number, keep, around)
    shown = str(case)
    try:
        return check(case), None, shown
    except Failure as failure:
        return None, str(failure), shown
    except Exception as error:  # what a result is that cannot be compared
        return None, f"cannot be checked: {type(error).__name__}: {error}", shown


def smallest(seed: int, number: int) -> str:
    """The failing case with as few changes as still fail."""
    best = run_case(seed, number)
    for around in (False, True):
        for keep in (set(), {0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}):
            tried = run_case(seed, number, keep, around)
            if tried[1] is not None:
                return f"{tried[2]}: {tried[1]}"
    return f"{best[2]}: {best[1]}"


def child(seed: int, start: int, stop: int, progress: str, results: str) -> None:
    """Cases start to stop; where it is stands in the file `progress`, what happened as lines of JSON in `results`."""
    torch.set_num_threads(1)
    faulthandler.enable()
    where, planted = os.open(progress, os.O_WRONLY | os.O_CREAT), os.environ.get("SSLKERN_FUZZ_PLANTED")
    ends: collections.Counter = collections.Counter()
    with open(results, "a", buffering=1) as out:
        for number in range(start, stop):
            os.pwrite(where, f"{number:12d}".encode(), 0)
            faulthandler.dump_traceback_later(1 if planted and number == 3 else SECONDS, exit=True)
            if planted and number == 3:  # a test of this file
                os.kill(os.getpid(), signal.SIGSEGV) if planted == "dies" else time.sleep(SECONDS)
            end, failure, shown = run_case(seed, number)
            if failure is not None:
                out.write(json.dumps({"case": number, "failure": failure, "call": shown}) + "\n")
            else:
                ends[end] += 1
            if number % 100 == 99 or number == stop - 1 or planted:
                out.write(json.dumps({"ends": ends}) + "\n")
                ends.clear()
        faulthandler.cancel_dump_traceback_later()


@dataclasses.dataclass
class Report:
    count: int
    ends: collections.Counter
    failures: list[dict]


def run(count: int, seed: int = 0, start: int = 0, tell: Callable[[str], None] = lambda line: None) -> Report:
    """Cases start to start + count in child processes of CHUNK, a new one after each that dies."""
    report, first, stop = Report(count, collections.Counter(), []), start, start + count
    environment = os.environ | {"MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        progress, results = Path(folder, "progress"), Path(folder, "results")
        while start < stop:
            end = min(start + CHUNK, stop)
            part = map(str, (start, end, progress, results))
            command = [sys.executable, __file__, "--seed", str(seed), "--child", *part]
            results.write_text("")
            process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
            for record in map(json.loads, results.read_text().splitlines()):
                if "ends" in record:
                    report.ends.update(record["ends"])
                else:
                    report.failures.append(record)
                    tell(f"case {record['case']}: {record['call']}: {record['failure']}")
            start = end
            if process.returncode:
                number = int(progress.read_text()) if progress.exists() else first
                code, start = process.returncode, number + 1
                how = signal.Signals(-code).name if code < 0 else process.stderr.strip()[-600:]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    shown = str(make(seed, number))
                report.failures.append({"case": number, "call": shown, "failure": f"the process died: {how}"})
            tell(f"{start - first} of {count}: {dict(report.ends)}, {len(report.failures)} failures")
    return report


def told(seed: int, failure: dict) -> str:
    """A failure, made small where it is no crash."""
    call = smallest(seed, failure["case"]) if "died" not in failure["failure"] else failure["call"]
    again = f"python tests/fuzz.py --seed {seed} --case {failure['case']}"
    return f"{failure['failure']}: {call} ({again})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one here, and print its smallest failing form")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.seed, int(args.child[0]), int(args.child[1]), *args.child[2:])
        return
    if args.case is not None:
        case = make(args.seed, args.case)
        print(case)
        try:
            print(check(case))
        except Failure:
            traceback.print_exc()
            print("smallest:", smallest(args.seed, args.case))
            sys.exit(1)
        return
    if missing():
        sys.exit(f"add {missing()} to tests/examples.py, or to INITS or EXTRA here")
    report = run(args.count, args.seed, args.start, lambda line: print(line, flush=True))
    for failure in report.failures:
        print(told(args.seed, failure), flush=True)
    print(f"{args.count} cases of seed {args.seed}: {dict(report.ends)}, {len(report.failures)} failures")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
