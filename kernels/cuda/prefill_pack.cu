/*
 * prefill_pack.cu: the rows that a chunk attends, from their slots and the chunk, into the tiles of
 * keys and values of each kv head that the products take (prefill.cuh).
 *
 * Every row is read once, decoded and rotated, and laid out as bf16, or as two bf16 pieces whose
 * sum is the f32 number to 2^-18. Places of the list that hold no row, and what fills up the last
 * tile, are zeros.
 */
#include "prefill.cuh"

#define THREADS 256u
#define KEYS    8u /* of a block */
#define BATCH   2u /* units of a thread on their way at once */

/* Where a key's row is, NULL: nowhere; and whether it is rotated, to which position. */
struct key {
    const char *row;
    int32_t position;
    bool rotated;
};

/* A unit is a piece of 8 elements of the first half of a slice, and that of the second which is
 * rotated with it: of K of every head, then of V. Where one of a block's is. */
struct place {
    uint32_t key, head, piece;
    bool of_v;
};

struct halves {
    uint4 low, high; /* 8 elements each; coded ones are in x and y */
    float scale;
};

template <int kDim>
__device__ static inline struct place place_of(uint32_t unit, uint32_t n_kv_heads)
{
    const uint32_t pieces = kDim / 16;
    uint32_t slice = unit / pieces;
    struct place at;

    at.piece = unit % pieces;
    at.key = slice / (2u * n_kv_heads);
    at.head = slice % (2u * n_kv_heads);
    at.of_v = at.head >= n_kv_heads;
    at.head -= at.of_v ? n_kv_heads : 0;
    return at;
}

/* Key j of a sequence's n_list listed ones and n_own of its own. */
__device__ static inline struct key find_key(const kvk_cuda_prefill_args *a, uint32_t seq,
                                             uint32_t j, uint32_t n_list, uint32_t n_own)
{
    bool listed = j < n_list;
    const int32_t *positions = listed ? a->k_positions : a->chunk_positions;
    size_t at = listed ? (size_t)seq * a->stride + j : (size_t)seq * a->n_q + j - n_list;
    int32_t slot = listed ? a->list[at] : 0;
    struct key key = {};

    if (slot < 0 || j >= n_list + n_own)
        return key;
    key.row = listed ? (const char *)a->res[seq].slots + (size_t)slot * a->row_bytes
                     : (const char *)a->chunk + at * a->row_bytes;
    key.rotated = a->inv_freq && positions;
    key.position = key.rotated ? positions[at] : 0;
    return key;
}

/* Bytes of the row as they are; zeros of no row. */
template <kvk_dtype kDtype, int kDim>
__device__ static inline struct halves load_halves(const struct prefill_params *p, const char *row,
                                                   struct place at)
{
    const kvk_cuda_prefill_args *a = &p->a;
    const char *slice = row + (at.of_v ? a->v_off_bytes : a->k_off_bytes);
    uint32_t low = at.head * kDim + at.piece * 8u, high = low + kDim / 2;
    struct halves h = {};

    if (!row)
        return h;
    if (kDtype == KVK_I8_SCALED || kDtype == KVK_E4M3_SCALED) {
        uint2 x = *(const uint2 *)(slice + low), y = *(const uint2 *)(slice + high);
        h.low = make_uint4(x.x, x.y, 0, 0);
        h.high = make_uint4(y.x, y.y, 0, 0);
        h.scale = kvki_bf16(((const uint16_t *)(slice + a->n_kv_heads * kDim))[at.head]);
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

/* The first pieces to `to`, and what they leave to the second ones. */
template <int kDim>
__device__ static inline void store_pieces(const struct prefill_params *p, uint4 high, uint4 rest,
                                           char *to)
{
    *(uint4 *)to = high;
    if (p->pieces == 2)
        *(uint4 *)(to + p->tile_keys * kDim * 2u) = rest;
}

template <int kDim>
__device__ static inline void store_floats(const struct prefill_params *p, const float (&x)[8],
                                           char *to)
{
    uint32_t high[4], rest[4];

#pragma unroll
    for (int i = 0; i < 4; i++) {
        high[i] = bf16_pair(x[i * 2], x[i * 2 + 1]);
        float2 left = rest_of(x[i * 2], x[i * 2 + 1], high[i]);
        rest[i] = bf16_pair(left.x, left.y);
    }
    store_pieces<kDim>(p, make_uint4(high[0], high[1], high[2], high[3]),
                       make_uint4(rest[0], rest[1], rest[2], rest[3]), to);
}

/* A unit of key j to its tile; turn [kDim / 2], NULL: it stays as it is. */
template <kvk_dtype kDtype, int kDim>
__device__ static inline void store_halves(const struct prefill_params *p, uint32_t seq, uint32_t j,
                                           struct place at, const struct halves &h,
                                           const float2 *turn)
{
    uint32_t row = j % p->tile_keys;
    char *tile = prefill_packed(p, seq, at.head) + (size_t)(j - row) * prefill_key_bytes(p) +
                 (at.of_v ? p->tile_keys * kDim * 2u * p->pieces : 0);
    char *low = tile + tile_piece(p->tile_keys, row, at.piece);
    char *high = tile + tile_piece(p->tile_keys, row, at.piece + kDim / 16u);
    float x[8], y[8];

    if (kDtype == KVK_BF16 && (at.of_v || !turn)) {
        store_pieces<kDim>(p, h.low, make_uint4(0, 0, 0, 0), low);
        store_pieces<kDim>(p, h.high, make_uint4(0, 0, 0, 0), high);
        return;
    }
    decode<kDtype>(h.low, h.scale, x);
    decode<kDtype>(h.high, h.scale, y);
    if (turn && !at.of_v) {
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            float2 r = turn[at.piece * 8u + i];
            float first = x[i] * r.x - y[i] * r.y, second = y[i] * r.x + x[i] * r.y;
            x[i] = first;
            y[i] = second;
        }
    }
    store_floats<kDim>(p, x, low);
    store_floats<kDim>(p, y, high);
}

/* (cos, sin) of the block's keys, where they are rotated. */
template <int kDim>
__device__ static inline void find_turns(const kvk_cuda_prefill_args *a, const struct key *keys,
                                         float2 (*turns)[kDim / 2])
{
    for (uint32_t i = threadIdx.x; i < KEYS * (kDim / 2); i += THREADS) {
        const struct key *key = &keys[i / (kDim / 2)];
        if (key->rotated)
            turns[i / (kDim / 2)][i % (kDim / 2)] =
                attend_turn(key->position, a->inv_freq[i % (kDim / 2)]);
    }
}

/* A block takes KEYS keys; their angles are found while its first units are on their way. */
template <kvk_dtype kDtype, int kDim>
__global__ void __launch_bounds__(THREADS, 4) pack_kernel(const struct prefill_params p)
{
    __shared__ struct key keys[KEYS];
    __shared__ float2 turns[KEYS][kDim / 2];
    const kvk_cuda_prefill_args *a = &p.a;
    uint32_t seq = blockIdx.y, first = blockIdx.x * KEYS;
    uint32_t units = KEYS * a->n_kv_heads * 2u * (kDim / 16);

    kvki_wait_for_previous();
    kvki_let_next_start();
    uint32_t n_list = min(a->n_list[seq], a->stride), n_own = prefill_own_of(a, seq);
    if (first >= (n_list + n_own + p.tile_keys - 1) / p.tile_keys * p.tile_keys)
        return;
    if (threadIdx.x < KEYS)
        keys[threadIdx.x] = find_key(a, seq, first + threadIdx.x, n_list, n_own);
    __syncthreads();
    for (uint32_t from = 0; from < units; from += THREADS * BATCH) {
        struct halves h[BATCH];
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) {
            struct place at = place_of<kDim>(from + i * THREADS + threadIdx.x, a->n_kv_heads);
            if (at.key < KEYS)
                h[i] = load_halves<kDtype, kDim>(&p, keys[at.key].row, at);
        }
        if (from == 0) {
            find_turns<kDim>(a, keys, turns);
            __syncthreads();
        }
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) {
            struct place at = place_of<kDim>(from + i * THREADS + threadIdx.x, a->n_kv_heads);
            if (at.key < KEYS)
                store_halves<kDtype, kDim>(&p, seq, first + at.key, at, h[i],
                                           keys[at.key].rotated ? turns[at.key] : NULL);
        }
    }
}

typedef void (*pack_fn)(const struct prefill_params p);

template <int kDim> static pack_fn kernel_of(kvk_dtype dtype)
{
    switch (dtype) {
    case KVK_BF16:
        return pack_kernel<KVK_BF16, kDim>;
    case KVK_F16:
        return pack_kernel<KVK_F16, kDim>;
    case KVK_I8_SCALED:
        return pack_kernel<KVK_I8_SCALED, kDim>;
    default:
        return pack_kernel<KVK_E4M3_SCALED, kDim>;
    }
}

kvc_status kvki_prefill_pack(const kvk_cuda *cuda, const struct prefill_params &p,
                             kvk_stream *stream)
{
    pack_fn kernel = p.a.head_dim == 128 ? kernel_of<128>(p.a.dtype) : kernel_of<64>(p.a.dtype);

    return kvki_cuda_launch_next(cuda, kernel, dim3(p.keys_max / KEYS, p.a.n_seqs), THREADS, 0,
                                 stream, p);
}
