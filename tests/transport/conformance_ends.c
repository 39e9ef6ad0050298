/*
 * conformance_ends.c: deadlines, cancels, and ends that go away while transfers are in flight.
 *
 * See conformance.h.
 */
#include "fixture.h"

#include "base/metrics.h"
#include "conformance.h"

/* Answers the one held call with a slice, late. */
static void answer_late(fixture *f)
{
    kvc_mutex_lock(&f->mutex);
    kvt_call *call = f->n_held > 0 ? f->held[--f->n_held] : NULL;
    kvc_mutex_unlock(&f->mutex);
    assert_non_null(call);
    kvt_slice slice = counted_slice(f, "too late", 8);
    fixture_reply(f, call, KVC_OK, NULL, 0, NULL, &slice, 1);
}

/* Blocks until the server has been told that the held call's client has gone. */
static void wait_cancelled(fixture *f)
{
    support_wait_for(kvt_call_cancelled(f->held[0]));
}

/* A call that is held ends at its deadline. Where the machine was so busy that it did not even
   reach the server in that time: again, with more. */
static void run_to_deadline(fixture *f, job *j)
{
    uint64_t timeout_ns = 500 * MS;
    for (;;) {
        job_init(j, f, sample_request(KVC_FETCH_ROWS, 0, &f->arena), timeout_ns);
        assert_status(job_run(j), KVC_TIMED_OUT);
        assert_true(j->done_ns >= j->xfer.deadline_ns);
        assert_true(j->done_ns < j->xfer.deadline_ns + PATIENCE_NS);
        if (atomic_load(&f->n_calls) > 1)
            break;
        job_fini(j);
        timeout_ns *= 2;
        assert_true(timeout_ns < PATIENCE_NS);
    }
    wait_held(f, 1);
}

void deadline_passes(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_open(&f, 1);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
    assert_ok(job_run(&j)); /* connected */
    job_fini(&j);
    fixture_handle(&f, hold_handler);
    run_to_deadline(&f, &j);
    wait_cancelled(&f);
    answer_late(&f);
    fixture_close(&f);
    assert_int_equal(atomic_load(&j.n_done), 1);
    assert_int_equal(atomic_load(&f.n_released), 1);
    job_fini(&j);
    /* A deadline that has passed already. */
    fixture_open(&f, 1);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 1);
    assert_status(job_run(&j), KVC_TIMED_OUT);
    job_fini(&j);
    fixture_close(&f);
}

void deadline_is_told(void **state)
{
    (void)state;
    fixture f;
    job j;
    int64_t off_ns = INT64_MAX;
    uint32_t n = 0;
    fixture_open(&f, 1);
    fixture_handle(&f, hold_handler);
    /* What is told is the time that is left, so what lies between its two looks at the clock comes
       on top: on a busy machine that may be much, but not each time. */
    for (; n < 20 && (off_ns <= -(int64_t)SECOND || off_ns >= (int64_t)SECOND); n++) {
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 2 * PATIENCE_NS);
        job_submit(&j);
        wait_held(&f, 1);
        off_ns = (int64_t)(f.held[0]->deadline_ns - j.xfer.deadline_ns);
        assert_string_equal(f.held[0]->tenant, "default");
        assert_int_equal(answer_held(&f), 1);
        wait_done(&f, n + 1);
        job_fini(&j);
    }
    assert_true(off_ns > -(int64_t)SECOND && off_ns < (int64_t)SECOND);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&j);
    wait_held(&f, 1);
    assert_true(f.held[0]->deadline_ns > kvc_now_ns()); /* the listener's own */
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, n + 1);
    job_fini(&j);
    fixture_close(&f);
}

void cancel_in_flight(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_open(&f, 1);
    fixture_handle(&f, hold_handler);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 100000, &f.arena), 0);
    job_submit(&j);
    wait_held(&f, 1);
    assert_false(kvt_call_cancelled(f.held[0]));
    f.ops->cancel(f.conn, &j.xfer);
    wait_done(&f, 1);
    assert_status(j.status, KVC_CANCELLED);
    f.ops->cancel(f.conn, &j.xfer); /* after done: nothing happens */
    wait_cancelled(&f);
    answer_late(&f);
    job_fini(&j);
    fixture_close(&f);
    assert_int_equal(atomic_load(&j.n_done), 1);
    assert_int_equal(atomic_load(&f.n_released), 1);
}

/* Before it can have reached anybody; the caller's memory goes away right after done. */
void cancel_early(void **state)
{
    (void)state;
    fixture f;
    fixture_open(&f, 2);
    for (int i = 0; i < 50; i++) {
        job *j = malloc(sizeof(*j));
        void *bytes = calloc(1, 500000);
        assert_non_null(j);
        assert_non_null(bytes);
        struct iovec data = {bytes, 500000};
        kvc_request req = sample_request(KVC_PUT_BLOCKS, 0, &f.arena);
        req.data = &data;
        req.n_data = 1;
        req.data_bytes = 500000;
        job_init(j, &f, req, 0);
        j->xfer.channel = (uint32_t)i;
        job_submit(j);
        f.ops->cancel(f.conn, &j->xfer);
        wait_done(&f, (uint32_t)i + 1);
        assert_true(j->status == KVC_CANCELLED || j->status == KVC_OK);
        assert_int_equal(atomic_load(&j->n_done), 1);
        job_fini(j);
        free(bytes);
        free(j);
    }
    fixture_close(&f);
}

void close_in_flight(void **state)
{
    (void)state;
    enum { N = 40 };
    fixture f;
    job jobs[N], late;
    fixture_open(&f, 3);
    fixture_handle(&f, hold_handler);
    for (uint32_t i = 0; i < N; i++) {
        job_init(&jobs[i], &f, sample_request(KVC_PUT_BLOCKS, 1000, &f.arena), 0);
        jobs[i].xfer.channel = i;
        job_submit(&jobs[i]);
    }
    wait_held(&f, N / 2);
    f.ops->conn_close(f.conn);
    f.conn = NULL;
    assert_int_equal(f.n_done, N); /* every done has run when close returns */
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(atomic_load(&jobs[i].n_done), 1);
        assert_status(jobs[i].status, KVC_CANCELLED);
        job_fini(&jobs[i]);
    }
    fixture_connect(&f, 1); /* the server goes on */
    fixture_handle(&f, sample_handler);
    job_init(&late, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
    assert_ok(job_run(&late));
    job_fini(&late);
    fixture_close(&f);
}

void nobody_there(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_init(&f);
    fixture_listen(&f); /* only to learn an address that nobody uses afterwards */
    fixture_close_server(&f);
    fixture_connect(&f, 1);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 5000, &f.arena), PATIENCE_NS);
    assert_status(job_run(&j), KVC_UNAVAILABLE);
    assert_true(j.xfer.detail[0] != '\0');
    job_fini(&j);
    fixture_close(&f);
}

/* A server that ends with calls in flight, and one that takes its place: clients reconnect. */
void server_dies(void **state)
{
    (void)state;
    fixture f;
    job j;
    char uri[300];
    fixture_open(&f, 1);
    fixture_handle(&f, hold_handler);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&j);
    wait_held(&f, 1);
    fixture_close_server(&f);
    wait_done(&f, 1);
    assert_true(j.status == KVC_UNAVAILABLE || j.status == KVC_CANCELLED);
    job_fini(&j);
    (void)snprintf(uri, sizeof(uri), "%s", f.uri);
    f.listen.uri = uri;
    fixture_handle(&f, sample_handler);
    fixture_listen(&f);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    kvc_status status = KVC_UNAVAILABLE;
    while (status == KVC_UNAVAILABLE && !kvc_expired(give_up_ns)) {
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        status = job_run(&j);
        job_fini(&j);
        usleep(20000);
    }
    assert_ok(status);
    fixture_close(&f);
}

static void run_drain(void *arg)
{
    fixture *f = arg;
    f->ops->drain(f->listener, kvc_deadline_ns(2 * PATIENCE_NS));
}

void drain_waits(void **state)
{
    (void)state;
    fixture f;
    job held, j;
    kvc_thread thread;
    fixture_open(&f, 1);
    fixture_handle(&f, hold_handler);
    job_init(&held, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&held);
    wait_held(&f, 1);
    uint64_t start_ns = kvc_now_ns();
    assert_ok(kvc_thread_start(&thread, "drain", run_drain, &f));
    kvc_status status = KVC_OK;
    fixture_handle(&f, sample_handler);
    for (uint32_t i = 0; i < SUPPORT_PATIENCE_S * 1000 && status == KVC_OK; i++) {
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        status = job_run(&j);
        job_fini(&j);
        usleep(1000);
    }
    if (status != KVC_CLOSED && status != KVC_UNAVAILABLE)
        fail_msg("%s", kvc_status_name(status));
    assert_int_equal(atomic_load(&held.n_done), 0);
    uint32_t n_before = f.n_done;
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, n_before + 1);
    assert_status(held.status, KVC_NOT_FOUND); /* its answer still came through */
    kvc_thread_join(&thread);
    assert_true(kvc_now_ns() - start_ns < PATIENCE_NS);
    job_fini(&held);
    fixture_close(&f);
}

void drain_gives_up(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_open(&f, 1);
    fixture_handle(&f, hold_handler);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&j);
    wait_held(&f, 1);
    uint64_t start_ns = kvc_now_ns();
    f.ops->drain(f.listener, kvc_deadline_ns(200 * MS));
    assert_true(kvc_now_ns() - start_ns >= 200 * MS);
    assert_true(kvc_now_ns() - start_ns < PATIENCE_NS);
    wait_done(&f, 1);
    assert_true(j.status == KVC_UNAVAILABLE || j.status == KVC_CANCELLED);
    assert_int_equal(answer_held(&f), 1); /* the server still answers; nobody listens */
    job_fini(&j);
    fixture_close(&f);
}

/* A call without a deadline ends at the listener's, and the server hears of it. */
void listener_deadline(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_init(&f);
    f.listen.max_deadline_ns = 300 * MS;
    fixture_listen(&f);
    fixture_connect(&f, 1);
    fixture_handle(&f, hold_handler);
    for (uint32_t i = 0; i < 2; i++) {
        uint64_t start_ns = kvc_now_ns();
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), i == 0 ? 0 : 3600 * SECOND);
        job_submit(&j);
        wait_held(&f, 1);
        assert_true(f.held[0]->deadline_ns >= start_ns + 300 * MS);
        assert_true(f.held[0]->deadline_ns < kvc_now_ns() + 300 * MS);
        wait_done(&f, i + 1);
        assert_true(j.status == KVC_TIMED_OUT || j.status == KVC_CANCELLED);
        assert_true(kvc_now_ns() - start_ns >= 300 * MS);
        wait_cancelled(&f);
        assert_int_equal(answer_held(&f), 1);
        job_fini(&j);
    }
    fixture_close(&f);
}

void bad_uris(void **state)
{
    (void)state;
    const kvt_ops *ops = kvt_find(suite_uri);
    static const char *const bad[] = {"",
                                      "nosuch://x",
                                      "grpc://",
                                      "grpc://:1",
                                      "grpc://host",
                                      "grpc://h:1/path",
                                      "grpc+unix://relative",
                                      "rdma://",
                                      "rdma://:1",
                                      "rdma://host",
                                      "rdma://h:1/path",
                                      "rdma://::1:1",
                                      "inproc://"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        kvt_listener *listener = (kvt_listener *)(uintptr_t)1;
        kvt_conn *conn = (kvt_conn *)(uintptr_t)1;
        fixture f;
        fixture_init(&f);
        f.listen.uri = bad[i];
        kvt_connect_opts opts = {.size_bytes = sizeof(opts), .uri = bad[i]};
        assert_status(ops->listen(&f.listen, &listener), KVC_INVALID);
        assert_null(listener);
        assert_status(ops->connect(&opts, &conn), KVC_INVALID);
        assert_null(conn);
    }
    assert_null(kvt_find("nosuch://x"));
    assert_null(kvt_find("grpc:/x"));
    assert_null(kvt_at(1000));
}

/* A request that is repeated until it gets through, or gets status. */
static void run_until(fixture *f, kvt_conn *conn, kvc_status wanted)
{
    uint64_t give_up_ns = kvc_deadline_ns(30 * SECOND);
    kvc_status status = KVC_AGAIN;
    kvt_conn *own = f->conn;
    f->conn = conn;
    while (status != wanted && !kvc_expired(give_up_ns)) {
        job j;
        job_init(&j, f, sample_request(KVC_STATS, 0, &f->arena), 10 * SECOND);
        status = job_run(&j);
        job_fini(&j);
        usleep(20000);
    }
    f->conn = own;
    assert_status(status, wanted);
}

/* Beyond the most connections the next is refused, the others go on, and one that ends makes room.
 * inproc has no connections at the server. */
void connections_beyond(void **state)
{
    (void)state;
    enum { N = 3 };
    fixture f;
    kvt_conn *conns[N + 1];
    kvt_peers peers = {.max = N};
    fixture_init(&f);
    f.listen.peers = &peers;
    fixture_listen(&f);
    if (strcmp(f.ops->name, "inproc") == 0) {
        fixture_connect(&f, 1);
        run_until(&f, f.conn, KVC_OK);
        assert_int_equal(atomic_load(&peers.n), 0);
        fixture_close(&f);
        return;
    }
    uint64_t held = kvc_metric_get(KVC_M_connections);
    uint64_t refused = kvc_metric_get(KVC_M_connections_refused);
    for (uint32_t i = 0; i <= N; i++) {
        fixture_connect(&f, 1);
        conns[i] = f.conn;
    }
    for (uint32_t i = 0; i < N; i++)
        run_until(&f, conns[i], KVC_OK);
    assert_int_equal(atomic_load(&peers.n), N);
    run_until(&f, conns[N], KVC_UNAVAILABLE);
    assert_true(kvc_metric_get(KVC_M_connections_refused) > refused);
    assert_int_equal(kvc_metric_get(KVC_M_connections), held + N);
    for (uint32_t i = 0; i < N; i++)
        run_until(&f, conns[i], KVC_OK);
    f.ops->conn_close(conns[0]);
    run_until(&f, conns[N], KVC_OK);
    for (uint32_t i = 1; i < N; i++)
        f.ops->conn_close(conns[i]);
    fixture_close(&f);
    assert_int_equal(atomic_load(&peers.n), 0);
    assert_int_equal(kvc_metric_get(KVC_M_connections), held);
}

static void (*plain_done)(kvt_xfer *xfer);
static atomic_uint in_done;

/* Stays in done for a while, with the answer's bytes in hand. */
static void slow_done(kvt_xfer *xfer)
{
    char bytes[8] = {0};
    atomic_store(&in_done, 1);
    usleep(300000);
    if (xfer->status == KVC_OK && xfer->reply.n_data == 1 && xfer->reply.data_bytes == 8)
        memcpy(bytes, xfer->reply.data[0].iov_base, 8);
    atomic_store(&in_done, memcmp(bytes, "lent out", 8) == 0 ? 2 : 3);
    plain_done(xfer);
}

static void lending_handler(fixture *f, kvt_call *call)
{
    kvt_slice slice = counted_slice(f, "lent out", 8);
    kvc_reply reply = sample_reply(call->req.method, 0, &call->arena);
    fixture_reply(f, call, KVC_OK, NULL, 0, &reply, &slice, 1);
}

/* What a server lends to an answer is its own again once its listener is closed. */
void close_waits_for_slices(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_open(&f, 1);
    fixture_handle(&f, lending_handler);
    atomic_store(&in_done, 0);
    job_init(&j, &f, sample_request(KVC_FETCH_ROWS, 0, &f.arena), PATIENCE_NS);
    plain_done = j.xfer.done;
    j.xfer.done = slow_done;
    job_submit(&j);
    support_wait_for(atomic_load(&in_done) != 0);
    fixture_close_server(&f);
    assert_int_equal(atomic_load(&f.n_released), 1);
    wait_done(&f, 1);
    assert_ok(j.status);
    assert_int_equal(atomic_load(&in_done), 2);
    job_fini(&j);
    fixture_close(&f);
}

void name_is_taken(void **state)
{
    (void)state;
    fixture f;
    kvt_listener *second;
    fixture_open(&f, 1);
    kvt_listen_opts opts = f.listen;
    opts.uri = f.uri;
    assert_status(f.ops->listen(&opts, &second), KVC_IO);
    assert_null(second);
    job j; /* the first one goes on */
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
    assert_ok(job_run(&j));
    job_fini(&j);
    fixture_close(&f);
}
