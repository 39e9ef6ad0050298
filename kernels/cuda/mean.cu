/*
 * mean.cu: means of the queries of chunks (2411.02886 sec 4): one query that selects for a chunk.
 *
 * A thread owns one column and adds its rows in order, as the table's mean does; neighbouring
 * threads read neighbouring columns.
 */
#include "device.cuh"

#define THREADS 128u

__device__ static inline float element(const float *in, size_t i)
{
    return in[i];
}

__device__ static inline float element(const __half *in, size_t i)
{
    return __half2float(in[i]);
}

__device__ static inline float element(const __nv_bfloat16 *in, size_t i)
{
    return __bfloat162float(in[i]);
}

template <class Element>
__global__ void __launch_bounds__(THREADS) mean_kernel(const kvk_cuda_mean_args a)
{
    uint32_t column = blockIdx.x * THREADS + threadIdx.x;
    const Element *in = (const Element *)a.in + (size_t)blockIdx.y * a.n * a.width + column;
    double sum = 0;

    if (column >= a.width)
        return;
#pragma unroll 16
    for (uint32_t row = 0; row < a.n; row++)
        sum += (double)element(in, (size_t)row * a.width);
    a.out[(size_t)blockIdx.y * a.width + column] = a.n ? (float)(sum / a.n) : 0.0f;
}

extern "C" kvc_status kvk_cuda_mean(kvk_cuda *cuda, const kvk_cuda_mean_args *args,
                                    kvk_stream *stream)
{
    dim3 grid((args->width + THREADS - 1) / THREADS, args->n_seqs);
    kvc_status st = KVC_OK;

    if (args->n_seqs > KVK_CUDA_SEQS_MAX || args->width == 0 || args->width > 1u << 20 ||
        (args->dtype != KVK_F32 && args->dtype != KVK_F16 && args->dtype != KVK_BF16))
        return KVC_INVALID;
    if (args->n_seqs == 0)
        return KVC_OK;
    if ((args->n && !args->in) || !args->out)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    if (args->dtype == KVK_F32)
        mean_kernel<float><<<grid, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    else if (args->dtype == KVK_F16)
        mean_kernel<__half><<<grid, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    else
        mean_kernel<__nv_bfloat16><<<grid, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
