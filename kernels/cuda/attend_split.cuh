/*
 * attend_split.cuh: a tile of rows that are not bf16 as they lie, on the tensor cores: coded ones
 * (e4m3, int8), and keys that are rotated on the way. Device code; attend_split.cu says how.
 */
#ifndef KVKI_CUDA_ATTEND_SPLIT_CUH
#define KVKI_CUDA_ATTEND_SPLIT_CUH

#include "mma.cuh"

/* Rows of a dtype: words of four (or two) elements, and those as bf16 pairs. */
struct bf16_row {
    static const int bytes = 2;
    static const bool coded = false;
};

struct i8_row {
    static const int bytes = 1;
    static const bool coded = true;

    /* 0x43xx is 128 plus the low seven bits, or 256 plus them where the sign bit falls into the
     * exponent: less 128 or 256, it is the int8. */
    __device__ static inline uint32_t pair(uint32_t word, uint32_t select)
    {
        uint32_t t = __byte_perm(word, 0x43434343u, select), low = t & 0xff7fff7fu;
        uint32_t base = t & 0xff80ff80u, x;
        asm("{.reg .b32 one; mov.b32 one, 0xbf80bf80; fma.rn.bf16x2 %0, %1, one, %2;}"
            : "=r"(x)
            : "r"(base), "r"(low));
        return x;
    }
    __device__ static inline uint2 pairs(uint32_t word)
    {
        return make_uint2(pair(word, 0x4140u), pair(word, 0x4342u));
    }
};

struct e4m3_row {
    static const int bytes = 1;
    static const bool coded = true;

    __device__ static inline uint32_t pair(uint32_t two)
    {
        __half2 x = __half2(__nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)two, __NV_E4M3));
        float2 f = __half22float2(x);
        return bf16_pair(f.x, f.y);
    }
    __device__ static inline uint2 pairs(uint32_t word)
    {
        return make_uint2(pair(word & 0xffffu), pair(word >> 16));
    }
};

/* Words [kWords] at 8- or 16-byte aligned shared memory. */
template <int kWords> __device__ static inline void load_words(const char *at, uint32_t *w)
{
    if constexpr (kWords % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4)
            *(uint4 *)(w + i) = *(const uint4 *)(at + i * 4);
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 2)
            *(uint2 *)(w + i) = *(const uint2 *)(at + i * 4);
    }
}

/* A lane's run of K in one half of a head: kDim / 8 elements, as pairs. */
template <typename Row, int kDim>
__device__ static inline void load_run(const char *at, uint2 (&x)[kDim / 32])
{
    __align__(16) uint32_t words[kDim / 32 * Row::bytes];

    load_words<kDim / 32 * Row::bytes>(at, words);
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) {
        if constexpr (Row::coded)
            x[i] = Row::pairs(words[i]);
        else
            x[i] = make_uint2(words[2 * i], words[2 * i + 1]);
    }
}

/* q[half * kDim / 32 + i]: the group's queries at the elements of step i of a lane's run. */
template <int kDim, bool kFew>
__device__ static inline void load_queries(const float *q, uint32_t group,
                                           struct pieces<kFew> (&p)[kDim / 16])
{
    uint32_t lane = threadIdx.x & 31u, head = piece_head<kFew>();

#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
        int half = step / (kDim / 32), i = step % (kDim / 32);
        float4 x = make_float4(0, 0, 0, 0);
        if (head < group)
            x = *(const float4 *)(q + head * kDim + half * (kDim / 2) + lane % 4u * (kDim / 8) +
                                  i * 4);
        split(x.x, x.y, 0, &p[step]);
        split(x.z, x.w, 1, &p[step]);
    }
}

/* Two f32 as bf16 pieces, high and what is left. */
__device__ static inline void split_pair(float x, float y, uint32_t *high_p, uint32_t *rest_p)
{
    float2 rest;

    *high_p = bf16_pair(x, y);
    rest = rest_of(x, y, *high_p);
    *rest_p = bf16_pair(rest.x, rest.y);
}

/* c += query pieces times four f32 of a key. */
template <bool kFew>
__device__ static inline void multiply_floats(float (&c)[4], const struct pieces<kFew> *q, float4 k)
{
    uint2 high, rest;

    split_pair(k.x, k.y, &high.x, &rest.x);
    split_pair(k.z, k.w, &high.y, &rest.y);
    multiply_pieces(c, q, high.x, high.y);
    multiply_upper(c, q, rest.x, rest.y);
}

/* c += the queries times four pairs (low, high half) of a key, rotated by r [4] (cos, sin). */
template <bool kFew>
__device__ static inline void multiply_rotated(float (&c)[4], const struct pieces<kFew> *q_low,
                                               const struct pieces<kFew> *q_high, uint2 low,
                                               uint2 high, const float2 *r)
{
    float2 a = floats_of(low.x), b = floats_of(low.y), x = floats_of(high.x), y = floats_of(high.y);
    float4 r0 = *(const float4 *)r, r1 = *(const float4 *)(r + 2);

    multiply_floats(c, q_low,
                    make_float4(a.x * r0.x - x.x * r0.y, a.y * r0.z - x.y * r0.w,
                                b.x * r1.x - y.x * r1.y, b.y * r1.z - y.y * r1.w));
    multiply_floats(c, q_high,
                    make_float4(x.x * r0.x + a.x * r0.y, x.y * r0.z + a.y * r0.w,
                                y.x * r1.x + b.x * r1.y, y.y * r1.z + b.y * r1.w));
}

/* x[t][i]: logit of the lane's head and row t * 8 + lane % 4 * 2 + i, unscaled. rotation: of the
 * tile, [ATTEND_TILE, kDim / 2]. */
template <typename Row, int kDim, bool kRotated, bool kFew>
__device__ static inline void find_logits(const struct pieces<kFew> (&q)[kDim / 16],
                                          const char *keys, uint32_t row_stride,
                                          const float2 *rotation, float (&x)[2][2])
{
    uint32_t lane = threadIdx.x & 31u, first = lane % 4u * (kDim / 8);
    uint2 low[2][kDim / 32], high[2][kDim / 32];
    float c[2][4] = {};

#pragma unroll
    for (uint32_t t = 0; t < 2; t++) {
        const char *at = keys + (size_t)(t * 8u + lane / 4u) * row_stride + first * Row::bytes;
        load_run<Row, kDim>(at, low[t]);
        load_run<Row, kDim>(at + kDim / 2 * Row::bytes, high[t]);
    }
#pragma unroll
    for (int i = 0; i < kDim / 32; i++) { /* both rows by turns: neither waits for its own sums */
#pragma unroll
        for (uint32_t t = 0; t < 2; t++) {
            const float2 *r = rotation + (t * 8u + lane / 4u) * (kDim / 2) + first;
            if (kRotated) {
                multiply_rotated(c[t], &q[i], &q[kDim / 32 + i], low[t][i], high[t][i], r + i * 4);
            } else {
                multiply_pieces(c[t], &q[i], low[t][i].x, low[t][i].y);
                multiply_pieces(c[t], &q[kDim / 32 + i], high[t][i].x, high[t][i].y);
            }
        }
    }
#pragma unroll
    for (uint32_t t = 0; t < 2; t++) {
        float2 sums = head_sums<kFew>(c[t]);
        x[t][0] = sums.x;
        x[t][1] = sums.y;
    }
}

/* x times the scale of each row's head; scales: where the first row has it. */
__device__ static inline void apply_scales(const char *scales, uint32_t row_stride,
                                           float (&x)[2][2])
{
#pragma unroll
    for (uint32_t t = 0; t < 4; t++) {
        uint32_t row = t / 2 * 8u + (threadIdx.x & 3u) * 2u + t % 2;
        x[t / 2][t % 2] *= kvki_bf16(*(const uint16_t *)(scales + (size_t)row * row_stride));
    }
}

/* Pairs (row, row + 1) of four neighbouring elements of two rows. */
template <typename Row>
__device__ static inline void interleave(uint32_t even, uint32_t odd, uint32_t (&x)[4])
{
    uint2 a = Row::pairs(__byte_perm(even, odd, 0x5140u));
    uint2 b = Row::pairs(__byte_perm(even, odd, 0x7362u));

    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

/* The weighted sums of coded values of the lane's head to out [kDim]. A lane reads a run of kDim /
 * 8 elements of four rows, and so sums two such runs, of
 * which with kFew it writes one. */
template <typename Row, int kDim, bool kFew>
__device__ static inline void sum_coded(const float (&weights)[2][2], const char *values,
                                        uint32_t row_stride, bool real_head, float *out)
{
    const int words = kDim / 32;
    uint32_t lane = threadIdx.x & 31u;
    const char *at = values + (size_t)(lane % 4u * 2u) * row_stride + lane / 4u * (kDim / 8);
    __align__(16) uint32_t v[4][words];
    struct pieces<kFew> p;

    split(weights[0][0], weights[0][1], 0, &p);
    split(weights[1][0], weights[1][1], 1, &p);
#pragma unroll
    for (int r = 0; r < 4; r++)
        load_words<words>(at + (size_t)(r / 2 * 8 + r % 2) * row_stride, v[r]);
    out += (lane % 4u * 2u + (piece_first<kFew>() ? 0 : 1u)) * (kDim / 8);
#pragma unroll
    for (int w = 0; w < words; w++) {
        uint32_t low[4], high[4];
        float c[4][4] = {};
        interleave<Row>(v[0][w], v[1][w], low);
        interleave<Row>(v[2][w], v[3][w], high);
#pragma unroll
        for (int e = 0; e < 4; e++)
            multiply_pieces(c[e], &p, low[e], high[e]);
        if constexpr (kFew) {
            float sum[4];
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[e] = exchanged(c[e][0] + c[e][2], c[e][1] + c[e][3]);
            if (real_head)
                *(float4 *)(out + w * 4) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        } else if (real_head) {
            *(float4 *)(out + w * 4) = make_float4(c[0][0] + c[0][2], c[1][0] + c[1][2],
                                                   c[2][0] + c[2][2], c[3][0] + c[3][2]);
            *(float4 *)(out + kDim / 8 + w * 4) = make_float4(c[0][1] + c[0][3], c[1][1] + c[1][3],
                                                              c[2][1] + c[2][3], c[3][1] + c[3][3]);
        }
    }
}

/* One kv head of a tile, by one warp. tile_at: the tile's number in the workspace. */
template <typename Row, int kDim, bool kRotated, bool kFew>
__device__ static inline void
attend_head(const struct attend_params *p, const struct attend_layout *l, uint32_t seq,
            uint32_t tile_at, uint32_t kv_head, struct attend_rows *rows, const char *tile,
            const float2 *rotation, const struct pieces<kFew> (&queries)[kDim / 16])
{
    const kvk_cuda_attend_args *a = &p->a;
    uint32_t group = a->n_q_heads / a->n_kv_heads, own = piece_head<kFew>();
    uint32_t head = kv_head * group + own, at_head = kv_head * kDim * Row::bytes;
    uint32_t scale = a->n_kv_heads * kDim + 2u * kv_head;
    bool real_head = own < group;
    size_t at = ((size_t)seq * a->n_q_heads + head) * p->n_tiles + tile_at;
    float *out = p->o + (((size_t)seq * p->n_tiles + tile_at) * a->n_q_heads + head) * kDim;
    float x[2][2], most = 0, total = 0;

    find_logits<Row, kDim, kRotated, kFew>(queries, tile + a->k_off_bytes + at_head, l->row_stride,
                                           rotation, x);
    if (Row::coded)
        apply_scales(tile + a->k_off_bytes + scale, l->row_stride, x);
    find_weights(a, rows->there, x, &most, &total);
    if (threadIdx.x % 4u == 0 && piece_first<kFew>() && real_head) {
        p->most[at] = most;
        p->total[at] = total;
    }
    if constexpr (Row::coded) {
        apply_scales(tile + a->v_off_bytes + scale, l->row_stride, x);
        sum_coded<Row, kDim, kFew>(x, tile + a->v_off_bytes + at_head, l->row_stride, real_head,
                                   out);
    } else {
        sum_bf16<kDim, kFew>(x, tile + a->v_off_bytes + at_head, l->row_stride, real_head, out);
    }
}

/* Kv heads of a tile that has been asked for, dealt to the warps. q: of the sequence. rotation: as
 * in find_logits. All threads call. */
template <typename Row, int kDim, bool kRotated, bool kFew>
__device__ static inline void
attend_split(const struct attend_params *p, const struct attend_layout *l, uint32_t seq,
             uint32_t tile_at, const float *q, struct attend_rows *rows, const char *tile,
             const float2 *rotation)
{
    const kvk_cuda_attend_args *a = &p->a;
    uint32_t group = a->n_q_heads / a->n_kv_heads, warp = threadIdx.x / 32u;
    struct pieces<kFew> queries[kDim / 16];

    if (warp < a->n_kv_heads)
        load_queries<kDim, kFew>(q + (size_t)warp * group * kDim, group, queries);
    attend_await_tile(rows);
    for (uint32_t head = warp; head < a->n_kv_heads; head += ATTEND_WARPS) {
        if (head != warp)
            load_queries<kDim, kFew>(q + (size_t)head * group * kDim, group, queries);
        attend_head<Row, kDim, kRotated, kFew>(p, l, seq, tile_at, head, rows, tile, rotation,
                                               queries);
    }
}

#endif
