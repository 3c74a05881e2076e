// See accesses.h. Compiled without -fsanitize=thread, so that none of this sees itself.
#define LLMLOSS_SIMT_HOOKS
#include "accesses.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <unordered_map>
#include <utility>

// Where a function was called.
#define LLMLOSS_PLACE __builtin_return_address(0)

namespace llmloss::simt::emulator::accesses {
namespace {

constexpr unsigned warp_size = 32;
constexpr uint32_t nobody = ~uint32_t{0};

// The loads of one byte by a warp since the byte was stored to, and since the warp's last barrier.
struct Readers {
  uint32_t warp = nobody;
  uint32_t lanes = 0;  // one bit each
  uint32_t time = 0;
  const void* place = nullptr;
};

// What is known of a byte. Threads and warps are numbered over the grid.
struct Byte {
  uint32_t writer = nobody;
  uint32_t written_at = 0;
  const void* place = nullptr;  // of the store
  bool is_unknown = false;      // nobody has written it, or a copy did whose source had changed
  uint32_t copies = nobody;     // the asynchronous copies that have written it, or will
  bool was_read = false, was_written = false;  // in this launch
  uint32_t near_warp = nobody, near_load = 0;  // of the last load
  Readers readers;
  std::vector<Readers> others;  // mostly none
};

struct Range {
  std::string name;
  uintptr_t begin = 0;
  std::vector<Byte> bytes;
  int traffic = -1;  // its index; -1: shared memory
};

struct Copy {
  uint32_t thread;
  size_t bytes = 0;
  const void *to = nullptr, *from = nullptr, *place = nullptr;
  bool is_pending = true, is_overtaken = false;
  uint32_t time = 0;  // when it was waited for, by `thread`
  uint32_t copies = nobody;
};

// Asynchronous copies that are waited for together.
struct Copies {
  std::vector<size_t> each;
  std::vector<bool> waited;  // by each thread of the cluster
  uint32_t thread = nobody;  // the first of them
  uint32_t time = 0;
};

struct State {
  std::vector<Launch> launches;
  std::vector<Range> global, shared;  // each in the order of their addresses
  Range* last_range = nullptr;
  std::vector<Copy> copies;
  std::vector<Copies> groups;  // by the number that begin_copies returned
  std::unordered_map<uintptr_t, std::vector<size_t>> copies_of;  // by the vector they load from
  // The last access that was seen, if it may be half of a copy by one statement: a load of global
  // memory (`from`), or a store to shared memory (`to`). And what is wrong with it if it is not.
  Copy half{nobody};
  std::string doubt;

  unsigned block_threads = 0, cluster_blocks = 0, first_block = 0;
  // The number of barriers completed so far, and for each warp, each block and the cluster its
  // value after the last one of theirs.
  uint32_t time = 0;
  std::vector<uint32_t> warp_time, block_time;
  uint32_t cluster_time = 0;
  std::vector<uint32_t> loads;  // of global memory, by each thread of the cluster

  bool is_inside = false;  // a thread of the kernel runs
  uint32_t thread = 0;
  uintptr_t stack = 0;
  size_t stack_bytes = 0;
};

State known;
State& state() { return known; }

// Most accesses are to no watched memory: one look at a table of pages, by their last bits, says
// so.
constexpr uintptr_t page_bits = 12, table_size = 1 << 16;
bool may_be_watched[table_size];

bool& may_be_watched_at(uintptr_t address) {
  return may_be_watched[(address >> page_bits) % table_size];
}

void mark_pages() {
  std::fill(std::begin(may_be_watched), std::end(may_be_watched), false);
  for (const std::vector<Range>* ranges : {&known.global, &known.shared}) {
    for (const Range& range : *ranges) {
      for (uintptr_t at = range.begin; at < range.begin + range.bytes.size();
           at += 1 << page_bits) {
        may_be_watched_at(at) = true;
      }
      may_be_watched_at(range.begin + range.bytes.size()) = true;
    }
  }
}

// Whether what a thread did at a time comes before whatever the current thread does now.
bool is_before(const State& s, uint32_t thread, uint32_t time) {
  if (thread == s.thread) return true;
  const uint32_t first = s.first_block * s.block_threads;
  const uint32_t mine = s.thread - first, other = thread - first;  // huge: an earlier cluster
  if (other >= s.cluster_blocks * s.block_threads) return false;
  if (other / warp_size == mine / warp_size) return time < s.warp_time[mine / warp_size];
  const uint32_t block = mine / s.block_threads;
  return time < (other / s.block_threads == block ? s.block_time[block] : s.cluster_time);
}

// The same for the loads of a warp.
bool are_before(const State& s, const Readers& readers) {
  const uint32_t lane = s.thread % warp_size;
  const bool is_own = readers.warp == s.thread / warp_size;
  const uint32_t others = is_own ? readers.lanes & ~(uint32_t{1} << lane) : readers.lanes;
  if (others == 0) return true;
  const uint32_t other = readers.warp * warp_size + unsigned(__builtin_ctz(others));
  return is_before(s, other, readers.time);
}

std::string thread_name(const State& s, uint32_t thread) {
  return "thread " + std::to_string(thread % s.block_threads) + " of block " +
         std::to_string(thread / s.block_threads);
}

// An address of this library that tests/simt/places.py finds the line of.
std::string line_of(const void* place) {
  Dl_info info{};
  dladdr(place, &info);
  const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::ostringstream out;
  out << " (+0x" << std::hex << reinterpret_cast<uintptr_t>(place) - base - 1 << ")";
  return out.str();
}

std::string race(const State& s, const Range& range, uintptr_t address, const char* did,
                 const void* place, const std::string& other, const void* other_place = nullptr) {
  std::ostringstream message;
  message << thread_name(s, s.thread) << " " << did << " byte " << address - range.begin << " of "
          << range.name << line_of(place) << ", " << other;
  if (other_place != nullptr) message << line_of(other_place);
  return message.str();
}

Range* find(std::vector<Range>& ranges, uintptr_t address) {
  auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                [](uintptr_t a, const Range& range) { return a < range.begin; });
  if (after == ranges.begin()) return nullptr;
  Range& range = *--after;
  return address - range.begin < range.bytes.size() ? &range : nullptr;
}

Range* find(State& s, const void* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (s.last_range != nullptr && address - s.last_range->begin < s.last_range->bytes.size()) {
    return s.last_range;
  }
  Range* range = find(s.shared, address);
  if (range == nullptr) range = find(s.global, address);
  if (range != nullptr) s.last_range = range;
  return range;
}

void add_reader(const State& s, Byte& byte, const void* place) {
  const uint32_t warp = s.thread / warp_size, lane = uint32_t{1} << (s.thread % warp_size);
  const uint32_t local = warp - s.first_block * (s.block_threads / warp_size);
  const auto add = [&](Readers& readers) {
    if (readers.time < s.warp_time[local]) readers = {warp, 0, s.time, place};
    readers.lanes |= lane;
  };
  if (byte.readers.warp == warp) return add(byte.readers);
  for (Readers& other : byte.others) {
    if (other.warp == warp) return add(other);
  }
  const Readers mine{warp, lane, s.time, place};
  // Whatever comes after these loads comes after those that were before them, too.
  std::erase_if(byte.others, [&](const Readers& other) { return are_before(s, other); });
  if (byte.readers.warp == nobody || are_before(s, byte.readers)) {
    byte.readers = mine;
  } else {
    byte.others.push_back(mine);
  }
}

// Whether the copies that write a byte have arrived, as far as the current thread knows.
bool has_arrived(const State& s, const Byte& byte) {
  const Copies& copies = s.groups[byte.copies];
  if (copies.thread == nobody) return false;
  const uint32_t mine = s.thread - s.first_block * s.block_threads;
  return copies.waited[mine] || is_before(s, copies.thread, copies.time);
}

// What is wrong with a load of a byte, or nothing.
std::string fault_of_load(const State& s, const Range& range, const Byte& byte, uintptr_t address,
                          const void* place) {
  const auto told = [&](const std::string& other) {
    return race(s, range, address, "reads", place, other, byte.place);
  };
  if (byte.copies != nobody) {
    if (!has_arrived(s, byte)) return told("which a copy writes that was not waited for");
  } else if (byte.writer != nobody && !is_before(s, byte.writer, byte.written_at)) {
    return told("which " + thread_name(s, byte.writer) + " has written with no barrier between");
  }
  if (!byte.is_unknown) return {};
  return told(byte.writer == nobody ? "which nobody has written"
                                    : "which a copy brought whose source was overwritten");
}

void check_before_store(const State& s, const Range& range, const Byte& byte, uintptr_t address,
                        const void* place) {
  const auto report = [&](const std::string& other, const void* other_place) {
    stop(race(s, range, address, "writes", place, other, other_place));
  };
  if (byte.copies != nobody) {
    if (!has_arrived(s, byte)) report("which a copy writes that was not waited for", byte.place);
  } else if (byte.writer != nobody && !is_before(s, byte.writer, byte.written_at)) {
    report("which " + thread_name(s, byte.writer) + " has written with no barrier between",
           byte.place);
  }
  const auto check = [&](const Readers& readers) {
    if (readers.warp == nobody || are_before(s, readers)) return;
    const uint32_t thread = readers.warp * warp_size + unsigned(__builtin_ctz(readers.lanes));
    report("which " + thread_name(s, thread) +
               " (or another of its warp) has read with no barrier "
               "between",
           readers.place);
  };
  check(byte.readers);
  for (const Readers& other : byte.others) check(other);
}

void write(const State& s, Byte& byte, const void* place) {
  byte.writer = s.thread;
  byte.written_at = s.time;
  byte.place = place;
  byte.is_unknown = false;
  byte.copies = nobody;
  byte.readers = {};
  byte.others.clear();
}

// A copy has loaded what the current thread overwrites.
void overtake(State& s, const Range& range, Copy& copy, uintptr_t address, const void* place) {
  if (!copy.is_pending && is_before(s, copy.thread, copy.time)) return;
  copy.is_overtaken = true;
  if (copy.is_pending) return;  // what it brings will be unknown
  const auto to = reinterpret_cast<uintptr_t>(copy.to);
  Range* target = find(s.shared, to);
  if (target == nullptr) return;  // of a cluster that has ended
  for (size_t i = 0; i < copy.bytes; ++i) {
    Byte& byte = target->bytes[to - target->begin + i];
    const bool is_its = copy.copies != nobody
                            ? byte.copies == copy.copies
                            : byte.writer == copy.thread && byte.written_at == copy.time;
    if (!is_its) continue;
    if (byte.readers.warp != nobody) {
      stop(race(s, range, address, "writes", place,
                "of which a copy by " + thread_name(s, copy.thread) +
                    " was used, with no barrier between",
                copy.place));
    }
    byte.is_unknown = true;
  }
}

void overtake_copies(State& s, const Range& range, uintptr_t address, size_t bytes,
                     const void* place) {
  if (s.copies_of.empty()) return;
  for (uintptr_t vector = address / 16; vector <= (address + bytes - 1) / 16; ++vector) {
    const auto found = s.copies_of.find(vector);
    if (found == s.copies_of.end()) continue;
    for (size_t number : found->second) {
      Copy& copy = s.copies[number];
      const auto from = reinterpret_cast<uintptr_t>(copy.from);
      if (from < address + bytes && address < from + copy.bytes) {
        overtake(s, range, copy, address, place);
      }
    }
  }
}

// Calls on_byte with each byte of an access and its address.
template <typename OnByte>
void each(Range& range, const void* at, size_t bytes, const OnByte& on_byte) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  const size_t first = address - range.begin;
  const size_t last = std::min(first + bytes, range.bytes.size());
  for (size_t i = first; i < last; ++i) on_byte(range.bytes[i], range.begin + i);
}

// Whether an access makes one statement with the one before, *to = *from. The compiler may have us
// see either half first.
bool is_other_half(const State& s, size_t bytes, const void* place, const void* Copy::* had) {
  const auto apart = static_cast<const char*>(place) - static_cast<const char*>(s.half.place);
  return s.half.*had != nullptr && s.half.thread == s.thread && s.half.bytes == bytes &&
         apart >= -64 && apart <= 64;
}

// Such a statement is a copy: a race over its source is a fault only if somebody looks at what it
// has brought.
void make_copy(State& s, bool is_overtaken) {
  Copy copy = s.half;
  copy.is_pending = false;
  copy.time = s.time;
  s.half = {nobody};
  s.doubt.clear();
  each(*find(s, copy.from), copy.from, copy.bytes, [&](Byte& byte, uintptr_t) {
    const auto forget = [&](Readers& readers) {
      if (readers.warp != s.thread / warp_size) return;
      readers.lanes &= ~(uint32_t{1} << (s.thread % warp_size));
      if (readers.lanes == 0) readers = {};
    };
    forget(byte.readers);
    for (Readers& other : byte.others) forget(other);
    std::erase_if(byte.others, [](const Readers& other) { return other.warp == nobody; });
  });
  each(*find(s, copy.to), copy.to, copy.bytes,
       [&](Byte& byte, uintptr_t) { byte.is_unknown = is_overtaken; });
  s.copies_of[reinterpret_cast<uintptr_t>(copy.from) / 16].push_back(s.copies.size());
  s.copies.push_back(copy);
}

// The last access was no half of a copy.
void settle(State& s) {
  if (!s.doubt.empty()) stop(std::exchange(s.doubt, {}));
  s.half = {nobody};
}

void count_load(State& s, const Range& range, Byte& byte, bool uses_l1) {
  if (range.traffic < 0) return;
  Traffic& traffic = s.launches.back().traffic[size_t(range.traffic)];
  const uint32_t warp = s.thread / warp_size;
  const uint32_t load = s.loads[s.thread - s.first_block * s.block_threads];
  ++traffic.read;
  const uint32_t apart = load > byte.near_load ? load - byte.near_load : byte.near_load - load;
  if (!uses_l1 || byte.near_warp != warp || apart > near_loads) ++traffic.fetched;
  if (uses_l1) {
    byte.near_warp = warp;
    byte.near_load = load;
  }
  traffic.distinct_read += !byte.was_read;
  byte.was_read = true;
}

void count_store(State& s, const Range& range, Byte& byte) {
  if (range.traffic < 0) return;
  Traffic& traffic = s.launches.back().traffic[size_t(range.traffic)];
  ++traffic.written;
  traffic.distinct_written += !byte.was_written;
  byte.was_written = true;
}

// The range of an access that is to be looked at.
Range* seen(State& s, const void* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (!s.is_inside || !may_be_watched_at(address)) return nullptr;
  if (address - s.stack < s.stack_bytes) return nullptr;
  return find(s, at);
}

}  // namespace

std::vector<Launch>& launches() { return state().launches; }

void watch(const std::string& name, const void* begin, size_t bytes) {
  std::vector<Range>& ranges = state().global;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  state().last_range = nullptr;
  std::erase_if(ranges, [&](const Range& range) {
    return range.begin < address + bytes && address < range.begin + range.bytes.size();
  });
  Range range{name, address, std::vector<Byte>(bytes)};
  ranges.insert(std::upper_bound(ranges.begin(), ranges.end(), address,
                                 [](uintptr_t a, const Range& r) { return a < r.begin; }),
                std::move(range));
}

void forget_all() {
  state().global.clear();
  state().launches.clear();
  state().last_range = nullptr;
}

void begin_launch(const Launch& launch) {
  State& s = state();
  s.block_threads = launch.threads;
  s.cluster_blocks = launch.cluster;
  s.launches.push_back(launch);
  s.time = 1;
  s.copies.clear();
  s.groups.clear();
  s.half = {nobody};
  s.doubt.clear();
  s.copies_of.clear();
  for (Range& range : s.global) {
    std::vector<Traffic>& traffic = s.launches.back().traffic;
    const auto named = std::find_if(traffic.begin(), traffic.end(),
                                    [&](const Traffic& t) { return t.name == range.name; });
    range.traffic = int(named - traffic.begin());
    if (named == traffic.end()) traffic.push_back({range.name});
    std::fill(range.bytes.begin(), range.bytes.end(), Byte{});
  }
}

void begin_cluster(unsigned first_block, const std::vector<unsigned char*>& shared) {
  State& s = state();
  const size_t bytes = s.launches.back().shared_bytes;
  const unsigned threads = s.block_threads * s.cluster_blocks;
  s.first_block = first_block;
  s.warp_time.assign(threads / warp_size, 0);
  s.block_time.assign(s.cluster_blocks, 0);
  s.cluster_time = 0;
  s.loads.assign(threads, 0);
  s.last_range = nullptr;
  s.shared.clear();
  for (unsigned rank = 0; rank < shared.size(); ++rank) {
    const auto address = reinterpret_cast<uintptr_t>(shared[rank]);
    std::string name = "the shared memory of block " + std::to_string(first_block + rank);
    s.shared.push_back({std::move(name), address, std::vector<Byte>(bytes)});
  }
  std::sort(s.shared.begin(), s.shared.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (unsigned rank = 0; rank < shared.size(); ++rank) begin_block(shared[rank]);
  mark_pages();
}

void begin_block(const unsigned char* shared) {
  State& s = state();
  Range* range = find(s.shared, reinterpret_cast<uintptr_t>(shared));
  if (range == nullptr) return;  // it has none
  Byte unknown;
  unknown.is_unknown = true;
  std::fill(range->bytes.begin(), range->bytes.end(), unknown);
}

void enter(unsigned thread, const char* stack, size_t stack_bytes) {
  State& s = state();
  s.is_inside = true;
  s.thread = s.first_block * s.block_threads + thread;
  s.stack = reinterpret_cast<uintptr_t>(stack);
  s.stack_bytes = stack_bytes;
}

void leave() {
  State& s = state();
  s.is_inside = false;
  s.half = {nobody};
}

void barrier(unsigned first_thread, unsigned threads) {
  State& s = state();
  settle(s);
  ++s.time;
  for (unsigned w = first_thread / warp_size; w < (first_thread + threads) / warp_size; ++w) {
    s.warp_time[w] = s.time;
  }
  for (unsigned b = first_thread / s.block_threads; b < (first_thread + threads) / s.block_threads;
       ++b) {
    if (b * s.block_threads >= first_thread) s.block_time[b] = s.time;
  }
  if (threads == s.cluster_blocks * s.block_threads) s.cluster_time = s.time;
}

void hide(bool is_hidden) { state().is_inside = !is_hidden; }

void load(const void* from, size_t bytes, const void* place) {
  State& s = state();
  Range* range = seen(s, from);
  if (range == nullptr) return;
  const bool is_global = range->traffic >= 0;
  const bool ends_copy = is_global && is_other_half(s, bytes, place, &Copy::to);
  if (!ends_copy) settle(s);
  if (is_global) ++s.loads[s.thread - s.first_block * s.block_threads];
  std::string fault;
  each(*range, from, bytes, [&](Byte& byte, uintptr_t address) {
    if (fault.empty()) fault = fault_of_load(s, *range, byte, address, place);
    count_load(s, *range, byte, true);
    add_reader(s, byte, place);
  });
  if (!is_global) {
    if (!fault.empty()) stop(fault);
  } else if (ends_copy) {
    s.half.from = from;
    make_copy(s, !fault.empty());
  } else {
    s.half = {s.thread, bytes, nullptr, from, place};
    s.doubt = fault;
  }
}

void store(const void* to, size_t bytes, const void* place) {
  State& s = state();
  Range* range = seen(s, to);
  if (range == nullptr) return;
  const bool is_global = range->traffic >= 0;
  const bool ends_copy = !is_global && is_other_half(s, bytes, place, &Copy::from);
  if (!ends_copy) settle(s);
  each(*range, to, bytes, [&](Byte& byte, uintptr_t address) {
    check_before_store(s, *range, byte, address, place);
    count_store(s, *range, byte);
    write(s, byte, place);
  });
  if (is_global) {
    overtake_copies(s, *range, reinterpret_cast<uintptr_t>(to), bytes, place);
  } else if (ends_copy) {
    s.half.to = to;
    make_copy(s, !s.doubt.empty());
  } else {
    s.half = {s.thread, bytes, to, nullptr, place};
  }
}

void end_thread() { settle(state()); }

size_t begin_copies() {
  State& s = state();
  s.groups.push_back({{}, std::vector<bool>(s.block_threads * s.cluster_blocks), nobody, 0});
  return s.groups.size() - 1;
}

void start_copy(size_t copies, const void* to, const void* from) {
  constexpr size_t bytes = 16;
  const void* const place = LLMLOSS_PLACE;
  State& s = state();
  settle(s);
  Copy copy{s.thread, bytes, to, from, place};
  copy.copies = uint32_t(copies);
  if (Range* source = seen(s, from)) {
    each(*source, from, bytes, [&](Byte& byte, uintptr_t) {
      if (byte.writer != nobody && !is_before(s, byte.writer, byte.written_at)) {
        copy.is_overtaken = true;
      }
      count_load(s, *source, byte, false);
    });
    s.copies_of[reinterpret_cast<uintptr_t>(from) / 16].push_back(s.copies.size());
  }
  if (Range* target = seen(s, to)) {
    each(*target, to, bytes, [&](Byte& byte, uintptr_t address) {
      check_before_store(s, *target, byte, address, place);
      write(s, byte, place);
      byte.copies = copy.copies;
    });
  }
  s.groups[copies].each.push_back(s.copies.size());
  s.copies.push_back(copy);
}

void wait_for_copies(size_t number) {
  State& s = state();
  Copies& copies = s.groups[number];
  copies.waited[s.thread - s.first_block * s.block_threads] = true;
  if (copies.thread != nobody) return;
  copies.thread = s.thread;
  copies.time = s.time;
  for (size_t i : copies.each) {
    Copy& copy = s.copies[i];
    copy.is_pending = false;
    copy.thread = s.thread;
    copy.time = s.time;
    Range* target = seen(s, copy.to);
    if (target == nullptr) continue;
    each(*target, copy.to, copy.bytes,
         [&](Byte& byte, uintptr_t) { byte.is_unknown = copy.is_overtaken; });
  }
}

}  // namespace llmloss::simt::emulator::accesses

// What the compiler calls.
#define LLMLOSS_HOOKS(bytes)                                                                \
  void __tsan_read##bytes(void* at) { accesses::load(at, bytes, LLMLOSS_PLACE); }           \
  void __tsan_write##bytes(void* at) { accesses::store(at, bytes, LLMLOSS_PLACE); }         \
  void __tsan_unaligned_read##bytes(void* at) { accesses::load(at, bytes, LLMLOSS_PLACE); } \
  void __tsan_unaligned_write##bytes(void* at) { accesses::store(at, bytes, LLMLOSS_PLACE); }

namespace accesses = llmloss::simt::emulator::accesses;

extern "C" {
LLMLOSS_HOOKS(1)
LLMLOSS_HOOKS(2)
LLMLOSS_HOOKS(4)
LLMLOSS_HOOKS(8)
LLMLOSS_HOOKS(16)
void __tsan_read_range(void* at, size_t bytes) { accesses::load(at, bytes, LLMLOSS_PLACE); }
void __tsan_write_range(void* at, size_t bytes) { accesses::store(at, bytes, LLMLOSS_PLACE); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// Only the host has atomics: pybind11, and the guards of static variables.
int __tsan_atomic32_fetch_add(volatile int* at, int by, int) {
  return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST);
}
char __tsan_atomic8_load(const volatile char* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
}
