"""MoCo: He, Fan, Wu, Xie and Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", 2020,
arXiv 1911.05722; version 2 by Chen, Fan, Girshick and He, arXiv 2003.04297; version 3 by Chen, Xie and He, 2104.02057.

A query encoder learns to tell which key comes from its own image. The keys come from a second encoder that follows
slowly, and in versions 1 and 2 a queue keeps those of earlier batches as negatives, so that their number does not
depend on the batch:

    loss_i = -log( exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum over queue of exp(q_i . k / T)) )        (equation 1)
    key encoder <- momentum * key encoder + (1 - momentum) * query encoder                                (equation 2)

Symmetric, as in the notebook of its authors, either view is a query, which the key of the other answers. Version 3 is,
and has no queue: the keys of the batch are the negatives, and a predictor follows the query. With shuffled batch
normalisation (section 3.3 of the first) a batch is normalised in parts, and for keys it is drawn who is in which: a
query and its key do not have the statistics of the same images, by which they could find each other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import sslkern
from ssltrain import UsageError, encoders
from ssltrain.config import ImageConfig, at_least, below_one, divides, one_of, option
from ssltrain.draws import of_batch
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.methods.simclr import head, two_views

# Of ImageNet, by the papers and the published code; batches of version 2 are those of the default.
_V2 = dict(temperature=0.2, momentum=0.999, queue=65536, shuffle_bn=8, optimizer="sgd", lr=0.03, weight_decay=1e-4)
_V3 = dict(temperature=1.0, momentum=0.996, dim=256, batch_size=4096, optimizer="lars", lr=4.8, weight_decay=1.5e-6)


@dataclass(frozen=True)
class MoCoConfig(ImageConfig):
    """MoCo: a query finds its key among a queue of earlier keys (He et al. 2020; 2 and 3: Chen et al.).

    The keys come from a second encoder that follows the first one slowly. Small batches do; evaluated as simclr is.
    """

    method: ClassVar[str] = "moco"
    presets: ClassVar[dict] = {"v1": _V2 | dict(version=1, temperature=0.07), "v2": _V2, "v3": _V3 | {"version": 3}}

    temperature: float = divides(0.1)
    version: int = option(
        2, "1: a linear head. 2: a head of two layers. 3: no queue, a predictor, symmetric.", **one_of(1, 2, 3)
    )
    momentum: float = option(0.99, "How much of the key encoder stays at each step.", **below_one())
    symmetric: bool = option(False, "Either view is a query: twice the passes (versions 1 and 2).")
    queue: int = option(4096, "Keys of earlier batches that serve as negatives (versions 1 and 2).", **at_least(1))
    shuffle_bn: int | None = option(
        None,
        "Normalise a batch in so many parts, as GPUs would; draw for keys who is in which. [default: as a whole]",
        **at_least(2, ", for of one part all are in it"),
    )

    def check(self) -> MoCoConfig:
        checked, parts, batch = super().check(), self.shuffle_bn, self.batch_size
        for given, name in ((parts, f"--shuffle-bn {parts}"), (self.symmetric, "--symmetric")):
            if given and self.version == 3:
                raise UsageError(f"{name}: is for versions 1 and 2; leave it out.")
        if parts and (batch % parts or batch < 2 * parts):
            wrong = f"does not cut a --batch-size of {batch} into equal parts of two samples or more"
            raise UsageError(f"--shuffle-bn {parts}: {wrong}; choose a number that does.")
        return checked

    def build(self, data: Images) -> MoCo:
        encoder, views = encoders.build(self.encoder, data.train, self.width), self.augment(data)
        options = self.version, self.momentum, self.symmetric, self.queue, self.shuffle_bn, self.shuffle_positives
        return MoCo(encoder, views, self.dim, self.temperature, *options)


class MoCo(Method):
    """MoCo around any encoder that has the attribute `features`; `encoder` is the query encoder.

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. `queue` is the number of
    keys that versions 1 and 2 keep. With `shuffle_bn` the order of the keys' images is drawn, for an encoder that, as
    the loop makes it, normalises the batch in so many parts. With `shuffle_positives` it learns nothing, as a control.

    >>> from ssltrain import augment, encoders
    >>> images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    >>> method = MoCo(encoders.build("convnet", images), augment.build(1, (28, 28)), queue=512)
    >>> loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    networks = ("queries", "keys")

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        dim: int = 128,
        temperature: float = 0.1,
        version: int = 2,
        momentum: float = 0.99,
        symmetric: bool = False,
        queue: int = 4096,
        shuffle_bn: int | None = None,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.shuffled = encoder, augment, shuffle_positives
        self.momentum, self.symmetric, self.parts = momentum, symmetric or version == 3, shuffle_bn
        self.head = head(encoder.features, dim, layers=version)
        self.key = copy.deepcopy(nn.Sequential(encoder, self.head)).requires_grad_(False)
        self.predictor = head(dim, dim, layers=2) if version == 3 else None
        if version == 3:
            self.criterion = sslkern.MoCoV3Loss(temperature=temperature, group="world")
        else:
            self.criterion = sslkern.MoCoLoss(dim, queue, temperature, stats=True, group="world")
            self.criterion.memory.queue.copy_(sslkern.FeatureQueue(dim, queue).queue)  # by the seed of the run

    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [2B, C, H, W]: the first views of all images, then the second ones."""
        return two_views(self.augment, images, self.shuffled)

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the B queries (symmetric and version 3: 2B), and `top1`: how many find their key first."""
        self._follow()
        first, second = (views, views) if self.symmetric else views.chunk(2)
        query = self.queries(first)
        with torch.no_grad():
            key = sslkern.distributed.shuffled(self.keys, second, of_batch()) if self.parts else self.keys(second)
        with torch.autocast(views.device.type, enabled=False):  # the engine chooses its own precision
            if self.predictor is not None:
                return self.criterion(*query.chunk(2), *key.chunk(2)), {}
            if self.symmetric:  # sample by sample, as the queue has them for any number of processes
                query, key = (torch.stack(x, 1).flatten(0, 1) for x in (query.chunk(2), key.chunk(2)[::-1]))
            loss, top1 = self.criterion(query, key)
        return loss, {"top1": top1}

    def queries(self, views: Tensor) -> Tensor:
        query = self.head(self.encoder(views))
        return query if self.predictor is None else self.predictor(query)

    def keys(self, views: Tensor) -> Tensor:
        return self.key(views)

    @torch.no_grad()
    def _follow(self) -> None:
        """Equation 2; the statistics of batch normalisation are the key encoder's own."""
        own: list[Tensor] = [p for part in (self.encoder, self.head) for p in part.parameters()]
        torch._foreach_lerp_([*self.key.parameters()], own, 1 - self.momentum)
