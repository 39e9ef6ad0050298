/*
 * daemon_test.c: the real program: its settings, its signals, and what survives kill -9.
 *
 * The daemon runs as a child; the test talks to it over gRPC like any client.
 */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROW 512u

typedef struct daemon_proc {
    char dir[256], ready[300], lmdb[300], log[300];
    pid_t pid;
    char uri[256];
    const char *group_commit;
    h_peer *peer;
    h_schema schema;
} daemon_proc;

static void nap_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* Runs the daemon with arguments; its output goes to a file. */
static pid_t spawn(const daemon_proc *d, char *const *argv)
{
    posix_spawn_file_actions_t actions;
    char output[300];
    pid_t pid = 0;
    snprintf(output, sizeof(output), "%s", d->log);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, output, O_WRONLY | O_CREAT | O_APPEND, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    assert_int_equal(posix_spawn(&pid, argv[0], &actions, NULL, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

static int wait_exit(pid_t pid)
{
    int status = 0;
    for (int tries = 0; tries < 12000; tries++) {
        pid_t got = waitpid(pid, &status, WNOHANG);
        if (got == pid)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        assert_true(got == 0 || errno == EINTR);
        nap_ms(10);
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    return -1;
}

static void print_log(const daemon_proc *d)
{
    char line[1024];
    FILE *file = fopen(d->log, "r");
    while (file && fgets(line, sizeof(line), file))
        fputs(line, stderr);
    if (file)
        fclose(file);
}

static void start(daemon_proc *d)
{
    char *argv[] = {CACHESVC_BIN,
                    "--listen",
                    "grpc://127.0.0.1:0",
                    "--ready-file",
                    d->ready,
                    "--lmdb-path",
                    d->lmdb,
                    "--lmdb-bytes",
                    "64MiB",
                    "--dram-bytes",
                    "256KiB",
                    "--group-commit",
                    (char *)(uintptr_t)d->group_commit,
                    "--drain",
                    "2s",
                    "--max-value-bytes",
                    "64KiB",
                    NULL};
    d->pid = spawn(d, argv);
    FILE *file = NULL;
    for (int tries = 0; !file && tries < 12000; tries++) {
        file = fopen(d->ready, "r");
        if (!file && waitpid(d->pid, NULL, WNOHANG) == d->pid)
            break;
        nap_ms(10);
    }
    if (!file)
        print_log(d);
    assert_non_null(file);
    assert_non_null(fgets(d->uri, sizeof(d->uri), file));
    fclose(file);
    d->uri[strcspn(d->uri, "\n")] = '\0';
    d->peer = h_connect(d->uri, "default");
}

static int stop(daemon_proc *d, int number)
{
    h_disconnect(d->peer);
    d->peer = NULL;
    kill(d->pid, number);
    int code = wait_exit(d->pid);
    d->pid = 0;
    unlink(d->ready);
    return code;
}

static int setup(void **state)
{
    daemon_proc *d = calloc(1, sizeof(*d));
    h_temp_dir(d->dir);
    d->group_commit = "5ms";
    snprintf(d->ready, sizeof(d->ready), "%s/ready", d->dir);
    snprintf(d->lmdb, sizeof(d->lmdb), "%s/lmdb", d->dir);
    snprintf(d->log, sizeof(d->log), "%s/log", d->dir);
    h_schema_init(&d->schema, "model", 2, ROW, false);
    *state = d;
    return 0;
}

static int teardown(void **state)
{
    daemon_proc *d = *state;
    if (d->peer)
        h_disconnect(d->peer);
    if (d->pid) {
        kill(d->pid, SIGKILL);
        waitpid(d->pid, NULL, 0);
    }
    h_remove_dir(d->dir);
    free(d);
    return 0;
}

static void check_all(daemon_proc *d, uint32_t n)
{
    uint32_t hits, picks[64];
    uint64_t context;
    const uint32_t part = 10;
    assert_int_equal(h_match(d->peer, &d->schema, 0, n, &part, 1, &hits), KVC_OK);
    assert_int_equal(hits, n);
    assert_int_equal(h_open(d->peer, &d->schema, 0, n, 0, &context), KVC_OK);
    for (uint32_t i = 0; i < 64; i++)
        picks[i] = i * 41 % (n * H_TOKENS);
    h_fetch_equal(d->peer, &d->schema, context, 0, 10, picks, 64);
}

/* Every DURABLE value that was acknowledged before kill -9 is there afterwards, bit for bit. */
static void test_kill(void **state)
{
    daemon_proc *d = *state;
    uint32_t acked = 0;
    start(d);
    assert_int_equal(h_register(d->peer, &d->schema), KVC_OK);
    for (int round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < 20; i++)
            assert_int_equal(h_put1(d->peer, &d->schema, acked++, 10, KVC_PROMISE_DURABLE), KVC_OK);
        for (uint32_t i = 0; i < 20; i++) /* not promised: noise for the writer */
            assert_int_equal(
                h_put1(d->peer, &d->schema, 1000 + 20 * (uint64_t)round + i, 0, KVC_PROMISE_MEMORY),
                KVC_OK);
        assert_int_equal(stop(d, SIGKILL), 128 + SIGKILL);
        start(d);
        check_all(d, acked); /* without registering the schema again */
    }
    assert_int_equal(stop(d, SIGTERM), 0);
}

/* The promise holds from the answer on: the kill follows it at once. */
static void test_kill_at_once(void **state)
{
    daemon_proc *d = *state;
    d->group_commit = "500ms";
    start(d);
    assert_int_equal(h_register(d->peer, &d->schema), KVC_OK);
    assert_int_equal(h_put1(d->peer, &d->schema, 0, 10, KVC_PROMISE_DURABLE), KVC_OK);
    kill(d->pid, SIGKILL);
    assert_int_equal(stop(d, SIGKILL), 128 + SIGKILL);
    start(d);
    check_all(d, 1);
}

/* SIGTERM writes what is only in memory, removes the ready file and exits with 0. */
static void test_terminate(void **state)
{
    daemon_proc *d = *state;
    start(d);
    assert_int_equal(h_register(d->peer, &d->schema), KVC_OK);
    for (uint32_t b = 0; b < 5; b++)
        assert_int_equal(h_put1(d->peer, &d->schema, b, 10, KVC_PROMISE_MEMORY), KVC_OK);
    h_disconnect(d->peer);
    d->peer = NULL;
    kill(d->pid, SIGTERM);
    assert_int_equal(wait_exit(d->pid), 0);
    d->pid = 0;
    assert_int_not_equal(access(d->ready, F_OK), 0);
    start(d);
    check_all(d, 5);
    assert_int_equal(stop(d, SIGINT), 0);
}

/* A stop that has much to write is cut short by a second signal, at once and with a status of its
   own. */
static void test_second_signal(void **state)
{
    daemon_proc *d = *state;
    d->group_commit = "10s"; /* what was put without a promise is written that late */
    start(d);
    assert_int_equal(h_register(d->peer, &d->schema), KVC_OK);
    assert_int_equal(h_put1(d->peer, &d->schema, 1, 10, KVC_PROMISE_MEMORY), KVC_OK);
    h_disconnect(d->peer);
    d->peer = NULL;
    kill(d->pid, SIGTERM);
    nap_ms(1000);
    assert_int_equal(waitpid(d->pid, NULL, WNOHANG), 0);
    int status = 0;
    do { /* a busy machine may show it the first two as one */
        kill(d->pid, SIGTERM);
        nap_ms(200);
    } while (waitpid(d->pid, &status, WNOHANG) == 0);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 3);
    d->pid = 0;
}

static int run_with(daemon_proc *d, const char *flag, const char *value)
{
    char f[64], v[256];
    snprintf(f, sizeof(f), "%s", flag);
    snprintf(v, sizeof(v), "%s", value ? value : "");
    char *argv[] = {CACHESVC_BIN, f, value ? v : NULL, NULL};
    return wait_exit(spawn(d, argv));
}

static bool log_has(const daemon_proc *d, const char *text)
{
    char line[4096];
    bool found = false;
    FILE *file = fopen(d->log, "r");
    while (file && !found && fgets(line, sizeof(line), file))
        found = strstr(line, text) != NULL;
    if (file)
        fclose(file);
    return found;
}

static void test_settings(void **state)
{
    daemon_proc *d = *state;
    assert_int_equal(run_with(d, "--help", NULL), 0);
    assert_true(log_has(d, "--dram-bytes"));
    assert_int_equal(run_with(d, "--version", NULL), 0);
    assert_true(log_has(d, "cachesvc 0.1.0"));
    assert_int_equal(run_with(d, "--print-config", NULL), 0);
    assert_true(log_has(d, "max_calls: 1024"));
    assert_int_equal(run_with(d, "--dram-bytes", "12"), 2);
    assert_true(log_has(d, "dram_bytes is '12'"));
    assert_int_equal(run_with(d, "--no-such-thing", "1"), 2);
    assert_int_equal(run_with(d, "--listen", "grpc://no.such.host.invalid:1"), 1);
    assert_int_equal(run_with(d, "--listen", "carrier-pigeon://roof"), 1);
}

static void test_port_in_use(void **state)
{
    daemon_proc *d = *state;
    start(d);
    assert_int_equal(run_with(d, "--listen", d->uri), 1);
    assert_int_equal(stop(d, SIGTERM), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_kill, setup, teardown),
        cmocka_unit_test_setup_teardown(test_kill_at_once, setup, teardown),
        cmocka_unit_test_setup_teardown(test_terminate, setup, teardown),
        cmocka_unit_test_setup_teardown(test_second_signal, setup, teardown),
        cmocka_unit_test_setup_teardown(test_settings, setup, teardown),
        cmocka_unit_test_setup_teardown(test_port_in_use, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
