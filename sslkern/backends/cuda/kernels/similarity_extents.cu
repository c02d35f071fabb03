// The smallest and the largest of each EXTENT ids, by which tiles know that none of their pairs has equal ids.
#include "similarity.h"

namespace sslkern::cuda {

// A warp for each EXTENT of the n ids; extents [ceil(n / EXTENT), 2].
__global__ void __launch_bounds__(THREADS) id_extents(int n, const int64_t* ids, int64_t* extents) {
  const int first = (int(block_id()) * (THREADS / WARP) + thread_id() / WARP) * EXTENT, lane = thread_id() % WARP;
  Extent all{INT64_MAX, INT64_MIN};
  for (int i = first + lane; i < first + EXTENT && i < n; i += WARP)
    all = {ids[i] < all.low ? ids[i] : all.low, ids[i] > all.high ? ids[i] : all.high};
  for (int by = WARP / 2; by > 0; by /= 2) {
    const int64_t low = exchange(all.low, by), high = exchange(all.high, by);
    all = {low < all.low ? low : all.low, high > all.high ? high : all.high};
  }
  if (lane == 0 && first < n) {
    extents[first / EXTENT * 2] = all.low;
    extents[first / EXTENT * 2 + 1] = all.high;
  }
}

}  // namespace sslkern::cuda
