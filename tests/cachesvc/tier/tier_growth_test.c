/*
 * tier_growth_test.c: files of the lmdb tier that begin small and grow with what they hold, up to
 * the cap or to what the disk gives; readers are not stalled, and a disk without room is told from
 * one that dies.
 */
#include "tier_support.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"

#define N_VALUES 24u

static const shape small = {4096, 16}, large = {4096, 64};

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    tut_log_clear();
    tut_init(t, kvs_tier_find("lmdb"), NULL);
    t->opts.row_sums_bytes = 0; /* every read looks at the file */
    *state = t;
    return 0;
}

static atomic_int room_error; /* what the disk says to a file that grows; 0: nothing */

int __real_fallocate(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len);

int __wrap_fallocate(int fd, int mode, off_t off, off_t len)
{
    int error = atomic_load(&room_error);

    if (error == 0)
        return __real_fallocate(fd, mode, off, len);
    errno = error;
    return -1;
}

/* A size class whose file could not be made takes no place from others. */
static void test_failed_class_leaves_its_place(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[8];

    assert_int_equal(tut_open(t), KVC_OK);
    atomic_store(&room_error, ENOSPC);
    for (uint32_t i = 0; i < 10; i++) {
        kvs_value_key key = key_of(1, i, 0);
        assert_int_equal(put_value(t, &key, 1, (shape){4096, 20 + i}, true).status, KVC_NO_SPACE);
    }
    assert_null(strstr(tut_log, "ninth"));
    atomic_store(&room_error, 0);
    for (uint32_t i = 0; i < 8; i++) {
        kvs_value_key key = key_of(2, i, 0);
        put_result r = put_value(t, &key, 1, (shape){4096, i + 1}, true);
        assert_int_equal(r.status, KVC_OK);
        slots[i] = r.slot;
    }
    kvs_value_key key = key_of(2, 8, 0);
    assert_int_equal(put_value(t, &key, 1, (shape){4096, 9}, true).status, KVC_NO_SPACE);
    assert_non_null(strstr(tut_log, "those of 2, 3, 4, 5, 6, 7, 8, 9 pages exist"));
    for (uint32_t i = 0; i < 8; i++) {
        key = key_of(2, i, 0);
        assert_value(t, &key, 1, (shape){4096, i + 1}, slots[i]);
    }
}

/* Puts large values until one is refused; its status. */
static kvc_status fill_class(tier_under_test *t, uint64_t schema)
{
    put_result r = {.status = KVC_OK};

    for (uint32_t i = 0; i < 1000 && r.status == KVC_OK; i++) {
        kvs_value_key key = key_of(schema, i, 0);
        r = put_value(t, &key, 1, large, true);
    }
    return r.status;
}

/* A file that cannot grow asks for room by AGAIN if the disk is full, and not if it is dying. */
static void test_dying_disk_asks_for_no_room(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 0, 0);

    t->opts.capacity_bytes = 128u << 20;
    assert_int_equal(tut_open(t), KVC_OK);
    put_result first = put_value(t, &key, 1, large, true);
    assert_int_equal(first.status, KVC_OK);
    atomic_store(&room_error, ENOSPC);
    assert_int_equal(fill_class(t, 2), KVC_AGAIN);
    atomic_store(&room_error, EIO);
    assert_int_equal(fill_class(t, 3), KVC_IO);
    atomic_store(&room_error, 0);
    assert_int_equal(fill_class(t, 4), KVC_AGAIN); /* up to the cap, now */
    assert_value(t, &key, 1, large, first.slot);
}

/* A larger map that the system refuses: what fits into the one that is there is written, and room
   comes from releases. */
static void test_refused_map_keeps_the_old(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 0, 0);

    t->opts.capacity_bytes = 128u << 20;
    assert_int_equal(tut_open(t), KVC_OK);
    put_result first = put_value(t, &key, 1, small, true);
    assert_int_equal(first.status, KVC_OK);
    put_result r = {.status = KVC_OK};
    uint32_t n = 0;
    assert_int_equal(kvc_fault_arm("lmdb.map=always"), KVC_OK);
    for (; n < 1000 && r.status == KVC_OK; n++) {
        kvs_value_key other = key_of(2, n, 0);
        r = put_value(t, &other, 1, small, true);
    }
    assert_true(n > 1 && n < 1000);
    assert_int_equal(r.status, KVC_AGAIN);
    assert_value(t, &key, 1, small, first.slot);
    t->ops->release(t->tier, &key, first.slot);
    key = key_of(3, 0, 0);
    r = put_value(t, &key, 1, small, true);
    for (uint32_t tries = 0; r.status == KVC_AGAIN && tries < 8; tries++)
        r = put_value(t, &key, 1, small, true);
    assert_int_equal(r.status, KVC_OK);
    assert_int_equal(kvc_fault_arm(NULL), KVC_OK);
    assert_value(t, &key, 1, small, r.slot);
    assert_int_equal(fill_class(t, 4), KVC_AGAIN); /* up to the cap, now */
}

typedef struct stored {
    kvs_value_key key;
    kvs_slot slot;
} stored;

typedef struct looker {
    tier_under_test *t;
    const stored *v;
    atomic_bool stop;
    atomic_uint n_reads, n_wrong;
    uint64_t slowest_ns[2];
    atomic_uint n_threads;
} looker;

static void *look(void *arg)
{
    looker *l = arg;
    uint64_t *slowest = &l->slowest_ns[atomic_fetch_add(&l->n_threads, 1)];
    bool equal;

    for (uint32_t i = 0; !atomic_load(&l->stop); i = (i + 1) % N_VALUES) {
        const stored *v = &l->v[i];
        uint64_t start = kvc_now_ns();
        kvc_status status = check_rows(l->t, &v->key, 1, small, v->slot, i % 16, 1, &equal);
        uint64_t took = kvc_now_ns() - start;
        *slowest = took > *slowest ? took : *slowest;
        atomic_fetch_add(&l->n_reads, 1);
        atomic_fetch_add(&l->n_wrong, status != KVC_OK || !equal);
    }
    return NULL;
}

/* A class takes little of the disk as long as there is little in it, whatever the cap. */
static void test_small_start(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(7, 7, 7);

    t->opts.capacity_bytes = 16ull << 30;
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(put_value(t, &key, 1, (shape){100, 10}, true).status, KVC_OK);
    assert_true(medium_bytes(t) < 4u << 20);
}

/* A map that grows from small to its cap while it is read: no read fails, none waits long. */
static void test_growth_does_not_stall_readers(void **state)
{
    tier_under_test *t = *state;
    stored v[N_VALUES];
    looker l = {.t = t, .v = v};
    pthread_t threads[2];
    uint32_t n = 0;

    t->opts.capacity_bytes = 128u << 20;
    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; i < N_VALUES; i++) {
        v[i] = (stored){key_of(1, i, 0), {0}};
        put_result first = put_value(t, &v[i].key, 1, small, true);
        assert_int_equal(first.status, KVC_OK);
        v[i].slot = first.slot;
    }
    assert_true(medium_bytes(t) < 16u << 20); /* a small start */
    for (uint32_t i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, look, &l), 0);
    put_result r = {.status = KVC_OK};
    for (; n < 350 && r.status == KVC_OK; n++) {
        kvs_value_key key = key_of(2, n, 0);
        r = put_value(t, &key, 1, large, false);
    }
    atomic_store(&l.stop, true);
    for (uint32_t i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    assert_true(n > 300);
    assert_true(medium_bytes(t) <= t->opts.capacity_bytes);
    assert_int_equal(l.n_wrong, 0);
    assert_true(l.n_reads > 100);
    uint64_t slowest = l.slowest_ns[0] > l.slowest_ns[1] ? l.slowest_ns[0] : l.slowest_ns[1];
    assert_true(slowest < 30000000000ull); /* a busy machine may stop a thread for seconds */
    print_message("%u reads, the slowest %.1f ms\n", (unsigned)l.n_reads, (double)slowest / 1e6);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_failed_class_leaves_its_place, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_dying_disk_asks_for_no_room, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_refused_map_keeps_the_old, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_small_start, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_growth_does_not_stall_readers, setup, tut_delete),
    };

    kvc_log_set_sink(tut_log_keep, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
