/*
 * chunk_fuse.cu: per-chunk attention into one result, a weighted sum in the order of the list, a
 * warp for each 32 numbers of a row. Factors in double as in the table's op; a chunk that counts
 * nothing is not read.
 */
#include "device.cuh"

#define THREADS 256u
#define AT_ONCE 8u /* chunks whose partials a warp has in flight; divides 32 */

/* What row i of an entry is multiplied with; 0: nothing to add. */
__device__ static inline float factor(float weight, float lse, bool off_by_one)
{
    if (weight == 0.0f || lse == -INFINITY)
        return 0;
    return off_by_one ? (float)((double)weight / (1 + exp(-(double)lse))) : weight;
}

__global__ void __launch_bounds__(THREADS) fuse_kernel(const kvk_cuda_chunk_fuse_args a)
{
    uint32_t warp = blockIdx.x * (THREADS / 32u) + threadIdx.x / 32u, lane = threadIdx.x & 31u;
    uint32_t parts = (a.dim + 31u) / 32u, row = warp / parts, d = warp % parts * 32u + lane;
    size_t seq = blockIdx.y;
    float sum = 0;

    kvki_wait_for_previous();
    kvki_let_next_start();
    if (row >= a.n)
        return;
    for (uint32_t from = 0; from < a.k; from += 32) { /* a factor a lane, then the sums */
        size_t at = (seq * a.k + from + lane) * a.n + row;
        float f = from + lane < a.k
                      ? factor(a.weights[seq * a.k + from + lane], a.lse[at], a.off_by_one != 0)
                      : 0.0f;
        for (uint32_t c = 0; c < min(32u, a.k - from); c += AT_ONCE) {
            const float *o = a.o + ((seq * a.k + from + c) * a.n + row) * a.dim + d;
            float share[AT_ONCE], x[AT_ONCE];
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
                share[i] = __shfl_sync(KVKI_FULL_WARP, f, (int)((c + i) & 31u));
                x[i] = share[i] != 0.0f && d < a.dim ? o[(size_t)i * a.n * a.dim] : 0.0f;
            }
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++)
                sum = share[i] != 0.0f ? fmaf(share[i], x[i], sum) : sum;
        }
    }
    if (d < a.dim)
        a.out[(seq * a.n + row) * a.dim + d] = sum;
}

extern "C" kvc_status kvk_cuda_chunk_fuse(kvk_cuda *cuda, const kvk_cuda_chunk_fuse_args *args,
                                          kvk_stream *stream)
{
    uint64_t warps = (uint64_t)args->n * ((args->dim + 31u) / 32u);
    kvc_status st = KVC_OK;

    if (args->dim == 0 || args->off_by_one > 1 || args->k > KVK_CHUNKS_MAX ||
        args->n_seqs > KVK_CUDA_SEQS_MAX || warps > INT32_MAX)
        return KVC_INVALID;
    if (args->n == 0 || args->n_seqs == 0)
        return KVC_OK;
    if (!args->out || (args->k && (!args->o || !args->lse || !args->weights)))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(
        cuda, fuse_kernel,
        dim3((uint32_t)((warps + THREADS / 32u - 1) / (THREADS / 32u)), args->n_seqs), THREADS, 0,
        stream, *args);
}
