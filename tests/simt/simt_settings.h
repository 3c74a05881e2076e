// The emulator's settings, for Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt_emulator.h"

namespace llmloss::simt {

// Where accesses are seen (accesses.h).
inline void bind_accesses(pybind11::module_& m) {
  namespace accesses = emulator::accesses;
  namespace py = pybind11;
  m.def("watch", [](const std::string& name, uintptr_t begin, size_t bytes) {
    accesses::watch(name, reinterpret_cast<const void*>(begin), bytes);
  });
  m.def("forget_all", accesses::forget_all);
  // Of each launch so far, by the name of the memory: the bytes of Traffic.
  m.def("launches", [] {
    std::vector<py::dict> launches;
    for (const emulator::Launch& launch : accesses::launches()) {
      py::dict told;
      for (const emulator::Traffic& t : launch.traffic) {
        told[t.name.c_str()] =
            py::dict(py::arg("read") = t.read, py::arg("fetched") = t.fetched,
                     py::arg("written") = t.written, py::arg("distinct_read") = t.distinct_read,
                     py::arg("distinct_written") = t.distinct_written);
      }
      launches.push_back(told);
    }
    return launches;
  });
}

inline void bind_settings(pybind11::module_& m) {
  if constexpr (emulator::accesses::are_seen) bind_accesses(m);
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
