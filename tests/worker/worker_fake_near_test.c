/*
 * worker_fake_near_test.c: decode steps over the fake device whose far rows a server in this
 * process attends over: against attention in double, and what becomes of a step whose server does
 * not attend, or lacks rows.
 */
#include <math.h>

#include "attend.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "bench.h"
#include "fake_cuda.h"
#include "fake_rig.h"
#include "harness.h"
#include "internal.h"
#include "oracle.h"

#define PREFILL 576u
#define LAYERS  2u

typedef struct near_bench {
    h_server h;
    kvc_client *client;
} near_bench;

static int open_near(void **state)
{
    near_bench *b = calloc(1, sizeof(*b));
    assert_non_null(b);
    h_server_init(&b->h);
    h_server_start(&b->h);
    b->client = store_client(kvs_server_uri(b->h.server, 0));
    *state = b;
    return 0;
}

static int close_near(void **state)
{
    near_bench *b = *state;
    kvc_client_close(b->client);
    h_server_fini(&b->h);
    free(b);
    return 0;
}

static void near_rig(rig *r, kvc_client *client, const char *selector)
{
    bool votes = strcmp(selector, "tokenselect") == 0;
    rig_init(r, selector, FAKE_TOKENS);
    r->opts.client = client;
    r->opts.backend = "cuda:0";
    r->opts.dtype = KVK_BF16;
    r->opts.head_dim = 64;
    r->opts.n_q_heads = votes ? 16 : 4;
    r->opts.n_kv_heads = votes ? 8 : 2;
    r->opts.index = KVW_INDEX_COMPRESSED;
    r->opts.residency_slots = 48;
    r->opts.max_tokens = FAKE_TOKENS;
    r->opts.reselect_cos = votes ? -0.9 : 0; /* picks are kept as long as they may be */
    r->k_scale = votes ? 0.5 : 1;
    rig_project(r, FAKE_DIMS);
}

static kvw_seq *open_by(near_bench *b, const char *selector, const char *way, rig *r)
{
    static uint32_t revision;
    static char name[16];
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    near_rig(r, b->client, selector);
    (void)snprintf(name, sizeof(name), "%u", revision++);
    r->opts.revision = name;
    r->opts.way = way;
    rig_open(r);
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    rig_prefill(r, seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    return seq;
}

/* host_syncs: of these steps. */
static kvw_stats decode(rig *r, kvw_seq *seq, rig_record *record)
{
    uint64_t syncs = stats_of(seq).host_syncs;
    rig_record_init(record, r);
    rig_decode(r, seq, PREFILL, FAKE_TOKENS, rig_record_step, record);
    kvw_stats stats = stats_of(seq);
    assert_int_equal(stats.steps_device, stats.steps);
    stats.host_syncs -= syncs;
    kvw_seq_destroy(seq);
    return stats;
}

static void check(rig *r, rig_record *rows, rig_record *near, bool rounds)
{
    double diff = rig_record_diff(r, rows, near, PREFILL, FAKE_TOKENS);
    if (!(diff >= 0 && diff <= near_bound(r) && (diff > 0 || !rounds)))
        fail_msg("%g apart, bound %g", diff, near_bound(r));
    rig_record_fini(rows);
    rig_record_fini(near);
}

/* Rows of partials are nobody's: the next step asks for them again. */
static void near_equals_rows(void **state)
{
    static const char *const selectors[] = {"esa", "tokenselect"};
    near_bench *b = *state;
    for (uint32_t i = 0; i < 2; i++) {
        rig r, s;
        rig_record rows, near;
        kvw_stats by_rows = decode(&r, open_by(b, selectors[i], "rows", &r), &rows);
        assert_int_equal(by_rows.rows_near, 0);
        uint64_t asked = kvc_metric_get(KVC_M_way_near_asked);
        uint64_t read = fake_cuda_rows_read();
        kvw_stats by_near = decode(&s, open_by(b, selectors[i], "near", &s), &near);
        assert_int_equal(by_near.way_fallbacks, 0);
        assert_true(by_near.rows_near > by_rows.misses);
        assert_true(kvc_metric_get(KVC_M_way_near_asked) > asked);
        assert_true(by_near.bytes_near > 0 && by_near.misses >= by_near.rows_near);
        /* what the device read from elsewhere is what no server attended over */
        assert_int_equal(fake_cuda_rows_read() - read, by_near.misses - by_near.rows_near);
        assert_int_equal(by_near.reselects, by_rows.reselects);
        /* two a step, and few beside steps */
        assert_true(by_near.host_syncs < 5u * LAYERS * (FAKE_TOKENS - PREFILL) / 2u);
        assert_true(i == 0 || by_near.reselects < by_near.steps);
        check(&r, &rows, &near, true);
        rig_close(&r);
        rig_close(&s);
    }
}

/* The server attends too much already: the step is done again by rows, whose bits it has then. */
static void a_busy_server_sends_rows(void **state)
{
    near_bench *b = *state;
    kvs_attender *attender = b->h.server->attender;
    rig r, s;
    rig_record rows, near;
    (void)decode(&r, open_by(b, "esa", "rows", &r), &rows);
    kvw_seq *seq = open_by(b, "esa", "near", &s);
    atomic_fetch_add(&attender->n_calls, attender->max_calls);
    kvw_stats stats = decode(&s, seq, &near);
    atomic_fetch_sub(&attender->n_calls, attender->max_calls);
    assert_int_equal(stats.rows_near, 0);
    assert_true(stats.way_fallbacks > 20);
    rig_record_equal(&r, &rows, &near, PREFILL, FAKE_TOKENS);
    check(&r, &rows, &near, false);
    rig_close(&r);
    rig_close(&s);
}

/* Rows of a block that no server has any more are dropped, by either way. */
static kvw_stats decode_with_a_hole(near_bench *b, const char *way, rig *r, rig_record *record)
{
    kvc_op op;
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    fake_rig(r, b->client);
    r->opts.policy = KVW_DROP;
    r->opts.way = way;
    r->opts.revision = way;
    rig_open(r);
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    rig_prefill(r, seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_erase(b->client, kvw_schema_digest(r->worker), &seq->blocks[3].digest, 1, NULL, 0,
                        NULL, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    return decode(r, seq, record);
}

static void holes_are_dropped_alike(void **state)
{
    near_bench *b = *state;
    rig r, s;
    rig_record rows, near;
    kvw_stats by_rows = decode_with_a_hole(b, "rows", &r, &rows);
    kvw_stats by_near = decode_with_a_hole(b, "near", &s, &near);
    assert_true(by_rows.rows_dropped > 0 && by_near.rows_dropped > 0);
    assert_true(by_near.way_fallbacks > 0 && by_near.rows_near > 0);
    check(&r, &rows, &near, false);
    rig_close(&r);
    rig_close(&s);
}

/* Results that are to have the same bits whatever was resident do not come from afar. */
static void check_fetches(near_bench *b, uint32_t exact, uint32_t chunk_tokens)
{
    rig r;
    rig_record record;
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    fake_rig(&r, b->client);
    r.opts.exact = exact;
    r.opts.chunk_tokens = chunk_tokens;
    r.opts.way = "near";
    r.opts.revision = exact != 0 ? "exact" : "chunks of one";
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    kvw_stats stats = decode(&r, seq, &record);
    assert_int_equal(stats.rows_near, 0);
    assert_true(stats.bytes_fetched > 0);
    rig_record_fini(&record);
    rig_close(&r);
}

static void exact_steps_fetch(void **state)
{
    check_fetches(*state, 1, 64);
}

/* Each step's pass is a chunk then, whose blocks others may find. */
static void chunks_of_one_token_fetch(void **state)
{
    check_fetches(*state, 0, 1);
}

/* A step in parts of a token that the layer has. */
static kvc_status one_step(kvw_seq *seq, const void *q, void *out, float *lse)
{
    kvw_step *step = NULL;
    kvc_status st = kvw_step_begin(seq, 0, q, 1, &step);
    return st == KVC_OK ? kvw_step_finish(step, q, out, lse) : st;
}

/* Whichever wait of a step fails, the step does; and leaves nothing in the way of the next one. */
static void waits_may_fail(void **state)
{
    static const char *const ways[] = {"rows", "near"};
    for (uint32_t i = 0; i < 2; i++) {
        rig r;
        uint32_t dims = FAKE_DIMS;
        kvc_status st = KVC_DEVICE;
        kvw_seq *seq = open_by(*state, "esa", ways[i], &r);
        float *out = malloc(rig_q_width(&r) * sizeof(*out)), lse[64];
        assert_true(out != NULL && r.opts.n_q_heads <= 64);
        for (uint32_t n = 0; st != KVC_OK; n++) {
            const rig_step done = {
                .seq = seq, .first = PREFILL + n, .n = 1, .out = out, .lse = lse};
            void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, PREFILL + n, 1);
            assert_true(n < 4);
            assert_ok(kvw_tokens(seq, r.tokens + PREFILL + n, 1));
            for (uint32_t layer = 0; layer < LAYERS; layer++) {
                void *k = rig_bytes(&r, r.k, rig_kv_width(&r), layer, PREFILL + n, 1);
                void *v = rig_bytes(&r, r.v, rig_kv_width(&r), layer, PREFILL + n, 1);
                assert_ok(kvw_append(seq, layer, k, v, 1));
                free(k);
                free(v);
            }
            fake_cuda_syncs(n);
            st = one_step(seq, q, out, lse);
            fake_cuda_syncs(UINT32_MAX);
            assert_true(st == KVC_DEVICE || (st == KVC_OK && n > i));
            if (st != KVC_OK)
                assert_ok(one_step(seq, q, out, lse));
            oracle_check_step(&dims, &r, &done);
            free(q);
        }
        free(out);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(near_equals_rows, open_near, close_near),
        cmocka_unit_test_setup_teardown(a_busy_server_sends_rows, open_near, close_near),
        cmocka_unit_test_setup_teardown(holes_are_dropped_alike, open_near, close_near),
        cmocka_unit_test_setup_teardown(exact_steps_fetch, open_near, close_near),
        cmocka_unit_test_setup_teardown(waits_may_fail, open_near, close_near),
        cmocka_unit_test_setup_teardown(chunks_of_one_token_fetch, open_near, close_near),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
