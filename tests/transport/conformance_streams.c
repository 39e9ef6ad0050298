/*
 * conformance_streams.c: replies that stream: order, back-pressure, and every way to end.
 *
 * The server sends message i with n_picks = i and a payload that follows from i. See conformance.h.
 */
#include "fixture.h"

#include "base/assert.h"
#include "conformance.h"

#define BIG KVC_MAX_VALUE_BYTES

/* What the handler streams; set before the call is submitted, and one stream at a time. */
static struct plan {
    fixture *f;
    uint32_t n;          /* messages */
    size_t len_bytes;    /* of a payload; message i has i % 7 bytes less */
    uint32_t stop_after; /* holds the call in f->held after so many; 0: never */
    kvc_status status;   /* of the answer */
    atomic_uint n_sent;  /* messages passed on */
    atomic_uint n_gone;  /* times the server heard that the client has gone */
} plan;
static uint8_t *bytes; /* [BIG + 256] */

static size_t message_bytes(uint32_t i)
{
    return plan.len_bytes < 7 ? plan.len_bytes : plan.len_bytes - i % 7;
}

static void send_next(kvt_call *call, bool ok);

static void send_message(kvt_call *call, uint32_t i)
{
    kvc_reply reply = {.method = call->req.method};
    reply.u.fetch_rows.n_picks = i;
    kvt_slice slice = counted_slice(plan.f, bytes + i % 256, message_bytes(i));
    call->sent = send_next;
    assert_ok(kvt_call_send(call, &reply, &slice, 1));
}

static void send_next(kvt_call *call, bool ok)
{
    kvc_mutex_lock(&plan.f->mutex); /* orders it after what the test wrote, for the sanitizer */
    kvc_mutex_unlock(&plan.f->mutex);
    if (!ok) {
        atomic_fetch_add(&plan.n_gone, 1);
        fixture_reply(plan.f, call, KVC_CANCELLED, "the client has gone", 0, NULL, NULL, 0);
        return;
    }
    uint32_t n_sent = atomic_fetch_add(&plan.n_sent, 1) + 1;
    if (n_sent == plan.stop_after)
        hold_handler(plan.f, call);
    else if (n_sent < plan.n)
        send_message(call, n_sent);
    else
        fixture_reply(plan.f, call, plan.status, "as planned", 77, NULL, NULL, 0);
}

static void stream_handler(fixture *f, kvt_call *call)
{
    (void)f;
    if (plan.n == 0)
        fixture_reply(plan.f, call, plan.status, "as planned", 77, NULL, NULL, 0);
    else
        send_message(call, 0);
}

/* The client: checks order and bytes, and may be told to stand still. */
static struct {
    atomic_bool stop;
    atomic_uint n_seen, n_wrong;
    atomic_int cancel_at; /* the message at which the client cancels; -1: none */
    atomic_int pause_at;  /* likewise: it stands still for a moment */
} reader;

static bool right(const job *j)
{
    const kvc_reply *reply = &j->xfer.reply;
    uint32_t i = atomic_load(&j->n_messages);
    if (reply->u.fetch_rows.n_picks != i || reply->data_bytes != message_bytes(i))
        return false;
    size_t at = 0;
    for (uint32_t k = 0; k < reply->n_data; k++) {
        if (memcmp(reply->data[k].iov_base, bytes + i % 256 + at, reply->data[k].iov_len) != 0)
            return false;
        at += reply->data[k].iov_len;
    }
    return at == reply->data_bytes;
}

static void read_message(job *j)
{
    atomic_fetch_add(&reader.n_seen, 1);
    if (!right(j))
        atomic_fetch_add(&reader.n_wrong, 1);
    if ((int)atomic_load(&j->n_messages) == atomic_load(&reader.cancel_at))
        j->f->ops->cancel(j->f->conn, &j->xfer);
    if ((int)atomic_load(&j->n_messages) == atomic_load(&reader.pause_at))
        usleep(3000);
    while (atomic_load(&reader.stop))
        usleep(1000);
}

static void open_stream(fixture *f, job *j, uint32_t n, size_t len_bytes, uint64_t timeout_ns)
{
    plan.f = f;
    plan.n = n;
    plan.len_bytes = len_bytes;
    plan.stop_after = 0;
    plan.status = KVC_OK;
    atomic_store(&plan.n_sent, 0);
    atomic_store(&plan.n_gone, 0);
    atomic_store(&reader.stop, false);
    atomic_store(&reader.n_seen, 0);
    atomic_store(&reader.n_wrong, 0);
    atomic_store(&reader.cancel_at, -1);
    atomic_store(&reader.pause_at, -1);
    bytes = malloc(BIG + 256);
    assert_non_null(bytes);
    for (size_t i = 0; i < BIG + 256; i++)
        bytes[i] = (uint8_t)(i * 131 + (i >> 8));
    fixture_open(f, 1);
    fixture_handle(f, stream_handler);
    job_init(j, f, sample_request(KVC_FETCH_ROWS_STREAM, 0, &f->arena), timeout_ns);
    j->on_message = read_message;
}

/* Both ends are closed; every slice that was handed over has come back. */
static void close_stream(fixture *f, job *j, uint32_t min_released)
{
    assert_int_equal(atomic_load(&reader.n_wrong), 0);
    assert_int_equal(atomic_load(&j->n_done), 1);
    job_fini(j);
    fixture_close(f);
    uint32_t n_sent = atomic_load(&plan.n_sent), n_gone = atomic_load(&plan.n_gone);
    assert_int_equal(atomic_load(&f->n_released), n_sent + n_gone);
    assert_true(n_sent + n_gone >= min_released);
    free(bytes);
}

void stream_in_order(void **state)
{
    (void)state;
    static const struct {
        uint32_t n;
        size_t len_bytes;
    } shapes[] = {{0, 0}, {1, 0}, {1, 5}, {2000, 40}, {300, 4096}, {60, BIG}};
    for (uint32_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        fixture f;
        job j;
        open_stream(&f, &j, shapes[i].n, shapes[i].len_bytes, PATIENCE_NS);
        assert_ok(job_run(&j));
        assert_int_equal(atomic_load(&j.n_messages), shapes[i].n);
        assert_int_equal(atomic_load(&plan.n_sent), shapes[i].n);
        close_stream(&f, &j, shapes[i].n);
    }
}

/* A reader that stands still stops the sender after a few messages, and loses none. */
void stream_waits_for_reader(void **state)
{
    (void)state;
    fixture f;
    job j;
    uint32_t before = 0, after = 0, n_still = 0;
    open_stream(&f, &j, 200, BIG, PATIENCE_NS);
    atomic_store(&reader.stop, true);
    job_submit(&j);
    while (n_still < 3) {
        before = atomic_load(&plan.n_sent);
        usleep(300000);
        after = atomic_load(&plan.n_sent);
        assert_true(after < 50);
        n_still = before == after ? n_still + 1 : 0;
    }
    atomic_store(&reader.stop, false);
    wait_done(&f, 1);
    assert_ok(j.status);
    assert_int_equal(atomic_load(&j.n_messages), 200);
    close_stream(&f, &j, 200);
}

void stream_ends_badly(void **state)
{
    (void)state;
    fixture f;
    job j;
    open_stream(&f, &j, 3, 100, PATIENCE_NS);
    plan.status = KVC_AGAIN;
    assert_status(job_run(&j), KVC_AGAIN);
    assert_string_equal(j.xfer.detail, "as planned");
    assert_int_equal(j.xfer.retry_after_ms, 77);
    assert_int_equal(atomic_load(&j.n_messages), 3); /* what came before the error counts */
    close_stream(&f, &j, 3);
    open_stream(&f, &j, 0, 100, PATIENCE_NS);
    plan.status = KVC_STALE_HANDLE;
    assert_status(job_run(&j), KVC_STALE_HANDLE);
    assert_int_equal(atomic_load(&j.n_messages), 0);
    close_stream(&f, &j, 0);
}

static void wait_for(atomic_uint *count)
{
    support_wait_for(atomic_load(count) > 0);
}

/* The server hears of it at once, while it waits for a reader that stands still. */
void stream_cancelled(void **state)
{
    (void)state;
    fixture f;
    job j;
    open_stream(&f, &j, 100000, BIG, 0);
    atomic_store(&reader.cancel_at, 2);
    assert_status(job_run(&j), KVC_CANCELLED);
    wait_for(&plan.n_gone);
    assert_true(atomic_load(&j.n_messages) >= 3);
    assert_int_equal(atomic_load(&plan.n_gone), 1);
    close_stream(&f, &j, 3);
}

void stream_deadline(void **state)
{
    (void)state;
    fixture f;
    job j;
    /* On a busy machine four messages may take longer than the first deadlines. */
    for (uint64_t timeout_ns = 300 * MS, n = 0; n < 4; timeout_ns *= 3) {
        assert_true(timeout_ns < PATIENCE_NS);
        open_stream(&f, &j, 10, 1000, timeout_ns);
        plan.stop_after = 4;
        assert_status(job_run(&j), KVC_TIMED_OUT);
        n = atomic_load(&j.n_messages);
        assert_true(n <= 4);
        if (n == 4)
            assert_int_equal(answer_held(&f), 1);
        close_stream(&f, &j, (uint32_t)n);
    }
}

static void run_drain(void *arg)
{
    fixture *f = arg;
    f->ops->drain(f->listener, kvc_deadline_ns(2 * PATIENCE_NS));
}

/* A drain lets a stream that is under way come to its end, and its reader read to the end: also
   where the server has sent the last message long before that. */
void stream_outlives_drain(void **state)
{
    (void)state;
    for (int left = 8; left <= 16; left += 4) {
        fixture f;
        job j;
        kvc_thread thread;
        open_stream(&f, &j, 60, BIG, PATIENCE_NS);
        atomic_store(&reader.stop, true);
        atomic_store(&reader.pause_at, 60 - left);
        job_submit(&j);
        wait_for(&reader.n_seen);
        assert_ok(kvc_thread_start(&thread, "drain", run_drain, &f));
        usleep(20000); /* most often it has begun by then */
        assert_int_equal(atomic_load(&j.n_done), 0);
        atomic_store(&reader.stop, false);
        wait_done(&f, 1);
        if (j.status != KVC_OK)
            fail_msg("%s after %u messages: %s", kvc_status_name(j.status),
                     atomic_load(&j.n_messages), j.xfer.detail);
        assert_int_equal(atomic_load(&j.n_messages), 60);
        kvc_thread_join(&thread);
        close_stream(&f, &j, 60);
    }
}

/* The client closes, or the server gives up, in the middle. */
void stream_ends_go_away(void **state)
{
    (void)state;
    fixture f;
    job j;
    for (int server = 0; server < 2; server++) {
        open_stream(&f, &j, 100000, BIG, 0);
        job_submit(&j);
        wait_for(&j.n_messages);
        if (server)
            f.ops->drain(f.listener, 1);
        else
            f.ops->conn_close(f.conn);
        if (!server)
            fixture_connect(&f, 1);
        wait_done(&f, 1);
        assert_true(j.status == KVC_CANCELLED || (server && j.status == KVC_UNAVAILABLE));
        wait_for(&plan.n_gone);
        close_stream(&f, &j, 1);
    }
}

void stream_submit_refuses(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_open(&f, 1);
    job_init(&j, &f, sample_request(KVC_FETCH_ROWS_STREAM, 0, &f.arena), 0);
    void (*message)(kvt_xfer *) = j.xfer.message;
    j.xfer.message = NULL;
    assert_status(f.ops->submit(f.conn, &j.xfer), KVC_INVALID);
    job_init(&j, &f, sample_request(KVC_FETCH_ROWS, 0, &f.arena), 0);
    j.xfer.message = message;
    assert_status(f.ops->submit(f.conn, &j.xfer), KVC_INVALID);
    fixture_close(&f);
    assert_int_equal(f.n_done, 0);
}

/* Several at once on one connection, beside unary calls. */
void streams_side_by_side(void **state)
{
    (void)state;
    enum { N = 16 };
    fixture f;
    job jobs[N];
    fixture_open(&f, 2);
    kvc_reply want = sample_reply(KVC_FETCH_ROWS_STREAM, 0, &f.arena);
    for (uint32_t i = 0; i < N; i++) {
        kvc_method method = i % 2 ? KVC_STATS : KVC_FETCH_ROWS_STREAM;
        job_init(&jobs[i], &f, sample_request(method, 0, &f.arena), PATIENCE_NS);
        jobs[i].xfer.channel = i;
        jobs[i].want = i % 2 ? NULL : &want;
        job_submit(&jobs[i]);
    }
    wait_done(&f, N);
    for (uint32_t i = 0; i < N; i++) {
        assert_ok(jobs[i].status);
        assert_null(jobs[i].diff);
        assert_int_equal(atomic_load(&jobs[i].n_messages), i % 2 ? 0 : 1);
        job_fini(&jobs[i]);
    }
    fixture_close(&f);
}
