/*
 * client_e2e_test.c: the C client against a real cachesvc: every call over TCP and unix sockets,
 * rows bit-equal from dram and from lmdb, restarts and kill -9 in mid-use.
 */
#include "store.h"

#include <signal.h>
#include <stdatomic.h>

#include "base/thread.h"

/* Whole values of 16 blocks that are there and of 16 that are not, and their rows as a stream. */
static void check_streams(store *s, kvc_client *client, kvc_context *context)
{
    enum { N = 32, THERE = 16 };
    static uint32_t picks[N * STORE_BLOCK_TOKENS];
    uint32_t len = STORE_BLOCK_TOKENS * store_row_bytes[0];
    uint8_t *bytes = malloc((size_t)N * len);
    int8_t status[N];
    uint8_t tiers[N];
    kvc_op op;
    kvc_region *region;
    kvc_region_desc desc = {sizeof(desc), bytes, (size_t)N * len, KVC_MEMORY_HOST, 0, NULL};
    kvc_block_part part = {.value_bytes = len, .stride_bytes = len};
    kvc_op_init(&op, NULL, NULL);
    assert_non_null(bytes);
    assert_ok(kvc_region_register(client, &desc, &region));
    for (int as_rows = 0; as_rows < 2; as_rows++) {
        memset(bytes, 0, (size_t)N * len);
        for (uint32_t i = 0; i < N * STORE_BLOCK_TOKENS; i++)
            picks[i] = i;
        kvc_pick_group group = {.context = context,
                                .row_bytes = store_row_bytes[0],
                                .n_picks = N * STORE_BLOCK_TOKENS,
                                .picks = picks};
        kvc_fetch_info info = {0};
        if (as_rows)
            assert_ok(kvc_fetch_stream(client, &group, 1, region, NULL, &info, 0, &op));
        else
            assert_ok(kvc_fetch_blocks(client, &s->schema, s->digests, N, &part, 1, region, status,
                                       tiers, 0, &op));
        assert_ok(kvc_op_wait(&op, 0));
        for (uint32_t i = 0; !as_rows && i < N; i++)
            assert_int_equal(status[i], i < THERE ? KVC_OK : KVC_NOT_FOUND);
        if (as_rows)
            assert_int_equal(info.rows_missing, (N - THERE) * STORE_BLOCK_TOKENS);
        for (size_t b = 0; b < (size_t)N * len; b++) {
            uint32_t token = (uint32_t)(b / store_row_bytes[0]);
            uint8_t wanted = store_byte(0, token, (uint32_t)(b % store_row_bytes[0]));
            if (bytes[b] != (token < THERE * STORE_BLOCK_TOKENS ? wanted : 0))
                fail_msg("byte %zu is another", b);
        }
    }
    assert_ok(kvc_region_deregister(client, region));
    free(bytes);
}

static void check_calls(store *s, const char *uri)
{
    kvc_client *first = s->client;
    s->client = store_connect(uri);
    kvc_context *context = store_context(s, s->client, 8);
    assert_int_equal(kvc_context_blocks(context), 8);
    store_expect(s, context, 8 * STORE_BLOCK_TOKENS, NULL);
    assert_ok(kvc_context_extend(context, s->digests + 8, 8, 0));
    store_expect(s, context, 16 * STORE_BLOCK_TOKENS, NULL);
    /* Blocks that nobody put: their rows are missing, the others are right. */
    assert_ok(kvc_context_extend(context, s->digests + 16, 16, 0));
    kvc_fetch_info info = {0};
    bool wrong = false;
    assert_ok(store_check(s->client, context, 0, 2048, 32 * STORE_BLOCK_TOKENS, 5, &info, &wrong));
    assert_false(wrong);
    assert_true(info.rows_missing > 800 && info.rows_missing < 1200);
    assert_int_equal(info.rows_missing + info.rows_dram + info.rows_lmdb, 2048);
    /* Positions beyond the context are missing rows too. */
    assert_ok(store_check(s->client, context, 1, 512, 64 * STORE_BLOCK_TOKENS, 6, &info, &wrong));
    assert_false(wrong);
    assert_true(info.rows_missing > 256);
    check_streams(s, s->client, context);
    kvc_context_close(context);
    kvc_client_close(s->client);
    s->client = first;
}

static void test_every_call(void **state)
{
    (void)state;
    store s;
    store_open(&s, "64MiB", true);
    assert_int_equal(store_match(&s, 16), 0);
    assert_int_equal(store_put(&s, 0, 16, KVC_PROMISE_MEMORY), 16 * STORE_PARTS);
    assert_int_equal(store_put(&s, 0, 16, KVC_PROMISE_MEMORY), 0); /* all EXISTS */
    assert_int_equal(store_match(&s, 32), 16);
    check_calls(&s, s.tcp_uri);
    check_calls(&s, s.unix_uri);
    assert_int_equal(store_counter(&s, "put_values"), 16 * STORE_PARTS);
    assert_int_equal(store_counter(&s, "contexts_open"), 0);
    assert_int_equal(store_counter(&s, "corrupt_values"), 0);
    store_close(&s);
}

/* A context many times larger than dram: its rows come from lmdb, bit for bit. */
static void test_tiny_dram(void **state)
{
    (void)state;
    store s;
    store_open(&s, "4MiB", true);
    assert_int_equal(store_put(&s, 0, 128, KVC_PROMISE_DURABLE), 128 * STORE_PARTS);
    assert_int_equal(store_match(&s, 128), 128);
    kvc_context *context = store_context(&s, s.client, 128);
    kvc_fetch_info info = {0};
    store_expect(&s, context, 128 * STORE_BLOCK_TOKENS, &info);
    assert_true(info.rows_lmdb > 0);
    kvc_server_stats *stats = NULL;
    assert_ok(kvc_stats(s.client, 0, &stats));
    for (uint32_t i = 0; i < stats->n_tiers; i++)
        assert_true(stats->tiers[i].used_bytes <= stats->tiers[i].capacity_bytes);
    kvc_stats_free(stats);
    kvc_context_close(context);
    store_close(&s);
}

/* MEMORY puts beyond dram reach lmdb behind the caller's back. */
static void test_write_behind(void **state)
{
    (void)state;
    store s;
    store_open(&s, "8MiB", true);
    assert_int_equal(store_put(&s, 0, 64, KVC_PROMISE_MEMORY), 64 * STORE_PARTS);
    kvc_context *context = store_context(&s, s.client, 64);
    kvc_fetch_info info = {0};
    store_expect(&s, context, 64 * STORE_BLOCK_TOKENS, &info);
    assert_true(info.rows_lmdb > 0);
    kvc_context_close(context);
    store_close(&s);
}

static void test_restart(void **state)
{
    (void)state;
    store s;
    store_open(&s, "64MiB", true);
    store_put(&s, 0, 16, KVC_PROMISE_MEMORY);
    kvc_context *context = store_context(&s, s.client, 16);
    store_expect(&s, context, 16 * STORE_BLOCK_TOKENS, NULL);
    store_end(&s, SIGTERM); /* a clean stop writes what is in memory to lmdb */
    store_start(&s);
    store_expect(&s, context, 16 * STORE_BLOCK_TOKENS, NULL);
    assert_ok(kvc_context_extend(context, s.digests + 16, 4, 0));
    assert_int_equal(store_match(&s, 16), 16);
    kvc_context_close(context);
    store_close(&s);
}

static void test_kill(void **state)
{
    (void)state;
    store s;
    store_open(&s, "64MiB", true);
    for (uint32_t round = 0; round < 3; round++) {
        assert_int_equal(store_put(&s, round * 16, 16, KVC_PROMISE_DURABLE), 16 * STORE_PARTS);
        store_end(&s, SIGKILL); /* right after the acknowledgement */
        store_start(&s);
        uint32_t n = (round + 1) * 16;
        assert_int_equal(store_match(&s, n), n);
        kvc_context *context = store_context(&s, s.client, n);
        kvc_fetch_info info = {0};
        store_expect(&s, context, n * STORE_BLOCK_TOKENS, &info);
        assert_true(info.rows_lmdb > 0);
        kvc_context_close(context);
    }
    store_close(&s);
}

/* Without lmdb a restart loses the values, says so, and needs no new registration. */
static void test_restart_without_lmdb(void **state)
{
    (void)state;
    store s;
    store_open(&s, "64MiB", false);
    store_put(&s, 0, 16, KVC_PROMISE_MEMORY);
    kvc_context *context = store_context(&s, s.client, 16);
    store_expect(&s, context, 16 * STORE_BLOCK_TOKENS, NULL);
    store_end(&s, SIGKILL);
    store_start(&s);
    kvc_fetch_info info = {0};
    bool wrong = false;
    assert_ok(store_check(s.client, context, 0, 512, 16 * STORE_BLOCK_TOKENS, 1, &info, &wrong));
    assert_false(wrong);
    assert_int_equal(info.rows_missing, 512);
    assert_int_equal(store_put(&s, 0, 16, KVC_PROMISE_MEMORY), 16 * STORE_PARTS);
    store_expect(&s, context, 16 * STORE_BLOCK_TOKENS, NULL);
    kvc_context_close(context);
    store_close(&s);
}

typedef struct reader {
    store *s;
    kvc_context *context;
    atomic_bool stop;
    atomic_uint fetches, failures;
    kvc_thread thread;
} reader;

static void reader_main(void *arg)
{
    reader *r = arg;
    for (uint64_t seed = 1; !atomic_load(&r->stop); seed++) {
        kvc_fetch_info info = {0};
        bool wrong = false;
        kvc_status status = store_check(r->s->client, r->context, 1, 500, 16 * STORE_BLOCK_TOKENS,
                                        seed, &info, &wrong);
        atomic_fetch_add(&r->fetches, 1);
        if (status == KVC_OK && !wrong && info.rows_missing == 0)
            continue;
        print_error("a fetch: %s (%s), %s, %u rows missing\n", kvc_status_name(status),
                    kvc_last_error(), wrong ? "wrong" : "right", info.rows_missing);
        atomic_fetch_add(&r->failures, 1);
    }
}

/* Readers do not notice that the server is stopped, killed and started again. */
static void test_restarts_under_load(void **state)
{
    (void)state;
    enum { READERS = 3, RESTARTS = 4 };
    store s;
    store_open(&s, "64MiB", true);
    store_put(&s, 0, 16, KVC_PROMISE_DURABLE);
    kvc_context *context = store_context(&s, s.client, 16);
    static reader readers[READERS];
    memset(readers, 0, sizeof(readers));
    for (int i = 0; i < READERS; i++) {
        readers[i].s = &s;
        readers[i].context = context;
        assert_ok(kvc_thread_start(&readers[i].thread, "reader", reader_main, &readers[i]));
    }
    for (int i = 0; i < RESTARTS; i++) {
        usleep(150000);
        store_end(&s, i % 2 ? SIGKILL : SIGTERM);
        usleep(50000);
        store_start(&s);
    }
    for (int i = 0; i < READERS; i++) { /* each goes on after the last start */
        uint32_t before = atomic_load(&readers[i].fetches);
        support_wait_for(atomic_load(&readers[i].fetches) >= before + 5);
    }
    for (int i = 0; i < READERS; i++) {
        atomic_store(&readers[i].stop, true);
        kvc_thread_join(&readers[i].thread);
        assert_int_equal(atomic_load(&readers[i].failures), 0);
    }
    kvc_context_close(context);
    store_close(&s);
}

/* Puts whose bytes are sent only where they are wanted, also after a crash that the client has not
 * heard of. */
static void test_put_streams(void **state)
{
    (void)state;
    store s;
    store_open(&s, "64MiB", true);
    s.streams = true;
    assert_int_equal(store_put(&s, 0, 40, KVC_PROMISE_MEMORY), 40 * STORE_PARTS);
    assert_int_equal(store_counter(&s, "put_offers"), 40 * STORE_PARTS);
    kvc_context *context = store_context(&s, s.client, 40);
    store_expect(&s, context, 40 * STORE_BLOCK_TOKENS, NULL);
    assert_int_equal(store_put(&s, 0, 40, KVC_PROMISE_MEMORY), 0);
    assert_int_equal(store_counter(&s, "put_values"), 40 * STORE_PARTS);
    assert_int_equal(store_put(&s, 20, 40, KVC_PROMISE_DURABLE), 20 * STORE_PARTS);
    store_end(&s, SIGKILL);
    store_start(&s);
    assert_int_equal(store_put(&s, 20, 40, KVC_PROMISE_DURABLE), 0);
    assert_int_equal(store_put(&s, 60, 40, KVC_PROMISE_DURABLE), 40 * STORE_PARTS);
    kvc_context *other = store_context(&s, s.client, 60);
    (void)store_put(&s, 0, 20, KVC_PROMISE_MEMORY); /* what the crash took */
    store_expect(&s, other, 60 * STORE_BLOCK_TOKENS, NULL);
    kvc_context_close(other);
    kvc_context_close(context);
    store_close(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_call),
        cmocka_unit_test(test_put_streams),
        cmocka_unit_test(test_tiny_dram),
        cmocka_unit_test(test_write_behind),
        cmocka_unit_test(test_restart),
        cmocka_unit_test(test_kill),
        cmocka_unit_test(test_restart_without_lmdb),
        cmocka_unit_test(test_restarts_under_load),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
