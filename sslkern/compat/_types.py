"""The type of a loss, which for the other packages is that of its features."""

from torch import Tensor

from ..common.autocast import autocast_active


def typed_as(loss: Tensor, features: Tensor) -> Tensor:
    """The loss, which is in fp32 or fp64, rounded to the type of the features; not inside autocast, which has
    cross-entropy in fp32."""
    if loss.dtype == features.dtype or autocast_active(features.device.type):
        return loss
    return loss.to(features.dtype)
