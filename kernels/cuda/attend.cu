/*
 * attend.cu: attention of one query a sequence over a list of slots, fetching what is missing on
 * the way: the launches, the scalar form (f16), and the combination of tiles.
 *
 * A block takes a tile of 16 listed rows, all kv heads: every byte of the tile is asked for at
 * once, from device memory or over PCIe, so about one round trip is paid whatever is missing, and
 * other blocks attend resident rows meanwhile. A row that comes from its source goes to its slot as
 * well. A warp then takes a kv head with its whole group of query heads: two lanes a row for the
 * logits, a few dimensions a lane for the values, all in f32. The tile's partial (sum, maximum,
 * total) goes to the workspace; combine_kernel adds the tiles of a head in an order that their
 * number gives. All arithmetic depends on the list alone: what was resident does not show in the
 * bits.
 */
#include "attend.cuh"

#define COMBINE_WARPS  8u
#define COMBINE_PIECE  32u                  /* dimensions of a block, a line of each tile's sum: */
#define COMBINE_LANES  (COMBINE_PIECE / 4u) /* so many lanes have 16 bytes each */
#define COMBINE_ROWS   (COMBINE_WARPS * 32u / COMBINE_LANES)
#define COMBINE_ROUNDS 8u
#define COMBINE_TILES  (COMBINE_ROWS * COMBINE_ROUNDS) /* in flight; as many as threads */

__device__ static inline float2 pair_of(uint32_t bits)
{
    return __half22float2(*(const __half2 *)&bits);
}

/* Adds the products of eight key elements with the group's queries at dimension d. */
template <int kGroup, int kDim>
__device__ static inline void add_products(const float (&k)[8], const float *q, uint32_t d,
                                           float (&x)[kGroup])
{
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
        float4 a = *(const float4 *)(q + g * kDim + d), b = *(const float4 *)(q + g * kDim + d + 4);
        x[g] = fmaf(k[0], a.x, x[g]);
        x[g] = fmaf(k[1], a.y, x[g]);
        x[g] = fmaf(k[2], a.z, x[g]);
        x[g] = fmaf(k[3], a.w, x[g]);
        x[g] = fmaf(k[4], b.x, x[g]);
        x[g] = fmaf(k[5], b.y, x[g]);
        x[g] = fmaf(k[6], b.z, x[g]);
        x[g] = fmaf(k[7], b.w, x[g]);
    }
}

__device__ static inline void unpack(const char *at, float (&k)[8])
{
    uint4 d = *(const uint4 *)at;
    float2 a = pair_of(d.x), b = pair_of(d.y), c = pair_of(d.z), e = pair_of(d.w);
    k[0] = a.x, k[1] = a.y, k[2] = b.x, k[3] = b.y;
    k[4] = c.x, k[5] = c.y, k[6] = e.x, k[7] = e.y;
}

/* Logits of this lane's row (lane / 2) with the group's queries; both lanes of a row get the sums.
 */
template <int kGroup, int kDim>
__device__ static void logits_of(const char *key, const float *q, const float2 *rotation,
                                 float (&x)[kGroup])
{
    uint32_t odd = threadIdx.x & 1u;
    float k[8], other[8];

#pragma unroll
    for (int g = 0; g < kGroup; g++)
        x[g] = 0;
    if (!rotation) {
#pragma unroll 4
        for (uint32_t d = odd * 8u; d < kDim; d += 16u) {
            unpack(key + d * 2u, k);
            add_products<kGroup, kDim>(k, q, d, x);
        }
    } else {
        for (uint32_t d = odd * 8u; d < kDim / 2; d += 16u) {
            unpack(key + d * 2u, k);
            unpack(key + (d + kDim / 2) * 2u, other);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float2 r = rotation[d + i];
                float low = k[i] * r.x - other[i] * r.y;
                other[i] = other[i] * r.x + k[i] * r.y;
                k[i] = low;
            }
            add_products<kGroup, kDim>(k, q, d, x);
            add_products<kGroup, kDim>(other, q, d + kDim / 2, x);
        }
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++)
        x[g] += __shfl_xor_sync(KVKI_FULL_WARP, x[g], 1);
}

/* Turns the logits of a row into weights; the lanes share maximum and total over the tile. */
__device__ static inline float tile_weight(float x, float *most_p, float *total_p)
{
    float most = x, weight = 0, total = 0;

    for (int step = 2; step < 32; step *= 2)
        most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, step));
    most = fmaxf(most, -INFINITY);
    weight = attend_weight(x, most);
    total = weight;
    for (int step = 2; step < 32; step *= 2)
        total += __shfl_xor_sync(KVKI_FULL_WARP, total, step);
    *most_p = most;
    *total_p = total;
    return weight;
}

/* One kv head of a tile, by one warp. weights: [ATTEND_TILE, kGroup] of shared memory. */
template <int kGroup, int kDim>
__device__ static void attend_head(const struct attend_params *p, const struct attend_layout *l,
                                   uint32_t seq, uint32_t kv_head, uint32_t there, const char *tile,
                                   const float *q, const float2 *rotation, float *weights)
{
    const kvk_cuda_attend_args *a = &p->a;
    uint32_t lane = threadIdx.x & 31u, row = lane / 2u, head = kv_head * kGroup;
    const char *key = tile + (size_t)row * l->row_stride + a->k_off_bytes + kv_head * kDim * 2u;
    float x[kGroup], o[kGroup][kDim / 32];

    logits_of<kGroup, kDim>(key, q, rotation ? rotation + row * (kDim / 2) : NULL, x);
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
        size_t at = ((size_t)seq * a->n_q_heads + head + g) * p->n_tiles + blockIdx.x;
        float most = 0, total = 0, z = x[g] * a->scale;
        z = a->softcap > 0 ? a->softcap * tanhf(z / a->softcap) : z;
        z = tile_weight(there >> row & 1u ? z : -INFINITY, &most, &total);
        if (lane % 2u == 0)
            weights[row * kGroup + g] = z;
        if (lane == 0) {
            p->most[at] = most;
            p->total[at] = total;
        }
#pragma unroll
        for (int i = 0; i < kDim / 32; i++)
            o[g][i] = 0;
    }
    __syncwarp();
    for (uint32_t r = 0; r < ATTEND_TILE; r++) {
        const char *value = tile + (size_t)r * l->row_stride + a->v_off_bytes +
                            (kv_head * kDim + lane * (kDim / 32)) * 2u;
        float v[kDim / 32];
        if (!(there >> r & 1u)) /* nothing is there, weight 0 */
            continue;
#pragma unroll
        for (int i = 0; i < kDim / 32; i += 2) {
            float2 two = pair_of(*(const uint32_t *)(value + i * 2));
            v[i] = two.x;
            v[i + 1] = two.y;
        }
#pragma unroll
        for (int g = 0; g < kGroup; g++) {
#pragma unroll
            for (int i = 0; i < kDim / 32; i++)
                o[g][i] = fmaf(weights[r * kGroup + g], v[i], o[g][i]);
        }
    }
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
        float *out =
            p->o + (((size_t)seq * p->n_tiles + blockIdx.x) * a->n_q_heads + head + g) * kDim;
#pragma unroll
        for (int i = 0; i < kDim / 32; i += 2)
            *(float2 *)(out + lane * (kDim / 32) + i) = make_float2(o[g][i], o[g][i + 1]);
    }
}

template <int kGroup, int kDim>
__global__ void __launch_bounds__(ATTEND_THREADS) attend_kernel(const struct attend_params p)
{
    extern __shared__ __align__(16) char tile[];
    __shared__ struct attend_rows rows;
    const kvk_cuda_attend_args *a = &p.a;
    const struct attend_layout l = attend_layout_of(a);
    float *q = (float *)(tile + l.q), *weights = (float *)(tile + l.weights);
    float2 *rotation = a->inv_freq && a->k_positions ? (float2 *)(tile + l.rotation) : NULL;
    uint32_t seq = 0, first = blockIdx.x * ATTEND_TILE, n = 0;
    uint32_t width = a->n_q_heads * kDim;

    if (attend_resolves(&p, tile, &seq))
        return;
    attend_begin(&rows);
    kvki_wait_for_previous();
    kvki_let_next_start(); /* behind the wait: order_of in attend.cu */
    n = attend_find_rows(a, seq, first, &rows);
    if (first >= n)
        return;
    attend_load_tile(a, &l, &rows, tile);
    const struct attend_places places = attend_ask_places(a, &rows, seq, first);
    for (uint32_t i = threadIdx.x; i < width; i += ATTEND_THREADS)
        q[i] = a->q[(size_t)seq * width + i];
    if (rotation)
        attend_find_rotation(a, seq, first, min(n - first, ATTEND_TILE), rotation);
    attend_await_tile(&rows);
    for (uint32_t head = threadIdx.x / 32u; head < a->n_kv_heads; head += ATTEND_WARPS)
        attend_head<kGroup, kDim>(&p, &l, seq, head, rows.there, tile, q + head * kGroup * kDim,
                                  rotation, weights + head * kGroup * ATTEND_TILE);
    attend_put_away(&p, &l, &rows, places, seq, first, tile);
}

/*
 * The tiles that a sequence has, in order: the list's, then near's. The combination asks for these
 * lengths before it waits for the tiles: every launch has a tile of the list, which lets the
 * combination start only once it has waited for what wrote them. They come from L2: an op before
 * may have left a multiprocessor's L1 with older ones.
 */
struct tile_order {
    uint32_t n_list, n, skip; /* skip: tiles between the two */
};

__device__ static inline struct tile_order order_of(const struct attend_params *p, uint32_t seq)
{
    uint32_t rows = attend_list_rows(&p->a, seq), near = 0;
    struct tile_order t = {(rows + ATTEND_TILE - 1) / ATTEND_TILE, 0, 0};

    if (p->a.near.n_max)
        near = (min(__ldcg(p->a.near.n + seq), p->a.near.n_max) + ATTEND_TILE - 1) / ATTEND_TILE;
    t.n = t.n_list + near;
    t.skip = p->n_far - t.n_list;
    return t;
}

__device__ static inline uint32_t tile_at(const struct tile_order *t, uint32_t i)
{
    return i < t->n_list ? i : i + t->skip;
}

/* An element of the result. */
__device__ static inline void store_result(const kvk_cuda_attend_args *a, size_t at, float x)
{
    if (!a->result.out)
        a->o[at] = x;
    else if (a->result.dtype == KVK_BF16)
        ((__nv_bfloat16 *)a->result.out)[at] = __float2bfloat16_rn(x);
    else
        ((__half *)a->result.out)[at] = __float2half_rn(x);
}

/*
 * The last block of the grid tells the host, behind the results of all. Each block's results come
 * before its fence, that before its count, which the last block reads before its own fence: so they
 * come before the word, by a causality that adds up over scopes. Blocks need to be ordered among
 * themselves only, and so by the device's scope; the host by the last fence, which is the system's.
 * All threads call.
 */
__device__ static inline void tell_host(const kvk_cuda_result *r)
{
    __syncthreads();
    if (!r->counts || threadIdx.x != 0)
        return;
    __threadfence();
    if (atomicAdd(r->counts, 1u) != gridDim.x * gridDim.y - 1)
        return;
    __threadfence_system();
    r->counts[0] = 0;
    *(volatile uint32_t *)r->done = ++r->counts[1];
}

/* The first block of a sequence, where the launch resolved: the tables take what it found. */
__device__ static inline void finish_resolve(const struct attend_params *p, uint32_t seq)
{
    resolve_finish(&p->a.resolve, seq, p->a.resolved);
    tell_host(&p->a.result);
}

/* What the threads of a block of the combination share. */
struct combine_state {
    float weights[COMBINE_TILES], totals[COMBINE_TILES]; /* of the tiles at hand */
    float most[COMBINE_WARPS];
    float sums[COMBINE_WARPS][COMBINE_PIECE], total[COMBINE_WARPS];
};

/* The greatest of a value of each thread. All threads call, once. */
__device__ static inline float combine_most(struct combine_state *sh, float x)
{
    for (int step = 1; step < 32; step *= 2)
        x = fmaxf(x, __shfl_xor_sync(KVKI_FULL_WARP, x, step));
    if (threadIdx.x % 32u == 0)
        sh->most[threadIdx.x / 32u] = x;
    __syncthreads();
    for (uint32_t w = 0; w < COMBINE_WARPS; w++)
        x = fmaxf(x, sh->most[w]);
    return x;
}

/* Adds up the shares of a warp, then those of the warps, in order: element threadIdx.x, and the
 * total, are the first warp's. All threads call. */
__device__ static inline float combine_add_up(struct combine_state *sh, float4 o, float *total_p)
{
    uint32_t lane = threadIdx.x & 31u, warp = threadIdx.x / 32u;
    float sum = 0, total = *total_p;

    for (int step = COMBINE_LANES; step < 32; step *= 2) {
        o.x += __shfl_xor_sync(KVKI_FULL_WARP, o.x, step);
        o.y += __shfl_xor_sync(KVKI_FULL_WARP, o.y, step);
        o.z += __shfl_xor_sync(KVKI_FULL_WARP, o.z, step);
        o.w += __shfl_xor_sync(KVKI_FULL_WARP, o.w, step);
        total += __shfl_xor_sync(KVKI_FULL_WARP, total, step);
    }
    if (lane < COMBINE_LANES)
        *(float4 *)(sh->sums[warp] + lane * 4u) = o;
    if (lane == 0)
        sh->total[warp] = total;
    __syncthreads();
    total = 0;
    for (uint32_t w = 0; w < COMBINE_WARPS; w++) {
        sum += sh->sums[w][lane];
        total += sh->total[w];
    }
    *total_p = total;
    return sum;
}

/*
 * A piece of one query head's dimensions over all tiles. Eight lanes take a line of a tile's sum,
 * so a block has COMBINE_TILES lines in flight; a thread adds every 32nd tile, in order, then the
 * threads' shares are added up. How many tiles there are is known before the tiles are.
 */
template <int kDim>
__global__ void __launch_bounds__(COMBINE_WARPS * 32, 4)
    combine_kernel(const struct attend_params p)
{
    __shared__ struct combine_state sh;
    const uint32_t pieces = kDim / COMBINE_PIECE;
    uint32_t seq = blockIdx.y, resolves = p.a.resolve.k != 0;
    uint32_t block = blockIdx.x - resolves, head = block / pieces;
    uint32_t d = block % pieces * COMBINE_PIECE, own = threadIdx.x / COMBINE_LANES;
    size_t row = (size_t)seq * p.a.n_q_heads + head, tile_floats = (size_t)p.a.n_q_heads * kDim;
    const float *mosts = p.most + row * p.n_tiles, *totals = p.total + row * p.n_tiles;
    const float *parts = p.o + (size_t)seq * p.n_tiles * tile_floats + (size_t)head * kDim + d +
                         threadIdx.x % COMBINE_LANES * 4u;
    const struct tile_order t = order_of(&p, seq);
    float most = -INFINITY, total = 0;
    float4 o = make_float4(0, 0, 0, 0);

    kvki_wait_for_previous();
    if (!p.a.near.n_max) /* one that is early behind this has another workspace (cuda.h) */
        kvki_let_next_start();
    if (blockIdx.x < resolves)
        return finish_resolve(&p, seq);
    for (uint32_t from = 0; from < t.n; from += COMBINE_TILES) {
        uint32_t mine = from + threadIdx.x, mine_at = tile_at(&t, mine);
        float peak = mine < t.n ? mosts[mine_at] : -INFINITY;
        float part = mine < t.n ? totals[mine_at] : 0.0f;
        float4 x[COMBINE_ROUNDS];
#pragma unroll
        for (uint32_t i = 0; i < COMBINE_ROUNDS; i++) {
            uint32_t tile = from + i * COMBINE_ROWS + own;
            if (tile < t.n)
                x[i] = *(const float4 *)(parts + tile_at(&t, tile) * tile_floats);
        }
        if (from == 0) {
            most = peak;
            for (uint32_t i = mine + COMBINE_TILES; i < t.n; i += COMBINE_TILES)
                most = fmaxf(most, mosts[tile_at(&t, i)]);
            most = combine_most(&sh, most);
        }
        sh.weights[threadIdx.x] = peak == most ? 1.0f : expf(peak - most);
        sh.totals[threadIdx.x] = part;
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < COMBINE_ROUNDS; i++) {
            uint32_t tile = i * COMBINE_ROWS + own;
            float weight = sh.weights[tile];
            if (from + tile >= t.n)
                break;
            total = fmaf(sh.totals[tile], weight, total);
            o.x = fmaf(x[i].x, weight, o.x);
            o.y = fmaf(x[i].y, weight, o.y);
            o.z = fmaf(x[i].z, weight, o.z);
            o.w = fmaf(x[i].w, weight, o.w);
        }
        __syncthreads();
    }
    kvki_let_next_start(); /* the workspace may be the next op's from here on */
    float sum = combine_add_up(&sh, o, &total);
    if (threadIdx.x < COMBINE_PIECE)
        store_result(&p.a, row * kDim + d + threadIdx.x, total == 0.0f ? 0.0f : sum / total);
    float *lse = p.a.result.out ? p.a.result.lse : p.a.lse;
    if (threadIdx.x == 0 && d == 0 && lse)
        lse[row] = total == 0.0f ? -INFINITY : most + logf(total);
    tell_host(&p.a.result);
}

static uint32_t tiles_of(uint32_t stride)
{
    return (stride + ATTEND_TILE - 1) / ATTEND_TILE;
}

static size_t workspace_of(uint32_t n_seqs, uint32_t n_q_heads, uint32_t head_dim, uint32_t n_tiles)
{
    return (size_t)n_seqs * n_tiles * n_q_heads * (head_dim + 2u) * sizeof(float);
}

extern "C" size_t kvk_cuda_attend_workspace_bytes(uint32_t n_seqs, uint32_t stride,
                                                  uint32_t n_q_heads, uint32_t head_dim)
{
    return workspace_of(n_seqs, n_q_heads, head_dim, tiles_of(stride));
}

template <int kDim> static attend_fn kernel_of_group(uint32_t group)
{
    static const attend_fn kernels[ATTEND_GROUP_MAX] = {
        attend_kernel<1, kDim>, attend_kernel<2, kDim>, attend_kernel<3, kDim>,
        attend_kernel<4, kDim>, attend_kernel<5, kDim>, attend_kernel<6, kDim>,
        attend_kernel<7, kDim>, attend_kernel<8, kDim>};
    return kernels[group - 1];
}

/* The kernel for the arguments; NULL: none. The tensor cores take all but f16. */
static attend_fn kernel_of(const kvk_cuda_attend_args *a)
{
    uint32_t group = a->n_q_heads / a->n_kv_heads;
    bool rotated = attend_is_rotated(a), few = group <= ATTEND_GROUP_FEW;

    if (group > ATTEND_GROUP_MAX)
        return NULL;
    if (a->dtype == KVK_F16 && !a->near.n_max)
        return a->head_dim == 64    ? kernel_of_group<64>(group)
               : a->head_dim == 128 ? kernel_of_group<128>(group)
                                    : NULL;
    if (a->near.n_max)
        return kvki_attend_near(a->dtype, a->head_dim, a->near.inv_freq != NULL, rotated, few);
    return a->dtype == KVK_BF16 && !rotated
               ? kvki_attend_mma(a->head_dim, few)
               : kvki_attend_split(a->dtype, a->head_dim, rotated, few);
}

static bool args_ok(const kvk_cuda_attend_args *a)
{
    size_t width = kvk_slice_bytes(a->dtype, a->n_kv_heads, a->head_dim);

    return a->n_seqs <= KVK_CUDA_SEQS_MAX && a->n_kv_heads && a->n_q_heads &&
           a->n_q_heads % a->n_kv_heads == 0 && a->stride && a->row_bytes % 16 == 0 &&
           a->k_off_bytes % 16 == 0 && a->v_off_bytes % 16 == 0 &&
           a->k_off_bytes + width <= a->row_bytes && a->v_off_bytes + width <= a->row_bytes &&
           a->q && a->list && a->n_list && a->res && (!a->fetch || a->source) &&
           a->scale == a->scale && a->softcap >= 0 && a->workspace && kvki_aligned(a->workspace) &&
           a->workspace_bytes >= workspace_of(a->n_seqs, a->n_q_heads, a->head_dim,
                                              tiles_of(a->stride) + tiles_of(a->near.n_max));
}

/* What is resolved is what is attended. */
static bool resolve_ok(const kvk_cuda_attend_args *a)
{
    const kvk_cuda_resolve_args *r = &a->resolve;

    return !r->k || (resolve_args_ok(r) && a->resolved && a->source && r->n_seqs == a->n_seqs &&
                     r->list == a->list && r->fetch == a->fetch && r->n_list == a->n_list &&
                     r->stride == a->stride && r->res == a->res);
}

static bool near_ok(const kvk_cuda_attend_args *a)
{
    const kvk_cuda_near *n = &a->near;
    const kvk_cuda_result *r = &a->result;

    return (!n->n_max || (n->q && n->ring && n->first && n->n && n->ring_rows >= n->n_max)) &&
           (r->out ? r->dtype == KVK_BF16 || r->dtype == KVK_F16 : a->o && a->lse) &&
           !r->counts == !r->done;
}

extern "C" kvc_status kvk_cuda_attend_supports(const kvk_cuda *cuda,
                                               const kvk_cuda_attend_args *args)
{
    bool fits = attend_layout_of(args).bytes <= (size_t)cuda->smem_block_max;

    return kernel_of(args) && fits ? KVC_OK : KVC_UNSUPPORTED;
}

extern "C" kvc_status kvk_cuda_attend(kvk_cuda *cuda, const kvk_cuda_attend_args *args,
                                      kvk_stream *stream)
{
    uint32_t n_far = tiles_of(args->stride), n_tiles = n_far + tiles_of(args->near.n_max);
    struct attend_params p = {*args, (float *)args->workspace, NULL, NULL, n_tiles, n_far, 0};
    size_t smem = 0, heads = (size_t)args->n_seqs * n_tiles * args->n_q_heads;
    attend_fn kernel = NULL;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args) || !near_ok(args) || !resolve_ok(args))
        return KVC_INVALID;
    kernel = kernel_of(args);
    smem = attend_layout_of(args).bytes;
    if (kvk_cuda_attend_supports(cuda, args) != KVC_OK)
        return KVC_UNSUPPORTED;
    p.most = p.o + heads * args->head_dim;
    p.total = p.most + heads;
    st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = kvki_cuda_status(cudaFuncSetAttribute(
            (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    if (st != KVC_OK)
        return st;
    if (args->resolve.k)
        p.resolver_rows = (args->n_seqs + n_tiles - 1) / n_tiles;
    st = kvki_cuda_launch_next(cuda, kernel, dim3(n_tiles, p.resolver_rows + args->n_seqs),
                               ATTEND_THREADS, smem, stream, p);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(
        cuda, args->head_dim == 64 ? combine_kernel<64> : combine_kernel<128>,
        dim3(args->n_q_heads * (args->head_dim / COMBINE_PIECE) + (args->resolve.k ? 1u : 0u),
             args->n_seqs),
        COMBINE_WARPS * 32, 0, stream, p);
}
