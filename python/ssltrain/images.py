"""Sets of images: what they are, how good features of them are, and what a report shows of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssltrain import cache, evaluate, panels
from ssltrain.draws import Draws
from ssltrain.encoders import calibrated
from ssltrain.evaluate import Evaluation
from ssltrain.pictures import Levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ssltrain.methods._method import Method


@dataclass
class Images:
    """An image set in memory. Labels serve the evaluation, and of the methods supcon and supervised alone.

    Without labels there are no `classes`, all labels are 0, and the test set may be empty.
    """

    name: str
    train: Tensor  # uint8 [N, C, H, W], C = 1 or 3
    train_labels: Tensor  # int64 [N]
    test: Tensor  # uint8 [M, C, H, W]
    test_labels: Tensor  # int64 [M]
    classes: list[str]
    notes: list[str] = field(default_factory=list)  # what a reader should know about the split, sizes, bad files
    levels: Levels = field(default_factory=Levels)  # of images of more than 8 bits
    left: list[str] = field(default_factory=list)  # every file that is not in it, and why

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.train.shape[2:]
        return height, width

    @property
    def shape(self) -> list[int]:
        """Of an image, [C, H, W]."""
        return list(self.train.shape[1:])

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint keeps about the data."""
        return {"levels": {kind: list(range_) for kind, range_ in self.levels.known.items()}}

    @property
    def tensors(self) -> list[Tensor]:
        """What a run trains on."""
        return [self.train]

    def describe(self) -> str:
        """In a line."""
        height, width = self.size
        test = f" and {len(self.test):,} test" if len(self.test) else ""
        colour = "colour" if self.channels == 3 else "grayscale"
        labels = f"{len(self.classes)} classes" if self.classes else "no labels"
        return (
            f"{self.name}: {len(self.train):,} training{test} images of {width} x {height} pixels, {colour}, {labels}"
        )

    def evaluate(self, encoder: Any, untrained: Any, device: torch.device, beside: Any | None = None) -> Evaluation:
        """Linear probe and nearest neighbours for the encoder, beside raw pixels, the untrained encoder with its batch
        normalisation calibrated on training images, and the encoder of another run."""
        rows = {"": "trained", "raw_": "raw pixels", "untrained_": "untrained encoder"}
        networks = {"": encoder, "untrained_": untrained}
        if beside is not None:
            rows["beside_"], networks["beside_"] = "other run", beside
        columns = {"linear": "linear probe", "knn": "20-NN"}
        widths = {prefix: network.features for prefix, network in networks.items()} | {"raw_": self.train[0].numel()}
        if not self.classes:
            shown = self.test if len(self.test) else self.train[:: -(-len(self.train) // 1000)]
            train, test = (features(encoder, part, device) for part in (self.train, shown))
            nothing = {row + column: math.nan for row in rows for column in columns}
            none, part = torch.zeros(len(shown), dtype=torch.long), "test" if len(self.test) else "training"
            return Evaluation(nothing, rows, columns, widths, train, test, none, [], part=part)
        networks["untrained_"] = self._calibrated(untrained, device)
        figures, found = {"raw_": self._raw(columns, device)}, {}
        for prefix, network in networks.items():
            train, test = (features(network, part, device) for part in (self.train, self.test))
            figures[prefix], predictions = self._accuracies(train, test)
            found[prefix] = train, test, predictions
        accuracies = {row + column: figures[row][column] for row in rows for column in columns}
        train, test, predictions = found[""]
        return Evaluation(accuracies, rows, columns, widths, train, test, self.test_labels, self.classes, predictions)

    def _calibrated(self, encoder: Any, device: torch.device, batches: int = 20) -> Any:
        draws = torch.randint(len(self.train), (batches, 256), generator=torch.Generator().manual_seed(0))
        return calibrated(encoder.to(device), (self.train[rows].to(device).float() / 255 for rows in draws))

    def _raw(self, columns: dict[str, str], device: torch.device) -> dict[str, float]:
        """The accuracies of pixels, which every run on these images has: they are kept on disk."""

        def compute() -> dict[str, float]:
            train, test = (features(nn.Flatten(), part, device) for part in (self.train, self.test))
            return self._accuracies(train, test)[0]

        tensors = self.train, self.train_labels, self.test, self.test_labels
        return cache.kept("pixels", columns, tensors, evaluate.version(), compute)

    def _accuracies(self, train: Tensor, test: Tensor) -> tuple[dict[str, float], Tensor | None]:
        """Of linear probe and nearest neighbours, and what the former predicted."""
        labels, test_labels = self.train_labels.to(train.device), self.test_labels.to(train.device)
        predictions = evaluate.predicted(train, labels, test)
        linear = evaluate.accuracy(predictions, test_labels)
        knn = evaluate.knn(train, labels, test, test_labels)
        return {"linear": linear, "knn": knn}, predictions

    def example(self, row: int, test: bool) -> tuple[str, str, Tensor | None]:
        """What a page shows of an image: its class, what else is known of it, and the pixels, uint8 [C, H, W]."""
        images, labels = (self.test, self.test_labels) if test else (self.train, self.train_labels)
        return self.classes[int(labels[row])] if self.classes else "", "", images[row]

    @torch.no_grad()
    def draw(self, method: Method, device: torch.device, axes: Axes) -> None:
        """Pairs of views, or of an image and its only view."""
        rows = torch.arange(0, len(self.train), max(1, len(self.train) // panels.PAIRS))[: panels.PAIRS]
        with Draws(seed=0, epoch=0, batch=0, rows=rows):
            views = method.views(images := self.train[rows].to(device))
        shown = method.shown(views)
        if len(shown) == len(rows):
            panels.draw_pairs(axes, torch.cat([images / 255, shown]), "Images, and views of them")
        else:
            panels.draw_pairs(axes, shown)

    def like(self, shape: Sequence[int]) -> Images:
        """These images with as many channels and pixels as others, [C, H, W]."""
        if self.shape == list(shape):
            return self
        channels, *size = shape

        def fitted(pixels: Tensor) -> Tensor:
            scaled = with_channels(pixels, channels)
            if list(scaled.shape[2:]) == size:
                return scaled
            parts = (F.interpolate(x.float(), size, mode="bilinear", antialias=True) for x in scaled.split(512))
            return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts])

        note = (
            f"{self.name}: the images are made {size[1]} x {size[0]}, of {channels} channels, as those of the run are"
        )
        train, test = fitted(self.train), fitted(self.test) if len(self.test) else self.test.new_empty(0, *shape)
        return dataclasses.replace(self, train=train, test=test, notes=[*self.notes, note])


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, device: torch.device, batch: int = 512) -> Tensor:
    """Features of uint8 images [N, C, H, W] under an encoder in evaluation mode: float32 [N, F] on `device`."""
    training = encoder.training
    encoder.eval()
    out = torch.cat([encoder(part.to(device).float() / 255).float() for part in images.split(batch)])
    encoder.train(training)
    return out


def with_channels(pixels: Tensor, channels: int) -> Tensor:
    """uint8 [N, C, H, W] with that many channels, as Pillow converts between colour and gray."""
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    red, green, blue = pixels.float().unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8).unsqueeze(1)
