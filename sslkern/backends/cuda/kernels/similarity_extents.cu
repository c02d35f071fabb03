// The smallest and the largest id of each EXTENT rows, by which a tile knows whether it must look at its pairs.
#include "similarity.h"

namespace sslkern::cuda {

// q_to [ceil(n / EXTENT), 2] and k_to [ceil(m / EXTENT), 2], by ceil(n / THREADS) + ceil(m / THREADS) blocks.
__global__ void __launch_bounds__(THREADS)
    id_extents(const int64_t* q_ids, const int64_t* k_ids, int64_t* q_to, int64_t* k_to, int64_t n, int64_t m) {
  __shared__ int64_t low[THREADS], high[THREADS];
  const int64_t q_blocks = (n + THREADS - 1) / THREADS;
  const bool of_q = block_id() < q_blocks;
  const int64_t *const ids = of_q ? q_ids : k_ids, count = of_q ? n : m;
  int64_t* const to = of_q ? q_to : k_to;
  const int t = thread_id();
  const int64_t i = (of_q ? block_id() : block_id() - q_blocks) * THREADS + t;
  low[t] = high[t] = ids[i < count ? i : count - 1];
  for (int by = EXTENT / 2; by > 0; by /= 2) {
    sync_block();
    if (t % EXTENT >= by) continue;
    if (low[t + by] < low[t]) low[t] = low[t + by];
    if (high[t + by] > high[t]) high[t] = high[t + by];
  }
  if (t % EXTENT == 0 && i < count) {
    to[i / EXTENT * 2] = low[t];
    to[i / EXTENT * 2 + 1] = high[t];
  }
}

}  // namespace sslkern::cuda
