// The error for a target that is not a class.
#pragma once

#include <sstream>
#include <stdexcept>

#include "arguments.h"

namespace llmloss::ops {

// Raises an IndexError in Python for the first target that is neither a class nor ignored.
// `targets` must be in host memory.
inline void check_targets_on_host(const Targets& targets, const Tensor& shape, int64_t rows,
                                  int64_t vocab_size) {
  for (int64_t row = 0; row < rows; ++row) {
    const RowTarget target(targets, row);
    if (target.is_ignored() || target.is_active(vocab_size)) [[likely]]
      continue;
    std::ostringstream message;
    message << "Target " << target.value() << " at position ";
    if (shape.dim() == 2) {
      const int64_t inner = shape.size(1);
      message << "(" << row / inner << ", " << row % inner << ")";
    } else {
      message << row;
    }
    message << " is out of bounds: expected a class in [0, " << vocab_size
            << ") or ignore_index = " << targets.ignore_index << ".";
    throw std::out_of_range(message.str());
  }
}

}  // namespace llmloss::ops
