/*
 * worker_fake_chunks_test.c: retrieval on a device that runs out of memory at any point, refuses
 * any op or loses any copy: an error, nothing kept, and another retrieval goes well.
 */
#include "base/clock.h"
#include "bench.h"
#include "chunk_rig.h"
#include "fake_cuda.h"

static void fake_rig(chunk_rig *c, kvc_client *client)
{
    chunk_rig_init(c, "gca", KVK_F32, client);
    c->r.opts.backend = "cuda";
    c->r.opts.head_dim = 32;
    c->r.opts.max_tokens = 4 * S;
    rig_fill(&c->r);
}

/* Attention over the chunks that query t chooses. */
static kvc_status look(chunk_rig *c, kvw_retriever *x, uint32_t t, float *out)
{
    float q[128] = {1};
    kvc_status st = kvw_retrieve(x, c->queries[t], CHUNKS - 1);
    return st == KVC_OK ? kvw_retriever_attend(x, q, 1, out) : st;
}

static void memory_may_end_anywhere(void **state)
{
    (void)state;
    uint32_t n_failed = 0, held = fake_cuda_held();
    kvc_status st = KVC_NO_MEMORY;
    for (uint32_t n = 0; st != KVC_OK; n++) {
        chunk_rig c;
        kvw_seq *seq = NULL;
        kvw_retriever *x = NULL;
        uint32_t reused = 0;
        fake_rig(&c, NULL);
        fake_cuda_allocations(n);
        st = kvw_open(&c.r.opts, &c.r.worker);
        if (st == KVC_OK)
            st = kvw_seq_create(c.r.worker, NULL, 0, &seq, &reused);
        if (st == KVC_OK)
            st = kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x);
        fake_cuda_allocations(UINT32_MAX);
        assert_true(st == KVC_OK || (st == KVC_NO_MEMORY && x == NULL));
        n_failed += st != KVC_OK;
        kvw_seq_destroy(seq);
        rig_close(&c.r);
        assert_int_equal(fake_cuda_held(), held);
    }
    assert_true(n_failed >= 4);
}

/* Landmarks that outgrow their memory: an error while there is no more, then all is well. */
static void growth_may_end_anywhere(void **state)
{
    float out[2][128];
    (void)state;
    for (uint32_t n = 0; n < 3; n++) {
        chunk_rig c;
        kvw_retriever *x = NULL;
        fake_rig(&c, NULL);
        chunk_rig_ready(&c);
        kvw_seq *seq = offloaded(&c);
        assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
        fake_cuda_allocations(n);
        kvc_status st = look(&c, x, 3, out[n > 1]);
        fake_cuda_allocations(UINT32_MAX);
        assert_int_equal(st, n < 2 ? KVC_NO_MEMORY : KVC_OK);
        assert_ok(look(&c, x, 3, out[0]));
        if (n == 2)
            assert_memory_equal(out[0], out[1], sizeof(out[0]));
        kvw_seq_destroy(seq);
        rig_close(&c.r);
    }
}

/* Whichever op or copy of a retrieval fails, the next one has the same result. */
static void ops_and_copies_may_fail(void **state)
{
    bench *b = *state;
    float want[128], out[128];
    for (uint32_t kind = 0; kind < 2; kind++) {
        void (*limit)(uint32_t n) = kind == 0 ? fake_cuda_ops : fake_cuda_copies;
        uint32_t n_failed = 0;
        chunk_rig c;
        kvw_retriever *x = NULL;
        kvc_status st = KVC_DEVICE;
        fake_rig(&c, b->client);
        chunk_rig_ready(&c);
        kvw_seq *seq = offloaded(&c);
        for (uint32_t n = 0; st != KVC_OK; n++) {
            assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
            limit(n);
            st = look(&c, x, 3, want);
            limit(UINT32_MAX);
            assert_true(st == KVC_OK || st == KVC_DEVICE || st == KVC_UNSUPPORTED);
            n_failed += st != KVC_OK;
            assert_ok(look(&c, x, 3, out));
            if (st == KVC_OK)
                assert_memory_equal(out, want, sizeof(out));
            kvw_retriever_close(x);
        }
        assert_true(n_failed >= 4);
        kvw_seq_destroy(seq);
        rig_close(&c.r);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_may_end_anywhere),
        cmocka_unit_test(growth_may_end_anywhere),
        cmocka_unit_test_setup_teardown(ops_and_copies_may_fail, bench_open, bench_close),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
