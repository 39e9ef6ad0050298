/*
 * prefill_pack.cu: the rows that a chunk attends, from their slots and the chunk, into dense keys
 * and values of each kv head.
 *
 * Every row is read once, decoded and rotated, and laid out as bf16, or as two bf16 pieces whose
 * sum is the f32 number to 2^-18. Places of the list that hold no row, and what fills up the last
 * tile, are zeros.
 */
#include "prefill.cuh"

#define THREADS 256u
#define WARPS   (THREADS / 32u)

/* One element of a row's slice, its scale included. */
__device__ static inline float element(const char *slice, kvk_dtype dtype, uint32_t at, float scale)
{
    switch (dtype) {
    case KVK_BF16:
        return __bfloat162float(((const __nv_bfloat16 *)slice)[at]);
    case KVK_F16:
        return __half2float(((const __half *)slice)[at]);
    case KVK_I8_SCALED:
        return (float)((const int8_t *)slice)[at] * scale;
    default:
        return kvki_e4m3(((const uint8_t *)slice)[at]) * scale;
    }
}

/* x to the pieces at `to`. */
__device__ static inline void store_pieces(const struct prefill_params *p, float x,
                                           __nv_bfloat16 *to)
{
    __nv_bfloat16 high = __float2bfloat16_rn(x);

    to[0] = high;
    if (p->pieces == 2)
        to[prefill_piece_elems(p)] = __float2bfloat16_rn(x - __bfloat162float(high));
}

/* The row of key j, NULL where there is none, and its position. */
__device__ static inline const char *key_row(const kvk_cuda_prefill_args *a, uint32_t seq,
                                             uint32_t j, uint32_t n_list, uint32_t n_own,
                                             int32_t *position_p)
{
    uint32_t i = j - n_list;

    if (j < n_list) {
        size_t at = (size_t)seq * a->stride + j;
        int32_t slot = a->list[at];
        *position_p = a->inv_freq && a->k_positions ? a->k_positions[at] : 0;
        return slot < 0 ? NULL : (const char *)a->res[seq].slots + (size_t)slot * a->row_bytes;
    }
    if (i >= n_own)
        return NULL;
    *position_p =
        a->inv_freq && a->chunk_positions ? a->chunk_positions[(size_t)seq * a->n_q + i] : 0;
    return (const char *)a->chunk + ((size_t)seq * a->n_q + i) * a->row_bytes;
}

/* A block takes a key: its angles once, then a warp a kv head. */
__global__ void __launch_bounds__(THREADS) pack_kernel(const struct prefill_params p)
{
    __shared__ float2 turn[64];
    const kvk_cuda_prefill_args *a = &p.a;
    uint32_t seq = blockIdx.y, j = blockIdx.x, d = a->head_dim, half = d / 2;
    uint32_t n_list = min(a->n_list[seq], a->stride), n_own = prefill_own_of(a, seq);
    uint32_t n = (n_list + n_own + PREFILL_KEYS - 1) / PREFILL_KEYS * PREFILL_KEYS,
             scales = a->n_kv_heads * d;
    bool coded = p.coded, rotated = false;
    int32_t position = 0;
    const char *row = NULL;

    if (j >= n)
        return;
    row = key_row(a, seq, j, n_list, n_own, &position);
    rotated = a->inv_freq && (j < n_list ? a->k_positions != NULL : a->chunk_positions != NULL);
    if (rotated && threadIdx.x < half)
        turn[threadIdx.x] = attend_turn(position, a->inv_freq[threadIdx.x]);
    __syncthreads();
    for (uint32_t head = threadIdx.x / 32u; head < a->n_kv_heads; head += WARPS) {
        __nv_bfloat16 *to =
            p.packed +
            ((size_t)seq * a->n_kv_heads + head) * 2u * p.pieces * prefill_piece_elems(&p) +
            (size_t)j * d;
        const char *k = row + a->k_off_bytes, *v = row + a->v_off_bytes;
        float k_scale = 1, v_scale = 1;
        if (row && coded) {
            k_scale = kvki_bf16(((const uint16_t *)(k + scales))[head]);
            v_scale = kvki_bf16(((const uint16_t *)(v + scales))[head]);
        }
        for (uint32_t t = threadIdx.x & 31u; t < half; t += 32) {
            uint32_t at = head * d + t;
            float x = row ? element(k, a->dtype, at, k_scale) : 0.0f;
            float y = row ? element(k, a->dtype, at + half, k_scale) : 0.0f;
            float2 r = rotated && row ? turn[t] : make_float2(1, 0);
            store_pieces(&p, x * r.x - y * r.y, to + t);
            store_pieces(&p, y * r.x + x * r.y, to + t + half);
            store_pieces(&p, row ? element(v, a->dtype, at, v_scale) : 0.0f,
                         to + p.pieces * prefill_piece_elems(&p) + t);
            store_pieces(&p, row ? element(v, a->dtype, at + half, v_scale) : 0.0f,
                         to + p.pieces * prefill_piece_elems(&p) + t + half);
        }
    }
}

kvc_status kvki_prefill_pack(const struct prefill_params &p, kvk_stream *stream)
{
    pack_kernel<<<dim3(p.keys_max, p.a.n_seqs), THREADS, 0, kvki_cuda_stream(stream)>>>(p);
    return kvki_cuda_launched();
}
