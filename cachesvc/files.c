/*
 * files.c: descriptors, and who needs how many; see files.h.
 *
 * The starting thread. Invariant: the soft limit is never lowered.
 */
#include "files.h"

#include <sys/resource.h>

#include "base/log.h"

#define SEGMENT_BYTES (UINT64_C(64) << 20) /* of dram, of which each has one */
#define SEGMENTS_MIN  32u                  /* where dram is small, its segments are too */
#define REST          128u /* lmdb, threads, listeners, answers that pass memory, log, refusals */

uint32_t kvs_files_connections(const kvs_settings *settings)
{
    struct rlimit limit;
    uint64_t rest = settings->dram_bytes / SEGMENT_BYTES + SEGMENTS_MIN + REST;
    uint64_t wanted = settings->max_connections + rest;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted)
        return (uint32_t)settings->max_connections;
    rlim_t soft = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : (rlim_t)wanted;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        limit.rlim_cur = soft;
    if (limit.rlim_cur >= wanted)
        return (uint32_t)settings->max_connections;
    uint64_t fits = limit.rlim_cur > rest + 1 ? limit.rlim_cur - rest : 1;
    KVC_LOG_WARN(SERVER,
                 "the limit on open files (%llu) leaves room for %llu connections, not for "
                 "max_connections (%llu): raise it to %llu",
                 (unsigned long long)limit.rlim_cur, (unsigned long long)fits,
                 (unsigned long long)settings->max_connections, (unsigned long long)wanted);
    return (uint32_t)fits;
}
