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
    // Where scales are 8-bit codes themselves, else null: their 256 values, the scale of each 256 of them, what is added.
    const float *scale_table, *scale_max, *scale_offset;
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

// The weights of a decoder block.
struct Block {
    Weight q, k, v, o, gate, up, down;
    const void *attention_norm, *mlp_norm;  // (dim,)
    float eps;
    int32_t norms_bf16;
};

// Keys and values in a pool of `count` blocks, (count, kv_heads, block, head_dim), and the tokens of a step.
struct Pool {
    void *keys, *values;
    const int64_t *blocks, *slots;    // (rows,) where a token's own key and value go
    const int64_t *tables, *lengths;  // (rows, width) blocks of its text, (rows,) tokens it sees
    int64_t width, count, block, heads, kv_heads, head_dim;
};

// The vector extension of GCC: one source becomes SSE, AVX2 or AVX-512 by the target it is compiled for.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t LANES = 16;

#define SHUFFLE(x, ...) __builtin_shuffle(x, (Ints){__VA_ARGS__})
