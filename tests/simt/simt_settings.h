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
  // An empty file: no mutation.
  m.def("set_mutation", [](std::string file, unsigned line, unsigned argument) {
    emulator::settings().mutation = {std::move(file), line, argument};
  });
  // Where threads have waited so far: (what, file, line, argument).
  m.def("sites", [] {
    std::vector<std::tuple<std::string, std::string, unsigned, unsigned>> sites;
    for (const emulator::Site& site : emulator::settings().sites) {
      for (unsigned argument = 0; argument < 64; ++argument) {
        if (site.arguments >> argument & 1) {
          sites.emplace_back(emulator::name_of(site.wait), site.file, site.line, argument);
        }
      }
    }
    return sites;
  });
}

}  // namespace llmloss::simt
