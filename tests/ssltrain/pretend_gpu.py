"""A GPU that is not there: tensors of its device have shapes and no values, and whatever would wait for it fails.

`python -m tests.ssltrain.pretend_gpu` runs steps of every method on it, with `brief` on gray images only of those that
do something else there, in a process of its own since torch keeps the device. What a real GPU adds is in `test_gpu.py`.
"""

import itertools
import sys
import traceback

import torch
from ssltrain import augment, encoders, loop, ranks, speech
from ssltrain.draws import Draws
from ssltrain.images import Images
from ssltrain.methods.cmc import CMCConfig
from ssltrain.methods.cpc import CPCConfig
from ssltrain.methods.cpc_images import CPCImagesConfig
from ssltrain.methods.deep_infomax import DeepInfoMaxConfig
from ssltrain.methods.instdisc import InstDisc
from ssltrain.methods.moco import MoCo
from ssltrain.methods.nnclr import NNCLR
from ssltrain.methods.simclr import SimCLR, SimCLRConfig
from ssltrain.methods.supcon import SupCon
from ssltrain.methods.supervised import Supervised
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class PretendGPU(TorchDispatchMode):
    """Whatever touches the device is computed in shapes alone; the CPU computes as ever.

    Notes the copies between the two that wait; to read a value fails by itself, as there is none.
    """

    def __init__(self):
        super().__init__()
        self.shapes = FakeTensorMode()
        self.waits: list[str] = []

    def to(self, x: Tensor) -> Tensor:
        with self.shapes:
            return self.shapes.from_tensor(x).to("gpu")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        if not any(isinstance(x, FakeTensor) for x in tensors) and (device is None or device.type == "cpu"):
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: self.shapes.from_tensor(x) if _is_real(x) else x, (args, kwargs))
        with self.shapes:
            out = func(*args, **kwargs)
        source = {"_to_copy": 0, "copy_": 1}.get(func.overloadpacket.__name__)
        if source is not None and args[source].device.type != out.device.type and not kwargs.get("non_blocking"):
            frames = traceback.extract_stack()
            # kornia waits for no CUDA device, but for any other kind
            if not any(f.name == "_to_device_nonblocking" for f in frames):
                where = [f"{f.filename}:{f.lineno}" for f in frames if "site-packages/torch" not in f.filename]
                self.waits.append(f"{func} at {where[-2]}")
        return out


class Recurrent(nn.Linear):
    """In place of the GRU, which is one kernel on a real GPU and unknown to a pretended one."""

    def forward(self, frames: Tensor) -> tuple[Tensor, None]:
        return super().forward(frames), None


def _is_real(x) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, FakeTensor)


ON_IMAGES = (
    *("simclr", "moco", "moco v3", "moco shuffled", "instdisc", "nnclr", "supcon", "supervised"),
    *("cmc", "cmc bank", "deep_infomax", "cpc_images"),
)
OTHER_ON_GRAY = "simclr", "cmc", "cpc_images"  # the augmentations, the views, the patches


def build(name: str, channels: int) -> tuple[nn.Module, Tensor | speech.Clips]:
    """A method and a batch, still on the CPU."""
    if name == "cpc":
        method = CPCConfig(width=8, units=8).build(None)
        method.encoder.recurrent = Recurrent(8, 8)
        clips = speech.Clips.of([torch.zeros(3000 + i, dtype=torch.int16) for i in range(8)])
        return method, clips
    images = torch.zeros(8, channels, 16, 16, dtype=torch.uint8)
    parts = encoders.build("convnet", images), augment.build(channels, (16, 16), flip=True)
    data = Images("none", images, torch.zeros(8).long(), images, torch.zeros(8).long(), [])
    kinds = {
        "simclr": lambda: SimCLR(*parts),
        "moco": lambda: MoCo(*parts, queue=32),
        "moco v3": lambda: MoCo(*parts, version=3),
        "moco shuffled": lambda: MoCo(*parts, queue=32, shuffle_bn=4),
        "instdisc": lambda: InstDisc(*parts, size=8, negatives=16),
        "nnclr": lambda: NNCLR(*parts, support=32),
        "supcon": lambda: SupCon(*parts, torch.arange(8) % 2),
        "supervised": lambda: Supervised(*parts, torch.arange(8) % 2, classes=2),
        "cmc": lambda: CMCConfig().build(data),
        "cmc bank": lambda: CMCConfig(candidates="bank", negatives=16).build(data),
        "deep_infomax": lambda: DeepInfoMaxConfig(prior=0.1).build(data),
        "cpc_images": lambda: CPCImagesConfig().build(data),
    }
    method = kinds[name]()
    ranks.normalise(method, torch.device("cpu"), method.parts)
    return method, images


def main(brief: bool) -> None:
    _setup_privateuseone_for_python_backend("gpu", Backend())
    gpu, failed = PretendGPU(), 0
    cases = itertools.product(ON_IMAGES, (1, 3))
    if brief:
        cases = ((name, channels) for name, channels in cases if channels == 3 or name in OTHER_ON_GRAY)
    for name, channels in [*cases, ("cpc", 0)]:
        method, batch = build(name, channels)
        method._apply(gpu.to)
        batch = gpu.to(batch) if isinstance(batch, Tensor) else speech.Clips(*map(gpu.to, vars(batch).values()))
        optimizer = loop._optimizer(method, SimCLRConfig(device="gpu"))
        with gpu:
            for step in range(2):
                with Draws(0, 0, step, torch.arange(8)):
                    views = method.views(batch)
                    loss, stats = method.loss(views)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        where = {x.device.type for x in (views, loss, *stats.values(), *method.state_dict().values())}
        if gpu.waits or where != {"gpu"}:
            failed = 1
            print(f"{name}, {channels} channels: on {where}", *gpu.waits, sep="\n    ")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:] == ["brief"])
