/*
 * support.h: what every test program shares: cmocka with its headers in the right order, status
 * asserts that name the status, seeded random numbers, and folders that clean up after themselves.
 *
 * Header only, for test programs only. KVASIR_TEST_SEED=N repeats a run of random operations.
 */
#ifndef KVASIR_TEST_SUPPORT_H
#define KVASIR_TEST_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <ftw.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvc/status.h"

/* Fails with both names, not with two numbers. */
#define assert_status(got, wanted) support_assert_status((got), (wanted), #got, __FILE__, __LINE__)
#define assert_ok(got)             assert_status((got), KVC_OK)

static inline void support_assert_status(kvc_status got, kvc_status wanted, const char *text,
                                         const char *file, int line)
{
    if (got == wanted)
        return;
    print_error("%s gave %s, wanted %s\n", text, kvc_status_name(got), kvc_status_name(wanted));
    _fail(file, line);
}

/*
 * How long a test waits for what must come. It comes at once, but on a busy machine a thread may
 * not run for seconds and a sync may take as long; so no test takes less patience than this, and
 * none says that something is fast or has not happened yet because of the time that has passed.
 */
#define SUPPORT_PATIENCE_S  60u
#define SUPPORT_PATIENCE_NS (SUPPORT_PATIENCE_S * 1000000000ull)

/* Waits until the condition holds; fails if it does not in SUPPORT_PATIENCE_S. Counts looks and not
 * seconds, so that time in which this process stood still does not count. */
#define support_wait_for(condition)                                                                \
    do {                                                                                           \
        for (uint32_t n_looks_ = 0; !(condition) && n_looks_ < SUPPORT_PATIENCE_S * 1000;          \
             n_looks_++)                                                                           \
            (void)usleep(1000);                                                                    \
        assert_true(condition);                                                                    \
    } while (0)

/* splitmix64: small, good enough to make up data, the same everywhere. */
typedef struct support_random {
    uint64_t state;
} support_random;

static inline uint64_t support_next(support_random *random)
{
    uint64_t z = (random->state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Uniform enough in [0, n); n > 0. */
static inline uint64_t support_below(support_random *random, uint64_t n)
{
    return support_next(random) % n;
}

static inline void support_fill(support_random *random, void *bytes, size_t len_bytes)
{
    unsigned char *at = bytes;
    for (size_t i = 0; i < len_bytes; i++)
        at[i] = (unsigned char)support_next(random);
}

/* Takes KVASIR_TEST_SEED, else the seed given; prints it, so that a failure can be repeated. */
static inline support_random support_seed(uint64_t seed)
{
    const char *text = getenv("KVASIR_TEST_SEED");
    if (text != NULL)
        seed = strtoull(text, NULL, 0);
    print_message("seed %llu (KVASIR_TEST_SEED repeats it)\n", (unsigned long long)seed);
    return (support_random){seed};
}

/* Makes a new folder under TMPDIR or the current folder; path [path_bytes] gets its name. */
static inline void support_make_folder(char *path, size_t path_bytes)
{
    const char *base = getenv("TMPDIR");
    int n = snprintf(path, path_bytes, "%s/kvasir-test-XXXXXX", base == NULL ? "." : base);
    assert_true(n > 0 && (size_t)n < path_bytes);
    assert_non_null(mkdtemp(path));
}

static inline int support_remove_one(const char *path, const struct stat *stat, int type,
                                     struct FTW *walk)
{
    (void)stat;
    (void)type;
    (void)walk;
    return remove(path);
}

static inline void support_remove_folder(const char *path)
{
    assert_int_equal(nftw(path, support_remove_one, 16, FTW_DEPTH | FTW_PHYS), 0);
}

static inline void support_write_file(const char *path, const char *text)
{
    FILE *stream = fopen(path, "we");
    assert_non_null(stream);
    assert_int_equal(fputs(text, stream) >= 0, 1);
    assert_int_equal(fclose(stream), 0);
}

/*
 * Runs fn(arg) in a forked child, its standard error to /dev/null. Gives the signal that ended it,
 * or minus its exit status (0: it came back).
 */
static inline int support_death_signal(void (*fn)(void *), void *arg)
{
    int status;
    (void)fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (freopen("/dev/null", "w", stderr) == NULL)
            _exit(99);
        fn(arg);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}

#endif
