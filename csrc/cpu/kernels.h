// The kernels of one instruction set, what each computes, and the choice between instruction sets.
#pragma once

#include "similarity.h"

namespace sslkern {

// Where the gradients of similarity_softplus go; null where one is not needed.
struct SoftplusGradients {
  float *q, *k;          // (groups, n, d), (groups, m, d); without k, q is all of it
  float* scale;          // (groups)
  float *bias, *k_bias;  // (groups, n), (groups, m)
};

struct Kernels {
  const char* name;
  // row (groups, n); col (groups, m) or null, as it is without k; best, the largest s that counts: (groups, n) or, with
  // col, (groups, n + m), or null.
  void (*similarity_lse_fwd)(const Similarity&, float* row, float* col, float* best);
  // mean (groups, n, d): sum_j softmax_ij k_j.
  void (*similarity_lse_frozen_fwd)(const Similarity&, float* row, float* mean, float* best);
  // row, col and their gradients g, h; writes those of dq, dk, dscale, dbias that are not null. Without k, dq is all of
  // it.
  void (*similarity_lse_bwd)(const Similarity&, const float* row, const float* col, const float* g, const float* h,
                             float* dq, float* dk, float* dscale, float* dbias);
  // values, indices (groups, n, count): the largest s of each row that count, of equal ones the lower index first; -inf
  // and -1 where fewer count. m < 2^31.
  void (*similarity_topk)(const Similarity&, int64_t count, float* values, int64_t* indices);
  // row (groups, n): sum_j softplus(sign (s_ij + bias_i)); total (groups): sum_i weight_i row_i, and its gradients.
  // bias and weight (groups, n) may be null: 0 and 1.
  void (*similarity_softplus)(const Similarity&, const float* bias, const float* weight, float sign, float* total,
                              float* row, const SoftplusGradients&);
  // out (groups, n, count): <q_i, k_index_ic>, of index (groups, n, count). scale, ids, bias, limits and kept are not
  // looked at. `streams`: all scores are computed and some picked. False, and nothing is written, where an index is
  // outside 0 ... m - 1.
  bool (*sampled_similarity_fwd)(const Similarity&, int64_t count, const int64_t* index, bool streams, float* out);
  // dq, dk (or null; dk only if it streams) from the gradient g of out; false as above.
  bool (*sampled_similarity_bwd)(const Similarity&, int64_t count, const int64_t* index, bool streams, const float* g,
                                 float* dq, float* dk);
  // Writes keys (batch, dim), with `normalize` each row divided by its norm, into the ring queue (size, dim) at *ptr,
  // which moves on; of more than `size` rows, the last stay.
  void (*queue_push)(DType queue_type, DType keys_type, int64_t size, int64_t dim, int64_t batch, void* queue,
                     int64_t* ptr, const void* keys, bool normalize, int threads);
  // Row index_i of bank (size, dim) becomes momentum * itself + (1 - momentum) * x_i, divided by its norm; of equal
  // indices the last counts. False, and nothing is written, where an index is outside 0 ... size - 1.
  bool (*bank_update)(DType bank_type, DType x_type, int64_t size, int64_t dim, int64_t batch, void* bank,
                      const int64_t* index, const void* x, float momentum, int threads);
  // z (2 n, d) = x over y, each row divided by its norm (2 n) unless that is null; cosine_i = <z_i, z_(n + i)>.
  void (*unit_pairs_fwd)(DType, int64_t n, int64_t d, const void* x, const void* y, void* z, float* norm, float* cosine,
                         int threads);
  // dx, dy (or null) from the gradients da, db of the halves of z, and -pull_i of cosine_i.
  void (*unit_pairs_bwd)(DType, int64_t n, int64_t d, const void* z, const float* norm, const float* pull,
                         const float* da, const float* db, void* dx, void* dy, int threads);
};

const Kernels& kernels();             // those in use: the fastest that this machine runs, or SSLKERN_CPU_ISA
const Kernels* const* all_kernels();  // those that were built and run on this machine, fastest first, then null
bool use_kernels(const char* name);   // false where there are none of this name

}  // namespace sslkern
