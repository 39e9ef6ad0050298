/*
 * select_many.cu: the k best candidates of a chunk of queries together (ESA, 2502.14477 eq. 4 and
 * 8): every query's scores are shifted so that its best candidate stands at 0, then a candidate
 * keeps its best query.
 *
 * The dots are made twice, once for the maxima and once for the candidates, and never stored: with
 * many queries they are cheaper than the traffic. A block has all queries in its warps' registers,
 * 32 a warp (16 where a row is long), and goes over tiles of 64 index rows in shared memory. A
 * query is int16, as its upper byte, signed, and its lower one, unsigned: two int8 products on
 * tensor cores, exact in int32, so scores have the bits of kvk_score_index and the result those of
 * row_max and chunk_fold. Both maxima are taken by atomics on bits in the order of the numbers,
 * which no order of work changes. The k best: the exact search of topk_end.cuh.
 *
 * In a 16 x 8 product, lane 4 g + t has rows g and g + 8, columns 2 t and 2 t + 1.
 */
#include "kvk/cuda_pass.h"
#include "topk_end.cuh"

#define DIMS_MAX   256u
#define THREADS    512u
#define WARPS      (THREADS / 32u)
#define KEYS       64u /* rows of a tile */
#define STAGES     2u
#define WORST_BITS 0xff800000u /* -Inf; of numbers up to 0, the better one has the smaller bits */

struct many_params {
    kvk_cuda_select_many_args a;
    float *folded;     /* [rows_max] */
    uint8_t *bytes;    /* [2, n_padded, width]: upper bytes, lower bytes */
    float *q_scales;   /* [n_padded] */
    uint32_t *maxima;  /* [n_padded] keys of topk_key, 0: none yet */
    uint32_t n_padded; /* queries, a multiple of what a block has */
    uint32_t width;    /* dims, up to a multiple of 32 */
};

/* A product of 32 dims takes a step; a warp has kTiles times 8 queries. */
template <int kSteps> struct many_form {
    static constexpr int kTiles = kSteps <= 4 ? 4 : 2;
    static constexpr uint32_t kWidth = kSteps * 32u, kPitch = kWidth + 16u;
    static constexpr uint32_t kQueries = WARPS * kTiles * 8u;
    static constexpr uint32_t kStage = KEYS * (kPitch + 4u); /* the rows, then their scales */
};

/* A warp a query: its bytes and scale. All blocks clear what the maxima go to. */
__global__ void __launch_bounds__(THREADS) prepare_kernel(const struct many_params p)
{
    uint32_t query = blockIdx.x * WARPS + threadIdx.x / 32u, lane = threadIdx.x & 31u;
    const float *q = p.a.q + (size_t)query * p.a.dims;
    bool there = query < p.a.n_q;
    float most = 0;

    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < p.a.rows_max;
         i += gridDim.x * THREADS)
        p.folded[i] = -INFINITY;
    if (query >= p.n_padded)
        return;
    for (uint32_t i = lane; there && i < p.a.dims; i += 32)
        most = fmaxf(most, fabsf(q[i]));
    float scale = __fdiv_rn(kvki_lanes_max(most, 32), 32767.0f);
    for (uint32_t i = lane; i < p.width; i += 32) {
        int x = there && i < p.a.dims && scale > 0 ? kvki_quantized(q[i], scale) : 0;
        p.bytes[(size_t)query * p.width + i] = (uint8_t)(x >> 8);
        p.bytes[((size_t)p.n_padded + query) * p.width + i] = (uint8_t)x;
    }
    if (lane == 0) {
        p.q_scales[query] = scale;
        p.maxima[query] = 0;
    }
}

/* A warp's queries: their bytes as right operands, and for the lane's columns scales and shifts. */
template <int kSteps> struct many_queries {
    static constexpr int kTiles = many_form<kSteps>::kTiles;
    uint32_t upper[kTiles][kSteps][2], lower[kTiles][kSteps][2];
    float scale[kTiles][2], shift[kTiles][2]; /* shift: what is taken off, or the greatest yet */
};

template <int kSteps, bool kFold>
__device__ static inline void load_queries(const struct many_params *p, uint32_t first,
                                           struct many_queries<kSteps> *s)
{
    uint32_t lane = threadIdx.x & 31u, g = lane / 4u, t = lane % 4u;

#pragma unroll
    for (int i = 0; i < many_form<kSteps>::kTiles; i++) {
        const uint8_t *upper = p->bytes + (size_t)(first + i * 8u + g) * p->width + t * 4u;
        const uint8_t *lower = upper + (size_t)p->n_padded * p->width;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                s->upper[i][step][half] = *(const uint32_t *)(upper + step * 32 + half * 16);
                s->lower[i][step][half] = *(const uint32_t *)(lower + step * 32 + half * 16);
            }
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            uint32_t query = first + i * 8u + t * 2u + c;
            s->scale[i][c] = p->q_scales[query];
            s->shift[i][c] = -INFINITY;
            if (kFold) { /* a query that is not there is below all */
                uint32_t key = p->maxima[query];
                s->shift[i][c] = query >= p->a.n_q ? INFINITY : key ? topk_score(key) : -INFINITY;
            }
        }
    }
}

/* Asks for the tile's rows, by pieces of as many bytes as a row is a multiple of. */
template <int kSteps>
__device__ static inline void ask_keys(const uint8_t *index, uint32_t row_bytes, uint32_t n_rows,
                                       char *to)
{
    const uint32_t pitch = many_form<kSteps>::kPitch;
    uint32_t piece = row_bytes % 16 == 0 ? 16 : row_bytes % 4 == 0 ? 4 : 1;
    uint32_t pieces = row_bytes / piece;

    for (uint32_t i = threadIdx.x; i < n_rows * pieces; i += THREADS) {
        const uint8_t *from = index + (size_t)i * piece;
        char *at = to + i / pieces * pitch + i % pieces * piece;
        if (piece == 16)
            kvki_async_copy(at, from);
        else if (piece == 4)
            kvki_async_copy_4(at, from);
        else
            *at = (char)*from;
    }
    kvki_async_commit();
}

/* The scales of the tile's rows, behind them, which have come; 0 where there is no row. */
template <int kSteps>
__device__ static inline void find_scales(uint32_t dims, uint32_t n_rows, char *tile)
{
    float *scales = (float *)(tile + KEYS * many_form<kSteps>::kPitch);

    if (threadIdx.x >= KEYS)
        return;
    const uint8_t *at = (const uint8_t *)tile + threadIdx.x * many_form<kSteps>::kPitch + dims;
    scales[threadIdx.x] =
        threadIdx.x < n_rows ? kvki_bf16((uint32_t)at[0] | (uint32_t)at[1] << 8) : 0.0f;
}

__device__ static inline void multiply_signed(int (&c)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ static inline void multiply_unsigned(int (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Scores of 16 rows and the queries of product i: rows g and g + 8, columns 2 t and 2 t + 1. */
template <int kSteps>
__device__ static inline void find_scores(const struct many_queries<kSteps> *s, int i,
                                          const uint32_t (&rows)[kSteps][4],
                                          const float (&scale)[2], float (&x)[4])
{
    int upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};

#pragma unroll
    for (int step = 0; step < kSteps; step++) {
        multiply_signed(upper, rows[step], s->upper[i][step]);
        multiply_unsigned(lower, rows[step], s->lower[i][step]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        x[j] = __fmul_rn(__fmul_rn((float)(upper[j] * 256 + lower[j]), scale[j / 2]),
                         s->scale[i][j % 2]);
}

/* 16 rows of a tile, from `first` on: raises the queries' maxima, or the rows' folded scores, which
 * are the bits at `best` [KEYS]. */
template <int kSteps, bool kFold>
__device__ static inline void score_rows(struct many_queries<kSteps> *s, const char *tile,
                                         uint32_t first, uint32_t n_rows, uint32_t *best)
{
    const uint32_t pitch = many_form<kSteps>::kPitch;
    uint32_t lane = threadIdx.x & 31u, g = lane / 4u, t = lane % 4u, rows[kSteps][4];
    const char *at = tile + (first + g) * pitch + t * 4u;
    const float *scales = (const float *)(tile + KEYS * pitch) + first + g;
    const float scale[2] = {scales[0], scales[8]};
    const bool there[2] = {first + g < n_rows, first + g + 8u < n_rows};
    float top[2] = {-INFINITY, -INFINITY};

#pragma unroll
    for (int step = 0; step < kSteps; step++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            rows[step][j] = *(const uint32_t *)(at + j % 2 * 8 * pitch + step * 32 + j / 2 * 16);
    }
#pragma unroll
    for (int i = 0; i < many_form<kSteps>::kTiles; i++) {
        float x[4];
        find_scores<kSteps>(s, i, rows, scale, x);
#pragma unroll
        for (int j = 0; j < 4; j++) { /* fmaxf passes over NaN, as the table's ops do */
            if (kFold)
                top[j / 2] = fmaxf(top[j / 2], x[j] - s->shift[i][j % 2]);
            else if (there[j / 2])
                s->shift[i][j % 2] = fmaxf(s->shift[i][j % 2], x[j]);
        }
    }
#pragma unroll
    for (int r = 0; kFold && r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(KVKI_FULL_WARP, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(KVKI_FULL_WARP, top[r], 2));
        if (t == 0 && there[r])
            atomicMin(&best[first + g + r * 8u], __float_as_uint(top[r]));
    }
}

/* The warps' maxima to those of all blocks. */
template <int kSteps>
__device__ static inline void store_maxima(const struct many_params *p, uint32_t first,
                                           const struct many_queries<kSteps> *s)
{
    uint32_t lane = threadIdx.x & 31u;

#pragma unroll
    for (int i = 0; i < many_form<kSteps>::kTiles; i++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float most = s->shift[i][c];
            for (int step = 4; step < 32; step *= 2)
                most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, step));
            if (lane < 4)
                atomicMax(p->maxima + first + i * 8u + lane * 2u + c, topk_key(most));
        }
    }
}

template <int kSteps, bool kFold>
__global__ void __launch_bounds__(THREADS, 1) many_kernel(const struct many_params p)
{
    extern __shared__ __align__(16) char stages[];
    __shared__ uint32_t best[KEYS];
    const uint32_t stage_bytes = many_form<kSteps>::kStage;
    const kvk_cuda_candidates *cands = p.a.cands;
    uint32_t first = blockIdx.y * many_form<kSteps>::kQueries +
                     threadIdx.x / 32u * many_form<kSteps>::kTiles * 8u;
    uint32_t n = min(cands->n_rows, p.a.rows_max), row_bytes = p.a.dims + 2u;
    uint32_t n_tiles = (n + KEYS - 1) / KEYS, turn = 0;
    struct many_queries<kSteps> s;

    load_queries<kSteps, kFold>(&p, first, &s);
    if (threadIdx.x < KEYS)
        best[threadIdx.x] = WORST_BITS;
    if (blockIdx.x < n_tiles)
        ask_keys<kSteps>((const uint8_t *)cands->index + (size_t)blockIdx.x * KEYS * row_bytes,
                         row_bytes, min(n - blockIdx.x * KEYS, KEYS), stages);
    for (uint32_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x, turn++) {
        char *here = stages + turn % STAGES * stage_bytes;
        uint32_t n_rows = min(n - tile * KEYS, KEYS), next = tile + gridDim.x;
        kvki_async_wait();
        __syncthreads(); /* the tile is there, and the one before has been read */
        find_scales<kSteps>(p.a.dims, n_rows, here);
        if (next < n_tiles)
            ask_keys<kSteps>((const uint8_t *)cands->index + (size_t)next * KEYS * row_bytes,
                             row_bytes, min(n - next * KEYS, KEYS),
                             stages + (turn + 1) % STAGES * stage_bytes);
        __syncthreads();
#pragma unroll 1
        for (uint32_t row = 0; row < KEYS; row += 16)
            score_rows<kSteps, kFold>(&s, here, row, n_rows, best);
        if (!kFold)
            continue;
        __syncthreads();
        if (threadIdx.x < n_rows) {
            atomicMin((uint32_t *)p.folded + tile * KEYS + threadIdx.x, best[threadIdx.x]);
            best[threadIdx.x] = WORST_BITS;
        }
    }
    if (!kFold)
        store_maxima<kSteps>(&p, first, &s);
}

__global__ void __launch_bounds__(TOPK_THREADS, 2) rank_kernel(const struct topk_job job)
{
    __shared__ struct topk_block block;
    uint32_t arrivals = 0;

    topk_layout(&job, &block, 32);
    topk_conclude(&job, &block, &arrivals, [] {});
}

typedef void (*many_fn)(const struct many_params p);

/* What fits a width. */
struct many_kernels {
    many_fn maxima, fold;
    uint32_t queries;
    size_t smem_bytes;
};

template <int kSteps> static struct many_kernels kernels_for(void)
{
    return {many_kernel<kSteps, false>, many_kernel<kSteps, true>, many_form<kSteps>::kQueries,
            STAGES * (size_t)many_form<kSteps>::kStage};
}

static struct many_kernels kernels_of(uint32_t dims)
{
    return dims <= 32    ? kernels_for<1>()
           : dims <= 64  ? kernels_for<2>()
           : dims <= 128 ? kernels_for<4>()
                         : kernels_for<8>();
}

static uint32_t width_of(uint32_t dims)
{
    return dims <= 32 ? 32 : dims <= 64 ? 64 : dims <= 128 ? 128 : 256;
}

static bool shape_ok(const kvk_cuda_select_many_args *a)
{
    return a->n_q > 0 && a->n_q <= KVK_CUDA_CHUNK_MAX && a->dims > 0 && a->dims <= DIMS_MAX &&
           a->rows_max > 0 && a->rows_max <= UINT32_MAX - KEYS;
}

/* Cuts the workspace; the bytes that it needs. */
static size_t cut(const kvk_cuda_select_many_args *a, char *base, struct many_params *p,
                  struct topk_space *space)
{
    size_t at = topk_cut(base, 1, a->rows_max, space);
    uint32_t queries = kernels_of(a->dims).queries;

    p->width = width_of(a->dims);
    p->n_padded = (a->n_q + queries - 1) / queries * queries;
    p->folded = space->scores;
    p->q_scales = (float *)(base + at);
    at += p->n_padded * sizeof(float);
    p->maxima = (uint32_t *)(base + at);
    at += p->n_padded * sizeof(uint32_t);
    p->bytes = (uint8_t *)(base + at);
    return at + 2 * (size_t)p->n_padded * p->width;
}

extern "C" size_t kvk_cuda_select_many_workspace_bytes(const kvk_cuda_select_many_args *args)
{
    struct many_params p;
    struct topk_space space;

    return shape_ok(args) ? cut(args, NULL, &p, &space) : 0;
}

static bool args_ok(const kvk_cuda_select_many_args *a)
{
    return shape_ok(a) && a->k > 0 && a->k <= KVK_CUDA_K_MAX && a->q && a->cands && a->picks &&
           a->n_picks && a->workspace && kvki_aligned(a->workspace) &&
           a->workspace_bytes >= kvk_cuda_select_many_workspace_bytes(a);
}

/* The dots, as often as it takes. */
static kvc_status fold_scores(kvk_cuda *cuda, const struct many_params &p, kvk_stream *stream)
{
    struct many_kernels k = kernels_of(p.a.dims);
    many_fn fns[2] = {k.maxima, k.fold};
    uint32_t groups = p.n_padded / k.queries, tiles = (p.a.rows_max + KEYS - 1) / KEYS;
    uint32_t blocks = cuda->info.n_multiprocessors;

    prepare_kernel<<<(p.n_padded + WARPS - 1) / WARPS, THREADS, 0, kvki_cuda_stream(stream)>>>(p);
    kvc_status st = kvki_cuda_launched();
    for (int i = 0; st == KVC_OK && i < 2; i++) {
        st = kvki_cuda_status(cudaFuncSetAttribute(
            (const void *)fns[i], cudaFuncAttributeMaxDynamicSharedMemorySize, (int)k.smem_bytes));
        if (st != KVC_OK)
            return st;
        fns[i]<<<dim3(tiles < blocks ? tiles : blocks, groups), THREADS, k.smem_bytes,
                 kvki_cuda_stream(stream)>>>(p);
        st = kvki_cuda_launched();
    }
    return st;
}

extern "C" kvc_status kvk_cuda_select_many(kvk_cuda *cuda, const kvk_cuda_select_many_args *args,
                                           kvk_stream *stream)
{
    struct many_params p = {};
    struct topk_job job = {1,           args->k,      args->eps,     args->rows_max, args->cands,
                           args->picks, args->scores, args->n_picks, NULL,           {}};
    void *params[] = {&job};
    const void *rank = (const void *)rank_kernel;
    int blocks = 0;

    if (!args_ok(args))
        return KVC_INVALID;
    p.a = *args;
    (void)cut(args, (char *)args->workspace, &p, &job.space);
    kvc_status st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = fold_scores(cuda, p, stream);
    if (st == KVC_OK)
        st = kvki_cuda_resident_grid(cuda, rank, TOPK_THREADS, 0, 1 << 20, &blocks);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_status(cudaLaunchCooperativeKernel(
        rank, dim3((unsigned)blocks), dim3(TOPK_THREADS), params, 0, kvki_cuda_stream(stream)));
}
