/*
 * tier_disk_test.c: a disk that fails under a running lmdb tier. Files are cut and removed, the
 * file system fills up and turns read-only (on a small tmpfs of its own, where this process may
 * mount one): the tier answers with errors, never with wrong bytes, and what is not hurt is served.
 */
#include "tier_support.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <lmdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
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

static int teardown(void **state)
{
    tier_under_test *t = *state;
    char path[64];

    snprintf(path, sizeof(path), "%s", t->dir);
    tut_fini(t);
    (void)umount2(path, MNT_DETACH);
    (void)rmdir(path);
    free(t);
    return 0;
}

typedef struct stored {
    kvs_value_key key;
    shape s;
    kvs_slot slot;
} stored;

static void put_all(tier_under_test *t, stored *v)
{
    for (uint32_t i = 0; i < N_VALUES; i++) {
        v[i].key = key_of(1, i, 0);
        v[i].s = i % 2 ? large : small;
        put_result r = put_value(t, &v[i].key, 1, v[i].s, true);
        assert_int_equal(r.status, KVC_OK);
        v[i].slot = r.slot;
    }
}

static void cut(const tier_under_test *t, const char *name, off_t len)
{
    char path[256];

    snprintf(path, sizeof(path), "%s/%s/data.mdb", t->dir, name);
    assert_int_equal(truncate(path, len), 0);
}

/* How many of the values can be read; each is right or an error. */
static uint32_t count_right(tier_under_test *t, const stored *v, shape s)
{
    uint32_t n = 0;
    bool equal;

    for (uint32_t i = 0; i < N_VALUES; i++) {
        if (v[i].s.n_rows != s.n_rows)
            continue;
        kvc_status status = check_rows(t, &v[i].key, 1, s, v[i].slot, 0, s.n_rows, &equal);
        assert_true(equal == (status == KVC_OK));
        n += equal;
    }
    return n;
}

/* --- files that are cut --- */

static void test_file_cut_while_reading(void **state)
{
    tier_under_test *t = *state;
    stored v[N_VALUES];
    kvs_value_key key = key_of(5, 5, 5);

    assert_int_equal(tut_open(t), KVC_OK);
    put_all(t, v);
    cut(t, "class-65", 4096 * 300); /* some values are behind it, the tree may be */
    uint32_t n = count_right(t, v, large);
    assert_true(n < N_VALUES / 2);
    assert_non_null(strstr(tut_log, "class-65"));
    assert_int_equal(count_right(t, v, small), N_VALUES / 2);
    put_result r = put_value(t, &key, 1, small, true); /* the other class serves on */
    assert_int_equal(r.status, KVC_OK);
    assert_value(t, &key, 1, small, r.slot);
    cut(t, "class-65", 0);
    assert_int_equal(count_right(t, v, large), 0);
    assert_int_equal(put_value(t, &key, 1, large, true).status, KVC_IO);
    assert_int_equal(count_right(t, v, small), N_VALUES / 2);
    tut_close(t);
    assert_int_equal(tut_open(t), KVC_OK); /* not a clean stop: nothing of it is taken on trust */
    tut_close(t);
}

static void test_file_cut_under_the_writer(void **state)
{
    tier_under_test *t = *state;
    stored v[N_VALUES];
    kvs_value_key key = key_of(5, 5, 5);

    assert_int_equal(tut_open(t), KVC_OK);
    put_all(t, v);
    cut(t, "class-65", 4096);
    for (uint32_t i = 0; i < N_VALUES; i++) {
        if (v[i].s.n_rows == large.n_rows)
            t->ops->release(t->tier, &v[i].key, v[i].slot);
    }
    put_result r = put_value(t, &key, 1, large, true);
    assert_int_equal(r.status, KVC_IO);
    assert_int_equal(put_value(t, &key, 1, large, true).status, KVC_IO);
    assert_non_null(strstr(tut_log, "a page of the file cannot be had"));
    assert_int_equal(count_right(t, v, small), N_VALUES / 2);
    kvs_slot mine = v[0].slot;
    assert_int_equal(t->ops->sync(t->tier, &mine, 1, NULL), KVC_OK);
    tut_close(t);
}

static atomic_bool failing; /* the disk gives an error as a read transaction begins */
static atomic_uint n_begun;

int __real_mdb_txn_begin(MDB_env *env, MDB_txn *parent, unsigned flags, MDB_txn **txn_p);
int __wrap_mdb_txn_begin(MDB_env *env, MDB_txn *parent, unsigned flags, MDB_txn **txn_p);

/* The linker puts this between the tier and LMDB. */
int __wrap_mdb_txn_begin(MDB_env *env, MDB_txn *parent, unsigned flags, MDB_txn **txn_p)
{
    if ((flags & MDB_RDONLY) && atomic_load(&failing)) {
        atomic_fetch_add(&n_begun, 1);
        (void)raise(SIGBUS);
    }
    return __real_mdb_txn_begin(env, parent, flags, txn_p);
}

/* What LMDB took for a transaction that never came to be is lost, so it is tried once. */
static void test_reads_that_cannot_begin(void **state)
{
    tier_under_test *t = *state;
    stored v[N_VALUES];
    bool equal;

    assert_int_equal(tut_open(t), KVC_OK);
    put_all(t, v);
    tut_close(t);
    assert_int_equal(tut_open(t), KVC_OK); /* no transaction in the pool */
    atomic_store(&n_begun, 0);
    atomic_store(&failing, true);
    for (uint32_t i = 0; i < 100; i++)
        assert_int_equal(check_rows(t, &v[0].key, 1, v[0].s, v[0].slot, 0, 1, &equal), KVC_IO);
    atomic_store(&failing, false);
    assert_int_equal(n_begun, 1);
    assert_int_equal(count_right(t, v, large), N_VALUES / 2);
    assert_int_equal(count_right(t, v, small), 0);
}

static atomic_bool wild; /* a page leads LMDB out of the map */

int __real_mdb_get(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data);
int __wrap_mdb_get(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data);

int __wrap_mdb_get(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data)
{
    static char *volatile nowhere;
    if (atomic_load(&wild)) {
        if (nowhere == NULL) {
            nowhere = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            assert_ptr_not_equal(nowhere, MAP_FAILED);
        }
        return *(volatile char *)nowhere;
    }
    return __real_mdb_get(txn, dbi, key, data);
}

/* A read that a rotten page leads astray is an error of its file; the process lives, and the other
   files are not affected. */
static void test_read_led_astray(void **state)
{
    tier_under_test *t = *state;
    stored v[N_VALUES];
    kvs_value_key key = key_of(5, 5, 5);
    bool equal;
    uint32_t i = 0;

    assert_int_equal(tut_open(t), KVC_OK);
    put_all(t, v);
    while (v[i].s.n_rows != large.n_rows)
        i++;
    atomic_store(&wild, true);
    assert_int_equal(check_rows(t, &v[i].key, 1, v[i].s, v[i].slot, 0, 1, &equal), KVC_IO);
    atomic_store(&wild, false);
    assert_non_null(strstr(tut_log, "a page that makes no sense"));
    assert_int_equal(put_value(t, &key, 1, large, true).status, KVC_IO);
    assert_int_equal(count_right(t, v, small), N_VALUES / 2);
    tut_close(t);
}

/* A store that is full of values still takes the records of saved contexts, up to a part of it. */
static void test_full_of_values_takes_meta(void **state)
{
    enum { RECORD = 128 << 10 };
    tier_under_test *t = *state;
    static uint8_t data[RECORD];
    put_result r = {.status = KVC_OK};
    uint32_t n_records = 0;
    char name[32];

    t->opts.capacity_bytes = 256u << 20;
    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; r.status == KVC_OK; i++) {
        kvs_value_key key = key_of(3, i, 0);
        r = put_value(t, &key, 1, large, i % 64 == 63);
        assert_true(i < 4096);
    }
    assert_true(r.status == KVC_AGAIN || r.status == KVC_NO_SPACE);
    for (; n_records < 64; n_records++) {
        snprintf(name, sizeof(name), "piece/%u", n_records);
        if (t->ops->meta_put(t->tier, name, data, sizeof(data)) != KVC_OK)
            break;
    }
    assert_true(n_records * (uint64_t)RECORD > t->opts.capacity_bytes / 64 / 2);
    assert_true(medium_bytes(t) <= t->opts.capacity_bytes);
    for (uint32_t i = 0; i < n_records; i++) { /* what is deleted makes room for the next */
        snprintf(name, sizeof(name), "piece/%u", i);
        assert_int_equal(t->ops->meta_put(t->tier, name, NULL, 0), KVC_OK);
        snprintf(name, sizeof(name), "again/%u", i);
        assert_int_equal(t->ops->meta_put(t->tier, name, data, sizeof(data)), KVC_OK);
    }
    tut_close(t);
}

static bool keep_any(void *arg, const char *name, const void *data, size_t len_bytes)
{
    (void)name;
    (void)data;
    (void)len_bytes;
    ++*(uint32_t *)arg;
    return true;
}

static void test_meta_cut(void **state)
{
    tier_under_test *t = *state;
    stored v[N_VALUES];
    uint32_t n = 0;

    assert_int_equal(tut_open(t), KVC_OK);
    put_all(t, v);
    assert_int_equal(t->ops->meta_put(t->tier, "a", "b", 1), KVC_OK);
    cut(t, "meta", 0);
    assert_int_equal(t->ops->meta_each(t->tier, "", keep_any, &n), KVC_IO);
    assert_int_equal(n, 0);
    assert_int_equal(t->ops->meta_put(t->tier, "c", "d", 1), KVC_IO);
    assert_int_equal(count_right(t, v, small) + count_right(t, v, large), N_VALUES);
    tut_close(t);
}

/* --- a folder that goes away --- */

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)st;
    (void)kind;
    (void)ftw;
    return remove(path);
}

/* What is open can still be read; a durable write must not be promised. */
static void test_vanished_folder(void **state)
{
    tier_under_test *t = *state;
    stored v[N_VALUES];
    kvs_value_key key = key_of(5, 5, 5);

    assert_int_equal(tut_open(t), KVC_OK);
    put_all(t, v);
    assert_int_equal(nftw(t->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS), 0);
    assert_int_equal(put_value(t, &key, 1, large, true).status, KVC_IO);
    assert_non_null(strstr(tut_log, "was removed from under the server"));
    assert_int_equal(put_value(t, &key, 1, (shape){512, 3}, true).status, KVC_IO); /* a new class */
    assert_int_equal(t->ops->meta_put(t->tier, "a", "b", 1), KVC_IO);
    assert_int_equal(count_right(t, v, small) + count_right(t, v, large), N_VALUES);
    tut_close(t);
}

/* --- a small disk --- */

static bool mount_small(tier_under_test *t, uint64_t len_bytes)
{
    char options[64];

    snprintf(t->dir, sizeof(t->dir), "/tmp/kvs-disk-XXXXXX");
    assert_non_null(mkdtemp(t->dir));
    snprintf(options, sizeof(options), "size=%llu", (unsigned long long)len_bytes);
    return mount("tmpfs", t->dir, "tmpfs", 0, options) == 0;
}

static int fill_disk(const tier_under_test *t, char path[256])
{
    static const uint8_t junk[4096] = {1};

    snprintf(path, 256, "%s/ballast", t->dir);
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    while (write(fd, junk, sizeof(junk)) == (ssize_t)sizeof(junk))
        ;
    return fd;
}

/* Full: an answer that says so, all that is there is served; with room again it goes on. */
static void test_full_disk(void **state)
{
    tier_under_test *t = *state;
    stored v[N_VALUES];
    char ballast[256];
    uint32_t n = 0;

    if (!mount_small(t, 24u << 20))
        skip();
    t->opts.capacity_bytes = 64u << 20;
    assert_int_equal(tut_open(t), KVC_OK);
    put_all(t, v);
    close(fill_disk(t, ballast));
    put_result r = {.status = KVC_OK};
    while (r.status == KVC_OK && n < 1000) {
        kvs_value_key key = key_of(2, n++, 0);
        r = put_value(t, &key, 1, large, n % 2 == 0);
    }
    assert_true(r.status == KVC_AGAIN || r.status == KVC_NO_SPACE);
    assert_non_null(strstr(tut_log, "No space left on device"));
    kvs_value_key fresh = key_of(3, 0, 0); /* a new class does not find room either */
    r = put_value(t, &fresh, 1, (shape){4096, 3}, true);
    assert_true(r.status == KVC_AGAIN || r.status == KVC_NO_SPACE);
    assert_int_equal(count_right(t, v, small) + count_right(t, v, large), N_VALUES);
    tut_close(t);
    assert_int_equal(tut_open(t), KVC_OK); /* a full disk does not keep it from starting */
    assert_int_equal(count_right(t, v, small) + count_right(t, v, large), N_VALUES);
    assert_int_equal(unlink(ballast), 0);
    r = put_value(t, &fresh, 1, (shape){4096, 3}, true);
    assert_int_equal(r.status, KVC_OK);
    assert_value(t, &fresh, 1, (shape){4096, 3}, r.slot);
    fresh.part = 9;
    r = put_value(t, &fresh, 1, large, true);
    assert_int_equal(r.status, KVC_OK);
    assert_value(t, &fresh, 1, large, r.slot);
}

/* LMDB maps its lock file before it has blocks; on a full disk that was a SIGBUS at start. */
static void test_full_disk_at_first_start(void **state)
{
    tier_under_test *t = *state;
    char ballast[256];

    if (!mount_small(t, 4u << 20))
        skip();
    close(fill_disk(t, ballast));
    assert_int_equal(tut_open(t), KVC_NO_SPACE);
    assert_non_null(strstr(tut_log, "No space left on device"));
    assert_int_equal(unlink(ballast), 0);
    assert_int_equal(tut_open(t), KVC_OK);
}

static void test_read_only_disk(void **state)
{
    tier_under_test *t = *state;

    if (!mount_small(t, 8u << 20))
        skip();
    assert_int_equal(tut_open(t), KVC_OK);
    tut_close(t);
    assert_int_equal(mount("tmpfs", t->dir, "tmpfs", MS_REMOUNT | MS_RDONLY, NULL), 0);
    assert_int_equal(tut_open(t), KVC_IO);
    assert_non_null(strstr(tut_log, "Read-only file system"));
    assert_non_null(strstr(tut_log, t->dir));
}

/* --- new folders and files --- */

static ino_t watched; /* a folder; how often it was synced */
static uint32_t n_watched;

int __real_fsync(int fd);
int __wrap_fsync(int fd);

/* The linker puts this between the tier and the system. */
int __wrap_fsync(int fd)
{
    struct stat st;

    if (watched != 0 && fstat(fd, &st) == 0 && st.st_ino == watched)
        n_watched++;
    return __real_fsync(fd);
}

/* Else a power cut takes a new folder away with all that was promised in it. */
static void test_new_folder_is_synced(void **state)
{
    tier_under_test *t = *state;
    kvs_tier_opts opts;
    kvs_tier *tier;
    struct stat st;
    char sub[128];

    assert_int_equal(tut_open(t), KVC_OK);
    opts = t->opts;
    snprintf(sub, sizeof(sub), "%s/sub", t->dir);
    opts.path = sub;
    assert_int_equal(stat(t->dir, &st), 0);
    watched = st.st_ino;
    n_watched = 0;
    assert_int_equal(t->ops->open(&opts, &tier), KVC_OK);
    watched = 0;
    t->ops->close(tier);
    assert_int_equal(n_watched, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_file_cut_while_reading, setup, teardown),
        cmocka_unit_test_setup_teardown(test_file_cut_under_the_writer, setup, teardown),
        cmocka_unit_test_setup_teardown(test_read_led_astray, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full_of_values_takes_meta, setup, teardown),
        cmocka_unit_test_setup_teardown(test_reads_that_cannot_begin, setup, teardown),
        cmocka_unit_test_setup_teardown(test_meta_cut, setup, teardown),
        cmocka_unit_test_setup_teardown(test_vanished_folder, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full_disk, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full_disk_at_first_start, setup, teardown),
        cmocka_unit_test_setup_teardown(test_read_only_disk, setup, teardown),
        cmocka_unit_test_setup_teardown(test_new_folder_is_synced, setup, teardown),
    };

    kvc_log_set_sink(tut_log_keep, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
