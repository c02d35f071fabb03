// Where the memory of work arrays comes from.
#include "memory.h"

#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sslkern {

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
