/* score_keys.c: scores of exact keys at a stride; the work is in scores.c. */
#include "check.h"
#include "scores.h"

static kvki_scores scores_of(const kvk_score_keys_args *a)
{
    return (kvki_scores){.q = a->q,
                         .m = a->m,
                         .n_q_heads = a->n_q_heads,
                         .n_kv_heads = a->n_kv_heads,
                         .head_dim = a->head_dim,
                         .data = a->keys.data,
                         .stride_bytes = a->keys.stride_bytes,
                         .dtype = a->keys.dtype,
                         .n = a->n,
                         .out = a->out,
                         .out_stride = a->out_stride};
}

kvc_status kvki_check_score_keys(const kvk_score_keys_args *a)
{
    kvki_scores s = scores_of(a);

    if (!kvki_scores_ok(&s))
        return KVC_INVALID;
    return kvki_rows_ok(&a->keys, a->n, (size_t)a->n_kv_heads * a->head_dim) ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_score_keys(const kvk_score_keys_args *a)
{
    kvki_scores s = scores_of(a);
    kvki_scores_ref(&s);
    return KVC_OK;
}

kvc_status kvki_fast_score_keys(kvk_backend *be, const kvk_score_keys_args *a)
{
    kvki_scores s = scores_of(a);
    kvki_scores_fast(be, &s);
    return KVC_OK;
}
