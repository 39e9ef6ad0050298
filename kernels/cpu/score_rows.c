/* score_rows.c: scores of chosen rows, by pointer; the work is in scores.c. */
#include "check.h"
#include "scores.h"

static kvki_scores scores_of(const kvk_score_rows_args *a)
{
    return (kvki_scores){.q = a->q,
                         .m = a->m,
                         .n_q_heads = a->n_q_heads,
                         .n_kv_heads = a->n_kv_heads,
                         .head_dim = a->head_dim,
                         .rows = a->rows,
                         .dtype = a->dtype,
                         .n = a->n,
                         .out = a->out,
                         .out_stride = a->out_stride};
}

kvc_status kvki_check_score_rows(const kvk_score_rows_args *a)
{
    kvki_scores s = scores_of(a);
    return kvki_scores_ok(&s) && kvki_pointers_ok(a->rows, a->n) ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_score_rows(const kvk_score_rows_args *a)
{
    kvki_scores s = scores_of(a);
    kvki_scores_ref(&s);
    return KVC_OK;
}

kvc_status kvki_fast_score_rows(kvk_backend *be, const kvk_score_rows_args *a)
{
    kvki_scores s = scores_of(a);
    kvki_scores_fast(be, &s);
    return KVC_OK;
}
