// The gradient of the features of one side, x, of a similarity problem: a block owns ROWS of its rows, and the columns,
// rows of the other side y, stream past them. S is computed once more and never stored.
//
//     dx_i = scale sum_j w_ij y_j        w_ij = g_i 2^(s_ij - r_i) + h_j 2^(s_ij - c_j)
//
// with r_i and c_j the log-sum-exps of row i and of column j in base 2, and g_i and h_j what arrived for them. x is q,
// or k in the transposed problem, whose bias belongs to the rows; or both: of q with itself the second term is that of
// s_ji, of which row j is the row.
//
// Floor: two products, 4 N M D flop. Each of the two warpgroups that multiply has 64 rows; it issues the scores of a
// tile before the second product of the tile before, and computes weights while that is under way.
#include "sides.h"

namespace sslkern::cuda {

constexpr int OWNED = 64;        // rows of a warpgroup, half of those of a block
constexpr int ROWS = 2 * OWNED;  // of a block
constexpr int PANEL = 64;        // features of a panel: rows of 128 bytes

// ---- the gradient ---------------------------------------------------------------------------------------------------

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

// Features of a row of dx, with some that are 0 after those of the problem.
SSLKERN_DEVICE int whole(int d) { return (d + 7) / 8 * 8; }

struct alignas(8) Two {
  float first, second;
};

// D: features with zeros up to 64, 128 or 256.
template <int D>
struct Tile {
  static constexpr int WIDTH = D > 128 ? 64 : 128;  // columns
  static constexpr int STAGES = D > 128 ? 4 : D > 64 ? 5 : 8;
  static constexpr int X_PANEL = ROWS * 128, X_BYTES = D / PANEL * X_PANEL;
  static constexpr int Y_PANEL = WIDTH * 128, Y_BYTES = D / PANEL * Y_PANEL;
  static constexpr int NEAR_BYTES = (WIDTH + PAST) * 4, NEAR_ROOM = NEAR_BYTES + 127 & ~127;  // copies go to multiples

  // Addresses in shared memory. Each stage holds a tile of y and its `near`.
  const uint32_t x, y, near, full, empty, x_full;
  SSLKERN_DEVICE explicit Tile(uint32_t base)
      : x(base),
        y(x + X_BYTES),
        near(y + STAGES * Y_BYTES),
        full(near + STAGES * NEAR_ROOM),
        empty(full + 8 * STAGES),
        x_full(empty + 8 * STAGES) {}
  static constexpr int BYTES = X_BYTES + STAGES * (Y_BYTES + NEAR_ROOM + 16) + 8;
};

template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  SSLKERN_DEVICE void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

template <int D>
SSLKERN_DEVICE void produce(const Tile<D>& shared, const TensorMap& x, const TensorMap& y, const TensorMap& near,
                            int row, int begin, int end) {
  using Of = Tile<D>;
  barrier_expect(shared.x_full, Of::X_BYTES);
  for (int panel = 0; panel < D / PANEL; ++panel)
    load_box(shared.x + panel * Of::X_PANEL, x, shared.x_full, panel * PANEL, row);
  Ring<Of::STAGES> ring;
  for (int t = begin; t < end; ++t) {
    const uint32_t full = shared.full + 8 * ring.stage;
    barrier_wait(shared.empty + 8 * ring.stage, ring.phase ^ 1);
    barrier_expect(full, Of::Y_BYTES + Of::NEAR_BYTES);
    for (int panel = 0; panel < D / PANEL; ++panel)
      load_box(shared.y + ring.stage * Of::Y_BYTES + panel * Of::Y_PANEL, y, full, panel * PANEL, t * Of::WIDTH);
    load_vector(shared.near + ring.stage * Of::NEAR_ROOM, near, full, t * (Of::WIDTH + PAST));
    ring.next();
  }
}

// s = x y^T, the dot products of the rows of a warpgroup with a tile.
template <class T, int D, int S>
SSLKERN_DEVICE void multiply(float (&s)[S], uint32_t x, uint32_t y) {
  const uint32_t a = opaque(rows_at(x)), b = opaque(rows_at(y));
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int panel = k / 4, within = k % 4 * 2;
    wgmma<T>(s, descriptor(a + panel * (Tile<D>::X_PANEL >> 4) + within),
             descriptor(b + panel * (Tile<D>::Y_PANEL >> 4) + within), k > 0);
  }
  wgmma_commit();
}

// o += w y
template <class T, int D, int P>
SSLKERN_DEVICE void accumulate(float (&o)[D / 2], const uint32_t (&w)[P], uint32_t y) {
  const uint32_t b = opaque(columns_at(y, Tile<D>::Y_PANEL));
#pragma unroll
  for (int k = 0; k < P / 4; ++k)
    wgmma<T>(o, w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3], descriptor(b + k * (2048 >> 4)));
  wgmma_commit();
}

// Pairs that do not count get the product `away`. i and j are those of the first of s.
template <int S>
SSLKERN_DEVICE void leave_out(float (&s)[S], const Problem& p, uint32_t asks, int i, int j, float away) {
  const bool by_id = asks & (IDS | LONG_IDS);
  const int64_t id = by_id ? id_of(p.q_ids, p.n, i) : 0, id_below = by_id ? id_of(p.q_ids, p.n, i + 8) : 0;
  if (asks == IDS) {  // as all tiles do where ids are in no order: the short way
#pragma unroll
    for (int k = 0; k < S; ++k) {
      const int64_t of_column = p.k_ids[j + k / 4 * 8 + k % 2];
      if (!counts(p, IDS, i, j, k / 2 % 2 == 0 ? id : id_below, of_column)) s[k] = away;
    }
    return;
  }
  const bool none = asks & NONE_COUNTS;
  uint32_t out = none ? ~0u : 0, out_below = out;  // a bit for each column
#pragma unroll 2
  for (int k = 0; k < S / 2 && !none; ++k) {
    const int column = j + k / 2 * 8 + k % 2;
    const int64_t of_column = by_id ? id_of(p.k_ids, p.m, column) : 0;
    if (!counts(p, asks, i, column, id, of_column)) out |= 1u << k;
    if (!counts(p, asks, i + 8, column, id_below, of_column)) out_below |= 1u << k;
  }
#pragma unroll
  for (int k = 0; k < S / 2; ++k) {
    if (out >> k & 1) s[k / 2 * 4 + k % 2] = away;
    if (out_below >> k & 1) s[k / 2 * 4 + k % 2 + 2] = away;
  }
}

template <class T, int S>
SSLKERN_DEVICE void pack(uint32_t (&w)[S / 2], const float (&s)[S]) {
#pragma unroll
  for (int k = 0; k < S / 2; ++k) w[k] = packed<T>(s[2 * k], s[2 * k + 1]);
}

// The dot products s become weights, by one exponential. Returns the sum of weights times dot products.
template <int S>
SSLKERN_DEVICE float weigh(float (&s)[S], uint32_t near, const float (&own)[2], const float (&shift)[2], float c) {
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

template <class T, int D>
__global__ void __launch_bounds__(3 * WARPGROUP, 1)
    gradient_rows(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
                  const __grid_constant__ TensorMap near_map, const Problem p, const Gradient given) {
  using Of = Tile<D>;
  const Of shared(dynamic_shared());
  if (thread_id() == 0) {
    for (int stage = 0; stage < Of::STAGES; ++stage) {
      barrier_init(shared.full + 8 * stage, 1);
      barrier_init(shared.empty + 8 * stage, 8);  // warps
    }
    barrier_init(shared.x_full, 1);
    publish_barriers();
  }
  sync_block();
  // Blocks that run at the same time own other rows and read the same columns.
  const int blocks = (p.n + ROWS - 1) / ROWS, block = int(block_id() % blocks), split = int(block_id() / blocks);
  const int begin = split * given.each, end = begin + given.each < given.tiles ? begin + given.each : given.tiles;
  const int warp = warp_id();
  if (warp < WARPGROUP / WARP) {
    registers_down<24>();
    if (thread_id() == 0) produce(shared, x_map, y_map, near_map, block * ROWS, begin, end);
  } else {
    registers_up<240>();
    const int group = warp / (WARPGROUP / WARP) - 1, lane = lane_id();
    const int i = block * ROWS + group * OWNED + warp % (WARPGROUP / WARP) * 16 + lane / 4;  // a row; i + 8 the other
    // A scale of 0 becomes one that no sum can tell from it, so that a product can still take its pair away.
    float c = scale_in_base_2(p);
    if (fabsf(c) < 1e-25f) c = 1e-25f;

    float r[2], g[2];  // of the rows i and i + 8
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = i + 8 * h;
      const bool counts = row < p.n && given.row_lse != nullptr;
      r[h] = counts ? base_2(given.row_lse[row]) : INFINITY;
      g[h] = counts ? arrived(given.row_grad[row], given.row_lse[row], fold_of(given.fold)) : 0.f;
    }

    float o[D / 2], s[Of::WIDTH / 2], of_scale = 0.f, of_bias[2] = {};
    uint32_t w[Of::WIDTH / 4];
#pragma unroll
    for (int k = 0; k < D / 2; ++k) o[k] = 0.f;

    uint32_t asks, asking;  // of each 32 tiles, a lane each; a bit for each that asks anything
    const auto weigh_tile = [&](int t, int stage, bool first) {
      const int nth = t % WARP;
      if (first || nth == 0) {
        const int first_row = opaque(i) / OWNED * OWNED;  // nothing of which is worth a register from tile to tile
        Problem whole = p;                                // rows beyond the last weigh nothing, and need no look
        whole.n = (p.n + OWNED - 1) / OWNED * OWNED;
        asks = look(whole, first_row, OWNED, (t - nth + lane) * Of::WIDTH, Of::WIDTH);
        asking = lanes_where(asks != ALL_COUNT);
      }
      if (asking >> nth & 1) {
        const uint32_t of_tile = from_lane(static_cast<int>(asks), nth);
        leave_out(s, p, of_tile, i, t * Of::WIDTH + lane % 4 * 2, c < 0.f ? 1e30f : -1e30f);
      }
      const uint32_t near = shared.near + stage * Of::NEAR_ROOM;
      float shift, spread;
      load_shared(near + Of::WIDTH * 4, shift, spread);
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
        const float* const columns = given.apart + int64_t(t) * 3 * Of::WIDTH + lane % 4 * 2;
        of_scale += weigh_apart(s, columns, g, own, other, c, p.itself ? 0.f : 1.f, of_bias);
      } else {
        float own[2], shifts[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          own[h] = given.with_columns ? g[h] * exp2_fast(shift - r[h]) : g[h];
          shifts[h] = given.with_columns ? -shift : -r[h];
        }
        of_scale += weigh(s, near + lane % 4 * 8, own, shifts, c);
      }
    };

    const uint32_t x = shared.x + group * OWNED * 128;
    Ring<Of::STAGES> ring;
    barrier_wait(shared.x_full, 0);
    barrier_wait(shared.full, 0);
    wgmma_fence();
    multiply<T, D>(s, x, shared.y);
    wgmma_wait<0>();
    pin(s);
    weigh_tile(begin, 0, true);
    pack<T>(w, s);
    for (int t = begin + 1; t < end; ++t) {
      const int before = ring.stage;
      ring.next();
      barrier_wait(shared.full + 8 * ring.stage, ring.phase);
      pin(w), pin(o);
      wgmma_fence();
      multiply<T, D>(s, x, shared.y + ring.stage * Of::Y_BYTES);
      accumulate<T, D>(o, w, shared.y + before * Of::Y_BYTES);
      wgmma_wait<1>();
      pin(s);
      weigh_tile(t, ring.stage, false);
      wgmma_wait<0>();
      pin(w), pin(o);
      if (lane == 0) barrier_arrive(shared.empty + 8 * before);
      pack<T>(w, s);
    }
    pin(w), pin(o);
    wgmma_fence();
    accumulate<T, D>(o, w, shared.y + ring.stage * Of::Y_BYTES);
    wgmma_wait<0>();
    pin(w), pin(o);

    const float unfold = unfold_of(given.fold);
    if (given.dscale != nullptr) {
      for (int by = 1; by < WARP; by *= 2) of_scale += exchange(of_scale, by);
      if (lane == 0) given.dscale[block_id() * 8 + warp - WARPGROUP / WARP] = of_scale * unfold;
    }
    const float factor = (p.scale_tensor == nullptr ? p.scale : p.scale * *p.scale_tensor) * unfold;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = i + 8 * h;
      const int64_t place = int64_t(split) * p.n + row;
      if (given.dbias != nullptr) {
        for (int by = 1; by < 4; by *= 2) of_bias[h] += exchange(of_bias[h], by);
        if (lane % 4 == 0 && row < p.n) given.dbias[place] = of_bias[h] * unfold;
      }
      if (given.dx != nullptr && row < p.n) {
        float* const to = given.dx + place * whole(p.d) + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < D / 8; ++k)
          if (8 * k < p.d)
            *reinterpret_cast<Two*>(to + 8 * k) = {factor * o[4 * k + 2 * h], factor * o[4 * k + 2 * h + 1]};
      }
    }
  }
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
