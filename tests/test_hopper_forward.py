"""The kernels for Hopper that sum rows and columns in one pass, on an emulated GPU, against the formula in float64."""

import math
import subprocess

import pytest
import torch

from sslkern.backends.cuda import similarity_lse_forward as kernels
from sslkern.backends.cuda import similarity_lse_rows as rows
from sslkern.backends.cuda.pairs import MOST, Pairs
from sslkern.backends.problem import Problem
from sslkern.backends.reference import similarity_lse as reference

from .conftest import ROOT, emulate_cuda, native_build
from .test_hopper_rows import DTYPES, OPTIONS, problem, within

FEATURES = 64, 100, 200, 768  # one of each kernel


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(kernels.Call, "processors", 4)
    return emulate_cuda(monkeypatch)


def sums(given, columns=True):
    """row, with columns col, and how many of them have a flag, which are then done again."""
    pairs = Pairs.of(given)
    row, row_flags, col, col_flags = kernels.log_sum_exps(pairs, columns)
    flags = [flags for flags in (row_flags, col_flags) if flags is not None]
    assert all(((x == 0) | (x == 1)).all() for x in flags)
    flagged = sum(int(x.sum()) for x in flags)
    rows.redo(pairs, row, row_flags, col, col_flags)
    return (row, col)[: 1 + columns], flagged


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, M, D",
    [(1, 1, 8), (70, 300, 64), (300, 129, 128), (257, 190, 72), (129, 257, 136), (200, 1, 576), (300, 270, 768)],
)
def test_rows_and_columns(N, M, D, dtype):
    given = problem(N, M, D, dtype)
    found, flagged = sums(given)
    within(given, found, True)
    alone, _ = sums(given, False)
    assert flagged == 0 and torch.equal(alone[0], found[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, D", [(2, 8), (300, 64), (600, 128), (520, 200), (900, 136), (130, 704), (600, 768)])
def test_of_itself(N, D, dtype):
    """In a triangle: even and odd numbers of groups."""
    given = problem(N, None, D, dtype)
    found, flagged = sums(given, False)
    within(given, found)
    assert flagged == 0


@pytest.mark.parametrize("D", FEATURES)
@pytest.mark.parametrize("chosen", OPTIONS, ids=str)
def test_options(chosen, D):
    given = problem(150, 200, D, **chosen)
    within(given, sums(given)[0], True)
    itself = problem(290, None, D, **chosen)
    within(itself, sums(itself, False)[0])


@pytest.mark.parametrize("D", FEATURES)
@pytest.mark.parametrize("processors, partials", [(2, 1 << 28), (16, 1 << 28), (3, 1), (8, 50_000)])
def test_however_work_is_cut(D, processors, partials, monkeypatch):
    """Among few or many processors, and into launches so that partial sums take little memory."""
    monkeypatch.setattr(kernels.Call, "processors", processors)
    monkeypatch.setattr(kernels, "PARTIALS", partials)
    kernels.plan_of.cache_clear()
    given, itself = problem(520, 200, D, bias=True, ids=200), problem(600, None, D, ids=400)
    within(given, sums(given)[0], True)
    within(itself, sums(itself, False)[0])
    kernels.plan_of.cache_clear()


@pytest.mark.parametrize("D", FEATURES)
def test_more_tiles_than_are_looked_at_together(D, monkeypatch):
    """Of which the last has pairs that do not count."""
    monkeypatch.setattr(kernels.Call, "processors", 1)
    given = problem(5, 128 * 36, D)
    given = given._replace(q_ids=torch.arange(128 * 36 - 5, 128 * 36), k_ids=torch.arange(128 * 36))
    within(given, sums(given)[0], True)


@pytest.mark.parametrize("D", FEATURES)
def test_the_same_bits_whenever_copies_and_products_happen(D, emulated):
    given, itself, first = problem(260, 130, D, ids=9), problem(300, None, D), None
    for seed in range(3):
        emulated.emulated_seed(seed)
        found = *kernels.log_sum_exps(Pairs.of(given), True), *kernels.log_sum_exps(Pairs.of(itself), False)[:2]
        first = first or found
        assert all(map(torch.equal, found, first))


@pytest.mark.parametrize("D", FEATURES)
def test_what_the_shift_cannot_represent_has_a_flag(D, monkeypatch):
    """Scores are +-144 in base 2."""
    monkeypatch.setattr(kernels.Call, "processors", 1)
    axis = torch.nn.functional.one_hot(torch.tensor(0), D).bfloat16()
    q, k = -axis.repeat(300, 1), axis.repeat(600, 1)
    q[20] = axis  # whose scores hide those of the other queries
    given = Problem(q, k, None, 100.0)
    found, flagged = sums(given)
    within(given, found, True)
    assert flagged >= 100
    q[:], k[:300] = axis, -axis  # after those keys scores are larger by 288
    found, flagged = sums(given)
    within(given, found, True)
    assert flagged >= 300


@pytest.mark.parametrize("D", FEATURES)
def test_a_large_sum_of_a_small_shift_is_not_lost_beside_a_large_shift(D, monkeypatch):
    """In base 2 row 0 is 125, of a warp whose first tile has scores of 0; beside a warp in which it is 110 and whose
    shift, row 1, is 150."""
    monkeypatch.setattr(kernels.Call, "processors", 1)
    later = kernels.kind_of(D).tile_rows  # the first key of the next tile, of the same warp as the first
    q, k = torch.zeros(2, D, dtype=torch.bfloat16), torch.zeros(2 * later, D, dtype=torch.bfloat16)
    q[0, 0] = q[1, 1] = 1
    k[16, 0], k[16, 1], k[later, 0] = 110, 150, 125
    given = Problem(q, k, None, math.log(2))
    found, _ = sums(given, False)
    within(given, found)


@pytest.mark.parametrize("D", FEATURES)
def test_no_flags_where_scores_are_of_any_size_but_alike(D):
    given = problem(150, 200, D, scale=100.0, size=10.0)
    given.q[0, 64:] = 0  # long sums are cut off by tensor units
    given.q[:], given.k[:] = given.q[0].clone(), given.q[0].clone()
    found, flagged = sums(given)
    within(given, found, True)
    assert flagged == 0


def test_duplicates_at_a_small_temperature():
    for D in FEATURES:
        given = problem(300, None, D, scale=100.0)
        given.q[[1, 149, 299]] = given.q[0].clone()
        within(given, sums(given, False)[0])


def test_with_nothing_left():
    ids = torch.zeros(130, dtype=torch.long).index_fill(0, torch.tensor([3, 129]), 1)
    q, k = torch.randn(130, 16).bfloat16(), torch.randn(140, 16).bfloat16()
    (row, col), _ = sums(Problem(q, k, None, 1.0, ids, torch.ones(140, dtype=torch.long)))
    assert torch.equal(row == -math.inf, ids == 1) and col.isfinite().all()
    assert (sums(Problem(q[:1]), False)[0][0] == -math.inf).all()  # of itself alone


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "k_bias", "taken out"])
def test_what_is_not_finite_comes_out_as_in_the_reference(where, value):
    given = problem(70, 300, 16, bias=True)
    given.k_bias.nan_to_num_(neginf=0.0)
    at = {"q": given.q, "k": given.k, "k_bias": given.k_bias[:, None], "taken out": given.k}[where]
    at[5, 0], at[64, -1] = value, value
    if where == "taken out":
        given.k_bias[[5, 64]] = -math.inf
    for got, want in zip(sums(given)[0], reference.similarity_lse_fwd(given, True, False, 0), strict=False):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-5, equal_nan=True)


# ---- how work is cut ------------------------------------------------------------------------------------------------


def test_each_pair_is_visited_once(tmp_path):
    """By kernels/segments.h itself: many sizes, slots, launches and clusters."""
    program = r"""
#include <cassert>
#include <cstdio>
#include <set>
#include <tuple>
#include <vector>
#include "segments.h"
using namespace sslkern::cuda;

long check(int group_rows, int tile_rows, int n, int m, bool triangle, int slots, int launches, int clusters) {
  Plan plan{group_rows, 1, tile_rows, 1, (n + group_rows - 1) / group_rows, (m + tile_rows - 1) / tile_rows, slots,
            triangle, 0, 0};
  const int sequences = triangle ? (plan.groups + 1) / 2 : plan.groups, count = (sequences + launches - 1) / launches;
  std::vector<int> visits(plan.groups * plan.tiles);
  long tiles = 0;
  for (plan.first = 0; plan.first < sequences; plan.first += count) {
    plan.count = sequences - plan.first < count ? sequences - plan.first : count;
    std::set<std::tuple<int, int, int>> segments;
    std::set<std::pair<int, int>> positions;
    for (int cluster = 0; cluster < clusters; ++cluster)
      for (Walk walk(plan, cluster, clusters); walk.next();) {
        const Segment& s = walk.segment;
        assert(s.from < s.to && s.to <= plan.length() && walk.sequence < plan.count && walk.slot < slots);
        assert(segments.insert({walk.sequence, walk.slot, walk.part}).second);
        for (int at = s.from, tile = s.tile; at < s.to; ++at, tile += s.step, ++tiles) {
          assert(tile >= plan.first_tile(s.group) && tile < plan.tiles);
          assert(at == position_of(plan, plan.first + walk.sequence, walk.part, tile));
          assert(positions.insert({walk.sequence, at}).second);
          ++visits[s.group * plan.tiles + tile];
        }
      }
    for (int sequence = 0; sequence < plan.count; ++sequence)  // what merge adds up is what there is
      for (int part = 0; part < plan.parts(); ++part) {
        for (int slot = 0; slot < slots; ++slot) {
          const Segment s = segment_of(plan, plan.first + sequence, slot, part);
          assert((s.from < s.to) == (segments.count({sequence, slot, part}) == 1));
        }
        for (int tile = 0; tile < plan.tiles; ++tile) {
          const int at = position_of(plan, plan.first + sequence, part, tile);
          assert(at == -1 || positions.count({sequence, at}) == 1);
        }
      }
  }
  for (int group = 0; group < plan.groups; ++group)
    for (int tile = 0; tile < plan.tiles; ++tile) {
      const bool wanted = !triangle || (tile + 1) * tile_rows > group * group_rows;
      assert(visits[group * plan.tiles + tile] == wanted);
    }
  return tiles;
}

int main() {
  long tiles = 0;
  for (int tile_rows : {128, 256})
    for (int n : {1, 128, 129, 256, 257, 511, 700, 1024, 1300, 2560, 2700})
      for (int slots = 1; slots < 12; slots += 1 + slots / 4)
        for (int launches : {1, 2, 3, 11})
          for (int clusters : {1, 3, 8}) {
            tiles += check(256, tile_rows, n, n, true, slots, launches, clusters);
            for (int m : {1, 130, 900, 2560}) tiles += check(256, tile_rows, n, m, false, slots, launches, clusters);
          }
  printf("%ld", tiles);
}
"""
    (tmp_path / "cover.cpp").write_text(program)
    folders = (ROOT / "sslkern/backends/cuda/kernels", ROOT / "tests/cuda_emulation")
    options = ["-std=c++17", "-O1", "-DSSLKERN_EMULATED", *(f"-I{folder}" for folder in folders)]
    command = [*native_build().find_compiler(), *options, "cover.cpp", "-o", "cover"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "cover"], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 100_000, done.stderr


@pytest.mark.parametrize("D", [64, 128, 512, 704, 705, 4096])
def test_what_fits_into_shared_memory(D):
    stages, bytes = kernels.kind_of(D).memory(D)
    assert stages >= 3 and bytes <= kernels.SHARED


@pytest.mark.parametrize("D", [128, 512, 768])
@pytest.mark.parametrize("N, M", [(None, 1 << 20), (1 << 20, 1 << 20), (None, 1 << 24), (256, 1 << 24), (1 << 24, 256)])
def test_memory_of_partial_sums(N, M, D):
    plan = kernels.plan_of(kernels.kind_of(D), N or M, M, N is None, True, 132)
    assert 4 * (plan.row_sums + plan.column_sums) <= kernels.PARTIALS


@pytest.mark.parametrize("D", [128, 512, 768])
@pytest.mark.parametrize("N", [None, 1, MOST - 1])
def test_kernels_count_in_32_bits(N, D):
    plan = kernels.plan_of(kernels.kind_of(D), N or MOST - 1, MOST - 1, N is None, True, 132)
    assert max(plan.row_sums, plan.column_sums, plan.length * plan.slots) < 2**31


@pytest.mark.parametrize("triangle", [False, True])
@pytest.mark.parametrize("D, N", [(128, 8192), (512, 8192), (128, 65536), (512, 65536), (768, 65536), (128, 1 << 20)])
def test_how_work_is_shared(D, N, triangle):
    """Of 132 processors few have nothing to do."""
    kind = kernels.kind_of(D)
    plan, clusters = kernels.plan_of(kind, N, N, triangle, True, 132), 132 // kind.blocks
    longest = -(-plan.count * plan.slots // clusters) * -(-plan.length // plan.slots)
    launches = -(-plan.sequences // plan.count)
    assert plan.sequences * plan.length >= (0.85 if N == 8192 else 0.95) * launches * clusters * longest
    assert (launches > 1) == (N == 1 << 20)
