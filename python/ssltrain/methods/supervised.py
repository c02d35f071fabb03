"""Supervised training, the reference that the survey compares all others with: the encoder, a linear layer of a row w_c
for each class, and cross entropy with the labels y of the same augmented views,

    loss_i = -log( exp(w_(y_i) . f_i + b_(y_i)) / sum over c of exp(w_c . f_i + b_c) )

without label smoothing. It is a contrast of an image with the vectors of classes, not with other images: the one method
here whose loss is not of the engine. Afterwards the linear layer is thrown away, and the features are probed like those
of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ssltrain import UsageError, encoders, ranks
from ssltrain.config import ImageConfig
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.methods.instdisc import one_view
from ssltrain.methods.supcon import labels_of, labels_of_batch


@dataclass(frozen=True)
class SupervisedConfig(ImageConfig):
    """Supervised: cross entropy with labels, the reference for all methods.

    The same encoder, augmentations and evaluation as the others, in one process.
    """

    method: ClassVar[str] = "supervised"
    dim: ClassVar[int] = 0  # type: ignore[misc]  # no option: there is no projection
    temperature: ClassVar[float] = 1.0  # type: ignore[misc]  # nor this one

    def check(self) -> SupervisedConfig:
        if ranks.size() > 1:
            raise UsageError(
                f"supervised: trains in one process, and there are {ranks.size()}; start it without torchrun."
            )
        return super().check()

    def build(self, data: Images) -> Supervised:
        labels = labels_of(data, self.method)
        encoder = encoders.build(self.encoder, data.train, self.width)
        return Supervised(encoder, self.augment(data), labels, len(data.classes), self.shuffle_positives)


class Supervised(Method):
    """Cross entropy over so many `classes` of training images that have `labels` int64 [N].

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. Which images a batch is,
    `draws.rows` says. With `shuffle_positives` images have the labels of others, as a control.

    >>> from ssltrain import augment, draws, encoders
    >>> images, labels = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8), torch.arange(64) % 10
    >>> method = Supervised(encoders.build("convnet", images), augment.build(1, (28, 28)), labels, classes=10)
    >>> with draws.Draws(seed=0, epoch=0, batch=0, rows=torch.arange(64)):
    ...     loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    networks = ("scores",)
    labels: Tensor

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        labels: Tensor,
        classes: int,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.shuffled = encoder, augment, shuffle_positives
        self.register_buffer("labels", labels, persistent=False)  # the data have them
        self.head = nn.Linear(encoder.features, classes)
        self.criterion = nn.CrossEntropyLoss()

    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [B, C, H, W]: a view of each."""
        return one_view(self.augment, images)

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the B images, and `top1`: how many get the highest score for their label."""
        scores, labels = self.scores(views), labels_of_batch(self.labels, self.shuffled)
        top1 = (scores.argmax(1) == labels).float().mean()
        return self.criterion(scores, labels), {"top1": top1}

    def scores(self, views: Tensor) -> Tensor:
        return self.head(self.encoder(views))
