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
// or, of rows u alone that share labels (SupCon), with lse_i over the rows of other labels, same_i over the P_i others
// of its own label,
//
//     loss_i = softplus(lse_i - same_i) + same_i - 1 / P_i sum_p s_ip      weight_i = sigmoid(lse_i - same_i)
//     du_i = scale share sum_j (w_ij + w_ji) u_j      w_ij = weight_i exp(s_ij - lse_i) of another label,
//                                                          (1 - weight_i) exp(s_ij - same_i) - 1 / P_i of its own
//
// whose differences for P_i = 1 are left out, same_i - s_ip and 1 - 1 / P_i, so that tiny losses keep their digits.
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
  if (p.mode != VIEWS) return {p.mode == LABELS ? 0 : 1 - side, block < each ? 8 * block : p.n};
  return {block < each ? 0 : 1, block < 2 * each ? 8 * (block < each ? block : block - each) : p.n};
}

// lse [2, n] of the negatives of each row (SIGMOID: its loss [n]), cosine [n] of each pair, lengths [2, n] of the rows
// (1 as they are), and, if asked for, the best [2, n] negative score and the positive [n]. Of two sides, or of x alone.
// LABELS: lse [2, n] of the negatives and of the positives, their mean cosine [n], and after lengths [n] how many there
// are. OF is SIGMOID, LABELS, or VIEWS for all others.
template <class T, int OF>
__global__ void __launch_bounds__(THREADS)
    pair_scores(Pairs p, float* lse, float* cosine, float* lengths, float* best, float* positive) {
  constexpr int BLOCKS = 4 / (PARTS<T> == 1 ? 1 : 2);  // of keys, of a warp at a time
  constexpr bool SIGMOIDS = OF == SIGMOID, LABELLED = OF == LABELS;
  constexpr int SUMS = LABELLED ? 2 : 1;  // of negatives, and of positives
  __shared__ Sum found[SUMS][WARPS][ROWS];
  __shared__ float cosines[WARPS][ROWS], counts[WARPS][ROWS];  // of positives
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
  float maximum[SUMS][2], sum[SUMS][2] = {}, cosines_of_lane[2] = {0.f, 0.f}, count[2] = {0.f, 0.f};
#pragma unroll
  for (int of = 0; of < SUMS; of++) maximum[of][0] = maximum[of][1] = least;
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
      if (!LABELLED && !contrasted(p, 1) && j / ROWS == first / ROWS && j < p.n && c == 0)
        lengths[p.n + j] = of_keys[b];
      of_key[b] = Length(of_keys[b]);
    }
    products_with_keys<T>(s, p, own, keys, of_key, static_cast<T*>(nullptr), 0);
    float before[SUMS][2];
    uint32_t positives = 0;  // bits of the scores
#pragma unroll
    for (int of = 0; of < SUMS; of++) before[of][0] = maximum[of][0], before[of][1] = maximum[of][1];
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
        const bool differ = ids[e / 2] != ids_of_keys[e % 2], same = LABELLED && !differ && i != j && j < p.n;
        if (same) {
          cosines_of_lane[e / 2] += score, count[e / 2] += 1.f;
          positives |= 1u << (4 * b + e);
        }
        score *= scale;
        const bool counts = j < p.n && differ;
        if constexpr (SIGMOIDS) {
          const float loss = softplus(pair ? -(score + bias) : score + bias);
          sum[0][e / 2] += pair || counts ? loss : 0.f;
          continue;
        }
        if (same) maximum[SUMS - 1][e / 2] = fmaxf(maximum[SUMS - 1][e / 2], score);
        if (same) continue;
        if (!counts) score = -INFINITY;
        maximum[0][e / 2] = fmaxf(maximum[0][e / 2], score);
      }
    }
#pragma unroll
    for (int half = 0; half < 2 && !SIGMOIDS; half++) {
      float shift[SUMS];
#pragma unroll
      for (int of = 0; of < SUMS; of++) {
        shift[of] = shift_of(maximum[of][half]);
        sum[of][half] *= exponential(before[of][half] - shift[of]);
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        const float low = s[0][b][2 * half], high = s[0][b][2 * half + 1];
        if constexpr (!LABELLED) {
          sum[0][half] += exponential(low - shift[0]) + exponential(high - shift[0]);
          continue;
        }
        const bool same_low = positives >> (4 * b + 2 * half) & 1, same_high = positives >> (4 * b + 2 * half + 1) & 1;
        const float of_low = exponential(low - shift[same_low ? SUMS - 1 : 0]),
                    of_high = exponential(high - shift[same_high ? SUMS - 1 : 0]);
        sum[0][half] += (same_low ? 0.f : of_low) + (same_high ? 0.f : of_high);
        sum[SUMS - 1][half] += (same_low ? of_low : 0.f) + (same_high ? of_high : 0.f);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int of = 0; of < SUMS; of++) {
      Sum all{maximum[of][half], sum[of][half]};
      for (int by = 1; by < 4; by *= 2) all.add({exchange(all.maximum, by), exchange(all.sum, by)});
      if (c == 0) found[of][warp][r + 8 * half] = all;
    }
    if constexpr (LABELLED) {
      const float cosines_of_row = sum_of_four(cosines_of_lane[half]), count_of_row = sum_of_four(count[half]);
      if (c == 0) cosines[warp][r + 8 * half] = cosines_of_row, counts[warp][r + 8 * half] = count_of_row;
    }
  }
  sync_block();
  const int i = first + thread_id();
  if (thread_id() >= ROWS || i >= p.n) return;
  Sum all = found[0][0][thread_id()];
  for (int w = 1; w < WARPS; w++) all.add(found[0][w][thread_id()]);
  lse[side * p.n + i] = SIGMOIDS ? all.sum : all.lse();
  if constexpr (LABELLED) {
    Sum same = found[SUMS - 1][0][thread_id()];
    float sum_of_cosines = cosines[0][thread_id()], all_counts = counts[0][thread_id()];
    for (int w = 1; w < WARPS; w++) {
      same.add(found[SUMS - 1][w][thread_id()]);
      sum_of_cosines += cosines[w][thread_id()], all_counts += counts[w][thread_id()];
    }
    lse[p.n + i] = same.lse();
    cosine[i] = sum_of_cosines / fmaxf(all_counts, 1.f);
    lengths[p.n + i] = all_counts;
    return;
  }
  if (!SIGMOIDS && best != nullptr) best[side * p.n + i] = all.best();
}

// What a row does to the loss: sigmoid(lse - positive), 0 on a side without negatives.
SSLKERN_DEVICE float weight_of(const Pairs& p, const float* lse, float positive, int side, int i) {
  return contrasted(p, side) ? sigmoid(gap_of(lse[side * p.n + i], positive)) : 0.f;
}

// A row of LABELS, from what `pair_scores` found: without positives it does nothing.
struct Labelled {
  float lse = -INFINITY, same = 0.f, weight = 0.f, each = 0.f;  // each: 1 / P_i, of a single positive 0

  SSLKERN_DEVICE Labelled() {}
  SSLKERN_DEVICE Labelled(const Pairs& p, const float* lses, const float* counts, int i) {
    if (counts[i] == 0.f) return;
    lse = lses[i], same = lses[p.n + i], weight = sigmoid(gap_of(lse, same));
    each = counts[i] > 1.f ? 1.f / counts[i] : 0.f;
  }
  SSLKERN_DEVICE float loss(float mean) const { return softplus(gap_of(lse, same)) + (each > 0.f ? same - mean : 0.f); }
  SSLKERN_DEVICE float gradient(float score, bool positive) const {
    const float by = positive ? (each > 0.f ? 1.f : 0.f) - weight : weight;
    return (by != 0.f ? by * exponential(score - (positive ? same : lse)) : 0.f) - (positive ? each : 0.f);
  }
};

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

template <class T>
SSLKERN_DEVICE float fold_of_labels(const Pairs& p, const float* lse, const float* counts) {
  if constexpr (SAME<T, fp16>) {
    float largest = 0x1p-100f;
    for (int i = thread_id(); i < p.n; i += THREADS)
      largest = fmaxf(largest, counts[i] > 1.f ? 1.f : Labelled(p, lse, counts, i).weight);
    return 0x1p13f * exp2f(-floorf(log2f(block_max(largest))));
  }
  return 1.f;
}

// From the results of `pair_scores`: loss [] = share * the sum of the losses, and, where they are asked for, for an
// upstream gradient of 1 grad [sides, n, d] of the sides that `grads` names (1: x, 2: y, 3: both) and dscale
// and dbias [2 * ceil(n / ROWS)] in parts. BLOCKS of 8 keys are a warp's in a pass, and SLICE times 8 features of all
// rows.
template <class T, int BLOCKS, int SLICE, int OF>
__global__ void __launch_bounds__(THREADS, 1)
    pair_gradients(Pairs p, const float* lse, const float* cosine, const float* lengths, float share, int grads,
                   float* loss, float* grad, float* dscale, float* dbias) {
  constexpr bool SIGMOIDS = OF == SIGMOID, LABELLED = OF == LABELS;
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
        if (LABELLED && of == 0)
          sum += Labelled(p, lse, lengths + p.n, i).loss(cosine[i] * scale);
        else if (contrasted(p, of))
          sum += SIGMOIDS ? lse[i] : softplus(gap_of(lse[of * p.n + i], cosine[i] * scale));
    sum = block_sum(sum);
    if (thread_id() == 0) *loss = sum * share;
  }
  const bool wanted = (grads >> side & 1) != 0;
  if (!wanted && ((dscale == nullptr && dbias == nullptr) || !contrasted(p, side))) {
    if (dscale != nullptr && thread_id() == 0) dscale[block_id()] = 0.f;
    if (dbias != nullptr && thread_id() == 0) dbias[block_id()] = 0.f;
    return;
  }

  const float fold = SIGMOIDS   ? (SAME<T, fp16> ? 0x1p13f : 1.f)
                     : LABELLED ? fold_of_labels<T>(p, lse, lengths + p.n)
                                : fold_of<T>(p, lse, cosine, scale),
              unfold = 1.f / fold;
  const int rows[2] = {first + r, first + r + 8};
  int64_t ids[2] = {rows[0], rows[1]};
  Length length[2], of_other[2];
  Labelled labelled[2];
  float lses[2] = {0.f, 0.f}, weight[2] = {0.f, 0.f}, toward[2] = {0.f, 0.f};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int i = rows[half];
    if (i >= p.n) continue;
    if (p.ids != nullptr) ids[half] = p.ids[i];
    length[half] = Length(lengths[side * p.n + i]);
    if constexpr (LABELLED) {
      labelled[half] = Labelled(p, lse, lengths + p.n, i);
      continue;
    }
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
      Labelled labelled_keys[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int j = keys[b].first + 2 * c + h;
        if constexpr (LABELLED) {
          if (j < p.n) labelled_keys[h] = Labelled(p, lse, lengths + p.n, j);
          continue;
        }
        lse_of_keys[h] = !SIGMOIDS && j < p.n ? lse[keys[b].side * p.n + j] : 0.f;
        weight_of_keys[h] = !SIGMOIDS && j < p.n ? weight_of(p, lse, cosine[j] * scale, keys[b].side, j) : 0.f;
      }
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int half = e / 2, h = e % 2, j = keys[b].first + 2 * c + h;
        const float cos = s[0][b][e], score = cos * scale;
        const bool both = rows[half] < p.n && j < p.n, differ = both && ids[half] != (p.ids == nullptr ? j : p.ids[j]),
                   counts = LABELLED ? both && rows[half] != j : differ;
        float ours = 0.f, theirs = 0.f;
        if (LABELLED) {
          if (counts) {
            ours = labelled[half].gradient(score, !differ);
            theirs = labelled_keys[h].gradient(score, !differ);
          }
        } else if (SIGMOIDS) {
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

  if (!LABELLED && side == 0 && warp == 0 && c == 0)
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
      const float pull =
          LABELLED ? 0.f : toward[half] * unit_of(p, other_rows, int64_t(i) * p.d + feature, of_other[half]);
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
