// The threads of a GPU as fibers, and of its driver what sslkern calls. As the real one it knows contexts of threads
// and of modules, and refuses what does not fit.
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>

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

void run(int64_t count, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (fibers[0].stack == nullptr) create();
  kernel = &body;
  blocks = count;
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

namespace emulation {

std::deque<Kernel>& kernels() {
  static std::deque<Kernel> all;
  return all;
}
void add(const Kernel& kernel) { kernels().push_back(kernel); }

}  // namespace emulation

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200 };
enum { INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500 };

constexpr int DEVICES = 2;
const char IMAGE[] = "emulated";  // the only machine code that loads

struct Context {
  int device;
} contexts[DEVICES] = {{0}, {1}};
struct Module {
  Context* context;
};
struct Function {
  Context* context;
  const emulation::Kernel* kernel;
};
// What was launched last.
struct Launch {
  int64_t device, blocks, threads, stream, count;
} last;

bool initialized = false;
std::deque<Module> modules;
std::deque<Function> functions;
thread_local std::deque<Context*> current_contexts;

Context* now() { return current_contexts.empty() ? nullptr : current_contexts.back(); }

}  // namespace
}  // namespace sslkern::cuda

using namespace sslkern::cuda;

#define DRIVER extern "C" __attribute__((visibility("default"))) int

DRIVER cuInit(unsigned) {
  initialized = true;
  return SUCCESS;
}
DRIVER cuDeviceGetCount(int* count) {
  *count = DEVICES;
  return initialized ? SUCCESS : NOT_INITIALIZED;
}
DRIVER cuDeviceGet(int* device, int ordinal) {
  if (!initialized) return NOT_INITIALIZED;
  if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}
DRIVER cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return SUCCESS;
}
DRIVER cuDevicePrimaryCtxRetain(Context** context, int device) {
  *context = &contexts[device];
  return SUCCESS;
}
DRIVER cuCtxGetCurrent(Context** context) {
  *context = now();
  return SUCCESS;
}
DRIVER cuCtxPushCurrent_v2(Context* context) {
  current_contexts.push_back(context);
  return SUCCESS;
}
DRIVER cuCtxPopCurrent_v2(Context** context) {
  if (now() == nullptr) return INVALID_CONTEXT;
  *context = now();
  current_contexts.pop_back();
  return SUCCESS;
}
DRIVER cuThreadExchangeStreamCaptureMode(int* mode) {
  static thread_local int of_thread = 0;
  std::swap(*mode, of_thread);
  return SUCCESS;
}
DRIVER cuModuleLoadData(Module** module, const char* image) {
  if (now() == nullptr) return INVALID_CONTEXT;
  if (strcmp(image, IMAGE) != 0) return INVALID_IMAGE;
  modules.push_back({now()});
  *module = &modules.back();
  return SUCCESS;
}
DRIVER cuModuleGetFunction(Function** function, Module* module, const char* name) {
  for (const emulation::Kernel& kernel : emulation::kernels())
    if (strcmp(kernel.name, name) == 0) {
      functions.push_back({module->context, &kernel});
      *function = &functions.back();
      return SUCCESS;
    }
  return NOT_FOUND;
}
DRIVER cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                      unsigned threads_z, unsigned, intptr_t stream, void** parameters, void** extra) {
  if (now() == nullptr) return INVALID_CONTEXT;
  if (now() != function->context) return INVALID_HANDLE;
  if (x == 0 || x > 0x7fffffff || y != 1 || z != 1 || threads != THREADS || threads_y != 1 || threads_z != 1)
    return INVALID_VALUE;
  if (parameters != nullptr || extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] != nullptr)
    return INVALID_VALUE;
  if (*static_cast<size_t*>(extra[3]) != size_t(function->kernel->bytes)) return INVALID_VALUE;
  last = {function->context->device, int64_t(x), int64_t(threads), int64_t(stream), last.count + 1};
  function->kernel->run(x, static_cast<const char*>(extra[1]));
  return SUCCESS;
}
DRIVER cuGetErrorName(int status, const char** text) {
  *text = status == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR";
  return SUCCESS;
}
DRIVER cuGetErrorString(int status, const char** text) {
  *text = status == INVALID_IMAGE ? "device kernel image is invalid" : "an error";
  return SUCCESS;
}

// For tests: the last launch, as device, blocks, threads, stream and the number of launches so far.
DRIVER emulated_last(int64_t* to) {
  memcpy(to, &last, sizeof last);
  return SUCCESS;
}
