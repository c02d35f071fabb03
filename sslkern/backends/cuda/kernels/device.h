// What kernels ask of the machine: intrinsics and PTX stand here, in hopper.h and matrix.h, nowhere else. With
// SSLKERN_EMULATED tests/cuda_emulation takes the machine's place, and a C++ compiler compiles the same sources.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no header of the standard library, and needs none
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
using int64_t = long long;
#define INFINITY __int_as_float(0x7f800000)
#define INT64_MAX 0x7fffffffffffffffll
#define INT64_MIN (-INT64_MAX - 1)
#else
#include <cassert>
#include <cmath>
#include <cstdint>
#endif

#ifdef SSLKERN_EMULATED
#define SSLKERN_DEVICE inline
#else
#define SSLKERN_DEVICE __device__ __forceinline__
#endif

namespace sslkern::cuda {

constexpr int THREADS = 256;  // of every block
constexpr int WARP = 32;
constexpr float LOG2_E = 1.44269504f;

template <class A, class B>
constexpr bool SAME = false;
template <class A>
constexpr bool SAME<A, A> = true;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace sslkern::cuda

#ifdef SSLKERN_EMULATED
#include "emulation.h"
#else
namespace sslkern::cuda {

__device__ inline int thread_id() { return threadIdx.x; }
__device__ inline int64_t block_id() { return blockIdx.x; }
__device__ inline int64_t block_count() { return gridDim.x; }
__device__ inline void sync_block() { __syncthreads(); }

// x of the lane whose number differs in the bit `by`, among the `width` lanes (a power of two) that call this together.
__device__ inline float exchange(float x, int by, int width) {
  const unsigned lanes = (width == WARP ? ~0u : (1u << width) - 1) << (threadIdx.x % WARP & ~(width - 1));
  return __shfl_xor_sync(lanes, x, by);
}

SSLKERN_DEVICE int lane_id() { return threadIdx.x % WARP; }
// Which the compiler then knows to be the same for all threads of a warp.
SSLKERN_DEVICE int warp_id() { return __shfl_sync(~0u, threadIdx.x / WARP, 0); }
SSLKERN_DEVICE void sync_warp() { __syncwarp(); }
SSLKERN_DEVICE bool any_lane(bool x) { return __any_sync(~0u, x); }
SSLKERN_DEVICE uint32_t lanes_where(bool x) { return __ballot_sync(~0u, x); }
// x of the lane whose number differs in the bit `by`, of all 32 together; or of one lane for all.
SSLKERN_DEVICE int64_t exchange(int64_t x, int by) { return __shfl_xor_sync(~0u, static_cast<long long>(x), by); }
SSLKERN_DEVICE float exchange(float x, int by) { return __shfl_xor_sync(~0u, x, by); }
SSLKERN_DEVICE float from_lane(float x, int lane) { return __shfl_sync(~0u, x, lane); }
SSLKERN_DEVICE int from_lane(int x, int lane) { return __shfl_sync(~0u, x, lane); }

// What this thread read before is read before others see the sum. Returns the value from before.
__device__ inline int64_t add_to(int64_t* at, int64_t x) {
  __threadfence();
  return atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(x));
}
__device__ inline void raise_to(int64_t* at, int64_t x) { atomicMax(reinterpret_cast<long long*>(at), x); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(fp16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}

// Rounds to the nearest, to even in between.
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
template <>
__device__ inline fp16 from_float<fp16>(float x) {
  fp16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

// 2^x, 0 below 2^-126.
SSLKERN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x, 0 above 2^126.
SSLKERN_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers of 16 bits, rounded to the nearest, the first in the lower half.
template <class T>
SSLKERN_DEVICE uint32_t packed(float low, float high) {
  uint32_t both;
  if constexpr (SAME<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// The kernel stops, as torch's own indexing does.
__device__ inline void require(bool is_row) {
  if (is_row) return;
  assert(false && "index must be a row of the bank");
  __trap();
  __builtin_unreachable();  // so that nothing is saved around the call
}

}  // namespace sslkern::cuda
#endif
