// The kernels of generation on x86-64 CPUs behind a C interface; library.py builds it and says what is handed over.
// Each instruction set compiles the same sources for itself; who calls says which one runs (Call::level).
#include "team.h"
#include "types.h"

namespace portable {
#include "kernels.h"
#include "generic.h"
#include "attention.h"
#include "block.h"
#include "entry.h"
}

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "kernels.h"
#include "generic.h"
#include "attention.h"
#include "block.h"
#include "entry.h"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,f16c")
namespace avx512 {
#include "kernels.h"
#include "panels.h"
#include "avx512.h"
#include "prompt.h"
#include "attention.h"
#include "block.h"
#include "entry.h"
}
#pragma GCC pop_options

// The best set this CPU has.
extern "C" int32_t puna_level() {
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}

#define BY_LEVEL(call, what) ((call)->level == 2 ? avx512::what : (call)->level == 1 ? avx2::what : portable::what)

// 0, or 1 where memory ran out: an exception must not get to Python's frames.
template <typename Work> static int32_t status(Work&& work) {
    try {
        work();
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

extern "C" int32_t puna_linear(const Call* call, const Weight* w, const void* x, void* y) {
    return status([&] { BY_LEVEL(call, linear_entry)(*call, *w, x, y); });
}

extern "C" int32_t puna_expand(const Call* call, const Weight* w, int64_t from, int64_t to, void* out) {
    return status([&] { BY_LEVEL(call, expand_entry)(*call, *w, from, to, out); });
}

extern "C" int32_t puna_attend(const Call* call, const Pool* pool, const void* q, const void* k, const void* v,
                               void* out) {
    return status([&] { BY_LEVEL(call, attend)(*call, *pool, q, k, v, out); });
}

extern "C" int32_t puna_forward(const Call* call, const Block* blocks, int64_t layers, const Pool* pool, void* x,
                                const float* cos, const float* sin) {
    return status([&] { BY_LEVEL(call, forward)(*call, blocks, layers, *pool, x, cos, sin); });
}
