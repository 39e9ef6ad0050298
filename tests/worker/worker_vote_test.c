/*
 * worker_vote_test.c: TokenSelect over a compressed index, decode steps and passes, against the
 * brute-force oracle. BACKEND: on the CPU, on a device, or on a fake of one, where it is held to
 * the CPU worker too.
 */
#include "bench.h"
#include "oracle.h"

#include <math.h>

#include "base/clock.h"

#ifndef BACKEND
#define BACKEND "cpu"
#endif

enum { N_TOKENS = 536, PREFILL = 512, DIMS = 30 };

static bool on_device(void)
{
    return strcmp(BACKEND, "cpu") != 0;
}

static void vote_rig(rig *r, kvc_client *client, const char *backend)
{
    rig_init(r, "tokenselect", N_TOKENS);
    r->opts.client = client;
    r->opts.backend = backend;
    r->opts.dtype = KVK_BF16;
    r->opts.head_dim = 64;
    r->opts.n_q_heads = 16;
    r->opts.n_kv_heads = 8;
    r->opts.index = KVW_INDEX_COMPRESSED;
    r->opts.residency_slots = 96;
    r->opts.max_tokens = strcmp(backend, "cpu") == 0 ? 0 : 500; /* it outgrows them */
    r->k_scale = 0.5;                                           /* votes that are not one token's */
    rig_project(r, DIMS);
}

static kvw_seq *open_seq(rig *r)
{
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    return seq;
}

/* Prefilled and decoded; the oracle, which takes its time, looks at some. */
static kvw_stats run_checked(rig *r)
{
    uint32_t dims = DIMS, chunk = r->opts.chunk_tokens;
    kvw_seq *seq = open_seq(r);
    rig_decode(r, seq, 0, 3, oracle_check_step, &dims);
    rig_pass(r, seq, 3, chunk - 3u, oracle_check_step, &dims);
    rig_prefill(r, seq, chunk, 384, NULL, NULL);
    rig_pass(r, seq, 384, chunk, oracle_check_step, &dims);
    rig_prefill(r, seq, 384 + chunk, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    rig_decode(r, seq, PREFILL, N_TOKENS, oracle_check_step, &dims);
    kvw_stats stats = stats_of(seq);
    kvw_seq_destroy(seq);
    return stats;
}

static void steps_are_the_oracles(void **state)
{
    (void)state;
    rig r;
    vote_rig(&r, NULL, BACKEND);
    rig_open(&r);
    kvw_stats stats = run_checked(&r);
    assert_true(stats.full_steps > 0 && stats.reselects == stats.steps - stats.full_steps);
    assert_int_equal(stats.steps_device, on_device() ? stats.steps : 0);
    rig_close(&r);
}

/* Without a rotation, over coded rows, and other shapes and windows. */
static void shapes_are_of_any_kind(void **state)
{
    (void)state;
    static const struct {
        uint32_t heads, kv_heads, head_dim, dims, n_sink, n_recent, k, chunk;
        double theta;
        kvk_dtype rows;
    } shapes[] = {{32, 8, 128, 32, 8, 40, 48, 64, 10000, (kvk_dtype)0},
                  {8, 8, 64, 30, 16, 8, 33, 64, 0, (kvk_dtype)0},
                  {6, 2, 64, 6, 8, 100, 16, 128, 10000, (kvk_dtype)0},
                  {16, 8, 64, 30, 8, 40, 48, 64, 10000, KVK_I8_SCALED}};
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        rig r;
        uint32_t dims = shapes[i].dims;
        vote_rig(&r, NULL, BACKEND);
        r.opts.n_q_heads = shapes[i].heads;
        r.opts.n_kv_heads = shapes[i].kv_heads;
        r.opts.head_dim = shapes[i].head_dim;
        r.opts.n_sink = shapes[i].n_sink;
        r.opts.n_recent = shapes[i].n_recent;
        r.opts.k = shapes[i].k;
        r.opts.chunk_tokens = shapes[i].chunk;
        r.opts.residency_slots = shapes[i].k + 5u;
        r.opts.rope.theta = shapes[i].theta;
        r.opts.row_dtype = (uint64_t)shapes[i].rows;
        rig_project(&r, dims);
        rig_open(&r);
        kvw_seq *seq = open_seq(&r);
        bool coded = shapes[i].rows != 0; /* what coding costs is no matter of the oracle's */
        rig_pass(&r, seq, 0, 50, coded ? NULL : oracle_check_step, &dims);
        rig_prefill(&r, seq, 50, 300, NULL, NULL);
        rig_pass(&r, seq, 300, 3, coded ? NULL : oracle_check_step, &dims);
        rig_decode(&r, seq, 303, 310, coded ? NULL : oracle_check_step, &dims);
        kvw_stats stats = stats_of(seq);
        assert_true(!on_device() || stats.steps_device >= 2 * 7);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

/* Picks of every step of a run, and its outputs. */
typedef struct taken {
    rig_record record;
    uint32_t *picks; /* [layer][token][k] */
} taken;

static void take(void *arg, const rig *r, const rig_step *step)
{
    taken *t = arg;
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    rig_record_step(&t->record, r, step);
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    memcpy(t->picks + ((size_t)step->layer * r->n_tokens + step->first) * r->opts.k, picks,
           n * sizeof(*picks));
}

static kvw_stats take_run(taken *t, kvc_client *client, const char *backend, double theta)
{
    rig r;
    vote_rig(&r, client, backend);
    r.opts.reselect_cos = theta;
    rig_open(&r);
    for (size_t i = 0; theta != 0 && i < (size_t)2 * N_TOKENS * rig_q_width(&r); i++) {
        size_t width = rig_q_width(&r), token = i / width % 4u; /* three follow one, more or less */
        r.q[i] = token == 0 ? r.q[i] : r.q[i - token * width] + (token == 3 ? r.q[i] : 0.0);
    }
    rig_record_init(&t->record, &r);
    t->picks = calloc((size_t)r.opts.n_layers * r.n_tokens * r.opts.k, sizeof(*t->picks));
    assert_non_null(t->picks);
    kvw_seq *seq = open_seq(&r);
    rig_prefill(&r, seq, 0, PREFILL, take, t);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    rig_decode(&r, seq, PREFILL, N_TOKENS, take, t);
    kvw_stats stats = stats_of(seq);
    kvw_seq_destroy(seq);
    rig_close(&r);
    return stats;
}

/* Of how many steps the picks are not the same; a near tie may go either way. */
static uint32_t count_others(const taken *a, const taken *b, const rig *r)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < 2u * N_TOKENS; i++)
        n += memcmp(a->picks + (size_t)i * r->opts.k, b->picks + (size_t)i * r->opts.k,
                    r->opts.k * sizeof(*a->picks)) != 0;
    return n;
}

static void check_like_the_cpu(kvc_client *client, double theta)
{
    rig r;
    taken cpu, device;
    kvw_stats a = take_run(&cpu, NULL, "cpu", theta);
    kvw_stats b = take_run(&device, client, BACKEND, theta);
    assert_int_equal(a.reselects, b.reselects);
    assert_int_equal(a.picks, b.picks);
    assert_true(theta == 0 || a.reselects < a.steps - a.full_steps);
    vote_rig(&r, NULL, "cpu");
    assert_true(count_others(&cpu, &device, &r) <= 4);
    rig_close(&r);
    rig_record_fini(&cpu.record);
    rig_record_fini(&device.record);
    free(cpu.picks);
    free(device.picks);
}

static void picks_are_the_cpus(void **state)
{
    (void)state;
    check_like_the_cpu(NULL, 0);
}

static void picks_are_kept_as_on_the_cpu(void **state)
{
    bench *b = *state;
    check_like_the_cpu(NULL, 0.9);
    check_like_the_cpu(b->client, 0.9);
}

typedef struct before {
    uint32_t picks[2][48];
    uint64_t misses, n_new; /* so far; picks that the step before did not have */
    bool any[2];
} before;

/* A step misses nothing that the one before picked, so there is nothing of that to prefetch. */
static void check_misses(void *arg, const rig *r, const rig_step *step)
{
    before *b = arg;
    const uint32_t *picks = NULL;
    uint32_t n = 0, n_new = 0, *last = b->picks[step->layer];
    uint64_t misses = stats_of(step->seq).misses;
    (void)r;
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    assert_int_equal(n, 48);
    for (uint32_t i = 0, j = 0; i < n; i++) {
        while (j < n && last[j] < picks[i])
            j++;
        n_new += j == n || last[j] != picks[i];
    }
    assert_true(!b->any[step->layer] || misses - b->misses <= n_new);
    b->misses = misses;
    b->n_new += n_new;
    b->any[step->layer] = true;
    memcpy(last, picks, sizeof(b->picks[0]));
}

static void the_last_picks_are_resident(void **state)
{
    (void)state;
    rig r;
    before b = {.misses = 0};
    vote_rig(&r, NULL, BACKEND);
    r.opts.residency_slots = r.opts.k + 1u; /* hardly more than they are */
    rig_open(&r);
    kvw_seq *seq = open_seq(&r);
    rig_prefill(&r, seq, 0, 320, NULL, NULL);
    b.misses = stats_of(seq).misses;
    rig_decode(&r, seq, 320, 380, check_misses, &b);
    assert_true(b.n_new > 100 && b.n_new < 2u * 60u * 48u);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

static void rows_come_from_a_store(void **state)
{
    bench *b = *state;
    rig r;
    vote_rig(&r, b->client, BACKEND);
    rig_open(&r);
    kvw_stats stats = run_checked(&r);
    assert_true(stats.misses > 0);
    rig_close(&r);
}

/* Rows that were lost keep their numbers; their slots are nobody's afterwards. */
static void lost_rows_keep_their_numbers(void **state)
{
    bench *b = *state;
    rig r;
    uint32_t dims = DIMS;
    vote_rig(&r, b->client, BACKEND);
    r.opts.policy = KVW_DROP;
    r.opts.reselect_cos = -1.0; /* the picks stay while n_recent tokens come */
    rig_open(&r);
    kvw_seq *seq = open_seq(&r);
    rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    store_set(&b->store, &(store_faults){.lose_every = 3});
    rig_pass(&r, seq, PREFILL, 1, NULL, NULL);
    store_set(&b->store, &(store_faults){0});
    kvw_stats stats = stats_of(seq);
    assert_true(stats.rows_dropped > 0);
    rig_pass(&r, seq, PREFILL + 1, 1, NULL, NULL); /* they are missing still, and come */
    assert_true(stats_of(seq).misses > stats.misses);
    assert_int_equal(stats_of(seq).reselects, stats.reselects);
    rig_pass(&r, seq, PREFILL + 2, 8, oracle_check_step, &dims);
    rig_pass(&r, seq, PREFILL + 10, 1, oracle_check_step, &dims);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

static void what_it_cannot_do_is_refused(void **state)
{
    (void)state;
    static const char *const want[] = {"index: must be COMPRESSED", "index: must be COMPRESSED",
                                       "eps", "n_q_heads: must be at most 128"};
    for (int i = 0; i < 4 && on_device(); i++) {
        rig r;
        vote_rig(&r, NULL, BACKEND);
        r.opts.index = i == 0 ? KVW_INDEX_EXACT : i == 1 ? KVW_INDEX_RERANKED : r.opts.index;
        r.opts.projection_path = i == 0 ? NULL : r.opts.projection_path;
        r.opts.eps = i == 2;
        r.opts.n_q_heads = i == 3 ? 136 : r.opts.n_q_heads;
        r.opts.n_kv_heads = i == 3 ? 17 : r.opts.n_kv_heads;
        if (i == 3)
            rig_project(&r, DIMS);
        assert_int_equal(kvw_open(&r.opts, &r.worker), KVC_UNSUPPORTED);
        if (strncmp(kvw_last_error(), want[i], strlen(want[i])) != 0)
            fail_msg("%s", kvw_last_error());
        rig_close(&r);
    }
}

/* 0, or what ctest takes for SKIPPED: there is no device. */
static int find_device(void)
{
    rig r;
    vote_rig(&r, NULL, BACKEND);
    kvc_status st = kvw_open(&r.opts, &r.worker);
    bool absent = st == KVC_UNSUPPORTED && strncmp(kvw_last_error(), "backend", 7) == 0;
    if (st != KVC_OK)
        printf("%s: %s\n", absent ? "SKIPPED" : "FAILED", kvw_last_error());
    rig_close(&r);
    return st == KVC_OK ? 0 : absent ? 77 : 1;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_are_the_oracles),
        cmocka_unit_test(shapes_are_of_any_kind),
        cmocka_unit_test(picks_are_the_cpus),
        cmocka_unit_test(the_last_picks_are_resident),
        cmocka_unit_test_setup_teardown(picks_are_kept_as_on_the_cpu, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(rows_come_from_a_store, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(lost_rows_keep_their_numbers, bench_open, bench_close),
        cmocka_unit_test(what_it_cannot_do_is_refused),
    };
    int absent = find_device();
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return absent != 0 ? absent : cmocka_run_group_tests(tests, NULL, NULL);
}
