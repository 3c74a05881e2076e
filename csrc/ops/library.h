// What each file of operators adds to the library, whose name is known to library.cpp alone:
// another name takes the compilation of one small file.
#pragma once

#include "torch_compat.h"  // before torch's

#include <torch/csrc/stable/library.h>

namespace llmloss::ops {

using Library = torch::stable::detail::StableLibrary;  // what STABLE_TORCH_LIBRARY hands out

// For tensors of a device.
void register_cpu(Library& m);   // cpu_ops.cpp
void register_cuda(Library& m);  // cuda_ops.cpp

// Without tensors.
void register_cpu_isa(Library& m);      // cpu_ops.cpp
void register_fields(Library& m);       // fields.cpp
void register_launch_plan(Library& m);  // plan_ops.cpp

}  // namespace llmloss::ops
