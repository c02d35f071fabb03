// What a Hopper GPU does for kernels/hopper.h: shared memory whose bytes know who still reads and writes them,
// barriers, copies, products of warpgroups.
#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <map>
#include <memory>

#include "hopper.h"  // brings hopper_emulation.h
#include "tensor_map.h"
#include "threads.h"

namespace sslkern::cuda {
namespace emulation {
namespace {

constexpr int CHUNK = 16;                   // bytes that the swizzle moves as one; copies and products touch whole ones
constexpr int START = 1024 + 16;            // of dynamic shared memory: as badly aligned as it may be
constexpr int REGISTERS = 65536;            // of a block that has the multiprocessor for itself
constexpr uint32_t NOT_SHOWN = 0x7fc0dead;  // of accumulators before `pin`: a NaN

// ---- What a block has ----------------------------------------------------------------------------------------------

// What a warp knows to have happened, from its own waits and from those who arrived where it waited: of each warp of
// the cluster how often it had arrived somewhere, of each warpgroup the products that ended, of each barrier the
// phases.
struct Knowledge {
  std::vector<uint32_t> counts;

  uint32_t of(int what) const { return what < int(counts.size()) ? counts[what] : 0; }
  void learn(int what, uint32_t count) {
    if (what >= int(counts.size())) counts.resize(what + 1, 0);
    counts[what] = std::max(counts[what], count);
  }
  void learn(const Knowledge& other) {
    if (other.counts.size() > counts.size()) counts.resize(other.counts.size(), 0);
    for (size_t i = 0; i < other.counts.size(); ++i) counts[i] = std::max(counts[i], other.counts[i]);
  }
};

struct Barrier : Place {
  uint32_t address, count, missing;
  int64_t bytes = 0;  // still to be copied in this phase
  int64_t phase = 0;  // that runs
  int id;             // in what warps know
  int by;             // thread that made it
  bool published = false;
  std::vector<int64_t> seen;  // by thread: the last phase whose end it waited for
  int64_t copied = -1;        // the last phase with a copy
  int64_t waited = -1;        // the last phase that somebody waited for
  Knowledge arriving, ended;  // of those who have arrived, when the last phase ended

  std::string name() const override {
    return "at the barrier at " + std::to_string(address & 0xffffff) + " for the end of phase " +
           std::to_string(phase) + ", which lacks " + std::to_string(missing) + " arrivals and " +
           std::to_string(bytes) + " bytes";
  }
};

struct Store {
  EncodedMap map;
  uint32_t from;
  int x, y;
};
struct Stores {  // a group
  std::vector<Store> open;
  std::vector<uint8_t> bytes;  // once read, box after box
  bool read = false;
};

// As long as a thread has not pinned them, its registers hold NaN.
struct Accumulators {
  std::vector<float> tile;              // [64, N]
  std::array<float*, WARPGROUP> of;     // by thread: its registers
  std::array<int64_t, WARPGROUP> last;  // by thread: the last product into them
};
struct Product {
  Operands operands;
  std::shared_ptr<Accumulators> d;
  int issued = 0;  // threads that have
  bool done = false;
  std::vector<std::array<uint32_t, 4>> fragment;  // by thread
  std::vector<std::array<const uint32_t*, 4>> kept;
};
// Products, groups of them and what threads have done are counted from the start of the block.
struct Warpgroup : Place {
  std::deque<Product> products;
  int64_t first = 0;          // of `products`
  std::vector<int64_t> ends;  // of each group: the number of products before its end
  std::array<int64_t, WARPGROUP> issued{}, committed{}, landed{};
  std::array<bool, WARPGROUP> fenced{};
  Meeting registers{"for its warpgroup at registers_up or registers_down"};
  int each = 0;  // registers of each thread

  std::string name() const override { return "for a product that not all threads of its warpgroup have issued"; }
};

struct Warp {
  Knowledge knows;
  Meeting waiting{"for the other lanes of its warp at wgmma_wait"};
  Meeting lanes{"for the other lanes of its warp at store_matrices"};
  uint32_t stored[WARP][5];  // by lane: where a row goes, and its part of the matrices
};

struct Thread {
  std::vector<std::pair<uint32_t, int>> unpublished;  // what it has written: from, bytes
  std::vector<Store> open;
  std::deque<Stores> stores;
  std::vector<std::shared_ptr<Accumulators>> accumulators;  // that products write or have written
};

struct Pool : Place {
  int registers = 0;
  std::string name() const override {
    return "at registers_up for registers, of which " + std::to_string(registers) + " are left";
  }
};

// Who reads and writes CHUNK bytes of shared memory: what is under way, and what was last, so that those who come next
// must know of it.
struct Chunk {
  bool barrier = false;                          // it holds one
  uint16_t loads = 0, products = 0, stores = 0;  // under way
  int copied_by = -1, copied = 0;    // the barrier of the last copy into it, the phases that must have ended
  int written_by = -1, written = 0;  // the warp that wrote it last, and when
};

// A meeting after which each warp knows what all of them knew.
struct Sync : Meeting {
  using Meeting::Meeting;
  Knowledge coming, all;
};

struct Block {
  std::vector<uint8_t> memory;
  std::vector<Chunk> chunks;
  std::vector<uint32_t> read;      // by chunk and warp: when it read it last
  std::vector<uint32_t> products;  // by chunk and warpgroup: the products that must have ended
  std::vector<uint16_t> dirty;     // by byte: 1 + the thread that wrote it and has not published it
  std::map<uint32_t, Barrier> barriers;
  std::deque<Warpgroup> groups;
  std::deque<Warp> warps;
  std::deque<Thread> threads;
  Pool pool;
  int loads = 0;  // under way
  Sync sync{"at sync_block"};
};

std::deque<Block> blocks;  // by rank
Sync cluster("at sync_cluster");
int barriers;  // of the cluster

Block& mine() { return blocks[rank()]; }
Thread& me() { return mine().threads[thread()]; }
Warp& my_warp() { return mine().warps[thread() / WARP]; }
Warpgroup& my_group() { return mine().groups[thread() / WARPGROUP]; }

// Their places in what warps know.
int warps() { return launch().threads / WARP; }
int groups() { return (launch().threads + WARPGROUP - 1) / WARPGROUP; }
int warp_in_cluster(int rank, int warp) { return rank * warps() + warp; }
int my_warp_in_cluster() { return warp_in_cluster(rank(), thread() / WARP); }
int group_in_cluster(int rank, int group) { return launch().cluster * warps() + rank * groups() + group; }
int barrier_in_cluster(int number) { return launch().cluster * (warps() + groups()) + number; }

// What this warp did before, those who wait there know afterwards.
void tell(Knowledge& there) {
  there.learn(my_warp().knows);
  ++my_warp().knows.counts[my_warp_in_cluster()];
}
uint32_t now() { return my_warp().knows.of(my_warp_in_cluster()); }

void meet(Sync& sync, int count) {
  tell(sync.coming);
  if (sync.join(count)) sync.all = sync.coming;
  my_warp().knows.learn(sync.all);
}

// ---- Shared memory -------------------------------------------------------------------------------------------------

int shared_end() { return START + int(launch().shared); }

// The offset in a block's memory of an address, which has the rank of the block from bit 24 on.
uint32_t offset(uint32_t address, int64_t bytes, const char* what) {
  const uint32_t at = address & 0xffffff;
  if (launch().shared == 0) fail("%s uses shared memory, of which the launch asks for none", what);
  if (int(address >> 24) != rank())
    fail("%s at %#x: an address of this block has its rank in bits 24 on", what, address);
  if (at < START || at + bytes > uint32_t(shared_end()))
    fail("%s reaches out of shared memory: %lld bytes from %u on, of [%d, %d)", what, static_cast<long long>(bytes), at,
         START, shared_end());
  return at;
}
uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

template <class Body>
void each_of(uint32_t at, int bytes, const Body& body) {
  for (uint32_t i = at / CHUNK; i <= (at + bytes - 1) / CHUNK; ++i) body(i);
}

// What was written there, this warp must know to be there.
void check_read(const Block& block, uint32_t at, int bytes, const char* what) {
  const Knowledge& known = my_warp().knows;
  each_of(at, bytes, [&](uint32_t i) {
    const Chunk& chunk = block.chunks[i];
    if (chunk.loads != 0 || (chunk.copied_by >= 0 && int(known.of(chunk.copied_by)) < chunk.copied))
      fail("%s reads at %u what a copy may still write", what, i * CHUNK);
    if (chunk.written_by >= 0 && int(known.of(chunk.written_by)) < chunk.written)
      fail("%s reads at %u what warp %d may still write", what, i * CHUNK, chunk.written_by % warps());
  });
}
// Nobody uses any more what this warp or a copy of it overwrites, and it knows.
void check_write(int rank, uint32_t at, int bytes, const char* what) {
  const Block& block = blocks[rank];
  const Knowledge& known = my_warp().knows;
  each_of(at, bytes, [&](uint32_t i) {
    const Chunk& chunk = block.chunks[i];
    if (chunk.barrier) fail("%s overwrites a barrier at %u", what, i * CHUNK);
    bool read = chunk.products != 0;
    for (int g = 0; g < groups(); ++g) read |= block.products[i * groups() + g] > known.of(group_in_cluster(rank, g));
    if (read) fail("%s overwrites at %u what a product may still read", what, i * CHUNK);
    if (chunk.stores != 0) fail("%s overwrites at %u what a copy may still read", what, i * CHUNK);
    if (chunk.loads != 0 || (chunk.copied_by >= 0 && int(known.of(chunk.copied_by)) < chunk.copied))
      fail("%s overwrites at %u what a copy may still write", what, i * CHUNK);
    for (int w = 0; w < warps(); ++w)
      if (block.read[i * warps() + w] > known.of(warp_in_cluster(rank, w)))
        fail("%s overwrites at %u what warp %d may still read", what, i * CHUNK, w);
    if (chunk.written_by >= 0 && int(known.of(chunk.written_by)) < chunk.written)
      fail("%s overwrites at %u what warp %d may still write", what, i * CHUNK, chunk.written_by % warps());
  });
}
// Products and copies see memory past the caches of the threads.
void check_published(const Block& block, uint32_t at, int bytes, const char* what) {
  for (uint32_t i = at; i < at + bytes; i += CHUNK) {
    uint64_t any[4];
    memcpy(any, &block.dirty[i], sizeof any);
    if ((any[0] | any[1] | any[2] | any[3]) == 0) continue;
    const uint16_t* by = std::find_if(&block.dirty[i], &block.dirty[i] + CHUNK, [](uint16_t x) { return x != 0; });
    fail("%s meets at %u what thread %d has written and not published (publish_shared)", what, i, *by - 1);
  }
}
void note_read(uint32_t at, int bytes) {
  each_of(at, bytes, [&](uint32_t i) { mine().read[i * warps() + thread() / WARP] = now(); });
}

void write(int by, uint32_t to, const void* from, int bytes) {
  const uint32_t at = offset(to, bytes, "a store to shared memory");
  if (at % bytes != 0) fail("a store to shared memory at %u, which is no multiple of %d", at, bytes);
  check_write(rank(), at, bytes, "a store to shared memory");
  memcpy(&mine().memory[at], from, bytes);
  std::fill_n(&mine().dirty[at], bytes, uint16_t(by + 1));
  mine().threads[by].unpublished.emplace_back(at, bytes);
  each_of(at, bytes, [&](uint32_t i) {
    mine().chunks[i].written_by = my_warp_in_cluster();
    mine().chunks[i].written = int(now());
  });
}

}  // namespace

const void* read_shared(uint32_t from, int bytes) {
  const uint32_t at = offset(from, bytes, "load_shared");
  if (at % bytes != 0) fail("load_shared at %u, which is no multiple of %d", at, bytes);
  check_read(mine(), at, bytes, "load_shared");
  note_read(at, bytes);
  return &mine().memory[at];
}
void write_shared(uint32_t to, const void* from, int bytes) { write(thread(), to, from, bytes); }

// ---- Barriers ------------------------------------------------------------------------------------------------------

namespace {

Barrier& barrier_at(Block& block, uint32_t address, const char* what) {
  const auto found = block.barriers.find(address & 0xffffff);
  if (found == block.barriers.end()) fail("%s: there is no barrier at %#x", what, address);
  return found->second;
}
Barrier& my_barrier(uint32_t address, const char* what) {
  offset(address, 8, what);
  Barrier& barrier = barrier_at(mine(), address, what);
  if (!barrier.published && barrier.by != thread())
    fail("%s: the barrier at %u was made and not published (publish_barriers)", what, address & 0xffffff);
  return barrier;
}

void settle(Barrier& barrier) {
  if (barrier.bytes <= -(1 << 20) || barrier.bytes >= 1 << 20)
    fail("a barrier counts fewer than 2^20 bytes, that at %u has %lld", barrier.address & 0xffffff,
         static_cast<long long>(barrier.bytes));
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.ended = barrier.arriving;
  ++barrier.phase;
  barrier.missing = barrier.count;
  wake(barrier);
}
void arrive(Barrier& barrier, uint32_t bytes) {
  if (barrier.missing == 0) fail("too many arrivals at the barrier at %u", barrier.address & 0xffffff);
  tell(barrier.arriving);
  --barrier.missing;
  barrier.bytes += bytes;
  settle(barrier);
}

}  // namespace
}  // namespace emulation

using namespace emulation;

void barrier_init(uint32_t address, uint32_t arrivals) {
  const uint32_t at = offset(address, 8, "barrier_init");
  if (at % 8 != 0) fail("barrier_init at %u, which is no multiple of 8", at);
  if (arrivals == 0 || arrivals >= 1 << 20) fail("barrier_init for %u arrivals", arrivals);
  if (mine().barriers.count(at) != 0) fail("barrier_init at %u, where a barrier is", at);
  Barrier& barrier = mine().barriers[at];
  barrier.address = address;
  barrier.count = barrier.missing = arrivals;
  barrier.id = barrier_in_cluster(barriers++);
  barrier.by = thread();
  barrier.seen.assign(launch().threads, -1);
  mine().chunks[at / CHUNK].barrier = true;
}
void publish_barriers() {
  for (auto& [at, barrier] : mine().barriers)
    if (barrier.by == thread()) barrier.published = true;
}
void barrier_arrive(uint32_t address) {
  arrive(my_barrier(address, "barrier_arrive"), 0);
  maybe_pause();
}
void barrier_arrive_at(uint32_t address, uint32_t rank) {
  offset(address, 8, "barrier_arrive_at");
  if (int(rank) >= launch().cluster) fail("barrier_arrive_at block %u of a cluster of %d", rank, launch().cluster);
  if (gone(int(rank))) fail("barrier_arrive_at block %u of the cluster, which has ended", rank);
  Barrier& barrier = barrier_at(blocks[rank], address, "barrier_arrive_at");
  if (!barrier.published) fail("barrier_arrive_at: the barrier was made and not published (publish_barriers)");
  arrive(barrier, 0);
  maybe_pause();
}
void barrier_expect(uint32_t address, uint32_t bytes) {
  arrive(my_barrier(address, "barrier_expect"), bytes);
  maybe_pause();
}
void barrier_wait(uint32_t address, uint32_t parity) {
  Barrier& barrier = my_barrier(address, "barrier_wait");
  if (parity > 1) fail("barrier_wait: the parity is 0 or 1, not %u", parity);
  int64_t& seen = barrier.seen[thread()];
  int64_t wanted = seen + 1;  // the next phase, unless it asks for the last one again
  if ((wanted & 1) != parity) wanted = (barrier.phase & 1) == parity ? barrier.phase : barrier.phase - 1;
  while (barrier.phase <= wanted) sleep(barrier);
  if (barrier.phase > wanted + 1)
    fail("barrier_wait at %u for the end of phase %lld, but phase %lld has ended: the parity stands for another",
         address & 0xffffff, static_cast<long long>(wanted), static_cast<long long>(barrier.phase - 1));
  seen = wanted;
  barrier.waited = std::max(barrier.waited, wanted);
  Knowledge& known = my_warp().knows;
  if (int64_t(known.of(barrier.id)) <= wanted) {  // else another lane was here before
    known.learn(barrier.ended);
    known.learn(barrier.id, uint32_t(wanted + 1));
  }
  maybe_pause();
}

// ---- Copies --------------------------------------------------------------------------------------------------------

namespace emulation {
namespace {

EncodedMap encoded(const TensorMap& map, int rank, const char* what) {
  EncodedMap found;
  memcpy(&found, &map, sizeof found);
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) fail("%s: a TensorMap lies on a multiple of 64 bytes", what);
  if (found.magic != EncodedMap::MAGIC) fail("%s: the TensorMap was not encoded", what);
  if (found.rank != rank) fail("%s of a tensor of rank %d, not %d", what, found.rank, rank);
  if (found.swizzle != 0 && int(found.box[0]) * found.number_bytes != found.swizzle)
    fail("%s: the emulation knows boxes of %d bytes a row with this swizzle, not %d", what, found.swizzle,
         int(found.box[0]) * found.number_bytes);
  return found;
}
int bytes_of(const EncodedMap& map) { return int(map.box[0] * map.box[1]) * map.number_bytes; }

// Where a box lies in shared memory.
uint32_t place_of(const EncodedMap& map, uint32_t address, const char* what) {
  const uint32_t at = offset(address, bytes_of(map), what);
  const int multiple = map.swizzle != 0 ? GROUP_BYTES : 128;
  if (at % multiple != 0) fail("%s: a box lies on a multiple of %d in shared memory, not at %u", what, multiple, at);
  return at;
}

// Calls body(part of the box in shared memory, part of the tensor or null outside of it, bytes).
template <class Body>
void each_part(const EncodedMap& map, uint32_t at, int x, int y, const Body& body) {
  const int size = map.number_bytes, row_bytes = int(map.box[0]) * size;
  const int64_t width = int64_t(map.sizes[0]);
  for (int r = 0; r < int(map.box[1]); ++r) {
    const bool row_inside = y + r >= 0 && uint64_t(y + r) < map.sizes[1];
    uint8_t* const row = map.base + (row_inside ? uint64_t(y + r) * map.row_bytes : 0);
    for (int b = 0; b < row_bytes; b += CHUNK) {
      const uint32_t place = at + r * row_bytes + b, to = map.swizzle != 0 ? swizzled(place) : place;
      const int64_t column = int64_t(x) + b / size;
      if (row_inside && column >= 0 && column + CHUNK / size <= width) {
        body(to, row + column * size, CHUNK);
        continue;
      }
      for (int i = 0; i < CHUNK / size; ++i) {
        const bool inside = row_inside && column + i >= 0 && column + i < width;
        body(to + i * size, inside ? row + (column + i) * size : nullptr, size);
      }
    }
  }
}

void load(const char* what, int rank, uint16_t to_blocks, uint32_t to, const TensorMap& tensor, uint32_t at_barrier,
          int x, int y) {
  const EncodedMap map = encoded(tensor, rank, what);
  const uint32_t at = place_of(map, to, what);
  const int bytes = bytes_of(map);
  my_barrier(at_barrier, what);
  for (int to_rank = 0; to_rank < 16; ++to_rank) {
    if ((to_blocks >> to_rank & 1) == 0) continue;
    if (to_rank >= launch().cluster) fail("%s for block %d of a cluster of %d", what, to_rank, launch().cluster);
    if (gone(to_rank)) fail("%s for block %d of the cluster, which has ended", what, to_rank);
    Block& block = blocks[to_rank];
    Barrier& barrier = barrier_at(block, at_barrier, what);
    if (!barrier.published) fail("%s: the barrier was made and not published (publish_barriers)", what);
    check_write(to_rank, at, bytes, what);
    check_published(block, at, bytes, what);
    each_of(at, bytes, [&](uint32_t i) { ++block.chunks[i].loads; });
    ++block.loads;
    beside([&block, &barrier, map, at, bytes, x, y] {
      each_part(map, at, x, y, [&](uint32_t to, const uint8_t* from, int count) {
        from != nullptr ? memcpy(&block.memory[to], from, count) : memset(&block.memory[to], 0, count);
      });
      each_of(at, bytes, [&](uint32_t i) {
        --block.chunks[i].loads;
        block.chunks[i].copied_by = barrier.id;
        block.chunks[i].copied = int(barrier.phase + 1);
      });
      --block.loads;
      barrier.copied = barrier.phase;
      barrier.bytes -= bytes;
      settle(barrier);
    });
  }
  maybe_pause();
}

void read(Stores& group) {
  for (const Store& store : group.open) {
    each_part(store.map, store.from, store.x, store.y, [&](uint32_t from, uint8_t*, int bytes) {
      group.bytes.insert(group.bytes.end(), &mine().memory[from], &mine().memory[from] + bytes);
    });
    each_of(store.from, bytes_of(store.map), [](uint32_t i) { --mine().chunks[i].stores; });
    note_read(store.from, bytes_of(store.map));
  }
  group.read = true;
}
void write(const Stores& group) {
  const uint8_t* from = group.bytes.data();
  for (const Store& store : group.open)
    each_part(store.map, store.from, store.x, store.y, [&](uint32_t, uint8_t* to, int bytes) {
      if (to != nullptr) memcpy(to, from, bytes);
      from += bytes;
    });
}

}  // namespace

void wait_stores(int pending, bool written) {
  std::deque<Stores>& groups = me().stores;
  for (int i = 0; i + pending < int(groups.size()); ++i)
    if (!groups[i].read) read(groups[i]);
  for (; written && int(groups.size()) > pending; groups.pop_front()) write(groups.front());
  maybe_pause();
}

}  // namespace emulation

void prefetch_map(const TensorMap& map) {
  EncodedMap found;
  memcpy(&found, &map, sizeof found);
  encoded(map, found.rank, "prefetch_map");
}
void load_vector(uint32_t to, const TensorMap& map, uint32_t barrier, int x) {
  load("load_vector", 1, uint16_t(1 << rank()), to, map, barrier, x, 0);
}
void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
  load("load_box", 2, uint16_t(1 << rank()), to, map, barrier, x, y);
}
void load_box_for(uint16_t blocks, uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
  load("load_box_for", 2, blocks, to, map, barrier, x, y);
}
void store_box(const TensorMap& tensor, uint32_t from, int x, int y) {
  const EncodedMap map = encoded(tensor, 2, "store_box");
  const uint32_t at = place_of(map, from, "store_box");
  check_published(mine(), at, bytes_of(map), "store_box");
  check_read(mine(), at, bytes_of(map), "store_box");
  each_of(at, bytes_of(map), [](uint32_t i) { ++mine().chunks[i].stores; });
  me().open.push_back({map, at, x, y});
  maybe_pause();
}
void commit_stores() {
  me().stores.push_back({std::move(me().open), {}, false});
  me().open.clear();
}

// ---- Products ------------------------------------------------------------------------------------------------------

namespace emulation {
namespace {

constexpr int K = 16;  // of a product

// Calls body(row, k, address) for the numbers of a matrix in shared memory, one of a chunk: 8 lie in a row from there
// on. `rows`: numbers along the product lie in a row. Else it has `n` columns, and numbers along it lie below each
// other.
template <class Body>
void each_chunk(uint64_t descriptor, bool rows, int n, const Body& body) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("wgmma: the swizzle of a descriptor is that of 128 bytes");
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: panels lie on multiples of %d: no base offset", GROUP_BYTES);
  if (start % GROUP_BYTES >= 128) fail("wgmma: a matrix at %u begins within 8 rows of a panel", start);
  if (stride % GROUP_BYTES != 0)
    fail("wgmma: groups of 8 rows lie %u bytes apart, no multiple of %d", stride, GROUP_BYTES);
  const int groups = rows ? n / 8 : K / 8, chunks = rows ? K / 8 : n / 8;
  if (rows) {
    if (leading != 16) fail("wgmma: the leading offset of rows is 16, not %u; the rank must be masked off", leading);
    if (start % 128 + 2 * K > 128) fail("wgmma: a matrix at %u reaches over the end of a row of 128 bytes", start);
  } else {
    if (start % 128 != 0) fail("wgmma: a matrix of columns at %u begins within a row of 128 bytes", start);
    if (leading % GROUP_BYTES != 0) fail("wgmma: panels lie %u bytes apart, no multiple of %d", leading, GROUP_BYTES);
  }
  for (int group = 0; group < groups; ++group)
    for (int row = 0; row < 8; ++row)
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const uint32_t panel = rows ? chunk * CHUNK : chunk / 8 * leading + chunk % 8 * CHUNK;
        const uint32_t at = swizzled(start + group * stride + row * 128 + panel);
        if (at < START || at + CHUNK > uint32_t(shared_end()))
          fail("wgmma reaches out of shared memory: at %u, of [%d, %d)", at, START, shared_end());
        body(group * 8 + row, chunk * 8, at);
      }
}

void begin_reading(const Operands& of) {
  const auto begin = [](int, int, uint32_t at) {
    check_published(mine(), at, CHUNK, "wgmma");
    check_read(mine(), at, CHUNK, "wgmma");
    ++mine().chunks[at / CHUNK].products;
  };
  if (!of.from_registers) each_chunk(of.a, true, 64, begin);
  each_chunk(of.b, !of.from_registers, of.registers * 2, begin);
}

float to_float(bool half, uint16_t bits) { return half ? cuda::to_float(fp16{bits}) : cuda::to_float(bf16{bits}); }

// d[64, N] += a[64, K] b[K, N]: for each number of d the products in the order of k.
void multiply(float* d, const float (*a)[K], const float* b, int n) {
  constexpr int BLOCK = 32;
  for (int row = 0; row < 64; ++row)
    for (int from = 0; from < n; from += BLOCK) {
      float sums[BLOCK];
      memcpy(sums, d + row * n + from, sizeof sums);
      for (int k = 0; k < K; ++k)
        for (int i = 0; i < BLOCK; ++i) sums[i] += a[row][k] * b[k * n + from + i];
      memcpy(d + row * n + from, sums, sizeof sums);
    }
}

// Row and column of the first of two neighbours that a thread holds: pair i of block j of 8 columns.
int row_of(int thread, int i) { return thread / WARP * 16 + thread % WARP / 4 + 8 * i; }
int column_of(int thread, int j) { return 8 * j + 2 * (thread % 4); }

// `number`: of the products of this thread's warpgroup.
void compute(Product& product, int64_t number) {
  static float a[64][K], b[K * 256];
  const Operands& of = product.operands;
  const int n = of.registers * 2;
  Block& block = mine();
  const auto end = [&](uint32_t i) {
    --block.chunks[i].products;
    block.products[i * groups() + thread() / WARPGROUP] = uint32_t(number + 1);
  };
  const auto read = [&](uint32_t at, int i) {
    uint16_t bits;
    memcpy(&bits, &block.memory[at + 2 * i], 2);
    return to_float(of.half, bits);
  };
  if (of.from_registers) {
    for (int t = 0; t < WARPGROUP; ++t)
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h)
          a[row_of(t, r % 2)][column_of(t, r / 2) + h] = to_float(of.half, uint16_t(product.fragment[t][r] >> 16 * h));
    each_chunk(of.b, false, n, [&](int k, int column, uint32_t at) {
      for (int i = 0; i < 8; ++i) b[k * n + column + i] = read(at, i);
      end(at / CHUNK);
    });
  } else {
    each_chunk(of.a, true, 64, [&](int row, int k, uint32_t at) {
      for (int i = 0; i < 8; ++i) a[row][k + i] = read(at, i);
      end(at / CHUNK);
    });
    each_chunk(of.b, true, n, [&](int column, int k, uint32_t at) {
      for (int i = 0; i < 8; ++i) b[(k + i) * n + column] = read(at, i);
      end(at / CHUNK);
    });
  }
  std::vector<float>& d = product.d->tile;
  if (!of.accumulate) std::fill(d.begin(), d.end(), 0.f);
  multiply(d.data(), a, b, n);
  product.done = true;
}

// A thread's registers and its part of a tile.
template <class Body>
void each_register(int thread, int registers, const Body& body) {
  for (int j = 0; j < registers / 4; ++j)
    for (int i = 0; i < 2; ++i)
      for (int h = 0; h < 2; ++h) body(4 * j + 2 * i + h, row_of(thread, i) * registers * 2 + column_of(thread, j) + h);
}

// The accumulators of a product that this thread issues: those of an earlier one, or its registers.
std::shared_ptr<Accumulators> accumulators(Warpgroup& group, int t, Product* of_others, const Operands& of) {
  std::shared_ptr<Accumulators> found;
  for (const auto& d : me().accumulators)
    if (d->of[t] == of.d) found = d;
  if (of_others != nullptr && found != nullptr && found != of_others->d)
    fail("wgmma: threads of a warpgroup give other accumulators");
  const bool earlier = found != nullptr;
  if (!earlier) found = of_others != nullptr ? of_others->d : std::make_shared<Accumulators>();
  if (found->tile.empty()) {
    found->tile.assign(64 * of.registers * 2, 0.f);
    found->of.fill(nullptr);
  }
  if (int(found->tile.size()) != 128 * of.registers) fail("wgmma: accumulators of earlier products have another size");
  found->last[t] = group.issued[t];
  if (earlier) return found;
  if (found->of[t] != nullptr) fail("wgmma: threads of a warpgroup give other accumulators");
  if (!group.fenced[t]) fail("wgmma takes accumulators from registers without wgmma_fence after the last wgmma_wait");
  found->of[t] = of.d;
  each_register(t, of.registers, [&](int i, int at) {
    found->tile[at] = of.d[i];
    of.d[i] = from_bits(NOT_SHOWN);
  });
  me().accumulators.push_back(found);
  return found;
}

}  // namespace

void issue(const Operands& of) {
  Warpgroup& group = my_group();
  const int t = thread() % WARPGROUP;
  const int64_t number = group.issued[t];
  const bool first = number == group.first + int64_t(group.products.size());
  Product* of_others = first ? nullptr : &group.products[number - group.first];
  if (!first) {
    const Operands& other = of_others->operands;
    if (of.a != other.a || of.b != other.b || of.registers != other.registers || of.half != other.half ||
        of.accumulate != other.accumulate || of.from_registers != other.from_registers)
      fail("wgmma: threads of a warpgroup ask for different products");
  }
  if (of.from_registers && !group.fenced[t])
    fail("wgmma takes a from registers without wgmma_fence after the last wgmma_wait");
  std::shared_ptr<Accumulators> d = accumulators(group, t, of_others, of);
  if (first) {
    begin_reading(of);
    group.products.emplace_back();
    of_others = &group.products.back();
    of_others->operands = of;
    of_others->d = std::move(d);
    if (of.from_registers) {
      of_others->fragment.resize(WARPGROUP);
      of_others->kept.resize(WARPGROUP);
    }
  }
  if (of.from_registers) {
    std::copy_n(of.fragment, 4, of_others->fragment[t].begin());
    std::copy_n(of.kept, 4, of_others->kept[t].begin());
  }
  ++group.issued[t];
  if (++of_others->issued == WARPGROUP) wake(group);
}

void wait_products(int pending) {
  my_warp().waiting.join(WARP);  // what a lane does before, all of them have done
  Warpgroup& group = my_group();
  const int t = thread() % WARPGROUP;
  if (group.issued[t] != (group.committed[t] == 0 ? 0 : group.ends[group.committed[t] - 1]))
    fail("wgmma_wait while products are not committed (wgmma_commit)");
  const int64_t last = group.committed[t] - pending, end = last > 0 ? group.ends[last - 1] : 0;
  for (int64_t i = group.landed[t]; i < end; ++i) {
    while (group.products[i - group.first].issued < WARPGROUP) sleep(group);
    Product& product = group.products[i - group.first];
    if (!product.done) compute(product, i);
    const Operands& of = product.operands;
    if (of.from_registers)
      for (int r = 0; r < 4; ++r)
        if (product.kept[t][r] != nullptr && *product.kept[t][r] != product.fragment[t][r])
          fail("registers of a have changed while a product reads them: keep them in an array until wgmma_wait");
  }
  if (end > group.landed[t]) group.landed[t] = end;
  my_warp().knows.learn(group_in_cluster(rank(), thread() / WARPGROUP), uint32_t(group.landed[t]));
  while (!group.products.empty() && *std::min_element(group.landed.begin(), group.landed.end()) > group.first) {
    group.products.pop_front();
    ++group.first;
  }
  group.fenced[t] = false;
  maybe_pause();
}

void show(const float* registers) {
  const int t = thread() % WARPGROUP;
  auto& all = me().accumulators;
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& d) { return d->of[t] == registers; });
  if (found == all.end() || (*found)->last[t] >= my_group().landed[t]) return;
  Accumulators& d = **found;
  each_register(t, int(d.tile.size()) / WARPGROUP, [&](int r, int at) {
    if (to_bits(d.of[t][r]) != NOT_SHOWN) fail("accumulators have changed between their products and `pin`");
    d.of[t][r] = d.tile[at];
  });
  all.erase(found);
}

}  // namespace emulation

void wgmma_fence() { my_group().fenced[thread() % WARPGROUP] = true; }
void wgmma_commit() {
  Warpgroup& group = my_group();
  const int t = thread() % WARPGROUP;
  const int64_t number = group.committed[t]++;
  if (number == int64_t(group.ends.size())) group.ends.push_back(group.issued[t]);
  if (group.ends[number] != group.issued[t]) fail("wgmma_commit: threads of a warpgroup commit different products");
}

// ---- Threads -------------------------------------------------------------------------------------------------------

void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  Warp& warp = my_warp();
  const uint32_t stored[5] = {to, a, b, c, d};
  if (to % 16 != 0) fail("store_matrices: a row lies on a multiple of 16, not at %u", to & 0xffffff);
  memcpy(warp.stored[lane_id()], stored, sizeof stored);
  if (!warp.lanes.join(WARP)) return;
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int lane = 0; lane < WARP; ++lane) {
      const uint32_t row = warp.stored[matrix * 8 + lane / 4][0];
      write(thread() / WARP * WARP + lane, row + lane % 4 * 4, &warp.stored[lane][1 + matrix], 4);
    }
}
void publish_shared() {
  for (const auto& [at, bytes] : me().unpublished) std::fill_n(&mine().dirty[at], bytes, uint16_t(0));
  me().unpublished.clear();
}
uint32_t dynamic_shared() {
  if (launch().shared == 0) fail("dynamic_shared: the launch asks for none");
  return uint32_t(rank()) << 24 | uint32_t((START + GROUP_BYTES - 1) / GROUP_BYTES * GROUP_BYTES);
}

uint32_t cluster_rank() { return uint32_t(rank()); }
void sync_cluster() { meet(cluster, launch().cluster * launch().threads); }

namespace emulation {

void sync_block() { meet(mine().sync, launch().threads); }

// The last thread of a warpgroup gives or takes the registers of all.
void change_registers(int count, bool up) {
  Warpgroup& group = my_group();
  if (!group.registers.join(WARPGROUP)) return;
  Pool& pool = mine().pool;
  const int more = (count - group.each) * WARPGROUP;
  if (up ? more < 0 : more > 0)
    fail("%s to %d registers, but a thread has %d", up ? "registers_up" : "registers_down", count, group.each);
  while (pool.registers < more) sleep(pool);
  pool.registers -= more;
  group.each = count;
  wake(pool);
}

// ---- The machine begins and ends -----------------------------------------------------------------------------------

void begin_cluster() {
  const int threads = launch().threads;
  while (int(blocks.size()) < launch().cluster) blocks.emplace_back();
  barriers = 0;
  cluster.coming = cluster.all = {};
  for (int r = 0; r < launch().cluster; ++r) {
    Block& block = blocks[r];
    const size_t chunks = launch().shared == 0 ? 0 : (shared_end() + CHUNK - 1) / CHUNK;
    block.memory.assign(chunks * CHUNK, 0xff);
    block.dirty.assign(chunks * CHUNK, 0);
    block.chunks.assign(chunks, {});
    block.read.assign(chunks * warps(), 0);
    block.products.assign(chunks * groups(), 0);
    block.barriers.clear();
    block.groups.clear();
    block.groups.resize(groups());
    for (Warpgroup& group : block.groups) group.each = std::min(REGISTERS / threads / 8 * 8, 248);
    block.warps.resize(warps());
    for (int w = 0; w < warps(); ++w) {
      block.warps[w].knows = {};
      block.warps[w].knows.learn(warp_in_cluster(r, w), 1);
    }
    block.threads.resize(threads);
    block.pool.registers = 0;
    block.loads = 0;
    block.sync.coming = block.sync.all = {};
  }
}

void end_thread() {
  Block& block = mine();
  const Warpgroup& group = my_group();
  if (group.issued[thread() % WARPGROUP] != group.landed[thread() % WARPGROUP])
    fail("a thread ends with products under way (wgmma_wait)");
  if (!me().accumulators.empty()) fail("a thread ends with accumulators that it has not pinned (pin)");
  if (!me().open.empty()) fail("a thread ends with stores that are not committed (commit_stores)");
  for (const Stores& group : me().stores) {
    if (!group.read) fail("a thread ends while its stores still read shared memory (wait_stores_read)");
    write(group);
  }
  me().stores.clear();
  me().unpublished.clear();
  if (!gone(rank())) return;
  bool copied = block.loads != 0;
  for (const auto& [at, barrier] : block.barriers) copied |= barrier.copied > barrier.waited;
  if (copied) fail("the block ends while copies into it are under way, for which nobody has waited");
}

void forget_blocks() {
  blocks.clear();
  cluster.arrived = 0;
  cluster.fibers.clear();
}

}  // namespace emulation
}  // namespace sslkern::cuda
