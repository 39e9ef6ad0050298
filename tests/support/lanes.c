/*
 * lanes.c: see lanes.h.
 *
 * Main thread.
 */
#include "lanes.h"

#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/statvfs.h>

#include "support.h"

#define LANE      "KVASIR_LANE"
#define MAX_LANES 64u

bool lanes_is_lane(uint32_t *number_p)
{
    const char *text = getenv(LANE);
    if (text == NULL)
        return false;
    if (number_p != NULL)
        *number_p = (uint32_t)strtoul(text, NULL, 10);
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    return true;
}

static void set_number(const char *name, uint64_t number)
{
    char text[32];
    (void)snprintf(text, sizeof(text), "%llu", (unsigned long long)number);
    assert_int_equal(setenv(name, text, 1), 0);
}

uint32_t lanes_run(uint32_t n_lanes, const char *rounds_name, uint64_t rounds, uint64_t seed,
                   uint32_t *n_skipped_p)
{
    char self[] = "/proc/self/exe";
    char *argv[] = {self, NULL};
    pid_t pids[MAX_LANES];
    uint32_t n_failed = 0;
    *n_skipped_p = 0;
    assert_true(n_lanes > 0 && n_lanes <= MAX_LANES);
    (void)fflush(NULL);
    for (uint32_t i = 0; i < n_lanes; i++) {
        set_number(LANE, i);
        set_number(rounds_name, rounds * (i + 1) / n_lanes - rounds * i / n_lanes);
        set_number("KVASIR_TEST_SEED", seed + i * UINT64_C(0x9e3779b97f4a7c15));
        assert_int_equal(posix_spawn(&pids[i], self, NULL, NULL, argv, environ), 0);
    }
    assert_int_equal(unsetenv(LANE), 0);
    for (uint32_t i = 0; i < n_lanes; i++) {
        int status = -1;
        assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
        if (WIFEXITED(status) && WEXITSTATUS(status) == LANES_SKIPPED) {
            ++*n_skipped_p;
        } else if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
            print_error("lane %u ended with status %d\n", i, status);
            n_failed++;
        }
    }
    return n_failed;
}

uint64_t lanes_rounds(const char *rounds_name, uint64_t otherwise)
{
    const char *text = getenv(rounds_name);
    return text == NULL ? otherwise : strtoull(text, NULL, 0);
}

void lanes_use_memory(uint64_t free_bytes)
{
    struct statvfs fs;
    if (getenv("TMPDIR") == NULL && statvfs("/dev/shm", &fs) == 0 &&
        (uint64_t)fs.f_bavail * fs.f_frsize >= free_bytes)
        assert_int_equal(setenv("TMPDIR", "/dev/shm", 1), 0);
}
