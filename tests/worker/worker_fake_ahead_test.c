/*
 * worker_fake_ahead_test.c: rows that set off when a step begins, over the fake device: that they
 * have come before the query, that they do not come twice, and what becomes of them when another
 * step needs their place, or nobody comes for them.
 */
#include "bench.h"
#include "fake_cuda.h"
#include "fake_rig.h"
#include "oracle.h"

#include "base/clock.h"
#include "device/state.h"
#include "internal.h"

enum { PREFILL = 576, LAYERS = 2 };

typedef struct ahead_rig {
    rig r;
    kvw_seq *seq;
    void *k[LAYERS], *v[LAYERS], *q[LAYERS], *other[LAYERS]; /* other: a prediction */
    void *out;
    float lse[64];
} ahead_rig;

/* A pass of one token that every layer has appended; its rows are the server's. */
static void open_rig(ahead_rig *a, kvc_client *client)
{
    uint32_t reused = 0;
    *a = (ahead_rig){.seq = NULL};
    fake_rig(&a->r, client);
    rig_open(&a->r);
    assert_ok(kvw_seq_create(a->r.worker, NULL, 0, &a->seq, &reused));
    rig_prefill(&a->r, a->seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(a->seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    assert_ok(kvw_tokens(a->seq, a->r.tokens + PREFILL, 1));
    for (uint32_t l = 0; l < LAYERS; l++) {
        a->k[l] = rig_bytes(&a->r, a->r.k, rig_kv_width(&a->r), l, PREFILL, 1);
        a->v[l] = rig_bytes(&a->r, a->r.v, rig_kv_width(&a->r), l, PREFILL, 1);
        a->q[l] = rig_bytes(&a->r, a->r.q, rig_q_width(&a->r), l, PREFILL, 1);
        a->other[l] = rig_bytes(&a->r, a->r.q, rig_q_width(&a->r), l, PREFILL - 9, 1);
        assert_ok(kvw_append(a->seq, l, a->k[l], a->v[l], 1));
    }
    a->out = malloc(rig_q_width(&a->r) * sizeof(float));
    assert_non_null(a->out);
    assert_true(a->r.opts.n_q_heads <= 64);
}

static void close_rig(ahead_rig *a)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        free(a->k[l]);
        free(a->v[l]);
        free(a->q[l]);
        free(a->other[l]);
    }
    free(a->out);
    kvw_seq_destroy(a->seq);
    rig_close(&a->r);
}

static void finish(ahead_rig *a, uint32_t layer, kvw_step *step)
{
    uint32_t dims = FAKE_DIMS;
    assert_ok(kvw_step_finish(step, a->q[layer], a->out, a->lse));
    const rig_step done = {
        .seq = a->seq, .layer = layer, .first = PREFILL, .n = 1, .out = a->out, .lse = a->lse};
    oracle_check_step(&dims, &a->r, &done);
}

/* Mapped rows are read between begin and finish, once. */
static void rows_are_there_before_the_query(void **state)
{
    served *s = *state;
    ahead_rig a;
    kvw_step *step = NULL;
    for (int attends = 0; attends < 2; attends++) {
        open_rig(&a, s->client);
        kvw_stats before = stats_of(a.seq);
        uint64_t read = fake_cuda_rows_read();
        assert_ok(kvw_step_begin(a.seq, 0, a.q[0], 1, &step));
        uint64_t came = fake_cuda_rows_read() - read;
        assert_true(came > 0);
        if (attends != 0)
            assert_ok(kvw_step_attend(step, a.q[0]));
        finish(&a, 0, step);
        kvw_stats after = stats_of(a.seq);
        assert_int_equal(fake_cuda_rows_read() - read, came);
        assert_int_equal(after.misses - before.misses, came);
        assert_int_equal(after.rows_ahead - before.rows_ahead, came);
        assert_int_equal(after.host_syncs - before.host_syncs, 1);
        close_rig(&a);
    }
}

/* What a prediction brought serves the step with the real query: only what it did not foresee is
 * missing. */
static void a_prediction_brings_rows(void **state)
{
    served *s = *state;
    ahead_rig a;
    kvw_step *step = NULL;
    open_rig(&a, s->client);
    assert_ok(kvw_step_begin(a.seq, 0, a.other[0], 1, &step));
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    uint64_t read = fake_cuda_rows_read();
    assert_ok(kvw_step_finish(step, a.q[0], a.out, NULL));
    assert_int_equal(fake_cuda_rows_read(), read); /* all were there */
    assert_ok(kvw_last_picks(a.seq, 0, &picks, &n));
    assert_int_equal(n, a.r.opts.k);
    assert_int_equal(a.seq->tainted, 1);
    kvw_stats before = stats_of(a.seq);
    assert_ok(kvw_step_begin(a.seq, 0, a.other[0], 1, &step)); /* its picks are resident */
    assert_ok(kvw_step_finish(step, a.q[0], a.out, NULL));
    assert_int_equal(stats_of(a.seq).misses, before.misses);
    close_rig(&a);
}

/* Rows on their way are read before the tables that say where they are become others. */
static void tables_wait_for_rows_on_their_way(void **state)
{
    served *s = *state;
    ahead_rig a;
    kvw_step *step = NULL;
    fake_cuda_late(true);
    open_rig(&a, s->client);
    uint64_t read = fake_cuda_rows_read();
    assert_ok(kvw_step_begin(a.seq, 0, a.q[0], 1, &step));
    assert_int_equal(a.seq->device->layers[0].ahead, KVWI_AHEAD_BROUGHT);
    assert_int_equal(fake_cuda_rows_read(), read); /* nobody has waited for them */
    assert_ok(kvwi_cuda_tables(a.seq, false));
    uint64_t came = fake_cuda_rows_read() - read;
    assert_true(came > 0);
    finish(&a, 0, step);
    assert_int_equal(fake_cuda_rows_read() - read, came);
    close_rig(&a);
    fake_cuda_late(false);
}

/* Requests go out at begin, one fetch at a time; nothing is waited for until finish. */
static void a_fetch_sets_off_at_once(void **state)
{
    bench *b = *state;
    ahead_rig a;
    kvw_step *step[LAYERS];
    open_rig(&a, b->client);
    kvw_stats before = stats_of(a.seq);
    assert_ok(kvw_step_begin(a.seq, 0, a.q[0], 1, &step[0]));
    assert_int_equal(a.seq->device->layers[0].ahead, KVWI_AHEAD_ASKED);
    assert_true(a.seq->device->layers[0].flight.in_flight);
    assert_ok(kvw_step_begin(a.seq, 1, a.q[1], 1, &step[1])); /* staging is taken */
    assert_int_equal(a.seq->device->layers[1].ahead, KVWI_AHEAD_NONE);
    assert_ok(kvw_step_attend(step[0], a.q[0]));
    for (uint32_t l = 0; l < LAYERS; l++)
        finish(&a, l, step[l]);
    kvw_stats after = stats_of(a.seq);
    assert_true(after.rows_ahead > before.rows_ahead);
    assert_true(after.rows_ahead - before.rows_ahead < after.misses - before.misses);
    close_rig(&a);
}

/* A step that finishes first takes staging; the other one asks again. */
static void staging_is_yielded(void **state)
{
    bench *b = *state;
    ahead_rig a;
    kvw_step *step[LAYERS];
    open_rig(&a, b->client);
    for (uint32_t l = 0; l < LAYERS; l++)
        assert_ok(kvw_step_begin(a.seq, l, a.q[l], 1, &step[l]));
    finish(&a, 1, step[1]);
    assert_int_equal(a.seq->device->layers[0].ahead, KVWI_AHEAD_LOST);
    finish(&a, 0, step[0]);
    assert_null(a.seq->device->staged_for);
    assert_int_equal(stats_of(a.seq).rows_ahead, 0);
    close_rig(&a);
}

/* What was asked for an abandoned step is not taken for resident, by either way. */
static void abandoned_rows_are_nobodys(void **state)
{
    bench *b = *state;
    ahead_rig a;
    kvw_step *step = NULL;
    open_rig(&a, b->client);
    uint64_t misses = stats_of(a.seq).misses;
    for (int i = 0; i < 3; i++) {
        assert_ok(kvw_step_begin(a.seq, 0, i == 1 ? a.other[0] : a.q[0], 1, &step));
        kvw_step_abandon(step);
        assert_null(a.seq->device->staged_for);
    }
    assert_ok(kvw_step_begin(a.seq, 0, a.q[0], 1, &step));
    finish(&a, 0, step);
    assert_true(stats_of(a.seq).misses > misses);
    close_rig(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(rows_are_there_before_the_query, open_served, close_served),
        cmocka_unit_test_setup_teardown(a_prediction_brings_rows, open_served, close_served),
        cmocka_unit_test_setup_teardown(tables_wait_for_rows_on_their_way, open_served,
                                        close_served),
        cmocka_unit_test_setup_teardown(a_fetch_sets_off_at_once, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(staging_is_yielded, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(abandoned_rows_are_nobodys, bench_open, bench_close),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
