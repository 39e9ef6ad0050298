/*
 * hold_segments_test.c: what holds keep of dram's segments: no more than their values need where
 * they lie together, and of each tenant and all of them less than all there is. One server in this
 * process, with and without lmdb.
 */
#include "hold_rig.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/metrics.h"
#include "cascade.h"

static void release(fixture *f, uint64_t handle)
{
    kvc_request req = {.method = KVC_RELEASE};
    req.u.release.hold = handle;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
}

/* What put gives once a look in vain is not remembered any more. */
static kvc_status put_later(fixture *f, const h_schema *schema, uint64_t b)
{
    usleep(100000);
    return h_put1(f->peer, schema, b, 0, KVC_PROMISE_MEMORY);
}

/* A put of another size gets a segment: the one value that is held in it goes to another, where one
   value that nobody holds makes room for it. Nothing else of the first size goes. */
static void test_held_values_move(void **state)
{
    fixture *f = *state;
    uint64_t context, moved = kvc_metric_get(KVC_M_held_values_moved);
    (void)hold_one_of_each(f, &context);
    assert_int_equal(evictions(f), 0);
    put(f, &f->other, 1000, 1);
    assert_int_equal(kvc_metric_get(KVC_M_held_values_moved) - moved, 1);
    assert_int_equal(evictions(f), PER_SEGMENT);
    assert_int_equal(present(f, &f->schema, 0, N_ALL), N_ALL - PER_SEGMENT);
    assert_true(held_is_right(f->peer, context));
}

/* What somebody reads stays where it is, and so does all beside it; nothing goes in vain. */
static void test_readers_keep_values_in_place(void **state)
{
    fixture *f = *state;
    uint64_t context;
    kvs_read reads[N_SEGMENTS] = {{0}};
    uint32_t values[N_SEGMENTS];
    kvc_digest tenant, digests[N_SEGMENTS];
    const kvc_digest *names[N_SEGMENTS];
    const uint16_t parts[N_SEGMENTS] = {0};
    (void)hold_one_of_each(f, &context);
    assert_int_equal(kvc_sha256("default", 7, &tenant), KVC_OK);
    const kvs_schema *schema = kvs_schemas_find(f->h.server->schemas, &tenant, &f->schema.digest);
    for (uint32_t i = 0; i < N_SEGMENTS; i++) {
        digests[i] = h_digest(held_block(i));
        names[i] = &digests[i];
    }
    kvs_index_ref_named(f->h.server->index, schema, names, parts, reads, N_SEGMENTS);
    for (uint32_t i = 0; i < N_SEGMENTS; i++) {
        assert_int_equal(reads[i].where, KVS_IN_DRAM);
        values[i] = reads[i].value;
    }
    assert_int_equal(h_put1(f->peer, &f->other, 1000, 0, KVC_PROMISE_MEMORY), KVC_AGAIN);
    assert_int_equal(put_later(f, &f->other, 1000), KVC_AGAIN);
    assert_int_equal(evictions(f), 0);
    kvs_index_unref(f->h.server->index, values, N_SEGMENTS);
    assert_int_equal(put_later(f, &f->other, 1000), KVC_OK);
    assert_true(held_is_right(f->peer, context));
}

/* A value that somebody meets while it is copied stays where it is, and so does one that is erased.
 */
static void test_met_on_its_way(void **state)
{
    fixture *f = *state;
    kvs_index *index = f->h.server->index;
    const kvs_slot to = {77, 77};
    const kvs_segment segment = {0, 1};
    const uint16_t part = 0;
    uint64_t context;
    uint32_t cursor = 0;
    kvs_move move;
    kvs_erased erased = {0};
    kvs_read read = {0};
    (void)hold_one_of_each(f, &context);
    assert_false(kvs_evict_next_held(index, &(kvs_segment){0, 2}, &cursor, &move));
    cursor = 0;
    assert_true(kvs_evict_next_held(index, &segment, &cursor, &move));
    const kvc_digest *name = &move.key.block;
    kvs_index_ref_named(index, move.schema, &name, &part, &read, 1);
    assert_int_equal(read.value, move.value);
    assert_false(kvs_evict_moved(index, &move, &to));
    kvs_index_unref(index, &read.value, 1);
    cursor = 0;
    assert_true(kvs_evict_next_held(index, &segment, &cursor, &move));
    kvs_index_erase(index, move.schema, name, NULL, 0, &erased);
    assert_int_equal(erased.values, 1);
    assert_false(kvs_evict_moved(index, &move, &to));
    kvs_cascade_reap(f->h.server);
    assert_int_equal(present(f, &f->schema, 0, N_ALL), N_ALL - 1);
}

/* All of a segment is held, in all segments but one: there is room for what is held elsewhere only
   as far as that one goes, and nothing more is taken from anybody. */
static void test_no_room_to_move(void **state)
{
    fixture *f = *state;
    uint64_t context, handle, small;
    f->h.server->index->max_held = f->h.server->index->max_held_total = 8u << 20;
    put(f, &f->schema, 0, N_ALL);
    assert_int_equal(h_open(f->peer, &f->schema, 0, 7 * PER_SEGMENT, 0, &context), KVC_OK);
    assert_int_equal(hold(f, context, &handle), KVC_OK);
    /* The eighth segment would be the last that is left. */
    assert_int_equal(h_open(f->peer, &f->schema, 7 * PER_SEGMENT, 1, 0, &small), KVC_OK);
    assert_int_equal(hold(f, small, &handle), KVC_NO_SPACE);
    assert_non_null(strstr(f->peer->xfer.detail, "segments"));
    put(f, &f->other, 1000, 1);
    assert_int_equal(evictions(f), PER_SEGMENT);
    assert_int_equal(present(f, &f->schema, 0, N_ALL), 7 * PER_SEGMENT);
    /* A third size finds what the second has. */
    h_schema third;
    h_schema_init(&third, "third", 1, 3 * ROW, false);
    assert_int_equal(h_register(f->peer, &third), KVC_OK);
    assert_int_equal(put_later(f, &third, 2000), KVC_OK);
    assert_int_equal(present(f, &f->other, 1000, 1), 0);
    assert_int_equal(present(f, &f->schema, 0, N_ALL), 7 * PER_SEGMENT);
}

/* One value of a size keeps a segment, so a tenant may hold values of so many sizes. */
static void test_sizes_are_counted(void **state)
{
    fixture *f = *state;
    uint64_t context, handle = 0;
    h_schema sizes[N_SEGMENTS + 1];
    for (uint32_t i = 0; i < N_SEGMENTS; i++) {
        char model[16];
        (void)snprintf(model, sizeof(model), "size %u", i);
        h_schema_init(&sizes[i], model, 1, (3 + i) * ROW, false);
        assert_int_equal(h_register(f->peer, &sizes[i]), KVC_OK);
        put(f, &sizes[i], 10 * i, 1);
        assert_int_equal(h_open(f->peer, &sizes[i], 10 * i, 1, 0, &context), KVC_OK);
        assert_int_equal(hold(f, context, &handle), i < 7 ? KVC_OK : KVC_NO_SPACE);
    }
    put(f, &f->schema, 0, 1); /* the last segment goes to whoever needs it */
    put(f, &f->other, 0, 1);
    for (uint32_t i = 0; i < 7; i++)
        assert_int_equal(present(f, &sizes[i], 10 * i, 1), 1);
    assert_int_equal(h_open(f->peer, &sizes[6], 60, 1, 0, &context), KVC_OK);
    assert_int_equal(hold(f, context, &handle), KVC_OK); /* what is held already costs no more */
    release(f, handle);
}

typedef struct reader {
    h_peer *peer;
    uint64_t context;
    kvc_thread thread;
    atomic_bool stop, wrong;
    atomic_uint n;
} reader;

static void reader_main(void *arg)
{
    reader *r = arg;
    while (!atomic_load(&r->stop)) {
        if (!held_is_right(r->peer, r->context))
            atomic_store(&r->wrong, true);
        atomic_fetch_add(&r->n, 1);
    }
}

/* Size after size comes, gets a segment and is held, while a reader looks at what is held. */
static void test_moves_beside_readers(void **state)
{
    fixture *f = *state;
    static reader r;
    uint64_t context, handle, moved = kvc_metric_get(KVC_M_held_values_moved);
    memset(&r, 0, sizeof(r));
    (void)hold_one_of_each(f, &r.context);
    r.peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    assert_int_equal(kvc_thread_start(&r.thread, "reader", reader_main, &r), KVC_OK);
    for (uint32_t i = 0; i < 6; i++) {
        uint64_t until = kvc_deadline_ns(60 * SECOND);
        uint32_t n_reads = atomic_load(&r.n);
        h_schema size;
        h_schema_init(&size, "size", 1, (3 + i) * ROW, false);
        assert_int_equal(h_register(f->peer, &size), KVC_OK);
        while (h_put1(f->peer, &size, 1000, 0, KVC_PROMISE_MEMORY) != KVC_OK) {
            assert_true(kvc_now_ns() < until); /* the reader had what was to move */
            atomic_store(&f->h.server->no_segment_until_ns, 0);
        }
        assert_int_equal(h_open(f->peer, &size, 1000, 1, 0, &context), KVC_OK);
        assert_int_equal(hold(f, context, &handle), KVC_OK);
        while (atomic_load(&r.n) < n_reads + 3) {
            assert_true(kvc_now_ns() < until);
            usleep(1000);
        }
    }
    atomic_store(&r.stop, true);
    kvc_thread_join(&r.thread);
    assert_false(atomic_load(&r.wrong));
    assert_true(kvc_metric_get(KVC_M_held_values_moved) - moved >= 6);
    assert_true(evictions(f) <= 6 * PER_SEGMENT + 1); /* and one for a copy that came too late */
    assert_true(held_is_right(r.peer, r.context));
    h_disconnect(r.peer);
}

#ifdef KVASIR_LMDB
static int setup_lmdb(void **state)
{
    return start(state, true);
}

/* With lmdb, what is held keeps no segment once it was written there, however much it is. */
static void test_lmdb_frees_segments(void **state)
{
    fixture *f = *state;
    uint64_t context, handle, until = kvc_deadline_ns(60 * SECOND), next = 1000;
    kvs_index *index = f->h.server->index;
    put(f, &f->schema, 0, N_ALL);
    while (kvs_index_dirty_count(index) > 0) {
        assert_true(kvc_now_ns() < until);
        usleep(1000);
    }
    index->max_held = index->max_held_total = 8u << 20;
    assert_int_equal(h_open(f->peer, &f->schema, 0, N_ALL, 0, &context), KVC_OK);
    kvc_status status = KVC_NO_SPACE; /* the last that were written may not be known to be yet */
    for (uint32_t i = 0; status != KVC_OK && i < 60000; i++) {
        status = hold(f, context, &handle);
        usleep(1000);
    }
    assert_int_equal(status, KVC_OK);
    while (evictions(f) < PER_SEGMENT) {
        assert_true(kvc_now_ns() < until);
        (void)h_put1(f->peer, &f->other, next++, 0, KVC_PROMISE_MEMORY);
    }
    assert_int_equal(present(f, &f->schema, 0, N_ALL), N_ALL);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_held_values_move, setup, teardown),
        cmocka_unit_test_setup_teardown(test_readers_keep_values_in_place, setup, teardown),
        cmocka_unit_test_setup_teardown(test_met_on_its_way, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_room_to_move, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sizes_are_counted, setup, teardown),
        cmocka_unit_test_setup_teardown(test_moves_beside_readers, setup, teardown),
#ifdef KVASIR_LMDB
        cmocka_unit_test_setup_teardown(test_lmdb_frees_segments, setup_lmdb, teardown),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
