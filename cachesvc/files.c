/*
 * files.c: descriptors, and who needs how many; see files.h.
 *
 * Invariant: the soft limit is never lowered, and what maps pass to clients leaves the last SPARE
 * below it to others.
 */
#include "files.h"

#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "admin_http.h"
#include "base/log.h"

#define SEGMENT_BYTES (UINT64_C(64) << 20) /* of dram, of which each has one */
#define SEGMENTS_MIN  32u                  /* where dram is small, its segments are too */
#define SPARE         64u                  /* that answers which pass memory leave to others */
/* lmdb, threads, listeners, admin connections, answers that pass memory, log, refusals */
#define REST          (128u + SPARE)
#define LMDB_FILES    36u /* nine environments: data, again past the page cache, lock, folder */

_Static_assert(KVSI_HTTP_CONNECTIONS + LMDB_FILES <= 128u / 4 * 3,
               "admin connections and lmdb leave some of the rest to listeners and threads");

/* A connection that maps has its lease's memory beside its socket, and only shm maps. */
static uint64_t files_of_one(const kvs_settings *settings)
{
    return strstr(settings->listen, "shm://") ? 2 : 1;
}

uint32_t kvs_files_connections(const kvs_settings *settings)
{
    struct rlimit limit;
    uint64_t rest = settings->dram_bytes / SEGMENT_BYTES + SEGMENTS_MIN + REST +
                    (settings->gpu_bytes > 0 ? KVS_FILES_PROCESSES : 0);
    uint64_t each = files_of_one(settings);
    uint64_t wanted = settings->max_connections * each + rest;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted)
        return (uint32_t)settings->max_connections;
    rlim_t soft = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : (rlim_t)wanted;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        limit.rlim_cur = soft;
    if (limit.rlim_cur >= wanted)
        return (uint32_t)settings->max_connections;
    uint64_t fits = limit.rlim_cur > rest + each ? (limit.rlim_cur - rest) / each : 1;
    KVC_LOG_WARN(SERVER,
                 "the limit on open files (%llu) leaves room for %llu connections, not for "
                 "max_connections (%llu): raise it to %llu",
                 (unsigned long long)limit.rlim_cur, (unsigned long long)fits,
                 (unsigned long long)settings->max_connections, (unsigned long long)wanted);
    return (uint32_t)fits;
}

int kvs_files_pass(int fd)
{
    struct rlimit limit;
    int passed = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    /* It is the lowest that was free. */
    if (passed < 0 || getrlimit(RLIMIT_NOFILE, &limit) != 0 ||
        (rlim_t)passed + SPARE < limit.rlim_cur)
        return passed;
    (void)close(passed);
    return -1;
}
