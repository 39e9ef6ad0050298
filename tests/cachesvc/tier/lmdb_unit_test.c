/*
 * lmdb_unit_test.c: the lmdb tier's records, keys and sums cache on their own, private headers in
 * view.
 */
#include "tier_support.h"

#include <stdlib.h>
#include <string.h>

#include "base/sum.h"
#include "lmdb_pool.h"
#include "lmdb_record.h"
#include "lmdb_sums.h"
#include "support.h"

static void test_rows_start_on_a_page(void **state)
{
    static const struct {
        shape s;
        uint32_t prefix_bytes, pages;
    } cases[] = {
        {{4096, 256}, 4080, 257}, {{4096, 64}, 4080, 65},     {{1, 1}, 4080, 2},
        {{4096, 988}, 4080, 989}, {{4096, 989}, 8176, 991},   {{128, 1024}, 8176, 34},
        {{4097, 1}, 4080, 3},     {{1u << 20, 1}, 4080, 257},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        shape s = cases[i].s;
        assert_int_equal(kvsi_record_prefix_bytes(s.row_bytes, s.n_rows), cases[i].prefix_bytes);
        assert_int_equal((kvsi_record_prefix_bytes(s.row_bytes, s.n_rows) + 16) % 4096, 0);
        assert_int_equal(kvsi_record_pages(s.row_bytes, s.n_rows), cases[i].pages);
    }
}

/* A small piece of an opaque value takes one page, whole; a longer one lies as rows of blocks do.
 */
static void test_small_pieces_share_a_page(void **state)
{
    uint32_t row_bytes = KVS_SMALL_PIECE_ROW_BYTES, n_rows = KVS_PIECE_ROWS;

    (void)state;
    assert_int_equal(kvsi_record_prefix_bytes(row_bytes, n_rows), 256);
    assert_int_equal(kvsi_record_bytes(row_bytes, n_rows), 4080);
    assert_int_equal(kvsi_record_pages(row_bytes, n_rows), 1);
    assert_int_equal(kvsi_record_prefix_bytes(row_bytes + 1, n_rows), 4080);
    assert_int_equal(kvsi_record_pages(128, n_rows), 4);
    assert_int_equal(kvsi_record_prefix_bytes(row_bytes, 64), 4080);
}

static void test_key_round_trip(void **state)
{
    kvs_value_key key = key_of(7, 8, 0xfedcba98u), back;
    uint8_t bytes[KVSI_KEY_BYTES];
    uint32_t row_bytes, n_rows;

    (void)state;
    kvsi_key_pack(&key, 4096, 256, bytes);
    kvsi_key_unpack(bytes, &back, &row_bytes, &n_rows);
    assert_memory_equal(&key, &back, sizeof(key));
    assert_int_equal(row_bytes, 4096);
    assert_int_equal(n_rows, 256);
}

/* Any bit of a prefix that is not padding, any wrong length and any wrong owner is noticed. */
static void test_record_check(void **state)
{
    shape s = {40, 64};
    kvs_value_key key = key_of(1, 2, 3), other = key_of(1, 3, 3);
    uint8_t rows[40 * 64];
    uint32_t sums[64];
    size_t len = kvsi_record_bytes(s.row_bytes, s.n_rows);
    uint8_t *record = malloc(len);

    (void)state;
    fill_rows(&key, 1, s, rows);
    kvc_row_sums(rows, s.row_bytes, s.n_rows, sums);
    kvs_tier_write write = {
        .key = key, .row_bytes = 40, .n_rows = 64, .rows = rows, .row_sums = sums};
    kvsi_record_write(&write, len, record);
    assert_int_equal(kvsi_record_check(record, len, &key, 40, 64), KVC_OK);
    assert_memory_equal(kvsi_record_sums(record), sums, sizeof(sums));
    assert_memory_equal(record + 4080, rows, sizeof(rows));
    assert_int_equal(kvsi_record_check(record, len - 1, &key, 40, 64), KVC_CORRUPT);
    assert_int_equal(kvsi_record_check(record, len, &key, 64, 40), KVC_CORRUPT);
    assert_int_equal(kvsi_record_check(record, len, &other, 40, 64), KVC_CORRUPT);
    for (uint32_t bit = 0; bit < (128 + 64 * 4) * 8; bit++) {
        record[bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_int_equal(kvsi_record_check(record, len, &key, 40, 64), KVC_CORRUPT);
        record[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    assert_int_equal(kvsi_record_check(record, len, &key, 40, 64), KVC_OK);
    free(record);
}

static void make_key(uint32_t i, uint8_t out[KVSI_KEY_BYTES])
{
    kvs_value_key key = key_of(1, i, i);

    kvsi_key_pack(&key, 64, 256, out);
}

static void test_sums_cache_keeps_its_cap(void **state)
{
    kvsi_sums *sums;
    uint32_t values[256], n_cached = 0;
    uint8_t key[KVSI_KEY_BYTES];

    (void)state;
    assert_int_equal(kvsi_sums_create(64u << 10, &sums), KVC_OK);
    uintptr_t lowest = UINTPTR_MAX, highest = 0;
    for (uint32_t i = 0; i < 500; i++) {
        make_key(i, key);
        for (uint32_t k = 0; k < 256; k++)
            values[k] = i * 1000 + k;
        kvsi_sums_entry *entry = kvsi_sums_add(sums, key, values, 256);
        assert_non_null(entry);
        lowest = (uintptr_t)entry < lowest ? (uintptr_t)entry : lowest;
        highest = (uintptr_t)entry > highest ? (uintptr_t)entry : highest;
        assert_true(highest - lowest < 64u << 10); /* one mapping of that size has them all */
        kvsi_sums_put(sums, entry);
        /* Keep the first one in use: it is the newest again and again. */
        make_key(0, key);
        entry = kvsi_sums_find(sums, key);
        assert_non_null(entry);
        kvsi_sums_put(sums, entry);
    }
    for (uint32_t i = 0; i < 500; i++) {
        make_key(i, key);
        kvsi_sums_entry *entry = kvsi_sums_find(sums, key);
        if (entry == NULL)
            continue;
        n_cached++;
        assert_true(i == 0 || i > 400);
        assert_int_equal(entry->n_rows, 256);
        for (uint32_t k = 0; k < 256; k++)
            assert_int_equal(entry->sums[k], i * 1000 + k);
        kvsi_sums_put(sums, entry);
    }
    assert_in_range(n_cached, 40, 60);
    kvsi_sums_destroy(sums);
}

/* Where values of another size are read from now on, theirs take the place of the old ones. */
static void test_sums_cache_changes_sizes(void **state)
{
    static const uint32_t sizes[] = {256, 1000, 16, 700};
    kvsi_sums *sums;
    uint32_t values[5000] = {0};
    uint8_t key[KVSI_KEY_BYTES];

    (void)state;
    assert_int_equal(kvsi_sums_create(512u << 10, &sums), KVC_OK);
    for (uint32_t turn = 0; turn < 4; turn++) {
        uint32_t n_cached = 0, n_rows = sizes[turn];
        for (uint32_t i = 0; i < 2000; i++) {
            make_key(turn * 2000 + i, key);
            values[n_rows - 1] = i;
            kvsi_sums_put(sums, kvsi_sums_add(sums, key, values, n_rows));
        }
        for (uint32_t i = 0; i < 2000; i++) {
            make_key(turn * 2000 + i, key);
            kvsi_sums_entry *entry = kvsi_sums_find(sums, key);
            if (entry == NULL)
                continue;
            assert_int_equal(entry->sums[n_rows - 1], i);
            kvsi_sums_put(sums, entry);
            n_cached++;
        }
        assert_true(n_cached * (152 + n_rows * 4) > 300u << 10);
    }
    make_key(9999, key); /* larger than anything the cache takes: served, and nothing gives way */
    kvsi_sums_entry *large = kvsi_sums_add(sums, key, values, 5000);
    assert_non_null(large);
    assert_null(kvsi_sums_find(sums, key));
    kvsi_sums_put(sums, large);
    make_key(3 * 2000 + 1999, key);
    kvsi_sums_entry *last = kvsi_sums_find(sums, key);
    assert_non_null(last);
    kvsi_sums_put(sums, last);
    kvsi_sums_destroy(sums);
}

/* Random cells of all sizes: none overlaps another, and all of the pool can be had again. */
static void test_pool(void **state)
{
    enum { N = 400 };
    static struct {
        uint8_t *at;
        uint32_t len, mark;
    } cells[N];
    kvsi_pool pool;
    support_random random = support_seed(1);

    (void)state;
    assert_int_equal(kvsi_pool_init(&pool, 256u << 10), KVC_OK);
    for (uint32_t i = 0; i < 200000; i++) {
        uint32_t k = (uint32_t)support_below(&random, N);
        if (cells[k].at != NULL) {
            for (uint32_t b = 0; b < cells[k].len; b++)
                assert_int_equal(cells[k].at[b], (uint8_t)(cells[k].mark + b));
            kvsi_pool_free(&pool, cells[k].at);
            cells[k].at = NULL;
            continue;
        }
        cells[k].len = 1 + (uint32_t)support_below(&random, i / 1000 % 2 == 0 ? 300 : 3000);
        cells[k].mark = i;
        cells[k].at = kvsi_pool_alloc(&pool, cells[k].len);
        for (uint32_t b = 0; cells[k].at != NULL && b < cells[k].len; b++)
            cells[k].at[b] = (uint8_t)(i + b);
        assert_true(cells[k].at == NULL || kvsi_pool_has(&pool, cells[k].at));
    }
    for (uint32_t k = 0; k < N; k++)
        if (cells[k].at != NULL)
            kvsi_pool_free(&pool, cells[k].at);
    for (uint32_t k = 0; k < pool.n_slabs; k++)
        assert_non_null(kvsi_pool_alloc(&pool, kvsi_pool_max(&pool)));
    assert_null(kvsi_pool_alloc(&pool, 1));
    assert_false(kvsi_pool_has(&pool, &pool));
    kvsi_pool_fini(&pool);
}

/* An entry that someone holds outlives its drop; the key is gone at once. */
static void test_sums_cache_drop(void **state)
{
    kvsi_sums *sums;
    uint32_t one = 1, two = 2;
    uint8_t key[KVSI_KEY_BYTES];

    (void)state;
    make_key(1, key);
    assert_int_equal(kvsi_sums_create(16u << 10, &sums), KVC_OK);
    kvsi_sums_entry *held = kvsi_sums_add(sums, key, &one, 1);
    kvsi_sums_drop(sums, key);
    kvsi_sums_drop(sums, key);
    assert_null(kvsi_sums_find(sums, key));
    assert_int_equal(held->sums[0], 1);
    kvsi_sums_entry *fresh = kvsi_sums_add(sums, key, &two, 1);
    kvsi_sums_put(sums, held);
    held = kvsi_sums_find(sums, key);
    assert_ptr_equal(held, fresh);
    assert_int_equal(held->sums[0], 2);
    kvsi_sums_put(sums, held);
    kvsi_sums_put(sums, fresh);
    kvsi_sums_destroy(sums);
}

static void test_sums_cache_of_nothing(void **state)
{
    kvsi_sums *sums;
    uint32_t one = 1;
    uint8_t key[KVSI_KEY_BYTES];

    (void)state;
    make_key(1, key);
    assert_int_equal(kvsi_sums_create(0, &sums), KVC_OK);
    kvsi_sums_entry *entry = kvsi_sums_add(sums, key, &one, 1);
    assert_int_equal(entry->sums[0], 1);
    assert_null(kvsi_sums_find(sums, key));
    kvsi_sums_put(sums, entry);
    kvsi_sums_destroy(sums);
}

/* A page of LMDB's list of free ones becomes a hole: none may be a meta, or beyond the file. */
static void test_free_pages(void **state)
{
    enum { FILE_PAGES = 100, CAP = 6 };
    const uint64_t good[] = {3, 99, 2, 50}, metas[][2] = {{1, 0}, {1, 1}}, beyond[] = {1, 100};
    const uint64_t too_many[] = {2, 5}, longer[] = {5, 4, 5, 6, 7, 8};
    uint64_t pages[CAP] = {0};
    uint32_t n = 0;

    (void)state;
    assert_true(kvsi_free_pages_add(good, sizeof(good), FILE_PAGES, pages, CAP, &n));
    assert_int_equal(n, 3);
    for (uint32_t i = 0; i < 3; i++)
        assert_int_equal(pages[i], good[1 + i]);
    for (uint32_t i = 0; i < 2; i++)
        assert_false(kvsi_free_pages_add(metas[i], sizeof(metas[i]), FILE_PAGES, pages, CAP, &n));
    assert_false(kvsi_free_pages_add(beyond, sizeof(beyond), FILE_PAGES, pages, CAP, &n));
    assert_false(kvsi_free_pages_add(too_many, sizeof(too_many), FILE_PAGES, pages, CAP, &n));
    assert_false(kvsi_free_pages_add(good, 7, FILE_PAGES, pages, CAP, &n));
    assert_int_equal(n, 3);
    assert_true(kvsi_free_pages_add(longer, sizeof(longer), FILE_PAGES, pages, CAP, &n));
    assert_int_equal(n, CAP); /* no room for all */
    assert_int_equal(pages[CAP - 1], 6);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_start_on_a_page),
        cmocka_unit_test(test_small_pieces_share_a_page),
        cmocka_unit_test(test_key_round_trip),
        cmocka_unit_test(test_record_check),
        cmocka_unit_test(test_free_pages),
        cmocka_unit_test(test_sums_cache_keeps_its_cap),
        cmocka_unit_test(test_sums_cache_changes_sizes),
        cmocka_unit_test(test_pool),
        cmocka_unit_test(test_sums_cache_drop),
        cmocka_unit_test(test_sums_cache_of_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
