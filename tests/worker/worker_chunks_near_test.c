/*
 * worker_chunks_near_test.c: chosen chunks that real servers attend over, beside the same chunks
 * fetched: equal within the stated bound, bytes counted; what happens where servers do not attend.
 *
 * The servers run in this process, over inproc.
 */
#include <math.h>

#include "attend.h"
#include "chunk_rig.h"
#include "internal.h"
#include "servers.h"

/* Retrievals with one query after them, three, as many as a request holds, and one more. */
enum { TURNS = 5, MOST = KVC_MAX_ATTEND_QUERIES + 1, OUT = MOST * 64 };
static const uint32_t n_queries[TURNS] = {1, 3, MOST - 1, 1, MOST};

static float out[2][TURNS * OUT];

static int start(void **state)
{
    servers *s = calloc(1, sizeof(*s));
    assert_non_null(s);
    servers_start(s, 3);
    *state = s;
    return 0;
}

static int stop(void **state)
{
    servers_stop(*state);
    free(*state);
    return 0;
}

/* What moved for one call: the query to each server that was asked, and o and lse of each chunk. */
static void check_moved(const chunk_rig *c, const kvw_stats *before, const kvw_stats *now,
                        uint32_t n_q)
{
    size_t elem = kvk_dtype_bytes(c->r.opts.dtype), o = (size_t)n_q * 64 * elem;
    uint64_t rows = now->rows_near - before->rows_near, asked = now->requests - before->requests;
    uint64_t moved = now->bytes_near - before->bytes_near;
    assert_int_equal(rows % S, 0);
    assert_int_equal(moved, rows ? asked * o + rows / S * (o + n_q * 4 * sizeof(float)) : 0);
    assert_true(n_q > 3 || rows == 0 || moved < rows * 64 * elem); /* less than the rows */
}

/* Outputs [TURNS, OUT] in f32 of the second call after each retrieval, over the first n servers. */
static kvw_stats attend_by(servers *s, uint32_t n, kvk_dtype dtype, const char *way,
                           uint32_t kv_head, float *to)
{
    static uint8_t raw[OUT * sizeof(float)];
    chunk_rig c;
    kvw_retriever *x = NULL;
    open_rig_by(&c, "gca", dtype, NULL, way);
    kvw_close(c.r.worker);
    servers_use(s, &c.r, n);
    rig_name_servers(&c.r);
    assert_ok(kvw_open(&c.r.opts, &c.r.worker));
    kvw_seq *seq = offloaded(&c);
    size_t width = kv_head == KVW_ALL_HEADS ? 64 : 32, elem = kvk_dtype_bytes(dtype);
    assert_ok(kvw_retriever_open(seq, 0, kv_head, &x));
    for (uint32_t i = 0; i < TURNS; i++, to += OUT) {
        void *first = rig_bytes(&c.r, c.r.q, rig_q_width(&c.r), 0, 7 + i, n_queries[i]);
        void *q = rig_bytes(&c.r, c.r.q, rig_q_width(&c.r), 0, i, n_queries[i]);
        assert_ok(kvw_retrieve(x, c.queries[9 + i], CHUNKS - 2));
        assert_ok(kvw_retriever_attend(x, first, n_queries[i], raw));
        kvw_stats before = stats_of(seq);
        assert_ok(kvw_retriever_attend(x, q, n_queries[i], raw));
        kvw_stats now = stats_of(seq);
        check_moved(&c, &before, &now, n_queries[i]);
        const kvk_convert_args args = {
            .in = {raw, elem, dtype}, .n = (uint32_t)(n_queries[i] * width), .width = 1, .out = to};
        assert_ok(c.r.worker->ops->convert(c.r.worker->be, &args, NULL));
        free(first);
        free(q);
    }
    kvw_stats stats = stats_of(seq);
    kvw_seq_destroy(seq);
    rig_close(&c.r);
    return stats;
}

/* Partials that servers made, with their weights, are what fetched chunks give, but for one more
 * rounding; with more queries than a request holds the chunks are fetched. */
static void partials_equal_fetched_chunks(void **state)
{
    static const kvk_dtype dtypes[] = {KVK_F32, KVK_BF16, KVK_F16};
    static const double rounding[] = {2e-6, 0x1p-8, 0x1p-11};
    for (size_t i = 0; i < 6; i++) {
        uint32_t n = i < 3 ? 1 : 3;
        kvw_stats rows = attend_by(*state, n, dtypes[i % 3], "rows", KVW_ALL_HEADS, out[0]);
        kvw_stats near = attend_by(*state, n, dtypes[i % 3], "near", KVW_ALL_HEADS, out[1]);
        double worst = 0;
        for (size_t j = 0; j < TURNS * OUT; j++)
            worst = fmax(worst, fabs((double)out[0][j] - (double)out[1][j]));
        assert_true(worst <= 6 * rounding[i % 3]); /* |v| up to 2, and two roundings of out */
        assert_true(dtypes[i % 3] == KVK_F32 || worst > 0); /* it came another way */
        assert_int_equal(rows.rows_near + rows.bytes_near + rows.way_fallbacks, 0);
        assert_true(near.rows_near > 6 * S);
        assert_int_equal(near.way_fallbacks, 1);
        assert_true(near.bytes_fetched < rows.bytes_fetched);
    }
}

static void what_servers_do_not_attend_is_fetched(void **state)
{
    servers *s = *state;
    kvs_attender *busy = s->h[1].server->attender; /* one of three */
    (void)attend_by(s, 3, KVK_F32, "rows", KVW_ALL_HEADS, out[0]);
    atomic_fetch_add(&busy->n_calls, busy->max_calls);
    kvw_stats stats = attend_by(s, 3, KVK_F32, "near", KVW_ALL_HEADS, out[1]);
    atomic_fetch_sub(&busy->n_calls, busy->max_calls);
    for (size_t j = 0; j < TURNS * OUT; j++)
        assert_true(fabs((double)out[0][j] - (double)out[1][j]) <= 1e-5);
    assert_true(stats.way_fallbacks >= 2 && stats.way_fallbacks <= TURNS);
    assert_true(stats.bytes_fetched > 0);
    /* a single head's part of a chunk is nothing that a server attends over */
    stats = attend_by(s, 1, KVK_F32, "near", 1, out[1]);
    assert_int_equal(stats.rows_near + stats.way_fallbacks, 0);
}

/* Every call asks anew, and fetches nothing. */
static void a_retrieval_serves_many_calls(void **state)
{
    chunk_rig c;
    kvw_retriever *x = NULL;
    float q[64] = {1}, twice[2][64];
    open_rig_by(&c, "gca", KVK_F32, NULL, "near");
    kvw_close(c.r.worker);
    servers_use(*state, &c.r, 1);
    rig_name_servers(&c.r);
    assert_ok(kvw_open(&c.r.opts, &c.r.worker));
    kvw_seq *seq = offloaded(&c);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS));
    for (size_t i = 0; i < 2; i++)
        assert_ok(kvw_retriever_attend(x, q, 1, twice[i]));
    assert_memory_equal(twice[0], twice[1], sizeof(twice[0]));
    kvw_stats stats = stats_of(seq);
    assert_true(stats.misses >= S && stats.rows_near == 2 * stats.misses);
    assert_int_equal(stats.bytes_fetched, 0);
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(partials_equal_fetched_chunks, start, stop),
        cmocka_unit_test_setup_teardown(what_servers_do_not_attend_is_fetched, start, stop),
        cmocka_unit_test_setup_teardown(a_retrieval_serves_many_calls, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
