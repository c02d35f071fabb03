"""NNCLR: Dwibedi, Aytar, Tompson, Sermanet and Zisserman, "With a Little Help from My Friends: Nearest-Neighbor
Contrastive Learning of Visual Representations", 2021, arXiv 2104.14548.

As in SimCLR two views of every image go through one encoder and one head, z0 and z1. But what a view has to find is not
its partner: it is what resembles the partner most in a support set Q of earlier projections. So positives differ as
other images of the same kind do, not as augmentations only. The view that searches has a predictor p, one more head
(equation 3):

    loss_i = -log( exp(nn(z0_i) . p1_i / T) / sum over k of exp(nn(z0_i) . p1_k / T) ),    p1 = p(z1)

    nn(z) = the row of Q that is nearest to z                                                             (equation 4)

and the same with the views exchanged. All are of length 1. Gradients reach the encoder through p alone; Q is a queue
and gets the z0 of each batch, of the one encoder that there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import sslkern
from ssltrain import encoders
from ssltrain.config import ImageConfig, at_least, option
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.methods.simclr import head, two_views


@dataclass(frozen=True)
class NNCLRConfig(ImageConfig):
    """NNCLR: a view finds the nearest neighbour of the other view, among earlier ones (Dwibedi et al. 2021).

    A support set keeps the projections of earlier batches to choose neighbours from. Evaluated as simclr is.
    """

    method: ClassVar[str] = "nnclr"
    presets: ClassVar[dict] = {  # section 4.1
        "imagenet": dict(temperature=0.1, support=98304, dim=256, batch_size=4096)
        | dict(optimizer="lars", lr=4.8, weight_decay=1e-6),
    }

    support: int = option(8192, "Projections of earlier batches that neighbours are chosen from.", **at_least(1))

    def build(self, data: Images) -> NNCLR:
        encoder = encoders.build(self.encoder, data.train, self.width)
        return NNCLR(encoder, self.augment(data), self.dim, self.temperature, self.support, self.shuffle_positives)


class NNCLR(Method):
    """NNCLR around any encoder that has the attribute `features`.

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. `support` is the size of
    the support set. With `shuffle_positives` it learns nothing, as a control.

    >>> from ssltrain import augment, encoders
    >>> images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    >>> method = NNCLR(encoders.build("convnet", images), augment.build(1, (28, 28)), support=512)
    >>> loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    networks = ("projections_and_predictions",)
    criterion: sslkern.NNCLRLoss

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        dim: int = 128,
        temperature: float = 0.2,
        support: int = 8192,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.shuffled = encoder, augment, shuffle_positives
        self.head = head(encoder.features, dim, layers=3)
        self.predictor = head(dim, dim, layers=2)
        self.criterion = sslkern.NNCLRLoss(dim, support, temperature, stats=True, group="world")
        self.criterion.support.queue.copy_(sslkern.FeatureQueue(dim, support).queue)  # by the seed of the run

    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [2B, C, H, W]: the first views of all images, then the second ones."""
        return two_views(self.augment, images, self.shuffled)

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the 2B views, and `top1`: how many neighbours come first at their own prediction."""
        z, p = self.projections_and_predictions(views)
        with torch.autocast(views.device.type, enabled=False):  # the engine chooses its own precision
            loss, top1 = self.criterion(*z.chunk(2), *p.chunk(2))
        return loss, {"top1": top1}

    def projections_and_predictions(self, views: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(self.encoder(views))
        return z, self.predictor(z)
