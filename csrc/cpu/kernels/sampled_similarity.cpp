// sampled_similarity on the CPU, for the instruction set SSLKERN_ISA: the scores of each query with rows of a bank that
// it names, in one of two ways.
//   1. Gather: read each named row and multiply, several rows at a time, the next ones on their way into the cache.
//      Costs the bytes of n count rows, wherever they lie.
//   2. Stream: go once through the bank in tiles of all its scores, and pick those that were named. Costs the product
//      of all pairs, at many times the rate.
#include "rows.h"
#include "tiles.h"

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

constexpr int64_t AHEAD = 8;     // rows that are fetched before they are needed
constexpr int64_t WIDTH = 8;     // vectors of a row whose sums stay in registers
constexpr int64_t SUMMED = 256;  // rows of a sum that is added to the total: short sums round less

bool all_within(const int64_t* index, int64_t count, int64_t size) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= uint64_t(index[i]) >= uint64_t(size);
  return outside == 0;
}

// ---- 1. Gather ------------------------------------------------------------------------------------------------------

template <class T>
inline void fetch(const T* row, int64_t d) {
  const int64_t bytes = d * int64_t(sizeof(T)) < 1024 ? d * int64_t(sizeof(T)) : 1024;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + at);
}

template <int ROWS, class T>
inline void dots_of(const float* q, const T* const* rows, int64_t d, float* to) {
  Vec sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = Vec{};
  int64_t c = 0;
  for (; c + LANES <= d; c += LANES) {
    const Vec x = load(q + c);
    for (int r = 0; r < ROWS; ++r) sums[r] += x * widen(rows[r] + c);
  }
  for (int r = 0; r < ROWS; ++r) {
    float rest = 0.f;
    for (int64_t e = c; e < d; ++e) rest += q[e] * to_float(rows[r][e]);
    to[r] = sum(sums[r]) + rest;
  }
}

template <class T>
void gather_fwd(const Similarity& p, int64_t count, const int64_t* index, float* out) {
  constexpr int ROWS = 4;
  constexpr int64_t PART = 1024;  // of the indices of a query, for one thread
  const int64_t parts = (count + PART - 1) / PART, d = p.d;
  const int threads = p.groups * p.n * count * d < 1 << 16 ? 1 : usable_threads(p.threads);
  const Array<float> queries(threads * d);
  parallel(threads, [&](Team& team) {
    float* const q = queries + team.id * d;
    team.each(p.groups * p.n * parts, [&](int64_t task) {
      const int64_t i = task / parts, begin = task % parts * PART, end = begin + PART < count ? begin + PART : count;
      const T* const bank = static_cast<const T*>(p.k) + i / p.n * p.m * d;
      const int64_t* const at = index + i * count;
      for (int64_t c = 0; c < d; ++c) q[c] = to_float(static_cast<const T*>(p.q)[i * d + c]);
      int64_t t = begin;
      for (; t + ROWS <= end; t += ROWS) {
        const T* rows[ROWS];
        for (int r = 0; r < ROWS; ++r) {
          if (t + AHEAD + r < end) fetch(bank + at[t + AHEAD + r] * d, d);
          rows[r] = bank + at[t + r] * d;
        }
        dots_of<ROWS>(q, rows, d, out + i * count + t);
      }
      for (; t < end; ++t) {
        const T* row = bank + at[t] * d;
        dots_of<1>(q, &row, d, out + i * count + t);
      }
    });
  });
}

// dq_i = sum_t g_it bank[index_it]
template <class T>
void gather_bwd(const Similarity& p, int64_t count, const int64_t* index, const float* g, float* dq) {
  const int64_t d = p.d, most = WIDTH * LANES, parts = (d + most - 1) / most;
  const int threads = p.groups * p.n * count * d < 1 << 16 ? 1 : usable_threads(p.threads);
  parallel(threads, [&](Team& team) {
    team.each(p.groups * p.n * parts, [&](int64_t task) {
      const int64_t i = task / parts, first = task % parts * most, width = d - first < most ? d - first : most;
      const T* const bank = static_cast<const T*>(p.k) + i / p.n * p.m * d + first;
      const int64_t* const at = index + i * count;
      const float* const weight = g + i * count;
      float* const to = dq + i * d + first;
      for (int64_t c = 0; c < width; ++c) to[c] = 0.f;
      for (int64_t begin = 0; begin < count; begin += SUMMED) {
        const int64_t end = begin + SUMMED < count ? begin + SUMMED : count;
        if (width == most) {
          Vec sums[WIDTH] = {};
          for (int64_t t = begin; t < end; ++t) {
            if (t + AHEAD < count) fetch(bank + at[t + AHEAD] * d, most);
            const T* const row = bank + at[t] * d;
            const Vec w = all(weight[t]);
#pragma GCC unroll 16
            for (int v = 0; v < WIDTH; ++v) sums[v] += w * widen(row + v * LANES);
          }
          for (int v = 0; v < WIDTH; ++v) store(to + v * LANES, load(to + v * LANES) + sums[v]);
        } else {
          float sums[WIDTH * LANES] = {};
          for (int64_t t = begin; t < end; ++t) {
            if (t + AHEAD < count) fetch(bank + at[t + AHEAD] * d, width);
            const T* const row = bank + at[t] * d;
            for (int64_t c = 0; c < width; ++c) sums[c] += weight[t] * to_float(row[c]);
          }
          for (int64_t c = 0; c < width; ++c) to[c] += sums[c];
        }
      }
    });
  });
}

// ---- 2. Stream ------------------------------------------------------------------------------------------------------

// Some queries and some rows of the bank, whose scores or weights fit in the shared cache.
struct Part {
  int64_t i0, rows, j0, columns;
  float* scores;  // rows of `stride`
  int64_t stride;
};

// Visits the parts of a group in order: before(team, g, part), visit(x, group, g, tile, scores) for its tiles, after.
// SUMS: tiles add to sums of their rows and columns, and so must take turns.
template <bool SUMS, class T, class Arithmetic, class Start, class Before, class Visit, class After>
void stream(const Similarity& p, const Start& start, const Before& before, const Visit& visit, const After& after) {
  constexpr int64_t MOST = 1 << 24, ROWS = 256;  // scores and queries of a part; each part packs the bank anew
  const int64_t most_rows = p.n < ROWS ? p.n : ROWS, fits = MOST / most_rows / BLOCK * BLOCK;
  const int64_t most_columns = p.m < fits ? p.m : fits, stride = round_up(most_columns, 16) + 16;
  const Blocks rows(most_rows, false, SUMS ? most_columns : 0), columns(most_columns, false, SUMS ? most_rows : 0);
  const int64_t row_parts = (p.n + most_rows - 1) / most_rows, column_parts = (p.m + most_columns - 1) / most_columns;
  const Spread spread(p);
  const Array<Scratch> scratch(spread.threads);
  const Array<float> all_scores((spread.by_group ? spread.threads : 1) * most_rows * stride);
  const int64_t turns = p.groups * row_parts * column_parts;
  const Turns row_turns(turns * rows.count), column_turns(turns * columns.count);
  spread.run<Arithmetic>(p.groups, [&](Team& team, int64_t g) {
    const Group<T, Arithmetic> group = group_of<T, Arithmetic>(p, g);
    start(team, g);
    for (int64_t turn = 0; turn < row_parts * column_parts; ++turn) {
      Part part{turn / column_parts * most_rows,
                most_rows,
                turn % column_parts * most_columns,
                most_columns,
                all_scores + (spread.by_group ? team.id : 0) * most_rows * stride,
                stride};
      if (part.i0 + part.rows > p.n) part.rows = p.n - part.i0;
      if (part.j0 + part.columns > p.m) part.columns = p.m - part.j0;
      before(team, g, part);
      const auto within_part = [&](Tile tile) {
        float* const scores = part.scores + tile.i0 * stride + tile.j0;
        if (tile.i0 + tile.rows > part.rows) tile.rows = part.rows - tile.i0;
        if (tile.j0 + tile.columns > part.columns) tile.columns = part.columns - tile.j0;
        tile.i0 += part.i0;
        tile.j0 += part.j0;
        if (tile.rows > 0 && tile.columns > 0) visit(scratch[team.id], group, g, tile, scores, stride);
      };
      const int64_t at = g * row_parts * column_parts + turn;
      if (SUMS) {
        each_tile(team, rows, columns, row_turns.next + at * rows.count, column_turns.next + at * columns.count,
                  within_part);
      } else {
        team.each(rows.count * columns.count, [&](int64_t t) {
          const int64_t a = t % rows.count, b = t / rows.count;
          within_part(Tile{rows.begin(a), rows.width(a), columns.begin(b), columns.width(b)});
        });
      }
      after(team, g, part);
    }
  });
}

template <class T, class Arithmetic>
void stream_fwd(const Similarity& p, int64_t count, const int64_t* index, float* out) {
  stream<false, T, Arithmetic>(
      p, [](Team&, int64_t) {}, [](Team&, int64_t, const Part&) {},
      [&](Scratch& x, const Group<T, Arithmetic>& group, int64_t, const Tile& tile, float* scores, int64_t stride) {
        group.product(tile, x, x.s);
        for (int64_t i = 0; i < tile.rows; ++i) memcpy(scores + i * stride, x.s + i * S_ROW, tile.columns * 4);
      },
      [&](Team& team, int64_t g, const Part& part) {
        team.each(part.rows, [&](int64_t i) {
          const int64_t* const at = index + (g * p.n + part.i0 + i) * count;
          float* const to = out + (g * p.n + part.i0 + i) * count;
          const float* const from = part.scores + i * part.stride;
          if (part.columns == p.m) {
            for (int64_t t = 0; t < count; ++t) to[t] = from[at[t]];
            return;
          }
          for (int64_t t = 0; t < count; ++t) {  // no branch: it vectorises
            const int64_t j = at[t] - part.j0;
            const bool here = uint64_t(j) < uint64_t(part.columns);
            const float score = from[here ? j : 0];
            to[t] = here ? score : to[t];
          }
        });
      });
}

template <class T>
bool all_finite(const T* x, int64_t count) {
  Vec sums = Vec{};  // 0 times what is not finite is NaN
  int64_t c = 0;
  for (; c + LANES <= count; c += LANES) sums += widen(x + c) * 0.f;
  float rest = sum(sums);
  for (; c < count; ++c) rest += to_float(x[c]) * 0.f;
  return rest == 0.f;
}

template <class T, class Arithmetic>
void stream_bwd(const Similarity& p, int64_t count, const int64_t* index, const float* weights, float* dq, float* dk) {
  const int64_t d = p.d;
  stream<true, T, Arithmetic>(
      p,
      [&](Team& team, int64_t g) {
        const auto clear = [&](float* to, int64_t rows) {
          constexpr int64_t AT_ONCE = 512;
          if (to == nullptr) return;
          team.each((rows + AT_ONCE - 1) / AT_ONCE, [&](int64_t t) {
            const int64_t first = t * AT_ONCE, here = rows - first < AT_ONCE ? rows - first : AT_ONCE;
            memset(to + (g * rows + first) * d, 0, here * d * 4);
          });
        };
        clear(dq, p.n);
        clear(dk, p.m);
      },
      [&](Team& team, int64_t g, const Part& part) {
        team.each(part.rows, [&](int64_t i) {
          const int64_t* const at = index + (g * p.n + part.i0 + i) * count;
          const float* const from = weights + (g * p.n + part.i0 + i) * count;
          float* const to = part.scores + i * part.stride;
          memset(to, 0, part.stride * 4);
          for (int64_t t = 0; t < count; ++t) {  // no branch: what is not of this part goes to the padding at the end
            const int64_t j = at[t] - part.j0;
            to[uint64_t(j) < uint64_t(part.columns) ? j : part.stride - 1 - (t & 15)] += from[t];
          }
        });
      },
      [&](Scratch& x, const Group<T, Arithmetic>& group, int64_t g, const Tile& tile, const float* scores,
          int64_t stride) {
        const T *const keys = group.k + tile.j0 * d, *const queries = group.q + tile.i0 * d;
        float* const to_q = dq == nullptr ? nullptr : dq + (g * p.n + tile.i0) * d;
        float* const to_k = dk == nullptr ? nullptr : dk + (g * p.m + tile.j0) * d;
        // A pair that is not named has weight 0, but 0 times infinity is NaN: then only named pairs are multiplied.
        if ((to_q != nullptr && !all_finite(keys, tile.columns * d)) ||
            (to_k != nullptr && !all_finite(queries, tile.rows * d))) {
          for (int64_t i = 0; i < tile.rows; ++i)
            for (int64_t t = (g * p.n + tile.i0 + i) * count, end = t + count; t < end; ++t) {
              const int64_t j = index[t] - tile.j0;
              if (j < 0 || j >= tile.columns) continue;
              const float w = weights[t];
              for (int64_t c = 0; to_q != nullptr && c < d; ++c) to_q[i * d + c] += w * to_float(keys[j * d + c]);
              for (int64_t c = 0; to_k != nullptr && c < d; ++c) to_k[j * d + c] += w * to_float(queries[i * d + c]);
            }
          return;
        }
        for (int64_t i = 0; i < tile.rows; ++i) {
          float* const w = x.s + i * S_ROW;
          memcpy(w, scores + i * stride, tile.columns * 4);
          for (int64_t j = tile.columns; j < round_up(tile.columns, NR); ++j) w[j] = 0.f;
        }
        round_weights<Arithmetic>(tile, x, to_k != nullptr);
        if (to_q != nullptr) add_product<Arithmetic>(tile, x, keys, d, to_q);
        if (to_k != nullptr) add_transposed_product<Arithmetic>(tile, x, queries, d, to_k);
      },
      [](Team&, int64_t, const Part&) {});
}

}  // namespace

bool sampled_similarity_fwd(const Similarity& p, int64_t count, const int64_t* index, bool streams, float* out) {
  if (!all_within(index, p.groups * p.n * count, p.m)) return false;
  with_types(p.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    streams ? stream_fwd<T, decltype(a)>(p, count, index, out) : gather_fwd<T>(p, count, index, out);
  });
  return true;
}

bool sampled_similarity_bwd(const Similarity& p, int64_t count, const int64_t* index, bool streams, const float* g,
                            float* dq, float* dk) {
  if (!all_within(index, p.groups * p.n * count, p.m)) return false;
  with_types(p.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    streams ? stream_bwd<T, decltype(a)>(p, count, index, g, dq, dk) : gather_bwd<T>(p, count, index, g, dq);
  });
  return true;
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
