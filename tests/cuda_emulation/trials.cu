// A small kernel that uses all that hopper.h has, for tests/test_hopper_emulation.py: the emulated machine must run it
// right, and see each mistake that it is asked to make.
#include <exception>
#include <string>
#include <vector>

#include "hopper.h"
#include "tensor_map.h"

namespace sslkern::cuda {
namespace {

constexpr int ROWS = 128, STAGES = 2;  // ROWS of x and out a block

std::string wanted;  // the mistake
bool mistake(const char* name) { return wanted == name; }

// D numbers a row, Y rows of y a stage.
template <int D, int Y>
struct Places {
  static constexpr int X_PANEL = ROWS * 128, Y_PANEL = Y * 128, OUT_WARP = 16 * 128;  // bytes: 64 numbers a row
  static constexpr int PANELS = D / 64, VECTOR = Y * 4;

  uint32_t x, y, out, bias, barriers, end;
  Places(uint32_t from) : x(from) {
    y = x + PANELS * X_PANEL;
    out = y + STAGES * PANELS * Y_PANEL;
    bias = out + 8 * OUT_WARP;
    barriers = bias + STAGES * VECTOR;
    end = barriers + 8 * (2 + 2 * STAGES);
  }
};

// out = round(x y^T + bias) y, in blocks of ROWS rows of x and out. In a cluster of two each block loads every other
// panel of y for both. Warpgroup 0 loads, 1 and 2 have 64 rows each.
template <class T, int D, int Y>
__global__ void __launch_bounds__(384, 1)
    twice(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
          const __grid_constant__ TensorMap bias, const __grid_constant__ TensorMap out, int tiles, int cluster) {
  using P = Places<D, Y>;
  const P at(dynamic_shared());
  const uint32_t x_full = at.barriers, spare = x_full + 8, full = spare + 8, empty = full + 8 * STAGES;
  const int group = warp_id() / 4;
  const int rank = cluster_rank();
  if (thread_id() == 0) {
    barrier_init(x_full + (mistake("a barrier at an odd place") ? 4 : 0), 1);
    if (mistake("a barrier made twice")) barrier_init(x_full, 1);
    if (!mistake("a barrier that nobody made")) barrier_init(spare, 1);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, (mistake("a warp that does not release") ? 7 : 8) * cluster);
    }
    if (!mistake("barriers not published")) publish_barriers();
    if (mistake("a phase missed")) {
      barrier_arrive(spare);
      barrier_arrive(spare);
    }
  }
  sync_cluster();
  if (mistake("a phase missed") || mistake("a phase that does not come") || mistake("a barrier that nobody made"))
    barrier_wait(spare, 0);
  if (mistake("a parity of 2")) barrier_wait(spare, 2);
  if (mistake("sync_block without some") && group == 0) sync_block();
  if (mistake("an end without the other block") && rank == 1) return;
  if (group == 0) {
    if (!mistake("registers not given")) registers_down<40>();
    if (thread_id() == 0) {
      TensorMap blank{};
      prefetch_map(mistake("a map that was not encoded") ? blank : x);
      barrier_expect(x_full, P::PANELS * P::X_PANEL + (mistake("bytes that do not come") ? 16 : 0));
      if (mistake("too many arrivals")) barrier_arrive(x_full);
      if (mistake("too many bytes")) barrier_expect(spare, 1 << 20);
      if (mistake("a vector as a box")) load_box(at.bias, bias, x_full, 0, 0);
      for (int p = 0; p < P::PANELS; ++p) {
        const uint32_t to = at.x + p * P::X_PANEL + (mistake("a box at an odd place") ? 128 : 0);
        load_box(mistake("a box outside of memory") ? to + 7 * 0x4000 : to, x, x_full, 64 * p, int(block_id()) * ROWS);
      }
      for (int t = 0; t < tiles; ++t) {
        const int s = t % STAGES;
        if (!mistake("loads that do not wait")) barrier_wait(empty + 8 * s, (t / STAGES & 1) ^ 1);
        barrier_expect(full + 8 * s, P::PANELS * P::Y_PANEL + P::VECTOR);
        load_vector(at.bias + s * P::VECTOR, bias, full + 8 * s, t * Y);
        for (int p = 0; p < P::PANELS; ++p) {
          const uint32_t to = at.y + (s * P::PANELS + p) * P::Y_PANEL;
          if (cluster == 1)
            load_box(to, y, full + 8 * s, 64 * p, t * Y);
          else if (p % cluster == rank)
            load_box_for(3, to, y, full + 8 * s, 64 * p, t * Y);
        }
      }
    }
  } else {
    if (mistake("more registers than given"))
      registers_up<240>();
    else
      registers_up<232>();
    const bool leave_rank = mistake("the rank left in rows"),
               leave_rank_of_columns = mistake("the rank left in columns");
    const auto rows = [=](uint32_t address) { return leave_rank ? address >> 4 | 1u << 16 : rows_at(address); };
    const auto columns = [=](uint32_t address) {
      return leave_rank_of_columns ? address >> 4 | P::Y_PANEL >> 4 << 16 : columns_at(address, P::Y_PANEL);
    };
    float sums[D / 2], scores[Y / 2];
    uint32_t weights[Y / 4];
    uint32_t x_rows = opaque(rows(at.x + (group - 1) * 64 * 128));
    if (mistake("a matrix outside of memory")) x_rows = rows(at.x + 3 * 0x10000);
    if (mistake("a matrix that begins within 8 rows")) x_rows += 128 >> 4;
    for (float& sum : sums) sum = 0.f;
    barrier_wait(x_full, mistake("the wrong parity") ? 1 : 0);
    for (int t = 0; t < tiles; ++t) {
      const int s = t % STAGES;
      const uint32_t tile = at.y + s * P::PANELS * P::Y_PANEL;
      const auto release = [&] {
        if (mistake("a warp that does not release") && warp_id() == 5) return;
        if (lane_id() < cluster) barrier_arrive_at(empty + 8 * s, lane_id());
      };
      if (!mistake("a product that does not wait for its copy")) barrier_wait(full + 8 * s, t / STAGES & 1);
      const uint32_t y_rows = opaque(rows(tile)), y_columns = opaque(columns(tile));
      if (!mistake("accumulators without wgmma_fence")) wgmma_fence();
      for (int k = 0; k < D / 16; ++k) {
        if (mistake("a product without some threads") && k == 1 && warp_id() == 5) continue;
        const uint32_t a = x_rows + k / 4 * (P::X_PANEL >> 4) + k % 4 * 2;
        const uint32_t b = y_rows + k / 4 * (P::Y_PANEL >> 4) + k % 4 * 2;
        wgmma<T>(scores, descriptor(a), descriptor(b), k != 0);
      }
      if (mistake("accumulators changed")) scores[5] = 1.f;
      if (mistake("a tile overwritten")) store_matrices(tile + lane_id() * 16, 0, 0, 0, 0);
      if (!mistake("no wgmma_commit")) wgmma_commit();
      if (!mistake("accumulators read too early")) wgmma_wait<0>();
      if (!mistake("accumulators not pinned")) pin(scores);
      for (int j = 0; j < Y / 8; ++j) {
        float b0, b1;
        uint32_t from = at.bias + s * P::VECTOR + (8 * j + 2 * (lane_id() % 4)) * 4;
        if (mistake("memory of the other block")) from ^= 1 << 24;
        if (mistake("a load at an odd place")) from += 4;
        load_shared(from, b0, b1);
        for (int i = 0; i < 2; ++i)
          weights[2 * j + i] = packed<T>(scores[4 * j + 2 * i] + b0, scores[4 * j + 2 * i + 1] + b1);
      }
      if (!mistake("a in registers without wgmma_fence")) wgmma_fence();
      for (int k = 0; k < Y / 16; ++k) {
        uint32_t* const a = weights + 4 * k;
        wgmma<T>(sums, a[0], a[1], a[2], a[3], descriptor(y_columns + k * (2048 >> 4)));
      }
      wgmma_commit();
      if (mistake("registers of a changed")) weights[3] ^= 1;
      if (mistake("a tile released too early")) release();
      wgmma_wait<0>();
      pin(sums);
      pin(weights);
      if (!mistake("a tile released too early")) release();
    }
    const int warp = warp_id() - 4, lane = lane_id();
    const uint32_t mine = at.out + warp * P::OUT_WARP;
    for (int p = 0; p < P::PANELS; ++p) {
      const int row = lane % 16;
      for (int c = 0; c < 4; ++c) {
        const float* d = sums + 32 * p + 8 * c;
        uint32_t to = mine + row * 128 + (((2 * c + lane / 16) ^ (row % 8)) << 4);
        if (mistake("a store at an odd place")) to += 8;
        if (mistake("a barrier overwritten")) to = at.barriers;
        store_matrices(to, packed<T>(d[0], d[1]), packed<T>(d[2], d[3]), packed<T>(d[4], d[5]), packed<T>(d[6], d[7]));
      }
      if (!mistake("no publish_shared")) publish_shared();
      if (!mistake("no sync_warp")) sync_warp();
      if (lane == 0) {
        uint32_t from = mine;
        if (mistake("a box of out at an odd place")) from += 128;
        if (mistake("a box of another warp")) from = at.out + (warp ^ 1) * P::OUT_WARP;
        store_box(out, from, 64 * p, int(block_id()) * ROWS + warp * 16);
        if (p + 1 < P::PANELS || !mistake("no commit_stores")) commit_stores();
        const bool forgets =
            p + 1 < P::PANELS ? mistake("an overwritten store") : mistake("an end before stores are read");
        if (!forgets) wait_stores_read<0>();
      }
      sync_warp();
    }
    if (mistake("an end with products under way")) {
      wgmma_fence();
      wgmma<T>(sums, descriptor(x_rows), descriptor(x_rows), true);
      wgmma_commit();
    }
  }
  if (!mistake("no sync_block")) sync_block();
  load_shared(at.out + thread_id() * 16);  // of another warp
  if (!mistake("no sync_cluster at the end")) sync_cluster();
  if (mistake("an end with copies under way") && thread_id() == 0) {
    barrier_expect(spare, P::VECTOR);
    load_vector(at.bias, bias, spare, 0);
  }
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
template <class T, int D, int Y>
int run(int n, int m, int d, int cluster) {
  const int stride = (d + 7) / 8 * 8;
  const auto drawn = [](int i) { return float((i * 2654435761u >> 13) % 3) - 1.f; };
  std::vector<T> x(n * stride), y(m * stride), out(n * stride, from_float<T>(7.f));
  std::vector<float> bias(m);
  for (int i = 0; i < n * stride; ++i) x[i] = from_float<T>(drawn(i));
  for (int i = 0; i < m * stride; ++i) y[i] = from_float<T>(drawn(i + 12345));
  for (int j = 0; j < m; ++j) bias[j] = drawn(j + 999);
  const TensorMap maps[] = {map(x, d, stride, n, ROWS), map(y, d, stride, m, Y), map(bias, m, 0, 0, Y),
                            map(out, d, stride, n, 16)};
  const int blocks = (n + ROWS * cluster - 1) / (ROWS * cluster) * cluster;
  const int bytes = int(Places<D, Y>(0).end) + (mistake("too little shared memory") ? 0 : GROUP_BYTES - 16);
  emulation::run({blocks, 384, bytes, cluster},
                 [&] { twice<T, D, Y>(maps[0], maps[1], maps[2], maps[3], (m + Y - 1) / Y, cluster); });
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

// d up to 128 for `half`, else up to 256. How many numbers are wrong; -1 and the sentence where the machine stopped the
// kernel.
extern "C" __attribute__((visibility("default"))) int trial(int half, int n, int m, int d, int cluster, uint32_t seed,
                                                            const char* mistake, char* sentence) {
  using namespace sslkern::cuda;
  emulation::seed(seed);
  wanted = mistake;
  try {
    if (half) return run<fp16, 128, 128>(n, m, d, cluster);
    return (d <= 64 ? run<bf16, 64, 256> : d <= 128 ? run<bf16, 128, 128> : run<bf16, 256, 64>)(n, m, d, cluster);
  } catch (const std::exception& error) {
    strcpy(sentence, error.what());
    return -1;
  }
}
