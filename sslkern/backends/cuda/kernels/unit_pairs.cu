// Pairs of rows on their way into a loss and back: x and y stacked, divided by their norms, rounded, and dotted in one
// sweep.
// Floor: forward, x and y read and z written once; backward, z, da and db read and dx and dy written once.
#include "rows.h"

namespace sslkern::cuda {

template <class T>
__global__ void __launch_bounds__(THREADS, 3)
    pair_forward(Teams teams, int64_t n, const T* x, const T* y, T* z, float* norm, float* cosine) {
  constexpr int V = WIDTH<T>;
  each_row(teams, n, [&](int64_t i, bool here) {
    const T *const from_a = x + i * teams.d, *const from_b = y + i * teams.d;
    T *const to_a = z + i * teams.d, *const to_b = z + (n + i) * teams.d;
    const int rounds = teams.rounds();
    Row<T, V> a, b;
    float norm_a = 1.f, norm_b = 1.f;
    if (norm != nullptr) {
      for (int round = 0; round < rounds; ++round) {
        if (round == 0) norm_a = norm_b = 0.f;
        a.load(teams, from_a, round);
        b.load(teams, from_b, round);
        norm_a += dot(a, a);
        norm_b += dot(b, b);
      }
      norm_a = length(teams.sum(norm_a));
      norm_b = length(teams.sum(norm_b));
      if constexpr (SAME<T, fp16>) {  // rows of zeros: divided by EPS, their gradients would be infinite
        if (norm_a <= EPS) norm_a = INFINITY;
        if (norm_b <= EPS) norm_b = INFINITY;
      }
    }
    float along = 0.f;
    for (int round = 0; round < rounds; ++round) {
      if (norm == nullptr || rounds > 1) {
        a.load(teams, from_a, round);
        b.load(teams, from_b, round);
      }
      if (norm != nullptr) {
        a.divide(norm_a);
        b.divide(norm_b);
      }
      if (here) {
        a.store(teams, to_a, round);
        b.store(teams, to_b, round);
      }
      along += dot(a, b);
    }
    along = teams.sum(along);
    if (!here || teams.lane() != 0) return;
    cosine[i] = along;
    if (norm == nullptr) return;
    norm[i] = norm_a;
    norm[n + i] = norm_b;
  });
}

// Through u = x / |x|: dx = (du - u <u, du>) / |x|, where du also takes the pull of the positive, -pull other.
template <class T>
__global__ void __launch_bounds__(THREADS, 3)
    pair_backward(Teams teams, int64_t n, const T* z, const float* norm, const float* pull, const float* da,
                  const float* db, T* dx, T* dy) {
  constexpr int V = WIDTH<float>;
  each_row(teams, n, [&](int64_t i, bool here) {
    const T *const unit_a = z + i * teams.d, *const unit_b = z + (n + i) * teams.d;
    const float weight = pull[i];
    const int rounds = teams.rounds();
    Row<T, V> a, b;
    Row<float, V> to_a, to_b;
    const auto load = [&](int round) {
      a.load(teams, unit_a, round);
      b.load(teams, unit_b, round);
      if (dx != nullptr) to_a.load(teams, da + i * teams.d, round);
      if (dy != nullptr) to_b.load(teams, db + i * teams.d, round);
#pragma unroll
      for (int c = 0; c < a.NUMBERS; ++c) {
        if (dx != nullptr) to_a.set(c, to_a[c] - weight * b[c]);
        if (dy != nullptr) to_b.set(c, to_b[c] - weight * a[c]);
      }
    };
    float along_a = 0.f, along_b = 0.f, inverse_a = 1.f, inverse_b = 1.f;
    if (norm != nullptr) {
      for (int round = 0; round < rounds; ++round) {
        load(round);
        if (dx != nullptr) along_a += dot(to_a, a);
        if (dy != nullptr) along_b += dot(to_b, b);
      }
      along_a = teams.sum(along_a);
      along_b = teams.sum(along_b);
      inverse_a = 1.f / norm[i];
      inverse_b = 1.f / norm[n + i];
    }
    if (!here) return;
    const auto store = [&](const Row<float, V>& to, const Row<T, V>& unit, float along, float inverse, T* grad,
                           int round) {
      Row<T, V> rounded;
#pragma unroll
      for (int c = 0; c < rounded.NUMBERS; ++c) rounded.set(c, (to[c] - along * unit[c]) * inverse);
      rounded.store(teams, grad + i * teams.d, round);
    };
    for (int round = 0; round < rounds; ++round) {
      if (norm == nullptr || rounds > 1) load(round);
      if (dx != nullptr) store(to_a, a, along_a, inverse_a, dx, round);
      if (dy != nullptr) store(to_b, b, along_b, inverse_b, dy, round);
    }
  });
}

}  // namespace sslkern::cuda
