/* convert.c: rows of any dtype to f32. Exact; one item is a run of rows. */
#include "check.h"
#include "elem.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ELEMS 16384u

kvc_status kvki_check_convert(const kvk_convert_args *a)
{
    return kvki_rows_ok(&a->in, a->n, a->width) && (a->n == 0 || a->out) ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_convert(const kvk_convert_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        for (size_t j = 0; j < a->width; j++)
            a->out[i * a->width + j] = kvki_elem(kvki_row(&a->in, i), a->in.dtype, j);
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_convert_args *a;
    const kvki_isa *isa;
    size_t rows_per_item;
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_convert_args *a = w->a;
    size_t end = (item + 1) * w->rows_per_item;

    (void)worker;
    for (size_t i = item * w->rows_per_item; i < a->n && i < end; i++)
        w->isa->convert(kvki_row(&a->in, i), a->in.dtype, a->width, a->out + i * a->width);
}

kvc_status kvki_fast_convert(kvk_backend *be, const kvk_convert_args *a)
{
    job w = {a, be->isa, 1 + ITEM_ELEMS / a->width};

    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    return KVC_OK;
}
