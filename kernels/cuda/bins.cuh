/*
 * bins.cuh: how many counted keys lie above a bin, for a block that ranks by bins of keys. Device
 * code; a block calls as a whole, with as many threads as it says.
 */
#ifndef KVKI_CUDA_BINS_CUH
#define KVKI_CUDA_BINS_CUH

#include "device.cuh"

/* Counts of the kEach bins that end below the thread's top one (n_bins - threadIdx.x * kEach), the
 * highest first, and how many keys lie in the bins above them. A barrier is within. */
template <uint32_t kThreads, uint32_t kEach>
__device__ static inline uint32_t kvki_above_bins(const uint32_t *bins, uint32_t n_bins,
                                                  uint32_t (&counts)[kEach])
{
    __shared__ uint32_t sums[kThreads / 32u];
    uint32_t top = n_bins - threadIdx.x * kEach, lane = threadIdx.x & 31u, own = 0, upto = 0;

#pragma unroll
    for (uint32_t i = 0; i < kEach; i++) {
        counts[i] = __ldcg(bins + top - 1 - i);
        own += counts[i];
    }
    upto = own;
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(KVKI_FULL_WARP, upto, step);
        upto += lane >= step ? other : 0;
    }
    if (lane == 31)
        sums[threadIdx.x / 32u] = upto;
    __syncthreads();
    upto -= own;
    for (uint32_t warp = 0; warp < threadIdx.x / 32u; warp++)
        upto += sums[warp];
    return upto;
}

#endif
