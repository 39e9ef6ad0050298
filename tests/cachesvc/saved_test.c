/*
 * saved_test.c: contexts saved by name: pieces, conditions, limits, restarts and what a failure on
 * the way leaves; one server in this process, with and without lmdb.
 */
#include "harness.h"

#include "base/metrics.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "saved.h"

#define ROW   512u
#define PIECE KVC_MIN_SAVED_PIECE

typedef struct fixture {
    h_server h;
    h_peer *peer;
    h_schema schema;
    char folder[256];
    uint64_t received, generation;
    uint8_t *body;
} fixture;

static const uint32_t tail_parts[] = {0, 20};

static void begin(fixture *f)
{
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
}

#ifdef KVASIR_LMDB
static void end(fixture *f)
{
    h_disconnect(f->peer);
    h_server_stop(&f->h, true);
}
#endif

static int start(void **state, bool has_lmdb)
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
    f->h.settings.max_saved = 4;
    f->h.settings.max_saved_bytes = 4u << 20;
    f->h.settings.max_saved_tenant_bytes = 4u << 20;
    begin(f);
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    f->body = malloc(4u << 20);
    assert_non_null(f->body);
    for (uint32_t i = 0; i < 4u << 20; i++)
        f->body[i] = (uint8_t)(i * 131 + (i >> 9));
    *state = f;
    return 0;
}

static int setup_memory(void **state)
{
    return start(state, false);
}

#ifdef KVASIR_LMDB
static int setup_lmdb(void **state)
{
    return start(state, true);
}
#endif

static int teardown(void **state)
{
    fixture *f = *state;
    h_disconnect(f->peer);
    h_server_fini(&f->h);
    if (f->folder[0])
        h_remove_dir(f->folder);
    free(f->body);
    free(f);
    return 0;
}

/* A context of n_blocks, with ids and a tail of 3 tokens in both parts. */
static kvc_request put_of(fixture *f, const char *name, uint32_t n_blocks, uint64_t upload)
{
    kvc_request req = {.method = KVC_PUT_CONTEXT};
    req.u.put_context.upload = upload;
    req.u.put_context.context = (kvc_saved_context){.name = name,
                                                    .schema = f->schema.digest,
                                                    .promise = KVC_PROMISE_MEMORY,
                                                    .n_blocks = n_blocks,
                                                    .n_ids = n_blocks * H_TOKENS + 3,
                                                    .n_tail = 3,
                                                    .n_tail_parts = 2,
                                                    .tail_parts = tail_parts};
    return req;
}

static uint64_t size_of(const kvc_request *put)
{
    const kvc_saved_context *c = &put->u.put_context.context;
    return c->n_blocks * 32ull + c->n_ids * 4ull + (uint64_t)c->n_tail * c->n_tail_parts * ROW;
}

/* Bytes off .. off + len of the body, which begins at first in f->body. */
static kvc_status put_piece(fixture *f, kvc_request *req, uint32_t first, uint64_t off,
                            uint64_t len)
{
    uint64_t half = len / 2;
    struct iovec data[2] = {{f->body + first + off, half}, {f->body + first + off + half, 0}};
    data[1].iov_len = len - half;
    req->u.put_context.offset = off;
    req->data = data;
    req->n_data = 2;
    req->data_bytes = len;
    kvc_status status = h_call(f->peer, req);
    f->received = status == KVC_OK ? f->peer->xfer.reply.u.put_context.received : 0;
    f->generation = status == KVC_OK ? f->peer->xfer.reply.u.put_context.generation : 0;
    return status;
}

/* All of it; the generation is in f. */
static kvc_status put_all(fixture *f, kvc_request *req, uint32_t first)
{
    uint64_t size = size_of(req);
    kvc_status status = KVC_OK;
    for (uint64_t at = 0; at < size && status == KVC_OK; at += PIECE) {
        uint64_t len = size - at < PIECE ? size - at : PIECE;
        status = put_piece(f, req, first, at, len);
        if (status == KVC_OK)
            assert_int_equal(f->received, at + len);
        if (status == KVC_OK)
            assert_true((f->generation != 0) == (at + len == size));
    }
    return status;
}

static kvc_status get(h_peer *peer, const char *name, uint64_t generation, uint64_t offset)
{
    kvc_request req = {.method = KVC_GET_CONTEXT};
    req.u.get_context.name = name;
    req.u.get_context.generation = generation;
    req.u.get_context.offset = offset;
    return h_call(peer, &req);
}

/* What is saved is what put says, its body from first in f->body on. */
static void check_saved(fixture *f, const kvc_request *put, uint32_t first, uint64_t generation)
{
    uint64_t size = size_of(put), at = 0;
    const kvc_saved_context *want = &put->u.put_context.context;
    while (at < size) {
        assert_int_equal(get(f->peer, want->name, at ? generation : 0, at), KVC_OK);
        const kvc_saved_context *got = &f->peer->xfer.reply.u.get_context.context;
        assert_int_equal(got->generation, generation);
        assert_int_equal(got->n_blocks, want->n_blocks);
        assert_int_equal(got->n_ids, want->n_ids);
        assert_int_equal(got->n_tail, want->n_tail);
        assert_int_equal(got->n_tail_parts, want->n_tail_parts);
        assert_int_equal(got->body_bytes, size);
        assert_memory_equal(&got->schema, &want->schema, sizeof(got->schema));
        assert_true(f->peer->data_bytes > 0 && f->peer->data_bytes <= size - at);
        assert_memory_equal(f->peer->data, f->body + first + at, f->peer->data_bytes);
        at += f->peer->data_bytes;
    }
    assert_int_equal(get(f->peer, want->name, generation, size), KVC_INVALID);
}

static uint32_t count(h_peer *peer, const char *after, uint32_t max, bool *more_p)
{
    kvc_request req = {.method = KVC_LIST_CONTEXTS};
    req.u.list_contexts.after = after;
    req.u.list_contexts.max = max;
    assert_int_equal(h_call(peer, &req), KVC_OK);
    *more_p = peer->xfer.reply.u.list_contexts.more;
    return peer->xfer.reply.u.list_contexts.n_contexts;
}

static kvc_status erase(h_peer *peer, const char *name, uint64_t if_generation)
{
    kvc_request req = {.method = KVC_DELETE_CONTEXT};
    req.u.delete_context.name = name;
    req.u.delete_context.if_generation = if_generation;
    return h_call(peer, &req);
}

/* Without certificates every peer is one tenant, so the table is asked as for another. */
static void check_other_tenant(fixture *f, const char *name)
{
    kvs_saved *saved = f->h.server->saved;
    const kvc_digest other = {{1, 2, 3}};
    char why[KVS_SAVED_WHY_BYTES];
    kvs_saved_got got;
    kvc_saved_context *list;
    uint32_t n;
    bool more;
    kvc_arena arena;
    kvc_arena_init(&arena, 1u << 20);
    assert_int_equal(kvs_saved_get(saved, &other, name, 0, &arena, &got, why), KVC_NOT_FOUND);
    assert_int_equal(kvs_saved_delete(saved, &other, name, 0, why), KVC_NOT_FOUND);
    assert_int_equal(kvs_saved_list(saved, &other, "", 9, &arena, &list, &n, &more), KVC_OK);
    assert_int_equal(n, 0);
    assert_false(more);
    kvc_arena_reset(&arena);
}

static void test_round_trip(void **state)
{
    fixture *f = *state;
    bool more;
    kvc_request big = put_of(f, "big", 5000, 7), small = put_of(f, "a", 0, 8);
    assert_int_equal(get(f->peer, "big", 0, 0), KVC_NOT_FOUND);
    assert_int_equal(put_all(f, &big, 11), KVC_OK);
    uint64_t generation = f->generation;
    check_saved(f, &big, 11, generation);
    assert_int_equal(put_all(f, &small, 5), KVC_OK);
    assert_true(f->generation > generation);
    check_saved(f, &small, 5, f->generation);
    assert_int_equal(count(f->peer, "", 0, &more), 2);
    assert_false(more);
    assert_int_equal(count(f->peer, "", 1, &more), 1);
    assert_true(more);
    assert_int_equal(count(f->peer, "a", 0, &more), 1);
    assert_int_equal(count(f->peer, "aa", 0, &more), 1);
    assert_int_equal(count(f->peer, "big", 0, &more), 0);
    check_other_tenant(f, "big");
    assert_int_equal(erase(f->peer, "big", generation + 1), KVC_EXISTS);
    assert_int_equal(erase(f->peer, "big", generation), KVC_OK);
    assert_int_equal(erase(f->peer, "big", 0), KVC_NOT_FOUND);
    assert_int_equal(get(f->peer, "big", 0, 0), KVC_NOT_FOUND);
    assert_int_equal(count(f->peer, "", 0, &more), 1);
}

static void test_conditions(void **state)
{
    fixture *f = *state;
    kvc_request first = put_of(f, "x", 100, 1), next = put_of(f, "x", 200, 2);
    first.u.put_context.if_generation = 99;
    assert_int_equal(put_all(f, &first, 0), KVC_NOT_FOUND);
    first.u.put_context.if_generation = 0;
    assert_int_equal(put_all(f, &first, 0), KVC_OK);
    uint64_t g1 = f->generation;
    assert_int_equal(put_all(f, &next, 1), KVC_EXISTS);
    next.u.put_context.if_generation = g1 + 1;
    assert_int_equal(put_all(f, &next, 1), KVC_EXISTS);
    check_saved(f, &first, 0, g1);
    next.u.put_context.if_generation = g1;
    assert_int_equal(put_all(f, &next, 1), KVC_OK);
    check_saved(f, &next, 1, f->generation);
    assert_int_equal(get(f->peer, "x", g1, 0), KVC_NOT_FOUND);
    first.u.put_context.replace = true;
    first.u.put_context.upload = 3;
    assert_int_equal(put_all(f, &first, 2), KVC_OK);
    check_saved(f, &first, 2, f->generation);
    /* Two uploads of a free name at once: the one that ends first wins. */
    kvc_request a = put_of(f, "y", 3000, 4), b = put_of(f, "y", 3000, 5);
    assert_int_equal(put_piece(f, &a, 0, 0, PIECE), KVC_OK);
    assert_int_equal(put_all(f, &b, 9), KVC_OK);
    uint64_t won = f->generation, size = size_of(&a), at = PIECE;
    for (; size - at > PIECE; at += PIECE)
        assert_int_equal(put_piece(f, &a, 0, at, PIECE), KVC_OK);
    assert_int_equal(put_piece(f, &a, 0, at, size - at), KVC_EXISTS);
    check_saved(f, &b, 9, won);
}

static void test_pieces(void **state)
{
    fixture *f = *state;
    kvc_request req = put_of(f, "x", 1000, 1);
    uint64_t size = size_of(&req);
    assert_true(size > 4 * PIECE);
    assert_int_equal(put_piece(f, &req, 0, PIECE, PIECE), KVC_NOT_FOUND);
    assert_int_equal(put_piece(f, &req, 0, 0, PIECE - 1), KVC_INVALID);
    assert_int_equal(put_piece(f, &req, 0, 0, 0), KVC_INVALID);
    assert_int_equal(put_piece(f, &req, 0, 0, PIECE), KVC_OK);
    assert_int_equal(put_piece(f, &req, 0, 0, PIECE), KVC_OK); /* once more */
    assert_int_equal(f->received, PIECE);
    assert_int_equal(put_piece(f, &req, 0, PIECE, PIECE + 1), KVC_INVALID);
    assert_int_equal(put_piece(f, &req, 0, 2 * PIECE, PIECE), KVC_INVALID);
    assert_int_equal(put_piece(f, &req, 0, PIECE, size), KVC_INVALID);
    req.u.put_context.context.n_tail_parts = 1;
    assert_int_equal(put_piece(f, &req, 0, PIECE, PIECE), KVC_INVALID);
    req.u.put_context.context.n_tail_parts = 2;
    uint64_t at = PIECE;
    for (; size - at > PIECE; at += PIECE)
        assert_int_equal(put_piece(f, &req, 0, at, PIECE), KVC_OK);
    assert_int_equal(get(f->peer, "x", 0, 0), KVC_NOT_FOUND);
    assert_int_equal(put_piece(f, &req, 0, at, size - at), KVC_OK);
    uint64_t generation = f->generation;
    assert_int_equal(put_piece(f, &req, 0, at, size - at), KVC_OK); /* its answer was lost */
    assert_int_equal(f->generation, generation);
    check_saved(f, &req, 0, generation);
}

static void test_bad_shapes(void **state)
{
    fixture *f = *state;
    static const uint32_t twice[] = {0, 0}, unknown[] = {0, 21};
    kvc_request good = put_of(f, "x", 4, 1), req = good;
    req.u.put_context.context.n_tail = H_TOKENS;
    assert_int_equal(put_piece(f, &req, 0, 0, 100), KVC_INVALID);
    req = good;
    req.u.put_context.context.n_ids--;
    assert_int_equal(put_piece(f, &req, 0, 0, 100), KVC_INVALID);
    req = good;
    req.u.put_context.context.tail_parts = twice;
    assert_int_equal(put_piece(f, &req, 0, 0, 100), KVC_INVALID);
    req.u.put_context.context.tail_parts = unknown;
    assert_int_equal(put_piece(f, &req, 0, 0, 100), KVC_INVALID);
    req = good;
    req.u.put_context.context.n_blocks = req.u.put_context.context.n_ids = 0;
    req.u.put_context.context.n_tail_parts = 0;
    assert_int_equal(put_piece(f, &req, 0, 0, 0), KVC_INVALID);
    req = good;
    req.u.put_context.context.schema.bytes[0] ^= 1;
    assert_int_equal(put_piece(f, &req, 0, 0, 100), KVC_NOT_FOUND);
    req = good;
    req.u.put_context.context.promise = KVC_PROMISE_DURABLE;
    assert_int_equal(put_all(f, &req, 0), f->folder[0] ? KVC_OK : KVC_UNSUPPORTED);
}

static void test_limits(void **state)
{
    fixture *f = *state;
    bool more;
    char name[16];
    for (uint32_t i = 0; i < 4; i++) {
        snprintf(name, sizeof(name), "n%u", i);
        kvc_request req = put_of(f, name, 10, i + 1);
        assert_int_equal(put_all(f, &req, i), KVC_OK);
    }
    kvc_request fifth = put_of(f, "fifth", 10, 9), large = put_of(f, "n0", 20000, 10);
    assert_int_equal(put_all(f, &fifth, 0), KVC_NO_SPACE);
    assert_int_equal(erase(f->peer, "n3", 0), KVC_OK);
    large.u.put_context.replace = true;
    assert_int_equal(put_piece(f, &large, 0, 0, PIECE), KVC_NO_SPACE);
    assert_int_equal(put_all(f, &fifth, 0), KVC_OK);
    assert_int_equal(erase(f->peer, "n2", 0), KVC_OK);
    /* An upload takes a place until it rests for too long. */
    kvc_request half = put_of(f, "half", 1000, 11), other = put_of(f, "other", 1, 12);
    assert_int_equal(put_piece(f, &half, 0, 0, PIECE), KVC_OK);
    assert_int_equal(put_all(f, &other, 0), KVC_NO_SPACE);
    kvs_saved_sweep(f->h.server->saved, kvc_now_ns());
    assert_int_equal(put_piece(f, &half, 0, PIECE, PIECE), KVC_OK);
    kvs_saved_sweep(f->h.server->saved, kvc_now_ns() + 2 * KVS_SAVED_UPLOAD_NS);
    assert_int_equal(put_piece(f, &half, 0, 2 * PIECE, PIECE), KVC_NOT_FOUND);
    assert_int_equal(put_all(f, &other, 0), KVC_OK);
    assert_int_equal(count(f->peer, "", 0, &more), 4);
}

/* One tenant gets its share and no more, so another one still has room; each refusal counts. */
static void test_shares(void **state)
{
    fixture *f = *state;
    kvs_settings *settings = &f->h.server->settings;
    settings->max_saved_tenant_bytes = 0; /* half of 4 MiB */
    kvc_request first = put_of(f, "first", 1000, 1), large = put_of(f, "large", 9000, 2);
    kvc_request others = put_of(f, "others", 1000, 3);
    uint64_t refused = kvc_metric_get(KVC_M_saved_refused);
    assert_in_range(size_of(&large), 2u << 20, 3u << 20);
    assert_int_equal(put_all(f, &first, 0), KVC_OK);
    assert_int_equal(put_piece(f, &large, 0, 0, PIECE), KVC_NO_SPACE);
    assert_non_null(
        strstr(f->peer->xfer.detail, "the tenant's share of max_saved_bytes is 2097152"));
    assert_int_equal(kvc_metric_get(KVC_M_saved_refused), refused + 1);
    h_peer *mine = f->peer;
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "another");
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    assert_int_equal(put_all(f, &others, 1), KVC_OK);
    h_disconnect(f->peer);
    f->peer = mine;
    settings->max_saved_tenant_bytes = 4u << 20;
    assert_int_equal(put_all(f, &large, 0), KVC_OK);
}

static void test_get_schema(void **state)
{
    fixture *f = *state;
    kvc_request req = {.method = KVC_GET_SCHEMA};
    req.u.get_schema.schema = f->schema.digest;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    req.u.get_schema.schema.bytes[31] ^= 1;
    assert_int_equal(h_call(f->peer, &req), KVC_NOT_FOUND);
}

#ifdef KVASIR_LMDB
static bool count_record(void *arg, const char *name, const void *data, size_t len_bytes)
{
    (void)name;
    (void)data;
    (void)len_bytes;
    ++*(uint32_t *)arg;
    return true;
}

/* Records of all kinds but schemas. */
static uint32_t records(fixture *f)
{
    static const char *const prefixes[] = {"context/", "body/", "piece/"};
    kvs_store *lmdb = &f->h.server->lmdb;
    uint32_t n = 0;
    for (uint32_t i = 0; i < 3; i++)
        assert_int_equal(lmdb->ops->meta_each(lmdb->tier, prefixes[i], count_record, &n), KVC_OK);
    return n;
}

static void restart(fixture *f)
{
    end(f);
    begin(f);
}

static void test_restart(void **state)
{
    fixture *f = *state;
    kvc_request kept = put_of(f, "kept", 3000, 1), gone = put_of(f, "gone", 10, 2);
    kvc_request half = put_of(f, "half", 3000, 3), over = put_of(f, "kept", 2000, 4);
    assert_int_equal(put_all(f, &kept, 3), KVC_OK);
    uint64_t generation = f->generation;
    assert_int_equal(put_all(f, &gone, 4), KVC_OK);
    assert_int_equal(erase(f->peer, "gone", 0), KVC_OK);
    assert_int_equal(put_piece(f, &half, 0, 0, PIECE), KVC_OK);
    over.u.put_context.replace = true;
    assert_int_equal(put_piece(f, &over, 0, 0, PIECE), KVC_OK);
    uint32_t n_pieces = (uint32_t)((size_of(&kept) + PIECE - 1) / PIECE);
    assert_int_equal(records(f), n_pieces + 2 + 4);
    restart(f);
    assert_int_equal(records(f), n_pieces + 2); /* what was not finished has gone */
    check_saved(f, &kept, 3, generation);
    assert_int_equal(get(f->peer, "gone", 0, 0), KVC_NOT_FOUND);
    assert_int_equal(put_piece(f, &over, 0, PIECE, PIECE), KVC_NOT_FOUND);
    assert_int_equal(put_all(f, &over, 5), KVC_OK);
    assert_true(f->generation > generation);
    restart(f);
    check_saved(f, &over, 5, f->generation);
    assert_int_equal(erase(f->peer, "kept", 0), KVC_OK);
    assert_int_equal(records(f), 0);
}

/* A write that fails anywhere on the way leaves the old context, and the new one can be put. */
static void test_failing_writes(void **state)
{
    fixture *f = *state;
    kvc_request old = put_of(f, "x", 2000, 1), new = put_of(f, "x", 1500, 2);
    assert_int_equal(put_all(f, &old, 3), KVC_OK);
    uint64_t generation = f->generation;
    uint32_t n_old = records(f);
    new.u.put_context.replace = true;
    for (uint32_t n = 0; n < 4; n++) {
        char fault[64];
        snprintf(fault, sizeof(fault), "meta_put=after:%u", n);
        end(f);
        f->h.settings.lmdb_fault = fault;
        begin(f);
        assert_int_equal(put_all(f, &new, 7), KVC_IO);
        check_saved(f, &old, 3, generation);
        end(f);
        f->h.settings.lmdb_fault = NULL;
        begin(f);
        check_saved(f, &old, 3, generation);
        assert_int_equal(records(f), n_old);
    }
    assert_int_equal(put_all(f, &new, 7), KVC_OK);
    check_saved(f, &new, 7, f->generation);
}

/* A saved context keeps its schema, though no block is left. */
static void test_schema_stays(void **state)
{
    fixture *f = *state;
    kvc_request saved = put_of(f, "x", 1, 1), get_schema = {.method = KVC_GET_SCHEMA};
    get_schema.u.get_schema.schema = f->schema.digest;
    f->h.settings.schema_grace_ns = 1;
    assert_int_equal(put_all(f, &saved, 0), KVC_OK);
    restart(f);
    kvs_server_tick(f->h.server);
    assert_int_equal(h_call(f->peer, &get_schema), KVC_OK);
    assert_int_equal(erase(f->peer, "x", 0), KVC_OK);
    kvs_server_tick(f->h.server);
    assert_int_equal(h_call(f->peer, &get_schema), KVC_NOT_FOUND);
}
#endif

#define BOTH(test)                                                                                 \
    cmocka_unit_test_setup_teardown(test, setup_memory, teardown),                                 \
        cmocka_unit_test_setup_teardown(test, setup_lmdb, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
#ifdef KVASIR_LMDB
        BOTH(test_round_trip),
        BOTH(test_conditions),
        BOTH(test_pieces),
        BOTH(test_bad_shapes),
        BOTH(test_limits),
        BOTH(test_shares),
        cmocka_unit_test_setup_teardown(test_restart, setup_lmdb, teardown),
        cmocka_unit_test_setup_teardown(test_failing_writes, setup_lmdb, teardown),
        cmocka_unit_test_setup_teardown(test_schema_stays, setup_lmdb, teardown),
#else
        cmocka_unit_test_setup_teardown(test_round_trip, setup_memory, teardown),
        cmocka_unit_test_setup_teardown(test_conditions, setup_memory, teardown),
        cmocka_unit_test_setup_teardown(test_pieces, setup_memory, teardown),
        cmocka_unit_test_setup_teardown(test_bad_shapes, setup_memory, teardown),
        cmocka_unit_test_setup_teardown(test_limits, setup_memory, teardown),
        cmocka_unit_test_setup_teardown(test_shares, setup_memory, teardown),
#endif
        cmocka_unit_test_setup_teardown(test_get_schema, setup_memory, teardown),
    };
    return cmocka_run_group_tests_name("saved", tests, NULL, NULL);
}
