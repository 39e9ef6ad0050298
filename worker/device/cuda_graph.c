/*
 * cuda_graph.c: what a step enqueues, captured once for each layer: the selection, the attention,
 * and both together for a step whose query does not change in between.
 *
 * Runs on the sequence's thread. The far part (sinks and picks, keys not rotated) and the near part
 * (recent and new, numbered from 0) are attended one after the other and merged at the end, in this
 * order whatever was resident.
 */
#include "state.h"

/* Which of a step's queries are made from what the engine gave. */
typedef enum frame_part { FRAME_SELECT, FRAME_ATTEND, FRAME_WHOLE } frame_part;

/* Whether the index meets the query as it is, or rotated by far_position. */
static bool scores_raw(const kvw_worker *w)
{
    return w->inv_freq == NULL || w->projection->rope == KVWI_PROJECTION_RAW;
}

static kvc_status frame(kvw_seq *seq, uint32_t layer, frame_part part, kvk_stream *stream)
{
    const kvw_worker *w = seq->worker;
    const kvw_opts *o = &w->opts;
    const kvwi_level *level = &w->level[0];
    kvwi_device_layer *l = &seq->device->layers[layer];
    bool selects = part != FRAME_ATTEND, attends = part != FRAME_SELECT;
    const kvk_cuda_frame_args args = {
        .q = part == FRAME_SELECT ? l->q_select : l->q_in,
        .dtype = o->dtype,
        .n_q_heads = o->n_q_heads,
        .n_kv_heads = o->n_kv_heads,
        .head_dim = o->head_dim,
        .inv_freq = seq->device->device->inv_freq,
        .proj = seq->device->device->query_proj + (size_t)layer * level->d_in * level->dims,
        .dims = level->dims,
        .score_raw = scores_raw(w),
        .q_index = selects ? l->q_index : NULL,
        .q_far = attends ? l->q_far : NULL,
        .q_near = attends ? l->q_near : NULL,
        .n_tokens = &l->io->n_tokens,
        .n_sink = o->n_sink,
        .n_recent = o->n_recent,
        .far_position = o->far_position,
        .ring_rows = seq->device->ring_rows,
        .near_list = attends ? l->near_list : NULL,
        .n_near = attends ? l->n_near : NULL,
        .index = l->index,
        .index_row_bytes = (uint32_t)level->row_bytes,
        .cands = selects ? l->cands : NULL,
        .expected = part == FRAME_ATTEND ? l->q_select : NULL,
        .differs_p = &l->io->differs,
    };
    return kvk_cuda_frame(seq->device->device->cuda, &args, stream);
}

static kvc_status select_picks(kvw_seq *seq, kvwi_device_layer *l, kvk_stream *stream)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    const kvk_cuda_select_args args = {
        .n_seqs = 1,
        .dims = w->level[0].dims,
        .k = w->opts.k,
        .eps = w->opts.eps,
        .rows_max = d->cap_tokens,
        .q = l->q_index,
        .cands = l->cands,
        .picks = l->picks,
        .n_picks = l->n_picks,
        .workspace = d->select_space,
        .workspace_bytes = d->select_bytes,
    };
    return kvk_cuda_select(d->device->cuda, &args, stream);
}

static kvc_status resolve(kvw_seq *seq, kvwi_device_layer *l, kvk_stream *stream)
{
    const kvw_worker *w = seq->worker;
    const kvk_cuda_resolve_args args = {
        .n_seqs = 1,
        .k = w->opts.k,
        .n_slots = kvwi_slots(w),
        .n_pinned = w->opts.n_sink,
        .picks = l->picks,
        .n_picks = l->n_picks,
        .res = l->res,
        .list = l->list,
        .fetch = l->fetch,
        .stride = seq->device->stride,
        .off = w->opts.n_sink,
        .n_list = l->n_list,
        .n_misses = &l->io->n_misses,
    };
    return kvk_cuda_resolve(seq->device->device->cuda, &args, stream);
}

static kvc_status enqueue_select(kvw_seq *seq, uint32_t layer, kvk_stream *stream)
{
    kvwi_device_layer *l = &seq->device->layers[layer];
    kvc_status st = select_picks(seq, l, stream);
    return st == KVC_OK ? resolve(seq, l, stream) : st;
}

static kvk_cuda_attend_args attend_args(const kvw_seq *seq)
{
    const kvw_worker *w = seq->worker;
    return (kvk_cuda_attend_args){
        .n_seqs = 1,
        .n_q_heads = w->opts.n_q_heads,
        .n_kv_heads = w->opts.n_kv_heads,
        .head_dim = w->opts.head_dim,
        .row_bytes = (uint32_t)w->row_bytes,
        .v_off_bytes = (uint32_t)w->k_bytes,
        .dtype = w->opts.dtype,
        .scale = w->scale,
        .workspace = seq->device->workspace,
        .workspace_bytes = seq->device->workspace_bytes,
    };
}

static kvc_status enqueue_attend(kvw_seq *seq, kvwi_device_layer *l, kvk_stream *stream)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvk_cuda_attend_args far = attend_args(seq), near = attend_args(seq);
    far.q = l->q_far;
    far.list = l->list;
    far.fetch = l->fetch;
    far.n_list = l->n_list;
    far.stride = d->stride;
    far.res = l->res;
    far.source = l->source;
    far.o = l->o_far;
    far.lse = l->lse_far;
    near.q = l->q_near;
    near.list = l->near_list;
    near.n_list = l->n_near;
    near.stride = w->opts.n_recent + 1u;
    near.res = l->ring_res;
    near.k_positions = d->near_pos;
    near.inv_freq = d->device->inv_freq;
    near.o = l->o_near;
    near.lse = l->lse_near;
    const kvk_cuda_finish_args finish = {
        .o_a = l->o_far,
        .lse_a = l->lse_far,
        .o_b = l->o_near,
        .lse_b = l->lse_near,
        .n = w->opts.n_q_heads,
        .dim = w->opts.head_dim,
        .dtype = w->opts.dtype,
        .out = l->out,
        .lse = l->lse,
    };
    kvc_status st = kvk_cuda_attend(d->device->cuda, &near, stream);
    if (st == KVC_OK) {
        st = kvk_cuda_attend(d->device->cuda, &far, stream);
    }
    return st == KVC_OK ? kvk_cuda_finish(d->device->cuda, &finish, stream) : st;
}

static kvc_status enqueue(kvw_seq *seq, uint32_t layer, frame_part part, kvk_stream *stream)
{
    kvwi_device_layer *l = &seq->device->layers[layer];
    kvc_status st = frame(seq, layer, part, stream);
    if (st == KVC_OK && part != FRAME_ATTEND) {
        st = enqueue_select(seq, layer, stream);
    }
    return st == KVC_OK && part != FRAME_SELECT ? enqueue_attend(seq, l, stream) : st;
}

static kvc_status capture(kvw_seq *seq, uint32_t layer, frame_part part, kvk_cuda_graph **graph_p)
{
    kvk_cuda *cuda = seq->device->device->cuda;
    kvk_stream *stream = seq->device->capture;
    kvc_status st = kvk_cuda_graph_begin(cuda, stream);
    if (st != KVC_OK) {
        return st;
    }
    kvc_status enqueued = enqueue(seq, layer, part, stream);
    st = kvk_cuda_graph_end(cuda, stream, graph_p); /* always: else the stream stays captured */
    if (enqueued != KVC_OK) { /* it has the ops before the one that was refused */
        kvk_cuda_graph_destroy(cuda, *graph_p);
        *graph_p = NULL;
        return enqueued;
    }
    return st;
}

kvc_status kvwi_cuda_graphs(kvw_seq *seq, uint32_t layer)
{
    kvwi_device_layer *l = &seq->device->layers[layer];
    kvc_status st = KVC_OK;
    if (l->select == NULL) {
        st = capture(seq, layer, FRAME_SELECT, &l->select);
    }
    if (st == KVC_OK && l->attend == NULL) {
        st = capture(seq, layer, FRAME_ATTEND, &l->attend);
    }
    if (st == KVC_OK && l->whole == NULL) {
        st = capture(seq, layer, FRAME_WHOLE, &l->whole);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a step's graph");
}

void kvwi_cuda_graphs_drop(kvw_seq *seq, kvwi_device_layer *l)
{
    kvk_cuda *cuda = seq->device->device->cuda;
    kvk_cuda_graph_destroy(cuda, l->select);
    kvk_cuda_graph_destroy(cuda, l->attend);
    kvk_cuda_graph_destroy(cuda, l->whole);
    l->select = l->attend = l->whole = NULL;
}
