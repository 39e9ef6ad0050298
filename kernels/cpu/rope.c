/*
 * rope.c: rotary embedding of whole rows, pairs (i, i + head_dim / 2). Angles in double, the
 * rotation itself in f32. One item is a run of rows; a row's angles are computed once for its
 * heads.
 */
#include "check.h"
#include "elem.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ELEMS 8192u

kvc_status kvki_check_rope(const kvk_rope_args *a)
{
    size_t width = (size_t)a->n_heads * a->head_dim;

    if (a->n_heads == 0 || a->head_dim == 0 || a->head_dim % 2 != 0)
        return KVC_INVALID;
    return kvki_rows_ok(&a->in, a->n, width) && (a->n == 0 || a->out) ? KVC_OK : KVC_INVALID;
}

static int32_t position_of(const kvk_rope_args *a, size_t i)
{
    return a->positions ? a->positions[i] : a->const_position;
}

static void rotate_ref(const kvk_rope_args *a, size_t i, size_t head)
{
    size_t d = a->head_dim, half = d / 2;
    float *out = a->out + (i * a->n_heads + head) * d;

    for (size_t p = 0; p < half; p++) {
        double x = (double)kvki_elem(kvki_row(&a->in, i), a->in.dtype, head * d + p);
        double y = (double)kvki_elem(kvki_row(&a->in, i), a->in.dtype, head * d + half + p);
        double angle = a->inv_freq ? position_of(a, i) * a->inv_freq[p] : 0;
        out[p] = (float)(x * cos(angle) - y * sin(angle));
        out[half + p] = (float)(y * cos(angle) + x * sin(angle));
    }
}

kvc_status kvki_ref_rope(const kvk_rope_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        for (size_t head = 0; head < a->n_heads; head++)
            rotate_ref(a, i, head);
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_rope_args *a;
    const kvki_isa *isa;
    size_t rows_per_item;
    float *angles; /* [threads, head_dim]: cos, sin */
} job;

static void rotate_row(const job *w, size_t i, float *angles)
{
    const kvk_rope_args *a = w->a;
    size_t d = a->head_dim, half = d / 2;
    float *out = a->out + i * a->n_heads * d;

    w->isa->convert(kvki_row(&a->in, i), a->in.dtype, a->n_heads * d, out);
    if (!a->inv_freq)
        return;
    w->isa->angles(position_of(a, i), a->inv_freq, (uint32_t)half, angles, angles + half);
    for (size_t head = 0; head < a->n_heads; head++)
        w->isa->rotate(out + head * d, angles, angles + half, (uint32_t)half, out + head * d);
}

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t end = (item + 1) * w->rows_per_item;

    for (size_t i = item * w->rows_per_item; i < w->a->n && i < end; i++)
        rotate_row(w, i, w->angles + (size_t)worker * w->a->head_dim);
}

kvc_status kvki_fast_rope(kvk_backend *be, const kvk_rope_args *a)
{
    job w = {a, be->isa, 1 + ITEM_ELEMS / ((size_t)a->n_heads * a->head_dim), NULL};

    w.angles = kvki_scratch_take(be->scratch,
                                 kvki_pool_threads(be->pool) * (size_t)a->head_dim * sizeof(float));
    if (!w.angles)
        return KVC_NO_MEMORY;
    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    kvki_scratch_give(be->scratch, w.angles);
    return KVC_OK;
}
