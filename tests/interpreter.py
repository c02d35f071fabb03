"""Triton's interpreter (3.6 and 3.9), mended, and without what takes half of its time."""

import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    """It cuts bf16 off instead of rounding, and multiplies its bits as if they were integers. With 3.6, numpy 2.4 does
    not take an array of one number for a number."""
    cast, multiply = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, x, to):
        if (x.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if (x.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            bits = x.data.view(np.uint32)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))  # to the nearest, ties to even
            rounded = np.where(np.isnan(x.data), np.uint32(0x7FC00000), rounded)
            return TensorHandle((rounded >> 16).astype(np.uint16), tl.bfloat16)
        return cast(self, x, to)

    def create_dot(self, a, b, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return multiply(self, a, b, *args)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def hurry() -> None:
    # Each sum of integers is looked at for an overflow, which the small problems of tests do not have.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # Each call of a function within a kernel puts in place again what an earlier one did.
    patch = functools.cache(interpreter._patch_lang)

    def call(self, *args, **kwargs):
        patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
