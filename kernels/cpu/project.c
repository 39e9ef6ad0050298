/*
 * project.c: each head's rows times that head's matrix. One item is a run of rows of one head; its
 * rows are converted to f32 once and go through the gemm in slices of dim_in, so that a slice of
 * the matrix stays in cache.
 */
#include "check.h"
#include "elem.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ROWS 48u
#define SLICE     128u

kvc_status kvki_check_project(const kvk_project_args *a)
{
    size_t width = (size_t)a->n_heads * a->dim_in;

    if (a->n_heads == 0 || a->dim_in == 0 || a->dim_out == 0 || !a->proj)
        return KVC_INVALID;
    if (!kvki_shape_ok(a->n_heads, a->dim_in, a->dim_out) ||
        !kvki_shape_ok(a->n, a->n_heads, a->dim_out))
        return KVC_INVALID;
    return kvki_rows_ok(&a->in, a->n, width) && (a->n == 0 || a->out) ? KVC_OK : KVC_INVALID;
}

static float project_one(const kvk_project_args *a, size_t i, size_t head, size_t col)
{
    double sum = 0;

    for (size_t k = 0; k < a->dim_in; k++) {
        double x = (double)kvki_elem(kvki_row(&a->in, i), a->in.dtype, head * a->dim_in + k);
        sum += x * (double)a->proj[(head * a->dim_in + k) * a->dim_out + col];
    }
    return (float)sum;
}

kvc_status kvki_ref_project(const kvk_project_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        for (size_t head = 0; head < a->n_heads; head++) {
            for (size_t col = 0; col < a->dim_out; col++)
                a->out[(i * a->n_heads + head) * a->dim_out + col] = project_one(a, i, head, col);
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_project_args *a;
    const kvki_isa *isa;
    size_t tiles;
    float *rows; /* [threads, ITEM_ROWS, dim_in] */
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_project_args *a = w->a;
    size_t head = item / w->tiles, first = item % w->tiles * ITEM_ROWS;
    size_t m = a->n - first < ITEM_ROWS ? a->n - first : ITEM_ROWS;
    float *rows = w->rows + (size_t)worker * ITEM_ROWS * a->dim_in;
    size_t off_bytes = head * a->dim_in * kvk_dtype_bytes(a->in.dtype);

    for (size_t i = 0; i < m; i++)
        w->isa->convert(kvki_row(&a->in, first + i) + off_bytes, a->in.dtype, a->dim_in,
                        rows + i * a->dim_in);
    for (uint32_t k = 0; k < a->dim_in; k += SLICE) {
        kvki_gemm g = {.a = rows + k,
                       .b = a->proj + (head * a->dim_in + k) * a->dim_out,
                       .c = a->out + (first * a->n_heads + head) * a->dim_out,
                       .lda = a->dim_in,
                       .ldb = a->dim_out,
                       .ldc = (size_t)a->n_heads * a->dim_out,
                       .m = (uint32_t)m,
                       .n = a->dim_out,
                       .k = a->dim_in - k < SLICE ? a->dim_in - k : SLICE,
                       .accumulate = k > 0};
        w->isa->gemm(&g);
    }
}

kvc_status kvki_fast_project(kvk_backend *be, const kvk_project_args *a)
{
    job w = {a, be->isa, ((size_t)a->n + ITEM_ROWS - 1) / ITEM_ROWS, NULL};
    size_t rows = kvki_pool_threads(be->pool) * (size_t)ITEM_ROWS;

    if (!kvki_shape_ok(rows, a->dim_in, 1))
        return KVC_NO_MEMORY;
    w.rows = kvki_scratch_take(be->scratch, rows * a->dim_in * sizeof(float));
    if (!w.rows)
        return KVC_NO_MEMORY;
    kvki_pool_run(be->pool, w.tiles * a->n_heads, run_item, &w);
    kvki_scratch_give(be->scratch, w.rows);
    return KVC_OK;
}
