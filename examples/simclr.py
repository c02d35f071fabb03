"""SimCLR in thirty lines: an encoder learns handwritten digits from pairs of views, without their labels.

python examples/simclr.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from sslkern.functional import nt_xent
from sslkern.ops import similarity_topk


def view(images):
    """Each image moved by up to a pixel, turned a little, and with another contrast."""
    angle, dx, dy = 0.2 * torch.randn(len(images)), *(torch.rand(2, len(images)) - 0.5) / 2
    cos, sin = angle.cos(), angle.sin()
    move = torch.stack((cos, -sin, dx, sin, cos, dy), 1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(move, images.shape, align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    return moved * (0.6 + 0.8 * torch.rand(len(images), 1, 1, 1)) + 0.1 * torch.randn_like(images)


def alike(encoder, images, labels):
    """The share of the 50 nearest neighbours of an image that are the same digit."""
    with torch.no_grad():
        _, nearest = similarity_topk(nn.functional.normalize(encoder(images), dim=1), None, n=50)
    return (labels[nearest] == labels[:, None]).float().mean().item()


def main(steps=100):
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64)
    )
    projector = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam([*encoder.parameters(), *projector.parameters()], lr=1e-3)
    before = alike(encoder, images, labels)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (128,))]
        loss = nt_xent(projector(encoder(view(batch))), projector(encoder(view(batch))), temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = alike(encoder, images, labels)
    print(f"of 50 nearest neighbours are the same digit: {before:.3f} untrained, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
