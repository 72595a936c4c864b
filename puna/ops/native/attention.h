// Tokens over the keys and values of their texts, which lie in blocks: one by one, or stretches of a text (prompt.h).

static inline Lanes load_any(const void* x, bool bf16, int64_t at) {
    if (!bf16) return load(static_cast<const float*>(x) + at);
    typedef uint16_t Words __attribute__((vector_size(32), aligned(2), may_alias));
    Words words = *reinterpret_cast<const Words*>(static_cast<const Half*>(x) + at);
    Ints wide = __builtin_convertvector(words, Ints) << 16;
    return reinterpret_cast<Lanes&>(wide);
}

static inline const char* behind(const void* x, bool bf16, int64_t count) {
    return static_cast<const char*>(x) + count * (bf16 ? 2 : 4);
}

// The query heads of one key/value head of one token: scores of all it sees, softmax, the sum of values.
static void attend_head(const Pool& pool, bool bf16, int64_t row, int64_t kv, const float* q, float* scores,
                        float* out) {
    int64_t dim = pool.head_dim, group = pool.heads / pool.kv_heads, length = pool.lengths[row];
    int64_t room = (length + LANES - 1) / LANES * LANES;
    auto place = [&](int64_t s) {  // where token s lies in the pool, in elements
        int64_t block = pool.tables[row * pool.width + s / pool.block];
        return ((block * pool.kv_heads + kv) * pool.block + s % pool.block) * dim;
    };
    for (int64_t start = 0; start < length; start += pool.block) {
        int64_t at = place(start), stop = least(start + pool.block, length);
        for (int64_t s = start; s < stop; s++, at += dim)
            for (int64_t g = 0; g < group; g++) {
                Lanes product{};
                for (int64_t d = 0; d < dim; d += LANES)
                    product += load(q + g * dim + d) * load_any(pool.keys, bf16, at + d);
                scores[g * room + s] = sum(product);
            }
    }
    for (int64_t g = 0; g < group; g++) softmax(scores + g * room, length);
    for (int64_t i = 0; i < group * dim; i++) out[i] = 0;
    for (int64_t start = 0; start < length; start += pool.block) {
        int64_t at = place(start), stop = least(start + pool.block, length);
        for (int64_t s = start; s < stop; s++, at += dim)
            for (int64_t g = 0; g < group; g++)
                for (int64_t d = 0; d < dim; d += LANES) {
                    Lanes more = scores[g * room + s] * load_any(pool.values, bf16, at + d);
                    store(out + g * dim + d, load(out + g * dim + d) + more);
                }
    }
}

// Where stretches of up to STRETCH tokens of one text begin among the rows; returns how many there are.
static int64_t stretches(const Pool& pool, int64_t rows, int64_t most, int64_t* first) {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t* table = pool.tables + r * pool.width;
        bool goes_on = r > 0 && r - first[count - 1] < most && pool.lengths[r] == pool.lengths[r - 1] + 1 &&
                       memcmp(table, table - pool.width, pool.width * sizeof(int64_t)) == 0;
        if (!goes_on) first[count++] = r;
    }
    first[count] = rows;
    return count;
}

// q (rows, heads, dim) -> out, after k and v (rows, kv_heads, dim) are stored. dim is a multiple of 16.
static void attend(const Call& call, const Pool& pool, const void* q, const void* k, const void* v, void* out) {
    int64_t dim = pool.head_dim, group = pool.heads / pool.kv_heads, units = call.rows * pool.kv_heads;
    float scale = 1 / sqrtf(float(dim));
    bool bf16 = call.bf16, together = STRETCH > 1 && bf16 && dim % 32 == 0 && pool.block % 32 == 0;
    team().run(call.threads, [&](int thread) {
        Scratch& scratch = team().scratch(thread);
        team().share(units, 1, [&](int64_t unit, int64_t) {
            int64_t row = unit / pool.kv_heads, kv = unit % pool.kv_heads;
            int64_t at = ((pool.blocks[row] * pool.kv_heads + kv) * pool.block + pool.slots[row]) * dim;
            memcpy(const_cast<char*>(behind(pool.keys, bf16, at)), behind(k, bf16, unit * dim), dim * (bf16 ? 2 : 4));
            memcpy(const_cast<char*>(behind(pool.values, bf16, at)), behind(v, bf16, unit * dim), dim * (bf16 ? 2 : 4));
        });
        team().barrier();  // a token may see what another row has stored
        float* query = scratch.take<float>(group * dim);
        float* sums = scratch.take<float>(group * dim);
        float* scores = scratch.take<float>(group * (pool.width * pool.block + LANES));
        int64_t* first = scratch.take<int64_t>(call.rows + 1);
        int64_t count = stretches(pool, call.rows, together ? STRETCH : 1, first);
        Stretch stretch(pool, scratch);
        team().share(count * pool.kv_heads, 1, [&](int64_t unit, int64_t) {
            int64_t row = first[unit / pool.kv_heads], stop = first[unit / pool.kv_heads + 1], kv = unit % pool.kv_heads;
            if (together) {
                stretch.attend(row, stop - row, kv, static_cast<const Half*>(q), scale, static_cast<Half*>(out));
                return;
            }
            for (; row < stop; row++) {
                int64_t at = (row * pool.kv_heads + kv) * group * dim;
                widen(behind(q, bf16, at), bf16, group * dim, query);
                for (int64_t i = 0; i < group * dim; i++) query[i] *= scale;
                attend_head(pool, bf16, row, kv, query, scores, sums);
                narrow(sums, bf16, group * dim, const_cast<char*>(behind(out, bf16, at)));
            }
        });
    });
}
