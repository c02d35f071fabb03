// Tensors as Python passes them: objects, or None.
#pragma once

#include <pybind11/pybind11.h>

namespace sslkern {

namespace py = pybind11;

template <class T = float>
T* data(const py::object& tensor) {
  if (tensor.is_none()) return nullptr;
  static const py::str name("data_ptr");
  return reinterpret_cast<T*>(tensor.attr(name)().cast<uintptr_t>());
}

}  // namespace sslkern
