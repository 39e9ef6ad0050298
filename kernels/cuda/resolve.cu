/* resolve.cu: picks to slots as an op of its own: resolve.cuh's, one block a sequence. */
#include "resolve.cuh"

#define THREADS 1024u

__global__ void __launch_bounds__(THREADS) resolve_kernel(const kvk_cuda_resolve_args a)
{
    __shared__ struct resolve_state sh;

    kvki_wait_for_previous();
    /* What needs no list, attend's near rows, goes on beside this; not sooner, or it would go on
     * beside the op before too, which may write what it reads. */
    kvki_let_next_start();
    resolve_sequence<THREADS>(&sh, &a, blockIdx.x, NULL);
}

extern "C" kvc_status kvk_cuda_resolve(kvk_cuda *cuda, const kvk_cuda_resolve_args *args,
                                       kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!resolve_args_ok(args))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(cuda, resolve_kernel, dim3(args->n_seqs), THREADS, 0, stream,
                                 *args);
}
