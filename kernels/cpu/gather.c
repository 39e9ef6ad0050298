/* gather.c: scattered rows into one dense buffer. One item is a run of rows. */
#include <string.h>

#include "check.h"
#include "internal.h"

#define ITEM_BYTES 262144u
#define AHEAD      8u /* rows prefetched ahead: they come from anywhere in memory */

kvc_status kvki_check_gather(const kvk_gather_args *a)
{
    if (a->row_bytes == 0 || !kvki_shape_ok(a->n, a->row_bytes, 1))
        return KVC_INVALID;
    return (a->n == 0 || a->out) && kvki_pointers_ok(a->rows, a->n) ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_gather(const kvk_gather_args *a)
{
    for (size_t i = 0; i < a->n; i++)
        memcpy((char *)a->out + i * a->row_bytes, a->rows[i], a->row_bytes);
    return KVC_OK;
}

typedef struct job {
    const kvk_gather_args *a;
    size_t rows_per_item;
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_gather_args *a = w->a;
    size_t i = item * w->rows_per_item;
    size_t end = a->n - i < w->rows_per_item ? a->n : i + w->rows_per_item;

    (void)worker;
    for (; i < end; i++) {
        if (i + AHEAD < end)
            __builtin_prefetch(a->rows[i + AHEAD]);
        memcpy((char *)a->out + i * a->row_bytes, a->rows[i], a->row_bytes);
    }
}

kvc_status kvki_fast_gather(kvk_backend *be, const kvk_gather_args *a)
{
    job w = {a, 1 + ITEM_BYTES / a->row_bytes};

    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    return KVC_OK;
}
