/*
 * attend.c: the fourth phase of a step: attention over what is here, and over what arrived.
 *
 * Runs on the sequence's thread. A segment is attended in list order; partials over different rows
 * are merged by log-sum-exp. Near keys are numbered by their place in the segment, also where rows
 * before them were dropped, and are causal; far keys stay unrotated (position 0) and all queries
 * sit at far_position (2502.14477 sec. 3.2).
 */
#include <math.h>
#include <string.h>

#include "base/clock.h"
#include "internal.h"

typedef struct subset {
    const void **rows;
    int32_t *pos; /* RoPE positions */
    uint32_t *visible;
    uint32_t n;
} subset;

static bool wanted(const kvw_step *step, uint32_t row, kvwi_which which)
{
    uint8_t state = ((const uint8_t *)step->state.p)[row];
    return state == KVWI_ROW_HERE || (which != KVWI_RESIDENT && state == KVWI_ROW_COMING);
}

static kvc_status reserve(kvw_step *step)
{
    const kvw_opts *o = &step->seq->worker->opts;
    size_t width = (size_t)o->n_q_heads * o->head_dim, n_q = step->n_q;
    size_t part = n_q * (width + o->n_q_heads) * sizeof(float);
    kvwi_buf *const bufs[] = {&step->sub_rows, &step->sub_pos, &step->visible, &step->q_rot,
                              &step->q_pos,    &step->acc,     &step->part};
    const size_t bytes[] = {step->n_rows * sizeof(void *),
                            step->n_rows * sizeof(int32_t),
                            n_q * sizeof(uint32_t),
                            n_q * width * sizeof(float),
                            n_q * sizeof(int32_t),
                            part,
                            part};
    kvc_status st = KVC_OK;
    for (size_t i = 0; st == KVC_OK && i < sizeof(bufs) / sizeof(bufs[0]); i++) {
        /* acc keeps its contents: its size does not change within a step */
        st = kvwi_buf_need(bufs[i], bytes[i]);
    }
    return st;
}

/* Rows of a segment that are here (or all that did not fail). */
static subset take_rows(kvw_step *step, const kvwi_segment *seg, kvwi_which which)
{
    const void *const *rows = step->rows.p;
    subset s = {.rows = step->sub_rows.p, .pos = step->sub_pos.p, .visible = step->visible.p};
    for (uint32_t i = 0; i < seg->n; i++) {
        if (wanted(step, seg->first + i, which)) {
            s.rows[s.n] = rows[seg->first + i];
            s.pos[s.n++] = (int32_t)i;
        }
    }
    return s;
}

static void add_arrivals(const kvw_step *step, const kvwi_leg *leg, const kvwi_segment *seg,
                         subset *s)
{
    const void *const *rows = step->rows.p;
    const uint32_t *miss = leg->miss_row.p;
    const uint8_t *state = step->state.p;
    for (uint32_t i = 0; i < leg->n_misses; i++) {
        if (miss[i] >= seg->first && miss[i] - seg->first < seg->n &&
            state[miss[i]] == KVWI_ROW_HERE) {
            s->rows[s->n] = rows[miss[i]];
            s->pos[s->n++] = (int32_t)(miss[i] - seg->first);
        }
    }
}

/* Misses that arrived, of one segment. None of them is a new token, so all queries see them. */
static subset take_arrivals(kvw_step *step, const kvwi_segment *seg)
{
    subset s = {.rows = step->sub_rows.p, .pos = step->sub_pos.p};
    for (uint32_t i = 0; i < step->n_legs; i++) {
        add_arrivals(step, &step->legs[i], seg, &s);
    }
    return s;
}

/* Query i of n_q sees all but the last n_q - 1 - i rows: those are the new tokens, always here. */
static void set_visible(const kvw_step *step, const kvwi_segment *seg, subset *s)
{
    if (!seg->near) {
        s->visible = NULL;
        return;
    }
    for (uint32_t i = 0; i < step->n_q; i++) {
        s->visible[i] = s->n - (step->n_q - 1u - i);
    }
}

void kvwi_query_positions(const kvw_step *step, const kvwi_segment *seg, int32_t *pos)
{
    for (uint32_t i = 0; i < step->n_q; i++) {
        pos[i] = seg->near ? (int32_t)(seg->n - step->n_q + i)
                           : (int32_t)step->seq->worker->opts.far_position;
    }
}

static kvc_status rotate(kvw_step *step, const kvwi_segment *seg, const void *q)
{
    const kvw_worker *w = step->seq->worker;
    const kvw_opts *o = &w->opts;
    int32_t *pos = step->q_pos.p;
    kvwi_query_positions(step, seg, pos);
    const kvk_rope_args args = {
        .in = {q, (size_t)o->n_q_heads * o->head_dim * w->elem_bytes, o->dtype},
        .n = step->n_q,
        .n_heads = o->n_q_heads,
        .head_dim = o->head_dim,
        .inv_freq = w->inv_freq,
        .positions = pos,
        .out = step->q_rot.p,
    };
    return w->ops->rope(w->be, &args, NULL);
}

static kvc_status attend_rows(kvw_step *step, const kvwi_segment *seg, const subset *s, float *o,
                              float *lse)
{
    const kvw_worker *w = step->seq->worker;
    const kvk_attend_args args = {
        .q = step->q_rot.p,
        .n_q = step->n_q,
        .n_q_heads = w->opts.n_q_heads,
        .n_kv_heads = w->opts.n_kv_heads,
        .head_dim = w->opts.head_dim,
        .rows = s->rows,
        .n_kv = s->n,
        .v_off_bytes = w->k_bytes,
        .dtype = w->row_dtype,
        .k_positions = seg->near ? s->pos : NULL,
        .inv_freq = seg->near ? w->inv_freq : NULL,
        .visible = s->visible,
        .scale = w->scale,
        .o = o,
        .lse = lse,
    };
    return w->ops->attend(w->be, &args, NULL);
}

static kvc_status merge(kvw_step *step, float *acc, float *part, uint32_t n, uint32_t dim)
{
    const kvw_worker *w = step->seq->worker;
    const kvk_merge_args args = {.o_a = acc,
                                 .lse_a = acc + (size_t)n * dim,
                                 .o_b = part,
                                 .lse_b = part + (size_t)n * dim,
                                 .n = n,
                                 .dim = dim};
    return w->ops->merge(w->be, &args, NULL);
}

kvc_status kvwi_attend_merge(kvw_step *step, float *part)
{
    const kvw_opts *o = &step->seq->worker->opts;
    uint32_t n = step->n_q * o->n_q_heads;
    kvc_status st = KVC_OK;
    if (step->has_acc) {
        st = merge(step, step->acc.p, part, n, o->head_dim);
    } else {
        memcpy(step->acc.p, part, (size_t)n * (o->head_dim + 1u) * sizeof(float));
    }
    step->has_acc = true;
    return st;
}

static kvc_status attend_segment(kvw_step *step, const kvwi_segment *seg, const void *q,
                                 kvwi_which which)
{
    const kvw_opts *o = &step->seq->worker->opts;
    uint32_t n = step->n_q * o->n_q_heads;
    subset s = which == KVWI_ARRIVED ? take_arrivals(step, seg) : take_rows(step, seg, which);
    if (which != KVWI_ARRIVED) {
        set_visible(step, seg, &s);
    }
    if (s.n == 0) {
        return KVC_OK;
    }
    float *out = step->has_acc ? step->part.p : step->acc.p;
    kvc_status st = rotate(step, seg, q);
    if (st == KVC_OK) {
        st = attend_rows(step, seg, &s, out, out + (size_t)n * o->head_dim);
    }
    if (st == KVC_OK && step->has_acc) {
        st = merge(step, step->acc.p, step->part.p, n, o->head_dim);
    }
    step->has_acc = step->has_acc || st == KVC_OK;
    return st;
}

kvc_status kvwi_attend(kvw_step *step, const void *q, kvwi_which which)
{
    uint64_t t0 = kvc_now_ns();
    kvc_status st = reserve(step);
    if (st != KVC_OK) {
        return kvwi_fail(st, "out of memory");
    }
    for (uint32_t i = 0; st == KVC_OK && i < step->n_segments; i++) {
        st = attend_segment(step, &step->segment[i], q, which);
    }
    step->seq->stats.ns_attend += kvc_now_ns() - t0;
    return st == KVC_OK ? st : kvwi_fail(st, "attention failed: %s", kvc_status_name(st));
}

kvc_status kvwi_attend_result(kvw_step *step, void *out, float *lse)
{
    const kvw_opts *o = &step->seq->worker->opts;
    size_t n = (size_t)step->n_q * o->n_q_heads;
    const float *acc = step->acc.p;
    kvk_from_f32(acc, n * o->head_dim, o->dtype, out);
    if (lse != NULL) {
        memcpy(lse, acc + n * o->head_dim, n * sizeof(float));
    }
    return KVC_OK;
}
