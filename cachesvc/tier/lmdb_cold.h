/*
 * lmdb_cold.h: one read call on its way, and how its bytes get from the file to the caller. Private
 * to lmdb_read.c and lmdb_cold.c.
 *
 * The bytes wanted are spans of the record as it lies in the file. What is in RAM is copied from
 * the map; what is not comes through a lane, 128 pieces at once, past the page cache; without lanes
 * the kernel is told what will be needed, then all is copied from the map.
 *
 * The read transaction keeps the record where it is. It is given back when it grows old or when the
 * writer waits for it; the spans that are under way then are read to the end, and the sums say
 * whether the record was still there. The server releases no value that is being read, so it was.
 */
#ifndef KVSI_LMDB_COLD_H
#define KVSI_LMDB_COLD_H

#include "lmdb_tier.h"

#define KVSI_COLD_COPIES 512u

/* Bytes that arrived in the lane's buffer, and where they go. */
typedef struct kvsi_copy {
    uint32_t at_bytes, len_bytes;
    uint8_t *dst;
} kvsi_copy;

typedef struct kvsi_reading {
    /* The request. */
    kvs_tier *tier;
    kvsi_class *class;
    const kvs_value_key *key;
    uint32_t row_bytes, n_rows, n_ranges;
    const kvs_row_range *ranges;
    uint8_t packed[KVSI_KEY_BYTES];
    kvsi_sums_entry *entry; /* held once the sums are known */
    uint8_t *prefix;        /* [prefix_bytes] to be filled too, or NULL */
    uint32_t prefix_bytes;

    /* The transaction. */
    MDB_txn *txn; /* NULL: given back */
    uint64_t until_ns;
    bool early; /* it was given back before all was read */
    MDB_val record;
    const uint8_t *first_page; /* of the record, in the map; valid while txn is open */

    /* What comes next: span 0 is the prefix, the others the ranges. */
    uint32_t span;
    uint64_t span_done;

    /* Through the lane. */
    kvsi_lane *lane;
    uint64_t file_bytes; /* where first_page lies in the file */
    uint32_t n_pieces, n_copies, lane_bytes;
    kvsi_piece pieces[KVSI_LANE_DEPTH];
    kvsi_copy copies[KVSI_COLD_COPIES];
} kvsi_reading;

/* Lets the transaction go, if there is one. */
void kvsi_reading_let_go(kvsi_reading *r);

/*
 * Fills the ranges' dst and the prefix; the transaction is open and the record looked up. OK, IO,
 * AGAIN: the transaction was too old to go on from the map: look the record up again and call this
 * again. May wait for the disk.
 */
kvc_status kvsi_reading_fill(kvsi_reading *r) KVC_MUST_CHECK;

typedef enum kvsi_launched {
    KVSI_LAUNCH_NOT,  /* this value is to be read by itself */
    KVSI_LAUNCH_WARM, /* it was in RAM: all is filled */
    KVSI_LAUNCH_AWAY, /* the rest of it is under way in the reading's lane, and must land */
} kvsi_launched;

/*
 * Reading ahead. launch copies what is in RAM and starts to read the rest; the transaction is open
 * and the record looked up, and may be let go afterwards. land waits and copies: OK, IO,
 * UNSUPPORTED.
 */
kvsi_launched kvsi_reading_launch(kvsi_reading *r) KVC_MUST_CHECK;
kvc_status kvsi_reading_land(kvsi_reading *r, void (*waiting)(void *arg), void *arg) KVC_MUST_CHECK;

/* --- lmdb_read.c, for lmdb_ahead.c --- */

/* Checks the request and fills in r, all but its transaction. INVALID. */
kvc_status kvsi_reading_init(kvsi_reading *r, kvs_tier *tier, const kvs_value_key *key,
                             kvs_slot slot, uint32_t row_bytes, uint32_t n_rows,
                             const kvs_row_range *ranges, uint32_t n_ranges) KVC_MUST_CHECK;
/* Sums from the cache, or room for the prefix; NO_MEMORY. kvsi_reading_finish follows in any case.
 */
kvc_status kvsi_reading_prepare(kvsi_reading *r) KVC_MUST_CHECK;
/* Finds the record in r->txn, which is open. NOT_FOUND, CORRUPT, IO. */
kvc_status kvsi_reading_look_up(kvsi_reading *r) KVC_MUST_CHECK;
/* Whether what was read is right; CORRUPT is logged unless r->early. */
kvc_status kvsi_reading_verify(kvsi_reading *r) KVC_MUST_CHECK;
void kvsi_reading_finish(kvsi_reading *r);
void kvsi_reading_count(const kvsi_reading *r); /* the bytes, once all is well */

#endif
