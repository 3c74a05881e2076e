// Runs CUDA kernels on the host, so that their logic can be tested without a GPU.
//
// Each CUDA thread is a fiber that runs until it waits: at a barrier of its block or cluster, or in
// a shuffle of its warp. Which thread goes on then is the schedule's choice: the lowest index
// first, the highest first, or a seeded random one. So warps drift as far apart as the barriers let
// them, and a missing barrier gives a wrong answer under one schedule or another. Beyond that:
// - a barrier or shuffle that not all of its threads reach, or reach at different places in the
//   source, is an error that says which threads wait where;
// - the shared memory of each block is a heap block of exactly the asked size, between canaries (or
//   AddressSanitizer's red zones), poisoned before the block starts and once it has ended, so that
//   a block that looks into a peer of its cluster too early or too late finds poison;
// - a fault (a test may put rows before unreadable pages) ends the launch, not the process;
// - any one barrier can be taken away and any one shuffle altered at run time, by its place in the
//   source: mutants that need no compiler.
//
// Compiled so that every access is seen (accesses.h), it counts bytes and finds races, also where
// no schedule would show a wrong value. What it cannot show is speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "accesses.h"
#include "core/dtypes.h"
#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

namespace llmloss::simt {

struct Grid {
  unsigned x = 1;
};

namespace emulator {

using Place = std::source_location;

inline constexpr unsigned warp_size = 32;
inline constexpr size_t canary_bytes = 64;
inline constexpr unsigned char canary = 0xa5;

enum class Schedule : int { forward, reverse, random };
enum class Wait : unsigned char {
  block_sync,
  warp_sync,
  cluster_sync,
  cluster_arrive,
  cluster_wait,
  shuffle_xor,
  shuffle_down,
  shuffle,
  copies
};

inline const char* name_of(Wait wait) {
  static constexpr const char* names[] = {"block_sync",     "warp_sync",    "cluster_sync",
                                          "cluster_arrive", "cluster_wait", "shuffle_xor",
                                          "shuffle_down",   "shuffle",      "wait_for"};
  return names[int(wait)];
}

inline const char* file_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// A place in the source where threads wait, and the arguments that shuffles were given there.
struct Site {
  Wait wait;
  std::string file;
  unsigned line;
  uint64_t arguments;  // bit i: a shuffle by or from i was done
};

// Takes away the barrier at a place, or makes its shuffles by `argument` return the own value.
struct Mutation {
  std::string file;  // empty: none
  unsigned line = 0;
  unsigned argument = 0;
};

struct Settings {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 0;
  Mutation mutation;
  std::vector<Site> sites;  // visited since they were last cleared
  void (*on_launch)(const void* kernel) = nullptr;
};

inline Settings& settings() {
  static Settings settings;
  return settings;
}

// Sixteen bytes in one instruction, which faults on the device where the address is not aligned.
struct alignas(16) [[gnu::may_alias]] Words {
  uint32_t at[4];
};

// A warp's copy to shared memory. It may read and write at any time until somebody has waited for
// it: here it writes as late as possible, and reads at once or as late.
struct Copy {
  struct Piece {
    void* to;
    const void* from;
    Words words;
  };
  std::vector<Piece> pieces;
  unsigned lanes = 0;  // that have started it
  unsigned rank = 0;   // of the block
  size_t number = 0;   // of accesses.h
  bool reads_late = false;
  bool has_arrived = false;

  void arrive() {
    accesses::wait_for_copies(number);
    if (std::exchange(has_arrived, true)) return;
    accesses::hide(true);
    for (Piece& piece : pieces) {
      std::memcpy(piece.to, reads_late ? piece.from : &piece.words, sizeof(Words));
    }
    accesses::hide(false);
  }
};

struct Thread {
  enum class State : unsigned char { fresh, ready, waiting, ended };

  Context context;
  State state = State::fresh;
  Wait wait = Wait::block_sync;
  unsigned argument = 0;  // of the shuffle
  Place place;
  const void* give = nullptr;  // the lane's value, on its stack
  void* take = nullptr;
  size_t arrivals = 0;  // by cluster_arrive
};

// The threads that wait for each other: those of a warp, a block or a cluster, next to each other.
struct Group {
  unsigned first = 0;
  unsigned size = 0;
  unsigned arrived = 0;
};

// Shared memory of exactly the asked size.
class SharedMemory {
 public:
  SharedMemory() = default;
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
#if !defined(__SANITIZE_ADDRESS__)
    margin_ = canary_bytes;
#endif
    // malloc and not aligned_alloc, whose size must be a multiple: no byte behind the end is ours.
    // Both C libraries and AddressSanitizer align it to 16 bytes, as the hardware does.
    memory_.reset(static_cast<unsigned char*>(std::malloc(bytes + 2 * margin_)));
    if (memory_ == nullptr) throw std::bad_alloc();
    std::memset(memory_.get(), canary, margin_);
    std::memset(data() + bytes_, canary, margin_);
  }

  unsigned char* data() const { return memory_.get() + margin_; }
  size_t bytes() const { return bytes_; }
  void fill(unsigned char value) { std::memset(data(), value, bytes_); }
  bool is_filled(unsigned char value) const { return all_are(data(), bytes_, value); }
  bool canaries_live() const {
    return all_are(memory_.get(), margin_, canary) && all_are(data() + bytes_, margin_, canary);
  }

 private:
  static bool all_are(const unsigned char* at, size_t n, unsigned char value) {
    for (size_t i = 0; i < n; ++i) {
      if (at[i] != value) return false;
    }
    return true;
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  size_t bytes_ = 0;
  size_t margin_ = 0;
};

// The blocks of one cluster, which run together; a launch without clusters has clusters of one.
class Cluster {
 public:
  Cluster(Grid grid, unsigned threads, unsigned blocks, size_t shared_bytes)
      : grid_(grid), block_threads_(threads), blocks_(blocks), random_(settings().seed * 2 + 1) {
    if (threads == 0 || threads % warp_size != 0 || threads > 1024) {
      throw std::invalid_argument("simt: a block must be 1 to 32 whole warps");
    }
    if (blocks == 0 || grid.x % blocks != 0) {
      throw std::invalid_argument("simt: the grid must be whole clusters along x");
    }
    const unsigned count = threads * blocks;
    threads_.resize(count);
    ready_.assign((count + 63) / 64, 0);
    add_groups(warps_, warp_size);
    add_groups(block_groups_, threads);
    add_groups(cluster_group_, count);
    for (unsigned b = 0; b < blocks; ++b) shared_.emplace_back(shared_bytes);
    running_.resize(blocks);
  }

  // Runs `body` as every thread of the blocks first_x, first_x + 1, ...
  void run(unsigned first_x, void (*body)(const void*), const void* argument) {
    first_x_ = first_x;
    body_ = body;
    argument_ = argument;
    error_.clear();
    ended_ = arrivals_ = 0;
    copies_.clear();
    // Each schedule has its own poison, so that what reads it differs from schedule to schedule:
    // nan in every float, a large finite float, a tiny one.
    static constexpr unsigned char poisons[] = {0xff, 0x7f, 0x2a};
    poison_ = poisons[int(settings().schedule)];
    for (auto& memory : shared_) memory.fill(poison_);
    for (auto& running : running_) running = 0;
    for (auto* groups : {&warps_, &block_groups_, &cluster_group_}) {
      for (Group& group : *groups) group.arrived = 0;
    }
    for (unsigned t = 0; t < threads_.size(); ++t) {
      threads_[t].state = Thread::State::fresh;
      threads_[t].arrivals = 0;
      threads_[t].context.prepare(stacks()[t], entry);
      set_ready(t);
    }
    active() = this;
    begin_accesses();
    while (ended_ < threads_.size()) {
      const int64_t next = choose();
      if (next < 0) fail("threads wait for others that never come");
      current_ = unsigned(next);
      ready_[current_ / 64] &= ~(uint64_t{1} << (current_ % 64));
      begin_thread();
      accesses::enter(current_, stacks()[current_], stack_bytes);
      Context::switch_to(host_, threads_[current_].context);
      accesses::leave();
      if (!error_.empty()) fail(error_);
    }
    for (unsigned b = 0; b < blocks_; ++b) {
      if (!shared_[b].canaries_live()) fail("shared memory was written out of bounds");
      if (!shared_[b].is_filled(poison_)) fail("a block wrote to a peer that had ended");
    }
  }

  static Cluster*& active() {
    static Cluster* cluster = nullptr;
    return cluster;
  }

  // What a thread asks of itself.
  unsigned thread_index() const { return current_ % block_threads_; }
  unsigned block_threads() const { return block_threads_; }
  unsigned rank() const { return current_ / block_threads_; }
  unsigned blocks() const { return blocks_; }
  unsigned block_x() const { return first_x_ + rank(); }
  Grid grid() const { return grid_; }
  SharedMemory& shared(unsigned rank) {
    if (rank >= blocks_) stop("there is no block of rank " + std::to_string(rank));
    return shared_[rank];
  }

  // Waits for all threads of the warp, block or cluster; a shuffle exchanges `bytes` bytes then.
  void wait(Wait wait, const Place& place, unsigned argument = 0, const void* give = nullptr,
            void* take = nullptr, size_t bytes = 0) {
    Thread& thread = threads_[current_];
    const bool is_shuffle = bytes != 0;
    if (!is_shuffle && is_mutated(place, 0)) {
      record(wait, place, argument);
      return;
    }
    thread.state = Thread::State::waiting;
    thread.wait = wait;
    thread.argument = argument;
    thread.place = place;
    thread.give = give;
    thread.take = take;
    Group& group = group_of(wait);
    if (++group.arrived == group.size) {
      group.arrived = 0;
      check_together(group);
      record(wait, place, argument);
      if (is_shuffle) {
        exchange(group, bytes);
      } else {
        accesses::barrier(group.first, group.size);
      }
      for (unsigned t = group.first; t < group.first + group.size; ++t) set_ready(t);
    }
    Context::switch_to(thread.context, host_);
  }

  // The halves of a cluster's barrier. A cluster of one block has none.
  void arrive(const Place& place) {
    record(Wait::cluster_arrive, place, 0);
    if (blocks_ == 1) return;
    ++threads_[current_].arrivals;
    if (is_mutated(place, 0)) return;
    if (++arrivals_ % threads_.size() != 0) return;
    for (unsigned t = 0; t < threads_.size(); ++t) {
      const Thread& thread = threads_[t];
      if (thread.state == Thread::State::waiting && thread.wait == Wait::cluster_wait) set_ready(t);
    }
  }

  void wait_for_arrivals(const Place& place) {
    record(Wait::cluster_wait, place, 0);
    if (blocks_ == 1 || is_mutated(place, 0)) return;
    Thread& thread = threads_[current_];
    if (thread.arrivals == 0) stop("cluster_wait without cluster_arrive");
    if (arrivals_ >= thread.arrivals * threads_.size()) return;
    thread.state = Thread::State::waiting;
    thread.wait = Wait::cluster_wait;
    thread.place = place;
    Context::switch_to(thread.context, host_);
  }

  // A lane's part of a warp's copy.
  void start_copy(void* to, const void* from, size_t bytes, const void* arrival) {
    Copy& copy = copies_[arrival];
    copy.rank = rank();
    copy.reads_late = settings().schedule == Schedule::reverse;
    if (copy.lanes == 0) copy.number = accesses::begin_copies();
    if (++copy.lanes > warp_size) stop("an arrival was used twice");
    const unsigned lane = current_ % warp_size;
    for (size_t at = lane * sizeof(Words); at < bytes; at += warp_size * sizeof(Words)) {
      Copy::Piece piece{static_cast<char*>(to) + at, static_cast<const char*>(from) + at, {}};
      accesses::start_copy(copy.number, piece.to, piece.from);
      accesses::hide(true);
      std::memcpy(&piece.words, piece.from, sizeof(Words));
      accesses::hide(false);
      copy.pieces.push_back(piece);
    }
  }

  void wait_for_copy(const void* arrival, const Place& place) {
    record(Wait::copies, place, 0);
    if (is_mutated(place, 0)) return;
    const auto found = copies_.find(arrival);
    if (found == copies_.end() || found->second.lanes < warp_size) {
      stop("waits for a copy that has not been started");
    }
    found->second.arrive();
  }

  // Ends the launch from within a thread.
  [[noreturn]] void stop(const std::string& message) {
    error_ = message;
    Context::switch_to(threads_[current_].context, host_, true);
    std::abort();
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error("simt: " + message + "; " + where_all_are());
  }

  // "block 2: thread 5 at work; threads 0-31 wait in block_sync (reduce.cuh:40)"
  std::string where_all_are() const {
    std::ostringstream out;
    for (unsigned b = 0; b < blocks_; ++b) {
      out << (b == 0 ? "" : "; ") << "block " << first_x_ + b << ":";
      for (unsigned t = 0; t < block_threads_;) {
        const std::string first = where_is(b * block_threads_ + t);
        unsigned last = t;
        while (last + 1 < block_threads_ && where_is(b * block_threads_ + last + 1) == first)
          ++last;
        out << (t == 0 ? " " : ", ") << "threads " << t << "-" << last << " " << first;
        t = last + 1;
      }
    }
    return out.str();
  }

 private:
  static Stacks& stacks() {
    static Stacks stacks;
    return stacks;
  }

  static void entry() {
    Cluster& self = *active();
    self.threads_[self.current_].context.arrived(self.host_);
    self.body_(self.argument_);
    accesses::end_thread();
    Thread& thread = self.threads_[self.current_];
    thread.state = Thread::State::ended;
    ++self.ended_;
    if (--self.running_[self.rank()] == 0) {
      for (const auto& [arrival, copy] : self.copies_) {
        if (copy.rank == self.rank() && !copy.has_arrived) {
          self.stop("a block has ended before its copies have arrived");
        }
      }
      self.forget_shared(self.rank());
    }
    Context::switch_to(thread.context, self.host_, true);
    std::abort();
  }

  void begin_accesses() {
    std::vector<unsigned char*> shared;
    for (const SharedMemory& memory : shared_) shared.push_back(memory.data());
    accesses::begin_cluster(first_x_, shared);
  }

  void forget_shared(unsigned rank) {
    shared_[rank].fill(poison_);
    accesses::begin_block(shared_[rank].data());
  }

  void begin_thread() {
    Thread& thread = threads_[current_];
    if (thread.state == Thread::State::fresh && running_[rank()] == 0) {
      forget_shared(rank());  // what a peer wrote before is lost
      running_[rank()] = block_threads_;
    }
    thread.state = Thread::State::ready;
  }

  void add_groups(std::vector<Group>& groups, unsigned size) {
    for (unsigned first = 0; first < threads_.size(); first += size)
      groups.push_back({first, size});
  }

  Group& group_of(Wait wait) {
    if (wait == Wait::cluster_sync) return cluster_group_[0];
    if (wait == Wait::block_sync) return block_groups_[rank()];
    return warps_[current_ / warp_size];
  }

  void set_ready(unsigned t) { ready_[t / 64] |= uint64_t{1} << (t % 64); }

  // The next thread to run; -1: none can.
  int64_t choose() {
    const size_t words = ready_.size();
    if (settings().schedule == Schedule::reverse) {
      for (size_t w = words; w-- > 0;) {
        if (ready_[w] != 0) return int64_t(w * 64 + 63 - size_t(__builtin_clzll(ready_[w])));
      }
      return -1;
    }
    // Forward: the first one; random: the first one from a random place on.
    const size_t start =
        settings().schedule == Schedule::random ? next_random() % threads_.size() : 0;
    const uint64_t from_start = ready_[start / 64] & (~uint64_t{0} << (start % 64));
    if (from_start != 0) return int64_t(start / 64 * 64 + size_t(__builtin_ctzll(from_start)));
    for (size_t i = 1; i <= words; ++i) {
      const size_t w = (start / 64 + i) % words;
      if (ready_[w] != 0) return int64_t(w * 64 + size_t(__builtin_ctzll(ready_[w])));
    }
    return -1;
  }

  uint64_t next_random() {  // xorshift64*
    random_ ^= random_ >> 12;
    random_ ^= random_ << 25;
    random_ ^= random_ >> 27;
    return (random_ * 0x2545f4914f6cdd1dULL) >> 16;
  }

  void check_together(const Group& group) {
    const Thread& first = threads_[group.first];
    for (unsigned t = group.first + 1; t < group.first + group.size; ++t) {
      const Thread& other = threads_[t];
      if (other.wait != first.wait || other.place.line() != first.place.line() ||
          other.place.file_name() != first.place.file_name()) {
        stop("threads meet at different places");
      }
    }
  }

  void exchange(const Group& warp, size_t bytes) {
    for (unsigned lane = 0; lane < warp.size; ++lane) {
      const Thread& thread = threads_[warp.first + lane];
      unsigned source = thread.argument % warp_size;
      if (thread.wait == Wait::shuffle_xor) source = lane ^ thread.argument;
      if (thread.wait == Wait::shuffle_down) source = lane + thread.argument;
      // Beyond the last lane the hardware returns the own value.
      if (source >= warp_size || is_mutated(thread.place, thread.argument)) source = lane;
      std::memcpy(thread.take, threads_[warp.first + source].give, bytes);
    }
  }

  static bool is_mutated(const Place& place, unsigned argument) {
    const Mutation& mutation = settings().mutation;
    return mutation.line == place.line() && mutation.argument == argument &&
           mutation.file == file_name(place.file_name());
  }

  static void record(Wait wait, const Place& place, unsigned argument) {
    const uint64_t bit = uint64_t{1} << (argument % 64);
    for (Site& site : settings().sites) {
      if (site.line == place.line() && site.wait == wait &&
          site.file == file_name(place.file_name())) {
        site.arguments |= bit;
        return;
      }
    }
    settings().sites.push_back({wait, file_name(place.file_name()), place.line(), bit});
  }

  std::string where_is(unsigned t) const {
    const Thread& thread = threads_[t];
    if (thread.state == Thread::State::ended) return "have returned";
    if (thread.state != Thread::State::waiting) return t == current_ ? "at work" : "are ready";
    return std::string("wait in ") + name_of(thread.wait) + " (" +
           file_name(thread.place.file_name()) + ":" + std::to_string(thread.place.line()) + ")";
  }

  Grid grid_;
  unsigned block_threads_;
  unsigned blocks_;
  uint64_t random_;
  unsigned first_x_ = 0;
  unsigned current_ = 0;
  size_t ended_ = 0;
  size_t arrivals_ = 0;                           // of all threads
  std::unordered_map<const void*, Copy> copies_;  // by where they tell of their arrival
  unsigned char poison_ = 0xff;
  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
  std::string error_;
  Context host_;
  std::vector<Thread> threads_;
  std::vector<uint64_t> ready_;  // one bit a thread
  std::vector<Group> warps_, block_groups_, cluster_group_;
  std::vector<SharedMemory> shared_;
  std::vector<unsigned> running_;  // threads of each block that have not ended; 0: not begun
};

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer reports faults itself.
struct FaultGuard {
  template <typename Run>
  void operator()(const Run& run) const {
    run();
  }
};
#else
// Turns a fault of a thread into an exception of the launch.
class FaultGuard {
 public:
  template <typename Run>
  void operator()(const Run& run) {
    static char stack[size_t{64} << 10];  // the fault may come from a stack that is full
    stack_t alternative{}, stack_before;
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof(stack);
    sigaltstack(&alternative, &stack_before);
    struct sigaction action = {}, segv_before, bus_before;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_before);
    sigaction(SIGBUS, &action, &bus_before);
    const auto restore = [&] {
      sigaction(SIGSEGV, &segv_before, nullptr);
      sigaction(SIGBUS, &bus_before, nullptr);
      sigaltstack(&stack_before, nullptr);
    };
    if (sigsetjmp(resume(), 1) != 0) {
      restore();
      std::ostringstream message;
      message << "unreadable memory was touched at " << address();
      Cluster::active()->fail(message.str());
    }
    try {
      run();
    } catch (...) {
      restore();
      throw;
    }
    restore();
  }

 private:
  static sigjmp_buf& resume() {
    static sigjmp_buf buffer;
    return buffer;
  }
  static void*& address() {
    static void* address = nullptr;
    return address;
  }
  static void on_fault(int, siginfo_t* info, void*) {
    address() = info->si_addr;
    siglongjmp(resume(), 1);
  }
};
#endif

// The blocks of a grid in the order of the schedule.
inline std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  if (settings().schedule == Schedule::reverse) {
    for (unsigned i = 0; i < count; ++i) order[i] = count - 1 - i;
  }
  if (settings().schedule == Schedule::random) {
    uint64_t state = settings().seed * 2 + 1;
    for (unsigned i = count; i > 1; --i) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      std::swap(order[i - 1], order[(state >> 33) % i]);
    }
  }
  return order;
}

__attribute__((used)) inline void accesses::stop(const std::string& message) {
  Cluster::active()->stop(message);
}

template <typename T>
T shuffled(Wait wait, T value, unsigned argument, const Place& place) {
  static_assert(std::is_trivially_copyable_v<T>);
  T result;
  Cluster::active()->wait(wait, place, argument, &value, &result, sizeof(T));
  return result;
}

}  // namespace emulator

// Runs the kernel over the grid, one cluster after the other.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, unsigned block_threads,
            unsigned cluster_blocks, size_t shared_bytes, const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  const Call call{kernel, {arguments...}};
  const auto body = [](const void* argument) {
    const Call& call = *static_cast<const Call*>(argument);
    std::apply(call.kernel, call.arguments);
  };
  emulator::Cluster cluster(grid, block_threads, cluster_blocks, shared_bytes);
  const auto* address = reinterpret_cast<const void*>(kernel);
  if (emulator::settings().on_launch != nullptr) emulator::settings().on_launch(address);
  emulator::accesses::begin_launch({reinterpret_cast<const void*>(kernel),
                                    grid.x,
                                    block_threads,
                                    cluster_blocks,
                                    shared_bytes,
                                    {}});
  const std::vector<unsigned> order = emulator::order_of(grid.x / cluster_blocks);
  emulator::FaultGuard{}([&] {
    for (unsigned i : order) cluster.run(i * cluster_blocks, body, &call);
  });
}

// The built-ins, under the names that csrc/cuda/device/simt.cuh gives them on the device.
inline unsigned thread_index() { return emulator::Cluster::active()->thread_index(); }
inline unsigned block_threads() { return emulator::Cluster::active()->block_threads(); }
inline unsigned block_index_x() { return emulator::Cluster::active()->block_x(); }
inline unsigned grid_x() { return emulator::Cluster::active()->grid().x; }
inline unsigned lane() { return thread_index() % emulator::warp_size; }
inline unsigned warp_index() { return thread_index() / emulator::warp_size; }
inline unsigned cluster_rank() { return emulator::Cluster::active()->rank(); }
inline unsigned cluster_blocks() { return emulator::Cluster::active()->blocks(); }

inline void block_sync(emulator::Place place = emulator::Place::current()) {
  emulator::Cluster::active()->wait(emulator::Wait::block_sync, place);
}
inline void warp_sync(emulator::Place place = emulator::Place::current()) {
  emulator::Cluster::active()->wait(emulator::Wait::warp_sync, place);
}
inline void cluster_sync(emulator::Place place = emulator::Place::current()) {
  emulator::Cluster::active()->wait(emulator::Wait::cluster_sync, place);
}

inline void cluster_arrive(emulator::Place place = emulator::Place::current()) {
  emulator::Cluster::active()->arrive(place);
}
inline void cluster_wait(emulator::Place place = emulator::Place::current()) {
  emulator::Cluster::active()->wait_for_arrivals(place);
}

template <typename T>
T shuffle_xor(T value, unsigned lane_mask, emulator::Place place = emulator::Place::current()) {
  return emulator::shuffled(emulator::Wait::shuffle_xor, value, lane_mask, place);
}
template <typename T>
T shuffle_down(T value, unsigned delta, emulator::Place place = emulator::Place::current()) {
  return emulator::shuffled(emulator::Wait::shuffle_down, value, delta, place);
}
template <typename T>
T shuffle(T value, unsigned source_lane, emulator::Place place = emulator::Place::current()) {
  return emulator::shuffled(emulator::Wait::shuffle, value, source_lane, place);
}

template <typename T>
T* dynamic_shared() {
  emulator::Cluster& cluster = *emulator::Cluster::active();
  return reinterpret_cast<T*>(cluster.shared(cluster.rank()).data());
}

// Where the block of that rank has what this block has at `mine`.
template <typename T>
T* peer_shared(T* mine, unsigned rank) {
  emulator::Cluster& cluster = *emulator::Cluster::active();
  auto* base = cluster.shared(cluster.rank()).data();
  const auto offset = reinterpret_cast<unsigned char*>(mine) - base;
  if (offset < 0 || size_t(offset) > cluster.shared(rank).bytes()) {
    cluster.stop("peer_shared of what is not shared memory");
  }
  return reinterpret_cast<T*>(cluster.shared(rank).data() + offset);
}

using emulator::Words;

// Vector loads and stores fault on the device where they are not aligned.
inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    emulator::Cluster::active()->stop("a vector load or store is not aligned");
  }
}

// One access each, inlined, so that accesses.h sees the kernel's place.
__forceinline__ Words load_words(const void* from) {
  check_aligned(from, sizeof(Words));
  return *static_cast<const Words*>(from);
}

__forceinline__ void store_words(void* to, const Words& words) {
  check_aligned(to, sizeof(Words));
  *static_cast<Words*>(to) = words;
}

using Arrival = uint64_t;

inline void start_copy(void* shared, const void* global, int bytes, Arrival* arrival) {
  if (bytes > 0) check_aligned(shared, sizeof(Words));
  if (bytes > 0) check_aligned(global, sizeof(Words));
  check_aligned(arrival, sizeof(Arrival));
  emulator::Cluster::active()->start_copy(shared, global, size_t(bytes), arrival);
}

inline void wait_for(const Arrival* arrival, emulator::Place place = emulator::Place::current()) {
  emulator::Cluster::active()->wait_for_copy(arrival, place);
}

template <typename T>
uint32_t max_pairs(uint32_t a, uint32_t b, T) {
  const auto larger = [](uint32_t a, uint32_t b) {
    const float x = to_real(T{uint16_t(a)}), y = to_real(T{uint16_t(b)});
    return x >= y || y != y ? a & 0xffffu : b & 0xffffu;
  };
  return larger(a, b) | larger(a >> 16, b >> 16) << 16;
}

inline uint32_t middle_half(uint32_t low, uint32_t high) { return low >> 16 | high << 16; }

template <typename T>
uint32_t pack_pair(float low, float high, T) {
  T pair[2];
  from_real(low, pair[0]);
  from_real(high, pair[1]);
  return uint32_t{pair[0].bits} | uint32_t{pair[1].bits} << 16;
}

// As far from 2^x as the hardware may be: two bits of the result are gone, and so is what is not
// normal. Exact where the hardware is exact.
inline float fast_exp2(float x) {
  const float exact = std::exp2(x);
  if (!(exact >= 0x1p-126f)) return exact == exact ? 0 : exact;
  uint32_t bits;
  std::memcpy(&bits, &exact, sizeof(bits));
  bits &= ~uint32_t{3};
  float result;
  std::memcpy(&result, &bits, sizeof(bits));
  return result;
}

// The reciprocal loses a bit, too.
inline float fast_tanh(float x) {
  const float sum = fast_exp2(2.8853900817779268f * x) + 1.0f;
  return std::fma(-2.0f, 1.0f / sum * (1 - 0x1p-23f), 1.0f);
}

}  // namespace llmloss::simt
