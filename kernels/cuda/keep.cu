/*
 * keep.cu: TokenSelect's Selection Cache (2411.02886 Alg. 1) decided on the device, one block a
 * sequence: see keep.cuh.
 */
#include "keep.cuh"

__global__ void __launch_bounds__(KEEP_THREADS) keep_kernel(const kvk_cuda_keep_args a)
{
    const float *q = a.q + (size_t)blockIdx.x * a.width;
    float *last = a.last + (size_t)blockIdx.x * a.width;
    auto query = [q](uint32_t i) { return q[i]; };
    bool near = keep_is_near(query, last, a.width, a.threshold);

    if (threadIdx.x == 0)
        a.keep[blockIdx.x] = near;
    if (!near)
        keep_query(query, last, a.width);
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
    keep_kernel<<<args->n_seqs, KEEP_THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
