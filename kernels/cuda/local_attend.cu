/*
 * local_attend.cu: attention over a sliding window or inside chunks (kvk/cuda_layers.h). A thread
 * owns a query of one head, with its sums in registers; the block's keys and values go by in tiles
 * that all of its threads read. A query's keys are taken in ascending order, eight at a time from
 * the tile's start on, so its bits depend on where its first key lies in a tile and on nothing
 * else.
 */
#include "device.cuh"
#include "kvk/cuda_layers.h"

#define QUERIES 128u /* and threads */
#define KEYS    64u
#define AT_ONCE 8u

template <int kDim> struct rows {
    float k[KEYS][kDim], v[KEYS][kDim];
};

/* The keys that a query sees: [first, end). */
struct span {
    uint32_t first, end;
};

__device__ static inline struct span span_of(const kvk_cuda_local_attend_args *a, uint32_t i)
{
    uint32_t own = a->n_keys - a->n + i;

    if (a->window == 0)
        return {i / a->chunk * a->chunk, i / a->chunk * a->chunk + a->chunk};
    return {own + 1 > a->window ? own + 1 - a->window : 0, own + 1};
}

template <int kDim>
__device__ static inline void load_rows(const kvk_cuda_local_attend_args *a, uint32_t head,
                                        uint32_t first, struct rows<kDim> *t)
{
    for (uint32_t i = threadIdx.x; i < KEYS * (kDim / 4); i += QUERIES) {
        uint32_t row = i / (kDim / 4), at = i % (kDim / 4) * 4;
        size_t from = (size_t)(first + row) * a->kv_stride + head * kDim + at;
        bool there = first + row < a->n_keys;
        *(float4 *)&t->k[row][at] =
            there ? *(const float4 *)(a->k + from) : make_float4(0, 0, 0, 0);
        *(float4 *)&t->v[row][at] =
            there ? *(const float4 *)(a->v + from) : make_float4(0, 0, 0, 0);
    }
}

template <int kDim> struct state {
    float q[kDim], o[kDim], most, total;
};

template <int kDim>
__device__ static inline float dot(const float (&q)[kDim], const float (&k)[kDim])
{
    float s[4] = {};
#pragma unroll
    for (int t = 0; t < kDim; t += 4) {
        float4 x = *(const float4 *)&k[t];
        s[0] = fmaf(q[t], x.x, s[0]);
        s[1] = fmaf(q[t + 1], x.y, s[1]);
        s[2] = fmaf(q[t + 2], x.z, s[2]);
        s[3] = fmaf(q[t + 3], x.w, s[3]);
    }
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* Keys [at, at + AT_ONCE) of the tile, whose first is key `first` of the run. */
template <int kDim>
__device__ static inline void take(struct state<kDim> *s, const struct rows<kDim> *t, uint32_t at,
                                   uint32_t first, struct span seen, float slope)
{
    float x[AT_ONCE], most = s->most;

#pragma unroll
    for (uint32_t j = 0; j < AT_ONCE; j++) {
        uint32_t key = first + at + j;
        bool there = key >= seen.first && key < seen.end;
        x[j] = dot<kDim>(s->q, t->k[at + j]);
        x[j] = there ? fmaf(slope, (float)(int)(key - seen.first), x[j]) : -INFINITY;
        most = fmaxf(most, x[j]);
    }
    if (most == -INFINITY)
        return;
    if (most != s->most) {
        float keep = expf(s->most - most);
        s->total *= keep;
#pragma unroll
        for (int d = 0; d < kDim; d++)
            s->o[d] *= keep;
        s->most = most;
    }
#pragma unroll
    for (uint32_t j = 0; j < AT_ONCE; j++) {
        float w = expf(x[j] - most);
        s->total += w;
#pragma unroll
        for (int d = 0; d < kDim; d += 4) {
            float4 v = *(const float4 *)&t->v[at + j][d];
            s->o[d] = fmaf(w, v.x, s->o[d]);
            s->o[d + 1] = fmaf(w, v.y, s->o[d + 1]);
            s->o[d + 2] = fmaf(w, v.z, s->o[d + 2]);
            s->o[d + 3] = fmaf(w, v.w, s->o[d + 3]);
        }
    }
}

template <int kDim>
__global__ void __launch_bounds__(QUERIES) attend_kernel(const kvk_cuda_local_attend_args a)
{
    extern __shared__ float4 memory[];
    struct rows<kDim> *t = (struct rows<kDim> *)memory;
    uint32_t head = blockIdx.y, i = blockIdx.x * QUERIES + threadIdx.x;
    uint32_t last = min(blockIdx.x * QUERIES + QUERIES, a.n) - 1;
    uint32_t begin = span_of(&a, blockIdx.x * QUERIES).first, end = span_of(&a, last).end;
    struct span seen = span_of(&a, min(i, last));
    float slope = a.window ? a.slopes[head] : 0.0f;
    struct state<kDim> s = {
    };

    s.most = -INFINITY;
#pragma unroll
    for (int d = 0; d < kDim; d++)
        s.q[d] = i < a.n ? a.q[(size_t)i * a.q_stride + head * kDim + d] * a.scale : 0.0f;
    for (uint32_t first = begin / KEYS * KEYS; first < end; first += KEYS) {
        __syncthreads();
        load_rows<kDim>(&a, head, first, t);
        __syncthreads();
        for (uint32_t at = 0; at < KEYS; at += AT_ONCE) {
            if (first + at < seen.end && first + at + AT_ONCE > seen.first)
                take<kDim>(&s, t, at, first, seen, slope);
        }
    }
    if (i >= a.n)
        return;
#pragma unroll
    for (int d = 0; d < kDim; d++)
        a.out[((size_t)i * a.n_heads + head) * kDim + d] = s.o[d] / s.total;
}

static bool args_ok(const kvk_cuda_local_attend_args *a)
{
    uint64_t width = (uint64_t)a->n_heads * a->head_dim;
    bool shaped = a->window ? a->n_keys >= a->n && a->slopes
                            : a->chunk && a->n_keys == a->n && a->n % a->chunk == 0;

    return shaped && a->n_heads && a->n_heads <= UINT16_MAX && a->n_keys <= INT32_MAX &&
           a->q_stride % 4 == 0 && a->kv_stride % 4 == 0 && width <= a->q_stride &&
           width <= a->kv_stride && a->q && a->k && a->v && a->out && kvki_aligned(a->k) &&
           kvki_aligned(a->v) && a->scale == a->scale;
}

extern "C" kvc_status kvk_cuda_local_attend(kvk_cuda *cuda, const kvk_cuda_local_attend_args *args,
                                            kvk_stream *stream)
{
    dim3 grid(args->n / QUERIES + (args->n % QUERIES != 0), args->n_heads);
    kvc_status st = KVC_OK;

    if (args->n == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    if (args->head_dim != 32 && args->head_dim != 64)
        return KVC_UNSUPPORTED;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    if (args->head_dim == 32)
        attend_kernel<32>
            <<<grid, QUERIES, sizeof(struct rows<32>), kvki_cuda_stream(stream)>>>(*args);
    else
        attend_kernel<64>
            <<<grid, QUERIES, sizeof(struct rows<64>), kvki_cuda_stream(stream)>>>(*args);
    return kvki_cuda_launched();
}
