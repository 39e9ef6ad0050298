/*
 * prefill.cu: attention of a chunk of queries over a list of slots and the chunk itself: the op,
 * and its form for every device; sm_90 has one of its own (prefill_90a.cu).
 *
 * K and V come as tiles from prefill_pack.cu, as one bf16 piece each, or as two (`fast` off). A
 * block takes 128 query rows of a kv head (a query's whole group next to each other) and goes over
 * the keys in tiles of 64, which are copied one tile ahead; scores, weights and sums stay in
 * registers, the softmax is taken as the maximum grows. Where there are few such blocks, several
 * share the keys, and combine_kernel adds what they found. What is rounded is known: no piece is
 * kept with `fast`, else products of the two lower pieces are left out.
 *
 * Keys are in list order, then the chunk in order, so a query sees a prefix of them, also where the
 * chunk is the end of the list. Places that hold no row are zeros and masked.
 */
#include "prefill_forms.h"
#include "prefill_rows.cuh"

#define THREADS 256u
#define WARPS   (THREADS / 32u)
#define STAGES  2u

/* Fewer blocks than this, and each goes over a part of the keys. */
#define BLOCKS_WANTED 132u
#define SPLITS_MAX    8u

template <int kDim, int kPieces> struct form {
    static const uint32_t piece = PREFILL_KEYS * kDim * 2;
    static const uint32_t tile = 2 * kPieces * piece;
};

/* Asks for a tile, K and V; all threads. */
template <int kDim, int kPieces>
__device__ static inline void ask_tile(const char *packed, uint32_t tile, char *stages)
{
    typedef form<kDim, kPieces> F;
    const char *from = packed + (size_t)tile * F::tile;
    char *to = stages + tile % STAGES * F::tile;

    for (uint32_t at = threadIdx.x * 16u; at < F::tile; at += THREADS * 16u)
        kvki_async_copy(to + at, from + at);
    kvki_async_commit();
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

#pragma unroll
    for (int t = 0; t < (int)PREFILL_KEYS / 8; t++)
        x[t][0] = x[t][1] = x[t][2] = x[t][3] = 0;
#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
#pragma unroll
        for (int t = 0; t < (int)PREFILL_KEYS / 8; t += 2) {
            uint32_t k[4], row = (uint32_t)t * 8u + lane / 16u * 8u + lane % 8u;
            const char *from =
                tile + tile_piece(PREFILL_KEYS, row, (uint32_t)step * 2u + lane / 8u % 2u);
            load_matrices<false>(k, from);
            multiply4(x[t], s.q[0][step], k[0], k[1]);
            multiply4(x[t + 1], s.q[0][step], k[2], k[3]);
            if (kPieces == 2) {
                multiply4(x[t], s.q[kPieces - 1][step], k[0], k[1]);
                multiply4(x[t + 1], s.q[kPieces - 1][step], k[2], k[3]);
                load_matrices<false>(k, from + form<kDim, kPieces>::piece);
                multiply4(x[t], s.q[0][step], k[0], k[1]);
                multiply4(x[t + 1], s.q[0][step], k[2], k[3]);
            }
        }
    }
}

/* Adds the tile's values, weighted. */
template <int kDim, int kPieces>
__device__ static inline void add_values(const float (&x)[PREFILL_KEYS / 8][4], const char *tile,
                                         struct rows_state<kDim, kPieces> *s)
{
    uint32_t lane = threadIdx.x & 31u, w[kPieces][PREFILL_KEYS / 16][4];

    split_weights<kPieces, PREFILL_KEYS>(x, w);
#pragma unroll
    for (int step = 0; step < (int)PREFILL_KEYS / 16; step++) {
#pragma unroll
        for (int t = 0; t < kDim / 8; t += 2) {
            uint32_t v[4], row = (uint32_t)step * 16u + lane / 8u % 2u * 8u + lane % 8u;
            const char *from = tile + tile_piece(PREFILL_KEYS, row, (uint32_t)t + lane / 16u);
            load_matrices<true>(v, from);
            multiply4(s->o[t], w[0][step], v[0], v[1]);
            multiply4(s->o[t + 1], w[0][step], v[2], v[3]);
            if (kPieces == 2) {
                multiply4(s->o[t], w[kPieces - 1][step], v[0], v[1]);
                multiply4(s->o[t + 1], w[kPieces - 1][step], v[2], v[3]);
                load_matrices<true>(v, from + form<kDim, kPieces>::piece);
                multiply4(s->o[t], w[0][step], v[0], v[1]);
                multiply4(s->o[t + 1], w[0][step], v[2], v[3]);
            }
        }
    }
}

/* The splits of one query head, one warp, in order; all that they found is asked for at once. */
__global__ void __launch_bounds__(THREADS) combine_kernel(const struct prefill_params p)
{
    const kvk_cuda_prefill_args *a = &p.a;
    size_t at = (size_t)blockIdx.x * WARPS + threadIdx.x / 32u, rows = prefill_part_rows(a);
    uint32_t d = (threadIdx.x & 31u) * 4u, query = (uint32_t)(at / a->n_q_heads);
    float4 part_o[SPLITS_MAX], o = make_float4(0, 0, 0, 0);
    float2 sums[SPLITS_MAX];
    float most = -INFINITY, total = 0;

    kvki_wait_for_previous();
    if (at >= rows || query % a->n_q >= prefill_queries_of(a, query / a->n_q))
        return;
#pragma unroll
    for (uint32_t part = 0; part < SPLITS_MAX; part++) {
        bool there = part < p.splits;
        sums[part] = there ? p.part_sums[part * rows + at] : make_float2(-INFINITY, 0);
        part_o[part] = there && d < a->head_dim
                           ? *(const float4 *)(p.part_o + (part * rows + at) * a->head_dim + d)
                           : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (uint32_t part = 0; part < SPLITS_MAX; part++)
        most = fmaxf(most, sums[part].x);
    most = most == -INFINITY ? 0.0f : most;
#pragma unroll
    for (uint32_t part = 0; part < SPLITS_MAX; part++) {
        float share = exp2_of(sums[part].x - most);
        float4 v = part_o[part];
        total += sums[part].y * share;
        o = make_float4(o.x + v.x * share, o.y + v.y * share, o.z + v.z * share, o.w + v.w * share);
    }
    float by = total == 0.0f ? 0.0f : 1.0f / total;
    if (d < a->head_dim)
        *(float4 *)(a->o + at * a->head_dim + d) =
            make_float4(o.x * by, o.y * by, o.z * by, o.w * by);
    if (d == 0)
        a->lse[at] = total == 0.0f ? -INFINITY : most / LOG2_E + logf(total);
}

template <int kDim, int kPieces>
__global__ void __launch_bounds__(THREADS, 1) prefill_kernel(const struct prefill_params p)
{
    extern __shared__ __align__(16) char stages[];
    typedef form<kDim, kPieces> F;
    const kvk_cuda_prefill_args *a = &p.a;
    struct rows_state<kDim, kPieces> s;
    struct prefill_block b;

    kvki_wait_for_previous();
    if (!prefill_find_block<PREFILL_KEYS>(&p, &b))
        return;
    uint32_t first = b.first + threadIdx.x / 32u * 16u, tile = b.tile;
    if (tile < b.end)
        ask_tile<kDim, kPieces>(b.packed, tile, stages);
    uint32_t found = look_for_holes<PREFILL_KEYS>(a, b, tile);
    load_rows<kDim, kPieces>(a, b, first, &s);
    for (; tile < b.end; tile++) {
        const char *here = stages + tile % STAGES * F::tile;
        uint64_t holes[1];
        float x[PREFILL_KEYS / 8][4], keep[2];
        share_holes<PREFILL_KEYS>(found, holes);
        kvki_async_wait();
        __syncthreads(); /* the tile is there, and the one before has been read */
        if (tile + 1 < b.end)
            ask_tile<kDim, kPieces>(b.packed, tile + 1, stages);
        found = look_for_holes<PREFILL_KEYS>(a, b, tile + 1);
        find_scores<kDim, kPieces>(s, here, x);
        cap_scores<PREFILL_KEYS>(a, x);
        if (holes[0] || (tile + 1) * PREFILL_KEYS > b.all_see)
            mask_scores<PREFILL_KEYS>(a, b, first, tile, holes, x);
        weigh_scores<kDim, kPieces, PREFILL_KEYS>(x, &s, keep);
        if (sums_change(keep))
            scale_sums<kDim, kPieces>(keep, &s);
        add_values<kDim, kPieces>(x, here + F::tile / 2, &s);
    }
    store_rows<kDim, kPieces>(&p, b, first, s);
}

static prefill_fn kernel_of(uint32_t head_dim, uint32_t pieces, size_t *smem_p)
{
    *smem_p = (size_t)STAGES * 2 * pieces * PREFILL_KEYS * head_dim * 2;
    if (head_dim == 128)
        return pieces == 1 ? prefill_kernel<128, 1> : prefill_kernel<128, 2>;
    if (head_dim == 64)
        return pieces == 1 ? prefill_kernel<64, 1> : prefill_kernel<64, 2>;
    return NULL;
}

static uint32_t keys_max_of(uint32_t stride, uint32_t n_q)
{
    return (stride + n_q + PREFILL_KEYS_MAX - 1) / PREFILL_KEYS_MAX * PREFILL_KEYS_MAX;
}

static uint32_t row_blocks_of(const kvk_cuda_prefill_args *a)
{
    return (a->n_q * (a->n_q_heads / a->n_kv_heads) + PREFILL_ROWS - 1) / PREFILL_ROWS;
}

/* By shape alone, so that the bits are, which is why tiles are those of the form of sm_90. */
static uint32_t splits_of(const kvk_cuda_prefill_args *a)
{
    uint32_t blocks = row_blocks_of(a) * a->n_kv_heads * a->n_seqs;
    uint32_t tile_keys = a->fast ? PREFILL_KEYS_MAX : PREFILL_KEYS;
    uint32_t tiles = keys_max_of(a->stride, a->n_q) / tile_keys, splits = BLOCKS_WANTED / blocks;

    splits = splits > SPLITS_MAX ? SPLITS_MAX : splits;
    splits = splits > tiles ? tiles : splits;
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

extern "C" uint32_t kvki_cuda_prefill_splits(const kvk_cuda_prefill_args *args)
{
    return shape_ok(args) ? splits_of(args) : 0;
}

extern "C" size_t kvk_cuda_prefill_workspace_bytes(const kvk_cuda_prefill_args *args)
{
    uint32_t splits = kvki_cuda_prefill_splits(args);

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
           (a->own == KVK_CUDA_OWN_CHUNK) == (a->chunk != NULL) && kvki_aligned(a->chunk) && a->o &&
           a->lse && a->scale == a->scale && a->softcap >= 0 && a->workspace &&
           kvki_aligned(a->workspace) && a->workspace_bytes >= kvk_cuda_prefill_workspace_bytes(a);
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

/* The form of every device over what was packed. */
static kvc_status attend(const kvk_cuda *cuda, const struct prefill_params &p, dim3 grid,
                         kvk_stream *stream)
{
    size_t smem = 0;
    prefill_fn kernel = kernel_of(p.a.head_dim, p.pieces, &smem);

    return prefill_launch(cuda, kernel, grid, THREADS, smem, stream, p);
}

/* own_form: the device's, if it has one. */
static kvc_status prefill(const kvk_cuda *cuda, const kvk_cuda_prefill_args *args, bool own_form,
                          kvk_stream *stream)
{
    struct prefill_params p = {};
    dim3 grid;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    if (kvk_cuda_prefill_supports(cuda, args) != KVC_OK)
        return KVC_UNSUPPORTED;
    p.a = *args;
    p.packed = (char *)args->workspace;
    p.keys_max = keys_max_of(args->stride, args->n_q);
    p.pieces = args->fast ? 1 : 2;
    p.tile_keys = own_form && args->fast ? PREFILL_KEYS_MAX : PREFILL_KEYS;
    p.splits = splits_of(args);
    p.part_o = (float *)(p.packed + packed_bytes_of(args));
    p.part_sums = (float2 *)(p.part_o + p.splits * prefill_part_rows(args) * args->head_dim);
    grid = dim3(row_blocks_of(args), args->n_kv_heads, args->n_seqs * p.splits);
    st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = kvki_prefill_pack(cuda, p, stream);
    if (st == KVC_OK)
        st = own_form ? kvki_prefill_90a(cuda, p, grid, stream) : attend(cuda, p, grid, stream);
    if (st != KVC_OK || p.splits == 1)
        return st;
    return kvki_cuda_launch_next(cuda, combine_kernel,
                                 dim3((unsigned)((prefill_part_rows(args) + WARPS - 1) / WARPS)),
                                 THREADS, 0, stream, p);
}

extern "C" kvc_status kvk_cuda_prefill(kvk_cuda *cuda, const kvk_cuda_prefill_args *args,
                                       kvk_stream *stream)
{
    return prefill(cuda, args, kvki_prefill_90a_runs(cuda), stream);
}

extern "C" kvc_status kvki_cuda_prefill_portable(kvk_cuda *cuda, const kvk_cuda_prefill_args *args,
                                                 kvk_stream *stream)
{
    return prefill(cuda, args, false, stream);
}
