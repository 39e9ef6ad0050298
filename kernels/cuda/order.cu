/*
 * order.cu: the picks of a step in ascending order, where their rank is their position.
 *
 * A pick's place is the number of smaller ones, since no two are the same: eight lanes count for
 * one pick, a block for 32 of them, over all picks in shared memory.
 */
#include "device.cuh"

#define THREADS 256u
#define LANES   8u /* of a pick */

__global__ void __launch_bounds__(THREADS) order_kernel(const kvk_cuda_order_args a)
{
    __shared__ __align__(16) uint32_t all[KVK_CUDA_K_MAX];
    uint32_t seq = blockIdx.y, lane = threadIdx.x % LANES, below = 0;
    uint32_t mine = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;

    kvki_wait_for_previous();
    kvki_let_next_start();
    uint32_t n = min(a.n_picks[seq], a.k), n_fours = (n + 3u) / 4u;
    for (uint32_t i = threadIdx.x; i < n_fours * 4u; i += THREADS)
        all[i] = i < n ? a.picks[(size_t)seq * a.k + i] : UINT32_MAX;
    __syncthreads();
    uint32_t own = mine < n ? all[mine] : 0;
    for (uint32_t i = lane; i < n_fours; i += LANES) {
        uint4 x = ((const uint4 *)all)[i];
        below += (x.x < own) + (x.y < own) + (x.z < own) + (x.w < own);
    }
    for (uint32_t step = 1; step < LANES; step *= 2)
        below += __shfl_xor_sync(KVKI_FULL_WARP, below, step);
    if (lane == 0 && mine < n)
        a.ordered[(size_t)seq * a.k + below] = own;
}

extern "C" kvc_status kvk_cuda_order(kvk_cuda *cuda, const kvk_cuda_order_args *args,
                                     kvk_stream *stream)
{
    uint32_t each = THREADS / LANES;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (args->n_seqs > KVK_CUDA_SEQS_MAX || args->k == 0 || args->k > KVK_CUDA_K_MAX ||
        !args->picks || !args->n_picks || !args->ordered || args->ordered == args->picks)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(cuda, order_kernel,
                                 dim3((args->k + each - 1) / each, args->n_seqs), THREADS, 0,
                                 stream, *args);
}
