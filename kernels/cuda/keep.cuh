/*
 * keep.cuh: whether a query is still so near to the one that last selected that its picks are kept
 * (2411.02886 Alg. 1). Device code, for a block of KEEP_THREADS.
 *
 * Sums in double, threads over the width and then one tree, so that the same query always decides
 * alike.
 */
#ifndef KVKI_CUDA_KEEP_CUH
#define KVKI_CUDA_KEEP_CUH

#include "device.cuh"

#define KEEP_THREADS 256u

/* Sum over the block, the same in every thread. */
__device__ static inline double keep_sum(double x)
{
    __shared__ double part[KEEP_THREADS / 32u];
    double sum = 0;

    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(KVKI_FULL_WARP, x, step);
    __syncthreads(); /* the last sum's parts have been read */
    if ((threadIdx.x & 31u) == 0)
        part[threadIdx.x / 32u] = x;
    __syncthreads();
    for (uint32_t w = 0; w < KEEP_THREADS / 32u; w++)
        sum += part[w];
    return sum;
}

/* Whether the cosine of query(0 .. width - 1) and last is at least threshold; a norm of 0 makes it
 * 0, and a NaN false. All threads call and get the answer. */
template <typename Query>
__device__ static inline bool keep_is_near(const Query &query, const float *last, uint32_t width,
                                           double threshold)
{
    double both = 0, own = 0, other = 0, cosine = 0;

    for (uint32_t i = threadIdx.x; i < width; i += KEEP_THREADS) {
        double x = query(i), y = last[i];
        both += x * y;
        own += x * x;
        other += y * y;
    }
    both = keep_sum(both);
    own = keep_sum(own);
    other = keep_sum(other);
    if (own > 0 && other > 0)
        cosine = both / (sqrt(own) * sqrt(other));
    return own >= 0 && other >= 0 && cosine >= threshold;
}

/* The query is the one to compare with from now on. */
template <typename Query>
__device__ static inline void keep_query(const Query &query, float *last, uint32_t width)
{
    for (uint32_t i = threadIdx.x; i < width; i += KEEP_THREADS)
        last[i] = query(i);
}

#endif
