/*
 * tier_fault_api_test.c: the fault tier fails what its rules name, when they say, with the status
 * they say, and leaves nothing behind in the tier that it wraps.
 */
#include "tier_support.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

static const shape small = {512, 64};

static tier_under_test *make(void **state, const char *tier, const char *faults)
{
    tier_under_test *t = malloc(sizeof(*t));

    assert_non_null(kvs_tier_find(tier));
    tut_init(t, kvs_tier_find(tier), faults);
    *state = t;
    return t;
}

static void test_bad_rules_are_refused(void **state)
{
    static const char *const bad[] = {
        "reserve",         "reserve=every",        "reserve=every:0", "reserve=every:x",
        "reserve=never:3", "reserve=every:3:NOPE", "nothing=every:3", "commit=every:3",

    };
    tier_under_test t;

    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        tut_init(&t, kvs_tier_find("fault:dram"), bad[i]);
        assert_int_equal(tut_open(&t), KVC_INVALID);
        assert_null(t.tier);
    }
    t.opts.fault = NULL;
    assert_int_equal(tut_open(&t), KVC_INVALID);
    t.opts.fault = "fault:dram";
    assert_int_equal(tut_open(&t), KVC_INVALID);
    t.opts.fault = "nosuch:reserve=every:3";
    assert_int_equal(tut_open(&t), KVC_INVALID);
    assert_null(kvs_tier_find("nosuch"));
    assert_null(kvs_tier_find(NULL));
}

static void test_every_third_reserve(void **state)
{
    tier_under_test *t = make(state, "fault:dram", "reserve=every:3");

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 1; i <= 12; i++) {
        kvs_value_key key = key_of(1, i, 0);
        kvc_status status = put_value(t, &key, 1, small, false).status;
        assert_int_equal(status, i % 3 == 0 ? KVC_AGAIN : KVC_OK);
    }
    assert_int_equal(value_count(t), 8);
}

static void test_named_status_and_after(void **state)
{
    tier_under_test *t = make(state, "fault:dram", "reserve=after:2:NO_MEMORY");
    kvs_value_key key = key_of(1, 1, 0);

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 1; i <= 5; i++)
        assert_int_equal(put_value(t, &key, 1, small, false).status,
                         i <= 2 ? KVC_OK : KVC_NO_MEMORY);
}

static void test_delay(void **state)
{
    tier_under_test *t = make(state, "fault:dram", "reserve=delay_us:3000");
    kvs_value_key key = key_of(1, 1, 0);

    assert_int_equal(tut_open(t), KVC_OK);
    uint64_t start = kvc_now_ns();
    assert_int_equal(put_value(t, &key, 1, small, false).status, KVC_OK);
    assert_true(kvc_now_ns() - start >= 3000000);
}

static void test_open_fails(void **state)
{
    tier_under_test *t = make(state, "fault:dram", "open=first:1");

    assert_int_equal(tut_open(t), KVC_IO);
    assert_null(t->tier);
}

static bool count_found(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                        uint32_t n_rows)
{
    (void)key;
    (void)slot;
    (void)row_bytes;
    (void)n_rows;
    ++*(uint32_t *)arg;
    return true;
}

/* A write that fails late reached the inner tier; it must not be found there. */
static void test_late_failure_leaves_nothing(void **state)
{
    tier_under_test *t;
    uint32_t ok = 0, found = 0;

    if (kvs_tier_find("fault:lmdb") == NULL)
        skip();
    t = make(state, "fault:lmdb", "done=every:2,read=every:4:CORRUPT,sync=first:1,recover=first:1");
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->recover(t->tier, count_found, &found), KVC_IO);
    kvs_slot slots[10];
    for (uint32_t i = 0; i < 10; i++) {
        kvs_value_key key = key_of(1, i, 0);
        put_result r = put_value(t, &key, 1, small, i % 3 == 0);
        assert_int_equal(r.status, i % 2 == 1 ? KVC_IO : KVC_OK);
        slots[i] = r.slot;
        ok += r.status == KVC_OK;
    }
    for (uint32_t i = 0; i < 10; i += 2) {
        kvs_value_key key = key_of(1, i, 0);
        bool equal;
        kvc_status want = (i / 2 + 1) % 4 == 0 ? KVC_CORRUPT : KVC_OK;
        assert_int_equal(check_rows(t, &key, 1, small, slots[i], 0, small.n_rows, &equal), want);
        assert_true(equal || want != KVC_OK);
    }
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_IO);
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
    assert_int_equal(value_count(t), ok);
    assert_int_equal(t->ops->recover(t->tier, count_found, &found), KVC_OK);
    assert_int_equal(found, ok);
}

enum { EACH = 9 };

typedef struct each {
    kvs_slot slots[EACH];
    kvs_row_range ranges[EACH];
    uint32_t next, n_done;
    kvc_status status[EACH];
} each;

static bool next_each(void *arg, kvs_tier_read *read_p)
{
    each *e = arg;
    uint32_t i = e->next;

    if (i == EACH)
        return false;
    e->next++;
    *read_p = (kvs_tier_read){.key = key_of(1, i, 3),
                              .slot = e->slots[i],
                              .row_bytes = small.row_bytes,
                              .n_rows = small.n_rows,
                              .n_ranges = 1,
                              .ranges = &e->ranges[i],
                              .arg = &e->status[i]};
    return true;
}

static void done_each(void *arg, const kvs_tier_read *read)
{
    each *e = arg;

    e->n_done++;
    *(kvc_status *)read->arg = read->status;
}

/* Values of one call: each is told of once, and one that fails does not spoil the others. */
static void test_each_of_many_values(void **state)
{
    each e = {.next = 0};
    kvs_tier_reads reads = {.next = next_each, .done = done_each, .arg = &e};
    uint8_t want[512 * 64], got[EACH][512 * 5];

    if (kvs_tier_find("fault:lmdb") == NULL) {
        *state = NULL;
        skip();
    }
    tier_under_test *t = make(state, "fault:lmdb", "read=every:4:CORRUPT");
    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; i < EACH; i++) {
        kvs_value_key key = key_of(1, i, 3);
        put_result r = put_value(t, &key, 1, small, false);
        assert_int_equal(r.status, KVC_OK);
        e.slots[i] = r.slot;
        e.ranges[i] = (kvs_row_range){i == 5 ? 60 : i * 5, 5, got[i]};
    }
    t->ops->read_each(t->tier, &reads);
    assert_int_equal(e.n_done, EACH);
    for (uint32_t i = 0; i < EACH; i++) {
        kvs_value_key key = key_of(1, i, 3);
        kvc_status status = i == 5 ? KVC_INVALID : i % 4 == 3 ? KVC_CORRUPT : KVC_OK;
        assert_int_equal(e.status[i], status);
        fill_rows(&key, 1, small, want);
        if (status == KVC_OK)
            assert_memory_equal(got[i], want + (size_t)i * 5 * 512, 5 * 512);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_rules_are_refused),
        cmocka_unit_test_teardown(test_every_third_reserve, tut_delete),
        cmocka_unit_test_teardown(test_named_status_and_after, tut_delete),
        cmocka_unit_test_teardown(test_delay, tut_delete),
        cmocka_unit_test_teardown(test_each_of_many_values, tut_delete),
        cmocka_unit_test_teardown(test_open_fails, tut_delete),
        cmocka_unit_test_teardown(test_late_failure_leaves_nothing, tut_delete),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
