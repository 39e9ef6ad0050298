/*
 * opaque_store_test.c: opaque values over lmdb: restarts, what a crash can leave, damage.
 */
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/sum.h"
#include "opaque_support.h"

static void every_length_survives_a_restart(void **state)
{
    (void)state;
    o_rig *r = o_rig_create(true);
    o_rig_start(r);
    o_put_and_get_all(r, KVC_PROMISE_DURABLE);
    h_check_caps(&r->h);
    o_rig_stop(r, false);
    o_rig_start(r);
    for (uint32_t i = 0; i < O_N_LENGTHS; i++) {
        o_get_equal(r->peer, &r->schema, i, 7, o_lengths[i]);
        assert_int_equal(o_put(r->peer, &r->schema, i, 7, o_lengths[i], KVC_PROMISE_DURABLE, 0),
                         KVC_EXISTS);
    }
    for (uint32_t i = 0; i < O_N_LENGTHS; i += 2)
        assert_int_equal(o_erase(r->peer, &r->schema, i), o_pieces(o_lengths[i]));
    o_rig_stop(r, false);
    o_rig_start(r);
    for (uint32_t i = 0; i < O_N_LENGTHS; i++)
        assert_int_equal(o_there(r->peer, &r->schema, i), i % 2);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* Part of a value is durable when the server ends: nothing of it is seen, and it can be completed,
   or replaced at once by another, since nobody can be at it. */
static void torn_by_a_restart(void **state)
{
    (void)state;
    const size_t len_bytes = 2 * O_PIECE + 9;
    uint8_t *value;
    size_t n;
    o_rig *r = o_rig_create(true);
    o_rig_start(r);
    for (uint32_t key = 0; key < 2; key++)
        for (uint32_t i = 0; i < 3; i += 2)
            assert_int_equal(
                o_put_piece(r->peer, &r->schema, key, 5, len_bytes, i, KVC_PROMISE_DURABLE),
                KVC_OK);
    o_rig_stop(r, false);
    o_rig_start(r);
    for (uint32_t key = 0; key < 2; key++)
        assert_int_equal(o_get(r->peer, &r->schema, key, &value, &n), KVC_NOT_FOUND);
    assert_int_equal(o_put(r->peer, &r->schema, 0, 5, len_bytes, KVC_PROMISE_DURABLE, 0), KVC_OK);
    o_get_equal(r->peer, &r->schema, 0, 5, len_bytes);
    assert_int_equal(o_put(r->peer, &r->schema, 1, 6, len_bytes, KVC_PROMISE_DURABLE,
                           kvc_deadline_ns(60000000000ull)),
                     KVC_OK);
    o_get_equal(r->peer, &r->schema, 1, 6, len_bytes);
    o_rig_stop(r, false);
    o_rig_start(r);
    o_get_equal(r->peer, &r->schema, 0, 5, len_bytes);
    o_get_equal(r->peer, &r->schema, 1, 6, len_bytes);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

static void loaded_ahead(void **state)
{
    (void)state;
    const size_t len_bytes = O_PIECE + 5000;
    o_rig *r = o_rig_create(true);
    o_rig_start(r);
    assert_int_equal(o_put(r->peer, &r->schema, 0, 0, len_bytes, KVC_PROMISE_DURABLE, 0), KVC_OK);
    o_rig_stop(r, false);
    o_rig_start(r);
    kvc_digest keys[2] = {o_key(&r->schema, 0), o_key(&r->schema, 1)};
    kvc_request req = {.method = KVC_PREFETCH};
    req.u.prefetch.schema = r->schema.digest;
    req.u.prefetch.digests = keys;
    req.u.prefetch.n_digests = 2;
    req.u.prefetch.tier = KVC_TIER_DRAM;
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.moved, 2);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.missing, 1);
    o_get_equal(r->peer, &r->schema, 0, 0, len_bytes);
    for (uint32_t i = 0; i < r->peer->n_values; i++)
        assert_int_equal(r->peer->values[i].tier, KVC_TIER_DRAM);
    assert_int_equal(h_call(r->peer, &req), KVC_OK);
    assert_int_equal(r->peer->xfer.reply.u.prefetch.there, 2);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

static bool ignore_found(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                         uint32_t n_rows)
{
    (void)arg;
    (void)key;
    (void)slot;
    return row_bytes > 0 && n_rows > 0;
}

static void stray_done(kvs_tier_write *write)
{
    atomic_store((atomic_bool *)write->arg, true);
}

/* A piece of a value in lmdb, in the room of this code; NO_CODE: the one that it belongs into. */
#define NO_CODE KVS_OPAQUE_CODES
static void add_piece(o_rig *r, uint64_t key, uint64_t seed, size_t len_bytes, uint32_t piece,
                      uint32_t code)
{
    const kvs_tier_ops *ops = kvs_tier_find("lmdb");
    const char *tenant = "default";
    kvs_tier_opts opts = {.size_bytes = sizeof(opts),
                          .capacity_bytes = r->h.settings.lmdb_bytes,
                          .path = r->dir,
                          .group_commit_ns = 1000000,
                          .group_commit_bytes = 1,
                          .max_value_bytes = 2 * O_PIECE};
    kvs_part rooms[KVS_OPAQUE_CODES];
    kvs_schema schema = {.piece_bytes = O_PIECE, .parts = rooms};
    uint8_t *content = o_content(seed, len_bytes), *room = calloc(2, O_PIECE);
    kvc_whole whole = o_whole(content, len_bytes);
    kvs_opaque_id id = {whole.total_bytes, whole.sum};
    uint32_t sums[KVS_PIECE_ROWS];
    atomic_bool done = false;
    kvs_tier *tier;
    kvs_opaque_rooms(O_PIECE, rooms);
    uint16_t place = kvs_opaque_place(&schema, len_bytes, piece);
    if (code != NO_CODE)
        place = (uint16_t)(piece * KVS_OPAQUE_CODES + code);
    const kvs_part *part = kvs_part_at(&schema, place);
    memcpy(room, content + (size_t)piece * O_PIECE,
           kvs_opaque_piece_bytes(&schema, len_bytes, piece));
    kvs_opaque_seal(&schema, place, &id, room);
    kvc_row_sums(room, part->row_bytes, part->n_rows, sums);
    kvs_tier_write write = {.row_bytes = part->row_bytes,
                            .n_rows = part->n_rows,
                            .rows = room,
                            .row_sums = sums,
                            .durable = true,
                            .done = stray_done,
                            .arg = &done};
    write.key.schema = r->schema.digest;
    write.key.block = o_key(&r->schema, key);
    write.key.part = kvs_opaque_key_part(kvs_opaque_tag(&schema, &id), place);
    assert_int_equal(kvc_sha256(tenant, strlen(tenant), &write.key.tenant), KVC_OK);
    assert_int_equal(ops->open(&opts, &tier), KVC_OK);
    assert_int_equal(ops->recover(tier, ignore_found, NULL), KVC_OK);
    assert_int_equal(ops->write(tier, &write), KVC_OK);
    ops->close(tier);
    assert_true(atomic_load(&done) && write.status == KVC_OK);
    free(content);
    free(room);
}

/* Of another value, as a crash between a removal and a put can leave one. */
static void add_stray(o_rig *r, uint64_t key, uint64_t seed, size_t len_bytes, uint32_t piece)
{
    add_piece(r, key, seed, len_bytes, piece, NO_CODE);
}

/* What a server before the smallest room stored is in the next one: it is read, stays, and can be
   erased and put again. */
static void from_before_the_small_room(void **state)
{
    (void)state;
    o_rig *r = o_rig_create(true);
    o_rig_start(r);
    assert_int_equal(o_put(r->peer, &r->schema, 1, 5, 1024, KVC_PROMISE_DURABLE, 0), KVC_OK);
    o_rig_stop(r, false);
    add_piece(r, 2, 6, 1024, 0, 1);
    o_rig_start(r);
    for (uint32_t key = 1; key <= 2; key++) {
        o_get_equal(r->peer, &r->schema, key, 4 + key, 1024);
        assert_int_equal(o_put(r->peer, &r->schema, key, 4 + key, 1024, KVC_PROMISE_DURABLE, 0),
                         KVC_EXISTS);
        o_get_equal(r->peer, &r->schema, key, 4 + key, 1024);
    }
    assert_int_equal(o_erase(r->peer, &r->schema, 2), 1);
    assert_int_equal(o_put(r->peer, &r->schema, 2, 7, 1024, KVC_PROMISE_DURABLE, 0), KVC_OK);
    o_rig_stop(r, false);
    o_rig_start(r);
    o_get_equal(r->peer, &r->schema, 2, 7, 1024);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* What small values take of lmdb: a page each, and their share of the tree. */
static void small_values_take_little(void **state)
{
    (void)state;
    enum { SMALL = 1000, MOST_BYTES = 4096 + 512 };
    kvs_tier_usage before, after;
    o_rig *r = o_rig_create(true);
    o_rig_start(r);
    const kvs_store *lmdb = &r->h.server->lmdb;
    lmdb->ops->usage(lmdb->tier, &before);
    for (uint32_t i = 0; i < SMALL; i++)
        assert_int_equal(o_put(r->peer, &r->schema, i, i, 1024, KVC_PROMISE_MEMORY,
                               kvc_deadline_ns(60000000000ull)),
                         KVC_OK);
    o_rig_stop(r, true);
    o_rig_start(r);
    lmdb = &r->h.server->lmdb;
    lmdb->ops->usage(lmdb->tier, &after);
    assert_int_equal(after.values - before.values, SMALL);
    uint64_t each = (after.used_bytes - before.used_bytes) / SMALL;
    print_message("lmdb takes %llu bytes for a value of 1024\n", (unsigned long long)each);
    assert_in_range(each, 1024, MOST_BYTES);
    for (uint32_t i = 0; i < SMALL; i += 97)
        o_get_equal(r->peer, &r->schema, i, i, 1024);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* Pieces of two values under one key after a crash: what is whole stays, in whatever order they are
   met; of two that are not, none is seen. */
static void rivals_after_a_crash(void **state)
{
    (void)state;
    enum { STRAYS = 6 };
    const size_t len_bytes = O_PIECE + 900;
    uint8_t *value;
    size_t n;
    o_rig *r = o_rig_create(true);
    o_rig_start(r);
    for (uint32_t key = 0; key < STRAYS; key++)
        assert_int_equal(o_put(r->peer, &r->schema, key, 5, len_bytes, KVC_PROMISE_DURABLE, 0),
                         KVC_OK);
    assert_int_equal(o_put_piece(r->peer, &r->schema, 50, 5, len_bytes, 0, KVC_PROMISE_DURABLE),
                     KVC_OK);
    o_rig_stop(r, false);
    for (uint32_t key = 0; key < STRAYS; key++)
        add_stray(r, key, 100 + key, 2 * len_bytes + key * 5000, key % 2 ? 0 : 2);
    add_stray(r, 50, 6, len_bytes, 1);
    o_rig_start(r);
    for (uint32_t key = 0; key < STRAYS; key++)
        o_get_equal(r->peer, &r->schema, key, 5, len_bytes);
    assert_int_equal(o_get(r->peer, &r->schema, 50, &value, &n), KVC_NOT_FOUND);
    o_rig_stop(r, false);
    o_rig_start(r); /* the strays are gone for good */
    for (uint32_t key = 0; key < STRAYS; key++)
        o_get_equal(r->peer, &r->schema, key, 5, len_bytes);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* Finds the bytes in the file of an environment and changes one of them. */
static void damage(const char *dir, uint32_t pages, const uint8_t *bytes, size_t n)
{
    char path[512];
    uint32_t hits = 0;
    (void)snprintf(path, sizeof(path), "%s/class-%u/data.mdb", dir, pages);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0);
    off_t len_bytes = lseek(fd, 0, SEEK_END);
    uint8_t *map = mmap(NULL, (size_t)len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(map != MAP_FAILED);
    for (uint8_t *at = map, *end = map + len_bytes;
         (at = memmem(at, (size_t)(end - at), bytes, n)) != NULL; at += n, hits++)
        at[n / 2] ^= 0x10;
    assert_true(hits > 0);
    munmap(map, (size_t)len_bytes);
    close(fd);
}

/* A wrong byte in any piece: the value is not served, gone after that, and can be put again. */
static void damaged_pieces(void **state)
{
    (void)state;
    const size_t len_bytes = 2 * O_PIECE + 9;
    uint8_t *value, *content = o_content(5, len_bytes);
    size_t n;
    o_rig *r = o_rig_create(true);
    o_rig_start(r);
    for (uint32_t key = 0; key < 2; key++)
        assert_int_equal(
            o_put(r->peer, &r->schema, key, 5 + key, len_bytes, KVC_PROMISE_DURABLE, 0), KVC_OK);
    o_rig_stop(r, false);
    damage(r->dir, 258, content + O_PIECE + 100, 64);
    o_rig_start(r);
    assert_int_equal(o_get(r->peer, &r->schema, 0, &value, &n), KVC_CORRUPT);
    assert_int_equal(o_get(r->peer, &r->schema, 0, &value, &n), KVC_NOT_FOUND);
    o_get_equal(r->peer, &r->schema, 1, 6, len_bytes);
    kvs_server_tick(r->h.server);
    assert_int_equal(o_put(r->peer, &r->schema, 0, 5, len_bytes, KVC_PROMISE_DURABLE, 0), KVC_OK);
    o_get_equal(r->peer, &r->schema, 0, 5, len_bytes);
    free(content);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

/* What a reader that stands still between two messages finds when it goes on. */
typedef struct swap {
    o_rig *rig;
    h_peer *other;
    size_t len_bytes;
    uint32_t n_messages;
    uint64_t n_erased; /* and put: what became of it */
    kvc_status put;
} swap;

static swap swapped;

/* Another value in the place of the one that is being read, before its second piece is looked up.
 */
static void swap_values(h_peer *peer)
{
    (void)peer;
    if (swapped.n_messages++)
        return;
    const h_schema *schema = &swapped.rig->schema;
    swapped.n_erased = o_erase(swapped.other, schema, 7);
    swapped.put = o_put(swapped.other, schema, 7, 2, swapped.len_bytes, KVC_PROMISE_DURABLE,
                        kvc_deadline_ns(60000000000ull));
}

static void replaced_under_a_reader(void **state)
{
    (void)state;
    uint8_t *value;
    size_t n;
    kvs_buffer *taken;
    o_rig *r = o_rig_create(true);
    /* There, what a message points at is released before its reader has taken it. */
    (void)snprintf(r->h.listen, sizeof(r->h.listen), "shm://%s.sock", r->dir);
    o_rig_start(r);
    swapped = (swap){.rig = r, .len_bytes = 3 * O_PIECE - 5000};
    assert_int_equal(o_put(r->peer, &r->schema, 7, 1, swapped.len_bytes, KVC_PROMISE_DURABLE, 0),
                     KVC_OK);
    swapped.other = h_connect(r->h.listen, "default");
    /* While buffers are short, no message is made before the one ahead of it was taken. */
    kvs_buffers *buffers = &r->h.server->buffers;
    assert_int_equal(kvs_buffer_get(buffers, (uint32_t)(buffers->cap_bytes / 2 + 1), &taken),
                     KVC_OK);
    r->peer->on_message = swap_values;
    assert_int_equal(o_get(r->peer, &r->schema, 7, &value, &n), KVC_NOT_FOUND);
    r->peer->on_message = NULL;
    kvs_buffer_release(taken);
    assert_int_equal(swapped.n_erased, o_pieces(swapped.len_bytes));
    assert_int_equal(swapped.put, KVC_OK);
    o_get_equal(swapped.other, &r->schema, 7, 2, swapped.len_bytes);
    h_disconnect(swapped.other);
    o_rig_stop(r, false);
    o_rig_start(r);
    o_get_equal(r->peer, &r->schema, 7, 2, swapped.len_bytes);
    o_rig_stop(r, false);
    o_rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_length_survives_a_restart),
        cmocka_unit_test(torn_by_a_restart),
        cmocka_unit_test(loaded_ahead),
        cmocka_unit_test(rivals_after_a_crash),
        cmocka_unit_test(from_before_the_small_room),
        cmocka_unit_test(small_values_take_little),
        cmocka_unit_test(damaged_pieces),
        cmocka_unit_test(replaced_under_a_reader),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
