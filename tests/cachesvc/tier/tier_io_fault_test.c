/*
 * tier_io_fault_test.c: every file call of a small life of the lmdb tier fails in turn: open, puts,
 * a record, a release, cold reads, a clean close, a start that trusts, more puts, and an end
 * without a close. Whatever fails, no signal ends it, nothing reads wrong, what went wrong is in
 * the log; and once the fault is gone, a start finds what was acknowledged as DURABLE.
 *
 * The daemon touches the files of its store through this tier only; e2e/io_fault_test has the whole
 * daemon with a few faults of each sort. Some lanes (support/lanes.h) share the calls; a lane is
 * one thread and forks a child for each life. KVASIR_FAULT_STEP=N takes every Nth call only (1;
 * more under sanitizers), KVASIR_IO_FAULT one sort, as "sync EIO".
 */
#include "tier_support.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "iofault.h"
#include "lanes.h"
#include "support.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define LANES 2u
#define STEP  32u
#else
#define LANES 4u
#define STEP  1u
#endif

#define STEP_NAME  "KVASIR_FAULT_STEP"
#define FOLDER     "KVASIR_FAULT_FOLDER" /* of a lane, once it runs with its file calls replaced */
#define FREE_BYTES (UINT64_C(256) << 20) /* of memory for files */
#define N_VALUES   6u
#define MAX_CALLS  4000u
#define META       "life"

/* What a life tells of itself; shared with its child. */
typedef struct told {
    bool owed[N_VALUES];    /* acknowledged as DURABLE */
    bool gone[N_VALUES];    /* acknowledged as released */
    bool touched[N_VALUES]; /* a put or a release of it began */
    bool has_meta, wrong;
    uint32_t n_errors, n_lines; /* what failed; lines of the log */
} told;

static const shape shapes[2] = {{4096, 14}, {512, 7}};
static const char meta_bytes[] = "what a schema would say";
static told *life_told;
static iofault_page *page;

static shape shape_of(uint32_t i)
{
    return shapes[i % 2];
}

static void count_line(void *arg, const char *line, size_t len_bytes)
{
    (void)arg;
    (void)line;
    (void)len_bytes;
    __atomic_fetch_add(&life_told->n_lines, 1, __ATOMIC_RELAXED);
}

static bool good(kvc_status status)
{
    life_told->n_errors += status != KVC_OK;
    return status == KVC_OK;
}

/* ---- a life ---- */

static void put(tier_under_test *t, uint32_t i, kvs_slot *slots)
{
    kvs_value_key key = key_of(1, i, i);
    life_told->touched[i] = true;
    put_result r = put_value(t, &key, 1, shape_of(i), true);
    slots[i] = r.slot;
    life_told->owed[i] = good(r.status);
}

static void check(tier_under_test *t, uint32_t i, const kvs_slot *slots)
{
    kvs_value_key key = key_of(1, i, i);
    shape s = shape_of(i);
    bool equal;
    if (life_told->owed[i] && good(check_rows(t, &key, 1, s, slots[i], 0, s.n_rows, &equal)))
        life_told->wrong |= !equal;
}

static void release(tier_under_test *t, uint32_t i, const kvs_slot *slots)
{
    kvs_value_key key = key_of(1, i, i);
    kvs_tier_shape of = {shape_of(i).row_bytes, shape_of(i).n_rows};
    if (!life_told->owed[i])
        return;
    life_told->owed[i] = false;
    t->ops->release(t->tier, &key, slots[i]);
    life_told->gone[i] = good(t->ops->sync_releases(t->tier, &of, 1));
}

/* By system calls, which do not count: nothing of the file in RAM, so that reads are cold. */
static int drop_file(const char *path, const struct stat *stat, int type, struct FTW *walk)
{
    (void)stat;
    (void)walk;
    int fd = type == FTW_F ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        (void)syscall(SYS_fsync, fd);
        (void)syscall(SYS_fadvise64, fd, 0, 0, POSIX_FADV_DONTNEED);
        (void)syscall(SYS_close, fd);
    }
    return 0;
}

static bool note_slot(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                      uint32_t n_rows)
{
    kvs_slot *slots = arg;
    (void)row_bytes;
    (void)n_rows;
    if (key->part < N_VALUES)
        slots[key->part] = slot;
    return true;
}

/* One fault may cost one start, never a second; one that lasts ends with the first. */
static void start(tier_under_test *t, kvs_slot *slots)
{
    (void)nftw(t->dir, drop_file, 16, FTW_PHYS);
    if (!good(tut_open(t))) {
        atomic_store(&page->nth, 0);
        if (tut_open(t) != KVC_OK)
            _exit(3);
    }
    if (!good(t->ops->recover(t->tier, note_slot, slots)))
        _exit(4);
}

static void live(tier_under_test *t)
{
    kvs_slot slots[N_VALUES] = {{0}};
    start(t, slots);
    life_told->has_meta = good(t->ops->meta_put(t->tier, META, meta_bytes, sizeof(meta_bytes)));
    for (uint32_t i = 0; i < 4; i++)
        put(t, i, slots);
    release(t, 2, slots);
    check(t, 0, slots);
    tut_close(t);
    start(t, slots);
    check(t, 0, slots);
    check(t, 0, slots); /* its sums are known now */
    check(t, 1, slots);
    for (uint32_t i = 4; i < N_VALUES; i++)
        put(t, i, slots);
    release(t, 3, slots);
    _exit(0);
}

/* ---- after it, with no fault ---- */

typedef struct listed {
    bool here[N_VALUES];
    kvs_slot slots[N_VALUES];
} listed;

static bool note_listed(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                        uint32_t n_rows)
{
    listed *l = arg;
    if (key->part < N_VALUES)
        l->here[key->part] = true;
    return note_slot(l->slots, key, slot, row_bytes, n_rows);
}

static void look(tier_under_test *t)
{
    listed l = {0};
    void *data = NULL;
    size_t len = 0;
    if (tut_open(t) != KVC_OK || t->ops->recover(t->tier, note_listed, &l) != KVC_OK)
        _exit(5);
    if (life_told->has_meta && (t->ops->meta_get(t->tier, META, &data, &len) != KVC_OK ||
                                len != sizeof(meta_bytes) || memcmp(data, meta_bytes, len) != 0))
        _exit(6);
    free(data);
    for (uint32_t i = 0; i < N_VALUES; i++) {
        kvs_value_key key = key_of(1, i, i);
        shape s = shape_of(i);
        bool equal;
        if (life_told->owed[i] && !l.here[i])
            _exit(10 + (int)i);
        if (l.here[i] && (life_told->gone[i] || !life_told->touched[i]))
            _exit(20 + (int)i);
        if (l.here[i] &&
            (check_rows(t, &key, 1, s, l.slots[i], 0, s.n_rows, &equal) != KVC_OK || !equal))
            _exit(30 + (int)i);
    }
    tut_close(t);
    _exit(0);
}

/* ---- the lane ---- */

/* Runs one of the two in a child, and gives its status. */
static int in_child(tier_under_test *t, void (*what)(tier_under_test *t))
{
    int status;
    (void)fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        kvc_log_set_sink(count_line, NULL);
        what(t);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

/* A whole life whose nth call of the kind fails. True: it came by. */
static bool run(const char *folder, const iofault_sort *s, uint32_t nth)
{
    tier_under_test t;
    memset(life_told, 0, sizeof(*life_told));
    tut_init(&t, kvs_tier_find("lmdb"), NULL);
    t.opts.group_commit_ns = 100000;
    (void)snprintf(t.dir, sizeof(t.dir), "%s/values", folder);
    assert_int_equal(mkdir(t.dir, 0700), 0);
    atomic_store(&page->kind, (int)s->kind);
    atomic_store(&page->error, s->error);
    atomic_store(&page->lasting, s->lasting);
    atomic_store(&page->hits, 0);
    for (uint32_t i = 0; i < IOFAULT_KINDS; i++)
        atomic_store(&page->passes[i], 0);
    atomic_store(&page->nth, nth);
    int lived = in_child(&t, live);
    bool hit = atomic_load(&page->hits) > 0;
    atomic_store(&page->nth, 0);
    uint32_t n_lines = life_told->n_lines;
    int looked = in_child(&t, look);
    if (lived != 0 || looked != 0 || life_told->wrong || (life_told->n_errors > 0 && n_lines == 0))
        fail_msg("%s at call %u: the life ended with status %x, the look with %x (codes in "
                 "tier_io_fault_test.c); wrong bytes: %d; errors %u, lines in the log %u",
                 s->name, nth, lived, looked, life_told->wrong, life_told->n_errors, n_lines);
    tut_fini(&t);
    return hit;
}

/* As long as tier_support.h has room for, with what comes behind it. */
typedef struct short_path {
    char text[48];
} short_path;

static short_path make_folder(void)
{
    const char *base = getenv("TMPDIR");
    short_path path;
    int n =
        snprintf(path.text, sizeof(path.text), "%s/kvs-fault-XXXXXX", base != NULL ? base : "/tmp");
    assert_true(n > 0 && (size_t)n < sizeof(path.text));
    assert_non_null(mkdtemp(path.text));
    return path;
}

/* Only reads want a disk, where they can be cold; for the rest its syncs are time and nothing else.
 */
static void test_each_call(void **state)
{
    (void)state;
    const char *disk = getenv(FOLDER), *only = getenv("KVASIR_IO_FAULT");
    uint32_t lane = 0, step = (uint32_t)lanes_rounds(STEP_NAME, STEP), n_lives = 0;
    (void)lanes_is_lane(&lane);
    lanes_use_memory(FREE_BYTES);
    short_path memory = make_folder();
    page = iofault_arm(disk, disk);
    life_told =
        mmap(NULL, sizeof(*life_told), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(page != NULL && life_told != MAP_FAILED);
    for (uint32_t k = 0; k < IOFAULT_SORTS; k++) {
        const char *folder = iofault_sorts[k].kind == IOFAULT_READ ? disk : memory.text;
        uint32_t nth = 1 + (lane + k) % LANES * step;
        bool hit = true;
        if (only != NULL && strcmp(only, iofault_sorts[k].name) != 0)
            continue;
        (void)snprintf(page->under, sizeof(page->under), "%s/values", folder);
        for (; hit && nth < MAX_CALLS; nth += LANES * step, n_lives++)
            hit = run(folder, &iofault_sorts[k], nth);
        assert_false(hit); /* it went past the last call */
    }
    print_message("lane %u: %u lives\n", lane, n_lives);
    support_remove_folder(memory.text);
    support_remove_folder(disk);
}

static void test_lanes(void **state)
{
    (void)state;
    uint64_t step = lanes_rounds(STEP_NAME, STEP);
    assert_true(step > 0);
    uint32_t n_skipped;
    assert_int_equal(lanes_run(LANES, STEP_NAME, step * LANES, 0, &n_skipped), 0);
    assert_int_equal(n_skipped, 0);
}

/* A lane begins anew with its file calls replaced. */
static void begin_lane(char **argv)
{
    short_path folder = make_folder();
    assert_non_null(iofault_arm(folder.text, folder.text));
    assert_int_equal(setenv(FOLDER, folder.text, 1), 0);
    (void)execv("/proc/self/exe", argv);
}

int main(int argc, char **argv)
{
    (void)argc;
    const struct CMUnitTest lane[] = {cmocka_unit_test(test_each_call)};
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_lanes)};
    if (!lanes_is_lane(NULL))
        return cmocka_run_group_tests(tests, NULL, NULL);
    if (getenv(FOLDER) == NULL)
        begin_lane(argv);
    return cmocka_run_group_tests_name("lane", lane, NULL, NULL);
}
