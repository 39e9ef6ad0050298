/*
 * tier_check_test.c: damaged files of the lmdb tier. Every page of a small environment is altered
 * in turn, and the file cut at every page: the tier opens, serves what is sound, never gives a
 * wrong byte and never dies. The checker is this program (--check-env); what it dies of or does not
 * answer is tried as well.
 */
#include "tier_support.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "base/metrics.h"
#include "lmdb_check.h"

#define N_VALUES 70u /* two levels of pages */
#define DIE_OF   "KVS_CHECKER_DIES_OF"
#define BAD_PAGE "KVS_BAD_PAGE" /* "<folder> <page>": the disk gives errors there at open */

static const shape value_shape = {512, 8};

static void forget_log(void)
{
    tut_log_clear();
}

static int setup(void **state)
{
    tier_under_test *t = malloc(sizeof(*t));

    forget_log();
    unsetenv(DIE_OF);
    unsetenv(BAD_PAGE);
    tut_init(t, kvs_tier_find("lmdb"), NULL);
    t->opts.checker = "/proc/self/exe";
    *state = t;
    return 0;
}

static void path_in(const tier_under_test *t, const char *name, char out[256])
{
    snprintf(out, 256, "%s/%s", t->dir, name);
}

static bool exists(const tier_under_test *t, const char *name)
{
    char path[256];

    path_in(t, name, path);
    return access(path, F_OK) == 0;
}

/* As after a crash: nobody left the mark. */
static void forget_mark(const tier_under_test *t)
{
    char path[256];

    path_in(t, "clean", path);
    assert_int_equal(unlink(path), 0);
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)st;
    (void)kind;
    (void)ftw;
    return remove(path);
}

static uint32_t count_bad(const tier_under_test *t, bool remove_them)
{
    uint32_t n = 0;
    struct dirent *entry;
    DIR *dir = opendir(t->dir);

    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL) {
        size_t len = strlen(entry->d_name);
        if (len < 4 || strcmp(entry->d_name + len - 4, ".bad") != 0)
            continue;
        n++;
        if (remove_them) {
            char path[512];
            snprintf(path, sizeof(path), "%s/%s", t->dir, entry->d_name);
            assert_int_equal(nftw(path, remove_one, 8, FTW_DEPTH | FTW_PHYS), 0);
        }
    }
    closedir(dir);
    return n;
}

/* --- a small environment and its bytes --- */

typedef struct image {
    uint8_t *bytes;
    size_t len;
} image;

static image load(const tier_under_test *t, const char *name)
{
    char path[256];
    struct stat st;
    image im;

    path_in(t, name, path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(fstat(fd, &st), 0);
    im.len = (size_t)st.st_size;
    im.bytes = malloc(im.len);
    assert_int_equal(pread(fd, im.bytes, im.len, 0), (ssize_t)im.len);
    close(fd);
    return im;
}

/* The file becomes the image's first len bytes, with one byte changed by flip. */
static void store(const tier_under_test *t, const image *im, size_t len, size_t at, uint8_t flip)
{
    char path[256];

    path_in(t, "class-2", path);
    (void)mkdir(path, 0700);
    path_in(t, "class-2/data.mdb", path);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, im->bytes, len, 0), (ssize_t)len);
    if (flip != 0) {
        uint8_t byte = im->bytes[at] ^ flip;
        assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
    }
    close(fd);
}

ssize_t __real_pread(int fd, void *out, size_t len, off_t off);
ssize_t __wrap_pread(int fd, void *out, size_t len, off_t off);

/* The linker puts this between the tier and the disk, here and in the checker's process. */
ssize_t __wrap_pread(int fd, void *out, size_t len, off_t off)
{
    const char *bad = getenv(BAD_PAGE);
    char link[64], path[256] = "", want[64];
    long page = bad != NULL ? strtol(strchr(bad, ' '), NULL, 10) : -1;

    if (page < 0 || off >= (page + 1) * 4096 || off + (off_t)len <= page * 4096)
        return __real_pread(fd, out, len, off);
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    snprintf(want, sizeof(want), "/%.*s/data.mdb", (int)strcspn(bad, " "), bad);
    if (readlink(link, path, sizeof(path) - 1) < 0 || strstr(path, want) == NULL)
        return __real_pread(fd, out, len, off);
    errno = EIO;
    return -1;
}

static void set_bad_page(const char *folder, size_t page)
{
    char text[64];

    snprintf(text, sizeof(text), "%s %zu", folder, page);
    setenv(BAD_PAGE, text, 1);
}

/* Values 0 .. N_VALUES - 1; others came and went, so that there is a list of free pages. */
static image build(tier_under_test *t)
{
    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < N_VALUES; i++) {
            kvs_value_key key = key_of(1, i, round);
            put_result r = put_value(t, &key, 1, value_shape, i % 16 == 0);
            assert_int_equal(r.status, KVC_OK);
            if (round > 0)
                t->ops->release(t->tier, &key, r.slot);
        }
        assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
    }
    tut_close(t);
    return load(t, "class-2/data.mdb");
}

typedef struct finding {
    tier_under_test *t;
    uint32_t n, n_right;
} finding;

/* A value that is found reads right, or says that it is damaged. */
static bool look(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                 uint32_t n_rows)
{
    finding *f = arg;
    bool equal = false;
    shape s = {row_bytes, n_rows};
    kvc_status status = check_rows(f->t, key, 1, s, slot, 0, n_rows, &equal);

    f->n++;
    f->n_right += status == KVC_OK && equal;
    if (status == KVC_OK && !equal)
        fail_msg("wrong bytes without an error");
    return true;
}

/* Opens, reads all that is there, writes and releases some. How many values were right. */
static uint32_t use(tier_under_test *t)
{
    finding f = {.t = t};
    kvs_value_key key = key_of(9, 9, 9);

    assert_int_equal(tut_open(t), KVC_OK);
    unsetenv(BAD_PAGE);
    assert_int_equal(t->ops->recover(t->tier, look, &f), KVC_OK);
    for (uint32_t i = 0; i < 2; i++) {
        put_result r = put_value(t, &key, 3 + i, value_shape, true);
        assert_int_equal(r.status, KVC_OK);
        assert_value(t, &key, 3 + i, value_shape, r.slot);
        t->ops->release(t->tier, &key, r.slot);
    }
    tut_close(t);
    return f.n_right;
}

/* --- tests --- */

static void test_sound_files_pass(void **state)
{
    tier_under_test *t = *state;
    uint64_t aside = kvc_metric_get(KVC_M_lmdb_set_aside);
    image im = build(t);

    for (uint32_t round = 0; round < 4; round++) {
        if (round % 2 == 0)
            forget_mark(t);
        assert_false(exists(t, "clean") && round % 2 == 0);
        assert_int_equal(use(t), N_VALUES);
        assert_true(exists(t, "clean"));
    }
    assert_int_equal(kvc_metric_get(KVC_M_lmdb_set_aside), aside);
    assert_string_equal(tut_log, "");
    free(im.bytes);
}

/* Many generations of a tree and of its list of free pages, which itself grows large. */
static void test_sound_after_much_use(void **state)
{
    tier_under_test *t = *state;
    char why[KVSI_CHECK_WHY_BYTES], path[256];
    static kvs_slot slots[600];
    uint64_t seed = 7;

    assert_int_equal(tut_open(t), KVC_OK);
    for (uint32_t round = 0; round < 6; round++) {
        for (uint32_t i = 0; i < 600; i++) {
            kvs_value_key key = key_of(1, i, 0);
            if (slots[i].b == 0 && rng_next(&seed) % 3 != 0)
                slots[i] = put_value(t, &key, 1, (shape){64, 2 + i % 7}, false).slot;
            else if (slots[i].b != 0 && rng_next(&seed) % 2 == 0) {
                t->ops->release(t->tier, &key, slots[i]);
                slots[i].b = 0;
            }
        }
        assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
        path_in(t, "class-2", path);
        int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        kvc_status status = kvsi_check_file(fd, true, why);
        close(fd);
        assert_string_equal(why, "");
        assert_int_equal(status, KVC_OK);
    }
}

static bool is_tree_page(const image *im, size_t page)
{
    uint64_t number;
    uint16_t flags;

    memcpy(&number, im->bytes + page * 4096, sizeof(number));
    memcpy(&flags, im->bytes + page * 4096 + 10, sizeof(flags));
    return number == page && (flags == 1 || flags == 2 || flags == 8);
}

/* One altered byte: how many values are right then; *aside_p: whether the class was set aside. */
static uint32_t try_flip(tier_under_test *t, const image *im, size_t at, uint8_t flip, bool clean,
                         bool *aside_p)
{
    if (exists(t, "clean") && !clean)
        forget_mark(t);
    store(t, im, im->len, at, flip);
    uint32_t n = use(t);
    uint32_t n_bad = count_bad(t, true);
    assert_true(n_bad <= 1);
    *aside_p = n_bad == 1;
    return n;
}

static void test_every_page_altered(void **state)
{
    tier_under_test *t = *state;
    static const uint16_t in_tree[] = {0, 3, 10, 12, 14, 16, 17, 24, 40, 60, 120, 2048, 4000, 4090};
    static const uint16_t in_rows[] = {8, 1000};
    image im = build(t);
    uint32_t n_aside = 0, n_hurt = 0, n = 0;
    bool aside;

    for (size_t page = 0; page < im.len / 4096; page++) {
        bool tree = is_tree_page(&im, page);
        const uint16_t *where = tree ? in_tree : in_rows;
        size_t n_where = tree ? sizeof(in_tree) / 2 : sizeof(in_rows) / 2;
        for (size_t i = 0; i < n_where; i++, n++) {
            size_t at = page * 4096 + where[i];
            forget_log();
            uint32_t right = try_flip(t, &im, at, (uint8_t)(1u << (page + i) % 8), i % 2, &aside);
            n_aside += aside;
            n_hurt += !aside && right < N_VALUES;
            /* One value at most is hurt, unless the whole environment says that it is damaged. */
            assert_true(aside ? right == 0 : right >= N_VALUES - 1);
        }
    }
    print_message("%u alterations: %u set aside, %u values hurt\n", n, n_aside, n_hurt);
    assert_true(n_aside > n / 20 && n_hurt > n / 20);
    assert_int_equal(try_flip(t, &im, 0, 0, false, &aside), N_VALUES);
    free(im.bytes);
}

static void test_cut_at_every_page(void **state)
{
    tier_under_test *t = *state;
    image im = build(t);
    uint32_t n_aside = 0;

    for (size_t page = 0; page < im.len / 4096; page++) {
        if (page % 2 == 0)
            forget_mark(t);
        store(t, &im, page * 4096 + (page % 3 == 0 ? 100 : 0), 0, 0);
        uint32_t right = use(t);
        uint32_t n_bad = count_bad(t, true);
        assert_true(n_bad == 1 ? right == 0 : right == N_VALUES || (page == 0 && right == 0));
        n_aside += n_bad;
    }
    assert_true(n_aside > im.len / 4096 / 2);
    free(im.bytes);
}

/* One sector that cannot be read costs its environment at most, never the start. */
static void test_unreadable_pages(void **state)
{
    tier_under_test *t = *state;
    image im = build(t);
    uint32_t n_aside = 0;
    bool aside;

    for (size_t page = 0; page < im.len / 4096; page++) {
        bool clean = page % 2 == 0, tree = is_tree_page(&im, page);
        set_bad_page("class-2", page);
        uint32_t right = try_flip(t, &im, 0, 0, clean, &aside);
        assert_int_equal(right, aside ? 0 : N_VALUES);
        assert_true(aside || !tree || page > 1);
        n_aside += aside;
    }
    assert_true(n_aside > 4);
    (void)try_flip(t, &im, 0, 0, true, &aside);
    for (size_t page = 0; page < 2; page++) {
        forget_log();
        set_bad_page("meta", page);
        uint32_t right = try_flip(t, &im, 0, 0, page == 0, &aside);
        assert_int_equal(right, N_VALUES);
        assert_true(aside);
        assert_non_null(strstr(tut_log, "meta is damaged: set aside"));
    }
    free(im.bytes);
}

/* Whatever the checker dies of, only the environment that it looked at is set aside. */
static void test_checker_dies(void **state)
{
    tier_under_test *t = *state;
    static const int causes[] = {SIGSEGV, SIGBUS, SIGABRT};
    uint64_t aside = kvc_metric_get(KVC_M_lmdb_set_aside);
    image im = build(t);
    kvs_value_key other = key_of(2, 2, 2);
    shape s = {4096, 3};
    char text[32];
    finding f;

    assert_int_equal(tut_open(t), KVC_OK);
    assert_int_equal(put_value(t, &other, 1, s, true).status, KVC_OK);
    tut_close(t);
    for (size_t i = 0; i < sizeof(causes) / sizeof(causes[0]); i++) {
        store(t, &im, im.len, 0, 0);
        forget_mark(t);
        forget_log();
        snprintf(text, sizeof(text), "class-2 %d", causes[i]);
        setenv(DIE_OF, text, 1);
        assert_int_equal(tut_open(t), KVC_OK);
        snprintf(text, sizeof(text), "died of signal %d", causes[i]);
        assert_non_null(strstr(tut_log, text));
        assert_non_null(strstr(tut_log, "class-2 is damaged: set aside"));
        assert_int_equal(kvc_metric_get(KVC_M_lmdb_set_aside), aside + i + 1);
        f = (finding){.t = t};
        assert_int_equal(t->ops->recover(t->tier, look, &f), KVC_OK);
        assert_int_equal(f.n, 1); /* the value of the other class */
        assert_int_equal(f.n_right, 1);
        tut_close(t);
        unsetenv(DIE_OF);
        assert_int_equal(count_bad(t, true), 1);
    }
    free(im.bytes);
}

/* Without an answer the tier looks itself, and neither trusts nor drops what it cannot know. */
static void test_no_answer_from_the_checker(void **state)
{
    tier_under_test *t = *state;
    static const char *const programs[] = {"/nosuch/program", "/bin/false", NULL};
    image im = build(t);

    for (uint32_t i = 0; i < 3; i++) {
        t->opts.checker = programs[i];
        forget_mark(t);
        assert_int_equal(use(t), N_VALUES);
        forget_mark(t);
        store(t, &im, im.len, 2 * 4096, 0xff);
        uint32_t right = use(t);
        assert_true(count_bad(t, true) == 1 ? right == 0 : right >= N_VALUES - 1);
        store(t, &im, im.len, 0, 0xff); /* a meta page */
        forget_mark(t);
        assert_int_equal(use(t), 0);
        assert_int_equal(count_bad(t, true), 1);
        store(t, &im, im.len, 0, 0);
    }
    free(im.bytes);
}

/* The names of the registered schemas may be lost with theirs; the values stay. */
static void test_damaged_meta(void **state)
{
    tier_under_test *t = *state;
    image im = build(t);
    char path[256];
    uint8_t junk = 0x55;

    assert_int_equal(count_bad(t, false), 0);
    path_in(t, "meta/data.mdb", path);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pwrite(fd, &junk, 1, 4096 + 16), 1);
    close(fd);
    forget_mark(t);
    assert_int_equal(use(t), N_VALUES);
    assert_non_null(strstr(tut_log, "meta is damaged: set aside"));
    assert_int_equal(count_bad(t, false), 1);
    free(im.bytes);
}

/* Writes values until the tier is full; how many there are. */
static uint32_t fill(tier_under_test *t, put_result *results, uint32_t max)
{
    for (uint32_t n = 0; n < max; n++) {
        kvs_value_key key = key_of(1, n, 0);
        results[n] = put_value(t, &key, 1, value_shape, false);
        if (results[n].status != KVC_OK) {
            assert_int_equal(results[n].status, KVC_AGAIN);
            return n;
        }
    }
    fail_msg("%u values and the tier is not full", max);
    return 0;
}

/* A full folder has room for one more meta; a second one goes beyond the cap, and says so. */
static void test_damaged_meta_in_a_full_folder(void **state)
{
    tier_under_test *t = *state;
    static put_result results[4096];
    kvs_value_key key = key_of(1, 0, 0);
    char path[256];
    uint8_t junk = 0x55;

    t->opts.capacity_bytes = 4u << 20;
    assert_int_equal(tut_open(t), KVC_OK);
    uint32_t n = fill(t, results, 4096);
    for (uint32_t round = 0; round < 4; round++) {
        tut_close(t);
        path_in(t, "meta/data.mdb", path);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        assert_int_equal(pwrite(fd, &junk, 1, 4096 + 16), 1);
        close(fd);
        forget_log();
        finding f = {.t = t};
        assert_int_equal(tut_open(t), KVC_OK);
        assert_non_null(strstr(tut_log, "meta is damaged: set aside"));
        assert_int_equal(count_bad(t, false), round + 1);
        assert_int_equal(t->ops->recover(t->tier, look, &f), KVC_OK);
        assert_int_equal(f.n_right, n);
        assert_true(round > 0 || medium_bytes(t) <= t->opts.capacity_bytes);
        /* Still full, and nothing more is claimed. */
        key.part = 1;
        assert_int_equal(put_value(t, &key, 1, value_shape, true).status, KVC_AGAIN);
        assert_int_equal(put_value(t, &key, 1, (shape){4096, 9}, true).status, KVC_AGAIN);
    }
    assert_non_null(strstr(tut_log, "larger than its capacity"));
    for (uint32_t i = 0; i < n; i++) {
        key = key_of(1, i, 0);
        t->ops->release(t->tier, &key, results[i].slot);
    }
    assert_int_equal(t->ops->sync(t->tier, NULL, 0, NULL), KVC_OK);
    assert_int_equal(put_value(t, &key, 1, value_shape, true).status, KVC_OK);
}

/* As the checker: dies where a test wants it, else does what cachesvc does. */
static int checker_main(const char *folder)
{
    const char *die = getenv(DIE_OF);
    size_t len = die != NULL ? strcspn(die, " ") : 0;

    if (die != NULL && strlen(folder) > len &&
        strncmp(folder + strlen(folder) - len, die, len) == 0) {
        int cause = (int)strtol(die + len, NULL, 10);
        (void)signal(cause, SIG_DFL);
        (void)raise(cause);
    }
    kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    return kvs_tier_check_main(folder);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_sound_files_pass, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_sound_after_much_use, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_every_page_altered, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_cut_at_every_page, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_unreadable_pages, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_checker_dies, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_no_answer_from_the_checker, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_damaged_meta, setup, tut_delete),
        cmocka_unit_test_setup_teardown(test_damaged_meta_in_a_full_folder, setup, tut_delete),
    };

    if (argc == 3 && strcmp(argv[1], "--check-env") == 0)
        return checker_main(argv[2]);
    kvc_log_set_sink(tut_log_keep, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
