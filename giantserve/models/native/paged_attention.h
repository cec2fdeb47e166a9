// Attention of decodes over paged KV, for one instruction set (instruction_sets.h).
//
// Everything is computed in fp32 and in an order that depends on a sequence's own length alone:
// neither its neighbours, nor its blocks, nor the number of threads show in the bits.

constexpr int MOST_HEADS = LANES == 8 ? 4 : 8;  // that share a loaded key: as many as registers hold
constexpr int LINE = 64;                        // bytes that come to the caches together

struct alignas(4 * LANES) WordRow {
    Words words;
};

// One step of a transpose: rows i and i + STEP exchange every other run of STEP lanes.
template <int STEP>
static inline void exchange(Words (&rows)[LANES]) {
    Ints low, high;
    for (int lane = 0; lane < LANES; ++lane) {
        low[lane] = lane & STEP ? lane - STEP + LANES : lane;
        high[lane] = lane & STEP ? lane + LANES : lane + STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
        if (i & STEP) continue;
        const Words first = rows[i], second = rows[i + STEP];
        rows[i] = __builtin_shuffle(first, second, low);
        rows[i + STEP] = __builtin_shuffle(first, second, high);
    }
}

// The keys at `offset` of LANES tokens, with the tokens side by side: arranged[word][token].
static inline void arrange_keys(const char *const *tokens, long offset, int num_words,
                                WordRow *arranged) {
    int word = 0;
    for (; word + LANES <= num_words; word += LANES) {
        Words rows[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) rows[i] = load<Words>(tokens[i] + offset + 4 * word);
        exchange<1>(rows);
        exchange<2>(rows);
        if constexpr (LANES > 4) exchange<4>(rows);
        if constexpr (LANES > 8) exchange<8>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) arranged[word + i].words = rows[i];
    }
    for (; word < num_words; ++word)
        for (int i = 0; i < LANES; ++i)
            arranged[word].words[i] = load<uint32_t>(tokens[i] + offset + 4 * word);
}

// scores[head][token] = query[head] . key[token], of HEADS heads and LANES tokens. Meanwhile the keys
// at `offset` of the tokens `next` come to the caches.
template <class E, int HEADS>
static inline void score(const WordRow *arranged, int num_words, const float *query, float *scores,
                         const char *const *next, long offset) {
    const int dim = num_words * E::PER_WORD;
    Floats sums[HEADS] = {};
    for (int word = 0; word < num_words; ++word) {
        const Words words = arranged[word].words;
        __builtin_prefetch(next[word % LANES] + offset + word / LANES * 4 * LANES);
#pragma GCC unroll 2
        for (int part = 0; part < E::PER_WORD; ++part) {
            const Floats key = E::part(words, part);
            const float *element = query + word * E::PER_WORD + part;
#pragma GCC unroll 8
            for (int head = 0; head < HEADS; ++head) sums[head] += key * element[head * dim];
        }
    }
#pragma GCC unroll 8
    for (int head = 0; head < HEADS; ++head) store(scores + head * TILE, sums[head]);
}

// Up to TILE tokens: where the keys and values of each one's first KV head lie.
struct Tile {
    int num_tokens;
    const char *keys[TILE], *values[TILE];
};

// out[head] += weights[head][token] * value[token], of HEADS heads. Meanwhile the tile `next` comes
// to the caches: it has to be asked for at a steady pace, since a queue that is full drops it.
//
// Whole vectors of values stand in `out` as their words fall apart: `write_head` joins them.
template <class E, int HEADS>
static inline void weigh(const Attention &task, const Tile &tile, const Tile &next, long kv_head,
                         const float *weights, float *out) {
    constexpr int WORDS = 2 / E::PER_WORD, BYTES = 4 * LANES * WORDS;
    const int dim = task.value_dim, bytes = dim * E::SIZE;
    const long values_at = long(kv_head) * bytes;
    int at = 0;
    for (; at + BYTES <= bytes; at += BYTES) {
        float *to = out + at / E::SIZE;
        Floats sums[HEADS][2];
#pragma GCC unroll 8
        for (int head = 0; head < HEADS; ++head)
            for (int i = 0; i < 2; ++i) sums[head][i] = load<Floats>(to + head * dim + i * LANES);
        for (int token = 0; token < tile.num_tokens; ++token) {
            const char *value = tile.values[token] + values_at + at;
            Floats values[2];
            for (int i = 0; i < 2; ++i)
                values[i] = E::part(load<Words>(value + 4 * LANES * (i % WORDS)), i / WORDS);
            if (token < next.num_tokens)
                for (int byte = at; byte < at + BYTES; byte += LINE)
                    __builtin_prefetch(next.values[token] + values_at + byte);
#pragma GCC unroll 8
            for (int head = 0; head < HEADS; ++head)
                for (int i = 0; i < 2; ++i) sums[head][i] += values[i] * weights[head * TILE + token];
        }
#pragma GCC unroll 8
        for (int head = 0; head < HEADS; ++head)
            for (int i = 0; i < 2; ++i) store(to + head * dim + i * LANES, sums[head][i]);
    }
    for (; at < bytes; at += E::SIZE)
        for (int head = 0; head < HEADS; ++head)
            for (int token = 0; token < tile.num_tokens; ++token)
                out[head * dim + at / E::SIZE] +=
                    weights[head * TILE + token] * E::element(tile.values[token] + values_at + at);
}

// What a thread computes with: the running softmax of all heads of one sequence, and room.
struct Work {
    std::vector<float> query, out, maxima, sums;
    std::vector<WordRow> arranged;
    Tile tiles[2] = {};

    Work(const Attention &task, long num_words)
        : query(task.num_heads * task.key_dim),
          out(task.num_heads * task.value_dim),
          maxima(task.num_heads),
          sums(task.num_heads),
          arranged(TILE / LANES * num_words) {}
};

// HEADS query heads of one KV head over one tile.
template <class E, int HEADS>
static inline void attend_tile(const Attention &task, const Tile &tile, const Tile &next,
                               long head, Work &work) {
    alignas(64) float weights[HEADS * TILE];
    const long kv_head = head / (task.num_heads / task.kv_heads);
    const int num_words = task.key_dim * E::SIZE / 4;
    const int padded = (tile.num_tokens + LANES - 1) / LANES * LANES;
    for (int first = 0; first < padded; first += LANES)
        score<E, HEADS>(work.arranged.data() + first / LANES * num_words, num_words,
                        work.query.data() + head * task.key_dim, weights + first, next.keys + first,
                        kv_head * task.key_dim * E::SIZE);
    float *out = work.out.data() + head * task.value_dim;
    for (int i = 0; i < HEADS; ++i) {
        float *row = weights + i * TILE, &maximum = work.maxima[head + i];
        if (task.softcap > 0)
            for (int token = 0; token < tile.num_tokens; ++token)
                row[token] = task.softcap * std::tanh(row[token] / task.softcap);
        std::fill(row + tile.num_tokens, row + padded, LOWEST);
        Floats most = all(maximum);
        for (int first = 0; first < padded; first += LANES) {
            const Floats scores = load<Floats>(row + first);
            most = scores > most ? scores : most;
        }
        const float decay = std::exp(maximum - largest(most));
        maximum = largest(most);
        Floats total = {};
        for (int first = 0; first < padded; first += LANES) {
            const Floats weight = exponential(load<Floats>(row + first) - maximum);
            store(row + first, weight);
            total += weight;
        }
        work.sums[head + i] = work.sums[head + i] * decay + sum(total);
        if (decay != 1)
            for (int element = 0; element < task.value_dim; ++element)
                out[i * task.value_dim + element] *= decay;
    }
    weigh<E, HEADS>(task, tile, next, kv_head, weights, out);
}

// As many of heads [head, stop) as fill groups of HEADS. Returns the first that is left.
template <class E, int HEADS>
static inline long attend_heads(const Attention &task, const Tile &tile, const Tile &next,
                                long head, long stop, Work &work) {
    for (; head + HEADS <= stop; head += HEADS) attend_tile<E, HEADS>(task, tile, next, head, work);
    return head;
}

template <class E>
static void load_query(const Attention &task, const Span &span, Work &work) {
    const char *row = static_cast<const char *>(task.query) +
                      task.rows[span.sequence] * task.query_row_stride * E::SIZE;
    for (long head = 0; head < task.num_heads; ++head)
        for (long i = 0; i < task.key_dim; ++i)
            work.query[head * task.key_dim + i] =
                E::element(row + (head * task.query_head_stride + i) * E::SIZE) * task.scaling;
    std::fill(work.out.begin(), work.out.end(), 0.0f);
    std::fill(work.maxima.begin(), work.maxima.end(), LOWEST);
    std::fill(work.sums.begin(), work.sums.end(), 0.0f);
}

// The tile from token `begin` on.
template <class E>
static void find_tile(const Attention &task, const Span &span, long begin, Tile &tile) {
    const int64_t *table = task.tables + span.sequence * task.table_width;
    tile.num_tokens = int(std::min<long>(TILE, span.end - begin));
    for (int i = 0; i < TILE; ++i) {  // what is past the last token has to be readable
        const long token = begin + std::min(i, tile.num_tokens - 1);
        const long block = table[token / task.block_size], slot = token % task.block_size;
        tile.keys[i] = static_cast<const char *>(task.keys) +
                       (block * task.key_block_stride + slot * task.key_token_stride) * E::SIZE;
        tile.values[i] =
            static_cast<const char *>(task.values) +
            (block * task.value_block_stride + slot * task.value_token_stride) * E::SIZE;
    }
}

// One query head's output, of which `out` holds the weighted sum of values.
template <class E>
static void write_head(const Attention &task, long sequence, long head, const float *out,
                       float maximum, float total) {
    float factor = 1 / total;
    if (task.sinks != nullptr) {
        const float sink = task.sinks[head], most = std::max(maximum, sink);
        const float decay = std::exp(maximum - most);
        factor = decay / (total * decay + std::exp(sink - most));
    }
    const long dim = task.value_dim;
    char *to = static_cast<char *>(task.out) +
               (task.rows[sequence] * task.num_heads + head) * dim * E::SIZE;
    long i = 0;
    for (; i + 2 * LANES <= dim; i += 2 * LANES)
        E::put(to + i * E::SIZE, load<Floats>(out + i) * factor,
               load<Floats>(out + i + LANES) * factor);
    for (; i < dim; ++i) E::put(to + i * E::SIZE, out[i] * factor);
}

// A span that is a whole sequence gives its output, another what `merge` needs of it.
template <class E>
static void finish(const Attention &task, const Span &span, const Work &work, float *partials) {
    const long heads = task.num_heads, dim = task.value_dim;
    if (!span.is_whole) {
        float *to = partials + span.partial * heads * (dim + 2);
        std::copy(work.maxima.begin(), work.maxima.end(), to);
        std::copy(work.sums.begin(), work.sums.end(), to + heads);
        std::copy(work.out.begin(), work.out.end(), to + 2 * heads);
        return;
    }
    for (long head = 0; head < heads; ++head)
        write_head<E>(task, span.sequence, head, &work.out[head * dim], work.maxima[head],
                      work.sums[head]);
}

// The output of a sequence of several spans, the first of which is `first`.
template <class E>
static void merge(const Attention &task, const Span &first, const float *partials, Work &work) {
    const long heads = task.num_heads, dim = task.value_dim, stride = heads * (dim + 2);
    const float *from = partials + first.partial * stride;
    for (long head = 0; head < heads; ++head) {
        float maximum = LOWEST, total = 0;
        for (long i = 0; i < first.num_spans; ++i)
            maximum = std::max(maximum, from[i * stride + head]);
        float *out = &work.out[head * dim];
        std::fill_n(out, dim, 0.0f);
        for (long i = 0; i < first.num_spans; ++i) {
            const float *span = from + i * stride;
            const float decay = std::exp(span[head] - maximum);
            total += span[heads + head] * decay;
            for (long element = 0; element < dim; ++element)
                out[element] += span[2 * heads + head * dim + element] * decay;
        }
        write_head<E>(task, first.sequence, head, out, maximum, total);
    }
}

// Spans [first, stop), one after the other; while one tile is computed, the next is on its way.
template <class E>
static void attend_spans(const Attention &task, const Span *first, const Span *stop,
                         float *partials, Work &work) {
    const int num_words = int(task.key_dim * E::SIZE / 4);
    const long group = task.num_heads / task.kv_heads;
    Tile *tile = &work.tiles[0], *next = &work.tiles[1];
    find_tile<E>(task, *first, first->begin, *tile);
    for (const Span *span = first; span < stop; ++span) {
        load_query<E>(task, *span, work);
        for (long begin = span->begin; begin < span->end; begin += TILE) {
            if (begin + TILE < span->end)
                find_tile<E>(task, *span, begin + TILE, *next);
            else if (span + 1 < stop)
                find_tile<E>(task, span[1], span[1].begin, *next);
            else
                next->num_tokens = 0;
            for (long kv_head = 0; kv_head < task.kv_heads; ++kv_head) {
                for (int i = 0; i < tile->num_tokens; i += LANES)
                    arrange_keys(tile->keys + i, kv_head * task.key_dim * E::SIZE, num_words,
                                 work.arranged.data() + i / LANES * num_words);
                const long stop_head = (kv_head + 1) * group;
                long head = kv_head * group;
                if constexpr (MOST_HEADS == 8)
                    head = attend_heads<E, 8>(task, *tile, *next, head, stop_head, work);
                head = attend_heads<E, 4>(task, *tile, *next, head, stop_head, work);
                head = attend_heads<E, 2>(task, *tile, *next, head, stop_head, work);
                attend_heads<E, 1>(task, *tile, *next, head, stop_head, work);
            }
            std::swap(tile, next);
        }
        finish<E>(task, *span, work, partials);
    }
}

template <class E>
static void attend(const Attention &task, const std::vector<Span> &spans, float *partials,
                   int num_threads) {
    const long num_spans = long(spans.size());
    const long together = std::max(1L, num_spans / (8L * num_threads));
#pragma omp parallel num_threads(num_threads)
    {
        Work work(task, task.key_dim * E::SIZE / 4);
#pragma omp for schedule(dynamic)
        for (long first = 0; first < num_spans; first += together)
            attend_spans<E>(task, &spans[first], &spans[0] + std::min(first + together, num_spans),
                            partials, work);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < num_spans; ++i)
            if (spans[i].num_spans > 1) merge<E>(task, spans[i], partials, work);
    }
}
