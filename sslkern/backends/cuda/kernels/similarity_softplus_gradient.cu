// `similarity_softplus` for few features: sums of softplus over rows, and the gradient of the features of one side
// (gradient.h), from the same scores:
//
//     w_ij = weight_i sign sigmoid(t_ij)      t_ij = sign (s_ij + bias_i)
//
// x is q, or k in the transposed problem, where bias_i and weight_i belong to the columns and p.bias to the rows.
#include "gradient.h"
#include "softplus.h"

namespace sslkern::cuda {

constexpr int FEATURES = 128;  // with zeros

struct SoftplusGradient {
  Terms terms;
  float* rows;                 // [splits, n]: sums of softplus; or null
  float *dx, *dscale, *dbias;  // [splits, n, whole(d)], [blocks, 8], [splits, n]; or null
  int tiles, each;             // of columns, and of those in a split
  bool transposed;
};

struct SoftplusOwner {
  static constexpr int WIDTH = 64, STAGES = 8, NEAR = 0;  // 128 columns take more registers than there are
  static constexpr int TERMS = WIDTH / 4;                 // of a thread in a row of a tile
  static constexpr int TILES = Softplus::MOST / TERMS;    // between two logarithms

  const Problem& p;
  const SoftplusGradient& given;
  const int i;
  float c;
  float shift[2], weight[2];  // of the rows i and i + 8
  bool out[2] = {};
  Softplus sums[2];
  float row_sums[2] = {}, scale_sum = 0.f, bias_sums[2] = {};
  Asks<WIDTH> asks;

  SSLKERN_DEVICE SoftplusOwner(const Problem& p, const SoftplusGradient& given, int i)
      : p(p), given(given), i(i), c(given.terms.sign * scale_in_base_2(p)) {
    // A scale of 0 becomes one that no sum can tell from it, so that a product can still take its pair away.
    if (fabsf(c) < 1e-25f) c = 1e-25f;
    const Terms& terms = given.terms;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = i + 8 * h;
      shift[h] = weight[h] = 0.f;  // beyond the last row
      if (row >= p.n) continue;
      weight[h] = terms.sign * terms.folded();
      if (!given.transposed) {
        shift[h] = terms.shift(row);
        weight[h] *= terms.weight(row);
      } else {
        if (terms.step == 0) shift[h] = terms.shift(0);
        if (p.bias != nullptr) {
          shift[h] += terms.in_base_2(p.bias[row]);
          out[h] = p.bias[row] == -INFINITY;
        }
      }
    }
  }

  // The product that a pair gets that does not count: its score is -inf, which does not count by itself either.
  SSLKERN_DEVICE float away() const { return c * given.terms.sign < 0.f ? INFINITY : -INFINITY; }

  template <int S>
  SSLKERN_DEVICE void weigh(float (&s)[S], int t, uint32_t, bool first) {
    const bool asking = asks.anything(p, i, t, first);
    const bool of_columns =
        given.transposed ? given.terms.step > 0 || given.terms.weights != nullptr : p.bias != nullptr;
    if (any_lane(asking || of_columns || given.terms.sign < 0.f || out[0] || out[1])) {
      const int j = t * WIDTH + lane_id() % 4 * 2;
      if (asking) leave_out(s, p, asks.of(t), i, j, away());
      weigh_each(s, j);
    } else {
#pragma unroll
      for (int k = 0; k < S; ++k) {
        const int h = k / 2 % 2;
        const float dot = s[k];
        s[k] = weight[h] * sums[h].add(fmaf(c, dot, shift[h]));
        scale_sum += s[k] * dot;
        bias_sums[h] += s[k];
      }
    }
    if (t % TILES == 0) end_sums();
  }

  // Where some pairs do not count, or columns have terms of their own. j: the first column.
  template <int S>
  SSLKERN_DEVICE void weigh_each(float (&s)[S], int j) {
    const Terms& terms = given.terms;
    const float* const biases = !given.transposed ? p.bias : terms.step > 0 ? terms.bias : nullptr;
    const float* const weights = given.transposed ? terms.weights : nullptr;
#pragma unroll
    for (int k = 0; k < TERMS; ++k) {
      const int column = j + k / 2 * 8 + k % 2, at = column < p.m ? column : p.m - 1;
      const float bias = biases == nullptr ? 0.f : biases[at], of_column = weights == nullptr ? 1.f : weights[at];
      const bool column_counts = given.transposed || bias != -INFINITY;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& score = s[k / 2 * 4 + 2 * h + k % 2];
        const float dot = score;
        const bool counts = column_counts && !out[h] && dot != away();
        const float slope = sums[h].add(counts ? fmaf(c, dot, shift[h] + terms.in_base_2(bias)) : -INFINITY);
        score = counts ? weight[h] * of_column * slope : 0.f;
        scale_sum += counts ? score * dot : 0.f;
        bias_sums[h] += score;
      }
    }
  }

  SSLKERN_DEVICE void end_sums() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_sums[h] += sums[h].sum();
      sums[h] = Softplus();
    }
  }

  SSLKERN_DEVICE float unfold() const { return 1.f / given.terms.folded(); }
  SSLKERN_DEVICE void end_row(int h, int64_t place, bool there) {
    if (h == 0) end_sums();
    if (given.rows != nullptr) store_sum(given.rows, place, row_sums[h], there);
  }
};

template <class T>
__global__ void __launch_bounds__(3 * WARPGROUP, 1)
    softplus_rows(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, const Problem p,
                  const SoftplusGradient given) {
  own_rows<T, FEATURES, SoftplusOwner>(x_map, y_map, nullptr, p, given);
}

}  // namespace sslkern::cuda
