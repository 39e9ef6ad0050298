/*
 * metrics_test.c: counters over many threads, gauges, the snapshot, and fault points.
 */
#include "support.h"

#include <signal.h>

#include "base/fault.h"
#include "base/histogram.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/thread.h"

#define THREADS  20 /* more than there are shards */
#define PER_EACH 1000

static int setup(void **state)
{
    (void)state;
    kvc_metrics_reset();
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    kvc_log_set_level(KVC_LOG_LEVEL_WARN);
    return kvc_fault_arm(NULL);
}

static void count_some(void *arg)
{
    (void)arg;
    for (int i = 0; i < PER_EACH; i++) {
        KVC_COUNT(requests);
        KVC_COUNT_N(put_bytes, 3);
        KVC_GAUGE_ADD(requests_in_flight, 2);
        KVC_GAUGE_SUB(requests_in_flight, 1);
        (void)kvc_metric_get(KVC_M_requests);
    }
}

static kvc_histogram histogram;

static void time_some(void *arg)
{
    (void)arg;
    for (uint32_t i = 0; i < PER_EACH; i++)
        kvc_histogram_add(&histogram, 300000);
}

static void durations_fall_into_their_buckets(void **state)
{
    (void)state;
    kvc_histogram own = {0};
    kvc_histogram_view view;
    uint64_t sum_ns = UINT64_C(1) << 40;
    for (uint32_t i = 0; i < KVC_HISTOGRAM_BOUNDS; i++) {
        char *end;
        double seconds = strtod(kvc_histogram_bounds[i].seconds, &end);
        assert_true(*end == 0);
        assert_true(seconds * 1e9 > (double)kvc_histogram_bounds[i].ns - 0.5 &&
                    seconds * 1e9 < (double)kvc_histogram_bounds[i].ns + 0.5);
        kvc_histogram_add(&own, kvc_histogram_bounds[i].ns); /* the bound itself is within */
        kvc_histogram_add(&own, kvc_histogram_bounds[i].ns + 1);
        sum_ns += 2 * kvc_histogram_bounds[i].ns + 1;
    }
    kvc_histogram_add(&own, UINT64_C(1) << 40);
    kvc_histogram_read(&own, &view);
    for (uint32_t i = 0; i < KVC_HISTOGRAM_BOUNDS; i++)
        assert_int_equal(view.below[i], 2 * i + 1);
    assert_int_equal(view.count, 2 * KVC_HISTOGRAM_BOUNDS + 1);
    assert_int_equal(view.sum_ns, sum_ns);
}

static void durations_of_all_threads_add_up(void **state)
{
    (void)state;
    kvc_thread threads[THREADS];
    kvc_histogram_view view;
    for (int i = 0; i < THREADS; i++)
        assert_ok(kvc_thread_start(&threads[i], "timer", time_some, NULL));
    for (int i = 0; i < THREADS; i++)
        kvc_thread_join(&threads[i]);
    kvc_histogram_read(&histogram, &view);
    assert_int_equal(view.count, THREADS * PER_EACH);
    assert_int_equal(view.below[2], 0);
    assert_int_equal(view.below[3], THREADS * PER_EACH);
    assert_int_equal(view.sum_ns, THREADS * PER_EACH * UINT64_C(300000));
}

static void counts_of_all_threads_add_up(void **state)
{
    (void)state;
    kvc_thread threads[THREADS];
    kvc_metric_value values[KVC_METRIC_COUNT];
    for (int i = 0; i < THREADS; i++)
        assert_ok(kvc_thread_start(&threads[i], "counter", count_some, NULL));
    for (int i = 0; i < THREADS; i++)
        kvc_thread_join(&threads[i]);
    kvc_metrics_snapshot(values);
    assert_int_equal(values[KVC_M_requests].value, THREADS * PER_EACH);
    assert_int_equal(values[KVC_M_put_bytes].value, 3 * THREADS * PER_EACH);
    assert_int_equal(values[KVC_M_requests_in_flight].value, THREADS * PER_EACH);
    assert_string_equal(values[KVC_M_put_bytes].name, "put_bytes");
    assert_int_equal(values[KVC_M_requests_in_flight].kind, KVC_METRIC_GAUGE);
    kvc_metrics_reset();
    assert_int_equal(kvc_metric_get(KVC_M_requests), 0);
}

/* Added on one thread, subtracted on another: a shard goes below zero, the sum does not. */
static void subtract(void *arg)
{
    (void)arg;
    KVC_GAUGE_SUB(contexts_open, 4);
}

static void gauges_cross_threads(void **state)
{
    (void)state;
    kvc_thread thread;
    KVC_GAUGE_ADD(contexts_open, 5);
    assert_ok(kvc_thread_start(&thread, "subtract", subtract, NULL));
    kvc_thread_join(&thread);
    assert_int_equal(kvc_metric_get(KVC_M_contexts_open), 1);
    KVC_GAUGE_SUB(contexts_open, 4);
    assert_int_equal(kvc_metric_get(KVC_M_contexts_open), 0);
}

static void table_is_well_formed(void **state)
{
    (void)state;
    kvc_metric_value values[KVC_METRIC_COUNT];
    kvc_metrics_snapshot(values);
    for (int i = 0; i < KVC_METRIC_COUNT; i++) {
        assert_true(values[i].help[0] != '\0');
        assert_int_equal(strspn(values[i].name, "abcdefghijklmnopqrstuvwxyz0123456789_"),
                         strlen(values[i].name));
        for (int j = 0; j < i; j++)
            assert_string_not_equal(values[i].name, values[j].name);
    }
}

static void subtract_from_a_counter(void *arg)
{
    (void)arg;
    KVC_GAUGE_SUB(requests, 1);
}

static void counters_never_go_down(void **state)
{
    (void)state;
    assert_int_equal(support_death_signal(subtract_from_a_counter, NULL), SIGABRT);
}

/* The pattern of eight passes: '1' where it failed. */
static void expect_pattern(const char *spec, const char *wanted)
{
    char pattern[9] = "";
    assert_ok(kvc_fault_arm(spec));
    for (int i = 0; i < 8; i++)
        pattern[i] = KVC_FAULT("a.point") ? '1' : '0';
    assert_string_equal(pattern, wanted);
}

static void fault_modes(void **state)
{
    (void)state;
    expect_pattern(NULL, "00000000");
    expect_pattern("a.point=always", "11111111");
    expect_pattern("a.point=once", "10000000");
    expect_pattern("a.point=every:3", "00100100");
    expect_pattern("a.point=after:5", "00000111");
    expect_pattern("a.point=after:0", "11111111");
    expect_pattern("a.point=nth:2", "01000000");
    assert_int_equal(kvc_fault_passes("a.point"), 8);
    assert_int_equal(kvc_fault_failures("a.point"), 1);
    expect_pattern("b=once,a.point=nth:4,c=always", "00010000");
    expect_pattern("b=always", "00000000");
    assert_int_equal(kvc_fault_passes("a.point"), 0);
    assert_int_equal(kvc_metric_get(KVC_M_faults_injected), 8 + 1 + 2 + 3 + 8 + 1 + 1);
}

static void bad_fault_specs_change_nothing(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "x",
        "=once",
        "x=",
        "x=never",
        "x=every",
        "x=every:",
        "x=every:0",
        "x=nth:0",
        "x=every:-1",
        "x=once,",
        ",x=once",
        "x=once,,y=once",
        "a-name-of-more-than-forty-seven-bytes-is-not-taken=once",
    };
    char many[KVC_FAULT_POINTS_MAX * 8 + 16] = "";
    assert_ok(kvc_fault_arm("keep=always"));
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert_status(kvc_fault_arm(bad[i]), KVC_INVALID);
    for (int i = 0; i <= KVC_FAULT_POINTS_MAX; i++)
        (void)snprintf(many + strlen(many), sizeof(many) - strlen(many), "%sx=once",
                       i == 0 ? "" : ",");
    assert_status(kvc_fault_arm(many), KVC_INVALID);
    assert_true(KVC_FAULT("keep"));
}

static void environment_arms(void **state)
{
    (void)state;
    assert_int_equal(setenv("KVASIR_FAULT", "env.point=once", 1), 0);
    assert_ok(kvc_fault_arm_env());
    assert_true(KVC_FAULT("env.point"));
    assert_false(KVC_FAULT("env.point"));
    assert_int_equal(setenv("KVASIR_FAULT", "env.point", 1), 0);
    assert_status(kvc_fault_arm_env(), KVC_INVALID);
    assert_int_equal(unsetenv("KVASIR_FAULT"), 0);
    assert_ok(kvc_fault_arm_env());
}

static void pass_often(void *arg)
{
    uint64_t *failures = arg;
    for (int i = 0; i < PER_EACH; i++)
        *failures += KVC_FAULT("shared") ? 1 : 0;
}

static void faults_are_counted_across_threads(void **state)
{
    (void)state;
    kvc_thread threads[4];
    uint64_t failures[4] = {0};
    assert_ok(kvc_fault_arm("shared=every:4"));
    for (int i = 0; i < 4; i++)
        assert_ok(kvc_thread_start(&threads[i], "passer", pass_often, &failures[i]));
    for (int i = 0; i < 4; i++)
        kvc_thread_join(&threads[i]);
    assert_int_equal(failures[0] + failures[1] + failures[2] + failures[3], PER_EACH);
    assert_int_equal(kvc_fault_passes("shared"), 4 * PER_EACH);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(durations_fall_into_their_buckets),
        cmocka_unit_test(durations_of_all_threads_add_up),
        cmocka_unit_test_setup_teardown(counts_of_all_threads_add_up, setup, teardown),
        cmocka_unit_test_setup_teardown(gauges_cross_threads, setup, teardown),
        cmocka_unit_test_setup_teardown(table_is_well_formed, setup, teardown),
        cmocka_unit_test_setup_teardown(counters_never_go_down, setup, teardown),
        cmocka_unit_test_setup_teardown(fault_modes, setup, teardown),
        cmocka_unit_test_setup_teardown(bad_fault_specs_change_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(environment_arms, setup, teardown),
        cmocka_unit_test_setup_teardown(faults_are_counted_across_threads, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
