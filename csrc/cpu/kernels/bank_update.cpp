// Moving rows of a memory bank towards new features, on the unit sphere.
#include <cmath>

#include "../kernels.h"
#include "../memory.h"
#include "rows.h"

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

constexpr float EPS = 1e-12f;  // rows shorter than this are divided by it

// The last place of each index, in a table with one slot for each different index and -1 in the others.
struct LastPlaces {
  const int64_t slots;
  const Array<int64_t> at;
  LastPlaces(const int64_t* index, int64_t count) : slots(enough(count)), at(slots) {
    for (int64_t s = 0; s < slots; ++s) at[s] = -1;
    for (int64_t i = 0; i < count; ++i) {
      uint64_t s = uint64_t(index[i]) * 0x9e3779b97f4a7c15u >> 20;
      while (at[s & (slots - 1)] >= 0 && index[at[s & (slots - 1)]] != index[i]) ++s;
      at[s & (slots - 1)] = i;
    }
  }
  static int64_t enough(int64_t count) {
    int64_t slots = 1;
    while (slots < 2 * count) slots *= 2;
    return slots;
  }
};

template <class To, class From>
void update(int64_t dim, int64_t batch, To* bank, const int64_t* index, const From* x, float momentum, int threads) {
  const LastPlaces last(index, batch);
  const Array<float> spare(threads * dim);
  each_row(last.slots, dim, threads, [&](int id, int64_t slot) {
    const int64_t i = last.at[slot];
    if (i < 0) return;
    To* const row = bank + index[i] * dim;
    float* const sum = spare + id * dim;
    for (int64_t c = 0; c < dim; ++c)
      sum[c] = momentum * to_float(row[c]) + (1.f - momentum) * to_float(x[i * dim + c]);
    const float length = sqrtf(dot(sum, sum, dim));
    for (int64_t c = 0; c < dim; ++c) row[c] = from_float<To>(sum[c] / (length < EPS ? EPS : length));
  });
}

}  // namespace

bool bank_update(DType bank_type, DType x_type, int64_t size, int64_t dim, int64_t batch, void* bank,
                 const int64_t* index, const void* x, float momentum, int threads) {
  for (int64_t i = 0; i < batch; ++i)
    if (uint64_t(index[i]) >= uint64_t(size)) return false;
  with_type(bank_type, [&](auto to) {
    with_type(x_type, [&](auto from) {
      update(dim, batch, static_cast<decltype(to)*>(bank), index, static_cast<const decltype(from)*>(x), momentum,
             threads);
    });
  });
  return true;
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
