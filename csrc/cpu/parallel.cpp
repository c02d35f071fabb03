// Teams of threads: those of OpenMP, or of std::thread where there is none.
#include "parallel.h"

#include <unistd.h>

#include <thread>

#ifdef _OPENMP
#include <omp.h>
#else
#include <condition_variable>
#include <mutex>
#include <vector>
#endif

namespace sslkern {

struct Crew {
  std::atomic<int64_t> next[2] = {{0}, {0}};
  int size = 1;
  void work(int id, TeamBody body, const void* context) {
    Team team(id, size, size > 1 ? next : nullptr, this);
    body(context, team);
  }
#ifdef _OPENMP
  void barrier() {
    if (size > 1) {
#pragma omp barrier
    }
  }
#else  // ThreadSanitizer cannot see into libgomp, and some compilers have no OpenMP
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0;
  long round = 0;
  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const long now = round;
    if (++waiting == size) {
      waiting = 0;
      ++round;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return round != now; });
    }
  }
#endif
};

void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
  for (int spins = 1000; counter.load(std::memory_order_acquire) < value;)
    spins > 0 ? void(--spins) : std::this_thread::yield();  // its thread may wait for this very core
}

void Team::barrier() { static_cast<Crew*>(crew_)->barrier(); }

void run_team(int threads, TeamBody body, const void* context) {
  Crew crew;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      crew.size = omp_get_num_threads();  // may be fewer than asked for
      crew.work(omp_get_thread_num(), body, context);
    }
    return;
  }
  crew.work(0, body, context);
#else
  crew.size = threads;
  std::vector<std::thread> others;
  for (int id = 1; id < threads; ++id)
    others.emplace_back([&crew, id, body, context] { crew.work(id, body, context); });
  crew.work(0, body, context);
  for (std::thread& other : others) other.join();
#endif
}

int usable_threads(int wanted) {
  static const pid_t home = getpid();  // read when the library is loaded: see below
  return getpid() == home && wanted > 1 ? wanted : 1;
}

namespace {
const int at_load = usable_threads(1);
}

}  // namespace sslkern
