// similarity_lse on the CPU, for the instruction set SSLKERN_ISA. Read top to bottom:
//   1. a tile of s: the product of a block of queries and a block of keys, scaled, with what is left out at -inf;
//   2. what a tile adds to the log-sum-exps (forward), to a softmax-weighted mean of keys (frozen keys), to gradients
//   (backward);
//   3. the order of the tiles, which is the same for any number of threads, so that the bits of the result are too.
// A tile never leaves the cache of its core.
#include "../similarity_lse.h"

#include <atomic>
#include <cmath>
#include <new>

#include "../kernels.h"
#include "../memory.h"
#include "../parallel.h"
#if defined(__AMX_BF16__) || defined(SSLKERN_EMULATE_AMX)
#include "amx.h"
#else
#include "gemm.h"
#endif

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

constexpr int64_t BLOCK = 192;         // most rows and columns of a tile; a multiple of MR, NR
constexpr int64_t DEPTH = 256;         // words of the inner dimension that are packed at a time; a multiple of NR
constexpr int64_t SIDE = 4;            // blocks of a square
constexpr int64_t S_ROW = BLOCK + 16;  // rows are kept off powers of two, which share cache sets
constexpr int64_t A_ROW = DEPTH + 16;
constexpr float TINY_SUM = 0x1p-64f;  // a sum below has lost terms to underflow that its own shift would keep
constexpr float MAX_SPREAD = 80.f;    // e^(80 / 2) times e^-(80 / 2): both within fp32

struct Tile {
  int64_t i0, rows, j0, columns;
};

// What one thread needs for one tile, about 0.9 MB.
struct Scratch {
  alignas(64) float s[BLOCK * S_ROW];  // s, then e^s or the weights W of the backward
  alignas(64) Word a[BLOCK * A_ROW], b[BLOCK * DEPTH];
  alignas(64) Word w[BLOCK * S_ROW / 2],
      wt[BLOCK / 2 * S_ROW];  // W as bf16, in pairs along its rows and along its columns
  float dot[BLOCK * S_ROW];   // q k^T, where the gradient of the scale needs it
  int32_t row_id[BLOCK], column_id[BLOCK];
  float row_max[BLOCK], row_shift[BLOCK], row_factor[BLOCK], row_sum[BLOCK];
  float column_max[BLOCK], column_shift[BLOCK], column_factor[BLOCK], column_sum[BLOCK];
};

inline bool finite(float x) { return x - x == 0; }

// ---- 1. A tile of s -------------------------------------------------------------------------------------------------

// One group of the problem, with its types.
template <class T, class Arithmetic>
struct Group {
  int64_t n, m, d;
  const T *q, *k;
  bool without_self;  // q is k: pair (i, i) is left out
  float scale;
  const int64_t *q_ids, *k_ids;
  bool same;
  const float *k_bias, *q_limit;
  float* kept;

  // False where ids leave nothing of the tile. Ids that cannot meet in the tile are not compared.
  bool prepare_ids(const Tile& tile, Scratch& x, bool& compare) const {
    compare = false;
    if (q_ids == nullptr) return true;
    const int64_t *row = q_ids + tile.i0, *column = k_ids + tile.j0;
    int64_t row_low = row[0], row_high = row[0], column_low = column[0], column_high = column[0];
    for (int64_t i = 0; i < tile.rows; ++i) {
      row_low = row[i] < row_low ? row[i] : row_low;
      row_high = row[i] > row_high ? row[i] : row_high;
    }
    for (int64_t j = 0; j < tile.columns; ++j) {
      column_low = column[j] < column_low ? column[j] : column_low;
      column_high = column[j] > column_high ? column[j] : column_high;
    }
    if (row_high < column_low || column_high < row_low) return !same;
    // In the tile 32 bits tell the ids apart: an offset from the lowest where that fits, else the place of the first
    // equal id.
    compare = true;
    const int64_t low = row_low < column_low ? row_low : column_low,
                  high = row_high > column_high ? row_high : column_high;
    if (uint64_t(high) - uint64_t(low) < (uint64_t(1) << 31)) {
      for (int64_t i = 0; i < tile.rows; ++i) x.row_id[i] = int32_t(uint64_t(row[i]) - uint64_t(low));
      for (int64_t j = 0; j < tile.columns; ++j) x.column_id[j] = int32_t(uint64_t(column[j]) - uint64_t(low));
    } else {
      for (int64_t j = 0; j < tile.columns; ++j) {
        int64_t first = 0;
        while (column[first] != column[j]) ++first;
        x.column_id[j] = int32_t(first);
      }
      for (int64_t i = 0; i < tile.rows; ++i) {
        int64_t first = 0;
        while (first < tile.columns && column[first] != row[i]) ++first;
        x.row_id[i] = first < tile.columns ? int32_t(first) : -1;
      }
    }
    return true;
  }

  // to = q k^T of the tile, rows S_ROW apart, with zeros up to a whole vector.
  void product(const Tile& tile, Scratch& x, float* to) const {
    int64_t first = 0;
    do {
      const int64_t count = d - first < DEPTH * Arithmetic::PER_WORD ? d - first : DEPTH * Arithmetic::PER_WORD;
      const int64_t deep = words<Arithmetic>(count);
      const bool in_place = d % 512 != 0 && tile.rows % Arithmetic::ROWS == 0;
      int64_t row;
      const Word* a = as_words<Arithmetic>(k + tile.j0 * d + first, d, tile.columns, count, true, x.a, row);
      pack_transposed(a, row, tile.columns, deep, x.b);
      a = as_words<Arithmetic>(q + tile.i0 * d + first, d, tile.rows, count, in_place, x.a, row);
      gemm<Arithmetic>(a, row, 1, x.b, tile.rows, round_up(tile.columns, NR), deep, to, S_ROW, first > 0);
      first += count;
    } while (first < d);
  }

  // x.s = s of the tile, -inf for pairs that are left out and in columns up to a whole vector. False where nothing is
  // kept. Forward and backward both come here, so they leave out the same pairs. The forward leaves the dot products in
  // `kept`, where there is one, and the backward takes them from it; `need_dot` leaves them in x.dot.
  bool similarities(const Tile& tile, Scratch& x, bool is_backward = false, bool need_dot = false) const {
    bool compare;
    if (!prepare_ids(tile, x, compare)) return false;
    float* const dots = need_dot ? x.dot : x.s;
    const auto kept_row = [&](int64_t i) { return kept + (tile.i0 + i) * m + tile.j0; };
    if (kept == nullptr || !is_backward) product(tile, x, dots);
    for (int64_t i = 0; kept != nullptr && i < tile.rows; ++i) {
      float* const row = dots + i * S_ROW;
      if (is_backward) {
        copy_words(kept_row(i), tile.columns, reinterpret_cast<Word*>(row));
        for (int64_t j = tile.columns; j < round_up(tile.columns, LANES); ++j) row[j] = 0.f;
      } else {
        copy_words(row, tile.columns, reinterpret_cast<Word*>(kept_row(i)));
      }
    }

    const int64_t wide = round_up(tile.columns, LANES);
    alignas(64) float bias[BLOCK];
    if (k_bias != nullptr)
      for (int64_t j = 0; j < wide; ++j) bias[j] = j < tile.columns ? k_bias[tile.j0 + j] : 0.f;
    const bool on_diagonal = without_self && tile.i0 < tile.j0 + tile.columns && tile.j0 < tile.i0 + tile.rows;
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* s = x.s + i * S_ROW;
      const float* dot = dots + i * S_ROW;
      if (k_bias != nullptr)
        for (int64_t j = 0; j < wide; j += LANES) store(s + j, load(dot + j) * scale + load(bias + j));
      else
        for (int64_t j = 0; j < wide; j += LANES) store(s + j, load(dot + j) * scale);
      if (compare) {
        const IVec id = all(x.row_id[i]);
        for (int64_t j = 0; j < wide; j += LANES) {
          const IVec equal = load_int(x.column_id + j) == id;
          store(s + j, (same ? ~equal : equal) ? all(-INF) : load(s + j));
        }
      }
      if (q_limit != nullptr) {
        const Vec limit = all(q_limit[tile.i0 + i]);
        for (int64_t j = 0; j < wide; j += LANES) store(s + j, load(s + j) > limit ? all(-INF) : load(s + j));
      }
      if (on_diagonal) {
        const int64_t j = tile.i0 + i - tile.j0;
        if (j >= 0 && j < tile.columns) s[j] = -INF;
      }
      for (int64_t j = tile.columns; j < wide; ++j) s[j] = -INF;
    }
    return true;
  }
};

// ---- 2a. Forward: log-sum-exps --------------------------------------------------------------------------------------

// Running log-sum-exps: sum_j e^{s_j} = e^shift * sum. best, where it is asked for, is the largest s.
struct Running {
  float *shift, *sum, *best;

  void clear(int64_t first, int64_t count) const {
    for (int64_t i = first; i < first + count; ++i) {
      shift[i] = -INF;
      sum[i] = 0.f;
      if (best != nullptr) best[i] = -INF;
    }
  }

  // Adds the sums of a tile, taken at its own shifts; a sum of 0 adds nothing, whatever its shift.
  void add(int64_t first, int64_t count, const float* tile_shift, const float* tile_sum) const {
    for (int64_t i = 0; i < count; i += LANES) {
      const int64_t bytes = (count - i < LANES ? count - i : LANES) * 4;
      float lanes[4][LANES] = {};
      memcpy(lanes[0], shift + first + i, bytes);
      memcpy(lanes[1], sum + first + i, bytes);
      memcpy(lanes[2], tile_shift + i, bytes);
      memcpy(lanes[3], tile_sum + i, bytes);
      const Vec old_shift = load(lanes[0]), old_sum = load(lanes[1]), more = load(lanes[3]);
      const Vec more_shift = more == Vec{} ? all(-INF) : load(lanes[2]);
      const Vec new_shift = max(old_shift, more_shift);
      const Vec base = new_shift == all(-INF) ? Vec{} : new_shift;
      store(lanes[0], new_shift);
      store(lanes[1], old_sum * exp(old_shift - base) + more * exp(more_shift - base));
      memcpy(shift + first + i, lanes[0], bytes);
      memcpy(sum + first + i, lanes[1], bytes);
    }
  }

  void add_best(int64_t first, int64_t count, const float* tile_best) const {
    if (best == nullptr) return;
    for (int64_t i = 0; i < count; ++i)
      best[first + i] = tile_best[i] > best[first + i] ? tile_best[i] : best[first + i];
  }

  // shift becomes the log-sum-exp.
  void finish(int64_t first, int64_t count) const {
    for (int64_t i = first; i < first + count; ++i) shift[i] += logf(sum[i]);
  }
};

// The maximum of each row, and the shift that goes with it: 0 where the maximum is no finite number.
inline void row_shifts(const Tile& tile, Scratch& x) {
  const int64_t wide = round_up(tile.columns, LANES);
  for (int64_t i = 0; i < tile.rows; ++i) {
    Vec most = all(-INF);
    for (int64_t j = 0; j < wide; j += LANES) most = max(load(x.s + i * S_ROW + j), most);  // a NaN is not carried on:
    x.row_max[i] = max(most);                                                               // the sum will carry it
    x.row_shift[i] = finite(x.row_max[i]) ? x.row_max[i] : 0.f;
  }
}

inline void column_maxima(const Tile& tile, Scratch& x) {
  for (int64_t j = 0; j < tile.columns; j += LANES) {
    Vec most = all(-INF);
    for (int64_t i = 0; i < tile.rows; ++i) most = max(load(x.s + i * S_ROW + j), most);
    store(x.column_max + j, most);
  }
}

// Sums of e^(s - row_shift) over ROWS rows; with COLUMNS each exponential also serves its column, times the row's
// factor.
template <int ROWS, bool COLUMNS>
inline void sum_rows(int64_t i, int64_t wide, Scratch& x) {
  Vec shift[ROWS], total[ROWS], factor[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    shift[r] = all(x.row_shift[i + r]);
    factor[r] = all(x.row_factor[i + r]);
    total[r] = Vec{};
  }
  for (int64_t j = 0; j < wide; j += LANES) {
    Vec column = COLUMNS ? load(x.column_sum + j) : Vec{};
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec e = exp(load(x.s + (i + r) * S_ROW + j) - shift[r]);
      total[r] += e;
      if (COLUMNS) column += e * factor[r];
    }
    if (COLUMNS) store(x.column_sum + j, column);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) x.row_sum[i + r] = sum(total[r]);
}

template <bool COLUMNS>
void sum_tile(const Tile& tile, Scratch& x) {
  const int64_t wide = round_up(tile.columns, LANES);
  int64_t i = 0;
  for (; i + 4 <= tile.rows; i += 4) sum_rows<4, COLUMNS>(i, wide, x);
  for (; i < tile.rows; ++i) sum_rows<1, COLUMNS>(i, wide, x);
}

// Adds the tile in x.s to its rows and, where there are any, its columns: one exponential per pair serves both, at the
// shift of the row. A column whose sum comes out tiny, because its values lie far below those of its rows, is redone at
// its own.
void add_tile(const Tile& tile, Scratch& x, const Running& rows, const Running* columns) {
  row_shifts(tile, x);
  if (columns == nullptr) {
    sum_tile<false>(tile, x);
  } else {
    const int64_t wide = round_up(tile.columns, LANES);
    float highest = -INF;
    for (int64_t i = 0; i < tile.rows; ++i)
      if (finite(x.row_max[i]) && x.row_max[i] > highest) highest = x.row_max[i];
    if (highest == -INF) highest = 0.f;
    for (int64_t i = 0; i < tile.rows; i += LANES) store(x.row_factor + i, exp(load(x.row_shift + i) - highest));
    for (int64_t i = 0; i < tile.rows; ++i)
      if (x.row_max[i] == -INF) x.row_factor[i] = 0.f;
    for (int64_t j = 0; j < wide; ++j) x.column_sum[j] = 0.f, x.column_shift[j] = highest;
    sum_tile<true>(tile, x);
    bool lost = false;
    for (int64_t j = 0; j < tile.columns; ++j) lost |= x.column_sum[j] < TINY_SUM;
    if (lost || columns->best != nullptr) column_maxima(tile, x);
    if (lost) {
      for (int64_t j = 0; j < wide; j += LANES) {
        const Vec most = load(x.column_max + j), shift = most - most == Vec{} ? most : Vec{};
        Vec total = Vec{};
        for (int64_t i = 0; i < tile.rows; ++i) total += exp(load(x.s + i * S_ROW + j) - shift);
        store(x.column_shift + j, shift);
        store(x.column_sum + j, total);
      }
    }
    columns->add(tile.j0, tile.columns, x.column_shift, x.column_sum);
    columns->add_best(tile.j0, tile.columns, x.column_max);
  }
  rows.add(tile.i0, tile.rows, x.row_shift, x.row_sum);
  rows.add_best(tile.i0, tile.rows, x.row_max);
}

// ---- 2b. The product of a tile of weights, forward and backward -----------------------------------------------------

// x.s as bf16 in x.w (pairs along the row) and, for the transposed product, x.wt (pairs along the column): in rows of
// W^T for tiles, else in rows of pairs. Zeros fill both up to whole steps.
template <class Arithmetic>
void round_weights([[maybe_unused]] const Tile& tile, [[maybe_unused]] Scratch& x, [[maybe_unused]] bool transposed) {
#ifdef __AVX512BF16__
  if constexpr (Arithmetic::PER_WORD == 2) {
    constexpr bool TILES = Arithmetic::STEP == LANES;
    const int64_t tall = 2 * words<Arithmetic>(tile.rows);
    const int64_t filled = round_up(tile.columns, LANES), wide = round_up(2 * words<Arithmetic>(tile.columns), LANES);
    for (int64_t i = 0; i < tile.rows && filled < wide; ++i) memset(x.s + i * S_ROW + filled, 0, (wide - filled) * 4);
    for (int64_t i = tile.rows; i < tall; ++i) memset(x.s + i * S_ROW, 0, wide * 4);
    Word* const pairs = TILES ? x.a : x.wt;
    for (int64_t i = 0; i < tall; i += 2)
      for (int64_t j = 0; j < wide; j += LANES) {
        const __m256i upper = (__m256i)_mm512_cvtneps_pbh((__m512)load(x.s + i * S_ROW + j));
        const __m256i lower = (__m256i)_mm512_cvtneps_pbh((__m512)load(x.s + (i + 1) * S_ROW + j));
        _mm256_storeu_si256((__m256i*)(x.w + (i * S_ROW + j) / 2), upper);
        _mm256_storeu_si256((__m256i*)(x.w + ((i + 1) * S_ROW + j) / 2), lower);
        if (transposed)
          _mm512_storeu_si512(
              pairs + i / 2 * S_ROW + j,
              _mm512_or_si512(_mm512_cvtepu16_epi32(upper), _mm512_slli_epi32(_mm512_cvtepu16_epi32(lower), 16)));
      }
    if (TILES && transposed)
      for (int64_t i = 0; i < tall / 2; i += LANES)
        for (int64_t j = 0; j < wide; j += LANES)
          transpose_square(pairs + i * S_ROW + j, S_ROW, x.wt + j * (S_ROW / 2) + i, S_ROW / 2);
  }
#endif
}

// to[row] += W from (tile.columns, d); W is the tile in x.s, weights of the rows of `from` for each row of `to`.
template <class Arithmetic, class T>
void add_product(const Tile& tile, Scratch& x, const T* from, int64_t d, float* to) {
  const bool pairs = Arithmetic::PER_WORD == 2;
  const Word* w = pairs ? x.w : reinterpret_cast<const Word*>(x.s);
  for (int64_t at = 0; at < d; at += DEPTH) {
    const int64_t count = d - at < DEPTH ? d - at : DEPTH;
    pack_panels<Arithmetic>(from + at, d, tile.columns, count, x.b);
    gemm<Arithmetic>(w, pairs ? S_ROW / 2 : S_ROW, 1, x.b, tile.rows, count, words<Arithmetic>(tile.columns), to + at,
                     d, true);
  }
}

// to[column] += W^T from (tile.rows, d).
template <class Arithmetic, class T>
void add_transposed_product(const Tile& tile, Scratch& x, const T* from, int64_t d, float* to) {
  const Word* w = Arithmetic::PER_WORD == 2 ? x.wt : reinterpret_cast<const Word*>(x.s);
  const int64_t row = Arithmetic::STEP > 1 ? S_ROW / 2 : 1, step = Arithmetic::STEP > 1 ? 1 : S_ROW;
  for (int64_t at = 0; at < d; at += DEPTH) {
    const int64_t count = d - at < DEPTH ? d - at : DEPTH;
    pack_panels<Arithmetic>(from + at, d, tile.rows, count, x.b);
    gemm<Arithmetic>(w, row, step, x.b, tile.columns, count, words<Arithmetic>(tile.rows), to + at, d, true);
  }
}

// ---- 2c. Frozen keys: the softmax-weighted mean of the keys beside the log-sum-exp ----------------------------------

// Adds the tile in x.s to the sums of its rows and e^s k to `weighted` (n, d), which is kept at the same shift.
template <class Arithmetic, class T>
void add_tile_frozen(const Tile& tile, Scratch& x, const Running& rows, const T* keys, int64_t d, float* weighted) {
  const int64_t wide = round_up(tile.columns, LANES);
  row_shifts(tile, x);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const float old_shift = rows.shift[tile.i0 + i];
    if (x.row_max[i] == -INF || x.row_shift[i] < old_shift) x.row_shift[i] = finite(old_shift) ? old_shift : 0.f;
    if (old_shift == x.row_shift[i] || old_shift == -INF) continue;
    const float shrink = expf(old_shift - x.row_shift[i]);
    float* row = weighted + (tile.i0 + i) * d;
    for (int64_t c = 0; c < d; ++c) row[c] *= shrink;
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    float* s = x.s + i * S_ROW;
    const Vec shift = all(x.row_shift[i]);
    Vec total = Vec{};
    for (int64_t j = 0; j < wide; j += LANES) {
      const Vec e = exp(load(s + j) - shift);
      total += e;
      store(s + j, e);
    }
    x.row_sum[i] = sum(total);
  }
  round_weights<Arithmetic>(tile, x, false);
  add_product<Arithmetic>(tile, x, keys + tile.j0 * d, d, weighted + tile.i0 * d);
  rows.add(tile.i0, tile.rows, x.row_shift, x.row_sum);
  rows.add_best(tile.i0, tile.rows, x.row_max);
}

// ---- 2d. Backward ---------------------------------------------------------------------------------------------------

// Log-sum-exps of the rows or columns of the whole problem and their gradients; null where a side has none.
struct Upstream {
  const float *value, *gradient;
};

// A side's part in W: gradient * e^(s - value), as factor * e^(s - shift). What has nothing left takes no part.
inline void factors(const Upstream& side, int64_t first, int64_t count, float* shift, float* factor, float& low,
                    float& high) {
  for (int64_t i = 0; i < round_up(count, LANES); ++i) {
    const bool empty = i >= count || side.value[first + i] == -INF;
    shift[i] = empty ? 0.f : side.value[first + i];
    factor[i] = empty ? 0.f : side.gradient[first + i];
    if (empty) continue;
    if (!(shift[i] >= low)) low = shift[i];  // a NaN goes into both, and then the spread is one
    if (!(shift[i] <= high)) high = shift[i];
  }
}

// x.s = W of the tile, W_ij = g_i e^(s_ij - row_i) + h_j e^(s_ij - col_j).
void weigh_tile(const Tile& tile, Scratch& x, const Upstream& rows, const Upstream& columns) {
  const int64_t wide = round_up(tile.columns, LANES);
  float low = INF, high = -INF;
  if (rows.value != nullptr) factors(rows, tile.i0, tile.rows, x.row_shift, x.row_factor, low, high);
  if (columns.value != nullptr) factors(columns, tile.j0, tile.columns, x.column_shift, x.column_factor, low, high);
  const auto each = [&](const auto& weight) {
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t j = 0; j < wide; j += LANES) {
        float* s = x.s + i * S_ROW + j;
        store(s, weight(load(s), i, j));
      }
  };
  if (columns.value == nullptr) {
    each([&](Vec s, int64_t i, int64_t) { return exp(s - x.row_shift[i]) * x.row_factor[i]; });
  } else if (rows.value == nullptr) {
    each([&](Vec s, int64_t, int64_t j) { return exp(s - load(x.column_shift + j)) * load(x.column_factor + j); });
  } else if (high - low < MAX_SPREAD) {  // one exponential, at a shift in the middle
    const float middle = low < high ? low + (high - low) / 2 : low == high ? low : 0.f;  // 0 where all sides are empty
    for (int64_t i = 0; i < tile.rows; i += LANES)
      store(x.row_factor + i, load(x.row_factor + i) * exp(middle - load(x.row_shift + i)));
    for (int64_t j = 0; j < wide; j += LANES)
      store(x.column_factor + j, load(x.column_factor + j) * exp(middle - load(x.column_shift + j)));
    each([&](Vec s, int64_t i, int64_t j) { return exp(s - middle) * (load(x.column_factor + j) + x.row_factor[i]); });
  } else {
    each([&](Vec s, int64_t i, int64_t j) {
      return exp(s - x.row_shift[i]) * x.row_factor[i] + exp(s - load(x.column_shift + j)) * load(x.column_factor + j);
    });
  }
}

// sum_ij W_ij <q_i, k_j>: what the tile adds to the gradient of the scale.
double weighted_dots(const Tile& tile, const Scratch& x) {
  double total = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    Vec row = Vec{};
    for (int64_t j = 0; j < tile.columns; j += LANES) row += load(x.s + i * S_ROW + j) * load(x.dot + i * S_ROW + j);
    total += sum(row);
  }
  return total;
}

// ---- 3. The order of the tiles --------------------------------------------------------------------------------------

struct Blocks {
  int64_t length, size, count;
  // Some blocks even of short inputs, so that threads can share them.
  explicit Blocks(int64_t length) : length(length) {
    int64_t wanted = (length + BLOCK - 1) / BLOCK;
    const int64_t shared = length < 96 ? 1 : length < 768 ? 3 : 5;
    if (wanted < shared) wanted = shared;
    size = (length + wanted - 1) / wanted;
    if (size > 1) size = round_up(size, size > 64 ? NR : 4);  // whole panels, where that wastes little
    if (size > BLOCK) size = BLOCK;
    count = size == 0 ? 0 : (length + size - 1) / size;
  }
  int64_t begin(int64_t b) const { return b * size; }
  int64_t width(int64_t b) const { return b + 1 < count ? size : length - b * size; }
};

// For each block, the number of the first turn that it has not had yet.
struct Turns {
  Array<std::atomic<int64_t>> next;
  explicit Turns(int64_t blocks) : next(blocks) {
    for (int64_t b = 0; b < blocks; ++b) new (next + b) std::atomic<int64_t>(0);
  }
};

// Visits every tile of row and column blocks once, or, where both are the same, every pair (x, y) with x <= y. Threads
// share no block at a time, and each block meets the others in one order, so that sums over tiles have the same bits
// for any number of threads: the blocks are numbered in squares of SIDE, and x meets y in the turn x + y, where squares
// and places within a square are added apart, each around its circle. That is a tournament in which two squares finish
// with each other before they go on, while their rows are still in the shared cache.
template <class Visit>
void each_tile(Team& team, const Blocks& rows, const Blocks& columns, std::atomic<int64_t>* row_turns,
               std::atomic<int64_t>* column_turns, const Visit& visit) {
  const bool pairs = row_turns == column_turns;
  const int64_t longest = rows.count > columns.count ? rows.count : columns.count;
  const int64_t side = longest < 12 ? 1 : SIDE, squares = (longest + side - 1) / side;
  int64_t together = (2 * team.size + side - 1) / side;  // squares at work at once: one tile and the next per thread
  if (together > squares) together = squares;
  const int64_t parts = (squares + together - 1) / together;

  const auto partner = [&](int64_t turn, int64_t x) {
    return (turn / side - x / side + squares) % squares * side + (turn % side - x % side + side) % side;
  };
  // The number of the turn after the last one before `turn` in which x met one of `others`.
  const auto after_last = [&](int64_t turn, int64_t x, int64_t others) {
    while (turn > 0 && partner(turn - 1, x) >= others) --turn;
    return turn;
  };
  team.each(squares * parts * side * together * side, [&](int64_t t) {
    const int64_t place = t % side, square = t / side % together, step = t / (side * together) % side;
    const int64_t part = t / (side * together * side) % parts, round = t / (side * together * side * parts);
    const int64_t x = (part * together + square) * side + (place + step) % side;  // what rests longest comes first
    const int64_t turn = round * side + step, y = partner(turn, x);
    if (part * together + square >= squares || x >= rows.count || y >= columns.count || (pairs && y < x)) return;
    wait_for(row_turns[x], after_last(turn, x, columns.count));
    wait_for(column_turns[y], after_last(turn, y, rows.count));
    visit(Tile{rows.begin(x), rows.width(x), columns.begin(y), columns.width(y)});
    row_turns[x].store(turn + 1, std::memory_order_release);
    column_turns[y].store(turn + 1, std::memory_order_release);
  });
}

// Visits the tiles of a row block in order, and in `splits` separate runs where there are few row blocks.
struct Runs {
  int64_t splits, per_split;
  Runs(const Blocks& rows, const Blocks& columns) {
    splits = rows.count == 0 ? 1 : 32 / rows.count;
    if (splits > columns.count / 4) splits = columns.count / 4;
    if (splits < 1) splits = 1;
    per_split = (columns.count + splits - 1) / splits;
  }
};
template <class Visit>
void each_run(Team& team, const Blocks& rows, const Blocks& columns, const Runs& runs, const Visit& visit) {
  team.each(rows.count * runs.splits, [&](int64_t task) {
    const int64_t a = task % rows.count, split = task / rows.count;
    for (int64_t b = split * runs.per_split; b < columns.count && b < (split + 1) * runs.per_split; ++b)
      visit(split, Tile{rows.begin(a), rows.width(a), columns.begin(b), columns.width(b)});
  });
}

// How a problem is spread over threads: whole groups where there are many, else the tiles of one group after the other.
struct Spread {
  int threads;
  bool by_group;
  explicit Spread(const SimilarityLse& p) {
    const double work = 2. * double(p.n) * double(p.m) * double(p.d + 16);  // of a group
    threads = usable_threads(p.threads);
    by_group = p.groups > 1 && (p.groups >= 2 * threads || work < 4e6);
    const double useful =
        (by_group ? work * double(p.groups) : work) / 1e6;  // a thread is worth starting for 10 us of work
    if (useful < threads) threads = useful < 1 ? 1 : int(useful);
  }
  template <class Arithmetic, class Body>
  void run(int64_t groups, const Body& body) const {
    parallel(threads, [&](Team& team) {
      [[maybe_unused]] typename Arithmetic::OnThread on_thread;
      if (by_group)
        team.each(groups, [&](int64_t g) {
          Team alone = Team::alone(team.id);
          body(alone, g);
        });
      else
        for (int64_t g = 0; g < groups; ++g) body(team, g);
    });
  }
};

template <class T, class Arithmetic>
Group<T, Arithmetic> group_of(const SimilarityLse& p, int64_t g) {
  const T* q = static_cast<const T*>(p.q) + g * p.n * p.d;
  const auto at = [g](const auto* array, int64_t length) { return array == nullptr ? nullptr : array + g * length; };
  return {p.n,
          p.m,
          p.d,
          q,
          p.k == nullptr ? q : static_cast<const T*>(p.k) + g * p.m * p.d,
          p.k == nullptr,
          p.scale,
          at(p.q_ids, p.n),
          p.k == nullptr ? at(p.q_ids, p.n) : at(p.k_ids, p.m),
          p.same,
          at(p.k_bias, p.m),
          at(p.q_limit, p.n),
          p.kept == nullptr ? nullptr : p.kept + g * p.n * p.m};
}

// s_ij = s_ji, and left out alike: half of the tiles do.
inline bool symmetric(const SimilarityLse& p) { return p.k == nullptr && p.k_bias == nullptr && p.q_limit == nullptr; }

template <class T, class Arithmetic>
void forward(const SimilarityLse& p, float* row, float* col, float* best) {
  const bool triangle = symmetric(p);
  const Blocks rows(p.n), columns(p.m);
  const Runs runs(rows, columns);
  const Turns row_turns(triangle || col != nullptr ? p.groups * rows.count : 0);
  const Turns column_turns(!triangle && col != nullptr ? p.groups * columns.count : 0);
  const int64_t splits = triangle || col != nullptr ? 1 : runs.splits;
  const Spread spread(p);
  const Array<Scratch> scratch(spread.threads);
  const int64_t best_row = p.n + (col != nullptr ? p.m : 0);
  const Array<float> row_sum(p.groups * p.n), col_sum(col != nullptr ? p.groups * p.m : 0);
  const Array<float> parts(splits > 1 ? 3 * p.groups * splits * p.n : 0);

  spread.run<Arithmetic>(p.groups, [&](Team& team, int64_t g) {
    const Group<T, Arithmetic> group = group_of<T, Arithmetic>(p, g);
    const Running by_row{row + g * p.n, row_sum + g * p.n, best == nullptr ? nullptr : best + g * best_row};
    const auto part = [&](int64_t split) {
      float* at = parts + (g * splits + split) * 3 * p.n;
      return Running{at, at + p.n, best == nullptr ? nullptr : at + 2 * p.n};
    };
    team.each(rows.count, [&](int64_t b) {
      by_row.clear(rows.begin(b), rows.width(b));
      for (int64_t split = 0; splits > 1 && split < splits; ++split) part(split).clear(rows.begin(b), rows.width(b));
    });
    std::atomic<int64_t>* const turns = row_turns.next + g * rows.count;
    if (triangle) {
      each_tile(team, rows, rows, turns, turns, [&](const Tile& tile) {
        Scratch& x = scratch[team.id];
        if (group.similarities(tile, x)) add_tile(tile, x, by_row, tile.i0 == tile.j0 ? nullptr : &by_row);
      });
    } else if (col != nullptr) {
      const Running by_column{col + g * p.m, col_sum + g * p.m, best == nullptr ? nullptr : by_row.best + p.n};
      team.each(columns.count, [&](int64_t b) { by_column.clear(columns.begin(b), columns.width(b)); });
      each_tile(team, rows, columns, turns, column_turns.next + g * columns.count, [&](const Tile& tile) {
        Scratch& x = scratch[team.id];
        if (group.similarities(tile, x)) add_tile(tile, x, by_row, &by_column);
      });
      team.each(columns.count, [&](int64_t b) { by_column.finish(columns.begin(b), columns.width(b)); });
    } else {
      each_run(team, rows, columns, runs, [&](int64_t split, const Tile& tile) {
        Scratch& x = scratch[team.id];
        if (group.similarities(tile, x)) add_tile(tile, x, splits > 1 ? part(split) : by_row, nullptr);
      });
    }
    team.each(rows.count, [&](int64_t b) {
      const int64_t first = rows.begin(b), count = rows.width(b);
      for (int64_t split = 0; splits > 1 && split < splits; ++split) {
        by_row.add(first, count, part(split).shift + first, part(split).sum + first);
        if (best != nullptr) by_row.add_best(first, count, part(split).best + first);
      }
      by_row.finish(first, count);
    });
  });
}

template <class T, class Arithmetic>
void frozen_forward(const SimilarityLse& p, float* row, float* mean, float* best) {
  const Blocks rows(p.n), columns(p.m);
  const Runs runs(rows, columns);
  const Spread spread(p);
  const Array<Scratch> scratch(spread.threads);
  const int64_t states = p.groups * runs.splits * p.n;
  const Array<float> shift(states), sums(states), bests(best == nullptr ? 0 : states);
  const Array<float> more(p.groups * (runs.splits - 1) * p.n * p.d);  // `mean` itself serves the first run

  spread.run<Arithmetic>(p.groups, [&](Team& team, int64_t g) {
    const Group<T, Arithmetic> group = group_of<T, Arithmetic>(p, g);
    const auto part = [&](int64_t split) {
      const int64_t at = (g * runs.splits + split) * p.n;
      return Running{shift + at, sums + at, best == nullptr ? nullptr : bests + at};
    };
    const auto weighted = [&](int64_t split) {
      return split == 0 ? mean + g * p.n * p.d : more + (g * (runs.splits - 1) + split - 1) * p.n * p.d;
    };
    team.each(rows.count * runs.splits, [&](int64_t task) {
      const int64_t a = task % rows.count, split = task / rows.count;
      part(split).clear(rows.begin(a), rows.width(a));
      memset(weighted(split) + rows.begin(a) * p.d, 0, rows.width(a) * p.d * 4);
    });
    each_run(team, rows, columns, runs, [&](int64_t split, const Tile& tile) {
      Scratch& x = scratch[team.id];
      if (group.similarities(tile, x)) add_tile_frozen<Arithmetic>(tile, x, part(split), group.k, p.d, weighted(split));
    });
    team.each(rows.count, [&](int64_t b) {
      for (int64_t i = rows.begin(b); i < rows.begin(b) + rows.width(b); ++i) {
        float most = -INF, total = 0.f, highest = -INF;
        for (int64_t split = 0; split < runs.splits; ++split) {
          const Running one = part(split);
          if (one.shift[i] > most) most = one.shift[i];
          if (best != nullptr && one.best[i] > highest) highest = one.best[i];
        }
        float* to = mean + (g * p.n + i) * p.d;
        for (int64_t split = 0; split < runs.splits; ++split) {
          const Running one = part(split);
          const float shrink = one.shift[i] == -INF ? 0.f : expf(one.shift[i] - most);
          total += one.sum[i] * shrink;
          const float* from = weighted(split) + i * p.d;
          for (int64_t c = 0; c < p.d; ++c) to[c] = (split == 0 ? 0.f : to[c]) + from[c] * shrink;
        }
        const float inverse = most == -INF ? 0.f : 1.f / total;
        for (int64_t c = 0; c < p.d; ++c) to[c] *= inverse;
        row[g * p.n + i] = most + logf(total);
        if (best != nullptr) best[g * p.n + i] = highest;
      }
    });
  });
}

template <class T, class Arithmetic>
void backward(const SimilarityLse& p, const float* row, const float* col, const float* g_row, const float* g_col,
              float* dq, float* dk, float* dscale, float* dbias) {
  const bool triangle = symmetric(p), self = p.k == nullptr;
  const Blocks rows(p.n), columns(p.m);
  const Turns row_turns(p.groups * rows.count), column_turns(triangle ? 0 : p.groups * columns.count);
  const Spread spread(p);
  const Array<Scratch> scratch(spread.threads);
  // Without a triangle, dq and dk of one input are added in the end.
  const Array<float> own_k(self && !triangle && dq != nullptr ? p.groups * p.m * p.d : 0);
  float* const to_k = !self ? dk : triangle || dq == nullptr ? nullptr : static_cast<float*>(own_k);
  const int64_t tiles = rows.count * columns.count;
  const Array<double> dots(dscale == nullptr ? 0 : p.groups * tiles);
  if (dscale != nullptr) memset(dots, 0, p.groups * tiles * sizeof(double));

  spread.run<Arithmetic>(p.groups, [&](Team& team, int64_t g) {
    const Group<T, Arithmetic> group = group_of<T, Arithmetic>(p, g);
    float* const q_at = dq == nullptr ? nullptr : dq + g * p.n * p.d;
    float* const k_at = to_k == nullptr ? nullptr : to_k + g * p.m * p.d;
    float* const bias_at = dbias == nullptr ? nullptr : dbias + g * p.m;
    team.each(rows.count, [&](int64_t b) {
      const int64_t first = rows.begin(b), count = rows.width(b);
      if (q_at != nullptr) memset(q_at + first * p.d, 0, count * p.d * 4);
    });
    team.each(columns.count, [&](int64_t b) {
      const int64_t first = columns.begin(b), count = columns.width(b);
      if (k_at != nullptr) memset(k_at + first * p.d, 0, count * p.d * 4);
      if (bias_at != nullptr) memset(bias_at + first, 0, count * 4);
    });
    const Upstream by_row = row == nullptr ? Upstream{} : Upstream{row + g * p.n, g_row + g * p.n};
    const Upstream by_column = triangle         ? by_row  // s_ij adds to row_i and, as s_ji, to row_j
                               : col == nullptr ? Upstream{}
                                                : Upstream{col + g * p.m, g_col + g * p.m};
    const auto weigh = [&](const Tile& tile, Scratch& x) {
      if (!group.similarities(tile, x, true, dscale != nullptr)) return false;
      weigh_tile(tile, x, by_row, by_column);
      const int64_t t = tile.i0 / rows.size * columns.count + tile.j0 / columns.size;
      if (dscale != nullptr) dots[g * tiles + t] = weighted_dots(tile, x);
      return true;
    };
    std::atomic<int64_t>* const turns = row_turns.next + g * rows.count;
    if (triangle) {
      each_tile(team, rows, rows, turns, turns, [&](const Tile& tile) {
        Scratch& x = scratch[team.id];
        const bool off_diagonal = tile.i0 != tile.j0;
        if (!weigh(tile, x)) return;
        if (dscale != nullptr && !off_diagonal)  // here both (i, j) and (j, i) hold W_ij + W_ji
          dots[g * tiles + tile.i0 / rows.size * (columns.count + 1)] /= 2;
        if (q_at == nullptr) return;
        round_weights<Arithmetic>(tile, x, off_diagonal);
        add_product<Arithmetic>(tile, x, group.q + tile.j0 * p.d, p.d, q_at + tile.i0 * p.d);
        if (off_diagonal)
          add_transposed_product<Arithmetic>(tile, x, group.q + tile.i0 * p.d, p.d, q_at + tile.j0 * p.d);
      });
    } else {
      each_tile(team, rows, columns, turns, column_turns.next + g * columns.count, [&](const Tile& tile) {
        Scratch& x = scratch[team.id];
        if (!weigh(tile, x)) return;
        if (bias_at != nullptr)
          for (int64_t i = 0; i < tile.rows; ++i)
            for (int64_t j = 0; j < tile.columns; ++j) bias_at[tile.j0 + j] += x.s[i * S_ROW + j];
        round_weights<Arithmetic>(tile, x, k_at != nullptr);
        if (q_at != nullptr) add_product<Arithmetic>(tile, x, group.k + tile.j0 * p.d, p.d, q_at + tile.i0 * p.d);
        if (k_at != nullptr)
          add_transposed_product<Arithmetic>(tile, x, group.q + tile.i0 * p.d, p.d, k_at + tile.j0 * p.d);
      });
    }
    team.each(rows.count, [&](int64_t b) {
      const int64_t first = rows.begin(b) * p.d, count = rows.width(b) * p.d;
      for (int64_t c = first; q_at != nullptr && c < first + count; ++c)
        q_at[c] = (q_at[c] + (self && k_at != nullptr ? k_at[c] : 0.f)) * p.scale;
    });
    team.each(columns.count, [&](int64_t b) {
      const int64_t first = columns.begin(b) * p.d, count = columns.width(b) * p.d;
      for (int64_t c = first; k_at != nullptr && c < first + count; ++c) k_at[c] *= p.scale;
    });
  });
  if (dscale != nullptr) {
    double total = 0;
    for (int64_t t = 0; t < p.groups * tiles; ++t) total += dots[t];
    *dscale = float(total);
  }
}

// Calls body(T(), Arithmetic()) with the types for the problem.
template <class Body>
void with_types(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::F32:
      return body(float(), F32());
    case DType::BF16:
#if defined(__AMX_BF16__) || defined(SSLKERN_EMULATE_AMX)
      return body(bf16(), Bf16Tiles());
#elif defined(__AVX512BF16__)
      return body(bf16(), Bf16Pairs());
#else
      return body(bf16(), F32());
#endif
    case DType::FP16:
      return body(fp16(), F32());
  }
}

}  // namespace

void similarity_lse_fwd(const SimilarityLse& p, float* row, float* col, float* best) {
  with_types(p.dtype, [&](auto t, auto a) { forward<decltype(t), decltype(a)>(p, row, col, best); });
}
void similarity_lse_frozen_fwd(const SimilarityLse& p, float* row, float* mean, float* best) {
  with_types(p.dtype, [&](auto t, auto a) { frozen_forward<decltype(t), decltype(a)>(p, row, mean, best); });
}
void similarity_lse_bwd(const SimilarityLse& p, const float* row, const float* col, const float* g, const float* h,
                        float* dq, float* dk, float* dscale, float* dbias) {
  with_types(p.dtype,
             [&](auto t, auto a) { backward<decltype(t), decltype(a)>(p, row, col, g, h, dq, dk, dscale, dbias); });
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
