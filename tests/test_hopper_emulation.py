"""The emulated machine of kernels for Hopper: it runs right what is right, and sees what is not."""

import ctypes
import re
import shutil
import subprocess

import pytest

from .conftest import GPU, ROOT, emulated_cuda

pytestmark = pytest.mark.skipif(GPU, reason="for the CPU")

# What tests/cuda_emulation/trials.cu can do wrong, and what the machine says.
MISTAKES = {
    "a barrier at an odd place": "no multiple of 8",
    "a barrier made twice": "where a barrier is",
    "a barrier that nobody made": "there is no barrier at",
    "a barrier overwritten": "overwrites a barrier",
    "barriers not published": "was made and not published",
    "a parity of 2": "the parity is 0 or 1",
    "a phase missed": "the parity stands for another",
    "a phase that does not come": "nobody can go on; .* for the end of phase 0, which lacks 1 arrivals and 0 bytes",
    "too many arrivals": "too many arrivals",
    "too many bytes": "fewer than 2\\^20 bytes",
    "bytes that do not come": "threads 128 to 383 of block . wait .* which lacks 0 arrivals and 16 bytes",
    "the wrong parity": "wgmma reads at .* what a copy may still write",
    "sync_block without some": "threads 0 to 127 of block 0 wait at sync_block",
    "registers not given": "wait at registers_up",
    "more registers than given": "wait at registers_up",
    "too little shared memory": "reaches out of shared memory",
    "memory of the other block": "has its rank in bits 24 on",
    "a load at an odd place": "no multiple of 8",
    "a store at an odd place": "multiple of 16",
    "a map that was not encoded": "was not encoded",
    "a vector as a box": "rank 1, not 2",
    "a box at an odd place": "lies on a multiple of 1024",
    "a box outside of memory": "load_box reaches out of shared memory",
    "a box of out at an odd place": "lies on a multiple of 1024",
    "loads that do not wait": "overwrites|too many arrivals",
    "a tile released too early": "overwrites at .* may still read",
    "a warp that does not release": "overwrites at .* what warp 5 may still read",
    "a tile overwritten": "overwrites at .* what a product may still read",
    "an overwritten store": "overwrites at .* what a copy may still read",
    "a box of another warp": "may still|has written and not published",
    "no publish_shared": "has written and not published",
    "no sync_block": "what warp . may still (read|write)",
    "no sync_warp": "has written and not published",
    "no commit_stores": "stores that are not committed",
    "an end before stores are read": "stores still read shared memory",
    "an end with copies under way": "ends while copies into it are under way",
    "an end with products under way": "ends with products under way",
    "an end without the other block": "which has ended|ends while copies",
    "no sync_cluster at the end": "which has ended",
    "a product that does not wait for its copy": "what a copy may still write|what a product may still read",
    "a product without some threads": "threads of a warpgroup",
    "no wgmma_commit": "not committed",
    "accumulators without wgmma_fence": "takes accumulators from registers without wgmma_fence",
    "accumulators changed": "accumulators have changed",
    "accumulators read too early": "accumulators that it has not pinned",
    "accumulators not pinned": "accumulators that it has not pinned",
    "a in registers without wgmma_fence": "takes a from registers without wgmma_fence",
    "registers of a changed": "registers of a have changed",
    "a matrix outside of memory": "wgmma reaches out of shared memory",
    "a matrix that begins within 8 rows": "begins within 8 rows",
    "the rank left in rows": "the rank must be masked off",
    "the rank left in columns": "panels lie .* bytes apart",
}


@pytest.fixture(scope="module")
def trial():
    function = emulated_cuda().trial
    function.argtypes = [ctypes.c_int] * 5 + [ctypes.c_uint32] + [ctypes.c_char_p] * 2

    def run(half, n, m, d, cluster, seed, mistake=""):
        sentence = ctypes.create_string_buffer(1 << 14)
        wrong = function(half, n, m, d, cluster, seed, mistake.encode(), sentence)
        return sentence.value.decode() or ("wrong numbers" if wrong else "")

    return run


@pytest.mark.parametrize("n, m, d", [(150, 300, 100), (64, 128, 128), (1, 1, 1), (300, 131, 65), (129, 150, 250)])
@pytest.mark.parametrize("cluster", [1, 2])
def test_right(trial, cluster, n, m, d):
    for seed in range(5):
        assert trial(False, n, m, d, cluster, seed) == ""
        if d <= 128:
            assert trial(True, n, m, d, cluster, seed) == ""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_seen(trial, mistake):
    """In any order of events, but for the thread that happens to come in time."""
    for seed in range(3):
        said = trial(False, 150, 700, 128, 2, seed, mistake)
        assert re.search(MISTAKES[mistake], said)
    assert trial(False, 150, 300, 128, 2, seed) == ""  # nothing of it is left


def test_no_name_is_of_two_things():
    """All files of kernels are linked into one library, where a name of an inline function is what one of them says."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed; it comes with binutils")
    emulated_cuda()
    sizes = {}
    for file in (ROOT / "build/emulated").rglob("*.o"):
        symbols = subprocess.run(
            ["nm", "-S", "--defined-only", file], capture_output=True, text=True, check=True
        ).stdout
        for size, name in re.findall(r"^\w+ (\w+) [VW] (.*)$", symbols, re.MULTILINE):
            sizes.setdefault(name, {}).setdefault(size, file.stem)
    several = {name: files for name, files in sizes.items() if len(files) > 1 and "sslkern" in name}
    # What stands in a header is one thing, and of another size only where more of it was inlined.
    headers = "".join(header.read_text() for header in (ROOT / "sslkern/backends/cuda/kernels").glob("*.h"))
    shared = set(re.findall(r"^(?:SSLKERN_DEVICE|__device__)[^;(]*?\b(\w+)\(", headers, re.MULTILINE))

    def outermost(name):
        """Of _ZN7sslkern4cuda11row_lengthsI.., row_lengths."""
        length = re.search(r"7sslkern4cuda(\d+)", name)
        return name[length.end() :][: int(length[1])]

    several = {name: files for name, files in several.items() if outermost(name) not in shared}
    assert sizes and not several
