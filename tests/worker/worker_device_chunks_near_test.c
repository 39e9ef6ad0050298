/*
 * worker_device_chunks_near_test.c: chosen chunks that a server attends over for a worker on a
 * device, beside the same chunks fetched and attended over on the device: equal within the stated
 * bound, in the engine's memory wherever that is; and fetched after all where the server is busy.
 *
 * Links with CUDA (SKIPPED where there is no GPU), or with a fake of it. The server runs in this
 * process; memory of the engine that is the device's is pinned memory, which both can read.
 */
#include <math.h>

#include "attend.h"
#include "base/clock.h"
#include "bench.h"
#include "chunk_rig.h"
#include "harness.h"
#include "kvk/cuda.h"

enum { WIDTH = 128, N_Q = 3, TURNS = 4, OUT = TURNS * N_Q * WIDTH };

typedef struct served {
    h_server h;
    kvc_client *client;
    kvk_cuda *cuda;
} served;

static int start(void **state)
{
    served *s = calloc(1, sizeof(*s));
    assert_non_null(s);
    h_server_init(&s->h);
    h_server_start(&s->h);
    s->client = store_client(kvs_server_uri(s->h.server, 0));
    assert_ok(kvk_cuda_open(0, &s->cuda));
    *state = s;
    return 0;
}

static int stop(void **state)
{
    served *s = *state;
    kvk_cuda_close(s->cuda);
    kvc_client_close(s->client);
    h_server_fini(&s->h);
    free(s);
    return 0;
}

/* Outputs [OUT] in f32 of two calls after each of some retrievals, the second's. */
static kvw_stats attend_by(served *s, kvk_dtype dtype, const char *way, uint32_t device_memory,
                           float *to)
{
    static uint32_t revision;
    static char name[16];
    chunk_rig c;
    kvw_retriever *x = NULL;
    void *p = NULL;
    size_t elem = kvk_dtype_bytes(dtype), len_bytes = N_Q * WIDTH * elem;
    chunk_rig_init(&c, "gca", dtype, s->client);
    (void)snprintf(name, sizeof(name), "%u", revision++);
    c.r.opts.revision = name;
    c.r.opts.backend = "cuda";
    c.r.opts.head_dim = 32;
    c.r.opts.way = way;
    c.r.opts.device_memory = device_memory;
    chunk_rig_ready(&c);
    kvw_seq *seq = offloaded(&c);
    assert_ok(kvk_cuda_alloc(s->cuda, KVK_CUDA_PINNED, len_bytes, &p));
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    for (uint32_t t = 0; t < TURNS; t++) {
        assert_ok(kvw_retrieve(x, c.queries[9 + t], CHUNKS - 2));
        for (uint32_t i = 0; i < 2; i++) {
            void *q = rig_bytes(&c.r, c.r.q, rig_q_width(&c.r), 0, 2 * t + i, N_Q);
            memcpy(p, q, len_bytes);
            free(q);
            assert_ok(kvw_retriever_attend(x, p, N_Q, p)); /* in place */
            /* with device_memory it is only enqueued, and the next query goes to the same place */
            assert_ok(kvk_cuda_stream_sync(s->cuda, NULL));
        }
        for (size_t j = 0; j < N_Q * WIDTH; j++)
            *to++ = (float)rig_get(dtype, p, j);
    }
    kvw_stats stats = stats_of(seq);
    kvw_retriever_close(x);
    kvk_cuda_free(s->cuda, KVK_CUDA_PINNED, p);
    kvw_seq_destroy(seq);
    rig_close(&c.r);
    return stats;
}

static double worst_of(const float *a, const float *b)
{
    double worst = 0;
    for (size_t j = 0; j < OUT; j++)
        worst = fmax(worst, fabs((double)a[j] - (double)b[j]));
    return worst;
}

static void partials_equal_fetched_chunks(void **state)
{
    static const kvk_dtype dtypes[] = {KVK_F32, KVK_BF16, KVK_F16};
    static const double rounding[] = {2e-6, 0x1p-8, 0x1p-11};
    static float rows[OUT], near[OUT];
    for (size_t i = 0; i < 6; i++) {
        kvk_dtype dtype = dtypes[i % 3];
        uint32_t device_memory = i >= 3;
        kvw_stats by_rows = attend_by(*state, dtype, "rows", device_memory, rows);
        kvw_stats by_near = attend_by(*state, dtype, "near", device_memory, near);
        double worst = worst_of(rows, near);
        if (!(worst <= 6 * rounding[i % 3] && (worst > 0 || dtype == KVK_F32)))
            fail_msg("case %zu: %g apart", i, worst);
        assert_int_equal(by_rows.rows_near, 0);
        assert_true(by_near.rows_near > 2 * S && by_near.bytes_near > 0);
        assert_int_equal(by_near.bytes_fetched + by_near.way_fallbacks, 0);
    }
}

static void a_busy_servers_chunks_are_fetched(void **state)
{
    served *s = *state;
    static float rows[OUT], near[OUT];
    kvs_attender *attender = s->h.server->attender;
    (void)attend_by(s, KVK_F32, "rows", 0, rows);
    atomic_fetch_add(&attender->n_calls, attender->max_calls);
    kvw_stats stats = attend_by(s, KVK_F32, "near", 0, near);
    atomic_fetch_sub(&attender->n_calls, attender->max_calls);
    assert_true(stats.way_fallbacks > 0 && stats.bytes_fetched > 0);
    assert_int_equal(stats.rows_near, 0);
    assert_true(worst_of(rows, near) <= 1e-5);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(partials_equal_fetched_chunks, start, stop),
        cmocka_unit_test_setup_teardown(a_busy_servers_chunks_are_fetched, start, stop),
    };
    kvk_cuda *cuda = NULL;
    if (kvk_cuda_open(0, &cuda) != KVC_OK) {
        puts("SKIPPED: no GPU");
        return 77;
    }
    kvk_cuda_close(cuda);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
