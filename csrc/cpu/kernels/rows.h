// What the kernels that go row by row share.
#pragma once

#include "../parallel.h"
#include "../similarity.h"
#include "simd.h"

namespace sslkern {
namespace SSLKERN_ISA {

// Calls body(T()) with the type that `dtype` names.
template <class Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::F32) body(float());
  if (dtype == DType::BF16) body(bf16());
  if (dtype == DType::FP16) body(fp16());
}

// Calls task(thread, i) for each of n rows of d numbers; few of them are not worth a second thread.
template <class Task>
void each_row(int64_t n, int64_t d, int threads, const Task& task) {
  constexpr int64_t ROWS = 64;  // at a time
  parallel(n * d < 1 << 16 ? 1 : usable_threads(threads), [&](Team& team) {
    team.each((n + ROWS - 1) / ROWS, [&](int64_t t) {
      for (int64_t i = t * ROWS; i < n && i < (t + 1) * ROWS; ++i) task(team.id, i);
    });
  });
}

// LANES numbers as floats.
inline Vec widen(const float* x) { return load(x); }
inline Vec widen(const bf16* x) {
  typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(x), UVec) << 16);
}
inline Vec widen(const fp16* x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  float lanes[LANES];
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = to_float(x[lane]);
  return load(lanes);
#endif
}

// sum_c a_c b_c in a fixed order: LANES sums, then one.
template <class A, class B>
float dot(const A* a, const B* b, int64_t d) {
  float lanes[LANES] = {};
  int64_t c = 0;
  for (; c + LANES <= d; c += LANES)
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] += to_float(a[c + lane]) * to_float(b[c + lane]);
  for (int lane = 0; c < d; ++c, ++lane) lanes[lane] += to_float(a[c]) * to_float(b[c]);
  return sum(load(lanes));
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
