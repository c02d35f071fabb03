"""SimCLR's augmentations by kornia: the whole batch at once, on the device that trains.

Measured on one CPU core for 512 views: affine 6 ms, blur and erasing 3 ms each at 1 x 28 x 28; crop 22 ms, colour 9 ms
and hue 2 ms at 3 x 32 x 32 (kornia's hue, by way of HSV, 35 ms: half the time of a small encoder's step). Elastic
deformation, 53 and 140 ms, is left out for its price. On MNIST-5k, 40 epochs and one seed, a strong affine map without
a crop gave 0.955 on held-out training images; a crop and a weaker one 0.943.

kornia draws its few numbers an image on the CPU and sends them to a GPU without waiting. Its steps stay off the device,
since drawn there the numbers come back to be looked at. Which images a step is for is drawn here, as some versions of
kornia draw the rest for these alone: what an image gets would depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import kornia.augmentation as K
import torch
from torch import Tensor, nn

from ssltrain import UsageError
from ssltrain.draws import drawing, rand

RECOLOUR = "jitter", "hue", "gray"


class Drawn(nn.Module):
    """A step of kornia's, with the draws of the samples."""

    def __init__(self, step: K.AugmentationBase2D):
        super().__init__()
        self.step = step

    def forward(self, images: Tensor) -> Tensor:
        with drawing():
            parameters = self.step.forward_parameters(images.shape)
        return self.step(images, params=parameters)


class Sometimes(nn.Module):
    """A step for each image with probability p."""

    def __init__(self, p: float, step: nn.Module):
        super().__init__()
        self.p, self.step = p, step

    def forward(self, images: Tensor) -> Tensor:
        chosen = rand(len(images), 1, 1, 1, device=images.device) < self.p
        return torch.where(chosen, self.step(images), images)


class Hue(nn.Module):
    """Turns the colours of each image about the gray axis, by up to `turn` of the circle to either side.

    float [B, 3, H, W] in [0, 1] to the same.

    >>> Hue(0.1)(torch.full((2, 3, 4, 4), 0.5)).allclose(torch.tensor(0.5))
    True
    """

    def __init__(self, turn: float):
        super().__init__()
        self.turn = turn

    def forward(self, images: Tensor) -> Tensor:
        draw = rand(len(images), 1, 1, device=images.device)
        angle = 2 * math.pi * self.turn * (2 * draw - 1)
        gray = torch.full((3, 3), 1 / 3, device=images.device)
        eye = torch.eye(3, device=images.device)
        across = (eye.roll(1, 0) - eye.roll(1, 1)) / math.sqrt(3)  # made where it is needed: no transfer
        keep = eye - gray
        matrix = gray + angle.cos() * keep + angle.sin() * across  # Rodrigues' formula
        return (matrix @ images.flatten(2)).clamp_(0, 1).view_as(images)


def build(
    channels: int, size: tuple[int, int], flip: bool | None = None, names: str | None = None, recoloured: bool = True
) -> Callable[[Tensor], Tensor]:
    """The augmentation for images of `channels` (1 or 3) and `size` (height, width): float [B, C, H, W] to the same.

    Colour images are cropped, flipped, colour-jittered and sometimes turned gray, as in SimCLR's appendix A. Grayscale
    images are rotated, moved, scaled and sheared, blurred, and partly erased. `flip=None` mirrors colour images only,
    since a mirrored digit is another sign. `recoloured=False` leaves colours as they are. `names`, such as "crop,gray",
    are the steps that are on, "none" if none is; then `flip` and `recoloured` say nothing.

    >>> build(3, (32, 32))(torch.rand(4, 3, 32, 32)).shape
    torch.Size([4, 3, 32, 32])
    """
    there = _steps(channels, size)
    if names is None:
        mirrored = flip or (flip is None and channels == 3)
        left_out = [*([] if mirrored else ["flip"]), *([] if recoloured else RECOLOUR)]
        chosen = [name for name in there if name not in left_out]
    else:
        chosen = [] if names == "none" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in there:
            raise UsageError(
                f"--augmentations {names}: {name!r} is nothing that can be done to "
                f"{'colour' if channels == 3 else 'grayscale'} images; choose of {', '.join(there)}, or none."
            )
    steps = [step for name, step in there.items() if name in chosen]

    def augment(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return augment


def _steps(channels: int, size: tuple[int, int]) -> dict[str, nn.Module]:
    """What can be done to images of that many channels, by name, in the order in which it is done."""
    if channels == 3:
        crop = K.RandomResizedCrop(size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), cropping_mode="resample")
        steps: dict[str, nn.Module] = {
            "crop": Drawn(crop),
            "jitter": Sometimes(0.8, Drawn(K.ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0))),
            "hue": Sometimes(0.8, Hue(0.1)),
            "gray": Sometimes(0.2, Drawn(K.RandomGrayscale(p=1.0))),
        }
    else:
        steps = {
            "affine": Drawn(K.RandomAffine(25.0, translate=(0.15, 0.15), scale=(0.7, 1.3), shear=20.0, p=1.0)),
            "blur": Sometimes(0.5, Drawn(K.RandomGaussianBlur((3, 3), (0.1, 1.5), p=1.0))),
            "erase": Sometimes(0.5, Drawn(K.RandomErasing(scale=(0.02, 0.2), p=1.0))),
        }
    return steps | {"flip": Sometimes(0.5, Drawn(K.RandomHorizontalFlip(p=1.0)))}
