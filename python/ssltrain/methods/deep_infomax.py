"""Deep InfoMax: Hjelm, Fedorov, Lavoie-Marchildon, Grewal, Bachman, Trischler and Bengio, "Learning deep
representations by mutual information estimation and maximization", 2019, arXiv 1808.06670; its form DIM(L).

What an encoder says of an image as a whole is to tell the parts of that image from those of others. The parts c_i are
the cells of the encoder's last maps, the whole y is what it makes of all of them, and the mutual information of the two
is estimated from below and maximised (equation 6). A score t is a dot product of y and c_i, after a small head each; P
are the scores of parts of the own image, Q those of parts of others:

    infonce   max  E_P[t - log(exp(t) + sum over Q of this image of exp(t'))]       (equation 5, noise contrastive)
    jsd       max  -E_P[softplus(-t)] - E_Q[softplus(t)]                            (equation 4, Jensen-Shannon)
    dv        max  E_P[t] - log E_Q[exp(t)]                                         (equation 2, Donsker-Varadhan)

With a weight `prior` the encoder also learns to give y a uniform distribution between 0 and 1: a discriminator D learns
to tell y from numbers that are drawn, and the encoder to prevent it (equation 7):

    min over the encoder  max over D  E[log D(drawn)] + E[log(1 - D(y))]

An image passes the encoder once, as one augmented view of it: whole and parts are of the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslkern
from ssltrain import UsageError, draws, encoders, ranks
from ssltrain.config import ImageConfig, at_least, divides, one_of, option
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.methods.instdisc import one_view
from ssltrain.methods.simclr import head


@dataclass(frozen=True)
class DeepInfoMaxConfig(ImageConfig):
    """Deep InfoMax: what an image is as a whole tells its parts from those of other images (Hjelm et al. 2019).

    An image passes the encoder once. Evaluated as simclr is.
    """

    method: ClassVar[str] = "deep_infomax"
    presets: ClassVar[dict] = {"cifar10": dict(estimator="jsd", prior=0.1, batch_size=64, lr=1e-4)}

    temperature: float = divides(0.1)
    estimator: str = option(
        "infonce",
        "Of the mutual information: infonce, jsd, or dv (Donsker-Varadhan).",
        **one_of("infonce", "jsd", "dv"),
    )
    prior: float = option(
        0.0, "Weight of the adversary that draws what is said of whole images to a uniform distribution.", **at_least(0)
    )

    def check(self) -> DeepInfoMaxConfig:
        if self.prior and ranks.size() > 1:
            raise UsageError(
                f"--prior {self.prior}: is for one process, and there are {ranks.size()}; leave it out, or start it "
                "without torchrun."
            )
        return super().check()

    def build(self, data: Images) -> DeepInfoMax:
        encoder = encoders.build(self.encoder, data.train, self.width)
        with torch.no_grad():
            maps, _ = encoder.eval().maps_and_features(data.train[:1].float() / 255)
        if maps.ndim != 4 or maps.shape[1] != encoder.features:
            raise UsageError(
                f"--encoder {self.encoder}: has no last maps with as many channels as features, of which the cells "
                "are parts; choose convnet, resnet18, or a convolutional model of timm."
            )
        options = self.dim, self.temperature, self.estimator, self.prior, self.shuffle_positives
        return DeepInfoMax(encoder.train(), self.augment(data), *options)


class DeepInfoMax(Method):
    """Deep InfoMax around an encoder whose last maps have as many channels as there are `features`.

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. `dim` is the width of what
    is compared. With `shuffle_positives` it learns nothing, as a control.

    >>> from ssltrain import augment, encoders
    >>> images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8)
    >>> method = DeepInfoMax(encoders.build("convnet", images), augment.build(1, (28, 28)))
    >>> loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    encoder: encoders.Encoder
    networks = ("whole_and_parts",)

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        dim: int = 128,
        temperature: float = 0.1,
        estimator: str = "infonce",
        prior: float = 0.0,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.prior, self.shuffled = encoder, augment, prior, shuffle_positives
        self.of_whole, self.of_part = (head(encoder.features, dim, layers=2) for _ in range(2))
        self.criterion = sslkern.DeepInfoMaxLoss(estimator, temperature, normalize=True, group="world")
        if prior:
            layers = nn.Linear(dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
            self.discriminator = nn.Sequential(*layers)

    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [B, C, H, W]: a view of each."""
        return one_view(self.augment, images)

    def shown(self, views: Tensor) -> Tensor:
        height, width = views.shape[2:]
        middle = F.pad(views, (-(width // 4), -(width // 4), -(height // 4), -(height // 4)))
        part = F.pad(middle, (width // 4, width // 4, height // 4, height // 4), value=1.0)
        return torch.cat([views, part])

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the estimate, and with a prior also the loss of the discriminator, which is shown as `prior`."""
        whole, parts = self.whole_and_parts(views)
        if self.shuffled:
            parts = parts[draws.others(len(parts), parts.device)]
        with torch.autocast(views.device.type, enabled=False):  # the engine chooses its own precision
            loss = self.criterion(whole, parts)
        if not self.prior:
            return loss, {}
        adversary = self._adversary(whole)
        return loss + adversary, {"prior": adversary.detach()}

    def whole_and_parts(self, views: Tensor) -> tuple[Tensor, Tensor]:
        maps, features = self.encoder.maps_and_features(views)
        cells = maps.flatten(2).transpose(1, 2)  # [B, H' W', F]
        return self.of_whole(features), self.of_part(cells.flatten(0, 1)).unflatten(0, cells.shape[:2])

    def _adversary(self, whole: Tensor) -> Tensor:
        """Minus equation 7, which the discriminator lowers; the encoder gets its gradient reversed, and weighted."""
        y, drawn = whole.sigmoid(), draws.rand(*whole.shape, device=whole.device)
        turned = (1 + self.prior) * y.detach() - self.prior * y
        score_of_drawn, score_of_y = self.discriminator(torch.cat([drawn.to(y.dtype), turned])).chunk(2)
        return (F.softplus(-score_of_drawn) + F.softplus(score_of_y)).mean()
