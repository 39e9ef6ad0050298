/*
 * gather.cu: rows from host memory (or elsewhere in device memory) into their slots, one warp a
 * row.
 *
 * A warp has all 16-byte loads of a row of 4 KiB in flight before it stores the first: over PCIe
 * the time of a row is the round trip, and only what is in flight hides it.
 */
#include "rows.cuh"

#define THREADS   256u
#define IN_FLIGHT 8u /* loads of a lane: 4 KiB a warp */

__global__ void __launch_bounds__(THREADS) gather_kernel(const kvk_cuda_gather_args a)
{
    uint32_t seq = blockIdx.y, lane = threadIdx.x & 31u, n = min(a.n_list[seq], a.stride);
    uint32_t entry = blockIdx.x * (THREADS / 32u) + threadIdx.x / 32u;
    size_t at = (size_t)seq * a.stride + entry;
    uint32_t position = entry < n ? a.fetch[at] : KVK_CUDA_RESIDENT;
    const char *from = position == KVK_CUDA_RESIDENT
                           ? NULL
                           : kvki_source_row(a.source + seq, position, a.row_bytes);
    int32_t slot = from ? a.list[at] : -1;
    char *to = (char *)a.res[seq].slots + (size_t)max(slot, 0) * a.row_bytes;

    if (slot < 0)
        return;
    for (uint32_t start = lane * 16u; start < a.row_bytes; start += IN_FLIGHT * 512u) {
        uint4 d[IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            if (start + i * 512u < a.row_bytes)
                d[i] = kvki_load_once(from + start + i * 512u);
        }
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            if (start + i * 512u < a.row_bytes)
                *(uint4 *)(to + start + i * 512u) = d[i];
        }
    }
}

extern "C" kvc_status kvk_cuda_gather(kvk_cuda *cuda, const kvk_cuda_gather_args *args,
                                      kvk_stream *stream)
{
    uint32_t rows_a_block = THREADS / 32u;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0 || args->stride == 0)
        return KVC_OK;
    if (args->n_seqs > KVK_CUDA_SEQS_MAX || args->row_bytes == 0 || args->row_bytes % 16 != 0 ||
        !args->list || !args->fetch || !args->n_list || !args->res || !args->source)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    gather_kernel<<<dim3((args->stride + rows_a_block - 1) / rows_a_block, args->n_seqs), THREADS,
                    0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
