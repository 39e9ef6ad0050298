/*
 * worker_fake_finite_test.c: keys, and values that are coded, which are not finite and come in the
 * engine's device memory, where only the device looks: over a fake of one.
 */
#include "bench.h"
#include "fake_cuda.h"
#include "fake_rig.h"
#include "oracle.h"

#include "base/clock.h"

enum { FIRST = 300, N = 70 };

typedef struct setup {
    rig r;
    kvw_seq *seq;
    uint32_t dims;
} setup;

static void set_up_caching(setup *s, kvc_client *client, const char *selector, uint64_t row_dtype,
                           double reselect_cos, uint32_t factor)
{
    uint32_t reused = 0;
    memset(s, 0, sizeof(*s));
    fake_rig(&s->r, client);
    s->dims = FAKE_DIMS;
    s->r.opts.device_memory = 1;
    s->r.opts.selector = selector;
    s->r.opts.reselect_cos = reselect_cos;
    s->r.opts.index = factor == 0 ? s->r.opts.index : KVW_INDEX_RERANKED;
    s->r.opts.rerank_factor = factor;
    s->r.k_scale = 0.5; /* votes that are not one token's */
    s->r.opts.row_dtype = row_dtype;
    s->r.opts.n_q_heads = row_dtype != 0 ? 16 : s->r.opts.n_q_heads;
    s->r.opts.n_kv_heads = row_dtype != 0 ? 8 : s->r.opts.n_kv_heads;
    s->r.opts.chunk_tokens = 128;
    rig_project(&s->r, FAKE_DIMS);
    rig_open(&s->r);
    assert_ok(kvw_seq_create(s->r.worker, NULL, 0, &s->seq, &reused));
    rig_prefill(&s->r, s->seq, 0, FIRST, NULL, NULL);
}

static void set_up(setup *s, kvc_client *client, const char *selector, uint64_t row_dtype)
{
    set_up_caching(s, client, selector, row_dtype, 0, 0);
}

static void tear_down(setup *s)
{
    kvw_seq_destroy(s->seq);
    rig_close(&s->r);
}

/* What one layer is given for a pass. */
typedef struct given {
    uint16_t *k, *v, *q;
    float *lse;
    size_t n_kv;
} given;

static given given_of(const rig *r, uint32_t layer, uint32_t first, uint32_t n)
{
    given g = {.k = rig_bytes(r, r->k, rig_kv_width(r), layer, first, n),
               .v = rig_bytes(r, r->v, rig_kv_width(r), layer, first, n),
               .q = rig_bytes(r, r->q, rig_q_width(r), layer, first, n),
               .lse = calloc((size_t)n * r->opts.n_q_heads, sizeof(float)),
               .n_kv = (size_t)n * rig_kv_width(r)};
    assert_non_null(g.lse);
    return g;
}

static void given_free(given *g)
{
    free(g->k);
    free(g->v);
    free(g->q);
    free(g->lse);
}

static void assert_not_finite(kvc_status st)
{
    assert_int_equal(st, KVC_INVALID);
    assert_non_null(strstr(kvw_last_error(), "is not finite"));
}

/* append alone, then the step in parts, or kvw_forward. */
static kvc_status forward(setup *s, uint32_t layer, const given *g, uint32_t n, bool parts)
{
    kvw_step *step = NULL;
    if (!parts)
        return kvw_forward(s->seq, layer, g->q, g->k, g->v, n, g->q, g->lse);
    assert_ok(kvw_append(s->seq, layer, g->k, g->v, n)); /* nobody has looked yet */
    assert_ok(kvw_step_begin(s->seq, layer, g->q, n, &step));
    assert_ok(kvw_step_attend(step, g->q));
    return kvw_step_finish(step, g->q, g->q, g->lse);
}

/* Refused with the Infinity or NaN at x[at], and taken when it is repeated without. */
static void refuse_and_take(setup *s, uint32_t n, bool parts, bool value)
{
    uint32_t first = (uint32_t)kvw_seq_tokens(s->seq);
    assert_ok(kvw_tokens(s->seq, s->r.tokens + first, n));
    for (uint32_t layer = 0; layer < 2; layer++) {
        given bad = given_of(&s->r, layer, first, n), good = given_of(&s->r, layer, first, n);
        uint16_t *x = value ? bad.v : bad.k;
        x[layer == 0 ? bad.n_kv - 1u : 1u] = layer == 0 ? 0x7f80 : 0xffc0;
        assert_not_finite(forward(s, layer, &bad, n, parts));
        assert_int_equal(kvw_seq_tokens(s->seq), first);
        assert_ok(forward(s, layer, &good, n, parts));
        const rig_step done = {
            .seq = s->seq, .layer = layer, .first = first, .n = n, .out = good.q, .lse = good.lse};
        if (s->r.opts.row_dtype == 0) /* of coded rows worker_coded_test has the oracle */
            oracle_check_step(&s->dims, &s->r, &done);
        given_free(&bad);
        given_free(&good);
    }
}

static void a_pass_is_refused_and_repeated(void **state)
{
    (void)state;
    static const uint64_t dtypes[] = {0, KVK_I8_SCALED, 0, KVK_I8_SCALED, 0};
    for (size_t i = 0; i < 5; i++) { /* the last one over two levels, of which the second decides */
        setup s;
        set_up_caching(&s, NULL, i < 2 ? "esa" : "tokenselect", dtypes[i], 0, i < 4 ? 0 : 100);
        for (int parts = 0; parts < 2; parts++) {
            refuse_and_take(&s, 1, parts != 0, false);
            refuse_and_take(&s, N, parts != 0, false);
            if (dtypes[i] != 0) {
                refuse_and_take(&s, 1, parts != 0, true);
                refuse_and_take(&s, 5, parts != 0, true);
            }
        }
        uint32_t first = (uint32_t)kvw_seq_tokens(s.seq);
        if (dtypes[i] == 0)
            rig_decode(&s.r, s.seq, first, first + 20, oracle_check_step, &s.dims);
        if (i == 4)
            rig_check_levels(s.seq);
        kvw_stats stats = stats_of(s.seq);
        assert_int_equal(stats.steps_device, stats.steps);
        tear_down(&s);
    }
}

/* What a refused step selected is kept by no other one. */
static void picks_of_a_refused_step_are_not_kept(void **state)
{
    (void)state;
    for (int parts = 0; parts < 2; parts++) {
        setup s;
        set_up_caching(&s, NULL, "tokenselect", 0, -1.0, 0); /* whatever the query */
        assert_ok(kvw_tokens(s.seq, s.r.tokens + FIRST, 1));
        given bad = given_of(&s.r, 0, FIRST, 1), good = given_of(&s.r, 0, FIRST, 1);
        bad.k[0] = 0x7f80;
        uint64_t reselects = stats_of(s.seq).reselects;
        assert_not_finite(forward(&s, 0, &bad, 1, parts != 0));
        assert_int_equal(stats_of(s.seq).reselects, reselects);
        assert_ok(forward(&s, 0, &good, 1, parts != 0));
        assert_int_equal(stats_of(s.seq).reselects, reselects + 1u);
        const rig_step done = {
            .seq = s.seq, .layer = 0, .first = FIRST, .n = 1, .out = good.q, .lse = good.lse};
        oracle_check_step(&s.dims, &s.r, &done);
        given_free(&bad);
        given_free(&good);
        tear_down(&s);
    }
}

/* An append that fails halfway has the device done with it: what it found is not the next one's. */
static void an_append_that_fails_leaves_nothing_to_find(void **state)
{
    (void)state;
    for (uint32_t n_ops = 1; n_ops < 3; n_ops++) { /* looked at only; one block's rows too */
        setup s;
        set_up(&s, NULL, "esa", 0);
        assert_ok(kvw_tokens(s.seq, s.r.tokens + FIRST, N));
        given bad = given_of(&s.r, 0, FIRST, N), good = given_of(&s.r, 0, FIRST, N);
        bad.k[0] = 0x7f80;
        uint64_t syncs = stats_of(s.seq).host_syncs;
        fake_cuda_ops(n_ops);
        assert_int_equal(kvw_append(s.seq, 0, bad.k, bad.v, N), KVC_UNSUPPORTED);
        fake_cuda_ops(UINT32_MAX);
        assert_true(stats_of(s.seq).host_syncs > syncs);
        assert_ok(forward(&s, 0, &good, N, false));
        const rig_step done = {
            .seq = s.seq, .layer = 0, .first = FIRST, .n = N, .out = good.q, .lse = good.lse};
        oracle_check_step(&s.dims, &s.r, &done);
        given_free(&bad);
        given_free(&good);
        tear_down(&s);
    }
}

/* A value that is not coded may be anything, as in host memory. */
static void a_value_that_is_not_coded_may_be_anything(void **state)
{
    (void)state;
    setup s;
    set_up(&s, NULL, "esa", 0);
    assert_ok(kvw_tokens(s.seq, s.r.tokens + FIRST, 1));
    given g = given_of(&s.r, 0, FIRST, 1);
    g.v[0] = 0x7f80;
    assert_ok(forward(&s, 0, &g, 1, false));
    given_free(&g);
    tear_down(&s);
}

/* Appended in all layers, and no step asked. */
static void append_bad(setup *s, uint32_t first, uint32_t n)
{
    assert_ok(kvw_tokens(s->seq, s->r.tokens + first, n));
    for (uint32_t layer = 0; layer < 2; layer++) {
        given g = given_of(&s->r, layer, first, n);
        g.k[0] = layer == 1 ? 0x7f80 : g.k[0];
        assert_ok(kvw_append(s->seq, layer, g.k, g.v, n));
        given_free(&g);
    }
}

static void without_a_step_it_is_taken_back(void **state)
{
    (void)state;
    setup s;
    set_up(&s, NULL, "esa", 0);
    append_bad(&s, FIRST, 4);
    assert_not_finite(kvw_truncate(s.seq, FIRST + 2));
    assert_ok(kvw_truncate(s.seq, FIRST));
    append_bad(&s, FIRST, 1);
    assert_ok(kvw_truncate(s.seq, FIRST));
    rig_pass(&s.r, s.seq, FIRST, 4, oracle_check_step, &s.dims);
    rig_decode(&s.r, s.seq, FIRST + 4, FIRST + 8, oracle_check_step, &s.dims);
    /* a pass behind it is refused */
    append_bad(&s, FIRST + 8, 1);
    assert_ok(kvw_tokens(s.seq, s.r.tokens + FIRST + 9, 1));
    given g = given_of(&s.r, 1, FIRST + 9, 1);
    assert_not_finite(kvw_append(s.seq, 1, g.k, g.v, 1));
    assert_not_finite(kvw_append(s.seq, 1, g.k, g.v, 1));
    given_free(&g);
    tear_down(&s);
}

static void it_never_reaches_the_store(void **state)
{
    bench *b = *state;
    setup s;
    set_up(&s, b->client, "esa", 0);
    uint32_t bt = s.r.opts.block_tokens, first = FIRST / bt * bt + bt - 1u;
    rig_decode(&s.r, s.seq, FIRST, first, NULL, NULL);
    assert_ok(kvw_flush(s.seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    uint64_t put = stats_of(s.seq).blocks_put;
    append_bad(&s, first, 1); /* it fills a block */
    assert_not_finite(kvw_tokens(s.seq, s.r.tokens + first + 1u, 1));
    assert_not_finite(kvw_flush(s.seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    assert_int_equal(stats_of(s.seq).blocks_put, put);
    assert_ok(kvw_truncate(s.seq, first));
    rig_decode(&s.r, s.seq, first, first + 3u, oracle_check_step, &s.dims);
    assert_ok(kvw_flush(s.seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    assert_int_equal(stats_of(s.seq).blocks_put, put + 1u);
    tear_down(&s);
}

/* In a batch the others' tokens stay, and the one is as before. */
static void of_a_batch_only_one_is_taken_back(void **state)
{
    (void)state;
    setup s;
    kvw_batch *batch = NULL;
    kvw_seq *seqs[2];
    uint32_t reused = 0;
    set_up(&s, NULL, "esa", 0);
    seqs[0] = s.seq;
    assert_ok(kvw_seq_create(s.r.worker, NULL, 0, &seqs[1], &reused));
    rig_prefill(&s.r, seqs[1], 0, FIRST, NULL, NULL);
    assert_ok(kvw_batch_open(s.r.worker, 2, NULL, &batch));
    given g = given_of(&s.r, 0, FIRST, 2), good = given_of(&s.r, 0, FIRST, 2);
    for (int i = 0; i < 2; i++)
        assert_ok(kvw_tokens(seqs[i], s.r.tokens + FIRST, 1));
    g.k[g.n_kv - 1u] = 0x7f80;
    assert_not_finite(kvw_batch_forward(batch, seqs, 2, 0, g.q, g.k, g.v, g.q, g.lse));
    kvw_step *step = NULL;
    assert_int_equal(kvw_step_begin(seqs[1], 0, good.q, 1, &step), KVC_INVALID);
    assert_ok(kvw_step_begin(seqs[0], 0, good.q, 1, &step));
    assert_ok(kvw_step_finish(step, good.q, good.q, good.lse));
    const rig_step done = {
        .seq = seqs[0], .layer = 0, .first = FIRST, .n = 1, .out = good.q, .lse = good.lse};
    oracle_check_step(&s.dims, &s.r, &done);
    s.seq = seqs[1];
    given again = given_of(&s.r, 0, FIRST, 1);
    assert_ok(forward(&s, 0, &again, 1, false));
    const rig_step then = {
        .seq = seqs[1], .layer = 0, .first = FIRST, .n = 1, .out = again.q, .lse = again.lse};
    oracle_check_step(&s.dims, &s.r, &then);
    given_free(&g);
    given_free(&good);
    given_free(&again);
    kvw_batch_close(batch);
    kvw_seq_destroy(seqs[0]);
    tear_down(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_pass_is_refused_and_repeated),
        cmocka_unit_test(picks_of_a_refused_step_are_not_kept),
        cmocka_unit_test(an_append_that_fails_leaves_nothing_to_find),
        cmocka_unit_test(a_value_that_is_not_coded_may_be_anything),
        cmocka_unit_test(without_a_step_it_is_taken_back),
        cmocka_unit_test_setup_teardown(it_never_reaches_the_store, bench_open, bench_close),
        cmocka_unit_test(of_a_batch_only_one_is_taken_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
