/*
 * fixture.c: see fixture.h.
 *
 * Locks are those of the fixture alone; no transport function is called under them.
 */
#include "fixture.h"

#include "base/assert.h"

const char *suite_uri;

static void on_call(void *arg, kvt_call *call)
{
    fixture *f = arg;
    atomic_fetch_add(&f->n_calls, 1);
    /* What the test wrote before it submitted is seen here: the socket between the two orders it,
     * but the thread sanitizer does not know that. */
    kvc_mutex_lock(&f->mutex);
    handler_fn *handler = f->handler;
    kvc_mutex_unlock(&f->mutex);
    handler(f, call);
}

void fixture_init(fixture *f)
{
    memset(f, 0, sizeof(*f));
    f->ops = kvt_find(suite_uri);
    assert_non_null(f->ops);
    f->handler = sample_handler;
    f->listen = (kvt_listen_opts){
        .size_bytes = sizeof(f->listen),
        .uri = suite_uri,
        .on_call = on_call,
        .arg = f,
        .max_message_bytes = KVC_MAX_VALUE_BYTES,
        .max_calls = 4000,
        .max_inflight_bytes = 256u << 20,
        .n_threads = 2,
    };
    kvc_arena_init(&f->arena, 64u << 20);
    kvc_mutex_init(&f->mutex, KVC_RANK_QUEUE);
    kvc_cond_init(&f->changed);
}

void fixture_listen(fixture *f)
{
    assert_ok(f->ops->listen(&f->listen, &f->listener));
    f->ops->set_serving(f->listener, true);
    (void)snprintf(f->uri, sizeof(f->uri), "%s", f->ops->listener_uri(f->listener));
}

void fixture_connect(fixture *f, uint32_t n_channels)
{
    kvt_connect_opts opts = {
        .size_bytes = sizeof(opts),
        .uri = f->uri,
        .n_channels = n_channels,
        .n_threads = n_channels, /* whatever the machine has */
        .sums = f->sums || getenv("KVASIR_TEST_SUMS") != NULL,
        .region_bytes = f->region_bytes,
    };
    assert_ok(f->ops->connect(&opts, &f->conn));
}

void fixture_open(fixture *f, uint32_t n_channels)
{
    fixture_init(f);
    fixture_listen(f);
    fixture_connect(f, n_channels);
}

void fixture_close_server(fixture *f)
{
    f->ops->drain(f->listener, 1);
    (void)answer_held(f);
    f->ops->listener_close(f->listener);
    f->listener = NULL;
}

void fixture_close(fixture *f)
{
    (void)answer_held(f);
    f->ops->conn_close(f->conn);
    if (f->listener != NULL)
        fixture_close_server(f);
    kvc_cond_fini(&f->changed);
    kvc_mutex_fini(&f->mutex);
    kvc_arena_reset(&f->arena);
}

void fixture_handle(fixture *f, handler_fn *handler)
{
    kvc_mutex_lock(&f->mutex);
    f->handler = handler;
    kvc_mutex_unlock(&f->mutex);
}

/* After the only message of a stream. */
static void end_stream(kvt_call *call, bool ok)
{
    kvt_call_reply(call, ok ? KVC_OK : KVC_CANCELLED, "the client has gone", 0, NULL, NULL, 0);
}

void fixture_reply(fixture *f, kvt_call *call, kvc_status status, const char *detail,
                   uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                   uint32_t n_slices)
{
    kvc_mutex_lock(&f->mutex); /* see on_call */
    kvc_mutex_unlock(&f->mutex);
    if (status == KVC_OK && reply != NULL && kvt_streams_reply(call->req.method)) {
        call->sent = end_stream;
        if (kvt_call_send(call, reply, slices, n_slices) != KVC_OK)
            kvt_call_reply(call, KVC_IO, "the message does not encode", 0, NULL, NULL, 0);
        return;
    }
    kvt_call_reply(call, status, detail, retry_after_ms, reply, slices, n_slices);
}

void sample_handler(fixture *f, kvt_call *call)
{
    kvc_reply reply = sample_reply(call->req.method, 0, &call->arena);
    fixture_reply(f, call, KVC_OK, NULL, 0, &reply, NULL, 0);
}

void hold_handler(fixture *f, kvt_call *call)
{
    kvc_mutex_lock(&f->mutex);
    KVC_ASSERT(f->n_held < HELD_MAX);
    f->held[f->n_held++] = call;
    kvc_cond_broadcast(&f->changed);
    kvc_mutex_unlock(&f->mutex);
}

void wait_held(fixture *f, uint32_t n)
{
    uint64_t deadline_ns = kvc_deadline_ns(PATIENCE_NS);
    kvc_mutex_lock(&f->mutex);
    while (f->n_held < n && !kvc_expired(deadline_ns))
        (void)kvc_cond_wait_until(&f->changed, &f->mutex, deadline_ns);
    uint32_t got = f->n_held;
    kvc_mutex_unlock(&f->mutex);
    assert_true(got >= n);
}

void wait_done(fixture *f, uint32_t n)
{
    uint64_t deadline_ns = kvc_deadline_ns(PATIENCE_NS);
    kvc_mutex_lock(&f->mutex);
    while (f->n_done < n && !kvc_expired(deadline_ns))
        (void)kvc_cond_wait_until(&f->changed, &f->mutex, deadline_ns);
    uint32_t got = f->n_done;
    kvc_mutex_unlock(&f->mutex);
    assert_true(got >= n);
}

uint32_t answer_held(fixture *f)
{
    uint32_t n = 0;
    for (;;) {
        kvt_call *call = NULL;
        kvc_mutex_lock(&f->mutex);
        if (f->n_held > 0)
            call = f->held[--f->n_held];
        kvc_mutex_unlock(&f->mutex);
        if (call == NULL)
            return n;
        fixture_reply(f, call, KVC_NOT_FOUND, "answered late", 0, NULL, NULL, 0);
        n++;
    }
}

static void on_message(kvt_xfer *xfer)
{
    job *j = (job *)xfer;
    kvc_mutex_lock(&j->f->mutex); /* as in on_done */
    kvc_mutex_unlock(&j->f->mutex);
    if (j->want != NULL)
        j->diff = sample_reply_diff(j->want, &xfer->reply);
    if (j->on_message != NULL)
        j->on_message(j);
    atomic_fetch_add(&j->n_messages, 1);
}

static void on_pushed(kvt_xfer *xfer, bool ok)
{
    job *j = (job *)xfer;
    if (j->on_pushed != NULL)
        j->on_pushed(j, ok);
    else if (ok)
        (void)j->f->ops->push(j->f->conn, xfer, NULL); /* CLOSED where it was answered already */
}

static void on_done(kvt_xfer *xfer)
{
    job *j = (job *)xfer;
    fixture *f = j->f;
    kvc_mutex_lock(&f->mutex); /* the handler's writes, likewise */
    kvc_mutex_unlock(&f->mutex);
    j->done_ns = kvc_now_ns();
    j->status = xfer->status;
    if (xfer->status == KVC_OK && j->want != NULL && xfer->message == NULL)
        j->diff = sample_reply_diff(j->want, &xfer->reply);
    atomic_fetch_add(&j->n_done, 1);
    kvc_mutex_lock(&f->mutex);
    f->n_done++;
    kvc_cond_broadcast(&f->changed);
    kvc_mutex_unlock(&f->mutex);
}

void job_init(job *j, fixture *f, kvc_request req, uint64_t timeout_ns)
{
    memset(j, 0, sizeof(*j));
    j->f = f;
    j->req = req;
    j->xfer.req = &j->req;
    j->xfer.done = on_done;
    j->xfer.message = kvt_streams_reply(req.method) ? on_message : NULL;
    j->xfer.pushed = kvt_streams_request(req.method) ? on_pushed : NULL;
    j->xfer.deadline_ns = kvc_deadline_ns(timeout_ns);
}

void job_submit(job *j)
{
    kvc_mutex_lock(&j->f->mutex); /* see on_call */
    kvc_mutex_unlock(&j->f->mutex);
    assert_ok(j->f->ops->submit(j->f->conn, &j->xfer));
}

kvc_status job_run(job *j)
{
    uint32_t n_before = j->f->n_done;
    job_submit(j);
    wait_done(j->f, n_before + 1);
    assert_int_equal(atomic_load(&j->n_done), 1);
    if (j->diff != NULL)
        fail_msg("%s: field %s differs", kvc_method_name(j->req.method), j->diff);
    return j->status;
}

void job_fini(job *j)
{
    kvc_arena_reset(&j->xfer.arena);
}

static void count_release(void *arg)
{
    atomic_fetch_add((atomic_uint *)arg, 1);
}

kvt_slice counted_slice(fixture *f, const void *base, size_t len_bytes)
{
    return (kvt_slice){base, len_bytes, count_release, &f->n_released};
}
