"""SupCon: Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu and Krishnan, "Supervised Contrastive Learning",
2020, arXiv 2004.11362.

SimCLR for images with labels: a view attracts not only its partner but all views P(i) of its class, and the others of
the 2B views are negatives (equation 2, L_out, the better of the two by the paper):

    loss_i = -1 / |P(i)| sum over p in P(i) of log( exp(z_i . z_p / T) / sum over a != i of exp(z_i . z_a / T) )

with all z of length 1. Where no two images of a batch share a class it is SimCLR. What it learns is what tells the
classes apart, as cross entropy does, but between pairs of images, without a weight vector for each class. Features for
later use are those of the encoder; the head is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import sslkern
from ssltrain import UsageError, draws, encoders
from ssltrain.config import ImageConfig, peak
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.methods.simclr import head, two_views


@dataclass(frozen=True)
class SupConConfig(ImageConfig):
    """SupCon: with labels, all views of a class attract (Khosla et al. 2020).

    Says, beside supervised, how far labels would lead. Evaluated as simclr is.
    """

    method: ClassVar[str] = "supcon"
    presets: ClassVar[dict] = {  # the published code
        "cifar10": dict(temperature=0.1, batch_size=1024, optimizer="sgd", lr=0.5, weight_decay=1e-4),
    }

    lr: float = peak(4e-3)

    def build(self, data: Images) -> SupCon:
        labels = labels_of(data, self.method)
        encoder = encoders.build(self.encoder, data.train, self.width)
        return SupCon(encoder, self.augment(data), labels, self.dim, self.temperature, self.shuffle_positives)


class SupCon(Method):
    """SupCon of training images that have `labels` int64 [N], around any encoder that has the attribute `features`.

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. Which images a batch is,
    `draws.rows` says. With `shuffle_positives` it learns nothing, as a control.

    >>> from ssltrain import augment, encoders
    >>> images, labels = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8), torch.arange(64) % 10
    >>> method = SupCon(encoders.build("convnet", images), augment.build(1, (28, 28)), labels)
    >>> with draws.Draws(seed=0, epoch=0, batch=0, rows=torch.arange(64)):
    ...     loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    networks = ("projections",)
    labels: Tensor

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        labels: Tensor,
        dim: int = 128,
        temperature: float = 0.2,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.shuffled = encoder, augment, shuffle_positives
        self.register_buffer("labels", labels, persistent=False)  # the data have them
        self.head = head(encoder.features, dim, layers=2)
        self.criterion = sslkern.SupConLoss(temperature, group="world")

    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [2B, C, H, W]: the first views of all images, then the second ones."""
        return two_views(self.augment, images, self.shuffled)

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the 2B views."""
        z = torch.stack(self.projections(views).chunk(2), 1)
        with torch.autocast(views.device.type, enabled=False):  # the engine chooses its own precision
            return self.criterion(z, labels_of_batch(self.labels, self.shuffled)), {}

    def projections(self, views: Tensor) -> Tensor:
        return self.head(self.encoder(views))


def labels_of(data: Images, method: str) -> Tensor:
    """int64 [N], of the training images; a `UsageError` if they have none."""
    if not data.classes:
        raise UsageError(
            f"--data {data.name}: has no labels, which {method} learns from; name images in class folders, or take a "
            "method that needs none, such as simclr."
        )
    return data.train_labels


def labels_of_batch(labels: Tensor, shuffled: bool) -> Tensor:
    """int64 [B], of the current batch; `shuffled`: those of other images."""
    found = labels[draws.rows(labels.device)]
    return found[draws.others(len(found), labels.device)] if shuffled else found
