/*
 * gpu_test.c: the gpu tier in a server, over a fake of kvk/cuda.h: copies come by use and by
 * Prefetch, give way, serve rows and are mapped, and nothing is lost with the device.
 *
 * What the gpu thread does is waited for, 60 s at most.
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/metrics.h"
#include "fake_cuda.h"
#include "gpu.h"

#define ROW_BYTES   512u
#define VALUE_BYTES (ROW_BYTES * H_TOKENS) /* 32 KiB */
#define N_GPU       128u                   /* values that the small tier holds */
#define N_DRAM      32u
#define PART_IDS    ((const uint32_t[]){0, 10})

typedef struct rig {
    h_server h;
    char dir[256];
    h_schema schema;
    h_peer *peer;
} rig;

static int setup(void **state)
{
    rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    fake_cuda_absent(false);
    fake_cuda_no_sharing(false);
    fake_cuda_copies(UINT32_MAX);
    h_server_init(&r->h);
    h_temp_dir(r->dir);
    r->h.settings.gpu_bytes = 32u << 20;
    h_schema_init(&r->schema, "gpu", 2, ROW_BYTES, false);
    *state = r;
    return 0;
}

static void start(rig *r)
{
    h_server_start(&r->h);
    r->peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_register(r->peer, &r->schema), KVC_OK);
}

static int teardown(void **state)
{
    rig *r = *state;
    h_disconnect(r->peer);
    h_server_fini(&r->h);
    h_remove_dir(r->dir);
    free(r);
    fake_cuda_copies(UINT32_MAX);
    fake_cuda_absent(false);
    return fake_cuda_held() != 0;
}

static void put(rig *r, uint64_t first, uint32_t n, kvc_promise promise)
{
    for (uint64_t b = first; b < first + n; b++)
        assert_int_equal(h_put(r->peer, &r->schema, b, PART_IDS, 2, promise), KVC_OK);
}

static uint64_t open_blocks(rig *r, uint64_t first, uint32_t n)
{
    uint64_t context;
    assert_int_equal(h_open(r->peer, &r->schema, first, n, 0, &context), KVC_OK);
    return context;
}

static kvc_status prefetch(rig *r, uint64_t context)
{
    kvc_request req = {.method = KVC_PREFETCH};
    req.u.prefetch.context = context;
    req.u.prefetch.tier = KVC_TIER_GPU;
    return h_call(r->peer, &req);
}

static void prefetch_all(rig *r, uint64_t context, uint32_t n_values)
{
    assert_int_equal(prefetch(r, context), KVC_OK);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.there + r->peer->xfer.reply.u.prefetch.moved,
                     n_values);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.left, 0);
}

static kvs_tier_usage usage(rig *r)
{
    kvs_tier_usage usage = {0};
    r->h.server->gpu.ops->usage(r->h.server->gpu.tier, &usage);
    return usage;
}

/* How many of both parts of blocks a match finds in the tier. */
static uint32_t count_tier(rig *r, uint64_t first, uint32_t n, kvc_tier tier)
{
    uint8_t tiers[256] = {0};
    uint32_t hits, found = 0;
    for (uint32_t p = 0; p < 2; p++) {
        assert_int_equal(
            h_match_tiers(r->peer, &r->schema, first, n, &PART_IDS[p], 1, tiers, &hits), KVC_OK);
        assert_int_equal(hits, n);
        for (uint32_t i = 0; i < n; i++)
            found += tiers[i] == tier;
    }
    return found;
}

static void wait_values(rig *r, uint64_t want)
{
    for (uint32_t i = 0; i < 60000 && usage(r).values != want; i++)
        usleep(1000);
    assert_int_equal(usage(r).values, want);
}

/* A row of every block of both parts, asserted equal; gives where they came from. */
static kvc_reply read_all(rig *r, uint64_t context, uint64_t first, uint32_t n)
{
    uint32_t picks[256];
    kvc_reply sum = {0};
    for (uint32_t i = 0; i < n; i++)
        picks[i] = i * H_TOKENS + (7 * i + 3) % H_TOKENS;
    for (uint32_t p = 0; p < 2; p++) {
        h_fetch_equal(r->peer, &r->schema, context, first, PART_IDS[p], picks, n);
        const kvc_reply *reply = &r->peer->xfer.reply;
        sum.u.fetch_rows.rows_gpu += reply->u.fetch_rows.rows_gpu;
        sum.u.fetch_rows.rows_dram += reply->u.fetch_rows.rows_dram;
        sum.u.fetch_rows.rows_lmdb += reply->u.fetch_rows.rows_lmdb;
    }
    return sum;
}

static void erase(rig *r, uint64_t context)
{
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.context = context;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
}

static void test_prefetch_to_the_gpu(void **state)
{
    rig *r = *state;
    start(r);
    put(r, 0, 8, KVC_PROMISE_MEMORY);
    uint64_t context = open_blocks(r, 0, 8);
    prefetch_all(r, context, 16);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.moved, 16);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.moved_bytes, 16 * VALUE_BYTES);
    assert_int_equal(usage(r).values, 16);
    assert_int_equal(count_tier(r, 0, 8, KVC_TIER_GPU), 16);
    prefetch_all(r, context, 16);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.there, 16);
    assert_int_equal(read_all(r, context, 0, 8).u.fetch_rows.rows_dram, 16); /* it is nearer */

    kvc_request req = {.method = KVC_DESCRIBE};
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->peer->xfer.reply.u.describe.n_tiers, 2);

    /* What is erased leaves the gpu too. */
    erase(r, context);
    kvs_server_tick(r->h.server);
    wait_values(r, 0);
}

static void test_copies_come_by_use(void **state)
{
    rig *r = *state;
    start(r);
    put(r, 0, 4, KVC_PROMISE_MEMORY);
    uint64_t context = open_blocks(r, 0, 4);
    (void)read_all(r, context, 0, 4);
    assert_int_equal(usage(r).values, 0); /* once is no use */
    (void)read_all(r, context, 0, 4);
    wait_values(r, 8);
    assert_int_equal(count_tier(r, 0, 4, KVC_TIER_GPU), 8);
}

/* Another size of values finds room by whole segments, and nothing of what was there is lost. */
static void test_sizes_share_the_gpu(void **state)
{
    rig *r = *state;
    h_schema other;
    uint32_t part = 0;
    uint64_t context;
    r->h.settings.max_value_bytes = 64u << 10;
    r->h.settings.gpu_bytes = N_GPU * VALUE_BYTES;
    start(r);
    put(r, 0, N_GPU / 2, KVC_PROMISE_MEMORY);
    uint64_t first = open_blocks(r, 0, N_GPU / 2);
    prefetch_all(r, first, N_GPU);
    h_schema_init(&other, "other", 1, 2 * ROW_BYTES, false);
    assert_int_equal(h_register(r->peer, &other), KVC_OK);
    for (uint32_t b = 0; b < 4; b++) /* as many as a segment has room for */
        assert_int_equal(h_put1(r->peer, &other, b, part, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_open(r->peer, &other, 0, 4, 0, &context), KVC_OK);
    prefetch_all(r, context, 4);
    uint32_t left = count_tier(r, 0, N_GPU / 2, KVC_TIER_GPU);
    assert_int_equal(left, N_GPU - 8); /* one segment's */
    assert_int_equal(count_tier(r, 0, N_GPU / 2, KVC_TIER_DRAM), N_GPU - left);
    assert_int_equal(usage(r).values, left + 4);
    (void)read_all(r, first, 0, N_GPU / 2);
}

/* Two sizes that have little take segments of the one that has most, not each other's. */
static void test_small_sizes_leave_each_other(void **state)
{
    rig *r = *state;
    h_schema others[2];
    uint32_t part = 0, hits;
    r->h.settings.max_value_bytes = 64u << 10;
    r->h.settings.gpu_bytes = N_GPU * VALUE_BYTES;
    start(r);
    put(r, 0, N_GPU / 2, KVC_PROMISE_MEMORY);
    prefetch_all(r, open_blocks(r, 0, N_GPU / 2), N_GPU);
    h_schema_init(&others[0], "longer", 1, 2 * ROW_BYTES, false);
    h_schema_init(&others[1], "shorter", 1, ROW_BYTES / 2, false);
    for (uint32_t i = 0; i < 2; i++) {
        uint64_t context;
        assert_int_equal(h_register(r->peer, &others[i]), KVC_OK);
        assert_int_equal(h_put1(r->peer, &others[i], 0, part, KVC_PROMISE_MEMORY), KVC_OK);
        assert_int_equal(h_open(r->peer, &others[i], 0, 1, 0, &context), KVC_OK);
        prefetch_all(r, context, 1);
    }
    for (uint32_t i = 0; i < 2; i++) {
        uint8_t tier = 0;
        assert_int_equal(h_match_tiers(r->peer, &others[i], 0, 1, &part, 1, &tier, &hits), KVC_OK);
        assert_int_equal(hits, 1);
        assert_int_equal(tier, KVC_TIER_GPU);
    }
    assert_int_equal(count_tier(r, 0, N_GPU / 2, KVC_TIER_GPU), N_GPU - 16); /* two segments' */
}

static void test_no_gpu(void **state)
{
    rig *r = *state;
    fake_cuda_absent(true);
    start(r);
    put(r, 0, 2, KVC_PROMISE_MEMORY);
    uint64_t context = open_blocks(r, 0, 2);
    for (int i = 0; i < 3; i++)
        assert_int_equal(read_all(r, context, 0, 2).u.fetch_rows.rows_dram, 4);
    assert_int_equal(prefetch(r, context), KVC_UNSUPPORTED);
    kvc_request req = {.method = KVC_DESCRIBE};
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->peer->xfer.reply.u.describe.n_tiers, 1);
    assert_int_equal(count_tier(r, 0, 2, KVC_TIER_DRAM), 4);
    assert_false(kvs_gpu_works(r->h.server));
}

static void test_a_gpu_that_fails(void **state)
{
    rig *r = *state;
    const char *why;
    start(r);
    put(r, 0, 8, KVC_PROMISE_MEMORY);
    uint64_t context = open_blocks(r, 0, 4), more = open_blocks(r, 4, 4);
    prefetch_all(r, context, 8);
    fake_cuda_copies(0);
    assert_int_equal(prefetch(r, more), KVC_OK);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.moved, 0);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.left, 8);
    assert_false(kvs_gpu_works(r->h.server));
    assert_true(usage(r).failed);
    assert_int_equal(count_tier(r, 0, 8, KVC_TIER_DRAM), 16);
    assert_int_equal(read_all(r, context, 0, 4).u.fetch_rows.rows_dram, 8);
    assert_int_equal(prefetch(r, context), KVC_UNSUPPORTED);
    assert_true(kvs_server_ready(r->h.server, &why));
    erase(r, context);
    kvs_server_tick(r->h.server);
    put(r, 20, 2, KVC_PROMISE_MEMORY);
    (void)read_all(r, open_blocks(r, 20, 2), 20, 2);
}

#ifdef KVASIR_LMDB

/* Tiers that a few values fill. */
static void start_with_lmdb(rig *r)
{
    r->h.settings.lmdb_path = r->dir;
    r->h.settings.lmdb_bytes = 64u << 20;
    r->h.settings.max_value_bytes = 64u << 10;
    r->h.settings.dram_bytes = N_DRAM * VALUE_BYTES;
    r->h.settings.gpu_bytes = N_GPU * VALUE_BYTES;
    start(r);
}

/* Blocks that only gpu and lmdb have: others push them out of dram. Gives their context. */
static uint64_t only_in_the_gpu(rig *r, uint32_t n)
{
    put(r, 0, n, KVC_PROMISE_DURABLE);
    uint64_t context = open_blocks(r, 0, n);
    prefetch_all(r, context, 2 * n);
    put(r, 1000, 2 * N_DRAM, KVC_PROMISE_DURABLE);
    assert_int_equal(count_tier(r, 0, n, KVC_TIER_GPU), 2 * n);
    return context;
}

static void test_rows_come_from_the_gpu(void **state)
{
    rig *r = *state;
    r->h.settings.promote_percent = 0;
    start_with_lmdb(r);
    uint64_t context = only_in_the_gpu(r, 20);
    kvc_reply sum = read_all(r, context, 0, 20);
    uint32_t n_gpu = sum.u.fetch_rows.rows_gpu; /* dram still has some */
    assert_true(n_gpu > 0);
    assert_int_equal(sum.u.fetch_rows.rows_lmdb, 0);
    assert_int_equal(n_gpu + sum.u.fetch_rows.rows_dram, 40);

    /* A copy that is damaged is not served, nor asked for again. */
    uint64_t before = kvc_metric_get(KVC_M_gpu_corrupt_values);
    fake_cuda_damage();
    for (int i = 0; i < 2; i++) {
        sum = read_all(r, context, 0, 20);
        assert_int_equal(sum.u.fetch_rows.rows_lmdb, n_gpu);
        assert_int_equal(sum.u.fetch_rows.rows_gpu, 0);
        assert_int_equal(kvc_metric_get(KVC_M_gpu_corrupt_values), before + n_gpu);
    }
}

/* A copy that is known to be damaged takes no room in dram when it gives way. */
static void test_damaged_copies_just_go(void **state)
{
    rig *r = *state;
    r->h.settings.promote_percent = 0;
    start_with_lmdb(r);
    uint64_t context = only_in_the_gpu(r, 20);
    uint32_t n = read_all(r, context, 0, 20).u.fetch_rows.rows_gpu;
    assert_true(n > 0);
    fake_cuda_damage();
    assert_int_equal(read_all(r, context, 0, 20).u.fetch_rows.rows_lmdb, n);
    assert_int_equal(usage(r).values, 40);
    uint64_t demoted = kvc_metric_get(KVC_M_gpu_demoted_values), read = usage(r).bytes_read;
    uint32_t more = (N_GPU - 40 + n) / 2; /* blocks, for whose values no others give way */
    put(r, 2000, more, KVC_PROMISE_DURABLE);
    prefetch_all(r, open_blocks(r, 2000, more), 2 * more);
    assert_int_equal(usage(r).values, N_GPU);
    assert_int_equal(usage(r).bytes_read, read);
    assert_int_equal(kvc_metric_get(KVC_M_gpu_demoted_values), demoted);
    (void)read_all(r, context, 0, 20);
}

static void test_rows_survive_the_gpu(void **state)
{
    rig *r = *state;
    r->h.settings.promote_percent = 0;
    start_with_lmdb(r);
    uint64_t context = only_in_the_gpu(r, 20);
    fake_cuda_copies(3);
    kvc_reply sum = read_all(r, context, 0, 20);
    assert_true(sum.u.fetch_rows.rows_lmdb > 0);
    assert_false(kvs_gpu_works(r->h.server));
    sum = read_all(r, context, 0, 20);
    assert_int_equal(sum.u.fetch_rows.rows_gpu, 0);
    assert_int_equal(sum.u.fetch_rows.rows_lmdb + sum.u.fetch_rows.rows_dram, 40);
    assert_int_equal(count_tier(r, 0, 20, KVC_TIER_GPU), 0);
}

/* What gives way in the gpu comes to dram, if that loses nothing, and is in lmdb in any case. */
static void test_copies_give_way(void **state)
{
    rig *r = *state;
    start_with_lmdb(r);
    uint64_t demoted = kvc_metric_get(KVC_M_gpu_demoted_values);
    uint64_t first = only_in_the_gpu(r, N_GPU / 2);
    assert_int_equal(usage(r).values, N_GPU);
    put(r, 2000, 8, KVC_PROMISE_DURABLE);
    uint64_t second = open_blocks(r, 2000, 8);
    prefetch_all(r, second, 16);
    assert_int_equal(count_tier(r, 2000, 8, KVC_TIER_GPU), 16);
    assert_int_equal(usage(r).values, N_GPU);
    assert_int_equal(count_tier(r, 0, N_GPU / 2, KVC_TIER_GPU), N_GPU - 16);
    assert_true(kvc_metric_get(KVC_M_gpu_demoted_values) > demoted);
    (void)read_all(r, first, 0, N_GPU / 2);
}

#endif

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_prefetch_to_the_gpu),
        TEST(test_copies_come_by_use),
        TEST(test_sizes_share_the_gpu),
        TEST(test_no_gpu),
        TEST(test_small_sizes_leave_each_other),
        TEST(test_a_gpu_that_fails),
#ifdef KVASIR_LMDB
        TEST(test_rows_come_from_the_gpu),
        TEST(test_rows_survive_the_gpu),
        TEST(test_copies_give_way),
        TEST(test_damaged_copies_just_go),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
