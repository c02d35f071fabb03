"""SimCLR: Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning", 2020, arXiv 2002.05709;
version 2 by Chen, Kornblith, Swersky, Norouzi and Hinton, arXiv 2006.10029.

Two random views of every image go through one encoder f and a small projection head g. The loss, NT-Xent (equation 1),
asks of each projection to find its partner among all other projections of the batch:

    loss_i = -log( exp(sim(z_i, z_j) / T) / sum over k != i of exp(sim(z_i, z_k) / T) ),    z = g(f(view))

Afterwards g is thrown away: the features of f serve better (section 4.2, where a linear g and none are worse). Version
2 has a head of three layers, of which the first one may stay for fine-tuning (its section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import sslkern
from ssltrain import encoders
from ssltrain.config import ImageConfig, one_of, option
from ssltrain.draws import others
from ssltrain.images import Images
from ssltrain.methods._method import Method


@dataclass(frozen=True)
class SimCLRConfig(ImageConfig):
    """SimCLR: two augmented views of an image attract, views of different images repel (Chen et al. 2020).

    The default trains a small conv net on 4,000 MNIST digits in about a minute on two CPU cores, then compares its
    features with raw pixels and with the untrained encoder, by linear probe and nearest neighbours.
    """

    method: ClassVar[str] = "simclr"
    presets: ClassVar[dict] = {  # section 2.2 with table 5; the published code
        "imagenet": dict(batch_size=4096, temperature=0.1, optimizer="lars", lr=4.8, weight_decay=1e-6),
        "cifar10": dict(batch_size=512, temperature=0.5, optimizer="lars", lr=1.0, weight_decay=1e-4),
    }

    version: int = option(1, "1: a head of two layers. 2: of three.", **one_of(1, 2))
    head: str = option(
        "mlp",
        "mlp: of --version. linear: of one layer. none: the loss compares the features themselves.",
        **one_of("mlp", "linear", "none"),
    )

    def build(self, data: Images) -> SimCLR:
        layers = {"mlp": self.version + 1, "linear": 1, "none": 0}[self.head]
        encoder = encoders.build(self.encoder, data.train, self.width)
        return SimCLR(encoder, self.augment(data), self.dim, self.temperature, layers, self.shuffle_positives)

    def up_to_middle(self, encoder: encoders.Encoder, weights: dict[str, Tensor]) -> nn.Module:
        if self.version != 2 or self.head != "mlp":
            return super().up_to_middle(encoder, weights)
        return UpToMiddle(encoder, weights)


class UpToMiddle(nn.Sequential):
    """The encoder and the first of the three layers of a head, with the `weights` of a SimCLR: images -> features."""

    def __init__(self, encoder: encoders.Encoder, weights: dict[str, Tensor]):
        self.features = encoder.features
        first = head(self.features, self.features, layers=3)[:3].to(next(encoder.parameters()).device)
        first.load_state_dict({name: weights[f"head.{name}"] for name in first.state_dict()})
        super().__init__(encoder, first)


class SimCLR(Method):
    """SimCLR around any encoder that has the attribute `features`, its output width.

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. `dim` is the width of the
    projections, `temperature` the T of equation 1, and the head has so many `layers`, or is not there. With
    `shuffle_positives` it learns nothing, as a control.

    >>> from ssltrain import augment, encoders
    >>> images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    >>> method = SimCLR(encoders.build("convnet", images), augment.build(1, (28, 28)))
    >>> loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    networks = ("projections",)

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        dim: int = 128,
        temperature: float = 0.2,
        layers: int = 2,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.shuffled = encoder, augment, shuffle_positives
        self.head = head(encoder.features, dim, layers) if layers else nn.Identity()
        self.criterion = sslkern.NTXentLoss(temperature=temperature, stats=True, group="world")

    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [2B, C, H, W]: the first views of all images, then the second ones."""
        return two_views(self.augment, images, self.shuffled)

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of NT-Xent over the 2B views, and `top1`: how many of them find their partner first."""
        z0, z1 = self.projections(views).chunk(2)
        with torch.autocast(views.device.type, enabled=False):  # the engine chooses its own precision
            loss, top1 = self.criterion(z0, z1)
        return loss, {"top1": top1}

    def projections(self, views: Tensor) -> Tensor:
        return self.head(self.encoder(views))


def head(features: int, dim: int, layers: int) -> nn.Sequential:
    """A projection head of `layers` linear layers, batch normalisation and ReLU between them."""
    steps: list[nn.Module] = []
    for _ in range(layers - 1):
        steps += [nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
    return nn.Sequential(*steps, nn.Linear(features, dim, bias=False))


@torch.no_grad()
def two_views(augment: Callable[[Tensor], Tensor], images: Tensor, shuffled: bool = False) -> Tensor:
    """uint8 [B, C, H, W] -> float [2B, C, H, W]: the first views of all images, then the second ones; `shuffled`:
    those of other images.

    Channels last, as the encoder's filters are: the convolutions would convert them, forward and backward.
    """
    pixels = images.float() / 255
    second = pixels[others(len(pixels), pixels.device)] if shuffled else pixels
    return augment(torch.cat([pixels, second])).contiguous(memory_format=torch.channels_last)
