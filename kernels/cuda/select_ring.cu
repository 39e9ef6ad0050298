/*
 * select_ring.cu: the scan of topk.cuh's scheme for rows of 128 and 64 bytes, on sm_90 on: the copy
 * engine brings 32 rows at a time into rings in shared memory, one ring a warp, and nothing waits
 * for the bound.
 *
 * The sample's counts travel and are searched by one warp a sequence, while the others score on and
 * hold the keys in shared memory; when the bound is known, what was held is compared with it.
 * Scores are stored only where a window is asked for. With one (ESA eq. 8), the sample counts its
 * rows' best within the window as far as its 32 rows show it; what reaches the bound is then
 * widened by the window on both sides, which is all that can be among the k best, and ranked by its
 * best in the window. Candidates that will not do: the rows are scored once more and stored, and
 * the exact search of topk_end.cuh takes over.
 *
 * Barriers of the grid count round by themselves: the first to gridDim.x, the second back to 0.
 */
#include "bulk.cuh"
#include "ring_end.cuh"
#include "select_ring.cuh"

/* A warp's view of the scan. kOne: there is one sequence. */
template <class Form, bool kOne> struct ring_scan {
    const struct select_params *p;
    struct ring_block *block;
    struct ring_warp *warp;
    uint8_t *slots;
    struct topk_walk walk;
    uint32_t rounds, magic; /* samples a warp at most; for the division by skip - 1 */
    Form form;
    uint32_t seq; /* whose query the form holds; n_seqs: of none */
    uint32_t n_sampled, lanes, at, ticket, n_held, *n_cands; /* lanes: ring_sample_lanes */
    uint32_t known, bound; /* whether all bounds are; that of one sequence */
    const uint8_t *index;  /* of one sequence */
};

/* Two barriers a launch, of which `which` is 0 or 1; arrivals go round, so nothing is set back. One
 * thread calls, for what its block wrote before. */
__device__ static inline void ring_arrive(const struct topk_job *job)
{
    __threadfence();
    atomicInc(&job->space.counters->ring, 2u * gridDim.x - 1u);
}

__device__ static inline void ring_await(const struct topk_job *job, uint32_t which)
{
    const uint32_t *counter = &job->space.counters->ring;

    while ((kvki_load_acquire(counter) >= gridDim.x) == (which == 1)) {
    }
}

/* As topk_plan, for one or two sampled groups a warp. */
template <class Form, bool kOne>
__device__ static inline void ring_plan(struct ring_scan<Form, kOne> *s, uint32_t n_groups)
{
    uint32_t warps = topk_warps(), samples = 0;
    struct topk_walk w = {n_groups, 1, 0, 0};

    s->rounds = n_groups >= RING_MANY * warps ? 2 : 1;
    w.skip = max(1u, (n_groups + warps * s->rounds - 1) / (warps * s->rounds));
    samples = (n_groups + w.skip - 1) / w.skip;
    w.n_rest = n_groups - samples;
    w.own = max(w.n_rest / warps, TOPK_SHARED) - TOPK_SHARED;
    s->walk = w;
    s->magic = w.skip > 2 ? UINT32_MAX / (w.skip - 1) + 1 : 0;
    s->n_sampled = min(max(samples, topk_warp() * s->rounds) - topk_warp() * s->rounds, s->rounds);
}

/* topk_rest without a division: exact for as many groups as there can be. */
template <class Form, bool kOne>
__device__ static inline uint32_t ring_rest(const struct ring_scan<Form, kOne> *s, uint32_t rest)
{
    uint32_t q = s->walk.skip == 2 ? rest : __umulhi(rest, s->magic);
    return rest + q + 1; /* q skip + 1 + rest - q (skip - 1) */
}

/* The next of the rest to hand out, in lane 0, as topk_ticket: a row of tickets is shared by warps
 * of every number, since those that find bounds come late. */
__device__ static inline uint32_t ring_ticket(const struct topk_job *job, const struct topk_walk *w)
{
    uint32_t row = (blockIdx.x + threadIdx.x / 32u) % TOPK_TICKETS, ticket = 0;

    if ((threadIdx.x & 31u) == 0)
        ticket = atomicAdd(&job->space.counters->tickets[row][0], 1u);
    return (w->own + 1) * topk_warps() + ticket * TOPK_TICKETS + row;
}

/* The warp's group of number `at`, where that is a sample or one of its own. */
template <class Form, bool kOne>
__device__ static inline uint32_t ring_own(const struct ring_scan<Form, kOne> *s, uint32_t at)
{
    return at < s->n_sampled ? (topk_warp() * s->rounds + at) * s->walk.skip
                             : ring_rest(s, topk_warp() * s->walk.own + at - s->n_sampled);
}

/* The warp's next group; RING_NONE: there is none. First its samples, then its own, then what is
 * handed out, for which lane 0 asks one ahead. */
template <class Form, bool kOne>
__device__ static inline uint32_t ring_next(struct ring_scan<Form, kOne> *s)
{
    const struct topk_walk *w = &s->walk;
    uint32_t at = s->at, static_ones = s->n_sampled + w->own, rest = 0;

    s->at++;
    if (at < static_ones)
        return ring_own(s, at);
    rest = w->own * topk_warps() + topk_warp();
    if (at > static_ones)
        rest = __shfl_sync(KVKI_FULL_WARP, s->ticket, 0);
    if (rest >= w->n_rest) {
        s->at--; /* there are no more */
        return RING_NONE;
    }
    s->ticket = ring_ticket(&s->p->job, w);
    return ring_rest(s, rest);
}

template <class Form, bool kOne>
__device__ static inline uint32_t ring_seq_of(const struct ring_scan<Form, kOne> *s, uint32_t group)
{
    return kOne ? 0 : topk_seq_of(&s->p->job, &s->block->topk, group);
}

/* The first row of a group in its sequence. */
template <class Form, bool kOne>
__device__ static inline uint32_t ring_first_row(const struct ring_scan<Form, kOne> *s,
                                                 uint32_t seq, uint32_t group)
{
    return (group - (kOne ? 0 : s->block->topk.first_group[seq])) * ring_group<Form>::kRows;
}

/* Asks for the warp's next group to be brought into a slot of its ring. */
template <class Form, bool kOne>
__device__ static inline void ring_ask(struct ring_scan<Form, kOne> *s, uint32_t slot)
{
    uint32_t group = ring_next(s);

    if ((threadIdx.x & 31u) != 0)
        return;
    s->warp->slot_group[slot] = group;
    if (group == RING_NONE)
        return;
    uint32_t seq = ring_seq_of(s, group), first = ring_first_row(s, seq, group);
    uint32_t rows = min(s->block->topk.n_rows[seq] - first, ring_group<Form>::kRows);
    const uint8_t *index = kOne ? s->index : (const uint8_t *)s->p->job.seqs[seq].index;

    bulk_expect(&s->warp->full[slot], rows * Form::kBytes);
    bulk_copy(s->slots + slot * RING_BYTES, index + (size_t)first * Form::kBytes,
              rows * Form::kBytes, &s->warp->full[slot]);
}

/* Fills the ring while the op before still runs: with groups that are full by the number of rows of
 * this moment, and need no ticket. Gives how many groups it counted on. */
template <class Form, bool kOne>
__device__ static inline uint32_t ring_begin_early(struct ring_scan<Form, kOne> *s)
{
    const kvk_cuda_candidates *seq = s->p->job.seqs;
    uint32_t n_rows = min(__ldcg(&seq->n_rows), s->p->job.rows_max); /* past L1: it may change */
    uint32_t n_groups = (n_rows + ring_group<Form>::kRows - 1) / ring_group<Form>::kRows;
    const uint8_t *index = (const uint8_t *)__ldcg((const unsigned long long *)&seq->index);

    ring_plan(s, n_groups);
    for (; s->at < min(RING_SLOTS, s->n_sampled + s->walk.own); s->at++) {
        uint32_t group = ring_own(s, s->at);
        if (group + 1 >= n_groups)
            break;
        if ((threadIdx.x & 31u) != 0)
            continue;
        s->warp->slot_group[s->at] = group;
        bulk_expect(&s->warp->full[s->at], RING_BYTES);
        bulk_copy(s->slots + s->at * RING_BYTES, index + (size_t)group * RING_BYTES, RING_BYTES,
                  &s->warp->full[s->at]);
    }
    return n_groups;
}

/* What was asked for early is not what the warp begins with: the ring is empty again. */
template <class Form, bool kOne>
__device__ static inline void ring_drop_early(struct ring_scan<Form, kOne> *s)
{
    uint32_t lane = threadIdx.x & 31u;

    if (lane < s->at) {
        bulk_wait(&s->warp->full[lane], 0);
        bulk_drop(&s->warp->full[lane]);
        bulk_init(&s->warp->full[lane], 1);
    }
    bulk_begin();
    __syncwarp();
    s->at = 0;
}

/* Keys of a lane's rows of a group. */
template <class Form> struct ring_keys {
    uint32_t of[ring_group<Form>::kPer];
};

/* Waits for a slot's group and scores it; asks for the next one there. Keys are 0 where there is no
 * row. */
template <class Form, bool kOne>
__device__ static inline struct ring_keys<Form>
ring_score(struct ring_scan<Form, kOne> *s, uint32_t slot, uint32_t parity, uint32_t group) {
    constexpr uint32_t kPer = ring_group<Form>::kPer;
    const struct topk_job *job = &s->p->job;
    const struct topk_block *topk = &s->block->topk;
    struct ring_keys<Form> keys;
    uint4 d[kPer][Form::kLanes];

    if (kOne ? s->seq != 0
             : s->seq == job->n_seqs || group < topk->first_group[s->seq] ||
                   group >= topk->first_group[s->seq + 1]) {
        s->seq = ring_seq_of(s, group);
        s->form.load_query_shared(s->p, s->seq, s->warp->query);
    }
    bulk_wait(&s->warp->full[slot], parity);
#pragma unroll
    for (uint32_t i = 0; i < kPer; i++)
        Form::load_shared(s->slots + slot * RING_BYTES + i * 32u * Form::kBytes, d[i]);
    __syncwarp();
    ring_ask(s, slot);
    uint32_t row = ring_first_row(s, s->seq, group) + Form::row_of_lane();
#pragma unroll
    for (uint32_t i = 0; i < kPer; i++, row += 32u) {
        float x = s->form.score_of(d[i]);
        bool there = row < topk->n_rows[s->seq];
        if (job->eps && there)
            job->space.scores[s->seq * job->space.stride + row] = x;
        keys.of[i] = there ? topk_key(x) : 0;
    }
    return keys;
}

/* Makes candidates of the lane's rows that reach the bound of their sequence, which is known. */
template <class Form, bool kOne>
__device__ static inline void ring_consider(const struct ring_scan<Form, kOne> *s, uint32_t group,
                                            const struct ring_keys<Form> &keys)
{
    constexpr uint32_t kPer = ring_group<Form>::kPer;
    const struct topk_job *job = &s->p->job;
    uint32_t seq = ring_seq_of(s, group), bound = kOne ? s->bound : s->block->bound[seq];
    uint32_t row = ring_first_row(s, seq, group) + Form::row_of_lane();

#pragma unroll
    for (uint32_t i = 0; i < kPer; i++, row += 32u)
        topk_append(job->space.cands + (size_t)seq * TOPK_CANDS, s->n_cands + seq, keys.of[i], row,
                    keys.of[i] >= bound && row < s->block->topk.n_rows[seq]);
}

/* Looks whether all bounds are known by now; if so, what is held is compared with them. */
template <class Form, bool kOne>
__device__ static inline void ring_let_go(struct ring_scan<Form, kOne> *s)
{
    if (!__all_sync(KVKI_FULL_WARP, bulk_ended(&s->block->known, 0)))
        return;
    s->known = 1;
    s->bound = s->block->bound[0];
    for (uint32_t i = 0; i < s->n_held; i++) {
        struct ring_keys<Form> keys;
#pragma unroll
        for (uint32_t j = 0; j < ring_group<Form>::kPer; j++)
            keys.of[j] = s->warp->held[i][j][threadIdx.x & 31u];
        ring_consider(s, s->warp->held_group[i], keys);
    }
    s->n_held = 0;
}

template <class Form, bool kOne>
__device__ static inline void ring_hold(struct ring_scan<Form, kOne> *s, uint32_t group,
                                        const struct ring_keys<Form> &keys)
{
    uint32_t lane = threadIdx.x & 31u;

#pragma unroll
    for (uint32_t j = 0; j < ring_group<Form>::kPer; j++)
        s->warp->held[s->n_held][j][lane] = keys.of[j];
    if (lane == 0)
        s->warp->held_group[s->n_held] = group;
    __syncwarp();
    s->n_held++;
}

/* What a held sample counts as: its key, or with a window the best within it that its 32 rows show.
 */
template <class Form, bool kOne>
__device__ static inline uint32_t ring_sample_key(const struct ring_scan<Form, kOne> *s,
                                                  uint32_t key)
{
    uint32_t row = Form::row_of_lane(), best = key;

    for (uint32_t e = 1; e <= s->p->job.eps; e++) {
        uint32_t low = __shfl_sync(KVKI_FULL_WARP, key, (int)Form::lane_of_row((row - e) & 31u));
        uint32_t high = __shfl_sync(KVKI_FULL_WARP, key, (int)Form::lane_of_row((row + e) & 31u));
        best = max(best, row >= e ? low : 0u);
        best = max(best, row + e < 32u ? high : 0u);
    }
    return key ? best : 0;
}

/* As topk_publish: of how many lanes of a sample the best counts; 0: the sequence is not sampled.
 */
template <class Form, bool kOne>
__device__ static inline uint32_t ring_sample_lanes(const struct ring_scan<Form, kOne> *s,
                                                    uint32_t seq)
{
    const struct topk_block *topk = &s->block->topk;
    uint32_t lanes = 32, need = 0, scores = 0;

    if (!topk_sampled(topk->n_rows[seq]))
        return 0;
    need = topk_need(&s->p->job, topk, seq, &s->walk);
    scores = topk_sampled_groups(topk, seq, &s->walk) * ring_group<Form>::kRows;
    while (lanes > 1 && scores / lanes < 4 * need)
        lanes /= 2;
    return lanes;
}

/* Counts 32 sampled keys. block_seq: the sequence of the block's own bins. */
template <class Form, bool kOne>
__device__ static inline void ring_count_sample(struct ring_scan<Form, kOne> *s, uint32_t seq,
                                                uint32_t block_seq, uint32_t key)
{
    const struct topk_job *job = &s->p->job;
    uint32_t best = key, lanes = kOne ? s->lanes : ring_sample_lanes(s, seq);

    if (lanes == 0)
        return;
    for (uint32_t step = 1; step < lanes; step *= 2)
        best = max(best, __shfl_xor_sync(KVKI_FULL_WARP, best, step));
    if (key == 0 || key != best)
        return;
    atomicAdd(job->space.fine + (size_t)seq * TOPK_FINE + (key >> 16), 1u);
    if (seq == block_seq)
        atomicAdd(&s->block->topk.bins[key >> 24], 1u);
    else
        atomicAdd(job->space.coarse + (size_t)seq * TOPK_COARSE + (key >> 24), 1u);
}

/* Counts the warp's held samples; the first warp, once all warps of the block have, adds the
 * block's bins to the list's and arrives. Bins are 0 before. */
template <class Form, bool kOne>
__device__ static inline void ring_publish(struct ring_scan<Form, kOne> *s)
{
    const struct topk_job *job = &s->p->job;
    const struct topk_block *topk = &s->block->topk;
    uint32_t lane = threadIdx.x & 31u, last = s->walk.n_groups ? s->walk.n_groups - 1 : 0;
    uint32_t block_seq =
        ring_seq_of(s, min(blockIdx.x * RING_WARPS * s->rounds * s->walk.skip, last));

    for (uint32_t i = 0; i < s->n_held; i++) {
        uint32_t seq = ring_seq_of(s, s->warp->held_group[i]);
        for (uint32_t j = 0; j < ring_group<Form>::kPer; j++)
            ring_count_sample(s, seq, block_seq, ring_sample_key(s, s->warp->held[i][j][lane]));
    }
    __syncwarp();
    if (lane == 0)
        bulk_arrive(&s->block->published);
    if (threadIdx.x >= 32u)
        return;
    bulk_wait(&s->block->published, 0);
    for (uint32_t i = lane; i < TOPK_COARSE; i += 32u) {
        if (topk->bins[i])
            atomicAdd(job->space.coarse + (size_t)block_seq * TOPK_COARSE + i, topk->bins[i]);
    }
    __syncwarp();
    if (lane == 0)
        ring_arrive(job);
}

/* The bound of the sequence of this warp's number, once all blocks have counted their samples. */
template <class Form, bool kOne>
__device__ static inline void ring_find_bound(const struct ring_scan<Form, kOne> *s)
{
    uint32_t seq = threadIdx.x / 32u, bound = 0;

    if (seq >= s->p->job.n_seqs)
        return;
    if ((threadIdx.x & 31u) == 0)
        ring_await(&s->p->job, 0);
    __syncwarp();
    bound = topk_bound(&s->p->job, &s->block->topk, seq, &s->walk);
    if ((threadIdx.x & 31u) == 0) {
        s->block->bound[seq] = bound;
        bulk_arrive(&s->block->known);
    }
    __syncwarp();
}

/* Waits for the bounds where no more can be held. */
template <class Form, bool kOne>
__device__ static inline void ring_take(struct ring_scan<Form, kOne> *s, uint32_t group,
                                        const struct ring_keys<Form> &keys)
{
    if (!s->known) {
        do
            ring_let_go(s);
        while (!s->known && s->n_held == RING_HELD);
    }
    if (s->known)
        ring_consider(s, group, keys);
    else
        ring_hold(s, group, keys);
}

template <class Form, bool kOne>
__device__ static inline void ring_scan_all(struct ring_scan<Form, kOne> *s)
{
    uint32_t n = 0; /* groups scored: slot and parity follow */

    for (uint32_t i = s->at; i < RING_SLOTS; i++) /* the others were asked for early */
        ring_ask(s, i);
    __syncwarp();
    if (kOne)
        s->lanes = ring_sample_lanes(s, 0);
    for (; n < s->n_sampled; n++) {
        uint32_t slot = n % RING_SLOTS, group = s->warp->slot_group[slot];
        ring_hold(s, group, ring_score(s, slot, n / RING_SLOTS & 1u, group));
    }
    ring_publish(s);
    ring_find_bound(s);
    for (;; n++) {
        uint32_t slot = n % RING_SLOTS, group = s->warp->slot_group[slot];
        if (group == RING_NONE)
            break;
        ring_take(s, group, ring_score(s, slot, n / RING_SLOTS & 1u, group));
    }
    while (!s->known)
        ring_let_go(s);
}

/* The exact search of a sequence whose candidates will not do. The whole grid calls. */
template <class Form, bool kOne>
__device__ static void ring_search(struct ring_scan<Form, kOne> *s, uint32_t seq,
                                   uint32_t *arrivals)
{
    const struct topk_job *job = &s->p->job;
    struct topk_block *topk = &s->block->topk;
    uint32_t n = topk->n_rows[seq];

    if (blockIdx.x == 0 && threadIdx.x == 0)
        job->space.n_exact[seq] = 0;
    if (!job->eps && s->seq != seq) {
        s->seq = seq;
        s->form.load_query(s->p, seq, NULL);
    }
    for (uint32_t at = topk_warp() * 32u; !job->eps && at < n; at += topk_warps() * 32u) {
        uint32_t row = at + Form::row_of_lane();
        const uint8_t *rows = (const uint8_t *)job->seqs[seq].index + (size_t)at * Form::kBytes;
        float x = s->form.score(rows, min(n - at, 32u), 0, NULL);
        if (row < n)
            job->space.scores[seq * job->space.stride + row] = x;
    }
    kvki_grid_barrier(&job->space.counters->barrier, arrivals);
    topk_select_exactly(job, topk, seq, arrivals);
    (void)ring_rank(job, topk, seq, job->space.cands + (size_t)seq * TOPK_CANDS,
                    job->space.n_exact + seq);
}

/* Counters of the next launch: the other parity's counts, and what a search used. */
__device__ static inline void ring_finish(const struct topk_job *job, bool searched)
{
    struct topk_counters *counters = job->space.counters;

    if (!searched)
        return;
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    __threadfence();
    if (atomicAdd(&counters->done, 1u) != gridDim.x - 1)
        return;
    for (uint32_t seq = 0; seq < job->n_seqs; seq++)
        job->space.n_exact[seq] = 0;
    counters->barrier = counters->done = 0;
}

/* All blocks have scanned. */
template <class Form, bool kOne>
__device__ static inline void ring_conclude(struct ring_scan<Form, kOne> *s)
{
    const struct topk_job *job = &s->p->job;
    struct ring_block *block = s->block;
    struct topk_counters *counters = job->space.counters;
    uint32_t arrivals = 0;
    bool searched = job->eps != 0;

    __syncthreads();
    if (threadIdx.x == 0) {
        ring_arrive(job);
        ring_await(job, 1);
    }
    __syncthreads();
    kvki_let_next_start();
    if (job->eps) {
        for (uint32_t seq = 0; seq < job->n_seqs; seq++) {
            uint32_t found = __ldcg(s->n_cands + seq);
            ring_widen(job, block, seq, found > TOPK_CANDS ? 0 : found);
        }
        kvki_grid_barrier(&counters->barrier, &arrivals);
    }
    topk_clear_samples(job, &block->topk);
    for (uint32_t seq = 0; seq < job->n_seqs; seq++) {
        const uint32_t *count = (job->eps ? job->space.n_exact : s->n_cands) + seq;
        const uint64_t *cands =
            (job->eps ? job->space.wide : job->space.cands) + (size_t)seq * TOPK_CANDS;
        if (blockIdx.x == 0 && threadIdx.x == 0 && !topk_kept(job, seq))
            job->n_picks[seq] = min(job->k, block->topk.n_rows[seq]);
        if (ring_rank(job, &block->topk, seq, cands, count))
            continue;
        kvki_grid_barrier(&counters->barrier, &arrivals); /* all have read the count */
        ring_search(s, seq, &arrivals);
        searched = true;
    }
    if (blockIdx.x == 0) { /* nobody looks at these any more */
        for (uint32_t i = threadIdx.x; i < TOPK_TICKETS; i += TOPK_THREADS)
            counters->tickets[i][0] = 0;
        for (uint32_t i = threadIdx.x; i < job->n_seqs; i += TOPK_THREADS)
            job->space.n_ring[(block->parity ^ 1u) * job->n_seqs + i] = 0;
        if (threadIdx.x == 0)
            counters->parity = block->parity ^ 1u;
    }
    ring_finish(job, searched);
}

template <class Form, bool kOne>
__global__ void __launch_bounds__(TOPK_THREADS, 1) ring_kernel(const struct select_params p)
{
    extern __shared__ __align__(128) uint8_t shared[];
    struct ring_block *block = (struct ring_block *)shared;
    struct ring_scan<Form, kOne> s;
    uint32_t warp = threadIdx.x / 32u, early = 0; /* groups counted on */

    if ((threadIdx.x & 31u) < RING_SLOTS)
        bulk_init(&block->warps[warp].full[threadIdx.x & 31u], 1);
    if (threadIdx.x == 0) {
        bulk_init(&block->published, RING_WARPS);
        bulk_init(&block->known, p.job.n_seqs);
    }
    bulk_begin();
    __syncwarp();
    s.p = &p;
    s.block = block;
    s.warp = &block->warps[warp];
    s.slots = shared + RING_AT + (size_t)warp * RING_SLOTS * RING_BYTES;
    s.seq = p.job.n_seqs;
    s.at = s.n_held = s.ticket = s.known = s.bound = 0;
    if (kOne && p.early)
        early = ring_begin_early(&s);
    for (uint32_t i = threadIdx.x; i < TOPK_COARSE; i += TOPK_THREADS)
        block->topk.bins[i] = 0;
    if (threadIdx.x == 0)
        kvki_prefetch(p.job.space.counters);
    if (threadIdx.x < p.job.n_seqs)
        kvki_prefetch(p.job.seqs + threadIdx.x);
    if (threadIdx.x * 32u < p.job.n_seqs * p.dims)
        kvki_prefetch(p.q + threadIdx.x * 32u);
    kvki_wait_for_previous();
    if (threadIdx.x == 0)
        block->parity = p.job.space.counters->parity;
    s.index = (const uint8_t *)p.job.seqs[0].index;
    topk_layout(&p.job, &block->topk, ring_group<Form>::kRows);
    if (kOne && s.at && early != block->topk.first_group[p.job.n_seqs])
        ring_drop_early(&s);
    ring_plan(&s, block->topk.first_group[p.job.n_seqs]);
    s.n_cands = p.job.space.n_ring + block->parity * p.job.n_seqs;
    ring_scan_all(&s);
    ring_conclude(&s);
}

static size_t ring_smem(void)
{
    size_t rings = RING_AT + (size_t)RING_WARPS * RING_SLOTS * RING_BYTES;
    return rings > sizeof(struct ring_block) ? rings : sizeof(struct ring_block);
}

bool kvki_select_ring_takes(const kvk_cuda *cuda, const struct select_params *p)
{
    return cuda->info.sm >= 90 && (p->dims == 126 || p->dims == 62) && p->job.n_seqs <= RING_SEQS &&
           p->job.eps <= RING_EPS && ring_smem() <= (size_t)cuda->smem_block_max;
}

/* All blocks at once, which may begin while the kernel before ends. */
kvc_status kvki_select_ring(const kvk_cuda *cuda, const struct select_params *p, kvk_stream *stream)
{
    bool one = p->job.n_seqs == 1;
    void (*kernel)(const struct select_params) =
        p->dims == 126
            ? one ? ring_kernel<fast_form<128>, true> : ring_kernel<fast_form<128>, false>
        : one ? ring_kernel<fast_form<64>, true>
              : ring_kernel<fast_form<64>, false>;
    int blocks = 0;
    kvc_status st = kvki_cuda_status(cudaFuncSetAttribute(
        (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)ring_smem()));

    if (st == KVC_OK)
        st = kvki_cuda_resident_grid(cuda, (const void *)kernel, TOPK_THREADS, ring_smem(), 1 << 20,
                                     &blocks);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_whole(cuda, kernel, dim3((unsigned)blocks), TOPK_THREADS, ring_smem(),
                                  stream, *p);
}
