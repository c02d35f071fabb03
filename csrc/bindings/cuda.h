// Launches of CUDA kernels, through NVIDIA's driver as Python has loaded it: nothing of CUDA is needed to compile this.
#pragma once

#include <pybind11/pybind11.h>

namespace sslkern {

void bind_cuda(pybind11::module_& module);

}  // namespace sslkern
