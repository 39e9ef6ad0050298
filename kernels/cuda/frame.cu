/*
 * frame.cu: how a decode step of ESA begins on the device: queries, windows and the new tokens of a
 * batch of sequences, in one kernel.
 *
 * A projection of a thousand inputs is half a megabyte of weights, more than one block can read in
 * time: a block takes 32 inputs, whose weights it asks for before the query has come over PCIe, and
 * the last block of a projection to finish adds up the sums of all, in order. A round trip to the
 * host takes 2 us: nothing is asked for there after something else has come, if it can be told
 * before where it lies. Blocks are small, and leave room for the next kernel's where those do not
 * want all registers. Lengths are in memory, so that a graph stays good while the sequences grow.
 * Angles in double, as in the table's rope. Counters are 0 between launches.
 */
#include "frame.cuh"

#define THREADS    FRAME_THREADS
#define SLICE      32u /* inputs of a block, which are 16 rotary pairs */
#define PAIRS      (SLICE / 2u)
#define INPUTS_MAX 8192u
#define CHUNK      8u /* bf16 elements that are copied at a time */

struct frame_params {
    kvk_cuda_frame_args a;
    float *parts;     /* [n_seqs, 2, n_slices, dims]: of the query, of the key */
    uint32_t *counts; /* [n_seqs, 2] blocks that are done */
    uint32_t n_slices, n_query, n_key, n_code, n_turn; /* blocks: of a projection; of each kind */
};

/* The first input of a pair of the kv heads; the second is half a head further. */
__device__ static inline uint32_t input_of(const kvk_cuda_frame_args *a, uint32_t pair)
{
    uint32_t half = a->head_dim / 2u;
    return pair / half * a->head_dim + pair % half;
}

/* The sum of the group's query heads at a pair: heads are added first, since rotation and
 * projection are linear. */
__device__ static float2 query_pair(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t pair)
{
    uint32_t half = a->head_dim / 2u, group = a->n_q_heads / a->n_kv_heads;
    size_t at = ((size_t)seq * a->n_q_heads + (size_t)(pair / half) * group) * a->head_dim;
    float2 sum = make_float2(0, 0);

    at += pair % half;
#pragma unroll 4
    for (uint32_t g = 0; g < group; g++, at += a->head_dim) {
        sum.x += load_one(a->q, at, a->dtype);
        sum.y += load_one(a->q, at + half, a->dtype);
    }
    return sum;
}

/* How a pair of the query is rotated before its projection. */
__device__ static float2 query_turn(const kvk_cuda_frame_args *a, uint32_t pair)
{
    double s = 0, c = 1;

    if (a->inv_freq && !a->score_raw)
        sincos((double)a->far_position * a->inv_freq[pair % (a->head_dim / 2u)], &s, &c);
    return make_float2((float)c, (float)s);
}

__device__ static float2 key_pair(const kvk_cuda_frame_args *a, const void *k, uint32_t pair)
{
    uint32_t at = input_of(a, pair);
    return make_float2(load_one(k, at, KVK_BF16), load_one(k, at + a->head_dim / 2u, KVK_BF16));
}

/* The thread's weights of a slice: asked for before the vector has come, over PCIe. */
__device__ static inline void load_weights(const kvk_cuda_frame_args *a, const float *proj,
                                           uint32_t s, float (&w)[SLICE])
{
    uint32_t d = threadIdx.x, n_pairs = a->n_kv_heads * a->head_dim / 2u;

#pragma unroll
    for (uint32_t j = 0; j < SLICE; j++) {
        uint32_t pair = s * PAIRS + j / 2u;
        size_t in = input_of(a, min(pair, n_pairs - 1)) + j % 2u * (a->head_dim / 2u);
        w[j] = d < a->dims && pair < n_pairs ? proj[in * a->dims + d] : 0.0f;
    }
}

/*
 * Slice s of projection `which` (0: the query, 1: the token's key) of a sequence; the first threads
 * bring a pair each. True in the block that comes last; *sum_p is then the thread's dimension of
 * the whole product.
 */
__device__ static bool project(const struct frame_params *p, uint32_t seq, uint32_t which,
                               uint32_t s, const float (&w)[SLICE], float2 two, float *sum_p)
{
    const kvk_cuda_frame_args *a = &p->a;
    uint32_t d = threadIdx.x;
    float *parts = p->parts + ((size_t)seq * 2u + which) * p->n_slices * a->dims;
    uint32_t *count = p->counts + seq * 2u + which;
    __shared__ float x[SLICE];
    __shared__ bool last;
    float sum = 0;

    if (d < PAIRS) {
        x[2 * d] = two.x;
        x[2 * d + 1] = two.y;
    }
    __syncthreads();
#pragma unroll
    for (uint32_t j = 0; j < SLICE; j++)
        sum = fmaf(x[j], w[j], sum);
    if (d < a->dims)
        parts[(size_t)s * a->dims + d] = sum;
    __threadfence();
    __syncthreads();
    if (d == 0) {
        last = atomicAdd(count, 1u) == p->n_slices - 1;
        if (last)
            *count = 0;
        __threadfence();
    }
    __syncthreads();
    if (!last)
        return false;
    sum = 0;
#pragma unroll 32
    for (uint32_t i = 0; i < p->n_slices; i++)
        sum += __ldcg(parts + (size_t)i * a->dims + min(d, a->dims - 1));
    *sum_p = sum;
    return true;
}

/* The index query, by whoever is last; angles by another warp, while the query is on its way. */
__device__ static void take_query(const struct frame_params *p, uint32_t seq, uint32_t s)
{
    __shared__ float2 turns[PAIRS];
    const kvk_cuda_frame_args *a = &p->a;
    uint32_t d = threadIdx.x, first = s * PAIRS, n_pairs = a->n_kv_heads * a->head_dim / 2u;
    float2 two = make_float2(0, 0);
    float w[SLICE], y = 0;

    load_weights(a, a->proj, s, w);
    if (d < PAIRS && first + d < n_pairs)
        two = query_pair(a, seq, first + d);
    if (d >= 32u && d < 32u + PAIRS && first + d - 32u < n_pairs)
        turns[d - 32u] = query_turn(a, first + d - 32u);
    __syncthreads();
    if (d < PAIRS && first + d < n_pairs)
        two = make_float2(two.x * turns[d].x - two.y * turns[d].y,
                          two.y * turns[d].x + two.x * turns[d].y);
    if (project(p, seq, 0, s, w, two, &y) && d < a->dims)
        a->q_index[(size_t)seq * a->dims + d] = y;
}

/* The slice's part of a row that is not coded, and of its copy; and the index row, by whoever is
 * last. */
__device__ static void take_token(const struct frame_params *p, uint32_t seq, uint32_t s)
{
    __shared__ kvk_cuda_token t;
    const kvk_cuda_frame_args *a = &p->a;
    uint32_t chunks = a->n_kv_heads * a->head_dim / CHUNK, d = threadIdx.x;
    uint32_t c = s * (SLICE / CHUNK) + d % (SLICE / CHUNK), is_v = d / (SLICE / CHUNK);
    bool copies = is_v < 2 && c < chunks && !p->n_code;
    const void *k = NULL, *v = NULL;
    uint4 piece = {};
    float2 two = make_float2(0, 0);
    float w[SLICE], y = 0;

    load_weights(a, a->key_proj, s, w);
    if (!find_token(a, seq, &t, &k, &v))
        return;
    if (copies)
        piece = ((const uint4 *)(is_v ? v : k))[c];
    if (d < PAIRS && s * PAIRS + d < a->n_kv_heads * a->head_dim / 2u)
        two = key_pair(a, k, s * PAIRS + d);
    if (a->kv)
        read_token(a, seq, &t);
    if (!t.row)
        return;
    if (copies)
        ((uint4 *)t.row)[is_v * chunks + c] = piece;
    if (copies && t.copy)
        ((uint4 *)t.copy)[is_v * chunks + c] = piece;
    if (project(p, seq, 1, s, w, two, &y))
        write_index_row(y, a->dims, 0, 1, (uint8_t *)t.index_row, t.bad);
}

/* Coded rows: a head of K or V a warp, out of shared memory. */
__device__ static void code_token(const struct frame_params *p, uint32_t seq, uint32_t block)
{
    __shared__ kvk_cuda_token t;
    __shared__ __nv_bfloat16 x[THREADS / 32u][ENCODE_DIM_MAX];
    const kvk_cuda_frame_args *a = &p->a;
    uint32_t warp = threadIdx.x / 32u, number = block * (blockDim.x / 32u) + warp;
    uint32_t head = number % a->n_kv_heads, is_v = number / a->n_kv_heads;
    size_t at = (size_t)is_v * a->n_kv_heads * (a->head_dim + 2u);
    const void *k = NULL, *v = NULL;

    if (!find_token(a, seq, &t, &k, &v))
        return;
    const __nv_bfloat16 *in = (const __nv_bfloat16 *)(is_v ? v : k) + (size_t)head * a->head_dim;
#pragma unroll
    for (uint32_t i = threadIdx.x & 31u; i < ENCODE_DIM_MAX; i += 32u) {
        if (i < a->head_dim && is_v < 2)
            x[warp][i] = in[i];
    }
    if (a->kv)
        read_token(a, seq, &t);
    __syncwarp();
    if (t.row && is_v < 2)
        encode_head(x[warp], a->n_kv_heads, a->head_dim, head, a->row_dtype, (uint8_t *)t.row + at,
                    t.copy ? (uint8_t *)t.copy + at : NULL, t.bad);
}

/* A pair of one query head: rotated for the far and the near rows, and compared. */
__device__ static void turn(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t pair,
                            uint32_t n_near)
{
    uint32_t half = a->head_dim / 2u, d = pair % half;
    size_t at = ((size_t)seq * a->n_q_heads + pair / half) * a->head_dim + d;

    if (pair >= a->n_q_heads * half)
        return;
    float2 raw = make_float2(load_one(a->q, at, a->dtype), load_one(a->q, at + half, a->dtype));
    float2 far = raw, near = raw;
    if (a->inv_freq) {
        far = rotated(raw, (double)a->far_position * a->inv_freq[d]);
        near = rotated(raw, (double)(n_near - 1u) * a->inv_freq[d]);
    }
    if (a->q_far)
        a->q_far[at] = far.x, a->q_far[at + half] = far.y;
    if (a->q_near)
        a->q_near[at] = near.x, a->q_near[at + half] = near.y;
    if (a->expected) {
        const uint16_t *x = (const uint16_t *)a->q, *y = (const uint16_t *)a->expected;
        if (x[at] != y[at] || x[at + half] != y[at + half])
            a->differs[seq] = 1;
    }
}

__device__ static void find_windows(const kvk_cuda_frame_args *a, uint32_t seq, uint32_t n,
                                    uint32_t n_near)
{
    if (a->n_near) {
        a->n_near[seq] = n_near;
        a->near_first[seq] = n - n_near;
    }
    if (a->cands) {
        a->cands[seq].n_rows = n - n_near > a->n_sink ? n - n_near - a->n_sink : 0;
        a->cands[seq].base = a->n_sink;
    }
}

__global__ void __launch_bounds__(THREADS, 4) frame_kernel(const struct frame_params p)
{
    const kvk_cuda_frame_args *a = &p.a;
    uint32_t seq = blockIdx.y, block = blockIdx.x;

    kvki_let_next_start();
    if (block < p.n_query)
        return take_query(&p, seq, block);
    block -= p.n_query;
    if (block < p.n_key)
        return take_token(&p, seq, block);
    block -= p.n_key;
    if (block < p.n_code)
        return code_token(&p, seq, block);
    block -= p.n_code;
    uint32_t n = a->n_tokens[seq], n_near = min(n, a->n_recent + 1u);
    turn(a, seq, block * blockDim.x + threadIdx.x, n_near);
    if (block == 0 && threadIdx.x == 0)
        find_windows(a, seq, n, n_near);
}

static uint32_t slices_of(uint32_t inputs)
{
    return (inputs + SLICE - 1) / SLICE;
}

extern "C" size_t kvk_cuda_frame_workspace_bytes(uint32_t n_seqs, uint32_t inputs, uint32_t dims)
{
    return (size_t)n_seqs * 2u * (sizeof(uint32_t) + slices_of(inputs) * dims * sizeof(float));
}

static bool token_ok(const kvk_cuda_token *t, uint32_t fine_dims)
{
    return t->k && t->v && t->index_row && (!fine_dims || t->fine_row) && kvki_aligned(t->k) &&
           kvki_aligned(t->v) && kvki_aligned(t->row) && kvki_aligned(t->copy);
}

static bool args_ok(const kvk_cuda_frame_args *a)
{
    size_t inputs = (size_t)a->n_kv_heads * a->head_dim;
    bool tokens = a->tokens || a->token.row;

    return a->n_seqs <= KVK_CUDA_SEQS_MAX && a->n_kv_heads && a->n_q_heads &&
           a->n_q_heads % a->n_kv_heads == 0 && a->head_dim && a->head_dim % 2 == 0 && inputs &&
           inputs <= INPUTS_MAX && (a->dtype == KVK_BF16 || a->dtype == KVK_F16) &&
           (!a->q || a->n_tokens) && (!a->n_near || a->near_first || a->per_head) &&
           ((!a->q_index && !tokens) || (a->dims && a->dims <= THREADS)) &&
           ((!a->q_index && !tokens) || a->per_head ||
            (a->workspace && kvki_aligned(a->workspace) &&
             a->workspace_bytes >=
                 kvk_cuda_frame_workspace_bytes(a->n_seqs, (uint32_t)inputs, a->dims))) &&
           (!a->q_index || (a->q && a->proj)) &&
           (!tokens || (a->key_proj && inputs % CHUNK == 0)) &&
           (!kvk_is_coded(a->row_dtype) || a->head_dim <= ENCODE_DIM_MAX) &&
           (a->tokens || !a->token.row || (a->n_seqs == 1 && token_ok(&a->token, a->fine_dims))) &&
           (!a->kv || (a->n_seqs == 1 && kvki_aligned(a->kv))) && (!a->expected || a->differs) &&
           (!a->fine_dims || a->per_head) && a->per_head <= 1;
}

extern "C" kvc_status kvk_cuda_frame(kvk_cuda *cuda, const kvk_cuda_frame_args *args,
                                     kvk_stream *stream)
{
    struct frame_params p = {};
    size_t inputs = (size_t)args->n_kv_heads * args->head_dim;
    uint32_t threads = args->dims <= THREADS / 2u ? THREADS / 2u : THREADS;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    if (args->per_head)
        return kvki_frame_heads(cuda, args, stream);
    p.a = *args;
    p.n_slices = slices_of((uint32_t)inputs);
    p.n_query = args->q_index ? p.n_slices : 0;
    p.n_key = args->tokens || args->token.row ? p.n_slices : 0;
    if (p.n_key && kvk_is_coded(args->row_dtype))
        p.n_code = (2u * args->n_kv_heads + threads / 32u - 1) / (threads / 32u);
    p.n_turn = args->q ? (args->n_q_heads * (args->head_dim / 2u) + threads - 1) / threads : 0;
    p.counts = (uint32_t *)args->workspace;
    p.parts = (float *)(p.counts + 2u * args->n_seqs);
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK || p.n_query + p.n_key + p.n_turn == 0)
        return st;
    /* beside blocks of the next kernel, whose shared memory a multiprocessor must be set up for */
    st = kvki_cuda_status(cudaFuncSetAttribute((const void *)frame_kernel,
                                               cudaFuncAttributePreferredSharedMemoryCarveout,
                                               cudaSharedmemCarveoutMaxShared));
    if (st != KVC_OK)
        return st;
    frame_kernel<<<dim3(p.n_query + p.n_key + p.n_code + p.n_turn, args->n_seqs), threads, 0,
                   kvki_cuda_stream(stream)>>>(p);
    return kvki_cuda_launched();
}
