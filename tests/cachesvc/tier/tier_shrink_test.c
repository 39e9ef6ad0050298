/*
 * tier_shrink_test.c: what the lmdb tier gives back: the file and the place of a size class that
 * holds nothing any more.
 */
#include "tier_support.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"

#define PATIENCE_NS 60000000000ull

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    tut_log_clear();
    tut_init(t, kvs_tier_find("lmdb"), NULL);
    t->opts.row_sums_bytes = 0; /* every read looks at the file */
    *state = t;
    return 0;
}

static int teardown(void **state)
{
    tut_fini(*state);
    free(*state);
    return 0;
}

static bool class_is_there(const tier_under_test *t, uint32_t pages)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/class-%u", t->dir, pages);
    return access(path, F_OK) == 0;
}

static void wait_until_gone(const tier_under_test *t, uint32_t pages)
{
    uint64_t until = kvc_deadline_ns(PATIENCE_NS);

    while (class_is_there(t, pages)) {
        assert_true(kvc_now_ns() < until);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
}

typedef struct listed {
    kvs_value_key key;
    kvs_slot slot;
    shape s;
} listed;

#define MAX_LISTED 4096u
static listed found[MAX_LISTED];
static uint32_t n_found;

static bool list_one(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                     uint32_t n_rows)
{
    (void)arg;
    if (n_found < MAX_LISTED)
        found[n_found++] = (listed){*key, slot, {row_bytes, n_rows}};
    return true;
}

/* Opens the tier and reads every value that it says it has; all are of version 1. */
static void open_and_read(tier_under_test *t, uint32_t n_values)
{
    n_found = 0;
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->recover(t->tier, list_one, NULL), KVC_OK);
    assert_int_equal(n_found, n_values);
    for (uint32_t i = 0; i < n_found; i++)
        assert_value(t, &found[i].key, 1, found[i].s, found[i].slot);
}

/* One value of each of eight sizes, of 2 to 9 pages. */
static void put_eight(tier_under_test *t, kvs_slot *slots)
{
    for (uint32_t i = 0; i < 8; i++) {
        kvs_value_key key = key_of(1, i, 0);
        put_result r = put_value(t, &key, 1, (shape){4096, i + 1}, true);
        assert_int_equal(r.status, KVC_OK);
        slots[i] = r.slot;
    }
}

/* The last value goes, and with it the class: file, budget and place; a ninth size takes it. */
static void test_empty_class_gives_its_place(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key gone = key_of(1, 3, 0), ninth = key_of(1, 9, 0), again = key_of(1, 10, 0);
    kvs_slot slots[8];
    bool equal;

    assert_int_equal(tut_open(t), KVC_OK);
    put_eight(t, slots);
    assert_int_equal(put_value(t, &ninth, 1, (shape){4096, 9}, true).status, KVC_NO_SPACE);
    t->ops->release(t->tier, &gone, slots[3]);
    wait_until_gone(t, 5);
    put_result r = put_value(t, &ninth, 1, (shape){4096, 9}, true);
    assert_int_equal(r.status, KVC_OK);
    assert_int_equal(put_value(t, &again, 1, (shape){4096, 4}, true).status, KVC_NO_SPACE);
    for (uint32_t i = 0; i < 8; i++) {
        kvs_value_key key = key_of(1, i, 0);
        if (i != 3)
            assert_value(t, &key, 1, (shape){4096, i + 1}, slots[i]);
    }
    assert_int_not_equal(check_rows(t, &gone, 1, (shape){4096, 4}, slots[3], 0, 4, &equal), KVC_OK);
    assert_value(t, &ninth, 1, (shape){4096, 9}, r.slot);
    tut_close(t);
    open_and_read(t, 8);
}

/* A read that comes after the file went finds nothing, and the size can come back. */
static void test_size_comes_back(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 0);
    const shape s = {4096, 4};
    bool equal;

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t round = 1; round <= 3; round++) {
        put_result r = put_value(t, &key, round, s, round % 2);
        assert_int_equal(r.status, KVC_OK);
        assert_value(t, &key, round, s, r.slot);
        t->ops->release(t->tier, &key, r.slot);
        assert_int_equal(
            t->ops->sync_releases(t->tier, &(kvs_tier_shape){s.row_bytes, s.n_rows}, 1), KVC_OK);
        if (round == 1)
            continue; /* at once: the class is there still */
        wait_until_gone(t, 5);
        assert_int_equal(check_rows(t, &key, round, s, r.slot, 0, 4, &equal), KVC_NOT_FOUND);
        assert_int_equal(
            t->ops->sync_releases(t->tier, &(kvs_tier_shape){s.row_bytes, s.n_rows}, 1), KVC_OK);
    }
    assert_int_equal(value_count(t), 0);
}

/* What became empty just before a stop is gone after the next start, with its room. */
static void test_empty_class_goes_at_a_start(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[8];

    assert_int_equal(tut_open(t), KVC_OK);
    put_eight(t, slots);
    for (uint32_t i = 0; i < 8; i += 2) {
        kvs_value_key key = key_of(1, i, 0);
        t->ops->release(t->tier, &key, slots[i]);
    }
    tut_close(t);
    open_and_read(t, 4);
    for (uint32_t i = 0; i < 8; i++)
        assert_int_equal(class_is_there(t, i + 2), i % 2);
    for (uint32_t i = 0; i < 4; i++) {
        kvs_value_key key = key_of(2, i, 0);
        assert_int_equal(put_value(t, &key, 1, (shape){4096, 20 + i}, true).status, KVC_OK);
    }
    assert_int_equal(value_count(t), 8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_empty_class_gives_its_place, setup, teardown),
        cmocka_unit_test_setup_teardown(test_size_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_empty_class_goes_at_a_start, setup, teardown),
    };

    kvc_log_set_sink(tut_log_keep, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
