/*
 * index_bounds_test.c: what the index and the reply buffers may take: memory in proportion to what
 * is stored, eviction whose scans end, matches that keep their deadline. Memory is read from the
 * allocator, which knows nothing under a sanitizer; the rest is checked there too.
 */
#include "harness.h"

#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#include "buffers.h"
#include "evict.h"

#define N_PARTS KVC_MAX_PARTS

typedef struct fixture {
    kvs_schemas *schemas;
    kvs_index *index;
    const kvs_schema *schema;
    kvc_digest tenant;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    h_schema desc;
    f->schemas = kvs_schemas_create();
    f->index = kvs_index_create(f->schemas->by_id);
    f->tenant = h_digest(1000);
    h_schema_init(&desc, "wide", 1, 256, false);
    kvc_part *parts = calloc(N_PARTS, sizeof(*parts));
    for (uint32_t i = 0; i < N_PARTS; i++) {
        parts[i] = desc.parts[0];
        parts[i].part = 3 * i;
    }
    desc.schema.n_parts = N_PARTS;
    desc.schema.parts = parts;
    assert_int_equal(kvs_schemas_add(f->schemas, &f->tenant, &desc.schema, kvs_index_class,
                                     f->index, &f->schema, NULL),
                     KVC_OK);
    free(parts);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    kvs_index_destroy(f->index);
    kvs_schemas_destroy(f->schemas);
    free(f);
    return 0;
}

static uint64_t heap_bytes(void)
{
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

static uint32_t put(fixture *f, uint64_t b, uint32_t part, bool lmdb)
{
    kvc_digest digest = h_digest(b);
    kvs_slot slot = {b, part};
    uint32_t value;
    assert_int_equal(kvs_index_claim(f->index, f->schema, part, &digest, false, &value, &slot),
                     KVS_CLAIM_MINE);
    slot = (kvs_slot){b, part};
    if (lmdb)
        kvs_index_publish_lmdb(f->index, value, slot, true, NULL);
    else
        kvs_index_publish_dram(f->index, value, slot, false);
    return value;
}

/* One part of 4,096 in each block takes what one part takes, not what 4,096 would. */
static void test_memory_follows_values(void **state)
{
    fixture *f = *state;
    const uint64_t n = 20000;
    uint64_t before = heap_bytes();
    for (uint64_t b = 0; b < n; b++)
        put(f, b, (uint32_t)(b % N_PARTS), false);
    assert_true(heap_bytes() - before < n * 256 + (4u << 20)); /* slabs grow by pages */
    assert_int_equal(f->index->values.used, n);
}

static kvs_read ref(fixture *f, uint32_t block, uint32_t part)
{
    kvs_read read = {.block = block, .n_rows = 1};
    kvs_index_ref(f->index, f->schema, part, 0, 1, &read, 1);
    return read;
}

/* Parts of one block come and go in any order; every part is found exactly while it is there. */
static void test_parts_come_and_go(void **state)
{
    fixture *f = *state;
    static bool there[N_PARTS];
    kvc_digest digest = h_digest(7);
    uint32_t block;
    uint64_t seed = 4711;
    kvs_victim victim;
    memset(there, 0, sizeof(there));
    assert_int_equal(kvs_index_hold_blocks(f->index, f->schema, &digest, 1, &block), KVC_OK);
    for (uint32_t i = 0; i < 40000; i++) {
        bool grow = i / 10000 % 2 == 0; /* towards full, then towards empty, twice */
        uint32_t part = (uint32_t)(h_random(&seed) % N_PARTS);
        if (!there[part] && (grow || h_random(&seed) % 4 == 0)) {
            put(f, 7, part, false);
            there[part] = true;
        } else if (!grow && kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim)) {
            assert_true(there[victim.slot.b]);
            there[victim.slot.b] = false;
            kvs_evict_finish(f->index, &victim);
        }
        part = (uint32_t)(h_random(&seed) % N_PARTS);
        kvs_read read = ref(f, block, part);
        assert_int_equal(read.where, there[part] ? KVS_IN_DRAM : KVS_NOWHERE);
        if (there[part]) {
            assert_int_equal(read.slot.b, part);
            kvs_index_unref(f->index, &read.value, 1);
        }
    }
    kvs_index_drop_blocks(f->index, &block, 1);
}

/* The first values that lmdb eviction meets are all in use: it gives up after so many, and the next
   call goes on behind them. */
static void test_lmdb_scan_is_bounded(void **state)
{
    fixture *f = *state;
    const uint32_t in_use = KVS_EVICT_SCAN + 10, cls = f->schema->parts[0].cls;
    uint32_t *values = calloc(in_use, sizeof(*values));
    kvs_victim victim;
    for (uint32_t b = 0; b < in_use; b++) {
        kvc_digest digest = h_digest(b);
        uint32_t block;
        assert_int_equal(kvs_index_hold_blocks(f->index, f->schema, &digest, 1, &block), KVC_OK);
        put(f, b, 0, true);
        values[b] = ref(f, block, 0).value;
        kvs_index_drop_blocks(f->index, &block, 1);
    }
    put(f, in_use, 0, true);
    put(f, in_use + 1, 0, true);
    assert_false(kvs_evict_lmdb(f->index, cls, &victim));
    for (uint32_t i = 0; i < 2; i++) {
        assert_true(kvs_evict_lmdb(f->index, cls, &victim));
        assert_int_equal(victim.slot.a, in_use + i);
        kvs_evict_finish(f->index, &victim);
    }
    assert_false(kvs_evict_lmdb(f->index, cls, &victim));
    kvs_index_unref(f->index, values, in_use);
    assert_true(kvs_evict_lmdb(f->index, cls, &victim));
    kvs_evict_finish(f->index, &victim);
    free(values);
}

/* Reads a value, and lets it go at once or later. */
static uint32_t read_once(fixture *f, uint64_t b, bool let_go)
{
    kvc_digest digest = h_digest(b);
    const kvc_digest *digests[1] = {&digest};
    const uint16_t part = 0;
    kvs_read read = {.n_rows = 1};
    kvs_index_ref_named(f->index, f->schema, digests, &part, &read, 1);
    assert_int_equal(read.where, KVS_IN_DRAM);
    if (let_go)
        kvs_index_unref(f->index, &read.value, 1);
    return read.value;
}

/* Number of the block that gives way. */
static uint64_t give_way(fixture *f)
{
    kvs_victim victim;
    assert_true(kvs_evict_dram(f->index, f->schema->parts[0].cls, &victim));
    kvs_evict_finish(f->index, &victim);
    return victim.slot.a;
}

/* Values in use at the old end stop no call for long, and no other value for ever. */
static void test_dram_scan_is_bounded(void **state)
{
    fixture *f = *state;
    enum { IN_USE = 4 * KVS_EVICT_SKIPPED + 10 };
    uint32_t values[IN_USE], calls = 1;
    kvs_victim victim;
    for (uint32_t b = 0; b < IN_USE; b++) {
        put(f, b, 0, false);
        values[b] = read_once(f, b, false);
    }
    put(f, IN_USE, 0, false);
    while (!kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim) && calls < 100)
        calls++;
    assert_int_equal(victim.slot.a, IN_USE);
    kvs_evict_finish(f->index, &victim);
    assert_int_equal(calls, 5); /* each looks at KVS_EVICT_SKIPPED of them */
    assert_false(kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim));
    kvs_index_unref(f->index, values, IN_USE);
    assert_true(kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim));
    kvs_evict_finish(f->index, &victim);
}

/* Where every value was read, a call spares some and then takes the next. */
static void test_no_more_than_some_are_spared(void **state)
{
    fixture *f = *state;
    const uint32_t n = 3 * KVS_EVICT_SPARED;
    for (uint32_t b = 0; b < n; b++) {
        put(f, b, 0, false);
        for (uint32_t i = 0; i < 5; i++)
            read_once(f, b, true);
    }
    assert_int_equal(give_way(f), KVS_EVICT_SPARED);
    assert_int_equal(f->index->classes[f->schema->parts[0].cls].main.n, KVS_EVICT_SPARED);
    for (uint32_t i = 1; i < n; i++)
        (void)give_way(f);
    kvs_victim victim;
    assert_false(kvs_evict_dram(f->index, f->schema->parts[0].cls, &victim));
}

/* What comes back soon after it gave way outlives what comes for the first time; later it does
   not, and what was read on trial goes on to the main queue too. */
static void test_who_comes_back_is_known(void **state)
{
    fixture *f = *state;
    for (uint64_t b = 0; b < 8; b++)
        put(f, b, 0, false);
    assert_int_equal(give_way(f), 0);
    put(f, 0, 0, false);
    for (uint64_t b = 8; b < 12; b++)
        put(f, b, 0, false);
    read_once(f, 3, true);
    /* The main queue's turn comes only when the small one has less than a quarter of all. */
    const uint64_t order[] = {1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 100, 101, 102, 103};
    for (uint32_t i = 0; i < 14; i++) {
        assert_int_equal(give_way(f), order[i]);
        put(f, 100 + i, 0, false);
    }
    put(f, 1, 0, false); /* more went after it than dram has */
    for (uint64_t b = 104; b < 114; b++)
        assert_int_equal(give_way(f), b);
    const uint64_t last[] = {1, 0, 3};
    for (uint32_t i = 0; i < 3; i++)
        assert_int_equal(give_way(f), last[i]);
}

static void test_match_keeps_its_deadline(void **state)
{
    fixture *f = *state;
    const uint16_t part = 5;
    kvc_digest digests[600];
    uint32_t hits;
    for (uint32_t b = 0; b < 600; b++) {
        digests[b] = h_digest(b);
        put(f, b, part, false);
    }
    assert_int_equal(
        kvs_index_match(f->index, f->schema, &part, 1, false, digests, 600, 0, NULL, &hits),
        KVC_OK);
    assert_int_equal(hits, 600);
    assert_int_equal(kvs_index_match(f->index, f->schema, &part, 1, false, digests, 600,
                                     kvc_now_ns() - 1, NULL, &hits),
                     KVC_TIMED_OUT);
    assert_int_equal(hits, 0);
}

/* Buffers kept for reuse count: the pool never takes more than its cap. */
static void test_buffers_keep_their_cap(void **state)
{
    enum { BIG = 1 << 20, N_BIG = 7, SMALL = 200 << 10, N_SMALL = 200 };
    const uint64_t cap = 8u << 20;
    static kvs_buffer *buffers[N_SMALL];
    kvs_buffers pool;
    uint32_t n = 0;
    (void)state;
    kvs_buffers_init(&pool, BIG, cap);
    uint64_t before = heap_bytes();
    for (uint32_t i = 0; i < N_BIG; i++)
        assert_int_equal(kvs_buffer_get(&pool, BIG, &buffers[i]), KVC_OK);
    assert_int_equal(kvs_buffer_get(&pool, BIG, &buffers[N_BIG]), KVC_AGAIN);
    for (uint32_t i = 0; i < N_BIG; i++)
        kvs_buffer_release(buffers[i]);
    while (kvs_buffer_get(&pool, SMALL, &buffers[n]) == KVC_OK) {
        memset(buffers[n++]->bytes, 1, SMALL);
        assert_true(n < N_SMALL);
    }
    assert_true((uint64_t)n * SMALL > cap * 9 / 10); /* kept ones make way */
    assert_true(heap_bytes() - before < cap + (64u << 10));
    for (uint32_t i = 0; i < n; i++)
        kvs_buffer_release(buffers[i]);
    assert_int_equal(kvs_buffer_get(&pool, BIG / 3, &buffers[0]), KVC_OK);
    kvs_buffer_release(buffers[0]);
    kvs_buffers_fini(&pool);
    assert_true(heap_bytes() - before < 64u << 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_memory_follows_values, setup, teardown),
        cmocka_unit_test_setup_teardown(test_parts_come_and_go, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lmdb_scan_is_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dram_scan_is_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_more_than_some_are_spared, setup, teardown),
        cmocka_unit_test_setup_teardown(test_who_comes_back_is_known, setup, teardown),
        cmocka_unit_test_setup_teardown(test_match_keeps_its_deadline, setup, teardown),
        cmocka_unit_test(test_buffers_keep_their_cap),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
