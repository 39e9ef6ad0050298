/*
 * resolve.c: the second phase of a step: the rows in attention order, and which of them are here.
 *
 * Runs on the sequence's thread. The order is by position (sinks, picks ascending, recent and new),
 * whatever is resident; that is what makes `exact` independent of it. Misses are listed; they get
 * residency slots only where they are fetched.
 */
#include "internal.h"

/* Any leg may get all misses. */
static kvc_status reserve_leg(kvwi_leg *leg, uint32_t n)
{
    kvwi_buf *const bufs[] = {&leg->miss_row, &leg->miss_pos, &leg->miss_slot, &leg->miss_status,
                              &leg->miss_pick};
    const size_t elem[] = {sizeof(uint32_t), sizeof(uint32_t), sizeof(uint32_t), sizeof(int8_t),
                           sizeof(uint32_t)};
    size_t n_bufs = leg->step->n_legs == 1 ? 4 : 5;
    kvc_status st = KVC_OK;
    for (size_t i = 0; st == KVC_OK && i < n_bufs; i++) {
        st = kvwi_buf_need(bufs[i], (size_t)n * elem[i]);
    }
    return st;
}

static kvc_status reserve(kvw_step *step, uint32_t n)
{
    kvwi_buf *const bufs[] = {&step->pos, &step->rows, &step->state};
    const size_t elem[] = {sizeof(uint32_t), sizeof(void *), sizeof(uint8_t)};
    kvc_status st = KVC_OK;
    for (size_t i = 0; st == KVC_OK && i < sizeof(bufs) / sizeof(bufs[0]); i++) {
        st = kvwi_buf_need(bufs[i], (size_t)n * elem[i]);
    }
    for (uint32_t i = 0; st == KVC_OK && i < step->n_legs; i++) {
        st = reserve_leg(&step->legs[i], n);
    }
    return st;
}

static uint32_t put_range(uint32_t *pos, uint32_t at, uint32_t first, uint32_t end)
{
    for (uint32_t p = first; p < end; p++) {
        pos[at++] = p;
    }
    return at;
}

/* Positions in order, and the segments that are attended with one numbering each. */
static void list_rows(kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    const kvwi_picks *picks = &step->seq->layers[step->layer].picks;
    uint32_t *pos = step->pos.p, n = 0;
    if (step->full) {
        n = put_range(pos, 0, 0, step->n_tokens);
        step->segment[0] = (kvwi_segment){.first = 0, .n = n, .near = true};
        step->n_segments = 1;
        return;
    }
    n = put_range(pos, 0, 0, w->opts.n_sink);
    for (uint32_t i = 0; i < picks->n; i++) {
        pos[n++] = picks->pos[i];
    }
    uint32_t n_far = n;
    n = put_range(pos, n, step->near_begin, step->n_tokens);
    if (w->selector->positions == KVW_RENUMBER) {
        step->segment[0] = (kvwi_segment){.first = 0, .n = n, .near = true};
        step->n_segments = 1;
        return;
    }
    step->segment[0] = (kvwi_segment){.first = 0, .n = n_far, .near = false};
    step->segment[1] = (kvwi_segment){.first = n_far, .n = n - n_far, .near = true};
    step->n_segments = 2;
}

/* The resident row of a position, or NULL. */
static const uint8_t *find_row(kvw_seq *seq, uint32_t layer, uint32_t pos)
{
    const kvw_worker *w = seq->worker;
    uint32_t bt = w->opts.block_tokens;
    const kvwi_block *block = seq->blocks[pos / bt].buf;
    if (block != NULL) {
        return kvwi_block_row(w, block, layer, pos % bt);
    }
    const uint8_t *row = kvwi_residency_use(&seq->layers[layer].residency, pos);
    seq->n_reused_rows += row != NULL;
    return row;
}

static void add_miss(kvw_step *step, uint32_t row, uint32_t pos)
{
    kvwi_leg *leg = &step->legs[kvwi_server_of(step->seq, pos)];
    uint32_t n = leg->n_misses++;
    ((uint32_t *)leg->miss_row.p)[n] = row;
    ((uint32_t *)leg->miss_pos.p)[n] = pos;
    if (step->n_legs > 1) {
        ((uint32_t *)leg->miss_pick.p)[n] = kvwi_pick_of(step->seq, pos);
    }
    /* it has not arrived: what is settled before the fetch gives its slot back */
    ((int8_t *)leg->miss_status.p)[n] = KVC_NOT_FOUND;
    step->n_misses++;
}

static void find_rows(kvw_step *step)
{
    const uint32_t *pos = step->pos.p;
    const uint8_t **rows = step->rows.p;
    uint8_t *state = step->state.p;
    for (uint32_t i = 0; i < step->n_rows; i++) {
        rows[i] = find_row(step->seq, step->layer, pos[i]);
        state[i] = rows[i] != NULL ? KVWI_ROW_HERE : KVWI_ROW_COMING;
        if (rows[i] == NULL) {
            add_miss(step, i, pos[i]);
        }
    }
}

kvc_status kvwi_resolve(kvw_step *step)
{
    kvw_seq *seq = step->seq;
    const kvwi_picks *picks = &seq->layers[step->layer].picks;
    step->n_rows = step->full
                       ? step->n_tokens
                       : seq->worker->opts.n_sink + picks->n + (step->n_tokens - step->near_begin);
    kvc_status st = reserve(step, step->n_rows);
    if (st != KVC_OK) {
        return kvwi_fail(st, "out of memory");
    }
    list_rows(step);
    find_rows(step);
    seq->stats.misses += step->n_misses;
    return KVC_OK;
}
