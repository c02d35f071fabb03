// What kernels of the backward of `similarity_lse` read of log-sum-exps and of what arrived for them.
#include "sides.h"

namespace sslkern::cuda {

constexpr float FOLDED = 16384.f;  // 2^14, the largest weight on its way through fp16

// fp16: a power of two by which weights are multiplied until the end, so that those of large batches do not vanish, and
// its inverse. One block; the largest |g| and |h| as if they met.
__global__ void __launch_bounds__(THREADS) sides_fold(int n, const float* row_lse, const float* row_grad, int m,
                                                      const float* lse, const float* grad, float* fold) {
  __shared__ float of_warp[2][THREADS / WARP];
  float largest[2] = {0.f, 0.f};
  for (int i = thread_id(); i < n && row_grad != nullptr; i += THREADS) {
    const float size = fabsf(arrived(row_grad[i], row_lse[i], 1.f));
    if (size < INFINITY) largest[0] = fmaxf(largest[0], size);
  }
  for (int j = thread_id(); j < m && grad != nullptr; j += THREADS) {
    const float size = fabsf(arrived(grad[j], lse[j], 1.f));
    if (size < INFINITY) largest[1] = fmaxf(largest[1], size);
  }
  for (int side = 0; side < 2; ++side) {
    for (int by = WARP / 2; by > 0; by /= 2) largest[side] = fmaxf(largest[side], exchange(largest[side], by, WARP));
    if (thread_id() % WARP == 0) of_warp[side][thread_id() / WARP] = largest[side];
  }
  sync_block();
  if (thread_id() != 0) return;
  for (int side = 0; side < 2; ++side)
    for (int warp = 1; warp < THREADS / WARP; ++warp) of_warp[side][0] = fmaxf(of_warp[side][0], of_warp[side][warp]);
  const float both = fminf(fmaxf(of_warp[0][0] + of_warp[1][0], 0x1p-100f), 0x1p100f);
  fold[0] = FOLDED * exp2f(-floorf(log2f(both)));
  fold[1] = 1.f / fold[0];
}

// Of each tile of `width` columns, a warp each: near [tiles, width + PAST], h_j 2^(m - c_j), and after them m and how
// far apart their log-sum-exps are; and for two exponentials apart [tiles, 3, width], h_j and what is added to
// products for either. bias [m] is in s_ij, or null; lse and grad null: only rows count.
__global__ void __launch_bounds__(THREADS)
    sides_columns(int m, int tiles, int width, const float* lse, const float* grad, const float* bias, bool itself,
                  const float* fold, float* near, float* apart) {
  const int tile = int(block_id()) * (THREADS / WARP) + thread_id() / WARP, lane = thread_id() % WARP;
  if (tile >= tiles) return;
  float low = INFINITY, high = -INFINITY;
  for (int j = tile * width + lane; j < tile * width + width && j < m && lse != nullptr; j += WARP) {
    low = fminf(low, base_2(lse[j]));
    if (lse[j] != -INFINITY) high = fmaxf(high, base_2(lse[j]));
  }
  for (int by = WARP / 2; by > 0; by /= 2) {
    low = fminf(low, exchange(low, by, WARP));
    high = fmaxf(high, exchange(high, by, WARP));
  }
  const float middle = low + (high - low) / 2, shift = fabsf(middle) < INFINITY ? middle : 0.f;
  near += int64_t(tile) * (width + PAST);
  apart += int64_t(tile) * 3 * width;
  if (lane < PAST) near[width + lane] = lane == 0 ? shift : high - low;
  for (int at = lane; at < width; at += WARP) {
    const int j = tile * width + at;
    const bool counts = j < m && lse != nullptr;
    const float c = counts ? base_2(lse[j]) : INFINITY;
    const float h = counts ? arrived(grad[j], lse[j], fold_of(fold)) : 0.f;
    const float b = j < m && bias != nullptr ? LOG2_E * bias[j] : 0.f;
    near[at] = h * exp2f(shift - c);
    apart[at] = h;
    apart[width + at] = b;
    apart[2 * width + at] = (itself ? 0.f : b) - c;
  }
}

}  // namespace sslkern::cuda
