/*
 * tier_durable_test.c: when a durable write is done, nothing that its environment wrote is without
 * an fdatasync after it. kill -9 cannot show this (the page cache survives it), so the program
 * stands between LMDB and the system and keeps the books: a file is dirty from a write to it until
 * a sync of it that began later.
 */
#include "tier_support.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/sum.h"

#define MAX_FDS 1024

static pthread_mutex_t books = PTHREAD_MUTEX_INITIALIZER;
static uint64_t n_writes[MAX_FDS], n_synced[MAX_FDS], all_syncs;
static bool fail_syncs;

static void note_write(int fd)
{
    pthread_mutex_lock(&books);
    n_writes[fd]++;
    pthread_mutex_unlock(&books);
}

/* What liblmdb calls; it finds these, since the program's symbols come first. */
#define SEEN_BY_LMDB __attribute__((visibility("default")))
/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name): the names are libc's own */

SEEN_BY_LMDB ssize_t pwrite(int fd, const void *data, size_t len, off_t off)
{
    note_write(fd);
    return syscall(SYS_pwrite64, fd, data, len, off);
}

SEEN_BY_LMDB ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t off)
{
    note_write(fd);
    return syscall(SYS_pwritev, fd, iov, n, off, 0);
}

SEEN_BY_LMDB ssize_t writev(int fd, const struct iovec *iov, int n)
{
    note_write(fd);
    return syscall(SYS_writev, fd, iov, n);
}

SEEN_BY_LMDB int fdatasync(int fd)
{
    pthread_mutex_lock(&books);
    uint64_t before = n_writes[fd];
    bool fail = fail_syncs;
    all_syncs++;
    pthread_mutex_unlock(&books);
    if (fail) {
        errno = EIO;
        return -1;
    }
    int rc = (int)syscall(SYS_fdatasync, fd);
    pthread_mutex_lock(&books);
    if (rc == 0)
        n_synced[fd] = before;
    pthread_mutex_unlock(&books);
    return rc;
}

/* NOLINTEND(readability-inconsistent-declaration-parameter-name) */

static void set_failing(bool fail)
{
    pthread_mutex_lock(&books);
    fail_syncs = fail;
    pthread_mutex_unlock(&books);
}

/* Files with writes that no sync covers. */
static uint32_t count_dirty(void)
{
    uint32_t n = 0;

    pthread_mutex_lock(&books);
    for (int fd = 0; fd < MAX_FDS; fd++)
        n += n_writes[fd] > n_synced[fd];
    pthread_mutex_unlock(&books);
    return n;
}

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    fail_syncs = false;
    memset(n_writes, 0, sizeof(n_writes));
    memset(n_synced, 0, sizeof(n_synced));
    tut_init(t, kvs_tier_find("lmdb"), NULL);
    *state = t;
    return tut_open(t) == KVC_OK ? 0 : -1;
}

typedef struct member {
    kvs_tier_write write;
    uint32_t dirty_when_done;
    pthread_mutex_t *lock;
    pthread_cond_t *cond;
    uint32_t *n_done;
} member;

static void note_done(kvs_tier_write *write)
{
    member *m = write->arg;

    m->dirty_when_done = count_dirty();
    pthread_mutex_lock(m->lock);
    ++*m->n_done;
    pthread_cond_signal(m->cond);
    pthread_mutex_unlock(m->lock);
}

/* A write whose end holds the writer, so that what is queued meanwhile is one group. */
typedef struct plug {
    kvs_tier_write write;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool holds, open;
} plug;

static void hold_writer(kvs_tier_write *write)
{
    plug *p = write->arg;

    pthread_mutex_lock(&p->lock);
    p->holds = true;
    pthread_cond_broadcast(&p->cond);
    while (!p->open)
        pthread_cond_wait(&p->cond, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

static void plug_in(plug *p, tier_under_test *t, uint32_t i, const uint8_t *row,
                    const uint32_t *sum)
{
    *p = (plug){.lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER};
    p->write = (kvs_tier_write){.key = key_of(2, i, 1),
                                .row_bytes = 4096,
                                .n_rows = 1,
                                .rows = row,
                                .row_sums = sum,
                                .durable = true,
                                .done = hold_writer,
                                .arg = p};
    assert_int_equal(t->ops->write(t->tier, &p->write), KVC_OK);
    pthread_mutex_lock(&p->lock);
    while (!p->holds)
        pthread_cond_wait(&p->cond, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

static void plug_out(plug *p)
{
    pthread_mutex_lock(&p->lock);
    p->open = true;
    pthread_cond_broadcast(&p->cond);
    pthread_mutex_unlock(&p->lock);
}

/* Groups of ten over three environments, each with a durable write and a lazy one or more. */
static void test_done_means_synced(void **state)
{
    tier_under_test *t = *state;
    enum { N = 60, GROUP = 10 };
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    static member members[N];
    static plug plugs[N / GROUP];
    static uint8_t rows[4096 * 3];
    uint32_t sums[3], n_done = 0, lazy_dirty = 0;

    kvc_row_sums(rows, 4096, 3, sums);
    for (uint32_t i = 0; i < N; i++) {
        if (i % GROUP == 0)
            plug_in(&plugs[i / GROUP], t, i, rows, sums);
        members[i] = (member){.lock = &lock, .cond = &cond, .n_done = &n_done};
        members[i].write = (kvs_tier_write){.key = key_of(1, i, 1),
                                            .row_bytes = 4096,
                                            .n_rows = 1 + i % 3,
                                            .rows = rows,
                                            .row_sums = sums,
                                            .durable = i % 4 != 0,
                                            .done = note_done,
                                            .arg = &members[i]};
        assert_int_equal(t->ops->write(t->tier, &members[i].write), KVC_OK);
        if (i % GROUP == GROUP - 1) {
            plug_out(&plugs[i / GROUP]);
            pthread_mutex_lock(&lock);
            while (n_done < i + 1)
                pthread_cond_wait(&cond, &lock);
            pthread_mutex_unlock(&lock);
        }
    }
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(members[i].write.status, KVC_OK);
        if (members[i].write.durable)
            assert_int_equal(members[i].dirty_when_done, 0);
        else
            lazy_dirty += members[i].dirty_when_done > 0;
    }
    assert_true(lazy_dirty > 0); /* the books do see what is not synced */
}

static void test_sync_covers_lazy_writes(void **state)
{
    tier_under_test *t = *state;

    for (uint32_t i = 0; i < 12; i++) {
        kvs_value_key key = key_of(1, i, 1);
        assert_int_equal(put_value(t, &key, 1, (shape){4096, 1 + i % 3}, false).status, KVC_OK);
    }
    assert_true(count_dirty() > 0);
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
    assert_int_equal(count_dirty(), 0);
    uint64_t before = all_syncs;
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK); /* nothing left to do */
    assert_int_equal(all_syncs, before);
    assert_int_equal(t->ops->meta_put(t->tier, "name", "data", 4), KVC_OK);
    assert_int_equal(count_dirty(), 0);
}

/* sync waits for all that was queued before it, though it takes many groups. */
static void test_sync_covers_many_groups(void **state)
{
    tier_under_test *t = *state;
    enum { N = 100 };
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    static member members[N];
    static uint8_t rows[4096];
    uint32_t sum, n_done = 0;

    tut_close(t);
    t->opts.group_commit_bytes = 8192;
    assert_int_equal(tut_open(t), KVC_OK);
    kvc_row_sums(rows, 4096, 1, &sum);
    for (uint32_t i = 0; i < N; i++) {
        members[i] = (member){.lock = &lock, .cond = &cond, .n_done = &n_done};
        members[i].write = (kvs_tier_write){.key = key_of(1, i, 1),
                                            .row_bytes = 4096,
                                            .n_rows = 1,
                                            .rows = rows,
                                            .row_sums = &sum,
                                            .done = note_done,
                                            .arg = &members[i]};
        assert_int_equal(t->ops->write(t->tier, &members[i].write), KVC_OK);
    }
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
    pthread_mutex_lock(&lock);
    assert_int_equal(n_done, N);
    pthread_mutex_unlock(&lock);
    assert_int_equal(count_dirty(), 0);
}

static void test_close_leaves_nothing_dirty(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);

    assert_int_equal(put_value(t, &key, 1, (shape){4096, 1}, false).status, KVC_OK);
    assert_true(count_dirty() > 0);
    tut_close(t);
    assert_int_equal(count_dirty(), 0);
}

/* A failed sync is told, and the tier does not pretend afterwards. */
static void test_failed_sync_is_told(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1), later = key_of(1, 2, 1);

    put_result r = put_value(t, &key, 1, (shape){4096, 1}, true);
    assert_int_equal(r.status, KVC_OK);
    assert_int_equal(put_value(t, &later, 1, (shape){4096, 1}, false).status, KVC_OK);
    set_failing(true);
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_IO);
    set_failing(false);
    assert_int_equal(put_value(t, &later, 2, (shape){4096, 1}, true).status, KVC_IO);
    assert_int_equal(put_value(t, &later, 2, (shape){4096, 2}, true).status, KVC_OK);
    assert_value(t, &key, 1, (shape){4096, 1}, r.slot);
}

/* A class whose sync failed fails those who wait for it, and nobody who waits for another class. */
static void test_failed_sync_stays_in_its_class(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key good = key_of(1, 1, 1), bad = key_of(1, 2, 1);
    int8_t status[3] = {0};

    put_result g = put_value(t, &good, 1, (shape){4096, 1}, true);
    put_result b = put_value(t, &bad, 1, (shape){4096, 3}, false);
    assert_int_equal(g.status, KVC_OK);
    assert_int_equal(b.status, KVC_OK);
    set_failing(true);
    kvs_slot slots[3] = {g.slot, b.slot, g.slot};
    assert_int_equal(t->ops->sync(t->tier, slots, 3, status), KVC_IO);
    assert_int_equal(status[0], KVC_OK);
    assert_int_equal(status[1], KVC_IO);
    assert_int_equal(status[2], KVC_OK);
    set_failing(false);
    put_result lazy = put_value(t, &bad, 1, (shape){4096, 1}, false);
    assert_int_equal(lazy.status, KVC_OK);
    assert_int_equal(t->ops->sync(t->tier, &lazy.slot, 1, status), KVC_OK);
    assert_int_equal(count_dirty(), 1); /* the class that failed */
    assert_int_equal(t->ops->sync(t->tier, &b.slot, 1, NULL), KVC_IO);
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_IO);
}

/* A release whose commit fails is tried again until it holds. */
static void test_failed_release_is_tried_again(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);

    put_result r = put_value(t, &key, 1, (shape){4096, 1}, true);
    assert_int_equal(r.status, KVC_OK);
    set_failing(true);
    t->ops->release(t->tier, &key, r.slot);
    usleep(60000); /* a few attempts */
    assert_int_equal(value_count(t), 1);
    set_failing(false);
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
    assert_int_equal(value_count(t), 0);
    r = put_value(t, &key, 2, (shape){4096, 1}, true);
    assert_int_equal(r.status, KVC_OK);
    assert_value(t, &key, 2, (shape){4096, 1}, r.slot);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_done_means_synced, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_sync_covers_lazy_writes, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_sync_covers_many_groups, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_close_leaves_nothing_dirty, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_failed_sync_is_told, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_failed_sync_stays_in_its_class, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_failed_release_is_tried_again, setup, tut_delete),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
