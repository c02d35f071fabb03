// Writing a batch of keys into a ring, divided by their norms and cast to its type, in one kernel.
// Floor: the keys read once, their rows of the ring written once.
#include "rows.h"

namespace sslkern::cuda {

// The pointer stays on the device, and is read by all blocks before the last of them moves it. Which one is the last
// they find out by taking tickets, that are counted above bit 40 of the pointer itself: nothing else is to be kept or
// cleared. So at most 2^12 blocks are launched.
constexpr int64_t TICKET = int64_t(1) << 40;

// Of any word, also a wild one: what does not fit wraps around.
__device__ int64_t tickets(int64_t word) { return int64_t(uint64_t(word) + TICKET / 2) >> 40; }
__device__ int64_t pointer_of(int64_t word) { return int64_t(uint64_t(word) << 24) >> 24; }

template <class To, class From>
__global__ void __launch_bounds__(THREADS, 3) push(Teams teams, int64_t size, int64_t dropped, int64_t rows, To* queue,
                                                   int64_t* ptr, const From* keys, bool normalize) {
  constexpr int V = WIDTH<To, From>;
  const int64_t pointer = pointer_of(*static_cast<volatile int64_t*>(ptr));
  const int64_t start = ((pointer % size + size) % size + dropped) % size;  // a wild pointer stays inside the ring
  each_row(teams, rows, [&](int64_t i, bool here) {
    const From* const key = keys + (dropped + i) * teams.d;
    To* const to = queue + (start + i < size ? start + i : start + i - size) * teams.d;
    const int rounds = teams.rounds();
    Row<From, V> from;
    float norm = 1.f;
    if (normalize) {
      float squares = 0.f;
      for (int round = 0; round < rounds; ++round) {
        from.load(teams, key, round);
        squares += dot(from, from);
      }
      norm = length(teams.sum(squares));
    }
    if (!here) return;
    for (int round = 0; round < rounds; ++round) {
      if (!normalize || rounds > 1) from.load(teams, key, round);
      if constexpr (SAME<To, From>) {
        if (normalize) from.divide(norm);
        from.store(teams, to, round);
      } else {
        Row<To, V> unit;
#pragma unroll
        for (int n = 0; n < unit.NUMBERS; ++n) unit.set(n, from[n] / norm);
        unit.store(teams, to, round);
      }
    }
  });
  sync_block();
  if (thread_id() == 0 && tickets(add_to(ptr, TICKET)) == block_count() - 1) *ptr = (start + rows) % size;
}

}  // namespace sslkern::cuda
