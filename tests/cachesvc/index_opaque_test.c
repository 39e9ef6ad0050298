/*
 * index_opaque_test.c: whose pieces a key takes, and when a value is there, on the index alone.
 */
#include <stdlib.h>
#include <string.h>

#include "evict.h"
#include "opaque_support.h"

#define NOW 1000000u
#define LEN (2ull * O_PIECE + 100)

typedef struct fixture {
    kvs_schemas *schemas;
    kvs_index *index;
    const kvs_schema *schema;
    h_schema desc;
    kvc_digest key;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    kvc_digest tenant = h_digest(1000);
    f->schemas = kvs_schemas_create();
    f->index = kvs_index_create(f->schemas->by_id);
    o_schema_init(&f->desc, "opaque");
    f->key = o_key(&f->desc, 1);
    assert_int_equal(kvs_schemas_add(f->schemas, &tenant, &f->desc.schema, kvs_index_class,
                                     f->index, &f->schema, NULL),
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

static uint32_t tag_of(const fixture *f, uint64_t sum)
{
    return kvs_opaque_tag(f->schema, &(kvs_opaque_id){LEN, sum});
}

static kvs_claim claim(fixture *f, uint64_t sum, uint32_t piece, uint64_t now_s, uint32_t *value_p)
{
    kvs_slot slot;
    return kvs_index_claim_piece(f->index, f->schema, kvs_opaque_place(f->schema, LEN, piece),
                                 tag_of(f, sum), &f->key, false, false, now_s, value_p, &slot);
}

static uint32_t put(fixture *f, uint64_t sum, uint32_t piece, uint64_t now_s)
{
    uint32_t value;
    assert_int_equal(claim(f, sum, piece, now_s, &value), KVS_CLAIM_MINE);
    kvs_index_publish_dram(f->index, value, (kvs_slot){sum, piece}, false);
    return value;
}

static bool there(fixture *f)
{
    uint16_t places[KVC_MAX_PIECES];
    uint8_t tier;
    uint32_t hits, n = kvs_index_pieces(f->index, f->schema, &f->key, places);
    assert_int_equal(kvs_index_match_opaque(f->index, f->schema, &f->key, 1, true, 0, &tier, &hits),
                     KVC_OK);
    assert_int_equal(hits, n > 0);
    assert_int_equal(tier != 0, n > 0);
    for (uint32_t i = 0; i < n; i++)
        assert_int_equal(places[i], kvs_opaque_place(f->schema, LEN, i));
    return n > 0;
}

static void reap(fixture *f)
{
    kvs_victim victim;
    while (kvs_evict_dead(f->index, &victim))
        kvs_evict_finish(f->index, &victim);
}

static void the_first_piece_decides(void **state)
{
    fixture *f = *state;
    uint32_t value;
    put(f, 7, 1, NOW);
    assert_int_equal(claim(f, 8, 0, NOW, &value), KVS_CLAIM_BUSY);
    assert_int_equal(claim(f, 8, 0, NOW + KVS_OPAQUE_REST_S - 1, &value), KVS_CLAIM_BUSY);
    put(f, 7, 0, NOW + KVS_OPAQUE_REST_S - 1); /* and each more keeps it young */
    assert_int_equal(claim(f, 8, 0, NOW + 2 * KVS_OPAQUE_REST_S - 2, &value), KVS_CLAIM_BUSY);
    assert_false(there(f));
    put(f, 7, 2, NOW + 2 * KVS_OPAQUE_REST_S);
    assert_true(there(f));
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(claim(f, 7, i, NOW, &value), KVS_CLAIM_EXISTS);
        assert_int_equal(claim(f, 8, i, NOW + 1000, &value), KVS_CLAIM_EXISTS);
    }
}

static void pieces_that_rest_make_way(void **state)
{
    fixture *f = *state;
    uint32_t value;
    put(f, 7, 0, NOW);
    put(f, 7, 2, NOW);
    assert_int_equal(claim(f, 8, 1, NOW + KVS_OPAQUE_REST_S, &value), KVS_CLAIM_REST);
    assert_int_equal(claim(f, 7, 1, NOW + KVS_OPAQUE_REST_S, &value), KVS_CLAIM_MINE);
    kvs_index_abandon(f->index, value);
    reap(f);
    for (uint32_t i = 0; i < 3; i++)
        put(f, 8, i, NOW + KVS_OPAQUE_REST_S);
    assert_true(there(f));
    assert_int_equal(claim(f, 7, 0, NOW + 100, &value), KVS_CLAIM_EXISTS);
}

/* A put that waits for its disk for long is not taken for one that was given up. */
static void a_piece_that_is_being_filled_is_waited_for(void **state)
{
    fixture *f = *state;
    uint32_t mine, value;
    assert_int_equal(claim(f, 7, 0, NOW, &mine), KVS_CLAIM_MINE);
    assert_int_equal(claim(f, 8, 0, NOW + 100, &value), KVS_CLAIM_BUSY);
    kvs_index_abandon(f->index, mine);
    put(f, 8, 0, NOW + 100);
}

static void one_evicted_piece_takes_the_value(void **state)
{
    fixture *f = *state;
    kvs_victim victim;
    uint32_t value;
    for (uint32_t i = 0; i < 3; i++)
        put(f, 7, i, NOW);
    assert_true(there(f));
    assert_true(kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim));
    assert_false(there(f)); /* as soon as it is on its way */
    kvs_evict_finish(f->index, &victim);
    assert_false(there(f));
    assert_int_equal(claim(f, 8, 0, NOW + KVS_OPAQUE_REST_S, &value), KVS_CLAIM_REST);
    reap(f);
    assert_int_equal(f->index->values.used, 0);
    assert_int_equal(f->index->blocks.used, 0);
}

/* What eviction asks, and the walk that it stands for. */
static void expect_coming(fixture *f, uint32_t n)
{
    uint32_t id = kvs_block_find(f->index, f->schema->id, &f->key), walked = 0;
    const kvs_block *block = kvs_block_at(f->index, id);
    for (uint32_t i = 0; i < block->n_values; i++)
        walked += (kvs_value_at(f->index, block->values[i])->flags & (KVS_FILLING | KVS_LEAVING)) ==
                  KVS_FILLING;
    assert_int_equal(walked, n);
    assert_int_equal(block->n_coming, n);
    assert_int_equal(kvs_opaque_coming_locked(f->index, kvs_value_at(f->index, block->values[0])),
                     n > 0);
}

/* No piece gives way while another comes, however its put ends; one that leaves keeps nobody. */
static void pieces_that_come_keep_the_others(void **state)
{
    fixture *f = *state;
    const kvs_slot slot = {1, 2};
    kvs_victim victim, second;
    kvs_erased erased = {0};
    uint32_t value, other;
    uint16_t last = kvs_opaque_place(f->schema, LEN, 2);
    put(f, 7, 0, NOW);
    expect_coming(f, 0);
    assert_int_equal(claim(f, 7, 1, NOW, &value), KVS_CLAIM_MINE);
    assert_int_equal(claim(f, 7, 2, NOW, &other), KVS_CLAIM_MINE);
    expect_coming(f, 2);
    assert_false(kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim));
    kvs_index_abandon(f->index, value);
    expect_coming(f, 1);
    kvs_index_erase(f->index, f->schema, &f->key, &last, 1, &erased);
    expect_coming(f, 1);
    assert_false(kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim));
    kvs_index_publish_lmdb(f->index, other, slot, true, NULL);
    expect_coming(f, 0);
    put(f, 7, 1, NOW);
    assert_true(kvs_evict_dram(f->index, KVS_ANY_CLASS, &victim));
    expect_coming(f, 0);
    assert_true(kvs_evict_dram(f->index, KVS_ANY_CLASS, &second));
    kvs_evict_finish(f->index, &victim);
    kvs_evict_finish(f->index, &second);
    reap(f);
    assert_int_equal(f->index->blocks.used, 0);
}

/* As many at once as a value has. */
static void all_pieces_come_at_once(void **state)
{
    enum { N = KVC_MAX_PIECES };
    static uint32_t values[N];
    const uint64_t total = (uint64_t)N * O_PIECE;
    fixture *f = *state;
    kvs_slot slot;
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(kvs_index_claim_piece(f->index, f->schema,
                                               kvs_opaque_place(f->schema, total, i), 5, &f->key,
                                               false, false, NOW, &values[i], &slot),
                         KVS_CLAIM_MINE);
    for (uint32_t i = 0; i < N; i++) {
        expect_coming(f, N - i);
        kvs_index_abandon(f->index, values[i]);
    }
    assert_int_equal(f->index->blocks.used, 0);
}

static void recovered_pieces(void **state)
{
    fixture *f = *state;
    const kvs_slot slot = {1, 2};
    uint16_t place[3];
    uint32_t value;
    for (uint32_t i = 0; i < 3; i++)
        place[i] = kvs_opaque_place(f->schema, LEN, i);
    for (uint32_t i = 0; i < 2; i++)
        assert_int_equal(
            kvs_index_recovered_piece(f->index, f->schema, place[i], tag_of(f, 7), &f->key, slot),
            KVC_OK);
    assert_int_equal(
        kvs_index_recovered_piece(f->index, f->schema, place[2], tag_of(f, 8), &f->key, slot),
        KVC_INVALID);
    assert_false(there(f));
    assert_int_equal(
        kvs_index_recovered_piece(f->index, f->schema, place[0], tag_of(f, 7), &f->key, slot),
        KVC_EXISTS);
    assert_int_equal(
        kvs_index_recovered_piece(f->index, f->schema, place[2], tag_of(f, 7), &f->key, slot),
        KVC_OK);
    assert_true(there(f));
    assert_int_equal(claim(f, 7, 0, NOW, &value), KVS_CLAIM_EXISTS);
}

/* Names and rooms: every length gives pieces that can be told from their key, and end records that
   fit to nothing else. */
static void rooms_and_names(void **state)
{
    fixture *f = *state;
    uint64_t random = 5;
    uint8_t *room = malloc(2 * (size_t)O_PIECE);
    for (uint32_t i = 0; i < 2000; i++) {
        uint64_t total = h_random(&random) % (3ull * O_PIECE) >> (i % 20);
        kvs_opaque_id id = {total, h_random(&random) | 1}, back;
        uint32_t n = kvs_opaque_pieces(f->schema, total), piece = (uint32_t)(random % n);
        uint16_t place = kvs_opaque_place(f->schema, total, piece), place_back;
        uint32_t tag = kvs_opaque_tag(f->schema, &id), tag_back, len_bytes;
        const kvs_part *part = kvs_part_at(f->schema, place);
        assert_true(kvs_opaque_key_place(f->schema, kvs_opaque_key_part(tag, place),
                                         part->row_bytes, part->n_rows, &place_back, &tag_back));
        assert_int_equal(place_back, place);
        assert_int_equal(tag_back, tag);
        assert_true(part->value_bytes <= 4096 ||
                    (part->value_bytes - KVS_OPAQUE_END_BYTES) * 4 / 5 <=
                        kvs_opaque_piece_bytes(f->schema, total, piece) + 4096);
        kvs_opaque_seal(f->schema, place, &id, room);
        assert_int_equal(kvs_opaque_read(f->schema, place, tag, room, &back, &len_bytes), KVC_OK);
        assert_int_equal(back.sum, id.sum);
        assert_int_equal(len_bytes, kvs_opaque_piece_bytes(f->schema, total, piece));
        assert_int_equal(
            kvs_opaque_read(f->schema, place, tag == 1 ? 2 : tag - 1, room, &back, &len_bytes),
            KVC_CORRUPT);
        room[part->value_bytes - KVS_OPAQUE_END_BYTES + random % 32] ^= 1;
        assert_int_equal(kvs_opaque_read(f->schema, place, tag, room, &back, &len_bytes),
                         KVC_CORRUPT);
    }
    free(room);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(the_first_piece_decides),
        TEST(pieces_that_rest_make_way),
        TEST(a_piece_that_is_being_filled_is_waited_for),
        TEST(one_evicted_piece_takes_the_value),
        TEST(pieces_that_come_keep_the_others),
        TEST(all_pieces_come_at_once),
        TEST(recovered_pieces),
        TEST(rooms_and_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
