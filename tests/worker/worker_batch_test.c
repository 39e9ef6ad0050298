/*
 * worker_batch_test.c: a token of several sequences in one call gives what the sequences give one
 * by one, whoever comes and goes. BACKEND: on the CPU, on a device, or on a fake of one.
 */
#include "bench.h"
#include "oracle.h"

#ifndef BACKEND
#define BACKEND "cpu"
#endif

enum { N_TOKENS = 700, SEQS = 4, DIMS = 30, LAYERS = 2 };

/* How long each is; the last one attends everything. */
static const uint32_t lengths[SEQS] = {600, 340, 512, 40};

typedef struct group {
    rig r;
    kvw_batch *batch;
    kvw_seq *seq[SEQS];
    uint32_t at[SEQS];
    rig_record want[SEQS]; /* of the same sequences alone */
    uint32_t *picks;       /* [SEQS][LAYERS][N_TOKENS][k], 0 where nothing was picked */
} group;

static uint32_t *picks_at(const group *g, uint32_t seq, uint32_t layer, uint32_t at)
{
    return g->picks + (((size_t)seq * LAYERS + layer) * N_TOKENS + at) * g->r.opts.k;
}

static kvw_seq *open_seq(group *g, uint32_t i)
{
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    assert_ok(kvw_seq_create(g->r.worker, g->r.tokens, 0, &seq, &reused));
    rig_prefill(&g->r, seq, 0, lengths[i], NULL, NULL);
    return seq;
}

typedef struct taker {
    group *g;
    uint32_t i;
} taker;

static void take(void *arg, const rig *r, const rig_step *step)
{
    taker *t = arg;
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    rig_record_step(&t->g->want[t->i], r, step);
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    assert_true(n <= r->opts.k);
    memcpy(picks_at(t->g, t->i, step->layer, step->first), picks, n * sizeof(*picks));
}

/* Queries that are alike, three or four in a row: what one selected, the next ones keep. */
static void repeat_queries(rig *r)
{
    size_t width = rig_q_width(r);
    rig_fill(r);
    for (size_t t = 0; t < (size_t)LAYERS * N_TOKENS; t++) {
        if (t % 7 % 4 != 0)
            memcpy(r->q + t * width, r->q + (t - 1u) * width, width * sizeof(*r->q));
    }
}

/* factor: of an index of two levels; 0: it has one. */
static void group_open(group *g, const char *selector, uint32_t factor, kvc_client *client)
{
    memset(g, 0, sizeof(*g));
    rig_init(&g->r, selector, N_TOKENS);
    g->r.opts.client = client;
    g->r.opts.backend = BACKEND;
    g->r.opts.exact = client != NULL && strcmp(BACKEND, "cpu") == 0;
    g->r.opts.dtype = KVK_BF16;
    g->r.opts.head_dim = 64;
    g->r.opts.n_q_heads = 8;
    g->r.opts.n_kv_heads = 4;
    g->r.opts.index = factor == 0 ? KVW_INDEX_COMPRESSED : KVW_INDEX_RERANKED;
    g->r.opts.rerank_factor = factor;
    g->r.opts.residency_slots = 96;
    g->r.opts.max_tokens = 512; /* one outgrows them before, one on the way */
    rig_project(&g->r, DIMS);
    if (strcmp(selector, "esa") != 0) {
        g->r.opts.reselect_cos = 0.9;
        repeat_queries(&g->r);
    }
    rig_open(&g->r);
    g->picks = calloc((size_t)SEQS * LAYERS * N_TOKENS * g->r.opts.k, sizeof(*g->picks));
    assert_non_null(g->picks);
    for (uint32_t i = 0; i < SEQS; i++) {
        taker t = {g, i};
        rig_record_init(&g->want[i], &g->r);
        g->seq[i] = open_seq(g, i);
        rig_decode(&g->r, g->seq[i], lengths[i], lengths[i] + 24, take, &t);
        kvw_seq_destroy(g->seq[i]);
        g->seq[i] = open_seq(g, i);
        g->at[i] = lengths[i];
    }
    assert_ok(kvw_batch_open(g->r.worker, SEQS, NULL, &g->batch));
}

static void group_close(group *g)
{
    for (uint32_t i = 0; i < SEQS; i++) {
        kvw_seq_destroy(g->seq[i]);
        rig_record_fini(&g->want[i]);
    }
    kvw_batch_close(g->batch);
    free(g->picks);
    rig_close(&g->r);
}

static void check_picks(group *g, uint32_t i, uint32_t layer)
{
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    assert_ok(kvw_last_picks(g->seq[i], layer, &picks, &n));
    assert_memory_equal(picks, picks_at(g, i, layer, g->at[i] - 1u), n * sizeof(*picks));
}

/* What goes in for the members, one after the other. */
static void *input(const group *g, const double *array, uint32_t width, uint32_t layer,
                   const uint32_t *members, uint32_t n)
{
    size_t bytes = width * 2u;
    uint8_t *all = calloc(n + 1u, bytes);
    assert_non_null(all);
    for (uint32_t i = 0; i < n; i++) {
        void *one = rig_bytes(&g->r, array, width, layer, g->at[members[i]], 1);
        memcpy(all + i * bytes, one, bytes);
        free(one);
    }
    return all;
}

static kvc_status forward(group *g, const uint32_t *members, uint32_t n, uint32_t layer, void *out,
                          float *lse)
{
    kvw_seq *seqs[SEQS];
    void *q = input(g, g->r.q, rig_q_width(&g->r), layer % LAYERS, members, n);
    void *k = input(g, g->r.k, rig_kv_width(&g->r), layer % LAYERS, members, n);
    void *v = input(g, g->r.v, rig_kv_width(&g->r), layer % LAYERS, members, n);
    for (uint32_t i = 0; i < n; i++)
        seqs[i] = g->seq[members[i]];
    kvc_status st = kvw_batch_forward(g->batch, seqs, n, layer, q, k, v, out, lse);
    free(q);
    free(k);
    free(v);
    return st;
}

/* Waits for the device so far, of all members. */
static uint64_t waits(const group *g, const uint32_t *members, uint32_t n)
{
    uint64_t all = 0;
    for (uint32_t i = 0; i < n; i++)
        all += stats_of(g->seq[members[i]]).host_syncs;
    return all;
}

/* A token of each member, which must come out as it did alone. */
static void step(group *g, const uint32_t *members, uint32_t n)
{
    uint32_t heads = g->r.opts.n_q_heads;
    size_t row = rig_q_width(&g->r) * 2u;
    uint8_t *out = malloc(n * row);
    float lse[SEQS * 8];
    assert_non_null(out);
    for (uint32_t i = 0; i < n; i++)
        assert_ok(kvw_tokens(g->seq[members[i]], g->r.tokens + g->at[members[i]], 1));
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        assert_ok(forward(g, members, n, layer, out, lse));
        for (uint32_t i = 0; i < n; i++) {
            const rig_record *want = &g->want[members[i]];
            size_t at = (size_t)layer * N_TOKENS + g->at[members[i]];
            assert_memory_equal(out + i * row, want->out + at * want->row_bytes, row);
            assert_memory_equal(lse + i * heads, want->lse + at * heads, heads * sizeof(*lse));
        }
    }
    free(out);
    for (uint32_t i = 0; i < n; i++)
        g->at[members[i]]++;
}

static void check_results(const char *selector, uint32_t factor)
{
    group g;
    group_open(&g, selector, factor, NULL);
    for (int i = 0; i < 4; i++)
        step(&g, (uint32_t[]){0, 1, 2}, 3);
    for (uint32_t i = 0; i < 3; i++)
        check_picks(&g, i, 1);
    step(&g, (uint32_t[]){2, 0}, 2);
    check_picks(&g, 1, 0); /* who has left has its own still */
    check_picks(&g, 1, 1);
    /* one attends everything: it alone is apart, and waits twice a layer */
    uint64_t before = waits(&g, (uint32_t[]){3, 1, 2, 0}, 4);
    step(&g, (uint32_t[]){3, 1, 2, 0}, 4);
    uint64_t want = strcmp(BACKEND, "cpu") == 0 ? 0 : 2 * (1 + 2);
    assert_int_equal(waits(&g, (uint32_t[]){3, 1, 2, 0}, 4) - before, want);
    step(&g, (uint32_t[]){1}, 1);
    taker t = {&g, 0};
    rig_decode(&g.r, g.seq[0], g.at[0], g.at[0] + 1, take, &t); /* alone in between */
    g.at[0]++;
    for (int i = 0; i < 4; i++)
        step(&g, (uint32_t[]){0, 1, 2}, 3);
    kvw_stats stats = stats_of(g.seq[0]);
    assert_true(g.r.opts.reselect_cos == 0 || stats.reselects < stats.steps - stats.full_steps);
    group_close(&g);
}

static void results_are_those_of_one(void **state)
{
    (void)state;
    check_results("esa", 0);
}

/* The Selection Cache too: what was selected in the batch is kept outside, and the other way. */
static void kept_picks_come_along(void **state)
{
    (void)state;
    check_results("tokenselect", 0);
    check_results("tokenselect", 3);
}

static void sequences_end_in_it(void **state)
{
    (void)state;
    group g;
    group_open(&g, "esa", 0, NULL);
    step(&g, (uint32_t[]){0, 1, 2}, 3);
    kvw_seq_destroy(g.seq[1]);
    g.seq[1] = open_seq(&g, 1);
    g.at[1] = lengths[1];
    step(&g, (uint32_t[]){0, 1, 2}, 3);
    kvw_batch_close(g.batch); /* before its sequences */
    g.batch = NULL;
    taker t = {&g, 2};
    rig_decode(&g.r, g.seq[2], g.at[2], g.at[2] + 1, take, &t);
    group_close(&g);
}

/* Rows that come by requests. */
static void rows_come_from_a_store(void **state)
{
    bench *b = *state;
    group g;
    group_open(&g, "esa", 0, b->client);
    for (uint32_t i = 0; i < SEQS; i++)
        assert_ok(kvw_flush(g.seq[i], 0));
    for (int i = 0; i < 6; i++)
        step(&g, (uint32_t[]){0, 1, 2}, 3);
    kvw_stats stats = stats_of(g.seq[0]);
    assert_true(stats.misses > 0);
    group_close(&g);
}

static void what_is_wrong_is_refused(void **state)
{
    (void)state;
    group g;
    uint16_t out[SEQS * 512];
    group_open(&g, "esa", 0, NULL);
    kvw_batch *other = NULL;
    assert_int_equal(kvw_batch_open(g.r.worker, 0, NULL, &other), KVC_INVALID);
    assert_int_equal(kvw_batch_open(g.r.worker, KVW_MAX_BATCH + 1u, NULL, &other), KVC_INVALID);
    for (uint32_t i = 0; i < 2; i++)
        assert_ok(kvw_tokens(g.seq[i], g.r.tokens + g.at[i], 1));
    assert_int_equal(forward(&g, (uint32_t[]){0, 0}, 2, 0, out, NULL), KVC_INVALID);
    assert_non_null(strstr(kvw_last_error(), "are the same"));
    assert_int_equal(forward(&g, NULL, 0, 0, out, NULL), KVC_INVALID);
    assert_int_equal(forward(&g, (uint32_t[]){0, 1}, 2, LAYERS, out, NULL), KVC_INVALID);
    /* one has no pass: the others have the token, and their steps can be done alone */
    assert_int_equal(forward(&g, (uint32_t[]){0, 1, 2}, 3, 0, out, NULL), KVC_INVALID);
    for (uint32_t i = 0; i < 2; i++) {
        kvw_step *one = NULL;
        uint32_t heads = g.r.opts.n_q_heads;
        size_t row = rig_q_width(&g.r) * 2u;
        float lse[8];
        void *q = rig_bytes(&g.r, g.r.q, rig_q_width(&g.r), 0, g.at[i], 1);
        assert_ok(kvw_step_begin(g.seq[i], 0, q, 1, &one));
        assert_ok(kvw_step_finish(one, q, out, lse));
        assert_memory_equal(out, g.want[i].out + g.at[i] * g.want[i].row_bytes, row);
        assert_memory_equal(lse, g.want[i].lse + (size_t)g.at[i] * heads, heads * sizeof(*lse));
        free(q);
    }
    group_close(&g);
}

static int find_device(void)
{
    rig r;
    rig_init(&r, "esa", 16);
    r.opts.backend = BACKEND;
    r.opts.dtype = KVK_BF16;
    r.opts.head_dim = 64;
    r.opts.index = KVW_INDEX_COMPRESSED;
    rig_project(&r, DIMS);
    return rig_find_device(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(results_are_those_of_one),
        cmocka_unit_test(kept_picks_come_along),
        cmocka_unit_test(sequences_end_in_it),
        cmocka_unit_test_setup_teardown(rows_come_from_a_store, bench_open, bench_close),
        cmocka_unit_test(what_is_wrong_is_refused),
    };
    int absent = find_device();
    return absent != 0 ? absent : cmocka_run_group_tests(tests, NULL, NULL);
}
