// Small matrix products between blocks that are packed in cache: C (m, n) (+)= A (m, k) B (k, n), accumulated in fp32.
//
// A word is 32 bits of the inner dimension: one float, or two neighbouring bf16 where the machine multiplies those in
// pairs. Everything is laid out in words, so that both kinds share the packing and the loops and differ in one
// instruction.
#pragma once

#include <utility>

#include "simd.h"

namespace sslkern {
namespace SSLKERN_ISA {

typedef uint32_t Word __attribute__((aligned(2), may_alias));  // two bf16 may begin between whole words

#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;  // 24 accumulators, 2 vectors of B and 1 of A in 32 registers
#else
constexpr int MR = 6, NV = 2;  // 12 + 2 + 1 in 16 registers
#endif
constexpr int NR = NV * LANES;  // B is packed in panels of NR columns: [n / NR][k][NR]

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The arithmetic of a product. F32 holds one number in a word, whatever the input's type was; Bf16Pairs holds two. k is
// a multiple of STEP words, rows of A can be read up to a multiple of ROWS, and a thread that calls gemm holds an
// OnThread.
struct F32 {
  static constexpr int PER_WORD = 1, STEP = 1, ROWS = 1;
  struct OnThread {};
  static inline Vec fma(Word a, Vec b, Vec c) {
    float x;
    memcpy(&x, &a, 4);
    return all(x) * b + c;
  }
};
#ifdef __AVX512BF16__
struct Bf16Pairs {
  static constexpr int PER_WORD = 2, STEP = 1, ROWS = 1;
  struct OnThread {};
  static inline Vec fma(Word a, Vec b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

// ROWS x NR of C in registers. A is read as a[i * a_row + p * a_step].
template <class Arithmetic, int ROWS>
inline void micro_kernel(const Word* a, int64_t a_row, int64_t a_step, const Word* b, int64_t k, float* c,
                         int64_t c_row, bool accumulate) {
  Vec acc[ROWS][NV];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
  for (int64_t p = 0; p < k; ++p, a += a_step, b += NR) {
    Vec bs[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) bs[j] = load(b + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[i][j] = Arithmetic::fma(a[i * a_row], bs[j], acc[i][j]);
  }
  // C is added in the end: sums of blocks of k round less than one long sum.
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * c_row + j * LANES;
      store(to, accumulate ? load(to) + acc[i][j] : acc[i][j]);
    }
}

template <class Arithmetic, int ROWS>
inline void micro_kernel_edge(const Word* a, int64_t a_row, int64_t a_step, const Word* b, int64_t k, float* c,
                              int64_t c_row, bool accumulate, int64_t columns) {
  alignas(64) float whole[ROWS * NR] = {};
  if (accumulate)
    for (int i = 0; i < ROWS; ++i) memcpy(whole + i * NR, c + i * c_row, columns * 4);
  micro_kernel<Arithmetic, ROWS>(a, a_row, a_step, b, k, whole, NR, accumulate);
  for (int i = 0; i < ROWS; ++i) memcpy(c + i * c_row, whole + i * NR, columns * 4);
}

// C = A B or C += A B; k counts words. A is (m, k) with rows a_row words apart and steps of k a_step words apart: (lda,
// 1) for a row-major A, (1, lda) for the transpose of one. Never writes beyond column n of C.
template <class Arithmetic>
void gemm(const Word* a, int64_t a_row, int64_t a_step, const Word* b, int64_t m, int64_t n, int64_t k, float* c,
          int64_t c_row, bool accumulate) {
  for (int64_t j = 0; j < n; j += NR, b += k * NR) {
    const int64_t columns = n - j < NR ? n - j : NR;
    int64_t i = 0;
    const auto strips = [&](auto rows) {
      constexpr int ROWS = decltype(rows)::value;
      for (; i + ROWS <= m; i += ROWS) {
        // C may lie far away: in memory, for gradients.
        for (int64_t next = i + ROWS; next < i + 2 * ROWS && next < m; ++next)
          for (int v = 0; v < NV; ++v) __builtin_prefetch(c + next * c_row + j + v * LANES, 1);
        if (columns == NR)
          micro_kernel<Arithmetic, ROWS>(a + i * a_row, a_row, a_step, b, k, c + i * c_row + j, c_row, accumulate);
        else
          micro_kernel_edge<Arithmetic, ROWS>(a + i * a_row, a_row, a_step, b, k, c + i * c_row + j, c_row, accumulate,
                                              columns);
      }
    };
    strips(std::integral_constant<int, MR>());
    strips(std::integral_constant<int, MR == 12 ? 4 : 2>());
    strips(std::integral_constant<int, 1>());
  }
}

// Packing. `count` is a number of features of a row-major source of type T, `words` how many words they fill, with the
// zeros that make the last step whole.

template <class Arithmetic>
constexpr int64_t words(int64_t count) {
  return round_up((count + Arithmetic::PER_WORD - 1) / Arithmetic::PER_WORD, Arithmetic::STEP);
}

// Not memcpy, which becomes `rep movs` here: its start costs more than these short rows.
inline void copy_words(const void* from, int64_t count, Word* to) {
  const Word* words = static_cast<const Word*>(from);
  int64_t p = 0;
  for (; p + LANES <= count; p += LANES) store(to + p, load(words + p));
  for (; p < count; ++p) memcpy(to + p, words + p, 4);
}

// Rows as they are: to[i][p], rows to_row words apart.
template <class Arithmetic, class T>
void pack_rows(const T* from, int64_t from_row, int64_t rows, int64_t count, Word* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) {
    if constexpr (Arithmetic::PER_WORD == 2) {
      copy_words(from, count / 2, to);
      if (count & 1) to[count / 2] = from[count - 1].bits;
      for (int64_t p = (count + 1) / 2; p < words<Arithmetic>(count); ++p) to[p] = 0;
    } else if constexpr (sizeof(T) == 4) {
      copy_words(from, count, to);
    } else {
      for (int64_t p = 0; p < count; ++p) {
        const float x = to_float(from[p]);
        memcpy(to + p, &x, 4);
      }
    }
  }
}

// Rows in words, row_words apart: the source itself where it is made of whole words and `in_place` allows, else packed
// into `to`.
template <class Arithmetic, class T>
const Word* as_words(const T* from, int64_t from_row, int64_t rows, int64_t count, bool in_place, Word* to,
                     int64_t& row_words) {
  if (in_place && sizeof(T) * Arithmetic::PER_WORD == sizeof(Word) && from_row % Arithmetic::PER_WORD == 0 &&
      count == words<Arithmetic>(count) * Arithmetic::PER_WORD) {
    row_words = from_row / Arithmetic::PER_WORD;
    return reinterpret_cast<const Word*>(from);
  }
  row_words = round_up(words<Arithmetic>(count), LANES) + LANES;
  pack_rows<Arithmetic>(from, from_row, rows, count, to, row_words);
  return to;
}

#if defined(__clang__) || __GNUC__ >= 12
// One step of the transpose of a LANES x LANES square: swaps the off-diagonal BY x BY blocks of two rows.
template <int BY, int... C>
inline void swap_blocks(IVec& upper, IVec& lower, std::integer_sequence<int, C...>) {
  const IVec a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, ((C & BY) ? LANES + C - BY : C)...);
  lower = __builtin_shufflevector(a, b, ((C & BY) ? LANES + C : C + BY)...);
}
template <int BY>
inline void transpose_steps(IVec* square) {
  if constexpr (BY < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (!(i & BY)) swap_blocks<BY>(square[i], square[i + BY], std::make_integer_sequence<int, LANES>());
    transpose_steps<BY * 2>(square);
  }
}
inline void transpose_square(const Word* from, int64_t from_row, Word* to, int64_t to_row) {
  IVec square[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) square[i] = load_int(from + i * from_row);
  transpose_steps<1>(square);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(to + i * to_row, (Vec)square[i]);
}
#else
inline void transpose_square(const Word* from, int64_t from_row, Word* to, int64_t to_row) {
  for (int i = 0; i < LANES; ++i)
    for (int p = 0; p < LANES; ++p) to[p * to_row + i] = from[i * from_row + p];
}
#endif

// The transpose of packed rows, as panels: rows of `from` become columns of B. Columns are padded with zeros to whole
// panels.
inline void pack_transposed(const Word* from, int64_t from_row, int64_t rows, int64_t k, Word* to) {
  for (int64_t j = 0; j < rows; j += LANES) {
    Word* panel = to + j / NR * NR * k + j % NR;
    const int64_t columns = rows - j < LANES ? rows - j : LANES;
    int64_t p = 0;
    if (columns == LANES)
      for (; p + LANES <= k; p += LANES) transpose_square(from + j * from_row + p, from_row, panel + p * NR, NR);
    for (; p < k; ++p)
      for (int64_t i = 0; i < LANES; ++i) panel[p * NR + i] = i < columns ? from[(j + i) * from_row + p] : 0;
  }
  for (int64_t j = round_up(rows, LANES); j < round_up(rows, NR); j += LANES)
    for (int64_t p = 0; p < k; ++p) memset(to + j / NR * NR * k + j % NR + p * NR, 0, LANES * 4);
}

// Rows of the source as steps of k: panels of NR features, padded with zeros.
template <class Arithmetic, class T>
void pack_panels(const T* from, int64_t from_row, int64_t rows, int64_t count, Word* to) {
  for (int64_t d = 0; d < count; d += NR) {
    const int64_t columns = count - d < NR ? count - d : NR;
    int64_t p = 0;
    for (; p < rows; p += Arithmetic::PER_WORD, to += NR) {
      const T* row = from + p * from_row + d;
      if constexpr (Arithmetic::PER_WORD == 2) {
        if (p + 1 < rows)
          for (int64_t j = 0; j < columns; ++j) to[j] = row[j].bits | Word(row[from_row + j].bits) << 16;
        else
          for (int64_t j = 0; j < columns; ++j) to[j] = row[j].bits;
      } else {
        pack_rows<Arithmetic>(row, from_row, 1, columns, to, NR);
      }
      for (int64_t j = columns; j < NR; ++j) to[j] = 0;
    }
    for (; p < words<Arithmetic>(rows) * Arithmetic::PER_WORD; p += Arithmetic::PER_WORD, to += NR)
      memset(to, 0, NR * 4);
  }
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
