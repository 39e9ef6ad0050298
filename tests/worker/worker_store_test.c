/*
 * worker_store_test.c: the worker over a store: whatever is resident, fetched or reused, the bits
 * of `exact` are those of a run that keeps everything; and which blocks a sequence may reuse.
 */
#include "oracle.h"

#include <math.h>
#include <pthread.h>

#include "base/clock.h"
#include "bench.h"
#include "selector/selector.h"

/* A reference without a store, a cold run, and a run over the cold one's prefix. */
static void three_runs(bench *b, const char *selector, kvw_index_kind index, uint32_t n_layers,
                       bool forget_index)
{
    rig r;
    kvw_worker *stored = NULL, *alone = NULL;
    rig_record ref, cold, warm;
    kvw_stats s_ref, s_cold, s_warm;
    uint32_t reused = 0;
    store_rig(&r, selector, index, b->client);
    r.opts.n_layers = n_layers;
    if (index != KVW_INDEX_EXACT)
        rig_project(&r, 16);
    rig_open(&r);
    stored = r.worker;
    r.opts.client = NULL;
    assert_ok(kvw_open(&r.opts, &alone));
    assert_true(memcmp(kvw_schema_digest(stored), kvw_schema_digest(alone), 32) == 0);
    r.worker = alone;
    run(&r, &ref, 700, &reused, &s_ref);
    assert_int_equal(reused, 0);
    assert_int_equal(s_ref.misses, 0);
    r.worker = stored;
    run(&r, &cold, 700, &reused, &s_cold);
    assert_int_equal(reused, 0);
    assert_true(s_cold.misses > 500 * n_layers && s_cold.rows_dram == s_cold.misses);
    assert_int_equal(s_cold.hits + s_cold.misses, s_cold.picks);
    assert_int_equal(s_cold.blocks_put, 10);
    assert_true(s_cold.bytes_window < s_ref.bytes_window / 2);
    rig_record_equal(&r, &ref, &cold, 0, 700);
    if (forget_index)
        store_forget(&b->store, true);
    run(&r, &warm, 700, &reused, &s_warm);
    assert_int_equal(reused, 640);
    assert_int_equal(s_warm.tokens_reused, 640);
    bool rebuilt = index == KVW_INDEX_EXACT || forget_index;
    assert_int_equal(s_warm.index_rows_rebuilt, rebuilt ? n_layers * 640 : 0);
    assert_int_equal(s_warm.bytes_index, s_cold.bytes_index);
    rig_record_equal(&r, &cold, &warm, 640, 700);
    rig_record_fini(&ref);
    rig_record_fini(&cold);
    rig_record_fini(&warm);
    kvw_close(alone);
    rig_close(&r);
}

static void exact_bits_do_not_depend_on_residency(void **state)
{
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++)
        for (uint32_t kind = KVW_INDEX_EXACT; kind <= KVW_INDEX_RERANKED; kind++)
            three_runs(*state, kvw_selector_at(i)->name, (kvw_index_kind)kind, 2, false);
}

/* One layer, so that a single piece is on its way when all have been asked for. */
static void one_layer_is_brought_back_whole(void **state)
{
    three_runs(*state, "esa", KVW_INDEX_COMPRESSED, 1, false);
    three_runs(*state, "tokenselect", KVW_INDEX_EXACT, 1, false);
}

static void a_lost_index_is_rebuilt_from_rows(void **state)
{
    three_runs(*state, "esa", KVW_INDEX_COMPRESSED, 2, true);
    three_runs(*state, "tokenselect", KVW_INDEX_RERANKED, 2, true);
}

/* Every step of a store-backed run is the oracle's too. */
static void stored_runs_match_the_oracle(void **state)
{
    bench *b = *state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        for (uint32_t exact = 0; exact < 2; exact++) {
            rig r;
            kvw_seq *seq = NULL;
            uint32_t reused = 0, dims = 0;
            store_rig(&r, kvw_selector_at(i)->name, KVW_INDEX_EXACT, b->client);
            r.opts.exact = exact;
            rig_open(&r);
            assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
            rig_prefill(&r, seq, 0, 600, NULL, NULL);
            rig_decode(&r, seq, 600, 640, oracle_check_step, &dims);
            assert_true(stats_of(seq).misses > 100);
            kvw_seq_destroy(seq);
            rig_close(&r);
        }
    }
}

/* Attending while rows travel changes the last bits only. */
static void overlap_stays_within_rounding(void **state)
{
    bench *b = *state;
    for (uint32_t i = 0; kvw_selector_at(i) != NULL; i++) {
        rig r;
        rig_record exact, overlap;
        kvw_stats stats;
        uint32_t reused = 0;
        store_rig(&r, kvw_selector_at(i)->name, KVW_INDEX_EXACT, b->client);
        rig_open(&r);
        run(&r, &exact, 0, &reused, &stats);
        kvw_close(r.worker);
        r.opts.exact = 0;
        rig_open(&r);
        run(&r, &overlap, 0, &reused, &stats);
        assert_true(stats.misses > 1000);
        double diff = rig_record_diff(&r, &exact, &overlap, 0, 700);
        assert_true(diff > 0 && diff < 2e-6);
        rig_record_fini(&exact);
        rig_record_fini(&overlap);
        rig_close(&r);
    }
}

/* Steps of several layers open at once, each selected with a prediction of its query. */
static void steps_of_layers_may_overlap(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    kvw_step *step[2], *again = NULL;
    uint32_t reused = 0, width;
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    r.opts.exact = 0;
    rig_open(&r);
    width = rig_q_width(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    store_set(&b->store, &(store_faults){.fetch_delay_ms = 500});
    assert_ok(kvw_tokens(seq, r.tokens + 640, 1));
    for (uint32_t layer = 0; layer < 2; layer++) {
        void *k = rig_bytes(&r, r.k, rig_kv_width(&r), layer, 640, 1);
        void *v = rig_bytes(&r, r.v, rig_kv_width(&r), layer, 640, 1);
        void *q = rig_bytes(&r, r.q, width, layer, 630, 1); /* a prediction */
        assert_ok(kvw_append(seq, layer, k, v, 1));
        uint64_t t0 = kvc_now_ns();
        assert_ok(kvw_step_begin(seq, layer, q, 1, &step[layer]));
        assert_true(kvc_now_ns() - t0 < 450000000ull); /* begin does not wait for the network */
        assert_status(kvw_step_begin(seq, layer, q, 1, &again), KVC_AGAIN);
        free(k);
        free(v);
        free(q);
    }
    assert_status(kvw_tokens(seq, r.tokens, 1), KVC_INVALID);
    for (uint32_t layer = 2; layer-- > 0;) {
        float out[64], lse[4];
        double want[64], want_lse[4];
        const uint32_t *picks = NULL;
        uint32_t n = 0;
        void *q = rig_bytes(&r, r.q, width, layer, 640, 1);
        assert_ok(kvw_step_attend(step[layer], q));
        assert_ok(kvw_step_finish(step[layer], q, out, lse));
        assert_ok(kvw_last_picks(seq, layer, &picks, &n));
        oracle_attend(&r, layer, 640, 1, picks, n, oracle_near(&r, 641, 1), NULL, 0, want,
                      want_lse);
        const rig_step done = {
            .seq = seq, .layer = layer, .first = 640, .n = 1, .out = out, .lse = lse};
        oracle_check_out(&r, &done, want, want_lse);
        free(q);
    }
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A worker reuses only what a cold run of its own chunks would have computed. */
static void blocks_off_the_grid_are_not_reused(void **state)
{
    bench *b = *state;
    for (uint32_t any = 0; any < 2; any++) {
        rig r;
        kvw_seq *seq = NULL;
        uint32_t reused = 0;
        store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
        r.opts.reuse_any = any;
        r.opts.chunk_tokens = 128;
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, 200, NULL, NULL); /* 128 on the grid, 72 off it */
        rig_decode(&r, seq, 200, 400, NULL, NULL);
        kvw_seq_destroy(seq);
        assert_ok(kvw_seq_create(r.worker, r.tokens, 400, &seq, &reused));
        assert_int_equal(reused, any ? 384 : 128);
        kvw_seq_destroy(seq);
        assert_ok(kvw_seq_create(r.worker, r.tokens, 128, &seq, &reused));
        assert_int_equal(reused, 0); /* at least one token has to be computed */
        kvw_seq_destroy(seq);
        r.tokens[70] ^= 1;
        assert_ok(kvw_seq_create(r.worker, r.tokens, 400, &seq, &reused));
        assert_int_equal(reused, 0);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

/* A block of a shorter chunk does not take the place of the one that a whole chunk computes. */
static void blocks_off_the_grid_have_other_names(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    store_rig(&r, "esa", KVW_INDEX_EXACT, b->client);
    r.opts.chunk_tokens = 128;
    rig_open(&r);
    for (uint32_t n = 200; n <= 256; n += 56) {
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, n, NULL, NULL);
        assert_ok(kvw_flush(seq, 0));
        assert_int_equal(stats_of(seq).blocks_put, n / 64);
        assert_int_equal(stats_of(seq).blocks_existed, n == 200 ? 0 : 2);
        kvw_seq_destroy(seq);
    }
    /* a whole chunk of which a token was taken back is a shorter chunk too */
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 256, NULL, NULL);
    assert_ok(kvw_truncate(seq, 255));
    rig_decode(&r, seq, 255, 256, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    assert_int_equal(stats_of(seq).blocks_existed, 2);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* What of 400 tokens a sequence with these labels reuses; afterwards all of them are there. */
static uint32_t labelled(rig *r, const char *adapter, const char *salt)
{
    const kvw_seq_opts opts = {.size_bytes = sizeof(opts),
                               .tokens = r->tokens,
                               .n_tokens = 400,
                               .adapter = adapter,
                               .salt = salt};
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    assert_ok(kvw_seq_open(r->worker, &opts, &seq, &reused));
    rig_prefill(r, seq, reused, 400, NULL, NULL);
    kvw_seq_destroy(seq);
    return reused;
}

/* Adapters and salts share nothing with each other or with plain sequences. */
static void labels_keep_sequences_apart(void **state)
{
    static const char *const labels[][2] = {
        {NULL, NULL}, {"a", NULL},        {"b", NULL}, {NULL, "a"},
        {"a", "b"},   {"a salt=b", NULL}, {"b", "a"},  {NULL, "adapter=a"},
    };
    bench *b = *state;
    rig r;
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    rig_open(&r);
    for (uint32_t again = 0; again < 2; again++)
        for (size_t i = 0; i < sizeof(labels) / sizeof(labels[0]); i++)
            assert_int_equal(labelled(&r, labels[i][0], labels[i][1]), again ? 384 : 0);
    assert_int_equal(labelled(&r, "", ""), 384); /* as good as none */
    rig_close(&r);
}

static void labels_that_do_not_fit_are_refused(void **state)
{
    bench *b = *state;
    char text[KVC_MAX_NAME_BYTES + 2];
    kvw_seq_opts opts = {.size_bytes = sizeof(opts), .adapter = text, .salt = text};
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    rig r;
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    rig_open(&r);
    memset(text, 'x', sizeof(text));
    text[KVC_MAX_NAME_BYTES] = '\0';
    assert_ok(kvw_seq_open(r.worker, &opts, &seq, &reused));
    kvw_seq_destroy(seq);
    text[KVC_MAX_NAME_BYTES] = 'x';
    text[KVC_MAX_NAME_BYTES + 1] = '\0';
    assert_int_equal(kvw_seq_open(r.worker, &opts, &seq, &reused), KVC_INVALID);
    assert_null(seq);
    assert_non_null(strstr(kvw_last_error(), "adapter"));
    opts.adapter = NULL;
    (void)snprintf(text, sizeof(text), "two\nlines");
    assert_int_equal(kvw_seq_open(r.worker, &opts, &seq, &reused), KVC_INVALID);
    assert_non_null(strstr(kvw_last_error(), "salt"));
    opts.adapter = opts.salt = NULL;
    static const size_t wrong[] = {0, sizeof(size_t), sizeof(opts) - 1,
                                   sizeof(opts) + sizeof(size_t)};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        opts.size_bytes = wrong[i];
        assert_int_equal(kvw_seq_open(r.worker, &opts, &seq, &reused), KVC_INVALID);
        assert_non_null(strstr(kvw_last_error(), "size_bytes"));
    }
    opts.adapter = "two\nlines"; /* beyond what the caller's struct has */
    opts.size_bytes = offsetof(kvw_seq_opts, adapter);
    assert_ok(kvw_seq_open(r.worker, &opts, &seq, &reused));
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* Chunks shorter than blocks: reuse goes by blocks, and equals a cold run bit for bit. */
static void chunks_shorter_than_blocks_are_reused(void **state)
{
    bench *b = *state;
    static const char *const selectors[] = {"esa", "tokenselect"};
    for (int i = 0; i < 2; i++) {
        rig r;
        rig_record cold, warm;
        kvw_stats stats;
        uint32_t reused = 0;
        store_rig(&r, selectors[i], KVW_INDEX_EXACT, b->client);
        r.opts.chunk_tokens = 16;
        rig_open(&r);
        run(&r, &cold, 0, &reused, &stats);
        run(&r, &warm, 700, &reused, &stats);
        assert_int_equal(reused, 640); /* the next block is not full */
        rig_record_equal(&r, &cold, &warm, reused, 700);
        rig_record_fini(&cold);
        rig_record_fini(&warm);
        run(&r, &warm, 140, &reused, &stats);
        assert_int_equal(reused, 128);
        rig_record_fini(&warm);
        rig_close(&r);
    }
}

/* Tokens that left recent since the reselect are kept, not fetched. */
static void reused_picks_keep_their_recent_tokens(void **state)
{
    bench *b = *state;
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    r.opts.reselect_cos = -1.0;
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, 640, NULL, NULL);
    assert_ok(kvw_flush(seq, 0)); /* else buffers go later, and their rows are misses then */
    rig_decode(&r, seq, 640, 641, NULL, NULL);
    kvw_stats first = stats_of(seq);
    rig_decode(&r, seq, 641, 641 + r.opts.n_recent, NULL, NULL);
    kvw_stats last = stats_of(seq);
    assert_int_equal(last.reselects, first.reselects);
    assert_int_equal(last.misses, first.misses);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* Prefill by steps, selecting by the queries of `shift` tokens later, attending into the queries
 * themselves where in_place; what a new sequence reuses. */
static uint32_t reuse_after_steps(rig *r, uint32_t shift, bool in_place)
{
    kvw_seq *seq = NULL;
    uint32_t reused = 0, width = rig_q_width(r);
    float *out = malloc(64 * width * sizeof(float));
    assert_non_null(out);
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    for (uint32_t first = 0; first < 512; first += 64) {
        assert_ok(kvw_tokens(seq, r->tokens + first, 64));
        for (uint32_t layer = 0; layer < 2; layer++) {
            kvw_step *step = NULL;
            void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, first, 64);
            void *q = rig_bytes(r, r->q, width, layer, first, 64);
            void *guess = rig_bytes(r, r->q, width, layer, first + shift, 64);
            assert_ok(kvw_append(seq, layer, k, k, 64));
            assert_ok(kvw_step_begin(seq, layer, guess, 64, &step));
            assert_ok(kvw_step_finish(step, q, in_place ? q : out, NULL));
            free(k);
            free(q);
            free(guess);
        }
    }
    kvw_seq_destroy(seq);
    free(out);
    assert_ok(kvw_seq_create(r->worker, r->tokens, 600, &seq, &reused));
    kvw_seq_destroy(seq);
    return reused;
}

static void predicted_queries_are_not_reused_either(void **state)
{
    bench *b = *state;
    rig r;
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    rig_open(&r);
    assert_true(reuse_after_steps(&r, 1, false) < 256);
    assert_true(reuse_after_steps(&r, 1, true) < 256);
    assert_int_equal(reuse_after_steps(&r, 0, true), 512);
    assert_int_equal(reuse_after_steps(&r, 0, false), 512);
    rig_close(&r);
}

/* Drafts: a pass of five tokens, two accepted; the rest of the run is as if they never were. */
static void rejected_drafts_leave_no_trace(void **state)
{
    bench *b = *state;
    rig r;
    rig_record plain, drafted;
    kvw_seq *seq = NULL;
    uint32_t reused = 0, wrong[5] = {1, 2, 3, 4, 5};
    store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
    rig_open(&r);
    rig_record_init(&plain, &r);
    rig_record_init(&drafted, &r);
    for (int draft = 0; draft < 2; draft++) {
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, 600, NULL, NULL);
        for (uint32_t pos = 600; pos < 660; pos += 2) {
            if (draft) { /* a pass that crosses block ends and is thrown away whole */
                assert_ok(kvw_tokens(seq, wrong, 5));
                for (uint32_t layer = 0; layer < 2; layer++) {
                    void *k = rig_bytes(&r, r.v, rig_kv_width(&r), layer, 100, 5);
                    assert_ok(kvw_append(seq, layer, k, k, 5));
                    free(k);
                }
                assert_status(kvw_truncate(seq, pos - 1), KVC_INVALID);
                assert_ok(kvw_truncate(seq, pos));
            }
            rig_pass(&r, seq, pos, 2, rig_record_step, draft ? &drafted : &plain);
        }
        kvw_seq_destroy(seq);
    }
    rig_record_equal(&r, &plain, &drafted, 600, 660);
    rig_record_fini(&plain);
    rig_record_fini(&drafted);
    rig_close(&r);
}

/* Ten blocks; the tenth begins with five tokens of which `kept` are accepted (2: no drafts), then
 * passes of two. How many of its blocks the store had. */
static uint64_t existed_after_drafts(rig *r, uint32_t n_pass, uint32_t kept)
{
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    rig_prefill(r, seq, 0, 576, NULL, NULL);
    rig_pass(r, seq, 576, n_pass, NULL, NULL);
    assert_ok(kvw_truncate(seq, 576 + kept));
    for (uint32_t pos = 576 + kept; pos < 640; pos += 2)
        rig_pass(r, seq, pos, 2, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    uint64_t n = stats_of(seq).blocks_existed;
    assert_int_equal(stats_of(seq).blocks_put, 10);
    kvw_seq_destroy(seq);
    return n;
}

/* Kept drafts were computed beside the rejected ones: the block is no other sequence's. */
static void partly_accepted_drafts_have_names_of_their_own(void **state)
{
    bench *b = *state;
    for (uint32_t any = 0; any < 2; any++) {
        rig r;
        store_rig(&r, "tokenselect", KVW_INDEX_EXACT, b->client);
        r.opts.reuse_any = any;
        rig_open(&r);
        assert_int_equal(existed_after_drafts(&r, 5, 2), 0);
        assert_int_equal(existed_after_drafts(&r, 2, 2), any ? 10 : 9);
        assert_int_equal(existed_after_drafts(&r, 5, 2), any ? 10 : 9);
        assert_int_equal(existed_after_drafts(&r, 5, 0), 10);
        rig_close(&r);
    }
}

/* Two sequences on two threads of one worker, the second over the first one's tokens. */
typedef struct racer {
    rig *r;
    rig_record record;
    kvw_stats stats;
} racer;

static void *race(void *arg)
{
    racer *x = arg;
    uint32_t reused = 0;
    run(x->r, &x->record, 0, &reused, &x->stats);
    return NULL;
}

static void sequences_run_in_parallel(void **state)
{
    bench *b = *state;
    rig r;
    racer x[3];
    pthread_t thread[3];
    store_rig(&r, "tokenselect", KVW_INDEX_COMPRESSED, b->client);
    rig_open(&r);
    for (int i = 0; i < 3; i++) {
        x[i].r = &r;
        assert_int_equal(pthread_create(&thread[i], NULL, race, &x[i]), 0);
    }
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_join(thread[i], NULL), 0);
    for (int i = 1; i < 3; i++)
        rig_record_equal(&r, &x[0].record, &x[i].record, 0, 700);
    for (int i = 0; i < 3; i++)
        rig_record_fini(&x[i].record);
    rig_close(&r);
}

int main(void)
{
#define STORE_TEST(name) cmocka_unit_test_setup_teardown(name, bench_open, bench_close)
    const struct CMUnitTest tests[] = {
        STORE_TEST(exact_bits_do_not_depend_on_residency),
        STORE_TEST(one_layer_is_brought_back_whole),
        STORE_TEST(a_lost_index_is_rebuilt_from_rows),
        STORE_TEST(stored_runs_match_the_oracle),
        STORE_TEST(overlap_stays_within_rounding),
        STORE_TEST(steps_of_layers_may_overlap),
        STORE_TEST(blocks_off_the_grid_are_not_reused),
        STORE_TEST(blocks_off_the_grid_have_other_names),
        STORE_TEST(labels_keep_sequences_apart),
        STORE_TEST(labels_that_do_not_fit_are_refused),
        STORE_TEST(chunks_shorter_than_blocks_are_reused),
        STORE_TEST(reused_picks_keep_their_recent_tokens),
        STORE_TEST(predicted_queries_are_not_reused_either),
        STORE_TEST(rejected_drafts_leave_no_trace),
        STORE_TEST(partly_accepted_drafts_have_names_of_their_own),
        STORE_TEST(sequences_run_in_parallel),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
