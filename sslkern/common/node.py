"""A function with its derivative, as one node of the graph of autograd: the one way in which this package makes them.

Three kinds of code call it. Eager code with plain tensors runs the function itself, past the dispatcher and the Python
of `Function.apply`, which cost as much as a small kernel. Compiled code, and tensors that say themselves what they are,
take the registered operator. `torch.func` takes the same formulas around that operator.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .tensors import accumulator, eagerly_transformed, plain

library = torch.library.Library("sslkern", "DEF")


def past_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called as it is."""
    return not (is_dynamo_compiling() or eagerly_transformed()) and plain(*tensors)


def from_eager(ctx: Any) -> bool:
    """Whether the forward of this context was called as it is."""
    return getattr(ctx, "eager", False)


def past_dispatcher_in(ctx: Any, *grads: Tensor | None) -> bool:
    """The same in a backward: what its context saved is plain if the forward was called so."""
    if not from_eager(ctx) or not past_dispatcher(*grads):
        return False
    for g in grads:
        if g is not None and _batched(g):  # by is_grads_batched
            return False
    return True


_batched = torch._C._functorch.is_legacy_batchedtensor


class Operator:
    """`function(*inputs)`, registered under the schema for every device.

    Args:
        schema: as torch.library takes it; the first input is a tensor.
        function: returns a tensor or a tuple; None for what is not asked for, where the operator returns an empty one,
            in the type of the sums.
        fake: the empty outputs of the same shapes and types, for the compiler.
    """

    def __init__(self, schema: str, function: Callable, fake: Callable):
        self.name = schema.partition("(")[0]
        self.function = function
        library.define(schema)
        library.impl(self.name, _without_none(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"sslkern::{self.name}", fake, lib=library)
        self.registered = getattr(torch.ops.sslkern, self.name).default

    def way(self, *tensors: Tensor | None) -> Callable:
        """What to call with inputs of which these are the tensors."""
        return self.function if past_dispatcher(*tensors) else self.registered

    def way_back(self, ctx: Any, *grads: Tensor | None) -> Callable:
        """What to call in a backward, with what its context saved and these gradients."""
        return self.function if past_dispatcher_in(ctx, *grads) else self.registered


class Node:
    """A function with its derivative.

    Args:
        function: an Operator, or a function of torch's own operators, into which the compiler looks.
        save: `save(ctx, inputs, outputs)`.
        backward: `backward(ctx, *grads)`; returns a gradient or None for each input, by `once` where they cannot be
            differentiated again.
        name: of a function that is no Operator, for the profiler.
        outputs: how many of the first outputs of a tuple have a gradient, which comes as None where it is 0. None:
            there is one output.
        jvp: the derivative in forward mode. Without it that is refused, where torch would drop a tangent in silence.
    """

    def __init__(
        self,
        function: Operator | Callable,
        save: Callable,
        backward: Callable,
        *,
        name: str = "",
        outputs: int | None = None,
        jvp: Callable | None = None,
    ):
        def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor | None, ...]) -> None:
            if outputs is not None:
                ctx.mark_non_differentiable(*[x for x in output[outputs:] if x is not None])
                ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        if isinstance(function, Operator):
            name, kernel, seen = function.name, function.function, function.registered
            torch.library.register_autograd(f"sslkern::{name}", backward, setup_context=setup, lib=library)
            self.registered = seen
        else:
            kernel = seen = function
            self.registered = _autograd_function(name, seen, setup, backward).apply
        self.function = kernel
        self.transformed = _autograd_function(name, seen, setup, backward, jvp or no_forward_mode).apply
        self.eager = _eager_apply(_autograd_function(name, kernel, setup, backward))

    def way(self, learns: bool, *tensors: Tensor | None) -> Callable:
        """What to call with inputs of which these are the tensors. learns: whether one of them gets a gradient."""
        if torch.compiler.is_compiling():
            return self.registered
        if eagerly_transformed():
            return self.transformed
        if not plain(*tensors):
            return self.registered
        return self.eager if learns else self.function


def _autograd_function(
    name: str, function: Callable, setup: Callable, backward: Callable, jvp: Callable | None = None
) -> type[torch.autograd.Function]:
    parts = dict(forward=function, setup_context=setup, backward=backward, jvp=jvp)
    parts = {part: staticmethod(of) for part, of in parts.items() if of is not None}  # the compiler takes no jvp
    return type(f"sslkern::{name}", (torch.autograd.Function,), parts | {"generate_vmap_rule": True})


def _eager_apply(function: type[torch.autograd.Function]) -> Callable:
    """Its apply of C++: that of torch.autograd.Function first looks for torch.func, as `way` does, and for the names of
    arguments. What the engine calls in the backward is the one of the function, past another `apply` of Python."""
    context: Any = function._backward_cls
    context.apply, context.eager = function.backward, True
    eager: Any = super(torch.autograd.Function, function)
    return eager.apply


def _without_none(function: Callable) -> Callable:
    """The outputs of an operator, which are tensors."""

    def call(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        output = function(*inputs)
        if not isinstance(output, tuple):
            return output
        like = inputs[0]
        return tuple(like.new_empty(0, dtype=accumulator(like)) if x is None else x for x in output)

    return call


_NOTHING = contextlib.nullcontext()


def outside_autograd() -> contextlib.AbstractContextManager:
    """For the backward of an operator: `torch.no_grad`, which costs as much as a small kernel, where it is not at work
    already, as it mostly is."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def once(depend_on: Sequence[Tensor | None], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients, as functions of what they depend on, the upstream gradients among it, which cannot be
    differentiated again."""
    return _Once.apply(len(depend_on), *depend_on, *grads) if torch.is_grad_enabled() else grads


def no_forward_mode(ctx: object, *tangents: object) -> NoReturn:
    raise NotImplementedError(
        "sslkern has no forward-mode derivatives; use a backward (torch.func.grad, vjp or jacrev), or compute the loss"
        " densely"
    )


def no_second_derivative(ctx: object, *grads: object) -> NoReturn:
    raise NotImplementedError("sslkern has no second derivatives; compute the loss densely where one is needed")


class _Once(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(lambda count, *tensors: tensors[count:])
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(no_second_derivative)
    jvp = staticmethod(no_second_derivative)
