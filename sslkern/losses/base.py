"""What the modules share: each holds its options, and its forward calls the function of the loss with them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..common.arguments import check_flags
from ..common.numbers import FLOAT32_MAX, check_number
from ..distributed import Ranks, ranks_of
from ..functional.checks import check_options, scale_of

_SHARING = "group", "strategy", "grad_reduce"
_FLAGS = "normalize", "stats", "two_way", "times_2t"
_NUMBERS = {  # options that are numbers, with the bounds that the functions ask for at each call
    "alpha": (1,),
    "beta": (0,),
    "label_smoothing": (0, 1),
    "sigma": (1e-6,),
    "t": (1e-6, FLOAT32_MAX / 2),
    "tau_plus": (0, 1),
    "uniformity_weight": (0,),
}


class Loss(nn.Module):
    """A loss with its options: the keyword arguments of its function that stay the same from call to call."""

    def __init__(self, **options: Any):
        super().__init__()
        check_options(options.get("reduction", "mean"), *(options[name] for name in _SHARING))
        check_flags(**{name: value for name, value in options.items() if name in _FLAGS})
        for name, bounds in _NUMBERS.items():
            if name in options:
                check_number(name, options[name], *bounds)
        self.options = options

    def _loss(self, loss_fn: Callable[..., Any], *features: Any, **per_call: Any) -> Any:
        """loss_fn with the options of the constructor, and of this call."""
        return loss_fn(*features, **self.options | per_call)

    def _ranks(self, **given: Any) -> Ranks | None:
        """The ranks that share what forward was given, for what comes before or after the loss. It stands for the
        comparison that the function would make: the options, and what the module keeps, belong to it."""
        if self.options["group"] is None:
            return None
        group, strategy, grad_reduce = (self.options[name] for name in _SHARING)
        options = {name: value for name, value in self.options.items() if name not in _SHARING}
        what = type(self).__name__
        return ranks_of(group, strategy, grad_reduce, what, **given, **options, training=self.training)

    def extra_repr(self) -> str:
        return listed(self.options)


class ScaledLoss(Loss):
    """A loss whose similarities are divided by a temperature or multiplied by a logit_scale, which may be learned."""

    def __init__(self, temperature: float | Tensor, logit_scale: float | Tensor | None, **options: Any):
        super().__init__(**options)
        scale_of(temperature, logit_scale)
        self.temperature, self.logit_scale = temperature, logit_scale

    def _loss(
        self,
        loss_fn: Callable[..., Any],
        *features: Any,
        logit_scale: float | Tensor | None = None,
        **per_call: Any,
    ) -> Any:
        """The same; a logit_scale given to forward counts before that of the constructor."""
        logit_scale = self.logit_scale if logit_scale is None else logit_scale
        return loss_fn(*features, temperature=self.temperature, logit_scale=logit_scale, **self.options | per_call)

    def _ranks(self, **given: Any) -> Ranks | None:
        scale = given.pop("logit_scale")
        return super()._ranks(**given, **(self._scale() if scale is None else dict(logit_scale=scale)))

    def _scale(self) -> dict:
        """The one of temperature and logit_scale that counts."""
        name = "temperature" if self.logit_scale is None else "logit_scale"
        return {name: getattr(self, name)}

    def extra_repr(self) -> str:
        return listed(self._scale() | self.options)


class TwoViewLoss(ScaledLoss):
    """`loss_fn` of two views z0, z1 [N, D]."""

    loss_fn: Callable[..., Any]

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        return self._loss(self.loss_fn, z0, z1, ids=ids, weights=weights, logit_scale=logit_scale)


def listed(options: dict) -> str:
    """The options of a module for its `repr`, on one line: a tensor by its value now, and whether it learns."""
    return ", ".join(f"{name}={_on_one_line(value)}" for name, value in options.items())


def _on_one_line(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_meta:
        text = "..."
    elif value.numel() == 1:
        text = f"{value.detach().item():.4g}"
    else:
        text = str(list(value.shape))
    return f"{type(value).__name__}({text})"
