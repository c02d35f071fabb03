"""The code of the Triton kernels on chips that are not there: nothing spills, and products use the matrix units."""

import json

import pytest
import torch

from sslkern.backends import BACKENDS

from . import offline

pytestmark = pytest.mark.slow
triton = pytest.importorskip("triton")
if BACKENDS["triton"].INTERPRETED or torch.cuda.is_available():
    pytest.skip("for machines without a GPU, and not for the interpreter", allow_module_level=True)
TABLE = json.loads((offline.RESULTS / "triton.json").read_text())
if triton.__version__ != TABLE["triton"]:
    pytest.skip(f"the table is of Triton {TABLE['triton']}, which `make triton-test` brings", allow_module_level=True)

# All cases for the H100, those used most for the others, and one with so many features that a tile takes them in parts.
BRIEF = offline.jobs(dtypes=["bf16"], sizes=[128], archs=[90])
for name in ("nt_xent", "siglip"):
    BRIEF += offline.jobs(name, dtypes=["bf16"], sizes=[128], archs=[80, 100])
BRIEF += offline.jobs("nt_xent", dtypes=["bf16"], sizes=[512], archs=[90])
BRIEF += offline.jobs("similarity_lse/small", dtypes=["fp32"], sizes=[512], archs=[90])  # products without matrix units
# All cases for all of them, and the most used ones in parts.
ALL = offline.jobs(dtypes=["bf16"], sizes=[128])
for name in ("two_way", "frozen", "siglip"):
    ALL += offline.jobs(name, dtypes=["bf16"], sizes=[512], archs=[90])
REST = [job for job in ALL if job not in BRIEF]


@pytest.fixture(scope="module", params=[BRIEF, pytest.param(REST, marks=pytest.mark.long)], ids=["brief", "rest"])
def rows(request):
    return list(offline.compile_all(request.param))


def bad(rows):
    return [
        f"{row['kernel']} of {offline.job_of(row)}: {offline.complaints(row)}"
        for row in rows
        if offline.complaints(row)
    ]


def test_no_kernel_spills_or_misses_the_matrix_units(rows):
    assert not bad(rows)


def test_the_table_is_of_these_kernels(rows):
    table = TABLE["kernels"]
    assert not bad(table)

    def names(rows):
        # Of tiles.py: listed with the primitive that they are met in first.
        shared = ("similarity_extent_kernel", "similarity_longest_kernel")
        of = {kernel: "any" for kernel in shared}
        return {(row["arch"], of.get(row["kernel"], row["primitive"]), row["kernel"]) for row in rows}

    assert names(rows) <= names(table), "`make triton-offline` renews it"
