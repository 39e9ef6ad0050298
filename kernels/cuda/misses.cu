/*
 * misses.cu: rows of a decode step that have to come another way, of one sequence: which they are,
 * and that they did not come.
 *
 * Each op is one small kernel; counts are read in memory.
 */
#include "rows.cuh"

#define THREADS      256u
#define MISS_THREADS 1024u

/* Exclusive prefix sum over the block; *total_p the sum. All threads call. */
__device__ static uint32_t block_prefix(uint32_t *sums, uint32_t own, uint32_t *total_p)
{
    uint32_t lane = threadIdx.x & 31u, warp = threadIdx.x / 32u, upto = own, before = 0, total = 0;

    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(KVKI_FULL_WARP, upto, step);
        upto += lane >= step ? other : 0;
    }
    if (lane == 31)
        sums[warp] = upto;
    __syncthreads();
    for (uint32_t w = 0; w < MISS_THREADS / 32u; w++) {
        before += w < warp ? sums[w] : 0;
        total += sums[w];
    }
    *total_p = total;
    return before + upto - own;
}

__global__ void __launch_bounds__(MISS_THREADS) misses_kernel(const kvk_cuda_misses_args a)
{
    __shared__ uint32_t sums[MISS_THREADS / 32u];
    uint32_t n = 0, each = 0, from = 0, to = 0, own = 0, total = 0;
    const kvk_cuda_source source = *a.source;

    kvki_wait_for_previous();
    n = min(*a.n_list, a.stride);
    each = (n + MISS_THREADS - 1) / MISS_THREADS;
    from = min(threadIdx.x * each, n);
    to = min(from + each, n);
    for (uint32_t i = from; i < to; i++)
        own += a.fetch[i] != KVK_CUDA_RESIDENT && !kvki_source_row(&source, a.fetch[i], 16);
    own = block_prefix(sums, own, &total);
    for (uint32_t i = from; i < to; i++) {
        if (a.fetch[i] == KVK_CUDA_RESIDENT || kvki_source_row(&source, a.fetch[i], 16))
            continue;
        a.miss_pos[own] = a.fetch[i];
        a.fetch[i] = a.staged + own++;
    }
    if (threadIdx.x == 0)
        *a.n_far = total;
}

extern "C" kvc_status kvk_cuda_misses(kvk_cuda *cuda, const kvk_cuda_misses_args *args,
                                      kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (!args->fetch || !args->n_list || !args->stride || !args->source || !args->miss_pos ||
        !args->n_far || args->staged > KVK_CUDA_RESIDENT - args->stride)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(cuda, misses_kernel, dim3(1), MISS_THREADS, 0, stream, *args);
}

__global__ void __launch_bounds__(THREADS) forget_kernel(const kvk_cuda_forget_args a)
{
    uint32_t i = blockIdx.x * THREADS + threadIdx.x, n = min(*a.n_list, a.stride);
    const kvk_cuda_residency r = *a.res;

    if (i >= n || a.list[i] < 0 || a.fetch[i] == KVK_CUDA_RESIDENT)
        return;
    if (a.status && (a.fetch[i] < a.staged || a.status[a.fetch[i] - a.staged] == 0))
        return;
    uint32_t slot = (uint32_t)a.list[i], position = r.pos_of[slot];
    if (position < r.n_positions && r.slot_of[position] == (int32_t)slot)
        r.slot_of[position] = -1;
    r.pos_of[slot] = UINT32_MAX;
    r.used[slot] = 0;
    a.list[i] = -1;
}

extern "C" kvc_status kvk_cuda_forget(kvk_cuda *cuda, const kvk_cuda_forget_args *args,
                                      kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (!args->list || !args->fetch || !args->n_list || !args->stride || !args->res)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    forget_kernel<<<(args->stride + THREADS - 1) / THREADS, THREADS, 0, kvki_cuda_stream(stream)>>>(
        *args);
    return kvki_cuda_launched();
}
