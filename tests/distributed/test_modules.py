"""The losses as modules, over ranks: those of one process with all rows, whichever way the group was given."""

import copy
import pickle

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import sslkern

from .agreement import COUNTS, Problem, agrees, close
from .combinations import combinations
from .problems import draw

T = 0.4
# How each is made, its arguments with a row for each sample, and what it learns besides.
MODULES = {
    "AlignmentUniformityLoss": (lambda **s: sslkern.AlignmentUniformityLoss(**s), "a b", ()),
    "CLIPLoss": (lambda **s: sslkern.CLIPLoss(3.0, **s), "a b", ("log_scale",)),
    "CMCLoss": (lambda **s: sslkern.CMCLoss(2, 9, 6, 3, parameter(), **s), "[a b] sample", ("temperature",)),
    "CPCLoss": (lambda **s: sslkern.CPCLoss(6, 6, 2, parameter(), **s), "a... b...", ("predictors", "temperature")),
    "DCLLoss": (lambda **s: sslkern.DCLLoss(parameter(), **s), "a b", ("temperature",)),
    "DCLWLoss": (lambda **s: sslkern.DCLWLoss(parameter(), **s), "a b", ("temperature",)),
    "DebiasedLoss": (lambda **s: sslkern.DebiasedLoss(parameter(), **s), "a b", ("temperature",)),
    "DeepInfoMaxLoss": (lambda **s: sslkern.DeepInfoMaxLoss("infonce", parameter(), **s), "a b...", ("temperature",)),
    "HardNegativeLoss": (lambda **s: sslkern.HardNegativeLoss(parameter(), **s), "a b", ("temperature",)),
    "InfoNCELoss": (lambda **s: sslkern.InfoNCELoss(parameter(), two_way=True, **s), "a b", ("temperature",)),
    "MILNCELoss": (lambda **s: sslkern.MILNCELoss(parameter(), **s), "a b...", ("temperature",)),
    "MatryoshkaLoss": (
        lambda **s: sslkern.MatryoshkaLoss(sslkern.NTXentLoss(parameter(), **s), [2, 6]),
        "a b",
        ("loss.temperature",),
    ),
    "MoCoLoss": (lambda **s: sslkern.MoCoLoss(6, 9, parameter(), **s), "a b", ("temperature",)),
    "MoCoV3Loss": (lambda **s: sslkern.MoCoV3Loss(parameter(), **s), "a b c d", ("temperature",)),
    "MultipleNegativesRankingLoss": (
        lambda **s: sslkern.MultipleNegativesRankingLoss(parameter(), **s),
        "a b c...",
        ("temperature",),
    ),
    "NCELoss": (lambda **s: sslkern.NCELoss(9, 6, 3, parameter(), **s), "a sample", ("temperature",)),
    "NNCLRLoss": (lambda **s: sslkern.NNCLRLoss(6, 9, parameter(), **s), "a b c d", ("temperature",)),
    "NTXentLoss": (lambda **s: sslkern.NTXentLoss(parameter(), **s), "a b", ("temperature",)),
    "NTXentMultiViewLoss": (lambda **s: sslkern.NTXentMultiViewLoss(parameter(), **s), "[a b c]", ("temperature",)),
    "SigLIPLoss": (lambda **s: sslkern.SigLIPLoss(**s), "a b scale bias", ()),
    "SupConLoss": (lambda **s: sslkern.SupConLoss(parameter(), **s), "a labels", ("temperature",)),
}


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor(T))


def made(name: str, **sharing) -> nn.Module:
    """The module, in fp64; what it keeps and learns is the same however often it is made."""
    module = MODULES[name][0](**sharing).double()
    with torch.no_grad():
        for i, (of, x) in enumerate([*module.named_buffers(), *module.named_parameters()]):
            if x.ndim > 1:
                x.copy_(nn.functional.normalize(draw(*x.shape) + i / 3, dim=0 if of.endswith("queue") else -1))
    return module


def arguments(name: str, tensors: dict[str, Tensor]) -> tuple[list, dict]:
    """What forward is called with."""
    said = MODULES[name][1].replace("...", "")
    given = [tensors[x] for x in said.replace("[", "").replace("]", "").split()]
    if "[" in said:
        views = said.index("]") // 2
        given = [given[:views], *given[views:]]
    return given, dict(index=tensors["index"]) if "sample" in said else {}


def of_module(N: int, name: str, way: str) -> Problem:
    """Called by keywords, with what it learns among them."""
    said, learned = MODULES[name][1:]
    sharded, replicated = {}, {}
    for i, x in enumerate(said.replace("[", "").replace("]", "").split()):
        if x in ("scale", "bias"):
            replicated[x] = torch.tensor(2.0 - i)
        elif x == "labels":
            sharded[x] = torch.arange(N) * 2 % 5
        elif x == "sample":
            sharded |= {x: torch.arange(N) % 9, "index": (torch.arange(4) + torch.arange(N).unsqueeze(1)) % 9}
        else:
            sharded[x.strip(".")] = draw(N, *((5, 6) if "..." in x else (6,)), 1)[..., 0] + i / 3
    parameters = dict(made(name).named_parameters())
    replicated |= {parameter.replace(".", "_"): parameters[parameter].detach() for parameter in learned}

    def call(group=None, strategy="auto", grad_reduce="mean", **tensors):
        if group is not None and way != "group":
            group = "world" if group.size() == dist.get_world_size() else dist.DeviceMesh.from_group(group, "cpu")
        module = made(name, group=group, strategy=strategy, grad_reduce=grad_reduce)
        if way == "pickled":
            module = pickle.loads(pickle.dumps(module))
        elif way == "copied":
            module = copy.deepcopy(module)
        args, options = arguments(name, tensors)
        state = {parameter: tensors[parameter.replace(".", "_")] for parameter in learned}
        return functional_call(module, state, tuple(args), options)

    frozen = dict(MoCoLoss="b", MoCoV3Loss="cd", NNCLRLoss="ab").get(name, "")
    return Problem(call, sharded, replicated, dict(frozen=tuple(frozen)))


@combinations(
    name=list(MODULES),
    way=["group", "mesh", "copied", "pickled"],
    ranks=[3, 8],
    rows=list(COUNTS),
    strategy=["all_gather", "ring"],
    grad_reduce=["mean", "sum"],
)
def test_module(pool, name, way, ranks, rows, strategy, grad_reduce):
    if way == "pickled" and ranks < 8:
        way = "mesh"  # only the world has a name
    agrees(pool, of_module, name, way, counts=COUNTS[rows][ranks], strategy=strategy, grad_reduce=grad_reduce)


def wrapped(group, name: str, rows: str):
    """The gradients of what a module learns that is itself under DDP, of two steps; predictors also of `fully_shard`,
    which takes no parameters of one number."""
    counts, rank = COUNTS[rows][group.size()], group.rank()
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    problem, ways = of_module(sum(counts), name, "group"), []
    args, options = arguments(name, {x: y[own] for x, y in problem.sharded.items()} | problem.replicated)
    for wrapper in ("ddp", "fsdp")[: 1 + (name == "CPCLoss")]:
        module = made(name, group=group)
        if wrapper == "ddp":
            parallel = DistributedDataParallel(sslkern.memory.ignored_by_ddp(module), process_group=group)
        else:
            del module.temperature
            module.temperature = torch.tensor(T).item()
            parallel = fully_shard(module, mesh=dist.DeviceMesh.from_group(group, "cpu"))
        for _ in range(2):
            parallel(*args, **options).backward()
        ways.append({of: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for of, p in module.named_parameters()})
    return ways


@combinations(name=[name for name, (_, _, learned) in MODULES.items() if learned], rows=list(COUNTS))
def test_what_a_module_learns(pool, name, rows):
    N = sum(COUNTS[rows][3])
    problem, module = of_module(N, name, "group"), made(name)
    args, options = arguments(name, problem.sharded | problem.replicated)
    for _ in range(2):
        module(*args, **options).backward()
    wanted = {of: p.grad for of, p in module.named_parameters()}
    for ways in pool.run(wrapped, name, rows, ranks=3):
        for grads in ways:
            for of, got in grads.items():
                close(got, wanted[of])
