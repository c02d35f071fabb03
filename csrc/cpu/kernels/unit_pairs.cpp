// Pairs of rows on their way into a loss and back: x and y stacked, divided by their norms, rounded, and dotted in one
// sweep.
#include <cmath>

#include "../kernels.h"
#include "../memory.h"
#include "rows.h"

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

// What rows shorter than EPS are divided by. In fp16, where those are rows of zeros, the gradient is then 0: divided by
// EPS it would be infinite.
constexpr float EPS = 1e-12f;
template <class T>
constexpr float SHORTEST = std::is_same_v<T, fp16> ? INFINITY : EPS;

template <class T>
void normalize(const T* from, int64_t d, T* to, float* norm) {
  if (norm == nullptr) {
    for (int64_t c = 0; c < d; ++c) to[c] = from[c];
    return;
  }
  const float length = sqrtf(dot(from, from, d));
  *norm = length < EPS ? SHORTEST<T> : length;
  for (int64_t c = 0; c < d; ++c) to[c] = from_float<T>(to_float(from[c]) / *norm);
}

// Through u = x / |x|: dx = (du - u <u, du>) / |x|, where du also takes the pull of the positive, -pull other.
template <class T>
void normalize_bwd(const float* du, float pull, const T* unit, const T* other, const float* norm, int64_t d,
                   float* spare, T* dx) {
  for (int64_t c = 0; c < d; ++c) spare[c] = du[c] - pull * to_float(other[c]);
  const float along = norm == nullptr ? 0.f : dot(spare, unit, d), inverse = norm == nullptr ? 1.f : 1.f / *norm;
  for (int64_t c = 0; c < d; ++c) dx[c] = from_float<T>((spare[c] - along * to_float(unit[c])) * inverse);
}

}  // namespace

void unit_pairs_fwd(DType dtype, int64_t n, int64_t d, const void* x, const void* y, void* z, float* norm,
                    float* cosine, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    T* const u = static_cast<T*>(z);
    each_row(n, d, threads, [&](int, int64_t i) {
      normalize(static_cast<const T*>(x) + i * d, d, u + i * d, norm == nullptr ? nullptr : norm + i);
      normalize(static_cast<const T*>(y) + i * d, d, u + (n + i) * d, norm == nullptr ? nullptr : norm + n + i);
      cosine[i] = dot(u + i * d, u + (n + i) * d, d);
    });
  });
}

void unit_pairs_bwd(DType dtype, int64_t n, int64_t d, const void* z, const float* norm, const float* pull,
                    const float* da, const float* db, void* dx, void* dy, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* const u = static_cast<const T*>(z);
    const Array<float> spare(threads * d);
    each_row(n, d, threads, [&](int id, int64_t i) {
      const T *a = u + i * d, *b = u + (n + i) * d;
      if (dx != nullptr)
        normalize_bwd(da + i * d, pull[i], a, b, norm == nullptr ? nullptr : norm + i, d, spare + id * d,
                      static_cast<T*>(dx) + i * d);
      if (dy != nullptr)
        normalize_bwd(db + i * d, pull[i], b, a, norm == nullptr ? nullptr : norm + n + i, d, spare + id * d,
                      static_cast<T*>(dy) + i * d);
    });
  });
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
