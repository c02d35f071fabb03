// How the threads of a block share rows of d numbers.
//
// A row is read in pieces of V neighbouring numbers, of which the wider type fills 16 bytes. Teams of threads take a
// row each: thread t of a team has the pieces t, t + team, t + 2 team, ... and reads PIECES of them at once, before it
// needs the first. So neighbours read neighbouring memory, several loads of each thread are on their way, and a short
// row takes a part of a warp, a long one a block. Where rows do not lie on whole pieces the same thread reads the same
// numbers one by one: the sums are the same bits.
#pragma once

#include "device.h"

namespace sslkern::cuda {

constexpr int PIECES = 2;
constexpr float EPS = 1e-12f;  // rows shorter than this are divided by it

// Numbers of a piece of rows of these types.
template <class A, class B = A>
constexpr int WIDTH = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// `teams` in launch.py makes one.
struct Teams {
  int64_t d;   // numbers of a row
  int pieces;  // of a row, fewer than 2^31 as are the numbers
  int size;    // threads of a team, a power of two
  bool whole;  // all pieces are whole and lie on multiples of their size

  __device__ int rounds() const { return (pieces + PIECES * size - 1) / (PIECES * size); }
  __device__ int count() const { return THREADS / size; }
  __device__ int id() const { return thread_id() / size; }
  __device__ int lane() const { return thread_id() & (size - 1); }

  // The sum of the x of a team's threads, in a fixed order. Of a team larger than a warp, the whole block calls it.
  __device__ float sum(float x) const {
    const int width = size < WARP ? size : WARP;
    for (int by = width / 2; by > 0; by /= 2) x += exchange(x, by, width);
    if (size <= WARP) return x;
    __shared__ float of_warp[THREADS / WARP];
    sync_block();  // the sums of the last call were read
    of_warp[thread_id() / WARP] = x;
    sync_block();
    float total = 0.f;
    for (int warp = id() * size / WARP; warp < (id() + 1) * size / WARP; ++warp) total += of_warp[warp];
    return total;
  }
};

// The length of a row whose squares have this sum, as a divisor; NaN stays NaN.
__device__ inline float length(float squares) {
  const float root = sqrtf(squares);
  return root < EPS ? EPS : root;
}

template <class T, int V>
struct alignas(V * sizeof(T)) Piece {
  T at[V];
};

// A thread's pieces of a row, PIECES at a time: a round. Pieces outside the row are 0.
template <class T, int V>
struct Row {
  static constexpr int NUMBERS = V * PIECES;
  using Vector = Piece<T, V>;
  Vector piece[PIECES];

  // Its place in the row: of piece p of a round.
  __device__ static int place(const Teams& teams, int round, int p) {
    return (round * PIECES + p) * teams.size + teams.lane();
  }

  __device__ void load(const Teams& teams, const T* row, int round) {
    if (teams.whole) {
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        const int at = place(teams, round, p);
        piece[p] = at < teams.pieces ? reinterpret_cast<const Vector*>(row)[at] : Vector{};
      }
    } else {
#pragma unroll
      for (int n = 0; n < NUMBERS; ++n) {
        const int64_t at = int64_t(place(teams, round, n / V)) * V + n % V;
        piece[n / V].at[n % V] = at < teams.d ? row[at] : T{};
      }
    }
  }

  __device__ void store(const Teams& teams, T* row, int round) const {
    if (teams.whole) {
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        const int at = place(teams, round, p);
        if (at < teams.pieces) reinterpret_cast<Vector*>(row)[at] = piece[p];
      }
    } else {
#pragma unroll
      for (int n = 0; n < NUMBERS; ++n) {
        const int64_t at = int64_t(place(teams, round, n / V)) * V + n % V;
        if (at < teams.d) row[at] = piece[n / V].at[n % V];
      }
    }
  }

  __device__ float operator[](int i) const { return to_float(piece[i / V].at[i % V]); }
  __device__ void set(int i, float x) { piece[i / V].at[i % V] = from_float<T>(x); }
  __device__ void divide(float norm) {
#pragma unroll
    for (int i = 0; i < NUMBERS; ++i) set(i, (*this)[i] / norm);
  }
};

// sum_i a_i b_i over a thread's numbers.
template <class A, class B>
__device__ float dot(const A& a, const B& b) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < A::NUMBERS; ++i) sum += a[i] * b[i];
  return sum;
}

// Calls body(i, here) for each row i of a team's share, in one of so many blocks. The threads of a block go together: a
// team that is past the end reads the last row once more, and `here` is false.
template <class Body>
__device__ void each_row(const Teams& teams, int64_t block, int64_t blocks, int64_t rows, const Body& body) {
  for (int64_t first = block * teams.count(); first < rows; first += blocks * teams.count()) {
    const int64_t i = first + teams.id();
    body(i < rows ? i : rows - 1, i < rows);
  }
}
template <class Body>
__device__ void each_row(const Teams& teams, int64_t rows, const Body& body) {
  each_row(teams, block_id(), block_count(), rows, body);
}

}  // namespace sslkern::cuda
