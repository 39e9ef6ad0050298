/*
 * prefill_pack.cu: the rows that a chunk attends, from their slots and the chunk, into the tiles of
 * keys and values of each kv head that the products take (prefill.cuh).
 *
 * Every row is read once, decoded and rotated, and laid out as bf16, or as two bf16 pieces whose
 * sum is the f32 number to 2^-18. Places of the list that hold no row, and what fills up the last
 * tile, are zeros. A thread takes 16 bytes of each half of a slice, since rotation pairs them.
 */
#include "prefill.cuh"

#define THREADS 256u
#define LANES   128u /* of a key */
#define KEYS    (THREADS / LANES)

/* Where a thread's numbers are in their slice, and whether that is V's. */
struct place {
    uint32_t head, piece; /* of 8 elements, in the first half */
    bool of_v;
};

struct halves {
    uint4 low, high; /* 8 elements each; coded ones are in x and y */
    float scale;
};

__device__ static inline struct place place_of(uint32_t unit, uint32_t pieces)
{
    struct place at;

    at.piece = unit % pieces;
    at.of_v = unit / pieces % 2u;
    at.head = unit / (2u * pieces);
    return at;
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

/* Bytes of the row as they are; zeros of no row. */
template <kvk_dtype kDtype>
__device__ static inline struct halves load_halves(const struct prefill_params *p, const char *row,
                                                   struct place at)
{
    const kvk_cuda_prefill_args *a = &p->a;
    const char *slice = row + (at.of_v ? a->v_off_bytes : a->k_off_bytes);
    struct halves h = {};

    h.scale = 1;
    if (!row)
        return h;
    uint32_t low = at.head * a->head_dim + at.piece * 8u, high = low + a->head_dim / 2;
    if (kDtype == KVK_I8_SCALED || kDtype == KVK_E4M3_SCALED) {
        uint2 x = *(const uint2 *)(slice + low), y = *(const uint2 *)(slice + high);
        h.low = make_uint4(x.x, x.y, 0, 0);
        h.high = make_uint4(y.x, y.y, 0, 0);
        h.scale = kvki_bf16(((const uint16_t *)(slice + a->n_kv_heads * a->head_dim))[at.head]);
    } else {
        h.low = *(const uint4 *)(slice + low * 2u);
        h.high = *(const uint4 *)(slice + high * 2u);
    }
    return h;
}

/* Eight elements, their scale included. */
template <kvk_dtype kDtype>
__device__ static inline void decode(uint4 from, float scale, float (&x)[8])
{
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};

#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t half = words[i / 2] >> i % 2 * 16 & 0xffffu;
        uint32_t byte = words[i / 4] >> i % 4 * 8 & 0xffu;
        x[i] = kDtype == KVK_BF16        ? kvki_bf16(half)
               : kDtype == KVK_F16       ? __half2float(__ushort_as_half((uint16_t)half))
               : kDtype == KVK_I8_SCALED ? (float)(int8_t)byte * scale
                                         : kvki_e4m3((uint8_t)byte) * scale;
    }
}

/* x to the pieces at `to`. */
__device__ static inline void store_pieces(const struct prefill_params *p, const float (&x)[8],
                                           char *to)
{
    uint32_t high[4];

#pragma unroll
    for (int i = 0; i < 4; i++)
        high[i] = bf16_pair(x[i * 2], x[i * 2 + 1]);
    *(uint4 *)to = make_uint4(high[0], high[1], high[2], high[3]);
    if (p->pieces == 1)
        return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 rest = rest_of(x[i * 2], x[i * 2 + 1], high[i]);
        high[i] = bf16_pair(rest.x, rest.y);
    }
    *(uint4 *)(to + p->tile_keys * p->a.head_dim * 2u) =
        make_uint4(high[0], high[1], high[2], high[3]);
}

/* Key j's numbers to its tile; turn [head_dim / 2], NULL: they stay as they are. */
template <kvk_dtype kDtype>
__device__ static inline void store_halves(const struct prefill_params *p, uint32_t seq, uint32_t j,
                                           struct place at, const struct halves &h,
                                           const float2 *turn)
{
    uint32_t d = p->a.head_dim, row = j % p->tile_keys, first = j - row;
    char *tile = prefill_packed(p, seq, at.head) + (size_t)first * prefill_key_bytes(p) +
                 (at.of_v ? p->tile_keys * d * 2u * p->pieces : 0);
    float x[8], y[8];

    decode<kDtype>(h.low, h.scale, x);
    decode<kDtype>(h.high, h.scale, y);
    if (turn && !at.of_v) {
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            float2 r = turn[at.piece * 8u + i];
            float low = x[i] * r.x - y[i] * r.y, high = y[i] * r.x + x[i] * r.y;
            x[i] = low;
            y[i] = high;
        }
    }
    store_pieces(p, x, tile + tile_piece(p->tile_keys, row, at.piece));
    store_pieces(p, y, tile + tile_piece(p->tile_keys, row, at.piece + d / 16u));
}

/* A block takes KEYS keys: a key's angles once, which its first numbers' way hides. */
template <kvk_dtype kDtype>
__global__ void __launch_bounds__(THREADS) pack_kernel(const struct prefill_params p)
{
    __shared__ float2 turns[KEYS][64];
    const kvk_cuda_prefill_args *a = &p.a;
    uint32_t key = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    uint32_t seq = blockIdx.y, j = blockIdx.x * KEYS + key, pieces = a->head_dim / 16u;
    uint32_t units = a->n_kv_heads * 2u * pieces;
    int32_t position = 0;

    kvki_wait_for_previous();
    kvki_let_next_start();
    uint32_t n_list = min(a->n_list[seq], a->stride), n_own = prefill_own_of(a, seq);
    const char *row = key_row(a, seq, j, n_list, n_own, &position);
    bool rotated = row && a->inv_freq && (j < n_list ? a->k_positions : a->chunk_positions);
    struct halves h = {};
    if (lane < units)
        h = load_halves<kDtype>(&p, row, place_of(lane, pieces));
    if (rotated && lane < a->head_dim / 2)
        turns[key][lane] = attend_turn(position, a->inv_freq[lane]);
    __syncthreads();
    if (j >= (n_list + n_own + p.tile_keys - 1) / p.tile_keys * p.tile_keys)
        return;
    for (uint32_t unit = lane; unit < units; unit += LANES) {
        struct place at = place_of(unit, pieces);
        if (unit != lane)
            h = load_halves<kDtype>(&p, row, at);
        store_halves<kDtype>(&p, seq, j, at, h, rotated ? turns[key] : NULL);
    }
}

typedef void (*pack_fn)(const struct prefill_params p);

static pack_fn kernel_of(kvk_dtype dtype)
{
    switch (dtype) {
    case KVK_BF16:
        return pack_kernel<KVK_BF16>;
    case KVK_F16:
        return pack_kernel<KVK_F16>;
    case KVK_I8_SCALED:
        return pack_kernel<KVK_I8_SCALED>;
    default:
        return pack_kernel<KVK_E4M3_SCALED>;
    }
}

kvc_status kvki_prefill_pack(const kvk_cuda *cuda, const struct prefill_params &p,
                             kvk_stream *stream)
{
    return kvki_cuda_launch_next(cuda, kernel_of(p.a.dtype), dim3(p.keys_max / KEYS, p.a.n_seqs),
                                 THREADS, 0, stream, p);
}
