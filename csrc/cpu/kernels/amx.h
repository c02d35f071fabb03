// Products of bf16 on the tile registers of AMX: 2 x 2 accumulators of 16 x 16 floats. The rows of a tile of A are 16
// words, and 16 steps of half a panel of B are a tile of B as they lie.
#pragma once

#include "gemm.h"

namespace sslkern {
namespace SSLKERN_ISA {

#ifdef SSLKERN_EMULATE_AMX  // plain C++ in place of the instructions, for tests on machines without them

struct EmulatedTiles {
  bool configured = false;
  Word at[8][16][16];
};
inline thread_local EmulatedTiles tiles;

inline auto& tile(int t) {
  if (!tiles.configured) __builtin_trap();
  return tiles.at[t];
}
inline void tile_configure(const void*) { tiles.configured = true; }
inline void tile_release() { tiles.configured = false; }
inline void tile_zero(int t) { memset(tile(t), 0, sizeof tile(t)); }
inline void tile_load(int t, const void* from, int64_t row_bytes) {
  for (int i = 0; i < 16; ++i) memcpy(tile(t)[i], static_cast<const char*>(from) + i * row_bytes, 64);
}
inline void tile_store(int t, void* to, int64_t row_bytes) {
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * row_bytes, tile(t)[i], 64);
}
inline void tile_dot(int c, int a, int b) {
  const auto& left = tile(a);
  const auto& right = tile(b);
  auto& out = tile(c);
  float even[16][16], odd[16][16];
  for (int p = 0; p < 16; ++p)
    for (int j = 0; j < 16; ++j) {
      even[p][j] = to_float(bf16{uint16_t(right[p][j])});
      odd[p][j] = to_float(bf16{uint16_t(right[p][j] >> 16)});
    }
  for (int i = 0; i < 16; ++i) {
    float sums[16];
    memcpy(sums, out[i], sizeof sums);
    for (int p = 0; p < 16; ++p) {
      const float first = to_float(bf16{uint16_t(left[i][p])}), second = to_float(bf16{uint16_t(left[i][p] >> 16)});
      for (int j = 0; j < 16; ++j) {
        sums[j] += first * even[p][j];
        sums[j] += second * odd[p][j];
      }
    }
    memcpy(out[i], sums, sizeof sums);
  }
}

#else  // macros, because GCC makes the name of a register from the text of its number

#define tile_configure _tile_loadconfig
#define tile_release _tile_release
#define tile_zero _tile_zero
#define tile_load _tile_loadd
#define tile_store _tile_stored
#define tile_dot _tile_dpbf16ps

#endif

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) static constexpr TileShapes TILE_SHAPES;

struct Bf16Tiles {
  static constexpr int PER_WORD = 2, STEP = 16, ROWS = 32;
  struct OnThread {
    OnThread() { tile_configure(&TILE_SHAPES); }
    ~OnThread() { tile_release(); }
  };
};
static_assert(NR == 32, "a panel of B is as wide as two tiles");

// ROWS x NR of C.
inline void tile_product(const Word* a, int64_t a_row, const Word* b, int64_t k, float* c, int64_t c_row,
                         bool accumulate) {
  float* const lower = c + 16 * c_row;
  asm volatile("" ::: "memory");  // GCC does not know that tile loads read what was stored before
  if (accumulate) {
    tile_load(0, c, c_row * 4);
    tile_load(1, c + 16, c_row * 4);
    tile_load(2, lower, c_row * 4);
    tile_load(3, lower + 16, c_row * 4);
  } else {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
  }
  for (int64_t p = 0; p < k; p += Bf16Tiles::STEP) {
    tile_load(6, b + p * NR, NR * 4);
    tile_load(4, a + p, a_row * 4);
    tile_dot(0, 4, 6);
    tile_load(7, b + p * NR + 16, NR * 4);
    tile_dot(1, 4, 7);
    tile_load(5, a + 16 * a_row + p, a_row * 4);
    tile_dot(2, 5, 6);
    tile_dot(3, 5, 7);
  }
  tile_store(0, c, c_row * 4);
  tile_store(1, c + 16, c_row * 4);
  tile_store(2, lower, c_row * 4);
  tile_store(3, lower + 16, c_row * 4);
}

template <>
inline void gemm<Bf16Tiles>(const Word* a, int64_t a_row, int64_t, const Word* b, int64_t m, int64_t n, int64_t k,
                            float* c, int64_t c_row, bool accumulate) {
  constexpr int ROWS = Bf16Tiles::ROWS;
  for (int64_t j = 0; j < n; j += NR, b += k * NR) {
    const int64_t columns = n - j < NR ? n - j : NR;
    for (int64_t i = 0; i < m; i += ROWS) {
      const int64_t rows = m - i < ROWS ? m - i : ROWS;
      float* const to = c + i * c_row + j;
      if (rows == ROWS && columns == NR) {
        tile_product(a + i * a_row, a_row, b, k, to, c_row, accumulate);
        continue;
      }
      alignas(64) float whole[ROWS * NR] = {};
      if (accumulate)
        for (int64_t r = 0; r < rows; ++r) memcpy(whole + r * NR, to + r * c_row, columns * 4);
      tile_product(a + i * a_row, a_row, b, k, whole, NR, accumulate);
      for (int64_t r = 0; r < rows; ++r) memcpy(to + r * c_row, whole + r * NR, columns * 4);
    }
  }
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
