// How the pairs of S are divided among the blocks of a forward kernel, by formulas that need no list.
//
// The queries are cut into groups, the keys into tiles. A sequence is what a group has to visit: all tiles; or of a
// triangle, where group g is visited by the tiles from its own on, those of group s and then those of the s-th from the
// end, which together are always as many. Each goes from the last tile down, so that all begin at the same keys. A
// sequence is cut into `slots`, and what a slot has of one group is a segment.
#pragma once

#include "device.h"

namespace sslkern::cuda {

struct Plan {
  int group_rows, group_blocks;  // queries of a group, and the blocks of a cluster that share them
  int tile_rows, tile_blocks;    // keys of a tile, and the blocks of a cluster that share them
  int groups, tiles, slots;
  int triangle;      // 0 or 1: of q with itself pairs above the diagonal stand for those below
  int first, count;  // the sequences of this launch

  __device__ int first_tile(int group) const { return triangle ? group * (group_rows / tile_rows) : 0; }
  __device__ int tiles_of(int group) const { return tiles - first_tile(group); }
  // The other group of a sequence; that of an odd number of groups in the middle is alone.
  __device__ int other(int group) const { return groups - 1 - group; }
  // Positions in the longest sequences, which is how many there is room for.
  __device__ int length() const { return tiles_of(0) + (triangle && groups > 1 ? tiles_of(groups - 1) : 0); }
  __device__ int parts() const { return 1 + triangle; }
  // Where a group's tiles begin in its sequence: the first part has those of group `sequence`.
  __device__ int start_of(int sequence, int part) const { return part == 0 ? 0 : tiles_of(sequence); }
};

struct Segment {
  int group, from, to;  // positions in the sequence; nothing unless from < to
  int tile, step;       // of the first position, and from each to the next
};

__device__ inline Segment segment_of(const Plan& plan, int sequence, int slot, int part) {
  const int group = part == 0 ? sequence : plan.other(sequence), middle = plan.tiles_of(sequence);
  const bool two = plan.triangle && sequence != plan.other(sequence);
  const int length = middle + (two ? plan.tiles_of(plan.other(sequence)) : 0);
  int from = length * slot / plan.slots, to = length * (slot + 1) / plan.slots;
  if (part == 0)
    to = to < middle ? to : middle;
  else
    from = from > middle ? from : middle;
  const int passed = from - plan.start_of(sequence, part);
  return plan.triangle ? Segment{group, from, to, plan.tiles - 1 - passed, -1} : Segment{group, from, to, passed, 1};
}

// Where a tile stands in the sequence, as one of this part; -1 where it does not.
__device__ inline int position_of(const Plan& plan, int sequence, int part, int tile) {
  const int group = part == 0 ? sequence : plan.other(sequence), first = plan.first_tile(group);
  const bool there = tile >= first && (part == 0 || group != sequence);
  const int position = plan.triangle ? plan.start_of(sequence, part) + plan.tiles - 1 - tile : tile;
  return there ? position : -1;
}

// The segments of one cluster, one of `step` that share the work: those that stand beside each other in time have the
// same tiles of neighbouring groups.
struct Walk {
  const Plan& plan;
  int step, sequence, slot = 0, part = -1;  // the sequence among those of this launch
  Segment segment{};

  __device__ Walk(const Plan& plan, int cluster, int clusters) : plan(plan), step(clusters), sequence(cluster) {}

  __device__ bool next() {
    do {
      if (++part == plan.parts()) part = 0, sequence += step;
      for (; sequence >= plan.count; sequence -= plan.count) ++slot;
      if (slot >= plan.slots) return false;
      segment = segment_of(plan, plan.first + sequence, slot, part);
    } while (segment.from >= segment.to);
    return true;
  }
};

constexpr int OF_WARP = 16;  // keys in a tile
constexpr int WARPS = 8;     // of a block, that consume

// Sums of exp2(score - shift), in base 2, and the shifts. A tile has 8 warps in each block that shares it.
struct Partials {
  float *rows, *row_shifts;  // [slots, warps of a tile, blocks of queries, queries], and of each warp and block
  float *columns,
      *column_shifts;  // [sequences, blocks of a group, keys of a sequence], of each OF_WARP; null: not asked
};

}  // namespace sslkern::cuda
