/*
 * keep.cu: TokenSelect's Selection Cache (2411.02886 Alg. 1) decided on the device: whether a query
 * is still so near to the one that last selected that its picks are kept.
 *
 * One block a sequence; sums in double, lanes over the width and then one tree, so that the same
 * query always decides alike.
 */
#include "device.cuh"

#define THREADS 256u

/* Sum over the block, the same in every thread. */
__device__ static double block_sum(double x)
{
    __shared__ double part[THREADS / 32u];
    double sum = 0;

    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(KVKI_FULL_WARP, x, step);
    __syncthreads(); /* the last sum's parts have been read */
    if ((threadIdx.x & 31u) == 0)
        part[threadIdx.x / 32u] = x;
    __syncthreads();
    for (uint32_t w = 0; w < THREADS / 32u; w++)
        sum += part[w];
    return sum;
}

__global__ void __launch_bounds__(THREADS) keep_kernel(const kvk_cuda_keep_args a)
{
    const float *q = a.q + (size_t)blockIdx.x * a.width;
    float *last = a.last + (size_t)blockIdx.x * a.width;
    double both = 0, own = 0, other = 0, cosine = 0;

    for (uint32_t i = threadIdx.x; i < a.width; i += THREADS) {
        double x = q[i], y = last[i];
        both += x * y;
        own += x * x;
        other += y * y;
    }
    both = block_sum(both);
    own = block_sum(own);
    other = block_sum(other);
    if (own > 0 && other > 0)
        cosine = both / (sqrt(own) * sqrt(other));
    if (threadIdx.x == 0)
        a.keep[blockIdx.x] = cosine >= a.threshold; /* false for a NaN */
    if (cosine >= a.threshold)
        return;
    for (uint32_t i = threadIdx.x; i < a.width; i += THREADS)
        last[i] = q[i];
}

extern "C" kvc_status kvk_cuda_keep(kvk_cuda *cuda, const kvk_cuda_keep_args *args,
                                    kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->n_seqs > KVK_CUDA_SEQS_MAX || args->width == 0 || !(args->threshold > 0))
        return KVC_INVALID;
    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args->q || !args->last || !args->keep)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    keep_kernel<<<args->n_seqs, THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
