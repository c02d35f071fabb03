// similarity_topk on the CPU, for the instruction set SSLKERN_ISA.
//
// Each row has a list of candidates, scores that may still be among its n largest, in the order of their columns. A
// tile appends those above the row's threshold; when there is no room for more, the n largest stay and the lowest of
// them is the new threshold. Columns come in ascending order, so of equal scores those already there have the lower
// index and win: a score must be above the threshold, not equal to it. NaN never is.
#include "tiles.h"

namespace sslkern {
namespace SSLKERN_ISA {
namespace {

// Which lanes of a are greater than those of b, as bits.
inline uint32_t greater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX__)
  return uint32_t(_mm256_movemask_ps((__m256)(a > b)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps((__m128)(a > b)));
#else
  const IVec over = a > b;
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= uint32_t(over[lane] & 1) << lane;
  return bits;
#endif
}

// Floats as integers in the same order, and back.
inline int32_t ordered(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float unordered(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The scores of a row that may be among its n largest, in the order of their columns, in arrays of `room` numbers.
struct Candidates {
  float* value;
  int32_t* index;
  int64_t count, room;
  float threshold;
};

inline int64_t count_greater(const float* value, int64_t count, float than) {
  const Vec bound = all(than);
  IVec lanes = IVec{};
  int64_t i = 0, total = 0;
  for (; i + LANES <= count; i += LANES) lanes -= load(value + i) > bound;
  for (; i < count; ++i) total += value[i] > than;
  for (int lane = 0; lane < LANES; ++lane) total += lanes[lane];
  return total;
}

// Leaves the n largest of more candidates, in their order. The bound between them and the rest is found by bisection:
// exactly n candidates are above it, or fewer, and n or more with those that equal it.
void drop_rest(Candidates& x, int64_t n) {
  // Above low are n or more, above high fewer; some may equal the old threshold.
  int64_t low = int64_t(ordered(x.threshold)) - 1, high = ordered(INF), above = x.count;
  while (above != n && high - low > 1) {
    const int64_t middle = low + (high - low) / 2, count = count_greater(x.value, x.count, unordered(int32_t(middle)));
    if (count < n) {
      high = middle;
    } else {
      low = middle;
      above = count;
    }
  }
  const float bound = unordered(int32_t(above == n ? low : high));
  int64_t ties = n - (above == n ? n : count_greater(x.value, x.count, bound)), to = 0;
  for (int64_t i = 0; i < x.count; ++i) {
    const float value = x.value[i];
    const bool tie = value == bound && ties > 0;
    x.value[to] = value;
    x.index[to] = x.index[i];
    ties -= tie;
    to += value > bound || tie;
  }
  x.count = n;
  x.threshold = bound;
}

// Appends a row of a tile, whose first column is `first`; `padded` columns make whole vectors.
inline void append_row(Candidates& x, int64_t n, const float* s, int64_t padded, int64_t first) {
  for (int64_t j = 0; j < padded; j += LANES) {
    uint32_t above = greater(load(s + j), all(x.threshold));
    if (above != 0 && x.count + LANES > x.room) {
      drop_rest(x, n);
      above = greater(load(s + j), all(x.threshold));
    }
    for (; above != 0; above &= above - 1) {
      const int64_t at = j + __builtin_ctz(above);
      x.value[x.count] = s[at];
      x.index[x.count++] = int32_t(first + at);
    }
  }
}

// Appends candidates of later columns.
void append_all(Candidates& x, int64_t n, const Candidates& more) {
  for (int64_t i = 0; i < more.count; ++i) {
    if (x.count == x.room) drop_rest(x, n);
    if (!(more.value[i] > x.threshold)) continue;
    x.value[x.count] = more.value[i];
    x.index[x.count++] = more.index[i];
  }
}

// Writes the n largest, the largest first, and -inf and -1 where there are fewer. Sorts by merging ever longer runs
// between x and `spare`; equal values stay in their order.
void finish(Candidates& x, Candidates& spare, int64_t n, int64_t wanted, float* values, int64_t* indices) {
  if (x.count > n) drop_rest(x, n);
  const int64_t count = x.count;
  Candidates from = x, to = spare;
  for (int64_t run = 1; run < count; run *= 2) {
    for (int64_t start = 0; start < count; start += 2 * run) {
      const int64_t middle = start + run < count ? start + run : count;
      const int64_t end = middle + run < count ? middle + run : count;
      for (int64_t i = start, a = start, b = middle; i < end; ++i) {
        const bool second = b < end && (a == middle || from.value[b] > from.value[a]);
        const int64_t take = second ? b++ : a++;
        to.value[i] = from.value[take];
        to.index[i] = from.index[take];
      }
    }
    const Candidates sorted = to;
    to = from;
    from = sorted;
  }
  for (int64_t i = 0; i < wanted; ++i) {
    values[i] = i < count ? from.value[i] : -INF;
    indices[i] = i < count ? from.index[i] : -1;
  }
}

template <class T, class Arithmetic>
void topk(const Similarity& p, int64_t wanted, float* values, int64_t* indices) {
  const Blocks rows(p.n, false), columns(p.m, false);
  const Spread spread(p);
  Runs runs(rows, columns);
  if (spread.by_group) runs.splits = 1, runs.per_split = columns.count;
  const int64_t n = wanted < p.m ? wanted : p.m;                        // no row has more
  const int64_t room = round_up(n + (n > 64 ? n : 64), LANES) + LANES;  // and off powers of two
  // A thread uses its lists for one row block after the other. Where columns are split, each row has a list per split,
  // and they are merged in the end.
  const int64_t lists = runs.splits > 1 ? runs.splits * p.n : spread.threads * rows.size;
  const Array<Scratch> scratch(spread.threads);
  const Array<Candidates> candidates(lists + spread.threads);  // and one of each thread to sort with
  const Array<float> value((lists + spread.threads) * room);
  const Array<int32_t> index((lists + spread.threads) * room);
  const auto clear = [&](int64_t list) {
    candidates[list] = Candidates{value + list * room, index + list * room, 0, room, -INF};
  };

  spread.run<Arithmetic>(p.groups, [&](Team& team, int64_t g) {
    const Group<T, Arithmetic> group = group_of<T, Arithmetic>(p, g);
    Candidates& spare = candidates[lists + team.id];
    clear(lists + team.id);
    const auto write = [&](int64_t i, Candidates& of) {
      const int64_t at = (g * p.n + i) * wanted;
      finish(of, spare, n, wanted, values + at, indices + at);
    };
    team.each(rows.count * runs.splits, [&](int64_t task) {
      const int64_t block = task % rows.count, split = task / rows.count;
      const int64_t first = rows.begin(block), count = rows.width(block);
      const int64_t list = runs.splits > 1 ? split * p.n + first : team.id * rows.size;
      Scratch& x = scratch[team.id];
      for (int64_t i = 0; i < count; ++i) clear(list + i);
      for (int64_t b = split * runs.per_split; b < columns.count && b < (split + 1) * runs.per_split; ++b) {
        const Tile tile{first, count, columns.begin(b), columns.width(b)};
        if (!group.similarities(tile, x)) continue;
        for (int64_t i = 0; i < count; ++i)
          append_row(candidates[list + i], n, x.s + i * S_ROW, round_up(tile.columns, LANES), tile.j0);
      }
      for (int64_t i = 0; runs.splits == 1 && i < count; ++i) write(first + i, candidates[list + i]);
    });
    if (runs.splits > 1)
      team.each(p.n, [&](int64_t i) {
        for (int64_t split = 1; split < runs.splits; ++split) append_all(candidates[i], n, candidates[split * p.n + i]);
        write(i, candidates[i]);
      });
  });
}

}  // namespace

void similarity_topk(const Similarity& p, int64_t count, float* values, int64_t* indices) {
  with_types(p.dtype, [&](auto t, auto a) { topk<decltype(t), decltype(a)>(p, count, values, indices); });
}

}  // namespace SSLKERN_ISA
}  // namespace sslkern
