// What the kernels of whole losses of few pairs share: rows that are divided by their length on their way into a
// product, the products of a pass over the keys, and what a row does to the loss.
#pragma once

#include "matrix.h"
#include "rows.h"

namespace sslkern::cuda {

constexpr int ROWS = 16;  // of a product
constexpr int WARPS = THREADS / WARP;
constexpr int STEP = 32;  // features of a step: 8 of each of the four lanes that have a row

enum Mode : int {
  VIEWS,    // the negatives of a row of x or y are rows of both
  ONE_WAY,  // rows of y for each of x
  TWO_WAY,  // also rows of x for each of y
  SIGMOID,  // each pair is a question of its own, the positive one too
  LABELS    // the positives of a row of x are the others with its id, its negatives those with another one
};
constexpr int BANK = 2;  // side 0 is x, 1 is y, and this one has negatives of x alone

struct Pairs {
  const void *x, *y;                        // [n, d]
  const void* bank;                         // [m, d], or null
  const int64_t* ids;                       // [n], pairs of rows with equal ids are no negatives; null: all differ
  const float *scale_tensor, *bias_tensor;  // [], or null: 1
  float scale, bias;                        // the bias is of SIGMOID
  int n, m, d, mode;
  bool normalize, unit_bank;  // x and y; the bank
  bool whole;                 // rows are multiples of 16 bytes

  SSLKERN_DEVICE const void* rows(int side) const { return side == 0 ? x : side == BANK ? bank : y; }
  SSLKERN_DEVICE int count(int side) const { return side == BANK ? m : n; }
  SSLKERN_DEVICE bool divides(int side) const { return side == BANK ? unit_bank : normalize; }
};

SSLKERN_DEVICE float scale_of(const Pairs& p) {
  return p.scale_tensor == nullptr ? p.scale : p.scale * *p.scale_tensor;
}
SSLKERN_DEVICE float bias_of(const Pairs& p) { return p.bias_tensor == nullptr ? p.bias : p.bias * *p.bias_tensor; }

// Keys come in blocks of 8 of one side: `first` and those that follow, which beyond the last are none.
struct Keys {
  int side, first;
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// By what a row is divided: its length, EPS if it is shorter, or infinity.
struct Length {
  float length = 1.f, inverse = 1.f;  // 1 and 0: infinity

  SSLKERN_DEVICE Length() {}
  SSLKERN_DEVICE explicit Length(float given) {
    length = given == INFINITY ? 1.f : given;
    inverse = given == INFINITY ? 0.f : 1.f / given;
  }
  // As an exact division rounds.
  SSLKERN_DEVICE float divided(float x) const {
    const float quotient = x * inverse;
    return fmaf(fmaf(-quotient, length, x), inverse, quotient);
  }
};

// From the square of the length; a gradient divided by EPS would be infinite in fp16.
template <class T>
SSLKERN_DEVICE float length_of(float square) {
  const float length = sqrtf(square);
  return length < EPS ? (SAME<T, fp16> ? INFINITY : EPS) : length;
}

// Number `at` of rows x or y after the division, rounded.
template <class T>
SSLKERN_DEVICE float unit_of(const Pairs& p, const T* rows, int64_t at, const Length& by) {
  return to_float(p.normalize ? from_float<T>(by.divided(to_float(rows[at]))) : rows[at]);
}

template <class T>
struct alignas(16) Vector {
  static constexpr int NUMBERS = 16 / sizeof(T);
  T at[NUMBERS];
};

// What a lane has of a row in a step.
template <class T>
struct Features {
  float at[8];

  SSLKERN_DEVICE void load(const Pairs& p, int side, int row, int feature) {
    constexpr int N = Vector<T>::NUMBERS;
    const T* const from = static_cast<const T*>(p.rows(side)) + int64_t(row) * p.d + feature;
    if (row >= p.count(side) || feature >= p.d) {
#pragma unroll
      for (int i = 0; i < 8; i++) at[i] = 0.f;
    } else if (p.whole) {
#pragma unroll
      for (int v = 0; v < 8 / N; v++) {
        const Vector<T> some = reinterpret_cast<const Vector<T>*>(from)[v];
#pragma unroll
        for (int i = 0; i < N; i++) at[v * N + i] = to_float(some.at[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) at[i] = feature + i < p.d ? to_float(from[i]) : 0.f;
    }
  }
  // Divided by its length, and not yet rounded.
  SSLKERN_DEVICE void load_unit(const Pairs& p, int side, int row, int feature, const Length& by) {
    load(p, side, row, feature);
    if (!p.divides(side)) return;
#pragma unroll
    for (int i = 0; i < 8; i++) at[i] = by.divided(at[i]);
  }
};

// Of the row that four lanes have.
SSLKERN_DEVICE float sum_of_four(float x) {
  x += exchange(x, 1);
  return x + exchange(x, 2);
}

// The length of row r of each of these keys, 1 where rows stay as they are; all loads of a step are under way together.
template <class T, int BLOCKS>
SSLKERN_DEVICE void row_lengths(float (&lengths)[BLOCKS], const Pairs& p, const Keys (&keys)[BLOCKS]) {
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) lengths[b] = 1.f;
  if (!p.divides(keys[0].side)) return;  // both x and y or neither
  float squares[BLOCKS] = {};
#pragma unroll 1
  for (int step = 0; step < p.d; step += STEP) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      Features<T> x;
      x.load(p, keys[b].side, keys[b].first + thread_id() % WARP / 4, step + thread_id() % 4 * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) squares[b] = fmaf(x.at[i], x.at[i], squares[b]);
    }
  }
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) lengths[b] = length_of<T>(sum_of_four(squares[b]));
}
template <class T>
SSLKERN_DEVICE float row_length(const Pairs& p, int side, int row) {
  const Keys keys[1] = {{side, row - thread_id() % WARP / 4}};
  float length[1];
  row_lengths<T>(length, p, keys);
  return length[0];
}

// ---- products -------------------------------------------------------------------------------------------------------

// Factors have 16 bits. A number of 32 is the sum of three, each of which has what those before it leave, and a product
// that of the six pairs which are not smaller than its rounding.
template <class T>
struct FactorOf {
  using type = T;
};
template <>
struct FactorOf<float> {
  using type = bf16;
};
template <class T>
using Factor = typename FactorOf<T>::type;
template <class T>
constexpr int PARTS = SAME<T, float> ? 3 : 1;

// Two numbers as factors, the first in the lower half.
template <class T>
SSLKERN_DEVICE void split(float low, float high, uint32_t (&parts)[PARTS<T>]) {
#pragma unroll
  for (int i = 0; i < PARTS<T>; i++) {
    parts[i] = packed<Factor<T>>(low, high);
    low -= to_float(Factor<T>{static_cast<uint16_t>(parts[i])});
    high -= to_float(Factor<T>{static_cast<uint16_t>(parts[i] >> 16)});
  }
}

// d += the product of which `add(d, i, j)` is that of the parts i and j of its factors.
template <class T, class Add>
SSLKERN_DEVICE void add_parts(float (&d)[4], const Add& add) {
  if constexpr (PARTS<T> == 1) {
    add(d, 0, 0);
  } else {  // by itself, as matrix units do not round to the nearest, and from the smallest on
    float sum[4] = {};
#pragma unroll
    for (int both = PARTS<T> - 1; both >= 0; both--)
#pragma unroll
      for (int i = 0; i <= both; i++) add(sum, i, both - i);
#pragma unroll
    for (int e = 0; e < 4; e++) d[e] += sum[e];
  }
}

// Features of a lane as two times two registers of mma. Both factors have the features of a step in the same order,
// which is not the order in memory.
template <class T>
struct Operand {
  uint32_t words[PARTS<T>][4];

  SSLKERN_DEVICE Operand() {}
  SSLKERN_DEVICE explicit Operand(const Features<T>& from) {
#pragma unroll
    for (int w = 0; w < 4; w++) {
      uint32_t parts[PARTS<T>];
      split<T>(from.at[2 * w], from.at[2 * w + 1], parts);
#pragma unroll
      for (int i = 0; i < PARTS<T>; i++) words[i][w] = parts[i];
    }
  }
  // Of factors that lie so far from part to part.
  SSLKERN_DEVICE void load(const Factor<T>* from, int apart) {
#pragma unroll
    for (int i = 0; i < PARTS<T>; i++) {
      const uint4 all = *reinterpret_cast<const uint4*>(from + i * apart);
      words[i][0] = all.x, words[i][1] = all.y, words[i][2] = all.z, words[i][3] = all.w;
    }
  }
  SSLKERN_DEVICE void store(Factor<T>* to, int apart) const {
#pragma unroll
    for (int i = 0; i < PARTS<T>; i++)
      *reinterpret_cast<uint4*>(to + i * apart) = uint4{words[i][0], words[i][1], words[i][2], words[i][3]};
  }
};

// d += a b over a step; a of rows r and r + 8.
template <class T>
SSLKERN_DEVICE void multiply(float (&d)[4], const Operand<T>& a, const Operand<T>& a8, const Operand<T>& b) {
  add_parts<T>(d, [&](float (&to)[4], int i, int j) {
    mma<Factor<T>>(to, a.words[i][0], a8.words[i][0], a.words[i][1], a8.words[i][1], b.words[j][0], b.words[j][1]);
    mma<Factor<T>>(to, a.words[i][2], a8.words[i][2], a.words[i][3], a8.words[i][3], b.words[j][2], b.words[j][3]);
  });
}

// The rows of a block in shared memory as factors [PARTS, TILES * ROWS, pitch].
template <class T, int TILES>
struct Own {
  Factor<T>* at;
  int pitch;

  static SSLKERN_DEVICE int pitch_of(int d) { return (d + 63) / 64 * 64 + 32; }  // 64 bytes more, for the banks
  SSLKERN_DEVICE int apart() const { return TILES * ROWS * pitch; }
  // From row `first` of a side on, divided by `length_of_row`. Each warp has 8 rows, and a share of the steps.
  template <class Lengths>
  SSLKERN_DEVICE void load(const Pairs& p, int side, int first, const Lengths& length_of_row) const {
    constexpr int GROUPS = TILES * ROWS / 8;
    static_assert(WARPS % GROUPS == 0);
    const int warp = thread_id() / WARP, row = warp % GROUPS * 8 + thread_id() % WARP / 4, c = thread_id() % 4;
    const Length by(length_of_row(first + row));
#pragma unroll 1
    for (int step = warp / GROUPS * STEP; step < p.d; step += WARPS / GROUPS * STEP) {
      Features<T> x;
      x.load_unit(p, side, first + row, step + 8 * c, by);
      Operand<T>(x).store(at + row * pitch + step + 8 * c, apart());
    }
    sync_block();
  }
};

// Features of keys in shared memory, as T: the rows of a pass, each of `width` numbers.
template <class T>
SSLKERN_DEVICE constexpr int units_pitch(int width) {
  return width + 16 / int(sizeof(T));
}

// s = the products of own rows and a warp's keys, which also become `units`, from its own first row on, if that is not
// null.
template <class T, int TILES, int BLOCKS>
SSLKERN_DEVICE void products_with_keys(float (&s)[TILES][BLOCKS][4], const Pairs& p, const Own<T, TILES>& own,
                                       const Keys (&keys)[BLOCKS], const Length (&by)[BLOCKS], T* units, int pitch) {
  const int r = thread_id() % WARP / 4, c = thread_id() % 4;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[t][b][e] = 0.f;
#pragma unroll 1
  for (int step = 0; step < p.d; step += STEP) {
    Operand<T> k[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      Features<T> x;
      x.load_unit(p, keys[b].side, keys[b].first + r, step + 8 * c, by[b]);
      k[b] = Operand<T>(x);
      if (units == nullptr) continue;
      T* const to = units + (8 * b + r) * pitch + step + 8 * c;
      if constexpr (PARTS<T> == 1) {
        k[b].store(to, 0);
      } else {
#pragma unroll
        for (int v = 0; v < 2; v++)
          *reinterpret_cast<Vector<T>*>(to + 4 * v) = {x.at[4 * v], x.at[4 * v + 1], x.at[4 * v + 2], x.at[4 * v + 3]};
      }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      Operand<T> a, a8;
      a.load(own.at + (t * ROWS + r) * own.pitch + step + 8 * c, own.apart());
      a8.load(own.at + (t * ROWS + r + 8) * own.pitch + step + 8 * c, own.apart());
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) multiply<T>(s[t][b], a, a8, k[b]);
    }
  }
}

// Weights of own rows and the keys of a pass in shared memory, as factors [PARTS, TILES * ROWS, PASS + 8].
template <class T, int TILES, int PASS>
struct Weights {
  static constexpr int PITCH = PASS + 8;  // 16 bytes more, for the banks
  static constexpr int APART = TILES * ROWS * PITCH;
  Factor<T>* at;

  // Of keys `column` and the next.
  SSLKERN_DEVICE void store(int row, int column, float low, float high) const {
    uint32_t parts[PARTS<T>];
    split<T>(low, high, parts);
#pragma unroll
    for (int i = 0; i < PARTS<T>; i++) *reinterpret_cast<uint32_t*>(at + i * APART + row * PITCH + column) = parts[i];
  }

  // sums += the product with the first `count` units, of which each warp has SLICE times 8 features.
  template <int SLICE>
  SSLKERN_DEVICE void add_product(float (&sums)[TILES][SLICE][4], const T* units, int pitch, int count) const {
    const int warp = thread_id() / WARP, lane = thread_id() % WARP;
#pragma unroll 2
    for (int k = 0; k < PASS && k < count; k += 16) {
      uint32_t a[TILES][PARTS<T>][4];
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < PARTS<T>; i++)
          load_matrices(a[t][i], at + i * APART + (t * ROWS + lane % 16) * PITCH + k + lane / 16 * 8);
#pragma unroll
      for (int f = 0; f < SLICE; f += 2) {
        uint32_t b[PARTS<T>][4];
        load_columns(b, units + k * pitch + (warp * SLICE + f) * 8, pitch);
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int h = 0; h < 2; h++)
            add_parts<T>(sums[t][f + h], [&](float (&to)[4], int i, int j) {
              mma<Factor<T>>(to, a[t][i][0], a[t][i][1], a[t][i][2], a[t][i][3], b[j][2 * h], b[j][2 * h + 1]);
            });
      }
    }
  }

  // 16 features of 16 units as two factors of mma.
  static SSLKERN_DEVICE void load_columns(uint32_t (&b)[PARTS<T>][4], const T* units, int pitch) {
    const int lane = thread_id() % WARP;
    if constexpr (PARTS<T> == 1) {
      load_matrices_transposed(b[0], units + lane % 16 * pitch + lane / 16 * 8);
    } else {
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const T* const from = units + (w % 2 * 8 + lane % 4 * 2) * pitch + w / 2 * 8 + lane / 4;
        uint32_t parts[PARTS<T>];
        split<T>(from[0], from[pitch], parts);
#pragma unroll
        for (int i = 0; i < PARTS<T>; i++) b[i][w] = parts[i];
      }
    }
  }
};

// ---- the loss of a row ----------------------------------------------------------------------------------------------

SSLKERN_DEVICE float exponential(float x) { return exp2_fast(x * LOG2_E); }

// What is subtracted before the exponential: 0 where nothing has counted yet.
SSLKERN_DEVICE float shift_of(float maximum) { return maximum == -INFINITY ? 0.f : maximum; }

// A sum of exponentials, and the maximum of the scores, by which they are shifted.
struct Sum {
  float maximum, sum;

  SSLKERN_DEVICE void add(const Sum& other) {
    const float both = fmaxf(maximum, other.maximum), shift = shift_of(both);
    sum = sum * exponential(maximum - shift) + other.sum * exponential(other.maximum - shift);
    maximum = both;
  }
  SSLKERN_DEVICE float lse() const { return shift_of(maximum) + logf(sum); }
  SSLKERN_DEVICE float best() const { return sum == sum ? maximum : sum; }  // NaN where a score is
};

// How far the log-sum-exp of a row's negatives is above its positive; NaN where one of them is +inf, as in
// cross-entropy.
SSLKERN_DEVICE float gap_of(float lse, float positive) {
  return lse == INFINITY || positive == INFINITY ? INFINITY - INFINITY : lse - positive;
}
SSLKERN_DEVICE float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }
SSLKERN_DEVICE float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return x >= 0.f ? 1.f / (1.f + e) : e / (1.f + e);
}

// What `both` of two makes of what the threads of a block have, in one order; all threads get it.
template <class Both>
SSLKERN_DEVICE float of_block(float x, const Both& both) {
  __shared__ float parts[WARPS];
  for (int by = 1; by < WARP; by *= 2) x = both(x, exchange(x, by));
  sync_block();  // the parts of a call before have been read
  if (thread_id() % WARP == 0) parts[thread_id() / WARP] = x;
  sync_block();
  float all = parts[0];
  for (int w = 1; w < WARPS; w++) all = both(all, parts[w]);
  return all;
}
SSLKERN_DEVICE float block_sum(float x) {
  return of_block(x, [](float a, float b) { return a + b; });
}
SSLKERN_DEVICE float block_max(float x) {
  return of_block(x, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace sslkern::cuda
