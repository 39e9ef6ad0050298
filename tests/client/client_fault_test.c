/*
 * client_fault_test.c: what the client does when the server is full, gone, forgetful or wrong.
 */
#include "fixture.h"
#include "internal.h"

static kvc_status match_now(fixture *f, uint64_t deadline_ns)
{
    kvc_digest *digests = fixture_digests(3);
    uint32_t hits = 0;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status =
        kvc_match(f->client, &f->schema, digests, 3, NULL, 0, &hits, deadline_ns, &op);
    if (status == KVC_OK)
        status = kvc_op_wait(&op, 0);
    if (status == KVC_OK)
        assert_int_equal(hits, 3);
    free(digests);
    return status;
}

static void test_again_is_retried(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_MATCH_PREFIX,
                                        .action = FAKE_STATUS,
                                        .times = 2,
                                        .status = KVC_AGAIN,
                                        .retry_after_ms = 60});
    uint64_t start_ns = kvc_now_ns();
    assert_ok(match_now(&f, in_ms(PATIENCE_MS)));
    assert_true(kvc_now_ns() - start_ns >= 120 * MS);
    assert_int_equal(fake_calls(&f.fake, KVC_MATCH_PREFIX), 3);

    /* A hint beyond the deadline: no point in waiting for it. */
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_MATCH_PREFIX,
                                        .action = FAKE_STATUS,
                                        .times = 1,
                                        .status = KVC_AGAIN,
                                        .retry_after_ms = 3600000});
    uint64_t deadline_ns = in_ms(PATIENCE_MS);
    assert_status(match_now(&f, deadline_ns), KVC_AGAIN);
    assert_true(kvc_now_ns() < deadline_ns);
    fixture_stop(&f);
}

static void test_final_errors_are_not_retried(void **state)
{
    (void)state;
    static const kvc_status finals[] = {KVC_INVALID, KVC_NO_SPACE, KVC_DENIED, KVC_IO, KVC_CORRUPT};
    fixture f;
    fixture_start(&f);
    for (size_t i = 0; i < sizeof(finals) / sizeof(finals[0]); i++) {
        fake_add_rule(&f.fake, &(fake_rule){.method = KVC_MATCH_PREFIX,
                                            .action = FAKE_STATUS,
                                            .times = 1,
                                            .status = finals[i]});
        assert_status(match_now(&f, in_ms(PATIENCE_MS)), finals[i]);
        assert_int_equal(fake_calls(&f.fake, KVC_MATCH_PREFIX), i + 1);
        assert_non_null(strstr(kvc_last_error(), kvc_status_name(finals[i])));
        assert_non_null(strstr(kvc_last_error(), "as the rule says"));
    }
    fixture_stop(&f);
}

/* One UNAVAILABLE from a server that is there: the link is looked at and the call repeated. */
static void test_unavailable_once(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_MATCH_PREFIX,
                                        .action = FAKE_STATUS,
                                        .times = 3,
                                        .status = KVC_UNAVAILABLE});
    assert_ok(match_now(&f, in_ms(PATIENCE_MS)));
    assert_int_equal(fake_calls(&f.fake, KVC_MATCH_PREFIX), 4);
    assert_true(fake_calls(&f.fake, KVC_DESCRIBE) >= 2);
    fixture_stop(&f);
}

/* The server goes away in mid-use and comes back as another boot. */
static void test_server_restarts(void **state)
{
    (void)state;
    enum { N = 20 };
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 8);
    fixture_fetch_check(&f, context, 0, 100, 0, 1);
    fake_stop(&f.fake);
    static counted ops[N];
    kvc_region *regions[N];
    memset(ops, 0, sizeof(ops));
    for (uint32_t i = 0; i < N; i++) {
        regions[i] = fixture_region(&f, ops[i].rows, sizeof(ops[i].rows));
        kvc_op_init(&ops[i].op, count_done, &ops[i]);
        fetch_async(&f, context, regions[i], &ops[i], in_ms(PATIENCE_MS));
    }
    usleep(100000);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(atomic_load(&ops[i].done), 0);
    uint32_t opens = fake_calls(&f.fake, KVC_OPEN_CONTEXT);
    fake_listen(&f.fake, FIXTURE_URI);
    for (uint32_t i = 0; i < N; i++) {
        await_done(&ops[i]);
        assert_ok(ops[i].status);
        for (uint32_t r = 0; r < 64; r++)
            assert_int_equal(ops[i].rows[r * 64 + 9], fake_byte(6, r * 3, 9));
        assert_ok(kvc_region_deregister(f.client, regions[i]));
    }
    /* However many fetches waited, the context was opened again once. */
    assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), opens + 1);
    assert_int_equal(f.fake.n_blocks_last_open, 8);
    kvc_context_close(context);
    fixture_stop(&f);
}

static void test_server_stays_away(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    fake_stop(&f.fake);
    /* It tries until its deadline; TIMED_OUT where that came before its first attempt had an end.
     */
    kvc_status status = KVC_TIMED_OUT;
    uint64_t start_ns = 0, ms;
    for (ms = 300; status == KVC_TIMED_OUT && ms < PATIENCE_MS; ms *= 2) {
        start_ns = kvc_now_ns();
        status = match_now(&f, in_ms(ms));
        assert_true(kvc_now_ns() - start_ns >= (ms - 10) * MS);
    }
    assert_status(status, KVC_UNAVAILABLE);
    /* The second one finds the link gone already, and never leaves the queue. */
    assert_status(match_now(&f, in_ms(100)), KVC_TIMED_OUT);
    fixture_stop(&f);
}

/* A new boot that forgot the schema: the client makes it known again. */
static void test_forgotten_schema(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_schema schema;
    kvc_part part;
    fixture_schema("m", &schema, &part);
    assert_ok(kvc_schema_register(f.client, &schema, 0, &f.schema));
    kvc_context *context = fixture_context(&f, 8);
    fake_stop(&f.fake);
    f.fake.schema_known = false;
    fake_listen(&f.fake, FIXTURE_URI);
    fixture_fetch_check(&f, context, 0, 100, 0, 1);
    assert_ok(match_now(&f, in_ms(PATIENCE_MS)));
    assert_int_equal(fake_calls(&f.fake, KVC_REGISTER_SCHEMA), 2);
    kvc_context_close(context);
    fixture_stop(&f);
}

/* The same where no context is open: the put or match that fails finds out. */
static void test_forgotten_schema_without_context(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_schema schema;
    kvc_part part;
    fixture_schema("m", &schema, &part);
    assert_ok(kvc_schema_register(f.client, &schema, 0, &f.schema));
    fake_stop(&f.fake);
    f.fake.schema_known = false;
    fake_listen(&f.fake, FIXTURE_URI);
    assert_ok(match_now(&f, in_ms(PATIENCE_MS)));
    assert_int_equal(fake_calls(&f.fake, KVC_REGISTER_SCHEMA), 2);
    fixture_stop(&f);
}

static void test_unknown_schema_is_final(void **state)
{
    (void)state;
    fixture f = {0};
    fake_init(&f.fake);
    f.fake.schema_known = false;
    fixture_open(&f);
    assert_status(match_now(&f, in_ms(PATIENCE_MS)), KVC_NOT_FOUND);
    assert_int_equal(fake_calls(&f.fake, KVC_MATCH_PREFIX), 1);
    fixture_stop(&f);
}

static void test_stale_handle(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 8);
    for (int round = 0; round < 5; round++) {
        uint32_t opens = fake_calls(&f.fake, KVC_OPEN_CONTEXT);
        fake_make_stale(&f.fake);
        fixture_fetch_check(&f, context, 0, 1500, 0, 2);
        assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), opens + 1);
    }
    /* An extend finds it stale too, and opens the longer list at once. */
    kvc_digest *more = fixture_digests(3);
    fake_make_stale(&f.fake);
    assert_ok(kvc_context_extend(context, more, 3, 0));
    assert_int_equal(f.fake.n_blocks_last_open, 11);
    assert_int_equal(kvc_context_blocks(context), 11);
    fixture_fetch_check(&f, context, 0, 100, 0, 2);
    free(more);
    kvc_context_close(context);
    fixture_stop(&f);
}

/* An answer about the old handle comes after the context was opened again: no second time. */
static void test_late_stale(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 8);
    static counted c;
    memset(&c, 0, sizeof(c));
    kvc_region *region = fixture_region(&f, c.rows, sizeof(c.rows));
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_FETCH_ROWS,
                                        .action = FAKE_LATE,
                                        .times = 1,
                                        .delay_ms = FAKE_KEEP_MS});
    kvc_op_init(&c.op, NULL, NULL);
    fetch_async(&f, context, region, &c, in_ms(PATIENCE_MS));
    fake_wait_calls(&f.fake, KVC_FETCH_ROWS, 1);
    fake_make_stale(&f.fake);
    fixture_fetch_check(&f, context, 0, 10, 0, 1);
    assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), 2);
    fake_let_go(&f.fake);
    assert_ok(kvc_op_wait(&c.op, 0));
    assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), 2);
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_context_close(context);
    fixture_stop(&f);
}

/* One message of several fails: its rows say so, the others are there. */
static void test_one_message_fails(void **state)
{
    (void)state;
    enum { N = 1024, PER_MESSAGE = 256 };
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 16);
    static uint8_t rows[N * 4096];
    static uint32_t picks[N];
    int8_t status[N];
    kvc_region *region = fixture_region(&f, rows, sizeof(rows));
    for (uint32_t i = 0; i < N; i++)
        picks[i] = i;
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_FETCH_ROWS,
                                        .action = FAKE_STATUS,
                                        .skip = N / PER_MESSAGE - 1,
                                        .times = 1,
                                        .status = KVC_IO});
    kvc_pick_group group = {
        .context = context, .part = 0, .row_bytes = 4096, .n_picks = N, .picks = picks};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_fetch(f.client, &group, 1, region, status, NULL, 0, &op));
    assert_status(kvc_op_wait(&op, 0), KVC_IO);
    uint32_t n_failed = 0;
    for (uint32_t i = 0; i < N; i++) {
        assert_true(status[i] == KVC_OK || status[i] == KVC_IO);
        assert_int_equal(status[i], status[i / PER_MESSAGE * PER_MESSAGE]);
        n_failed += status[i] == KVC_IO;
        if (status[i] == KVC_OK)
            assert_int_equal(rows[i * 4096 + 77], fake_byte(0, i, 77));
    }
    assert_int_equal(n_failed, PER_MESSAGE);
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_context_close(context);
    fixture_stop(&f);
}

/* A server whose handles never work: an error, not an endless loop. */
static void test_always_stale(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 8);
    static counted c;
    kvc_region *region = fixture_region(&f, c.rows, sizeof(c.rows));
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_FETCH_ROWS,
                                        .action = FAKE_STATUS,
                                        .times = 1000,
                                        .status = KVC_STALE_HANDLE});
    kvc_op_init(&c.op, NULL, NULL);
    fetch_async(&f, context, region, &c, in_ms(PATIENCE_MS));
    assert_status(kvc_op_wait(&c.op, 0), KVC_STALE_HANDLE);
    assert_true(fake_calls(&f.fake, KVC_FETCH_ROWS) < 20);
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_context_close(context);
    fixture_stop(&f);
}

/* A reopen that fails for good ends the fetch with its error; the next fetch tries again. */
static void test_reopen_fails(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 8);
    static counted c;
    kvc_region *region = fixture_region(&f, c.rows, sizeof(c.rows));
    fake_make_stale(&f.fake);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_OPEN_CONTEXT,
                                        .action = FAKE_STATUS,
                                        .times = 1,
                                        .status = KVC_NO_SPACE});
    kvc_op_init(&c.op, NULL, NULL);
    fetch_async(&f, context, region, &c, in_ms(PATIENCE_MS));
    assert_status(kvc_op_wait(&c.op, 0), KVC_NO_SPACE);
    for (uint32_t i = 0; i < 64; i++)
        assert_int_equal(c.states[i], KVC_NO_SPACE);
    fixture_fetch_check(&f, context, 0, 10, 0, 1);
    fake_make_stale(&f.fake);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_OPEN_CONTEXT,
                                        .action = FAKE_STATUS,
                                        .times = 2,
                                        .status = KVC_AGAIN,
                                        .retry_after_ms = 10});
    fixture_fetch_check(&f, context, 0, 10, 0, 1);
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_context_close(context);
    fixture_stop(&f);
}

/* A server that takes longer than an attempt to open a context again gets: the fetch, which has
   more time, waits for the next attempt. */
static void test_reopen_takes_long(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    f.client->reopen_timeout_ns = 200 * MS;
    kvc_context *context = fixture_context(&f, 8);
    fake_make_stale(&f.fake);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_OPEN_CONTEXT,
                                        .action = FAKE_LATE,
                                        .times = 1,
                                        .delay_ms = FAKE_KEEP_MS});
    fixture_fetch_check(&f, context, 0, 10, 0, 1);
    assert_true(fake_calls(&f.fake, KVC_OPEN_CONTEXT) >= 3);
    kvc_context_close(context);
    fixture_stop(&f);
}

/* The answer to an extend is lost; the repetition carries its position. */
static void test_lost_extend(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    kvc_digest *more = fixture_digests(6);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_EXTEND_CONTEXT,
                                        .action = FAKE_LATE,
                                        .times = 1,
                                        .delay_ms = FAKE_KEEP_MS});
    assert_status(kvc_context_extend(context, more, 2, in_ms(400)), KVC_TIMED_OUT);
    assert_int_equal(kvc_context_blocks(context), 4);
    fake_wait_calls(&f.fake, KVC_EXTEND_CONTEXT, 1);
    fake_let_go(&f.fake); /* the server carries it out nevertheless */
    assert_int_equal(f.fake.n_blocks_last_open, 6);
    assert_ok(kvc_context_extend(context, more + 2, 3, 0));
    assert_int_equal(kvc_context_blocks(context), 7);
    assert_int_equal(f.fake.n_blocks_last_open, 7);
    free(more);
    kvc_context_close(context);
    fixture_stop(&f);
}

static void test_wrong_answers(void **state)
{
    (void)state;
    static const fake_action actions[] = {FAKE_SHORT, FAKE_LONG, FAKE_WILD_MISSING};
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    static counted c;
    kvc_region *region = fixture_region(&f, c.rows, sizeof(c.rows));
    for (size_t i = 0; i < sizeof(actions) / sizeof(actions[0]); i++) {
        memset(c.rows, 0, sizeof(c.rows));
        fake_add_rule(&f.fake,
                      &(fake_rule){.method = KVC_FETCH_ROWS, .action = actions[i], .times = 1});
        kvc_op_init(&c.op, NULL, NULL);
        fetch_async(&f, context, region, &c, 0);
        assert_status(kvc_op_wait(&c.op, 0), KVC_PROTOCOL);
        for (size_t b = 0; b < sizeof(c.rows); b++)
            assert_int_equal(c.rows[b], 0);
        assert_int_equal(c.states[63], KVC_PROTOCOL);
    }
    /* Wrong row_bytes on our side looks the same. */
    kvc_pick_group group = {
        .context = context, .part = 5, .row_bytes = 32, .n_picks = 4, .picks = c.picks};
    assert_ok(kvc_fetch(f.client, &group, 1, region, NULL, NULL, 0, &c.op));
    assert_status(kvc_op_wait(&c.op, 0), KVC_PROTOCOL);
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_value value = {.digest = {{1}}, .len_bytes = 64};
    int8_t status = 0;
    region = fixture_region(&f, c.rows, sizeof(c.rows));
    fake_add_rule(&f.fake,
                  &(fake_rule){.method = KVC_PUT_BLOCKS, .action = FAKE_FEW_STATUS, .times = 1});
    assert_ok(
        kvc_put(f.client, &f.schema, KVC_PROMISE_MEMORY, &value, 1, region, &status, 0, &c.op));
    assert_status(kvc_op_wait(&c.op, 0), KVC_PROTOCOL);
    assert_int_equal(status, KVC_PROTOCOL);
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_context_close(context);
    fixture_stop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_again_is_retried),
        cmocka_unit_test(test_final_errors_are_not_retried),
        cmocka_unit_test(test_unavailable_once),
        cmocka_unit_test(test_server_restarts),
        cmocka_unit_test(test_server_stays_away),
        cmocka_unit_test(test_forgotten_schema),
        cmocka_unit_test(test_forgotten_schema_without_context),
        cmocka_unit_test(test_unknown_schema_is_final),
        cmocka_unit_test(test_stale_handle),
        cmocka_unit_test(test_late_stale),
        cmocka_unit_test(test_one_message_fails),
        cmocka_unit_test(test_always_stale),
        cmocka_unit_test(test_reopen_fails),
        cmocka_unit_test(test_reopen_takes_long),
        cmocka_unit_test(test_lost_extend),
        cmocka_unit_test(test_wrong_answers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
