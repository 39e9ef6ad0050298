/*
 * worker_vote_test.c: TokenSelect over a compressed or re-ranked index, decode steps and passes,
 * against the brute-force oracle. BACKEND: on the CPU, on a device, or on a fake of one, where it
 * is held to the CPU worker too.
 */
#include "bench.h"
#include "oracle.h"

#include <math.h>

#include "base/clock.h"
#include "internal.h"

#ifndef BACKEND
#define BACKEND "cpu"
#endif

enum { N_TOKENS = 526, PREFILL = 512, DIMS = 30, COARSE = 14 };

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
    r->opts.n_q_heads = 8;
    r->opts.n_kv_heads = 4;
    r->opts.index = KVW_INDEX_COMPRESSED;
    r->opts.residency_slots = 96;
    r->opts.max_tokens = strcmp(backend, "cpu") == 0 ? 0 : 500; /* it outgrows them */
    r->k_scale = 0.5;                                           /* votes that are not one token's */
    rig_project(r, DIMS);
}

/* Over two levels, of which the second ranks factor times as many as are picked. */
static void rerank_rig(rig *r, uint32_t factor)
{
    r->opts.index = KVW_INDEX_RERANKED;
    r->opts.index_dims = COARSE;
    r->opts.rerank_factor = factor;
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

/* All candidates pass the scan, so the finer index alone decides; with and without a window. */
static void a_finer_index_decides(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 3; i++) {
        rig r;
        vote_rig(&r, NULL, BACKEND);
        if (i != 1)
            rerank_rig(&r, 100);
        r.opts.eps = i == 0 ? 0 : 2;
        rig_open(&r);
        kvw_stats stats = run_checked(&r);
        assert_true(stats.full_steps > 0 && stats.reselects == stats.steps - stats.full_steps);
        assert_int_equal(stats.steps_device, on_device() ? stats.steps : 0);
        rig_close(&r);
    }
}

/* Without a rotation, over coded rows, and other shapes and windows. */
static void shapes_are_of_any_kind(void **state)
{
    (void)state;
    static const struct {
        uint32_t heads, kv_heads, head_dim, dims, n_sink, n_recent, k, chunk;
        double theta;
        kvk_dtype rows;
        uint32_t factor; /* 0: one level */
    } shapes[] = {{32, 8, 128, 32, 8, 40, 48, 64, 10000, (kvk_dtype)0, 0},
                  {8, 8, 64, 30, 16, 8, 33, 64, 0, (kvk_dtype)0, 0},
                  {6, 2, 64, 6, 8, 100, 16, 128, 10000, (kvk_dtype)0, 0},
                  {16, 8, 64, 30, 8, 40, 48, 64, 10000, KVK_I8_SCALED, 0},
                  {16, 8, 64, 30, 8, 40, 48, 64, 10000, KVK_I8_SCALED, 3},
                  {9, 3, 64, 48, 16, 40, 48, 64, 10000, (kvk_dtype)0, 100}};
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
        if (shapes[i].factor != 0)
            rerank_rig(&r, shapes[i].factor);
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

/* How a run selects. */
typedef struct manner {
    double theta;
    uint32_t eps, factor; /* factor 0: one level */
} manner;

static kvw_stats take_run(taken *t, kvc_client *client, const char *backend, manner how)
{
    rig r;
    double theta = how.theta;
    vote_rig(&r, client, backend);
    r.opts.reselect_cos = theta;
    r.opts.eps = how.eps;
    if (how.factor != 0)
        rerank_rig(&r, how.factor);
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

/* How many of a [n_steps, k] are not among b's of the same step, both ascending; a near tie may go
 * either way. */
static uint32_t count_others(const uint32_t *a, const uint32_t *b, uint32_t n_steps, uint32_t k)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_steps; i++, a += k, b += k) {
        for (uint32_t x = 0, y = 0; x < k; x++) {
            while (y < k && b[y] < a[x])
                y++;
            n += y == k || b[y] != a[x];
        }
    }
    return n;
}

/* others: picks of all steps that may be others. */
static void check_like_the_cpu(kvc_client *client, manner how, uint32_t others)
{
    rig r;
    taken cpu, device;
    kvw_stats a = take_run(&cpu, NULL, "cpu", how);
    kvw_stats b = take_run(&device, client, BACKEND, how);
    assert_int_equal(a.reselects, b.reselects);
    assert_int_equal(a.picks, b.picks);
    assert_true(how.theta == 0 || a.reselects < a.steps - a.full_steps);
    vote_rig(&r, NULL, "cpu");
    uint32_t n = count_others(cpu.picks, device.picks, 2u * N_TOKENS, r.opts.k);
    if (n > others)
        fail_msg("eps %u, factor %u: %u other picks", how.eps, how.factor, n);
    rig_close(&r);
    rig_record_fini(&cpu.record);
    rig_record_fini(&device.record);
    free(cpu.picks);
    free(device.picks);
}

static void picks_are_the_cpus(void **state)
{
    (void)state;
    check_like_the_cpu(NULL, (manner){0}, 12);
}

static void reranked_picks_are_the_cpus(void **state)
{
    (void)state;
    for (uint32_t eps = 0; eps <= 2; eps += 2) {
        check_like_the_cpu(NULL, (manner){.eps = eps, .factor = 2}, 24);
    }
    check_like_the_cpu(NULL, (manner){.eps = 2}, 12);
}

static void picks_are_kept_as_on_the_cpu(void **state)
{
    bench *b = *state;
    check_like_the_cpu(b->client, (manner){.theta = 0.9}, 12);
    check_like_the_cpu(b->client, (manner){.theta = 0.9, .factor = 2}, 24);
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

/* ---- index rows of tokens that came one at a time ---- */

/* The passes: some attend everything, and more tokens follow a prefill than recent holds. */
enum { ALONE = 110, FILLED = 384, END = 384 + 40 + 30 };

/* A token's step in one layer, not by kvw_forward. */
static void one_in_parts(rig *r, kvw_seq *seq, uint32_t layer, uint32_t pos, rig_check *check)
{
    uint32_t dims = DIMS;
    kvw_step *step = NULL;
    void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, pos, 1);
    void *v = rig_bytes(r, r->v, rig_kv_width(r), layer, pos, 1);
    void *q = rig_bytes(r, r->q, rig_q_width(r), layer, pos, 1);
    float lse[16];
    assert_ok(kvw_append(seq, layer, k, v, 1));
    assert_ok(kvw_step_begin(seq, layer, q, 1, &step));
    assert_ok(kvw_step_attend(step, q));
    assert_ok(kvw_step_finish(step, q, q, lse));
    const rig_step done = {.seq = seq, .layer = layer, .first = pos, .n = 1, .out = q, .lse = lse};
    if (check != NULL)
        check(&dims, r, &done);
    free(k);
    free(v);
    free(q);
}

static void one_by_one(rig *r, kvw_seq *seq, uint32_t first, uint32_t end, bool parts,
                       rig_check *check)
{
    uint32_t dims = DIMS;
    for (; first < end && !parts; first++)
        rig_pass(r, seq, first, 1, check, &dims);
    for (; first < end; first++) {
        assert_ok(kvw_tokens(seq, r->tokens + first, 1));
        for (uint32_t layer = 0; layer < r->opts.n_layers; layer++)
            one_in_parts(r, seq, layer, first, check);
    }
}

/* The index as the store gets it, [n_layers, END] rows: its first level, or of two the second. */
static uint8_t *index_of_run(kvc_client *client, const char *backend, bool parts, bool finer,
                             rig_check *check, size_t *row_bytes_p)
{
    rig r;
    vote_rig(&r, client, backend);
    if (finer)
        rerank_rig(&r, 100);
    assert_int_equal(r.opts.n_recent, 40);
    rig_open(&r);
    kvw_seq *seq = open_seq(&r);
    one_by_one(&r, seq, 0, ALONE, parts, NULL);
    rig_prefill(&r, seq, ALONE, FILLED, NULL, NULL);
    if (client != NULL)
        assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    one_by_one(&r, seq, FILLED, END - 6, parts, NULL);
    one_by_one(&r, seq, END - 6, END, parts, check);
    if (r.worker->device != NULL)
        assert_ok(r.worker->device_ops->settle(seq));
    if (finer)
        rig_check_levels(seq);
    size_t bytes = END * seq->layers[0].level[finer].row_bytes;
    uint8_t *rows = malloc(r.opts.n_layers * bytes);
    assert_non_null(rows);
    for (uint32_t layer = 0; layer < r.opts.n_layers; layer++) {
        const kvwi_pages *pages = &seq->layers[layer].level[finer];
        assert_int_equal(pages->n_rows, END);
        assert_int_equal(seq->layers[layer].level[0].n_rows, END);
        kvwi_pages_read(pages, 0, END, rows + layer * bytes, pages->row_bytes);
    }
    *row_bytes_p = bytes / END;
    kvw_seq_destroy(seq);
    rig_close(&r);
    return rows;
}

/* Each number, coded, as on the CPU but for the order in which a device adds. */
static void check_row(const uint8_t *want, const uint8_t *got, uint32_t n_heads, uint32_t at)
{
    for (uint32_t i = 0; i < n_heads * DIMS; i++) {
        int apart = (int8_t)want[i] - (int8_t)got[i];
        if (apart < -1 || apart > 1)
            fail_msg("row %u, number %u: %d, on the cpu %d", at, i, (int8_t)got[i],
                     (int8_t)want[i]);
    }
    for (uint32_t h = 0; h < n_heads; h++) {
        uint16_t a, b;
        memcpy(&a, want + n_heads * DIMS + 2u * h, sizeof(a));
        memcpy(&b, got + n_heads * DIMS + 2u * h, sizeof(b));
        if (a > b + 1 || b > a + 1)
            fail_msg("row %u: the scale of head %u is %#x, on the cpu %#x", at, h, b, a);
    }
}

/* However a token came, it is picked, and others get its index row, like the CPU's. */
static void single_tokens_are_indexed_like_the_cpus(void **state)
{
    bench *b = *state;
    size_t row_bytes = 0, other_bytes = 0;
    uint8_t *cpu = index_of_run(NULL, "cpu", false, false, NULL, &row_bytes);
    for (int i = 0; i < 4; i++) { /* whole steps, in parts, without maps, and of two levels */
        uint8_t *rows = index_of_run(i == 2 ? b->client : NULL, BACKEND, i == 1, i == 3,
                                     oracle_check_step, &other_bytes);
        assert_int_equal(row_bytes, other_bytes);
        for (uint32_t at = 0; at < 2u * END; at++)
            check_row(cpu + at * row_bytes, rows + at * row_bytes, 4, at);
        free(rows);
    }
    free(cpu);
}

/* Tokens [64, 128) in one pass, of which only the last one's query picks from what is before 88. */
static void pick_from_a_pass(rig *r, kvw_seq *seq)
{
    assert_ok(kvw_tokens(seq, r->tokens + 64, 64));
    for (uint32_t layer = 0; layer < r->opts.n_layers; layer++) {
        const uint32_t *picks = NULL;
        uint32_t n = 0;
        kvw_step *step = NULL;
        void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, 64, 64);
        void *v = rig_bytes(r, r->v, rig_kv_width(r), layer, 64, 64);
        void *q = rig_bytes(r, r->q, rig_q_width(r), layer, 127, 1);
        assert_ok(kvw_append(seq, layer, k, v, 64));
        assert_ok(kvw_step_begin(seq, layer, q, 1, &step));
        assert_ok(kvw_step_finish(step, q, q, NULL));
        assert_ok(kvw_last_picks(seq, layer, &picks, &n));
        assert_true(n == r->opts.k && picks[n - 1] == 87);
        free(k);
        free(v);
        free(q);
    }
}

/* The last candidate was picked, and another token takes its place. */
static void rows_that_are_taken_back_are_not_attended(void **state)
{
    (void)state;
    rig r;
    uint32_t dims = DIMS;
    vote_rig(&r, NULL, BACKEND);
    r.opts.k = 79; /* of 80 candidates */
    rig_open(&r);
    assert_true(r.opts.n_sink == 8 && r.opts.n_recent == 40);
    kvw_seq *seq = open_seq(&r);
    rig_prefill(&r, seq, 0, 64, NULL, NULL);
    pick_from_a_pass(&r, seq);
    assert_ok(kvw_truncate(seq, 80));
    for (uint32_t layer = 0; layer < r.opts.n_layers; layer++)
        for (size_t i = 80u * rig_kv_width(&r); i < 128u * rig_kv_width(&r); i++)
            r.v[(size_t)layer * N_TOKENS * rig_kv_width(&r) + i] *= -1.0;
    rig_pass(&r, seq, 80, 60, oracle_check_step, &dims);
    rig_decode(&r, seq, 140, 144, oracle_check_step, &dims);
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

/* Picks of the steps that follow a prefix, [steps][k]. */
typedef struct after {
    uint32_t picks[2 * 6][48], n_steps, dims;
    bool exact; /* the finer index alone decides, so the oracle knows the picks */
} after;

static void check_after(void *arg, const rig *r, const rig_step *step)
{
    after *a = arg;
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    if (a->exact)
        oracle_check_step(&a->dims, r, step);
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    assert_int_equal(n, 48);
    memcpy(a->picks[a->n_steps++], picks, sizeof(a->picks[0]));
}

/* A prefix, and the tokens after it: in one sequence, or with a store in one that takes it back. */
static void run_after(after *a, kvc_client *client, const char *backend, uint32_t factor)
{
    rig r;
    uint32_t reused = 384;
    *a = (after){.dims = DIMS, .exact = factor != 2};
    vote_rig(&r, client, backend);
    if (factor != 0)
        rerank_rig(&r, factor);
    rig_open(&r);
    kvw_seq *seq = open_seq(&r);
    rig_prefill(&r, seq, 0, 384, NULL, NULL);
    if (client != NULL) {
        assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
        kvw_seq_destroy(seq);
        assert_ok(kvw_seq_create(r.worker, r.tokens, 384, &seq, &reused));
        assert_true(reused >= 256);
    }
    rig_prefill(&r, seq, reused, 384 + 60, NULL, NULL);
    rig_decode(&r, seq, 384 + 60, 384 + 66, check_after, a);
    if (factor != 0)
        rig_check_levels(seq);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* Both levels of a prefix come back from the store, and go to where they are scored. With factor 2
 * the first one decides too. */
static void a_prefix_comes_back_with_its_index(void **state)
{
    static const uint32_t factors[] = {0, 2, 100};
    bench *b = *state;
    for (size_t i = 0; i < 3; i++) {
        after back, cpu;
        run_after(&back, b->client, BACKEND, factors[i]);
        run_after(&cpu, NULL, "cpu", factors[i]);
        assert_true(back.n_steps == 2 * 6 && cpu.n_steps == back.n_steps);
        uint32_t n = count_others(cpu.picks[0], back.picks[0], back.n_steps, 48);
        if (n > 6)
            fail_msg("factor %u: %u other picks", factors[i], n);
    }
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

static int find_device(void)
{
    rig r;
    vote_rig(&r, NULL, BACKEND);
    return rig_find_device(&r);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_are_the_oracles),
        cmocka_unit_test(a_finer_index_decides),
        cmocka_unit_test(shapes_are_of_any_kind),
        cmocka_unit_test(picks_are_the_cpus),
        cmocka_unit_test(reranked_picks_are_the_cpus),
        cmocka_unit_test(the_last_picks_are_resident),
        cmocka_unit_test(rows_that_are_taken_back_are_not_attended),
        cmocka_unit_test_setup_teardown(single_tokens_are_indexed_like_the_cpus, bench_open,
                                        bench_close),
        cmocka_unit_test_setup_teardown(picks_are_kept_as_on_the_cpu, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(rows_come_from_a_store, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(a_prefix_comes_back_with_its_index, bench_open,
                                        bench_close),
        cmocka_unit_test_setup_teardown(lost_rows_keep_their_numbers, bench_open, bench_close),
    };
    int absent = find_device();
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return absent != 0 ? absent : cmocka_run_group_tests(tests, NULL, NULL);
}
