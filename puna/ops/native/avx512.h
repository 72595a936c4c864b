// The kernels that decide how fast a token is made, by AVX-512 with its bf16 and 8-bit dot products.
//
// A tile is 4 outputs times up to 4 rows: 16 accumulators, and each weight that is loaded serves 4 rows.
// Codes of 4 bits are never expanded in memory: 64 of them (two blocks of 32) are 32 bytes, whose low halves are
// codes 0-15 of both blocks and whose high halves are 16-31; the activations are put in that order once.

constexpr int OUTPUTS = 4;

static inline __m512 pick(const float* s, __mmask16 second) {  // the scales of two blocks, on the lanes of each
    return _mm512_mask_blend_ps(second, _mm512_set1_ps(s[0]), _mm512_set1_ps(s[1]));
}

static inline __m512i unpack(const uint8_t* codes, int64_t left) {  // 64 codes of 4 bits: low halves, then high ones
    __m256i packed = _mm256_maskz_loadu_epi8(first_32(left / 2), codes), low = _mm256_set1_epi8(15);
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(packed, low)), high, 1);
}
static inline __m512i lift(const uint8_t* codes, int64_t left) {  // 64 codes of 8 bits, from -128..127 to 0..255
    __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, codes), _mm512_set1_epi8(-128));
}

// How far two rows of scales lie apart, one for each 32 weights: whole vectors of 16, zeros behind the last.
static inline int64_t blocks_of(int64_t in) { return (in + 511) / 512 * 16; }

// The scale of each 32 weights of row `o`, as floats.
static void by_block(const Weight& w, const void* scales, int64_t o, float* out) {
    int64_t blocks = (w.in + 31) / 32, groups = w.in / w.group, all = blocks_of(w.in);
    if (w.group == 32 && w.half_scales) {
        const Half* half = static_cast<const Half*>(scales) + o * groups;
        for (int64_t b = 0; b < all; b += 16) {
            __mmask16 mask = __mmask16(first_32(blocks - b));
            _mm512_storeu_ps(out + b, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, half + b)));
        }
        return;
    }
    int64_t b = 0, repeat = (w.group + 31) / 32;
    for (int64_t g = 0; g < groups; g++) {
        float scale = scale_of(w, scales, o * groups + g);
        for (int64_t i = 0; i < repeat; i++) out[b++] = scale;
    }
    while (b < all) out[b++] = 0;
}

// What a tile reads of a weight: its codes, its scales and mins for each 32.
struct Rows {
    const uint8_t* codes[OUTPUTS];
    const uint8_t* next;  // the codes of the next tile
    float *scales, *mins;
    int64_t first, wanted, blocks;
};

static Rows rows_of(const Weight& w, int64_t o, int64_t to, int64_t row_bytes, float* buffer) {
    Rows rows{{}, nullptr, buffer, nullptr, o, to - o < OUTPUTS ? to - o : OUTPUTS, blocks_of(w.in)};
    if (w.mins) rows.mins = buffer + OUTPUTS * rows.blocks;
    for (int i = 0; i < OUTPUTS; i++) {
        int64_t output = o + i < to ? o + i : to - 1;  // behind the last output: the last again, and not stored
        rows.codes[i] = static_cast<const uint8_t*>(w.codes) + output * row_bytes;
        if (w.scales) by_block(w, w.scales, output, rows.scales + i * rows.blocks);
        if (w.mins) by_block(w, w.mins, output, rows.mins + i * rows.blocks);
    }
    rows.next = rows.codes[0] + OUTPUTS * row_bytes;
    return rows;
}

// Fetches the part of the next tile that is as far in as `at` bytes of this one. Four rows read side by side are
// streams too short for the CPU to notice: without this a tile gets half of the bandwidth.
template <int LINES> static inline void fetch(const Rows& w, int64_t at) {
    for (int line = 0; line < LINES; line++)
        _mm_prefetch(reinterpret_cast<const char*>(w.next + at + 64 * line), _MM_HINT_T0);
}

// Of four vectors the sum of each within every 128 bits, side by side there.
static inline __m512 by_lane(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 first = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    __m512 second = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(first), _mm512_castps_pd(second));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(first), _mm512_castps_pd(second));
    return _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
}

// Of two vectors the sums of neighbouring 128 bits.
static inline __m512 halved(__m512 x, __m512 y) {
    return _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xdd);
}

// Where a tile's sums go, the mins' part added: the min of 32 weights times the sum of their activations. The sums of
// all accumulators are made together, in 45 instructions and not 8 each.
// Inlined and unrolled: sums that are indexed by a variable would be stored to memory in every round before.
template <int R>
__attribute__((always_inline)) static inline void finish(__m512 (&total)[R][OUTPUTS], const Rows& w, const Input& x,
                                                         int64_t row, float* y, int64_t stride) {
    __m512 lanes[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int o = 0; o < OUTPUTS; o++)
            for (int64_t b = 0; w.mins && b < w.blocks; b += 16)
                total[r][o] = _mm512_fmadd_ps(_mm512_loadu_ps(w.mins + o * w.blocks + b),
                                              _mm512_loadu_ps(x.sums + (row + r) * w.blocks + b), total[r][o]);
        lanes[r] = by_lane(total[r][0], total[r][1], total[r][2], total[r][3]);
    }
    __m512 sums = halved(halved(lanes[0], lanes[1]), halved(lanes[2], lanes[3]));
    __mmask8 wanted = __mmask8((1u << w.wanted) - 1);
    __m128 rows[4] = {_mm512_castps512_ps128(sums), _mm512_extractf32x4_ps(sums, 1), _mm512_extractf32x4_ps(sums, 2),
                      _mm512_extractf32x4_ps(sums, 3)};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        float scale = x.whole ? x.scales[row + r] : 1.0f;
        _mm_mask_storeu_ps(y + (row + r) * stride + w.first, wanted, rows[r] * _mm_set1_ps(scale));
    }
}

template <int R> static void bf16_tile(const Rows& w, const Input& x, int64_t row, float* y, int64_t stride) {
    __m512 total[R][OUTPUTS] = {};
    int64_t in = x.in;
    const Half* first = x.half + row * in;
    for (int64_t i = 0; i < in; i += 32) {
        __mmask32 mask = first_32(in - i);
        fetch<4>(w, 8 * i);
        __m512bh weights[OUTPUTS];
        for (int o = 0; o < OUTPUTS; o++) weights[o] = __m512bh(_mm512_maskz_loadu_epi16(mask, w.codes[o] + 2 * i));
        for (int r = 0; r < R; r++) {
            __m512bh given = __m512bh(_mm512_maskz_loadu_epi16(mask, first + r * in + i));
            for (int o = 0; o < OUTPUTS; o++) total[r][o] = _mm512_dpbf16_ps(total[r][o], weights[o], given);
        }
    }
    finish<R>(total, w, x, row, y, stride);
}

// 4-bit codes times bf16: a code looks up its value among the 32 words of a register (the 16 values, twice, so that
// the bit above a code does no harm), and pairs are multiplied and added in fp32.
template <int R>
static void int4_tile(const Rows& w, const Input& x, int64_t row, __m512i table, float* y, int64_t stride) {
    int64_t in = x.in, width = (in + 63) / 64 * 64;
    const Half* first = x.half + row * width;
    __m512 total[R][OUTPUTS] = {};
    for (int64_t i = 0; i < in; i += 64) {
        __mmask32 mask = first_32((in - i) / 2);
        fetch<2>(w, 2 * i);
        for (int o = 0; o < OUTPUTS; o++) {
            __m512i codes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, w.codes[o] + i / 2));
            __m512bh low = __m512bh(_mm512_permutexvar_epi16(codes, table));
            __m512bh high = __m512bh(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
            __m512 scale = pick(w.scales + o * w.blocks + i / 32, 0xff00);
            for (int r = 0; r < R; r++) {
                const Half* given = first + r * width + i;
                __m512 part = _mm512_dpbf16_ps(_mm512_setzero_ps(), low, __m512bh(_mm512_load_si512(given)));
                part = _mm512_dpbf16_ps(part, high, __m512bh(_mm512_load_si512(given + 32)));
                total[r][o] = _mm512_fmadd_ps(part, scale, total[r][o]);
            }
        }
    }
    finish<R>(total, w, x, row, y, stride);
}

// int8 codes, scaled, times floats or, rounded to bf16, times bf16.
template <int R, bool BF16>
static void int8_tile(const Rows& w, const Input& x, int64_t row, float* y, int64_t stride) {
    __m512 total[R][OUTPUTS] = {};
    int64_t in = x.in;
    const float* real = x.real + row * in;
    const Half* half = x.half + row * in;
    for (int64_t i = 0; i < in; i += 32) {
        __mmask32 mask = first_32(in - i);
        fetch<2>(w, 4 * i);
        __m512 low[OUTPUTS], high[OUTPUTS];
        __m512bh both[OUTPUTS];
        for (int o = 0; o < OUTPUTS; o++) {
            __m256i codes = _mm256_maskz_loadu_epi8(mask, w.codes[o] + i);
            __m512 scale = _mm512_set1_ps(w.scales[o * w.blocks + i / 32]);
            low[o] = scale * _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
            high[o] = scale * _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
            if (BF16) both[o] = _mm512_cvtne2ps_pbh(high[o], low[o]);
        }
        for (int r = 0; r < R; r++) {
            if (BF16) {
                __m512bh given = __m512bh(_mm512_maskz_loadu_epi16(mask, half + r * in + i));
                for (int o = 0; o < OUTPUTS; o++) total[r][o] = _mm512_dpbf16_ps(total[r][o], both[o], given);
                continue;
            }
            __m512 first = _mm512_maskz_loadu_ps(__mmask16(mask), real + r * in + i);
            __m512 second = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), real + r * in + i + 16);
            for (int o = 0; o < OUTPUTS; o++)
                total[r][o] = _mm512_fmadd_ps(high[o], second, _mm512_fmadd_ps(low[o], first, total[r][o]));
        }
    }
    finish<R>(total, w, x, row, y, stride);
}

// Codes times int8 activations. The instruction takes unsigned times signed, so codes are lifted by 8 or 128 and the
// sums begin at what that adds too much. A group that is a whole channel stays in integers to the end.
template <int R, bool FOUR, bool CHANNEL>
static void dynamic_tile(const Rows& w, const Input& x, int64_t row, float* y, int64_t stride) {
    int64_t in = x.in, chunks = (in + 63) / 64;
    __m512 total[R][OUTPUTS] = {};
    __m512i counted[R][OUTPUTS] = {};
    for (int64_t c = 0; c < chunks; c++) {
        fetch<FOUR ? 2 : 4>(w, (FOUR ? 128 : 256) * c);
        for (int o = 0; o < OUTPUTS; o++) {
            __m512i codes = FOUR ? unpack(w.codes[o] + 32 * c, in - 64 * c) : lift(w.codes[o] + 64 * c, in - 64 * c);
            __m512 scale = pick(w.scales + o * w.blocks + 2 * c, FOUR ? 0xf0f0 : 0xff00);
            for (int r = 0; r < R; r++) {
                int64_t at = (row + r) * chunks + c;
                __m512i given = _mm512_load_si512(x.whole + 64 * at);
                __m512i part = _mm512_dpbusd_epi32(_mm512_load_si512(x.offsets + at), codes, given);
                if (CHANNEL)
                    counted[r][o] = _mm512_add_epi32(counted[r][o], part);
                else
                    total[r][o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), scale, total[r][o]);
            }
        }
    }
    for (int r = 0; CHANNEL && r < R; r++)
        for (int o = 0; o < OUTPUTS; o++) {
            float all = float(_mm512_reduce_add_epi32(counted[r][o])) * w.scales[o * w.blocks];
            total[r][o] = _mm512_zextps128_ps512(_mm_set_ss(all));
        }
    finish<R>(total, w, x, row, y, stride);
}

// Activations in the order of the codes they meet, with zeros behind the last, and their sums.
template <typename T> static void in_order(const T* x, int64_t in, bool four, T* out) {
    for (int64_t i = 0; i < in; i += 64)
        for (int64_t j = 0; j < 64; j += 16) {
            int64_t from = !four ? i + j : i + (j == 16 ? 32 : j == 32 ? 16 : j);
            for (int64_t k = 0; k < 16; k++) out[i + j + k] = from + k < in ? x[from + k] : T(0);
        }
}

template <typename T> static void sum_blocks(const T* x, int64_t in, float* out) {
    for (int64_t b = 0; b < blocks_of(in); b++) {
        float total = 0;
        for (int64_t i = 32 * b; i < 32 * b + 32 && i < in; i++) total += float(x[i]);
        out[b] = total;
    }
}

static Input prepare(const Weight& w, const void* x, bool bf16, int64_t rows, Scratch& scratch) {
    int64_t width = (w.in + 63) / 64 * 64, blocks = blocks_of(w.in);
    bool four = w.kind == INT4, plain = w.kind == FLOAT32 || (w.kind == BFLOAT16 && !bf16);
    Input input{rows, w.in};
    if (w.kind == BFLOAT16 && bf16) {
        input.half = static_cast<const Half*>(x);
        if (rows >= WIDE && w.in % 2 == 0) input.panel = scratch.take<int32_t>(panel_size(w.in));
        return input;
    }
    input.row = scratch.take<float>(w.in + 2 * OUTPUTS * blocks);
    input.real = scratch.take<float>(rows * w.in);
    widen(x, bf16, rows * w.in, input.real);
    if (plain) return input;
    input.sums = scratch.take<float>(rows * blocks);
    if (w.dynamic) {
        round_rows(input, scratch);
        int8_t* whole = scratch.take<int8_t>(rows * width);
        input.offsets = scratch.take<Ints>(rows * width / 64);
        for (int64_t r = 0; r < rows; r++) {
            in_order(input.whole + r * w.in, w.in, four, whole + r * width);
            sum_blocks(input.whole + r * w.in, w.in, input.sums + r * blocks);
        }
        int8_t lift = four ? (w.mins ? 0 : -8) : -128;
        for (int64_t c = 0; c < rows * width / 64; c++) {
            // Unsigned times signed once more: 1 * x, and then times what the codes are lifted by.
            __m512i given = _mm512_load_si512(whole + 64 * c);
            __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), given);
            _mm512_store_si512(input.offsets + c, _mm512_mullo_epi32(sums, _mm512_set1_epi32(lift)));
        }
        input.whole = whole;
        return input;
    }
    for (int64_t r = 0; w.mins && r < rows; r++) sum_blocks(input.real + r * w.in, w.in, input.sums + r * blocks);
    if (!four && bf16) input.half = static_cast<const Half*>(x);
    if (four && bf16) {
        Half* half = scratch.take<Half>(rows * width);
        for (int64_t r = 0; r < rows; r++)
            in_order(static_cast<const Half*>(x) + r * w.in, w.in, true, half + r * width);
        input.half = half;
    }
    return input;
}

// Calls tile.operator()<R>(rows of the weight, first row of x) over [from, to) and all rows of x, R at most 4.
template <typename Tile>
static void tiles(const Weight& w, const Input& x, int64_t from, int64_t to, int64_t row_bytes, Tile&& tile) {
    for (int64_t o = from; o < to; o += OUTPUTS) {
        Rows weights = rows_of(w, o, to, row_bytes, x.row);
        for (int64_t row = 0; row < x.rows; row += 4) {
            int64_t left = x.rows - row;
            if (left >= 4) tile.template operator()<4>(weights, row);
            else if (left == 3) tile.template operator()<3>(weights, row);
            else if (left == 2) tile.template operator()<2>(weights, row);
            else tile.template operator()<1>(weights, row);
        }
    }
}

static __m512i table_of(const Weight& w) {
    Half words[32];
    for (int i = 0; i < 32; i++) words[i] = to_bf16(w.table ? w.table[i & 15] : float((i & 15) - (w.mins ? 0 : 8)));
    return _mm512_loadu_si512(words);
}

// y[r * stride + o] for o in [from, to).
static void linear(const Weight& w, const Input& x, int64_t from, int64_t to, float* y, int64_t stride) {
    if (x.panel) return linear_wide(w, x, from, to, y, stride);
    auto by = [&](int64_t row_bytes, auto&& tile) { tiles(w, x, from, to, row_bytes, tile); };
    if (w.dynamic && w.kind == INT4)
        by(w.in / 2, [&]<int R>(const Rows& rows, int64_t r) { dynamic_tile<R, true, false>(rows, x, r, y, stride); });
    else if (w.dynamic && w.group == w.in)
        by(w.in, [&]<int R>(const Rows& rows, int64_t r) { dynamic_tile<R, false, true>(rows, x, r, y, stride); });
    else if (w.dynamic)
        by(w.in, [&]<int R>(const Rows& rows, int64_t r) { dynamic_tile<R, false, false>(rows, x, r, y, stride); });
    else if (w.kind == INT8 && x.half)
        by(w.in, [&]<int R>(const Rows& rows, int64_t r) { int8_tile<R, true>(rows, x, r, y, stride); });
    else if (w.kind == INT8)
        by(w.in, [&]<int R>(const Rows& rows, int64_t r) { int8_tile<R, false>(rows, x, r, y, stride); });
    else if (w.kind == BFLOAT16 && x.half)
        by(w.in * 2, [&]<int R>(const Rows& rows, int64_t r) { bf16_tile<R>(rows, x, r, y, stride); });
    else if (w.kind == INT4 && x.half) {
        __m512i table = table_of(w);
        by(w.in / 2, [&]<int R>(const Rows& rows, int64_t r) { int4_tile<R>(rows, x, r, table, y, stride); });
    } else
        linear_plain(w, x, from, to, y, stride);
}
