// The two sides of the weights of the backward of `similarity_lse`,
//
//     w_ij = g_i 2^(s_ij - r_i) + h_j 2^(s_ij - c_j)
//
// with r_i and c_j the log-sum-exps of row i and of column j in base 2, and g_i and h_j what arrived for them.
#pragma once

#include "similarity.h"

namespace sslkern::cuda {

// How weights are computed. With the middle of the c_j of a tile as its shift m, one exponential serves both terms,
//
//     w_ij = (g_i 2^(m - r_i) + h_j 2^(m - c_j)) 2^(s_ij - m),
//
// where the c_j lie within SPREAD and m - r_i < ABOVE for all rows: a sum of exponentials is not below one of them, so
// that s_ij <= r_i and s_ij <= c_j. No factor overflows: 2^(s_ij - m) <= 2^(SPREAD / 2), the others are below 2^ABOVE.
// A factor vanishes below 2^-126, and what is lost with it is below 2^-50 of g_i or h_j, which no sum in fp32 can tell
// from 0: with 2^(s_ij - m) less than 2^(ABOVE - 126) g_i and 2^(SPREAD / 2 - 126) h_j; with 2^(m - r_i) less than
// 2^(SPREAD / 2 - 126) g_i. Rows alone have a shift of their own, r_i. Other tiles, and all of a problem with a bias,
// take two exponentials.
//
// A row or column with nothing left has weight 0, whatever arrived for it: its log-sum-exp is taken for +inf.

constexpr float SPREAD = 100.f;
constexpr float ABOVE = 76.f;
constexpr int PAST = 4;  // numbers that follow those of a tile's columns, so that they end on 16 bytes

SSLKERN_DEVICE float base_2(float lse) { return lse == -INFINITY ? INFINITY : LOG2_E * lse; }
SSLKERN_DEVICE float arrived(float grad, float lse, float fold) { return lse == -INFINITY ? 0.f : grad * fold; }
SSLKERN_DEVICE float fold_of(const float* fold) { return fold == nullptr ? 1.f : fold[0]; }
SSLKERN_DEVICE float unfold_of(const float* fold) { return fold == nullptr ? 1.f : fold[1]; }

}  // namespace sslkern::cuda
