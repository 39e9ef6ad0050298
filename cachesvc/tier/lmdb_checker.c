/*
 * lmdb_checker.c: the process that walks an environment through LMDB, and the one that waits for
 * it; see lmdb_check.h.
 *
 * Threads: the caller's. Invariants: the child opens the environment read-only and without locks,
 * so it changes nothing; whatever ends it other than exit status 0 means that the environment is
 * not to be mapped by the server.
 */
#include <errno.h>
#include <fcntl.h>
#include <lmdb.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "lmdb_check.h"
#include "lmdb_record.h"
#include "tier.h"

#define EXIT_SOUND   0
#define EXIT_DAMAGED 4 /* apart from what a program that knows no --check-env would say */
#define EXIT_FAILED  5

/* --- the child --- */

static int walk_tree(MDB_txn *txn, MDB_dbi dbi)
{
    MDB_cursor *cursor;
    MDB_val key, data;
    int rc = mdb_cursor_open(txn, dbi, &cursor);

    if (rc != MDB_SUCCESS)
        return rc;
    while ((rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)) == MDB_SUCCESS) {
        /* The byte is read so that a page that cannot be read is met here. */
        if (data.mv_size > 0)
            (void)*(const volatile uint8_t *)data.mv_data;
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? MDB_SUCCESS : rc;
}

static int walk_env(const char *path, size_t map_bytes)
{
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    int rc = mdb_env_create(&env);

    if (rc != MDB_SUCCESS)
        return rc;
    rc = mdb_env_set_mapsize(env, map_bytes);
    if (rc == MDB_SUCCESS)
        rc = mdb_env_open(env, path, MDB_RDONLY | MDB_NOLOCK | MDB_NORDAHEAD, 0600);
    if (rc == MDB_SUCCESS)
        rc = mdb_txn_begin(env, NULL, MDB_RDONLY, &txn);
    if (rc == MDB_SUCCESS) {
        rc = mdb_dbi_open(txn, NULL, 0, &dbi);
        if (rc == MDB_SUCCESS)
            rc = walk_tree(txn, dbi);
        if (rc == MDB_SUCCESS)
            rc = walk_tree(txn, 0); /* LMDB's own list of free pages */
        mdb_txn_abort(txn);
    }
    mdb_env_close(env);
    return rc;
}

int kvs_tier_check_main(const char *folder)
{
    char why[KVSI_CHECK_WHY_BYTES] = "";
    struct rlimit no_core = {0, 0};
    struct stat st;
    int dir_fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)setrlimit(RLIMIT_CORE, &no_core); /* to die here is nothing unusual */
    if (dir_fd < 0) {
        KVC_LOG_ERROR(TIER, "check: %s: %s", folder, strerror(errno));
        return EXIT_FAILED;
    }
    kvc_status status = kvsi_check_file(dir_fd, true, why);
    if (status == KVC_OK && fstatat(dir_fd, "data.mdb", &st, 0) == 0 && st.st_size > 0) {
        int rc = walk_env(folder, (size_t)st.st_size);
        if (rc != MDB_SUCCESS) {
            snprintf(why, sizeof(why), "LMDB says: %s", mdb_strerror(rc));
            /* A disk or a system that refuses (an errno) says nothing of the file. */
            status = rc > 0 && rc != EINVAL ? KVC_IO : KVC_CORRUPT;
        }
    }
    close(dir_fd);
    if (status == KVC_CORRUPT || why[0] != '\0')
        KVC_LOG_ERROR(TIER, "check: %s: %s", folder, why);
    return status == KVC_OK ? EXIT_SOUND : status == KVC_CORRUPT ? EXIT_DAMAGED : EXIT_FAILED;
}

/* --- the parent --- */

/* Starts the child with no signal blocked; its pid, or -1 with errno. */
static pid_t start(const char *program, const char *path)
{
    static char option[] = "--check-env";
    char *argv[] = {(char *)(uintptr_t)program, option, (char *)(uintptr_t)path, NULL};
    posix_spawnattr_t attr;
    sigset_t none;
    pid_t pid = -1;
    int rc = posix_spawnattr_init(&attr);

    if (rc == 0) {
        sigemptyset(&none);
        rc = posix_spawnattr_setsigmask(&attr, &none);
        if (rc == 0)
            rc = posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK);
        if (rc == 0)
            rc = posix_spawn(&pid, program, NULL, &attr, argv, environ);
        posix_spawnattr_destroy(&attr);
    }
    errno = rc;
    return rc == 0 ? pid : -1;
}

/* CORRUPT: it complained or died. UNSUPPORTED: there was no checker to ask. */
static kvc_status ask_child(const char *program, const char *path)
{
    int state = 0;
    pid_t pid = start(program, path);

    if (pid < 0) {
        KVC_LOG_WARN(TIER, "lmdb: the checker %s does not start: %s", program, strerror(errno));
        return KVC_UNSUPPORTED;
    }
    while (waitpid(pid, &state, 0) < 0) {
        if (errno != EINTR) {
            KVC_LOG_WARN(TIER, "lmdb: the checker is lost: %s", strerror(errno));
            return KVC_UNSUPPORTED;
        }
    }
    if (WIFSIGNALED(state)) {
        KVC_LOG_ERROR(TIER, "lmdb: %s: the checker died of signal %d (%s)", path, WTERMSIG(state),
                      strsignal(WTERMSIG(state)));
        return WTERMSIG(state) == SIGKILL ? KVC_UNSUPPORTED : KVC_CORRUPT;
    }
    if (WEXITSTATUS(state) == EXIT_SOUND)
        return KVC_OK;
    if (WEXITSTATUS(state) == EXIT_DAMAGED)
        return KVC_CORRUPT;
    KVC_LOG_WARN(TIER, "lmdb: %s: the checker failed with status %d", path, WEXITSTATUS(state));
    return KVC_UNSUPPORTED;
}

kvc_status kvsi_check_env(int root_fd, const char *root, const char *name, const char *program,
                          bool deep)
{
    char path[4096 + 64], why[KVSI_CHECK_WHY_BYTES];

    int dir_fd = openat(root_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    snprintf(path, sizeof(path), "%s/%s", root, name);
    if (dir_fd < 0 && errno == ENOENT)
        return KVC_OK;
    if (dir_fd < 0) {
        KVC_LOG_ERROR(TIER, "lmdb: cannot open %s: %s", path, strerror(errno));
        return KVC_IO;
    }
    kvc_status status = program != NULL ? ask_child(program, path) : KVC_UNSUPPORTED;
    /* The child looked at everything; without one, this process looks at what it safely can. */
    if (status == KVC_UNSUPPORTED) {
        status = kvsi_check_file(dir_fd, deep, why);
        if (status == KVC_CORRUPT)
            KVC_LOG_ERROR(TIER, "lmdb: %s: %s", path, why);
        else if (status != KVC_OK)
            KVC_LOG_ERROR(TIER, "lmdb: %s cannot be checked: %s", path, kvc_status_name(status));
    }
    close(dir_fd);
    return status;
}
