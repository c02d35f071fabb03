// What the emulated machine is built on: the threads of a cluster of blocks as fibers, the places where they wait, and
// what happens beside them. Which goes first is drawn anew all the time, from the seed of the launch: warps that lag
// behind or run ahead, lanes in any order, copies that land at once or when nothing else is left to do.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "device.h"  // brings emulation.h

namespace sslkern::cuda::emulation {

// A kernel did what it must not: `run` throws the sentence, with the block and the thread that did it.
[[noreturn]] void fail(const char* sentence, ...) __attribute__((format(printf, 1, 2)));

// Of the launch that runs, of the thread that runs.
const Launch& launch();
int rank();    // of the block in its cluster
int thread();  // in its block

uint32_t drawn(uint32_t below);
inline bool one_in(uint32_t n) { return drawn(n) == 0; }

// Where threads wait.
struct Place {
  std::vector<int> fibers;
  virtual std::string name() const = 0;  // "at sync_block", for the report of a deadlock
  virtual ~Place() = default;
};
void sleep(Place&);  // until wake
void wake(Place&);
void pause();         // others may run first
void maybe_pause();   // now and then
bool gone(int rank);  // all threads of that block have ended

// A place where `count` threads meet. True for the last to come, which goes on before the others do.
struct Meeting : Place {
  const char* what;
  int arrived = 0;
  int64_t passed = 0;
  explicit Meeting(const char* what) : what(what) {}
  std::string name() const override { return what; }
  bool join(int count);
};

// Happens beside the threads, at some time before they would wait for it in vain: at once, soon, or as late as it can.
void beside(std::function<void()> happening);

// The machine's part (hopper_emulation.cpp): a cluster begins, one of its threads has ended; a launch has failed.
void begin_cluster();
void end_thread();
void forget_blocks();

}  // namespace sslkern::cuda::emulation
