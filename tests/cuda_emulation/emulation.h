// Takes the place of a GPU in kernels/device.h, so that the values of the kernels can be tested without one. Blocks
// run one after another; the threads of a block are fibers that change at barriers and exchanges.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace sslkern::cuda {

namespace emulation {
struct Launch {
  int64_t blocks;
  int threads;         // of a block
  int64_t shared = 0;  // bytes of dynamic shared memory of a block
  int cluster = 1;     // blocks that run together
};
void run(const Launch&, const std::function<void()>& kernel);
void wait(int first, int count);  // for all threads from first to first + count, this one among them
float* exchanged(int thread);     // what a thread shows to the others

// A kernel as the driver knows it: its arguments lie in a row of bytes, each on a multiple of its alignment.
struct Kernel {
  const char* name;
  int64_t bytes;  // of the arguments
  void (*run)(const Launch&, const char* arguments);
};
void add(const Kernel&);

template <class... P>
struct Layout {
  int64_t end = 0, at[sizeof...(P)];  // in this order
  Layout() : at{place<P>()...} {}

 private:
  template <class T>
  int64_t place() {
    const int64_t start = (end + int64_t(alignof(T)) - 1) / int64_t(alignof(T)) * int64_t(alignof(T));
    end = start + int64_t(sizeof(T));
    return start;
  }
};

template <class T>
T taken(const char* from) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::aligned_storage_t<sizeof(T), alignof(T)> to;
  memcpy(&to, from, sizeof(T));
  return *reinterpret_cast<T*>(&to);
}

template <auto kernel, class... P, size_t... i>
Kernel described(const char* name, void (*)(P...), std::index_sequence<i...>) {
  return {name, Layout<P...>().end, [](const Launch& launch, const char* arguments) {
            const Layout<P...> layout;
            emulation::run(launch, [&] { kernel(taken<P>(arguments + layout.at[i])...); });
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

}  // namespace sslkern::cuda
