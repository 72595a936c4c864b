// The decoder blocks of a forward of few rows: what lies between two products would cost more to call one by one than
// to compute.

static inline float rounded(float x, bool bf16) { return bf16 ? from_bf16(to_bf16(x)) : x; }

static void round_all(float* x, int64_t count, bool bf16) {
    for (int64_t i = 0; bf16 && i < count; i++) x[i] = from_bf16(to_bf16(x[i]));
}

constexpr int64_t MANY = 64;  // rows that threads share to norm; fewer each thread norms for itself, which saves a wait

// RMSNorm of all rows as ops/norm.py has it, in the dtype of activations; `shared` has room for them where they are many.
static const void* normed(const Call& call, const void* x, const void* weight, const Block& b, int64_t dim,
                          char* shared, Scratch& scratch) {
    float* wide = scratch.take<float>(dim);
    float* gain = scratch.take<float>(dim);
    char* out = call.rows < MANY ? scratch.take<char>(call.rows * dim * 4) : shared;
    widen(weight, b.norms_bf16, dim, gain);
    round_all(gain, dim, call.bf16);
    auto norm = [&](int64_t from, int64_t to) {
        for (int64_t r = from; r < to; r++) {
            widen(behind(x, call.bf16, r * dim), call.bf16, dim, wide);
            float squares;
            dots(wide, wide, dim, 1, &squares, 1);
            float scale = 1 / sqrtf(squares / float(dim) + b.eps);
            for (int64_t i = 0; i < dim; i++) wide[i] = rounded(wide[i] * scale, call.bf16) * gain[i];
            narrow(wide, call.bf16, dim, const_cast<char*>(behind(out, call.bf16, r * dim)));
        }
    };
    if (call.rows < MANY) {
        norm(0, call.rows);
    } else {
        team().share(call.rows, 16, norm);
        team().barrier();
    }
    return out;
}

static void rotate(float* x, const float* cos, const float* sin, int64_t dim) {
    for (int64_t i = 0; i < dim / 2; i++) {
        float first = x[i], second = x[i + dim / 2];
        x[i] = first * cos[i] - second * sin[i];
        x[i + dim / 2] = second * cos[i] + first * sin[i];
    }
}

// x (rows, dim), cos and sin (rows, head_dim / 2) -> q (rows, heads, head_dim), k and v (rows, kv_heads, head_dim).
static void before(const Call& call, const Block& b, const Pool& pool, const void* x, const float* cos,
                   const float* sin, void* q, void* k, void* v) {
    int64_t rows = call.rows, dim = pool.head_dim, heads = pool.heads, kv_heads = pool.kv_heads;
    team().run_with(call.threads, rows < MANY ? 0 : rows * b.q.in * 4, [&](int thread, char* shared) {
        Scratch& scratch = team().scratch(thread);
        const void* given = normed(call, x, b.attention_norm, b, b.q.in, shared, scratch);
        Input inputs[3] = {prepare(b.q, given, call.bf16, rows, scratch), prepare(b.k, given, call.bf16, rows, scratch),
                           prepare(b.v, given, call.bf16, rows, scratch)};
        float* head = scratch.take<float>(rows * dim);
        team().share(heads + 2 * kv_heads, 1, [&](int64_t unit, int64_t) {
            int which = unit < heads ? 0 : unit < heads + kv_heads ? 1 : 2;
            int64_t index = unit - (which == 0 ? 0 : which == 1 ? heads : heads + kv_heads);
            const Weight& w = which == 0 ? b.q : which == 1 ? b.k : b.v;
            linear(w, inputs[which], index * dim, (index + 1) * dim, head - index * dim, dim);
            round_all(head, rows * dim, call.bf16);
            for (int64_t r = 0; r < rows; r++) {
                if (which < 2) rotate(head + r * dim, cos + r * dim / 2, sin + r * dim / 2, dim);
                int64_t at = (r * (which == 0 ? heads : kv_heads) + index) * dim;
                const char* out = behind(which == 0 ? q : which == 1 ? k : v, call.bf16, at);
                narrow(head + r * dim, call.bf16, dim, const_cast<char*>(out));
            }
        });
    });
}

// base + w . x for outputs [from, to) of all rows, in the dtype of activations.
static void add_linear(const Call& call, const Weight& w, const Input& x, const void* base, void* out, int64_t from,
                       int64_t to, float* sums) {
    int64_t count = to - from;
    linear(w, x, from, to, sums - from, count);
    for (int64_t r = 0; r < call.rows; r++) {
        float* row = sums + r * count;
        const char* old = behind(base, call.bf16, r * w.out + from);
        round_all(row, count, call.bf16);
        for (int64_t i = 0; i < count; i++)
            row[i] += call.bf16 ? from_bf16(reinterpret_cast<const Half*>(old)[i])
                                : reinterpret_cast<const float*>(old)[i];
        narrow(row, call.bf16, count, const_cast<char*>(behind(out, call.bf16, r * w.out + from)));
    }
}

// silu(gate) * up, in place of gate.
static void gated(float* gate, const float* up, int64_t count, bool bf16) {
    for (int64_t i = 0; i < count; i += LANES) {  // what lies behind `count` is scratch
        Lanes x = load(gate + i), silu = x / (1.0f + exponential(-x));
        store(gate + i, silu);
    }
    round_all(gate, count, bf16);
    for (int64_t i = 0; i < count; i++) gate[i] *= up[i];
}

// x (rows, dim) and its attention's heads (rows, heads * head_dim) -> x of the next block, in place.
static void after(const Call& call, const Block& b, void* x, const void* heads) {
    int64_t rows = call.rows, dim = b.o.out, ffn = b.gate.out, width = call.bf16 ? 2 : 4;
    constexpr int64_t STEP = 32;
    team().run_with(call.threads, rows * (2 * dim + ffn) * width, [&](int thread, char* memory) {
        Scratch& scratch = team().scratch(thread);
        char *middle = memory, *shared = middle + rows * dim * width, *hidden = shared + rows * dim * width;
        float* sums = scratch.take<float>(rows * STEP);
        float* ups = scratch.take<float>(rows * STEP);
        Input input = prepare(b.o, heads, call.bf16, rows, scratch);
        team().share(dim, STEP, [&](int64_t from, int64_t to) {
            add_linear(call, b.o, input, x, middle, from, to, sums);
        });
        team().barrier();
        const void* given = normed(call, middle, b.mlp_norm, b, dim, shared, scratch);
        Input gate = prepare(b.gate, given, call.bf16, rows, scratch);
        Input up = prepare(b.up, given, call.bf16, rows, scratch);
        team().share(ffn, STEP, [&](int64_t from, int64_t to) {
            int64_t count = to - from;
            linear(b.gate, gate, from, to, sums - from, count);
            linear(b.up, up, from, to, ups - from, count);
            round_all(sums, rows * count, call.bf16);
            round_all(ups, rows * count, call.bf16);
            gated(sums, ups, rows * count, call.bf16);
            for (int64_t r = 0; r < rows; r++) {
                const char* out = behind(hidden, call.bf16, r * ffn + from);
                narrow(sums + r * count, call.bf16, count, const_cast<char*>(out));
            }
        });
        team().barrier();
        input = prepare(b.down, hidden, call.bf16, rows, scratch);
        team().share(dim, STEP, [&](int64_t from, int64_t to) {
            add_linear(call, b.down, input, middle, x, from, to, sums);
        });
    });
}

// x (rows, dim) through all blocks, in place. The pool is that of all layers, (layers, blocks, ...).
static void forward(const Call& call, const Block* blocks, int64_t layers, Pool pool, void* x, const float* cos,
                    const float* sin) {
    int64_t width = call.bf16 ? 2 : 4, one = call.rows * pool.head_dim * width;
    int64_t layer_bytes = pool.count * pool.kv_heads * pool.block * pool.head_dim * width;
    std::unique_ptr<char[]> memory(new char[2 * (pool.heads + pool.kv_heads) * one]);
    char *q = memory.get(), *heads = q + pool.heads * one;
    char *k = heads + pool.heads * one, *v = k + pool.kv_heads * one;
    for (int64_t layer = 0; layer < layers; layer++) {
        before(call, blocks[layer], pool, x, cos, sin, q, k, v);
        attend(call, pool, q, k, v, heads);
        after(call, blocks[layer], x, heads);
        pool.keys = static_cast<char*>(pool.keys) + layer_bytes;
        pool.values = static_cast<char*>(pool.values) + layer_bytes;
    }
}
