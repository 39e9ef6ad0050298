/*
 * rdma_count_test.c: what the RDMA transport posts, registers and sums: counted on fake verbs.
 *
 * Every case ends with nothing of the device's left. The verbs are those of fake_verbs.h, so this
 * runs anywhere.
 */
#include "rdma_rig.h"

#include <unistd.h>

#include "base/lent.h"
#include "base/log.h"
#include "base/metrics.h"

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
        rig_set_reply(cases[c].n, cases[c].bytes);
        rig_open_on(&f, &cases[c].device);
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0)); /* copied, since it is not registered yet */
        rig_wait_registered();
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
        rig_close_all(&f);
        assert_int_equal(atomic_load(&f.n_released), 2 * cases[c].n);
    }
}

static void counts_of_reads(void **state)
{
    (void)state;
    fixture f;
    rig_open_on(&f, NULL);
    assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, BIG));
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_READ), 1);
    assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, 1000)); /* goes with its frame */
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_READ), 1);
    rig_close_all(&f);
    static const fake_device no_reads = {.max_sge = 4, .max_inline_bytes = 0, .max_reads = 0};
    rig_open_on(&f, &no_reads);
    assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, BIG)); /* in fragments */
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_READ), 0);
    rig_close_all(&f);
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
    rig_set_reply(64, 4096);
    rig_open_on(&f, &late);
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
    rig_close_all(&f);
}

static uint32_t n_picks_got;

static void picks_handler(fixture *f, kvt_call *call)
{
    n_picks_got = 0;
    for (uint32_t g = 0; g < call->req.u.fetch_rows.n_groups; g++)
        n_picks_got += call->req.u.fetch_rows.groups[g].n_picks;
    rig_handler(f, call);
}

static void rows_one_to_all(void **state)
{
    (void)state;
    static const uint32_t counts[] = {1, 2, 255, 2048, KVC_MAX_PICKS};
    fixture f;
    rig_open_on(&f, NULL);
    fixture_handle(&f, picks_handler);
    uint32_t *picks = calloc(KVC_MAX_PICKS, sizeof(*picks));
    for (uint32_t i = 0; i < KVC_MAX_PICKS; i++)
        picks[i] = i * 7919;
    for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
        bulk b;
        kvc_row_group group = {.context = 1, .n_picks = counts[c], .picks = picks};
        rig_set_reply(counts[c] < 256 ? counts[c] : 256, 16);
        rig_slice_bytes = counts[c] < 256 ? 16 : counts[c] / 256 * 16; /* rows of 16 bytes */
        bulk_init(&b, &f, KVC_FETCH_ROWS, 0);
        b.j.req.u.fetch_rows.n_groups = 1;
        b.j.req.u.fetch_rows.groups = &group;
        assert_ok(job_run(&b.j));
        assert_false(b.wrong);
        assert_int_equal(n_picks_got, counts[c]);
        job_fini(&b.j);
    }
    free(picks);
    rig_close_all(&f);
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Memory that is taken back is registered no more, and other memory at its address is its own. */
static void lent_memory_comes_and_goes(void **state)
{
    (void)state;
    fixture f;
    rig_set_reply(16, 4096);
    rig_open_on(&f, NULL);
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE), 1);
    rig_wait_registered();
    kvc_lent_remove(rig_lent);
    assert_false(fake_verbs_registered(rig_lent));
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0)); /* copied to a buffer that is registered */
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE), 2);
    assert_false(fake_verbs_registered(rig_lent));
    assert_ok(kvc_lent_add(rig_lent, BIG));
    assert_false(fake_verbs_registered(rig_lent)); /* not before its first use */
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    rig_wait_registered();
    rig_close_all(&f);
}

static void remove_lent(void *arg)
{
    kvc_lent_remove(rig_lent);
    atomic_store((atomic_bool *)arg, true);
}

/* Answers do not wait for memory to be registered, whose end waits for that. */
static void registering_is_off_the_path(void **state)
{
    (void)state;
    fixture f;
    kvc_thread remover = {0};
    atomic_bool removed = false;
    rig_set_reply(64, 4096);
    rig_open_on(&f, NULL);
    fake_faults fault = fake_no_faults;
    fault.reg_stalls = rig_lent;
    fake_verbs_fault(&fault);
    for (uint32_t i = 0; i < 4; i++)
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE), 4); /* one each: copied */
    assert_false(fake_verbs_registered(rig_lent));
    uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
    while (fake_verbs_stalled() == 0 && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_int_equal(fake_verbs_stalled(), 1);
    assert_ok(kvc_thread_start(&remover, "remover", remove_lent, &removed));
    usleep(50000);
    assert_false(atomic_load(&removed));
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    fake_verbs_fault(&fake_no_faults);
    kvc_thread_join(&remover);
    assert_true(atomic_load(&removed));
    assert_false(fake_verbs_registered(rig_lent));
    assert_ok(kvc_lent_add(rig_lent, BIG));
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    rig_wait_registered();
    uint32_t before = fake_verbs_posted(IBV_WR_RDMA_WRITE);
    assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
    assert_int_equal(fake_verbs_posted(IBV_WR_RDMA_WRITE), before + 2); /* gathered: 64 of 32 */
    rig_close_all(&f);
}

static void stall_buffers(bool open)
{
    fake_faults fault = fake_no_faults;
    fault.reg_stalls_bytes = 327680; /* what a put of 300,000 bytes takes */
    fault.reg_stalls_open = open;
    fake_verbs_fault(&fault);
}

static void wait_one_stalled(void)
{
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (fake_verbs_stalled() == 0 && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_int_equal(fake_verbs_stalled(), 1);
}

/* While the pool registers a buffer, at either end, others submit, cancel and answer. */
static void buffers_are_registered_unlocked(void **state)
{
    (void)state;
    for (int at_client = 0; at_client < 2; at_client++) {
        fixture f;
        bulk put, held, given_up;
        rig_open_on(&f, NULL);
        fixture_handle(&f, hold_handler);
        bulk_init(&held, &f, KVC_FETCH_ROWS, 0);
        job_submit(&held.j);
        wait_held(&f, 1);
        fixture_handle(&f, rig_handler);
        stall_buffers(at_client == 1);
        bulk_init(&put, &f, KVC_PUT_BLOCKS, 300000);
        job_submit(&put.j);
        wait_one_stalled();
        bulk_init(&given_up, &f, KVC_PUT_BLOCKS, 300000);
        job_submit(&given_up.j);
        f.ops->cancel(f.conn, &given_up.j.xfer);
        assert_int_equal(answer_held(&f), 1);
        assert_int_equal(fake_verbs_stalled(), 1);
        fake_verbs_fault(&fake_no_faults);
        wait_done(&f, 3);
        assert_ok(put.j.status);
        assert_status(held.j.status, KVC_NOT_FOUND);
        assert_status(given_up.j.status, KVC_CANCELLED);
        job_fini(&put.j);
        job_fini(&held.j);
        job_fini(&given_up.j);
        rig_close_all(&f);
    }
}

/* The same, where what waits for its buffer is given up. */
static void given_up_while_registering(void **state)
{
    (void)state;
    for (int at_client = 0; at_client < 2; at_client++) {
        fixture f;
        bulk put;
        rig_open_on(&f, NULL);
        stall_buffers(at_client == 1);
        bulk_init(&put, &f, KVC_PUT_BLOCKS, 300000);
        job_submit(&put.j);
        wait_one_stalled();
        f.ops->cancel(f.conn, &put.j.xfer);
        fake_verbs_fault(&fake_no_faults);
        wait_done(&f, 1);
        assert_status(put.j.status, KVC_CANCELLED);
        job_fini(&put.j);
        assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, 300000));
        rig_close_all(&f);
    }
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
        fixture_handle(&f, rig_handler);
        rig_set_reply(1, cases[i / 2].reply_bytes);
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
        rig_close_all(&f);
    }
}

static void on_got(kvt_call *call, kvc_status status, const char *why)
{
    fixture *f = call->user;
    fixture_reply(f, call, status == KVC_CLOSED ? KVC_OK : status, why, 0, NULL, NULL, 0);
}

static void stream_handler(fixture *f, kvt_call *call)
{
    call->user = f;
    call->got = on_got;
    kvt_call_recv(call);
}

static atomic_uint n_taken;

static void count_taken(job *j, bool ok)
{
    (void)j;
    atomic_fetch_add(&n_taken, ok);
}

static void open_summed(fixture *f, uint32_t max_calls)
{
    fake_verbs_use(NULL);
    fixture_init(f);
    f->sums = true;
    f->listen.max_calls = max_calls;
    fixture_listen(f);
    fixture_connect(f, 1);
}

static void flip_send(uint32_t after)
{
    fake_faults fault = fake_no_faults;
    fault.flip = IBV_WR_SEND;
    fault.flip_after = after;
    fake_verbs_fault(&fault);
}

/* A stream's end has a sum as well: changed under way, it is not taken for one. */
static void ends_of_streams_are_summed(void **state)
{
    (void)state;
    for (int flipped = 0; flipped < 2; flipped++) {
        fixture f;
        job j;
        open_summed(&f, 100);
        fixture_handle(&f, stream_handler);
        uint64_t wrong = kvc_metric_get(KVC_M_rdma_sums_wrong);
        atomic_store(&n_taken, 0);
        job_init(&j, &f, sample_request(KVC_PUT_BLOCKS_STREAM, 100, &f.arena), PATIENCE_NS);
        j.on_pushed = count_taken;
        job_submit(&j);
        uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
        while (atomic_load(&n_taken) == 0 && !kvc_expired(give_up_ns))
            usleep(1000);
        if (flipped)
            flip_send(1);
        assert_ok(f.ops->push(f.conn, &j.xfer, NULL));
        wait_done(&f, 1);
        assert_int_equal(fake_verbs_hits(), flipped);
        assert_status(j.status, flipped ? KVC_CORRUPT : KVC_OK);
        assert_int_equal(kvc_metric_get(KVC_M_rdma_sums_wrong) - wrong, flipped);
        job_fini(&j);
        fake_verbs_fault(&fake_no_faults);
        rig_close_all(&f);
    }
}

/* An answer that no call was made for, too: too many calls, said wrongly. */
static void refusals_are_summed(void **state)
{
    (void)state;
    for (int flipped = 0; flipped < 2; flipped++) {
        fixture f;
        job held, j;
        open_summed(&f, 1);
        fixture_handle(&f, hold_handler);
        uint64_t wrong = kvc_metric_get(KVC_M_rdma_sums_wrong);
        job_init(&held, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        job_submit(&held);
        wait_held(&f, 1);
        if (flipped)
            flip_send(2); /* after the request */
        job_init(&j, &f, sample_request(KVC_STATS, 0, &f.arena), PATIENCE_NS);
        assert_status(job_run(&j), flipped ? KVC_CORRUPT : KVC_AGAIN);
        assert_int_equal(fake_verbs_hits(), flipped);
        assert_int_equal(kvc_metric_get(KVC_M_rdma_sums_wrong) - wrong, flipped);
        job_fini(&j);
        fake_verbs_fault(&fake_no_faults);
        assert_int_equal(answer_held(&f), 1);
        wait_done(&f, 2);
        assert_status(held.status, KVC_NOT_FOUND);
        job_fini(&held);
        rig_close_all(&f);
    }
}

/* What is lent is sent from: on iWARP too, where sinks of READs are open to the peer. */
static void lent_memory_is_shut(void **state)
{
    (void)state;
    rig_set_reply(16, 4096);
    for (int iwarp = 0; iwarp < 2; iwarp++) {
        const fake_device device = {6, 64, 4, iwarp == 1, false};
        fixture f;
        rig_open_on(&f, &device);
        assert_ok(run_bulk(&f, KVC_PUT_BLOCKS, BIG));
        assert_ok(run_bulk(&f, KVC_FETCH_ROWS, 0));
        rig_wait_registered();
        assert_false(fake_verbs_open(rig_lent));
        rig_close_all(&f);
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
        rig_close_all(&f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(counts_of_chains),
        cmocka_unit_test(counts_of_reads),
        cmocka_unit_test(reads_complete_late),
        cmocka_unit_test(rows_one_to_all),
        cmocka_unit_test(lent_memory_comes_and_goes),
        cmocka_unit_test(sums_are_verified),
        cmocka_unit_test(ends_of_streams_are_summed),
        cmocka_unit_test(refusals_are_summed),
        cmocka_unit_test(registering_is_off_the_path),
        cmocka_unit_test(buffers_are_registered_unlocked),
        cmocka_unit_test(given_up_while_registering),
        cmocka_unit_test(buffers_are_given_back),
        cmocka_unit_test(lent_memory_is_shut),
    };
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    suite_uri = "rdma://127.0.0.1:0";
    return cmocka_run_group_tests(tests, rig_make_lent, rig_drop_lent);
}
