// Takes the place of a Hopper GPU in kernels/hopper.h, whose functions these are. Copies and products happen late or
// early as the seed has it, and what a kernel may not do stops it with a sentence.
#pragma once

#include <type_traits>

#include "emulation.h"

namespace sslkern::cuda {

namespace emulation {

// Shared memory as this thread reads or writes it.
const void* read_shared(uint32_t from, int bytes);
void write_shared(uint32_t to, const void* from, int bytes);

void change_registers(int count, bool up);
void wait_stores(int pending, bool written);
void wait_products(int pending);

// A product of this thread's warpgroup. Of a in registers `a` are their values, and `kept` where they must stay so.
struct Operands {
  float* d;
  int registers;
  bool half;
  bool accumulate;
  bool from_registers;
  uint64_t a, b;
  uint32_t fragment[4];
  const uint32_t* kept[4];
};
void issue(const Operands&);
void show(const float* d);  // accumulators whose products have ended

template <class T>
const uint32_t* kept(T&& x) {
  if constexpr (std::is_lvalue_reference_v<T> && std::is_same_v<std::decay_t<T>, uint32_t>)
    return &x;
  else
    return nullptr;
}

}  // namespace emulation

// ---- threads --------------------------------------------------------------------------------------------------------

template <int COUNT>
void registers_up() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  emulation::change_registers(COUNT, true);
}
template <int COUNT>
void registers_down() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
  emulation::change_registers(COUNT, false);
}

uint32_t cluster_rank();
void sync_cluster();

// ---- shared memory --------------------------------------------------------------------------------------------------

uint32_t dynamic_shared();
inline float load_shared(uint32_t from) { return *static_cast<const float*>(emulation::read_shared(from, 4)); }
inline void load_shared(uint32_t from, float& a, float& b) {
  const float* both = static_cast<const float*>(emulation::read_shared(from, 8));
  a = both[0];
  b = both[1];
}
void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d);
void publish_shared();

// ---- barriers in shared memory --------------------------------------------------------------------------------------

void barrier_init(uint32_t barrier, uint32_t arrivals);
void publish_barriers();
void barrier_arrive(uint32_t barrier);
void barrier_arrive_at(uint32_t barrier, uint32_t rank);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
inline void barrier_wait_or_trap(uint32_t barrier, uint32_t parity) { barrier_wait(barrier, parity); }

// ---- copies of boxes ------------------------------------------------------------------------------------------------

void prefetch_map(const TensorMap& map);
void load_vector(uint32_t to, const TensorMap& map, uint32_t barrier, int x);
void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y);
void load_box_for(uint16_t blocks, uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y);
void store_box(const TensorMap& map, uint32_t from, int x, int y);
void commit_stores();
template <int PENDING>
void wait_stores_read() {
  emulation::wait_stores(PENDING, false);
}
template <int PENDING>
void wait_stores() {
  emulation::wait_stores(PENDING, true);
}

// ---- products of a warpgroup ----------------------------------------------------------------------------------------

void wgmma_fence();
void wgmma_commit();
template <int PENDING>
void wgmma_wait() {
  emulation::wait_products(PENDING);
}
// What products have written is seen from there on.
template <int R>
void pin(float (&d)[R]) {
  emulation::show(d);
}
template <int R>
void pin(uint32_t (&)[R]) {}
inline uint32_t opaque(uint32_t x) { return x; }

template <class T, int R>
void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(SAME<T, bf16> || SAME<T, fp16>);
  static_assert(R == 32 || R == 64 || R == 128);
  emulation::issue({d, R, SAME<T, fp16>, accumulate, false, a, b, {}, {}});
}
// The registers of a are looked at again when the product ends, those that have a name.
template <class T, int R, class A0, class A1, class A2, class A3>
void wgmma(float (&d)[R], A0&& a0, A1&& a1, A2&& a2, A3&& a3, uint64_t b) {
  static_assert(SAME<T, bf16> || SAME<T, fp16>);
  static_assert(R == 32 || R == 64 || R == 128);
  using emulation::kept;
  emulation::issue({d,
                    R,
                    SAME<T, fp16>,
                    true,
                    true,
                    0,
                    b,
                    {a0, a1, a2, a3},
                    {kept<A0>(a0), kept<A1>(a1), kept<A2>(a2), kept<A3>(a3)}});
}

}  // namespace sslkern::cuda
