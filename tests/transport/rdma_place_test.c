/*
 * rdma_place_test.c: rows that RDMA writes to where their caller wants them, on fake verbs: holes
 * of missing rows, runs, and WRITEs that come late.
 *
 * Every case ends with nothing of the device's left.
 */
#include "rdma_rooms.h"

#include <unistd.h>

#include "base/le.h"
#include "base/log.h"
#include "base/metrics.h"
#include "fake_peer.h"
#include "transport/rdma/client.h"
#include "wire/wire.h"

/* ---- where rows land ------------------------------------------------------------------------- */

static void rows_land_in_place(void **state)
{
    (void)state;
    static const struct {
        fake_device device;
        uint32_t n, step, n_missing, writes;
    } cases[] = {
        {{32, 256, 16, false, false}, 256, 1, 0, 8},
        {{6, 64, 1, true, false}, 256, 1, 0, 43},
        {{32, 256, 16, false, false}, 100, 3, 0, 100},
        {{32, 256, 16, false, false}, 256, 2, 0, 256},
        {{32, 256, 16, false, false}, 64, 1, 2, 3},  /* rows 20, 40: three runs */
        {{32, 256, 16, false, false}, 30, 5, 1, 29}, /* row 20 */
        {{1, 64, 1, false, false}, 256, 1, 0, 1},    /* copied by the server */
    };
    for (size_t c = 0; c < sizeof(cases) / sizeof(cases[0]); c++) {
        fixture f;
        rooms_open(&f, &cases[c].device, ROOMS_ALL, false);
        warm(&f, 0);
        rig_wait_registered();
        for (uint32_t m = 0; m < cases[c].n_missing; m++)
            missing[m] = (kvc_missing_row){20 * (m + 1), KVC_NOT_FOUND};
        n_missing = cases[c].n_missing;
        uint32_t writes = fake_verbs_posted(IBV_WR_RDMA_WRITE), signals = fake_verbs_signals();
        uint32_t sends = fake_verbs_posted(IBV_WR_SEND);
        uint64_t bytes = kvc_metric_get(KVC_M_rdma_placed_bytes);
        assert_true(run_rooms(&f, 0, cases[c].n, 1, cases[c].step));
        assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE) - writes, cases[c].writes);
        sends = fake_verbs_posted(IBV_WR_SEND) - sends;
        assert_int_equal(fake_verbs_signals() - signals, sends); /* none of them a WRITE's */
        assert_int_equal(kvc_metric_get(KVC_M_rdma_placed_bytes) - bytes,
                         (cases[c].n - n_missing) * ROW_BYTES);
        rooms_close(&f);
    }
}

/* Several rooms in one request; and memory that is not lent is copied to, as is a reply that goes
 * with its frame. */
static void rooms_of_a_request(void **state)
{
    (void)state;
    fixture f;
    fetch t;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    rooms_init(&t, &f, 0, 8, 0, 1, PATIENCE_NS);
    kvt_room rooms[2] = {t.room, t.room};
    rooms[0].n = rooms[1].n = 4;
    rooms[0].first_slot = 100;
    rooms[1].first_slot = 3;
    for (uint32_t i = 0; i < 8; i++)
        t.slots[i] = i < 4 ? 100 + i : i - 1;
    t.j.xfer.rooms = rooms;
    t.j.xfer.n_rooms = 2;
    assert_ok(job_run(&t.j));
    assert_true(t.j.xfer.placed);
    assert_placed(&t);
    job_fini(&t.j);
    assert_false(run_rooms(&f, 0, 0, 0, 1)); /* no rows at all */
    static uint8_t own[8 * ROW_BYTES];
    rooms_init(&t, &f, 0, 8, 0, 1, PATIENCE_NS);
    t.room.base = own;
    assert_ok(job_run(&t.j));
    assert_false(t.j.xfer.placed);
    assert_int_equal(own[0], 0);
    job_fini(&t.j);
    n_missing = 7; /* one row is left, which goes behind its frame where that is small */
    for (uint32_t m = 0; m < n_missing; m++)
        missing[m] = (kvc_missing_row){m + 1, KVC_NOT_FOUND};
    assert_true(run_rooms(&f, 0, 8, 0, 1));
    rooms_close(&f);
}

/* A request whose rows lie in more places than it can name goes as before. */
static void too_many_places(void **state)
{
    (void)state;
    fixture f;
    fetch t;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    rooms_init(&t, &f, 0, 2, 0, 1, PATIENCE_NS);
    kvt_room rooms[300];
    for (uint32_t i = 0; i < 300; i++) {
        rooms[i] = t.room;
        rooms[i].first_slot = i % 2 == 0 ? 0 : 300;
        rooms[i].n = 1;
        rooms[i].row_bytes = 16;
    }
    t.j.xfer.rooms = rooms;
    t.j.xfer.n_rooms = 300;
    assert_ok(job_run(&t.j));
    assert_false(t.j.xfer.placed);
    assert_int_equal(t.j.xfer.reply.data_bytes, 2 * ROW_BYTES);
    assert_true(slot_is_empty(area[0]));
    job_fini(&t.j);
    rooms_close(&f);
}

/* Rows that are not as long as the request says: their server cannot know where they go. */
static void lengths_that_differ(void **state)
{
    (void)state;
    fixture f;
    fetch t;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    rooms_init(&t, &f, 0, 4, 0, 1, PATIENCE_NS);
    t.room.row_bytes = 2048;
    assert_ok(job_run(&t.j));
    assert_false(t.j.xfer.placed);
    assert_int_equal(t.j.xfer.reply.data_bytes, 4 * ROW_BYTES);
    assert_true(slot_is_empty(area[0]));
    job_fini(&t.j);
    rooms_close(&f);
}

/* A server of an older version does not say that it writes to places, and is not asked to. */
static void older_servers(void **state)
{
    (void)state;
    fixture f;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    fake_faults fault = fake_no_faults;
    fault.accept_says = 24;
    fake_verbs_fault(&fault);
    for (int i = 0; i < 20; i++) {
        assert_false(run_rooms(&f, 0, 16, 0, 1));
        usleep(1000);
    }
    assert_false(fake_verbs_registered(area[0]));
    rooms_close(&f);
}

/* ---- late ------------------------------------------------------------------------------------ */

static void stall_writes(void)
{
    fake_faults fault = fake_no_faults;
    fault.writes_stall = true;
    fake_verbs_fault(&fault);
}

/* Until a WRITE of it, and its END, are held up; false: it was over before. */
static bool wait_stalled(fetch *t)
{
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (fake_verbs_waiting() < 2 && atomic_load(&t->j.n_done) == 0 && !kvc_expired(give_up_ns))
        usleep(1000);
    return fake_verbs_waiting() >= 2;
}

/* With a deadline that leaves this machine the time to get so far. Gives how many were done before.
 */
static uint32_t submit_stalled(fetch *t, fixture *f, uint64_t timeout_ns)
{
    uint32_t n_done = f->n_done;
    for (;;) {
        rooms_init(t, f, 0, 16, 0, 1, timeout_ns);
        stall_writes();
        job_submit(&t->j);
        if (wait_stalled(t))
            return n_done;
        fake_verbs_fault(&fake_no_faults);
        wait_done(f, ++n_done);
        assert_status(t->j.status, KVC_TIMED_OUT);
        job_fini(&t->j);
        timeout_ns *= 2;
        assert_true(timeout_ns <= PATIENCE_NS);
    }
}

/* WRITEs that are still under way when the caller gives up land before he is told, or never: who is
 * told may use the memory for something else. */
static void late_writes(void **state)
{
    (void)state;
    enum { CANCEL, DEADLINE, CLOSE, N };
    for (int how = 0; how < N; how++) {
        fixture f;
        fetch t;
        rooms_open(&f, NULL, ROOMS_ALL, false);
        warm(&f, 0);
        rig_wait_registered();
        uint64_t late = kvc_metric_get(KVC_M_rdma_let_go_late);
        uint32_t n_done = submit_stalled(&t, &f, how == DEADLINE ? SECOND : 4 * SECOND);
        if (how == CANCEL)
            f.ops->cancel(f.conn, &t.j.xfer);
        else if (how == CLOSE)
            f.ops->conn_close(f.conn);
        wait_done(&f, n_done + 1);
        assert_true(t.j.status == KVC_CANCELLED || t.j.status == KVC_TIMED_OUT);
        assert_true(t.qps_at_done <= 1); /* the client's was gone */
        assert_int_equal(kvc_metric_get(KVC_M_rdma_let_go_late) - late, how != CLOSE);
        memset(area[0], 0x77, AREA); /* what the caller does with his memory now */
        fake_verbs_fault(&fake_no_faults);
        usleep(20000);
        uint32_t i = 0;
        while (i < AREA && area[0][i] == 0x77)
            i++;
        assert_int_equal(i, AREA);
        job_fini(&t.j);
        if (how == CLOSE)
            fixture_connect(&f, 1);
        warm(&f, 0);
        rooms_close(&f);
    }
}

/* Who waits long for an answer waits longer for the server to let go, within limits. */
static void patience_follows_the_timeout(void **state)
{
    (void)state;
    assert_int_equal(kvtr_let_go_ns(0), KVTI_LET_GO_LEAST_NS);
    assert_int_equal(kvtr_let_go_ns(4 * KVTI_LET_GO_LEAST_NS), KVTI_LET_GO_LEAST_NS);
    assert_int_equal(kvtr_let_go_ns(10 * SECOND), 10 * SECOND / 4);
    assert_int_equal(kvtr_let_go_ns(30 * SECOND), KVTI_LET_GO_MOST_NS);
    assert_int_equal(kvtr_let_go_ns(UINT64_MAX), KVTI_LET_GO_MOST_NS);
}

/* One that completes late, but in time, is as good as any. */
static void late_completion(void **state)
{
    (void)state;
    fixture f;
    fetch t;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    rig_wait_registered();
    stall_writes();
    rooms_init(&t, &f, 0, 16, 0, 3, PATIENCE_NS);
    uint32_t n_done = f.n_done;
    job_submit(&t.j);
    assert_true(wait_stalled(&t));
    fake_verbs_fault(&fake_no_faults);
    wait_done(&f, n_done + 1);
    assert_ok(t.j.status);
    assert_true(t.j.xfer.placed);
    assert_placed(&t);
    job_fini(&t.j);
    rooms_close(&f);
}

/* True: the connection was still there when the caller heard of the end. */
static bool cancel_held(fixture *f)
{
    fetch t;
    fixture_handle(f, rooms_handler);
    warm(f, 0);
    fixture_handle(f, hold_handler);
    rooms_init(&t, f, 0, 16, 0, 1, PATIENCE_NS);
    uint32_t n_done = f->n_done;
    job_submit(&t.j);
    wait_held(f, 1);
    uint32_t n_qps = (uint32_t)fake_verbs_live().qps;
    f->ops->cancel(f->conn, &t.j.xfer);
    wait_done(f, n_done + 1);
    assert_status(t.j.status, KVC_CANCELLED);
    (void)answer_held(f);
    assert_true(slot_is_empty(area[0]));
    job_fini(&t.j);
    return t.qps_at_done == n_qps;
}

/* A server that hears of the cancel says that it is done, and the connection stays; but where this
 * machine stands still for a second. */
static void cancel_is_answered(void **state)
{
    (void)state;
    fixture f;
    bool stays = false;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    for (int i = 0; i < 20 && !stays; i++)
        stays = cancel_held(&f);
    assert_true(stays);
    fixture_handle(&f, rooms_handler);
    assert_true(run_rooms(&f, 0, 16, 0, 1)); /* by the same connection */
    rooms_close(&f);
}

/* NULL: none is held. */
static kvt_call *take_held(fixture *f)
{
    kvc_mutex_lock(&f->mutex);
    kvt_call *call = f->n_held > 0 ? f->held[--f->n_held] : NULL;
    kvc_mutex_unlock(&f->mutex);
    return call;
}

/* What a server still has to say to a connection that was lost ends nothing of the next one's, and
 * writes nothing to its memory. */
static void answers_of_an_earlier_life(void **state)
{
    (void)state;
    fixture f;
    fetch old, now;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    warm(&f, 1);
    fixture_handle(&f, hold_handler);
    rooms_init(&old, &f, 0, 16, 0, 1, PATIENCE_NS);
    uint32_t n_done = f.n_done;
    job_submit(&old.j);
    wait_held(&f, 1);
    assert_int_equal(fake_verbs_event(RDMA_CM_EVENT_DISCONNECTED), 2);
    wait_done(&f, n_done + 1);
    assert_status(old.j.status, KVC_UNAVAILABLE);
    job_fini(&old.j);
    kvt_call *earlier = take_held(&f);
    kvt_call *later = NULL;
    for (n_done = f.n_done; later == NULL; n_done++) { /* it may be lost a little later */
        rooms_init(&now, &f, 0, 16, 0, 1, PATIENCE_NS);
        job_submit(&now.j);
        while ((later = take_held(&f)) == NULL && atomic_load(&now.j.n_done) == 0)
            usleep(1000);
        if (later == NULL)
            job_fini(&now.j);
    }
    rooms_handler(&f, earlier); /* all rows, to a link that is no more */
    usleep(20000);
    assert_int_equal(atomic_load(&now.j.n_done), 0);
    assert_true(slot_is_empty(area[0]));
    rooms_handler(&f, later);
    wait_done(&f, n_done);
    assert_ok(now.j.status);
    job_fini(&now.j);
    fixture_handle(&f, rooms_handler);
    assert_true(run_rooms(&f, 0, 16, 0, 1));
    rooms_close(&f);
}

/* Every work request of such a reply fails once; the next request goes well. */
static void faults_under_way(void **state)
{
    (void)state;
    for (uint32_t after = 1; after <= 9; after++) {
        fixture f;
        fetch t;
        rooms_open(&f, NULL, ROOMS_ALL, false);
        warm(&f, 0);
        rig_wait_registered();
        fake_faults fault = fake_no_faults;
        fault.wc = after % 2 ? IBV_WC_REM_ACCESS_ERR : IBV_WC_RETRY_EXC_ERR;
        fault.wc_after = after;
        fake_verbs_fault(&fault);
        rooms_init(&t, &f, 0, 8, 0, 2, PATIENCE_NS); /* a request, eight WRITEs, an END */
        kvc_status status = job_run(&t.j);
        assert_int_equal(fake_verbs_hits(), 1);
        assert_status(status, KVC_UNAVAILABLE);
        assert_true(t.qps_at_done <= 1);
        job_fini(&t.j);
        fake_verbs_fault(&fake_no_faults);
        uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
        do {
            rooms_init(&t, &f, 0, 8, 0, 2, PATIENCE_NS);
            status = job_run(&t.j);
            job_fini(&t.j);
        } while (status == KVC_UNAVAILABLE && !kvc_expired(give_up_ns));
        assert_ok(status);
        rooms_close(&f);
    }
}

/* A client that names what is not its own loses its link; one whose places do not fit the rows gets
 * them behind the frame. */
static void places_of_others(void **state)
{
    (void)state;
    static const struct {
        uint64_t addr;
        uint32_t n_rows, row_bytes, n_missing;
        bool cut_off;
    } cases[] = {
        {0x1000, 4, ROW_BYTES, 0, true},      {UINT64_MAX - 8, 4, ROW_BYTES, 0, true},
        {0x1000, 4, ROW_BYTES + 1, 0, false}, {0x1000, 0, 0, 0, false},
        {0x1000, UINT32_MAX, 0, 0, false},    {0x1000, UINT32_MAX, UINT32_MAX, 3, false},
        {0x1000, 1, ROW_BYTES, 3, false}, /* the missing rows are beyond it */
    };
    fixture f;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    rig_wait_registered();
    for (size_t c = 0; c < sizeof(cases) / sizeof(cases[0]); c++) {
        fake_peer p;
        fetch t;
        const void *head;
        size_t head_bytes;
        static uint8_t body[65536];
        rooms_init(&t, &f, 0, 4, 0, 1, PATIENCE_NS);
        n_missing = cases[c].n_missing;
        for (uint32_t m = 0; m < n_missing; m++)
            missing[m] = (kvc_missing_row){m + 1, KVC_NOT_FOUND};
        assert_ok(kvc_wire_encode_request(&t.j.req, &f.arena, &head, &head_bytes));
        assert_true(head_bytes + PEER_RUN_BYTES <= sizeof(body));
        memcpy(body, head, head_bytes);
        kvc_le_put(body + head_bytes, cases[c].addr, 8);
        kvc_le_put(body + head_bytes + 8, cases[c].n_rows, 4);
        kvc_le_put(body + head_bytes + 12, cases[c].row_bytes, 4);
        kvc_frame frame = {.kind = KVC_FRAME_REQUEST,
                           .method = KVC_FETCH_ROWS,
                           .call = 1,
                           .flags = PEER_PLACED,
                           .head_bytes = (uint32_t)head_bytes,
                           .data_bytes = PEER_RUN_BYTES,
                           .spare = {0, 0x101, 0}};
        assert_true(peer_connect(&p, f.uri, NULL));
        uint32_t writes = fake_verbs_posted(IBV_WR_RDMA_WRITE);
        (void)peer_send(&p, &frame, body, head_bytes + PEER_RUN_BYTES);
        uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
        while (!p.down && p.n_ends == 0 && !kvc_expired(give_up_ns)) {
            usleep(500);
            peer_poll(&p);
        }
        if (cases[c].cut_off)
            assert_true(peer_cut_off(&p));
        assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE) - writes, cases[c].cut_off);
        assert_int_equal(p.down, cases[c].cut_off);
        assert_true(p.down || (p.last.flags & PEER_PLACED) == 0);
        peer_close(&p);
        n_missing = 0;
        assert_true(run_rooms(&f, 0, 16, 0, 1));
    }
    rooms_close(&f);
}

/* Sums cover rows in their places, and the request that names these. */
static void sums_cover_places(void **state)
{
    (void)state;
    fixture f;
    fetch t;
    rooms_open(&f, NULL, ROOMS_ALL, true);
    warm(&f, 0);
    rig_wait_registered();
    missing[0] = (kvc_missing_row){3, KVC_IO};
    n_missing = 1;
    assert_true(run_rooms(&f, 0, 16, 0, 3));
    uint64_t wrong = kvc_metric_get(KVC_M_rdma_sums_wrong);
    uint64_t placed = kvc_metric_get(KVC_M_rdma_placed_bytes);
    for (int what = 0; what < 2; what++) {
        fake_faults fault = fake_no_faults;
        fault.flip = what == 0 ? IBV_WR_RDMA_WRITE : IBV_WR_SEND;
        fault.flip_after = what == 0 ? 7 : 1; /* a row; the request's last byte: a run's length */
        fake_verbs_fault(&fault);
        rooms_init(&t, &f, 0, 16, 0, 3, PATIENCE_NS);
        assert_status(job_run(&t.j), KVC_CORRUPT);
        assert_false(t.j.xfer.placed);
        assert_int_equal(fake_verbs_hits(), 1);
        assert_int_equal(kvc_metric_get(KVC_M_rdma_sums_wrong) - wrong, (uint64_t)what + 1);
        job_fini(&t.j);
    }
    assert_int_equal(kvc_metric_get(KVC_M_rdma_placed_bytes), placed); /* what was wrong is none */
    rooms_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_land_in_place),
        cmocka_unit_test(rooms_of_a_request),
        cmocka_unit_test(too_many_places),
        cmocka_unit_test(lengths_that_differ),
        cmocka_unit_test(older_servers),
        cmocka_unit_test(late_writes),
        cmocka_unit_test(patience_follows_the_timeout),
        cmocka_unit_test(late_completion),
        cmocka_unit_test(cancel_is_answered),
        cmocka_unit_test(answers_of_an_earlier_life),
        cmocka_unit_test(faults_under_way),
        cmocka_unit_test(places_of_others),
        cmocka_unit_test(sums_cover_places),
    };
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    suite_uri = "rdma://127.0.0.1:0";
    return cmocka_run_group_tests(tests, rooms_make, rooms_drop);
}
