/*
 * chunk_attend.cu: attention of up to 64 queries and more over each chosen chunk alone.
 *
 * A block takes one kv head of one chunk and a tile of its queries (a query head of one query is a
 * row of the tile): keys and values of the chunk come into shared memory once, logits and values
 * are products of small register tiles, all in f32. Each chunk's result depends on that chunk and
 * the query alone; who was resident, and which other chunks were chosen, does not show in the bits.
 * Tiles of 16 rows serve a decode step, of 64 a prefill chunk.
 */
#include "attend.cuh"

#define THREADS 256u
#define WARPS   (THREADS / 32u)
#define KEYS    KVK_CUDA_CHUNK_ROWS
#define SIDE    16u /* threads along each side of a tile */
#define PAD     16u /* bytes between rows in shared memory: lanes do not meet in a bank */

struct chunk_attend_params {
    kvk_cuda_chunk_attend_args a;
    uint32_t group, n_tiles; /* query heads of a kv head; tiles of queries */
};

/* Eight elements as floats. */
template <typename T> __device__ static inline void load8(const char *at, float (&x)[8]);
template <> __device__ inline void load8<float>(const char *at, float (&x)[8])
{
    float4 a = *(const float4 *)at, b = *(const float4 *)(at + 16);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
template <> __device__ inline void load8<__nv_bfloat16>(const char *at, float (&x)[8])
{
    const uint4 d = *(const uint4 *)at;
    const uint32_t words[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = kvki_bf16(words[i]);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
template <> __device__ inline void load8<__half>(const char *at, float (&x)[8])
{
    const uint4 d = *(const uint4 *)at;
    const uint32_t words[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 two = __half22float2(*(const __half2 *)&words[i]);
        x[2 * i] = two.x;
        x[2 * i + 1] = two.y;
    }
}

/* Four elements as floats. */
template <typename T> __device__ static inline float4 load4(const char *at);
template <> __device__ inline float4 load4<float>(const char *at)
{
    return *(const float4 *)at;
}
template <> __device__ inline float4 load4<__nv_bfloat16>(const char *at)
{
    uint2 d = *(const uint2 *)at;
    return make_float4(kvki_bf16(d.x), __uint_as_float(d.x & 0xffff0000u), kvki_bf16(d.y),
                       __uint_as_float(d.y & 0xffff0000u));
}
template <> __device__ inline float4 load4<__half>(const char *at)
{
    uint2 d = *(const uint2 *)at;
    float2 a = __half22float2(*(const __half2 *)&d.x), b = __half22float2(*(const __half2 *)&d.y);
    return make_float4(a.x, a.y, b.x, b.y);
}

/* Shared memory of a block: keys, values, queries [rows, dim], weights [rows, KEYS], and of each
 * row the maximum and the total. kRows: rows a thread has; the tile has SIDE times as many. */
template <typename T, int kDim, int kRows> struct tile {
    static constexpr uint32_t kStride = kDim * sizeof(T) + PAD;
    static constexpr uint32_t kQueries = SIDE * kRows;
    static constexpr uint32_t kQStride = kDim + 4u;
    static constexpr uint32_t kWStride = KEYS + 4u;
    char keys[KEYS * kStride];
    char values[KEYS * kStride];
    float q[kQueries * kQStride];
    float weights[kQueries * kWStride];
    float most[kQueries], total[kQueries];
};

/* Asks for keys and values; rows past n_rows become zeros. */
template <typename T, int kDim, int kRows>
__device__ static void load_chunk(const kvk_cuda_chunk_attend_args *a, const char *chunk,
                                  uint32_t head, struct tile<T, kDim, kRows> *t)
{
    constexpr uint32_t kPieces = kDim * sizeof(T) / 16u;
    const char *keys = chunk + a->k_off_bytes + (size_t)head * kDim * sizeof(T);
    const char *values = chunk + a->v_off_bytes + (size_t)head * kDim * sizeof(T);

    for (uint32_t i = threadIdx.x; i < KEYS * kPieces; i += THREADS) {
        uint32_t row = i / kPieces, at = i % kPieces * 16u;
        uint32_t to = row * tile<T, kDim, kRows>::kStride + at;
        if (row < a->n_rows) {
            kvki_async_copy(t->keys + to, keys + (size_t)row * a->row_bytes + at);
            kvki_async_copy(t->values + to, values + (size_t)row * a->row_bytes + at);
        } else {
            *(uint4 *)(t->keys + to) = make_uint4(0, 0, 0, 0);
            *(uint4 *)(t->values + to) = make_uint4(0, 0, 0, 0);
        }
    }
}

/* Where row r of the tile (a query and one of the group's heads) lies in q, o and lse, in rows;
 * SIZE_MAX past the last. */
__device__ static inline size_t row_at(const struct chunk_attend_params *p, size_t outer,
                                       uint32_t kv_head, uint32_t r)
{
    uint32_t query = r / p->group;

    if (query >= p->a.n_q)
        return SIZE_MAX;
    return (outer * p->a.n_q + query) * p->a.n_q_heads + kv_head * p->group + r % p->group;
}

template <typename T, int kDim, int kRows>
__device__ static void load_queries(const struct chunk_attend_params *p, uint32_t seq,
                                    uint32_t kv_head, uint32_t first,
                                    struct tile<T, kDim, kRows> *t)
{
    using Tile = tile<T, kDim, kRows>;

    for (uint32_t i = threadIdx.x; i < Tile::kQueries * kDim / 4u; i += THREADS) {
        uint32_t row = i / (kDim / 4u), d = i % (kDim / 4u) * 4u;
        size_t at = row_at(p, seq, kv_head, first + row);
        *(float4 *)(t->q + row * Tile::kQStride + d) =
            at == SIZE_MAX ? make_float4(0, 0, 0, 0) : *(const float4 *)(p->a.q + at * kDim + d);
    }
}

/* Logits of the tile, a thread four keys of each of its rows, into weights. */
template <typename T, int kDim, int kRows>
__device__ static void find_logits(float scale, struct tile<T, kDim, kRows> *t)
{
    using Tile = tile<T, kDim, kRows>;
    uint32_t key = threadIdx.x % SIDE, row = threadIdx.x / SIDE;
    float x[kRows][4] = {};

#pragma unroll 2
    for (uint32_t d = 0; d < kDim; d += 8) {
        float k[4][8];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            load8<T>(t->keys + (key + i * SIDE) * Tile::kStride + d * sizeof(T), k[i]);
#pragma unroll
        for (uint32_t r = 0; r < kRows; r++) {
            float q[8];
            load8<float>((const char *)(t->q + (row + r * SIDE) * Tile::kQStride + d), q);
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
#pragma unroll
                for (uint32_t e = 0; e < 8; e++)
                    x[r][i] = fmaf(q[e], k[i][e], x[r][i]);
            }
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < kRows; r++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            t->weights[(row + r * SIDE) * Tile::kWStride + key + i * SIDE] = x[r][i] * scale;
    }
}

/* Logits to weights, a warp a row; keys past n_keys weigh nothing. */
template <typename T, int kDim, int kRows>
__device__ static void find_weights(uint32_t n_keys, struct tile<T, kDim, kRows> *t)
{
    using Tile = tile<T, kDim, kRows>;
    uint32_t lane = threadIdx.x & 31u;

    for (uint32_t row = threadIdx.x / 32u; row < Tile::kQueries; row += WARPS) {
        float *at = t->weights + row * Tile::kWStride;
        float x = lane < n_keys ? at[lane] : -INFINITY;
        float y = lane + 32u < n_keys ? at[lane + 32u] : -INFINITY;
        float most = fmaxf(fmaxf(x, y), -INFINITY), total = 0;
        for (uint32_t step = 16; step > 0; step /= 2)
            most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, (int)step));
        x = attend_weight(x, most);
        y = attend_weight(y, most);
        total = x + y;
        for (uint32_t step = 16; step > 0; step /= 2)
            total += __shfl_xor_sync(KVKI_FULL_WARP, total, (int)step);
        at[lane] = x;
        at[lane + 32u] = y;
        if (lane == 0) {
            t->most[row] = most;
            t->total[row] = total;
        }
    }
}

/* The weighted values of the tile, four neighbouring dimensions of each row a thread. */
template <typename T, int kDim, int kRows>
__device__ static void write_values(const struct chunk_attend_params *p, size_t entry,
                                    uint32_t kv_head, uint32_t first,
                                    const struct tile<T, kDim, kRows> *t)
{
    using Tile = tile<T, kDim, kRows>;
    uint32_t row = threadIdx.x / SIDE;

    for (uint32_t d = threadIdx.x % SIDE * 4u; d < kDim; d += SIDE * 4u) {
        float4 o[kRows] = {};
#pragma unroll 4
        for (uint32_t j = 0; j < p->a.n_rows; j++) {
            float4 v = load4<T>(t->values + j * Tile::kStride + d * sizeof(T));
#pragma unroll
            for (uint32_t r = 0; r < kRows; r++) {
                float w = t->weights[(row + r * SIDE) * Tile::kWStride + j];
                o[r].x = fmaf(w, v.x, o[r].x);
                o[r].y = fmaf(w, v.y, o[r].y);
                o[r].z = fmaf(w, v.z, o[r].z);
                o[r].w = fmaf(w, v.w, o[r].w);
            }
        }
#pragma unroll
        for (uint32_t r = 0; r < kRows; r++) {
            size_t at = row_at(p, entry, kv_head, first + row + r * SIDE);
            float z = t->total[row + r * SIDE];
            z = z == 0.0f ? 0.0f : 1.0f / z;
            if (at != SIZE_MAX)
                *(float4 *)(p->a.o + at * kDim + d) =
                    make_float4(o[r].x * z, o[r].y * z, o[r].z * z, o[r].w * z);
        }
    }
}

/* lse of the tile's rows; of a chunk that is not there, all are empty. */
template <int kQueries>
__device__ static void write_lse(const struct chunk_attend_params *p, size_t entry,
                                 uint32_t kv_head, uint32_t first, const float *most,
                                 const float *total)
{
    for (uint32_t r = threadIdx.x; r < kQueries; r += THREADS) {
        size_t at = row_at(p, entry, kv_head, first + r);
        float lse = -INFINITY;
        if (total)
            lse = total[r] == 0.0f ? -INFINITY : most[r] + logf(total[r]);
        if (at != SIZE_MAX)
            p->a.lse[at] = lse;
    }
}

template <typename T, int kDim, int kRows>
__global__ void __launch_bounds__(THREADS) chunk_attend_kernel(const struct chunk_attend_params p)
{
    extern __shared__ __align__(16) char shared[];
    using Tile = tile<T, kDim, kRows>;
    Tile *t = (Tile *)shared;
    const kvk_cuda_chunk_attend_args *a = &p.a;
    uint32_t seq = blockIdx.z / p.n_tiles, first = blockIdx.z % p.n_tiles * Tile::kQueries;
    uint32_t kv_head = blockIdx.y, head = kv_head;
    size_t entry = (size_t)seq * a->k + blockIdx.x;
    int32_t slot = -1;

    kvki_wait_for_previous();
    kvki_let_next_start();
    slot = blockIdx.x < a->n_list[seq] ? a->list[entry] : -1;
    if (slot < 0) {
        write_lse<Tile::kQueries>(&p, entry, kv_head, first, NULL, NULL);
        return;
    }
    head += a->first_head ? a->first_head[seq] : 0;
    load_chunk(a, (const char *)a->res[seq].slots + (size_t)slot * a->chunk_bytes, head, t);
    load_queries(&p, seq, kv_head, first, t);
    kvki_async_wait();
    __syncthreads();
    find_logits(a->scale, t);
    __syncthreads();
    find_weights(a->n_rows, t);
    __syncthreads();
    write_values(&p, entry, kv_head, first, t);
    write_lse<Tile::kQueries>(&p, entry, kv_head, first, t->most, t->total);
}

typedef void (*chunk_attend_fn)(const struct chunk_attend_params p);

/* A kernel, the shared memory it needs and the rows of its tile. */
struct choice {
    chunk_attend_fn kernel;
    size_t smem_bytes;
    uint32_t queries;
};

template <typename T, int kDim> static struct choice choose(uint32_t n_rows)
{
    if (n_rows <= SIDE)
        return {chunk_attend_kernel<T, kDim, 1>, sizeof(struct tile<T, kDim, 1>), SIDE};
    return {chunk_attend_kernel<T, kDim, 4>, sizeof(struct tile<T, kDim, 4>), 4 * SIDE};
}

template <typename T> static struct choice choice_of(uint32_t head_dim, uint32_t n_rows)
{
    return head_dim == 128  ? choose<T, 128>(n_rows)
           : head_dim == 64 ? choose<T, 64>(n_rows)
           : head_dim == 32 ? choose<T, 32>(n_rows)
                            : choice{NULL, 0, 1};
}

static bool args_ok(const kvk_cuda_chunk_attend_args *a, size_t elem_bytes)
{
    size_t width = (size_t)a->n_kv_heads * a->head_dim * elem_bytes;

    return a->n_seqs <= KVK_CUDA_SEQS_MAX && a->k <= KVK_CHUNKS_MAX && a->n_kv_heads &&
           a->n_q_heads && a->n_q_heads % a->n_kv_heads == 0 && a->n_rows && a->row_bytes &&
           a->row_bytes % 16 == 0 && a->chunk_bytes % 16 == 0 && a->k_off_bytes % 16 == 0 &&
           a->v_off_bytes % 16 == 0 && a->k_off_bytes + width <= a->row_bytes &&
           a->v_off_bytes + width <= a->row_bytes &&
           (uint64_t)a->n_rows * a->row_bytes <= a->chunk_bytes && a->q && a->list && a->n_list &&
           a->res && a->o && a->lse && kvki_aligned(a->q) && kvki_aligned(a->o) &&
           a->scale == a->scale;
}

extern "C" kvc_status kvk_cuda_chunk_attend(kvk_cuda *cuda, const kvk_cuda_chunk_attend_args *args,
                                            kvk_stream *stream)
{
    size_t elem_bytes = args->dtype == KVK_F32 ? 4 : 2;
    struct choice c = {NULL, 0, 1};
    struct chunk_attend_params p = {*args, 0, 0};
    uint32_t n_rows = 0;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0 || args->n_q == 0 || args->k == 0)
        return KVC_OK;
    if (!args_ok(args, elem_bytes))
        return KVC_INVALID;
    p.group = args->n_q_heads / args->n_kv_heads;
    n_rows = args->n_q * p.group;
    c = args->dtype == KVK_F32    ? choice_of<float>(args->head_dim, n_rows)
        : args->dtype == KVK_BF16 ? choice_of<__nv_bfloat16>(args->head_dim, n_rows)
        : args->dtype == KVK_F16  ? choice_of<__half>(args->head_dim, n_rows)
                                  : c;
    p.n_tiles = (n_rows + c.queries - 1) / c.queries;
    if (!c.kernel || args->n_rows > KEYS || args->n_q > UINT32_MAX / p.group ||
        c.smem_bytes > (size_t)cuda->smem_block_max ||
        (uint64_t)p.n_tiles * args->n_seqs > UINT16_MAX || args->n_kv_heads > UINT16_MAX)
        return KVC_UNSUPPORTED;
    st = kvki_cuda_use(cuda);
    if (st == KVC_OK)
        st = kvki_cuda_status(cudaFuncSetAttribute((const void *)c.kernel,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   (int)c.smem_bytes));
    return st != KVC_OK
               ? st
               : kvki_cuda_launch_next(cuda, c.kernel,
                                       dim3(args->k, args->n_kv_heads, p.n_tiles * args->n_seqs),
                                       THREADS, c.smem_bytes, stream, p);
}
