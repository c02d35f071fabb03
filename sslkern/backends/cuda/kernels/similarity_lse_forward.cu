// Log-sum-exps of the rows of S and, from the same pass, of its columns; of q with itself without a bias s_ij = s_ji,
// and each pair is visited once for both of its rows.
//
// Queries are the N side of the products and keys the M side, 64 of a tile for each consumer. So a thread's sums for
// its queries stay in registers through a segment, those for its two keys cost four exchanges a tile, and neither
// touches shared memory. Exponentials are relative to a shift, the largest score of a warp's first tile. Where that was
// far from what a row turns out to be, its terms may have vanished or overflowed: `merge` flags it, and
// similarity_lse_rows.cu does it again with a running maximum.
//
// Floor, in cycles of a processor for 128 keys and 256 queries: products 16 D, exponentials 2,048.
#include "segments.h"
#include "similarity.h"

namespace sslkern::cuda {

constexpr int PANEL = 64;  // features side by side in shared memory
constexpr int BOX_ROWS = 64;
constexpr int BOX_BYTES = BOX_ROWS * PANEL * 2;
constexpr int OF_CONSUMER = 64;                 // keys in a tile
constexpr int TILE = 2 * OF_CONSUMER;           // keys in a tile of a block
constexpr int HALF = 128;                       // queries of a product
constexpr int FORWARD_THREADS = 3 * WARPGROUP;  // one fetches, two consume

// ---- what is fetched and when ---------------------------------------------------------------------------------------

SSLKERN_DEVICE int consumer_warp() { return warp_id() - WARPGROUP / WARP; }

// Stages in shared memory that a producer fills and consumers give back.
struct Ring {
  uint32_t memory, barriers;  // of each stage: is it full, is it empty
  int bytes, stages;
  int stage = 0;
  uint32_t phase = 0;

  SSLKERN_DEVICE Ring(uint32_t memory, uint32_t barriers, int bytes, int stages)
      : memory(memory), barriers(barriers), bytes(bytes), stages(stages) {}
  SSLKERN_DEVICE uint32_t place() const { return memory + stage * bytes; }
  SSLKERN_DEVICE uint32_t full() const { return barriers + 16 * stage; }
  SSLKERN_DEVICE uint32_t empty() const { return full() + 8; }
  SSLKERN_DEVICE uint32_t empty_before() const { return barriers + 16 * (stage == 0 ? stages - 1 : stage - 1) + 8; }
  SSLKERN_DEVICE void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// The queries of a block, the rings of its consumers, and the barriers.
struct Memory {
  uint32_t queries, rings, barriers;
  int bytes, stages;

  SSLKERN_DEVICE Memory(int query_bytes, int rings, int bytes, int stages)
      : queries(dynamic_shared()),
        rings(queries + query_bytes),
        barriers(this->rings + rings * bytes * stages),
        bytes(bytes),
        stages(stages) {}
  SSLKERN_DEVICE Ring ring(int number) const {
    return Ring(rings + number * bytes * stages, barriers + 16 + number * 16 * stages, bytes, stages);
  }
  SSLKERN_DEVICE uint32_t queries_full() const { return barriers; }
  SSLKERN_DEVICE uint32_t queries_empty() const { return barriers + 8; }

  // For BLOCKS that share it: so many warps fill a stage, and so many give it back.
  template <int BLOCKS>
  SSLKERN_DEVICE void begin(int rings, int fill, int give_back) const {
    if (thread_id() == 0) {
      barrier_init(queries_full(), 1);
      barrier_init(queries_empty(), WARPS);
      for (int number = 0; number < rings; ++number) {
        Ring ring = this->ring(number);
        for (int n = 0; n < stages; ++n, ring.next()) {
          barrier_init(ring.full(), fill);
          barrier_init(ring.empty(), give_back);
        }
      }
      publish_barriers();
    }
    sync_block();
    sync_warp();
    if constexpr (BLOCKS > 1) sync_cluster();
  }
};

// All panels of the queries of each segment, once the last products with those before have ended.
template <int QUERIES, int BLOCKS>
SSLKERN_DEVICE void fetch_queries(const TensorMap& q, int panels, Walk walk, const Memory& memory) {
  prefetch_map(q);
  for (uint32_t phase = 1; walk.next(); phase ^= 1) {
    const int row = (walk.segment.group * BLOCKS + cluster_rank()) * QUERIES;
    barrier_wait(memory.queries_empty(), phase);
    barrier_expect(memory.queries_full(), panels * (QUERIES / BOX_ROWS) * BOX_BYTES);
    uint32_t to = memory.queries;
    for (int panel = 0; panel < panels; ++panel)
      for (int box = 0; box < QUERIES; box += BOX_ROWS, to += BOX_BYTES)
        load_box(to, q, memory.queries_full(), panel * PANEL, row + box);
  }
}

// The keys of one consumer, PANELS of them a stage. Block r of a cluster fetches those of consumer r for all blocks.
template <int PANELS, int BLOCKS>
SSLKERN_DEVICE void fetch_keys(const TensorMap& k, int panels, int consumer, Walk walk, Ring ring) {
  prefetch_map(k);
  while (walk.next()) {
    int row = walk.segment.tile * TILE + consumer * OF_CONSUMER;
    for (int n = walk.segment.from; n < walk.segment.to; ++n, row += walk.segment.step * TILE)
      for (int panel = 0; panel < panels; panel += PANELS, ring.next()) {
        barrier_wait(ring.empty(), ring.phase ^ 1);
        barrier_expect(ring.full(), PANELS * BOX_BYTES);
#pragma unroll
        for (int i = 0; i < PANELS; ++i) {
          const uint32_t to = ring.place() + i * BOX_BYTES;
          if constexpr (BLOCKS == 1)
            load_box(to, k, ring.full(), (panel + i) * PANEL, row);
          else if (static_cast<int>(cluster_rank()) == consumer)
            load_box_for((1 << BLOCKS) - 1, to, k, ring.full(), (panel + i) * PANEL, row);
        }
      }
  }
}

// A warp gives a stage back, to all blocks that fill it.
template <int BLOCKS>
SSLKERN_DEVICE void release(uint32_t empty) {
  if constexpr (BLOCKS == 1) {
    if (lane_id() == 0) barrier_arrive(empty);
  } else {
    if (lane_id() < BLOCKS) barrier_arrive_at(empty, lane_id());
  }
}

// ---- scores, and which of them count --------------------------------------------------------------------------------

// What a thread sees of a segment's tiles: the scores of two keys, j and j + 8, with the block's HALVES * 128 queries,
// of which it has in each group of 8 the two from lane % 4 * 2 on.
template <int HALVES>
struct Scores {
  static constexpr int QUERIES = HALVES * HALF;

  const Problem& p;
  const Plan& plan;
  const float scale;      // in base 2
  int i, j;               // its first query; its first key in the tile at hand
  uint32_t asks_of_lane;  // what the tile with the lane's number asks, of 32
  uint32_t asks;          // the tile at hand
  float shift;
  float add[2];   // to the scaled products of its keys in the tile at hand
  float bias[2];  // of its keys in the next one

  SSLKERN_DEVICE Scores(const Problem& p, const Plan& plan)
      : p(p), plan(plan), scale(scale_in_base_2(p)), asks_of_lane(0) {}

  SSLKERN_DEVICE void begin_segment(int query, int key) {
    i = query + lane_id() % 4 * 2;
    j = key + lane_id() / 4;
    load_bias();
  }
  // From each tile's keys to the next.
  SSLKERN_DEVICE int step() const { return plan.triangle ? -plan.tile_rows : plan.tile_rows; }
  SSLKERN_DEVICE void load_bias(int further = 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = j + further + 8 * r;
      bias[r] = p.bias != nullptr && key >= 0 && key < p.m ? p.bias[key] : 0.f;
    }
  }

  // What the tile asks that is `tiles` further.
  SSLKERN_DEVICE uint32_t ahead(int tiles) const {
    const int query = i & -QUERIES, key = (j & -OF_CONSUMER) + tiles * step();
    if (key < 0) return ALL_COUNT;
    const uint32_t asks = look(p, query, QUERIES, key, OF_CONSUMER);
    return plan.triangle && key < query + QUERIES ? asks | DIAGONAL : asks;
  }
  // The n-th tile of the segment is at hand; lanes look at 32 together.
  SSLKERN_DEVICE void look_at(int n) {
    if (n % WARP == 0) asks_of_lane = ahead(lane_id());
    asks = from_lane(static_cast<int>(asks_of_lane), n % WARP);
  }
  // Which pairs of the thread with the half of the queries from `first` on count: a bit each, as products lie in
  // registers, of group g, key r and query h of two the bit 4 g + 2 r + h.
  SSLKERN_DEVICE uint64_t which_count(int first) const {
    if (asks & NONE_COUNTS) return 0;
    uint64_t bits = ~uint64_t(0);
    if (asks & (IDS | LONG_IDS))
      bits = (asks & (LONG_IDS | EDGE)) ? with_ids<int64_t, true>(first) : with_ids<uint32_t, false>(first);
    if (asks & (EDGE | DIAGONAL)) {
      const int query = i + first;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = j + 8 * r;
        int end = key < p.m ? p.n : 0;  // the first query with which pairs of the key do not count
        if (plan.triangle && key < end) end = key;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int groups = (end - query - h + 7) >> 3;
          const uint64_t outside = groups <= 0 ? ~uint64_t(0) : groups >= HALF / 8 ? 0 : ~uint64_t(0) << 4 * groups;
          bits &= ~(outside & uint64_t(0x1111111111111111) << (2 * r + h));
          const int self = key - p.diagonal - query - h;
          if (p.itself && !plan.triangle && self >= 0 && self < HALF && self % 8 == 0)
            bits &= ~(uint64_t(1) << (self / 2 + 2 * r + h));
        }
      }
    }
    return bits;
  }
  // As far as ids go (their lower halves), of which some may lie beyond the edge.
  template <class Id, bool MAY_END>
  SSLKERN_DEVICE uint64_t with_ids(int first) const {
    const Id of_key[2] = {static_cast<Id>(id_of(p.k_ids, p.m, j)), static_cast<Id>(id_of(p.k_ids, p.m, j + 8))};
    uint64_t equal = 0;
#pragma unroll 1
    for (int four = 0; four < HALF / 32; ++four) {
      const int query = i + first + 32 * four;
      uint32_t bits = 0;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int further = n / 2 * 8 + n % 2;
        const int64_t id = MAY_END ? id_of(p.q_ids, p.n, query + further) : p.q_ids[query + further];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (static_cast<Id>(id) == of_key[r]) bits |= 1 << (n / 2 * 4 + 2 * r + n % 2);
      }
      equal |= static_cast<uint64_t>(bits) << 16 * four;
    }
    return p.same ? equal : ~equal;
  }

  // The largest score of the warp that counts, of these products with the first half of the queries.
  template <int R>
  SSLKERN_DEVICE void set_shift(const float (&products)[R]) {
    const uint64_t counting = which_count(0);
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < HALF / 2; ++n) {
      const float score = fmaf(products[n], scale, bias[n / 2 % 2] * LOG2_E);
      if (counting >> n & 1) largest = fmaxf(largest, score);
    }
#pragma unroll
    for (int by = WARP / 2; by > 0; by /= 2) largest = fmaxf(largest, exchange(largest, by));
    shift = fabsf(largest) < INFINITY ? largest : 0.f;
  }
  SSLKERN_DEVICE void begin_sums() {
#pragma unroll
    for (int r = 0; r < 2; ++r) add[r] = fmaf(bias[r], LOG2_E, -shift);
  }
  // Adds up the exponentials of products with a half of the queries, those of its groups of 8 from..to.
  template <int HALF_AT, int R, int SUMS>
  SSLKERN_DEVICE void add_up(const float (&products)[R], uint64_t counting, int from, int to, float (&of_queries)[SUMS],
                             float (&of_keys)[4]) {
    asks = opaque(asks);
    if (asks == ALL_COUNT)
      add_up<HALF_AT, false>(products, counting, from, to, of_queries, of_keys);
    else if (!(asks & NONE_COUNTS))
      add_up<HALF_AT, true>(products, counting, from, to, of_queries, of_keys);
  }
  template <int HALF_AT, bool ASKS, int R, int SUMS>
  SSLKERN_DEVICE void add_up(const float (&products)[R], uint64_t counting, int from, int to, float (&of_queries)[SUMS],
                             float (&of_keys)[4]) const {
#pragma unroll
    for (int n = 4 * from; n < 4 * to; n += 4) {
      float e[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float product = products[(R == HALF / 2 ? 0 : HALF_AT * HALF / 2) + n + k];
        e[k] = exp2_fast(fmaf(product, scale, add[k / 2]));
        if (ASKS && !(counting >> (n + k) & 1)) e[k] = 0.f;
        of_keys[k] += e[k];
      }
      of_queries[HALF_AT * HALF / 4 + n / 2] += e[0] + e[2];
      of_queries[HALF_AT * HALF / 4 + n / 2 + 1] += e[1] + e[3];
    }
  }
};

// ---- sums on their way out ------------------------------------------------------------------------------------------

// Where a consumer's warp puts the sums of its keys in the first tile of a segment.
SSLKERN_DEVICE int column_of(const Plan& plan, const Walk& walk) {
  const int rank = cluster_rank();
  const int of_queries = plan.group_blocks > 1 ? rank : 0, of_keys = plan.tile_blocks > 1 ? rank : 0;
  const int row = walk.sequence * plan.group_blocks + of_queries;
  return (row * plan.length() + walk.segment.from) * plan.tile_rows + of_keys * TILE + consumer_warp() * OF_WARP;
}
// The sums of a tile's keys, which begin anew.
SSLKERN_DEVICE void store_keys(const Partials& to, int column, float (&of_keys)[4], float shift) {
  float a = of_keys[0] + of_keys[1], b = of_keys[2] + of_keys[3];
  of_keys[0] = of_keys[1] = of_keys[2] = of_keys[3] = 0.f;
  a += exchange(a, 1);
  b += exchange(b, 1);
  a += exchange(a, 2);
  b += exchange(b, 2);
  if (to.columns == nullptr) return;
  const int lane = lane_id();
  if (lane % 4 == 0) {
    to.columns[column + lane / 4] = a;
    to.columns[column + lane / 4 + 8] = b;
  }
  if (lane == 0) to.column_shifts[column / OF_WARP] = shift;
}
// Those of a segment's queries.
template <int SUMS>
SSLKERN_DEVICE void store_queries(const Partials& to, const Plan& plan, const Walk& walk,
                                  const float (&of_queries)[SUMS], float shift) {
  const int rank = cluster_rank(), lane = lane_id();
  const int of_block = plan.group_blocks > 1 ? rank : 0, of_keys = plan.tile_blocks > 1 ? rank : 0;
  const int block = (walk.sequence * plan.parts() + walk.part) * plan.group_blocks + of_block;
  const int blocks = plan.count * plan.parts() * plan.group_blocks;
  const int row = (walk.slot * WARPS * plan.tile_blocks + of_keys * WARPS + consumer_warp()) * blocks + block;
#pragma unroll
  for (int n = 0; n < SUMS; ++n) {
    float x = of_queries[n];
    x += exchange(x, 4);
    x += exchange(x, 8);
    x += exchange(x, 16);
    if (lane < 4) to.rows[row * (4 * SUMS) + n / 2 * 8 + lane * 2 + n % 2] = x;
  }
  if (lane == 0) to.row_shifts[row] = shift;
}

// ---- up to 128 features ---------------------------------------------------------------------------------------------
//
// The products with one half of the queries run under the exponentials of the other half.

template <class T, int PANELS>
SSLKERN_DEVICE void consume_halves(const Problem& p, const Plan& plan, Walk walk, const Partials& partials,
                                   const Memory& memory) {
  constexpr int QUERIES = 2 * HALF;
  Ring ring = memory.ring(consumer_warp() / 4);
  Scores<2> scores(p, plan);
  float acc0[HALF / 2], acc1[HALF / 2], of_queries[QUERIES / 4], of_keys[4] = {};
  const auto multiply = [&](float (&acc)[HALF / 2], int first) {
    const uint32_t a = opaque(rows_at(ring.place())), b = opaque(rows_at(memory.queries + first * PANEL * 2));
    pin(acc);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4 * PANELS; ++k)
      wgmma<T>(acc, descriptor(a + k / 4 * (BOX_BYTES / 16) + k % 4 * 2),
               descriptor(b + k / 4 * (QUERIES * PANEL * 2 / 16) + k % 4 * 2), k > 0);
    wgmma_commit();
  };
  for (uint32_t phase = 0; walk.next(); phase ^= 1) {
    const Segment& segment = walk.segment;
    const int count = segment.to - segment.from;
    int column = column_of(plan, walk);
    scores.begin_segment(segment.group * QUERIES, segment.tile * TILE + consumer_warp() * OF_WARP);
#pragma unroll
    for (int n = 0; n < QUERIES / 4; ++n) of_queries[n] = 0.f;
    barrier_wait(memory.queries_full(), phase);
    barrier_wait(ring.full(), ring.phase);
    multiply(acc0, 0);
    wgmma_wait<0>();
    pin(acc0);
    scores.look_at(0);
    scores.set_shift(acc0);
    const auto tile = [&](int n, bool last) {
      scores.look_at(n);
      scores.begin_sums();
      scores.load_bias(scores.step());
      const uint32_t used = ring.empty();
      multiply(acc1, HALF);
      wgmma_wait<1>();
      pin(acc0);
      scores.template add_up<0>(acc0, scores.which_count(0), 0, HALF / 8, of_queries, of_keys);
      ring.next();
      if (!last) {
        barrier_wait_or_trap(ring.full(), ring.phase);
        multiply(acc0, 0);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(acc1);
      release<1>(used);
      if (last) release<1>(memory.queries_empty());
      scores.template add_up<1>(acc1, scores.which_count(HALF), 0, HALF / 8, of_queries, of_keys);
      store_keys(partials, column, of_keys, scores.shift);
      column += TILE;
      scores.j += scores.step();
    };
    for (int n = 0; n + 1 < count; ++n) tile(n, false);
    tile(count - 1, true);
    store_queries(partials, plan, walk, of_queries, scores.shift);
  }
}

// ---- up to 704 features ---------------------------------------------------------------------------------------------
//
// The products of a tile, a panel of features at a time, run between parts of the exponentials of the tile before.

template <class T>
SSLKERN_DEVICE void consume_panels(const Problem& p, const Plan& plan, Walk walk, const Partials& partials,
                                   const Memory& memory, int panels) {
  constexpr int PARTS = 8;  // of the exponentials of a tile
  Ring ring = memory.ring(consumer_warp() / 4);
  Scores<1> scores(p, plan);
  float acc0[HALF / 2], acc1[HALF / 2], of_queries[HALF / 4], of_keys[4] = {};
  uint64_t counting = 0;
  int column = 0;
  const auto begin_sums = [&](int n) {
    scores.look_at(n);
    scores.begin_sums();
    scores.load_bias(scores.step());
    counting = scores.which_count(0);
  };
  const auto sum_up = [&](float (&acc)[HALF / 2], int part) {
    const int groups = HALF / 8 / PARTS;
    scores.template add_up<0>(acc, counting, part * groups, (part + 1) * groups, of_queries, of_keys);
  };
  const auto end_sums = [&] {
    store_keys(partials, column, of_keys, scores.shift);
    column += TILE;
    scores.j += scores.step();
  };
  const auto multiply = [&](float (&acc)[HALF / 2], int panel, bool accumulate) {
    barrier_wait(ring.full(), ring.phase);
    const uint32_t a = opaque(rows_at(ring.place()));
    const uint32_t b = opaque(rows_at(memory.queries + panel * (HALF * PANEL * 2)));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T>(acc, descriptor(a + 2 * k), descriptor(b + 2 * k), accumulate || k > 0);
    wgmma_commit();
  };
  const auto multiply_next = [&](float (&acc)[HALF / 2], int panel) {
    multiply(acc, panel, true);
    wgmma_wait<1>();
    release<2>(ring.empty_before());
    ring.next();
  };
  // The n-th products go to `now`, those before are in `old`.
  const auto tile = [&](float (&now)[HALF / 2], float (&old)[HALF / 2], int n) {
    pin(now);
    multiply(now, 0, false);
    wgmma_wait<1>();
    pin(old);
    release<2>(ring.empty_before());
    ring.next();
    begin_sums(n - 1);
    int panel = 1;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      for (const int until = (panels * (part + 1) + PARTS - 1) / PARTS; panel < until; ++panel)
        multiply_next(now, panel);
      sum_up(old, part);
    }
    end_sums();
  };
  const auto end_segment = [&](float (&acc)[HALF / 2], int n) {
    wgmma_wait<0>();
    pin(acc);
    release<2>(ring.empty_before());
    release<1>(memory.queries_empty());
    begin_sums(n);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) sum_up(acc, part);
    end_sums();
  };
  for (uint32_t phase = 0; walk.next(); phase ^= 1) {
    const Segment& segment = walk.segment;
    const int count = segment.to - segment.from;
    column = column_of(plan, walk);
    scores.begin_segment((segment.group * 2 + cluster_rank()) * HALF, segment.tile * TILE + consumer_warp() * OF_WARP);
#pragma unroll
    for (int n = 0; n < HALF / 4; ++n) of_queries[n] = 0.f;
    barrier_wait(memory.queries_full(), phase);
    pin(acc0);
    multiply(acc0, 0, false);
    ring.next();
    for (int panel = 1; panel < panels; ++panel) multiply_next(acc0, panel);
    wgmma_wait<0>();
    pin(acc0);
    scores.look_at(0);
    scores.set_shift(acc0);
    for (int n = 1;; n += 2) {
      if (n == count) {
        end_segment(acc0, n - 1);
        break;
      }
      tile(acc1, acc0, n);
      if (n + 1 == count) {
        end_segment(acc1, n);
        break;
      }
      tile(acc0, acc1, n + 1);
    }
    store_queries(partials, plan, walk, of_queries, scores.shift);
  }
}

// ---- more features --------------------------------------------------------------------------------------------------
//
// Queries stream by, too: one consumer's products run under the exponentials of the other.

constexpr int STREAM_BYTES = (2 * HALF + TILE) * PANEL * 2;  // of a stage: a panel of queries, then one of keys

// Each of two blocks fetches half of the queries for both, by one warp, and keys of its own, by another.
template <bool QUERIES>
SSLKERN_DEVICE void fetch_stream(const TensorMap& map, int panels, Walk walk, Ring ring) {
  prefetch_map(map);
  while (walk.next()) {
    int row = ((QUERIES ? walk.segment.group : walk.segment.tile) * 2 + cluster_rank()) * TILE;
    for (int n = walk.segment.from; n < walk.segment.to; ++n, row += QUERIES ? 0 : walk.segment.step * 2 * TILE)
      for (int panel = 0; panel < panels; ++panel, ring.next()) {
        barrier_wait(ring.empty(), ring.phase ^ 1);
        barrier_expect(ring.full(), (QUERIES ? 4 : 2) * BOX_BYTES);
        const uint32_t to = ring.place() + (QUERIES ? cluster_rank() * 2 : 4) * BOX_BYTES;
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          if constexpr (QUERIES)
            load_box_for(3, to + box * BOX_BYTES, map, ring.full(), panel * PANEL, row + box * BOX_ROWS);
          else
            load_box(to + box * BOX_BYTES, map, ring.full(), panel * PANEL, row + box * BOX_ROWS);
        }
      }
  }
}

template <class T>
SSLKERN_DEVICE void consume_stream(const Problem& p, const Plan& plan, Walk walk, const Partials& partials,
                                   const Memory& memory, int panels) {
  constexpr int QUERIES = 2 * HALF;
  Ring ring = memory.ring(0);
  Scores<2> scores(p, plan);
  float acc[HALF], of_queries[QUERIES / 4], of_keys[4] = {};
  const auto multiply = [&](bool accumulate) {
    barrier_wait(ring.full(), ring.phase);
    const uint32_t a = opaque(rows_at(ring.place() + (4 + consumer_warp() / 4) * BOX_BYTES));
    const uint32_t b = opaque(rows_at(ring.place()));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T>(acc, descriptor(a + 2 * k), descriptor(b + 2 * k), accumulate || k > 0);
    wgmma_commit();
  };
  while (walk.next()) {
    const Segment& segment = walk.segment;
    int column = column_of(plan, walk);
    scores.begin_segment(segment.group * QUERIES,
                         (segment.tile * 2 + cluster_rank()) * TILE + consumer_warp() * OF_WARP);
#pragma unroll
    for (int n = 0; n < QUERIES / 4; ++n) of_queries[n] = 0.f;
    for (int n = 0; n < segment.to - segment.from; ++n) {
      pin(acc);
      multiply(false);
      ring.next();
      for (int panel = 1; panel < panels; ++panel, ring.next()) {
        multiply(true);
        wgmma_wait<1>();
        release<2>(ring.empty_before());
      }
      wgmma_wait<0>();
      pin(acc);
      release<2>(ring.empty_before());
      scores.asks = scores.ahead(0);
      scores.load_bias();
      if (n == 0) scores.set_shift(acc);
      scores.begin_sums();
      scores.template add_up<0>(acc, scores.which_count(0), 0, HALF / 8, of_queries, of_keys);
      scores.template add_up<1>(acc, scores.which_count(HALF), 0, HALF / 8, of_queries, of_keys);
      store_keys(partials, column, of_keys, scores.shift);
      column += 2 * TILE;
      scores.j += scores.step();
    }
    store_queries(partials, plan, walk, of_queries, scores.shift);
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// MOST: features that it is for, 0 for any number. stages: of a ring.
template <class T, int MOST>
__global__ void __launch_bounds__(FORWARD_THREADS, 1)
    forward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const Problem p, const Plan plan,
            const Partials partials, int stages) {
  constexpr bool HALVES = MOST == 64 || MOST == 128, STREAM = MOST == 0;
  constexpr int BLOCKS = HALVES ? 1 : 2, QUERIES = HALVES ? 2 * HALF : HALF;
  constexpr int STAGE_PANELS = HALVES ? MOST / PANEL : 1, RINGS = STREAM ? 1 : 2;
  const int panels = HALVES ? STAGE_PANELS : (p.d + PANEL - 1) / PANEL;
  const Memory memory(STREAM ? 0 : QUERIES * panels * PANEL * 2, RINGS,
                      STREAM ? STREAM_BYTES : STAGE_PANELS * BOX_BYTES, stages);
  const auto walk = [&] { return Walk(plan, block_id() / BLOCKS, block_count() / BLOCKS); };
  memory.begin<BLOCKS>(RINGS, STREAM ? 2 : 1, (STREAM ? WARPS : WARPS / 2) * BLOCKS);
  if (warp_id() < WARPGROUP / WARP) {
    registers_down<STREAM ? 24 : 40>();
    if (lane_id() == 0) {
      const int warp = thread_id() / WARP;
      if constexpr (STREAM) {
        if (warp == 0) fetch_stream<false>(k, panels, walk(), memory.ring(0));
        if (warp == 1) fetch_stream<true>(q, panels, walk(), memory.ring(0));
      } else {
        if (warp < 2) fetch_keys<STAGE_PANELS, BLOCKS>(k, panels, warp, walk(), memory.ring(warp));
        if (warp == 2) fetch_queries<QUERIES, BLOCKS>(q, panels, walk(), memory);
      }
    }
  } else {
    registers_up<STREAM ? 240 : 232>();
    if constexpr (HALVES)
      consume_halves<T, STAGE_PANELS>(p, plan, walk(), partials, memory);
    else if constexpr (STREAM)
      consume_stream<T>(p, plan, walk(), partials, memory, panels);
    else
      consume_panels<T>(p, plan, walk(), partials, memory, panels);
  }
  sync_warp();
  if constexpr (BLOCKS > 1) sync_cluster();
}

}  // namespace sslkern::cuda
