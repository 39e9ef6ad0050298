/*
 * map_test.c: MapContext at the server: what is passed and sealed, what a pin keeps, who may map,
 * and every way in which a map ends.
 *
 * One thread; the server runs in this process, what it passed is read through its descriptors.
 */
#include "map_rig.h"

/* ---- cases ------------------------------------------------------------------------------------
 */

static void rows_are_read_without_a_request(void **state)
{
    map_rig *r = *state;
    uint64_t context;
    map_start(r);
    map_put_blocks(r, 100, 12);
    assert_int_equal(h_open(r->v.peer, &r->schema, 100, 12, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 8), KVC_OK);
    assert_int_equal(r->v.peer->xfer.reply.u.map_context.n_blocks, 8);
    assert_int_equal(r->v.peer->xfer.reply.u.map_context.unpinned, 0);
    assert_true(map_is_good(&r->v));
    for (uint32_t b = 0; b < 8; b++)
        for (uint32_t p = 0; p < 2; p++)
            map_assert_value(map_entry(&r->v, b, p), 100 + b, p);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 16);
    assert_int_equal(kvc_metric_get(KVC_M_map_pinned_bytes), 16 * VALUE_BYTES);
    /* It grows; nothing is passed twice. */
    uint64_t map = r->v.map, segments = kvc_metric_get(KVC_M_mapped_segments);
    assert_int_equal(call_map(&r->v, context, map, 8, 0), KVC_OK);
    assert_true(r->v.map == map);
    assert_int_equal(r->v.peer->xfer.reply.u.map_context.n_blocks, 4);
    for (uint32_t b = 0; b < 4; b++)
        map_assert_value(map_entry(&r->v, b, 1), 108 + b, 1);
    assert_true(kvc_metric_get(KVC_M_mapped_segments) >= segments);
    assert_true(kvc_metric_get(KVC_M_mapped_segments) <= segments + 1);
    assert_int_equal(kvc_metric_get(KVC_M_maps), 1);
    map_release(&r->v);
    assert_false(map_is_good(&r->v));
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
    map_rig *r = *state;
    kvc_put_value value = {.digest = h_digest(1)};
    uint64_t context, map = 0;
    r->h.settings.dram_bytes = 12ull << 30;
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
    map_start(r);
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
    map_rig *r = *state;
    uint64_t context;
    map_start(r);
    map_put_blocks(r, 1, 2);
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
    const uint8_t *first = map_entry(&r->v, 0, 0);
    map_put_blocks(r, 3, 1); /* the server itself still writes */
    map_assert_value(first, 1, 0);
}

/* Ten times as much as fits goes through the store: what is mapped stays where it is. */
static void a_pinned_value_is_not_used_again(void **state)
{
    map_rig *r = *state;
    uint64_t context;
    const uint8_t *at[16];
    uint32_t hits;
    map_start(r);
    map_put_blocks(r, 500, 8);
    assert_int_equal(h_open(r->v.peer, &r->schema, 500, 8, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 0), KVC_OK);
    for (uint32_t i = 0; i < 16; i++)
        at[i] = map_entry(&r->v, i / 2, i % 2);
    uint64_t evicted = kvc_metric_get(KVC_M_evicted_values);
    map_put_blocks(r, 1000, 1200);
    assert_true(kvc_metric_get(KVC_M_evicted_values) > evicted + 1500);
    assert_true(map_is_good(&r->v));
    for (uint32_t i = 0; i < 16; i++)
        map_assert_value(at[i], 500 + i / 2, i % 2);
    assert_int_equal(h_match(r->v.peer, &r->schema, 500, 8, PART_IDS, 2, &hits), KVC_OK);
    assert_int_equal(hits, 8);
    map_close_fds(&r->v); /* or the server's segments would be counted twice */
    h_check_caps(&r->h);
    /* Without the pins they give way like all others, to values that are read as they were. */
    map_release(&r->v);
    for (uint64_t b = 5000; b < 5600; b++) {
        uint32_t picks[1] = {0};
        map_put_blocks(r, b, 1);
        assert_int_equal(h_open(r->v.peer, &r->schema, b, 1, 0, &context), KVC_OK);
        for (uint32_t k = 0; k < 4; k++)
            assert_int_equal(h_fetch(r->v.peer, context, PART_IDS[k % 2], picks, 1), KVC_OK);
        assert_int_equal(h_close(r->v.peer, context), KVC_OK);
    }
    assert_int_equal(h_match(r->v.peer, &r->schema, 500, 8, PART_IDS, 2, &hits), KVC_OK);
    assert_int_equal(hits, 0);
}

/* The words of a map: cleared by its erase, before anything else can lie there. */
static void erase_takes_a_map_back(void **state)
{
    map_rig *r = *state;
    uint64_t contexts[2];
    view *v = &r->v;
    map_start(r);
    map_put_blocks(r, 100, 4);
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
    assert_true(map_is_good(v)); /* the other map has none of it */
    assert_int_equal(kvc_metric_get(KVC_M_maps_revoked), revoked + 1);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 4);
    assert_int_equal(call_map(v, contexts[0], map, 0, 0), KVC_NOT_FOUND);
    assert_int_equal(call_map(v, contexts[0], 0, 0, 0), KVC_OK);
    map_assert_value(map_entry(v, 0, 0), 100, 0);
    assert_null(map_entry(v, 1, 0));
}

static void a_dead_connection_leaves_nothing(void **state)
{
    map_rig *r = *state;
    uint64_t context;
    map_start(r);
    map_put_blocks(r, 100, 8);
    for (int i = 0; i < 20; i++) {
        view *v = calloc(1, sizeof(*v));
        v->peer = h_connect(r->h.listen, NULL);
        assert_int_equal(h_open(v->peer, &r->schema, 100, 8, 0, &context), KVC_OK);
        for (int k = 0; k < 3; k++)
            assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
        assert_int_equal(kvc_metric_get(KVC_M_maps), 3);
        h_disconnect(v->peer);
        map_wait_gauge(KVC_M_maps, 0);
        map_wait_gauge(KVC_M_mapped_segments, 0);
        assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
        assert_int_equal(kvc_metric_get(KVC_M_map_pinned_bytes), 0);
        /* The segments live on as long as somebody has them mapped, and the word says that the map
         * is over. */
        assert_false(map_is_good(v));
        map_assert_value(v->segments[1], 100, 0);
        map_forget(v);
        free(v);
    }
}

static void who_may_not_map(void **state)
{
    map_rig *r = *state;
    uint64_t context;
    map_start(r);
    map_put_blocks(r, 1, 1);
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
    map_rig *r = *state;
    uint64_t context;
    if (geteuid() != 0)
        skip(); /* only root can be another user */
    map_start(r);
    map_put_blocks(r, 1, 1);
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
        map_forget(v);
        h_disconnect(v->peer);
        free(v);
    }
    assert_int_equal(kvc_metric_get(KVC_M_maps_refused), refused + 1);
}

static void not_over_other_transports(void **state)
{
    map_rig *r = *state;
    uint64_t context;
    snprintf(r->h.listen, sizeof(r->h.listen), "inproc://map-%d", (int)getpid());
    map_start(r);
    map_put_blocks(r, 1, 1);
    assert_int_equal(h_open(r->v.peer, &r->schema, 1, 1, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 0), KVC_UNSUPPORTED);
}

int main(void)
{
#define CASE(fn) cmocka_unit_test_setup_teardown(fn, map_setup, map_teardown)
    const struct CMUnitTest tests[] = {
        CASE(rows_are_read_without_a_request),
        CASE(segments_come_reply_by_reply),
        CASE(clients_cannot_write_or_resize),
        CASE(a_pinned_value_is_not_used_again),
        CASE(erase_takes_a_map_back),
        CASE(a_dead_connection_leaves_nothing),
        CASE(who_may_not_map),
        CASE(another_user_maps_if_allowed),
        CASE(not_over_other_transports),
    };
    return cmocka_run_group_tests_name("map", tests, NULL, NULL);
}
