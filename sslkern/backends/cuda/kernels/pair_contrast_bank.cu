// The loss of few pairs over a bank of negatives that do not learn, as a whole.
//
//     loss_i = softplus(lse_i - s_ii)            lse_i over the scores with the bank, b
//     weight_i = share sigmoid(lse_i - s_ii)     mean_i = sum_j exp(scale <u_i, b_j> - lse_i) b_j
//     du_i = scale weight_i (mean_i - v_i)       dv_i = -scale weight_i u_i
//
// `bank_scores` makes sums and means of parts of the bank, of which a block has one for some rows; `bank_gradients`
// merges them, makes the loss and, for an upstream gradient of 1, the gradients, and may write v into the bank, which
// nobody reads any more then. `scaled_gradients` of pair_contrast.cu is the backward.
#include "pair_contrast.h"
#include "ring.h"

namespace sslkern::cuda {

// Of part p of the bank: maxima [n, parts] of the scores, sums [n, parts] of exp(score - maximum), alongs [n, parts] of
// these times the cosines, and means [n, parts, d], times the keys; of the pairs cosine [n] and lengths [2, n], 1 where
// rows stay as they are. A part has `each` passes, in which a warp has BLOCKS times 8 keys, and then SLICE times 8
// features of all of them. Where a queue is to be written later `start` [1] is what `pointer` [1] says now.
template <class T, int TILES, int BLOCKS, int SLICE>
__global__ void __launch_bounds__(THREADS, 1)
    bank_scores(Pairs p, int each, float* cosine, float* lengths, float* maxima, float* sums, float* alongs,
                float* means, const int64_t* pointer, int64_t* start) {
  constexpr int OWN = TILES * ROWS, KEYS = 8 * BLOCKS, PASS = WARPS * KEYS, PITCH = units_pitch<T>(WARPS * SLICE * 8);
  constexpr float LIFT = SAME<T, fp16> ? 0x1p14f : 1.f;  // so that weights far below the largest do not vanish
  T* const units = reinterpret_cast<T*>(shared_bytes());
  const Weights<T, TILES, PASS> weights{reinterpret_cast<Factor<T>*>(units + PASS * PITCH)};
  const Own<T, TILES> own{weights.at + PARTS<T> * weights.APART, Own<T, TILES>::pitch_of(p.d)};
  __shared__ float maxima_of_warps[WARPS][OWN], totals[2][WARPS][OWN];
  const int groups = (p.n + OWN - 1) / OWN, parts = int(block_count()) / groups;
  const int first = int(block_id()) % groups * OWN, part = int(block_id()) / groups;
  const int warp = thread_id() / WARP, lane = thread_id() % WARP, r = lane / 4, c = lane % 4;
  const float scale = scale_of(p);
  if (block_id() == 0 && thread_id() == 0 && pointer != nullptr) *start = *pointer;
  own.load(p, 0, first, [&](int row) {
    const float found = row_length<T>(p, 0, row);
    if (part == 0 && warp < OWN / 8 && row < p.n && c == 0) lengths[row] = found;
    return found;
  });
  if (part == 0 && warp < OWN / 8) {
    const int row = first + 8 * warp + r;
    const float length = row_length<T>(p, 1, row);
    const Length of_x(row_length<T>(p, 0, row)), of_y(length);
    const T *const x = static_cast<const T*>(p.x) + int64_t(row) * p.d, *const y = static_cast<const T*>(p.y) +
                                                                                   int64_t(row) * p.d;
    float along = 0.f;
    for (int f = c; row < p.n && f < p.d; f += 4) along += unit_of(p, x, f, of_x) * unit_of(p, y, f, of_y);
    along = sum_of_four(along);
    if (row < p.n && c == 0) {
      cosine[row] = along;
      lengths[p.n + row] = length;
    }
  }

  float maximum[TILES][2], sum[TILES][2] = {}, along[TILES][2] = {}, mean[TILES][SLICE][4] = {};
#pragma unroll
  for (int t = 0; t < TILES; t++) maximum[t][0] = maximum[t][1] = -INFINITY;
  for (int begin = part * each * PASS; begin < (part + 1) * each * PASS && begin < p.m; begin += PASS) {
    float s[TILES][BLOCKS][4];
    Keys keys[BLOCKS];
    Length by[BLOCKS];
    float of_keys[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) keys[b] = {BANK, begin + warp * KEYS + 8 * b};
    row_lengths<T>(of_keys, p, keys);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) by[b] = Length(of_keys[b]);
    products_with_keys<T>(s, p, own, keys, by, units + warp * KEYS * PITCH, PITCH);
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float most = -INFINITY;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
          for (int h = 0; h < 2; h++)
            if (keys[b].first + 2 * c + h < p.m) most = fmaxf(most, s[t][b][2 * half + h] * scale);
        most = fmaxf(most, exchange(most, 1));
        most = fmaxf(most, exchange(most, 2));
        if (c == 0) maxima_of_warps[warp][t * ROWS + 8 * half + r] = most;
      }
    sync_block();
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = t * ROWS + 8 * half + r;
        float most = maximum[t][half];
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, maxima_of_warps[w][row]);
        const float shift = shift_of(most), shrink = exponential(maximum[t][half] - shift);
        maximum[t][half] = most;
        sum[t][half] *= shrink;
        along[t][half] *= shrink;
#pragma unroll
        for (int f = 0; f < SLICE; f++)
#pragma unroll
          for (int h = 0; h < 2; h++) mean[t][f][2 * half + h] *= shrink;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
          float weight[2];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float cos = s[t][b][2 * half + h];
            weight[h] = keys[b].first + 2 * c + h < p.m ? exponential(cos * scale - shift) : 0.f;
            sum[t][half] += weight[h];
            along[t][half] += weight[h] * cos;
          }
          weights.store(row, warp * KEYS + 8 * b + 2 * c, LIFT * weight[0], LIFT * weight[1]);
        }
      }
    sync_block();
    weights.add_product(mean, units, PITCH, p.m - begin);
    sync_block();
  }

#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = t * ROWS + 8 * half + r;
      const float total = sum_of_four(sum[t][half]), of_scale = sum_of_four(along[t][half]);
      if (c == 0) totals[0][warp][row] = total, totals[1][warp][row] = of_scale;
      if (c == 0 && warp == 0 && first + row < p.n) maxima[int64_t(first + row) * parts + part] = maximum[t][half];
#pragma unroll
      for (int f = 0; f < SLICE; f++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int feature = (warp * SLICE + f) * 8 + 2 * c + h;
          if (first + row < p.n && feature < p.d)
            means[(int64_t(first + row) * parts + part) * p.d + feature] = mean[t][f][2 * half + h] * (1 / LIFT);
        }
    }
  sync_block();
  const int i = first + thread_id();
  if (thread_id() >= OWN || i >= p.n) return;
  float total[2] = {0.f, 0.f};
  for (int w = 0; w < WARPS; w++)
    for (int of = 0; of < 2; of++) total[of] += totals[of][w][thread_id()];
  sums[int64_t(i) * parts + part] = total[0];
  alongs[int64_t(i) * parts + part] = total[1];
}

// Of all parts of a row; by a warp, whose lanes all get it.
SSLKERN_DEVICE Sum merged(const float* maxima, const float* sums, int parts, int row) {
  Sum all{-INFINITY, 0.f};
  for (int part = thread_id() % WARP; part < parts; part += WARP)
    all.add({maxima[int64_t(row) * parts + part], sums[int64_t(row) * parts + part]});
  for (int by = 1; by < WARP; by *= 2) all.add({exchange(all.maximum, by), exchange(all.sum, by)});
  return all;
}

// What `bank_scores` found.
struct Found {
  const float *cosine, *lengths, *maxima, *sums, *alongs, *means;
  int parts;
};

// Where y is to be written: into the bank, by so many blocks, from the row on that the pointer said when it was read.
struct Ring {
  Teams teams;
  void* keys;
  int64_t* pointer;  // [1], which moves on; null: nowhere
  const int64_t* start;
  int blocks;
};

// Block 0 makes loss [] = share * the sum of the losses and, if asked for, best and positive [n]; then one of each row,
// if there are any, for an upstream gradient of 1 grad [sides, n, d] of the sides that `grads` names (1: x, 2: y, 3:
// both) and dscale [n] in parts, if asked for; the last write the ring.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    bank_gradients(Pairs p, Found found, float share, int grads, float* loss, float* grad, float* dscale, float* best,
                   float* positive, Ring ring) {
  constexpr int MOST = 512;  // features
  __shared__ float of_warp[WARPS][MOST];
  const float scale = scale_of(p);
  const int warp = thread_id() / WARP, lane = thread_id() % WARP;
  if (block_id() == 0) {
    float sum = 0.f;
    for (int i = warp; i < p.n; i += WARPS) {
      const Sum all = merged(found.maxima, found.sums, found.parts, i);
      if (lane != 0) continue;
      sum += softplus(gap_of(all.lse(), found.cosine[i] * scale));
      if (best != nullptr) best[i] = all.best();
      if (positive != nullptr) positive[i] = found.cosine[i] * scale;
    }
    sum = block_sum(sum);
    if (thread_id() == 0) *loss = sum * share;
    if (thread_id() == 0 && ring.pointer != nullptr) *ring.pointer = (ring_start(*ring.start, p.m, 0) + p.n) % p.m;
    return;
  }
  if (block_id() >= block_count() - ring.blocks) {
    const int64_t rows = p.n < p.m ? p.n : p.m, dropped = p.n - rows,
                  block = block_id() - (block_count() - ring.blocks);
    push_rows(ring.teams, block, ring.blocks, p.m, ring_start(*ring.start, p.m, dropped), dropped, rows,
              static_cast<T*>(ring.keys), static_cast<const T*>(p.y), p.normalize);
    return;
  }

  const int i = int(block_id()) - 1;
  const int64_t at = int64_t(i) * found.parts, row = int64_t(i) * p.d;
  const T *const x = static_cast<const T*>(p.x) + row, *const y = static_cast<const T*>(p.y) + row;
  const Length of_x(found.lengths[i]), of_y(found.lengths[p.n + i]);
  const Sum all = merged(found.maxima, found.sums, found.parts, i);
  const float cosine = found.cosine[i], weight = share * sigmoid(gap_of(all.lse(), cosine * scale));
  const float shift = shift_of(all.maximum), inverse = all.sum == 0.f ? 0.f : 1.f / all.sum;
  const auto share_of = [&](int part) { return inverse * exponential(found.maxima[at + part] - shift); };
  if (dscale != nullptr && warp == 0) {
    float sum = 0.f;
    for (int part = lane; part < found.parts; part += WARP) sum += share_of(part) * found.alongs[at + part];
    for (int by = 1; by < WARP; by *= 2) sum += exchange(sum, by);
    if (lane == 0) dscale[i] = weight * (sum - cosine);
  }
  if (grads == 0) return;
  for (int f = lane; f < p.d; f += WARP) {
    float sum = 0.f;
#pragma unroll 4
    for (int part = warp; part < found.parts; part += WARPS) sum += share_of(part) * found.means[(at + part) * p.d + f];
    of_warp[warp][f] = sum;
  }
  sync_block();
  float mean[MOST / THREADS], along = 0.f;  // <u, mean>
#pragma unroll
  for (int e = 0; e < MOST / THREADS; e++) {
    const int f = e * THREADS + thread_id();
    if (f >= p.d) continue;
    mean[e] = 0.f;
    for (int w = 0; w < WARPS; w++) mean[e] += of_warp[w][f];
    along += mean[e] * unit_of(p, x, f, of_x);
  }
  along = block_sum(along);
  // Through u = x / |x|: dx = (du - u <u, du>) / |x|, and the same of v.
#pragma unroll
  for (int e = 0; e < MOST / THREADS; e++) {
    const int f = e * THREADS + thread_id();
    if (f >= p.d) continue;
    const float u = unit_of(p, x, f, of_x), v = unit_of(p, y, f, of_y);
    float du = mean[e] - v, dv = -u;
    if (p.normalize) {
      du = of_x.divided(du - (along - cosine) * u);
      dv = of_y.divided(dv + cosine * v);
    }
    float* const to = grad + row + f;
    if (grads & 1) to[0] = scale * weight * du;
    if (grads & 2) to[grads == 3 ? int64_t(p.n) * p.d : 0] = scale * weight * dv;
  }
}

}  // namespace sslkern::cuda
