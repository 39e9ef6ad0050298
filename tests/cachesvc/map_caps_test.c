/*
 * map_caps_test.c: MapContext at the server: caps of pins and of segments, and what counts once.
 *
 * One thread; the server runs in this process, what it passed is read through its descriptors.
 */
#include "map_rig.h"

static void caps_leave_the_rest_to_requests(void **state)
{
    map_rig *r = *state;
    uint64_t context, other;
    uint32_t n_mapped = 0, picks[1] = {31 * H_TOKENS};
    r->h.settings.max_map_pin_bytes = 10 * VALUE_BYTES;
    map_start(r);
    map_put_blocks(r, 100, 32);
    assert_int_equal(h_open(r->v.peer, &r->schema, 100, 32, 0, &context), KVC_OK);
    assert_int_equal(call_map(&r->v, context, 0, 0, 0), KVC_OK);
    const kvc_reply *reply = &r->v.peer->xfer.reply;
    assert_int_equal(reply->u.map_context.n_blocks, 32);
    assert_int_equal(reply->u.map_context.unpinned, 54);
    assert_int_equal(reply->u.map_context.pinned_bytes, 10 * VALUE_BYTES);
    assert_int_equal(reply->u.map_context.max_bytes, 10 * VALUE_BYTES);
    for (uint32_t i = 0; i < 64; i++)
        n_mapped += map_entry(&r->v, i / 2, i % 2) != NULL;
    assert_int_equal(n_mapped, 10);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 10);
    h_fetch_equal(r->v.peer, &r->schema, context, 100, 0, picks, 1);
    /* Another connection of the tenant has nothing left, until the first has gone. */
    view *v = calloc(1, sizeof(*v));
    v->peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_open(v->peer, &r->schema, 100, 4, 0, &other), KVC_OK);
    assert_int_equal(call_map(v, other, 0, 0, 0), KVC_OK);
    assert_int_equal(v->peer->xfer.reply.u.map_context.unpinned, 8);
    assert_null(map_entry(v, 0, 0));
    h_disconnect(r->v.peer);
    map_forget(&r->v);
    map_wait_gauge(KVC_M_map_pins, 0);
    assert_int_equal(call_map(v, other, v->map, 0, 0), KVC_OK);
    map_assert_value(map_entry(v, 0, 0), 100, 0);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 8);
    r->v = *v;
    free(v);
}

/* A client that maps one context after the other does not come to have all of dram. */
static void mapped_segments_are_capped(void **state)
{
    map_rig *r = *state;
    view *v = &r->v;
    uint64_t context;
    uint32_t n_capped = 0, picks[1] = {3};
    r->h.settings.max_mapped_bytes = 2 * MIB;
    map_start(r);
    map_put_blocks(r, 0, 96);
    for (uint64_t b = 0; b < 96; b++) {
        assert_int_equal(h_open(v->peer, &r->schema, b, 1, 0, &context), KVC_OK);
        assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
        const kvc_reply *reply = &v->peer->xfer.reply;
        assert_int_equal(reply->u.map_context.n_blocks, 1);
        uint32_t unpinned = reply->u.map_context.unpinned;
        for (uint32_t p = 0; p < 2; p++) {
            if (map_entry(v, 0, p) != NULL)
                map_assert_value(map_entry(v, 0, p), b, p);
            else
                n_capped++;
        }
        if (unpinned == 2) {
            assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
            h_fetch_equal(v->peer, &r->schema, context, b, 0, picks, 1);
        }
        assert_true(kvc_metric_get(KVC_M_mapped_segments) <= 2);
        assert_true(kvc_metric_get(KVC_M_mapped_bytes) <= 2 * MIB);
        map_release(v);
    }
    assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 2);
    assert_int_equal(n_capped, 192 - 2 * 32);
    /* Another connection may map those, and no others; the segments count once. */
    view *w = calloc(1, sizeof(*w));
    w->peer = h_connect(r->h.listen, NULL);
    for (uint64_t b = 0; b < 96; b++) {
        assert_int_equal(h_open(w->peer, &r->schema, b, 1, 0, &context), KVC_OK);
        assert_int_equal(call_map(w, context, 0, 0, 0), KVC_OK);
    }
    assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 4);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_bytes), 2 * MIB);
    h_disconnect(w->peer);
    map_forget(w);
    free(w);
    map_wait_gauge(KVC_M_mapped_segments, 2);
    /* What is given back makes room for others, under the same ids. */
    map_give_back(v);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 0);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_bytes), 0);
    for (uint64_t b = 0; b < 96; b += 95) { /* the first it has had already */
        assert_int_equal(h_open(v->peer, &r->schema, b, 1, 0, &context), KVC_OK);
        assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
        map_assert_value(map_entry(v, 0, 0), b, 0);
    }
    assert_true(v->segments[1] != NULL && v->segments[2] != NULL && v->segments[3] == NULL);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 2);
}

/* However often it is laid out anew, a segment that is mapped is the same memory: passed once. */
static void a_segment_is_passed_once(void **state)
{
    map_rig *r = *state;
    view *v = &r->v;
    uint64_t context;
    map_start(r);
    for (uint64_t round = 0; round < 40; round++) {
        uint64_t block = 1000 + round;
        map_put_blocks(r, block, 1);
        assert_int_equal(h_open(v->peer, &r->schema, block, 1, 0, &context), KVC_OK);
        assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
        map_assert_value(map_entry(v, 0, 1), block, 1);
        assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 1);
        map_release(v);
        assert_int_equal(h_close(v->peer, context), KVC_OK);
        kvc_digest digest = h_digest(block);
        kvc_request req = {.method = KVC_ERASE}; /* the segment is empty then */
        req.u.erase.schema = r->schema.digest;
        req.u.erase.digests = &digest;
        req.u.erase.n_digests = 1;
        assert_int_equal(h_call(v->peer, &req), KVC_OK);
    }
}

/* A map that is asked to grow by what it has pins it no second time. */
static void the_same_map_pins_once(void **state)
{
    map_rig *r = *state;
    view *v = &r->v;
    uint64_t context;
    map_start(r);
    map_put_blocks(r, 100, 8);
    assert_int_equal(h_open(v->peer, &r->schema, 100, 8, 0, &context), KVC_OK);
    assert_int_equal(call_map(v, context, 0, 0, 4), KVC_OK);
    for (int i = 0; i < 50; i++) {
        assert_int_equal(call_map(v, context, v->map, 0, 6), KVC_OK);
        for (uint32_t b = 0; b < 6; b++)
            map_assert_value(map_entry(v, b, i % 2), 100 + b, i % 2);
        assert_int_equal(kvc_metric_get(KVC_M_map_pins), 12);
        assert_int_equal(kvc_metric_get(KVC_M_map_pinned_bytes), 12 * VALUE_BYTES);
    }
    map_release(v);
    /* Nor one that is in its context twice. */
    const kvc_digest twice[2] = {h_digest(100), h_digest(100)};
    kvc_request req = {.method = KVC_OPEN_CONTEXT};
    req.u.open_context.schema = r->schema.digest;
    req.u.open_context.digests = twice;
    req.u.open_context.n_digests = 2;
    assert_int_equal(h_call(v->peer, &req), KVC_OK);
    context = v->peer->xfer.reply.u.open_context.context;
    assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
    map_assert_value(map_entry(v, 0, 1), 100, 1);
    assert_ptr_equal(map_entry(v, 0, 1), map_entry(v, 1, 1));
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 2);
    map_release(v);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
    assert_int_equal(kvc_metric_get(KVC_M_map_pinned_bytes), 0);
}

/* An extension whose answer was lost is asked for again: its values are pinned, whatever the cap.
 */
static void what_is_pinned_needs_no_room(void **state)
{
    map_rig *r = *state;
    view *v = &r->v;
    uint64_t context;
    r->h.settings.max_map_pin_bytes = 8 * VALUE_BYTES;
    map_start(r);
    map_put_blocks(r, 100, 6);
    assert_int_equal(h_open(v->peer, &r->schema, 100, 6, 0, &context), KVC_OK);
    assert_int_equal(call_map(v, context, 0, 0, 4), KVC_OK);
    const kvc_reply *reply = &v->peer->xfer.reply;
    assert_int_equal(reply->u.map_context.unpinned, 0);
    assert_int_equal(call_map(v, context, v->map, 2, 4), KVC_OK);
    assert_int_equal(reply->u.map_context.n_blocks, 4);
    assert_int_equal(reply->u.map_context.unpinned, 4);
    for (uint32_t b = 0; b < 4; b++) {
        for (uint32_t p = 0; p < 2; p++) {
            if (b < 2)
                map_assert_value(map_entry(v, b, p), 102 + b, p);
            else
                assert_null(map_entry(v, b, p));
        }
    }
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 8);
    map_release(v);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
}

int main(void)
{
#define CASE(fn) cmocka_unit_test_setup_teardown(fn, map_setup, map_teardown)
    const struct CMUnitTest tests[] = {
        CASE(caps_leave_the_rest_to_requests), CASE(mapped_segments_are_capped),
        CASE(a_segment_is_passed_once),        CASE(the_same_map_pins_once),
        CASE(what_is_pinned_needs_no_room),
    };
    return cmocka_run_group_tests_name("map_caps", tests, NULL, NULL);
}
