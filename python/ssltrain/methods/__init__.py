"""One module per method. A method is an `nn.Module` with the four things that `ssltrain.loop` asks for:

- `encoder`: what the evaluation looks at, images [B, C, H, W] in [0, 1] -> features [B, F];
- `criterion`: the contrastive loss of `sslkern`, a module of its own so that the loop can time it;
- `views(batch)`: the augmented views of a uint8 batch, without gradient and always in fp32;
- `loss(views) -> (loss, stats)`: a scalar to minimise and a dict of detached scalars to show.

State besides the weights (a queue, a momentum encoder) goes into parameters without gradient and buffers, so that
checkpoints carry it.
"""
