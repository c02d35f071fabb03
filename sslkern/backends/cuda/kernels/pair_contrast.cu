// The loss of pairs as a whole, for batches so small that they wait for launches.
//
//     s_ij = scale <u_i, v_j>, u = x / |x|, v = y / |y|      lse_i = log of the sum of exp(s_ij) over the negatives
//     loss_i = softplus(lse_i - s_ii)      weight_i = share sigmoid(lse_i - s_ii)      toward_i: that of both sides
//     du_i = scale (sum_j (weight_i exp(s_ij - lse_i) + weight_j exp(s_ij - lse_j)) v_j - toward_i v_i)
//
// or, of pairs that are questions of their own (SigLIP),
//
//     loss_i = softplus(-s_ii) + sum_j softplus(s_ij), s_ij = scale <u_i, v_j> + bias
//     du_i = scale (sum_j share sigmoid(s_ij) v_j - toward_i v_i)      toward_i = share sigmoid(-s_ii)
//
// `pair_scores` makes the lse (or the losses), `pair_gradients` the loss and, for an upstream gradient of 1, the
// gradients, which `scaled_gradients` multiplies by the true one. Each block normalises what it reads, u and v rounded
// to the type of the features, as that takes less time than a launch. A block has 16 rows of one side, and its warps
// share the keys.
#include "pair_contrast.h"

namespace sslkern::cuda {

// Whether rows of a side have negatives.
SSLKERN_DEVICE bool contrasted(const Pairs& p, int side) { return side == 0 || p.mode == VIEWS || p.mode == TWO_WAY; }

SSLKERN_DEVICE int key_blocks(const Pairs& p) { return (p.n + 7) / 8 * (p.mode == VIEWS ? 2 : 1); }
SSLKERN_DEVICE Keys keys_of(const Pairs& p, int side, int block) {
  const int each = (p.n + 7) / 8;
  if (p.mode != VIEWS) return {1 - side, block < each ? 8 * block : p.n};
  return {block < each ? 0 : 1, block < 2 * each ? 8 * (block < each ? block : block - each) : p.n};
}

// lse [2, n] of the negatives of each row (SIGMOID: its loss [n]), cosine [n] of each pair, lengths [2, n] of the rows
// (1 as they are), and, if asked for, the best [2, n] negative score and the positive [n]. Of two sides, or of x alone.
template <class T, bool SIGMOIDS>
__global__ void __launch_bounds__(THREADS)
    pair_scores(Pairs p, float* lse, float* cosine, float* lengths, float* best, float* positive) {
  constexpr int BLOCKS = 4 / (PARTS<T> == 1 ? 1 : 2);  // of keys, of a warp at a time
  __shared__ Sum found[WARPS][ROWS];
  const int blocks = (p.n + ROWS - 1) / ROWS, side = int(block_id()) / blocks, first = int(block_id()) % blocks * ROWS;
  const int warp = thread_id() / WARP, lane = thread_id() % WARP, r = lane / 4, c = lane % 4;
  const float scale = scale_of(p), bias = bias_of(p);
  const int rows[2] = {first + r, first + r + 8};
  int64_t ids[2] = {rows[0], rows[1]};
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (p.ids != nullptr && rows[half] < p.n) ids[half] = p.ids[rows[half]];
  const Own<T, 1> own{reinterpret_cast<Factor<T>*>(shared_bytes()), Own<T, 1>::pitch_of(p.d)};
  own.load(p, side, first, [&](int row) {
    const float length = row_length<T>(p, side, row);
    if (warp < ROWS / 8 && c == 0 && row < p.n) lengths[side * p.n + row] = length;
    return length;
  });
  const float least = SIGMOIDS ? 0.f : -INFINITY;  // whose losses are not shifted
  float top[2] = {least, least}, sum[2] = {0.f, 0.f};
#pragma unroll 1
  for (int block = warp * BLOCKS; block < key_blocks(p); block += WARPS * BLOCKS) {
    float s[1][BLOCKS][4];
    float of_keys[BLOCKS];
    Length of_key[BLOCKS];
    Keys keys[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) keys[b] = keys_of(p, side, block + b);
    row_lengths<T>(of_keys, p, keys);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int j = keys[b].first + r;
      if (!contrasted(p, 1) && j / ROWS == first / ROWS && j < p.n && c == 0) lengths[p.n + j] = of_keys[b];
      of_key[b] = Length(of_keys[b]);
    }
    products_with_keys<T>(s, p, own, keys, of_key, static_cast<T*>(nullptr), 0);
    const float before[2] = {top[0], top[1]};
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      int64_t ids_of_keys[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int j = keys[b].first + 2 * c + h;
        ids_of_keys[h] = p.ids != nullptr && j < p.n ? p.ids[j] : j;
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = rows[e / 2], j = keys[b].first + 2 * c + e % 2;
        float& score = s[0][b][e];
        const bool pair = i == j && side == 0 && keys[b].side == 1 && i < p.n;
        if (pair) {
          cosine[i] = score;
          if (!SIGMOIDS && positive != nullptr) positive[i] = score * scale;
        }
        score *= scale;
        const bool counts = j < p.n && ids[e / 2] != ids_of_keys[e % 2];
        if constexpr (SIGMOIDS) {
          const float loss = softplus(pair ? -(score + bias) : score + bias);
          sum[e / 2] += pair || counts ? loss : 0.f;
          continue;
        }
        if (!counts) score = -INFINITY;
        top[e / 2] = fmaxf(top[e / 2], score);
      }
    }
#pragma unroll
    for (int half = 0; half < 2 && !SIGMOIDS; half++) {
      const float shift = shift_of(top[half]);
      sum[half] *= exponential(before[half] - shift);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
        sum[half] += exponential(s[0][b][2 * half] - shift) + exponential(s[0][b][2 * half + 1] - shift);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    Sum all{top[half], sum[half]};
    for (int by = 1; by < 4; by *= 2) all.add({exchange(all.top, by), exchange(all.sum, by)});
    if (c == 0) found[warp][r + 8 * half] = all;
  }
  sync_block();
  const int i = first + thread_id();
  if (thread_id() >= ROWS || i >= p.n) return;
  Sum all = found[0][thread_id()];
  for (int w = 1; w < WARPS; w++) all.add(found[w][thread_id()]);
  lse[side * p.n + i] = SIGMOIDS ? all.sum : all.lse();
  if (!SIGMOIDS && best != nullptr) best[side * p.n + i] = all.best();
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
// and dbias [2 * ceil(n / ROWS)] in parts. BLOCKS of 8 keys are a warp's in a pass, and SLICE times 8 features of all
// rows.
template <class T, int BLOCKS, int SLICE, bool SIGMOIDS>
__global__ void __launch_bounds__(THREADS, 1)
    pair_gradients(Pairs p, const float* lse, const float* cosine, const float* lengths, float share, int grads,
                   float* loss, float* grad, float* dscale, float* dbias) {
  constexpr int KEYS = 8 * BLOCKS, PASS = WARPS * KEYS, PITCH = units_pitch<T>(WARPS * SLICE * 8);
  T* const units = reinterpret_cast<T*>(shared_bytes());
  const Weights<T, 1, PASS> weights{reinterpret_cast<Factor<T>*>(units + PASS * PITCH)};
  const Own<T, 1> own{weights.at + PARTS<T> * weights.APART, Own<T, 1>::pitch_of(p.d)};
  __shared__ float parts[WARPS][ROWS];
  const int blocks = (p.n + ROWS - 1) / ROWS, side = int(block_id()) / blocks, first = int(block_id()) % blocks * ROWS;
  const int warp = thread_id() / WARP, lane = thread_id() % WARP, r = lane / 4, c = lane % 4;
  const float scale = scale_of(p), bias = bias_of(p);
  if (block_id() == 0) {
    float sum = 0.f;
    for (int i = thread_id(); i < p.n; i += THREADS)
      for (int of = 0; of < 2; of++)
        if (contrasted(p, of)) sum += SIGMOIDS ? lse[i] : softplus(gap_of(lse[of * p.n + i], cosine[i] * scale));
    sum = block_sum(sum);
    if (thread_id() == 0) *loss = sum * share;
  }
  const bool wanted = (grads >> side & 1) != 0;
  if (!wanted && ((dscale == nullptr && dbias == nullptr) || !contrasted(p, side))) {
    if (dscale != nullptr && thread_id() == 0) dscale[block_id()] = 0.f;
    if (dbias != nullptr && thread_id() == 0) dbias[block_id()] = 0.f;
    return;
  }

  const float fold = SIGMOIDS ? (SAME<T, fp16> ? 0x1p13f : 1.f) : fold_of<T>(p, lse, cosine, scale),
              unfold = 1.f / fold;
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
    weight[half] = SIGMOIDS ? 0.f : weight_of(p, lse, cosine[i] * scale, side, i);
    toward[half] = SIGMOIDS ? sigmoid(-(cosine[i] * scale + bias))
                            : weight[half] + weight_of(p, lse, cosine[i] * scale, 1 - side, i);
  }
  own.load(p, side, first, [&](int row) { return row < p.n ? lengths[side * p.n + row] : 1.f; });
  float sums[1][SLICE][4] = {}, of_scale = 0.f, of_bias = 0.f;
  for (int start = 0; start < key_blocks(p); start += WARPS * BLOCKS) {
    const int block = start + warp * BLOCKS;
    float s[1][BLOCKS][4];
    Length of_key[BLOCKS];
    Keys keys[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      keys[b] = keys_of(p, side, block + b);
      const int j = keys[b].first + r;
      if (j < p.n) of_key[b] = Length(lengths[keys[b].side * p.n + j]);
    }
    products_with_keys<T>(s, p, own, keys, of_key, units + warp * KEYS * PITCH, PITCH);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      float weight_of_keys[2], lse_of_keys[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int j = keys[b].first + 2 * c + h;
        lse_of_keys[h] = !SIGMOIDS && j < p.n ? lse[keys[b].side * p.n + j] : 0.f;
        weight_of_keys[h] = !SIGMOIDS && j < p.n ? weight_of(p, lse, cosine[j] * scale, keys[b].side, j) : 0.f;
      }
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int half = e / 2, h = e % 2, j = keys[b].first + 2 * c + h;
        const float cos = s[0][b][e], score = cos * scale;
        const bool counts = rows[half] < p.n && j < p.n && ids[half] != (p.ids == nullptr ? j : p.ids[j]);
        float ours = 0.f, theirs = 0.f;
        if (SIGMOIDS) {
          if (counts) ours = sigmoid(score + bias);
        } else {
          if (counts && weight[half] != 0.f) ours = weight[half] * exponential(score - lses[half]);
          if (counts && weight_of_keys[h] != 0.f) theirs = weight_of_keys[h] * exponential(score - lse_of_keys[h]);
        }
        if (counts) of_scale += ours * cos;
        of_bias += ours;
        w[e] = fold * (ours + theirs);
      }
      const int column = warp * KEYS + 8 * b + 2 * c;
      weights.store(r, column, w[0], w[1]);
      weights.store(r + 8, column, w[2], w[3]);
    }
    sync_block();
    if (wanted) weights.add_product(sums, units, PITCH, 8 * (key_blocks(p) - start));
    sync_block();
  }

  if (side == 0 && warp == 0 && c == 0)
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (rows[half] < p.n) of_scale -= toward[half] * cosine[rows[half]], of_bias -= toward[half];
  const float own_share = contrasted(p, side) ? share : 0.f;
  if (dscale != nullptr) {
    of_scale = block_sum(of_scale);
    if (thread_id() == 0) dscale[block_id()] = own_share * of_scale;
  }
  if (dbias != nullptr) {
    of_bias = block_sum(of_bias);
    if (thread_id() == 0) dbias[block_id()] = own_share * of_bias;
  }
  if (!wanted) return;

  // du = share scale (sums - toward v_i), and through u = x / |x|: dx = (du - u <u, du>) / |x|
  const T *const own_rows = static_cast<const T*>(p.rows(side)), *const other_rows =
                                                                     static_cast<const T*>(p.rows(1 - side));
  float along[2] = {0.f, 0.f};
#pragma unroll
  for (int f = 0; f < SLICE; f++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int half = e / 2, i = rows[half], feature = (warp * SLICE + f) * 8 + 2 * c + e % 2;
      if (i >= p.n || feature >= p.d) continue;
      const float pull = toward[half] * unit_of(p, other_rows, int64_t(i) * p.d + feature, of_other[half]);
      sums[0][f][e] = share * scale * (sums[0][f][e] * unfold - pull);
      along[half] += sums[0][f][e] * unit_of(p, own_rows, int64_t(i) * p.d + feature, length[half]);
    }
  }
  if (p.normalize) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      along[half] = sum_of_four(along[half]);
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
      float x = sums[0][f][e];
      if (p.normalize)
        x = length[half].divided(x - along[half] * unit_of(p, own_rows, int64_t(i) * p.d + feature, length[half]));
      grad[((grads == 3 ? int64_t(side) * p.n : 0) + i) * p.d + feature] = x;
    }
  }
}

// dx, dy [n, d] = g grad of x and y, and dscale and dbias [] = g times the sum of their `parts`, which follow each
// other; null for those that are not wanted. Rows without negatives have none, whatever g is.
template <class T>
__global__ void __launch_bounds__(THREADS)
    scaled_gradients(int64_t numbers, int parts, const float* g, const float* grad, const float* of_parts, T* dx, T* dy,
                     float* dscale, float* dbias) {
  const auto times_g = [by = *g](float x) { return x == 0.f ? 0.f : by * x; };
  for (int64_t i = block_id() * THREADS + thread_id(); i < numbers; i += block_count() * THREADS) {
    if (dx != nullptr) dx[i] = from_float<T>(times_g(grad[i]));
    if (dy != nullptr) dy[i] = from_float<T>(times_g(grad[(dx != nullptr ? numbers : 0) + i]));
  }
  if (block_id() > 0) return;
  float* const to[2] = {dscale, dbias};
  for (int of = 0; of < 2; of++) {
    if (to[of] == nullptr) continue;
    float sum = 0.f;
    for (int i = thread_id(); i < parts; i += THREADS) sum += of_parts[i];
    sum = block_sum(sum);
    if (thread_id() == 0) *to[of] = times_g(sum);
    of_parts += parts;
  }
}

}  // namespace sslkern::cuda
