/*
 * client_test.c: what the client does while the server is well: splitting, striping, scattering,
 * statuses, contexts, bounds, arguments that it refuses.
 */
#include "fixture.h"

#include <stdatomic.h>

static void test_open_errors(void **state)
{
    (void)state;
    kvc_client *client = NULL;
    kvc_client_opts opts = {.size_bytes = sizeof(opts), .connect_timeout_ns = 50 * MS};
    opts.uris = "";
    assert_status(kvc_client_open(&opts, &client), KVC_INVALID);
    opts.uris = "nonsense";
    assert_status(kvc_client_open(&opts, &client), KVC_INVALID);
    opts.uris = "carrier-pigeon://x";
    assert_status(kvc_client_open(&opts, &client), KVC_UNSUPPORTED);
    assert_non_null(strstr(kvc_last_error(), "carrier-pigeon"));
    opts.uris = "inproc://nobody-here?sums=1"; /* nothing of it leaves the process */
    assert_status(kvc_client_open(&opts, &client), KVC_INVALID);
    assert_non_null(strstr(kvc_last_error(), "sums=1"));
    opts.uris = "rdma://127.0.0.1:1?sums=yes";
    assert_status(kvc_client_open(&opts, &client), KVC_INVALID);
    assert_non_null(strstr(kvc_last_error(), "sums=yes"));
    opts.uris = "inproc://nobody-here";
    kvc_status status = kvc_client_open(&opts, &client); /* and it comes back */
    assert_true(status == KVC_UNAVAILABLE || status == KVC_TIMED_OUT);
    assert_null(client);
    kvc_client_close(NULL);
}

/* As a program that was built with the first header opens one. */
static void test_open_older(void **state)
{
    (void)state;
    fixture f = {0};
    fake_init(&f.fake);
    fake_listen(&f.fake, FIXTURE_URI);
    kvc_client_opts opts;
    memset(&opts, 0xa5, sizeof(opts));
    opts.uris = FIXTURE_URI;
    opts.connect_timeout_ns = opts.default_timeout_ns = PATIENCE_MS * MS;
    opts.n_channels = 2;
    opts.size_bytes = sizeof(opts) + sizeof(uint64_t);
    assert_status(kvc_client_open(&opts, &f.client), KVC_INVALID);
    opts.size_bytes = offsetof(kvc_client_opts, sums);
    assert_ok(kvc_client_open(&opts, &f.client));
    kvc_map_opts map;
    memset(&map, 0, sizeof(map));
    map.size_bytes = sizeof(map) + sizeof(uint64_t);
    assert_status(kvc_client_map_contexts(f.client, &map), KVC_INVALID);
    map.size_bytes = offsetof(kvc_map_opts, keep_ns);
    assert_ok(kvc_client_map_contexts(f.client, &map));
    fixture_stop(&f);
}

static void test_second_uri(void **state)
{
    (void)state;
    fixture f = {0};
    fake_init(&f.fake);
    fake_listen(&f.fake, FIXTURE_URI);
    kvc_client_opts opts = {.size_bytes = sizeof(opts),
                            .connect_timeout_ns = PATIENCE_MS * MS,
                            .uris = "inproc://nobody-here, " FIXTURE_URI};
    assert_ok(kvc_client_open(&opts, &f.client));
    kvc_context *context = fixture_context(&f, 4);
    fixture_fetch_check(&f, context, 0, 10, 0, 1);
    kvc_context_close(context);
    fixture_stop(&f);
}

static void test_limits_are_clamped(void **state)
{
    (void)state;
    fixture f = {0};
    fake_init(&f.fake);
    f.fake.limits.max_picks = UINT32_MAX;
    f.fake.limits.max_digests = 0;
    f.fake.limits.max_groups = 7;
    fixture_open(&f);
    assert_int_equal(kvc_client_limits(f.client)->max_picks, KVC_MAX_PICKS);
    assert_int_equal(kvc_client_limits(f.client)->max_digests, KVC_MAX_DIGESTS);
    assert_int_equal(kvc_client_limits(f.client)->max_groups, 7);
    fixture_stop(&f);
}

static void test_fetch_sizes(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 16);
    static const uint32_t sizes[] = {0, 1, 2, 63, 64, 65, 255, 256, 257, 2048};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        fixture_fetch_check(&f, context, 0, sizes[i], 5, 3);
    fixture_fetch_check(&f, context, 6, 65536, 0, 1); /* 64-byte rows */
    assert_true(f.fake.max_payload_bytes <= KVC_MAX_VALUE_BYTES);
    kvc_context_close(context);
    fixture_stop(&f);
}

/* Each limit of the server, in turn, so small that it decides the cut. */
static void test_fetch_small_limits(void **state)
{
    (void)state;
    for (int which = 0; which < 3; which++) {
        fixture f = {0};
        fake_init(&f.fake);
        if (which == 0)
            f.fake.limits.max_picks = 7;
        else if (which == 1)
            f.fake.limits.max_message_bytes = 4096 * 3 + 100;
        else
            f.fake.limits.max_groups = 1;
        fixture_open(&f);
        kvc_context *context = fixture_context(&f, 16);
        fixture_fetch_check(&f, context, 0, 300, 1, 1);
        if (which == 0)
            assert_true(f.fake.max_picks <= 7);
        if (which == 1)
            assert_true(f.fake.max_payload_bytes <= 4096 * 3);
        kvc_context_close(context);
        fixture_stop(&f);
    }
}

/* Groups of several parts and contexts in one op; missing rows are left alone and told. */
static void check_groups(uint32_t max_groups)
{
    enum { N = 700, GROUPS = 5 };
    fixture f = {0};
    fake_init(&f.fake);
    f.fake.missing_every = 5;
    f.fake.limits.max_groups = max_groups;
    fixture_open(&f);
    kvc_context *contexts[2] = {fixture_context(&f, 4), fixture_context(&f, 9)};
    static uint8_t rows[GROUPS][N * 4096];
    static uint32_t picks[GROUPS][N];
    static int8_t status[GROUPS][N];
    kvc_pick_group groups[GROUPS];
    memset(rows, 0xee, sizeof(rows));
    kvc_region *region = fixture_region(&f, rows, sizeof(rows));
    for (uint32_t g = 0; g < GROUPS; g++) {
        for (uint32_t i = 0; i < N; i++)
            picks[g][i] = (i * 7919u + g) % 10000u;
        groups[g] = (kvc_pick_group){
            .context = contexts[g % 2],
            .part = g % 3,
            .row_bytes = f.fake.row_bytes[g % 3],
            .n_picks = N,
            .picks = picks[g],
            .dst_off_bytes = g * sizeof(rows[0]),
        };
    }
    kvc_fetch_info info;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_fetch(f.client, groups, GROUPS, region, &status[0][0], &info, 0, &op));
    memset(groups, 0, sizeof(groups)); /* borrowed only */
    assert_ok(kvc_op_wait(&op, 0));
    uint32_t n_missing = 0;
    for (uint32_t g = 0; g < GROUPS; g++) {
        uint32_t row_bytes = f.fake.row_bytes[g % 3];
        for (uint32_t i = 0; i < N; i++) {
            bool missing = picks[g][i] % 5 == 0;
            n_missing += missing;
            assert_int_equal(status[g][i], missing ? KVC_NOT_FOUND : KVC_OK);
            for (uint32_t b = 0; b < row_bytes; b++) {
                uint8_t wanted = missing ? 0xee : fake_byte(g % 3, picks[g][i], b);
                if (rows[g][i * row_bytes + b] != wanted)
                    fail_msg("group %u, row %u, byte %u", g, i, b);
            }
        }
    }
    assert_int_equal(info.rows_missing, n_missing);
    assert_int_equal(info.rows_dram, GROUPS * N - n_missing);
    assert_int_equal(info.requests, fake_calls(&f.fake, KVC_FETCH_ROWS));
    assert_true(f.fake.max_groups <= max_groups);
    assert_true(f.fake.max_groups > 1 || max_groups == 1);
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_context_close(contexts[0]);
    kvc_context_close(contexts[1]);
    fixture_stop(&f);
}

static void test_fetch_groups_and_missing(void **state)
{
    (void)state;
    check_groups(KVC_MAX_GROUPS);
    check_groups(1);
}

static void test_fetch_refuses(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 1);
    static uint8_t rows[4096 * 4];
    kvc_region *region = fixture_region(&f, rows, sizeof(rows));
    uint32_t picks[5] = {0}, slots[5] = {0, 1, 2, 3, 4};
    kvc_pick_group good = {
        .context = context, .part = 0, .row_bytes = 4096, .n_picks = 4, .picks = picks};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_pick_group bad = good;
    bad.n_picks = 5;
    assert_status(kvc_fetch(f.client, &bad, 1, region, NULL, NULL, 0, &op), KVC_INVALID);
    bad.dst_slots = slots;
    assert_status(kvc_fetch(f.client, &bad, 1, region, NULL, NULL, 0, &op), KVC_INVALID);
    bad = good;
    bad.dst_off_bytes = 1;
    assert_status(kvc_fetch(f.client, &bad, 1, region, NULL, NULL, 0, &op), KVC_INVALID);
    bad.dst_off_bytes = SIZE_MAX;
    assert_status(kvc_fetch(f.client, &bad, 1, region, NULL, NULL, 0, &op), KVC_INVALID);
    bad = good;
    bad.row_bytes = 0;
    assert_status(kvc_fetch(f.client, &bad, 1, region, NULL, NULL, 0, &op), KVC_INVALID);
    bad = good;
    bad.context = NULL;
    assert_status(kvc_fetch(f.client, &bad, 1, region, NULL, NULL, 0, &op), KVC_INVALID);
    assert_status(kvc_fetch(f.client, &good, 1, NULL, NULL, NULL, 0, &op), KVC_INVALID);
    assert_status(kvc_op_wait(&op, 0), KVC_INVALID); /* never submitted */
    assert_ok(kvc_fetch(f.client, &good, 1, region, NULL, NULL, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_context_close(context);
    fixture_stop(&f);
}

/* Values of odd lengths, scattered in the region: what arrives is checked by the fake. */
static void check_put(uint32_t max_batch_values)
{
    enum { N = 3000 };
    fixture f = {0};
    fake_init(&f.fake);
    f.fake.limits.max_batch_values = max_batch_values;
    fixture_open(&f);
    support_random random = support_seed(7);
    size_t room = (size_t)N * 3000;
    uint8_t *bytes = must(malloc(room));
    kvc_value *values = must(calloc(N, sizeof(*values)));
    int8_t *status = must(malloc(N));
    memset(status, 77, N);
    kvc_region *region = fixture_region(&f, bytes, room);
    size_t at = 0;
    for (uint32_t i = 0; i < N; i++) {
        kvc_value *value = &values[i];
        support_fill(&random, value->digest.bytes, KVC_DIGEST_BYTES);
        value->digest.bytes[1] = i % 10 == 0 ? 99 : 0;
        value->part = i % 5;
        value->len_bytes = 1 + (uint32_t)support_below(&random, 2900);
        value->src_off_bytes = at;
        for (uint32_t b = 0; b < value->len_bytes; b++)
            bytes[at + b] = fake_value_byte(&value->digest, value->part, b);
        at += value->len_bytes + (i % 3 == 0 ? 0 : 50);
    }
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_put(f.client, &f.schema, KVC_PROMISE_MEMORY, values, N, region, status, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    assert_int_equal(f.fake.bad_values, 0);
    assert_int_equal(f.fake.n_values, N);
    assert_true(f.fake.max_values <= max_batch_values);
    assert_true(f.fake.max_payload_bytes <= KVC_MAX_VALUE_BYTES);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(status[i], i % 10 == 0 ? KVC_EXISTS : KVC_OK);

    values[5].src_off_bytes = room - 1;
    assert_status(
        kvc_put(f.client, &f.schema, KVC_PROMISE_MEMORY, values, N, region, status, 0, &op),
        KVC_INVALID);
    values[5].src_off_bytes = 0;
    values[5].len_bytes = KVC_MAX_VALUE_BYTES + 1;
    assert_status(
        kvc_put(f.client, &f.schema, KVC_PROMISE_MEMORY, values, N, region, status, 0, &op),
        KVC_INVALID);
    assert_status(kvc_put(f.client, &f.schema, 0, values, 1, region, status, 0, &op), KVC_INVALID);
    assert_ok(kvc_put(f.client, &f.schema, KVC_PROMISE_MEMORY, values, 0, region, status, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    assert_ok(kvc_region_deregister(f.client, region));
    free(status);
    free(values);
    free(bytes);
    fixture_stop(&f);
}

static void test_put(void **state)
{
    (void)state;
    check_put(100);                  /* the number of values decides the cut */
    check_put(KVC_MAX_BATCH_VALUES); /* pieces and bytes do */
}

/* Values that lie side by side are one piece, so that bytes alone decide. */
static void test_put_dense(void **state)
{
    (void)state;
    enum { N = 64, LEN = 100000 };
    fixture f;
    fixture_start(&f);
    uint8_t *bytes = must(malloc((size_t)N * LEN));
    static kvc_value values[N];
    int8_t status[N];
    for (uint32_t i = 0; i < N; i++) {
        values[i] = (kvc_value){
            .digest = {{(uint8_t)i}}, .len_bytes = LEN, .src_off_bytes = (size_t)i * LEN};
        for (uint32_t b = 0; b < LEN; b++)
            bytes[(size_t)i * LEN + b] = fake_value_byte(&values[i].digest, 0, b);
    }
    kvc_region *region = fixture_region(&f, bytes, (size_t)N * LEN);
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_put(f.client, &f.schema, KVC_PROMISE_DURABLE, values, N, region, status, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    assert_int_equal(f.fake.bad_values, 0);
    assert_int_equal(f.fake.n_values, N);
    assert_true(f.fake.max_payload_bytes <= KVC_MAX_VALUE_BYTES);
    assert_int_equal(fake_calls(&f.fake, KVC_PUT_BLOCKS), 7); /* ten values each */
    assert_ok(kvc_region_deregister(f.client, region));
    free(bytes);
    fixture_stop(&f);
}

static void test_match(void **state)
{
    (void)state;
    fixture f = {0};
    fake_init(&f.fake);
    f.fake.limits.max_digests = 100;
    fixture_open(&f);
    kvc_digest *digests = fixture_digests(1000);
    static const uint32_t ends[] = {0, 1, 99, 100, 101, 555, 1000};
    for (size_t i = 0; i < sizeof(ends) / sizeof(ends[0]); i++) {
        uint32_t hits = 12345;
        kvc_op op;
        kvc_op_init(&op, NULL, NULL);
        digests[ends[i]].bytes[0] = 0;
        assert_ok(kvc_match(f.client, &f.schema, digests, 1000, NULL, 0, &hits, 0, &op));
        assert_ok(kvc_op_wait(&op, 0));
        assert_int_equal(hits, ends[i]);
        digests[ends[i]].bytes[0] = 1;
    }
    free(digests);
    fixture_stop(&f);
}

static void test_context(void **state)
{
    (void)state;
    fixture f = {0};
    fake_init(&f.fake);
    f.fake.limits.max_digests = 100;
    f.fake.limits.max_context_blocks = 1000;
    fixture_open(&f);
    kvc_digest *digests = fixture_digests(1001);
    kvc_context *context = NULL;
    assert_status(kvc_context_open(f.client, &f.schema, digests, 1001, 0, 0, &context),
                  KVC_INVALID);
    assert_null(context);
    context = fixture_context(&f, 450); /* open with 100, extend by 100, 100, 100, 50 */
    assert_int_equal(f.fake.n_blocks_last_open, 450);
    assert_int_equal(f.fake.n_extends, 4);
    assert_ok(kvc_context_extend(context, digests, 250, 0));
    assert_int_equal(f.fake.n_blocks_last_open, 700);
    assert_int_equal(kvc_context_blocks(context), 700);
    assert_status(kvc_context_extend(context, digests, 301, 0), KVC_INVALID);
    assert_ok(kvc_context_extend(context, digests, 0, 0));
    assert_int_equal(kvc_context_blocks(context), 700);
    kvc_context_close(context);
    assert_int_equal(fake_calls(&f.fake, KVC_CLOSE_CONTEXT), 1);
    kvc_context_close(NULL);
    free(digests);
    fixture_stop(&f);
}

static void test_schema_and_stats(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_schema schema;
    kvc_part part;
    kvc_digest digest, wanted;
    fixture_schema("m", &schema, &part);
    assert_ok(kvc_schema_register(f.client, &schema, 0, &digest));
    assert_ok(kvc_schema_digest(&schema, &wanted));
    assert_true(kvc_digest_equal(&digest, &wanted));
    part.row_bytes = 1;
    assert_status(kvc_schema_register(f.client, &schema, 0, &digest), KVC_INVALID);
    assert_int_equal(fake_calls(&f.fake, KVC_REGISTER_SCHEMA), 1);
    kvc_server_stats *stats = NULL;
    assert_ok(kvc_stats(f.client, 0, &stats));
    assert_string_equal(stats->version, "fake");
    assert_int_equal(stats->uptime_ms, 1234);
    assert_int_equal(stats->n_tiers, 1);
    assert_string_equal(stats->tiers[0].name, "dram");
    assert_int_equal(stats->n_counters, 2);
    assert_string_equal(stats->counters[1].name, "two");
    kvc_stats_free(stats);
    kvc_stats_free(NULL);
    fixture_stop(&f);
}

typedef struct chain {
    fixture *f;
    kvc_digest *digests;
    uint32_t hits;
    atomic_uint left, done;
} chain;

/* A callback may submit its own op again. */
static void chain_done(kvc_op *op, void *arg)
{
    chain *c = arg;
    assert_ok(op->status);
    atomic_fetch_add(&c->done, 1);
    if (atomic_fetch_sub(&c->left, 1) > 1)
        assert_ok(kvc_match(c->f->client, &c->f->schema, c->digests, 8, NULL, 0, &c->hits, 0, op));
}

static void test_callbacks(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    chain c = {.f = &f, .digests = fixture_digests(8), .left = 100};
    kvc_op op;
    kvc_op_init(&op, chain_done, &c);
    assert_ok(kvc_match(f.client, &f.schema, c.digests, 8, NULL, 0, &c.hits, 0, &op));
    assert_status(kvc_op_wait(&op, 0), KVC_INVALID);
    support_wait_for(atomic_load(&c.done) >= 100);
    assert_int_equal(atomic_load(&c.done), 100);
    kvc_client_close(f.client);
    assert_int_equal(atomic_load(&c.done), 100);
    free(c.digests);
    fake_fini(&f.fake);
}

/* Fetches n rows of part 5 in n_messages, the first n_late of which are answered delay_ms later;
   gives the most that the server saw at a time. */
static uint32_t most_in_flight(uint32_t row_bytes, uint32_t n, uint32_t n_messages, uint32_t n_late,
                               uint32_t delay_ms)
{
    fixture f = {0};
    fake_init(&f.fake);
    if (row_bytes > 0)
        f.fake.row_bytes[5] = row_bytes;
    else
        f.fake.limits.max_picks = 8;
    fixture_open(&f);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_FETCH_ROWS,
                                        .action = FAKE_LATE,
                                        .times = n_late,
                                        .delay_ms = delay_ms});
    kvc_context *context = fixture_context(&f, 16);
    fixture_fetch_check(&f, context, 5, n, 0, 1);
    assert_int_equal(fake_calls(&f.fake, KVC_FETCH_ROWS), n_messages);
    uint32_t most = f.fake.max_in_flight;
    kvc_context_close(context);
    fixture_stop(&f);
    return most;
}

/* More messages than may be in flight: the server never sees more than the bound. How many it sees
   is up to the machine too, so a slow one gets more time. */
static void test_inflight_bound(void **state)
{
    (void)state;
    uint32_t most = 0;
    for (uint32_t delay_ms = 5; most <= 16 && delay_ms < 10000; delay_ms *= 4) {
        most = most_in_flight(0, 2400, 300, 200, delay_ms);
        assert_true(most <= 128);
    }
    assert_true(most > 16);
}

/* Bulk is bounded by bytes: 2 MiB for each of the 2 channels, in messages of 1 MiB. */
static void test_bytes_in_flight_bound(void **state)
{
    (void)state;
    uint32_t most = 0;
    for (uint32_t delay_ms = 20; most < 4 && delay_ms < 10000; delay_ms *= 4) {
        most = most_in_flight(65536, 256, 16, 16, delay_ms);
        assert_true(most <= 4);
    }
    assert_int_equal(most, 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open_errors),
        cmocka_unit_test(test_open_older),
        cmocka_unit_test(test_second_uri),
        cmocka_unit_test(test_limits_are_clamped),
        cmocka_unit_test(test_fetch_sizes),
        cmocka_unit_test(test_fetch_small_limits),
        cmocka_unit_test(test_fetch_groups_and_missing),
        cmocka_unit_test(test_fetch_refuses),
        cmocka_unit_test(test_put),
        cmocka_unit_test(test_put_dense),
        cmocka_unit_test(test_match),
        cmocka_unit_test(test_context),
        cmocka_unit_test(test_schema_and_stats),
        cmocka_unit_test(test_callbacks),
        cmocka_unit_test(test_inflight_bound),
        cmocka_unit_test(test_bytes_in_flight_bound),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
