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
#include "heap.h"

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
    assert_true(kvs_buffers_held(&pool) > N_BIG * (uint64_t)BIG && kvs_buffers_held(&pool) <= cap);
    assert_int_equal(kvs_buffer_get(&pool, BIG, &buffers[N_BIG]), KVC_AGAIN);
    for (uint32_t i = 0; i < N_BIG; i++)
        kvs_buffer_release(buffers[i]);
    while (kvs_buffer_get(&pool, SMALL, &buffers[n]) == KVC_OK) {
        memset(buffers[n++]->bytes, 1, SMALL);
        assert_true(n < N_SMALL);
    }
    assert_true((uint64_t)n * SMALL > cap * 9 / 10); /* kept ones make way */
    assert_true(heap_bytes() - before < cap + (64u << 10) && kvs_buffers_held(&pool) <= cap);
    for (uint32_t i = 0; i < n; i++)
        kvs_buffer_release(buffers[i]);
    assert_int_equal(kvs_buffer_get(&pool, BIG / 3, &buffers[0]), KVC_OK);
    kvs_buffer_release(buffers[0]);
    kvs_buffers_fini(&pool);
    assert_true(heap_bytes() - before < 64u << 10);
}

/* Large buffers that nobody took between two rests go back; those in use, and in turn, stay. */
static void test_buffers_rest(void **state)
{
    enum { BIG = 1 << 20, N = 6 };
    kvs_buffer *buffers[N];
    kvs_buffers pool;
    (void)state;
    kvs_buffers_init(&pool, BIG, 64u << 20);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(kvs_buffer_get(&pool, BIG, &buffers[i]), KVC_OK);
    uint64_t all = kvs_buffers_held(&pool);
    assert_true(all >= N * (uint64_t)BIG);
    for (uint32_t i = 0; i < N; i++)
        kvs_buffer_release(buffers[i]);
    kvs_buffers_rest(&pool); /* all were out since the last one */
    assert_int_equal(kvs_buffers_held(&pool), all);
    for (uint32_t turn = 0; turn < 3; turn++) {
        assert_int_equal(kvs_buffer_get(&pool, BIG, &buffers[0]), KVC_OK);
        assert_int_equal(kvs_buffer_get(&pool, BIG, &buffers[1]), KVC_OK);
        kvs_buffer_release(buffers[0]);
        kvs_buffer_release(buffers[1]);
        kvs_buffers_rest(&pool);
        assert_int_equal(kvs_buffers_held(&pool), all / N * 2);
    }
    assert_int_equal(kvs_buffer_get(&pool, BIG, &buffers[0]), KVC_OK);
    kvs_buffers_rest(&pool);
    kvs_buffers_rest(&pool);
    assert_int_equal(kvs_buffers_held(&pool), all / N);
    memset(buffers[0]->bytes, 1, BIG);
    kvs_buffer_release(buffers[0]);
    kvs_buffers_rest(&pool);
    kvs_buffers_rest(&pool);
    assert_int_equal(kvs_buffers_held(&pool), 0);
    kvs_buffers_fini(&pool);
}

/* Small buffers of one size, with blocks that stay allocated in between: the heap does not grow on
   and on, as it does where what is freed is not found again. */
static void test_small_buffers_are_found_again(void **state)
{
    enum { AT_ONCE = 16, TURNS = 3000, LEN = 200 << 10 };
    static void *pins[TURNS];
    kvs_buffer *buffers[AT_ONCE] = {NULL};
    kvs_buffers pool;
    (void)state;
    kvs_buffers_init(&pool, 1u << 20, 64u << 20);
    uint64_t before = mallinfo2().arena;
    (void)mallopt(M_MMAP_THRESHOLD, 32 << 20); /* as in the daemon */
    for (uint32_t i = 0; i < TURNS; i++) {
        if (buffers[i * 7 % AT_ONCE])
            kvs_buffer_release(buffers[i * 7 % AT_ONCE]);
        assert_int_equal(kvs_buffer_get(&pool, LEN, &buffers[i * 7 % AT_ONCE]), KVC_OK);
        assert_int_equal((uintptr_t)buffers[i * 7 % AT_ONCE]->bytes % 64, 0);
        buffers[i * 7 % AT_ONCE]->bytes[LEN - 1] = 1;
        pins[i] = malloc(24);
    }
    uint64_t grown = mallinfo2().arena - before;
    print_message("%llu KiB of heap for %u KiB at once\n", (unsigned long long)(grown >> 10),
                  AT_ONCE * LEN >> 10);
    assert_true(grown < 16u << 20);
    for (uint32_t i = 0; i < TURNS; i++)
        free(pins[i]);
    for (uint32_t i = 0; i < AT_ONCE; i++)
        kvs_buffer_release(buffers[i]);
    kvs_buffers_fini(&pool);
}

/* What malloc keeps of freed memory goes back once nobody has used it for some ticks. */
static void test_heap_rests(void **state)
{
    enum { N = 1600, BLOCK = 40 << 10 };
    static void *blocks[N];
    (void)state;
    uint64_t before = kvs_heap_free_bytes(0);
    for (uint32_t i = 0; i < N; i++) {
        blocks[i] = malloc(BLOCK);
        assert_non_null(blocks[i]);
        memset(blocks[i], 1, BLOCK);
    }
    for (uint32_t i = 0; i < N; i++)
        if (i % 100)
            free(blocks[i]);               /* the rest pins the heap */
    bool known = mallinfo2().uordblks > 0; /* not under a sanitizer */
    uint64_t free_bytes = kvs_heap_free_bytes(0);
    if (known)
        assert_true(free_bytes > before + N / 2 * (uint64_t)BLOCK);
    for (uint32_t i = 0; i < 32; i++)
        kvs_heap_tick(0);
    uint64_t rested = kvs_heap_free_bytes(0);
    print_message("%llu KiB kept, %llu after a rest\n", (unsigned long long)(free_bytes >> 10),
                  (unsigned long long)(rested >> 10));
    if (known)
        assert_true(rested < KVS_HEAP_KEEP_BYTES);
    for (uint32_t i = 0; i < N; i += 100)
        free(blocks[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_buffers_are_found_again), /* first: of a heap that is small */
        cmocka_unit_test_setup_teardown(test_memory_follows_values, setup, teardown),
        cmocka_unit_test_setup_teardown(test_parts_come_and_go, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lmdb_scan_is_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dram_scan_is_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_more_than_some_are_spared, setup, teardown),
        cmocka_unit_test_setup_teardown(test_who_comes_back_is_known, setup, teardown),
        cmocka_unit_test_setup_teardown(test_match_keeps_its_deadline, setup, teardown),
        cmocka_unit_test(test_buffers_keep_their_cap),
        cmocka_unit_test(test_buffers_rest),
        cmocka_unit_test(test_heap_rests),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
