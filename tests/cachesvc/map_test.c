/*
 * map_test.c: MapContext at the server: what is passed and sealed, what a pin keeps, the caps, who
 * may map, and every way in which a map ends.
 *
 * The test is client and server in one process; what was mapped is read through the passed
 * descriptors, never through the server's own mapping.
 */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/metrics.h"

#define ROW_BYTES   512u
#define VALUE_BYTES (ROW_BYTES * H_TOKENS) /* 32 KiB */
#define SEGMENTS    512u
#define PART_IDS    ((const uint32_t[]){0, 10})

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* What one connection has mapped. */
typedef struct view {
    h_peer *peer;
    const uint8_t *segments[SEGMENTS]; /* by id */
    uint64_t len_bytes[SEGMENTS];
    int fds[SEGMENTS];
    const _Atomic uint64_t *lease;
    uint64_t lease_bytes, map;
    uint32_t slot;
} view;

typedef struct rig {
    h_server h;
    char dir[256];
    h_schema schema;
    view v;
} rig;

static int setup(void **state)
{
    rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    h_server_init(&r->h);
    h_temp_dir(r->dir);
    snprintf(r->h.listen, sizeof(r->h.listen), "shm://%s/socket", r->dir);
    r->h.settings.dram_bytes = 8u << 20; /* 16 segments of 16 values */
    h_schema_init(&r->schema, "map", 2, ROW_BYTES, false);
    *state = r;
    return 0;
}

static void start(rig *r)
{
    h_server_start(&r->h);
    r->v.peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_register(r->v.peer, &r->schema), KVC_OK);
}

static void close_fds(view *v)
{
    for (uint32_t i = 0; i < SEGMENTS; i++) {
        if (v->segments[i] != NULL && v->fds[i] >= 0)
            close(v->fds[i]);
        v->fds[i] = -1;
    }
}

static void forget(view *v)
{
    close_fds(v);
    for (uint32_t i = 0; i < SEGMENTS; i++) {
        if (v->segments[i] != NULL)
            assert_int_equal(munmap((void *)(uintptr_t)v->segments[i], v->len_bytes[i]), 0);
    }
    if (v->lease != NULL)
        assert_int_equal(munmap((void *)(uintptr_t)v->lease, v->lease_bytes), 0);
    *v = (view){.peer = v->peer};
}

static int teardown(void **state)
{
    rig *r = *state;
    forget(&r->v);
    h_disconnect(r->v.peer);
    h_server_fini(&r->h);
    h_remove_dir(r->dir);
    free(r);
    return 0;
}

static void put_blocks(rig *r, uint64_t first, uint32_t n)
{
    for (uint32_t b = 0; b < n; b++) {
        assert_int_equal(h_put(r->v.peer, &r->schema, first + b, PART_IDS, 2, KVC_PROMISE_MEMORY),
                         KVC_OK);
        assert_int_equal(r->v.peer->status[0], KVC_OK);
        assert_int_equal(r->v.peer->status[1], KVC_OK);
    }
}

static const void *map_fd(int fd, uint64_t len_bytes)
{
    void *base = mmap(NULL, len_bytes, PROT_READ, MAP_SHARED, fd, 0);
    assert_true(base != MAP_FAILED);
    return base;
}

/* Asks and maps what comes. The table is in peer->data. */
static kvc_status call_map(view *v, uint64_t context, uint64_t map, uint32_t first, uint32_t n)
{
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    req.u.map_context.context = context;
    req.u.map_context.map = map;
    req.u.map_context.parts = PART_IDS;
    req.u.map_context.n_parts = 2;
    req.u.map_context.first_block = first;
    req.u.map_context.n_blocks = n;
    kvc_status status = h_call(v->peer, &req);
    if (status != KVC_OK)
        return status;
    const kvc_reply *reply = &v->peer->xfer.reply;
    uint32_t at = 0;
    v->map = reply->u.map_context.map;
    v->slot = reply->u.map_context.lease_slot;
    if (reply->u.map_context.lease_bytes > 0) {
        v->lease_bytes = reply->u.map_context.lease_bytes;
        v->lease = map_fd(v->peer->fds[0], v->lease_bytes);
        assert_int_equal(fcntl(v->peer->fds[0], F_GET_SEALS),
                         F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
        close(v->peer->fds[0]);
        at = 1;
    }
    assert_int_equal(v->peer->n_fds, at + reply->u.map_context.n_segments);
    for (uint32_t i = 0; at < v->peer->n_fds; i++, at++) {
        uint32_t id = v->peer->segments[i].id;
        assert_true(id > 0 && id < SEGMENTS && v->segments[id] == NULL);
        v->fds[id] = v->peer->fds[at];
        v->len_bytes[id] = v->peer->segments[i].len_bytes;
        v->segments[id] = map_fd(v->fds[id], v->len_bytes[id]);
    }
    assert_int_equal(v->peer->data_bytes, 8 * 2 * reply->u.map_context.n_blocks);
    return KVC_OK;
}

/* Where the table of the last reply says that a value lies; NULL: by request. */
static const uint8_t *entry(const view *v, uint32_t block, uint32_t part)
{
    uint32_t words[2];
    memcpy(words, v->peer->data + 8 * (2 * block + part), sizeof(words));
    if (words[0] == 0)
        return NULL;
    assert_true(words[0] < SEGMENTS && v->segments[words[0]] != NULL);
    assert_true((uint64_t)words[1] * 4096 + VALUE_BYTES <= v->len_bytes[words[0]]);
    return v->segments[words[0]] + (uint64_t)words[1] * 4096;
}

static bool is_good(const view *v)
{
    return atomic_load(&v->lease[v->slot]) == v->map;
}

static void assert_value(const uint8_t *value, uint64_t block, uint32_t part)
{
    assert_non_null(value);
    for (uint32_t row = 0; row < H_TOKENS; row++)
        assert_true(h_row_is(block, part * 10, row, ROW_BYTES, value + row * ROW_BYTES));
}

static void release(view *v)
{
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    req.u.map_context.map = v->map;
    req.u.map_context.release = true;
    assert_int_equal(h_call(v->peer, &req), KVC_OK);
}

/* Waits for what happens off the test's thread. */
static void wait_gauge(kvc_metric metric, uint64_t want)
{
    for (int i = 0; i < 20000 && kvc_metric_get(metric) != want; i++)
        usleep(1000);
    assert_int_equal(kvc_metric_get(metric), want);
}

/* ---- cases ------------------------------------------------------------------------------------
 */

static void rows_are_read_without_a_request(void **state)
{
    rig *r = *state;
    uint64_t context;
    start(r);
    put_blocks(r, 100, 12);
    assert_int_equal(h_open(r->v.peer, &r->schema, 100, 12, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 8), KVC_OK);
    assert_int_equal(r->v.peer->xfer.reply.u.map_context.n_blocks, 8);
    assert_int_equal(r->v.peer->xfer.reply.u.map_context.unpinned, 0);
    assert_true(is_good(&r->v));
    for (uint32_t b = 0; b < 8; b++)
        for (uint32_t p = 0; p < 2; p++)
            assert_value(entry(&r->v, b, p), 100 + b, p);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 16);
    assert_int_equal(kvc_metric_get(KVC_M_map_pinned_bytes), 16 * VALUE_BYTES);
    /* It grows; nothing is passed twice. */
    uint64_t map = r->v.map, segments = kvc_metric_get(KVC_M_mapped_segments);
    assert_int_equal(call_map(&r->v, context, map, 8, 0), KVC_OK);
    assert_true(r->v.map == map);
    assert_int_equal(r->v.peer->xfer.reply.u.map_context.n_blocks, 4);
    for (uint32_t b = 0; b < 4; b++)
        assert_value(entry(&r->v, b, 1), 108 + b, 1);
    assert_true(kvc_metric_get(KVC_M_mapped_segments) >= segments);
    assert_true(kvc_metric_get(KVC_M_mapped_segments) <= segments + 1);
    assert_int_equal(kvc_metric_get(KVC_M_maps), 1);
    release(&r->v);
    assert_false(is_good(&r->v));
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
    assert_int_equal(kvc_metric_get(KVC_M_map_pinned_bytes), 0);
}

/* One block whose parts lie in a segment each: more than the descriptors of a reply. */
static void segments_come_reply_by_reply(void **state)
{
    enum { PARTS = 130 };
    static kvc_part parts[PARTS];
    static uint8_t bytes[H_TOKENS * 64 * PARTS];
    uint32_t ids[PARTS];
    rig *r = *state;
    kvc_put_value value = {.digest = h_digest(1)};
    uint64_t context, map = 0;
    r->h.settings.dram_bytes = 10ull << 30;
    for (uint32_t i = 0; i < PARTS; i++) {
        uint32_t row_bytes = 64 * (i + 1);
        ids[i] = i;
        parts[i] = r->schema.parts[0];
        parts[i].part = parts[i].layer = i;
        parts[i].row_bytes = row_bytes;
        parts[i].k_len_bytes = parts[i].v_off_bytes = parts[i].v_len_bytes = row_bytes / 2;
        parts[i].q_dim = parts[i].v_dim = row_bytes / 4;
    }
    r->schema.schema.parts = parts;
    r->schema.schema.n_parts = PARTS;
    assert_int_equal(kvc_schema_digest(&r->schema.schema, &r->schema.digest), KVC_OK);
    start(r);
    for (uint32_t i = 0; i < PARTS; i++) {
        struct iovec data = {bytes, (size_t)H_TOKENS * parts[i].row_bytes};
        kvc_request req = {
            .method = KVC_PUT_BLOCKS, .data = &data, .n_data = 1, .data_bytes = data.iov_len};
        value.part = i;
        value.len_bytes = (uint32_t)data.iov_len;
        req.u.put_blocks.schema = r->schema.digest;
        req.u.put_blocks.promise = KVC_PROMISE_MEMORY;
        req.u.put_blocks.values = &value;
        req.u.put_blocks.n_values = 1;
        assert_int_equal(h_call(r->v.peer, &req), KVC_OK);
    }
    assert_int_equal(h_open(r->v.peer, &r->schema, 1, 1, 0, &context), KVC_OK);
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    const kvc_reply *reply = &r->v.peer->xfer.reply;
    uint32_t n_calls = 0, n_segments = 0;
    req.u.map_context.context = context;
    req.u.map_context.parts = ids;
    req.u.map_context.n_parts = PARTS;
    do {
        req.u.map_context.map = map;
        assert_int_equal(h_call(r->v.peer, &req), KVC_OK);
        map = reply->u.map_context.map;
        n_segments += reply->u.map_context.n_segments;
        assert_int_equal(r->v.peer->n_fds, reply->u.map_context.n_segments + (n_calls == 0));
        assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), n_segments);
        for (uint32_t i = 0; i < r->v.peer->n_fds; i++)
            assert_int_equal(close(r->v.peer->fds[i]), 0);
    } while (++n_calls < 5 && reply->u.map_context.n_blocks == 0);
    assert_int_equal(reply->u.map_context.n_blocks, 1);
    assert_true(n_calls > 2 && n_segments > 2 * KVC_MAX_MAP_SEGMENTS - 1);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), PARTS);
}

static void clients_cannot_write_or_resize(void **state)
{
    rig *r = *state;
    uint64_t context;
    start(r);
    put_blocks(r, 1, 2);
    assert_int_equal(h_open(r->v.peer, &r->schema, 1, 2, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 0), KVC_OK);
    int fd = r->v.fds[1];
    assert_true(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
    assert_int_equal(mprotect((void *)(uintptr_t)r->v.segments[1], 4096, PROT_READ | PROT_WRITE),
                     -1);
    assert_int_equal(write(fd, "x", 1), -1);
    assert_int_equal(pwrite(fd, "x", 1, 4096), -1);
    assert_int_equal(ftruncate(fd, 4096), -1);
    assert_int_equal(ftruncate(fd, 1 << 30), -1);
    assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
    assert_int_equal(
        mprotect((void *)(uintptr_t)r->v.lease, r->v.lease_bytes, PROT_READ | PROT_WRITE), -1);
    const uint8_t *first = entry(&r->v, 0, 0);
    put_blocks(r, 3, 1); /* the server itself still writes */
    assert_value(first, 1, 0);
}

/* Ten times as much as fits goes through the store: what is mapped stays where it is. */
static void a_pinned_value_is_not_used_again(void **state)
{
    rig *r = *state;
    uint64_t context;
    const uint8_t *at[16];
    uint32_t hits;
    start(r);
    put_blocks(r, 500, 8);
    assert_int_equal(h_open(r->v.peer, &r->schema, 500, 8, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 0), KVC_OK);
    for (uint32_t i = 0; i < 16; i++)
        at[i] = entry(&r->v, i / 2, i % 2);
    uint64_t evicted = kvc_metric_get(KVC_M_evicted_values);
    put_blocks(r, 1000, 1200);
    assert_true(kvc_metric_get(KVC_M_evicted_values) > evicted + 1500);
    assert_true(is_good(&r->v));
    for (uint32_t i = 0; i < 16; i++)
        assert_value(at[i], 500 + i / 2, i % 2);
    assert_int_equal(h_match(r->v.peer, &r->schema, 500, 8, PART_IDS, 2, &hits), KVC_OK);
    assert_int_equal(hits, 8);
    close_fds(&r->v); /* or the server's segments would be counted twice */
    h_check_caps(&r->h);
    /* Without the pins they give way like all others, to values that are read as they were. */
    release(&r->v);
    for (uint64_t b = 5000; b < 5600; b++) {
        uint32_t picks[1] = {0};
        put_blocks(r, b, 1);
        assert_int_equal(h_open(r->v.peer, &r->schema, b, 1, 0, &context), KVC_OK);
        for (uint32_t k = 0; k < 4; k++)
            assert_int_equal(h_fetch(r->v.peer, context, PART_IDS[k % 2], picks, 1), KVC_OK);
        assert_int_equal(h_close(r->v.peer, context), KVC_OK);
    }
    assert_int_equal(h_match(r->v.peer, &r->schema, 500, 8, PART_IDS, 2, &hits), KVC_OK);
    assert_int_equal(hits, 0);
}

static void caps_leave_the_rest_to_requests(void **state)
{
    rig *r = *state;
    uint64_t context, other;
    uint32_t n_mapped = 0, picks[1] = {31 * H_TOKENS};
    r->h.settings.max_map_pin_bytes = 10 * VALUE_BYTES;
    start(r);
    put_blocks(r, 100, 32);
    assert_int_equal(h_open(r->v.peer, &r->schema, 100, 32, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 0), KVC_OK);
    const kvc_reply *reply = &r->v.peer->xfer.reply;
    assert_int_equal(reply->u.map_context.n_blocks, 32);
    assert_int_equal(reply->u.map_context.unpinned, 54);
    assert_int_equal(reply->u.map_context.pinned_bytes, 10 * VALUE_BYTES);
    assert_int_equal(reply->u.map_context.max_bytes, 10 * VALUE_BYTES);
    for (uint32_t i = 0; i < 64; i++)
        n_mapped += entry(&r->v, i / 2, i % 2) != NULL;
    assert_int_equal(n_mapped, 10);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 10);
    h_fetch_equal(r->v.peer, &r->schema, context, 100, 0, picks, 1);
    /* Another connection of the tenant has nothing left, until the first has gone. */
    view *v = calloc(1, sizeof(*v));
    v->peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_open(v->peer, &r->schema, 100, 4, 0, &other), KVC_OK);
    assert_int_equal(call_map(v, other, 0, 0, 0), KVC_OK);
    assert_int_equal(v->peer->xfer.reply.u.map_context.unpinned, 8);
    assert_null(entry(v, 0, 0));
    h_disconnect(r->v.peer);
    forget(&r->v);
    wait_gauge(KVC_M_map_pins, 0);
    assert_int_equal(call_map(v, other, v->map, 0, 0), KVC_OK);
    assert_value(entry(v, 0, 0), 100, 0);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 8);
    r->v = *v;
    free(v);
}

/* The words of a map: cleared by its erase, before anything else can lie there. */
static void erase_takes_a_map_back(void **state)
{
    rig *r = *state;
    uint64_t contexts[2];
    view *v = &r->v;
    start(r);
    put_blocks(r, 100, 4);
    uint64_t revoked = kvc_metric_get(KVC_M_maps_revoked);
    for (int i = 0; i < 2; i++)
        assert_int_equal(h_open(v->peer, &r->schema, 100 + 2 * (uint64_t)i, 2, 0, &contexts[i]),
                         KVC_OK);
    assert_int_equal(call_map(v, contexts[0], 0, 0, 0), KVC_OK);
    uint64_t map = v->map;
    uint32_t slot = v->slot;
    assert_int_equal(call_map(v, contexts[1], 0, 0, 0), KVC_OK);
    kvc_digest digest = h_digest(101);
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.schema = r->schema.digest;
    req.u.erase.digests = &digest;
    req.u.erase.n_digests = 1;
    assert_int_equal(h_call(v->peer, &req), KVC_OK);
    assert_int_equal(v->peer->xfer.reply.u.erase.values, 2);
    assert_true(atomic_load(&v->lease[slot]) == 0);
    assert_true(is_good(v)); /* the other map has none of it */
    assert_int_equal(kvc_metric_get(KVC_M_maps_revoked), revoked + 1);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 4);
    assert_int_equal(call_map(v, contexts[0], map, 0, 0), KVC_NOT_FOUND);
    assert_int_equal(call_map(v, contexts[0], 0, 0, 0), KVC_OK);
    assert_value(entry(v, 0, 0), 100, 0);
    assert_null(entry(v, 1, 0));
}

static void a_dead_connection_leaves_nothing(void **state)
{
    rig *r = *state;
    uint64_t context;
    start(r);
    put_blocks(r, 100, 8);
    for (int i = 0; i < 20; i++) {
        view *v = calloc(1, sizeof(*v));
        v->peer = h_connect(r->h.listen, NULL);
        assert_int_equal(h_open(v->peer, &r->schema, 100, 8, 0, &context), KVC_OK);
        for (int k = 0; k < 3; k++)
            assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
        assert_int_equal(kvc_metric_get(KVC_M_maps), 3);
        h_disconnect(v->peer);
        wait_gauge(KVC_M_maps, 0);
        wait_gauge(KVC_M_mapped_segments, 0);
        assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
        assert_int_equal(kvc_metric_get(KVC_M_map_pinned_bytes), 0);
        /* The segments live on as long as somebody has them mapped, and the word says that the map
         * is over. */
        assert_false(is_good(v));
        assert_value(v->segments[1], 100, 0);
        forget(v);
        free(v);
    }
}

static void who_may_not_map(void **state)
{
    rig *r = *state;
    uint64_t context;
    start(r);
    put_blocks(r, 1, 1);
    assert_int_equal(h_open(r->v.peer, &r->schema, 1, 1, 0, &context), KVC_OK);
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    req.u.map_context.context = context;
    assert_int_equal(h_call(r->v.peer, &req), KVC_INVALID); /* no parts */
    assert_int_equal(call_map(&r->v, context, 77, 0, 0), KVC_NOT_FOUND);
    assert_int_equal(call_map(&r->v, context, 0, 2, 0), KVC_INVALID);
    assert_int_equal(call_map(&r->v, context + 1, 0, 0, 0), KVC_STALE_HANDLE);
}

static void another_user_maps_if_allowed(void **state)
{
    rig *r = *state;
    uint64_t context;
    if (geteuid() != 0)
        skip(); /* only root can be another user */
    start(r);
    put_blocks(r, 1, 1);
    assert_int_equal(chmod(r->dir, 0755), 0);
    assert_int_equal(chmod(r->h.listen + strlen("shm://"), 0666), 0);
    uint64_t refused = kvc_metric_get(KVC_M_maps_refused);
    for (int allowed = 0; allowed < 2; allowed++) {
        r->h.server->settings.shm_map_uids = allowed ? "1, 65534" : "1";
        view *v = calloc(1, sizeof(*v));
        v->peer = h_connect(r->h.listen, NULL);
        assert_int_equal(seteuid(65534), 0); /* while it connects */
        kvc_status opened = h_open(v->peer, &r->schema, 1, 1, 0, &context);
        assert_int_equal(seteuid(0), 0);
        assert_int_equal(opened, KVC_OK);
        assert_int_equal(call_map(v, context, 0, 0, 0), allowed ? KVC_OK : KVC_DENIED);
        uint32_t picks[1] = {5};
        h_fetch_equal(v->peer, &r->schema, context, 1, 10, picks, 1); /* by request they may */
        forget(v);
        h_disconnect(v->peer);
        free(v);
    }
    assert_int_equal(kvc_metric_get(KVC_M_maps_refused), refused + 1);
}

static void not_over_other_transports(void **state)
{
    rig *r = *state;
    uint64_t context;
    snprintf(r->h.listen, sizeof(r->h.listen), "inproc://map-%d", (int)getpid());
    start(r);
    put_blocks(r, 1, 1);
    assert_int_equal(h_open(r->v.peer, &r->schema, 1, 1, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 0), KVC_UNSUPPORTED);
}

int main(void)
{
#define CASE(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
    const struct CMUnitTest tests[] = {
        CASE(rows_are_read_without_a_request),  CASE(segments_come_reply_by_reply),
        CASE(clients_cannot_write_or_resize),   CASE(a_pinned_value_is_not_used_again),
        CASE(caps_leave_the_rest_to_requests),  CASE(erase_takes_a_map_back),
        CASE(a_dead_connection_leaves_nothing), CASE(who_may_not_map),
        CASE(another_user_maps_if_allowed),     CASE(not_over_other_transports),
    };
    return cmocka_run_group_tests_name("map", tests, NULL, NULL);
}
