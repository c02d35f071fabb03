"""The emulated machine of kernels for Hopper: it runs right what is right, and sees what is not."""

import ctypes

import pytest

from .conftest import GPU, emulated_cuda

pytestmark = pytest.mark.skipif(GPU, reason="for the CPU")


@pytest.fixture(scope="module")
def trial():
    function = emulated_cuda().trial
    function.argtypes = [ctypes.c_int] * 5 + [ctypes.c_uint64]
    return function


@pytest.mark.parametrize("n, m, d", [(150, 300, 100), (64, 128, 128), (1, 1, 1), (300, 131, 65)])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_right(trial, half, cluster, n, m, d):
    for seed in range(3):
        assert trial(half, n, m, d, cluster, seed) == 0
