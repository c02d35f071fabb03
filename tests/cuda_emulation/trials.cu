// A small kernel that uses all that hopper.h has, for tests/test_hopper_emulation.py: the emulated machine must run it
// right, and see each mistake that it is asked to make.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "hopper.h"
#include "tensor_map.h"

namespace sslkern::cuda {
namespace {

constexpr int D = 128, ROWS = 128, STAGES = 2;  // ROWS of x and out a block, of y a stage
constexpr int PANEL = ROWS * 128;               // bytes: 64 numbers a row
constexpr int VECTOR = ROWS * 4;
constexpr int OUT_WARP = 16 * 128;  // bytes

struct Places {
  uint32_t x, y, bias, out, barriers, end;
  Places(uint32_t from) : x(from) {
    y = x + 2 * PANEL;
    out = y + STAGES * 2 * PANEL;
    bias = out + 8 * OUT_WARP;
    barriers = bias + STAGES * VECTOR;
    end = barriers + 8 * (1 + 2 * STAGES);
  }
};

// out = round(x y^T + bias) y, in blocks of ROWS rows of x and out, D numbers a row. With a cluster each block loads
// one panel of y for both. Warpgroup 0 loads, 1 and 2 have 64 rows each.
template <class T>
__global__ void __launch_bounds__(384, 1)
    twice(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
          const __grid_constant__ TensorMap bias, const __grid_constant__ TensorMap out, int tiles, int cluster) {
  const Places at(dynamic_shared());
  const uint32_t x_full = at.barriers, full = x_full + 8, empty = full + 8 * STAGES;
  const int group = warp_id() / 4;
  const int rank = cluster_rank();
  if (thread_id() == 0) {
    barrier_init(x_full, 1);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2 * cluster);
    }
    publish_barriers();
  }
  sync_cluster();
  if (group == 0) {
    registers_down<40>();
    if (thread_id() == 0) {
      prefetch_map(x);
      barrier_expect(x_full, 2 * PANEL);
      for (int p = 0; p < 2; ++p) load_box(at.x + p * PANEL, x, x_full, 64 * p, int(block_id()) * ROWS);
      for (int t = 0; t < tiles; ++t) {
        const int s = t % STAGES;
        barrier_wait(empty + 8 * s, (t / STAGES & 1) ^ 1);
        barrier_expect(full + 8 * s, 2 * PANEL + VECTOR);
        load_vector(at.bias + s * VECTOR, bias, full + 8 * s, t * ROWS);
        const uint32_t to = at.y + s * 2 * PANEL;
        if (cluster == 1) {
          for (int p = 0; p < 2; ++p) load_box(to + p * PANEL, y, full + 8 * s, 64 * p, t * ROWS);
        } else {
          load_box_for(3, to + rank * PANEL, y, full + 8 * s, 64 * rank, t * ROWS);
        }
      }
    }
  } else {
    registers_up<232>();
    float sums[64], scores[64];
    uint32_t weights[32];
    const uint32_t x_rows = opaque(rows_at(at.x + (group - 1) * 64 * 128));
    for (float& sum : sums) sum = 0.f;
    barrier_wait(x_full, 0);
    for (int t = 0; t < tiles; ++t) {
      const int s = t % STAGES;
      const uint32_t tile = at.y + s * 2 * PANEL;
      barrier_wait(full + 8 * s, t / STAGES & 1);
      const uint32_t y_rows = opaque(rows_at(tile)), y_columns = opaque(columns_at(tile, PANEL));
      wgmma_fence();
      for (int k = 0; k < D / 16; ++k) {
        const uint32_t offset = k / 4 * (PANEL >> 4) + k % 4 * 2;
        wgmma<T>(scores, descriptor(x_rows + offset), descriptor(y_rows + offset), k != 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(scores);
      for (int j = 0; j < 16; ++j) {
        float b0, b1;
        load_shared(at.bias + s * VECTOR + (8 * j + 2 * (lane_id() % 4)) * 4, b0, b1);
        for (int i = 0; i < 2; ++i)
          weights[2 * j + i] = packed<T>(scores[4 * j + 2 * i] + b0, scores[4 * j + 2 * i + 1] + b1);
      }
      wgmma_fence();
      for (int k = 0; k < ROWS / 16; ++k) {
        uint32_t* const a = weights + 4 * k;
        wgmma<T>(sums, a[0], a[1], a[2], a[3], descriptor(y_columns + k * (2048 >> 4)));
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(sums);
      pin(weights);
      if (thread_id() % WARPGROUP == 0)
        for (int r = 0; r < cluster; ++r) barrier_arrive_at(empty + 8 * s, r);
    }
    const int warp = warp_id() - 4, lane = lane_id();
    const uint32_t mine = at.out + warp * OUT_WARP;
    for (int p = 0; p < 2; ++p) {
      const int row = lane % 16;
      for (int c = 0; c < 4; ++c) {
        const float* d = sums + 32 * p + 8 * c;
        const uint32_t to = mine + row * 128 + (((2 * c + lane / 16) ^ (row % 8)) << 4);
        store_matrices(to, packed<T>(d[0], d[1]), packed<T>(d[2], d[3]), packed<T>(d[4], d[5]), packed<T>(d[6], d[7]));
      }
      publish_shared();
      sync_warp();
      if (lane == 0) {
        store_box(out, mine, 64 * p, int(block_id()) * ROWS + warp * 16);
        commit_stores();
        wait_stores_read<0>();
      }
      sync_warp();
    }
  }
  sync_cluster();
}

template <class T>
TensorMap map(std::vector<T>& of, int64_t columns, int64_t stride, int64_t rows, int box_rows) {
  emulation::EncodedMap map{};
  const bool matrix = rows > 0;
  map.magic = emulation::EncodedMap::MAGIC;
  map.base = reinterpret_cast<uint8_t*>(of.data());
  map.sizes[0] = columns;
  map.sizes[1] = matrix ? rows : 1;
  map.row_bytes = stride * sizeof(T);
  map.box[0] = matrix ? 64 : box_rows;
  map.box[1] = matrix ? box_rows : 1;
  map.rank = matrix ? 2 : 1;
  map.number_bytes = sizeof(T);
  map.swizzle = matrix ? 128 : 0;
  TensorMap words{};
  memcpy(&words, &map, sizeof map);
  return words;
}

// How many numbers of `out` are wrong.
template <class T>
int run(int n, int m, int d, int cluster) {
  const int stride = (d + 7) / 8 * 8;
  const auto drawn = [](int i) { return float((i * 2654435761u >> 13) % 3) - 1.f; };
  std::vector<T> x(n * stride), y(m * stride), out(n * stride, from_float<T>(7.f));
  std::vector<float> bias(m);
  for (int i = 0; i < n * stride; ++i) x[i] = from_float<T>(drawn(i));
  for (int i = 0; i < m * stride; ++i) y[i] = from_float<T>(drawn(i + 12345));
  for (int j = 0; j < m; ++j) bias[j] = drawn(j + 999);
  const TensorMap maps[] = {map(x, d, stride, n, ROWS), map(y, d, stride, m, ROWS), map(bias, m, 0, 0, ROWS),
                            map(out, d, stride, n, 16)};
  const int blocks = (n + ROWS * cluster - 1) / (ROWS * cluster) * cluster;
  emulation::run({blocks, 384, int(Places(0).end) + GROUP_BYTES - 16, cluster},
                 [&] { twice<T>(maps[0], maps[1], maps[2], maps[3], (m + ROWS - 1) / ROWS, cluster); });
  int wrong = 0;
  for (int i = 0; i < n; ++i) {
    std::vector<float> sums(d, 0.f);
    for (int j = 0; j < m; ++j) {
      float score = bias[j];
      for (int k = 0; k < d; ++k) score += to_float(x[i * stride + k]) * to_float(y[j * stride + k]);
      for (int k = 0; k < d; ++k) sums[k] += score * to_float(y[j * stride + k]);
    }
    for (int k = 0; k < stride; ++k) wrong += out[i * stride + k].bits != from_float<T>(k < d ? sums[k] : 7.f).bits;
  }
  return wrong;
}

}  // namespace
}  // namespace sslkern::cuda

extern "C" __attribute__((visibility("default"))) int trial(int half, int n, int m, int d, int cluster, uint64_t seed) {
  using namespace sslkern::cuda;
  emulation::seed(seed);
  return half ? run<fp16>(n, m, d, cluster) : run<bf16>(n, m, d, cluster);
}
