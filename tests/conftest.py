import pytest
import torch

import sslkern
from sslkern.backends import BACKENDS

_native = BACKENDS["cpu"]._cpu
_ISAS = list(_native.isas()) if _native else []
EVERY = ["reference", *(f"cpu-{isa}" for isa in _ISAS)]  # what can run here


@pytest.fixture(autouse=True)
def nan_poisoned_memory():
    """Fresh `torch.empty` is filled with NaN, so that an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=EVERY)
def backend(request):
    """Each backend in turn, the native one with each instruction set that this machine runs."""
    name, _, isa = request.param.partition("-")
    before = _native.isa() if isa else None
    if isa:
        _native.set_isa(isa)
    with sslkern.use_backend(name):
        yield request.param
    if isa:
        _native.set_isa(before)
