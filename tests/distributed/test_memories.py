"""Memories over ranks, the same on all of them or sharded: those of one process that is given all rows."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sslkern
from sslkern import functional
from sslkern.memory import ignored_by_ddp, joined

from .agreement import COUNTS, Problem, agrees
from .combinations import combinations

STEPS_OF_ROWS = (5, 0, 2), (1, 4, 3), (0, 11, 1)  # rows of each rank, step by step; the last are more than are kept


def batch(step, rank=None):
    """What a step brings, for one rank or for all: two views, which also are predictions, and samples."""
    counts = STEPS_OF_ROWS[step]
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(2, sum(counts), 4, generator=generator)
    samples = torch.randint(6, (sum(counts),), generator=generator)  # some of them on several ranks
    start = 0 if rank is None else sum(counts[:rank])
    rows = slice(start, sum(counts) if rank is None else start + counts[rank])
    return views[0, rows].clone().requires_grad_(), views[1, rows], samples[rows]


def drawn(samples):
    """Rows of the bank that follow from the sample alone."""
    return (samples.unsqueeze(1) + torch.arange(3)) % 6


MAKERS = {
    "queue": lambda **options: sslkern.FeatureQueue(4, 9, **options),
    "labels": lambda **options: sslkern.CrossBatchMemory(4, 9, **options),
    "bank": lambda **options: sslkern.MemoryBank(6, 4, **options),
    "moco": lambda **options: sslkern.MoCoLoss(4, 9, **options),
    "nnclr": lambda **options: sslkern.NNCLRLoss(4, 9, **options),
    "nce": lambda **options: sslkern.NCELoss(6, 4, 2, **options),
    "cmc": lambda **options: sslkern.CMCLoss(2, 6, 4, 2, **options),
}
STEPS = {
    "queue": lambda memory, a, b, samples: memory.push(a),
    "labels": lambda memory, a, b, samples: memory.push(a, samples),
    "bank": lambda memory, a, b, samples: memory.update(samples, a),
    "moco": lambda loss, a, b, samples: loss(a, b),
    "nnclr": lambda loss, a, b, samples: loss(a, b, b, a),
    "nce": lambda loss, a, b, samples: loss(a, samples, index=drawn(samples)),
    "cmc": lambda loss, a, b, samples: loss((a, b), samples, index=drawn(samples)),
}


def steps_of(name, module, rank=None):
    """The loss of each step, and its gradient, which is taken when the memory has been written to."""
    found = []
    for step in range(len(STEPS_OF_ROWS)):
        a, b, samples = batch(step, rank)
        loss = STEPS[name](module, a, b, samples)
        found.append((loss, None) if loss is None else (loss.detach(), torch.autograd.grad(loss, a)[0]))
    return found


def of_rank(group, sharded):
    found = {}
    for number, (name, make) in enumerate(MAKERS.items()):
        if group.rank() == 1:  # whatever else a rank has made before
            make(group=group), torch.randn(number)
        module = make(group=group, sharded=sharded)
        before = {key: x.clone() for key, x in module.state_dict().items()}
        found[name] = before, steps_of(name, module, group.rank()), module.state_dict()
    return found


@pytest.mark.parametrize("sharded", [False, True])
def test_memories_are_those_of_one_process(pool, sharded):
    ranks = pool.run(of_rank, sharded, ranks=3)
    for name, make in MAKERS.items():
        before, steps, after = zip(*(rank[name] for rank in ranks), strict=True)
        if sharded:
            before, after = joined(before), joined(after[::-1])
        else:
            for states in (before, after):
                for state in states[1:]:  # no log Z yet is NaN
                    assert all(torch.equal(x.nan_to_num(), state[key].nan_to_num()) for key, x in states[0].items())
            before, after = before[0], after[0]
        module = make()
        module.load_state_dict(before)
        for number, (loss, grad) in enumerate(steps_of(name, module)):
            losses, grads = zip(*(rank[number] for rank in steps), strict=True)
            if loss is not None:
                assert all(torch.equal(x, losses[0]) for x in losses)
                assert torch.allclose(losses[0], loss, atol=0, rtol=1e-5), name
                assert torch.allclose(torch.cat(grads), 3 * grad, atol=1e-5), name
        assert after.keys() == module.state_dict().keys()
        for key, x in module.state_dict().items():
            assert torch.allclose(after[key], x, atol=1e-6), (name, key)
            if x.is_floating_point():
                assert not torch.equal(after[key], before[key])


def kept_under_ddp(group, ignored):
    """The first number of a queue and of running statistics, which differ from rank to rank, after a forward."""
    model = torch.nn.ModuleDict(dict(norm=torch.nn.BatchNorm1d(4), loss=sslkern.MoCoLoss(4, 9, group=group)))
    model.forward = lambda x: model["norm"](x)
    model = ignored_by_ddp(model) if ignored else model
    parallel = DistributedDataParallel(model, process_group=group)  # which broadcasts everything once, if not ignored
    kept = model["loss"].memory.queue, model["norm"].running_mean
    for x in kept:
        x.fill_(group.rank())
    model.eval()
    parallel(torch.randn(3, 4))
    return [x.flatten()[0].item() for x in kept]


def test_a_memory_is_not_broadcast(pool):
    assert pool.run(kept_under_ddp, True, ranks=3) == [[0, 0], [1, 0], [2, 0]]
    assert pool.run(kept_under_ddp, False, ranks=3) == [[0, 0]] * 3


# ---- losses of a memory that is sharded, to the last digits ----------------------------------------------------------


def draw(N, *shape):
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(N + len(shape)))


def sharded_queue(rows, group, labels=None):
    """rows [K, D], sharded over the group; without one as they are."""
    if group is None:
        return rows, labels
    make = sslkern.FeatureQueue if labels is None else sslkern.CrossBatchMemory
    memory = make(rows.shape[1], rows.shape[0], normalize=False, group=group, sharded=True).to(rows.dtype)
    state = dict(queue=rows.t(), queue_ptr=torch.zeros(1, dtype=torch.int64))
    if labels is not None:
        state |= dict(labels=labels, count=torch.full((1,), rows.shape[0]))
    memory.load_state_dict(state)
    return memory.contents() if labels is not None else (memory.queue.t(), None)


def sharded_bank(rows, group):
    if group is None:
        return rows
    memory = sslkern.MemoryBank(*rows.shape, group=group, sharded=True).to(rows.dtype)
    memory.load_state_dict(dict(bank=rows))
    return memory.bank


def of_memory(case, memory, group=None, labels=None, **given):
    if case == "nce":
        return functional.nce(bank=sharded_bank(memory, group), group=group, **given)
    if case == "cmc":
        views, banks = (given.pop("query"), given.pop("key")), [sharded_bank(memory * n, group) for n in (1, 2)]
        return functional.cmc(views, banks, group=group, **given)
    memory, ids = sharded_queue(memory, group, labels)
    if case == "nnclr":
        return functional.nnclr(p0=given.pop("query"), p1=given.pop("key"), support=memory, group=group, **given)
    if case == "moco":
        return functional.moco(queue=memory, group=group, **given)
    return functional.info_nce(negatives=memory, negative_ids=ids, group=group, **given)


def make(N, case, form, extra):
    sharded = dict(zip(("query", "key"), draw(N, 2, 6).unbind(1), strict=True))
    replicated, options = dict(memory=draw(9, 6)), dict(case=case, frozen=("memory",), stats="stats" in form)
    if case in ("nce", "cmc"):
        sharded["index"] = torch.randint(9, (N, 4), generator=torch.Generator().manual_seed(N))
        options |= dict(form="softmax") if "smooth" in form else {}
    if case == "nce":
        sharded.pop("key")
    if case == "cmc":
        options.pop("stats")
    if case == "moco":
        options["frozen"] = "memory", "key"
    if case in ("moco", "info_nce", "in_batch"):
        options["label_smoothing"] = 0.1 if "smooth" in form else 0.0
    if case == "nnclr":
        sharded |= dict(zip(("z0", "z1"), draw(N, 2, 2, 6)[:, 0].unbind(1), strict=True))
        options["frozen"] = "memory", "z0", "z1"
    if case in ("in_batch", "labels"):
        sharded["ids"] = torch.arange(N) * 2 // 3
        options["in_batch"] = True
        if case == "labels":
            replicated["labels"] = torch.arange(9) % 4
    if "weights" in extra and case != "nnclr":
        sharded["weights"] = draw(N).abs()
    if "learned" in extra:
        replicated["logit_scale"] = torch.tensor(3.0)
    else:
        options["temperature"] = 0.4
    options["reduction"] = "none" if "none" in extra else "mean"
    return Problem(of_memory, sharded, replicated, options)


@combinations(
    case=["moco", "info_nce", "in_batch", "labels", "nce", "cmc", "nnclr"],
    form=["", "smooth, stats"],
    extra=["", "weights, learned", "none, weights"],
    ranks=[1, 2, 3, 5],
    rows=list(COUNTS),
    strategy=["all_gather", "ring"],
    grad_reduce=["mean", "sum"],
)
def test_losses_of_a_sharded_memory(pool, case, form, extra, ranks, rows, strategy, grad_reduce):
    counts = COUNTS[rows][ranks]
    agrees(pool, make, case, form, extra, counts=counts, strategy=strategy, grad_reduce=grad_reduce)


def beside_nan(group):
    """The gradient of queries that name none of the first rows, which are NaN."""
    rows = draw(9, 4)
    rows[: group.size()] = torch.nan
    index = torch.tensor([[4, 5, 8], [3, 3, 3]]) if group.rank() else torch.tensor([[7, 6, 4]])
    query = draw(len(index), 4).requires_grad_()
    functional.nce(query, sharded_bank(rows, group), index, group=group).backward()
    return query.grad


def test_rows_that_are_not_named_have_no_part(pool):
    assert all(grad.isfinite().all() and grad.any() for grad in pool.run(beside_nan, ranks=3))


# ---- where a sharded memory goes, and what it cannot be combined with ------------------------------------------------


def travelled(group, how):
    """A criterion that has been somewhere, beside the one that has not: the losses of another step, and the states."""
    criterion = sslkern.MoCoLoss(4, 9, group="world", sharded=True)
    criterion(*batch_of(group, 0))
    if how == "deepcopy":
        other = copy.deepcopy(criterion)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(criterion))
    elif how == "to":
        other = copy.deepcopy(criterion).double().float()
    else:
        file = io.BytesIO()
        torch.save(criterion.state_dict(), file)
        file.seek(0)
        other = sslkern.MoCoLoss(4, 9, group="world", sharded=True)
        other.load_state_dict(torch.load(file))
    assert other.memory.queue.rows.data_ptr() == other.memory.queue_shard.data_ptr()
    assert other.memory.queue.rows.data_ptr() != criterion.memory.queue.rows.data_ptr()
    losses = [of(*batch_of(group, 1)) for of in (criterion, other)]
    return losses, [of.state_dict() for of in (criterion, other)]


def batch_of(group, step):
    x = torch.randn(2, 4 + group.rank() % 2, 4, generator=torch.Generator().manual_seed(10 * step + group.rank()))
    return x.unbind()


@pytest.mark.parametrize("how", ["deepcopy", "to", "state_dict", "pickle"])
def test_a_sharded_memory_travels(pool, how):
    for losses, states in pool.run(travelled, how, ranks=8):
        assert torch.equal(*losses) and all(torch.equal(x, states[1][key]) for key, x in states[0].items())


def states_of(group, state=None):
    """What a rank saves, after it has loaded what the ranks of another number did."""
    module = torch.nn.ModuleDict(dict(queue=MAKERS["labels"](group=group, sharded=True), net=torch.nn.Linear(2, 1)))
    if state is None:
        keys = batch_of(group, 0)[0]
        module["queue"].push(keys, torch.arange(len(keys)))
    else:
        module.load_state_dict(state)
    return module.state_dict()


def test_a_sharded_memory_is_dealt_out_anew(pool):
    first = pool.run(states_of, ranks=3)
    whole = joined(first)
    module = torch.nn.ModuleDict(dict(queue=MAKERS["labels"](), net=torch.nn.Linear(2, 1)))
    module.load_state_dict(whole)
    assert module["queue"].count == 13 and module["queue"].queue_ptr == 4
    for ranks in (1, 2, 5):
        again = joined(pool.run(states_of, whole, ranks=ranks))
        assert again.keys() == whole.keys() and all(torch.equal(x, whole[key]) for key, x in again.items())
    said = "queue is what rank 1 of 3 has of a memory of 9 rows, and this is .*; load what sslkern.memory.joined makes"
    for error in (*pool.outcomes(states_of, first[1], ranks=2), pool.outcomes(states_of, first[1], ranks=3)[0]):
        with pytest.raises(RuntimeError, match=said):
            raise error
    with pytest.raises(RuntimeError, match=said):
        module.load_state_dict(first[1])
    with pytest.raises(ValueError, match=r"states must be those of all 3 ranks, one of each, not of ranks \[0, 2\]"):
        joined([first[0], first[2]])


def refused(group, case):
    query, key = batch_of(group, 0)
    if case == "too small":
        return sslkern.FeatureQueue(4, 2, group=group, sharded=True)
    size = 10 if case == "sizes" and group.rank() == 1 else 9
    if case == "misuse of a bank":
        bank = sslkern.MemoryBank(6, 4, group=group, sharded=True)
        samples = torch.full(query.shape[:1], 6 if group.rank() == 1 else 5)
        return bank.update(samples, query)
    if case == "index":
        bank = sslkern.MemoryBank(6, 4, group=group, sharded=True).bank
        return functional.nce(query, bank, torch.full((len(query), 3), -1 if group.rank() == 1 else 5), group=group)
    memory = sslkern.CrossBatchMemory(4, size, group=group, sharded=True)
    if case == "broadcast":
        dist.broadcast(memory.shard_place, group=group, group_src=0)
    if case == "broadcast, then pushed":
        dist.broadcast(memory.shard_place, group=group, group_src=0)
        return memory.push(key, torch.zeros(len(key), dtype=torch.int64))
    if case == "no group":
        return functional.moco(query, key, memory.queue.t())
    if case == "labels":
        keys, labels = memory.contents()
        given = dict(ids=torch.zeros(len(query), dtype=torch.int64), negative_ids=labels.rows, in_batch=True)
        return functional.info_nce(query, key, keys, **given, group=group)
    if case == "smoothing":
        keys, labels = memory.contents()
        given = dict(ids=torch.zeros(len(query), dtype=torch.int64), negative_ids=labels, label_smoothing=0.1)
        return functional.info_nce(query, key, keys, **given, group=group)
    if case == "another loss":
        return functional.mnrl(query, key, memory.queue.t(), group=group)
    return functional.moco(query, key, memory.queue.t(), group=group)


REFUSED = {
    "too small": "size must be at least 3, a row for each process of the group, not 2",
    "sizes": r"queue is its part of a memory \[9, 4\] .* on ranks 0, 2, its part of a memory \[10, 4\] .* on rank 1",
    "misuse of a bank": r"index must be rows of the bank, 0 to 5; of others there are 5 on rank 1",
    "index": r"index must be rows of the bank, 0 to 5; of others there are 15 on rank 1",
    "broadcast": r"queue is its part .* on rank 0, the part of another rank \(DDP sends it: see .*ignored_by_ddp",
    "broadcast, then pushed": r"queue is its part .* on rank 0, the part of another rank",
    "no group": r"queue is sharded over ranks \[5, 6, 7\], not over this process alone; give the loss its group",
    "labels": "negatives and negative_ids must both be those of a sharded memory, or none of them",
    "smoothing": "label_smoothing must be 0 with the negative_ids of a sharded memory",
    "another loss": r"negatives must be a tensor \[N, H, D\]",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_sharded_memory_cannot_do(pool, case):
    pids = pool.pids(3)
    for error in pool.outcomes(refused, case, ranks=3):
        assert "\n" not in str(error)
        with pytest.raises((ValueError, TypeError, IndexError), match=REFUSED[case]):
            raise error
    assert pool.pids(3) == pids


def of_the_world(group):
    """The memory of all ranks in a loss of some."""
    memory = sslkern.FeatureQueue(4, 9, group="world", sharded=True)
    return functional.moco(*batch_of(group, 0), memory.queue.t(), group=group)


def test_a_memory_belongs_to_its_group(pool):
    for error in pool.outcomes(of_the_world, ranks=3):
        with pytest.raises(
            ValueError, match=r"queue is sharded over ranks \[0, .* 7\], not over a group of 3; give the"
        ):
            raise error
    for make in MAKERS.values():
        with pytest.raises(ValueError, match="sharded=True needs group="):
            make(sharded=True)


class Model(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        self.net, self.criterion = torch.nn.Linear(4, 4), sslkern.MoCoLoss(4, 8, group=group, sharded=True)

    def forward(self, x, key):
        return self.criterion(self.net(x), key)


def under_ddp(group, ignored):
    model = Model(group)
    model = ignored_by_ddp(model) if ignored else model
    parallel = DistributedDataParallel(model, process_group=group)
    parallel(*batch_of(group, 0)).backward()
    return model.net.weight.grad


def test_ddp_leaves_it_alone_or_that_is_said(pool):
    grads = pool.run(under_ddp, True, ranks=2)
    assert torch.equal(*grads)
    for error in pool.outcomes(under_ddp, False, ranks=2):
        with pytest.raises(ValueError, match="the part of another rank"):
            raise error


def compiled(group, name):
    torch.compiler.reset()
    found = []
    for how in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        module = MAKERS[name](group=group, sharded=True)
        x = batch_of(group, 0)[0][:4].clone().requires_grad_()
        loss = how(lambda a, m=module: STEPS[name](m, a, a.detach() + 1, torch.arange(4)))(x)
        grad = None if loss is None else torch.autograd.grad(loss, x)[0]
        found.append((loss, grad, *module.state_dict().values()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "bank", "moco", "nnclr", "nce"])
def test_compiles(pool, name):
    for eager, traced in pool.run(compiled, name, ranks=2):
        for x, y in zip(eager, traced, strict=True):
            assert x is None and y is None or torch.allclose(x, y, atol=1e-6)
