/*
 * merge.cu: two partials into one by log-sum-exp, one warp a row; the shares in double, as in the
 * table's merge. A partial at -INFINITY is empty and its o is not read.
 */
#include "device.cuh"

#define THREADS 256u

__global__ void __launch_bounds__(THREADS) merge_kernel(const kvk_merge_args a)
{
    uint32_t row = blockIdx.x * (THREADS / 32u) + threadIdx.x / 32u, lane = threadIdx.x & 31u;
    double share_a = 0, share_b = 1;
    float lse_a = 0, lse_b = 0, lse = 0;

    if (row >= a.n)
        return;
    lse = lse_b = a.lse_b[row];
    lse_a = a.lse_a[row];
    if (lse_b == -INFINITY)
        return;
    if (lse_a != -INFINITY) {
        double top = lse_a > lse_b ? (double)lse_a : (double)lse_b;
        double x = exp((double)lse_a - top), y = exp((double)lse_b - top);
        share_a = x / (x + y);
        share_b = y / (x + y);
        lse = (float)(top + log(x + y));
    }
    for (uint32_t d = lane; d < a.dim; d += 32) {
        size_t at = (size_t)row * a.dim + d;
        double kept = lse_a != -INFINITY ? (double)a.o_a[at] * share_a : 0;
        a.o_a[at] = (float)(kept + (double)a.o_b[at] * share_b);
    }
    __syncwarp();
    if (lane == 0)
        a.lse_a[row] = lse;
}

extern "C" kvc_status kvk_cuda_merge(kvk_cuda *cuda, const kvk_merge_args *args, kvk_stream *stream)
{
    uint32_t rows_a_block = THREADS / 32u;
    kvc_status st = KVC_OK;

    if (args->dim == 0 || (args->n && (!args->o_a || !args->lse_a || !args->o_b || !args->lse_b)))
        return KVC_INVALID;
    if (args->n == 0)
        return KVC_OK;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    merge_kernel<<<(args->n + rows_a_block - 1) / rows_a_block, THREADS, 0,
                   kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
