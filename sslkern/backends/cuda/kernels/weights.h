// Weights of the pairs of a strip of rows of S in 16 bits, which products by BLAS turn into gradients: how their
// scores come about and how they leave. What a weight is the file says that includes this.
//
// Blocks have a warpgroup that copies and two that multiply, which take 64 rows by 128 columns of S at a time:
// `chunks_of_weights` keeps a block of 128 keys in shared memory, and the queries stream through; `stream_of_weights`,
// for more features than fit, streams both.
#pragma once

#include "similarity.h"

namespace sslkern::cuda {

constexpr int BLOCK = 3 * WARPGROUP;  // threads: one warpgroup copies, two multiply and weigh
constexpr int TILE = 64;              // rows that one of these takes at a time, 16 a warp
constexpr int COLUMNS = 128;          // of a tile, which is 64 numbers a thread
constexpr int CHUNK = 64;             // features of a product
constexpr int PANEL = TILE * 128;     // bytes of a chunk of 64 rows, and of half a tile of weights
constexpr int PARTS = 8;              // of a tile, 16 columns each

// ---- a tile of weights ----------------------------------------------------------------------------------------------

// What a warp does with its 16 rows of a tile of scores d, as `wgmma` leaves them: d[4 j + 2 i + h] is the score in row
// lane / 4 + 8 i, column 8 j + 2 (lane % 4) + h. A part at a time, so that products are under way meanwhile. What is
// made of this adds what the weights are:
//
//     begin_columns(first)              of a tile
//     prefetch_rows(first)              of the warp; loads what begin_rows will need
//     begin_rows(first, asks)
//     part(d, n)                        16 columns of scores become weights, and leave
//     end_unit(unit, eighth, column)    of a unit of work from a column on what this warp has summed, its eighth
struct Tile {
  const Problem& p;
  const TensorMap& out;
  const float scale;
  const int lane = lane_id();
  const uint32_t panels;  // in shared memory: this warp's rows of the first of two
  uint32_t place;         // what this lane says to `store_matrices` of the first part
  int column, row;        // the first of the tile, the first of the warp's
  uint32_t asks;
  bool each;  // pair is weighed by itself
  float scale_sum = 0.f;

  SSLKERN_DEVICE Tile(const Problem& p, const TensorMap& out, float scale, uint32_t panels)
      : p(p), out(out), scale(scale), panels(panels) {
    // Lane l gives row l % 8 of matrix l / 8: of these the second and the fourth lie 8 rows below the others, the last
    // two 8 columns (16 bytes) to the right. The swizzle xors the bits 4 to 6 with the number of the row.
    place = panels + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
  }

  // Of the two rows of this lane among 16 from `first` on, the last where there is none.
  SSLKERN_DEVICE int row_of(int first, int i) const {
    const int at = first + lane / 4 + 8 * i;
    return at < p.n ? at : p.n - 1;
  }

  // Writes the weights of 16 columns to shared memory; half a tile is then copied out.
  template <class T>
  SSLKERN_DEVICE void write(const float* d, int n) const {
    uint32_t both[4];
#pragma unroll
    for (int i = 0; i < 4; i++) both[i] = packed<T>(d[8 * n + 2 * i], d[8 * n + 2 * i + 1]);
    store_matrices((opaque(place) ^ n % 4 << 5) + n / 4 * PANEL, both[0], both[1], both[2], both[3]);
    if (n % 4 == 3) {
      publish_shared();
      if (lane == 0) wait_stores_read<0>();  // so that the other panel may be written
      sync_warp();
      if (lane == 0) {
        store_box(out, panels + n / 4 * PANEL, column + n / 4 * 64, row);
        commit_stores();
      }
    }
  }

  // Weighs 16 columns where some pairs do not count, or with a bias. `of` has begin_rows_of_each(queries),
  // begin_column(right), which says whether the column counts that is so far right of this lane's first, and
  // weight(i, score, counts). bias_parts [ceil(n / 16), m]: sums over rows; or null.
  template <class Of>
  SSLKERN_DEVICE void weigh_each(Of& of, float* d, int n, float* bias_parts) {
    const int first = column + 16 * n + opaque(lane % 4 * 2), i0 = row + lane / 4;
    const Name queries[2] = {query_name(p, asks, i0), query_name(p, asks, i0 + 8)};
    of.begin_rows_of_each(queries);
    const int64_t to = row / 16 * int64_t(p.m) + first;
#pragma unroll 1  // so that the compiler has less to do
    for (int j = 0; j < 4; j++) {
      const int right = j / 2 * 8 + j % 2;
      Name key = key_name(p, asks, first + right);
      const bool inside = key.at == key.place;
      key.there &= of.begin_column(opaque(16 * n) + right);
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float* scores = d + 8 * n + 2 * i;  // of the four columns those at 0, 1, 4 and 5
        const float score = j < 2 ? j == 0 ? scores[0] : scores[1] : j == 2 ? scores[4] : scores[5];
        const bool yes = counts(queries[i], key, p.same);
        const float weight = of.weight(i, score, yes);
        scale_sum += yes ? weight * score : 0.f;
        sum += weight;
#pragma unroll
        for (int k = 0; k < 4; k++)
          if (k == j) scores[k / 2 * 4 + k % 2] = weight;
      }
      if (bias_parts == nullptr) continue;
      sum += exchange(sum, 4);
      sum += exchange(sum, 8);
      sum += exchange(sum, 16);
      if (lane < 4 && row < p.n && inside) bias_parts[to + right] = sum;
    }
  }

  // Of a unit of work; parts: eight of each unit, or null.
  SSLKERN_DEVICE void end_scale(float* parts, int unit, int eighth, float factor = 1.f) {
    if (parts != nullptr) {
      scale_sum *= factor;
#pragma unroll
      for (int by = 1; by < WARP; by *= 2) scale_sum += exchange(scale_sum, by);
      if (lane == 0) parts[8 * unit + eighth] = scale_sum;
    }
    scale_sum = 0.f;
  }
};

// Where one stands in a ring.
struct Ring {
  const int stages;
  int stage = 0;
  uint32_t phase = 0;
  SSLKERN_DEVICE explicit Ring(int stages) : stages(stages) {}
  SSLKERN_DEVICE void next() {
    if (++stage < stages) return;
    stage = 0;
    phase ^= 1;
  }
  // The last stage that was passed, and the one before it.
  SSLKERN_DEVICE int last() const { return (stage < 1 ? stages : 0) + stage - 1; }
  SSLKERN_DEVICE int last_but_one() const { return (stage < 2 ? stages : 0) + stage - 2; }
};

// ---- keys stay, queries stream --------------------------------------------------------------------------------------

// Shared memory of chunks_of_weights. Each of the warpgroups that multiply has a ring of queries of its own.
struct ChunksMemory {
  const int stages;
  uint32_t keys, rings, panels, barriers;
  SSLKERN_DEVICE ChunksMemory(int chunks, int stages) : stages(stages), keys(dynamic_shared()) {
    rings = keys + chunks * 2 * PANEL;
    panels = rings + 2 * stages * PANEL;
    barriers = panels + 2 * 2 * PANEL;
  }
  SSLKERN_DEVICE uint32_t queries(int ring, int stage) const { return rings + (ring * stages + stage) * PANEL; }
  SSLKERN_DEVICE uint32_t full(int ring, int stage) const { return barriers + 8 * (ring * stages + stage); }
  SSLKERN_DEVICE uint32_t empty(int ring, int stage) const { return full(ring + 2, stage); }
  SSLKERN_DEVICE uint32_t keys_full() const { return full(4, 0); }
  SSLKERN_DEVICE uint32_t keys_empty() const { return full(4, 1); }
};

// Unit u of work: a block of keys and a part of the rows, from tile `first` on, of which each warpgroup takes every
// other. Units that run at the same time mostly read the same queries.
struct ChunksUnit {
  int column, first, tiles;
  SSLKERN_DEVICE ChunksUnit(const Problem& p, int slots, int u) {
    const int blocks = (p.m + COLUMNS - 1) / COLUMNS, all = (p.n + 2 * TILE - 1) / (2 * TILE), slot = u / blocks;
    column = u % blocks * COLUMNS;
    first = 2 * (all * slot / slots);
    tiles = all * (slot + 1) / slots - all * slot / slots;
  }
  SSLKERN_DEVICE static int count(const Problem& p, int slots) { return (p.m + COLUMNS - 1) / COLUMNS * slots; }
};

// One thread of each warp: two fill the rings, one copies the keys.
SSLKERN_DEVICE void copy_chunks(const Problem& p, int slots, const TensorMap& q, const TensorMap& k,
                                const ChunksMemory& memory, int warp, int chunks, int units) {
  if (warp < 2) {
    Ring ring(memory.stages);
    for (int u = int(block_id()); u < units; u += int(block_count())) {
      const ChunksUnit unit(p, slots, u);
      for (int t = 0; t < unit.tiles; t++)
        for (int chunk = 0; chunk < chunks; chunk++) {
          const uint32_t full = memory.full(warp, ring.stage);
          barrier_wait(memory.empty(warp, ring.stage), ring.phase ^ 1);
          barrier_expect(full, PANEL);
          load_box(memory.queries(warp, ring.stage), q, full, chunk * CHUNK, (unit.first + 2 * t + warp) * TILE);
          ring.next();
        }
    }
  } else if (warp == 2) {
    uint32_t phase = 1;
    for (int u = int(block_id()); u < units; u += int(block_count())) {
      const ChunksUnit unit(p, slots, u);
      barrier_wait(memory.keys_empty(), phase);
      barrier_expect(memory.keys_full(), chunks * 2 * PANEL);
      for (int i = 0; i < 2 * chunks; i++)
        load_box(memory.keys + i * PANEL, k, memory.keys_full(), i / 2 * CHUNK, unit.column + i % 2 * TILE);
      phase ^= 1;
    }
  }
}

// The weights of all pairs, for as many features as leave room beside the keys. Of: what is made of Tile; given: what
// that takes, and by how many blocks a block of keys is shared (slots) and how long a ring is (stages).
template <class T, class Of, class Given>
SSLKERN_DEVICE void chunks_of_weights(const TensorMap& q, const TensorMap& k, const TensorMap& out, const Problem& p,
                                      const Given& w) {
  const int warp = warp_id(), chunks = (p.d + CHUNK - 1) / CHUNK, units = ChunksUnit::count(p, w.slots);
  const ChunksMemory memory(chunks, w.stages);
  if (thread_id() == 0) {
    for (int ring = 0; ring < 2; ring++)
      for (int stage = 0; stage < w.stages; stage++) {
        barrier_init(memory.full(ring, stage), 1);
        barrier_init(memory.empty(ring, stage), 4);
      }
    barrier_init(memory.keys_full(), 1);
    barrier_init(memory.keys_empty(), 8);
    publish_barriers();
  }
  sync_block();
  if (warp < 4) {
    registers_down<40>();
    if (lane_id() == 0) copy_chunks(p, w.slots, q, k, memory, warp, chunks, units);
  } else {
    registers_up<232>();
    const int group = warp / 4 - 1;
    Of tile(p, w, out, memory.panels + group * 2 * PANEL + warp % 4 * (PANEL / 4));
    Ring ring(w.stages);
    uint32_t keys_phase = 0;
    float even[64], odd[64];
    for (int u = int(block_id()); u < units; u += int(block_count())) {
      const ChunksUnit unit(p, w.slots, u);
      const int first_row = (unit.first + group) * TILE, of_warp = warp % 4 * 16;
      int next_asks = 0;  // this lane's of the next 32 tiles

      auto multiply = [&](float (&d)[64], int chunk) {
        barrier_wait(memory.full(group, ring.stage), ring.phase);
        const uint32_t a = opaque(rows_at(memory.queries(group, ring.stage)));
        const uint32_t b = opaque(rows_at(memory.keys)) + chunk * (2 * PANEL / 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++)
          wgmma<T>(d, descriptor(a + 2 * i), descriptor(b + 2 * i), chunk > 0 || i > 0);
        wgmma_commit();
        ring.next();
      };
      auto release = [&](int stage) {
        if (tile.lane == 0) barrier_arrive(memory.empty(group, stage));
      };
      auto weigh = [&](float (&d)[64], int t, int n) {
        if (n == 0) {
          const int row = first_row + t * 2 * TILE;
          if (t % WARP == 0) next_asks = look(p, row + tile.lane * 2 * TILE, TILE, unit.column, COLUMNS);
          tile.begin_rows(row + of_warp, from_lane(next_asks, t % WARP));
          tile.prefetch_rows(row + of_warp + 2 * TILE);
        }
        tile.part(d, n);
      };
      // Products of tile t into d, chunk by chunk, and between them the weights of tile t - 1, which are in `before`.
      auto step = [&](float (&d)[64], float (&before)[64], int t) {
        pin(d);
        multiply(d, 0);
        wgmma_wait<1>();
        pin(before);
        release(ring.last_but_one());
        int chunk = 1;
#pragma unroll
        for (int n = 0; n < PARTS; n++) {
          for (; chunk * PARTS < chunks * (n + 1); chunk++) {
            multiply(d, chunk);
            wgmma_wait<1>();
            release(ring.last_but_one());
          }
          weigh(before, t - 1, n);
        }
      };

      tile.begin_columns(unit.column);
      tile.prefetch_rows(first_row + of_warp);
      barrier_wait(memory.keys_full(), keys_phase);
      keys_phase ^= 1;
      pin(even);
      multiply(even, 0);
      for (int chunk = 1; chunk < chunks; chunk++) {
        multiply(even, chunk);
        wgmma_wait<1>();
        release(ring.last_but_one());
      }
      int t = 1;
      for (;;) {
        if (t == unit.tiles) {
          wgmma_wait<0>();
          pin(even);
          break;
        }
        step(odd, even, t++);
        if (t == unit.tiles) {
          wgmma_wait<0>();
          pin(odd);
#pragma unroll
          for (int i = 0; i < 64; i++) even[i] = odd[i];
          break;
        }
        step(even, odd, t++);
      }
      release(ring.last());
      if (tile.lane == 0) barrier_arrive(memory.keys_empty());
#pragma unroll
      for (int n = 0; n < PARTS; n++) weigh(even, t - 1, n);
      tile.end_unit(u, warp - 4, unit.column);
      if (tile.lane == 0) wait_stores_read<0>();
    }
  }
  sync_warp();
}

// ---- queries and keys stream ----------------------------------------------------------------------------------------

constexpr int CLUSTER = 2;                        // blocks, which share the keys: each copies half of them to both
constexpr int WIDE = 2 * COLUMNS;                 // what a warpgroup takes at a time
constexpr int STAGE = (2 + WIDE / TILE) * PANEL;  // bytes: queries of both warpgroups, and keys

// Shared memory of stream_of_weights. The warpgroups share a ring; it is so long that one multiplies while the other
// weighs.
struct StreamMemory {
  const int stages;
  uint32_t ring, panels, barriers;
  SSLKERN_DEVICE explicit StreamMemory(int stages) : stages(stages), ring(dynamic_shared()) {
    panels = ring + stages * STAGE;
    barriers = panels + 2 * 2 * PANEL;
  }
  SSLKERN_DEVICE uint32_t queries(int stage, int group) const { return ring + stage * STAGE + group * PANEL; }
  SSLKERN_DEVICE uint32_t keys(int stage) const { return queries(stage, 2); }
  SSLKERN_DEVICE uint32_t full(int stage) const { return barriers + 8 * stage; }
  SSLKERN_DEVICE uint32_t empty(int stage) const { return full(stages + stage); }
};

// Unit u of work: HEIGHT rows, half of them for each block of the cluster, by WIDE columns. Those that run at the same
// time lie together, TOGETHER below each other, so that queries and keys come from the L2 cache.
struct StreamUnit {
  static constexpr int HEIGHT = CLUSTER * 2 * TILE, TOGETHER = 8;
  int row, column;
  SSLKERN_DEVICE StreamUnit(const Problem& p, int u) {
    const int wide = (p.m + WIDE - 1) / WIDE, high = (p.n + HEIGHT - 1) / HEIGHT;
    const int first = u / (TOGETHER * wide) * TOGETHER, some = high - first < TOGETHER ? high - first : TOGETHER;
    row = (first + (u - first * wide) % some) * HEIGHT;
    column = (u - first * wide) / some * WIDE;
  }
  SSLKERN_DEVICE static int count(const Problem& p) { return (p.m + WIDE - 1) / WIDE * ((p.n + HEIGHT - 1) / HEIGHT); }
};

// The weights of all pairs, for any number of features.
template <class T, class Of, class Given>
SSLKERN_DEVICE void stream_of_weights(const TensorMap& q, const TensorMap& k, const TensorMap& out, const Problem& p,
                                      const Given& w) {
  const int warp = warp_id(), rank = cluster_rank(), chunks = (p.d + CHUNK - 1) / CHUNK;
  const int begin = int(block_id()) / CLUSTER, units = StreamUnit::count(p), step = int(block_count()) / CLUSTER;
  const StreamMemory memory(w.stages);
  if (thread_id() == 0) {
    for (int stage = 0; stage < w.stages; stage++) {
      barrier_init(memory.full(stage), 1);
      barrier_init(memory.empty(stage), CLUSTER * 8);
    }
    publish_barriers();
  }
  sync_cluster();
  if (warp < 4) {
    registers_down<40>();
    if (warp == 0 && lane_id() == 0) {
      Ring ring(w.stages);
      for (int u = begin; u < units; u += step) {
        const StreamUnit unit(p, u);
        for (int chunk = 0; chunk < chunks; chunk++) {
          const int x = chunk * CHUNK;
          const uint32_t full = memory.full(ring.stage), keys = memory.keys(ring.stage);
          barrier_wait(memory.empty(ring.stage), ring.phase ^ 1);
          barrier_expect(full, STAGE);
          for (int i = 0; i < 2; i++) {
            const int mine = 2 * rank + i;
            load_box(memory.queries(ring.stage, i), q, full, x, unit.row + mine * TILE);
            load_box_for(3, keys + mine * PANEL, k, full, x, unit.column + mine * TILE);
          }
          ring.next();
        }
      }
    }
  } else {
    registers_up<232>();
    const int group = warp / 4 - 1;
    Of tile(p, w, out, memory.panels + group * 2 * PANEL + warp % 4 * (PANEL / 4));
    Ring ring(w.stages);
    float d[2 * 64];
    for (int u = begin; u < units; u += step) {
      const StreamUnit unit(p, u);
      const int row = unit.row + (2 * rank + group) * TILE;
      const uint32_t left = look(p, row, TILE, unit.column, COLUMNS);
      const uint32_t right = look(p, row, TILE, unit.column + COLUMNS, COLUMNS);
      auto release = [&](int stage) {
        if (tile.lane < CLUSTER) barrier_arrive_at(memory.empty(stage), tile.lane);
      };
      tile.begin_columns(unit.column);
      tile.prefetch_rows(row + warp % 4 * 16);
#pragma unroll
      for (int i = 0; i < 128; i++) d[i] = 0.f;
      pin(d);
      for (int chunk = 0; chunk < chunks; chunk++) {
        barrier_wait(memory.full(ring.stage), ring.phase);
        const uint32_t a = opaque(rows_at(memory.queries(ring.stage, group)));
        const uint32_t b = opaque(rows_at(memory.keys(ring.stage)));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) wgmma<T>(d, descriptor(a + 2 * i), descriptor(b + 2 * i), true);
        wgmma_commit();
        ring.next();
        if (chunk == 0) continue;
        wgmma_wait<1>();
        release(ring.last_but_one());
      }
      wgmma_wait<0>();
      pin(d);
      release(ring.last());
      tile.begin_rows(row + warp % 4 * 16, left);
#pragma unroll
      for (int n = 0; n < PARTS; n++) tile.part(d, n);
      tile.begin_columns(unit.column + COLUMNS);
      tile.begin_rows(row + warp % 4 * 16, right);
#pragma unroll
      for (int n = 0; n < PARTS; n++) tile.part(d + 64, n);
      tile.end_unit(CLUSTER * u + rank, warp - 4, unit.column);
      if (u + step >= units && tile.lane == 0) wait_stores_read<0>();
    }
  }
  sync_warp();
  sync_cluster();
}

}  // namespace sslkern::cuda
