/*
 * worker_fault_test.c: what happens to a worker when its store is slow, full, or has lost rows.
 */
#include "oracle.h"

#include "base/clock.h"
#include "bench.h"
#include "internal.h"
#include "selector/selector.h"

/* rig_one_step for tokens from *pos_p on, again where a busy machine did not do it within the
   worker's fetch_timeout_ns; *pos_p is that of the last one then. */
static kvc_status step_in_time(rig *r, kvw_seq *seq, uint32_t *pos_p, float *out, float *lse)
{
    kvc_status st = rig_one_step(r, seq, *pos_p, out, lse);
    for (int i = 0; st == KVC_TIMED_OUT && i < 20; i++)
        st = rig_one_step(r, seq, ++*pos_p, out, lse);
    return st;
}

/* A store that is full half of the time gets everything in the end, in order, and nothing twice. */
static void puts_ride_out_a_storm_of_again(void **state)
{
    bench *b = *state;
    rig r;
    rig_record calm, storm;
    kvw_stats stats;
    uint32_t reused = 0;
    store_rig(&r, "tokenselect", KVW_INDEX_COMPRESSED, b->client);
    rig_open(&r);
    run(&r, &calm, 0, &reused, &stats);
    store_forget(&b->store, true);
    store_forget(&b->store, false);
    store_set(&b->store, &(store_faults){.again_every = 2, .again_calls = 3, .extend_failures = 2});
    run(&r, &storm, 0, &reused, &stats);
    assert_int_equal(stats.blocks_put, 10);
    assert_true(stats.put_retries >= 10);
    assert_true(store_count(&b->store, &b->store.n_again) >= 20);
    rig_record_equal(&r, &calm, &storm, 0, 700);
    store_set(&b->store, &(store_faults){0});
    rig_record warm;
    run(&r, &warm, 700, &reused, &stats);
    assert_int_equal(reused, 640);
    rig_record_equal(&r, &calm, &warm, 640, 700);
    rig_record_fini(&calm);
    rig_record_fini(&storm);
    rig_record_fini(&warm);
    rig_close(&r);
}

/* Nothing leaves the worker before it is acknowledged, and the engine waits rather than grow. */
static void a_full_store_holds_the_engine_back(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0, first = 0;
    kvc_status st = KVC_OK;
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    r.opts.put_window = 2;
    r.opts.put_timeout_ns = 50000000ull;
    rig_open(&r);
    store_set(&b->store, &(store_faults){.again_every = 1});
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    for (; first < 640; first += 64) {
        st = kvw_tokens(seq, r.tokens + first, 64);
        if (st != KVC_OK)
            break;
        for (uint32_t layer = 0; layer < 2; layer++) {
            void *k = rig_bytes(&r, r.k, rig_kv_width(&r), layer, first, 64);
            assert_ok(kvw_append(seq, layer, k, k, 64));
            free(k);
        }
    }
    assert_status(st, KVC_TIMED_OUT);
    assert_int_equal(first, 3 * 64); /* two on their way, a third one full */
    assert_status(kvw_flush(seq, kvc_deadline_ns(20000000ull)), KVC_TIMED_OUT);
    store_set(&b->store, &(store_faults){0});
    do { /* it may be begun again, once the thread has tried again */
        st = kvw_tokens(seq, r.tokens + first, 64);
    } while (st == KVC_TIMED_OUT);
    assert_ok(st);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

static void a_put_that_cannot_succeed_is_an_error(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    store_rig(&r, "esa", KVW_INDEX_EXACT, b->client);
    rig_open(&r);
    store_set(&b->store, &(store_faults){.put_status = KVC_NO_SPACE});
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 64, NULL, NULL);
    assert_status(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)), KVC_NO_SPACE);
    assert_status(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)), KVC_NO_SPACE);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A sequence that ends while the store is stuck gives up after put_timeout_ns. */
static void destroy_does_not_wait_for_ever(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    store_rig(&r, "esa", KVW_INDEX_EXACT, b->client);
    r.opts.put_timeout_ns = 100000000ull;
    rig_open(&r);
    store_set(&b->store, &(store_faults){.again_every = 1});
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 128, NULL, NULL);
    uint64_t t0 = kvc_now_ns();
    kvw_seq_destroy(seq);
    assert_true(kvc_now_ns() - t0 < SUPPORT_PATIENCE_NS);
    rig_close(&r);
}

/* Passes of a chunk, appended only; OK or what kvw_tokens said. */
static kvc_status append_chunks(rig *r, kvw_seq *seq, uint32_t end)
{
    for (uint32_t first = 0; first < end; first += 64) {
        kvc_status st = kvw_tokens(seq, r->tokens + first, 64);
        if (st != KVC_OK)
            return st;
        for (uint32_t layer = 0; layer < 2; layer++) {
            void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, first, 64);
            assert_ok(kvw_append(seq, layer, k, k, 64));
            free(k);
        }
    }
    return KVC_OK;
}

/* Also where the window is full, and where no deadline was given. */
static void flush_keeps_its_deadline(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    store_rig(&r, "esa", KVW_INDEX_EXACT, b->client);
    r.opts.put_window = 1;
    r.opts.put_timeout_ns = 1000000000ull;
    rig_open(&r);
    store_set(&b->store, &(store_faults){.again_every = 1});
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    assert_ok(append_chunks(&r, seq, 128)); /* one block on its way, another to be submitted */
    uint64_t t0, took_ns = UINT64_MAX;
    for (int i = 0; i < 50 && took_ns >= 1000000000ull; i++) { /* a busy machine may add to it */
        t0 = kvc_now_ns();
        assert_status(kvw_flush(seq, kvc_deadline_ns(50000000ull)), KVC_TIMED_OUT);
        took_ns = kvc_now_ns() - t0;
    }
    assert_true(took_ns < 1000000000ull);
    assert_status(kvw_flush(seq, 1), KVC_TIMED_OUT); /* long ago */
    t0 = kvc_now_ns();
    assert_status(kvw_flush(seq, 0), KVC_TIMED_OUT);
    assert_true(kvc_now_ns() - t0 >= 1000000000ull);
    store_set(&b->store, &(store_faults){0});
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    assert_int_equal(stats_of(seq).blocks_put, 2);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A store that fails, as a dead one does, is not waited for; the window may be full of retries. */
static void destroy_does_not_wait_for_a_dead_store(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    store_rig(&r, "esa", KVW_INDEX_EXACT, b->client);
    r.opts.put_window = 1;
    r.opts.put_timeout_ns = 2 * SUPPORT_PATIENCE_NS;
    rig_open(&r);
    store_set(&b->store, &(store_faults){.put_status = KVC_UNAVAILABLE});
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    assert_ok(append_chunks(&r, seq, 128));
    uint64_t t0 = kvc_now_ns();
    kvw_seq_destroy(seq);
    assert_true(kvc_now_ns() - t0 < SUPPORT_PATIENCE_NS);
    rig_close(&r);
}

static void fail_policy_reports_lost_and_late_rows(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0, pos = 640;
    float out[64], lse[4];
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    r.opts.fetch_timeout_ns = 100000000ull;
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    store_set(&b->store, &(store_faults){.lose_every = 2});
    assert_status(step_in_time(&r, seq, &pos, out, lse), KVC_NOT_FOUND);
    assert_non_null(strstr(kvw_last_error(), "did not arrive"));
    store_set(&b->store, &(store_faults){.fetch_delay_ms = 3600000}); /* the test ends first */
    assert_status(rig_one_step(&r, seq, ++pos, out, lse), KVC_TIMED_OUT);
    store_set(&b->store, &(store_faults){0});
    pos++;
    assert_ok(step_in_time(&r, seq, &pos, out, lse)); /* and the sequence lives on */
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A step that is given up while its rows travel leaves the layer free for another. */
static void an_abandoned_step_can_begin_again(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    kvw_step *step = NULL;
    uint32_t reused = 0;
    float out[64], again[64], lse[4];
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    store_set(&b->store, &(store_faults){.fetch_delay_ms = 300, .delay_calls = 1});
    assert_ok(rig_one_step(&r, seq, 640, out, lse)); /* late, and waited for */
    kvw_step_abandon(NULL);
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 100, 1);
    store_set(&b->store, &(store_faults){.fetch_delay_ms = 300, .delay_calls = 1});
    assert_ok(kvw_step_begin(seq, 0, q, 1, &step));
    kvw_step_abandon(step);
    assert_ok(kvw_step_begin(seq, 0, q, 1, &step));
    assert_ok(kvw_step_attend(step, q));
    kvw_step_abandon(step);
    free(q);
    q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 640, 1);
    assert_ok(kvw_step_begin(seq, 0, q, 1, &step));
    assert_ok(kvw_step_finish(step, q, again, lse));
    assert_memory_equal(out, again, sizeof(out));
    free(q);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* Dropped rows are left out, the others keep the numbers that all picks gave them. */
static void drop_policy_leaves_rows_out(void **state)
{
    bench *b = *state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        for (uint32_t exact = 0; exact < 2; exact++) {
            rig r;
            kvw_seq *seq = NULL;
            uint32_t reused = 0, n = 0, n_skip = 0, skip[48];
            const uint32_t *picks = NULL;
            float out[64], lse[4];
            double want[64], want_lse[4];
            store_rig(&r, kvw_selector_at(i)->name, KVW_INDEX_EXACT, b->client);
            r.opts.policy = KVW_DROP;
            r.opts.exact = exact;
            rig_open(&r);
            /* from the start, so that no lost row was ever resident */
            store_set(&b->store, &(store_faults){.lose_every = 2});
            assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
            rig_prefill(&r, seq, 0, 640, NULL, NULL);
            assert_ok(kvw_flush(seq, 0));
            kvw_stats before = stats_of(seq);
            assert_ok(rig_one_step(&r, seq, 640, out, lse));
            assert_ok(kvw_last_picks(seq, 0, &picks, &n));
            for (uint32_t j = 0; j < n;
                 j++) /* block 0 has sinks, those from 576 on recent tokens */
                if (picks[j] % 2 == 0 && picks[j] >= 64 && picks[j] < 576)
                    skip[n_skip++] = picks[j];
            assert_true(n_skip > 0);
            assert_int_equal(stats_of(seq).rows_dropped - before.rows_dropped, n_skip);
            oracle_attend(&r, 0, 640, 1, picks, n, oracle_near(&r, 641, 1), skip, n_skip, want,
                          want_lse);
            const rig_step done = {.seq = seq, .first = 640, .n = 1, .out = out, .lse = lse};
            oracle_check_out(&r, &done, want, want_lse);
            /* what was lost is asked for again once it is back */
            store_set(&b->store, &(store_faults){0});
            before = stats_of(seq);
            assert_ok(rig_one_step(&r, seq, 641, out, lse));
            assert_int_equal(stats_of(seq).rows_dropped, before.rows_dropped);
            assert_ok(kvw_last_picks(seq, 0, &picks, &n));
            oracle_attend(&r, 0, 641, 1, picks, n, oracle_near(&r, 642, 1), NULL, 0, want,
                          want_lse);
            const rig_step whole = {.seq = seq, .first = 641, .n = 1, .out = out, .lse = lse};
            oracle_check_out(&r, &whole, want, want_lse);
            kvw_seq_destroy(seq);
            rig_close(&r);
        }
    }
}

/* What was computed with rows left out is nobody else's. */
static void tainted_blocks_are_not_reused(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    r.opts.policy = KVW_DROP;
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 384, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    store_set(&b->store, &(store_faults){.lose_every = 1});
    rig_prefill(&r, seq, 384, 640, NULL, NULL);
    assert_true(stats_of(seq).rows_dropped > 0);
    kvw_seq_destroy(seq);
    store_set(&b->store, &(store_faults){0});
    assert_ok(kvw_seq_create(r.worker, r.tokens, 700, &seq, &reused));
    assert_true(reused >= 320 && reused < 512);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* Rows that go between match and fetch cost the reuse, not the sequence. */
static void a_prefix_that_vanishes_is_a_cold_start(void **state)
{
    bench *b = *state;
    rig r;
    rig_record cold, again;
    kvw_stats stats;
    uint32_t reused = 0;
    store_rig(&r, "esa", KVW_INDEX_COMPRESSED, b->client);
    rig_open(&r);
    run(&r, &cold, 700, &reused, &stats);
    store_set(&b->store, &(store_faults){.lose_every = 64});
    kvw_seq *seq = NULL;
    assert_ok(kvw_seq_create(r.worker, r.tokens, 700, &seq, &reused));
    assert_int_equal(reused, 0);
    store_set(&b->store, &(store_faults){0});
    rig_record_init(&again, &r);
    rig_prefill(&r, seq, 0, 660, rig_record_step, &again);
    rig_decode(&r, seq, 660, 700, rig_record_step, &again);
    assert_ok(kvw_flush(seq, 0));
    assert_int_equal(stats_of(seq).blocks_existed, 10);
    rig_record_equal(&r, &cold, &again, 0, 700);
    kvw_seq_destroy(seq);
    rig_record_fini(&cold);
    rig_record_fini(&again);
    rig_close(&r);
}

/* ---- attention that fails ---- */

static const kvk_ops *real_ops;
static int n_attends, failing_attend; /* the so-manieth fails */

static kvc_status attend_or_fail(kvk_backend *be, const kvk_attend_args *args, kvk_stream *stream)
{
    return ++n_attends == failing_attend ? KVC_NO_MEMORY : real_ops->attend(be, args, stream);
}

/* A step whose attention failed before its rows arrived never answers with the arrivals alone. */
static void a_failed_attend_fails_the_step(void **state)
{
    bench *b = *state;
    for (int by_hand = 0; by_hand < 2; by_hand++) {
        rig r;
        kvw_seq *seq = NULL;
        kvw_step *step = NULL;
        uint32_t reused = 0;
        float out[64] = {0}, again[64] = {0}, lse[4];
        store_rig(&r, "esa", KVW_INDEX_EXACT, b->client);
        r.opts.exact = 0;
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, 640, NULL, NULL);
        assert_ok(kvw_flush(seq, 0));
        assert_ok(rig_one_step(&r, seq, 640, out, lse));
        uint64_t misses = stats_of(seq).misses;
        real_ops = r.worker->ops;
        kvk_ops ops = *real_ops;
        ops.attend = attend_or_fail;
        for (failing_attend = 1; failing_attend <= 2; failing_attend++) { /* far, near */
            void *other = rig_bytes(&r, r.q, rig_q_width(&r), 0, 100u + failing_attend, 1);
            r.worker->ops = &ops;
            n_attends = 0;
            assert_ok(kvw_step_begin(seq, 0, other, 1, &step));
            assert_true(stats_of(seq).misses > misses); /* something is to arrive */
            misses = stats_of(seq).misses;
            if (by_hand)
                assert_status(kvw_step_attend(step, other), KVC_NO_MEMORY);
            assert_status(kvw_step_finish(step, other, again, lse), KVC_NO_MEMORY);
            r.worker->ops = real_ops;
            free(other);
        }
        void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 640, 1);
        assert_ok(kvw_step_begin(seq, 0, q, 1, &step));
        assert_ok(kvw_step_finish(step, q, again, lse)); /* and the sequence lives on */
        for (uint32_t i = 0; i < rig_q_width(&r); i++)
            assert_true(out[i] - again[i] < 1e-5f && again[i] - out[i] < 1e-5f);
        free(q);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

int main(void)
{
#define FAULT_TEST(name) cmocka_unit_test_setup_teardown(name, bench_open, bench_close)
    const struct CMUnitTest tests[] = {
        FAULT_TEST(puts_ride_out_a_storm_of_again),
        FAULT_TEST(a_full_store_holds_the_engine_back),
        FAULT_TEST(a_put_that_cannot_succeed_is_an_error),
        FAULT_TEST(destroy_does_not_wait_for_ever),
        FAULT_TEST(flush_keeps_its_deadline),
        FAULT_TEST(destroy_does_not_wait_for_a_dead_store),
        FAULT_TEST(fail_policy_reports_lost_and_late_rows),
        FAULT_TEST(an_abandoned_step_can_begin_again),
        FAULT_TEST(drop_policy_leaves_rows_out),
        FAULT_TEST(tainted_blocks_are_not_reused),
        FAULT_TEST(a_prefix_that_vanishes_is_a_cold_start),
        FAULT_TEST(a_failed_attend_fails_the_step),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
