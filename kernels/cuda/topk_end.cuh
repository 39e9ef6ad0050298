/*
 * topk_end.cuh: what follows a scan, the same for every kind of score: the exact search where the
 * candidates of the scan will not do, their ranking, and the counters set back. Device code; the
 * scheme is described in topk.cuh.
 *
 * Many candidates (of votes that are ranked again) are put together by bins of their keys first, so
 * that each is counted against few.
 *
 * topk_conclude is the way in; the whole grid calls it once, last.
 */
#ifndef KVKI_CUDA_TOPK_END_CUH
#define KVKI_CUDA_TOPK_END_CUH

#include "bins.cuh"
#include "topk.cuh"

/* Key of a row: its score's, or the best within eps rows (ESA eq. 8). */
__device__ static inline uint32_t topk_row_key(const float *scores, uint32_t n, uint32_t row,
                                               uint32_t eps)
{
    uint32_t from = row > eps ? row - eps : 0, to = eps < n - 1 - row ? row + eps : n - 1;
    uint32_t best = topk_key(-INFINITY);

    if (eps == 0)
        return topk_key(__ldcg(scores + row));
    for (uint32_t j = from; j <= to; j++)
        best = max(best, topk_key(__ldcg(scores + j)));
    return best;
}

/* Bits of digit d, the highest first, and the bits below it: 11 each, the last one 9. */
__device__ static inline uint32_t topk_digit_bits(uint32_t d)
{
    return d < TOPK_DIGITS - 1 ? TOPK_DIGIT : 64u - (TOPK_DIGITS - 1) * TOPK_DIGIT;
}

__device__ static inline uint32_t topk_digit_shift(uint32_t d)
{
    return d < TOPK_DIGITS - 1 ? 64u - (d + 1) * TOPK_DIGIT : 0u;
}

/* Counts digit d of all keys that agree with prefix above it. */
__device__ static inline void topk_count_digit(const struct topk_job *job, struct topk_block *block,
                                               uint32_t seq, uint64_t prefix, uint32_t d,
                                               uint32_t *digits)
{
    const float *scores = job->space.scores + seq * job->space.stride;
    uint32_t n = block->n_rows[seq], shift = topk_digit_shift(d), bits = topk_digit_bits(d);

    for (uint32_t i = threadIdx.x; i < TOPK_BINS; i += TOPK_THREADS)
        block->bins[i] = 0;
    __syncthreads();
    for (uint32_t row = blockIdx.x * TOPK_THREADS + threadIdx.x; row < n;
         row += gridDim.x * TOPK_THREADS) {
        uint64_t key = (uint64_t)topk_row_key(scores, n, row, job->eps) << 32 | (uint32_t)~row;
        if (d == 0 || key >> (shift + bits) == prefix)
            atomicAdd(&block->bins[(key >> shift) & ((1u << bits) - 1)], 1u);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < TOPK_BINS; i += TOPK_THREADS) {
        if (block->bins[i])
            atomicAdd(digits + i, block->bins[i]);
    }
}

/*
 * Finds the candidates of seq by the digits of their keys: at least the k best, at most
 * topk_cands_max. The whole grid calls.
 */
__device__ static inline void topk_select_exactly(const struct topk_job *job,
                                                  struct topk_block *block, uint32_t seq,
                                                  uint32_t *arrivals)
{
    const float *scores = job->space.scores + seq * job->space.stride;
    struct topk_counters *counters = job->space.counters;
    uint32_t n = block->n_rows[seq], need = job->k < n ? job->k : n, above = 0;
    uint32_t most = topk_cands_max(job);
    uint64_t prefix = 0, least = 0;

    for (uint32_t d = 0; d < TOPK_DIGITS && n > most; d++) {
        uint32_t *digits = counters->digits[d];
        struct topk_place_of at;
        topk_count_digit(job, block, seq, prefix, d, digits);
        kvki_grid_barrier(&counters->barrier, arrivals);
        at = topk_find<TOPK_BINS / 32>(digits, need - above);
        above += at.above;
        prefix = prefix << topk_digit_bits(d) | at.bin;
        least = prefix << topk_digit_shift(d);
        if (above + __ldcg(digits + at.bin) <= most)
            break;
    }
    for (uint32_t from = blockIdx.x * TOPK_THREADS; from < n; from += gridDim.x * TOPK_THREADS) {
        uint32_t row = from + threadIdx.x, key = 0;
        if (row < n)
            key = topk_row_key(scores, n, row, job->eps);
        topk_append(job->space.cands + (size_t)seq * TOPK_CANDS, job->space.n_exact + seq, key, row,
                    row < n && ((uint64_t)key << 32 | (uint32_t)~row) >= least);
    }
    kvki_grid_barrier(&counters->barrier, arrivals);
    if (threadIdx.x == 0)
        block->n_cands[seq] = __ldcg(job->space.n_exact + seq);
    for (uint32_t i = blockIdx.x * TOPK_THREADS + threadIdx.x; i < TOPK_DIGITS * TOPK_BINS;
         i += gridDim.x * TOPK_THREADS)
        counters->digits[0][i] = 0;
    kvki_grid_barrier(&counters->barrier, arrivals);
}

/* Writes one candidate at its rank, if that is among the k best. */
__device__ static inline void topk_place(const struct topk_job *job, uint32_t seq, uint64_t cand,
                                         uint32_t rank)
{
    uint32_t row = ~(uint32_t)cand, key = (uint32_t)(cand >> 32);
    size_t at = (size_t)seq * job->k + rank;

    if (rank >= job->k)
        return;
    job->picks[at] = job->seqs[seq].base + row;
    if (job->out_scores)
        job->out_scores[at] =
            job->eps ? topk_score(key) : __ldcg(job->space.scores + seq * job->space.stride + row);
}

/* Ranks TOPK_WARPS candidates of seq from `from` on, one a warp, against all of them. */
__device__ static inline void topk_rank(const struct topk_job *job, struct topk_block *block,
                                        uint32_t seq, uint32_t n_cands, uint32_t from)
{
    const uint64_t *cands = job->space.cands + (size_t)seq * TOPK_CANDS;
    uint32_t at = from + threadIdx.x / 32u, lane = threadIdx.x & 31u, before = 0;
    uint64_t mine = at < n_cands ? __ldcg(cands + at) : UINT64_MAX;

    for (uint32_t start = 0; start < n_cands; start += TOPK_STAGED) {
        uint32_t n = n_cands - start < TOPK_STAGED ? n_cands - start : TOPK_STAGED;
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < TOPK_STAGED / TOPK_THREADS; i++) {
            uint32_t slot = i * TOPK_THREADS + threadIdx.x;
            block->staged[slot] = slot < n ? __ldcg(cands + start + slot) : 0;
        }
        __syncthreads();
        for (uint32_t i = lane * 2u; i < n; i += 64u * 4u) {
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) { /* past n lie zeros, at most a stage's worth */
                ulonglong2 two =
                    *(const ulonglong2 *)&block->staged[min(i + j * 64u, TOPK_STAGED - 2)];
                bool there = i + j * 64u < n;
                before += there && two.x > mine;
                before += there && two.y > mine;
            }
        }
    }
    before = __reduce_add_sync(KVKI_FULL_WARP, before);
    if (lane == 0 && at < n_cands)
        topk_place(job, seq, mine, before);
}

/* Whether candidates are ranked by bins: there are many, and a thread for each. */
__device__ static inline bool topk_many(uint32_t n_cands)
{
    return TOPK_RANKS_MANY && n_cands > TOPK_COUNTED && n_cands <= gridDim.x * TOPK_THREADS;
}

/* Turns counts of bins into how many candidates the bins above hold, in shared memory. The block
 * calls. */
__device__ static inline void topk_bin_starts(const uint32_t *counts, uint32_t *starts)
{
    constexpr uint32_t kEach = TOPK_RANKS / TOPK_THREADS;
    uint32_t top = TOPK_RANKS - threadIdx.x * kEach, count[kEach];
    uint32_t upto = kvki_above_bins<TOPK_THREADS>(counts, TOPK_RANKS, count);

#pragma unroll
    for (uint32_t i = 0; i < kEach; i++) {
        starts[top - 1 - i] = upto;
        upto += count[i];
    }
    __syncthreads();
}

/*
 * The same for many candidates of seq: put together by bins of their keys, of which each knows how
 * many lie above; within its bin a candidate is ranked by counting, by eight lanes. A thread of the
 * grid has at most one to put. The whole grid calls.
 */
__device__ static __noinline__ void topk_rank_bins(const struct topk_job *job,
                                                   struct topk_block *block, uint32_t seq,
                                                   uint32_t n_cands, uint32_t *arrivals)
{
    struct topk_counters *counters = job->space.counters;
    uint32_t *digits = counters->digits[0], *starts = (uint32_t *)block->staged;
    const uint64_t *cands = job->space.cands + (size_t)seq * TOPK_CANDS;
    uint64_t *binned = job->space.wide + (size_t)seq * TOPK_CANDS;
    uint32_t thread = blockIdx.x * TOPK_THREADS + threadIdx.x, step = gridDim.x * TOPK_THREADS;
    uint64_t mine = thread < n_cands ? __ldcg(cands + thread) : 0;
    uint32_t bin = topk_bin((uint32_t)(mine >> 32), TOPK_RANKS), at = 0;

    if (thread < n_cands)
        at = atomicAdd(digits + bin, 1u);
    kvki_grid_barrier(&counters->barrier, arrivals);
    topk_bin_starts(digits, starts);
    if (thread < n_cands)
        binned[starts[bin] + at] = mine;
    kvki_grid_barrier(&counters->barrier, arrivals);
    for (uint32_t i = thread; i < TOPK_RANKS; i += step)
        digits[i] = 0;
    for (uint32_t first = thread / 32u * 4u; first < n_cands; first += step / 8u) {
        uint32_t slot = first + (threadIdx.x & 31u) / 8u, before = 0, end = 0;
        mine = slot < n_cands ? __ldcg(binned + slot) : 0;
        bin = topk_bin((uint32_t)(mine >> 32), TOPK_RANKS);
        end = slot >= n_cands || starts[bin] >= job->k ? 0 : bin ? starts[bin - 1] : n_cands;
#pragma unroll 4
        for (uint32_t i = starts[bin] + threadIdx.x % 8u; i < end; i += 8)
            before += __ldcg(binned + i) > mine;
        for (uint32_t lanes = 1; lanes < 8; lanes *= 2)
            before += __shfl_xor_sync(KVKI_FULL_WARP, before, lanes);
        if (threadIdx.x % 8u == 0 && end)
            topk_place(job, seq, mine, starts[bin] + before);
    }
    kvki_grid_barrier(&counters->barrier, arrivals); /* the counts are 0 for the next sequence */
}

/* Ranks the candidates of all sequences; the blocks take turns at TOPK_WARPS of them. */
__device__ static inline void topk_rank_all(const struct topk_job *job, struct topk_block *block)
{
    uint32_t turn = blockIdx.x; /* turns until this block's next */

    for (uint32_t seq = 0; seq < job->n_seqs; seq++) {
        uint32_t n = block->n_rows[seq], n_cands = block->n_cands[seq], turns = 0;
        if (blockIdx.x == 0 && threadIdx.x == 0 && !topk_kept(job, seq))
            job->n_picks[seq] = job->k < n ? job->k : n;
        turns = (n_cands + TOPK_WARPS - 1) / TOPK_WARPS;
        if (topk_many(n_cands))
            continue; /* it has been done */
        for (; turn < turns; turn += gridDim.x)
            topk_rank(job, block, seq, n_cands, turn * TOPK_WARPS);
        turn -= turns;
    }
}

/* Sets the counts of the samples back to 0, the blocks sharing them out; nobody reads them now. */
__device__ static inline void topk_clear_samples(const struct topk_job *job,
                                                 const struct topk_block *block)
{
    uint32_t thread = blockIdx.x * TOPK_THREADS + threadIdx.x, step = gridDim.x * TOPK_THREADS;

    for (uint32_t seq = 0; seq < job->n_seqs; seq++) {
        uint4 *fine = (uint4 *)(job->space.fine + (size_t)seq * TOPK_FINE);
        if (!topk_sampled(block->n_rows[seq]))
            continue;
        for (uint32_t i = thread; i < TOPK_FINE / 4; i += step)
            fine[i] = make_uint4(0, 0, 0, 0);
        for (uint32_t i = thread; i < TOPK_COARSE; i += step)
            job->space.coarse[seq * TOPK_COARSE + i] = 0;
    }
}

/* The last block to finish sets the counters back. Nothing of the workspace is used after. */
__device__ static inline void topk_finish(const struct topk_job *job)
{
    struct topk_counters *counters = job->space.counters;

    __syncthreads();
    if (threadIdx.x != 0)
        return;
    __threadfence();
    if (atomicAdd(&counters->done, 1u) != gridDim.x - 1)
        return;
    for (uint32_t seq = 0; seq < job->n_seqs; seq++)
        job->space.n_cands[seq] = job->space.n_exact[seq] = 0;
    for (uint32_t i = 0; i < TOPK_TICKETS; i++)
        counters->tickets[i][0] = 0;
    counters->barrier = counters->done = 0;
}

/* What follows the scan, the same for every kind of score; all blocks have scanned when scanned()
 * is called. */
template <class Scanned>
__device__ static inline void topk_conclude(const struct topk_job *job, struct topk_block *block,
                                            uint32_t *arrivals, Scanned scanned)
{
    kvki_grid_barrier(&job->space.counters->barrier, arrivals);
    kvki_let_next_start();
    scanned();
    for (uint32_t seq = threadIdx.x; seq < job->n_seqs; seq += TOPK_THREADS)
        block->n_cands[seq] = topk_scanned(job, block, seq);
    __syncthreads();
    for (uint32_t seq = 0; seq < job->n_seqs; seq++) {
        if (block->n_cands[seq] == UINT32_MAX)
            topk_select_exactly(job, block, seq, arrivals);
        if (topk_many(block->n_cands[seq]))
            topk_rank_bins(job, block, seq, block->n_cands[seq], arrivals);
    }
    topk_rank_all(job, block);
    topk_finish(job);
}

#endif
