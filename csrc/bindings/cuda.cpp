// `Launcher` of sslkern._cpu: what ByCtypes in sslkern/backends/cuda/driver.py does, in a tenth of the time.
#include "bindings/cuda.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace sslkern {
namespace {

enum { SUCCESS = 0, NOT_FOUND = 500, CLUSTER_DIMENSION = 4 };

// CUlaunchAttribute, of a cluster, and CUlaunchConfig.
struct Attribute {
  int name;
  alignas(8) unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};

class Launcher {
 public:
  Launcher(const py::object& library, const py::object& context, uintptr_t function, std::vector<size_t> starts)
      : context_(reinterpret_cast<void*>(context.attr("handle").cast<uintptr_t>())),
        function_(reinterpret_cast<void*>(function)),
        starts_(std::move(starts)) {
    void* const handle = reinterpret_cast<void*>(library.attr("_handle").cast<uintptr_t>());
    find(handle, "cuLaunchKernel", plain_);
    find(handle, "cuCtxGetCurrent", current_);
    find(handle, "cuCtxPushCurrent_v2", push_);
    find(handle, "cuCtxPopCurrent_v2", pop_);
    clustered_ = reinterpret_cast<decltype(clustered_)>(dlsym(handle, "cuLaunchKernelEx"));  // from CUDA 11.8 on
  }

  int operator()(unsigned blocks, unsigned threads, uintptr_t stream, const py::bytes& arguments, unsigned shared,
                 unsigned cluster) const {
    std::vector<void*> places;
    places.reserve(starts_.size());
    for (const size_t start : starts_) places.push_back(PyBytes_AS_STRING(arguments.ptr()) + start);
    py::gil_scoped_release release;
    void* now = nullptr;
    int status = current_(&now);
    const bool elsewhere = status != SUCCESS || now != context_;
    if (elsewhere) status = push_(context_);
    if (status != SUCCESS) return status;
    status = launch(blocks, threads, reinterpret_cast<void*>(stream), places.data(), shared, cluster);
    if (elsewhere) pop_(&now);
    return status;
  }

 private:
  template <class Function>
  static void find(void* library, const char* name, Function& to) {
    to = reinterpret_cast<Function>(dlsym(library, name));
    if (to == nullptr) throw py::attribute_error(name);
  }

  int launch(unsigned blocks, unsigned threads, void* stream, void** places, unsigned shared, unsigned cluster) const {
    if (cluster == 1) return plain_(function_, blocks, 1, 1, threads, 1, 1, shared, stream, places, nullptr);
    if (clustered_ == nullptr) return NOT_FOUND;
    const Attribute attribute{CLUSTER_DIMENSION, {cluster, 1, 1}};
    const Config config{{blocks, 1, 1}, {threads, 1, 1}, shared, stream, &attribute, 1};
    return clustered_(&config, function_, places, nullptr);
  }

  void *const context_, *const function_;
  const std::vector<size_t> starts_;
  int (*plain_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*clustered_)(const Config*, void*, void**, void**);
  int (*current_)(void**);
  int (*push_)(void*);
  int (*pop_)(void**);
};

}  // namespace

void bind_cuda(py::module_& module) {
  py::class_<Launcher>(module, "Launcher")
      .def(py::init<const py::object&, const py::object&, uintptr_t, std::vector<size_t>>())
      .def("__call__", &Launcher::operator());
}

}  // namespace sslkern
