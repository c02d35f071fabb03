// similarity_lse on the CPU, for the instruction set SSLKERN_ISA. What a tile of s (tiles.h) adds
//   1. to log-sum-exps: the forward;
//   2. to a softmax-weighted mean of keys beside them: the forward with frozen keys;
//   3. to gradients: the backward;
//   4. and the three over all tiles.
#include <cmath>

#include "tiles.h"

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

constexpr float TINY_SUM = 0x1p-64f;  // a smaller sum has lost terms to underflow that its own shift would save
constexpr float MAX_SPREAD = 80.f;    // e^(80 / 2) and e^-(80 / 2) are both within fp32

// ---- 1. Forward: log-sum-exps ---------------------------------------------------------------------------------------

// Log-sum-exps on their way: sum_j e^{s_j} = e^shift * sum. best, where it is asked for, is the largest s so far.
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

  // shift becomes the log-sum-exp, and best a NaN where that is one: maxima drop a NaN, sums hand it on.
  void finish(int64_t first, int64_t count) const {
    for (int64_t i = first; i < first + count; ++i) {
      shift[i] += logf(sum[i]);
      if (best != nullptr && shift[i] != shift[i]) best[i] = shift[i];
    }
  }
};

// The maximum of each row, and the shift that goes with it: 0 where the maximum is no finite number.
inline void row_shifts(const Tile& tile, Scratch& x) {
  const int64_t padded = round_up(tile.columns, LANES);
  for (int64_t i = 0; i < tile.rows; ++i) {
    Vec highest = all(-INF);
    for (int64_t j = 0; j < padded; j += LANES)
      highest = max(load(x.s + i * S_ROW + j), highest);  // drops a NaN, which
    x.row_max[i] = max(highest);                          // the sum hands on
    x.row_shift[i] = finite(x.row_max[i]) ? x.row_max[i] : 0.f;
  }
}

inline void column_maxima(const Tile& tile, Scratch& x) {
  for (int64_t j = 0; j < tile.columns; j += LANES) {
    Vec highest = all(-INF);
    for (int64_t i = 0; i < tile.rows; ++i) highest = max(load(x.s + i * S_ROW + j), highest);
    store(x.column_max + j, highest);
  }
}

// Sums of e^(s - row_shift) over ROWS rows; with COLUMNS each exponential also serves its column, times the row's
// factor.
template <int ROWS, bool COLUMNS>
inline void sum_rows(int64_t i, int64_t padded, Scratch& x) {
  Vec shift[ROWS], total[ROWS], factor[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    shift[r] = all(x.row_shift[i + r]);
    factor[r] = all(x.row_factor[i + r]);
    total[r] = Vec{};
  }
  for (int64_t j = 0; j < padded; j += LANES) {
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
  const int64_t padded = round_up(tile.columns, LANES);
  int64_t i = 0;
  for (; i + 4 <= tile.rows; i += 4) sum_rows<4, COLUMNS>(i, padded, x);
  for (; i < tile.rows; ++i) sum_rows<1, COLUMNS>(i, padded, x);
}

// Adds the tile in x.s to `rows` and, unless they are null, to `columns`: one exponential per pair serves both, at the
// shift of the row. A column whose sum comes out tiny, because its values lie far below those of its rows, is redone at
// a shift of its own.
void add_tile(const Tile& tile, Scratch& x, const Running& rows, const Running* columns) {
  row_shifts(tile, x);
  if (columns == nullptr) {
    sum_tile<false>(tile, x);
  } else {
    const int64_t padded = round_up(tile.columns, LANES);
    float highest = -INF;
    for (int64_t i = 0; i < tile.rows; ++i)
      if (finite(x.row_max[i]) && x.row_max[i] > highest) highest = x.row_max[i];
    if (highest == -INF) highest = 0.f;
    for (int64_t i = 0; i < tile.rows; i += LANES) store(x.row_factor + i, exp(load(x.row_shift + i) - highest));
    for (int64_t i = 0; i < tile.rows; ++i)
      if (x.row_max[i] == -INF) x.row_factor[i] = 0.f;
    for (int64_t j = 0; j < padded; ++j) x.column_sum[j] = 0.f, x.column_shift[j] = highest;
    sum_tile<true>(tile, x);
    bool lost = false;
    for (int64_t j = 0; j < tile.columns; ++j) lost |= x.column_sum[j] < TINY_SUM;
    if (lost || columns->best != nullptr) column_maxima(tile, x);
    if (lost) {
      for (int64_t j = 0; j < padded; j += LANES) {
        const Vec highest = load(x.column_max + j), shift = highest - highest == Vec{} ? highest : Vec{};
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

// ---- 2. Frozen keys: the softmax-weighted mean of the keys beside the log-sum-exp -----------------------------------

// Adds the tile in x.s to the sums of its rows and e^s k to `weighted` (n, d), which is kept at the same shift.
template <class Arithmetic, class T>
void add_tile_frozen(const Tile& tile, Scratch& x, const Running& rows, const T* keys, int64_t d, float* weighted) {
  const int64_t padded = round_up(tile.columns, LANES);
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
    for (int64_t j = 0; j < padded; j += LANES) {
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

// ---- 3. Backward ----------------------------------------------------------------------------------------------------

// Log-sum-exps of the rows or columns of the whole problem and their gradients; null where a side has none.
struct Upstream {
  const float *value, *gradient;
};

// What rows or columns add to W: gradient * e^(s - value), as factor * e^(s - shift); nothing where all of their pairs
// are left out.
inline void factors(const Upstream& side, int64_t first, int64_t count, float* shift, float* factor, float& low,
                    float& high) {
  for (int64_t i = 0; i < round_up(count, LANES); ++i) {
    const bool empty = i >= count || side.value[first + i] == -INF;
    shift[i] = empty ? 0.f : side.value[first + i];
    factor[i] = empty ? 0.f : side.gradient[first + i];
    if (empty) continue;
    if (!(shift[i] >= low)) low = shift[i];  // a NaN goes into both, and so into high - low
    if (!(shift[i] <= high)) high = shift[i];
  }
}

// x.s = W of the tile, W_ij = g_i e^(s_ij - row_i) + h_j e^(s_ij - col_j).
void weigh_tile(const Tile& tile, Scratch& x, const Upstream& rows, const Upstream& columns) {
  const int64_t padded = round_up(tile.columns, LANES);
  float low = INF, high = -INF;
  if (rows.value != nullptr) factors(rows, tile.i0, tile.rows, x.row_shift, x.row_factor, low, high);
  if (columns.value != nullptr) factors(columns, tile.j0, tile.columns, x.column_shift, x.column_factor, low, high);
  const auto each = [&](const auto& weight) {
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t j = 0; j < padded; j += LANES) {
        float* s = x.s + i * S_ROW + j;
        store(s, weight(load(s), i, j));
      }
  };
  if (columns.value == nullptr) {
    each([&](Vec s, int64_t i, int64_t) { return exp(s - x.row_shift[i]) * x.row_factor[i]; });
  } else if (rows.value == nullptr) {
    each([&](Vec s, int64_t, int64_t j) { return exp(s - load(x.column_shift + j)) * load(x.column_factor + j); });
  } else if (high - low < MAX_SPREAD) {  // one exponential, at a shift in the middle
    const float middle = low < high ? low + (high - low) / 2 : low == high ? low : 0.f;  // 0: no pair counts
    const auto move = [&](float* factor, const float* shift) {  // e^middle may be infinite; a factor of 0 stays 0
      const Vec f = load(factor), moved = f * exp(middle - load(shift));
      store(factor, f == 0.f ? all(0.f) : moved);
    };
    for (int64_t i = 0; i < tile.rows; i += LANES) move(x.row_factor + i, x.row_shift + i);
    for (int64_t j = 0; j < padded; j += LANES) move(x.column_factor + j, x.column_shift + j);
    each([&](Vec s, int64_t i, int64_t j) { return exp(s - middle) * (load(x.column_factor + j) + x.row_factor[i]); });
  } else {
    each([&](Vec s, int64_t i, int64_t j) {
      return exp(s - x.row_shift[i]) * x.row_factor[i] + exp(s - load(x.column_shift + j)) * load(x.column_factor + j);
    });
  }
}

// ---- 4. All tiles ---------------------------------------------------------------------------------------------------

template <class T, class Arithmetic>
void forward(const Similarity& p, float* row, float* col, float* best) {
  const bool triangle = symmetric(p);
  const Blocks rows(p.n, triangle, p.m), columns(p.m, triangle, p.n);
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
void frozen_forward(const Similarity& p, float* row, float* mean, float* best) {
  const Blocks rows(p.n, false), columns(p.m, false);
  const Runs runs(rows, columns);
  const Spread spread(p);
  const Array<Scratch> scratch(spread.threads);
  const int64_t states = p.groups * runs.splits * p.n;
  const Array<float> shifts(states), sums(states), bests(best == nullptr ? 0 : states);
  const Array<float> more(p.groups * (runs.splits - 1) * p.n * p.d);  // `mean` itself serves the first run

  spread.run<Arithmetic>(p.groups, [&](Team& team, int64_t g) {
    const Group<T, Arithmetic> group = group_of<T, Arithmetic>(p, g);
    const auto part = [&](int64_t split) {
      const int64_t at = (g * runs.splits + split) * p.n;
      return Running{shifts + at, sums + at, best == nullptr ? nullptr : bests + at};
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
        float shift = -INF, total = 0.f, highest = -INF;
        for (int64_t split = 0; split < runs.splits; ++split) {
          const Running one = part(split);
          if (one.shift[i] > shift) shift = one.shift[i];
          if (best != nullptr && one.best[i] > highest) highest = one.best[i];
        }
        float* to = mean + (g * p.n + i) * p.d;
        for (int64_t split = 0; split < runs.splits; ++split) {
          const Running one = part(split);
          const float shrink = one.shift[i] == -INF ? 0.f : expf(one.shift[i] - shift);
          total += one.sum[i] * shrink;
          const float* from = weighted(split) + i * p.d;
          for (int64_t c = 0; c < p.d; ++c) to[c] = (split == 0 ? 0.f : to[c]) + from[c] * shrink;
        }
        const float inverse = shift == -INF ? 0.f : 1.f / total;
        for (int64_t c = 0; c < p.d; ++c) to[c] *= inverse;
        const float lse = shift + logf(total);
        row[g * p.n + i] = lse;
        if (best != nullptr) best[g * p.n + i] = lse == lse ? highest : lse;
      }
    });
  });
}

template <class T, class Arithmetic>
void backward(const Similarity& p, const float* row, const float* col, const float* g_row, const float* g_col,
              float* dq, float* dk, float* dscale, float* dbias) {
  const bool triangle = symmetric(p), itself = p.k == nullptr;
  const Blocks rows(p.n, triangle, p.m), columns(p.m, triangle, p.n);
  const Turns row_turns(p.groups * rows.count), column_turns(triangle ? 0 : p.groups * columns.count);
  const Spread spread(p);
  const Array<Scratch> scratch(spread.threads);
  // Where the keys are the queries but the problem is not symmetric, dk is added to dq in the end.
  const Array<float> own_k(itself && !triangle && dq != nullptr ? p.groups * p.m * p.d : 0);
  float* const to_k = !itself ? dk : triangle || dq == nullptr ? nullptr : static_cast<float*>(own_k);
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
        q_at[c] = (q_at[c] + (itself && k_at != nullptr ? k_at[c] : 0.f)) * p.scale;
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

}  // namespace

void similarity_lse_fwd(const Similarity& p, float* row, float* col, float* best) {
  with_types(p.dtype, [&](auto t, auto a) { forward<decltype(t), decltype(a)>(p, row, col, best); });
}
void similarity_lse_frozen_fwd(const Similarity& p, float* row, float* mean, float* best) {
  with_types(p.dtype, [&](auto t, auto a) { frozen_forward<decltype(t), decltype(a)>(p, row, mean, best); });
}
void similarity_lse_bwd(const Similarity& p, const float* row, const float* col, const float* g, const float* h,
                        float* dq, float* dk, float* dscale, float* dbias) {
  with_types(p.dtype,
             [&](auto t, auto a) { backward<decltype(t), decltype(a)>(p, row, col, g, h, dq, dk, dscale, dbias); });
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
