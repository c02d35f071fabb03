"""Fine-tuning on a part of the labels: an encoder and a linear layer on its features, all layers trained.

Pretrained or not, each encoder gets the same trials of learning rate and length, with labels drawn from all training
images but a tenth, which judges them. With the best of these it is then trained on each draw from all training images,
and for each the test set is read once. That tenth may have more labels than the share: they choose, for all encoders
alike, and train none.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssltrain import UsageError
from ssltrain.evaluate import accuracy
from ssltrain.images import Images, features

RATES = 3e-4, 1e-3, 3e-3
LENGTHS = (300, 2), (1200, 8)  # steps at least, and passes over the labelled images at least
BATCH = 64
HELD_OUT = 0.1

Views = Callable[[Tensor], Tensor]  # augments float [B, C, H, W] in [0, 1]


class Recipe(NamedTuple):
    """How long an encoder is trained, and how fast."""

    lr: float
    steps: int
    passes: int


RECIPES = [Recipe(lr, *length) for lr in RATES for length in LENGTHS]


def fine_tune(
    images: Images,
    encoders: dict[str, Any],
    views: Views,
    share: float,
    draws: int,
    device: torch.device,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean and standard deviation over the draws of the test accuracy of each encoder, trained on that share of the
    labels, and with what recipe."""
    recipes = {name: choose(images, encoder, views, share, device, seed) for name, encoder in encoders.items()}
    found: dict[str, list[float]] = {name: [] for name in encoders}
    everything = torch.arange(len(images.train))
    for draw in range(seed, seed + draws):
        rows = labelled(images.train_labels, everything, share, draw)
        for name, encoder in encoders.items():
            predict = trained(images, encoder, views, rows, recipes[name], device, draw)
            found[name].append(accuracy(predict(images.test), images.test_labels))
    result: dict[str, Any] = {"share": share, "images": len(rows), "draws": draws, "trials": len(RECIPES)}
    for name, accuracies in found.items():
        result[name] = round(statistics.mean(accuracies), 4)
        result[f"{name}_spread"] = round(statistics.stdev(accuracies), 4) if draws > 1 else None
        result[f"{name}_recipe"] = recipes[name]._asdict()
    return result


def choose(images: Images, encoder: Any, views: Views, share: float, device: torch.device, seed: int = 0) -> Recipe:
    """The recipe that does best on held-out training images. The test set is not read."""
    labels, everything = images.train_labels, torch.arange(len(images.train))
    judges = labelled(labels, everything, HELD_OUT, seed)
    others = everything[torch.isin(everything, judges, invert=True)]
    if len(labels[others].unique()) < len(labels.unique()):
        raise UsageError(
            f"--labels: {images.name} has a class of one training image, which cannot be held out to choose a learning "
            "rate by; add images, or leave it out."
        )
    rows = labelled(labels, others, share, seed)

    def judged(recipe: Recipe) -> float:
        predict = trained(images, encoder, views, rows, recipe, device, seed)
        return accuracy(predict(images.train[judges]), labels[judges])

    return max(RECIPES, key=judged)


def labelled(labels: Tensor, among: Tensor, share: float, seed: int) -> Tensor:
    """The rows of that share of those named, drawn class by class, at least one of each."""
    generator, chosen = torch.Generator().manual_seed(seed), []
    for c in labels[among].unique():
        members = among[labels[among] == c]
        count = max(1, round(share * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)


def trained(
    images: Images, encoder: Any, views: Views, rows: Tensor, recipe: Recipe, device: torch.device, seed: int
) -> Callable[[Tensor], Tensor]:
    """What a copy of the encoder and a linear layer, trained on these rows, predict of uint8 images: labels.

    By AdamW with a cosine schedule, every layer at the same rate.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    encoder = copy.deepcopy(encoder).to(device).train()
    head = nn.Linear(encoder.features, len(images.classes)).to(device)
    pixels, labels = images.train[rows].to(device), images.train_labels[rows].to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=recipe.lr, weight_decay=1e-4)
    steps = max(recipe.steps, math.ceil(recipe.passes * len(rows) / BATCH))
    draws = torch.randint(len(rows), (steps, min(BATCH, len(rows))), generator=generator).to(device)
    for step, picked in enumerate(draws):
        optimizer.param_groups[0]["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            x = views(pixels[picked].float() / 255)
        loss = F.cross_entropy(head(encoder(x)), labels[picked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return lambda others: head(features(encoder, others, device)).argmax(1).cpu()
