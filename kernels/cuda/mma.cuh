/*
 * mma.cuh: sums of f32 precision on the bf16 tensor cores: numbers in three bf16 pieces, the
 * products of the pieces, and the softmax of a tile's logits where the product leaves them. Device
 * code. In a 16 x 8 result, lane i has row i / 4 (and that + 8), columns i % 4 * 2 and the next.
 */
#ifndef KVKI_CUDA_MMA_CUH
#define KVKI_CUDA_MMA_CUH

#include "attend.cuh"

/*
 * Numbers of up to eight heads in pieces, two bf16 in a register, as the left operand of a 16 x 16
 * step, columns 0-7 and 8-15. Up to four heads (kFew) need one product: rows 0-3 high, 4-7 middle,
 * 8-11 low pieces. More need two: rows 0-7 high, 8-15 middle, and then rows 0-7 low.
 */
template <bool kFew> struct pieces;
template <> struct pieces<true> {
    uint32_t upper[2], low[2]; /* high or middle; low in the lanes of high, else 0 */
};
template <> struct pieces<false> {
    uint32_t high[2], middle[2], low[2];
};

/* The head whose numbers a lane has; with kFew two lanes have the same. */
template <bool kFew> __device__ static inline uint32_t piece_head(void)
{
    uint32_t row = (threadIdx.x & 31u) / 4u;
    return kFew ? row % 4u : row;
}

/* Whether the lane is the first of those. */
template <bool kFew> __device__ static inline bool piece_first(void)
{
    return !kFew || (threadIdx.x & 31u) < 16u;
}

/* Two floats rounded to bf16, x in the low half; and back. */
__device__ static inline uint32_t bf16_pair(float x, float y)
{
    __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
    return *(const uint32_t *)&two;
}

__device__ static inline float2 floats_of(uint32_t pair)
{
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

/* What is left of two floats beside bf16_pair of them. */
__device__ static inline float2 rest_of(float x, float y, uint32_t pair)
{
    float2 taken = floats_of(pair);
    return make_float2(x - taken.x, y - taken.y);
}

/* Splits two floats; part says which columns they are. */
template <bool kFew>
__device__ static inline void split(float x, float y, int part, struct pieces<kFew> *p)
{
    uint32_t high = bf16_pair(x, y);
    float2 rest = rest_of(x, y, high);
    uint32_t middle = bf16_pair(rest.x, rest.y);
    float2 least = rest_of(rest.x, rest.y, middle);
    uint32_t low = bf16_pair(least.x, least.y);

    if constexpr (kFew) {
        p->upper[part] = piece_first<kFew>() ? high : middle;
        p->low[part] = piece_first<kFew>() ? low : 0;
    } else {
        p->high[part] = high;
        p->middle[part] = middle;
        p->low[part] = low;
    }
}

__device__ static inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* c += all pieces times (b0, b1); head_sums then has the sums. */
template <bool kFew>
__device__ static inline void multiply_pieces(float (&c)[4], const struct pieces<kFew> *p,
                                              uint32_t b0, uint32_t b1)
{
    if constexpr (kFew) {
        multiply(c, p->upper[0], p->low[0], p->upper[1], p->low[1], b0, b1);
    } else {
        multiply(c, p->low[0], 0, p->low[1], 0, b0, b1);
        multiply(c, p->high[0], p->middle[0], p->high[1], p->middle[1], b0, b1);
    }
}

/* The same without the low pieces. */
template <bool kFew>
__device__ static inline void multiply_upper(float (&c)[4], const struct pieces<kFew> *p,
                                             uint32_t b0, uint32_t b1)
{
    if constexpr (kFew)
        multiply(c, p->upper[0], 0, p->upper[1], 0, b0, b1);
    else
        multiply(c, p->high[0], p->middle[0], p->high[1], p->middle[1], b0, b1);
}

/* The sums over all pieces of the lane's head in columns 0 and 1 of its two. */
template <bool kFew> __device__ static inline float2 head_sums(const float (&c)[4])
{
    float2 x = make_float2(c[0] + c[2], c[1] + c[3]);

    if constexpr (kFew) {
        x.x += __shfl_xor_sync(KVKI_FULL_WARP, x.x, 16);
        x.y += __shfl_xor_sync(KVKI_FULL_WARP, x.y, 16);
    }
    return x;
}

/* With kFew, of two numbers that are each a share of a sum, the first lane of a head gets the sum
 * of the shares of x, the second that of y. */
__device__ static inline float exchanged(float x, float y)
{
    float own = piece_first<true>() ? x : y, other = piece_first<true>() ? y : x;
    return own + __shfl_xor_sync(KVKI_FULL_WARP, other, 16);
}

/* Logits to weights; the four lanes of a head share maximum and total. */
__device__ static inline void find_weights(const kvk_cuda_attend_args *a, uint32_t there,
                                           float (&x)[2][2], float *most_p, float *total_p)
{
    uint32_t first = (threadIdx.x & 3u) * 2u;
    float most = -INFINITY, total = 0;

#pragma unroll
    for (uint32_t t = 0; t < 4; t++) {
        float z = x[t / 2][t % 2] * a->scale;
        z = a->softcap > 0 ? a->softcap * tanhf(z / a->softcap) : z;
        x[t / 2][t % 2] = there >> (t / 2 * 8u + first + t % 2) & 1u ? z : -INFINITY;
        most = fmaxf(most, x[t / 2][t % 2]);
    }
    most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, 1));
    most = fmaxf(most, __shfl_xor_sync(KVKI_FULL_WARP, most, 2));
#pragma unroll
    for (uint32_t t = 0; t < 4; t++) {
        x[t / 2][t % 2] = attend_weight(x[t / 2][t % 2], most);
        total += x[t / 2][t % 2];
    }
    total += __shfl_xor_sync(KVKI_FULL_WARP, total, 1);
    total += __shfl_xor_sync(KVKI_FULL_WARP, total, 2);
    *most_p = most;
    *total_p = total;
}

/* Four 8 x 8 matrices of bf16; lane i brings the address of row i % 8 of matrix i / 8. */
template <bool kTransposed>
__device__ static inline void load_matrices(uint32_t (&m)[4], const char *shared)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);

    if (kTransposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                     : "r"(at)
                     : "memory");
}

/* Writes the weighted sums of the values of the lane's head to out [kDim]. */
template <int kDim, bool kFew>
__device__ static inline void sum_bf16(const float (&weights)[2][2], const char *values,
                                       uint32_t row_stride, bool real_head, float *out)
{
    uint32_t lane = threadIdx.x & 31u;
    const char *at =
        values + (size_t)(lane / 8u % 2u * 8u + lane % 8u) * row_stride + lane / 16u * 16u;
    struct pieces<kFew> p;

    split(weights[0][0], weights[0][1], 0, &p);
    split(weights[1][0], weights[1][1], 1, &p);
    out += lane % 4u * 2u + (piece_first<kFew>() ? 0 : 8u);
#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
        float c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        uint32_t v[4];
        load_matrices<true>(v, at + step * 32);
        multiply_pieces(c[0], &p, v[0], v[1]);
        multiply_pieces(c[1], &p, v[2], v[3]);
        if constexpr (kFew) {
            float2 sum = make_float2(exchanged(c[0][0] + c[0][2], c[1][0] + c[1][2]),
                                     exchanged(c[0][1] + c[0][3], c[1][1] + c[1][3]));
            if (real_head)
                *(float2 *)(out + step * 16) = sum;
        } else if (real_head) {
            *(float2 *)(out + step * 16) = head_sums<kFew>(c[0]);
            *(float2 *)(out + step * 16 + 8) = head_sums<kFew>(c[1]);
        }
    }
}

#endif
