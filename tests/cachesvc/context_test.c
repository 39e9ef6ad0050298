/*
 * context_test.c: contexts that are cut, forked and extended at once, and matches with tiers, over
 * one server in this process.
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/digest.h"
#include "base/fault.h"
#include "base/metrics.h"
#include "base/thread.h"
#include "request.h"
#ifdef KVS_TEST_RDMA
#include "fake_verbs.h"
#endif

#define ROW 512u

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema schema;
    char folder[256];
} fixture;

static int start(void **state, bool has_lmdb)
{
    fixture *f = calloc(1, sizeof(*f));
    assert_non_null(f);
    h_server_init(&f->h);
    if (has_lmdb) {
        h_temp_dir(f->folder);
        f->h.settings.lmdb_path = f->folder;
        f->h.settings.lmdb_bytes = 64u << 20;
        f->h.settings.dram_bytes = 256u << 10; /* eight values of 32 KiB */
    }
    f->h.settings.max_contexts = 100;
    f->h.settings.max_open_blocks = 100000;
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    h_schema_init(&f->schema, "model", 3, ROW, true);
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    *state = f;
    return 0;
}

static int setup(void **state)
{
    return start(state, false);
}

static int teardown(void **state)
{
    fixture *f = *state;
    h_disconnect(f->peer);
    h_server_fini(&f->h);
    if (f->folder[0])
        h_remove_dir(f->folder);
    free(f);
    return 0;
}

static kvc_status cut(h_peer *peer, uint64_t context, uint32_t n)
{
    kvc_request req = {.method = KVC_TRUNCATE_CONTEXT};
    req.u.truncate_context.context = context;
    req.u.truncate_context.n_blocks = n;
    return h_call(peer, &req);
}

static kvc_status fork_of(h_peer *peer, uint64_t context, uint32_t n, uint64_t *twin_p)
{
    kvc_request req = {.method = KVC_FORK_CONTEXT};
    req.u.fork_context.context = context;
    req.u.fork_context.n_blocks = n;
    kvc_status status = h_call(peer, &req);
    *twin_p = status == KVC_OK ? peer->xfer.reply.u.fork_context.context : 0;
    return status;
}

static uint32_t blocks_used(fixture *f)
{
    kvs_index *index = f->h.server->index;
    kvc_mutex_lock(&index->lock);
    uint32_t used = index->blocks.used;
    kvc_mutex_unlock(&index->lock);
    return used;
}

static void put_all(fixture *f, uint64_t first, uint32_t n)
{
    for (uint32_t b = 0; b < n; b++)
        assert_int_equal(h_put1(f->peer, &f->schema, first + b, 0, KVC_PROMISE_MEMORY), KVC_OK);
}

static void test_truncate(void **state)
{
    fixture *f = *state;
    uint64_t context;
    uint32_t last = 299 * H_TOKENS, in = 99 * H_TOKENS + 5;
    put_all(f, 0, 300);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 300, 0, &context), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, &last, 1);
    assert_int_equal(cut(f->peer, context, 301), KVC_INVALID);
    assert_non_null(strstr(f->peer->xfer.detail, "n_blocks"));
    assert_int_equal(cut(f->peer, context, 300), KVC_OK);
    assert_int_equal(cut(f->peer, context, 100), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.truncate_context.n_tokens, 100 * H_TOKENS);
    assert_int_equal(cut(f->peer, context, 100), KVC_OK); /* a retry */
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, &in, 1);
    assert_int_equal(h_fetch(f->peer, context, 0, &last, 1), KVC_OK);
    assert_int_equal(f->peer->n_missing, 1);
    /* It grows another way; what was cut off is nobody's now. */
    assert_int_equal(h_extend(f->peer, context, 300, 1000, 5), KVC_INVALID);
    put_all(f, 1000, 5);
    assert_int_equal(h_extend(f->peer, context, 100, 1000, 5), KVC_OK);
    uint32_t fresh = 103 * H_TOKENS + 1;
    h_fetch_equal(f->peer, &f->schema, context, 1000 - 100, 0, &fresh, 1);
    assert_int_equal(cut(f->peer, context, 0), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.truncate_context.n_tokens, 0);
    assert_int_equal(h_extend(f->peer, context, 0, 0, 2), KVC_OK);
    assert_int_equal(h_close(f->peer, context), KVC_OK);
    assert_int_equal(cut(f->peer, context, 0), KVC_STALE_HANDLE);
    assert_int_equal(kvc_metric_get(KVC_M_contexts_open), 0);
}

static void test_fork(void **state)
{
    fixture *f = *state;
    uint64_t context, a, b, c;
    uint32_t pick = 200 * H_TOKENS + 3;
    put_all(f, 0, 300);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 300, 0, &context), KVC_OK);
    assert_int_equal(fork_of(f->peer, context, 0, &a), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.fork_context.n_tokens, 300 * H_TOKENS);
    assert_int_equal(fork_of(f->peer, context, 201, &b), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.fork_context.n_tokens, 201 * H_TOKENS);
    assert_int_equal(fork_of(f->peer, context, 301, &c), KVC_INVALID);
    assert_int_equal(fork_of(f->peer, context ^ 1ull << 40, 1, &c), KVC_STALE_HANDLE);
    assert_true(a != b && a != context);
    assert_int_equal(h_close(f->peer, context), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, a, 0, 0, &pick, 1);
    h_fetch_equal(f->peer, &f->schema, b, 0, 0, &pick, 1);
    /* Each goes its own way. */
    put_all(f, 2000, 2);
    assert_int_equal(h_extend(f->peer, b, 201, 2000, 2), KVC_OK);
    assert_int_equal(cut(f->peer, a, 10), KVC_OK);
    pick = 202 * H_TOKENS;
    h_fetch_equal(f->peer, &f->schema, b, 2000 - 201, 0, &pick, 1);
    assert_int_equal(h_fetch(f->peer, a, 0, &pick, 1), KVC_OK);
    assert_int_equal(f->peer->n_missing, 1);
    assert_int_equal(h_close(f->peer, a), KVC_OK);
    assert_int_equal(h_close(f->peer, b), KVC_OK);
}

/* Who still has the object from before a truncate keeps its blocks, and cannot change it. */
static void test_old_object(void **state)
{
    fixture *f = *state;
    kvs_contexts *contexts = f->h.server->contexts;
    kvs_context *old, *fresh;
    kvc_digest tenant, digest = h_digest(5);
    const char *why;
    uint64_t handle;
    assert_int_equal(kvc_sha256("default", 7, &tenant), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 5, 0, &handle), KVC_OK);
    assert_int_equal(kvs_context_get(contexts, &tenant, handle, &old), KVC_OK);
    assert_int_equal(kvs_context_truncate(contexts, old, 3, &why), KVC_OK);
    assert_int_equal(kvs_context_truncate(contexts, old, 2, &why), KVC_AGAIN);
    assert_int_equal(kvs_context_extend(contexts, old, 5, &digest, 1, &why), KVC_AGAIN);
    assert_int_equal(atomic_load(&old->n_blocks), 5);
    assert_int_equal(blocks_used(f), 5);
    kvs_context_put(contexts, old);
    assert_int_equal(blocks_used(f), 3);
    assert_int_equal(kvs_context_get(contexts, &tenant, handle, &fresh), KVC_OK);
    kvs_context_close(contexts, fresh);
    assert_int_equal(kvs_context_truncate(contexts, fresh, 2, &why), KVC_STALE_HANDLE);
    assert_int_equal(blocks_used(f), 3);
    kvs_context_put(contexts, fresh);
    assert_int_equal(blocks_used(f), 0);
}

/* What nobody put lives as long as a context names it, however they were made. */
static void test_blocks_are_given_back(void **state)
{
    fixture *f = *state;
    uint64_t context, twin;
    assert_int_equal(h_open(f->peer, &f->schema, 5000, 1000, 0, &context), KVC_OK);
    assert_int_equal(fork_of(f->peer, context, 700, &twin), KVC_OK);
    assert_int_equal(blocks_used(f), 1000);
    assert_int_equal(cut(f->peer, context, 100), KVC_OK);
    assert_int_equal(blocks_used(f), 700);
    assert_int_equal(h_close(f->peer, twin), KVC_OK);
    assert_int_equal(blocks_used(f), 100);
    assert_int_equal(h_close(f->peer, context), KVC_OK);
    assert_int_equal(blocks_used(f), 0);
    /* The cap of blocks counts those that are shared; a refusal leaves all as it was. */
    assert_int_equal(h_open(f->peer, &f->schema, 0, 16384, 0, &context), KVC_OK);
    for (uint32_t i = 1; i < 6; i++)
        assert_int_equal(fork_of(f->peer, context, 0, &twin), KVC_OK);
    assert_int_equal(fork_of(f->peer, context, 0, &twin), KVC_NO_SPACE);
    assert_non_null(strstr(f->peer->xfer.detail, "max_open_blocks"));
    assert_int_equal(fork_of(f->peer, context, 1000, &twin), KVC_OK);
    assert_int_equal(h_extend(f->peer, twin, 1000, 90000, 2), KVC_OK);
}

/* With every block of the cap in use, what is cut off is free at once, also while a reader still
   has the old object. */
static void test_cut_needs_no_room(void **state)
{
    fixture *f = *state;
    kvs_context *old;
    kvc_digest tenant;
    uint64_t context, twin;
    assert_int_equal(kvc_sha256("default", 7, &tenant), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 16000, 0, &context), KVC_OK);
    for (uint32_t i = 1; i < 6; i++)
        assert_int_equal(fork_of(f->peer, context, 0, &twin), KVC_OK);
    assert_int_equal(fork_of(f->peer, context, 4000, &twin), KVC_OK);
    assert_int_equal(fork_of(f->peer, context, 1, &twin), KVC_NO_SPACE);
    assert_int_equal(kvs_context_get(f->h.server->contexts, &tenant, context, &old), KVC_OK);
    assert_int_equal(cut(f->peer, context, 15000), KVC_OK);
    assert_int_equal(fork_of(f->peer, context, 1001, &twin), KVC_NO_SPACE);
    assert_int_equal(fork_of(f->peer, context, 1000, &twin), KVC_OK);
    kvs_context_put(f->h.server->contexts, old);
    assert_int_equal(fork_of(f->peer, context, 1, &twin), KVC_NO_SPACE);
    assert_int_equal(h_close(f->peer, context), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 15001, 0, &context), KVC_NO_SPACE);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 15000, 0, &context), KVC_OK);
}

typedef struct closer {
    fixture *f;
    uint64_t context;
    kvc_status status;
} closer;

static void close_main(void *arg)
{
    closer *c = arg;
    h_peer *peer = h_connect(kvs_server_uri(c->f->h.server, 0), "default");
    c->status = h_close(peer, c->context);
    h_disconnect(peer);
}

/* A cut comes between a close's look at the handle and the close: what stands there now goes. */
static void test_close_beside_cut(void **state)
{
    fixture *f = *state;
    kvc_thread thread;
    closer c = {.f = f};
    kvs_contexts *contexts = f->h.server->contexts;
    kvs_context *context;
    kvc_digest tenant;
    const char *why;
    uint32_t pick = 0;
    assert_int_equal(kvc_sha256("default", 7, &tenant), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 5, 0, &c.context), KVC_OK);
    assert_int_equal(kvc_fault_arm("context.close=always"), KVC_OK);
    assert_int_equal(kvc_thread_start(&thread, "closer", close_main, &c), KVC_OK);
    while (kvc_fault_passes("context.close") == 0)
        usleep(100);
    kvc_status status = kvs_context_get(contexts, &tenant, c.context, &context);
    if (status == KVC_OK) {
        status = kvs_context_truncate(contexts, context, 3, &why);
        kvs_context_put(contexts, context);
    }
    kvc_thread_join(&thread);
    assert_int_equal(kvc_fault_arm(""), KVC_OK);
    assert_int_equal(status, KVC_OK);
    assert_int_equal(c.status, KVC_OK);
    assert_int_equal(h_fetch(f->peer, c.context, 0, &pick, 1), KVC_STALE_HANDLE);
    assert_int_equal(blocks_used(f), 0);
}

typedef struct racer {
    fixture *f;
    uint64_t context;
    uint32_t seed;
    kvc_thread thread;
} racer;

/* Cuts to 4 and extends by the same blocks, over and over. */
static void race_main(void *arg)
{
    racer *r = arg;
    h_peer *peer = h_connect(kvs_server_uri(r->f->h.server, 0), "default");
    for (uint32_t i = 0; i < 400; i++) {
        kvc_status status = cut(peer, r->context, 4);
        assert_true(status == KVC_OK);
        status = h_extend(peer, r->context, 4, 4, 60 + (r->seed + i) % 2);
        assert_true(status == KVC_OK || status == KVC_INVALID);
    }
    h_disconnect(peer);
}

/* Reads while others cut and extend: a row is the right one or missing, never another block's. */
static void test_race(void **state)
{
    fixture *f = *state;
    racer racers[2];
    uint32_t picks[128];
    uint64_t context, seed = 7, n_found = 0;
    put_all(f, 0, 65);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 4, 0, &context), KVC_OK);
    for (uint32_t i = 0; i < 2; i++) {
        racers[i] = (racer){.f = f, .context = context, .seed = i};
        assert_int_equal(kvc_thread_start(&racers[i].thread, "racer", race_main, &racers[i]),
                         KVC_OK);
    }
    for (uint32_t round = 0; round < 400; round++) {
        for (uint32_t i = 0; i < 128; i++)
            picks[i] = (uint32_t)(h_random(&seed) % (70 * H_TOKENS));
        assert_int_equal(h_fetch(f->peer, context, 0, picks, 128), KVC_OK);
        uint32_t at = 0, m = 0;
        for (uint32_t i = 0; i < 128; i++) {
            if (m < f->peer->n_missing && f->peer->missing[m].index == i) {
                m++;
                assert_true(picks[i] >= 4 * H_TOKENS);
                continue;
            }
            assert_true(h_row_is(picks[i] / H_TOKENS, 0, picks[i] % H_TOKENS, ROW,
                                 f->peer->data + (size_t)at++ * ROW));
            n_found++;
        }
    }
    for (uint32_t i = 0; i < 2; i++)
        kvc_thread_join(&racers[i].thread);
    assert_true(n_found > 0);
    assert_int_equal(h_close(f->peer, context), KVC_OK);
}

static kvc_status match_tiers(fixture *f, uint32_t n, const uint32_t *parts, uint32_t n_parts,
                              uint8_t *tiers, uint32_t *hits_p)
{
    return h_match_tiers(f->peer, &f->schema, 0, n, parts, n_parts, tiers, hits_p);
}

static void test_match_tiers_dram(void **state)
{
    fixture *f = *state;
    uint8_t tiers[20];
    uint32_t hits, part = 0;
    put_all(f, 0, 10);
    assert_int_equal(match_tiers(f, 20, &part, 1, tiers, &hits), KVC_OK);
    assert_int_equal(hits, 10);
    for (uint32_t i = 0; i < 10; i++)
        assert_int_equal(tiers[i], KVC_TIER_DRAM);
    assert_int_equal(match_tiers(f, 0, &part, 1, tiers, &hits), KVC_OK);
    assert_int_equal(hits, 0);
}

#ifdef KVASIR_LMDB
static int setup_lmdb(void **state)
{
    return start(state, true);
}

/* Twelve blocks of two parts; dram has room for eight values, so the oldest are in lmdb alone. */
static void test_match_tiers_lmdb(void **state)
{
    fixture *f = *state;
    const uint32_t parts[] = {0, 10};
    uint8_t both[12], one[2][12];
    uint32_t hits;
    for (uint64_t b = 0; b < 12; b++)
        assert_int_equal(h_put(f->peer, &f->schema, b, parts, 2, KVC_PROMISE_DURABLE), KVC_OK);
    for (uint32_t p = 0; p < 2; p++) {
        assert_int_equal(match_tiers(f, 12, &parts[p], 1, one[p], &hits), KVC_OK);
        assert_int_equal(hits, 12);
    }
    assert_int_equal(match_tiers(f, 12, parts, 2, both, &hits), KVC_OK);
    uint32_t n_dram = 0, n_lmdb = 0;
    for (uint32_t i = 0; i < 12; i++) {
        assert_int_equal(both[i], one[0][i] > one[1][i] ? one[0][i] : one[1][i]);
        for (uint32_t p = 0; p < 2; p++) {
            n_dram += one[p][i] == KVC_TIER_DRAM;
            n_lmdb += one[p][i] == KVC_TIER_LMDB;
        }
    }
    assert_int_equal(n_dram + n_lmdb, 24);
    assert_int_equal(n_dram, 8);
}
#endif

int main(void)
{
#ifdef KVS_TEST_RDMA
    fake_verbs_use(NULL);
    h_listen = "rdma://127.0.0.1:0";
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_truncate, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fork, setup, teardown),
        cmocka_unit_test_setup_teardown(test_old_object, setup, teardown),
        cmocka_unit_test_setup_teardown(test_blocks_are_given_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cut_needs_no_room, setup, teardown),
        cmocka_unit_test_setup_teardown(test_close_beside_cut, setup, teardown),
        cmocka_unit_test_setup_teardown(test_race, setup, teardown),
        cmocka_unit_test_setup_teardown(test_match_tiers_dram, setup, teardown),
#ifdef KVASIR_LMDB
        cmocka_unit_test_setup_teardown(test_match_tiers_lmdb, setup_lmdb, teardown),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
