// Includes the file KERNEL once for each instruction set, after vectors.h: in the namespace x86_64_v4
// for AVX-512, in x86_64_v3 for AVX2.

#if !defined(__x86_64__)
#error "no kernel for this CPU: torch computes in its place"
#endif

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace x86_64_v4 {
#define LANES 16
#include "vectors.h"
#include KERNEL
#undef LANES
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace x86_64_v3 {
#define LANES 8
#include "vectors.h"
#include KERNEL
#undef LANES
}
#pragma GCC pop_options
