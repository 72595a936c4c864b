// What crosses the border to Python (library.py mirrors these structs), and a vector of 16 floats.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t Half;  // bf16 or fp16 by its bits

enum Kind : int32_t { FLOAT32, BFLOAT16, INT8, INT4 };

// An (out, in) weight; see ops/packed.py for what the codes mean.
struct Weight {
    const void* codes;
    const void* scales;  // (out, in / group); null for FLOAT32 and BFLOAT16
    const void* mins;    // like scales, or null
    const float* table;  // 16 values of a 4-bit code, or null
    int64_t out, in, group;
    int32_t kind;
    int32_t half_scales;  // scales and mins are fp16, else fp32
    int32_t dynamic;      // activations are rounded to int8 first
};

struct Call {
    int32_t level;    // 0 portable, 1 AVX2, 2 AVX-512
    int32_t threads;
    int32_t bf16;     // activations are bf16, else fp32
    int32_t rows;
};

// The vector extension of GCC and Clang: one source becomes SSE, AVX2 or AVX-512 by the target it is compiled for.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef Half Halves __attribute__((vector_size(32), aligned(2), may_alias));
constexpr int64_t LANES = 16;
