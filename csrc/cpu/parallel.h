// A team of threads that walks through rounds of tasks. Compiled once, shared by the kernels of every instruction set.
#pragma once

#include <atomic>

namespace sslkern {

class Team {
 public:
  // Runs task(0) ... task(count - 1), each on whichever thread is free, and returns on every thread when all are done.
  // Tasks of one call must touch disjoint memory; then the result does not depend on the number of threads.
  template <class Task>
  void each(int count, const Task& task) {
    if (next_ == nullptr) {
      for (int t = 0; t < count; ++t) task(t);
      return;
    }
    std::atomic<int>& next = next_[turn_ & 1];
    for (int t; (t = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(t);
    barrier();
    if (id == 0) next.store(0, std::memory_order_relaxed);  // read again two turns on, behind the next barrier
    ++turn_;
  }
  // A team of one, for work inside a task of another team.
  static Team alone(int id) { return Team(id, nullptr, nullptr); }
  const int id;  // 0 ... size - 1: the slot of this thread's workspace

 private:
  friend struct Crew;
  Team(int id, std::atomic<int>* next, void* crew) : id(id), next_(next), crew_(crew) {}
  void barrier();
  std::atomic<int>* next_;
  void* crew_;
  int turn_ = 0;
};

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
