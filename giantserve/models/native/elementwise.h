// Norms and gated activations, for one instruction set (instruction_sets.h).
//
// Computed in fp32 and rounded where transformers' modules round. A row's bits depend on it alone.

template <class E>
constexpr int PAIR = 2 * LANES * E::SIZE;  // bytes of the elements that are computed with at once

struct Pair {
    Floats first, second;
};

template <class E>
static inline Pair load_pair(const char *from) {
    if constexpr (E::PER_WORD == 2) {
        const Words words = load<Words>(from);
        return {E::part(words, 0), E::part(words, 1)};
    } else {
        return {load<Floats>(from), load<Floats>(from + sizeof(Floats))};
    }
}

// The last elements of a row, zeros after them, so that they are computed like all others.
template <class E>
struct Padded {
    char bytes[PAIR<E>] = {};
    Padded(const char *from, long count) { std::memcpy(bytes, from, count); }
};

template <class E>
static inline Floats squares(const char *from) {
    const Pair values = load_pair<E>(from);
    return values.first * values.first + values.second * values.second;
}

// to = weight * nearest(from * scale)
template <class E>
static inline void scale_pair(const char *from, const char *weight, float scale, char *to) {
    const Pair values = load_pair<E>(from), factors = load_pair<E>(weight);
    E::put(to, E::nearest(values.first * scale) * factors.first,
           E::nearest(values.second * scale) * factors.second);
}

template <class E>
static void normalise_row(const char *row, const char *weight, char *out, long dim, float epsilon) {
    const long bytes = dim * E::SIZE, whole = bytes / PAIR<E> * PAIR<E>;
    Floats total = {};
    for (long at = 0; at < whole; at += PAIR<E>) total += squares<E>(row + at);
    if (whole < bytes) total += squares<E>(Padded<E>(row + whole, bytes - whole).bytes);
    const float scale = 1 / std::sqrt(sum(total) / dim + epsilon);
    for (long at = 0; at < whole; at += PAIR<E>)
        scale_pair<E>(row + at, weight + at, scale, out + at);
    if (whole < bytes) {
        Padded<E> last(row + whole, bytes - whole), factors(weight + whole, bytes - whole);
        scale_pair<E>(last.bytes, factors.bytes, scale, last.bytes);
        std::memcpy(out + whole, last.bytes, bytes - whole);
    }
}

template <class E>
static void normalise(const void *rows, const void *weight, void *out, long num_rows, long dim,
                      float epsilon, int num_threads) {
    const long bytes = dim * E::SIZE;
#pragma omp parallel for num_threads(num_threads) if (num_rows * bytes > SMALL)
    for (long row = 0; row < num_rows; ++row)
        normalise_row<E>(static_cast<const char *>(rows) + row * bytes,
                         static_cast<const char *>(weight), static_cast<char *>(out) + row * bytes,
                         dim, epsilon);
}

// x / (1 + e^-x)
static inline Floats silu(Floats x) {
    const Floats decay = exponential(x < 0 ? x : -x);
    return x * (x < 0 ? decay : all(1)) / (decay + 1);
}

template <class E>
static inline void gate_pair(char *gate, const char *up) {
    const Pair gates = load_pair<E>(gate), values = load_pair<E>(up);
    E::put(gate, E::nearest(silu(gates.first)) * values.first,
           E::nearest(silu(gates.second)) * values.second);
}

template <class E>
static void gate(void *gates, const void *ups, long count, int num_threads) {
    char *to = static_cast<char *>(gates);
    const char *from = static_cast<const char *>(ups);
    const long bytes = count * E::SIZE, whole = bytes / PAIR<E> * PAIR<E>;
#pragma omp parallel for num_threads(num_threads) if (bytes > SMALL)
    for (long at = 0; at < whole; at += PAIR<E>) gate_pair<E>(to + at, from + at);
    if (whole < bytes) {
        Padded<E> last(to + whole, bytes - whole), up(from + whole, bytes - whole);
        gate_pair<E>(last.bytes, up.bytes);
        std::memcpy(to + whole, last.bytes, bytes - whole);
    }
}
