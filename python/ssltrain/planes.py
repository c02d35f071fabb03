"""The channels that an image can be seen in, by a letter each.

R, G, B are those of a colour image; L, a, b its lightness and two opponent colours in the Lab space; S and D what is
smooth in an image, gray or not, and the details that are left, which together are the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLOUR, ANY = "RGBLab", "SD"


def are_groups(views: str) -> bool:
    """Whether these are two groups of letters or more, with commas between."""
    groups = views.split(",")
    return len(groups) > 1 and all(group and set(group) <= set(COLOUR + ANY) for group in groups)


def split(images: Tensor, letters: str) -> Tensor:
    """float [B, C, H, W] in [0, 1] -> [B, planes, H, W], a plane for each letter.

    >>> gray = torch.rand(2, 1, 8, 8)
    >>> split(gray, "SD").sum(1, keepdim=True).allclose(gray)
    True
    """
    planes: dict[str, Tensor] = {}
    if set(letters) & set("RGB"):
        planes |= zip("RGB", images.unbind(1), strict=True)
    if set(letters) & set("Lab"):
        planes |= zip("Lab", _lab(*images.unbind(1)), strict=True)
    if set(letters) & set(ANY):
        gray = images.mean(1, keepdim=True)
        smooth = F.avg_pool2d(gray, 5, stride=1, padding=2, count_include_pad=False)
        planes |= {"S": smooth[:, 0], "D": (gray - smooth)[:, 0]}
    return torch.stack([planes[letter] for letter in letters], 1)


def _lab(*rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CIE 1976, of sRGB under D65: 9 ms for 256 images of 32 x 32 on one CPU core. kornia's would wait for a GPU."""
    light = [torch.where(x > 0.04045, ((x.clamp_min(0) + 0.055) / 1.055) ** 2.4, x / 12.92) for x in rgb]

    def cube_root(red: float, green: float, blue: float, white: float) -> Tensor:
        share = (red * light[0] + green * light[1] + blue * light[2]) / white
        return torch.where(share > 0.008856, share.clamp_min(0.008856) ** (1 / 3), 7.787 * share + 4 / 29)

    x = cube_root(0.412453, 0.357580, 0.180423, 0.950456)
    y = cube_root(0.212671, 0.715160, 0.072169, 1.0)
    z = cube_root(0.019334, 0.119193, 0.950227, 1.088754)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


class Planes(nn.Module):
    """`split`, each plane standardised by its mean and deviation over (at most 5,000 of) the training images."""

    mean: Tensor
    std: Tensor

    def __init__(self, letters: str, images: Tensor):  # uint8 [N, C, H, W]
        super().__init__()
        self.letters = letters
        seen = split(images[:: -(-len(images) // 5000)].float() / 255, letters).double()
        std, mean = torch.std_mean(seen, (0, 2, 3), correction=0)
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", std.clamp_min(1e-3).float().view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (split(images, self.letters) - self.mean) / self.std


class ByView(nn.Module):
    """Planes [B, P, H, W], of each view so many that follow one another -> the features of all views, side by side."""

    def __init__(self, planes: Sequence[int], networks: Sequence[Any]):
        super().__init__()
        self.planes, self.networks = list(planes), nn.ModuleList(networks)
        self.features = sum(network.features for network in networks)

    def forward(self, planes: Tensor) -> Tensor:
        views = planes.split(self.planes, 1)
        return torch.cat([network(view) for network, view in zip(self.networks, views, strict=True)], 1)


def as_picture(planes: Tensor) -> Tensor:
    """Standardised planes [B, 1 to 3, H, W] as colours in [0, 1], [B, 3, H, W]: one is gray, two have no blue."""
    shades = (0.5 + planes / 5).clamp(0, 1)
    if planes.shape[1] == 1:
        return shades.expand(-1, 3, -1, -1)
    return F.pad(shades, (0, 0, 0, 0, 0, 3 - planes.shape[1]))
