// What the words of a TensorMap hold here: the driver's cuTensorMapEncodeTiled writes them, copies of boxes read them.
#pragma once

#include <cstdint>

namespace sslkern::cuda::emulation {

struct EncodedMap {
  static constexpr uint64_t MAGIC = 0x70616d2d726f736e;  // of a map that was encoded

  uint64_t magic;
  uint8_t* base;
  uint64_t sizes[2];     // in numbers, the inner one first; a tensor of rank 1 has one row
  uint64_t row_bytes;    // from a row to the next; unused for rank 1
  uint32_t box[2];       // in numbers, the inner one first; 1 row for rank 1
  int32_t rank;          // 1 or 2
  int32_t number_bytes;  // 1, 2, 4 or 8
  int32_t swizzle;       // 128 or 0
  int32_t data_type;     // CUtensorMapDataType, for those who ask
};
static_assert(sizeof(EncodedMap) <= 128);

}  // namespace sslkern::cuda::emulation
