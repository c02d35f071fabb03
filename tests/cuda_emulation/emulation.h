// Takes the place of a GPU in csrc/cuda/device.h, so that the values of the kernels can be tested without one. Blocks
// run one after another; the threads of a block are fibers that change at barriers and exchanges.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>

#include "cuda/kernels.h"

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace sslkern::cuda {

namespace emulation {
void run(int64_t blocks, const std::function<void()>& kernel);
void wait(int first, int count);  // for all threads from first to first + count, this one among them
float* exchanged(int thread);     // what a thread shows to the others
}  // namespace emulation

int thread_id();
int64_t block_id();
int64_t block_count();
inline void sync_block() { emulation::wait(0, THREADS); }

inline float exchange(float x, int by, int width) {
  const int me = thread_id();
  *emulation::exchanged(me) = x;
  emulation::wait(me & ~(width - 1), width);
  const float result = *emulation::exchanged(me ^ by);
  emulation::wait(me & ~(width - 1), width);
  return result;
}

inline int64_t add_to(int64_t* at, int64_t x) {
  const int64_t before = *at;
  *at = int64_t(uint64_t(before) + uint64_t(x));  // wraps around, as an atomic does
  return before;
}
inline void raise_to(int64_t* at, int64_t x) { *at = x > *at ? x : *at; }

inline void require(bool is_row) { assert(is_row); }

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return from_bits(sign | 0x3f800000) * fraction * 0x1p-24f;
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};  // as the chip has it
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float size = fabsf(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
  if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(nearbyintf(size * 0x1p24f)))};  // to even, as by default
  const uint32_t shifted = (bits & 0x7fffffff) - (112u << 23);
  return {uint16_t(sign | (shifted + 0xfff + (shifted >> 13 & 1)) >> 13)};
}

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int64_t blocks, Stream, Arguments... arguments) {
  emulation::run(blocks, [&] { kernel(arguments...); });
}

}  // namespace sslkern::cuda
