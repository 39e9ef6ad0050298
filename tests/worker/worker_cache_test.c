/*
 * worker_cache_test.c: the Selection Cache as a state machine: which queries reselect, what the
 * query of comparison is, and what is attended in between.
 *
 * Queries are scripted by angle in one plane, so that every cosine is known. BACKEND: on the CPU,
 * on a device, or on a fake of one.
 */
#include "bench.h"
#include "oracle.h"

#include <math.h>

#ifndef BACKEND
#define BACKEND "cpu"
#endif

enum { DIMS = 30 };

static bool on_device(void)
{
    return strcmp(BACKEND, "cpu") != 0;
}

typedef struct cache_rig {
    rig r;
    kvw_seq *seq;
    uint32_t pos; /* of the next token */
} cache_rig;

static void open_rig(cache_rig *c, double theta)
{
    uint32_t reused = 0;
    rig_init(&c->r, "tokenselect", 500);
    c->r.opts.n_layers = 1;
    c->r.opts.reselect_cos = theta;
    if (on_device()) {
        c->r.opts.backend = BACKEND;
        c->r.opts.dtype = KVK_BF16;
        c->r.opts.head_dim = 64;
        c->r.opts.index = KVW_INDEX_COMPRESSED;
        rig_project(&c->r, DIMS);
    }
    rig_open(&c->r);
    assert_ok(kvw_seq_create(c->r.worker, NULL, 0, &c->seq, &reused));
    rig_prefill(&c->r, c->seq, 0, 320, NULL, NULL);
    c->pos = 320;
}

static void close_rig(cache_rig *c)
{
    kvw_seq_destroy(c->seq);
    rig_close(&c->r);
}

/* The query of position pos at this angle: every head's two first elements. */
static void set_query(cache_rig *c, uint32_t pos, double degrees)
{
    uint32_t width = rig_q_width(&c->r);
    double *q = c->r.q + (size_t)pos * width;
    memset(q, 0, width * sizeof(*q));
    for (uint32_t h = 0; h < c->r.opts.n_q_heads; h++) {
        double a = degrees * M_PI / 180;
        double x[2] = {3 * cos(a), 3 * sin(a)};
        for (uint32_t i = 0; i < 2; i++) {
            uint8_t cell[4];
            rig_set(c->r.opts.dtype, cell, 0, x[i]);
            q[h * c->r.opts.head_dim + i] = rig_get(c->r.opts.dtype, cell, 0);
        }
    }
}

static uint64_t reselects(const cache_rig *c)
{
    kvw_stats stats = {.size_bytes = sizeof(stats)};
    assert_ok(kvw_seq_stats(c->seq, &stats));
    return stats.reselects;
}

/* Attention over the picks as they are, with recent beginning at near. */
typedef struct expect {
    uint32_t near;
} expect;

static void check_attention(void *arg, const rig *r, const rig_step *step)
{
    const expect *e = arg;
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    double out[256], lse[4];
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    assert_int_equal(n, r->opts.k);
    oracle_attend(r, step->layer, step->first, 1, picks, n, e->near, NULL, 0, out, lse);
    oracle_check_out(r, step, out, lse);
}

/* One decode step at an angle; true where it reselected. near: where recent should begin. */
static bool step_at(cache_rig *c, double degrees, uint32_t near)
{
    uint64_t before = reselects(c);
    expect e = {.near = near};
    set_query(c, c->pos, degrees);
    rig_pass(&c->r, c->seq, c->pos, 1, check_attention, &e);
    c->pos++;
    return reselects(c) != before;
}

static uint32_t near_now(const cache_rig *c)
{
    return oracle_near(&c->r, c->pos + 1, 1);
}

static void reselects_by_the_query_of_the_last_reselect(void **state)
{
    (void)state;
    cache_rig c;
    open_rig(&c, cos(30 * M_PI / 180));
    uint32_t near = near_now(&c);
    assert_true(step_at(&c, 0, near));    /* the first query */
    assert_false(step_at(&c, 20, near));  /* 20 degrees: a hit */
    assert_false(step_at(&c, -20, near)); /* still 20 from the reselect, 40 from the last */
    assert_false(step_at(&c, 29, near));
    near = near_now(&c);
    assert_true(step_at(&c, 31, near));  /* a miss: overwrites the query */
    assert_false(step_at(&c, 60, near)); /* 29 from it */
    near = near_now(&c);
    assert_true(step_at(&c, 0, near)); /* 31 from it, though it was the query before */
    close_rig(&c);
}

/* The picks of a hit are those of the reselect, bit for bit; of a miss, the oracle's. */
static void a_hit_keeps_the_picks(void **state)
{
    (void)state;
    cache_rig c;
    const uint32_t *picks = NULL;
    uint32_t n = 0, kept[48];
    open_rig(&c, 0.9);
    uint32_t near = near_now(&c);
    assert_true(step_at(&c, 0, near));
    assert_ok(kvw_last_picks(c.seq, 0, &picks, &n));
    oracle_scores s =
        oracle_score(&c.r, 0, c.pos - 1, 1, c.r.opts.n_sink, near, on_device() ? DIMS : 0);
    oracle_check_picks(&s, 48, picks, n);
    oracle_scores_fini(&s);
    memcpy(kept, picks, sizeof(kept));
    for (int i = 0; i < 10; i++) {
        assert_false(step_at(&c, i, near)); /* tokens that left recent are still attended */
        assert_ok(kvw_last_picks(c.seq, 0, &picks, &n));
        assert_memory_equal(picks, kept, sizeof(kept));
    }
    assert_true(near_now(&c) - near == 11);
    close_rig(&c);
}

static void theta_zero_is_off(void **state)
{
    (void)state;
    cache_rig c;
    open_rig(&c, 0);
    for (int i = 0; i < 4; i++)
        assert_true(step_at(&c, 0, near_now(&c)));
    close_rig(&c);
}

/* With theta 1 only a query that is the same (up to its length) hits. */
static void theta_one_asks_for_the_same_direction(void **state)
{
    (void)state;
    cache_rig c;
    open_rig(&c, 1.0);
    uint32_t near = near_now(&c);
    assert_true(step_at(&c, 0, near));
    assert_false(step_at(&c, 0, near));
    near = near_now(&c);
    assert_true(step_at(&c, 1, near));
    close_rig(&c);
}

/* A theta that everything passes still reselects once n_recent tokens have gone by. */
static void drift_is_bounded(void **state)
{
    (void)state;
    cache_rig c;
    open_rig(&c, -1.0);
    uint32_t near = near_now(&c), n = 0;
    assert_true(step_at(&c, 0, near));
    while (!step_at(&c, 180.0 * (n % 2), near) && n < 100) {
        n++;
        if (near_now(&c) - near > c.r.opts.n_recent)
            near = near_now(&c);
    }
    assert_int_equal(n, c.r.opts.n_recent);
    close_rig(&c);
}

/* A chunk selects for itself and ends what was cached. */
static void a_chunk_ends_the_cache(void **state)
{
    (void)state;
    cache_rig c;
    open_rig(&c, 0.5);
    uint32_t near = near_now(&c);
    assert_true(step_at(&c, 0, near));
    assert_false(step_at(&c, 0, near));
    uint64_t before = reselects(&c);
    rig_pass(&c.r, c.seq, c.pos, 4, NULL, NULL);
    c.pos += 4;
    assert_int_equal(reselects(&c), before + 1);
    assert_true(step_at(&c, 0, near_now(&c)));
    close_rig(&c);
}

/* The query of a rejected draft is nothing to compare with. */
static void a_rejected_draft_ends_the_cache(void **state)
{
    (void)state;
    cache_rig c;
    open_rig(&c, 0.5);
    assert_true(step_at(&c, 0, near_now(&c)));
    c.pos--;
    assert_ok(kvw_truncate(c.seq, c.pos));
    assert_true(step_at(&c, 0, near_now(&c)));
    close_rig(&c);
}

/* In parts, with a prediction: what was foretold is compared, and decides. */
static void a_prediction_is_compared(void **state)
{
    (void)state;
    cache_rig c;
    kvw_step *step = NULL;
    open_rig(&c, 0.5);
    uint32_t near = near_now(&c), pos = c.pos + 1, width = rig_q_width(&c.r);
    float out[256], lse[4];
    assert_true(step_at(&c, 0, near));
    set_query(&c, pos, 30);
    void *k = rig_bytes(&c.r, c.r.k, rig_kv_width(&c.r), 0, pos, 1);
    void *v = rig_bytes(&c.r, c.r.v, rig_kv_width(&c.r), 0, pos, 1);
    void *foretold = rig_bytes(&c.r, c.r.q, width, 0, pos, 1);
    set_query(&c, pos, 100);
    void *q = rig_bytes(&c.r, c.r.q, width, 0, pos, 1);
    assert_ok(kvw_tokens(c.seq, c.r.tokens + pos, 1));
    assert_ok(kvw_append(c.seq, 0, k, v, 1));
    assert_ok(kvw_step_begin(c.seq, 0, q, 1, &step)); /* 100 degrees away: reselects, and goes */
    kvw_step_abandon(step);
    assert_ok(kvw_step_begin(c.seq, 0, foretold, 1, &step)); /* 70 from it */
    kvw_step_abandon(step);
    near = oracle_near(&c.r, pos + 1, 1);
    assert_ok(kvw_step_begin(c.seq, 0, foretold, 1, &step)); /* the same */
    assert_ok(kvw_step_finish(step, q, out, lse));
    expect e = {.near = near};
    const rig_step done = {.seq = c.seq, .first = pos, .n = 1, .out = out, .lse = lse};
    check_attention(&e, &c.r, &done);
    c.pos = pos + 1;
    uint64_t before = reselects(&c);
    assert_false(step_at(&c, 31, near)); /* one degree from what was foretold */
    assert_int_equal(reselects(&c), before);
    free(k);
    free(v);
    free(foretold);
    free(q);
    close_rig(&c);
}

static int find_device(void)
{
    cache_rig c;
    rig_init(&c.r, "tokenselect", 16);
    c.r.opts.backend = BACKEND;
    c.r.opts.dtype = KVK_BF16;
    c.r.opts.head_dim = 64;
    c.r.opts.index = KVW_INDEX_COMPRESSED;
    rig_project(&c.r, DIMS);
    return rig_find_device(&c.r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reselects_by_the_query_of_the_last_reselect),
        cmocka_unit_test(a_hit_keeps_the_picks),
        cmocka_unit_test(theta_zero_is_off),
        cmocka_unit_test(theta_one_asks_for_the_same_direction),
        cmocka_unit_test(drift_is_bounded),
        cmocka_unit_test(a_chunk_ends_the_cache),
        cmocka_unit_test(a_rejected_draft_ends_the_cache),
        cmocka_unit_test(a_prediction_is_compared),
    };
    int absent = find_device();
    return absent != 0 ? absent : cmocka_run_group_tests(tests, NULL, NULL);
}
