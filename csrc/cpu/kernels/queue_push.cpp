// Writing a batch of keys into a ring, divided by their norms and cast to its type.
#include <cmath>
#include <type_traits>

#include "../kernels.h"
#include "rows.h"

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

constexpr float EPS = 1e-12f;  // rows shorter than this are divided by it

template <class To, class From>
void push(int64_t size, int64_t dim, int64_t batch, To* queue, int64_t* ptr, const From* keys, bool normalize,
          int threads) {
  const int64_t dropped = batch > size ? batch - size : 0;
  const int64_t start = ((*ptr % size + size) % size + dropped) % size;  // a wild pointer stays inside the ring
  const int64_t rows = batch - dropped;
  each_row(rows, dim, threads, [&](int, int64_t i) {
    const From* from = keys + (dropped + i) * dim;
    To* to = queue + (start + i) % size * dim;
    if (normalize) {
      const float length = sqrtf(dot(from, from, dim)), norm = length < EPS ? EPS : length;
      for (int64_t c = 0; c < dim; ++c) to[c] = from_float<To>(to_float(from[c]) / norm);
    } else if constexpr (std::is_same_v<To, From>) {
      memcpy(to, from, dim * sizeof(To));
    } else {
      for (int64_t c = 0; c < dim; ++c) to[c] = from_float<To>(to_float(from[c]));
    }
  });
  *ptr = (start + rows) % size;
}

}  // namespace

void queue_push(DType queue_type, DType keys_type, int64_t size, int64_t dim, int64_t batch, void* queue, int64_t* ptr,
                const void* keys, bool normalize, int threads) {
  with_type(queue_type, [&](auto to) {
    with_type(keys_type, [&](auto from) {
      push(size, dim, batch, static_cast<decltype(to)*>(queue), ptr, static_cast<const decltype(from)*>(keys),
           normalize, threads);
    });
  });
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
