/*
 * worker_e2e_test.c: workers over a real cachesvc and gRPC: the bits of `exact` from dram, from
 * LMDB after kill -9, and over a prefix that another worker put; and a sequence that lives through
 * a restart of its server.
 */
#include "rig.h"

#include <signal.h>

#include "base/clock.h"
#include "daemon.h"
#include "selector/selector.h"

typedef struct e2e {
    char folder[256], uri[256];
    support_daemon daemon;
    kvc_client *client;
} e2e;

static void start(e2e *e)
{
    char lmdb[320];
    (void)snprintf(lmdb, sizeof(lmdb), "%s/values", e->folder);
    if (e->uri[0] == '\0')
        support_daemon_address(e->uri, sizeof(e->uri));
    const char *args[] = {"--listen", e->uri,         "--dram-bytes", "128MiB", "--lmdb-path",
                          lmdb,       "--lmdb-bytes", "1GiB",         NULL};
    assert_true(support_daemon_start(&e->daemon, e->folder, args));
}

static void connect_client(e2e *e)
{
    const kvc_client_opts opts = {.size_bytes = sizeof(opts),
                                  .uris = e->uri,
                                  .n_channels = 2,
                                  .connect_timeout_ns = SUPPORT_PATIENCE_NS};
    assert_ok(kvc_client_open(&opts, &e->client));
}

static void kill_and_restart(e2e *e)
{
    (void)support_daemon_stop(&e->daemon, SIGKILL);
    start(e);
}

static int open_e2e(void **state)
{
    e2e *e = calloc(1, sizeof(*e));
    assert_non_null(e);
    support_make_folder(e->folder, sizeof(e->folder));
    start(e);
    connect_client(e);
    *state = e;
    return 0;
}

static int close_e2e(void **state)
{
    e2e *e = *state;
    kvc_client_close(e->client);
    (void)support_daemon_stop(&e->daemon, SIGTERM);
    support_remove_folder(e->folder);
    free(e);
    return 0;
}

static void e2e_rig(rig *r, const char *selector, kvw_index_kind index, kvc_client *client)
{
    rig_init(r, selector, 1500);
    r->opts.client = client;
    r->opts.promise = KVC_PROMISE_DURABLE;
    r->opts.exact = 1;
    r->opts.dtype = KVK_BF16;
    r->opts.head_dim = 64;
    r->opts.n_q_heads = 8;
    r->opts.n_kv_heads = 4;
    r->opts.k = 100;
    r->opts.index = index;
    r->opts.residency_slots = 120;
    if (index != KVW_INDEX_EXACT)
        rig_project(r, 32);
}

static kvw_stats run(rig *r, rig_record *record, uint32_t *reused_p)
{
    kvw_seq *seq = NULL;
    kvw_stats stats = {.size_bytes = sizeof(stats)};
    rig_record_init(record, r);
    assert_ok(kvw_seq_create(r->worker, r->tokens, r->n_tokens, &seq, reused_p));
    rig_prefill(r, seq, *reused_p, 1480, rig_record_step, record);
    rig_decode(r, seq, 1480, 1500, rig_record_step, record);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    assert_ok(kvw_seq_stats(seq, &stats));
    kvw_seq_destroy(seq);
    return stats;
}

static void bits_survive_a_kill_and_a_new_worker(void **state)
{
    e2e *e = *state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        for (uint32_t kind = KVW_INDEX_EXACT; kind <= KVW_INDEX_COMPRESSED; kind++) {
            rig r;
            rig_record alone, cold, warm;
            uint32_t reused = 0;
            e2e_rig(&r, kvw_selector_at(i)->name, (kvw_index_kind)kind, NULL);
            rig_open(&r);
            (void)run(&r, &alone, &reused);
            kvw_close(r.worker);
            r.opts.client = e->client;
            rig_open(&r);
            kvw_stats stats = run(&r, &cold, &reused);
            assert_int_equal(reused, 0);
            assert_true(stats.misses > 1000);
            rig_record_equal(&r, &alone, &cold, 0, 1500);
            kvw_close(r.worker);
            kvc_client_close(e->client);
            kill_and_restart(e);
            connect_client(e);
            r.opts.client = e->client;
            rig_open(&r);
            stats = run(&r, &warm, &reused);
            assert_int_equal(reused, 1472);
            assert_true(stats.rows_lmdb > 0);
            assert_int_equal(stats.index_rows_rebuilt, kind == KVW_INDEX_EXACT ? 2 * 1472 : 0);
            rig_record_equal(&r, &cold, &warm, 1472, 1500);
            rig_record_fini(&alone);
            rig_record_fini(&cold);
            rig_record_fini(&warm);
            rig_close(&r);
        }
    }
}

/* The server dies under a sequence: DURABLE rows are there again, the context is reopened. */
static void a_sequence_outlives_its_server(void **state)
{
    e2e *e = *state;
    rig r;
    rig_record calm, shaken;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    e2e_rig(&r, "tokenselect", KVW_INDEX_EXACT, e->client);
    r.seed = 99;
    rig_open(&r);
    (void)run(&r, &calm, &reused);
    rig_record_init(&shaken, &r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 960, rig_record_step, &shaken);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    kill_and_restart(e);
    rig_prefill(&r, seq, 960, 1480, rig_record_step, &shaken);
    rig_decode(&r, seq, 1480, 1500, rig_record_step, &shaken);
    rig_record_equal(&r, &calm, &shaken, 0, 1500);
    kvw_seq_destroy(seq);
    rig_record_fini(&calm);
    rig_record_fini(&shaken);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(bits_survive_a_kill_and_a_new_worker, open_e2e, close_e2e),
        cmocka_unit_test_setup_teardown(a_sequence_outlives_its_server, open_e2e, close_e2e),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
