"""Encoders for small images: a conv net of 0.1 M parameters, ResNet-18 with the CIFAR stem, and any model of timm."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ssltrain import UsageError


class Standardize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel of the training images."""

    mean: Tensor
    std: Tensor

    def __init__(self, images: Tensor):  # uint8 [N, C, H, W]
        super().__init__()
        # Summed per channel over the 256 grey levels: exact, and a float copy of the whole set is not needed.
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = [torch.bincount(images[:, c].flatten(), minlength=256).double() for c in range(images.shape[1])]
        mean = torch.stack([(n * levels).sum() / n.sum() for n in counts])
        var = torch.stack([(n * levels**2).sum() / n.sum() for n in counts]) - mean**2
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", var.clamp_min(1e-6).sqrt().float().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _conv(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out)]


class _Pooled(nn.Module, ABC):
    """A network whose features are the means of its last maps, under the names of timm."""

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """The last maps."""

    def forward_head(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class ConvNet(_Pooled, nn.Sequential):
    """Three 3 x 3 convolutions of stride 2 and a global average. [B, C, H, W] -> [B, 4 * width]."""

    def __init__(self, channels: int, width: int = 32):
        self.features = 4 * width
        super().__init__(
            *_conv(channels, width, 2),
            nn.ReLU(),
            *_conv(width, 2 * width, 2),
            nn.ReLU(),
            *_conv(2 * width, 4 * width, 2),
            nn.ReLU(),
        )

    def forward_features(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, x)


class _Block(nn.Module):
    """The basic residual block (He et al. 2016, arXiv 1512.03385, figure 2), its shortcut a 1 x 1 convolution."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(c_in, c_out, stride)
        self.conv2, self.bn2 = _conv(c_out, c_out, 1)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet18(_Pooled):
    """ResNet-18 for small images: a 3 x 3 stem of stride 1 and no max-pooling, as SimCLR's appendix B.9 does for CIFAR.

    [B, C, H, W] -> [B, 8 * width]; 11 M parameters at width 64. Its weights have the names that torchvision and timm
    use.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.features = 8 * width
        self.conv1, self.bn1 = _conv(channels, width, 1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(4):
            c_in, c_out = widths[stage : stage + 2]
            blocks = _Block(c_in, c_out, 1 if stage == 0 else 2), _Block(c_out, c_out, 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward_features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _timm(name: str, channels: int) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that does not fit to torch
        reason = " ".join(str(error).split())
        raise UsageError(f"--encoder timm:{name}: timm cannot be imported ({reason}); pip install timm.") from error
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    except Exception as error:  # a model that is not there, or takes no such images
        reason = " ".join(str(error).split())
        raise UsageError(f"--encoder timm:{name}: timm cannot build it ({reason}); see timm.list_models().") from error
    network.features = network.num_features
    return network


class Encoder(nn.Sequential):
    """Images, float [B, C, H, W] in [0, 1], are standardised, and a network makes `features` of them, [B, features].

    In between, a network has maps [B, C', H', W'], under the names of timm: `forward_features` gives the last ones, and
    `forward_head` pools them.
    """

    features: int

    def __init__(self, standardize: nn.Module, network: Any):
        super().__init__(standardize, network)
        self.features = network.features
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def maps_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The last maps and the features, in one pass."""
        network: Any = self[1]
        maps = network.forward_features(self[0](images))
        return maps, network.forward_head(maps)


def network(name: str, channels: int, width: int = 1) -> nn.Module:
    """`convnet` or `resnet18`, `width` times as wide as they are, or `timm:<name>`, for images of so many channels."""
    kind, _, model = name.partition(":")
    builders = {
        "convnet": lambda: ConvNet(channels, 32 * width),
        "resnet18": lambda: ResNet18(channels, 64 * width),
        "timm": lambda: _timm(model, channels),
    }
    return builders[kind]()


def build(name: str, images: Tensor, width: int = 1) -> Encoder:
    """The named encoder for images like these, uint8 [N, C, H, W]: float [B, C, H, W] in [0, 1] -> float [B, features].

    >>> encoder = build("convnet", torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    >>> encoder(torch.rand(5, 3, 32, 32)).shape, encoder.features
    (torch.Size([5, 128]), 128)
    >>> build("convnet", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), width=2).features
    256
    """
    return Encoder(Standardize(images), network(name, images.shape[1], width))


@torch.no_grad()
def calibrated(encoder: Any, batches: Iterable[Tensor]) -> Any:
    """A copy whose batch normalisation has the statistics of these batches, as training would have left it.

    Those that it is made with, mean 0 and variance 1, are a handicap that an untrained encoder need not have.
    """
    encoder = copy.deepcopy(encoder).eval()
    for norm in encoder.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
    for batch in batches:
        encoder(batch)
    return encoder.eval()
