/*
 * rdma_fault_test.c: the RDMA transport on verbs that fail: completions, events, registrations.
 *
 * Every case ends with a request that goes well and with nothing of the device's left. The verbs
 * are those of fake_verbs.h, so this runs anywhere.
 */
#include "rdma_rig.h"

#include <unistd.h>

#include "base/log.h"
#include "base/metrics.h"

/* A mixture in flight at once, each of which ends well or with the connection's end. A fault hits
 * one of the first twelve work requests that it takes, so not all of them end well. */
static void run_mixture(fixture *f)
{
    enum { N = 6 };
    bulk b[N];
    uint32_t n_before = f->n_done, n_ok = 0;
    for (uint32_t i = 0; i < N; i++) {
        bulk_init(&b[i], f, i % 2 ? KVC_PUT_BLOCKS : KVC_FETCH_ROWS, i == 1 ? 100 : 200000);
        job_submit(&b[i].j);
    }
    wait_done(f, n_before + N);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(atomic_load(&b[i].j.n_done), 1);
        assert_true(b[i].j.status == KVC_OK || b[i].j.status == KVC_UNAVAILABLE);
        n_ok += b[i].j.status == KVC_OK;
        assert_false(b[i].wrong);
        job_fini(&b[i].j);
    }
    assert_true(fake_verbs_hits() > 0);
    assert_true(n_ok < N);
}

/* ---- faults ---------------------------------------------------------------------------------- */

static void every_completion_status(void **state)
{
    (void)state;
    rig_set_reply(64, 4096);
    for (int wc = IBV_WC_LOC_LEN_ERR; wc <= IBV_WC_GENERAL_ERR; wc++) {
        fixture f;
        rig_open_on(&f, NULL);
        for (uint32_t after = 1; after <= 9; after += 2) {
            fake_faults fault = fake_no_faults;
            fault.wc = (enum ibv_wc_status)wc;
            fault.wc_after = after;
            uint64_t failed = kvc_metric_get(KVC_M_rdma_completions_failed);
            fake_verbs_fault(&fault);
            run_mixture(&f);
            assert_int_equal(fake_verbs_hits(), 1);
            /* The other end may have told of the end before this one has looked. A flush says that
             * something else went before, and does not count. */
            uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
            while (wc != IBV_WC_WR_FLUSH_ERR && !kvc_expired(give_up_ns) &&
                   kvc_metric_get(KVC_M_rdma_completions_failed) == failed)
                usleep(1000);
            assert_true(wc == IBV_WC_WR_FLUSH_ERR ||
                        kvc_metric_get(KVC_M_rdma_completions_failed) > failed);
            fake_verbs_fault(&fake_no_faults);
            rig_assert_recovers(&f);
        }
        rig_close_all(&f);
    }
}

static void posts_fail(void **state)
{
    (void)state;
    rig_set_reply(64, 4096);
    for (uint32_t after = 0; after < 12; after++) {
        fixture f;
        rig_open_on(&f, NULL);
        fake_faults fault = fake_no_faults;
        fault.post_fails_after = after;
        fake_verbs_fault(&fault);
        run_mixture(&f);
        fake_verbs_fault(&fake_no_faults);
        rig_assert_recovers(&f);
        rig_close_all(&f);
    }
}

static void every_event(void **state)
{
    (void)state;
    rig_set_reply(64, 4096);
    for (int type = RDMA_CM_EVENT_ADDR_RESOLVED; type <= RDMA_CM_EVENT_TIMEWAIT_EXIT; type++) {
        fixture f;
        rig_open_on(&f, NULL);
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
        assert_int_equal(fake_verbs_event((enum rdma_cm_event_type)type), 2);
        rig_assert_recovers(&f);
        rig_close_all(&f);
    }
}

static void every_event_in_flight(void **state)
{
    (void)state;
    rig_set_reply(64, 4096);
    for (int type = RDMA_CM_EVENT_ADDR_RESOLVED; type <= RDMA_CM_EVENT_TIMEWAIT_EXIT; type++) {
        fixture f;
        bulk b;
        rig_open_on(&f, NULL);
        fixture_handle(&f, hold_handler);
        bulk_init(&b, &f, KVC_PUT_BLOCKS, 100000);
        job_submit(&b.j);
        wait_held(&f, 1);
        (void)fake_verbs_event((enum rdma_cm_event_type)type);
        (void)answer_held(&f);
        wait_done(&f, 1);
        assert_true(b.j.status == KVC_NOT_FOUND || b.j.status == KVC_UNAVAILABLE);
        job_fini(&b.j);
        fixture_handle(&f, rig_handler);
        rig_assert_recovers(&f);
        rig_close_all(&f);
    }
}

/* Without memory the payload goes in fragments, against credits; or there is no connection. */
static void registration_fails(void **state)
{
    (void)state;
    rig_set_reply(256, 4096);
    for (uint32_t after = 0; after < 6; after++) {
        fixture f;
        fake_verbs_use(NULL);
        fake_faults fault = fake_no_faults;
        fault.reg_fails_after = after;
        fake_verbs_fault(&fault);
        uint64_t failed = kvc_metric_get(KVC_M_rdma_registrations_failed);
        uint64_t waits = kvc_metric_get(KVC_M_rdma_credit_waits);
        fixture_open(&f, 1);
        fixture_handle(&f, rig_handler);
        kvc_status put = run_bulk(&f, KVC_PUT_BLOCKS, BIG);
        kvc_status got = run_bulk(&f, KVC_FETCH_ROWS, 0);
        assert_status(got, after < 2 ? KVC_UNAVAILABLE : KVC_OK); /* two rings */
        assert_true(put == KVC_OK || put == KVC_UNAVAILABLE || put == KVC_AGAIN);
        uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
        while (after < 5 && kvc_metric_get(KVC_M_rdma_registrations_failed) == failed &&
               !kvc_expired(give_up_ns))
            usleep(1000); /* that of lent memory comes later */
        assert_true(after >= 5 || kvc_metric_get(KVC_M_rdma_registrations_failed) > failed);
        if (after == 2)
            assert_true(kvc_metric_get(KVC_M_rdma_credit_waits) > waits);
        fake_verbs_fault(&fake_no_faults);
        rig_assert_recovers(&f);
        rig_close_all(&f);
    }
}

static void device_gives_nothing(void **state)
{
    (void)state;
    rig_set_reply(4, 4096);
    for (int what = 0; what < 3; what++) {
        fixture f;
        rig_open_on(&f, NULL);
        fake_faults fault = fake_no_faults;
        fault.qp_fails = what == 0;
        fault.cq_fails = what == 1;
        fault.pd_fails = what == 2;
        fake_verbs_fault(&fault);
        assert_status(run_bulk(&f, KVC_FETCH_ROWS, 0), KVC_UNAVAILABLE);
        fake_verbs_fault(&fake_no_faults);
        rig_assert_recovers(&f);
        rig_close_all(&f);
    }
}

/* Idle is a link without calls: one whose answer takes longer than idle_ns stays. */
static void calls_are_not_idle(void **state)
{
    (void)state;
    fixture f;
    bulk b;
    rig_set_reply(4, 4096);
    fake_verbs_use(NULL);
    fixture_init(&f);
    f.listen.idle_ns = 100 * MS;
    fixture_listen(&f);
    fixture_connect(&f, 1);
    fixture_handle(&f, hold_handler);
    bulk_init(&b, &f, KVC_FETCH_ROWS, 0);
    job_submit(&b.j);
    wait_held(&f, 1);
    usleep(800000); /* several looks of the loop past its idle time */
    fixture_handle(&f, rig_handler);
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, 1);
    assert_status(b.j.status, KVC_NOT_FOUND);
    job_fini(&b.j);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (fake_verbs_live().qps > 0 && !kvc_expired(give_up_ns)) /* then it is idle */
        usleep(5000);
    assert_int_equal(fake_verbs_live().qps, 0);
    rig_assert_recovers(&f);
    rig_close_all(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_completion_status),
        cmocka_unit_test(posts_fail),
        cmocka_unit_test(every_event),
        cmocka_unit_test(every_event_in_flight),
        cmocka_unit_test(registration_fails),
        cmocka_unit_test(device_gives_nothing),
        cmocka_unit_test(calls_are_not_idle),
    };
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    suite_uri = "rdma://127.0.0.1:0";
    return cmocka_run_group_tests(tests, rig_make_lent, rig_drop_lent);
}
