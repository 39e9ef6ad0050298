/*
 * chunk_select.cu: scores of landmarks and their k best: a scan that reads each landmark once, at
 * the memory's rate, and a search of the scores by one block a list; of a long list by one block a
 * part, and then of what the parts found.
 *
 * Scan: kLanes lanes share a row, 16 bytes each at a time, ROWS rows a lane and two steps in
 * flight; the query lies in shared memory. A score is one chain of fused multiply-adds a lane, in
 * order of its pieces, and a tree over the lanes: its bits depend on the row and the query alone.
 * Search: the k-th best of the threads' own best keys bounds the k-th best of all; what reaches the
 * bound, about k, is ranked by counting. Where more does than there is room for (large k, ties, hot
 * regions), the k-th key is found bit by bit instead: slower, equally exact.
 */
#include "topk.cuh"

#define SCAN_THREADS 256u
#define SCAN_WARPS   (SCAN_THREADS / 32u)
#define SCAN_BLOCKS  4u /* that run on a multiprocessor at once */
#define ROWS         4u
#define FIND_THREADS 1024u
#define FIND_CANDS   4096u
#define PART_ROWS    8192u /* of a long list, at least */
#define PARTS_MAX    64u
#define FOUND_MAX    2048u /* by all parts of a list together */

struct chunk_params {
    kvk_cuda_chunk_select_args a;
    float *scores; /* [n_seqs, stride] */
    size_t stride;
    uint64_t *found;  /* [n_seqs, n_parts, k] keys, best first, then zeros */
    uint32_t n_parts; /* 1: the list is searched as a whole */
};

/* 16 bytes of a landmark times their queries, the second half of which lies `apart` float4 on. */
template <typename T> struct piece;
template <> struct piece<float> {
    static constexpr uint32_t kElems = 4;
    __device__ static inline float add(uint4 d, const float4 *q, uint32_t, float sum)
    {
        float4 x = q[0];
        sum = fmaf(__uint_as_float(d.x), x.x, sum);
        sum = fmaf(__uint_as_float(d.y), x.y, sum);
        sum = fmaf(__uint_as_float(d.z), x.z, sum);
        return fmaf(__uint_as_float(d.w), x.w, sum);
    }
};
template <> struct piece<__nv_bfloat16> {
    static constexpr uint32_t kElems = 8;
    __device__ static inline float add(uint4 d, const float4 *q, uint32_t apart, float sum)
    {
        float4 x = q[0], y = q[apart];
        sum = fmaf(kvki_bf16(d.x), x.x, sum);
        sum = fmaf(__uint_as_float(d.x & 0xffff0000u), x.y, sum);
        sum = fmaf(kvki_bf16(d.y), x.z, sum);
        sum = fmaf(__uint_as_float(d.y & 0xffff0000u), x.w, sum);
        sum = fmaf(kvki_bf16(d.z), y.x, sum);
        sum = fmaf(__uint_as_float(d.z & 0xffff0000u), y.y, sum);
        sum = fmaf(kvki_bf16(d.w), y.z, sum);
        return fmaf(__uint_as_float(d.w & 0xffff0000u), y.w, sum);
    }
};

/* Query of a list into shared memory, the halves of a piece apart. */
template <typename T>
__device__ static inline void load_query(const float *q, uint32_t n_pieces, float4 *shared)
{
    constexpr uint32_t kParts = piece<T>::kElems / 4;

    for (uint32_t i = threadIdx.x; i < n_pieces * kParts; i += SCAN_THREADS)
        shared[i % kParts * n_pieces + i / kParts] = ((const float4 *)q)[i];
    __syncthreads();
}

/* Scores of ROWS * 32 / kLanes rows from `first` on, by a warp. */
template <typename T, uint32_t kLanes>
__device__ static inline void score_rows(const char *landmarks, size_t stride_bytes, uint32_t first,
                                         uint32_t n, uint32_t n_pieces, const float4 *q,
                                         float *scores)
{
    uint32_t lane = threadIdx.x & 31u, row = first + lane / kLanes;
    const char *at[ROWS];
    float sum[ROWS];

#pragma unroll
    for (uint32_t r = 0; r < ROWS; r++) {
        at[r] = landmarks + (size_t)min(row + r * (32u / kLanes), n - 1) * stride_bytes;
        sum[r] = 0;
    }
    for (uint32_t p = lane % kLanes; p < n_pieces; p += 2 * kLanes) {
        uint4 d[2][ROWS];
#pragma unroll
        for (uint32_t r = 0; r < ROWS; r++) {
            d[0][r] = kvki_load_once(at[r] + (size_t)p * 16u);
            d[1][r] = p + kLanes < n_pieces ? kvki_load_once(at[r] + (size_t)(p + kLanes) * 16u)
                                            : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            if (p + i * kLanes >= n_pieces)
                break;
#pragma unroll
            for (uint32_t r = 0; r < ROWS; r++)
                sum[r] = piece<T>::add(d[i][r], q + p + i * kLanes, n_pieces, sum[r]);
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < ROWS; r++) {
        for (uint32_t step = kLanes / 2; step > 0; step /= 2)
            sum[r] += __shfl_xor_sync(KVKI_FULL_WARP, sum[r], (int)step);
        if (lane % kLanes == 0 && row + r * (32u / kLanes) < n)
            scores[row + r * (32u / kLanes)] = sum[r];
    }
}

template <typename T, uint32_t kLanes>
__global__ void __launch_bounds__(SCAN_THREADS, SCAN_BLOCKS)
    scan_kernel(const struct chunk_params p)
{
    extern __shared__ float4 query[];
    constexpr uint32_t kRows = ROWS * 32u / kLanes;
    uint32_t seq = blockIdx.y, n = 0, n_pieces = p.a.dims / piece<T>::kElems;
    uint32_t first = (blockIdx.x * SCAN_WARPS + threadIdx.x / 32u) * kRows;

    kvki_wait_for_previous();
    kvki_let_next_start();
    n = min(p.a.cands[seq].n_rows, p.a.rows_max);
    if (blockIdx.x * SCAN_WARPS * kRows >= n)
        return;
    load_query<T>(p.a.q + (size_t)seq * p.a.dims, n_pieces, query);
    for (; first < n; first += gridDim.x * SCAN_WARPS * kRows)
        score_rows<T, kLanes>((const char *)p.a.cands[seq].index, p.a.stride_bytes, first, n,
                              n_pieces, query, p.scores + seq * p.stride);
}

/* What is searched: rows [first, first + n) of a list's scores, or n keys that parts have found.
 * Read past L1, as the kernel before wrote it. */
struct search {
    const float *scores;
    const uint64_t *keys; /* NULL: scores */
    uint32_t first, n, k;
};

/* All keys differ, but for those found keys that are 0: no row. */
__device__ static inline uint64_t key_of(const struct search *s, uint32_t i)
{
    return s->keys ? __ldcg(s->keys + i)
                   : (uint64_t)topk_key(__ldcg(s->scores + s->first + i)) << 32 |
                         (uint32_t) ~(s->first + i);
}

/* A bound on the upper half of the k-th best key, to all threads: at least k threads have a key of
 * their own that reaches it. 0 where fewer than k have any. */
__device__ static uint32_t bound_of(const struct search *s)
{
    uint32_t best = 0, bound = 0;

#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < s->n; i += FIND_THREADS)
        best = max(best, (uint32_t)(key_of(s, i) >> 32));
    for (uint32_t bit = 1u << 31; bit >= 1u << 12; bit >>= 1) {
        if (__syncthreads_count(best >= (bound | bit)) >= (int)s->k)
            bound |= bit;
    }
    return bound;
}

/* Puts the keys that reach `least` into cands, as far as there is room; gives their number. */
__device__ static uint32_t collect(const struct search *s, uint64_t least, uint64_t *cands,
                                   uint32_t *count)
{
    __syncthreads();
    if (threadIdx.x == 0)
        *count = 0;
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < s->n; i += FIND_THREADS) {
        uint64_t key = key_of(s, i);
        uint32_t at = key >= least ? atomicAdd(count, 1u) : FIND_CANDS;
        if (at < FIND_CANDS)
            cands[at] = key;
    }
    __syncthreads();
    return *count;
}

/* How many keys reach `least`, to all threads. */
__device__ static uint32_t count_keys(const struct search *s, uint64_t least, uint32_t *count)
{
    uint32_t own = 0;

    __syncthreads();
    if (threadIdx.x == 0)
        *count = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < s->n; i += FIND_THREADS)
        own += key_of(s, i) >= least;
    own = __reduce_add_sync(KVKI_FULL_WARP, own);
    if ((threadIdx.x & 31u) == 0)
        atomicAdd(count, own);
    __syncthreads();
    return *count;
}

/* A key that at least k and at most FIND_CANDS keys reach; keys that count differ, so there is one.
 */
__device__ static uint64_t exact_bound(const struct search *s, uint32_t *count)
{
    uint64_t least = 0;

    for (uint64_t bit = 1ull << 63; bit > 0; bit >>= 1) {
        uint32_t found = count_keys(s, least | bit, count);
        if (found < s->k)
            continue;
        least |= bit;
        if (found <= FIND_CANDS)
            break;
    }
    return least;
}

/* The keys that may be among the k best, into cands; gives their number. */
__device__ static uint32_t candidates(const struct search *s, uint64_t *cands, uint32_t *count)
{
    uint64_t least = (uint64_t)bound_of(s) << 32;
    uint32_t n = collect(s, least ? least : 1, cands, count);

    return n > FIND_CANDS ? collect(s, exact_bound(s, count), cands, count) : n;
}

/* How many of the candidates are better. */
__device__ static inline uint32_t rank_of(const uint64_t *cands, uint32_t n_cands, uint64_t key)
{
    uint32_t before = 0;

    for (uint32_t j = 0; j < n_cands; j++)
        before += cands[j] > key;
    return before;
}

/* The k best keys of a part of a list. */
__global__ void __launch_bounds__(FIND_THREADS) part_kernel(const struct chunk_params p)
{
    __shared__ uint64_t cands[FIND_CANDS];
    __shared__ uint32_t count;
    uint32_t seq = blockIdx.y, n = 0, each = 0, n_cands = 0;
    uint64_t *found = p.found + ((size_t)seq * p.n_parts + blockIdx.x) * p.a.k;
    struct search s = {p.scores + seq * p.stride, NULL, 0, 0, p.a.k};

    kvki_wait_for_previous();
    kvki_let_next_start();
    n = min(p.a.cands[seq].n_rows, p.a.rows_max);
    each = (n + p.n_parts - 1) / p.n_parts;
    s.first = min(blockIdx.x * each, n);
    s.n = min(each, n - s.first);
    n_cands = candidates(&s, cands, &count);
    for (uint32_t i = threadIdx.x; i < n_cands; i += FIND_THREADS) {
        uint32_t rank = rank_of(cands, n_cands, cands[i]);
        if (rank < p.a.k)
            found[rank] = cands[i];
    }
    for (uint32_t i = min(s.n, p.a.k) + threadIdx.x; i < p.a.k; i += FIND_THREADS)
        found[i] = 0;
}

/* The k best of a list, written. */
__global__ void __launch_bounds__(FIND_THREADS) find_kernel(const struct chunk_params p)
{
    __shared__ uint64_t cands[FIND_CANDS];
    __shared__ uint32_t count;
    uint32_t seq = blockIdx.x, n = 0, n_cands = 0;
    size_t at = (size_t)seq * p.a.k;
    struct search s = {p.scores + seq * p.stride, NULL, 0, 0, p.a.k};

    kvki_wait_for_previous();
    kvki_let_next_start();
    n = min(p.a.cands[seq].n_rows, p.a.rows_max);
    s.n = p.n_parts > 1 ? p.n_parts * p.a.k : n;
    s.keys = p.n_parts > 1 ? p.found + at * p.n_parts : NULL;
    n_cands = candidates(&s, cands, &count);
    for (uint32_t i = threadIdx.x; i < n_cands; i += FIND_THREADS) {
        uint32_t rank = rank_of(cands, n_cands, cands[i]), row = ~(uint32_t)cands[i];
        if (rank >= p.a.k)
            continue;
        p.a.picks[at + rank] = p.a.cands[seq].base + row;
        p.a.scores[at + rank] = __ldcg(s.scores + row);
    }
    for (uint32_t i = min(n, p.a.k) + threadIdx.x; i < p.a.k; i += FIND_THREADS) {
        p.a.picks[at + i] = UINT32_MAX;
        p.a.scores[at + i] = -INFINITY;
    }
    if (threadIdx.x == 0)
        p.a.n_picks[seq] = min(p.a.k, n);
}

extern "C" size_t kvk_cuda_chunk_select_workspace_bytes(uint32_t n_seqs, uint32_t rows_max)
{
    return n_seqs * (kvki_round_up(rows_max, 4) * sizeof(float) + FOUND_MAX * sizeof(uint64_t));
}

/* Parts that a list is searched in. */
static uint32_t parts_of(uint32_t rows_max, uint32_t k)
{
    return max(1u, min(min(rows_max / PART_ROWS / 2, PARTS_MAX), FOUND_MAX / k));
}

typedef void (*scan_fn)(const struct chunk_params p);

/* Lanes of a row: as many as have a piece each, at most a warp. */
template <typename T> static scan_fn scan_of(uint32_t n_pieces, uint32_t *rows_p)
{
    uint32_t lanes = n_pieces >= 32 ? 32 : n_pieces >= 16 ? 16 : n_pieces >= 8 ? 8 : 4;

    *rows_p = ROWS * 32u / lanes;
    return lanes == 32   ? scan_kernel<T, 32>
           : lanes == 16 ? scan_kernel<T, 16>
           : lanes == 8  ? scan_kernel<T, 8>
                         : scan_kernel<T, 4>;
}

static bool args_ok(const kvk_cuda_chunk_select_args *a)
{
    size_t row_bytes = (size_t)a->dims * (a->dtype == KVK_F32 ? 4u : 2u);

    return a->n_seqs <= KVK_CUDA_SEQS_MAX && a->dims > 0 && a->dims <= KVK_CUDA_LANDMARK_MAX &&
           (a->dtype == KVK_F32 || a->dtype == KVK_BF16) && row_bytes % 16 == 0 &&
           a->stride_bytes % 16 == 0 && a->stride_bytes >= row_bytes && a->k > 0 &&
           a->k <= KVK_CHUNKS_MAX && a->rows_max > 0 && a->q && kvki_aligned(a->q) && a->cands &&
           a->picks && a->scores && a->n_picks && a->workspace && kvki_aligned(a->workspace) &&
           a->workspace_bytes >= kvk_cuda_chunk_select_workspace_bytes(a->n_seqs, a->rows_max);
}

extern "C" kvc_status kvk_cuda_chunk_select(kvk_cuda *cuda, const kvk_cuda_chunk_select_args *args,
                                            kvk_stream *stream)
{
    struct chunk_params p = {*args, NULL, kvki_round_up(args->rows_max, 4), NULL, 1};
    uint32_t rows = 0, blocks = 0, share = 0;
    scan_fn scan = NULL;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    scan = args->dtype == KVK_F32 ? scan_of<float>(args->dims / 4, &rows)
                                  : scan_of<__nv_bfloat16>(args->dims / 8, &rows);
    /* One list: as many blocks as run at once. Of several, which may be of any lengths, more. */
    share = max(cuda->info.n_multiprocessors * SCAN_BLOCKS / args->n_seqs,
                cuda->info.n_multiprocessors);
    blocks = (args->rows_max + rows * SCAN_WARPS - 1) / (rows * SCAN_WARPS);
    p.found = (uint64_t *)args->workspace;
    p.scores = (float *)(p.found + (size_t)args->n_seqs * FOUND_MAX);
    p.n_parts = parts_of(args->rows_max, args->k);
    st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = kvki_cuda_launch_next(cuda, scan, dim3(min(blocks, share), args->n_seqs), SCAN_THREADS,
                                   args->dims * sizeof(float), stream, p);
    if (st == KVC_OK && p.n_parts > 1)
        st = kvki_cuda_launch_next(cuda, part_kernel, dim3(p.n_parts, args->n_seqs), FIND_THREADS,
                                   0, stream, p);
    return st != KVC_OK ? st
                        : kvki_cuda_launch_next(cuda, find_kernel, dim3(args->n_seqs), FIND_THREADS,
                                                0, stream, p);
}
