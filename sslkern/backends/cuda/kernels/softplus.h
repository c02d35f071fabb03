// What kernels of `similarity_softplus` make of a score.
#pragma once

#include "similarity.h"

namespace sslkern::cuda {

// A sum of softplus(t) = log(1 + e^t), and each one's slope 1 / (1 + e^-t), by one exponential, one reciprocal and a
// logarithm for all of them together:
//
//     softplus(t) = max(t, 0) + log(1 + u)      u = e^-|t|
//
// Whatever t is, u lies between 0 and 1 and nothing overflows: unlike a sum of exponentials it needs no shift, hence no
// maximum. The logarithms add up to that of the product of all 1 + u, which is kept less 1: all that it is made of is
// positive, so that it keeps its digits however small the u are, of which 1 + u loses most.
struct Softplus {
  static constexpr int MOST = 120;  // so many factors of up to 2 are finite

  float above = 0.f, product = 0.f;

  // x = t log2(e). Returns the slope.
  SSLKERN_DEVICE float add(float x) {
    const float u = exp2_fast(-fabsf(x)), more = 1.f + u;
    float slope = reciprocal_fast(more);
    product = fmaf(product, more, u);
    if (x < 0.f)
      slope *= u;
    else
      above += x;
    return slope;
  }
  SSLKERN_DEVICE float sum() const { return fmaf(above, 1 / LOG2_E, log1pf(product)); }
};

// What a problem has beside its scores s_ij: t_ij = sign (s_ij + bias_i), and weights of rows.
struct Terms {
  const float *bias, *weights;  // bias[i step], weights[i]; or null: 0 and 1
  const float* fold;            // by which weights are multiplied on their way through fp16; or null: 1
  float sign;
  int step;  // 1, or 0: all rows have one bias

  SSLKERN_DEVICE float folded() const { return fold == nullptr ? 1.f : *fold; }
  SSLKERN_DEVICE float in_base_2(float bias) const { return sign * LOG2_E * bias; }
  SSLKERN_DEVICE float shift(int i) const { return bias == nullptr ? 0.f : in_base_2(bias[i * int64_t(step)]); }
  SSLKERN_DEVICE float weight(int i) const { return weights == nullptr ? 1.f : weights[i]; }
  // A score of -inf does not count, of which x is sign times as much. With sign 1 its softplus is 0 all the same.
  SSLKERN_DEVICE bool leaves_out(float x) const { return x * sign == -INFINITY; }
};

}  // namespace sslkern::cuda
