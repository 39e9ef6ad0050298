/*
 * cuda_prefill.c: steps of several queries, and those that attend everything: one selection for all
 * queries of a chunk (2502.14477 eq. 4, or the mean of them votes, 2411.02886), attention on tensor
 * cores.
 *
 * Runs on the sequence's thread, which knows all lengths, so ops are enqueued one by one and no
 * graph is made. Working memory is the sequence's, not the layers': whatever uses it is on the one
 * stream, so a layer's ops are done with it before another layer's begin. It is taken before the
 * first pass that needs it. A step has the two parts of a decode step: far, whose rows are in slots
 * (sinks and picks), and near, whose rows are in the ring (recent and new). A step that attends
 * everything is one whose picks are all candidates, and whose keys and queries keep their own
 * positions.
 */
#include <string.h>

#include "carve.h"
#include "state.h"

/* ---- memory ---- */

static uint32_t near_max(const kvw_worker *w)
{
    return w->opts.n_recent + w->opts.chunk_tokens;
}

/* The attention of n_q queries over a list of at most stride rows. */
static kvk_cuda_prefill_args shape(const kvw_worker *w, uint32_t n_q, uint32_t stride)
{
    return (kvk_cuda_prefill_args){
        .n_seqs = 1,
        .n_q = n_q,
        .n_q_heads = w->opts.n_q_heads,
        .n_kv_heads = w->opts.n_kv_heads,
        .head_dim = w->opts.head_dim,
        .stride = stride,
        .row_bytes = (uint32_t)w->row_bytes,
        .v_off_bytes = (uint32_t)w->k_bytes,
        .dtype = w->row_dtype,
        .scale = w->scale,
    };
}

/* Of any number of queries: few of them share out their keys and need memory for that. */
static size_t attend_bytes(const kvw_worker *w, uint32_t stride)
{
    size_t most = 0;
    for (uint32_t n = 1; n <= w->opts.chunk_tokens; n++) {
        const kvk_cuda_prefill_args args = shape(w, n, stride);
        size_t bytes = kvk_cuda_prefill_workspace_bytes(&args);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static kvc_status take(kvw_seq *seq, size_t len_bytes, void **memory_p)
{
    kvwi_device_seq *d = seq->device;
    kvc_status st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_DEVICE, len_bytes, memory_p);
    d->device_bytes += st == KVC_OK ? len_bytes : 0;
    return st;
}

/* By the sequence's capacity; cleared, as the op wants it. */
static kvc_status open_select(kvw_seq *seq)
{
    kvwi_device_seq *d = seq->device;
    kvwi_device_prefill *c = &d->prefill;
    const kvwi_cuda_selector *selector = d->device->selector;
    size_t bytes = selector->pass_bytes == NULL ? 0 : selector->pass_bytes(seq);
    if (bytes <= c->select_bytes) {
        return KVC_OK;
    }
    kvk_cuda_free(d->device->cuda, KVK_CUDA_DEVICE, c->select);
    d->device_bytes -= c->select_bytes;
    c->select = NULL;
    c->select_bytes = 0;
    kvc_status st = take(seq, bytes, &c->select);
    if (st == KVC_OK) {
        c->select_bytes = bytes;
        st = kvk_cuda_fill(d->device->cuda, c->select, 0, bytes, d->stream);
    }
    return st;
}

static kvc_status open_memory(kvw_seq *seq)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvwi_device_prefill *c = &d->prefill;
    size_t rows = (size_t)w->opts.chunk_tokens * w->opts.n_q_heads, f32 = sizeof(float);
    size_t width = rows * w->opts.head_dim;
    size_t index_rows = kvwi_max_u32(w->opts.chunk_tokens, w->opts.n_q_heads);
    size_t far = attend_bytes(w, kvwi_stride(w)), near = attend_bytes(w, near_max(w));
    bool stages = kvk_is_coded(w->row_dtype) && !w->opts.device_memory;
    kvwi_carver size = {0};
    for (int i = 0; i < 2; i++) {
        c->kv = stages ? kvwi_carve(&size, 2u * w->opts.chunk_tokens * w->in_bytes) : NULL;
        c->q = kvwi_carve(&size, width * w->elem_bytes);
        c->out = kvwi_carve(&size, width * w->elem_bytes);
        c->lse = kvwi_carve(&size, rows * f32);
        c->q_far = kvwi_carve(&size, width * f32);
        c->q_near = kvwi_carve(&size, width * f32);
        c->q_index = kvwi_carve(&size, index_rows * w->level[0].dims * f32);
        c->q_fine = kvwi_carve(&size, w->opts.n_q_heads * kvwi_fine_dims(w) * f32);
        c->o_far = kvwi_carve(&size, width * f32);
        c->lse_far = kvwi_carve(&size, rows * f32);
        c->o_near = kvwi_carve(&size, width * f32);
        c->lse_near = kvwi_carve(&size, rows * f32);
        c->workspace_bytes = far > near ? far : near;
        c->workspace = kvwi_carve(&size, c->workspace_bytes);
        if (i == 0) {
            kvc_status st = take(seq, size.at, &c->memory);
            if (st != KVC_OK) {
                return st;
            }
            size = (kvwi_carver){.base = c->memory};
        }
    }
    return KVC_OK;
}

kvc_status kvwi_cuda_prefill_open(kvw_seq *seq)
{
    kvc_status st = seq->device->prefill.memory != NULL ? KVC_OK : open_memory(seq);
    if (st == KVC_OK) {
        st = open_select(seq);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "memory of passes of several tokens");
}

void kvwi_cuda_prefill_close(kvw_seq *seq)
{
    kvk_cuda *cuda = seq->device->device->cuda;
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, seq->device->prefill.memory);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, seq->device->prefill.select);
}

/* ---- select ---- */

kvc_status kvwi_cuda_prefill_rotate(kvw_step *step, bool raw, uint32_t first, uint32_t by,
                                    float *out)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    const kvk_cuda_rope_args args = {
        .in = d->prefill.q,
        .n = step->n_q,
        .n_heads = w->opts.n_q_heads,
        .head_dim = w->opts.head_dim,
        .inv_freq = raw ? NULL : d->device->inv_freq,
        .first = first,
        .step = by,
        .out = out,
    };
    return kvk_cuda_rope(d->device->cuda, &args, d->stream);
}

static kvc_status select_picks(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = &d->layers[step->layer];
    *l->chunk_cands = (kvk_cuda_candidates){
        .index = l->index[0] + w->opts.n_sink * w->level[0].row_bytes,
        .n_rows = step->near_begin - w->opts.n_sink,
        .base = w->opts.n_sink,
    };
    kvc_status st = kvk_cuda_copy(d->device->cuda, l->lane.cands, l->chunk_cands,
                                  sizeof(*l->chunk_cands), d->stream);
    return st == KVC_OK ? d->device->selector->select_pass(step) : st;
}

uint32_t kvwi_cuda_prefill_picks(const kvw_step *step)
{
    const kvw_opts *o = &step->seq->worker->opts;
    return !step->full ? o->k : step->near_begin <= o->n_sink ? 0 : step->near_begin - o->n_sink;
}

kvc_status kvwi_cuda_prefill_select(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = &d->layers[step->layer];
    kvc_status st = step->full || l->chosen ? KVC_OK : select_picks(step);
    l->chosen = st == KVC_OK; /* a second attempt has other queries, and resolves the same picks */
    const kvk_cuda_resolve_args args = {
        .n_seqs = 1,
        .k = w->opts.k,
        .n_slots = kvwi_slots(w),
        .n_pinned = w->opts.n_sink,
        /* all candidates: 0, 1, ... from the first one on, and their number */
        .picks = step->full ? d->counts + w->opts.n_sink : l->lane.ordered,
        .n_picks = step->full ? d->counts + kvwi_cuda_prefill_picks(step) : l->lane.n_picks,
        .res = l->lane.res,
        .list = l->lane.list,
        .fetch = l->lane.fetch,
        .stride = kvwi_stride(w),
        .off = w->opts.n_sink,
        .n_list = l->lane.n_list,
        .n_misses = l->lane.n_misses,
    };
    if (st == KVC_OK) {
        st = kvk_cuda_resolve(d->device->cuda, &args, d->stream);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a selection");
}

/* ---- attend ---- */

kvc_status kvwi_cuda_gather(kvw_step *step, kvk_stream *stream)
{
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = &d->layers[step->layer];
    const kvk_cuda_gather_args args = {
        .n_seqs = 1,
        .stride = kvwi_stride(step->seq->worker),
        .list = l->lane.list,
        .fetch = l->lane.fetch,
        .n_list = l->lane.n_list,
        .res = l->lane.res,
        .source = l->lane.source,
        .row_bytes = (uint32_t)step->seq->worker->row_bytes,
    };
    return kvk_cuda_gather(d->device->cuda, &args, stream);
}

static kvc_status attend_far(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = &d->layers[step->layer];
    kvwi_device_prefill *c = &d->prefill;
    bool renumbers = w->selector->positions == KVW_RENUMBER;
    uint32_t n_near = step->n_tokens - step->near_begin;
    kvk_cuda_prefill_args args = shape(w, step->n_q, kvwi_stride(w));
    args.q = c->q_far;
    args.list = l->lane.list;
    args.n_list = step->near_begin < w->opts.n_sink ? d->counts + step->near_begin : l->lane.n_list;
    args.res = l->lane.res;
    args.own = KVK_CUDA_OWN_NONE;
    if (step->full || renumbers) { /* sinks, then what follows them */
        args.k_positions = d->near_pos;
        args.inv_freq = d->device->inv_freq;
    }
    args.o = c->o_far;
    args.lse = c->lse_far;
    args.workspace = c->workspace;
    args.workspace_bytes = c->workspace_bytes;
    uint32_t first = step->full  ? step->n_tokens - step->n_q
                     : renumbers ? kvwi_stride(w) + n_near - step->n_q
                                 : w->opts.far_position;
    kvc_status st = kvwi_cuda_prefill_rotate(step, false, first, step->full || renumbers, c->q_far);
    return st == KVC_OK ? kvk_cuda_prefill(d->device->cuda, &args, d->stream) : st;
}

static kvc_status attend_near(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = &d->layers[step->layer];
    kvwi_device_prefill *c = &d->prefill;
    uint32_t n_near = step->n_tokens - step->near_begin, first = step->full ? step->near_begin : 0;
    kvk_cuda_prefill_args args = shape(w, step->n_q, near_max(w));
    args.q = c->q_near;
    args.list = d->ring_list + step->near_begin % kvwi_ring_rows(w);
    args.n_list = d->counts + n_near;
    args.res = l->lane.ring_res;
    args.own = KVK_CUDA_OWN_LISTED;
    args.k_positions = d->near_pos + first;
    args.inv_freq = d->device->inv_freq;
    args.o = c->o_near;
    args.lse = c->lse_near;
    args.workspace = c->workspace;
    args.workspace_bytes = c->workspace_bytes;
    kvc_status st = kvwi_cuda_prefill_rotate(step, false, first + n_near - step->n_q, 1, c->q_near);
    return st == KVC_OK ? kvk_cuda_prefill(d->device->cuda, &args, d->stream) : st;
}

kvc_status kvwi_cuda_prefill_attend(kvw_step *step, void *out, float *lse)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_prefill *c = &d->prefill;
    bool theirs = w->opts.device_memory;
    const kvk_cuda_finish_args finish = {
        .o_a = c->o_far,
        .lse_a = c->lse_far,
        .o_b = c->o_near,
        .lse_b = c->lse_near,
        .n = step->n_q * w->opts.n_q_heads,
        .dim = w->opts.head_dim,
        .dtype = w->opts.dtype,
        .out = theirs ? out : c->out,
        .lse = theirs ? lse : c->lse,
    };
    kvc_status st = kvwi_cuda_gather(step, d->stream);
    if (st == KVC_OK) {
        st = attend_near(step);
    }
    if (st == KVC_OK) {
        st = attend_far(step);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_finish(d->device->cuda, &finish, d->stream);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "attention");
}

/* ---- the step ---- */

void kvwi_cuda_prefill_begin(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    step->near_begin = kvwi_near_begin(w, step->n_tokens, step->n_q);
    step->full = kvwi_is_full(w, step->near_begin);
}

kvc_status kvwi_cuda_prefill_query(kvw_step *step, const void *q)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    size_t width = (size_t)w->opts.n_q_heads * w->opts.head_dim;
    kvc_status st = kvk_cuda_copy(d->device->cuda, d->prefill.q, q,
                                  step->n_q * width * w->elem_bytes, d->stream);
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "queries");
}

kvc_status kvwi_cuda_prefill_give(kvw_step *step, void *out, float *lse)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    size_t rows = (size_t)step->n_q * w->opts.n_q_heads;
    if (w->opts.device_memory) {
        return KVC_OK; /* it is there */
    }
    kvc_status st = kvk_cuda_copy(d->device->cuda, out, d->prefill.out,
                                  rows * w->opts.head_dim * w->elem_bytes, d->stream);
    if (st == KVC_OK && lse != NULL) {
        st = kvk_cuda_copy(d->device->cuda, lse, d->prefill.lse, rows * sizeof(*lse), d->stream);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_sync(step->seq);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a result");
}
