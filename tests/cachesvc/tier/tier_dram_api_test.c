/*
 * tier_dram_api_test.c: what the dram tier promises beyond the table: sealed segments, one tenant
 * per segment, fresh memory on a change of tenant, segments counted against the cap, and that two
 * size classes share a small cap.
 */
#include "tier_support.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tier_dram.h"

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    tut_init(t, kvs_tier_find("dram"), NULL);
    *state = t;
    return 0;
}

static void open_with(tier_under_test *t, uint64_t capacity, uint32_t max_value)
{
    t->opts.capacity_bytes = capacity;
    t->opts.max_value_bytes = max_value;
    assert_int_equal(tut_open(t), KVC_OK);
}

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

static void test_segments_are_sealed(void **state)
{
    tier_under_test *t = *state;
    kvs_dram_segment segment;
    kvs_value_key key = key_of(1, 1, 1);
    shape s = {4096, 4};
    uint64_t off;
    uint32_t n;

    open_with(t, 32u << 20, 1u << 20);
    put_result r = put_value(t, &key, 1, s, false);
    kvs_dram_segments(t->tier, &segment, 1, &n);
    assert_int_equal(n, 1);
    assert_int_equal(segment.class_bytes, 16384);
    assert_int_equal(fcntl(segment.fd, F_GET_SEALS) &
                         (F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL | 0x10 /* FUTURE_WRITE */),
                     F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL | 0x10);
    assert_int_equal(ftruncate(segment.fd, 4096), -1);
    assert_ptr_equal(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, segment.fd, 0),
                     MAP_FAILED);

    /* A reader of the fd sees the rows where locate says. */
    assert_int_equal(kvs_dram_locate(t->tier, r.slot, &segment, &off), KVC_OK);
    const uint8_t *peer = mmap(NULL, segment.len_bytes, PROT_READ, MAP_SHARED, segment.fd, 0);
    assert_ptr_not_equal(peer, MAP_FAILED);
    assert_memory_equal(peer + off, t->ops->map(t->tier, r.slot), 16384);
    munmap((void *)(uintptr_t)peer, segment.len_bytes);

    t->ops->release(t->tier, &key, r.slot);
    assert_int_equal(kvs_dram_locate(t->tier, r.slot, &segment, &off), KVC_INVALID);
}

static void test_cap_counts_segments(void **state)
{
    tier_under_test *t = *state;
    static const uint64_t caps[] = {
        4096, 5000, 1u << 20, (1u << 20) + 4095, 100u << 20, (1ull << 30) + 12345678};

    for (size_t i = 0; i < sizeof(caps) / sizeof(caps[0]); i++) {
        kvs_slot slots[4];
        uint32_t n;
        open_with(t, caps[i], 1u << 20);
        uint32_t held = fill(t, 1, (shape){1000, 4}, slots, 4);
        assert_true(held >= 1);
        kvs_dram_segment segments[64];
        kvs_dram_segments(t->tier, segments, 64, &n);
        assert_true(n >= 1 && n <= 64);
        assert_true(segments[0].len_bytes <= KVS_DRAM_SEGMENT_BYTES);
        assert_true(segments[0].len_bytes % 4096 == 0);
        assert_true(medium_bytes(t) <= caps[i]);
        drop(t, 1, slots, held);
        tut_close(t);
    }
    t->opts.capacity_bytes = 4095;
    assert_int_equal(tut_open(t), KVC_INVALID);
}

/* A value longer than a segment can never be kept. */
static void test_longer_than_a_segment(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);
    kvs_slot slot;
    void *addr;

    open_with(t, 1u << 20, 1u << 20);
    assert_int_equal(t->ops->reserve(t->tier, &key, 1u << 20, 1, 1, &slot, &addr), KVC_OK);
    t->ops->release(t->tier, &key, slot); /* reserved, never committed */
    assert_int_equal(value_count(t), 0);
    assert_int_equal(t->ops->reserve(t->tier, &key, (1u << 20) + 1, 1, 1, &slot, &addr),
                     KVC_INVALID);
    assert_null(addr);
}

/* Room for several values at once ends where a segment does. */
static void test_reserve_several(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);
    kvs_slot slots[16];
    void *addrs[16];
    uint32_t taken = 0;

    open_with(t, 1u << 20, 65536); /* 16 segments of 64 KiB */
    while (taken < 64) {
        uint32_t n = taken % 16 == 10 ? 6 : 10;
        assert_int_equal(t->ops->reserve(t->tier, &key, 4096, 1, 10, slots, addrs), KVC_OK);
        for (uint32_t i = 0; i < 10; i++) {
            assert_int_equal(addrs[i] != NULL, i < n);
            if (addrs[i] != NULL)
                memset(addrs[i], (int)(taken + i), 4096);
            assert_true(i == 0 || i >= n || slots[i].a == slots[0].a);
        }
        t->ops->commit(t->tier, slots, n);
        for (uint32_t i = 0; i < n; i++)
            assert_int_equal(*(const uint8_t *)t->ops->map(t->tier, slots[i]), taken + i);
        taken += n;
        assert_int_equal(value_count(t), taken);
    }
    kvs_slot kept[64];
    uint32_t n_kept = fill(t, 1, (shape){4096, 1}, kept, 64);
    assert_int_equal(n_kept, 64);
    drop(t, 1, kept, n_kept);
}

static void test_tenants_do_not_share(void **state)
{
    tier_under_test *t = *state;
    kvs_slot a[256], b[256];
    kvs_dram_segment segments[64];
    uint32_t n;

    open_with(t, 16u << 20, 1u << 20);
    uint32_t n_a = fill(t, 1, (shape){4096, 16}, a, 32);
    uint32_t n_b = fill(t, 2, (shape){4096, 16}, b, 32);
    assert_true(n_a == 32 && n_b == 32);
    for (uint32_t i = 0; i < 32; i++)
        for (uint32_t k = 0; k < 32; k++)
            assert_int_not_equal(a[i].a, b[k].a);
    kvs_dram_segments(t->tier, segments, 64, &n);
    kvs_value_key one = key_of(1, 0, 0);
    assert_memory_equal(&segments[a[0].a].tenant, &one.tenant, 32);
}

/* The memory that tenant 2 gets holds nothing of tenant 1, and 1's old mapping nothing of 2. */
static void test_change_of_tenant_gives_fresh_memory(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[64];
    kvs_dram_segment before, after;
    uint64_t off;
    void *addr;

    open_with(t, 1u << 20, 1u << 20); /* one segment */
    uint32_t n = fill(t, 1, (shape){4096, 16}, slots, 64);
    assert_int_equal(n, 16);
    assert_int_equal(kvs_dram_locate(t->tier, slots[0], &before, &off), KVC_OK);
    const uint8_t *old = mmap(NULL, before.len_bytes, PROT_READ, MAP_SHARED, before.fd, 0);
    assert_ptr_not_equal(old, MAP_FAILED);
    uint8_t first[64];
    memcpy(first, old, sizeof(first));
    drop(t, 1, slots, n);

    kvs_value_key key = key_of(2, 77, 0);
    kvs_slot slot;
    assert_int_equal(t->ops->reserve(t->tier, &key, 65536, 1, 1, &slot, &addr), KVC_OK);
    for (uint32_t i = 0; i < 65536; i++)
        assert_int_equal(((uint8_t *)addr)[i], 0);
    memset(addr, 0xee, 65536);
    assert_memory_equal(old, first, sizeof(first));
    t->ops->commit(t->tier, &slot, 1);
    assert_int_equal(kvs_dram_locate(t->tier, slot, &after, &off), KVC_OK);
    assert_int_not_equal(after.generation, before.generation);
    assert_int_equal(after.number, before.number);
    munmap((void *)(uintptr_t)old, before.len_bytes);
}

/* While a process maps a segment of tenant 1, tenant 2 does not get it, empty as it is; tenant 1
 * does, in the same memory. */
static void test_mapped_segment_stays_with_its_tenant(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[64];
    kvs_dram_segment before, after;
    uint64_t off;
    void *addr;

    open_with(t, 1u << 20, 1u << 20); /* one segment */
    uint32_t n = fill(t, 1, (shape){4096, 16}, slots, 64);
    assert_int_equal(kvs_dram_locate(t->tier, slots[0], &before, &off), KVC_OK);
    uint64_t len_bytes;
    for (uint32_t i = 1; i <= 2; i++)
        assert_int_equal(kvs_dram_count_mapping(t->tier, before.number, true, &len_bytes), i);
    assert_int_equal(len_bytes, before.len_bytes);
    drop(t, 1, slots, n);
    kvs_value_key key = key_of(2, 77, 0), own = key_of(1, 78, 0);
    kvs_slot slot;
    for (uint32_t mappings = 2; mappings > 0; mappings--) {
        assert_int_equal(t->ops->reserve(t->tier, &key, 65536, 1, 1, &slot, &addr), KVC_AGAIN);
        assert_int_equal(t->ops->reserve(t->tier, &own, 65536, 1, 1, &slot, &addr), KVC_OK);
        assert_int_equal(kvs_dram_locate(t->tier, slot, &after, &off), KVC_OK);
        assert_ptr_equal(after.base, before.base);
        t->ops->release(t->tier, &own, slot);
        assert_int_equal(kvs_dram_count_mapping(t->tier, before.number, false, &len_bytes),
                         mappings - 1);
    }
    assert_int_equal(t->ops->reserve(t->tier, &key, 65536, 1, 1, &slot, &addr), KVC_OK);
    for (uint32_t i = 0; i < 65536; i++)
        assert_int_equal(((uint8_t *)addr)[i], 0);
    t->ops->release(t->tier, &key, slot);
}

/* One class took everything; once one of its segments is empty, another class has room. */
static void test_empty_segment_changes_class(void **state)
{
    tier_under_test *t = *state;
    enum { MAX = 512 };
    kvs_slot slots[MAX];
    kvs_value_key other = key_of(1, 9999, 0);

    open_with(t, 16u << 20, 1u << 20);
    uint32_t n = fill(t, 1, (shape){4096, 16}, slots, MAX);
    assert_int_equal(n, 256);
    assert_int_equal(used_bytes(t), 16u << 20);
    assert_int_equal(put_value(t, &other, 1, (shape){4096, 64}, false).status, KVC_AGAIN);
    for (uint32_t i = 0; i < n; i++) {
        kvs_value_key key = key_of(1, i, 0);
        if (slots[i].a == 5)
            t->ops->release(t->tier, &key, slots[i]);
    }
    put_result r = put_value(t, &other, 1, (shape){4096, 64}, false);
    assert_int_equal(r.status, KVC_OK);
    assert_value(t, &other, 1, (shape){4096, 64}, r.slot);
    assert_int_equal(r.slot.a, 5);
    assert_true(medium_bytes(t) <= 16u << 20);
}

/* Slots of a closed segment are not handed out again until it is opened or was empty. */
static void test_closed_segment(void **state)
{
    tier_under_test *t = *state;
    enum { MAX = 512 };
    const shape large = {4096, 64}, small = {4096, 16};
    kvs_slot slots[MAX], mine[16] = {{0, 0}};
    uint32_t used[16], n_mine = 0;
    kvs_value_key key = key_of(1, 0, 0), other = key_of(1, 9999, 0);

    open_with(t, 16u << 20, 1u << 20);
    uint32_t n = fill(t, 1, small, slots, MAX);
    for (uint32_t i = 0; i < n; i++)
        if (slots[i].a == 5)
            mine[n_mine++] = slots[i];
    assert_int_equal(n_mine, 16);
    assert_int_equal(t->ops->close_segment(t->tier, 5, kvs_slot_generation(mine[0]), true), 16);
    for (uint32_t i = 1; i < n_mine; i++) {
        t->ops->release(t->tier, &key, mine[i]);
        assert_int_equal(put_value(t, &other, 1, small, false).status, KVC_AGAIN);
    }
    assert_int_equal(t->ops->segments(t->tier, used, 16), 16);
    assert_int_equal(used[5], 1);
    assert_int_equal(t->ops->close_segment(t->tier, 5, kvs_slot_generation(mine[0]), false), 1);
    put_result r = put_value(t, &other, 1, small, false);
    assert_int_equal(r.status, KVC_OK);
    assert_int_equal(r.slot.a, 5);
    assert_int_equal(t->ops->close_segment(t->tier, 5, kvs_slot_generation(mine[0]), true), 2);
    t->ops->release(t->tier, &other, r.slot);
    t->ops->release(t->tier, &key, mine[0]);
    assert_int_equal(t->ops->close_segment(t->tier, 5, kvs_slot_generation(mine[0]), true), 0);
    r = put_value(t, &other, 1, large, false);
    assert_int_equal(r.status, KVC_OK);
    assert_int_equal(r.slot.a, 5);
    /* It is another segment now: who emptied the old one does nothing to it. */
    assert_int_not_equal(kvs_slot_generation(r.slot), kvs_slot_generation(mine[0]));
    assert_int_equal(t->ops->close_segment(t->tier, 5, kvs_slot_generation(mine[0]), true), 0);
    kvs_value_key next = key_of(1, 9998, 0);
    r = put_value(t, &next, 1, large, false);
    assert_int_equal(r.status, KVC_OK);
    assert_int_equal(r.slot.a, 5);
}

static void test_many_small_slots(void **state)
{
    tier_under_test *t = *state;
    enum { MAX = 20000 };
    kvs_slot *slots = calloc(MAX, sizeof(*slots));

    open_with(t, 64u << 20, 1u << 20);
    uint32_t n = fill(t, 1, (shape){64, 64}, slots, MAX);
    assert_int_equal(n, 16384);
    for (uint32_t i = 0; i < n; i += 7) {
        kvs_value_key key = key_of(1, i, 0);
        assert_value(t, &key, 1, (shape){64, 64}, slots[i]);
    }
    drop(t, 1, slots, n);
    assert_int_equal(value_count(t), 0);
    assert_int_equal(used_bytes(t), 0);
    assert_int_equal(fill(t, 1, (shape){128, 64}, slots, MAX), 8192);
    free(slots);
}

/* Reserving brings the slot's pages at once, and not the whole segment's. */
static void test_reserve_populates(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);
    unsigned char there[256], further;
    kvs_slot slot;
    void *addr;

    open_with(t, 256u << 20, 1u << 20);
    assert_int_equal(t->ops->reserve(t->tier, &key, 4096, 256, 1, &slot, &addr), KVC_OK);
    assert_int_equal(mincore(addr, 1u << 20, there), 0);
    for (uint32_t i = 0; i < 256; i++)
        assert_true(there[i] & 1);
    assert_int_equal(mincore((char *)addr + (4u << 20), 1, &further), 0);
    assert_false(further & 1);
    t->ops->release(t->tier, &key, slot);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_segments_are_sealed, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_cap_counts_segments, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_longer_than_a_segment, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_reserve_several, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_tenants_do_not_share, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_change_of_tenant_gives_fresh_memory, setup,
                                        tut_delete),
        cmocka_unit_test_setup_teardown(test_mapped_segment_stays_with_its_tenant, setup,
                                        tut_delete),
        cmocka_unit_test_setup_teardown(test_empty_segment_changes_class, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_closed_segment, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_many_small_slots, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_reserve_populates, setup, tut_delete),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
