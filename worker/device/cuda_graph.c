/*
 * cuda_graph.c: what a step enqueues, captured once for each layer: the selection, the attention,
 * and both together with the new token for a step whose query does not change in between.
 *
 * Runs on the thread of the sequence, or of the batch. Rows are attended in this order whatever was
 * resident: sinks and picks, then recent and new (numbered from 0). Keys of the former are not
 * rotated (ESA), or end before the latter at -1 (TokenSelect): only differences of positions count.
 */
#include "state.h"

static kvc_status frame(const kvw_worker *w, uint32_t layer, const kvwi_lane *lane,
                        kvwi_graph_part part, kvk_stream *stream)
{
    const kvw_opts *o = &w->opts;
    const kvwi_level *level = &w->level[0];
    bool selects = part == KVWI_SELECT || part == KVWI_WHOLE, attends = part != KVWI_SELECT;
    bool per_head = kvwi_per_head(w);
    const kvk_cuda_frame_args args = {
        .n_seqs = lane->n_seqs,
        .n_q_heads = o->n_q_heads,
        .n_kv_heads = o->n_kv_heads,
        .head_dim = o->head_dim,
        .dims = level->dims,
        .q = part == KVWI_SELECT ? lane->q_select : lane->q_in,
        .dtype = o->dtype,
        .score_raw = kvwi_scores_raw(w),
        .inv_freq = w->device->inv_freq,
        .proj = kvwi_layer_proj(w, w->device->query_proj, kvwi_finest(w), layer),
        .q_index = selects ? lane->q_index : NULL,
        .q_far = attends && !per_head ? lane->q_far : NULL,
        .q_near = attends ? lane->q_near : NULL,
        .n_tokens = lane->n_tokens,
        .n_sink = o->n_sink,
        .n_recent = o->n_recent,
        .far_position = o->far_position,
        .n_near = attends || per_head ? lane->n_near : NULL,
        .near_first = per_head && !selects ? NULL : lane->near_first,
        .cands = selects ? lane->cands : NULL,
        .expected = selects ? NULL : lane->q_select,
        .differs = lane->differs,
        .tokens = part == KVWI_WHOLE ? lane->tokens : NULL,
        .kv = part == KVWI_WHOLE ? lane->kv : NULL,
        .row_dtype = w->row_dtype,
        .key_proj = kvwi_layer_proj(w, w->device->key_proj, kvwi_finest(w), layer),
        .workspace = lane->frame_space,
        .workspace_bytes = lane->frame_bytes,
        .per_head = per_head,
        .fine_dims = kvwi_fine_dims(w),
        .q_fine = selects ? lane->q_fine : NULL,
        .threshold = o->reselect_cos,
        .last = selects ? lane->last : NULL,
        .kept_first = lane->kept_first,
        .keep = lane->keep,
        .kept = lane->kept,
    };
    return kvk_cuda_frame(w->device->cuda, &args, stream);
}

static kvk_cuda_resolve_args resolve_args(const kvw_worker *w, const kvwi_lane *lane)
{
    return (kvk_cuda_resolve_args){
        .n_seqs = lane->n_seqs,
        .k = w->opts.k,
        .n_slots = kvwi_slots(w),
        .n_pinned = w->opts.n_sink,
        .picks = lane->ordered,
        .n_picks = lane->n_picks,
        .res = lane->res,
        .list = lane->list,
        .fetch = lane->fetch,
        .stride = kvwi_stride(w),
        .off = w->opts.n_sink,
        .n_list = lane->n_list,
        .n_misses = lane->n_misses,
    };
}

static kvc_status resolve(const kvw_worker *w, const kvwi_lane *lane, kvk_stream *stream)
{
    const kvk_cuda_resolve_args args = resolve_args(w, lane);
    return kvk_cuda_resolve(w->device->cuda, &args, stream);
}

/* A whole step resolves as well; the frame is not the op before, so what is near may be read early.
 */
static kvk_cuda_attend_args attend_args(const kvw_worker *w, const kvwi_lane *lane,
                                        kvwi_graph_part part)
{
    const kvw_opts *o = &w->opts;
    bool here = part == KVWI_ATTEND_HERE;
    return (kvk_cuda_attend_args){
        .n_seqs = lane->n_seqs,
        .n_q_heads = o->n_q_heads,
        .n_kv_heads = o->n_kv_heads,
        .head_dim = o->head_dim,
        .q = lane->q_far,
        .list = lane->list,
        .fetch = here ? NULL : lane->fetch,
        .n_list = lane->n_list,
        .stride = kvwi_stride(w),
        .res = lane->res,
        .source = here ? NULL : lane->source,
        .row_bytes = (uint32_t)w->row_bytes,
        .v_off_bytes = (uint32_t)w->k_bytes,
        .dtype = w->row_dtype,
        .k_positions = lane->k_positions,
        .inv_freq = lane->k_positions == NULL ? NULL : w->device->inv_freq,
        .scale = w->scale,
        .workspace = lane->attend_space,
        .workspace_bytes = lane->attend_bytes,
        .near = {.q = lane->q_near,
                 .ring = lane->ring_res,
                 .first = lane->near_first,
                 .n = lane->n_near,
                 .ring_rows = kvwi_ring_rows(w),
                 .n_max = kvwi_near_max(w),
                 .inv_freq = w->device->inv_freq,
                 .early = part == KVWI_WHOLE},
        .result = {.out = lane->out,
                   .dtype = o->dtype,
                   .lse = lane->lse,
                   .counts = lane->counts,
                   .done = lane->done},
        .resolve = part == KVWI_WHOLE ? resolve_args(w, lane) : (kvk_cuda_resolve_args){0},
        .resolved = lane->resolved,
    };
}

static kvc_status attend(const kvw_worker *w, const kvwi_lane *lane, kvwi_graph_part part,
                         kvk_stream *stream)
{
    const kvk_cuda_attend_args args = attend_args(w, lane, part);
    return kvk_cuda_attend(w->device->cuda, &args, stream);
}

kvc_status kvwi_cuda_partial(const kvw_worker *w, uint32_t layer, const kvwi_lane *lane, float *o,
                             float *lse, kvk_stream *stream)
{
    kvk_cuda_attend_args args = attend_args(w, lane, KVWI_ATTEND);
    args.o = o;
    args.lse = lse;
    args.result = (kvk_cuda_result){.out = NULL};
    kvc_status st = frame(w, layer, lane, KVWI_ATTEND, stream);
    return st == KVC_OK ? kvk_cuda_attend(w->device->cuda, &args, stream) : st;
}

static kvc_status enqueue(const kvw_worker *w, uint32_t layer, const kvwi_lane *lane,
                          kvwi_graph_part part, kvk_stream *stream)
{
    bool selects = part == KVWI_SELECT || part == KVWI_WHOLE;
    kvc_status st = frame(w, layer, lane, part, stream);
    if (st == KVC_OK && selects) {
        st = w->device->selector->select(w, lane, stream);
    }
    if (st == KVC_OK && part == KVWI_SELECT) {
        st = resolve(w, lane, stream);
    }
    return st == KVC_OK && part != KVWI_SELECT ? attend(w, lane, part, stream) : st;
}

kvc_status kvwi_cuda_capture(const kvw_worker *w, uint32_t layer, const kvwi_lane *lane,
                             kvwi_graph_part part, kvk_stream *stream, kvk_cuda_graph **graph_p)
{
    kvk_cuda *cuda = w->device->cuda;
    kvc_status st = kvk_cuda_graph_begin(cuda, stream);
    if (st != KVC_OK) {
        return st;
    }
    kvc_status enqueued = enqueue(w, layer, lane, part, stream);
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
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[layer];
    kvc_status st = KVC_OK;
    if (l->select == NULL) { /* growth drops all three */
        l->lane.rows_max = d->cap_tokens;
        l->lane.select_space = d->select_space;
        l->lane.select_bytes = d->select_bytes;
        st = kvwi_cuda_capture(w, layer, &l->lane, KVWI_SELECT, d->capture, &l->select);
    }
    if (st == KVC_OK && l->attend == NULL) {
        st = kvwi_cuda_capture(w, layer, &l->lane, KVWI_ATTEND, d->capture, &l->attend);
    }
    if (st == KVC_OK && l->whole == NULL) {
        st = kvwi_cuda_capture(w, layer, &l->lane, KVWI_WHOLE, d->capture, &l->whole);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a step's graph");
}

kvc_status kvwi_cuda_graph_here(kvw_seq *seq, uint32_t layer)
{
    kvwi_device_layer *l = &seq->device->layers[layer];
    kvc_status st = KVC_OK;
    if (l->attend_here == NULL) {
        st = kvwi_cuda_capture(seq->worker, layer, &l->lane, KVWI_ATTEND_HERE, seq->device->capture,
                               &l->attend_here);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a step's graph");
}

void kvwi_cuda_graphs_drop(kvw_seq *seq, kvwi_device_layer *l)
{
    kvk_cuda *cuda = seq->device->device->cuda;
    kvk_cuda_graph_destroy(cuda, l->select);
    kvk_cuda_graph_destroy(cuda, l->attend);
    kvk_cuda_graph_destroy(cuda, l->whole);
    kvk_cuda_graph_destroy(cuda, l->attend_here);
    l->select = l->attend = l->whole = l->attend_here = NULL;
}
