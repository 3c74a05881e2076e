// The CPU kernels compiled for any processor.
// Everything from outside is included before the target changes: inline functions of the standard
// library must not be compiled for more than the processor at hand.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define LLMLOSS_ISA portable
#include "vec_portable.h"

#include "row_kernels.h"
