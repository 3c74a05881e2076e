// Kernels that race or do not, for tests/test_simt_accesses.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "simt_emulator.h"
#include "simt_settings.h"

namespace py = pybind11;
using namespace llmloss;

namespace {

enum class Barrier : int { none, shuffle, relaxed, warp, block, cluster };
enum class Order : int { write_read, read_write, write_write };

void wait_in(Barrier barrier) {
  if (barrier == Barrier::shuffle) simt::shuffle_xor(1, 1);
  if (barrier == Barrier::relaxed) {
    simt::cluster_arrive();
    simt::cluster_wait();
  }
  if (barrier == Barrier::warp) simt::warp_sync();
  if (barrier == Barrier::block) simt::block_sync();
  if (barrier == Barrier::cluster) simt::cluster_sync();
}

// Each thread touches its own number, and after the barrier that of thread ^ apart in the cluster,
// which is two blocks of 64 threads.
__global__ void meet(Barrier barrier, Order order, unsigned apart, float* out) {
  float* const mine = simt::dynamic_shared<float>() + simt::thread_index();
  const unsigned n = simt::block_threads(),
                 thread = simt::cluster_rank() * n + simt::thread_index();
  const unsigned other = thread ^ apart;
  float* const theirs = simt::peer_shared(simt::dynamic_shared<float>() + other % n, other / n);
  *mine = 1;
  simt::cluster_sync();
  float found = 0;
  if (order == Order::read_write) {
    found = *mine;
  } else {
    *mine = 2;
  }
  wait_in(barrier);
  if (order == Order::write_read) {
    found = *theirs;
  } else {
    *theirs = 3;
  }
  simt::cluster_sync();  // nobody ends before
  out[simt::block_index_x() * n + simt::thread_index()] = found;
}

// One number of global memory: by two blocks that no barrier joins.
__global__ void write_one(float* out) {
  if (simt::thread_index() == 0) *out = 1;
}

// What is done with a copy; where nothing is said of a barrier, there is none.
enum class Use : int {
  after_wait,
  before_wait,
  by_others,
  by_others_after_sync,
  by_others_after_wait,
  of_overwritten,
  none_of_overwritten,
  none_of_overwritten_element,
  before_overwriting,
  of_unwritten
};

// The warp copies; lane 1 may overwrite the source.
__global__ void copy(Use use, float* data, float* out) {
  float* const shared = simt::dynamic_shared<float>();
  auto* const arrival = reinterpret_cast<simt::Arrival*>(shared + 32);
  const unsigned lane = simt::lane();
  const bool overwrites = use == Use::of_overwritten || use == Use::none_of_overwritten ||
                          use == Use::none_of_overwritten_element;
  if (use == Use::of_unwritten) {
    out[lane] = shared[lane];
    return;
  }
  const bool is_element = use == Use::none_of_overwritten_element;
  if (!is_element) simt::start_copy(shared, data, 32 * sizeof(float), arrival);
  simt::warp_sync();
  const auto wait = [&] {
    if (!is_element) simt::wait_for(arrival);
  };
  if (lane == 0) {
    if (is_element) shared[0] = data[0];
    if (use == Use::before_wait) out[0] = shared[0];
    if (!overwrites) wait();
    if (use == Use::after_wait || use == Use::before_overwriting) out[0] = shared[1];
  }
  if (lane == 1 && (overwrites || use == Use::before_overwriting)) data[0] = 7;
  if (lane == 0 && overwrites) wait();
  if (use == Use::by_others_after_sync) simt::warp_sync();
  if (use == Use::by_others_after_wait && lane == 1) wait();
  if (lane == 1 && (use == Use::by_others || use == Use::by_others_after_sync ||
                    use == Use::by_others_after_wait)) {
    out[1] = shared[1];
  }
  if (lane == 0 && use == Use::of_overwritten) out[0] = shared[0];
}

}  // namespace

PYBIND11_MODULE(simt_races, m) {
  simt::bind_settings(m);
  m.def("meet", [](int barrier, int order, unsigned apart, py::array_t<float> out) {
    simt::launch(meet, {2}, 64, 2, 64 * sizeof(float), Barrier(barrier), Order(order), apart,
                 out.mutable_data());
  });
  m.def("write_one", [](unsigned blocks, py::array_t<float> out) {
    simt::launch(write_one, {blocks}, 32, 1, 0, out.mutable_data());
  });
  m.def("copy", [](int use, py::array_t<float> data, py::array_t<float> out) {
    simt::launch(copy, {1}, 32, 1, 32 * sizeof(float) + sizeof(simt::Arrival), Use(use),
                 data.mutable_data(), out.mutable_data());
  });
}
