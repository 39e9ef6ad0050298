/*
 * lmdb_ring.c: lanes of io_uring, made when they are first needed; see lmdb_ring.h.
 *
 * Threads: a lane belongs to the thread that took it; the list of idle ones has a lock. Invariant:
 * a lane that is given back has nothing in flight; one on which that cannot be had is leaked on
 * purpose, since the kernel may still write to its buffer.
 */
#include "lmdb_ring.h"

#ifdef KVSI_WITH_URING

#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/assert.h"
#include "base/log.h"
#include "base/thread.h"

#define NAP_NS      2000000
#define MAX_REFUSED 500u /* submissions that fail in a row, with a nap after each */

typedef struct ring_lane {
    kvsi_lane lane; /* first */
    struct io_uring ring;
} ring_lane;

struct kvsi_lanes {
    kvc_mutex lock; /* rank QUEUE; guards the rest */
    kvsi_lane *idle;
    uint32_t n_out;
    atomic_uint n_reads; /* under way in all lanes; not guarded */
};

static void destroy_lane(kvsi_lane *lane)
{
    io_uring_queue_exit(&((ring_lane *)lane)->ring);
    free(lane->buffer);
    free(lane);
}

/* A lane, or NULL with the reason. */
static kvsi_lane *make_lane(int *error_p)
{
    ring_lane *made = calloc(1, sizeof(*made));

    *error_p = ENOMEM;
    if (made == NULL)
        return NULL;
    if (posix_memalign((void **)&made->lane.buffer, 4096, KVSI_LANE_BYTES) != 0) {
        free(made);
        return NULL;
    }
    *error_p = -io_uring_queue_init(KVSI_LANE_DEPTH, &made->ring, 0);
    /* Without it (Linux before 5.11) liburing's timeouts come as completions of their own. */
    if (*error_p == 0 && (made->ring.features & IORING_FEAT_EXT_ARG))
        return &made->lane;
    if (*error_p == 0) {
        io_uring_queue_exit(&made->ring);
        *error_p = EOPNOTSUPP;
    }
    free(made->lane.buffer);
    free(made);
    return NULL;
}

kvc_status kvsi_lanes_create(kvsi_lanes **lanes_p)
{
    int error;

    *lanes_p = NULL;
    kvsi_lanes *lanes = calloc(1, sizeof(*lanes));
    if (lanes == NULL)
        return KVC_NO_MEMORY;
    kvc_mutex_init(&lanes->lock, KVC_RANK_QUEUE);
    lanes->idle = make_lane(&error);
    if (lanes->idle == NULL) {
        KVC_LOG_WARN(TIER, "lmdb: no io_uring (error %d): cold rows are read through the map",
                     error);
        kvsi_lanes_destroy(lanes);
        return KVC_OK;
    }
    *lanes_p = lanes;
    return KVC_OK;
}

void kvsi_lanes_destroy(kvsi_lanes *lanes)
{
    if (lanes == NULL)
        return;
    while (lanes->idle != NULL) {
        kvsi_lane *lane = lanes->idle;
        lanes->idle = lane->next;
        destroy_lane(lane);
    }
    kvc_mutex_fini(&lanes->lock);
    free(lanes);
}

static void count_back(kvsi_lanes *lanes)
{
    kvc_mutex_lock(&lanes->lock);
    lanes->n_out--;
    kvc_mutex_unlock(&lanes->lock);
}

kvsi_lane *kvsi_lane_take(kvsi_lanes *lanes, bool spare)
{
    kvsi_lane *lane = NULL;
    int error;

    kvc_mutex_lock(&lanes->lock);
    bool may = !spare || lanes->n_out < KVSI_LANES_SPARE;
    if (may) {
        lanes->n_out++;
        lane = lanes->idle;
    }
    if (lane != NULL)
        lanes->idle = lane->next;
    kvc_mutex_unlock(&lanes->lock);
    if (lane == NULL && may) {
        lane = make_lane(&error);
        if (lane == NULL)
            count_back(lanes);
    }
    if (lane != NULL)
        lane->n_reads = &lanes->n_reads;
    return lane;
}

void kvsi_lane_give(kvsi_lanes *lanes, kvsi_lane *lane)
{
    if (lane == NULL)
        return;
    if (lane->lost) {
        count_back(lanes);
        return;
    }
    kvc_mutex_lock(&lanes->lock);
    lanes->n_out--;
    lane->next = lanes->idle;
    lanes->idle = lane;
    kvc_mutex_unlock(&lanes->lock);
}

bool kvsi_lanes_busy(kvsi_lanes *lanes)
{
    return atomic_load_explicit(&lanes->n_reads, memory_order_relaxed) >= KVSI_LANES_READS;
}

/* What one completion says; the rest of a short read is fetched here. */
static kvc_status settle(const kvsi_lane *lane, int fd, const kvsi_piece *piece, int32_t result)
{
    uint32_t done = result > 0 ? (uint32_t)result : 0;

    if (result == -EINVAL || result == -EOPNOTSUPP)
        return KVC_UNSUPPORTED;
    if (result < 0 && result != -EINTR && result != -EAGAIN)
        return KVC_IO;
    while (done < piece->len_bytes) {
        ssize_t n = pread(fd, lane->buffer + piece->at_bytes + done, piece->len_bytes - done,
                          (off_t)(piece->off_bytes + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return KVC_IO; /* an error, or the file was cut */
        done += (uint32_t)n;
    }
    return KVC_OK;
}

/* Takes what is complete. */
static uint32_t reap(ring_lane *own, int fd, const kvsi_piece *pieces, uint32_t n_pieces,
                     kvc_status *status_p)
{
    struct io_uring_cqe *cqe;
    unsigned head;
    uint32_t n = 0;

    io_uring_for_each_cqe(&own->ring, head, cqe)
    {
        uint64_t i = io_uring_cqe_get_data64(cqe);
        KVC_ASSERT(i < n_pieces);
        kvc_status status = settle(&own->lane, fd, &pieces[i], cqe->res);
        if (status != KVC_OK)
            *status_p = status;
        n++;
    }
    io_uring_cq_advance(&own->ring, n);
    return n;
}

void kvsi_lane_start(kvsi_lane *lane, int fd, const kvsi_piece *pieces, uint32_t n, bool now)
{
    ring_lane *own = (ring_lane *)lane;

    atomic_fetch_add(lane->n_reads, n);
    for (uint32_t i = 0; i < n; i++) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&own->ring);
        io_uring_prep_read(sqe, fd, lane->buffer + pieces[i].at_bytes, pieces[i].len_bytes,
                           pieces[i].off_bytes);
        io_uring_sqe_set_data64(sqe, i);
    }
    if (now)
        (void)io_uring_submit(&own->ring); /* what is refused is tried again while waiting */
}

kvc_status kvsi_lane_wait(kvsi_lane *lane, int fd, const kvsi_piece *pieces, uint32_t n,
                          void (*waiting)(void *arg), void *arg)
{
    ring_lane *own = (ring_lane *)lane;
    kvc_status status = KVC_OK;
    uint32_t done = 0;

    for (uint32_t refused = 0; done < n;) {
        struct __kernel_timespec nap = {.tv_nsec = NAP_NS};
        struct io_uring_cqe *first;
        int rc = io_uring_submit_and_wait_timeout(&own->ring, &first, n - done, &nap, NULL);
        if (rc < 0 && rc != -ETIME && rc != -EINTR) {
            if (++refused == MAX_REFUSED) {
                KVC_LOG_ERROR(TIER, "lmdb: io_uring gives error %d; reading without it", -rc);
                lane->lost = true;
                atomic_fetch_sub(lane->n_reads, n - done);
                return KVC_UNSUPPORTED;
            }
            usleep(NAP_NS / 1000);
        }
        uint32_t reaped = reap(own, fd, pieces, n, &status);
        atomic_fetch_sub(lane->n_reads, reaped);
        done += reaped;
        if (done < n)
            waiting(arg);
    }
    return status;
}

#else

#include <stddef.h>

kvc_status kvsi_lanes_create(kvsi_lanes **lanes_p)
{
    *lanes_p = NULL;
    return KVC_OK;
}

void kvsi_lanes_destroy(kvsi_lanes *lanes)
{
    (void)lanes;
}

bool kvsi_lanes_busy(kvsi_lanes *lanes)
{
    (void)lanes;
    return true;
}

kvsi_lane *kvsi_lane_take(kvsi_lanes *lanes, bool spare)
{
    (void)lanes;
    (void)spare;
    return NULL;
}

void kvsi_lane_give(kvsi_lanes *lanes, kvsi_lane *lane)
{
    (void)lanes;
    (void)lane;
}

void kvsi_lane_start(kvsi_lane *lane, int fd, const kvsi_piece *pieces, uint32_t n, bool now)
{
    (void)lane;
    (void)fd;
    (void)pieces;
    (void)n;
    (void)now;
}

kvc_status kvsi_lane_wait(kvsi_lane *lane, int fd, const kvsi_piece *pieces, uint32_t n,
                          void (*waiting)(void *arg), void *arg)
{
    (void)lane;
    (void)fd;
    (void)pieces;
    (void)n;
    (void)waiting;
    (void)arg;
    return KVC_UNSUPPORTED;
}

#endif
