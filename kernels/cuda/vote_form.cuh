/*
 * vote_form.cuh: logits of tiles of 16 rows of a per-head index, in two forms. Device code of
 * vote.cu.
 *
 * In both, lane = 4 g + t holds rows g and g + 8 of the tile. Query heads lie in slots: slot 4 i +
 * t is the head that lane t of each four meets in quad i. A slot may be empty.
 *
 * mma_form (dims 32, or 16 with two heads a product): the int16 query is its upper byte, signed,
 * and its lower one, unsigned; they are two neighbouring columns of a tensor core's product with
 * the keys, so that one lane gets both halves of its head's dot, exact in int32. The sums start
 * at 1.5 2^23 as float bits, so they are floats at once. general_form: any shape, one product at a
 * time.
 */
#ifndef KVKI_CUDA_VOTE_FORM_CUH
#define KVKI_CUDA_VOTE_FORM_CUH

#define TOPK_CANDS 32768u /* two KVK_CUDA_WIDE_MAX */
#include "topk_end.cuh"

#define VOTE_TILE       16u
#define VOTE_NONE       UINT32_MAX
#define VOTE_SLOTS_MAX  128u
#define VOTE_QUERY_MAX  16384u /* n_q_heads * dims */
#define VOTE_DIMS_MAX   256u
#define VOTE_COUNTS     8192u       /* of rows by their first head and its e, of all slots */
#define VOTE_LEAST_BITS 0x07000000u /* 2^-113: what is smaller is not counted */

/* What a form needs to know of the index. */
struct vote_shape {
    uint32_t n_q_heads, n_kv_heads, dims, row_bytes;
};

#define VOTE_MAGIC_BITS 0x4b400000u
#define VOTE_MAGIC      12582912.0f /* the float of those bits; +- 2^22 around it are exact */

/* c = magic + rows [16, 32] x columns [32, 8] of signed bytes; c += the same of unsigned ones. */
__device__ static inline void vote_mma_signed(uint32_t (&c)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %10, %10, %10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(VOTE_MAGIC_BITS));
}

__device__ static inline void vote_mma_unsigned(uint32_t (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2])
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* The left operand of a product from rows [16, 32] of bytes in shared memory: lane i brings the
 * address of half i / 16 of row i % 16. */
__device__ static inline void vote_load_pieces(uint32_t (&a)[4], const uint8_t *shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared))
                 : "memory");
}

/* The dot of a head from the float bits of its halves; one rounding, as of (float)int. */
__device__ static inline float vote_dot(uint32_t upper, uint32_t lower)
{
    return fmaf(__uint_as_float(upper) - VOTE_MAGIC, 256.0f, __uint_as_float(lower) - VOTE_MAGIC);
}

/* kHeads kv heads (a multiple of 4) of up to 4 kParts query heads each, of 32 dims; or of 16, and
 * the columns of one head are zeros where the product's 32 bytes are the other's. */
template <uint32_t kHeads, uint32_t kParts, uint32_t kWidth = 32> struct mma_form {
    static constexpr bool kStaged = true;
    static constexpr uint32_t kQuads = kHeads * kParts, kSlots = kQuads * 4, kDims = kWidth;
    static constexpr uint32_t kRow = kHeads * (kDims + 2u), kQuery = kSlots * kDims;
    static constexpr uint32_t kWords = kQuads * 2, kBinBit = 22, kPieces = kHeads * kDims / 32u;
    static constexpr uint32_t kStageBytes = TOPK_WARPS * VOTE_TILE * kRow;
    static constexpr uint32_t kBins = VOTE_COUNTS / kSlots, kLeastBits = VOTE_LEAST_BITS;
    uint32_t column[kQuads][2], is_upper; /* its bytes; all ones where they are upper ones */

    __device__ static uint32_t n_quads(const struct vote_shape &)
    {
        return kQuads;
    }

    __device__ static uint32_t head_of(const struct vote_shape &shape, uint32_t slot)
    {
        uint32_t group = shape.n_q_heads / kHeads, quad = slot / 4;
        uint32_t place = quad % kParts * 4 + slot % 4;
        return place < group ? quad / kParts * group + place : VOTE_NONE;
    }

    /* The query's number that meets byte `at` of the 32 of a quad's product. */
    __device__ static uint32_t number_at(const int16_t *query, uint32_t quad, uint32_t slot,
                                         uint32_t at)
    {
        bool own = at / kDims == quad / kParts % (32u / kDims);
        return own ? (uint16_t)query[slot * kDims + at % kDims] : 0;
    }

    /* Words of the columns, for each lane: 4 n + t has bytes 4 t to 4 t + 3, and those 16 further,
     * of column n, which is half n % 2 of slot n / 2. The block calls; a word a thread. */
    __device__ static void cut(const int16_t *query, uint32_t (*words)[32])
    {
        for (uint32_t i = threadIdx.x; i < kWords * 32; i += TOPK_THREADS) {
            uint32_t lane = i % 32, word = i / 32, column = lane / 4, bytes = 0;
            uint32_t quad = word / 2, first = word % 2 * 16 + lane % 4 * 4;
            for (uint32_t b = 0; b < 4; b++) {
                uint32_t x = number_at(query, quad, quad * 4 + column / 2, first + b);
                bytes |= (column % 2 ? x & 0xffu : x >> 8) << (8 * b);
            }
            words[word][lane] = bytes;
        }
    }

    __device__ void load(const uint32_t (*words)[32])
    {
        uint32_t lane = threadIdx.x & 31u;

#pragma unroll
        for (uint32_t i = 0; i < kWords; i++)
            column[i / 2][i % 2] = words[i][lane];
        is_upper = lane / 4 % 2 ? 0 : UINT32_MAX;
    }

    /* What a lane needs of a tile: the pieces that products take, each of one head or two, and the
     * scales of its two rows. */
    struct two_rows {
        uint32_t piece[kPieces][4];
        uint2 low_scale[kHeads / 4], high_scale[kHeads / 4];
    };

    /* Out of shared memory; a row past the `left` that are there is the last of them. */
    __device__ static void take(const uint8_t *tile, uint32_t left, struct two_rows *rows)
    {
        uint32_t lane = threadIdx.x & 31u, row = lane / 4;
        const uint8_t *low = tile + min(row, left - 1) * kRow;
        const uint8_t *high = tile + min(row + 8, left - 1) * kRow;
        const uint8_t *mine = tile + min(lane % 16, left - 1) * kRow + lane / 16 * 16;

#pragma unroll
        for (uint32_t i = 0; i < kPieces; i++) {
            if constexpr (kRow % 16 == 0) {
                vote_load_pieces(rows->piece[i], mine + i * 32u);
            } else {
                uint32_t at = i * 32u + lane % 4 * 4;
                rows->piece[i][0] = *(const uint32_t *)(low + at);
                rows->piece[i][1] = *(const uint32_t *)(high + at);
                rows->piece[i][2] = *(const uint32_t *)(low + at + 16);
                rows->piece[i][3] = *(const uint32_t *)(high + at + 16);
            }
        }
#pragma unroll
        for (uint32_t w = 0; w < kHeads / 4; w++) {
            rows->low_scale[w] = *(const uint2 *)(low + kHeads * kDims + 8 * w);
            rows->high_scale[w] = *(const uint2 *)(high + kHeads * kDims + 8 * w);
        }
    }

    __device__ static float scale_of(const uint2 (&scales)[kHeads / 4], uint32_t head)
    {
        uint32_t two = head % 4 < 2 ? scales[head / 4].x : scales[head / 4].y;
        return __uint_as_float(two << (head % 2 ? 0 : 16) & 0xffff0000u);
    }

    /* Calls each(i, x, y) per quad: the logits of the lane's head and two rows, without q's scale.
     */
    template <class Each>
    __device__ void score(const struct vote_shape &, const int16_t *, const struct two_rows &rows,
                          Each each) const
    {
        uint32_t mask = is_upper;

        asm volatile("" : "+r"(mask)); /* cut here: registers are what there is too few of */
#pragma unroll
        for (uint32_t i = 0; i < kQuads; i++) {
            uint32_t head = i / kParts, c[4];
            const uint32_t upper[2] = {column[i][0] & mask, column[i][1] & mask};
            const uint32_t lower[2] = {column[i][0] & ~mask, column[i][1] & ~mask};
            vote_mma_signed(c, rows.piece[head * kDims / 32u], upper);
            vote_mma_unsigned(c, rows.piece[head * kDims / 32u], lower);
            each(i, vote_dot(c[0], c[1]) * scale_of(rows.low_scale, head),
                 vote_dot(c[2], c[3]) * scale_of(rows.high_scale, head));
        }
    }
};

struct general_form {
    static constexpr bool kStaged = false;
    static constexpr uint32_t kQuads = VOTE_SLOTS_MAX / 4, kSlots = VOTE_SLOTS_MAX;
    static constexpr uint32_t kRow = 0, kQuery = VOTE_QUERY_MAX, kStageBytes = 0, kWords = 1;
    static constexpr uint32_t kBinBit = 24, kBins = VOTE_COUNTS / kSlots,
                              kLeastBits = VOTE_LEAST_BITS;

    __device__ static uint32_t n_quads(const struct vote_shape &shape)
    {
        return (shape.n_q_heads + 3) / 4;
    }

    __device__ static uint32_t head_of(const struct vote_shape &shape, uint32_t slot)
    {
        return slot < shape.n_q_heads ? slot : VOTE_NONE;
    }

    __device__ static void cut(const int16_t *, uint32_t (*)[32])
    {
    }

    __device__ void load(const uint32_t (*)[32])
    {
    }

    struct two_rows {
        const uint8_t *low, *high;
    };

    /* Head kv's key of a row with the query, times the key's scale. */
    __device__ static float dot(const struct vote_shape &shape, const int16_t *query,
                                const uint8_t *row, uint32_t kv)
    {
        const uint8_t *at = row + kv * shape.dims, *scale = row + shape.n_kv_heads * shape.dims;
        uint32_t bits = (uint32_t)scale[2 * kv] | (uint32_t)scale[2 * kv + 1] << 8;
        int sum = 0;

        for (uint32_t d = 0; d < shape.dims; d++)
            sum += (int)query[d] * (int)(int8_t)at[d];
        return (float)sum * kvki_bf16(bits);
    }

    template <class Each>
    __device__ void score(const struct vote_shape &shape, const int16_t *query,
                          const struct two_rows &rows, Each each) const
    {
        uint32_t group = shape.n_q_heads / shape.n_kv_heads;

#pragma unroll 1
        for (uint32_t i = 0; i < n_quads(shape); i++) {
            uint32_t head = i * 4 + threadIdx.x % 4, kv = head / group;
            bool there = head < shape.n_q_heads;
            float x = there ? dot(shape, query + head * shape.dims, rows.low, kv) : 0.0f;
            float y = there ? dot(shape, query + head * shape.dims, rows.high, kv) : 0.0f;
            each(i, x, y);
        }
    }
};

#endif
