/*
 * rerank.cu: the k best of a list of candidates by TokenSelect's soft vote over a finer index.
 *
 *   1. score: a block takes TILE candidates in list order, whose rows it gathers into shared
 *      memory: logits of all heads, and the tile's share of each head's softmax;
 *   2. vote: every block joins the shares of all tiles, in order, which gives the heads' weights;
 *      a candidate's vote and position become its key, all of which are different;
 *   3. widen, with a window: the best key of those that are near;
 *   4. rank: a candidate's place is the number of those before it. Keys are counted by bins on the
 *      way; what lies below the bin of the k-th is left out.
 *
 * All sums follow the list, so its bits depend on it alone; nothing of the workspace outlives a
 * call. Each kernel may begin while the one before it ends.
 */
#include "kvk/cuda_rerank.h"
#include "vote.cuh"

#define THREADS      256u
#define WARPS        (THREADS / 32u)
#define TILE         32u                   /* candidates of a block that scores: a lane each */
#define VOTED        64u                   /* of one that adds up votes */
#define HEADS        4u                    /* that a warp works on at a time */
#define DIMS         (VOTE_DIMS_MAX / 32u) /* of a head, a lane's */
#define STAGE_BYTES  32768u                /* of rows in shared memory, about */
#define LANES        8u                    /* of a candidate that is widened */
#define WIDENED      (THREADS / LANES)
#define STAGED       2048u /* keys in shared memory at a time */
#define RANK_THREADS 512u
#define RANK_LANES   16u /* of a candidate that is ranked */
#define RANKED       (RANK_THREADS / RANK_LANES)
#define KEPT         4096u /* keys that a block looks at before it ranks against what is left */
#define BINS_MAX     4096u /* of keys, a few for each thread that ranks */

struct rerank_params {
    kvk_cuda_rerank_args a;
    uint32_t row_bytes, row_stride; /* of a row; in shared memory */
    uint32_t q_stride, stage_rows;  /* of an int16 query head, in elements; rows at a time */
    uint32_t n_tiles;
    float *logits;        /* [n_seqs, n_max, n_q_heads] without the query's scale */
    float2 *shares;       /* [n_seqs, n_q_heads, n_tiles] maximum, sum relative to it, base 2 */
    float *scales;        /* [n_seqs, n_q_heads] of the queries, for base 2 */
    uint64_t *keys, *all; /* [n_seqs, n_max] of votes; of what is ranked, keys or widened ones */
    uint32_t *bins;       /* [n_seqs, BINS_MAX] how many of all are in each */
};

/* How many candidates a sequence has; 0 where its picks are kept. */
__device__ static inline uint32_t listed(const struct rerank_params *p, uint32_t seq)
{
    return p->a.keep && p->a.keep[seq] ? 0 : min(p->a.n_list[seq], p->a.n_max);
}

/* The row of a position in seq's finer index; NULL: it has none. */
__device__ static inline const uint8_t *row_of(const struct rerank_params *p, uint32_t seq,
                                               uint32_t position)
{
    const kvk_cuda_candidates *finer = p->a.finer + seq;
    uint32_t row = position - finer->base;
    return row < finer->n_rows ? (const uint8_t *)finer->index + (size_t)row * p->row_bytes : NULL;
}

/* The heads of seq's query as int16, q_stride apart, and their scales. */
__device__ static void quantize(const struct rerank_params *p, uint32_t seq, int16_t *query,
                                float *scales)
{
    uint32_t lane = threadIdx.x & 31u, dims = p->a.dims, heads = p->a.n_q_heads;
    const float *q = p->a.q + (size_t)seq * heads * dims;

    for (uint32_t first = threadIdx.x / 32u * HEADS; first < heads; first += WARPS * HEADS) {
        float x[HEADS][DIMS], most[HEADS] = {};
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++) {
#pragma unroll
            for (uint32_t i = 0; i < DIMS; i++) {
                uint32_t d = i * 32u + lane;
                x[h][i] = d < dims && first + h < heads ? q[(first + h) * dims + d] : 0.0f;
            }
        }
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++) {
#pragma unroll
            for (uint32_t i = 0; i < DIMS; i++)
                most[h] = fmaxf(most[h], fabsf(x[h][i]));
            most[h] = __fdiv_rn(kvki_lanes_max(most[h], 32), 32767.0f);
        }
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++) {
            if (lane == 0 && first + h < heads)
                scales[first + h] = most[h] * LOG2_E;
#pragma unroll
            for (uint32_t i = 0; i < DIMS; i++) {
                uint32_t d = i * 32u + lane;
                if (d < dims && first + h < heads)
                    query[(first + h) * p->q_stride + d] =
                        (int16_t)(most[h] > 0 ? kvki_quantized(x[h][i], most[h]) : 0);
            }
        }
    }
}

/* n rows on their way into shared memory, in pieces that divide them; of one that is not there
 * (NULL), nothing. */
template <uint32_t kPiece>
__device__ static inline void gather(const struct rerank_params *p, const uint8_t *const *rows,
                                     uint32_t n, uint8_t *to)
{
    uint32_t pieces = p->row_bytes / kPiece;

#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < n * pieces; i += THREADS) {
        uint32_t row = i / pieces, off = i % pieces * kPiece;
        const uint8_t *from = rows[row];
        uint8_t *at = to + row * p->row_stride + off;
        if (!from)
            continue;
        if constexpr (kPiece == 16)
            kvki_async_copy(at, from + off);
        else if constexpr (kPiece == 8)
            kvki_async_copy_8(at, from + off);
        else if constexpr (kPiece == 4)
            kvki_async_copy_4(at, from + off);
        else if constexpr (kPiece == 2)
            *(uint16_t *)at = __ldcg((const uint16_t *)(from + off));
        else
            *at = from[off];
    }
}

__device__ static void gather_rows(const struct rerank_params *p, const uint8_t *const *rows,
                                   uint32_t n, uint8_t *to)
{
    switch (p->row_bytes & (0u - p->row_bytes)) {
    case 1:
        return gather<1>(p, rows, n, to);
    case 2:
        return gather<2>(p, rows, n, to);
    case 4:
        return gather<4>(p, rows, n, to);
    case 8:
        return gather<8>(p, rows, n, to);
    default:
        return gather<16>(p, rows, n, to);
    }
}

/* The dot of a query head with its kv head's key of a row, times the key's scale. */
__device__ static inline float logit(const struct rerank_params *p, const int16_t *query,
                                     const uint8_t *row, uint32_t head)
{
    uint32_t dims = p->a.dims, kv = head / (p->a.n_q_heads / p->a.n_kv_heads);
    const uint8_t *key = row + kv * dims, *scale = row + p->a.n_kv_heads * dims + 2u * kv;
    const int16_t *q = query + head * p->q_stride;
    int sum = 0;

    if (dims % 4 == 0) {
#pragma unroll 4
        for (uint32_t d = 0; d < dims; d += 4) {
            uint2 four = *(const uint2 *)(q + d);
            int bytes = *(const int *)(key + d);
            sum = __dp2a_lo((int)four.x, bytes, sum);
            sum = __dp2a_hi((int)four.y, bytes, sum);
        }
    } else {
        for (uint32_t d = 0; d < dims; d++)
            sum += (int)q[d] * (int)(int8_t)key[d];
    }
    return (float)sum * kvki_bf16((uint32_t)scale[0] | (uint32_t)scale[1] << 8);
}

/* The tile's shares: a head a warp, a candidate a lane. One whose row (NULL) is not there has none:
 * its logit by a scale of 0 would be NaN. */
__device__ static void share(const struct rerank_params *p, uint32_t seq, uint32_t tile, uint32_t n,
                             const uint8_t *const *rows, const float *logits, const float *scales)
{
    uint32_t lane = threadIdx.x & 31u, heads = p->a.n_q_heads, stride = heads | 1u;
    float2 *to = p->shares + (size_t)seq * heads * p->n_tiles + tile;
    bool there = lane < n && rows[lane];

#pragma unroll 4
    for (uint32_t head = threadIdx.x / 32u; head < heads; head += WARPS) {
        float x = there ? logits[lane * stride + head] * scales[head] : -INFINITY;
        float most = kvki_lanes_max(x, 32), sum = most > -INFINITY ? exp2_of(x - most) : 0.0f;
        for (uint32_t step = 1; step < 32; step *= 2)
            sum += __shfl_xor_sync(KVKI_FULL_WARP, sum, step);
        if (lane == 0)
            to[(size_t)head * p->n_tiles] = make_float2(most, sum);
    }
}

/* Bytes of shared memory: queries, scales and logits of a tile, in this order; then rows. */
struct score_room {
    uint32_t scales, logits, rows, all;
};

__host__ __device__ static inline struct score_room room_of(const struct rerank_params *p)
{
    struct score_room room;
    room.scales = (p->a.n_q_heads * p->q_stride * 2u + 15u) / 16u * 16u;
    room.logits = room.scales + (p->a.n_q_heads * 4u + 15u) / 16u * 16u;
    room.rows = room.logits + TILE * (p->a.n_q_heads | 1u) * 4u;
    room.all = room.rows + p->stage_rows * p->row_stride;
    return room;
}

__global__ void __launch_bounds__(THREADS)
    score_kernel(const __grid_constant__ struct rerank_params p)
{
    extern __shared__ __align__(16) uint8_t score_memory[];
    __shared__ const uint8_t *rows[TILE];
    struct score_room room = room_of(&p);
    int16_t *query = (int16_t *)score_memory;
    float *scales = (float *)(score_memory + room.scales);
    float *logits = (float *)(score_memory + room.logits);
    uint32_t seq = blockIdx.y, heads = p.a.n_q_heads, first = blockIdx.x * TILE;

    kvki_wait_for_previous();
    kvki_let_next_start();
    uint32_t n = listed(&p, seq), left = min(n - min(first, n), TILE);
    if (left == 0)
        return;
    if (threadIdx.x < left)
        rows[threadIdx.x] =
            row_of(&p, seq, p.a.list[(size_t)seq * p.a.n_max + first + threadIdx.x]);
    __syncthreads();
    for (uint32_t from = 0; from < left; from += p.stage_rows) {
        uint32_t some = min(left - from, p.stage_rows);
        gather_rows(&p, rows + from, some, score_memory + room.rows);
        if (from == 0)
            quantize(&p, seq, query, scales);
        kvki_async_wait();
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < some * heads; i += THREADS) {
            uint32_t row = i / heads, head = i % heads;
            logits[(from + row) * (heads | 1u) + head] =
                rows[from + row]
                    ? logit(&p, query, score_memory + room.rows + row * p.row_stride, head)
                    : -INFINITY;
        }
        __syncthreads();
    }
    share(&p, seq, blockIdx.x, left, rows, logits, scales);
    for (uint32_t i = threadIdx.x; i < left * heads; i += THREADS)
        p.logits[((size_t)seq * p.a.n_max + first) * heads + i] =
            logits[i / heads * (heads | 1u) + i % heads];
    for (uint32_t i = threadIdx.x; blockIdx.x == 0 && i < heads; i += THREADS)
        p.scales[(size_t)seq * heads + i] = scales[i];
    for (uint32_t i = threadIdx.x; blockIdx.x == 0 && i < BINS_MAX; i += THREADS)
        p.bins[(size_t)seq * BINS_MAX + i] = 0;
}

/* Counts a key that will be ranked. */
__device__ static inline void count(const struct rerank_params *p, uint32_t seq, uint32_t key)
{
    atomicAdd(p->bins + (size_t)seq * BINS_MAX + topk_bin(key, BINS_MAX), 1u);
}

/* Shifts and weights of HEADS heads, the last one again where there are fewer, from the shares of n
 * tiles each. A whole warp calls. */
__device__ static void weigh(const struct rerank_params *p, uint32_t seq, uint32_t first,
                             uint32_t n, float *shift, float *weight)
{
    uint32_t lane = threadIdx.x & 31u, heads = p->a.n_q_heads;
    const float2 *shares[HEADS];
    float most[HEADS];
    double sum[HEADS];

#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++) {
        shares[h] = p->shares + ((size_t)seq * heads + min(first + h, heads - 1)) * p->n_tiles;
        most[h] = -INFINITY;
        sum[h] = 0;
    }
#pragma unroll 2
    for (uint32_t i = lane; i < n; i += 32) {
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++)
            most[h] = fmaxf(most[h], shares[h][i].x);
    }
#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++)
        most[h] = kvki_lanes_max(most[h], 32);
#pragma unroll 2
    for (uint32_t i = lane; i < n; i += 32) {
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++)
            sum[h] += (double)shares[h][i].y * (double)exp2_of(shares[h][i].x - most[h]);
    }
#pragma unroll
    for (uint32_t h = 0; h < HEADS; h++) {
        for (uint32_t step = 1; step < 32; step *= 2)
            sum[h] += __shfl_xor_sync(KVKI_FULL_WARP, sum[h], step);
        if (lane == 0 && first + h < heads) {
            shift[first + h] = most[h];
            weight[first + h] = sum[h] > 0 ? (float)(1.0 / sum[h]) : 0.0f;
        }
    }
}

__global__ void __launch_bounds__(THREADS)
    vote_list_kernel(const __grid_constant__ struct rerank_params p)
{
    __shared__ float shift[VOTE_SLOTS_MAX], weight[VOTE_SLOTS_MAX], scale[VOTE_SLOTS_MAX];
    uint32_t seq = blockIdx.y, heads = p.a.n_q_heads, part = threadIdx.x % 4u;
    uint32_t at = blockIdx.x * VOTED + threadIdx.x / 4u;
    float vote = 0;

    kvki_wait_for_previous();
    kvki_let_next_start();
    uint32_t n = listed(&p, seq);
    if (blockIdx.x * VOTED >= n)
        return;
    for (uint32_t first = threadIdx.x / 32u * HEADS; first < heads; first += WARPS * HEADS)
        weigh(&p, seq, first, (n + TILE - 1) / TILE, shift, weight);
    for (uint32_t head = threadIdx.x; head < heads; head += THREADS)
        scale[head] = __ldcg(p.scales + (size_t)seq * heads + head);
    __syncthreads();
    const float *logits = p.logits + ((size_t)seq * p.a.n_max + min(at, n - 1)) * heads;
#pragma unroll 4
    for (uint32_t head = part; head < heads; head += 4)
        vote = fmaf(exp2_of(fmaf(__ldcg(logits + head), scale[head], -shift[head])), weight[head],
                    vote);
    vote += __shfl_xor_sync(KVKI_FULL_WARP, vote, 1);
    vote += __shfl_xor_sync(KVKI_FULL_WARP, vote, 2);
    if (part == 0 && at < n) {
        uint32_t position = p.a.list[(size_t)seq * p.a.n_max + at];
        if (!row_of(&p, seq, position))
            vote = -1.0f;
        p.keys[(size_t)seq * p.a.n_max + at] = (uint64_t)topk_key(vote) << 32 | (uint32_t)~position;
        if (p.a.eps == 0)
            count(&p, seq, topk_key(vote));
    }
}

/* Up to STAGED of a sequence's n keys, from `from` on, into shared memory; past n lie zeros. */
__device__ static inline uint32_t stage(const uint64_t *keys, uint32_t from, uint32_t n,
                                        uint64_t *to)
{
    uint32_t some = min(n - from, STAGED);

    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < STAGED / THREADS; i++) {
        uint32_t at = i * THREADS + threadIdx.x;
        to[at] = at < some ? __ldcg(keys + from + at) : 0;
    }
    __syncthreads();
    return (some + LANES - 1) / LANES * LANES;
}

__global__ void __launch_bounds__(THREADS)
    widen_kernel(const __grid_constant__ struct rerank_params p)
{
    __shared__ uint64_t some[STAGED];
    uint32_t seq = blockIdx.y, at = blockIdx.x * WIDENED + threadIdx.x / LANES, best = 0;

    kvki_wait_for_previous();
    kvki_let_next_start();
    uint32_t n = listed(&p, seq);
    const uint64_t *keys = p.keys + (size_t)seq * p.a.n_max;
    if (blockIdx.x * WIDENED >= n)
        return;
    uint64_t mine = __ldcg(keys + min(at, n - 1));
    uint32_t position = ~(uint32_t)mine, reach = p.a.eps;
    best = (uint32_t)(mine >> 32);
    bool absent = best == topk_key(-1.0f);
    for (uint32_t from = 0; from < n; from += STAGED) {
        uint32_t end = stage(keys, from, n, some);
        for (uint32_t i = threadIdx.x % LANES; i < end; i += LANES) {
            uint32_t other = ~(uint32_t)some[i];
            uint32_t apart = other > position ? other - position : position - other;
            if (apart <= reach && !absent)
                best = max(best, (uint32_t)(some[i] >> 32));
        }
    }
    for (uint32_t step = 1; step < LANES; step *= 2)
        best = max(best, __shfl_xor_sync(KVKI_FULL_WARP, best, step));
    if (threadIdx.x % LANES == 0 && at < n) {
        p.all[(size_t)seq * p.a.n_max + at] = (uint64_t)best << 32 | (uint32_t)mine;
        count(&p, seq, best);
    }
}

/* The least bin of a candidate among the k best of n. The block calls. */
__device__ static uint32_t least_bin(const uint32_t *bins, uint32_t n, uint32_t k)
{
    constexpr uint32_t kEach = BINS_MAX / RANK_THREADS;
    __shared__ uint32_t least;
    uint32_t top = BINS_MAX - threadIdx.x * kEach, counts[kEach];

    if (threadIdx.x == 0)
        least = 0;
    uint32_t upto = kvki_above_bins<RANK_THREADS>(bins, BINS_MAX, counts);
#pragma unroll
    for (uint32_t i = 0; i < kEach; i++) {
        if (upto < k && upto + counts[i] >= k && n > k)
            least = top - 1 - i;
        upto += counts[i];
    }
    __syncthreads();
    return least;
}

/* Adds the keys of the lanes that want. A whole warp calls. */
__device__ static inline void keep(uint64_t *kept, uint32_t *n_kept, uint64_t key, bool want)
{
    uint32_t lanes = __ballot_sync(KVKI_FULL_WARP, want), lane = threadIdx.x & 31u, at = 0;

    if (lane == 0 && lanes)
        at = atomicAdd(n_kept, (uint32_t)__popc(lanes));
    at = __shfl_sync(KVKI_FULL_WARP, at, 0) + (uint32_t)__popc(lanes & ((1u << lane) - 1u));
    if (want)
        kept[at] = key;
}

__global__ void __launch_bounds__(RANK_THREADS)
    rank_list_kernel(const __grid_constant__ struct rerank_params p)
{
    __shared__ uint64_t kept[KEPT];
    __shared__ uint32_t n_kept;
    uint32_t seq = blockIdx.y, at = blockIdx.x * RANKED + threadIdx.x / RANK_LANES, before = 0;

    kvki_wait_for_previous();
    kvki_let_next_start();
    uint32_t n = listed(&p, seq), k = p.a.k;
    const uint64_t *keys = p.all + (size_t)seq * p.a.n_max;
    if (blockIdx.x == 0 && threadIdx.x == 0 && !(p.a.keep && p.a.keep[seq]))
        p.a.n_picks[seq] = min(n, k);
    if (blockIdx.x * RANKED >= n)
        return;
    uint32_t least = least_bin(p.bins + (size_t)seq * BINS_MAX, n, k);
    uint64_t mine = at < n ? __ldcg(keys + at) : 0;
    bool in = at < n && topk_bin((uint32_t)(mine >> 32), BINS_MAX) >= least;
    if (!__syncthreads_or(in))
        return;
    for (uint32_t from = 0; from < n; from += KEPT) {
        if (threadIdx.x == 0)
            n_kept = 0;
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < KEPT / RANK_THREADS; i++) {
            uint32_t j = from + i * RANK_THREADS + threadIdx.x;
            uint64_t key = j < n ? __ldcg(keys + j) : 0;
            keep(kept, &n_kept, key, j < n && topk_bin((uint32_t)(key >> 32), BINS_MAX) >= least);
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x % RANK_LANES; i < n_kept; i += RANK_LANES)
            before += kept[i] > mine;
        __syncthreads();
    }
    for (uint32_t step = 1; step < RANK_LANES; step *= 2)
        before += __shfl_xor_sync(KVKI_FULL_WARP, before, step);
    if (threadIdx.x % RANK_LANES == 0 && in && before < k) {
        p.a.picks[(size_t)seq * k + before] = ~(uint32_t)mine;
        if (p.a.scores)
            p.a.scores[(size_t)seq * k + before] = topk_score((uint32_t)(mine >> 32));
    }
}

/* Cuts a workspace; gives the bytes needed. base may be NULL. */
static size_t cut(void *base, uint32_t n_seqs, uint32_t n_max, uint32_t n_q_heads,
                  struct rerank_params *p)
{
    char *at = (char *)base;
    size_t n = (size_t)n_seqs * n_max, heads = (size_t)n_seqs * n_q_heads, used = 0;

    p->n_tiles = (n_max + TILE - 1) / TILE;
#define TAKE(field, type, count)                                                                   \
    p->field = (type *)(at + used);                                                                \
    used += kvki_round_up((count) * sizeof(type), 256)
    TAKE(logits, float, n *n_q_heads);
    TAKE(shares, float2, heads * p->n_tiles);
    TAKE(scales, float, heads);
    TAKE(keys, uint64_t, n);
    TAKE(all, uint64_t, n);
    TAKE(bins, uint32_t, (size_t)n_seqs * BINS_MAX);
#undef TAKE
    return used;
}

static bool sizes_ok(uint32_t n_seqs, uint32_t n_max, uint32_t n_q_heads)
{
    return n_seqs <= KVK_CUDA_SEQS_MAX && n_max > 0 && n_max <= KVK_CUDA_WIDE_MAX &&
           n_q_heads > 0 && n_q_heads <= VOTE_SLOTS_MAX;
}

extern "C" size_t kvk_cuda_rerank_workspace_bytes(uint32_t n_seqs, uint32_t n_max,
                                                  uint32_t n_q_heads)
{
    struct rerank_params p;
    return sizes_ok(n_seqs, n_max, n_q_heads) ? cut(NULL, n_seqs, n_max, n_q_heads, &p) : 0;
}

static bool args_ok(const kvk_cuda_rerank_args *a)
{
    return sizes_ok(a->n_seqs, a->n_max, a->n_q_heads) && a->dims > 0 && a->dims <= VOTE_DIMS_MAX &&
           a->n_kv_heads > 0 && a->n_q_heads % a->n_kv_heads == 0 &&
           a->n_q_heads * a->dims <= VOTE_QUERY_MAX && a->k > 0 && a->k <= KVK_CUDA_K_MAX && a->q &&
           a->finer && a->list && a->n_list && a->picks && a->n_picks && a->workspace &&
           kvki_aligned(a->workspace) &&
           a->workspace_bytes >= kvk_cuda_rerank_workspace_bytes(a->n_seqs, a->n_max, a->n_q_heads);
}

static kvc_status launch(kvk_cuda *cuda, const struct rerank_params *p, kvk_stream *stream)
{
    uint32_t smem = room_of(p).all, ranks = (p->a.n_max + RANKED - 1) / RANKED;
    dim3 tiles(p->n_tiles, p->a.n_seqs), voted((p->a.n_max + VOTED - 1) / VOTED, p->a.n_seqs);
    dim3 ranked(ranks, p->a.n_seqs);
    dim3 widened((p->a.n_max + WIDENED - 1) / WIDENED, p->a.n_seqs);
    kvc_status st = kvki_cuda_use(cuda);

    if (st == KVC_OK)
        st = kvki_cuda_status(cudaFuncSetAttribute(
            (const void *)score_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    if (st == KVC_OK)
        st = kvki_cuda_launch_next(cuda, score_kernel, tiles, THREADS, smem, stream, *p);
    if (st == KVC_OK)
        st = kvki_cuda_launch_next(cuda, vote_list_kernel, voted, THREADS, 0, stream, *p);
    if (st == KVC_OK && p->a.eps != 0)
        st = kvki_cuda_launch_next(cuda, widen_kernel, widened, THREADS, 0, stream, *p);
    return st == KVC_OK
               ? kvki_cuda_launch_next(cuda, rank_list_kernel, ranked, RANK_THREADS, 0, stream, *p)
               : st;
}

extern "C" kvc_status kvk_cuda_rerank(kvk_cuda *cuda, const kvk_cuda_rerank_args *args,
                                      kvk_stream *stream)
{
    struct rerank_params p = {};

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    p.a = *args;
    (void)cut(args->workspace, args->n_seqs, args->n_max, args->n_q_heads, &p);
    p.all = args->eps ? p.all : p.keys;
    p.row_bytes = (uint32_t)kvk_index_row_bytes(args->n_kv_heads, args->dims);
    p.row_stride = (uint32_t)kvki_round_up(p.row_bytes, 16);
    p.q_stride = args->dims + (args->dims % 8 ? 0u : 4u); /* so that heads lie in other banks */
    p.stage_rows = max(1u, min(TILE, STAGE_BYTES / p.row_stride));
    if (room_of(&p).all > (uint32_t)cuda->smem_block_max)
        return KVC_UNSUPPORTED;
    return launch(cuda, &p, stream);
}
