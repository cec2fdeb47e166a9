// Vectors of LANES floats, and the element types that fall into them: part of every kernel, within the
// namespace of one instruction set.

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

template <class T>
static inline T load(const void *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
static inline void store(void *to, T value) {
    std::memcpy(to, &value, sizeof value);
}

static inline Floats all(float value) { return value - Floats{}; }

static inline float largest(Floats values) {
    float found = values[0];
    for (int i = 1; i < LANES; ++i) found = std::max(found, values[i]);
    return found;
}

static inline float sum(Floats values) {
    float found = 0;
    for (int i = 0; i < LANES; ++i) found += values[i];
    return found;
}

// exp(x) for x <= 0, to 2 units in the last place, 0 below -87, NaN for NaN. The polynomial is
// Cephes' expf.
static inline Floats exponential(Floats x) {
    const Floats bounded = x < -87.0f ? all(-87.0f) : x;
    const Ints power = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Ints);
    const Floats whole = __builtin_convertvector(power, Floats);
    const Floats rest = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Floats result = all(1.9875691500e-4f);
    result = result * rest + 1.3981999507e-3f;
    result = result * rest + 8.3334519073e-3f;
    result = result * rest + 4.1665795894e-2f;
    result = result * rest + 1.6666665459e-1f;
    result = result * rest + 5.0000001201e-1f;
    result = result * rest * rest + rest + 1.0f;
    return x < -87.0f ? Floats{} : result * (Floats)((power + 127) << 23);
}

// The element types of tensors. A 32-bit word holds PER_WORD elements, and a
// vector of words falls into that many of floats: first the first elements of all words. `nearest`
// are the values that elements can have.
struct Single {
    static constexpr int SIZE = 4, PER_WORD = 1;
    static inline Floats nearest(Floats values) { return values; }
    static inline Floats part(Words words, int) { return (Floats)words; }
    static inline float element(const char *from) { return load<float>(from); }
    static inline void put(char *to, float value) { store(to, value); }
    static inline void put(char *to, Floats first, Floats second) {
        store(to, first);
        store(to + sizeof first, second);
    }
};

struct Brain {
    static constexpr int SIZE = 2, PER_WORD = 2;
    static inline Floats part(Words words, int index) {
        return (Floats)(index ? words & 0xffff0000u : words << 16);
    }
    static inline float element(const char *from) {
        const uint32_t bits = uint32_t(load<uint16_t>(from)) << 16;
        return load<float>(&bits);
    }
    static inline Words rounded(Floats values) {  // to nearest, ties to even
        const Words bits = (Words)values;
        const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
        return values == values ? nearest : 0x7fc00000u - Words{};
    }
    static inline Floats nearest(Floats values) { return (Floats)(rounded(values) & 0xffff0000u); }
    static inline void put(char *to, float value) {
        store(to, uint16_t(rounded(all(value))[0] >> 16));
    }
    static inline void put(char *to, Floats first, Floats second) {
        store(to, rounded(first) >> 16 | (rounded(second) & 0xffff0000u));
    }
};
