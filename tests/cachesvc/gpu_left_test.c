/*
 * gpu_left_test.c: who is handed memory of a server's GPU, and what becomes of it when a
 * connection ends under a process that has it open: it is nobody else's until the process ends.
 *
 * Over a fake of kvk/cuda.h, whose memory other processes can open. The program starts itself as
 * the other process. What the server does by itself is waited for, 60 s at most.
 */
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/metrics.h"
#include "fake_cuda.h"
#include "gpu.h"
#include "kvk/cuda.h"

#define ROW_BYTES    512u
#define VALUE_BYTES  (ROW_BYTES * H_TOKENS) /* 32 KiB */
#define GPU_BYTES    (32ull << 20)
#define N_SEGMENTS   16u
#define N_OF_SEGMENT (GPU_BYTES / N_SEGMENTS / VALUE_BYTES)
#define N_BLOCKS     16u /* alice's, in one segment */
#define BOB          1000u
#define PART         0u
#define WAIT_MS      60000

static const char *program;

typedef struct rig {
    h_server h;
    char dir[256], inproc[64], tenants[64];
    h_schema schema;
    h_peer *alice, *bob;
    uint64_t context; /* alice's */
} rig;

static int setup(void **state)
{
    rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    h_server_init(&r->h);
    h_temp_dir(r->dir);
    snprintf(r->inproc, sizeof(r->inproc), "inproc://gpu-left-%d", (int)getpid());
    snprintf(r->tenants, sizeof(r->tenants), "%u: alice, 65534: alice", (unsigned)geteuid());
    snprintf(r->h.listen, sizeof(r->h.listen), "shm://%s/socket,%s", r->dir, r->inproc);
    r->h.settings.shm_tenants = r->tenants;
    r->h.settings.gpu_bytes = GPU_BYTES;
    r->h.settings.dram_bytes = 128u << 20;
    h_schema_init(&r->schema, "gpu left", 1, ROW_BYTES, false);
    h_server_start(&r->h);
    *strchr(r->h.listen, ',') = '\0';
    r->alice = h_connect(r->h.listen, NULL);
    r->bob = h_connect(r->inproc, "bob");
    assert_int_equal(h_register(r->alice, &r->schema), KVC_OK);
    assert_int_equal(h_register(r->bob, &r->schema), KVC_OK);
    *state = r;
    return 0;
}

static int teardown(void **state)
{
    rig *r = *state;
    h_disconnect(r->alice);
    h_disconnect(r->bob);
    h_server_fini(&r->h);
    h_remove_dir(r->dir);
    free(r);
    return fake_cuda_held() != 0 || kvc_metric_get(KVC_M_mapped_segments) != 0;
}

/* Puts blocks and copies them to the GPU. Gives their context. */
static uint64_t fill(h_peer *peer, const h_schema *schema, uint64_t first, uint32_t n)
{
    kvc_request req = {.method = KVC_PREFETCH};
    for (uint64_t b = first; b < first + n; b++)
        assert_int_equal(h_put1(peer, schema, b, PART, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_open(peer, schema, first, n, 0, &req.u.prefetch.context), KVC_OK);
    req.u.prefetch.tier = KVC_TIER_GPU;
    assert_int_equal(h_call(peer, &req), KVC_OK);
    return req.u.prefetch.context;
}

static uint64_t gpu_values(rig *r)
{
    kvs_tier_usage usage;
    r->h.server->gpu.ops->usage(r->h.server->gpu.tier, &usage);
    return usage.values;
}

static void wait_gauge(kvc_metric metric, uint64_t want)
{
    for (int i = 0; i < WAIT_MS && kvc_metric_get(metric) != want; i++)
        usleep(1000);
    assert_int_equal(kvc_metric_get(metric), want);
}

/* Asks for places in the GPU; gives how many segments of it came. */
static uint32_t ask(h_peer *peer, uint64_t context)
{
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    uint32_t n = 0;
    req.u.map_context.context = context;
    req.u.map_context.parts = (const uint32_t[]){PART};
    req.u.map_context.n_parts = 1;
    req.u.map_context.gpu = true;
    assert_int_equal(h_call(peer, &req), KVC_OK);
    assert_int_equal(peer->xfer.reply.u.map_context.n_blocks, N_BLOCKS);
    for (uint32_t i = 0; i < peer->xfer.reply.u.map_context.n_segments; i++)
        n += peer->segments[i].gpu;
    for (uint32_t i = 0; i < peer->n_fds; i++)
        (void)close(peer->fds[i]);
    return n;
}

/* ---- the other process ----------------------------------------------------------------------- */

/* The values where the last answer says that they lie, in the only segment that came. */
static void check_values(h_peer *peer, const uint8_t *base)
{
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        uint32_t words[2];
        memcpy(words, peer->data + sizeof(words) * (size_t)b, sizeof(words));
        assert_int_equal(words[0], peer->segments[0].id);
        for (uint32_t row = 0; row < H_TOKENS; row++)
            assert_true(h_row_is(b, PART, row, ROW_BYTES,
                                 base + (uint64_t)words[1] * 4096 + (uint64_t)row * ROW_BYTES));
    }
}

/* Opens the memory, disconnects without a word about it, twice over, and keeps it open. */
static int holder_main(const char *uri)
{
    h_schema schema;
    kvk_cuda *cuda;
    void *base;
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    h_schema_init(&schema, "gpu left", 1, ROW_BYTES, false);
    assert_int_equal(kvk_cuda_open(0, &cuda), KVC_OK);
    for (int round = 0; round < 2; round++) {
        uint64_t context;
        kvk_cuda_shared shared;
        h_peer *peer = h_connect(uri, NULL);
        assert_int_equal(h_open(peer, &schema, 0, N_BLOCKS, 0, &context), KVC_OK);
        assert_int_equal(ask(peer, context), 1);
        memcpy(shared.bytes, peer->segments[0].handle.share, sizeof(shared.bytes));
        assert_int_equal(kvk_cuda_share_open(cuda, &shared, &base), KVC_OK);
        check_values(peer, base);
        h_disconnect(peer);
    }
    assert_int_equal(write(STDOUT_FILENO, "r", 1), 1);
    for (;;)
        (void)pause();
    return 0;
}

/* ---- the tests ------------------------------------------------------------------------------- */

static void memory_stays_until_its_process_ends(void **state)
{
    rig *r = *state;
    kvc_request req = {.method = KVC_ERASE};
    int status;
    req.u.erase.context = fill(r->alice, &r->schema, 0, N_BLOCKS);
    assert_int_equal(gpu_values(r), N_BLOCKS);
    pid_t pid = h_start_again(program, "holder", r->h.listen);
    wait_gauge(KVC_M_map_pins, 0); /* both of its connections are gone */
    wait_gauge(KVC_M_mapped_segments, 1);
    assert_int_equal(kvc_metric_get(KVC_M_map_left_segments), 1);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_bytes), GPU_BYTES / N_SEGMENTS);
    /* Nothing is in it any more, and another tenant wants all there is. */
    assert_int_equal(h_call(r->alice, &req), KVC_OK);
    kvs_server_tick(r->h.server);
    assert_int_equal(gpu_values(r), 0);
    (void)fill(r->bob, &r->schema, BOB, (N_SEGMENTS + 1) * N_OF_SEGMENT);
    assert_int_equal(gpu_values(r), (N_SEGMENTS - 1) * N_OF_SEGMENT);
    assert_true(fake_cuda_device_bytes() <= GPU_BYTES);
    assert_int_equal(kvc_metric_get(KVC_M_map_left_segments), 1);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    wait_gauge(KVC_M_map_left_segments, 0);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 0);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_bytes), 0);
    (void)fill(r->bob, &r->schema, 2 * BOB + N_SEGMENTS * N_OF_SEGMENT, 2 * N_OF_SEGMENT);
    assert_int_equal(gpu_values(r), N_SEGMENTS * N_OF_SEGMENT);
}

/* A process that goes on, and says that it has closed what it had open, is believed. */
static void memory_said_to_be_closed_is_free(void **state)
{
    rig *r = *state;
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    uint64_t context = fill(r->alice, &r->schema, 0, N_BLOCKS);
    assert_int_equal(ask(r->alice, context), 1);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 1);
    req.u.map_context.release = true;
    req.u.map_context.map = r->alice->xfer.reply.u.map_context.map;
    req.u.map_context.unmapped = (const uint32_t[]){r->alice->segments[0].id};
    req.u.map_context.n_unmapped = 1;
    assert_int_equal(h_call(r->alice, &req), KVC_OK);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 0);
    h_disconnect(r->alice);
    wait_gauge(KVC_M_map_pins, 0);
    assert_int_equal(kvc_metric_get(KVC_M_map_left_segments), 0);
    (void)fill(r->bob, &r->schema, BOB, (N_SEGMENTS - 1) * N_OF_SEGMENT);
    r->alice = h_connect(r->h.listen, NULL);
}

/* Users who may map are handed dram alone, unless they are named for the GPU as well. */
static void writers_are_named(void **state)
{
    rig *r = *state;
    if (geteuid() != 0)
        skip(); /* only root can be another user */
    (void)fill(r->alice, &r->schema, 0, N_BLOCKS);
    assert_int_equal(chmod(r->dir, 0755), 0);
    assert_int_equal(chmod(r->h.listen + strlen("shm://"), 0666), 0);
    r->h.server->settings.shm_map_uids = "65534";
    for (uint32_t named = 0; named < 2; named++) {
        uint64_t context;
        r->h.server->settings.shm_map_gpu_uids = named ? "1, 65534" : "1";
        h_peer *peer = h_connect(r->h.listen, NULL);
        assert_int_equal(seteuid(65534), 0); /* while it connects */
        kvc_status opened = h_open(peer, &r->schema, 0, N_BLOCKS, 0, &context);
        assert_int_equal(seteuid(0), 0);
        assert_int_equal(opened, KVC_OK);
        assert_int_equal(ask(peer, context), named);
        assert_int_equal(peer->xfer.reply.u.map_context.n_segments, 1); /* dram's, then the GPU's */
        h_disconnect(peer);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(int argc, char **argv)
{
    program = argv[0];
    if (argc == 3 && strcmp(argv[1], "holder") == 0)
        return holder_main(argv[2]);
    const struct CMUnitTest tests[] = {
        TEST(memory_stays_until_its_process_ends),
        TEST(memory_said_to_be_closed_is_free),
        TEST(writers_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
