/*
 * select.c: the first phase of a step: what will be attended.
 *
 * Token classes of a step over n tokens: sinks [0, n_sink), candidates [n_sink, near_begin), recent
 * and new [near_begin, n). Where there are no more candidates than k, everything is attended at its
 * own position and nothing is selected. Selection Cache (2411.02886 alg. 1, single queries only):
 * picks are kept with the query of their reselect, and kept on while the cosine to it stays at or
 * above theta; near_begin then stays too, so tokens that left recent since are still attended. At
 * most n_recent tokens of drift: then it reselects, which bounds memory.
 */
#include <math.h>
#include <string.h>

#include "base/clock.h"
#include "internal.h"

uint32_t kvwi_near_begin(const kvw_worker *worker, uint32_t n_tokens, uint32_t n_q)
{
    const kvw_opts *o = &worker->opts;
    uint64_t near = worker->selector->recent_holds_new ? kvwi_max_u32(o->n_recent, n_q)
                                                       : (uint64_t)o->n_recent + n_q;
    return near < n_tokens ? n_tokens - (uint32_t)near : 0;
}

/* The query in f32, as the Selection Cache compares it. */
static kvc_status flat_query(kvw_seq *seq, const void *q, const float **out_p)
{
    const kvw_worker *w = seq->worker;
    uint32_t width = w->opts.n_q_heads * w->opts.head_dim;
    kvwi_buf *buf = &seq->select.buf[KVW_SCRATCH_TMP];
    kvc_status st = kvwi_buf_need(buf, width * sizeof(float));
    if (st != KVC_OK) {
        return st;
    }
    const kvk_convert_args args = {
        .in = {q, width * w->elem_bytes, w->opts.dtype}, .n = 1, .width = width, .out = buf->p};
    *out_p = buf->p;
    return w->ops->convert(w->be, &args, NULL);
}

/* Cosine over the heads of the whole group: every worker gets the same number. */
static kvc_status group_cosine(const kvw_worker *w, const float *a, const float *b, uint32_t n,
                               double *cos_p)
{
    double ab = 0, aa = 0, bb = 0;
    for (uint32_t i = 0; i < n; i++) {
        ab += (double)a[i] * (double)b[i];
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
    }
    float sums[3] = {(float)ab, (float)aa, (float)bb};
    kvc_status st = w->opts.all_reduce(w->opts.all_reduce_arg, "sum", sums, 3);
    double norms = sqrt((double)sums[1]) * sqrt((double)sums[2]);
    *cos_p = norms > 0 ? (double)sums[0] / norms : 0;
    return st;
}

static kvc_status cosine(const kvw_worker *w, const float *a, const float *b, double *cos_p)
{
    uint32_t n = w->opts.n_q_heads * w->opts.head_dim;
    if (w->opts.all_reduce != NULL) {
        return group_cosine(w, a, b, n, cos_p);
    }
    const kvk_cosine_args args = {.a = a, .b = b, .n = n, .cos_p = cos_p};
    return w->ops->cosine(w->be, &args, NULL);
}

/* Whether the layer's picks serve this query; *flat_p is the query in f32. */
static kvc_status try_reuse(kvw_step *step, const void *q, uint32_t near, bool *reuse_p,
                            const float **flat_p)
{
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    const kvwi_picks *picks = &seq->layers[step->layer].picks;
    *reuse_p = false;
    kvc_status st = flat_query(seq, q, flat_p);
    if (st != KVC_OK || !picks->cached || near - picks->near_begin > w->opts.n_recent) {
        return st;
    }
    double c = 0;
    st = cosine(w, *flat_p, picks->query, &c);
    *reuse_p = st == KVC_OK && c >= w->opts.reselect_cos;
    return st;
}

static kvc_status reselect(kvw_step *step, const void *q, uint32_t near)
{
    kvw_seq *seq = step->seq;
    kvwi_layer *l = &seq->layers[step->layer];
    seq->select.layer = step->layer;
    l->picks.cached = false;
    kvc_status st = kvwi_pick(&seq->select, l->level, q, step->n_q, seq->worker->opts.n_sink, near,
                              l->picks.pos, &l->picks.n);
    seq->stats.reselects++;
    return st;
}

static kvc_status select_some(kvw_step *step, const void *q, uint32_t near)
{
    kvw_seq *seq = step->seq;
    const kvw_opts *o = &seq->worker->opts;
    kvwi_picks *picks = &seq->layers[step->layer].picks;
    bool cache = o->reselect_cos != 0 && step->n_q == 1, reuse = false;
    const float *flat = NULL;
    kvc_status st = cache ? try_reuse(step, q, near, &reuse, &flat) : KVC_OK;
    if (st != KVC_OK) {
        return st;
    }
    if (reuse) {
        step->near_begin = picks->near_begin;
        return KVC_OK;
    }
    if (cache) { /* before the selection takes the scratch */
        memcpy(picks->query, flat, (size_t)o->n_q_heads * o->head_dim * sizeof(float));
    }
    st = reselect(step, q, near);
    picks->cached = st == KVC_OK && cache;
    picks->near_begin = near;
    step->near_begin = near;
    return st;
}

kvc_status kvwi_select(kvw_step *step, const void *q_select)
{
    kvw_seq *seq = step->seq;
    kvwi_picks *picks = &seq->layers[step->layer].picks;
    uint64_t t0 = kvc_now_ns();
    uint32_t near = kvwi_near_begin(seq->worker, step->n_tokens, step->n_q);
    kvc_status st = KVC_OK;
    step->full = kvwi_is_full(seq->worker, near);
    picks->on_device = false;
    step->near_begin = 0;
    if (step->full) {
        picks->n = 0;
        picks->cached = false;
        seq->stats.full_steps++;
    } else {
        st = select_some(step, q_select, near);
        seq->stats.picks += picks->n;
    }
    seq->stats.steps++;
    seq->stats.ns_select += kvc_now_ns() - t0;
    return st;
}
