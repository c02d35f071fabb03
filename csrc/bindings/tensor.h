// Tensors as Python passes them: objects, or None. What a kernel is given of one is its memory, and only if that is as
// the kernel reads or writes it; any other tensor is an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "dtype.h"

namespace sslkern {

namespace py = pybind11;

namespace tensor {

enum class Type { F32, BF16, FP16, I64, OTHER };
inline const char* name_of(Type type) {
  static const char* const names[] = {"fp32", "bf16", "fp16", "int64", "another type"};
  return names[int(type)];
}
inline Type type_of(DType dtype) { return Type(int(dtype)); }
static_assert(int(Type::F32) == int(DType::F32) && int(Type::BF16) == int(DType::BF16) &&
              int(Type::FP16) == int(DType::FP16));

template <class T>
constexpr Type type_of() {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, int64_t>);
  return std::is_same_v<T, float> ? Type::F32 : Type::I64;
}

struct Device {
  enum { CPU = 1, CUDA = 2 };  // DLDeviceType
  int kind, index;
};
constexpr Device ON_CPU{Device::CPU, 0};

struct Memory {
  void* start;
  Type type;
  int64_t size;  // -1: not contiguous
  Device device;
};

// The part of dlpack.h, version 1, that describes a tensor in C: one call tells everything, in less time than the
// method data_ptr() alone.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_object, *to_object;
  int (*describe)(PyObject*, DLTensor*);
  void* current_stream;
};

inline Memory described(const DLTensor& of) {
  const int kind = of.code << 8 | of.bits;  // kDLInt 0, kDLFloat 2, kDLBfloat 4
  const Type type = kind == 0x220   ? Type::F32
                    : kind == 0x410 ? Type::BF16
                    : kind == 0x210 ? Type::FP16
                    : kind == 0x040 ? Type::I64
                                    : Type::OTHER;
  int64_t size = 1;
  bool contiguous = true;
  for (int i = of.ndim; i-- > 0; size *= of.shape[i]) contiguous &= of.shape[i] == 1 || of.strides[i] == size;
  return {static_cast<char*>(of.data) + of.byte_offset,
          type,
          contiguous || size == 0 ? size : -1,
          {of.device_type, of.device_id}};
}

// What this file asks of torch, which it does not link.
class Torch {
 public:
  static const Torch& get() {
    static const Torch* const torch = new Torch;  // never destroyed: Python may be gone by then
    return *torch;
  }

  Memory memory_of(const py::object& x) const {
    if (api_ == nullptr) return by_attributes(x);
    DLTensor of;
    if (api_->describe(x.ptr(), &of) != 0) throw py::error_already_set();
    return described(of);
  }

  // Whether x stands for the negative of what its memory holds.
  bool is_neg(const py::object& x) const {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), x.ptr()));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }

 private:
  Torch() {
    const py::object torch = py::module_::import("torch"), cls = torch.attr("Tensor");
    is_neg_ = cls.attr("is_neg");
    data_ptr_ = cls.attr("data_ptr");
    is_contiguous_ = cls.attr("is_contiguous");
    numel_ = cls.attr("numel");
    types_ = py::make_tuple(torch.attr("float32"), torch.attr("bfloat16"), torch.attr("float16"), torch.attr("int64"));
    const py::object capsule = py::getattr(cls, "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) return;  // older versions of torch
    const auto* found = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw py::error_already_set();
    if (found->major == 1 && found->describe != nullptr) api_ = found;
  }

  Memory by_attributes(const py::object& x) const {
    const py::object dtype = x.attr(dtype_);
    int type = 0;
    while (type < int(Type::OTHER) && dtype.ptr() != types_[type].ptr()) ++type;
    Device device{py::object(x.attr(is_cpu_)).ptr() == Py_True ? Device::CPU : 0, 0};
    if (device.kind == 0 && py::object(x.attr("is_cuda")).ptr() == Py_True)
      device = {Device::CUDA, x.attr("device").attr("index").cast<int>()};
    const bool contiguous = is_contiguous_(x).ptr() == Py_True;
    return {reinterpret_cast<void*>(data_ptr_(x).cast<uintptr_t>()), Type(type),
            contiguous ? numel_(x).cast<int64_t>() : -1, device};
  }

  const DLPackExchangeAPI* api_ = nullptr;
  py::object is_neg_, data_ptr_, is_contiguous_, numel_;
  py::tuple types_;
  py::str dtype_{"dtype"}, is_cpu_{"is_cpu"};
};

enum class Use { READ, WRITE };

inline std::string words(Type type, int64_t size, Device device) {
  const std::string where = device.kind == Device::CPU    ? "the CPU"
                            : device.kind == Device::CUDA ? "GPU " + std::to_string(device.index)
                                                          : "another device";
  return (size < 0 ? "a tensor with gaps" : std::to_string(size) + " numbers") + " of " + name_of(type) + " on " +
         where;
}

inline void* checked(const char* name, const py::object& x, Type type, int64_t size, Device device, Use use) {
  const Torch& torch = Torch::get();
  Memory found;
  bool plain = true;
  try {
    found = torch.memory_of(x);
    // What is written was made for it; what is read may come from anywhere.
    plain = (found.start != nullptr || size == 0) && (use == Use::WRITE || !torch.is_neg(x));
  } catch (const std::exception&) {
    plain = false;
  }
  if (!plain)
    throw py::value_error(std::string(name) + " must have plain memory of its own, which this " +
                          Py_TYPE(x.ptr())->tp_name + " has not; call .clone() or unwrap it");
  if (found.type != type || found.size != size || found.device.kind != device.kind ||
      found.device.index != device.index)
    throw py::value_error(std::string(name) + " must be " + words(type, size, device) + ", not " +
                          words(found.type, found.size, found.device));
  return found.start;
}

}  // namespace tensor

// The tensors of one call, on the CPU. Sizes are in numbers; `_or_null`: may be None.
class Tensors {
 public:
  template <class T = float>
  const T* read(const char* name, const py::object& x, int64_t size) const {
    return static_cast<const T*>(checked(name, x, tensor::type_of<T>(), size, tensor::Use::READ));
  }
  const void* read(DType dtype, const char* name, const py::object& x, int64_t size) const {
    return checked(name, x, tensor::type_of(dtype), size, tensor::Use::READ);
  }
  template <class T = float>
  T* write(const char* name, const py::object& x, int64_t size) const {
    return static_cast<T*>(checked(name, x, tensor::type_of<T>(), size, tensor::Use::WRITE));
  }
  void* write(DType dtype, const char* name, const py::object& x, int64_t size) const {
    return checked(name, x, tensor::type_of(dtype), size, tensor::Use::WRITE);
  }
  template <class T = float>
  const T* read_or_null(const char* name, const py::object& x, int64_t size) const {
    return x.is_none() ? nullptr : read<T>(name, x, size);
  }
  const void* read_or_null(DType dtype, const char* name, const py::object& x, int64_t size) const {
    return x.is_none() ? nullptr : read(dtype, name, x, size);
  }
  template <class T = float>
  T* write_or_null(const char* name, const py::object& x, int64_t size) const {
    return x.is_none() ? nullptr : write<T>(name, x, size);
  }
  void* write_or_null(DType dtype, const char* name, const py::object& x, int64_t size) const {
    return x.is_none() ? nullptr : write(dtype, name, x, size);
  }

 private:
  void* checked(const char* name, const py::object& x, tensor::Type type, int64_t size, tensor::Use use) const {
    return tensor::checked(name, x, type, size, tensor::ON_CPU, use);
  }
};

}  // namespace sslkern
