// Vectors of the instruction set that this file is compiled for, written once with the vector extensions of GCC and
// Clang. Everything here lives in a namespace named after the instruction set: nothing compiled for AVX-512 can be
// picked up by the linker for a machine without it. For the same reason the kernels use no standard containers.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace sslkern {
namespace SSLKERN_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t UVec __attribute__((vector_size(LANES * 4)));
typedef float VecAt __attribute__((vector_size(LANES * 4), aligned(2), may_alias));  // wherever a number may lie
typedef int32_t IVecAt __attribute__((vector_size(LANES * 4), aligned(2), may_alias));

inline Vec load(const void* p) { return *static_cast<const VecAt*>(p); }
inline IVec load_int(const void* p) { return *static_cast<const IVecAt*>(p); }
inline void store(void* p, Vec x) { *static_cast<VecAt*>(p) = x; }
inline Vec all(float x) { return x - Vec{}; }
inline IVec all(int32_t x) { return x - IVec{}; }

// max(a, b), and b where either is NaN.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline float sum(Vec x) {
  float lanes[LANES];
  store(lanes, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float max(Vec x) {
  float lanes[LANES];
  store(lanes, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

constexpr float INF = __builtin_inff();

// e^x within 1 ulp; 0 below -104 (below -87.3 without AVX-512), inf above 88.73, NaN for NaN.
inline Vec exp(Vec x) {
  x = max(all(-110.f), min(all(110.f), x));          // a NaN in x stays one
  const Vec shifted = x * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  const Vec n = shifted - 12582912.f;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // x - n ln 2, |r| < 0.347
  Vec p = all(1.38145382e-3f);
  p = p * r + 8.36874532e-3f;
  p = p * r + 4.16683908e-2f;
  p = p * r + 1.66665204e-1f;
  p = p * r + 0.499999934f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#ifdef __AVX512F__
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const UVec bits = (UVec)shifted << 23;  // n, moved into the exponent
  p = (Vec)((UVec)p + bits);
  p = x < all(-87.3f) ? Vec{} : p;
  p = x > all(88.72f) ? all(INF) : p;
  return x == x ? p : x;
#endif
}

// A 16-bit float is carried as its bits.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(fp16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const bool finite = magnitude < 0x0f800000;
  const uint32_t bits = sign | magnitude | (finite ? 0 : 0x7f800000);
  float y;
  memcpy(&y, &bits, 4);
  return finite ? y * 0x1p112f : y;  // 2^112 moves the bias of the exponent, and normalises subnormals
#endif
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return bf16{uint16_t(x == x ? rounded : 0x7fc0)};
}
template <>
inline fp16 from_float<fp16>(float x) {
#ifdef __F16C__
  return fp16{uint16_t(_cvtss_sh(x, 0))};
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 65,536 or more
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: let the float adder round at 2^-24
    float y, magic = 0.5f;
    memcpy(&y, &bits, 4);
    y += magic;
    memcpy(&half, &y, 4);
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  return fp16{uint16_t(sign | half)};
#endif
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
