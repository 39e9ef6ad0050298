/*
 * cuda_select.c: what steps do differently by selector, as a table: how the queries of one token
 * become picks, which is captured into graphs, and those of a pass.
 *
 * Runs on the thread of the sequence, or of the batch. Windows, residency, attention and the graphs
 * are the same for all.
 */
#include <string.h>

#include "state.h"

/* ---- ESA: one score of all heads ---- */

static kvc_status check_esa(const kvw_worker *w)
{
    (void)w;
    return KVC_OK;
}

static kvc_status supports_esa(const kvw_worker *w, const kvk_cuda *cuda)
{
    (void)w;
    (void)cuda;
    return KVC_OK;
}

static size_t workspace_esa(const kvw_worker *w, uint32_t n_seqs, uint32_t rows_max)
{
    (void)w;
    return kvk_cuda_select_workspace_bytes(n_seqs, rows_max);
}

static kvc_status select_esa(const kvw_worker *w, const kvwi_lane *lane, kvk_stream *stream)
{
    const kvk_cuda_select_args args = {
        .n_seqs = lane->n_seqs,
        .dims = w->level[0].dims,
        .k = w->opts.k,
        .eps = w->opts.eps,
        .rows_max = lane->rows_max,
        .q = lane->q_index,
        .cands = lane->cands,
        .picks = lane->picks,
        .n_picks = lane->n_picks,
        .workspace = lane->select_space,
        .workspace_bytes = lane->select_bytes,
        .early = 1, /* behind the frame, which writes but the row that is none of them yet */
    };
    return kvk_cuda_select(w->device->cuda, &args, stream);
}

static kvk_cuda_select_many_args many_shape(const kvw_seq *seq, uint32_t n_q)
{
    const kvw_worker *w = seq->worker;
    return (kvk_cuda_select_many_args){.n_q = n_q,
                                       .dims = w->level[0].dims,
                                       .k = w->opts.k,
                                       .eps = w->opts.eps,
                                       .rows_max = seq->device->cap_tokens};
}

static size_t pass_bytes_esa(const kvw_seq *seq)
{
    const kvk_cuda_select_many_args args = many_shape(seq, seq->worker->opts.chunk_tokens);
    return kvk_cuda_select_many_workspace_bytes(&args);
}

/* Queries as a level of the index meets them, from n of them in f32. */
static kvc_status index_queries(kvw_step *step, const float *q, uint32_t n, bool per_head,
                                uint32_t level, float *out)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    const kvk_cuda_query_args args = {
        .q = q,
        .n_seqs = n,
        .n_q_heads = w->opts.n_q_heads,
        .n_kv_heads = w->opts.n_kv_heads,
        .head_dim = w->opts.head_dim,
        .dims = w->level[level].dims,
        .proj = kvwi_layer_proj(w, d->device->query_proj, level, step->layer),
        .out = out,
        .per_head = per_head,
    };
    return kvk_cuda_query(d->device->cuda, &args, d->stream);
}

/* Eq. 4 over all queries; q_near is free until the attention. */
static kvc_status select_pass_esa(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    kvwi_lane *lane = &d->layers[step->layer].lane;
    kvk_cuda_select_many_args args = many_shape(step->seq, step->n_q);
    args.q = d->prefill.q_index;
    args.cands = lane->cands;
    args.picks = lane->picks;
    args.n_picks = lane->n_picks;
    args.workspace = d->prefill.select;
    args.workspace_bytes = d->prefill.select_bytes;
    kvc_status st = kvwi_cuda_prefill_rotate(step, kvwi_scores_raw(w), w->opts.far_position, 0,
                                             d->prefill.q_near);
    if (st == KVC_OK) {
        st = index_queries(step, d->prefill.q_near, step->n_q, false, 0, d->prefill.q_index);
    }
    return st == KVC_OK ? kvk_cuda_select_many(d->device->cuda, &args, d->stream) : st;
}

/* ---- TokenSelect: the soft vote of the heads; picks are numbered in ascending order ---- */

static kvc_status check_tokenselect(const kvw_worker *w)
{
    const kvw_opts *o = &w->opts;
    if (o->n_q_heads > 128 || o->n_q_heads * w->level[kvwi_finest(w)].dims > 16384u) {
        return kvwi_fail(KVC_UNSUPPORTED,
                         "n_q_heads: must be at most 128, and times index_dims or rerank_dims at "
                         "most 16384, for tokenselect where backend is cuda");
    }
    if (w->n_levels > 1 && (uint64_t)o->k * o->rerank_factor > KVK_CUDA_WIDE_MAX) {
        return kvwi_fail(KVC_UNSUPPORTED,
                         "rerank_factor: times k must be at most %u where backend "
                         "is cuda",
                         KVK_CUDA_WIDE_MAX);
    }
    return KVC_OK;
}

static kvc_status supports_tokenselect(const kvw_worker *w, const kvk_cuda *cuda)
{
    const kvk_cuda_select_vote_args args = {
        .n_q_heads = w->opts.n_q_heads, .n_kv_heads = w->opts.n_kv_heads, .dims = w->level[0].dims};
    kvc_status st = kvk_cuda_select_vote_supports(cuda, &args);
    return st == KVC_OK
               ? st
               : kvwi_fail(st, "selector: must be esa where backend is cuda on this GPU, whose "
                               "blocks have too little shared memory for a vote");
}

/* Of the vote, and where what the re-ranking needs begins behind it. */
static size_t vote_bytes(uint32_t n_seqs, uint32_t rows_max)
{
    return (kvk_cuda_select_vote_workspace_bytes(n_seqs, rows_max) + 255u) / 256u * 256u;
}

static size_t workspace_tokenselect(const kvw_worker *w, uint32_t n_seqs, uint32_t rows_max)
{
    return vote_bytes(n_seqs, rows_max) +
           kvk_cuda_rerank_workspace_bytes(n_seqs, kvwi_wide(w), w->opts.n_q_heads);
}

static kvc_status vote(const kvw_worker *w, const kvwi_lane *lane, const uint32_t *keep,
                       kvk_stream *stream)
{
    bool last = w->n_levels == 1; /* else these are candidates, and windows come again */
    const kvk_cuda_select_vote_args args = {
        .n_seqs = lane->n_seqs,
        .n_q_heads = w->opts.n_q_heads,
        .n_kv_heads = w->opts.n_kv_heads,
        .dims = w->level[0].dims,
        .k = last ? w->opts.k : kvwi_wide(w),
        .eps = w->opts.eps,
        .rows_max = lane->rows_max,
        .q = lane->q_index,
        .cands = lane->cands,
        .picks = last ? lane->picks : lane->wide,
        .n_picks = last ? lane->n_picks : lane->n_wide,
        .workspace = lane->select_space,
        .workspace_bytes = lane->select_bytes,
        .keep = keep,
    };
    return kvk_cuda_select_vote(w->device->cuda, &args, stream);
}

static kvc_status rerank(const kvw_worker *w, const kvwi_lane *lane, const uint32_t *keep,
                         kvk_stream *stream)
{
    size_t off_bytes = vote_bytes(lane->n_seqs, lane->rows_max);
    const kvk_cuda_rerank_args args = {
        .n_seqs = lane->n_seqs,
        .n_q_heads = w->opts.n_q_heads,
        .n_kv_heads = w->opts.n_kv_heads,
        .dims = w->level[1].dims,
        .k = w->opts.k,
        .eps = w->opts.eps,
        .n_max = kvwi_wide(w),
        .q = lane->q_fine,
        .finer = lane->finer,
        .list = lane->wide,
        .n_list = lane->n_wide,
        .picks = lane->picks,
        .n_picks = lane->n_picks,
        .workspace = (char *)lane->select_space + off_bytes,
        .workspace_bytes = lane->select_bytes - off_bytes,
        .keep = keep,
    };
    return kvk_cuda_rerank(w->device->cuda, &args, stream);
}

/* Where keep is not 0 (NULL: nowhere), the picks stay. */
static kvc_status pick(const kvw_worker *w, const kvwi_lane *lane, const uint32_t *keep,
                       kvk_stream *stream)
{
    const kvk_cuda_order_args order = {.n_seqs = lane->n_seqs,
                                       .k = w->opts.k,
                                       .picks = lane->picks,
                                       .n_picks = lane->n_picks,
                                       .ordered = lane->ordered};
    kvc_status st = vote(w, lane, keep, stream);
    if (st == KVC_OK && w->n_levels > 1) {
        st = rerank(w, lane, keep, stream);
    }
    return st == KVC_OK ? kvk_cuda_order(w->device->cuda, &order, stream) : st;
}

static kvc_status select_tokenselect(const kvw_worker *w, const kvwi_lane *lane, kvk_stream *stream)
{
    return pick(w, lane, lane->keep, stream);
}

/* One query votes, the mean of the rotated ones; q_far is free until the attention too. */
static kvc_status select_pass_tokenselect(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_prefill *c = &d->prefill;
    kvwi_lane lane = d->layers[step->layer].lane;
    lane.rows_max = d->cap_tokens; /* a layer without graphs does not say it yet */
    lane.select_space = d->select_space;
    lane.select_bytes = d->select_bytes;
    lane.q_index = c->q_index;
    lane.q_fine = c->q_fine;
    const kvk_cuda_mean_args mean = {.in = c->q_near,
                                     .dtype = KVK_F32,
                                     .n_seqs = 1,
                                     .n = step->n_q,
                                     .width = w->opts.n_q_heads * w->opts.head_dim,
                                     .out = c->q_far};
    kvc_status st =
        kvwi_cuda_prefill_rotate(step, kvwi_scores_raw(w), w->opts.n_recent, 1, c->q_near);
    if (st == KVC_OK) {
        st = kvk_cuda_mean(d->device->cuda, &mean, d->stream);
    }
    for (uint32_t i = 0; st == KVC_OK && i < w->n_levels; i++) {
        st = index_queries(step, c->q_far, 1, true, i, i == 0 ? c->q_index : c->q_fine);
    }
    return st == KVC_OK ? pick(w, &lane, NULL, d->stream) : st;
}

static const kvwi_cuda_selector selectors[] = {
    {.name = "esa",
     .levels = 1,
     .check = check_esa,
     .supports = supports_esa,
     .workspace_bytes = workspace_esa,
     .cleared_bytes = kvk_cuda_select_workspace_bytes,
     .select = select_esa,
     .select_pass = select_pass_esa,
     .pass_bytes = pass_bytes_esa},
    {.name = "tokenselect",
     .levels = 2,
     .check = check_tokenselect,
     .supports = supports_tokenselect,
     .workspace_bytes = workspace_tokenselect,
     .cleared_bytes = vote_bytes,
     .select = select_tokenselect,
     .select_pass = select_pass_tokenselect},
};

const kvwi_cuda_selector *kvwi_cuda_selector_of(const kvw_worker *w)
{
    for (size_t i = 0; i < sizeof(selectors) / sizeof(selectors[0]); i++) {
        if (strcmp(selectors[i].name, w->selector->name) == 0) {
            return &selectors[i];
        }
    }
    return NULL;
}
