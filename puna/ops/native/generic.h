// How a weight meets its activations where only the plain kernels are at hand.

static Input prepare(const Weight& w, const void* x, bool bf16, int64_t rows, Scratch& scratch) {
    Input input{rows, w.in};
    input.row = scratch.take<float>(w.in);
    input.real = scratch.take<float>(rows * w.in);
    widen(x, bf16, rows * w.in, input.real);
    if (w.dynamic) round_rows(input, scratch);
    return input;
}

static void linear(const Weight& w, const Input& x, int64_t from, int64_t to, float* y, int64_t stride) {
    (w.dynamic ? linear_dynamic : linear_plain)(w, x, from, to, y, stride);
}

// Tokens of one text are looked at one by one.
constexpr int64_t STRETCH = 1;
struct Stretch {
    Stretch(const Pool&, Scratch&) {}
    void attend(int64_t, int64_t, int64_t, const Half*, float, Half*) {}
};
