// Plain kernels, included once for each instruction set: what they do is said once, by the vector extension.
// No include guard, and nothing of the standard library inside: its inline functions would take on the target.

static inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
static inline void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }
static inline Lanes all(float x) { return Lanes{} + x; }
static inline float least(float a, float b) { return a < b ? a : b; }
static inline float most(float a, float b) { return a > b ? a : b; }

static inline float sum(Lanes x) {
    x += SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x[0] + x[1];
}

static inline float from_bf16(Half bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

static inline Half to_bf16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return Half(bits >> 16 | 0x40);
    return Half((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_fp16(Half bits) {
    uint32_t wide = uint32_t(bits & 0x7fff) << 13;
    float x;
    memcpy(&x, &wide, 4);
    x *= 0x1p112f;  // moves the exponent's bias, and makes subnormals normal on the way
    memcpy(&wide, &x, 4);
    wide |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    wide |= uint32_t(bits & 0x8000) << 16;
    memcpy(&x, &wide, 4);
    return x;
}

static inline float scale_of(const Weight& w, const void* scales, int64_t index) {
    if (w.scale_table) {  // such a weight has no mins
        float scale = w.scale_table[static_cast<const uint8_t*>(scales)[index]] * w.scale_max[index / 256];
        asm("" : "+x"(scale));  // rounded before the sum, as the oracle does: a fused one would differ in the last bit
        return scale + *w.scale_offset;
    }
    if (w.half_scales) return from_fp16(static_cast<const Half*>(scales)[index]);
    return static_cast<const float*>(scales)[index];
}

// e^x to 2 units in the last place: 2^n by the exponent's bits times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
static inline Lanes exponential(Lanes x) {
    x = x > all(88.0f) ? all(88.0f) : x;
    x = x < all(-87.0f) ? all(-87.0f) : x;
    Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Lanes n = shifted - 12582912.0f;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * reinterpret_cast<Lanes&>(power);
}

// e^x / sum e^x of `count` values, in place; up to a vector's width behind them is written, too.
static void softmax(float* x, int64_t count) {
    float largest = x[0], total = 0;
    for (int64_t i = 1; i < count; i++) largest = most(largest, x[i]);
    for (int64_t i = 0; i < count; i += LANES) store(x + i, exponential(load(x + i) - largest));
    for (int64_t i = 0; i < count; i++) total += x[i];
    for (int64_t i = 0; i < count; i++) x[i] /= total;
}

static void widen(const void* x, bool bf16, int64_t count, float* out) {
    if (!bf16) {
        memcpy(out, x, count * sizeof(float));
        return;
    }
    const Half* half = static_cast<const Half*>(x);
    for (int64_t i = 0; i < count; i++) out[i] = from_bf16(half[i]);
}

static void narrow(const float* x, bool bf16, int64_t count, void* out) {
    if (!bf16) {
        memcpy(out, x, count * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < count; i++) static_cast<Half*>(out)[i] = to_bf16(x[i]);
}

// 32 codes of 4 bits: byte j has code j in its low half and code j + 16 in its high half.
static inline void nibbles(const uint8_t* packed, int8_t* out) {
    for (int j = 0; j < 16; j++) {
        out[j] = packed[j] & 15;
        out[j + 16] = packed[j] >> 4;
    }
}

// Row `o` of a weight as floats.
static void expand(const Weight& w, int64_t o, float* out) {
    if (w.kind == FLOAT32 || w.kind == BFLOAT16) {
        bool bf16 = w.kind == BFLOAT16;
        return widen(static_cast<const char*>(w.codes) + o * w.in * (bf16 ? 2 : 4), bf16, w.in, out);
    }
    int64_t groups = w.in / w.group, step = w.kind == INT4 ? 32 : w.group;
    float zero = w.kind == INT4 && !w.mins ? -8.0f : 0.0f;
    int8_t codes[32];
    for (int64_t i = 0; i < w.in; i += step) {
        int64_t group = o * groups + i / w.group;
        float scale = scale_of(w, w.scales, group), least = w.mins ? scale_of(w, w.mins, group) : 0.0f;
        if (w.kind == INT8) {
            const int8_t* row = static_cast<const int8_t*>(w.codes) + o * w.in + i;
            for (int64_t j = 0; j < step; j++) out[i + j] = scale * row[j] + least;
            continue;
        }
        nibbles(static_cast<const uint8_t*>(w.codes) + (o * w.in + i) / 2, codes);
        if (w.table)
            for (int j = 0; j < 32; j++) out[i + j] = scale * w.table[codes[j]] + least;
        else
            for (int j = 0; j < 32; j++) out[i + j] = scale * (codes[j] + zero) + least;
    }
}

// y[r * stride] = w . x[r] of `rows` rows of x, `in` long each.
static void dots(const float* w, const float* x, int64_t in, int64_t rows, float* y, int64_t stride) {
    int64_t whole = in / (2 * LANES) * (2 * LANES);
    for (int64_t r = 0; r < rows; r++, x += in) {
        Lanes first{}, second{};
        for (int64_t i = 0; i < whole; i += 2 * LANES) {
            first += load(w + i) * load(x + i);
            second += load(w + i + LANES) * load(x + i + LANES);
        }
        float rest = 0;
        for (int64_t i = whole; i < in; i++) rest += w[i] * x[i];
        y[r * stride] = sum(first + second) + rest;
    }
}

// Rows of activations, made ready for one weight: floats, or int8 with a scale each.
struct Input {
    int64_t rows, in;
    float* real = nullptr;       // (rows, in)
    int8_t* whole = nullptr;     // (rows, in)
    float* scales = nullptr;     // (rows,)
    const Half* half = nullptr;  // (rows, in) bf16; in the order of 4-bit codes for such a weight (AVX-512)
    float* sums = nullptr;       // (rows, in / 32) of each 32 activations (AVX-512)
    Ints* offsets = nullptr;     // (rows, in / 64) where the integer sums begin (AVX-512)
    float* row = nullptr;        // (in,) for one expanded row of the weight
};

// x = scale * whole, with the largest |x| at 127: symmetric, ties to even (Llama 3.2's dynamic activations).
// A row with a NaN or an infinity becomes zeros of such a scale, whose product with any sum is NaN, as torch has it.
static float round_row(const float* x, int64_t in, int8_t* out) {
    float largest = 0;
    for (int64_t i = 0; i < in; i++) {
        float size = x[i] < 0 ? -x[i] : x[i];
        largest = size > largest || size != size ? size : largest;
    }
    float scale = largest / 127.0f, divisor = scale > 0 ? scale : 1.0f;
    bool finite = scale - scale == 0;
    for (int64_t i = 0; i < in; i++) {
        float shifted = (finite ? x[i] / divisor : 0.0f) + 12582912.0f;  // rounds to an integer, as torch.round does
        out[i] = int8_t(shifted - 12582912.0f);
    }
    return scale;
}

static void round_rows(Input& input, Scratch& scratch) {
    input.whole = scratch.take<int8_t>(input.rows * input.in);
    input.scales = scratch.take<float>(input.rows);
    for (int64_t r = 0; r < input.rows; r++)
        input.scales[r] = round_row(input.real + r * input.in, input.in, input.whole + r * input.in);
}

// y[r * stride + o] for o in [from, to), with the integer sums exact.
[[maybe_unused]] static void linear_dynamic(const Weight& w, const Input& x, int64_t from, int64_t to, float* y,
                                            int64_t stride) {
    int64_t groups = w.in / w.group;
    int8_t* codes = reinterpret_cast<int8_t*>(x.row);
    for (int64_t o = from; o < to; o++) {
        const int8_t* row = static_cast<const int8_t*>(w.codes) + o * w.in;
        if (w.kind == INT4) {
            const uint8_t* packed = static_cast<const uint8_t*>(w.codes) + o * w.in / 2;
            for (int64_t i = 0; i < w.in; i += 32) nibbles(packed + i / 2, codes + i);
            for (int64_t i = 0; i < w.in && !w.mins; i++) codes[i] -= 8;
            row = codes;
        }
        for (int64_t r = 0; r < x.rows; r++) {
            float total = 0;
            for (int64_t g = 0; g < groups; g++) {
                const int8_t *a = row + g * w.group, *b = x.whole + r * w.in + g * w.group;
                int32_t product = 0, plain = 0;
                for (int64_t i = 0; i < w.group; i++) product += int32_t(a[i]) * b[i];
                total += scale_of(w, w.scales, o * groups + g) * float(product);
                if (!w.mins) continue;
                for (int64_t i = 0; i < w.group; i++) plain += b[i];
                total += scale_of(w, w.mins, o * groups + g) * float(plain);
            }
            y[r * stride + o] = total * x.scales[r];
        }
    }
}

static void linear_plain(const Weight& w, const Input& x, int64_t from, int64_t to, float* y, int64_t stride) {
    for (int64_t o = from; o < to; o++) {
        const float* row = x.row;
        if (w.kind == FLOAT32)
            row = static_cast<const float*>(w.codes) + o * w.in;
        else
            expand(w, o, x.row);
        dots(row, x.real, w.in, x.rows, y + o, stride);
    }
}
