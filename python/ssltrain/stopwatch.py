"""How long a part of a training step takes."""

from __future__ import annotations

import time

import torch
from torch import nn


class Stopwatch:
    """Seconds spent in a module, forward and backward, by hooks; on a GPU by events, without waiting for it."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        self.marks: list = []
        self.hooks = [
            module.register_forward_pre_hook(self._mark),
            module.register_forward_hook(self._mark),
            module.register_full_backward_pre_hook(self._mark),
            module.register_full_backward_hook(self._mark),
        ]

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _mark(self, *_: object) -> None:
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self.device))
        else:
            mark = time.perf_counter()
        self.marks.append(mark)

    def read(self) -> float:
        """Seconds since the last reading."""
        marks, self.marks = self.marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if self.device.type == "cuda":
            if marks:
                marks[-1].synchronize()
            return sum(a.elapsed_time(b) for a, b in pairs) / 1e3
        return sum(b - a for a, b in pairs)
