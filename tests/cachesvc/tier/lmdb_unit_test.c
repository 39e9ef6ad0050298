/*
 * lmdb_unit_test.c: the lmdb tier's records, keys and sums cache on their own, private headers in
 * view.
 */
#include "tier_support.h"

#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#include "base/sum.h"
#include "lmdb_record.h"
#include "lmdb_sums.h"

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
        assert_int_equal(kvsi_record_prefix_bytes(s.n_rows), cases[i].prefix_bytes);
        assert_int_equal((kvsi_record_prefix_bytes(s.n_rows) + 16) % 4096, 0);
        assert_int_equal(kvsi_record_pages(s.row_bytes, s.n_rows), cases[i].pages);
    }
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
    kvsi_record_write(&write, record);
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
    struct mallinfo2 before = mallinfo2();
    for (uint32_t i = 0; i < 500; i++) {
        make_key(i, key);
        for (uint32_t k = 0; k < 256; k++)
            values[k] = i * 1000 + k;
        kvsi_sums_entry *entry = kvsi_sums_add(sums, key, values, 256);
        assert_non_null(entry);
        kvsi_sums_put(sums, entry);
        struct mallinfo2 now = mallinfo2();
        assert_true(now.uordblks - before.uordblks <=
                    (64u << 10) + 8192); /* the heap's own heads */
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_start_on_a_page),
        cmocka_unit_test(test_key_round_trip),
        cmocka_unit_test(test_record_check),
        cmocka_unit_test(test_sums_cache_keeps_its_cap),
        cmocka_unit_test(test_sums_cache_drop),
        cmocka_unit_test(test_sums_cache_of_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
