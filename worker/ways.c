/*
 * ways.c: the third phase of a step: by which way its misses are reached, and by which other one
 * where that fails.
 *
 * Runs on the sequence's thread. Each server's misses are a leg, which goes its own way; all legs
 * are under way together. A way either brings rows into residency slots (fetch.c) or has the
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

double kvwi_way_reuse(const kvw_seq *seq)
{
    return ((double)seq->n_reused_rows + GUESS_REUSE * GUESS_REUSE_ROWS) /
           ((double)seq->n_fetched + GUESS_REUSE_ROWS);
}

static kvc_way_ask ask_of(const kvwi_leg *leg)
{
    const kvw_step *step = leg->step;
    const kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    const kvwi_residency *r = &seq->layers[step->layer].residency;
    bool chunk = step->n_q >= w->opts.chunk_tokens;
    uint64_t n = (uint64_t)step->n_q * w->opts.n_q_heads;
    size_t head_bytes = w->opts.head_dim * w->elem_bytes;
    /* a segment's far and near part have results of their own */
    kvc_way_ask ask = {
        .n_rows = leg->n_misses,
        .row_bytes = (uint32_t)w->row_bytes,
        .n_q = step->n_q,
        .q_bytes = n * head_bytes,
        .o_bytes = step->n_segments * n * (head_bytes + sizeof(float)),
        .reuse = kvwi_way_reuse(seq),
        .refused = leg->tried,
        .because = leg->why,
    };
    if (w->opts.exact || chunk) {
        ask.refused |= 1u << KVC_WAY_NEAR;
        ask.because = leg->why == KVC_WHY_CHEAPEST ? KVC_WHY_EXACT : leg->why;
    }
    if (step->n_misses > r->n_slots) {
        ask.refused |= ~(1u << KVC_WAY_NEAR);
    }
    return ask;
}

kvc_way kvwi_way_choose(const kvw_worker *worker, uint32_t server, kvc_way_ask ask)
{
    kvc_client *client = worker->servers.all[server].client;
    kvc_way_ask only = ask;
    if (worker->way != KVC_WAY_COUNT) {
        only.refused |= ~(1u << worker->way);
        only.because = KVC_WHY_ASKED;
        kvc_way way = kvc_way_choose(client, &only);
        if (way != KVC_WAY_COUNT) {
            return way;
        }
        if (worker->way != KVC_WAY_NEAR) { /* not surprised by partials */
            ask.refused |= 1u << KVC_WAY_NEAR;
        }
    }
    return kvc_way_choose(client, &ask);
}

/* Sets off by the way that the leg now has; NO_SPACE where it has none. */
static kvc_status set_off(kvwi_leg *leg)
{
    leg->way = kvwi_way_choose(leg->step->seq->worker, leg->server, ask_of(leg));
    if (leg->way == KVC_WAY_NEAR) {
        return KVC_OK; /* with the query */
    }
    if (leg->way == KVC_WAY_COUNT) {
        leg->way = KVC_WAY_ROWS; /* which says what is wrong */
    }
    return kvwi_fetch_submit(leg);
}

/* Rows of a server that lately did not answer are dropped rather than waited for. */
static kvc_status set_off_unless_lost(kvwi_leg *leg)
{
    const kvw_worker *w = leg->step->seq->worker;
    leg->lost = w->servers.n > 1 && kvwi_server_is_lost(w, leg->server);
    if (!leg->lost) {
        return set_off(leg);
    }
    leg->way = KVC_WAY_ROWS;
    leg->flight.status = KVC_UNAVAILABLE;
    memset(&leg->flight.info, 0, sizeof(leg->flight.info));
    return KVC_OK;
}

kvc_status kvwi_misses_begin(kvw_step *step)
{
    kvc_status st = KVC_OK;
    if (step->n_misses != 0) {
        step->asked_ns = kvc_now_ns();
        step->deadline_ns = kvc_deadline_ns(step->seq->worker->opts.fetch_timeout_ns);
    }
    for (uint32_t i = 0; st == KVC_OK && i < step->n_legs; i++) {
        kvwi_leg *leg = &step->legs[i];
        if (leg->n_misses != 0) {
            st = set_off_unless_lost(leg);
        }
    }
    return st;
}

/* After the leg's way failed: the next one, which is never near. OK: it is under way. */
static kvc_status fall_back(kvwi_leg *leg, kvc_status why)
{
    kvw_step *step = leg->step;
    leg->tried |= 1u << leg->way | 1u << KVC_WAY_NEAR;
    leg->why = why == KVC_AGAIN ? KVC_WHY_BUSY : KVC_WHY_BROKEN;
    if (kvc_now_ns() >= step->deadline_ns) {
        return why;
    }
    KVC_LOG_DEBUG(WORKER, "layer %u: %s failed (%s): another way", step->layer,
                  kvc_way_name(leg->way), kvc_status_name(why));
    KVC_COUNT(way_fallbacks);
    step->seq->stats.way_fallbacks++;
    memset(leg->miss_status.p, KVC_NOT_FOUND, leg->n_misses);
    return set_off(leg);
}

kvc_status kvwi_misses_query(kvw_step *step, const void *q)
{
    kvc_status st = KVC_OK;
    bool asked = false;
    for (uint32_t i = 0; st == KVC_OK && i < step->n_legs; i++) {
        kvwi_leg *leg = &step->legs[i];
        if (leg->way != KVC_WAY_NEAR || leg->n_misses == 0 || leg->near_sent) {
            continue;
        }
        st = asked ? KVC_OK : kvwi_near_query(step, q);
        if (st == KVC_OK) {
            asked = true;
            st = kvwi_near_submit(leg);
        }
        st = st == KVC_OK ? st : fall_back(leg, st);
    }
    return st;
}

/* What the server lacks of the misses is fetched; rows whose answer is AGAIN are there. */
static kvc_status wait_near(kvwi_leg *leg)
{
    kvc_status st = kvwi_near_wait(leg);
    if (st != KVC_OK) {
        return fall_back(leg, st);
    }
    kvwi_server_answered(leg->step->seq->worker, leg->server, KVC_OK, leg->step->asked_ns);
    leg->tried |= 1u << KVC_WAY_NEAR;
    leg->why = KVC_WHY_REST;
    return leg->n_misses == 0 ? KVC_OK : set_off(leg);
}

/* The leg's end; its rows are settled, whatever other legs come to. */
static kvc_status end_leg(kvwi_leg *leg)
{
    kvw_step *step = leg->step;
    if (leg->n_misses == 0) {
        return KVC_OK;
    }
    kvc_status st = kvwi_fetch_complete(leg);
    if (!leg->lost) {
        kvwi_server_answered(step->seq->worker, leg->server, st, step->asked_ns);
    }
    return kvwi_fetch_settle(leg);
}

kvc_status kvwi_misses_wait(kvw_step *step)
{
    kvc_status first = KVC_OK;
    if (step->n_misses == 0) {
        return KVC_OK;
    }
    uint64_t t0 = kvc_now_ns();
    for (uint32_t i = 0; i < step->n_legs; i++) {
        kvwi_leg *leg = &step->legs[i];
        if (leg->n_misses == 0 || leg->way != KVC_WAY_NEAR) {
            continue;
        }
        kvc_status st = wait_near(leg);
        if (st != KVC_OK) {
            leg->flight.status = st;
            memset(leg->miss_status.p, KVC_NOT_FOUND, leg->n_misses);
        }
    }
    for (uint32_t i = 0; i < step->n_legs; i++) {
        (void)kvwi_fetch_complete(&step->legs[i]);
    }
    step->seq->stats.ns_fetch_wait += kvc_now_ns() - t0;
    for (uint32_t i = 0; i < step->n_legs; i++) {
        kvc_status st = end_leg(&step->legs[i]);
        first = first == KVC_OK ? st : first;
    }
    return first;
}
