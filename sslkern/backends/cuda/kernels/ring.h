// Writing rows into a ring, divided by their norms and cast to its type.
#pragma once

#include "rows.h"

namespace sslkern::cuda {

// The row of the ring where the key `dropped` goes, the first that stays, if key 0 would go to `pointer`: a wild one
// stays inside the ring.
__device__ inline int64_t ring_start(int64_t pointer, int64_t size, int64_t dropped) {
  return ((pointer % size + size) % size + dropped) % size;
}

// Keys from `dropped` on, so many rows, into a ring of `size` rows from its row `start` on; the share of one of so many
// blocks.
template <class To, class From>
__device__ void push_rows(const Teams& teams, int64_t block, int64_t blocks, int64_t size, int64_t start,
                          int64_t dropped, int64_t rows, To* queue, const From* keys, bool normalize) {
  constexpr int V = WIDTH<To, From>;
  each_row(teams, block, blocks, rows, [&](int64_t i, bool here) {
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
}

}  // namespace sslkern::cuda
