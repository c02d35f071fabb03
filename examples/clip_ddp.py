"""CLIP over several processes: each has some pairs of image and text, and the loss contrasts those of all.

    torchrun --nproc-per-node 2 examples/clip_ddp.py

The pairs are made up: a concept, seen through two different random maps. What matters is in two places: `group="world"`
makes the loss that of the global batch, and DDP averages the gradients, as `grad_reduce="mean"`, the default, expects.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslkern.functional import clamp_logit_scale_, clip


class Towers(nn.Module):
    """An encoder for each side, and the logarithm of the scale of their similarities."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(48, 128), nn.ReLU(), nn.Linear(128, 32))
        self.text = nn.Sequential(nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 32))
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images, texts):
        return self.image(images), self.text(texts), self.log_scale.exp()


def main(steps=100, rows=64):
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same maps and the same weights everywhere
    to_image, to_text = torch.randn(16, 48), torch.randn(16, 24)
    model = DistributedDataParallel(Towers())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(1 + dist.get_rank())  # other pairs on each rank
    for _ in range(steps):
        concepts = torch.randn(rows, 16)
        images, texts = (concepts @ to_image).tanh(), (concepts @ to_text).tanh()
        loss, wins = clip(*model(images, texts), group="world", stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clamp_logit_scale_(model.module.log_scale)
    if dist.get_rank() == 0:
        everywhere = rows * dist.get_world_size()
        print(f"loss {loss.item():.4f}; of {everywhere} pairs a share of {wins.item():.3f} find each other")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
