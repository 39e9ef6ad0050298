/*
 * group_sum.c: the GQA collapse of ESA (2502.14477 eq. 3): the query heads of a group are summed,
 * because they meet the same key. Query head h belongs to kv head h div group.
 */
#include "check.h"
#include "elem.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ELEMS 16384u

kvc_status kvki_check_group_sum(const kvk_group_sum_args *a)
{
    size_t width = (size_t)a->n_q_heads * a->head_dim;

    if (!kvki_heads_ok(a->n_q_heads, a->n_kv_heads) || a->head_dim == 0)
        return KVC_INVALID;
    return kvki_rows_ok(&a->in, a->n, width) && (a->n == 0 || a->out) ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_group_sum(const kvk_group_sum_args *a)
{
    size_t d = a->head_dim, group = a->n_q_heads / a->n_kv_heads;

    for (size_t i = 0; i < a->n; i++) {
        for (size_t j = 0; j < a->n_kv_heads * d; j++) {
            size_t head = j / d, at = j % d;
            double sum = 0;
            for (size_t g = 0; g < group; g++)
                sum += (double)kvki_elem(kvki_row(&a->in, i), a->in.dtype,
                                         (head * group + g) * d + at);
            a->out[i * a->n_kv_heads * d + j] = (float)sum;
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_group_sum_args *a;
    const kvki_isa *isa;
    size_t rows_per_item;
    float *tmp; /* [threads, head_dim] */
} job;

static void sum_row(const job *w, size_t i, float *tmp)
{
    const kvk_group_sum_args *a = w->a;
    size_t d = a->head_dim, group = a->n_q_heads / a->n_kv_heads;
    const char *in = kvki_row(&a->in, i);

    for (size_t h = 0; h < a->n_q_heads; h++) {
        float *out = a->out + (i * a->n_kv_heads + h / group) * d;
        const char *from = in + h * d * kvk_dtype_bytes(a->in.dtype);
        w->isa->convert(from, a->in.dtype, d, h % group == 0 ? out : tmp);
        if (h % group != 0)
            w->isa->add(out, tmp, d);
    }
}

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t end = (item + 1) * w->rows_per_item;

    for (size_t i = item * w->rows_per_item; i < w->a->n && i < end; i++)
        sum_row(w, i, w->tmp + (size_t)worker * w->a->head_dim);
}

kvc_status kvki_fast_group_sum(kvk_backend *be, const kvk_group_sum_args *a)
{
    job w = {a, be->isa, 1 + ITEM_ELEMS / ((size_t)a->n_q_heads * a->head_dim), NULL};

    w.tmp = kvki_scratch_take(be->scratch,
                              kvki_pool_threads(be->pool) * (size_t)a->head_dim * sizeof(float));
    if (!w.tmp)
        return KVC_NO_MEMORY;
    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    kvki_scratch_give(be->scratch, w.tmp);
    return KVC_OK;
}
