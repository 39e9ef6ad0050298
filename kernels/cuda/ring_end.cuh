/*
 * ring_end.cuh: what the scan of select_ring.cu keeps in shared memory, and what follows it where
 * its candidates will do: ranking by counting, and a window's rows. Device code.
 *
 * A block counts for two of its candidates at a time, one warp each; they lie in shared memory
 * where the rings were.
 */
#ifndef KVKI_CUDA_RING_END_CUH
#define KVKI_CUDA_RING_END_CUH

#include "select_form.cuh"

#define RING_WARPS TOPK_WARPS
#define RING_SEQS  TOPK_WARPS /* sequences at most: a warp finds the bound of one */
#define RING_SLOTS 2u         /* groups on their way to a warp */
#define RING_BYTES 4096u      /* of a group */
#define RING_HELD  8u         /* groups whose keys a warp can hold */
#define RING_MANY  12u        /* groups a warp, from which on it samples two */
#define RING_EPS   7u         /* 4 eps + 1 rows are a warp's lanes */
#define RING_NONE  UINT32_MAX

/* Rows of a group, and of them a lane's. */
template <class Form> struct ring_group {
    static constexpr uint32_t kRows = RING_BYTES / Form::kBytes;
    static constexpr uint32_t kPer = kRows / 32u;
};
#define RING_PER_MAX 2u

/* A warp's groups on their way, and what it holds. */
struct ring_warp {
    uint64_t full[RING_SLOTS];
    uint32_t slot_group[RING_SLOTS];
    uint32_t held_group[RING_HELD];
    uint32_t held[RING_HELD][RING_PER_MAX][32];
    __align__(16) int16_t query[128]; /* on its way to the lanes */
};

struct ring_block {
    struct ring_warp warps[RING_WARPS];
    uint64_t published, known; /* when all warps counted their samples; all bounds are there */
    uint32_t bound[RING_SEQS], parity;
    struct topk_block topk; /* last: the rings begin behind its bins and end as its stage */
};

#define RING_AT                                                                                    \
    ((offsetof(struct ring_block, topk) + offsetof(struct topk_block, bins) +                      \
      TOPK_BINS * sizeof(uint32_t) + 127u) /                                                       \
     128u * 128u)

/* A piece of the candidates that a thread brings to the stage. */
struct ring_piece {
    uint64_t d[TOPK_STAGED / TOPK_THREADS];
};

__device__ static inline struct ring_piece ring_fetch(const uint64_t *cands, uint32_t start)
{
    struct ring_piece piece;

#pragma unroll
    for (uint32_t i = 0; i < TOPK_STAGED / TOPK_THREADS; i++)
        piece.d[i] = __ldcg(cands + start + i * TOPK_THREADS + threadIdx.x);
    return piece;
}

__device__ static inline void ring_stage(struct topk_block *topk, const struct ring_piece &piece,
                                         uint32_t n)
{
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < TOPK_STAGED / TOPK_THREADS; i++) {
        uint32_t at = i * TOPK_THREADS + threadIdx.x;
        topk->staged[at] = at < n ? piece.d[i] : 0;
    }
    __syncthreads();
}

/* Adds how many of the n staged candidates come before each of two. */
__device__ static inline void ring_count(const struct topk_block *topk, uint32_t n,
                                         const uint64_t (&mine)[2], uint32_t (&before)[2])
{
#pragma unroll 4
    for (uint32_t i = (threadIdx.x & 31u) * 2u; i < n; i += 64u) {
        ulonglong2 two = *(const ulonglong2 *)&topk->staged[i];
        before[0] += two.x > mine[0];
        before[0] += two.y > mine[0];
        before[1] += two.x > mine[1];
        before[1] += two.y > mine[1];
    }
}

__device__ static inline void ring_place(const struct topk_job *job, uint32_t seq, uint32_t base,
                                         uint64_t cand, uint32_t rank)
{
    size_t at = (size_t)seq * job->k + rank;

    if (rank >= job->k)
        return;
    job->picks[at] = base + ~(uint32_t)cand;
    if (job->out_scores)
        job->out_scores[at] = topk_score((uint32_t)(cand >> 32));
}

/*
 * Ranks the *count candidates of a sequence, two a warp at a time, the first piece of which is
 * asked for at once with their number. False, in all blocks: they cannot hold the k best, or were
 * more than there is room for.
 */
__device__ static inline bool ring_rank(const struct topk_job *job, struct topk_block *topk,
                                        uint32_t seq, const uint64_t *cands, const uint32_t *count)
{
    uint32_t at = topk_warp(), found = __ldcg(count), warps = topk_warps();
    uint32_t base = job->seqs[seq].base;
    uint64_t mine[2] = {__ldcg(cands + at % TOPK_CANDS), __ldcg(cands + (at + warps) % TOPK_CANDS)};
    struct ring_piece piece = ring_fetch(cands, 0);

    if (found > TOPK_CANDS || found < min(job->k, topk->n_rows[seq]))
        return false;
    for (uint32_t turn = blockIdx.x * RING_WARPS; turn < found; turn += 2 * warps) {
        uint32_t before[2] = {0, 0};
        for (uint32_t start = 0; start < found; start += TOPK_STAGED) {
            if (start != 0 || turn >= 2 * warps)
                piece = ring_fetch(cands, start);
            ring_stage(topk, piece, found - start);
            ring_count(topk, min(found - start, TOPK_STAGED), mine, before);
        }
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            uint32_t rank = __reduce_add_sync(KVKI_FULL_WARP, before[j]);
            if ((threadIdx.x & 31u) == 0 && at + j * warps < found)
                ring_place(job, seq, base, mine[j], rank);
        }
        at += 2 * warps;
        mine[0] = __ldcg(cands + at % TOPK_CANDS);
        mine[1] = __ldcg(cands + (at + warps) % TOPK_CANDS);
    }
    return true;
}

/* Rows within the window of a candidate, each by the first candidate that reaches it, with their
 * best in the window. All scores are stored. */
__device__ static inline void ring_widen(const struct topk_job *job, const struct ring_block *block,
                                         uint32_t seq, uint32_t found)
{
    const uint64_t *cands = job->space.cands + (size_t)seq * TOPK_CANDS;
    const float *scores = job->space.scores + seq * job->space.stride;
    uint32_t n = block->topk.n_rows[seq], lane = threadIdx.x & 31u, eps = job->eps;
    uint32_t bound = block->bound[seq], least = topk_key(-INFINITY);

    for (uint32_t i = topk_warp(); i < found; i += topk_warps()) {
        uint32_t at = ~(uint32_t)__ldcg(cands + i);
        int64_t row = (int64_t)at - 2 * (int64_t)eps + lane; /* the lane's, of 4 eps + 1 */
        bool there = lane <= 4 * eps && row >= 0 && row < (int64_t)n, first = true;
        uint32_t key = there ? topk_key(__ldcg(scores + row)) : 0, best = least;
        bool reaches = there && key >= bound;
        for (uint32_t j = 0; j <= 2 * eps; j++) { /* row at - eps + lane: its window */
            uint32_t other = __shfl_sync(KVKI_FULL_WARP, key, (int)((lane + j) & 31u));
            bool taken = __shfl_sync(KVKI_FULL_WARP, (int)reaches, (int)((lane + j) & 31u));
            best = max(best, other);
            first &= !taken || lane + j >= 2 * eps;
        }
        int64_t mine = (int64_t)at - eps + lane;
        topk_append(job->space.wide + (size_t)seq * TOPK_CANDS, job->space.n_exact + seq, best,
                    (uint32_t)mine, lane <= 2 * eps && first && mine >= 0 && mine < (int64_t)n);
    }
}

#endif
