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
    sum = moved(sum, shift - largest) + moved(other, other_shift - largest);
    shift = largest;
  }

  // sum 2^by; a large sum of a small shift survives where 2^by alone is 0.
  SSLKERN_DEVICE static float moved(float sum, float by) {
    const bool far = by < -120.f;
    const float factor = exp2_fast(far ? 0.5f * by : by);
    return sum * factor * (far ? factor : 1.f);
  }
};

// What a row or a column is the sum of is shared by SHARES threads, each of which has AT_ONCE loads under way.
constexpr int SHARES = 32, AT_ONCE = 4;
constexpr int MERGED = THREADS / SHARES;  // rows or columns of a block

// Where a partial sum is, if it is there, and its shift.
struct Place {
  bool there;
  int shift, sum;
};

// find: the k-th of `count`. None branches, so that loads do not wait for each other.
template <class Find>
SSLKERN_DEVICE void add_share(Total& total, const float* shifts, const float* sums, int count, int share, Find find) {
  for (int first = share; first < count; first += SHARES * AT_ONCE) {
    float shift[AT_ONCE], sum[AT_ONCE];
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      const int k = first + n * SHARES;
      const Place place = find(k < count ? k : first);
      const bool there = place.there && k < count;
      shift[n] = shifts[there ? place.shift : 0];
      sum[n] = sums[there ? place.sum : 0];
      if (!there) shift[n] = -INFINITY;
    }
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) total.add(shift[n], sum[n]);
  }
}

// Of the segments of row i's queries, which warps have added up.
SSLKERN_DEVICE void add_rows(Total& total, const Plan& plan, const Partials& from, int i, int share) {
  const int group = i / plan.group_rows, other = plan.other(group);
  const int sequence = plan.triangle && other < group ? other : group, part = group != sequence;
  if (sequence < plan.first || sequence >= plan.first + plan.count) return;
  const int warps = WARPS * plan.tile_blocks, queries = plan.group_rows / plan.group_blocks;
  const int blocks = plan.count * plan.parts() * plan.group_blocks;
  const int block = ((sequence - plan.first) * plan.parts() + part) * plan.group_blocks + i % plan.group_rows / queries;
  add_share(total, from.row_shifts, from.rows, plan.slots * warps, share, [&](int k) {
    const Segment segment = segment_of(plan, sequence, k / warps, part);
    const int at = k * blocks + block;
    return Place{segment.from < segment.to, at, at * queries + i % queries};
  });
}

// Of the sequences that come to key j. These have one or two parts, groups one or two blocks.
SSLKERN_DEVICE void add_columns(Total& total, const Plan& plan, const Partials& from, int j, int share) {
  const int tile = j / plan.tile_rows, length = plan.length(), two_blocks = plan.group_blocks - 1;
  const int each = plan.triangle + two_blocks;  // the logarithm of how many a sequence has
  add_share(total, from.column_shifts, from.columns, plan.count << each, share, [&](int k) {
    const int sequence = k >> each, block = k & two_blocks, part = (k >> two_blocks) & plan.triangle;
    const int position = position_of(plan, plan.first + sequence, part, tile);
    const int at = (((sequence << two_blocks) + block) * length + position) * plan.tile_rows + j % plan.tile_rows;
    return Place{position >= 0, at / OF_WARP, at};
  });
}

// Adds the partial sums of a launch to those of the launches before, state [2, n + m], for MERGED rows or columns in
// each block. After the last: log-sum-exps, and which may be wrong.
__global__ void __launch_bounds__(THREADS) merge(const Plan plan, const Partials from, int n, int m, float* state,
                                                 float* row, float* column, uint8_t* row_flags, uint8_t* column_flags) {
  __shared__ float shifts[SHARES][MERGED], sums[SHARES][MERGED];
  const int share = thread_id() / MERGED, of_block = thread_id() % MERGED, row_blocks = (n + MERGED - 1) / MERGED;
  const bool of_rows = block_id() < row_blocks;
  const int size = of_rows ? n : m;
  const int x = static_cast<int>(block_id() - (of_rows ? 0 : row_blocks)) * MERGED + of_block;
  Total total;
  if (x < size) {
    if (of_rows) add_rows(total, plan, from, x, share);
    if (!of_rows || plan.triangle) add_columns(total, plan, from, x, share);
  }
  for (int half = SHARES / 2; half > 0; half /= 2) {  // the second half of the shares to the first
    shifts[share][of_block] = total.shift;
    sums[share][of_block] = total.sum;
    sync_block();
    if (share < half) total.add(shifts[share + half][of_block], sums[share + half][of_block]);
    sync_block();
  }
  if (share == 0 && x < size) {
    const int64_t all = static_cast<int64_t>(n) + m, at = of_rows ? x : static_cast<int64_t>(n) + x;
    if (plan.first > 0) total.add(state[at], state[all + at]);
    const int sequences = plan.triangle ? (plan.groups + 1) / 2 : plan.groups;
    if (plan.first + plan.count < sequences) {
      state[at] = total.shift;
      state[all + at] = total.sum;
    } else {
      // Terms of less than 2^-124 of the largest shift vanished, which are less than 2^-60 of a sum that passes.
      const bool sound = total.sum >= 0x1p-64f && total.sum < INFINITY;
      (of_rows ? row : column)[x] = fmaf(total.shift, 1 / LOG2_E, logf(total.sum));
      (of_rows ? row_flags : column_flags)[x] = !sound;
    }
  }
}

}  // namespace sslkern::cuda
