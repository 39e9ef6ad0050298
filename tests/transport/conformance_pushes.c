/*
 * conformance_pushes.c: requests that stream: order, back-pressure, and every way to end.
 *
 * The client pushes message i with value = i and a payload that follows from i. The server checks
 * each, and answers every tenth with a message of its own. See conformance.h.
 */
#include "fixture.h"

#include "base/assert.h"
#include "conformance.h"

#define BIG KVC_MAX_VALUE_BYTES

static struct upload {
    fixture *f;
    uint32_t n; /* messages */
    size_t len_bytes;
    uint32_t stop_at; /* the server keeps the call once it has so many; 0: never */
    bool unask;       /* with stop_at: it asks first, and takes that back */
    int cancel_at;    /* the message in whose pushed the client cancels; -1: none */
    kvc_status push;  /* of the last push */
    atomic_uint n_got, n_wrong, n_over, n_pushed, n_unpushed;
    kvc_status over; /* with which the server was told that there is no more */
    char why[64];
} up;
static uint8_t *bytes; /* [BIG + 256] */
static struct iovec piece;
static kvc_request next;

/* ---- the server ------------------------------------------------------------------------------ */

static void check_message(const kvt_call *call)
{
    uint32_t i = atomic_load(&up.n_got);
    size_t at = 0;
    bool right = call->req.u.put_stream.value == i && call->req.data_bytes == up.len_bytes;
    for (uint32_t k = 0; k < call->req.n_data && right; k++) {
        right = memcmp(call->req.data[k].iov_base, bytes + i % 256 + at,
                       call->req.data[k].iov_len) == 0;
        at += call->req.data[k].iov_len;
    }
    if (!right || at != up.len_bytes)
        atomic_fetch_add(&up.n_wrong, 1);
    atomic_fetch_add(&up.n_got, 1);
}

static void order(void) /* what the test wrote, for the sanitizer */
{
    kvc_mutex_lock(&up.f->mutex);
    kvc_mutex_unlock(&up.f->mutex);
}

static void go_on(kvt_call *call);

static void on_got(kvt_call *call, kvc_status status, const char *why)
{
    order();
    if (status == KVC_OK) {
        check_message(call);
        go_on(call);
        return;
    }
    kvc_mutex_lock(&up.f->mutex);
    up.over = status;
    (void)snprintf(up.why, sizeof(up.why), "%s", why);
    kvc_mutex_unlock(&up.f->mutex);
    atomic_fetch_add(&up.n_over, 1);
    fixture_reply(up.f, call, status == KVC_CLOSED ? KVC_OK : status, why, 0, NULL, NULL, 0);
}

static void on_sent(kvt_call *call, bool ok)
{
    order();
    if (ok)
        kvt_call_recv(call);
    else
        fixture_reply(up.f, call, KVC_CANCELLED, "the client has gone", 0, NULL, NULL, 0);
}

static void go_on(kvt_call *call)
{
    uint32_t n = atomic_load(&up.n_got);
    if (up.stop_at > 0 && n >= up.stop_at) {
        if (up.unask && n == up.stop_at) {
            kvt_call_recv(call);
            if (!kvt_call_unrecv(call))
                return; /* one message more has come */
        }
        hold_handler(up.f, call);
        return;
    }
    if (n % 10) {
        kvt_call_recv(call);
        return;
    }
    kvc_put_answer answer = {.value = n};
    kvc_reply reply = {.method = call->req.method};
    reply.u.put_stream.n_answers = 1;
    reply.u.put_stream.answers = &answer;
    assert_ok(kvt_call_send(call, &reply, NULL, 0));
}

static void upload_handler(fixture *f, kvt_call *call)
{
    (void)f;
    call->got = on_got;
    call->sent = on_sent;
    check_message(call);
    go_on(call);
}

/* ---- the client ------------------------------------------------------------------------------ */

static kvc_request message(uint32_t i)
{
    kvc_request req = {.method = KVC_PUT_BLOCKS_STREAM};
    piece = (struct iovec){bytes + i % 256, up.len_bytes};
    req.u.put_stream.value = i;
    req.data = &piece;
    req.n_data = 1;
    req.data_bytes = up.len_bytes;
    return req;
}

static void on_pushed(job *j, bool ok)
{
    uint32_t n = atomic_fetch_add(ok ? &up.n_pushed : &up.n_unpushed, 1) + 1;
    order();
    if (!ok)
        return;
    if ((int)n == up.cancel_at) {
        j->f->ops->cancel(j->f->conn, &j->xfer);
        return;
    }
    next = message(n);
    up.push = j->f->ops->push(j->f->conn, &j->xfer, n < up.n ? &next : NULL);
}

static void open_upload(fixture *f, job *j, uint32_t n, size_t len_bytes, uint64_t timeout_ns)
{
    memset(&up, 0, sizeof(up));
    up.f = f;
    up.n = n;
    up.len_bytes = len_bytes;
    up.cancel_at = -1;
    bytes = malloc(BIG + 256);
    assert_non_null(bytes);
    for (size_t i = 0; i < BIG + 256; i++)
        bytes[i] = (uint8_t)(i * 131 + (i >> 8));
    fixture_open(f, 1);
    fixture_handle(f, upload_handler);
    job_init(j, f, message(0), timeout_ns);
    j->on_pushed = on_pushed;
}

/* Both ends are closed; every message that was pushed has been heard of. */
static void close_upload(fixture *f, job *j)
{
    assert_int_equal(atomic_load(&up.n_wrong), 0);
    assert_int_equal(atomic_load(&j->n_done), 1);
    job_fini(j);
    fixture_close(f);
    assert_true(atomic_load(&up.n_got) <= up.n);
    free(bytes);
}

void push_in_order(void **state)
{
    (void)state;
    static const struct {
        uint32_t n;
        size_t len_bytes;
    } shapes[] = {{1, 0}, {1, 5}, {2000, 40}, {300, 4096}, {60, BIG}};
    for (uint32_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        fixture f;
        job j;
        open_upload(&f, &j, shapes[i].n, shapes[i].len_bytes, PATIENCE_NS);
        assert_ok(job_run(&j));
        assert_int_equal(atomic_load(&up.n_got), shapes[i].n);
        assert_int_equal(atomic_load(&up.n_pushed), shapes[i].n);
        assert_int_equal(atomic_load(&up.n_over), 1);
        assert_int_equal(up.over, KVC_CLOSED);
        assert_int_equal(atomic_load(&j.n_messages), shapes[i].n / 10);
        close_upload(&f, &j);
    }
}

/* A server that stands still stops the client after a few messages. It answers with an error, with
 * and without a message asked for: the client hears it, whatever it still wanted to send. */
void push_waits_for_server(void **state)
{
    (void)state;
    for (int unask = 0; unask < 2; unask++) {
        fixture f;
        job j;
        open_upload(&f, &j, 1000, BIG, PATIENCE_NS);
        up.stop_at = 3;
        up.unask = unask;
        job_submit(&j);
        uint32_t before, after = 0, n_still = 0;
        while (n_still < 3) {
            before = after;
            usleep(200000);
            after = atomic_load(&up.n_pushed);
            assert_true(after < 50);
            n_still = before == after && after > 0 ? n_still + 1 : 0;
        }
        wait_held(&f, 1);
        assert_in_range(atomic_load(&up.n_got), 3, 3 + unask);
        assert_int_equal(answer_held(&f), 1);
        wait_done(&f, 1);
        assert_status(j.status, KVC_NOT_FOUND);
        close_upload(&f, &j);
    }
}

static void wait_for(atomic_uint *count, uint32_t n)
{
    support_wait_for(atomic_load(count) >= n);
}

void push_cancelled(void **state)
{
    (void)state;
    for (int at = 1; at < 14; at += 4) {
        fixture f;
        job j;
        open_upload(&f, &j, 100000, BIG, 0);
        up.cancel_at = at;
        assert_status(job_run(&j), KVC_CANCELLED);
        assert_true(atomic_load(&up.n_pushed) >= (uint32_t)at);
        close_upload(&f, &j);
    }
}

/* The client sends nothing more and does not say that it has ended. */
static void stand_still(job *j, bool ok)
{
    (void)j;
    atomic_fetch_add(ok ? &up.n_pushed : &up.n_unpushed, 1);
}

void push_deadline(void **state)
{
    (void)state;
    fixture f;
    job j;
    bool came = false;
    /* On a busy machine the call may not reach the server before the first deadlines. */
    for (uint64_t timeout_ns = 300 * MS; !came; timeout_ns *= 3) {
        assert_true(timeout_ns < PATIENCE_NS);
        open_upload(&f, &j, 10, 1000, timeout_ns);
        j.on_pushed = stand_still;
        assert_status(job_run(&j), KVC_TIMED_OUT);
        came = atomic_load(&f.n_calls) > 0;
        if (came) {
            wait_for(&up.n_over, 1);
            assert_int_equal(atomic_load(&up.n_got), 1);
        }
        close_upload(&f, &j);
    }
}

/* The server gives up a message that does not come: the client hears its answer at once. */
static void giving_up_handler(fixture *f, kvt_call *call)
{
    call->got = on_got;
    call->sent = on_sent;
    check_message(call);
    kvt_call_recv(call);
    if (kvt_call_unrecv(call))
        fixture_reply(f, call, KVC_DENIED, "enough", 0, NULL, NULL, 0);
}

void push_given_up(void **state)
{
    (void)state;
    for (int i = 0; i < 50; i++) {
        fixture f;
        job j;
        open_upload(&f, &j, 2, 100, PATIENCE_NS);
        fixture_handle(&f, giving_up_handler);
        j.on_pushed = stand_still;
        assert_status(job_run(&j), KVC_DENIED);
        assert_string_equal(j.xfer.detail, "enough");
        assert_int_equal(atomic_load(&up.n_over), 0);
        close_upload(&f, &j);
    }
}

/* The second message is beyond the limit: the server hears why, and answers with it. */
static void push_big(job *j, bool ok)
{
    if (!ok || atomic_fetch_add(&up.n_pushed, 1) > 0)
        return;
    next = message(1);
    piece.iov_len = next.data_bytes = 101;
    up.push = j->f->ops->push(j->f->conn, &j->xfer, &next);
}

void push_too_much(void **state)
{
    (void)state;
    fixture f;
    job j;
    open_upload(&f, &j, 3, 100, PATIENCE_NS);
    fixture_close(&f);
    fixture_init(&f);
    f.listen.max_message_bytes = 100;
    fixture_listen(&f);
    fixture_connect(&f, 1);
    fixture_handle(&f, upload_handler);
    j.on_pushed = push_big;
    assert_status(job_run(&j), KVC_INVALID);
    assert_non_null(strstr(j.xfer.detail, "data is longer"));
    assert_int_equal(atomic_load(&up.n_got), 1);
    assert_int_equal(up.over, KVC_INVALID);
    close_upload(&f, &j);
}

/* The client closes, or the server gives up, in the middle. */
void push_ends_go_away(void **state)
{
    (void)state;
    fixture f;
    job j;
    for (int server = 0; server < 2; server++) {
        open_upload(&f, &j, 100000, BIG, 0);
        job_submit(&j);
        wait_for(&up.n_got, 3);
        if (server)
            f.ops->drain(f.listener, 1);
        else
            f.ops->conn_close(f.conn);
        if (!server)
            fixture_connect(&f, 1);
        wait_done(&f, 1);
        assert_true(j.status == KVC_CANCELLED || (server && j.status == KVC_UNAVAILABLE));
        close_upload(&f, &j);
    }
}

static atomic_int twice;

static void push_twice(job *j, bool ok)
{
    kvc_request other = {.method = KVC_STATS};
    if (!ok || atomic_load(&twice) != 0)
        return;
    assert_status(j->f->ops->push(j->f->conn, &j->xfer, &other), KVC_INVALID);
    next = message(1);
    assert_ok(j->f->ops->push(j->f->conn, &j->xfer, &next));
    atomic_store(&twice, (int)j->f->ops->push(j->f->conn, &j->xfer, &next));
    j->f->ops->cancel(j->f->conn, &j->xfer);
}

void push_refuses(void **state)
{
    (void)state;
    fixture f;
    job j;
    open_upload(&f, &j, 10, 100, 0);
    void (*pushed)(kvt_xfer *, bool) = j.xfer.pushed;
    j.xfer.pushed = NULL;
    assert_status(f.ops->submit(f.conn, &j.xfer), KVC_INVALID);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    j.xfer.pushed = pushed;
    assert_status(f.ops->submit(f.conn, &j.xfer), KVC_INVALID);
    assert_int_equal(f.n_done, 0);
    job_init(&j, &f, message(0), 0);
    j.on_pushed = push_twice;
    up.stop_at = 1; /* the server does not ask, so the second is under way for long */
    atomic_store(&twice, 0);
    job_submit(&j);
    wait_done(&f, 1);
    assert_status(j.status, KVC_CANCELLED);
    assert_int_equal(atomic_load(&twice), KVC_INVALID);
    close_upload(&f, &j);
}
