/*
 * index_test.c: the index, its eviction order and the context table, without a server.
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "evict.h"
#ifdef KVASIR_LMDB
#include "lmdb_record.h"
#endif

typedef struct fixture {
    kvs_schemas *schemas;
    kvs_index *index;
    const kvs_schema *schema;
    h_schema desc;
    kvc_digest tenant;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    bool is_new;
    f->schemas = kvs_schemas_create();
    f->index = kvs_index_create(f->schemas->by_id);
    f->tenant = h_digest(1000);
    h_schema_init(&f->desc, "model", 3, 256, false);
    assert_int_equal(kvs_schemas_add(f->schemas, &f->tenant, &f->desc.schema, kvs_index_class,
                                     f->index, &f->schema, &is_new),
                     KVC_OK);
    assert_true(is_new);
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

static uint32_t claim(fixture *f, uint64_t b, uint32_t part)
{
    kvc_digest digest = h_digest(b);
    kvs_slot slot;
    uint32_t value;
    assert_int_equal(kvs_index_claim(f->index, f->schema, part, &digest, false, &value, &slot),
                     KVS_CLAIM_MINE);
    return value;
}

static uint32_t put_dram(fixture *f, uint64_t b, uint32_t part, bool dirty)
{
    uint32_t value = claim(f, b, part);
    kvs_index_publish_dram(f->index, value, (kvs_slot){b, part}, dirty);
    return value;
}

static uint32_t hold(fixture *f, uint64_t b)
{
    kvc_digest digest = h_digest(b);
    uint32_t block;
    assert_int_equal(kvs_index_hold_blocks(f->index, f->schema, &digest, 1, &block), KVC_OK);
    return block;
}

static kvs_read ref(fixture *f, uint32_t block, uint32_t part, uint32_t promote_rows)
{
    kvs_read read = {.block = block, .n_rows = 10};
    kvs_index_ref(f->index, f->schema, part, promote_rows, 1, &read, 1);
    return read;
}

/* Each is claimed as one by one, up to the first that an earlier claim of the same call may decide.
 */
static void test_claim_each(void **state)
{
    fixture *f = *state;
    const uint64_t blocks[] = {9, 1, 2, 1, 3};
    kvc_digest digests[5];
    kvs_want wants[5];
    put_dram(f, 9, 0, false);
    uint32_t busy = claim(f, 8, 0);
    for (uint32_t i = 0; i < 5; i++) {
        digests[i] = h_digest(blocks[i]);
        wants[i] = (kvs_want){.digest = &digests[i]};
    }
    assert_int_equal(kvs_index_claim_each(f->index, f->schema, wants, 5, false, false), 3);
    assert_int_equal(wants[0].claim, KVS_CLAIM_EXISTS);
    assert_int_equal(wants[1].claim, KVS_CLAIM_MINE);
    assert_int_equal(wants[2].claim, KVS_CLAIM_MINE);
    kvs_filled filled[2] = {{.value = wants[1].value, .slot = {1, 0}},
                            {.value = wants[2].value, .slot = {2, 0}}};
    kvs_index_publish_each(f->index, filled, 2, false);
    assert_int_equal(kvs_index_claim_each(f->index, f->schema, wants + 3, 2, false, false), 2);
    assert_int_equal(wants[3].claim, KVS_CLAIM_EXISTS);
    assert_int_equal(wants[4].claim, KVS_CLAIM_MINE);
    digests[0] = h_digest(8); /* somebody else's: the first of a call is always answered */
    assert_int_equal(kvs_index_claim_each(f->index, f->schema, wants, 2, false, false), 2);
    assert_int_equal(wants[0].claim, KVS_CLAIM_BUSY);
    assert_int_equal(wants[1].claim, KVS_CLAIM_EXISTS);
    digests[0] = h_digest(77);
    assert_int_equal(kvs_index_claim_each(f->index, f->schema, wants, 1, false, true), 1);
    assert_int_equal(wants[0].claim, KVS_CLAIM_ABSENT);
    kvs_index_abandon(f->index, wants[4].value);
    kvs_index_abandon(f->index, busy);
}

/* Several at once are those that would have come one after the other. */
static void test_evict_each(void **state)
{
    fixture *f = *state;
    uint32_t cls = f->schema->parts[0].cls;
    kvs_victim victims[8];
    for (uint64_t b = 0; b < 10; b++)
        put_dram(f, b, 0, false);
    for (uint64_t b = 0; b < 9; b += 3) {
        assert_int_equal(kvs_evict_dram_each(f->index, cls, victims, 3), 3);
        for (uint64_t i = 0; i < 3; i++)
            assert_int_equal(victims[i].slot.a, b + i);
        kvs_evict_finish_each(f->index, victims, 3);
    }
    assert_int_equal(kvs_evict_dram_each(f->index, cls, victims, 8), 1);
    kvs_evict_finish_each(f->index, victims, 1);
    assert_int_equal(kvs_evict_dram_each(f->index, KVS_ANY_CLASS, victims, 8), 0);
    assert_int_equal(f->index->n_visible, 0);
    assert_int_equal(f->index->values.used, 0);
}

#ifdef KVASIR_LMDB
/* A class is a size class of lmdb too, row sums and all. */
static void test_classes_of_lmdb(void **state)
{
    fixture *f = *state;
    const uint32_t rows[] = {1, 64, 128, 987, 988, 989, 1024, 2012, 4096};
    for (uint32_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        for (uint32_t row_bytes = 64; row_bytes <= 4096; row_bytes += 96) {
            uint32_t cls = kvs_index_class(f->index, &f->tenant, rows[i] * row_bytes, rows[i]);
            assert_int_not_equal(cls, 0);
            assert_int_equal(f->index->classes[cls].record_pages,
                             kvsi_record_pages(row_bytes, rows[i]));
        }
    }
}
#endif

/* Equal bytes in other blocks live in another environment: there is no room to be made there. */
static void test_classes_of_rows(void **state)
{
    fixture *f = *state;
    kvc_digest other = h_digest(1001);
    uint32_t value_bytes = f->schema->parts[0].value_bytes;
    uint32_t own = f->schema->parts[0].cls;
    uint32_t tall = kvs_index_class(f->index, &f->tenant, value_bytes, 4096);
    uint32_t theirs = kvs_index_class(f->index, &other, value_bytes, H_TOKENS);
    kvs_victim victim;
    assert_int_not_equal(tall, own);
    assert_int_not_equal(theirs, own);
    kvs_index_publish_lmdb(f->index, claim(f, 1, 0), (kvs_slot){1, 0}, true, NULL);
    put_dram(f, 2, 0, false);
    assert_int_equal(f->index->classes[own].dram_bytes, value_bytes);
    assert_false(kvs_evict_lmdb(f->index, tall, &victim));
    assert_true(kvs_evict_lmdb(f->index, theirs, &victim));
    assert_int_equal(victim.value_bytes, value_bytes);
    kvs_evict_finish(f->index, &victim);
    assert_true(kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim));
    kvs_evict_finish(f->index, &victim);
    assert_int_equal(f->index->classes[own].dram_bytes, 0);
}

/* A size that comes when another has filled dram gets its sixteenth, and from then on turns over
   its own. */
static void test_late_class(void **state)
{
    fixture *f = *state;
    h_schema late;
    kvs_victim victim;
    bool is_new;
    const kvs_schema *first = f->schema;
    uint32_t own = first->parts[0].cls;
    for (uint64_t b = 0; b < 64; b++)
        put_dram(f, b, 0, false);
    h_schema_init(&late, "late", 1, 128, false);
    assert_int_equal(kvs_schemas_add(f->schemas, &f->tenant, &late.schema, kvs_index_class,
                                     f->index, &f->schema, &is_new),
                     KVC_OK);
    uint32_t cls = f->schema->parts[0].cls, from_first = 0;
    assert_int_not_equal(cls, own);
    for (uint64_t b = 100; b < 140; b++) {
        put_dram(f, b, 0, false);
        bool starved = kvs_evict_starved(f->index, cls);
        assert_true(kvs_evict_dram(f->index, starved ? KVS_ANY_CLASS : cls, &victim));
        from_first += victim.value_bytes == first->parts[0].value_bytes;
        kvs_evict_finish(f->index, &victim);
    }
    uint64_t theirs = f->index->classes[own].dram_bytes, ours = f->index->classes[cls].dram_bytes;
    assert_true((ours + f->schema->parts[0].value_bytes) * 16 >= theirs);
    assert_true(ours * 8 <= theirs);
    assert_true(from_first > 0 && from_first < 20);
}

static void test_claim(void **state)
{
    fixture *f = *state;
    kvc_digest digest = h_digest(5);
    kvs_slot slot;
    uint32_t value = claim(f, 5, 1), other;
    assert_int_equal(kvs_index_claim(f->index, f->schema, 1, &digest, false, &other, &slot),
                     KVS_CLAIM_BUSY);
    uint32_t block = hold(f, 5);
    assert_int_equal(ref(f, block, 1, 0).where, KVS_NOWHERE); /* invisible until published */
    kvs_index_abandon(f->index, value);
    assert_int_equal(ref(f, block, 1, 0).where, KVS_NOWHERE);
    value = put_dram(f, 5, 1, false);
    assert_int_equal(kvs_index_claim(f->index, f->schema, 1, &digest, false, &other, &slot),
                     KVS_CLAIM_EXISTS);
    kvs_read read = ref(f, block, 1, 0);
    assert_int_equal(read.where, KVS_IN_DRAM);
    assert_int_equal(read.slot.a, 5);
    assert_int_equal(ref(f, block, 0, 0).where, KVS_NOWHERE); /* another part */
    kvs_index_unref(f->index, &read.value, 1);
    /* DURABLE wants it written; nobody else may start that meanwhile. */
    assert_int_equal(kvs_index_claim(f->index, f->schema, 1, &digest, true, &other, &slot),
                     KVS_CLAIM_WRITE);
    assert_int_equal(slot.a, 5);
    assert_int_equal(kvs_index_claim(f->index, f->schema, 1, &digest, true, &other, &slot),
                     KVS_CLAIM_BUSY);
    kvs_index_wrote(f->index, value, true, (kvs_slot){7, 7}, false);
    assert_int_equal(kvs_index_claim(f->index, f->schema, 1, &digest, true, &other, &slot),
                     KVS_CLAIM_SYNC);
    kvs_index_synced(f->index, value, true);
    assert_int_equal(kvs_index_claim(f->index, f->schema, 1, &digest, true, &other, &slot),
                     KVS_CLAIM_EXISTS);
    kvs_index_drop_blocks(f->index, &block, 1);
}

/* Millions are too slow here; enough to split every first bucket a few times. */
static void test_many_blocks(void **state)
{
    fixture *f = *state;
    const uint32_t n = 100000;
    for (uint32_t b = 0; b < n; b++)
        put_dram(f, b, b % 3, false);
    for (uint32_t b = 0; b < n; b += 7) {
        uint32_t block = hold(f, b);
        kvs_read read = ref(f, block, b % 3, 0);
        assert_int_equal(read.where, KVS_IN_DRAM);
        assert_int_equal(read.slot.a, b);
        kvs_index_unref(f->index, &read.value, 1);
        kvs_index_drop_blocks(f->index, &block, 1);
    }
    assert_int_equal(f->index->n_visible, n);
    for (uint32_t i = 0; i < n; i++) {
        kvs_victim victim;
        assert_true(kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim) ||
                    kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim));
        assert_true(victim.gone);
        kvs_evict_finish(f->index, &victim);
    }
    assert_int_equal(f->index->n_visible, 0);
    assert_int_equal(f->index->blocks.used, 0);
    assert_int_equal(f->index->values.used, 0);
}

/* SIEVE: unread values go first, oldest first; read ones are spared once; readers always. */
static void test_dram_order(void **state)
{
    fixture *f = *state;
    kvs_victim victim;
    uint32_t cls = f->schema->parts[0].cls, blocks[6];
    for (uint32_t b = 0; b < 6; b++) {
        put_dram(f, b, 0, b == 2);
        blocks[b] = hold(f, b);
    }
    kvs_read visited = ref(f, blocks[0], 0, 0), held = ref(f, blocks[3], 0, 0);
    kvs_index_unref(f->index, &visited.value, 1);
    const uint64_t order[] = {1, 4, 5, 0}; /* 2 is dirty, 3 is being read */
    for (uint32_t i = 0; i < 4; i++) {
        assert_true(kvs_evict_dram(f->index, cls, &victim));
        assert_int_equal(victim.slot.a, order[i]);
        assert_true(victim.gone);
        kvs_evict_finish(f->index, &victim);
    }
    assert_false(kvs_evict_dram(f->index, cls, &victim));
    kvs_slot slot;
    uint32_t *sums;
    uint32_t dirty = kvs_index_next_dirty(f->index, &slot, &sums);
    assert_int_equal(slot.a, 2);
    assert_int_equal(kvs_index_next_dirty(f->index, &slot, &sums), KVS_NIL);
    assert_false(kvs_evict_dram(f->index, cls, &victim)); /* it is being written */
    kvs_index_wrote(f->index, dirty, true, (kvs_slot){22, 0}, false);
    put_dram(f, 50, 0, false); /* in dram only: no promotion may cost it */
    assert_true(kvs_evict_dram_copy(f->index, cls, &victim));
    assert_int_equal(victim.slot.a, 2);
    assert_false(victim.gone); /* lmdb has it */
    kvs_evict_finish(f->index, &victim);
    assert_false(kvs_evict_dram_copy(f->index, cls, &victim));
    assert_true(kvs_evict_dram(f->index, cls, &victim));
    assert_true(victim.gone);
    kvs_evict_finish(f->index, &victim);
    kvs_read read = ref(f, blocks[2], 0, 0);
    assert_int_equal(read.where, KVS_IN_LMDB);
    assert_int_equal(read.slot.a, 22);
    kvs_index_unref(f->index, &read.value, 1);
    kvs_index_unref(f->index, &held.value, 1);
    kvs_index_drop_blocks(f->index, blocks, 6);
}

static uint32_t put_lmdb(fixture *f, uint64_t b)
{
    uint32_t value = claim(f, b, 0);
    kvs_index_publish_lmdb(f->index, value, (kvs_slot){b, 1}, true, NULL);
    return value;
}

/* A dirty value keeps the sums it came with, within a bound for all; what is left goes with the
   index (the leak sanitizer watches). */
static void test_sums_of_dirty_values(void **state)
{
    enum { ROWS = 1 << 20, N = KVS_DIRTY_SUMS / (ROWS * 4) };
    fixture *f = *state;
    uint32_t *sums, *first = malloc(ROWS * sizeof(*first));
    kvs_slot slot;
    first[0] = 17;
    for (uint32_t b = 0; b < N + 2; b++)
        kvs_index_publish_dirty(f->index, claim(f, b, 0), (kvs_slot){b, 0},
                                b == 0 ? first : malloc(ROWS * sizeof(*first)), ROWS);
    for (uint32_t b = 0; b <= N; b++) {
        uint32_t value = kvs_index_next_dirty(f->index, &slot, &sums);
        assert_int_equal(slot.a, b);
        assert_int_equal(sums != NULL, b < N);
        assert_true(b > 0 || sums == first);
        free(sums);
        kvs_index_wrote(f->index, value, true, (kvs_slot){b, 1}, false);
    }
    assert_int_equal(f->index->sums_bytes, 0);
    kvs_index_publish_dirty(f->index, claim(f, 100, 0), (kvs_slot){100, 0}, malloc(64), 16);
}

static void test_lmdb_order(void **state)
{
    fixture *f = *state;
    kvs_victim victim;
    kvs_slot slot;
    uint32_t cls = f->schema->parts[0].cls, other, *sums;
    uint32_t block1 = hold(f, 1);
    kvc_digest digest = h_digest(0);
    for (uint64_t b = 0; b < 3; b++)
        put_lmdb(f, b);
    kvs_read held = ref(f, block1, 0, 0);
    assert_true(kvs_evict_lmdb(f->index, cls, &victim));
    assert_int_equal(victim.slot.a, 0);
    /* Until its slot is released nobody can put it again: the tier knows values by name. */
    assert_int_equal(kvs_index_claim(f->index, f->schema, 0, &digest, false, &other, &slot),
                     KVS_CLAIM_BUSY);
    kvs_evict_finish(f->index, &victim);
    assert_true(kvs_evict_lmdb(f->index, cls, &victim));
    assert_int_equal(victim.slot.a, 2);
    kvs_evict_finish(f->index, &victim);
    assert_false(kvs_evict_lmdb(f->index, cls, &victim));
    kvs_index_unref(f->index, &held.value, 1);
    kvs_index_drop_blocks(f->index, &block1, 1);
    /* A value of both tiers stays in dram, and can be evicted from there. */
    uint32_t value = put_dram(f, 9, 0, true);
    assert_int_equal(kvs_index_next_dirty(f->index, &slot, &sums), value);
    kvs_index_wrote(f->index, value, true, (kvs_slot){99, 0}, true);
    assert_true(kvs_evict_lmdb(f->index, cls, &victim)); /* the older one */
    assert_int_equal(victim.slot.a, 1);
    kvs_evict_finish(f->index, &victim);
    assert_true(kvs_evict_lmdb(f->index, cls, &victim));
    assert_int_equal(victim.slot.a, 99);
    assert_false(victim.gone);
    kvs_evict_finish(f->index, &victim);
    uint32_t block9 = hold(f, 9);
    kvs_read read = ref(f, block9, 0, 0);
    assert_int_equal(read.where, KVS_IN_DRAM);
    kvs_index_unref(f->index, &read.value, 1);
    kvs_index_drop_blocks(f->index, &block9, 1);
    assert_true(kvs_evict_dram(f->index, cls, &victim) || kvs_evict_dram(f->index, cls, &victim));
    assert_true(victim.gone);
    kvs_evict_finish(f->index, &victim);
    assert_int_equal(f->index->values.used, 0);
}

static void test_doom(void **state)
{
    fixture *f = *state;
    kvs_victim victim;
    uint32_t block = hold(f, 1), other;
    kvs_slot slot;
    kvc_digest digest = h_digest(1);
    put_lmdb(f, 1);
    kvs_read a = ref(f, block, 0, 0), b = ref(f, block, 0, 0);
    assert_true(kvs_index_doom(f->index, a.value));
    assert_false(kvs_index_doom(f->index, b.value));
    assert_int_equal(ref(f, block, 0, 0).where, KVS_NOWHERE);
    assert_int_equal(kvs_index_claim(f->index, f->schema, 0, &digest, false, &other, &slot),
                     KVS_CLAIM_BUSY);
    kvs_index_unref(f->index, &a.value, 1);
    assert_false(kvs_evict_dead(f->index, &victim));
    kvs_index_unref(f->index, &b.value, 1);
    assert_true(kvs_evict_dead(f->index, &victim));
    assert_int_equal(victim.slot.a, 1);
    kvs_evict_finish(f->index, &victim);
    assert_false(kvs_evict_dead(f->index, &victim));
    assert_int_equal(kvs_index_claim(f->index, f->schema, 0, &digest, false, &other, &slot),
                     KVS_CLAIM_MINE);
    kvs_index_abandon(f->index, other);
    kvs_index_drop_blocks(f->index, &block, 1);
}

static void test_promotion(void **state)
{
    fixture *f = *state;
    uint32_t block = hold(f, 1);
    put_lmdb(f, 1);
    for (uint32_t i = 0; i < 2; i++) {
        kvs_read read = ref(f, block, 0, 25);
        assert_false(read.promote);
        kvs_index_unref(f->index, &read.value, 1);
    }
    kvs_read third = ref(f, block, 0, 25), fourth = ref(f, block, 0, 25);
    assert_true(third.promote);
    assert_false(fourth.promote); /* one at a time */
    kvs_slot dram = {3, 4};
    assert_true(kvs_index_loaded(f->index, third.value, &dram));
    kvs_index_unref(f->index, &third.value, 1);
    kvs_index_unref(f->index, &fourth.value, 1);
    kvs_read read = ref(f, block, 0, 25);
    assert_int_equal(read.where, KVS_IN_DRAM);
    assert_int_equal(read.slot.b, 4);
    kvs_index_unref(f->index, &read.value, 1);
    kvs_index_drop_blocks(f->index, &block, 1);
}

static uint32_t match(fixture *f, const uint16_t *parts, uint32_t n_parts, bool windowed,
                      const kvc_digest *digests, uint32_t n)
{
    uint32_t hits;
    assert_int_equal(kvs_index_match(f->index, f->schema, parts, n_parts, windowed, digests, n,
                                     kvc_deadline_ns(10000000000ull), NULL, &hits),
                     KVC_OK);
    return hits;
}

/* Windowed parts are asked for only where the window of the matched end still reaches. */
static void test_match_window(void **state)
{
    fixture *f = *state;
    kvs_part *windowed = &((kvs_schema *)(uintptr_t)f->schema)->parts[1];
    const uint16_t parts[] = {0, 1};
    kvc_digest digests[10];
    windowed->window_blocks = 2;
    for (uint32_t b = 0; b < 10; b++) {
        digests[b] = h_digest(b);
        put_dram(f, b, 0, false);
        if (b == 4 || b == 5 || b == 6 || b == 9)
            put_dram(f, b, 1, false);
    }
    assert_int_equal(match(f, parts, 2, true, digests, 10), 7);
    assert_int_equal(match(f, parts, 2, true, digests, 5), 0);
    assert_int_equal(match(f, parts, 2, false, digests, 10), 0);
    assert_int_equal(match(f, parts, 1, false, digests, 10), 10);
}

/* Slots are used again in the order in which they became free; no handle has generation 0. */
static void test_handles(void **state)
{
    fixture *f = *state;
    const uint32_t slot_mask = (1u << 20) - 1;
    kvs_contexts_opts opts = {.index = f->index,
                              .schemas = f->schemas,
                              .max_per_tenant = 9,
                              .max_context_blocks = 9,
                              .max_blocks = 9,
                              .default_ttl_ns = 1000000000,
                              .max_ttl_ns = 1000000000};
    kvs_contexts *contexts = kvs_contexts_create(&opts);
    uint64_t handles[5];
    for (uint32_t i = 0; i < 5; i++) {
        kvs_context *open[3];
        const char *why;
        uint32_t n = i == 0 ? 3 : 1;
        for (uint32_t k = 0; k < n; k++) {
            assert_int_equal(kvs_context_open(contexts, f->schema, NULL, 0, 0, &open[k], &why),
                             KVC_OK);
            assert_true((open[k]->handle >> 20 & slot_mask) != 0);
        }
        handles[i] = open[0]->handle;
        for (uint32_t k = 0; k < n; k++) {
            kvs_context_close(contexts, open[k]);
            kvs_context_put(contexts, open[k]);
        }
    }
    assert_int_equal(handles[1] & slot_mask, handles[0] & slot_mask);
    assert_int_equal(handles[2] & slot_mask, (handles[1] & slot_mask) + 1);
    assert_int_equal(handles[3] & slot_mask, (handles[2] & slot_mask) + 1);
    assert_int_equal(handles[4] & slot_mask, handles[1] & slot_mask);
    assert_true(handles[4] != handles[1] && handles[1] != handles[0]);
    kvs_contexts_destroy(contexts);
}

static void test_contexts(void **state)
{
    fixture *f = *state;
    kvs_contexts_opts opts = {.index = f->index,
                              .schemas = f->schemas,
                              .boot_id = 0x123456789abcdefull,
                              .max_per_tenant = 2,
                              .max_context_blocks = 5000,
                              .max_blocks = 6000,
                              .default_ttl_ns = 1000000000,
                              .max_ttl_ns = 2000000000};
    kvs_contexts *contexts = kvs_contexts_create(&opts);
    kvc_digest *digests = calloc(5001, sizeof(*digests));
    kvs_context *a, *b, *c;
    const char *why;
    for (uint32_t i = 0; i <= 5000; i++)
        digests[i] = h_digest(i);
    assert_int_equal(kvs_context_open(contexts, f->schema, digests, 1000, 0, &a, &why), KVC_OK);
    for (uint32_t at = 1000; at < 5000; at += 500)
        assert_int_equal(kvs_context_extend(contexts, a, at, digests + at, 500, &why), KVC_OK);
    for (uint32_t i = 0; i < 5000; i++)
        assert_true(kvs_index_block_is(f->index, kvs_context_block(a, i), &digests[i]));
    assert_int_equal(kvs_context_extend(contexts, a, 5000, digests + 5000, 1, &why), KVC_INVALID);
    assert_int_equal(kvs_context_open(contexts, f->schema, digests, 1001, 0, &b, &why),
                     KVC_NO_SPACE);
    assert_int_equal(f->index->blocks.used, 5000);
    assert_int_equal(kvs_context_open(contexts, f->schema, digests, 1000, UINT64_MAX, &b, &why),
                     KVC_OK);
    assert_int_equal(b->ttl_ns, opts.max_ttl_ns);
    assert_int_equal(kvs_context_open(contexts, f->schema, digests, 0, 0, &c, &why), KVC_NO_SPACE);
    uint64_t handle = a->handle;
    assert_int_equal(kvs_context_get(contexts, &f->tenant, handle, &c), KVC_OK);
    kvs_context_put(contexts, c);
    kvc_digest stranger = h_digest(1);
    assert_int_equal(kvs_context_get(contexts, &stranger, handle, &c), KVC_STALE_HANDLE);
    kvs_context_close(contexts, a);
    assert_int_equal(kvs_context_get(contexts, &f->tenant, handle, &c), KVC_STALE_HANDLE);
    assert_int_equal(f->index->blocks.used, 5000); /* our reference still holds them */
    kvs_context_put(contexts, a);
    assert_int_equal(f->index->blocks.used, 1000);
    kvs_context_put(contexts, b);
    assert_int_equal(kvs_contexts_sweep(contexts, kvc_now_ns()), 0);
    assert_int_equal(kvs_contexts_sweep(contexts, kvc_now_ns() + 3000000000ull), 1);
    assert_int_equal(f->index->blocks.used, 0);
    /* The slot is used again; the old handle stays stale. */
    assert_int_equal(kvs_context_open(contexts, f->schema, digests, 1, 0, &c, &why), KVC_OK);
    assert_true(c->handle != handle);
    kvs_context_close(contexts, c);
    kvs_context_put(contexts, c);
    /* Past its TTL a context is stale, swept or not. */
    assert_int_equal(kvs_context_open(contexts, f->schema, digests, 1, 1000000, &c, &why), KVC_OK);
    handle = c->handle;
    kvs_context_put(contexts, c);
    struct timespec nap = {.tv_nsec = 3000000};
    nanosleep(&nap, NULL);
    assert_int_equal(kvs_context_get(contexts, &f->tenant, handle, &c), KVC_STALE_HANDLE);
    kvs_contexts_destroy(contexts);
    free(digests);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#ifdef KVASIR_LMDB
        cmocka_unit_test_setup_teardown(test_classes_of_lmdb, setup, teardown),
#endif
        cmocka_unit_test_setup_teardown(test_claim_each, setup, teardown),
        cmocka_unit_test_setup_teardown(test_evict_each, setup, teardown),
        cmocka_unit_test_setup_teardown(test_classes_of_rows, setup, teardown),
        cmocka_unit_test_setup_teardown(test_late_class, setup, teardown),
        cmocka_unit_test_setup_teardown(test_claim, setup, teardown),
        cmocka_unit_test_setup_teardown(test_many_blocks, setup, teardown),
        cmocka_unit_test_setup_teardown(test_dram_order, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lmdb_order, setup, teardown),
        cmocka_unit_test_setup_teardown(test_doom, setup, teardown),
        cmocka_unit_test_setup_teardown(test_promotion, setup, teardown),
        cmocka_unit_test_setup_teardown(test_match_window, setup, teardown),
        cmocka_unit_test_setup_teardown(test_handles, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sums_of_dirty_values, setup, teardown),
        cmocka_unit_test_setup_teardown(test_contexts, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
