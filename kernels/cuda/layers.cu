/*
 * layers.cu: the parts of a small transformer that are not products: embeddings with taps, norms,
 * rotation (kvk/cuda_layers.h). Each is bound by memory: a warp or a block reads a row once.
 */
#include "device.cuh"
#include "kvk/cuda_layers.h"

#define THREADS  128u
#define DIM_MAX  4096u
#define TAPS_MAX 64u

__global__ void __launch_bounds__(THREADS) embed_kernel(const kvk_cuda_embed_args a)
{
    uint32_t i = blockIdx.x;

    for (uint32_t t = threadIdx.x; t < a.dim; t += THREADS) {
        float sum = 0;
        for (uint32_t j = 0; j <= a.n_taps && j <= i + a.n_before; j++) {
            uint32_t token = a.tokens[a.n_before + i - j];
            float x = token < a.vocab ? a.table[(size_t)token * a.dim + t] : 0.0f;
            sum = j == 0 ? x : fmaf(a.taps[(size_t)(j - 1) * a.dim + t], x, sum);
        }
        a.out[(size_t)i * a.dim + t] = sum;
    }
}

extern "C" kvc_status kvk_cuda_embed(kvk_cuda *cuda, const kvk_cuda_embed_args *args,
                                     kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->dim == 0 || args->dim % 4 != 0 || args->dim > DIM_MAX || args->n_taps > TAPS_MAX ||
        args->n_before > args->n_taps || args->n > INT32_MAX)
        return KVC_INVALID;
    if (args->n == 0)
        return KVC_OK;
    if (!args->tokens || !args->table || !args->out || (args->n_taps && !args->taps))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    embed_kernel<<<args->n, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}

__device__ static inline float warp_sum(float x)
{
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(KVKI_FULL_WARP, x, step);
    return x;
}

/* A warp a row; its second read comes from the cache. */
__global__ void __launch_bounds__(THREADS) rms_norm_kernel(const kvk_cuda_rms_norm_args a)
{
    uint32_t row = blockIdx.x * (THREADS / 32u) + threadIdx.x / 32u, lane = threadIdx.x & 31u;
    const float4 *x = (const float4 *)(a.x + (size_t)row * a.stride);
    const float4 *weight = (const float4 *)a.weight;
    float4 *out = (float4 *)(a.out + (size_t)row * a.dim);
    float sum = 0, r = 0;

    if (row >= a.n)
        return;
    for (uint32_t t = lane; t < a.dim / 4; t += 32) {
        float4 v = x[t];
        sum = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, sum))));
    }
    r = 1.0f / sqrtf(warp_sum(sum) / (float)a.dim + 1e-6f);
    for (uint32_t t = lane; t < a.dim / 4; t += 32) {
        float4 v = x[t], w = weight[t];
        out[t] = make_float4(v.x * r * w.x, v.y * r * w.y, v.z * r * w.z, v.w * r * w.w);
    }
}

extern "C" kvc_status kvk_cuda_rms_norm(kvk_cuda *cuda, const kvk_cuda_rms_norm_args *args,
                                        kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->dim == 0 || args->dim % 4 != 0 || args->stride % 4 != 0 || args->stride < args->dim)
        return KVC_INVALID;
    if (args->n == 0)
        return KVC_OK;
    if (!args->x || !args->weight || !args->out || !kvki_aligned(args->x) ||
        !kvki_aligned(args->weight) || !kvki_aligned(args->out))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    rms_norm_kernel<<<args->n / (THREADS / 32u) + 1u, THREADS, 0, kvki_cuda_stream(stream)>>>(
        *args);
    return kvki_cuda_launched();
}

__global__ void __launch_bounds__(THREADS) rotate_kernel(const kvk_cuda_rotate_args a)
{
    uint32_t row = blockIdx.x, half = a.head_dim / 2;
    const float *cosine = a.cos + (size_t)(row % a.period) * half;
    const float *sine = a.sin + (size_t)(row % a.period) * half;

    for (uint32_t i = threadIdx.x; i < a.n_heads * half; i += THREADS) {
        uint32_t t = i % half;
        float *x = a.x + (size_t)row * a.stride + i / half * a.head_dim + t;
        float p = x[0], q = x[half];
        x[0] = p * cosine[t] - q * sine[t];
        x[half] = q * cosine[t] + p * sine[t];
    }
}

extern "C" kvc_status kvk_cuda_rotate(kvk_cuda *cuda, const kvk_cuda_rotate_args *args,
                                      kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->head_dim == 0 || args->head_dim % 2 != 0 || args->period == 0 ||
        args->n > INT32_MAX || (uint64_t)args->n_heads * args->head_dim > args->stride)
        return KVC_INVALID;
    if (args->n == 0 || args->n_heads == 0)
        return KVC_OK;
    if (!args->x || !args->cos || !args->sin)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    rotate_kernel<<<args->n, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
