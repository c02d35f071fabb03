#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"
#include "memory.h"
#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sslkern {

#define SSLKERN_KERNELS(isa)                                                                                         \
  namespace isa {                                                                                                    \
  void similarity_lse_fwd(const Similarity&, float*, float*, float*);                                                \
  void similarity_lse_frozen_fwd(const Similarity&, float*, float*, float*);                                         \
  void similarity_lse_bwd(const Similarity&, const float*, const float*, const float*, const float*, float*, float*, \
                          float*, float*);                                                                           \
  void similarity_topk(const Similarity&, int64_t, float*, int64_t*);                                                \
  void similarity_softplus(const Similarity&, const float*, const float*, float, float*, float*,                     \
                           const SoftplusGradients&);                                                                \
  bool sampled_similarity_fwd(const Similarity&, int64_t, const int64_t*, bool, float*);                             \
  bool sampled_similarity_bwd(const Similarity&, int64_t, const int64_t*, bool, const float*, float*, float*);       \
  void queue_push(DType, DType, int64_t, int64_t, int64_t, void*, int64_t*, const void*, bool, int);                 \
  bool bank_update(DType, DType, int64_t, int64_t, int64_t, void*, const int64_t*, const void*, float, int);         \
  void unit_pairs_fwd(DType, int64_t, int64_t, const void*, const void*, void*, float*, float*, int);                \
  void unit_pairs_bwd(DType, int64_t, int64_t, const void*, const float*, const float*, const float*, const float*,  \
                      void*, void*, int);                                                                            \
  const Kernels table = {#isa,                                                                                       \
                         similarity_lse_fwd,                                                                         \
                         similarity_lse_frozen_fwd,                                                                  \
                         similarity_lse_bwd,                                                                         \
                         similarity_topk,                                                                            \
                         similarity_softplus,                                                                        \
                         sampled_similarity_fwd,                                                                     \
                         sampled_similarity_bwd,                                                                     \
                         queue_push,                                                                                 \
                         bank_update,                                                                                \
                         unit_pairs_fwd,                                                                             \
                         unit_pairs_bwd};                                                                            \
  }

#ifdef SSLKERN_HAS_AMX
SSLKERN_KERNELS(amx)
#endif
#ifdef SSLKERN_HAS_AMX_EMULATED
SSLKERN_KERNELS(amx_emulated)  // only in tests
#endif
#ifdef SSLKERN_HAS_AVX512_BF16
SSLKERN_KERNELS(avx512_bf16)
#endif
#ifdef SSLKERN_HAS_AVX512
SSLKERN_KERNELS(avx512)
#endif
#ifdef SSLKERN_HAS_AVX2
SSLKERN_KERNELS(avx2)
#endif
SSLKERN_KERNELS(baseline)

namespace {

#ifdef __x86_64__
[[maybe_unused]] bool has_f16c() {  // __builtin_cpu_supports does not know it in every Clang
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & 1u << 29) != 0;
}
#endif

#ifdef SSLKERN_HAS_AMX
// Linux saves the tiles of a process only after it asked for them.
bool may_use_tiles() {
#ifdef __linux__
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // cpuid 7, edx
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & AMX_BF16) != 0 && (d & AMX_TILE) != 0 &&
         syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

struct Choice {
  const Kernels* runnable[7] = {};
  const Kernels* current;

  Choice() {
    const Kernels** next = runnable;
#ifdef __x86_64__
    __builtin_cpu_init();
    [[maybe_unused]] const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    [[maybe_unused]] const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                             __builtin_cpu_supports("avx512vl");
    [[maybe_unused]] const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef SSLKERN_HAS_AMX
    if (has_bf16 && may_use_tiles()) *next++ = &amx::table;
#endif
#ifdef SSLKERN_HAS_AMX_EMULATED
    if (has_bf16) *next++ = &amx_emulated::table;
#endif
#ifdef SSLKERN_HAS_AVX512_BF16
    if (has_bf16) *next++ = &avx512_bf16::table;
#endif
#ifdef SSLKERN_HAS_AVX512
    if (has_avx512) *next++ = &avx512::table;
#endif
#ifdef SSLKERN_HAS_AVX2
    if (has_avx2) *next++ = &avx2::table;
#endif
#endif
    *next = &baseline::table;
    current = runnable[0];
    if (const char* wanted = getenv("SSLKERN_CPU_ISA")) use(wanted);
  }

  bool use(const char* name) {
    for (const Kernels* const* one = runnable; *one != nullptr; ++one)
      if (strcmp((*one)->name, name) == 0) {
        current = *one;
        return true;
      }
    return false;
  }
};

Choice& choice() {
  static Choice one;
  return one;
}

}  // namespace

const Kernels& kernels() { return *choice().current; }
const Kernels* const* all_kernels() { return choice().runnable; }
bool use_kernels(const char* name) { return choice().use(name); }

// Large blocks come in huge pages where Linux has them: the faults of small ones take as long as a product.
constexpr size_t LARGE = size_t(1) << 23;

void* allocate(size_t bytes) {
#ifdef __linux__
  if (bytes >= LARGE) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    madvise(p, bytes, MADV_HUGEPAGE);
    return p;
  }
#endif
  void* p = aligned_alloc(64, (bytes + 64) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

void release(void* p, size_t bytes) {
#ifdef __linux__
  if (bytes >= LARGE) {
    munmap(p, bytes);
    return;
  }
#endif
  free(p);
}

}  // namespace sslkern
