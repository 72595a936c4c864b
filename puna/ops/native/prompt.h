// Attention of a stretch of one text's tokens together: each key and value is read once for all of them.
// A softmax that goes on from block to block of keys (Milakov and Gimelshein 2018), its weights rounded to bf16 for the
// product with the values, as blocked attention has it.

constexpr int64_t STRETCH = 16;  // tokens
constexpr int64_t SPAN = 64;     // keys at a time

// Values of PANEL tokens as panels of 32 dims whose inputs are the tokens, (SPAN, dim). The `count` first are the
// text's; what another text left behind them counts as zero, since 0 * NaN is not masked.
static void fill_values(const Half* rows, int64_t first, int64_t count, int64_t dim, int32_t* panels) {
    for (int64_t d = 0; d < dim; d += 16) {
        int32_t* panel = panels + d / PANEL * (SPAN / 2) * PANEL + d % PANEL;
        for (int64_t t = 0; t < PANEL; t += 2) {
            __mmask16 here = t < count ? 0xffff : 0, next = t + 1 < count ? 0xffff : 0;
            __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, rows + t * dim + d));
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next, rows + (t + 1) * dim + d));
            _mm512_store_si512(panel + (first + t) / 2 * PANEL, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

// One row of scores (SPAN,) of which the first `seen` count -> their weights in bf16; (largest, total) go on.
// Returns what earlier sums have to be multiplied by.
static inline float weigh(float* scores, int64_t seen, float scale, float& largest, float& total, Half* weights) {
    Lanes x[SPAN / LANES], top = all(largest);
    for (int64_t i = 0; i < SPAN / LANES; i++) {
        __mmask16 mask = __mmask16(first_32(seen - i * LANES));
        __m512 score = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), mask, load(scores + i * LANES), all(scale));
        x[i] = score;
        top = _mm512_max_ps(top, score);
    }
    float now = _mm512_reduce_max_ps(top), before = largest - now;
    Lanes sums{};
    for (int64_t i = 0; i < SPAN / LANES; i++) {
        __mmask16 mask = __mmask16(first_32(seen - i * LANES));
        Lanes power = _mm512_maskz_mov_ps(mask, exponential(x[i] - now));
        sums += power;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i * LANES), __m256i(_mm512_cvtneps_pbh(power)));
    }
    float shrunk = exponential(all(before))[0];
    total = total * shrunk + sum(sums);
    largest = now;
    return shrunk;
}

// The query heads of one key/value head for tokens of one text, whose keys and values are stored.
struct Stretch {
    const Pool& pool;
    int64_t dim, group;
    Half *queries, *weights;
    float *scores, *sums, *largest, *total;
    int32_t *keys, *values;

    Stretch(const Pool& pool, Scratch& scratch) : pool(pool), dim(pool.head_dim), group(pool.heads / pool.kv_heads) {
        int64_t rows = STRETCH * group;
        queries = scratch.take<Half>(rows * dim);
        weights = scratch.take<Half>(rows * SPAN);
        scores = scratch.take<float>(rows * SPAN);
        sums = scratch.take<float>(rows * dim);
        largest = scratch.take<float>(rows);
        total = scratch.take<float>(rows);
        keys = scratch.take<int32_t>(panel_size(dim));
        values = scratch.take<int32_t>(SPAN / 2 * dim);
    }

    // Tokens row .. row + count - 1; q and out are (rows, heads, dim).
    void attend(int64_t row, int64_t count, int64_t kv, const Half* q, float scale, Half* out) {
        int64_t rows = count * group, length = pool.lengths[row + count - 1];
        auto place = [&](int64_t t) { return ((row + t) * pool.heads + kv * group) * dim; };
        for (int64_t t = 0; t < count; t++)
            memcpy(queries + t * group * dim, q + place(t), group * dim * sizeof(Half));
        for (int64_t i = 0; i < rows; i++) largest[i] = -INFINITY, total[i] = 0;
        for (int64_t i = 0; i < rows * dim; i++) sums[i] = 0;
        for (int64_t start = 0; start < length; start += SPAN) look(row, rows, kv, start, length - start, scale);
        for (int64_t i = 0; i < rows * dim; i++) sums[i] /= total[i / dim];
        for (int64_t t = 0; t < count; t++) narrow(sums + t * group * dim, true, group * dim, out + place(t));
    }

    // The keys and values from `start` on, `left` until the text's end.
    void look(int64_t row, int64_t rows, int64_t kv, int64_t start, int64_t left, float scale) {
        int64_t here = left < SPAN ? (left + PANEL - 1) / PANEL * PANEL : SPAN;
        for (int64_t at = 0; at < here; at += PANEL) {
            int64_t block = pool.tables[row * pool.width + (start + at) / pool.block];
            int64_t place = ((block * pool.kv_heads + kv) * pool.block + (start + at) % pool.block) * dim;
            fill_panel(static_cast<const Half*>(pool.keys) + place, PANEL, dim, keys);
            by_panel<false>(keys, dim / 2, queries, dim, rows, scores + at, SPAN, PANEL);
            fill_values(static_cast<const Half*>(pool.values) + place, at, left - at, dim, values);
        }
        for (int64_t i = 0; i < rows; i++) {
            int64_t seen = pool.lengths[row + i / group] - start;
            float shrunk = weigh(scores + i * SPAN, seen, scale, largest[i], total[i], weights + i * SPAN);
            float* mine = sums + i * dim;
            for (int64_t d = 0; d < dim; d += LANES) store(mine + d, load(mine + d) * shrunk);
        }
        for (int64_t d = 0; d < dim; d += PANEL)
            by_panel<true>(values + d * (SPAN / 2), here / 2, weights, SPAN, rows, sums + d, dim, PANEL);
    }
};
