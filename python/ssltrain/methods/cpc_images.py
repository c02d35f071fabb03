"""CPC on images: van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
arXiv 1807.03748, section 3.3; Henaff et al., "Data-Efficient Image Recognition with CPC", 2019, arXiv 1905.09272.

An image is cut into patches that overlap, on a grid, each of which is encoded by itself: z_(r,q) in row r and column q.
Masked convolutions sum up all rows down to r in a context c_(r,q), and from it a matrix W_k for each k tells the patch
k rows below from other patches of that row, in all columns of all images of the batch (equation 4 of the first):

    loss = mean over r, q, k of -log( exp(z_(r+k,q)' W_k c_(r,q)) / sum over j of exp(z_j' W_k c_(r,q)) )

The first k is such that no pixel of the patch is one that the context has seen: what overlaps is too easy to predict.
So is a colour: most patches show one of their channels, drawn for each, as gray (section 3.1 of the second). Features
for later use are the mean of z over all patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import sslkern
from ssltrain import UsageError, draws, encoders
from ssltrain.config import ImageConfig, at_least, option
from ssltrain.images import Images
from ssltrain.methods._method import Method
from ssltrain.patches import Above, Patches, sometimes_gray


@dataclass(frozen=True)
class CPCImagesConfig(ImageConfig):
    """CPC on images: the rows above tell the patches below from others (van den Oord et al. 2018, Henaff et al. 2019).

    The encoder sees single patches, and the features are their mean. Evaluated as simclr is.
    """

    method: ClassVar[str] = "cpc_images"
    presets: ClassVar[dict] = {"imagenet": dict(patch=64, stride=32, steps=5, batch_size=512, lr=2e-4)}  # section 3.3

    dim: int = option(64, "Width of what the loss compares: patches as they are predicted.", **at_least(1))
    patch: int | None = option(
        None, "Height and width of a patch in pixels. [default: a quarter of an image's]", **at_least(1)
    )
    stride: int | None = option(None, "Pixels from patch to patch. [default: half a patch]", **at_least(1))
    steps: int = option(3, "How many rows are predicted.", **at_least(1))
    context_width: int = option(64, "Width of a context.", **at_least(1))
    layers: int = option(3, "Layers of the context network; each sees a row more.", **at_least(1))
    gray: float = option(
        0.8, "How often a patch of a colour image shows one of its channels.", lambda x: 0 <= x <= 1, "must be 0 to 1"
    )

    def build(self, data: Images) -> CPCImages:
        encoder = self._encoder(data.train)
        patches: Any = encoder[1]
        rows, seen = patches.grid(data.size)[0], patches.overlap
        if rows - seen < self.steps:
            raise UsageError(
                f"--steps {self.steps}: images of {data.size[0]} pixels have {rows} rows of patches, and a context can "
                f"predict {max(0, rows - seen)} of them that it has not seen; choose fewer, or smaller patches."
            )
        options = self.dim, self.steps, self.context_width, self.layers, self.temperature, self.gray
        return CPCImages(encoder, self.augment(data), *options, self.shuffle_positives)

    def build_encoder(self, shape: Sequence[int]) -> encoders.Encoder:
        return self._encoder(torch.zeros(1, *shape, dtype=torch.uint8))

    def _encoder(self, images: Tensor) -> encoders.Encoder:
        side = min(images.shape[2:])
        patch = self.patch or max(1, side // 4)
        if patch > side:
            raise UsageError(f"--patch {patch}: is more than the {side} pixels of an image; choose smaller ones.")
        standardize, network = encoders.build(self.encoder, images, self.width)
        return encoders.Encoder(standardize, Patches(network, patch, self.stride or max(1, patch // 2)))

    def exported(self, encoder: Any) -> tuple[nn.Module, dict[str, str], str]:
        _, about, how = super().exported(encoder)
        patches = encoder[1]
        return patches.network, about | {"patch": str(patches.size), "stride": str(patches.stride)}, how


class CPCImages(Method):
    """CPC around an encoder that has `Patches`.

    `augment` maps float [B, C, H, W] in [0, 1] to the same, each image by a draw of its own. `dim` is the width of the
    predictions, `context_width` that of contexts, `gray` the share of the patches that show one of their channels.

    >>> images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    >>> method = CPCImages(CPCImagesConfig().build_encoder([3, 32, 32]), augment=lambda images: images)
    >>> loss, stats = method.loss(method.views(images))
    >>> loss.backward()
    """

    encoder: encoders.Encoder
    criterion: sslkern.CPCLoss
    networks = ("contexts_and_targets",)

    def __init__(
        self,
        encoder: encoders.Encoder,
        augment: Callable[[Tensor], Tensor],
        dim: int = 64,
        steps: int = 3,
        context_width: int = 64,
        layers: int = 3,
        temperature: float = 0.2,
        gray: float = 0.8,
        shuffle_positives: bool = False,
    ):
        super().__init__()
        self.encoder, self.augment, self.gray, self.shuffled = encoder, augment, gray, shuffle_positives
        self.above = Above(encoder.features, context_width, layers)
        self.target = nn.Conv2d(encoder.features, dim, 1, bias=False)
        options: dict[str, Any] = dict(negatives="sample", normalize=True, stats=True, group="world")
        self.criterion = sslkern.CPCLoss(context_width, dim, steps, temperature, **options)

    @property
    def patches(self) -> Patches:
        return cast(Patches, self.encoder[1])

    @torch.no_grad()
    def views(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [rows, columns, B, C, size, size]: the patches of an augmented image."""
        patches = self.patches.cut(self.augment(images.float() / 255))
        return patches if images.shape[1] == 1 else sometimes_gray(patches, self.gray)

    def shown(self, views: Tensor) -> Tensor:
        column = views.shape[1] // 2
        return torch.cat([views[0, column], views[self.patches.overlap, column]])

    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over patches and rows ahead, and `top1`: how often the patch to come beats the others."""
        contexts, targets = self.contexts_and_targets(views)  # [B, columns, rows, width]
        if self.shuffled:  # and beside another column, as their places tell something, too
            contexts = contexts[draws.others(len(contexts), contexts.device)]
            contexts = contexts.roll(draws.of_batch() % contexts.shape[1], 1)
        seen, dtype = self.patches.overlap - 1, self.criterion.predictors.dtype  # seen: rows that are not predicted
        contexts, targets = contexts[:, :, : contexts.shape[2] - seen], targets[:, :, seen:]
        with torch.autocast(views.device.type, enabled=False):  # the engine chooses its own precision
            loss, top1 = self.criterion(contexts.flatten(0, 1).to(dtype), targets.flatten(0, 1).to(dtype))
        return loss, {"top1": top1.mean()}

    def contexts_and_targets(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        z = self.patches.maps(self.encoder[0](patches))
        return self.above(z).permute(0, 3, 2, 1), self.target(z).permute(0, 3, 2, 1)
