/*
 * group.c: what the ranks of a tensor-parallel group agree on: options, reuse, and failures.
 *
 * Runs on the sequence's thread and blocks in the engine's all_reduce. Every rank makes the same
 * calls in the same order, also a rank that has failed: the others wait for it. Numbers travel as
 * floats, so they are kept below 2^24, or are multiples of 64 below 2^30: both are exact.
 */
#include "internal.h"

/* st: what this rank has come to before; its failure is told rather than the reduction's. */
static kvc_status reduce_max(const kvw_worker *w, kvc_status st, float *x, uint32_t n)
{
    kvc_status reduced = w->opts.all_reduce(w->opts.all_reduce_arg, "max", x, n);
    if (reduced == KVC_OK || st != KVC_OK) {
        return reduced == KVC_OK ? KVC_OK : st;
    }
    return kvwi_fail(reduced, "all_reduce: %s", kvc_status_name(reduced));
}

/* What a rank returns that has st itself while some rank of the group has failed. */
static kvc_status fail_together(kvc_status st)
{
    return st != KVC_OK ? st : kvwi_fail(KVC_CANCELLED, "another rank of the group failed");
}

kvc_status kvwi_group_agree(const kvw_worker *worker, kvc_status st)
{
    float failed = st == KVC_OK ? 0 : 1;
    if (worker->opts.all_reduce == NULL) {
        return st;
    }
    kvc_status reduced = reduce_max(worker, st, &failed, 1);
    if (reduced != KVC_OK) {
        return reduced;
    }
    return failed != 0 ? fail_together(st) : KVC_OK;
}

/* Ranks that place blocks differently never find each other's. */
static uint32_t places(const kvw_worker *w)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; w->servers.n > 1 && i < w->servers.n; i++) {
        sum += w->servers.keys[i];
    }
    return (uint32_t)(sum >> 40);
}

kvc_status kvwi_group_check(const kvw_worker *worker, kvc_status st)
{
    enum { N = 6 };
    const kvw_opts *o = &worker->opts;
    const uint8_t *d = worker->schema.bytes;
    float mine[N] = {(float)o->n_q_heads,
                     (float)o->n_kv_heads,
                     (float)(d[0] | d[1] << 8 | d[2] << 16),
                     (float)(d[3] | d[4] << 8 | d[5] << 16),
                     (float)(d[6] | d[7] << 8 | d[8] << 16),
                     (float)places(worker)};
    float x[2 * N + 1];
    if (o->all_reduce == NULL) {
        return st;
    }
    for (int i = 0; i < N; i++) { /* the largest, and the smallest as the largest negative */
        x[i] = mine[i];
        x[N + i] = -mine[i];
    }
    x[2 * N] = st == KVC_OK ? 0 : 1;
    kvc_status reduced = reduce_max(worker, st, x, 2 * N + 1);
    if (reduced != KVC_OK || x[2 * N] != 0) {
        return reduced != KVC_OK ? reduced : fail_together(st);
    }
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
    kvc_status reduced = reduce_max(worker, st, x, 2);
    if (reduced != KVC_OK) {
        return reduced;
    }
    *n = (uint32_t)-x[0];
    *n_indexed = (uint32_t)-x[1];
    return st;
}
