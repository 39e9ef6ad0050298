/*
 * prefill.cuh: what packing the keys of a chunk's attention (prefill_pack.cu) and its two forms,
 * that of every device (prefill.cu) and that of sm_90 (prefill_90a.cu), share. Device code, and
 * the launches of one file by another.
 */
#ifndef KVKI_CUDA_PREFILL_CUH
#define KVKI_CUDA_PREFILL_CUH

#include "mma.cuh"
#include "wgmma.cuh"

#define PREFILL_ROWS     128u /* query rows of a block, 16 a warp */
#define PREFILL_KEYS     64u  /* of a tile; in the form of sm_90, twice as many with `fast` */
#define PREFILL_KEYS_MAX 128u

/*
 * Packed keys: for each sequence and kv head its tiles, each of them its keys' pieces of K, then
 * those of V, one or two [tile_keys, head_dim] bf16 tiles as wgmma.cuh lays them out.
 */
struct prefill_params {
    kvk_cuda_prefill_args a;
    char *packed;
    uint32_t keys_max;  /* a multiple of PREFILL_KEYS_MAX */
    uint32_t tile_keys; /* of a tile */
    uint32_t pieces;    /* 1 or 2 */
    uint32_t splits;    /* of the keys of a block of rows, if that alone would be few blocks */
    float *part_o;      /* [splits, n_seqs, n_q, n_q_heads, head_dim], if splits > 1 */
    float2 *part_sums;  /* [splits, n_seqs, n_q, n_q_heads]: maximum, total */
};

/* Bytes of a key's pieces of K and V. */
__host__ __device__ static inline uint32_t prefill_key_bytes(const struct prefill_params *p)
{
    return p->a.head_dim * p->pieces * 4u;
}

__host__ __device__ static inline char *prefill_packed(const struct prefill_params *p, uint32_t seq,
                                                       uint32_t kv_head)
{
    return p->packed +
           ((size_t)seq * p->a.n_kv_heads + kv_head) * p->keys_max * prefill_key_bytes(p);
}

__host__ __device__ static inline size_t prefill_part_rows(const kvk_cuda_prefill_args *a)
{
    return (size_t)a->n_seqs * a->n_q * a->n_q_heads;
}

__device__ static inline uint32_t prefill_queries_of(const kvk_cuda_prefill_args *a, uint32_t seq)
{
    return a->n_queries ? min(a->n_queries[seq], a->n_q) : a->n_q;
}

/* How many rows of its own a chunk has behind the list. */
__device__ static inline uint32_t prefill_own_of(const kvk_cuda_prefill_args *a, uint32_t seq)
{
    return a->own == KVK_CUDA_OWN_CHUNK ? prefill_queries_of(a, seq) : 0;
}

/* How many keys query i of n_queries sees; they are a prefix of all. */
__device__ static inline int32_t prefill_seen(const kvk_cuda_prefill_args *a, uint32_t n_list,
                                              uint32_t n_queries, uint32_t i)
{
    int32_t own = a->own == KVK_CUDA_OWN_CHUNK    ? (int32_t)i + 1
                  : a->own == KVK_CUDA_OWN_LISTED ? (int32_t)i + 1 - (int32_t)n_queries
                                                  : 0;
    return max((int32_t)n_list + own, 0);
}

typedef void (*prefill_fn)(const struct prefill_params p);

/* Lets a form's kernel have its shared memory, and launches it behind the packing. */
static inline kvc_status prefill_launch(const kvk_cuda *cuda, prefill_fn kernel, dim3 grid,
                                        unsigned threads, size_t smem, kvk_stream *stream,
                                        const struct prefill_params &p)
{
    kvc_status st = kvki_cuda_status(cudaFuncSetAttribute(
        (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));

    return st == KVC_OK ? kvki_cuda_launch_next(cuda, kernel, grid, threads, smem, stream, p) : st;
}

/* Fills p.packed. */
kvc_status kvki_prefill_pack(const kvk_cuda *cuda, const struct prefill_params &p,
                             kvk_stream *stream);

/* Whether the device has the form of sm_90, and that form over p.packed, grid as in prefill.cu. */
bool kvki_prefill_90a_runs(const kvk_cuda *cuda);
kvc_status kvki_prefill_90a(const kvk_cuda *cuda, const struct prefill_params &p, dim3 grid,
                            kvk_stream *stream);

#endif
