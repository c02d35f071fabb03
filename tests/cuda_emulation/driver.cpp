// Of NVIDIA's driver what sslkern calls. As the real one it knows contexts of threads and of modules, and refuses what
// does not fit.
#include <deque>
#include <exception>
#include <string>

#include "device.h"
#include "tensor_map.h"

namespace sslkern::cuda {

namespace emulation {

std::deque<Kernel>& kernels() {
  static std::deque<Kernel> all;
  return all;
}
void add(const Kernel& kernel) { kernels().push_back(kernel); }

}  // namespace emulation

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200 };
enum { INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

constexpr int DEVICES = 2, PROCESSORS = 3;
constexpr int64_t MOST_SHARED = 227 << 10, SHARED_WITHOUT_ASKING = 48 << 10;
constexpr int SHARED_ATTRIBUTE = 8, CLUSTER_ATTRIBUTE = 4, MOST_OF_A_CLUSTER = 8;
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
  int64_t most_shared;  // bytes of dynamic shared memory that a launch may ask for
};
// CUlaunchAttribute and CUlaunchConfig.
struct Attribute {
  int name;
  alignas(8) unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared;
  intptr_t stream;
  const Attribute* attributes;
  unsigned count;
};
// What was launched last.
struct Last {
  int64_t device, blocks, threads, stream, count, shared, cluster;
} last;
std::string failure;  // why a kernel was stopped
bool idle = false;    // no kernel runs

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
  switch (attribute) {
    case 16:
      *value = PROCESSORS;
      return SUCCESS;
    case 97:
      *value = 227 << 10;
      return SUCCESS;
    case 75:
      *value = 9;
      return SUCCESS;
    case 76:
      *value = 0;
      return SUCCESS;
  }
  return INVALID_VALUE;
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
      functions.push_back({module->context, &kernel, SHARED_WITHOUT_ASKING});
      *function = &functions.back();
      return SUCCESS;
    }
  return NOT_FOUND;
}
DRIVER cuFuncSetAttribute(Function* function, int attribute, int value) {
  if (now() == nullptr) return INVALID_CONTEXT;
  if (attribute != SHARED_ATTRIBUTE || value < 0 || value > MOST_SHARED) return INVALID_VALUE;
  function->most_shared = value;
  return SUCCESS;
}
DRIVER cuLaunchKernelEx(const Config* config, Function* function, void** parameters, void** extra) {
  if (now() == nullptr) return INVALID_CONTEXT;
  if (now() != function->context) return INVALID_HANDLE;
  const auto& [grid, block, shared, stream, attributes, count] = *config;
  if (grid[0] == 0 || grid[0] > 0x7fffffff || grid[1] != 1 || grid[2] != 1) return INVALID_VALUE;
  if (block[0] == 0 || block[0] > 1024 || block[1] != 1 || block[2] != 1) return INVALID_VALUE;
  if (shared > function->most_shared) return INVALID_VALUE;
  unsigned cluster = 1;
  for (unsigned i = 0; i < count; i++) {
    const unsigned* value = attributes[i].value;
    if (attributes[i].name != CLUSTER_ATTRIBUTE || value[1] != 1 || value[2] != 1) return INVALID_VALUE;
    cluster = value[0];
    if (cluster == 0 || cluster > MOST_OF_A_CLUSTER || grid[0] % cluster != 0) return INVALID_VALUE;
  }
  if (parameters == nullptr || extra != nullptr) return INVALID_VALUE;
  last = {function->context->device, grid[0], block[0], stream, last.count + 1, shared, cluster};
  const emulation::Launch launch{grid[0], int(block[0]), shared, int(cluster)};
  try {
    if (!idle) function->kernel->run(launch, parameters);
  } catch (const std::exception& error) {
    failure = error.what();
    return LAUNCH_FAILED;
  }
  return SUCCESS;
}
DRIVER cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                      unsigned threads_z, unsigned shared, intptr_t stream, void** parameters, void** extra) {
  const Config config{{x, y, z}, {threads, threads_y, threads_z}, shared, stream, nullptr, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}
// Refuses what the real one refuses, and what sslkern has no use for.
DRIVER cuTensorMapEncodeTiled(void* map, int type, unsigned rank, uint8_t* address, const uint64_t* sizes,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                              int swizzle, int promotion, int fill) {
  constexpr int FP16 = 6, FP32 = 7, BF16 = 9, SWIZZLE_NONE = 0, SWIZZLE_128B = 3;
  if (now() == nullptr) return INVALID_CONTEXT;
  if (type != FP16 && type != FP32 && type != BF16) return INVALID_VALUE;
  if (uintptr_t(map) % 64 != 0 || uintptr_t(address) % 16 != 0 || rank < 1 || rank > 2) return INVALID_VALUE;
  if (swizzle != SWIZZLE_NONE && swizzle != SWIZZLE_128B) return INVALID_VALUE;
  if (interleave != 0 || promotion < 0 || promotion > 3 || fill != 0) return INVALID_VALUE;
  const uint32_t bytes = type == FP32 ? 4 : 2;
  emulation::EncodedMap words{
      emulation::EncodedMap::MAGIC,      address, {1, 1}, 0, {1, 1}, int32_t(rank), int32_t(bytes),
      swizzle == SWIZZLE_128B ? 128 : 0, type};
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] == 0 || sizes[i] > uint64_t(1) << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return INVALID_VALUE;
    words.sizes[i] = sizes[i];
    words.box[i] = box[i];
  }
  if (rank == 2) {
    words.row_bytes = strides[0];
    if (strides[0] % 16 != 0 || strides[0] >= uint64_t(1) << 40 || strides[0] < sizes[0] * bytes) return INVALID_VALUE;
  }
  if (box[0] * bytes % 16 != 0 || (swizzle == SWIZZLE_128B && box[0] * bytes > 128)) return INVALID_VALUE;
  memset(map, 0, 128);
  memcpy(map, &words, sizeof words);
  return SUCCESS;
}
DRIVER cuGetErrorName(int status, const char** text) {
  *text = status == INVALID_IMAGE   ? "CUDA_ERROR_INVALID_IMAGE"
          : status == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED"
                                    : "CUDA_ERROR";
  return SUCCESS;
}
DRIVER cuGetErrorString(int status, const char** text) {
  *text = status == INVALID_IMAGE   ? "device kernel image is invalid"
          : status == LAUNCH_FAILED ? failure.c_str()
                                    : "an error";
  return SUCCESS;
}
// For benchmarks: kernels do nothing from here on, or work again. What is left of a call is the host's.
DRIVER emulated_idle(int now) {
  idle = now != 0;
  return SUCCESS;
}
// For tests: what the launches to come draw.
DRIVER emulated_seed(uint32_t seed) {
  emulation::seed(seed);
  return SUCCESS;
}

// For tests: the last launch, as device, blocks, threads, stream, the number of launches so far, bytes of dynamic
// shared memory and blocks of a cluster.
DRIVER emulated_last(int64_t* to) {
  memcpy(to, &last, sizeof last);
  return SUCCESS;
}
