// The scores s = scale * q k^T + k_bias of queries and keys, which are never stored, and which of them count.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace sslkern {

// Every array is dense and row-major. Optional ones are null.
struct Similarity {
  DType dtype;
  int64_t groups, n, m, d;  // q (groups, n, d), k (groups, m, d)
  const void* q;
  const void* k;  // null: the keys are the queries, and the pairs (i, i) are left out
  float scale;
  const int64_t* q_ids;  // (groups, n)
  const int64_t* k_ids;  // (groups, m)
  bool same;             // the pairs with equal ids count, not those with different ones
  const float* k_bias;   // (groups, m)
  const float* q_limit;  // (groups, n): pairs with s_ij > q_limit_i are left out
  float* kept;           // (groups, kept_rows, m): the dot products of the first rows, which the forward keeps for the
  int64_t kept_rows;     // backward; or null: the backward multiplies again
  int threads;
};

}  // namespace sslkern
