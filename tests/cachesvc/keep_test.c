/*
 * keep_test.c: what holds keep, what erase removes for good, what prefetch loads: one server in
 * this process, with and without lmdb.
 */
#include "harness.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/digest.h"
#include "base/fault.h"
#include "request.h"

#define ROW   512u
#define VALUE (H_TOKENS * ROW) /* 32 KiB */

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema schema;
    char folder[256];
} fixture;

static void begin(fixture *f)
{
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
}

static int start(void **state, bool has_lmdb, uint64_t dram_bytes)
{
    fixture *f = calloc(1, sizeof(*f));
    assert_non_null(f);
    h_server_init(&f->h);
    h_schema_init(&f->schema, "model", 3, ROW, true);
    if (has_lmdb) {
        h_temp_dir(f->folder);
        f->h.settings.lmdb_path = f->folder;
        f->h.settings.lmdb_bytes = 64u << 20;
    }
    f->h.settings.dram_bytes = dram_bytes;
    f->h.settings.max_contexts = 5;
    begin(f);
    *state = f;
    return 0;
}

static int setup(void **state)
{
    return start(state, false, 8 * VALUE);
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

static kvc_status hold(h_peer *peer, uint64_t context, uint64_t renewed, uint64_t ttl_ms,
                       uint64_t *hold_p)
{
    kvc_request req = {.method = KVC_HOLD};
    req.u.hold.context = context;
    req.u.hold.hold = renewed;
    req.u.hold.ttl_ms = ttl_ms;
    kvc_status status = h_call(peer, &req);
    *hold_p = status == KVC_OK ? peer->xfer.reply.u.hold.hold : 0;
    return status;
}

static kvc_status release(h_peer *peer, uint64_t handle)
{
    kvc_request req = {.method = KVC_RELEASE};
    req.u.release.hold = handle;
    return h_call(peer, &req);
}

/* Erases blocks first .. first + n - 1, or a context's where that is not 0. */
static kvc_status erase(fixture *f, uint64_t context, uint64_t first, uint32_t n,
                        const uint32_t *parts, uint32_t n_parts)
{
    kvc_digest digests[64];
    kvc_request req = {.method = KVC_ERASE};
    assert_true(n <= 64);
    for (uint32_t i = 0; i < n; i++)
        digests[i] = h_digest(first + i);
    req.u.erase.context = context;
    req.u.erase.schema = f->schema.digest;
    req.u.erase.digests = digests;
    req.u.erase.n_digests = n;
    req.u.erase.parts = parts;
    req.u.erase.n_parts = n_parts;
    return h_call(f->peer, &req);
}

static kvc_status prefetch(fixture *f, uint64_t context, uint32_t first, uint32_t n, kvc_tier tier)
{
    static const uint32_t part = 0;
    kvc_request req = {.method = KVC_PREFETCH};
    req.u.prefetch.context = context;
    req.u.prefetch.parts = &part;
    req.u.prefetch.n_parts = 1;
    req.u.prefetch.first_block = first;
    req.u.prefetch.n_blocks = n;
    req.u.prefetch.tier = tier;
    return h_call(f->peer, &req);
}

static void put(fixture *f, uint64_t first, uint32_t n, kvc_promise promise)
{
    for (uint32_t b = 0; b < n; b++)
        assert_int_equal(h_put1(f->peer, &f->schema, first + b, 0, promise), KVC_OK);
}

/* Puts blocks and reads each, so that the hand of eviction goes round. */
static void churn(fixture *f, uint64_t first, uint32_t n)
{
    uint32_t pick = 0;
    for (uint32_t b = 0; b < n; b++) {
        uint64_t context;
        put(f, first + b, 1, KVC_PROMISE_MEMORY);
        assert_int_equal(h_open(f->peer, &f->schema, first + b, 1, 0, &context), KVC_OK);
        h_fetch_equal(f->peer, &f->schema, context, first + b, 0, &pick, 1);
        assert_int_equal(h_close(f->peer, context), KVC_OK);
    }
}

/* How many of the blocks are there, in whatever order. */
static uint32_t present(fixture *f, uint64_t first, uint32_t n, uint32_t part)
{
    uint32_t found = 0, hits;
    for (uint32_t b = 0; b < n; b++) {
        assert_int_equal(h_match(f->peer, &f->schema, first + b, 1, &part, 1, &hits), KVC_OK);
        found += hits;
    }
    return found;
}

static uint64_t held(fixture *f)
{
    kvs_index *index = f->h.server->index;
    kvc_mutex_lock(&index->lock);
    uint64_t bytes = index->held_total;
    kvc_mutex_unlock(&index->lock);
    return bytes;
}

static void test_hold(void **state)
{
    fixture *f = *state;
    uint64_t context, a, b;
    put(f, 0, 4, KVC_PROMISE_MEMORY);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 4, 0, &context), KVC_OK);
    assert_int_equal(hold(f->peer, context, 0, 60000, &a), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.hold.n_blocks, 4);
    assert_int_equal(f->peer->xfer.reply.u.hold.ttl_ms, 60000);
    assert_int_equal(f->peer->xfer.reply.u.hold.tenant_bytes, 4 * VALUE);
    assert_int_equal(f->peer->xfer.reply.u.hold.max_bytes, 4 * VALUE);
    assert_int_equal(hold(f->peer, context, 0, 0, &b), KVC_OK); /* the same once more */
    assert_int_equal(held(f), 4 * VALUE);
    assert_int_equal(h_close(f->peer, context), KVC_OK);
    churn(f, 100, 30);
    assert_int_equal(present(f, 0, 4, 0), 4);
    assert_int_equal(present(f, 100, 30, 0), 4);
    assert_int_equal(release(f->peer, a), KVC_OK);
    churn(f, 200, 30);
    assert_int_equal(present(f, 0, 4, 0), 4); /* by the second hold */
    assert_int_equal(release(f->peer, b), KVC_OK);
    assert_int_equal(held(f), 0);
    churn(f, 300, 30);
    assert_int_equal(present(f, 0, 4, 0), 0);
    assert_int_equal(release(f->peer, b), KVC_NOT_FOUND);
    assert_int_equal(hold(f->peer, context, 0, 0, &a), KVC_STALE_HANDLE);
}

static void test_hold_caps(void **state)
{
    fixture *f = *state;
    uint64_t context, small, handle, other;
    put(f, 0, 5, KVC_PROMISE_MEMORY);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 5, 0, &context), KVC_OK);
    assert_int_equal(hold(f->peer, context, 0, 0, &handle), KVC_NO_SPACE);
    assert_non_null(strstr(f->peer->xfer.detail, "max_hold_bytes"));
    assert_int_equal(held(f), 0);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 3, 0, &small), KVC_OK);
    assert_int_equal(hold(f->peer, small, 0, 0, &handle), KVC_OK);
    /* What is put to held blocks later is held up to the cap, and stored in any case. */
    for (uint64_t b = 0; b < 3; b++)
        assert_int_equal(h_put1(f->peer, &f->schema, b, 10, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(held(f), 4 * VALUE);
    churn(f, 100, 30);
    assert_int_equal(present(f, 0, 3, 0), 3);
    assert_int_equal(present(f, 0, 3, 10), 1);
    /* As many holds as contexts, and only one's own. */
    for (uint32_t i = 1; i < 5; i++)
        assert_int_equal(hold(f->peer, small, 0, 0, &other), KVC_OK);
    assert_int_equal(hold(f->peer, small, 0, 0, &other), KVC_NO_SPACE);
    assert_non_null(strstr(f->peer->xfer.detail, "max_contexts"));
    kvc_digest stranger;
    kvs_hold_info info;
    assert_int_equal(kvc_sha256("stranger", 8, &stranger), KVC_OK);
    assert_int_equal(kvs_hold_release(f->h.server->holds, &stranger, handle), KVC_NOT_FOUND);
    assert_int_equal(kvs_hold_renew(f->h.server->holds, &stranger, handle, 0, &info),
                     KVC_NOT_FOUND);
    assert_int_equal(hold(f->peer, small, handle, 0, &other), KVC_INVALID);
    assert_int_equal(release(f->peer, handle), KVC_OK);
}

static void test_hold_ttl(void **state)
{
    fixture *f = *state;
    uint64_t context, handle, same;
    put(f, 0, 2, KVC_PROMISE_MEMORY);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 2, 0, &context), KVC_OK);
    kvc_status status = KVC_NOT_FOUND;
    uint32_t ttl_ms = 250;
    while (status == KVC_NOT_FOUND && ttl_ms < 60000) { /* a busy machine may be too late for it */
        ttl_ms *= 2;
        assert_int_equal(hold(f->peer, context, 0, ttl_ms, &handle), KVC_OK);
        status = hold(f->peer, 0, handle, 600000, &same);
    }
    assert_int_equal(status, KVC_OK);
    assert_true(same == handle);
    usleep(ttl_ms * 1200);
    kvs_server_tick(f->h.server);
    assert_int_equal(held(f), 2 * VALUE);
    assert_int_equal(hold(f->peer, 0, handle, 20, &same), KVC_OK);
    usleep(50000);
    kvs_server_tick(f->h.server);
    assert_int_equal(held(f), 0);
    assert_int_equal(hold(f->peer, 0, handle, 20, &same), KVC_NOT_FOUND);
}

static void test_erase(void **state)
{
    fixture *f = *state;
    const uint32_t part10 = 10, twice[] = {0, 0}, wrong = 11;
    uint64_t context, handle;
    kvs_tier_usage usage;
    put(f, 0, 3, KVC_PROMISE_MEMORY);
    assert_int_equal(h_put1(f->peer, &f->schema, 1, 10, KVC_PROMISE_MEMORY), KVC_OK);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 3, 0, &context), KVC_OK);
    assert_int_equal(hold(f->peer, context, 0, 0, &handle), KVC_OK);
    assert_int_equal(erase(f, 0, 0, 3, &wrong, 1), KVC_INVALID);
    assert_int_equal(erase(f, 0, 0, 3, twice, 2), KVC_INVALID);
    assert_int_equal(erase(f, context ^ 1ull << 50, 0, 0, NULL, 0), KVC_STALE_HANDLE);
    assert_int_equal(present(f, 0, 3, 0), 3);
    assert_int_equal(erase(f, 0, 0, 3, &part10, 1), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.erase.values, 1);
    assert_int_equal(f->peer->xfer.reply.u.erase.bytes, VALUE);
    assert_int_equal(held(f), 3 * VALUE);
    assert_int_equal(present(f, 0, 3, 0), 3);
    assert_int_equal(erase(f, context, 0, 0, NULL, 0), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.erase.values, 3);
    assert_int_equal(erase(f, context, 0, 0, NULL, 0), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.erase.values, 0);
    assert_int_equal(present(f, 0, 3, 0), 0);
    assert_int_equal(held(f), 0);
    f->h.server->dram.ops->usage(f->h.server->dram.tier, &usage);
    assert_int_equal(usage.used_bytes, 0);
    /* The context goes on, and what is put again is there and held again. */
    uint32_t pick = 70;
    assert_int_equal(h_fetch(f->peer, context, 0, &pick, 1), KVC_OK);
    assert_int_equal(f->peer->n_missing, 1);
    put(f, 0, 3, KVC_PROMISE_MEMORY);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, &pick, 1);
    assert_int_equal(held(f), 3 * VALUE);
}

/* References block 0, part 0, as a reader does. */
static void read_block(fixture *f, kvs_read *read)
{
    kvc_digest tenant, digest = h_digest(0);
    assert_int_equal(kvc_sha256("default", 7, &tenant), KVC_OK);
    const kvs_schema *schema = kvs_schemas_find(f->h.server->schemas, &tenant, &f->schema.digest);
    kvs_index *index = f->h.server->index;
    *read = (kvs_read){.n_rows = 1};
    assert_int_equal(kvs_index_hold_blocks(index, schema, &digest, 1, &read->block), KVC_OK);
    kvs_index_ref(index, schema, 0, 0, 0, read, 1);
    kvs_index_drop_blocks(index, &read->block, 1);
    assert_true(read->where == KVS_IN_DRAM || read->where == KVS_IN_LMDB);
}

/* A reader in the way: the value is served no more at once, and gone once the reader left. */
static void check_erase_reader(fixture *f, kvc_status meanwhile)
{
    kvs_read read;
    put(f, 0, 1, f->folder[0] ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY);
    read_block(f, &read);
    f->peer->timeout_ns = 300000000;
    assert_int_equal(erase(f, 0, 0, 1, NULL, 0), meanwhile);
    assert_int_equal(present(f, 0, 1, 0), 0);
    assert_int_equal(h_put1(f->peer, &f->schema, 0, 0, KVC_PROMISE_MEMORY), KVC_AGAIN);
    kvs_index_unref(f->h.server->index, &read.value, 1);
    f->peer->timeout_ns = 60000000000ull;
    kvc_status status = KVC_AGAIN; /* the first one may take a moment to end */
    for (int i = 0; i < 60000 && status == KVC_AGAIN; i++) {
        status = erase(f, 0, 0, 1, NULL, 0);
        usleep(1000);
    }
    assert_int_equal(status, KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.erase.values, 0);
    put(f, 0, 1, KVC_PROMISE_MEMORY);
}

static void test_erase_reader(void **state)
{
    check_erase_reader(*state, KVC_AGAIN);
}

static void test_prefetch_without_lmdb(void **state)
{
    fixture *f = *state;
    uint64_t context;
    put(f, 0, 3, KVC_PROMISE_MEMORY);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 5, 0, &context), KVC_OK);
    assert_int_equal(prefetch(f, context, 0, 0, KVC_TIER_DRAM), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.there, 3);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.missing, 2);
    assert_int_equal(prefetch(f, context, 5, 0, KVC_TIER_DRAM), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.there, 0);
    assert_int_equal(prefetch(f, context, 6, 0, KVC_TIER_DRAM), KVC_INVALID);
    assert_int_equal(prefetch(f, context, 3, 3, KVC_TIER_DRAM), KVC_INVALID);
    assert_int_equal(prefetch(f, context, 1, UINT32_MAX, KVC_TIER_DRAM), KVC_INVALID);
    assert_int_equal(prefetch(f, context, 0, 0, KVC_TIER_GPU), KVC_UNSUPPORTED);
    assert_int_equal(prefetch(f, 77, 0, 0, KVC_TIER_DRAM), KVC_STALE_HANDLE);
}

#ifdef KVASIR_LMDB
static int setup_lmdb(void **state)
{
    return start(state, true, 32 * VALUE);
}

static void restart(fixture *f)
{
    h_disconnect(f->peer);
    h_server_stop(&f->h, true);
    begin(f);
}

/* Written behind, synced, in dram or not: all of it is gone, also after a restart. */
static void test_erase_lmdb(void **state)
{
    fixture *f = *state;
    put(f, 0, 40, KVC_PROMISE_DURABLE);
    put(f, 40, 20, KVC_PROMISE_MEMORY);
    assert_int_equal(erase(f, 0, 10, 45, NULL, 0), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.erase.values, 45);
    assert_int_equal(present(f, 0, 60, 0), 15);
    restart(f);
    assert_int_equal(present(f, 0, 10, 0), 10);
    assert_int_equal(present(f, 10, 45, 0), 0);
    assert_int_equal(present(f, 55, 5, 0), 5);
    put(f, 10, 5, KVC_PROMISE_DURABLE);
    restart(f);
    assert_int_equal(present(f, 10, 5, 0), 5);
}

/* A removal that did not reach the disk is not acknowledged; the next attempt makes it good. */
static void test_erase_that_fails(void **state)
{
    fixture *f = *state;
    put(f, 0, 2, KVC_PROMISE_DURABLE);
    assert_int_equal(kvc_fault_arm("lmdb.commit=always"), KVC_OK);
    assert_int_equal(erase(f, 0, 0, 2, NULL, 0), KVC_IO);
    assert_int_equal(kvc_fault_arm(""), KVC_OK);
    assert_int_equal(present(f, 0, 2, 0), 0);
    assert_int_equal(erase(f, 0, 0, 2, NULL, 0), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.erase.values, 0);
    restart(f);
    assert_int_equal(present(f, 0, 2, 0), 0);
}

/* What fails for one size of value is no concern of an erase of another. */
static void test_erase_beside_failures(void **state)
{
    fixture *f = *state;
    h_schema mine = f->schema, other;
    h_schema_init(&other, "other", 1, 2 * ROW, false);
    assert_int_equal(h_register(f->peer, &other), KVC_OK);
    put(f, 0, 4, KVC_PROMISE_DURABLE);
    assert_int_equal(h_put1(f->peer, &other, 1, 0, KVC_PROMISE_DURABLE), KVC_OK);
    assert_int_equal(kvc_fault_arm("lmdb.sync=once"), KVC_OK);
    assert_int_equal(h_put1(f->peer, &other, 2, 0, KVC_PROMISE_DURABLE), KVC_IO);
    assert_int_equal(kvc_fault_arm(""), KVC_OK);
    assert_int_equal(erase(f, 0, 0, 2, NULL, 0), KVC_OK);
    f->schema = other;
    assert_int_equal(erase(f, 0, 1, 1, NULL, 0), KVC_IO);
    f->schema = mine;
    /* A removal that was lost for want of memory is told, by the next erase too. */
    assert_int_equal(kvc_fault_arm("lmdb.release=once"), KVC_OK);
    assert_int_equal(erase(f, 0, 2, 1, NULL, 0), KVC_IO);
    assert_int_equal(kvc_fault_failures("lmdb.release"), 1);
    assert_int_equal(kvc_fault_arm(""), KVC_OK);
    assert_int_equal(erase(f, 0, 3, 1, NULL, 0), KVC_IO);
    assert_int_equal(h_put1(f->peer, &f->schema, 9, 0, KVC_PROMISE_DURABLE), KVC_OK);
}

static void test_erase_reader_lmdb(void **state)
{
    check_erase_reader(*state, KVC_TIMED_OUT);
}

typedef struct late_reader {
    kvs_job job; /* first */
    fixture *f;
    kvs_read read;
} late_reader;

static void leave(kvs_job *job)
{
    late_reader *late = (late_reader *)job;
    kvs_index_unref(late->f->h.server->index, &late->read.value, 1);
}

static void *queue_late(void *arg)
{
    late_reader *late = arg;
    usleep(100000);
    assert_int_equal(kvs_disk_submit(late->f->h.server->disk, &late->job), KVC_OK);
    return NULL;
}

static int setup_one_disk_thread(void **state)
{
    int rc = start(state, true, 32 * VALUE);
    fixture *f = *state;
    h_disconnect(f->peer);
    h_server_stop(&f->h, true);
    f->h.settings.disk_threads = 1;
    begin(f);
    return rc;
}

/* With a single disk thread, what an erase waits for stands behind it in the queue. */
static void test_erase_lets_others_run(void **state)
{
    fixture *f = *state;
    late_reader late = {.job.run = leave, .f = f};
    pthread_t thread;
    put(f, 0, 1, KVC_PROMISE_DURABLE);
    read_block(f, &late.read);
    f->peer->timeout_ns = 60000000000ull;
    assert_int_equal(pthread_create(&thread, NULL, queue_late, &late), 0);
    kvc_status status = erase(f, 0, 0, 1, NULL, 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(status, KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.erase.values, 1);
}

/* A held value may leave dram, since lmdb has it, and leaves lmdb no more. */
static void test_hold_lmdb(void **state)
{
    fixture *f = *state;
    uint64_t context, handle;
    uint32_t hits, part = 0;
    uint8_t tier;
    put(f, 0, 4, KVC_PROMISE_DURABLE);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 4, 0, &context), KVC_OK);
    assert_int_equal(hold(f->peer, context, 0, 0, &handle), KVC_OK);
    for (uint64_t b = 1000; b < 1000 + 2200; b++) /* lmdb has room for fewer */
        (void)h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_MEMORY);
    assert_true(f->h.server->lmdb.evictions > 0);
    assert_int_equal(present(f, 0, 4, 0), 4);
    assert_int_equal(h_match_tiers(f->peer, &f->schema, 0, 1, &part, 1, &tier, &hits), KVC_OK);
    assert_int_equal(tier, KVC_TIER_LMDB);
    assert_int_equal(release(f->peer, handle), KVC_OK);
}

static void test_prefetch(void **state)
{
    fixture *f = *state;
    uint64_t context;
    uint8_t tiers[64];
    uint32_t hits, part = 0, n_dram = 0;
    put(f, 0, 60, KVC_PROMISE_DURABLE); /* dram keeps 32 of them */
    assert_int_equal(h_match_tiers(f->peer, &f->schema, 0, 60, &part, 1, tiers, &hits), KVC_OK);
    for (uint32_t i = 0; i < 10; i++)
        n_dram += tiers[i] == KVC_TIER_DRAM;
    assert_true(n_dram < 10);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 62, 0, &context), KVC_OK);
    assert_int_equal(prefetch(f, context, 0, 10, KVC_TIER_DRAM), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.there, n_dram);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.moved, 10 - n_dram);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.moved_bytes, (10 - n_dram) * VALUE);
    assert_int_equal(h_match_tiers(f->peer, &f->schema, 0, 10, &part, 1, tiers, &hits), KVC_OK);
    for (uint32_t i = 0; i < 10; i++)
        assert_int_equal(tiers[i], KVC_TIER_DRAM);
    uint32_t pick = 5 * H_TOKENS + 3;
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, &pick, 1);
    assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_dram, 1);
    /* All of it: half of dram at most is loaded, the rest stays where it is, none is lost. */
    assert_int_equal(prefetch(f, context, 0, 0, KVC_TIER_DRAM), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.missing, 2);
    assert_true(f->peer->xfer.reply.u.prefetch.moved <= 16);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.there + f->peer->xfer.reply.u.prefetch.moved +
                         f->peer->xfer.reply.u.prefetch.left,
                     60);
    assert_int_equal(present(f, 0, 60, 0), 60);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_hold, setup, teardown),
        cmocka_unit_test_setup_teardown(test_hold_caps, setup, teardown),
        cmocka_unit_test_setup_teardown(test_hold_ttl, setup, teardown),
        cmocka_unit_test_setup_teardown(test_erase, setup, teardown),
        cmocka_unit_test_setup_teardown(test_erase_reader, setup, teardown),
        cmocka_unit_test_setup_teardown(test_prefetch_without_lmdb, setup, teardown),
#ifdef KVASIR_LMDB
        cmocka_unit_test_setup_teardown(test_erase_lmdb, setup_lmdb, teardown),
        cmocka_unit_test_setup_teardown(test_erase_that_fails, setup_lmdb, teardown),
        cmocka_unit_test_setup_teardown(test_erase_beside_failures, setup_lmdb, teardown),
        cmocka_unit_test_setup_teardown(test_erase_reader_lmdb, setup_lmdb, teardown),
        cmocka_unit_test_setup_teardown(test_erase_lets_others_run, setup_one_disk_thread,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_hold_lmdb, setup_lmdb, teardown),
        cmocka_unit_test_setup_teardown(test_prefetch, setup_lmdb, teardown),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
