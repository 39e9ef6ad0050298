/*
 * fetch.c: one way of a step's misses (ways.c chooses): rows on their way from the store into
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
static kvc_status take_slots(kvw_step *step)
{
    kvwi_residency *r = &step->seq->layers[step->layer].residency;
    const uint32_t *row = step->miss_row.p, *pos = step->miss_pos.p;
    uint32_t *slot = step->miss_slot.p;
    const uint8_t **rows = step->rows.p;
    if (step->n_misses > r->n_slots) {
        return kvwi_fail(KVC_NO_SPACE, "a step needs more rows than residency_slots");
    }
    for (uint32_t i = 0; i < step->n_misses; i++) {
        kvc_status st = kvwi_residency_take(r, pos[i], &slot[i]);
        if (st != KVC_OK) {
            return kvwi_fail(st, "a step needs more rows than residency_slots");
        }
        rows[row[i]] = r->rows + slot[i] * r->row_bytes;
    }
    return KVC_OK;
}

kvc_status kvwi_fetch_submit(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    const kvw_worker *w = seq->worker;
    step->fetch_status = KVC_OK;
    step->in_flight = false;
    if (step->n_misses == 0) {
        return KVC_OK;
    }
    kvc_status st = take_slots(step);
    if (st != KVC_OK) {
        return st;
    }
    const kvc_pick_group group = {
        .context = seq->context,
        .part = w->kv_parts[step->layer],
        .row_bytes = (uint32_t)w->row_bytes,
        .n_picks = step->n_misses,
        .picks = step->miss_pos.p,
        .dst_slots = step->miss_slot.p,
        .dst_off_bytes = (size_t)step->layer * w->opts.residency_slots * w->row_bytes,
    };
    memset(&step->info, 0, sizeof(step->info));
    kvc_op_init(&step->op, NULL, NULL);
    step->fetch_status = kvc_fetch(w->opts.client, &group, 1, seq->residency_region,
                                   step->miss_status.p, &step->info, step->deadline_ns, &step->op);
    step->in_flight = step->fetch_status == KVC_OK;
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

kvc_status kvwi_fetch_complete(kvw_step *step)
{
    if (!step->in_flight) {
        return step->fetch_status;
    }
    kvc_status st = kvwi_op_complete(&step->op, step->deadline_ns);
    step->in_flight = false;
    step->fetch_status = st;
    return st;
}

/*
 * Marks every miss; *first_p is the first row's failure. Returns how many failed. A fetch that
 * failed has still brought the rows whose status is OK; one that was never sent has brought none.
 */
static uint32_t settle(kvw_step *step, kvc_status fetched, kvc_status *first_p)
{
    kvwi_residency *r = &step->seq->layers[step->layer].residency;
    const int8_t *status = step->miss_status.p;
    const uint32_t *row = step->miss_row.p, *pos = step->miss_pos.p;
    uint8_t *state = step->state.p;
    uint32_t lost = 0;
    for (uint32_t i = 0; i < step->n_misses; i++) {
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

static void count(kvw_step *step, uint32_t lost)
{
    kvw_stats *s = &step->seq->stats;
    s->rows_gpu += step->info.rows_gpu;
    s->rows_dram += step->info.rows_dram;
    s->rows_lmdb += step->info.rows_lmdb;
    s->requests += step->info.requests;
    step->seq->n_fetched += step->n_misses - lost;
    s->bytes_fetched += (uint64_t)(step->n_misses - lost) * step->seq->worker->row_bytes;
}

kvc_status kvwi_fetch_settle(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    kvc_status first = KVC_OK;
    if (step->n_misses == 0) {
        return KVC_OK;
    }
    uint32_t lost = settle(step, step->fetch_status, &first);
    count(step, lost);
    if (lost == 0) {
        return KVC_OK;
    }
    if (seq->worker->opts.policy == KVW_DROP) {
        seq->stats.rows_dropped += lost;
        kvwi_names_taint(seq);
        KVC_LOG_DEBUG(WORKER, "layer %u: %u of %u rows dropped: %s", step->layer, lost,
                      step->n_misses, kvc_status_name(first));
        return KVC_OK;
    }
    return kvwi_fail(first, "layer %u: %u of %u rows did not arrive: %s", step->layer, lost,
                     step->n_misses, kvc_status_name(first));
}

void kvwi_fetch_abandon(kvw_step *step)
{
    kvc_status first = KVC_OK;
    if (step->in_flight) {
        kvc_op_cancel(&step->op);
        step->fetch_status = kvc_op_wait(&step->op, 0);
        step->in_flight = false;
    }
    if (step->near_sent) { /* what it answered is nobody's: no row of it is here */
        memset(step->miss_status.p, KVC_CANCELLED, step->n_misses);
    }
    (void)settle(step, step->fetch_status, &first);
}
