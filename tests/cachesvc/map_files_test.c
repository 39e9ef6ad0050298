/*
 * map_files_test.c: a server whose connections all map still has descriptors for the others.
 *
 * A real cachesvc, which starts with few descriptors and raises its limit by itself; the test's own
 * thread is every client.
 */
#include "harness.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon.h"

#define CLIENTS 180u /* more than what is kept for other things than connections */
#define SPARE   64u  /* that files.c leaves to connections at the least */

typedef struct rig {
    char dir[256], uri[300];
    support_daemon daemon;
    h_schema schema;
    h_peer *peers[CLIENTS];
} rig;

static void set_soft_limit(rlim_t soft)
{
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = soft < limit.rlim_max ? soft : limit.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

static int setup(void **state)
{
    rig *r = calloc(1, sizeof(*r));
    char count[16];
    assert_non_null(r);
    h_temp_dir(r->dir);
    snprintf(r->uri, sizeof(r->uri), "shm://%s/socket", r->dir);
    snprintf(count, sizeof(count), "%u", CLIENTS);
    const char *const args[] = {"--listen", r->uri, "--dram-bytes", "8MiB", "--max-connections",
                                count,      NULL};
    set_soft_limit(64);
    assert_true(support_daemon_start(&r->daemon, r->dir, args));
    set_soft_limit(4096);
    h_schema_init(&r->schema, "files", 1, 512, false);
    *state = r;
    return 0;
}

static int teardown(void **state)
{
    rig *r = *state;
    int status = support_daemon_stop(&r->daemon, SIGTERM);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    h_remove_dir(r->dir);
    free(r);
    return 0;
}

static void begin_map(rig *r, h_peer *peer)
{
    uint64_t context;
    const uint32_t part = 0;
    assert_int_equal(h_register(peer, &r->schema), KVC_OK);
    assert_int_equal(h_open(peer, &r->schema, 1, 1, 0, &context), KVC_OK);
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    req.u.map_context.context = context;
    req.u.map_context.parts = &part;
    req.u.map_context.n_parts = 1;
    assert_int_equal(h_call(peer, &req), KVC_OK);
    assert_true(peer->xfer.reply.u.map_context.lease_bytes > 0);
    for (uint32_t i = 0; i < peer->n_fds; i++)
        close(peer->fds[i]);
}

static uint64_t open_files(const rig *r)
{
    char path[64];
    uint64_t n = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)r->daemon.pid);
    DIR *dir = opendir(path);
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

static void all_may_map(void **state)
{
    rig *r = *state;
    struct rlimit limit;
    for (uint32_t i = 0; i < CLIENTS; i++) {
        r->peers[i] = h_connect(r->uri, NULL);
        begin_map(r, r->peers[i]);
    }
    assert_int_equal(prlimit(r->daemon.pid, RLIMIT_NOFILE, NULL, &limit), 0);
    assert_true(open_files(r) + SPARE < limit.rlim_cur);
    for (uint32_t i = 0; i < CLIENTS; i++)
        h_disconnect(r->peers[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(all_may_map, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
