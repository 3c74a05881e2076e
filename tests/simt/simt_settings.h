// The emulator's settings, for Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt_emulator.h"

namespace llmloss::simt {

inline void bind_settings(pybind11::module_& m) {
  m.def("set_schedule", [](int schedule, uint64_t seed) {
    emulator::settings().schedule = emulator::Schedule(schedule);
    emulator::settings().seed = seed;
  });
}

}  // namespace llmloss::simt
