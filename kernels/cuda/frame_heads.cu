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

static_assert(THREADS == KEEP_THREADS, "a block compares queries");

/* The products of x [head_dim], in shared memory, with proj [head_dim, dims]: thread d has that of
 * dimension d. Rows of threads share out the inputs, and their sums are added in order. All threads
 * call. */
__device__ static float project_head(const float *x, const float *proj, uint32_t head_dim,
                                     uint32_t dims)
{
    __shared__ float parts[THREADS];
    uint32_t columns = (dims + 31u) / 32u * 32u, rows = THREADS / columns;
    uint32_t d = threadIdx.x % columns, row = threadIdx.x / columns;
    uint32_t each = (head_dim + rows - 1) / rows, from = row * each;
    uint32_t to = row < rows && d < dims ? min(from + each, head_dim) : 0;
    float sum = 0;

#pragma unroll 16
    for (uint32_t i = from; i < to; i++)
        sum = fmaf(x[i], proj[(size_t)i * dims + d], sum);
    parts[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (uint32_t r = 0; r < rows && threadIdx.x < columns; r++)
        sum += parts[r * columns + threadIdx.x];
    return sum;
}

/* A query head as its index meets it. */
__device__ static void take_query(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t head)
{
    __shared__ float x[DIM_MAX];
    uint32_t half = a->head_dim / 2u, d = threadIdx.x,
             kv_head = head * a->n_kv_heads / a->n_q_heads;
    size_t at = (size_t)seq * a->n_q_heads + head;

    if (d < half) {
        float2 two = make_float2(load_one(a->q, at * a->head_dim + d, a->dtype),
                                 load_one(a->q, at * a->head_dim + d + half, a->dtype));
        if (a->inv_freq && !a->score_raw)
            two = rotated(two, (double)a->n_recent * a->inv_freq[d]);
        x[d] = two.x;
        x[d + half] = two.y;
    }
    __syncthreads();
    float y =
        project_head(x, a->proj + (size_t)kv_head * a->head_dim * a->dims, a->head_dim, a->dims);
    if (d < a->dims)
        a->q_index[at * a->dims + d] = y;
}

/* A kv head of a new token: its part of the row, of the copy and of the index row. */
__device__ static void take_key(const kvk_cuda_frame_args *a, const kvk_cuda_token *t,
                                uint32_t head, bool coded)
{
    __shared__ float x[DIM_MAX];
    uint32_t d = threadIdx.x, half = a->head_dim / 2u, warp = d / 32u;
    size_t inputs = (size_t)a->n_kv_heads * a->head_dim, at = (size_t)head * a->head_dim;

    if (d < a->head_dim)
        x[d] = kvki_bf16(((const uint16_t *)t->k)[at + d]);
    if (coded && warp < 2) {
        size_t slice = warp * a->n_kv_heads * (a->head_dim + 2u);
        encode_head((const __nv_bfloat16 *)(warp ? t->v : t->k) + at, a->n_kv_heads, a->head_dim,
                    head, a->row_dtype, (uint8_t *)t->row + slice,
                    t->copy ? (uint8_t *)t->copy + slice : NULL, t->bad);
    }
    for (uint32_t i = d; i < a->head_dim && !coded; i += THREADS) {
        size_t to = (i < half ? 0 : inputs / 2u) + at / 2u + i % half; /* pairs of elements */
        uint32_t two = ((const uint32_t *)(i < half ? t->k : t->v))[at / 2u + i % half];
        ((uint32_t *)t->row)[to] = two;
        if (t->copy)
            ((uint32_t *)t->copy)[to] = two;
    }
    __syncthreads();
    float y = project_head(x, a->key_proj + at * a->dims, a->head_dim, a->dims);
    write_index_row(y, a->dims, head, a->n_kv_heads, (uint8_t *)t->index_row, t->bad);
}

/* Where the near rows begin, and whether the last picks are kept; the same in all threads. */
__device__ static uint32_t decide(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t n)
{
    uint32_t width = a->n_q_heads * a->head_dim, first = n - min(n, a->n_recent);
    float *last = a->last + (size_t)seq * width;
    auto query = [a, seq, width](uint32_t i) {
        return load_one(a->q, (size_t)seq * width + i, a->dtype);
    };

    if (!a->last)
        return first;
    uint32_t kept = a->kept_first[seq];
    bool keep = keep_is_near(query, last, width, a->threshold) && kept != UINT32_MAX;
    if (!keep)
        keep_query(query, last, width);
    if (threadIdx.x == 0) {
        a->keep[seq] = keep;
        a->kept[seq] = keep;
    }
    return keep ? kept : first;
}

/* Pairs of all query heads, turned to the last of the near rows, and compared. */
__device__ static void turn(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t n_near)
{
    uint32_t half = a->head_dim / 2u;
    bool differs = false;

    for (uint32_t pair = threadIdx.x; pair < a->n_q_heads * half; pair += THREADS) {
        size_t at = ((size_t)seq * a->n_q_heads + pair / half) * a->head_dim + pair % half;
        float2 x = make_float2(load_one(a->q, at, a->dtype), load_one(a->q, at + half, a->dtype));
        if (a->inv_freq) {
            float2 r = attend_turn((int32_t)(n_near - 1u), a->inv_freq[pair % half]);
            x = make_float2(x.x * r.x - x.y * r.y, x.y * r.x + x.x * r.y);
        }
        a->q_near[at] = x.x;
        a->q_near[at + half] = x.y;
        if (a->expected) {
            const uint16_t *q = (const uint16_t *)a->q, *e = (const uint16_t *)a->expected;
            differs = differs || q[at] != e[at] || q[at + half] != e[at + half];
        }
    }
    if (differs)
        a->differs[seq] = 1;
}

__device__ static void find_windows(const kvk_cuda_frame_args *a, uint32_t seq)
{
    uint32_t n = a->n_tokens[seq], n_near = 0;

    if (a->near_first) {
        uint32_t first = decide(a, seq, n);
        n_near = n - first;
        if (threadIdx.x == 0) {
            a->near_first[seq] = first;
            a->n_near[seq] = n_near;
        }
        if (threadIdx.x == 0 && a->cands) {
            a->cands[seq].n_rows = first > a->n_sink ? first - a->n_sink : 0;
            a->cands[seq].base = a->n_sink;
        }
    } else {
        n_near = a->n_near[seq];
    }
    if (a->q_near)
        turn(a, seq, n_near);
}

struct heads_params {
    kvk_cuda_frame_args a;
    uint32_t n_turn, n_query; /* blocks; the others take keys */
    bool coded;               /* the tokens' rows are */
};

__global__ void __launch_bounds__(THREADS) frame_heads_kernel(const struct heads_params p)
{
    const kvk_cuda_frame_args *a = &p.a;
    uint32_t seq = blockIdx.y, block = blockIdx.x;

    kvki_let_next_start();
    if (block < p.n_turn) {
        find_windows(a, seq);
        return;
    }
    block -= p.n_turn;
    if (block < p.n_query) {
        take_query(a, seq, block);
        return;
    }
    const kvk_cuda_token t = a->tokens ? a->tokens[seq] : a->token;
    if (t.row)
        take_key(a, &t, block - p.n_query, p.coded);
}

static bool args_ok(const kvk_cuda_frame_args *a)
{
    return a->head_dim <= DIM_MAX && !a->q_far && (!a->q || a->n_near) &&
           (!a->cands || a->near_first) && (!a->expected || a->q_near) &&
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
    frame_heads_kernel<<<dim3(blocks, args->n_seqs), THREADS, 0, kvki_cuda_stream(stream)>>>(p);
    return kvki_cuda_launched();
}
