/*
 * select.cu: scores of an int8 index and their k best in one pass over it (ESA, 2502.14477 eq. 3
 * and 8): the scan of topk.cuh's scheme for any width, many sequences and devices before sm_90;
 * select_ring.cu has the other one.
 *
 * A warp takes 32 rows at a time (select_form.cuh).
 */
#include "select_form.cuh"
#include "select_ring.cuh"

#define HELD 2u /* groups whose keys a warp keeps until the bound is known */

/* A warp's view of the scan: the form of query that it holds is that of seq (n_seqs: of none). */
template <class Form> struct scan {
    const struct select_params *p;
    const struct topk_block *block;
    struct topk_walk walk;
    Form form;
    int16_t *shared;
    uint32_t seq;
};

/* Key of the lane's row of a group, 0 where there is no such row. Stores the score. */
template <class Form>
__device__ static inline uint32_t score_group(struct scan<Form> *s, uint32_t group)
{
    const struct topk_job *job = &s->p->job;
    uint32_t first = 0, left = 0, row = Form::row_of_lane();
    const uint8_t *index = NULL;
    float x = 0;

    if (s->seq == job->n_seqs || group < s->block->first_group[s->seq] ||
        group >= s->block->first_group[s->seq + 1]) {
        s->seq = topk_seq_of(job, s->block, group);
        s->form.load_query(s->p, s->seq, s->shared);
    }
    first = (group - s->block->first_group[s->seq]) * 32u;
    left = s->block->n_rows[s->seq] - first;
    index = (const uint8_t *)job->seqs[s->seq].index + (size_t)first * (s->p->dims + 2);
    x = s->form.score(index, min(left, 32u), s->p->dims, s->shared);
    if (row >= left)
        return 0;
    job->space.scores[s->seq * job->space.stride + first + row] = x;
    return topk_key(x);
}

/* Makes a candidate of the lane's row of a scored group, if it reaches the bound of its sequence.
 */
template <class Form>
__device__ static inline void consider(const struct scan<Form> *s, uint32_t group, uint32_t key)
{
    const struct topk_job *job = &s->p->job;
    uint32_t seq = topk_seq_of(job, s->block, group);
    uint32_t row = (group - s->block->first_group[seq]) * 32u + Form::row_of_lane();
    bool valid = row < s->block->n_rows[seq];

    topk_append(job->space.cands + (size_t)seq * TOPK_CANDS, job->space.n_cands + seq, key, row,
                job->eps == 0 && valid && key >= s->block->bound[seq]);
}

/* The lines of a group on their way to L2, a row a lane. */
template <class Form>
__device__ static void prefetch_group(const struct scan<Form> *s, uint32_t group)
{
    const struct topk_job *job = &s->p->job;
    uint32_t seq = topk_seq_of(job, s->block, group);
    uint32_t row = (group - s->block->first_group[seq]) * 32u + (threadIdx.x & 31u);

    if (row < s->block->n_rows[seq])
        kvki_prefetch((const char *)job->seqs[seq].index + (size_t)row * (s->p->dims + 2));
}

/* The groups that were neither sampled nor held, first the warp's own, then what is handed out. */
template <class Form> __device__ static inline void scan_rest(struct scan<Form> *s, uint32_t n_held)
{
    const struct topk_walk *w = &s->walk;
    uint32_t rest = topk_warp() * w->own + n_held, end = (topk_warp() + 1) * w->own;

    for (; rest < end; rest++) {
        uint32_t group = topk_rest(w, rest);
        consider(s, group, score_group(s, group));
    }
    for (rest = w->own * topk_warps() + topk_warp(); rest < w->n_rest;) {
        uint32_t next = topk_ticket(&s->p->job, w), group = topk_rest(w, rest);
        consider(s, group, score_group(s, group));
        rest = __shfl_sync(KVKI_FULL_WARP, next, 0);
    }
}

/*
 * Between the sample and its outcome lie a barrier and a search; the warp scores HELD more groups
 * meanwhile and keeps their keys.
 */
template <class Form>
__device__ static inline void scan_all(struct scan<Form> *s, struct topk_block *block,
                                       uint32_t *arrivals)
{
    const struct topk_job *job = &s->p->job;
    const struct topk_walk *w = &s->walk;
    uint32_t sample = topk_warp() * w->skip, first = topk_warp() * w->own;
    uint32_t n_held = min(w->own, HELD), sample_key = 0, key[HELD];
    bool sampled = sample < w->n_groups;

    if (sampled) {
        prefetch_group(s, sample);
        sample_key = score_group(s, sample);
    }
    topk_publish(job, block, topk_seq_of(job, block, blockIdx.x * TOPK_WARPS * w->skip), s->seq, w,
                 sample_key);
    kvki_grid_arrive(&job->space.counters->barrier, arrivals);
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++)
        key[i] = i < n_held ? score_group(s, topk_rest(w, first + i)) : 0;
    if (n_held < w->own)
        prefetch_group(s, topk_rest(w, first + n_held));
    topk_bounds(job, block, w, arrivals);
    if (sampled)
        consider(s, sample, sample_key);
#pragma unroll
    for (uint32_t i = 0; i < HELD; i++) {
        if (i < n_held)
            consider(s, topk_rest(w, first + i), key[i]);
    }
    scan_rest(s, n_held);
}

template <class Form>
__global__ void __launch_bounds__(TOPK_THREADS, 2) select_kernel(const struct select_params p)
{
    __shared__ struct topk_block block;
    __shared__ int16_t queries[Form::kShared ? TOPK_WARPS : 1][Form::kShared ? SELECT_DIMS_MAX : 1];
    struct scan<Form> s;
    uint32_t arrivals = 0;

    topk_layout(&p.job, &block, 32);
    s.p = &p;
    s.block = &block;
    s.walk = topk_plan(block.first_group[p.job.n_seqs]);
    s.shared = queries[Form::kShared ? threadIdx.x / 32u : 0];
    s.seq = p.job.n_seqs;
    scan_all(&s, &block, &arrivals);
    topk_conclude(&p.job, &block, &arrivals, [&] { topk_clear_samples(&p.job, &block); });
}

extern "C" size_t kvk_cuda_select_workspace_bytes(uint32_t n_seqs, uint32_t rows_max)
{
    struct topk_space space;
    return topk_cut(NULL, n_seqs, rows_max, &space);
}

static bool args_ok(const kvk_cuda_select_args *a)
{
    return a->n_seqs <= KVK_CUDA_SEQS_MAX && a->dims > 0 && a->dims <= SELECT_DIMS_MAX &&
           a->k > 0 && a->k <= KVK_CUDA_K_MAX && a->rows_max > 0 && a->q && a->cands && a->picks &&
           a->n_picks && a->workspace && kvki_aligned(a->workspace) &&
           a->workspace_bytes >= kvk_cuda_select_workspace_bytes(a->n_seqs, a->rows_max);
}

extern "C" kvc_status kvk_cuda_select(kvk_cuda *cuda, const kvk_cuda_select_args *args,
                                      kvk_stream *stream)
{
    struct select_params p = {{args->n_seqs,
                               args->k,
                               args->eps,
                               args->rows_max,
                               args->cands,
                               args->picks,
                               args->scores,
                               args->n_picks,
                               args->keep,
                               {}},
                              args->q,
                              args->dims,
                              args->early};
    const void *kernel = args->dims == 126  ? (const void *)select_kernel<fast_form<128>>
                         : args->dims == 62 ? (const void *)select_kernel<fast_form<64>>
                                            : (const void *)select_kernel<general_form>;
    void *params[] = {&p};
    int blocks = 0;
    kvc_status st = KVC_OK;

    if (args->n_seqs == 0)
        return KVC_OK;
    if (!args_ok(args))
        return KVC_INVALID;
    (void)topk_cut(args->workspace, args->n_seqs, args->rows_max, &p.job.space);
    st = kvki_cuda_use(cuda);
    if (st == KVC_OK && kvki_select_ring_takes(cuda, &p))
        return kvki_select_ring(cuda, &p, stream);
    if (st == KVC_OK)
        st = kvki_cuda_resident_grid(cuda, kernel, TOPK_THREADS, 0, 1 << 20, &blocks);
    if (st != KVC_OK)
        return st;
    return kvki_cuda_status(cudaLaunchCooperativeKernel(
        kernel, dim3((unsigned)blocks), dim3(TOPK_THREADS), params, 0, kvki_cuda_stream(stream)));
}
