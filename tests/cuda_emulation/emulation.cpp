// The threads of a cluster of blocks as fibers.
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace sslkern::cuda {
namespace emulation {
namespace {

constexpr int STACK = 1 << 18;  // of which few pages are touched

struct Fiber {
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool done;
  const Place* waits;
};

struct Lanes : Meeting {
  Lanes() : Meeting("for the other lanes of its warp") {}
  uint32_t shown[2][WARP];  // in turn: the next meeting begins before all have looked
};

// Of the cluster that runs, threads counted through.
std::deque<Fiber> fibers;
std::deque<Lanes> lanes;      // which meet, by the first of them
std::vector<uint32_t> ready;  // lanes of each warp
std::vector<int> warps;       // that may have lanes which are ready
std::vector<bool> listed;     // of each warp: is it among them
std::vector<bool> lagging;    // it runs when others cannot, mostly
int until_redrawn;

std::vector<std::function<void()>> soon, late;

Launch launched;
int64_t first_block;
const std::function<void()>* kernel;
jmp_buf home;
enum { BEGUN, ENDED, FAILED };  // how `home` is reached
std::string failure;
int current, left;
std::vector<int> left_of;  // by rank
uint64_t seed_of_launches, state;

void make_ready(int index) {
  const int warp = index / WARP;
  ready[warp] |= 1u << index % WARP;
  if (listed[warp]) return;
  listed[warp] = true;
  warps.push_back(warp);
}

void happen(std::vector<std::function<void()>>& from) {
  const size_t which = drawn(uint32_t(from.size()));
  const std::function<void()> happening = std::move(from[which]);
  from[which] = std::move(from.back());
  from.pop_back();
  happening();
}

[[noreturn]] void stop(std::string sentence) {
  failure = std::move(sentence);
  _longjmp(home, FAILED);
}

[[noreturn]] void deadlock() {
  std::string report = "nobody can go on";
  for (int begin = 0, end; begin < launched.cluster * launched.threads; begin = end) {
    const auto place = [](int i) { return fibers[i].done ? "have ended" : "wait " + fibers[i].waits->name(); };
    const std::string name = place(begin);
    const int rank = begin / launched.threads;
    for (end = begin + 1; end < (rank + 1) * launched.threads && place(end) == name;) ++end;
    report += "; threads " + std::to_string(begin % launched.threads) + " to " +
              std::to_string((end - 1) % launched.threads) + " of block " + std::to_string(first_block + rank) + " " +
              name;
  }
  stop(report);
}

// A warp that has lanes which are ready, the one that ran mostly; -1 if there is none.
int next_warp() {
  if (--until_redrawn < 0) {
    until_redrawn = 32 + drawn(256);
    const uint32_t share = drawn(4);
    for (size_t i = 0; i < lagging.size(); ++i) lagging[i] = drawn(4) < share;
  }
  const int same = current / WARP;
  if (ready[same] != 0 && !lagging[same] && !one_in(16)) return same;
  for (int tries = 8; !warps.empty();) {
    const uint32_t which = drawn(uint32_t(warps.size()));
    const int warp = warps[which];
    if (ready[warp] == 0) {
      listed[warp] = false;
      warps[which] = warps.back();
      warps.pop_back();
    } else if (!lagging[warp] || --tries < 0) {
      return warp;
    }
  }
  return -1;
}

// A fiber that is ready goes on; when all are done, run() does.
[[noreturn]] void go_on() {
  if (left == 0) _longjmp(home, ENDED);
  if (!soon.empty() && one_in(8)) happen(soon);
  int warp;
  while ((warp = next_warp()) < 0) {
    if (soon.empty() && late.empty()) deadlock();
    happen(late.empty() || (!soon.empty() && one_in(2)) ? soon : late);
  }
  const uint32_t some = ready[warp] & ~0u << drawn(WARP);
  const int lane = __builtin_ctz(some != 0 ? some : ready[warp]);
  ready[warp] &= ~(1u << lane);
  current = warp * WARP + lane;
  _longjmp(fibers[current].at, 1);
}

// Until this fiber goes on.
void change() {
  if (_setjmp(fibers[current].at) == 0) go_on();
}

void live() {
  for (;;) {
    (*kernel)();
    fibers[current].done = true;
    --left;
    --left_of[rank()];
    end_thread();
    change();
  }
}

// False where one was stopped.
bool all_end() {
  const int how = _setjmp(home);
  if (how == BEGUN) go_on();
  return how == ENDED;
}

// Fibers are born into live() and wait for their first block at once.
void create(int count) {
  for (current = int(fibers.size()); current < count; ++current) {
    fibers.emplace_back();
    Fiber& fiber = fibers.back();
    fiber.stack.reset(new char[STACK]);
    if (_setjmp(home) != BEGUN) continue;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK - current % 59 * 64;  // not all in the same sets of the caches
    makecontext(
        &context,
        [] {
          if (_setjmp(fibers[current].at) == 0) _longjmp(home, ENDED);
          live();
        },
        0);
    setcontext(&context);
  }
}

}  // namespace

void fail(const char* sentence, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, sentence);
  vsnprintf(text, sizeof text, sentence, arguments);
  va_end(arguments);
  stop(std::string(text) + " (block " + std::to_string(block_id()) + ", thread " + std::to_string(thread()) + ")");
}

const Launch& launch() { return launched; }
int rank() { return current / launched.threads; }
int thread() { return current % launched.threads; }
bool gone(int rank) { return left_of[rank] == 0; }

uint32_t drawn(uint32_t below) {  // splitmix64
  uint64_t x = state += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return uint32_t(((x ^ x >> 31) >> 32) * below >> 32);
}

void sleep(Place& place) {
  place.fibers.push_back(current);
  fibers[current].waits = &place;
  change();
}
void wake(Place& place) {
  for (const int index : place.fibers) make_ready(index);
  place.fibers.clear();
}
void pause() {
  make_ready(current);
  change();
}
void maybe_pause() {
  if (one_in(8)) pause();
}

bool Meeting::join(int count) {
  const int64_t before = passed;
  if (++arrived == count) {
    arrived = 0;
    ++passed;
    wake(*this);
    return true;
  }
  while (passed == before) sleep(*this);
  return false;
}

void beside(std::function<void()> happening) {
  const uint32_t when = drawn(3);
  if (when == 0)
    happening();
  else
    (when == 1 ? soon : late).push_back(std::move(happening));
}

void run(const Launch& launch, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int count = launch.threads * launch.cluster;
  const int64_t clusters = launch.blocks / launch.cluster;
  if (launch.threads % WARP != 0 || launch.blocks % launch.cluster != 0)
    throw std::runtime_error("blocks are of whole warps, and clusters are whole");
  launched = launch;
  kernel = &body;
  state = seed_of_launches++;
  if (int(fibers.size()) < count) create(count);
  if (int(lanes.size()) < count) lanes.resize(count);
  ready.assign(count / WARP, 0);
  listed.assign(count / WARP, false);
  lagging.assign(count / WARP, false);
  warps.clear();
  const int64_t start = drawn(uint32_t(clusters));
  for (int64_t i = 0; i < clusters; ++i) {
    first_block = (start + i) % clusters * launch.cluster;
    left = count;
    left_of.assign(launch.cluster, launch.threads);
    until_redrawn = 0;
    begin_cluster();
    for (int i = 0; i < count; ++i) {
      fibers[i].done = false;
      make_ready(i);
    }
    current = 0;
    if (all_end()) continue;
    fibers.clear();
    lanes.clear();
    soon.clear();
    late.clear();
    forget_blocks();
    throw std::runtime_error(failure);
  }
}
void seed(uint32_t x) { seed_of_launches = uint64_t(x) << 32; }

const uint32_t* shown(uint32_t x, int width) {
  Lanes& meeting = lanes[current & ~(width - 1)];
  uint32_t* const all = meeting.shown[meeting.passed & 1];
  all[current & (width - 1)] = x;
  meeting.join(width);
  return all;
}

}  // namespace emulation

int thread_id() { return emulation::thread(); }
int64_t block_id() { return emulation::first_block + emulation::rank(); }
int64_t block_count() { return emulation::launched.blocks; }

}  // namespace sslkern::cuda
