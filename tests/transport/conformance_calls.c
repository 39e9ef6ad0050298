/*
 * conformance_calls.c: what goes in comes out, and what may not go in is refused.
 *
 * See conformance.h.
 */
#include "fixture.h"

#include <malloc.h>

#include "base/metrics.h"
#include "conformance.h"

static const kvc_request *expected_request;
static const char *request_diff;

/* Compares with expected_request, answers with the payload that the request asks for. */
static void mirror_handler(fixture *f, kvt_call *call)
{
    const char *diff = sample_request_diff(expected_request, &call->req);
    if (diff != NULL)
        request_diff = diff;
    if (!(kvc_method_flags(call->req.method) & KVC_METHOD_BULK_REPLY)) {
        sample_handler(f, call);
        return;
    }
    /* The pieces live in the call's arena, which goes with the call: take copies. */
    kvc_reply reply = sample_reply(call->req.method, 5000, &call->arena);
    kvt_slice slices[8];
    for (uint32_t i = 0; i < reply.n_data; i++) {
        void *copy = kvc_arena_alloc(&f->arena, reply.data[i].iov_len + 1);
        memcpy(copy, reply.data[i].iov_base, reply.data[i].iov_len);
        slices[i] = counted_slice(f, copy, reply.data[i].iov_len);
    }
    fixture_reply(f, call, KVC_OK, NULL, 0, &reply, slices, reply.n_data);
}

void every_method(void **state)
{
    (void)state;
    fixture f;
    job j;
    kvc_arena arena;
    uint32_t n_bulk = 0;
    kvc_arena_init(&arena, 64u << 20);
    fixture_open(&f, 1);
    fixture_handle(&f, mirror_handler);
    for (int m = 0; m < KVC_METHOD_COUNT; m++) {
        kvc_reply want = sample_reply((kvc_method)m, 5000, &arena);
        kvc_request req = sample_request((kvc_method)m, 3000, &arena);
        expected_request = &req;
        request_diff = NULL;
        job_init(&j, &f, req, PATIENCE_NS);
        j.want = &want;
        if (job_run(&j) != KVC_OK)
            fail_msg("%s: %s: %s", kvc_method_name((kvc_method)m), kvc_status_name(j.status),
                     j.xfer.detail);
        assert_int_equal(atomic_load(&j.n_messages), kvt_streams_reply(req.method));
        n_bulk += (kvc_method_flags(req.method) & KVC_METHOD_BULK_REPLY) != 0;
        if (request_diff != NULL)
            fail_msg("%s: request field %s differs", kvc_method_name((kvc_method)m), request_diff);
        job_fini(&j);
    }
    fixture_close(&f);
    assert_int_equal(atomic_load(&f.n_released), 5 * n_bulk);
    kvc_arena_reset(&arena);
}

static uint8_t *pattern; /* [KVC_MAX_VALUE_BYTES] */
static size_t reply_bytes;

static void make_pattern(void)
{
    pattern = malloc(KVC_MAX_VALUE_BYTES);
    assert_non_null(pattern);
    for (size_t i = 0; i < KVC_MAX_VALUE_BYTES; i++)
        pattern[i] = (uint8_t)(i * 131 + (i >> 8));
}

static bool is_pattern(const struct iovec *data, uint32_t n_data, uint64_t data_bytes)
{
    size_t at = 0;
    for (uint32_t i = 0; i < n_data; i++) {
        if (at + data[i].iov_len > data_bytes ||
            memcmp(data[i].iov_base, pattern + at, data[i].iov_len) != 0)
            return false;
        at += data[i].iov_len;
    }
    return at == data_bytes;
}

/* A put says NOT_FOUND if its bytes are wrong; a fetch gives reply_bytes in one slice. */
static void bulk_handler(fixture *f, kvt_call *call)
{
    if (call->req.method == KVC_PUT_BLOCKS) {
        bool same = is_pattern(call->req.data, call->req.n_data, call->req.data_bytes);
        fixture_reply(f, call, same ? KVC_OK : KVC_NOT_FOUND, NULL, 0, NULL, NULL, 0);
        return;
    }
    kvt_slice slice = counted_slice(f, pattern, reply_bytes);
    fixture_reply(f, call, KVC_OK, NULL, 0, NULL, &slice, 1);
}

typedef struct bulk_job {
    job j;
    void (*next)(kvt_xfer *xfer);
    bool same;
    uint64_t got_bytes;
} bulk_job;

static void check_bulk(kvt_xfer *xfer)
{
    bulk_job *b = (bulk_job *)xfer;
    b->got_bytes = xfer->reply.data_bytes;
    b->same = xfer->status == KVC_OK &&
              is_pattern(xfer->reply.data, xfer->reply.n_data, xfer->reply.data_bytes);
    b->next(xfer);
}

void payload_sizes(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 23, 24, 4096, 65536, 65537, (1u << 20) - 1, 1u << 20};
    fixture f;
    make_pattern();
    fixture_open(&f, 2);
    fixture_handle(&f, bulk_handler);
    for (uint32_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        bulk_job b;
        struct iovec data[2] = {{pattern, sizes[i] / 3},
                                {pattern + sizes[i] / 3, sizes[i] - sizes[i] / 3}};
        kvc_request req = sample_request(KVC_PUT_BLOCKS, 0, &f.arena);
        req.data = data;
        req.n_data = 2;
        req.data_bytes = sizes[i];
        job_init(&b.j, &f, req, PATIENCE_NS);
        b.j.xfer.channel = i;
        assert_ok(job_run(&b.j));
        job_fini(&b.j);
        reply_bytes = sizes[i];
        job_init(&b.j, &f, sample_request(KVC_FETCH_ROWS, 0, &f.arena), PATIENCE_NS);
        b.j.xfer.channel = i;
        b.next = b.j.xfer.done;
        b.j.xfer.done = check_bulk;
        assert_ok(job_run(&b.j));
        assert_int_equal(b.got_bytes, sizes[i]);
        assert_true(b.same);
        job_fini(&b.j);
    }
    fixture_close(&f);
    assert_int_equal(atomic_load(&f.n_released), sizeof(sizes) / sizeof(sizes[0]));
    free(pattern);
}

/* As many slices as there may be: every fifth empty, every seventh of static memory. */
static uint32_t n_counted;

static void slices_handler(fixture *f, kvt_call *call)
{
    kvt_slice slices[KVT_MAX_SLICES];
    size_t at = 0;
    n_counted = 0;
    for (uint32_t i = 0; i < KVT_MAX_SLICES; i++) {
        size_t len_bytes = i % 5 == 0 ? 0 : 1 + i * 7;
        slices[i] = counted_slice(f, pattern + at, len_bytes);
        if (i % 7 == 0)
            slices[i].release = NULL;
        else
            n_counted++;
        at += len_bytes;
    }
    reply_bytes = at;
    fixture_reply(f, call, KVC_OK, NULL, 0, NULL, slices, KVT_MAX_SLICES);
}

void many_slices(void **state)
{
    (void)state;
    fixture f;
    bulk_job b;
    make_pattern();
    fixture_open(&f, 1);
    fixture_handle(&f, slices_handler);
    job_init(&b.j, &f, sample_request(KVC_FETCH_ROWS, 0, &f.arena), PATIENCE_NS);
    b.next = b.j.xfer.done;
    b.j.xfer.done = check_bulk;
    assert_ok(job_run(&b.j));
    assert_true(b.same);
    assert_int_equal(b.got_bytes, reply_bytes);
    job_fini(&b.j);
    fixture_close(&f);
    assert_int_equal(atomic_load(&f.n_released), n_counted);
    free(pattern);
}

static kvc_status error_status;

static void error_handler(fixture *f, kvt_call *call)
{
    kvt_slice slice = counted_slice(f, "unused", 6); /* released although it is not sent */
    fixture_reply(f, call, error_status, "the reason: 100% \xc3\xa9", 77, NULL, &slice, 1);
}

void every_error(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_open(&f, 1);
    fixture_handle(&f, error_handler);
    for (int i = 1; i < KVC_STATUS_COUNT; i++) {
        error_status = (kvc_status)-i;
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        assert_status(job_run(&j), error_status);
        assert_string_equal(j.xfer.detail, "the reason: 100% \xc3\xa9");
        assert_int_equal(j.xfer.retry_after_ms, error_status == KVC_AGAIN ? 77 : 0);
        job_fini(&j);
    }
    fixture_close(&f);
    assert_int_equal(atomic_load(&f.n_released), KVC_STATUS_COUNT - 1);
}

void limits_of_messages(void **state)
{
    (void)state;
    fixture f;
    job j;
    fixture_init(&f);
    f.listen.max_message_bytes = 65536;
    fixture_listen(&f);
    fixture_connect(&f, 1);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 65536, &f.arena), PATIENCE_NS);
    assert_ok(job_run(&j));
    job_fini(&j);
    uint64_t answered = kvc_metric_get(KVC_M_requests);
    uint64_t failed = kvc_metric_get(KVC_M_requests_failed);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 65537, &f.arena), PATIENCE_NS);
    assert_status(job_run(&j), KVC_INVALID);
    assert_non_null(strstr(j.xfer.detail, "max_message_bytes"));
    assert_int_equal(kvc_metric_get(KVC_M_requests), answered + 1);
    assert_int_equal(kvc_metric_get(KVC_M_requests_failed), failed + 1);
    job_fini(&j);
    assert_int_equal(atomic_load(&f.n_calls), 1);
    fixture_close(&f);
}

void limits_of_calls(void **state)
{
    (void)state;
    fixture f;
    job held[4], j;
    fixture_init(&f);
    f.listen.max_calls = 4;
    f.listen.max_inflight_bytes = 300000;
    fixture_handle(&f, hold_handler);
    fixture_listen(&f);
    fixture_connect(&f, 1);
    for (int i = 0; i < 3; i++) {
        job_init(&held[i], &f, sample_request(KVC_PUT_BLOCKS, 100000 - 2000, &f.arena), 0);
        job_submit(&held[i]);
        wait_held(&f, (uint32_t)i + 1);
    }
    uint64_t answered = kvc_metric_get(KVC_M_requests);
    uint64_t refused = kvc_metric_get(KVC_M_requests_refused);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 100000, &f.arena), PATIENCE_NS);
    assert_status(job_run(&j), KVC_AGAIN); /* too many bytes */
    assert_true(j.xfer.retry_after_ms > 0);
    job_fini(&j);
    job_init(&held[3], &f, sample_request(KVC_STATS, 0, &f.arena), 0);
    job_submit(&held[3]);
    wait_held(&f, 4);
    job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
    assert_status(job_run(&j), KVC_AGAIN); /* too many calls */
    assert_true(j.xfer.retry_after_ms > 0);
    assert_int_equal(kvc_metric_get(KVC_M_requests), answered + 2);
    assert_int_equal(kvc_metric_get(KVC_M_requests_refused), refused + 2);
    job_fini(&j);
    assert_int_equal(answer_held(&f), 4);
    wait_done(&f, 6);
    fixture_handle(&f, sample_handler);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 100000, &f.arena), PATIENCE_NS);
    /* The last answers may still be on their way out of the count. */
    for (int i = 0; i < 5000 && job_run(&j) == KVC_AGAIN; i++) {
        usleep(10000);
        job_fini(&j);
        job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 100000, &f.arena), PATIENCE_NS);
    }
    assert_ok(j.status);
    job_fini(&j);
    for (int i = 0; i < 4; i++)
        job_fini(&held[i]);
    fixture_close(&f);
}

/* A budget that others charge too; what a call took is given back with its answer. */
void limits_that_are_shared(void **state)
{
    (void)state;
    fixture f;
    job held, j;
    kvt_budget budget = {.max_bytes = 300000};
    fixture_init(&f);
    f.listen.max_inflight_bytes = 1000; /* does not count */
    f.listen.inflight = &budget;
    fixture_handle(&f, hold_handler);
    fixture_listen(&f);
    fixture_connect(&f, 1);
    job_init(&held, &f, sample_request(KVC_PUT_BLOCKS, 100000, &f.arena), 0);
    job_submit(&held);
    wait_held(&f, 1);
    uint64_t taken = atomic_load(&budget.used_bytes);
    assert_true(taken > 100000 && taken < 150000);
    atomic_fetch_add(&budget.used_bytes, 150000); /* another listener's */
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 100000, &f.arena), PATIENCE_NS);
    assert_status(job_run(&j), KVC_AGAIN);
    assert_non_null(strstr(j.xfer.detail, "bytes in flight"));
    job_fini(&j);
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, 2);
    job_fini(&held);
    fixture_close(&f);
    assert_int_equal(atomic_load(&budget.used_bytes), 150000);
}

static void drop_and_hold(fixture *f, kvt_call *call)
{
    kvt_call_drop_data(call);
    assert_int_equal(call->req.n_data, 0);
    hold_handler(f, call);
}

/* 0 where a sanitizer has its own malloc. */
static size_t memory_bytes(void)
{
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

/* Bytes that the server has done with are freed and count no more, though the call waits for its
   answer; what else the request says stays. */
void dropped_data(void **state)
{
    (void)state;
    fixture f;
    job held[8];
    fixture_init(&f);
    f.listen.max_inflight_bytes = 150000;
    fixture_handle(&f, drop_and_hold);
    fixture_listen(&f);
    fixture_connect(&f, 1);
    kvc_request req = sample_request(KVC_PUT_BLOCKS, 100000, &f.arena);
    size_t before_bytes = 0;
    for (uint32_t i = 0; i < 8; i++) {
        job_init(&held[i], &f, req, 0);
        job_submit(&held[i]);
        wait_held(&f, i + 1);
        if (i == 1)
            before_bytes = memory_bytes();
    }
    /* Over a socket, the client's end keeps its own copies until the answer. */
    if (strncmp(f.uri, "inproc", 6) == 0)
        assert_true(memory_bytes() < before_bytes + 3 * 100000);
    for (uint32_t i = 0; i < 8; i++) {
        const kvc_request *got = &f.held[i]->req;
        assert_int_equal(got->u.put_blocks.n_values, req.u.put_blocks.n_values);
        assert_memory_equal(&got->u.put_blocks.values[0].digest, &req.u.put_blocks.values[0].digest,
                            sizeof(kvc_digest));
    }
    assert_int_equal(answer_held(&f), 8);
    wait_done(&f, 8);
    for (uint32_t i = 0; i < 8; i++)
        job_fini(&held[i]);
    fixture_close(&f);
}

static atomic_bool answered_all;

/* Answers come from threads of the server's own, in no particular order. */
static void answer_from_thread(void *arg)
{
    fixture *f = arg;
    while (!atomic_load(&answered_all)) {
        kvt_call *call = NULL;
        kvc_mutex_lock(&f->mutex);
        if (f->n_held > 0)
            call = f->held[--f->n_held];
        kvc_mutex_unlock(&f->mutex);
        if (call == NULL) {
            usleep(500);
            continue;
        }
        bulk_handler(f, call);
    }
}

void thousand_at_once(void **state)
{
    (void)state;
    enum { N = 1000 };
    fixture f;
    kvc_thread threads[2];
    bulk_job *jobs = calloc(N, sizeof(*jobs));
    assert_non_null(jobs);
    make_pattern();
    reply_bytes = 10000;
    fixture_open(&f, 4);
    fixture_handle(&f, hold_handler);
    atomic_store(&answered_all, false);
    for (int i = 0; i < 2; i++)
        assert_ok(kvc_thread_start(&threads[i], "answers", answer_from_thread, &f));
    kvc_request req = sample_request(KVC_FETCH_ROWS, 0, &f.arena);
    for (uint32_t i = 0; i < N; i++) {
        job_init(&jobs[i].j, &f, req, PATIENCE_NS);
        jobs[i].j.xfer.channel = i;
        jobs[i].next = jobs[i].j.xfer.done;
        jobs[i].j.xfer.done = check_bulk;
        job_submit(&jobs[i].j);
    }
    wait_done(&f, N);
    atomic_store(&answered_all, true);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(atomic_load(&jobs[i].j.n_done), 1);
        assert_ok(jobs[i].j.status);
        assert_true(jobs[i].same);
        assert_int_equal(jobs[i].got_bytes, reply_bytes);
        job_fini(&jobs[i].j);
    }
    for (int i = 0; i < 2; i++)
        kvc_thread_join(&threads[i]);
    fixture_close(&f);
    assert_int_equal(atomic_load(&f.n_released), N);
    free(jobs);
    free(pattern);
}

void submit_refuses(void **state)
{
    (void)state;
    fixture f;
    job j;
    struct iovec data[KVT_MAX_SLICES + 1];
    fixture_open(&f, 1);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, KVC_MAX_VALUE_BYTES + 1, &f.arena), 0);
    assert_status(f.ops->submit(f.conn, &j.xfer), KVC_INVALID);
    job_init(&j, &f, sample_request(KVC_PUT_BLOCKS, 0, &f.arena), 0);
    for (uint32_t i = 0; i <= KVT_MAX_SLICES; i++)
        data[i] = (struct iovec){"x", 1};
    j.req.data = data;
    j.req.n_data = KVT_MAX_SLICES + 1;
    j.req.data_bytes = KVT_MAX_SLICES + 1;
    assert_status(f.ops->submit(f.conn, &j.xfer), KVC_INVALID);
    j.req.n_data = KVT_MAX_SLICES;
    j.req.data_bytes = KVT_MAX_SLICES;
    assert_ok(job_run(&j));
    job_fini(&j);
    j.req.data_bytes = KVT_MAX_SLICES - 1;
    assert_status(f.ops->submit(f.conn, &j.xfer), KVC_INVALID);
    j.req.method = KVC_METHOD_COUNT;
    assert_status(f.ops->submit(f.conn, &j.xfer), KVC_INVALID);
    fixture_close(&f);
    assert_int_equal(f.n_done, 1);
}
