// The gradient of the features of one side, x, of a problem of the similarity family: a block owns ROWS of its rows,
// and the columns, rows of the other side y, stream past them. S is computed once more and never stored.
//
//     dx_i = scale sum_j w_ij y_j
//
// What a weight w_ij is the file says that includes this.
//
// Floor: two products, 4 N M D flop. Each of the two warpgroups that multiply has 64 rows; it issues the scores of a
// tile before the second product of the tile before, and computes weights while that is under way.
#pragma once

#include "similarity.h"

namespace sslkern::cuda {

constexpr int OWNED = 64;        // rows of a warpgroup, half of those of a block
constexpr int ROWS = 2 * OWNED;  // of a block
constexpr int PANEL = 64;        // features of a panel: rows of 128 bytes

// Features of a row of dx, with some that are 0 after those of the problem.
SSLKERN_DEVICE int whole(int d) { return (d + 7) / 8 * 8; }

struct alignas(8) Two {
  float first, second;
};

// What is in shared memory. D: features with zeros up to 64, 128 or 256; Of: see own_rows.
template <int D, class Of>
struct Memory {
  static constexpr int X_PANEL = ROWS * 128, X_BYTES = D / PANEL * X_PANEL;
  static constexpr int Y_PANEL = Of::WIDTH * 128, Y_BYTES = D / PANEL * Y_PANEL;
  static constexpr int NEAR_BYTES = Of::NEAR * 4, NEAR_ROOM = NEAR_BYTES + 127 & ~127;  // copies go to multiples

  // Addresses. Each stage holds a tile of y and its `near`.
  const uint32_t x, y, near, full, empty, x_full;
  SSLKERN_DEVICE explicit Memory(uint32_t base)
      : x(base),
        y(x + X_BYTES),
        near(y + Of::STAGES * Y_BYTES),
        full(near + Of::STAGES * NEAR_ROOM),
        empty(full + 8 * Of::STAGES),
        x_full(empty + 8 * Of::STAGES) {}
  static constexpr int BYTES = X_BYTES + Of::STAGES * (Y_BYTES + NEAR_ROOM + 16) + 8;
};

template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  SSLKERN_DEVICE void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

template <int D, class Of>
SSLKERN_DEVICE void produce(const Memory<D, Of>& shared, const TensorMap& x, const TensorMap& y, const TensorMap* near,
                            int row, int begin, int end) {
  barrier_expect(shared.x_full, shared.X_BYTES);
  for (int panel = 0; panel < D / PANEL; ++panel)
    load_box(shared.x + panel * shared.X_PANEL, x, shared.x_full, panel * PANEL, row);
  Ring<Of::STAGES> ring;
  for (int t = begin; t < end; ++t) {
    const uint32_t full = shared.full + 8 * ring.stage;
    barrier_wait(shared.empty + 8 * ring.stage, ring.phase ^ 1);
    barrier_expect(full, shared.Y_BYTES + shared.NEAR_BYTES);
    for (int panel = 0; panel < D / PANEL; ++panel)
      load_box(shared.y + ring.stage * shared.Y_BYTES + panel * shared.Y_PANEL, y, full, panel * PANEL, t * Of::WIDTH);
    if constexpr (Of::NEAR > 0) load_vector(shared.near + ring.stage * shared.NEAR_ROOM, *near, full, t * Of::NEAR);
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
    wgmma<T>(s, descriptor(a + panel * (ROWS * 128 >> 4) + within), descriptor(b + panel * (2 * S * 128 >> 4) + within),
             k > 0);
  }
  wgmma_commit();
}

// o += w y
template <class T, int D, int P>
SSLKERN_DEVICE void accumulate(float (&o)[D / 2], const uint32_t (&w)[P], uint32_t y) {
  const uint32_t b = opaque(columns_at(y, 4 * P * 128));
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

// What the tiles that a warpgroup passes ask of its pairs, a lane each of 32.
template <int WIDTH>
struct Asks {
  uint32_t of_lane, asking;  // a bit for each that asks anything

  // Whether tile t asks anything. row: one of the warpgroup's.
  SSLKERN_DEVICE bool anything(const Problem& p, int row, int t, bool first) {
    const int nth = t % WARP;
    if (first || nth == 0) {
      const int first_row = opaque(row) / OWNED * OWNED;  // nothing of which is worth a register from tile to tile
      Problem whole = p;                                  // rows beyond the last weigh nothing, and need no look
      whole.n = (p.n + OWNED - 1) / OWNED * OWNED;
      of_lane = look(whole, first_row, OWNED, (t - nth + lane_id()) * WIDTH, WIDTH);
      asking = lanes_where(of_lane != ALL_COUNT);
    }
    return asking >> nth & 1;
  }
  SSLKERN_DEVICE uint32_t of(int t) const { return from_lane(static_cast<int>(of_lane), t % WARP); }
};

template <class T, int S>
SSLKERN_DEVICE void pack(uint32_t (&w)[S / 2], const float (&s)[S]) {
#pragma unroll
  for (int k = 0; k < S / 2; ++k) w[k] = packed<T>(s[2 * k], s[2 * k + 1]);
}

// Of the four lanes that share a row.
SSLKERN_DEVICE void store_sum(float* to, int64_t place, float sum, bool there) {
  for (int by = 1; by < 4; by *= 2) sum += exchange(sum, by);
  if (lane_id() % 4 == 0 && there) to[place] = sum;
}

// Of: what makes weights of products, in each thread for two rows, i and i + 8. It has
//
//     WIDTH, STAGES               columns of a tile, and how many tiles are under way
//     NEAR                        numbers that come with each tile, as near_map has them
//     weigh(s, t, near, first)    products with tile t become weights, times `fold`; `near` is in shared memory
//     scale_sum, bias_sums[2]     of weights times products; of weights, for each row
//     unfold()                    1 / fold
//     end_row(h, place, there)    of a split
//
// `given` has how many tiles of columns there are and how many a split has (tiles, each), and where results go: dx
// [splits, n, whole(d)], dscale [blocks, 8] and dbias [splits, n], or null.
template <class T, int D, class Of, class Given>
SSLKERN_DEVICE void own_rows(const TensorMap& x_map, const TensorMap& y_map, const TensorMap* near_map,
                             const Problem& p, const Given& given) {
  const Memory<D, Of> shared(dynamic_shared());
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
    Of of(p, given, i);
    float o[D / 2], s[Of::WIDTH / 2];
    uint32_t w[Of::WIDTH / 4];
#pragma unroll
    for (int k = 0; k < D / 2; ++k) o[k] = 0.f;

    const uint32_t x = shared.x + group * OWNED * 128;
    Ring<Of::STAGES> ring;
    barrier_wait(shared.x_full, 0);
    barrier_wait(shared.full, 0);
    wgmma_fence();
    multiply<T, D>(s, x, shared.y);
    wgmma_wait<0>();
    pin(s);
    of.weigh(s, begin, shared.near, true);
    pack<T>(w, s);
    for (int t = begin + 1; t < end; ++t) {
      const int before = ring.stage;
      ring.next();
      barrier_wait(shared.full + 8 * ring.stage, ring.phase);
      pin(w), pin(o);
      wgmma_fence();
      multiply<T, D>(s, x, shared.y + ring.stage * shared.Y_BYTES);
      accumulate<T, D>(o, w, shared.y + before * shared.Y_BYTES);
      wgmma_wait<1>();
      pin(s);
      of.weigh(s, t, shared.near + ring.stage * shared.NEAR_ROOM, false);
      wgmma_wait<0>();
      pin(w), pin(o);
      if (lane == 0) barrier_arrive(shared.empty + 8 * before);
      pack<T>(w, s);
    }
    pin(w), pin(o);
    wgmma_fence();
    accumulate<T, D>(o, w, shared.y + ring.stage * shared.Y_BYTES);
    wgmma_wait<0>();
    pin(w), pin(o);

    const float unfold = of.unfold();
    if (given.dscale != nullptr) {
      for (int by = 1; by < WARP; by *= 2) of.scale_sum += exchange(of.scale_sum, by);
      if (lane == 0) given.dscale[block_id() * 8 + warp - WARPGROUP / WARP] = of.scale_sum * unfold;
    }
    const float factor = (p.scale_tensor == nullptr ? p.scale : p.scale * *p.scale_tensor) * unfold;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = i + 8 * h;
      const int64_t place = int64_t(split) * p.n + row;
      if (given.dbias != nullptr) store_sum(given.dbias, place, of.bias_sums[h] * unfold, row < p.n);
      of.end_row(h, place, row < p.n);
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

}  // namespace sslkern::cuda
