"""Ranks on which the packages, and what stands in for them, take a group for the world."""

import contextlib

import pytest
import torch.distributed as dist

from ..distributed.pool import Pool


@contextlib.contextmanager
def as_world(group):
    """group is the default one, of which packages ask their rank and their number."""
    world = dist.group.WORLD
    dist.distributed_c10d._update_default_pg(group)
    try:
        yield
    finally:
        dist.distributed_c10d._update_default_pg(world)


@pytest.fixture(scope="session")
def three():
    pool = Pool(3, groups=(2, 3))
    yield pool
    pool.close()
