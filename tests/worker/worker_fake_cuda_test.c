/*
 * worker_fake_cuda_test.c: what only a fake device can be told to do: to be absent, to run out of
 * memory at any point, and to lose the server's memory while a step reads it.
 */
#include "bench.h"
#include "fake_cuda.h"
#include "fake_rig.h"
#include "oracle.h"

#include "base/clock.h"
#include "device/state.h"
#include "internal.h"

#define N_TOKENS ((uint32_t)FAKE_TOKENS)
#define PREFILL  576u
#define DIMS     ((uint32_t)FAKE_DIMS)

static void an_absent_device_is_unsupported(void **state)
{
    (void)state;
    rig r;
    fake_rig(&r, NULL);
    fake_cuda_absent(true);
    assert_int_equal(kvw_open(&r.opts, &r.worker), KVC_UNSUPPORTED);
    assert_non_null(strstr(kvw_last_error(), "no CUDA device 0"));
    fake_cuda_absent(false);
    assert_ok(kvw_open(&r.opts, &r.worker));
    rig_close(&r);
}

/* Its blocks have the shared memory of sm_86: a worker that could never select does not open. */
static void a_vote_needs_shared_memory(void **state)
{
    (void)state;
    rig r;
    fake_rig(&r, NULL);
    fake_cuda_shared(101376);
    assert_ok(kvw_open(&r.opts, &r.worker));
    rig_close(&r);
    fake_rig(&r, NULL);
    r.opts.selector = "tokenselect";
    rig_project(&r, DIMS);
    assert_int_equal(kvw_open(&r.opts, &r.worker), KVC_UNSUPPORTED);
    assert_non_null(strstr(kvw_last_error(), "selector: must be esa"));
    fake_cuda_shared(227u << 10);
    assert_ok(kvw_open(&r.opts, &r.worker));
    rig_close(&r);
}

/* What a worker with this index refuses, and how its message begins. */
typedef struct refused {
    const char *want, *selector;
    kvw_index_kind index;
    uint32_t heads, kv_heads, head_dim, dims, factor; /* dims: of the projection */
} refused;

static void what_a_vote_cannot_do_is_refused(void **state)
{
    (void)state;
    static const refused all[] = {
        {"index: must be COMPRESSED", "tokenselect", KVW_INDEX_EXACT, 8, 4, 64, DIMS, 0},
        {"rerank_factor: times k", "tokenselect", KVW_INDEX_RERANKED, 8, 4, 64, DIMS, 342},
        {"n_q_heads: must be at most 128", "tokenselect", KVW_INDEX_COMPRESSED, 136, 17, 64, DIMS,
         0},
        {"index: must be COMPRESSED", "tokenselect", KVW_INDEX_RERANKED, 8, 4, 512, 257, 2},
        {"index: must be COMPRESSED", "esa", KVW_INDEX_RERANKED, 8, 4, 64, DIMS, 2}};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        rig r;
        fake_rig(&r, NULL);
        (void)remove(r.projection);
        r.opts.selector = all[i].selector;
        r.opts.n_q_heads = all[i].heads;
        r.opts.n_kv_heads = all[i].kv_heads;
        r.opts.head_dim = all[i].head_dim;
        r.opts.index = all[i].index;
        r.opts.k = 48;
        rig_project(&r, all[i].dims);
        r.opts.rerank_factor = all[i].factor;
        r.opts.index_dims = all[i].index == KVW_INDEX_RERANKED ? all[i].dims / 2u : 0;
        if (all[i].index == KVW_INDEX_EXACT)
            r.opts.projection_path = NULL;
        assert_true(all[i].factor < 300 || all[i].factor * r.opts.k > KVK_CUDA_WIDE_MAX);
        assert_int_equal(kvw_open(&r.opts, &r.worker), KVC_UNSUPPORTED);
        if (strncmp(kvw_last_error(), all[i].want, strlen(all[i].want)) != 0)
            fail_msg("case %zu: %s", i, kvw_last_error());
        rig_close(&r);
    }
}

/* Wherever memory ends, all of it is given back, and a sequence that opened works. */
static void memory_may_end_anywhere(void **state)
{
    (void)state;
    uint32_t n_failed = 0, held = fake_cuda_held();
    for (uint32_t n = 0;; n++) {
        rig r;
        kvw_seq *seq = NULL;
        uint32_t reused = 0, dims = DIMS;
        fake_rig(&r, NULL);
        rig_fill(&r);
        fake_cuda_allocations(n);
        kvc_status st = kvw_open(&r.opts, &r.worker);
        if (st == KVC_OK)
            st = kvw_seq_create(r.worker, r.tokens, 0, &seq, &reused);
        fake_cuda_allocations(UINT32_MAX);
        if (st == KVC_OK) {
            rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
            rig_decode(&r, seq, PREFILL, PREFILL + 1, oracle_check_step, &dims);
        } else {
            assert_int_equal(st, KVC_NO_MEMORY);
            n_failed++;
        }
        kvw_seq_destroy(seq);
        rig_close(&r);
        assert_int_equal(fake_cuda_held(), held);
        if (st == KVC_OK)
            break;
    }
    assert_true(n_failed > 8);
}

/* A sequence that cannot grow says so as long as it cannot, and goes on when it can. */
static void growth_may_end_anywhere(void **state)
{
    (void)state;
    kvc_status st = KVC_NO_MEMORY;
    uint32_t n_failed = 0, held = fake_cuda_held();
    for (uint32_t n = 0; st != KVC_OK; n++) {
        rig r;
        kvw_seq *seq = NULL;
        uint32_t reused = 0, dims = DIMS;
        fake_rig(&r, NULL);
        r.opts.max_tokens = PREFILL - 1u; /* whole blocks: as many as the prefill has */
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, r.tokens, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
        fake_cuda_allocations(n);
        st = kvw_tokens(seq, r.tokens + PREFILL, 1);
        if (st != KVC_OK) {
            assert_int_equal(st, KVC_NO_MEMORY);
            n_failed++;
            fake_cuda_allocations(0);
            assert_int_equal(kvw_tokens(seq, r.tokens + PREFILL, 1), KVC_NO_MEMORY);
            fake_cuda_allocations(UINT32_MAX);
            rig_decode(&r, seq, PREFILL, PREFILL + 4, oracle_check_step, &dims);
        }
        fake_cuda_allocations(UINT32_MAX);
        kvw_seq_destroy(seq);
        rig_close(&r);
        assert_int_equal(fake_cuda_held(), held);
    }
    assert_true(n_failed > 2);
}

/* Of a graph that an op refused to be in nothing is kept. */
static void ops_may_be_refused(void **state)
{
    (void)state;
    kvc_status st = KVC_UNSUPPORTED;
    uint32_t n_failed = 0;
    for (uint32_t n = 0; st != KVC_OK; n++) {
        rig r;
        kvw_seq *seq = NULL;
        uint32_t reused = 0, dims = DIMS;
        fake_rig(&r, NULL);
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, r.tokens, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
        for (int i = 0; i < 3; i++) { /* a step has three graphs */
            fake_cuda_ops(n);
            st = kvw_tokens(seq, r.tokens + PREFILL, 1);
            fake_cuda_ops(UINT32_MAX);
            if (st == KVC_OK)
                break;
            assert_int_equal(st, KVC_UNSUPPORTED);
            n_failed++;
        }
        if (st != KVC_OK)
            rig_decode(&r, seq, PREFILL, PREFILL + 2, oracle_check_step, &dims);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
    assert_true(n_failed > 8);
}

/* Tokens are taken back in all layers or in none. */
static void taking_back_may_fail(void **state)
{
    (void)state;
    rig r;
    uint32_t reused = 0, dims = DIMS, chunk = 0, n_failed = 0;
    kvw_seq *seq = NULL;
    kvc_status st = KVC_DEVICE;
    fake_rig(&r, NULL);
    rig_open(&r);
    chunk = r.opts.chunk_tokens;
    assert_true(chunk > r.opts.n_recent + 1u); /* some of the pass may have been picked */
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
    for (uint32_t n = 0; st != KVC_OK; n++) {
        fake_cuda_copies(n);
        st = kvw_truncate(seq, PREFILL - chunk);
        fake_cuda_copies(UINT32_MAX);
        if (st != KVC_OK) {
            assert_int_equal(st, KVC_DEVICE);
            assert_int_equal(kvw_seq_tokens(seq), PREFILL);
            n_failed++;
        }
    }
    assert_int_equal(n_failed, r.opts.n_layers);
    assert_int_equal(kvw_seq_tokens(seq), PREFILL - chunk);
    rig_pass(&r, seq, PREFILL - chunk, chunk, oracle_check_step, &dims);
    rig_decode(&r, seq, PREFILL, PREFILL + 2, oracle_check_step, &dims);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* ---- the engine's memory is the device's ---- */

/* Outputs of passes of every kind, into record. */
static void run_all(rig_record *record, uint32_t device_memory, void *stream)
{
    rig r;
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    const kvw_seq_opts opts = {.size_bytes = sizeof(opts), .stream = stream};
    fake_rig(&r, NULL);
    r.opts.device_memory = device_memory;
    rig_open(&r);
    rig_record_init(record, &r);
    assert_ok(kvw_seq_open(r.worker, &opts, &seq, &reused));
    rig_decode(&r, seq, 0, 5, rig_record_step, record);
    rig_prefill(&r, seq, 5, PREFILL, rig_record_step, record);
    rig_decode(&r, seq, PREFILL, PREFILL + 10, rig_record_step, record);
    rig_pass(&r, seq, PREFILL + 10, 14, rig_record_step, record);
    kvw_stats stats = stats_of(seq);
    assert_int_equal(stats.steps_device, stats.steps);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* The bits do not depend on whose memory it is; and all is enqueued on the engine's stream. */
static void memory_may_be_the_devices(void **state)
{
    (void)state;
    rig r;
    rig_record host, device;
    kvk_stream *stream = fake_cuda_stream();
    run_all(&host, 0, NULL);
    assert_int_equal(fake_cuda_enqueued(stream), 0);
    run_all(&device, 1, stream);
    assert_true(fake_cuda_enqueued(stream) > 300);
    fake_rig(&r, NULL);
    rig_fill(&r);
    rig_record_equal(&r, &host, &device, 0, N_TOKENS);
    rig_close(&r);
    rig_record_fini(&host);
    rig_record_fini(&device);
    fake_cuda_stream_free(stream);
}

/* A copy of the queries that fails leaves nothing behind, and the step can be done again. */
static void a_query_may_not_come(void **state)
{
    bench *b = *state;
    rig r;
    uint32_t reused = 0, dims = DIMS;
    kvw_seq *seq = NULL;
    kvw_step *step = NULL;
    float lse[64];
    fake_rig(&r, b->client);
    r.opts.device_memory = 1;
    rig_open(&r);
    assert_true(2 * r.opts.n_q_heads <= 64);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    assert_ok(kvw_tokens(seq, r.tokens + PREFILL, 2));
    void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, PREFILL, 2);
    void *v = rig_bytes(&r, r.v, rig_kv_width(&r), 0, PREFILL, 2);
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, PREFILL, 2);
    assert_ok(kvw_append(seq, 0, k, v, 2));
    assert_ok(kvw_step_begin(seq, 0, q, 2, &step));
    fake_cuda_copies(0);
    assert_int_equal(kvw_step_finish(step, q, q, lse), KVC_DEVICE);
    fake_cuda_copies(UINT32_MAX);
    assert_ok(kvw_step_begin(seq, 0, q, 2, &step));
    assert_ok(kvw_step_finish(step, q, q, lse)); /* out is q */
    const rig_step done = {.seq = seq, .layer = 0, .first = PREFILL, .n = 2, .out = q, .lse = lse};
    oracle_check_step(&dims, &r, &done);
    free(k);
    free(v);
    free(q);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* Nobody else finds what follows a chunk that other queries selected for. */
static void a_chunk_may_be_foretold(void **state)
{
    bench *b = *state;
    for (int wrong = 0; wrong < 2; wrong++) {
        rig r;
        uint32_t reused = 0;
        kvw_seq *seq = NULL;
        kvw_step *step = NULL;
        fake_rig(&r, b->client);
        r.opts.revision = wrong == 0 ? "right" : "wrong";
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, 512, NULL, NULL);
        assert_ok(kvw_tokens(seq, r.tokens + 512, 64));
        void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, 512, 64);
        void *v = rig_bytes(&r, r.v, rig_kv_width(&r), 0, 512, 64);
        void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 512, 64);
        void *other = rig_bytes(&r, r.q, rig_q_width(&r), 0, 448, 64);
        assert_ok(kvw_append(seq, 0, k, v, 64));
        assert_ok(kvw_step_begin(seq, 0, wrong == 0 ? q : other, 64, &step));
        assert_ok(kvw_step_finish(step, q, q, NULL));
        assert_int_equal(seq->tainted, wrong);
        free(k);
        free(v);
        free(q);
        free(other);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

/* ---- a server of its own ---- */

/* A sequence whose rows are the server's. */
static kvw_seq *open_prefilled(rig *r, kvc_client *client)
{
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    fake_rig(r, client);
    rig_open(r);
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    rig_prefill(r, seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    return seq;
}

/* Takes the map away when a step's graph is about to run, one time in three. */
typedef struct thief {
    kvw_seq *seq;
    uint32_t n_launches, n_taken;
} thief;

static void take_map(void *arg)
{
    thief *t = arg;
    if (t->seq != NULL && t->n_launches++ % 3 == 0) {
        kvc_context_unmap(t->seq->servers[0].context);
        t->n_taken++;
    }
}

static void a_map_may_go_under_a_step(void **state)
{
    served *s = *state;
    rig r;
    uint32_t dims = DIMS;
    thief t = {.seq = open_prefilled(&r, s->client)};
    uint64_t read = fake_cuda_rows_read();
    kvw_stats before = {.size_bytes = sizeof(before)}, stats = before;
    assert_ok(kvw_seq_stats(t.seq, &before));
    fake_cuda_before_launch(take_map, &t);
    rig_decode(&r, t.seq, PREFILL, N_TOKENS, oracle_check_step, &dims);
    fake_cuda_before_launch(NULL, NULL);
    assert_ok(kvw_seq_stats(t.seq, &stats));
    assert_true(t.n_taken > 0 && stats.requests > 0);
    /* a step whose map went away reads its rows again */
    assert_true(fake_cuda_rows_read() - read > stats.misses - before.misses);
    kvw_seq_destroy(t.seq);
    rig_close(&r);
}

/* The same in passes of several tokens. */
static void a_map_may_go_under_a_chunk(void **state)
{
    served *s = *state;
    rig r;
    uint32_t dims = DIMS;
    thief t = {.seq = open_prefilled(&r, s->client)};
    uint64_t read = fake_cuda_rows_read();
    kvw_stats before = {.size_bytes = sizeof(before)}, stats = before;
    assert_ok(kvw_seq_stats(t.seq, &before));
    fake_cuda_before_launch(take_map, &t);
    for (uint32_t at = PREFILL; at < N_TOKENS; at += 4)
        rig_pass(&r, t.seq, at, 4, oracle_check_step, &dims);
    fake_cuda_before_launch(NULL, NULL);
    assert_ok(kvw_seq_stats(t.seq, &stats));
    assert_true(t.n_taken > 0);
    assert_true(fake_cuda_rows_read() - read > stats.misses - before.misses);
    kvw_seq_destroy(t.seq);
    rig_close(&r);
}

/* The step of layer 0 reads rows under a map that goes; that of layer 1 has the tables made anew
 * before it ends. */
static void another_layer_does_not_hide_that_a_map_went(void **state)
{
    served *s = *state;
    rig r;
    uint32_t dims = DIMS;
    thief t = {.seq = open_prefilled(&r, s->client)};
    kvw_step *step[2];
    void *q[2], *out = malloc(rig_q_width(&r) * sizeof(float));
    float lse[64];
    assert_non_null(out);
    assert_true(r.opts.n_q_heads <= 64);
    assert_ok(kvw_tokens(t.seq, r.tokens + PREFILL, 1));
    for (uint32_t l = 0; l < 2; l++) {
        void *k = rig_bytes(&r, r.k, rig_kv_width(&r), l, PREFILL, 1);
        void *v = rig_bytes(&r, r.v, rig_kv_width(&r), l, PREFILL, 1);
        q[l] = rig_bytes(&r, r.q, rig_q_width(&r), l, PREFILL, 1);
        assert_ok(kvw_append(t.seq, l, k, v, 1));
        free(k);
        free(v);
    }
    assert_ok(kvw_step_begin(t.seq, 0, q[0], 1, &step[0]));
    fake_cuda_before_launch(take_map, &t);
    assert_ok(kvw_step_attend(step[0], q[0]));
    fake_cuda_before_launch(NULL, NULL);
    assert_int_equal(t.n_taken, 1);
    assert_ok(kvw_step_begin(t.seq, 1, q[1], 1, &step[1]));
    uint64_t read = fake_cuda_rows_read(), misses = stats_of(t.seq).misses;
    for (uint32_t l = 0; l < 2; l++) {
        assert_ok(kvw_step_finish(step[l], q[l], out, lse));
        const rig_step done = {
            .seq = t.seq, .layer = l, .first = PREFILL, .n = 1, .out = out, .lse = lse};
        oracle_check_step(&dims, &r, &done);
        free(q[l]);
    }
    /* all that was missing in both layers, also what was read before */
    assert_int_equal(fake_cuda_rows_read() - read, stats_of(t.seq).misses - misses);
    assert_true(stats_of(t.seq).misses > misses);
    free(out);
    kvw_seq_destroy(t.seq);
    rig_close(&r);
}

/* What a step reads is held until the device has done it; map_client_test has what that means. */
static void a_step_holds_its_map(void **state)
{
    served *s = *state;
    const uint32_t at = PREFILL;
    for (int abandons = 0; abandons < 2; abandons++) {
        rig r;
        kvw_step *step = NULL;
        thief t = {.seq = open_prefilled(&r, s->client)};
        const kvwi_device_layer *layer = &t.seq->device->layers[0];
        assert_ok(kvw_tokens(t.seq, r.tokens + at, 1));
        void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, at, 1);
        void *v = rig_bytes(&r, r.v, rig_kv_width(&r), 0, at, 1);
        void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, at, 1);
        void *out = malloc(rig_q_width(&r) * sizeof(float));
        assert_non_null(out);
        assert_ok(kvw_append(t.seq, 0, k, v, 1));
        assert_ok(kvw_step_begin(t.seq, 0, q, 1, &step));
        assert_non_null(layer->hold); /* rows are on their way */
        fake_cuda_before_launch(take_map, &t);
        assert_ok(kvw_step_attend(step, q));
        fake_cuda_before_launch(NULL, NULL);
        assert_non_null(layer->hold);
        if (abandons == 0)
            assert_ok(kvw_step_finish(step, q, out, NULL));
        else
            kvw_step_abandon(step);
        assert_null(layer->hold);
        assert_int_equal(t.n_taken, 1);
        free(k);
        free(v);
        free(q);
        free(out);
        kvw_seq_destroy(t.seq);
        rig_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_absent_device_is_unsupported),
        cmocka_unit_test(a_vote_needs_shared_memory),
        cmocka_unit_test(what_a_vote_cannot_do_is_refused),
        cmocka_unit_test(memory_may_end_anywhere),
        cmocka_unit_test(growth_may_end_anywhere),
        cmocka_unit_test(ops_may_be_refused),
        cmocka_unit_test(taking_back_may_fail),
        cmocka_unit_test(memory_may_be_the_devices),
        cmocka_unit_test_setup_teardown(a_query_may_not_come, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(a_chunk_may_be_foretold, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(a_map_may_go_under_a_step, open_served, close_served),
        cmocka_unit_test_setup_teardown(a_map_may_go_under_a_chunk, open_served, close_served),
        cmocka_unit_test_setup_teardown(a_step_holds_its_map, open_served, close_served),
        cmocka_unit_test_setup_teardown(another_layer_does_not_hide_that_a_map_went, open_served,
                                        close_served),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
