// Products of a warp (mma), on every chip from compute capability 8.0 on.
#pragma once

#include "device.h"

#ifdef SSLKERN_EMULATED
#include "matrix_emulation.h"
#else
namespace sslkern::cuda {

// What was asked for at the launch.
SSLKERN_DEVICE uint8_t* shared_bytes() {
  extern __shared__ __align__(16) uint8_t bytes[];
  return bytes;
}

// d[16 x 8] += a[16 x 16] b[16 x 8]. With r = lane / 4 and c = lane % 4 a lane holds of d row r, columns 2 c and 2 c +
// 1, then the same of row r + 8; of a row r, columns 2 c and 2 c + 1 (a0), of row r + 8 (a1), and both of the columns 8
// further (a2, a3); of b rows 2 c and 2 c + 1 of column r (b0), and the rows 8 further (b1).
template <class T>
SSLKERN_DEVICE void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#define SSLKERN_MMA(TYPE)                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (SAME<T, bf16>)
    SSLKERN_MMA("bf16");
  else
    SSLKERN_MMA("f16");
#undef SSLKERN_MMA
}

// Four 8 x 8 matrices of 16 bits from shared memory: lane l says where row l % 8 of matrix l / 8 lies, and gets of each
// the two numbers from column 2 (l % 4) on of row l / 4.
SSLKERN_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
// The same of each matrix turned over.
SSLKERN_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

}  // namespace sslkern::cuda
#endif
