// Products of many rows, by AVX-512's bf16 dot products: from some rows on arithmetic takes the time, not reading.
//
// 32 outputs of a weight are laid out once as a panel, pair by pair of inputs, the 32 outputs of a pair side by side:
// then a row's pair goes to all lanes, no sum lies across a vector, and a panel serves all rows. A tile is 2 vectors
// of outputs times up to 12 rows: 24 accumulators, 2 of panel, and the rows come from memory into the instruction.

constexpr int64_t WIDE = 40;   // rows; with fewer a weight is better read as it lies
constexpr int64_t PANEL = 32;  // outputs
constexpr int64_t TILE = 12;   // rows

static inline __mmask32 first_32(int64_t left) { return left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0; }

static inline int64_t panel_size(int64_t in) { return (in + 31) / 32 * 16 * PANEL; }

// 16 x 16 words of 32 bits.
static inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // x[4 a + i] has of columns i, 4 + i, 8 + i and 12 + i the rows 4 a .. 4 a + 3
        __m512i even = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88), even2 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd), odd2 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
        y[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        y[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        y[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < 16; i++) x[i] = y[i];
}

// `count` rows of `in` bf16, one behind another, as a panel; what is missing to 32 rows and whole vectors is zero.
static void fill_panel(const Half* rows, int64_t count, int64_t in, int32_t* panel) {
    const char* next = reinterpret_cast<const char*>(rows + PANEL * in);
    for (int64_t i = 0; i < in; i += 32) {
        __mmask32 mask = first_32(in - i);
        for (int64_t line = 0; line < PANEL; line++) _mm_prefetch(next + 64 * (i + line), _MM_HINT_T0);
        for (int64_t half = 0; half < PANEL; half += 16) {
            __m512i pairs[16];
            for (int64_t r = 0; r < 16; r++)
                pairs[r] = half + r < count ? _mm512_maskz_loadu_epi16(mask, rows + (half + r) * in + i)
                                            : _mm512_setzero_si512();
            transpose(pairs);
            for (int64_t p = 0; p < 16; p++) _mm512_store_si512(panel + (i / 2 + p) * PANEL + half, pairs[p]);
        }
    }
}

// y[r * stride + o] = (or, to add, +=) row r of x times a panel of `pairs` pairs, for the `count` first outputs.
template <int R, bool ADD>
static inline void tile(const int32_t* panel, int64_t pairs, const Half* x, int64_t x_stride, float* y, int64_t stride,
                        int64_t count) {
    __mmask16 first = __mmask16(first_32(count)), second = __mmask16(first_32(count) >> 16);
    __m512 left[R], right[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        left[r] = ADD ? _mm512_maskz_loadu_ps(first, y + r * stride) : _mm512_setzero_ps();
        right[r] = ADD ? _mm512_maskz_loadu_ps(second, y + r * stride + 16) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh w = __m512bh(_mm512_load_si512(panel + p * PANEL));
        __m512bh v = __m512bh(_mm512_load_si512(panel + p * PANEL + 16));
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, x + r * x_stride + 2 * p, 4);
            __m512bh given = __m512bh(_mm512_set1_epi32(pair));
            left[r] = _mm512_dpbf16_ps(left[r], w, given);
            right[r] = _mm512_dpbf16_ps(right[r], v, given);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        _mm512_mask_storeu_ps(y + r * stride, first, left[r]);
        _mm512_mask_storeu_ps(y + r * stride + 16, second, right[r]);
    }
}

// The same for any number of rows.
template <bool ADD>
static void by_panel(const int32_t* panel, int64_t pairs, const Half* x, int64_t x_stride, int64_t rows, float* y,
                     int64_t stride, int64_t count) {
    for (int64_t r = 0; r < rows; r += TILE, x += TILE * x_stride, y += TILE * stride) switch (rows - r) {
#define ROWS(R) case R: tile<R, ADD>(panel, pairs, x, x_stride, y, stride, count); break;
            ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11)
            default: tile<TILE, ADD>(panel, pairs, x, x_stride, y, stride, count);
#undef ROWS
        }
}

// y[r * stride + o] for o in [from, to), of a weight in bf16 with an even number of inputs.
static void linear_wide(const Weight& w, const Input& x, int64_t from, int64_t to, float* y, int64_t stride) {
    const Half* codes = static_cast<const Half*>(w.codes);
    for (int64_t o = from; o < to; o += PANEL) {
        int64_t count = to - o < PANEL ? to - o : PANEL;
        fill_panel(codes + o * w.in, count, w.in, x.panel);
        by_panel<false>(x.panel, w.in / 2, x.half, w.in, x.rows, y + o, stride, count);
    }
}
