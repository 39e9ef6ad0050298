/*
 * client_branch_test.c: truncate, fork, the tiers of a match, erase, hold, prefetch, against a
 * server that is well, forgets handles and answers nothing.
 */
#include "fixture.h"

static void test_truncate(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_digest *digests = fixture_digests(10);
    kvc_context *context = fixture_context(&f, 20);
    assert_ok(kvc_context_truncate(context, 12, 0));
    assert_int_equal(kvc_context_blocks(context), 12);
    assert_int_equal(f.fake.n_blocks_last_open, 12);
    assert_ok(kvc_context_truncate(context, 12, 0)); /* nothing to do, nothing is asked */
    assert_int_equal(fake_calls(&f.fake, KVC_TRUNCATE_CONTEXT), 1);
    assert_status(kvc_context_truncate(context, 13, 0), KVC_INVALID);
    assert_non_null(strstr(kvc_last_error(), "12"));
    assert_ok(kvc_context_extend(context, digests, 3, 0));
    assert_int_equal(kvc_context_blocks(context), 15);
    /* A forgotten handle: opened anew with the new length alone. */
    fake_make_stale(&f.fake);
    assert_ok(kvc_context_truncate(context, 4, 0));
    assert_int_equal(f.fake.n_blocks_last_open, 4);
    assert_int_equal(kvc_context_blocks(context), 4);
    assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), 2);
    fixture_fetch_check(&f, context, 0, 10, 0, 1);
    kvc_context_close(context);
    free(digests);
    fixture_stop(&f);
}

/* An answer that is lost: the length there is not known, so the context is opened anew as it is. */
static void test_truncate_unknown(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 20);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_TRUNCATE_CONTEXT,
                                        .action = FAKE_LATE,
                                        .times = 1,
                                        .delay_ms = FAKE_KEEP_MS});
    assert_status(kvc_context_truncate(context, 5, in_ms(400)), KVC_TIMED_OUT);
    assert_int_equal(kvc_context_blocks(context), 20);
    fixture_fetch_check(&f, context, 0, 10, 19 * 64, 1);
    fake_wait_calls(&f.fake, KVC_OPEN_CONTEXT, 2);
    assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), 2);
    assert_int_equal(f.fake.n_blocks_last_open, 20);
    kvc_context_close(context);
    fixture_stop(&f);
}

static void test_fork(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f);
    kvc_digest *digests = fixture_digests(10);
    kvc_context *context = fixture_context(&f, 20), *twin = NULL, *empty = NULL;
    assert_ok(kvc_context_fork(context, 15, 1000, 0, &twin));
    assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), 1);
    assert_int_equal(fake_calls(&f.fake, KVC_FORK_CONTEXT), 1);
    assert_int_equal(kvc_context_blocks(twin), 15);
    assert_int_equal(kvc_context_blocks(context), 20);
    assert_ok(kvc_context_extend(twin, digests, 2, 0));
    assert_int_equal(f.fake.n_blocks_last_open, 17);
    assert_int_equal(kvc_context_blocks(context), 20);
    fixture_fetch_check(&f, twin, 0, 10, 0, 1);
    kvc_context_close(twin);
    assert_status(kvc_context_fork(context, 21, 0, 0, &twin), KVC_INVALID);
    assert_null(twin);
    /* None of its blocks: that is an empty context, not all of them. */
    assert_ok(kvc_context_fork(context, 0, 0, 0, &empty));
    assert_int_equal(fake_calls(&f.fake, KVC_FORK_CONTEXT), 1);
    assert_int_equal(f.fake.n_blocks_last_open, 0);
    kvc_context_close(empty);
    fake_make_stale(&f.fake);
    assert_ok(kvc_context_fork(context, 9, 0, 0, &twin));
    assert_int_equal(f.fake.n_blocks_last_open, 9);
    assert_int_equal(kvc_context_blocks(twin), 9);
    kvc_context_close(twin);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_OPEN_CONTEXT,
                                        .action = FAKE_STATUS,
                                        .times = 1,
                                        .status = KVC_NO_SPACE});
    fake_make_stale(&f.fake);
    assert_status(kvc_context_fork(context, 9, 0, 0, &twin), KVC_NO_SPACE);
    assert_null(twin);
    kvc_context_close(context);
    free(digests);
    fixture_stop(&f);
}

static void test_tiers(void **state)
{
    (void)state;
    fixture f = {0};
    uint8_t tiers[1000];
    uint32_t hits = 0;
    kvc_op op;
    fake_init(&f.fake);
    f.fake.limits.max_digests = 100;
    fixture_open(&f);
    kvc_digest *digests = fixture_digests(1000);
    for (uint32_t i = 0; i < 1000; i++)
        digests[i].bytes[1] = (uint8_t)(i % 7);
    digests[777].bytes[0] = 0;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_match_tiers(f.client, &f.schema, digests, 1000, NULL, 0, tiers, &hits, 0, &op));
    assert_ok(kvc_op_wait(&op, 0));
    assert_int_equal(hits, 777);
    for (uint32_t i = 0; i < hits; i++)
        assert_int_equal(tiers[i], i % 7 % 2 ? KVC_TIER_LMDB : KVC_TIER_DRAM);
    /* A server that knows nothing of tiers. */
    f.fake.no_tiers = true;
    assert_ok(kvc_match_tiers(f.client, &f.schema, digests, 1000, NULL, 0, tiers, &hits, 0, &op));
    assert_status(kvc_op_wait(&op, 0), KVC_PROTOCOL);
    free(digests);
    fixture_stop(&f);
}

static kvc_status wait_for(kvc_status submitted, kvc_op *op)
{
    return submitted == KVC_OK ? kvc_op_wait(op, 0) : submitted;
}

static void test_erase(void **state)
{
    (void)state;
    fixture f = {0};
    kvc_erase_info info;
    const uint32_t parts[] = {3, 4};
    kvc_op op;
    fake_init(&f.fake);
    f.fake.limits.max_digests = 100;
    fixture_open(&f);
    kvc_digest *digests = fixture_digests(250);
    kvc_op_init(&op, NULL, NULL);
    assert_ok(wait_for(kvc_erase(f.client, &f.schema, digests, 250, parts, 2, &info, 0, &op), &op));
    assert_int_equal(fake_calls(&f.fake, KVC_ERASE), 3);
    assert_int_equal(info.values, 250);
    assert_int_equal(info.bytes, 2500);
    assert_ok(wait_for(kvc_erase(f.client, &f.schema, NULL, 0, NULL, 0, NULL, 0, &op), &op));
    assert_status(
        kvc_erase(f.client, &f.schema, digests, 1, parts, KVC_MAX_PARTS + 1, &info, 0, &op),
        KVC_INVALID);
    free(digests);
    fixture_stop(&f);
}

static void test_hold(void **state)
{
    (void)state;
    fixture f;
    kvc_hold_info info;
    kvc_op op;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 20);
    kvc_op_init(&op, NULL, NULL);
    assert_ok(wait_for(kvc_hold(context, 777, &info, 0, &op), &op));
    uint64_t first = info.hold;
    assert_true(first > 1000);
    assert_int_equal(info.ttl_ms, 777);
    assert_int_equal(info.n_blocks, 12);
    assert_int_equal(info.tenant_bytes, 13);
    assert_int_equal(info.max_bytes, 14);
    assert_ok(wait_for(kvc_hold_renew(f.client, first, 5, &info, 0, &op), &op));
    assert_int_equal(info.hold, first);
    assert_status(kvc_hold_renew(f.client, 0, 5, &info, 0, &op), KVC_INVALID);
    /* A stale handle is opened again, and the hold goes on with the new one. */
    fake_make_stale(&f.fake);
    assert_ok(wait_for(kvc_hold(context, 1, &info, 0, &op), &op));
    assert_true(info.hold > first);
    assert_int_equal(fake_calls(&f.fake, KVC_OPEN_CONTEXT), 2);
    assert_ok(wait_for(kvc_release(f.client, info.hold, 0, &op), &op));
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_RELEASE,
                                        .action = FAKE_STATUS,
                                        .times = 1,
                                        .status = KVC_NOT_FOUND});
    assert_status(wait_for(kvc_release(f.client, info.hold, 0, &op), &op), KVC_NOT_FOUND);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_HOLD,
                                        .action = FAKE_STATUS,
                                        .times = 1,
                                        .status = KVC_NO_SPACE});
    assert_status(wait_for(kvc_hold(context, 1, &info, 0, &op), &op), KVC_NO_SPACE);
    kvc_context_close(context);
    fixture_stop(&f);
}

/* A hold whose answer was lost may be there, with a name that nobody knows: no second one. */
static void test_hold_is_not_made_twice(void **state)
{
    (void)state;
    static const kvc_status lost[] = {KVC_UNAVAILABLE, KVC_CLOSED};
    fake_rule rule = {.method = KVC_HOLD, .action = FAKE_STATUS, .times = 1};
    fixture f;
    kvc_hold_info info;
    kvc_op op;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 20);
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < 2; i++) {
        rule.status = lost[i];
        fake_add_rule(&f.fake, &rule);
        assert_status(wait_for(kvc_hold(context, 777, &info, in_ms(PATIENCE_MS), &op), &op),
                      lost[i]);
        assert_int_equal(fake_calls(&f.fake, KVC_HOLD), i + 1);
        assert_int_equal(info.hold, 0);
    }
    /* Where there is none for certain, it is asked for again; and renewing may be repeated. */
    rule.status = KVC_AGAIN;
    fake_add_rule(&f.fake, &rule);
    assert_ok(wait_for(kvc_hold(context, 777, &info, in_ms(PATIENCE_MS), &op), &op));
    assert_int_equal(fake_calls(&f.fake, KVC_HOLD), 4);
    rule.status = KVC_UNAVAILABLE;
    fake_add_rule(&f.fake, &rule);
    assert_ok(
        wait_for(kvc_hold_renew(f.client, info.hold, 5, &info, in_ms(PATIENCE_MS), &op), &op));
    assert_int_equal(fake_calls(&f.fake, KVC_HOLD), 6);
    kvc_context_close(context);
    fixture_stop(&f);
}

static void test_prefetch(void **state)
{
    (void)state;
    fixture f;
    kvc_prefetch_info info;
    uint32_t parts[] = {3, 4, 5};
    kvc_op op;
    fixture_start(&f);
    kvc_context *context = fixture_context(&f, 20);
    kvc_op_init(&op, NULL, NULL);
    fake_make_stale(&f.fake);
    assert_ok(kvc_prefetch(context, parts, 3, 6, 7, KVC_TIER_DRAM, &info, 0, &op));
    parts[1] = 99; /* borrowed until the call returned, no longer */
    assert_ok(kvc_op_wait(&op, 0));
    assert_int_equal(info.there, 6);
    assert_int_equal(info.moved, 7);
    assert_int_equal(info.missing, 3);
    assert_int_equal(info.left, KVC_TIER_DRAM);
    assert_int_equal(info.moved_bytes, 4);
    fake_add_rule(&f.fake, &(fake_rule){.method = KVC_PREFETCH,
                                        .action = FAKE_LATE,
                                        .times = 1,
                                        .delay_ms = FAKE_KEEP_MS});
    assert_ok(kvc_prefetch(context, parts, 3, 6, 7, KVC_TIER_DRAM, &info, 0, &op));
    kvc_op_cancel(&op);
    assert_status(kvc_op_wait(&op, 0), KVC_CANCELLED); /* TIMED_OUT, if it waited */
    kvc_context_close(context);
    fixture_stop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_truncate), cmocka_unit_test(test_truncate_unknown),
        cmocka_unit_test(test_fork),     cmocka_unit_test(test_tiers),
        cmocka_unit_test(test_erase),    cmocka_unit_test(test_hold),
        cmocka_unit_test(test_erase),    cmocka_unit_test(test_hold_is_not_made_twice),
        cmocka_unit_test(test_prefetch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
