/*
 * worker_rdma_test.c: a whole worker over rdma://, bit for bit beside one that keeps everything:
 * rows that the server writes to residency slots, prefixes, sums, attention near the data; and what
 * streams into a region of the client's own.
 *
 * With KVASIR_RDMA_ADDRESS the server is a cachesvc process on the device of that address, which is
 * killed and started again, too; else one in this process, on verbs without a device. --device:
 * with a device or not at all.
 */
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "bench.h"
#include "daemon.h"
#include "fake_verbs.h"
#include "internal.h"

#define PORT 7897
#ifdef KVASIR_LMDB
#define HAS_DISK true
#else
#define HAS_DISK false
#endif

typedef struct place {
    const char *address; /* of the device; NULL: there is none, and the server is here */
    h_server h;
    support_daemon daemon;
    char folder[256], uri[300];
    kvc_client *client;
} place;

static void start_daemon(place *p)
{
    char lmdb[300];
    (void)snprintf(lmdb, sizeof(lmdb), "%s/values", p->folder);
    (void)snprintf(p->uri, sizeof(p->uri), "rdma://%s:%d", p->address, PORT);
    const char *args[] = {"--listen", p->uri,         "--dram-bytes", "64MiB", "--lmdb-path",
                          lmdb,       "--lmdb-bytes", "256MiB",       NULL};
    if (!HAS_DISK)
        args[4] = NULL;
    assert_true(support_daemon_start(&p->daemon, p->folder, args));
}

static void connect_client(place *p, bool sums)
{
    const kvc_client_opts opts = {.size_bytes = sizeof(opts),
                                  .uris = p->uri,
                                  .connect_timeout_ns = SUPPORT_PATIENCE_NS,
                                  .default_timeout_ns = SUPPORT_PATIENCE_NS,
                                  .n_channels = 2,
                                  .sums = sums,
                                  .region_bytes = 64u << 20};
    assert_ok(kvc_client_open(&opts, &p->client));
}

static int open_place(void **state)
{
    place *p = calloc(1, sizeof(*p));
    assert_non_null(p);
    *state = p;
    p->address = getenv("KVASIR_RDMA_ADDRESS");
    if (p->address != NULL) {
        support_make_folder(p->folder, sizeof(p->folder));
        start_daemon(p);
    } else {
        fake_verbs_use(NULL);
        h_listen = "rdma://127.0.0.1:0";
        h_server_init(&p->h);
        h_server_start(&p->h);
        (void)snprintf(p->uri, sizeof(p->uri), "%s", kvs_server_uri(p->h.server, 0));
    }
    connect_client(p, false);
    return 0;
}

static int close_place(void **state)
{
    place *p = *state;
    kvc_client_close(p->client);
    if (p->address != NULL) {
        (void)support_daemon_stop(&p->daemon, SIGTERM);
        support_remove_folder(p->folder);
    } else {
        h_server_fini(&p->h);
        assert_true(fake_verbs_all_gone());
    }
    free(p);
    return 0;
}

static void place_rig(rig *r, const place *p, const char *selector, const char *revision)
{
    store_rig(r, selector, KVW_INDEX_EXACT, p->client);
    r->opts.revision = revision;
    r->opts.fetch_timeout_ns = SUPPORT_PATIENCE_NS;
    r->opts.promise = p->address != NULL && HAS_DISK ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY;
    r->opts.way = "rdma";
}

/* What a worker without a store makes of the same tokens. */
static void run_alone(rig *r, rig_record *record)
{
    kvw_stats stats;
    uint32_t reused = 0;
    kvc_client *client = r->opts.client;
    r->opts.client = NULL;
    rig_open(r);
    run(r, record, 0, &reused, &stats);
    assert_int_equal(stats.misses, 0);
    kvw_close(r->worker);
    r->opts.client = client;
}

/* Rows lie in their slots without a copy here: all but those of the first uses, when nothing is
 * registered yet. */
static void cold_and_warm(place *p, const char *selector, const char *revision)
{
    rig r;
    rig_record alone, cold, warm;
    kvw_stats stats;
    uint32_t reused = 0;
    place_rig(&r, p, selector, revision);
    run_alone(&r, &alone);
    rig_open(&r);
    uint64_t placed = kvc_metric_get(KVC_M_rdma_placed_bytes);
    uint64_t asked = kvc_metric_get(KVC_M_way_rdma_requests);
    run(&r, &cold, 0, &reused, &stats);
    assert_int_equal(reused, 0);
    assert_int_equal(stats.blocks_put, 10);
    assert_true(stats.misses > 1000);
    rig_record_equal(&r, &alone, &cold, 0, 700);
    assert_true(kvc_metric_get(KVC_M_way_rdma_requests) > asked);
    uint64_t give_up_ns = kvc_deadline_ns(SUPPORT_PATIENCE_NS);
    do { /* a sequence's slots may be registered only once it is over, on a busy machine */
        run(&r, &warm, 700, &reused, &stats);
        assert_int_equal(reused, 640);
        rig_record_equal(&r, &alone, &warm, 640, 700);
        rig_record_fini(&warm);
    } while (kvc_metric_get(KVC_M_rdma_placed_bytes) == placed && !kvc_expired(give_up_ns));
    assert_true(kvc_metric_get(KVC_M_rdma_placed_bytes) > placed);
    rig_record_fini(&alone);
    rig_record_fini(&cold);
    rig_close(&r);
}

static void rows_have_the_bits_of_a_worker_alone(void **state)
{
    place *p = *state;
    cold_and_warm(p, "esa", "plain");
    cold_and_warm(p, "tokenselect", "plain");
}

static void sums_change_no_bit(void **state)
{
    place *p = *state;
    kvc_client_close(p->client);
    connect_client(p, true);
    assert_true(kvc_client_sums(p->client));
    uint64_t wrong = kvc_metric_get(KVC_M_rdma_sums_wrong);
    cold_and_warm(p, "tokenselect", "summed");
    assert_int_equal(kvc_metric_get(KVC_M_rdma_sums_wrong), wrong);
}

/* ---- what streams, into a region of its own ---- */

enum { BLOCKS = 9, ALL_ROWS = BLOCKS * 64 };

typedef struct taken {
    kvw_seq *seq;
    kvc_context *context;
    kvc_region *region;
    uint8_t *bytes; /* [ALL_ROWS, row_bytes] */
    kvc_digest digests[BLOCKS];
    int8_t status[ALL_ROWS];
} taken;

typedef kvc_status fetch_fn(kvc_client *client, const kvc_pick_group *groups, uint32_t n_groups,
                            const kvc_region *dst, int8_t *status, kvc_fetch_info *info_p,
                            uint64_t deadline_ns, kvc_op *op);

/* Rows of layer 0; NULL: as whole values. */
static void take(const place *p, taken *t, fetch_fn *fetch)
{
    const kvw_worker *w = t->seq->worker;
    uint32_t picks[ALL_ROWS], row_bytes = (uint32_t)w->row_bytes;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < ALL_ROWS; i++)
        picks[i] = i;
    memset(t->bytes, 0xcd, (size_t)ALL_ROWS * row_bytes);
    const kvc_pick_group group = {.context = t->context,
                                  .part = w->kv_parts[0],
                                  .row_bytes = row_bytes,
                                  .n_picks = ALL_ROWS,
                                  .picks = picks};
    const kvc_block_part part = {
        .part = w->kv_parts[0], .value_bytes = 64 * row_bytes, .stride_bytes = 64u * row_bytes};
    if (fetch != NULL)
        assert_ok(fetch(p->client, &group, 1, t->region, t->status, NULL, 0, &op));
    else
        assert_ok(kvc_fetch_blocks(p->client, &w->schema, t->digests, BLOCKS, &part, 1, t->region,
                                   t->status, NULL, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    for (uint32_t i = 0; i < (fetch != NULL ? (uint32_t)ALL_ROWS : (uint32_t)BLOCKS); i++)
        assert_int_equal(t->status[i], KVC_OK);
}

/* Until it comes without a copy; the bytes are those of want all the time. */
static void take_placed(const place *p, taken *t, fetch_fn *fetch, const uint8_t *want)
{
    size_t bytes = (size_t)ALL_ROWS * t->seq->worker->row_bytes;
    uint64_t give_up_ns = kvc_deadline_ns(SUPPORT_PATIENCE_NS), placed = 0;
    while (placed < bytes && !kvc_expired(give_up_ns)) {
        uint64_t before = kvc_metric_get(KVC_M_rdma_placed_bytes);
        take(p, t, fetch);
        assert_memory_equal(t->bytes, want, bytes);
        placed = kvc_metric_get(KVC_M_rdma_placed_bytes) - before;
    }
    assert_int_equal(placed, bytes);
}

static void what_streams_lies_in_its_place(void **state)
{
    place *p = *state;
    rig r;
    taken t = {0};
    uint32_t reused = 0;
    place_rig(&r, p, "tokenselect", "streams");
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &t.seq, &reused));
    rig_prefill(&r, t.seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(t.seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    size_t bytes = (size_t)ALL_ROWS * r.worker->row_bytes;
    t.bytes = malloc(bytes);
    uint8_t *want = malloc(bytes);
    assert_true(t.bytes != NULL && want != NULL);
    for (uint32_t b = 0; b < BLOCKS; b++)
        t.digests[b] = t.seq->blocks[b].digest;
    const kvc_region_desc desc = {
        .size_bytes = sizeof(desc), .base = t.bytes, .len_bytes = bytes, .kind = KVC_MEMORY_HOST};
    assert_ok(kvc_region_register(p->client, &desc, &t.region));
    assert_ok(kvc_context_open(p->client, &r.worker->schema, t.digests, BLOCKS, 0, 0, &t.context));
    take(p, &t, kvc_fetch); /* nothing is registered yet: they are copied */
    memcpy(want, t.bytes, bytes);
    take_placed(p, &t, kvc_fetch_stream, want);
    take_placed(p, &t, NULL, want);
    kvc_context_close(t.context);
    assert_ok(kvc_region_deregister(p->client, t.region));
    kvw_seq_destroy(t.seq);
    rig_close(&r);
    free(t.bytes);
    free(want);
}

/* The server attends: the outputs differ by no more than merging partials may. */
static void near_data_over_rdma(void **state)
{
    place *p = *state;
    rig r;
    rig_record alone, near;
    kvw_stats stats;
    uint32_t reused = 0;
    place_rig(&r, p, "tokenselect", "near");
    r.opts.exact = 0;
    r.opts.way = "near";
    run_alone(&r, &alone);
    rig_open(&r);
    run(&r, &near, 0, &reused, &stats);
    assert_true(stats.rows_near > 100);
    double diff = rig_record_diff(&r, &alone, &near, 0, 700);
    assert_true(diff < near_bound(&r));
    rig_record_fini(&alone);
    rig_record_fini(&near);
    rig_close(&r);
}

/* Killed and started again over what it has on disk: another worker finds the prefix. */
static void a_killed_server_comes_back(void **state)
{
    place *p = *state;
    rig r;
    rig_record cold, warm;
    kvw_stats stats;
    uint32_t reused = 0;
    if (p->address == NULL || !HAS_DISK)
        skip(); /* a process is needed to be killed, and a disk to come back from */
    place_rig(&r, p, "tokenselect", "killed");
    rig_open(&r);
    run(&r, &cold, 0, &reused, &stats);
    kvw_close(r.worker);
    kvc_client_close(p->client);
    (void)support_daemon_stop(&p->daemon, SIGKILL);
    start_daemon(p);
    connect_client(p, false);
    r.opts.client = p->client;
    rig_open(&r);
    run(&r, &warm, 700, &reused, &stats);
    assert_int_equal(reused, 640);
    assert_true(stats.rows_lmdb > 0);
    rig_record_equal(&r, &cold, &warm, 640, 700);
    rig_record_fini(&cold);
    rig_record_fini(&warm);
    rig_close(&r);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(rows_have_the_bits_of_a_worker_alone, open_place,
                                        close_place),
        cmocka_unit_test_setup_teardown(sums_change_no_bit, open_place, close_place),
        cmocka_unit_test_setup_teardown(what_streams_lies_in_its_place, open_place, close_place),
        cmocka_unit_test_setup_teardown(near_data_over_rdma, open_place, close_place),
        cmocka_unit_test_setup_teardown(a_killed_server_comes_back, open_place, close_place),
    };
    if (argc > 1 && strcmp(argv[1], "--device") == 0 && getenv("KVASIR_RDMA_ADDRESS") == NULL) {
        (void)puts("SKIPPED: no RDMA device (KVASIR_RDMA_ADDRESS)");
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
