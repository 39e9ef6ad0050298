/*
 * client_fault_test.c: what the client does when the server is full, gone, late, forgetful or
 * wrong, and when ops are cancelled or the client is closed under them. Each op ends exactly once.
 */
#include "fixture.h"

#include <stdatomic.h>

typedef struct counted {
    kvc_op op;
    atomic_uint done;
    kvc_status status;
    uint32_t hits;
    uint32_t picks[64];
    int8_t states[64];
    uint8_t rows[64 * 64];
} counted;

static void count_done(kvc_op *op, void *arg)
{
    counted *c = arg;
    c->status = op->status;
    atomic_fetch_add(&c->done, 1);
}

static void await_done(counted *c)
{
    for (int i = 0; i < 10000 && atomic_load(&c->done) == 0; i++)
        usleep(1000);
    assert_int_equal(atomic_load(&c->done), 1);
}

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
    assert_ok(match_now(&f, in_ms(5000)));
    assert_true(kvc_now_ns() - start_ns >= 120 * MS);
    assert_int_equal(fake_calls(&f.fake, KVC_MATCH_PREFIX), 3);

    /* A hint beyond the deadline: no point in waiting for it. */
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_MATCH_PREFIX,
                                        .action = FAKE_STATUS,
                                        .times = 1,
                                        .status = KVC_AGAIN,
                                        .retry_after_ms = 60000});
    start_ns = kvc_now_ns();
    assert_status(match_now(&f, in_ms(2000)), KVC_AGAIN);
    assert_true(kvc_now_ns() - start_ns < 1000 * MS);
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
        assert_status(match_now(&f, in_ms(5000)), finals[i]);
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
    assert_ok(match_now(&f, in_ms(5000)));
    assert_int_equal(fake_calls(&f.fake, KVC_MATCH_PREFIX), 4);
    assert_true(fake_calls(&f.fake, KVC_DESCRIBE) >= 2);
    fixture_stop(&f);
}

static void fetch_async(fixture *f, kvc_context *context, kvc_region *region, counted *c,
                        uint64_t deadline_ns)
{
    for (uint32_t i = 0; i < 64; i++)
        c->picks[i] = i * 3;
    kvc_pick_group group = {
        .context = context, .part = 6, .row_bytes = 64, .n_picks = 64, .picks = c->picks};
    assert_ok(kvc_fetch(f->client, &group, 1, region, c->states, NULL, deadline_ns, &c->op));
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
        fetch_async(&f, context, regions[i], &ops[i], in_ms(10000));
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
    uint64_t start_ns = kvc_now_ns();
    assert_status(match_now(&f, in_ms(300)), KVC_UNAVAILABLE);
    uint64_t took_ns = kvc_now_ns() - start_ns;
    assert_true(took_ns >= 290 * MS && took_ns < 2000 * MS);
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
    assert_ok(match_now(&f, in_ms(5000)));
    assert_int_equal(fake_calls(&f.fake, KVC_REGISTER_SCHEMA), 2);
    kvc_context_close(context);
    fixture_stop(&f);
}

static void test_unknown_schema_is_final(void **state)
{
    (void)state;
    fixture f = {0};
    fake_init(&f.fake);
    f.fake.schema_known = false;
    fixture_open(&f);
    assert_status(match_now(&f, in_ms(5000)), KVC_NOT_FOUND);
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
    fetch_async(&f, context, region, &c, in_ms(5000));
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
    fetch_async(&f, context, region, &c, in_ms(5000));
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
                                        .delay_ms = 300});
    assert_status(kvc_context_extend(context, more, 2, in_ms(50)), KVC_TIMED_OUT);
    assert_int_equal(kvc_context_blocks(context), 4);
    usleep(400000); /* the server has carried it out by now: it holds 6 */
    kvc_mutex_lock(&f.fake.lock);
    uint32_t n_there = f.fake.n_blocks_last_open;
    kvc_mutex_unlock(&f.fake.lock);
    assert_int_equal(n_there, 6);
    assert_ok(kvc_context_extend(context, more + 2, 3, 0));
    assert_int_equal(kvc_context_blocks(context), 7);
    assert_int_equal(f.fake.n_blocks_last_open, 7);
    free(more);
    kvc_context_close(context);
    fixture_stop(&f);
}

static void test_late_answer(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    static counted c;
    memset(&c, 0, sizeof(c));
    kvc_region *region = fixture_region(&f, c.rows, sizeof(c.rows));
    fake_add_rule(
        &f.fake,
        &(fake_rule){.method = KVC_FETCH_ROWS, .action = FAKE_LATE, .times = 1, .delay_ms = 400});
    kvc_op_init(&c.op, NULL, NULL);
    fetch_async(&f, context, region, &c, in_ms(100));
    assert_status(kvc_region_deregister(f.client, region), KVC_AGAIN);
    assert_status(kvc_op_wait(&c.op, in_ms(20)), KVC_TIMED_OUT); /* the wait's own deadline */
    assert_status(kvc_op_wait(&c.op, 0), KVC_TIMED_OUT);
    assert_ok(kvc_region_deregister(f.client, region));
    usleep(500000);
    for (size_t i = 0; i < sizeof(c.rows); i++)
        assert_int_equal(c.rows[i], 0); /* the late rows were not written */
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

/* Ops cancelled at random moments end once each, as CANCELLED or as if nothing had been said. */
static void test_cancel_races(void **state)
{
    (void)state;
    enum { N = 40, ROUNDS = 10 };
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    static counted ops[N];
    kvc_region *regions[N];
    support_random random = support_seed(11);
    uint32_t n_cancelled = 0;
    for (uint32_t i = 0; i < N; i++)
        regions[i] = fixture_region(&f, ops[i].rows, sizeof(ops[i].rows));
    for (int round = 0; round < ROUNDS; round++) {
        kvc_mutex_lock(&f.fake.lock);
        f.fake.n_rules = 0;
        kvc_mutex_unlock(&f.fake.lock);
        fake_add_rule(&f.fake, &(fake_rule){.method = KVC_FETCH_ROWS,
                                            .action = round % 2 ? FAKE_LATE : FAKE_STATUS,
                                            .skip = 5,
                                            .times = 20,
                                            .status = KVC_AGAIN,
                                            .retry_after_ms = 30,
                                            .delay_ms = 30});
        for (uint32_t i = 0; i < N; i++) {
            atomic_store(&ops[i].done, 0);
            kvc_op_init(&ops[i].op, count_done, &ops[i]);
            fetch_async(&f, context, regions[i], &ops[i], in_ms(5000));
        }
        for (uint32_t i = 0; i < N; i++) {
            if (support_below(&random, 4) == 0)
                usleep((useconds_t)support_below(&random, 2000));
            kvc_op_cancel(&ops[i].op);
            kvc_op_cancel(&ops[i].op);
        }
        for (uint32_t i = 0; i < N; i++) {
            await_done(&ops[i]);
            assert_true(ops[i].status == KVC_OK || ops[i].status == KVC_CANCELLED);
            n_cancelled += ops[i].status == KVC_CANCELLED;
        }
    }
    assert_true(n_cancelled > 0);
    usleep(50000);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(atomic_load(&ops[i].done), 1);
        assert_ok(kvc_region_deregister(f.client, regions[i]));
    }
    kvc_context_close(context);
    fixture_stop(&f);
}

/* Close with ops queued, in flight, on a timer and without a link. */
static void test_close_races(void **state)
{
    (void)state;
    enum { N = 100 };
    for (int round = 0; round < 6; round++) {
        fixture f;
        fixture_start(&f);
        static counted ops[N];
        memset(ops, 0, sizeof(ops));
        kvc_digest *digests = fixture_digests(3);
        fake_add_rule(&f.fake, &(fake_rule){.method = KVC_MATCH_PREFIX,
                                            .action = round % 2 ? FAKE_LATE : FAKE_STATUS,
                                            .skip = 10,
                                            .times = 60,
                                            .status = KVC_AGAIN,
                                            .retry_after_ms = 500,
                                            .delay_ms = 200});
        if (round >= 4)
            fake_stop(&f.fake);
        for (uint32_t i = 0; i < N; i++) {
            kvc_op_init(&ops[i].op, count_done, &ops[i]);
            assert_ok(
                kvc_match(f.client, &f.schema, digests, 3, NULL, 0, &ops[i].hits, 0, &ops[i].op));
        }
        if (round % 3 == 1)
            usleep(20000);
        kvc_client_close(f.client);
        for (uint32_t i = 0; i < N; i++) {
            assert_int_equal(atomic_load(&ops[i].done), 1);
            assert_true(ops[i].status == KVC_OK || ops[i].status == KVC_CANCELLED);
        }
        free(digests);
        fake_fini(&f.fake);
    }
}

typedef struct hammer {
    fixture *f;
    kvc_context *context;
    atomic_bool stop;
    atomic_uint fetches, failures;
    kvc_thread thread;
} hammer;

static void hammer_main(void *arg)
{
    hammer *h = arg;
    counted *c = calloc(1, sizeof(*c));
    kvc_region *region = fixture_region(h->f, c->rows, sizeof(c->rows));
    while (!atomic_load(&h->stop)) {
        memset(c->rows, 0, sizeof(c->rows));
        kvc_op_init(&c->op, NULL, NULL);
        fetch_async(h->f, h->context, region, c, in_ms(20000));
        kvc_status status = kvc_op_wait(&c->op, 0);
        bool right = status == KVC_OK;
        for (uint32_t r = 0; right && r < 64; r++)
            right = c->rows[r * 64 + 9] == fake_byte(6, r * 3, 9);
        atomic_fetch_add(&h->fetches, 1);
        if (!right)
            atomic_fetch_add(&h->failures, 1);
    }
    (void)kvc_region_deregister(h->f->client, region);
    free(c);
}

/* Threads that fetch and extend one context while its handles die and the server restarts. */
static void test_everything_at_once(void **state)
{
    (void)state;
    enum { THREADS = 3, ROUNDS = 12 };
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    static hammer hammers[THREADS];
    memset(hammers, 0, sizeof(hammers));
    for (int t = 0; t < THREADS; t++) {
        hammers[t].f = &f;
        hammers[t].context = context;
        assert_ok(kvc_thread_start(&hammers[t].thread, "hammer", hammer_main, &hammers[t]));
    }
    kvc_digest *more = fixture_digests(2);
    for (int round = 0; round < ROUNDS; round++) {
        usleep(20000);
        if (round % 3 == 2) {
            fake_stop(&f.fake);
            usleep(10000);
            fake_listen(&f.fake, FIXTURE_URI);
        } else {
            fake_make_stale(&f.fake);
        }
        assert_ok(kvc_context_extend(context, more, 2, in_ms(10000)));
    }
    for (int t = 0; t < THREADS; t++) {
        atomic_store(&hammers[t].stop, true);
        kvc_thread_join(&hammers[t].thread);
        assert_true(atomic_load(&hammers[t].fetches) > 0);
        assert_int_equal(atomic_load(&hammers[t].failures), 0);
    }
    assert_int_equal(kvc_context_blocks(context), 4 + 2 * ROUNDS);
    free(more);
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
        cmocka_unit_test(test_unknown_schema_is_final),
        cmocka_unit_test(test_stale_handle),
        cmocka_unit_test(test_always_stale),
        cmocka_unit_test(test_reopen_fails),
        cmocka_unit_test(test_lost_extend),
        cmocka_unit_test(test_late_answer),
        cmocka_unit_test(test_wrong_answers),
        cmocka_unit_test(test_cancel_races),
        cmocka_unit_test(test_close_races),
        cmocka_unit_test(test_everything_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
