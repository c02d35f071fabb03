// Log-sum-exps with a running maximum, exact for scores of any size: a block owns rows of S and streams the columns.
//
//   frozen       the log-sum-exp of each row and the mean of the keys that its softmax weights; up to 256 features
//   running      the log-sum-exp and the largest score of each row and each column, or of those that are flagged
//   merge_rows   what several blocks found for parts of a row, in a fixed order
//   merge_means  the same, with the means
//
// x are the features of the rows that a block owns, y those that it streams. One warpgroup loads, two own 64 rows each:
// with two at work one's exponentials run beside the other's products. Floors, in cycles of a processor for 128 rows
// and 128 columns: products 8 D (frozen: 16 D), exponentials 1,024.
#include "similarity.h"

namespace sslkern::cuda {

constexpr int BLOCK = 3 * WARPGROUP;  // threads: those that load and two times those that compute
constexpr int ROWS = 128;             // of x, that a block owns
constexpr int OWN = 64;               // of which each warpgroup
constexpr int CHUNK = 64;             // features in a panel: a row of 128 bytes
constexpr int PANEL = ROWS * 128;     // bytes
constexpr int WARPS = 8;              // that compute
constexpr int MOST_BYTES = (227 << 10) - (GROUP_BYTES - 16);  // of shared memory, from a multiple of GROUP_BYTES on
constexpr float LN_2 = 0.693147181f;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

// The tiles that are loaded and not yet used.
struct Ring {
  uint32_t full, empty;  // the barriers of the stages
  int stages, stage = 0;
  uint32_t phase = 0;

  SSLKERN_DEVICE Ring(uint32_t barriers, int stages) : full(barriers), empty(barriers + 8 * stages), stages(stages) {}
  SSLKERN_DEVICE void init() const {
    for (int s = 0; s < stages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPS);
    }
  }
  SSLKERN_DEVICE void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  SSLKERN_DEVICE uint32_t begin_load(int bytes) const {
    barrier_wait(empty + 8 * stage, phase ^ 1);
    barrier_expect(full + 8 * stage, bytes);
    return full + 8 * stage;
  }
  SSLKERN_DEVICE void wait() const { barrier_wait(full + 8 * stage, phase); }
  SSLKERN_DEVICE void release(int stage) const {
    if (lane_id() == 0) barrier_arrive(empty + 8 * stage);
  }
};

// ---- scores of a thread: of rows i and i + 8, of columns j, j + 1, j + 8, j + 9, ... --------------------------------

// What products become where multiplying by a positive number is not all: scores in base 2. bias: of column j, or 0.
template <int R>
SSLKERN_DEVICE void to_scores(float (&s)[R], float c, uint32_t bias) {
#pragma unroll
  for (int n = 0; n < R / 4; ++n) {
    float b[2] = {0.f, 0.f};
    if (bias != 0) load_shared(bias + 32 * n, b[0], b[1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = fmaf(s[4 * n + e], c, b[e % 2] * LOG2_E);
      s[4 * n + e] = b[e % 2] == -INFINITY ? -INFINITY : x;  // whatever the product is
    }
  }
}

// Of the pairs of 64 rows with a tile of columns. Rows beyond the edge are not stored: only columns are asked for it.
SSLKERN_DEVICE uint32_t look_at_columns(const Problem& p, int i, int j, int columns) {
  const uint32_t asks = look(p, i, OWN, j, columns);
  return j + columns > p.m ? asks : asks & ~EDGE;
}

template <uint32_t ASKS, int R>
SSLKERN_DEVICE void leave_out(float (&s)[R], const Problem& p, int i, int j) {
  constexpr bool HAS_IDS = ASKS & (IDS | LONG_IDS);
  const int64_t above = HAS_IDS ? id_of(p.q_ids, p.n, i) : 0, below = HAS_IDS ? id_of(p.q_ids, p.n, i + 8) : 0;
#pragma unroll
  for (int n = 0; n < R; n += 4)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = j + 2 * n + h;
      const int64_t id = HAS_IDS ? id_of(p.k_ids, p.m, column) : 0;
      if (!counts(p, ASKS, i, column, above, id)) s[n + h] = -INFINITY;
      if (!counts(p, ASKS, i + 8, column, below, id)) s[n + 2 + h] = -INFINITY;
    }
}

// Pairs that do not count get the score -inf, one option of the tile after the other. Where none counts, all ids say
// so.
template <int R>
SSLKERN_DEVICE void leave_out(float (&s)[R], const Problem& p, uint32_t asks, int i, int j) {
  if (asks & EDGE) leave_out<EDGE>(s, p, i, j);
  if (asks & DIAGONAL) leave_out<DIAGONAL>(s, p, i, j);
  if (asks & IDS) leave_out<IDS>(s, p, i, j);
  if (asks & (LONG_IDS | NONE_COUNTS)) leave_out<LONG_IDS>(s, p, i, j);
}

// What to take off scores before the exponential: the maximum, but 0 where it is infinite (inf - inf is NaN).
SSLKERN_DEVICE float finite_shift(float maximum) { return maximum - maximum == 0.f ? maximum : 0.f; }

// Scores of two rows, taken in tile by tile. LIFT: powers of two that terms are made larger by.
template <int LIFT>
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};  // of the scores so far, in base 2; drops NaN
  float sum[2] = {0.f, 0.f};                  // of exp2(score - shift), over the columns of this thread; keeps it

  SSLKERN_DEVICE float shift(int r) const { return finite_shift(maximum[r]) - LIFT; }

  // s becomes exp2(c s - shift), shrink what terms of earlier tiles have to be multiplied by.
  template <int R>
  SSLKERN_DEVICE void take(float (&s)[R], float c, float (&shrink)[2]) {
    float of_tile[2] = {s[0], s[2]};
#pragma unroll
    for (int n = 0; n < R; ++n) of_tile[n / 2 % 2] = fmaxf(of_tile[n / 2 % 2], s[n]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      of_tile[r] = fmaxf(of_tile[r], exchange(of_tile[r], 1));
      of_tile[r] = fmaxf(of_tile[r], exchange(of_tile[r], 2));
      const float old = maximum[r] - LIFT;
      maximum[r] = fmaxf(maximum[r], of_tile[r] * c);
      shrink[r] = exp2_fast(old - shift(r));
      sum[r] *= shrink[r];
    }
    const float down[2] = {-shift(0), -shift(1)};
#pragma unroll
    for (int n = 0; n < R; ++n) s[n] = exp2_fast(fmaf(s[n], c, down[n / 2 % 2]));
#pragma unroll
    for (int n = 0; n < R; n += 4) {
      sum[0] += s[n] + s[n + 1];
      sum[1] += s[n + 2] + s[n + 3];
    }
  }

  SSLKERN_DEVICE void add_lanes() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += exchange(sum[r], 1);
      sum[r] += exchange(sum[r], 2);
    }
  }
  SSLKERN_DEVICE float log_sum(int r) const { return LN_2 * (shift(r) + log2f(sum[r])); }
  SSLKERN_DEVICE float best(int r) const { return sum[r] == sum[r] ? LN_2 * maximum[r] : sum[r]; }
};

// ---- frozen ---------------------------------------------------------------------------------------------------------

struct alignas(8) Two {
  float x[2];
};

// Shared memory of a block for up to D features: x and the stages of y as panels of 64 features, the biases, barriers.
template <int D>
struct FrozenLayout {
  static constexpr int COLUMNS = D == 256 ? 64 : 128;  // of a tile, as registers allow
  static constexpr int PANELS = D / CHUNK, Y_PANEL = COLUMNS * 128;
  static constexpr int X_BYTES = PANELS * PANEL, Y_BYTES = PANELS * Y_PANEL, BIAS_BYTES = COLUMNS * 4;
  static constexpr int STAGES = D == 64 ? 8 : 5;
  static_assert(X_BYTES + STAGES * (Y_BYTES + BIAS_BYTES) + 8 * (2 * STAGES + 1) <= MOST_BYTES);
};

// A block takes 128 rows and a part of `tiles` tiles of the columns. row and best (or null) [parts, n], mean
// [parts, n, width]: of the part. width: d, or the next multiple of 8.
template <class T, int D>
__global__ void __launch_bounds__(BLOCK, 1)
    frozen(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
           const __grid_constant__ TensorMap bias, const Problem p, int tiles, float* row, float* best, int width,
           float* mean) {
  using L = FrozenLayout<D>;
  constexpr int N = L::COLUMNS;
  const uint32_t x = dynamic_shared(), y = x + L::X_BYTES, biases = y + L::STAGES * L::Y_BYTES;
  const uint32_t barriers = biases + L::STAGES * L::BIAS_BYTES, x_full = barriers + 16 * L::STAGES;
  Ring ring(barriers, L::STAGES);
  const int warp = warp_id(), lane = lane_id(), blocks = (p.n + ROWS - 1) / ROWS;
  const int part = int(block_id()) / blocks, first_row = int(block_id()) % blocks * ROWS;
  const int all = (p.m + N - 1) / N, begin = part * tiles, end = begin + tiles < all ? begin + tiles : all;
  if (warp == 0 && lane == 0) {
    ring.init();
    barrier_init(x_full, 1);
    publish_barriers();
  }
  sync_block();

  if (warp < WARPGROUP / WARP) {
    registers_down<PRODUCER_REGISTERS>();
    if (warp == 0 && lane == 0) {
      barrier_expect(x_full, L::X_BYTES);
      for (int c = 0; c < L::PANELS; ++c) load_box(x + c * PANEL, q, x_full, c * CHUNK, first_row);
      for (int t = begin; t < end; ++t, ring.next()) {
        const uint32_t full = ring.begin_load(L::Y_BYTES + (p.bias == nullptr ? 0 : L::BIAS_BYTES));
        for (int c = 0; c < L::PANELS; ++c)
          load_box(y + ring.stage * L::Y_BYTES + c * L::Y_PANEL, k, full, c * CHUNK, t * N);
        if (p.bias != nullptr) load_vector(biases + ring.stage * L::BIAS_BYTES, bias, full, t * N);
      }
    }
  } else {
    registers_up<CONSUMER_REGISTERS>();
    const int own = warp / 4 - 1, i0 = first_row + OWN * own, i = i0 + 16 * (warp % 4) + lane / 4;
    const uint32_t a = rows_at(x + own * OWN * 128), b = rows_at(y), v = columns_at(y, L::Y_PANEL);
    const float c = scale_in_base_2(p);
    const bool plain = c > 0.f && p.bias == nullptr;
    float s[N / 2], o[D / 2], shrink[2];
    uint32_t w[N / 4];
    Softmax<SAME<T, fp16> ? 14 : 0> softmax;
    uint32_t special = 0;
#pragma unroll
    for (int n = 0; n < D / 2; ++n) o[n] = 0.f;

    const auto first_product = [&] {
      const uint32_t from = opaque(a), to = opaque(b + ring.stage * (L::Y_BYTES >> 4));
#pragma unroll
      for (int n = 0; n < D / 16; ++n)
        wgmma<T>(s, descriptor(from + n / 4 * (PANEL >> 4) + n % 4 * 2),
                 descriptor(to + n / 4 * (L::Y_PANEL >> 4) + n % 4 * 2), n > 0);
      wgmma_commit();
    };
    const auto second_product = [&](int stage) {
      const uint32_t to = opaque(v + stage * (L::Y_BYTES >> 4));
#pragma unroll
      for (int n = 0; n < N / 16; ++n)
        wgmma<T>(o, w[4 * n], w[4 * n + 1], w[4 * n + 2], w[4 * n + 3], descriptor(to + n * (2048 >> 4)));
      wgmma_commit();
    };
    const auto exponentials = [&](int t) {
      if ((t - begin) % 32 == 0)
        special = lanes_where(t + lane < end && look_at_columns(p, i0, (t + lane) * N, N) != ALL_COUNT);
      const int j = t * N + 2 * (lane % 4);
      if (!plain) to_scores(s, c, p.bias == nullptr ? 0 : biases + ring.stage * L::BIAS_BYTES + 8 * (lane % 4));
      if (special >> (t - begin) % 32 & 1) leave_out(s, p, look_at_columns(p, i0, t * N, N), i, j);
      softmax.take(s, plain ? c : 1.f, shrink);
    };
    const auto wait_for_next = [&](int t) {
      Ring next = ring;
      next.next();
      if (t + 1 < end) next.wait();
    };
    const auto pack = [&] {
#pragma unroll
      for (int n = 0; n < N / 4; ++n) w[n] = packed<T>(s[2 * n], s[2 * n + 1]);
    };

    // The product with tile t is under way before the weights of tile t - 1 are multiplied; both before the
    // exponentials.
    barrier_wait(x_full, 0);
    ring.wait();
    wgmma_fence();
    first_product();
    wgmma_wait<0>();
    pin(s);
    exponentials(begin);
    wait_for_next(begin);
    pack();
    for (int t = begin + 1; t < end; ++t) {
      const int before = ring.stage;
      ring.next();
      pin(w), pin(o);
      wgmma_fence();
      first_product();
      second_product(before);
      wgmma_wait<1>();
      pin(s);
      exponentials(t);
      pin(s);
      wait_for_next(t);
      wgmma_wait<0>();
      pin(o), pin(w);
      ring.release(before);
      if (any_lane(shrink[0] != 1.f || shrink[1] != 1.f))  // mostly in the first tiles
#pragma unroll
        for (int n = 0; n < D / 2; ++n) o[n] *= shrink[n / 2 % 2];
      pack();
    }
    pin(w), pin(o);
    wgmma_fence();
    second_product(ring.stage);
    softmax.add_lanes();
    wgmma_wait<0>();
    pin(o), pin(w);

    const int64_t place = int64_t(part) * p.n + i;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (i + 8 * r >= p.n) continue;
      const float factor = softmax.sum[r] == 0.f ? 0.f : 1.f / softmax.sum[r];
      Two* const to = reinterpret_cast<Two*>(mean + (place + 8 * r) * width) + lane % 4;
#pragma unroll
      for (int n = 0; n < D / 2; n += 4)
        if (2 * n < width) to[n] = {o[n + 2 * r] * factor, o[n + 2 * r + 1] * factor};
      if (lane % 4 == 0) row[place + 8 * r] = softmax.log_sum(r);
      if (lane % 4 == 0 && best != nullptr) best[place + 8 * r] = softmax.best(r);
    }
  }
}

// ---- running --------------------------------------------------------------------------------------------------------

// The rows of S; or its columns, as rows of its transpose, where the bias is one of rows.
struct Side {
  Problem p;
  const float* row_bias;  // [n], or null
  const uint8_t* flags;   // [n], on a multiple of 8: only rows that have one are wanted; or null: all
  float *lse, *best;      // [parts, n]; best may be null
  int parts, tiles;       // of the columns, `tiles` each; no parts: nothing is wanted

  SSLKERN_DEVICE int blocks() const { return (p.n + ROWS - 1) / ROWS; }
  SSLKERN_DEVICE bool wants_any(int first) const {
    if (flags == nullptr) return true;
    const int last = first + ROWS < p.n ? first + ROWS : p.n;
    int64_t any = 0;
    int i = first;
    for (; i + 8 <= last; i += 8) any |= *reinterpret_cast<const int64_t*>(flags + i);
    for (; i < last; ++i) any |= flags[i];
    return any != 0;
  }
};
struct Sides {
  Side of[2];  // rows, columns

  SSLKERN_DEVICE int units() const { return of[0].blocks() * of[0].parts + of[1].blocks() * of[1].parts; }
};

// A part of a block of rows. Neighbours are the same part of neighbouring blocks.
struct Unit {
  int side, part, first, begin, end;  // its first row; its first tile and the one after its last

  SSLKERN_DEVICE Unit(const Sides& sides, int number) {
    const int of_rows = sides.of[0].blocks() * sides.of[0].parts;
    side = number >= of_rows;
    const Side& s = sides.of[side];
    if (side != 0) number -= of_rows;
    part = number / s.blocks(), first = number % s.blocks() * ROWS;
    const int all = (s.p.m + ROWS - 1) / ROWS;
    begin = part * s.tiles, end = begin + s.tiles < all ? begin + s.tiles : all;
  }
  SSLKERN_DEVICE bool is_wanted(const Sides& sides) const { return sides.of[side].wants_any(first); }
};

// The units of this block of which anything is wanted, by whole warps.
template <class Work>
SSLKERN_DEVICE void each_unit(const Sides& sides, Work work) {
  const int units = sides.units(), step = int(block_count());
  uint32_t wanted = 0;
  for (int number = int(block_id()), n = 0; number < units; number += step, ++n) {
    if (n % 32 == 0) {
      const int ahead = number + lane_id() * step;
      wanted = lanes_where(ahead < units && Unit(sides, ahead).is_wanted(sides));
    }
    if (wanted >> n % 32 & 1) work(Unit(sides, number));
  }
}

// Shared memory: panels of x, which stay where all of its features fit, and stages of a panel of y, else one of both.
struct RunningLayout {
  static constexpr int PANELS = 13, MOST_THAT_STAY = 9, MOST_STAGES = 12, BIAS_BYTES = ROWS * 4;
  static_assert(PANELS * PANEL + MOST_STAGES * BIAS_BYTES + 8 * (2 * MOST_STAGES + 2) <= MOST_BYTES);
  int chunks, stage_bytes, stages;
  bool x_stays;

  SSLKERN_DEVICE explicit RunningLayout(int d) : chunks((d + CHUNK - 1) / CHUNK) {
    x_stays = chunks <= MOST_THAT_STAY;
    stage_bytes = x_stays ? PANEL : 2 * PANEL;
    stages = x_stays ? PANELS - chunks : PANELS / 2;
  }
};

template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    running(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
            const __grid_constant__ TensorMap bias, const __grid_constant__ Sides sides) {
  using L = RunningLayout;
  const L layout(sides.of[0].p.d);
  const uint32_t x = dynamic_shared(), stages = x + (layout.x_stays ? layout.chunks * PANEL : 0);
  const uint32_t biases = x + L::PANELS * PANEL, barriers = biases + L::MOST_STAGES * L::BIAS_BYTES;
  const uint32_t x_full = barriers + 16 * L::MOST_STAGES, x_empty = x_full + 8;
  Ring ring(barriers, layout.stages);
  const int warp = warp_id(), lane = lane_id();
  uint32_t x_phase = 0;
  if (warp == 0 && lane == 0) {
    ring.init();
    barrier_init(x_full, 1);
    barrier_init(x_empty, WARPS);
    publish_barriers();
  }
  sync_block();

  if (warp < WARPGROUP / WARP) {
    registers_down<PRODUCER_REGISTERS>();
    if (warp == 0)
      each_unit(sides, [&](const Unit& unit) {
        if (lane != 0) return;
        const TensorMap &own = unit.side == 0 ? q : k, &other = unit.side == 0 ? k : q;
        const bool has_bias = sides.of[unit.side].p.bias != nullptr;
        if (layout.x_stays) {
          barrier_wait(x_empty, x_phase ^ 1);
          barrier_expect(x_full, layout.chunks * PANEL);
          for (int c = 0; c < layout.chunks; ++c) load_box(x + c * PANEL, own, x_full, c * CHUNK, unit.first);
          x_phase ^= 1;
        }
        for (int t = unit.begin; t < unit.end; ++t)
          for (int c = 0; c < layout.chunks; ++c, ring.next()) {
            const bool with_bias = has_bias && c == layout.chunks - 1;
            const uint32_t to = stages + ring.stage * layout.stage_bytes;
            const uint32_t full = ring.begin_load(layout.stage_bytes + (with_bias ? L::BIAS_BYTES : 0));
            load_box(to, other, full, c * CHUNK, t * ROWS);
            if (!layout.x_stays) load_box(to + PANEL, own, full, c * CHUNK, unit.first);
            if (with_bias) load_vector(biases + ring.stage * L::BIAS_BYTES, bias, full, t * ROWS);
          }
      });
  } else {
    registers_up<CONSUMER_REGISTERS>();
    const int own = warp / 4 - 1;
    float s[ROWS / 2], shrink[2];
    each_unit(sides, [&](const Unit& unit) {
      const Side& side = sides.of[unit.side];
      const Problem& p = side.p;
      const int i0 = unit.first + OWN * own, i = i0 + 16 * (warp % 4) + lane / 4;
      const float scale = scale_in_base_2(p);
      const bool plain = scale > 0.f && p.bias == nullptr;
      Softmax<0> softmax;
      uint32_t special = 0;
      if (layout.x_stays) {
        barrier_wait(x_full, x_phase);
        x_phase ^= 1;
      }
      for (int t = unit.begin; t < unit.end; ++t) {
        int before = 0;
#pragma unroll
        for (int n = 0; n < ROWS / 2; ++n) s[n] = 0.f;
        pin(s);
        for (int c = 0; c < layout.chunks; ++c) {
          ring.wait();
          const uint32_t from = stages + ring.stage * layout.stage_bytes;
          const uint32_t a = opaque(rows_at((layout.x_stays ? x + c * PANEL : from + PANEL) + own * OWN * 128));
          const uint32_t b = opaque(rows_at(from));
          wgmma_fence();
#pragma unroll
          for (int n = 0; n < CHUNK / 16; ++n) wgmma<T>(s, descriptor(a + 2 * n), descriptor(b + 2 * n), true);
          wgmma_commit();
          if (c > 0) {
            wgmma_wait<1>();
            ring.release(before);
          }
          before = ring.stage;
          ring.next();
        }
        wgmma_wait<0>();
        pin(s);
        const int j = t * ROWS + 2 * (lane % 4);
        if (!plain) to_scores(s, scale, p.bias == nullptr ? 0 : biases + before * L::BIAS_BYTES + 8 * (lane % 4));
        ring.release(before);
        if ((t - unit.begin) % 32 == 0)
          special = lanes_where(t + lane < unit.end && look_at_columns(p, i0, (t + lane) * ROWS, ROWS) != ALL_COUNT);
        if (special >> (t - unit.begin) % 32 & 1) leave_out(s, p, look_at_columns(p, i0, t * ROWS, ROWS), i, j);
        softmax.take(s, plain ? scale : 1.f, shrink);
      }
      if (layout.x_stays && lane == 0) barrier_arrive(x_empty);
      softmax.add_lanes();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = i + 8 * r;
        if (lane % 4 != 0 || row >= p.n || (side.flags != nullptr && side.flags[row] == 0)) continue;
        const float b = side.row_bias == nullptr ? 0.f : side.row_bias[row];
        const int64_t place = int64_t(unit.part) * p.n + row;
        side.lse[place] = b == -INFINITY ? b : softmax.log_sum(r) + b;
        if (side.best != nullptr) side.best[place] = b == -INFINITY ? b : softmax.best(r) + b;
      }
    });
  }
}

// ---- parts ----------------------------------------------------------------------------------------------------------

struct Parts {
  const uint8_t* flags;                 // [n], as above
  const float *lse_parts, *best_parts;  // [parts, n]; best may be null
  float *lse, *best;                    // [n]
  int parts, n;
};
struct PartsOfSides {
  Parts of[2];
};

// The parts of row i, by so many lanes; returns the log-sum-exp.
template <int LANES>
SSLKERN_DEVICE float merge(const Parts& p, int i) {
  const int first = LANES == 1 ? 0 : lane_id();
  float maximum = -INFINITY, best = -INFINITY, total = 0.f;
  for (int part = first; part < p.parts; part += LANES) {
    const int64_t place = int64_t(part) * p.n + i;
    maximum = fmaxf(maximum, p.lse_parts[place]);
    if (p.best != nullptr) best = fmaxf(best, p.best_parts[place]);
  }
#pragma unroll
  for (int by = LANES / 2; by > 0; by /= 2) {
    maximum = fmaxf(maximum, exchange(maximum, by));
    best = fmaxf(best, exchange(best, by));
  }
  const float shift = finite_shift(maximum);
  for (int part = first; part < p.parts; part += LANES)
    total += exp2_fast(LOG2_E * (p.lse_parts[int64_t(part) * p.n + i] - shift));
#pragma unroll
  for (int by = LANES / 2; by > 0; by /= 2) total += exchange(total, by);
  const float lse = shift + LN_2 * log2f(total);
  if (first == 0) {
    p.lse[i] = lse;
    if (p.best != nullptr) p.best[i] = total == total ? best : total;
  }
  return lse;
}

// A thread for each row of either side.
__global__ void __launch_bounds__(THREADS) merge_rows(const __grid_constant__ PartsOfSides sides) {
  const int64_t at = block_id() * THREADS + thread_id();
  const int side = at >= sides.of[0].n;
  const Parts& p = sides.of[side];
  const int64_t i = side == 0 ? at : at - sides.of[0].n;
  if (i < p.n && (p.flags == nullptr || p.flags[i] != 0)) merge<1>(p, int(i));
}

// A block for each row; mean [n, d] is the sum of mean_parts [parts, n, d], weighted by their exponentials. Each warp
// takes parts in turn, of up to 256 features.
__global__ void __launch_bounds__(THREADS) merge_means(const Parts p, int d, const float* mean_parts, float* mean) {
  constexpr int MOST = 256;
  __shared__ float of_warp[WARPS * MOST];
  const int i = int(block_id()), warp = warp_id(), lane = lane_id();
  const float shift = finite_shift(merge<WARP>(p, i));
  float sums[MOST / WARP] = {};
#pragma unroll 4
  for (int part = warp; part < p.parts; part += WARPS) {
    const int64_t place = int64_t(part) * p.n + i;
    const float weight = exp2_fast(LOG2_E * (p.lse_parts[place] - shift));
#pragma unroll
    for (int n = 0; n < MOST / WARP; ++n)
      if (n * WARP + lane < d) sums[n] += weight * mean_parts[place * d + n * WARP + lane];
  }
#pragma unroll
  for (int n = 0; n < MOST / WARP; ++n) of_warp[warp * MOST + n * WARP + lane] = sums[n];
  sync_block();
  if (thread_id() < d) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += of_warp[w * MOST + thread_id()];
    mean[int64_t(i) * d + thread_id()] = total;
  }
}

}  // namespace sslkern::cuda
