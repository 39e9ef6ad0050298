/*
 * mean.c: the mean row (TokenSelect's chunk query). Rows are added in order, in double, in both
 * forms: the sum is short, and its bits are then the same on every isa.
 */
#include <string.h>

#include "check.h"
#include "elem.h"
#include "internal.h"
#include "isa.h"

kvc_status kvki_check_mean(const kvk_mean_args *a)
{
    return kvki_rows_ok(&a->in, a->n, a->width) && a->out ? KVC_OK : KVC_INVALID;
}

/* No rows have no mean; the contract's answer is a zero row. */
kvc_status kvki_ref_mean(const kvk_mean_args *a)
{
    for (size_t j = 0; j < a->width; j++) {
        double sum = 0;
        for (size_t i = 0; i < a->n; i++)
            sum += (double)kvki_elem(kvki_row(&a->in, i), a->in.dtype, j);
        a->out[j] = a->n ? (float)(sum / a->n) : 0;
    }
    return KVC_OK;
}

kvc_status kvki_fast_mean(kvk_backend *be, const kvk_mean_args *a)
{
    double *sum = kvki_scratch_take(be->scratch, a->width * (sizeof(double) + sizeof(float)));
    float *row = (float *)(void *)(sum + a->width);

    if (!sum)
        return KVC_NO_MEMORY;
    memset(sum, 0, a->width * sizeof(double));
    for (size_t i = 0; i < a->n; i++) {
        be->isa->convert(kvki_row(&a->in, i), a->in.dtype, a->width, row);
        be->isa->add_f64(sum, row, a->width);
    }
    for (size_t j = 0; j < a->width; j++)
        a->out[j] = a->n ? (float)(sum[j] / a->n) : 0;
    kvki_scratch_give(be->scratch, sum);
    return KVC_OK;
}
