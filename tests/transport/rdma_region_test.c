/*
 * rdma_region_test.c: the memory that RDMA writes rows to, on fake verbs: what of it is registered,
 * for whom and for how long.
 *
 * Every case ends with nothing of the device's left.
 */
#include "rdma_rooms.h"

#include <sys/resource.h>
#include <unistd.h>

#include "base/lent.h"
#include "base/log.h"
#include "base/metrics.h"
#include "transport/rdma/rdma_internal.h"

#define REST_FOR_EVER_NS ((uint64_t)1 << 60)

/* ---- registrations --------------------------------------------------------------------------- */

static void registration_fails(void **state)
{
    (void)state;
    fixture f;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    rig_wait_registered();
    fake_faults fault = fake_no_faults;
    fault.reg_fails_after = 0;
    fake_verbs_fault(&fault);
    uint64_t failed = kvc_metric_get(KVC_M_rdma_registrations_failed);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (kvc_metric_get(KVC_M_rdma_registrations_failed) == failed && !kvc_expired(give_up_ns))
        assert_false(run_rooms(&f, 1, 16, 5, 1));
    assert_int_equal(kvc_metric_get(KVC_M_rdma_registrations_failed), failed + 1);
    fake_verbs_fault(&fake_no_faults);
    assert_false(run_rooms(&f, 1, 16, 5, 1)); /* it is not asked for again */
    assert_false(fake_verbs_registered(area[1]));
    assert_true(run_rooms(&f, 0, 16, 5, 1));
    rooms_close(&f);
}

/* Nobody waits for a registration; memory that is taken back waits for its end. */
static void registering_is_off_the_path(void **state)
{
    (void)state;
    fixture f;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    fake_faults fault = fake_no_faults;
    fault.reg_stalls = area[1];
    fake_verbs_fault(&fault);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (fake_verbs_stalled() == 0 && !kvc_expired(give_up_ns))
        assert_false(run_rooms(&f, 1, 16, 5, 1));
    assert_int_equal(fake_verbs_stalled(), 1);
    assert_false(run_rooms(&f, 1, 16, 5, 1));
    assert_true(run_rooms(&f, 0, 16, 5, 1));
    fake_verbs_fault(&fake_no_faults);
    kvc_lent_remove(area[1]);
    assert_false(fake_verbs_registered(area[1]));
    assert_ok(kvc_lent_add(area[1], AREA));
    warm(&f, 1);
    rooms_close(&f);
}

/* The region that was used least recently makes room, unless the server may write there. */
static void least_recently_used_goes(void **state)
{
    (void)state;
    fixture f;
    fetch held;
    kvtr_region_rest_ns = 0;
    rooms_open(&f, NULL, 2 * (uint64_t)AREA, false);
    uint64_t evicted = kvc_metric_get(KVC_M_rdma_regions_evicted);
    warm(&f, 0);
    warm(&f, 1);
    assert_true(run_rooms(&f, 0, 16, 0, 1));
    warm(&f, 2);
    assert_false(fake_verbs_registered(area[1]));
    assert_true(fake_verbs_registered(area[0]));
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted + 1);
    /* One call to each of the two that are left: the third has no room until one is over. */
    fixture_handle(&f, hold_handler);
    rooms_init(&held, &f, 0, 16, 0, 1, PATIENCE_NS);
    job_submit(&held.j);
    wait_held(&f, 1);
    fetch other;
    rooms_init(&other, &f, 2, 16, 0, 1, PATIENCE_NS);
    job_submit(&other.j);
    wait_held(&f, 2);
    fixture_handle(&f, rooms_handler);
    for (int i = 0; i < 50; i++) {
        assert_false(run_rooms(&f, 1, 16, 0, 1));
        usleep(1000);
    }
    assert_true(fake_verbs_registered(area[0]) && fake_verbs_registered(area[2]));
    uint32_t n_done = f.n_done;
    assert_int_equal(answer_held(&f), 2);
    wait_done(&f, n_done + 2);
    assert_status(held.j.status, KVC_NOT_FOUND);
    job_fini(&held.j);
    job_fini(&other.j);
    warm(&f, 1);
    rooms_close(&f);
}

/* What was used just now stays: of three that are used in turn, with room for two, two come without
 * a copy all the time and nothing is registered anew. */
static void used_in_turn(void **state)
{
    (void)state;
    fixture f;
    kvtr_region_rest_ns = REST_FOR_EVER_NS;
    rooms_open(&f, NULL, 2 * (uint64_t)AREA, false);
    uint64_t evicted = kvc_metric_get(KVC_M_rdma_regions_evicted);
    warm(&f, 0);
    warm(&f, 1);
    for (int i = 0; i < 50; i++) {
        assert_true(run_rooms(&f, 0, 16, 0, 1));
        assert_true(run_rooms(&f, 1, 16, 0, 1));
        assert_false(run_rooms(&f, 2, 16, 0, 1));
        usleep(1000); /* for the thread that would do it */
    }
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted);
    kvc_lent_remove(area[0]); /* its sequence is over, and the third has room at once */
    warm(&f, 2);
    assert_ok(kvc_lent_add(area[0], AREA));
    rooms_close(&f);
}

/* Nothing goes where that would not be enough: half of the room is in use, and the third area needs
 * more than the rest. */
static void evicted_in_vain(void **state)
{
    (void)state;
    fixture f;
    fetch held;
    uint8_t *half = area[0] + AREA / 2;
    kvtr_region_rest_ns = 0;
    rooms_open(&f, NULL, AREA, false);
    kvc_lent_remove(area[0]);
    assert_ok(kvc_lent_add(area[0], AREA / 2));
    assert_ok(kvc_lent_add(half, AREA / 2));
    warm(&f, 0);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (!run_rooms(&f, 0, 16, SLOTS / 2, 1) && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_true(fake_verbs_registered(half));
    uint64_t evicted = kvc_metric_get(KVC_M_rdma_regions_evicted);
    fixture_handle(&f, hold_handler);
    rooms_init(&held, &f, 0, 16, 0, 1, PATIENCE_NS);
    job_submit(&held.j);
    wait_held(&f, 1);
    fixture_handle(&f, rooms_handler);
    for (int i = 0; i < 50; i++) {
        assert_false(run_rooms(&f, 1, 16, 0, 1));
        usleep(1000);
    }
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted);
    uint32_t n_done = f.n_done;
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, n_done + 1);
    job_fini(&held.j);
    warm(&f, 1); /* now both halves go */
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted + 2);
    kvc_lent_remove(half);
    kvc_lent_remove(area[0]);
    assert_ok(kvc_lent_add(area[0], AREA));
    rooms_close(&f);
}

/* A region that is larger than all there is room for is copied to, and counted once. */
static void too_large(void **state)
{
    (void)state;
    fixture f;
    uint64_t n = kvc_metric_get(KVC_M_rdma_regions_too_large);
    rooms_open(&f, NULL, AREA - 1, false);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (kvc_metric_get(KVC_M_rdma_regions_too_large) == n && !kvc_expired(give_up_ns)) {
        assert_false(run_rooms(&f, 0, 16, 0, 1));
        usleep(1000);
    }
    for (int i = 0; i < 20; i++)
        assert_false(run_rooms(&f, 0, 16, 0, 1));
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_too_large), n + 1);
    assert_false(fake_verbs_registered(area[0]));
    rooms_close(&f);
}

/* The limit is that of two connections together: while one has all of it, the other has nothing. */
static void assert_shared(fixture *f)
{
    struct rlimit before;
    kvt_conn *first = f->conn;
    warm(f, 0);
    assert_int_equal(getrlimit(RLIMIT_MEMLOCK, &before), 0);
    struct rlimit now = {4 * AREA, before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &now), 0);
    fixture_connect(f, 1);
    assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &before), 0);
    for (int i = 0; i < 20; i++) {
        assert_false(run_rooms(f, 0, 16, 0, 1));
        assert_false(run_rooms(f, 1, 16, 0, 1));
        usleep(1000);
    }
    f->ops->conn_close(first);
    warm(f, 1);
}

/* What may be locked is not all for regions, however many connections there are. */
static void locked_memory_is_limited(void **state)
{
    (void)state;
    struct rlimit before;
    assert_int_equal(getrlimit(RLIMIT_MEMLOCK, &before), 0);
    for (rlim_t areas = 3; areas <= 4; areas++) {
        struct rlimit now = {areas * AREA, before.rlim_max};
        fixture f;
        if (before.rlim_max != RLIM_INFINITY && before.rlim_max < now.rlim_cur)
            skip();
        assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &now), 0);
        rooms_open(&f, NULL, 0, false);
        assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &before), 0);
        for (int i = 0; i < 20 && areas == 3; i++) {
            assert_false(run_rooms(&f, 0, 16, 0, 1));
            usleep(1000);
        }
        if (areas == 4)
            assert_shared(&f);
        rooms_close(&f);
    }
}

/* Each connection registers for itself: a key opens nothing to another connection's server. */
static void keys_are_of_a_connection(void **state)
{
    (void)state;
    fixture f;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    assert_int_equal(fake_verbs_n_registered(area[0]), 1);
    kvt_conn *first = f.conn;
    fixture_connect(&f, 1);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (fake_verbs_n_registered(area[0]) < 2 && !kvc_expired(give_up_ns))
        (void)run_rooms(&f, 0, 2, 0, 1);
    assert_int_equal(fake_verbs_n_registered(area[0]), 2);
    f.ops->conn_close(f.conn);
    assert_int_equal(fake_verbs_n_registered(area[0]), 1);
    f.conn = first;
    assert_true(run_rooms(&f, 0, 16, 0, 1));
    rooms_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(registration_fails),       cmocka_unit_test(registering_is_off_the_path),
        cmocka_unit_test(least_recently_used_goes), cmocka_unit_test(keys_are_of_a_connection),
        cmocka_unit_test(locked_memory_is_limited), cmocka_unit_test(used_in_turn),
        cmocka_unit_test(evicted_in_vain),          cmocka_unit_test(too_large),
    };
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    suite_uri = "rdma://127.0.0.1:0";
    return cmocka_run_group_tests(tests, rooms_make, rooms_drop);
}
