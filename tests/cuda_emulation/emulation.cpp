// The threads of a GPU as fibers.
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "device.h"  // brings emulation.h

namespace sslkern::cuda {
namespace {

constexpr int STACK = 1 << 16;

struct Fiber {
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool done;
  float exchanged;
};

struct Barrier {
  int arrived;
  int64_t passed;  // how often it opened
};

Fiber fibers[THREADS];
Barrier of_some[THREADS], of_all;  // the first by the first of the threads
jmp_buf home;
const std::function<void()>* kernel;
int current;
int64_t block, blocks, left;
int64_t idle;  // changes of fiber since one got anywhere

// The next fiber that is not done goes on; when all are, run() does.
void change() {
  if (_setjmp(fibers[current].at) != 0) return;
  if (left == 0) _longjmp(home, 1);
  if (++idle > 4 * THREADS) {
    fprintf(stderr, "emulation: threads wait at a barrier that others do not reach\n");
    abort();
  }
  do current = (current + 1) % THREADS;
  while (fibers[current].done);
  _longjmp(fibers[current].at, 1);
}

void live() {
  for (;;) {
    (*kernel)();
    fibers[current].done = true;
    --left;
    idle = 0;
    change();
  }
}

// Fibers are born into live() and wait for their first block at once.
void create() {
  for (current = 0; current < THREADS; ++current) {
    if (_setjmp(home) != 0) continue;
    Fiber& fiber = fibers[current];
    fiber.stack = std::make_unique<char[]>(STACK);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK;
    makecontext(
        &context,
        [] {
          if (_setjmp(fibers[current].at) == 0) _longjmp(home, 1);
          live();
        },
        0);
    setcontext(&context);
  }
}

}  // namespace

namespace emulation {

void run(const Launch& launch, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (fibers[0].stack == nullptr) create();
  kernel = &body;
  blocks = launch.blocks;
  for (block = 0; block < blocks; ++block) {
    for (Fiber& fiber : fibers) fiber.done = false;
    left = THREADS;
    idle = 0;
    current = 0;
    if (_setjmp(home) == 0) _longjmp(fibers[0].at, 1);
  }
}

void wait(int first, int count) {
  Barrier& barrier = count == THREADS ? of_all : of_some[first];
  const int64_t passed = barrier.passed;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.passed;
    idle = 0;
    return;
  }
  while (barrier.passed == passed) change();
}

float* exchanged(int thread) { return &fibers[thread].exchanged; }

}  // namespace emulation

int thread_id() { return current; }
int64_t block_id() { return block; }
int64_t block_count() { return blocks; }

}  // namespace sslkern::cuda
