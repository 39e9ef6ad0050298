/*
 * client_race_test.c: late answers, ops that are cancelled and clients that are closed under them,
 * and threads that fetch while handles die. Each op ends exactly once.
 */
#include "fixture.h"

static void test_late_answer(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    static counted c;
    memset(&c, 0, sizeof(c));
    kvc_region *region = fixture_region(&f, c.rows, sizeof(c.rows));
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_FETCH_ROWS,
                                        .action = FAKE_LATE,
                                        .times = 1,
                                        .delay_ms = FAKE_KEEP_MS});
    kvc_op_init(&c.op, NULL, NULL);
    fetch_async(&f, context, region, &c, in_ms(400));
    assert_status(kvc_op_wait(&c.op, in_ms(20)), KVC_TIMED_OUT); /* the wait's own deadline */
    assert_status(kvc_op_wait(&c.op, 0), KVC_TIMED_OUT);
    assert_ok(kvc_region_deregister(f.client, region));
    fake_let_go(&f.fake);
    fixture_fetch_check(&f, context, 6, 16, 0, 3); /* the answer to this one came after it */
    for (size_t i = 0; i < sizeof(c.rows); i++)
        assert_int_equal(c.rows[i], 0); /* the late rows were not written */
    kvc_context_close(context);
    fixture_stop(&f);
}

/* Cancelling what the server sits on does not wait for the server. */
static void test_cancel_is_prompt(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    static counted c;
    memset(&c, 0, sizeof(c));
    kvc_region *region = fixture_region(&f, c.rows, sizeof(c.rows));
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_FETCH_ROWS,
                                        .action = FAKE_LATE,
                                        .times = 1,
                                        .delay_ms = FAKE_KEEP_MS});
    kvc_op_init(&c.op, NULL, NULL);
    fetch_async(&f, context, region, &c, in_ms(PATIENCE_MS));
    assert_status(kvc_region_deregister(f.client, region), KVC_AGAIN);
    fake_wait_calls(&f.fake, KVC_FETCH_ROWS, 1);
    kvc_op_cancel(&c.op);
    assert_status(kvc_op_wait(&c.op, 0), KVC_CANCELLED); /* TIMED_OUT, if it waited */
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
    for (int round = 0; round < ROUNDS || n_cancelled == 0; round++) {
        assert_true(round < 100 * ROUNDS);
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
            fetch_async(&f, context, regions[i], &ops[i], in_ms(PATIENCE_MS));
        }
        for (uint32_t i = 0; i < N; i++) {
            if (support_below(&random, 4) == 0)
                usleep((useconds_t)support_below(&random, 2000));
            kvc_op_cancel(&ops[i].op);
            kvc_op_cancel(&ops[i].op);
        }
        for (uint32_t i = 0; i < N; i++) {
            await_done(&ops[i]);
            if (ops[i].status != KVC_OK)
                assert_status(ops[i].status, KVC_CANCELLED);
            n_cancelled += ops[i].status == KVC_CANCELLED;
        }
    }
    fake_let_go(&f.fake); /* what comes late finds nobody */
    fixture_fetch_check(&f, context, 6, 16, 0, 3);
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

static void close_main(void *arg)
{
    kvc_context_close(arg);
}

/* A context is closed while it is being opened again, which fails because the server goes away. */
static void test_close_during_reopen(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 4);
    static counted c;
    memset(&c, 0, sizeof(c));
    kvc_region *region = fixture_region(&f, c.rows, sizeof(c.rows));
    uint32_t n_opens = fake_calls(&f.fake, KVC_OPEN_CONTEXT);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_OPEN_CONTEXT,
                                        .action = FAKE_LATE_STATUS,
                                        .times = 1,
                                        .status = KVC_UNAVAILABLE,
                                        .delay_ms = FAKE_KEEP_MS});
    fake_make_stale(&f.fake);
    kvc_status status = KVC_TIMED_OUT; /* where not even the first answer came in time */
    for (uint64_t ms = 400; status == KVC_TIMED_OUT && ms < PATIENCE_MS; ms *= 2) {
        kvc_op_init(&c.op, NULL, NULL);
        fetch_async(&f, context, region, &c, in_ms(ms));
        status = kvc_op_wait(&c.op, 0);
    }
    assert_status(status, KVC_STALE_HANDLE); /* at its deadline */
    fake_wait_calls(&f.fake, KVC_OPEN_CONTEXT, n_opens + 1);
    kvc_thread closer;
    assert_ok(kvc_thread_start(&closer, "closer", close_main, context));
    usleep(20000); /* most often it waits for the answer by now */
    fake_let_go(&f.fake);
    kvc_thread_join(&closer);
    n_opens = fake_calls(&f.fake, KVC_OPEN_CONTEXT);
    /* Nothing is left that names it, and kvc-link goes on with others. */
    context = fixture_context(&f, 4);
    assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), n_opens + 1);
    fake_make_stale(&f.fake);
    fixture_fetch_check(&f, context, 6, 16, 0, 3);
    assert_ok(kvc_region_deregister(f.client, region));
    kvc_context_close(context);
    fixture_stop(&f);
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
        fetch_async(h->f, h->context, region, c, in_ms(PATIENCE_MS));
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
        assert_ok(kvc_context_extend(context, more, 2, in_ms(PATIENCE_MS)));
    }
    for (int t = 0; t < THREADS; t++) {
        support_wait_for(atomic_load(&hammers[t].fetches) > 0);
        atomic_store(&hammers[t].stop, true);
        kvc_thread_join(&hammers[t].thread);
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
        cmocka_unit_test(test_late_answer),         cmocka_unit_test(test_cancel_is_prompt),
        cmocka_unit_test(test_cancel_races),        cmocka_unit_test(test_close_races),
        cmocka_unit_test(test_close_during_reopen), cmocka_unit_test(test_everything_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
