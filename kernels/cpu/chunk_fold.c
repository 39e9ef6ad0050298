/*
 * chunk_fold.c: the outer maximum of ESA's eq. 4 (2502.14477): every query row of the chunk is
 * shifted so that its best key stands at 0, then a key keeps its best row. NaN is ignored.
 */
#include "check.h"
#include "internal.h"
#include "isa.h"

#define RUN 4096u

kvc_status kvki_check_chunk_fold(const kvk_chunk_fold_args *a)
{
    if (!kvki_matrix_ok(a->scores, a->m, a->n, a->stride) || (a->m && !a->row_max))
        return KVC_INVALID;
    return a->n == 0 || a->out ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_chunk_fold(const kvk_chunk_fold_args *a)
{
    for (size_t j = 0; j < a->n; j++) {
        for (size_t i = 0; i < a->m; i++) {
            float shifted = a->scores[i * a->stride + j] - a->row_max[i];
            if (shifted > a->out[j])
                a->out[j] = shifted;
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_chunk_fold_args *a;
    const kvki_isa *isa;
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_chunk_fold_args *a = w->a;
    size_t from = item * RUN;
    size_t n = a->n - from < RUN ? a->n - from : RUN;

    (void)worker;
    for (size_t i = 0; i < a->m; i++)
        w->isa->fold_max(a->scores + i * a->stride + from, n, a->row_max[i], a->out + from);
}

kvc_status kvki_fast_chunk_fold(kvk_backend *be, const kvk_chunk_fold_args *a)
{
    job w = {a, be->isa};

    kvki_pool_run(be->pool, ((size_t)a->n + RUN - 1) / RUN, run_item, &w);
    return KVC_OK;
}
