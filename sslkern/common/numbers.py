"""What counts as a number among the arguments: Python's, NumPy's, fractions, and what the compiler makes of them."""

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

FLOAT32_MAX = 2.0**128 * (1 - 2.0**-24)


def number(x: Any) -> float | None:
    """x as a float, infinite where it is too large for one; None where it is no real number. A bool is none."""
    if type(x) is float:
        return x
    if isinstance(x, bool) or not isinstance(x, (numbers.Real, torch.SymFloat, torch.SymInt)):
        return None
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf  # type: ignore[operator]  # reals can be compared


def check_number(name: str, x: float, low: float, high: float = math.inf, *, closed: bool = False) -> float:
    """x as a float, a number with low <= x < high; with `closed` low <= x <= high."""
    value = x if type(x) is float else number(x)
    if value is None or not (low <= value < high or (closed and value == high)):
        bound = f"at least {float(low):g}"
        if high < math.inf:
            bound += f" and {'at most' if closed else 'below'} {float(high):g}"
        raise ValueError(f"{name} must be a number, {bound}, not {shown(x)}")
    return value


def check_finite(name: str, x: float, otherwise: str = "") -> float:
    """x as a float that fp32 can hold. `otherwise`: what else it could have been, " or a tensor".

    Compared, not asked math.isfinite, which the compiler cannot ask of a number that it holds as a symbol.
    """
    value = number(x)
    if value is None or not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite number (in fp32){otherwise}, not {shown(x)}")
    return value


def check_size(name: str, x: int, least: int = 1) -> int:
    """x as an int, at least `least`."""
    value = x if type(x) is int or isinstance(x, torch.SymInt) else None
    if value is None and not isinstance(x, (bool, Tensor)):
        try:
            value = operator.index(x)
        except TypeError:
            pass
    if value is not None and value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, not {shown(x)}")
    if value is None or value < least:
        kind = "a positive integer" if least == 1 else f"an integer, {least} or more"
        raise ValueError(f"{name} must be {kind}, not {shown(x)}")
    return value


def constant(value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """value as a 0-d tensor on the device of `like`, for compiled code: given to an op as a number, or to torch.full,
    a float that changes would be compiled anew for each value; not so a product of tensors."""
    return torch.ones((), dtype=dtype, device=like.device) * value


def log(value: float, like: Tensor) -> float | Tensor:
    """The logarithm of a positive number, in the type of `like`: math.log would tie compiled code to a batch size."""
    if torch.compiler.is_compiling():
        return constant(value, like, like.dtype).log()
    return math.log(value)


def shown(x: object) -> str:
    """x for an error message, on one line."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    text = repr(x) if x is None or isinstance(x, (bool, str, numbers.Number)) else ""
    return text if 0 < len(text) <= 40 else f"a {type(x).__name__}"
