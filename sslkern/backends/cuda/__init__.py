"""The hand-written CUDA kernels of the memory-bound primitives (`csrc/cuda`), through the module `sslkern._cuda`."""

import torch

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRIMITIVES = ("sampled_similarity", "queue_push", "bank_update", "unit_pairs")
KEEPS = 0, 0

_cuda = None
MISSING = "it is not built"
