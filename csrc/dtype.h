// The types of features; the numbers are those of CODES in sslkern/backends.
#pragma once

namespace sslkern {

enum class DType : int { F32 = 0, BF16 = 1, FP16 = 2 };

}  // namespace sslkern
