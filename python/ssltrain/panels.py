"""What the last panel of a report shows, by the kind of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE = "#1f5fa8"
PAIRS, COLUMNS = 15, 3


def draw_steps(axes: Axes, accuracies: Tensor) -> None:
    """How often the right frame wins, for each number of frames ahead, [K]."""
    steps = np.arange(1, len(accuracies) + 1)
    axes.bar(steps, accuracies.cpu().numpy(), color=BLUE)
    axes.set(xlabel="frames ahead", ylim=(0, 1), xticks=steps)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title("How often the frame to come beats all that it is contrasted with")


def draw_pairs(axes: Axes, views: Tensor, title: str = "Pairs of views that the loss pulls together") -> None:
    """PAIRS pairs in COLUMNS columns, white between them; views [2 B, C, H, W]: both of the same B images."""
    first, second = (half[:PAIRS].cpu().float().clamp(0, 1) for half in views.chunk(2))
    gap = max(1, first.shape[3] // 8)
    pairs = torch.nn.functional.pad(torch.cat([first, second], dim=3), (gap, gap, gap, gap), value=1.0)
    blank = torch.ones_like(pairs[: -len(pairs) % COLUMNS])
    lines = torch.cat([pairs, blank]).split(COLUMNS)
    sheet = torch.cat([torch.cat(list(line), dim=2) for line in lines], dim=1).permute(1, 2, 0).numpy()
    axes.imshow(sheet if sheet.shape[2] == 3 else sheet[:, :, 0], cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(title)
