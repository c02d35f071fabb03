// similarity_softplus on the CPU, for the instruction set SSLKERN_ISA. The weights of the gradients are known as soon
// as a score is: one pass over the tiles (tiles.h) gives
//   1. a softplus and its slope per pair, the sums over rows and the tile of weights;
//   2. over all tiles, the results and their gradients.
#include "tiles.h"

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

// ---- 1. A tile ------------------------------------------------------------------------------------------------------

struct Softplus {
  Vec value, slope;  // log(1 + e^x) and 1 / (1 + e^-x)
};

// Both within 3 ulps, also where they are tiny, from one exponential.
inline Softplus softplus(Vec x) {
  const Vec e = exp(min(x, -x));
  Vec p = all(-3.24402517e-3f);  // log(1 + e) / e for e in [0, 1]
  p = p * e + 1.98514629e-2f;
  p = p * e - 5.69595359e-2f;
  p = p * e + 0.106036551f;
  p = p * e - 0.153055921f;
  p = p * e + 0.196759388f;
  p = p * e - 0.249541342f;
  p = p * e + 0.333299637f;
  p = p * e - 0.499999017f;
  p = p * e + 1.f;
  return {max(x, Vec{}) + e * p, (x > Vec{} ? all(1.f) : e) / (e + 1.f)};
}

// The bias and the weight of each row, or null for 0 and 1.
struct Rows {
  const float *bias, *weight;
};

// Sums over the columns, as they grow from tile to tile.
struct Sums {
  double *value, *slope;
  void add(int64_t first, int64_t count, const float* values, const float* slopes) const {
    for (int64_t i = 0; i < count; ++i) value[first + i] += values[i], slope[first + i] += slopes[i];
  }
};

// bias and weight of some rows, with a weight of 0 up to a whole vector.
inline void copy_rows(const Rows& rows, int64_t first, int64_t count, float* bias, float* weight) {
  for (int64_t i = 0; i < round_up(count, LANES); ++i) {
    bias[i] = rows.bias == nullptr || i >= count ? 0.f : rows.bias[first + i];
    weight[i] = i >= count ? 0.f : rows.weight == nullptr ? 1.f : rows.weight[first + i];
  }
}

// From s in x.s the sums of its rows, in x.row_value and x.row_slope, and over s the weights W_ij = w_i sign slope_ij
// of the gradients. With MIRROR the tile also stands for its transpose: W + W^T, and the same sums of its columns. What
// is left out weighs 0, whatever w is.
template <bool MIRROR>
void weigh_tile(const Tile& tile, Scratch& x, const Rows& rows, float sign) {
  const int64_t padded = round_up(tile.columns, LANES);
  copy_rows(rows, tile.i0, tile.rows, x.row_bias, x.row_weight);
  if (MIRROR) {
    copy_rows(rows, tile.j0, tile.columns, x.column_bias, x.column_weight);
    memset(x.column_value, 0, padded * 4);
    memset(x.column_slope, 0, padded * 4);
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Vec bias = all(x.row_bias[i]), weight = all(x.row_weight[i] * sign);
    Vec values = Vec{}, slopes = Vec{};
    for (int64_t j = 0; j < padded; j += LANES) {
      float* const at = x.s + i * S_ROW + j;
      const Vec s = load(at);
      const auto term = [&](Vec b) { return softplus(s == all(-INF) ? s : (s + b) * sign); };
      const Softplus forth = term(bias);
      values += forth.value;
      slopes += forth.slope;
      Vec w = forth.slope == Vec{} ? Vec{} : forth.slope * weight;
      if (MIRROR) {
        const Softplus back = term(load(x.column_bias + j));
        store(x.column_value + j, load(x.column_value + j) + back.value);
        store(x.column_slope + j, load(x.column_slope + j) + back.slope);
        w += back.slope == Vec{} ? Vec{} : back.slope * (load(x.column_weight + j) * sign);
      }
      store(at, w);
    }
    x.row_value[i] = sum(values);
    x.row_slope[i] = sum(slopes);
  }
}

// ---- 2. All tiles ---------------------------------------------------------------------------------------------------

template <class T, class Arithmetic>
void all_tiles(const Similarity& p, const float* bias, const float* weight, float sign, float* total, float* row,
               const SoftplusGradients& gradients) {
  const bool triangle = symmetric(p), itself = p.k == nullptr;
  const Blocks rows(p.n, triangle, p.m), columns(p.m, triangle, p.n);
  const Turns row_turns(p.groups * rows.count), column_turns(triangle ? 0 : p.groups * columns.count);
  const Spread spread(p);
  const Array<Scratch> scratch(spread.threads);
  const Array<double> values(p.groups * p.n), slopes(p.groups * p.n);
  // Where the keys are the queries but the problem is not symmetric, dk is added to dq in the end.
  const Array<float> own_k(itself && !triangle && gradients.q != nullptr ? p.groups * p.m * p.d : 0);
  float* const to_k = !itself ? gradients.k : triangle || gradients.q == nullptr ? nullptr : static_cast<float*>(own_k);
  const int64_t tiles = gradients.scale == nullptr ? 0 : rows.count * columns.count;
  const Array<double> dots(p.groups * tiles);

  spread.run<Arithmetic>(p.groups, [&](Team& team, int64_t g) {
    const Group<T, Arithmetic> group = group_of<T, Arithmetic>(p, g);
    const auto at = [g](auto* array, int64_t length) { return array == nullptr ? nullptr : array + g * length; };
    const Rows of_rows{at(bias, p.n), at(weight, p.n)};
    const Sums sums{values + g * p.n, slopes + g * p.n};
    float *const q_at = at(gradients.q, p.n * p.d), *const k_at = at(to_k, p.m * p.d);
    float* const k_bias_at = at(gradients.k_bias, p.m);
    double* const dots_at = dots + g * tiles;
    team.each(rows.count, [&](int64_t b) {
      const int64_t first = rows.begin(b), count = rows.width(b);
      memset(sums.value + first, 0, count * 8);
      memset(sums.slope + first, 0, count * 8);
      if (q_at != nullptr) memset(q_at + first * p.d, 0, count * p.d * 4);
      if (tiles > 0) memset(dots_at + b * columns.count, 0, columns.count * 8);
    });
    team.each(columns.count, [&](int64_t b) {
      const int64_t first = columns.begin(b), count = columns.width(b);
      if (k_at != nullptr) memset(k_at + first * p.d, 0, count * p.d * 4);
      if (k_bias_at != nullptr) memset(k_bias_at + first, 0, count * 4);
    });

    std::atomic<int64_t>* const turns = row_turns.next + g * rows.count;
    each_tile(
        team, rows, columns, turns, triangle ? turns : column_turns.next + g * columns.count, [&](const Tile& tile) {
          Scratch& x = scratch[team.id];
          const bool mirror = triangle && tile.i0 != tile.j0;  // a tile on the diagonal holds its transpose
          if (!group.similarities(tile, x, false, tiles > 0)) return;
          triangle ? weigh_tile<true>(tile, x, of_rows, sign) : weigh_tile<false>(tile, x, of_rows, sign);
          sums.add(tile.i0, tile.rows, x.row_value, x.row_slope);
          if (mirror) sums.add(tile.j0, tile.columns, x.column_value, x.column_slope);
          if (tiles > 0)
            dots_at[tile.i0 / rows.size * columns.count + tile.j0 / columns.size] =
                weighted_dots(tile, x) / (triangle && !mirror ? 2 : 1);
          for (int64_t i = 0; k_bias_at != nullptr && i < tile.rows; ++i)
            for (int64_t j = 0; j < tile.columns; ++j) k_bias_at[tile.j0 + j] += x.s[i * S_ROW + j];
          float* const transposed_to = mirror ? q_at : k_at;
          if (q_at == nullptr && transposed_to == nullptr) return;
          round_weights<Arithmetic>(tile, x, transposed_to != nullptr);
          if (q_at != nullptr) add_product<Arithmetic>(tile, x, group.k + tile.j0 * p.d, p.d, q_at + tile.i0 * p.d);
          if (transposed_to != nullptr)
            add_transposed_product<Arithmetic>(tile, x, group.q + tile.i0 * p.d, p.d, transposed_to + tile.j0 * p.d);
        });

    team.each(rows.count, [&](int64_t b) {
      const int64_t first = rows.begin(b) * p.d, count = rows.width(b) * p.d;
      for (int64_t c = first; q_at != nullptr && c < first + count; ++c)
        q_at[c] = (q_at[c] + (itself && k_at != nullptr ? k_at[c] : 0.f)) * p.scale;
    });
    team.each(columns.count, [&](int64_t b) {
      const int64_t first = columns.begin(b) * p.d, count = columns.width(b) * p.d;
      for (int64_t c = first; k_at != nullptr && c < first + count; ++c) k_at[c] *= p.scale;
    });
    team.each(1, [&](int64_t) {
      double all_rows = 0, all_dots = 0;
      for (int64_t i = 0; i < p.n; ++i) {
        const double w = of_rows.weight == nullptr ? 1. : of_rows.weight[i];
        all_rows += w * sums.value[i];
        row[g * p.n + i] = float(sums.value[i]);
        if (gradients.bias != nullptr)
          gradients.bias[g * p.n + i] = sums.slope[i] == 0 ? 0.f : float(w * sign * sums.slope[i]);
      }
      for (int64_t t = 0; t < tiles; ++t) all_dots += dots_at[t];
      total[g] = float(all_rows);
      if (gradients.scale != nullptr) gradients.scale[g] = float(all_dots);
    });
  });
}

}  // namespace

void similarity_softplus(const Similarity& p, const float* bias, const float* weight, float sign, float* total,
                         float* row, const SoftplusGradients& gradients) {
  with_types(p.dtype, [&](auto t, auto a) {
    all_tiles<decltype(t), decltype(a)>(p, bias, weight, sign, total, row, gradients);
  });
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
