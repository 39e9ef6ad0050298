/*
 * chunk_fuse.c: per-chunk attention into one result: a weighted sum in the order of the list, each
 * chunk's partial first multiplied with sigma(lse) where its softmax is off by one: with Z the sum
 * of exponentials, o * Z / (1 + Z). Factors are computed in double in both forms.
 */
#include <string.h>

#include "check.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ELEMS 16384u

kvc_status kvki_check_chunk_fuse(const kvk_chunk_fuse_args *a)
{
    if (a->dim == 0 || a->off_by_one > 1 || a->n_chunks > KVK_CHUNKS_MAX ||
        !kvki_shape_ok(a->n, a->dim, a->n_chunks ? a->n_chunks : 1))
        return KVC_INVALID;
    if (a->n == 0)
        return KVC_OK;
    if (!a->out || (a->n_chunks && (!a->o || !a->lse || !a->weights)))
        return KVC_INVALID;
    return KVC_OK;
}

/* What row i of chunk c is multiplied with; 0: nothing to add. */
static double factor(const kvk_chunk_fuse_args *a, size_t c, size_t i)
{
    double lse = (double)a->lse[c * a->n + i], w = (double)a->weights[c];

    if (w == 0 || lse == -INFINITY)
        return 0;
    return a->off_by_one ? w / (1 + exp(-lse)) : w;
}

kvc_status kvki_ref_chunk_fuse(const kvk_chunk_fuse_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        for (size_t j = 0; j < a->dim; j++) {
            double sum = 0;
            for (size_t c = 0; c < a->n_chunks; c++) {
                double f = factor(a, c, i);
                if (f != 0)
                    sum += f * (double)a->o[(c * a->n + i) * a->dim + j];
            }
            a->out[i * a->dim + j] = (float)sum;
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_chunk_fuse_args *a;
    const kvki_isa *isa;
    size_t rows_per_item;
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_chunk_fuse_args *a = w->a;
    size_t end = (item + 1) * w->rows_per_item;

    (void)worker;
    for (size_t i = item * w->rows_per_item; i < a->n && i < end; i++) {
        float *out = a->out + i * a->dim;
        memset(out, 0, a->dim * sizeof(float));
        for (size_t c = 0; c < a->n_chunks; c++) {
            float f = (float)factor(a, c, i);
            if (f != 0)
                w->isa->axpby(out, 1, a->o + (c * a->n + i) * a->dim, f, a->dim);
        }
    }
}

kvc_status kvki_fast_chunk_fuse(kvk_backend *be, const kvk_chunk_fuse_args *a)
{
    job w = {a, be->isa, 1 + ITEM_ELEMS / a->dim};

    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    return KVC_OK;
}
