/* row_max.c: running maximum of each row of scores (inner maximum of ESA's eq. 4); NaN is ignored.
 */
#include "check.h"
#include "internal.h"
#include "isa.h"

#define RUN 65536u

kvc_status kvki_check_row_max(const kvk_row_max_args *a)
{
    if (!kvki_matrix_ok(a->scores, a->m, a->n, a->stride))
        return KVC_INVALID;
    return a->m == 0 || a->row_max ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_row_max(const kvk_row_max_args *a)
{
    for (size_t i = 0; i < a->m; i++) {
        for (size_t j = 0; j < a->n; j++) {
            if (a->scores[i * a->stride + j] > a->row_max[i])
                a->row_max[i] = a->scores[i * a->stride + j];
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_row_max_args *a;
    const kvki_isa *isa;
    size_t runs;
    float *max; /* [m, runs] */
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t from = item % w->runs * RUN, row = item / w->runs;
    size_t n = w->a->n - from < RUN ? w->a->n - from : RUN;

    (void)worker;
    w->max[item] = w->isa->max(w->a->scores + row * w->a->stride + from, n, -INFINITY);
}

kvc_status kvki_fast_row_max(kvk_backend *be, const kvk_row_max_args *a)
{
    job w = {a, be->isa, ((size_t)a->n + RUN - 1) / RUN, NULL};

    if (a->n == 0 || a->m == 0)
        return KVC_OK;
    w.max = kvki_scratch_take(be->scratch, a->m * w.runs * sizeof(float));
    if (!w.max)
        return KVC_NO_MEMORY;
    kvki_pool_run(be->pool, a->m * w.runs, run_item, &w);
    for (size_t t = 0; t < a->m * w.runs; t++) {
        if (w.max[t] > a->row_max[t / w.runs])
            a->row_max[t / w.runs] = w.max[t];
    }
    kvki_scratch_give(be->scratch, w.max);
    return KVC_OK;
}
