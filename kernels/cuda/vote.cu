/*
 * vote.cu: the k best of a per-head index by TokenSelect's soft vote (2411.02886 eq. 7), reading
 * the index once. A single persistent grid, a block a multiprocessor:
 *
 *   1. sample: tiles spread over the list give each head a first estimate of the logarithm of its
 *      sum of exponentials (its shift);
 *   2. scan: e = exp(logit - shift) of every head and row. Sums of e per head are exact over units
 *      of 64 rows, added as integers by exponent: in any order the same bits. The sum over heads
 *      is a first vote of the row, stored and counted by size;
 *   3. now each head's weight, 1 / its sum, is known, and a row's vote lies between its first vote
 *      times the least and times the greatest weight. Rows that may be among the k best by that are
 *      scored again, exactly: sum of e * weight;
 *   4. the k best of those as in topk.cuh; what was not scored again has -1.
 *
 * Where a shift was so far off that a sum overflowed, the scan of that sequence is done again with
 * the true maxima as shifts. Everything that decides bits depends on the sequence alone.
 */
#include "vote.cuh"

#define COUNT_FOURS (VOTE_COUNTS / 4 / TOPK_THREADS) /* of the counts, a thread's, by four */

template <class Form> static constexpr size_t shared_bytes()
{
    size_t head = offsetof(struct vote_block<Form>, topk) + offsetof(struct topk_block, staged);
    size_t tiles = head + 2 * Form::kStageBytes, all = sizeof(struct vote_block<Form>);
    return tiles > all ? tiles : all;
}

/* Where the need-th of counts lies, from the top; BINS: there are fewer. A whole warp calls. */
__device__ static inline uint32_t find_bin(const uint32_t *bins, uint32_t need)
{
    constexpr uint32_t kEach = BINS / 32;
    uint32_t lane = threadIdx.x & 31u, own = 0, above = 0, owner = 0, found = 0;

    for (uint32_t i = 0; i < kEach; i++) /* turned by the lane, so that no two meet in a bank */
        own += bins[(31u - lane) * kEach + (i + lane) % kEach];
    owner = topk_find_lane(own, need, &above);
    if (owner == 32)
        return BINS;
    for (uint32_t from = 0; from < kEach; from += 32) {
        uint32_t top = (32u - owner) * kEach - 1 - from - lane, upto = 0;
        need -= above;
        found = topk_find_lane(bins[top], need, &above);
        if (found < 32)
            return (32u - owner) * kEach - 1 - from - found;
        upto = __reduce_add_sync(KVKI_FULL_WARP, bins[top]);
        above = upto;
    }
    return BINS;
}

/*
 * The least vote that a row among the k best can have, to sh->least: a row that was counted has at
 * least the least e of its bin times the weight of its slot; those products are counted, and k rows
 * reach the bin that is found. four: the thread's share of the counts; bins are 0.
 */
template <class Form>
__device__ static inline void find_least(const struct vote_params *p, uint32_t seq,
                                         const uint4 (&four)[COUNT_FOURS])
{
    struct vote_block<Form> *sh = vote_shared<Form>();

#pragma unroll
    for (uint32_t i = 0; i < COUNT_FOURS; i++) {
        const uint32_t each[4] = {four[i].x, four[i].y, four[i].z, four[i].w};
        for (uint32_t j = 0; j < 4; j++) {
            uint32_t at = (i * TOPK_THREADS + threadIdx.x) * 4 + j;
            if (each[j])
                atomicAdd(
                    &sh->counts[__float_as_uint(edge_of<Form>(at) * sh->weight[at / Form::kBins]) >>
                                BIN_BIT],
                    each[j]);
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        uint32_t bin = find_bin(sh->counts, min(p->job.k, sh->topk.n_rows[seq]));
        if (threadIdx.x == 0) /* a little less, for the rounding of votes */
            sh->least = bin < BINS ? __uint_as_float(bin << BIN_BIT) * (1.0f - 0x1p-12f) : 0.0f;
    }
    __syncthreads();
}

/* Weights of a sequence's heads, and sh->least. A weight is at most about 1: what was sampled is in
 * the sum. */
template <class Form>
__device__ static __noinline__ void load_weights(const struct vote_params *p, uint32_t seq)
{
    struct vote_block<Form> *sh = vote_shared<Form>();
    const uint4 *counts = (const uint4 *)(p->space.counts + (size_t)seq * VOTE_COUNTS);
    uint32_t slot = threadIdx.x;
    uint4 four[COUNT_FOURS];
    float most = 0;

#pragma unroll
    for (uint32_t i = 0; i < COUNT_FOURS; i++)
        four[i] = __ldcg(counts + i * TOPK_THREADS + threadIdx.x);
    for (uint32_t i = threadIdx.x; i < BINS; i += TOPK_THREADS)
        sh->counts[i] = 0;
    if (slot < n_slots<Form>(p)) {
        double total = total_of(p->space.sums + ((size_t)seq * VOTE_SLOTS_MAX + slot) * BUCKETS);
        sh->weight[slot] = total > 0 ? (float)(1.0 / total) : 0.0f;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        for (uint32_t s = threadIdx.x; s < n_slots<Form>(p); s += 32)
            most = fmaxf(most, sh->weight[s]);
        most = kvki_lanes_max(most, 32);
        if (threadIdx.x == 0)
            sh->most_weight = most;
    }
    find_least<Form>(p, seq, four);
}

/* Whether a row may be among the k best: its vote is at most its greatest e times that head's
 * weight and the rest of its first vote, rounded up, times the greatest weight. */
template <class Form> __device__ static inline bool may_be_picked(float2 first)
{
    constexpr uint32_t kSlotBits = Form::kSlots - 1;
    const struct vote_block<Form> *sh = vote_shared<Form>();
    uint32_t bits = __float_as_uint(first.y);
    float e = __uint_as_float(bits & ~kSlotBits);
    float rest = fmaf(first.x, 1.0f + 0x1p-16f, -e) * sh->most_weight;

    return fmaf(e, sh->weight[bits & kSlotBits], rest) >= sh->least;
}

/* The rows that list names, up to 16 of them, into the warp's tile. */
template <class Form>
__device__ static inline void gather_rows(const struct vote_params *p, const uint8_t *index,
                                          const uint32_t *list, uint32_t left)
{
    constexpr uint32_t kPiece = Form::kRow % 16 ? 8 : 16, kPieces = Form::kRow / kPiece;
    uint8_t *to = tile_room<Form>(0);

    for (uint32_t i = threadIdx.x & 31u; i < VOTE_TILE * kPieces; i += 32) {
        uint32_t row = i / kPieces, off = i % kPieces * kPiece;
        const uint8_t *from = index + (size_t)list[min(row, left - 1)] * Form::kRow + off;
        if (kPiece == 16)
            kvki_async_copy(to + row * Form::kRow + off, from);
        else
            kvki_async_copy_8(to + row * Form::kRow + off, from);
    }
    kvki_async_wait();
    __syncwarp();
}

/* Votes of the rows on the block's list, a tile a warp, in place of their first votes. */
template <class Form>
__device__ static __noinline__ void score_list(const struct vote_params *p, uint32_t seq,
                                               const uint32_t *list, uint32_t n_listed)
{
    const struct topk_job *job = &p->job;
    struct vote_block<Form> *sh = vote_shared<Form>();
    const uint8_t *index = index_of<Form>(p, seq);
    float *scores = job->space.scores + seq * job->space.stride;
    uint32_t row = (threadIdx.x & 31u) / 4, at = joined_row();
    struct vote_query<Form> query;

    if (threadIdx.x / 32u * VOTE_TILE >= n_listed)
        return;
    query.load(p->shape);

    for (uint32_t from = threadIdx.x / 32u * VOTE_TILE; from < n_listed;
         from += TOPK_WARPS * VOTE_TILE) {
        uint32_t left = n_listed - from, picked = 0, stride = p->shape.row_bytes;
        const uint8_t *low = index + (size_t)list[from + min(row, left - 1)] * stride;
        const uint8_t *high = index + (size_t)list[from + min(row + 8, left - 1)] * stride;
        bool there = at < min(left, VOTE_TILE);
        float a = 0, b = 0, vote = 0;
        typename Form::two_rows rows;
        __syncwarp();
        if constexpr (Form::kStaged) {
            gather_rows<Form>(p, index, list + from, left);
            Form::take(tile_room<Form>(0), VOTE_TILE, &rows);
        } else {
            rows = {low, high};
        }
        query.form.score(p->shape, sh->query, rows, [&](uint32_t i, float x, float y) {
            float weight = sh->weight[i * 4 + threadIdx.x % 4];
            a = fmaf(exp2_of(fmaf(x, query.scale[i], -query.shift[i])), weight, a);
            b = fmaf(exp2_of(fmaf(y, query.scale[i], -query.shift[i])), weight, b);
        });
        vote = join_rows(a, b, [](float mine, float other) { return mine + other; });
        if (there) {
            picked = list[from + at];
            scores[picked] = vote;
        }
        topk_append(job->space.cands + (size_t)seq * TOPK_CANDS, job->space.n_cands + seq,
                    topk_key(vote), picked, there);
    }
}

/* The rows of a run that may be picked, listed and scored again; the others are out. */
template <class Form>
__device__ static __noinline__ void rescore_run(const struct vote_params *p,
                                                const struct vote_run &run)
{
    const struct topk_job *job = &p->job;
    struct vote_block<Form> *sh = vote_shared<Form>();
    const float2 *firsts = p->space.firsts + run.seq * job->space.stride;
    float *scores = job->space.scores + run.seq * job->space.stride;
    float2 first[CHUNK / TOPK_THREADS];
    uint32_t end = min(run.to * UNIT * VOTE_TILE, sh->topk.n_rows[run.seq]);
    uint32_t *list = (uint32_t *)((uint8_t *)sh->topk.staged + Form::kStageBytes);

    for (uint32_t from = run.from * UNIT * VOTE_TILE; from < end; from += CHUNK) {
        if (threadIdx.x == 0)
            sh->n_listed = 0;
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < CHUNK / TOPK_THREADS; i++) {
            uint32_t row = from + i * TOPK_THREADS + threadIdx.x;
            first[i] = row < end ? __ldcg(firsts + row) : make_float2(-1.0f, 0);
        }
        uint32_t wanted = 0, n_wanted = 0, at = 0;
#pragma unroll
        for (uint32_t i = 0; i < CHUNK / TOPK_THREADS; i++) {
            uint32_t row = from + i * TOPK_THREADS + threadIdx.x;
            bool want = row < end && may_be_picked<Form>(first[i]);
            wanted |= (uint32_t)want << i;
            n_wanted += (uint32_t)__popc(__ballot_sync(KVKI_FULL_WARP, want));
            if (row < end && !want)
                scores[row] = -1.0f;
        }
        if ((threadIdx.x & 31u) == 0 && n_wanted)
            at = atomicAdd(&sh->n_listed, n_wanted);
        at = __shfl_sync(KVKI_FULL_WARP, at, 0);
#pragma unroll
        for (uint32_t i = 0; i < CHUNK / TOPK_THREADS && n_wanted; i++) {
            bool want = wanted >> i & 1u;
            uint32_t lanes = __ballot_sync(KVKI_FULL_WARP, want);
            if (want)
                list[at + (uint32_t)__popc(lanes & ((1u << (threadIdx.x & 31u)) - 1u))] =
                    from + i * TOPK_THREADS + threadIdx.x;
            at += (uint32_t)__popc(lanes);
        }
        __syncthreads();
        score_list<Form>(p, run.seq, list, sh->n_listed);
        __syncthreads();
    }
}

/* Sets back what the scan counted; the blocks share it out. */
__device__ static inline void clear_votes(const struct vote_params *p, uint32_t seq)
{
    const struct vote_space *space = &p->space;
    uint32_t thread = blockIdx.x * TOPK_THREADS + threadIdx.x, step = gridDim.x * TOPK_THREADS;

    for (uint32_t i = thread; i < VOTE_COUNTS; i += step)
        space->counts[(size_t)seq * VOTE_COUNTS + i] = 0;
    for (uint32_t i = thread; i < VOTE_SLOTS_MAX * BUCKETS; i += step)
        space->sums[(size_t)seq * VOTE_SLOTS_MAX * BUCKETS + i] = 0;
}

__device__ static inline void clear_flags(const struct vote_params *p)
{
    for (uint32_t i = blockIdx.x * TOPK_THREADS + threadIdx.x; i < p->job.n_seqs * VOTE_SLOTS_MAX;
         i += gridDim.x * TOPK_THREADS) {
        p->space.most[i] = 0;
        if (i <= p->job.n_seqs)
            p->space.overflow[i] = 0;
    }
}

template <class Form> __device__ static inline uint32_t all_units(const struct vote_params *p)
{
    return vote_shared<Form>()->topk.first_group[p->job.n_seqs];
}

/* The runs of a block: its share of the first n_units units, cut where a sequence ends. */
template <class Form, class Each>
__device__ static inline void each_run(const struct vote_params *p, uint32_t n_units, Each each)
{
    const struct topk_block *block = &vote_shared<Form>()->topk;
    uint32_t at = (uint32_t)((uint64_t)n_units * blockIdx.x / gridDim.x);
    uint32_t end = (uint32_t)((uint64_t)n_units * (blockIdx.x + 1) / gridDim.x);

    while (at < end) {
        uint32_t seq = topk_seq_of(&p->job, block, at), first = block->first_group[seq];
        uint32_t to = min(end, block->first_group[seq + 1]);
        struct vote_run run = {seq, at - first, to - first, 0, 0};
        each(run);
        at = to;
    }
}

/* The scan again, with the maxima as shifts, where it overflowed. The grid calls. */
template <class Form>
__device__ static void scan_again(const struct vote_params *p, uint32_t *arrivals)
{
    const struct vote_space *space = &p->space;
    uint32_t *barrier = &p->job.space.counters->barrier;

    for (uint32_t seq = 0; seq < p->job.n_seqs; seq++) {
        if (__ldcg(space->overflow + seq))
            clear_votes(p, seq);
    }
    each_run<Form>(p, all_units<Form>(p), [&](const struct vote_run &run) {
        if (!__ldcg(space->overflow + run.seq))
            return;
        load_query<Form>(p, run.seq);
        most_of_run<Form>(p, run, begin_walk<Form>(p, run));
    });
    kvki_grid_barrier(barrier, arrivals);
    each_run<Form>(p, all_units<Form>(p), [&](const struct vote_run &run) {
        if (!__ldcg(space->overflow + run.seq))
            return;
        load_query<Form>(p, run.seq);
        load_shifts<Form>(p, run.seq, true);
        scan_run<Form>(p, run, begin_walk<Form>(p, run));
    });
    kvki_grid_barrier(barrier, arrivals);
}

/*
 * Sample and scan: the first tiles come while the others sample. Of a single sequence an eighth is
 * not shared out before but handed out at the end. The grid calls.
 */
template <class Form>
__device__ static void scan_all(const struct vote_params *p, uint32_t *arrivals)
{
    uint32_t *barrier = &p->job.space.counters->barrier, all = all_units<Form>(p);
    uint32_t shared_out = p->job.n_seqs == 1 ? all - all / 8 : all;
    bool waited = false;

    sample_all<Form>(p);
    kvki_grid_arrive(barrier, arrivals);
    each_run<Form>(p, shared_out, [&](struct vote_run run) {
        struct vote_feed feed = {};
        run.spare = shared_out;
        run.end = all;
        feed = begin_walk<Form>(p, run);
        load_query<Form>(p, run.seq);
        if (!waited)
            kvki_grid_wait(barrier, arrivals);
        waited = true;
        load_shifts<Form>(p, run.seq, false);
        scan_run<Form>(p, run, feed);
    });
    if (!waited)
        kvki_grid_wait(barrier, arrivals);
    kvki_grid_barrier(barrier, arrivals);
    if (__ldcg(p->space.overflow + p->job.n_seqs))
        scan_again<Form>(p, arrivals);
}

/* A block wants all registers of a multiprocessor, or nearly: begun before the op before it ends,
 * it only takes those that are idle. */
template <class Form>
__global__ void __launch_bounds__(TOPK_THREADS, 1)
    vote_kernel(const __grid_constant__ struct vote_params p)
{
    struct vote_block<Form> *sh = vote_shared<Form>();
    uint32_t arrivals = 0;

    if (threadIdx.x == 0)
        sh->query_seq = sh->shift_seq = VOTE_NONE;
    begin_fetches<Form>();
    kvki_wait_for_previous();
    topk_layout(&p.job, &sh->topk, UNIT * VOTE_TILE);
    scan_all<Form>(&p, &arrivals);
    each_run<Form>(&p, all_units<Form>(&p), [&](const struct vote_run &run) {
        load_query<Form>(&p, run.seq);
        load_shifts<Form>(&p, run.seq, __ldcg(p.space.overflow + run.seq) != 0);
        load_weights<Form>(&p, run.seq);
        rescore_run<Form>(&p, run);
    });
    topk_conclude(&p.job, &sh->topk, &arrivals, [&] {
        for (uint32_t seq = 0; seq < p.job.n_seqs; seq++)
            clear_votes(&p, seq);
        clear_flags(&p);
    });
}

static_assert(TOPK_CANDS >= 2 * KVK_CUDA_WIDE_MAX, "topk.cuh was included before vote_form.cuh");

/* Cuts a workspace; gives the bytes needed. base may be NULL. */
static size_t cut_workspace(void *base, uint32_t n_seqs, uint32_t rows_max,
                            struct topk_space *topk_p, struct vote_space *space_p)
{
    char *at = (char *)base;
    size_t n = n_seqs, used = kvki_round_up(topk_cut(base, n_seqs, rows_max, topk_p), 256);

#define TAKE(field, type, count)                                                                   \
    space_p->field = (type *)(at + used);                                                          \
    used += kvki_round_up((count) * sizeof(type), 256)
    TAKE(counts, uint32_t, n * VOTE_COUNTS);
    TAKE(firsts, float2, n * topk_p->stride);
    TAKE(sums, unsigned long long, n *VOTE_SLOTS_MAX *BUCKETS);
    TAKE(most, uint32_t, n * VOTE_SLOTS_MAX);
    TAKE(overflow, uint32_t, n + 1);
    TAKE(sample, float2, n * VOTE_SLOTS_MAX * GROUPS);
#undef TAKE
    return used;
}

extern "C" size_t kvk_cuda_select_vote_workspace_bytes(uint32_t n_seqs, uint32_t rows_max)
{
    struct topk_space topk;
    struct vote_space space;
    return cut_workspace(NULL, n_seqs, rows_max, &topk, &space);
}

static bool shape_ok(const kvk_cuda_select_vote_args *a)
{
    return a->dims > 0 && a->dims <= VOTE_DIMS_MAX && a->n_kv_heads > 0 && a->n_q_heads > 0 &&
           a->n_q_heads % a->n_kv_heads == 0 && a->n_q_heads <= VOTE_SLOTS_MAX &&
           a->n_q_heads * a->dims <= VOTE_QUERY_MAX;
}

static bool args_ok(const kvk_cuda_select_vote_args *a)
{
    return a->n_seqs <= KVK_CUDA_SEQS_MAX && shape_ok(a) && a->k > 0 && a->k <= KVK_CUDA_WIDE_MAX &&
           a->rows_max > 0 && a->q && a->cands && a->picks && a->n_picks && a->workspace &&
           kvki_aligned(a->workspace) &&
           a->workspace_bytes >= kvk_cuda_select_vote_workspace_bytes(a->n_seqs, a->rows_max);
}

template <class Form> static bool fits(const kvk_cuda *cuda)
{
    return shared_bytes<Form>() <= (size_t)cuda->smem_block_max;
}

/* The general form takes any shape, and no more than the others. */
extern "C" kvc_status kvk_cuda_select_vote_supports(const kvk_cuda *cuda,
                                                    const kvk_cuda_select_vote_args *args)
{
    return shape_ok(args) && fits<general_form>(cuda) ? KVC_OK : KVC_UNSUPPORTED;
}

template <class Form>
static kvc_status launch(kvk_cuda *cuda, struct vote_params *p, kvk_stream *stream)
{
    const void *kernel = (const void *)vote_kernel<Form>;
    size_t smem = shared_bytes<Form>();
    int blocks = 0;
    kvc_status st = KVC_OK;

    if (!fits<Form>(cuda))
        return KVC_UNSUPPORTED;
    st = kvki_cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    if (st == KVC_OK)
        st = kvki_cuda_resident_grid(cuda, kernel, TOPK_THREADS, smem, 1 << 20, &blocks);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_launch_whole(cuda, vote_kernel<Form>, dim3((unsigned)blocks), TOPK_THREADS,
                                  smem, stream, *p);
}

extern "C" kvc_status kvk_cuda_select_vote(kvk_cuda *cuda, const kvk_cuda_select_vote_args *args,
                                           kvk_stream *stream)
{
    struct vote_params p = {};
    uint32_t group = 0;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    p.job = {args->n_seqs, args->k,      args->eps,     args->rows_max, args->cands,
             args->picks,  args->scores, args->n_picks, args->keep,     {}};
    (void)cut_workspace(args->workspace, args->n_seqs, args->rows_max, &p.job.space, &p.space);
    p.shape = {args->n_q_heads, args->n_kv_heads, args->dims,
               (uint32_t)kvk_index_row_bytes(args->n_kv_heads, args->dims)};
    p.q = args->q;
    group = args->n_q_heads / args->n_kv_heads;
    st = kvki_cuda_use(cuda);
    if (st != KVC_OK)
        return st;
    if (args->dims == 16 && args->n_kv_heads == 8 && group <= 4 && fits<mma_form<8, 1, 16>>(cuda))
        return launch<mma_form<8, 1, 16>>(cuda, &p, stream);
    if (args->dims == 32 && args->n_kv_heads == 8 && group <= 4 && fits<mma_form<8, 1>>(cuda))
        return launch<mma_form<8, 1>>(cuda, &p, stream);
    if (args->dims == 32 && args->n_kv_heads == 4 && group <= 8 && fits<mma_form<4, 2>>(cuda))
        return launch<mma_form<4, 2>>(cuda, &p, stream);
    return launch<general_form>(cuda, &p, stream);
}
