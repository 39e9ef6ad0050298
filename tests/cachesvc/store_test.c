/*
 * store_test.c: dram over lmdb in one server of this process: rows bit-equal from either tier,
 * promises over restarts, byte caps, damage on the medium, promotion by use.
 */
#include "harness.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/le.h"
#include "base/metrics.h"
#include "base/sum.h"
#include "tier/tier_dram.h"

#define ROW         512u
#define VALUE_BYTES (H_TOKENS * ROW)

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema schema;
    char dir[256];
} fixture;

static void open_server(fixture *f)
{
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
}

static void close_server(fixture *f, bool flush)
{
    if (f->peer)
        h_disconnect(f->peer);
    f->peer = NULL;
    if (f->h.server)
        h_server_stop(&f->h, flush);
}

static void restart(fixture *f, bool flush)
{
    close_server(f, flush);
    open_server(f);
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    h_server_init(&f->h);
    h_temp_dir(f->dir);
    h_schema_init(&f->schema, "model", 3, ROW, false);
    f->h.settings.lmdb_path = f->dir;
    f->h.settings.lmdb_bytes = 64u << 20;
    f->h.settings.dram_bytes = 8 * VALUE_BYTES;
    open_server(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    close_server(f, false);
    h_server_fini(&f->h);
    h_remove_dir(f->dir);
    free(f);
    return 0;
}

static void nap_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static void put_many(fixture *f, uint64_t first, uint32_t n, kvc_promise promise)
{
    for (uint32_t b = 0; b < n; b++) {
        assert_int_equal(h_put1(f->peer, &f->schema, first + b, 0, promise), KVC_OK);
        h_check_caps(&f->h);
    }
}

static uint32_t count_hits(fixture *f, uint64_t first, uint32_t n)
{
    const uint32_t part = 0;
    uint32_t hits;
    assert_int_equal(h_match(f->peer, &f->schema, first, n, &part, 1, &hits), KVC_OK);
    return hits;
}

/* The capacity of lmdb went to one size: another takes its share, and what is left serves. */
static void test_lmdb_for_another_size(void **state)
{
    fixture *f = *state;
    h_schema wide;
    uint64_t context, before;
    close_server(f, false);
    f->h.settings.lmdb_bytes = 16u << 20;
    open_server(f);
    put_many(f, 0, 700, KVC_PROMISE_DURABLE);
    before = atomic_load(&f->h.server->lmdb.evictions);
    h_schema_init(&wide, "wide", 1, 4 * ROW, false);
    assert_int_equal(h_register(f->peer, &wide), KVC_OK);
    for (uint64_t b = 0; b < 4; b++)
        assert_int_equal(h_put1(f->peer, &wide, b, 0, KVC_PROMISE_DURABLE), KVC_OK);
    assert_in_range(atomic_load(&f->h.server->lmdb.evictions) - before, 1, 200);
    restart(f, false);
    assert_int_equal(count_hits(f, 650, 50), 50);
    assert_int_equal(h_open(f->peer, &wide, 0, 4, 0, &context), KVC_OK);
    h_fetch_equal(f->peer, &wide, context, 0, 0, (uint32_t[]){0, 5, H_TOKENS - 1}, 3);
}

static void test_rows_from_lmdb(void **state)
{
    fixture *f = *state;
    uint64_t context, seed = 7;
    uint32_t picks[1024], rows_lmdb = 0;
    put_many(f, 0, 100, KVC_PROMISE_MEMORY);
    assert_int_equal(count_hits(f, 0, 101), 100);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 100, 0, &context), KVC_OK);
    for (int round = 0; round < 10; round++) {
        for (uint32_t i = 0; i < 1024; i++)
            picks[i] = (uint32_t)(h_random(&seed) % (100 * H_TOKENS));
        h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 1024);
        rows_lmdb += f->peer->xfer.reply.u.fetch_rows.rows_lmdb;
        h_check_caps(&f->h);
    }
    assert_true(rows_lmdb > 5000);
}

static void test_durable_survives(void **state)
{
    fixture *f = *state;
    uint64_t context, old, boot_id = f->h.server->boot_id;
    uint32_t picks[64];
    put_many(f, 0, 40, KVC_PROMISE_DURABLE);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 40, 0, &old), KVC_OK);
    restart(f, false);
    assert_true(f->h.server->boot_id != boot_id);
    for (uint32_t i = 0; i < 64; i++)
        picks[i] = i * 40;
    assert_int_equal(count_hits(f, 0, 41), 40);
    /* The new context has the old one's slot: only the boot tells the handles apart. */
    assert_int_equal(h_open(f->peer, &f->schema, 0, 40, 0, &context), KVC_OK);
    assert_int_equal(h_fetch(f->peer, old, 0, picks, 64), KVC_STALE_HANDLE);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 64);
    assert_int_equal(h_put1(f->peer, &f->schema, 39, 0, KVC_PROMISE_DURABLE), KVC_EXISTS);
}

static void test_write_behind(void **state)
{
    fixture *f = *state;
    put_many(f, 0, 4, KVC_PROMISE_MEMORY);
    restart(f, true);
    assert_int_equal(count_hits(f, 0, 5), 4);
    f->h.settings.lmdb_admission = KVS_ADMIT_DURABLE_ONLY;
    restart(f, true);
    put_many(f, 10, 4, KVC_PROMISE_MEMORY);
    assert_int_equal(h_put1(f->peer, &f->schema, 11, 0, KVC_PROMISE_DURABLE), KVC_EXISTS);
    restart(f, true);
    assert_int_equal(count_hits(f, 10, 5), 0);
    assert_int_equal(count_hits(f, 11, 5), 1); /* EXISTS to a DURABLE put is durable too */
}

/* A value is written once it was read after its put; what nobody reads is not. */
static void test_second_use(void **state)
{
    fixture *f = *state;
    uint64_t context, written = kvc_metric_get(KVC_M_written_behind_values);
    uint32_t picks[3] = {0, 64, 3 * 64};
    f->h.settings.lmdb_admission = KVS_ADMIT_SECOND_USE;
    f->h.settings.dram_bytes = 64u << 20;
    restart(f, true);
    put_many(f, 0, 8, KVC_PROMISE_MEMORY);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 8, 0, &context), KVC_OK);
    for (uint32_t i = 0; i < 3; i++) /* more reads are no more writes */
        h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 3);
    kvs_server_tick(f->h.server);
    restart(f, true);
    assert_int_equal(kvc_metric_get(KVC_M_written_behind_values) - written, 3);
    assert_int_equal(count_hits(f, 0, 8), 2); /* leading: block 2 was not read */
    assert_int_equal(count_hits(f, 3, 2), 1);
    assert_int_equal(count_hits(f, 4, 4), 0);
}

/* The day's bytes are not passed by MEMORY values; a DURABLE put is written and counts. */
static void test_write_budget(void **state)
{
    fixture *f = *state;
    uint64_t written = kvc_metric_get(KVC_M_written_behind_values);
    uint64_t refused = kvc_metric_get(KVC_M_lmdb_budget_refused_values);
    f->h.settings.dram_bytes = 64u << 20;
    f->h.settings.lmdb_write_budget_bytes = 5 * VALUE_BYTES + VALUE_BYTES / 2;
    restart(f, true);
    put_many(f, 0, 2, KVC_PROMISE_DURABLE);
    put_many(f, 10, 8, KVC_PROMISE_MEMORY);
    restart(f, true);
    assert_int_equal(kvc_metric_get(KVC_M_written_behind_values) - written, 3);
    assert_int_equal(kvc_metric_get(KVC_M_lmdb_budget_refused_values) - refused, 5);
    assert_int_equal(count_hits(f, 0, 2), 2);
    assert_int_equal(count_hits(f, 10, 8), 3);
    put_many(f, 20, 4, KVC_PROMISE_MEMORY); /* the day goes on: nothing is left of it */
    restart(f, true);
    assert_int_equal(count_hits(f, 20, 4), 0);
    f->h.settings.lmdb_write_budget_bytes = 1; /* a promise is kept whatever it costs */
    restart(f, true);
    put_many(f, 30, 3, KVC_PROMISE_DURABLE);
    restart(f, true);
    assert_int_equal(count_hits(f, 30, 3), 3);
}

/* What a process that dies after an answer leaves behind counts all that was written for it. */
static void test_write_budget_is_recorded_first(void **state)
{
    fixture *f = *state;
    f->h.settings.lmdb_write_budget_bytes = 40 * VALUE_BYTES;
    restart(f, true);
    for (uint64_t block = 0; block < 44; block++) {
        uint64_t spent_bytes = (block + 1 < 40 ? block + 1 : 40) * VALUE_BYTES;
        void *record;
        size_t len_bytes;
        put_many(f, block, 1, KVC_PROMISE_DURABLE);
        const kvs_store *lmdb = &f->h.server->lmdb;
        assert_int_equal(lmdb->ops->meta_get(lmdb->tier, "admission/day", &record, &len_bytes),
                         KVC_OK);
        assert_int_equal(len_bytes, 24);
        assert_true(kvc_le_get((uint8_t *)record + 8, 8) >= spent_bytes);
        free(record);
    }
}

/* More dirty values than the tier is given at once: a stop writes the rest too. */
static void test_flush(void **state)
{
    fixture *f = *state;
    uint64_t n_dirty = 0, first = 0, ns = 300000000;
    f->h.settings.dram_bytes = 64u << 20;
    /* Where the puts take a busy machine so long that most are written before the stop: again. */
    for (; n_dirty <= 100 && ns < 10000000000ull; ns *= 4, first += 1000) {
        f->h.settings.group_commit_ns = ns;
        restart(f, false);
        put_many(f, first, 300, KVC_PROMISE_MEMORY);
        n_dirty = kvs_index_dirty_count(f->h.server->index);
    }
    assert_true(n_dirty > 100);
    restart(f, true);
    assert_int_equal(count_hits(f, first - 1000, 301), 300);
}

/* With write-behind, a DURABLE put of a value that is being written gets AGAIN, then EXISTS. */
static void test_durable_after_memory(void **state)
{
    fixture *f = *state;
    for (uint64_t b = 0; b < 20; b++) {
        kvc_status status = KVC_AGAIN;
        assert_int_equal(h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_MEMORY), KVC_OK);
        for (int tries = 0; status == KVC_AGAIN && tries < 60000; tries++) {
            status = h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_DURABLE);
            nap_ms(1);
        }
        assert_int_equal(status, KVC_EXISTS);
    }
    restart(f, false);
    assert_int_equal(count_hits(f, 0, 20), 20);
}

static void test_lmdb_full(void **state)
{
    fixture *f = *state;
    uint64_t context;
    uint32_t picks[16];
    close_server(f, false);
    h_remove_dir(f->dir);
    f->h.settings.lmdb_bytes = 16u << 20;
    open_server(f);
    put_many(f, 0, 700, KVC_PROMISE_DURABLE);
    put_many(f, 1000, 700, KVC_PROMISE_MEMORY);
    assert_true(atomic_load(&f->h.server->lmdb.evictions) > 300);
    for (uint32_t i = 0; i < 16; i++)
        picks[i] = i * H_TOKENS + i;
    assert_int_equal(h_open(f->peer, &f->schema, 1684, 16, 0, &context), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, context, 1684, 0, picks, 16);
    restart(f, true);
    assert_int_equal(h_open(f->peer, &f->schema, 1684, 16, 0, &context), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, context, 1684, 0, picks, 16);
}

/* Flips one byte of a row wherever it stands in the files under the folder. */
static void damage(const char *dir, const void *row)
{
    char command[512], path[512];
    uint32_t n = 0;
    snprintf(command, sizeof(command), "find %s -name data.mdb", dir);
    FILE *list = popen(command, "r");
    assert_non_null(list);
    while (fgets(path, sizeof(path), list)) {
        struct stat st = {0};
        path[strcspn(path, "\n")] = '\0';
        int fd = open(path, O_RDWR);
        assert_true(fd >= 0 && fstat(fd, &st) == 0);
        char *bytes = malloc((size_t)st.st_size + 1);
        assert_true(pread(fd, bytes, (size_t)st.st_size, 0) == st.st_size);
        for (off_t at = 0; at + ROW <= st.st_size; at += 16) {
            if (memcmp(bytes + at, row, ROW) != 0)
                continue;
            char flipped = (char)(bytes[at + 9] ^ 0x40);
            assert_int_equal(pwrite(fd, &flipped, 1, at + 9), 1);
            n++;
        }
        free(bytes);
        close(fd);
    }
    pclose(list);
    assert_true(n > 0);
}

static void test_corrupt_rows(void **state)
{
    fixture *f = *state;
    uint64_t context;
    char value[VALUE_BYTES];
    const uint32_t picks[] = {0 * 64 + 1, 1 * 64 + 5, 2 * 64 + 7, 1 * 64 + 6, 0 * 64 + 2};
    put_many(f, 0, 3, KVC_PROMISE_DURABLE);
    close_server(f, false);
    h_fill(1, 0, ROW, value);
    damage(f->dir, value + 5 * ROW);
    open_server(f);
    uint64_t corrupt = kvc_metric_get(KVC_M_corrupt_values);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 3, 0, &context), KVC_OK);
    assert_int_equal(h_fetch(f->peer, context, 0, picks, 5), KVC_OK);
    assert_int_equal(f->peer->n_missing, 2);
    assert_int_equal(f->peer->missing[0].index, 1);
    assert_int_equal(f->peer->missing[0].status, KVC_CORRUPT);
    assert_int_equal(f->peer->missing[1].index, 3);
    assert_int_equal(f->peer->data_bytes, 3 * ROW);
    assert_true(h_row_is(0, 0, 1, ROW, f->peer->data));
    assert_true(h_row_is(2, 0, 7, ROW, f->peer->data + ROW));
    assert_true(h_row_is(0, 0, 2, ROW, f->peer->data + 2 * ROW));
    assert_int_equal(kvc_metric_get(KVC_M_corrupt_values), corrupt + 1);
    /* The value is gone and can be put again. */
    assert_int_equal(h_fetch(f->peer, context, 0, &picks[1], 1), KVC_OK);
    assert_int_equal(f->peer->missing[0].status, KVC_NOT_FOUND);
    kvs_server_tick(f->h.server);
    assert_int_equal(h_put1(f->peer, &f->schema, 1, 0, KVC_PROMISE_DURABLE), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 5);
}

/* Flips one byte of a row in dram, as broken memory would. */
static void damage_dram(kvs_server *server, const void *row)
{
    kvs_dram_segment segments[64];
    uint32_t n, flipped = 0;
    kvs_dram_segments(server->dram.tier, segments, 64, &n);
    for (uint32_t i = 0; i < n; i++) {
        char *base = (char *)(uintptr_t)segments[i].base;
        for (uint64_t at = 0; at + ROW <= segments[i].len_bytes; at += ROW) {
            if (memcmp(base + at, row, ROW) == 0) {
                base[at + 9] ^= 0x40;
                flipped++;
            }
        }
    }
    assert_int_equal(flipped, 1);
}

/* More dirty values than the writer takes at once, the first of them waiting for their commit: a
   byte that changes in the memory of the last before it is written comes to light from lmdb. */
static void test_altered_before_write_behind(void **state)
{
    enum { N = 160 };
    fixture *f = *state;
    uint64_t context;
    char value[VALUE_BYTES];
    const uint32_t picks[] = {(N - 1) * H_TOKENS + 5, (N - 1) * H_TOKENS + 6};
    close_server(f, true);
    f->h.settings.dram_bytes = 4 * N * VALUE_BYTES;
    f->h.settings.group_commit_ns = 1000000000;
    open_server(f);
    put_many(f, 3000, N, KVC_PROMISE_MEMORY);
    h_fill(3000 + N - 1, 0, ROW, value);
    damage_dram(f->h.server, value + 5 * ROW);
    restart(f, true);
    assert_int_equal(h_open(f->peer, &f->schema, 3000, N, 0, &context), KVC_OK);
    assert_int_equal(h_fetch(f->peer, context, 0, picks, 2), KVC_OK);
    assert_int_equal(f->peer->n_missing, 2);
    assert_int_equal(f->peer->missing[0].status, KVC_CORRUPT);
    assert_int_equal(f->peer->data_bytes, 0);
}

static void test_promotion(void **state)
{
    fixture *f = *state;
    uint64_t context;
    uint32_t picks[H_TOKENS], rows_dram = 0;
    put_many(f, 0, 3, KVC_PROMISE_DURABLE);
    restart(f, false);
    for (uint32_t i = 0; i < H_TOKENS; i++)
        picks[i] = i;
    assert_int_equal(h_open(f->peer, &f->schema, 0, 3, 0, &context), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 15); /* below a quarter of 64 rows */
    nap_ms(50);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 1);
    assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_lmdb, 1);
    for (int tries = 0; rows_dram == 0 && tries < 30000; tries++) {
        h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 20);
        rows_dram = f->peer->xfer.reply.u.fetch_rows.rows_dram;
        nap_ms(2);
    }
    assert_int_equal(rows_dram, 20);
}

/* ---- faults ---------------------------------------------------------------------------------- */

static void restart_with_faults(fixture *f, const char *dram, const char *lmdb)
{
    close_server(f, true);
    f->h.settings.dram_fault = dram;
    f->h.settings.lmdb_fault = lmdb;
    open_server(f);
}

/* A failed write is answered as such and leaves nothing; the next one works. */
static void test_failing_writes(void **state)
{
    fixture *f = *state;
    uint64_t context;
    uint32_t failed = 0;
    const uint32_t pick = 9;
    const char *faults[] = {"write=every:3:IO", "done=every:3:IO", "write=every:3:NO_SPACE"};
    for (uint32_t i = 0; i < 3; i++) {
        restart_with_faults(f, NULL, faults[i]);
        for (uint64_t b = 100 * i; b < 100 * i + 12; b++) {
            kvc_status status = h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_DURABLE);
            assert_int_equal(count_hits(f, b, 1), status == KVC_OK);
            failed += status != KVC_OK;
            if (status != KVC_OK)
                status = h_put1(f->peer, &f->schema, b, 0, KVC_PROMISE_DURABLE);
            assert_int_equal(status, KVC_OK);
            assert_int_equal(h_open(f->peer, &f->schema, b, 1, 0, &context), KVC_OK);
            h_fetch_equal(f->peer, &f->schema, context, b, 0, &pick, 1);
        }
    }
    assert_true(failed >= 12);
    restart_with_faults(f, NULL, NULL);
    for (uint32_t i = 0; i < 3; i++)
        assert_int_equal(count_hits(f, 100 * i, 13), 12);
}

/* A read error concerns its rows only and does not drop the value. */
static void test_failing_reads(void **state)
{
    fixture *f = *state;
    uint64_t context;
    const uint32_t picks[] = {3, 64 + 3, 128 + 3};
    put_many(f, 0, 3, KVC_PROMISE_DURABLE);
    restart_with_faults(f, NULL, "read=first:1:IO");
    assert_int_equal(h_open(f->peer, &f->schema, 0, 3, 0, &context), KVC_OK);
    assert_int_equal(h_fetch(f->peer, context, 0, picks, 3), KVC_OK);
    assert_int_equal(f->peer->n_missing, 1);
    assert_int_equal(f->peer->missing[0].index, 0);
    assert_int_equal(f->peer->missing[0].status, KVC_IO);
    assert_int_equal(f->peer->data_bytes, 2 * ROW);
    assert_true(h_row_is(1, 0, 3, ROW, f->peer->data));
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 3);
}

/* Slow reads and a short deadline: the call times out, the server goes on. On a busy machine the
   rows may be there before the client looks at the clock: then again, slower. */
static void test_deadline_on_disk(void **state)
{
    fixture *f = *state;
    const uint64_t long_ns = f->peer->timeout_ns;
    uint64_t context;
    uint32_t picks[40];
    char fault[64];
    kvc_status status = KVC_OK;
    put_many(f, 0, 40, KVC_PROMISE_DURABLE);
    for (uint32_t i = 0; i < 40; i++)
        picks[i] = i * H_TOKENS;
    for (uint32_t us = 20000; status == KVC_OK && us < 1000000; us *= 4) {
        (void)snprintf(fault, sizeof(fault), "read=delay_us:%u", us);
        restart_with_faults(f, NULL, fault);
        assert_int_equal(h_open(f->peer, &f->schema, 0, 40, 0, &context), KVC_OK);
        f->peer->timeout_ns = 50000000;
        status = h_fetch(f->peer, context, 0, picks, 40);
        f->peer->timeout_ns = long_ns;
    }
    assert_int_equal(status, KVC_TIMED_OUT);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 2);
}

/* One attempt at the test below, with a read that takes so long, and its own block and schema.
   False: the machine was so busy that something else happened. */
static bool try_the_disk_queue(fixture *f, uint64_t block, const char *name, uint32_t delay_us)
{
    const uint32_t pick = 0;
    const uint64_t long_ns = f->peer->timeout_ns;
    uint64_t context, behind = kvc_metric_get(KVC_M_written_behind_values);
    uint32_t hits;
    h_schema late;
    char fault[64];
    (void)snprintf(fault, sizeof(fault), "read=delay_us:%u", delay_us);
    restart_with_faults(f, NULL, fault);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 1, 0, &context), KVC_OK);
    put_many(f, block, 1, KVC_PROMISE_MEMORY);
    for (int i = 0; i < 12000 && kvc_metric_get(KVC_M_written_behind_values) == behind; i++)
        nap_ms(5);
    f->peer->timeout_ns = 50000000;
    bool as_meant = h_fetch(f->peer, context, 0, &pick, 1) == KVC_TIMED_OUT;
    uint64_t syncs = kvc_metric_get(KVC_M_lmdb_syncs); /* the one disk thread is busy now */
    h_schema_init(&late, name, 1, ROW, false);
    as_meant = h_put1(f->peer, &f->schema, block, 0, KVC_PROMISE_DURABLE) == KVC_TIMED_OUT &&
               h_register(f->peer, &late) == KVC_TIMED_OUT && as_meant;
    f->peer->timeout_ns = long_ns;
    nap_ms(delay_us / 1000 + 200);
    if (!as_meant)
        return false;
    assert_int_equal(kvc_metric_get(KVC_M_lmdb_syncs), syncs);
    assert_int_equal(h_match(f->peer, &late, 0, 1, NULL, 0, &hits), KVC_NOT_FOUND);
    assert_int_equal(h_put1(f->peer, &f->schema, block, 0, KVC_PROMISE_DURABLE), KVC_EXISTS);
    assert_true(kvc_metric_get(KVC_M_lmdb_syncs) > syncs);
    return true;
}

/* What waited for a disk thread until nobody wanted it is not done any more. */
static void test_deadline_in_the_disk_queue(void **state)
{
    static const char *const names[] = {"late", "later", "latest", "last"};
    fixture *f = *state;
    uint32_t delay_us = 600000;
    bool done = false;
    put_many(f, 0, 1, KVC_PROMISE_DURABLE);
    f->h.settings.disk_threads = 1;
    for (uint32_t i = 0; !done && i < 4; i++, delay_us *= 3)
        done = try_the_disk_queue(f, 1 + i, names[i], delay_us);
    assert_true(done);
}

/* With dram refusing everything, puts write through to lmdb; with lmdb full too, they get AGAIN. */
static void test_dram_refuses(void **state)
{
    fixture *f = *state;
    uint64_t context;
    const uint32_t picks[] = {5, 70};
    restart_with_faults(f, "reserve=every:1:AGAIN", NULL);
    put_many(f, 0, 2, KVC_PROMISE_MEMORY);
    put_many(f, 2, 2, KVC_PROMISE_DURABLE);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 4, 0, &context), KVC_OK);
    h_fetch_equal(f->peer, &f->schema, context, 0, 0, picks, 2);
    assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_lmdb, 2);
    restart_with_faults(f, "reserve=every:1:AGAIN", "write=every:1:AGAIN");
    assert_int_equal(h_put1(f->peer, &f->schema, 9, 0, KVC_PROMISE_MEMORY), KVC_AGAIN);
    assert_int_equal(h_put1(f->peer, &f->schema, 9, 0, KVC_PROMISE_DURABLE), KVC_AGAIN);
    assert_int_equal(count_hits(f, 9, 1), 0);
}

/* A schema found in lmdb belongs to the tenant that registered it. */
static void test_other_tenant_is_kept_apart(void **state)
{
    fixture *f = *state;
    put_many(f, 0, 2, KVC_PROMISE_DURABLE);
    restart(f, false);
    kvc_digest other;
    assert_int_equal(kvc_sha256("other", 5, &other), KVC_OK);
    assert_null(kvs_schemas_find(f->h.server->schemas, &other, &f->schema.digest));
    assert_int_equal(kvs_schemas_count(f->h.server->schemas), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_rows_from_lmdb, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lmdb_for_another_size, setup, teardown),
        cmocka_unit_test_setup_teardown(test_durable_survives, setup, teardown),
        cmocka_unit_test_setup_teardown(test_write_behind, setup, teardown),
        cmocka_unit_test_setup_teardown(test_second_use, setup, teardown),
        cmocka_unit_test_setup_teardown(test_write_budget, setup, teardown),
        cmocka_unit_test_setup_teardown(test_write_budget_is_recorded_first, setup, teardown),
        cmocka_unit_test_setup_teardown(test_flush, setup, teardown),
        cmocka_unit_test_setup_teardown(test_durable_after_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lmdb_full, setup, teardown),
        cmocka_unit_test_setup_teardown(test_corrupt_rows, setup, teardown),
        cmocka_unit_test_setup_teardown(test_altered_before_write_behind, setup, teardown),
        cmocka_unit_test_setup_teardown(test_promotion, setup, teardown),
        cmocka_unit_test_setup_teardown(test_failing_writes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_failing_reads, setup, teardown),
        cmocka_unit_test_setup_teardown(test_deadline_on_disk, setup, teardown),
        cmocka_unit_test_setup_teardown(test_deadline_in_the_disk_queue, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dram_refuses, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_tenant_is_kept_apart, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
