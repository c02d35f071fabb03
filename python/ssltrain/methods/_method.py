"""The base of all methods: what the loop, the evaluation and the report ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class Method(nn.Module, ABC):
    """An encoder and the loss that trains it without labels.

    State besides the weights (a queue, a momentum encoder) goes into parameters without gradient and buffers, so that
    checkpoints carry it.
    """

    # What the evaluation looks at: images [B, C, H, W] in [0, 1] -> features [B, F], or sound [B, samples] -> contexts
    # [B, frames, F].
    encoder: nn.Module
    criterion: nn.Module  # the contrastive loss of `sslkern`, a module of its own so that the loop can time it
    networks: ClassVar[tuple[str, ...]]  # the names of the functions that run the networks, which `--compile` compiles
    parts: int | None = None  # in how many parts each batch is normalised; None: as a whole

    @abstractmethod
    def views(self, batch: Any) -> Tensor:
        """The augmented views of a batch, images or clips, without gradient and always in fp32.

        What it draws for each sample by `draws.rand` depends on seed, epoch, sample and view alone.
        """

    def shown(self, views: Tensor) -> Tensor:
        """What the report shows of the views, [2 B, C, H, W]: the first B are pulled together with the others."""
        return views

    @abstractmethod
    def loss(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar to minimise, and detached scalars to show, by name."""
