/*
 * lmdb_ring.h: many O_DIRECT reads of one file at once. Private to the lmdb tier.
 *
 * A lane is a buffer and an io_uring; each read call borrows one. Without io_uring (built without
 * liburing, or the kernel or its seccomp rules refuse it) there are no lanes, and cold rows are
 * read through the map after a hint to the kernel.
 */
#ifndef KVSI_LMDB_RING_H
#define KVSI_LMDB_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "kvc/status.h"

#define KVSI_LANE_DEPTH  128u         /* reads at once */
#define KVSI_LANE_BYTES  (512u << 10) /* of the buffer */
#define KVSI_LANES_SPARE 64u          /* lanes in use from which on none is taken to read ahead */
#define KVSI_LANES_READS 128u         /* reads of all lanes from which on none goes ahead */

typedef struct kvsi_lanes kvsi_lanes;

typedef struct kvsi_lane {
    uint8_t *buffer;      /* KVSI_LANE_BYTES, page-aligned */
    bool lost;            /* its ring takes no more, and may hold reads still */
    atomic_uint *n_reads; /* of the lanes that it was taken from */
    struct kvsi_lane *next;
} kvsi_lane;

/* One read: whole pages of the file to buffer + at_bytes. */
typedef struct kvsi_piece {
    uint64_t off_bytes;
    uint32_t len_bytes, at_bytes;
} kvsi_piece;

/* NO_MEMORY. *lanes_p is NULL after OK where io_uring is not to be had. */
kvc_status kvsi_lanes_create(kvsi_lanes **lanes_p) KVC_MUST_CHECK;
void kvsi_lanes_destroy(kvsi_lanes *lanes); /* every lane is back; NULL is fine */

/* Whether the disk has so much to do that reading ahead only makes others wait. */
bool kvsi_lanes_busy(kvsi_lanes *lanes);

/* Any thread; NULL: no memory, no ring, or for a spare one that many are out already. */
kvsi_lane *kvsi_lane_take(kvsi_lanes *lanes, bool spare);
void kvsi_lane_give(kvsi_lanes *lanes, kvsi_lane *lane);

/* Starts to read pieces [n], n <= KVSI_LANE_DEPTH, kept until kvsi_lane_wait, which must follow; if
 * not now, then there, which saves a call of the kernel. */
void kvsi_lane_start(kvsi_lane *lane, int fd, const kvsi_piece *pieces, uint32_t n, bool now);
/*
 * Waits for all that was started. waiting is called every few milliseconds meanwhile. IO;
 * UNSUPPORTED where the file takes no such reads. After an error the buffer's contents mean
 * nothing, and nothing is under way any more.
 */
kvc_status kvsi_lane_wait(kvsi_lane *lane, int fd, const kvsi_piece *pieces, uint32_t n,
                          void (*waiting)(void *arg), void *arg) KVC_MUST_CHECK;

#endif
