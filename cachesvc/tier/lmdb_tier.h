/*
 * lmdb_tier.h: the lmdb tier's state, shared by its files. Private to them.
 *
 * Budget: every page of capacity_bytes is either claimed by an environment's file (claim_pages,
 * plus KVSI_ENV_SLACK_PAGES for its lock file and the file system's own blocks) or free to be
 * claimed. LMDB never makes a file shorter: a claim is given back by holes where the file holds
 * nothing, and with the whole file once there is no value in it (lmdb_shrink.c). What a first meta
 * map takes is never claimed otherwise, so that a damaged meta can be replaced in a full folder;
 * nor is what it may grow to in a store that is full of values (KVSI_META_PART), so that contexts
 * can still be saved there.
 */
#ifndef KVSI_LMDB_TIER_H
#define KVSI_LMDB_TIER_H

#include <stdatomic.h>

#include "lmdb_env.h"
#include "lmdb_ring.h"
#include "lmdb_sums.h"

#define KVSI_MAX_CLASSES    8u
#define KVSI_MAX_QUEUED     4096u /* writes */
#define KVSI_CLASS_PAGES    64u   /* a class's map is never smaller */
#define KVSI_META_PAGES     128u  /* the meta map's first size */
#define KVSI_META_PART      64u   /* of the capacity: what values leave to the meta map */
#define KVSI_MIN_CAPACITY   (4ull << 20)
#define KVSI_MAX_META_NAME  500u
#define KVSI_MAX_NAME       512u /* no LMDB key is longer */
#define KVSI_MAX_META_BYTES (16u << 20)
#define KVSI_EMPTY_NS       1000000000ull /* a class stays so long when its last value has gone */
#define KVSI_FAIR_PART      16u /* of the capacity: below it, a class may take from others */
#define KVSI_MAX_REMAINS    16u
#define KVSI_RANK_META      ((kvc_lock_rank)(KVC_RANK_TIER - 1))

/* One size class: values of this many pages each, in an environment of their own. */
typedef struct kvsi_class {
    kvsi_env env;
    uint32_t record_pages;
    uint64_t claim_pages; /* of the budget, for its file; 0: it has none. Less than env.map_pages
                             where the file has holes: then the writer sees to it */
    uint64_t live_pages, tree_pages; /* after the last commit */
    uint64_t values;
    uint64_t empty_ns; /* since when there has been no value; 0: there is one, or no file */
    uint64_t queued_pages, freeing_pages; /* of writes and releases that wait */
    atomic_bool broken; /* a sync or the file failed: nothing more is promised here; written under
                           lock, read anywhere */
    bool dirty;         /* the writer's: committed, not yet fully synced */
    bool release_lost;  /* there was no memory for one: its value is back after a restart */
} kvsi_class;

/* A release on its way to the writer. */
typedef struct kvsi_drop {
    struct kvsi_drop *next;
    uint32_t class_number;
    uint8_t key[KVSI_KEY_BYTES];
    uint32_t key_bytes; /* less than KVSI_KEY_BYTES only for records that make no sense */
} kvsi_drop;

/* Someone who waits in sync. */
typedef struct kvsi_waiter {
    struct kvsi_waiter *next;
    uint64_t ticket;  /* done once this many writes were processed and synced */
    uint32_t classes; /* one bit for each that is waited for */
    uint32_t failed;  /* result: those of them that are not synced */
    bool done;
} kvsi_waiter;

/* A file of a class that went: it has no name, and is freed piece by piece. */
typedef struct kvsi_remains {
    int fd;
    uint64_t len_bytes, claim_pages; /* what is left of both */
} kvsi_remains;

struct kvs_tier {
    char *root; /* the folder */
    int root_fd, lock_fd;
    uint64_t capacity_pages, step_pages, max_value_bytes;
    uint64_t group_commit_ns, group_commit_bytes;
    uint64_t reader_ns; /* a read transaction is not held longer */
    kvsi_sums *sums;
    kvsi_lanes *lanes; /* NULL: no io_uring */
    kvc_thread writer;
    atomic_ullong bytes_read;

    kvc_mutex meta_lock; /* rank META: one meta_put at a time; tier lock and pool lock under it */
    kvsi_env meta;
    uint64_t meta_used_pages; /* under lock */
    char *checker;            /* opts.checker, or NULL */
    bool was_clean;           /* the last server that had the folder closed it in order */
    bool meta_lost; /* since open: a damaged meta was set aside, now or at an earlier start */

    uint64_t cut_bytes; /* of a file that goes, at a time */
    uint32_t n_remains; /* the writer's, like the list */
    kvsi_remains remains[KVSI_MAX_REMAINS];

    kvc_mutex lock; /* rank TIER: everything below and the counters of the classes */
    kvc_cond work;  /* something for the writer */
    kvc_cond woken; /* a waiter is done */
    uint64_t claimed_pages;
    uint64_t reserved_pages; /* not claimed yet, and the meta map's only */
    uint64_t remains_pages;  /* of claimed_pages: of files that are on their way out */
    bool no_holes;           /* the file system takes nothing back out of a file */
    uint32_t n_classes;      /* classes[0 .. n_classes) never change place */
    uint32_t refused_pages;  /* the size class that was last refused, and logged */
    kvsi_class classes[KVSI_MAX_CLASSES];
    kvs_tier_write *writes, **writes_end;
    kvsi_drop *drops, **drops_end;
    kvsi_waiter *waiters;
    uint32_t n_queued;
    uint64_t queued_bytes, n_durable_queued;
    uint64_t first_queued_ns, last_queued_ns;
    uint64_t accepted, processed; /* writes, ever */
    uint64_t bytes_written;
    bool stop;
};

/* --- tier_lmdb.c --- */

/* What may still be claimed for values; the caller holds the tier lock. */
uint64_t kvsi_left_pages(const kvs_tier *tier);
/*
 * Claims budget so that a map of now_pages can hold need_pages, and a step more where there is
 * room. Gives the new size of the map, which may be less than needed when the budget is short.
 * Takes the tier lock.
 */
uint64_t kvsi_claim(kvs_tier *tier, uint64_t now_pages, uint64_t need_pages);
/* The same for the meta map. */
uint64_t kvsi_claim_meta(kvs_tier *tier, uint64_t now_pages, uint64_t need_pages);
void kvsi_unclaim(kvs_tier *tier, uint64_t pages);
/* Pages that a class's trees, free lists and fragments may take beyond its records. */
uint64_t kvsi_reserve_pages(const kvsi_class *class);
/* What a class must be able to claim before its environment is worth creating. */
uint64_t kvsi_first_claim(uint32_t record_pages);

/* Breaks the class if its file failed: no more writes, and no clean stop. Takes the tier lock. */
void kvsi_class_check(kvs_tier *tier, kvsi_class *class);

/* As kvsi_env_open, after a look at the file; twice before it is CORRUPT. */
kvc_status kvsi_check_and_open(kvs_tier *tier, kvsi_env *env, const char *name, uint64_t map_pages,
                               uint64_t claim_pages) KVC_MUST_CHECK;
/* Renames a damaged, closed environment to *.bad; its claim stays. IO. */
kvc_status kvsi_set_aside(kvs_tier *tier, const char *name) KVC_MUST_CHECK;

/* --- lmdb_writer.c --- */

void kvsi_writer_main(void *arg); /* a kvs_tier */
kvc_status kvsi_write(kvs_tier *tier, kvs_tier_write *write);
void kvsi_release(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot);
kvc_status kvsi_sync(kvs_tier *tier, const kvs_slot *slots, uint32_t n, int8_t *status);
kvc_status kvsi_sync_releases(kvs_tier *tier, const kvs_tier_shape *shapes, uint32_t n);
/* Queues a drop; takes it. */
void kvsi_drop_push(kvs_tier *tier, kvsi_drop *drop);

/* A failed sync says nothing about what reached the disk, so the class promises no more. */
kvc_status kvsi_class_sync(kvs_tier *tier, kvsi_class *class) KVC_MUST_CHECK;

kvsi_class *kvsi_class_of(kvs_tier *tier, uint32_t pages); /* NULL: none. Holds the lock */
/* Where values of the shape go: their size class, or where that would be one too many, the one that
   has room for them. NULL: none yet. The caller holds the lock. */
kvsi_class *kvsi_class_for(kvs_tier *tier, uint32_t row_bytes, uint32_t n_rows);
/* A place for one more size class; NULL: all are taken. The caller holds the lock. */
kvsi_class *kvsi_class_place(kvs_tier *tier);

/* --- lmdb_shrink.c: what gives the disk back --- */

/* What other classes would give this one now, or (at_most) once what may go has gone; the caller
   holds the lock. */
uint64_t kvsi_takeable(const kvs_tier *tier, const kvsi_class *class, bool at_most);
/* Frees about so many pages of the budget that other classes have and do not need. kvs-lmdb-w. */
void kvsi_take(kvs_tier *tier, const kvsi_class *class, uint64_t pages);
/* Gives back about so many pages of the class's own claim that hold nothing; how many. kvs-lmdb-w,
   or open. */
uint64_t kvsi_class_shrink(kvs_tier *tier, kvsi_class *class, uint64_t pages);
/* Keeps a file with holes within its claim when so many pages more are written. kvs-lmdb-w. */
void kvsi_class_trim(kvs_tier *tier, kvsi_class *class, uint64_t pages);
/* See kvs_tier_ops.donor. */
bool kvsi_donor(kvs_tier *tier, const kvs_tier_shape *shape, uint32_t rank, uint32_t *pages_p,
                uint64_t *bytes_p);

/* When the first class that holds nothing is to go; 0: none is. The caller holds the lock. */
uint64_t kvsi_empty_due(const kvs_tier *tier);
/* Removes the classes that have held nothing for KVSI_EMPTY_NS. kvs-lmdb-w. */
void kvsi_remove_empty(kvs_tier *tier);

/* --- lmdb_remains.c: kvs-lmdb-w --- */

/* Takes the descriptor of a file without a name, and its claim; -1: the claim alone. */
void kvsi_remains_add(kvs_tier *tier, int fd, uint64_t claim_pages);
/* Frees one piece of what there is; false: nothing is left. *given_p: pages of the budget. Waits
   for the file system. */
bool kvsi_remains_cut(kvs_tier *tier, uint64_t *given_p);
void kvsi_remains_close(kvs_tier *tier);

/* --- lmdb_commit.c: one group into one environment; the writer thread only --- */

/* A class's share of a group. */
typedef struct kvsi_batch {
    kvsi_class *class;
    uint32_t number;         /* of the class */
    kvs_tier_write **writes; /* [n_writes] */
    uint32_t n_writes;
    kvsi_drop *drops, **drops_end; /* list */
    uint32_t n_drops;
    bool drops_done;
} kvsi_batch;

/* Commits what it can and sets each write's status and slot; drops_done if those took effect. */
void kvsi_commit(kvs_tier *tier, kvsi_batch *batch);

/* --- lmdb_read.c, lmdb_recover.c --- */

kvc_status kvsi_read(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                     uint32_t n_rows, const kvs_row_range *ranges, uint32_t n_ranges);
void kvsi_read_each(kvs_tier *tier, const kvs_tier_reads *reads); /* lmdb_ahead.c */
kvc_status kvsi_recover(kvs_tier *tier, kvs_tier_found *found, void *arg);

/* --- lmdb_meta.c --- */

kvc_status kvsi_meta_put(kvs_tier *tier, const char *name, const void *data, size_t len_bytes);
kvc_status kvsi_meta_get(kvs_tier *tier, const char *name, void **data_p, size_t *len_bytes_p);
kvc_status kvsi_meta_each(kvs_tier *tier, const char *prefix,
                          bool (*each)(void *arg, const char *name, const void *data,
                                       size_t len_bytes),
                          void *arg);

static inline kvs_slot kvsi_slot(uint32_t class_number, uint32_t row_bytes, uint32_t n_rows)
{
    return (kvs_slot){class_number, (uint64_t)row_bytes << 32 | n_rows};
}

#endif
