/*
 * pass.cu: what frames a pass of several tokens: queries in f32 at their positions, rows of K and V
 * into a ring, and whether these are finite.
 *
 * A block takes a token (finite: whatever comes). Angles in double, as in the table's rope, once
 * for all heads.
 */
#include "device.cuh"
#include "kvk/cuda_pass.h"

#define THREADS    256u
#define HALF_MAX   128u
#define BLOCKS_MAX 264u /* of finite_kernel */

__global__ void __launch_bounds__(THREADS) rope_kernel(const kvk_cuda_rope_args a)
{
    __shared__ float2 turn[HALF_MAX];
    uint32_t half = a.head_dim / 2u, pairs = a.n_heads * half;
    const uint16_t *in = (const uint16_t *)a.in + (size_t)blockIdx.x * a.n_heads * a.head_dim;
    float *out = a.out + (size_t)blockIdx.x * a.n_heads * a.head_dim;

    if (threadIdx.x < half) {
        double s = 0, c = 1;
        if (a.inv_freq)
            sincos(((double)a.first + (double)blockIdx.x * a.step) * a.inv_freq[threadIdx.x], &s,
                   &c);
        turn[threadIdx.x] = make_float2((float)c, (float)s);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < pairs; i += THREADS) {
        uint32_t at = i / half * a.head_dim + i % half;
        float x = kvki_bf16(in[at]), y = kvki_bf16(in[at + half]);
        float2 t = turn[i % half];
        out[at] = x * t.x - y * t.y;
        out[at + half] = y * t.x + x * t.y;
    }
}

extern "C" kvc_status kvk_cuda_rope(kvk_cuda *cuda, const kvk_cuda_rope_args *args,
                                    kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->n > KVK_CUDA_CHUNK_MAX || !args->n_heads || !args->head_dim || args->head_dim % 2 ||
        args->head_dim > 2 * HALF_MAX || args->step > 1)
        return KVC_INVALID;
    if (args->n == 0)
        return KVC_OK;
    if (!args->in || !args->out)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    rope_kernel<<<args->n, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}

__global__ void __launch_bounds__(THREADS) rows_kernel(const kvk_cuda_rows_args a)
{
    uint32_t chunks = a.slice_bytes / 16u, slot = (a.first + blockIdx.x) % a.ring_rows;
    const uint4 *k = (const uint4 *)a.k + (size_t)blockIdx.x * chunks;
    const uint4 *v = (const uint4 *)a.v + (size_t)blockIdx.x * chunks;
    uint4 *row = (uint4 *)a.ring + (size_t)slot * 2u * chunks;
    uint4 *copy = a.copy ? (uint4 *)a.copy + (size_t)blockIdx.x * 2u * chunks : NULL;

    for (uint32_t i = threadIdx.x; i < 2 * chunks; i += THREADS) {
        uint4 x = i < chunks ? k[i] : v[i - chunks];
        row[i] = x;
        if (copy)
            copy[i] = x;
    }
}

extern "C" kvc_status kvk_cuda_rows(kvk_cuda *cuda, const kvk_cuda_rows_args *args,
                                    kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->n == 0)
        return KVC_OK;
    if (args->n > args->ring_rows || args->first > UINT32_MAX - args->n || !args->slice_bytes ||
        args->slice_bytes % 16 || !args->k || !args->v || !args->ring || !kvki_aligned(args->k) ||
        !kvki_aligned(args->v) || !kvki_aligned(args->ring) || !kvki_aligned(args->copy))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    rows_kernel<<<args->n, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}

/* The exponents of two bf16 numbers, one of which has all ones. */
__device__ static inline bool pair_bad(uint32_t pair)
{
    return (pair & 0x7f80u) == 0x7f80u || (pair & 0x7f800000u) == 0x7f800000u;
}

__global__ void __launch_bounds__(THREADS) finite_kernel(const kvk_cuda_finite_args a)
{
    size_t n = a.len_bytes / 16u, each = (size_t)gridDim.x * THREADS;
    bool bad = false;

    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += each) {
        uint4 x = ((const uint4 *)a.in)[i];
        bad = bad || pair_bad(x.x) || pair_bad(x.y) || pair_bad(x.z) || pair_bad(x.w);
    }
    if (bad)
        *a.bad = 1; /* whoever finds one */
}

extern "C" kvc_status kvk_cuda_finite(kvk_cuda *cuda, const kvk_cuda_finite_args *args,
                                      kvk_stream *stream)
{
    size_t blocks = (args->len_bytes / 16u + THREADS - 1) / THREADS;
    kvc_status st = KVC_OK;

    if (args->len_bytes == 0)
        return KVC_OK;
    if (args->len_bytes % 16 || !args->in || !args->bad || !kvki_aligned(args->in))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    finite_kernel<<<(unsigned)(blocks < BLOCKS_MAX ? blocks : BLOCKS_MAX), THREADS, 0,
                    kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
