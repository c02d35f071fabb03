// The problem of the kernels of the similarity family for Hopper, and which of its pairs count.
#pragma once

#include "hopper.h"

namespace sslkern::cuda {

constexpr int EXTENT = 64;  // rows that have a smallest and a largest id together

// As sslkern.backends.problem.Problem, without groups and limits: the scores s_ij = scale * scale_tensor * <q_i, k_j> +
// bias_j. Of q with itself k's pointers are q's, and the pairs (i, i + diagonal) do not count.
struct Problem {
  const int64_t *q_ids, *k_ids;          // [n], [m]; null: all count. Pairs with equal ids do not,
  const int64_t *q_extents, *k_extents;  // [ceil(n / EXTENT), 2], [ceil(m / EXTENT), 2]
  const float* bias;                     // [m], or null
  const float* scale_tensor;             // [], or null: 1
  float scale;
  int n, m, d;   // queries, keys, features
  int diagonal;  // 0, but of some of the queries
  bool itself;
  bool same;  // or those with different ids do not
};

// By which products are multiplied for scores in base 2, of which exp2 gives exp(s).
SSLKERN_DEVICE float scale_in_base_2(const Problem& p) {
  return LOG2_E * (p.scale_tensor == nullptr ? p.scale : p.scale * *p.scale_tensor);
}

// What a tile has to ask of its pairs; mostly nothing.
enum Look : uint32_t {
  ALL_COUNT = 0,
  EDGE = 1,         // are they within the matrix
  DIAGONAL = 2,     // are they (i, i + diagonal)
  IDS = 4,          // are their ids equal, by the lower halves of the ids
  LONG_IDS = 8,     // by all of the ids
  NONE_COUNTS = 16  // nothing: no pair counts
};

struct Extent {
  int64_t low, high;  // of no ids at all low > high
};

SSLKERN_DEVICE Extent extent(const int64_t* extents, int n, int first, int count) {
  Extent all{INT64_MAX, INT64_MIN};
  for (int i = first; i < first + count && i < n; i += EXTENT) {
    const int64_t* one = extents + i / EXTENT * 2;
    all = {one[0] < all.low ? one[0] : all.low, one[1] > all.high ? one[1] : all.high};
  }
  return all;
}

SSLKERN_DEVICE uint32_t look_at_ids(Extent a, Extent b, bool same) {
  if (a.low > a.high || b.low > b.high) return ALL_COUNT;  // beyond the edge
  if (a.high < b.low || b.high < a.low) return same ? NONE_COUNTS : ALL_COUNT;
  const int64_t low = a.low < b.low ? a.low : b.low, high = a.high > b.high ? a.high : b.high;
  if (low == high) return same ? ALL_COUNT : NONE_COUNTS;
  return (static_cast<uint64_t>(high) - static_cast<uint64_t>(low)) >> 32 == 0 ? IDS : LONG_IDS;
}

// Of the pairs of `rows` queries from i on with `columns` keys from j on; all four are multiples of EXTENT.
SSLKERN_DEVICE uint32_t look(const Problem& p, int i, int rows, int j, int columns) {
  uint32_t asks = i + rows > p.n || j + columns > p.m ? EDGE : ALL_COUNT;
  if (p.itself && i + p.diagonal < j + columns && j < i + p.diagonal + rows) asks |= DIAGONAL;
  if (p.q_ids != nullptr)
    asks |= look_at_ids(extent(p.q_extents, p.n, i, rows), extent(p.k_extents, p.m, j, columns), p.same);
  return asks;
}

// The id of a row, of the last where there is none.
SSLKERN_DEVICE int64_t id_of(const int64_t* ids, int n, int i) { return ids[i < n ? i : n - 1]; }

// Whether a pair counts, as far as its tile asks (all that `look` said, but NONE_COUNTS).
SSLKERN_DEVICE bool counts(const Problem& p, uint32_t asks, int i, int j, int64_t q_id, int64_t k_id) {
  bool yes = true;
  if (asks & EDGE) yes = i < p.n && j < p.m;
  if (asks & DIAGONAL) yes = yes && i + p.diagonal != j;
  if (asks & LONG_IDS)
    yes = yes && (q_id == k_id) == p.same;
  else if (asks & IDS)
    yes = yes && (static_cast<uint32_t>(q_id) == static_cast<uint32_t>(k_id)) == p.same;
  return yes;
}

// The same without a branch, for tiles where many pairs have to be looked at: what a row and a column are compared by.
struct Name {
  int at;     // the row, the last where there is none
  int place;  // on the diagonal, where that is asked
  int64_t id;
  bool there;
};
SSLKERN_DEVICE Name query_name(const Problem& p, uint32_t asks, int i) {
  const int at = i < p.n ? i : p.n - 1;
  return {at, asks & DIAGONAL ? i + p.diagonal : -1, asks & (IDS | LONG_IDS) ? p.q_ids[at] : 0, i < p.n};
}
SSLKERN_DEVICE Name key_name(const Problem& p, uint32_t asks, int j) {
  const int at = j < p.m ? j : p.m - 1;
  return {at, j, asks & (IDS | LONG_IDS) ? p.k_ids[at] : !p.same, j < p.m && !(asks & NONE_COUNTS)};
}
SSLKERN_DEVICE bool counts(const Name& q, const Name& k, bool same) {
  return q.there & k.there & (q.place != k.place) & ((q.id == k.id) == same);
}

}  // namespace sslkern::cuda
