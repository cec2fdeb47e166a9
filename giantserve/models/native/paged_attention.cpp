// One query a sequence over paged keys and values: decode attention on a CPU.
//
// Flash attention's running softmax over tiles of tokens; each block is read once, where it lies. Part
// of a library that knows nothing of Python or torch: native_library.py loads it, native_attention.py
// says what a call expects.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

constexpr int TILE = 64;   // tokens whose softmax is computed at once
constexpr long SPAN = 256; // tokens that one thread sums up: longer sequences are several's

// The fields of native_attention.Attention.
struct Attention {
    void *out;
    const void *query, *keys, *values;
    const int64_t *rows, *tables, *lengths;
    const float *sinks;
    int64_t num_sequences, table_width, num_heads, kv_heads, key_dim, value_dim, block_size;
    int64_t query_row_stride, query_head_stride;
    int64_t key_block_stride, key_token_stride, value_block_stride, value_token_stride;
    int64_t window;
    float scaling, softcap;
};

// Tokens [begin, end) of one sequence. The first span of several says how many they are; where
// the sums of one among several go is `partial`.
struct Span {
    long sequence, begin, end, partial, num_spans;
    bool is_whole;
};

template class std::vector<float>;  // once for all instruction sets, so for the least of them

#define KERNEL "paged_attention.h"
#include "instruction_sets.h"

namespace {

std::vector<Span> find_spans(const Attention &task) {
    std::vector<Span> spans;
    long num_partials = 0;
    for (long sequence = 0; sequence < task.num_sequences; ++sequence) {
        const long length = task.lengths[sequence];
        const long first = task.window > 0 ? std::max(0L, length - long(task.window)) : 0;
        const long count = (length - 1) / SPAN - first / SPAN + 1;
        for (long i = 0; i < count; ++i) {
            const long begin = std::max(first, (first / SPAN + i) * SPAN);
            const long end = std::min(length, (first / SPAN + i + 1) * SPAN);
            spans.push_back({sequence, begin, end, num_partials, i == 0 ? count : 0, count == 1});
            num_partials += count > 1;
        }
    }
    return spans;
}

}  // namespace

extern "C" {

// Of the whole library: another where any function's arguments are others (native_library._VERSION).
int kernels_version() { return 1; }

// The highest x86-64 level of instructions that this CPU and the library know, 0 where there is none.
int best_level() {
    if (__builtin_cpu_supports("x86-64-v4")) return 4;
    return __builtin_cpu_supports("x86-64-v3") ? 3 : 0;
}

// By which a caller sees that it has the same fields.
int64_t attention_bytes() { return sizeof(Attention); }

// With a level up to the best. `is_bfloat16`: query, keys, values and out; fp32 otherwise.
void attend_decodes(const Attention *task, int level, bool is_bfloat16, int num_threads) {
    const std::vector<Span> spans = find_spans(*task);
    const long num_partials = spans.empty() ? 0 : spans.back().partial + !spans.back().is_whole;
    std::vector<float> partials(num_partials * task->num_heads * (task->value_dim + 2));
    using Attend = void(const Attention &, const std::vector<Span> &, float *, int);
    Attend *const attend[2][2] = {
        {x86_64_v3::attend<x86_64_v3::Single>, x86_64_v3::attend<x86_64_v3::Brain>},
        {x86_64_v4::attend<x86_64_v4::Single>, x86_64_v4::attend<x86_64_v4::Brain>},
    };
    attend[level >= 4][is_bfloat16](*task, spans, partials.data(), num_threads);
}
}
