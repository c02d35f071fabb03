// What the kernels over all pairs share, for the instruction set SSLKERN_ISA:
//   1. a tile of s: the product of a block of queries and a block of keys, scaled, with what is left out at -inf;
//   2. the products of a tile of weights with the keys or the queries;
//   3. the order of the tiles, which is the same for any number of threads, so that the bits of the result are too;
//   4. how groups and tiles are spread over threads.
// A tile never leaves the cache of its core.
#pragma once

#include <atomic>
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

constexpr int64_t BLOCK = 192;         // most rows and columns of a tile; a multiple of MR, NR
constexpr int64_t DEPTH = 256;         // words of the inner dimension that are packed at a time; a multiple of NR
constexpr int64_t SIDE = 4;            // blocks of a square
constexpr int64_t S_ROW = BLOCK + 16;  // rows are kept off powers of two, which share cache sets
constexpr int64_t A_ROW = DEPTH + 16;

struct Tile {
  int64_t i0, rows, j0, columns;
};

// What one thread needs for one tile, about 0.9 MB.
struct Scratch {
  alignas(64) float s[BLOCK * S_ROW];  // s, then e^s or the weights W of the backward
  alignas(64) Word a[BLOCK * A_ROW], b[BLOCK * DEPTH];
  // W as bf16, in pairs along its rows and along its columns.
  alignas(64) Word w[BLOCK * S_ROW / 2], wt[BLOCK / 2 * S_ROW];
  float dot[BLOCK * S_ROW];  // q k^T, where the gradient of the scale needs it
  int32_t row_id[BLOCK], column_id[BLOCK];
  float row_max[BLOCK], row_shift[BLOCK], row_factor[BLOCK], row_sum[BLOCK];
  float column_max[BLOCK], column_shift[BLOCK], column_factor[BLOCK], column_sum[BLOCK];
  float row_bias[BLOCK], row_weight[BLOCK], row_value[BLOCK], row_slope[BLOCK];  // of similarity_softplus
  float column_bias[BLOCK], column_weight[BLOCK], column_value[BLOCK], column_slope[BLOCK];
};

inline bool finite(float x) { return x - x == 0; }

// ---- 1. A tile of s -------------------------------------------------------------------------------------------------

// One group of the problem, with its types.
template <class T, class Arithmetic>
struct Group {
  int64_t n, m, d;
  const T *q, *k;
  bool itself;  // q is k: the pairs (i, i) are left out
  float scale;
  const int64_t *q_ids, *k_ids;
  bool same;
  const float *k_bias, *q_limit;
  float* kept;
  int64_t kept_rows;

  // False where the ids leave out the whole tile. They are not compared where no row and column can have the same.
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
    // In the tile 32 bits tell the ids apart: the distance from the lowest id where that fits, else the first column
    // that has the id, or -1.
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

  // x.s = s of the tile, -inf for pairs that are left out and in columns up to a whole vector. False where no pair
  // counts. Forward and backward both come here, so they leave out the same pairs. The forward writes the dot products
  // of the first rows to `kept`, where there is one, and the backward reads them there; `need_dot` leaves them in
  // x.dot.
  bool similarities(const Tile& tile, Scratch& x, bool is_backward = false, bool need_dot = false) const {
    bool compare;
    if (!prepare_ids(tile, x, compare)) return false;
    float* const dots = need_dot ? x.dot : x.s;
    const auto kept_row = [&](int64_t i) { return kept + (tile.i0 + i) * m + tile.j0; };
    const bool is_kept = kept != nullptr && tile.i0 + tile.rows <= kept_rows;
    if (!is_kept || !is_backward) product(tile, x, dots);
    for (int64_t i = 0; is_kept && i < tile.rows; ++i) {
      float* const row = dots + i * S_ROW;
      if (is_backward) {
        copy_words(kept_row(i), tile.columns, reinterpret_cast<Word*>(row));
        for (int64_t j = tile.columns; j < round_up(tile.columns, LANES); ++j) row[j] = 0.f;
      } else {
        copy_words(row, tile.columns, reinterpret_cast<Word*>(kept_row(i)));
      }
    }

    const int64_t padded = round_up(tile.columns, LANES);
    alignas(64) float bias[BLOCK];
    if (k_bias != nullptr)
      for (int64_t j = 0; j < padded; ++j) bias[j] = j < tile.columns ? k_bias[tile.j0 + j] : 0.f;
    const bool on_diagonal = itself && tile.i0 < tile.j0 + tile.columns && tile.j0 < tile.i0 + tile.rows;
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* s = x.s + i * S_ROW;
      const float* dot = dots + i * S_ROW;
      if (k_bias != nullptr)
        for (int64_t j = 0; j < padded; j += LANES) {
          const Vec b = load(bias + j);
          store(s + j, b == all(-INF) ? all(-INF) : load(dot + j) * scale + b);  // whatever the product is
        }
      else
        for (int64_t j = 0; j < padded; j += LANES) store(s + j, load(dot + j) * scale);
      if (compare) {
        const IVec id = all(x.row_id[i]);
        for (int64_t j = 0; j < padded; j += LANES) {
          const IVec equal = load_int(x.column_id + j) == id;
          store(s + j, (same ? ~equal : equal) ? all(-INF) : load(s + j));
        }
      }
      if (q_limit != nullptr) {
        const Vec limit = all(q_limit[tile.i0 + i]);
        for (int64_t j = 0; j < padded; j += LANES) store(s + j, load(s + j) > limit ? all(-INF) : load(s + j));
      }
      if (on_diagonal) {
        const int64_t j = tile.i0 + i - tile.j0;
        if (j >= 0 && j < tile.columns) s[j] = -INF;
      }
      for (int64_t j = tile.columns; j < padded; ++j) s[j] = -INF;
    }
    return true;
  }
};

// ---- 2. The products of a tile of weights ---------------------------------------------------------------------------

// x.s as bf16 in x.w (pairs along the row) and, for the transposed product, x.wt (pairs along the column): in rows of
// W^T for tiles, else in rows of pairs. Zeros fill both up to whole steps.
template <class Arithmetic>
void round_weights([[maybe_unused]] const Tile& tile, [[maybe_unused]] Scratch& x, [[maybe_unused]] bool transposed) {
#ifdef __AVX512BF16__
  if constexpr (Arithmetic::PER_WORD == 2) {
    constexpr bool TILES = Arithmetic::STEP == LANES;
    const int64_t padded_rows = 2 * words<Arithmetic>(tile.rows);
    const int64_t filled = round_up(tile.columns, LANES), padded = round_up(2 * words<Arithmetic>(tile.columns), LANES);
    for (int64_t i = 0; i < tile.rows && filled < padded; ++i)
      memset(x.s + i * S_ROW + filled, 0, (padded - filled) * 4);
    for (int64_t i = tile.rows; i < padded_rows; ++i) memset(x.s + i * S_ROW, 0, padded * 4);
    Word* const pairs = TILES ? x.a : x.wt;
    for (int64_t i = 0; i < padded_rows; i += 2)
      for (int64_t j = 0; j < padded; j += LANES) {
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
      for (int64_t i = 0; i < padded_rows / 2; i += LANES)
        for (int64_t j = 0; j < padded; j += LANES)
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

// sum_ij W_ij <q_i, k_j>: what the tile adds to the gradient of the scale. A pair that is left out weighs 0, and its
// product may be infinite.
inline double weighted_dots(const Tile& tile, const Scratch& x) {
  double total = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    Vec row = Vec{};
    for (int64_t j = 0; j < tile.columns; j += LANES) {
      const Vec w = load(x.s + i * S_ROW + j);
      row += w == Vec{} ? w : w * load(x.dot + i * S_ROW + j);
    }
    total += sum(row);
  }
  return total;
}

// ---- 3. The order of the tiles --------------------------------------------------------------------------------------

struct Blocks {
  int64_t length, size, count;
  // Some blocks even of short inputs, so that threads can share them: a triangle of three has three pairs and three
  // halves, a rectangle is best cut evenly. `other` is the length of the other side: a short side is cut too where that
  // is long.
  Blocks(int64_t length, bool triangle, int64_t other = 0) : length(length) {
    int64_t wanted = (length + BLOCK - 1) / BLOCK;
    const bool little = length < 96 && (length < 16 || other < 1024);
    const int64_t shared = little ? 1 : !triangle ? 2 : length < 768 ? 3 : 5;
    if (wanted < shared) wanted = shared;
    if (!triangle && wanted > 1 && wanted < 12) wanted = (wanted + 1) / 2 * 2;
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

// Visits every tile of row and column blocks once, or, where both are the same, every tile (x, y) with x <= y; drawn in
// docs/design.md. No two threads have a tile of the same block at a time, and each block meets the others in one order,
// so that sums over tiles have the same bits for any number of threads: blocks are grouped into squares of SIDE, and x
// meets y in the turn x + y, where the numbers of the squares and the places within a square are added separately, each
// modulo its count. That is a tournament in which two squares finish with each other before they go on, while their
// rows are still in the shared cache.
template <class Visit>
void each_tile(Team& team, const Blocks& rows, const Blocks& columns, std::atomic<int64_t>* row_turns,
               std::atomic<int64_t>* column_turns, const Visit& visit) {
  if (rows.count == 0 || columns.count == 0) return;
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
    const int64_t x = (part * together + square) * side + (place + step) % side;  // the longest idle block comes first
    const int64_t turn = round * side + step, y = partner(turn, x);
    if (part * together + square >= squares || x >= rows.count || y >= columns.count || (pairs && y < x)) return;
    wait_for(row_turns[x], after_last(turn, x, columns.count));
    wait_for(column_turns[y], after_last(turn, y, rows.count));
    visit(Tile{rows.begin(x), rows.width(x), columns.begin(y), columns.width(y)});
    row_turns[x].store(turn + 1, std::memory_order_release);
    column_turns[y].store(turn + 1, std::memory_order_release);
  });
}

// The tiles of a row block are visited in order, and in `splits` separate runs where there are few row blocks.
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

// ---- 4. Groups, types and threads -----------------------------------------------------------------------------------

// How a problem is spread over threads: whole groups where there are many, else the tiles of one group after the other.
struct Spread {
  int threads;
  bool by_group;
  explicit Spread(const Similarity& p) {
    const double work = 2. * double(p.n) * double(p.m) * double(p.d + 16);  // of a group
    threads = usable_threads(p.threads);
    by_group = p.groups > 1 && (p.groups >= 2 * threads || work < 4e6);
    // A thread is worth starting for 10 us of work.
    const double useful = (by_group ? work * double(p.groups) : work) / 1e6;
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
Group<T, Arithmetic> group_of(const Similarity& p, int64_t g) {
  const auto at = [g](const auto* array, int64_t length) { return array == nullptr ? nullptr : array + g * length; };
  const bool itself = p.k == nullptr;
  Group<T, Arithmetic> group{};
  group.n = p.n;
  group.m = p.m;
  group.d = p.d;
  group.q = static_cast<const T*>(p.q) + g * p.n * p.d;
  group.k = itself ? group.q : static_cast<const T*>(p.k) + g * p.m * p.d;
  group.itself = itself;
  group.scale = p.scale;
  group.q_ids = at(p.q_ids, p.n);
  group.k_ids = itself ? group.q_ids : at(p.k_ids, p.m);
  group.same = p.same;
  group.k_bias = at(p.k_bias, p.m);
  group.q_limit = at(p.q_limit, p.n);
  group.kept = p.kept == nullptr ? nullptr : p.kept + g * p.kept_rows * p.m;
  group.kept_rows = p.kept_rows;
  return group;
}

// Whether s_ij = s_ji, and both count or neither: then half of the tiles are enough.
inline bool symmetric(const Similarity& p) { return p.k == nullptr && p.k_bias == nullptr && p.q_limit == nullptr; }

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

}  // namespace SSLKERN_ISA
}  // namespace sslkern
