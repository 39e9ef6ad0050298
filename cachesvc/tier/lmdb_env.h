/*
 * lmdb_env.h: one LMDB environment: its folder, its map, its read transactions. Private to the
 * lmdb tier; lmdb.h is included here and in the lmdb_*.c files only.
 *
 * The map is the hard limit of the file: LMDB never writes past it. It grows in steps, each
 * claimed from the tier's one budget by the caller first and allotted on the disk before use, so
 * that a full disk shows as NO_SPACE here and not later. Growing waits for the reads under way.
 */
#ifndef KVSI_LMDB_ENV_H
#define KVSI_LMDB_ENV_H

#include <stdatomic.h>

#include "base/thread.h"
#include "lmdb_guard.h"
#include "lmdb_record.h"

#define KVSI_ENV_SLACK_PAGES                                                                       \
    16u                      /* beside a map: its lock file and the file system's own blocks       \
                              */
#define KVSI_ENV_READERS 64u /* read transactions of one environment at a time; more wait */

typedef struct kvsi_env {
    char name[32]; /* folder: "meta" or "class-<pages>" */
    int dir_fd;    /* the tier's folder, borrowed */
    const char *root;
    MDB_env *env;
    MDB_dbi dbi;
    uint64_t map_pages; /* the caller guards it */
    int direct_fd;      /* data.mdb with O_DIRECT, or -1 where the file system has no such thing */
    atomic_bool no_direct;     /* it had, but such reads are refused */
    atomic_uintptr_t map_base; /* where page 0 is mapped; 0: not known since the last growth */
    atomic_bool dead;    /* no read can begin: there is no map any more, or its first pages fail */
    atomic_bool faulted; /* a page could not be had, or LMDB asserted: nothing is promised here */

    kvc_mutex pool_lock; /* rank QUEUE; guards the fields below; both outlive the files */
    kvc_cond pool_cond;
    bool closed;                     /* no files are open */
    MDB_txn *idle[KVSI_ENV_READERS]; /* reset, ready to be renewed */
    uint32_t n_idle, n_open, n_active;
    atomic_bool gate; /* no read may start; those under way should let go soon */
} kvsi_env;

/* Pages of the database as LMDB counts them after the last commit. */
typedef struct kvsi_env_pages {
    uint64_t records, tree, entries;
} kvsi_env_pages;

/*
 * Runs fn(arg) under a guard. EIO, logged once, with env->faulted set, where the file failed under
 * it; else fn's own result.
 */
int kvsi_env_run(kvsi_env *env, int (*fn)(void *arg), void *arg);
/* The same for an fn that writes to nothing but what arg leads to: pages that lead it out of the
   map are a failed file, too. */
int kvsi_env_look(kvsi_env *env, int (*fn)(void *arg), void *arg);

/* OK, or what an LMDB or system error code means: AGAIN for a full map, NO_SPACE, ... */
kvc_status kvsi_lmdb_status(int rc);

/*
 * Pages that a map needs for the folder's file as it is: its length, or what is allotted to it less
 * the slack, which is where the file system's own blocks belong. 0 when there is none.
 */
uint64_t kvsi_env_file_pages(int root_fd, const char *name);

/* Once, before the first open and after the last close; reads may begin in between, always. */
void kvsi_env_init(kvsi_env *env);
void kvsi_env_fini(kvsi_env *env);
/* Pages that the disk has for the file, less the slack; fewer than its length where it has holes.
 */
uint64_t kvsi_env_disk_pages(int root_fd, const char *name);

/*
 * Opens or creates the environment root/name with a map of map_pages; the file must fit into it.
 * claim_pages: what of it is allotted on the disk, all or nothing: with less than map_pages, the
 * file's holes stay. root is borrowed while it is open. A full disk keeps only a new one from
 * opening. CORRUPT: LMDB does not take it for one of its own. IO, NO_SPACE, NO_MEMORY. May block.
 */
kvc_status kvsi_env_open(kvsi_env *env, int root_fd, const char *root, const char *name,
                         uint64_t map_pages, uint64_t claim_pages) KVC_MUST_CHECK;
/* False, logged: the file has no name any more, so what is written would be gone with the process.
 */
bool kvsi_env_is_there(kvsi_env *env);
/* Removes the folder of an environment that holds nothing. IO, logged: it may still be there. */
kvc_status kvsi_env_remove(int root_fd, const char *name);
/* Waits for the reads under way; does not sync. Reads that begin later find nothing. */
void kvsi_env_close(kvsi_env *env);

/* Makes the map larger; the one writer of the environment, with no transaction open. NO_SPACE: the
   disk is full, or so much is not mapped; all is as it was. */
kvc_status kvsi_env_grow(kvsi_env *env, uint64_t map_pages) KVC_MUST_CHECK;
/* Waits until no read holds an old snapshot; new ones wait meanwhile. */
void kvsi_env_drain(kvsi_env *env);
/*
 * Commits a change of nothing: pages freed by the commit before become usable in the next.
 * The writer only.
 */
kvc_status kvsi_env_tick(kvsi_env *env) KVC_MUST_CHECK;
kvc_status kvsi_env_sync(kvsi_env *env) KVC_MUST_CHECK;
kvc_status kvsi_env_count(kvsi_env *env, kvsi_env_pages *pages_p) KVC_MUST_CHECK;

/* A read transaction from the pool; may wait for one. End it soon: it keeps pages from reuse.
   NOT_FOUND: the environment is closed. */
kvc_status kvsi_env_read_begin(kvsi_env *env, MDB_txn **txn_p) KVC_MUST_CHECK;
void kvsi_env_read_end(kvsi_env *env, MDB_txn *txn);

#endif
