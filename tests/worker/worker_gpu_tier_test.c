/*
 * worker_gpu_tier_test.c: decode steps whose missing rows lie in the server's GPU: a cachesvc with
 * a gpu tier in a process of its own, whose memory the worker opens and its kernels read in place.
 *
 * Links with CUDA (SKIPPED where there is no GPU), or with a fake of it whose memory other
 * processes can open; the daemon is of the same kind (CACHESVC). What is opened is counted by a
 * wrap.
 */
#include "bench.h"
#include "oracle.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/clock.h"
#include "daemon.h"
#include "kvk/cuda.h"

#define N_TOKENS 900u
#define PREFILL  832u
#define DIMS     30u
#define TURNS    20

typedef struct served {
    char folder[256], shm[300];
    support_daemon daemon;
    kvc_client *client;
} served;

static atomic_uint n_opened;

kvc_status __real_kvk_cuda_share_open(kvk_cuda *cuda, const kvk_cuda_shared *shared,
                                      void **memory_p);
kvc_status __wrap_kvk_cuda_share_open(kvk_cuda *cuda, const kvk_cuda_shared *shared,
                                      void **memory_p);
kvc_status __wrap_kvk_cuda_share_open(kvk_cuda *cuda, const kvk_cuda_shared *shared,
                                      void **memory_p)
{
    kvc_status status = __real_kvk_cuda_share_open(cuda, shared, memory_p);
    atomic_fetch_add(&n_opened, status == KVC_OK);
    return status;
}

static int open_served(void **state)
{
    served *s = calloc(1, sizeof(*s));
    assert_non_null(s);
    support_make_folder(s->folder, sizeof(s->folder));
    char *whole = realpath(s->folder, NULL);
    assert_non_null(whole);
    (void)snprintf(s->shm, sizeof(s->shm), "shm://%s/shm.sock", whole);
    free(whole);
    const char *args[] = {"--listen", s->shm, "--dram-bytes", "256MiB", "--gpu-bytes",
                          "64MiB",    NULL};
    if (access(CACHESVC, X_OK) == 0) /* else the programs were brought here from elsewhere */
        assert_int_equal(setenv("KVASIR_CACHESVC", CACHESVC, 1), 0);
    assert_true(support_daemon_start(&s->daemon, s->folder, args));
    const kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .uris = s->shm, .connect_timeout_ns = SUPPORT_PATIENCE_NS};
    assert_ok(kvc_client_open(&opts, &s->client));
    *state = s;
    return 0;
}

static int close_served(void **state)
{
    served *s = *state;
    kvc_client_close(s->client);
    (void)support_daemon_stop(&s->daemon, SIGTERM);
    support_remove_folder(s->folder);
    free(s);
    return 0;
}

/* Opens the sequence again and decodes what the prefix lacks. */
static kvw_stats decode_again(rig *r, uint32_t reused_want, rig_record *record)
{
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    kvw_stats stats = {.size_bytes = sizeof(stats)};
    assert_ok(kvw_seq_create(r->worker, r->tokens, N_TOKENS, &seq, &reused));
    assert_int_equal(reused, reused_want);
    rig_prefill(r, seq, reused, PREFILL, NULL, NULL);
    rig_decode(r, seq, PREFILL, N_TOKENS, rig_record_step, record);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    assert_ok(kvw_seq_stats(seq, &stats));
    kvw_seq_destroy(seq);
    return stats;
}

/* A context that comes back is copied to the server's GPU by use; the steps are the same there. */
static void rows_come_from_the_servers_gpu(void **state)
{
    served *s = *state;
    rig r;
    rig_record cold, warm;
    rig_init(&r, "esa", N_TOKENS);
    r.opts.client = s->client;
    r.opts.way = rig_rows_way(s->client);
    r.opts.backend = "cuda";
    r.opts.dtype = KVK_BF16;
    r.opts.head_dim = 64;
    r.opts.n_q_heads = 8;
    r.opts.n_kv_heads = 4;
    r.opts.index = KVW_INDEX_COMPRESSED;
    r.opts.residency_slots = 96;
    rig_project(&r, DIMS);
    rig_open(&r);
    rig_record_init(&cold, &r);
    rig_record_init(&warm, &r);
    (void)decode_again(&r, 0, &cold);
    kvw_stats stats = {0};
    for (int i = 0; i < TURNS && atomic_load(&n_opened) == 0; i++)
        stats = decode_again(&r, PREFILL, &warm);
    assert_true(atomic_load(&n_opened) > 0);
    /* Had the rows come by request, it were one for every few of them. */
    assert_true(stats.misses > 1000 && stats.requests < 40);
    rig_record_equal(&r, &cold, &warm, PREFILL, N_TOKENS);
    rig_record_fini(&cold);
    rig_record_fini(&warm);
    rig_close(&r);
}

int main(void)
{
    kvk_cuda *cuda;
    if (kvk_cuda_open(0, &cuda) != KVC_OK) {
        printf("skipped: no CUDA device that this build can use\n");
        return 77;
    }
    kvk_cuda_close(cuda);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(rows_come_from_the_servers_gpu, open_served, close_served),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
