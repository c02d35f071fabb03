"""Instance discrimination: Wu, Xiong, Yu and Lin, "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", 2018, arXiv 1805.01978.

Every image is a class of its own, and its weight vector is a feature of it from earlier: a memory bank keeps one unit
vector v_j for each of the M training images. One view of an image goes through the encoder and a linear layer, and with
its output f of length 1 it is to find its own vector (equation 2):

    P(i | f) = exp(v_i . f / T) / Z,    Z = sum over j of exp(v_j . f / T)

A sum over all images for each is too much for a large M, so that K of them are drawn at random. Either these stand for
all, in a softmax over 1 + K vectors, or each is a question of its own, by noise-contrastive estimation with a constant
Z that the first batch estimates (equations 4 to 8):

    softmax    loss_i = -log( exp(v_i . f / T) / (exp(v_i . f / T) + sum over k of exp(v_k . f / T)) )
    nce        loss_i = -log h(v_i) - sum over k of log(1 - h(v_k)),    h(v) = P / (P + K / M)

Afterwards v_i moves towards f. That is one pass through one encoder for each image, and the negatives cost no pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import sslkern
from ssltrain import draws, encoders
from ssltrain.config import ImageConfig, at_least, below_one, divides, one_of, option
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.methods.simclr import head


@dataclass(frozen=True)
class InstDiscConfig(ImageConfig):
    """Instance discrimination: an image finds its own vector in a memory bank of all images (Wu et al. 2018).

    One view of each image, one pass through one encoder. Evaluated as simclr is.
    """

    method: ClassVar[str] = "instdisc"
    presets: ClassVar[dict] = {  # section 4 and the published code, but for the form of the loss
        "imagenet": dict(temperature=0.07, negatives=4096, momentum=0.5, batch_size=256)
        | dict(optimizer="sgd", lr=0.03, weight_decay=1e-4),
    }

    temperature: float = divides(0.1)
    negatives: int = option(
        4096, "Vectors of the bank that each image is told from, drawn anew each step.", **at_least(1)
    )
    form: str = option(
        "softmax",
        "softmax: over the own vector and those drawn. nce: with a constant Z; give it a --temperature of 0.2 or more.",
        **one_of("softmax", "nce"),
    )
    momentum: float = option(0.5, "How much of an image's vector stays when it is seen.", **below_one())

    def build(self, data: Images) -> InstDisc:
        encoder = encoders.build(self.encoder, data.train, self.width)
        options = self.negatives, self.form, self.momentum, self.shuffle_positives
        return InstDisc(encoder, self.augment(data), len(data.train), self.dim, self.temperature, *options)


class InstDisc(Method):
    """Instance discrimination of `size` training images around any encoder that has the attribute `features`.

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. Which images a batch is,
    `draws.rows` says. With `shuffle_positives` it learns nothing, as a control.

    >>> from ssltrain import augment, encoders
    >>> images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    >>> method = InstDisc(encoders.build("convnet", images), augment.build(1, (28, 28)), size=64, negatives=16)
    >>> with draws.Draws(seed=0, epoch=0, batch=0, rows=torch.arange(64)):
    ...     loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    networks = ("queries",)
    criterion: sslkern.NCELoss

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        size: int,
        dim: int = 128,
        temperature: float = 0.1,
        negatives: int = 4096,
        form: str = "softmax",
        momentum: float = 0.5,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.shuffled = encoder, augment, shuffle_positives
        self.head = head(encoder.features, dim, layers=1)
        self.criterion = sslkern.NCELoss(
            size, dim, negatives, temperature, form=form, momentum=momentum, stats=True, group="world"
        )
        self.criterion.memory.bank.copy_(sslkern.MemoryBank(size, dim).bank)  # by the seed of the run

    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [B, C, H, W]: a view of each."""
        return one_view(self.augment, images)

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the B images, and `top1`: how many find their own vector before all that were drawn."""
        query = self.queries(views)
        own = draws.rows(views.device)
        if self.shuffled:
            own = own[draws.others(len(own), views.device)]
        bank = self.criterion.memory.bank
        index = draws.sampled(own, len(bank), self.criterion.negatives)
        with torch.autocast(views.device.type, enabled=False):  # the engine chooses its own precision
            loss, top1 = self.criterion(query.to(bank.dtype), own, index=index)
        return loss, {"top1": top1}

    def queries(self, views: Tensor) -> Tensor:
        return self.head(self.encoder(views))


@torch.no_grad()
def one_view(augment: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """uint8 [B, C, H, W] -> float [B, C, H, W]: a view of each, channels last, as in `simclr.two_views`."""
    return augment(images.float() / 255).contiguous(memory_format=torch.channels_last)
