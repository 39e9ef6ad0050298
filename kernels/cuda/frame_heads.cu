/*
 * frame_heads.cu: how a decode step of TokenSelect begins on the device: whether the last picks are
 * kept, queries, windows and the new tokens of a batch of sequences, in one kernel.
 *
 * A block takes one query head, or one kv head of a new token; one block a sequence compares the
 * query with the one that last selected, finds the windows by that, and turns the query. Lengths
 * are read in memory, so that a graph stays good while the sequences grow.
 */
#include "attend.cuh"
#include "frame.cuh"
#include "keep.cuh"

#define THREADS FRAME_THREADS
#define DIM_MAX ENCODE_DIM_MAX
#define HELD    16u    /* weights of a thread */
#define AT_ONCE 8u     /* pairs of a query that a thread asks for */
#define Q_MAX   16384u /* elements of a query, in shared memory */

static_assert(THREADS == KEEP_THREADS, "a block compares queries");

/* The weights that a thread multiplies first; asked for before the vector has come, over PCIe. */
struct weights {
    float w[HELD];
    uint32_t from, to; /* its inputs */
};

/* Rows of threads share out the inputs of proj [head_dim, dims]; a thread has one dimension. */
__device__ static inline struct weights load_weights(const float *proj, uint32_t head_dim,
                                                     uint32_t dims)
{
    uint32_t columns = (dims + 31u) / 32u * 32u, rows = THREADS / columns;
    uint32_t d = threadIdx.x % columns, row = threadIdx.x / columns;
    uint32_t each = (head_dim + rows - 1) / rows;
    struct weights h;

    h.from = row * each;
    h.to = row < rows && d < dims ? min(h.from + each, head_dim) : 0;
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++)
        h.w[i] = h.from + i < h.to ? proj[(size_t)(h.from + i) * dims + d] : 0.0f;
    return h;
}

/* The products of x [head_dim], in shared memory, with proj: thread d has that of dimension d; the
 * rows' sums are added in order. All threads call. */
__device__ static float project_head(const float *x, const float *proj, const struct weights *h,
                                     uint32_t dims)
{
    __shared__ float parts[THREADS];
    uint32_t columns = (dims + 31u) / 32u * 32u, rows = THREADS / columns;
    uint32_t d = threadIdx.x % columns;
    float sum = 0;

#pragma unroll
    for (uint32_t i = 0; i < HELD; i++)
        sum = fmaf(h->from + i < h->to ? x[h->from + i] : 0.0f, h->w[i], sum);
    for (uint32_t i = h->from + HELD; i < h->to; i++)
        sum = fmaf(x[i], proj[(size_t)i * dims + d], sum);
    parts[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (uint32_t r = 0; r < rows && threadIdx.x < columns; r++)
        sum += parts[r * columns + threadIdx.x];
    return sum;
}

/* Columns of the matrices: what a finer index has, or the index. */
__device__ static inline uint32_t width_of(const kvk_cuda_frame_args *a)
{
    return a->fine_dims ? a->fine_dims : a->dims;
}

/* A query head as its index meets it, and a finer one. */
__device__ static void take_query(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t head)
{
    __shared__ float x[DIM_MAX];
    uint32_t half = a->head_dim / 2u, d = threadIdx.x,
             kv_head = head * a->n_kv_heads / a->n_q_heads;
    size_t at = (size_t)seq * a->n_q_heads + head;
    uint32_t width = width_of(a);
    const float *proj = a->proj + (size_t)kv_head * a->head_dim * width;
    const struct weights h = load_weights(proj, a->head_dim, width);

    if (d < half) {
        float2 two = make_float2(load_one(a->q, at * a->head_dim + d, a->dtype),
                                 load_one(a->q, at * a->head_dim + d + half, a->dtype));
        if (a->inv_freq && !a->score_raw)
            two = rotated(two, (double)a->n_recent * a->inv_freq[d]);
        x[d] = two.x;
        x[d + half] = two.y;
    }
    __syncthreads();
    float y = project_head(x, proj, &h, width);
    if (d < a->dims)
        a->q_index[at * a->dims + d] = y;
    if (d < a->fine_dims)
        a->q_fine[at * a->fine_dims + d] = y;
}

/* A kv head of K and V of a new token to shared memory, asked for with the token where it is said
 * before where they lie. False, in all threads: there is no token. All call. */
__device__ static bool bring_key(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t head,
                                 kvk_cuda_token *t, uint32_t (*kv)[DIM_MAX / 2u])
{
    uint32_t i = threadIdx.x, half = a->head_dim / 2u;
    const void *k = NULL, *v = NULL;

    if (!find_token(a, seq, t, &k, &v))
        return false;
    if (i < a->head_dim)
        kv[i / half][i % half] = ((const uint32_t *)(i < half ? k : v))[head * half + i % half];
    if (a->kv)
        read_token(a, seq, t);
    __syncthreads();
    return t->row != NULL;
}

/* A kv head of a new token: its part of the row, of the copy and of the index row. */
__device__ static void take_key(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t head,
                                bool coded)
{
    __shared__ kvk_cuda_token t;
    __shared__ uint32_t kv[2][DIM_MAX / 2u]; /* pairs of elements */
    __shared__ float x[DIM_MAX];
    uint32_t d = threadIdx.x, half = a->head_dim / 2u, warp = d / 32u, width = width_of(a);
    size_t inputs = (size_t)a->n_kv_heads * a->head_dim, at = (size_t)head * a->head_dim;

    const struct weights h = load_weights(a->key_proj + at * width, a->head_dim, width);
    if (!bring_key(a, seq, head, &t, kv))
        return;
    if (d < a->head_dim)
        x[d] = kvki_bf16(((const uint16_t *)kv[0])[d]);
    if (coded && warp < 2) {
        size_t slice = warp * a->n_kv_heads * (a->head_dim + 2u);
        encode_head((const __nv_bfloat16 *)kv[warp], a->n_kv_heads, a->head_dim, head, a->row_dtype,
                    (uint8_t *)t.row + slice, t.copy ? (uint8_t *)t.copy + slice : NULL, t.bad);
    }
    if (d < a->head_dim && !coded) {
        size_t to = (d < half ? 0 : inputs / 2u) + at / 2u + d % half;
        ((uint32_t *)t.row)[to] = kv[d / half][d % half];
        if (t.copy)
            ((uint32_t *)t.copy)[to] = kv[d / half][d % half];
    }
    __syncthreads();
    float y = project_head(x, a->key_proj + at * width, &h, width);
    write_index_row(y, a->dims, head, a->n_kv_heads, (uint8_t *)t.index_row, t.bad);
    if (a->fine_dims) {
        __syncthreads(); /* both use the same shared memory */
        write_index_row(y, a->fine_dims, head, a->n_kv_heads, (uint8_t *)t.fine_row, t.bad);
    }
}

/* The query [n_q_heads, head_dim] to shared memory, all of it asked for at once, and compared. */
__device__ static void load_query(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t *to)
{
    uint32_t n = a->n_q_heads * a->head_dim / 2u; /* pairs of elements */
    const uint32_t *q = (const uint32_t *)a->q + (size_t)seq * n;
    const uint32_t *e = (const uint32_t *)a->expected + (size_t)seq * n;
    bool differs = false;

    for (uint32_t from = threadIdx.x; from < n; from += AT_ONCE * THREADS) {
        uint32_t two[AT_ONCE], other[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            uint32_t at = min(from + i * THREADS, n - 1);
            two[i] = q[at];
            other[i] = a->expected ? e[at] : 0;
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            differs = differs || (a->expected && two[i] != other[i]);
            if (from + i * THREADS < n)
                to[from + i * THREADS] = two[i];
        }
    }
    if (differs)
        a->differs[seq] = 1;
    __syncthreads();
}

/* Where the near rows begin, and whether the last picks are kept; the same in all threads. */
__device__ static uint32_t decide(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t n,
                                  uint32_t kept, const uint32_t *q)
{
    uint32_t width = a->n_q_heads * a->head_dim, first = n - min(n, a->n_recent);
    float *last = a->last + (size_t)seq * width;
    auto query = [a, q](uint32_t i) { return load_one(q, i, a->dtype); };

    if (!a->last)
        return first;
    bool keep = keep_is_near(query, last, width, a->threshold) && kept != UINT32_MAX;
    if (!keep)
        keep_query(query, last, width);
    if (threadIdx.x == 0) {
        a->keep[seq] = keep;
        a->kept[seq] = keep;
    }
    return keep ? kept : first;
}

/* Pairs of all query heads, turned to the last of the near rows: all heads alike. */
__device__ static void turn(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t n_near,
                            const uint32_t *q)
{
    __shared__ float2 turns[DIM_MAX / 2u];
    uint32_t half = a->head_dim / 2u;
    float *out = a->q_near + (size_t)seq * a->n_q_heads * a->head_dim;

    if (a->inv_freq && threadIdx.x < half)
        turns[threadIdx.x] = attend_turn((int32_t)(n_near - 1u), a->inv_freq[threadIdx.x]);
    __syncthreads();
#pragma unroll 4
    for (uint32_t pair = threadIdx.x; pair < a->n_q_heads * half; pair += THREADS) {
        uint32_t at = pair / half * a->head_dim + pair % half;
        float2 x = make_float2(load_one(q, at, a->dtype), load_one(q, at + half, a->dtype));
        if (a->inv_freq) {
            float2 r = turns[pair % half];
            x = make_float2(x.x * r.x - x.y * r.y, x.y * r.x + x.x * r.y);
        }
        out[at] = x.x;
        out[at + half] = x.y;
    }
}

__device__ static void find_windows(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t *q)
{
    uint32_t n = a->n_tokens[seq], n_near = a->near_first ? 0 : a->n_near[seq];
    uint32_t kept = a->last ? a->kept_first[seq] : UINT32_MAX;

    load_query(a, seq, q);
    if (a->near_first) {
        uint32_t first = decide(a, seq, n, kept, q);
        n_near = n - first;
        if (threadIdx.x == 0) {
            a->near_first[seq] = first;
            a->n_near[seq] = n_near;
        }
        if (threadIdx.x == 0 && a->cands) {
            a->cands[seq].n_rows = first > a->n_sink ? first - a->n_sink : 0;
            a->cands[seq].base = a->n_sink;
        }
    }
    if (a->q_near)
        turn(a, seq, n_near, q);
}

struct heads_params {
    kvk_cuda_frame_args a;
    uint32_t n_turn, n_query; /* blocks; the others take keys */
    bool coded;               /* the tokens' rows are */
};

__global__ void __launch_bounds__(THREADS) frame_heads_kernel(const struct heads_params p)
{
    const kvk_cuda_frame_args *a = &p.a;
    extern __shared__ __align__(16) uint32_t query[];
    uint32_t seq = blockIdx.y, block = blockIdx.x;

    kvki_let_next_start();
    if (block < p.n_turn) {
        find_windows(a, seq, query);
        return;
    }
    block -= p.n_turn;
    if (block < p.n_query) {
        take_query(a, seq, block);
        return;
    }
    take_key(a, seq, block - p.n_query, p.coded);
}

static bool args_ok(const kvk_cuda_frame_args *a)
{
    return a->head_dim <= DIM_MAX && a->n_q_heads * a->head_dim <= Q_MAX && !a->q_far &&
           (!a->q || a->n_near) && (!a->cands || a->near_first) && (!a->expected || a->q_near) &&
           (!a->fine_dims ||
            (a->fine_dims >= a->dims && a->fine_dims <= THREADS && (!a->q_index || a->q_fine))) &&
           (!a->last ||
            (a->near_first && a->kept_first && a->keep && a->kept && a->threshold == a->threshold));
}

kvc_status kvki_frame_heads(kvk_cuda *cuda, const kvk_cuda_frame_args *args, kvk_stream *stream)
{
    bool tokens = args->tokens || args->token.row;
    struct heads_params p = {*args, args->q ? 1u : 0u, args->q_index ? args->n_q_heads : 0u,
                             kvk_is_coded(args->row_dtype) != 0};
    uint32_t blocks = p.n_turn + p.n_query + (tokens ? args->n_kv_heads : 0u);
    kvc_status st = KVC_OK;

    if (!args_ok(args))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK || blocks == 0)
        return st;
    frame_heads_kernel<<<dim3(blocks, args->n_seqs), THREADS,
                         args->q ? args->n_q_heads * args->head_dim * 2u : 0,
                         kvki_cuda_stream(stream)>>>(p);
    return kvki_cuda_launched();
}
