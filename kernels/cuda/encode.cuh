/*
 * encode.cuh: one head of K or V to its coded bytes, by a warp. Device code.
 *
 * The bytes are those of the table's encode: the scale in double, the quotient in f32, rounded to
 * nearest even by the conversion. A lane holds the elements that it writes.
 */
#ifndef KVKI_CUDA_ENCODE_CUH
#define KVKI_CUDA_ENCODE_CUH

#include "device.cuh"

#define ENCODE_DIM_MAX 256u
#define ENCODE_HELD    (ENCODE_DIM_MAX / 32u)

__device__ static inline uint8_t code_of(float x, kvk_dtype dtype)
{
    return dtype == KVK_I8_SCALED ? (uint8_t)(int8_t)rintf(x)
                                  : __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

/* in [dim] bf16 -> head `head` of the slices at slice and at copy (NULL: not); a scale of NaN where
 * an element is not finite, and then *bad (NULL: not) is 1. The whole warp calls. */
__device__ static inline void encode_head(const __nv_bfloat16 *in, uint32_t n_heads, uint32_t dim,
                                          uint32_t head, kvk_dtype dtype, uint8_t *slice,
                                          uint8_t *copy, uint32_t *bad)
{
    uint32_t lane = threadIdx.x & 31u, bits = 0;
    float x[ENCODE_HELD], most = 0;

#pragma unroll
    for (uint32_t i = 0; i < ENCODE_HELD; i++) {
        x[i] = lane + i * 32u < dim ? __bfloat162float(in[lane + i * 32u]) : 0.0f;
        most = fmaxf(most, isfinite(x[i]) ? fabsf(x[i]) : INFINITY);
    }
    most = kvki_lanes_max(most, 32);
    if (most > 0 && most < INFINITY)
        bits = kvki_scale_bits(most, dtype == KVK_I8_SCALED ? 127.0 : 448.0);
#pragma unroll
    for (uint32_t i = 0; i < ENCODE_HELD; i++) {
        uint32_t at = head * dim + lane + i * 32u;
        if (lane + i * 32u >= dim)
            continue;
        uint8_t code = bits ? code_of(__fdiv_rn(x[i], kvki_bf16(bits)), dtype) : 0;
        slice[at] = code;
        if (copy)
            copy[at] = code;
    }
    bits = most < INFINITY ? bits : 0x7fc0u;
    if (lane == 0 && bad && most == INFINITY)
        *bad = 1;
    if (lane < 2) {
        uint32_t at = n_heads * dim + 2u * head + lane;
        slice[at] = (uint8_t)(bits >> (8u * lane));
        if (copy)
            copy[at] = (uint8_t)(bits >> (8u * lane));
    }
}

#endif
