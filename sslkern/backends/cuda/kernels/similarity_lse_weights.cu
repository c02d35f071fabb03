// The backward of `similarity_lse` for many features: the weights w_ij (sides.h) of a strip of rows (weights.h).
//
// Per pair of tiles of 64 x 128 with 512 features the matrix units need 4096 cycles, shared memory 4608, exponentials
// 1024, and the schedulers some 1960 instructions each (docs/gpu.md).
#include "sides.h"
#include "weights.h"

namespace sslkern::cuda {

// What is wanted of the pairs of a problem, which is a strip of rows of a larger one.
struct Weights {
  const float *row_lse, *row_grad;  // [n], or null: only columns count
  const float *near, *apart;        // of sides_columns, for tiles of COLUMNS
  const float* fold;                // or null: 1
  float* scale_parts;               // sums of w_ij <q_i, k_j>, eight of each unit of work; or null
  float* bias_parts;                // [ceil(n / 16), m]: sums of w_ij over 16 rows; or null
  int slots;                        // of weights_chunks: by how many blocks a block of keys is shared
  int stages;                       // of a ring
  bool with_columns;                // whether columns count
  bool symmetric;                   // w = w^T: the columns from n on stand for rows that no strip visits, too
};

struct alignas(8) Two {
  float first, second;
};

template <class T>
struct LseTile : Tile {
  const Weights& w;
  float factors[COLUMNS / 4], middle;  // of columns
  bool close;
  float of_rows[2], shift[2];
  float next_lse[2], next_grad[2];  // of the rows of the next tile
  // Where pairs are weighed by themselves:
  float lse[2], grad[2], column_grad, column_bias, column_shift;

  SSLKERN_DEVICE LseTile(const Problem& p, const Weights& w, const TensorMap& out, uint32_t panels)
      : Tile(p, out, scale_in_base_2(p), panels), w(w) {}

  // The tile of columns that `column` is in, in arrays that have `size` numbers for each; the last where there is none.
  SSLKERN_DEVICE const float* of_tile(const float* all, int size) const {
    return all + (column < p.m ? column : p.m - 1) / COLUMNS * int64_t(size) + lane % 4 * 2;
  }

  SSLKERN_DEVICE void begin_columns(int first) {
    column = first;
    const float* near = of_tile(w.near, COLUMNS + PAST);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      const Two both = *reinterpret_cast<const Two*>(near + 8 * j);
      factors[2 * j] = both.first;
      factors[2 * j + 1] = both.second;
    }
    middle = near[COLUMNS - lane % 4 * 2];
    close = near[COLUMNS - lane % 4 * 2 + 1] < SPREAD;
  }

  SSLKERN_DEVICE void prefetch_rows(int first) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      next_lse[i] = w.row_lse == nullptr ? -INFINITY : w.row_lse[row_of(first, i)];
      next_grad[i] = w.row_lse == nullptr ? 0.f : w.row_grad[row_of(first, i)];
    }
  }

  SSLKERN_DEVICE void begin_rows(int first, uint32_t tile_asks) {
    row = first;
    asks = tile_asks;
    each = asks != ALL_COUNT || p.bias != nullptr;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      shift[i] = base_2(next_lse[i]);
      of_rows[i] = arrived(next_grad[i], next_lse[i], fold_of(w.fold));
      if (w.with_columns) {
        of_rows[i] *= exp2_fast(middle - shift[i]);
        each = each || !close || middle - shift[i] >= ABOVE;
        shift[i] = middle;
      }
    }
    each = any_lane(each);
  }

  SSLKERN_DEVICE void part(float* d, int n) {
    if (each) {
      weigh_each(*this, d, n, w.bias_parts);
    } else {
#pragma unroll
      for (int j = 4 * n; j < 4 * n + 4; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = d[j / 2 * 4 + 2 * i + j % 2];
          const float weight = (of_rows[i] + factors[j]) * exp2_fast(score * scale - shift[i]);
          scale_sum += weight * score;
          score = weight;
        }
    }
    write<T>(d, n);
  }

  // By two exponentials: for any log-sum-exps.
  SSLKERN_DEVICE void begin_rows_of_each(const Name (&queries)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float x = w.row_lse == nullptr ? -INFINITY : w.row_lse[queries[i].at];
      lse[i] = base_2(x);
      grad[i] = w.row_lse == nullptr ? 0.f : arrived(w.row_grad[queries[i].at], x, fold_of(w.fold));
    }
  }
  SSLKERN_DEVICE bool begin_column(int right) {
    const float* apart = of_tile(w.apart, 3 * COLUMNS) + right;
    column_grad = apart[0];
    column_bias = apart[COLUMNS];
    column_shift = apart[2 * COLUMNS];
    return column_bias != -INFINITY;
  }
  SSLKERN_DEVICE float weight(int i, float score, bool counts) const {
    const float weight = grad[i] * exp2_fast(score * scale + (column_bias - lse[i])) +
                         column_grad * exp2_fast(score * scale + column_shift);
    return counts ? weight : 0.f;
  }

  SSLKERN_DEVICE void end_unit(int unit, int eighth, int from) {
    // of a symmetric problem w_ij came as w_ji, too
    end_scale(w.scale_parts, unit, eighth, w.symmetric && from < p.n ? 0.5f : 1.f);
  }
};

template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    weights_chunks(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                   const __grid_constant__ TensorMap out, const Problem p, const Weights w) {
  chunks_of_weights<T, LseTile<T>>(q, k, out, p, w);
}

template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    weights_stream(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                   const __grid_constant__ TensorMap out, const Problem p, const Weights w) {
  stream_of_weights<T, LseTile<T>>(q, k, out, p, w);
}

}  // namespace sslkern::cuda
