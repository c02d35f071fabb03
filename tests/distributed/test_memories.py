"""Memories over ranks: the same on all of them, and those of one process that is given all rows."""

import torch
from torch.nn.parallel import DistributedDataParallel

import sslkern

COUNTS = (5, 0, 2), (1, 4, 3)  # rows of each rank, step by step


def batch(step, rank=None):
    """What a step brings, for one rank or for all: two views, which also are predictions, and samples."""
    counts = COUNTS[step]
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(2, sum(counts), 4, generator=generator)
    samples = torch.randint(6, (sum(counts),), generator=generator)  # some of them on several ranks
    start = 0 if rank is None else sum(counts[:rank])
    rows = slice(start, sum(counts) if rank is None else start + counts[rank])
    return views[0, rows], views[1, rows], samples[rows]


def drawn(samples):
    """Rows of the bank that follow from the sample alone."""
    return (samples.unsqueeze(1) + torch.arange(3)) % 6


MAKERS = {
    "queue": lambda group: sslkern.FeatureQueue(4, 9, group=group),
    "labels": lambda group: sslkern.CrossBatchMemory(4, 9, group=group),
    "bank": lambda group: sslkern.MemoryBank(6, 4, group=group),
    "moco": lambda group: sslkern.MoCoLoss(4, 9, group=group),
    "nnclr": lambda group: sslkern.NNCLRLoss(4, 9, group=group),
    "nce": lambda group: sslkern.NCELoss(6, 4, 2, group=group),
    "cmc": lambda group: sslkern.CMCLoss(2, 6, 4, 2, group=group),
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


def of_rank(group):
    found = {}
    for name, make in MAKERS.items():
        module = make(group)
        before = {key: x.clone() for key, x in module.state_dict().items()}
        losses = [STEPS[name](module, *batch(step, group.rank())) for step in range(len(COUNTS))]
        found[name] = before, losses, module.state_dict()
    return found


def test_memories_are_the_same_on_all_ranks(pool):
    ranks = pool.run(of_rank, ranks=3)
    for name, make in MAKERS.items():
        before, losses, after = ranks[0][name]
        for other in ranks[1:]:
            assert losses == other[name][1]
            for mine, others in zip((before, after), (other[name][0], other[name][2]), strict=True):
                for key, x in mine.items():
                    assert torch.allclose(x, others[key], atol=0, rtol=0, equal_nan=True), (
                        name,
                        key,
                    )  # no log Z yet is NaN
        module = make(None)
        module.load_state_dict(before)
        for step, loss in enumerate(losses):
            whole = STEPS[name](module, *batch(step))
            assert loss is None and whole is None or torch.allclose(loss, whole, atol=0, rtol=1e-5)
        for key, x in module.state_dict().items():
            assert torch.allclose(after[key], x, atol=1e-6), (name, key)
            if x.is_floating_point():
                assert not torch.equal(after[key], before[key])


def under_ddp(group, ignored):
    """The first number of a queue and of running statistics, which differ from rank to rank, after a forward."""
    model = torch.nn.ModuleDict(dict(norm=torch.nn.BatchNorm1d(4), loss=sslkern.MoCoLoss(4, 9, group=group)))
    model.forward = lambda x: model["norm"](x)
    model = sslkern.memory.ignored_by_ddp(model) if ignored else model
    parallel = DistributedDataParallel(model, process_group=group)  # which broadcasts everything once, if not ignored
    kept = model["loss"].memory.queue, model["norm"].running_mean
    for x in kept:
        x.fill_(group.rank())
    model.eval()
    parallel(torch.randn(3, 4))
    return [x.flatten()[0].item() for x in kept]


def test_a_memory_is_not_broadcast(pool):
    assert pool.run(under_ddp, True, ranks=3) == [[0, 0], [1, 0], [2, 0]]
    assert pool.run(under_ddp, False, ranks=3) == [[0, 0]] * 3
