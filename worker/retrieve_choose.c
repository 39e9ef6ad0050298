/*
 * retrieve_choose.c: which chunks: scores of all landmarks before this chunk, the k best of them,
 * their weights (GCA 2410.01651 sec 3, HSA 2504.16795), in ascending order of chunks. The
 * sequence's thread.
 */
#include <math.h>

#include "base/clock.h"
#include "retrieve.h"

/* Scores of chunks 0 .. n - 1, a page of landmarks at a time. */
static kvc_status score(kvw_retriever *r, const float *query, uint32_t n, float *out)
{
    const kvw_worker *w = r->seq->worker;
    const kvwi_pages *pages = &r->seq->layers[r->layer].level[0];
    size_t stride = (size_t)w->opts.landmark_dim * sizeof(float);
    kvc_status st = KVC_OK;
    for (uint32_t done = 0; st == KVC_OK && done < n;) {
        uint32_t run = 0;
        const uint8_t *marks = kvwi_pages_row(pages, done * KVW_CHUNK_TOKENS, &run);
        run = kvwi_min_u32(run / KVW_CHUNK_TOKENS, n - done);
        const kvk_score_keys_args args = {
            .q = query + r->dim_off,
            .m = 1,
            .n_q_heads = 1,
            .n_kv_heads = 1,
            .head_dim = r->dim,
            .keys = {marks + r->dim_off * sizeof(float), stride, KVK_F32},
            .n = run,
            .out = out + done,
            .out_stride = run,
        };
        st = w->ops->score_keys(w->be, &args, NULL);
        done += run;
    }
    return st;
}

static kvc_status take_best(kvw_retriever *r, const float *scores, uint32_t n)
{
    const kvw_worker *w = r->seq->worker;
    uint32_t k = kvwi_min_u32(w->opts.k, n);
    size_t bytes = kvk_topk_workspace_bytes(n, k);
    kvc_status st = kvwi_buf_need(&r->topk, bytes);
    if (st != KVC_OK) {
        return st;
    }
    const kvk_topk_args best = {.scores = scores,
                                .n = n,
                                .k = k,
                                .ids = r->order_ids,
                                .out_scores = r->order_scores,
                                .n_out_p = &r->n,
                                .workspace = r->topk.p,
                                .workspace_bytes = bytes};
    st = w->ops->topk(w->be, &best, NULL);
    if (st != KVC_OK) {
        return st;
    }
    const kvk_chunk_weights_args weigh = {.scores = r->order_scores,
                                          .ids = r->order_ids,
                                          .n = 1,
                                          .k = r->n,
                                          .fusion = w->selector->fusion,
                                          .scale = 1.0f / sqrtf((float)r->dim),
                                          .weights = r->order_w};
    return w->ops->chunk_weights(w->be, &weigh, NULL);
}

/* The lists by ascending chunk: the order of attention. */
static void sort_chosen(kvw_retriever *r)
{
    for (uint32_t i = 0; i < r->n; i++) {
        uint32_t at = 0;
        for (uint32_t j = 0; j < r->n; j++) {
            at += r->order_ids[j] < r->order_ids[i];
        }
        r->ids[at] = r->order_ids[i];
        r->scores[at] = r->order_scores[i];
        r->weights[at] = r->order_w[i];
    }
}

static kvc_status choose_on_host(kvw_retriever *r, const float *query, uint32_t n)
{
    kvc_status st = kvwi_buf_need(&r->all_scores, (n + 1u) * sizeof(float));
    if (st == KVC_OK && n != 0) {
        st = score(r, query, n, r->all_scores.p);
        if (st == KVC_OK) {
            st = take_best(r, r->all_scores.p, n);
        }
    }
    return st;
}

kvc_status kvwi_retriever_choose(kvw_retriever *r, const float *query, uint32_t n)
{
    const kvw_worker *w = r->seq->worker;
    uint64_t t0 = kvc_now_ns();
    r->n = 0;
    kvc_status st = w->device != NULL ? w->device_ops->retriever_choose(r, query, n)
                                      : choose_on_host(r, query, n);
    sort_chosen(r);
    r->seq->stats.steps++;
    r->seq->stats.reselects++;
    r->seq->stats.ns_select += kvc_now_ns() - t0;
    return st == KVC_OK ? st : kvwi_fail(st, "retrieval failed: %s", kvc_status_name(st));
}
