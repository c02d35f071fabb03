// Takes the place of a GPU in kernels/device.h, so that the values of the kernels can be tested without one. Clusters
// of blocks (of one, mostly) run one after another; their threads are fibers that change where they wait for each
// other.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __shared__ static  // of one block: in a cluster memory is `dynamic_shared`
#define __launch_bounds__(...)
#define __grid_constant__

namespace sslkern::cuda {

namespace emulation {
struct Launch {
  int64_t blocks;
  int threads;         // of a block, whole warps
  int64_t shared = 0;  // bytes of dynamic shared memory of a block
  int cluster = 1;     // blocks that run together
};
// Throws a std::runtime_error where the kernel did what it must not.
void run(const Launch&, const std::function<void()>& kernel);
void seed(uint32_t);  // of the launches to come, of which each draws differently

void sync_block();
// What this and its neighbours, `width` lanes from a multiple of it on, show each other: of each lane its x.
const uint32_t* shown(uint32_t x, int width);

// A kernel as the driver knows it: it is told where each of its arguments lies.
struct Kernel {
  const char* name;
  void (*run)(const Launch&, void** arguments);
};
void add(const Kernel&);

template <class T>
T taken(const void* from) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::aligned_storage_t<sizeof(T), alignof(T)> to;
  memcpy(&to, from, sizeof(T));
  return *reinterpret_cast<T*>(&to);
}

template <auto kernel, class... P, size_t... i>
Kernel described(const char* name, void (*)(P...), std::index_sequence<i...>) {
  return {name, [](const Launch& launch, void** arguments) {
            emulation::run(launch, [&] { kernel(taken<P>(arguments[i])...); });
          }};
}
template <auto kernel, class... P>
Kernel described(const char* name, void (*function)(P...)) {
  return described<kernel>(name, function, std::index_sequence_for<P...>());
}

// `static const Register<push<bf16, float>> one("push<bf16, float>");`
template <auto kernel>
struct Register {
  explicit Register(const char* name) { add(described<kernel>(name, kernel)); }
};
}  // namespace emulation

int thread_id();
int64_t block_id();
int64_t block_count();
inline void sync_block() { emulation::sync_block(); }

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float exchange(float x, int by, int width) {
  return from_bits(emulation::shown(to_bits(x), width)[(thread_id() & (width - 1)) ^ by]);
}

inline int lane_id() { return thread_id() % WARP; }
inline int warp_id() { return int(emulation::shown(uint32_t(thread_id() / WARP), WARP)[0]); }  // of all lanes
inline void sync_warp() { emulation::shown(0, WARP); }
inline uint32_t lanes_where(bool x) {
  const uint32_t* all = emulation::shown(x, WARP);
  uint32_t lanes = 0;
  for (int lane = 0; lane < WARP; ++lane) lanes |= all[lane] << lane;
  return lanes;
}
inline bool any_lane(bool x) { return lanes_where(x) != 0; }
inline float exchange(float x, int by) { return exchange(x, by, WARP); }
inline int64_t exchange(int64_t x, int by) {
  const uint32_t low = emulation::shown(uint32_t(x), WARP)[lane_id() ^ by];
  const uint32_t high = emulation::shown(uint32_t(uint64_t(x) >> 32), WARP)[lane_id() ^ by];
  return int64_t(uint64_t(high) << 32 | low);
}
inline float from_lane(float x, int lane) { return from_bits(emulation::shown(to_bits(x), WARP)[lane]); }
inline int from_lane(int x, int lane) { return int(emulation::shown(uint32_t(x), WARP)[lane]); }

inline int64_t add_to(int64_t* at, int64_t x) {
  const int64_t before = *at;
  *at = int64_t(uint64_t(before) + uint64_t(x));  // wraps around, as an atomic does
  return before;
}
inline void raise_to(int64_t* at, int64_t x) { *at = x > *at ? x : *at; }

inline void require(bool is_row) { assert(is_row); }

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
  const uint32_t bits = to_bits(x);
  if (x != x) return {0x7fff};  // as the chip has it
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  const uint32_t bits = to_bits(x);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float size = fabsf(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
  if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(nearbyintf(size * 0x1p24f)))};  // to even, as by default
  const uint32_t shifted = (bits & 0x7fffffff) - (112u << 23);
  return {uint16_t(sign | (shifted + 0xfff + (shifted >> 13 & 1)) >> 13)};
}

// As wrong as the chip's may be, by up to 2^-22 of it, but for whole x.
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  if (y < 0x1p-126f) return 0.f;
  if (x == rintf(x) || y > 0x1p127f) return y;
  return y + y * (float(to_bits(x) * 0x9e3779b9u >> 8) * 0x1p-23f - 1.f) * 0x1p-22f;
}
// The same, by an ulp, but for powers of two.
inline float reciprocal_fast(float x) {
  const float y = 1.f / x;
  if (fabsf(y) < 0x1p-126f) return copysignf(0.f, y);
  if ((to_bits(x) & 0x7fffff) == 0) return y;
  return y + y * (float(to_bits(x) * 0x9e3779b9u >> 8) * 0x1p-23f - 1.f) * 0x1p-23f;
}
template <class T>
uint32_t packed(float low, float high) {
  return uint32_t(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

}  // namespace sslkern::cuda
