/*
 * merge.c: two partials into one by log-sum-exp: each o is weighted with its share of the sum. The
 * weights are computed in double in both forms; a partial at -INFINITY is empty and its o unread.
 */
#include <string.h>

#include "check.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ELEMS 16384u

kvc_status kvki_check_merge(const kvk_merge_args *a)
{
    if (a->dim == 0 || !kvki_shape_ok(a->n, a->dim, 1))
        return KVC_INVALID;
    return a->n == 0 || (a->o_a && a->lse_a && a->o_b && a->lse_b) ? KVC_OK : KVC_INVALID;
}

/* Shares of a and b, and the lse of both; neither is empty. */
static void weigh(float lse_a, float lse_b, double *share_a_p, double *share_b_p, float *lse_p)
{
    double top = lse_a > lse_b ? (double)lse_a : (double)lse_b;
    double a = exp((double)lse_a - top), b = exp((double)lse_b - top);

    *share_a_p = a / (a + b);
    *share_b_p = b / (a + b);
    *lse_p = (float)(top + log(a + b));
}

kvc_status kvki_ref_merge(const kvk_merge_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        double share_a = 0, share_b = 1;
        if (a->lse_b[i] == -INFINITY)
            continue;
        if (a->lse_a[i] == -INFINITY)
            a->lse_a[i] = a->lse_b[i];
        else
            weigh(a->lse_a[i], a->lse_b[i], &share_a, &share_b, &a->lse_a[i]);
        for (size_t j = i * a->dim; j < (i + 1) * a->dim; j++) {
            double kept = share_a > 0 ? (double)a->o_a[j] * share_a : 0;
            a->o_a[j] = (float)(kept + (double)a->o_b[j] * share_b);
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_merge_args *a;
    const kvki_isa *isa;
    size_t rows_per_item;
} job;

static void merge_row(const job *w, size_t i)
{
    const kvk_merge_args *a = w->a;
    float *o_a = a->o_a + i * a->dim;
    const float *o_b = a->o_b + i * a->dim;
    double share_a = 0, share_b = 0;

    if (a->lse_b[i] == -INFINITY)
        return;
    if (a->lse_a[i] == -INFINITY) {
        a->lse_a[i] = a->lse_b[i];
        memcpy(o_a, o_b, a->dim * sizeof(float));
        return;
    }
    weigh(a->lse_a[i], a->lse_b[i], &share_a, &share_b, &a->lse_a[i]);
    w->isa->axpby(o_a, (float)share_a, o_b, (float)share_b, a->dim);
}

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t end = (item + 1) * w->rows_per_item;

    (void)worker;
    for (size_t i = item * w->rows_per_item; i < w->a->n && i < end; i++)
        merge_row(w, i);
}

kvc_status kvki_fast_merge(kvk_backend *be, const kvk_merge_args *a)
{
    job w = {a, be->isa, 1 + ITEM_ELEMS / a->dim};

    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    return KVC_OK;
}
