// The CUDA kernels of the memory-bound primitives. All arrays are dense, row-major and on the current device; a call
// puts work on the stream and does not wait. What cannot be launched throws std::runtime_error.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace sslkern::cuda {

using Stream = void*;  // cudaStream_t

// Makes `device` current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();

 private:
  int before_, device_;
};

// The CUDA versions of this module and of the driver as 1000 major + 10 minor; the driver's is 0 where there is none.
struct Versions {
  int built, driver;
};
Versions versions();

// Writes keys (batch, dim), with `normalize` each row divided by its norm, into the ring queue (size, dim) at *ptr,
// which moves on; of more than `size` rows, the last stay.
void queue_push(DType queue_type, DType keys_type, int64_t size, int64_t dim, int64_t batch, void* queue, int64_t* ptr,
                const void* keys, bool normalize, Stream);

// Row index_i of bank (size, dim) becomes momentum * itself + (1 - momentum) * x_i, divided by its norm; of equal
// indices the last counts. last (size): work array, its contents do not matter; may be null for a batch of up to
// FEW_UPDATES.
constexpr int64_t FEW_UPDATES = 1024;
void bank_update(DType bank_type, DType x_type, int64_t size, int64_t dim, int64_t batch, void* bank,
                 const int64_t* index, const void* x, float momentum, int64_t* last, Stream);

// out (groups, n, count): <q_i, bank_index_ic> of q (groups, n, d), bank (groups, m, d), index (groups, n, count).
void sampled_similarity_fwd(DType, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t count, const void* q,
                            const void* bank, const int64_t* index, float* out, Stream);
// dq from the gradient g of out. sums (groups * n, parts, d): work array where sampled_similarity_parts, of all
// groups * n queries, is more than 1.
void sampled_similarity_bwd(DType, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t count, const void* bank,
                            const int64_t* index, const float* g, float* dq, float* sums, Stream);
int64_t sampled_similarity_parts(int64_t queries, int64_t d, int64_t count);

// z (2 n, d) = x over y, each row divided by its norm (2 n) unless that is null; cosine_i = <z_i, z_(n + i)>.
void unit_pairs_fwd(DType, int64_t n, int64_t d, const void* x, const void* y, void* z, float* norm, float* cosine,
                    Stream);
// dx, dy (or null) from the gradients da, db of the halves of z, and -pull_i of cosine_i.
void unit_pairs_bwd(DType, int64_t n, int64_t d, const void* z, const float* norm, const float* pull, const float* da,
                    const float* db, void* dx, void* dy, Stream);

}  // namespace sslkern::cuda
