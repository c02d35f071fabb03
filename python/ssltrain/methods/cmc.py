"""CMC: Tian, Krishnan and Isola, "Contrastive Multiview Coding", 2020, arXiv 1906.05849.

An image is seen in several ways V_1 ... V_M, here as groups of its channels: its lightness L, and its colours ab. Each
view has an encoder of its own, and the codes z_1, z_2 of two views of an image are to find each other among those of
other images (equations 2 and 3), so that they keep what both views tell, and forget what only one does:

    L(V_1, V_2) = -log( exp(z_1 . z_2 / T) / sum over j of exp(z_1 . z_2j / T) ) + the same from V_2 to V_1

Of more views than two, the core graph compares the first with each other one, the full graph every two (equations 7 and
8). The candidates j are the images of the batch, or some that are drawn from a memory bank, which keeps a code of each
view of all training images (section 3.4). Features for later use are those of all encoders, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import sslkern
from ssltrain import UsageError, draws, encoders
from ssltrain.config import ImageConfig, at_least, one_of, option
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.methods.instdisc import one_view
from ssltrain.methods.simclr import head
from ssltrain.planes import ANY, COLOUR, ByView, Planes, are_groups, as_picture


@dataclass(frozen=True)
class CMCConfig(ImageConfig):
    """CMC: the views of an image, as its lightness and its colours, find each other (Tian, Krishnan, Isola 2020).

    Each view has an encoder of its own, and the features are those of all of them. Evaluated as simclr is.
    """

    method: ClassVar[str] = "cmc"
    recoloured: ClassVar[bool] = False  # which would change what lightness and colours tell of each other
    # By the published code.
    presets: ClassVar[dict] = {
        "imagenet": dict(candidates="bank", negatives=16384, temperature=0.07, batch_size=128, optimizer="sgd", lr=0.03)
    }

    views: str | None = option(
        None,
        "Groups of channels, with commas between: R, G, B; L, a, b of the Lab space; S, D, what is smooth in a "
        "grayscale image and its details. [default: L,ab, and S,D where there are no colours]",
        are_groups,
        f"must be two groups or more of the letters {COLOUR + ANY}, with commas between",
    )
    graph: str = option(
        "full", "full: every two views are compared. core: the first with each other one.", **one_of("full", "core")
    )
    candidates: str = option(
        "batch", "batch: the images of the batch. bank: of a memory bank of all images.", **one_of("batch", "bank")
    )
    negatives: int = option(4096, "How many candidates are drawn of the bank for each image.", **at_least(1))

    def build(self, data: Images) -> CMC:
        encoder = self._encoder(data.train)
        size = len(data.train) if self.candidates == "bank" else None
        options = self.dim, self.temperature, self.graph, size, self.negatives, self.shuffle_positives
        return CMC(encoder, self.augment(data), *options)

    def build_encoder(self, shape: Sequence[int]) -> encoders.Encoder:
        return self._encoder(torch.zeros(1, *shape, dtype=torch.uint8))

    def _encoder(self, images: Tensor) -> encoders.Encoder:
        channels = images.shape[1]
        groups = (self.views or ("L,ab" if channels == 3 else "S,D")).split(",")
        if channels == 1 and set("".join(groups)) & set(COLOUR):
            raise UsageError(f"--views {self.views}: the images have no colours; choose S,D, or leave it out.")
        networks = [encoders.network(self.encoder, len(group), self.width) for group in groups]
        return encoders.Encoder(Planes("".join(groups), images), ByView([len(group) for group in groups], networks))

    def exported(self, encoder: Any) -> tuple[nn.Module, dict[str, str], str]:
        network, about, _ = super().exported(encoder)
        return network, about | {"planes": encoder[0].letters}, ""


class CMC(Method):
    """CMC around an encoder that has a `ByView`.

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. With `size`, the number of
    training images, there are memory banks, of which so many `negatives` are drawn.

    >>> images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    >>> method = CMC(CMCConfig().build_encoder([3, 32, 32]), augment=lambda images: images)
    >>> loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    encoder: encoders.Encoder
    criterion: sslkern.InfoNCELoss | sslkern.CMCLoss
    networks = ("codes",)

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        dim: int = 128,
        temperature: float = 0.2,
        graph: str = "full",
        size: int | None = None,
        negatives: int = 4096,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.shuffled = encoder, augment, shuffle_positives
        networks: Any = encoder[1].networks
        self.heads, count = nn.ModuleList(head(x.features, dim, layers=2) for x in networks), len(networks)
        self.compared = [(a, b) for a, b in combinations(range(count), 2) if graph == "full" or a == 0]
        if size is None:
            self.criterion = sslkern.InfoNCELoss(temperature, two_way=True, stats=True, group="world")
        else:
            self.criterion = sslkern.CMCLoss(count, size, dim, negatives, temperature, graph=graph, group="world")
            for memory in self.criterion.memories:  # by the seed of the run
                memory.bank.copy_(sslkern.MemoryBank(size, dim).bank)

    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [B, C, H, W]: what the planes of all views are made of."""
        return one_view(self.augment, images)

    def shown(self, views: Tensor) -> Tensor:
        standardize, network = self.encoder
        first, second = standardize(views).split(network.planes, 1)[:2]
        return torch.cat([as_picture(first), as_picture(second)])

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the pairs of views, both ways; in the batch half of it, with `top1`: how many find theirs."""
        first, *others = self.codes(views)
        if self.shuffled:
            others = [code[draws.others(len(code), code.device)] for code in others]
        codes = [first, *others]
        with torch.autocast(views.device.type, enabled=False):  # the engine chooses its own precision
            if isinstance(self.criterion, sslkern.CMCLoss):
                own, size = draws.rows(views.device), self.criterion.memories[0].bank.shape[0]
                index = draws.sampled(own, size, self.criterion.negatives)
                return self.criterion(torch.stack(codes), own, index=index), {}
            losses, top1 = zip(*(self.criterion(codes[a], codes[b]) for a, b in self.compared), strict=True)
        return torch.stack(losses).sum(), {"top1": torch.stack(top1).mean()}

    def codes(self, views: Tensor) -> list[Tensor]:
        features = self.encoder(views).chunk(len(self.heads), 1)
        return [head(part) for head, part in zip(self.heads, features, strict=True)]
