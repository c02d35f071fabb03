// What kernels for Hopper ask of the machine: barriers in shared memory, copies of boxes, products of warpgroups. PTX
// stands here, in device.h and matrix.h, nowhere else; with SSLKERN_EMULATED tests/cuda_emulation takes the machine's
// place.
//
// What ptxas punishes: a second exit (`require`, a return in the middle) or any code after the loop of the warpgroups
// that hold many registers makes it drop their budget (spills, products one after another); descriptors that it can see
// through are hoisted out of loops and spilled (`opaque`); a loop without an end that it knows, or one that ends in
// a trap, while products run (`barrier_wait`). NVRTC 12 also runs products one after another in a loop whose first one
// overwrites the accumulators: set them to 0 before it; and before 13.5 where registers of a are copies of others. Nor
// does it compile lambdas with `auto` parameters then.
#pragma once

#include "device.h"

namespace sslkern::cuda {

constexpr int WARPGROUP = 128;     // threads that issue a product together
constexpr int GROUP_BYTES = 1024;  // 8 rows of 128 bytes: what the swizzle permutes, and must be aligned to

// A tensor in device memory, as the driver describes it (cuTensorMapEncodeTiled).
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// Matrices of products lie in shared memory in panels of 64 numbers (128 bytes) a row with the swizzle of 128 bytes,
// each panel aligned to GROUP_BYTES. Where a matrix lies is the half of its descriptor that changes: an offset of b
// bytes adds b / 16. In a cluster the rank of the block lies above the address: it is masked.
//
// Numbers along the product lie in a row: 16 further are 32 bytes in the panel. Groups of 8 rows follow each other.
SSLKERN_DEVICE uint32_t rows_at(uint32_t address) { return (address & 0x3ffff) >> 4 | 1u << 16; }
// Numbers along the product lie below each other: 16 further are 2048 bytes. N goes along the row, and from panel to
// panel. For b only.
SSLKERN_DEVICE uint32_t columns_at(uint32_t address, uint32_t panel_bytes) {
  return (address & 0x3ffff) >> 4 | panel_bytes >> 4 << 16;
}
SSLKERN_DEVICE uint64_t descriptor(uint32_t at) {
  return static_cast<uint64_t>(GROUP_BYTES >> 4 | 1u << 30) << 32 | at;
}

}  // namespace sslkern::cuda

#ifdef SSLKERN_EMULATED
#include "hopper_emulation.h"
#else

namespace sslkern::cuda {

// ---- threads --------------------------------------------------------------------------------------------------------

// Registers of each thread of this warpgroup from here on: those that one gives up others may take.
template <int COUNT>
SSLKERN_DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
SSLKERN_DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Blocks of a cluster run together and see each other's shared memory.
SSLKERN_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
SSLKERN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- shared memory --------------------------------------------------------------------------------------------------

// What was asked for at the launch, from a multiple of GROUP_BYTES on: ask for GROUP_BYTES - 16 more.
SSLKERN_DEVICE uint32_t dynamic_shared() {
  extern __shared__ uint8_t memory[];
  return (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + GROUP_BYTES - 1) & ~(GROUP_BYTES - 1);
}
SSLKERN_DEVICE float load_shared(uint32_t from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from));
  return x;
}
SSLKERN_DEVICE void load_shared(uint32_t from, float& a, float& b) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(from));
}
// Four 8 x 8 matrices of 16 bits: lane l says where row l % 8 of matrix l / 8 goes, and holds of each matrix the two
// numbers from column 2 (l % 4) on of row l / 4.
SSLKERN_DEVICE void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
// What this thread has written to shared memory before, copies and products see after.
SSLKERN_DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- barriers in shared memory: each phase ends after so many arrivals and so many bytes ----------------------------

SSLKERN_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After all of them, before sync_block (sync_cluster).
SSLKERN_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SSLKERN_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// At the same barrier of another block of the cluster, which must not have ended.
SSLKERN_DEVICE void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Arrives, and the phase also waits for so many bytes of copies.
SSLKERN_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
SSLKERN_DEVICE bool barrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(ended)
               : "r"(barrier), "r"(parity)
               : "memory");
  return ended;
}
// Until the phase of this parity has ended. A fresh barrier is in phase 0, so that parity 1 counts as ended. The loop
// has an end, after days: across one that has none ptxas runs no product.
SSLKERN_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  int tries = 0;
  while (!barrier_try(barrier, parity) && ++tries < 1 << 30) {
  }
}
// The same for a loop that reads sums of one product while the other runs: there ptxas wants an end that does not go
// on, each version another, or it takes registers away or runs products one after another. Nobody gets there.
SSLKERN_DEVICE void barrier_wait_or_trap(uint32_t barrier, uint32_t parity) {
  int tries = 0;
  while (!barrier_try(barrier, parity)) {
    if (++tries < 1 << 30) continue;
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
    __trap();
#elif __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1206
    asm volatile("exit;");
#else
    for (;;) asm volatile("" ::: "memory");
#endif
  }
}

// ---- copies of boxes (TMA): x is the inner coordinate, both count numbers; outside of the tensor lie zeros ----------

SSLKERN_DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
SSLKERN_DEVICE void load_vector(uint32_t to, const TensorMap& map, uint32_t barrier, int x) {
  asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x)
      : "memory");
}
SSLKERN_DEVICE void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
// Into the same place of each block of the cluster whose bit is set, and counted by the same barrier there.
SSLKERN_DEVICE void load_box_for(uint16_t blocks, uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}
// What lies outside of the tensor is not written.
SSLKERN_DEVICE void store_box(const TensorMap& map, uint32_t from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(from),
               "r"(x), "r"(y)
               : "memory");
}
SSLKERN_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most PENDING groups of this thread's stores still read shared memory.
template <int PENDING>
SSLKERN_DEVICE void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// The same, and the others have reached device memory.
template <int PENDING>
SSLKERN_DEVICE void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- products of a warpgroup (wgmma) --------------------------------------------------------------------------------
//
// d[64 x N] (+)= a[64 x 16] b[N x 16]^T. Thread t holds in d[4 j + 2 i + h] row 16 (t / 32) + t % 32 / 4 + 8 i, column
// 8 j + 2 (t % 4) + h.

SSLKERN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SSLKERN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING groups of products are under way; `pin` what they wrote.
template <int PENDING>
SSLKERN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Nothing that reads these registers moves above, nothing that writes them below.
template <int R>
SSLKERN_DEVICE void pin(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int R>
SSLKERN_DEVICE void pin(uint32_t (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+r"(d[i])::"memory");
}
SSLKERN_DEVICE uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

#define SSLKERN_TEN(n) \
  "%" #n "0, %" #n "1, %" #n "2, %" #n "3, %" #n "4, %" #n "5, %" #n "6, %" #n "7, %" #n "8, %" #n "9"
#define SSLKERN_30 SSLKERN_TEN() ", " SSLKERN_TEN(1) ", " SSLKERN_TEN(2)
#define SSLKERN_60 SSLKERN_30 ", " SSLKERN_TEN(3) ", " SSLKERN_TEN(4) ", " SSLKERN_TEN(5)
#define SSLKERN_90 SSLKERN_60 ", " SSLKERN_TEN(6) ", " SSLKERN_TEN(7) ", " SSLKERN_TEN(8)
#define SSLKERN_120 SSLKERN_90 ", " SSLKERN_TEN(9) ", " SSLKERN_TEN(10) ", " SSLKERN_TEN(11)
#define SSLKERN_OPERANDS_32 SSLKERN_30 ", %30, %31"
#define SSLKERN_OPERANDS_64 SSLKERN_60 ", %60, %61, %62, %63"
#define SSLKERN_OPERANDS_128 SSLKERN_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SSLKERN_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SSLKERN_16(i) SSLKERN_4(i), SSLKERN_4(i + 4), SSLKERN_4(i + 8), SSLKERN_4(i + 12)
#define SSLKERN_REGISTERS_32 SSLKERN_16(0), SSLKERN_16(16)
#define SSLKERN_REGISTERS_64 SSLKERN_REGISTERS_32, SSLKERN_16(32), SSLKERN_16(48)
#define SSLKERN_REGISTERS_128 SSLKERN_REGISTERS_64, SSLKERN_16(64), SSLKERN_16(80), SSLKERN_16(96), SSLKERN_16(112)

// N and the type, how many registers d has, and the numbers of the operands that follow them.
#define SSLKERN_WGMMA(N, TYPE, R, A, B, P)                                                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               " {" SSLKERN_OPERANDS_##R "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}\n"                                 \
               : SSLKERN_REGISTERS_##R                                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define SSLKERN_WGMMA_FROM_REGISTERS(N, TYPE, R, A0, A1, A2, A3, B)                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE     \
               " {" SSLKERN_OPERANDS_##R "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 1;\n}\n" \
               : SSLKERN_REGISTERS_##R                                                                            \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))

// Both matrices in shared memory, `rows_at` each; without `accumulate` d is overwritten.
template <class T, int R>
SSLKERN_DEVICE void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(SAME<T, bf16> || SAME<T, fp16>);
  static_assert(R == 32 || R == 64 || R == 128);
  if constexpr (SAME<T, bf16>) {
    if constexpr (R == 32) SSLKERN_WGMMA(64, "bf16.bf16", 32, 32, 33, 34);
    if constexpr (R == 64) SSLKERN_WGMMA(128, "bf16.bf16", 64, 64, 65, 66);
    if constexpr (R == 128) SSLKERN_WGMMA(256, "bf16.bf16", 128, 128, 129, 130);
  } else {
    if constexpr (R == 32) SSLKERN_WGMMA(64, "f16.f16", 32, 32, 33, 34);
    if constexpr (R == 64) SSLKERN_WGMMA(128, "f16.f16", 64, 64, 65, 66);
    if constexpr (R == 128) SSLKERN_WGMMA(256, "f16.f16", 128, 128, 129, 130);
  }
}
// d += a b with a in registers: a0 has row t % 32 / 4 and columns 2 (t % 4) + 0, 1 of the 16, a1 the row 8 further, a2
// and a3 the same of the columns 8 further (what `packed` makes of the accumulators of two blocks of 8 columns). b is
// at `columns_at`.
template <class T, int R>
SSLKERN_DEVICE void wgmma(float (&d)[R], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  static_assert(SAME<T, bf16> || SAME<T, fp16>);
  static_assert(R == 32 || R == 64 || R == 128);
  if constexpr (SAME<T, bf16>) {
    if constexpr (R == 32) SSLKERN_WGMMA_FROM_REGISTERS(64, "bf16.bf16", 32, 32, 33, 34, 35, 36);
    if constexpr (R == 64) SSLKERN_WGMMA_FROM_REGISTERS(128, "bf16.bf16", 64, 64, 65, 66, 67, 68);
    if constexpr (R == 128) SSLKERN_WGMMA_FROM_REGISTERS(256, "bf16.bf16", 128, 128, 129, 130, 131, 132);
  } else {
    if constexpr (R == 32) SSLKERN_WGMMA_FROM_REGISTERS(64, "f16.f16", 32, 32, 33, 34, 35, 36);
    if constexpr (R == 64) SSLKERN_WGMMA_FROM_REGISTERS(128, "f16.f16", 64, 64, 65, 66, 67, 68);
    if constexpr (R == 128) SSLKERN_WGMMA_FROM_REGISTERS(256, "f16.f16", 128, 128, 129, 130, 131, 132);
  }
}

}  // namespace sslkern::cuda
#endif
