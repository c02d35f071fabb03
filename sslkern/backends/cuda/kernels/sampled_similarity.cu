// The scores of each query with the rows of a bank that it names, and the gradient of the query, from the rows as they
// lie: nothing is gathered first.
// Floor: the named rows read once. What else is read and written (8 + 4 bytes for each of them, and the queries) is
// little beside them.
#include "rows.h"

namespace sslkern::cuda {

constexpr int ROWS = 4;    // of the bank that a team reads at once
constexpr int SHARE = 64;  // names of a query that a team takes in the forward

__device__ int64_t row_of(const int64_t* index, int64_t at, int64_t m) {
  const int64_t j = index[at];
  require(0 <= j && j < m);
  return j;
}

template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS, 2)
    sampled_forward(Teams teams, int64_t queries, int64_t n, int64_t m, int64_t count, const T* q, const T* bank,
                    const int64_t* index, float* out) {
  constexpr int V = WIDTH<T>, AT_ONCE = WHOLE ? ROWS : ROWS / 2;  // numbers one by one take a register each
  teams.whole = WHOLE;                                            // the compiler leaves the other way out
  const int64_t shares = (count + SHARE - 1) / SHARE;
  const int rounds = teams.rounds();
  each_row(teams, queries * shares, [&](int64_t task, bool here) {
    if (!here) return;  // a team is at most a warp here, and waits for no other
    const int64_t i = task / shares, first = i * count + task % shares * SHARE;
    const int names = int(count - task % shares * SHARE < SHARE ? count - task % shares * SHARE : SHARE);
    const T* const of_group = bank + i / n * m * teams.d;
    Row<T, V> query;
    query.load(teams, q + i * teams.d, 0);
    for (int t = 0; t < names; t += AT_ONCE) {
      const T* named[AT_ONCE];
      float sums[AT_ONCE] = {};
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r)
        named[r] = of_group + row_of(index, first + (t + r < names ? t + r : names - 1), m) * teams.d;
      for (int round = 0; round < rounds; ++round) {
        if (rounds > 1) query.load(teams, q + i * teams.d, round);
        Row<T, V> rows[AT_ONCE];
#pragma unroll
        for (int r = 0; r < AT_ONCE; ++r) rows[r].load(teams, named[r], round);
#pragma unroll
        for (int r = 0; r < AT_ONCE; ++r) sums[r] += dot(query, rows[r]);
      }
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) {
        const float score = teams.sum(sums[r]);
        if (teams.lane() == 0 && t + r < names) out[first + t + r] = score;
      }
    }
  });
}

// sum_t g_it bank[index_it] over a part of the names of query i, in a strip of the columns: the teams of a block take
// rows in turn, and then add their sums in order. to (queries, parts, d).
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS, 2)
    sampled_backward(Teams teams, int64_t queries, int64_t n, int64_t m, int64_t count, int64_t parts, const T* bank,
                     const int64_t* index, const float* g, float* to) {
  constexpr int V = WIDTH<T>, NUMBERS = V * PIECES;
  teams.whole = WHOLE;
  __shared__ float of_team[NUMBERS * THREADS];
  const int strips = teams.rounds(), width = NUMBERS * teams.size;
  for (int64_t task = block_id(); task < queries * parts * strips; task += block_count()) {
    const int strip = int(task % strips);
    const int64_t part = task / strips % parts, i = task / strips / parts;
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    const T* const of_group = bank + i / n * m * teams.d;
    float sums[NUMBERS] = {};
    for (int64_t t = begin + teams.id() * ROWS; t < end; t += teams.count() * ROWS) {
      Row<T, V> rows[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int64_t at = i * count + (t + r < end ? t + r : end - 1);
        rows[r].load(teams, of_group + row_of(index, at, m) * teams.d, strip);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (t + r >= end) continue;
        const float weight = g[i * count + t + r];
#pragma unroll
        for (int c = 0; c < NUMBERS; ++c) sums[c] += weight * rows[r][c];
      }
    }
    sync_block();  // the sums of the last task were read
#pragma unroll
    for (int c = 0; c < NUMBERS; ++c)
      of_team[teams.id() * width + (c / V * teams.size + teams.lane()) * V + c % V] = sums[c];
    sync_block();
    for (int c = thread_id(); c < width && int64_t(strip) * width + c < teams.d; c += THREADS) {
      float total = 0.f;
      for (int team = 0; team < teams.count(); ++team) total += of_team[team * width + c];
      to[(i * parts + part) * teams.d + int64_t(strip) * width + c] = total;
    }
  }
}

__global__ void __launch_bounds__(THREADS, 2)
    add_parts(int64_t queries, int64_t d, int64_t parts, const float* sums, float* dq) {
  for (int64_t at = block_id() * THREADS + thread_id(); at < queries * d; at += block_count() * THREADS) {
    const float* const of_query = sums + at / d * parts * d + at % d;
    float total = 0.f;
    for (int64_t part = 0; part < parts; ++part) total += of_query[part * d];
    dq[at] = total;
  }
}

}  // namespace sslkern::cuda
