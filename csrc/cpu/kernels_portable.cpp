// The CPU kernels compiled for any processor.
// Include every foreign header before the target changes: inline functions of the standard library
// must not be compiled for instructions that the processor may lack.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define LLMLOSS_ISA portable
#include "vec_portable.h"

#include "row_kernels.h"
