/*
 * lmdb_cold.c: copies the spans of one read, cold and warm; see lmdb_cold.h.
 *
 * Thread: the reader's. Invariants: the map is touched under a guard and with the transaction open
 * only; a lane is waited for with no guard, so nothing jumps over reads that are under way.
 */
#include "lmdb_cold.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"

#define SAMPLES      3u /* pages looked at to tell whether a value is cold */
#define PIECE_BYTES  (64u << 10)
#define STEP_CHUNKS  16u  /* copied from the map between looks at the clock, or PIECE_BYTES */
#define PROBE_BYTES  144u /* enough to tell one record's first page from another's */
#define FILL_DONE    0
#define FILL_LANE    1 /* the lane is to be read first */
#define FILL_TOO_OLD 2
#define PAGE_DOWN(x) ((x) & ~(uint64_t)(KVSI_PAGE_BYTES - 1))
#define PAGE_UP(x)   PAGE_DOWN((x) + KVSI_PAGE_BYTES - 1)
#define PIECE_PAGES  (PIECE_BYTES / KVSI_PAGE_BYTES + 1)

/* Bytes from .. to of the record, counted from its first page, go to dst. */
typedef struct span {
    uint64_t from, to;
    uint8_t *dst;
} span;

static span get_span(const kvsi_reading *r, uint32_t i)
{
    if (i == 0)
        return (span){KVSI_RECORD_OFF, KVSI_RECORD_OFF + (uint64_t)r->prefix_bytes, r->prefix};
    const kvs_row_range *range = &r->ranges[i - 1];
    uint64_t from = KVSI_RECORD_OFF + r->prefix_bytes + (uint64_t)range->first * r->row_bytes;
    return (span){from, from + (uint64_t)range->n * r->row_bytes, range->dst};
}

static uint32_t first_span(const kvsi_reading *r)
{
    return r->prefix != NULL ? 0 : 1;
}

void kvsi_reading_let_go(kvsi_reading *r)
{
    if (r->txn != NULL)
        kvsi_env_read_end(&r->class->env, r->txn);
    r->txn = NULL;
    r->first_page = NULL;
}

/* --- what is in RAM --- */

/* Whether all of n pages are; p is within the first of them. */
static bool in_ram(const uint8_t *p, uint32_t n)
{
    unsigned char state[PIECE_PAGES];
    uint8_t *page = (uint8_t *)(uintptr_t)PAGE_DOWN((uintptr_t)p);

    if (mincore(page, (size_t)n * KVSI_PAGE_BYTES, state) != 0)
        return true;
    for (uint32_t i = 0; i < n; i++) {
        if (!(state[i] & 1))
            return false;
    }
    return true;
}

/* A look at a few of the pages that are wanted. */
static bool looks_cold(const kvsi_reading *r)
{
    uint32_t n = r->n_ranges < SAMPLES ? r->n_ranges : SAMPLES;

    if (r->prefix != NULL && !in_ram(r->first_page, 1))
        return true;
    for (uint32_t i = 0; i < n; i++) {
        span s = get_span(r, 1 + (uint32_t)((uint64_t)(r->n_ranges - 1) * i / (n > 1 ? n - 1 : 1)));
        if (s.from < s.to && !in_ram(r->first_page + s.from + (s.to - 1 - s.from) * i / SAMPLES, 1))
            return true;
    }
    return false;
}

/* Starts reading every page that the spans touch; neighbours in one call. */
static void ask_for_all(const kvsi_reading *r)
{
    uint64_t from = 0, to = 0;

    for (uint32_t i = first_span(r); i <= r->n_ranges; i++) {
        span s = get_span(r, i);
        uint64_t start = PAGE_DOWN(s.from), end = PAGE_UP(s.to);
        if (to > from && start >= from && start <= to) {
            to = end > to ? end : to;
            continue;
        }
        if (to > from)
            (void)madvise((void *)(uintptr_t)(r->first_page + from), to - from, MADV_WILLNEED);
        from = start;
        to = end;
    }
    if (to > from)
        (void)madvise((void *)(uintptr_t)(r->first_page + from), to - from, MADV_WILLNEED);
}

/* --- all from the map --- */

/* Whether the transaction is too old, or the writer waits for it. */
static bool should_let_go(const kvsi_reading *r)
{
    return atomic_load(&r->class->env.gate) || kvc_now_ns() > r->until_ns;
}

/*
 * Under a guard. Goes on where it stopped. Once a step of it is copied, it stops when the
 * transaction should be let go: so every transaction brings it further.
 */
static int copy_from_map(void *arg)
{
    kvsi_reading *r = arg;
    uint64_t step_bytes = 0;
    uint32_t step_chunks = 0;

    for (; r->span <= r->n_ranges; r->span++, r->span_done = 0) {
        span s = get_span(r, r->span);
        while (s.from + r->span_done < s.to) {
            if (step_bytes >= PIECE_BYTES || step_chunks == STEP_CHUNKS) {
                if (should_let_go(r))
                    return FILL_TOO_OLD;
                step_bytes = step_chunks = 0;
            }
            uint64_t len = s.to - s.from - r->span_done;
            if (len > PIECE_BYTES)
                len = PIECE_BYTES;
            memcpy(s.dst + r->span_done, r->first_page + s.from + r->span_done, len);
            r->span_done += len;
            step_bytes += len;
            step_chunks++;
        }
    }
    return FILL_DONE;
}

static kvc_status fill_from_map(kvsi_reading *r, bool cold)
{
    if (cold)
        ask_for_all(r);
    int rc = kvsi_env_look(&r->class->env, copy_from_map, r);
    if (rc == FILL_TOO_OLD)
        return KVC_AGAIN;
    return rc == FILL_DONE ? KVC_OK : KVC_IO;
}

/* --- through the lane --- */

/* Room for the chunk in the lane; false: it is full. Chunks that share pages share a piece. */
static bool add_to_lane(kvsi_reading *r, uint64_t from, uint32_t len, uint8_t *dst)
{
    uint64_t start = r->file_bytes + PAGE_DOWN(from);
    uint64_t end = r->file_bytes + PAGE_UP(from + len);
    kvsi_piece *last = r->n_pieces > 0 ? &r->pieces[r->n_pieces - 1] : NULL;

    if (r->n_copies == KVSI_COLD_COPIES)
        return false;
    if (last != NULL && start >= last->off_bytes && start <= last->off_bytes + last->len_bytes &&
        end - last->off_bytes <= PIECE_BYTES &&
        last->at_bytes + (end - last->off_bytes) <= KVSI_LANE_BYTES) {
        if (end > last->off_bytes + last->len_bytes)
            last->len_bytes = (uint32_t)(end - last->off_bytes);
    } else {
        if (r->n_pieces == KVSI_LANE_DEPTH || r->lane_bytes + (end - start) > KVSI_LANE_BYTES)
            return false;
        last = &r->pieces[r->n_pieces++];
        *last = (kvsi_piece){start, (uint32_t)(end - start), r->lane_bytes};
    }
    r->lane_bytes = last->at_bytes + last->len_bytes;
    r->copies[r->n_copies++] =
        (kvsi_copy){last->at_bytes + (uint32_t)(r->file_bytes + from - last->off_bytes), len, dst};
    return true;
}

/* Under a guard. Takes chunks until the lane is full; those in RAM are copied at once. */
static int fill_lane(void *arg)
{
    kvsi_reading *r = arg;

    for (; r->span <= r->n_ranges; r->span++, r->span_done = 0) {
        span s = get_span(r, r->span);
        while (s.from + r->span_done < s.to) {
            uint64_t from = s.from + r->span_done, cut = PAGE_DOWN(from) + PIECE_BYTES;
            uint32_t len = (uint32_t)((cut < s.to ? cut : s.to) - from);
            uint32_t n_pages =
                (uint32_t)((PAGE_UP(from + len) - PAGE_DOWN(from)) / KVSI_PAGE_BYTES);
            if (r->first_page != NULL && in_ram(r->first_page + from, n_pages))
                memcpy(s.dst + r->span_done, r->first_page + from, len);
            else if (!add_to_lane(r, from, len, s.dst + r->span_done))
                return FILL_LANE;
            r->span_done += len;
        }
    }
    return FILL_DONE;
}

/* While the disk works: an old transaction is let go, and one that the writer waits for. */
static void while_waiting(void *arg)
{
    kvsi_reading *r = arg;

    if (r->txn == NULL || !should_let_go(r))
        return;
    kvsi_reading_let_go(r);
    r->early = true;
}

static void start_lane(kvsi_reading *r, bool now)
{
    if (r->n_pieces > 0)
        kvsi_lane_start(r->lane, r->class->env.direct_fd, r->pieces, r->n_pieces, now);
}

/* Waits for what was started, and copies it to where it goes. */
static kvc_status empty_lane(kvsi_reading *r, void (*waiting)(void *arg), void *arg)
{
    kvc_status status = KVC_OK;

    if (r->n_pieces > 0)
        status =
            kvsi_lane_wait(r->lane, r->class->env.direct_fd, r->pieces, r->n_pieces, waiting, arg);
    KVC_COUNT_N(lmdb_direct_bytes, r->lane_bytes);
    for (uint32_t i = 0; i < r->n_copies && status == KVC_OK; i++)
        memcpy(r->copies[i].dst, r->lane->buffer + r->copies[i].at_bytes, r->copies[i].len_bytes);
    r->n_pieces = r->n_copies = r->lane_bytes = 0;
    return status;
}

/* Under a guard: where the map begins, by what the record's own first page says of itself. */
static int find_base(void *arg)
{
    kvsi_reading *r = arg;
    uint8_t on_disk[PROBE_BYTES], mapped[PROBE_BYTES];
    uint64_t number;
    mdb_filehandle_t fd;

    memcpy(mapped, r->first_page, PROBE_BYTES);
    memcpy(&number, mapped, sizeof(number));
    if (mdb_env_get_fd(r->class->env.env, &fd) != MDB_SUCCESS ||
        number > INT64_MAX / KVSI_PAGE_BYTES)
        return EINVAL;
    if (pread(fd, on_disk, PROBE_BYTES, (off_t)(number * KVSI_PAGE_BYTES)) != PROBE_BYTES ||
        memcmp(on_disk, mapped, PROBE_BYTES) != 0)
        return EINVAL; /* this page is damaged: another value may know better */
    atomic_store(&r->class->env.map_base,
                 (uintptr_t)r->first_page - (uintptr_t)(number * KVSI_PAGE_BYTES));
    return MDB_SUCCESS;
}

/* Where in the file the record lies; false: not known, so it is to be read through the map. */
static bool find_in_file(kvsi_reading *r)
{
    kvsi_env *env = &r->class->env;

    if (env->direct_fd < 0 || atomic_load(&env->no_direct))
        return false;
    if (atomic_load(&env->map_base) == 0 && kvsi_env_look(env, find_base, r) != MDB_SUCCESS)
        return false;
    r->file_bytes = (uintptr_t)r->first_page - atomic_load(&env->map_base);
    return true;
}

static kvc_status fill_through_lane(kvsi_reading *r)
{
    kvc_status status;
    int rc;

    do {
        rc = kvsi_env_look(&r->class->env, fill_lane, r);
        status = KVC_IO;
        if (rc == FILL_DONE || rc == FILL_LANE) {
            start_lane(r, false);
            status = empty_lane(r, while_waiting, r);
        }
    } while (status == KVC_OK && rc == FILL_LANE);
    if (status == KVC_IO)
        KVC_LOG_ERROR(TIER, "lmdb: %s/%s: the disk gives an error for cold rows",
                      r->class->env.root, r->class->env.name);
    return status;
}

kvc_status kvsi_reading_fill(kvsi_reading *r)
{
    bool again = r->span > first_span(r) || r->span_done > 0;
    bool cold = !again && looks_cold(r);
    kvc_status status = KVC_UNSUPPORTED;

    if (!again)
        r->span = first_span(r);
    if (cold && r->tier->lanes != NULL && find_in_file(r))
        r->lane = kvsi_lane_take(r->tier->lanes, false);
    if (r->lane != NULL) {
        status = fill_through_lane(r);
        kvsi_lane_give(r->tier->lanes, r->lane);
        r->lane = NULL;
        if (status != KVC_UNSUPPORTED)
            return status;
        atomic_store(&r->class->env.no_direct, true);
        r->span = first_span(r); /* from the start, through the map */
        r->span_done = 0;
        if (r->txn == NULL)
            return KVC_AGAIN;
    }
    return fill_from_map(r, cold);
}

kvsi_launched kvsi_reading_launch(kvsi_reading *r)
{
    r->span = first_span(r);
    if (!looks_cold(r))
        return fill_from_map(r, false) == KVC_OK ? KVSI_LAUNCH_WARM : KVSI_LAUNCH_NOT;
    if (r->tier->lanes == NULL || !find_in_file(r))
        return KVSI_LAUNCH_NOT;
    r->lane = kvsi_lane_take(r->tier->lanes, true);
    if (r->lane == NULL)
        return KVSI_LAUNCH_NOT;
    if (kvsi_env_look(&r->class->env, fill_lane, r) == FILL_DONE) {
        start_lane(r, true);
        return KVSI_LAUNCH_AWAY;
    }
    kvsi_lane_give(r->tier->lanes, r->lane);
    r->lane = NULL;
    return KVSI_LAUNCH_NOT;
}

kvc_status kvsi_reading_land(kvsi_reading *r, void (*waiting)(void *arg), void *arg)
{
    kvc_status status = empty_lane(r, waiting, arg);
    kvsi_lane_give(r->tier->lanes, r->lane);
    r->lane = NULL;
    return status;
}
