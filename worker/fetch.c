/*
 * fetch.c: one way of a leg's misses (ways.c chooses): rows on their way from the store into
 * residency slots.
 *
 * Submitted and awaited on the sequence's thread; the client's progress thread fills rows, status
 * and info in between, and nothing here touches them until the op is complete. A step with a fetch
 * in flight keeps its buffers. Rows that do not arrive give their slots back.
 */
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "internal.h"

/* Time that completion may take beyond the deadline before the op is cancelled. */
#define GRACE_NS 1000000000ull

/* Every hit of the step is younger than the slots taken here, so none of them is given away. */
static kvc_status take_slots(kvwi_leg *leg)
{
    kvw_step *step = leg->step;
    kvwi_residency *r = &step->seq->layers[step->layer].residency;
    const uint32_t *row = leg->miss_row.p, *pos = leg->miss_pos.p;
    uint32_t *slot = leg->miss_slot.p;
    const uint8_t **rows = step->rows.p;
    if (step->n_misses > r->n_slots) {
        return kvwi_fail(KVC_NO_SPACE, "a step needs more rows than residency_slots");
    }
    for (uint32_t i = 0; i < leg->n_misses; i++) {
        kvc_status st = kvwi_residency_take(r, pos[i], &slot[i]);
        if (st != KVC_OK) {
            return kvwi_fail(st, "a step needs more rows than residency_slots");
        }
        rows[row[i]] = r->rows + slot[i] * r->row_bytes;
    }
    return KVC_OK;
}

kvc_status kvwi_fetch_submit(kvwi_leg *leg)
{
    kvw_step *step = leg->step;
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    leg->flight.status = KVC_OK;
    leg->flight.in_flight = false;
    if (leg->n_misses == 0) {
        return KVC_OK;
    }
    kvc_status st = take_slots(leg);
    if (st != KVC_OK) {
        return st;
    }
    const kvc_pick_group group = {
        .part = w->kv_parts[step->layer],
        .row_bytes = (uint32_t)w->row_bytes,
        .n_picks = leg->n_misses,
        .picks = w->servers.n == 1 ? leg->miss_pos.p : leg->miss_pick.p,
        .dst_slots = leg->miss_slot.p,
        .dst_off_bytes = (size_t)step->layer * w->opts.residency_slots * w->row_bytes,
    };
    kvwi_flight_send(seq, leg->server, &leg->flight, group, &seq->residency_regions,
                     leg->miss_status.p, step->deadline_ns);
    return KVC_OK;
}

kvc_status kvwi_op_complete(kvc_op *op, uint64_t deadline_ns)
{
    kvc_status st = kvc_op_wait(op, deadline_ns + GRACE_NS);
    if (st == KVC_TIMED_OUT && kvc_now_ns() >= deadline_ns + GRACE_NS) {
        kvc_op_cancel(op);
        (void)kvc_op_wait(op, 0);
    }
    return st;
}

kvc_status kvwi_fetch_complete(kvwi_leg *leg)
{
    return kvwi_flight_land(&leg->flight, leg->step->deadline_ns);
}

/*
 * Marks every miss; *first_p is the first row's failure. Returns how many failed. A fetch that
 * failed has still brought the rows whose status is OK; one that was never sent has brought none.
 */
static uint32_t settle(kvwi_leg *leg, kvc_status *first_p)
{
    kvw_step *step = leg->step;
    kvwi_residency *r = &step->seq->layers[step->layer].residency;
    const int8_t *status = leg->miss_status.p;
    const uint32_t *row = leg->miss_row.p, *pos = leg->miss_pos.p;
    kvc_status fetched = leg->flight.status;
    uint8_t *state = step->state.p;
    uint32_t lost = 0;
    for (uint32_t i = 0; i < leg->n_misses; i++) {
        kvc_status st = (kvc_status)status[i];
        if (st == KVC_OK) {
            state[row[i]] = KVWI_ROW_HERE;
            continue;
        }
        st = fetched != KVC_OK ? fetched : st;
        *first_p = lost == 0 ? st : *first_p;
        state[row[i]] = KVWI_ROW_MISSING;
        kvwi_residency_drop(r, pos[i]);
        lost++;
    }
    return lost;
}

kvc_status kvwi_fetch_settle(kvwi_leg *leg)
{
    kvw_step *step = leg->step;
    kvw_seq *seq = step->seq;
    kvw_worker *w = seq->worker;
    kvc_status first = KVC_OK;
    char server[KVWI_SERVER_TEXT];
    if (leg->n_misses == 0) {
        return KVC_OK;
    }
    uint32_t lost = settle(leg, &first), came = leg->n_misses - lost;
    kvwi_flight_count(seq, leg->server, &leg->flight.info, came, w->row_bytes);
    seq->n_fetched += came;
    if (lost == 0) {
        return KVC_OK;
    }
    seq->servers[leg->server].rows_missing += lost;
    if (w->opts.policy == KVW_DROP) {
        seq->stats.rows_dropped += lost;
        kvwi_names_taint(seq);
        KVC_LOG_DEBUG(WORKER, "layer %u: %u of %u rows dropped: %s", step->layer, lost,
                      leg->n_misses, kvc_status_name(first));
        return KVC_OK;
    }
    return kvwi_fail(first, "layer %u: %u of %u rows did not arrive: %s%s", step->layer, lost,
                     leg->n_misses, kvc_status_name(first),
                     kvwi_server_text(w, leg->server, server));
}

void kvwi_fetch_abandon(kvw_step *step)
{
    kvc_status first = KVC_OK;
    for (uint32_t i = 0; i < step->n_legs; i++) {
        kvwi_leg *leg = &step->legs[i];
        kvwi_flight_cancel(&leg->flight);
        if (leg->near_sent) { /* what it answered is nobody's: no row of it is here */
            memset(leg->miss_status.p, KVC_CANCELLED, leg->n_misses);
        }
        (void)settle(leg, &first);
    }
}
