/*
 * tier.h: the table that every place for values fills, and its contract.
 *
 * A tier stores bytes under slots that it hands out; the server's index is the only lookup and the
 * only reference count. A slot is reserved, filled, committed, read, and released. Nothing is
 * visible before commit. A tier never evicts by itself: it answers AGAIN and the server releases
 * something. Its byte cap is never exceeded.
 *
 * Caps: ADDRESSABLE tiers give a pointer to a committed slot's rows (dram), so reads need no call.
 * BLOCKING tiers may wait for a medium: their read and sync are called only from the server's disk
 * threads, and commits complete later through done. PERSISTENT tiers find their values again after
 * a restart (recover).
 *
 * Conformance: tests/cachesvc/tier/tier_conformance.c runs over every registered tier, wrapped in
 * the fault tier too.
 */
#ifndef KVS_TIER_H
#define KVS_TIER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

#include "kvc/types.h"

#define KVS_TIER_ADDRESSABLE 1u
#define KVS_TIER_BLOCKING    2u
#define KVS_TIER_PERSISTENT  4u

typedef struct kvs_tier kvs_tier;

/* What a value is, for a tier that must find it again. */
typedef struct kvs_value_key {
    kvc_digest tenant; /* SHA-256 of the tenant's name */
    kvc_digest schema;
    kvc_digest block;
    uint32_t part;
} kvs_value_key;

/* Where a value is inside a tier; plain data, meaning private to the tier, but for what an
   ADDRESSABLE one says of segments. */
typedef struct kvs_slot {
    uint64_t a, b;
} kvs_slot;

/* Of an ADDRESSABLE tier's slot: how often its segment was empty before and got another life. */
static inline uint32_t kvs_slot_generation(kvs_slot slot)
{
    return (uint32_t)(slot.b >> 32);
}

typedef struct kvs_tier_opts {
    size_t size_bytes;
    uint64_t capacity_bytes; /* hard cap on what the tier takes from its medium */
    const char *path;        /* lmdb: folder; created 0700 if missing. dram: NULL */
    uint32_t max_value_bytes;
    uint64_t group_commit_ns;    /* lmdb: gather this long, or ... */
    uint64_t group_commit_bytes; /* ... this much */
    uint64_t reader_ns;          /* lmdb: the longest that a read transaction is held; 0: 100 ms */
    uint64_t cut_bytes;          /* lmdb: of a file that goes, freed at a time; 0: 1 GiB */
    uint64_t row_sums_bytes;     /* lmdb: sums of hot blocks kept in RAM */
    /* lmdb: a program run as `checker --check-env FOLDER` (kvs_tier_check_main) for each
       environment after an unclean stop, before it is mapped. NULL: checked in this process. */
    const char *checker;
    const char *fault; /* fault tier: "inner[:op=rate,...]" */
    uint32_t device;   /* gpu: its number */
} kvs_tier_opts;

/*
 * A value of so many rows is a piece of an opaque value, which no block of tokens can be. Pieces
 * have many lengths, and a PERSISTENT tier few size classes: it rounds up what it takes for one to
 * kvs_piece_pages, of 4 KiB. Those with the shortest rows share one page with all that is kept
 * beside them.
 */
#define KVS_PIECE_ROWS            32u
#define KVS_SMALL_PIECE_ROW_BYTES 112u
static inline uint32_t kvs_piece_pages(uint32_t row_bytes, uint32_t pages)
{
    static const uint32_t sizes[] = {4, 18, 66, 258};
    if (row_bytes <= KVS_SMALL_PIECE_ROW_BYTES)
        return 1;
    for (uint32_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        if (pages <= sizes[i])
            return sizes[i];
    return pages;
}

/* A range of rows of one value: rows first .. first + n - 1 go dense to dst. */
typedef struct kvs_row_range {
    uint32_t first, n;
    void *dst;
} kvs_row_range;

typedef struct kvs_tier_shape {
    uint32_t row_bytes, n_rows;
} kvs_tier_shape;

typedef struct kvs_tier_usage {
    uint64_t capacity_bytes, used_bytes, values;
    uint64_t bytes_read, bytes_written;
    bool failed; /* of its medium, some failed: what belongs there is refused until a restart */
} kvs_tier_usage;

/* Where a value lies, for a process of this host that reads it in place. */
typedef struct kvs_tier_place {
    uint32_t segment; /* as kvs_slot.a */
    uint64_t len_bytes, off_bytes;
    kvc_gpu_handle handle;
} kvs_tier_place;

/* A write in flight; the caller allocates and keeps it until done has run. */
typedef struct kvs_tier_write {
    kvs_value_key key;
    uint32_t row_bytes, n_rows;
    const void *rows;                           /* kept until done: n_rows * row_bytes, dense */
    const uint32_t *row_sums;                   /* [n_rows], kept until done */
    bool durable;                               /* done means synced; else done means readable */
    kvs_slot slot;                              /* result */
    kvc_status status;                          /* result */
    void (*done)(struct kvs_tier_write *write); /* a tier thread, no lock held, exactly once */
    void *arg;
    struct kvs_tier_write *next; /* the tier's */
} kvs_tier_write;

/* One value to read; the ranges are kept until it is done. */
typedef struct kvs_tier_read {
    kvs_value_key key;
    kvs_slot slot;
    uint32_t row_bytes, n_rows, n_ranges;
    const kvs_row_range *ranges;
    void *arg;
    kvc_status status; /* result */
} kvs_tier_read;

/* Where read_each takes its work from and what it tells; both on the caller's thread. */
typedef struct kvs_tier_reads {
    bool (*next)(void *arg, kvs_tier_read *read_p); /* fills it in; false: there is no more */
    void (*done)(void *arg, const kvs_tier_read *read);
    void *arg;
} kvs_tier_reads;

/* Called by recover for each value found, on the caller's thread. Return false to stop. */
typedef bool kvs_tier_found(void *arg, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                            uint32_t n_rows);

typedef struct kvs_tier_ops {
    const char *name; /* "dram", "lmdb", ... */
    uint32_t caps;
    /* REQ. INVALID, EXISTS (another server has the folder), UNSUPPORTED, NO_SPACE, NO_MEMORY, IO.
       May block. */
    kvc_status (*open)(const kvs_tier_opts *opts, kvs_tier **tier_p);
    /* REQ. Finishes writes in flight (their done runs), then closes. May block. */
    void (*close)(kvs_tier *tier);
    /* REQ. Any thread, does not block. */
    void (*usage)(kvs_tier *tier, kvs_tier_usage *usage_p);
    /* REQ. Frees a committed (or reserved) slot; nobody may be reading it. Never fails for the
       caller; a persistent tier forgets the value for good at its next commit. Any thread. */
    void (*release)(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot);

    /* ADDRESSABLE: REQ, else NULL. Room for n values of n_rows * row_bytes each, writable until
       commit: slots [n] and addrs [n]. OK: for the first at least; addrs is NULL from the first on
       that did not fit into the same segment. AGAIN: full; to make room for sure, release values of
       the same tenant and size. NO_MEMORY, INVALID. Owner (the key's tenant; no more of the key
       counts) and size class decide the segment. Does not block. */
    kvc_status (*reserve)(kvs_tier *tier, const kvs_value_key *key, uint32_t row_bytes,
                          uint32_t n_rows, uint32_t n, kvs_slot *slots, void **addrs);
    /* ADDRESSABLE: REQ. Makes slots [n] readable. */
    void (*commit)(kvs_tier *tier, const kvs_slot *slots, uint32_t n);
    /* ADDRESSABLE: REQ. The rows of a slot; valid until release. */
    const void *(*map)(kvs_tier *tier, kvs_slot slot);
    /* ADDRESSABLE: REQ. Slots of equal a lie in one segment, which goes to another tenant or size
       once nothing is in it. used [max]: slots taken of each, by a; gives how many there are. */
    uint32_t (*segments)(kvs_tier *tier, uint32_t *used, uint32_t max);
    /* ADDRESSABLE: REQ. yes: no slot of the segment is handed out until it was empty, or until no.
       For who empties it, so that others do not fill it again meanwhile. Gives how many of its
       slots are taken; 0: it was empty since it had that generation, and nothing was done. */
    uint32_t (*close_segment)(kvs_tier *tier, uint64_t a, uint32_t generation, bool yes);

    /* BLOCKING: REQ, else NULL. Queues a write; does not block. AGAIN: the queue or the cap is
       full and releases help; NO_SPACE: a size class too many, or none of the cap is left for it;
       INVALID: a shape out of range; CLOSED; IO. After OK, done runs once, with AGAIN or NO_SPACE
       again where room was short after all, or IO. A write of a key that was released before
       replaces it: their order holds. */
    kvc_status (*write)(kvs_tier *tier, kvs_tier_write *write);
    /* BLOCKING: REQ. Reads row ranges of one value, verifying every row's sum; CORRUPT if one fails
       (dst undefined), NOT_FOUND if the value is gone, IO. Called on a disk thread; may block. */
    kvc_status (*read)(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                       uint32_t n_rows, const kvs_row_range *ranges, uint32_t n_ranges);
    /* BLOCKING: REQ. Reads every value that reads->next gives, each as read does, and tells
       reads->done of each once, in any order; a few are under way at a time. Disk thread. */
    void (*read_each)(kvs_tier *tier, const kvs_tier_reads *reads);
    /* BLOCKING: REQ. Waits until the values of slots [n] are synced, with all that was written and
       released before; n 0: everything. A slot's status (status [n], NULL if nobody asks) does not
       depend on what became of others where they are synced apart. Answers the first failure: IO.
       Disk thread. */
    kvc_status (*sync)(kvs_tier *tier, const kvs_slot *slots, uint32_t n, int8_t *status);
    /* BLOCKING: REQ. Waits until every release of values of these shapes [n] is synced. IO: one of
       them was not, or could not be taken down at all: such a value may be back after a restart. */
    kvc_status (*sync_releases)(kvs_tier *tier, const kvs_tier_shape *shapes, uint32_t n);

    /* BLOCKING: OPT. After AGAIN from write: values of which shape should be released so that one
       of this shape finds room: those that take *pages_p pages of the medium, *bytes_p of them or
       so. rank 0: who should give first, and so on, should those have nothing that may go. False:
       nobody is left. Without it, or where it says so: values of the same shape. Any thread. */
    bool (*donor)(kvs_tier *tier, const kvs_tier_shape *shape, uint32_t rank, uint32_t *pages_p,
                  uint64_t *bytes_p);

    /* BLOCKING: OPT, both or none. Where a held slot lies, for clients of this host (gpu); its
       segment's place and memory stay as they are while a slot is held there or a client has it.
       INVALID: it is not held; UNSUPPORTED: nobody else can open it. Any thread, does not block. */
    kvc_status (*locate)(kvs_tier *tier, kvs_slot slot, kvs_tier_place *place_p);
    /* One client more (or less) has the segment open: while any has, it goes to no other tenant.
       To be counted in while a slot of it is held. Gives how many have, and how long it is. */
    uint32_t (*count_mapping)(kvs_tier *tier, uint32_t segment, bool more, uint64_t *len_bytes_p);
    /* BLOCKING: OPT (gpu). Where the device has a held slot's rows, until it is released; NULL: it
       is not held, or the device has failed. Nobody holds what is read there against sums. Any
       thread, does not block. */
    const void *(*device_rows)(kvs_tier *tier, kvs_slot slot);

    /* PERSISTENT: REQ. Finds every value; before any other use of an opened tier but meta_each. */
    kvc_status (*recover)(kvs_tier *tier, kvs_tier_found *found, void *arg);
    /* PERSISTENT: REQ. Small named records beside the values (schemas): put (durable; blocks; no
       bytes: the record goes; INVALID for an empty name or one over 500 bytes), get (blocks; gives
       malloc'd data; NOT_FOUND, CORRUPT, IO), and each of those whose names begin with prefix and
       go on, in their order (must not call meta_put), which answers CORRUPT where records were
       lost, after all that are left. */
    kvc_status (*meta_put)(kvs_tier *tier, const char *name, const void *data, size_t len_bytes);
    kvc_status (*meta_get)(kvs_tier *tier, const char *name, void **data_p, size_t *len_bytes_p);
    kvc_status (*meta_each)(kvs_tier *tier, const char *prefix,
                            bool (*each)(void *arg, const char *name, const void *data,
                                         size_t len_bytes),
                            void *arg);
} kvs_tier_ops;

/*
 * The checker's whole work on one environment's folder, for a program's main: reads it through
 * LMDB, which may kill the process. Gives the exit status: 0 only if it is sound; why is logged.
 */
int kvs_tier_check_main(const char *folder);

/*
 * The registered tier by name, or NULL. Slots were checked against caps. Each tier is there once
 * more as "fault:<name>", wrapped by the fault tier (opts.fault says what fails).
 */
const kvs_tier_ops *kvs_tier_find(const char *name);
/* The i-th registered tier, NULL past the end. */
const kvs_tier_ops *kvs_tier_at(uint32_t i);

#endif
