// The kernels of each instruction set that was built, and which of them run on this machine.
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sslkern {

// Every kernel by its name, which is that of its function, of its declaration and of its place in the table.
#define SSLKERN_EACH_KERNEL(DO) \
  DO(similarity_lse_fwd)        \
  DO(similarity_lse_frozen_fwd) \
  DO(similarity_lse_bwd)        \
  DO(similarity_topk)           \
  DO(similarity_softplus)       \
  DO(sampled_similarity_fwd)    \
  DO(sampled_similarity_bwd)    \
  DO(queue_push)                \
  DO(bank_update)               \
  DO(unit_pairs_fwd)            \
  DO(unit_pairs_bwd)

#define SSLKERN_ONE_MORE(kernel) +1
static_assert(sizeof(Kernels) == (1 SSLKERN_EACH_KERNEL(SSLKERN_ONE_MORE)) * sizeof(void (*)()),
              "SSLKERN_EACH_KERNEL must name every kernel of Kernels");

#define SSLKERN_DECLARE(kernel) std::remove_pointer_t<decltype(Kernels::kernel)> kernel;
#define SSLKERN_ENTER(kernel) kernels.kernel = kernel;
#define SSLKERN_KERNELS(isa)           \
  namespace isa {                      \
  SSLKERN_EACH_KERNEL(SSLKERN_DECLARE) \
  constexpr Kernels by_name() {        \
    Kernels kernels{};                 \
    kernels.name = #isa;               \
    SSLKERN_EACH_KERNEL(SSLKERN_ENTER) \
    return kernels;                    \
  }                                    \
  constexpr Kernels table = by_name(); \
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

}  // namespace sslkern
