/*
 * tier_lmdb_api_test.c: what the lmdb tier promises beyond the table: eight size classes and no
 * ninth, one server per folder, modes, damaged bytes noticed and confined, damaged folders set
 * aside, a full disk survived, the order of release and rewrite.
 */
#include "tier_support.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"

static char log_text[65536];
static size_t log_len;
static uint64_t disk_bytes = UINT64_MAX; /* what fallocate gives a file at most */

static void keep_log(void *arg, const char *line, size_t len_bytes)
{
    (void)arg;
    if (log_len + len_bytes < sizeof(log_text)) {
        memcpy(log_text + log_len, line, len_bytes);
        log_len += len_bytes;
        log_text[log_len] = '\0';
    }
}

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    log_len = 0;
    disk_bytes = UINT64_MAX;
    log_text[0] = '\0';
    tut_init(t, kvs_tier_find("lmdb"), NULL);
    *state = t;
    return 0;
}

static bool find_one(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                     uint32_t n_rows)
{
    (void)key;
    (void)row_bytes;
    (void)n_rows;
    *(kvs_slot *)arg = slot;
    return true;
}

static bool count_found(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                        uint32_t n_rows)
{
    (void)key;
    (void)slot;
    (void)row_bytes;
    (void)n_rows;
    ++*(uint32_t *)arg;
    return true;
}

static void test_ninth_class_is_refused(void **state)
{
    tier_under_test *t = *state;
    kvs_slot slots[8];

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t round = 0; round < 2; round++) {
        for (uint32_t i = 0; i < 8; i++) {
            kvs_value_key key = key_of(1, i, round);
            put_result r = put_value(t, &key, 1, (shape){4096, i + 1}, true);
            assert_int_equal(r.status, KVC_OK);
            slots[i] = r.slot;
        }
        kvs_value_key key = key_of(1, 9, round);
        assert_int_equal(put_value(t, &key, 1, (shape){4096, 9}, true).status, KVC_NO_SPACE);
        assert_non_null(strstr(log_text, "10 pages are refused: it would be a ninth size class"));
        assert_non_null(strstr(log_text, "2, 3, 4, 5, 6, 7, 8, 9 pages"));
        for (uint32_t i = 0; i < 8; i++) {
            kvs_value_key here = key_of(1, i, round);
            assert_value(t, &here, 1, (shape){4096, i + 1}, slots[i]);
        }
        tut_close(t); /* the classes are the same after a start */
        assert_int_equal(tut_open(t), KVC_OK);
    }
}

static void test_second_server_is_kept_out(void **state)
{
    tier_under_test *t = *state;
    kvs_tier *second;

    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->open(&t->opts, &second), KVC_EXISTS);
    assert_null(second);
    assert_non_null(strstr(log_text, "in use by another server"));
    tut_close(t);
    assert_int_equal(tut_open(t), KVC_OK);
}

static void test_bad_options(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; i < 20; i++) {
        key.part = i;
        assert_int_equal(put_value(t, &key, 1, (shape){4096, 256}, true).status, KVC_OK);
    }
    tut_close(t);
    t->opts.capacity_bytes = 8u << 20; /* less than the folder holds */
    assert_int_equal(tut_open(t), KVC_INVALID);
    assert_non_null(strstr(log_text, "raise it or empty the folder"));
    t->opts.capacity_bytes = 1u << 20;
    assert_int_equal(tut_open(t), KVC_INVALID);
    t->opts.capacity_bytes = 64u << 20;
    assert_int_equal(tut_open(t), KVC_OK);
    tut_close(t);

    kvs_tier_opts opts = t->opts;
    opts.path = NULL;
    assert_int_equal(t->ops->open(&opts, &t->tier), KVC_INVALID);
    opts.path = "/dev/null";
    assert_int_equal(t->ops->open(&opts, &t->tier), KVC_INVALID);
    opts.path = "/nosuch/folder";
    assert_int_equal(t->ops->open(&opts, &t->tier), KVC_IO);
    opts = t->opts;
    opts.size_bytes = 8;
    assert_int_equal(t->ops->open(&opts, &t->tier), KVC_INVALID);
}

static mode_t mode_of(const tier_under_test *t, const char *name)
{
    char path[256];
    struct stat st;

    snprintf(path, sizeof(path), "%s/%s", t->dir, name);
    assert_int_equal(stat(path, &st), 0);
    return st.st_mode & 0777;
}

static void test_modes(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1);

    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(put_value(t, &key, 1, (shape){4096, 1}, true).status, KVC_OK);
    assert_int_equal(mode_of(t, "lock"), 0600);
    assert_int_equal(mode_of(t, "meta"), 0700);
    assert_int_equal(mode_of(t, "class-2"), 0700);
    assert_int_equal(mode_of(t, "class-2/data.mdb"), 0600);
    assert_int_equal(mode_of(t, "class-2/lock.mdb"), 0600);
    char sub[128];
    snprintf(sub, sizeof(sub), "%s/sub", t->dir);
    kvs_tier_opts opts = t->opts;
    opts.path = sub;
    kvs_tier *tier;
    assert_int_equal(t->ops->open(&opts, &tier), KVC_OK);
    t->ops->close(tier);
    assert_int_equal(mode_of(t, "sub"), 0700);
    assert_int_equal(chmod(sub, 0755), 0);
    assert_int_equal(t->ops->open(&opts, &tier), KVC_OK);
    assert_int_equal(mode_of(t, "sub"), 0700);
    t->ops->close(tier);
    assert_non_null(strstr(log_text, "was open to other users (mode 755)"));
}

/* --- damaged bytes --- */

typedef struct file {
    int fd;
    uint8_t *bytes;
    size_t len;
} file;

static file load(const tier_under_test *t, const char *name)
{
    char path[256];
    struct stat st;
    file f;

    snprintf(path, sizeof(path), "%s/%s", t->dir, name);
    f.fd = open(path, O_RDWR | O_CLOEXEC);
    assert_true(f.fd >= 0);
    assert_int_equal(fstat(f.fd, &st), 0);
    f.len = (size_t)st.st_size;
    f.bytes = malloc(f.len);
    assert_int_equal(pread(f.fd, f.bytes, f.len, 0), (ssize_t)f.len);
    return f;
}

static size_t find_bytes(const file *f, const void *what, size_t len)
{
    const uint8_t *at = memmem(f->bytes, f->len, what, len);

    assert_non_null(at);
    return (size_t)(at - f->bytes);
}

static void flip(const file *f, size_t off)
{
    uint8_t byte = f->bytes[off] ^ 0x10;

    assert_int_equal(pwrite(f->fd, &byte, 1, (off_t)off), 1);
}

static void unload(file *f)
{
    close(f->fd);
    free(f->bytes);
}

static void test_flipped_bit_in_a_row(void **state)
{
    tier_under_test *t = *state;
    shape s = {4096, 64};
    kvs_value_key key[2] = {key_of(1, 1, 1), key_of(1, 2, 1)};
    kvs_slot slots[2];
    uint8_t *rows = malloc(4096 * 64);
    bool equal;

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; i < 2; i++) {
        put_result r = put_value(t, &key[i], 1, s, true);
        assert_int_equal(r.status, KVC_OK);
        slots[i] = r.slot;
    }
    fill_rows(&key[0], 1, s, rows);
    file f = load(t, "class-65/data.mdb");
    size_t off = find_bytes(&f, rows + 17 * 4096, 4096);
    assert_int_equal(off % 4096, 0); /* rows lie on page boundaries */
    flip(&f, off + 4095);
    for (uint32_t row = 0; row < 64; row++) {
        kvc_status status = check_rows(t, &key[0], 1, s, slots[0], row, 1, &equal);
        assert_int_equal(status, row == 17 ? KVC_CORRUPT : KVC_OK);
        assert_int_equal(equal, row != 17);
    }
    assert_int_equal(check_rows(t, &key[0], 1, s, slots[0], 0, 64, &equal), KVC_CORRUPT);
    assert_int_equal(check_rows(t, &key[0], 1, s, slots[0], 0, 17, &equal), KVC_OK);
    assert_non_null(strstr(log_text, "a row's sum is wrong, row 17"));
    assert_value(t, &key[1], 1, s, slots[1]);
    unload(&f);
    free(rows);
}

static void test_flipped_bit_in_a_prefix(void **state)
{
    tier_under_test *t = *state;
    shape s = {4096, 64};
    kvs_value_key key[2] = {key_of(1, 1, 1), key_of(1, 2, 1)};
    kvs_slot slots[2];
    uint8_t *rows = malloc(4096 * 64);
    bool equal;

    t->opts.row_sums_bytes = 0; /* each read looks at the prefix */
    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; i < 2; i++) {
        put_result r = put_value(t, &key[i], 1, s, true);
        assert_int_equal(r.status, KVC_OK);
        slots[i] = r.slot;
        assert_value(t, &key[i], 1, s, slots[i]);
    }
    fill_rows(&key[0], 1, s, rows);
    file f = load(t, "class-65/data.mdb");
    size_t prefix = find_bytes(&f, rows, 4096) - 4080;
    static const size_t where[] = {0, 4, 8, 16, 31, 40, 100, 128, 128 + 63 * 4};
    for (size_t i = 0; i < sizeof(where) / sizeof(where[0]); i++) {
        flip(&f, prefix + where[i]);
        assert_int_equal(check_rows(t, &key[0], 1, s, slots[0], 3, 1, &equal), KVC_CORRUPT);
        assert_value(t, &key[1], 1, s, slots[1]);
        pwrite(f.fd, &f.bytes[prefix + where[i]], 1, (off_t)(prefix + where[i]));
        assert_value(t, &key[0], 1, s, slots[0]);
    }
    unload(&f);
    free(rows);
}

static void test_damaged_folder_is_set_aside(void **state)
{
    tier_under_test *t = *state;
    kvs_value_key key = key_of(1, 1, 1), other = key_of(1, 2, 1);
    uint32_t found = 0;
    char path[256];

    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(put_value(t, &key, 1, (shape){4096, 64}, true).status, KVC_OK);
    put_result r = put_value(t, &other, 1, (shape){4096, 16}, true);
    assert_int_equal(r.status, KVC_OK);
    tut_close(t);
    snprintf(path, sizeof(path), "%s/class-65/data.mdb", t->dir);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    static const uint8_t junk[8192] = {0x55};
    assert_int_equal(pwrite(fd, junk, sizeof(junk), 0), sizeof(junk));
    close(fd);
    for (uint32_t round = 0; round < 2; round++) {
        assert_int_equal(tut_open(t), KVC_OK);
        found = 0;
        assert_int_equal(t->ops->recover(t->tier, count_found, &found), KVC_OK);
        assert_int_equal(found, 1);
        assert_true(medium_bytes(t) <= t->opts.capacity_bytes);
        if (round == 0)
            assert_non_null(strstr(log_text, "class-65 is damaged: set aside"));
        tut_close(t);
    }
    assert_int_equal(tut_open(t), KVC_OK);
    r = put_value(t, &key, 2, (shape){4096, 64}, true); /* the class starts anew */
    assert_int_equal(r.status, KVC_OK);
    assert_value(t, &key, 2, (shape){4096, 64}, r.slot);
}

/* --- order and room --- */

static void test_release_then_rewrite_keeps_the_new(void **state)
{
    tier_under_test *t = *state;
    shape s = {4096, 16};
    kvs_value_key key = key_of(1, 1, 1);

    assert_int_equal(tut_open(t), KVC_OK);
    put_result r = put_value(t, &key, 0, s, false);
    for (uint32_t version = 1; version < 60; version++) {
        assert_value(t, &key, version - 1, s, r.slot); /* its sums are cached now */
        t->ops->release(t->tier, &key, r.slot);
        r = put_value(t, &key, version, s, version % 4 == 0);
        assert_int_equal(r.status, KVC_OK);
        assert_value(t, &key, version, s, r.slot);
    }
    tut_close(t);
    assert_int_equal(tut_open(t), KVC_OK);
    kvs_slot slot = {99, 99};
    assert_int_equal(t->ops->recover(t->tier, find_one, &slot), KVC_OK);
    assert_value(t, &key, 59, s, slot);
    assert_int_equal(value_count(t), 1);
}

static void test_read_of_what_is_gone(void **state)
{
    tier_under_test *t = *state;
    shape s = {4096, 16};
    kvs_value_key key = key_of(1, 1, 1), never = key_of(1, 2, 1);
    bool equal;

    assert_int_equal(tut_open(t), KVC_OK);
    put_result r = put_value(t, &key, 0, s, true);
    assert_int_equal(check_rows(t, &never, 0, s, r.slot, 0, 1, &equal), KVC_NOT_FOUND);
    t->ops->release(t->tier, &key, r.slot);
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
    assert_int_equal(check_rows(t, &key, 0, s, r.slot, 0, 1, &equal), KVC_NOT_FOUND);
}

/* --- a full disk --- */

int __real_fallocate(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len);

/* The linker puts this between the tier and the system. */
int __wrap_fallocate(int fd, int mode, off_t off, off_t len)
{
    if ((uint64_t)(off + len) > disk_bytes) {
        errno = ENOSPC;
        return -1;
    }
    return __real_fallocate(fd, mode, off, len);
}

/*
 * Writes until room runs out, with one of the statuses in want; then nothing is lost, and releases
 * bring room back. 0, or the number of what went wrong.
 */
static int fill_and_go_on(tier_under_test *t, uint32_t want)
{
    shape s = {4096, 64};
    kvs_slot slots[256];
    uint32_t n = 0;
    bool equal;

    put_result r = {.status = KVC_OK};
    for (; n < 256; n++) {
        kvs_value_key key = key_of(1, n, 0);
        r = put_value(t, &key, 1, s, n % 2 == 0);
        if (r.status != KVC_OK)
            break;
        slots[n] = r.slot;
    }
    if (!(want >> -r.status & 1) || n < 30 || n > 48)
        return 2;
    for (uint32_t i = 0; i < n; i++) {
        kvs_value_key key = key_of(1, i, 0);
        if (check_rows(t, &key, 1, s, slots[i], 0, s.n_rows, &equal) != KVC_OK || !equal)
            return 3;
    }
    for (uint32_t i = 0; i < 10; i++) {
        kvs_value_key key = key_of(1, i, 0);
        t->ops->release(t->tier, &key, slots[i]);
    }
    for (uint32_t i = 0; i < 8; i++) {
        kvs_value_key key = key_of(1, 1000 + i, 0);
        r = put_value(t, &key, 1, s, true);
        if (r.status != KVC_OK)
            return 4;
        if (check_rows(t, &key, 1, s, r.slot, 0, s.n_rows, &equal) != KVC_OK || !equal)
            return 5;
    }
    return 0;
}

static void assert_about_all_found(tier_under_test *t)
{
    uint32_t found = 0;

    tut_close(t);
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->recover(t->tier, count_found, &found), KVC_OK);
    assert_in_range(found, 28, 48);
}

/* The disk cannot give more than 12 MiB: the tier learns it before it promises anything. */
static void test_disk_full_when_growing(void **state)
{
    tier_under_test *t = *state;

    disk_bytes = 12u << 20;
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(fill_and_go_on(t, 1u << -KVC_AGAIN), 0);
    assert_non_null(strstr(log_text, "no room on the disk"));
    assert_about_all_found(t);
    disk_bytes = 100; /* not even for a new class */
    kvs_value_key key = key_of(1, 1, 9);
    assert_int_equal(put_value(t, &key, 1, (shape){4096, 3}, true).status, KVC_NO_SPACE);
    disk_bytes = UINT64_MAX;
    assert_int_equal(put_value(t, &key, 1, (shape){4096, 3}, true).status, KVC_OK);
}

/* Writes past 12 MiB fail in the middle of a commit, as where room cannot be allotted before. */
static int limited_child(tier_under_test *t)
{
    struct rlimit limit = {12u << 20, 12u << 20};

    signal(SIGXFSZ, SIG_IGN);
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0 || tut_open(t) != KVC_OK)
        return 1;
    int wrong = fill_and_go_on(t, 1u << -KVC_IO | 1u << -KVC_NO_SPACE);
    tut_close(t);
    return wrong;
}

static void test_disk_full_in_a_commit(void **state)
{
    tier_under_test *t = *state;
    int status = -1;

    assert_int_equal(tut_open(t), KVC_OK); /* makes the folder */
    tut_close(t);
    pid_t child = fork();
    if (child == 0)
        _exit(limited_child(t));
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(tut_open(t), KVC_OK);
    assert_about_all_found(t);
}

static void count_done(kvs_tier_write *write)
{
    ++*(uint32_t *)write->arg;
}

/* Closing finishes every write that was accepted. */
static void test_close_finishes_writes(void **state)
{
    tier_under_test *t = *state;
    enum { N = 200 };
    static kvs_tier_write writes[N];
    static uint8_t rows[64 * 64];
    uint32_t sums[64], n_done = 0, found = 0;

    t->opts.group_commit_ns = 5000000000ull; /* nothing would be committed by itself */
    t->opts.group_commit_bytes = 1u << 30;
    assert_int_equal(tut_open(t), KVC_OK);
    memset(sums, 0, sizeof(sums));
    for (uint32_t i = 0; i < N; i++) {
        writes[i] = (kvs_tier_write){.key = key_of(1, i, 0),
                                     .row_bytes = 64,
                                     .n_rows = 64,
                                     .rows = rows,
                                     .row_sums = sums,
                                     .done = count_done,
                                     .arg = &n_done};
        assert_int_equal(t->ops->write(t->tier, &writes[i]), KVC_OK);
    }
    tut_close(t);
    assert_int_equal(n_done, N);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(writes[i].status, KVC_OK);
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(t->ops->recover(t->tier, count_found, &found), KVC_OK);
    assert_int_equal(found, N);
}

/* A class that gives room to others and is full of small pieces is asked for those, too. */
static void test_small_pieces_give_way(void **state)
{
    tier_under_test *t = *state;
    const kvs_tier_shape asked = {4096, 8};
    uint32_t pages;
    uint64_t bytes;

    t->opts.capacity_bytes = 12u << 20; /* a share is 192 pages */
    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t i = 0; i < 8; i++) { /* so there is no class for small pieces */
        kvs_value_key key = key_of(1, i, 0);
        assert_int_equal(put_value(t, &key, 1, (shape){4096, i + 1}, true).status, KVC_OK);
    }
    for (uint32_t i = 0; i < 120; i++) {
        kvs_value_key key = key_of(2, i, 0);
        assert_int_equal(put_value(t, &key, 1, (shape){100, KVS_PIECE_ROWS}, false).status, KVC_OK);
    }
    assert_true(t->ops->donor(t->tier, &asked, 0, &pages, &bytes));
    assert_int_equal(pages, 4);
    assert_true(bytes > 0);
    assert_true(t->ops->donor(t->tier, &asked, 1, &pages, &bytes));
    assert_int_equal(pages, 1);
    assert_true(bytes > 0);
    assert_true(t->ops->donor(t->tier, &asked, 2, &pages, &bytes));
    assert_int_equal(pages, 9);
    assert_false(t->ops->donor(t->tier, &asked, 3, &pages, &bytes));
}

/* Small pieces that have a class of their own are not asked for where the class that they could lie
   in gives. */
static void test_small_pieces_of_their_own_stay(void **state)
{
    tier_under_test *t = *state;
    const kvs_tier_shape asked = {4096, 8};
    kvs_value_key key = key_of(2, 0, 0);
    uint32_t pages;
    uint64_t bytes;

    t->opts.capacity_bytes = 12u << 20; /* a share is 192 pages */
    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(put_value(t, &key, 1, (shape){100, KVS_PIECE_ROWS}, true).status, KVC_OK);
    key = key_of(1, 0, 0);
    assert_int_equal(put_value(t, &key, 1, (shape){4096, 8}, true).status, KVC_OK);
    for (uint32_t i = 1; i <= 120; i++) {
        key = key_of(1, i, 0);
        assert_int_equal(put_value(t, &key, 1, (shape){4096, 3}, false).status, KVC_OK);
    }
    assert_true(t->ops->donor(t->tier, &asked, 0, &pages, &bytes));
    assert_int_equal(pages, 4);
    assert_true(t->ops->donor(t->tier, &asked, 1, &pages, &bytes));
    assert_int_equal(pages, 9);
    assert_false(t->ops->donor(t->tier, &asked, 2, &pages, &bytes));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_ninth_class_is_refused, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_second_server_is_kept_out, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_bad_options, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_modes, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_flipped_bit_in_a_row, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_flipped_bit_in_a_prefix, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_damaged_folder_is_set_aside, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_release_then_rewrite_keeps_the_new, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_read_of_what_is_gone, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_disk_full_when_growing, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_disk_full_in_a_commit, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_close_finishes_writes, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_small_pieces_give_way, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_small_pieces_of_their_own_stay, setup, tut_delete),
    };

    kvc_log_set_sink(keep_log, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
