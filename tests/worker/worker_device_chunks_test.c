/*
 * worker_device_chunks_test.c: retrieval of whole chunks on a device: alone and over a store, of
 * all heads and of one, against the CPU worker on the same inputs.
 *
 * Links with CUDA (SKIPPED where there is no GPU), or with a fake of it (tests/support). Memory of
 * the engine that is the device's is pinned memory, which both can read.
 */
#include <math.h>

#include "base/clock.h"
#include "bench.h"
#include "chunk_rig.h"
#include "kvk/cuda.h"

enum { GROUPS = 2, WIDTH = 128, MANY = 150 };

typedef struct setting {
    const char *selector;
    kvk_dtype dtype;
    uint32_t kv_head;
} setting;

static const setting settings[] = {{"gca", KVK_F32, KVW_ALL_HEADS},
                                   {"gca", KVK_BF16, KVW_ALL_HEADS},
                                   {"gca", KVK_F16, KVW_ALL_HEADS},
                                   {"hsa", KVK_F32, 1},
                                   {"hsa", KVK_BF16, 0}};

/* How far two ways to the same attention over numbers of about 1 may be apart. */
static double tolerance(kvk_dtype dtype)
{
    return dtype == KVK_F32 ? 1e-5 : dtype == KVK_F16 ? 4e-3 : 2e-2;
}

static void open_device_rig(chunk_rig *c, const setting *s, kvc_client *client, const char *backend)
{
    chunk_rig_init(c, s->selector, s->dtype, client);
    c->r.opts.backend = backend;
    c->r.opts.head_dim = 32;
    c->r.opts.max_tokens = 4 * S; /* it outgrows them */
    chunk_rig_ready(c);
}

static uint32_t n_heads(const chunk_rig *c, const setting *s)
{
    const kvw_opts *o = &c->r.opts;
    return s->kv_head == KVW_ALL_HEADS ? o->n_q_heads : o->n_q_heads / o->n_kv_heads;
}

/* Outputs of two groups at every chunk, turn by turn: the second one's query is made of the first
 * one's output; n_q queries each. Chunks that were chosen go to ids. */
static void converse(chunk_rig *c, const setting *s, kvw_seq *seq, uint32_t n_q, float *out,
                     uint32_t *ids)
{
    kvw_retriever *group[GROUPS];
    size_t heads = n_heads(c, s), len = heads * 32, elem = kvk_dtype_bytes(s->dtype);
    uint8_t *q = rig_bytes(&c->r, c->r.q, rig_q_width(&c->r), 0, 0, CHUNKS * S);
    uint8_t *got = malloc(n_q * len * elem);
    for (size_t g = 0; g < GROUPS; g++)
        assert_ok(kvw_retriever_open(seq, 0, s->kv_head, &group[g]));
    for (uint32_t t = 0; t < CHUNKS; t++) {
        float query[DIM];
        memcpy(query, c->queries[t], sizeof(query));
        for (size_t g = 0; g < GROUPS; g++) {
            const uint32_t *chosen = NULL;
            const float *scores = NULL, *weights = NULL;
            uint32_t n = 0;
            assert_ok(kvw_retrieve(group[g], query, t));
            assert_ok(kvw_retrieved(group[g], &chosen, &scores, &weights, &n));
            for (uint32_t i = 0; i < K; i++)
                *ids++ = i < n ? chosen[i] : UINT32_MAX;
            assert_ok(kvw_retriever_attend(group[g], q + t * len * elem, n_q, got));
            for (size_t i = 0; i < n_q * len; i++)
                *out++ = (float)rig_get(s->dtype, got, i);
            for (size_t i = 0; i < DIM; i++) /* coarse: what rounds otherwise asks the same */
                query[i] = rintf(16 * (float)rig_get(s->dtype, got, i)) / 4;
        }
        assert_ok(append(c, seq, t, 1));
        if (t % 8 == 7)
            assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    }
    free(q);
    free(got);
}

static void the_device_does_what_the_cpu_does(void **state)
{
    bench *b = *state;
    enum { LEN = CHUNKS * GROUPS * 3 * WIDTH };
    static float out[2][LEN];
    static uint32_t ids[2][CHUNKS * GROUPS * K];
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        for (size_t on_device = 0; on_device < 2; on_device++) {
            chunk_rig c;
            uint32_t reused = 0;
            open_device_rig(&c, &settings[i], b->client, on_device ? "cuda" : NULL);
            kvw_seq *seq = create(&c, 0, &reused);
            converse(&c, &settings[i], seq, 3, out[on_device], ids[on_device]);
            kvw_stats s = stats_of(seq);
            assert_true(s.misses > 5 * S && s.steps == CHUNKS * GROUPS);
            assert_int_equal(s.steps_device, on_device ? s.steps : 0);
            assert_true((s.bytes_device > CHUNKS * DIM * sizeof(float)) == (on_device != 0));
            kvw_seq_destroy(seq);
            rig_close(&c.r);
        }
        assert_memory_equal(ids[0], ids[1], sizeof(ids[0]));
        size_t len =
            CHUNKS * GROUPS * 3 * (settings[i].kv_head == KVW_ALL_HEADS ? WIDTH : WIDTH / 2);
        for (size_t j = 0; j < len; j++)
            assert_true(fabs((double)out[0][j] - (double)out[1][j]) < tolerance(settings[i].dtype));
    }
}

/* ---- the engine's memory ---- */

/* A retrieval of all but the last chunk and attention of n_q queries; memory is the engine's. */
static void look(chunk_rig *c, kvw_seq *seq, const uint8_t *q, uint32_t n_q, uint8_t *out)
{
    kvw_retriever *x = NULL;
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    assert_ok(kvw_retrieve(x, c->queries[9], CHUNKS - 2));
    assert_ok(kvw_retriever_attend(x, q, n_q, out));
    kvw_retriever_close(x); /* waits for what was enqueued */
}

/* More queries than go at once, in the device's memory: the bits that they have in the host's. */
static void memory_may_be_the_devices(void **state)
{
    bench *b = *state;
    kvk_cuda *cuda = NULL;
    assert_ok(kvk_cuda_open(0, &cuda));
    for (size_t i = 0; i < 3; i++) {
        uint8_t *out[2], *q = NULL;
        size_t elem = kvk_dtype_bytes(settings[i].dtype), len = MANY * WIDTH * elem;
        for (uint32_t there = 0; there < 2; there++) {
            chunk_rig c;
            void *p = NULL;
            chunk_rig_init(&c, "gca", settings[i].dtype, b->client);
            c.r.opts.backend = "cuda:0";
            c.r.opts.head_dim = 32;
            c.r.opts.device_memory = there;
            chunk_rig_ready(&c);
            kvw_seq *seq = offloaded(&c);
            q = rig_bytes(&c.r, c.r.q, rig_q_width(&c.r), 0, 0, MANY);
            assert_ok(kvk_cuda_alloc(cuda, KVK_CUDA_PINNED, len, &p));
            memcpy(p, q, len);
            free(q);
            look(&c, seq, p, MANY, p); /* in place */
            out[there] = malloc(len);
            memcpy(out[there], p, len);
            kvk_cuda_free(cuda, KVK_CUDA_PINNED, p);
            kvw_seq_destroy(seq);
            rig_close(&c.r);
        }
        assert_memory_equal(out[0], out[1], len);
        free(out[0]);
        free(out[1]);
    }
    kvk_cuda_close(cuda);
}

/* ---- what goes wrong ---- */

static void rows_that_do_not_arrive_are_an_error(void **state)
{
    bench *b = *state;
    chunk_rig c;
    kvw_retriever *x = NULL;
    float q[WIDTH] = {1}, out[2][WIDTH];
    open_device_rig(&c, &settings[0], b->client, "cuda");
    kvw_seq *seq = offloaded(&c);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    store_set(&b->store, &(store_faults){.lose_every = S});
    assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS - 2));
    assert_status(kvw_retriever_attend(x, q, 1, out[0]), KVC_NOT_FOUND);
    assert_status(kvw_retriever_attend(x, q, 1, out[0]), KVC_INVALID);
    store_set(&b->store, &(store_faults){0});
    for (size_t i = 0; i < 2; i++) { /* fetched; chosen again */
        assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS - 2));
        assert_ok(kvw_retriever_attend(x, q, 1, out[i]));
    }
    assert_memory_equal(out[0], out[1], sizeof(out[0]));
    assert_int_equal(stats_of(seq).misses, 2 * K * S);
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

/* A chunk that was taken back is not the one that comes in its place: its rows and its landmark. */
static void a_truncated_chunk_is_forgotten(void **state)
{
    float q[WIDTH] = {1}, out[2][2][WIDTH];
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        chunk_rig c;
        kvw_retriever *x = NULL;
        uint32_t reused = 0;
        open_device_rig(&c, &settings[0], NULL, i == 0 ? NULL : "cuda");
        kvw_seq *seq = create(&c, 0, &reused);
        assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
        assert_ok(append(&c, seq, 0, 1));
        assert_ok(append(&c, seq, 1, 1));
        assert_ok(kvw_retrieve(x, c.queries[2], 2));
        assert_ok(kvw_retriever_attend(x, q, 1, out[i][0]));
        assert_ok(kvw_truncate(seq, S));
        assert_status(kvw_retriever_attend(x, q, 1, out[i][0]), KVC_INVALID);
        for (size_t j = 0; j < (size_t)S * rig_kv_width(&c.r); j++)
            c.r.v[(size_t)S * rig_kv_width(&c.r) + j] *= -2;
        for (size_t j = 0; j < DIM; j++)
            c.marks[1][j] *= -1;
        assert_ok(append(&c, seq, 1, 1));
        assert_ok(kvw_retrieve(x, c.queries[2], 2));
        assert_ok(kvw_retriever_attend(x, q, 1, out[i][1]));
        kvw_seq_destroy(seq);
        rig_close(&c.r);
    }
    assert_memory_not_equal(out[1][0], out[1][1], sizeof(out[1][0]));
    for (size_t i = 0; i < 2 * WIDTH; i++)
        assert_true(fabs((double)out[0][i / WIDTH][i % WIDTH] -
                         (double)out[1][i / WIDTH][i % WIDTH]) < 1e-5);
}

static void what_a_device_cannot_do_is_refused(void **state)
{
    chunk_rig c;
    kvw_worker *worker = NULL;
    kvw_retriever *x = NULL;
    uint32_t reused = 0;
    (void)state;
    open_device_rig(&c, &settings[0], NULL, "cuda");
    kvw_opts bad[] = {c.r.opts, c.r.opts, c.r.opts};
    bad[0].head_dim = 48;
    bad[1].landmark_dim = KVK_CUDA_LANDMARK_MAX + 16;
    bad[2].backend = "cuda:999";
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        assert_status(kvw_open(&bad[i], &worker), KVC_UNSUPPORTED);
        assert_null(worker);
    }
    rig_close(&c.r);
    open_device_rig(&c, &settings[3], NULL, "cuda");
    c.r.opts.n_kv_heads = 16; /* a head has one number of 16 */
    c.r.opts.n_q_heads = 16;
    c.r.opts.landmark_dim = 16;
    assert_ok(kvw_open(&c.r.opts, &worker));
    kvw_seq *seq = NULL;
    assert_ok(kvw_seq_create(worker, NULL, 0, &seq, &reused));
    assert_status(kvw_retriever_open(seq, 0, 1, &x), KVC_UNSUPPORTED);
    assert_null(x);
    kvw_seq_destroy(seq);
    kvw_close(worker);
    rig_close(&c.r);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_device_does_what_the_cpu_does, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(memory_may_be_the_devices, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(rows_that_do_not_arrive_are_an_error, bench_open,
                                        bench_close),
        cmocka_unit_test(a_truncated_chunk_is_forgotten),
        cmocka_unit_test(what_a_device_cannot_do_is_refused),
    };
    kvk_cuda *cuda = NULL;
    if (kvk_cuda_open(0, &cuda) == KVC_UNSUPPORTED) {
        puts("SKIPPED: no GPU");
        return 77;
    }
    kvk_cuda_close(cuda);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
