// Small kernels that are right or wrong in a known way, for tests/test_simt_emulator.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "simt_emulator.h"
#include "simt_settings.h"

namespace py = pybind11;
using namespace llmloss;

namespace {

// out[block] = the sum of the block's threads' numbers, through shared memory.
template <bool first_sync, bool second_sync>
__global__ void block_sum(const float* in, float* out, unsigned rounds) {
  float* shared = simt::dynamic_shared<float>();
  float total = 0;
  for (unsigned round = 0; round < rounds; ++round) {
    float value = in[round * simt::block_threads() + simt::thread_index()];
    for (unsigned mask = 16; mask > 0; mask /= 2) value += simt::shuffle_xor(value, mask);
    if (simt::lane() == 0) shared[simt::warp_index()] = value;
    if constexpr (first_sync) simt::block_sync();
    for (unsigned w = 0; w < simt::block_threads() / 32; ++w) total += shared[w];
    if constexpr (second_sync) simt::block_sync();
  }
  if (simt::thread_index() == 0) out[simt::block_index_x()] = total;
}

// Within a warp only warp_sync stands between the writes and the reads of other lanes.
template <bool sync>
__global__ void warp_rotate(float* out) {
  float* shared = simt::dynamic_shared<float>();
  shared[simt::thread_index()] = float(simt::thread_index());
  if constexpr (sync) simt::warp_sync();
  out[simt::thread_index()] = shared[simt::warp_index() * 32 + (simt::lane() + 1) % 32];
}

__global__ void shuffles(unsigned* out) {
  const unsigned t = simt::thread_index(), n = simt::block_threads();
  out[t] = simt::shuffle_xor(t, 5);
  out[n + t] = simt::shuffle_down(t, 3);
  out[2 * n + t] = simt::shuffle(t, 7);
}

// Each block writes its number into every peer; out[block] = the sum that it finds.
template <bool first_sync, bool middle_sync>
__global__ void cluster_push(float* out) {
  float* shared = simt::dynamic_shared<float>();
  if constexpr (first_sync) simt::cluster_sync();
  if (simt::thread_index() < simt::cluster_blocks()) {
    *simt::peer_shared(shared + simt::cluster_rank(), simt::thread_index()) =
        float(simt::block_index_x() + 1);
  }
  if constexpr (middle_sync) simt::cluster_sync();
  float total = 0;
  for (unsigned b = 0; b < simt::cluster_blocks(); ++b) total += shared[b];
  if (simt::thread_index() == 0) out[simt::block_index_x()] = total;
}

// The same with the first barrier in two halves.
template <bool arrives, bool waits>
__global__ void cluster_split(float* out) {
  float* shared = simt::dynamic_shared<float>();
  if constexpr (arrives) simt::cluster_arrive();
  if constexpr (waits) simt::cluster_wait();
  if (simt::thread_index() < simt::cluster_blocks()) {
    *simt::peer_shared(shared + simt::cluster_rank(), simt::thread_index()) =
        float(simt::block_index_x() + 1);
  }
  simt::cluster_sync();
  float total = 0;
  for (unsigned b = 0; b < simt::cluster_blocks(); ++b) total += shared[b];
  if (simt::thread_index() == 0) out[simt::block_index_x()] = total;
}

// The same, reading from the peers: they must not end before all have read.
template <bool last_sync>
__global__ void cluster_pull(float* out) {
  float* shared = simt::dynamic_shared<float>();
  if (simt::thread_index() == 0) *shared = float(simt::block_index_x() + 1);
  simt::cluster_sync();
  float total = 0;
  for (unsigned b = 0; b < simt::cluster_blocks(); ++b) total += *simt::peer_shared(shared, b);
  if constexpr (last_sync) simt::cluster_sync();
  if (simt::thread_index() == 0) out[simt::block_index_x()] = total;
}

__global__ void half_syncs() {
  if (simt::thread_index() < 32) simt::block_sync();
}

__global__ void meet_apart() {
  if (simt::thread_index() < 32) {
    simt::block_sync();
  } else {
    simt::block_sync();
  }
}

__global__ void lane_missing(float* out) {
  if (simt::lane() != 3) *out = simt::shuffle_xor(1.0f, 1);
}

__global__ void write_shared_at(unsigned index) {
  simt::dynamic_shared<unsigned char>()[index] = 1;
}

__global__ void read_at(const unsigned char* pointer, unsigned char* out) { *out = *pointer; }

__global__ void load_vector(const unsigned char* pointer) { simt::check_aligned(pointer, 16); }

float* data(py::array_t<float>& a) { return a.mutable_data(); }

}  // namespace

PYBIND11_MODULE(simt_selftest, m) {
  simt::bind_settings(m);
  m.def("block_sum", [](bool first, bool second, unsigned threads, py::array_t<float> in,
                        py::array_t<float> out) {
    const auto kernel =
        first ? (second ? block_sum<true, true> : block_sum<true, false>) : block_sum<false, true>;
    const unsigned rounds = unsigned(in.size()) / threads;
    simt::launch(kernel, {unsigned(out.size())}, threads, 1, threads / 32 * sizeof(float),
                 in.data(), data(out), rounds);
  });
  m.def("warp_rotate", [](bool sync, py::array_t<float> out) {
    const unsigned threads = unsigned(out.size());
    simt::launch(sync ? warp_rotate<true> : warp_rotate<false>, {1}, threads, 1,
                 threads * sizeof(float), data(out));
  });
  m.def("shuffles", [](py::array_t<unsigned> out) {
    simt::launch(shuffles, {1}, unsigned(out.size()) / 3, 1, 0, out.mutable_data());
  });
  m.def("cluster_push", [](bool first, bool middle, unsigned cluster, py::array_t<float> out) {
    const auto kernel = first ? (middle ? cluster_push<true, true> : cluster_push<true, false>)
                              : cluster_push<false, true>;
    simt::launch(kernel, {unsigned(out.size())}, 64, cluster, cluster * sizeof(float), data(out));
  });
  m.def("cluster_split", [](bool arrives, bool waits, unsigned cluster, py::array_t<float> out) {
    const auto kernel = waits ? (arrives ? cluster_split<true, true> : cluster_split<false, true>)
                              : cluster_split<true, false>;
    simt::launch(kernel, {unsigned(out.size())}, 64, cluster, cluster * sizeof(float), data(out));
  });
  m.def("cluster_pull", [](bool last, unsigned cluster, py::array_t<float> out) {
    simt::launch(last ? cluster_pull<true> : cluster_pull<false>, {unsigned(out.size())}, 64,
                 cluster, sizeof(float), data(out));
  });
  m.def("half_syncs", [] { simt::launch(half_syncs, {6}, 96, 1, 0); });
  m.def("meet_apart", [] { simt::launch(meet_apart, {1}, 64, 1, 0); });
  m.def("lane_missing",
        [](py::array_t<float> out) { simt::launch(lane_missing, {1}, 32, 1, 0, data(out)); });
  m.def("write_shared_at",
        [](unsigned index) { simt::launch(write_shared_at, {1}, 32, 1, 40, index); });
  m.def("read_at", [](uintptr_t address, py::array_t<uint8_t> out) {
    simt::launch(read_at, {1}, 32, 1, 0, reinterpret_cast<const unsigned char*>(address),
                 out.mutable_data());
  });
  m.def("load_vector", [](uintptr_t address) {
    simt::launch(load_vector, {1}, 32, 1, 0, reinterpret_cast<const unsigned char*>(address));
  });
}
