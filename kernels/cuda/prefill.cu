/*
 * prefill.cu: attention of a chunk of queries over a list of slots and the chunk itself.
 *
 * Two kernels. pack_kernel reads every listed row and every row of the chunk once, rotates and
 * decodes, and lays K and V of each kv head out densely as bf16, or as two bf16 pieces each, whose
 * sum is the f32 number to 2^-18 (`fast` off). prefill_kernel is then attention over dense bf16: a
 * block takes 128 query rows of a kv head (a query's whole group next to each other) and goes over
 * the keys in tiles of 64, which are copied two tiles ahead; scores, weights and sums stay in
 * registers, the softmax is taken as the maximum grows. What is rounded is known: no piece is kept
 * with `fast`, else products of the two lower pieces are left out.
 *
 * Keys are in list order, then the chunk in order, so a query sees a prefix of them. Places that
 * hold no row are zeros and masked.
 */
#include "mma.cuh"

#define THREADS   256u
#define WARPS     (THREADS / 32u)
#define ROWS      128u /* query rows of a block, 16 a warp */
#define KEYS      64u  /* of a tile */
#define STAGES    2u
#define PAD_BYTES 16u
#define LOG2_E    1.4426950408889634f

struct prefill_params {
    kvk_cuda_prefill_args a;
    __nv_bfloat16 *packed; /* [n_seqs, n_kv_heads, pieces of K then of V, keys_max, head_dim] */
    uint32_t keys_max;     /* a multiple of KEYS */
    uint32_t pieces;       /* 1 or 2 */
    bool coded;
};

__host__ __device__ static inline size_t piece_elems(const struct prefill_params *p)
{
    return (size_t)p->keys_max * p->a.head_dim;
}

__device__ static inline uint32_t queries_of(const kvk_cuda_prefill_args *a, uint32_t seq)
{
    return a->n_queries ? min(a->n_queries[seq], a->n_q) : a->n_q;
}

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
        to[piece_elems(p)] = __float2bfloat16_rn(x - __bfloat162float(high));
}

/* The row of key j, NULL where there is none, and its position. */
__device__ static inline const char *key_row(const kvk_cuda_prefill_args *a, uint32_t seq,
                                             uint32_t j, uint32_t n_list, uint32_t n_queries,
                                             int32_t *position_p)
{
    uint32_t i = j - n_list;

    if (j < n_list) {
        size_t at = (size_t)seq * a->stride + j;
        int32_t slot = a->list[at];
        *position_p = a->inv_freq && a->k_positions ? a->k_positions[at] : 0;
        return slot < 0 ? NULL : (const char *)a->res[seq].slots + (size_t)slot * a->row_bytes;
    }
    if (i >= n_queries)
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
    uint32_t n_list = min(a->n_list[seq], a->stride), n_queries = queries_of(a, seq);
    uint32_t n = (n_list + n_queries + KEYS - 1) / KEYS * KEYS, scales = a->n_kv_heads * d;
    bool coded = p.coded, rotated = false;
    int32_t position = 0;
    const char *row = NULL;

    if (j >= n)
        return;
    row = key_row(a, seq, j, n_list, n_queries, &position);
    rotated = a->inv_freq && (j < n_list ? a->k_positions != NULL : a->chunk_positions != NULL);
    if (rotated && threadIdx.x < half)
        turn[threadIdx.x] = attend_turn(position, a->inv_freq[threadIdx.x]);
    __syncthreads();
    for (uint32_t head = threadIdx.x / 32u; head < a->n_kv_heads; head += WARPS) {
        __nv_bfloat16 *to = p.packed +
                            ((size_t)seq * a->n_kv_heads + head) * 2u * p.pieces * piece_elems(&p) +
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
                         to + p.pieces * piece_elems(&p) + t);
            store_pieces(&p, row ? element(v, a->dtype, at + half, v_scale) : 0.0f,
                         to + p.pieces * piece_elems(&p) + t + half);
        }
    }
}

/* ---- attention over what is packed ---- */

template <int kDim> struct tile_layout {
    static const uint32_t pitch = kDim * 2 + PAD_BYTES; /* of a key, in bytes */
    static const uint32_t piece = KEYS * pitch;
};

/* Asks for the tile's K and V pieces; all threads. */
template <int kDim, int kPieces>
__device__ static inline void ask_tile(const char *packed, size_t piece_bytes, uint32_t tile,
                                       char *to)
{
    const uint32_t chunks = kDim / 8; /* 16 bytes each */

#pragma unroll
    for (int piece = 0; piece < 2 * kPieces; piece++) {
        const char *from = packed + piece * piece_bytes + (size_t)tile * KEYS * kDim * 2;
        for (uint32_t i = threadIdx.x; i < KEYS * chunks; i += THREADS)
            kvki_async_copy(to + piece * tile_layout<kDim>::piece +
                                i / chunks * tile_layout<kDim>::pitch + i % chunks * 16u,
                            from + (size_t)i * 16u);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* What a warp keeps of its 16 query rows: the queries in pieces, sums, maxima, totals. A lane has
 * rows lane / 4 and that + 8. */
template <int kDim, int kPieces> struct rows_state {
    uint32_t q[kPieces][kDim / 16][4];
    float o[kDim / 8][4];
    float most[2], total[2];
};

__device__ static inline uint32_t high_pair(float x, float y)
{
    return pack(__float2bfloat16_rn(x), __float2bfloat16_rn(y));
}

__device__ static inline uint32_t rest_pair(float x, float y)
{
    return high_pair(x - __bfloat162float(__float2bfloat16_rn(x)),
                     y - __bfloat162float(__float2bfloat16_rn(y)));
}

template <int kDim, int kPieces>
__device__ static inline void load_rows(const kvk_cuda_prefill_args *a, uint32_t seq,
                                        uint32_t kv_head, uint32_t first, uint32_t n_rows,
                                        struct rows_state<kDim, kPieces> *s)
{
    uint32_t lane = threadIdx.x & 31u, group = a->n_q_heads / a->n_kv_heads;

#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        uint32_t row = first + lane / 4u + r * 8u;
        const float *q = a->q + ((size_t)(seq * a->n_q + row / group) * a->n_q_heads +
                                 kv_head * group + row % group) *
                                    kDim;
#pragma unroll
        for (int step = 0; step < kDim / 16; step++) {
#pragma unroll
            for (uint32_t part = 0; part < 2; part++) {
                float2 x = make_float2(0, 0);
                if (row < n_rows)
                    x = *(const float2 *)(q + step * 16 + part * 8u + lane % 4u * 2u);
                s->q[0][step][part * 2 + r] = high_pair(x.x, x.y);
                if (kPieces == 2)
                    s->q[kPieces - 1][step][part * 2 + r] = rest_pair(x.x, x.y);
            }
        }
        s->most[r] = -INFINITY;
        s->total[r] = 0;
    }
#pragma unroll
    for (int t = 0; t < kDim / 8; t++)
        s->o[t][0] = s->o[t][1] = s->o[t][2] = s->o[t][3] = 0;
}

__device__ static inline void multiply4(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1)
{
    multiply(c, a[0], a[1], a[2], a[3], b0, b1);
}

/* x: products of the warp's rows with the tile's keys, eight a column group. */
template <int kDim, int kPieces>
__device__ static inline void find_scores(const struct rows_state<kDim, kPieces> &s,
                                          const char *tile, float (&x)[KEYS / 8][4])
{
    uint32_t lane = threadIdx.x & 31u;
    const char *at = tile + (size_t)(lane / 16u * 8u + lane % 8u) * tile_layout<kDim>::pitch +
                     lane / 8u % 2u * 16u;

#pragma unroll
    for (int t = 0; t < (int)KEYS / 8; t++)
        x[t][0] = x[t][1] = x[t][2] = x[t][3] = 0;
#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
#pragma unroll
        for (int t = 0; t < (int)KEYS / 8; t += 2) {
            uint32_t k[4];
            const char *from = at + (size_t)t * 8 * tile_layout<kDim>::pitch + step * 32;
            load_matrices<false>(k, from);
            multiply4(x[t], s.q[0][step], k[0], k[1]);
            multiply4(x[t + 1], s.q[0][step], k[2], k[3]);
            if (kPieces == 2) {
                multiply4(x[t], s.q[kPieces - 1][step], k[0], k[1]);
                multiply4(x[t + 1], s.q[kPieces - 1][step], k[2], k[3]);
                load_matrices<false>(k, from + tile_layout<kDim>::piece);
                multiply4(x[t], s.q[0][step], k[0], k[1]);
                multiply4(x[t + 1], s.q[0][step], k[2], k[3]);
            }
        }
    }
}

/* Scores to weights against the greatest so far; what was summed before is scaled to it. seen: how
 * many keys of this tile each of the lane's two rows sees; holes: keys that are not there. */
template <int kDim, int kPieces>
__device__ static inline void
find_chunk_weights(const kvk_cuda_prefill_args *a, const int32_t (&seen)[2], uint64_t holes,
                   float (&x)[KEYS / 8][4], struct rows_state<kDim, kPieces> *s)
{
    uint32_t lane = threadIdx.x & 31u;

#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        float most = s->most[r], keep = 0, total = 0;
#pragma unroll
        for (int t = 0; t < (int)KEYS / 8; t++) {
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                uint32_t key = (uint32_t)t * 8u + lane % 4u * 2u + i;
                float z = x[t][r * 2 + i] * a->scale;
                z = a->softcap > 0 ? a->softcap * tanhf(z / a->softcap) : z;
                z = (int32_t)key < seen[r] && !(holes >> key & 1u) ? z : -INFINITY;
                x[t][r * 2 + i] = z;
                most = fmaxf(most, z);
            }
        }
        most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, 1));
        most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, 2));
        keep = s->most[r] == -INFINITY ? 0.0f : exp2f((s->most[r] - most) * LOG2_E);
#pragma unroll
        for (int t = 0; t < (int)KEYS / 8; t++) {
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                float z = x[t][r * 2 + i];
                float w = most == -INFINITY ? (z != z ? z : 0.0f) : exp2f((z - most) * LOG2_E);
                x[t][r * 2 + i] = w;
                total += w;
            }
        }
        total += __shfl_xor_sync(KVKI_FULL_WARP, total, 1);
        total += __shfl_xor_sync(KVKI_FULL_WARP, total, 2);
        s->total[r] = s->total[r] * keep + total;
        s->most[r] = most;
#pragma unroll
        for (int t = 0; t < kDim / 8; t++) {
            s->o[t][r * 2] *= keep;
            s->o[t][r * 2 + 1] *= keep;
        }
    }
}

/* Adds the tile's values, weighted. */
template <int kDim, int kPieces>
__device__ static inline void add_values(const float (&x)[KEYS / 8][4], const char *tile,
                                         struct rows_state<kDim, kPieces> *s)
{
    uint32_t lane = threadIdx.x & 31u;
    const char *at = tile + (size_t)(lane / 8u % 2u * 8u + lane % 8u) * tile_layout<kDim>::pitch +
                     lane / 16u * 16u;

#pragma unroll
    for (int step = 0; step < (int)KEYS / 16; step++) {
        const float(&l)[4] = x[step * 2], (&h)[4] = x[step * 2 + 1];
        uint32_t w[4] = {high_pair(l[0], l[1]), high_pair(l[2], l[3]), high_pair(h[0], h[1]),
                         high_pair(h[2], h[3])};
        uint32_t rest[4];
        if (kPieces == 2) {
            rest[0] = rest_pair(l[0], l[1]), rest[1] = rest_pair(l[2], l[3]);
            rest[2] = rest_pair(h[0], h[1]), rest[3] = rest_pair(h[2], h[3]);
        }
#pragma unroll
        for (int t = 0; t < kDim / 8; t += 2) {
            uint32_t v[4];
            const char *from = at + (size_t)step * 16 * tile_layout<kDim>::pitch + t * 16;
            load_matrices<true>(v, from);
            multiply4(s->o[t], w, v[0], v[1]);
            multiply4(s->o[t + 1], w, v[2], v[3]);
            if (kPieces == 2) {
                multiply4(s->o[t], rest, v[0], v[1]);
                multiply4(s->o[t + 1], rest, v[2], v[3]);
                load_matrices<true>(v, from + tile_layout<kDim>::piece);
                multiply4(s->o[t], w, v[0], v[1]);
                multiply4(s->o[t + 1], w, v[2], v[3]);
            }
        }
    }
}

template <int kDim, int kPieces>
__device__ static inline void store_rows(const kvk_cuda_prefill_args *a, uint32_t seq,
                                         uint32_t kv_head, uint32_t first, uint32_t n_rows,
                                         const struct rows_state<kDim, kPieces> &s)
{
    uint32_t lane = threadIdx.x & 31u, group = a->n_q_heads / a->n_kv_heads;

#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        uint32_t row = first + lane / 4u + r * 8u;
        size_t at =
            (size_t)(seq * a->n_q + row / group) * a->n_q_heads + kv_head * group + row % group;
        float total = s.total[r], share = total == 0.0f ? 0.0f : 1.0f / total;
        if (row >= n_rows)
            continue;
#pragma unroll
        for (int t = 0; t < kDim / 8; t++)
            *(float2 *)(a->o + at * kDim + t * 8 + lane % 4u * 2u) =
                make_float2(s.o[t][r * 2] * share, s.o[t][r * 2 + 1] * share);
        if (lane % 4u == 0)
            a->lse[at] = total == 0.0f ? -INFINITY : s.most[r] + logf(total);
    }
}

/* Which of a tile's keys are listed, but not there. One warp's worth of lanes reads two each. */
__device__ static inline uint64_t find_holes(const kvk_cuda_prefill_args *a, uint32_t seq,
                                             uint32_t first, uint32_t n_list)
{
    uint32_t lane = threadIdx.x & 31u, bits[2];

#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t j = first + i * 32u + lane;
        bool hole = j < n_list && a->list[(size_t)seq * a->stride + j] < 0;
        bits[i] = __ballot_sync(KVKI_FULL_WARP, hole);
    }
    return (uint64_t)bits[1] << 32 | bits[0];
}

template <int kDim, int kPieces>
__global__ void __launch_bounds__(THREADS, 1) prefill_kernel(const struct prefill_params p)
{
    extern __shared__ __align__(16) char stages[];
    const kvk_cuda_prefill_args *a = &p.a;
    const uint32_t stage_bytes = 2 * kPieces * tile_layout<kDim>::piece;
    uint32_t seq = blockIdx.z, kv_head = blockIdx.y, group = a->n_q_heads / a->n_kv_heads;
    uint32_t lane = threadIdx.x & 31u, n_list = 0, n_queries = 0, n_rows = 0, n_tiles = 0;
    uint32_t block_first = (gridDim.x - 1 - blockIdx.x) * ROWS; /* the longest first */
    uint32_t first = block_first + threadIdx.x / 32u * 16u, last = 0;
    const char *packed = (const char *)(p.packed + ((size_t)seq * a->n_kv_heads + kv_head) * 2u *
                                                       kPieces * piece_elems(&p));
    size_t piece_bytes = piece_elems(&p) * 2;
    struct rows_state<kDim, kPieces> s;

    kvki_wait_for_previous();
    n_list = min(a->n_list[seq], a->stride);
    n_queries = queries_of(a, seq);
    n_rows = n_queries * group;
    if (block_first >= n_rows)
        return;
    last = min(block_first + ROWS, n_rows) - 1;
    n_tiles = (n_list + last / group + 1 + KEYS - 1) / KEYS;
    ask_tile<kDim, kPieces>(packed, piece_bytes, 0, stages);
    load_rows<kDim, kPieces>(a, seq, kv_head, first, n_rows, &s);
    for (uint32_t tile = 0; tile < n_tiles; tile++) {
        const char *here = stages + tile % STAGES * stage_bytes;
        uint64_t holes = find_holes(a, seq, tile * KEYS, n_list);
        float x[KEYS / 8][4];
        int32_t seen[2];
        kvki_async_wait();
        __syncthreads(); /* the tile is there, and the one before has been read */
        if (tile + 1 < n_tiles)
            ask_tile<kDim, kPieces>(packed, piece_bytes, tile + 1,
                                    stages + (tile + 1) % STAGES * stage_bytes);
#pragma unroll
        for (uint32_t r = 0; r < 2; r++)
            seen[r] = (int32_t)(n_list + (first + lane / 4u + r * 8u) / group + 1) -
                      (int32_t)(tile * KEYS);
        find_scores<kDim, kPieces>(s, here, x);
        find_chunk_weights<kDim, kPieces>(a, seen, holes, x, &s);
        add_values<kDim, kPieces>(x, here + kPieces * tile_layout<kDim>::piece, &s);
    }
    store_rows<kDim, kPieces>(a, seq, kv_head, first, n_rows, s);
}

typedef void (*prefill_fn)(const struct prefill_params p);

static prefill_fn kernel_of(uint32_t head_dim, uint32_t pieces, size_t *smem_p)
{
    *smem_p = (size_t)STAGES * 2 * pieces *
              (head_dim == 64 ? tile_layout<64>::piece : tile_layout<128>::piece);
    if (head_dim == 128)
        return pieces == 1 ? prefill_kernel<128, 1> : prefill_kernel<128, 2>;
    if (head_dim == 64)
        return pieces == 1 ? prefill_kernel<64, 1> : prefill_kernel<64, 2>;
    return NULL;
}

static uint32_t keys_max_of(uint32_t stride, uint32_t n_q)
{
    return (stride + n_q + KEYS - 1) / KEYS * KEYS;
}

extern "C" size_t kvk_cuda_prefill_workspace_bytes(uint32_t n_seqs, uint32_t stride, uint32_t n_q,
                                                   uint32_t n_kv_heads, uint32_t head_dim, int fast)
{
    return (size_t)n_seqs * n_kv_heads * keys_max_of(stride, n_q) * head_dim * (fast ? 2u : 4u) *
           sizeof(__nv_bfloat16);
}

static bool args_ok(const kvk_cuda_prefill_args *a)
{
    size_t slice = kvk_slice_bytes(a->dtype, a->n_kv_heads, a->head_dim);

    return a->n_seqs <= KVK_CUDA_SEQS_MAX && a->n_q && a->n_q <= KVK_CUDA_CHUNK_MAX &&
           a->n_kv_heads && a->n_q_heads && a->n_q_heads % a->n_kv_heads == 0 &&
           (a->dtype == KVK_BF16 || a->dtype == KVK_F16 || kvk_is_coded(a->dtype)) &&
           a->row_bytes % 16 == 0 && a->k_off_bytes % 16 == 0 && a->v_off_bytes % 16 == 0 &&
           a->k_off_bytes + slice <= a->row_bytes && a->v_off_bytes + slice <= a->row_bytes &&
           a->q && a->list && a->n_list && a->res && a->chunk && a->stride && a->o && a->lse &&
           a->stride <= UINT32_MAX / 2u && a->scale == a->scale && a->softcap >= 0 &&
           a->workspace && kvki_aligned(a->workspace) &&
           a->workspace_bytes >= kvk_cuda_prefill_workspace_bytes(a->n_seqs, a->stride, a->n_q,
                                                                  a->n_kv_heads, a->head_dim,
                                                                  a->fast != 0);
}

extern "C" kvc_status kvk_cuda_prefill(kvk_cuda *cuda, const kvk_cuda_prefill_args *args,
                                       kvk_stream *stream)
{
    struct prefill_params p = {*args, (__nv_bfloat16 *)args->workspace,
                               keys_max_of(args->stride, args->n_q), args->fast ? 1u : 2u,
                               kvk_is_coded(args->dtype) != 0};
    size_t smem = 0;
    prefill_fn kernel = NULL;
    uint32_t blocks = 0;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    kernel = kernel_of(args->head_dim, p.pieces, &smem);
    if (!kernel || smem > (size_t)cuda->smem_block_max)
        return KVC_UNSUPPORTED;
    blocks = (args->n_q * (args->n_q_heads / args->n_kv_heads) + ROWS - 1) / ROWS;
    st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = kvki_cuda_status(cudaFuncSetAttribute(
            (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    if (st != KVC_OK)
        return st;
    pack_kernel<<<dim3(p.keys_max, args->n_seqs), THREADS, 0, kvki_cuda_stream(stream)>>>(p);
    st = kvki_cuda_launched();
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(cuda, kernel, dim3(blocks, args->n_kv_heads, args->n_seqs),
                                 THREADS, smem, stream, p);
}
