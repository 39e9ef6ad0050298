/*
 * group.c: what the ranks of a tensor-parallel group agree on when a sequence starts.
 *
 * Runs on the sequence's thread and blocks in the engine's all_reduce. Every rank makes the same
 * calls in the same order, also a rank that has failed: the others wait for it. Numbers travel as
 * floats, so they are kept below 2^24, or are multiples of 64 below 2^30: both are exact.
 */
#include "internal.h"

static kvc_status reduce_max(const kvw_worker *w, float *x, uint32_t n)
{
    kvc_status st = w->opts.all_reduce(w->opts.all_reduce_arg, "max", x, n);
    return st == KVC_OK ? st : kvwi_fail(st, "all_reduce: %s", kvc_status_name(st));
}

kvc_status kvwi_group_check(const kvw_worker *worker)
{
    enum { N = 5 };
    const kvw_opts *o = &worker->opts;
    const uint8_t *d = worker->schema.bytes;
    float mine[N] = {(float)o->n_q_heads, (float)o->n_kv_heads,
                     (float)(d[0] | d[1] << 8 | d[2] << 16), (float)(d[3] | d[4] << 8 | d[5] << 16),
                     (float)(d[6] | d[7] << 8 | d[8] << 16)};
    float x[2 * N];
    if (o->all_reduce == NULL) {
        return KVC_OK;
    }
    for (int i = 0; i < N; i++) { /* the largest, and the smallest as the largest negative */
        x[i] = mine[i];
        x[N + i] = -mine[i];
    }
    kvc_status st = reduce_max(worker, x, 2 * N);
    for (int i = 0; st == KVC_OK && i < N; i++) {
        if (x[i] != -x[N + i]) {
            st = i < 2 ? kvwi_fail(KVC_INVALID,
                                   "n_q_heads, n_kv_heads: ranks have different numbers (here %u, "
                                   "%u): heads must divide evenly over tp_size",
                                   o->n_q_heads, o->n_kv_heads)
                       : kvwi_fail(KVC_INVALID, "ranks were opened with different options");
        }
    }
    return st;
}

kvc_status kvwi_group_least(const kvw_worker *worker, kvc_status st, uint32_t *n,
                            uint32_t *n_indexed)
{
    float x[2] = {-(float)*n, -(float)*n_indexed};
    if (worker->opts.all_reduce == NULL) {
        return st;
    }
    if (st != KVC_OK) {
        x[0] = 0;
        x[1] = 0;
    }
    kvc_status reduced = reduce_max(worker, x, 2);
    if (reduced != KVC_OK) {
        return reduced;
    }
    *n = (uint32_t)-x[0];
    *n_indexed = (uint32_t)-x[1];
    return st;
}
