/*
 * worker_gpu_near_test.c: decode steps on a device whose far rows a cachesvc in a process of its
 * own attends over, on its GPU: as by rows within the stated bound, with the engine's memory the
 * host's and the GPU's, and beside rows that are mapped.
 *
 * Links with CUDA (SKIPPED where there is no GPU), or with a fake of it; the daemon is of the same
 * kind (CACHESVC).
 */
#include "bench.h"
#include "oracle.h"

#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/clock.h"
#include "daemon.h"
#include "kvk/cuda.h"

#define N_TOKENS 900u
#define PREFILL  864u
#define DIMS     30u
#define PICKS    400u /* of 2 KiB: worth the server's GPU */

typedef struct served {
    char folder[256], shm[300];
    support_daemon daemon;
    kvc_client *client;
    kvk_cuda *cuda;
} served;

/* Of dram the client may have pin_bytes mapped; the rest is far. */
static void open_served(served *s, const char *pin_bytes)
{
    memset(s, 0, sizeof(*s));
    support_make_folder(s->folder, sizeof(s->folder));
    char *whole = realpath(s->folder, NULL);
    assert_non_null(whole);
    (void)snprintf(s->shm, sizeof(s->shm), "shm://%s/shm.sock", whole);
    free(whole);
    const char *args[] = {"--listen",
                          s->shm,
                          "--dram-bytes",
                          "256MiB",
                          "--max-map-pin-bytes",
                          pin_bytes,
                          "--attend-gpu-bytes",
                          "256MiB",
                          NULL};
    if (access(CACHESVC, X_OK) == 0) /* else the programs were brought here from elsewhere */
        assert_int_equal(setenv("KVASIR_CACHESVC", CACHESVC, 1), 0);
    assert_true(support_daemon_start(&s->daemon, s->folder, args));
    const kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .uris = s->shm, .connect_timeout_ns = SUPPORT_PATIENCE_NS};
    assert_ok(kvc_client_open(&opts, &s->client));
    assert_ok(kvk_cuda_open(0, &s->cuda));
}

static void close_served(served *s)
{
    kvk_cuda_close(s->cuda);
    kvc_client_close(s->client);
    (void)support_daemon_stop(&s->daemon, SIGTERM);
    support_remove_folder(s->folder);
}

static uint64_t server_count(const served *s, const char *name)
{
    kvc_server_stats *stats = NULL;
    uint64_t value = 0;
    assert_ok(kvc_stats(s->client, 0, &stats));
    for (uint32_t i = 0; i < stats->n_counters; i++)
        if (strcmp(stats->counters[i].name, name) == 0)
            value = stats->counters[i].value;
    kvc_stats_free(stats);
    return value;
}

static void near_rig(rig *r, const served *s, const char *way, const char *revision)
{
    rig_init(r, "esa", N_TOKENS);
    r->opts.client = s->client;
    r->opts.backend = "cuda";
    r->opts.dtype = KVK_BF16;
    r->opts.head_dim = 64;
    r->opts.n_q_heads = 16;
    r->opts.n_kv_heads = 8;
    r->opts.k = PICKS;
    r->opts.residency_slots = PICKS;
    r->opts.max_tokens = N_TOKENS;
    r->opts.index = KVW_INDEX_COMPRESSED;
    r->opts.way = way;
    r->opts.revision = revision;
    rig_project(r, DIMS);
}

/* ---- the engine's memory is the GPU's ---- */

typedef struct engine {
    kvk_cuda *cuda;
    uint8_t *memory; /* device: q, which the result replaces, k, v, lse */
    size_t q_bytes, kv_bytes;
} engine;

static void to_device(engine *e, size_t at, void *from, size_t len_bytes)
{
    assert_ok(kvk_cuda_copy(e->cuda, e->memory + at, from, len_bytes, NULL));
    assert_ok(kvk_cuda_stream_sync(e->cuda, NULL));
    free(from);
}

static void one_layer(engine *e, rig *r, kvw_seq *seq, uint32_t layer, uint32_t first, uint32_t n,
                      rig_record *record)
{
    size_t q_bytes = n * rig_q_width(r) * 2u, kv_bytes = n * rig_kv_width(r) * 2u;
    size_t k_at = e->q_bytes, v_at = k_at + e->kv_bytes, lse_at = v_at + e->kv_bytes;
    float *lse = (float *)(void *)(e->memory + lse_at), lse_here[64 * 16];
    void *out = malloc(q_bytes);
    assert_non_null(out);
    assert_true(n * r->opts.n_q_heads <= sizeof(lse_here) / sizeof(lse_here[0]));
    to_device(e, 0, rig_bytes(r, r->q, rig_q_width(r), layer, first, n), q_bytes);
    to_device(e, k_at, rig_bytes(r, r->k, rig_kv_width(r), layer, first, n), kv_bytes);
    to_device(e, v_at, rig_bytes(r, r->v, rig_kv_width(r), layer, first, n), kv_bytes);
    kvc_status st =
        kvw_forward(seq, layer, e->memory, e->memory + k_at, e->memory + v_at, n, e->memory, lse);
    if (st != KVC_OK)
        print_error("at %u: %s\n", first, kvw_last_error());
    assert_ok(st);
    assert_ok(kvk_cuda_copy(e->cuda, out, e->memory, q_bytes, NULL));
    assert_ok(kvk_cuda_copy(e->cuda, lse_here, lse, n * r->opts.n_q_heads * sizeof(float), NULL));
    assert_ok(kvk_cuda_stream_sync(e->cuda, NULL));
    const rig_step step = {
        .seq = seq, .layer = layer, .first = first, .n = n, .out = out, .lse = lse_here};
    rig_record_step(record, r, &step);
    free(out);
}

static void passes(engine *e, rig *r, kvw_seq *seq, uint32_t first, uint32_t end, uint32_t most,
                   rig_record *record)
{
    while (first < end) {
        uint32_t n = end - first < most ? end - first : most;
        assert_ok(kvw_tokens(seq, r->tokens + first, n));
        for (uint32_t layer = 0; layer < r->opts.n_layers; layer++)
            one_layer(e, r, seq, layer, first, n, record);
        first += n;
    }
}

static void run_in_gpu_memory(const served *s, rig *r, kvw_seq *seq, rig_record *record)
{
    uint32_t most = r->opts.chunk_tokens;
    engine e = {.cuda = s->cuda,
                .q_bytes = most * rig_q_width(r) * 2u,
                .kv_bytes = most * rig_kv_width(r) * 2u};
    void *memory = NULL;
    assert_ok(kvk_cuda_alloc(s->cuda, KVK_CUDA_DEVICE,
                             e.q_bytes + 2u * e.kv_bytes + most * r->opts.n_q_heads * sizeof(float),
                             &memory));
    e.memory = memory;
    passes(&e, r, seq, 0, PREFILL, most, record);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    passes(&e, r, seq, PREFILL, N_TOKENS, 1, record);
    kvk_cuda_free(s->cuda, KVK_CUDA_DEVICE, memory);
}

/* ---- runs ---- */

/* A whole run by one way; its outputs into record. */
static kvw_stats run_by(const served *s, const char *way, const char *revision,
                        uint32_t device_memory, rig *r, rig_record *record)
{
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    near_rig(r, s, way, revision);
    r->opts.device_memory = device_memory;
    rig_open(r);
    rig_record_init(record, r);
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    if (device_memory) {
        run_in_gpu_memory(s, r, seq, record);
    } else {
        rig_prefill(r, seq, 0, PREFILL, rig_record_step, record);
        assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
        rig_decode(r, seq, PREFILL, N_TOKENS, rig_record_step, record);
    }
    kvw_stats stats = stats_of(seq);
    assert_int_equal(stats.steps_device, stats.steps);
    kvw_seq_destroy(seq);
    return stats;
}

static void close_run(rig *r, rig_record *record)
{
    rig_record_fini(record);
    rig_close(r);
}

static void check_near(const rig *r, const rig_record *rows, const rig_record *near)
{
    double diff = rig_record_diff(r, rows, near, PREFILL, N_TOKENS);
    if (!(diff > 0 && diff <= near_bound(r)))
        fail_msg("%g apart, bound %g", diff, near_bound(r));
}

static void near_equals_rows(void **state)
{
    (void)state;
    served s;
    rig r[3];
    rig_record rows, near, in_gpu;
    uint32_t n_steps = 2 * (N_TOKENS - PREFILL);
    open_served(&s, "1");
    kvw_stats by_rows = run_by(&s, "shm", "1", 0, &r[0], &rows);
    assert_int_equal(by_rows.rows_near, 0);
    assert_int_equal(server_count(&s, "rows_attended"), 0);
    kvw_stats by_near = run_by(&s, "near", "2", 0, &r[1], &near);
    assert_int_equal(by_near.way_fallbacks, 0);
    /* nothing of it is resident for the next step */
    assert_true(by_near.rows_near > n_steps * PICKS / 2);
    assert_int_equal(server_count(&s, "rows_attended"), by_near.rows_near);
    assert_true(server_count(&s, "rows_attended_gpu") > by_near.rows_near / 2);
    check_near(&r[0], &rows, &near);
    uint64_t before = server_count(&s, "rows_attended_gpu");
    kvw_stats by_gpu = run_by(&s, "near", "3", 1, &r[2], &in_gpu);
    assert_int_equal(by_gpu.way_fallbacks, 0);
    assert_true(by_gpu.rows_near > n_steps * PICKS / 2);
    assert_true(server_count(&s, "rows_attended_gpu") - before > by_gpu.rows_near / 2);
    check_near(&r[0], &rows, &in_gpu);
    close_run(&r[0], &rows);
    close_run(&r[1], &near);
    close_run(&r[2], &in_gpu);
    close_served(&s);
}

/* Some rows are read in place, and the server attends over the others. */
static void mapped_rows_and_far_ones(void **state)
{
    (void)state;
    served s;
    rig r[2];
    rig_record rows, near;
    open_served(&s, "1MiB");
    (void)run_by(&s, "shm", "1", 0, &r[0], &rows);
    kvw_stats by_near = run_by(&s, "near", "2", 0, &r[1], &near);
    assert_true(by_near.rows_near > 0 && by_near.rows_near < by_near.misses);
    assert_true(by_near.rows_dram > 0); /* those that were mapped */
    check_near(&r[0], &rows, &near);
    close_run(&r[0], &rows);
    close_run(&r[1], &near);
    close_served(&s);
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
        cmocka_unit_test(near_equals_rows),
        cmocka_unit_test(mapped_rows_and_far_ones),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
