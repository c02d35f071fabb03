// Moving rows of a memory bank towards new features, on the unit sphere.
// Floor: of the rows that are named, the old and the new read once, the old written once.
//
// Of equal indices the last counts. In a small batch each team looks through the later indices itself. In a large one
// two kernels before it leave in last[j], for each row j that is named, the largest i that names it, whatever the order
// in which they run; the rest of `last` is neither read nor written.
#include "rows.h"

namespace sslkern::cuda {

__global__ void __launch_bounds__(THREADS, 3) forget(int64_t size, int64_t batch, const int64_t* index, int64_t* last) {
  for (int64_t i = block_id() * THREADS + thread_id(); i < batch; i += block_count() * THREADS) {
    require(0 <= index[i] && index[i] < size);
    last[index[i]] = -1;
  }
}

__global__ void __launch_bounds__(THREADS, 3) claim(int64_t batch, const int64_t* index, int64_t* last) {
  for (int64_t i = block_id() * THREADS + thread_id(); i < batch; i += block_count() * THREADS)
    raise_to(last + index[i], i);
}

__device__ bool named_later(const Teams& teams, int64_t i, int64_t batch, const int64_t* index) {
  float found = 0.f;
  for (int64_t later = i + 1 + teams.lane(); later < batch; later += teams.size)
    if (index[later] == index[i]) found = 1.f;
  return teams.sum(found) > 0.f;
}

template <class To, class From>
__global__ void __launch_bounds__(THREADS, 3)
    update(Teams teams, int64_t size, int64_t batch, To* bank, const int64_t* index, const From* x, float momentum,
           const int64_t* last) {
  constexpr int V = WIDTH<To, From>;
  each_row(teams, batch, [&](int64_t i, bool here) {
    const int64_t j = index[i];
    require(0 <= j && j < size);
    const bool outdated = last == nullptr ? named_later(teams, i, batch, index) : last[j] != i;
    To* const row = bank + j * teams.d;
    const From* const towards = x + i * teams.d;
    const int rounds = teams.rounds();
    Row<float, V> moved;
    const auto move = [&](int round) {
      Row<To, V> old;
      Row<From, V> fresh;
      old.load(teams, row, round);
      fresh.load(teams, towards, round);
#pragma unroll
      for (int n = 0; n < moved.NUMBERS; ++n) moved.set(n, momentum * old[n] + (1.f - momentum) * fresh[n]);
    };
    float squares = 0.f;
    for (int round = 0; round < rounds; ++round) {
      move(round);
      squares += dot(moved, moved);
    }
    const float norm = length(teams.sum(squares));
    if (outdated || !here) return;
    for (int round = 0; round < rounds; ++round) {
      if (rounds > 1) move(round);
      Row<To, V> unit;
#pragma unroll
      for (int n = 0; n < unit.NUMBERS; ++n) unit.set(n, moved[n] / norm);
      unit.store(teams, row, round);
    }
  });
}

}  // namespace sslkern::cuda
