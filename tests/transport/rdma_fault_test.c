/*
 * rdma_fault_test.c: the RDMA transport on verbs that fail: completions, events, registrations.
 *
 * Every case ends with a request that goes well and with nothing of the device's left. The verbs
 * are those of fake_verbs.h, so this runs anywhere.
 */
#include "fixture.h"

#include <sys/mman.h>
#include <unistd.h>

#include "base/lent.h"
#include "base/log.h"
#include "base/metrics.h"
#include "fake_verbs.h"

#define BIG KVC_MAX_VALUE_BYTES

static uint8_t *lent; /* [BIG] lent; every byte follows from its place */
static uint32_t n_slices, slice_bytes;

static uint8_t byte_at(size_t i)
{
    return (uint8_t)(i * 131 + (i >> 8));
}

static int make_lent(void **state)
{
    (void)state;
    lent = mmap(NULL, BIG, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (lent == MAP_FAILED)
        return 1;
    for (size_t i = 0; i < BIG; i++)
        lent[i] = byte_at(i);
    return kvc_lent_add(lent, BIG) != KVC_OK;
}

static int drop_lent(void **state)
{
    (void)state;
    kvc_lent_remove(lent);
    return munmap(lent, BIG);
}

/* A fetch gets n_slices of lent memory; a put is checked. */
static void handler(fixture *f, kvt_call *call)
{
    kvt_slice slices[KVT_MAX_SLICES];
    if (call->req.method == KVC_PUT_BLOCKS) {
        size_t at = 0;
        bool right = true;
        for (uint32_t i = 0; i < call->req.n_data; i++) {
            right = right &&
                    memcmp(call->req.data[i].iov_base, lent + at, call->req.data[i].iov_len) == 0;
            at += call->req.data[i].iov_len;
        }
        fixture_reply(f, call, right ? KVC_OK : KVC_CORRUPT, NULL, 0, NULL, NULL, 0);
        return;
    }
    for (uint32_t i = 0; i < n_slices; i++)
        slices[i] = counted_slice(f, lent + (size_t)i * slice_bytes, slice_bytes);
    fixture_reply(f, call, KVC_OK, NULL, 0, NULL, slices, n_slices);
}

typedef struct bulk {
    job j; /* first */
    void (*next)(kvt_xfer *xfer);
    struct iovec data;
    bool wrong;
} bulk;

static void check_bytes(kvt_xfer *xfer)
{
    bulk *b = (bulk *)xfer;
    size_t at = 0;
    if (xfer->status == KVC_OK && xfer->req->method == KVC_FETCH_ROWS) {
        for (uint32_t i = 0; i < xfer->reply.n_data; i++) {
            b->wrong = b->wrong || memcmp(xfer->reply.data[i].iov_base, lent + at,
                                          xfer->reply.data[i].iov_len) != 0;
            at += xfer->reply.data[i].iov_len;
        }
        b->wrong = b->wrong || at != (size_t)n_slices * slice_bytes;
    }
    b->wrong = b->wrong || xfer->status == KVC_CORRUPT;
    b->next(xfer);
}

static void bulk_init(bulk *b, fixture *f, kvc_method method, size_t put_bytes)
{
    kvc_request req = sample_request(method, 0, &f->arena);
    b->wrong = false;
    b->data = (struct iovec){lent, put_bytes};
    if (method == KVC_PUT_BLOCKS) {
        req.data = &b->data;
        req.n_data = 1;
        req.data_bytes = put_bytes;
    }
    job_init(&b->j, f, req, PATIENCE_NS);
    b->next = b->j.xfer.done;
    b->j.xfer.done = check_bytes;
}

static kvc_status run_bulk(fixture *f, kvc_method method, size_t put_bytes)
{
    bulk b;
    bulk_init(&b, f, method, put_bytes);
    kvc_status status = job_run(&b.j);
    job_fini(&b.j);
    assert_false(b.wrong);
    return status;
}

static void set_reply(uint32_t n, uint32_t bytes)
{
    n_slices = n;
    slice_bytes = bytes;
}

static void open_on(fixture *f, const fake_device *device)
{
    fake_verbs_use(device);
    fixture_open(f, 1);
    fixture_handle(f, handler);
}

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

/* Another connection takes the place of the lost one; the old one may be lost in between. */
static void assert_recovers(fixture *f)
{
    kvc_status status = KVC_UNAVAILABLE;
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (status == KVC_UNAVAILABLE && !kvc_expired(give_up_ns)) {
        status = run_bulk(f, KVC_FETCH_ROWS, 0);
        if (status == KVC_OK)
            status = run_bulk(f, KVC_PUT_BLOCKS, 300000);
    }
    assert_ok(status);
}

static void close_all(fixture *f)
{
    fake_verbs_fault(&fake_no_faults);
    fixture_close(f);
    assert_true(fake_verbs_all_gone());
}

static void wait_registered(void)
{
    uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
    while (!fake_verbs_registered(lent) && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_true(fake_verbs_registered(lent));
}

/* ---- counts ---------------------------------------------------------------------------------- */

/* One WRITE for as many slices as the queue pair takes, and one signal for all of them. */
static void counts_of_chains(void **state)
{
    (void)state;
    static const struct {
        fake_device device;
        uint32_t n, bytes, writes;
    } cases[] = {
        {{32, 256, 16, false, false}, 256, 4096, 8},
        {{32, 256, 16, false, false}, 33, 768, 2},
        {{32, 0, 16, false, false}, 32, 4096, 1},
        {{6, 64, 1, true, false}, 256, 4096, 43},
        {{1, 64, 1, true, false}, 20, 4096, 20},
        {{1, 64, 1, true, false}, 256, 4096, 1}, /* copied */
    };
    for (size_t c = 0; c < sizeof(cases) / sizeof(cases[0]); c++) {
        fixture f;
        set_reply(cases[c].n, cases[c].bytes);
        open_on(&f, &cases[c].device);
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0)); /* copied, since it is not registered yet */
        wait_registered();
        uint32_t writes = fake_verbs_posted(IBV_WR_RDMA_WRITE), signals = fake_verbs_signals();
        uint32_t sends = fake_verbs_posted(IBV_WR_SEND);
        uint64_t bytes = kvc_metric_get(KVC_M_rdma_written_bytes);
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
        assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE) - writes, cases[c].writes);
        sends = fake_verbs_posted(IBV_WR_SEND) - sends;
        assert_int_equal(fake_verbs_signals() - signals, sends); /* none of them a WRITE's */
        assert_in_range(sends, 2, 3);                            /* and perhaps credits */
        assert_int_equal(kvc_metric_get(KVC_M_rdma_written_bytes) - bytes,
                         cases[c].n * cases[c].bytes);
        close_all(&f);
        assert_int_equal(atomic_load(&f.n_released), 2 * cases[c].n);
    }
}

static void counts_of_reads(void **state)
{
    (void)state;
    fixture f;
    open_on(&f, NULL);
    assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, BIG));
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_READ), 1);
    assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, 1000)); /* goes with its frame */
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_READ), 1);
    close_all(&f);
    static const fake_device no_reads = {.max_sge = 4, .max_inline_bytes = 0, .max_reads = 0};
    open_on(&f, &no_reads);
    assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, BIG)); /* in fragments */
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_READ), 0);
    close_all(&f);
}

/* siw completes a READ after SENDs that were posted behind it: which of them is done is said by its
 * id alone. */
static void reads_complete_late(void **state)
{
    (void)state;
    enum { N = 8 };
    static const fake_device late = {6, 64, 4, true, true};
    fixture f;
    bulk b[N];
    set_reply(64, 4096);
    open_on(&f, &late);
    for (int round = 0; round < 20; round++) {
        uint32_t n_before = f.n_done;
        for (uint32_t i = 0; i < N; i++) {
            bulk_init(&b[i], &f, i % 3 ? KVC_PUT_BLOCKS : KVC_FETCH_ROWS, 100000 + 50000 * i);
            job_submit(&b[i].j);
        }
        wait_done(&f, n_before + N);
        for (uint32_t i = 0; i < N; i++) {
            assert_ok(b[i].j.status);
            assert_false(b[i].wrong);
            job_fini(&b[i].j);
        }
    }
    close_all(&f);
}

static uint32_t n_picks_got;

static void picks_handler(fixture *f, kvt_call *call)
{
    n_picks_got = 0;
    for (uint32_t g = 0; g < call->req.u.fetch_rows.n_groups; g++)
        n_picks_got += call->req.u.fetch_rows.groups[g].n_picks;
    handler(f, call);
}

static void rows_one_to_all(void **state)
{
    (void)state;
    static const uint32_t counts[] = {1, 2, 255, 2048, KVC_MAX_PICKS};
    fixture f;
    open_on(&f, NULL);
    fixture_handle(&f, picks_handler);
    uint32_t *picks = calloc(KVC_MAX_PICKS, sizeof(*picks));
    for (uint32_t i = 0; i < KVC_MAX_PICKS; i++)
        picks[i] = i * 7919;
    for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
        bulk b;
        kvc_row_group group = {.context = 1, .n_picks = counts[c], .picks = picks};
        set_reply(counts[c] < 256 ? counts[c] : 256, 16);
        slice_bytes = counts[c] < 256 ? 16 : counts[c] / 256 * 16; /* rows of 16 bytes */
        bulk_init(&b, &f, KVC_FETCH_ROWS, 0);
        b.j.req.u.fetch_rows.n_groups = 1;
        b.j.req.u.fetch_rows.groups = &group;
        assert_ok(job_run(&b.j));
        assert_false(b.wrong);
        assert_int_equal(n_picks_got, counts[c]);
        job_fini(&b.j);
    }
    free(picks);
    close_all(&f);
}

/* ---- faults ---------------------------------------------------------------------------------- */

static void every_completion_status(void **state)
{
    (void)state;
    set_reply(64, 4096);
    for (int wc = IBV_WC_LOC_LEN_ERR; wc <= IBV_WC_GENERAL_ERR; wc++) {
        fixture f;
        open_on(&f, NULL);
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
            assert_recovers(&f);
        }
        close_all(&f);
    }
}

static void posts_fail(void **state)
{
    (void)state;
    set_reply(64, 4096);
    for (uint32_t after = 0; after < 12; after++) {
        fixture f;
        open_on(&f, NULL);
        fake_faults fault = fake_no_faults;
        fault.post_fails_after = after;
        fake_verbs_fault(&fault);
        run_mixture(&f);
        fake_verbs_fault(&fake_no_faults);
        assert_recovers(&f);
        close_all(&f);
    }
}

static void every_event(void **state)
{
    (void)state;
    set_reply(64, 4096);
    for (int type = RDMA_CM_EVENT_ADDR_RESOLVED; type <= RDMA_CM_EVENT_TIMEWAIT_EXIT; type++) {
        fixture f;
        open_on(&f, NULL);
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
        assert_int_equal(fake_verbs_event((enum rdma_cm_event_type)type), 2);
        assert_recovers(&f);
        close_all(&f);
    }
}

static void every_event_in_flight(void **state)
{
    (void)state;
    set_reply(64, 4096);
    for (int type = RDMA_CM_EVENT_ADDR_RESOLVED; type <= RDMA_CM_EVENT_TIMEWAIT_EXIT; type++) {
        fixture f;
        bulk b;
        open_on(&f, NULL);
        fixture_handle(&f, hold_handler);
        bulk_init(&b, &f, KVC_PUT_BLOCKS, 100000);
        job_submit(&b.j);
        wait_held(&f, 1);
        (void)fake_verbs_event((enum rdma_cm_event_type)type);
        (void)answer_held(&f);
        wait_done(&f, 1);
        assert_true(b.j.status == KVC_NOT_FOUND || b.j.status == KVC_UNAVAILABLE);
        job_fini(&b.j);
        fixture_handle(&f, handler);
        assert_recovers(&f);
        close_all(&f);
    }
}

/* Without memory the payload goes in fragments, against credits; or there is no connection. */
static void registration_fails(void **state)
{
    (void)state;
    set_reply(256, 4096);
    for (uint32_t after = 0; after < 6; after++) {
        fixture f;
        fake_verbs_use(NULL);
        fake_faults fault = fake_no_faults;
        fault.reg_fails_after = after;
        fake_verbs_fault(&fault);
        uint64_t failed = kvc_metric_get(KVC_M_rdma_registrations_failed);
        uint64_t waits = kvc_metric_get(KVC_M_rdma_credit_waits);
        fixture_open(&f, 1);
        fixture_handle(&f, handler);
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
        assert_recovers(&f);
        close_all(&f);
    }
}

static void device_gives_nothing(void **state)
{
    (void)state;
    set_reply(4, 4096);
    for (int what = 0; what < 3; what++) {
        fixture f;
        open_on(&f, NULL);
        fake_faults fault = fake_no_faults;
        fault.qp_fails = what == 0;
        fault.cq_fails = what == 1;
        fault.pd_fails = what == 2;
        fake_verbs_fault(&fault);
        assert_status(run_bulk(&f, KVC_FETCH_ROWS, 0), KVC_UNAVAILABLE);
        fake_verbs_fault(&fake_no_faults);
        assert_recovers(&f);
        close_all(&f);
    }
}

/* Memory that is taken back is registered no more, and other memory at its address is its own. */
static void lent_memory_comes_and_goes(void **state)
{
    (void)state;
    fixture f;
    set_reply(16, 4096);
    open_on(&f, NULL);
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE), 1);
    wait_registered();
    kvc_lent_remove(lent);
    assert_false(fake_verbs_registered(lent));
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0)); /* copied to a buffer that is registered */
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE), 2);
    assert_false(fake_verbs_registered(lent));
    assert_ok(kvc_lent_add(lent, BIG));
    assert_false(fake_verbs_registered(lent)); /* not before its first use */
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    wait_registered();
    close_all(&f);
}

static void remove_lent(void *arg)
{
    kvc_lent_remove(lent);
    atomic_store((atomic_bool *)arg, true);
}

/* Answers do not wait for memory to be registered, whose end waits for that. */
static void registering_is_off_the_path(void **state)
{
    (void)state;
    fixture f;
    kvc_thread remover = {0};
    atomic_bool removed = false;
    set_reply(64, 4096);
    open_on(&f, NULL);
    fake_faults fault = fake_no_faults;
    fault.reg_stalls = lent;
    fake_verbs_fault(&fault);
    for (uint32_t i = 0; i < 4; i++)
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE), 4); /* one each: copied */
    assert_false(fake_verbs_registered(lent));
    assert_ok(kvc_thread_start(&remover, "remover", remove_lent, &removed));
    usleep(50000);
    assert_false(atomic_load(&removed));
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    fake_verbs_fault(&fake_no_faults);
    kvc_thread_join(&remover);
    assert_true(atomic_load(&removed));
    assert_false(fake_verbs_registered(lent));
    assert_ok(kvc_lent_add(lent, BIG));
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    wait_registered();
    uint32_t before = fake_verbs_posted(IBV_WR_RDMA_WRITE);
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE), before + 2); /* gathered: 64 of 32 */
    close_all(&f);
}

/* One byte changed under way, of each kind of message: with sums it is told of and counted, and the
 * next request goes well; without, nobody sees it but the test. */
static void sums_are_verified(void **state)
{
    (void)state;
    static const struct {
        kvc_method method;
        uint32_t reply_bytes, put_bytes;
        enum ibv_wr_opcode flip;
        uint32_t after;
    } cases[] = {
        {KVC_FETCH_ROWS, 200000, 0, IBV_WR_RDMA_WRITE, 1},
        {KVC_FETCH_ROWS, 1000, 0, IBV_WR_SEND, 2},
        {KVC_PUT_BLOCKS, 0, 200000, IBV_WR_RDMA_READ, 1},
        {KVC_PUT_BLOCKS, 0, 1000, IBV_WR_SEND, 1},
    };
    for (uint32_t i = 0; i < 2 * sizeof(cases) / sizeof(cases[0]); i++) {
        fixture f;
        bulk b;
        bool put = cases[i / 2].method == KVC_PUT_BLOCKS;
        fake_verbs_use(NULL);
        fixture_init(&f);
        f.sums = i % 2 == 1;
        fixture_listen(&f);
        fixture_connect(&f, 1);
        fixture_handle(&f, handler);
        set_reply(1, cases[i / 2].reply_bytes);
        assert_ok(run_bulk(&f, cases[i / 2].method, cases[i / 2].put_bytes));
        uint64_t wrong = kvc_metric_get(KVC_M_rdma_sums_wrong);
        fake_faults fault = fake_no_faults;
        fault.flip = cases[i / 2].flip;
        fault.flip_after = cases[i / 2].after;
        fake_verbs_fault(&fault);
        bulk_init(&b, &f, cases[i / 2].method, cases[i / 2].put_bytes);
        kvc_status status = job_run(&b.j);
        assert_int_equal(fake_verbs_hits(), 1);
        assert_true(b.wrong); /* by its bytes, or its status */
        assert_status(status, f.sums || put ? KVC_CORRUPT : KVC_OK);
        assert_int_equal(kvc_metric_get(KVC_M_rdma_sums_wrong) - wrong, f.sums ? 1 : 0);
        assert_int_equal(atomic_load(&f.n_calls), f.sums && put ? 1 : 2);
        if (f.sums)
            assert_non_null(strstr(b.j.xfer.detail, "sum"));
        job_fini(&b.j);
        fake_verbs_fault(&fake_no_faults);
        assert_ok(run_bulk(&f, cases[i / 2].method, cases[i / 2].put_bytes));
        close_all(&f);
    }
}

/* What is lent is sent from: on iWARP too, where sinks of READs are open to the peer. */
static void lent_memory_is_shut(void **state)
{
    (void)state;
    set_reply(16, 4096);
    for (int iwarp = 0; iwarp < 2; iwarp++) {
        const fake_device device = {6, 64, 4, iwarp == 1, false};
        fixture f;
        open_on(&f, &device);
        assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, BIG));
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
        wait_registered();
        assert_false(fake_verbs_open(lent));
        close_all(&f);
    }
}

/* Free buffers go after a while, and all domains share one cap. */
static void buffers_are_given_back(void **state)
{
    (void)state;
    enum { N = 6 };
    fixture f;
    bulk b[N];
    for (int iwarp = 0; iwarp < 2; iwarp++) {
        const fake_device device = {6, 64, 4, iwarp == 1, false};
        fake_verbs_use(&device);
        fixture_init(&f);
        f.listen.idle_ns = 500 * MS;
        f.listen.max_inflight_bytes = 16u << 20;
        fixture_listen(&f);
        fixture_connect(&f, iwarp == 1 ? N : 1);
        fixture_handle(&f, hold_handler);
        uint64_t before_bytes = kvc_metric_get(KVC_M_rdma_registered_bytes);
        for (uint32_t i = 0; i < N; i++) {
            bulk_init(&b[i], &f, KVC_PUT_BLOCKS, BIG);
            b[i].j.xfer.channel = i;
            job_submit(&b[i].j);
            wait_held(&f, i + 1);
        }
        uint64_t most_bytes = kvc_metric_get(KVC_M_rdma_registered_bytes);
        assert_true(most_bytes - before_bytes >= 2 * N * BIG); /* at both ends */
        assert_int_equal(answer_held(&f), N);
        wait_done(&f, N);
        for (uint32_t i = 0; i < N; i++)
            job_fini(&b[i].j);
        /* The client keeps its own for longer, unless its links have gone and on iWARP with them
         * their domains. */
        uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
        while (kvc_metric_get(KVC_M_rdma_registered_bytes) > most_bytes - N * BIG &&
               !kvc_expired(give_up_ns))
            usleep(5000);
        assert_true(kvc_metric_get(KVC_M_rdma_registered_bytes) <= most_bytes - N * BIG);
        close_all(&f);
    }
}

/* Idle is a link without calls: one whose answer takes longer than idle_ns stays. */
static void calls_are_not_idle(void **state)
{
    (void)state;
    fixture f;
    bulk b;
    set_reply(4, 4096);
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
    fixture_handle(&f, handler);
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, 1);
    assert_status(b.j.status, KVC_NOT_FOUND);
    job_fini(&b.j);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (fake_verbs_live().qps > 0 && !kvc_expired(give_up_ns)) /* then it is idle */
        usleep(5000);
    assert_int_equal(fake_verbs_live().qps, 0);
    assert_recovers(&f);
    close_all(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(counts_of_chains),
        cmocka_unit_test(counts_of_reads),
        cmocka_unit_test(reads_complete_late),
        cmocka_unit_test(rows_one_to_all),
        cmocka_unit_test(every_completion_status),
        cmocka_unit_test(posts_fail),
        cmocka_unit_test(every_event),
        cmocka_unit_test(every_event_in_flight),
        cmocka_unit_test(registration_fails),
        cmocka_unit_test(device_gives_nothing),
        cmocka_unit_test(lent_memory_comes_and_goes),
        cmocka_unit_test(lent_memory_is_shut),
        cmocka_unit_test(sums_are_verified),
        cmocka_unit_test(registering_is_off_the_path),
        cmocka_unit_test(buffers_are_given_back),
        cmocka_unit_test(calls_are_not_idle),
    };
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    suite_uri = "rdma://127.0.0.1:0";
    return cmocka_run_group_tests(tests, make_lent, drop_lent);
}
