// `similarity_softplus` for many features: sums of softplus over rows, and the weights
//
//     w_ij = weight_i sign sigmoid(t_ij)      t_ij = sign (s_ij + bias_i)
//
// of a strip of rows (weights.h), from the same scores.
#include "softplus.h"
#include "weights.h"

namespace sslkern::cuda {

// What is wanted of the pairs of a problem, which is a strip of rows of a larger one.
struct SoftplusWeights {
  Terms terms;
  float *rows, *bias_parts;  // [ceil(m / COLUMNS), n]: of tiles of columns sums of softplus(t_ij); of w_ij, or null
  float* k_bias_parts;       // [ceil(n / 16), m]: sums of w_ij over 16 rows; or null
  float* scale_parts;        // sums of w_ij <q_i, k_j>, eight of each unit of work; or null
  int slots, stages;         // as weights.h has them
  bool weights;              // whether weights are wanted, or their sums alone
};

template <class T>
struct SoftplusTile : Tile {
  static_assert(COLUMNS / 4 <= Softplus::MOST);

  const SoftplusWeights& w;
  float next_shift[2], next_weight[2];  // of the rows of the next tile
  float shift[2], weights[2];
  Softplus sums[2];
  float bias_sums[2];
  float column_shift;  // where pairs are weighed by themselves

  SSLKERN_DEVICE SoftplusTile(const Problem& p, const SoftplusWeights& w, const TensorMap& out, uint32_t panels)
      : Tile(p, out, w.terms.sign * scale_in_base_2(p), panels), w(w) {}

  SSLKERN_DEVICE void begin_columns(int first) { column = first; }

  SSLKERN_DEVICE void prefetch_rows(int first) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      next_shift[i] = w.terms.shift(row_of(first, i));
      next_weight[i] = w.terms.sign * w.terms.folded() * w.terms.weight(row_of(first, i));
    }
  }

  SSLKERN_DEVICE void begin_rows(int first, uint32_t tile_asks) {
    row = first;
    asks = tile_asks;
    each = asks != ALL_COUNT || p.bias != nullptr || w.terms.sign < 0.f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      shift[i] = next_shift[i];
      weights[i] = next_weight[i];
      sums[i] = Softplus();
      bias_sums[i] = 0.f;
    }
  }

  SSLKERN_DEVICE void part(float* d, int n) {
    if (each) {
      weigh_each(*this, d, n, w.k_bias_parts);
    } else {
#pragma unroll
      for (int j = 4 * n; j < 4 * n + 4; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = d[j / 2 * 4 + 2 * i + j % 2];
          const float weight = weights[i] * sums[i].add(fmaf(score, scale, shift[i]));
          scale_sum += weight * score;
          bias_sums[i] += weight;
          score = weight;
        }
    }
    if (w.weights) write<T>(d, n);
    if (n == PARTS - 1) end_rows();
  }

  SSLKERN_DEVICE void begin_rows_of_each(const Name (&)[2]) {}
  SSLKERN_DEVICE bool begin_column(int right) {
    const int j = column + lane % 4 * 2 + right;
    const float bias = p.bias == nullptr || j >= p.m ? 0.f : p.bias[j];
    column_shift = w.terms.in_base_2(bias);
    return bias != -INFINITY;
  }
  SSLKERN_DEVICE float weight(int i, float score, bool counts) {
    counts = counts && !w.terms.leaves_out(score * scale);
    const float slope = sums[i].add(counts ? fmaf(score, scale, shift[i] + column_shift) : -INFINITY);
    const float weight = counts ? weights[i] * slope : 0.f;
    bias_sums[i] += weight;
    return weight;
  }

  // Of a tile.
  SSLKERN_DEVICE void end_rows() const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = sums[i].sum(), of_bias = bias_sums[i];
#pragma unroll
      for (int by = 1; by < 4; by *= 2) {
        sum += exchange(sum, by);
        of_bias += exchange(of_bias, by);
      }
      const int at = row + lane / 4 + 8 * i;
      if (lane % 4 > 0 || at >= p.n || column >= p.m) continue;
      const int64_t to = column / COLUMNS * int64_t(p.n) + at;
      w.rows[to] = sum;
      if (w.bias_parts != nullptr) w.bias_parts[to] = of_bias;
    }
  }

  SSLKERN_DEVICE void end_unit(int unit, int eighth, int) { end_scale(w.scale_parts, unit, eighth); }
};

template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    softplus_chunks(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                    const __grid_constant__ TensorMap out, const Problem p, const SoftplusWeights w) {
  chunks_of_weights<T, SoftplusTile<T>>(q, k, out, p, w);
}

template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    softplus_stream(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                    const __grid_constant__ TensorMap out, const Problem p, const SoftplusWeights w) {
  stream_of_weights<T, SoftplusTile<T>>(q, k, out, p, w);
}

}  // namespace sslkern::cuda
