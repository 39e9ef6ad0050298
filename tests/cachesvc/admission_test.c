/*
 * admission_test.c: the day's budget of writes to lmdb, with the clock in the test's hands.
 *
 * One thread. What a server does with it is in store_test.c.
 */
#include "admission.h"
#include "harness.h"

static void test_budget_days(void **state)
{
    kvs_admission a;
    (void)state;
    kvs_admission_init(&a, KVS_ADMIT_SECOND_USE, 100, 1000);
    assert_true(kvs_admission_take(&a, 60, 1000));
    assert_false(kvs_admission_take(&a, 41, 1001));
    assert_true(kvs_admission_take(&a, 40, 1002));
    assert_false(kvs_admission_on_use(&a, 1003));
    assert_false(kvs_admission_take(&a, 1, 999 + KVS_ADMISSION_DAY_NS));
    assert_true(kvs_admission_on_use(&a, 1000 + KVS_ADMISSION_DAY_NS));
    kvs_admission_spend(&a, 150, 1001 + KVS_ADMISSION_DAY_NS);
    assert_false(kvs_admission_take(&a, 1, 1002 + KVS_ADMISSION_DAY_NS));
    assert_false(kvs_admission_take(&a, 1, 1000 + 2 * KVS_ADMISSION_DAY_NS));
    assert_true(kvs_admission_take(&a, 100, 1001 + 2 * KVS_ADMISSION_DAY_NS));
    kvs_admission_fini(&a);
    kvs_admission_init(&a, KVS_ADMIT_ALL, 0, 0);
    assert_true(kvs_admission_take(&a, UINT64_MAX / 2, 0));
    assert_true(kvs_admission_take(&a, UINT64_MAX / 2, 1));
    assert_false(kvs_admission_on_use(&a, 2));
    kvs_admission_fini(&a);
}

/* A day goes on in the next process, with no more left of it than there was. */
static void test_budget_days_go_on(void **state)
{
    const uint64_t wall = 50 * KVS_ADMISSION_DAY_NS, hour = 3600000000000ull;
    kvs_admission a;
    kvs_admission_day day;
    (void)state;
    kvs_admission_init(&a, KVS_ADMIT_ALL, 6400, 1000);
    assert_false(kvs_admission_due(&a, 1000, wall, false, &day));
    assert_true(kvs_admission_take(&a, 3000, 1000));
    assert_true(kvs_admission_due(&a, 1000 + hour, wall + hour, false, &day));
    assert_int_equal(day.start_wall_ns, wall);
    assert_int_equal(day.spent_bytes, 3100);
    kvs_admission_kept(&a, &day);
    assert_true(kvs_admission_take(&a, 100, 1001));
    assert_false(kvs_admission_due(&a, 1001, wall, false, &day)); /* still covered */
    assert_true(kvs_admission_take(&a, 1, 1001));
    assert_true(kvs_admission_due(&a, 1001, wall, false, &day));
    assert_true(kvs_admission_due(&a, 1000, wall, true, &day));
    assert_int_equal(day.spent_bytes, 3101); /* a clean end says what was spent, and no more */
    kvs_admission_fini(&a);
    /* Another process, on a machine that was started a moment ago. */
    kvs_admission_init(&a, KVS_ADMIT_ALL, 6400, 5);
    kvs_admission_take_up(&a, &day, 5, wall + 2 * hour);
    assert_false(kvs_admission_take(&a, 3300, 6));
    assert_true(kvs_admission_take(&a, 3299, 7));
    assert_false(kvs_admission_take(&a, 1, 4 + 22 * hour));
    assert_true(kvs_admission_take(&a, 1, 6 + 22 * hour));
    kvs_admission_fini(&a);
    kvs_admission_init(&a, KVS_ADMIT_ALL, 6400, 5);
    kvs_admission_take_up(&a, &day, 5, wall + KVS_ADMISSION_DAY_NS); /* it is over */
    assert_true(kvs_admission_take(&a, 6400, 6));
    kvs_admission_fini(&a);
    kvs_admission_init(&a, KVS_ADMIT_ALL, 6400, 5);
    kvs_admission_take_up(&a, &day, 5, wall - hour); /* the clock was set back */
    assert_false(kvs_admission_take(&a, 3300, 6));
    assert_false(kvs_admission_take(&a, 3300, 4 + KVS_ADMISSION_DAY_NS));
    assert_true(kvs_admission_take(&a, 3300, 5 + KVS_ADMISSION_DAY_NS));
    kvs_admission_fini(&a);
}

/* Processes that die one after the other, each after a write: the day's budget is left for others.
 */
static void test_budget_in_a_crash_loop(void **state)
{
    const uint64_t wall = 50 * KVS_ADMISSION_DAY_NS, budget = 1ull << 30;
    kvs_admission a;
    kvs_admission_day day = {.start_wall_ns = wall, .exact = true};
    (void)state;
    for (uint32_t i = 0; i < 5000; i++) {
        kvs_admission_init(&a, KVS_ADMIT_ALL, budget, 5);
        kvs_admission_take_up(&a, &day, 5, wall + i);
        assert_true(kvs_admission_take(&a, 100, 6));
        if (kvs_admission_due(&a, 7, wall + i, false, &day))
            kvs_admission_kept(&a, &day);
        assert_true(day.spent_bytes >= 100 * (i + 1ull)); /* never with more left than there is */
        kvs_admission_fini(&a);
    }
    assert_in_range(day.spent_bytes, 500000 + budget / 64, 500000 + budget / 32 + 5000 * 256);
    kvs_admission_init(&a, KVS_ADMIT_ALL, budget, 5);
    kvs_admission_take_up(&a, &day, 5, wall + 5000);
    assert_true(kvs_admission_take(&a, budget / 10 * 9, 6));
    kvs_admission_fini(&a);
}

/* What was spent of a day is not covered by a record of the day before that was on its way. */
static void test_budget_day_turns_meanwhile(void **state)
{
    const uint64_t wall = 50 * KVS_ADMISSION_DAY_NS, start = 1000;
    kvs_admission a;
    kvs_admission_day day, next;
    (void)state;
    kvs_admission_init(&a, KVS_ADMIT_ALL, 6400, start);
    assert_true(kvs_admission_take(&a, 6000, start));
    assert_true(kvs_admission_due(&a, start + 1, wall + 1, false, &day));
    assert_true(kvs_admission_take(&a, 5000, start + 2 + KVS_ADMISSION_DAY_NS));
    kvs_admission_kept(&a, &day);
    kvs_admission_spend(&a, 0, start + 1 + KVS_ADMISSION_DAY_NS); /* looked at its clock before */
    assert_true(kvs_admission_due(&a, start + 3 + KVS_ADMISSION_DAY_NS,
                                  wall + 3 + KVS_ADMISSION_DAY_NS, false, &next));
    assert_int_equal(next.start_wall_ns, wall + 2 + KVS_ADMISSION_DAY_NS);
    assert_int_equal(next.spent_bytes, 5100);
    kvs_admission_kept(&a, &next);
    assert_true(kvs_admission_take(&a, 1400, start + 4 + KVS_ADMISSION_DAY_NS));
    assert_true(kvs_admission_due(&a, start + 5 + KVS_ADMISSION_DAY_NS, wall, false, &next));
    assert_int_equal(next.spent_bytes, 6500);
    kvs_admission_kept(&a, &next);
    kvs_admission_spend(&a, 5000, start + 6 + KVS_ADMISSION_DAY_NS); /* nothing is left anyway */
    assert_false(kvs_admission_due(&a, start + 7 + KVS_ADMISSION_DAY_NS, wall, false, &next));
    /* No record begins a day, or speaks of one that has ended. */
    assert_false(kvs_admission_due(&a, start + 2 + 2 * KVS_ADMISSION_DAY_NS, wall, true, &next));
    assert_true(kvs_admission_take(&a, 6400, start + 3 * KVS_ADMISSION_DAY_NS));
    assert_false(kvs_admission_take(&a, 1, start - 1 + 4 * KVS_ADMISSION_DAY_NS));
    kvs_admission_fini(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_budget_days),
        cmocka_unit_test(test_budget_days_go_on),
        cmocka_unit_test(test_budget_in_a_crash_loop),
        cmocka_unit_test(test_budget_day_turns_meanwhile),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
