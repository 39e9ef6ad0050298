/*
 * tier_gpu_test.c: what the gpu tier promises beyond the table, over a fake of kvk/cuda.h: the cap
 * on device memory, one tenant per segment and cleared memory on a change of tenant, places that
 * others can open, sums held against what is read, and a device that fails or was never there.
 */
#include "tier_support.h"

#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "fake_cuda.h"
#include "kvk/cuda.h"

#define CAPACITY (32u << 20)

static const shape small = {4096, 4};
static const shape large = {4096, 64};

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    fake_cuda_absent(false);
    fake_cuda_no_sharing(false);
    fake_cuda_copies(UINT32_MAX);
    fake_cuda_allocations(UINT32_MAX);
    tut_init(t, kvs_tier_find("gpu"), NULL);
    t->opts.capacity_bytes = CAPACITY;
    *state = t;
    return tut_open(t) == KVC_OK ? 0 : -1;
}

static int teardown(void **state)
{
    int failed = tut_delete(state);

    fake_cuda_copies(UINT32_MAX);
    fake_cuda_allocations(UINT32_MAX);
    return failed != 0 || fake_cuda_held() != 0 || fake_cuda_device_bytes() != 0;
}

/* Puts values until one does not fit; gives how many did. */
static uint32_t fill(tier_under_test *t, uint64_t tenant, shape s, kvs_slot *slots, uint32_t max)
{
    for (uint32_t i = 0; i < max; i++) {
        kvs_value_key key = key_of(tenant, i, 0);
        put_result r = put_value(t, &key, 1, s, false);
        if (r.status != KVC_OK) {
            assert_int_equal(r.status, KVC_AGAIN);
            return i;
        }
        slots[i] = r.slot;
    }
    return max;
}

static void drop(tier_under_test *t, uint64_t tenant, const kvs_slot *slots, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        kvs_value_key key = key_of(tenant, i, 0);
        t->ops->release(t->tier, &key, slots[i]);
    }
}

static kvs_tier_usage usage_of(tier_under_test *t)
{
    kvs_tier_usage usage;

    t->ops->usage(t->tier, &usage);
    return usage;
}

static void test_the_cap_holds_on_the_device(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[256];

    for (uint32_t round = 0; round < 3; round++) {
        uint32_t n = fill(t, round, large, slots, 256);
        assert_int_equal(n, CAPACITY / (256u << 10));
        assert_int_equal(fake_cuda_device_bytes(), CAPACITY);
        assert_int_equal(used_bytes(t), CAPACITY);
        drop(t, round, slots, n);
    }
    assert_int_equal(used_bytes(t), 0);
    assert_false(usage_of(t).failed);
}

/* What another process sees of a slot. */
static const uint8_t *open_place(tier_under_test *t, kvs_slot slot, kvs_tier_place *place_p,
                                 void **base_p)
{
    kvk_cuda_shared shared;

    assert_int_equal(t->ops->locate(t->tier, slot, place_p), KVC_OK);
    assert_true(place_p->off_bytes < place_p->len_bytes);
    memcpy(shared.bytes, place_p->handle.share, sizeof(shared.bytes));
    assert_int_equal(kvk_cuda_share_open(NULL, &shared, base_p), KVC_OK);
    return (const uint8_t *)*base_p + place_p->off_bytes;
}

static void test_others_can_open_a_place(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 5, 2);
    uint8_t want[4 * 4096];
    kvs_tier_place place;
    void *base;

    (void)put_value(t, &(kvs_value_key){0}, 1, small, false);
    put_result r = put_value(t, &key, 1, small, false);
    fill_rows(&key, 1, small, want);
    assert_memory_equal(open_place(t, r.slot, &place, &base), want, sizeof(want));
    assert_int_equal(place.segment, r.slot.a);
    t->ops->release(t->tier, &key, r.slot);
    assert_int_equal(t->ops->locate(t->tier, r.slot, &place), KVC_INVALID);
    kvk_cuda_share_close(NULL, base);
}

/* A segment goes to another tenant with other memory, all zero, and only once nobody has it. */
static void test_a_tenant_never_sees_anothers_bytes(void **state)
{
    tier_under_test *t = *state;
    enum { N = CAPACITY / (256u << 10) };
    kvs_slot slots[N], more[N];
    kvs_tier_place place;
    uint64_t len_bytes;
    uint8_t want[4 * 4096];
    void *base;

    assert_int_equal(fill(t, 1, large, slots, N), N);
    const uint8_t *old = open_place(t, slots[0], &place, &base);
    assert_int_equal(t->ops->count_mapping(t->tier, place.segment, true, &len_bytes), 1);
    assert_int_equal(len_bytes, place.len_bytes);
    drop(t, 1, slots, N);
    uint32_t n = fill(t, 2, large, more, N);
    assert_int_equal(n, N - place.len_bytes / (256u << 10));
    for (uint32_t i = 0; i < n; i++)
        assert_int_not_equal(more[i].a, place.segment);
    drop(t, 2, more, n);
    assert_int_equal(t->ops->count_mapping(t->tier, place.segment, false, &len_bytes), 0);
    uint8_t before = old[1];
    n = fill(t, 3, small, more, 1);
    assert_int_equal(n, 1);
    for (uint32_t i = 1; i < N && more[0].a != place.segment; i++) {
        kvs_value_key key = key_of(3 + i, 0, 0);
        more[0] = put_value(t, &key, 1, small, false).slot;
    }
    assert_int_equal(more[0].a, place.segment);
    assert_int_equal(old[1], before); /* the old memory is as it was: it is not the segment's */
    kvk_cuda_share_close(NULL, base);
    const uint8_t *fresh = open_place(t, more[0], &place, &base);
    for (size_t i = sizeof(want); i < place.len_bytes; i++)
        assert_int_equal(fresh[i], 0);
    kvk_cuda_share_close(NULL, base);
}

static void test_damage_is_noticed(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);
    kvs_tier_place place;
    void *base;
    bool equal;

    put_result r = put_value(t, &key, 1, large, false);
    (void)open_place(t, r.slot, &place, &base);
    ((uint8_t *)base)[place.off_bytes + 7 * 4096 + 9] ^= 4;
    assert_int_equal(check_rows(t, &key, 1, large, r.slot, 0, 7, &equal), KVC_OK);
    assert_true(equal);
    assert_int_equal(check_rows(t, &key, 1, large, r.slot, 7, 1, &equal), KVC_CORRUPT);
    assert_int_equal(check_rows(t, &key, 1, large, r.slot, 0, 64, &equal), KVC_CORRUPT);
    assert_int_equal(check_rows(t, &key, 1, large, r.slot, 8, 56, &equal), KVC_OK);
    assert_true(equal);
    assert_false(usage_of(t).failed);
    kvk_cuda_share_close(NULL, base);
}

static void test_a_device_that_fails(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1), other = key_of(1, 2, 1);
    kvs_tier_place place;
    bool equal;

    kvc_log_set_sink(tut_log_keep, NULL);
    tut_log_clear();
    put_result r = put_value(t, &key, 1, small, false);
    assert_int_equal(r.status, KVC_OK);
    fake_cuda_copies(0);
    assert_int_equal(check_rows(t, &key, 1, small, r.slot, 0, 1, &equal), KVC_IO);
    assert_true(usage_of(t).failed);
    fake_cuda_copies(UINT32_MAX); /* too late: who knows what it did meanwhile */
    assert_int_equal(check_rows(t, &key, 1, small, r.slot, 0, 1, &equal), KVC_IO);
    assert_int_equal(put_value(t, &other, 1, small, false).status, KVC_IO);
    assert_int_equal(t->ops->locate(t->tier, r.slot, &place), KVC_UNSUPPORTED);
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_IO);
    t->ops->release(t->tier, &key, r.slot);
    assert_int_equal(value_count(t), 0);
    kvc_log_set_sink(NULL, NULL);
    const char *line = strstr(tut_log, "the device failed");
    assert_non_null(line);
    assert_null(strstr(line + 1, "the device failed"));
}

static void test_a_write_that_fails_leaves_nothing(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);

    fake_cuda_copies(0);
    assert_int_equal(put_value(t, &key, 1, small, false).status, KVC_IO);
    assert_true(usage_of(t).failed);
    assert_int_equal(value_count(t), 0);
    assert_int_equal(used_bytes(t), 0);
}

/* The device's memory is others' too: what is not there is as if the cap were lower. */
static void test_a_device_without_memory(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[256] = {0};

    fake_cuda_allocations(2);
    uint32_t n = fill(t, 1, large, slots, 256);
    assert_int_equal(n, 2 * (2u << 20) / (256u << 10));
    assert_false(usage_of(t).failed);
    fake_cuda_allocations(UINT32_MAX);
    n += fill(t, 1, large, slots + n, 256 - n);
    assert_int_equal(n, CAPACITY / (256u << 10));
    drop(t, 1, slots, n);
    fake_cuda_allocations(0); /* a change of tenant that finds none either, and again with some */
    assert_int_equal(fill(t, 2, large, slots, 1), 0);
    fake_cuda_allocations(UINT32_MAX);
    assert_int_equal(fill(t, 2, large, slots, 256), CAPACITY / (256u << 10));
    kvs_value_key key = key_of(2, 3, 0);
    assert_value(t, &key, 1, large, slots[3]);
}

static void test_no_device(void **state)
{
    tier_under_test *t = *state;

    tut_close(t);
    fake_cuda_absent(true);
    assert_int_equal(tut_open(t), KVC_UNSUPPORTED);
    fake_cuda_absent(false);
    t->opts.device = 3;
    assert_int_equal(tut_open(t), KVC_UNSUPPORTED);
    t->opts.device = 0;
    fake_cuda_allocations(1); /* not even what it needs to begin */
    assert_int_equal(tut_open(t), KVC_NO_MEMORY);
    assert_int_equal(fake_cuda_held(), 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_the_cap_holds_on_the_device),
        TEST(test_others_can_open_a_place),
        TEST(test_a_tenant_never_sees_anothers_bytes),
        TEST(test_damage_is_noticed),
        TEST(test_a_device_that_fails),
        TEST(test_a_write_that_fails_leaves_nothing),
        TEST(test_a_device_without_memory),
        TEST(test_no_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
