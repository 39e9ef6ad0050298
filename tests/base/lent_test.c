/*
 * lent_test.c: memory that is lent, what watchers hear of it, and ranges that meet.
 */
#include "support.h"

#include "base/lent.h"

static uint8_t memory[1000];

typedef struct seen {
    kvc_lent_watch watch; /* first */
    uint32_t n_added, n_removed;
    size_t bytes;      /* of those that are there */
    kvc_lent_gpu *gpu; /* of the last one that came */
} seen;

static void on_added(kvc_lent_watch *watch, void *base, size_t len_bytes, kvc_lent_gpu *gpu)
{
    seen *s = (seen *)watch;
    (void)base;
    s->gpu = gpu;
    s->n_added++;
    s->bytes += len_bytes;
}

static void on_removed(kvc_lent_watch *watch, void *base, size_t len_bytes)
{
    seen *s = (seen *)watch;
    (void)base;
    s->n_removed++;
    s->bytes -= len_bytes;
}

static void watchers_hear(void **state)
{
    (void)state;
    seen s = {.watch = {.added = on_added, .removed = on_removed}};
    assert_ok(kvc_lent_add(memory, 100));
    kvc_lent_watch_begin(&s.watch);
    assert_int_equal(s.n_added, 1);
    assert_ok(kvc_lent_add(memory + 100, 50));
    assert_int_equal(s.bytes, 150);
    kvc_lent_remove(memory + 50); /* begins no range */
    assert_int_equal(s.n_removed, 0);
    kvc_lent_remove(memory);
    assert_int_equal(s.bytes, 50);
    kvc_lent_watch_end(&s.watch);
    kvc_lent_remove(memory + 100);
    assert_int_equal(s.n_removed, 1);
}

static void ranges_meet(void **state)
{
    (void)state;
    seen s = {.watch = {.added = on_added, .removed = on_removed}};
    kvc_lent_watch_begin(&s.watch);
    assert_ok(kvc_lent_add(memory + 100, 100));
    assert_ok(kvc_lent_add(memory + 100, 100)); /* the same, for somebody else */
    assert_int_equal(s.n_added, 1);
    assert_status(kvc_lent_add(memory + 100, 99), KVC_INVALID);
    assert_status(kvc_lent_add(memory + 100, 101), KVC_INVALID);
    assert_status(kvc_lent_add(memory + 199, 10), KVC_INVALID);
    assert_status(kvc_lent_add(memory, 101), KVC_INVALID);
    assert_ok(kvc_lent_add(memory + 200, 10));
    assert_ok(kvc_lent_add(memory, 100));
    assert_int_equal(s.n_added, 3);
    kvc_lent_remove(memory + 100);
    assert_int_equal(s.n_removed, 0);
    kvc_lent_remove(memory + 100);
    assert_int_equal(s.n_removed, 1);
    kvc_lent_remove(memory);
    kvc_lent_remove(memory + 200);
    assert_int_equal(s.bytes, 0);
    kvc_lent_watch_end(&s.watch);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(watchers_hear),
        cmocka_unit_test(ranges_meet),
    };
    return cmocka_run_group_tests_name("lent", tests, NULL, NULL);
}
