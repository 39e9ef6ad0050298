/*
 * score.c: scores of index rows, page by page, exact or int8. Pure apart from its output.
 */
#include "internal.h"

static kvc_status score_run(const kvw_worker *w, const kvwi_level *level, const float *q,
                            uint32_t m, uint32_t heads, const void *rows, uint32_t n, float *out,
                            size_t stride)
{
    if (level->exact) {
        const kvk_score_keys_args args = {
            .q = q,
            .m = m,
            .n_q_heads = heads,
            .n_kv_heads = level->heads,
            .head_dim = level->dims,
            .keys = {rows, level->row_bytes, w->opts.dtype},
            .n = n,
            .out = out,
            .out_stride = stride,
        };
        return w->ops->score_keys(w->be, &args, NULL);
    }
    const kvk_score_index_args args = {
        .q = q,
        .m = m,
        .n_q_heads = heads,
        .n_kv_heads = level->heads,
        .dims = level->dims,
        .index = rows,
        .index_stride_bytes = level->row_bytes,
        .n = n,
        .out = out,
        .out_stride = stride,
    };
    return w->ops->score_index(w->be, &args, NULL);
}

kvc_status kvwi_score(kvw_select_ctx *ctx, const float *q, uint32_t m, uint32_t heads,
                      const kvw_source *source, float *out, size_t stride)
{
    const kvw_worker *w = ctx->worker;
    if (source->pages == NULL) {
        return score_run(w, source->level, q, m, heads, source->dense, source->n, out, stride);
    }
    for (uint32_t done = 0; done < source->n;) {
        uint32_t run = 0;
        const uint8_t *rows = kvwi_pages_row(source->pages, source->first + done, &run);
        run = kvwi_min_u32(run, source->n - done);
        kvc_status st = score_run(w, source->level, q, m, heads, rows, run, out + done, stride);
        if (st != KVC_OK) {
            return st;
        }
        done += run;
    }
    return KVC_OK;
}
