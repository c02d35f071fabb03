// The sides of the weights w_ij = g_i exp(s_ij - r_i) + h_j exp(s_ij - c_j) of the backward of `similarity_lse`: r and
// g are the log-sum-exps of rows and their gradients, c and h those of columns.
#pragma once

#include "similarity.h"

namespace sslkern::cuda {

// Of a row or a column the log-sum-exp in base 2, and its gradient.
struct alignas(8) Term {
  float lse, grad;
};
// Where nothing is left, whatever gradient arrived, and where w lacks this side: the weight is 0.
SSLKERN_DEVICE Term no_term() { return {INFINITY, 0.f}; }

// Of some columns together the smallest log-sum-exp in base 2 (0 of none), and whether all are less than SPREAD above
// it.
struct alignas(8) Block {
  float low;
  uint32_t close;
};
constexpr float SPREAD = 64.f;

}  // namespace sslkern::cuda
