// Norms and gated activations on a CPU, each in one sweep over memory. Part of the same library as
// paged_attention.cpp; fused.py says what a call expects.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

constexpr long SMALL = 32 << 10;  // bytes that one thread has done before another would begin

#define KERNEL "elementwise.h"
#include "instruction_sets.h"

extern "C" {

// out = weight * nearest(row / sqrt(mean(row^2) + epsilon)) for each row of `dim` elements.
// `is_bfloat16`: all three; fp32 otherwise. `level` is one up to best_level().
void rms_norm(const void *rows, const void *weight, void *out, int64_t num_rows, int64_t dim,
              float epsilon, int level, bool is_bfloat16, int num_threads) {
    using Normalise = void(const void *, const void *, void *, long, long, float, int);
    Normalise *const normalise[2][2] = {
        {x86_64_v3::normalise<x86_64_v3::Single>, x86_64_v3::normalise<x86_64_v3::Brain>},
        {x86_64_v4::normalise<x86_64_v4::Single>, x86_64_v4::normalise<x86_64_v4::Brain>},
    };
    normalise[level >= 4][is_bfloat16](rows, weight, out, num_rows, dim, epsilon, num_threads);
}

// gate = nearest(silu(gate)) * up, `count` elements.
void silu_multiply(void *gate, const void *up, int64_t count, int level, bool is_bfloat16,
                   int num_threads) {
    using Gate = void(void *, const void *, long, int);
    Gate *const gates[2][2] = {
        {x86_64_v3::gate<x86_64_v3::Single>, x86_64_v3::gate<x86_64_v3::Brain>},
        {x86_64_v4::gate<x86_64_v4::Single>, x86_64_v4::gate<x86_64_v4::Brain>},
    };
    gates[level >= 4][is_bfloat16](gate, up, count, num_threads);
}
}
