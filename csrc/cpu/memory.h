// Work arrays of the kernels.
#pragma once

#include <cstddef>

namespace sslkern {

void* allocate(size_t bytes);  // on a 64-byte boundary; throws std::bad_alloc
void release(void* p, size_t bytes);

// Uninitialised memory that ends with its scope.
template <class T>
class Array {
 public:
  __attribute__((always_inline)) explicit Array(size_t count)
      : data_(static_cast<T*>(allocate(count * sizeof(T)))), bytes_(count * sizeof(T)) {}
  __attribute__((always_inline)) ~Array() { release(data_, bytes_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  __attribute__((always_inline)) operator T*() const { return data_; }

 private:
  T* data_;
  size_t bytes_;
};

}  // namespace sslkern
