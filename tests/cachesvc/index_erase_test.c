/*
 * index_erase_test.c: erasing values of the index that are in somebody's hands. In whoever's they
 * are, once an erase met them no read finds them again, nor can they be put before they are gone.
 */
#include "harness.h"

#include <stdlib.h>

#include "evict.h"

typedef struct fixture {
    kvs_schemas *schemas;
    kvs_index *index;
    const kvs_schema *schema;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    h_schema desc;
    kvc_digest tenant = h_digest(1000);
    f->schemas = kvs_schemas_create();
    f->index = kvs_index_create(f->schemas->by_id);
    h_schema_init(&desc, "model", 1, 256, false);
    assert_int_equal(kvs_schemas_add(f->schemas, &tenant, &desc.schema, kvs_index_class, f->index,
                                     &f->schema, NULL),
                     KVC_OK);
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

static kvs_claim claim(fixture *f, uint64_t b, uint32_t *value_p)
{
    kvc_digest digest = h_digest(b);
    kvs_slot slot;
    return kvs_index_claim(f->index, f->schema, 0, &digest, true, value_p, &slot);
}

static uint32_t claim_new(fixture *f, uint64_t b)
{
    uint32_t value;
    assert_int_equal(claim(f, b, &value), KVS_CLAIM_MINE);
    return value;
}

static void put_dirty(fixture *f, uint64_t b)
{
    kvs_index_publish_dirty(f->index, claim_new(f, b), (kvs_slot){b, 0}, malloc(64), 16);
}

static kvs_erased erase(fixture *f, uint64_t b)
{
    const uint16_t part = 0;
    kvc_digest digest = h_digest(b);
    kvs_erased erased = {0};
    kvs_index_erase(f->index, f->schema, &digest, &part, 1, &erased);
    return erased;
}

static uint8_t where(fixture *f, uint64_t b)
{
    kvc_digest digest = h_digest(b);
    const kvc_digest *name = &digest;
    const uint16_t part = 0;
    kvs_read read;
    kvs_index_ref_named(f->index, f->schema, &name, &part, &read, 1);
    if (read.where == KVS_IN_DRAM || read.where == KVS_IN_LMDB)
        kvs_index_unref(f->index, &read.value, 1);
    return read.where;
}

/* All copies of the one dead value are given out, and then its name is free. */
static void bury(fixture *f, uint64_t b, uint32_t n_copies)
{
    kvs_victim victim;
    for (uint32_t i = 0; i < n_copies; i++) {
        assert_true(kvs_evict_dead(f->index, &victim));
        assert_int_equal(victim.gone, i + 1 == n_copies);
        kvs_evict_finish(f->index, &victim);
    }
    assert_false(kvs_evict_dead(f->index, &victim));
    assert_int_equal(erase(f, b).pending, 0);
    assert_int_equal(f->index->values.used, 0);
    assert_int_equal(f->index->n_visible, 0);
}

/* A put has claimed it, and publishes it in one way or another, or gives it up. */
static void test_of_a_put(void **state)
{
    fixture *f = *state;
    uint32_t value = claim_new(f, 5);
    assert_int_equal(erase(f, 5).values, 0);
    assert_int_equal(erase(f, 5).pending, 1);
    kvs_index_publish_dirty(f->index, value, (kvs_slot){5, 0}, malloc(64), 16);
    assert_int_equal(where(f, 5), KVS_NOWHERE);
    assert_int_equal(kvs_index_dirty_count(f->index), 0);
    bury(f, 5, 1);
    value = claim_new(f, 5);
    assert_int_equal(erase(f, 5).pending, 1);
    kvs_index_publish_lmdb(f->index, value, (kvs_slot){5, 0}, true, &(kvs_slot){6, 0});
    assert_int_equal(where(f, 5), KVS_NOWHERE);
    bury(f, 5, 2);
    value = claim_new(f, 5);
    assert_int_equal(erase(f, 5).pending, 1);
    kvs_index_abandon(f->index, value);
    assert_int_equal(erase(f, 5).pending, 0);
}

/* Those in the queue, in its middle, at its end and at its head, leave it; the writer's own stays
   until it was written. */
static void test_of_the_writer(void **state)
{
    fixture *f = *state;
    kvs_slot slot;
    kvs_victim victim;
    uint32_t *sums, other;
    for (uint64_t b = 3; b <= 6; b++)
        put_dirty(f, b);
    for (uint64_t b = 5; b <= 6; b++) {
        assert_int_equal(erase(f, b).values, 1);
        assert_int_equal(where(f, b), KVS_NOWHERE);
    }
    assert_int_equal(erase(f, 3).values, 1);
    assert_int_equal(kvs_index_dirty_count(f->index), 1);
    assert_int_equal(f->index->sums_bytes, 64);
    uint32_t value = kvs_index_next_dirty(f->index, &slot, &sums);
    assert_int_equal(slot.a, 4);
    free(sums);
    assert_int_equal(erase(f, 4).values, 1);
    assert_int_equal(erase(f, 4).values, 0);
    assert_int_equal(where(f, 4), KVS_NOWHERE);
    assert_int_equal(claim(f, 4, &other), KVS_CLAIM_BUSY);
    while (kvs_evict_dead(f->index, &victim))
        kvs_evict_finish(f->index, &victim);
    assert_int_equal(f->index->values.used, 1);
    kvs_index_wrote(f->index, value, true, (kvs_slot){44, 0}, true);
    assert_int_equal(where(f, 4), KVS_NOWHERE);
    bury(f, 4, 2);
}

static void test_of_an_eviction(void **state)
{
    fixture *f = *state;
    kvs_victim victim;
    uint32_t cls = f->schema->parts[0].cls;
    kvs_index_publish_lmdb(f->index, claim_new(f, 5), (kvs_slot){5, 0}, true, &(kvs_slot){6, 0});
    assert_true(kvs_evict_lmdb(f->index, cls, &victim));
    assert_false(victim.gone);
    assert_int_equal(where(f, 5), KVS_IN_DRAM);
    assert_int_equal(erase(f, 5).values, 1);
    assert_int_equal(where(f, 5), KVS_NOWHERE);
    kvs_evict_finish(f->index, &victim);
    bury(f, 5, 1);
    kvs_index_publish_dram(f->index, claim_new(f, 5), (kvs_slot){5, 0}, false);
    assert_true(kvs_evict_dram(f->index, cls, &victim));
    assert_int_equal(erase(f, 5).pending, 1);
    kvs_evict_finish(f->index, &victim);
    bury(f, 5, 0);
}

static void test_of_a_promotion(void **state)
{
    fixture *f = *state;
    kvc_digest digest = h_digest(5);
    kvs_read read = {.n_rows = 10};
    kvs_index_publish_lmdb(f->index, claim_new(f, 5), (kvs_slot){5, 1}, true, NULL);
    assert_int_equal(kvs_index_hold_blocks(f->index, f->schema, &digest, 1, &read.block), KVC_OK);
    kvs_index_ref(f->index, f->schema, 0, 1, 1, &read, 1);
    assert_true(read.promote);
    kvs_index_unref(f->index, &read.value, 1);
    assert_int_equal(erase(f, 5).values, 1);
    assert_int_equal(where(f, 5), KVS_NOWHERE);
    assert_false(kvs_index_loaded(f->index, read.value, &(kvs_slot){7, 0}));
    bury(f, 5, 1);
    kvs_index_drop_blocks(f->index, &read.block, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_of_a_put, setup, teardown),
        cmocka_unit_test_setup_teardown(test_of_the_writer, setup, teardown),
        cmocka_unit_test_setup_teardown(test_of_an_eviction, setup, teardown),
        cmocka_unit_test_setup_teardown(test_of_a_promotion, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
