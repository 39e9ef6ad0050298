/*
 * tier_shrink_test.c: what the lmdb tier gives back: the file and the place of a size class that
 * holds nothing any more, and pages of a class that gives room to another. What is given back may
 * not be needed after a power cut, so the program stands between LMDB and the system, and sees that
 * all that was written to a file is synced when a hole is made in it.
 */
#include "tier_support.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "base/sum.h"

#define PATIENCE_NS 60000000000ull

#define MAX_FDS 1024

/* Writes to a file since its last sync, and holes made while there were some. */
static pthread_mutex_t books = PTHREAD_MUTEX_INITIALIZER;
static uint64_t n_unsynced[MAX_FDS], n_holes, n_early;
static bool no_holes;

static void note(int fd, bool synced)
{
    pthread_mutex_lock(&books);
    n_unsynced[fd] = synced ? 0 : n_unsynced[fd] + 1;
    pthread_mutex_unlock(&books);
}

/* What liblmdb calls; it finds these, since the program's symbols come first. */
#define SEEN_BY_LMDB __attribute__((visibility("default")))
/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name): the names are libc's own */

SEEN_BY_LMDB ssize_t pwrite(int fd, const void *data, size_t len, off_t off)
{
    note(fd, false);
    return syscall(SYS_pwrite64, fd, data, len, off);
}

SEEN_BY_LMDB ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t off)
{
    note(fd, false);
    return syscall(SYS_pwritev, fd, iov, n, off, 0);
}

SEEN_BY_LMDB ssize_t writev(int fd, const struct iovec *iov, int n)
{
    note(fd, false);
    return syscall(SYS_writev, fd, iov, n);
}

SEEN_BY_LMDB int fdatasync(int fd)
{
    int rc = (int)syscall(SYS_fdatasync, fd);

    if (rc == 0)
        note(fd, true);
    return rc;
}

/* NOLINTEND(readability-inconsistent-declaration-parameter-name) */

int __real_fallocate(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len);

int __wrap_fallocate(int fd, int mode, off_t off, off_t len)
{
    if (!(mode & FALLOC_FL_PUNCH_HOLE))
        return __real_fallocate(fd, mode, off, len);
    pthread_mutex_lock(&books);
    bool refused = no_holes;
    n_holes++;
    n_early += n_unsynced[fd] > 0;
    pthread_mutex_unlock(&books);
    if (!refused)
        return __real_fallocate(fd, mode, off, len);
    errno = EOPNOTSUPP;
    return -1;
}

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    no_holes = false;
    n_holes = n_early = 0;
    tut_log_clear();
    tut_init(t, kvs_tier_find("lmdb"), NULL);
    t->opts.row_sums_bytes = 0; /* every read looks at the file */
    *state = t;
    return 0;
}

static bool class_is_there(const tier_under_test *t, uint32_t pages)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/class-%u", t->dir, pages);
    return access(path, F_OK) == 0;
}

static void wait_until_gone(const tier_under_test *t, uint32_t pages)
{
    uint64_t until = kvc_deadline_ns(PATIENCE_NS);

    while (class_is_there(t, pages)) {
        assert_true(kvc_now_ns() < until);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
}

typedef struct listed {
    kvs_value_key key;
    kvs_slot slot;
    shape s;
} listed;

#define MAX_LISTED 4096u
static listed found[MAX_LISTED];
static uint32_t n_found;

static bool list_one(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                     uint32_t n_rows)
{
    (void)arg;
    if (n_found < MAX_LISTED)
        found[n_found++] = (listed){*key, slot, {row_bytes, n_rows}};
    return true;
}

/* Opens the tier and reads every value that it says it has; all are of version 1. */
static void open_and_read(tier_under_test *t, uint32_t n_values)
{
    n_found = 0;
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->recover(t->tier, list_one, NULL), KVC_OK);
    assert_int_equal(n_found, n_values);
    for (uint32_t i = 0; i < n_found; i++)
        assert_value(t, &found[i].key, 1, found[i].s, found[i].slot);
}

/* One value of each of eight sizes, of 2 to 9 pages. */
static void put_eight(tier_under_test *t, kvs_slot *slots)
{
    for (uint32_t i = 0; i < 8; i++) {
        kvs_value_key key = key_of(1, i, 0);
        put_result r = put_value(t, &key, 1, (shape){4096, i + 1}, true);
        assert_int_equal(r.status, KVC_OK);
        slots[i] = r.slot;
    }
}

/* Puts a value of a size that is new; again until what was a file is counted as gone. */
static put_result put_new_size(tier_under_test *t, const kvs_value_key *key, shape s)
{
    put_result r = {.status = KVC_NO_SPACE};

    for (uint64_t until = kvc_deadline_ns(PATIENCE_NS); r.status != KVC_OK;) {
        assert_true(kvc_now_ns() < until);
        r = put_value(t, key, 1, s, true);
    }
    return r;
}

/* The last value goes, and with it the class: file, budget and place; a ninth size takes it. */
static void test_empty_class_gives_its_place(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key gone = key_of(1, 3, 0), ninth = key_of(1, 9, 0), again = key_of(1, 10, 0);
    kvs_slot slots[8];
    bool equal;

    assert_int_equal(tut_open(t), KVC_OK);
    put_eight(t, slots);
    assert_int_equal(put_value(t, &ninth, 1, (shape){4096, 9}, true).status, KVC_NO_SPACE);
    t->ops->release(t->tier, &gone, slots[3]);
    wait_until_gone(t, 5);
    put_result r = put_new_size(t, &ninth, (shape){4096, 9});
    assert_int_equal(put_value(t, &again, 1, (shape){4096, 4}, true).status, KVC_NO_SPACE);
    for (uint32_t i = 0; i < 8; i++) {
        kvs_value_key key = key_of(1, i, 0);
        if (i != 3)
            assert_value(t, &key, 1, (shape){4096, i + 1}, slots[i]);
    }
    assert_int_not_equal(check_rows(t, &gone, 1, (shape){4096, 4}, slots[3], 0, 4, &equal), KVC_OK);
    assert_value(t, &ninth, 1, (shape){4096, 9}, r.slot);
    tut_close(t);
    open_and_read(t, 8);
}

/* A read that comes after the file went finds nothing, and the size can come back. */
static void test_size_comes_back(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 0);
    const shape s = {4096, 4};
    bool equal;

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t round = 1; round <= 3; round++) {
        put_result r = put_value(t, &key, round, s, round % 2);
        assert_int_equal(r.status, KVC_OK);
        assert_value(t, &key, round, s, r.slot);
        t->ops->release(t->tier, &key, r.slot);
        assert_int_equal(
            t->ops->sync_releases(t->tier, &(kvs_tier_shape){s.row_bytes, s.n_rows}, 1), KVC_OK);
        if (round == 1)
            continue; /* at once: the class is there still */
        wait_until_gone(t, 5);
        assert_int_equal(check_rows(t, &key, round, s, r.slot, 0, 4, &equal), KVC_NOT_FOUND);
        assert_int_equal(
            t->ops->sync_releases(t->tier, &(kvs_tier_shape){s.row_bytes, s.n_rows}, 1), KVC_OK);
    }
    assert_int_equal(value_count(t), 0);
}

/* A folder of eight sizes from before there was one for small pieces: those go where longer ones
   lie, and to a class of their own once there is a place. */
static void test_small_piece_without_a_place(void **state)
{
    tier_under_test *t = *state;
    const shape small = {100, KVS_PIECE_ROWS}, one = {1, 7};
    const kvs_tier_shape asked = {small.row_bytes, small.n_rows};
    kvs_value_key key = key_of(2, 1, 0), next = key_of(2, 2, 0), last = key_of(1, 7, 0);
    kvs_slot slots[8];
    uint32_t pages;
    uint64_t bytes;

    assert_int_equal(tut_open(t), KVC_OK);
    put_eight(t, slots);
    put_result r = put_value(t, &key, 1, small, true);
    assert_int_equal(r.status, KVC_OK);
    assert_value(t, &key, 1, small, r.slot);
    assert_true(t->ops->donor(t->tier, &asked, 0, &pages, &bytes));
    assert_int_equal(pages, 4);
    assert_true(t->ops->donor(t->tier, &asked, 1, &pages, &bytes));
    assert_int_equal(pages, 1);
    assert_false(t->ops->donor(t->tier, &asked, 2, &pages, &bytes));
    tut_close(t);
    open_and_read(t, 9);
    assert_false(class_is_there(t, 1));
    t->ops->release(t->tier, &key, r.slot);
    assert_int_equal(t->ops->sync_releases(t->tier, &asked, 1), KVC_OK);
    assert_int_equal(value_count(t), 8);
    assert_int_equal(put_value(t, &key, 1, small, false).status, KVC_OK);
    assert_int_equal(put_value(t, &next, 1, one, true).status, KVC_OK); /* of two pages, just */
    tut_close(t);
    open_and_read(t, 10);
    for (uint32_t i = 0; i < n_found; i++)
        if (memcmp(&found[i].key, &last, sizeof(last)) == 0)
            t->ops->release(t->tier, &last, found[i].slot);
    wait_until_gone(t, 9);
    for (uint64_t until = kvc_deadline_ns(PATIENCE_NS); !class_is_there(t, 1);) {
        assert_true(kvc_now_ns() < until);
        kvs_value_key more = key_of(3, kvc_now_ns(), 0);
        assert_int_equal(put_value(t, &more, 1, small, true).status, KVC_OK);
    }
    uint32_t n = (uint32_t)value_count(t);
    tut_close(t);
    open_and_read(t, n);
}

/* What became empty just before a stop waits after the next start as it does in a run, and is gone
 * then, with its room. */
static void test_empty_class_goes_at_a_start(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[8];

    assert_int_equal(tut_open(t), KVC_OK);
    put_eight(t, slots);
    for (uint32_t i = 0; i < 8; i += 2) {
        kvs_value_key key = key_of(1, i, 0);
        t->ops->release(t->tier, &key, slots[i]);
    }
    tut_close(t);
    open_and_read(t, 4);
    kvs_value_key back = key_of(2, 9, 0); /* a value that comes meanwhile finds its class */
    assert_int_equal(put_value(t, &back, 1, (shape){4096, 1}, true).status, KVC_OK);
    for (uint32_t i = 2; i < 8; i += 2)
        wait_until_gone(t, i + 2);
    for (uint32_t i = 0; i < 8; i++)
        assert_int_equal(class_is_there(t, i + 2), i == 0 || i % 2);
    for (uint32_t i = 0; i < 3; i++) {
        kvs_value_key key = key_of(2, i, 0);
        (void)put_new_size(t, &key, (shape){4096, 20 + i});
    }
    assert_int_equal(value_count(t), 8);
}

/* --- room for another size --- */

#define CAPACITY   (12u << 20) /* a share is 192 pages */
#define META_BYTES (128u * 4096)

static const shape old_shape = {4096, 3}, new_shape = {4096, 15}; /* of 4 and 16 pages */

static listed olds[MAX_LISTED];
static uint32_t n_olds, first_old; /* put so far; the oldest that is there */

/* What the disk has for the files of all classes. */
static uint64_t disk_bytes(const tier_under_test *t)
{
    uint64_t bytes = 0;

    for (uint32_t pages = 1; pages < 32; pages++) {
        char path[128];
        struct stat st;
        snprintf(path, sizeof(path), "%s/class-%u/data.mdb", t->dir, pages);
        if (stat(path, &st) == 0)
            bytes += (uint64_t)st.st_blocks * 512;
    }
    return bytes;
}

typedef struct flight {
    kvs_tier_write write;
    listed *v;
    uint32_t sums[3];
    uint8_t rows[4096 * 3];
} flight;

static pthread_cond_t landed = PTHREAD_COND_INITIALIZER;
static uint32_t n_landed;

static void land(kvs_tier_write *write)
{
    (void)write;
    pthread_mutex_lock(&books);
    n_landed++;
    pthread_cond_signal(&landed);
    pthread_mutex_unlock(&books);
}

static bool send(tier_under_test *t, flight *f, listed *v)
{
    *v = (listed){.key = key_of(1, (uint64_t)(v - olds), 0), .s = old_shape};
    fill_rows(&v->key, 1, old_shape, f->rows);
    kvc_row_sums(f->rows, old_shape.row_bytes, old_shape.n_rows, f->sums);
    f->v = v;
    f->write = (kvs_tier_write){.key = v->key,
                                .row_bytes = old_shape.row_bytes,
                                .n_rows = old_shape.n_rows,
                                .rows = f->rows,
                                .row_sums = f->sums,
                                .done = land};
    return t->ops->write(t->tier, &f->write) == KVC_OK;
}

/* Puts up to n more values of the old shape at once; how many found room. Those are listed. */
static uint32_t put_olds(tier_under_test *t, uint32_t n)
{
    static flight flights[64];
    uint32_t sent = 0, good = 0;

    assert_true(n <= 64 && n_olds + n <= MAX_LISTED);
    n_landed = 0;
    while (sent < n && send(t, &flights[sent], &olds[n_olds + sent]))
        sent++;
    pthread_mutex_lock(&books);
    while (n_landed < sent)
        pthread_cond_wait(&landed, &books);
    pthread_mutex_unlock(&books);
    for (uint32_t i = 0; i < sent; i++) {
        if (flights[i].write.status != KVC_OK)
            continue;
        olds[n_olds + good] = *flights[i].v;
        olds[n_olds + good++].slot = flights[i].write.slot;
    }
    n_olds += good;
    return good;
}

/* Puts values of the old shape until the tier is full. */
static void fill_with_old(tier_under_test *t)
{
    n_olds = first_old = 0;
    while (put_olds(t, 64) > 0)
        continue;
}

/* Releases the oldest values of the size that should give, as a server does. False: nobody does. */
static bool give_way(tier_under_test *t, shape s)
{
    kvs_tier_shape asked = {s.row_bytes, s.n_rows};
    uint32_t pages;
    uint64_t bytes, freed = 0;

    if (!t->ops->donor(t->tier, &asked, 0, &pages, &bytes) || pages != 4)
        return false;
    while (freed < bytes && first_old < n_olds) {
        listed *v = &olds[first_old++];
        t->ops->release(t->tier, &v->key, v->slot);
        freed += 4096 * 3;
    }
    return freed > 0;
}

/* Puts n values of another shape; how many of the old gave way to them. */
static uint32_t put_new(tier_under_test *t, shape s, uint32_t n, bool durable)
{
    uint32_t before = first_old;

    for (uint32_t i = 0; i < n; i++) {
        kvs_value_key key = key_of(s.n_rows, i, 0);
        put_result r = put_value(t, &key, 1, s, durable);
        for (uint32_t tries = 0; r.status == KVC_AGAIN; tries++) {
            assert_true(tries < 64 && give_way(t, s));
            r = put_value(t, &key, 1, s, durable);
        }
        assert_int_equal(r.status, KVC_OK);
        assert_true(disk_bytes(t) <= t->opts.capacity_bytes - META_BYTES);
    }
    return first_old - before;
}

/* The budget is used up by one size: another gets room from it, up to its share, and no more values
   go than it takes; all that is left is right, then and after a start. */
static void test_another_size_gets_room(void **state)
{
    tier_under_test *t = *state;
    enum { NEW = 9 };

    t->opts.capacity_bytes = CAPACITY;
    assert_int_equal(tut_open(t), KVC_OK);
    fill_with_old(t);
    assert_true(n_olds > 600);
    uint32_t gone = put_new(t, new_shape, NEW, true);
    assert_true(n_holes > 0);
    assert_int_equal(n_early, 0);
    assert_in_range(gone, NEW * 16 / 4, 3 * NEW * 16 / 4 + 100);
    for (uint32_t i = first_old; i < n_olds; i++)
        assert_value(t, &olds[i].key, 1, old_shape, olds[i].slot);
    tut_close(t);
    open_and_read(t, n_olds - first_old + NEW);
    assert_true(disk_bytes(t) <= t->opts.capacity_bytes - META_BYTES);
}

/* A file with holes goes on taking values, and its disk stays within what it has claimed. */
static void test_giver_goes_on(void **state)
{
    tier_under_test *t = *state;
    enum { NEW = 9, MORE = 1500 };

    t->opts.capacity_bytes = CAPACITY;
    assert_int_equal(tut_open(t), KVC_OK);
    fill_with_old(t);
    (void)put_new(t, new_shape, NEW, false);
    (void)put_new(t, (shape){4096, 18}, NEW - 3, false);
    for (uint32_t end = n_olds + MORE, tries = 0; n_olds < end; tries++) {
        uint32_t n = put_olds(t, 50);
        assert_true(disk_bytes(t) <= t->opts.capacity_bytes - META_BYTES);
        assert_true(tries < MORE);
        for (; n < 50; n++, first_old++)
            t->ops->release(t->tier, &olds[first_old].key, olds[first_old].slot);
    }
    assert_int_equal(n_early, 0);
    for (uint32_t i = first_old; i < n_olds; i++)
        assert_value(t, &olds[i].key, 1, old_shape, olds[i].slot);
    tut_close(t);
    open_and_read(t, n_olds - first_old + 2 * NEW - 3);
    assert_true(disk_bytes(t) <= t->opts.capacity_bytes - META_BYTES);
}

/* Files that take more than the capacity, be it a smaller one or that they are copies which lost
   their holes, give back at the start what holds nothing; what holds values cannot. */
static void test_too_large_at_a_start(void **state)
{
    tier_under_test *t = *state;

    t->opts.capacity_bytes = CAPACITY;
    assert_int_equal(tut_open(t), KVC_OK);
    fill_with_old(t);
    for (; first_old < n_olds / 2; first_old++)
        t->ops->release(t->tier, &olds[first_old].key, olds[first_old].slot);
    tut_close(t);
    assert_true(disk_bytes(t) > CAPACITY / 4 * 3);
    t->opts.capacity_bytes = CAPACITY / 4;
    assert_int_equal(tut_open(t), KVC_INVALID);
    t->opts.capacity_bytes = CAPACITY / 4 * 3;
    open_and_read(t, n_olds - first_old);
    assert_true(disk_bytes(t) <= t->opts.capacity_bytes - META_BYTES);
    assert_int_equal(n_early, 0);
}

/* Where a file takes no holes, AGAIN would be for ever, and is not said once that is known. */
static void test_no_holes_no_room(void **state)
{
    tier_under_test *t = *state;
    kvc_status status = KVC_OK;
    uint32_t pages;
    uint64_t bytes;

    no_holes = true;
    t->opts.capacity_bytes = CAPACITY;
    assert_int_equal(tut_open(t), KVC_OK);
    fill_with_old(t);
    for (uint32_t i = 0; i < 6 && status != KVC_NO_SPACE; i++) {
        const shape s = {4096, 19 + i}; /* the first may find room behind the end of a file */
        kvs_tier_shape asked = {s.row_bytes, s.n_rows};
        kvs_value_key key = key_of(2, i, 0);
        status = put_value(t, &key, 1, s, true).status;
        for (uint32_t tries = 0; status == KVC_AGAIN && tries < 64 && give_way(t, s); tries++)
            status = put_value(t, &key, 1, s, true).status;
        assert_int_equal(t->ops->donor(t->tier, &asked, 0, &pages, &bytes), status == KVC_OK);
    }
    assert_int_equal(status, KVC_NO_SPACE);
    assert_non_null(strstr(tut_log, "takes nothing back out of a file"));
    for (uint32_t i = first_old; i < n_olds; i++)
        assert_value(t, &olds[i].key, 1, old_shape, olds[i].slot);
}

/* The system tells of a failed sync once: the giver's file is synced early, for the hole, and what
 * the group wrote to it durably must not be called so because there is nothing left to sync. */
static void test_failed_sync_for_a_hole(void **state)
{
    static uint8_t rows[2][4096 * 15];
    const shape shapes[2] = {old_shape, new_shape};
    kvs_tier_write writes[2];
    uint32_t sums[2][15];
    tier_under_test *t = *state;

    t->opts.capacity_bytes = CAPACITY;
    assert_int_equal(tut_open(t), KVC_OK);
    fill_with_old(t);
    assert_true(n_olds > 100);
    tut_close(t);
    t->opts.group_commit_ns = 2000000000; /* what follows is one group */
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(kvc_fault_arm("lmdb.sync=nth:1"), KVC_OK);
    for (uint32_t i = 0; i < 100; i++)
        t->ops->release(t->tier, &olds[i].key, olds[i].slot);
    n_landed = 0;
    for (uint32_t i = 0; i < 2; i++) {
        kvs_value_key key = key_of(2, i, 0);
        fill_rows(&key, 1, shapes[i], rows[i]);
        kvc_row_sums(rows[i], shapes[i].row_bytes, shapes[i].n_rows, sums[i]);
        writes[i] = (kvs_tier_write){.key = key,
                                     .row_bytes = shapes[i].row_bytes,
                                     .n_rows = shapes[i].n_rows,
                                     .rows = rows[i],
                                     .row_sums = sums[i],
                                     .durable = true,
                                     .done = land};
        assert_int_equal(t->ops->write(t->tier, &writes[i]), KVC_OK);
    }
    pthread_mutex_lock(&books);
    while (n_landed < 2)
        pthread_cond_wait(&landed, &books);
    pthread_mutex_unlock(&books);
    assert_true(kvc_fault_failures("lmdb.sync") == 1);
    assert_int_equal(writes[0].status, KVC_IO);
    assert_int_equal(kvc_fault_arm(NULL), KVC_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_empty_class_gives_its_place, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_size_comes_back, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_small_piece_without_a_place, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_empty_class_goes_at_a_start, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_another_size_gets_room, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_giver_goes_on, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_too_large_at_a_start, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_no_holes_no_room, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_failed_sync_for_a_hole, setup, tut_delete),
    };

    kvc_log_set_sink(tut_log_keep, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
