/*
 * map_processes.c: the processes that memory of the GPU was handed to, and what they may still
 * have open of it; see maps.h.
 *
 * Any thread. CUDA must not be given memory back that another process has open, and a process can
 * outlive its connection. So what a connection that ended had not let go of stays counted as
 * mapped until its process is no more. Invariants: each connection that was handed such memory has
 * a process here, which is there as long as it has a connection or something is left open; all of
 * it is guarded by kvs_maps.lock. The kernel lets go of a process's devices before it says, by the
 * process's descriptor, that the process has ended.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/digest.h"
#include "base/log.h"
#include "base/metrics.h"
#include "files.h"
#include "maps_internal.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

typedef kvsi_map_process process;

static bool has_ended(const process *o)
{
    struct pollfd wait = {.fd = o->fd, .events = POLLIN};
    return o->fd < 0 || poll(&wait, 1, 0) > 0;
}

/* What its connections left open is open no more. */
static void let_go(kvs_maps *maps, process *o)
{
    for (uint32_t i = 0; i < o->left.n; i++)
        if (o->left.ids[i])
            kvsi_map_uncount(maps, &o->tenant, KVSI_GPU, i);
    KVC_GAUGE_SUB(map_left_segments, o->n_left);
    free(o->left.ids);
    o->left = (kvsi_map_ids){0};
    o->n_left = 0;
}

/* Takes it out of the list, unless there is something to remember of it. */
static void forget(kvs_maps *maps, process *o)
{
    process **link = &maps->processes;
    if (o->n_peers > 0 || o->n_left > 0)
        return;
    while (*link != o)
        link = &(*link)->next;
    *link = o->next;
    maps->n_processes--;
    if (o->fd >= 0)
        (void)close(o->fd);
    free(o->left.ids);
    free(o);
}

/* Its pid may be another's from now on. */
static void end(kvs_maps *maps, process *o)
{
    let_go(maps, o);
    if (o->fd >= 0)
        (void)close(o->fd);
    o->fd = -1;
    forget(maps, o);
}

void kvs_map_reap(kvs_maps *maps)
{
    kvc_mutex_lock(&maps->lock);
    for (process *o = maps->processes, *next; o; o = next) {
        next = o->next;
        if (o->fd >= 0 && has_ended(o))
            end(maps, o);
    }
    kvc_mutex_unlock(&maps->lock);
}

/* A descriptor of the process; -1: the system has none to give. */
static int open_process(int32_t pid)
{
    int fd = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
    int kept = fd >= 0 ? kvs_files_pass(fd) : -1;
    if (fd >= 0)
        (void)close(fd);
    return kept;
}

static process *find(kvs_maps *maps, const kvc_digest *tenant, int32_t pid)
{
    process *o = maps->processes;
    while (o && (o->pid != pid || !kvc_digest_equal(&o->tenant, tenant) || has_ended(o)))
        o = o->next;
    return o;
}

static process *add(kvs_maps *maps, const kvc_digest *tenant, int32_t pid)
{
    process *o = maps->n_processes < KVS_FILES_PROCESSES ? calloc(1, sizeof(*o)) : NULL;
    if (!o)
        return NULL;
    o->tenant = *tenant;
    o->pid = pid;
    o->fd = open_process(pid);
    if (o->fd < 0) {
        free(o);
        return NULL;
    }
    o->next = maps->processes;
    maps->processes = o;
    maps->n_processes++;
    return o;
}

bool kvs_map_watch(kvs_maps *maps, uint64_t id, int32_t pid)
{
    kvc_mutex_lock(&maps->lock);
    kvsi_map_peer *p = kvsi_map_peer_of(maps, id);
    if (!p->process) {
        process *o = find(maps, &p->tenant, pid);
        p->process = o ? o : add(maps, &p->tenant, pid);
        if (p->process)
            p->process->n_peers++;
    }
    bool watched = p->process && !has_ended(p->process);
    bool first = !watched && !maps->told_unwatched;
    maps->told_unwatched = maps->told_unwatched || !watched;
    kvc_mutex_unlock(&maps->lock);
    if (first)
        KVC_LOG_WARN(SHM,
                     "process %d gets no places in the GPU: whether it lives cannot be watched, or "
                     "%u others are",
                     pid, KVS_FILES_PROCESSES);
    return watched;
}

void kvsi_map_leave_open(kvs_maps *maps, kvsi_map_peer *p)
{
    process *o = p->process;
    kvsi_map_ids *more = &p->of[KVSI_GPU];
    if (!o)
        return;
    if (more->n > o->left.n) { /* the longer list is kept, so that nothing can fail here */
        kvsi_map_ids longer = *more;
        *more = o->left;
        o->left = longer;
    }
    for (uint32_t i = 0; i < more->n; i++) {
        if (more->ids[i] && o->left.ids[i])
            kvsi_map_uncount(maps, &o->tenant, KVSI_GPU, i);
        else if (more->ids[i])
            o->left.ids[i] = more->ids[i];
    }
    KVC_GAUGE_SUB(map_left_segments, o->n_left);
    o->n_left = 0;
    for (uint32_t i = 0; i < o->left.n; i++)
        o->n_left += o->left.ids[i] != 0;
    KVC_GAUGE_ADD(map_left_segments, o->n_left);
    o->n_peers--;
    if (has_ended(o))
        end(maps, o);
    else
        forget(maps, o);
}

void kvsi_map_forget_processes(kvs_maps *maps)
{
    while (maps->processes) {
        maps->processes->n_peers = 0;
        end(maps, maps->processes);
    }
}
