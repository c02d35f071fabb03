"""Images as grids of patches: a network that sees single patches, and one that sees the rows above."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssltrain.draws import rand


class Patches(nn.Module):
    """A network on each patch of `size` pixels, every `stride` pixels: images [B, C, H, W] -> means [B, features]."""

    def __init__(self, network: nn.Module, size: int, stride: int):
        super().__init__()
        self.network, self.size, self.stride = network, size, stride
        self.features = network.features
        self.overlap = -(-size // stride)  # so many rows further down a patch shares no pixel

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Rows and columns of patches of an image of that height and width."""
        return tuple((pixels - self.size) // self.stride + 1 for pixels in size)

    def cut(self, images: Tensor) -> Tensor:
        """The patches [rows, columns, B, C, size, size]."""
        return images.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride).permute(2, 3, 0, 1, 4, 5)

    def maps(self, patches: Tensor) -> Tensor:
        """The features of patches as `cut` has them, [B, features, rows, columns]."""
        z = self.network(patches.flatten(0, 2).contiguous(memory_format=torch.channels_last))
        return z.unflatten(0, patches.shape[:3]).permute(2, 3, 0, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(self.cut(images)).mean((2, 3))


class Above(nn.Module):
    """z [B, features, rows, columns] -> contexts [B, width, rows, columns], of rows down to their own.

    In each layer a row takes part in the next one, with its neighbours, as in PixelCNN (van den Oord et al. 2016).
    """

    def __init__(self, features: int, width: int, layers: int):
        super().__init__()
        self.first = nn.Conv2d(features, width, 1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, (2, 3)) for _ in range(layers))

    def forward(self, z: Tensor) -> Tensor:
        context = self.first(z)
        for layer in self.layers:
            above = nn.functional.pad(torch.relu(context), (1, 1, 1, 0))  # left, right, and over the first row
            context = context + layer(above)
        return torch.relu(context)


def sometimes_gray(patches: Tensor, share: float) -> Tensor:
    """Patches of colour images, as `Patches.cut` has them; of a share of them one channel, drawn for each, as gray."""
    grid = patches.shape[:3]  # rows, columns, images
    chosen, drawn = rand(grid.numel(), 2, device=patches.device).view(*grid, 2, 1, 1, 1).unbind(3)
    channel = (3 * drawn).long().clamp_max(2).expand(*grid, 1, *patches.shape[4:])
    return torch.where(chosen < share, patches.gather(3, channel), patches)
