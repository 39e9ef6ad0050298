/*
 * near.c: one way of a step's misses (ways.c chooses): the server attends over them and sends one
 * partial for each segment that has any.
 *
 * Runs on the sequence's thread. Queries go as the engine gave them, with the positions at which
 * the server rotates them, so that it does in f32 what attend.c does here; keys get their ranks in
 * the segment. Results come in the model's dtype, which halves the reply. Invariant: while the
 * request is in flight, near_* and the miss list belong to it.
 */
#include <string.h>

#include "base/clock.h"
#include "internal.h"

/* Time that the other ways have where this one does not come to an end: of what is left. */
#define SHARE 2u

static kvc_dtype wire_dtype(kvk_dtype dtype)
{
    return dtype == KVK_F32 ? KVC_DTYPE_F32 : dtype == KVK_F16 ? KVC_DTYPE_F16 : KVC_DTYPE_BF16;
}

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

static kvc_status reserve(kvw_step *step)
{
    kvc_status st = kvwi_buf_need(&step->near_q, o_bytes(step));
    if (st == KVC_OK) {
        st = kvwi_buf_need(&step->near_out, 2u * part_bytes(step));
    }
    if (st == KVC_OK) {
        st = kvwi_buf_need(&step->near_rank, step->n_misses * sizeof(uint32_t));
    }
    if (st == KVC_OK) {
        st = kvwi_buf_need(&step->near_q_pos, 2u * step->n_q * sizeof(int32_t));
    }
    return st == KVC_OK ? st : kvwi_fail(st, "out of memory");
}

/* Misses come in row order, so those of a segment follow each other. */
static void list_parts(kvw_step *step)
{
    const uint32_t *row = step->miss_row.p;
    uint32_t *rank = step->near_rank.p, at = 0;
    step->n_near_parts = 0;
    for (uint32_t s = 0; s < step->n_segments; s++) {
        const kvwi_segment *seg = &step->segment[s];
        uint32_t first = at;
        for (; at < step->n_misses && row[at] - seg->first < seg->n; at++) {
            rank[at] = row[at] - seg->first;
        }
        if (at > first) {
            step->near_part[step->n_near_parts++] = (kvwi_near_part){s, first, at - first};
        }
    }
}

static kvc_attend_group group_of(kvw_step *step, uint32_t p)
{
    const kvw_worker *w = step->seq->worker;
    const kvwi_near_part *part = &step->near_part[p];
    const kvwi_segment *seg = &step->segment[part->segment];
    int32_t *positions = (int32_t *)step->near_q_pos.p + p * step->n_q;
    uint8_t *out = (uint8_t *)step->near_out.p + p * part_bytes(step);
    kvwi_query_positions(step, seg, positions);
    return (kvc_attend_group){
        .context = step->seq->context,
        .part = w->kv_parts[step->layer],
        .n_picks = part->n,
        .picks = (const uint32_t *)step->miss_pos.p + part->first,
        .ranks =
            seg->near && w->inv_freq != NULL ? (uint32_t *)step->near_rank.p + part->first : NULL,
        .q_positions = w->inv_freq != NULL ? (const uint32_t *)(void *)positions : NULL,
        .row_bytes = (uint32_t)w->row_bytes,
        .n_q = step->n_q,
        .n_q_heads = w->opts.n_q_heads,
        .dim = w->opts.head_dim,
        .q_dtype = wire_dtype(w->opts.dtype),
        .o_dtype = wire_dtype(w->opts.dtype),
        .q = p == 0 ? step->near_q.p : NULL,
        .o = out,
        .lse = (float *)(void *)(out + lse_off(step)),
    };
}

kvc_status kvwi_near_submit(kvw_step *step, const void *q)
{
    const kvw_worker *w = step->seq->worker;
    kvc_attend_group groups[2];
    kvc_status st = reserve(step);
    if (st != KVC_OK) {
        return st;
    }
    memcpy(step->near_q.p, q, o_bytes(step)); /* the caller's is only borrowed */
    list_parts(step);
    for (uint32_t p = 0; p < step->n_near_parts; p++) {
        groups[p] = group_of(step, p);
    }
    uint64_t now_ns = kvc_now_ns();
    uint64_t left_ns = step->deadline_ns > now_ns ? step->deadline_ns - now_ns : 0;
    memset(&step->info, 0, sizeof(step->info));
    kvc_op_init(&step->op, NULL, NULL);
    st = kvc_attend(w->opts.client, groups, step->n_near_parts, step->miss_status.p, &step->info,
                    now_ns + left_ns / SHARE, &step->op);
    step->near_sent = st == KVC_OK;
    step->in_flight = step->near_sent;
    return st;
}

/* Takes those that the partials cover out of the list of misses. */
static void settle(kvw_step *step)
{
    uint32_t *row = step->miss_row.p, *pos = step->miss_pos.p, n = 0;
    int8_t *status = step->miss_status.p;
    uint8_t *state = step->state.p;
    for (uint32_t i = 0; i < step->n_misses; i++) {
        if (status[i] == KVC_OK) {
            state[row[i]] = KVWI_ROW_AFAR;
            continue;
        }
        row[n] = row[i];
        pos[n++] = pos[i];
    }
    kvw_stats *s = &step->seq->stats;
    s->rows_near += step->n_misses - n;
    s->rows_gpu += step->info.rows_gpu;
    s->rows_dram += step->info.rows_dram;
    s->rows_lmdb += step->info.rows_lmdb;
    s->requests += step->info.requests;
    step->near_here = n < step->n_misses;
    step->n_misses = n;
    memset(status, KVC_NOT_FOUND, n);
}

kvc_status kvwi_near_wait(kvw_step *step)
{
    if (!step->near_sent) {
        return KVC_CANCELLED; /* nobody gave the query: kvw_step_attend was refused */
    }
    kvc_status st = kvwi_fetch_complete(step);
    step->near_sent = false;
    if (st == KVC_OK) {
        settle(step);
    }
    return st;
}

kvc_status kvwi_near_merge(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    uint32_t n = step->n_q * w->opts.n_q_heads;
    float *part = step->part.p;
    for (uint32_t p = 0; p < step->n_near_parts; p++) {
        const uint8_t *out = (const uint8_t *)step->near_out.p + p * part_bytes(step);
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
