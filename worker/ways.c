/*
 * ways.c: the third phase of a step: by which way its misses are reached, and by which other one
 * where that fails.
 *
 * Runs on the sequence's thread. A way either brings rows into residency slots (fetch.c) or has the
 * server attend over them (near.c). Rows set off when the step begins; near waits for the real
 * query. Invariant: a miss is counted in the result once: either its row is HERE and attended, or a
 * near partial that arrived whole covers it and it is AFAR. A way that failed leaves nothing.
 */
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "internal.h"

/* Until rows were fetched: how often one is used again. Consecutive selections overlap by 0.7 and
 * more (2411.02886 fig. 3), so a row that was fetched is used some two more times. */
#define GUESS_REUSE      2.0
#define GUESS_REUSE_ROWS 256.0 /* what the guess weighs */

static double reuse_of(const kvw_seq *seq)
{
    return ((double)seq->n_reused_rows + GUESS_REUSE * GUESS_REUSE_ROWS) /
           ((double)seq->n_fetched + GUESS_REUSE_ROWS);
}

static kvc_way_ask ask_of(const kvw_step *step)
{
    const kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    const kvwi_residency *r = &seq->layers[step->layer].residency;
    bool chunk = step->n_q >= w->opts.chunk_tokens;
    uint64_t n = (uint64_t)step->n_q * w->opts.n_q_heads;
    /* a segment's far and near part have queries and results of their own */
    kvc_way_ask ask = {
        .n_rows = step->n_misses,
        .row_bytes = (uint32_t)w->row_bytes,
        .n_q = step->n_q,
        .qo_bytes = step->n_segments * n * (w->opts.head_dim * w->elem_bytes + sizeof(float)),
        .reuse = reuse_of(seq),
        .refused = step->tried,
    };
    if (w->opts.exact || chunk) {
        ask.refused |= 1u << KVC_WAY_NEAR;
    }
    if (step->n_misses > r->n_slots) {
        ask.refused |= ~(1u << KVC_WAY_NEAR);
    }
    return ask;
}

/* The way that was asked for where it is possible, else the cheapest. */
static kvc_way choose(const kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    kvc_way_ask ask = ask_of(step), only = ask;
    if (w->way != KVC_WAY_COUNT) {
        only.refused |= ~(1u << w->way);
        kvc_way way = kvc_way_choose(w->opts.client, &only);
        if (way != KVC_WAY_COUNT) {
            return way;
        }
        if (w->way != KVC_WAY_NEAR) { /* not surprised by partials */
            ask.refused |= 1u << KVC_WAY_NEAR;
        }
    }
    return kvc_way_choose(w->opts.client, &ask);
}

/* Sets off by the way that the step now has; NO_SPACE where it has none. */
static kvc_status set_off(kvw_step *step)
{
    step->way = choose(step);
    if (step->way == KVC_WAY_NEAR) {
        return KVC_OK; /* with the query */
    }
    if (step->way == KVC_WAY_COUNT) {
        step->way = KVC_WAY_ROWS; /* which says what is wrong */
    }
    return kvwi_fetch_submit(step);
}

kvc_status kvwi_misses_begin(kvw_step *step)
{
    step->tried = 0;
    step->fetch_status = KVC_OK;
    if (step->n_misses == 0) {
        step->way = KVC_WAY_COUNT;
        return KVC_OK;
    }
    step->deadline_ns = kvc_deadline_ns(step->seq->worker->opts.fetch_timeout_ns);
    return set_off(step);
}

/* After the step's way failed: the next one, which is never near. OK: it is under way. */
static kvc_status fall_back(kvw_step *step, kvc_status why)
{
    step->tried |= 1u << step->way | 1u << KVC_WAY_NEAR;
    if (kvc_now_ns() >= step->deadline_ns) {
        return why;
    }
    KVC_LOG_DEBUG(WORKER, "layer %u: %s failed (%s): another way", step->layer,
                  kvc_way_name(step->way), kvc_status_name(why));
    KVC_COUNT(way_fallbacks);
    step->seq->stats.way_fallbacks++;
    memset(step->miss_status.p, KVC_NOT_FOUND, step->n_misses);
    return set_off(step);
}

kvc_status kvwi_misses_query(kvw_step *step, const void *q)
{
    if (step->way != KVC_WAY_NEAR || step->n_misses == 0 || step->near_sent) {
        return KVC_OK;
    }
    kvc_status st = kvwi_near_submit(step, q);
    return st == KVC_OK ? st : fall_back(step, st);
}

/* What the server lacks of the misses is fetched; rows whose answer is AGAIN are there. */
static kvc_status wait_near(kvw_step *step)
{
    kvc_status st = kvwi_near_wait(step);
    if (st != KVC_OK) {
        return fall_back(step, st);
    }
    if (step->n_misses == 0) {
        step->way = KVC_WAY_COUNT;
        return KVC_OK;
    }
    step->tried |= 1u << KVC_WAY_NEAR;
    return set_off(step);
}

kvc_status kvwi_misses_wait(kvw_step *step)
{
    if (step->n_misses == 0) {
        return KVC_OK;
    }
    uint64_t t0 = kvc_now_ns();
    kvc_status st = KVC_OK;
    if (step->way == KVC_WAY_NEAR) {
        st = wait_near(step);
    }
    if (st == KVC_OK && step->n_misses != 0) {
        (void)kvwi_fetch_complete(step);
    } else if (st != KVC_OK) {
        step->fetch_status = st;
    }
    step->seq->stats.ns_fetch_wait += kvc_now_ns() - t0;
    return kvwi_fetch_settle(step);
}
