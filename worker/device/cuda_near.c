/*
 * cuda_near.c: one way of a decode step's rows that the device cannot reach: their server attends
 * over them, and its partial is merged with the device's own, on the device.
 *
 * Runs on the sequence's thread, inside a step's finish. The query comes to pinned memory (it is
 * there already where the engine's memory is the host's), the server's partial goes from pinned
 * memory to the device; the device attends over what it has meanwhile. Rows of partials do not
 * become resident: the slots that they were given are empty again. Invariant: a server's partial
 * counts only if it covers every row that was asked for; else nothing of it does, and the step is
 * done again by rows.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "state.h"

/* Time that rows have where this way does not come to an end: of what is left. */
#define SHARE 2u

struct kvwi_device_near {
    void *pinned, *memory;
    uint8_t *q;      /* pinned: the engine's, where that is the device's */
    float *o, *lse;  /* pinned: the server's partial */
    uint8_t *answer; /* the same as it comes, o in the model's dtype */
    int8_t *status;  /* of each row that was asked for */
    uint32_t *fetch; /* pinned: the device's list, where rows are numbered by their places in it */
    uint32_t *ranks;
    float *o_own; /* device: the device's own */
    float *lse_own;
};

/* ---- memory ---- */

static size_t o_bytes(const kvw_worker *w)
{
    return (size_t)w->opts.n_q_heads * w->opts.head_dim * w->elem_bytes;
}

/* Whether steps of such a worker may go this way at all. A pass of one token may be a chunk, whose
 * blocks others reuse: these do not depend on what was resident. */
static bool is_possible(const kvw_worker *w)
{
    return w->servers.n == 1 && !w->opts.exact && w->opts.chunk_tokens > 1 &&
           (w->way == KVC_WAY_COUNT || w->way == KVC_WAY_NEAR);
}

/* Whether keys of the list are rotated by their places in it (TokenSelect). */
static bool is_ranked(const kvw_worker *w)
{
    return w->selector->positions == KVW_RENUMBER && w->inv_freq != NULL;
}

static size_t carve_pinned(const kvw_worker *w, kvwi_device_near *n, void *base)
{
    size_t heads = w->opts.n_q_heads, numbers = heads * w->opts.head_dim;
    kvwi_carver c = {.base = base};
    n->q = kvwi_carve(&c, o_bytes(w));
    n->o = kvwi_carve(&c, numbers * sizeof(*n->o));
    n->lse = kvwi_carve(&c, heads * sizeof(*n->lse));
    n->answer = kvwi_carve(&c, o_bytes(w));
    n->status = kvwi_carve(&c, kvwi_stride(w));
    n->fetch = kvwi_carve(&c, kvwi_stride(w) * sizeof(*n->fetch));
    n->ranks = kvwi_carve(&c, kvwi_stride(w) * sizeof(*n->ranks));
    return c.at;
}

static size_t carve_device(const kvw_worker *w, kvwi_device_near *n, void *base)
{
    size_t heads = w->opts.n_q_heads, numbers = heads * w->opts.head_dim;
    kvwi_carver c = {.base = base};
    n->o_own = kvwi_carve(&c, numbers * sizeof(*n->o_own));
    n->lse_own = kvwi_carve(&c, heads * sizeof(*n->lse_own));
    return c.at;
}

kvc_status kvwi_cuda_near_open(kvw_seq *seq)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvk_cuda *cuda = d->device->cuda;
    if (!is_possible(w)) {
        return KVC_OK;
    }
    kvwi_device_near *n = calloc(1, sizeof(*n));
    if (n == NULL) {
        return KVC_NO_MEMORY;
    }
    d->near = n;
    size_t device_bytes = carve_device(w, n, NULL);
    kvc_status st = kvk_cuda_alloc(cuda, KVK_CUDA_PINNED, carve_pinned(w, n, NULL), &n->pinned);
    if (st == KVC_OK) {
        st = kvk_cuda_alloc(cuda, KVK_CUDA_DEVICE, device_bytes, &n->memory);
    }
    if (st == KVC_OK) {
        d->device_bytes += device_bytes;
        (void)carve_pinned(w, n, n->pinned);
        (void)carve_device(w, n, n->memory);
    }
    return st;
}

void kvwi_cuda_near_close(kvw_seq *seq)
{
    kvwi_device_near *n = seq->device->near;
    kvk_cuda *cuda = seq->device->device->cuda;
    if (n == NULL) {
        return;
    }
    kvk_cuda_free(cuda, KVK_CUDA_PINNED, n->pinned);
    kvk_cuda_free(cuda, KVK_CUDA_DEVICE, n->memory);
    free(n);
}

/* ---- the choice ---- */

static bool may(const kvw_step *step, const kvwi_device_layer *l)
{
    return step->seq->device->near != NULL && !l->prefill && !l->near_failed;
}

kvc_status kvwi_cuda_near_query(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    const kvwi_device_layer *l = &d->layers[step->layer];
    kvc_status st = KVC_OK;
    if (!may(step, l)) {
        return KVC_OK;
    }
    if (w->opts.device_memory) {
        st = kvk_cuda_copy(d->device->cuda, d->near->q, l->lane.q_in, o_bytes(w), d->stream);
    }
    if (st == KVC_OK && is_ranked(w)) {
        st = kvk_cuda_copy(d->device->cuda, d->near->fetch, l->lane.fetch,
                           kvwi_stride(w) * sizeof(*d->near->fetch), d->stream);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a query");
}

bool kvwi_cuda_near_is_way(const kvw_step *step)
{
    const kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    const kvwi_device_layer *l = &seq->device->layers[step->layer];
    if (!may(step, l) || *l->n_far == 0) {
        return false;
    }
    const kvc_way_ask ask = {
        .n_rows = *l->n_far,
        .row_bytes = (uint32_t)w->row_bytes,
        .n_q = 1,
        .q_bytes = o_bytes(w),
        .o_bytes = o_bytes(w) + w->opts.n_q_heads * sizeof(float),
        .reuse = kvwi_way_reuse(seq),
        .because = KVC_WHY_CHEAPEST,
    };
    return kvwi_way_choose(w, 0, ask) == KVC_WAY_NEAR;
}

/* ---- the step ---- */

/* The far rows' places in the list, and that of the query behind it and the near rows: on the
 * device these are all less by the list's length, and only differences count. */
static uint32_t find_ranks(const kvw_step *step)
{
    const kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    const kvwi_device_seq *d = seq->device;
    const kvwi_lane *lane = &d->layers[step->layer].lane;
    bool kept = lane->last != NULL && lane->kept[0] != 0;
    uint32_t near_begin =
        kept ? seq->layers[step->layer].picks.near_begin : kvwi_near_begin(w, step->n_tokens, 1);
    for (uint32_t i = 0; i < kvwi_stride(w); i++) {
        if (d->near->fetch[i] >= d->staged && d->near->fetch[i] != KVK_CUDA_RESIDENT) {
            d->near->ranks[d->near->fetch[i] - d->staged] = i;
        }
    }
    return kvwi_stride(w) + step->n_tokens - near_begin - 1u;
}

static kvc_status ask_server(kvw_step *step, kvc_op *op)
{
    const kvw_worker *w = step->seq->worker;
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = &d->layers[step->layer];
    const uint32_t position = is_ranked(w) ? find_ranks(step) : w->opts.far_position;
    const kvc_attend_group group = {
        .context = kvwi_cuda_context(step->seq),
        .part = w->kv_parts[step->layer],
        .n_picks = *l->n_far,
        .picks = l->miss_pos,
        .ranks = is_ranked(w) ? d->near->ranks : NULL,
        .q_positions = w->inv_freq != NULL ? &position : NULL,
        .row_bytes = (uint32_t)w->row_bytes,
        .n_q = 1,
        .n_q_heads = w->opts.n_q_heads,
        .dim = w->opts.head_dim,
        .q_dtype = kvwi_wire_dtype(w->opts.dtype),
        .o_dtype = kvwi_wire_dtype(w->opts.dtype),
        .q = w->opts.device_memory ? d->near->q : l->lane.q_in,
        .o = d->near->answer,
        .lse = d->near->lse,
    };
    uint64_t now_ns = kvc_now_ns();
    uint64_t left_ns = step->deadline_ns > now_ns ? step->deadline_ns - now_ns : 0;
    memset(d->near->status, KVC_NOT_FOUND, *l->n_far);
    memset(&l->flight.info, 0, sizeof(l->flight.info));
    kvc_op_init(op, NULL, NULL);
    return kvc_attend(w->opts.client, &group, 1, d->near->status, &l->flight.info,
                      now_ns + left_ns / SHARE, op);
}

/* The device's own part, without the rows that are far. */
static kvc_status attend_own(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[step->layer];
    memset(l->status, KVC_NOT_FOUND, *l->n_far);
    kvc_status st = kvwi_cuda_forget_later(seq, &l->lane, 0, l->status);
    if (st == KVC_OK) {
        st = kvwi_cuda_flush(seq, step->layer);
    }
    if (st != KVC_OK) {
        return st;
    }
    l->n_writes = d->n_writes;
    st = kvwi_cuda_partial(seq->worker, step->layer, &l->lane, d->near->o_own, d->near->lse_own,
                           d->stream);
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "attention");
}

/* Whether the server has attended over all that it was asked for. */
static kvc_status judge(const kvw_step *step, kvc_status st)
{
    const kvwi_device_seq *d = step->seq->device;
    const kvwi_device_layer *l = &d->layers[step->layer];
    for (uint32_t i = 0; st == KVC_OK && i < *l->n_far; i++) {
        st = (kvc_status)d->near->status[i];
    }
    return st;
}

/* Both partials into the result. */
static kvc_status merge(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    kvwi_device_layer *l = &d->layers[step->layer];
    kvwi_device_near *n = d->near;
    const kvk_convert_args convert = {
        .in = {n->answer, w->opts.head_dim * w->elem_bytes, w->opts.dtype},
        .n = w->opts.n_q_heads,
        .width = w->opts.head_dim,
        .out = n->o,
    };
    const kvk_cuda_finish_args finish = {
        .o_a = n->o_own,
        .lse_a = n->lse_own,
        .o_b = n->o,
        .lse_b = n->lse,
        .n = w->opts.n_q_heads,
        .dim = w->opts.head_dim,
        .dtype = w->opts.dtype,
        .out = l->lane.out,
        .lse = l->lane.lse,
    };
    kvc_status st = w->ops->convert(w->be, &convert, NULL);
    if (st == KVC_OK) {
        st = kvk_cuda_finish(d->device->cuda, &finish, d->stream);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_sync(seq); /* n->o is the next step's too */
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a merge");
}

static void count(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    const kvwi_device_layer *l = &seq->device->layers[step->layer];
    kvwi_flight_count(seq, 0, &l->flight.info, 0, 0);
    seq->stats.bytes_near += 2u * o_bytes(w) + w->opts.n_q_heads * sizeof(float);
    seq->stats.rows_near += *l->n_far;
    seq->servers[0].rows_near += *l->n_far;
}

static void fall_back(kvw_step *step, kvc_status why)
{
    KVC_LOG_DEBUG(WORKER, "layer %u: near failed (%s): rows are fetched", step->layer,
                  kvc_status_name(why));
    KVC_COUNT(way_fallbacks);
    step->seq->stats.way_fallbacks++;
    step->seq->device->layers[step->layer].near_failed = true;
}

kvc_status kvwi_cuda_near(kvw_step *step)
{
    kvc_op op;
    kvw_seq *seq = step->seq;
    uint64_t t0 = kvc_now_ns();
    kvc_status asked = ask_server(step, &op);
    if (asked != KVC_OK) {
        fall_back(step, asked);
        kvwi_cuda_cache_decided(step, &seq->device->layers[step->layer].lane, 0);
        return KVC_OK;
    }
    kvc_status st = attend_own(step);
    asked = judge(step, kvwi_op_complete(&op, step->deadline_ns));
    seq->stats.ns_fetch_wait += kvc_now_ns() - t0;
    if (st == KVC_OK && asked != KVC_OK) {
        fall_back(step, asked);
        st = kvwi_cuda_sync(seq); /* what it attended over is about to be forgotten */
    } else if (st == KVC_OK && (st = merge(step)) == KVC_OK) {
        count(step);
    }
    if (st == KVC_OK) {
        kvwi_cuda_cache_decided(step, &seq->device->layers[step->layer].lane, 0);
    }
    return st;
}
