/*
 * kvctl_progress_test.c: the bar as a terminal gets it: nothing in the first second, nothing
 * without a terminal, then one line that is drawn over and cleared. The clock is the test's own.
 */
#include "support.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include "kvctl_progress.h"

#define MS 1000000ull

/* The linker puts these before the clock. */
static uint64_t now_ns = 5000 * MS;
uint64_t __wrap_kvc_now_ns(void);

uint64_t __wrap_kvc_now_ns(void)
{
    return now_ns;
}

/* Standard error goes to a pseudo-terminal of 60 columns; *master_p reads what it gets. */
static int take_stderr(int *master_p)
{
    int saved = dup(STDERR_FILENO);
    struct winsize size = {.ws_row = 10, .ws_col = 60};
    *master_p = posix_openpt(O_RDWR | O_NOCTTY);
    assert_true(saved >= 0 && *master_p >= 0);
    assert_int_equal(grantpt(*master_p), 0);
    assert_int_equal(unlockpt(*master_p), 0);
    char name[64];
    assert_int_equal(ptsname_r(*master_p, name, sizeof(name)), 0);
    int terminal = open(name, O_RDWR | O_NOCTTY);
    assert_true(terminal >= 0);
    assert_int_equal(ioctl(terminal, TIOCSWINSZ, &size), 0);
    assert_true(dup2(terminal, STDERR_FILENO) >= 0);
    (void)close(terminal);
    assert_int_equal(fcntl(*master_p, F_SETFL, O_NONBLOCK), 0);
    return saved;
}

static void give_stderr(int saved, int master)
{
    (void)dup2(saved, STDERR_FILENO);
    (void)close(saved);
    (void)close(master);
}

static size_t read_some(int master, char *text, size_t room)
{
    (void)fflush(stderr);
    ssize_t n = read(master, text, room - 1);
    text[n > 0 ? n : 0] = '\0';
    return n > 0 ? (size_t)n : 0;
}

static void test_terminal(void **state)
{
    (void)state;
    char text[1024];
    int master, saved = take_stderr(&master);
    kvctl_progress *bar = kvctl_progress_start("storing", 200, "tokens");
    now_ns += 990 * MS;
    kvctl_progress_set(bar, 10);
    size_t early = read_some(master, text, sizeof(text));
    now_ns += 1050 * MS;
    kvctl_progress_set(bar, 50);
    now_ns += 90 * MS;
    kvctl_progress_set(bar, 51); /* too soon to draw again */
    size_t drawn = read_some(master, text, sizeof(text));
    char after[1024];
    kvctl_progress_stop(bar);
    (void)read_some(master, after, sizeof(after));
    give_stderr(saved, master);
    assert_int_equal(early, 0);
    assert_true(drawn > 0);
    assert_non_null(strstr(text, "\rstoring"));
    assert_non_null(strstr(text, "25 % [======                  ] 50 of 200"));
    assert_null(strstr(text, "51"));
    assert_true(drawn <= 59 + 4); /* the line is cut to the terminal, then \r and ESC [ K */
    assert_string_equal(after, "\r\033[K");
}

static void test_unknown_total(void **state)
{
    (void)state;
    char text[1024];
    int master, saved = take_stderr(&master);
    kvctl_progress *bar = kvctl_progress_start("connecting", 0, NULL);
    now_ns += 1050 * MS;
    kvctl_progress_set(bar, 0);
    (void)read_some(master, text, sizeof(text));
    kvctl_progress_stop(bar);
    give_stderr(saved, master);
    assert_non_null(strstr(text, "connecting ... 1.0"));
}

static void test_no_terminal(void **state)
{
    (void)state;
    int ends[2], saved = dup(STDERR_FILENO);
    char text[64];
    assert_int_equal(pipe2(ends, O_NONBLOCK | O_CLOEXEC), 0);
    (void)dup2(ends[1], STDERR_FILENO);
    kvctl_progress *bar = kvctl_progress_start("storing", 200, "bytes");
    now_ns += 1050 * MS;
    kvctl_progress_set(bar, 50);
    kvctl_progress_stop(bar);
    size_t n = read_some(ends[0], text, sizeof(text));
    (void)close(ends[1]);
    give_stderr(saved, ends[0]);
    assert_int_equal(n, 0);
    kvctl_progress_set(NULL, 1);
    kvctl_progress_stop(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_terminal),
        cmocka_unit_test(test_unknown_total),
        cmocka_unit_test(test_no_terminal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
