/*
 * bench.c: see bench.h.
 */
#include "bench.h"

#include <math.h>

#include "base/clock.h"

#define URI "inproc://worker-test"

int bench_open(void **state)
{
    bench *b = calloc(1, sizeof(*b));
    assert_non_null(b);
    store_start(&b->store, URI);
    b->client = store_client(URI);
    *state = b;
    return 0;
}

int bench_close(void **state)
{
    bench *b = *state;
    kvc_client_close(b->client);
    store_stop(&b->store);
    free(b);
    return 0;
}

kvw_stats stats_of(kvw_seq *seq)
{
    kvw_stats stats = {.size_bytes = sizeof(stats)};
    assert_ok(kvw_seq_stats(seq, &stats));
    return stats;
}

/* Long enough that most blocks leave the worker; the slots hold one step's picks and no more. */
void store_rig(rig *r, const char *selector, kvw_index_kind index, kvc_client *client)
{
    rig_init(r, selector, 700);
    r->opts.client = client;
    r->opts.exact = 1;
    r->opts.residency_slots = 48;
    r->opts.index = index;
    if (index == KVW_INDEX_RERANKED)
        r->opts.index_dims = 8;
    if (index != KVW_INDEX_EXACT)
        rig_project(r, 16);
}

/* Everything before `from` prefilled (or reused), the rest decoded; outputs into record. */
void run(rig *r, rig_record *record, uint32_t n_known, uint32_t *reused_p, kvw_stats *stats)
{
    kvw_seq *seq = NULL;
    rig_record_init(record, r);
    assert_ok(kvw_seq_create(r->worker, r->tokens, n_known, &seq, reused_p));
    assert_int_equal(kvw_seq_tokens(seq), *reused_p);
    uint32_t half = *reused_p > 448 ? *reused_p : 448;
    /* flushed on the way: how many rows have left the worker does not depend on the put thread */
    rig_prefill(r, seq, *reused_p, half, rig_record_step, record);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    rig_prefill(r, seq, half, 660, rig_record_step, record);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    rig_decode(r, seq, 660, 700, rig_record_step, record);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    *stats = stats_of(seq);
    kvw_seq_destroy(seq);
}

double near_bound(const rig *r)
{
    double most = 0;
    size_t n = (size_t)r->opts.n_layers * r->n_tokens * rig_kv_width(r);
    for (size_t i = 0; i < n; i++)
        most = fabs(r->v[i]) > most ? fabs(r->v[i]) : most;
    double round = r->opts.dtype == KVK_F32 ? 1e-5 : r->opts.dtype == KVK_F16 ? 0x1p-11 : 0x1p-8;
    return 2 * round * most;
}
