/*
 * lmdb_ring.h: many O_DIRECT reads of one file at once. Private to the lmdb tier.
 *
 * A lane is a buffer and an io_uring; each read call borrows one. Without io_uring (built without
 * liburing, or the kernel or its seccomp rules refuse it) there are no lanes, and cold rows are
 * read through the map after a hint to the kernel.
 */
#ifndef KVSI_LMDB_RING_H
#define KVSI_LMDB_RING_H

#include <stdbool.h>
#include <stdint.h>

#include "kvc/status.h"

#define KVSI_LANE_DEPTH 128u         /* reads at once */
#define KVSI_LANE_BYTES (512u << 10) /* of the buffer */

typedef struct kvsi_lanes kvsi_lanes;

typedef struct kvsi_lane {
    uint8_t *buffer; /* KVSI_LANE_BYTES, page-aligned */
    bool lost;       /* its ring takes no more, and may hold reads still */
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

/* Any thread; NULL: no memory, or no ring. */
kvsi_lane *kvsi_lane_take(kvsi_lanes *lanes);
void kvsi_lane_give(kvsi_lanes *lanes, kvsi_lane *lane);

/*
 * Reads pieces [n], n <= KVSI_LANE_DEPTH, and waits for all. waiting is called every few
 * milliseconds meanwhile. IO; UNSUPPORTED where the file takes no such reads. After an error the
 * buffer's contents mean nothing, and nothing is under way any more.
 */
kvc_status kvsi_lane_read(kvsi_lane *lane, int fd, const kvsi_piece *pieces, uint32_t n,
                          void (*waiting)(void *arg), void *arg) KVC_MUST_CHECK;

#endif
