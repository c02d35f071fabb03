// The order of the tiles (cpu/kernels/tiles.h): each tile is visited once, for odd sizes and any number of threads, no
// two at a time share a block, and each block meets the others in the order that docs/design.md draws.
#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#define SSLKERN_ISA for_tests
#include "cpu/kernels/tiles.h"
#include "results.h"

using namespace sslkern;
using namespace sslkern::for_tests;

namespace {

std::string uncovered(const Blocks& blocks) {
  int64_t end = 0;
  for (int64_t b = 0; b < blocks.count; ++b) {
    if (blocks.begin(b) != end || blocks.width(b) < 1 || blocks.width(b) > BLOCK) return "a block is out of place";
    end += blocks.width(b);
  }
  return end == blocks.length ? "" : "the blocks do not cover their side";
}

// Follows the visits of one run. Nothing but each_tile keeps threads apart here: ThreadSanitizer sees where it does
// not.
struct Visits {
  const Blocks &rows, &columns;
  const bool triangle;
  std::vector<std::vector<int64_t>> met_by_row,
      met_by_column;  // the other blocks, in order; of a triangle the first has all
  std::vector<int> visited;
  std::vector<std::atomic<bool>> busy;
  std::atomic<bool> outside{false}, together{false};

  Visits(const Blocks& rows, const Blocks& columns, bool triangle)
      : rows(rows),
        columns(columns),
        triangle(triangle),
        met_by_row(rows.count),
        met_by_column(columns.count),
        visited(rows.count * columns.count),
        busy(rows.count + columns.count) {}

  void visit(const Tile& tile) {
    const int64_t x = tile.i0 / rows.size, y = tile.j0 / columns.size, other = triangle ? y : rows.count + y;
    if (tile.i0 != rows.begin(x) || tile.rows != rows.width(x) || tile.j0 != columns.begin(y) ||
        tile.columns != columns.width(y)) {
      outside = true;
      return;
    }
    if (busy[x].exchange(true) || (other != x && busy[other].exchange(true))) together = true;
    for (int64_t pause = (3 * x + 5 * y) % 4; pause > 0; --pause) std::this_thread::yield();
    ++visited[x * columns.count + y];
    met_by_row[x].push_back(y);
    if (other != x) (triangle ? met_by_row[y] : met_by_column[y]).push_back(x);
    busy[x] = false;
    busy[other] = false;
  }

  std::string problem() const {
    if (outside) return "a tile is not where its blocks are";
    if (together) return "two tiles of a block are visited at the same time";
    for (int64_t x = 0; x < rows.count; ++x)
      for (int64_t y = 0; y < columns.count; ++y) {
        const int wanted = triangle && y < x ? 0 : 1, times = visited[x * columns.count + y];
        if (times != wanted)
          return "tile " + std::to_string(x) + ", " + std::to_string(y) + " is visited " + std::to_string(times) +
                 " times";
      }
    return "";
  }

  // The turn in which two blocks meet.
  int64_t turn(int64_t x, int64_t y) const {
    const int64_t longest = std::max(rows.count, columns.count), side = longest < 12 ? 1 : 4;
    const int64_t squares = (longest + side - 1) / side;
    return (x / side + y / side) % squares * side + (x % side + y % side) % side;
  }

  std::string disorder() const {
    for (const auto* const met : {&met_by_row, &met_by_column})
      for (size_t x = 0; x < met->size(); ++x)
        for (size_t i = 1; i < (*met)[x].size(); ++i)
          if (turn(x, (*met)[x][i - 1]) >= turn(x, (*met)[x][i])) return "a block meets others in a wrong order";
    return "";
  }
};

void test_order(int64_t n, int64_t m, bool triangle, int threads) {
  const Blocks rows(n, triangle, m), columns(m, triangle, n);
  std::string problem = uncovered(rows) + uncovered(columns);

  Visits tiles(rows, columns, triangle);
  const Turns row_turns(rows.count), column_turns(columns.count);
  parallel(threads, [&](Team& team) {
    each_tile(team, rows, columns, row_turns.next, triangle ? row_turns.next : column_turns.next,
              [&](const Tile& tile) { tiles.visit(tile); });
  });
  if (problem.empty()) problem = tiles.problem();
  if (problem.empty()) problem = tiles.disorder();
  const std::string sizes = std::to_string(n) + " x " + std::to_string(m) + (triangle ? ", triangle" : "") + ", " +
                            std::to_string(threads) + " threads";
  count_result("each_tile of " + sizes, problem);
  if (triangle) return;

  const Runs runs(rows, columns);
  std::vector<std::atomic<int>> visited(rows.count * columns.count);
  std::atomic<bool> wrong_run{false};
  parallel(threads, [&](Team& team) {
    each_run(team, rows, columns, runs, [&](int64_t split, const Tile& tile) {
      const int64_t x = tile.i0 / rows.size, y = tile.j0 / columns.size;
      ++visited[x * columns.count + y];
      if (split != y / runs.per_split || tile.i0 + tile.rows > n || tile.j0 + tile.columns > m) wrong_run = true;
    });
  });
  const bool once = std::all_of(visited.begin(), visited.end(), [](const auto& times) { return times == 1; });
  count_result("each_run of " + sizes, !once       ? "a tile is not visited once"
                                       : wrong_run ? "a tile is in a wrong run"
                                                   : "");
}

}  // namespace

void test_tiles() {
  const int64_t sizes[] = {0,   1,    17,   97,  193,
                           577, 1000, 2305, 3001};  // up to 16 blocks: with squares, the last not full
  for (const int threads : {1, 2, 3, 5})
    for (const int64_t n : sizes) {
      for (const int64_t m : sizes) test_order(n, m, false, threads);
      test_order(n, n, true, threads);
    }
}
