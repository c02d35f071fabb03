// One side of the weights of the backward of `similarity_lse` as kernels read it.
#include "sides.h"

namespace sslkern::cuda {

// Of n log-sum-exps and their gradients the terms, whose gradients are multiplied by `fold` (null: 1). A warp takes
// `width` together, of which `blocks` (null: not wanted) says how close they are, and factors [n] are grad 2^(low -
// lse).
__global__ void __launch_bounds__(THREADS) lse_sides(int n, int width, const float* lse, const float* grad,
                                                     const float* fold, Term* terms, float* factors, Block* blocks) {
  const int block = int(block_id()) * (THREADS / WARP) + thread_id() / WARP;
  const int first = block * width + thread_id() % WARP, end = (block + 1) * width < n ? (block + 1) * width : n;
  const float by = fold == nullptr ? 1.f : *fold;
  float low = INFINITY, high = -INFINITY;
  bool strange = false;
  for (int i = first; i < end; i += WARP) {
    const float x = lse[i] * LOG2_E;
    const bool none = x == -INFINITY;
    terms[i] = none ? no_term() : Term{x, grad[i] * by};
    if (none) continue;
    strange = strange || x != x;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  if (blocks != nullptr) {
    for (int bit = WARP / 2; bit > 0; bit /= 2) {
      const float other_low = exchange(low, bit), other_high = exchange(high, bit);
      low = other_low < low ? other_low : low;
      high = other_high > high ? other_high : high;
    }
    strange = any_lane(strange);
    if (low > high) low = high = 0.f;
    for (int i = first; i < end; i += WARP) factors[i] = terms[i].grad * exp2_fast(low - terms[i].lse);
    if (lane_id() == 0 && block * width < n) blocks[block] = {low, !strange && high - low < SPREAD};
  }
}

}  // namespace sslkern::cuda
