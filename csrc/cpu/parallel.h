// A team of threads that walks through rounds of tasks. Compiled once, shared by the kernels of every instruction set.
#pragma once

#include <atomic>
#include <cstdint>

namespace sslkern {

class Team {
 public:
  // Runs task(0) ... task(count - 1), started in this order, each on whichever thread is free, and returns on every
  // thread when all are done. Tasks must touch disjoint memory, or wait for those before them that touch the same; then
  // the result does not depend on the number of threads.
  template <class Task>
  void each(int64_t count, const Task& task) {
    if (next_ == nullptr) {
      for (int64_t t = 0; t < count; ++t) task(t);
      return;
    }
    std::atomic<int64_t>& next = next_[turn_ & 1];
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(t);
    barrier();
    if (id == 0) next.store(0, std::memory_order_relaxed);  // read again two turns on, behind the next barrier
    ++turn_;
  }
  // A team of one, for work inside a task of another team.
  static Team alone(int id) { return Team(id, 1, nullptr, nullptr); }
  const int id, size;  // id is one of 0 ... size - 1 in the whole team: the slot of this thread's workspace

 private:
  friend struct Crew;
  Team(int id, int size, std::atomic<int64_t>* next, void* crew) : id(id), size(size), next_(next), crew_(crew) {}
  void barrier();
  std::atomic<int64_t>* next_;
  void* crew_;
  int turn_ = 0;
};

// Returns once `counter` has come to `value`, which a running task brings about.
void wait_for(const std::atomic<int64_t>& counter, int64_t value);

using TeamBody = void (*)(const void* context, Team& team);
void run_team(int threads, TeamBody body, const void* context);

// The number of threads to use: 1 in a forked child, where the parent's pool does not exist and waiting for it hangs.
int usable_threads(int wanted);

// Calls body(team) on `threads` threads at once.
template <class Body>
void parallel(int threads, const Body& body) {
  run_team(threads, [](const void* context, Team& team) { (*static_cast<const Body*>(context))(team); }, &body);
}

}  // namespace sslkern
