/*
 * prefill.cu: attention of a chunk of queries over a list of slots and the chunk itself.
 *
 * K and V come densely from prefill_pack.cu, as one bf16 piece each, or as two (`fast` off). A
 * block takes 128 query rows of a kv head (a query's whole group next to each other) and goes over
 * the keys in tiles of 64, which are copied one tile ahead; scores, weights and sums stay in
 * registers, the softmax is taken as the maximum grows. Where there are few such blocks, several
 * share the keys, and combine_kernel adds what they found. What is rounded is known: no piece is
 * kept with `fast`, else products of the two lower pieces are left out.
 *
 * Keys are in list order, then the chunk in order, so a query sees a prefix of them, also where the
 * chunk is the end of the list. Places that
 * hold no row are zeros and masked.
 */
#include "prefill.cuh"

#define THREADS   256u
#define WARPS     (THREADS / 32u)
#define ROWS      128u /* query rows of a block, 16 a warp */
#define STAGES    2u
#define PAD_BYTES 16u
#define LOG2_E    1.4426950408889634f

/* Fewer blocks than this, and each goes over a part of the keys. */
#define BLOCKS_WANTED 132u
#define SPLITS_MAX    8u

template <int kDim> struct tile_layout {
    static const uint32_t pitch = kDim * 2 + PAD_BYTES; /* of a key, in bytes */
    static const uint32_t piece = PREFILL_KEYS * pitch;
};

/* Asks for the tile's K and V pieces; all threads. */
template <int kDim, int kPieces>
__device__ static inline void ask_tile(const char *packed, size_t piece_bytes, uint32_t tile,
                                       char *to)
{
    const uint32_t chunks = kDim / 8; /* 16 bytes each */

#pragma unroll
    for (int piece = 0; piece < 2 * kPieces; piece++) {
        const char *from = packed + piece * piece_bytes + (size_t)tile * PREFILL_KEYS * kDim * 2;
        for (uint32_t i = threadIdx.x; i < PREFILL_KEYS * chunks; i += THREADS)
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

__device__ static inline uint32_t rest_pair(float x, float y, uint32_t high)
{
    float2 rest = rest_of(x, y, high);
    return bf16_pair(rest.x, rest.y);
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
                uint32_t high = bf16_pair(x.x, x.y);
                s->q[0][step][part * 2 + r] = high;
                if (kPieces == 2)
                    s->q[kPieces - 1][step][part * 2 + r] = rest_pair(x.x, x.y, high);
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
                                          const char *tile, float (&x)[PREFILL_KEYS / 8][4])
{
    uint32_t lane = threadIdx.x & 31u;
    const char *at = tile + (size_t)(lane / 16u * 8u + lane % 8u) * tile_layout<kDim>::pitch +
                     lane / 8u % 2u * 16u;

#pragma unroll
    for (int t = 0; t < (int)PREFILL_KEYS / 8; t++)
        x[t][0] = x[t][1] = x[t][2] = x[t][3] = 0;
#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
#pragma unroll
        for (int t = 0; t < (int)PREFILL_KEYS / 8; t += 2) {
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

/* 2^x, within 2^-22 of it. */
__device__ static inline float exp2_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Products to logits, in units of log 2. */
__device__ static inline void scale_scores(const kvk_cuda_prefill_args *a,
                                           float (&x)[PREFILL_KEYS / 8][4])
{
    float by = a->scale * LOG2_E;

#pragma unroll
    for (int t = 0; t < (int)PREFILL_KEYS / 8; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[t][i] = a->softcap > 0 ? a->softcap * LOG2_E * tanhf(x[t][i] * a->scale / a->softcap)
                                     : x[t][i] * by;
    }
}

/* Takes out what the lane's two rows do not see. seen: how many keys of this tile each sees; holes:
 * keys that are not there. */
__device__ static inline void mask_scores(const int32_t (&seen)[2], uint64_t holes,
                                          float (&x)[PREFILL_KEYS / 8][4])
{
    uint32_t first = (threadIdx.x & 3u) * 2u;

#pragma unroll
    for (int t = 0; t < (int)PREFILL_KEYS / 8; t++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t key = (uint32_t)t * 8u + first + i % 2;
            if ((int32_t)key >= seen[i / 2] || (holes >> key & 1u))
                x[t][i] = -INFINITY;
        }
    }
}

/* Logits to weights against the greatest so far; what was summed before is scaled to it. */
template <int kDim, int kPieces>
__device__ static inline void weigh_scores(float (&x)[PREFILL_KEYS / 8][4],
                                           struct rows_state<kDim, kPieces> *s)
{
    float keep[2];

#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        float most = s->most[r], base = 0, total = 0;
#pragma unroll
        for (int t = 0; t < (int)PREFILL_KEYS / 8; t++)
            most = fmaxf(most, fmaxf(x[t][r * 2], x[t][r * 2 + 1]));
        most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, 1));
        most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, 2));
        base = most == -INFINITY ? 0.0f : most;
        keep[r] = exp2_of(s->most[r] - base);
#pragma unroll
        for (int t = 0; t < (int)PREFILL_KEYS / 8; t++) {
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                x[t][r * 2 + i] = exp2_of(x[t][r * 2 + i] - base);
                total += x[t][r * 2 + i];
            }
        }
        s->total[r] = s->total[r] * keep[r] + total;
        s->most[r] = most;
    }
    if (!__any_sync(KVKI_FULL_WARP, keep[0] != 1.0f || keep[1] != 1.0f))
        return;
#pragma unroll
    for (int t = 0; t < kDim / 8; t++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            s->o[t][i] *= keep[i / 2];
    }
}

/* Adds the tile's values, weighted. */
template <int kDim, int kPieces>
__device__ static inline void add_values(const float (&x)[PREFILL_KEYS / 8][4], const char *tile,
                                         struct rows_state<kDim, kPieces> *s)
{
    uint32_t lane = threadIdx.x & 31u;
    const char *at = tile + (size_t)(lane / 8u % 2u * 8u + lane % 8u) * tile_layout<kDim>::pitch +
                     lane / 16u * 16u;

#pragma unroll
    for (int step = 0; step < (int)PREFILL_KEYS / 16; step++) {
        uint32_t w[4], rest[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float a = x[step * 2 + i / 2][i % 2 * 2], b = x[step * 2 + i / 2][i % 2 * 2 + 1];
            w[i] = bf16_pair(a, b);
            rest[i] = kPieces == 2 ? rest_pair(a, b, w[i]) : 0;
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

/* The rows' results; of one of several splits, sums that combine_kernel divides. */
template <int kDim, int kPieces>
__device__ static inline void store_rows(const struct prefill_params *p, uint32_t seq,
                                         uint32_t part, uint32_t kv_head, uint32_t first,
                                         uint32_t n_rows, const struct rows_state<kDim, kPieces> &s)
{
    const kvk_cuda_prefill_args *a = &p->a;
    uint32_t lane = threadIdx.x & 31u, group = a->n_q_heads / a->n_kv_heads;
    bool whole = p->splits == 1;

#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        uint32_t row = first + lane / 4u + r * 8u;
        size_t at =
            (size_t)(seq * a->n_q + row / group) * a->n_q_heads + kv_head * group + row % group;
        float total = s.total[r], share = 1;
        float *o = whole ? a->o + at * kDim : p->part_o + (part * prefill_part_rows(a) + at) * kDim;
        total += __shfl_xor_sync(KVKI_FULL_WARP, total, 1);
        total += __shfl_xor_sync(KVKI_FULL_WARP, total, 2);
        if (row >= n_rows)
            continue;
        if (whole)
            share = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
        for (int t = 0; t < kDim / 8; t++)
            *(float2 *)(o + t * 8 + lane % 4u * 2u) =
                make_float2(s.o[t][r * 2] * share, s.o[t][r * 2 + 1] * share);
        if (lane % 4u != 0)
            continue;
        if (whole)
            a->lse[at] = total == 0.0f ? -INFINITY : s.most[r] / LOG2_E + logf(total);
        else
            p->part_sums[part * prefill_part_rows(a) + at] = make_float2(s.most[r], total);
    }
}

/* The splits of one query head, one warp, in order. */
__global__ void __launch_bounds__(THREADS) combine_kernel(const struct prefill_params p)
{
    const kvk_cuda_prefill_args *a = &p.a;
    size_t at = (size_t)blockIdx.x * WARPS + threadIdx.x / 32u, rows = prefill_part_rows(a);
    uint32_t lane = threadIdx.x & 31u, query = (uint32_t)(at / a->n_q_heads);
    float most = -INFINITY, total = 0;

    kvki_wait_for_previous();
    if (at >= rows || query % a->n_q >= prefill_queries_of(a, query / a->n_q))
        return;
    for (uint32_t part = 0; part < p.splits; part++)
        most = fmaxf(most, p.part_sums[part * rows + at].x);
    most = most == -INFINITY ? 0.0f : most;
    for (uint32_t part = 0; part < p.splits; part++) {
        float2 sums = p.part_sums[part * rows + at];
        total += sums.y * exp2_of(sums.x - most);
    }
    for (uint32_t d = lane; d < a->head_dim; d += 32) {
        float o = 0;
        for (uint32_t part = 0; part < p.splits; part++)
            o += p.part_o[(part * rows + at) * a->head_dim + d] *
                 exp2_of(p.part_sums[part * rows + at].x - most);
        a->o[at * a->head_dim + d] = total == 0.0f ? 0.0f : o / total;
    }
    if (lane == 0)
        a->lse[at] = total == 0.0f ? -INFINITY : most / LOG2_E + logf(total);
}

/* A lane's two keys of a tile: whether they are listed, but not there. */
__device__ static inline uint2 look_for_holes(const kvk_cuda_prefill_args *a, uint32_t seq,
                                              uint32_t first, uint32_t n_list)
{
    uint32_t j = first + (threadIdx.x & 31u);
    const int32_t *list = a->list + (size_t)seq * a->stride;

    return make_uint2(j < n_list && list[j] < 0, j + 32u < n_list && list[j + 32u] < 0);
}

__device__ static inline uint64_t holes_of(uint2 found)
{
    uint32_t low = __ballot_sync(KVKI_FULL_WARP, found.x);
    uint32_t high = __ballot_sync(KVKI_FULL_WARP, found.y);
    return (uint64_t)high << 32 | low;
}

template <int kDim, int kPieces>
__global__ void __launch_bounds__(THREADS, 1) prefill_kernel(const struct prefill_params p)
{
    extern __shared__ __align__(16) char stages[];
    const kvk_cuda_prefill_args *a = &p.a;
    const uint32_t stage_bytes = 2 * kPieces * tile_layout<kDim>::piece;
    uint32_t seq = blockIdx.z / p.splits, part = blockIdx.z % p.splits, kv_head = blockIdx.y;
    uint32_t group = a->n_q_heads / a->n_kv_heads, lane = threadIdx.x & 31u;
    uint32_t block_first = (gridDim.x - 1 - blockIdx.x) * ROWS; /* the longest first */
    uint32_t first = block_first + threadIdx.x / 32u * 16u;
    const char *packed = (const char *)(p.packed + ((size_t)seq * a->n_kv_heads + kv_head) * 2u *
                                                       kPieces * prefill_piece_elems(&p));
    size_t piece_bytes = prefill_piece_elems(&p) * 2;
    struct rows_state<kDim, kPieces> s;
    uint2 found;

    kvki_wait_for_previous();
    uint32_t n_list = min(a->n_list[seq], a->stride), n_queries = prefill_queries_of(a, seq);
    uint32_t n_rows = n_queries * group;
    if (block_first >= n_rows)
        return;
    uint32_t last = min(block_first + ROWS, n_rows) - 1;
    uint32_t any_sees = (uint32_t)prefill_seen(a, n_list, n_queries, last / group);
    uint32_t all_see = (uint32_t)prefill_seen(a, n_list, n_queries, block_first / group);
    uint32_t n_tiles = (any_sees + PREFILL_KEYS - 1) / PREFILL_KEYS;
    uint32_t tile = n_tiles * part / p.splits, end = n_tiles * (part + 1) / p.splits;
    if (tile < end)
        ask_tile<kDim, kPieces>(packed, piece_bytes, tile, stages + tile % STAGES * stage_bytes);
    found = look_for_holes(a, seq, tile * PREFILL_KEYS, n_list);
    load_rows<kDim, kPieces>(a, seq, kv_head, first, n_rows, &s);
    for (; tile < end; tile++) {
        const char *here = stages + tile % STAGES * stage_bytes;
        uint64_t holes = holes_of(found);
        float x[PREFILL_KEYS / 8][4];
        kvki_async_wait();
        __syncthreads(); /* the tile is there, and the one before has been read */
        if (tile + 1 < end)
            ask_tile<kDim, kPieces>(packed, piece_bytes, tile + 1,
                                    stages + (tile + 1) % STAGES * stage_bytes);
        found = look_for_holes(a, seq, (tile + 1) * PREFILL_KEYS, n_list);
        find_scores<kDim, kPieces>(s, here, x);
        scale_scores(a, x);
        if (holes || (tile + 1) * PREFILL_KEYS > all_see) {
            int32_t seen[2];
#pragma unroll
            for (uint32_t r = 0; r < 2; r++)
                seen[r] = prefill_seen(a, n_list, n_queries, (first + lane / 4u + r * 8u) / group) -
                          (int32_t)(tile * PREFILL_KEYS);
            mask_scores(seen, holes, x);
        }
        weigh_scores<kDim, kPieces>(x, &s);
        add_values<kDim, kPieces>(x, here + kPieces * tile_layout<kDim>::piece, &s);
    }
    store_rows<kDim, kPieces>(&p, seq, part, kv_head, first, n_rows, s);
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
    return (stride + n_q + PREFILL_KEYS - 1) / PREFILL_KEYS * PREFILL_KEYS;
}

static uint32_t row_blocks_of(const kvk_cuda_prefill_args *a)
{
    return (a->n_q * (a->n_q_heads / a->n_kv_heads) + ROWS - 1) / ROWS;
}

/* By shape alone, so that the bits are. */
static uint32_t splits_of(const kvk_cuda_prefill_args *a)
{
    uint32_t blocks = row_blocks_of(a) * a->n_kv_heads * a->n_seqs;
    uint32_t tiles = keys_max_of(a->stride, a->n_q) / PREFILL_KEYS, splits = BLOCKS_WANTED / blocks;

    splits = splits > SPLITS_MAX ? SPLITS_MAX : splits > tiles ? tiles : splits;
    return splits ? splits : 1;
}

static bool shape_ok(const kvk_cuda_prefill_args *a)
{
    return a->n_seqs && a->n_seqs <= KVK_CUDA_SEQS_MAX && a->n_q && a->n_q <= KVK_CUDA_CHUNK_MAX &&
           a->n_kv_heads && a->n_q_heads && a->n_q_heads % a->n_kv_heads == 0 && a->head_dim &&
           a->stride && a->stride <= UINT32_MAX / 2u;
}

static size_t packed_bytes_of(const kvk_cuda_prefill_args *a)
{
    return (size_t)a->n_seqs * a->n_kv_heads * keys_max_of(a->stride, a->n_q) * a->head_dim *
           (a->fast ? 2u : 4u) * sizeof(__nv_bfloat16);
}

extern "C" size_t kvk_cuda_prefill_workspace_bytes(const kvk_cuda_prefill_args *args)
{
    uint32_t splits = shape_ok(args) ? splits_of(args) : 0;

    if (splits == 0)
        return 0;
    return packed_bytes_of(args) +
           (splits > 1 ? splits * prefill_part_rows(args) * (args->head_dim + 2u) * sizeof(float)
                       : 0);
}

static bool args_ok(const kvk_cuda_prefill_args *a)
{
    size_t slice = kvk_slice_bytes(a->dtype, a->n_kv_heads, a->head_dim);

    return shape_ok(a) && (a->dtype == KVK_BF16 || a->dtype == KVK_F16 || kvk_is_coded(a->dtype)) &&
           a->row_bytes % 16 == 0 && a->k_off_bytes % 16 == 0 && a->v_off_bytes % 16 == 0 &&
           a->k_off_bytes + slice <= a->row_bytes && a->v_off_bytes + slice <= a->row_bytes &&
           a->q && a->list && a->n_list && a->res && a->own <= KVK_CUDA_OWN_NONE &&
           (a->own == KVK_CUDA_OWN_CHUNK) == (a->chunk != NULL) && a->o && a->lse &&
           a->scale == a->scale && a->softcap >= 0 && a->workspace && kvki_aligned(a->workspace) &&
           a->workspace_bytes >= kvk_cuda_prefill_workspace_bytes(a);
}

extern "C" kvc_status kvk_cuda_prefill_supports(const kvk_cuda *cuda,
                                                const kvk_cuda_prefill_args *args)
{
    size_t smem = 0;

    return kernel_of(args->head_dim, args->fast ? 1 : 2, &smem) &&
                   smem <= (size_t)cuda->smem_block_max
               ? KVC_OK
               : KVC_UNSUPPORTED;
}

extern "C" kvc_status kvk_cuda_prefill(kvk_cuda *cuda, const kvk_cuda_prefill_args *args,
                                       kvk_stream *stream)
{
    struct prefill_params p = {};
    size_t smem = 0;
    prefill_fn kernel = NULL;
    dim3 grid;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    p.a = *args;
    p.packed = (__nv_bfloat16 *)args->workspace;
    p.keys_max = keys_max_of(args->stride, args->n_q);
    p.pieces = args->fast ? 1 : 2;
    p.coded = kvk_is_coded(args->dtype) != 0;
    p.splits = splits_of(args);
    p.part_o = (float *)((char *)args->workspace + packed_bytes_of(args));
    p.part_sums = (float2 *)(p.part_o + p.splits * prefill_part_rows(args) * args->head_dim);
    if (kvk_cuda_prefill_supports(cuda, args) != KVC_OK)
        return KVC_UNSUPPORTED;
    kernel = kernel_of(args->head_dim, p.pieces, &smem);
    st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = kvki_cuda_status(cudaFuncSetAttribute(
            (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    if (st != KVC_OK)
        return st;
    st = kvki_prefill_pack(p, stream);
    grid = dim3(row_blocks_of(args), args->n_kv_heads, args->n_seqs * p.splits);
    if (st == KVC_OK)
        st = kvki_cuda_launch_next(cuda, kernel, grid, THREADS, smem, stream, p);
    if (st != KVC_OK || p.splits == 1)
        return st;
    return kvki_cuda_launch_next(cuda, combine_kernel,
                                 dim3((unsigned)((prefill_part_rows(args) + WARPS - 1) / WARPS)),
                                 THREADS, 0, stream, p);
}
