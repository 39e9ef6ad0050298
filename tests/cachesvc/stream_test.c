/*
 * stream_test.c: FetchRowsStream and FetchBlocks against a whole server: every byte right, messages
 * within their limit, pins gone when the client goes, and each kind of bad input.
 */
#include "harness.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/fault.h"
#include "index.h"

#define ROW   4096u
#define VALUE (ROW * H_TOKENS) /* 256 KiB */
#define N     24u              /* blocks: 6 MiB a part */

typedef struct env {
    h_server h;
    h_schema schema;
    h_peer *peer;
    uint64_t context;
    char dir[256];
} env;

/* A server with N blocks of two parts and an open context over them. lmdb: dram holds a third. */
static void env_open(env *e, bool lmdb)
{
    memset(e, 0, sizeof(*e));
    h_server_init(&e->h);
    e->h.settings.dram_bytes = 64ull << 20;
    if (lmdb) {
        h_temp_dir(e->dir);
        e->h.settings.lmdb_path = e->dir;
        e->h.settings.lmdb_bytes = 256ull << 20;
        e->h.settings.dram_bytes = 4ull << 20;
        e->h.settings.promote_percent = 0;
    }
    h_server_start(&e->h);
    e->peer = h_connect(e->h.listen, NULL);
    e->peer->timeout_ns = 60ull * 1000000000;
    h_schema_init(&e->schema, "streams", 2, ROW, false);
    assert_int_equal(h_register(e->peer, &e->schema), KVC_OK);
    for (uint64_t b = 0; b < N; b++)
        for (uint32_t p = 0; p < 2; p++)
            assert_int_equal(h_put1(e->peer, &e->schema, b, 10 * p,
                                    lmdb ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY),
                             KVC_OK);
    assert_int_equal(h_open(e->peer, &e->schema, 0, N + 1, 0, &e->context), KVC_OK);
}

static uint32_t referenced(kvs_index *index)
{
    uint32_t n = 0;
    kvc_mutex_lock(&index->lock);
    for (uint32_t id = 1; id < index->values.next; id++)
        n += kvs_value_at(index, id)->refs;
    kvc_mutex_unlock(&index->lock);
    return n;
}

/* Of reply buffers that are handed out. */
static uint64_t buffer_bytes(kvs_buffers *pool)
{
    kvc_mutex_lock(&pool->lock);
    uint64_t bytes = pool->held_bytes;
    for (const kvs_buffer *kept = pool->free_big; kept; kept = kept->next)
        bytes -= kept->total_bytes;
    kvc_mutex_unlock(&pool->lock);
    return bytes;
}

/* Nothing may be left of what was kept for a client. */
static void assert_nothing_kept(const env *e)
{
    for (int i = 0; i < 5000 && atomic_load(&e->h.server->lent_bytes); i++)
        usleep(1000);
    assert_int_equal(atomic_load(&e->h.server->lent_bytes), 0);
    for (int i = 0; i < 5000 && buffer_bytes(&e->h.server->buffers); i++)
        usleep(1000);
    assert_int_equal(buffer_bytes(&e->h.server->buffers), 0);
    for (int i = 0; i < 5000 && referenced(e->h.server->index); i++)
        usleep(1000);
    assert_int_equal(referenced(e->h.server->index), 0);
}

static void env_close(env *e)
{
    assert_nothing_kept(e);
    h_disconnect(e->peer);
    h_server_stop(&e->h, false);
    h_server_fini(&e->h);
    if (e->dir[0])
        h_remove_dir(e->dir);
}

static kvc_status stream_rows(env *e, const kvc_row_group *groups, uint32_t n)
{
    kvc_request req = {.method = KVC_FETCH_ROWS_STREAM};
    req.u.fetch_rows.groups = groups;
    req.u.fetch_rows.n_groups = n;
    return h_call(e->peer, &req);
}

static kvc_status stream_blocks(env *e, uint64_t first, uint32_t n, const uint32_t *parts,
                                uint32_t n_parts)
{
    kvc_digest *digests = calloc(n + 1, sizeof(*digests));
    kvc_request req = {.method = KVC_FETCH_BLOCKS};
    for (uint32_t i = 0; i < n; i++)
        digests[i] = h_digest(first + i);
    req.u.fetch_blocks.schema = e->schema.digest;
    req.u.fetch_blocks.digests = digests;
    req.u.fetch_blocks.n_digests = n;
    req.u.fetch_blocks.parts = parts;
    req.u.fetch_blocks.n_parts = n_parts;
    kvc_status status = h_call(e->peer, &req);
    free(digests);
    return status;
}

/* Rows of both parts in a random order, some past the end and some missing, 8 MiB and more. */
static void check_rows(env *e)
{
    uint64_t seed = 77;
    uint32_t picks[2][1500];
    kvc_row_group groups[3] = {{.context = e->context, .part = 0, .n_picks = 1500},
                               {.context = e->context, .part = 10, .n_picks = 0},
                               {.context = e->context, .part = 10, .n_picks = 1500}};
    for (uint32_t g = 0; g < 2; g++)
        for (uint32_t i = 0; i < 1500; i++)
            picks[g][i] = (uint32_t)(h_random(&seed) % ((N + 2) * H_TOKENS));
    groups[0].picks = picks[0];
    groups[1].picks = picks[0];
    groups[2].picks = picks[1];
    assert_int_equal(stream_rows(e, groups, 3), KVC_OK);
    assert_int_equal(e->peer->n_picks, 3000);
    assert_true(e->peer->max_data_bytes <= KVC_MAX_VALUE_BYTES);
    assert_true(e->peer->n_messages >= 11);
    uint64_t at = 0;
    uint32_t m = 0;
    for (uint32_t i = 0; i < 3000; i++) {
        uint32_t g = i / 1500, pick = picks[g][i % 1500];
        if (pick >= N * H_TOKENS) {
            assert_int_equal(e->peer->missing[m].index, i);
            assert_int_equal(e->peer->missing[m++].status, KVC_NOT_FOUND);
            continue;
        }
        assert_true(h_row_is(pick / H_TOKENS, 10 * g, pick % H_TOKENS, ROW, e->peer->data + at));
        at += ROW;
    }
    assert_int_equal(m, e->peer->n_missing);
    assert_int_equal(at, e->peer->data_bytes);
    assert_int_equal(e->peer->rows_dram + e->peer->rows_lmdb, 3000 - m);
}

/* Values of blocks that are there and of some that are not, parts in the order asked for. */
static void check_blocks(env *e, bool lmdb)
{
    static const uint32_t parts[] = {10, 0};
    uint32_t n_found = 0, n_lmdb = 0;
    assert_int_equal(stream_blocks(e, N - 20, 30, parts, 2), KVC_OK);
    assert_int_equal(e->peer->n_values, 60);
    assert_true(e->peer->max_data_bytes <= KVC_MAX_VALUE_BYTES);
    assert_true(e->peer->n_messages >= 10);
    uint64_t at = 0;
    for (uint32_t i = 0; i < 60; i++) {
        const kvc_block_value *value = &e->peer->values[i];
        uint64_t b = N - 20 + i / 2;
        assert_int_equal(value->block, i / 2);
        assert_int_equal(value->part, parts[i % 2]);
        assert_int_equal(value->status, b < N ? KVC_OK : KVC_NOT_FOUND);
        if (b >= N)
            continue;
        assert_int_equal(value->len_bytes, VALUE);
        for (uint32_t row = 0; row < H_TOKENS; row++)
            assert_true(h_row_is(b, value->part, row, ROW, e->peer->data + at + (size_t)row * ROW));
        at += VALUE;
        n_found++;
        n_lmdb += value->tier == KVC_TIER_LMDB;
        assert_true(value->tier == KVC_TIER_LMDB || value->tier == KVC_TIER_DRAM);
    }
    assert_int_equal(at, e->peer->data_bytes);
    assert_int_equal(n_found, 40);
    assert_true(lmdb ? n_lmdb >= 20 : n_lmdb == 0);
    /* Every part of the schema; a whole context's worth of messages. */
    assert_int_equal(stream_blocks(e, 0, N, NULL, 0), KVC_OK);
    assert_int_equal(e->peer->n_values, 2 * N);
    assert_int_equal(e->peer->data_bytes, 2ull * N * VALUE);
    assert_int_equal(stream_blocks(e, 0, 0, NULL, 0), KVC_OK);
    assert_int_equal(e->peer->n_messages, 0);
}

static void rows_and_blocks_from_dram(void **state)
{
    (void)state;
    env e;
    env_open(&e, false);
    check_rows(&e);
    check_blocks(&e, false);
    assert_int_equal(e.peer->rows_lmdb, 0);
    env_close(&e);
}

/* So little dram that nothing may be lent: values are copied. */
static void blocks_are_copied(void **state)
{
    (void)state;
    env e;
    env_open(&e, false);
    e.h.server->settings.dram_bytes = 4; /* what the share of dram that may be lent is taken from */
    check_rows(&e);
    check_blocks(&e, false);
    assert_int_equal(atomic_load(&e.h.server->lent_bytes), 0);
    env_close(&e);
}

static void nothing_to_send(void **state)
{
    (void)state;
    env e;
    env_open(&e, false);
    assert_int_equal(stream_rows(&e, NULL, 0), KVC_OK);
    assert_int_equal(e.peer->n_messages, 0);
    uint32_t far[] = {0xffffffff, N * H_TOKENS, 5};
    kvc_row_group group = {.context = e.context, .n_picks = 3, .picks = far};
    assert_int_equal(stream_rows(&e, &group, 1), KVC_OK);
    assert_int_equal(e.peer->n_missing, 2);
    assert_int_equal(e.peer->data_bytes, ROW);
    env_close(&e);
}

static void refused(void **state)
{
    (void)state;
    env e;
    env_open(&e, false);
    uint32_t picks[2] = {0, 1};
    kvc_row_group groups[2] = {{.context = e.context, .n_picks = 2, .picks = picks},
                               {.context = e.context, .part = 3, .n_picks = 2, .picks = picks}};
    assert_int_equal(stream_rows(&e, groups, 2), KVC_INVALID);
    assert_string_equal(e.peer->xfer.detail, "group 1: part 3 is not in the schema");
    assert_int_equal(e.peer->n_messages, 0); /* nothing was sent before all was checked */
    groups[1].part = 0;
    groups[1].context ^= 1ull << 50;
    assert_int_equal(stream_rows(&e, groups, 2), KVC_STALE_HANDLE);
    static const uint32_t wrong[] = {0, 5};
    assert_int_equal(stream_blocks(&e, 0, 1, wrong, 2), KVC_INVALID);
    assert_string_equal(e.peer->xfer.detail, "part 5 is not in the schema");
    static const uint32_t many[] = {0, 0, 0};
    assert_int_equal(stream_blocks(&e, 0, 1, many, 3), KVC_INVALID);
    e.schema.digest.bytes[0] ^= 1;
    assert_int_equal(stream_blocks(&e, 0, 1, NULL, 0), KVC_NOT_FOUND);
    env_close(&e);
}

static void cancel_at_second(h_peer *peer)
{
    if (peer->n_messages == 2)
        peer->ops->cancel(peer->conn, &peer->xfer);
}

/* A client that goes away in the middle leaves nothing behind, whatever the tier. */
static void cancelled(env *e)
{
    e->peer->on_message = cancel_at_second;
    for (int i = 0; i < 20; i++) {
        assert_int_equal(stream_blocks(e, 0, N, NULL, 0), KVC_CANCELLED);
        assert_true(e->peer->n_messages < 2 * N / 4);
        assert_nothing_kept(e);
    }
    e->peer->on_message = NULL;
    check_blocks(e, e->dir[0] != 0);
}

static void client_goes_away(void **state)
{
    (void)state;
    env e;
    env_open(&e, false);
    cancelled(&e);
    env_close(&e);
}

static void buffers_run_out(void **state)
{
    (void)state;
    env e;
    env_open(&e, false);
    uint64_t cap = e.h.server->buffers.cap_bytes;
    e.h.server->buffers.cap_bytes = 0;
    e.h.server->settings.dram_bytes = 4;
    assert_int_equal(stream_blocks(&e, 0, N, NULL, 0), KVC_AGAIN);
    assert_true(e.peer->xfer.retry_after_ms > 0);
    e.h.server->buffers.cap_bytes = cap;
    check_blocks(&e, false);
    env_close(&e);
}

typedef struct reader {
    env *e;
    kvc_thread thread;
    kvc_status status;
} reader;

static atomic_bool stalled;

static void stand_still(h_peer *peer)
{
    (void)peer;
    while (atomic_load(&stalled))
        usleep(1000);
}

static void read_slowly(void *arg)
{
    reader *r = arg;
    env mine = *r->e;
    mine.peer = h_connect(r->e->h.listen, NULL);
    mine.peer->timeout_ns = 60ull * 1000000000;
    mine.peer->on_message = stand_still;
    r->status = stream_blocks(&mine, 0, N, NULL, 0);
    h_disconnect(mine.peer);
}

/* Readers that stand still take three quarters of the reply buffers at most: one who asks for rows
   gets them. Some streams are refused for it, the others end well once they are read. */
static void readers_stand_still(void **state)
{
    (void)state;
    env e;
    reader readers[12];
    uint32_t n_ok = 0, pick = 70;
    env_open(&e, false);
    kvc_row_group group = {.context = e.context, .n_picks = 1, .picks = &pick};
    e.h.server->settings.dram_bytes = 4; /* nothing is lent: all is copied */
    e.h.server->buffers.cap_bytes = 8u << 20;
    atomic_store(&stalled, true);
    for (uint32_t i = 0; i < 12; i++) {
        readers[i] = (reader){.e = &e};
        assert_int_equal(kvc_thread_start(&readers[i].thread, "reader", read_slowly, &readers[i]),
                         KVC_OK);
    }
    for (int i = 0; i < 20000 && atomic_load(&e.h.server->buffers.out_bytes) < 4u << 20; i++)
        usleep(1000);
    usleep(300000); /* nor does it grow on */
    uint64_t out_bytes = atomic_load(&e.h.server->buffers.out_bytes);
    kvc_request req = {.method = KVC_FETCH_ROWS};
    req.u.fetch_rows.groups = &group;
    req.u.fetch_rows.n_groups = 1;
    kvc_status status = h_call(e.peer, &req);
    atomic_store(&stalled, false);
    for (uint32_t i = 0; i < 12; i++) {
        kvc_thread_join(&readers[i].thread);
        assert_true(readers[i].status == KVC_OK || readers[i].status == KVC_AGAIN);
        n_ok += readers[i].status == KVC_OK;
    }
    assert_int_equal(status, KVC_OK);
    assert_true(out_bytes >= 4u << 20 && out_bytes <= 7u << 20);
    assert_true(n_ok >= 3);
    env_close(&e);
}

#ifdef KVASIR_LMDB
static void wait_a_little(h_peer *peer)
{
    (void)peer;
    usleep(3000);
}

/* A disk thread notes that the last piece is ready and is slow to go on, while the transport passes
   on the message before it: the stream must not be sent, ended and freed under that thread. */
static void ends_under_a_slow_thread(void **state)
{
    (void)state;
    env e;
    env_open(&e, true);
    e.peer->on_message = wait_a_little;
    assert_int_equal(kvc_fault_arm("stream.noted=always"), KVC_OK);
    for (uint32_t n = 5; n <= 9; n++) {
        assert_int_equal(stream_blocks(&e, 0, n, NULL, 0), KVC_OK);
        assert_int_equal(e.peer->n_values, 2 * n);
    }
    assert_true(kvc_fault_failures("stream.noted") > 5 * 2);
    assert_int_equal(kvc_fault_arm(""), KVC_OK);
    e.peer->on_message = NULL;
    env_close(&e);
}

static void rows_and_blocks_from_lmdb(void **state)
{
    (void)state;
    env e;
    env_open(&e, true);
    check_rows(&e);
    check_blocks(&e, true);
    cancelled(&e);
    env_close(&e);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_and_blocks_from_dram), cmocka_unit_test(blocks_are_copied),
        cmocka_unit_test(nothing_to_send),           cmocka_unit_test(refused),
        cmocka_unit_test(client_goes_away),          cmocka_unit_test(buffers_run_out),
        cmocka_unit_test(readers_stand_still),
#ifdef KVASIR_LMDB
        cmocka_unit_test(rows_and_blocks_from_lmdb), cmocka_unit_test(ends_under_a_slow_thread),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
