from collections.abc import Callable

import torch
from torch.autograd import forward_ad

library = torch.library.Library("sslkern", "DEF")


def define(schema: str, kernel, fake) -> None:
    """Registers an op that runs `kernel` on every device and whose output shapes `fake` computes."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sslkern::{name}", fake, lib=library)


def differentiable(name: str, setup_context, backward, *, twice: bool = False) -> Callable:
    """Registers the derivative of an op for compiled code, and returns the function that calls the op.

    As an autograd.Function the same formulas cost eager code half of the op's own time at small sizes, and work under
    torch.func, which the op's own do not. In forward mode, where the op's own would drop a tangent in silence, the
    function says that there is none. What `setup_context` saves first depends on all that learns. `twice`: backward can
    be differentiated itself.
    """
    torch.library.register_autograd(f"sslkern::{name}", backward, setup_context=setup_context, lib=library)
    op = getattr(torch.ops.sslkern, name).default
    derivative = backward

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(derivative)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(lambda *inputs: op(*inputs))

        @staticmethod
        def backward(ctx, *grads):
            if twice:
                return derivative(ctx, *grads)
            with torch.no_grad():
                grads = derivative(ctx, *grads)
            return Once.apply(ctx.saved_tensors[0], *grads)

    Transformed.setup_context = staticmethod(setup_context)
    Transformed.jvp = staticmethod(no_forward_mode)

    def call(*inputs, learns: bool):
        if torch.compiler.is_compiling():
            return op(*inputs)
        if transformed():
            return Transformed.apply(*inputs)
        return Eager.apply(*inputs) if learns else op(*inputs)

    return call


def transformed() -> bool:
    """Whether torch.func or forward mode is at work; then requires_grad does not tell what gets a derivative."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def no_forward_mode(ctx, *tangents):
    raise NotImplementedError(
        "sslkern has no forward-mode derivatives; use a backward (torch.func.grad, vjp or jacrev), or compute the loss"
        " densely"
    )


def no_second_derivative(ctx, *grads):
    raise NotImplementedError("sslkern has no second derivatives; compute the loss densely where one is needed")


class Once(torch.autograd.Function):
    """`Once.apply(x, *grads)`: the gradients, as a function of x that cannot be differentiated again."""

    generate_vmap_rule = True
    forward = staticmethod(lambda x, *grads: grads)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(no_second_derivative)
    jvp = staticmethod(no_second_derivative)
