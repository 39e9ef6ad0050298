/*
 * opaque_test.c: opaque values through the protocol: every length, presence of all pieces or none,
 * first put wins for the whole, and bad input. With lmdb: opaque_store_test.c.
 */
#include <stdlib.h>
#include <string.h>

#include "opaque_support.h"

static void every_length(void **state)
{
    (void)state;
    o_rig *r = o_rig_create(false);
    o_rig_start(r);
    o_put_and_get_all(r, KVC_PROMISE_MEMORY);
    h_check_caps(&r->h);
    for (uint32_t i = 0; i < O_N_LENGTHS; i++) {
        assert_int_equal(o_erase(r->peer, &r->schema, i), o_pieces(o_lengths[i]));
        assert_false(o_there(r->peer, &r->schema, i));
    }
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* A call about one key of an opaque schema that must be refused, saying so. */
static void refuse(o_rig *r, const kvc_request *req, kvc_status status, const char *text)
{
    assert_int_equal(h_call(r->peer, req), status);
    if (!strstr(r->peer->xfer.detail, text))
        fail_msg("\"%s\" does not say \"%s\"", r->peer->xfer.detail, text);
}

static void refuse_put(o_rig *r, kvc_put_value value, size_t data_bytes, const char *text)
{
    static uint8_t bytes[KVC_MAX_VALUE_BYTES];
    struct iovec iov = {bytes, data_bytes};
    kvc_request req = {.method = KVC_PUT_BLOCKS, .data = &iov, .n_data = 1};
    value.digest = o_key(&r->schema, 99);
    req.data_bytes = data_bytes;
    req.u.put_blocks.schema = r->schema.digest;
    req.u.put_blocks.promise = KVC_PROMISE_MEMORY;
    req.u.put_blocks.n_values = 1;
    req.u.put_blocks.values = &value;
    refuse(r, &req, KVC_INVALID, text);
}

static void bad_puts(void **state)
{
    (void)state;
    o_rig *r = o_rig_create(false);
    o_rig_start(r);
    uint64_t huge = (uint64_t)KVC_MAX_PIECES * O_PIECE;
#define PUT(part_, len, total, sum_)                                                               \
    (kvc_put_value)                                                                                \
    {                                                                                              \
        .part = (part_), .len_bytes = (len), .whole = {(total), (sum_) }                           \
    }
    refuse_put(r, PUT(1, 10, 10, 1), 10, "part is not the number of a piece");
    refuse_put(r, PUT(0, 10, 11, 1), 10, "len_bytes is not that of this piece");
    refuse_put(r, PUT(0, 10, O_PIECE + 10, 1), 10, "len_bytes is not that of this piece");
    refuse_put(r, PUT(1, 11, O_PIECE + 10, 1), 11, "len_bytes is not that of this piece");
    refuse_put(r, PUT(1, 10, O_PIECE + 10, 0), 10, "needs its sum");
    refuse_put(r, PUT(0, O_PIECE, huge + 1, 1), O_PIECE, "more pieces than a value can have");
    refuse_put(r, PUT(0, O_PIECE, ~0ull, 1), O_PIECE, "more pieces than a value can have");
    refuse_put(r, PUT(0, 10, 10, 1), 9, "the payload has 9");
#undef PUT
    assert_false(o_there(r->peer, &r->schema, 99));
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* The server computes the sum of a value of one piece, and compares one that was given. */
static void sums_of_one_piece(void **state)
{
    (void)state;
    o_rig *r = o_rig_create(false);
    o_rig_start(r);
    uint8_t *content = o_content(3, 5000);
    struct iovec iov[2] = {{content, 4999}, {content + 4999, 1}};
    kvc_put_value value = {.digest = o_key(&r->schema, 3), .len_bytes = 5000, .whole = {5000, 77}};
    kvc_request req = {.method = KVC_PUT_BLOCKS, .data = iov, .n_data = 2, .data_bytes = 5000};
    req.u.put_blocks.schema = r->schema.digest;
    req.u.put_blocks.promise = KVC_PROMISE_MEMORY;
    req.u.put_blocks.n_values = 1;
    req.u.put_blocks.values = &value;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->peer->status[0], KVC_INVALID);
    assert_false(o_there(r->peer, &r->schema, 3));
    value.whole.sum = 0;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->peer->status[0], KVC_OK);
    o_get_equal(r->peer, &r->schema, 3, 3, 5000); /* checks the sum that comes back */
    free(content);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

static void refused_calls(void **state)
{
    (void)state;
    const uint32_t part = 0;
    o_rig *r = o_rig_create(false);
    o_rig_start(r);
    kvc_digest key = o_key(&r->schema, 1);
    assert_int_equal(o_put(r->peer, &r->schema, 1, 1, 10, KVC_PROMISE_MEMORY, 0), KVC_OK);
    kvc_request req = {.method = KVC_OPEN_CONTEXT};
    req.u.open_context.schema = r->schema.digest;
    req.u.open_context.digests = &key;
    req.u.open_context.n_digests = 1;
    refuse(r, &req, KVC_INVALID, "opaque");
    req = (kvc_request){.method = KVC_PUT_CONTEXT};
    req.u.put_context.context =
        (kvc_saved_context){.name = "a", .schema = r->schema.digest, .promise = KVC_PROMISE_MEMORY};
    req.u.put_context.upload = 1;
    refuse(r, &req, KVC_INVALID, "opaque");
    req = (kvc_request){.method = KVC_MATCH_PREFIX};
    req.u.match_prefix.schema = r->schema.digest;
    req.u.match_prefix.n_parts = 1;
    req.u.match_prefix.parts = &part;
    refuse(r, &req, KVC_INVALID, "opaque");
    req = (kvc_request){.method = KVC_FETCH_BLOCKS};
    req.u.fetch_blocks.schema = r->schema.digest;
    req.u.fetch_blocks.n_parts = 1;
    req.u.fetch_blocks.parts = &part;
    refuse(r, &req, KVC_INVALID, "opaque");
    req = (kvc_request){.method = KVC_ERASE};
    req.u.erase.schema = r->schema.digest;
    req.u.erase.n_parts = 1;
    req.u.erase.parts = &part;
    refuse(r, &req, KVC_INVALID, "opaque");
    o_get_equal(r->peer, &r->schema, 1, 1, 10);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* Pieces in any order; before the last one came there is nothing. Another value waits for it. */
static void whole_or_nothing(void **state)
{
    (void)state;
    const size_t len_bytes = 3 * O_PIECE + 5000;
    uint8_t *value;
    size_t n;
    o_rig *r = o_rig_create(false);
    o_rig_start(r);
    for (uint32_t i = 4; i-- > 0;) {
        assert_false(o_there(r->peer, &r->schema, 1));
        assert_int_equal(o_get(r->peer, &r->schema, 1, &value, &n), KVC_NOT_FOUND);
        assert_int_equal(o_put_piece(r->peer, &r->schema, 1, 5, len_bytes, i, KVC_PROMISE_MEMORY),
                         KVC_OK);
        assert_int_equal(o_put_piece(r->peer, &r->schema, 1, 6, len_bytes, 0, KVC_PROMISE_MEMORY),
                         i ? KVC_AGAIN : KVC_EXISTS);
    }
    o_get_equal(r->peer, &r->schema, 1, 5, len_bytes);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* Values that do not all fit: each get is a whole value or NOT_FOUND, and some of both. */
static void eviction_takes_whole_values(void **state)
{
    (void)state;
    enum { N = 40 };
    const size_t len_bytes = 2 * O_PIECE + 300000;
    uint32_t whole = 0, gone = 0;
    uint8_t *value;
    size_t n;
    o_rig *r = o_rig_create(false);
    r->h.settings.dram_bytes = 40 << 20;
    o_rig_start(r);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(o_put(r->peer, &r->schema, i, i, len_bytes, KVC_PROMISE_MEMORY, 0),
                         KVC_OK);
    for (uint32_t i = 0; i < N; i++) {
        bool there = o_there(r->peer, &r->schema, i);
        kvc_status status = o_get(r->peer, &r->schema, i, &value, &n);
        assert_int_equal(status, there ? KVC_OK : KVC_NOT_FOUND);
        free(value);
        whole += there;
        gone += !there;
        if (there)
            o_get_equal(r->peer, &r->schema, i, i, len_bytes);
    }
    assert_true(whole > 0 && gone > 0);
    /* What lost a piece is mended by putting it again. */
    for (uint32_t i = 0; i < N; i++)
        if (!o_there(r->peer, &r->schema, i)) {
            assert_int_equal(o_put(r->peer, &r->schema, i, i, len_bytes, KVC_PROMISE_MEMORY, 0),
                             KVC_OK);
            o_get_equal(r->peer, &r->schema, i, i, len_bytes);
        }
    h_check_caps(&r->h);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* The pieces of a value do not push each other out: one that has no room for all is told so. */
static void no_room_for_itself(void **state)
{
    (void)state;
    o_rig *r = o_rig_create(false);
    r->h.settings.dram_bytes = 40 << 20;
    o_rig_start(r);
    assert_int_equal(o_put(r->peer, &r->schema, 1, 1, 3 * O_PIECE, KVC_PROMISE_MEMORY, 0), KVC_OK);
    assert_int_equal(o_put(r->peer, &r->schema, 2, 2, 60 * O_PIECE, KVC_PROMISE_MEMORY, 0),
                     KVC_AGAIN);
    assert_false(o_there(r->peer, &r->schema, 2));
    assert_int_equal(o_put(r->peer, &r->schema, 3, 3, 3 * O_PIECE, KVC_PROMISE_MEMORY, 0), KVC_OK);
    o_get_equal(r->peer, &r->schema, 3, 3, 3 * O_PIECE);
    h_check_caps(&r->h);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* Hold and Prefetch take keys as they are; the TTL of a put is tested with the streams. */
static void holds_of_keys(void **state)
{
    (void)state;
    enum { N = 40 };
    const size_t len_bytes = O_PIECE + 5000;
    o_rig *r = o_rig_create(false);
    r->h.settings.dram_bytes = 40 << 20;
    r->h.settings.max_hold_bytes = 16 << 20;
    o_rig_start(r);
    kvc_digest keys[2] = {o_key(&r->schema, 0), o_key(&r->schema, 1)};
    kvc_request req = {.method = KVC_HOLD};
    req.u.hold.schema = r->schema.digest;
    req.u.hold.digests = keys;
    req.u.hold.n_digests = 2;
    req.u.hold.ttl_ms = 600000;
    assert_int_equal(o_put(r->peer, &r->schema, 0, 0, len_bytes, KVC_PROMISE_MEMORY, 0), KVC_OK);
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->peer->xfer.reply.u.hold.n_blocks, 2);
    uint64_t hold = r->peer->xfer.reply.u.hold.hold;
    req.u.hold.hold = hold;
    assert_int_equal(h_call(r->peer, &req), KVC_INVALID);
    for (uint32_t i = 1; i < N; i++)
        assert_int_equal(o_put(r->peer, &r->schema, i, i, len_bytes, KVC_PROMISE_MEMORY, 0),
                         KVC_OK);
    o_get_equal(r->peer, &r->schema, 0, 0, len_bytes);
    o_get_equal(r->peer, &r->schema, 1, 1, len_bytes); /* came later, and is held too */
    assert_false(o_there(r->peer, &r->schema, 2));
    req = (kvc_request){.method = KVC_RELEASE};
    req.u.release.hold = hold;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->h.server->index->held_total, 0);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* A first piece that cannot be read now says nothing of those behind it in its message. */
static void busy_first_piece(void **state)
{
    (void)state;
    enum { PIECE = 64 << 10, LEN = PIECE + 100, READERS = UINT16_MAX - 1 };
    uint8_t *value, *content = o_content(1, LEN);
    size_t n;
    o_rig *r = o_rig_create(false);
    r->h.settings.max_value_bytes = PIECE;
    o_rig_start(r);
    kvc_digest key = o_key(&r->schema, 1);
    kvc_put_value values[2] = {{.digest = key, .len_bytes = PIECE, .whole = o_whole(content, LEN)},
                               {.digest = key, .part = 1, .len_bytes = LEN - PIECE}};
    values[1].whole = values[0].whole;
    struct iovec iov = {content, LEN};
    kvc_request req = {.method = KVC_PUT_BLOCKS, .data = &iov, .n_data = 1, .data_bytes = LEN};
    req.u.put_blocks.schema = r->schema.digest;
    req.u.put_blocks.promise = KVC_PROMISE_MEMORY;
    req.u.put_blocks.n_values = 2;
    req.u.put_blocks.values = values;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_true(r->peer->status[0] == KVC_OK && r->peer->status[1] == KVC_OK);

    kvs_index *index = r->h.server->index;
    const kvc_digest *name = &key;
    const uint16_t first = KVS_OPAQUE_MORE;
    const kvs_schema *schema = r->h.server->schemas->by_id[1];
    kvs_read read;
    for (uint32_t i = 0; i < READERS; i++) {
        kvs_index_ref_named(index, schema, &name, &first, &read, 1);
        assert_int_equal(read.where, KVS_IN_DRAM);
    }
    assert_int_equal(o_get(r->peer, &r->schema, 1, &value, &n), KVC_AGAIN);
    for (uint32_t i = 0; i < READERS; i++)
        kvs_index_unref(index, &read.value, 1);
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_true(r->peer->status[0] == KVC_EXISTS && r->peer->status[1] == KVC_EXISTS);
    free(content);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* ---- two writers, one key -------------------------------------------------------------------- */

enum { RACES = 24 };

typedef struct writer {
    o_rig *rig;
    uint64_t seed;
    size_t len_bytes;
    kvc_status result[RACES];
} writer;

static void race(void *arg)
{
    writer *w = arg;
    h_peer *peer = h_connect(w->rig->h.listen, "default");
    for (uint32_t i = 0; i < RACES; i++)
        w->result[i] = o_put(peer, &w->rig->schema, i, w->seed, w->len_bytes, KVC_PROMISE_MEMORY,
                             kvc_deadline_ns(60000000000ull));
    h_disconnect(peer);
}

/* Of two values put under one key at once exactly one is there in the end, whole; its writer heard
   OK and the other one EXISTS. Lengths that differ, and lengths that do not. */
static void two_writers(size_t a_bytes, size_t b_bytes)
{
    o_rig *r = o_rig_create(false);
    o_rig_start(r);
    writer *w = calloc(2, sizeof(*w));
    kvc_thread threads[2];
    w[0] = (writer){.rig = r, .seed = 1, .len_bytes = a_bytes};
    w[1] = (writer){.rig = r, .seed = 2, .len_bytes = b_bytes};
    for (uint32_t i = 0; i < 2; i++)
        assert_int_equal(kvc_thread_start(&threads[i], "writer", race, &w[i]), KVC_OK);
    for (uint32_t i = 0; i < 2; i++)
        kvc_thread_join(&threads[i]);
    for (uint32_t i = 0; i < RACES; i++) {
        bool first = w[0].result[i] == KVC_OK;
        assert_int_equal(w[first ? 1 : 0].result[i], KVC_EXISTS);
        assert_int_equal(w[first ? 0 : 1].result[i], KVC_OK);
        o_get_equal(r->peer, &r->schema, i, first ? 1 : 2, first ? a_bytes : b_bytes);
    }
    free(w);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

static void writers_of_one_length(void **state)
{
    (void)state;
    two_writers(O_PIECE + 70000, O_PIECE + 70000);
}

static void writers_of_two_lengths(void **state)
{
    (void)state;
    two_writers(O_PIECE + 70000, 3000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_length),          cmocka_unit_test(bad_puts),
        cmocka_unit_test(sums_of_one_piece),     cmocka_unit_test(refused_calls),
        cmocka_unit_test(whole_or_nothing),      cmocka_unit_test(eviction_takes_whole_values),
        cmocka_unit_test(no_room_for_itself),    cmocka_unit_test(holds_of_keys),
        cmocka_unit_test(writers_of_one_length), cmocka_unit_test(writers_of_two_lengths),
        cmocka_unit_test(busy_first_piece),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
