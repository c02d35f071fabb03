// The gradient of `similarity_lse` for the features of one side (gradient.h):
//
//     w_ij = g_i 2^(s_ij - r_i) + h_j 2^(s_ij - c_j)
//
// with r_i and c_j the log-sum-exps of row i and of column j in base 2, and g_i and h_j what arrived for them. x is q,
// or k in the transposed problem, whose bias belongs to the rows; or both: of q with itself the second term is that of
// s_ji, of which row j is the row.
#include "gradient.h"
#include "sides.h"

namespace sslkern::cuda {

// What the gradient of x is made of beside the features.
struct Gradient {
  const float *row_lse, *row_grad;     // [n], or null: only columns count
  const float *own_bias, *other_bias;  // [n], of row i in s_ij and in what h_j belongs to (s_ij, s_ji); or null
  const float* apart;                  // of sides_columns
  const float* fold;                   // or null: 1
  float *dx, *dscale, *dbias;          // [splits, n, whole(d)], [blocks, 8], [splits, n]; or null
  int tiles, each;                     // of columns, and of those in a split
  int with_columns, biased;            // whether columns count; whether there is any bias
};

// The dot products s become weights, by one exponential. Returns the sum of weights times dot products.
template <int S>
SSLKERN_DEVICE float weigh_together(float (&s)[S], uint32_t near, const float (&own)[2], const float (&shift)[2],
                                    float c) {
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < S; k += 4) {
    float of_column[2];
    load_shared(near + 8 * k, of_column[0], of_column[1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float dot = s[k + e];
      s[k + e] = (own[e / 2] + of_column[e % 2]) * exp2_fast(c * dot + shift[e / 2]);
      sum += s[k + e] * dot;
    }
  }
  return sum;
}

// The same by two exponentials. of_bias: adds the sums over columns of the terms that the bias of the rows is in, which
// are the columns' terms and, times `both`, the rows'.
template <int S>
SSLKERN_DEVICE float weigh_apart(float (&s)[S], const float* columns, const float (&grad)[2], const float (&own)[2],
                                 const float (&other)[2], float c, float both, float (&of_bias)[2]) {
  constexpr int WIDTH = 2 * S;
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < S; ++k) {
    const int h = k / 2 % 2, column = k / 4 * 8 + k % 2;
    const float shift = own[h] + columns[WIDTH + column], other_shift = other[h] + columns[2 * WIDTH + column];
    // What a bias takes out may be anything.
    const float dot = fmaxf(shift, other_shift) == -INFINITY ? 0.f : s[k];
    const float of_row = grad[h] * exp2_fast(c * dot + shift);
    const float of_column = columns[column] * exp2_fast(c * dot + other_shift);
    s[k] = of_row + of_column;
    sum += s[k] * dot;
    of_bias[h] += both * of_row + of_column;
  }
  return sum;
}

template <int D>
struct LseWeights {
  static constexpr int WIDTH = D > 128 ? 64 : 128, STAGES = D > 128 ? 4 : D > 64 ? 5 : 8, NEAR = WIDTH + PAST;

  const Problem& p;
  const Gradient& given;
  const int i;
  float c, r[2], g[2];  // of the rows i and i + 8
  float scale_sum = 0.f, bias_sums[2] = {};
  Asks<WIDTH> asks;

  SSLKERN_DEVICE LseWeights(const Problem& p, const Gradient& given, int i)
      : p(p), given(given), i(i), c(scale_in_base_2(p)) {
    // A scale of 0 becomes one that no sum can tell from it, so that a product can still take its pair away.
    if (fabsf(c) < 1e-25f) c = 1e-25f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = i + 8 * h;
      const bool counts = row < p.n && given.row_lse != nullptr;
      r[h] = counts ? base_2(given.row_lse[row]) : INFINITY;
      g[h] = counts ? arrived(given.row_grad[row], given.row_lse[row], fold_of(given.fold)) : 0.f;
    }
  }

  template <int S>
  SSLKERN_DEVICE void weigh(float (&s)[S], int t, uint32_t near, bool first) {
    const int lane = lane_id(), j = t * WIDTH + lane % 4 * 2;
    if (asks.anything(p, i, t, first)) leave_out(s, p, asks.of(t), i, j, c < 0.f ? 1e30f : -1e30f);
    float shift, spread;
    load_shared(near + WIDTH * 4, shift, spread);
    // Products of rows beyond the last are 0, and 2^-m is their only factor.
    const bool close = spread < SPREAD && !(shift - fminf(r[0], r[1]) >= ABOVE) && (shift > -ABOVE || i < p.n - 8);
    if (any_lane(given.biased || (given.with_columns && !close))) {
      float own[2], other[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = i + 8 * h < p.n ? i + 8 * h : p.n - 1;
        own[h] = (given.own_bias == nullptr ? 0.f : LOG2_E * given.own_bias[row]) - r[h];
        other[h] = given.other_bias == nullptr ? 0.f : LOG2_E * given.other_bias[row];
        if (i + 8 * h >= p.n) own[h] = other[h] = -INFINITY;
      }
      const float* const columns = given.apart + int64_t(t) * 3 * WIDTH + lane % 4 * 2;
      scale_sum += weigh_apart(s, columns, g, own, other, c, p.itself ? 0.f : 1.f, bias_sums);
    } else {
      float own[2], shifts[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        own[h] = given.with_columns ? g[h] * exp2_fast(shift - r[h]) : g[h];
        shifts[h] = given.with_columns ? -shift : -r[h];
      }
      scale_sum += weigh_together(s, near + lane % 4 * 8, own, shifts, c);
    }
  }

  SSLKERN_DEVICE float unfold() const { return unfold_of(given.fold); }
  SSLKERN_DEVICE void end_row(int, int64_t, bool) const {}
};

template <class T, int D>
__global__ void __launch_bounds__(3 * WARPGROUP, 1)
    gradient_rows(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
                  const __grid_constant__ TensorMap near_map, const Problem p, const Gradient given) {
  own_rows<T, D, LseWeights<D>>(x_map, y_map, &near_map, p, given);
}

// ---- afterwards, in a fixed order -----------------------------------------------------------------------------------

// to[at] = sum of from[part][at], of `count` numbers.
__global__ void __launch_bounds__(THREADS) gradient_of_parts(int64_t count, int parts, const float* from, float* to) {
  const int64_t at = block_id() * THREADS + thread_id();
  if (at >= count) return;
  float sum = 0.f;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) sum += from[part * count + at];
  to[at] = sum;
}

// The gradient of the scale, times `factor`. One warp.
__global__ void __launch_bounds__(WARP) gradient_of_scale(int64_t parts, const float* from, float factor, float* to) {
  float sum = 0.f;
#pragma unroll 8
  for (int64_t part = thread_id(); part < parts; part += WARP) sum += from[part];
  for (int by = 1; by < WARP; by *= 2) sum += exchange(sum, by, WARP);
  if (thread_id() == 0) *to = factor * sum;
}

}  // namespace sslkern::cuda
