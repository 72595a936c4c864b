// One weight by itself: a linear layer of few rows, and rows of a weight as floats.

// y (rows, out) = x (rows, in) . w.
static void linear_entry(const Call& call, const Weight& w, const void* x, void* y) {
    int64_t rows = call.rows, step = most(16, least(256, w.out / (4 * call.threads))) / 16 * 16;
    team().run(call.threads, [&](int thread) {
        Scratch& scratch = team().scratch(thread);
        Input input = prepare(w, x, call.bf16, rows, scratch);
        float* sums = scratch.take<float>(rows * step);
        team().share(w.out, step, [&](int64_t from, int64_t to) {
            linear(w, input, from, to, sums - from, step);
            for (int64_t r = 0; r < rows; r++) {
                char* out = static_cast<char*>(y) + (r * w.out + from) * (call.bf16 ? 2 : 4);
                narrow(sums + r * step, call.bf16, to - from, out);
            }
        });
    });
}

// Rows [from, to) of w, (to - from, in) in the dtype of activations.
static void expand_entry(const Call& call, const Weight& w, int64_t from, int64_t to, void* out) {
    team().run(call.threads, [&](int thread) {
        float* row = team().scratch(thread).take<float>(w.in);
        team().share(to - from, 16, [&](int64_t first, int64_t last) {
            for (int64_t o = first; o < last; o++) {
                expand(w, from + o, row);
                narrow(row, call.bf16, w.in, static_cast<char*>(out) + o * w.in * (call.bf16 ? 2 : 4));
            }
        });
    });
}
