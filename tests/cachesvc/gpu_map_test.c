/*
 * gpu_map_test.c: a client of this host reads values where they lie in the server's GPU: their
 * places come with a map, opened through CUDA IPC; they stay while they are mapped; a client that
 * is killed leaves nothing behind, and the server's memory outlives it.
 *
 * Built twice: over a fake of kvk/cuda.h, whose memory other processes can open, and, where the
 * build has CUDA, over the device (skipped without one), where it also prints how fast rows are
 * gathered from either tier. The program starts itself as the other process.
 */
#include "harness.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/metrics.h"
#include "gpu.h"
#include "kvc/client.h"
#include "kvk/cuda.h"

#ifdef KVS_TEST_DEVICE
#define ROW_BYTES 4096u
#define N_BLOCKS  256u
#define GPU_BYTES (1ull << 30)
#else
#include "fake_cuda.h"
#define ROW_BYTES 512u
#define N_BLOCKS  16u
#define GPU_BYTES (32ull << 20)
#endif

#define VALUE_BYTES (ROW_BYTES * H_TOKENS)
#define PART        0u
#define SECOND      1000000000ull
#define WAIT_MS     60000

static const char *program;

typedef struct rig {
    h_server h;
    char dir[256];
    h_schema schema;
    h_peer *peer;
    uint64_t context; /* the peer's */
} rig;

/* A client that opens the GPU's memory, in whatever process. */
typedef struct reader {
    kvk_cuda *cuda;
    kvk_stream *stream;
    void *pinned; /* a value */
    kvc_client *client;
    kvc_context *context;
    atomic_int n_open;
} reader;

/* ---- a reader -------------------------------------------------------------------------------- */

static kvc_status gpu_open(void *arg, const kvc_gpu_handle *handle, size_t len_bytes, void **base_p)
{
    reader *rd = arg;
    kvk_cuda_shared shared;
    (void)len_bytes;
    memcpy(shared.bytes, handle->share, sizeof(shared.bytes));
    kvc_status status = kvk_cuda_share_open(rd->cuda, &shared, base_p);
    atomic_fetch_add(&rd->n_open, status == KVC_OK);
    return status;
}

static void gpu_close(void *arg, void *base)
{
    reader *rd = arg;
    kvk_cuda_share_close(rd->cuda, base);
    atomic_fetch_sub(&rd->n_open, 1);
}

static void reader_open(reader *rd, const char *uri, const kvc_digest *schema)
{
    kvc_digest digests[N_BLOCKS];
    kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .connect_timeout_ns = 60 * SECOND, .uris = uri};
    kvc_map_opts map = {
        .size_bytes = sizeof(map), .gpu_open = gpu_open, .gpu_close = gpu_close, .arg = rd};
    memset(rd, 0, sizeof(*rd));
    assert_int_equal(kvk_cuda_open(0, &rd->cuda), KVC_OK);
    assert_int_equal(kvk_cuda_stream_create(rd->cuda, &rd->stream), KVC_OK);
    assert_int_equal(kvk_cuda_alloc(rd->cuda, KVK_CUDA_PINNED, VALUE_BYTES, &rd->pinned), KVC_OK);
    assert_int_equal(kvc_client_open(&opts, &rd->client), KVC_OK);
    assert_int_equal(kvc_client_map_contexts(rd->client, &map), KVC_OK);
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        digests[b] = h_digest(b);
    assert_int_equal(kvc_context_open(rd->client, schema, digests, N_BLOCKS, 0, 0, &rd->context),
                     KVC_OK);
}

static kvc_map_info reader_map(reader *rd)
{
    kvc_map_info info;
    assert_int_equal(kvc_context_map(rd->context, &(uint32_t){PART}, 1, 0, &info), KVC_OK);
    return info;
}

/* Every row of a value as the device or the host sees it; true: it is in the GPU. */
static bool reader_check(reader *rd, uint32_t block)
{
    kvc_mapped_value value;
    assert_int_equal(kvc_context_locate(rd->context, PART, block, &value), KVC_OK);
    assert_int_equal(value.row_bytes, ROW_BYTES);
    assert_true((value.rows != NULL) != (value.device_rows != NULL));
    const uint8_t *rows = value.rows;
    if (rows == NULL) {
        assert_int_equal(
            kvk_cuda_copy(rd->cuda, rd->pinned, value.device_rows, VALUE_BYTES, rd->stream),
            KVC_OK);
        assert_int_equal(kvk_cuda_stream_sync(rd->cuda, rd->stream), KVC_OK);
        rows = rd->pinned;
    }
    for (uint32_t row = 0; row < H_TOKENS; row++)
        assert_true(h_row_is(block, PART, row, ROW_BYTES, rows + (size_t)row * ROW_BYTES));
    assert_true(kvc_context_is_mapped(rd->context, value.stamp));
    return value.device_rows != NULL;
}

static uint32_t reader_check_all(reader *rd)
{
    uint32_t n = 0;
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        n += reader_check(rd, b);
    return n;
}

/* ---- a server -------------------------------------------------------------------------------- */

static int setup(void **state)
{
    rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    h_server_init(&r->h);
    h_temp_dir(r->dir);
    snprintf(r->h.listen, sizeof(r->h.listen), "shm://%s/socket", r->dir);
    r->h.settings.gpu_bytes = GPU_BYTES;
    r->h.settings.dram_bytes = 4ull * N_BLOCKS * VALUE_BYTES + (128u << 20);
    h_schema_init(&r->schema, "gpu map", 1, ROW_BYTES, false);
    h_server_start(&r->h);
    r->peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_register(r->peer, &r->schema), KVC_OK);
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        assert_int_equal(h_put1(r->peer, &r->schema, b, PART, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_open(r->peer, &r->schema, 0, N_BLOCKS, 0, &r->context), KVC_OK);
    *state = r;
    return 0;
}

static int teardown(void **state)
{
    rig *r = *state;
    h_disconnect(r->peer);
    h_server_fini(&r->h);
    h_remove_dir(r->dir);
    free(r);
    return 0;
}

static void prefetch(rig *r)
{
    kvc_request req = {.method = KVC_PREFETCH};
    req.u.prefetch.context = r->context;
    req.u.prefetch.tier = KVC_TIER_GPU;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.moved, N_BLOCKS);
}

static void wait_gauge(kvc_metric metric, uint64_t want)
{
    for (int i = 0; i < WAIT_MS && kvc_metric_get(metric) != want; i++)
        usleep(1000);
    assert_int_equal(kvc_metric_get(metric), want);
}

static uint64_t gpu_values(rig *r)
{
    kvs_tier_usage usage;
    r->h.server->gpu.ops->usage(r->h.server->gpu.tier, &usage);
    assert_false(usage.failed);
    return usage.values;
}

/* ---- the other process ----------------------------------------------------------------------- */

#ifdef KVS_TEST_DEVICE
/* The median time of a gather of 2,048 rows, in us. */
static double time_gather(reader *rd, const void *const *blocks, uint32_t n_blocks)
{
    enum { K = 2048, RUNS = 21 };
    static uint32_t fetch[K];
    static int32_t list[K];
    float ms[RUNS];
    uint64_t seed = 1;
    uint8_t *memory;
    kvk_cuda_event *from, *to;
    size_t slots_bytes = (size_t)K * ROW_BYTES, lists = slots_bytes + n_blocks * sizeof(void *);
    assert_int_equal(kvk_cuda_alloc(rd->cuda, KVK_CUDA_DEVICE, lists + 65536, (void **)&memory),
                     KVC_OK);
    assert_int_equal(kvk_cuda_event_create(rd->cuda, &from), KVC_OK);
    assert_int_equal(kvk_cuda_event_create(rd->cuda, &to), KVC_OK);
    struct {
        kvk_cuda_residency res;
        kvk_cuda_source source;
        uint32_t n_list;
    } heads = {.res = {.slots = memory},
               .source = {(const void *const *)(memory + slots_bytes), n_blocks, H_TOKENS},
               .n_list = K};
    uint8_t *heads_at = memory + lists, *list_at = heads_at + 4096, *fetch_at = list_at + 16384;
    kvk_cuda_gather_args args = {
        .n_seqs = 1,
        .stride = K,
        .list = (const int32_t *)list_at,
        .fetch = (const uint32_t *)fetch_at,
        .n_list = (const uint32_t *)(heads_at + ((uint8_t *)&heads.n_list - (uint8_t *)&heads)),
        .res = (const kvk_cuda_residency *)heads_at,
        .source =
            (const kvk_cuda_source *)(heads_at + ((uint8_t *)&heads.source - (uint8_t *)&heads)),
        .row_bytes = ROW_BYTES};
    for (uint32_t i = 0; i < K; i++) {
        list[i] = (int32_t)i;
        fetch[i] = (uint32_t)(h_random(&seed) % ((uint64_t)n_blocks * H_TOKENS));
    }
    assert_int_equal(kvk_cuda_copy(rd->cuda, memory + slots_bytes, blocks,
                                   n_blocks * sizeof(void *), rd->stream),
                     KVC_OK);
    assert_int_equal(kvk_cuda_copy(rd->cuda, heads_at, &heads, sizeof(heads), rd->stream), KVC_OK);
    assert_int_equal(kvk_cuda_copy(rd->cuda, list_at, list, sizeof(list), rd->stream), KVC_OK);
    assert_int_equal(kvk_cuda_copy(rd->cuda, fetch_at, fetch, sizeof(fetch), rd->stream), KVC_OK);
    for (uint32_t i = 0; i < RUNS; i++) {
        assert_int_equal(kvk_cuda_event_record(rd->cuda, from, rd->stream), KVC_OK);
        assert_int_equal(kvk_cuda_gather(rd->cuda, &args, rd->stream), KVC_OK);
        assert_int_equal(kvk_cuda_event_record(rd->cuda, to, rd->stream), KVC_OK);
        assert_int_equal(kvk_cuda_stream_sync(rd->cuda, rd->stream), KVC_OK);
        assert_int_equal(kvk_cuda_event_elapsed(rd->cuda, from, to, &ms[i]), KVC_OK);
    }
    for (uint32_t i = 0; i < K; i += 37) { /* what came is what was asked for */
        assert_int_equal(kvk_cuda_copy(rd->cuda, rd->pinned, memory + (size_t)i * ROW_BYTES,
                                       ROW_BYTES, rd->stream),
                         KVC_OK);
        assert_int_equal(kvk_cuda_stream_sync(rd->cuda, rd->stream), KVC_OK);
        assert_true(
            h_row_is(fetch[i] / H_TOKENS, PART, fetch[i] % H_TOKENS, ROW_BYTES, rd->pinned));
    }
    for (uint32_t i = 0; i < RUNS; i++)
        for (uint32_t k = i; k > 0 && ms[k - 1] > ms[k]; k--) {
            float t = ms[k];
            ms[k] = ms[k - 1];
            ms[k - 1] = t;
        }
    kvk_cuda_event_destroy(rd->cuda, from);
    kvk_cuda_event_destroy(rd->cuda, to);
    kvk_cuda_free(rd->cuda, KVK_CUDA_DEVICE, memory);
    return (double)ms[RUNS / 2] * 1000;
}

static void locate_all(reader *rd, const void **blocks, bool gpu)
{
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        kvc_mapped_value value;
        assert_int_equal(kvc_context_locate(rd->context, PART, b, &value), KVC_OK);
        blocks[b] = gpu ? value.device_rows : value.rows;
        assert_non_null(blocks[b]);
    }
}

typedef struct registered {
    kvk_cuda *cuda;
    struct {
        const uint8_t *base;
        uint8_t *device;
        size_t len_bytes;
    } list[64];
    uint32_t n;
} registered;

static void on_segment(void *arg, const void *base, size_t len_bytes, bool mapped)
{
    registered *all = arg;
    void *device;
    if (!mapped)
        return;
    assert_true(all->n < 64);
    assert_int_equal(kvk_cuda_register(all->cuda, (void *)(uintptr_t)base, len_bytes, 1, &device),
                     KVC_OK);
    all->list[all->n].base = base;
    all->list[all->n].device = device;
    all->list[all->n++].len_bytes = len_bytes;
}

/* The same rows from the dram tier, through a client that wants nothing of the GPU. */
static double time_dram(reader *rd, const char *uri, const kvc_digest *schema)
{
    static const void *blocks[N_BLOCKS];
    registered all = {.cuda = rd->cuda};
    reader other = *rd;
    kvc_digest digests[N_BLOCKS];
    kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .connect_timeout_ns = 60 * SECOND, .uris = uri};
    kvc_map_opts map = {
        .size_bytes = sizeof(map), .on_segment = on_segment, .arg = &all, .populate = true};
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        digests[b] = h_digest(b);
    assert_int_equal(kvc_client_open(&opts, &other.client), KVC_OK);
    assert_int_equal(kvc_client_map_contexts(other.client, &map), KVC_OK);
    assert_int_equal(
        kvc_context_open(other.client, schema, digests, N_BLOCKS, 0, 0, &other.context), KVC_OK);
    (void)reader_map(&other);
    locate_all(&other, blocks, false);
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        for (uint32_t i = 0; i < all.n; i++) {
            const uint8_t *at = blocks[b];
            if (at >= all.list[i].base && at < all.list[i].base + all.list[i].len_bytes) {
                blocks[b] = all.list[i].device + (at - all.list[i].base);
                break;
            }
        }
    double us = time_gather(rd, blocks, N_BLOCKS);
    for (uint32_t i = 0; i < all.n; i++)
        kvk_cuda_unregister(rd->cuda, (void *)(uintptr_t)all.list[i].base);
    kvc_context_close(other.context);
    kvc_client_close(other.client);
    return us;
}

static void measure(reader *rd, const char *uri, const kvc_digest *schema)
{
    static const void *blocks[N_BLOCKS];
    double bytes = 2048.0 * ROW_BYTES;
    locate_all(rd, blocks, true);
    double gpu_us = time_gather(rd, blocks, N_BLOCKS);
    double dram_us = time_dram(rd, uri, schema);
    fprintf(stderr,
            "2,048 random rows of 4 KiB, gathered by a kernel in the worker: gpu tier %.1f us "
            "(%.1f GB/s), dram tier %.1f us (%.1f GB/s)\n",
            gpu_us, bytes / gpu_us / 1000, dram_us, bytes / dram_us / 1000);
}
#endif

/* Maps, reads everything, says so, and waits to be killed. */
static int worker_main(const char *uri)
{
    static reader rd;
    h_schema schema;
    h_schema_init(&schema, "gpu map", 1, ROW_BYTES, false);
    reader_open(&rd, uri, &schema.digest);
    kvc_map_info info = reader_map(&rd);
    assert_int_equal(info.values, N_BLOCKS);
    assert_int_equal(reader_check_all(&rd), N_BLOCKS);
#ifdef KVS_TEST_DEVICE
    measure(&rd, uri, &schema.digest);
#endif
    assert_int_equal(write(STDOUT_FILENO, "r", 1), 1);
    for (;;)
        (void)reader_check_all(&rd);
    return 0;
}

static void test_a_worker_is_killed(void **state)
{
    rig *r = *state;
    int status;
    prefetch(r);
    for (int round = 0; round < 2; round++) {
        pid_t pid = h_start_again(program, "worker", r->h.listen);
        assert_true(kvc_metric_get(KVC_M_map_pins) >= N_BLOCKS);
        assert_true(kvc_metric_get(KVC_M_mapped_segments) > 0);
        assert_int_equal(kill(pid, SIGKILL), 0);
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        wait_gauge(KVC_M_map_pins, 0);
        wait_gauge(KVC_M_mapped_segments, 0);
        wait_gauge(KVC_M_mapped_bytes, 0);
        assert_true(kvs_gpu_works(r->h.server));
        assert_int_equal(gpu_values(r), N_BLOCKS);
    }
    /* The tier goes on: what it had is there and can be written over. */
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.context = r->context;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    kvs_server_tick(r->h.server);
    assert_int_equal(gpu_values(r), 0);
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        assert_int_equal(h_put1(r->peer, &r->schema, b, PART, KVC_PROMISE_MEMORY), KVC_OK);
    prefetch(r);
    pid_t pid = h_start_again(program, "worker", r->h.listen);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    wait_gauge(KVC_M_map_pins, 0);
}

#ifndef KVS_TEST_DEVICE /* in one process, which CUDA's IPC does not serve */

static void reader_close(reader *rd)
{
    kvc_context_close(rd->context);
    kvc_client_close(rd->client);
    assert_int_equal(atomic_load(&rd->n_open), 0);
    kvk_cuda_free(rd->cuda, KVK_CUDA_PINNED, rd->pinned);
    kvk_cuda_stream_destroy(rd->cuda, rd->stream);
    kvk_cuda_close(rd->cuda);
}

static void test_places_in_the_gpu(void **state)
{
    rig *r = *state;
    reader rd;
    reader_open(&rd, r->h.listen, &r->schema.digest);
    kvc_map_info info = reader_map(&rd);
    assert_int_equal(info.values, N_BLOCKS);
    assert_int_equal(reader_check_all(&rd), 0); /* nothing is there yet */
    kvc_context_unmap(rd.context);
    prefetch(r);
    info = reader_map(&rd);
    assert_int_equal(info.values, N_BLOCKS);
    assert_int_equal(reader_check_all(&rd), N_BLOCKS);

    /* The host reads the same rows, which it cannot find in what is mapped. */
    uint8_t rows[4 * ROW_BYTES];
    uint32_t picks[4] = {5, 70, 700, N_BLOCKS * H_TOKENS - 1};
    int8_t status[4];
    kvc_region *region;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_fetch_info got;
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = rows,
                            .len_bytes = sizeof(rows),
                            .kind = KVC_MEMORY_HOST};
    kvc_pick_group group = {
        .context = rd.context, .part = PART, .picks = picks, .n_picks = 4, .row_bytes = ROW_BYTES};
    assert_int_equal(kvc_region_register(rd.client, &desc, &region), KVC_OK);
    assert_int_equal(kvc_fetch(rd.client, &group, 1, region, status, &got, 0, &op), KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
    assert_true(got.requests > 0);
    for (uint32_t i = 0; i < 4; i++)
        assert_true(h_row_is(picks[i] / H_TOKENS, PART, picks[i] % H_TOKENS, ROW_BYTES,
                             rows + i * ROW_BYTES));
    assert_int_equal(kvc_region_deregister(rd.client, region), KVC_OK);

    /* Erase takes the map back. */
    kvc_request req = {.method = KVC_ERASE};
    kvc_mapped_value value;
    assert_int_equal(kvc_context_locate(rd.context, PART, 0, &value), KVC_OK);
    req.u.erase.context = r->context;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_false(kvc_context_is_mapped(rd.context, value.stamp));
    reader_close(&rd);
    wait_gauge(KVC_M_map_pins, 0);
    wait_gauge(KVC_M_mapped_segments, 0);
}

/* A client whose device cannot open the memory gets places in dram, at the cost of one more ask. */
static void test_no_sharing(void **state)
{
    rig *r = *state;
    reader rd;
    prefetch(r);
    fake_cuda_no_sharing(true);
    reader_open(&rd, r->h.listen, &r->schema.digest);
    kvc_map_info info = reader_map(&rd);
    fake_cuda_no_sharing(false);
    assert_int_equal(info.values, N_BLOCKS);
    assert_int_equal(reader_check_all(&rd), 0);
    reader_close(&rd);
    wait_gauge(KVC_M_map_pins, 0);
    wait_gauge(KVC_M_mapped_segments, 0);
}

/* What is mapped stays where it is, however much comes to the gpu. */
static void test_mapped_copies_stay(void **state)
{
    rig *r = *state;
    enum { MORE = 800 }; /* three times as many turn the whole queue over */
    reader rd;
    prefetch(r);
    reader_open(&rd, r->h.listen, &r->schema.digest);
    (void)reader_map(&rd);
    for (uint64_t first = 1000; first < 1000 + 3 * MORE; first += MORE) {
        kvc_request req = {.method = KVC_PREFETCH};
        for (uint64_t b = first; b < first + MORE; b++)
            assert_int_equal(h_put1(r->peer, &r->schema, b, PART, KVC_PROMISE_MEMORY), KVC_OK);
        assert_int_equal(h_open(r->peer, &r->schema, first, MORE, 0, &req.u.prefetch.context),
                         KVC_OK);
        req.u.prefetch.tier = KVC_TIER_GPU;
        assert_int_equal(h_call(r->peer, &req), KVC_OK);
        assert_int_equal(r->peer->xfer.reply.u.prefetch.moved, MORE);
    }
    assert_int_equal(gpu_values(r), GPU_BYTES / VALUE_BYTES);
    assert_int_equal(reader_check_all(&rd), N_BLOCKS);
    reader_close(&rd);
}

#endif

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(int argc, char **argv)
{
    program = argv[0];
    if (argc == 3 && strcmp(argv[1], "worker") == 0)
        return worker_main(argv[2]);
#ifdef KVS_TEST_DEVICE
    kvk_cuda *cuda;
    if (kvk_cuda_open(0, &cuda) != KVC_OK) {
        printf("skipped: no CUDA device that this build can use\n");
        return 77;
    }
    kvk_cuda_close(cuda);
#endif
    const struct CMUnitTest tests[] = {
#ifndef KVS_TEST_DEVICE
        TEST(test_places_in_the_gpu),
        TEST(test_no_sharing),
        TEST(test_mapped_copies_stay),
#endif
        TEST(test_a_worker_is_killed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
