/*
 * step.cu: what frames a decode step of one sequence on the device: its queries and windows, its
 * last merge, a token's row, and the rows that have to come another way.
 *
 * Each op is one small kernel; lengths are read in memory, so that a graph stays good while the
 * sequence grows. Angles in double, as in the table's rope.
 */
#include "rows.cuh"

#define THREADS      256u
#define FINISH_ROWS  (THREADS / 32u)
#define WIDE         1024u /* threads of a block that projects */
#define INPUTS_MAX   8192u
#define DIMS_MAX     256u
#define MISS_THREADS 1024u

__device__ static inline float load_one(const void *in, size_t i, kvk_dtype dtype)
{
    return dtype == KVK_BF16 ? kvki_bf16(((const uint16_t *)in)[i])
                             : __half2float(((const __half *)in)[i]);
}

__device__ static inline void store_one(void *out, size_t i, float x, kvk_dtype dtype)
{
    if (dtype == KVK_BF16)
        ((__nv_bfloat16 *)out)[i] = __float2bfloat16_rn(x);
    else
        ((__half *)out)[i] = __float2half_rn(x);
}

/* x and y, a pair of one head, rotated by a position's angle. */
__device__ static inline float2 rotated(float x, float y, double angle)
{
    double s = 0, c = 0;

    sincos(angle, &s, &c);
    return make_float2(x * (float)c - y * (float)s, y * (float)c + x * (float)s);
}

/*
 * x [inputs] of shared memory through proj [inputs, dims], by all WIDE threads of a block: each
 * takes a dimension and a share of the inputs, whose chains are added in order. Output d is thread
 * d's result. part [WIDE].
 */
__device__ static float project_wide(const float *x, uint32_t inputs, const float *proj,
                                     uint32_t dims, float *part)
{
    uint32_t lanes = dims <= DIMS_MAX / 2u ? DIMS_MAX / 2u : DIMS_MAX, n_parts = WIDE / lanes;
    uint32_t d = threadIdx.x % lanes, share = threadIdx.x / lanes;
    uint32_t each = (inputs + n_parts - 1) / n_parts, from = min(share * each, inputs);
    uint32_t to = min(from + each, inputs);
    float sum = 0;

    if (d < dims) {
#pragma unroll 16
        for (uint32_t i = from; i < to; i++)
            sum = fmaf(x[i], proj[(size_t)i * dims + d], sum);
    }
    part[threadIdx.x] = sum;
    __syncthreads();
    sum = part[d];
    for (uint32_t p = 1; p < n_parts; p++)
        sum += part[p * lanes + d];
    return sum;
}

/* The index query: heads of a group are added first, since rotation and projection are linear. */
__device__ static void frame_index(const kvk_cuda_frame_args *a, float *x, float *part)
{
    uint32_t half = a->head_dim / 2u, pairs = a->n_kv_heads * half;
    uint32_t group = a->n_q_heads / a->n_kv_heads;

    for (uint32_t i = threadIdx.x; i < pairs; i += WIDE) {
        uint32_t head = i / half, d = i % half;
        size_t at = (size_t)head * group * a->head_dim + d;
        float2 sum = make_float2(0, 0);
        for (uint32_t g = 0; g < group; g++) {
            sum.x += load_one(a->q, at + (size_t)g * a->head_dim, a->dtype);
            sum.y += load_one(a->q, at + (size_t)g * a->head_dim + half, a->dtype);
        }
        if (a->inv_freq && !a->score_raw)
            sum = rotated(sum.x, sum.y, (double)a->far_position * a->inv_freq[d]);
        x[head * a->head_dim + d] = sum.x;
        x[head * a->head_dim + d + half] = sum.y;
    }
    __syncthreads();
    float y = project_wide(x, a->n_kv_heads * a->head_dim, a->proj, a->dims, part);
    if (threadIdx.x < a->dims)
        a->q_index[threadIdx.x] = y;
}

/* One head: a thread takes the pair (d, d + head_dim / 2). */
__device__ static void frame_head(const kvk_cuda_frame_args *a, uint32_t head, uint32_t n_near)
{
    uint32_t half = a->head_dim / 2u, d = threadIdx.x;
    size_t at = (size_t)head * a->head_dim + d;

    if (d >= half)
        return;
    float2 raw = make_float2(load_one(a->q, at, a->dtype), load_one(a->q, at + half, a->dtype));
    float2 far = raw, near = raw;
    if (a->inv_freq) {
        far = rotated(raw.x, raw.y, (double)a->far_position * a->inv_freq[d]);
        near = rotated(raw.x, raw.y, (double)(n_near - 1u) * a->inv_freq[d]);
    }
    if (a->q_far)
        a->q_far[at] = far.x, a->q_far[at + half] = far.y;
    if (a->q_near)
        a->q_near[at] = near.x, a->q_near[at + half] = near.y;
    if (a->expected) {
        const uint16_t *x = (const uint16_t *)a->q, *y = (const uint16_t *)a->expected;
        if (x[at] != y[at] || x[at + half] != y[at + half])
            *a->differs_p = 1;
    }
}

/* Block 0 makes the index query, the next n_q_heads a head each, the others the near list. */
__global__ void __launch_bounds__(WIDE) frame_kernel(const kvk_cuda_frame_args a)
{
    extern __shared__ float x[];
    __shared__ float part[WIDE];
    uint32_t n = *a.n_tokens, n_near = min(n, a.n_recent + 1u), begin = n - n_near;

    if (blockIdx.x == 0) {
        if (a.q_index)
            frame_index(&a, x, part);
        return;
    }
    if (blockIdx.x <= a.n_q_heads) {
        frame_head(&a, blockIdx.x - 1u, n_near);
        return;
    }
    uint32_t first = (blockIdx.x - a.n_q_heads - 1u) * WIDE + threadIdx.x;
    if (a.near_list && first < n_near)
        a.near_list[first] = (int32_t)((begin + first) % a.ring_rows);
    if (first == 0) {
        if (a.n_near)
            *a.n_near = n_near;
        if (a.cands) {
            a.cands->index = (const char *)a.index + (size_t)a.n_sink * a.index_row_bytes;
            a.cands->n_rows = begin > a.n_sink ? begin - a.n_sink : 0;
            a.cands->base = a.n_sink;
        }
    }
}

extern "C" kvc_status kvk_cuda_frame(kvk_cuda *cuda, const kvk_cuda_frame_args *args,
                                     kvk_stream *stream)
{
    uint32_t list_blocks = (args->n_recent + WIDE) / WIDE;
    size_t inputs = (size_t)args->n_kv_heads * args->head_dim;
    kvc_status st = KVC_OK;

    if (!args->q || (args->dtype != KVK_BF16 && args->dtype != KVK_F16) || !args->n_kv_heads ||
        args->n_q_heads == 0 || args->n_q_heads % args->n_kv_heads || !args->head_dim ||
        args->head_dim % 2 || args->head_dim > 2 * WIDE || inputs > INPUTS_MAX || !args->n_tokens ||
        args->n_recent >= args->ring_rows || (args->cands && !args->index) ||
        (args->q_index && (!args->proj || !args->dims || args->dims > DIMS_MAX)) ||
        (args->expected && !args->differs_p))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    frame_kernel<<<1 + args->n_q_heads + list_blocks, WIDE, inputs * sizeof(float),
                   kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}

__global__ void __launch_bounds__(THREADS) finish_kernel(const kvk_cuda_finish_args a)
{
    uint32_t row = blockIdx.x * FINISH_ROWS + threadIdx.x / 32u, lane = threadIdx.x & 31u;
    double share_a = 1, share_b = 0;
    float lse = 0;

    kvki_wait_for_previous();
    if (row >= a.n)
        return;
    float lse_a = a.lse_a[row], lse_b = a.lse_b[row];
    lse = lse_a;
    if (lse_a == -INFINITY) {
        share_a = 0;
        share_b = lse_b == -INFINITY ? 0 : 1;
        lse = lse_b;
    } else if (lse_b != -INFINITY) {
        double top = lse_a > lse_b ? (double)lse_a : (double)lse_b;
        double x = exp((double)lse_a - top), y = exp((double)lse_b - top);
        share_a = x / (x + y);
        share_b = y / (x + y);
        lse = (float)(top + log(x + y));
    }
    for (uint32_t d = lane; d < a.dim; d += 32) {
        size_t at = (size_t)row * a.dim + d;
        double x = share_a != 0 ? (double)a.o_a[at] * share_a : 0;
        double y = share_b != 0 ? (double)a.o_b[at] * share_b : 0;
        store_one(a.out, at, (float)(x + y), a.dtype);
    }
    if (lane == 0 && a.lse)
        a.lse[row] = lse;
}

extern "C" kvc_status kvk_cuda_finish(kvk_cuda *cuda, const kvk_cuda_finish_args *args,
                                      kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (args->n == 0)
        return KVC_OK;
    if (!args->o_a || !args->lse_a || !args->o_b || !args->lse_b || !args->dim || !args->out ||
        (args->dtype != KVK_BF16 && args->dtype != KVK_F16))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(cuda, finish_kernel,
                                 dim3((args->n + FINISH_ROWS - 1) / FINISH_ROWS), THREADS, 0,
                                 stream, *args);
}

/* The greatest |y| over the block's threads; +Inf where one is not finite. All threads call. */
__device__ static float widest(float y, float *most)
{
    float own = isfinite(y) ? fabsf(y) : INFINITY;

    for (int step = 1; step < 32; step *= 2)
        own = fmaxf(own, __shfl_xor_sync(KVKI_FULL_WARP, own, step));
    if ((threadIdx.x & 31u) == 0)
        most[threadIdx.x / 32u] = own;
    __syncthreads();
    own = most[threadIdx.x & 31u];
    for (int step = 1; step < 32; step *= 2)
        own = fmaxf(own, __shfl_xor_sync(KVKI_FULL_WARP, own, step));
    return own;
}

__global__ void __launch_bounds__(WIDE) token_kernel(const kvk_cuda_token_args a)
{
    extern __shared__ float x[];
    __shared__ float part[WIDE], most[WIDE / 32u];
    uint32_t inputs = a.n_heads * a.head_dim, chunks = inputs / 8u, d = threadIdx.x;

    for (uint32_t i = threadIdx.x; i < 2 * chunks; i += WIDE) {
        const uint4 *from = (const uint4 *)(i < chunks ? a.k : a.v);
        uint4 row = from[i < chunks ? i : i - chunks];
        ((uint4 *)a.row)[i] = row;
        if (a.copy)
            ((uint4 *)a.copy)[i] = row;
        if (i < chunks) {
            const uint32_t two[4] = {row.x, row.y, row.z, row.w};
            for (uint32_t j = 0; j < 4; j++) {
                x[i * 8u + 2 * j] = kvki_bf16(two[j] & 0xffffu);
                x[i * 8u + 2 * j + 1] = kvki_bf16(two[j] >> 16);
            }
        }
    }
    __syncthreads();
    float y = project_wide(x, inputs, a.proj, a.dims, part);
    float all = widest(d < a.dims ? y : 0.0f, most);
    uint32_t bits = all > 0 && all < INFINITY ? kvki_scale_bits(all, 127.0) : 0;
    float scale = kvki_bf16(bits);
    uint8_t *row = (uint8_t *)a.index_row;
    if (d < a.dims)
        row[d] = (uint8_t)(int8_t)(scale > 0 ? rintf(__fdiv_rn(y, scale)) : 0.0f);
    if (d < 2)
        row[a.dims + d] = (uint8_t)(bits >> (8 * d));
}

extern "C" kvc_status kvk_cuda_token(kvk_cuda *cuda, const kvk_cuda_token_args *args,
                                     kvk_stream *stream)
{
    size_t inputs = (size_t)args->n_heads * args->head_dim;
    kvc_status st = KVC_OK;

    if (!args->k || !args->v || !args->row || !args->proj || !args->index_row || inputs == 0 ||
        inputs % 8 || inputs > INPUTS_MAX || args->dims == 0 || args->dims > DIMS_MAX ||
        !kvki_aligned(args->k) || !kvki_aligned(args->v) || !kvki_aligned(args->row) ||
        !kvki_aligned(args->copy))
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    token_kernel<<<1, WIDE, inputs * sizeof(float), kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}

/* Exclusive prefix sum over the block; *total_p the sum. All threads call. */
__device__ static uint32_t block_prefix(uint32_t *sums, uint32_t own, uint32_t *total_p)
{
    uint32_t lane = threadIdx.x & 31u, warp = threadIdx.x / 32u, upto = own, before = 0, total = 0;

    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(KVKI_FULL_WARP, upto, step);
        upto += lane >= step ? other : 0;
    }
    if (lane == 31)
        sums[warp] = upto;
    __syncthreads();
    for (uint32_t w = 0; w < MISS_THREADS / 32u; w++) {
        before += w < warp ? sums[w] : 0;
        total += sums[w];
    }
    *total_p = total;
    return before + upto - own;
}

__global__ void __launch_bounds__(MISS_THREADS) misses_kernel(const kvk_cuda_misses_args a)
{
    __shared__ uint32_t sums[MISS_THREADS / 32u];
    uint32_t n = 0, each = 0, from = 0, to = 0, own = 0, total = 0;
    const kvk_cuda_source source = *a.source;

    kvki_wait_for_previous();
    n = min(*a.n_list, a.stride);
    each = (n + MISS_THREADS - 1) / MISS_THREADS;
    from = min(threadIdx.x * each, n);
    to = min(from + each, n);
    for (uint32_t i = from; i < to; i++)
        own += a.fetch[i] != KVK_CUDA_RESIDENT && !kvki_source_row(&source, a.fetch[i], 16);
    own = block_prefix(sums, own, &total);
    for (uint32_t i = from; i < to; i++) {
        if (a.fetch[i] == KVK_CUDA_RESIDENT || kvki_source_row(&source, a.fetch[i], 16))
            continue;
        a.miss_pos[own] = a.fetch[i];
        a.fetch[i] = a.staged + own++;
    }
    if (threadIdx.x == 0)
        *a.n_far = total;
}

extern "C" kvc_status kvk_cuda_misses(kvk_cuda *cuda, const kvk_cuda_misses_args *args,
                                      kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (!args->fetch || !args->n_list || !args->stride || !args->source || !args->miss_pos ||
        !args->n_far || args->staged > KVK_CUDA_RESIDENT - args->stride)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_next(cuda, misses_kernel, dim3(1), MISS_THREADS, 0, stream, *args);
}

__global__ void __launch_bounds__(THREADS) forget_kernel(const kvk_cuda_forget_args a)
{
    uint32_t i = blockIdx.x * THREADS + threadIdx.x, n = min(*a.n_list, a.stride);
    const kvk_cuda_residency r = *a.res;

    if (i >= n || a.list[i] < 0 || a.fetch[i] == KVK_CUDA_RESIDENT)
        return;
    if (a.status && (a.fetch[i] < a.staged || a.status[a.fetch[i] - a.staged] == 0))
        return;
    uint32_t slot = (uint32_t)a.list[i], position = r.pos_of[slot];
    if (position < r.n_positions && r.slot_of[position] == (int32_t)slot)
        r.slot_of[position] = -1;
    r.pos_of[slot] = UINT32_MAX;
    r.used[slot] = 0;
    a.list[i] = -1;
}

extern "C" kvc_status kvk_cuda_forget(kvk_cuda *cuda, const kvk_cuda_forget_args *args,
                                      kvk_stream *stream)
{
    kvc_status st = KVC_OK;

    if (!args->list || !args->fetch || !args->n_list || !args->stride || !args->res)
        return KVC_INVALID;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    forget_kernel<<<(args->stride + THREADS - 1) / THREADS, THREADS, 0, kvki_cuda_stream(stream)>>>(
        *args);
    return kvki_cuda_launched();
}
