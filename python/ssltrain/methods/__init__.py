"""One module per method. A method is an `nn.Module` with the five things that `ssltrain.loop` asks for:

- `encoder`: what the evaluation looks at, images [B, C, H, W] in [0, 1] -> features [B, F], or sound [B, samples] ->
  contexts [B, frames, F];
- `criterion`: the contrastive loss of `sslkern`, a module of its own so that the loop can time it;
- `networks`: the names of its functions that run the networks, which `--compile` compiles;
- `views(batch)`: the augmented views of a batch, without gradient and always in fp32. What it draws for each sample by
  `draws.rand` depends on seed, epoch, sample and view alone;
- `loss(views) -> (loss, stats)`: a scalar to minimise and a dict of detached scalars to show.

State besides the weights (a queue, a momentum encoder) goes into parameters without gradient and buffers, so that
checkpoints carry it.
"""

from __future__ import annotations

from torch import nn

from ssltrain.config import Config


def load_data(config: Config, about: dict | None = None):
    """What `config.data` names: `data.Images` or `speech.Speech`. `about` is what a checkpoint says of a run's data."""
    from ssltrain import data, speech

    if config.method == "cpc":
        return speech.load(config.data, config.limit, config.window)
    return data.load(config.data, config.image_size, config.limit, data.Levels.of((about or {}).get("levels")))


def build(config: Config, data) -> nn.Module:
    """The method of `config`, for data like these."""
    if config.method == "cpc":
        from ssltrain.methods.cpc import CPC

        return CPC(config.window, config.steps, config.width, config.units, config.temperature)
    from ssltrain import augment, encoders
    from ssltrain.methods.moco import MoCo
    from ssltrain.methods.simclr import SimCLR

    parts = encoders.build(config.encoder, data.train), augment.build(data.channels, data.size, config.flip)
    if config.method == "simclr":
        return SimCLR(*parts, config.dim, config.temperature, config.version)
    return MoCo(*parts, config.dim, config.temperature, config.version, config.momentum, config.queue)
