/*
 * gather.cu: rows from host memory (or elsewhere in device memory) into their slots, a warp for
 * each piece of 4 KiB of a row: a row of a token is one piece, a chunk has many.
 *
 * A warp has all 16-byte loads of its piece in flight before it stores the first: over PCIe the
 * time of a row is the round trip, and only what is in flight hides it.
 */
#include "rows.cuh"

#define THREADS   256u
#define IN_FLIGHT 8u /* loads of a lane: 4 KiB a warp */
#define PIECE     (IN_FLIGHT * 512u)

__host__ __device__ static inline uint32_t pieces_of(uint32_t row_bytes)
{
    return (row_bytes + PIECE - 1) / PIECE;
}

__global__ void __launch_bounds__(THREADS) gather_kernel(const kvk_cuda_gather_args a)
{
    uint32_t seq = blockIdx.y, lane = threadIdx.x & 31u, n = min(a.n_list[seq], a.stride);
    uint32_t warp = blockIdx.x * (THREADS / 32u) + threadIdx.x / 32u;
    uint32_t pieces = pieces_of(a.row_bytes), entry = warp / pieces;
    size_t at = (size_t)seq * a.stride + entry;
    uint32_t position = entry < n ? a.fetch[at] : KVK_CUDA_RESIDENT;
    const char *from = position == KVK_CUDA_RESIDENT
                           ? NULL
                           : kvki_source_row(a.source + seq, position, a.row_bytes);
    int32_t slot = from ? a.list[at] : -1;
    char *to = (char *)a.res[seq].slots + (size_t)max(slot, 0) * a.row_bytes;

    if (slot < 0)
        return;
    uint32_t start = warp % pieces * PIECE + lane * 16u;
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

extern "C" kvc_status kvk_cuda_gather(kvk_cuda *cuda, const kvk_cuda_gather_args *args,
                                      kvk_stream *stream)
{
    uint32_t warps_a_block = THREADS / 32u;
    uint64_t warps = (uint64_t)args->stride * pieces_of(args->row_bytes);
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0 || args->stride == 0)
        return KVC_OK;
    if (args->n_seqs > KVK_CUDA_SEQS_MAX || args->row_bytes == 0 || args->row_bytes % 16 != 0 ||
        warps > UINT32_MAX || !args->list || !args->fetch || !args->n_list || !args->res ||
        !args->source)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    gather_kernel<<<dim3((uint32_t)((warps + warps_a_block - 1) / warps_a_block), args->n_seqs),
                    THREADS, 0, kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
