// Takes the place of a GPU in kernels/matrix.h, whose functions these are.
#pragma once

#include "emulation.h"

namespace sslkern::cuda {

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint8_t* shared_bytes() {
  alignas(16) static uint8_t bytes[227 << 10];  // of one block
  return bytes;
}

namespace emulation {

// The registers of all lanes of a warp: of each x in turn that of each lane.
template <int COUNT>
struct Registers {
  uint32_t of[COUNT][WARP];
  explicit Registers(const uint32_t (&mine)[COUNT]) {
    for (int i = 0; i < COUNT; ++i) memcpy(of[i], shown(mine[i], WARP), sizeof of[i]);
  }
};

// One of two numbers of 16 bits.
template <class T>
float number(uint32_t both, int which) {
  return to_float(T{uint16_t(both >> 16 * which)});
}

// Registers of lane l: of matrix i the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or of column l / 4.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  assert(address % 16 == 0);
  const Registers<2> rows({uint32_t(address), uint32_t(address >> 32)});
  const int lane = thread_id() % WARP;
  for (int i = 0; i < 4; ++i) {
    uint16_t both[2];
    for (int h = 0; h < 2; ++h) {
      const int across = 2 * (lane % 4) + h, from = 8 * i + (transposed ? across : lane / 4);
      const uint64_t at = uint64_t(rows.of[1][from]) << 32 | rows.of[0][from];
      both[h] = reinterpret_cast<const uint16_t*>(uintptr_t(at))[transposed ? lane / 4 : across];
    }
    to[i] = uint32_t(both[1]) << 16 | both[0];
  }
}

}  // namespace emulation

template <class T>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const emulation::Registers<6> all({a0, a1, a2, a3, b0, b1});
  const int lane = thread_id() % WARP, r = lane / 4, c = lane % 4;
  for (int e = 0; e < 4; ++e) {
    float sum = 0.f;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2, far = k / 8;
      sum += emulation::number<T>(all.of[2 * far + e / 2][4 * r + from], k % 2) *
             emulation::number<T>(all.of[4 + far][4 * (2 * c + e % 2) + from], k % 2);
    }
    d[e] += sum;
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, true); }

}  // namespace sslkern::cuda
