/*
 * worker_near_test.c: steps whose misses a real server attends over, beside the same steps by rows:
 * equal within the stated bound, whichever selector and dtype; what happens where that way fails,
 * or lacks rows; and the choice.
 *
 * The server runs in this process, over inproc.
 */
#include <math.h>

#include "attend.h"
#include "base/metrics.h"
#include "bench.h"
#include "harness.h"
#include "internal.h"

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

static void near_rig(rig *r, const near_bench *b, const char *selector, kvk_dtype dtype,
                     const char *way)
{
    store_rig(r, selector, KVW_INDEX_EXACT, b->client);
    r->opts.exact = 0;
    r->opts.dtype = dtype;
    r->opts.way = way;
}

/* A whole run by one way; its outputs into record. Every run puts blocks of its own. */
static kvw_stats run_by(near_bench *b, const char *selector, kvk_dtype dtype, const char *way,
                        rig *r, rig_record *record)
{
    static uint32_t revision;
    static char name[16];
    uint32_t reused = 0;
    kvw_stats stats;
    near_rig(r, b, selector, dtype, way);
    (void)snprintf(name, sizeof(name), "%u", revision++);
    r->opts.revision = name;
    rig_open(r);
    run(r, record, 0, &reused, &stats);
    return stats;
}

static void near_equals_rows(void **state)
{
    static const kvk_dtype dtypes[] = {KVK_F32, KVK_F16, KVK_BF16};
    near_bench *b = *state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        for (uint32_t d = 0; d < 3; d++) {
            rig r, s;
            rig_record rows, near;
            const char *selector = kvw_selector_at(i)->name;
            kvw_stats by_rows = run_by(b, selector, dtypes[d], "rows", &r, &rows);
            kvw_stats by_near = run_by(b, selector, dtypes[d], "near", &s, &near);
            assert_int_equal(by_rows.rows_near, 0);
            assert_true(by_near.rows_near > 500);
            assert_int_equal(by_near.way_fallbacks, 0);
            double diff = rig_record_diff(&r, &rows, &near, 0, 700);
            if (!(diff > 0 && diff <= near_bound(&r)))
                fail_msg("%s, dtype %d: %g apart, bound %g", selector, (int)dtypes[d], diff,
                         near_bound(&r));
            rig_record_fini(&rows);
            rig_record_fini(&near);
            rig_close(&r);
            rig_close(&s);
        }
    }
}

/* A server that attends too much already: the same rows are fetched, and once. */
static void a_busy_server_sends_rows(void **state)
{
    near_bench *b = *state;
    kvs_attender *attender = b->h.server->attender;
    rig r, s;
    rig_record rows, near;
    (void)run_by(b, "tokenselect", KVK_BF16, "rows", &r, &rows);
    atomic_fetch_add(&attender->n_calls, attender->max_calls);
    uint64_t before = kvc_metric_get(KVC_M_way_fallbacks);
    kvw_stats stats = run_by(b, "tokenselect", KVK_BF16, "near", &s, &near);
    atomic_fetch_sub(&attender->n_calls, attender->max_calls);
    assert_int_equal(stats.rows_near, 0);
    assert_true(stats.way_fallbacks > 20);
    assert_int_equal(kvc_metric_get(KVC_M_way_fallbacks) - before, stats.way_fallbacks);
    assert_int_equal(stats.rows_dram, stats.misses);
    assert_true(rig_record_diff(&r, &rows, &near, 0, 700) <= near_bound(&r));
    rig_record_fini(&rows);
    rig_record_fini(&near);
    rig_close(&r);
    rig_close(&s);
}

/* A block that no tier has: its rows are dropped from near partials as from fetches, and no other.
 */
static kvw_stats run_with_a_hole(near_bench *b, const char *way, rig *r, rig_record *record)
{
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    kvc_op op;
    near_rig(r, b, "tokenselect", KVK_F32, way);
    r->opts.policy = KVW_DROP;
    r->opts.revision = way;
    rig_open(r);
    rig_record_init(record, r);
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    rig_prefill(r, seq, 0, 660, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_erase(b->client, kvw_schema_digest(r->worker), &seq->blocks[3].digest, 1, NULL, 0,
                        NULL, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    for (uint32_t i = 0; i < r->opts.n_layers; i++) /* what was fetched of it is forgotten too */
        for (uint32_t p = 0; p < 660; p++)
            kvwi_residency_drop(&seq->layers[i].residency, p);
    rig_decode(r, seq, 660, 700, rig_record_step, record);
    kvw_stats stats = stats_of(seq);
    kvw_seq_destroy(seq);
    return stats;
}

static void holes_are_dropped_alike(void **state)
{
    near_bench *b = *state;
    rig r, s;
    rig_record rows, near;
    uint64_t rest = kvc_metric_get(KVC_M_way_rows_rest);
    kvw_stats by_rows = run_with_a_hole(b, "rows", &r, &rows);
    kvw_stats by_near = run_with_a_hole(b, "near", &s, &near);
    assert_true(by_rows.rows_dropped > 40);
    assert_int_equal(by_near.rows_dropped, by_rows.rows_dropped);
    assert_true(by_near.rows_near > 500);
    assert_true(kvc_metric_get(KVC_M_way_rows_rest) > rest); /* the server said what it lacked */
    double diff = rig_record_diff(&r, &rows, &near, 660, 700);
    if (!(diff <= near_bound(&r)))
        fail_msg("%g apart", diff);
    rig_record_fini(&rows);
    rig_record_fini(&near);
    rig_close(&r);
    rig_close(&s);
}

/* Without DROP the step says what is missing. */
static void a_hole_fails_a_step(void **state)
{
    near_bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    kvc_op op;
    near_rig(&r, b, "esa", KVK_F32, "near");
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    /* whole chunks go by rows, since others may reuse their blocks */
    assert_true(stats_of(seq).misses > 0);
    assert_int_equal(stats_of(seq).rows_near, 0);
    kvc_digest digests[10];
    for (uint32_t i = 0; i < 10; i++)
        digests[i] = seq->blocks[i].digest;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(
        kvc_erase(b->client, kvw_schema_digest(r.worker), digests, 10, NULL, 0, NULL, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    for (uint32_t p = 0; p < 640; p++)
        kvwi_residency_drop(&seq->layers[0].residency, p);
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 640, 1);
    void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, 640, 1);
    void *v = rig_bytes(&r, r.v, rig_kv_width(&r), 0, 640, 1);
    assert_ok(kvw_tokens(seq, r.tokens + 640, 1));
    assert_int_equal(kvw_forward(seq, 0, q, k, v, 1, q, NULL), KVC_NOT_FOUND);
    assert_non_null(strstr(kvw_last_error(), "did not arrive"));
    free(q);
    free(k);
    free(v);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A step that is given up with the request in flight, or before there was one. */
static void abandoned_steps_leave_nothing(void **state)
{
    near_bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    near_rig(&r, b, "esa", KVK_BF16, "near");
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 640, 1);
    void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, 640, 1);
    void *v = rig_bytes(&r, r.v, rig_kv_width(&r), 0, 640, 1);
    uint16_t first[64], again[64];
    assert_true(sizeof(first) >= rig_q_width(&r) * sizeof(uint16_t));
    assert_ok(kvw_tokens(seq, r.tokens + 640, 1));
    assert_ok(kvw_append(seq, 0, k, v, 1));
    for (uint32_t i = 0; i < 40; i++) {
        kvw_step *step = NULL;
        assert_ok(kvw_step_begin(seq, 0, q, 1, &step));
        if (i % 2 == 0)
            assert_ok(kvw_step_attend(step, q));
        if (i == 10 || i == 39)
            assert_ok(kvw_step_finish(step, q, i == 10 ? first : again, NULL));
        else
            kvw_step_abandon(step);
    }
    assert_memory_equal(first, again, rig_q_width(&r) * sizeof(uint16_t));
    free(q);
    free(k);
    free(v);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

static void the_choice_is_learnt(void **state)
{
    near_bench *b = *state;
    rig r, s;
    rig_record rows, any;
    kvc_way_ask ask = {.n_rows = 40, .row_bytes = 512, .n_q = 1};
    kvc_way_cost costs[KVC_WAY_COUNT];
    (void)run_by(b, "esa", KVK_F32, "rows", &r, &rows);
    uint64_t before =
        kvc_metric_get(KVC_M_way_rows_requests) + kvc_metric_get(KVC_M_way_near_requests);
    kvw_stats stats = run_by(b, "esa", KVK_F32, NULL, &s, &any);
    uint64_t n = kvc_metric_get(KVC_M_way_rows_requests) + kvc_metric_get(KVC_M_way_near_requests);
    assert_true(n - before > 20 && n - before <= stats.steps);
    assert_true(rig_record_diff(&r, &rows, &any, 0, 700) <= near_bound(&r));
    kvc_way_why why;
    kvc_way best = kvc_way_costs(b->client, &ask, costs, &why);
    assert_int_equal(why, KVC_WHY_CHEAPEST);
    assert_true(best == KVC_WAY_ROWS || best == KVC_WAY_NEAR);
    assert_true(costs[KVC_WAY_ROWS].samples > 3 && costs[KVC_WAY_NEAR].samples >= 3);
    assert_non_null(costs[KVC_WAY_SHM].why_not);
    /* What a fetched row is used for later makes it worth more. */
    double alone = costs[KVC_WAY_ROWS].cost_ns;
    ask.reuse = 9;
    (void)kvc_way_costs(b->client, &ask, costs, NULL);
    assert_true(fabs(costs[KVC_WAY_ROWS].cost_ns - alone / 10) < alone / 1000);
    ask.refused = 1u << KVC_WAY_ROWS;
    assert_int_equal(kvc_way_costs(b->client, &ask, costs, &why), KVC_WAY_NEAR);
    assert_int_equal(why, KVC_WHY_ONLY);
    ask.n_q = KVC_MAX_ATTEND_QUERIES + 1;
    assert_int_equal(kvc_way_costs(b->client, &ask, costs, NULL), KVC_WAY_COUNT);
    rig_record_fini(&rows);
    rig_record_fini(&any);
    rig_close(&r);
    rig_close(&s);
}

/* Choices by way and reason since the call before, and their sums by way beside way_*_requests. */
static void count_choices(uint64_t n[KVC_WAY_COUNT][KVC_WHY_COUNT])
{
    static uint64_t last[KVC_WAY_COUNT][KVC_WHY_COUNT + 1];
    kvc_named_count counts[KVC_METRIC_COUNT];
    assert_int_equal(kvc_process_counts(NULL, 0), KVC_METRIC_COUNT);
    assert_int_equal(kvc_process_counts(counts, KVC_METRIC_COUNT), KVC_METRIC_COUNT);
    for (int way = 0; way < KVC_WAY_COUNT; way++) {
        uint64_t sum = 0, requests = 0;
        for (int why = 0; why <= KVC_WHY_COUNT; why++) {
            char name[64];
            uint32_t at = 0;
            (void)snprintf(name, sizeof(name), "way_%s_%s", kvc_way_name((kvc_way)way),
                           why < KVC_WHY_COUNT ? kvc_way_why_name((kvc_way_why)why) : "requests");
            while (at < KVC_METRIC_COUNT && strcmp(counts[at].name, name) != 0)
                at++;
            assert_true(at < KVC_METRIC_COUNT);
            uint64_t since = counts[at].value - last[way][why];
            last[way][why] = counts[at].value;
            if (why < KVC_WHY_COUNT)
                sum += n[way][why] = since;
            else
                requests = since;
        }
        assert_int_equal(sum, requests);
    }
}

/* One run of a worker; what it chose, which must have been for these reasons alone. */
static void check_reasons(near_bench *b, const char *way, uint32_t exact, uint32_t rows_whys,
                          uint32_t near_whys)
{
    uint64_t n[KVC_WAY_COUNT][KVC_WHY_COUNT];
    rig r;
    rig_record record;
    uint32_t reused = 0;
    kvw_stats stats;
    near_rig(&r, b, "esa", KVK_F32, way);
    r.opts.exact = exact;
    r.opts.revision = "reasons";
    count_choices(n);
    rig_open(&r);
    run(&r, &record, 0, &reused, &stats);
    count_choices(n);
    for (uint32_t why = 0; why < KVC_WHY_COUNT; why++) {
        if ((n[KVC_WAY_ROWS][why] != 0) != ((rows_whys >> why & 1) != 0) ||
            (n[KVC_WAY_NEAR][why] != 0) != ((near_whys >> why & 1) != 0))
            fail_msg("way %s, exact %u: %s %u rows, %u near", way, exact,
                     kvc_way_why_name((kvc_way_why)why), (unsigned)n[KVC_WAY_ROWS][why],
                     (unsigned)n[KVC_WAY_NEAR][why]);
    }
    rig_record_fini(&record);
    rig_close(&r);
}

static void choices_are_counted_with_their_reasons(void **state)
{
    near_bench *b = *state;
    kvs_attender *attender = b->h.server->attender;
    const uint32_t asked = 1u << KVC_WHY_ASKED, exact = 1u << KVC_WHY_EXACT;
    check_reasons(b, "rows", 0, asked, 0);
    check_reasons(b, "rows", 1, asked, 0);
    check_reasons(b, "near", 1, exact, 0);
    check_reasons(b, NULL, 1, exact, 0);
    /* passes of chunk_tokens go by rows, whose blocks others reuse */
    check_reasons(b, "near", 0, exact, asked);
    atomic_fetch_add(&attender->n_calls, attender->max_calls);
    check_reasons(b, "near", 0, exact | 1u << KVC_WHY_BUSY, asked);
    atomic_fetch_sub(&attender->n_calls, attender->max_calls);
    uint64_t n[KVC_WAY_COUNT][KVC_WHY_COUNT];
    kvc_way_ask ask = {.n_rows = 1, .row_bytes = 64, .n_q = 1, .refused = 1u << KVC_WAY_NEAR};
    count_choices(n);
    assert_int_equal(kvc_way_choose(b->client, &ask), KVC_WAY_ROWS);
    ask.because = KVC_WHY_REST;
    assert_int_equal(kvc_way_choose(b->client, &ask), KVC_WAY_ROWS);
    ask.refused = ~0u;
    assert_int_equal(kvc_way_choose(b->client, &ask), KVC_WAY_COUNT); /* none: not counted */
    count_choices(n);
    assert_int_equal(n[KVC_WAY_ROWS][KVC_WHY_ONLY], 1);
    assert_int_equal(n[KVC_WAY_ROWS][KVC_WHY_REST], 1);
    assert_null(kvc_way_why_name(KVC_WHY_COUNT));
}

static void the_dear_way_is_looked_at_again(void **state)
{
    near_bench *b = *state;
    kvc_way_ask ask = {.n_rows = 1000, .row_bytes = 4096, .n_q = 1};
    uint32_t n[KVC_WAY_COUNT + 1] = {0};
    uint64_t whys[KVC_WAY_COUNT][KVC_WHY_COUNT];
    count_choices(whys);
    for (uint32_t i = 0; i < 640; i++)
        n[kvc_way_choose(b->client, &ask)]++;
    uint32_t less = n[KVC_WAY_ROWS] < n[KVC_WAY_NEAR] ? n[KVC_WAY_ROWS] : n[KVC_WAY_NEAR];
    assert_int_equal(less, 10);
    assert_int_equal(n[KVC_WAY_ROWS] + n[KVC_WAY_NEAR], 640);
    count_choices(whys);
    assert_int_equal(whys[KVC_WAY_ROWS][KVC_WHY_TRIED] + whys[KVC_WAY_NEAR][KVC_WHY_TRIED], 10);
    assert_int_equal(whys[KVC_WAY_ROWS][KVC_WHY_CHEAPEST] + whys[KVC_WAY_NEAR][KVC_WHY_CHEAPEST],
                     630);
}

static kvc_status attend(kvc_client *client, const kvc_attend_group *groups, uint32_t n,
                         int8_t *status)
{
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status st =
        kvc_attend(client, groups, n, status, NULL, kvc_deadline_ns(60000000000ull), &op);
    return st == KVC_OK ? kvc_op_wait(&op, 0) : st;
}

/* The client alone: what it refuses, what the server does, and a handle of another boot. */
static void the_call_reopens_and_refuses(void **state)
{
    near_bench *b = *state;
    static const uint32_t picks[3] = {1, 2, 3}, ranks[3] = {4, 5, 6};
    uint16_t q[128] = {0}, o[128]; /* as many as the refused ones ask for, too */
    float lse[4];
    int8_t status[3];
    kvc_digest digest, blocks[2] = {{{1}}, {{2}}};
    h_schema schema;
    kvc_context *context = NULL;
    h_schema_init(&schema, "calls", 1, 64, false); /* one head of 16, f16 */
    assert_ok(kvc_schema_register(b->client, &schema.schema, 0, &digest));
    assert_ok(kvc_context_open(b->client, &digest, blocks, 2, 0, 0, &context));
    const kvc_attend_group good = {.context = context,
                                   .n_picks = 3,
                                   .picks = picks,
                                   .ranks = ranks,
                                   .n_q = 1,
                                   .n_q_heads = 4,
                                   .dim = 16,
                                   .q_dtype = KVC_DTYPE_F16,
                                   .o_dtype = KVC_DTYPE_F16,
                                   .q = q,
                                   .o = o,
                                   .lse = lse};
    for (int boot = 0; boot < 2; boot++) {
        memset(o, 0xff, sizeof(o));
        assert_ok(attend(b->client, &good, 1, status));
        for (int i = 0; i < 3; i++)
            assert_int_equal(status[i], KVC_NOT_FOUND);
        assert_true(o[0] == 0 && lse[3] == -INFINITY);
        if (boot == 0) {
            h_server_stop(&b->h, false);
            h_server_start(&b->h);
        }
    }
    kvc_attend_group bad = good;
    bad.dim = 32;
    assert_int_equal(attend(b->client, &bad, 1, NULL), KVC_INVALID);
    assert_non_null(strstr(kvc_last_error(), "the queries have"));
    bad = good;
    bad.part = 10;
    assert_int_equal(attend(b->client, &bad, 1, status), KVC_INVALID);
    assert_int_equal(status[2], KVC_INVALID);
    bad = good;
    bad.n_q = KVC_MAX_ATTEND_QUERIES + 1;
    assert_int_equal(attend(b->client, &bad, 1, NULL), KVC_INVALID);
    bad = good;
    bad.q = NULL;
    assert_int_equal(attend(b->client, &bad, 1, NULL), KVC_INVALID);
    bad = good;
    bad.q_dtype = KVC_DTYPE_I8;
    assert_int_equal(attend(b->client, &bad, 1, NULL), KVC_INVALID);
    bad = good;
    bad.n_picks = KVC_MAX_PICKS + 1;
    assert_int_equal(attend(b->client, &bad, 1, NULL), KVC_INVALID);
    assert_int_equal(attend(b->client, &good, 0, NULL), KVC_INVALID);
    kvs_attender *attender = b->h.server->attender;
    atomic_fetch_add(&attender->n_calls, attender->max_calls);
    uint64_t before_ns = kvc_now_ns();
    assert_int_equal(attend(b->client, &good, 1, NULL), KVC_AGAIN); /* at once: there are rows */
    assert_true(kvc_now_ns() - before_ns < 15000000000ull);
    atomic_fetch_sub(&attender->n_calls, attender->max_calls);
    kvc_context_close(context);
}

static void bad_ways(void **state)
{
    near_bench *b = *state;
    rig r;
    kvw_worker *w = NULL;
    near_rig(&r, b, "esa", KVK_F32, "shm");
    assert_int_equal(kvw_open(&r.opts, &w), KVC_UNSUPPORTED);
    assert_non_null(strstr(kvw_last_error(), "another kind"));
    r.opts.way = "carrier pigeon";
    assert_int_equal(kvw_open(&r.opts, &w), KVC_INVALID);
    assert_non_null(strstr(kvw_last_error(), "way"));
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(near_equals_rows, open_near, close_near),
        cmocka_unit_test_setup_teardown(a_busy_server_sends_rows, open_near, close_near),
        cmocka_unit_test_setup_teardown(holes_are_dropped_alike, open_near, close_near),
        cmocka_unit_test_setup_teardown(a_hole_fails_a_step, open_near, close_near),
        cmocka_unit_test_setup_teardown(abandoned_steps_leave_nothing, open_near, close_near),
        cmocka_unit_test_setup_teardown(the_choice_is_learnt, open_near, close_near),
        cmocka_unit_test_setup_teardown(choices_are_counted_with_their_reasons, open_near,
                                        close_near),
        cmocka_unit_test_setup_teardown(the_dear_way_is_looked_at_again, open_near, close_near),
        cmocka_unit_test_setup_teardown(the_call_reopens_and_refuses, open_near, close_near),
        cmocka_unit_test_setup_teardown(bad_ways, open_near, close_near),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
