/*
 * step.c: steps as handles: begin (select, resolve, submit), attend, finish.
 *
 * A step belongs to its sequence's thread. One step per layer may be open; finished ones go to a
 * free list with their buffers, so a warm sequence allocates nothing. Phases live in select.c,
 * resolve.c, fetch.c and attend.c.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/log.h"
#include "base/sum.h"
#include "convert.h"
#include "internal.h"

static void free_leg(kvwi_leg *leg)
{
    kvwi_buf *const bufs[] = {&leg->miss_row,  &leg->miss_pos, &leg->miss_slot, &leg->miss_status,
                              &leg->miss_pick, &leg->near_out, &leg->near_rank};
    for (size_t i = 0; i < sizeof(bufs) / sizeof(bufs[0]); i++) {
        kvwi_buf_fini(bufs[i]);
    }
}

static void free_step(kvw_step *step)
{
    kvwi_buf *const bufs[] = {&step->pos,   &step->rows,     &step->state,   &step->q_rot,
                              &step->q_pos, &step->sub_rows, &step->sub_pos, &step->visible,
                              &step->acc,   &step->part,     &step->near_q,  &step->near_q_pos};
    for (size_t i = 0; i < sizeof(bufs) / sizeof(bufs[0]); i++) {
        kvwi_buf_fini(bufs[i]);
    }
    for (uint32_t i = 0; i < step->n_legs; i++) {
        free_leg(&step->legs[i]);
    }
    free(step);
}

void kvwi_steps_free(kvw_seq *seq)
{
    for (uint32_t i = 0; seq->layers != NULL && i < seq->worker->opts.n_layers; i++) {
        kvw_step_abandon(seq->layers[i].step);
    }
    while (seq->free_steps != NULL) {
        kvw_step *step = seq->free_steps;
        seq->free_steps = step->next;
        free_step(step);
    }
}

static kvw_step *take_step(kvw_seq *seq)
{
    kvw_step *step = seq->free_steps;
    uint32_t n = kvwi_max_u32(seq->worker->servers.n, 1);
    if (step != NULL) {
        seq->free_steps = step->next;
        return step;
    }
    step = calloc(1, sizeof(*step) + n * sizeof(step->legs[0]));
    if (step == NULL) {
        return NULL;
    }
    step->n_legs = n;
    for (uint32_t i = 0; i < n; i++) {
        step->legs[i].step = step;
        step->legs[i].server = i;
    }
    return step;
}

void kvwi_step_give(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    seq->layers[step->layer].step = NULL;
    step->next = seq->free_steps;
    seq->free_steps = step;
}

static kvc_status check_begin(const kvw_seq *seq, uint32_t layer, const void *q, uint32_t n_q)
{
    if (n_q == 0 || n_q > seq->pass.n ||
        seq->layers[layer].n_tokens != seq->pass.first + seq->pass.n) {
        return kvwi_fail(KVC_INVALID, "layer %u: n_q must be 1 to the pass's tokens, appended",
                         layer);
    }
    if (seq->worker->selector->fusion != 0) {
        return kvwi_fail(KVC_INVALID, "selector: %s has retrievers, not steps",
                         seq->worker->opts.selector);
    }
    if (seq->layers[layer].step != NULL) {
        return kvwi_fail(KVC_AGAIN, "layer %u: a step is open", layer);
    }
    const kvw_opts *o = &seq->worker->opts;
    if (!o->device_memory &&
        !kvwi_all_finite(q, (size_t)n_q * o->n_q_heads * o->head_dim, o->dtype)) {
        return kvwi_fail(KVC_INVALID, "layer %u: a query is not finite", layer);
    }
    return KVC_OK;
}

static void reset_leg(kvwi_leg *leg)
{
    leg->n_misses = 0;
    leg->way = KVC_WAY_COUNT;
    leg->tried = 0;
    leg->why = KVC_WHY_CHEAPEST;
    leg->lost = false;
    leg->flight.status = KVC_OK;
    leg->flight.in_flight = false;
    leg->near_sent = false;
    leg->near_here = false;
    leg->n_near_parts = 0;
}

/* A step of this layer, ready to select, where the whole group has one. */
static kvc_status open_step(kvw_seq *seq, uint32_t layer, const void *q_select, uint32_t n_q,
                            kvw_step **step_p)
{
    kvw_step *step = NULL;
    kvc_status st = check_begin(seq, layer, q_select, n_q);
    if (st == KVC_OK && (step = take_step(seq)) == NULL) {
        st = kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    st = kvwi_group_agree(seq->worker, st);
    if (step == NULL) {
        return st;
    }
    step->seq = seq;
    step->layer = layer;
    step->n_q = n_q;
    step->n_tokens = seq->layers[layer].n_tokens;
    step->n_misses = 0;
    step->foretold = false;
    step->on_device = false;
    step->has_acc = false;
    step->attended = false;
    step->attend_status = KVC_OK;
    for (uint32_t i = 0; i < step->n_legs; i++) {
        reset_leg(&step->legs[i]);
    }
    if (st != KVC_OK) {
        kvwi_step_give(step);
        return st;
    }
    seq->layers[layer].step = step;
    *step_p = step;
    return KVC_OK;
}

/* The engine's query where the CPU can read it; NULL: it failed, said. */
static const void *host_query(kvw_step *step, const void *q)
{
    const kvw_worker *w = step->seq->worker;
    size_t width = (size_t)w->opts.n_q_heads * w->opts.head_dim;
    return kvwi_device_to_host(step->seq, q, step->n_q * width * w->elem_bytes,
                               &step->seq->host[0]);
}

static kvc_status begin_on_host(kvw_step *step, const void *q_select)
{
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    kvc_status st = w->device == NULL ? KVC_OK : w->device_ops->settle(seq);
    const void *q = st == KVC_OK ? host_query(step, q_select) : NULL;
    if (q == NULL) {
        return st == KVC_OK ? KVC_DEVICE : st;
    }
    st = kvwi_select(step, q);
    if (st == KVC_OK) {
        st = kvwi_resolve(step);
    } else {
        (void)kvwi_fail(st, "layer %u: selection failed: %s", step->layer, kvc_status_name(st));
    }
    uint32_t n_misses = step->n_misses;
    if (st == KVC_OK) {
        st = kvwi_misses_begin(step);
    }
    if (st == KVC_OK) {
        seq->stats.hits += step->full ? 0 : seq->layers[step->layer].picks.n - n_misses;
    }
    return st;
}

/* whole: kvw_forward's, which finishes it at once with the same query. */
static kvc_status begin(kvw_seq *seq, uint32_t layer, const void *q_select, uint32_t n_q,
                        bool whole, kvw_step **step_p)
{
    kvw_step *step = NULL;
    if (seq == NULL || q_select == NULL || step_p == NULL || layer >= seq->worker->opts.n_layers) {
        return kvwi_fail(KVC_INVALID, "seq, q and step_p must not be NULL, layer must exist");
    }
    *step_p = NULL;
    kvc_status st = open_step(seq, layer, q_select, n_q, &step);
    if (st != KVC_OK) {
        return st;
    }
    KVC_ASSERT(step != NULL); /* no group is well without this rank */
    step->on_device = kvwi_device_takes(step);
    st = step->on_device ? seq->worker->device_ops->step_begin(step, q_select, whole)
                         : begin_on_host(step, q_select);
    if (st != KVC_OK) {
        kvw_step_abandon(step);
        return st;
    }
    *step_p = step;
    return KVC_OK;
}

/* The sum by which finish knows whether the query was the real one. */
static uint64_t query_sum(const kvw_step *step, const void *q)
{
    const kvw_worker *w = step->seq->worker;
    size_t width = (size_t)w->opts.n_q_heads * w->opts.head_dim;
    return kvc_value_sum(q, step->n_q * width * w->elem_bytes);
}

kvc_status kvw_step_begin(kvw_seq *seq, uint32_t layer, const void *q_select, uint32_t n_q,
                          kvw_step **step_p)
{
    kvc_status st = begin(seq, layer, q_select, n_q, false, step_p);
    if (st != KVC_OK) {
        return st;
    }
    kvw_step *step = *step_p;
    KVC_ASSERT(step != NULL);
    if (step->on_device && (step->n_q == 1 || step->full || seq->worker->opts.client == NULL)) {
        return KVC_OK; /* the device compares a single query itself */
    }
    q_select = host_query(step, q_select);
    if (q_select == NULL) {
        kvw_step_abandon(step);
        *step_p = NULL;
        return KVC_DEVICE;
    }
    step->foretold = seq->worker->opts.client != NULL && !step->full;
    step->select_sum = step->foretold ? query_sum(step, q_select) : 0;
    return KVC_OK;
}

/* q: of the CPU's memory. */
static kvc_status attend_on_host(kvw_step *step, const void *q)
{
    if (step->seq->worker->opts.exact) {
        return KVC_OK;
    }
    step->attended = true;
    step->attend_status = kvwi_misses_query(step, q);
    if (step->attend_status == KVC_OK) {
        step->attend_status = kvwi_attend(step, q, KVWI_RESIDENT);
    }
    return step->attend_status;
}

kvc_status kvw_step_attend(kvw_step *step, const void *q)
{
    if (step == NULL || q == NULL || step->attended) {
        return kvwi_fail(KVC_INVALID, "step and q must not be NULL, and a step attends once");
    }
    if (step->on_device) {
        step->attended = true;
        step->attend_status = step->seq->worker->device_ops->step_attend(step, q);
        return step->attend_status;
    }
    q = host_query(step, q);
    return q == NULL ? KVC_DEVICE : attend_on_host(step, q);
}

/* All rows at once where nothing was attended before, else the arrivals. */
static kvc_status attend_rest(kvw_step *step, const void *q)
{
    if (!step->attended) {
        return kvwi_attend(step, q, KVWI_ALL);
    }
    kvc_status st = step->n_misses == 0 ? KVC_OK : kvwi_attend(step, q, KVWI_ARRIVED);
    for (uint32_t i = 0; st == KVC_OK && i < step->n_legs; i++) {
        st = step->legs[i].near_here ? kvwi_near_merge(&step->legs[i]) : KVC_OK;
    }
    return st;
}

/* Whether another query selected; before out is written, which may be q. */
static bool was_foretold_wrong(const kvw_step *step, const void *q)
{
    return step->foretold && !step->seq->worker->opts.reuse_any &&
           query_sum(step, q) != step->select_sum;
}

static kvc_status finish_on_host(kvw_step *step, const void *q, void *out, float *lse)
{
    bool foretold_wrong = was_foretold_wrong(step, q);
    kvc_status st = step->attend_status;
    if (st != KVC_OK) {
        st = kvwi_fail(st, "layer %u: kvw_step_attend failed before", step->layer);
    } else if (!step->attended && !step->seq->worker->opts.exact && step->n_misses != 0) {
        st = attend_on_host(step, q);
    }
    kvc_status fetched = kvwi_misses_wait(step);
    st = st == KVC_OK ? fetched : st;
    if (st == KVC_OK) {
        st = attend_rest(step, q);
    }
    if (st == KVC_OK) {
        st = kvwi_attend_result(step, out, lse);
    }
    if (foretold_wrong) {
        kvwi_names_taint(step->seq);
    }
    return st;
}

/* The CPU does the step, and the engine's memory is the device's. */
static kvc_status finish_across(kvw_step *step, const void *q, void *out, float *lse)
{
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    size_t rows = (size_t)step->n_q * w->opts.n_q_heads;
    size_t out_bytes = rows * w->opts.head_dim * w->elem_bytes, lse_bytes = rows * sizeof(float);
    kvwi_buf *buf = &seq->host[1];
    q = host_query(step, q);
    kvc_status st = q == NULL ? KVC_DEVICE : kvwi_buf_need(buf, lse_bytes + out_bytes);
    if (st != KVC_OK) {
        kvwi_fetch_abandon(step); /* the client must not write into a step that is given back */
        return st;
    }
    float *host_lse = buf->p;
    void *host_out = host_lse + rows;
    st = finish_on_host(step, q, host_out, host_lse);
    if (st == KVC_OK) {
        st = w->device_ops->copy(seq, out, host_out, out_bytes);
    }
    return st == KVC_OK && lse != NULL ? w->device_ops->copy(seq, lse, host_lse, lse_bytes) : st;
}

static kvc_status finish_on_device(kvw_step *step, const void *q, void *out, float *lse)
{
    const kvw_worker *w = step->seq->worker;
    const void *host_q = step->foretold ? host_query(step, q) : q;
    if (host_q == NULL) {
        w->device_ops->step_abandon(step);
        return KVC_DEVICE;
    }
    if (was_foretold_wrong(step, host_q)) {
        kvwi_names_taint(step->seq);
    }
    return w->device_ops->step_finish(step, q, out, lse);
}

kvc_status kvw_step_finish(kvw_step *step, const void *q, void *out, float *lse)
{
    if (step == NULL || q == NULL || out == NULL) {
        return kvwi_fail(KVC_INVALID, "step, q and out must not be NULL");
    }
    const kvw_worker *w = step->seq->worker;
    kvc_status st = KVC_OK;
    if (!step->on_device) {
        st = w->opts.device_memory ? finish_across(step, q, out, lse)
                                   : finish_on_host(step, q, out, lse);
    } else if (step->attend_status != KVC_OK) {
        st = kvwi_fail(step->attend_status, "layer %u: kvw_step_attend failed before", step->layer);
        w->device_ops->step_abandon(step);
    } else {
        st = finish_on_device(step, q, out, lse);
    }
    kvwi_step_give(step);
    return st;
}

void kvw_step_abandon(kvw_step *step)
{
    if (step == NULL) {
        return;
    }
    if (step->on_device) {
        step->seq->worker->device_ops->step_abandon(step);
    } else {
        kvwi_fetch_abandon(step);
    }
    kvwi_step_give(step);
}

kvc_status kvwi_begin_whole(kvw_seq *seq, uint32_t layer, const void *q, uint32_t n_q,
                            kvw_step **step_p)
{
    kvc_status st = begin(seq, layer, q, n_q, true, step_p);
    if (st != KVC_OK && seq->worker->device != NULL &&
        seq->worker->device_ops->settle(seq) != KVC_OK) {
        KVC_LOG_WARN(WORKER, "layer %u: a token may not have come to the device", layer);
    }
    return st;
}

kvc_status kvw_forward(kvw_seq *seq, uint32_t layer, const void *q, const void *k, const void *v,
                       uint32_t n_tokens, void *out, float *lse)
{
    kvw_step *step = NULL;
    kvc_status st = kvwi_append(seq, layer, k, v, n_tokens, true);
    if (st == KVC_OK) {
        st = kvwi_begin_whole(seq, layer, q, n_tokens, &step);
    }
    return st != KVC_OK ? st : kvw_step_finish(step, q, out, lse);
}
