/*
 * maps_internal.h: what maps.c, map_segments.c and map_processes.c share: connections, their
 * maps, segments and processes.
 *
 * All of it is guarded by kvs_maps.lock, but for what a map that was cut still has.
 */
#ifndef KVSI_MAPS_INTERNAL_H
#define KVSI_MAPS_INTERNAL_H

#include <stdatomic.h>

#include "base/thread.h"
#include "maps.h"

#define KVSI_MAP_TENANTS 64u

/* Whose segments. */
enum { KVSI_DRAM = 0, KVSI_GPU = 1, KVSI_KINDS };

typedef struct kvsi_map {
    struct kvsi_map *next;
    uint64_t number, bytes;
    uint32_t slot;    /* in the lease */
    uint32_t *values; /* [n] referenced; room for a power of two */
    uint32_t *set;    /* [n_set, a power of two] the same by their hashes; 0: free */
    uint32_t n, n_set;
} kvsi_map;

/* Segments of one kind by their numbers. */
typedef struct kvsi_map_ids {
    uint32_t *ids; /* [n] what a connection calls it; 0: it is not among them */
    uint32_t n;
} kvsi_map_ids;

/* A process that was handed memory of the GPU. */
typedef struct kvsi_map_process {
    struct kvsi_map_process *next;
    kvc_digest tenant;
    int32_t pid;
    int fd;            /* readable once it has ended; -1: it has */
    uint32_t n_peers;  /* its connections */
    kvsi_map_ids left; /* what those that have ended may have left open, each counted once */
    uint32_t n_left;   /* of them that are */
} kvsi_map_process;

typedef struct kvsi_map_peer {
    struct kvsi_map_peer *next;
    uint64_t id;
    kvc_digest tenant;
    kvsi_map *maps;
    int lease_fd;
    _Atomic uint64_t *lease;
    bool lease_passed;
    /* A segment is passed once, however often it is laid out anew: while somebody maps it, it stays
     * the same memory. */
    kvsi_map_ids of[KVSI_KINDS];
    uint32_t *names; /* [n_names] by id - 1: number and kind; KVSI_NO_SEGMENT: the id is free */
    uint32_t n_names, n_passed;
    kvsi_map_process *process; /* NULL: it gets nothing of the GPU */
} kvsi_map_peer;

#define KVSI_NO_SEGMENT UINT32_MAX

typedef struct kvsi_map_tenant {
    kvc_digest tenant;
    uint64_t bytes;                    /* pinned or reserved */
    uint64_t mapped_bytes[KVSI_KINDS]; /* of segments that at least one connection has been passed
                                        */
} kvsi_map_tenant;

struct kvs_maps {
    kvs_server *server;
    uint64_t max_bytes, max_mapped_bytes[KVSI_KINDS]; /* of a tenant */
    uint64_t max_total, max_total_mapped[KVSI_KINDS]; /* of all tenants */
    kvc_mutex lock; /* rank CONTEXT; guards all below; never held with a context's */
    kvsi_map_peer *peers;
    uint64_t next_number, total_bytes, total_mapped_bytes[KVSI_KINDS];
    kvsi_map_tenant tenants[KVSI_MAP_TENANTS]; /* beyond them, tenants share the last */
    uint32_t n_tenants;
    kvsi_map_process *processes; /* at most KVS_FILES_PROCESSES */
    uint32_t n_processes;
    bool told_unwatched; /* that one could not be watched */
};

/* ---- maps.c, with the lock held ---- */
kvsi_map_tenant *kvsi_map_tenant_of(kvs_maps *maps, const kvc_digest *tenant);
kvsi_map_peer *kvsi_map_peer_of(kvs_maps *maps, uint64_t id); /* NULL: it has mapped nothing */
/* Whether the connection's map of this number pins the value. */
bool kvsi_map_has(kvsi_map_peer *peer, uint64_t number, uint32_t value);

/* ---- map_segments.c, with the lock held ---- */
/* The connection has gone: nothing is passed to it any more. */
void kvsi_map_forget_segments(kvs_maps *maps, kvsi_map_peer *peer);
/* One mapping of the tenant's segment is no more. */
void kvsi_map_uncount(kvs_maps *maps, const kvc_digest *tenant, int kind, uint32_t number);

/* ---- map_processes.c, with the lock held ---- */
/* The same, of the GPU: what it has open stays counted until its process has ended. */
void kvsi_map_leave_open(kvs_maps *maps, kvsi_map_peer *peer);
void kvsi_map_forget_processes(kvs_maps *maps); /* at the server's end */

#endif
