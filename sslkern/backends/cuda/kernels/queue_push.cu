// Writing a batch of keys into a ring, divided by their norms and cast to its type, in one kernel.
// Floor: the keys read once, their rows of the ring written once.
#include "ring.h"

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
  const int64_t start = ring_start(pointer_of(*static_cast<volatile int64_t*>(ptr)), size, dropped);
  push_rows(teams, block_id(), block_count(), size, start, dropped, rows, queue, keys, normalize);
  sync_block();
  if (thread_id() == 0 && tickets(add_to(ptr, TICKET)) == block_count() - 1) *ptr = (start + rows) % size;
}

}  // namespace sslkern::cuda
