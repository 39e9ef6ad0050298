/*
 * softmax_stats.c: running maximum and sum of exponentials of each head. Runs of RUN logits are
 * items with their own (max, sum); the runs of a head are then joined in order, in double, with
 * what the caller brought. A NaN logit makes its head's sum NaN.
 */
#include "check.h"
#include "internal.h"
#include "isa.h"

#define RUN 8192u

kvc_status kvki_check_softmax_stats(const kvk_softmax_stats_args *a)
{
    if (!kvki_matrix_ok(a->logits, a->n_heads, a->n, a->stride))
        return KVC_INVALID;
    return a->n_heads == 0 || (a->max && a->sumexp) ? KVC_OK : KVC_INVALID;
}

/* Joins (max, sum) into (*max_p, *sum_p); a sum over nothing is 0 at -INFINITY. */
static void join(float max, double sum, float *max_p, double *sum_p)
{
    float top = max > *max_p ? max : *max_p;
    double kept = *max_p == top ? *sum_p : *sum_p * exp((double)*max_p - (double)top);
    double added = max == top ? sum : sum * exp((double)max - (double)top);

    *max_p = top;
    *sum_p = kept + added;
}

/* (max, sum) of one run in double. */
static double run_ref(const float *x, size_t n, float *max_p)
{
    double sum = 0, shift = 0;

    *max_p = -INFINITY;
    for (size_t j = 0; j < n; j++)
        *max_p = x[j] > *max_p ? x[j] : *max_p;
    shift = *max_p == -INFINITY ? 0 : (double)*max_p;
    for (size_t j = 0; j < n; j++)
        sum += exp((double)x[j] - shift);
    return sum;
}

kvc_status kvki_ref_softmax_stats(const kvk_softmax_stats_args *a)
{
    for (size_t h = 0; h < a->n_heads; h++) {
        float max = 0;
        double total = (double)a->sumexp[h];
        double sum = run_ref(a->logits + h * a->stride, a->n, &max);
        join(max, sum, &a->max[h], &total);
        a->sumexp[h] = (float)total;
    }
    return KVC_OK;
}

typedef struct run_stats {
    float max;
    double sum;
} run_stats;

typedef struct job {
    const kvk_softmax_stats_args *a;
    const kvki_isa *isa;
    size_t runs;
    run_stats *stats; /* [n_heads, runs] */
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t from = item % w->runs * RUN;
    size_t n = w->a->n - from < RUN ? w->a->n - from : RUN;
    const float *x = w->a->logits + item / w->runs * w->a->stride + from;
    float max = w->isa->max(x, n, -INFINITY);

    (void)worker;
    w->stats[item].max = max;
    w->stats[item].sum = w->isa->exp_sum(x, n, max == -INFINITY ? 0 : max);
}

kvc_status kvki_fast_softmax_stats(kvk_backend *be, const kvk_softmax_stats_args *a)
{
    job w = {a, be->isa, ((size_t)a->n + RUN - 1) / RUN, NULL};

    if (a->n == 0 || a->n_heads == 0)
        return KVC_OK;
    w.stats = kvki_scratch_take(be->scratch, a->n_heads * w.runs * sizeof(run_stats));
    if (!w.stats)
        return KVC_NO_MEMORY;
    kvki_pool_run(be->pool, a->n_heads * w.runs, run_item, &w);
    for (size_t h = 0; h < a->n_heads; h++) {
        double total = (double)a->sumexp[h];
        for (size_t r = 0; r < w.runs; r++)
            join(w.stats[h * w.runs + r].max, w.stats[h * w.runs + r].sum, &a->max[h], &total);
        a->sumexp[h] = (float)total;
    }
    kvki_scratch_give(be->scratch, w.stats);
    return KVC_OK;
}
