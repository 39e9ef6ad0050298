/*
 * worker_select_test.c: selection and attention of every step against brute force, without a store:
 * each registered selector, each kind of index, each dtype, in prefill chunks, decode and drafts.
 */
#include "oracle.h"

#include <math.h>

#include "selector/selector.h"

/* Prefill, decode and a step of several queries; every step is checked. */
static void check_all(rig *r, uint32_t dims)
{
    kvw_seq *seq = NULL;
    uint32_t reused = 1, n = r->n_tokens, mid = n - 20;
    rig_open(r);
    assert_ok(kvw_seq_create(r->worker, r->tokens, n, &seq, &reused));
    assert_int_equal(reused, 0);
    rig_prefill(r, seq, 0, mid, oracle_check_step, &dims);
    rig_decode(r, seq, mid, n - 7, oracle_check_step, &dims);
    rig_pass(r, seq, n - 7, 5, oracle_check_step, &dims);
    rig_decode(r, seq, n - 2, n, oracle_check_step, &dims);
    assert_int_equal(kvw_seq_tokens(seq), n);
    kvw_seq_destroy(seq);
    rig_close(r);
}

static void every_selector_exact(void **state)
{
    const kvk_dtype dtypes[] = {KVK_F32, KVK_F16, KVK_BF16};
    (void)state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        for (uint32_t d = 0; d < 3; d++) {
            rig r;
            rig_init(&r, kvw_selector_at(i)->name, 420);
            r.opts.dtype = dtypes[d];
            check_all(&r, 0);
        }
    }
}

static void every_selector_compressed(void **state)
{
    (void)state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        for (uint32_t dims = 8; dims <= 16; dims += 8) {
            rig r;
            rig_init(&r, kvw_selector_at(i)->name, 360);
            r.opts.index = KVW_INDEX_COMPRESSED;
            r.opts.dtype = dims == 8 ? KVK_F32 : KVK_BF16;
            r.opts.index_dims = dims;
            rig_project(&r, 16);
            check_all(&r, dims);
        }
    }
}

/* All candidates pass the scan, so the finer index alone decides. */
static void every_selector_reranked(void **state)
{
    (void)state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        for (uint32_t eps = 0; eps <= 3; eps += 3) {
            rig r;
            rig_init(&r, kvw_selector_at(i)->name, 300);
            r.opts.index = KVW_INDEX_RERANKED;
            r.opts.index_dims = 4;
            r.opts.rerank_factor = 100;
            r.opts.eps = eps;
            rig_project(&r, 16);
            check_all(&r, 16);
        }
    }
}

/* With few candidates, picks lie among the best by the coarse index and are the best by the fine.
 */
static void rerank_takes_the_best_candidates(void **state)
{
    (void)state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        rig r;
        kvw_seq *seq = NULL;
        const uint32_t *picks = NULL;
        uint32_t reused = 0, n = 0, near = 0;
        rig_init(&r, kvw_selector_at(i)->name, 400);
        r.opts.index = KVW_INDEX_RERANKED;
        r.opts.index_dims = 8;
        r.opts.rerank_factor = 2;
        rig_project(&r, 16);
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, 399, NULL, NULL);
        rig_pass(&r, seq, 399, 1, NULL, NULL);
        near = oracle_near(&r, 400, 1);
        assert_ok(kvw_last_picks(seq, 1, &picks, &n));
        oracle_scores coarse = oracle_score(&r, 1, 399, 1, r.opts.n_sink, near, 8);
        oracle_scores fine = oracle_score(&r, 1, 399, 1, r.opts.n_sink, near, 16);
        uint32_t top[96], outside = 0;
        oracle_top(&coarse, 96, top);
        oracle_scores kept = {.begin = 0, .n = 96, .score = calloc(96, 8), .bound = calloc(96, 8)};
        uint32_t chosen[96], n_chosen = 0;
        for (uint32_t j = 0; j < 96; j++) {
            kept.score[j] = fine.score[top[j] - fine.begin];
            kept.bound[j] = fine.bound[top[j] - fine.begin];
            for (uint32_t p = 0; p < n; p++)
                if (picks[p] == top[j])
                    chosen[n_chosen++] = j;
        }
        outside = n - n_chosen; /* int8 may swap a few at the edge of the candidates */
        assert_true(outside <= 4);
        if (outside == 0)
            oracle_check_picks(&kept, 48, chosen, n_chosen);
        oracle_scores_fini(&kept);
        oracle_scores_fini(&coarse);
        oracle_scores_fini(&fine);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

static void the_window_smooths_scores(void **state)
{
    (void)state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        rig r;
        rig_init(&r, kvw_selector_at(i)->name, 400);
        r.opts.eps = 3;
        check_all(&r, 0);
    }
}

/* More rows than one index page, so scans and appends cross its end. */
static void index_pages_are_crossed(void **state)
{
    (void)state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        for (int compressed = 0; compressed < 2; compressed++) {
            rig r;
            uint32_t dims = compressed ? 8 : 0, reused = 0;
            kvw_seq *seq = NULL;
            rig_init(&r, kvw_selector_at(i)->name, KVWI_PAGE_ROWS + 300);
            r.opts.n_layers = 1;
            r.opts.chunk_tokens = 192;
            if (compressed) {
                r.opts.index = KVW_INDEX_COMPRESSED;
                rig_project(&r, 8);
            }
            rig_open(&r);
            assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
            rig_prefill(&r, seq, 0, r.n_tokens - 2, NULL, NULL);
            rig_decode(&r, seq, r.n_tokens - 2, r.n_tokens, oracle_check_step, &dims);
            kvw_seq_destroy(seq);
            rig_close(&r);
        }
    }
}

/* Keys that repeat tie exactly; the lower position wins. */
static void ties_go_to_the_lower_position(void **state)
{
    (void)state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        rig r;
        kvw_seq *seq = NULL;
        const uint32_t *picks = NULL;
        uint32_t reused = 0, n = 0, want[48];
        rig_init(&r, kvw_selector_at(i)->name, 500);
        r.repeat = 11;
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, 499, NULL, NULL);
        rig_pass(&r, seq, 499, 1, NULL, NULL);
        for (uint32_t layer = 0; layer < 2; layer++) {
            oracle_scores s =
                oracle_score(&r, layer, 499, 1, r.opts.n_sink, oracle_near(&r, 500, 1), 0);
            for (uint32_t j = 0; j < s.n; j++)
                s.score[j] = round(s.score[j] * 1e9);
            oracle_top(&s, 48, want);
            assert_ok(kvw_last_picks(seq, layer, &picks, &n));
            assert_int_equal(n, 48);
            assert_memory_equal(picks, want, sizeof(want));
            oracle_scores_fini(&s);
        }
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

/*
 * Query head h meets kv head h / group: each kv head has one loud key, and only the query heads of
 * its group look for it. With h mod n_kv_heads every loud key meets a query that looks elsewhere.
 */
static void query_heads_meet_their_own_kv_head(void **state)
{
    (void)state;
    for (int compressed = 0; compressed < 2; compressed++) {
        rig r;
        kvw_seq *seq = NULL;
        const uint32_t *picks = NULL;
        uint32_t reused = 0, n = 0, found = 0;
        rig_init(&r, "tokenselect", 400);
        r.opts.n_q_heads = 6;
        r.opts.n_kv_heads = 3;
        r.opts.n_layers = 1;
        r.opts.rope.theta = 0; /* positions play no part here */
        r.opts.k = 3;
        r.opts.residency_slots = 3;
        if (compressed) {
            r.opts.index = KVW_INDEX_COMPRESSED;
            rig_project(&r, 16);
        }
        rig_fill(&r);
        for (size_t j = 0; j < (size_t)400 * 48; j++)
            r.k[j] *= 0.01;
        for (uint32_t h = 0; h < 6; h++)
            for (uint32_t x = 0; x < 16; x++)
                r.q[((size_t)399 * 6 + h) * 16 + x] = x == 2 * (h / 2) ? 4.0 : 0.0;
        for (uint32_t kv = 0; kv < 3; kv++)
            r.k[((size_t)(100 + 50 * kv) * 3 + kv) * 16 + 2 * kv] = 4.0;
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, 399, NULL, NULL);
        rig_pass(&r, seq, 399, 1, NULL, NULL);
        assert_ok(kvw_last_picks(seq, 0, &picks, &n));
        for (uint32_t j = 0; j < n; j++)
            found += picks[j] == 100 || picks[j] == 150 || picks[j] == 200;
        assert_int_equal(found, 3);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

/* A context that fits is attended whole, at its own positions, by both selectors alike. */
static void a_short_context_is_attended_whole(void **state)
{
    (void)state;
    rig_record record[2];
    rig r[2];
    for (uint32_t i = 0; i < 2; i++) {
        kvw_seq *seq = NULL;
        uint32_t reused = 0, dims = 0;
        kvw_stats stats = {.size_bytes = sizeof(stats)};
        rig_init(&r[i], kvw_selector_at(i)->name, 96);
        rig_open(&r[i]);
        rig_record_init(&record[i], &r[i]);
        assert_ok(kvw_seq_create(r[i].worker, NULL, 0, &seq, &reused));
        rig_prefill(&r[i], seq, 0, 90, oracle_check_step, &dims);
        rig_decode(&r[i], seq, 90, 96, rig_record_step, &record[i]);
        assert_ok(kvw_seq_stats(seq, &stats));
        assert_int_equal(stats.full_steps, stats.steps);
        assert_int_equal(stats.reselects, 0);
        kvw_seq_destroy(seq);
    }
    rig_record_equal(&r[0], &record[0], &record[1], 90, 96);
    for (uint32_t i = 0; i < 2; i++) {
        rig_record_fini(&record[i]);
        rig_close(&r[i]);
    }
}

/* Eq. 4 shifts each query by its own best score, also where that is far below 0. */
static void queries_of_a_chunk_count_alike(void **state)
{
    (void)state;
    rig r;
    rig_init(&r, "esa", 300);
    r.opts.rope.theta = 0;
    rig_fill(&r);
    size_t rows = (size_t)r.opts.n_layers * r.n_tokens;
    for (size_t i = 0; i < rows; i++) {
        for (uint32_t h = 0; h < r.opts.n_kv_heads; h++)
            r.k[i * rig_kv_width(&r) + h * 16] = 4.0;
        for (uint32_t h = 0; h < r.opts.n_q_heads; h++)
            r.q[i * rig_q_width(&r) + h * 16] = i % 2 == 0 ? 4.0 : -4.0;
    }
    check_all(&r, 0);
}

static void far_position_is_a_setting_of_its_own(void **state)
{
    (void)state;
    rig r;
    rig_init(&r, "esa", 400);
    r.opts.far_position = 333;
    check_all(&r, 0);
}

static void without_rotary_embedding(void **state)
{
    (void)state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        rig r;
        rig_init(&r, kvw_selector_at(i)->name, 300);
        r.opts.rope.theta = 0;
        r.opts.attention_scale = 0.5f;
        check_all(&r, 0);
    }
}

/* A recent window longer than a chunk keeps the neighbours of the chunk's first token. */
static void a_chunk_keeps_its_neighbours(void **state)
{
    (void)state;
    rig r;
    rig_init(&r, "tokenselect", 420);
    r.opts.n_recent = 100;
    check_all(&r, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_selector_exact),
        cmocka_unit_test(every_selector_compressed),
        cmocka_unit_test(every_selector_reranked),
        cmocka_unit_test(rerank_takes_the_best_candidates),
        cmocka_unit_test(the_window_smooths_scores),
        cmocka_unit_test(index_pages_are_crossed),
        cmocka_unit_test(ties_go_to_the_lower_position),
        cmocka_unit_test(query_heads_meet_their_own_kv_head),
        cmocka_unit_test(a_short_context_is_attended_whole),
        cmocka_unit_test(queries_of_a_chunk_count_alike),
        cmocka_unit_test(far_position_is_a_setting_of_its_own),
        cmocka_unit_test(without_rotary_embedding),
        cmocka_unit_test(a_chunk_keeps_its_neighbours),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
