// Writing a batch of keys into a ring, cast to its type.
#include <type_traits>

#include "../kernels.h"
#include "../parallel.h"
#include "simd.h"

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

template <class To, class From>
void push(int64_t size, int64_t dim, int64_t batch, To* queue, int64_t* ptr, const From* keys, int threads) {
  const int64_t dropped = batch > size ? batch - size : 0;
  const int64_t start = ((*ptr % size + size) % size + dropped) % size;  // a wild pointer stays inside the ring
  constexpr int64_t ROWS = 64;                                           // of a task
  const int64_t rows = batch - dropped;
  if (rows * dim < 1 << 16) threads = 1;
  parallel(usable_threads(threads), [&](Team& team) {
    team.each((rows + ROWS - 1) / ROWS, [&](int64_t task) {
      for (int64_t i = task * ROWS; i < rows && i < (task + 1) * ROWS; ++i) {
        const From* from = keys + (dropped + i) * dim;
        To* to = queue + (start + i) % size * dim;
        if constexpr (std::is_same_v<To, From>) {
          memcpy(to, from, dim * sizeof(To));
        } else {
          for (int64_t c = 0; c < dim; ++c) to[c] = from_float<To>(to_float(from[c]));
        }
      }
    });
  });
  *ptr = (start + rows) % size;
}

template <class Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::F32) body(float());
  if (dtype == DType::BF16) body(bf16());
  if (dtype == DType::FP16) body(fp16());
}

}  // namespace

void queue_push(DType queue_type, DType keys_type, int64_t size, int64_t dim, int64_t batch, void* queue, int64_t* ptr,
                const void* keys, int threads) {
  with_type(queue_type, [&](auto to) {
    with_type(keys_type, [&](auto from) {
      push(size, dim, batch, static_cast<decltype(to)*>(queue), ptr, static_cast<const decltype(from)*>(keys), threads);
    });
  });
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
