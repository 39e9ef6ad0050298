/*
 * vote.c: TokenSelect's soft vote (2411.02886 eq. 7): the heads' softmax weights, summed in head
 * order. A head without candidates (sumexp 0) has no say.
 */
#include <string.h>

#include "check.h"
#include "internal.h"
#include "isa.h"

#define RUN 4096u

kvc_status kvki_check_vote(const kvk_vote_args *a)
{
    if (!kvki_matrix_ok(a->logits, a->n_heads, a->n, a->stride))
        return KVC_INVALID;
    if (a->n_heads && (!a->max || !a->sumexp))
        return KVC_INVALID;
    return a->n == 0 || a->out ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_vote(const kvk_vote_args *a)
{
    for (size_t j = 0; j < a->n; j++) {
        double sum = 0;
        for (size_t h = 0; h < a->n_heads; h++) {
            double x = (double)a->logits[h * a->stride + j] - (double)a->max[h];
            if (a->sumexp[h] != 0)
                sum += exp(x) / (double)a->sumexp[h];
        }
        a->out[j] = (float)sum;
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_vote_args *a;
    const kvki_isa *isa;
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_vote_args *a = w->a;
    size_t from = item * RUN;
    size_t n = a->n - from < RUN ? a->n - from : RUN;

    (void)worker;
    memset(a->out + from, 0, n * sizeof(float));
    for (size_t h = 0; h < a->n_heads; h++) {
        if (a->sumexp[h] != 0)
            w->isa->exp_add(a->logits + h * a->stride + from, n, a->max[h], 1.0f / a->sumexp[h],
                            a->out + from);
    }
}

kvc_status kvki_fast_vote(kvk_backend *be, const kvk_vote_args *a)
{
    job w = {a, be->isa};

    kvki_pool_run(be->pool, ((size_t)a->n + RUN - 1) / RUN, run_item, &w);
    return KVC_OK;
}
