/*
 * near.c: one way of a leg's misses (ways.c chooses): its server attends over them and sends one
 * partial for each segment that has any.
 *
 * Runs on the sequence's thread. Queries go as the engine gave them, with the positions at which
 * the server rotates them, so that it does in f32 what attend.c does here; keys get their ranks in
 * the segment. Results come in the model's dtype, which halves the reply. Invariant: while the
 * request is in flight, the leg's near_* and miss list, and the step's query, belong to it.
 */
#include <string.h>

#include "base/clock.h"
#include "internal.h"

/* Time that the other ways have where this one does not come to an end: of what is left. */
#define SHARE 2u

static size_t o_bytes(const kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    return (size_t)step->n_q * w->opts.n_q_heads * w->opts.head_dim * w->elem_bytes;
}

/* Of one part of the result: o in the model's dtype, lse behind it on its own alignment. */
static size_t lse_off(const kvw_step *step)
{
    return (o_bytes(step) + sizeof(float) - 1u) / sizeof(float) * sizeof(float);
}

static size_t part_bytes(const kvw_step *step)
{
    return lse_off(step) + (size_t)step->n_q * step->seq->worker->opts.n_q_heads * sizeof(float);
}

kvc_status kvwi_near_query(kvw_step *step, const void *q)
{
    int32_t *positions = NULL;
    kvc_status st = kvwi_buf_need(&step->near_q, o_bytes(step));
    if (st == KVC_OK) {
        st = kvwi_buf_need(&step->near_q_pos, 2u * step->n_q * sizeof(int32_t));
    }
    if (st != KVC_OK) {
        return kvwi_fail(st, "out of memory");
    }
    memcpy(step->near_q.p, q, o_bytes(step)); /* the caller's is only borrowed */
    positions = step->near_q_pos.p;
    for (uint32_t s = 0; s < step->n_segments; s++) {
        kvwi_query_positions(step, &step->segment[s], positions + s * step->n_q);
    }
    return KVC_OK;
}

/* Misses come in row order, so those of a segment follow each other. */
static void list_parts(kvwi_leg *leg)
{
    const kvw_step *step = leg->step;
    const uint32_t *row = leg->miss_row.p;
    uint32_t *rank = leg->near_rank.p, at = 0;
    leg->n_near_parts = 0;
    for (uint32_t s = 0; s < step->n_segments; s++) {
        const kvwi_segment *seg = &step->segment[s];
        uint32_t first = at;
        for (; at < leg->n_misses && row[at] - seg->first < seg->n; at++) {
            rank[at] = row[at] - seg->first;
        }
        if (at > first) {
            leg->near_part[leg->n_near_parts++] = (kvwi_near_part){s, first, at - first};
        }
    }
}

static kvc_attend_group group_of(kvwi_leg *leg, uint32_t p)
{
    const kvw_step *step = leg->step;
    const kvw_worker *w = step->seq->worker;
    const kvwi_near_part *part = &leg->near_part[p];
    const int32_t *positions = (const int32_t *)step->near_q_pos.p + part->segment * step->n_q;
    const uint32_t *picks = w->servers.n == 1 ? leg->miss_pos.p : leg->miss_pick.p;
    uint8_t *out = (uint8_t *)leg->near_out.p + p * part_bytes(step);
    bool ranked = step->segment[part->segment].near && w->inv_freq != NULL;
    return (kvc_attend_group){
        .context = step->seq->servers[leg->server].context,
        .part = w->kv_parts[step->layer],
        .n_picks = part->n,
        .picks = picks + part->first,
        .ranks = ranked ? (uint32_t *)leg->near_rank.p + part->first : NULL,
        .q_positions = w->inv_freq != NULL ? (const uint32_t *)(const void *)positions : NULL,
        .row_bytes = (uint32_t)w->row_bytes,
        .n_q = step->n_q,
        .n_q_heads = w->opts.n_q_heads,
        .dim = w->opts.head_dim,
        .q_dtype = kvwi_wire_dtype(w->opts.dtype),
        .o_dtype = kvwi_wire_dtype(w->opts.dtype),
        .q = p == 0 ? step->near_q.p : NULL,
        .o = out,
        .lse = (float *)(void *)(out + lse_off(step)),
    };
}

kvc_status kvwi_near_submit(kvwi_leg *leg)
{
    kvw_step *step = leg->step;
    kvc_client *client = step->seq->worker->servers.all[leg->server].client;
    kvwi_flight *flight = &leg->flight;
    kvc_attend_group groups[2];
    kvc_status st = kvwi_buf_need(&leg->near_out, 2u * part_bytes(step));
    if (st == KVC_OK) {
        st = kvwi_buf_need(&leg->near_rank, leg->n_misses * sizeof(uint32_t));
    }
    if (st != KVC_OK) {
        return kvwi_fail(st, "out of memory");
    }
    list_parts(leg);
    for (uint32_t p = 0; p < leg->n_near_parts; p++) {
        groups[p] = group_of(leg, p);
    }
    uint64_t now_ns = kvc_now_ns();
    uint64_t left_ns = step->deadline_ns > now_ns ? step->deadline_ns - now_ns : 0;
    memset(&flight->info, 0, sizeof(flight->info));
    kvc_op_init(&flight->op, NULL, NULL);
    st = kvc_attend(client, groups, leg->n_near_parts, leg->miss_status.p, &flight->info,
                    now_ns + left_ns / SHARE, &flight->op);
    leg->near_sent = st == KVC_OK;
    flight->in_flight = leg->near_sent;
    return st;
}

/* Takes those that the partials cover out of the list of misses. */
static void settle(kvwi_leg *leg)
{
    kvw_step *step = leg->step;
    uint32_t *row = leg->miss_row.p, *pos = leg->miss_pos.p, *pick = leg->miss_pick.p, n = 0;
    int8_t *status = leg->miss_status.p;
    uint8_t *state = step->state.p;
    for (uint32_t i = 0; i < leg->n_misses; i++) {
        if (status[i] == KVC_OK) {
            state[row[i]] = KVWI_ROW_AFAR;
            continue;
        }
        row[n] = row[i];
        if (pick != NULL) {
            pick[n] = pick[i];
        }
        pos[n++] = pos[i];
    }
    uint32_t n_near = leg->n_misses - n;
    kvwi_flight_count(step->seq, leg->server, &leg->flight.info, 0, 0);
    step->seq->stats.bytes_near += o_bytes(step) + leg->n_near_parts * part_bytes(step);
    step->seq->stats.rows_near += n_near;
    step->seq->servers[leg->server].rows_near += n_near;
    leg->near_here = n_near != 0;
    leg->n_misses = n;
    step->n_misses -= n_near;
    memset(status, KVC_NOT_FOUND, n);
}

kvc_status kvwi_near_wait(kvwi_leg *leg)
{
    if (!leg->near_sent) {
        return KVC_CANCELLED; /* nobody gave the query: kvw_step_attend was refused */
    }
    kvc_status st = kvwi_fetch_complete(leg);
    leg->near_sent = false;
    if (st == KVC_OK) {
        settle(leg);
    }
    return st;
}

kvc_status kvwi_near_merge(kvwi_leg *leg)
{
    kvw_step *step = leg->step;
    const kvw_worker *w = step->seq->worker;
    uint32_t n = step->n_q * w->opts.n_q_heads;
    float *part = step->part.p;
    for (uint32_t p = 0; p < leg->n_near_parts; p++) {
        const uint8_t *out = (const uint8_t *)leg->near_out.p + p * part_bytes(step);
        const kvk_convert_args args = {
            .in = {out, w->opts.head_dim * w->elem_bytes, w->opts.dtype},
            .n = n,
            .width = w->opts.head_dim,
            .out = part,
        };
        kvc_status st = w->ops->convert(w->be, &args, NULL);
        memcpy(part + (size_t)n * w->opts.head_dim, out + lse_off(step), n * sizeof(float));
        if (st == KVC_OK) {
            st = kvwi_attend_merge(step, part);
        }
        if (st != KVC_OK) {
            return kvwi_fail(st, "attention failed: %s", kvc_status_name(st));
        }
    }
    return KVC_OK;
}
