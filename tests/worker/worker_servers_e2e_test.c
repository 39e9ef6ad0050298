/*
 * worker_servers_e2e_test.c: a worker over three daemons and gRPC: the bits of one worker that
 * keeps everything, a prefix that another worker put, and a daemon that is killed under a sequence,
 * with either policy, and started again.
 */
#include "rig.h"

#include <signal.h>

#include "base/clock.h"
#include "daemon.h"
#include "internal.h"

#define STEP_NS 1000000000ull /* that a step waits once a daemon has gone */

enum { DAEMONS = 3, FIRST = 0 };

typedef struct e2e {
    char folder[DAEMONS][256], uri[DAEMONS][256];
    support_daemon daemon[DAEMONS];
    kvc_client *clients[DAEMONS];
} e2e;

static void start(e2e *e, uint32_t i)
{
    char lmdb[320];
    (void)snprintf(lmdb, sizeof(lmdb), "%s/values", e->folder[i]);
    if (e->uri[i][0] == '\0')
        support_daemon_address(e->uri[i], sizeof(e->uri[i]));
    const char *args[] = {"--listen", e->uri[i],      "--dram-bytes", "64MiB", "--lmdb-path",
                          lmdb,       "--lmdb-bytes", "256MiB",       NULL};
    assert_true(support_daemon_start(&e->daemon[i], e->folder[i], args));
}

static int open_e2e(void **state)
{
    e2e *e = calloc(1, sizeof(*e));
    assert_non_null(e);
    for (uint32_t i = 0; i < DAEMONS; i++) {
        support_make_folder(e->folder[i], sizeof(e->folder[i]));
        start(e, i);
        const kvc_client_opts opts = {.size_bytes = sizeof(opts),
                                      .uris = e->uri[i],
                                      .n_channels = 2,
                                      .connect_timeout_ns = SUPPORT_PATIENCE_NS};
        assert_ok(kvc_client_open(&opts, &e->clients[i]));
    }
    *state = e;
    return 0;
}

static int close_e2e(void **state)
{
    e2e *e = *state;
    for (uint32_t i = 0; i < DAEMONS; i++) {
        kvc_client_close(e->clients[i]);
        (void)support_daemon_stop(&e->daemon[i], SIGTERM);
        support_remove_folder(e->folder[i]);
    }
    free(e);
    return 0;
}

static void e2e_rig(rig *r, e2e *e, const char *revision)
{
    rig_init(r, "tokenselect", 1100);
    r->opts.revision = revision;
    r->opts.promise = KVC_PROMISE_DURABLE;
    r->opts.exact = 1;
    r->opts.k = 100;
    r->opts.fetch_timeout_ns = SUPPORT_PATIENCE_NS;
    r->opts.residency_slots = 120;
    r->opts.clients = e == NULL ? NULL : e->clients;
    r->opts.n_clients = e == NULL ? 0 : DAEMONS;
}

static kvw_seq *prefilled(rig *r, rig_record *record, uint32_t *reused_p)
{
    kvw_seq *seq = NULL;
    rig_record_init(record, r);
    assert_ok(kvw_seq_create(r->worker, r->tokens, r->n_tokens, &seq, reused_p));
    uint32_t half = *reused_p > 512 ? *reused_p : 512;
    rig_prefill(r, seq, *reused_p, half, rig_record_step, record);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    rig_prefill(r, seq, half, 1040, rig_record_step, record);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    return seq;
}

static kvw_server_stats server_stats(const kvw_seq *seq, uint32_t server)
{
    kvw_server_stats stats = {.size_bytes = sizeof(stats)};
    assert_ok(kvw_seq_server_stats(seq, server, &stats));
    return stats;
}

static kvw_stats stats_of(const kvw_seq *seq)
{
    kvw_stats stats = {.size_bytes = sizeof(stats)};
    assert_ok(kvw_seq_stats(seq, &stats));
    return stats;
}

/* All of a run that keeps everything, as the reference. */
static void run_alone(const char *revision, rig_record *record)
{
    rig r;
    uint32_t reused = 0;
    e2e_rig(&r, NULL, revision);
    rig_open(&r);
    kvw_seq *seq = prefilled(&r, record, &reused);
    rig_decode(&r, seq, 1040, 1100, rig_record_step, record);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A pass of one token whose steps may fail; the first failure. All layers are appended. */
static kvc_status try_pass(rig *r, kvw_seq *seq, uint32_t pos, void *out)
{
    kvc_status first = KVC_OK;
    assert_ok(kvw_tokens(seq, r->tokens + pos, 1));
    for (uint32_t layer = 0; layer < r->opts.n_layers; layer++) {
        void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, pos, 1);
        void *v = rig_bytes(r, r->v, rig_kv_width(r), layer, pos, 1);
        void *q = rig_bytes(r, r->q, rig_q_width(r), layer, pos, 1);
        kvc_status st = kvw_forward(seq, layer, q, k, v, 1, out, NULL);
        first = first == KVC_OK ? st : first;
        free(k);
        free(v);
        free(q);
    }
    return first;
}

/* FAIL: the step says who is away. The daemon comes back with its values, and the run ends with the
 * bits of the one that keeps everything, as does one over its prefix. */
static void a_daemon_is_killed_and_comes_back(void **state)
{
    e2e *e = *state;
    rig r;
    rig_record alone, shaken, warm;
    uint32_t reused = 0, pos = 1044;
    float out[64];
    kvc_status st = KVC_OK;
    run_alone("back", &alone);
    e2e_rig(&r, e, "back");
    rig_name_servers(&r);
    rig_open(&r);
    kvw_seq *seq = prefilled(&r, &shaken, &reused);
    rig_decode(&r, seq, 1040, pos, rig_record_step, &shaken);
    rig_record_equal(&r, &alone, &shaken, 0, pos);
    assert_true(stats_of(seq).misses > 200);
    for (uint32_t i = 0; i < DAEMONS; i++)
        assert_true(server_stats(seq, i).rows > 0);
    (void)support_daemon_stop(&e->daemon[FIRST], SIGKILL);
    r.worker->opts.fetch_timeout_ns = STEP_NS;
    while (pos < 1080 && st == KVC_OK)
        st = try_pass(&r, seq, pos++, out);
    assert_true(st == KVC_UNAVAILABLE || st == KVC_TIMED_OUT);
    char name[48];
    (void)snprintf(name, sizeof(name), "(server %s)", r.server_names[FIRST]);
    assert_non_null(strstr(kvw_last_error(), name));
    start(e, FIRST);
    for (uint32_t i = 0; st != KVC_OK && i < SUPPORT_PATIENCE_S; i++) {
        assert_ok(kvw_truncate(seq, --pos)); /* the same token again */
        st = try_pass(&r, seq, pos++, out);
    }
    assert_ok(st);
    kvw_seq_destroy(seq);
    kvw_close(r.worker);
    rig_open(&r);
    seq = prefilled(&r, &warm, &reused);
    assert_int_equal(reused, 1024);
    rig_decode(&r, seq, 1040, 1100, rig_record_step, &warm);
    rig_record_equal(&r, &alone, &warm, 1024, 1100);
    kvw_seq_destroy(seq);
    rig_record_fini(&alone);
    rig_record_fini(&shaken);
    rig_record_fini(&warm);
    rig_close(&r);
}

/* DROP: steps go on over what the others have, and take it back once it is there again. */
static void a_daemon_is_killed_and_done_without(void **state)
{
    e2e *e = *state;
    rig r;
    rig_record record;
    uint32_t reused = 0;
    float out[64];
    e2e_rig(&r, e, "without");
    r.opts.policy = KVW_DROP;
    rig_name_servers(&r);
    rig_open(&r);
    kvw_seq *seq = prefilled(&r, &record, &reused);
    (void)support_daemon_stop(&e->daemon[FIRST], SIGKILL);
    r.worker->opts.fetch_timeout_ns = STEP_NS;
    uint64_t missing = server_stats(seq, FIRST).rows_missing, others = server_stats(seq, 1).rows;
    for (uint32_t pos = 1040; pos < 1060; pos++)
        assert_ok(try_pass(&r, seq, pos, out));
    assert_true(server_stats(seq, FIRST).rows_missing > missing);
    assert_true(server_stats(seq, 1).rows > others);
    assert_true(stats_of(seq).rows_dropped >= server_stats(seq, FIRST).rows_missing - missing);
    start(e, FIRST);
    uint64_t rows = server_stats(seq, FIRST).rows;
    uint32_t pos = 1060;
    for (int i = 0; server_stats(seq, FIRST).rows == rows && i < 600; i++) {
        assert_ok(try_pass(&r, seq, pos, out));
        assert_ok(kvw_truncate(seq, pos)); /* the same token again */
        (void)usleep(100000);
    }
    assert_true(server_stats(seq, FIRST).rows > rows);
    kvw_seq_destroy(seq);
    rig_record_fini(&record);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_daemon_is_killed_and_comes_back, open_e2e, close_e2e),
        cmocka_unit_test_setup_teardown(a_daemon_is_killed_and_done_without, open_e2e, close_e2e),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
