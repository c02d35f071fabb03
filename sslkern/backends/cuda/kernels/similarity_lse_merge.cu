// The partial sums of similarity_lse_forward.cu, together: the log-sum-exp of each row and column, and whether it may
// be wrong. Floor: they are read once.
#include "segments.h"
#include "similarity.h"

namespace sslkern::cuda {

// A sum of exp2(score - shift), of which shift is the largest that came.
struct Total {
  float shift = -INFINITY, sum = 0.f;

  SSLKERN_DEVICE void add(float other_shift, float other) {
    if (other_shift == -INFINITY) return;
    const float largest = fmaxf(shift, other_shift);
    sum = sum * exp2_fast(shift - largest) + other * exp2_fast(other_shift - largest);
    shift = largest;
  }
};

// Of the segments of row i's queries.
SSLKERN_DEVICE void add_rows(Total& total, const Plan& plan, const Partials& from, int i, int warp) {
  const int group = i / plan.group_rows,
            sequence = plan.triangle && plan.other(group) < group ? plan.other(group) : group;
  if (sequence < plan.first || sequence >= plan.first + plan.count) return;
  const int part = group != sequence, warps = WARPS * plan.tile_blocks, queries = plan.group_rows / plan.group_blocks;
  const int blocks = plan.count * plan.parts() * plan.group_blocks;
  const int block = ((sequence - plan.first) * plan.parts() + part) * plan.group_blocks + i % plan.group_rows / queries;
  for (int slot = 0; slot < plan.slots; ++slot) {
    const Segment segment = segment_of(plan, sequence, slot, part);
    if (segment.from >= segment.to) continue;
    for (int w = warp; w < warps; w += WARPS) {
      const int at = (slot * warps + w) * blocks + block;
      total.add(from.row_shifts[at], from.rows[at * queries + i % queries]);
    }
  }
}

// Of the sequences that come to key j.
SSLKERN_DEVICE void add_columns(Total& total, const Plan& plan, const Partials& from, int j, int warp) {
  const int tile = j / plan.tile_rows, length = plan.length();
#pragma unroll 4
  for (int sequence = warp; sequence < plan.count; sequence += WARPS)
    for (int part = 0; part < plan.parts(); ++part) {
      const int position = position_of(plan, plan.first + sequence, part, tile);
      if (position < 0) continue;
      for (int block = 0; block < plan.group_blocks; ++block) {
        const int at =
            ((sequence * plan.group_blocks + block) * length + position) * plan.tile_rows + j % plan.tile_rows;
        total.add(from.column_shifts[at / OF_WARP], from.columns[at]);
      }
    }
}

// Adds the partial sums of a launch to those of the launches before, state [2, n + m], for WARP rows or columns in each
// block. After the last: log-sum-exps, and which may be wrong.
__global__ void __launch_bounds__(THREADS) merge(const Plan plan, const Partials from, int n, int m, float* state,
                                                 float* row, float* column, uint8_t* row_flags, uint8_t* column_flags) {
  __shared__ float shifts[WARPS][WARP], sums[WARPS][WARP];
  const int warp = thread_id() / WARP, lane = thread_id() % WARP, row_blocks = (n + WARP - 1) / WARP;
  const bool of_rows = block_id() < row_blocks;
  const int size = of_rows ? n : m, x = static_cast<int>(block_id() - (of_rows ? 0 : row_blocks)) * WARP + lane;
  Total total;
  if (x < size) {
    if (of_rows) add_rows(total, plan, from, x, warp);
    if (!of_rows || plan.triangle) add_columns(total, plan, from, x, warp);
  }
  shifts[warp][lane] = total.shift;
  sums[warp][lane] = total.sum;
  sync_block();
  if (warp == 0 && x < size) {
    const int64_t all = static_cast<int64_t>(n) + m, at = of_rows ? x : static_cast<int64_t>(n) + x;
    total = Total();
    if (plan.first > 0) total.add(state[at], state[all + at]);
    for (int w = 0; w < WARPS; ++w) total.add(shifts[w][lane], sums[w][lane]);
    const int sequences = plan.triangle ? (plan.groups + 1) / 2 : plan.groups;
    if (plan.first + plan.count < sequences) {
      state[at] = total.shift;
      state[all + at] = total.sum;
    } else {
      // Terms of less than 2^-126 of the largest shift vanished, which are less than 2^-62 of a sum that passes.
      const bool sound = total.sum >= 0x1p-64f && total.sum < INFINITY;
      (of_rows ? row : column)[x] = fmaf(total.shift, 1 / LOG2_E, logf(total.sum));
      (of_rows ? row_flags : column_flags)[x] = !sound;
    }
  }
}

}  // namespace sslkern::cuda
