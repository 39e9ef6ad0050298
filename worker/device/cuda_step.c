/*
 * cuda_step.c: a step on the device; what is different for chunks is in cuda_prefill.c.
 *
 * Runs on the sequence's thread. Where every block has an address that the device can read, nothing
 * comes back to the host before the result: the attention brings what is missing. Else the list of
 * what it cannot reach comes to the host once, and a fetch brings those rows to staging,
 * which the device sees as more blocks; or their server attends over them (cuda_near.c). The host
 * waits for the device once a step, or twice with a fetch. Rows read from a server's memory count
 * only if the map still holds afterwards; else they are forgotten and the step is done again.
 * Invariant: between steps every row that the tables call resident is in its slot.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "state.h"

/* How often a step is done again because the map went away under it, before all is fetched. */
#define TRIES   4
/* How long the host looks at a step's last word before it lets CUDA wait, which also hears of
 * failures. */
#define SPIN_NS 2000000u

static kvwi_device_layer *layer_of(const kvw_step *step)
{
    return &step->seq->device->layers[step->layer];
}

static size_t q_bytes(const kvw_worker *w)
{
    return (size_t)w->opts.n_q_heads * w->opts.head_dim * w->elem_bytes;
}

static kvc_status launch(kvw_step *step, kvk_cuda_graph *graph)
{
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = layer_of(step);
    kvc_status st = KVC_OK;
    if (graph == l->select || graph == l->whole) {
        st = kvwi_cuda_cache_offer(step, &l->lane, 0);
    }
    if (st == KVC_OK && graph != l->whole) { /* which takes the new token along */
        st = kvwi_cuda_flush(step->seq, step->layer);
    } else if (!l->pending) {
        l->lane.tokens[0].row = NULL;
    }
    if (st == KVC_OK) {
        st = kvk_cuda_graph_launch(d->device->cuda, graph, d->stream);
    }
    if (st != KVC_OK) {
        kvwi_cuda_cache_lose(step);
        return kvwi_cuda_fail(st, "a step");
    }
    l->pending = false;
    l->lane.n_done += graph != l->select;
    l->n_writes = d->n_writes;
    return KVC_OK;
}

static inline void relax(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

kvc_status kvwi_cuda_await(kvwi_lane *lane, kvk_cuda *cuda, kvk_stream *stream)
{
    const _Atomic uint32_t *done = (const _Atomic uint32_t *)lane->done;
    uint64_t end_ns = kvc_now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(done, memory_order_acquire) == lane->n_done) {
                return KVC_OK;
            }
            relax();
        }
    } while (kvc_now_ns() < end_ns);
    return kvk_cuda_stream_sync(cuda, stream);
}

/* Everything that was enqueued; the last thing was an attention. */
static kvc_status await(kvw_step *step)
{
    kvwi_device_seq *d = step->seq->device;
    kvc_status st = kvwi_cuda_await(&layer_of(step)->lane, d->device->cuda, d->stream);
    step->seq->stats.host_syncs++;
    if (st != KVC_OK) {
        kvwi_cuda_cache_lose(step);
        return kvwi_cuda_fail(st, "a step");
    }
    kvwi_settled(d, layer_of(step)->n_writes); /* of another layer something may be behind it */
    kvwi_cuda_cache_decided(step, &layer_of(step)->lane, 0);
    return KVC_OK;
}

/* The engine's query to where the graphs read it. */
static kvc_status take_query(kvw_step *step, void *to, const void *q)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    if (!w->opts.device_memory) {
        memcpy(to, q, q_bytes(w));
        return KVC_OK;
    }
    kvc_status st = kvk_cuda_copy(d->device->cuda, to, q, q_bytes(w), d->stream);
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a query");
}

static kvc_status start_select(kvw_step *step)
{
    kvwi_device_layer *l = layer_of(step);
    kvc_status st = l->prefill ? kvwi_cuda_prefill_select(step) : launch(step, l->select);
    l->selected = st == KVC_OK;
    return st;
}

/* What the steps of a layer are made from. */
static kvc_status ready(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    kvc_status st = kvwi_cuda_grow(seq, step->n_tokens);
    if (st == KVC_OK && layer_of(step)->prefill) { /* the token's row may be a sink's, say */
        st = kvwi_cuda_flush(seq, step->layer);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_tables(seq, true);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_mirror(seq, step->layer, seq->worker->opts.n_recent + step->n_q);
    }
    return st != KVC_OK              ? st
           : layer_of(step)->prefill ? kvwi_cuda_prefill_open(seq)
                                     : kvwi_cuda_graphs(seq, step->layer);
}

/* The queries that select; they stay the caller's. */
static kvc_status take_select_query(kvw_step *step, const void *q)
{
    if (!layer_of(step)->prefill) {
        return take_query(step, layer_of(step)->lane.q_select, q);
    }
    kvc_status st = kvwi_cuda_prefill_query(step, q);
    return st == KVC_OK && !step->seq->worker->opts.device_memory ? kvwi_cuda_sync(step->seq) : st;
}

kvc_status kvwi_cuda_step_begin(kvw_step *step, const void *q_select, bool whole)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = layer_of(step);
    uint64_t t0 = kvc_now_ns();
    kvwi_cuda_prefill_begin(step);
    l->prefill = step->full || step->n_q > 1;
    kvc_status st = ready(step);
    *l->lane.n_tokens = step->n_tokens;
    *l->lane.differs = 0;
    l->one_query = whole;
    l->chosen = l->selected = l->attended = l->reselected = l->near_failed = false;
    if (l->prefill) { /* which keeps no picks, nor any that others may keep */
        kvwi_cuda_cache_lose(step);
        l->reselected = !step->full;
        l->picks_in = &l->lane;
        l->picks_at = 0;
    }
    if (st == KVC_OK && !whole) {
        st = take_select_query(step, q_select);
    }
    step->deadline_ns = kvc_deadline_ns(seq->worker->opts.fetch_timeout_ns);
    if (st == KVC_OK && !whole) {
        st = start_select(step);
    }
    if (st == KVC_OK && !whole && !l->prefill) {
        st = kvwi_cuda_ahead(step);
    }
    seq->stats.ns_select += kvc_now_ns() - t0;
    return st;
}

/* With what set off before, or bringing what is missing. */
static kvc_status launch_attend(kvw_step *step)
{
    kvwi_device_layer *l = layer_of(step);
    kvc_status st = kvwi_cuda_ahead_join(step);
    return st != KVC_OK ? st
                        : launch(step, l->ahead == KVWI_AHEAD_BROUGHT ? l->attend_here : l->attend);
}

kvc_status kvwi_cuda_step_attend(kvw_step *step, const void *q)
{
    kvwi_device_layer *l = layer_of(step);
    bool here = l->ahead == KVWI_AHEAD_BROUGHT;
    if (l->prefill || l->one_query || l->ahead >= KVWI_AHEAD_ASKED ||
        (!here && (l->n_blank != 0 || !kvwi_cuda_tables_take(step->seq, l)))) {
        return KVC_OK; /* finish does it all */
    }
    kvc_status st = take_query(step, l->lane.q_in, q);
    if (st == KVC_OK) {
        st = launch_attend(step);
    }
    l->attended = st == KVC_OK;
    return st;
}

kvc_status kvwi_cuda_forget_later(kvw_seq *seq, const kvwi_lane *lane, uint32_t at,
                                  const int8_t *status)
{
    kvwi_device_seq *d = seq->device;
    uint32_t stride = kvwi_stride(seq->worker);
    const kvk_cuda_forget_args args = {
        .list = lane->list + (size_t)at * stride,
        .fetch = lane->fetch + (size_t)at * stride,
        .n_list = lane->n_list + at,
        .stride = stride,
        .staged = d->staged,
        .status = status,
        .res = lane->res + at,
    };
    kvc_status st = kvk_cuda_forget(d->device->cuda, &args, d->stream);
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "rows that did not arrive");
}

kvc_status kvwi_cuda_forget(kvw_seq *seq, const kvwi_lane *lane, uint32_t at, const int8_t *status)
{
    kvc_status st = kvwi_cuda_forget_later(seq, lane, at, status);
    if (st != KVC_OK) {
        return st;
    }
    st = kvwi_cuda_sync(seq); /* the status is the next step's too */
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "rows that did not arrive");
}

static kvc_status forget(kvw_step *step, const int8_t *status)
{
    return kvwi_cuda_forget(step->seq, &layer_of(step)->lane, 0, status);
}

/* ---- rows that the device cannot reach ---- */

kvc_status kvwi_cuda_far_list(kvw_step *step)
{
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = layer_of(step);
    kvwi_cuda_staging_choose(step->seq);
    const kvk_cuda_misses_args args = {
        .fetch = l->lane.fetch,
        .n_list = l->lane.n_list,
        .stride = kvwi_stride(step->seq->worker),
        .staged = d->staged,
        .source = l->lane.source,
        .miss_pos = l->miss_pos,
        .n_far = l->n_far,
    };
    kvc_status st = kvk_cuda_misses(d->device->cuda, &args, d->stream);
    if (st == KVC_OK) {
        st = kvwi_cuda_near_query(step);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_sync(step->seq);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a selection");
}

/* After a fetch: what did not come is forgotten, and that is an error or a drop. */
static kvc_status settle_fetch(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = layer_of(step);
    kvc_status first = KVC_OK;
    uint32_t lost = 0;
    for (uint32_t i = 0; i < *l->n_far; i++) {
        if (l->status[i] != KVC_OK) {
            first = lost++ == 0 ? (kvc_status)l->status[i] : first;
        }
    }
    uint32_t came = *l->n_far - lost;
    kvwi_flight_count(seq, 0, &l->flight.info, came, seq->worker->row_bytes);
    seq->n_fetched += came;
    if (lost == 0) {
        return KVC_OK;
    }
    first = l->flight.status != KVC_OK ? l->flight.status : first;
    bool drop = seq->worker->opts.policy == KVW_DROP;
    kvc_status st = forget(step, drop ? l->status : NULL);
    if (st != KVC_OK) {
        return st;
    }
    if (!drop) {
        return kvwi_fail(first, "layer %u: %u of %u rows did not arrive: %s", step->layer, lost,
                         *l->n_far, kvc_status_name(first));
    }
    seq->stats.rows_dropped += lost;
    kvwi_names_taint(seq);
    return KVC_OK;
}

void kvwi_cuda_far_send(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    kvwi_device_layer *l = layer_of(step);
    const kvc_pick_group group = {
        .part = w->kv_parts[step->layer],
        .row_bytes = (uint32_t)w->row_bytes,
        .n_picks = *l->n_far,
        .picks = l->miss_pos,
    };
    memset(l->status, KVC_NOT_FOUND, *l->n_far);
    kvwi_flight_send(seq, 0, &l->flight, group, kvwi_cuda_staging_regions(seq->device), l->status,
                     step->deadline_ns);
}

/* Rows without an address, which are listed, are in staging, unless they did not come; asked: they
 * set off before. */
static kvc_status fetch_far(kvw_step *step, bool asked)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = layer_of(step);
    uint64_t t0 = kvc_now_ns();
    if (*l->n_far == 0) {
        return KVC_OK;
    }
    if (!asked) {
        kvwi_cuda_ahead_yield(seq);
        kvwi_cuda_far_send(step);
    }
    (void)kvwi_flight_land(&l->flight, step->deadline_ns);
    if (asked) {
        seq->device->staged_for = NULL;
    }
    seq->stats.ns_fetch_wait += kvc_now_ns() - t0;
    return settle_fetch(step);
}

/* ---- the step ---- */

/* Where the results of a chunk go. */
typedef struct outputs {
    void *out;
    float *lse;
} outputs;

static kvc_status start_attend(kvw_step *step, const outputs *to)
{
    kvwi_device_layer *l = layer_of(step);
    return l->prefill ? kvwi_cuda_prefill_attend(step, to->out, to->lse) : launch_attend(step);
}

/* One attempt; on return the device has done it. *far_p: rows that a fetch brought. */
static kvc_status attempt(kvw_step *step, const outputs *to, uint32_t *far_p)
{
    kvwi_device_layer *l = layer_of(step);
    kvc_status st = KVC_OK;
    *far_p = 0;
    if (l->n_blank == 0 && l->one_query && !l->selected && !l->prefill) {
        st = launch(step, l->whole);
        l->selected = st == KVC_OK;
    } else {
        st = l->selected ? KVC_OK : start_select(step);
        bool asked = l->ahead == KVWI_AHEAD_ASKED;
        bool asks = asked || (l->ahead == KVWI_AHEAD_NONE && l->n_blank != 0);
        if (st == KVC_OK && asks && !l->attended) {
            st = asked ? KVC_OK : kvwi_cuda_far_list(step);
            if (st == KVC_OK && !asked && kvwi_cuda_near_is_way(step)) {
                *far_p = *l->n_far;
                return kvwi_cuda_near(step);
            }
            if (st == KVC_OK) {
                st = fetch_far(step, asked);
            }
            *far_p = st == KVC_OK ? *l->n_far : 0;
        }
        if (st == KVC_OK && !l->attended) {
            st = start_attend(step, to);
        }
    }
    if (st == KVC_OK && l->prefill && (st = kvwi_cuda_sync(step->seq)) != KVC_OK) {
        st = kvwi_cuda_fail(st, "a step");
    }
    return st == KVC_OK && !l->prefill ? await(step) : st;
}

/* What was picked is to be picked again: the rows may not be those of the tokens. */
static kvc_status start_over(kvw_step *step)
{
    kvwi_device_layer *l = layer_of(step);
    kvc_status st = kvwi_cuda_ahead_join(step);
    kvwi_cuda_ahead_end(step);
    if (st == KVC_OK) {
        st = forget(step, NULL);
    }
    l->selected = l->attended = false;
    return st;
}

/* The addresses that the attention reads are as they are now; *late_p: they went meanwhile. */
static kvc_status take_tables(kvw_step *step, bool maps, bool *late_p)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = layer_of(step);
    *late_p = false;
    if (l->attended || l->ahead == KVWI_AHEAD_BROUGHT) {
        return KVC_OK;
    }
    kvc_status st = kvwi_cuda_tables(seq, maps);
    if (st == KVC_OK && kvwi_cuda_ahead_failed(step)) {
        st = start_over(step);
    }
    *late_p = st == KVC_OK && !kvwi_cuda_tables_take(seq, l);
    return st;
}

/* Until the map held for as long as it was read. */
static kvc_status run(kvw_step *step, const outputs *to, uint32_t *far_p)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = layer_of(step);
    bool near_failed = false;
    for (int i = 0;; i++) {
        bool late = false;
        kvc_status st = take_tables(step, i < TRIES, &late);
        if (late) {
            continue; /* gone in between; after TRIES there is none to go */
        }
        if (st == KVC_OK) {
            st = attempt(step, to, far_p);
        }
        bool again = st == KVC_OK && l->near_failed && !near_failed;
        if (st != KVC_OK ||
            (!again && (*l->lane.n_misses == *far_p || kvwi_cuda_tables_hold(seq, l->stamp)))) {
            return st;
        }
        near_failed = l->near_failed;
        KVC_LOG_DEBUG(WORKER, "layer %u: %s, again", step->layer,
                      again ? "the server did not attend" : "mapped rows went away");
        st = start_over(step);
        if (st != KVC_OK) {
            return st;
        }
    }
}

static kvc_status give_result(kvw_step *step, void *out, float *lse)
{
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    kvwi_device_layer *l = layer_of(step);
    size_t lse_bytes = w->opts.n_q_heads * sizeof(float);
    if (l->prefill) {
        return kvwi_cuda_prefill_give(step, out, lse);
    }
    if (!w->opts.device_memory) {
        memcpy(out, l->lane.out, q_bytes(w));
        if (lse != NULL) {
            memcpy(lse, l->lane.lse, lse_bytes);
        }
        return KVC_OK;
    }
    kvk_cuda *cuda = seq->device->device->cuda;
    kvc_status st = kvk_cuda_copy(cuda, out, l->lane.out, q_bytes(w), seq->device->stream);
    if (st == KVC_OK && lse != NULL) {
        st = kvk_cuda_copy(cuda, lse, l->lane.lse, lse_bytes, seq->device->stream);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a result");
}

void kvwi_cuda_step_done(kvw_step *step, uint32_t n_misses, uint32_t n_far)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = layer_of(step);
    uint32_t k = kvwi_cuda_prefill_picks(step);
    kvwi_picks *picks = &seq->layers[step->layer].picks;
    kvwi_cuda_tables_let_go(l);
    l->selected = l->attended = false;
    seq->stats.rows_ahead += l->ahead == KVWI_AHEAD_BROUGHT ? n_misses
                             : l->ahead == KVWI_AHEAD_ASKED ? n_far
                                                            : 0;
    kvwi_cuda_ahead_end(step);
    picks->n = step->full ? 0 : k; /* there are more candidates, or nothing was chosen */
    picks->on_device = !step->full;
    seq->stats.steps++;
    seq->stats.steps_device++;
    seq->stats.full_steps += step->full;
    seq->stats.reselects += l->reselected;
    seq->stats.picks += picks->n;
    seq->stats.misses += n_misses;
    seq->stats.hits += step->full ? 0 : k - n_misses;
    seq->stats.rows_dram += n_misses - n_far;
    seq->stats.bytes_fetched += (uint64_t)(n_misses - n_far) * seq->worker->row_bytes;
    seq->n_fetched += n_misses - n_far;
    seq->n_reused_rows += k - n_misses;
}

kvc_status kvwi_cuda_step_finish(kvw_step *step, const void *q, void *out, float *lse)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = layer_of(step);
    uint64_t t0 = kvc_now_ns();
    uint32_t n_far = 0;
    kvc_status st = KVC_OK;
    if (l->prefill) {
        st = kvwi_cuda_prefill_query(step, q);
    } else if (!l->attended) {
        st = take_query(step, l->lane.q_in, q);
    }
    if (st == KVC_OK && l->one_query && !l->prefill) { /* in case it comes to two graphs */
        st = take_query(step, l->lane.q_select, q);
    }
    if (st == KVC_OK) {
        st = run(step, &(outputs){out, lse}, &n_far);
    }
    bool was_run = st == KVC_OK;
    if (was_run) {
        st = kvwi_cuda_finite(seq, step->layer);
    }
    if (st != KVC_OK) {
        kvwi_cuda_step_abandon(step);
        if (was_run) { /* its token is none of the layer's */
            kvwi_cuda_cache_lose(step);
        }
        return st;
    }
    kvwi_cuda_step_done(step, *l->lane.n_misses, n_far);
    if (!l->prefill && *l->lane.differs != 0 && seq->worker->opts.client != NULL &&
        !seq->worker->opts.reuse_any) {
        kvwi_names_taint(seq); /* selected by a prediction that turned out otherwise */
    }
    st = give_result(step, out, lse);
    seq->stats.ns_attend += kvc_now_ns() - t0;
    return st;
}

/* The rows that resolve gave slots to may not have come. */
void kvwi_cuda_step_abandon(kvw_step *step)
{
    kvwi_device_layer *l = layer_of(step);
    kvc_status st = kvwi_cuda_ahead_join(step);
    kvwi_cuda_ahead_end(step);
    if (st != KVC_OK || kvwi_cuda_flush(step->seq, step->layer) != KVC_OK ||
        (l->selected && forget(step, NULL) != KVC_OK)) {
        KVC_LOG_WARN(WORKER, "a step is abandoned and the device does not answer");
        kvwi_cuda_cache_lose(step);
    } else if (l->selected && !l->prefill) {
        kvwi_cuda_cache_decided(step, &l->lane, 0);
    }
    kvwi_cuda_tables_let_go(l);
    l->selected = l->attended = false;
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

kvc_status kvwi_cuda_picks(const kvw_seq *seq, uint32_t layer)
{
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[layer];
    kvwi_picks *picks = &seq->layers[layer].picks;
    const uint32_t *from = l->picks_in->picks + (size_t)l->picks_at * seq->worker->opts.k;
    kvc_status st =
        kvk_cuda_copy(d->device->cuda, picks->pos, from, picks->n * sizeof(*picks->pos), d->stream);
    if (st == KVC_OK) {
        st = kvk_cuda_stream_sync(d->device->cuda, d->stream);
    }
    if (st != KVC_OK) {
        return kvwi_cuda_fail(st, "picks");
    }
    qsort(picks->pos, picks->n, sizeof(*picks->pos), ascending);
    picks->on_device = false;
    return KVC_OK;
}
