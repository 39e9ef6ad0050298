/*
 * select_form.cuh: how a warp scores 32 rows of an int8 index of one shared head (ESA, 2502.14477
 * eq. 3). Device code, shared by the scans of select.cu and select_ring.cu.
 *
 * Fast form (rows of 128 or 64 bytes): row_bytes / 16 lanes share a row, 16 bytes each, so that a
 * warp's loads are contiguous, with all of them in flight before the first product; the query is
 * int16 in registers and two dp2a a word give the exact int32 dot. The lanes' sums are transposed
 * while they are added, so each lane ends with one row. General form: a row a lane. Both multiply
 * ((float)dot * k_scale) * q_scale in this order: kvk_score_index's bits.
 */
#ifndef KVKI_CUDA_SELECT_FORM_CUH
#define KVKI_CUDA_SELECT_FORM_CUH

#include "topk_end.cuh"

#define SELECT_DIMS_MAX 256u

struct select_params {
    struct topk_job job;
    const float *q;
    uint32_t dims, early;
};

/* Lane's part of the quantised query: eight pairs of int16, and the scale of all. */
struct fast_query {
    int pairs[8];
    float scale;
};

/* Sums v[i] over the kLanes lanes of a row group; lane l keeps the sum of v[l % kLanes]. */
template <int kLanes> __device__ static inline int transpose_sum(int (&v)[kLanes])
{
    uint32_t lane = threadIdx.x & 31u;

#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        bool high = lane & (uint32_t)step;
#pragma unroll
        for (int i = 0; i < step; i++) {
            int send = high ? v[i] : v[i + step], keep = high ? v[i + step] : v[i];
            v[i] = keep + __shfl_xor_sync(KVKI_FULL_WARP, send, step);
        }
    }
    return v[0];
}

template <int kRowBytes> struct fast_form {
    static constexpr int kLanes = kRowBytes / 16;
    static constexpr uint32_t kBytes = kRowBytes;
    static constexpr bool kShared = false;
    struct fast_query query;

    __device__ void load_query(const struct select_params *p, uint32_t seq, int16_t *)
    {
        uint32_t first = (threadIdx.x % kLanes) * 16u;
        const float *q = p->q + (size_t)seq * p->dims;
        float x[16], most = 0;

#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            x[i] = first + i < p->dims ? q[first + i] : 0.0f;
            most = fmaxf(most, fabsf(x[i]));
        }
        query.scale = __fdiv_rn(kvki_lanes_max(most, kLanes), 32767.0f);
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            int low = query.scale > 0 ? kvki_quantized(x[2 * i], query.scale) : 0;
            int high = query.scale > 0 ? kvki_quantized(x[2 * i + 1], query.scale) : 0;
            query.pairs[i] = (low & 0xffff) | (int)((uint32_t)high << 16);
        }
    }

    /* The same with a stage of 16 kLanes numbers in shared memory, to which each lane of the warp
     * quantises a few. */
    __device__ void load_query_shared(const struct select_params *p, uint32_t seq, int16_t *stage)
    {
        constexpr uint32_t kEach = 16u * kLanes / 32u;
        uint32_t lane = threadIdx.x & 31u, first = lane * kEach;
        const float *q = p->q + (size_t)seq * p->dims;
        float x[kEach], most = 0;

#pragma unroll
        for (uint32_t i = 0; i < kEach; i++) {
            x[i] = first + i < p->dims ? q[first + i] : 0.0f;
            most = fmaxf(most, fabsf(x[i]));
        }
        query.scale = __fdiv_rn(kvki_lanes_max(most, 32), 32767.0f);
        __syncwarp();
#pragma unroll
        for (uint32_t i = 0; i < kEach; i++)
            stage[first + i] = (int16_t)(query.scale > 0 ? kvki_quantized(x[i], query.scale) : 0);
        __syncwarp();
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            query.pairs[i] = ((const int *)stage)[lane % kLanes * 8u + i];
    }

    /* Row of the group that this lane ends with. */
    __device__ static uint32_t row_of_lane()
    {
        uint32_t lane = threadIdx.x & 31u;
        return lane % kLanes * (32u / kLanes) + lane / kLanes;
    }

    __device__ static uint32_t lane_of_row(uint32_t row)
    {
        return row % (32u / kLanes) * kLanes + row / (32u / kLanes);
    }

    /* The lane's pieces of 32 rows, of which n_rows (>= 1) are there, from device memory. */
    __device__ static void load(const uint8_t *rows, uint32_t n_rows, uint4 (&d)[kLanes])
    {
        uint32_t lane = threadIdx.x & 31u;

#pragma unroll
        for (int i = 0; i < kLanes; i++) {
            uint32_t row = min(i * (32u / kLanes) + lane / kLanes, n_rows - 1);
            d[i] = kvki_load_once(rows + row * kRowBytes + lane % kLanes * 16u);
        }
    }

    /* The same from shared memory: of rows that are not there, whatever lies in their place. */
    __device__ static void load_shared(const uint8_t *rows, uint4 (&d)[kLanes])
    {
        const uint4 *at = (const uint4 *)rows + (threadIdx.x & 31u);

#pragma unroll
        for (int i = 0; i < kLanes; i++)
            d[i] = at[i * 32];
    }

    /* The lane's row's score. */
    __device__ float score_of(const uint4 (&d)[kLanes]) const
    {
        uint32_t lane = threadIdx.x & 31u;
        int dot[kLanes], scale[kLanes];

#pragma unroll
        for (int i = 0; i < kLanes; i++) {
            int sum = 0;
            sum = __dp2a_lo(query.pairs[0], (int)d[i].x, sum);
            sum = __dp2a_hi(query.pairs[1], (int)d[i].x, sum);
            sum = __dp2a_lo(query.pairs[2], (int)d[i].y, sum);
            sum = __dp2a_hi(query.pairs[3], (int)d[i].y, sum);
            sum = __dp2a_lo(query.pairs[4], (int)d[i].z, sum);
            sum = __dp2a_hi(query.pairs[5], (int)d[i].z, sum);
            sum = __dp2a_lo(query.pairs[6], (int)d[i].w, sum);
            sum = __dp2a_hi(query.pairs[7], (int)d[i].w, sum);
            dot[i] = sum;
            scale[i] = lane % kLanes == kLanes - 1 ? (int)(d[i].w >> 16) : 0;
        }
        int sum = transpose_sum<kLanes>(dot);
        float k_scale = kvki_bf16((uint32_t)transpose_sum<kLanes>(scale));
        return __fmul_rn(__fmul_rn((float)sum, k_scale), query.scale);
    }

    /* Scores of 32 rows, n_rows (>= 1) of them there. */
    __device__ float score(const uint8_t *rows, uint32_t n_rows, uint32_t, const int16_t *) const
    {
        uint4 d[kLanes];

        load(rows, n_rows, d);
        return score_of(d);
    }
};

/* Any width: the query lies in shared memory, one copy a warp. */
struct general_form {
    static constexpr bool kShared = true;
    float scale;

    __device__ void load_query(const struct select_params *p, uint32_t seq, int16_t *shared)
    {
        uint32_t lane = threadIdx.x & 31u;
        const float *q = p->q + (size_t)seq * p->dims;
        float most = 0;

        for (uint32_t i = lane; i < p->dims; i += 32)
            most = fmaxf(most, fabsf(q[i]));
        scale = __fdiv_rn(kvki_lanes_max(most, 32), 32767.0f);
        __syncwarp();
        for (uint32_t i = lane; i < p->dims; i += 32)
            shared[i] = (int16_t)(scale > 0 ? kvki_quantized(q[i], scale) : 0);
        __syncwarp();
    }

    __device__ static uint32_t row_of_lane()
    {
        return threadIdx.x & 31u;
    }

    __device__ float score(const uint8_t *rows, uint32_t n_rows, uint32_t dims,
                           const int16_t *shared) const
    {
        uint32_t row = min(threadIdx.x & 31u, n_rows - 1);
        const uint8_t *at = rows + (size_t)row * (dims + 2);
        uint32_t bits = (uint32_t)at[dims] | (uint32_t)at[dims + 1] << 8;
        int dot = 0;

        for (uint32_t i = 0; i < dims; i++)
            dot += (int)shared[i] * (int)(int8_t)at[i];
        return __fmul_rn(__fmul_rn((float)dot, kvki_bf16(bits)), scale);
    }
};

#endif
