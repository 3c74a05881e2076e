// Sees every access of the emulated threads to memory that they share: counts the bytes of global
// memory, and finds races.
//
// The compiler calls a function at each load and store of what it compiles with -fsanitize=thread.
// Those functions are ours (accesses.cpp) and not ThreadSanitizer's, which knows neither a barrier
// that orders nothing, nor a copy that arrives later, nor which memory is which. A library compiled
// without that option has none of this, and the calls below do nothing.
//
// Two accesses of different threads to one byte, of which one is a store, race unless a barrier of
// a group that holds both threads was completed between them. Shuffles order nothing, and neither
// do the two halves of a cluster's barrier. An asynchronous copy may load and store at any time
// until somebody has waited for it; whoever touches its target without having waited, nor a barrier
// since somebody has, or before that its source by a store, races. What a copy to shared memory
// brings, also that of one element by one statement, is unknown if its source was overwritten: that
// is a fault only once it is looked at. So is shared memory that nobody has written.
//
// It does not see what a call's return value is stored to, if the call is not inlined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace llmloss::simt::emulator {

// Of a kernel's launch, for one named range of global memory. Bytes are counted once for each
// access of each thread, except where noted.
struct Traffic {
  std::string name;
  int64_t read = 0;
  int64_t fetched = 0;  // without those that the same warp has read a moment ago: L1 has them
  int64_t written = 0;
  int64_t distinct_read = 0;  // each byte once
  int64_t distinct_written = 0;
};

struct Launch {
  const void* kernel = nullptr;
  unsigned blocks = 0, threads = 0, cluster = 0;
  size_t shared_bytes = 0;
  std::vector<Traffic> traffic;
};

// A load whose byte the same warp has read so many of its thread's loads ago, or fewer, is served
// by L1: a batch of skewed vectors (load_skewed) is twice as many loads as vectors.
inline constexpr unsigned near_loads = 8;

namespace accesses {

// Names a range of global memory for the launches to come; only named memory is watched.
void watch(const std::string& name, const void* begin, size_t bytes);
void forget_all();

std::vector<Launch>& launches();

// What the emulator tells. Its threads are numbered over the cluster, first block first.
#if defined(__SANITIZE_THREAD__) || defined(LLMLOSS_SIMT_HOOKS)
inline constexpr bool are_seen = true;
void begin_launch(const Launch& launch);
void end_thread();
void begin_cluster(unsigned first_block, const std::vector<unsigned char*>& shared);
void begin_block(const unsigned char* shared);  // nobody has written there
void enter(unsigned thread, const char* stack, size_t stack_bytes);
void leave();  // what the host does is not seen
void barrier(unsigned first_thread, unsigned threads);
// A number for copies that are waited for together.
size_t begin_copies();
// Of sixteen bytes.
void start_copy(size_t copies, const void* to, const void* from);
void wait_for_copies(size_t copies);  // by the current thread
void hide(bool is_hidden);            // the emulator's own accesses, which are no kernel's
#else
inline constexpr bool are_seen = false;
inline void begin_launch(const Launch&) {}
inline void end_thread() {}
inline void begin_cluster(unsigned, const std::vector<unsigned char*>&) {}
inline void begin_block(const unsigned char*) {}
inline void enter(unsigned, const char*, size_t) {}
inline void leave() {}
inline void barrier(unsigned, unsigned) {}
inline size_t begin_copies() { return 0; }
inline void start_copy(size_t, const void*, const void*) {}
inline void wait_for_copies(size_t) {}
inline void hide(bool) {}
#endif

// Ends the launch with this message; the emulator defines it.
[[noreturn]] void stop(const std::string& message);

}  // namespace accesses
}  // namespace llmloss::simt::emulator
