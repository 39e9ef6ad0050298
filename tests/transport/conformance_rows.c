/*
 * conformance_rows.c: rows: as many as a request may ask for, into rooms of the caller's, with
 * handles that are stale, and where nothing can be registered with a device.
 *
 * See conformance.h. Rows are ROW_BYTES of a pattern that follows from their pick.
 */
#include "fixture.h"

#include <stdlib.h>

#include "base/lent.h"
#include "base/metrics.h"
#include "conformance.h"

#define ROW_BYTES 16u
#define AREA      ((size_t)2 * KVC_MAX_PICKS * ROW_BYTES)
#define EMPTY     0x5a
#define HANDLE    77u
#define STEP      7919u

void (*conformance_deny_memory)(uint32_t after);

static uint8_t *rows; /* [KVC_MAX_PICKS][ROW_BYTES] as the server has them, in the order of picks */
static uint8_t *area; /* [AREA] where they shall go */
static uint32_t *picks;
static atomic_uint n_wrong_picks;

static uint8_t row_byte(uint32_t row, uint32_t at)
{
    uint32_t x = row * 2654435761u + at * 40503u;
    return (uint8_t)(x >> 13 ^ x >> 21);
}

static void make_rows(void)
{
    rows = malloc((size_t)KVC_MAX_PICKS * ROW_BYTES);
    area = malloc(AREA);
    picks = malloc(KVC_MAX_PICKS * sizeof(*picks));
    assert_non_null(rows);
    assert_non_null(area);
    assert_non_null(picks);
    atomic_store(&n_wrong_picks, 0);
    for (uint32_t i = 0; i < KVC_MAX_PICKS; i++) {
        picks[i] = i * STEP;
        for (uint32_t b = 0; b < ROW_BYTES; b++)
            rows[(size_t)i * ROW_BYTES + b] = row_byte(i, b);
    }
    assert_ok(kvc_lent_add(area, AREA));
}

static void drop_rows(void)
{
    kvc_lent_remove(area);
    free(rows);
    free(area);
    free(picks);
}

/* The rows of a request in as many slices as an answer may have; the handle has to be right. */
static void rows_handler(fixture *f, kvt_call *call)
{
    kvt_slice slices[KVT_MAX_SLICES];
    const kvc_row_group *group = call->req.u.fetch_rows.groups;
    uint32_t n = group->n_picks, n_slices = 0;
    if (call->req.method != KVC_FETCH_ROWS || group->context != HANDLE) {
        fixture_reply(f, call, KVC_STALE_HANDLE, "no such context", 0, NULL, NULL, 0);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        atomic_fetch_add(&n_wrong_picks, group->picks[i] != i * STEP);
    uint32_t each = (n + KVT_MAX_SLICES - 1) / KVT_MAX_SLICES;
    for (uint32_t i = 0; i < n; i += each, n_slices++) {
        uint32_t here = n - i < each ? n - i : each;
        slices[n_slices] = counted_slice(f, rows + (size_t)i * ROW_BYTES, (size_t)here * ROW_BYTES);
    }
    fixture_reply(f, call, KVC_OK, NULL, 0, NULL, slices, n_slices);
}

typedef struct ask {
    job j; /* first */
    void (*next)(kvt_xfer *xfer);
    kvc_row_group group;
    kvt_room room;
    bool wrong;
} ask;

/* Row i in slot first + i of the area: there already, or copied from the reply's data. */
static void check_rows(kvt_xfer *xfer)
{
    ask *a = (ask *)xfer;
    uint8_t *at = a->room.base + (size_t)a->room.first_slot * ROW_BYTES;
    size_t len_bytes = (size_t)a->group.n_picks * ROW_BYTES;
    a->wrong = xfer->status != KVC_OK || xfer->reply.data_bytes != len_bytes ||
               (xfer->placed && xfer->reply.n_data != 0);
    for (uint32_t i = 0; !a->wrong && i < xfer->reply.n_data; i++) {
        memcpy(at, xfer->reply.data[i].iov_base, xfer->reply.data[i].iov_len);
        at += xfer->reply.data[i].iov_len;
    }
    at = a->room.base + (size_t)a->room.first_slot * ROW_BYTES;
    a->wrong = a->wrong || memcmp(at, rows, len_bytes) != 0;
    a->next(xfer);
}

static void ask_init(ask *a, fixture *f, uint32_t n, uint32_t first_slot)
{
    job_init(&a->j, f, sample_request(KVC_FETCH_ROWS, 0, &f->arena), PATIENCE_NS);
    a->group = (kvc_row_group){.context = HANDLE, .n_picks = n, .picks = picks};
    a->room = (kvt_room){.base = area, .first_slot = first_slot, .n = n, .row_bytes = ROW_BYTES};
    a->wrong = false;
    a->j.req.u.fetch_rows.n_groups = 1;
    a->j.req.u.fetch_rows.groups = &a->group;
    a->j.xfer.rooms = &a->room;
    a->j.xfer.n_rooms = 1;
    a->next = a->j.xfer.done;
    a->j.xfer.done = check_rows;
    memset(area, EMPTY, AREA);
}

static void assert_untouched(size_t from, size_t to)
{
    while (from < to && area[from] == EMPTY)
        from++;
    assert_int_equal(from, to);
}

static void run_rows(fixture *f, uint32_t n, uint32_t first_slot)
{
    ask a;
    ask_init(&a, f, n, first_slot);
    assert_ok(job_run(&a.j));
    assert_false(a.wrong);
    assert_untouched(0, (size_t)first_slot * ROW_BYTES);
    assert_untouched(((size_t)first_slot + n) * ROW_BYTES, AREA);
    job_fini(&a.j);
}

/* Each twice and once more: whatever a transport prepares after its first use. */
void rows_one_to_all(void **state)
{
    (void)state;
    static const uint32_t counts[] = {1, 2, 255, 2048, KVC_MAX_PICKS - 1, KVC_MAX_PICKS};
    fixture f;
    make_rows();
    fixture_open(&f, 2);
    fixture_handle(&f, rows_handler);
    for (int round = 0; round < 3; round++) {
        for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++)
            run_rows(&f, counts[c], (uint32_t)c * 100);
    }
    assert_int_equal(atomic_load(&n_wrong_picks), 0);
    fixture_close(&f);
    drop_rows();
}

/* More than there is credit for at once, over one channel: requests that are as long as they may
 * be, side by side. */
void credits_exhausted(void **state)
{
    (void)state;
    enum { N = 6 };
    fixture f;
    ask a[N];
    make_rows();
    fixture_open(&f, 1);
    fixture_handle(&f, rows_handler);
    uint64_t waits = kvc_metric_get(KVC_M_rdma_credit_waits);
    for (uint32_t i = 0; i < N; i++) {
        ask_init(&a[i], &f, KVC_MAX_PICKS / N, i * KVC_MAX_PICKS / N);
        a[i].group.n_picks = KVC_MAX_PICKS / N;
    }
    memset(area, EMPTY, AREA);
    for (uint32_t i = 0; i < N; i++)
        job_submit(&a[i].j);
    wait_done(&f, N);
    for (uint32_t i = 0; i < N; i++) {
        assert_ok(a[i].j.status);
        assert_false(a[i].wrong);
        job_fini(&a[i].j);
    }
    /* A device may hold more back for want of places to send from than for want of credit. */
    if (conformance_deny_memory != NULL)
        assert_true(kvc_metric_get(KVC_M_rdma_credit_waits) > waits);
    fixture_close(&f);
    drop_rows();
}

/* A handle that the server does not know is told of as such, touches nothing, and ends no other
 * request. */
void stale_handles(void **state)
{
    (void)state;
    fixture f;
    ask a;
    make_rows();
    fixture_open(&f, 1);
    fixture_handle(&f, rows_handler);
    for (int i = 0; i < 4; i++) {
        ask_init(&a, &f, 1000, 10);
        a.group.context = HANDLE + 1;
        assert_status(job_run(&a.j), KVC_STALE_HANDLE);
        assert_string_equal(a.j.xfer.detail, "no such context");
        assert_false(a.j.xfer.placed);
        assert_untouched(0, AREA);
        job_fini(&a.j);
        run_rows(&f, 1000, 10);
    }
    fixture_close(&f);
    drop_rows();
}

/* Rows that are longer or shorter than their rooms are given as they came. */
void wrong_lengths(void **state)
{
    (void)state;
    fixture f;
    ask a;
    make_rows();
    fixture_open(&f, 1);
    fixture_handle(&f, rows_handler);
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t row_bytes = i % 2 == 0 ? ROW_BYTES / 2 : ROW_BYTES * 2;
        ask_init(&a, &f, 1000, 0);
        a.room.row_bytes = row_bytes;
        a.j.xfer.done = a.next; /* what came is not copied */
        assert_ok(job_run(&a.j));
        assert_false(a.j.xfer.placed);
        assert_int_equal(a.j.xfer.reply.data_bytes, 1000 * ROW_BYTES);
        assert_untouched(0, AREA);
        job_fini(&a.j);
        run_rows(&f, 1000, 0);
    }
    fixture_close(&f);
    drop_rows();
}

/* Where a transport registers memory: every one of its registrations fails, then all but the first
 * few; whatever can be carried in another way is. */
void registrations_fail(void **state)
{
    (void)state;
    if (conformance_deny_memory == NULL)
        skip(); /* nothing is registered, or nobody can refuse it */
    make_rows();
    for (uint32_t after = 0; after < 8; after++) {
        fixture f;
        kvc_status status = KVC_OK;
        conformance_deny_memory(after);
        fixture_open(&f, 1);
        fixture_handle(&f, rows_handler);
        for (int i = 0; i < 3 && status == KVC_OK; i++) {
            ask a;
            ask_init(&a, &f, 10000, 50);
            status = job_run(&a.j);
            assert_true(status == KVC_OK ? !a.wrong : status == KVC_UNAVAILABLE);
            job_fini(&a.j);
        }
        conformance_deny_memory(UINT32_MAX);
        uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
        do { /* a connection that could not be made is made now */
            ask a;
            ask_init(&a, &f, 10000, 50);
            status = job_run(&a.j);
            assert_true(status != KVC_OK || !a.wrong);
            job_fini(&a.j);
        } while (status == KVC_UNAVAILABLE && !kvc_expired(give_up_ns));
        assert_ok(status);
        fixture_close(&f);
    }
    drop_rows();
}
