// The loss of pairs as a whole, for batches so small that they wait for launches.
//
//     s_ij = scale <u_i, v_j>, u = x / |x|, v = y / |y|      lse_i = log of the sum of exp(s_ij) over the negatives
//     loss_i = softplus(lse_i - s_ii)      weight_i = share sigmoid(lse_i - s_ii)      toward_i: that of both sides
//     du_i = scale (sum_j (weight_i exp(s_ij - lse_i) + weight_j exp(s_ij - lse_j)) v_j - toward_i v_i)
//
// `pair_scores` makes the lse, `pair_gradients` the loss and, for an upstream gradient of 1, the gradients, which
// `scaled_gradients` multiplies by the true one. Each block normalises what it reads, u and v rounded to the type of
// the features, as that takes less time than a launch. A block has 16 rows of one side, and its warps share the keys.
#include "matrix.h"

namespace sslkern::cuda {

constexpr int ROWS = 16;  // of a block
constexpr int WARPS = THREADS / WARP;
constexpr int STEP = 32;  // features of a step: 8 of each of the four lanes that have a row

enum Mode : int {
  VIEWS,    // the negatives of a row of x or y are rows of both
  ONE_WAY,  // rows of y for each of x
  TWO_WAY   // also rows of x for each of y
};

struct Pairs {
  const void *x, *y;          // [n, d]
  const int64_t* ids;         // [n], pairs of rows with equal ids are no negatives; null: all differ
  const float* scale_tensor;  // [], or null: 1
  float scale;
  int n, d, mode;
  bool normalize;
  bool whole;  // rows are multiples of 16 bytes
};

// Side 0 is x, 1 is y. Whether rows of a side have negatives.
SSLKERN_DEVICE bool contrasted(const Pairs& p, int side) { return side == 0 || p.mode != ONE_WAY; }

// Keys come in blocks of 8 of one side: `first` and those that follow, which beyond the last are none.
struct Keys {
  int side, first;
};

SSLKERN_DEVICE int key_blocks(const Pairs& p) { return (p.n + 7) / 8 * (p.mode == VIEWS ? 2 : 1); }
SSLKERN_DEVICE Keys keys_of(const Pairs& p, int side, int block) {
  const int each = (p.n + 7) / 8;
  if (p.mode != VIEWS) return {1 - side, block < each ? 8 * block : p.n};
  return {block < each ? 0 : 1, block < 2 * each ? 8 * (block < each ? block : block - each) : p.n};
}

SSLKERN_DEVICE float scale_of(const Pairs& p) {
  return p.scale_tensor == nullptr ? p.scale : p.scale * *p.scale_tensor;
}

// By what a row is divided: its length, EPS if it is shorter, or infinity.
struct Length {
  float length = 1.f, inverse = 1.f;  // 1 and 0: infinity

  SSLKERN_DEVICE Length() {}
  SSLKERN_DEVICE explicit Length(float given) {
    length = given == INFINITY ? 1.f : given;
    inverse = given == INFINITY ? 0.f : 1.f / given;
  }
  SSLKERN_DEVICE float given() const { return inverse == 0.f ? INFINITY : length; }
  // As an exact division rounds.
  SSLKERN_DEVICE float divided(float x) const {
    const float quotient = x * inverse;
    return fmaf(fmaf(-quotient, length, x), inverse, quotient);
  }
};

// From the square of the length; a gradient divided by EPS would be infinite in fp16.
template <class T>
SSLKERN_DEVICE float length_of(float square) {
  constexpr float EPS = 1e-12f;  // rows shorter than this are divided by it
  const float length = sqrtf(square);
  return length < EPS ? (SAME<T, fp16> ? INFINITY : EPS) : length;
}

// What a lane has of a row in a step, as two times two registers of mma. Both factors have the features of a step in
// the same order, which is not the order in memory.
template <class T>
struct Piece {
  uint32_t words[4];

  SSLKERN_DEVICE void load(const Pairs& p, int side, int row, int feature) {
    const T* from = static_cast<const T*>(side == 0 ? p.x : p.y) + int64_t(row) * p.d + feature;
    if (row >= p.n || feature >= p.d) {
      words[0] = words[1] = words[2] = words[3] = 0;
    } else if (p.whole) {
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t low = feature + 2 * i < p.d ? from[2 * i].bits : 0;
        const uint32_t high = feature + 2 * i + 1 < p.d ? from[2 * i + 1].bits : 0;
        words[i] = high << 16 | low;
      }
    }
  }
  SSLKERN_DEVICE void store(T* to) const {
    *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
  }
  // Divided by its length and rounded.
  SSLKERN_DEVICE void load_unit(const Pairs& p, int side, int row, int feature, const Length& by) {
    load(p, side, row, feature);
    if (!p.normalize) return;
#pragma unroll
    for (int i = 0; i < 4; i++)
      words[i] = packed<T>(by.divided(to_float(T{static_cast<uint16_t>(words[i])})),
                           by.divided(to_float(T{static_cast<uint16_t>(words[i] >> 16)})));
  }
};

// d += a b over a step; a of rows r and r + 8.
template <class T>
SSLKERN_DEVICE void multiply(float (&d)[4], const Piece<T>& a, const Piece<T>& a8, const Piece<T>& b) {
  mma<T>(d, a.words[0], a8.words[0], a.words[1], a8.words[1], b.words[0], b.words[1]);
  mma<T>(d, a.words[2], a8.words[2], a.words[3], a8.words[3], b.words[2], b.words[3]);
}

// The length of the row that four lanes have, 1 where rows stay as they are.
template <class T>
SSLKERN_DEVICE float row_length(const Pairs& p, int side, int row) {
  if (!p.normalize) return 1.f;
  float squares[4] = {};
  const int r = thread_id() % WARP / 4, c = thread_id() % 4;
  for (int step = 0; step < p.d; step += STEP) {
    Piece<T> piece;
    piece.load(p, side, row, step + 8 * c);
    multiply(squares, piece, piece, piece);
  }
  // Row r times itself is in the column r.
  return length_of<T>(from_lane(r % 2 == 0 ? squares[0] : squares[1], 4 * r + r / 2));
}

SSLKERN_DEVICE float exponential(float x) { return exp2_fast(x * LOG2_E); }

// What is subtracted before the exponential: 0 where nothing has counted yet.
SSLKERN_DEVICE float shift_of(float top) { return top == -INFINITY ? 0.f : top; }

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

// lse [2, n] of the negatives of each row, cosine [n] of each pair, lengths [2, n] of the rows (1 as they are), and, if
// asked for, the best [2, n] negative score and the positive [n]. Of two sides, or of x alone.
template <class T>
__global__ void __launch_bounds__(THREADS)
    pair_scores(Pairs p, float* lse, float* cosine, float* lengths, float* best, float* positive) {
  constexpr int BLOCKS = 4;  // of keys, of a warp at a time
  __shared__ float tops[WARPS][ROWS], sums[WARPS][ROWS];
  const int blocks = (p.n + ROWS - 1) / ROWS, side = int(block_id()) / blocks, first = int(block_id()) % blocks * ROWS;
  const int warp = thread_id() / WARP, lane = thread_id() % WARP, r = lane / 4, c = lane % 4;
  const float scale = scale_of(p);
  const int rows[2] = {first + r, first + r + 8};
  int64_t ids[2] = {rows[0], rows[1]};
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (p.ids != nullptr && rows[half] < p.n) ids[half] = p.ids[rows[half]];
  const Length length[2] = {Length(row_length<T>(p, side, rows[0])), Length(row_length<T>(p, side, rows[1]))};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
  for (int block = warp * BLOCKS; block < key_blocks(p); block += WARPS * BLOCKS) {
    float s[BLOCKS][4] = {};
    Length of_key[BLOCKS];
    Keys keys[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      keys[b] = keys_of(p, side, block + b);
      const int j = keys[b].first + r;
      const float found = row_length<T>(p, keys[b].side, j);
      if (p.mode == ONE_WAY && j / ROWS == first / ROWS && j < p.n && c == 0) lengths[p.n + j] = found;
      of_key[b] = Length(found);
    }
    for (int step = 0; step < p.d; step += STEP) {
      Piece<T> a, a8, k;
      a.load_unit(p, side, rows[0], step + 8 * c, length[0]);
      a8.load_unit(p, side, rows[1], step + 8 * c, length[1]);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        k.load_unit(p, keys[b].side, keys[b].first + r, step + 8 * c, of_key[b]);
        multiply(s[b], a, a8, k);
      }
    }
    const float before[2] = {top[0], top[1]};
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = rows[e / 2], j = keys[b].first + 2 * c + e % 2;
        const float cos = s[b][e];
        s[b][e] = cos * scale;
        if (i == j && side == 0 && keys[b].side == 1 && i < p.n) {
          cosine[i] = cos;
          if (positive != nullptr) positive[i] = cos * scale;
        }
        if (j >= p.n || ids[e / 2] == (p.ids == nullptr ? j : p.ids[j])) s[b][e] = -INFINITY;
        top[e / 2] = fmaxf(top[e / 2], s[b][e]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float shift = shift_of(top[half]);
      sum[half] *= exponential(before[half] - shift);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
        sum[half] += exponential(s[b][2 * half] - shift) + exponential(s[b][2 * half + 1] - shift);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    for (int by = 1; by < 4; by *= 2) {
      const float other = exchange(top[half], by), others = exchange(sum[half], by);
      const float both = fmaxf(top[half], other), shift = shift_of(both);
      sum[half] = sum[half] * exponential(top[half] - shift) + others * exponential(other - shift);
      top[half] = both;
    }
    if (c == 0) {
      tops[warp][r + 8 * half] = top[half];
      sums[warp][r + 8 * half] = sum[half];
      if (warp == 0 && rows[half] < p.n) lengths[side * p.n + rows[half]] = length[half].given();
    }
  }
  sync_block();
  const int i = first + thread_id();
  if (thread_id() >= ROWS || i >= p.n) return;
  float all = -INFINITY, total = 0.f;
  for (int w = 0; w < WARPS; w++) all = fmaxf(all, tops[w][thread_id()]);
  for (int w = 0; w < WARPS; w++) total += sums[w][thread_id()] * exponential(tops[w][thread_id()] - shift_of(all));
  lse[side * p.n + i] = shift_of(all) + logf(total);
  if (best != nullptr) best[side * p.n + i] = total == total ? all : total;  // NaN where a score is
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

// What a row does to the loss: sigmoid(lse - positive), 0 on a side without negatives.
SSLKERN_DEVICE float weight_of(const Pairs& p, const float* lse, float positive, int side, int i) {
  return contrasted(p, side) ? sigmoid(gap_of(lse[side * p.n + i], positive)) : 0.f;
}

// What weights of pairs are multiplied by on their way through fp16, where those of small losses and large batches
// would vanish: a power of two that brings the largest, of a row and a key that both weigh the most, near 2^14.
template <class T>
SSLKERN_DEVICE float fold_of(const Pairs& p, const float* lse, const float* cosine, float scale) {
  if constexpr (SAME<T, fp16>) {
    float largest = 0x1p-100f;
    for (int i = thread_id(); i < p.n; i += THREADS)
      for (int side = 0; side < 2; side++) largest = fmaxf(largest, weight_of(p, lse, cosine[i] * scale, side, i));
    return 0x1p13f * exp2f(-floorf(log2f(block_max(largest))));
  }
  return 1.f;
}

// From the results of `pair_scores`: loss [] = share * the sum of the losses, and, where they are asked for, for an
// upstream gradient of 1 grad [sides, n, d] of the sides that `grads` names (1: x, 2: y, 3: both) and dscale
// [2 * ceil(n / ROWS)] in parts. BLOCKS of 8 keys are a warp's in a pass, and SLICE times 8 features of all rows.
template <class T, int BLOCKS, int SLICE>
__global__ void __launch_bounds__(THREADS, 1)
    pair_gradients(Pairs p, const float* lse, const float* cosine, const float* lengths, float share, int grads,
                   float* loss, float* grad, float* dscale) {
  constexpr int KEYS = 8 * BLOCKS, PASS = WARPS * KEYS;
  constexpr int PITCH = WARPS * SLICE * 8 + 8, WEIGHTS_PITCH = PASS + 8;  // rows of T; 16 bytes more, for the banks
  T* units = reinterpret_cast<T*>(shared_bytes());                        // [PASS, PITCH]
  T* weights = units + PASS * PITCH;                                      // [ROWS, WEIGHTS_PITCH]
  __shared__ float parts[WARPS][ROWS];
  const int blocks = (p.n + ROWS - 1) / ROWS, side = int(block_id()) / blocks, first = int(block_id()) % blocks * ROWS;
  const int warp = thread_id() / WARP, lane = thread_id() % WARP, r = lane / 4, c = lane % 4;
  const float scale = scale_of(p);
  if (block_id() == 0) {
    float sum = 0.f;
    for (int i = thread_id(); i < p.n; i += THREADS)
      for (int of = 0; of < 2; of++)
        if (contrasted(p, of)) sum += softplus(gap_of(lse[of * p.n + i], cosine[i] * scale));
    sum = block_sum(sum);
    if (thread_id() == 0) *loss = sum * share;
  }
  const bool wanted = (grads >> side & 1) != 0;
  if (!wanted && (dscale == nullptr || !contrasted(p, side))) {
    if (dscale != nullptr && thread_id() == 0) dscale[block_id()] = 0.f;
    return;
  }

  const float fold = fold_of<T>(p, lse, cosine, scale), unfold = 1.f / fold;
  const int rows[2] = {first + r, first + r + 8};
  int64_t ids[2] = {rows[0], rows[1]};
  Length length[2], of_other[2];
  float lses[2] = {0.f, 0.f}, weight[2] = {0.f, 0.f}, toward[2] = {0.f, 0.f};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int i = rows[half];
    if (i >= p.n) continue;
    if (p.ids != nullptr) ids[half] = p.ids[i];
    length[half] = Length(lengths[side * p.n + i]);
    of_other[half] = Length(lengths[(1 - side) * p.n + i]);
    lses[half] = lse[side * p.n + i];
    weight[half] = weight_of(p, lse, cosine[i] * scale, side, i);
    toward[half] = weight[half] + weight_of(p, lse, cosine[i] * scale, 1 - side, i);
  }
  float sums[SLICE][4] = {}, of_scale = 0.f;
  for (int start = 0; start < key_blocks(p); start += WARPS * BLOCKS) {
    const int block = start + warp * BLOCKS;
    float s[BLOCKS][4] = {};
    Length of_key[BLOCKS];
    Keys keys[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      keys[b] = keys_of(p, side, block + b);
      const int j = keys[b].first + r;
      if (j < p.n) of_key[b] = Length(lengths[keys[b].side * p.n + j]);
    }
    for (int step = 0; step < p.d; step += STEP) {
      Piece<T> a, a8, k;
      a.load_unit(p, side, rows[0], step + 8 * c, length[0]);
      a8.load_unit(p, side, rows[1], step + 8 * c, length[1]);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        k.load_unit(p, keys[b].side, keys[b].first + r, step + 8 * c, of_key[b]);
        multiply(s[b], a, a8, k);
        k.store(units + (warp * KEYS + 8 * b + r) * PITCH + step + 8 * c);
      }
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      float weight_of_keys[2], lse_of_keys[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int j = keys[b].first + 2 * c + h;
        lse_of_keys[h] = j < p.n ? lse[keys[b].side * p.n + j] : 0.f;
        weight_of_keys[h] = j < p.n ? weight_of(p, lse, cosine[j] * scale, keys[b].side, j) : 0.f;
      }
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int half = e / 2, h = e % 2, j = keys[b].first + 2 * c + h;
        const float cos = s[b][e], score = cos * scale;
        const bool counts = rows[half] < p.n && j < p.n && ids[half] != (p.ids == nullptr ? j : p.ids[j]);
        float own = 0.f, other = 0.f;
        if (counts && weight[half] != 0.f) own = weight[half] * exponential(score - lses[half]);
        if (counts && weight_of_keys[h] != 0.f) other = weight_of_keys[h] * exponential(score - lse_of_keys[h]);
        if (counts) of_scale += own * cos;
        w[e] = fold * (own + other);
      }
      const int column = warp * KEYS + 8 * b + 2 * c;
      *reinterpret_cast<uint32_t*>(weights + r * WEIGHTS_PITCH + column) = packed<T>(w[0], w[1]);
      *reinterpret_cast<uint32_t*>(weights + (r + 8) * WEIGHTS_PITCH + column) = packed<T>(w[2], w[3]);
    }
    sync_block();
    if (wanted) {
#pragma unroll 2
      for (int k = 0; k < PASS && k < 8 * (key_blocks(p) - start); k += 16) {
        uint32_t a[4], b[4];
        load_matrices(a, weights + lane % 16 * WEIGHTS_PITCH + k + lane / 16 * 8);
#pragma unroll
        for (int f = 0; f < SLICE; f += 2) {
          load_matrices_transposed(b, units + (k + lane % 16) * PITCH + (warp * SLICE + f + lane / 16) * 8);
          mma<T>(sums[f], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma<T>(sums[f + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
    }
    sync_block();
  }

  if (dscale != nullptr) {
    if (side == 0 && warp == 0 && c == 0)
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (rows[half] < p.n) of_scale -= toward[half] * cosine[rows[half]];
    of_scale = block_sum(of_scale);
    if (thread_id() == 0) dscale[block_id()] = share * of_scale;
  }
  if (!wanted) return;

  // du = share scale (sums - toward v_i), and through u = x / |x|: dx = (du - u <u, du>) / |x|
  const T *const own_rows = static_cast<const T*>(side == 0 ? p.x : p.y), *const other_rows = static_cast<const T*>(
                                                                              side == 0 ? p.y : p.x);
  float along[2] = {0.f, 0.f};
  const auto unit_of = [&](const T* of, int i, int feature, const Length& by) {
    const T x = of[int64_t(i) * p.d + feature];
    return to_float(p.normalize ? from_float<T>(by.divided(to_float(x))) : x);
  };
#pragma unroll
  for (int f = 0; f < SLICE; f++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int half = e / 2, i = rows[half], feature = (warp * SLICE + f) * 8 + 2 * c + e % 2;
      if (i >= p.n || feature >= p.d) continue;
      const float pull = toward[half] * unit_of(other_rows, i, feature, of_other[half]);
      sums[f][e] = share * scale * (sums[f][e] * unfold - pull);
      along[half] += sums[f][e] * unit_of(own_rows, i, feature, length[half]);
    }
  }
  if (p.normalize) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      for (int by = 1; by < 4; by *= 2) along[half] += exchange(along[half], by);
      if (c == 0) parts[warp][r + 8 * half] = along[half];
    }
    sync_block();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      along[half] = 0.f;
      for (int w = 0; w < WARPS; w++) along[half] += parts[w][r + 8 * half];
    }
  }
#pragma unroll
  for (int f = 0; f < SLICE; f++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int half = e / 2, i = rows[half], feature = (warp * SLICE + f) * 8 + 2 * c + e % 2;
      if (i >= p.n || feature >= p.d) continue;
      float x = sums[f][e];
      if (p.normalize) x = length[half].divided(x - along[half] * unit_of(own_rows, i, feature, length[half]));
      grad[((grads == 3 ? int64_t(side) * p.n : 0) + i) * p.d + feature] = x;
    }
  }
}

// dx, dy [n, d] = g grad of x and y, and dscale [] = g times the sum of its `parts`; null for those that are not
// wanted. Rows without negatives have none, whatever g is.
template <class T>
__global__ void __launch_bounds__(THREADS)
    scaled_gradients(int64_t numbers, int parts, const float* g, const float* grad, const float* scale_parts, T* dx,
                     T* dy, float* dscale) {
  const auto times_g = [by = *g](float x) { return x == 0.f ? 0.f : by * x; };
  for (int64_t i = block_id() * THREADS + thread_id(); i < numbers; i += block_count() * THREADS) {
    if (dx != nullptr) dx[i] = from_float<T>(times_g(grad[i]));
    if (dy != nullptr) dy[i] = from_float<T>(times_g(grad[(dx != nullptr ? numbers : 0) + i]));
  }
  if (dscale == nullptr || block_id() > 0) return;
  float sum = 0.f;
  for (int i = thread_id(); i < parts; i += THREADS) sum += scale_parts[i];
  sum = block_sum(sum);
  if (thread_id() == 0) *dscale = times_g(sum);
}

}  // namespace sslkern::cuda
