/*
 * topk.cuh: the k best of long score lists while the scores are being made. Device code shared by
 * the scans (select.cu, select_ring.cu, vote.cu), which are single persistent grids:
 *
 *   1. every warp scores the first 32 rows of its share: a sample over the whole list; its better
 *      scores are counted by their upper 16 key bits (publish);
 *   2. after a grid barrier each block reads off the counts a bound that at least k of all scores
 *      should reach, with a margin (topk_bound);
 *   3. the scan goes on; what reaches the bound becomes a candidate (append), 1.2 to 3 k of them;
 *   4. after a barrier each candidate's rank is the number of candidates before it (rank_all): it
 * is picked where that is below k, and its place is its rank. No sort.
 *
 * A bound that let too few or too many through (ties, clusters) costs time, not exactness: then
 * select_exactly finds the k-th key by radix digits over the stored scores. All blocks must call
 * the functions that contain a barrier, in the same order. Counters are 0 between launches.
 *
 * A key is 32 bits in score order (-0 like 0, NaN 0 and last); with ~row below it, 64 bits in the
 * order of the contract, all different.
 */
#ifndef KVKI_CUDA_TOPK_CUH
#define KVKI_CUDA_TOPK_CUH

#include "device.cuh"

#define TOPK_THREADS 512u
#define TOPK_WARPS   (TOPK_THREADS / 32u)
#ifndef TOPK_CANDS
#define TOPK_CANDS 8192u /* candidates of a sequence, twice the largest k; votes have more */
#endif
#define TOPK_FINE    65536u
#define TOPK_COARSE  256u
#define TOPK_DIGIT   11u /* bits of a radix digit */
#define TOPK_DIGITS  6u
#define TOPK_BINS    (1u << TOPK_DIGIT)
#define TOPK_SHARED  4u /* rounds handed out, at least */
#define TOPK_TICKETS 32u
#define TOPK_STAGED  4096u /* candidates in shared memory at a time */
#define TOPK_COUNTED                                                                               \
    5000u /* candidates that are ranked against all others; more: against a bin                    \
           */
#define TOPK_RANKS      8192u /* bins of those, in counters->digits; their places in staged */
/* Whether a scan leaves so many; the others rank none against bins. */
#define TOPK_RANKS_MANY (TOPK_CANDS > 8192u)

/* Counters of one launch. */
struct topk_counters {
    uint32_t barrier, done, ring, parity, spare[28];
    uint32_t tickets[TOPK_TICKETS][32]; /* the first of each line: all warps at one would queue */
    uint32_t digits[TOPK_DIGITS][TOPK_BINS];
};

/* The workspace, cut up. */
struct topk_space {
    struct topk_counters *counters;
    uint32_t *n_cands; /* [n_seqs] that reached the bound, stored or not */
    uint32_t *n_exact; /* [n_seqs] stored by select_exactly */
    uint32_t *bounds;  /* [n_seqs] */
    uint32_t *fine;    /* [n_seqs, TOPK_FINE] */
    uint32_t *coarse;  /* [n_seqs, TOPK_COARSE] */
    uint64_t *cands;   /* [n_seqs, TOPK_CANDS] */
    uint32_t *n_ring;  /* [2, n_seqs] as n_cands, of launches by turns (select_ring.cu) */
    uint64_t *wide;    /* [n_seqs, TOPK_CANDS] candidates widened by a window (the same) */
    float *scores;     /* [n_seqs, stride] */
    size_t stride;
};

/* What a launch selects. */
struct topk_job {
    uint32_t n_seqs, k, eps, rows_max;
    const kvk_cuda_candidates *seqs;
    uint32_t *picks;
    float *out_scores;
    uint32_t *n_picks;
    const uint32_t *keep; /* [n_seqs] or NULL: where not 0, the sequence is passed over */
    struct topk_space space;
};

/* Shared memory of a block. */
struct topk_block {
    uint32_t first_group[KVK_CUDA_SEQS_MAX + 1]; /* groups of rows, all sequences in a row */
    uint32_t n_rows[KVK_CUDA_SEQS_MAX];
    union {
        uint32_t bound[KVK_CUDA_SEQS_MAX];   /* while scanning: the least key of a candidate */
        uint32_t n_cands[KVK_CUDA_SEQS_MAX]; /* then: to be ranked; UINT32_MAX: they will not do */
    };
    union {
        __align__(16) uint64_t staged[TOPK_STAGED];
        uint32_t bins[TOPK_BINS];
    };
};

/* Cuts a workspace; gives the bytes needed. base may be NULL. */
static inline size_t topk_cut(void *base, uint32_t n_seqs, uint32_t rows_max,
                              struct topk_space *space_p)
{
    char *at = (char *)base;
    size_t n = n_seqs, used = 0;

    space_p->stride = kvki_round_up(rows_max, 32);
#define TAKE(field, type, bytes)                                                                   \
    space_p->field = (type *)(at + used);                                                          \
    used += kvki_round_up(bytes, 256)
    TAKE(counters, struct topk_counters, sizeof(struct topk_counters));
    TAKE(n_cands, uint32_t, n * sizeof(uint32_t));
    TAKE(n_exact, uint32_t, n * sizeof(uint32_t));
    TAKE(bounds, uint32_t, n * sizeof(uint32_t));
    TAKE(coarse, uint32_t, n * TOPK_COARSE * sizeof(uint32_t));
    TAKE(fine, uint32_t, n * TOPK_FINE * sizeof(uint32_t));
    TAKE(cands, uint64_t, n * TOPK_CANDS * sizeof(uint64_t));
    TAKE(n_ring, uint32_t, 2 * n * sizeof(uint32_t));
    TAKE(wide, uint64_t, n * TOPK_CANDS * sizeof(uint64_t));
    TAKE(scores, float, n * space_p->stride * sizeof(float));
#undef TAKE
    return used;
}

__device__ static inline uint32_t topk_key(float score)
{
    uint32_t bits = __float_as_uint(score);

    if (score != score)
        return 0;
    if (score == 0.0f)
        return 0x80000000u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Which of n_bins bins, a power of two, a key is in: those of greater keys are greater. Scores
 * below 0 are all in the first one. */
__device__ static inline uint32_t topk_bin(uint32_t key, uint32_t n_bins)
{
    return key & 0x80000000u ? (key & 0x7fffffffu) / (0x80000000u / n_bins) : 0;
}

/* The score of a key that is not 0. */
__device__ static inline float topk_score(uint32_t key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ static inline bool topk_kept(const struct topk_job *job, uint32_t seq)
{
    return job->keep && job->keep[seq] != 0;
}

/* Fills block->first_group, for groups of group_rows, and n_rows; none of a sequence that is kept.
 */
__device__ static inline void topk_layout(const struct topk_job *job, struct topk_block *block,
                                          uint32_t group_rows)
{
    uint32_t at = threadIdx.x, n = job->n_seqs;

    for (uint32_t i = at; i < n; i += blockDim.x) {
        block->n_rows[i] = topk_kept(job, i) ? 0 : min(job->seqs[i].n_rows, job->rows_max);
        block->first_group[i + 1] = (block->n_rows[i] + group_rows - 1) / group_rows;
    }
    if (at == 0)
        block->first_group[0] = 0;
    __syncthreads();
    for (uint32_t step = 1; step < n; step *= 2) {
        uint32_t add = at < n && at >= step ? block->first_group[at + 1 - step] : 0;
        __syncthreads();
        if (at < n)
            block->first_group[at + 1] += add;
        __syncthreads();
    }
}

/* The sequence of a group; first_group is in shared memory. */
__device__ static inline uint32_t topk_seq_of(const struct topk_job *job,
                                              const struct topk_block *block, uint32_t group)
{
    uint32_t low = 0, high = job->n_seqs;

    while (high - low > 1) {
        uint32_t mid = (low + high) / 2;
        if (block->first_group[mid] <= group)
            low = mid;
        else
            high = mid;
    }
    return low;
}

/*
 * How the groups are gone through. Every skip-th one is sampled, at most one a warp. Of the rest,
 * in order, each warp has `own` consecutive ones; the last one or two rounds are handed out one by
 * one, so that no warp waits long for the others.
 */
struct topk_walk {
    uint32_t n_groups, skip, n_rest, own;
};

/* The warp's number in the grid, and how many there are. */
__device__ static inline uint32_t topk_warp()
{
    return blockIdx.x * TOPK_WARPS + threadIdx.x / 32u;
}

__device__ static inline uint32_t topk_warps()
{
    return gridDim.x * TOPK_WARPS;
}

__device__ static inline struct topk_walk topk_plan(uint32_t n_groups)
{
    struct topk_walk w = {n_groups, 1, 0, 0};

    w.skip = max(1u, (n_groups + topk_warps() - 1) / topk_warps());
    w.n_rest = n_groups - (n_groups + w.skip - 1) / w.skip;
    w.own = max(w.n_rest / topk_warps(), TOPK_SHARED) - TOPK_SHARED;
    return w;
}

/* The group that is number `rest` of those not sampled. */
__device__ static inline uint32_t topk_rest(const struct topk_walk *w, uint32_t rest)
{
    return rest / (w->skip - 1) * w->skip + 1 + rest % (w->skip - 1);
}

/* The next of the rest to hand out, in lane 0; a warp's first follows from its number. Warps draw
 * from TOPK_TICKETS rows of tickets. */
__device__ static inline uint32_t topk_ticket(const struct topk_job *job, const struct topk_walk *w)
{
    uint32_t row = topk_warp() % TOPK_TICKETS, ticket = 0;

    if ((threadIdx.x & 31u) == 0)
        ticket = atomicAdd(&job->space.counters->tickets[row][0], 1u);
    return (w->own + 1) * topk_warps() + ticket * TOPK_TICKETS + row;
}

/* True where the sample decides the bound: a short list is all candidates. */
__device__ static inline bool topk_sampled(uint32_t n_rows)
{
    return n_rows > TOPK_CANDS;
}

/* Makes candidates of the lanes that want; the whole warp calls. */
__device__ static inline void topk_append(uint64_t *cands, uint32_t *count, uint32_t key,
                                          uint32_t row, bool want)
{
    uint32_t lanes = __ballot_sync(KVKI_FULL_WARP, want), lane = threadIdx.x & 31u, at = 0;

    if (lanes == 0)
        return;
    if (lane == 0)
        at = atomicAdd(count, (uint32_t)__popc(lanes));
    at = __shfl_sync(KVKI_FULL_WARP, at, 0) + (uint32_t)__popc(lanes & ((1u << lane) - 1u));
    if (want && at < TOPK_CANDS)
        cands[at] = (uint64_t)key << 32 | (uint32_t)~row;
}

/* Where the need-th item lies, counted from the top: its bin (n_bins: there are fewer), and how
 * many items the bins above hold. */
struct topk_place_of {
    uint32_t bin, above;
};

/* The lane whose items, counted from lane 0 on, include the need-th; 32: none. *above_p: the items
 * of the lanes before it. */
__device__ static inline uint32_t topk_find_lane(uint32_t own, uint32_t need, uint32_t *above_p)
{
    uint32_t lane = threadIdx.x & 31u, upto = own, lanes = 0, found = 32;

    for (uint32_t step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(KVKI_FULL_WARP, upto, step);
        upto += lane >= step ? other : 0;
    }
    lanes = __ballot_sync(KVKI_FULL_WARP, upto >= need);
    found = lanes ? (uint32_t)__ffs((int)lanes) - 1 : 32;
    *above_p = __shfl_sync(KVKI_FULL_WARP, upto - own, (int)(found & 31u));
    return found;
}

/* Eight counts of one lane, the last one first, to lanes 0 to 7; 0 to the others. */
__device__ static inline uint32_t topk_share_out(const uint4 (&counts)[2], uint32_t owner)
{
    const uint32_t all[8] = {counts[1].w, counts[1].z, counts[1].y, counts[1].x,
                             counts[0].w, counts[0].z, counts[0].y, counts[0].x};
    uint32_t mine = 0;

#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t count = __shfl_sync(KVKI_FULL_WARP, all[i], (int)owner);
        mine = (threadIdx.x & 31u) == i ? count : mine;
    }
    return mine;
}

/* Finds it in bins that others wrote. A whole warp calls. Each lane sums kEach bins, the first lane
 * the top ones; then the bins of the lane that has it are shared out. */
template <uint32_t kEach>
__device__ static inline struct topk_place_of topk_find(const uint32_t *bins, uint32_t need)
{
    uint32_t lane = threadIdx.x & 31u, own = 0, above = 0, owner = 0, top = 0;
    struct topk_place_of at = {32u * kEach, 0};
    uint4 low[2] = {};

#pragma unroll 4
    for (uint32_t i = 0; i < kEach; i += 4) {
        uint4 d = __ldcg((const uint4 *)(bins + (31u - lane) * kEach + i));
        own += d.x + d.y + d.z + d.w;
        if (i < 8)
            low[i / 4] = d;
    }
    owner = topk_find_lane(own, need, &at.above);
    if (owner == 32)
        return at;
    top = (32u - owner) * kEach;
    for (uint32_t from = 0; from < kEach; from += 32) {
        uint32_t count = 0, found = 0;
        if (kEach == 8)
            count = topk_share_out(low, owner);
        else if (from + lane < kEach)
            count = __ldcg(bins + top - 1 - from - lane);
        found = topk_find_lane(count, need - at.above, &above);
        if (found < 32) {
            at.bin = top - 1 - from - found;
            at.above += above;
            return at;
        }
        at.above += __reduce_add_sync(KVKI_FULL_WARP, count);
    }
    return at;
}

/* How many of a sequence's groups are sampled. */
__device__ static inline uint32_t topk_sampled_groups(const struct topk_block *block, uint32_t seq,
                                                      const struct topk_walk *walk)
{
    return (block->first_group[seq + 1] + walk->skip - 1) / walk->skip -
           (block->first_group[seq] + walk->skip - 1) / walk->skip;
}

/* How many of the sample should reach the bound: the share of k in it and a margin of six
 * deviations, or k itself where everything is sampled. */
__device__ static inline uint32_t topk_need(const struct topk_job *job,
                                            const struct topk_block *block, uint32_t seq,
                                            const struct topk_walk *walk)
{
    uint32_t groups = block->first_group[seq + 1] - block->first_group[seq];
    uint32_t sampled = topk_sampled_groups(block, seq, walk);
    float expected = (float)job->k * (float)sampled / (float)groups;

    return sampled < groups ? (uint32_t)(expected + 6.0f * sqrtf(expected) + 16.0f) : job->k;
}

/*
 * Counts the best sample score of every few lanes: of as many as leave twice the scores needed,
 * since all warps meet in few counters. A better one that is left out only lowers the bound. In
 * fine at once; in coarse through the block's own counters where seq is the block's first. A key of
 * 0 is no score. All threads of the block call.
 */
__device__ static inline void topk_publish(const struct topk_job *job, struct topk_block *block,
                                           uint32_t block_seq, uint32_t seq,
                                           const struct topk_walk *walk, uint32_t key)
{
    uint32_t *coarse = job->space.coarse + (size_t)block_seq * TOPK_COARSE;
    uint32_t best = key, lanes = 32, scores = 0, need = 0;

    for (uint32_t i = threadIdx.x; i < TOPK_COARSE; i += TOPK_THREADS)
        block->bins[i] = 0;
    __syncthreads();
    if (seq < job->n_seqs && topk_sampled(block->n_rows[seq])) {
        need = topk_need(job, block, seq, walk);
        scores = topk_sampled_groups(block, seq, walk) * 32u;
        while (lanes > 1 && scores / lanes < 4 * need)
            lanes /= 2;
        for (uint32_t step = 1; step < lanes; step *= 2)
            best = max(best, __shfl_xor_sync(KVKI_FULL_WARP, best, step));
        if (key && key == best) {
            atomicAdd(job->space.fine + (size_t)seq * TOPK_FINE + (key >> 16), 1u);
            if (seq == block_seq)
                atomicAdd(&block->bins[key >> 24], 1u);
            else
                atomicAdd(job->space.coarse + (size_t)seq * TOPK_COARSE + (key >> 24), 1u);
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < TOPK_COARSE; i += TOPK_THREADS) {
        if (block->bins[i])
            atomicAdd(coarse + i, block->bins[i]);
    }
}

/* The least key of a candidate of seq; 0 where everything is one. A whole warp calls. */
__device__ static inline uint32_t topk_bound(const struct topk_job *job,
                                             const struct topk_block *block, uint32_t seq,
                                             const struct topk_walk *walk)
{
    uint32_t need = topk_need(job, block, seq, walk);
    struct topk_place_of coarse, fine;

    if (!topk_sampled(block->n_rows[seq]))
        return 0;
    coarse = topk_find<TOPK_COARSE / 32>(job->space.coarse + (size_t)seq * TOPK_COARSE, need);
    if (coarse.bin == TOPK_COARSE)
        return 0;
    fine = topk_find<8>(job->space.fine + (size_t)seq * TOPK_FINE + (size_t)coarse.bin * 256u,
                        need - coarse.above);
    return coarse.bin << 24 | fine.bin << 16;
}

/* Fills block->bound once all blocks have arrived with their samples. A few sequences: every block
 * finds them for itself; many: the warps of the grid share them out. The whole grid calls. */
__device__ static inline void topk_bounds(const struct topk_job *job, struct topk_block *block,
                                          const struct topk_walk *walk, uint32_t *arrivals)
{
    bool shared = job->n_seqs > TOPK_WARPS;
    uint32_t step = shared ? topk_warps() : TOPK_WARPS;

    kvki_grid_wait(&job->space.counters->barrier, arrivals);
    for (uint32_t seq = shared ? topk_warp() : threadIdx.x / 32u; seq < job->n_seqs; seq += step) {
        uint32_t bound = topk_bound(job, block, seq, walk);
        if ((threadIdx.x & 31u) == 0)
            *(shared ? job->space.bounds + seq : block->bound + seq) = bound;
    }
    if (shared) {
        kvki_grid_barrier(&job->space.counters->barrier, arrivals);
        for (uint32_t seq = threadIdx.x; seq < job->n_seqs; seq += TOPK_THREADS)
            block->bound[seq] = __ldcg(job->space.bounds + seq);
    }
    __syncthreads();
}

/* Candidates beyond which the exact search is less work than ranking them all. */
__device__ static inline uint32_t topk_cands_max(const struct topk_job *job)
{
    return min(TOPK_CANDS, max(8192u, 2u * job->k));
}

/* How many candidates the scan left, the same answer in every block; UINT32_MAX where they need not
 * hold the k best. */
__device__ static inline uint32_t topk_scanned(const struct topk_job *job,
                                               const struct topk_block *block, uint32_t seq)
{
    uint32_t n = block->n_rows[seq], found = __ldcg(job->space.n_cands + seq);

    return job->eps == 0 && found <= topk_cands_max(job) && found >= min(job->k, n) ? found
                                                                                    : UINT32_MAX;
}

#endif
